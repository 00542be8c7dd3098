//! The job in the state table: begun, joined, gone on with, ended.

use std::sync::atomic::AtomicU32;

use tokio_util::sync::CancellationToken;

use super::ground::{Ground, Pair};
use crate::config::MaxDeletes;
use crate::config::read::Loaded;
use crate::dynamo::Regions;
use crate::dynamo::clock::{host_ms, rfc3339};
use crate::error::{Class, Failure, Fault};
use crate::jobs::reconcile::desk::{Desk, Shared, begin_anew, remove, stay};
use crate::jobs::reconcile::report::Counts;
use crate::jobs::reconcile::strategy::Strategy;
use crate::lease::row::{
    Counted, FORMAT_VERSION, JobKind, Progress, ReconcileRow, Row, SegmentRow, comparison_rows,
    comparisons,
};
use crate::lease::table::{StateTable, Written};
use crate::run::owner;
use crate::run::start::unusable;

/// Rows of jobs that have ended are kept so long for the processes that took part, in milliseconds.
const ENDED_KEPT_MS: i64 = 10 * 60 * 1_000;
/// A comparison that nobody went on with for so long is forgotten, in milliseconds.
const LEFT_KEPT_MS: i64 = 7 * 24 * 60 * 60 * 1_000;
/// How often a row is read again that somebody else changed at the same moment.
const JOIN_ATTEMPTS: usize = 10;

/// What was asked for, by arguments or by the rows of the job that is gone on with.
#[derive(Debug, Clone)]
pub(super) struct Asked {
    pub(super) source: Option<String>,
    pub(super) target: Option<String>,
    /// Tables by their names in the configuration; none means all.
    pub(super) tables: Vec<String>,
    pub(super) apply: bool,
    pub(super) strategy: Strategy,
    pub(super) max_deletes: Option<MaxDeletes>,
    pub(super) segments: Option<u32>,
    /// The job.
    pub(super) id: String,
    /// Its rows, where it is gone on with.
    pub(super) plans: Vec<ReconcileRow>,
}

impl Asked {
    pub(super) fn by(args: &super::Args) -> Self {
        let digits = rfc3339(host_ms());
        let digits: String = digits.chars().filter(char::is_ascii_digit).collect();
        let (day, time) = digits.split_at(8.min(digits.len()));
        let time = time.get(..6).unwrap_or(time);
        Self {
            source: args.source.clone(),
            target: args.target.clone(),
            tables: args.table.clone(),
            apply: args.apply,
            strategy: args.strategy.clone().unwrap_or_default(),
            max_deletes: args.max_deletes,
            segments: args.segments,
            id: format!("{day}-{time}-{:04x}", rand::random::<u16>()),
            plans: Vec::new(),
        }
    }

    /// As the rows of the job `id` say, in whichever state table they stand.
    pub(super) async fn resumed(
        loaded: &Loaded,
        regions: &Regions,
        id: &str,
    ) -> Result<Self, Failure> {
        let mut plans: Vec<ReconcileRow> = Vec::new();
        let mut unasked = Vec::new();
        for label in loaded.config.regions.keys() {
            let Some(region) = regions.get(label) else {
                continue;
            };
            let state = StateTable::new(region.tables.clone(), loaded.config.state_table());
            match state.rows().await {
                Ok(rows) => plans.extend(rows.into_iter().filter_map(|row| match row {
                    Row::Reconcile(row) if row.job == id => Some(row),
                    _ => None,
                })),
                Err(fault) if fault.class == Class::NotFound => {}
                Err(fault) => unasked.push(format!("{label}: {fault}")),
            }
        }
        plans.sort_by_key(|row| row.order);
        if plans.iter().any(|row| row.kind().is_the_workers()) {
            return Err(Failure::new(
                format!("The job {id} cannot be gone on with by hand"),
                "It is the workers' own, and they go on with it by themselves",
                "Start a worker of this region with `farshore run`, or begin anew, without --resume",
            ));
        }
        let Some(first) = plans.first() else {
            return Err(Failure::new(
                format!("There is no job {id} to go on with"),
                match unasked.is_empty() {
                    true => "It has come to its end, or was replaced by another one".to_owned(),
                    false => format!("Not all state tables answered: {}", unasked.join("; ")),
                },
                "`farshore status` shows the jobs that have not ended; or begin anew, without --resume",
            ));
        };
        let strategy = first.strategy.parse().map_err(|why: String| {
            Failure::new(
                format!("The job {id} cannot be gone on with by this version"),
                why,
                "Go on with it by the version that began it, or begin anew",
            )
        })?;
        Ok(Self {
            source: Some(first.source.clone()),
            target: Some(first.target.clone()),
            tables: plans.iter().map(|row| row.table.clone()).collect(),
            apply: first.apply,
            strategy,
            max_deletes: first.max_deletes.parse().ok(),
            segments: Some(first.segments),
            id: id.to_owned(),
            plans,
        })
    }

    pub(super) fn is_resumed(&self) -> bool {
        !self.plans.is_empty()
    }
}

impl Ground<'_> {
    fn state_failed(&self, state: &StateTable) -> impl Fn(Fault) -> Failure {
        let (region, name) = (self.target.clone(), state.name().to_owned());
        move |fault| unusable(&region, &name, &fault)
    }

    /// Stores what is asked for, so that others can join and a next one go on. Returns whether it is
    /// stored: a comparison need not be.
    pub(super) async fn begin(&self, pairs: &[Pair<'_>]) -> Result<bool, Failure> {
        let flow = match self.flow(&self.asked.tables) {
            Ok(flow) => flow,
            Err(failure) if self.asked.apply => return Err(failure),
            Err(_) => return Ok(false),
        };
        let state = flow.state;
        let failed = self.state_failed(state);
        if self.asked.is_resumed() {
            self.refuse_another(pairs).await?;
            for plan in &self.asked.plans {
                self.join(state, plan).await?;
            }
            return Ok(true);
        }
        self.refuse_another(pairs).await?;
        for (order, pair) in pairs.iter().enumerate() {
            let row = self.plan_row(pair, order, flow.region.clock.now_ms());
            match state.create(&row).await {
                Ok(_) => {}
                // Who may only read may compare all the same.
                Err(fault) if !self.asked.apply => {
                    eprintln!(
                        "note: this comparison can be neither shared nor resumed, its rows could not be written: {fault}"
                    );
                    return Ok(false);
                }
                Err(fault) => return Err(failed(fault)),
            }
        }
        // Of two that begin at once at least one sees the other here.
        if let Err(failure) = self.refuse_another(pairs).await {
            for pair in pairs {
                let key = ReconcileRow::key(&self.asked.id, &pair.table.name);
                state.delete_key(&key).await.map_err(&failed)?;
            }
            return Err(failure);
        }
        Ok(true)
    }

    /// How far ahead a job says that somebody is at it, in milliseconds.
    fn ahead_ms(&self) -> i64 {
        self.loaded.config.leases.duration.as_millis() as i64 * 2
    }

    fn plan_row(&self, pair: &Pair<'_>, order: usize, now_ms: i64) -> ReconcileRow {
        let config = &self.loaded.config;
        let max_deletes = self.asked.max_deletes;
        ReconcileRow {
            lease_key: ReconcileRow::key(&self.asked.id, &pair.table.name),
            entity_type: "reconcile".to_owned(),
            format_version: FORMAT_VERSION,
            epoch: self.epoch,
            job: self.asked.id.clone(),
            table: pair.table.name.clone(),
            order: u32::try_from(order).unwrap_or(u32::MAX),
            source: self.source.label.clone(),
            target: self.target.label.clone(),
            apply: self.asked.apply,
            strategy: self.asked.strategy.to_string(),
            max_deletes: max_deletes
                .unwrap_or(config.reconcile.max_deletes)
                .to_string(),
            segments: self.segments(pair),
            items: u64::try_from(pair.items).unwrap_or_default(),
            at: rfc3339(now_ms),
            at_ms: now_ms,
            lease_counter: 0,
            until: now_ms + self.ahead_ms(),
            joined: 1,
            ended: None,
            ended_at_ms: None,
            verified_at_ms: None,
            too_many_deletes: None,
            closes: pair.closes.clone(),
            expected_s: None,
        }
    }

    /// Takes part in a job that others began.
    async fn join(&self, state: &StateTable, plan: &ReconcileRow) -> Result<(), Failure> {
        let failed = self.state_failed(state);
        if plan.epoch != self.epoch {
            return Err(Failure::new(
                format!("The job {} is of another time", plan.job),
                format!(
                    "It belongs to epoch {}, and now is epoch {}",
                    plan.epoch, self.epoch
                ),
                "Begin anew, without --resume",
            ));
        }
        let mut plan = plan.clone();
        for _ in 0..JOIN_ATTEMPTS {
            let known = plan.lease_counter;
            plan.lease_counter += 1;
            plan.joined += 1;
            if state.replace(&plan, known).await.map_err(&failed)? == Written::Yes {
                return Ok(());
            }
            let (plans, _) = self.jobs(state).await?;
            match plans.into_iter().find(|row| row.key() == plan.key()) {
                Some(row) => plan = row,
                // Ended a moment ago.
                None => return Ok(()),
            }
        }
        Err(Failure::new(
            format!("The job {} could not be joined", plan.job),
            "Its row was changed by others all the time",
            "Ask again",
        ))
    }

    async fn jobs(
        &self,
        state: &StateTable,
    ) -> Result<(Vec<ReconcileRow>, Vec<SegmentRow>), Failure> {
        let failed = self.state_failed(state);
        let rows = state.rows().await.map_err(failed)?;
        Ok(comparison_rows(rows))
    }

    /// One repair of a table at a time.
    pub(super) async fn refuse_another(&self, pairs: &[Pair<'_>]) -> Result<(), Failure> {
        if !self.asked.apply {
            return Ok(());
        }
        let state = self.flow(&self.asked.tables)?.state;
        let (plans, segments) = self.jobs(state).await?;
        let now_ms = self.target.clock.now_ms();
        let jobs = comparisons(&plans, &segments);
        let other = jobs.iter().find(|job| {
            let plan = job.plan;
            let of_table = pairs.iter().any(|pair| pair.table.name == plan.table);
            let is_another = plan.apply && plan.job != self.asked.id;
            is_another && of_table && job.is_alive(now_ms)
        });
        let Some(other) = other else { return Ok(()) };
        let until = other.segments.iter().map(|row| row.until).max();
        let plan = other.plan;
        Err(Failure::new(
            format!(
                "Another reconcile of {} in {} is at work, or died a short while ago",
                plan.table, plan.target
            ),
            format!(
                "The job {} began at {}, and its writes may take effect until {}",
                plan.job,
                plan.at,
                rfc3339(until.unwrap_or_default().max(plan.until))
            ),
            match plan.kind().is_the_workers() {
                true => "It is the worker's own: `farshore status` says how far it is; wait until it has ended".to_owned(),
                false => format!(
                    "Join it, or go on with it, with --resume {}; or wait until then, or until it has ended, and ask again",
                    plan.job
                ),
            },
        ))
    }

    /// Where the segments of a table are dealt out.
    pub(super) async fn desk(
        &self,
        pair: &Pair<'_>,
        stored: bool,
        stop: &CancellationToken,
    ) -> Result<Desk, Failure> {
        if !stored {
            return Ok(Desk::Alone(AtomicU32::new(0)));
        }
        let flow = self.flow(&self.asked.tables)?;
        let (plans, _) = self.jobs(flow.state).await?;
        let key = ReconcileRow::key(&self.asked.id, &pair.table.name);
        let plan = plans.into_iter().find(|row| row.lease_key == key);
        // Somebody else has ended it in the meantime: as if this one had come to an ended job.
        let plan = plan.unwrap_or_else(|| ReconcileRow {
            ended: Some(Counts::default()),
            ..self.plan_row(pair, 0, flow.region.clock.now_ms())
        });
        let late_effect = match self.asked.apply {
            true => self.loaded.config.leases.late_effect,
            false => std::time::Duration::ZERO,
        };
        Ok(Desk::Shared(Box::new(Shared {
            plan,
            terms: flow.terms(late_effect),
            me: owner(),
            one_at_a_time: false,
            stop: stop.clone(),
        })))
    }

    /// Says, until `done`, that somebody is at the job.
    pub(super) async fn stay(&self, pairs: &[Pair<'_>], stored: bool, done: &CancellationToken) {
        if let (true, Ok(flow)) = (stored, self.flow(&self.asked.tables)) {
            let key = |pair: &Pair<'_>| ReconcileRow::key(&self.asked.id, &pair.table.name);
            let plans: Vec<String> = pairs.iter().map(key).collect();
            stay(&flow.terms(std::time::Duration::ZERO), &plans, done).await;
        }
    }

    /// Removes what others left: jobs that have ended, comparisons that nobody went on with, and where
    /// this one has come to its end (`whole`) the repairs of the same table that died.
    /// What an audit found is forgotten only where nothing differs any more (`equal`).
    pub(super) async fn clean(&self, table: &str, whole: bool, equal: bool) {
        let Ok(flow) = self.flow(&self.asked.tables) else {
            return;
        };
        let Ok((plans, segments)) = self.jobs(flow.state).await else {
            return;
        };
        let terms = flow.terms(std::time::Duration::ZERO);
        let now_ms = flow.region.clock.now_ms();
        for job in comparisons(&plans, &segments) {
            let is_over = match job.plan.kind() {
                JobKind::Asked => self.is_over(&job, table, whole, now_ms),
                JobKind::Audit(_) => equal && job.plan.table == table,
                // What the worker left to a person is done; one at work comes to its own end.
                JobKind::Bootstrap | JobKind::GapRepair(_)
                    if job.plan.ended.is_some()
                        && self.is_with_the_flow()
                        && job.plan.table == table =>
                {
                    let is_copy = job.plan.kind() == JobKind::Bootstrap;
                    if whole && !equal && is_copy {
                        // What the replica refuses, only the worker letters: it looks once more.
                        let _ = begin_anew(&terms, &job).await;
                    }
                    equal || whole && !is_copy
                }
                JobKind::Bootstrap | JobKind::GapRepair(_) => false,
            };
            if is_over {
                let removed = remove(&terms, &job).await;
                if let Err(fault) = removed {
                    tracing::debug!(code = fault.code, "rows of an old job stay");
                }
            }
        }
        let orphans = segments.iter().filter(|row| {
            let has_plan = plans
                .iter()
                .any(|plan| plan.job == row.job && plan.table == row.table);
            !has_plan && row.until + ENDED_KEPT_MS < now_ms
        });
        for row in orphans {
            let _ = flow.state.delete(row).await;
        }
    }

    fn is_over(&self, job: &Progress<'_>, table: &str, whole: bool, now_ms: i64) -> bool {
        let plan = job.plan;
        if plan.job == self.asked.id {
            return false;
        }
        if let Some(ended) = plan.ended_at_ms {
            return ended + ENDED_KEPT_MS < now_ms;
        }
        if job.is_alive(now_ms) || plan.table != table {
            return false;
        }
        let same_way = plan.source == self.source.label && plan.target == self.target.label;
        let same_way = same_way || (plan.epoch < self.epoch && plan.target == self.target.label);
        match plan.apply {
            true => whole && same_way,
            false => plan.at_ms + LEFT_KEPT_MS < now_ms,
        }
    }
}
