//! A comparison that the worker makes by itself, for the audit, the first copy of a table or the repair
//! of its gaps: what stands in its row, and what it works with.

use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

use aws_sdk_dynamodb::types::TableDescription;
use tokio_util::sync::CancellationToken;

use super::context::Shared;
use super::doubts::keep_expired;
use crate::config::{MaxDeletes, Table};
use crate::dynamo::clock::rfc3339;
use crate::dynamo::table::{describe, primary_key};
use crate::error::{Class, Fault, Operation};
use crate::jobs::reconcile::desk::{self, Desk};
use crate::jobs::reconcile::flow::FlowSource;
use crate::jobs::reconcile::place::Place;
use crate::jobs::reconcile::strategy::Strategy;
use crate::jobs::reconcile::{Found, Reconcile, Repairs, SEGMENTS_AT_ONCE, segments_of};
use crate::lease::hold::Terms;
use crate::lease::row::{Closes, FORMAT_VERSION, JobKind, ReconcileRow};
use crate::repair::Unfinished;

/// An eventually consistent read unit: two halves of 4 KB.
const SCAN_UNIT_BYTES: i64 = 8_192;
/// A consistent read unit.
const READ_UNIT_BYTES: i64 = 4_096;
/// A write unit.
const WRITE_UNIT_BYTES: i64 = 1_024;
/// A table is cut into so many more segments than a person's comparison of it: the whole fleet is to
/// have some.
const SEGMENTS_FOR_FLEET: i64 = 4;

/// What a comparison is for.
pub(super) struct Wanted {
    pub(super) kind: JobKind,
    pub(super) apply: bool,
    /// Gaps that it closes.
    pub(super) closes: Vec<Closes>,
    /// Of an audit: when the tables were last found equal.
    pub(super) verified_at_ms: Option<i64>,
}

/// What a job costs, as far as the service's own sizes tell: up to six hours old.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Cost {
    /// Read units on each side.
    read: [i64; 2],
    /// Write units.
    write: i64,
}

impl Cost {
    fn of(kind: JobKind, source: &TableDescription, target: &TableDescription) -> Self {
        let bytes = |table: &TableDescription| table.table_size_bytes.unwrap_or_default();
        let scan = |table| bytes(table) / SCAN_UNIT_BYTES + 1;
        let mut cost = Self {
            read: [scan(source), scan(target)],
            write: 0,
        };
        let items = source.item_count.unwrap_or_default();
        if kind == JobKind::Bootstrap && items > 0 {
            // Each item is read once more, after it was written.
            let each = bytes(source) / items;
            cost.read[0] += items * (each / READ_UNIT_BYTES + 1);
            cost.write = items * (each / WRITE_UNIT_BYTES + 1);
        }
        cost
    }

    /// Seconds that it takes within these units per second; `None` means no limit.
    fn seconds(self, read: Option<u32>, write: Option<u32>) -> u64 {
        let at =
            |units: i64, rate: Option<u32>| rate.map_or(0, |rate| units / i64::from(rate.max(1)));
        let [source, target] = self.read.map(|units| at(units, read));
        let longest = source.max(target).max(at(self.write, write));
        u64::try_from(longest).unwrap_or_default()
    }
}

/// The row of a job that is to begin.
///
/// # Errors
/// A table could not be described, or is not there.
pub(super) async fn plan_of(
    shared: &Shared,
    table: &Table,
    wanted: Wanted,
) -> Result<ReconcileRow, Fault> {
    let (source, target) = (&shared.source, &shared.target);
    let from = describe(&source.tables, table.name_in(&source.label)).await?;
    let to = describe(&target.tables, table.name_in(&target.label)).await?;
    let (from, to) = (from.ok_or_else(not_there)?, to.ok_or_else(not_there)?);
    let config = &shared.config;
    let bytes = from.table_size_bytes.max(to.table_size_bytes);
    let items = from.item_count.unwrap_or_default() + to.item_count.unwrap_or_default();
    let job = wanted.kind.job(shared.epoch);
    let is_audit = matches!(wanted.kind, JobKind::Audit(_));
    let cost = Cost::of(wanted.kind, &from, &to);
    let expected_s = cost.seconds(read_units(shared), config.units_per_second(table));
    if !is_audit {
        tracing::info!(
            table = table.name,
            job,
            items = from.item_count,
            source_read_units = cost.read[0],
            target_read_units = cost.read[1],
            write_units = cost.write,
            at_least = %humantime::format_duration(Duration::from_secs(expected_s)),
            "what it will cost, by sizes that are up to six hours old"
        );
    }
    let segments = match (config.reconcile.segments, is_audit) {
        (0, true) => segments_of(bytes.unwrap_or_default()),
        (0, false) => segments_of(bytes.unwrap_or_default() * SEGMENTS_FOR_FLEET),
        (chosen, _) => chosen,
    };
    let max_deletes = match wanted.apply {
        true => config.reconcile.max_deletes,
        false => MaxDeletes::Count(0),
    };
    let now_ms = target.clock.now_ms();
    Ok(ReconcileRow {
        lease_key: ReconcileRow::key(&job, &table.name),
        entity_type: "reconcile".to_owned(),
        format_version: FORMAT_VERSION,
        epoch: shared.epoch,
        job,
        table: table.name.clone(),
        order: 0,
        source: source.label.clone(),
        target: target.label.clone(),
        apply: wanted.apply,
        strategy: Strategy::Mirror.to_string(),
        max_deletes: max_deletes.to_string(),
        segments,
        items: u64::try_from(items).unwrap_or_default(),
        at: rfc3339(now_ms),
        at_ms: now_ms,
        lease_counter: 0,
        until: 0,
        // Its row stays when it has ended: the fleet wants to know.
        joined: 2,
        ended: None,
        ended_at_ms: None,
        verified_at_ms: wanted.verified_at_ms,
        too_many_deletes: None,
        closes: wanted.closes,
        expected_s: (!is_audit).then_some(expected_s),
    })
}

fn not_there() -> Fault {
    Fault::own(
        Operation::DescribeTable,
        Class::NotFound,
        "ResourceNotFoundException",
        "the source or the replica table is not there",
    )
}

/// Read units per second that copies and repairs of gaps may spend on each side, over the whole fleet.
pub(super) fn read_units(shared: &Shared) -> Option<u32> {
    let units = shared.config.reconcile.read_units_per_second;
    (units > 0).then_some(units)
}

/// How segments are held.
pub(super) fn terms(shared: &Shared, late_effect: Duration) -> Terms {
    Terms {
        state: shared.state.clone(),
        clock: Arc::clone(&shared.target.clock),
        duration: shared.config.leases.duration,
        late_effect,
    }
}

/// How a job is worked at.
pub(super) struct How {
    /// Read units per second on each side.
    pub(super) units: Option<u32>,
    /// Whether one segment is read at a time, whoever of the fleet reads it.
    pub(super) one_at_a_time: bool,
    /// Bytes that the join may hold at most.
    pub(super) memory_max: u64,
    /// Without them nothing is written.
    pub(super) repairs: Option<Repairs>,
}

/// What works at `plan`.
///
/// # Errors
/// The source table could not be described, or is not there.
pub(super) async fn build(
    shared: &Shared,
    table: &Table,
    plan: ReconcileRow,
    how: How,
    stop: &CancellationToken,
) -> Result<Reconcile, Fault> {
    let config = &shared.config;
    let stop = stop.child_token();
    let (source, target) = (&shared.source, &shared.target);
    let name = table.name_in(&source.label);
    let described = describe(&source.tables, name).await?;
    let described = described.ok_or_else(not_there)?;
    let key_names: Vec<String> = primary_key(&described)
        .into_iter()
        .map(|part| part.name)
        .collect();
    let keep_expired = keep_expired(shared, table).await.map_err(|why| match why {
        Unfinished::Failed(fault) | Unfinished::Unanswered(fault) => fault,
        Unfinished::Unsettled | Unfinished::Stopped => Fault::own(
            Operation::DescribeTable,
            Class::Unknown,
            "time to live",
            "the time to live of the source table is not known",
        ),
    })?;
    let place = |region: &crate::dynamo::RegionClients, reading| {
        let name = table.name_in(&region.label);
        Arc::new(Place::new(region, name, reading, how.units, &stop))
    };
    let flow = FlowSource::new(
        shared.state.clone(),
        shared.epoch,
        config.leases.duration * 2,
    );
    let late_effect = match &how.repairs {
        Some(repairs) => repairs.late_effect,
        // It writes nothing that could.
        None => Duration::ZERO,
    };
    let memory = config.reconcile.memory.as_u64().min(how.memory_max);
    let at_once = match how.one_at_a_time {
        true => 1,
        false => SEGMENTS_AT_ONCE,
    };
    Ok(Reconcile {
        table: table.name.clone(),
        source: place(source, Operation::ReadSource),
        target: place(target, Operation::ReadReplica),
        key_names: key_names.into(),
        keep_expired,
        segments: plan.segments,
        desk: Desk::Shared(Box::new(desk::Shared {
            plan,
            terms: terms(shared, late_effect),
            me: shared.owner.clone(),
            one_at_a_time: how.one_at_a_time,
            stop: stop.clone(),
        })),
        at_once,
        wait: config.leases.duration,
        memory: usize::try_from(memory).unwrap_or(usize::MAX),
        settle: config.reconcile.settle,
        flow: Some(match how.repairs.is_some() {
            true => flow.beside_doubts(),
            false => flow,
        }),
        strategy: Strategy::Mirror,
        eager: how.repairs.is_some(),
        repairs: how.repairs,
        lines: None,
        stop,
        found: Arc::new(Found::default()),
        lost: AtomicU32::new(0),
    })
}
