//! Noticing that this process stood still: SIGSTOP, a suspended machine, a host without CPU time.
//!
//! A thread looks at the clock every 50 ms. When it did not come round for half a second, the
//! process was paused, and the number of pauses moves. Who is about to send compares it with the
//! number at the start of its attempt. The thread may not have run yet when everything goes on,
//! so whoever asks also looks at how long ago it did.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Once, OnceLock};
use std::time::Duration;

use tokio::sync::watch;

use super::clock::uptime;

/// How often the thread looks.
const TICK: Duration = Duration::from_millis(50);
/// Standing still for longer counts as a pause. A host short of CPU time gets there, too: that
/// costs new connections and nothing else.
const LIMIT: Duration = Duration::from_millis(500);

/// When the thread last looked, in milliseconds of uptime.
static LAST_TICK_MS: AtomicU64 = AtomicU64::new(0);

fn pauses() -> &'static watch::Sender<u64> {
    static PAUSES: OnceLock<watch::Sender<u64>> = OnceLock::new();
    PAUSES.get_or_init(|| watch::Sender::new(0))
}

/// Starts the thread; a second call does nothing.
pub fn begin_watching() {
    static BEGUN: Once = Once::new();
    BEGUN.call_once(|| {
        LAST_TICK_MS.store(now_ms(), Ordering::SeqCst);
        let watching = std::thread::Builder::new().name("pause-watch".to_owned());
        let watching = watching.spawn(|| {
            loop {
                std::thread::sleep(TICK);
                look();
            }
        });
        if let Err(error) = watching {
            // Without the thread every look is a pause once half a second has gone by: connections
            // are made anew all the time, and nothing wrong is sent.
            tracing::error!(%error, "pauses of this process cannot be watched");
        }
    });
}

/// How often this process was paused so far.
pub fn count() -> u64 {
    look();
    *pauses().borrow()
}

/// Waits until the process was paused more than `seen` times.
pub async fn after(seen: u64) {
    let mut pauses = pauses().subscribe();
    // The sender lives as long as the process.
    let _ = pauses.wait_for(|count| *count > seen).await;
}

fn look() {
    let now = now_ms();
    let last = LAST_TICK_MS.swap(now, Ordering::SeqCst);
    let still_ms = now.saturating_sub(last);
    if u128::from(still_ms) >= LIMIT.as_millis() {
        pauses().send_modify(|count| *count += 1);
        tracing::warn!(
            seconds = still_ms as f64 / 1_000.0,
            "this process stood still: its connections are made anew"
        );
    }
}

fn now_ms() -> u64 {
    u64::try_from(uptime().as_millis()).unwrap_or(u64::MAX)
}
