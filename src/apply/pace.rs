//! The arithmetic of a limit: what may be spent now, and how throttling slows it. Pure: moments are
//! handed in, as this machine's uptime.

use std::time::Duration;

/// How much of a second's budget may be spent at one instant. Less would be lost to the timer on a busy
/// host, more would show as a peak.
pub const BURST: Duration = Duration::from_millis(100);
/// What throttling leaves of a rate.
const CUT: f64 = 0.7;
/// How long a cut is given to show, before what is sent after it counts: what went beyond is still being
/// made up for.
const SETTLE: Duration = Duration::from_millis(250);
/// Part of the present rate that comes back in a second, and of the rate to be reached.
const GROWTH: f64 = 0.1;
const GROWTH_LEAST: f64 = 0.005;
/// No rate is cut below this: somebody must find out that it is over.
const RATE_MIN: f64 = 1.0;
/// A rate without a limit is cut from what was spent of late, and from this at least.
const RECENT_MIN: f64 = 100.0;
/// What of a burst is worth being sent.
const ENOUGH: f64 = 0.9;
/// Rounding must not make anybody wait for a thousandth of a unit.
const EPSILON: f64 = 1e-6;

/// A bucket that fills at a rate. What is dear is paid before it is sent, never after; what was dearer
/// than thought is a debt, which is paid first.
#[derive(Debug, Clone)]
pub struct Bucket {
    /// Units a second; infinite without a limit.
    rate: f64,
    /// Nothing is spent from this moment on.
    until: Duration,
    tokens: f64,
    filled: Duration,
    /// What it may hold: the burst, or the one item that waits and is dearer.
    room: f64,
}

impl Bucket {
    /// An empty bucket.
    pub fn new(rate: f64, until: Duration, now: Duration) -> Self {
        Self {
            rate,
            until,
            tokens: 0.0,
            filled: now,
            room: 0.0,
        }
    }

    fn burst(&self) -> f64 {
        self.rate * BURST.as_secs_f64()
    }

    /// From `now` on it fills at `rate`, until the moment `until`.
    pub fn set(&mut self, rate: f64, until: Duration, now: Duration) {
        self.fill(now);
        self.rate = rate;
        self.until = until;
    }

    fn fill(&mut self, now: Duration) {
        let end = now.min(self.until);
        let passed = end.saturating_sub(self.filled).as_secs_f64();
        self.filled = self.filled.max(now);
        if !self.rate.is_finite() {
            return;
        }
        self.tokens = (self.tokens + passed * self.rate).min(self.room.max(self.burst()));
        if now >= self.until {
            // What was saved up under a right that is over is nobody's.
            self.tokens = self.tokens.min(0.0);
        }
    }

    /// Takes what the first of `costs` cost, as many as may be spent at `now`, one at least. Returns how
    /// many, and what they cost together.
    ///
    /// # Errors
    /// How long to wait before one may be spent; `None` while nothing may be.
    pub fn take(&mut self, costs: &[f64], now: Duration) -> Result<(usize, f64), Option<Duration>> {
        let total: f64 = costs.iter().sum();
        let first = costs.first().copied().unwrap_or(0.0);
        self.room = first;
        self.fill(now);
        if now >= self.until || self.rate <= 0.0 {
            return Err(None);
        }
        if !self.rate.is_finite() {
            return Ok((costs.len(), total));
        }
        // Not the whole of it: a rate that grows would raise it faster than it fills.
        let needed = total.min(first.max(self.burst() * ENOUGH));
        if self.tokens + EPSILON < needed {
            let seconds = (needed - self.tokens) / self.rate;
            // Beyond a day somebody has looked, and asks again.
            return Err(Some(Duration::from_secs_f64(seconds.min(86_400.0))));
        }
        let (mut count, mut cost) = (0, 0.0);
        for next in costs {
            if count > 0 && cost + next > self.tokens + EPSILON {
                break;
            }
            (count, cost) = (count + 1, cost + next);
        }
        self.tokens -= cost;
        self.room = 0.0;
        Ok((count, cost))
    }

    /// Gives back what was paid too much; charges what was too little, where it is negative.
    pub fn settle(&mut self, units: f64) {
        if self.rate.is_finite() {
            let most = self.room.max(self.burst()).max(self.tokens);
            self.tokens = (self.tokens + units).min(most);
        }
    }
}

/// What throttling leaves of a rate: cut by a part at each sign of it, growing slowly while there is none.
#[derive(Debug, Clone, Default)]
pub struct Adaptive {
    /// What is left; `None` while there was no throttling.
    limit: Option<f64>,
    /// What is grown back to where there is no limit: twice what was spent when throttling began.
    ceiling: f64,
    /// When it was cut last.
    cut: Option<Duration>,
    grown: Duration,
}

impl Adaptive {
    /// What was sent at `sent` was throttled. `rate` is what would be allowed, infinite without a limit;
    /// `recent` was spent a second of late. What left before the last cut, or right after it, says nothing of it.
    pub fn cut(&mut self, sent: Duration, rate: f64, recent: f64, now: Duration) {
        if self.cut.is_some_and(|cut| sent < cut + SETTLE) {
            return;
        }
        self.grow(rate, now);
        if !rate.is_finite() && self.limit.is_none() {
            self.ceiling = 2.0 * recent.max(RECENT_MIN);
        }
        let reach = self.reach(rate);
        let from = self.limit.unwrap_or(reach).min(reach);
        self.limit = Some((from * CUT).max(RATE_MIN));
        (self.cut, self.grown) = (Some(now), now);
    }

    fn reach(&self, rate: f64) -> f64 {
        if rate.is_finite() { rate } else { self.ceiling }
    }

    fn grow(&mut self, rate: f64, now: Duration) {
        let Some(limit) = self.limit else { return };
        let passed = now.saturating_sub(self.grown).as_secs_f64();
        self.grown = self.grown.max(now);
        let reach = self.reach(rate);
        let step = (limit * GROWTH).max(reach * GROWTH_LEAST);
        let grown = limit + passed * step;
        // Without a share there is nothing to be grown back to, and throttling is not forgotten.
        let is_over = grown >= reach && reach > 0.0;
        self.limit = if is_over { None } else { Some(grown) };
    }

    /// What may be spent a second of `rate`, at `now`.
    pub fn of(&mut self, rate: f64, now: Duration) -> f64 {
        self.grow(rate, now);
        self.limit.map_or(rate, |limit| limit.min(rate))
    }

    /// What throttling has left, as it was when last asked; infinite where there is none.
    pub fn limit(&self) -> f64 {
        self.limit.unwrap_or(f64::INFINITY)
    }
}

#[cfg(test)]
#[path = "pace_tests.rs"]
mod tests;
