//! The right to write in an epoch. It ends by itself.
//!
//! A lease says who writes a shard; a term says that anybody of its epoch may write at all. It is good
//! for one lease duration from before the reading of the control record *began* that last confirmed it.
//! So, a lease duration after a later epoch was stored, nothing of the old one leaves any process that
//! reads that table, whatever leases it holds or takes, and whether it could hear of it or not.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::control::Heed;
use crate::dynamo::clock::uptime;
use crate::dynamo::transmit::Bound;
use crate::mutation::{self, Mutation};

/// The header of a write that names its epoch: whoever reads a log of requests sees which flow it was of.
pub const EPOCH_HEADER: &str = "x-farshore-epoch";

/// A term of an epoch.
#[derive(Debug)]
pub struct Term {
    epoch: u64,
    duration: Duration,
    /// As this machine's uptime.
    good_until: Mutex<Duration>,
    over: CancellationToken,
    why: OnceLock<Heed>,
}

impl Term {
    /// A term of `epoch` that a reading which began at `begun`, by [`uptime`], has confirmed.
    pub fn new(epoch: u64, duration: Duration, begun: Duration) -> Arc<Self> {
        Arc::new(Self {
            epoch,
            duration,
            good_until: Mutex::new(begun + duration),
            over: CancellationToken::new(),
            why: OnceLock::new(),
        })
    }

    /// Number of its epoch.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// A reading that began at `begun` found no later epoch.
    pub fn confirm(&self, begun: Duration) {
        let mut until = self.until();
        *until = (*until).max(begun + self.duration);
    }

    /// It is over for good, as `why` says. The first reason stays.
    pub fn end(&self, why: Heed) {
        if why != Heed::GoOn && self.why.set(why).is_ok() {
            self.over.cancel();
        }
    }

    /// Cancelled once it is over for good.
    pub fn over(&self) -> &CancellationToken {
        &self.over
    }

    /// Why it is over for good; `None` while it is not.
    pub fn why(&self) -> Option<&Heed> {
        self.why.get()
    }

    fn until(&self) -> std::sync::MutexGuard<'_, Duration> {
        // A poisoned lock still holds a whole time.
        self.good_until
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Bound for Term {
    fn remaining(&self) -> Duration {
        if self.over.is_cancelled() {
            return Duration::ZERO;
        }
        if mutation::is_off(Mutation::Term) {
            return self.duration;
        }
        self.until().saturating_sub(uptime())
    }
}

/// Two rights to write: good while both are.
pub struct Both {
    /// One.
    pub one: Arc<dyn Bound>,
    /// The other.
    pub other: Arc<dyn Bound>,
}

impl Bound for Both {
    fn remaining(&self) -> Duration {
        self.one.remaining().min(self.other.remaining())
    }
}

/// `bound`, and `term` where there is one.
pub fn within_term(bound: &Arc<dyn Bound>, term: Option<&Arc<Term>>) -> Arc<dyn Bound> {
    match term {
        None => Arc::clone(bound),
        Some(term) => Arc::new(Both {
            one: Arc::clone(bound),
            other: Arc::clone(term) as _,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_term_ends_a_lease_after_the_last_reading_began() {
        let (lease, now) = (Duration::from_secs(5), uptime());
        let term = Term::new(1, lease, now);
        assert!(term.remaining() > Duration::from_secs(4));
        let old = Term::new(1, lease, now.saturating_sub(lease));
        assert_eq!(old.remaining(), Duration::ZERO);
        old.confirm(now);
        assert!(old.remaining() > Duration::from_secs(4));
        old.confirm(now.saturating_sub(lease));
        assert!(
            old.remaining() > Duration::from_secs(4),
            "an older reading takes nothing away"
        );
    }

    #[test]
    fn a_term_that_is_over_stays_over() {
        let term = Term::new(1, Duration::from_secs(5), uptime());
        term.end(Heed::GoOn);
        assert!(term.why().is_none());
        let why = Heed::Over {
            epoch: 2,
            active: "b".into(),
        };
        term.end(why.clone());
        term.confirm(uptime());
        assert_eq!((term.remaining(), term.why()), (Duration::ZERO, Some(&why)));
        assert!(term.over().is_cancelled());
    }
}
