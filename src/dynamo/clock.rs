//! The service's clock, read from the `Date` header of its answers.
//!
//! Stream records carry the source's time, so lag and `start = "latest"` are measured against the
//! source's clock and not this host's.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_smithy_runtime_api::box_error::BoxError;
use aws_smithy_runtime_api::client::interceptors::Intercept;
use aws_smithy_runtime_api::client::interceptors::context::BeforeDeserializationInterceptorContextRef;
use aws_smithy_runtime_api::client::interceptors::dyn_dispatch_hint;
use aws_smithy_runtime_api::client::runtime_components::RuntimeComponents;
use aws_smithy_types::DateTime;
use aws_smithy_types::config_bag::ConfigBag;
use aws_smithy_types::date_time::Format;

/// How far the service's clock is from this host's. Whole seconds: the header has no more.
#[derive(Debug, Default)]
pub struct ServiceClock {
    /// Service minus host in milliseconds; `UNKNOWN` until the first answer.
    skew_ms: AtomicI64,
}

impl ServiceClock {
    /// The service's time in milliseconds since the epoch. Before its first answer it is the
    /// host's. The header is cut to the second, so this may be up to one second (and a
    /// transit) early.
    pub fn now_ms(&self) -> i64 {
        host_ms() + self.skew_ms.load(Ordering::Relaxed)
    }

    fn observe(&self, service_ms: i64) {
        let difference = service_ms - host_ms();
        // A difference of under two seconds is the header's own coarseness, not skew.
        let skew = if difference.abs() < 2_000 {
            0
        } else {
            difference
        };
        self.skew_ms.store(skew, Ordering::Relaxed);
    }
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

    fn read_before_deserialization(
        &self,
        context: &BeforeDeserializationInterceptorContextRef<'_>,
        _components: &RuntimeComponents,
        _config: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let date = context.response().headers().get("date");
        if let Some(date) = date.and_then(|text| DateTime::from_str(text, Format::HttpDate).ok())
            && let Ok(ms) = date.to_millis()
        {
            self.clock.observe(ms);
        }
        Ok(())
    }
}
