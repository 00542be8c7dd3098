//! The signs of life of a shard's task, and what happens when they are missing.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::context::TableContext;
use crate::apply::batch::BATCH_OPS_MAX;
use crate::apply::budget::Budget;
use crate::observe::health::Health;
use crate::observe::liveness::{PULSE_EVERY, Signs};
use crate::stream::sequence::SequenceNumber;

/// What a shard's task tells of itself.
pub struct Vital {
    health: Arc<Health>,
    table: String,
    shard: String,
    signs: Signs,
    /// How far everything was durable when last looked.
    durable: Option<SequenceNumber>,
    /// What its writes wait for.
    budget: Arc<Budget>,
    /// Units that its batches may have to wait for, one for each item at least.
    waiting: f64,
    /// The least share that is believed in, in units per second: with less it counts as standing still.
    least: f64,
    checkpoint_every: Duration,
}

/// A share of the write budget below one part in so many is no share.
const SHARE_PARTS: f64 = 200.0;

impl Vital {
    /// The signs of the task of `shard`, which starts now.
    pub fn new(context: &TableContext, shard: &str) -> Self {
        let config = &context.shared.config;
        let limit = config.units_per_second(&context.table);
        let mut vital = Self {
            health: Arc::clone(&context.shared.health),
            table: context.table.name.clone(),
            shard: shard.to_owned(),
            signs: Signs::fresh(Instant::now()),
            durable: None,
            budget: Arc::clone(context.writer.budget()),
            waiting: (config.worker.concurrency * BATCH_OPS_MAX) as f64,
            least: limit.map_or(f64::INFINITY, f64::from) / SHARE_PARTS,
            checkpoint_every: config.worker.checkpoint_every,
        };
        vital.signs.allowance = vital.allowance();
        vital.tell();
        vital
    }

    /// What it may take longer than others: its batches wait for each other's write units.
    fn allowance(&self) -> Duration {
        let rate = match self.least.is_finite() {
            true => self.budget.rate().max(self.least),
            // Without a limit only throttling sets one.
            false => self.budget.rate().max(1.0),
        };
        self.checkpoint_every + Duration::from_secs_f64(self.waiting / rate)
    }

    /// A page came.
    pub fn read(&mut self) {
        self.signs.read = Instant::now();
    }

    /// The loop came round. `durable` is how far everything is; `rests` says that nothing has to
    /// move, `full` that nothing has to be read.
    pub fn turned(&mut self, durable: Option<&SequenceNumber>, rests: bool, full: bool) {
        let now = Instant::now();
        self.signs.turned = now;
        if rests || durable != self.durable.as_ref() {
            self.signs.moved = now;
            self.durable = durable.cloned();
        }
        if full {
            self.signs.read = now;
        }
        // A share that becomes larger does not make what waits already late.
        let allowance = self.allowance();
        if rests || allowance > self.signs.allowance {
            self.signs.allowance = allowance;
        }
        self.tell();
    }

    /// Another attempt to end the shard begins; listing its children may take as long as a listing.
    pub fn ends(&mut self) {
        self.signs = Signs {
            allowance: self.signs.allowance.max(self.health.listing_limit()),
            ..Signs::fresh(Instant::now())
        };
        self.tell();
    }

    fn tell(&self) {
        self.health.shard(&self.table, &self.shard, self.signs);
    }
}

/// Returns once the task of `shard` shows no more life and must be ended: it can not do so itself.
pub async fn beyond_repair(health: &Health, table: &str, shard: &str) {
    loop {
        tokio::time::sleep(PULSE_EVERY).await;
        if health.is_beyond_repair(table, shard) {
            health.task_died("shard", table);
            tracing::error!(
                table,
                shard,
                "a shard stands still although nothing is known to hold it; its task is ended, its lease expires and is taken again"
            );
            return;
        }
    }
}

/// What is known of a shard's task is forgotten with it, whichever way it ends.
pub struct Farewell {
    /// What the task belongs to.
    pub context: Arc<TableContext>,
    /// Its shard.
    pub shard: String,
    /// What health knows its renewals by.
    pub renewal: String,
}

impl Drop for Farewell {
    fn drop(&mut self) {
        let shared = &self.context.shared;
        let table = &self.context.table.name;
        shared.board.remove(table, &self.shard);
        shared.health.forget(table, &self.shard);
        shared.health.forget(table, &self.renewal);
        shared.health.shard_left(table, &self.shard);
    }
}
