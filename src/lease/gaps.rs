//! When a gap may be repaired. Pure.
//!
//! Repair by key is right while later records of the key will still be applied, and nothing older
//! is on its way to the replica. A gap breaks both for a moment:
//!
//! ```text
//!   read, in flight:  … k=1          lost:  k=2          still to be read:  j=5 …
//!                      │                                      ▲
//!                      └─ applied after the repair of k:      └─ stored as the position before
//!                         k=1 stays, for nothing later           anything is compared
//!                         will ever mend it
//! ```
//!
//! * *Drained first*: what was read before the gap is durable, or in doubt and repaired by key later.
//!   Otherwise a write of before takes effect after the repair, and the record that would have mended
//!   it is lost.
//! * *The new position stored*: otherwise the next owner goes on from the old one, finds the gap once
//!   more, or (where the position is a name) reads less than what was lost.
//! * *Old streams to their ends first*, for the same reason: their records are older than the gap.
//! * *Old sources fenced*: nobody writes what the source before held any more.

use super::row::{
    DoubtRow, GapReason, GapRow, JobKind, Progress, ReconcileRow, ShardRow, StreamRow,
};
use crate::config::OnGap;
use crate::stream::stream_label;

/// What decides.
#[derive(Clone, Copy)]
pub struct Ground<'a> {
    /// The epoch now.
    pub epoch: u64,
    /// All leases.
    pub shards: &'a [ShardRow],
    /// All streams.
    pub streams: &'a [StreamRow],
    /// All doubts.
    pub doubts: &'a [DoubtRow],
    /// All comparisons.
    pub jobs: &'a [Progress<'a>],
    /// The time in the region of the state table, in milliseconds.
    pub now_ms: i64,
}

impl Ground<'_> {
    /// Whether all that is read of `table` from now on has a stored position: its newest stream has a
    /// lease for each shard of its first listing, and older ones are finished.
    pub fn is_pinned(&self, table: &str) -> bool {
        let of_table: Vec<&StreamRow> = self
            .streams
            .iter()
            .filter(|row| row.is_of(self.epoch, table))
            .collect();
        let newest = of_table
            .iter()
            .max_by_key(|row| stream_label(&row.stream_arn));
        newest.is_some_and(|newest| {
            let older = |row: &&&StreamRow| row.lease_key != newest.lease_key;
            newest.initialised && of_table.iter().filter(older).all(|row| row.finished)
        })
    }

    /// Whether `gap` may be repaired now. `is_dead` says of a lease that no write under it takes
    /// effect any more.
    pub fn is_repairable(&self, gap: &GapRow, is_dead: impl Fn(&ShardRow) -> bool) -> bool {
        if !self.is_pinned(&gap.table) {
            return false;
        }
        let is_fenced = || self.is_fenced(&gap.table, &is_dead);
        // Of another time: what its shards held is nobody's any more.
        if gap.epoch < self.epoch {
            return is_fenced();
        }
        match gap.reason {
            GapReason::NeverCopied | GapReason::StreamRecreated => true,
            GapReason::SourceSwitched => is_fenced(),
            GapReason::Trimmed | GapReason::ShardVanished => {
                let Some(awaited) = &gap.awaits else {
                    return true;
                };
                // Deleted only when it was finished.
                let row = self.shards.iter().find(|row| row.lease_key == *awaited);
                row.is_none_or(|row| {
                    row.is_finished() || row.restarted_at.is_some_and(|at| at >= gap.found_at)
                })
            }
            GapReason::ReconcileUnfinished | GapReason::Drift => false,
        }
    }

    /// Whether nothing of an epoch before reaches `table` any more: every lease was given back or is dead,
    /// and so is every write in doubt, or of a job.
    fn is_fenced(&self, table: &str, is_dead: impl Fn(&ShardRow) -> bool) -> bool {
        let of_before = |epoch: u64, of: &str| epoch < self.epoch && of == table;
        let mut leases = self.shards.iter();
        let mut doubts = self.doubts.iter();
        let mut jobs = self.jobs.iter();
        !leases
            .any(|row| of_before(row.epoch, &row.table) && row.holder().is_some() && !is_dead(row))
            && !doubts.any(|row| of_before(row.epoch, &row.table) && row.until >= self.now_ms)
            && !jobs
                .any(|job| of_before(job.plan.epoch, &job.plan.table) && job.may_write(self.now_ms))
    }

    /// Whether the flow of `table` has passed `ms` of the source: every open shard has applied all
    /// that was made until then.
    pub fn has_passed(&self, table: &str, ms: i64) -> bool {
        let open =
            |row: &&ShardRow| row.epoch == self.epoch && row.table == table && !row.is_finished();
        let mut open = self.shards.iter().filter(open);
        self.is_pinned(table) && open.all(|row| row.watermark.is_some_and(|until| until >= ms))
    }
}

/// What a worker does next for a table to be whole.
#[derive(Debug, Clone, PartialEq)]
pub enum Next<'a> {
    /// Nothing, now.
    Nothing,
    /// It begins the repair of this number; it closes these gaps.
    Begin(u64, Vec<&'a GapRow>),
    /// It works at this job, beside the rest of the fleet.
    Work(&'a ReconcileRow),
    /// It begins this job anew: it ended, and something still differs.
    Again(&'a Progress<'a>),
    /// It removes this job: it is of no use any more.
    Remove(&'a Progress<'a>),
}

/// How much later than a copy has ended the stream has to be for all of it to be behind: stream times
/// are whole seconds, and clocks of two regions are known to two.
pub const PASS_MARGIN_MS: i64 = 3_000;

impl Ground<'_> {
    /// What is next for `table`. `gaps` are all that are open, `jobs` all comparisons.
    pub fn next<'a>(
        &'a self,
        table: &str,
        gaps: &'a [GapRow],
        on_gap: OnGap,
        is_dead: impl Fn(&ShardRow) -> bool,
    ) -> Next<'a> {
        let of_table = self.jobs.iter().filter(|job| job.plan.table == table);
        let (mut bootstrap, mut repairs) = (None, Vec::new());
        for job in of_table {
            match job.plan.kind() {
                JobKind::Asked | JobKind::Audit(_) => {}
                // What it was to do is done by the repair that the change of the source asks for. What it
                // wrote last has to be dead before.
                _ if job.plan.epoch < self.epoch && job.may_write(self.now_ms) => {}
                _ if job.plan.epoch < self.epoch => return Next::Remove(job),
                _ if job.plan.epoch > self.epoch => {}
                JobKind::Bootstrap => bootstrap = Some(job),
                JobKind::GapRepair(number) => repairs.push((number, job)),
            }
        }
        if let Some(job) = bootstrap {
            let plan = job.plan;
            match plan.ended_at_ms {
                None if self.is_pinned(table) => return Next::Work(plan),
                None => return Next::Nothing,
                Some(_) if plan.too_many_deletes.is_some() => {}
                Some(_) if !plan.is_whole() => return Next::Again(job),
                Some(ended_ms) if self.has_passed(table, ended_ms + PASS_MARGIN_MS) => {
                    return Next::Remove(job);
                }
                Some(_) => {}
            }
        }
        let is_open = |job: &Progress<'_>, gap: &GapRow| {
            let mut closes = job.plan.closes.iter();
            closes.any(|one| one.key == gap.lease_key && one.counter == gap.lease_counter)
        };
        for (_, job) in &repairs {
            let plan = job.plan;
            let is_left = plan.too_many_deletes.is_some() || !plan.apply;
            let any_open = gaps.iter().any(|gap| is_open(job, gap));
            match plan.ended {
                // Asked for otherwise since.
                _ if plan.apply && on_gap != OnGap::Repair => return Next::Nothing,
                _ if !plan.apply && on_gap != OnGap::Report => return Next::Remove(job),
                None => return Next::Work(plan),
                Some(_) if !any_open || plan.is_whole() => return Next::Remove(job),
                Some(_) if !is_left => return Next::Again(job),
                Some(_) => {}
            }
        }
        let repairable = |gap: &&GapRow| {
            gap.table == table && gap.epoch <= self.epoch && self.is_repairable(gap, &is_dead)
        };
        let closes: Vec<&GapRow> = gaps.iter().filter(repairable).collect();
        // A person has to say what is to become of what was compared before.
        let is_new = |gap: &&&GapRow| !repairs.iter().any(|(_, job)| is_open(job, gap));
        let by_itself = |gap: &&GapRow| gap.reason.is_repaired_by_itself();
        if on_gap == OnGap::Off || !closes.iter().filter(is_new).any(by_itself) {
            return Next::Nothing;
        }
        let last = repairs.iter().map(|(number, _)| *number).max();
        Next::Begin(last.unwrap_or_default() + 1, closes)
    }
}

#[cfg(test)]
#[path = "gaps_tests.rs"]
mod tests;
