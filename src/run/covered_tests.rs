use std::collections::HashMap;

use proptest::prelude::*;

use super::*;

fn key(id: usize) -> ItemKey {
    ItemKey::from_bytes(&id.to_be_bytes())
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn sequence(index: usize) -> SequenceNumber {
    SequenceNumber::parse(&format!("{:021}", index + 1)).unwrap()
}

fn shard() -> DoubtedShard {
    DoubtedShard {
        stream_arn: "arn".to_owned(),
        shard_id: "shard".to_owned(),
        start_timestamp: None,
    }
}

#[test]
fn a_repair_covers_the_ranges_that_were_dead_when_it_began() {
    let mut covered = Covered::default();
    assert!(covered.since(&key(1), ms(0)).is_none());
    covered.note(&key(1), ms(1_000));
    assert_eq!(covered.since(&key(1), ms(1_000)), Some(ms(1_000)));
    assert!(covered.since(&key(1), ms(999)).is_some());
    assert!(covered.since(&key(1), ms(1_001)).is_none());
    assert!(covered.since(&key(2), ms(1_000)).is_none());
    // One that began earlier and took longer takes nothing back.
    covered.note(&key(1), ms(500));
    assert!(covered.since(&key(1), ms(1_000)).is_some());
    for id in 2..KEYS_MAX + 2 {
        covered.note(&key(id), ms(2_000));
    }
    assert!(covered.keys.len() <= KEYS_MAX);
    assert!(covered.since(&key(KEYS_MAX + 1), ms(2_000)).is_some());
}

#[test]
fn a_row_that_was_given_back_counts_as_dead_only_once_it_is_seen_so() {
    let mut seen = SeenDue::default();
    seen.see([("a", 1), ("b", 1)].into_iter(), ms(10));
    seen.see([("a", 1), ("b", 2)].into_iter(), ms(20));
    assert_eq!(seen.since("a", 1), Some(ms(10)));
    assert_eq!(seen.since("b", 2), Some(ms(20)));
    assert_eq!((seen.since("b", 1), seen.since("c", 1)), (None, None));
}

#[test]
fn what_the_stream_forgot_before_a_range_was_read_is_not_skipped() {
    let mut covered = Covered::default();
    // The oldest record that the stream still held was the fifth.
    let mut reading = Reading::new(shard(), Position::TrimHorizon, ms(0));
    for index in 5..10 {
        reading.take(&covered, Some(sequence(index)), Some(&key(index)));
    }
    reading.rely_on(ms(1));
    reading.done(&mut covered);
    let mut later = Reading::new(shard(), Position::TrimHorizon, ms(0));
    assert_eq!(
        later.skip(&covered, &Position::TrimHorizon),
        Some(sequence(9))
    );
    let after = |index| Position::After(sequence(index));
    assert_eq!(later.skip(&covered, &after(5)), Some(sequence(9)));
    // The reader is told that this one is gone; the gap must not be skipped.
    assert_eq!(later.skip(&covered, &after(3)), None);
    // With a start time other records are ours.
    let started = DoubtedShard {
        start_timestamp: Some(7),
        ..shard()
    };
    let mut other = Reading::new(started, after(5), ms(0));
    assert_eq!(other.skip(&covered, &after(5)), None);
}

/// A range in doubt: it begins after a record or at the horizon, has an end or a time for one, and
/// counts as dead since then.
#[derive(Debug, Clone)]
struct Doubt {
    from: Option<usize>,
    to: usize,
    by_time: bool,
    dead_since: u64,
    /// Its repair is given up after so many turns.
    given_up: Option<usize>,
}

fn doubts(records: usize) -> impl Strategy<Value = Vec<Doubt>> {
    let doubt = (
        prop::option::weighted(0.8, 0..records),
        0..records,
        any::<bool>(),
        0u64..60,
        prop::option::weighted(0.2, 0usize..3),
    );
    prop::collection::vec(
        doubt.prop_map(|(from, to, by_time, dead_since, given_up)| Doubt {
            from,
            to,
            by_time,
            dead_since,
            given_up,
        }),
        1..25,
    )
}

/// What a shard holds, and what was really repaired, without any memory that forgets.
struct World {
    keys: Vec<usize>,
    repaired: HashMap<usize, u64>,
    covered: Covered,
    now: u64,
    read: usize,
}

impl World {
    /// Repairs one range as the program does, in turns of `turn` keys. Returns whether it came to
    /// its end.
    fn repair(&mut self, doubt: &Doubt, page: usize, turn: usize) -> bool {
        self.now = self.now.max(doubt.dead_since);
        let mut at = doubt.from.map_or(0, |from| from + 1);
        let mut position = doubt.from.map_or(Position::TrimHorizon, |from| {
            Position::After(sequence(from))
        });
        let mut reading = Reading::new(shard(), position.clone(), ms(doubt.dead_since));
        let mut waiting = Vec::new();
        let mut turns = 0;
        loop {
            if let Some(read) = reading.skip(&self.covered, &position) {
                let read: usize = read.as_str().parse().unwrap();
                at = read;
                position = Position::After(sequence(read - 1));
                if !doubt.by_time && doubt.to < read {
                    self.settle(&mut waiting, &mut reading);
                    return true;
                }
                continue;
            }
            let mut over = false;
            let begin = at;
            for index in begin..self.keys.len().min(begin + page) {
                if index > doubt.to {
                    over = true;
                    break;
                }
                self.read += 1;
                let key_of = key(self.keys[index]);
                if reading.take(&self.covered, Some(sequence(index)), Some(&key_of)) {
                    waiting.push(self.keys[index]);
                }
                at = index + 1;
                position = Position::After(sequence(index));
            }
            let over = over || at >= self.keys.len() || (!doubt.by_time && at > doubt.to);
            if over || waiting.len() >= turn {
                if doubt.given_up == Some(turns) {
                    return false;
                }
                turns += 1;
                self.settle(&mut waiting, &mut reading);
            }
            if over {
                return true;
            }
        }
    }

    fn settle(&mut self, waiting: &mut Vec<usize>, reading: &mut Reading) {
        for id in waiting.drain(..) {
            self.now += 1;
            self.repaired.insert(id, self.now);
            self.covered.note(&key(id), ms(self.now));
            reading.rely_on(ms(self.now));
        }
        reading.done(&mut self.covered);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

    /// Whatever is skipped: when a range is called clean, each of its keys has been repaired by a
    /// repair that began when the range was dead.
    #[test]
    fn a_range_is_clean_only_when_each_key_was_repaired_after_its_death(
        keys in prop::collection::vec(0usize..12, 40),
        doubts in doubts(40),
        page in 1usize..12,
        turn in 1usize..6,
    ) {
        let mut world = World {
            keys,
            repaired: HashMap::new(),
            covered: Covered::default(),
            now: 0,
            read: 0,
        };
        for doubt in &doubts {
            if !world.repair(doubt, page, turn) {
                continue;
            }
            let first = doubt.from.map_or(0, |from| from + 1);
            for index in first..=doubt.to {
                let id = world.keys[index];
                let begun = world.repaired.get(&id).copied();
                prop_assert!(
                    begun.is_some_and(|begun| begun >= doubt.dead_since),
                    "record {index} of {doubt:?}: its key was repaired at {begun:?}"
                );
            }
        }
    }
}

#[test]
fn ranges_that_are_almost_the_same_are_read_once() {
    let mut world = World {
        keys: (0..1_000).collect(),
        repaired: HashMap::new(),
        covered: Covered::default(),
        now: 0,
        read: 0,
    };
    // Fifty workers died one after the other, all before the first range was repaired.
    for death in 0..50 {
        let doubt = Doubt {
            from: (death > 0).then(|| death * 3),
            to: 800 + death * 4,
            by_time: death % 2 == 0,
            dead_since: 1,
            given_up: None,
        };
        assert!(world.repair(&doubt, 100, 200));
    }
    assert!(world.read < 1_200, "{} records read", world.read);
}
