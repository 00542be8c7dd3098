//! What a worker does.

use std::collections::{BTreeMap, BTreeSet};

use farshore::lease::control::{
    Answer, Flow, Heed, Part, Verdict, adopted, copy_for, decide, heed, newest, part,
};
use farshore::lease::row::{ControlRow, ShardRow, WorkerRow};
use farshore::mutation::{self, Mutation};
use farshore::stream::ShardId;
use farshore::stream::reader::Position;
use rand::RngExt;

use super::{LABELS, LATE, LEASE, Role, Sent, Worker, World, place};

impl World {
    pub(super) fn worker(&mut self, index: usize) -> Result<(), String> {
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
}

impl Worker {
    pub(super) fn new(here: usize, number: u32) -> Self {
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
    pub(super) fn restart(&mut self) {
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
