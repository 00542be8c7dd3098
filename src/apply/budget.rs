//! The write budget of a table: units per second, shared by all its shards in this process.

use std::num::NonZeroU32;
use std::time::Duration;

use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};

/// How much of a second's budget may be spent at one instant. The limiter's own default, a whole
/// second, let 199 units pass in one second of a 100 units/s budget.
const BURST: Duration = Duration::from_millis(50);

/// A limit of write units per second, or none.
pub struct Budget {
    limiter: Option<(DefaultDirectRateLimiter, NonZeroU32)>,
}

impl Budget {
    /// A budget of `units_per_second`; `None` or zero means no limit.
    pub fn new(units_per_second: Option<u32>) -> Self {
        let limiter = units_per_second.and_then(NonZeroU32::new).map(|rate| {
            let share = u64::from(rate.get()) * BURST.as_millis() as u64 / 1_000;
            let burst = u32::try_from(share)
                .ok()
                .and_then(NonZeroU32::new)
                .unwrap_or(NonZeroU32::MIN);
            let quota = Quota::per_second(rate).allow_burst(burst);
            (RateLimiter::direct(quota), burst)
        });
        Self { limiter }
    }

    /// Waits until `units` may be spent. A cost above the burst is paid in slices, so an item
    /// dearer than a second's budget waits; it is no error.
    pub async fn spend(&self, units: u32) {
        let Some((limiter, burst)) = &self.limiter else {
            return;
        };
        let mut left = units;
        while let Some(slice) = NonZeroU32::new(left.min(burst.get())) {
            // The only error is a slice above the burst, which the line above excludes.
            let _ = limiter.until_n_ready(slice).await;
            left -= slice.get();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[tokio::test]
    async fn a_cost_above_the_burst_waits_and_is_no_error() {
        let budget = Budget::new(Some(1_000));
        let start = Instant::now();
        budget.spend(250).await;
        // 50 units are free at the start; 200 more take 0.2 s.
        assert!(
            start.elapsed() >= Duration::from_millis(180),
            "{:?}",
            start.elapsed()
        );
        Budget::new(None).spend(u32::MAX).await;
        Budget::new(Some(0)).spend(u32::MAX).await;
    }

    #[tokio::test]
    async fn one_unit_a_second_is_a_budget_too() {
        let budget = Budget::new(Some(1));
        budget.spend(1).await;
        let more = tokio::time::timeout(Duration::from_millis(200), budget.spend(1)).await;
        assert!(more.is_err());
    }
}
