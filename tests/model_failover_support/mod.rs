//! The world of the model.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use farshore::jobs::failover::fence::{Next, Writers, next};
use farshore::jobs::failover::late::history::{History, Judged, Old};
use farshore::lease::control::{
    Answer, Flow, Heed, Part, Verdict, adopted, copy_for, decide, heed, newest, part, successor,
};
use farshore::lease::row::{ControlRow, Row, ShardRow, WorkerRow, state};
use farshore::mutation::{self, Mutation};
use farshore::stream::ShardId;
use farshore::stream::reader::Position;
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
        for region in 0..3 {
            let is_active = match &self.regions[region].control {
                Some(control) => control.active == LABELS[region],
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

    fn worker(&mut self, index: usize) -> Result<(), String> {
        let now = self.now;
        let worker = &mut self.workers[index];
        if worker.dead_until.is_some() || worker.paused_until > now {
            return Ok(());
        }
        self.read_records(index);
        match self.workers[index].role.clone() {
            Role::Finding => self.find(index),
            Role::Feed { epoch, source } => self.feed(index, epoch, source),
            Role::Idle { epoch } => {
                let (_, role) = self.role_of(index);
                if role.is_some_and(|role| role != Role::Idle { epoch }) {
                    self.workers[index].role = Role::Finding;
                }
                self.keep_quarantine(index);
                Ok(())
            }
            Role::Draining { epoch, why } => {
                self.drain(index, epoch, &why);
                Ok(())
            }
        }
    }

    fn read_records(&mut self, index: usize) {
        let worker = &self.workers[index];
        let here = worker.here;
        let mut read = vec![here];
        read.extend((0..3).filter(|region| *region != here && self.random.random_bool(0.3)));
        read.retain(|region| !worker.cut.contains(region));
        for region in read {
            if let Some(control) = self.control(region) {
                let worker = &mut self.workers[index];
                let known = worker.seen.get(&region).map(|known| known.epoch);
                if known.is_none_or(|known| known <= control.epoch) {
                    worker.seen.insert(region, control);
                }
            }
        }
    }

    /// The active region by all that this worker has seen, and the role that follows.
    fn role_of(&self, index: usize) -> (Verdict, Option<Role>) {
        let worker = &self.workers[index];
        let answers: Vec<Answer> = worker
            .seen
            .values()
            .map(|row| Answer::Record(Box::new(row.clone())))
            .collect();
        let verdict = decide(&answers);
        let role = match &verdict {
            Verdict::Decided { active, epoch } => {
                let own = worker.seen.get(&worker.here);
                let label = LABELS[worker.here];
                Some(
                    match part(label, (active, *epoch), own, worker.seen.values()) {
                        Part::Active | Part::Quarantined => Role::Idle { epoch: *epoch },
                        Part::Fed => Role::Feed {
                            epoch: *epoch,
                            source: place(active),
                        },
                    },
                )
            }
            _ => None,
        };
        (verdict, role)
    }

    fn find(&mut self, index: usize) -> Result<(), String> {
        let worker = &self.workers[index];
        let here = worker.here;
        // Without its own state table nothing works.
        if worker.cut.contains(&here) {
            return Ok(());
        }
        let (_, role) = self.role_of(index);
        let Some(role) = role else { return Ok(()) };
        if let Role::Feed { epoch, source } = role {
            if worker.acknowledged > epoch {
                return Err(format!(
                    "{} acknowledged {} and feeds in {epoch}",
                    worker.name, worker.acknowledged
                ));
            }
            // The source has to answer before anything begins.
            if worker.cut.contains(&source) {
                return Ok(());
            }
            let known = self.control(here);
            let seen: Vec<ControlRow> = worker.seen.values().cloned().collect();
            let newer = newest(&seen, LABELS[source], epoch).cloned();
            if let Some(copy) =
                newer.and_then(|newer| copy_for(LABELS[here], Part::Fed, &newer, known.as_ref()))
            {
                self.replace_control(here, &copy, known.as_ref());
                return Ok(());
            }
            let now = self.now;
            let worker = &mut self.workers[index];
            worker.term_until = now + LEASE;
            worker.role = Role::Feed { epoch, source };
            let row = WorkerRow::new(&worker.name, epoch, String::new());
            let name = worker.name.clone();
            self.regions[here].workers.insert(name, row);
            return Ok(());
        }
        self.workers[index].role = role;
        Ok(())
    }

    fn feed(&mut self, index: usize, epoch: u64, source: usize) -> Result<(), String> {
        let (now, here) = (self.now, self.workers[index].here);
        let worker = &mut self.workers[index];
        let flow = Flow {
            epoch,
            active: LABELS[source],
        };
        let why = heed(flow, worker.seen.values());
        if why != Heed::GoOn {
            worker.role = Role::Draining { epoch, why };
            return Ok(());
        }
        let reaches_state = !worker.cut.contains(&here);
        if reaches_state {
            worker.term_until = now + LEASE;
            self.renew(index, epoch);
        }
        let worker = &mut self.workers[index];
        if let Some((at, applied)) = worker.open
            && at <= now
        {
            worker.open = None;
            worker.applied = applied;
            worker.checkpoint = applied;
        }
        let term = mutation::is_off(Mutation::Term) || worker.term_until > now;
        let may_send = worker.lease.is_some_and(|(until, _)| until > now) && term;
        let reaches = !worker.cut.contains(&source);
        if may_send && reaches && worker.open.is_none() {
            self.send(index, epoch, source)?;
        }
        Ok(())
    }

    /// Takes, renews and checkpoints the one lease of its region.
    fn renew(&mut self, index: usize, epoch: u64) {
        let (now, here) = (self.now, self.workers[index].here);
        let name = self.workers[index].name.clone();
        let applied = self.workers[index].checkpoint;
        let rows = &self.regions[here].shard;
        let last = rows.range((epoch, 0)..=(epoch, u32::MAX)).next_back();
        let mut place = last.map_or((epoch, 0), |(place, _)| *place);
        // A row that nobody has seen, and nobody can have fenced.
        if last.is_some() && self.random.random_bool(0.02) {
            place.1 += 1;
            self.workers[index].lease = None;
        }
        let from = last.map_or("0".to_owned(), |(_, row)| row.checkpoint.clone());
        let row = self.regions[here].shard.entry(place).or_insert_with(|| {
            let id = ShardId("s".into());
            let start = Position::TrimHorizon;
            let mut row = ShardRow::new(epoch, "t", "arn/stream/l", &id, None, &start, 0);
            row.checkpoint = from;
            row.updated_at = Some(now as i64);
            row
        });
        let worker = &mut self.workers[index];
        match worker.lease {
            Some((_, counter)) if row.lease_counter == counter => {
                row.lease_counter += 1;
                row.checkpoint = applied.to_string();
                row.updated_at = Some(now as i64);
                worker.lease = Some((now + LEASE, counter + 1));
            }
            Some(_) => worker.lease = None,
            None => {
                let silent = now >= row.updated_at.unwrap_or(0) as u64 + LEASE;
                let free = row.fenced.is_none() && (row.lease_owner.is_none() || silent);
                if free {
                    row.lease_owner = Some(format!("{name}.1"));
                    row.lease_counter += 1;
                    row.updated_at = Some(now as i64);
                    worker.lease = Some((now + LEASE, row.lease_counter));
                    worker.applied = row.checkpoint.parse().unwrap_or(0);
                    worker.checkpoint = worker.applied;
                    worker.open = None;
                }
            }
        }
    }

    /// Sends the next record; now and then it is held back, tried again, and takes effect late.
    fn send(&mut self, index: usize, epoch: u64, source: usize) -> Result<(), String> {
        let now = self.now;
        let here = self.workers[index].here;
        let applied = self.workers[index].applied;
        let Some(record) = self.regions[source].stream.get(applied).copied() else {
            return Ok(());
        };
        if let Some(at) = self.complete.get(&(here, epoch)) {
            return Err(format!(
                "{} sends in epoch {epoch} at {now}, whose fence was complete at {at}",
                self.workers[index].name
            ));
        }
        let by_now = self.was_active.contains(&here);
        // What was sent before anybody could hear of it belongs to the fence.
        let is_old = self.regions[here]
            .control
            .as_ref()
            .is_some_and(|own| own.epoch > epoch);
        if by_now && !is_old {
            return Err(format!(
                "{} feeds a region that was active",
                self.workers[index].name
            ));
        }
        let late = self.random.random_bool(0.15);
        let due = match late {
            true => now + self.random.random_range(2..LATE),
            false => now,
        };
        self.sent.push(Sent {
            epoch,
            from: source,
            to: here,
            key: record.key,
            value: record.after,
            due,
            last: late,
        });
        if late {
            // Given up and sent again: what it returns is the second one's answer.
            self.sent.push(Sent {
                epoch,
                from: source,
                to: here,
                key: record.key,
                value: record.after,
                due: now,
                last: false,
            });
        }
        self.workers[index].open = Some((now + 1, applied + 1));
        Ok(())
    }

    fn drain(&mut self, index: usize, epoch: u64, why: &Heed) {
        let (now, here) = (self.now, self.workers[index].here);
        let worker = &mut self.workers[index];
        let owner = format!("{}.1", worker.name);
        if let Some((at, applied)) = worker.open {
            if at > now {
                return;
            }
            worker.open = None;
            worker.checkpoint = applied;
        }
        if worker.cut.contains(&here) {
            return;
        }
        if let Some((_, counter)) = worker.lease.take()
            && let Some(row) = self.regions[here]
                .shard
                .range_mut((epoch, 0)..=(epoch, u32::MAX))
                .map(|(_, row)| row)
                .find(|row| {
                    row.lease_counter == counter && row.lease_owner.as_ref() == Some(&owner)
                })
        {
            row.lease_counter += 1;
            row.lease_owner = None;
            row.checkpoint = worker.checkpoint.to_string();
        }
        let known = self.regions[here].control.clone();
        let seen: Vec<ControlRow> = self.workers[index].seen.values().cloned().collect();
        self.counts.conflicts += u64::from(matches!(why, Heed::Conflict { .. }));
        let copy = adopted("g", LABELS[here], &seen, known.as_ref(), String::new());
        if let Some(copy) = copy
            && !self.replace_control(here, &copy, known.as_ref())
        {
            return;
        }
        let by = why.epoch().unwrap_or(epoch);
        let worker = &mut self.workers[index];
        worker.acknowledged = worker.acknowledged.max(by);
        worker.role = Role::Finding;
        let name = worker.name.clone();
        self.counts.acknowledged += 1;
        if let Some(row) = self.regions[here].workers.get_mut(&name) {
            row.acknowledged = Some(by);
        }
    }

    fn keep_quarantine(&mut self, index: usize) {
        let worker = &self.workers[index];
        let here = worker.here;
        if worker.cut.contains(&here) {
            return;
        }
        let seen: Vec<ControlRow> = worker.seen.values().cloned().collect();
        let (verdict, _) = self.role_of(index);
        let Verdict::Decided { active, epoch } = verdict else {
            return;
        };
        let known = self.control(here);
        let now = part(LABELS[here], (&active, epoch), known.as_ref(), &seen);
        if now != Part::Quarantined {
            return;
        }
        let newer = newest(&seen, &active, epoch);
        if let Some(copy) =
            newer.and_then(|newer| copy_for(LABELS[here], now, newer, known.as_ref()))
        {
            self.replace_control(here, &copy, known.as_ref());
        }
    }

    fn operator(&mut self, index: usize) -> Result<(), String> {
        let now = self.now;
        let operator = &self.operators[index];
        let (to, step) = (operator.to, operator.step.clone());
        if operator.at > now || operator.cut.contains(&to) {
            return Ok(());
        }
        match step {
            Step::Waiting => {
                self.begin(index);
                Ok(())
            }
            Step::Fencing(epoch) => self.fence(index, epoch),
            Step::Watching(epoch, since) => {
                self.watch(index, epoch, since);
                Ok(())
            }
            Step::Done => Ok(()),
        }
    }

    fn begin(&mut self, index: usize) {
        let now = self.now;
        let to = self.operators[index].to;
        let Some(own) = self.control(to) else {
            self.operators[index].step = Step::Done;
            return;
        };
        let cut = &self.operators[index].cut;
        let answers: Vec<Answer> = (0..3)
            .map(
                |region| match (&self.regions[region].control, cut.contains(&region)) {
                    (_, true) => Answer::Unreachable,
                    (Some(row), false) => Answer::Record(Box::new(row.clone())),
                    (None, false) => Answer::None,
                },
            )
            .collect();
        let (active, epoch, rivals) = match decide(&answers) {
            Verdict::Decided { active, epoch } => (active, epoch, Vec::new()),
            // A person has agreed on it.
            Verdict::Conflict { epoch, actives } => (actives[0].clone(), epoch, actives),
            _ => return,
        };
        let under_way = own.active == LABELS[to]
            && own.epoch == epoch
            && rivals.is_empty()
            && [state::FENCING, state::WATCHING].contains(&own.state.as_str());
        if under_way {
            self.counts.resumed += u64::from(self.operators[index].was_killed);
            let operator = &mut self.operators[index];
            operator.since = now;
            operator.step = match own.state == state::FENCING {
                true => Step::Fencing(epoch),
                false => Step::Watching(epoch, own.done_ms("fenced").unwrap_or(0) as u64),
            };
            return;
        }
        if active == LABELS[to] && rivals.is_empty() {
            self.operators[index].step = Step::Done;
            return;
        }
        let seen: Vec<ControlRow> = answers.iter().filter_map(|a| a.record().cloned()).collect();
        let first = ControlRow::first("g", LABELS[to], "m", String::new());
        let mut row = successor(LABELS[to], (&active, epoch), &rivals, &seen, first);
        row.note("begun", now as i64, "");
        row.lease_counter = 1;
        if self.replace_control(to, &row, Some(&own)) {
            self.app_since.insert(to, now);
            self.was_active.insert(to);
            let operator = &mut self.operators[index];
            operator.since = now;
            operator.fenced = None;
            operator.step = Step::Fencing(epoch + 1);
        }
    }

    fn fence(&mut self, index: usize, epoch: u64) -> Result<(), String> {
        let now = self.now;
        let to = self.operators[index].to;
        let Some(own) = self.control(to).filter(|own| own.epoch == epoch) else {
            self.operators[index].step = Step::Done;
            return Ok(());
        };
        if own.state != state::FENCING {
            self.operators[index].step = Step::Waiting;
            return Ok(());
        }
        let rows = self.regions[to].shard.clone();
        let workers = self.regions[to].workers.values().cloned().map(Row::Worker);
        let shards = rows.values().cloned().map(Row::Shard);
        let writers = Writers::before(epoch, shards.chain(workers));
        let ticks = |ticks: u64| Duration::from_secs(ticks);
        let operator = &self.operators[index];
        let since = ticks(now - operator.since);
        let fenced = operator.fenced.map(|at| ticks(now - at));
        match next(&writers, epoch, since, fenced, ticks(LEASE)) {
            Next::Wait => {}
            Next::Fence => {
                for (place, row) in rows {
                    if row.epoch < epoch && row.fenced.is_none() {
                        self.regions[to].shard.insert(place, row.fenced_by(epoch));
                    }
                }
                let operator = &mut self.operators[index];
                operator.fenced = operator.fenced.or(Some(now));
            }
            Next::Complete { acknowledged } => {
                self.counts.fences += 1;
                self.counts.by_lease += u64::from(!acknowledged);
                for old in 1..epoch {
                    self.complete.entry((to, old)).or_insert(now);
                }
                let mut row = own.clone();
                row.state = state::WATCHING.into();
                row.note("fenced", now as i64, "");
                row.lease_counter += 1;
                if self.replace_control(to, &row, Some(&own)) {
                    self.operators[index].step = Step::Watching(epoch, now);
                }
            }
        }
        Ok(())
    }

    /// The late-write watch: the target's stream beside the records of every old flow into it.
    fn watch(&mut self, index: usize, epoch: u64, since: u64) {
        let now = self.now;
        let to = self.operators[index].to;
        let Some(own) = self.control(to).filter(|own| own.epoch == epoch) else {
            self.operators[index].step = Step::Done;
            return;
        };
        if !mutation::is_off(Mutation::Late) {
            self.undo(to, &own);
        }
        if now > since + LATE + 2 {
            let mut row = own.clone();
            row.state = state::STEADY.into();
            row.lease_counter += 1;
            if self.replace_control(to, &row, Some(&own)) {
                self.undone_in.insert((to, epoch));
                self.operators[index].step = Step::Done;
            }
        }
    }

    fn undo(&mut self, to: usize, own: &ControlRow) {
        let begun = own.done_ms("begun").unwrap_or(0) as u64;
        let mut keys: BTreeMap<u32, History<u32>> = BTreeMap::new();
        // Every flow into it, oldest first.
        for past in own.past.iter().filter(|past| past.active != own.active) {
            let source = &self.regions[place(&past.active)];
            let sent = source.stream.iter();
            for record in sent.filter(|record| record.at <= begun + LEASE * 2) {
                keys.entry(record.key)
                    .or_insert_with(|| History::new(Vec::new()))
                    .push(Old {
                        image: record.after,
                        in_flight: true,
                    });
            }
        }
        let stream: Vec<Record> = self.regions[to].stream.clone();
        for record in stream {
            let Some(key) = keys.get_mut(&record.key) else {
                continue;
            };
            let fenced = record.at >= begun;
            if let Judged::Late(right) = key.change(&record.before, &record.after, fenced)
                && self.regions[to].items.get(&record.key) == Some(&record.after)
            {
                self.counts.undone += 1;
                self.write(to, record.key, right);
            }
        }
    }

    /// What must hold at every moment.
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

impl Worker {
    fn new(here: usize, number: u32) -> Self {
        Self {
            here,
            name: format!("w{}{number}-0", LABELS[here]),
            start: 0,
            role: Role::Finding,
            seen: BTreeMap::new(),
            lease: None,
            term_until: 0,
            applied: 0,
            checkpoint: 0,
            open: None,
            cut: BTreeSet::new(),
            paused_until: 0,
            dead_until: None,
            acknowledged: 0,
        }
    }

    /// A new process: it knows nothing but what the tables tell. That it acknowledged something the model
    /// remembers.
    fn restart(&mut self) {
        self.start += 1;
        let stem = self.name.split('-').next().unwrap_or_default().to_owned();
        self.name = format!("{stem}-{}", self.start);
        self.role = Role::Finding;
        self.seen.clear();
        self.lease = None;
        self.term_until = 0;
        self.open = None;
        self.dead_until = None;
    }
}

fn place(label: &str) -> usize {
    LABELS.iter().position(|one| *one == label).unwrap_or(0)
}
