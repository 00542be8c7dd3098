//! Failback: home again, with the writes that never left.
//!
//! ```text
//!   quarantine: what is stranded is captured ─┐
//!   active region: a ledger of what it wrote ─┴▶ judged key by key ─▶ applied, kept or reported ─▶ the flow turns
//!                                                ([`judge`], pure)                                  round
//!
//!   captured ─▶ applied ─▶ turned ─▶ equal ─▶ home        each stored in the active region's control record
//! ```
//!
//! The same command goes on where one that was killed left off: what was decided about a write stands in its row, and
//! what was applied equals what the active region holds. Nothing is fed into the region that comes home before
//! everything that was written there until then is captured, whoever asks.

pub mod applying;
pub mod capture;
mod compare;
pub mod find;
pub mod follow;
pub mod judge;
pub mod judging;
pub mod keeper;
pub mod kept;
pub mod ledger;
pub mod report;
pub mod store;
pub mod turning;

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::dynamo::clock::uptime;
use crate::dynamo::{RegionClients, Regions};
use crate::error::{Failure, Fault};
use crate::lease::row::{ControlRow, Track, TrackRow};
use crate::lease::table::{StateTable, Written};
use crate::lease::term::Term;
use crate::run::start::unusable;
use judge::{ConflictPolicy, StrandedPolicy};
use store::Store;

/// Steps as the record names them, each with the label of the region that comes home.
pub mod step {
    /// What is stranded is captured up to the command.
    pub const CAPTURED: &str = "home-captured";
    /// What was chosen is applied, and the rest is kept or reported.
    pub const APPLIED: &str = "home-applied";
    /// The quarantine is over, and the flow turns round.
    pub const TURNED: &str = "home-turned";
    /// The region is a whole replica.
    pub const EQUAL: &str = "home-equal";
    /// All is done.
    pub const HOME: &str = "home";

    /// The name of a step of the region `label`.
    pub fn of(step: &str, label: &str) -> String {
        format!("{step}:{label}")
    }
}

/// How often the control record is written again because somebody else did.
const ATTEMPTS_MAX: u32 = 30;
/// Between two looks at what is waited for.
const LOOK_EVERY: Duration = Duration::from_millis(300);

/// How a failback did not come to its end.
#[derive(Debug)]
pub enum Ended {
    /// It could not go on; the same command does later.
    Failed(Failure),
    /// A person has to do something first; the same command goes on then.
    Waits(Failure),
    /// Asked to stop: the same command goes on.
    Stopped,
}

impl From<Failure> for Ended {
    fn from(failure: Failure) -> Self {
        Ended::Failed(failure)
    }
}

/// What is to become of what is stranded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policies {
    /// Of keys that the active region has not written.
    pub stranded: StrandedPolicy,
    /// Of keys that both have.
    pub conflicts: ConflictPolicy,
}

/// A region on its way home.
pub struct Home<'a> {
    /// The configuration.
    pub config: &'a Config,
    /// All regions.
    pub regions: &'a Regions,
    /// The active region.
    pub active: &'a RegionClients,
    /// The region that comes home.
    pub back: &'a RegionClients,
    /// The state table of the active region.
    pub state: StateTable,
    /// That of the region that comes home.
    pub state_back: StateTable,
    /// Where the ledger is.
    pub store: Store,
    /// Where what is stranded is.
    pub store_back: Store,
    /// The active region's own control record, as last read or written.
    pub record: ControlRow,
    /// The last epoch in which the region that comes home was active.
    pub epoch_back: Option<u64>,
    /// The right to write to the active region.
    pub term: Arc<Term>,
    /// Asks it to stop.
    pub stop: CancellationToken,
}

impl Home<'_> {
    /// Whether `step` is done.
    pub fn is_done(&self, step: &str) -> bool {
        let name = step::of(step, &self.back.label);
        self.record.done_ms(&name).is_some()
    }

    /// When `step` was done, in milliseconds of the active region.
    pub fn done_ms(&self, step: &str) -> Option<i64> {
        self.record.done_ms(&step::of(step, &self.back.label))
    }

    /// Under which the rows of `table` stand.
    pub fn place<'b>(&self, table: &'b str) -> (u64, &'b str) {
        (self.epoch_back.unwrap_or(0), table)
    }

    /// How far what is stranded in `table` is captured.
    ///
    /// # Errors
    /// The region that comes home could not be asked.
    pub async fn capture(&self, table: &str) -> Result<Option<TrackRow>, Failure> {
        let (epoch, table) = self.place(table);
        let key = TrackRow::key_of(Track::Stranded, epoch, table);
        let row = compare::patiently(|| self.state_back.track(&key)).await;
        row.map_err(|fault| unusable(self.back, self.state_back.name(), &fault))
    }

    /// How far the ledger of `table` is.
    ///
    /// # Errors
    /// The active region could not be asked.
    pub async fn ledger_row(&self, table: &str) -> Result<Option<TrackRow>, Failure> {
        let key = TrackRow::key_of(Track::Ledger, self.record.epoch, table);
        let row = compare::patiently(|| self.state.track(&key)).await;
        row.map_err(|fault| unusable(self.active, self.state.name(), &fault))
    }

    /// Why the ledger of this epoch does not tell everything since the fence, where it does not.
    pub fn ledger_is_late(&self) -> Option<String> {
        let next = self.epoch_back.map(|epoch| epoch + 1);
        (next != Some(self.record.epoch)).then(|| {
            format!(
                "{} was not active in the epoch just before {}: what was written between is in no ledger",
                self.back.label, self.record.epoch
            )
        })
    }

    /// Reads the record, and confirms the right to write.
    ///
    /// # Errors
    /// It is another one's now, or could not be read.
    pub async fn confirm(&mut self) -> Result<(), Ended> {
        let begun = uptime();
        let now = compare::patiently(|| self.state.control()).await;
        let now = now.map_err(|fault| unusable(self.active, self.state.name(), &fault))?;
        // Best effort: whoever makes it active again says so in its own state table first.
        if let Ok(Some(elsewhere)) = self.state_back.control().await
            && elsewhere.epoch > self.record.epoch
        {
            return Err(overtaken(Some(&elsewhere)).into());
        }
        match now {
            Some(now) if self.is_same(&now) => {
                self.record = now;
                self.term.confirm(begun);
                Ok(())
            }
            now => Err(overtaken(now.as_ref()).into()),
        }
    }

    fn is_same(&self, now: &ControlRow) -> bool {
        let (epoch, active) = (self.record.epoch, &self.record.active);
        now.epoch == epoch && now.active == *active && now.rivals.is_empty()
    }

    /// Changes the record, whoever else works at it.
    async fn write(&mut self, change: impl Fn(&mut ControlRow)) -> Result<(), Ended> {
        for _ in 0..ATTEMPTS_MAX {
            let mut next = self.record.clone();
            change(&mut next);
            if next == self.record {
                return Ok(());
            }
            next.lease_counter += 1;
            let known = &self.record;
            let written =
                compare::patiently(|| self.state.replace_control(&next, Some(known))).await;
            let written =
                written.map_err(|fault| unusable(self.active, self.state.name(), &fault))?;
            if written == Written::Yes {
                self.record = next;
                return Ok(());
            }
            self.confirm().await?;
        }
        Err(Ended::Failed(Failure::new(
            "The control record could not be written",
            "Somebody else writes it all the time",
            "Find out who, and type the same command again: it goes on where it stopped",
        )))
    }

    /// Takes note that `step` is done.
    pub(super) async fn reach(&mut self, step: &str, note: &str) -> Result<(), Ended> {
        let (name, now_ms) = (step::of(step, &self.back.label), self.active.clock.now_ms());
        self.write(|row| row.note(&name, now_ms, note)).await
    }

    /// Waits a moment.
    async fn pause(&self) -> Result<(), Ended> {
        tokio::select! {
            () = self.stop.cancelled() => Err(Ended::Stopped),
            () = tokio::time::sleep(LOOK_EVERY) => Ok(()),
        }
    }

    fn could_not(&self, what: &str, region: &RegionClients, fault: &Fault) -> Failure {
        let mut failure = Failure::from_fault(format!("{what} in {}", region.label), fault);
        failure.next = format!(
            "{}; then type the same command again: it goes on where it stopped",
            failure.next.trim_end_matches('.')
        );
        failure
    }
}

fn overtaken(now: Option<&ControlRow>) -> Failure {
    match now {
        Some(now) => Failure::new(
            format!(
                "The active region has changed: {} is active in epoch {}",
                now.active, now.epoch
            ),
            format!("{} wrote that at {} ({})", now.by, now.at, now.reason),
            "Look at `farshore failback` once more: the way home may be another one now",
        ),
        None => Failure::new(
            "The control record is gone",
            "Somebody deleted it, or the state table was made anew",
            "Find out who; `farshore provision --apply` writes it where it is missing",
        ),
    }
}
