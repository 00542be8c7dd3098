//! Token buckets: capacity that is really used up and really comes back.

use std::collections::HashMap;

/// A bucket that fills at `rate` a second up to `burst`.
#[derive(Clone, Debug)]
pub(crate) struct Bucket {
    rate: f64,
    burst: f64,
    tokens: f64,
    filled_us: i64,
}

impl Bucket {
    /// A full bucket.
    pub(crate) fn new(rate: f64, burst: f64, now_us: i64) -> Self {
        Self {
            rate,
            burst,
            tokens: burst,
            filled_us: now_us,
        }
    }

    /// Takes `units`, or nothing. What is dearer than the whole bucket is let through when the
    /// bucket is full and leaves it in debt, so that the rate holds for it too.
    pub(crate) fn take(&mut self, units: f64, now_us: i64) -> bool {
        let passed = (now_us - self.filled_us).max(0) as f64 / 1e6;
        self.filled_us = self.filled_us.max(now_us);
        self.tokens = (self.tokens + passed * self.rate).min(self.burst);
        let admitted = self.tokens >= units.min(self.burst);
        if admitted {
            self.tokens -= units;
        }
        admitted
    }
}

/// The buckets of one fault, one for each thing it limits; made full at first use.
#[derive(Debug, Default)]
pub(crate) struct Buckets {
    of: HashMap<String, Bucket>,
}

impl Buckets {
    pub(crate) fn take(
        &mut self,
        what: &str,
        units: f64,
        rate: f64,
        burst: f64,
        now_us: i64,
    ) -> bool {
        if !self.of.contains_key(what) {
            self.of
                .insert(what.to_owned(), Bucket::new(rate, burst, now_us));
        }
        let bucket = self.of.get_mut(what);
        bucket.is_some_and(|bucket| bucket.take(units, now_us))
    }
}

/// The write units of a write whose larger item, old or new, has `bytes`.
pub(crate) fn write_units(bytes: usize) -> f64 {
    bytes.div_ceil(1_024).max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_write_costs_a_unit_for_each_started_kilobyte() {
        let units: Vec<f64> = [0, 1, 1_024, 1_025, 409_600].map(write_units).into();
        assert_eq!(units, [1.0, 1.0, 1.0, 2.0, 400.0]);
    }

    proptest! {
        #[test]
        fn no_more_is_let_through_than_the_burst_and_the_rate_allow(
            rate in 1.0f64..1_000.0,
            burst in 1.0f64..1_000.0,
            calls in proptest::collection::vec((0i64..50_000, 1u32..600), 1..300),
        ) {
            let mut bucket = Bucket::new(rate, burst, 0);
            let (mut now, mut taken, mut dearest) = (0, 0.0, 0.0f64);
            for (pause, units) in calls {
                now += pause;
                let units = f64::from(units);
                if bucket.take(units, now) {
                    taken += units;
                    dearest = dearest.max(units);
                }
                let allowed = burst + rate * now as f64 / 1e6 + (dearest - burst).max(0.0);
                prop_assert!(taken <= allowed + 1e-6, "{taken} of {allowed}");
            }
        }

        #[test]
        fn whoever_waits_is_let_through(rate in 1.0f64..1_000.0, units in 1.0f64..600.0) {
            let mut bucket = Bucket::new(rate, rate, 0);
            let mut admitted = 0;
            for second in 0..1_300 {
                admitted += u32::from(bucket.take(units, second * 1_000_000));
            }
            prop_assert!(admitted >= 2);
        }
    }
}
