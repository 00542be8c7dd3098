//! This worker's part in the fleet: which shards it holds, which it takes, asks for, and gives.
//!
//! The rule is [`share`](crate::lease::share), and counts the shards of all tables together; this is
//! what it looks at. Decided anew with every snapshot of the state table. No I/O here: streams take
//! what they are told to, and a shard that is given up sees its token cancelled.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::rows::Snapshot;
use crate::lease::row::ShardRow;
use crate::lease::rules::worker_of;
use crate::lease::share::{Holder, Open, Peer, Sharing, View};
use crate::observe::metrics;

/// This worker among the others.
pub struct Fleet {
    me: String,
    epoch: u64,
    duration: Duration,
    state: Mutex<State>,
    wants_changed: Notify,
}

#[derive(Default)]
struct State {
    sharing: Sharing,
    /// The latest snapshot that any task brought.
    snapshot: Arc<Snapshot>,
    /// Keys of the leases that may be read, by stream. A stream reports them when it has looked at
    /// its lineage.
    readable: HashMap<String, HashSet<String>>,
    /// Grows whenever `readable` changes.
    version: u64,
    /// Keys of the leases that a task of this process works on, each with what makes it drain. The
    /// rows tell that only later.
    held: HashMap<String, CancellationToken>,
    /// Keys of the leases that are drained for another worker, until the rows say that they are
    /// released.
    promised: HashMap<String, String>,
    /// What was decided last, and from what.
    decided: Option<(Instant, u64)>,
    take: Arc<HashSet<String>>,
    wants: Vec<String>,
    leaving: bool,
}

impl Fleet {
    /// The part of the process start `me`, for leases of `epoch` that last for `duration`.
    pub fn new(me: &str, epoch: u64, duration: Duration) -> Self {
        Self {
            me: me.to_owned(),
            epoch,
            duration,
            state: Mutex::default(),
            wants_changed: Notify::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No holder leaves it half changed in a way that the next snapshot would not mend.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The leases of `stream` that may be read now, whoever owns them. Replaces what was known.
    pub fn set_readable(&self, stream: &str, keys: HashSet<String>) {
        let mut state = self.state();
        if state.readable.get(stream) != Some(&keys) {
            state.readable.insert(stream.to_owned(), keys);
            state.version += 1;
        }
    }

    /// `stream` is not followed any more.
    pub fn forget(&self, stream: &str) {
        let mut state = self.state();
        if state.readable.remove(stream).is_some() {
            state.version += 1;
        }
    }

    /// Counts the lease `key` as this worker's, from before it is taken until what is returned is
    /// dropped. When the shard is to be handed over, `drain` is cancelled.
    pub fn hold(self: &Arc<Self>, key: &str, drain: CancellationToken) -> Held {
        let mut state = self.state();
        state.promised.remove(key);
        state.held.insert(key.to_owned(), drain);
        drop(state);
        Held {
            fleet: Arc::clone(self),
            key: key.to_owned(),
        }
    }

    /// Decides from `snapshot`, if that was not done yet: starts to drain what others shall have, and
    /// returns the keys of the leases to take.
    pub fn share_out(&self, snapshot: &Arc<Snapshot>) -> Arc<HashSet<String>> {
        let mut guard = self.state();
        let state = &mut *guard;
        if snapshot.begun > state.snapshot.begun {
            state.snapshot = Arc::clone(snapshot);
        }
        let snapshot = Arc::clone(&state.snapshot);
        let Some(begun) = snapshot.begun else {
            return Arc::default();
        };
        if state.leaving || state.decided == Some((begun, state.version)) {
            return Arc::clone(&state.take);
        }
        state.decided = Some((begun, state.version));
        state.keep_promises(&self.me);
        let view = self.view(state, &snapshot, begun);
        metrics::workers_live(1 + view.peers.len());
        let decision = state.sharing.decide(&view);
        for (key, to) in decision.give {
            if let Some(drain) = state.held.get(&key) {
                tracing::info!(lease = key, to, "shard is handed over: it drains");
                metrics::handed_over();
                drain.cancel();
                state.promised.insert(key, to);
            }
        }
        state.take = Arc::new(decision.take);
        if state.wants != decision.ask {
            if state.wants.is_empty() {
                tracing::info!(shards = decision.ask.len(), "asking for a share of shards");
            }
            state.wants = decision.ask;
            self.wants_changed.notify_one();
        }
        Arc::clone(&state.take)
    }

    fn view<'a>(&'a self, state: &State, snapshot: &'a Snapshot, now: Instant) -> View<'a> {
        let peers: Vec<Peer<'a>> = snapshot
            .workers
            .iter()
            .filter(|row| row.worker != self.me && row.epoch == self.epoch && !row.leaving)
            .filter(|row| snapshot.living.contains(&row.worker))
            .map(|row| Peer {
                id: &row.worker,
                wants: &row.wants,
            })
            .collect();
        let living: HashSet<&str> = peers.iter().map(|peer| peer.id).collect();
        let readable: HashSet<&str> = state
            .readable
            .values()
            .flatten()
            .map(String::as_str)
            .collect();
        let shards = snapshot
            .shards
            .iter()
            .filter(|row| row.epoch == self.epoch && !row.is_finished())
            .filter_map(|row| {
                let readable = readable.contains(row.lease_key.as_str());
                let held = state.held.contains_key(&row.lease_key);
                let to = state.promised.get(&row.lease_key);
                let holder = match to.and_then(|to| living.get(to.as_str())) {
                    Some(to) => Holder::Promised(to),
                    None if held || to.is_some() => Holder::Worker(&self.me),
                    None => holder(row, snapshot),
                };
                // A shard that this worker cannot read counts only as what another has to do.
                let counts = match holder {
                    Holder::Worker(owner) => owner == self.me || living.contains(owner),
                    Holder::Nobody | Holder::Promised(_) => false,
                };
                (readable || counts).then_some(Open {
                    key: &row.lease_key,
                    holder,
                    running: held && to.is_none(),
                    readable,
                })
            })
            .collect();
        View {
            me: &self.me,
            duration: self.duration,
            now,
            peers,
            shards,
        }
    }

    /// Keys of the leases that this worker asks others for.
    pub fn wants(&self) -> Vec<String> {
        self.state().wants.clone()
    }

    /// Returns once [`wants`](Self::wants) has changed.
    pub async fn wants_changed(&self) {
        self.wants_changed.notified().await;
    }

    /// Takes nothing and asks for nothing any more.
    pub fn leave(&self) {
        let mut state = self.state();
        state.leaving = true;
        state.take = Arc::default();
        state.wants.clear();
    }
}

impl State {
    /// Forgets promises that are kept: the rows do not name this worker any more.
    fn keep_promises(&mut self, me: &str) {
        let snapshot = &self.snapshot;
        let held = &self.held;
        let mut promised = std::mem::take(&mut self.promised);
        let ours: HashSet<&str> = match promised.is_empty() {
            true => HashSet::new(),
            false => snapshot
                .shards
                .iter()
                .filter(|row| holder(row, snapshot) == Holder::Worker(me))
                .map(|row| row.lease_key.as_str())
                .collect(),
        };
        promised.retain(|key, _| held.contains_key(key) || ours.contains(key.as_str()));
        self.promised = promised;
    }
}

/// Who has the lease of `row`, as the rows tell it.
fn holder<'a>(row: &'a ShardRow, snapshot: &Snapshot) -> Holder<'a> {
    match &row.lease_owner {
        Some(owner) if !snapshot.takeable.contains(&row.lease_key) => {
            Holder::Worker(worker_of(owner))
        }
        _ => Holder::Nobody,
    }
}

/// A lease that counts as this worker's until this is dropped.
pub struct Held {
    fleet: Arc<Fleet>,
    key: String,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.fleet.state().held.remove(&self.key);
    }
}

#[cfg(test)]
#[path = "fleet_tests.rs"]
mod tests;
