//! The worker put together: what is started, in which order, and in which order it stops.
//!
//! ```text
//!   start: find the role ─▶ listen ─▶ read the state table ─▶ follow each table ─▶ its shards
//!   stop:  the others are told ─▶ shards drain, checkpoint, release ─▶ tables ─▶ its row ─▶ state table
//!          ─▶ metrics and health
//!   the epoch is over:  drained as for a stop ─▶ the newer record is stored ─▶ acknowledged ─▶ find the role
//! ```

pub mod ahead;
pub mod audit;
pub mod context;
pub mod covered;
pub mod discovery;
pub mod doubts;
pub mod fleet;
pub mod gone;
pub mod halt;
mod homeward;
pub mod job;
pub mod letter;
pub mod letters;
pub mod lookout;
pub mod member;
pub mod proven;
pub mod records;
pub mod role;
pub mod rows;
pub mod seen;
pub mod shard;
pub mod source;
pub mod start;
pub mod stream;
pub mod table;
pub mod tap;
pub mod ttl;
pub mod vital;
pub mod whole;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use metrics_exporter_prometheus::PrometheusHandle;
use tokio::net::TcpListener;
use tokio::sync::{Notify, Semaphore, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::apply::batch::Writer;
use crate::backoff::Backoff;
use crate::config::read::Loaded;
use crate::config::{Config, Table};
use crate::dynamo::Regions;
use crate::error::Exit;
use crate::lease::budget_keeper::BudgetKeeper;
use crate::lease::control::{Flow, Heed, heed};
use crate::lease::term::Term;
use crate::observe::board::Board;
use crate::observe::health::Health;
use crate::observe::liveness::{Limits, PULSE_EVERY};
use crate::observe::whereabouts::Whereabouts;
use crate::observe::{metrics, server};
use crate::stream::listing::Lister;
use ahead::Ahead;
use context::Shared;
use doubts::repair_doubts;
use fleet::Fleet;
use halt::Halts;
use member::Member;
use records::{Records, watch_term};
use rows::{Snapshot, watch_rows};
use seen::Feeding;
use start::{Feed, Role};

const HEARTBEAT: Duration = Duration::from_secs(1);
/// Dead letters on their way at once, over all tables.
const LETTERS_AT_ONCE: usize = 8;
/// Tables copied or repaired at once by one worker.
const COPIES_AT_ONCE: usize = 4;
/// Longest wait for an ended task to be gone.
const ABORTED_WITHIN: Duration = Duration::from_secs(5);
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// A worker, ready to run.
pub struct Worker {
    loaded: Loaded,
    regions: Arc<Regions>,
    role: Role,
    listener: TcpListener,
    metrics: Option<PrometheusHandle>,
    health: Arc<Health>,
    board: Arc<Board>,
    whereabouts: Whereabouts,
}

impl Worker {
    /// A worker in `role` that serves metrics and health on `listener`. It finds its role anew in `regions`
    /// whenever the active region changes.
    pub fn new(
        loaded: Loaded,
        regions: Arc<Regions>,
        role: Role,
        listener: TcpListener,
        metrics: Option<PrometheusHandle>,
    ) -> Self {
        Self {
            whereabouts: Whereabouts::new(&loaded, &regions),
            loaded,
            regions,
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
        // Before anybody can ask: who asked early is answered first.
        if matches!(self.role, Role::Feed(_)) {
            for table in &self.loaded.config.tables {
                self.health.set_starting(&table.name);
            }
        }
        let serving = CancellationToken::new();
        let stage = server::Stage::default();
        let server = tokio::spawn(server::serve(
            self.listener,
            Arc::clone(&self.health),
            self.metrics.clone(),
            stage.clone(),
            self.whereabouts.clone(),
            serving.clone(),
        ));
        let roles = role::Roles {
            loaded: self.loaded,
            regions: self.regions,
            health: self.health,
            board: self.board,
            whereabouts: self.whereabouts,
            metrics: self.metrics,
            stage,
            record: Arc::default(),
        };
        let exit = roles.play(self.role, &stop).await;
        serving.cancel();
        // Ends when its last connection does, which nobody should have to wait for.
        let _ = tokio::time::timeout(HEARTBEAT, server).await;
        exit
    }
}

/// How feeding ended.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Fed {
    /// As it was asked to.
    Stopped(Exit),
    /// Its epoch is over, and that is acknowledged.
    Over,
}

/// Feeds the replicas until `stop` or until the epoch is over, then drains.
async fn feed_until(
    config: Config,
    feed: Feed,
    records: Arc<Records>,
    health: Arc<Health>,
    (board, stage): (Arc<Board>, &server::Stage),
    metrics: Option<&PrometheusHandle>,
    stop: &CancellationToken,
) -> Fed {
    let (snapshots, rows) = watch::channel(Arc::new(Snapshot::default()));
    let grace = config.worker.shutdown_grace;
    let owner = owner();
    let term = Term::new(feed.epoch, config.leases.duration, feed.begun);
    records.learn(&feed.told);
    let budgets = BudgetKeeper::new(feed.state.clone(), &owner, &config, &config.tables, None);
    let shared = Arc::new(Shared {
        writers: writers(&config, &feed, (&term, &budgets)),
        budgets,
        epoch: feed.epoch,
        term,
        fleet: Arc::new(Fleet::new(&owner, feed.epoch, config.leases.duration)),
        member: Member::new(feed.state.clone(), &owner, feed.epoch),
        owner,
        lister: Lister::new(feed.source.streams.clone()),
        source: feed.source,
        target: feed.target,
        state: feed.state,
        dead_letters: feed.dead_letters,
        letters: Semaphore::new(LETTERS_AT_ONCE),
        audits: Semaphore::new(1),
        copies: Semaphore::new(COPIES_AT_ONCE),
        ahead: Ahead::new(config.worker.read_ahead.as_u64(), config.worker.concurrency),
        halts: Halts::new(&config),
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
    stage.put(Arc::new(Feeding::new(&shared)));
    shared.health.expect_life(Limits::of(&shared.config));
    metrics::begin_worker();
    // Cancelled with `stop`, and at once when the epoch is over.
    let ending = stop.child_token();
    let never = CancellationToken::new();
    let entered = tokio::select! {
        entered = enter(&shared, &records, stop) => entered,
        () = beat(&shared.health, None, metrics, &never) => false,
    };
    if !entered {
        // The row may be there already.
        member::depart(&shared).await;
        return Fed::Stopped(Exit::Done);
    }
    // Dropped with this function, and their tasks with them.
    let mut keepers = JoinSet::new();
    keepers.spawn(keep_watching(Arc::clone(&shared), snapshots));
    keepers.spawn(member::keep_membership(Arc::clone(&shared)));
    keepers.spawn(letters::watch_letters(Arc::clone(&shared)));
    keepers.spawn(member::keep_budgets(Arc::clone(&shared)));
    keepers.spawn(ttl::keep_ttl(Arc::clone(&shared)));
    keepers.spawn(keep_term(Arc::clone(&shared), Arc::clone(&records)));
    let mut repairs = JoinSet::new();
    // Over already, it has nothing to do but to acknowledge that.
    let tables_followed = match shared.is_in_epoch() {
        true => shared.config.tables.as_slice(),
        false => &[],
    };
    for table in tables_followed {
        repairs.spawn(keep_repairing(
            Arc::clone(&shared),
            table.clone(),
            ending.clone(),
        ));
        repairs.spawn(keep_mending(
            Arc::clone(&shared),
            table.clone(),
            ending.clone(),
        ));
        repairs.spawn(keep_auditing(
            Arc::clone(&shared),
            table.clone(),
            ending.clone(),
        ));
    }
    let beating = CancellationToken::new();
    // Cancelled a moment after `stop`: the others know by then that this worker's share is theirs.
    let draining = CancellationToken::new();
    let mut tables = JoinSet::new();
    for table in tables_followed {
        shared.health.set_starting(&table.name);
        tables.spawn(supervise(
            Arc::clone(&shared),
            table.clone(),
            draining.clone(),
        ));
    }
    let drain = async {
        tokio::select! {
            () = stop.cancelled() => {}
            () = shared.term.over().cancelled() => {}
        }
        tracing::info!(grace_seconds = grace.as_secs_f64(), "draining");
        let drained = tokio::time::timeout(grace, async {
            match shared.is_in_epoch() {
                true => member::leave(&shared).await,
                // Every moment counts, and there is nobody to leave anything to.
                false => shared.fleet.leave(),
            }
            ending.cancel();
            draining.cancel();
            let mut clean = true;
            while let Some(ended) = tables.join_next().await {
                clean &= ended.unwrap_or(false);
            }
            while repairs.join_next().await.is_some() {}
            clean
        })
        .await;
        // It may have ended while this worker was asked to stop: that is acknowledged as well.
        let why = shared.term.why().cloned();
        if let Some(epoch) = why.as_ref().and_then(Heed::epoch) {
            // Whatever is left of them sends nothing any more.
            tables.shutdown().await;
            repairs.shutdown().await;
            if records.adopt_patiently(&shared.health, stop).await {
                // What is stored there now may be later still.
                let epoch = records.own().map_or(epoch, |own| own.epoch.max(epoch));
                member::acknowledge(&shared, epoch, stop).await;
            }
        }
        if stop.is_cancelled() && drained == Ok(true) {
            member::depart(&shared).await;
        }
        drained
    };
    // The heart beats until the very end: draining is life.
    let drained = tokio::select! {
        drained = drain => drained,
        () = beat(&shared.health, Some(&shared), metrics, &beating) => Ok(false),
    };
    match drained {
        Ok(true) => {
            tracing::info!("drained: what was under way is applied, checkpointed and released");
        }
        Ok(false) => {
            tracing::error!(
                "not all shards could be released; the next worker waits for their leases to expire and goes on from the last checkpoint"
            );
        }
        // Writes may be in flight, so leases are not released: they expire.
        Err(_) => {
            tracing::error!(
                "the grace ran out before everything was applied; the next worker goes on from the last checkpoint"
            );
        }
    }
    match (stop.is_cancelled(), drained) {
        (false, _) => Fed::Over,
        (true, Ok(true)) => Fed::Stopped(Exit::Done),
        (true, _) => Fed::Stopped(Exit::Remains),
    }
}

/// What has to be so before anything is written: this worker's row is there, so that a failover counts it; and
/// the control record, read after that, says no later epoch, so that none has begun before it was. In a later
/// epoch than the first the own state table says that one by then: who starts anew while nobody else answers
/// must not go back. False once asked to stop.
async fn enter(shared: &Shared, records: &Records, stop: &CancellationToken) -> bool {
    if shared.epoch > 1 && !records.adopt_patiently(&shared.health, stop).await {
        return false;
    }
    if !member::enter(shared, stop).await || !records.read_patiently(&shared.health, stop).await {
        return false;
    }
    let flow = Flow {
        epoch: shared.epoch,
        active: &shared.source.label,
    };
    // Going on ends nothing.
    shared.term.end(heed(flow, &records.seen()));
    true
}

/// Keeps the control records read: without them the term ends, and nothing is written. A reader that
/// dies is started again.
async fn keep_term(shared: Arc<Shared>, records: Arc<Records>) {
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    loop {
        let mut task = JoinSet::new();
        task.spawn(watch_term(
            Arc::clone(&records),
            Arc::clone(&shared.term),
            (shared.epoch, shared.source.label.clone()),
            Arc::clone(&shared.health),
            Arc::clone(&shared.target.clock),
        ));
        task.join_next().await;
        if !shared.is_in_epoch() {
            return;
        }
        tracing::error!("the reader of the control records ended by itself; it starts over");
        shared.health.task_died("records", "");
        tokio::time::sleep(backoff.pause()).await;
    }
}

/// Keeps a table followed: a task that ends by itself is noticed and started again.
/// Returns whether all its shards were drained and released.
async fn supervise(shared: Arc<Shared>, table: Table, stop: CancellationToken) -> bool {
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    loop {
        // A set of one: dropped with this future, it takes the task with it.
        let mut task = JoinSet::new();
        task.spawn(table::follow_table(
            Arc::clone(&shared),
            table.clone(),
            stop.clone(),
        ));
        let ended = tokio::select! {
            ended = task.join_next() => ended,
            why = stuck(&shared.health, &table.name, &stop) => {
                tracing::error!(
                    table = table.name,
                    why,
                    "the tasks of a table are ended and start over; its leases expire and are taken again"
                );
                task.abort_all();
                // A task that never waits cannot be ended; its leases are fenced all the same.
                let _ = tokio::time::timeout(ABORTED_WITHIN, task.join_next()).await;
                None
            }
        };
        if stop.is_cancelled() {
            return matches!(ended, Some(Ok(true)));
        }
        if let Some(ended) = ended {
            tracing::error!(
                table = table.name,
                panicked = ended.is_err(),
                "the task of a table ended by itself; it starts over"
            );
        }
        shared.health.restarted(&table.name);
        shared.health.task_died("table", &table.name);
        tokio::time::sleep(backoff.pause()).await;
    }
}

/// Returns why the tasks of `table` must be started again, once they must; never while draining.
async fn stuck(health: &Health, table: &str, stop: &CancellationToken) -> &'static str {
    loop {
        tokio::time::sleep(PULSE_EVERY).await;
        if stop.is_cancelled() {
            std::future::pending::<()>().await;
        }
        if let Some(why) = health.stuck(table) {
            return why;
        }
    }
}

/// Keeps the state table read: without it no shard is found, taken or given up, so a reader that
/// dies is started again.
async fn keep_watching(shared: Arc<Shared>, snapshots: watch::Sender<Arc<Snapshot>>) {
    let snapshots = Arc::new(snapshots);
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    let tables = shared.config.tables.iter().map(|table| table.name.clone());
    let terms = rows::Terms {
        lease: shared.config.leases.duration,
        late_effect: shared.config.leases.late_effect,
        epoch: shared.epoch,
        tables: tables.collect(),
    };
    loop {
        let mut task = JoinSet::new();
        task.spawn(watch_rows(
            shared.state.clone(),
            shared.owner.clone(),
            terms.clone(),
            Arc::clone(&snapshots),
            Arc::clone(&shared.rescan),
            Arc::clone(&shared.health),
        ));
        let never = CancellationToken::new();
        tokio::select! {
            _ = task.join_next() => {}
            _ = stuck(&shared.health, "", &never) => {}
        }
        tracing::error!("the reader of the state table ended or hangs; it starts over");
        shared.health.restarted("");
        shared.health.task_died("rows", "");
        tokio::time::sleep(backoff.pause()).await;
    }
}

/// Keeps the doubts of a table repaired: a task that ends by itself is started again.
async fn keep_repairing(shared: Arc<Shared>, table: Table, stop: CancellationToken) {
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    loop {
        let mut task = JoinSet::new();
        let repairing = repair_doubts(Arc::clone(&shared), table.clone(), stop.clone());
        task.spawn(repairing);
        task.join_next().await;
        if stop.is_cancelled() {
            return;
        }
        tracing::error!(
            table = table.name,
            "the repair of doubts ended by itself; it starts over"
        );
        tokio::time::sleep(backoff.pause()).await;
    }
}

/// Keeps a table whole, as [`keep_repairing`] does.
async fn keep_mending(shared: Arc<Shared>, table: Table, stop: CancellationToken) {
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    loop {
        let mut task = JoinSet::new();
        task.spawn(whole::keep_whole(
            Arc::clone(&shared),
            table.clone(),
            stop.clone(),
        ));
        task.join_next().await;
        if stop.is_cancelled() {
            return;
        }
        tracing::error!(
            table = table.name,
            "the copy or repair of a table ended by itself; it starts over"
        );
        tokio::time::sleep(backoff.pause()).await;
    }
}

/// Keeps the audit of a table at work, as [`keep_repairing`] does.
async fn keep_auditing(shared: Arc<Shared>, table: Table, stop: CancellationToken) {
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    loop {
        let mut task = JoinSet::new();
        task.spawn(audit::audit(
            Arc::clone(&shared),
            table.clone(),
            stop.clone(),
        ));
        let ended = task.join_next().await;
        if stop.is_cancelled() || matches!(ended, Some(Ok(()))) {
            return;
        }
        tracing::error!(
            table = table.name,
            "the audit ended by itself; it starts over"
        );
        tokio::time::sleep(backoff.pause()).await;
    }
}

/// One writer for each replica.
fn writers(
    config: &Config,
    feed: &Feed,
    (term, budgets): (&Arc<Term>, &BudgetKeeper),
) -> BTreeMap<String, Arc<Writer>> {
    let writer = |table: &Table| {
        let budget = budgets.budget(&table.name);
        let key = feed.keys.get(&table.name).cloned().unwrap_or_default();
        let writer = Writer::new(
            feed.target.tables.clone(),
            table.name_in(&feed.target.label),
            &table.name,
            budget,
            config.dead_letters.max_attempts,
            key,
        );
        Arc::new(writer.within_term(Arc::clone(term)))
    };
    config
        .tables
        .iter()
        .map(|table| (table.name.clone(), writer(table)))
        .collect()
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
            lookout::look(shared);
        }
        if let Some(metrics) = metrics {
            metrics.run_upkeep();
        }
    }
}

/// This host and process start. The nonce makes a restarted worker somebody else.
pub fn owner() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let host = match host.trim() {
        "" => "host",
        host => host,
    };
    let nonce: u64 = rand::random();
    format!("{host}-{}#{nonce:016x}", std::process::id())
}
