//! Whoever goes on from a cut ends with the same counts as one that was never interrupted.

use std::collections::BTreeMap;

use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};

use super::super::join::{Join, Met};
use super::super::judge::Kind;
use super::*;
use crate::dynamo::item::ItemKey;

type Table = BTreeMap<u16, u8>;

fn id(key: u16) -> Digest {
    Digest::of_key(&ItemKey::from_bytes(&key.to_be_bytes()))
}

fn kind(source: Option<&u8>, target: Option<&u8>) -> Option<Kind> {
    match (source, target) {
        (Some(one), Some(other)) if one == other => None,
        (Some(_), Some(_)) => Some(Kind::Changed),
        (Some(_), None) => Some(Kind::Missing),
        (None, Some(_)) => Some(Kind::Extra),
        (None, None) => None,
    }
}

/// Two tables, and the orders in which they are scanned.
struct World {
    tables: [Table; 2],
    orders: [Vec<u16>; 2],
    memory: usize,
}

/// A process at a segment, until it dies.
struct Process {
    ledger: Ledger<usize>,
    join: Join<u16>,
    suspects: Vec<(u16, Vec<Origin>)>,
    finished: bool,
}

impl Process {
    fn new(cut: Cut<usize>, memory: usize) -> Self {
        Self {
            ledger: Ledger::resume(cut),
            join: Join::new(memory),
            suspects: Vec::new(),
            finished: false,
        }
    }

    fn met(&mut self, origin: Origin, met: Met<u16>) {
        let both = |partner: Option<Origin>| [Some(origin), partner].into_iter().flatten();
        match met {
            Met::Waits => {}
            Met::Settled(partner) => {
                let origins: Vec<Origin> = both(partner).collect();
                self.ledger.settle(&origins);
            }
            Met::Suspect(key, partner) => self.suspects.push((key, both(partner).collect())),
        }
    }

    fn read(&mut self, world: &World, side: Side, size: usize) {
        let order = &world.orders[index(side)];
        let from = match self.ledger.next(side) {
            Position::Start => 0,
            Position::After(at) => *at,
            Position::End => return,
        };
        let to = (from + size).min(order.len());
        let next = match to == order.len() {
            true => Position::End,
            false => Position::After(to),
        };
        let items = (to - from) as u64;
        let counts = match side {
            Side::Source => Counts {
                source_items: items,
                ..Counts::default()
            },
            Side::Target => Counts {
                target_items: items,
                ..Counts::default()
            },
        };
        let origin = self.ledger.page(side, to - from, counts, next);
        for key in &order[from..to] {
            let digest = Some(id(u16::from(world.tables[index(side)][key])));
            let met = self.join.meet(origin, *key, digest);
            self.met(origin, met);
        }
        while let Some(look) = self.join.overflow() {
            let origin = look.origin;
            let there = world.tables[index(origin.side.other())].get(&look.key);
            let found = there.map(|value| Some(id(u16::from(*value))));
            let met = self.join.looked_up(look, found);
            self.met(origin, met);
        }
    }

    fn judge(&mut self, world: &World, at: usize) {
        let (key, origins) = self.suspects.swap_remove(at);
        let [source, target] = &world.tables;
        if let Some(kind) = kind(source.get(&key), target.get(&key)) {
            self.ledger.note(id(key), &origins, Counts::of(kind));
        }
        self.ledger.settle(&origins);
    }

    /// One step of any kind. False at the end.
    fn step(&mut self, world: &World, random: &mut StdRng) -> bool {
        let ended = |side| *self.ledger.next(side) == Position::End;
        let all_read = ended(Side::Source) && ended(Side::Target);
        if all_read && !self.finished {
            self.finished = true;
            let sides = [Side::Source, Side::Target];
            let left: Vec<_> = sides
                .into_iter()
                .flat_map(|side| self.join.end(side))
                .collect();
            for (key, origin) in left {
                self.met(origin, Met::Suspect(key, None));
            }
        }
        if !self.suspects.is_empty() && (all_read || random.random_bool(0.5)) {
            let at = random.random_range(0..self.suspects.len());
            self.judge(world, at);
            return true;
        }
        if all_read {
            return false;
        }
        let side = *[Side::Source, Side::Target].choose(random);
        self.read(world, side, random.random_range(1..8));
        true
    }
}

trait Choose<T> {
    fn choose(&self, random: &mut StdRng) -> &T;
}

impl<T> Choose<T> for [T; 2] {
    fn choose(&self, random: &mut StdRng) -> &T {
        &self[random.random_range(0..2)]
    }
}

fn start() -> Cut<usize> {
    Cut {
        positions: [Position::Start, Position::Start],
        counts: Counts::default(),
        counted: HashSet::new(),
    }
}

fn expected(world: &World) -> Counts {
    let [source, target] = &world.tables;
    let mut counts = Counts {
        source_items: source.len() as u64,
        target_items: target.len() as u64,
        ..Counts::default()
    };
    let keys: HashSet<&u16> = source.keys().chain(target.keys()).collect();
    for key in keys {
        if let Some(kind) = kind(source.get(key), target.get(key)) {
            counts += &Counts::of(kind);
        }
    }
    counts
}

proptest! {
    /// However often a process dies, wherever its last cut was, in whichever order the sides come.
    #[test]
    fn nothing_is_missed_and_nothing_is_counted_twice(
        source in prop::collection::btree_map(0u16..40, 0u8..3, 0..40),
        target in prop::collection::btree_map(0u16..40, 0u8..3, 0..40),
        alike in any::<bool>(), entries in 4usize..100, deaths in 0usize..5, seed in any::<u64>(),
    ) {
        let mut random = StdRng::seed_from_u64(seed);
        let mut orders = [&source, &target].map(|table| table.keys().copied().collect::<Vec<u16>>());
        if !alike {
            orders.iter_mut().for_each(|order| order.shuffle(&mut random));
        }
        let memory = entries * 310;
        let world = World { tables: [source, target], orders, memory };
        let mut stored = start();
        for _ in 0..deaths {
            let mut process = Process::new(stored.clone(), world.memory);
            for _ in 0..random.random_range(0..40) {
                if !process.step(&world, &mut random) {
                    break;
                }
                if random.random_bool(0.3) {
                    stored = process.ledger.cut();
                }
            }
        }
        let mut process = Process::new(stored, world.memory);
        while process.step(&world, &mut random) {
            if random.random_bool(0.1) {
                process.ledger.cut();
            }
        }
        let total = process.ledger.total();
        let cut = process.ledger.cut();
        prop_assert_eq!(&cut.positions, &[Position::End, Position::End]);
        prop_assert_eq!(&cut.counts, &total);
        prop_assert_eq!(total, expected(&world));
    }
}

/// Two tables alike: the marks follow closely.
#[test]
fn the_marks_follow_the_scans() {
    let table: Table = (0..4_000).map(|key| (key, 1)).collect();
    let order: Vec<u16> = table.keys().copied().collect();
    let world = World {
        tables: [table.clone(), table],
        orders: [order.clone(), order],
        memory: usize::MAX,
    };
    let mut process = Process::new(start(), world.memory);
    for page in 0..30usize {
        process.read(&world, Side::Source, 100);
        process.read(&world, Side::Target, 90);
        let cut = process.ledger.cut();
        let at = |position: &Position<usize>| match position {
            Position::After(at) => *at,
            Position::Start => 0,
            Position::End => 4_000,
        };
        let read = page * 90;
        let behind = |side: usize| read.saturating_sub(at(&cut.positions[side]));
        assert!(behind(0) <= 200 && behind(1) <= 200, "page {page}: {cut:?}");
    }
}

/// More keys behind the marks than can be remembered: the marks wait, and nothing is lost.
#[test]
fn with_too_many_to_remember_the_marks_wait() {
    let keys = 3 * COUNTED_MAX as u16;
    let world = World {
        tables: [1, 2].map(|value| (0..keys).map(|key| (key, value)).collect()),
        orders: [(0..keys).collect(), (0..keys).rev().collect()],
        memory: usize::MAX,
    };
    let mut process = Process::new(start(), world.memory);
    let mut random = StdRng::seed_from_u64(1);
    let mut largest = 0;
    while process.step(&world, &mut random) {
        if random.random_bool(0.001) {
            largest = largest.max(process.ledger.cut().counted.len());
        }
    }
    assert!(largest <= COUNTED_MAX, "{largest}");
    assert_eq!(process.ledger.cut().counts, expected(&world));
}
