//! The right to repair one doubt.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::super::context::Shared;
use crate::dynamo::clock::uptime;
use crate::dynamo::transmit::Bound;
use crate::error::Fault;
use crate::lease::doubts::until_ms;
use crate::lease::row::DoubtRow;
use crate::lease::rules::take_name;
use crate::lease::table::Written;
use crate::stream::reader::Position;

/// The right to repair a doubt. It is good for one lease duration after each renewal, and moves the
/// row's `until` to a late effect after its own end.
pub struct Claim {
    duration: Duration,
    held: Mutex<Held>,
    /// Held over a renewal: two at once would refuse each other by the row's counter.
    turn: tokio::sync::Mutex<()>,
}

struct Held {
    row: DoubtRow,
    /// As this machine's uptime.
    valid_until: Duration,
}

impl Bound for Claim {
    fn remaining(&self) -> Duration {
        self.held().valid_until.saturating_sub(uptime())
    }
}

impl Claim {
    /// Claims a doubt. `None` if somebody else was faster.
    ///
    /// # Errors
    /// The state table could not be written; whether it was is not known.
    pub async fn take(shared: &Shared, row: DoubtRow) -> Result<Option<Arc<Self>>, Fault> {
        let duration = shared.config.leases.duration;
        let claim = Self {
            duration,
            held: Mutex::new(Held {
                row: DoubtRow {
                    lease_owner: Some(take_name(&shared.owner, rand::random())),
                    ..row
                },
                valid_until: Duration::ZERO,
            }),
            turn: tokio::sync::Mutex::default(),
        };
        Ok(claim.renew(shared, None).await?.then(|| Arc::new(claim)))
    }

    fn held(&self) -> std::sync::MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The row as it was last written.
    pub fn row(&self) -> DoubtRow {
        self.held().row.clone()
    }

    /// Whether nothing may be sent under it any more.
    pub fn is_over(&self) -> bool {
        self.remaining().is_zero()
    }

    /// Renews the claim; what lies before `done` is clean. False if it is lost.
    ///
    /// # Errors
    /// The state table could not be written; whether it was is not known, and the claim ends when
    /// it would have ended before.
    pub async fn renew(&self, shared: &Shared, done: Option<&Position>) -> Result<bool, Fault> {
        let _turn = self.turn.lock().await;
        let mut row = self.row();
        let known = row.lease_counter;
        row.lease_counter += 1;
        if let Some(done) = done {
            row.set_position(done);
        }
        // The last write leaves before the claim's end, and takes effect a late effect later at
        // most. The claim counts from before that is worked out: the process may stand still here.
        let sent = uptime();
        let end = shared.doubt_until_ms();
        row.until = row.until.max(until_ms(end, self.duration));
        if shared.state.replace(&row, known).await? == Written::Refused {
            self.held().valid_until = Duration::ZERO;
            return Ok(false);
        }
        let mut held = self.held();
        held.row = row;
        held.valid_until = sent + self.duration;
        Ok(true)
    }

    /// Renews the claim as long as `repair` takes, whatever that waits for: with a small write
    /// budget a single batch may take longer than a claim is good for, and a claim that ends in its
    /// middle would be given back and begun again for ever.
    pub async fn keep<T>(&self, shared: &Shared, repair: impl Future<Output = T>) -> T {
        let done = CancellationToken::new();
        let renewals = async {
            loop {
                tokio::select! {
                    () = done.cancelled() => return,
                    () = tokio::time::sleep(self.duration / 3) => {}
                }
                // Not broken off by `done`: a renewal on its way would refuse what the repair
                // writes to the row next.
                match self.renew(shared, None).await {
                    Ok(true) => {}
                    Ok(false) => return,
                    Err(fault) => tracing::debug!(code = fault.code, "a claim was not renewed"),
                }
            }
        };
        let repair = async {
            let repaired = repair.await;
            done.cancel();
            repaired
        };
        tokio::join!(repair, renewals).0
    }

    /// Gives the claim up. Every write of it was answered completely, so the next one need not wait.
    pub async fn give_back(&self, shared: &Shared) {
        let _turn = self.turn.lock().await;
        let mut row = self.row();
        let known = row.lease_counter;
        row.lease_counter += 1;
        row.lease_owner = None;
        row.until = shared.target.clock.now_ms();
        // If it fails the next one waits until the claim is over: later, and just as right.
        let _ = shared.state.replace(&row, known).await;
        shared.rescan.notify_one();
    }
}
