//! The worker put together: what is started, in which order, and in which order it stops.
//!
//! ```text
//!   start: find the role ─▶ listen ─▶ read the state table ─▶ follow each table ─▶ its shards
//!   stop:  shards drain, checkpoint, release ─▶ tables ─▶ state table ─▶ metrics and health
//! ```

pub mod context;
pub mod discovery;
pub mod gone;
pub mod letter;
pub mod rows;
pub mod shard;
pub mod source;
pub mod start;
pub mod stream;
pub mod table;

use std::sync::Arc;
use std::time::Duration;

use metrics_exporter_prometheus::PrometheusHandle;
use tokio::net::TcpListener;
use tokio::sync::{Notify, Semaphore, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::backoff::Backoff;
use crate::config::Config;
use crate::config::read::Loaded;
use crate::error::Exit;
use crate::observe::board::Board;
use crate::observe::health::Health;
use crate::observe::{metrics, server};
use crate::stream::listing::Lister;
use context::Shared;
use rows::{Snapshot, watch_rows};
use start::{Feed, Role};

const HEARTBEAT: Duration = Duration::from_secs(1);
/// Dead letters on their way at once, over all tables.
const LETTERS_AT_ONCE: usize = 8;
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// A worker, ready to run.
pub struct Worker {
    config: Config,
    role: Role,
    listener: TcpListener,
    metrics: Option<PrometheusHandle>,
    health: Arc<Health>,
    board: Arc<Board>,
}

impl Worker {
    /// A worker in `role` that serves metrics and health on `listener`.
    pub fn new(
        loaded: Loaded,
        role: Role,
        listener: TcpListener,
        metrics: Option<PrometheusHandle>,
    ) -> Self {
        Self {
            config: loaded.config,
            role,
            listener,
            metrics,
            health: Arc::new(Health::default()),
            board: Arc::new(Board::default()),
        }
    }

    /// Where its shards stand, for who runs it in-process.
    pub fn board(&self) -> Arc<Board> {
        Arc::clone(&self.board)
    }

    /// Its health, for who runs it in-process.
    pub fn health(&self) -> Arc<Health> {
        Arc::clone(&self.health)
    }

    /// Runs until `stop` is cancelled, then drains within the configured grace.
    pub async fn run(self, stop: CancellationToken) -> Exit {
        let serving = CancellationToken::new();
        let server = tokio::spawn(server::serve(
            self.listener,
            Arc::clone(&self.health),
            self.metrics.clone(),
            serving.clone(),
        ));
        let exit = match self.role {
            Role::Standby { active } => {
                tracing::info!(
                    active,
                    "standby: this region is active, nothing is fed into it"
                );
                self.health.set_standby(&active);
                beat(&self.health, None, self.metrics.as_ref(), &stop).await;
                Exit::Done
            }
            Role::Feed(feed) => {
                let health = Arc::clone(&self.health);
                feed_until(
                    self.config,
                    *feed,
                    health,
                    self.board,
                    self.metrics.as_ref(),
                    &stop,
                )
                .await
            }
        };
        serving.cancel();
        // Ends when its last connection does, which nobody should have to wait for.
        let _ = tokio::time::timeout(HEARTBEAT, server).await;
        exit
    }
}

/// Feeds the replicas until `stop`, then drains.
async fn feed_until(
    config: Config,
    feed: Feed,
    health: Arc<Health>,
    board: Arc<Board>,
    metrics: Option<&PrometheusHandle>,
    stop: &CancellationToken,
) -> Exit {
    let (snapshots, rows) = watch::channel(Arc::new(Snapshot::default()));
    let grace = config.worker.shutdown_grace;
    let shared = Arc::new(Shared {
        epoch: feed.epoch,
        owner: owner(),
        lister: Lister::new(feed.source.streams.clone()),
        source: feed.source,
        target: feed.target,
        state: feed.state,
        keys: feed.keys,
        dead_letters: feed.dead_letters,
        letters: Semaphore::new(LETTERS_AT_ONCE),
        health,
        board,
        rows,
        rescan: Arc::new(Notify::new()),
        config,
    });
    tracing::info!(
        group = shared.config.group,
        source = shared.source.label,
        target = shared.target.label,
        epoch = shared.epoch,
        owner = shared.owner,
        "feeding"
    );
    // Dropped with this function, and their tasks with them.
    let mut keepers = JoinSet::new();
    keepers.spawn(keep_watching(Arc::clone(&shared), snapshots));
    let beating = CancellationToken::new();
    let mut tables = JoinSet::new();
    for table in &shared.config.tables {
        shared.health.set_starting(&table.name);
        tables.spawn(supervise(Arc::clone(&shared), table.clone(), stop.clone()));
    }
    let drain = async {
        stop.cancelled().await;
        tracing::info!(grace_seconds = grace.as_secs_f64(), "draining");
        tokio::time::timeout(grace, async {
            let mut clean = true;
            while let Some(ended) = tables.join_next().await {
                clean &= ended.unwrap_or(false);
            }
            clean
        })
        .await
    };
    // The heart beats until the very end: draining is life.
    let drained = tokio::select! {
        drained = drain => drained,
        () = beat(&shared.health, Some(&shared), metrics, &beating) => Ok(false),
    };
    match drained {
        Ok(true) => {
            tracing::info!("drained: what was under way is applied, checkpointed and released");
            Exit::Done
        }
        Ok(false) => {
            tracing::error!(
                "not all shards could be released; the next worker waits for their leases to expire and goes on from the last checkpoint"
            );
            Exit::Remains
        }
        Err(_) => {
            // Writes may be in flight, so leases are not released: they expire.
            tracing::error!(
                "the grace ran out before everything was applied; the next worker goes on from the last checkpoint"
            );
            Exit::Remains
        }
    }
}

/// Keeps a table followed: a task that ends by itself is noticed and started again.
/// Returns whether all its shards were drained and released.
async fn supervise(
    shared: Arc<Shared>,
    table: crate::config::Table,
    stop: CancellationToken,
) -> bool {
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    loop {
        // A set of one: dropped with this future, it takes the task with it.
        let mut task = JoinSet::new();
        task.spawn(table::follow_table(
            Arc::clone(&shared),
            table.clone(),
            stop.clone(),
        ));
        let ended = task.join_next().await;
        if stop.is_cancelled() {
            return matches!(ended, Some(Ok(true)));
        }
        let panicked = matches!(ended, Some(Err(_)));
        tracing::error!(
            table = table.name,
            panicked,
            "the task of a table ended by itself; it starts over"
        );
        tokio::time::sleep(backoff.pause()).await;
    }
}

/// Keeps the state table read: without it no shard is found, taken or given up, so a reader that
/// dies is started again.
async fn keep_watching(shared: Arc<Shared>, snapshots: watch::Sender<Arc<Snapshot>>) {
    let snapshots = Arc::new(snapshots);
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    loop {
        let mut task = JoinSet::new();
        task.spawn(watch_rows(
            shared.state.clone(),
            shared.config.leases.duration,
            Arc::clone(&snapshots),
            Arc::clone(&shared.rescan),
            Arc::clone(&shared.health),
        ));
        task.join_next().await;
        tracing::error!("the reader of the state table ended by itself; it starts over");
        tokio::time::sleep(backoff.pause()).await;
    }
}

/// The main loop: shows once a second that the worker lives and where it stands.
async fn beat(
    health: &Health,
    shared: Option<&Shared>,
    metrics: Option<&PrometheusHandle>,
    stop: &CancellationToken,
) {
    let mut ticks = tokio::time::interval(HEARTBEAT);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = ticks.tick() => {}
        }
        health.beat();
        metrics::ready(health.reasons().is_empty());
        if let Some(shared) = shared {
            let rows = shared.rows.borrow().clone();
            let open = rows
                .shards
                .iter()
                .filter(|row| row.epoch == shared.epoch && !row.is_finished())
                .filter(|row| {
                    shared
                        .config
                        .tables
                        .iter()
                        .any(|table| table.name == row.table)
                })
                .map(|row| (row.table.as_str(), row.shard_id.as_str(), row.proven_ms()));
            shared.board.publish(open, shared.source.clock.now_ms());
        }
        if let Some(metrics) = metrics {
            metrics.run_upkeep();
        }
    }
}

/// This host and process start. The nonce makes a restarted worker somebody else.
fn owner() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let host = match host.trim() {
        "" => "host",
        host => host,
    };
    let nonce: u64 = rand::random();
    format!("{host}-{}#{nonce:016x}", std::process::id())
}
