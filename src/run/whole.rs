//! Makes a replica whole: the first copy of its table, and the repair of its gaps.
//!
//! ```text
//!   first run:  job row ─▶ stream's start ─▶ leases ─▶ every page repaired by key, the stream beside it
//!                                                        ─▶ the stream passes the end ─▶ row removed
//!   gap:        gap row ─▶ drained ─▶ new position ─▶ job row ─▶ compared, repaired ─▶ gap closed
//!                                                                  └▶ too many deletes: a person
//! ```
//!
//! [`crate::lease::gaps`] (pure) says what is next, [`super::job`] what a job works with. All workers of
//! the fleet work at a job, a segment each, and share its read units.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::context::{Shared, TableContext};
use super::discovery::discovery;
use super::doubts::refuse_another_table;
use super::job::{How, Wanted, build, plan_of, read_units, terms};
use super::letter::Letter;
use super::rows::Snapshot;
use super::tap::Gate;
use crate::apply::budget::Budget;
use crate::apply::conditional::Conditional;
use crate::backoff::Backoff;
use crate::config::{OnGap, Table};
use crate::error::{Class, Fault, Operation};
use crate::jobs::reconcile::desk::{begin_anew, remove, stay, sweep};
use crate::jobs::reconcile::report::Counts;
use crate::jobs::reconcile::{Ended, Hears, Reconcile, Repairs};
use crate::lease::gaps::Next;
use crate::lease::row::{Closes, JobKind, Progress, ReconcileRow, SegmentRow};
use crate::mutation::crash;
use crate::observe::health::{Scope, progress};
use crate::observe::metrics;
use crate::repair::{Refused, Unfinished};
use crate::stream::stream_label;

const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// A worker does not give a job more memory for items that wait for their partners than this.
const MEMORY_MAX: u64 = 64 << 20;
/// How often a job makes sure that its source is still the table it was.
const TABLE_ASKED_EVERY: Duration = Duration::from_secs(5);
/// How often the log says how far a job is.
const TOLD_EVERY: Duration = Duration::from_secs(30);
/// What health knows the trouble of copies and repairs by.
const PART: &str = "copy";

/// Copies `table` and repairs its gaps, until `stop`.
pub async fn keep_whole(shared: Arc<Shared>, table: Table, stop: CancellationToken) {
    let mut rows = shared.rows.clone();
    let mut gate = Gate::new(&shared, &table.name, &stop);
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    while !stop.is_cancelled() {
        let snapshot = rows.borrow_and_update().clone();
        let mut pause = None;
        if snapshot.read && shared.is_in_epoch() {
            let keeper = Keeper {
                shared: &shared,
                table: &table,
                snapshot: &snapshot,
                stop: &stop,
            };
            match keeper.go_on(&mut gate).await {
                Ok(()) => {
                    backoff.reset();
                    shared.health.forget(&table.name, PART);
                }
                Err(unfinished) => {
                    keeper.report(unfinished);
                    pause = Some(backoff.pause());
                }
            }
        }
        if let Some(pause) = pause {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
            }
        }
        tokio::select! {
            () = stop.cancelled() => return,
            changed = rows.changed() => if changed.is_err() { return },
        }
    }
}

/// One look at a table.
struct Keeper<'a> {
    shared: &'a Arc<Shared>,
    table: &'a Table,
    snapshot: &'a Arc<Snapshot>,
    stop: &'a CancellationToken,
}

impl Keeper<'_> {
    /// Does what is next.
    async fn go_on(&self, gate: &mut Gate) -> Result<(), Unfinished> {
        let (shared, snapshot) = (self.shared, self.snapshot);
        let jobs = snapshot.jobs();
        let is_dead = |row: &crate::lease::row::ShardRow| snapshot.dead.contains(&row.lease_key);
        let on_gap = shared.config.reconcile.on_gap;
        let now_ms = shared.target.clock.now_ms();
        let ground = snapshot.ground(shared.epoch, &jobs, now_ms);
        let next = ground.next(&self.table.name, &snapshot.gaps, on_gap, is_dead);
        let done = match next {
            Next::Nothing => return self.sweep().await.map_err(Unfinished::Failed),
            Next::Begin(number, gaps) => {
                let closes = gaps.into_iter().map(Closes::of).collect();
                self.begin(number, closes).await
            }
            Next::Work(_) if !gate.is_open() || self.is_at_work_elsewhere(&jobs) => return Ok(()),
            Next::Work(plan) => return self.work(plan.clone(), gate).await,
            Next::Again(job) => self.again(job).await,
            Next::Remove(job) => {
                crash("job-removed");
                remove(&terms(shared, Duration::ZERO), job).await
            }
        };
        shared.rescan.notify_one();
        done.map_err(Unfinished::Failed)
    }

    /// Whether a person repairs the table: two repairs at once would count their deletes apart.
    fn is_at_work_elsewhere(&self, jobs: &[Progress<'_>]) -> bool {
        let now_ms = self.shared.target.clock.now_ms();
        jobs.iter().any(|job| {
            let plan = job.plan;
            let is_asked = plan.kind() == JobKind::Asked && plan.apply;
            is_asked && plan.table == self.table.name && job.is_alive(now_ms)
        })
    }

    /// Stores the job that repairs gaps.
    async fn begin(&self, number: u64, closes: Vec<Closes>) -> Result<(), Fault> {
        let shared = self.shared;
        let wanted = Wanted {
            kind: JobKind::GapRepair(number),
            apply: shared.config.reconcile.on_gap == OnGap::Repair,
            closes,
            verified_at_ms: None,
        };
        let plan = plan_of(shared, self.table, wanted).await?;
        // Of several workers one begins it, and the others take part.
        shared.state.create(&plan).await?;
        crash("repair-planned");
        Ok(())
    }

    /// Removes what is left of the worker's jobs that are gone.
    async fn sweep(&self) -> Result<(), Fault> {
        let is_left = |row: &&SegmentRow| {
            let plans = &self.snapshot.plans;
            let is_the_workers = JobKind::of(&row.job, self.shared.epoch).is_the_workers();
            let has_plan = plans.iter().any(|plan| row.is_of(plan));
            row.table == self.table.name && is_the_workers && !has_plan
        };
        let left: Vec<&SegmentRow> = self.snapshot.segments.iter().filter(is_left).collect();
        sweep(&terms(self.shared, Duration::ZERO), &left).await
    }

    /// Begins a job anew that ended while something still differed.
    async fn again(&self, job: &Progress<'_>) -> Result<(), Fault> {
        let known = job.plan;
        tracing::warn!(
            table = self.table.name,
            job = known.job,
            counts = ?known.ended,
            "something still differs, and all is compared once more"
        );
        let terms = terms(self.shared, Duration::ZERO);
        begin_anew(&terms, job).await
    }

    /// Takes part in a job until it has ended, or cannot go on.
    async fn work(&self, plan: ReconcileRow, gate: &mut Gate) -> Result<(), Unfinished> {
        let (shared, table) = (self.shared, self.table);
        let turn = tokio::select! {
            turn = shared.copies.acquire() => turn,
            () = self.stop.cancelled() => return Ok(()),
        };
        // It is never closed; without a turn the job would go on all the same.
        let _turn = turn.ok();
        refuse_another_table(shared, table).await?;
        gate.is_open();
        let flow = gate.flow();
        let repairs = plan.apply.then(|| self.repairs(plan.kind())).flatten();
        if plan.apply && repairs.is_none() {
            return Ok(());
        }
        let how = How {
            units: self.share_of_units(self.snapshot),
            one_at_a_time: false,
            memory_max: MEMORY_MAX,
            repairs,
        };
        let job = build(shared, table, plan.clone(), how, &flow);
        let job = job.await.map_err(Unfinished::Failed)?;
        tracing::info!(table = table.name, job = plan.job, "at work");
        let done = CancellationToken::new();
        let work = async {
            let result = job.run().await;
            done.cancel();
            result
        };
        let keys = [plan.lease_key.clone()];
        let terms = terms(shared, Duration::ZERO);
        let (result, (), ()) = tokio::join!(
            work,
            self.watch(&job, &plan, gate, &done),
            stay(&terms, &keys, &done)
        );
        shared.rescan.notify_one();
        self.ended(&plan, result)
    }

    fn ended(
        &self,
        plan: &ReconcileRow,
        result: Result<Counts, (Counts, Ended)>,
    ) -> Result<(), Unfinished> {
        let (table, job) = (&self.table.name, &plan.job);
        match result {
            Ok(counts) => {
                crash("job-ended");
                tracing::info!(
                    table,
                    job,
                    items = counts.source_items,
                    missing = counts.missing,
                    changed = counts.changed,
                    extra = counts.extra,
                    repaired = counts.repaired,
                    refused = counts.refused,
                    "the job has ended"
                );
                Ok(())
            }
            Err((_, Ended::Stopped | Ended::Gone)) => Ok(()),
            Err((_, Ended::Lost)) => {
                tracing::info!(
                    table,
                    job,
                    "the right to write was lost; it is gone on with"
                );
                Ok(())
            }
            Err((_, Ended::TooManyDeletes { extra, allowed })) => {
                tracing::error!(
                    table,
                    job,
                    extra,
                    allowed,
                    "deletes-outstanding: so many items of the replica are not in the source, and a person has to say that they may be deleted"
                );
                Ok(())
            }
            Err((_, Ended::Failed { fault, .. })) => Err(Unfinished::Failed(fault)),
            Err((_, Ended::Unverified)) => Err(Unfinished::Unsettled),
            Err((_, Ended::File(error))) => Err(Unfinished::Failed(Fault::own(
                Operation::State,
                Class::Unknown,
                "temporary file",
                format!("a temporary file could not be written or read: {error}"),
            ))),
        }
    }

    /// Looks after a job at work: it ends when the tap closes or the epoch moves, and reads with its share.
    async fn watch(
        &self,
        job: &Reconcile,
        plan: &ReconcileRow,
        gate: &mut Gate,
        done: &CancellationToken,
    ) {
        let mut rows: watch::Receiver<Arc<Snapshot>> = self.shared.rows.clone();
        let mut told = Instant::now();
        let mut asked = Instant::now();
        loop {
            // What cannot be seen counts as closed.
            gate.is_open();
            let snapshot = rows.borrow_and_update().clone();
            if !self.shared.is_in_epoch() {
                job.stop.cancel();
            }
            if asked.elapsed() >= TABLE_ASKED_EVERY {
                asked = Instant::now();
                // What only passes by itself is met by the job as well.
                if let Err(Unfinished::Failed(fault)) =
                    refuse_another_table(self.shared, self.table).await
                    && fault.class == Class::NotFound
                {
                    job.stop.cancel();
                }
            }
            let units = self.share_of_units(&snapshot);
            job.source.set_units(units);
            job.target.set_units(units);
            if told.elapsed() >= TOLD_EVERY {
                told = Instant::now();
                self.tell(&snapshot, plan);
            }
            tokio::select! {
                () = done.cancelled() => return,
                () = gate.moved() => {}
                changed = rows.changed() => if changed.is_err() {
                    job.stop.cancel();
                    return done.cancelled().await;
                },
            }
        }
    }

    fn tell(&self, snapshot: &Snapshot, plan: &ReconcileRow) {
        let jobs = snapshot.jobs();
        let Some(job) = jobs.iter().find(|job| job.plan.lease_key == plan.lease_key) else {
            return;
        };
        let mending = crate::lease::row::Mending::of(
            std::slice::from_ref(job),
            self.shared.epoch,
            &self.table.name,
            self.shared.target.clock.now_ms(),
        );
        if let Some(how_far) = mending.copying.or(mending.repairing) {
            let counts = job.counts();
            tracing::info!(
                table = self.table.name,
                job = plan.job,
                items = counts.source_items,
                repaired = counts.repaired,
                "{}",
                progress(how_far)
            );
        }
    }

    /// What this worker may read of what the fleet may.
    fn share_of_units(&self, snapshot: &Snapshot) -> Option<u32> {
        let workers = u32::try_from(snapshot.living.len()).unwrap_or(u32::MAX);
        read_units(self.shared).map(|units| (units / workers.max(1)).max(1))
    }

    /// What a job writes with. `None` where the table has no stream yet.
    fn repairs(&self, kind: JobKind) -> Option<Repairs> {
        let (shared, table) = (self.shared, self.table);
        let streams = self.snapshot.streams.iter();
        let of_table = streams.filter(|row| row.is_of(shared.epoch, &table.name));
        let newest = of_table.max_by_key(|row| stream_label(&row.stream_arn))?;
        // Nobody lists for a copy.
        let (discovery, _) = discovery();
        let context = TableContext::of(shared, table, &newest.stream_arn, discovery)?;
        let name = table.name_in(&shared.target.label);
        Some(Repairs {
            writer: Arc::clone(&context.writer),
            // Of a strategy that a worker never has.
            conditional: Conditional::new(
                shared.target.tables.clone(),
                name,
                Vec::new(),
                Arc::new(Budget::new(None)),
            ),
            max_deletes: shared.config.reconcile.max_deletes,
            heard_by: Some(Arc::new(Heard { context, kind })),
            late_effect: shared.config.leases.late_effect,
        })
    }

    fn report(&self, unfinished: Unfinished) {
        let table = &self.table.name;
        let fault = match unfinished {
            Unfinished::Unanswered(fault) | Unfinished::Failed(fault) => fault,
            Unfinished::Unsettled => {
                tracing::warn!(
                    table,
                    "what was written last could not be verified; it is repaired once more"
                );
                return;
            }
            Unfinished::Stopped => return,
        };
        metrics::retried(table, fault.class);
        let scope = match fault.operation {
            Operation::State => Scope::State,
            Operation::Write | Operation::ReadReplica => Scope::Replica,
            Operation::Queue => Scope::DeadLetters,
            _ => Scope::Source,
        };
        self.shared.health.failed(scope, table, PART, &fault);
        if self.stop.is_cancelled() {
            self.shared.health.forget(table, PART);
        }
    }
}

/// What becomes of items that a job writes: those that the replica refuses are dead letters, and a flood
/// of them halts the table.
struct Heard {
    context: Arc<TableContext>,
    kind: JobKind,
}

impl Hears for Heard {
    fn before_deletes(&self) -> BoxFuture<'_, Result<(), Unfinished>> {
        refuse_another_table(&self.context.shared, &self.context.table).boxed()
    }

    fn applied(&self, items: usize) {
        crash("page-mended");
        let (shared, table) = (&self.context.shared, &self.context.table.name);
        shared.halts.applied(table, items as u64);
        metrics::copied(table, items);
    }

    fn refused<'a>(
        &'a self,
        refused: &'a Refused,
        stop: &'a CancellationToken,
    ) -> BoxFuture<'a, Result<(), Unfinished>> {
        async move {
            let (shared, table) = (&self.context.shared, &self.context.table.name);
            let letter = Letter::refused_repair(&self.context, (self.kind.label(), ""), refused);
            let deliver = async {
                shared.until_dead_letter(table).await;
                letter.deliver_or_leave(&self.context, PART).await
            };
            tokio::select! {
                delivered = deliver => delivered.map_err(Unfinished::Failed)?,
                () = stop.cancelled() => return Err(Unfinished::Stopped),
            }
            metrics::repair_refused(table, 1);
            shared.board.dead_lettered(table, refused.fault.class);
            Ok(())
        }
        .boxed()
    }
}
