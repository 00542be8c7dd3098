//! The whole: source, state table, replica, hosts and their trouble; what must hold all the time, and
//! in the end.

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use std::time::Duration;

use farshore::lease::row::ShardRow;

use super::counts::Counts;
use super::lease::Lease;
use super::replica::Replica;
use super::sim::{Ms, ProcessId, SYSTEM, Sim, Tracing, note, sleep};
use super::source::{self, Key, Source};
use super::state::{State, standing};
use super::worker::Worker;

/// Of a lease.
pub const DURATION: Ms = 10_000;
pub const DURATION_DURATION: Duration = Duration::from_millis(DURATION as u64);
/// How long a write that left may take effect: `leases.late_effect`.
pub const LATE_EFFECT: Ms = 30_000;
pub const LATE_EFFECT_DURATION: Duration = Duration::from_millis(LATE_EFFECT as u64);
/// A process stands still for at most this long.
pub const LONGEST_PAUSE: Ms = LATE_EFFECT + 8_000;
/// How far a wall clock is off at most.
pub const SKEW: Ms = 1_000;
/// After the trouble everything must come to rest within this.
const REST: Ms = 20 * (LATE_EFFECT + DURATION);

/// How often something goes wrong, in per mille of its occasions.
#[derive(Debug, Clone, Copy)]
pub struct Rates {
    pub writes_fail: u64,
    pub state_fails: u64,
    pub source_fails: u64,
    pub listing_misses: u64,
    /// A shard is drained for another worker.
    pub handed_over: u64,
    /// The task of a shard ends by itself.
    pub dies: u64,
    /// A process stands still between two steps that belong together.
    pub stumbles: u64,
}

pub struct World {
    pub sim: Sim,
    pub rates: Rates,
    pub keys: Key,
    pub coalesce: bool,
    pub checkpoint_every: Ms,
    pub source: RefCell<Source>,
    pub state: RefCell<State>,
    pub replica: RefCell<Replica>,
    /// All leases that tasks believe in.
    pub leases: RefCell<Vec<Weak<Lease>>>,
    /// Doubt, end and holder of all claims.
    pub claims: RefCell<Vec<(String, Ms, ProcessId)>>,
    counts: RefCell<Counts>,
    troubled: Cell<bool>,
    doubts: Cell<u64>,
    hosts: RefCell<Vec<Rc<Worker>>>,
    rested: Cell<bool>,
}

/// How a run ended.
pub struct Outcome {
    pub counts: Counts,
    pub failure: Option<String>,
    pub last_events: Vec<String>,
}

/// One seed, one run.
pub fn run(seed: u64, tracing: Tracing) -> Outcome {
    let sim = Sim::new(seed, tracing);
    let rate = |often: u64| [0, often / 4, often][sim.below(3) as usize];
    let rates = Rates {
        writes_fail: rate(400),
        state_fails: rate(150),
        source_fails: rate(200),
        listing_misses: rate(300),
        handed_over: rate(40),
        dies: rate(100),
        stumbles: rate(20),
    };
    let keys = sim.between(6, 10) as Key;
    let source = Source::new(keys, sim.between(1, 3) as usize, sim.chance(300));
    let world = Rc::new(World {
        keys,
        rates,
        coalesce: sim.chance(700),
        checkpoint_every: sim.between(500, 4_000),
        source: RefCell::new(source),
        state: RefCell::default(),
        replica: RefCell::default(),
        leases: RefCell::default(),
        claims: RefCell::default(),
        counts: RefCell::default(),
        troubled: Cell::new(true),
        doubts: Cell::new(0),
        hosts: RefCell::default(),
        rested: Cell::new(false),
        sim,
    });
    note!(world, "seed {seed}: {rates:?}");
    world.sim.spawn(SYSTEM, source::live(Rc::clone(&world)));
    world.sim.spawn(SYSTEM, direct(Rc::clone(&world)));
    world.sim.run(&world);
    if !world.rested.get() {
        world
            .sim
            .fail("the run ended before it came to rest".to_owned());
    }
    let outcome = world.outcome();
    world.hosts.borrow_mut().clear();
    world.sim.end();
    outcome
}

impl World {
    /// Whether things still go wrong.
    pub fn trouble(&self) -> bool {
        self.troubled.get()
    }

    /// Whether something that happens `per_mille` of the time goes wrong now.
    pub fn fate(&self, per_mille: u64) -> bool {
        self.trouble() && self.sim.chance(per_mille)
    }

    pub fn count(&self, count: impl FnOnce(&mut Counts)) {
        count(&mut self.counts.borrow_mut());
    }

    pub fn next_doubt(&self) -> u64 {
        self.doubts.set(self.doubts.get() + 1);
        self.doubts.get()
    }

    /// A checkpoint follows the data: of every record before it, it or a later one of its key was
    /// applied at some time.
    pub fn check_checkpoint(&self, from: u64, row: &ShardRow) {
        let source = self.source.borrow();
        let log = &source.shards[source.number(&row.shard())];
        let until = standing(row);
        let replica = self.replica.borrow();
        let passed = log.records.iter();
        for record in passed.filter(|record| from < record.number && record.number <= until) {
            let applied = replica.applied.get(&record.key).copied().unwrap_or(0);
            if applied < record.number {
                let (shard, number) = (&row.shard_id, record.number);
                let what =
                    format!("the checkpoint of {shard} passes {number}, which never arrived");
                self.sim.fail(what);
            }
        }
        if row.is_finished() && log.closed_at.is_none() {
            self.sim
                .fail(format!("{} is finished and still open", row.shard_id));
        }
    }

    /// Whether everything is applied and nothing can happen any more.
    fn is_quiet(&self) -> Result<(), String> {
        let state = self.state.borrow();
        if let Some(doubt) = state.doubts().next() {
            return Err(format!("a doubt about {} is not settled", doubt.shard_id));
        }
        if state.under_way > 0 || self.replica.borrow().under_way > 0 {
            return Err("a call is still under way".to_owned());
        }
        for log in self
            .source
            .borrow()
            .shards
            .iter()
            .filter(|log| !log.trimmed)
        {
            let id = &log.id;
            let Some(row) = state.shard(id) else {
                return Err(format!("{id} has no row"));
            };
            let last = log.records.last().map_or(0, |record| record.number);
            let is_done = match log.closed_at {
                Some(_) => row.is_finished(),
                None => standing(row) == last,
            };
            if !is_done {
                return Err(format!("{id} stands at {}", row.checkpoint));
            }
        }
        Ok(())
    }

    /// The promise: every item is as in the source.
    fn check_equal(&self) {
        let (source, replica) = (self.source.borrow(), self.replica.borrow());
        for (key, value) in &source.items {
            let copy = replica.items.get(key).copied().flatten();
            if copy != *value {
                let what = format!("key {key} is {copy:?} in the replica, {value:?} in the source");
                self.sim.fail(what);
            }
        }
    }

    fn outcome(&self) -> Outcome {
        let source = self.source.borrow();
        let mut counts = *self.counts.borrow();
        counts.seeds = 1;
        counts.events = self.sim.events.get();
        counts.records = source.records();
        counts.shards = source.shards.len() as u64;
        counts.trimmed = source.shards.iter().filter(|log| log.trimmed).count() as u64;
        Outcome {
            counts,
            failure: self.sim.failure(),
            last_events: self.sim.last_events(),
        }
    }
}

/// Starts the hosts, lets trouble go on for a while, then waits for rest and compares.
async fn direct(world: Rc<World>) {
    let sim = &world.sim;
    let hosts = sim.between(1, 4) as usize;
    for host in 0..hosts {
        let worker = Worker::start(&world, host);
        world.hosts.borrow_mut().push(worker);
        sim.spawn(SYSTEM, disturb(Rc::clone(&world), host));
    }
    sleep(sim, sim.between(30_000, 120_000)).await;
    note!(world, "the trouble is over");
    world.troubled.set(false);
    for host in 0..hosts {
        let worker = Rc::clone(&world.hosts.borrow()[host]);
        sim.resume(worker.id);
        // Some stay away for good, but not all.
        let stays_away = host > 0 && sim.chance(300);
        if stays_away {
            sim.kill(worker.id);
        } else if !sim.is_alive(worker.id) || worker.stop.is_set() {
            sim.kill(worker.id);
            let worker = Worker::start(&world, host);
            world.hosts.borrow_mut()[host] = worker;
        }
    }
    let deadline = sim.now() + REST;
    loop {
        sleep(sim, 500).await;
        match world.is_quiet() {
            Ok(()) => break,
            Err(why) if sim.now() > deadline => {
                return sim.fail(format!("it never comes to rest: {why}"));
            }
            Err(_) => {}
        }
    }
    world.check_equal();
    world.rested.set(true);
    for worker in world.hosts.borrow().iter() {
        sim.kill(worker.id);
    }
}

/// The process stands still from now on: for a moment, for longer than a lease, for longer than a
/// write may take effect.
fn pause(world: &World, id: ProcessId) {
    let sim = &world.sim;
    let length = match sim.below(6) {
        0..2 => sim.between(100, 2_000),
        2..4 => sim.between(2_000, DURATION + 5_000),
        4 => sim.between(DURATION, LATE_EFFECT),
        _ => sim.between(LATE_EFFECT, LONGEST_PAUSE),
    };
    note!(world, "p{id} stands still for {length} ms");
    world.count(|counts| counts.pauses += 1);
    sim.pause(id, length);
}

/// Between two statements of the real code, where a pause is worst.
pub async fn stumble(world: &World, id: ProcessId) {
    if world.fate(world.rates.stumbles) {
        pause(world, id);
        sleep(&world.sim, 1).await;
    }
}

/// What a host suffers: pauses, crashes and stops, and a new start after both.
async fn disturb(world: Rc<World>, host: usize) {
    let sim = &world.sim;
    loop {
        sleep(sim, sim.between(3_000, 40_000)).await;
        if !world.trouble() {
            return;
        }
        let worker = Rc::clone(&world.hosts.borrow()[host]);
        let id = worker.id;
        match sim.below(10) {
            0..6 => {
                pause(&world, id);
            }
            6..8 => {
                note!(world, "p{id} is killed");
                world.count(|counts| counts.crashes += 1);
                sim.kill(id);
            }
            _ => {
                note!(world, "p{id} is asked to stop");
                world.count(|counts| counts.stops += 1);
                worker.ask_to_stop();
            }
        }
        while sim.is_alive(id) && worker.stop.is_set() && world.trouble() {
            sleep(sim, 500).await;
        }
        if !sim.is_alive(id) && world.trouble() {
            sleep(sim, sim.between(0, 15_000)).await;
            if world.trouble() {
                let worker = Worker::start(&world, host);
                world.hosts.borrow_mut()[host] = worker;
            }
        }
    }
}
