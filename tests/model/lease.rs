//! A lease this process owns. Mirrors `src/lease/held.rs`, step by step.

use std::cell::Cell;
use std::future::poll_fn;
use std::rc::Rc;

use farshore::lease::row::{SHARD_END, ShardRow};
use farshore::lease::rules::{Refused, after_refusal, take_name};
use farshore::stream::ShardId;
use farshore::stream::sequence::SequenceNumber;

use super::sim::{Alarm, Lock, Ms, ProcessId, Signal, ready};
use super::state::{self, Change, Unknown};
use super::world::{DURATION, World};

/// A right to write that ends by itself (mirrors `dynamo::transmit::Bound`).
pub trait Bound {
    fn remaining(&self, now: Ms) -> Ms;
    /// What is wrong with a write that is transmitted now under this right.
    fn objection(&self, now: Ms) -> Option<String>;
}

pub struct Lease {
    world: Rc<World>,
    process: ProcessId,
    owner: String,
    pub shard: ShardId,
    row: Lock<ShardRow>,
    valid_until: Cell<Ms>,
    pub lost: Signal,
    releasing: Cell<bool>,
}

impl Lease {
    /// Mirrors `Lease::take`.
    pub async fn take(
        world: &Rc<World>,
        process: ProcessId,
        mut row: ShardRow,
        name: &str,
    ) -> Result<Option<Rc<Self>>, Unknown> {
        let known = row.lease_counter;
        let owner = take_name(name, world.sim.below(u64::from(u32::MAX)) as u32);
        row.lease_owner = Some(owner.clone());
        row.lease_counter += 1;
        row.owner_switches_since_checkpoint += 1;
        let sent = world.sim.now();
        let change = Change::ReplaceShard(row.clone(), known);
        if !state::write(world, process, change).await? {
            return Ok(None);
        }
        let lease = Rc::new(Self {
            world: Rc::clone(world),
            process,
            owner,
            shard: row.shard(),
            row: Lock::new(row),
            valid_until: Cell::new(sent + DURATION),
            lost: Signal::default(),
            releasing: Cell::new(false),
        });
        world.leases.borrow_mut().push(Rc::downgrade(&lease));
        Ok(Some(lease))
    }

    pub async fn row(&self) -> ShardRow {
        self.row.lock(&self.world.sim).await.get()
    }

    /// Mirrors `Lease::checkpoint`.
    pub async fn checkpoint(&self, sequence: &SequenceNumber) -> Result<(), Unknown> {
        self.update(|row| row.checkpoint_at(sequence)).await
    }

    /// Mirrors `Lease::finish`.
    pub async fn finish(&self, children: &[ShardId]) -> Result<(), Unknown> {
        self.update(|row| {
            row.checkpoint = SHARD_END.to_owned();
            row.child_shard_ids = children.iter().map(|child| child.0.clone()).collect();
            row.owner_switches_since_checkpoint = 0;
        })
        .await
    }

    /// Mirrors `Lease::release`.
    pub async fn release(&self) -> Result<(), Unknown> {
        self.releasing.set(true);
        let result = self.update(|row| row.lease_owner = None).await;
        if result.is_ok() {
            self.lost.set(&self.world.sim);
        }
        result
    }

    /// Mirrors `Lease::update`: twice, for the first refusal may be an echo of our own update.
    async fn update(&self, change: impl Fn(&mut ShardRow)) -> Result<(), Unknown> {
        let world = &self.world;
        let known = self.row.lock(&world.sim).await;
        for _ in 0..2 {
            if self.lost.is_set() {
                break;
            }
            let mut next = known.get();
            let counter = next.lease_counter;
            change(&mut next);
            next.lease_counter = counter + 1;
            let sent = world.sim.now();
            let written = Change::ReplaceShard(next.clone(), counter);
            if state::write(world, self.process, written).await? {
                known.set(next);
                let until = self.valid_until.get().max(sent + DURATION);
                self.valid_until.set(until);
                return Ok(());
            }
            let mut row = known.get();
            let current = state::get(world, &row.lease_key).await?;
            let releasing = self.releasing.get();
            match after_refusal(current.as_ref(), &self.owner, counter, releasing) {
                Refused::Released => return Ok(()),
                Refused::StillOurs { counter } => {
                    world.count(|counts| counts.still_ours += 1);
                    row = current.unwrap_or(row);
                    row.lease_counter = counter;
                    known.set(row);
                }
                Refused::Lost => self.lost.set(&world.sim),
            }
        }
        self.lost.set(&world.sim);
        Err(Unknown)
    }

    /// Mirrors `Lease::keep`: renews at a third of the duration until the lease is lost.
    pub async fn keep(&self) {
        let sim = &self.world.sim;
        let mut pause = DURATION / 3;
        loop {
            let until = sim.now() + pause;
            let mut alarm = Alarm::default();
            poll_fn(|_| ready(self.lost.look(sim) || alarm.is_due(sim, until))).await;
            if self.lost.is_set() {
                return;
            }
            let sent = sim.now();
            pause = match self.update(|_| {}).await {
                Ok(()) => (DURATION / 3 - (sim.now() - sent)).max(0),
                Err(Unknown) if self.lost.is_set() => return,
                Err(Unknown) => DURATION / 20,
            };
        }
    }
}

impl Bound for Lease {
    fn remaining(&self, now: Ms) -> Ms {
        match self.lost.is_set() {
            true => 0,
            false => (self.valid_until.get() - now).max(0),
        }
    }

    /// Another worker holds the same lease, by its own belief. One that is being released sends
    /// nothing any more, and one whose process stands still cannot.
    fn objection(&self, now: Ms) -> Option<String> {
        let mut leases = self.world.leases.borrow_mut();
        leases.retain(|lease| lease.strong_count() > 0);
        let other = leases
            .iter()
            .filter_map(|lease| lease.upgrade())
            .find(|other| {
                !std::ptr::eq(Rc::as_ptr(other), self)
                    && other.shard == self.shard
                    && other.remaining(now) > 0
                    && !other.releasing.get()
                    && !self.world.sim.is_paused(other.process)
            })?;
        Some(format!(
            "beside p{}, which holds {} as {}",
            other.process, other.shard, other.owner
        ))
    }
}
