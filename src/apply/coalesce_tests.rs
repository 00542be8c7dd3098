use super::*;
use crate::dynamo::value::Item;
use crate::stream::change::Event;
use proptest::prelude::*;
use std::collections::BTreeMap;

fn change(sequence: u64, key: u8) -> Change {
    Change {
        sequence: SequenceNumber::parse(&format!("{sequence:021}")).unwrap(),
        event: Event::Modify,
        key: ItemKey::from_bytes(&[key]),
        keys: Item::new(),
        new_image: None,
        old_image: None,
        created_ms: sequence as i64,
        bytes: 1,
        units: 1,
        ttl_delete: false,
    }
}

fn sequences(ops: &[Op]) -> Vec<i64> {
    ops.iter().map(|op| op.change.created_ms).collect()
}

/// How many changes the answer finished.
fn applied(window: &mut Window, op: &Op) -> usize {
    let mut finished = 0;
    window.applied(op, |_| finished += 1);
    finished
}

fn durable(window: &Window) -> i64 {
    window.durable().map_or(0, |durable| durable.created_ms)
}

#[test]
fn only_the_last_change_of_a_key_is_written() {
    let mut window = Window::new(true);
    for (sequence, key) in [(1, 1), (2, 2), (3, 1)] {
        window.push(change(sequence, key));
    }
    let ops = window.take(25, usize::MAX);
    assert_eq!(sequences(&ops), [3, 2]);
    assert_eq!(applied(&mut window, &ops[0]), 2);
    assert_eq!(durable(&window), 1, "2 is not durable yet");
    applied(&mut window, &ops[1]);
    assert_eq!(durable(&window), 3);
    assert!(window.is_empty() && window.bytes() == 0);
}

#[test]
fn with_coalescing_off_every_change_is_written_in_order() {
    let mut window = Window::new(false);
    for sequence in 1..=3 {
        window.push(change(sequence, 7));
    }
    for expected in 1..=3 {
        let ops = window.take(25, usize::MAX);
        assert_eq!(sequences(&ops), [expected]);
        applied(&mut window, &ops[0]);
    }
    assert!(window.take(25, usize::MAX).is_empty());
}

#[test]
fn a_newer_change_never_replaces_one_in_flight() {
    let mut window = Window::new(true);
    window.push(change(1, 1));
    let first = window.take(25, usize::MAX);
    window.push(change(2, 1));
    assert!(
        window.take(25, usize::MAX).is_empty(),
        "one write of a key at a time"
    );
    window.returned(&first[0]);
    let again = window.take(25, usize::MAX);
    assert_eq!(
        sequences(&again),
        [2],
        "returned, so the newer one replaces it"
    );
    assert_eq!(applied(&mut window, &again[0]), 2);
}

#[test]
fn poison_among_coalesced_changes_lets_the_last_acceptable_one_through() {
    let mut window = Window::new(true);
    for sequence in 1..=3 {
        window.push(change(sequence, 1));
    }
    let newest = window.take(25, usize::MAX);
    assert_eq!(sequences(&newest), [3]);
    window.refused(&newest[0]);
    let before = window.take(25, usize::MAX);
    assert_eq!(sequences(&before), [2]);
    applied(&mut window, &before[0]);
    assert_eq!(durable(&window), 2, "the dead letter is not delivered yet");
    window.dead_lettered(newest[0].slot, Some(&newest[0].change.key));
    assert_eq!(durable(&window), 3);
    assert!(window.is_empty());
}

#[test]
fn the_watermark_waits_for_a_dead_letter() {
    let mut window = Window::new(true);
    let slot = window.push_poison(SequenceNumber::parse("1").unwrap(), 1);
    window.push_done(SequenceNumber::parse("2").unwrap(), 2);
    assert_eq!(durable(&window), 0);
    window.dead_lettered(slot, None);
    assert_eq!(durable(&window), 2);
}

/// One step of an interleaving of pages, batches and answers.
#[derive(Debug, Clone)]
enum Step {
    /// A page arrives with changes of these keys; the flag makes one poison.
    Page(Vec<(u8, bool)>),
    /// Up to so many changes are sent as one batch.
    Send(usize),
    /// One of the outstanding writes is answered, or its answer is lost; a lost one may have taken
    /// effect all the same.
    Answer {
        which: prop::sample::Index,
        answer: Answer,
    },
    /// One of the refused changes reaches the dead-letter queue.
    Deliver(prop::sample::Index),
}

/// What becomes of one write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    /// It is carried out (or refused, if it is poison), and the answer arrives.
    Arrives,
    /// It is not carried out, and no answer says so.
    NeverHappened,
    /// It is carried out, and no answer says so.
    Lost,
}

fn answer() -> impl Strategy<Value = Answer> {
    prop_oneof![
        6 => Just(Answer::Arrives),
        2 => Just(Answer::NeverHappened),
        2 => Just(Answer::Lost),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        2 => prop::collection::vec((0u8..6, prop::bool::weighted(0.15)), 0..8).prop_map(Step::Page),
        3 => (1usize..5).prop_map(Step::Send),
        5 => (any::<prop::sample::Index>(), answer())
            .prop_map(|(which, answer)| Step::Answer { which, answer }),
        1 => any::<prop::sample::Index>().prop_map(Step::Deliver),
    ]
}

/// The world around a window: what was sent, what the replica holds, what lies in the queue.
struct World {
    window: Window,
    stream: Vec<(u8, bool)>,
    outstanding: Vec<Op>,
    refused: Vec<Op>,
    /// What was applied to each key, in order, by index in the stream.
    applied: BTreeMap<u8, Vec<usize>>,
    dead: Vec<usize>,
}

fn index(op: &Op) -> usize {
    op.change.created_ms as usize - 1
}

impl World {
    fn page(&mut self, changes: &[(u8, bool)]) {
        for (key, poison) in changes {
            self.stream.push((*key, *poison));
            self.window.push(change(self.stream.len() as u64, *key));
        }
    }

    fn send(&mut self, ops_max: usize) -> Result<(), TestCaseError> {
        for op in self.window.take(ops_max, usize::MAX) {
            let key = self.stream[index(&op)].0;
            prop_assert!(
                self.outstanding
                    .iter()
                    .all(|other| self.stream[index(other)].0 != key),
                "two writes of one key are outstanding"
            );
            self.outstanding.push(op);
        }
        Ok(())
    }

    fn answer(&mut self, which: usize, answer: Answer) -> Result<(), TestCaseError> {
        let op = self.outstanding.remove(which);
        let (key, poison) = self.stream[index(&op)];
        if poison && answer == Answer::Arrives {
            self.window.refused(&op);
            self.refused.push(op);
            return Ok(());
        }
        if poison || answer == Answer::NeverHappened {
            self.window.returned(&op);
            return Ok(());
        }
        let history = self.applied.entry(key).or_default();
        prop_assert!(
            history.last().is_none_or(|last| *last <= index(&op)),
            "an older change was applied over a newer one"
        );
        // Written once more after a lost answer, it is the same value.
        if history.last() != Some(&index(&op)) {
            history.push(index(&op));
        }
        match answer {
            Answer::Lost => self.window.returned(&op),
            _ => self.window.applied(&op, |_| {}),
        }
        Ok(())
    }

    fn deliver(&mut self, which: usize) {
        let op = self.refused.remove(which);
        self.dead.push(index(&op));
        self.window.dead_lettered(op.slot, Some(&op.change.key));
    }

    /// Everything up to the watermark is in the replica (itself or a later change of its key) or
    /// in the queue.
    fn check_watermark(&self) -> Result<(), TestCaseError> {
        for at in 0..durable(&self.window) as usize {
            let (key, poison) = self.stream[at];
            let in_replica = self
                .applied
                .get(&key)
                .is_some_and(|history| history.iter().any(|applied| *applied >= at));
            // A coalesced change may never have been tried, poison or not.
            prop_assert!(
                in_replica || (poison && self.dead.contains(&at)),
                "the watermark passed a change that is not durable"
            );
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn order_per_key_is_kept_and_the_watermark_follows_the_data(
        steps in prop::collection::vec(step(), 1..80),
        coalesce in any::<bool>(),
    ) {
        let mut world = World {
            window: Window::new(coalesce),
            stream: Vec::new(),
            outstanding: Vec::new(),
            refused: Vec::new(),
            applied: BTreeMap::new(),
            dead: Vec::new(),
        };
        for step in steps {
            match step {
                Step::Page(changes) => world.page(&changes),
                Step::Send(ops_max) => world.send(ops_max)?,
                Step::Answer { which, answer } if !world.outstanding.is_empty() => {
                    world.answer(which.index(world.outstanding.len()), answer)?;
                }
                Step::Deliver(which) if !world.refused.is_empty() => {
                    world.deliver(which.index(world.refused.len()));
                }
                _ => {}
            }
            world.check_watermark()?;
        }
        // The network heals: everything is answered, and nothing is left over.
        for _ in 0..10_000 {
            if world.window.is_empty() {
                break;
            }
            world.send(25)?;
            while !world.outstanding.is_empty() {
                world.answer(0, Answer::Arrives)?;
            }
            while !world.refused.is_empty() {
                world.deliver(0);
            }
            world.check_watermark()?;
        }
        prop_assert!(world.window.is_empty(), "a change was never finished");
        prop_assert_eq!(world.window.bytes(), 0);
        // The replica holds the last acceptable change of every key.
        for key in 0u8..6 {
            let last_good = world
                .stream
                .iter()
                .rposition(|(at, poison)| *at == key && !poison);
            let held = world.applied.get(&key).and_then(|history| history.last().copied());
            prop_assert_eq!(held, last_good);
            // Without coalescing every acceptable change is written and all poison is in the queue.
            if !coalesce {
                let good = world.stream.iter().filter(|(at, poison)| *at == key && !poison).count();
                prop_assert_eq!(world.applied.get(&key).map_or(0, Vec::len), good);
            }
        }
        let poison = world.stream.iter().filter(|(_, poison)| *poison).count();
        if !coalesce {
            prop_assert_eq!(world.dead.len(), poison);
        }
    }
}
