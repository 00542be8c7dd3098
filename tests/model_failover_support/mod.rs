//! The world of the model.

mod operator;
mod worker;

use std::collections::{BTreeMap, BTreeSet};

use farshore::lease::control::Heed;
use farshore::lease::row::{ControlRow, ShardRow, WorkerRow, state};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

const LABELS: [&str; 3] = ["a", "b", "c"];
/// A lease, in ticks of the model.
const LEASE: u64 = 10;
/// A write that was sent takes effect this many ticks later at most.
const LATE: u64 = 40;
const KEYS: u32 = 4;
const TICKS: u64 = 260;

/// What was met.
#[derive(Debug, Default, Clone, Copy)]
pub struct Counts {
    pub fences: u64,
    pub by_lease: u64,
    pub conflicts: u64,
    pub resumed: u64,
    pub late: u64,
    pub undone: u64,
    pub acknowledged: u64,
}

impl std::ops::Add for Counts {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            fences: self.fences + other.fences,
            by_lease: self.by_lease + other.by_lease,
            conflicts: self.conflicts + other.conflicts,
            resumed: self.resumed + other.resumed,
            late: self.late + other.late,
            undone: self.undone + other.undone,
            acknowledged: self.acknowledged + other.acknowledged,
        }
    }
}

/// One record of a region's stream: the value before and after, and when.
#[derive(Debug, Clone, Copy)]
struct Record {
    key: u32,
    before: u32,
    after: u32,
    at: u64,
}

/// A region: its state table and its one table of the group.
struct Region {
    control: Option<ControlRow>,
    /// By epoch, and by number: a stream made anew, or a shard found late, has a row of its own.
    shard: BTreeMap<(u64, u32), ShardRow>,
    workers: BTreeMap<String, WorkerRow>,
    items: BTreeMap<u32, u32>,
    stream: Vec<Record>,
}

/// A write on its way.
#[derive(Debug, Clone)]
struct Sent {
    epoch: u64,
    from: usize,
    to: usize,
    key: u32,
    value: u32,
    due: u64,
    last: bool,
}

#[derive(Debug, Clone, PartialEq)]
enum Role {
    Finding,
    Feed {
        epoch: u64,
        source: usize,
    },
    Idle {
        epoch: u64,
    },
    /// Its epoch is over; it drains until then.
    Draining {
        epoch: u64,
        why: Heed,
    },
}

/// A worker process.
struct Worker {
    here: usize,
    name: String,
    start: u32,
    role: Role,
    /// What it has seen, sticky, per region.
    seen: BTreeMap<usize, ControlRow>,
    /// Its lease: good until then, with the counter known.
    lease: Option<(u64, u64)>,
    term_until: u64,
    /// What was applied of the source's stream.
    applied: usize,
    checkpoint: usize,
    /// A write that was sent and not answered yet.
    open: Option<(u64, usize)>,
    /// Regions that it cannot reach.
    cut: BTreeSet<usize>,
    paused_until: u64,
    dead_until: Option<u64>,
    /// The highest epoch it has acknowledged, that its region's table must keep.
    acknowledged: u64,
}

/// Somebody who types `failover --to`.
struct Operator {
    to: usize,
    at: u64,
    cut: BTreeSet<usize>,
    step: Step,
    since: u64,
    fenced: Option<u64>,
    was_killed: bool,
}

#[derive(Debug, Clone, PartialEq)]
enum Step {
    Waiting,
    Fencing(u64),
    Watching(u64, u64),
    Done,
}

pub struct World {
    random: StdRng,
    now: u64,
    regions: Vec<Region>,
    workers: Vec<Worker>,
    operators: Vec<Operator>,
    sent: Vec<Sent>,
    next_value: u32,
    /// Epochs whose fence was called complete, by the region they were fenced in.
    complete: BTreeMap<(usize, u64), u64>,
    /// What the application wrote last in each region since that became active.
    app: BTreeMap<(usize, u32), u32>,
    app_since: BTreeMap<usize, u64>,
    /// The application rests afterwards: what takes effect late then is the last thing a key gets.
    app_until: u64,
    undone_in: BTreeSet<(usize, u64)>,
    /// Regions that were active, whatever any record says.
    was_active: BTreeSet<usize>,
    counts: Counts,
}

impl World {
    pub fn new(seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let regions = (0..LABELS.len())
            .map(|region| Region {
                control: (region > 0 || random.random_bool(0.5))
                    .then(|| ControlRow::first("g", LABELS[0], "m", String::new())),
                shard: BTreeMap::new(),
                workers: BTreeMap::new(),
                items: BTreeMap::new(),
                stream: Vec::new(),
            })
            .collect();
        let mut workers = Vec::new();
        for here in 0..LABELS.len() {
            for number in 0..random.random_range(1..3) {
                workers.push(Worker::new(here, number));
            }
        }
        let mut operators = Vec::new();
        // Two who mean different regions at the same moment, in one seed of three.
        let at_once = random
            .random_bool(0.33)
            .then(|| random.random_range(20..120));
        for number in 0..random.random_range(1..4) {
            operators.push(Operator {
                to: match at_once {
                    Some(_) => 1 + number % 2,
                    None => random.random_range(0..3),
                },
                at: at_once.unwrap_or_else(|| random.random_range(20..140)),
                cut: BTreeSet::new(),
                step: Step::Waiting,
                since: 0,
                fenced: None,
                was_killed: false,
            });
        }
        let app_until = random.random_range(60..TICKS);
        Self {
            random,
            now: 0,
            regions,
            workers,
            operators,
            sent: Vec::new(),
            next_value: 0,
            complete: BTreeMap::new(),
            app: BTreeMap::new(),
            app_since: BTreeMap::new(),
            app_until,
            undone_in: BTreeSet::new(),
            was_active: BTreeSet::from([0]),
            counts: Counts::default(),
        }
    }

    /// Plays until everything has settled.
    pub fn run(&mut self) -> Result<Counts, String> {
        while self.now < TICKS {
            self.now += 1;
            let calm = self.now > TICKS / 2;
            self.misfortune(calm);
            self.application();
            self.deliver()?;
            for index in 0..self.workers.len() {
                if self.random.random_bool(0.7) {
                    self.worker(index)?;
                }
            }
            for index in 0..self.operators.len() {
                if self.random.random_bool(0.6) {
                    self.operator(index)?;
                }
            }
            self.check()?;
        }
        self.settled()?;
        Ok(self.counts)
    }

    fn misfortune(&mut self, calm: bool) {
        let now = self.now;
        for worker in &mut self.workers {
            if worker.dead_until.is_some_and(|until| until <= now) {
                worker.restart();
            }
            if calm {
                worker.cut.clear();
                continue;
            }
            match self.random.random_range(0..300) {
                0..3 => {
                    worker.dead_until = Some(now + self.random.random_range(1..40));
                }
                3..7 => worker.paused_until = now + self.random.random_range(1..25),
                7..12 => {
                    let region = self.random.random_range(0..3);
                    if !worker.cut.remove(&region) {
                        worker.cut.insert(region);
                    }
                }
                _ => {}
            }
        }
        for operator in &mut self.operators {
            if calm {
                operator.cut.clear();
                continue;
            }
            match self.random.random_range(0..100) {
                // Killed; the same command is typed again later.
                0 if operator.step != Step::Done && operator.step != Step::Waiting => {
                    operator.step = Step::Waiting;
                    operator.at = now + self.random.random_range(1..20);
                    operator.fenced = None;
                    operator.was_killed = true;
                }
                1..4 => {
                    let region = self.random.random_range(0..3);
                    if !operator.cut.remove(&region) {
                        operator.cut.insert(region);
                    }
                }
                _ => {}
            }
        }
    }

    /// The application writes where it believes to be active: where the region's own record says so, or
    /// still in the old one for a while: nothing fences it.
    fn application(&mut self) {
        for (region, label) in LABELS.iter().enumerate() {
            let is_active = match &self.regions[region].control {
                Some(control) => control.active == *label,
                None => region == 0,
            };
            let fenced = self.regions[region]
                .control
                .as_ref()
                .is_none_or(|control| control.state != state::FENCING);
            let writes = self.now < self.app_until && self.random.random_bool(0.4);
            if is_active && fenced && writes {
                let key = self.random.random_range(0..KEYS);
                self.next_value += 1;
                let value = self.next_value;
                self.write(region, key, value);
                self.app.insert((region, key), value);
            }
        }
    }

    fn write(&mut self, region: usize, key: u32, value: u32) {
        let at = self.now;
        let region = &mut self.regions[region];
        let before = region.items.insert(key, value).unwrap_or(0);
        if before != value {
            region.stream.push(Record {
                key,
                before,
                after: value,
                at,
            });
        }
    }

    /// Writes whose time has come take effect; held-back ones after others.
    fn deliver(&mut self) -> Result<(), String> {
        let now = self.now;
        let due: Vec<Sent> = self
            .sent
            .iter()
            .filter(|sent| sent.due <= now)
            .cloned()
            .collect();
        self.sent.retain(|sent| sent.due > now);
        for sent in due {
            self.counts.late += u64::from(sent.last);
            self.write(sent.to, sent.key, sent.value);
        }
        Ok(())
    }

    fn control(&self, region: usize) -> Option<ControlRow> {
        self.regions[region].control.clone()
    }

    /// A conditional write of the record; false if it was refused.
    fn replace_control(
        &mut self,
        region: usize,
        row: &ControlRow,
        known: Option<&ControlRow>,
    ) -> bool {
        let now = self.regions[region].control.as_ref();
        let same = |now: &ControlRow, known: &ControlRow| {
            (now.epoch, now.lease_counter, &now.active)
                == (known.epoch, known.lease_counter, &known.active)
        };
        let holds = match (now, known) {
            (None, None) => true,
            (Some(now), Some(known)) => same(now, known),
            _ => false,
        };
        if holds {
            self.regions[region].control = Some(row.clone());
        }
        holds
    }

    fn check(&self) -> Result<(), String> {
        for (region, one) in self.regions.iter().enumerate() {
            for worker in self.workers.iter().filter(|worker| worker.here == region) {
                let own = one.control.as_ref().map_or(1, |own| own.epoch);
                if own < worker.acknowledged {
                    return Err(format!(
                        "{} acknowledged epoch {}, and its state table says {own}",
                        worker.name, worker.acknowledged
                    ));
                }
            }
        }
        // Two flows against each other: two living feeders that write to each other's source.
        let flows: Vec<(usize, usize, u64)> = self
            .sent
            .iter()
            .map(|sent| (sent.from, sent.to, sent.epoch))
            .collect();
        for (from, to, epoch) in &flows {
            let back = self.workers.iter().find(|worker| {
                worker.here == *from
                    && worker.dead_until.is_none()
                    && matches!(&worker.role, Role::Feed { source, epoch: other } if source == to && other != epoch)
            });
            if let Some(back) = back {
                return Err(format!(
                    "{} feeds {} from {} while a write of epoch {epoch} goes the other way",
                    back.name, LABELS[*from], LABELS[*to]
                ));
            }
        }
        Ok(())
    }

    /// What must hold at the end.
    fn settled(&mut self) -> Result<(), String> {
        let highest = self
            .regions
            .iter()
            .filter_map(|region| region.control.as_ref());
        let Some(epoch) = highest.clone().map(|row| row.epoch).max() else {
            return Ok(());
        };
        let actives: BTreeSet<&str> = highest
            .filter(|row| row.epoch == epoch)
            .map(|row| row.active.as_str())
            .collect();
        let [active] = actives.into_iter().collect::<Vec<_>>()[..] else {
            return Ok(());
        };
        let region = place(active);
        if !self.undone_in.contains(&(region, epoch))
            || self.sent.iter().any(|sent| sent.to == region)
        {
            return Ok(());
        }
        let since = self.app_since.get(&region).copied().unwrap_or(0);
        for key in 0..KEYS {
            let stream = self.regions[region].stream.iter();
            let wrote = self.app.get(&(region, key)).copied();
            let Some(wrote) = wrote.filter(|wrote| {
                stream
                    .clone()
                    .any(|record| record.after == *wrote && record.at >= since)
            }) else {
                continue;
            };
            let holds = self.regions[region].items.get(&key).copied();
            if holds != Some(wrote) {
                return Err(format!(
                    "key {key} in {active} holds {holds:?}, and the application wrote {wrote} in epoch {epoch}"
                ));
            }
        }
        Ok(())
    }
}

fn place(label: &str) -> usize {
    LABELS.iter().position(|one| *one == label).unwrap_or(0)
}
