//! A process: reads the state table, repairs doubts, follows the stream, and ends. Mirrors `src/run.rs`
//! and `src/run/rows.rs`.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::future::poll_fn;
use std::rc::Rc;

use farshore::lease::row::{DoubtRow, ShardRow};
use farshore::lease::rules::Observer;
use farshore::stream::ShardId;

use super::doubts::repair_doubts;
use super::shard::Ended;
use super::sim::{Alarm, Bell, Ms, ProcessId, Signal, note, ready};
use super::state;
use super::stream::{Discovery, discover, follow_stream};
use super::world::{DURATION, DURATION_DURATION, SKEW, World};

/// Mirrors `worker.shutdown_grace`.
const GRACE: Ms = 25_000;
/// The state table is read this often, and when something of it is known to have changed.
const READ_EVERY: Ms = DURATION / 4;

/// The state table as read at one moment (mirrors `run::rows::Snapshot`).
#[derive(Default)]
pub struct Snapshot {
    pub shards: Vec<Rc<ShardRow>>,
    pub doubts: Vec<Rc<DoubtRow>>,
    pub takeable: BTreeSet<String>,
    pub read: bool,
}

impl Snapshot {
    pub fn shard(&self, id: &ShardId) -> Option<&Rc<ShardRow>> {
        self.shards.iter().find(|row| row.shard_id == id.0)
    }
}

pub struct Worker {
    pub world: Rc<World>,
    pub id: ProcessId,
    /// This process start, as lease rows name it.
    pub name: String,
    pub stop: Signal,
    snapshot: RefCell<Rc<Snapshot>>,
    pub changed: Bell,
    rescan: Cell<bool>,
    rescanned: Bell,
    /// Tasks of shards that ended.
    pub ended: RefCell<VecDeque<(String, Ended)>>,
    pub ended_bell: Bell,
    repaired: Signal,
    /// What makes each shard drain that a task of this process works on.
    pub drains: RefCell<BTreeMap<String, Rc<Signal>>>,
    pub discovery: Discovery,
}

impl Worker {
    /// Starts a process on a host.
    pub fn start(world: &Rc<World>, host: usize) -> Rc<Self> {
        let sim = &world.sim;
        let id = sim.new_process(sim.between(-SKEW, SKEW));
        let worker = Rc::new(Self {
            world: Rc::clone(world),
            id,
            name: format!("host-{host}#{id}"),
            stop: Signal::default(),
            snapshot: RefCell::default(),
            changed: Bell::default(),
            rescan: Cell::new(false),
            rescanned: Bell::default(),
            ended: RefCell::default(),
            ended_bell: Bell::default(),
            repaired: Signal::default(),
            drains: RefCell::default(),
            discovery: Discovery::default(),
        });
        note!(world, "p{id} starts on host {host}");
        sim.spawn(id, watch_rows(Rc::clone(&worker)));
        let repairing = Rc::clone(&worker);
        sim.spawn(id, async move {
            repair_doubts(Rc::clone(&repairing)).await;
            repairing.repaired.set(&repairing.world.sim);
        });
        sim.spawn(id, discover(Rc::clone(&worker)));
        let following = Rc::clone(&worker);
        sim.spawn(id, async move {
            follow_stream(&following).await;
            let sim = &following.world.sim;
            poll_fn(|_| ready(following.repaired.look(sim))).await;
            note!(following.world, "p{id} has drained and ends");
            following.world.count(|counts| counts.drained += 1);
            sim.kill(id);
        });
        worker
    }

    /// Asks it to stop; after its grace it ends as it stands.
    pub fn ask_to_stop(&self) {
        self.stop.set(&self.world.sim);
        for drain in self.drains.borrow().values() {
            drain.set(&self.world.sim);
        }
        let id = self.id;
        self.world
            .sim
            .at(self.world.sim.now() + GRACE, move |world| {
                if world.sim.is_alive(id) && !world.sim.is_paused(id) {
                    note!(world, "p{id}: the grace ran out");
                    world.sim.kill(id);
                }
            });
    }

    pub fn snapshot(&self) -> Rc<Snapshot> {
        Rc::clone(&self.snapshot.borrow())
    }

    /// Whether there is another snapshot; otherwise the current task is woken when there is.
    pub fn has_changed(&self, seen: &Rc<Snapshot>) -> bool {
        let changed = !Rc::ptr_eq(&self.snapshot.borrow(), seen);
        if !changed {
            self.changed.wait(&self.world.sim);
        }
        changed
    }

    /// Asks for a new snapshot (mirrors `Shared::rescan`).
    pub fn rescan(&self) {
        self.rescan.set(true);
        self.rescanned.ring(&self.world.sim);
    }
}

/// Mirrors `run::rows::watch_rows`.
async fn watch_rows(worker: Rc<Worker>) {
    let sim = &worker.world.sim;
    let mut observer = Observer::default();
    loop {
        if let Ok((shards, doubts)) = state::rows(&worker.world).await {
            let now = sim.instant();
            observer.observe(shards.iter().map(|row| &**row), now);
            let takeable = shards.iter().filter(|row| {
                !row.is_finished() && observer.is_takeable(row, DURATION_DURATION, now)
            });
            let snapshot = Snapshot {
                takeable: takeable.map(|row| row.lease_key.clone()).collect(),
                shards,
                doubts,
                read: true,
            };
            *worker.snapshot.borrow_mut() = Rc::new(snapshot);
            worker.changed.ring(sim);
        }
        let until = sim.now() + READ_EVERY;
        let mut alarm = Alarm::default();
        poll_fn(|_| {
            worker.rescanned.wait(sim);
            ready(worker.rescan.get() || alarm.is_due(sim, until))
        })
        .await;
        worker.rescan.set(false);
    }
}
