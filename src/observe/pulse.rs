//! The pulse of a loop: it shows that the loop comes round, even while it rightly waits.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use super::health::Health;
use super::liveness::PULSE_EVERY;

/// Numbers the pulses of this process: what an ended loop leaves behind is not its successor's.
static NUMBERS: AtomicU64 = AtomicU64::new(0);

/// The pulse of one loop. Dropped with it, it is expected no more.
#[derive(Debug)]
pub struct Pulse {
    health: Arc<Health>,
    id: u64,
    table: String,
    part: String,
}

impl Pulse {
    /// A pulse of the loop `part` of `table`, beating now.
    pub fn start(health: &Arc<Health>, table: &str, part: &str) -> Self {
        let pulse = Self {
            health: Arc::clone(health),
            id: NUMBERS.fetch_add(1, Ordering::Relaxed),
            table: table.to_owned(),
            part: part.to_owned(),
        };
        pulse.beat();
        pulse
    }

    /// The loop came round.
    pub fn beat(&self) {
        self.health.pulse(self.id, &self.table, &self.part);
    }

    /// Waits for `work`, beating meanwhile. Only for what has a bound of its own, or reports its
    /// trouble by itself: what hangs in here is not seen.
    pub async fn during<T>(&self, work: impl Future<Output = T>) -> T {
        let mut work = std::pin::pin!(work);
        loop {
            match tokio::time::timeout(PULSE_EVERY, &mut work).await {
                Ok(done) => return done,
                Err(_) => self.beat(),
            }
        }
    }

    /// Sleeps until `time`, beating meanwhile.
    pub async fn sleep_until(&self, time: Instant) {
        self.during(tokio::time::sleep_until(time.into())).await;
    }
}

impl Drop for Pulse {
    fn drop(&mut self) {
        self.health.pulse_ends(self.id);
    }
}
