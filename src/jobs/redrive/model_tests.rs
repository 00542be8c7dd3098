//! Two redrives of one queue, beside a source that is written to and a worker that replays, both of
//! them and the worker dying, with writes that take effect late, in every order.
//!
//! Time is a queue, as in the model of repair by key: what stands in it ends in its order. A write
//! leaves only while its letter has a late effect of hiding left, so a letter that is hidden shows
//! again behind the last late write for it. So does every call to the queue: whoever lets a letter
//! go does it before it shows again, and needs nothing of what the queue makes of old receipts. The
//! rules that are turned off below find a queue that takes them.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};

use crate::repair::{KeyRepair, Step};

/// What a table holds under the one key.
type Value = Option<u8>;

/// What the protocol would be without one of its rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rules {
    Whole,
    /// A letter shows again although a write for it may still take effect.
    HiddenTooShort,
    /// A letter with an unanswered write is given back at once.
    GivenBackUnanswered,
    /// An unanswered write counts as written.
    TrustUnanswered,
    /// The source is not read again after a write.
    NoSecondLook,
    /// A letter is deleted before the one that takes its place is delivered.
    OldLetterFirst,
    /// A letter is deleted although it has shown again since it was received.
    DeleteAfterShown,
    /// A letter is given back although it has shown again since it was received.
    GivenBackAfterShown,
    /// A letter is worked at although it has shown again since it was received.
    WorkAfterShown,
    /// The worker's checkpoint passes a record whose letter is not delivered.
    CheckpointFirst,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Letter {
    Shown,
    Hidden,
    Gone,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Waiting {
    /// A write that may still take effect.
    Late(Value),
    /// This letter shows again.
    Shows(usize),
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Work {
    Repairing(KeyRepair<Value>),
    /// The replica refuses what the source holds: a new letter is to be delivered.
    Refused,
    /// The letter is to be deleted.
    Settled,
    /// The letter is deleted, and its new one is not delivered yet.
    Owed,
    /// The letter stays, and is to be given back.
    Parked,
}

/// One letter in the hands of a redrive.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Bringing {
    letter: usize,
    work: Work,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct World {
    source: Value,
    replica: Value,
    /// Source writes so far: the stream.
    written: usize,
    /// The record that the worker applies next.
    next: usize,
    checkpoint: usize,
    /// Refused records whose letters are not delivered.
    undelivered: u8,
    /// Whether the replica takes everything now.
    mended: bool,
    letters: Vec<Letter>,
    queue: Vec<Waiting>,
    redrives: [Option<Bringing>; 2],
    unanswered: u8,
    worker_crashes: u8,
    redrive_crashes: u8,
}

/// How many writes get no answer, how often the worker dies, and how often a redrive does.
type Trouble = [u8; 3];

/// What is written one after the other, and which of it the replica refuses until it is mended.
type Script = Vec<(Value, bool)>;

struct Model {
    script: Script,
    /// Letters there may be at once.
    letters_max: usize,
    rules: Rules,
    seen: HashSet<World>,
    quiet: usize,
    wrong: Option<World>,
}

impl World {
    fn new([unanswered, worker_crashes, redrive_crashes]: Trouble) -> Self {
        Self {
            source: None,
            replica: None,
            written: 0,
            next: 0,
            checkpoint: 0,
            undelivered: 0,
            mended: false,
            letters: Vec::new(),
            queue: Vec::new(),
            redrives: [None, None],
            unanswered,
            worker_crashes,
            redrive_crashes,
        }
    }

    fn is_quiet(&self, writes: usize) -> bool {
        self.mended
            && self.written == writes
            && self.checkpoint == writes
            && self.undelivered == 0
            && self.queue.is_empty()
            && self.redrives == [None, None]
            && self.letters.iter().all(|letter| *letter == Letter::Gone)
    }

    fn bringing(&mut self, redrive: usize, letter: usize, work: Work) {
        self.redrives[redrive] = Some(Bringing { letter, work });
    }

    /// The same world for all worlds that go on alike: without the letters that are gone, and whichever
    /// of the redrives is which.
    fn plain(mut self) -> Self {
        while let Some(gone) = self.letters.iter().position(|l| *l == Letter::Gone) {
            self.letters.remove(gone);
            let moved = |letter: &mut usize| *letter -= usize::from(*letter > gone);
            for waiting in &mut self.queue {
                if let Waiting::Shows(letter) = waiting {
                    moved(letter);
                }
            }
            for redrive in &mut self.redrives {
                match redrive {
                    Some(bringing) if bringing.work == Work::Owed => bringing.letter = 0,
                    Some(bringing) if bringing.letter == gone => *redrive = None,
                    Some(bringing) => moved(&mut bringing.letter),
                    None => {}
                }
            }
        }
        self.redrives.sort_by_key(|bringing| {
            let mut hasher = DefaultHasher::new();
            bringing.hash(&mut hasher);
            hasher.finish()
        });
        self
    }

    /// The letter shows again at once.
    fn give_back(&mut self, letter: usize) {
        self.queue
            .retain(|waiting| *waiting != Waiting::Shows(letter));
        self.letters[letter] = Letter::Shown;
    }

    /// The letter is hidden until what is on its way now is dead.
    fn hide(&mut self, letter: usize) {
        self.queue
            .retain(|waiting| *waiting != Waiting::Shows(letter));
        self.queue.push(Waiting::Shows(letter));
        self.letters[letter] = Letter::Hidden;
    }

    fn delete(&mut self, letter: usize) {
        self.queue
            .retain(|waiting| *waiting != Waiting::Shows(letter));
        self.letters[letter] = Letter::Gone;
    }
}

impl Model {
    fn explore(script: Script, letters_max: usize, rules: Rules, trouble: Trouble) -> Self {
        let mut model = Self {
            script,
            letters_max,
            rules,
            seen: HashSet::new(),
            quiet: 0,
            wrong: None,
        };
        let mut stack = vec![World::new(trouble)];
        while let Some(world) = stack.pop() {
            let world = world.plain();
            if model.wrong.is_some() || !model.seen.insert(world.clone()) {
                continue;
            }
            if world.is_quiet(model.script.len()) {
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

    fn refuses(&self, world: &World, value: Value) -> bool {
        let is_poison = |(written, poison): &(Value, bool)| *written == value && *poison;
        !world.mended && value.is_some() && self.script.iter().any(is_poison)
    }

    fn next(&self, world: &World, out: &mut Vec<World>) {
        if let Some((value, _)) = self.script.get(world.written) {
            let mut next = world.clone();
            next.source = *value;
            next.written += 1;
            out.push(next);
        }
        if !world.mended {
            let mut next = world.clone();
            next.mended = true;
            out.push(next);
        }
        self.worker(world, out);
        self.time_passes(world, out);
        for redrive in 0..2 {
            match &world.redrives[redrive] {
                None => self.receive(world, redrive, out),
                Some(bringing) => self.bring(world, redrive, bringing, out),
            }
        }
    }

    fn worker(&self, world: &World, out: &mut Vec<World>) {
        if world.next < world.written {
            let value = self.script[world.next].0;
            let mut next = world.clone();
            next.next += 1;
            if !self.refuses(world, value) {
                next.replica = value;
                out.push(next);
            } else if self.rules == Rules::CheckpointFirst {
                next.undelivered += 1;
                out.push(next);
            } else if next.letters.len() < self.letters_max {
                next.letters.push(Letter::Shown);
                out.push(next);
            }
        }
        if world.undelivered > 0 && world.letters.len() < self.letters_max {
            let mut next = world.clone();
            next.undelivered -= 1;
            next.letters.push(Letter::Shown);
            out.push(next);
        }
        if world.checkpoint < world.next {
            let mut next = world.clone();
            next.checkpoint = world.next;
            out.push(next);
        }
        if world.worker_crashes > 0 {
            let mut next = world.clone();
            next.worker_crashes -= 1;
            next.next = world.checkpoint;
            next.undelivered = 0;
            out.push(next);
        }
    }

    fn time_passes(&self, world: &World, out: &mut Vec<World>) {
        // A late write takes effect at any moment before its time is over, or never.
        for (at, waiting) in world.queue.iter().enumerate() {
            if let Waiting::Late(value) = waiting {
                let mut next = world.clone();
                next.queue.remove(at);
                next.replica = *value;
                out.push(next);
            }
        }
        if world.queue.is_empty() {
            return;
        }
        let mut next = world.clone();
        if let Waiting::Shows(letter) = next.queue.remove(0) {
            next.letters[letter] = Letter::Shown;
            for redrive in &mut next.redrives {
                if let Some(bringing) = redrive
                    && bringing.letter == letter
                {
                    match (self.rules, &bringing.work) {
                        (_, Work::Owed)
                        | (Rules::DeleteAfterShown, Work::Settled)
                        | (Rules::GivenBackAfterShown, Work::Parked)
                        | (Rules::WorkAfterShown, Work::Repairing(_)) => {}
                        _ => *redrive = None,
                    }
                }
            }
        }
        out.push(next);
    }

    fn receive(&self, world: &World, redrive: usize, out: &mut Vec<World>) {
        for (letter, state) in world.letters.iter().enumerate() {
            if *state == Letter::Shown {
                let mut next = world.clone();
                next.hide(letter);
                next.bringing(redrive, letter, Work::Repairing(KeyRepair::default()));
                out.push(next);
            }
        }
    }

    fn bring(&self, world: &World, redrive: usize, bringing: &Bringing, out: &mut Vec<World>) {
        let letter = bringing.letter;
        if world.redrive_crashes > 0 {
            let mut next = world.clone();
            next.redrive_crashes -= 1;
            next.redrives[redrive] = None;
            out.push(next);
        }
        let mut next = world.clone();
        match &bringing.work {
            Work::Repairing(repair) => {
                // Asked to stop; no write of it is on its way.
                let mut stopped = world.clone();
                stopped.bringing(redrive, letter, Work::Parked);
                out.push(stopped);
                self.repair(world, redrive, letter, repair, out);
                return;
            }
            Work::Settled => {
                next.delete(letter);
                next.redrives[redrive] = None;
            }
            Work::Parked => {
                next.give_back(letter);
                next.redrives[redrive] = None;
            }
            Work::Refused if self.rules == Rules::OldLetterFirst => {
                next.delete(letter);
                next.bringing(redrive, letter, Work::Owed);
            }
            Work::Refused | Work::Owed if world.letters.len() == self.letters_max => return,
            Work::Refused => {
                next.letters.push(Letter::Shown);
                next.bringing(redrive, letter, Work::Settled);
            }
            Work::Owed => {
                next.letters.push(Letter::Shown);
                next.redrives[redrive] = None;
            }
        }
        out.push(next);
    }

    fn repair(
        &self,
        world: &World,
        redrive: usize,
        letter: usize,
        repair: &KeyRepair<Value>,
        out: &mut Vec<World>,
    ) {
        let mut next = world.clone();
        let mut repair = repair.clone();
        match repair.step() {
            Step::ReadSource => repair.source(world.source),
            Step::ReadReplica => repair.replica(&world.replica),
            Step::Clean => {
                next.bringing(redrive, letter, Work::Settled);
                out.push(next);
                return;
            }
            Step::Write(value) if self.refuses(world, value) => {
                next.bringing(redrive, letter, Work::Refused);
                out.push(next);
                return;
            }
            Step::Write(value) => {
                repair.written();
                if self.rules == Rules::NoSecondLook {
                    repair.leave();
                }
                next.replica = value;
                self.unanswered(world, redrive, letter, &repair, value, out);
            }
        }
        next.bringing(redrive, letter, Work::Repairing(repair));
        out.push(next);
    }

    fn unanswered(
        &self,
        world: &World,
        redrive: usize,
        letter: usize,
        written: &KeyRepair<Value>,
        value: Value,
        out: &mut Vec<World>,
    ) {
        if world.unanswered == 0 {
            return;
        }
        for late in [false, true] {
            let mut next = world.clone();
            next.unanswered -= 1;
            if late {
                next.queue.push(Waiting::Late(value));
                if self.rules != Rules::HiddenTooShort {
                    next.hide(letter);
                }
            } else {
                next.replica = value;
            }
            next.redrives[redrive] = None;
            match self.rules {
                Rules::GivenBackUnanswered => next.give_back(letter),
                Rules::TrustUnanswered => {
                    next.bringing(redrive, letter, Work::Repairing(written.clone()));
                }
                _ => {}
            }
            out.push(next);
        }
    }
}

/// `writes` writes: `deletes` and `poison` say which of them delete or are refused.
fn script(writes: u8, deletes: u8, poison: u8) -> Script {
    let write = |write: u8| {
        let value = (deletes >> write & 1 == 0).then_some(write + 1);
        (value, poison >> write & 1 == 1)
    };
    (0..writes).map(write).collect()
}

#[test]
fn every_order_of_two_redrives_worker_source_crash_and_late_effect_ends_equal() {
    // How many writes, which delete, which are refused, letters at once, and what may go wrong.
    type Case = (u8, &'static [u8], &'static [u8], usize, Trouble);
    let cases: &[Case] = match std::env::var_os("FARSHORE_LONG") {
        Some(_) => &[
            (3, &[0b000, 0b010], &[0b001, 0b101], 3, [1, 0, 0]),
            (3, &[0b000], &[0b001], 2, [1, 1, 1]),
            (2, &[0b00, 0b10], &[0b01, 0b11], 3, [2, 1, 1]),
        ],
        None => &[
            (2, &[0b00, 0b10], &[0b01], 2, [1, 1, 1]),
            (2, &[0b00], &[0b10, 0b11], 2, [0, 1, 1]),
        ],
    };
    let mut states = 0;
    for (writes, deletes, poison, letters, trouble) in cases {
        for deletes in *deletes {
            for poison in *poison {
                let script = script(*writes, *deletes, *poison);
                let told = format!("{script:?}");
                let model = Model::explore(script, *letters, Rules::Whole, *trouble);
                assert_eq!(model.wrong, None, "script {told}");
                assert!(model.quiet > 0, "nothing ever came to rest: {told}");
                states += model.seen.len();
            }
        }
    }
    println!("{states} states");
}

/// The same model finds what each rule prevents.
#[test]
fn without_any_one_of_its_rules_some_letter_is_lost() {
    for (rules, trouble) in [
        (Rules::HiddenTooShort, [1, 0, 0]),
        (Rules::GivenBackUnanswered, [1, 0, 0]),
        (Rules::TrustUnanswered, [1, 0, 0]),
        (Rules::NoSecondLook, [0, 0, 0]),
        (Rules::OldLetterFirst, [0, 0, 1]),
        (Rules::DeleteAfterShown, [1, 0, 0]),
        (Rules::GivenBackAfterShown, [1, 0, 0]),
        (Rules::WorkAfterShown, [1, 0, 0]),
        (Rules::CheckpointFirst, [0, 1, 0]),
    ] {
        let is_wrong = |rules: Rules, poison: u8| {
            let model = Model::explore(script(2, 0, poison), 2, rules, trouble);
            model.wrong.is_some()
        };
        let wrong = [0b01, 0b10]
            .into_iter()
            .any(|poison| is_wrong(rules, poison));
        // It is that rule, and nothing else.
        assert!(
            ![0b01, 0b10]
                .into_iter()
                .any(|poison| is_wrong(Rules::Whole, poison))
        );
        assert!(
            wrong,
            "{rules:?} makes no difference: the model proves nothing about it"
        );
    }
}
