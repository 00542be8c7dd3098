//! What repairs of doubts need not do again. Pure.
//!
//! Where a worker dies again and again with much still to be applied, each of its successors leaves
//! almost the same range in doubt. Repaired one by one each key would be read, and each that the
//! replica refuses be dead-lettered, once for every death. But a repair of a key that begins when no
//! write of a range can take effect any more says all there is to say of that key for that range,
//! whichever range it was made for. `repair_tests.rs` plays this, too.
//!
//! "Begins when" is told by this machine's uptime alone: a range counts as dead from when this
//! process first saw its row due, in that very form. A row may have been given back a moment ago, by
//! somebody whose clock differs, with an older value in the replica that only this row will mend.

use std::collections::HashMap;
use std::time::Duration;

use crate::dynamo::digest::Digest;
use crate::dynamo::item::ItemKey;

/// Keys remembered; with more, those are forgotten and repaired once more. Some megabytes.
const KEYS_MAX: usize = 100_000;

/// The rows that are due, each with when it was first seen so.
#[derive(Debug, Default)]
pub struct SeenDue(HashMap<(String, u64), Duration>);

impl SeenDue {
    /// These rows, given by their keys and counters, are due, as was seen at `now`, an uptime after
    /// they were read. Others are forgotten.
    pub fn see<'a>(&mut self, due: impl Iterator<Item = (&'a str, u64)>, now: Duration) {
        let rows = due.map(|(key, counter)| (key.to_owned(), counter));
        let at = |row: &(String, u64)| *self.0.get(row).unwrap_or(&now);
        self.0 = rows.map(|row| (row.clone(), at(&row))).collect();
    }

    /// Since when a row is known to be due.
    pub fn since(&self, key: &str, counter: u64) -> Option<Duration> {
        self.0.get(&(key.to_owned(), counter)).copied()
    }
}

/// The keys of one table that this process has repaired, each with when its last repair began, as
/// this machine's uptime.
#[derive(Debug, Default)]
pub struct Covered(HashMap<Digest, Duration>);

impl Covered {
    /// The repair of `key` that began at `begun` came to its end: it is as in the source, or its letter
    /// is delivered.
    pub fn note(&mut self, key: &ItemKey, begun: Duration) {
        let key = Digest::of_key(key);
        if self.0.len() >= KEYS_MAX && !self.0.contains_key(&key) {
            self.0.clear();
        }
        let last = self.0.entry(key).or_insert(begun);
        *last = begun.max(*last);
    }

    /// Whether `key` needs no repair for a range that is known to be dead since `dead_since`.
    pub fn has(&self, key: &ItemKey, dead_since: Duration) -> bool {
        let begun = self.0.get(&Digest::of_key(key));
        begun.is_some_and(|begun| *begun >= dead_since)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repair_covers_the_ranges_that_were_dead_when_it_began() {
        let key = |id: usize| ItemKey::from_bytes(&id.to_be_bytes());
        let ms = Duration::from_millis;
        let mut covered = Covered::default();
        assert!(!covered.has(&key(1), ms(0)));
        covered.note(&key(1), ms(1_000));
        assert!(covered.has(&key(1), ms(1_000)) && covered.has(&key(1), ms(999)));
        assert!(!covered.has(&key(1), ms(1_001)) && !covered.has(&key(2), ms(1_000)));
        // One that began earlier and took longer takes nothing back.
        covered.note(&key(1), ms(500));
        assert!(covered.has(&key(1), ms(1_000)));
        for id in 2..KEYS_MAX + 2 {
            covered.note(&key(id), ms(2_000));
        }
        assert!(covered.0.len() <= KEYS_MAX && covered.has(&key(KEYS_MAX + 1), ms(2_000)));
    }

    #[test]
    fn a_row_that_was_given_back_counts_as_dead_only_once_it_is_seen_so() {
        let ms = Duration::from_millis;
        let mut seen = SeenDue::default();
        seen.see([("a", 1), ("b", 1)].into_iter(), ms(10));
        seen.see([("a", 1), ("b", 2)].into_iter(), ms(20));
        assert_eq!(seen.since("a", 1), Some(ms(10)));
        assert_eq!(seen.since("b", 2), Some(ms(20)));
        assert_eq!((seen.since("b", 1), seen.since("c", 1)), (None, None));
    }
}
