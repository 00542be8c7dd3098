//! For how long letters are in the hands of a redrive.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::dead_letter::Receipt;
use crate::dynamo::clock::uptime;
use crate::dynamo::transmit::Bound;
use crate::lease::hold::Hold;
use crate::lease::row::JobRow;

/// The right to write for a batch of letters: the job's, and no longer than the queue hides them.
pub(super) struct BatchBound {
    hold: Arc<Hold<JobRow>>,
    /// As this machine's uptime; `None` where nothing is hidden.
    until: Mutex<Option<Duration>>,
}

impl BatchBound {
    pub(super) fn new(hold: &Arc<Hold<JobRow>>, until: Option<Duration>) -> Arc<Self> {
        Arc::new(Self {
            hold: Arc::clone(hold),
            until: Mutex::new(until),
        })
    }

    pub(super) fn until(&self) -> Option<Duration> {
        *self.until.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn move_to(&self, until: Duration) {
        *self.until.lock().unwrap_or_else(PoisonError::into_inner) = Some(until);
    }
}

impl Bound for BatchBound {
    fn remaining(&self) -> Duration {
        let hold = self.hold.remaining();
        let until = self.until();
        until.map_or(hold, |until| hold.min(until.saturating_sub(uptime())))
    }
}

/// A letter in hand that stays.
pub(super) struct Parked {
    pub(super) receipt: Receipt,
    /// Until when nobody else can have received it, as this machine's uptime; `None` where nothing is
    /// hidden.
    pub(super) ours_until: Option<Duration>,
}

impl Parked {
    /// Whether it may be given back: one that has shown again may be in somebody else's hands.
    pub(super) fn is_ours(&self) -> bool {
        self.ours_until.is_none_or(|until| uptime() < until)
    }
}
