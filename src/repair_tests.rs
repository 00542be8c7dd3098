//! The protocol against everything that goes on beside it: a source that is written to, a worker
//! that replays (with coalescing), both dying, and writes that take effect late, in every order.
//!
//! What a repair of one row found clean is not repaired again for rows that were due when it began, as
//! [`crate::run::covered`] has it; the model never forgets that, which the program may.
//!
//! Time is a queue: what stands in it ends in its order. A late write ends by dying; a doubt's row
//! ends its wait and may be repaired. So a row that was queued after a write is due after that
//! write's death, and no clock is needed.

use std::collections::HashSet;

use super::*;

const KEYS: usize = 2;
const WRITES: usize = 4;

/// What a table holds under a key.
type Value = Option<u8>;

/// What the protocol would be without one of its rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rules {
    Whole,
    /// An unanswered write puts nothing in doubt.
    NoDoubts,
    /// A lease that was not released puts nothing in doubt.
    NoDoubtOnTake,
    /// A claim does not move `until`.
    ClaimAtOnce,
    /// An unanswered write of the repair counts as written.
    TrustUnanswered,
    /// The source is not read again after a write.
    NoSecondLook,
    /// A source that holds something else than what was written counts as a change after the write.
    ChangeSeenOnce,
    /// A repaired key counts for ranges, too, whose writes were not dead when its repair began.
    CoversTooMuch,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Waiting {
    /// A write that may still take effect.
    Late { key: usize, value: Value },
    /// The worker's doubt, in its memory alone.
    Pending,
    /// A doubt's row, with the keys of its range, and whether it is being repaired.
    Doubt { keys: u8, claimed: bool },
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Repairing {
    keys: u8,
    key: usize,
    repair: KeyRepair<Value>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct World {
    source: [Value; KEYS],
    replica: [Value; KEYS],
    /// Source writes so far: the stream.
    written: usize,
    /// Records that are durable, as the worker knows.
    done: u8,
    checkpoint: usize,
    /// Keys in doubt in the worker's memory.
    pending: u8,
    queue: Vec<Waiting>,
    /// Keys of the rows that may be repaired.
    due: Vec<u8>,
    /// The same for rows that came due after the repair of a key had begun: it says nothing of them.
    due_since: Vec<u8>,
    repairing: Option<Repairing>,
    /// What may still go wrong.
    unanswered: u8,
    worker_crashes: u8,
    repair_crashes: u8,
}

/// How many writes get no answer, how often the worker dies, and how often a repair does.
type Trouble = [u8; 3];

type Script = [(usize, Value); WRITES];

struct Model {
    script: Script,
    rules: Rules,
    /// Whether a repair may begin by writing what the source held at some time before.
    copies: bool,
    seen: HashSet<World>,
    quiet: usize,
    wrong: Option<World>,
}

/// A worker replays: a change that is seen after a write is enough.
fn fresh() -> KeyRepair<Value> {
    KeyRepair::default().beside_flow(true)
}

impl World {
    fn new([unanswered, worker_crashes, repair_crashes]: Trouble) -> Self {
        Self {
            source: [None; KEYS],
            replica: [None; KEYS],
            written: 0,
            done: 0,
            checkpoint: 0,
            pending: 0,
            queue: Vec::new(),
            due: Vec::new(),
            due_since: Vec::new(),
            repairing: None,
            unanswered,
            worker_crashes,
            repair_crashes,
        }
    }

    fn watermark(&self) -> usize {
        self.done.trailing_ones() as usize
    }

    fn is_quiet(&self) -> bool {
        self.written == WRITES
            && self.watermark() == WRITES
            && self.pending == 0
            && self.queue.is_empty()
            && self.due.is_empty()
            && self.due_since.is_empty()
            && self.repairing.is_none()
    }

    /// The repair of a key begins: whatever is due now is done with that key once it is clean.
    fn key_begins(&mut self) {
        self.due.append(&mut self.due_since);
        self.due.sort_unstable();
    }

    /// A key was repaired: the ranges whose writes were dead before that need not repair it again.
    fn covered(&mut self, key: usize, rules: Rules) {
        for keys in &mut self.due {
            *keys &= !(1 << key);
        }
        self.due.retain(|keys| *keys != 0);
        self.due.sort_unstable();
        if rules == Rules::CoversTooMuch {
            for waiting in &mut self.queue {
                if let Waiting::Doubt {
                    keys,
                    claimed: false,
                } = waiting
                {
                    *keys &= !(1 << key);
                }
            }
        }
    }
}

impl Model {
    fn explore(script: Script, rules: Rules, trouble: Trouble) -> Self {
        Self::explore_with(script, rules, trouble, false)
    }

    fn explore_with(script: Script, rules: Rules, trouble: Trouble, copies: bool) -> Self {
        let mut model = Self {
            script,
            rules,
            copies,
            seen: HashSet::new(),
            quiet: 0,
            wrong: None,
        };
        let mut stack = vec![World::new(trouble)];
        while let Some(world) = stack.pop() {
            if model.wrong.is_some() || !model.seen.insert(world.clone()) {
                continue;
            }
            if world.is_quiet() {
                model.quiet += 1;
                if world.source != world.replica {
                    model.wrong = Some(world);
                    continue;
                }
            }
            model.next(&world, &mut stack);
        }
        model
    }

    fn keys_of(&self, records: std::ops::Range<usize>) -> u8 {
        self.script[records]
            .iter()
            .fold(0, |keys, (key, _)| keys | 1 << key)
    }

    fn next(&self, world: &World, out: &mut Vec<World>) {
        self.source_writes(world, out);
        self.worker_writes(world, out);
        self.worker_stores(world, out);
        self.worker_dies(world, out);
        self.time_passes(world, out);
        self.repair_goes_on(world, out);
    }

    fn source_writes(&self, world: &World, out: &mut Vec<World>) {
        if let Some((key, value)) = self.script.get(world.written) {
            let mut next = world.clone();
            next.source[*key] = *value;
            next.written += 1;
            out.push(next);
        }
    }

    fn worker_writes(&self, world: &World, out: &mut Vec<World>) {
        for record in (0..world.written).filter(|record| world.done & 1 << record == 0) {
            let (key, value) = self.script[record];
            let mut answered = world.clone();
            answered.replica[key] = value;
            for earlier in (0..=record).filter(|earlier| self.script[*earlier].0 == key) {
                answered.done |= 1 << earlier;
            }
            out.push(answered);
            if world.unanswered == 0 {
                continue;
            }
            for late in [false, true] {
                let mut next = world.clone();
                next.unanswered -= 1;
                if late {
                    next.queue.push(Waiting::Late { key, value });
                } else {
                    next.replica[key] = value;
                }
                if self.rules != Rules::NoDoubts {
                    next.pending |= self.keys_of(world.watermark()..record + 1);
                    next.queue.retain(|waiting| *waiting != Waiting::Pending);
                    next.queue.push(Waiting::Pending);
                }
                out.push(next);
            }
        }
    }

    /// The doubt's row first, the checkpoint after it.
    fn worker_stores(&self, world: &World, out: &mut Vec<World>) {
        if world.pending == 0 && world.checkpoint == world.watermark() {
            return;
        }
        let mut next = world.clone();
        next.checkpoint = world.watermark();
        let keys = std::mem::take(&mut next.pending);
        let mut at = next.queue.iter_mut();
        match at.find(|waiting| **waiting == Waiting::Pending) {
            Some(waiting) => {
                *waiting = Waiting::Doubt {
                    keys,
                    claimed: false,
                }
            }
            None if keys != 0 => next.due_since.push(keys),
            None => {}
        }
        out.push(next);
    }

    /// The worker dies, and its lease is taken without a release.
    fn worker_dies(&self, world: &World, out: &mut Vec<World>) {
        if world.worker_crashes == 0 {
            return;
        }
        let mut next = world.clone();
        next.worker_crashes -= 1;
        next.pending = 0;
        next.queue.retain(|waiting| *waiting != Waiting::Pending);
        next.done = (1 << world.checkpoint) - 1;
        let keys = self.keys_of(world.checkpoint..world.written);
        if keys != 0 && self.rules != Rules::NoDoubtOnTake {
            next.queue.push(Waiting::Doubt {
                keys,
                claimed: false,
            });
        }
        out.push(next);
    }

    fn time_passes(&self, world: &World, out: &mut Vec<World>) {
        for (at, waiting) in world.queue.iter().enumerate() {
            if let Waiting::Late { key, value } = waiting {
                let mut next = world.clone();
                next.queue.remove(at);
                next.replica[*key] = *value;
                out.push(next);
            }
        }
        let mut next = world.clone();
        if world.queue.is_empty() {
            return;
        }
        if let Waiting::Doubt { keys, claimed } = next.queue.remove(0) {
            next.due_since.push(keys);
            next.due_since.sort_unstable();
            // The claim was over long before.
            if claimed {
                next.repairing = None;
            }
        }
        out.push(next);
    }

    fn repair_goes_on(&self, world: &World, out: &mut Vec<World>) {
        let Some(repairing) = &world.repairing else {
            let mut next = world.clone();
            next.key_begins();
            if let Some(keys) = next.due.first() {
                let keys = *keys;
                next.due.remove(0);
                self.claim(&mut next, keys);
                next.repairing = Some(Repairing {
                    keys,
                    key: 0,
                    repair: fresh(),
                });
                out.push(next);
            }
            return;
        };
        if world.repair_crashes > 0 {
            let mut next = world.clone();
            next.repair_crashes -= 1;
            self.end_claim(&mut next);
            out.push(next);
        }
        // Asked to stop with all its writes answered: it gives the row back, due at once.
        let mut given_back = world.clone();
        given_back.repairing = None;
        self.drop_row(&mut given_back, repairing.keys);
        given_back.due_since.push(repairing.keys);
        given_back.due_since.sort_unstable();
        out.push(given_back);
        let mut next = world.clone();
        let Some(now) = &mut next.repairing else {
            return;
        };
        let key = now.key;
        if key == KEYS || now.keys & 1 << key == 0 || now.repair.step() == Step::Clean {
            let is_clean = key < KEYS && now.keys & 1 << key != 0;
            now.key += 1;
            now.repair = fresh();
            if is_clean {
                next.covered(key, self.rules);
            }
            next.key_begins();
            if key >= KEYS {
                next.repairing = None;
                self.drop_row(&mut next, repairing.keys);
            }
            out.push(next);
            return;
        }
        if self.copies && repairing.repair == fresh() {
            let read = self.script[..world.written].iter();
            let read = read.filter(|(of, value)| *of == key && value.is_some());
            for (_, value) in read {
                let mut copying = world.clone();
                if let Some(now) = &mut copying.repairing {
                    now.repair = KeyRepair::of_read(*value).beside_flow(true);
                }
                out.push(copying);
            }
        }
        match repairing.repair.step() {
            Step::ReadSource => {
                now.repair.source(world.source[key]);
                if self.rules == Rules::ChangeSeenOnce
                    && matches!(now.repair.state, State::Again { .. })
                {
                    now.repair.leave();
                }
            }
            Step::ReadReplica => now.repair.replica(&world.replica[key]),
            Step::Write(value) => {
                now.repair.written();
                if self.rules == Rules::NoSecondLook {
                    now.repair.leave();
                }
                next.replica[key] = value;
                self.unanswered_repairs(world, repairing, value, out);
            }
            Step::Clean => {}
        }
        out.push(next);
    }

    fn unanswered_repairs(
        &self,
        world: &World,
        repairing: &Repairing,
        value: Value,
        out: &mut Vec<World>,
    ) {
        if world.unanswered == 0 {
            return;
        }
        let key = repairing.key;
        for late in [false, true] {
            let mut next = world.clone();
            next.unanswered -= 1;
            if late {
                next.queue.push(Waiting::Late { key, value });
                // The write left within the claim, and the row is due a late effect after its end.
                self.drop_row(&mut next, repairing.keys);
                self.claim(&mut next, repairing.keys);
            } else {
                next.replica[key] = value;
            }
            if self.rules != Rules::TrustUnanswered {
                self.end_claim(&mut next);
            } else {
                let mut trusting = repairing.clone();
                trusting.repair.written();
                next.repairing = Some(trusting);
            }
            out.push(next);
        }
    }

    fn claim(&self, world: &mut World, keys: u8) {
        match self.rules {
            Rules::ClaimAtOnce => {
                world.due.push(keys);
                world.due.sort_unstable();
            }
            _ => world.queue.push(Waiting::Doubt {
                keys,
                claimed: true,
            }),
        }
    }

    /// The repair stops; its row stays and waits.
    fn end_claim(&self, world: &mut World) {
        world.repairing = None;
        for waiting in &mut world.queue {
            if let Waiting::Doubt { claimed, .. } = waiting {
                *claimed = false;
            }
        }
    }

    fn drop_row(&self, world: &mut World, keys: u8) {
        match self.rules {
            Rules::ClaimAtOnce => {
                if let Some(at) = world.due.iter().position(|due| *due == keys) {
                    world.due.remove(at);
                }
            }
            _ => {
                let row = Waiting::Doubt {
                    keys,
                    claimed: true,
                };
                if let Some(at) = world.queue.iter().position(|waiting| *waiting == row) {
                    world.queue.remove(at);
                }
            }
        }
    }
}

/// Scripts of four writes over two keys, up to renaming the keys: `deletes` says which writes delete.
fn scripts(deletes: &[u8]) -> Vec<Script> {
    let mut scripts = Vec::new();
    for keys in 0u8..8 {
        for deletes in deletes {
            scripts.push(std::array::from_fn(|write| {
                let key = usize::from(keys >> write & 1);
                let value = (deletes >> write & 1 == 0).then_some(write as u8 + 1);
                (key, value)
            }));
        }
    }
    scripts
}

#[test]
fn every_order_of_worker_repair_source_crash_and_late_effect_ends_equal() {
    // Which writes delete, with what may go wrong.
    let cases: &[(&[u8], Trouble)] = match std::env::var_os("FARSHORE_LONG") {
        Some(_) => &[
            (&[0b0000, 0b0010, 0b0100, 0b1000, 0b1010], [1, 1, 1]),
            (&[0b0000, 0b1010], [2, 1, 0]),
            (&[0b0000, 0b1010], [2, 0, 1]),
        ],
        None => &[(&[0b0100], [1, 1, 0]), (&[0b1010], [1, 0, 1])],
    };
    let mut states = 0;
    for (deletes, trouble) in cases {
        for script in scripts(deletes) {
            let model = Model::explore(script, Rules::Whole, *trouble);
            assert_eq!(model.wrong, None, "script {script:?}");
            assert!(model.quiet > 0, "nothing ever came to rest: {script:?}");
            states += model.seen.len();
        }
    }
    println!("{states} states");
}

/// What a scan read is written at once, however old it is by then: only what is read after the write
/// counts.
#[test]
fn a_copy_that_begins_with_an_old_read_ends_equal_in_every_order() {
    let cases: &[(&[u8], Trouble)] = match std::env::var_os("FARSHORE_LONG") {
        Some(_) => &[
            (&[0b0000, 0b0010, 0b0100, 0b1000, 0b1010], [1, 1, 0]),
            (&[0b0000, 0b1010], [2, 0, 1]),
        ],
        None => &[(&[0b0010], [1, 0, 0]), (&[0b1000], [0, 0, 1])],
    };
    for (deletes, trouble) in cases {
        for script in scripts(deletes) {
            let model = Model::explore_with(script, Rules::Whole, *trouble, true);
            assert_eq!(model.wrong, None, "script {script:?}");
        }
    }
    // It would not, if what was written were not read again.
    let wrong = scripts(&[0b0000]).into_iter().any(|script| {
        let model = Model::explore_with(script, Rules::NoSecondLook, [1, 0, 0], true);
        model.wrong.is_some()
    });
    assert!(wrong);
}

/// The same model finds what each rule prevents.
#[test]
fn without_any_one_of_its_rules_some_order_ends_wrong() {
    for (rules, trouble) in [
        (Rules::NoDoubts, [1, 0, 0]),
        (Rules::NoDoubtOnTake, [1, 1, 0]),
        (Rules::ClaimAtOnce, [2, 0, 0]),
        (Rules::TrustUnanswered, [2, 0, 0]),
        (Rules::NoSecondLook, [1, 0, 0]),
        (Rules::CoversTooMuch, [2, 0, 0]),
        (Rules::ChangeSeenOnce, [1, 0, 0]),
    ] {
        let wrong = scripts(&[0b0000])
            .into_iter()
            .any(|script| Model::explore(script, rules, trouble).wrong.is_some());
        assert!(
            wrong,
            "{rules:?} makes no difference: the model proves nothing about it"
        );
    }
}

#[test]
fn expired_items_stay_where_ttl_deletes_are_skipped() {
    let keep = KeepExpired {
        attribute: "ttl".to_owned(),
    };
    let item = |seconds: &str| {
        let value = aws_sdk_dynamodb::types::AttributeValue::N(seconds.to_owned());
        Item::from([("ttl".to_owned(), value)])
    };
    assert!(keep.keeps(&item("100"), 100_000));
    assert!(!keep.keeps(&item("101"), 100_000));
    assert!(!keep.keeps(&Item::new(), 100_000));
}
