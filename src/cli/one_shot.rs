//! What one-shot commands that write to a replica have in common: the tap and the epoch they heed,
//! the row they hold, the line that tells how far they are.

use std::io::IsTerminal;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::future::join_all;
use indicatif::{ProgressBar, ProgressStyle};
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::dynamo::clock::{rfc3339, uptime};
use crate::dynamo::{RegionClients, Regions};
use crate::error::{Failure, Fault};
use crate::lease::control::{Heed, Part, part};
use crate::lease::hold::{Hold, Terms};
use crate::lease::row::{ControlRow, JobRow, Row, comparison_rows, comparisons};
use crate::lease::rules::{Observer, take_name};
use crate::lease::table::StateTable;
use crate::lease::term::Term;
use crate::run::start::unusable;

/// The flow that is written in.
#[derive(Clone, Copy)]
pub(super) struct Flow<'a> {
    pub(super) config: &'a Config,
    /// The region of the state table.
    pub(super) region: &'a RegionClients,
    pub(super) state: &'a StateTable,
    /// Label of the active region.
    pub(super) active: &'a str,
    pub(super) epoch: u64,
    /// Tables written to, by their names in the configuration; none means all.
    pub(super) tables: &'a [String],
    /// Whether the tap counts: not for what is written against the flow.
    pub(super) heeds_tap: bool,
    /// The state table of the region that is read from: nobody may feed the tables there.
    pub(super) other: Option<&'a StateTable>,
    /// Label of the region that is read from.
    pub(super) source: &'a str,
    /// Label of the region that is written to.
    pub(super) target: &'a str,
    /// The other state tables of the group: a later epoch counts wherever it is seen.
    pub(super) elsewhere: &'a [StateTable],
    /// The right to write in the epoch: each look confirms it.
    pub(super) term: &'a Term,
    /// Whether a worker that feeds the tables in this direction is in the way, too.
    pub(super) is_alone: bool,
}

/// The state tables of all regions but `known`.
pub(super) fn elsewhere(config: &Config, regions: &Regions, known: &[&str]) -> Vec<StateTable> {
    let others = regions
        .iter()
        .filter(|region| !known.contains(&region.label.as_str()));
    let patience = config.leases.duration / 3;
    others
        .map(|region| StateTable::new(region.tables_within(patience), config.state_table()))
        .collect()
}

/// Whether somebody feeds the tables that are read from.
pub(super) enum Fed {
    No,
    /// Somebody owns a shard, and may be dead.
    Maybe(String),
    /// Somebody has renewed a lease since the first look, or repairs a table.
    Yes(String),
}

/// Looks at the owners of shards, the first one and those since.
#[derive(Default)]
pub(super) struct Owners {
    first: Option<Instant>,
    /// Those who feed the tables that are read from, and those who feed the others.
    feeders: [Observer; 2],
}

impl Owners {
    pub(super) fn new() -> Self {
        Self::default()
    }
}

/// Why nothing may be written now.
enum Closed {
    Until(String),
    /// Somebody may feed the other way round: a second look tells.
    Maybe,
}

impl Flow<'_> {
    /// Why nothing may be written now: the epoch has moved, somebody feeds the other way round, or a tap
    /// is closed.
    async fn closed(&self, owners: &mut Owners) -> Result<Option<Closed>, Fault> {
        let begun = uptime();
        // The own state table first: what it says counts, whether the other one answers or not.
        if let Some(why) = self.moved(self.state).await? {
            return Ok(Some(Closed::Until(why)));
        }
        // Best effort: one that does not answer says nothing.
        let asked = self.elsewhere.iter().map(|state| self.moved(state));
        if let Some(why) = join_all(asked).await.into_iter().flatten().flatten().next() {
            return Ok(Some(Closed::Until(why)));
        }
        // A region that is to become active says so in its own state table first, and that may be this one.
        if let Some(other) = self.other
            && let Some(why) = self.moved(other).await?
        {
            return Ok(Some(Closed::Until(why)));
        }
        self.term.confirm(begun);
        if self.heeds_tap
            && let Some(why) = self.tap_is_closed().await?
        {
            return Ok(Some(Closed::Until(why)));
        }
        let mut maybe = None;
        for (place, state) in [self.other, self.is_alone.then_some(self.state)]
            .into_iter()
            .enumerate()
        {
            let Some(state) = state else { continue };
            if let Some(why) = self.moved(state).await? {
                return Ok(Some(Closed::Until(why)));
            }
            match self.fed(place, state, owners).await? {
                Fed::No => {}
                Fed::Maybe(_) => maybe = Some(Closed::Maybe),
                Fed::Yes(why) => return Ok(Some(Closed::Until(why))),
            }
        }
        if let Some(why) = self.repaired_the_other_way(self.state.rows().await?) {
            return Ok(Some(Closed::Until(why)));
        }
        Ok(maybe)
    }

    /// A job that writes to the tables that are read from.
    fn repaired_the_other_way(&self, rows: Vec<Row>) -> Option<String> {
        let (plans, segments) = comparison_rows(rows);
        let now_ms = self.region.clock.now_ms();
        let jobs = comparisons(&plans, &segments);
        let other = jobs.iter().find(|job| {
            let plan = job.plan;
            let writes_there = plan.apply && plan.target == self.source;
            writes_there && self.writes_to(&plan.table) && job.is_alive(now_ms)
        });
        other.map(|job| {
            format!(
                "the reconcile {} repairs {} in {}, or died a short while ago",
                job.plan.job, job.plan.table, job.plan.target
            )
        })
    }

    async fn moved(&self, state: &StateTable) -> Result<Option<String>, Fault> {
        let control = state.control().await?;
        // A lower one is of a region that a failover left behind: the highest epoch wins.
        let is_another = |epoch, active: &str| {
            epoch > self.epoch || (epoch == self.epoch && active != self.active)
        };
        let is_torn =
            |control: &ControlRow| !control.rivals.is_empty() && control.epoch >= self.epoch;
        let Some(control) = control else {
            return Ok(None);
        };
        let (active, epoch) = (&control.active, control.epoch);
        if is_another(epoch, active) || is_torn(&control) {
            let why = match control.rivals.is_empty() {
                true => format!("the active region is {active} since epoch {epoch}"),
                false => format!("epoch {epoch} names several active regions"),
            };
            self.term.end(Heed::Over {
                epoch,
                active: active.clone(),
            });
            return Ok(Some(why));
        }
        let current = (self.active, self.epoch);
        Ok(match part(self.target, current, None, [&control]) {
            Part::Quarantined => Some(format!(
                "{} is in quarantine: it may hold writes that never left it",
                self.target
            )),
            Part::Active | Part::Fed => None,
        })
    }

    async fn tap_is_closed(&self) -> Result<Option<String>, Fault> {
        let mut pauses = vec![self.state.pause(None).await?];
        for table in &self.config.tables {
            if self.writes_to(&table.name) {
                pauses.push(self.state.pause(Some(&table.name)).await?);
            }
        }
        let standing = pauses.into_iter().flatten().find(|row| row.is_closed());
        Ok(standing.map(|row| {
            let subject = row.table.unwrap_or_else(|| "all tables".to_owned());
            format!(
                "the tap of {subject} is closed by {}: {}",
                row.by, row.reason
            )
        }))
    }

    fn writes_to(&self, table: &str) -> bool {
        self.tables.is_empty() || self.tables.iter().any(|name| name == table)
    }

    /// Whether somebody feeds the tables that are read from: what is written would come back, and newer
    /// items would be lost.
    pub(super) async fn fed_the_other_way(&self, owners: &mut Owners) -> Result<Fed, Fault> {
        match self.other {
            Some(other) => self.fed(0, other, owners).await,
            None => Ok(Fed::No),
        }
    }

    /// Whether somebody feeds the tables of the region of `state`, the `place`th that is looked at.
    async fn fed(
        &self,
        place: usize,
        state: &StateTable,
        owners: &mut Owners,
    ) -> Result<Fed, Fault> {
        let rows = state.rows().await?;
        if place == 0
            && let Some(why) = self.repaired_the_other_way(rows.clone())
        {
            return Ok(Fed::Yes(why));
        }
        let mut shards = Vec::new();
        for row in rows {
            if let Row::Shard(row) = row
                && self.writes_to(&row.table)
                && !row.is_finished()
            {
                shards.push(row);
            }
        }
        let now = Instant::now();
        let first = *owners.first.get_or_insert(now);
        let observer = &mut owners.feeders[place];
        observer.observe(shards.iter(), now);
        let mut fed = Fed::No;
        for row in shards {
            if observer.is_takeable(&row, self.patience(), now) {
                continue;
            }
            let moved = observer.still_since(&row) > Some(first);
            let Some(owner) = row.lease_owner else {
                continue;
            };
            if moved {
                let how = match place {
                    0 => "feeds the other way round",
                    _ => "feeds these tables, and this strategy is right only where nobody does",
                };
                return Ok(Fed::Yes(format!("the worker {owner} {how}")));
            }
            fed = Fed::Maybe(format!("the worker {owner} was not stopped"));
        }
        Ok(fed)
    }

    /// An owner whose row does not move for so long is dead.
    fn patience(&self) -> Duration {
        self.config.leases.duration * 2
    }

    pub(super) async fn refuse_closed(&self) -> Result<(), Failure> {
        let failed = |fault: Fault| unusable(self.region, self.state.name(), &fault);
        let mut owners = Owners::new();
        loop {
            let why = match self.closed(&mut owners).await.map_err(failed)? {
                None => return Ok(()),
                Some(Closed::Until(why)) => why,
                // One that was killed owns its shards for ever, where nobody takes them.
                Some(Closed::Maybe) => {
                    tokio::time::sleep(self.config.leases.duration / 3).await;
                    continue;
                }
            };
            return Err(Failure::new(
                "Nothing may be written there now",
                why,
                "Open the tap with `farshore resume` (or name one open table with --table), or stop the worker that is named, and ask again",
            ));
        }
    }

    /// Cancels `stop` when the epoch moves, a tap closes or somebody feeds the other way round, and says
    /// why in `ended`; until `done`.
    pub(super) async fn watch(
        &self,
        stop: &CancellationToken,
        done: &CancellationToken,
        ended: &Mutex<Option<String>>,
    ) {
        let mut owners = Owners::new();
        loop {
            // A failure says nothing; the hold ends by itself where the state table stays away.
            if let Ok(Some(Closed::Until(why))) = self.closed(&mut owners).await {
                *ended.lock().unwrap_or_else(PoisonError::into_inner) = Some(why);
                stop.cancel();
                return;
            }
            tokio::select! {
                () = done.cancelled() => return,
                () = tokio::time::sleep(self.config.leases.duration / 3) => {}
            }
        }
    }

    /// How rows are held in the state table, by jobs whose writes may take effect so late.
    pub(super) fn terms(&self, late_effect: Duration) -> Terms {
        Terms {
            state: self.state.clone(),
            clock: Arc::clone(&self.region.clock),
            duration: self.config.leases.duration,
            late_effect,
        }
    }

    /// Takes the row of a job for `me`. `subject` names the job in messages: one at a time may have it.
    pub(super) async fn hold(
        &self,
        row: JobRow,
        me: &str,
        subject: &str,
    ) -> Result<Arc<Hold<JobRow>>, Failure> {
        let terms = self.terms(self.config.leases.late_effect);
        let holder = take_name(me, rand::random());
        let failed = |fault: Fault| unusable(self.region, self.state.name(), &fault);
        let known = self.state.job(&row.lease_key).await.map_err(failed)?;
        let held = match known {
            None => Hold::create(terms, row, holder).await,
            Some(known) if known.until <= self.region.clock.now_ms() => {
                let row = JobRow {
                    lease_counter: known.lease_counter,
                    until: known.until,
                    ..row
                };
                Hold::take(terms, row, holder).await
            }
            Some(known) => {
                return Err(Failure::new(
                    format!("Another {subject} is at work, or died a short while ago"),
                    format!(
                        "It began at {}, and its writes may take effect until {}",
                        known.at,
                        rfc3339(known.until)
                    ),
                    "Wait until then, or until it has ended, and ask again",
                ));
            }
        };
        match held.map_err(failed)? {
            Some(hold) => Ok(hold),
            None => Err(Failure::new(
                format!("Another {subject} began at the same moment"),
                "Both would have worked at the same items or letters",
                "Wait until it has ended, and ask again",
            )),
        }
    }
}

/// A line on stderr that tells how far it is, on a terminal.
pub(super) struct Line(ProgressBar);

impl Line {
    /// `quiet`: none at all.
    pub(super) fn new(quiet: bool) -> Self {
        let bar = match std::io::stderr().is_terminal() && !quiet {
            true => ProgressBar::new_spinner(),
            false => ProgressBar::hidden(),
        };
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} ({elapsed})") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(200));
        Self(bar)
    }

    pub(super) fn say(&self, message: String) {
        self.0.set_message(message);
    }

    /// A line on stderr that stays, terminal or not.
    pub(super) fn above(&self, message: &str) {
        self.0.suspend(|| eprintln!("{message}"));
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
