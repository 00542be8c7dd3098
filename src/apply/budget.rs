//! The write budget of a table, as this process may spend it: its share of what the fleet may, what
//! throttling leaves of that, and the queue of those who wait for units.
//!
//! ```text
//!   take: in turn, until the share has filled up by what is asked ─▶ send ─▶ settle: what it really took
//!            ▲ share and its end: lease::budget_keeper                └▶ throttled: slower for a while
//! ```
//!
//! Whoever waits is served in turn, each whole: were the units dealt out among all who wait, they would
//! all be ready at the same moment, and send together what was meant for seconds.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

use super::pace::{Adaptive, Bucket};
use crate::dynamo::clock::uptime;
use crate::dynamo::transmit::Bound;

/// Longest sleep of who waits: a rate that grows again is noticed.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Who waits longer than this wants more than there is.
const HUNGRY_AFTER: Duration = Duration::from_millis(50);
/// How much of the price a single answer decides.
const PRICE_WEIGHT: f64 = 0.1;
/// How much dearer than thought a single answer may show it.
const PRICE_STEP: f64 = 4.0;
/// What a write may really cost of what its size says: indexes make it dearer, absent items cheaper.
const PRICES: (f64, f64) = (0.25, 16.0);
/// Over what time "of late" is.
const RECENT: Duration = Duration::from_secs(1);

/// A limit of units per second, or none.
pub struct Budget {
    /// Held by the one who is next.
    turn: tokio::sync::Mutex<()>,
    state: Mutex<State>,
    /// The share has changed.
    changed: Notify,
    adaptive: bool,
    /// Told once when somebody begins to wait: others may have more than they need.
    hungry: Option<Arc<Notify>>,
    /// No more than this is spent a second, whatever the share.
    cap: Option<f64>,
}

struct State {
    /// Units a second; infinite without a limit.
    share: f64,
    /// Until when the share may be used, as this machine's uptime.
    until: Duration,
    bucket: Bucket,
    adaptive: Adaptive,
    /// What a unit by size was found to cost.
    price: f64,
    recent: Recent,
    /// Units taken so far.
    spent: f64,
    /// How long somebody waited so far.
    waited: Duration,
    waits_since: Option<Duration>,
    /// Whether it was told that somebody waits, since it was last asked.
    told: bool,
}

/// What was paid for, before it is sent.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Charge {
    /// How many items it covers, counted from the first.
    pub count: usize,
    /// Units paid.
    pub units: f64,
}

/// What a budget was used for so far.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Usage {
    /// Units taken.
    pub spent: f64,
    /// How long somebody waited for units.
    pub waited: Duration,
    /// What throttling leaves, in units a second; infinite while there is none.
    pub limit: f64,
}

impl Budget {
    /// A budget of `units_per_second` that this process has for itself; `None` or zero means no limit.
    pub fn new(units_per_second: Option<u32>) -> Self {
        Self::fixed(units_per_second, false)
    }

    /// As [`new`](Self::new); `adaptive`: [`throttled`](Self::throttled) slows it.
    pub fn fixed(units_per_second: Option<u32>, adaptive: bool) -> Self {
        let units = units_per_second.filter(|units| *units > 0);
        let share = units.map_or(f64::INFINITY, f64::from);
        Self::of(share, Duration::MAX, adaptive, None)
    }

    /// A share of what a fleet may spend: none, until there is one. `hungry` hears when somebody has to
    /// wait.
    pub fn shared(adaptive: bool, hungry: Arc<Notify>) -> Self {
        Self::of(0.0, Duration::ZERO, adaptive, Some(hungry))
    }

    /// A lane of those who share this budget: without a limit, until throttling sets one.
    pub fn lane(&self) -> Self {
        Self::fixed(None, self.adaptive)
    }

    fn of(share: f64, until: Duration, adaptive: bool, hungry: Option<Arc<Notify>>) -> Self {
        let now = uptime();
        Self {
            turn: tokio::sync::Mutex::default(),
            state: Mutex::new(State {
                share,
                until,
                bucket: Bucket::new(share, until, now),
                adaptive: Adaptive::default(),
                price: 1.0,
                recent: Recent::new(now),
                spent: 0.0,
                waited: Duration::ZERO,
                waits_since: None,
                told: false,
            }),
            changed: Notify::new(),
            adaptive,
            hungry,
            cap: None,
        }
    }

    /// Spends no more than `units_per_second`, whatever the share; `None` or zero sets no bound.
    #[must_use]
    pub fn capped(self, units_per_second: Option<u32>) -> Self {
        let cap = units_per_second.filter(|units| *units > 0).map(f64::from);
        Self { cap, ..self }
    }

    /// What it never spends more than, in units a second.
    pub fn cap(&self) -> Option<f64> {
        self.cap
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Numbers only: none of its holders leaves them half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it belongs to a fleet.
    pub fn is_shared(&self) -> bool {
        self.hungry.is_some()
    }

    /// From now on `units_per_second`, until the moment `until` of this machine's uptime. A share that is
    /// lowered is so at once.
    pub fn set_share(&self, units_per_second: f64, until: Duration) {
        let share = units_per_second.min(self.cap.unwrap_or(f64::INFINITY));
        let mut state = self.state();
        if (state.share, state.until) == (share, until) {
            return;
        }
        (state.share, state.until) = (share, until);
        state.adjust(uptime());
        drop(state);
        self.changed.notify_one();
    }

    /// Units a second that may be spent now; infinite without a limit.
    pub fn rate(&self) -> f64 {
        let now = uptime();
        let mut state = self.state();
        state.adjust(now)
    }

    /// Units a second of the share, whatever throttling leaves of it; 0 once it may not be used any more.
    pub fn share(&self) -> f64 {
        let state = self.state();
        if uptime() < state.until {
            state.share
        } else {
            0.0
        }
    }

    /// What a unit by size costs, as far as the service told.
    pub fn price(&self) -> f64 {
        self.state().price
    }

    /// Waits until `units` may be spent. An item dearer than a second's budget waits; it is no error.
    pub async fn spend(&self, units: u32) {
        self.take(&[f64::from(units)]).await;
    }

    /// Waits until the first of `costs` may be spent, one at least, and takes as many as there are units for.
    /// May be dropped while it waits: then nothing was taken.
    pub async fn take(&self, costs: &[f64]) -> Charge {
        // Where nobody has to wait, nobody needs a turn.
        if self.is_free()
            && let Ok(charge) = self.try_take(costs)
        {
            return charge;
        }
        let _turn = self.turn.lock().await;
        let mut waiting = None;
        loop {
            let changed = self.changed.notified();
            let pause = match self.try_take(costs) {
                Ok(charge) => return charge,
                Err(pause) => pause,
            };
            waiting.get_or_insert_with(|| Waiting::begin(self));
            if pause.is_none_or(|pause| pause > HUNGRY_AFTER) {
                self.tell_hungry();
            }
            tokio::select! {
                () = changed => {}
                () = tokio::time::sleep(pause.unwrap_or(LOOK_EVERY).min(LOOK_EVERY)) => {}
            }
        }
    }

    fn is_free(&self) -> bool {
        let state = self.state();
        state.share.is_infinite() && state.adaptive.limit().is_infinite()
    }

    fn try_take(&self, costs: &[f64]) -> Result<Charge, Option<Duration>> {
        let now = uptime();
        let mut state = self.state();
        state.adjust(now);
        let (count, units) = state.bucket.take(costs, now)?;
        state.spent += units;
        state.recent.add(units, now);
        Ok(Charge { count, units })
    }

    fn tell_hungry(&self) {
        let Some(hungry) = &self.hungry else { return };
        if !std::mem::replace(&mut self.state().told, true) {
            hungry.notify_one();
        }
    }

    /// What was paid with `charge` took `used` units really; `None` where that is not known.
    pub fn settle(&self, charge: f64, used: Option<f64>) {
        let Some(used) = used else { return };
        let now = uptime();
        let mut state = self.state();
        state.spent += used - charge;
        state.recent.add(used - charge, now);
        state.bucket.settle(charge - used);
        drop(state);
        self.changed.notify_one();
    }

    /// Writes of `units` by size took `used`: the next are paid accordingly.
    pub fn learn(&self, units: f64, used: f64) {
        if units > 0.0 && used > 0.0 {
            let mut state = self.state();
            // One large item deleted says little of the next.
            let found = (used / units).min(state.price * PRICE_STEP);
            let price = state.price + PRICE_WEIGHT * (found - state.price);
            state.price = price.clamp(PRICES.0, PRICES.1);
        }
    }

    /// What was sent at `sent`, of this machine's uptime, was throttled.
    pub fn throttled(&self, sent: Duration) {
        if !self.adaptive {
            return;
        }
        let now = uptime();
        let mut guard = self.state();
        let state = &mut *guard;
        let recent = state.recent.rate(now);
        state.adaptive.cut(sent, state.share, recent, now);
        state.adjust(now);
    }

    /// What it was used for so far. Who has to wait from now on is told of anew.
    pub fn usage(&self) -> Usage {
        let now = uptime();
        let mut guard = self.state();
        let state = &mut *guard;
        let waits = state.waits_since.map(|since| now.saturating_sub(since));
        state.told = waits.is_some();
        state.adjust(now);
        Usage {
            spent: state.spent,
            waited: state.waited + waits.unwrap_or_default(),
            limit: state.adaptive.limit(),
        }
    }
}

impl State {
    /// Brings the bucket up to what share and throttling allow, and returns that.
    fn adjust(&mut self, now: Duration) -> f64 {
        let rate = self.adaptive.of(self.share, now);
        self.bucket.set(rate, self.until, now);
        if now < self.until { rate } else { 0.0 }
    }
}

/// The share is a right that ends by itself, as a lease is.
impl Bound for Budget {
    fn remaining(&self) -> Duration {
        self.state().until.saturating_sub(uptime())
    }
}

/// Counts the time that somebody waits, until it is dropped.
struct Waiting<'a>(&'a Budget);

impl<'a> Waiting<'a> {
    fn begin(budget: &'a Budget) -> Self {
        budget.state().waits_since = Some(uptime());
        Self(budget)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state();
        if let Some(since) = state.waits_since.take() {
            state.waited += uptime().saturating_sub(since);
        }
    }
}

/// What is spent a second, of late.
struct Recent {
    rate: f64,
    at: Duration,
}

impl Recent {
    fn new(now: Duration) -> Self {
        Self { rate: 0.0, at: now }
    }

    fn rate(&mut self, now: Duration) -> f64 {
        let passed = now.saturating_sub(self.at).as_secs_f64();
        self.at = self.at.max(now);
        self.rate *= (-passed / RECENT.as_secs_f64()).exp();
        self.rate
    }

    fn add(&mut self, units: f64, now: Duration) {
        let rate = self.rate(now);
        self.rate = (rate + units / RECENT.as_secs_f64()).max(0.0);
    }
}

#[cfg(test)]
#[path = "budget_tests.rs"]
mod tests;
