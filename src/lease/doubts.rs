//! The rules of doubt (tenet 7). Pure: what happened in, ranges and times out.
//!
//! No clock fences a request that has left: it may take effect after its sender gave up, after its
//! retry, and after newer writes. So what may still take effect is kept in mind, and put right
//! once it no longer can:
//!
//! ```text
//!   attempt without a complete answer ──▶ Pending ──stored before the checkpoint passes──▶ row
//!   lease taken that was not released ──────────────stored before anything is written────▶ row
//!
//!   row: due once `until` has passed ──claim: until moves on──▶ repaired by key ──▶ deleted
//! ```
//!
//! *Why a range that was not released is in doubt as a whole*: the owner before may have sent any
//! record after its checkpoint, and its own doubts about them were in its memory alone.
//!
//! *Why a claim moves `until`*: the repair's own writes may be late as well. If it dies in the
//! middle, the next one must not begin before those are dead.

use std::time::Duration;

use super::row::{DoubtCause, DoubtRow, ShardRow};
use super::rules::worker_of;
use crate::error::Class;
use crate::mutation::{self, Mutation};
use crate::stream::reader::Position;
use crate::stream::sequence::SequenceNumber;

/// How much later than the newest record that an owner can have read a range ends: stream times are
/// whole seconds, and clocks are known to two.
const NEWEST_MARGIN_MS: i64 = 3_000;

/// Whether a failed attempt whose request left may take effect later, or has. Only an answer that
/// the service refused the request says that it has not.
pub const fn effect_unknown(class: Class) -> bool {
    match class {
        Class::Service | Class::Network | Class::Unknown | Class::Undecodable => true,
        Class::Throttled
        | Class::Credentials
        | Class::Access
        | Class::Kms
        | Class::NotFound
        | Class::ExpiredIterator
        | Class::Trimmed
        | Class::Validation
        | Class::CollectionFull
        | Class::Condition => false,
    }
}

/// A range of a shard in doubt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Range {
    /// It begins after this position.
    pub from: Position,
    /// Its end.
    pub to: End,
    /// From when on it may be repaired, by the replica region's clock, in milliseconds.
    pub until_ms: i64,
    /// Why.
    pub cause: DoubtCause,
}

/// Where a range ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// With this record.
    Record(SequenceNumber),
    /// With the last record made at this time of the source, in milliseconds.
    Time(i64),
}

/// What of a shard is in doubt and not stored yet. The checkpoint must not pass it.
#[derive(Debug, Default)]
pub struct Pending {
    range: Option<(Position, SequenceNumber, i64)>,
}

impl Pending {
    /// The records after `durable` up to `last` may take effect until `until_ms`.
    pub fn add(&mut self, durable: &Position, last: &SequenceNumber, until_ms: i64) {
        if mutation::is_off(Mutation::Doubts) {
            return;
        }
        self.range = Some(match self.range.take() {
            // What is durable only grows, so the older beginning covers both.
            Some((from, to, until)) => (from, to.max(last.clone()), until.max(until_ms)),
            None => (durable.clone(), last.clone(), until_ms),
        });
    }

    /// What is to be stored, if anything is.
    pub fn range(&self) -> Option<Range> {
        self.range.as_ref().map(|(from, to, until_ms)| Range {
            from: from.clone(),
            to: End::Record(to.clone()),
            until_ms: *until_ms,
            cause: DoubtCause::Unanswered,
        })
    }

    /// `range` is stored. What was added since then stays.
    pub fn stored(&mut self, range: &Range) {
        if self.range().as_ref() == Some(range) {
            self.range = None;
        }
    }
}

/// Widens `row`, which an owner stored before, to what that owner has in doubt now, as its next
/// counter. False, and nothing changes, where the end of either is not a record.
///
/// Writes are answered in any order: what came back last may end before what is stored.
pub fn grow(row: &mut DoubtRow, range: &Range) -> bool {
    let stored = row.to.as_deref().and_then(SequenceNumber::parse);
    let (Some(stored), End::Record(to)) = (stored, &range.to) else {
        return false;
    };
    if *to > stored {
        row.to = Some(to.as_str().to_owned());
    }
    row.until = row.until.max(range.until_ms);
    row.due = row.due.max(range.until_ms);
    row.lease_counter += 1;
    true
}

/// What is in doubt when a lease is taken whose row was `before`. `source_ms` and `target_ms` are
/// the clocks of both regions.
pub fn on_take(
    before: &ShardRow,
    source_ms: i64,
    target_ms: i64,
    late_effect: Duration,
) -> Option<Range> {
    if before.lease_owner.is_none() || mutation::is_off(Mutation::Doubts) {
        return None;
    }
    Some(Range {
        // A checkpoint that cannot be read is never taken.
        from: before.position()?,
        to: End::Time(source_ms + NEWEST_MARGIN_MS),
        until_ms: until_ms(target_ms, late_effect),
        cause: DoubtCause::NotReleased,
    })
}

/// Until when a write that was given up at `now_ms` may take effect.
pub fn until_ms(now_ms: i64, late_effect: Duration) -> i64 {
    now_ms.saturating_add(i64::try_from(late_effect.as_millis()).unwrap_or(i64::MAX))
}

/// Whether `worker` may repair `doubt` now. The owner of its shard goes first, or, once that is
/// finished, the owner of a child; after `patience` anybody does: a doubt must not wait for an
/// owner who never comes. That is a matter of order alone: the claim on the row is what keeps
/// two repairs apart.
pub fn may_claim(
    doubt: &DoubtRow,
    shards: &[ShardRow],
    worker: &str,
    now_ms: i64,
    patience: Duration,
) -> bool {
    if now_ms < doubt.until {
        return false;
    }
    now_ms >= until_ms(doubt.until, patience) || is_heir(doubt, shards, worker)
}

fn is_heir(doubt: &DoubtRow, shards: &[ShardRow], worker: &str) -> bool {
    let of_stream = |row: &&ShardRow| {
        row.epoch == doubt.epoch && row.table == doubt.table && row.stream_arn == doubt.stream_arn
    };
    let rows: Vec<&ShardRow> = shards.iter().filter(of_stream).collect();
    let mut generation = vec![doubt.shard_id.as_str()];
    // No lineage is deeper than it has rows.
    for _ in 0..=rows.len() {
        let open =
            |row: &&&ShardRow| !row.is_finished() && generation.contains(&row.shard_id.as_str());
        let owners: Vec<&str> = rows
            .iter()
            .filter(open)
            .filter_map(|row| row.lease_owner.as_deref())
            .collect();
        if !owners.is_empty() {
            return owners.into_iter().any(|owner| worker_of(owner) == worker);
        }
        let children: Vec<&str> = rows
            .iter()
            .filter(|row| {
                let parents = &row.parent_shard_id;
                parents
                    .iter()
                    .any(|parent| generation.contains(&parent.as_str()))
            })
            .map(|row| row.shard_id.as_str())
            .collect();
        if children.is_empty() {
            return false;
        }
        generation = children;
    }
    false
}

#[cfg(test)]
#[path = "doubts_tests.rs"]
mod tests;
