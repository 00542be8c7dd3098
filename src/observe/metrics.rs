//! Every metric: name, unit, labels, meaning. `docs/METRICS.md` is tested against [`METRICS`].

pub mod replay;
mod seen;

pub use seen::{
    feeds_no_more, group_recovery_point, last_record, lease_lost, lease_taken, outage,
    recovery_point, shards, standby,
};

use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};

use crate::error::{Class, Failure};
use crate::lease::row::{DoubtCause, GapReason, JobKind, Mending};
use crate::observe::health::Scope;
use crate::stream::change::Event;

/// What a metric is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Only grows.
    Counter,
    /// Moves both ways.
    Gauge,
    /// Counts by bucket.
    Histogram,
}

/// Whether the name and meaning of a metric may be built upon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stability {
    /// They stay until a version says otherwise in its changelog.
    Stable,
    /// They may still change.
    New,
}

/// The unit of a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Measure {
    /// A number of things.
    Count,
    /// Seconds.
    Seconds,
    /// A part of a whole, from 0 to 1.
    Ratio,
    /// 1 or 0.
    Flag,
}

/// One metric.
#[derive(Debug, Clone, Copy)]
pub struct Metric {
    /// Its name.
    pub name: &'static str,
    /// What it is.
    pub kind: Kind,
    /// Its labels, besides `group`, which all have.
    pub labels: &'static str,
    /// Whether it may be built upon.
    pub stability: Stability,
    /// What it means.
    pub meaning: &'static str,
}

const fn metric(
    name: &'static str,
    kind: Kind,
    labels: &'static str,
    meaning: &'static str,
) -> Metric {
    Metric {
        name,
        kind,
        labels,
        stability: Stability::Stable,
        meaning,
    }
}

/// The same, where name and meaning may still change.
const fn new(
    name: &'static str,
    kind: Kind,
    labels: &'static str,
    meaning: &'static str,
) -> Metric {
    Metric {
        stability: Stability::New,
        ..metric(name, kind, labels, meaning)
    }
}

impl Metric {
    /// Its unit: what its name ends with, else a number of things.
    pub fn unit(&self) -> Measure {
        match self.name {
            name if FLAGS.contains(&name) => Measure::Flag,
            name if name.ends_with("_seconds") => Measure::Seconds,
            name if name.ends_with("_ratio") => Measure::Ratio,
            _ => Measure::Count,
        }
    }
}

/// Gauges that are 1 or 0.
const FLAGS: &[&str] = &[COPYING, PAUSED, READY, STANDBY, BUILD, OUTAGE];

const LAG: &str = "farshore_replication_lag_seconds";
const ITERATOR_AGE: &str = "farshore_iterator_age_seconds";
const HEADROOM: &str = "farshore_stream_headroom_seconds";
const RECORDS: &str = "farshore_records_total";
const SKIPPED: &str = "farshore_records_skipped_total";
const COALESCED: &str = "farshore_records_coalesced_total";
const WRITTEN: &str = "farshore_items_written_total";
const UNITS: &str = "farshore_write_units_total";
const BUDGET: &str = "farshore_write_budget_units";
const LIMIT: &str = "farshore_write_limit_units";
const DEAD_LETTERED: &str = "farshore_dead_letters_total";
const THROTTLED: &str = "farshore_throttles_total";
const RETRIED: &str = "farshore_retries_total";
const LEASES: &str = "farshore_leases_held";
const HANDED_OVER: &str = "farshore_handovers_total";
const WORKERS: &str = "farshore_workers_live";
const GAPS: &str = "farshore_gaps_open";
const VERIFIED_AGE: &str = "farshore_verified_age_seconds";
const DRIFT: &str = "farshore_drift_items";
const COPYING: &str = "farshore_copying";
const JOB_PROGRESS: &str = "farshore_job_progress_ratio";
const JOB_LEFT: &str = "farshore_job_left_seconds";
const COPIED: &str = "farshore_copied_items_total";
const OUTSTANDING: &str = "farshore_deletes_outstanding";
const DOUBTED: &str = "farshore_doubts_total";
const REPAIRED: &str = "farshore_doubts_repaired_total";
const REPAIR_WRITES: &str = "farshore_repair_writes_total";
const REPAIR_REFUSED: &str = "farshore_repair_refused_total";
const LETTERS_WAITING: &str = "farshore_dead_letters_waiting";
const LETTERS_LEFT: &str = "farshore_dead_letters_oldest_time_left_seconds";
const HALTED: &str = "farshore_halts_total";
const PAUSED: &str = "farshore_paused";
const DOUBTS: &str = "farshore_doubts_open";
const RESTARTED: &str = "farshore_task_restarts_total";
const READY: &str = "farshore_ready";
const POINT: &str = "farshore_recovery_point_seconds";
const GROUP_POINT: &str = "farshore_group_recovery_point_seconds";
const CLOCK_ERROR: &str = "farshore_source_clock_error_seconds";
const BUILD: &str = "farshore_build_info";
const STANDBY: &str = "farshore_standby";
const LAST_RECORD: &str = "farshore_last_record_timestamp_seconds";
const OUTAGE: &str = "farshore_outage";
const TAKEN: &str = "farshore_leases_taken_total";
const LOST: &str = "farshore_leases_lost_total";
const OPEN: &str = "farshore_shards_open";
const UNOWNED: &str = "farshore_shards_unowned";

/// All metrics.
pub const METRICS: &[Metric] = &[
    metric(
        LAG,
        Kind::Histogram,
        "table",
        "Seconds from a change in the source to its being durable in the replica. Stream times are whole seconds, rounded down: up to 1 s too high.",
    ),
    metric(
        ITERATOR_AGE,
        Kind::Gauge,
        "table",
        "Seconds since the source made the oldest change read and not yet durable, over all shards; 0 when nothing waits.",
    ),
    metric(
        HEADROOM,
        Kind::Gauge,
        "table",
        "Seconds until the stream forgets (after 24 h) the oldest position not known to be applied, over all shards. Falls while the source or the replica cannot be reached, and while the tap is closed.",
    ),
    metric(
        RECORDS,
        Kind::Counter,
        "table, event",
        "Stream records finished: durable in the replica, coalesced into a later change that is, or dead-lettered.",
    ),
    metric(
        SKIPPED,
        Kind::Counter,
        "table, reason",
        "Stream records left out as configured: `ttl-delete`, or `before-start`.",
    ),
    metric(
        COALESCED,
        Kind::Counter,
        "table",
        "Records not written because a later change of the same item was.",
    ),
    metric(
        WRITTEN,
        Kind::Counter,
        "table",
        "Items put or deleted in the replica.",
    ),
    metric(
        UNITS,
        Kind::Counter,
        "table",
        "Write units spent on the replica: as the service tells, and where it does not, by item size.",
    ),
    metric(
        BUDGET,
        Kind::Gauge,
        "table",
        "This worker's share now of the table's write budget, in units per second; over the fleet and its jobs no more than `units_per_second`. 0 while it has none, +Inf without a limit.",
    ),
    metric(
        LIMIT,
        Kind::Gauge,
        "table",
        "What throttling of the table leaves of that share, in units per second; the share itself while there is none.",
    ),
    metric(
        DEAD_LETTERED,
        Kind::Counter,
        "table, class",
        "Records and repairs sent to the dead letters because the replica can never take them.",
    ),
    metric(
        THROTTLED,
        Kind::Counter,
        "table",
        "Writes to the replica throttled or returned unprocessed.",
    ),
    metric(
        RETRIED,
        Kind::Counter,
        "table, class",
        "Calls tried again, by the class of the failure.",
    ),
    metric(LEASES, Kind::Gauge, "table", "Shards this process owns."),
    metric(
        HANDED_OVER,
        Kind::Counter,
        "",
        "Shards this process drained and released because another worker asked for its share. Stands still while no worker joins or leaves.",
    ),
    metric(
        WORKERS,
        Kind::Gauge,
        "",
        "Workers that share the shards of this region, this one included, as it sees them.",
    ),
    metric(
        GAPS,
        Kind::Gauge,
        "table, reason",
        "Gaps open: records that were never applied and are not repaired yet.",
    ),
    metric(
        VERIFIED_AGE,
        Kind::Gauge,
        "table",
        "Seconds since the beginning of the last pass of the audit that found the replica equal to its source. Infinite until there was one.",
    ),
    metric(
        DRIFT,
        Kind::Gauge,
        "table",
        "Items of the replica that differ from the source, as the audit's last pass or the one under way found them.",
    ),
    metric(
        COPYING,
        Kind::Gauge,
        "table",
        "1 while the first copy of the table is not at its end, or the stream has not passed that; else 0. Until then there is nothing to fail over to.",
    ),
    metric(
        JOB_PROGRESS,
        Kind::Gauge,
        "table, job",
        "How far the `bootstrap` or the `gap-repair` of the table is, from 0 to 1; 1 where there is none.",
    ),
    metric(
        JOB_LEFT,
        Kind::Gauge,
        "table, job",
        "Seconds until its end, about, at its pace so far; 0 where there is none.",
    ),
    metric(
        COPIED,
        Kind::Counter,
        "table",
        "Items that this worker put or deleted in a copy of the table or a repair of its gaps.",
    ),
    metric(
        OUTSTANDING,
        Kind::Gauge,
        "table",
        "Items of the replica that are not in the source, more than a copy or a repair of gaps may delete by itself.",
    ),
    metric(
        DOUBTED,
        Kind::Counter,
        "table, cause",
        "Ranges put in doubt because writes may still take effect: `unanswered`, or `not-released` when a lease was taken from a dead owner.",
    ),
    metric(
        REPAIRED,
        Kind::Counter,
        "table",
        "Doubts settled: every key of their range was found or made as in the source, or \
         dead-lettered.",
    ),
    metric(
        REPAIR_WRITES,
        Kind::Counter,
        "table",
        "Items that a repair had to put or delete because the replica differed.",
    ),
    metric(
        REPAIR_REFUSED,
        Kind::Counter,
        "table",
        "Items that a repair found different and the replica refuses for good: letters delivered for them.",
    ),
    metric(
        LETTERS_WAITING,
        Kind::Gauge,
        "",
        "Dead letters that wait, received ones included; SQS counts them about right.",
    ),
    metric(
        LETTERS_LEFT,
        Kind::Gauge,
        "",
        "Seconds until the queue forgets the oldest dead letter; +Inf while none waits.",
    ),
    metric(
        HALTED,
        Kind::Counter,
        "table",
        "Times that this worker closed the tap because the replica refused more than `halt_after` records in a minute, or most of them.",
    ),
    metric(
        DOUBTS,
        Kind::Gauge,
        "table",
        "Ranges of records whose writes may still take effect late; each is repaired once that is over.",
    ),
    metric(
        PAUSED,
        Kind::Gauge,
        "table",
        "1 while a person has closed the tap of the table, else 0.",
    ),
    metric(
        RESTARTED,
        Kind::Counter,
        "task",
        "Tasks of the worker that died or stood still, and were started again: `shard`, `reader`, `stream`, `table`, `rows`.",
    ),
    metric(
        READY,
        Kind::Gauge,
        "",
        "1 when /readyz answers 200, else 0.",
    ),
    metric(
        POINT,
        Kind::Gauge,
        "table, kind",
        "Age of the moment of the source before which every change is known to be applied: `proven` by records and ends of shards that are checkpointed, with the clock's error added; `estimated` also by empty pages. +Inf while unknown.",
    ),
    metric(
        GROUP_POINT,
        Kind::Gauge,
        "kind",
        "The same of the group: that of its worst table.",
    ),
    metric(
        CLOCK_ERROR,
        Kind::Gauge,
        "",
        "How far the source's clock may be off, as its answers tell it. Part of every proven age. +Inf before its first answer.",
    ),
    metric(
        BUILD,
        Kind::Gauge,
        "version",
        "1, with the version of this worker.",
    ),
    metric(
        STANDBY,
        Kind::Gauge,
        "",
        "1 while this worker's region is the active one, so that nothing is fed into it, else 0.",
    ),
    metric(
        LAST_RECORD,
        Kind::Gauge,
        "table",
        "When this worker last finished a record, by the source's clock, in seconds since 1970; 0 before the first.",
    ),
    metric(
        OUTAGE,
        Kind::Gauge,
        "table, scope",
        "1 while an outage of the `source`, the `replica`, the `state` table or the `dead-letters` is open, else 0. The table is empty where it is no single table's.",
    ),
    new(
        TAKEN,
        Kind::Counter,
        "table, how",
        "Leases this worker took: `free` where nobody had it, `expired` from an owner that had not given it back.",
    ),
    new(
        LOST,
        Kind::Counter,
        "table",
        "Leases this worker lost to another.",
    ),
    new(
        OPEN,
        Kind::Gauge,
        "table",
        "Shards not applied to their end, whoever owns them.",
    ),
    new(
        UNOWNED,
        Kind::Gauge,
        "table",
        "Open shards that could be read and that nobody living owns, as this worker sees them.",
    ),
];

/// Buckets of the lag: from a tenth of a second to the 24 hours a stream remembers.
const LAG_BUCKETS: &[f64] = &[
    0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0, 180.0, 600.0, 3_600.0, 21_600.0,
    86_400.0,
];

/// Installs the process's recorder, for a worker of `group`. Call once.
///
/// # Errors
/// When a recorder is installed already.
pub fn install(group: &str) -> Result<PrometheusHandle, Failure> {
    let failed = |why: String| {
        Failure::new(
            "The metrics could not be set up",
            why,
            "Report this: it cannot happen in one process",
        )
    };
    // Without buckets a histogram would be rendered as a summary.
    let recorder = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Full(LAG.to_owned()), LAG_BUCKETS)
        .map_err(|error: BuildError| failed(error.to_string()))?
        .add_global_label("group", group)
        .build_recorder();
    let handle = recorder.handle();
    metrics::set_global_recorder(recorder).map_err(|error| failed(error.to_string()))?;
    for metric in METRICS {
        let unit = match metric.unit() {
            Measure::Seconds => Unit::Seconds,
            Measure::Count | Measure::Ratio | Measure::Flag => Unit::Count,
        };
        match metric.kind {
            Kind::Counter => describe_counter!(metric.name, unit, metric.meaning),
            Kind::Gauge => describe_gauge!(metric.name, unit, metric.meaning),
            Kind::Histogram => describe_histogram!(metric.name, unit, metric.meaning),
        }
    }
    gauge!(BUILD, "version" => env!("CARGO_PKG_VERSION")).set(1.0);
    gauge!(STANDBY).set(0.0);
    Ok(handle)
}

/// Makes a table's counters exist before their first event, so that a rate is 0 and not absent.
pub fn begin(table: &str) {
    for event in Event::ALL {
        counter!(RECORDS, "table" => table.to_owned(), "event" => event.name()).absolute(0);
    }
    for cause in [DoubtCause::Unanswered, DoubtCause::NotReleased] {
        counter!(DOUBTED, "table" => table.to_owned(), "cause" => cause.label()).absolute(0);
    }
    for name in [
        COPIED,
        COALESCED,
        WRITTEN,
        UNITS,
        THROTTLED,
        REPAIRED,
        REPAIR_WRITES,
        REPAIR_REFUSED,
        HALTED,
        LOST,
    ] {
        counter!(name, "table" => table.to_owned()).absolute(0);
    }
    for how in ["free", "expired"] {
        counter!(TAKEN, "table" => table.to_owned(), "how" => how).absolute(0);
    }
    for kind in ["proven", "estimated"] {
        gauge!(POINT, "table" => table.to_owned(), "kind" => kind).set(f64::INFINITY);
        gauge!(GROUP_POINT, "kind" => kind).set(f64::INFINITY);
    }
    for scope in Scope::ALL {
        outage(table, scope, false);
    }
    // Begun, and not set: the tasks of a table may start over.
    gauge!(LAST_RECORD, "table" => table.to_owned()).increment(0.0);
    for reason in GapReason::ALL {
        gauge!(GAPS, "table" => table.to_owned(), "reason" => reason.label()).increment(0.0);
    }
    for class in [Class::Validation, Class::CollectionFull, Class::Undecodable] {
        counter!(DEAD_LETTERED, "table" => table.to_owned(), "class" => class.label()).absolute(0);
    }
}

/// Makes the worker's counters exist before their first event.
pub fn begin_worker() {
    counter!(HANDED_OVER).absolute(0);
    for task in ["shard", "reader", "stream", "table", "rows"] {
        counter!(RESTARTED, "task" => task).absolute(0);
    }
}

/// A task of this kind died or stood still, and is started again.
pub fn task_restarted(task: &'static str) {
    counter!(RESTARTED, "task" => task).increment(1);
}

/// Whether a person has closed the tap of `table`.
pub fn paused(table: &str, paused: bool) {
    gauge!(PAUSED, "table" => table.to_owned()).set(f64::from(u8::from(paused)));
}

/// Doubts of `table`.
pub fn doubts_open(table: &str, doubts: usize) {
    gauge!(DOUBTS, "table" => table.to_owned()).set(doubts as f64);
}

/// A record is finished.
pub fn record(table: &str, event: Event) {
    counter!(RECORDS, "table" => table.to_owned(), "event" => event.name()).increment(1);
}

/// A record was left out as configured.
pub fn skipped(table: &str, reason: &'static str) {
    counter!(SKIPPED, "table" => table.to_owned(), "reason" => reason).increment(1);
}

/// Items were written at a cost of `units`.
pub fn written(table: &str, items: usize, units: f64) {
    counter!(WRITTEN, "table" => table.to_owned()).increment(items as u64);
    counter!(UNITS, "table" => table.to_owned()).increment(units.round() as u64);
}

/// What this worker may spend of the write budget of `table`, in units a second, and what throttling
/// leaves of it.
pub fn write_budget(table: &str, share: f64, limit: f64) {
    gauge!(BUDGET, "table" => table.to_owned()).set(share);
    gauge!(LIMIT, "table" => table.to_owned()).set(limit.min(share));
}

/// A record went to the dead letters.
pub fn dead_lettered(table: &str, class: Class) {
    counter!(DEAD_LETTERED, "table" => table.to_owned(), "class" => class.label()).increment(1);
}

/// A call is tried again.
pub fn retried(table: &str, class: Class) {
    counter!(RETRIED, "table" => table.to_owned(), "class" => class.label()).increment(1);
}

/// A write was throttled.
pub fn throttled(table: &str) {
    counter!(THROTTLED, "table" => table.to_owned()).increment(1);
}

/// Shards of `table` that this process owns.
pub fn leases_held(table: &str, leases: usize) {
    gauge!(LEASES, "table" => table.to_owned()).set(leases as f64);
}

/// A shard is handed over.
pub fn handed_over() {
    counter!(HANDED_OVER).increment(1);
}

/// Workers that live and stay, this one included.
pub fn workers_live(workers: usize) {
    gauge!(WORKERS).set(workers as f64);
}

/// Gaps of `table` for `reason`.
pub fn gaps_open(table: &str, reason: &'static str, gaps: usize) {
    gauge!(GAPS, "table" => table.to_owned(), "reason" => reason).set(gaps as f64);
}

/// What the audit says of `table`: seconds since it was found equal, and items that differ.
pub fn audited(table: &str, verified_age: Option<f64>, different: u64) {
    let age = verified_age.unwrap_or(f64::INFINITY);
    gauge!(VERIFIED_AGE, "table" => table.to_owned()).set(age);
    gauge!(DRIFT, "table" => table.to_owned()).set(different as f64);
}

/// A copy or a repair of gaps wrote so many items.
pub fn copied(table: &str, items: usize) {
    counter!(COPIED, "table" => table.to_owned()).increment(items as u64);
}

/// What the fleet does by itself for `table` to be whole.
pub fn mending(table: &str, mending: Mending) {
    let copying = f64::from(u8::from(mending.copying.is_some()));
    gauge!(COPYING, "table" => table.to_owned()).set(copying);
    let extra = mending.outstanding.map_or(0, |(extra, _)| extra);
    gauge!(OUTSTANDING, "table" => table.to_owned()).set(extra as f64);
    for (job, how_far) in [
        (JobKind::Bootstrap, mending.copying),
        (JobKind::GapRepair(0), mending.repairing),
    ] {
        let ratio = how_far.map_or(1.0, |how_far| f64::from(how_far.percent) / 100.0);
        let left = how_far.and_then(|how_far| how_far.left_s).unwrap_or(0);
        let job = job.label();
        gauge!(JOB_PROGRESS, "table" => table.to_owned(), "job" => job).set(ratio);
        gauge!(JOB_LEFT, "table" => table.to_owned(), "job" => job).set(left as f64);
    }
}

/// Age and headroom of `table`, in seconds.
pub fn position(table: &str, iterator_age: f64, headroom: f64) {
    gauge!(ITERATOR_AGE, "table" => table.to_owned()).set(iterator_age);
    gauge!(HEADROOM, "table" => table.to_owned()).set(headroom);
}

/// A range was put in doubt.
pub fn doubted(table: &str, cause: DoubtCause) {
    counter!(DOUBTED, "table" => table.to_owned(), "cause" => cause.label()).increment(1);
}

/// A doubt was settled with `writes` items put or deleted.
pub fn repaired(table: &str, writes: usize) {
    counter!(REPAIRED, "table" => table.to_owned()).increment(1);
    counter!(REPAIR_WRITES, "table" => table.to_owned()).increment(writes as u64);
}

/// So many dead letters wait in the queue, the oldest for `left` more.
pub fn letters_waiting(waiting: u64, left: Option<std::time::Duration>) {
    gauge!(LETTERS_WAITING).set(waiting as f64);
    gauge!(LETTERS_LEFT).set(left.map_or(f64::INFINITY, |left| left.as_secs_f64()));
}

/// A flood of refusals halted `table`.
pub fn halted(table: &str) {
    counter!(HALTED, "table" => table.to_owned()).increment(1);
}

/// Letters of `keys` items were delivered that a repair found different and the replica refuses.
pub fn repair_refused(table: &str, keys: usize) {
    counter!(REPAIR_REFUSED, "table" => table.to_owned()).increment(keys as u64);
}

/// Whether the worker is ready.
pub fn ready(ready: bool) {
    gauge!(READY).set(if ready { 1.0 } else { 0.0 });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documentation_lists_every_metric() {
        let text = include_str!("../../docs/METRICS.md");
        for metric in METRICS {
            let kind = format!("{:?}", metric.kind).to_lowercase();
            let labels = if metric.labels.is_empty() {
                "—"
            } else {
                metric.labels
            };
            let unit = format!("{:?}", metric.unit()).to_lowercase();
            let stability = format!("{:?}", metric.stability).to_lowercase();
            let row = format!(
                "| `{}` | {kind} | {unit} | {labels} | {stability} | {} |",
                metric.name, metric.meaning
            );
            assert!(
                text.lines().any(|line| line == row),
                "docs/METRICS.md lacks the row:\n{row}"
            );
        }
        let rows = text.lines().filter(|line| line.starts_with("| `")).count();
        assert_eq!(
            rows,
            METRICS.len(),
            "a row for a metric that does not exist"
        );
    }
}
