//! The service's clock, read from the `Date` header of its answers.
//!
//! Stream records carry the source's time, so lag and `start = "latest"` are measured against the
//! source's clock and not this host's.

use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_smithy_runtime_api::box_error::BoxError;
use aws_smithy_runtime_api::client::interceptors::Intercept;
use aws_smithy_runtime_api::client::interceptors::context::{
    BeforeDeserializationInterceptorContextRef, BeforeTransmitInterceptorContextRef,
};
use aws_smithy_runtime_api::client::interceptors::dyn_dispatch_hint;
use aws_smithy_runtime_api::client::runtime_components::RuntimeComponents;
use aws_smithy_types::DateTime;
use aws_smithy_types::config_bag::{ConfigBag, Storable, StoreReplace};
use aws_smithy_types::date_time::Format;

/// How far two regions' clocks, or the clock that a region stamps records with and the one of its answers,
/// are taken to be apart at most, in milliseconds.
pub const REGIONS_APART_MS: i64 = 1_000;
/// What the `Date` header leaves out: it is cut to the second.
const CUT_MS: i64 = 1_000;
/// Clocks drift: what was known an hour ago is known less well now. Parts in a million, far more than a
/// machine's clock is off by.
const DRIFT_PPM: i64 = 500;

/// The service's clock, as its answers tell it.
///
/// Each answer says that at some moment between sending and receiving the service's time lay within the
/// second of its `Date`. Several of them together say it better than to the second.
#[derive(Debug)]
pub struct ServiceClock {
    /// Service minus [`uptime`] in milliseconds; `UNKNOWN` until the first answer. Not minus this host's
    /// clock, which may be set.
    offset_ms: AtomicI64,
    /// How far that may be off.
    error_ms: AtomicI64,
    bounds: Mutex<Option<Bounds>>,
}

const UNKNOWN: i64 = i64::MIN;

/// The service's time, and how far it may be off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reading {
    /// Milliseconds since the epoch.
    pub now_ms: i64,
    /// The service's time is no later than `now_ms` by more than this, and no earlier, in milliseconds.
    pub error_ms: i64,
}

/// Between which values service minus uptime lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Bounds {
    low_ms: i64,
    high_ms: i64,
    /// When that was known, by uptime.
    at_ms: i64,
}

impl Bounds {
    /// What one answer says.
    fn of(service_ms: i64, sent_ms: i64, received_ms: i64) -> Self {
        Self {
            low_ms: service_ms - received_ms,
            high_ms: service_ms + CUT_MS - sent_ms,
            at_ms: received_ms,
        }
    }

    /// What both say. Where they contradict each other, the clock was set, and the newer counts.
    fn and(self, newer: Self) -> Self {
        let drift = (newer.at_ms - self.at_ms).max(0) * DRIFT_PPM / 1_000_000 + 1;
        let both = Self {
            low_ms: newer.low_ms.max(self.low_ms - drift),
            high_ms: newer.high_ms.min(self.high_ms + drift),
            at_ms: newer.at_ms,
        };
        if both.low_ms <= both.high_ms {
            both
        } else {
            newer
        }
    }
}

impl Default for ServiceClock {
    fn default() -> Self {
        Self {
            offset_ms: AtomicI64::new(UNKNOWN),
            error_ms: AtomicI64::new(0),
            bounds: Mutex::new(None),
        }
    }
}

impl ServiceClock {
    /// The service's time in milliseconds since the epoch. Before its first answer it is the
    /// host's. The host's where the answers do not contradict it; it may be off by as much as
    /// [`reading`](Self::reading) says.
    pub fn now_ms(&self) -> i64 {
        match self.offset_ms.load(Ordering::Relaxed) {
            UNKNOWN => host_ms(),
            offset_ms => uptime_ms() + offset_ms,
        }
    }

    /// The service's time with its error; `None` before its first answer.
    pub fn reading(&self) -> Option<Reading> {
        let offset_ms = self.offset_ms.load(Ordering::Relaxed);
        (offset_ms != UNKNOWN).then(|| Reading {
            now_ms: uptime_ms() + offset_ms,
            // The clock that records are stamped with is another one of the same region.
            error_ms: self.error_ms.load(Ordering::Relaxed).max(REGIONS_APART_MS),
        })
    }

    /// An answer to what was sent at `sent_ms`, by uptime, and has just come says `service_ms`.
    fn observe(&self, service_ms: i64, sent_ms: i64) {
        let received_ms = uptime_ms();
        let newer = Bounds::of(service_ms, sent_ms, received_ms);
        let mut bounds = self.bounds.lock().unwrap_or_else(PoisonError::into_inner);
        let known = bounds.map_or(newer, |known| known.and(newer));
        *bounds = Some(known);
        let host = host_ms() - received_ms;
        let offset = host.clamp(known.low_ms, known.high_ms);
        let error = (known.high_ms - offset).max(offset - known.low_ms);
        self.error_ms.store(error, Ordering::Relaxed);
        self.offset_ms.store(offset, Ordering::Relaxed);
    }
}

fn uptime_ms() -> i64 {
    i64::try_from(uptime().as_millis()).unwrap_or(i64::MAX)
}

/// This host's time in milliseconds since the epoch.
pub fn host_ms() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| {
            i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
        })
}

/// Time since this machine started, the time it was suspended included: `CLOCK_BOOTTIME`. Leases end
/// by this clock, because `CLOCK_MONOTONIC` (and with it `Instant`) stands still meanwhile.
pub fn uptime() -> Duration {
    #[cfg(any(target_os = "linux", target_os = "android"))]
    {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        // Neither is negative: the clock starts at zero.
        Duration::new(
            u64::try_from(now.tv_sec).unwrap_or(0),
            u32::try_from(now.tv_nsec).unwrap_or(0),
        )
    }
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    {
        // Other systems' monotonic clocks: good enough to develop on.
        static START: std::sync::OnceLock<std::time::Instant> = std::sync::OnceLock::new();
        START.get_or_init(std::time::Instant::now).elapsed()
    }
}

/// `ms` since the epoch as RFC 3339.
pub fn rfc3339(ms: i64) -> String {
    DateTime::from_millis(ms)
        .fmt(Format::DateTime)
        .unwrap_or_else(|_| ms.to_string())
}

/// When a request was sent, by uptime, in milliseconds.
#[derive(Debug)]
struct SentAt(i64);

impl Storable for SentAt {
    type Storer = StoreReplace<Self>;
}

/// Feeds a [`ServiceClock`] from every answer.
#[derive(Debug)]
pub(super) struct ClockInterceptor {
    clock: Arc<ServiceClock>,
}

impl ClockInterceptor {
    pub(super) fn new(clock: Arc<ServiceClock>) -> Self {
        Self { clock }
    }
}

#[dyn_dispatch_hint]
impl Intercept for ClockInterceptor {
    fn name(&self) -> &'static str {
        "ServiceClock"
    }

    fn read_before_transmit(
        &self,
        _context: &BeforeTransmitInterceptorContextRef<'_>,
        _components: &RuntimeComponents,
        config: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        config.interceptor_state().store_put(SentAt(uptime_ms()));
        Ok(())
    }

    fn read_before_deserialization(
        &self,
        context: &BeforeDeserializationInterceptorContextRef<'_>,
        _components: &RuntimeComponents,
        config: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let date = context.response().headers().get("date");
        if let Some(date) = date.and_then(|text| DateTime::from_str(text, Format::HttpDate).ok())
            && let Ok(ms) = date.to_millis()
            && let Some(SentAt(sent_ms)) = config.load::<SentAt>()
        {
            self.clock.observe(ms, *sent_ms);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever answers come, and however late: the true difference lies within the bounds.
        #[test]
        fn the_truth_lies_within_the_bounds(
            offset in -100_000i64..100_000,
            answers in proptest::collection::vec((0i64..5_000, 0i64..3_000, 0i64..3_000), 1..40),
        ) {
            let mut known: Option<Bounds> = None;
            let mut sent = 1_000_000;
            for (pause, there, back) in answers {
                sent += pause;
                let received = sent + there + back;
                let told = (sent + there + offset).div_euclid(1_000) * 1_000;
                let newer = Bounds::of(told, sent, received);
                let both = known.map_or(newer, |known| known.and(newer));
                prop_assert!(both.low_ms <= offset && offset <= both.high_ms, "{:?}", both);
                known = Some(both);
                sent = received;
            }
        }
    }

    #[test]
    fn a_clock_that_was_set_is_believed_at_once() {
        let known = Bounds::of(1_000_000, 500, 510);
        let set = known.and(Bounds::of(90_000_000, 1_500, 1_510));
        assert_eq!((set.low_ms, set.high_ms), (89_998_490, 89_999_500));
    }

    #[test]
    fn a_clock_never_heard_of_has_no_reading() {
        let clock = ServiceClock::default();
        assert!(clock.reading().is_none());
        clock.observe(host_ms() - host_ms() % 1_000, uptime_ms());
        let reading = clock.reading().unwrap();
        assert!((reading.now_ms - host_ms()).abs() < 100, "the host's fits");
        assert_eq!(reading.error_ms, REGIONS_APART_MS);
    }
}
