//! Failover: another region becomes the active one, fenced by its epoch.
//!
//! ```text
//!   planned: caught up ─▶ closing (writes should wait) ─▶ quiet, all applied ┐
//!                          │ not within the time: steady again               ▼
//!   ──────────────────────────────▶ record of epoch n + 1: fencing ─▶ fenced ─▶ actions ─▶ told ─▶ watched ─▶ steady
//! ```
//!
//! Every step is stored in the control record once it is done, on condition of its epoch and counter; the
//! same command goes on where one that was killed left off, and two at once do the same work. Until the
//! switch is complete only the target is written to, and nothing but it has to answer.
//!
//! [`late`] undoes what was in flight and took effect late. [`fence`] (pure) says when nothing of the old epoch can be sent any more, [`survey()`] what is known
//! beforehand.

mod acting;
pub mod fence;
pub mod late;
pub mod planned;
mod rivals;
pub(in crate::jobs) mod survey;
pub mod ttl;

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use futures::StreamExt;
use tokio_util::sync::CancellationToken;

pub use acting::Acted;
pub use survey::{RegionSeen, Survey, TableSeen, survey, unaccepted};

use crate::backoff::Backoff;
use crate::config::Config;
use crate::dynamo::clock::rfc3339;
use crate::dynamo::{RegionClients, Regions};
use crate::error::{Failure, Fault, Policy};
use crate::lease::control::{copy_for, part, successor};
use crate::lease::row::{ControlRow, ShardRow, past_doubt, state};
use crate::lease::table::{StateTable, Written};
use crate::mutation::crash;
use fence::{Next, Writers};
use late::Found;
use rivals::{overtaken, overtaken_by};
use survey::failed;
use ttl::Ttl;

/// Steps as the record names them.
pub mod step {
    /// Writes were asked to wait.
    pub const CLOSED: &str = "closed";
    /// Everything was applied, and the source's stream showed nothing more.
    pub const APPLIED: &str = "applied";
    /// An epoch of the same region was stored before this one, and contradicted: the application may have
    /// written there since.
    pub const BEGUN_FIRST: &str = "begun-first";
    /// The new epoch was stored.
    pub const BEGUN: &str = "begun";
    /// Nothing of the old epoch can be sent any more.
    pub const FENCED: &str = "fenced";
    /// The actions are done, or were tried.
    pub const ACTED: &str = "acted";
    /// The other regions were told, as far as they answered.
    pub const TOLD: &str = "told";
    /// No write of the old epoch can take effect late any more, and those that did are undone.
    pub const WATCHED: &str = "watched";
    /// All is done.
    pub const STEADY: &str = "steady";
}

/// Rows written at once.
const ROWS_AT_ONCE: usize = 16;
/// How often a call to the target is made again while its failure may pass by itself: half a minute.
const ATTEMPTS_MAX: u32 = 30;
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// Between two looks at who may still write.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Between two looks at what the other regions say.
const HEAR_EVERY: Duration = Duration::from_secs(1);
/// How long writes that came too late are counted.
const LEFT_TIMEOUT: Duration = Duration::from_secs(30);

/// How a failover did not come to its end.
#[derive(Debug)]
pub enum Ended {
    /// It could not go on; the same command does later.
    Failed(Failure),
    /// Another failover took over the group.
    Overtaken(Failure),
    /// A required action failed: the same command goes on with it. How all of them stand.
    Action(Box<(Failure, Vec<Acted>)>),
    /// A planned switchover was given up, and everything is as it was.
    GivenUp(String),
    /// Asked to stop: the same command goes on.
    Stopped,
}

/// Hears how far a failover is.
pub trait Watcher {
    /// `what` is under way.
    fn under_way(&mut self, what: &str);
    /// `what` is reached: somebody may be waiting for it.
    fn reached(&mut self, what: &str);
}

/// What was in flight when the epoch ended: its writes may take effect late.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InFlight {
    /// The table.
    pub table: String,
    /// The shard.
    pub shard: String,
    /// Everything after this position may have been sent.
    pub after: String,
    /// Who sent it.
    pub owner: String,
}

/// A failover at work.
pub struct Failover<'a> {
    pub(super) config: &'a Config,
    pub(super) survey: &'a Survey,
    pub(super) state: &'a StateTable,
    pub(super) target: &'a RegionClients,
    /// The record, as last written or read.
    pub(super) record: ControlRow,
    pub(super) stop: CancellationToken,
    /// All regions: those that were active are asked once the switch is complete.
    regions: &'a Regions,
    /// This process, for who looks at the record.
    me: String,
    /// Whether it is done although late writes could not be looked for.
    pub accepts_unwatched: bool,
    /// When this process began to wait for the fence.
    since: Instant,
}

/// What was done.
#[derive(Debug)]
pub struct Report {
    /// The record at the end.
    pub record: ControlRow,
    /// How the actions stand.
    pub actions: Vec<Acted>,
    /// The time to live of the tables.
    pub ttl: Vec<Ttl>,
    /// What was in flight when the epoch ended.
    pub in_flight: Vec<InFlight>,
    /// Ranges of the old epoch in doubt when it ended.
    pub doubts: usize,
    /// What was found of late writes.
    pub late: Found,
    /// Regions that could not be told, with why.
    pub untold: Vec<(String, String)>,
    /// Of a planned switchover: how many writes came after everything was seen to be applied, and are
    /// stranded; or why nobody knows.
    pub left_behind: Option<Result<usize, String>>,
}

impl<'a> Failover<'a> {
    /// Goes on with the failover that the target's record tells, or begins one: the new epoch is stored.
    /// `applied` is the record that a planned switchover has left, which has come as far as that.
    ///
    /// # Errors
    /// The target could not be written, or another failover was faster.
    pub async fn begin(
        config: &'a Config,
        survey: &'a Survey,
        (by, reason): (&str, &str),
        applied: Option<ControlRow>,
        regions: &'a Regions,
        stop: &CancellationToken,
    ) -> Result<Self, Ended> {
        let state = survey.state();
        let target = &survey.target;
        let known = applied.clone().or_else(|| survey.own.clone());
        let mut failover = Self {
            config,
            survey,
            state,
            target,
            record: known
                .clone()
                .unwrap_or_else(|| ControlRow::first(&config.group, &survey.to, by, String::new())),
            // Cancelled as well when somebody else has overtaken it.
            stop: stop.child_token(),
            regions,
            me: crate::run::owner(),
            accepts_unwatched: false,
            since: Instant::now(),
        };
        if survey.is_under_way() {
            return Ok(failover);
        }
        let now_ms = target.clock.now_ms();
        let current = (survey.active.as_str(), survey.epoch);
        let first = ControlRow::first(&config.group, &survey.to, by, rfc3339(now_ms));
        let mut next = successor(
            &survey.to,
            current,
            &survey.aside(),
            &survey.records(),
            first,
        );
        reason.clone_into(&mut next.reason);
        if let Some(applied) = &applied {
            // When writes had to wait is told at the end. Steps of any other record are another failover's:
            // what that has fenced is not what this one has to.
            next.steps.clone_from(&applied.steps);
        }
        if let Some(own) = survey.own.as_ref().filter(|own| own.active == survey.to) {
            let steps = [step::BEGUN_FIRST, step::BEGUN];
            let first = steps.iter().find_map(|step| own.done_ms(step));
            if let Some(at_ms) = first.filter(|_| survey.rivals.contains(&survey.to)) {
                next.note(step::BEGUN_FIRST, at_ms, "contradicted");
            }
        }
        next.note(step::BEGUN, now_ms, "");
        next.lease_counter = 1;
        failover.record = failover.replace(next, known.as_ref()).await?;
        crash("failover-begun");
        failover.since = Instant::now();
        Ok(failover)
    }

    /// Writes the record; one that was written by an attempt without an answer, or by a second process that
    /// does the same, is as good.
    async fn replace(
        &self,
        next: ControlRow,
        known: Option<&ControlRow>,
    ) -> Result<ControlRow, Ended> {
        let written = self
            .patiently(async || self.state.replace_control(&next, known).await)
            .await?;
        if written == Written::Yes {
            return Ok(next);
        }
        let now = self.patiently(async || self.state.control().await).await?;
        match now {
            Some(now) if now.active == next.active && now.epoch == next.epoch => Ok(now),
            now => Err(Ended::Overtaken(overtaken(now.as_ref(), &self.survey.to))),
        }
    }

    /// Changes the record, whoever else works at the same failover.
    pub(super) async fn store(&mut self, change: impl Fn(&mut ControlRow)) -> Result<(), Ended> {
        for _ in 0..ATTEMPTS_MAX {
            let mut next = self.record.clone();
            change(&mut next);
            if next == self.record {
                return Ok(());
            }
            next.lease_counter += 1;
            let known = &self.record;
            let written = self
                .patiently(async || self.state.replace_control(&next, Some(known)).await)
                .await?;
            if written == Written::Yes {
                self.record = next;
                return Ok(());
            }
            let now = self.patiently(async || self.state.control().await).await?;
            match now {
                Some(now) if now.epoch == next.epoch && now.active == next.active => {
                    self.record = now;
                }
                now => {
                    return Err(Ended::Overtaken(overtaken(now.as_ref(), &self.survey.to)));
                }
            }
        }
        Err(Ended::Failed(Failure::new(
            "The control record could not be written",
            "Somebody else writes it all the time",
            "Find out who, and type the same command again: it goes on where it stopped",
        )))
    }

    /// Makes a call to the target again while its failure may pass by itself.
    pub(super) async fn patiently<T>(
        &self,
        call: impl AsyncFn() -> Result<T, Fault>,
    ) -> Result<T, Ended> {
        let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
        let mut attempts = 0;
        loop {
            attempts += 1;
            let fault = match call().await {
                Ok(done) => return Ok(done),
                Err(fault) => fault,
            };
            if fault.policy() != Policy::Retry || attempts >= ATTEMPTS_MAX {
                let mut failure = failed(self.target, self.state, &fault);
                failure.next = format!(
                    "{}; then type the same command again: it goes on where it stopped",
                    failure.next.trim_end_matches('.')
                );
                return Err(Ended::Failed(failure));
            }
            tokio::select! {
                () = self.stop.cancelled() => return Err(Ended::Stopped),
                () = tokio::time::sleep(backoff.pause()) => {}
            }
        }
    }

    pub(super) fn now_ms(&self) -> i64 {
        self.target.clock.now_ms()
    }

    /// Does what is left to do.
    ///
    /// # Errors
    /// Why it did not come to its end. What is done stays done.
    pub async fn run(&mut self, watcher: &mut dyn Watcher) -> Result<Report, Ended> {
        let (survey, stop) = (self.survey, self.stop.clone());
        let found = OnceLock::new();
        let record = self.record.clone();
        // Whoever else fails over to another region is heard of all the time, as far as regions answer.
        let heard = async {
            loop {
                if let Some(failure) = overtaken_by(survey, &record).await {
                    // It is set nowhere else.
                    let _ = found.set(failure);
                    stop.cancel();
                    std::future::pending::<()>().await;
                }
                tokio::time::sleep(HEAR_EVERY).await;
            }
        };
        let done = tokio::select! {
            done = self.work(watcher) => done,
            () = heard => Err(Ended::Stopped),
        };
        match found.into_inner() {
            Some(failure) => Err(Ended::Overtaken(failure)),
            None => done,
        }
    }

    async fn work(&mut self, watcher: &mut dyn Watcher) -> Result<Report, Ended> {
        let (survey, epoch) = (self.survey, self.record.epoch);
        self.fence(watcher).await?;
        self.refuse_overtaken().await?;
        watcher.reached(&format!(
            "{} is active in epoch {epoch}: nothing of epoch {} can be sent any more",
            survey.to,
            epoch - 1
        ));
        let actions = self.act(watcher).await?;
        if !actions.is_empty() {
            let now_ms = self.now_ms();
            self.store(|row| row.note(step::ACTED, now_ms, "")).await?;
        }
        let untold = self.tell(watcher).await?;
        // Once more: the other one may have begun a moment ago.
        self.refuse_overtaken().await?;
        let writers = self.writers().await?;
        let source = self.sources_of(epoch - 1).into_iter().next();
        let left_behind = match source.filter(|_| self.is_planned()) {
            None => None,
            Some(source) => {
                watcher.under_way("looking for writes that came too late");
                let rows = writers.shards.iter();
                let rows = rows.filter(|row| row.epoch == epoch - 1);
                let left = planned::left_behind(source, rows);
                let left = tokio::select! {
                    () = self.stop.cancelled() => return Err(Ended::Stopped),
                    left = tokio::time::timeout(LEFT_TIMEOUT, left) => left,
                };
                Some(match left {
                    Ok(left) => left.map_err(|fault| fault.to_string()),
                    Err(_) => Err("it took too long to count them".to_owned()),
                })
            }
        };
        let ttl = self.switch_ttl().await;
        let late = self.watch(&writers, watcher).await?;
        Ok(Report {
            record: self.record.clone(),
            actions,
            ttl,
            in_flight: in_flight(&writers),
            doubts: writers.doubts.len(),
            late,
            untold,
            left_behind,
        })
    }

    /// Watches for late writes, if anything was in flight; then all is done, unless some of it could not be
    /// watched.
    async fn watch(
        &mut self,
        writers: &Writers,
        watcher: &mut dyn Watcher,
    ) -> Result<Found, Ended> {
        let mut late = self.watch_late(writers, watcher).await?;
        let begun_ms = self.record.done_ms(step::BEGUN).unwrap_or_default();
        // What they sent was dead by their `until`.
        let may = |owner: &Option<String>, until: i64| owner.is_some() && until >= begun_ms;
        let jobs = writers.jobs.iter();
        let jobs = jobs.filter(|row| may(&row.lease_owner, row.until));
        let jobs = jobs.map(|row| row.lease_key.clone());
        let segments = writers.segments.iter();
        let segments = segments.filter(|row| may(&row.lease_owner, row.until));
        let segments = segments.map(|row| row.lease_key.clone());
        // Nobody knows which keys those had in hand. To watch longer would not help.
        let unknown = jobs.chain(segments).map(|key| {
            let why = "it was at work when the epoch ended; what it sent last is not known";
            (key, why.to_owned())
        });
        late.unknown.extend(unknown);
        if !late.unwatched.is_empty() && !self.accepts_unwatched {
            return Ok(late);
        }
        crash("failover-watched");
        for doubt in &writers.doubts {
            // What it covers may never have been applied: then it is stranded, and failback asks.
            let past = past_doubt(doubt);
            self.patiently(async || self.state.create(&past).await)
                .await?;
            self.patiently(async || self.state.delete(doubt).await)
                .await?;
        }
        let note = match late.keys {
            _ if !late.unwatched.is_empty() => {
                "late writes were not looked for, and that was accepted".to_owned()
            }
            0 => "nothing was in flight".to_owned(),
            keys => format!(
                "{keys} key(s) were in flight: {} came late and were left, {} were undone",
                late.arrived, late.undone
            ),
        };
        let now_ms = self.now_ms();
        self.store(|row| {
            state::STEADY.clone_into(&mut row.state);
            row.note(step::WATCHED, now_ms, note.clone());
            row.note(step::STEADY, now_ms, "");
        })
        .await?;
        self.tidy(writers).await;
        Ok(late)
    }

    /// The regions that were active in `epoch`: one, but where two failovers contradicted each other. Not the
    /// target: nothing ever flowed from there to itself.
    fn sources_of(&self, epoch: u64) -> Vec<&'a RegionClients> {
        let past = self.record.past.iter().filter(|one| one.epoch == epoch);
        let past = past.filter(|one| one.active != self.survey.to);
        past.filter_map(|one| self.regions.get(&one.active))
            .collect()
    }

    /// Whether everything was applied before the epoch changed.
    fn is_planned(&self) -> bool {
        self.record.done_ms(step::APPLIED).is_some()
    }

    async fn writers(&self) -> Result<Writers, Ended> {
        let rows = self.patiently(async || self.state.rows().await).await?;
        Ok(Writers::before(self.record.epoch, rows, self.now_ms()))
    }

    /// Waits until nothing of the old epoch can be sent any more.
    async fn fence(&mut self, watcher: &mut dyn Watcher) -> Result<(), Ended> {
        if self.record.done_ms(step::FENCED).is_some() {
            return Ok(());
        }
        let lease = self.config.leases.duration;
        let epoch = self.record.epoch;
        let mut fenced: Option<Instant> = None;
        loop {
            let writers = self.writers().await?;
            let since_fenced = fenced.map(|at| at.elapsed());
            match fence::next(&writers, epoch, self.since.elapsed(), since_fenced, lease) {
                Next::Complete { acknowledged } => {
                    let how = match acknowledged {
                        true => "everybody acknowledged",
                        false => "a lease has passed since the rows were fenced",
                    };
                    crash("failover-complete");
                    let now_ms = self.now_ms();
                    return self
                        .store(|row| {
                            state::ACTIONS.clone_into(&mut row.state);
                            row.note(step::FENCED, now_ms, how);
                        })
                        .await;
                }
                Next::Fence => {
                    self.fence_rows(&writers).await?;
                    crash("failover-rows");
                    fenced = fenced.or_else(|| Some(Instant::now()));
                    continue;
                }
                Next::Wait => {
                    let who: Vec<String> = writers.unsettled(epoch).into_iter().collect();
                    watcher.under_way(&format!(
                        "waiting for {} writer(s) of epoch {} to stop: {}",
                        who.len(),
                        epoch - 1,
                        who.join(", ")
                    ));
                }
            }
            let pause = LOOK_EVERY.min(lease / 20);
            tokio::select! {
                () = self.stop.cancelled() => return Err(Ended::Stopped),
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// Moves the counter of every row that somebody writes under, so that no renewal succeeds any more.
    async fn fence_rows(&self, writers: &Writers) -> Result<(), Ended> {
        let epoch = self.record.epoch;
        let shards: Vec<&ShardRow> = writers.unfenced().collect();
        let fenced = futures::stream::iter(shards)
            .map(async |row| {
                let next = row.fenced_by(epoch);
                // Refused: its owner was faster, and the next look shows what it wrote.
                self.patiently(async || self.state.replace(&next, row.lease_counter).await)
                    .await
            })
            .buffer_unordered(ROWS_AT_ONCE)
            .collect::<Vec<_>>();
        for one in fenced.await {
            one?;
        }
        let holds = writers.holds();
        let bumped = futures::stream::iter(holds)
            .map(async |(key, counter)| {
                self.patiently(async || self.state.bump(key, counter).await)
                    .await
            })
            .buffer_unordered(ROWS_AT_ONCE)
            .collect::<Vec<_>>();
        for one in bumped.await {
            one?;
        }
        Ok(())
    }

    /// Copies the record to the regions that answer: their workers hear of it at once, and remember it.
    async fn tell(&mut self, watcher: &mut dyn Watcher) -> Result<Vec<(String, String)>, Ended> {
        if self.record.done_ms(step::TOLD).is_some() {
            return Ok(Vec::new());
        }
        watcher.under_way("telling the other regions");
        let mut untold = Vec::new();
        let others = &self.survey.regions[1..];
        let told = others.iter().map(|seen| self.tell_region(seen));
        for (seen, told) in others.iter().zip(futures::future::join_all(told).await) {
            if let Err(why) = told {
                untold.push((seen.label.clone(), why));
            }
        }
        let note = match untold.len() {
            0 => String::new(),
            some => format!("{some} region(s) did not answer, and find out by themselves"),
        };
        crash("failover-told");
        let now_ms = self.now_ms();
        self.store(|row| row.note(step::TOLD, now_ms, note.clone()))
            .await?;
        Ok(untold)
    }

    async fn tell_region(&self, seen: &RegionSeen) -> Result<(), String> {
        let own = match seen.state.control().await {
            Ok(own) => own,
            // Without a state table there is nobody to tell.
            Err(fault) if fault.class == crate::error::Class::NotFound => return Ok(()),
            Err(fault) => return Err(fault.to_string()),
        };
        // What its own record says of it counts as well: a quarantine ends by no failover.
        let current = (self.record.active.as_str(), self.record.epoch);
        let part = part(&seen.label, current, own.as_ref(), [&self.record]);
        let Some(copy) = copy_for(&seen.label, part, &self.record, own.as_ref()) else {
            return Ok(());
        };
        match seen.state.replace_control(&copy, own.as_ref()).await {
            Ok(Written::Yes) => Ok(()),
            Ok(Written::Refused) => Err("its record was written by somebody else".to_owned()),
            Err(fault) => Err(fault.to_string()),
        }
    }

    /// Removes the rows of processes of epochs that are over, and the names of their owners from leases:
    /// nothing that they sent can take effect any more, and the next failover need not wait for them.
    /// Positions stay. What could not be removed makes that one wait longer, and does no harm.
    async fn tidy(&self, writers: &Writers) {
        for row in &writers.workers {
            let _ = self.state.delete(row).await;
        }
        // What a job sent last may take effect until then, and its row is what tells of it.
        let now_ms = self.now_ms();
        for row in writers.jobs.iter().filter(|row| row.until < now_ms) {
            let _ = self.state.delete(row).await;
        }
        for row in writers.in_flight() {
            let mut next = row.clone();
            next.fenced_owner = None;
            next.lease_counter += 1;
            let _ = self.state.replace(&next, row.lease_counter).await;
        }
        for row in writers
            .segments
            .iter()
            .filter(|row| row.lease_owner.is_some() && row.until < now_ms)
        {
            let mut next = row.clone();
            next.lease_owner = None;
            next.lease_counter += 1;
            let _ = self.state.replace(&next, row.lease_counter).await;
        }
    }
}

/// What the owners of fenced leases may have sent.
fn in_flight(writers: &Writers) -> Vec<InFlight> {
    let shards = writers.in_flight();
    shards
        .map(|row| InFlight {
            table: row.table.clone(),
            shard: row.shard_id.clone(),
            after: row.checkpoint.clone(),
            owner: row.fenced_owner.clone().unwrap_or_default(),
        })
        .collect()
}
