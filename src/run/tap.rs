//! The tap: whether writes to the replica of a table may start.
//!
//! Every worker learns of a pause from the state table, which it reads several times a lease. What
//! cannot be read may hold a pause, so a reading counts no longer than a lease: that long after a
//! pause was stored, no worker starts a write any more, whatever else is broken.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::context::Shared;
use super::rows::Snapshot;
use crate::dynamo::clock::uptime;
use crate::lease::row::PauseRow;
use crate::mutation::{self, Mutation};

/// Whether writes of a table may start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tap {
    /// They may.
    Open,
    /// A person closed it.
    Paused {
        /// Who.
        by: String,
        /// Why.
        reason: String,
        /// When, RFC 3339.
        at: String,
    },
    /// The state table was not read for a lease: there may be a pause in it.
    Unknown,
    /// The epoch of its writes is over.
    Over,
}

impl Tap {
    /// Whether writes may start.
    pub fn is_open(&self) -> bool {
        *self == Tap::Open
    }
}

/// The pause that closes the tap of `table`. One of all tables goes before its own.
pub fn pause_of<'a>(pauses: &'a [PauseRow], table: &str) -> Option<&'a PauseRow> {
    pauses
        .iter()
        .filter(|row| row.covers(table))
        .min_by_key(|row| row.table.is_some())
}

/// The tap of `table`, given the pauses of a reading that began at `begun`. `begun` and `now` are by
/// [`uptime`].
fn judge(
    pauses: &[PauseRow],
    begun: Option<Duration>,
    now: Duration,
    lease: Duration,
    table: &str,
) -> Tap {
    let unread = begun.is_none_or(|begun| now.saturating_sub(begun) >= lease);
    if unread && !mutation::is_off(Mutation::Tap) {
        return Tap::Unknown;
    }
    match pause_of(pauses, table) {
        None => Tap::Open,
        Some(row) => Tap::Paused {
            by: row.by.clone(),
            reason: row.reason.clone(),
            at: row.at.clone(),
        },
    }
}

impl Shared {
    /// Whether writes to the replica of `table` may start now. Ask before each.
    pub fn tap(&self, table: &str) -> Tap {
        if !self.is_in_epoch() {
            return Tap::Over;
        }
        let rows = self.rows.borrow();
        judge(
            &rows.pauses,
            rows.begun_uptime,
            uptime(),
            self.config.leases.duration,
            table,
        )
    }

    /// Returns once the tap of `table` is open.
    pub async fn until_open(&self, table: &str) {
        let mut rows = self.rows.clone();
        loop {
            rows.mark_unchanged();
            if self.tap(table).is_open() {
                return;
            }
            if rows.changed().await.is_err() {
                // Nobody reads the state table any more: closed for good.
                std::future::pending::<()>().await;
            }
        }
    }
}

/// The tap of one table, as a loop that writes sees it.
pub struct Gate {
    shared: Arc<Shared>,
    table: String,
    rows: watch::Receiver<Arc<Snapshot>>,
    stop: CancellationToken,
    /// Cancelled when the tap closes.
    flow: CancellationToken,
}

impl Gate {
    /// The gate of a loop that `stop` asks to end.
    pub fn new(shared: &Arc<Shared>, table: &str, stop: &CancellationToken) -> Self {
        Self {
            shared: Arc::clone(shared),
            table: table.to_owned(),
            rows: shared.rows.clone(),
            stop: stop.clone(),
            flow: stop.child_token(),
        }
    }

    /// Whether writes may start now. When the tap closes, those that still wait to be sent (for the
    /// write budget, or for the rest of a batch) are told by [`flow`](Self::flow).
    pub fn is_open(&mut self) -> bool {
        self.rows.mark_unchanged();
        let open = self.shared.tap(&self.table).is_open();
        if !open {
            self.flow.cancel();
        } else if self.flow.is_cancelled() {
            self.flow = self.stop.child_token();
        }
        open
    }

    /// Cancelled when the tap closes or the loop is asked to end: what was not sent by then is not.
    pub fn flow(&self) -> CancellationToken {
        self.flow.clone()
    }

    /// Returns when the tap may have moved since it was last asked.
    pub async fn moved(&mut self) {
        let begun = self.rows.borrow().begun_uptime;
        let lease = self.shared.config.leases.duration;
        let left = begun.map(|begun| (begun + lease).saturating_sub(uptime()));
        tokio::select! {
            changed = self.rows.changed() => {
                if changed.is_err() {
                    std::future::pending::<()>().await;
                }
            }
            () = tokio::time::sleep(left.unwrap_or_default()), if !self.flow.is_cancelled() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::row::Resumed;

    const LEASE: Duration = Duration::from_secs(10);

    fn pause(table: Option<&str>) -> PauseRow {
        PauseRow::new(table, "alice@host", "bad write", "now".into())
    }

    fn tap(pauses: &[PauseRow], table: &str) -> Tap {
        judge(pauses, Some(Duration::ZERO), LEASE / 2, LEASE, table)
    }

    #[test]
    fn a_pause_closes_its_table_and_no_other() {
        let pauses = [pause(Some("orders"))];
        assert!(!tap(&pauses, "orders").is_open());
        assert!(tap(&pauses, "customers").is_open());
        assert!(!tap(&[pause(None)], "customers").is_open());
    }

    #[test]
    fn a_tap_that_was_opened_again_is_open() {
        let mut row = pause(None);
        row.resumed = Some(Resumed {
            by: "bob@host".into(),
            reason: "mended".into(),
            at: "later".into(),
        });
        assert!(tap(&[row.clone()], "orders").is_open());
        assert!(!tap(&[row, pause(Some("orders"))], "orders").is_open());
    }

    #[test]
    fn what_was_not_read_for_a_lease_is_closed() {
        let judged = |begun, now| judge(&[], begun, now, LEASE, "orders");
        assert_eq!(judged(None, LEASE), Tap::Unknown);
        assert_eq!(judged(Some(Duration::ZERO), LEASE), Tap::Unknown);
        let just = LEASE - Duration::from_millis(1);
        assert_eq!(judged(Some(Duration::ZERO), just), Tap::Open);
    }
}
