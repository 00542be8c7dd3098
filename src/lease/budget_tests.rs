//! The rule against everything that processes, clocks and a network do to it.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

const LEASE_MS: u64 = 900;
const BUDGET: u64 = 100_000;
const TABLE: &str = "orders";

/// What happens next.
#[derive(Debug, Clone, Copy)]
enum Event {
    /// Time goes by.
    Passes(u64),
    /// A process does what is next: reads the row, or sends a write.
    Acts(usize),
    /// A process wants more or less.
    Wants(usize, u64),
    /// A write on its way takes effect, or is refused.
    Arrives(usize),
    /// The answer to one that arrived is heard, if its process still waits.
    Answered(usize),
    /// A process does not wait any longer for the answer.
    GivesUp(usize),
    /// A process stops in good order.
    Leaves(usize),
    /// A process does nothing any more, and is another one from now on. What it could use it may use on.
    Dies(usize),
}

struct Process {
    party: Party,
    /// By how much its clock is ahead.
    ahead: Duration,
    wanted: u64,
    /// The write that it waits for.
    waits: Option<u64>,
    read: bool,
}

struct Sent {
    number: u64,
    by: usize,
    proposal: Proposal,
    /// Whether it took effect, once it has arrived.
    result: Option<bool>,
}

struct World {
    now: Duration,
    row: Option<BudgetRow>,
    processes: Vec<Process>,
    /// Processes that died, with what they may still use.
    ghosts: Vec<Process>,
    network: Vec<Sent>,
    numbers: u64,
}

impl World {
    fn new(count: usize) -> Self {
        let mut world = Self {
            now: Duration::from_secs(1),
            row: None,
            processes: Vec::new(),
            ghosts: Vec::new(),
            network: Vec::new(),
            numbers: 0,
        };
        for place in 0..count {
            let process = world.process(place);
            world.processes.push(process);
        }
        world
    }

    /// A process start of its own.
    fn process(&mut self, place: usize) -> Process {
        self.numbers += 1;
        let me = format!("w{place}-{}", self.numbers);
        Process {
            party: Party::new(&me, Duration::from_millis(LEASE_MS)),
            ahead: Duration::from_secs(place as u64 * 1_000),
            wanted: BUDGET,
            waits: None,
            read: false,
        }
    }

    fn used(&self) -> u64 {
        let all = self.processes.iter().chain(&self.ghosts);
        all.map(|one| one.party.usable(TABLE, self.now + one.ahead))
            .sum()
    }

    fn acts(&mut self, place: usize) {
        let now = self.now;
        let one = &mut self.processes[place];
        if one.waits.is_some() {
            return;
        }
        let clock = now + one.ahead;
        if one.party.must_read() && !one.read {
            one.party.saw(self.row.clone(), clock);
            one.read = true;
            return;
        }
        one.read = false;
        let want = Want {
            budget: BUDGET,
            wanted: one.wanted,
        };
        let wants = BTreeMap::from([(TABLE.to_owned(), want)]);
        if let Some(proposal) = one.party.propose(&wants, clock) {
            self.send(place, proposal);
        }
    }

    fn send(&mut self, by: usize, proposal: Proposal) {
        self.numbers += 1;
        self.processes[by].waits = Some(self.numbers);
        self.network.push(Sent {
            number: self.numbers,
            by,
            proposal,
            result: None,
        });
    }

    fn arrives(&mut self, place: usize) {
        let waiting: Vec<usize> = (0..self.network.len())
            .filter(|place| self.network[*place].result.is_none())
            .collect();
        let Some(place) = waiting.get(place % waiting.len().max(1)) else {
            return;
        };
        let sent = &mut self.network[*place];
        let there = self.row.as_ref().map(|row| row.lease_counter);
        let effect = there == sent.proposal.replaces;
        if effect {
            self.row = Some(sent.proposal.row.clone());
        }
        sent.result = Some(effect);
    }

    fn answered(&mut self, place: usize) {
        let ready: Vec<usize> = (0..self.network.len())
            .filter(|place| self.network[*place].result.is_some())
            .collect();
        let Some(place) = ready.get(place % ready.len().max(1)) else {
            return;
        };
        let sent = self.network.remove(*place);
        let one = &mut self.processes[sent.by];
        if one.waits != Some(sent.number) {
            return;
        }
        one.waits = None;
        match sent.result {
            Some(true) => one.party.written(sent.proposal),
            _ => one.party.not_written(),
        }
    }

    fn gives_up(&mut self, place: usize) {
        let one = &mut self.processes[place];
        if one.waits.take().is_some() {
            one.party.not_written();
        }
    }

    fn leaves(&mut self, place: usize) {
        self.gives_up(place);
        let left = self.processes[place].party.leave();
        if let Some(proposal) = left {
            self.send(place, proposal);
        }
        self.dies(place);
    }

    fn dies(&mut self, place: usize) {
        let new = self.process(place);
        let mut old = std::mem::replace(&mut self.processes[place], new);
        old.waits = None;
        self.ghosts.push(old);
    }

    fn happens(&mut self, event: Event) {
        let count = self.processes.len();
        match event {
            Event::Passes(ms) => self.now += Duration::from_millis(ms),
            Event::Acts(place) => self.acts(place % count),
            Event::Wants(place, wanted) => self.processes[place % count].wanted = wanted,
            Event::Arrives(place) => self.arrives(place),
            Event::Answered(place) => self.answered(place),
            Event::GivesUp(place) => self.gives_up(place % count),
            Event::Leaves(place) => self.leaves(place % count),
            Event::Dies(place) => self.dies(place % count),
        }
    }

    /// From now on all goes well.
    fn calms_down(&mut self) -> Result<(), TestCaseError> {
        while !self.network.is_empty() {
            self.arrives(0);
            self.answered(0);
        }
        for round in 0..30 {
            for place in 0..self.processes.len() {
                self.gives_up(place);
                // A read, perhaps, and a write.
                for _ in 0..2 {
                    self.acts(place);
                }
                self.arrives(0);
                self.answered(0);
                self.now += Duration::from_millis(LEASE_MS / 3 / self.processes.len() as u64);
                prop_assert!(self.used() <= BUDGET, "round {round}: {}", self.used());
            }
        }
        Ok(())
    }
}

fn event() -> impl Strategy<Value = Event> {
    let any = 0usize..8;
    prop_oneof![
        6 => (1..LEASE_MS / 8).prop_map(Event::Passes),
        1 => (LEASE_MS..3 * LEASE_MS).prop_map(Event::Passes),
        20 => any.clone().prop_map(Event::Acts),
        1 => (any.clone(), prop_oneof![Just(0), Just(BUDGET), 0..BUDGET])
            .prop_map(|(place, wanted)| Event::Wants(place, wanted)),
        16 => any.clone().prop_map(Event::Arrives),
        12 => any.clone().prop_map(Event::Answered),
        1 => any.clone().prop_map(Event::GivesUp),
        1 => any.clone().prop_map(Event::Leaves),
        1 => any.prop_map(Event::Dies),
    ]
}

/// What each of `wants` gets: the level to which all can be filled up, found by halving, and what is left
/// over, evenly.
fn even_shares(wants: &[u64]) -> Vec<f64> {
    let floor = (BUDGET / 20) as f64 / wants.len() as f64;
    let wants: Vec<f64> = wants.iter().map(|want| (*want as f64).max(floor)).collect();
    let filled = |level: f64| wants.iter().map(|want| want.min(level)).sum::<f64>();
    let (mut low, mut high) = (0.0, BUDGET as f64);
    for _ in 0..60 {
        let middle = (low + high) / 2.0;
        match filled(middle) <= BUDGET as f64 {
            true => low = middle,
            false => high = middle,
        }
    }
    let rest = (BUDGET as f64 - filled(low)).max(0.0) / wants.len() as f64;
    wants.iter().map(|want| want.min(low) + rest).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    /// Whatever happens, and in whatever order, what may be used is never more than the budget. Once all goes
    /// well again everybody has its fair share.
    #[test]
    fn shares_never_exceed_the_budget_and_become_fair(
        count in 1usize..5,
        events in vec(event(), 0..400),
    ) {
        let mut world = World::new(count);
        for event in events {
            world.happens(event);
            prop_assert!(world.used() <= BUDGET, "{} after {event:?}", world.used());
        }
        world.calms_down()?;
        let wants: Vec<u64> = world.processes.iter().map(|one| one.wanted).collect();
        for (one, fair) in world.processes.iter().zip(even_shares(&wants)) {
            let has = one.party.usable(TABLE, world.now + one.ahead) as f64;
            prop_assert!((has - fair).abs() <= 10.0, "{has} of {fair} among {wants:?}");
        }
    }

    /// All work out the same, and never more than there is.
    #[test]
    fn fair_shares_add_up(wants in vec(0..3 * BUDGET, 1..8)) {
        let mut sum = 0;
        for (place, mine) in wants.iter().enumerate() {
            let mut others = wants.clone();
            others.remove(place);
            let share = fair(BUDGET, *mine, &others);
            let even = even_shares(&wants)[place];
            prop_assert!((share as f64 - even).abs() <= 10.0, "{share}, {even}");
            sum += share;
        }
        prop_assert!(sum.abs_diff(BUDGET) <= 10);
    }
}

/// One process with `wanted`, which reads and writes without trouble.
fn beats(party: &mut Party, row: &mut Option<BudgetRow>, wanted: u64, now: Duration) -> Proposal {
    if party.must_read() {
        party.saw(row.clone(), now);
    }
    let want = Want {
        budget: BUDGET,
        wanted,
    };
    let wants = BTreeMap::from([(TABLE.to_owned(), want)]);
    let proposal = party.propose(&wants, now).unwrap();
    assert_eq!(row.as_ref().map(|row| row.lease_counter), proposal.replaces);
    *row = Some(proposal.row.clone());
    party.written(proposal.clone());
    proposal
}

#[test]
fn a_joiner_starts_with_none_and_a_dead_ones_share_comes_back_at_the_end_of_its_lease() {
    let at = |lease: f64| {
        Duration::from_millis((10.0 * LEASE_MS as f64 + lease * LEASE_MS as f64) as u64)
    };
    let lease = Duration::from_millis(LEASE_MS);
    let (mut first, mut second) = (Party::new("a", lease), Party::new("b", lease));
    let mut row = None;
    beats(&mut first, &mut row, BUDGET, at(0.0));
    assert_eq!(first.usable(TABLE, at(0.5)), BUDGET, "alone it has all");
    assert_eq!(first.usable(TABLE, at(1.0)), 0, "until its hold is over");
    let joined = beats(&mut second, &mut row, BUDGET, at(0.3));
    assert_eq!(second.usable(TABLE, at(0.3)), 0);
    assert!(joined.is_short && joined.matters);
    first.not_written();
    let lowered = beats(&mut first, &mut row, BUDGET, at(0.4));
    assert!(lowered.matters);
    assert_eq!(first.usable(TABLE, at(0.4)), BUDGET / 2);
    let joined = beats(&mut second, &mut row, BUDGET, at(0.5));
    assert_eq!(second.usable(TABLE, at(0.5)), BUDGET / 2);
    assert!(!joined.is_short);
    // The first one dies: it was seen to stand still since 0.5.
    for lease in [0.8, 1.1, 1.4] {
        beats(&mut second, &mut row, BUDGET, at(lease));
        assert_eq!(second.usable(TABLE, at(lease)), BUDGET / 2, "{lease}");
    }
    let alone = beats(&mut second, &mut row, BUDGET, at(1.5));
    assert!(alone.matters);
    assert_eq!(second.usable(TABLE, at(1.5)), BUDGET);
    assert!(!second.must_read(), "nobody else writes the row");
}

#[test]
fn a_lower_budget_is_heeded_at_once_and_by_everybody() {
    let lease = Duration::from_millis(LEASE_MS);
    let at = Duration::from_millis;
    let (mut old, mut new) = (Party::new("a", lease), Party::new("b", lease));
    let mut row = None;
    beats(&mut old, &mut row, BUDGET, at(1_000));
    let wants = |budget| {
        let want = Want {
            budget,
            wanted: budget,
        };
        BTreeMap::from([(TABLE.to_owned(), want)])
    };
    new.saw(row.clone(), at(1_100));
    let proposal = new.propose(&wants(BUDGET / 4), at(1_100)).unwrap();
    row = Some(proposal.row.clone());
    new.written(proposal);
    assert_eq!(
        new.usable(TABLE, at(1_100)),
        0,
        "another holds more than there is"
    );
    old.saw(row, at(1_200));
    old.propose(&wants(BUDGET / 4), at(1_200)).unwrap();
    assert_eq!(
        old.usable(TABLE, at(1_200)),
        BUDGET / 8,
        "before it is written"
    );
    old.not_written();
    assert_eq!(
        old.usable(TABLE, at(1_200)),
        BUDGET / 8,
        "whether it is or not"
    );
}
