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

use super::row::{GapReason, GapRow, JobKind, Progress, ReconcileRow, ShardRow, StreamRow};
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
        let of_before = |row: &&ShardRow| row.table == gap.table && row.epoch < self.epoch;
        let is_fenced = || {
            let mut before = self.shards.iter().filter(of_before);
            before.all(|row| row.lease_owner.is_none() || is_dead(row))
        };
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
        &self,
        table: &str,
        gaps: &'a [GapRow],
        jobs: &'a [Progress<'a>],
        on_gap: OnGap,
        is_dead: impl Fn(&ShardRow) -> bool,
    ) -> Next<'a> {
        let of_table = jobs.iter().filter(|job| job.plan.table == table);
        let (mut bootstrap, mut repairs) = (None, Vec::new());
        for job in of_table {
            match job.plan.kind() {
                JobKind::Asked | JobKind::Audit(_) => {}
                // What it was to do the source of now may have done already.
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
mod tests {
    use super::*;
    use crate::lease::row::{FORMAT_VERSION, SHARD_END};
    use crate::stream::ShardId;
    use crate::stream::reader::Position;

    fn arn(label: &str) -> String {
        format!("arn:aws:dynamodb:r:1:table/t/stream/{label}")
    }

    fn shard(epoch: u64, label: &str) -> ShardRow {
        let (id, start) = (ShardId("s".to_owned()), Position::TrimHorizon);
        ShardRow::new(epoch, "t", &arn(label), &id, None, &start, 0)
    }

    fn stream(epoch: u64, label: &str) -> StreamRow {
        StreamRow {
            lease_key: StreamRow::key(epoch, "t", &arn(label)),
            entity_type: "stream".to_owned(),
            format_version: FORMAT_VERSION,
            table: "t".to_owned(),
            stream_arn: arn(label),
            table_id: None,
            start_timestamp: None,
            initialised: true,
            finished: false,
        }
    }

    fn gap(reason: GapReason) -> GapRow {
        GapRow::new(2, "t", reason, "d", String::new())
    }

    fn may(gap: &GapRow, shards: &[ShardRow], streams: &[StreamRow], dead: bool) -> bool {
        let ground = Ground {
            epoch: 2,
            shards,
            streams,
        };
        ground.is_repairable(gap, |_| dead)
    }

    #[test]
    fn a_lost_position_is_repaired_once_what_was_read_before_is_durable() {
        let mut row = shard(2, "1");
        let gap = gap(GapReason::Trimmed).of_shard(row.lease_key.clone(), 1_000);
        let streams = [stream(2, "1")];
        let may =
            |row: &ShardRow, gap: &GapRow| may(gap, std::slice::from_ref(row), &streams, false);
        assert!(!may(&row, &gap), "it may still be in flight");
        row.restart(1_000);
        assert!(may(&row, &gap));
        let again = gap.found_again(&gap);
        assert!(!may(&row, &again), "lost once more since");
        assert_eq!(again.lease_counter, gap.lease_counter + 1);
        row.restart(again.found_at);
        assert!(may(&row, &again));
        row.restarted_at = None;
        row.checkpoint = SHARD_END.to_owned();
        assert!(may(&row, &again), "it ended");
        assert!(
            super::tests::may(&again, &[], &streams, false),
            "and is gone"
        );
    }

    #[test]
    fn a_stream_made_anew_waits_for_the_old_one_and_for_its_own_leases() {
        let gap = gap(GapReason::StreamRecreated);
        let (mut old, mut new) = (stream(2, "1"), stream(2, "2"));
        let may =
            |old: &StreamRow, new: &StreamRow| may(&gap, &[], &[old.clone(), new.clone()], false);
        assert!(!may(&old, &new), "older records are still to be applied");
        old.finished = true;
        assert!(may(&old, &new));
        new.initialised = false;
        assert!(!may(&old, &new), "its start is not stored yet");
    }

    #[test]
    fn another_source_waits_until_nobody_writes_what_the_one_before_held() {
        let gap = gap(GapReason::SourceSwitched);
        let streams = [stream(2, "2")];
        let mut old = shard(1, "1");
        assert!(may(&gap, &[old.clone()], &streams, false), "released");
        old.lease_owner = Some("w.1".to_owned());
        assert!(!may(&gap, &[old.clone()], &streams, false));
        assert!(may(&gap, &[old], &streams, true), "dead");
        assert!(
            !may(&gap, &[], &[stream(1, "1")], true),
            "nothing is read yet"
        );
    }

    #[test]
    fn a_moment_is_passed_once_every_open_shard_has_applied_it() {
        let streams = [stream(2, "1")];
        let mut row = shard(2, "1");
        let passed = |row: &ShardRow| {
            let ground = Ground {
                epoch: 2,
                shards: std::slice::from_ref(row),
                streams: &streams,
            };
            ground.has_passed("t", 1_000)
        };
        assert!(!passed(&row), "nothing is known of it");
        row.watermark = Some(999);
        assert!(!passed(&row));
        row.watermark = Some(1_000);
        assert!(passed(&row));
        row.watermark = None;
        row.checkpoint = SHARD_END.to_owned();
        assert!(passed(&row));
    }
}
