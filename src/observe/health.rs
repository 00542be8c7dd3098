//! Whether the worker lives, whether it is ready, and why not.
//!
//! An outage is two events, not two thousand: one when it begins and one when it ends, whatever
//! the number of shards and retries in between.

mod signs;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

pub use signs::{LettersLeft, TableDoubts, TableTap, progress};

use crate::lease::row::Mending;

use super::liveness::Ledger;
use crate::error::{Failure, Fault, Policy};
use crate::lease::row::GapReason;

/// A failure that passes by itself is no outage before it has lasted this long.
const PATIENCE: Duration = Duration::from_secs(2);
/// The worker's heart beats every second; silent for this long, it is dead.
const HEARTBEAT_LIMIT: Duration = Duration::from_secs(30);

/// What cannot be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scope {
    /// The source table's stream.
    Source,
    /// The replica table.
    Replica,
    /// The state table.
    State,
    /// The dead letters.
    DeadLetters,
}

/// An outage that is open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenOutage {
    /// What cannot be reached.
    pub scope: Scope,
    /// The table, where it is one table's.
    pub table: String,
    /// For how long.
    pub lasted: Duration,
    /// The failure.
    pub fault: Fault,
}

impl Scope {
    /// All of them.
    pub const ALL: [Scope; 4] = [
        Scope::Source,
        Scope::Replica,
        Scope::State,
        Scope::DeadLetters,
    ];

    /// The name in messages.
    pub const fn label(self) -> &'static str {
        match self {
            Scope::Source => "source",
            Scope::Replica => "replica",
            Scope::State => "state",
            Scope::DeadLetters => "dead-letters",
        }
    }
}

/// One reason for not being ready.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Reason {
    /// What kind: `starting`, `outage-source`, `gap-never-copied`, `table-stopped`, `paused`,
    /// `shard-stalled` and so on.
    pub code: String,
    /// The table, where it is one table's.
    pub table: String,
    /// One sentence.
    pub text: String,
    /// What to do.
    pub next: String,
}

/// Why a worker neither feeds nor stands by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Idle {
    /// Its region was active, and may hold writes that never left.
    Quarantined {
        /// Label of its region.
        here: String,
        /// Label of the active region.
        active: String,
        /// Number of the epoch.
        epoch: u64,
        /// How far what is stranded is captured, in words; empty while nothing can be said of it.
        captured: String,
    },
    /// It cannot be said what its region is for.
    Unknown(Failure),
    /// The active region has changed, and it finds out what its own is for.
    Changing,
}

/// The codes of the reasons of [`Idle`].
pub const IDLE_CODES: [&str; 3] = ["quarantined", "role-changing", "no-role"];

impl Idle {
    /// The reason that it is.
    pub fn reason(&self) -> Reason {
        let (code, text, next) = match self {
            Idle::Quarantined {
                here,
                active,
                epoch,
                captured,
            } => (
                "quarantined",
                format!(
                    "{here} was active before {active} became so in epoch {epoch}, and may hold writes that never left it: nothing is written there{}{captured}",
                    if captured.is_empty() { "" } else { "; " }
                ),
                "Stop what still writes to its tables, and see the way home with `farshore failback`".to_owned(),
            ),
            Idle::Changing => (
                "role-changing",
                "the active region has changed, and what this one is for is being found out".to_owned(),
                "Wait a moment".to_owned(),
            ),
            Idle::Unknown(failure) => (
                "no-role",
                format!("{}: {}", failure.what, failure.why),
                failure.next.clone(),
            ),
        };
        Reason {
            code: code.to_owned(),
            table: String::new(),
            text,
            next,
        }
    }
}

#[derive(Debug)]
struct Outage {
    since: Instant,
    fault: Fault,
    /// Shards (or other parts) that fail. It ends when none does.
    parts: BTreeSet<String>,
    /// Whether it has been announced.
    begun: bool,
}

#[derive(Debug, Default)]
struct State {
    outages: BTreeMap<(Scope, String), Outage>,
    gaps: BTreeMap<(String, GapReason), BTreeSet<String>>,
    /// Tables that stopped for good until a person decides, with text and next step.
    stopped: BTreeMap<String, (String, String)>,
    starting: BTreeSet<String>,
    standby: Option<String>,
    /// Why it neither feeds nor stands by.
    idle: Option<Idle>,
    heartbeat: Option<Instant>,
    /// Seconds until the stream of each table forgets what may not be applied.
    headroom: BTreeMap<String, f64>,
    /// Closed taps, by table.
    taps: BTreeMap<String, TableTap>,
    /// Copies and repairs, by table.
    mending: BTreeMap<String, Mending>,
    /// Doubts, by table.
    doubts: BTreeMap<String, TableDoubts>,
    /// Dead letters in a queue.
    letters: Option<LettersLeft>,
    /// The signs of life of a worker that feeds.
    ledger: Option<Ledger>,
    /// What was missing when last looked, by code and table.
    missing: BTreeSet<(&'static str, String)>,
}

/// The health of this worker. Shared by everything that runs in it.
#[derive(Debug, Default)]
pub struct Health {
    state: Mutex<State>,
}

impl Health {
    fn state(&self) -> MutexGuard<'_, State> {
        // What a panicking holder leaves behind is still the best there is to show.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A call failed. Announces an outage when it is one: at once where a person has to act,
    /// after a little patience where it may pass.
    pub fn failed(&self, scope: Scope, table: &str, part: &str, fault: &Fault) {
        let mut state = self.state();
        let outage = state
            .outages
            .entry((scope, table.to_owned()))
            .or_insert_with(|| Outage {
                since: Instant::now(),
                fault: fault.clone(),
                parts: BTreeSet::new(),
                begun: false,
            });
        outage.parts.insert(part.to_owned());
        outage.fault = fault.clone();
        let begins = fault.policy() == Policy::WaitAndAlarm || outage.since.elapsed() >= PATIENCE;
        if begins && !outage.begun {
            outage.begun = true;
            tracing::warn!(
                table,
                scope = scope.label(),
                class = fault.class.label(),
                reason = fault.summary(),
                next = fault.next_step(),
                "outage begins: waiting until it passes"
            );
        }
    }

    /// A call succeeded. Ends the outage when no other part of it fails any more.
    pub fn succeeded(&self, scope: Scope, table: &str, part: &str) {
        let mut state = self.state();
        let key = (scope, table.to_owned());
        let Some(outage) = state.outages.get_mut(&key) else {
            return;
        };
        outage.parts.remove(part);
        if outage.parts.is_empty()
            && let Some(ended) = state.outages.remove(&key)
            && ended.begun
        {
            tracing::info!(
                table,
                scope = scope.label(),
                seconds = ended.since.elapsed().as_secs_f64(),
                "outage ends"
            );
        }
    }

    /// A part is no longer this worker's: what it reported no longer counts.
    pub fn forget(&self, table: &str, part: &str) {
        for scope in Scope::ALL {
            self.succeeded(scope, table, part);
        }
    }

    /// The outages that are open.
    pub fn outages(&self) -> Vec<OpenOutage> {
        let state = self.state();
        let open = state.outages.iter().filter(|(_, outage)| outage.begun);
        open.map(|((scope, table), outage)| OpenOutage {
            scope: *scope,
            table: table.clone(),
            lasted: outage.since.elapsed(),
            fault: outage.fault.clone(),
        })
        .collect()
    }

    /// The gaps that the state table holds now. Replaces what was known.
    pub fn set_gaps<'a>(&self, gaps: impl Iterator<Item = (&'a str, GapReason, &'a str)>) {
        let mut next: BTreeMap<(String, GapReason), BTreeSet<String>> = BTreeMap::new();
        for (table, reason, key) in gaps {
            next.entry((table.to_owned(), reason))
                .or_default()
                .insert(key.to_owned());
        }
        let mut state = self.state();
        for ((table, reason), keys) in &next {
            if !state.gaps.contains_key(&(table.clone(), *reason)) {
                tracing::warn!(
                    table,
                    reason = reason.label(),
                    gaps = keys.len(),
                    gap = keys.first(),
                    next = reason.next_step(),
                    "gap: records were never applied"
                );
            }
            super::metrics::gaps_open(table, reason.label(), keys.len());
        }
        for (table, reason) in state.gaps.keys() {
            if !next.contains_key(&(table.clone(), *reason)) {
                super::metrics::gaps_open(table, reason.label(), 0);
            }
        }
        state.gaps = next;
    }

    /// A table stopped until a person decides.
    pub fn stop_table(&self, table: &str, text: &str, next: &str) {
        let mut state = self.state();
        let stopped = (text.to_owned(), next.to_owned());
        if state.stopped.get(table) != Some(&stopped) {
            tracing::error!(table, next, "{text}");
            state.stopped.insert(table.to_owned(), stopped);
        }
    }

    /// What stopped a table, saying `text`, is over.
    pub fn unstop_table(&self, table: &str, text: &str) {
        let mut state = self.state();
        if state.stopped.get(table).is_some_and(|(why, _)| why == text) {
            tracing::info!(table, "no longer: {text}");
            state.stopped.remove(table);
        }
    }

    /// A table is not followed yet.
    pub fn set_starting(&self, table: &str) {
        self.state().starting.insert(table.to_owned());
    }

    /// A table is being followed.
    pub fn set_started(&self, table: &str) {
        self.state().starting.remove(table);
    }

    /// This region is the active one: nothing is fed into it.
    pub fn set_standby(&self, active: &str) {
        self.state().standby = Some(active.to_owned());
    }

    /// A new role begins: what the one before has left says nothing any more. `idle` says why it neither
    /// feeds nor stands by, where it does not; `starting` are the tables that it is about to follow.
    pub fn begin_role<'a>(&self, idle: Option<Idle>, starting: impl Iterator<Item = &'a str>) {
        let mut state = self.state();
        let gaps = std::mem::take(&mut state.gaps);
        // In one step, so that nobody sees a worker without any reason in between.
        *state = State {
            heartbeat: state.heartbeat,
            idle,
            starting: starting.map(str::to_owned).collect(),
            ..State::default()
        };
        drop(state);
        for (table, reason) in gaps.keys() {
            super::metrics::gaps_open(table, reason.label(), 0);
        }
    }

    /// Why it neither feeds nor stands by, in other words. Nothing else changes.
    pub fn set_idle(&self, idle: Idle) {
        self.state().idle = Some(idle);
    }

    /// The region that is active, when this worker stands by.
    pub fn standby(&self) -> Option<String> {
        self.state().standby.clone()
    }

    /// The worker's main loop came round.
    pub fn beat(&self) {
        self.state().heartbeat = Some(Instant::now());
    }

    /// Whether the main loop still comes round.
    pub fn is_live(&self) -> bool {
        self.state()
            .heartbeat
            .is_none_or(|at| at.elapsed() < HEARTBEAT_LIMIT)
    }

    /// Whether the worker is under way: its main loop has come round, and every table is followed.
    pub fn is_following(&self) -> bool {
        let state = self.state();
        state.heartbeat.is_some() && state.starting.is_empty()
    }

    /// Why the worker is not ready; empty when it is.
    pub fn reasons(&self) -> Vec<Reason> {
        let state = self.state();
        let mut reasons = Vec::new();
        reasons.extend(state.idle.as_ref().map(Idle::reason));
        for table in &state.starting {
            reasons.push(Reason {
                code: "starting".to_owned(),
                table: table.clone(),
                text: "its shards are not listed, or not read for the first time, yet".to_owned(),
                next: "Wait a moment".to_owned(),
            });
        }
        for ((scope, table), outage) in state.outages.iter().filter(|(_, outage)| outage.begun) {
            reasons.push(Reason {
                code: format!("outage-{}", scope.label()),
                table: table.clone(),
                text: format!(
                    "{} ({}) for {} s",
                    outage.fault.summary(),
                    outage.fault.class.label(),
                    outage.since.elapsed().as_secs()
                ),
                next: outage.fault.next_step().to_owned(),
            });
        }
        for ((table, reason), keys) in &state.gaps {
            let gaps = keys.len();
            let code = format!("gap-{}", reason.label());
            reasons.push(state.gap_reason(code, table, *reason, gaps));
        }
        for (table, (text, next)) in &state.stopped {
            reasons.push(Reason {
                code: "table-stopped".to_owned(),
                table: table.clone(),
                text: text.clone(),
                next: next.clone(),
            });
        }
        state.more_reasons(&mut reasons, Instant::now());
        reasons
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Class, Operation};

    fn fault(class: Class) -> Fault {
        Fault::own(Operation::Write, class, "code", "message")
    }

    #[test]
    fn an_outage_that_needs_a_person_shows_at_once_and_ends_with_its_last_part() {
        let health = Health::default();
        health.failed(Scope::Replica, "t", "s1", &fault(Class::Access));
        health.failed(Scope::Replica, "t", "s2", &fault(Class::Access));
        assert_eq!(health.reasons()[0].code, "outage-replica");
        health.succeeded(Scope::Replica, "t", "s1");
        assert_eq!(health.reasons().len(), 1);
        health.forget("t", "s2");
        assert!(health.reasons().is_empty());
    }

    #[test]
    fn a_failure_that_passes_is_no_outage() {
        let health = Health::default();
        health.failed(Scope::Source, "t", "s", &fault(Class::Throttled));
        assert!(health.reasons().is_empty());
        health.succeeded(Scope::Source, "t", "s");
    }

    #[test]
    fn a_gap_keeps_readiness_red_until_its_row_is_gone() {
        let health = Health::default();
        health.set_gaps([("t", GapReason::NeverCopied, "k")].into_iter());
        assert_eq!(health.reasons()[0].code, "gap-never-copied");
        health.set_gaps(std::iter::empty());
        assert!(health.reasons().is_empty());
    }
}
