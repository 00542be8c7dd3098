//! The row that says that this worker lives, and what it asks the others for.
//!
//! ```text
//!   absent ──start──▶ beating ──asked to stop──▶ leaving ──drained──▶ absent
//!      ▲                 │ silent for ten leases: the others delete it
//!      └─────────────────┘ and it is made again if the worker only slept
//! ```

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::context::Shared;
use crate::backoff::Backoff;
use crate::dynamo::clock::{host_ms, rfc3339};
use crate::error::Fault;
use crate::lease::row::WorkerRow;
use crate::lease::table::{StateTable, Written};
use crate::observe::health::Scope;

/// What health knows the row by.
const PART: &str = "worker";
/// What health knows the shares of the write budgets by.
const BUDGET: &str = "budget";
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How long a stop waits until the others know of it. They find out without, only later.
const FAREWELL: Duration = Duration::from_millis(500);

/// This worker's row.
pub struct Member {
    state: StateTable,
    /// The row as last known. The lock makes its updates follow each other.
    known: Mutex<Known>,
}

struct Known {
    row: WorkerRow,
    /// Whether it was stored.
    stored: bool,
    /// Whether it was deleted for good: a late beat must not bring it back.
    gone: bool,
}

impl Member {
    /// The row of the process start `worker`, not stored yet.
    pub fn new(state: StateTable, worker: &str, epoch: u64) -> Self {
        Self {
            state,
            known: Mutex::new(Known {
                row: WorkerRow::new(worker, epoch, rfc3339(host_ms())),
                stored: false,
                gone: false,
            }),
        }
    }

    /// Moves the row's counter, and says what is asked for.
    ///
    /// # Errors
    /// The fault of the call; whether the row was written is then unknown.
    pub async fn beat(&self, wants: Vec<String>) -> Result<(), Fault> {
        let mut known = self.known.lock().await;
        known.row.wants = wants;
        self.write(&mut known).await
    }

    /// Says that this worker stops: from now on the others share without it.
    async fn leave(&self) -> Result<(), Fault> {
        let mut known = self.known.lock().await;
        known.row.leaving = true;
        known.row.wants.clear();
        self.write(&mut known).await
    }

    /// Says that the epoch `epoch` has ended this worker's, and that nothing of it is sent any more.
    async fn acknowledge(&self, epoch: u64) -> Result<(), Fault> {
        let mut known = self.known.lock().await;
        known.row.acknowledged = Some(epoch);
        known.row.leaving = true;
        known.row.wants.clear();
        self.write(&mut known).await
    }

    /// Deletes the row for good.
    async fn depart(&self) -> Result<(), Fault> {
        let mut known = self.known.lock().await;
        known.gone = true;
        // Refused when somebody else has written it, and then it is somebody else's to delete.
        self.state.delete(&known.row).await.map(|_| ())
    }

    async fn write(&self, known: &mut Known) -> Result<(), Fault> {
        if known.gone {
            return Ok(());
        }
        // Twice: a write whose answer was lost, or a row that was deleted, is found out by the first.
        for _ in 0..2 {
            let mut next = known.row.clone();
            next.lease_counter += 1;
            next.updated_at = host_ms();
            let written = match known.stored {
                true => self.state.replace(&next, known.row.lease_counter).await?,
                false => self.state.create(&next).await?,
            };
            if written == Written::Yes {
                known.row = next;
                known.stored = true;
                return Ok(());
            }
            match self.state.worker(&known.row.lease_key).await? {
                Some(row) => {
                    known.row.lease_counter = row.lease_counter;
                    known.stored = true;
                }
                // The counter goes on, so that nobody takes the new row for the old one.
                None => known.stored = false,
            }
        }
        // Somebody else writes our row all the time: it moves, and that is what it is for.
        Ok(())
    }
}

/// Keeps this worker in the fleet: its row, its shares, and the rows of those long dead. A task that
/// dies is started again.
pub async fn keep_membership(shared: Arc<Shared>) {
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    loop {
        let mut tasks = JoinSet::new();
        tasks.spawn(keep_beating(Arc::clone(&shared)));
        tasks.spawn(keep_sharing(Arc::clone(&shared)));
        // Both go on for ever; when one ends, the other goes with the set.
        tasks.join_next().await;
        drop(tasks);
        if shared.rows.has_changed().is_err() {
            // Nobody reads the state table any more: the role has ended, and this with it.
            return;
        }
        tracing::error!(
            "the task that keeps this worker in the fleet ended by itself; it starts over"
        );
        tokio::time::sleep(backoff.pause()).await;
    }
}

/// Stores the row of this worker, before it does anything in its epoch, however long that takes, until
/// `stop`. Whether it was stored.
pub async fn enter(shared: &Shared, stop: &CancellationToken) -> bool {
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    while let Err(fault) = shared.member.beat(shared.fleet.wants()).await {
        shared.health.failed(Scope::State, "", PART, &fault);
        tokio::select! {
            () = stop.cancelled() => return false,
            () = tokio::time::sleep(backoff.pause()) => {}
        }
    }
    shared.health.succeeded(Scope::State, "", PART);
    true
}

/// Moves the counter every third of a lease, and at once when there is something to ask for.
async fn keep_beating(shared: Arc<Shared>) {
    let duration = shared.config.leases.duration;
    loop {
        let sent = Instant::now();
        let pause = match shared.member.beat(shared.fleet.wants()).await {
            Ok(()) => {
                shared.health.succeeded(Scope::State, "", PART);
                (duration / 3).saturating_sub(sent.elapsed())
            }
            Err(fault) => {
                shared.health.failed(Scope::State, "", PART, &fault);
                // Silent for a lease, it would count as dead.
                duration / 20
            }
        };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = shared.fleet.wants_changed() => {}
        }
    }
}

/// Decides with every snapshot, whether or not a stream gets to ask, and deletes the rows of workers
/// long dead.
async fn keep_sharing(shared: Arc<Shared>) {
    let mut rows = shared.rows.clone();
    while rows.changed().await.is_ok() {
        let snapshot = rows.borrow_and_update().clone();
        shared.fleet.share_out(&snapshot);
        let dead = snapshot
            .workers
            .iter()
            .filter(|row| snapshot.long_dead.contains(&row.worker) && row.worker != shared.owner);
        for row in dead {
            match shared.state.delete(row).await {
                Ok(Written::Yes) => {
                    tracing::info!(worker = row.worker, "row of a dead worker removed");
                }
                // It lives after all, or another failure: the next snapshot tells.
                Ok(Written::Refused) | Err(_) => {}
            }
        }
    }
}

/// Keeps this worker's shares of the write budgets. A task that dies is started again.
pub async fn keep_budgets(shared: Arc<Shared>) {
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    loop {
        let keeping = Arc::clone(&shared);
        let mut task = JoinSet::new();
        task.spawn(async move {
            let health = &keeping.health;
            let report = |result: Result<(), &Fault>| match result {
                Ok(()) => health.succeeded(Scope::State, "", BUDGET),
                Err(fault) => health.failed(Scope::State, "", BUDGET, fault),
            };
            keeping.budgets.keep(report).await;
        });
        task.join_next().await;
        tracing::error!(
            "the task that keeps this worker's write budgets ended by itself; it starts over"
        );
        tokio::time::sleep(backoff.pause()).await;
    }
}

/// Before a worker drains: the others need not leave a share to it any more. Takes half a second at
/// most; those that do not hear of it now, see it later.
pub async fn leave(shared: &Shared) {
    shared.fleet.leave();
    let _ = tokio::time::timeout(FAREWELL, shared.member.leave()).await;
}

/// After a worker has drained: its row goes. If that fails, the others delete it in time.
pub async fn depart(shared: &Shared) {
    let _ = tokio::time::timeout(FAREWELL, shared.member.depart()).await;
    // Nothing is written any more; if it fails, the others take it at the end of the hold.
    shared.budgets.leave(FAREWELL).await;
}

/// After a worker has drained because the epoch `epoch` has ended its own: that is told, however long it
/// takes, until `stop`.
pub async fn acknowledge(shared: &Shared, epoch: u64, stop: &CancellationToken) {
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    while let Err(fault) = shared.member.acknowledge(epoch).await {
        tracing::warn!(
            code = fault.code,
            epoch,
            "the end of the epoch could not be acknowledged yet"
        );
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(backoff.pause()) => {}
        }
    }
}
