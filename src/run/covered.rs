//! What repairs of doubts need not do again. Pure.
//!
//! Where a worker dies again and again with much still to be applied, each of its successors leaves
//! almost the same range in doubt. Repaired one by one each key would be read, and each that the
//! replica refuses be dead-lettered, once for every death. But a repair of a key that begins when no
//! write of a range can take effect any more says all there is to say of that key for that range,
//! whichever range it was made for. `repair_tests.rs` plays this, too. What holds for each key of a
//! stretch of a shard's records holds for the stretch, which then need not even be read again.
//!
//! "Begins when" is told by this machine's uptime alone: a range counts as dead from when this
//! process first saw its row due, in that very form. A row may have been given back a moment ago, by
//! somebody whose clock differs, with an older value in the replica that only this row will mend.

use std::collections::HashMap;
use std::time::Duration;

use crate::dynamo::digest::Digest;
use crate::dynamo::item::ItemKey;
use crate::stream::reader::Position;
use crate::stream::sequence::SequenceNumber;

/// Keys remembered; with more, those are forgotten and repaired once more. Some megabytes.
const KEYS_MAX: usize = 100_000;
/// Stretches remembered for each shard; the oldest are forgotten and read once more.
const STRETCHES_MAX: usize = 64;
/// Shards whose stretches are remembered; with more, all are forgotten.
const SHARDS_MAX: usize = 10_000;

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

/// A shard as doubts know it: which of its records are to be replayed is part of it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct DoubtedShard {
    pub stream_arn: String,
    pub shard_id: String,
    /// Records made before this time are none of ours, in milliseconds since the epoch.
    pub start_timestamp: Option<i64>,
}

/// Records of a shard, read one after the other, whose keys have all been repaired since.
#[derive(Debug, Clone)]
struct Stretch {
    from: Position,
    /// The first record, where `from` does not tell which one that is.
    first: Option<SequenceNumber>,
    /// The last record, which is in it.
    through: SequenceNumber,
    /// When the earliest of the repairs began.
    begun: Duration,
}

impl Stretch {
    /// Whether what is read at `position` is in it.
    fn holds(&self, position: &Position) -> bool {
        self.begins_by(position)
            && match position {
                Position::After(sequence) => *sequence < self.through,
                Position::TrimHorizon | Position::AtTimestamp(_) => true,
            }
    }

    fn begins_by(&self, position: &Position) -> bool {
        match (&self.from, position) {
            (Position::After(from), Position::After(sequence)) => from <= sequence,
            // What lay before the first record may have been forgotten by then: the stream tells.
            (_, Position::After(sequence)) => {
                self.first.as_ref().is_some_and(|first| first <= sequence)
            }
            (from, named) => from == named,
        }
    }
}

/// What this process has repaired of one table: keys, each with when its last repair began, as this
/// machine's uptime, and stretches of records.
#[derive(Debug, Default)]
pub struct Covered {
    keys: HashMap<Digest, Duration>,
    stretches: HashMap<DoubtedShard, Vec<Stretch>>,
}

impl Covered {
    /// The repair of `key` that began at `begun` came to its end: it is as in the source, or its letter
    /// is delivered.
    pub fn note(&mut self, key: &ItemKey, begun: Duration) {
        let key = Digest::of_key(key);
        if self.keys.len() >= KEYS_MAX && !self.keys.contains_key(&key) {
            self.keys.clear();
        }
        let last = self.keys.entry(key).or_insert(begun);
        *last = begun.max(*last);
    }

    /// When the repair began for which `key` needs none for a range that is known to be dead since
    /// `dead_since`.
    fn since(&self, key: &ItemKey, dead_since: Duration) -> Option<Duration> {
        let begun = self.keys.get(&Digest::of_key(key)).copied();
        begun.filter(|begun| *begun >= dead_since)
    }

    fn note_stretch(&mut self, shard: &DoubtedShard, stretch: Stretch) {
        if self.stretches.len() >= SHARDS_MAX && !self.stretches.contains_key(shard) {
            self.stretches.clear();
        }
        let known = self.stretches.entry(shard.clone()).or_default();
        known.retain(|old| {
            !(stretch.begins_by(&old.from)
                && old.through <= stretch.through
                && old.begun <= stretch.begun)
        });
        if known.len() >= STRETCHES_MAX {
            known.remove(0);
        }
        known.push(stretch);
    }

    /// The stretch that leads farthest from `position`, of those good for a range dead since
    /// `dead_since`.
    fn stretch(
        &self,
        shard: &DoubtedShard,
        position: &Position,
        dead_since: Duration,
    ) -> Option<&Stretch> {
        let known = self.stretches.get(shard)?.iter();
        known
            .filter(|stretch| stretch.begun >= dead_since && stretch.holds(position))
            .max_by_key(|stretch| &stretch.through)
    }
}

/// The way of one repair through the records of its range.
#[derive(Debug)]
pub struct Reading {
    shard: DoubtedShard,
    dead_since: Duration,
    /// Up to here everything is repaired and noted.
    from: Position,
    /// The first record taken in since, and the last.
    first: Option<SequenceNumber>,
    through: Option<SequenceNumber>,
    /// The earliest beginning of a repair that its keys rely on.
    begun: Option<Duration>,
}

impl Reading {
    /// The reading of a range from `from` on, all of whose writes are known to be dead since
    /// `dead_since`, as this machine's uptime.
    pub fn new(shard: DoubtedShard, from: Position, dead_since: Duration) -> Self {
        Self {
            shard,
            dead_since,
            from,
            first: None,
            through: None,
            begun: None,
        }
    }

    /// The record after which to read on instead of at `position`: those between need neither be
    /// read nor repaired.
    pub fn skip(&mut self, covered: &Covered, position: &Position) -> Option<SequenceNumber> {
        let stretch = covered.stretch(&self.shard, position, self.dead_since)?;
        self.rely_on(stretch.begun);
        self.first = self.first.take().or_else(|| stretch.first.clone());
        self.through = Some(stretch.through.clone());
        Some(stretch.through.clone())
    }

    /// Takes in the next record. Returns whether its key has to be repaired.
    pub fn take(
        &mut self,
        covered: &Covered,
        sequence: Option<SequenceNumber>,
        key: Option<&ItemKey>,
    ) -> bool {
        if sequence.is_some() {
            self.first = self.first.take().or_else(|| sequence.clone());
            self.through = sequence;
        }
        let Some(key) = key else { return false };
        match covered.since(key, self.dead_since) {
            Some(begun) => {
                self.rely_on(begun);
                false
            }
            None => true,
        }
    }

    /// Its range relies on a repair that began at `begun`.
    pub fn rely_on(&mut self, begun: Duration) {
        self.begun = Some(self.begun.map_or(begun, |known| known.min(begun)));
    }

    /// Every key taken in so far is repaired, or dead-lettered.
    pub fn done(&mut self, covered: &mut Covered) {
        let (first, begun) = (self.first.take(), self.begun.take());
        let Some(through) = self.through.take() else {
            return;
        };
        let from = std::mem::replace(&mut self.from, Position::After(through.clone()));
        // Records of which none was ours rely on nothing: later ranges hold nothing of them either.
        let begun = begun.unwrap_or(self.dead_since);
        let stretch = Stretch {
            from,
            first,
            through,
            begun,
        };
        covered.note_stretch(&self.shard, stretch);
    }
}

#[cfg(test)]
#[path = "covered_tests.rs"]
mod tests;
