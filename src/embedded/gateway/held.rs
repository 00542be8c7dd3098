//! Writes that arrived and have not been carried out: held back until their time has come or a
//! test lets them go, whatever their client has concluded meanwhile.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, oneshot};

use super::keys::Key;

/// A write that is held back.
#[derive(Clone, Debug)]
pub struct HeldWrite {
    /// The number of its call in the log.
    pub call: u64,
    /// The operation, such as `BatchWriteItem`.
    pub operation: String,
    /// The keys it will write.
    pub keys: Vec<Key>,
}

/// What became of a held write when it was carried out.
pub(crate) type Delivered = Result<(), String>;

/// Why a held write goes on.
#[derive(Debug)]
pub(crate) enum Release {
    /// Its time has come.
    ByTime,
    /// A test released it and waits to be told of its effect.
    ByTest(oneshot::Sender<Delivered>),
    /// The gateway ends, and the write with it.
    Abandoned,
}

#[derive(Debug)]
struct Entry {
    write: HeldWrite,
    release: oneshot::Sender<oneshot::Sender<Delivered>>,
}

#[derive(Debug, Default)]
pub(crate) struct Held {
    entries: Mutex<BTreeMap<u64, Entry>>,
    arrived: Notify,
}

impl Held {
    /// Waits until the write's time has come (`None`: never by itself) or a test releases it.
    pub(crate) async fn wait(&self, write: HeldWrite, time: Option<Duration>) -> Release {
        let call = write.call;
        let (release, released) = oneshot::channel();
        self.lock().insert(call, Entry { write, release });
        self.arrived.notify_waiters();
        let released = async { released.await.map_or(Release::Abandoned, Release::ByTest) };
        let Some(time) = time else {
            return released.await;
        };
        let outcome = tokio::time::timeout(time, released).await;
        self.lock().remove(&call);
        outcome.unwrap_or(Release::ByTime)
    }

    /// Gives up every write that is held back: they never take effect.
    pub(crate) fn abandon(&self) {
        self.lock().clear();
    }

    /// The writes held back, oldest first.
    pub(crate) fn list(&self) -> Vec<HeldWrite> {
        self.lock().values().map(|e| e.write.clone()).collect()
    }

    /// Carries a held write out and waits for its effect. An error names what refused it.
    pub(crate) async fn deliver(&self, call: u64) -> Delivered {
        let entry = self.lock().remove(&call);
        let Some(entry) = entry else {
            return Err(format!("call {call} is not held back"));
        };
        let (told, effect) = oneshot::channel();
        if entry.release.send(told).is_err() {
            return Err(format!("call {call} was carried out by itself"));
        }
        let lost = |_| Err(format!("call {call} was given up"));
        effect.await.unwrap_or_else(lost)
    }

    /// Waits until `count` writes at least are held back; false if `patience` ran out first.
    pub(crate) async fn reaches(&self, count: usize, patience: Duration) -> bool {
        let reached = async {
            loop {
                let arrived = self.arrived.notified();
                tokio::pin!(arrived);
                // Registered before the count is taken, so that no arrival is missed.
                arrived.as_mut().enable();
                if self.lock().len() >= count {
                    return;
                }
                arrived.await;
            }
        };
        tokio::time::timeout(patience, reached).await.is_ok()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
