//! Keeps this process's shares of the write budgets: reads and writes the row, and tells each table's budget
//! what it may spend. The rule is [`budget`](super::budget).
//!
//! A beat is due every third of a lease, as with leases: one write, and one read before it where others hold
//! shares too. Who is short of what it should have looks ten times a lease until it has that, and who
//! begins to wait looks at once.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::{Mutex, Notify};
use tokio_util::sync::CancellationToken;

use super::budget::{Party, Proposal, Want};
use super::table::{StateTable, Written};
use crate::apply::budget::{Budget, Usage};
use crate::backoff::Backoff;
use crate::config::{Config, Table};
use crate::dynamo::clock::uptime;
use crate::error::{Class, Fault, Operation};

/// How often a beat is tried again at once because somebody else wrote the row meanwhile.
const TRIES: u32 = 8;
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_millis(200);
/// A call to the state table gets this long, however short the leases are.
const PATIENCE_MIN: Duration = Duration::from_millis(400);
/// How long a job waits at its end until its shares are given back.
const FAREWELL: Duration = Duration::from_secs(1);
/// Who had to wait for more than this part of the time wants all that there is.
const WAITING_PART: f64 = 0.05;
/// Who does not wait wants more than it uses: the next moment may bring more.
const HEADROOM: f64 = 1.5;
/// What is left of a want after a third of a lease without any: a pause is not the end.
const FALL: f64 = 0.5;

/// The shares of one process.
pub struct BudgetKeeper {
    state: StateTable,
    lease: Duration,
    adaptive: bool,
    limits: BTreeMap<String, u64>,
    budgets: BTreeMap<String, Arc<Budget>>,
    hungry: Arc<Notify>,
    at_work: Mutex<AtWork>,
    /// Whether it was told that nothing may be written for want of a hold.
    told: AtomicBool,
}

struct AtWork {
    party: Party,
    wishes: BTreeMap<String, Wish>,
}

/// What one table was seen to need.
#[derive(Debug, Clone, Copy)]
struct Wish {
    usage: Usage,
    at: Duration,
    wanted: f64,
}

/// How a beat ended.
struct Beaten {
    is_short: bool,
}

impl BudgetKeeper {
    /// The shares of the process start `me` in the budgets of `tables`, which are written to in the region of
    /// `state`. `most`: this process takes no more of each, in units per second, whatever others leave.
    pub fn new<'a>(
        state: StateTable,
        me: &str,
        config: &Config,
        tables: impl IntoIterator<Item = &'a Table>,
        most: Option<u32>,
    ) -> Self {
        let hungry = Arc::new(Notify::new());
        let adaptive = config.writes.adaptive;
        let mut limits = BTreeMap::new();
        let mut budgets = BTreeMap::new();
        for table in tables {
            let budget = match config.units_per_second(table) {
                Some(units) => {
                    limits.insert(table.name.clone(), u64::from(units) * 1_000);
                    Budget::shared(adaptive, Arc::clone(&hungry)).capped(most)
                }
                None => Budget::fixed(most, adaptive),
            };
            budgets.insert(table.name.clone(), Arc::new(budget));
        }
        let lease = config.leases.duration;
        Self {
            state,
            lease,
            adaptive,
            limits,
            budgets,
            hungry,
            at_work: Mutex::new(AtWork {
                party: Party::new(me, lease),
                wishes: BTreeMap::new(),
            }),
            told: AtomicBool::new(false),
        }
    }

    /// The budget of `table`.
    pub fn budget(&self, table: &str) -> Arc<Budget> {
        let known = self.budgets.get(table).map(Arc::clone);
        // Nobody asks for a table that it was not made for.
        known.unwrap_or_else(|| Arc::new(Budget::fixed(Some(1), self.adaptive)))
    }

    /// Keeps the shares, for ever. `report` hears how each beat went.
    pub async fn keep(&self, report: impl Fn(Result<(), &Fault>)) {
        if self.limits.is_empty() {
            return std::future::pending().await;
        }
        loop {
            let pause = match self.beat().await {
                Ok(beaten) => {
                    report(Ok(()));
                    let due = self.at_work.lock().await.party.due();
                    let due = due.saturating_sub(uptime());
                    match beaten.is_short {
                        true => due.min(self.lease / 10),
                        false => due,
                    }
                }
                Err(fault) => {
                    report(Err(&fault));
                    self.tell_over(&fault).await;
                    // The hold runs on: the next attempt cannot wait its turn.
                    self.lease / 20
                }
            };
            // Also the least time between two looks: who waits does not ask without end.
            let least = self.lease / 20;
            tokio::time::sleep(least).await;
            tokio::select! {
                () = tokio::time::sleep(pause.saturating_sub(least)) => {}
                () = self.hungry.notified() => {}
            }
        }
    }

    /// Keeps the shares until `done`, and gives them back.
    pub async fn keep_until(&self, done: &CancellationToken) {
        tokio::select! {
            () = done.cancelled() => {}
            () = self.keep(|_| ()) => {}
        }
        self.leave(FAREWELL).await;
    }

    /// One look at the row, and a write of it where one is due or would change something.
    async fn beat(&self) -> Result<Beaten, Fault> {
        let mut guard = self.at_work.lock().await;
        let at_work = &mut *guard;
        let wants = self.wants(&mut at_work.wishes);
        let party = &mut at_work.party;
        let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
        for _ in 0..TRIES {
            if party.must_read() {
                let row = self.patiently(self.state.budget()).await?;
                party.saw(row, uptime());
            }
            let now = uptime();
            let Some(proposal) = party.propose(&wants, now) else {
                // It has left.
                return Ok(Beaten { is_short: false });
            };
            let is_short = proposal.is_short;
            self.hand_out(party);
            if !proposal.matters && now < party.due() {
                return Ok(Beaten { is_short });
            }
            match self.write(&proposal).await {
                Ok(Written::Yes) => {
                    party.written(proposal);
                    self.hand_out(party);
                    if self.told.swap(false, Ordering::Relaxed) {
                        tracing::info!("this process has a share of the write budgets again");
                    }
                    return Ok(Beaten { is_short });
                }
                Ok(Written::Refused) => party.not_written(),
                Err(fault) => {
                    party.not_written();
                    return Err(fault);
                }
            }
            tokio::time::sleep(backoff.pause()).await;
        }
        // Everybody writes at once; the next look may find a gap.
        Ok(Beaten { is_short: true })
    }

    async fn write(&self, proposal: &Proposal) -> Result<Written, Fault> {
        match proposal.replaces {
            Some(known) => {
                self.patiently(self.state.replace(&proposal.row, known))
                    .await
            }
            None => self.patiently(self.state.create(&proposal.row)).await,
        }
    }

    /// Calls that are not answered in a quarter of a lease are given up: two more find room before its end.
    async fn patiently<T>(&self, call: impl Future<Output = Result<T, Fault>>) -> Result<T, Fault> {
        let patience = (self.lease / 4).max(PATIENCE_MIN);
        match tokio::time::timeout(patience, call).await {
            Ok(answer) => answer,
            Err(_) => Err(Fault::own(
                Operation::State,
                Class::Network,
                "no answer in time",
                "the state table did not answer within a quarter of a lease",
            )),
        }
    }

    /// Tells the budgets what may be spent.
    fn hand_out(&self, party: &Party) {
        let until = party.until();
        let now = uptime();
        for table in self.limits.keys() {
            if let Some(budget) = self.budgets.get(table) {
                let units = party.usable(table, now) as f64 / 1_000.0;
                budget.set_share(units, until);
            }
        }
    }

    /// What each table could spend.
    fn wants(&self, wishes: &mut BTreeMap<String, Wish>) -> BTreeMap<String, Want> {
        let now = uptime();
        let mut wants = BTreeMap::new();
        for (table, limit) in &self.limits {
            let Some(budget) = self.budgets.get(table) else {
                continue;
            };
            let beats = |wish: &Wish| {
                now.saturating_sub(wish.at).as_secs_f64() / (self.lease / 3).as_secs_f64()
            };
            let last = wishes.get(table).map(|wish| (*wish, beats(wish)));
            let wish = Wish::of(last, budget.usage(), *limit, now);
            wishes.insert(table.clone(), wish);
            let most = budget.cap().map_or(f64::INFINITY, |cap| cap * 1_000.0);
            let want = Want {
                budget: *limit,
                wanted: wish.wanted.min(most) as u64,
            };
            wants.insert(table.clone(), want);
        }
        wants
    }

    /// Says once that nothing may be written for want of a hold.
    async fn tell_over(&self, fault: &Fault) {
        let until = self.at_work.lock().await.party.until();
        if uptime() >= until && !self.told.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                code = fault.code,
                "the share of the write budgets could not be renewed for a lease: nothing is written to tables with a limit until the state table answers"
            );
        }
    }

    /// Gives the shares back. Nothing is written with them from now on; if the state table does not answer
    /// `within` this time, they come back when the hold is over.
    pub async fn leave(&self, within: Duration) {
        if self.limits.is_empty() {
            return;
        }
        let leave = async {
            let mut guard = self.at_work.lock().await;
            let party = &mut guard.party;
            for _ in 0..TRIES {
                if party.must_read()
                    && let Ok(row) = self.state.budget().await
                {
                    party.saw(row, uptime());
                }
                let proposal = party.leave();
                self.hand_out(party);
                let Some(proposal) = proposal else { return };
                match self.write(&proposal).await {
                    Ok(Written::Yes) => return party.written(proposal),
                    Ok(Written::Refused) | Err(_) => party.not_written(),
                }
            }
        };
        let _ = tokio::time::timeout(within, leave).await;
    }
}

impl Wish {
    /// What is wanted of `limit` thousandths of a unit per second, by what was spent and waited for since
    /// `last`, so many beats ago.
    fn of(last: Option<(Self, f64)>, usage: Usage, limit: u64, now: Duration) -> Self {
        let limit = limit as f64;
        let Some((last, beats)) = last else {
            // Who has not begun yet takes nothing from others.
            let wanted = if usage.waited.is_zero() { 0.0 } else { limit };
            return Self {
                usage,
                at: now,
                wanted,
            };
        };
        let passed = now.saturating_sub(last.at).as_secs_f64().max(1e-3);
        let waited = usage.waited.saturating_sub(last.usage.waited);
        let used = (usage.spent - last.usage.spent).max(0.0) / passed * 1_000.0;
        let wanted = match waited.as_secs_f64() / passed > WAITING_PART {
            true => limit,
            false => (used * HEADROOM).max(last.wanted * FALL.powf(beats)),
        };
        // More than throttling lets through would only be kept from others.
        let wanted = wanted.min(usage.limit * 1_000.0 * HEADROOM).min(limit);
        Self {
            usage,
            at: now,
            wanted,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(spent: f64, waited_ms: u64) -> Usage {
        Usage {
            spent,
            waited: Duration::from_millis(waited_ms),
            limit: f64::INFINITY,
        }
    }

    #[test]
    fn who_waits_wants_all_and_who_does_not_lends_step_by_step() {
        let at = Duration::from_secs;
        let first = Wish::of(None, usage(0.0, 0), 100_000, at(1));
        assert_eq!(first.wanted, 0.0);
        let busy = Wish::of(Some((first, 1.0)), usage(50.0, 900), 100_000, at(2));
        assert_eq!(busy.wanted, 100_000.0);
        let idle = Wish::of(Some((busy, 1.0)), usage(50.0, 900), 100_000, at(3));
        assert_eq!(idle.wanted, 50_000.0);
        let mut wish = idle;
        for second in 4..30 {
            wish = Wish::of(Some((wish, 1.0)), usage(50.0, 900), 100_000, at(second));
        }
        assert!(wish.wanted < 1.0);
        let calm = Wish::of(Some((wish, 1.0)), usage(70.0, 900), 100_000, at(30));
        assert_eq!(calm.wanted, 30_000.0, "half more than it uses");
        let throttled = Usage {
            limit: 10.0,
            ..usage(90.0, 1_900)
        };
        let throttled = Wish::of(Some((calm, 1.0)), throttled, 100_000, at(31));
        assert_eq!(throttled.wanted, 15_000.0);
    }
}
