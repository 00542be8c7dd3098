//! The log of every call a gateway was sent: what tests judge API calls, budgets, permissions and
//! the order of writes by.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::keys::Key;

/// The log keeps this many calls; [`Gateway::calls_forgotten`](super::Gateway::calls_forgotten)
/// counts older ones. A test of minutes makes far fewer, a leak would not end.
pub const CALLS_MAX: usize = 500_000;

/// How a call ended, as far as the client could see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Not answered yet.
    Pending,
    /// Answered whole.
    Answered {
        /// The HTTP status.
        status: u16,
        /// The error's code; `None` for a success.
        code: Option<String>,
    },
    /// The connection was cut before the answer was whole.
    Cut,
}

/// One call.
#[derive(Clone, Debug)]
pub struct Call {
    /// Counts the calls of a gateway from 0, in the order of their arrival.
    pub number: u64,
    /// When it arrived, since the gateway started.
    pub arrived: Duration,
    /// When its answer was ready or its connection cut, since the gateway started.
    pub ended: Option<Duration>,
    /// The operation, such as `PutItem`.
    pub operation: String,
    /// The tables it names.
    pub tables: Vec<String>,
    /// The keys of the items it reads or writes, where it names them.
    pub keys: Vec<Key>,
    /// The shard it reads, for calls of the Streams API.
    pub shard: Option<String>,
    /// The epoch of the writer: the `x-farshore-epoch` header.
    pub epoch: Option<String>,
    /// How it ended.
    pub outcome: Outcome,
    /// When the database had carried it out, since the gateway started; `None` if it never did or
    /// refused it.
    pub effect: Option<Duration>,
    /// Write units it used up, if writes are metered.
    pub units: f64,
    /// Items it did not write, or keys it did not read, for want of capacity or by `unprocessed`, whether they came back
    /// or the call was refused.
    pub unprocessed: usize,
    /// Names of the faults that struck it.
    pub faults: Vec<String>,
}

impl Call {
    /// True if it was answered with success.
    pub fn succeeded(&self) -> bool {
        self.code().is_none() && matches!(self.outcome, Outcome::Answered { .. })
    }

    /// The error's code, if it was answered with an error.
    pub fn code(&self) -> Option<&str> {
        match &self.outcome {
            Outcome::Answered { code, .. } => code.as_deref(),
            _ => None,
        }
    }
}

/// The calls in the order of their arrival; bounded.
#[derive(Debug)]
pub(crate) struct CallLog {
    start: Instant,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    calls: VecDeque<Call>,
    first: u64,
}

impl CallLog {
    pub(crate) fn new() -> Self {
        Self {
            start: Instant::now(),
            inner: Mutex::default(),
        }
    }

    pub(crate) fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    /// Enters a call and gives it its number.
    pub(crate) fn arrive(&self, call: impl FnOnce(u64, Duration) -> Call) -> u64 {
        let mut inner = self.lock();
        let number = inner.first + inner.calls.len() as u64;
        // Under the lock, so that times do not fall from one call to the next.
        let call = call(number, self.start.elapsed());
        inner.calls.push_back(call);
        if inner.calls.len() > CALLS_MAX {
            inner.calls.pop_front();
            inner.first += 1;
        }
        number
    }

    pub(crate) fn update(&self, number: u64, change: impl FnOnce(&mut Call)) {
        let mut inner = self.lock();
        let place = number.checked_sub(inner.first);
        let place = place.and_then(|n| usize::try_from(n).ok());
        if let Some(call) = place.and_then(|n| inner.calls.get_mut(n)) {
            change(call);
        }
    }

    pub(crate) fn matching(&self, wanted: impl Fn(&Call) -> bool) -> Vec<Call> {
        let inner = self.lock();
        inner.calls.iter().filter(|c| wanted(c)).cloned().collect()
    }

    /// The number the next call will have.
    pub(crate) fn next(&self) -> u64 {
        let inner = self.lock();
        inner.first + inner.calls.len() as u64
    }

    /// How many calls were forgotten.
    pub(crate) fn forgotten(&self) -> u64 {
        self.lock().first
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
