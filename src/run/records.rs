//! The control records of all regions, read again and again: the worker's own state table often, the
//! others best effort. What was seen once is never forgotten: a region that falls silent takes no epoch
//! back.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures::future::join_all;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::backoff::Backoff;
use crate::config::Config;
use crate::dynamo::Regions;
use crate::dynamo::clock::{ServiceClock, host_ms, rfc3339, uptime};
use crate::error::{Class, Fault, Operation};
use crate::lease::control::{Flow, Heed, Verdict, adopted, heed, verdict};
use crate::lease::row::{ControlRow, state};
use crate::lease::table::{StateTable, Written};
use crate::lease::term::Term;
use crate::observe::health::{Health, Scope};
use crate::observe::whereabouts::{Known, Whereabouts};
use crate::run::start::Told;

/// What health knows the reading of the own record by.
const PART: &str = "control";
/// And the copying of a newer one.
const ADOPTING: &str = "adopting";
/// Longest time between two readings of the own record: a failover waits for living workers so long.
const OWN_EVERY_MAX: Duration = Duration::from_millis(500);
/// Longest wait for the record of another region.
const OTHER_TIMEOUT_MAX: Duration = Duration::from_secs(3);
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// The control records of a group, as the process in one region sees them.
pub struct Records {
    group: String,
    here: String,
    lease: Duration,
    own: StateTable,
    others: Vec<(String, StateTable)>,
    seen: Mutex<BTreeMap<String, ControlRow>>,
    /// When the last reading of the other regions' records began that says who is active, by [`uptime`].
    heard: Mutex<Option<Duration>>,
    /// The time of the own region: a planned switchover that died asks writes to wait until then.
    clock: Arc<ServiceClock>,
    whereabouts: Whereabouts,
}

impl Records {
    /// Those of the group of `config`, for a process in `here`. Nothing is read yet.
    pub fn new(
        config: &Config,
        here: &str,
        regions: &Regions,
        whereabouts: Whereabouts,
    ) -> Option<Arc<Self>> {
        let lease = config.leases.duration;
        let name = config.state_table();
        // One that does not answer must not make the next look late.
        let patience = (lease / 2).min(OTHER_TIMEOUT_MAX);
        let table = |region: &crate::dynamo::RegionClients| {
            StateTable::new(region.tables_within(patience), name.clone())
        };
        Some(Arc::new(Self {
            group: config.group.clone(),
            here: here.to_owned(),
            lease,
            own: table(regions.get(here)?),
            others: regions
                .iter()
                .filter(|region| region.label != here)
                .map(|region| (region.label.clone(), table(region)))
                .collect(),
            seen: Mutex::default(),
            heard: Mutex::default(),
            clock: Arc::clone(&regions.get(here)?.clock),
            whereabouts,
        }))
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, ControlRow>> {
        // No holder leaves it half changed.
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Every record that was seen, the latest of each region.
    pub fn seen(&self) -> Vec<ControlRow> {
        self.lock().values().cloned().collect()
    }

    /// The record of the own state table, as last seen.
    pub fn own(&self) -> Option<ControlRow> {
        self.lock().get(&self.here).cloned()
    }

    /// The record of `region` said this. An older epoch than was seen there takes nothing back.
    pub fn note(&self, region: &str, record: ControlRow) {
        if record.group != self.group {
            return;
        }
        let mut seen = self.lock();
        let known = seen.get(region);
        let is_old = known.is_some_and(|known| known.epoch > record.epoch);
        if !is_old {
            seen.insert(region.to_owned(), record);
        }
    }

    /// What a role was found by counts as if it had been read here.
    pub fn learn(&self, told: &Told) {
        for (region, record) in &told.records {
            self.note(region, record.clone());
        }
        self.heard_at(told.begun);
    }

    fn heard_at(&self, begun: Duration) {
        let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        *heard = (*heard).max(Some(begun));
    }

    /// Reads the own record.
    ///
    /// # Errors
    /// The fault of the call.
    pub async fn read_own(&self) -> Result<(), Fault> {
        match self.own.control().await {
            Ok(record) => {
                if let Some(record) = record {
                    self.note(&self.here, record);
                }
                Ok(())
            }
            Err(fault) => Err(fault),
        }
    }

    /// As [`read_own`](Self::read_own), for a worker that feeds nothing: where the region has no state table
    /// there is no record in it, and what the others say counts.
    ///
    /// # Errors
    /// The fault of the call.
    pub async fn read_own_if_any(&self) -> Result<(), Fault> {
        match self.read_own().await {
            Err(fault) if fault.class == Class::NotFound => Ok(()),
            read => read,
        }
    }

    /// Tells applications and health what a reading of the own record, `read`, that began at `begun` has
    /// brought. Where nobody has a record `current` counts, which decided at the start.
    pub fn tell(
        &self,
        begun: Duration,
        read: &Result<(), Fault>,
        current: (&str, u64),
        health: &Health,
    ) {
        if let Err(fault) = read {
            health.failed(Scope::State, "", PART, fault);
            return self.whereabouts.unknown(format!(
                "the control record in {} could not be read: {}",
                self.here,
                fault.summary()
            ));
        }
        health.succeeded(Scope::State, "", PART);
        let seen = self.lock();
        // Without a record of its own all rests on what the others said last.
        let heard = *self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        let begun = match seen.contains_key(&self.here) {
            true => begun,
            false => heard.unwrap_or_default().min(begun),
        };
        let now_ms = self.clock.now_ms();
        self.whereabouts.set(known(&seen, current, (begun, now_ms)));
    }

    /// Reads the records of the other regions; of those that do not answer nothing is learnt.
    pub async fn read_others(&self) {
        let begun = uptime();
        let asked = self.others.iter().map(async |(label, table)| {
            let answer = table.control().await;
            let has_answered = match &answer {
                Ok(_) => true,
                Err(fault) => fault.class == Class::NotFound,
            };
            let record = answer.ok().flatten();
            let told = record.is_some();
            if let Some(record) = record {
                self.note(label, record);
            }
            (has_answered, told)
        });
        let answers = join_all(asked).await;
        // That nobody has a record is known only from all of them.
        if answers.iter().any(|(_, told)| *told) || answers.iter().all(|(answered, _)| *answered) {
            self.heard_at(begun);
        }
    }

    /// Ends the wait of a planned switchover that died, once its time is over at `now_ms`: its record would
    /// ask writes to wait for ever. Somebody else may do it at the same moment, and that is as good.
    pub async fn reopen_if_due(&self, now_ms: i64) {
        let Some(own) = self.own() else { return };
        let due = own.state == state::CLOSING && own.closing_until.is_some_and(|at| at < now_ms);
        if due && let Ok(Written::Yes) = self.own.replace_control(&own.reopened(), Some(&own)).await
        {
            tracing::warn!(
                by = own.by,
                "a planned switchover did not come to its end; writes need not wait any more"
            );
        }
    }

    /// How long to wait between two readings of the own record.
    pub fn own_every(&self) -> Duration {
        (self.lease / 10).min(OWN_EVERY_MAX)
    }

    /// How long to wait between two readings of the others.
    pub fn others_every(&self) -> Duration {
        self.lease / 2
    }

    /// Makes the own state table say what was seen, before that is acknowledged: whoever starts anew here must
    /// not go on with an epoch that is over, whatever other regions answer then.
    ///
    /// # Errors
    /// The fault of the call.
    pub async fn adopt(&self) -> Result<(), Fault> {
        // Twice: somebody else of this region may adopt it at the same moment.
        for _ in 0..2 {
            let own = match self.own.control().await {
                // A region without a state table has nothing that could go on.
                Err(fault) if fault.class == Class::NotFound => return Ok(()),
                own => own?,
            };
            if let Some(own) = &own {
                self.note(&self.here, own.clone());
            }
            let at = rfc3339(host_ms());
            let copy = adopted(&self.group, &self.here, &self.seen(), own.as_ref(), at);
            let Some(copy) = copy else { return Ok(()) };
            if self.own.replace_control(&copy, own.as_ref()).await? == Written::Yes {
                tracing::info!(
                    epoch = copy.epoch,
                    active = copy.active,
                    state = copy.state,
                    "the newer control record is copied into this region"
                );
                self.note(&self.here, copy);
                return Ok(());
            }
        }
        Err(Fault::own(
            Operation::State,
            Class::Condition,
            "control record moved",
            "somebody else writes the control record all the time",
        ))
    }

    /// Reads the own record, however long it takes, until `stop`. Whether it was read.
    pub async fn read_patiently(&self, health: &Health, stop: &CancellationToken) -> bool {
        let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
        while let Err(fault) = self.read_own().await {
            health.failed(Scope::State, "", PART, &fault);
            tokio::select! {
                () = stop.cancelled() => return false,
                () = tokio::time::sleep(backoff.pause()) => {}
            }
        }
        health.succeeded(Scope::State, "", PART);
        true
    }

    /// As [`adopt`](Self::adopt), however long it takes, until `stop`. Whether it was done.
    pub async fn adopt_patiently(&self, health: &Health, stop: &CancellationToken) -> bool {
        let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
        while let Err(fault) = self.adopt().await {
            health.failed(Scope::State, "", ADOPTING, &fault);
            tracing::warn!(
                code = fault.code,
                "the newer control record could not be copied into this region yet"
            );
            tokio::select! {
                () = stop.cancelled() => return false,
                () = tokio::time::sleep(backoff.pause()) => {}
            }
        }
        health.succeeded(Scope::State, "", ADOPTING);
        true
    }
}

/// Which region is active, as `seen` says by region, in a reading that began at `read`; it is `now_ms` there.
fn known(
    seen: &BTreeMap<String, ControlRow>,
    (active, epoch): (&str, u64),
    (read, now_ms): (Duration, i64),
) -> Known {
    let (active, epoch, state) = match verdict(seen.values()) {
        Verdict::Conflict { epoch, actives } => {
            (actives.join(", "), epoch, state::CONFLICT.to_owned())
        }
        Verdict::Decided { active, epoch } => {
            let state = state_of(seen, (&active, epoch), now_ms);
            (active, epoch, state.to_owned())
        }
        Verdict::FromFile | Verdict::Unknown => {
            (active.to_owned(), epoch, state::STEADY.to_owned())
        }
    };
    Known {
        active,
        epoch,
        state,
        read,
    }
}

/// The state of `epoch`. That writes should wait is said by the record of the region that is to become
/// active, until its time is over; everything else by that of the region that is: other records are
/// copies. Where it was not seen, a copy that is not steady goes first.
fn state_of<'a>(
    seen: &'a BTreeMap<String, ControlRow>,
    (active, epoch): (&str, u64),
    now_ms: i64,
) -> &'a str {
    let of_epoch = seen
        .iter()
        .filter(|(_, record)| record.epoch == epoch && record.active == active);
    let says = of_epoch.map(|(label, record)| {
        let over = record.state == state::CLOSING
            && record.closing_until.is_some_and(|until| until < now_ms);
        let said = if over {
            state::STEADY
        } else {
            record.state.as_str()
        };
        let rank = (
            said == state::CLOSING,
            label == active,
            said != state::STEADY,
        );
        (rank, said)
    });
    says.max().map_or(state::STEADY, |(_, said)| said)
}

/// Reads the records for as long as `flow` goes on, and ends `term` once it is over. Returns then.
pub async fn watch_term(
    records: Arc<Records>,
    term: Arc<Term>,
    (epoch, active): (u64, String),
    health: Arc<Health>,
    clock: Arc<ServiceClock>,
) {
    // Dropped with this function, and what it reads with it.
    let mut others = JoinSet::new();
    let mut asked: Option<Instant> = None;
    loop {
        let begun = uptime();
        let read = records.read_own().await;
        let flow = Flow {
            epoch,
            active: &active,
        };
        let why = heed(flow, &records.seen());
        if why != Heed::GoOn {
            tracing::warn!(?why, epoch, "this epoch is over: nothing more is sent");
            // First of all: what is told can wait.
            term.end(why);
            records.tell(begun, &read, (&active, epoch), &health);
            return;
        }
        records.tell(begun, &read, (&active, epoch), &health);
        if read.is_ok() {
            term.confirm(begun);
            records.reopen_if_due(clock.now_ms()).await;
        }
        while others.try_join_next().is_some() {}
        let is_due = asked.is_none_or(|asked| asked.elapsed() >= records.others_every());
        if is_due && others.is_empty() {
            asked = Some(Instant::now());
            let records = Arc::clone(&records);
            others.spawn(async move { records.read_others().await });
        }
        tokio::time::sleep(records.own_every()).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(epoch: u64, active: &str, state: &str) -> ControlRow {
        let mut row = ControlRow::first("g", active, "test", "now".into());
        (row.epoch, row.state) = (epoch, state.to_owned());
        row
    }

    fn state_in(rows: &[(&str, ControlRow)]) -> String {
        let seen = rows
            .iter()
            .map(|(label, row)| ((*label).to_owned(), row.clone()));
        known(&seen.collect(), ("f", 1), (Duration::ZERO, 1_000)).state
    }

    #[test]
    fn the_active_regions_own_record_counts_before_its_copies_and_closing_before_all() {
        let own = ("b", record(2, "b", state::WATCHING));
        let copy = ("a", record(2, "b", state::QUARANTINED));
        let old = ("c", record(1, "a", state::STEADY));
        assert_eq!(state_in(&[copy.clone(), own, old.clone()]), state::WATCHING);
        assert_eq!(state_in(&[copy, old]), state::QUARANTINED);
        let closing = ("b", record(1, "a", state::CLOSING));
        let active = ("a", record(1, "a", state::STEADY));
        assert_eq!(state_in(&[active, closing]), state::CLOSING);
        assert_eq!(state_in(&[]), state::STEADY);
        // Nobody who could end it lives: its time does.
        for (until, said) in [(1_000, state::CLOSING), (999, state::STEADY)] {
            let mut closing = record(1, "a", state::CLOSING);
            closing.closing_until = Some(until);
            let active = ("a", record(1, "a", state::STEADY));
            assert_eq!(state_in(&[active, ("b", closing)]), said);
        }
        let rivals = [
            ("b", record(2, "b", state::STEADY)),
            ("c", record(2, "c", state::STEADY)),
        ];
        assert_eq!(state_in(&rivals), state::CONFLICT);
    }
}
