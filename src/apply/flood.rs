//! When refusals are so many that records are not to blame. Pure: what happened and when go in.
//!
//! A single record that the replica can never take is poison. Thousands in a minute, or most of
//! what is written, are a replica whose schema is no longer the source's: a new index with another
//! key type, say. Dead-lettering them all would empty the stream into the queue, and bring each
//! letter home by hand.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// What counts as "in a minute".
const WINDOW: Duration = Duration::from_secs(60);
/// Fewer records than these say nothing by their share.
const SHARE_FROM: u64 = 100;

/// What was applied and refused in the last minute, of one table in this process.
#[derive(Debug)]
pub struct Flood {
    /// More refusals in a minute are a flood; 0 turns all of this off.
    halt_after: u64,
    /// Records by the second in which they ended, oldest first.
    seconds: VecDeque<Second>,
    applied: u64,
    refused: u64,
}

#[derive(Debug)]
struct Second {
    begun: Instant,
    applied: u64,
    refused: u64,
}

/// A flood: no record of the table is to be dead-lettered now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flooding {
    /// Records refused within the last minute.
    pub refused: u64,
    /// Records applied within the last minute.
    pub applied: u64,
}

impl Flood {
    /// Nothing has happened yet. More than `halt_after` refusals in a minute are a flood; 0 means
    /// that nothing is.
    pub fn new(halt_after: u32) -> Self {
        Self {
            halt_after: u64::from(halt_after),
            seconds: VecDeque::new(),
            applied: 0,
            refused: 0,
        }
    }

    /// `records` were applied.
    pub fn applied(&mut self, now: Instant, records: u64) {
        self.second(now).applied += records;
        self.applied += records;
    }

    /// A record was refused for good. It may be dead-lettered unless this says that it is one of a
    /// flood; then it does not count.
    pub fn refused(&mut self, now: Instant) -> Result<(), Flooding> {
        self.forget(now);
        let refused = self.refused + 1;
        let all = self.applied + refused;
        let too_many = refused > self.halt_after;
        let most = all >= SHARE_FROM && refused * 2 > all;
        if self.halt_after > 0 && (too_many || most) {
            return Err(Flooding {
                refused,
                applied: self.applied,
            });
        }
        self.second(now).refused += 1;
        self.refused = refused;
        Ok(())
    }

    /// A person has looked: the counting begins anew.
    pub fn reset(&mut self) {
        *self = Self {
            halt_after: self.halt_after,
            seconds: VecDeque::new(),
            applied: 0,
            refused: 0,
        };
    }

    fn second(&mut self, now: Instant) -> &mut Second {
        self.forget(now);
        let fresh = |second: &Second| now.saturating_duration_since(second.begun).as_secs() == 0;
        if !self.seconds.back().is_some_and(fresh) {
            self.seconds.push_back(Second {
                begun: now,
                applied: 0,
                refused: 0,
            });
        }
        let last = self.seconds.len() - 1;
        &mut self.seconds[last]
    }

    fn forget(&mut self, now: Instant) {
        while let Some(oldest) = self
            .seconds
            .pop_front_if(|second| now.saturating_duration_since(second.begun) >= WINDOW)
        {
            self.applied -= oldest.applied;
            self.refused -= oldest.refused;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `(seconds from the beginning, records applied, refusals)` in turn; how many refusals
    /// were let through, and whether the last one was.
    fn play(halt_after: u32, steps: &[(u64, u64, u64)]) -> (u64, bool) {
        let begun = Instant::now();
        let mut flood = Flood::new(halt_after);
        let (mut through, mut last) = (0, true);
        for (second, applied, refused) in steps {
            let now = begun + Duration::from_secs(*second);
            flood.applied(now, *applied);
            for _ in 0..*refused {
                last = flood.refused(now).is_ok();
                through += u64::from(last);
            }
        }
        (through, last)
    }

    #[test]
    fn more_refusals_in_a_minute_than_allowed_are_a_flood() {
        assert_eq!(play(10, &[(0, 100_000, 10)]), (10, true));
        assert_eq!(play(10, &[(0, 100_000, 11)]), (10, false));
        assert_eq!(play(10, &[(0, 100_000, 10), (59, 0, 1)]), (10, false));
        assert_eq!(play(10, &[(0, 100_000, 10), (60, 0, 10)]), (20, true));
    }

    #[test]
    fn most_of_at_least_a_hundred_records_are_a_flood() {
        // 49 applied: the 50th refusal makes 99 records, the 51st would be most of 100.
        assert_eq!(play(1_000, &[(0, 49, 60)]), (50, false));
        assert_eq!(play(1_000, &[(0, 60, 60)]), (60, true));
        assert_eq!(play(1_000, &[(0, 60, 61)]), (60, false));
        // Nothing was applied, and few records came: they are poison, one by one.
        assert_eq!(play(1_000, &[(0, 0, 99)]), (99, true));
        assert_eq!(play(1_000, &[(0, 0, 100)]), (99, false));
        // What was applied long ago says nothing about now.
        assert_eq!(play(1_000, &[(0, 5_000, 0), (61, 0, 100)]), (99, false));
    }

    #[test]
    fn zero_turns_it_off_and_a_person_starts_it_anew() {
        assert_eq!(play(0, &[(0, 0, 50_000)]), (50_000, true));
        let now = Instant::now();
        let mut flood = Flood::new(1);
        assert_eq!(flood.refused(now), Ok(()));
        let flooding = Flooding {
            refused: 2,
            applied: 0,
        };
        assert_eq!(flood.refused(now), Err(flooding));
        assert_eq!(flood.refused(now), Err(flooding));
        flood.reset();
        assert_eq!(flood.refused(now), Ok(()));
    }
}
