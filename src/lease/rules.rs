//! The rules of ownership. Pure: rows and instants in, decisions out.
//!
//! ```text
//!              take (counter + 1, owner = me)            counter moved by another
//!   unowned ────────────────────────────────▶ held ────────────────────────────────▶ lost
//!      ▲                                       │ │
//!      └──────── release (owner cleared) ──────┘ └─ not renewed in time: expired by its own clock,
//!                                                   nothing is sent any more; renewed late: held
//! ```

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::row::{Counted, ShardRow};
use crate::mutation::{self, Mutation};

/// When each row's counter was last seen to move, by the observer's own monotonic clock. Clocks
/// of other machines are never compared.
#[derive(Debug, Default)]
pub struct Observer {
    seen: HashMap<String, Seen>,
}

#[derive(Debug, Clone, Copy)]
struct Seen {
    counter: u64,
    since: Instant,
    /// Whether it was seen to move, and not only to be there.
    moved: bool,
}

impl Observer {
    /// Takes note of a complete set of rows as read at `now`, and forgets rows no longer there.
    pub fn observe<'a, R: Counted + 'a>(
        &mut self,
        rows: impl Iterator<Item = &'a R>,
        now: Instant,
    ) {
        let mut next = HashMap::with_capacity(self.seen.len());
        for row in rows {
            let known = self.seen.get(row.key());
            let seen = match known {
                Some(seen) if seen.counter == row.counter() => *seen,
                _ => Seen {
                    counter: row.counter(),
                    since: now,
                    moved: known.is_some(),
                },
            };
            next.insert(row.key().to_owned(), seen);
        }
        self.seen = next;
    }

    /// Since when the counter of `row` has stood still; `None` if it was not observed as it is.
    pub fn still_since(&self, row: &impl Counted) -> Option<Instant> {
        let seen = self.seen.get(row.key());
        seen.filter(|seen| seen.counter == row.counter())
            .map(|seen| seen.since)
    }

    /// Whether the counter of `row` was seen to move: somebody wrote it since this observer began.
    pub fn has_moved(&self, row: &impl Counted) -> bool {
        self.seen.get(row.key()).is_some_and(|seen| seen.moved)
    }

    /// Whether `row` may be taken: nobody owns it, or its counter has stood still for `duration`; never once
    /// its epoch has ended.
    pub fn is_takeable(&self, row: &ShardRow, duration: Duration, now: Instant) -> bool {
        row.fenced.is_none() && (row.lease_owner.is_none() || self.is_still(row, duration, now))
    }

    /// Whether nobody has written under `row` for `duration`: it was given back, or its counter has stood
    /// still for so long.
    pub fn is_dead(&self, row: &ShardRow, duration: Duration, now: Instant) -> bool {
        row.holder().is_none() || self.is_still(row, duration, now)
    }

    fn is_still(&self, row: &ShardRow, duration: Duration, now: Instant) -> bool {
        self.still_since(row)
            .is_some_and(|since| now.saturating_duration_since(since) >= duration)
    }
}

/// How a take names its owner: the process start, and a nonce for each take. Even this process is
/// somebody else the next time, so that two of its tasks can never believe in one lease.
pub fn take_name(worker: &str, nonce: u32) -> String {
    if mutation::is_off(Mutation::Nonce) {
        return "worker".to_owned();
    }
    format!("{worker}.{nonce:08x}")
}

/// The process start that a lease's owner names.
pub fn worker_of(owner: &str) -> &str {
    owner.rsplit_once('.').map_or(owner, |(worker, _)| worker)
}

/// What a refused update of a held lease means, given the row as it is now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// An earlier update of ours took effect although its answer was lost: still ours, from this
    /// counter on.
    StillOurs {
        /// The row's counter.
        counter: u64,
    },
    /// An earlier release of ours took effect although its answer was lost.
    Released,
    /// Somebody else has it, or it is gone.
    Lost,
}

/// Tells a lost lease from one whose last answer was lost. `owner` carries the nonce of this
/// process start, so an earlier run of the same worker is somebody else. All our attempts from
/// one counter write the next one, so more than one step ahead is not ours.
///
/// `releasing` says that the update refused was a release, so nothing was in flight: then a row that
/// is not in our name any more is released, whether by us (and perhaps taken by another since, who
/// need not wait) or not.
pub fn after_refusal(
    row: Option<&ShardRow>,
    owner: &str,
    known_counter: u64,
    releasing: bool,
) -> Refused {
    match row {
        Some(row) if releasing && row.lease_owner.as_deref() != Some(owner) => Refused::Released,
        Some(row)
            if row.lease_owner.as_deref() == Some(owner)
                && row.lease_counter == known_counter + 1 =>
        {
            Refused::StillOurs {
                counter: row.lease_counter,
            }
        }
        _ => Refused::Lost,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stream::ShardId;
    use crate::stream::reader::Position;

    fn row(owner: Option<&str>, counter: u64) -> ShardRow {
        let shard = ShardId("s".into());
        let mut row = ShardRow::new(
            1,
            "t",
            "arn/stream/l",
            &shard,
            None,
            &Position::TrimHorizon,
            0,
        );
        row.lease_owner = owner.map(str::to_owned);
        row.lease_counter = counter;
        row
    }

    #[test]
    fn a_lease_expires_by_the_observers_own_clock() {
        let start = Instant::now();
        let second = Duration::from_secs(1);
        let mut observer = Observer::default();
        let held = row(Some("a"), 7);
        assert!(
            !observer.is_takeable(&held, second, start),
            "never observed"
        );
        observer.observe([&held].into_iter(), start);
        assert!(!observer.is_takeable(&held, second, start + second / 2));
        assert!(observer.is_takeable(&held, second, start + second));
        observer.observe([&row(Some("a"), 8)].into_iter(), start + second);
        assert!(
            !observer.is_takeable(&held, second, start + 2 * second),
            "moved meanwhile"
        );
        assert!(
            observer.is_takeable(&row(None, 8), second, start),
            "released"
        );
    }

    #[test]
    fn a_finished_row_stays_finished() {
        let sequence = crate::stream::sequence::SequenceNumber::parse("7").unwrap();
        let mut row = row(Some("a"), 1);
        row.checkpoint_at(&sequence);
        assert_eq!(row.checkpoint, "7");
        row.checkpoint = crate::lease::row::SHARD_END.to_owned();
        row.checkpoint_at(&sequence);
        assert!(row.is_finished());
    }

    #[test]
    fn lost_and_regained_are_told_apart() {
        let ours = row(Some("me#1"), 5);
        assert_eq!(
            after_refusal(Some(&ours), "me#1", 4, false),
            Refused::StillOurs { counter: 5 }
        );
        assert_eq!(
            after_refusal(Some(&ours), "me#2", 4, false),
            Refused::Lost,
            "an earlier run"
        );
        assert_eq!(
            after_refusal(Some(&ours), "me#1", 3, false),
            Refused::Lost,
            "lost and regained"
        );
        let released = row(None, 5);
        assert_eq!(
            after_refusal(Some(&released), "me#1", 4, true),
            Refused::Released
        );
        assert_eq!(
            after_refusal(Some(&released), "me#1", 4, false),
            Refused::Lost
        );
        let taken_since = row(Some("you"), 6);
        assert_eq!(
            after_refusal(Some(&taken_since), "me#1", 4, true),
            Refused::Released
        );
        assert_eq!(
            after_refusal(Some(&taken_since), "me#1", 4, false),
            Refused::Lost
        );
        assert_eq!(after_refusal(None, "me#1", 4, false), Refused::Lost);
    }
}
