//! The state table: rows, conditional writes, and calls that fail in every way a call can.

use std::collections::BTreeMap;
use std::rc::Rc;

use farshore::lease::row::{Counted, DoubtRow, ShardRow};
use farshore::stream::ShardId;

use super::sim::{Ms, ProcessId, Reply, note, sleep};
use super::source::passed;
use super::world::{LATE_EFFECT, SKEW, World};

/// A conditional write (mirrors `lease::table::StateTable`).
#[derive(Clone)]
pub enum Change {
    CreateShard(ShardRow),
    /// If the counter is still this.
    ReplaceShard(ShardRow, u64),
    /// If the counter is still the row's. One that is gone already is as good.
    DeleteShard(ShardRow),
    CreateDoubt(DoubtRow),
    /// If the counter is still this.
    ReplaceDoubt(DoubtRow, u64, Why),
    /// If the counter is still the row's. One that is gone already is as good.
    DeleteDoubt(DoubtRow),
}

/// Why a doubt's row is replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// More is in doubt.
    Grow,
    /// It is claimed, its claim is renewed, or given back.
    Claim,
}

/// The call failed; its effect is unknown.
#[derive(Debug)]
pub struct Unknown;

struct Doubt {
    row: Rc<DoubtRow>,
    /// Until when what made it a doubt may take effect; claims do not count.
    due: Ms,
}

#[derive(Default)]
pub struct State {
    pub shards: BTreeMap<String, Rc<ShardRow>>,
    doubts: BTreeMap<String, Doubt>,
    /// Calls that may still take effect.
    pub under_way: usize,
}

/// Where a checkpoint stands, SHARD_END after every record.
pub fn standing(row: &ShardRow) -> u64 {
    match row.position() {
        Some(position) => passed(&position),
        None => u64::MAX,
    }
}

impl State {
    pub fn doubts(&self) -> impl Iterator<Item = &Rc<DoubtRow>> {
        self.doubts.values().map(|doubt| &doubt.row)
    }

    pub fn doubt(&self, key: &str) -> Option<&Rc<DoubtRow>> {
        self.doubts.get(key).map(|doubt| &doubt.row)
    }

    pub fn shard(&self, id: &ShardId) -> Option<&Rc<ShardRow>> {
        self.shards.values().find(|row| row.shard_id == id.0)
    }

    /// Whether a shard is finished, with nothing of it in doubt.
    pub fn is_settled(&self, id: &ShardId) -> bool {
        self.shard(id).is_some_and(|row| row.is_finished())
            && self.doubts().all(|row| row.shard_id != id.0)
    }

    /// Carries a change out. Returns whether its condition held.
    fn apply(&mut self, world: &World, change: Change) -> bool {
        match change {
            Change::CreateShard(row) => {
                let new = !self.shards.contains_key(&row.lease_key);
                if new {
                    self.shards.insert(row.lease_key.clone(), Rc::new(row));
                }
                new
            }
            Change::ReplaceShard(row, known) => {
                let Some(old) = self.shards.get(&row.lease_key) else {
                    return false;
                };
                if old.counter() != known {
                    return false;
                }
                check_shard(world, self, old, &row);
                self.shards.insert(row.lease_key.clone(), Rc::new(row));
                true
            }
            Change::DeleteShard(row) => match self.shards.get(&row.lease_key) {
                None => true,
                Some(old) if old.counter() == row.counter() => {
                    check_deleted(world, self, old);
                    world.count(|counts| counts.rows_deleted += 1);
                    self.shards.remove(&row.lease_key);
                    true
                }
                Some(_) => false,
            },
            Change::CreateDoubt(row) => {
                world.count(|counts| counts.doubts += 1);
                let due = row.until;
                let row = Rc::new(row);
                self.doubts
                    .insert(row.lease_key.clone(), Doubt { row, due });
                true
            }
            Change::ReplaceDoubt(row, known, why) => match self.doubts.get_mut(&row.lease_key) {
                Some(old) if old.row.counter() == known => {
                    if why == Why::Grow {
                        old.due = old.due.max(row.until);
                        check_grown(world, &old.row, &row);
                    }
                    old.row = Rc::new(row);
                    true
                }
                _ => false,
            },
            Change::DeleteDoubt(row) => match self.doubts.get(&row.lease_key) {
                None => true,
                Some(old) if old.row.counter() == row.counter() => {
                    if world.sim.now() + 2 * SKEW < old.due {
                        let what = "a doubt is removed before its time";
                        world.sim.fail(format!(
                            "{what}: {} of shard {}",
                            row.lease_key, row.shard_id
                        ));
                    }
                    world.count(|counts| counts.repairs += 1);
                    self.doubts.remove(&row.lease_key);
                    true
                }
                Some(_) => false,
            },
        }
    }
}

fn check_shard(world: &World, state: &State, old: &ShardRow, new: &ShardRow) {
    let shard = &new.shard_id;
    if new.lease_counter <= old.lease_counter {
        world.sim.fail(format!("the counter of {shard} fell"));
    }
    if standing(new) < standing(old) {
        let (from, to) = (&old.checkpoint, &new.checkpoint);
        let what = format!("the checkpoint of {shard} fell from {from} to {to}");
        world.sim.fail(what);
    }
    if standing(new) > standing(old) {
        world.check_checkpoint(standing(old), new);
    }
    let taken = new.lease_owner.is_some() && new.lease_owner != old.lease_owner;
    if taken {
        world.count(|counts| counts.takes += 1);
        let source = world.source.borrow();
        let log = &source.shards[source.number(&new.shard())];
        let parent = log.parent.map(|parent| &source.shards[parent]);
        let is_finished = parent.is_none_or(|parent| match state.shard(&parent.id) {
            Some(row) => row.is_finished(),
            None => parent.trimmed,
        });
        if !is_finished {
            world
                .sim
                .fail(format!("{shard} is started before its parent is finished"));
        }
    }
}

/// A row goes only when it is finished and forgotten, with nothing of it in doubt.
fn check_deleted(world: &World, state: &State, row: &ShardRow) {
    let source = world.source.borrow();
    if !row.is_finished() || !source.shards[source.number(&row.shard())].trimmed {
        world
            .sim
            .fail(format!("the row of {} is deleted too early", row.shard_id));
    }
    if state.doubts().any(|doubt| doubt.shard_id == row.shard_id) {
        let what = format!("the row of {} is deleted, and it is in doubt", row.shard_id);
        world.sim.fail(what);
    }
}

fn check_grown(world: &World, old: &DoubtRow, new: &DoubtRow) {
    if number(new.to.as_deref()) < number(old.to.as_deref())
        || new.position().as_ref().map_or(0, passed) > old.position().as_ref().map_or(0, passed)
    {
        let what = format!(
            "a doubt about {} lost part of its range: {}..{:?} became {}..{:?}",
            old.shard_id, old.from, old.to, new.from, new.to
        );
        world.sim.fail(what);
    }
}

fn number(text: Option<&str>) -> u64 {
    text.and_then(|text| text.parse().ok()).unwrap_or(0)
}

/// How a call of the state table goes.
#[derive(Debug, Clone, Copy)]
enum Fate {
    Answered,
    /// It takes effect, and the answer is lost.
    Lost,
    Failed,
    /// It takes effect after its sender gave up.
    Late,
}

/// Makes a conditional write. Returns whether its condition held.
pub async fn write(world: &Rc<World>, process: ProcessId, change: Change) -> Result<bool, Unknown> {
    let sim = &world.sim;
    let fate = match world.fate(world.rates.state_fails) {
        true => [Fate::Lost, Fate::Failed, Fate::Late][sim.below(3) as usize],
        false => Fate::Answered,
    };
    trace(world, process, &change, fate);
    let reply = Reply::new(sim);
    let effect_at = match fate {
        Fate::Late => sim.now() + sim.between(1_500, LATE_EFFECT * 8 / 10),
        _ => sim.now() + sim.between(1, 30),
    };
    if !matches!(fate, Fate::Failed) {
        world.state.borrow_mut().under_way += 1;
        let reply = Rc::clone(&reply);
        sim.at(effect_at, move |world| {
            let mut state = world.state.borrow_mut();
            state.under_way -= 1;
            let held = state.apply(world, change);
            if matches!(fate, Fate::Answered) {
                let at = world.sim.now() + world.sim.between(1, 30);
                world
                    .sim
                    .at(at, move |world| reply.send(&world.sim, Ok(held)));
            } else {
                world.count(|counts| counts.unsure_calls += 1);
                note!(world, "state: that call without an answer: held = {held}");
            }
        });
    }
    if !matches!(fate, Fate::Answered) {
        let reply = Rc::clone(&reply);
        let at = sim.now() + sim.between(50, 1_500);
        sim.at(at, move |world| reply.send(&world.sim, Err(Unknown)));
    }
    reply.wait().await
}

fn trace(world: &World, process: ProcessId, change: &Change, fate: Fate) {
    match change {
        Change::CreateShard(row) => {
            note!(world, "p{process}: create {} ({fate:?})", row.shard_id);
        }
        Change::ReplaceShard(row, known) => note!(
            world,
            "p{process}: {} {known}+1 owner {:?} checkpoint {} ({fate:?})",
            row.shard_id,
            row.lease_owner,
            row.checkpoint.trim_start_matches('0')
        ),
        Change::DeleteShard(row) => {
            note!(world, "p{process}: delete {} ({fate:?})", row.shard_id);
        }
        Change::CreateDoubt(row) => note!(
            world,
            "p{process}: create {} of {}: {:?} after {} to {:?}/{:?} until {} ({fate:?})",
            row.lease_key,
            row.shard_id,
            row.cause,
            row.from.trim_start_matches('0'),
            row.to.as_deref().map(|to| to.trim_start_matches('0')),
            row.to_time,
            row.until
        ),
        Change::ReplaceDoubt(row, known, why) => note!(
            world,
            "p{process}: {why:?} {} {known}+1: after {} to {:?} until {} owner {:?} ({fate:?})",
            row.lease_key,
            row.from.trim_start_matches('0'),
            row.to.as_deref().map(|to| to.trim_start_matches('0')),
            row.until,
            row.lease_owner
        ),
        Change::DeleteDoubt(row) => {
            note!(world, "p{process}: delete {} ({fate:?})", row.lease_key);
        }
    }
}

/// All rows, in two pages: what changes in between may show in one and not in the other.
pub async fn rows(world: &Rc<World>) -> Result<(Vec<Rc<ShardRow>>, Vec<Rc<DoubtRow>>), Unknown> {
    let sim = &world.sim;
    sleep(sim, sim.between(1, 30)).await;
    let shards: Vec<Rc<ShardRow>> = world.state.borrow().shards.values().cloned().collect();
    sleep(sim, sim.between(1, 60)).await;
    let rows: Vec<Rc<ShardRow>> = {
        let state = world.state.borrow();
        // The second half as it is now.
        let half = shards.len() / 2;
        let second = shards.iter().skip(half);
        let second = second.filter_map(|row| state.shards.get(&row.lease_key).cloned());
        shards[..half].iter().cloned().chain(second).collect()
    };
    let doubts = world.state.borrow().doubts().cloned().collect();
    sleep(sim, sim.between(1, 20)).await;
    match world.fate(world.rates.state_fails) {
        true => Err(Unknown),
        false => Ok((rows, doubts)),
    }
}

/// One shard's row, read consistently.
pub async fn get(world: &Rc<World>, key: &str) -> Result<Option<ShardRow>, Unknown> {
    let sim = &world.sim;
    sleep(sim, sim.between(1, 20)).await;
    let row = world
        .state
        .borrow()
        .shards
        .get(key)
        .map(|row| (**row).clone());
    sleep(sim, sim.between(1, 20)).await;
    match world.fate(world.rates.state_fails) {
        true => Err(Unknown),
        false => Ok(row),
    }
}
