//! What health knows of taps, doubts and signs of life.

use std::time::{Duration, Instant};

use super::{HEARTBEAT_LIMIT, Health, Reason, Scope, State};
use crate::lease::row::{GapReason, HowFar, Mending};
use crate::observe::liveness::{Excuses, Finding, Ledger, Limits, Signs};
use crate::observe::metrics;
use crate::observe::view::reasons::low_headroom;

/// A closed tap.
#[derive(Debug, Clone, PartialEq)]
pub struct TableTap {
    /// Who closed it.
    pub by: String,
    /// Why.
    pub reason: String,
    /// When, RFC 3339.
    pub since: String,
    /// Seconds until the stream forgets the oldest record not applied, where that is known.
    pub headroom_s: Option<f64>,
}

/// The doubts of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TableDoubts {
    /// How many.
    pub open: usize,
    /// How many of them should have been repaired long ago.
    pub overdue: usize,
}

/// The dead letters that wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LettersLeft {
    /// How many wait.
    pub waiting: u64,
    /// Time until the queue forgets the oldest; `None` where none waits, or in a directory, which forgets
    /// nothing.
    pub left: Option<Duration>,
    /// Whether a person has to know.
    pub is_urgent: bool,
}

impl State {
    /// What outages excuse: whoever waits for them is not dead.
    fn excuses(&self, table: &str) -> Excuses {
        let away = |scope: Scope| {
            [table, ""].into_iter().any(|of| {
                self.outages
                    .get(&(scope, of.to_owned()))
                    .is_some_and(|outage| outage.begun)
            })
        };
        let paused = self.taps.contains_key(table);
        let stopped = self.stopped.contains_key(table);
        Excuses {
            reading: stopped || away(Scope::Source) || away(Scope::State),
            moving: paused
                || stopped
                || away(Scope::Replica)
                || away(Scope::State)
                || away(Scope::DeadLetters),
        }
    }

    fn findings(&self, now: Instant) -> Vec<Finding> {
        self.ledger.as_ref().map_or_else(Vec::new, |ledger| {
            ledger.findings(|table| self.excuses(table), now)
        })
    }

    /// Why a gap is open, and what becomes of it.
    pub(super) fn gap_reason(
        &self,
        code: String,
        table: &str,
        reason: GapReason,
        gaps: usize,
    ) -> Reason {
        let mut text = format!("{gaps} gap(s): records were never applied");
        let mut next = reason.next_step();
        let mending = self.mending.get(table).copied().unwrap_or_default();
        if let Some(how_far) = mending.repairing {
            text = format!("{text}; the repair is {}", progress(how_far));
            next = "Wait: it is closed once the tables are found or made equal";
        }
        Reason {
            code,
            table: table.to_owned(),
            text,
            next: next.to_owned(),
        }
    }

    /// Reasons from copies and repairs.
    fn mending_reasons(&self, reasons: &mut Vec<Reason>) {
        for (table, mending) in &self.mending {
            if let Some(how_far) = mending.copying {
                reasons.push(Reason {
                    code: "copying".to_owned(),
                    table: table.clone(),
                    text: match how_far.ended {
                        true => "copying: all is copied, and the stream has not passed the end of the copy yet".to_owned(),
                        false => format!("copying, {}", progress(how_far)),
                    },
                    next: "Wait: until then the replica is no copy of any moment of its source, and nothing to fail over to".to_owned(),
                });
            }
            if let Some((extra, allowed)) = mending.outstanding {
                reasons.push(Reason {
                    code: "deletes-outstanding".to_owned(),
                    table: table.clone(),
                    text: format!(
                        "deletes-outstanding ({extra}): so many items of the replica are not in the source, and no more than {allowed} are deleted without a person"
                    ),
                    next: format!(
                        "Look at them with `farshore reconcile --table {table} --report FILE`, then delete them with `farshore reconcile --table {table} --apply --max-deletes {extra}`"
                    ),
                });
            }
        }
    }

    /// Reasons from taps, doubts and missing signs of life.
    pub(super) fn more_reasons(&self, reasons: &mut Vec<Reason>, now: Instant) {
        self.mending_reasons(reasons);
        let headroom = self.headroom.iter();
        reasons.extend(headroom.filter_map(|(table, left_s)| low_headroom(table, Some(*left_s))));
        for (table, tap) in &self.taps {
            let headroom = tap.headroom_s.map_or_else(
                || "how long the stream remembers what waits is not known".to_owned(),
                |seconds| format!("the stream forgets what waits in {}", hours(seconds)),
            );
            reasons.push(Reason {
                code: "paused".to_owned(),
                table: table.clone(),
                text: format!(
                    "paused by {} since {}: {}; {headroom}",
                    tap.by, tap.since, tap.reason
                ),
                next: "Open the tap again with `farshore resume` before the stream forgets"
                    .to_owned(),
            });
        }
        for (table, doubts) in self.doubts.iter().filter(|(_, d)| d.overdue > 0) {
            reasons.push(Reason {
                code: "doubt-overdue".to_owned(),
                table: table.clone(),
                text: format!(
                    "{} of {} doubt(s) should have been repaired more than ten minutes ago",
                    doubts.overdue, doubts.open
                ),
                next: "Look at the other reasons and the log: what holds the repair back is said there".to_owned(),
            });
        }
        if let Some(letters) = self.letters.filter(|letters| letters.is_urgent)
            && let Some(left) = letters.left
        {
            reasons.push(Reason {
                code: "dead-letters-expire".to_owned(),
                table: String::new(),
                text: format!(
                    "the queue forgets the oldest of {} dead letter(s) in {}",
                    letters.waiting,
                    hours(left.as_secs_f64())
                ),
                next: "Mend what the replica refused and bring them home with `farshore redrive --apply`, or give the queue a longer MessageRetentionPeriod".to_owned(),
            });
        }
        reasons.extend(self.findings(now).into_iter().map(|finding| Reason {
            code: finding.code.to_owned(),
            table: finding.table,
            text: finding.text,
            next: finding.next.to_owned(),
        }));
        if self
            .heartbeat
            .is_some_and(|at| now.saturating_duration_since(at) >= HEARTBEAT_LIMIT)
        {
            reasons.push(Reason {
                code: "not-live".to_owned(),
                table: String::new(),
                text: "the main loop does not come round any more".to_owned(),
                next: "Restart the worker, and report its log".to_owned(),
            });
        }
    }
}

/// How far a job is, for a person.
pub fn progress(how_far: HowFar) -> String {
    let left = how_far.left_s.map_or_else(
        || "how long it takes is not known yet".to_owned(),
        |left| format!("about {} left", rough(left)),
    );
    format!("{} %, {left}", how_far.percent)
}

/// Seconds as a person says them.
fn rough(seconds: u64) -> String {
    match seconds {
        0..=89 => format!("{seconds} s"),
        90..=5_399 => format!("{} min", (seconds + 30) / 60),
        _ => format!("{} h", (seconds + 1_800) / 3_600),
    }
}

/// Seconds as hours and minutes.
fn hours(seconds: f64) -> String {
    let minutes = (seconds / 60.0) as u64;
    format!("{} h {} min", minutes / 60, minutes % 60)
}

impl Health {
    /// The worker feeds from now on: its signs of life are expected.
    pub fn expect_life(&self, limits: Limits) {
        self.state().ledger = Some(Ledger::new(limits, Instant::now()));
    }

    fn ledger<T>(&self, act: impl FnOnce(&mut Ledger) -> T) -> Option<T> {
        self.state().ledger.as_mut().map(act)
    }

    /// A complete reading of the state table began at `begun`.
    pub fn rows_read(&self, begun: Instant) {
        self.ledger(|ledger| ledger.rows_read(begun));
    }

    /// A loop came round. Use [`Pulse`](crate::observe::pulse::Pulse).
    pub fn pulse(&self, id: u64, table: &str, part: &str) {
        self.ledger(|ledger| ledger.pulse(id, table, part, Instant::now()));
    }

    /// A loop ended in order.
    pub fn pulse_ends(&self, id: u64) {
        self.ledger(|ledger| ledger.pulse_ends(id));
    }

    /// The stream of `table` was listed to its end.
    pub fn listed(&self, table: &str) {
        self.ledger(|ledger| ledger.listed(table, Instant::now()));
    }

    /// So many workers share the listings.
    pub fn set_workers(&self, workers: usize) {
        self.ledger(|ledger| ledger.set_workers(workers));
    }

    /// How long a listing may take.
    pub fn listing_limit(&self) -> Duration {
        self.ledger(|ledger| ledger.listing_limit())
            .unwrap_or_default()
    }

    /// The task of a shard shows its signs of life.
    pub fn shard(&self, table: &str, shard: &str, signs: Signs) {
        self.ledger(|ledger| ledger.shard(table, shard, signs));
    }

    /// A shard is no longer this worker's.
    pub fn shard_left(&self, table: &str, shard: &str) {
        self.ledger(|ledger| ledger.shard_left(table, shard));
    }

    /// Whether the task of a shard must be ended.
    pub fn is_beyond_repair(&self, table: &str, shard: &str) -> bool {
        self.ledger(|ledger| ledger.is_beyond_repair(table, shard, Instant::now()))
            .unwrap_or(false)
    }

    /// The shards, by table and key, that could be read and that nobody living owned when the state
    /// table was read at `seen`.
    pub fn set_unowned(&self, shards: impl Iterator<Item = (String, String)>, seen: Instant) {
        self.ledger(|ledger| ledger.unowned(shards, seen));
    }

    /// A task of the kind `task` ended as it should not, and is started again.
    pub fn task_died(&self, task: &'static str, table: &str) {
        metrics::task_restarted(task);
        self.ledger(|ledger| ledger.died(task, table, Instant::now()));
    }

    /// Why the tasks of `table` must be started again, if they must.
    pub fn stuck(&self, table: &str) -> Option<&'static str> {
        let state = self.state();
        let excuses = state.excuses(table);
        let ledger = state.ledger.as_ref()?;
        ledger.stuck(table, excuses, Instant::now())
    }

    /// The tasks of `table` are started again.
    pub fn restarted(&self, table: &str) {
        self.ledger(|ledger| ledger.restarted(table, Instant::now()));
    }

    /// The tap of `table` is closed, or open. `resumed` is who opened it last and why.
    pub fn set_tap(&self, table: &str, closed: Option<TableTap>, resumed: Option<(&str, &str)>) {
        let mut state = self.state();
        let known = state.taps.get(table);
        match (known, &closed) {
            (known, Some(now))
                if known
                    .is_none_or(|known| (&known.by, &known.reason) != (&now.by, &now.reason)) =>
            {
                tracing::warn!(
                    table,
                    by = now.by,
                    reason = now.reason,
                    since = now.since,
                    "paused: nothing more is sent to the replica"
                );
            }
            (Some(_), None) => {
                let (by, reason) = resumed.unwrap_or(("somebody", "the row was deleted"));
                tracing::info!(table, by, reason, "resumed: the replica is written again");
            }
            _ => {}
        }
        match closed {
            Some(tap) => state.taps.insert(table.to_owned(), tap),
            None => state.taps.remove(table),
        };
    }

    /// So long it takes until the stream of `table` forgets what may not be applied.
    pub fn set_headroom(&self, table: &str, left_s: Option<f64>) {
        let mut state = self.state();
        match left_s {
            Some(left_s) => state.headroom.insert(table.to_owned(), left_s),
            None => state.headroom.remove(table),
        };
    }

    /// The dead letters that wait, once somebody has looked.
    pub fn letters(&self) -> Option<LettersLeft> {
        self.state().letters
    }

    /// The dead letters that wait now.
    pub fn set_letters(&self, letters: LettersLeft) {
        self.state().letters = Some(letters);
    }

    /// What the fleet does for `table` to be whole.
    pub fn set_mending(&self, table: &str, mending: Mending) {
        metrics::mending(table, mending);
        self.state().mending.insert(table.to_owned(), mending);
    }

    /// The doubts of `table` now.
    pub fn set_doubts(&self, table: &str, doubts: TableDoubts) {
        self.state().doubts.insert(table.to_owned(), doubts);
    }

    /// Looks for missing signs of life. Says of each once when it begins and once when it ends.
    pub fn watch(&self) {
        let mut state = self.state();
        let now = Instant::now();
        let findings = state.findings(now);
        let missing = findings
            .iter()
            .map(|finding| (finding.code, finding.table.clone()))
            .collect();
        for finding in &findings {
            if !state
                .missing
                .contains(&(finding.code, finding.table.clone()))
            {
                tracing::error!(
                    table = finding.table,
                    code = finding.code,
                    next = finding.next,
                    "{}",
                    finding.text
                );
            }
        }
        for (code, table) in state.missing.difference(&missing) {
            tracing::info!(table, code, "this trouble has passed");
        }
        state.missing = missing;
        let Some(mut ledger) = state.ledger.take() else {
            return;
        };
        ledger.excuse(|table| state.excuses(table), now);
        state.ledger = Some(ledger);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Class, Fault, Operation};

    fn limits(limit: Duration) -> Limits {
        Limits {
            unread: limit,
            unowned: limit,
            pulse: limit,
            restart: limit,
            stalled: limit,
            listing: limit,
            shown: limit,
        }
    }

    fn codes(health: &Health) -> Vec<String> {
        let reasons = health.reasons();
        reasons.into_iter().map(|reason| reason.code).collect()
    }

    #[test]
    fn a_closed_tap_says_who_why_since_and_how_long_is_left() {
        let health = Health::default();
        let tap = TableTap {
            by: "alice@host".into(),
            reason: "bad write".into(),
            since: "2026-11-20T12:00:00Z".into(),
            headroom_s: Some(3_725.0),
        };
        health.set_tap("t", Some(tap), None);
        let reasons = health.reasons();
        assert_eq!(
            (reasons[0].code.as_str(), reasons[0].table.as_str()),
            ("paused", "t")
        );
        assert_eq!(
            reasons[0].text,
            "paused by alice@host since 2026-11-20T12:00:00Z: bad write; the stream forgets what waits in 1 h 2 min"
        );
        health.set_tap("t", None, Some(("bob@host", "mended")));
        assert!(health.reasons().is_empty());
    }

    #[test]
    fn only_overdue_doubts_turn_readiness_red() {
        let health = Health::default();
        let doubts = |overdue| TableDoubts { open: 2, overdue };
        health.set_doubts("t", doubts(0));
        assert!(health.reasons().is_empty());
        health.set_doubts("t", doubts(1));
        assert_eq!(codes(&health), ["doubt-overdue"]);
    }

    #[test]
    fn a_worker_that_does_not_feed_owes_no_signs() {
        let health = Health::default();
        health.rows_read(Instant::now());
        health.watch();
        assert!(health.reasons().is_empty());
    }

    #[test]
    fn nothing_stays_green_when_nobody_shows_life() {
        let health = Health::default();
        health.expect_life(limits(Duration::ZERO));
        health.listed("t");
        health.shard("t", "s", Signs::fresh(Instant::now()));
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(
            codes(&health),
            ["state-unread", "discovery-stalled", "shard-stalled"]
        );
    }

    #[test]
    fn an_outage_of_the_replica_excuses_a_shard_that_does_not_move() {
        let health = Health::default();
        health.expect_life(limits(Duration::from_secs(3_600)));
        let fault = Fault::own(Operation::Write, Class::Access, "code", "message");
        health.failed(Scope::Replica, "t", "s", &fault);
        let state = health.state();
        assert!(state.excuses("t").moving && !state.excuses("t").reading);
        assert!(!state.excuses("other").moving);
    }
}
