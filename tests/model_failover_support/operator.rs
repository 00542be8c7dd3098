//! What the command does, typed by an operator.

use std::collections::BTreeMap;
use std::time::Duration;

use farshore::jobs::failover::fence::{Next, Writers, next};
use farshore::jobs::failover::late::history::{History, Judged, Old};
use farshore::lease::control::{Answer, Part, Verdict, decide, part, successor};
use farshore::lease::row::{ControlRow, Row, state};
use farshore::mutation::{self, Mutation};

use super::{LABELS, LATE, LEASE, Record, Step, World, place};

impl World {
    pub(super) fn operator(&mut self, index: usize) -> Result<(), String> {
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
        let waits = |region: usize| {
            let own = answers[region].record();
            region != to
                && part(LABELS[region], (&active, epoch), own, seen.iter()) == Part::Quarantined
        };
        let waiting = (0..3).filter(|region| waits(*region));
        let mut aside = rivals;
        aside.extend(waiting.map(|region| LABELS[region].to_owned()));
        let mut row = successor(LABELS[to], (&active, epoch), &aside, &seen, first);
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
        let writers = Writers::before(epoch, shards.chain(workers), now as i64);
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
}
