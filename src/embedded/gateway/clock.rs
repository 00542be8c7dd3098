//! The gateway's clock: the system's, which a test may set forward to see records age, iterators
//! expire and shards rotate without waiting for it.

use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

#[derive(Debug, Default)]
pub(crate) struct Clock {
    ahead_us: AtomicI64,
}

impl Clock {
    /// Microseconds since 1970, by this clock.
    pub(crate) fn now_us(&self) -> i64 {
        system_us() + self.ahead_us()
    }

    /// Milliseconds since 1970, by this clock.
    pub(crate) fn now_ms(&self) -> i64 {
        self.now_us() / 1_000
    }

    /// How far this clock is ahead of the system's, in microseconds.
    pub(crate) fn ahead_us(&self) -> i64 {
        self.ahead_us.load(Ordering::SeqCst)
    }

    pub(crate) fn advance(&self, by: Duration) {
        let by = i64::try_from(by.as_micros()).unwrap_or(i64::MAX / 4);
        self.ahead_us.fetch_add(by, Ordering::SeqCst);
    }
}

/// Microseconds since 1970 by the system's clock; 0 if that is set before 1970.
pub(crate) fn system_us() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |d| i64::try_from(d.as_micros()).unwrap_or(i64::MAX))
}

/// `2026-11-20T12:00:00.123`, the form of a stream's label.
pub(crate) fn stream_label(ms: i64) -> String {
    let at = UNIX_EPOCH + Duration::from_millis(ms.max(0).unsigned_abs());
    let text = humantime::format_rfc3339_millis(at).to_string();
    text.trim_end_matches('Z').to_owned()
}

/// Seconds since 1970 of a `20261120T120000Z` as the `X-Amz-Date` header has it, or `None` if it
/// is not of that form.
pub(crate) fn signature_seconds(date: &str) -> Option<i64> {
    let digits = date.is_ascii() && date.len() == 16 && date.ends_with('Z');
    if !digits || date.as_bytes()[8] != b'T' {
        return None;
    }
    let text = format!(
        "{}-{}-{}T{}:{}:{}Z",
        &date[..4],
        &date[4..6],
        &date[6..8],
        &date[9..11],
        &date[11..13],
        &date[13..15]
    );
    let at = humantime::parse_rfc3339(&text).ok()?;
    i64::try_from(at.duration_since(UNIX_EPOCH).ok()?.as_secs()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_reads_as_a_time_of_milliseconds() {
        assert_eq!(stream_label(1_795_176_000_123), "2026-11-20T12:00:00.123");
    }

    #[test]
    fn a_signature_date_is_read_and_anything_else_is_none() {
        assert_eq!(signature_seconds("20261120T120000Z"), Some(1_795_176_000));
        for other in [
            "",
            "2026-11-20T12:00:00Z",
            "20261120 120000Z",
            "20261x20T120000Z",
        ] {
            assert_eq!(signature_seconds(other), None, "{other}");
        }
    }
}
