//! One reader of the state table for the whole worker: everybody else looks at its snapshots.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Notify, watch};

use crate::dynamo::clock::{host_ms, uptime};
use crate::lease::gaps::Ground;
use crate::lease::row::{
    ControlRow, DoubtRow, GapReason, GapRow, Mending, PauseRow, Progress, ReconcileRow, Row,
    SegmentRow, ShardRow, StreamRow, TrackRow, WorkerRow, audited, comparisons,
};
use crate::lease::rules::Observer;
use crate::lease::table::StateTable;
use crate::mutation::trouble;
use crate::observe::health::{Health, Scope};
use crate::observe::metrics;
use crate::observe::pulse::Pulse;
use crate::observe::recovery::Holds;
use crate::observe::view::build::Rows;

/// The state table as read at one moment.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// Leases.
    pub shards: Vec<ShardRow>,
    /// Streams.
    pub streams: Vec<StreamRow>,
    /// Processes of the fleet, dead ones as well.
    pub workers: Vec<WorkerRow>,
    /// Ranges in doubt.
    pub doubts: Vec<DoubtRow>,
    /// Closed taps.
    pub pauses: Vec<PauseRow>,
    /// Which region is active.
    pub control: Option<ControlRow>,
    /// When the reading of it began.
    pub begun: Option<Instant>,
    /// The same moment by [`uptime`], which runs on while the machine is suspended.
    pub begun_uptime: Option<Duration>,
    /// Process starts whose counter moved within the last lease duration.
    pub living: HashSet<String>,
    /// Process starts that have been silent for so long that their rows may go.
    pub long_dead: HashSet<String>,
    /// Keys of the leases that may be taken.
    pub takeable: HashSet<String>,
    /// Keys of the leases under which no write takes effect any more: given back, or silent for a lease and
    /// a late effect.
    pub dead: HashSet<String>,
    /// Keys of the leases whose owners read, and are seen to live.
    pub read_now: HashSet<String>,
    /// Gaps that are open.
    pub gaps: Vec<GapRow>,
    /// How far streams of a region that is not fed are read.
    pub tracks: Vec<TrackRow>,
    /// Comparisons.
    pub plans: Vec<ReconcileRow>,
    /// Their segments.
    pub segments: Vec<SegmentRow>,
    /// What holds back what the rows of shards may say to be proven.
    pub holds: Holds,
    /// Whether it has been read at all.
    pub read: bool,
}

impl Snapshot {
    /// The rows of one reading, sorted out. What observers tell of them is empty.
    pub fn of(rows: Vec<Row>) -> Self {
        let mut snapshot = Self {
            read: true,
            ..Self::default()
        };
        for row in rows {
            match row {
                Row::Shard(row) => snapshot.shards.push(row),
                Row::Stream(row) => snapshot.streams.push(row),
                Row::Gap(row) => snapshot.gaps.push(row),
                Row::Worker(row) => snapshot.workers.push(row),
                Row::Doubt(row) => snapshot.doubts.push(row),
                Row::Pause(row) => snapshot.pauses.push(row),
                Row::Control(row) => snapshot.control = Some(row),
                Row::Reconcile(row) => snapshot.plans.push(row),
                Row::Segment(row) => snapshot.segments.push(row),
                Row::Job(_)
                | Row::Budget(_)
                | Row::Ttl(_)
                | Row::Undo(_)
                | Row::PastDoubt(_)
                | Row::Other(_) => {}
                Row::Capture(row) | Row::Ledger(row) => snapshot.tracks.push(row),
            }
        }
        snapshot.holds = Holds::of(&snapshot.doubts, &snapshot.gaps);
        snapshot
    }

    /// The rows, to be seen.
    pub fn seen(&self) -> Rows<'_> {
        Rows {
            control: self.control.as_ref(),
            shards: &self.shards,
            streams: &self.streams,
            gaps: &self.gaps,
            doubts: &self.doubts,
            workers: &self.workers,
            pauses: &self.pauses,
            plans: &self.plans,
            segments: &self.segments,
            tracks: &self.tracks,
        }
    }

    /// The comparisons, with their segments.
    pub fn jobs(&self) -> Vec<Progress<'_>> {
        comparisons(&self.plans, &self.segments)
    }

    /// What decides about gaps, at `now_ms` in the region of the state table. `jobs` are [`jobs`](Self::jobs).
    pub fn ground<'a>(&'a self, epoch: u64, jobs: &'a [Progress<'a>], now_ms: i64) -> Ground<'a> {
        Ground {
            epoch,
            shards: &self.shards,
            streams: &self.streams,
            doubts: &self.doubts,
            jobs,
            now_ms,
        }
    }
}

/// The longest pause between two readings, of a state table of a usual size.
const PAUSE_MAX: Duration = Duration::from_millis(1_500);
/// Readings that somebody asks for are at least this share of the usual pause apart: 150 ms with the
/// default duration.
const ASKED_SHARE: u32 = 10;
/// A state table with more rows is read less often.
const USUAL_ROWS: usize = 1_000;
/// After how many lease durations a silent worker's row may go. Much more than a lease: somebody may
/// want to see who died.
const LONG_DEAD_LEASES: u32 = 10;

/// What this process has seen of the counters in the state table.
#[derive(Default)]
struct Observers {
    shards: Observer,
    workers: Observer,
}

/// What the reader of the state table goes by.
#[derive(Debug, Clone)]
pub struct Terms {
    /// How long a lease is good for.
    pub lease: Duration,
    /// How long after its end a write may take effect.
    pub late_effect: Duration,
    /// Number of the epoch.
    pub epoch: u64,
    /// The tables of the configuration.
    pub tables: Vec<String>,
}

/// Reads the state table again and again, and at once when `rescan` asks.
pub async fn watch_rows(
    state: StateTable,
    me: String,
    terms: Terms,
    snapshots: Arc<watch::Sender<Arc<Snapshot>>>,
    rescan: Arc<Notify>,
    health: Arc<Health>,
) {
    let duration = terms.lease;
    let mut observers = Observers::default();
    let pulse = Pulse::start(&health, "", "rows");
    // How long a reading counts as just made, whoever asks for another.
    let mut fresh = Duration::ZERO;
    loop {
        pulse.beat();
        trouble("rows").await;
        let (begun, begun_uptime) = (Instant::now(), uptime());
        let next;
        match state.rows().await {
            Ok(rows) => {
                health.succeeded(Scope::State, "", "rows");
                let rows_read = rows.len();
                let mut snapshot = digest(rows, &mut observers, &terms, &health);
                snapshot.begun = Some(begun);
                snapshot.begun_uptime = Some(begun_uptime);
                health.rows_read(begun);
                let now = Instant::now();
                fresh = pause(rows_read, duration, false) / ASKED_SHARE;
                let usual = now + pause(rows_read, duration, is_expecting(&snapshot, &me));
                let expiry = next_expiry(&snapshot, &observers, duration, now);
                next = expiry.map_or(usual, |expiry| usual.min(expiry));
                snapshots.send_replace(Arc::new(snapshot));
            }
            Err(fault) => {
                health.failed(Scope::State, "", "rows", &fault);
                // Sooner: taps close once the last reading is a lease old.
                next = Instant::now() + duration / 10;
            }
        }
        tokio::select! {
            // Shards that end together ask together, and are served by one reading.
            () = rescan.notified() => tokio::time::sleep_until((begun + fresh).into()).await,
            () = tokio::time::sleep_until(next.into()) => {}
        }
    }
}

/// How long to wait between two readings. A lease that was released is found within it, so it is
/// short; each reading costs one read unit per 4 KB, some 8 rows. The 100 rows of a small group cost
/// about 8 units a second and worker, 1,000 rows some 80. Beyond that a quarter of a lease has to do:
/// a released lease then waits up to 2.5 s with the default duration, and an expired one waits no
/// longer, because the reader wakes for it.
///
/// `expecting`: leases are about to be released, so a third of that.
fn pause(rows: usize, duration: Duration, expecting: bool) -> Duration {
    let quarter = duration / 4;
    let usual = match rows > USUAL_ROWS {
        true => quarter,
        false => quarter.min(PAUSE_MAX),
    };
    if expecting { usual / 3 } else { usual }
}

/// Whether leases are about to be released: a worker leaves, or was asked for some by this one.
fn is_expecting(snapshot: &Snapshot, me: &str) -> bool {
    snapshot
        .workers
        .iter()
        .filter(|row| snapshot.living.contains(&row.worker))
        .any(|row| row.leaving || (row.worker == me && !row.wants.is_empty()))
}

/// When the next lease or worker is over, if its counter stands still until then. Leases that are
/// renewed never come so far: their counters move within a third of their duration.
fn next_expiry(
    snapshot: &Snapshot,
    observers: &Observers,
    duration: Duration,
    now: Instant,
) -> Option<Instant> {
    let leases = snapshot
        .shards
        .iter()
        .filter(|row| row.lease_owner.is_some() && !row.is_finished())
        .filter_map(|row| observers.shards.still_since(row));
    let workers = snapshot
        .workers
        .iter()
        .filter_map(|row| observers.workers.still_since(row));
    leases
        .chain(workers)
        .map(|since| since + duration)
        .filter(|expiry| *expiry > now)
        .min()
}

fn digest(rows: Vec<Row>, observers: &mut Observers, terms: &Terms, health: &Health) -> Snapshot {
    let duration = terms.lease;
    let mut snapshot = Snapshot::of(rows);
    show_gaps(&snapshot, terms, health);
    let now = Instant::now();
    observers.shards.observe(snapshot.shards.iter(), now);
    observers.workers.observe(snapshot.workers.iter(), now);
    for row in &snapshot.workers {
        let since = observers.workers.still_since(row);
        let silent = since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        if silent < duration {
            snapshot.living.insert(row.worker.clone());
        } else if silent >= duration * LONG_DEAD_LEASES {
            snapshot.long_dead.insert(row.worker.clone());
        }
    }
    snapshot.takeable = snapshot
        .shards
        .iter()
        .filter(|row| !row.is_finished() && observers.shards.is_takeable(row, duration, now))
        .map(|row| row.lease_key.clone())
        .collect();
    let is_read = |row: &&ShardRow| row.is_read() && observers.shards.has_moved(*row);
    snapshot.read_now = snapshot
        .shards
        .iter()
        .filter(is_read)
        .filter(|row| !snapshot.takeable.contains(&row.lease_key))
        .map(|row| row.lease_key.clone())
        .collect();
    let silent = duration + terms.late_effect;
    snapshot.dead = snapshot
        .shards
        .iter()
        .filter(|row| observers.shards.is_dead(row, silent, now))
        .map(|row| row.lease_key.clone())
        .collect();
    snapshot
}

/// Tells health and metrics what is not whole: gaps, what the audit found, copies and repairs.
fn show_gaps(snapshot: &Snapshot, terms: &Terms, health: &Health) {
    let now_ms = host_ms();
    let epoch = terms.epoch;
    let jobs = snapshot.jobs();
    let stored = snapshot
        .gaps
        .iter()
        .map(|gap| (gap.table.as_str(), gap.reason, gap.lease_key.as_str()));
    // One of the worker's own shows by itself, and is gone on with by itself.
    let unfinished = jobs
        .iter()
        .filter(|job| !job.plan.kind().is_the_workers() && job.is_unfinished(epoch, now_ms));
    let unfinished = unfinished.map(|job| {
        let (table, key) = (&job.plan.table, &job.plan.lease_key);
        (table.as_str(), GapReason::ReconcileUnfinished, key.as_str())
    });
    let mut drift = Vec::new();
    for table in &terms.tables {
        health.set_mending(table, Mending::of(&jobs, epoch, table, now_ms));
        let Some((verified_ms, different)) = audited(&jobs, epoch, table) else {
            continue;
        };
        let verified = verified_ms.map(|ms| (now_ms - ms).max(0) as f64 / 1_000.0);
        metrics::audited(table, verified, different);
        if different > 0 {
            drift.push((table.as_str(), GapReason::Drift, table.as_str()));
        }
    }
    health.set_gaps(stored.chain(unfinished).chain(drift));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stream::ShardId;
    use crate::stream::reader::Position;

    const LEASE: Duration = Duration::from_secs(10);

    fn shard(owner: Option<&str>, counter: u64) -> ShardRow {
        let id = ShardId("s".into());
        let start = Position::TrimHorizon;
        let mut row = ShardRow::new(1, "t", "arn/stream/l", &id, None, &start, 0);
        row.lease_owner = owner.map(str::to_owned);
        row.lease_counter = counter;
        row
    }

    fn worker(counter: u64) -> WorkerRow {
        let mut row = WorkerRow::new("w", 1, String::new());
        row.lease_counter = counter;
        row
    }

    #[test]
    fn a_released_lease_is_found_within_two_seconds_unless_the_table_is_large() {
        assert_eq!(pause(100, LEASE, false), PAUSE_MAX);
        assert_eq!(
            pause(100, Duration::from_secs(1), false),
            Duration::from_millis(250)
        );
        assert_eq!(pause(1_001, LEASE, false), LEASE / 4);
        assert_eq!(pause(100, LEASE, true), PAUSE_MAX / 3);
    }

    #[test]
    fn the_reader_wakes_when_the_next_lease_or_worker_is_over_and_only_then() {
        let start = Instant::now();
        let later = |seconds| start + Duration::from_secs(seconds);
        let mut observers = Observers::default();
        let mut snapshot = Snapshot {
            shards: vec![shard(Some("w.1"), 1)],
            workers: vec![worker(1)],
            ..Snapshot::default()
        };
        let mut look = |snapshot: &Snapshot, at: u64| {
            observers.shards.observe(snapshot.shards.iter(), later(at));
            observers
                .workers
                .observe(snapshot.workers.iter(), later(at));
            next_expiry(snapshot, &observers, LEASE, later(at))
        };
        assert_eq!(look(&snapshot, 0), Some(later(10)));
        snapshot.workers = vec![worker(2)];
        assert_eq!(
            look(&snapshot, 3),
            Some(later(10)),
            "the lease stands still"
        );
        snapshot.shards = vec![shard(None, 2)];
        assert_eq!(
            look(&snapshot, 4),
            Some(later(13)),
            "released: only the worker is left"
        );
        assert_eq!(
            look(&snapshot, 13),
            None,
            "what is over does not wake again"
        );
    }

    #[test]
    fn a_worker_is_alive_for_a_lease_after_its_counter_moved() {
        let health = Health::default();
        let mut observers = Observers::default();
        let rows = || vec![Row::Worker(worker(1))];
        let tiny = Duration::from_millis(20);
        let terms = |lease| Terms {
            lease,
            late_effect: Duration::ZERO,
            epoch: 1,
            tables: Vec::new(),
        };
        let first = digest(rows(), &mut observers, &terms(LEASE), &health);
        assert!(first.living.contains("w"), "seen for the first time");
        std::thread::sleep(tiny);
        let dead = digest(rows(), &mut observers, &terms(tiny), &health);
        assert!(dead.living.is_empty() && dead.long_dead.is_empty());
        std::thread::sleep(9 * tiny);
        let long_dead = digest(rows(), &mut observers, &terms(tiny), &health);
        assert!(long_dead.long_dead.contains("w"));
    }
}
