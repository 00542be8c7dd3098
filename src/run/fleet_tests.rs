//! The rule of sharing, and what feeds it, in a model of a fleet: workers with views of their own
//! age, takes on condition, drains that take their time, joins, leaves, deaths, shards that end.

use super::*;

use std::collections::{BTreeMap, VecDeque};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::lease::row::{SHARD_END, WorkerRow};
use crate::lease::rules::{Observer, take_name};
use crate::stream::ShardId;
use crate::stream::reader::Position;

const TICK: Duration = Duration::from_millis(250);
const LEASE: Duration = Duration::from_secs(10);
const LEASE_TICKS: u64 = 40;
/// Views are up to this many ticks old when they are read.
const VIEW_AGE: u64 = 2;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Able,
    /// Its heart beats, and that is all.
    Idle,
    /// It asks, and does not take what it gets.
    Refuser,
}

struct Running {
    _held: Held,
    drain: CancellationToken,
    released_at: Option<u64>,
}

struct Take {
    at: u64,
    key: String,
    counter: u64,
    running: Running,
}

struct Model {
    fleet: Arc<Fleet>,
    kind: Kind,
    leaving: bool,
    row: WorkerRow,
    shards: Observer,
    workers: Observer,
    running: BTreeMap<String, Running>,
    takes: Vec<Take>,
    next_read: u64,
    next_beat: u64,
}

/// The state table, and who works on it.
struct World {
    random: StdRng,
    start: Instant,
    tick: u64,
    shards: BTreeMap<String, ShardRow>,
    rows: BTreeMap<String, WorkerRow>,
    /// What the last ticks looked like.
    past: VecDeque<(Vec<ShardRow>, Vec<WorkerRow>)>,
    models: Vec<Model>,
    /// Takes since the start.
    moves: usize,
    named: usize,
}

impl World {
    fn new(seed: u64, shards: usize) -> Self {
        let mut world = Self {
            random: StdRng::seed_from_u64(seed),
            start: Instant::now(),
            tick: 0,
            shards: BTreeMap::new(),
            rows: BTreeMap::new(),
            past: VecDeque::new(),
            models: Vec::new(),
            moves: 0,
            named: 0,
        };
        for _ in 0..shards {
            world.add_shard();
        }
        world
    }

    fn add_shard(&mut self) {
        self.named += 1;
        let shard = ShardId(format!("shardId-{:05}", self.named));
        let start = Position::TrimHorizon;
        let row = ShardRow::new(1, "t", "arn/stream/l", &shard, None, &start, 0);
        self.shards.insert(row.lease_key.clone(), row);
    }

    fn join(&mut self, kind: Kind) {
        self.named += 1;
        let id = format!("host-{}#{:08x}", self.named, self.random.random::<u32>());
        let row = WorkerRow::new(&id, 1, String::new());
        self.rows.insert(row.lease_key.clone(), row.clone());
        self.models.push(Model {
            fleet: Arc::new(Fleet::new(&id, 1, LEASE)),
            kind,
            leaving: false,
            row,
            shards: Observer::default(),
            workers: Observer::default(),
            running: BTreeMap::new(),
            takes: Vec::new(),
            next_read: self.tick + self.random.random_range(0..4),
            next_beat: self.tick,
        });
    }

    /// A clean stop of one that is able.
    fn leave(&mut self) {
        let at = self.pick();
        let model = &mut self.models[at];
        model.leaving = true;
        model.fleet.leave();
        model.row.leaving = true;
        for running in model.running.values() {
            running.drain.cancel();
        }
        model.next_beat = 0;
    }

    /// A death: its rows stay.
    fn die(&mut self) {
        let at = self.pick();
        self.models.remove(at);
    }

    fn pick(&mut self) -> usize {
        let able: Vec<usize> = (0..self.models.len())
            .filter(|at| self.models[*at].kind == Kind::Able && !self.models[*at].leaving)
            .collect();
        able[self.random.random_range(0..able.len())]
    }

    /// A shard that somebody reads ends, and has one child or two.
    fn end_shard(&mut self) {
        let owned: Vec<(usize, String)> = self
            .models
            .iter()
            .enumerate()
            .flat_map(|(at, model)| model.running.keys().map(move |key| (at, key.clone())))
            .collect();
        if owned.is_empty() {
            return;
        }
        let (at, key) = owned[self.random.random_range(0..owned.len())].clone();
        for _ in 0..self.random.random_range(1..=2) {
            self.add_shard();
        }
        let row = self.shards.get_mut(&key).unwrap();
        row.checkpoint = SHARD_END.to_owned();
        row.lease_counter += 1;
        self.models[at].running.remove(&key);
        self.models[at].next_read = self.tick;
    }

    fn step(&mut self) {
        self.tick += 1;
        let now = (
            self.shards.values().cloned().collect(),
            self.rows.values().cloned().collect(),
        );
        self.past.push_front(now);
        self.past.truncate(VIEW_AGE as usize + 1);
        for at in 0..self.models.len() {
            let mut model = self.models.swap_remove(at);
            self.work(&mut model);
            self.models.push(model);
            let last = self.models.len() - 1;
            self.models.swap(at, last);
        }
        self.models
            .retain(|model| !model.leaving || !model.running.is_empty() || !model.takes.is_empty());
        let left: Vec<String> = self
            .rows
            .values()
            .filter(|row| row.leaving)
            .filter(|row| !self.models.iter().any(|m| m.row.worker == row.worker))
            .map(|row| row.lease_key.clone())
            .collect();
        for key in left {
            self.rows.remove(&key);
        }
    }

    fn work(&mut self, model: &mut Model) {
        self.finish_takes(model);
        self.release(model);
        if self.tick >= model.next_read && !model.leaving {
            self.read(model);
            model.next_read = self.tick + self.random.random_range(4..=7);
        }
        let wants = match model.kind {
            Kind::Idle => Vec::new(),
            Kind::Able | Kind::Refuser => model.fleet.wants(),
        };
        if self.tick >= model.next_beat || wants != model.row.wants {
            model.row.wants = wants;
            model.row.lease_counter += 1;
            self.rows
                .insert(model.row.lease_key.clone(), model.row.clone());
            model.next_beat = self.tick + LEASE_TICKS / 3;
            for key in model.running.keys() {
                self.shards.get_mut(key).unwrap().lease_counter += 1;
            }
        }
    }

    fn read(&mut self, model: &mut Model) {
        let age = self.random.random_range(0..self.past.len());
        let (shards, workers) = self.past[age].clone();
        let now = self.start + TICK * u32::try_from(self.tick).unwrap();
        model.shards.observe(shards.iter(), now);
        model.workers.observe(workers.iter(), now);
        let takeable = shards
            .iter()
            .filter(|row| !row.is_finished() && model.shards.is_takeable(row, LEASE, now))
            .map(|row| row.lease_key.clone())
            .collect();
        let living = workers
            .iter()
            .filter(|row| now - model.workers.still_since(*row).unwrap() < LEASE)
            .map(|row| row.worker.clone())
            .collect();
        let open = shards.iter().filter(|row| !row.is_finished());
        let readable = open.map(|row| row.lease_key.clone()).collect();
        model.fleet.set_readable("stream", readable);
        let snapshot = Arc::new(Snapshot {
            shards,
            workers,
            takeable,
            living,
            begun: Some(now),
            read: true,
            ..Snapshot::default()
        });
        let take = model.fleet.share_out(&snapshot);
        if model.kind != Kind::Able {
            return;
        }
        for row in snapshot
            .shards
            .iter()
            .filter(|row| take.contains(&row.lease_key))
        {
            let key = &row.lease_key;
            if model.running.contains_key(key) || model.takes.iter().any(|take| take.key == *key) {
                continue;
            }
            let drain = CancellationToken::new();
            model.takes.push(Take {
                at: self.tick + self.random.random_range(0..=1),
                key: key.clone(),
                counter: row.lease_counter,
                running: Running {
                    _held: model.fleet.hold(key, drain.clone()),
                    drain,
                    released_at: None,
                },
            });
        }
        self.finish_takes(model);
    }

    fn finish_takes(&mut self, model: &mut Model) {
        for take in std::mem::take(&mut model.takes) {
            let row = self.shards.get_mut(&take.key).unwrap();
            if take.at > self.tick {
                model.takes.push(take);
            } else if row.lease_counter == take.counter {
                row.lease_counter += 1;
                row.lease_owner = Some(take_name(&model.row.worker, self.random.random()));
                self.moves += 1;
                if model.leaving {
                    take.running.drain.cancel();
                }
                let before = model.running.insert(take.key, take.running);
                assert!(before.is_none(), "taken twice");
            } else {
                model.next_read = self.tick;
            }
        }
    }

    fn release(&mut self, model: &mut Model) {
        let mut done = Vec::new();
        for (key, running) in &mut model.running {
            if !running.drain.is_cancelled() {
                continue;
            }
            let at = *running
                .released_at
                .get_or_insert_with(|| self.tick + self.random.random_range(0..=4));
            if at <= self.tick {
                done.push(key.clone());
            }
        }
        for key in done {
            let row = self.shards.get_mut(&key).unwrap();
            row.lease_owner = None;
            row.lease_counter += 1;
            model.running.remove(&key);
            model.next_read = self.tick;
        }
    }

    /// Whether all open shards are read by the able workers, evenly.
    fn is_even(&self) -> bool {
        let open = self
            .shards
            .values()
            .filter(|row| !row.is_finished())
            .count();
        let counts: Vec<usize> = self
            .models
            .iter()
            .filter(|model| model.kind == Kind::Able)
            .map(|model| model.running.len())
            .collect();
        let drains = self
            .models
            .iter()
            .any(|model| model.leaving || model.running.values().any(|r| r.drain.is_cancelled()));
        let (Some(least), Some(most)) = (counts.iter().min(), counts.iter().max()) else {
            return true;
        };
        !drains && counts.iter().sum::<usize>() == open && most - least <= 1
    }

    /// Runs until the shares are even and stay so for a while. Returns after how many ticks they
    /// were, and how many takes it needed.
    fn settle(&mut self, what: &str) -> (u64, usize) {
        let (begun, moves) = (self.tick, self.moves);
        let mut even_since = None;
        while self.tick - begun < 20 * LEASE_TICKS {
            self.step();
            match (self.is_even(), even_since) {
                (false, _) => even_since = None,
                (true, None) => even_since = Some(self.tick),
                (true, Some(since)) if self.tick - since > 30 => {
                    return (since - begun, self.moves - moves);
                }
                (true, Some(_)) => {}
            }
        }
        let counts: Vec<_> = self
            .models
            .iter()
            .map(|m| (m.running.len(), m.kind == Kind::Able, m.fleet.wants().len()))
            .collect();
        panic!("{what}: not even after 20 leases: {counts:?}");
    }

    /// Takes in the next `leases` lease durations.
    fn moves_in(&mut self, leases: u64) -> usize {
        let before = self.moves;
        for _ in 0..leases * LEASE_TICKS {
            self.step();
        }
        self.moves - before
    }

    fn able(&self) -> usize {
        self.models
            .iter()
            .filter(|model| model.kind == Kind::Able)
            .count()
    }

    fn open(&self) -> usize {
        self.shards
            .values()
            .filter(|row| !row.is_finished())
            .count()
    }
}

fn seed() -> u64 {
    let seed = std::env::var("FARSHORE_TEST_SEED")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or_else(|| rand::random::<u32>().into());
    println!("repeat with FARSHORE_TEST_SEED={seed}");
    seed
}

/// Sizes of fleets to try: the corners, and some at random.
fn sizes(random: &mut StdRng) -> Vec<(usize, usize)> {
    let mut sizes = vec![(1, 0), (1, 1), (1, 40), (3, 5), (4, 16), (7, 3), (50, 20)];
    let more = match std::env::var_os("FARSHORE_LONG") {
        Some(_) => 30,
        None => 3,
    };
    for _ in 0..more {
        sizes.push((random.random_range(1..=15), random.random_range(0..=80)));
    }
    sizes.push((random.random_range(30..=50), random.random_range(150..=300)));
    sizes
}

/// Whatever joins, leaves, dies or ends: every shard is read, evenly within one, and once that is so
/// nothing moves any more.
#[test]
fn shares_become_even_and_then_nothing_moves() {
    let mut random = StdRng::seed_from_u64(seed());
    for (workers, shards) in sizes(&mut random) {
        let mut world = World::new(random.random(), shards);
        for _ in 0..workers {
            world.join(Kind::Able);
        }
        let (ticks, moves) = world.settle("start");
        let what = format!("{workers} workers, {shards} shards");
        println!("{what}: even after {ticks} ticks, {moves} takes");
        assert_eq!(world.moves_in(5), 0, "{what}");
        let events = if workers * shards > 4_000 { 1 } else { 4 };
        for event in 1..=events {
            match random.random_range(0..4) {
                0 => world.join(Kind::Able),
                1 if world.able() > 1 => world.leave(),
                2 if world.able() > 1 => world.die(),
                _ => (0..=world.open() / 5).for_each(|_| world.end_shard()),
            }
            // Sometimes while the last is still under way.
            if random.random_bool(0.7) || event == events {
                world.settle(&what);
                assert_eq!(world.moves_in(5), 0, "{what}");
            } else {
                world.moves_in(1);
            }
        }
    }
}

/// A worker that is alone takes everything with its first view.
#[test]
fn a_worker_alone_takes_everything_at_once() {
    let mut world = World::new(seed(), 300);
    world.join(Kind::Able);
    let (ticks, moves) = world.settle("alone");
    assert_eq!(moves, 300);
    assert!(ticks <= 6, "{ticks}");
}

/// Who joins gets its share, and hardly anything else moves.
#[test]
fn a_join_moves_no_more_than_its_share() {
    let mut random = StdRng::seed_from_u64(seed());
    for _ in 0..6 {
        let (workers, shards) = (random.random_range(1..=15), random.random_range(0..=80));
        let mut world = World::new(random.random(), shards);
        for _ in 0..workers {
            world.join(Kind::Able);
        }
        world.settle("start");
        world.join(Kind::Able);
        let (ticks, moves) = world.settle("join");
        let share = shards.div_ceil(workers + 1);
        println!("{workers} workers, {shards} shards: {moves} takes of {share}, {ticks} ticks");
        assert!(moves <= share + 2, "{moves} takes, share {share}");
    }
}

/// A worker whose heart beats and that takes nothing starves no shard: the others share without
/// it, and when one of theirs ends its children wait for nobody.
#[test]
fn a_worker_that_takes_nothing_is_not_waited_for() {
    nobody_waits_for_an_idle_worker(seed());
    // Asked for one, its share full as it saw it, left it lying and was taken for idle.
    nobody_waits_for_an_idle_worker(934_767_295);
}

fn nobody_waits_for_an_idle_worker(seed: u64) {
    let mut random = StdRng::seed_from_u64(seed);
    for (workers, shards) in [(1, 10), (2, 11), (5, 42)] {
        let mut world = World::new(random.random(), shards);
        for _ in 0..workers {
            world.join(Kind::Able);
        }
        world.join(Kind::Idle);
        let (ticks, _) = world.settle("start");
        assert!(ticks <= 5 * LEASE_TICKS, "{ticks} ticks");
        assert_eq!(world.moves_in(8), 0);
        // Whoever waits in vain learns from it, once.
        let mut slow = 0;
        for _ in 0..8 {
            world.end_shard();
            let (ticks, _) = world.settle("end");
            assert!(ticks <= 5 * LEASE_TICKS, "{ticks} ticks");
            slow += usize::from(ticks > 30);
        }
        println!("{workers} workers: {slow} of 8 ends waited");
        assert!(slow <= workers, "{slow} of 8 ends waited");
    }
}

/// A worker that asks and then does not take is given less and less often.
#[test]
fn a_worker_that_leaves_what_it_asked_for_is_given_ever_less() {
    let mut random = StdRng::seed_from_u64(seed());
    for (workers, shards) in [(1, 10), (2, 11), (4, 15)] {
        let mut world = World::new(random.random(), shards);
        for _ in 0..workers {
            world.join(Kind::Able);
        }
        world.settle("start");
        world.join(Kind::Refuser);
        let first = world.moves_in(30);
        let later = world.moves_in(100);
        println!("{workers} workers, {shards} shards: {first} takes, then {later}");
        assert!(later <= 6 * workers, "{later} takes in 100 leases");
        world.settle("end");
    }
}
