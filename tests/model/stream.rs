//! The stream: its listing, the rows of its shards, and which of them this worker reads. Mirrors
//! `src/run/stream.rs` with `forgotten.rs`, `src/run/discovery.rs` and `src/run/gone.rs`. Who gets which shard is left to
//! the dice: `lease::share` is about evenness, and nothing here may depend on it.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::future::poll_fn;
use std::rc::Rc;
use std::task::Poll;

use farshore::lease::doubts::{Range, on_take};
use farshore::lease::row::{ShardRow, TRIM_HORIZON};
use farshore::stream::lineage::{Plan, Tracked, deletable, plan};
use farshore::stream::reader::Position;
use farshore::stream::{Shard, ShardId};

use super::lease::Lease;
use super::shard::{Ended, consume, create_row};
use super::sim::{Alarm, Bell, Later, Ms, Signal, note, ready, sleep};
use super::source;
use super::state::{self, Change, Unknown};
use super::worker::{Snapshot, Worker};
use super::world::{LATE_EFFECT_DURATION, stumble};

const DISCOVER_EVERY: Ms = 8_000;

/// A complete listing (mirrors `run::discovery::Listed`).
struct Listed {
    shards: Vec<Shard>,
    began: Ms,
    number: u64,
}

/// Mirrors `run::discovery::Discovery`.
#[derive(Default)]
pub struct Discovery {
    last: RefCell<Option<Rc<Listed>>>,
    soon: Cell<bool>,
    bell: Bell,
}

/// Lists the stream for ever (mirrors `run::discovery::Task`).
pub async fn discover(worker: Rc<Worker>) {
    let sim = &worker.world.sim;
    let discovery = &worker.discovery;
    loop {
        let began = sim.now();
        let mut next = began + sim.between(200, 2_000);
        if let Ok(shards) = source::list(&worker.world).await {
            let last = discovery.last.borrow().clone();
            let number = last.map_or(1, |last| last.number + 1);
            let listed = Listed {
                shards,
                began,
                number,
            };
            *discovery.last.borrow_mut() = Some(Rc::new(listed));
            worker.changed.ring(sim);
            next = began + sim.between(DISCOVER_EVERY * 8 / 10, DISCOVER_EVERY * 12 / 10);
        }
        let mut alarm = Alarm::default();
        // Listings are paced.
        sleep(sim, 125).await;
        poll_fn(|_| {
            discovery.bell.wait(sim);
            ready(discovery.soon.get() || alarm.is_due(sim, next))
        })
        .await;
        discovery.soon.set(false);
    }
}

impl Discovery {
    fn list_soon(&self, worker: &Worker) {
        self.soon.set(true);
        self.bell.ring(&worker.world.sim);
    }
}

/// Mirrors `run::stream::Stream`.
struct Stream {
    worker: Rc<Worker>,
    first_seen: BTreeMap<ShardId, Ms>,
    gone: BTreeSet<ShardId>,
    /// The number of the listing after which each shard was asked about.
    asked: BTreeMap<ShardId, u64>,
    lacking: BTreeMap<ShardId, u64>,
    retry: Option<Ms>,
    planned: Option<Rc<Planned>>,
}

/// What was planned last, and from what.
struct Planned {
    shards: Vec<Rc<ShardRow>>,
    listed: Rc<Listed>,
    gone: BTreeSet<ShardId>,
    tracked: BTreeMap<ShardId, Tracked>,
    plan: Plan,
    deletable: BTreeSet<ShardId>,
}

impl Planned {
    /// Whether the same would be planned again: a renewal changes no plan.
    fn holds(
        &self,
        shards: &[Rc<ShardRow>],
        listed: &Rc<Listed>,
        gone: &BTreeSet<ShardId>,
    ) -> bool {
        let kind = |row: &ShardRow| (row.checkpoint == TRIM_HORIZON, row.is_finished());
        self.listed.shards == listed.shards
            && self.gone == *gone
            && self.shards.len() == shards.len()
            && self.shards.iter().zip(shards).all(|(old, new)| {
                Rc::ptr_eq(old, new) || (old.shard_id == new.shard_id && kind(old) == kind(new))
            })
    }
}

/// Mirrors `run::stream::follow_stream`.
pub async fn follow_stream(worker: &Rc<Worker>) {
    let sim = &worker.world.sim;
    let mut stream = Stream {
        worker: Rc::clone(worker),
        first_seen: BTreeMap::new(),
        gone: BTreeSet::new(),
        asked: BTreeMap::new(),
        lacking: BTreeMap::new(),
        retry: None,
        planned: None,
    };
    loop {
        let snapshot = worker.snapshot();
        let listed = worker.discovery.last.borrow().clone();
        if snapshot.read {
            match stream.step(&snapshot).await {
                Ok(()) => stream.retry = None,
                Err(Unknown) => stream.retry = Some(sim.now() + sim.between(100, 2_000)),
            }
        }
        let mut alarm = Alarm::default();
        poll_fn(|_| {
            worker.ended_bell.wait(sim);
            let last = worker.discovery.last.borrow();
            let number = |listed: Option<&Rc<Listed>>| listed.map(|listed| listed.number);
            ready(
                worker.stop.look(sim)
                    || !worker.ended.borrow().is_empty()
                    || worker.has_changed(&snapshot)
                    || number(last.as_ref()) != number(listed.as_ref())
                    || stream.retry.is_some_and(|at| alarm.is_due(sim, at)),
            )
        })
        .await;
        note_ended(worker);
        if worker.stop.is_set() {
            break;
        }
    }
    // Every shard's task is asked to drain as well.
    while !worker.drains.borrow().is_empty() {
        poll_fn(|_| {
            worker.ended_bell.wait(sim);
            ready(!worker.ended.borrow().is_empty())
        })
        .await;
        note_ended(worker);
    }
}

fn note_ended(worker: &Worker) {
    for (key, ended) in worker.ended.borrow_mut().drain(..) {
        note!(worker.world, "p{}: {key} left: {ended:?}", worker.id);
        worker.drains.borrow_mut().remove(&key);
        worker.rescan();
    }
}

impl Stream {
    /// Mirrors `Stream::step`. Every start is the oldest record here, so there is no stream row.
    async fn step(&mut self, snapshot: &Snapshot) -> Result<(), Unknown> {
        let worker = Rc::clone(&self.worker);
        let Some(listed) = worker.discovery.last.borrow().clone() else {
            return Ok(());
        };
        let planned = self.plan(snapshot, &listed);
        let create = &planned.plan.create;
        for shard in create {
            create_row(&worker, &shard.id, shard.parent.as_ref()).await?;
        }
        if !create.is_empty() {
            worker.rescan();
        }
        self.take_share(snapshot, &planned.plan.startable).await?;
        self.look_for_gone(snapshot, &planned, &listed).await
    }

    fn plan(&mut self, snapshot: &Snapshot, listed: &Rc<Listed>) -> Rc<Planned> {
        let shards = &snapshot.shards;
        if let Some(planned) = &self.planned
            && planned.holds(shards, listed, &self.gone)
        {
            return Rc::clone(planned);
        }
        let tracked: BTreeMap<ShardId, Tracked> = shards
            .iter()
            .map(|row| (row.shard(), row.tracked()))
            .collect();
        let now = self.worker.world.sim.now();
        self.first_seen.retain(|id, _| tracked.contains_key(id));
        for id in tracked.keys() {
            self.first_seen.entry(id.clone()).or_insert(now);
        }
        let planned = Rc::new(Planned {
            shards: shards.clone(),
            gone: self.gone.clone(),
            plan: plan(&listed.shards, true, &tracked, &self.gone),
            deletable: deletable(&listed.shards, &tracked),
            tracked,
            listed: Rc::clone(listed),
        });
        self.planned = Some(Rc::clone(&planned));
        planned
    }

    /// Mirrors `Stream::take_share`, and a handover now and then.
    async fn take_share(
        &mut self,
        snapshot: &Snapshot,
        startable: &BTreeSet<ShardId>,
    ) -> Result<(), Unknown> {
        let worker = Rc::clone(&self.worker);
        let world = &worker.world;
        for id in startable {
            if worker.stop.is_set() {
                break;
            }
            let Some(row) = snapshot.shard(id) else {
                continue;
            };
            let drain = worker.drains.borrow().get(&row.lease_key).cloned();
            match drain {
                Some(drain) if world.fate(world.rates.handed_over) => {
                    note!(world, "p{}: {id} is to be handed over", worker.id);
                    world.count(|counts| counts.handovers += 1);
                    drain.set(&world.sim);
                }
                // A shard may be somebody else's share.
                None if snapshot.takeable.contains(&row.lease_key) && !world.sim.chance(300) => {
                    start_shard(&worker, row).await?;
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Mirrors `Stream::look_for_gone`, `settled_parents` and `Gone`.
    async fn look_for_gone(
        &mut self,
        snapshot: &Snapshot,
        planned: &Planned,
        listed: &Listed,
    ) -> Result<(), Unknown> {
        let worker = Rc::clone(&self.worker);
        let Planned {
            tracked,
            plan,
            deletable,
            ..
        } = planned;
        let is_settled = |id: &ShardId| {
            self.first_seen
                .get(id)
                .is_some_and(|seen| *seen < listed.began)
        };
        let mut about: BTreeSet<ShardId> = tracked
            .iter()
            .filter_map(|(id, row)| Some((id, row.parent.as_ref()?)))
            .filter(|(id, parent)| plan.missing_parents.contains(*parent) && is_settled(id))
            .map(|(_, parent)| parent.clone())
            .collect();
        if about.len() < plan.missing_parents.len() {
            worker.discovery.list_soon(&worker);
        }
        self.lacking.retain(|id, _| deletable.contains(id));
        for id in deletable {
            let first = *self.lacking.entry(id.clone()).or_insert(listed.number);
            let in_doubt = snapshot.doubts.iter().any(|doubt| doubt.shard_id == id.0);
            if listed.number > first && !in_doubt {
                about.insert(id.clone());
            }
        }
        self.ask(&about, listed.number).await?;
        for id in deletable.intersection(&self.gone) {
            if let Some(row) = snapshot.shard(id) {
                let change = Change::DeleteShard((**row).clone());
                state::write(&worker.world, worker.id, change).await?;
                worker.rescan();
            }
        }
        Ok(())
    }

    /// Mirrors `Gone::ask`: each shard once a listing; what was known of others is forgotten.
    async fn ask(&mut self, about: &BTreeSet<ShardId>, number: u64) -> Result<(), Unknown> {
        let worker = &self.worker;
        self.gone.retain(|shard| about.contains(shard));
        self.asked.retain(|shard, _| about.contains(shard));
        for shard in about {
            let last = self.asked.entry(shard.clone()).or_default();
            if *last >= number || self.gone.contains(shard) {
                continue;
            }
            *last = number;
            if source::is_gone(&worker.world, shard).await == Ok(true) {
                worker.world.count(|counts| counts.gone += 1);
                self.gone.insert(shard.clone());
                worker.rescan();
            }
        }
        Ok(())
    }
}

/// Mirrors `Stream::start_shard`.
async fn start_shard(worker: &Rc<Worker>, row: &Rc<ShardRow>) -> Result<(), Unknown> {
    let world = &worker.world;
    let sim = &world.sim;
    let Some(position) = row.position() else {
        return Ok(());
    };
    let before = (**row).clone();
    let Some(lease) = Lease::take(world, worker.id, before, &worker.name).await? else {
        return Ok(());
    };
    stumble(world, worker.id).await;
    let now = sim.wall_ms(worker.id);
    let inherited = on_take(row, now, now, LATE_EFFECT_DURATION);
    let key = row.lease_key.clone();
    let drain = Rc::new(Signal::default());
    if worker.stop.is_set() {
        drain.set(sim);
    }
    let drains = &worker.drains;
    drains.borrow_mut().insert(key.clone(), Rc::clone(&drain));
    let shard = Rc::clone(worker);
    sim.spawn(worker.id, async move {
        let ended = keep_and_consume(&shard, lease, position, inherited, drain).await;
        shard.ended.borrow_mut().push_back((key, ended));
        shard.ended_bell.ring(&shard.world.sim);
    });
    Ok(())
}

/// Renewal goes on while the shard drains, and ends with it. A task that shows no more life is
/// dropped as it stands (mirrors `vital::beyond_repair`).
async fn keep_and_consume(
    worker: &Rc<Worker>,
    lease: Rc<Lease>,
    position: Position,
    inherited: Option<Range>,
    drain: Rc<Signal>,
) -> Ended {
    let world = &worker.world;
    let sim = &world.sim;
    let dies_at = world
        .fate(world.rates.dies)
        .then(|| sim.now() + sim.between(0, 20_000));
    let renewed = Rc::clone(&lease);
    let mut keep: Option<Later<()>> = Some(Box::pin(async move { renewed.keep().await }));
    let mut consume = Box::pin(consume(
        Rc::clone(worker),
        lease,
        position,
        inherited,
        drain,
    ));
    let mut alarm = Alarm::default();
    poll_fn(|context| {
        if let Poll::Ready(ended) = consume.as_mut().poll(context) {
            return Poll::Ready(ended);
        }
        if let Some(future) = &mut keep
            && future.as_mut().poll(context).is_ready()
        {
            keep = None;
        }
        if dies_at.is_some_and(|at| alarm.is_due(sim, at)) {
            world.count(|counts| counts.died += 1);
            return Poll::Ready(Ended::Lost);
        }
        Poll::Pending
    })
    .await
}
