//! The source: items, and the shards that say how they came about.
//!
//! Every key belongs to one open shard. A split shows its children first and closes the parent a
//! moment later, as the service may; from then on the keys belong to the children.

use std::collections::BTreeMap;
use std::rc::Rc;

use farshore::stream::reader::Position;
use farshore::stream::sequence::SequenceNumber;
use farshore::stream::{Shard, ShardId};

use super::sim::{Ms, note, sleep};
use super::world::{LATE_EFFECT, LONGEST_PAUSE, World};

pub type Key = u8;
/// What a table holds under a key; every put has a number of its own.
pub type Value = Option<u32>;
/// Place of a shard in [`Source::shards`].
pub type ShardNo = usize;

pub const ARN: &str = "arn:aws:dynamodb:us-east-1:1:table/t/stream/l";
const SHARDS_MAX: usize = 12;
/// A listing shows a new shard at most this late.
const LISTED_LATE: Ms = 4_000;
/// A closed shard is kept at least this long. The service keeps it a day: longer than any process
/// stands still and any call may take effect, and so is this.
const KEPT: Ms = LONGEST_PAUSE + LATE_EFFECT + 1_000;

#[derive(Debug, Clone, Copy)]
pub struct Record {
    /// Its sequence number, which is its place among all records and one more.
    pub number: u64,
    pub key: Key,
    pub value: Value,
    /// Whole seconds, as the service has them.
    pub created_ms: Ms,
}

pub struct Log {
    pub id: ShardId,
    pub parent: Option<ShardNo>,
    pub children: Vec<ShardNo>,
    pub records: Vec<Record>,
    listed_from: Ms,
    pub closed_at: Option<Ms>,
    pub trimmed: bool,
}

pub struct Source {
    pub items: BTreeMap<Key, Value>,
    pub shards: Vec<Log>,
    owner: BTreeMap<Key, ShardNo>,
    /// All of them, by their numbers.
    records: Vec<Record>,
    values: u32,
}

/// One answer of a shard (mirrors `stream::reader::Page`).
pub struct Page {
    pub records: Vec<Record>,
    pub end: bool,
}

/// What is left of a shard's text: its number.
pub fn number_of(sequence: &SequenceNumber) -> u64 {
    sequence.as_str().parse().unwrap_or(0)
}

pub fn sequence_of(number: u64) -> SequenceNumber {
    SequenceNumber::parse(&format!("{number:021}")).expect("digits alone")
}

/// The number of the last record that `position` leaves behind it.
pub fn passed(position: &Position) -> u64 {
    match position {
        Position::After(sequence) => number_of(sequence),
        Position::TrimHorizon | Position::AtTimestamp(_) => 0,
    }
}

impl Source {
    /// `keys` keys in `shards` shards; those may come from one that was trimmed long ago.
    pub fn new(keys: Key, shards: usize, have_parent: bool) -> Self {
        let mut source = Self {
            items: BTreeMap::new(),
            shards: Vec::new(),
            owner: BTreeMap::new(),
            records: Vec::new(),
            values: 0,
        };
        let parent = have_parent.then(|| source.open(None, 0));
        if let Some(parent) = parent {
            source.shards[parent].closed_at = Some(0);
            source.shards[parent].trimmed = true;
        }
        let open: Vec<ShardNo> = (0..shards).map(|_| source.open(parent, 0)).collect();
        for key in 0..keys {
            source.items.insert(key, None);
            source.owner.insert(key, open[usize::from(key) % shards]);
        }
        source
    }

    fn open(&mut self, parent: Option<ShardNo>, listed_from: Ms) -> ShardNo {
        let shard = self.shards.len();
        self.shards.push(Log {
            id: ShardId(format!("shardId-{shard:03}")),
            parent,
            children: Vec::new(),
            records: Vec::new(),
            listed_from,
            closed_at: None,
            trimmed: false,
        });
        if let Some(parent) = parent {
            self.shards[parent].children.push(shard);
        }
        shard
    }

    pub fn number(&self, id: &ShardId) -> ShardNo {
        let found = self.shards.iter().position(|log| log.id == *id);
        found.expect("nothing but the source names shards")
    }

    /// Writes an item. A delete of nothing leaves no record.
    fn write(&mut self, key: Key, put: bool, now: Ms) {
        self.values += 1;
        let value = put.then_some(self.values);
        if value.is_none() && self.items[&key].is_none() {
            return;
        }
        self.items.insert(key, value);
        let record = Record {
            number: self.records.len() as u64 + 1,
            key,
            value,
            created_ms: now / 1_000 * 1_000,
        };
        self.records.push(record);
        self.shards[self.owner[&key]].records.push(record);
    }

    /// The parent ends, and its keys go to the children.
    fn close(&mut self, parent: ShardNo, now: Ms) {
        self.shards[parent].closed_at = Some(now);
        let children = self.shards[parent].children.clone();
        let keys = self.owner.iter_mut().filter(|(_, owner)| **owner == parent);
        for (at, (_, owner)) in keys.enumerate() {
            *owner = children[at % children.len()];
        }
    }

    /// Whether it takes records: not closed, and its parent is.
    fn is_in_use(&self, shard: ShardNo) -> bool {
        let log = &self.shards[shard];
        let parent = log.parent.map(|parent| &self.shards[parent]);
        log.closed_at.is_none() && parent.is_none_or(|parent| parent.closed_at.is_some())
    }

    pub fn records(&self) -> u64 {
        self.records.len() as u64
    }

    /// The record of this number.
    pub fn record(&self, number: u64) -> Record {
        self.records[number as usize - 1]
    }

    /// A page of at most `most` records after `after`; `None` when the service does not know the
    /// shard any more.
    pub fn read(&self, shard: ShardNo, after: u64, most: usize) -> Option<Page> {
        let log = &self.shards[shard];
        if log.trimmed {
            return None;
        }
        let from = log.records.partition_point(|record| record.number <= after);
        let to = log.records.len().min(from + most);
        Some(Page {
            records: log.records[from..to].to_vec(),
            end: to == log.records.len() && log.closed_at.is_some(),
        })
    }

    fn as_listed(&self, shard: ShardNo) -> Shard {
        let log = &self.shards[shard];
        Shard {
            id: log.id.clone(),
            parent: log.parent.map(|parent| self.shards[parent].id.clone()),
        }
    }
}

/// A listing of all shards; some may be missing (mirrors `stream::listing::Lister::all`).
pub async fn list(world: &Rc<World>) -> Result<Vec<Shard>, ()> {
    call(world).await?;
    let source = world.source.borrow();
    let listed = (0..source.shards.len())
        .filter(|shard| {
            let log = &source.shards[*shard];
            let late = world.trouble() && world.sim.now() < log.listed_from;
            !log.trimmed && !late && !world.fate(world.rates.listing_misses)
        })
        .map(|shard| source.as_listed(shard));
    Ok(listed.collect())
}

/// The children of an ended shard, as far as they are listed yet.
pub async fn children(world: &Rc<World>, parent: &ShardId) -> Result<Vec<Shard>, ()> {
    let parent = world.source.borrow().number(parent);
    let listed = list(world).await?;
    let source = world.source.borrow();
    let id = &source.shards[parent].id;
    Ok(listed
        .into_iter()
        .filter(|shard| shard.parent.as_ref() == Some(id))
        .collect())
}

/// Whether the service itself no longer knows the shard.
pub async fn is_gone(world: &Rc<World>, shard: &ShardId) -> Result<bool, ()> {
    call(world).await?;
    let source = world.source.borrow();
    Ok(source.shards[source.number(shard)].trimmed)
}

/// The item under a key, read consistently.
pub async fn item(world: &Rc<World>, key: Key) -> Value {
    sleep(&world.sim, world.sim.between(1, 15)).await;
    let value = world.source.borrow().items[&key];
    sleep(&world.sim, world.sim.between(1, 15)).await;
    value
}

async fn call(world: &Rc<World>) -> Result<(), ()> {
    sleep(&world.sim, world.sim.between(2, 40)).await;
    match world.fate(world.rates.source_fails) {
        true => Err(()),
        false => Ok(()),
    }
}

/// The application that writes to the source, and the service that splits and trims its shards.
pub async fn live(world: Rc<World>) {
    let sim = &world.sim;
    while world.trouble() {
        sleep(sim, sim.between(20, 900)).await;
        match sim.below(100) {
            0..6 => split(&world),
            6..10 => trim(&world),
            // Several changes of one key at once: something to coalesce.
            10..25 => {
                let key = sim.below(world.keys.into()) as Key;
                for _ in 0..sim.between(2, 4) {
                    write(&world, key);
                }
            }
            _ => write(&world, sim.below(world.keys.into()) as Key),
        }
    }
}

fn write(world: &World, key: Key) {
    let put = world.sim.chance(750);
    let mut source = world.source.borrow_mut();
    source.write(key, put, world.sim.now());
    note!(
        world,
        "source: key {key} = {:?}, record {} in shard {}",
        source.items[&key],
        source.records(),
        source.owner[&key]
    );
}

/// A split into two, or a rotation into one.
fn split(world: &Rc<World>) {
    let sim = &world.sim;
    let mut source = world.source.borrow_mut();
    let open: Vec<ShardNo> = (0..source.shards.len())
        .filter(|shard| source.is_in_use(*shard))
        .filter(|shard| source.shards[*shard].children.is_empty())
        .collect();
    let children = sim.between(1, 2) as usize;
    if source.shards.len() + children > SHARDS_MAX {
        return;
    }
    let Some(parent) = sim.pick(&open) else {
        return;
    };
    for _ in 0..children {
        let late = sim.between(0, LISTED_LATE);
        source.open(Some(parent), sim.now() + late);
    }
    let at = sim.now() + sim.between(0, 3_000);
    note!(world, "source: shard {parent} gets {children} children");
    sim.at(at, move |world| {
        note!(world, "source: shard {parent} is closed");
        world.source.borrow_mut().close(parent, world.sim.now());
    });
}

/// Forgets a closed shard that was applied to its end, with nothing of it in doubt: what is
/// forgotten before is a gap, and none of this model's.
fn trim(world: &World) {
    let sim = &world.sim;
    let mut source = world.source.borrow_mut();
    let state = world.state.borrow();
    let old: Vec<ShardNo> = (0..source.shards.len())
        .filter(|shard| {
            let log = &source.shards[*shard];
            let closed = log.closed_at.is_some_and(|at| at + KEPT < sim.now());
            closed && !log.trimmed && state.is_settled(&log.id)
        })
        .collect();
    if let Some(shard) = sim.pick(&old) {
        note!(world, "source: shard {shard} is trimmed");
        source.shards[shard].trimmed = true;
    }
}
