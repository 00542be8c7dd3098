//! The fence: when nothing of an epoch that is over can be sent any more. Pure.
//!
//! ```text
//!   record stored ─▶ all acknowledged, all given back ─▶ rows fenced ─────────────▶ complete
//!                 └▶ somebody is silent for a moment ──▶ rows fenced ─▶ a lease ──▶ complete
//! ```
//!
//! *Why a lease is enough for who is silent*: a write leaves only while its lease (or hold) and its
//! [term](crate::lease::term) are good. Neither can be renewed any more: the rows' counters have moved,
//! and the control record says another epoch. Both count from before they were last renewed.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::lease::row::{
    DoubtRow, JobKind, JobRow, ReconcileRow, Row, SegmentRow, ShardRow, WorkerRow,
};
use crate::lease::rules::worker_of;

/// How long living workers get to acknowledge before their rows are fenced over their heads: what they
/// had not stored by then is in flight.
pub const PATIENCE: Duration = Duration::from_millis(1_500);
/// Beyond the lease: clocks of two machines do not run alike.
const MARGIN: Duration = Duration::from_millis(200);

/// The rows of a state table that say who may write.
#[derive(Debug, Clone, Default)]
pub struct Writers {
    /// Leases of epochs that are over.
    pub shards: Vec<ShardRow>,
    /// Processes of such epochs.
    pub workers: Vec<WorkerRow>,
    /// Doubts of such epochs.
    pub doubts: Vec<DoubtRow>,
    /// One-shot jobs of such epochs.
    pub jobs: Vec<JobRow>,
    /// Comparisons of such epochs that repair.
    pub plans: Vec<ReconcileRow>,
    /// Segments of those.
    pub segments: Vec<SegmentRow>,
    /// Jobs that were asked for, repair, and that somebody is at, whether or not they hold a segment this
    /// moment. What workers repair by themselves their own rows stand for.
    pub at_work: BTreeSet<String>,
    /// When that was so, by the clock of the state table's region, in milliseconds.
    now_ms: i64,
}

impl Writers {
    /// Those of epochs before `epoch`, at `now_ms` of the state table's region.
    pub fn before(epoch: u64, rows: impl IntoIterator<Item = Row>, now_ms: i64) -> Self {
        let mut writers = Self {
            now_ms,
            ..Self::default()
        };
        let mut segments = Vec::new();
        for row in rows {
            match row {
                Row::Shard(row) if row.epoch < epoch => writers.shards.push(row),
                Row::Worker(row) if row.epoch < epoch => writers.workers.push(row),
                Row::Doubt(row) if row.epoch < epoch => writers.doubts.push(row),
                Row::Job(row) if row.epoch < epoch => writers.jobs.push(row),
                Row::Reconcile(row) if row.epoch < epoch => writers.plans.push(row),
                Row::Segment(row) => segments.push(row),
                _ => {}
            }
        }
        segments.retain(|row| {
            writers
                .plans
                .iter()
                .any(|plan| plan.apply && row.is_of(plan))
        });
        writers.segments = segments;
        let at_work = |plan: &&ReconcileRow| {
            let is_asked = plan.kind() == JobKind::Asked;
            is_asked && plan.apply && plan.ended.is_none() && plan.until >= now_ms
        };
        let plans = writers.plans.iter().filter(at_work);
        writers.at_work = plans.map(|plan| plan.lease_key.clone()).collect();
        writers
    }

    /// Leases that are not fenced yet.
    pub fn unfenced(&self) -> impl Iterator<Item = &ShardRow> {
        self.shards.iter().filter(|row| row.fenced.is_none())
    }

    /// Keys and counters of the other rows that somebody holds.
    pub fn holds(&self) -> Vec<(&str, u64)> {
        let doubts = self.doubts.iter().filter(|row| row.lease_owner.is_some());
        let jobs = self.jobs.iter().filter(|row| row.lease_owner.is_some());
        let segments = self.segments.iter().filter(|row| row.lease_owner.is_some());
        doubts
            .map(|row| (row.lease_key.as_str(), row.lease_counter))
            .chain(jobs.map(|row| (row.lease_key.as_str(), row.lease_counter)))
            .chain(segments.map(|row| (row.lease_key.as_str(), row.lease_counter)))
            .collect()
    }

    /// Leases that were fenced over the head of their owner: what that had in flight is not known.
    pub fn in_flight(&self) -> impl Iterator<Item = &ShardRow> {
        let open = self.shards.iter().filter(|row| !row.is_finished());
        open.filter(|row| row.fenced.is_some() && row.fenced_owner.is_some())
    }

    /// Who may still send something: processes that have not acknowledged `epoch`, and holders of rows that
    /// none that has is.
    pub fn unsettled(&self, epoch: u64) -> BTreeSet<String> {
        let has = |row: &&WorkerRow| row.acknowledged.is_some_and(|by| by >= epoch);
        let settled: BTreeSet<&str> = self
            .workers
            .iter()
            .filter(has)
            .map(|row| row.worker.as_str())
            .collect();
        let silent = self.workers.iter().filter(|row| !has(row));
        let open = self.shards.iter().filter(|row| !row.is_finished());
        let leases = open.filter_map(ShardRow::holder);
        let doubts = self
            .doubts
            .iter()
            .filter_map(|row| row.lease_owner.as_deref());
        // What one of them sent was dead by its `until`, whoever it was.
        let jobs = self.jobs.iter().filter(|row| row.until >= self.now_ms);
        let jobs = jobs.filter_map(|row| row.lease_owner.as_deref());
        let segments = self.segments.iter();
        let segments = segments.filter(|row| row.until >= self.now_ms);
        let segments = segments.filter_map(|row| row.lease_owner.as_deref());
        let holders = leases.chain(doubts).chain(jobs).chain(segments);
        let holders = holders.map(worker_of);
        silent
            .map(|row| row.worker.as_str())
            .chain(holders.filter(|holder| !settled.contains(holder)))
            // Between two segments such a job holds nothing, and takes the next one in a moment.
            .chain(self.at_work.iter().map(String::as_str))
            .map(str::to_owned)
            .collect()
    }
}

/// What is next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    /// Look again.
    Wait,
    /// Fence the rows that are not yet.
    Fence,
    /// Nothing of the old epoch can be sent any more.
    Complete {
        /// Whether everybody had acknowledged; otherwise a lease has passed.
        acknowledged: bool,
    },
}

/// What is next, `since` the record of `epoch` was stored, or was found so, and `fenced` since all rows
/// that there were had been fenced for the first time.
pub fn next(
    writers: &Writers,
    epoch: u64,
    since: Duration,
    fenced: Option<Duration>,
    lease: Duration,
) -> Next {
    let acknowledged = writers.unsettled(epoch).is_empty();
    let all_fenced = writers.unfenced().next().is_none();
    let over = fenced.is_some_and(|fenced| fenced >= lease + MARGIN);
    match (acknowledged, over) {
        // Rows that somebody made meanwhile are fenced as well: nobody can use them, and nobody shall try.
        (true, _) | (_, true) if !all_fenced => Next::Fence,
        (true, _) => Next::Complete { acknowledged: true },
        (false, true) => Next::Complete {
            acknowledged: false,
        },
        (false, false) if fenced.is_none() && since >= PATIENCE.min(lease / 2) => Next::Fence,
        (false, false) => Next::Wait,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stream::ShardId;
    use crate::stream::reader::Position;

    const LEASE: Duration = Duration::from_secs(10);
    const NOW: Duration = Duration::ZERO;

    fn shard(owner: Option<&str>) -> ShardRow {
        let id = ShardId("s".into());
        let start = Position::TrimHorizon;
        let mut row = ShardRow::new(1, "t", "arn/stream/l", &id, None, &start, 0);
        row.lease_owner = owner.map(str::to_owned);
        row
    }

    fn worker(id: &str, acknowledged: Option<u64>) -> WorkerRow {
        let mut row = WorkerRow::new(id, 1, String::new());
        row.acknowledged = acknowledged;
        row
    }

    fn writers(shards: Vec<ShardRow>, workers: Vec<WorkerRow>) -> Writers {
        let shards = shards.into_iter().map(Row::Shard);
        let workers = workers.into_iter().map(Row::Worker);
        Writers::before(2, shards.chain(workers), 0)
    }

    #[test]
    fn who_acknowledged_and_gave_back_need_not_be_waited_for() {
        let rows = writers(vec![shard(None)], vec![worker("w", Some(2))]);
        assert_eq!(next(&rows, 2, NOW, None, LEASE), Next::Fence);
        let rows = writers(vec![shard(None).fenced_by(2)], vec![worker("w", Some(2))]);
        let complete = Next::Complete { acknowledged: true };
        assert_eq!(next(&rows, 2, NOW, Some(NOW), LEASE), complete);
        // It acknowledged without having stored how far it came: nothing is sent all the same.
        let rows = writers(
            vec![shard(Some("w.1")).fenced_by(2)],
            vec![worker("w", Some(2))],
        );
        assert_eq!(next(&rows, 2, NOW, Some(NOW), LEASE), complete);
        assert_eq!(rows.in_flight().count(), 1);
    }

    #[test]
    fn who_is_silent_is_fenced_after_a_moment_and_waited_for_a_whole_lease_after_that() {
        let rows = writers(vec![shard(Some("w.1"))], vec![worker("w", None)]);
        assert_eq!(next(&rows, 2, NOW, None, LEASE), Next::Wait);
        assert_eq!(next(&rows, 2, PATIENCE, None, LEASE), Next::Fence);
        let rows = writers(
            vec![shard(Some("w.1")).fenced_by(2)],
            vec![worker("w", None)],
        );
        let long = LEASE * 9;
        assert_eq!(next(&rows, 2, long, Some(LEASE), LEASE), Next::Wait);
        let lease_silent = Next::Complete {
            acknowledged: false,
        };
        let later = Some(LEASE + MARGIN);
        assert_eq!(next(&rows, 2, long, later, LEASE), lease_silent);
    }

    #[test]
    fn a_dead_workers_lease_counts_without_its_row_and_a_finished_one_does_not() {
        let rows = writers(vec![shard(Some("dead.1"))], Vec::new());
        assert_eq!(rows.unsettled(2).len(), 1);
        let mut finished = shard(Some("dead.1"));
        finished.checkpoint = crate::lease::row::SHARD_END.to_owned();
        assert!(writers(vec![finished], Vec::new()).unsettled(2).is_empty());
    }

    #[test]
    fn a_row_made_meanwhile_is_fenced_before_it_is_complete() {
        let fenced = shard(Some("w.1")).fenced_by(2);
        let rows = writers(vec![fenced, shard(Some("w.2"))], vec![worker("w", None)]);
        assert_eq!(next(&rows, 2, NOW, Some(LEASE * 2), LEASE), Next::Fence);
    }

    #[test]
    fn jobs_hold_the_fence_up_as_leases_do() {
        let mut job = JobRow::new("redrive", "x", 1, "a", "b", String::new());
        job.lease_owner = Some("cli.1".into());
        let rows = Writers::before(2, [Row::Job(job.clone())], 0);
        assert_eq!(rows.unsettled(2).len(), 1);
        assert_eq!(rows.holds().len(), 1);
        let late = Writers::before(2, [Row::Job(job.clone())], 1);
        assert!(
            late.unsettled(2).is_empty(),
            "what it sent was dead by then"
        );
        job.lease_owner = None;
        // Between two segments a repair holds nothing, and will in a moment.
        let mut plan: ReconcileRow = serde_json::from_value(serde_json::json!({
            "leaseKey": "reconcile#1", "entityType": "reconcile", "formatVersion": 1, "epoch": 1, "job": "1",
            "table": "t", "order": 0, "source": "a", "target": "b", "apply": true, "strategy": "mirror",
            "maxDeletes": "0", "segments": 1, "items": 0, "at": "", "atMs": 0, "leaseCounter": 1, "until": 5,
            "joined": 1,
        }))
        .unwrap();
        let at = |plan: &ReconcileRow, now_ms| {
            Writers::before(2, [Row::Reconcile(plan.clone())], now_ms)
        };
        assert_eq!(at(&plan, 5).unsettled(2).len(), 1);
        assert!(
            at(&plan, 6).unsettled(2).is_empty(),
            "nobody is at it any more"
        );
        plan.apply = false;
        assert!(at(&plan, 5).unsettled(2).is_empty());
        assert!(
            Writers::before(2, [Row::Job(job)], 0)
                .unsettled(2)
                .is_empty()
        );
    }
}
