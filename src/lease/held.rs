//! A lease this process owns: renewed, checkpointed, released, and known to be lost.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex as StdMutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Mutex, Notify};
use tokio_util::sync::CancellationToken;

use super::row::{SHARD_END, ShardRow};
use super::rules::{Refused, after_refusal, take_name};
use super::table::{StateTable, Written};
use crate::dynamo::clock::{host_ms, uptime};
use crate::dynamo::transmit::Bound;
use crate::error::{Class, Fault, Operation};
use crate::stream::ShardId;
use crate::stream::sequence::SequenceNumber;

/// Where a shard stands, as its row tells everybody else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// Up to which moment of the source everything is applied, in milliseconds.
    pub watermark_ms: Option<i64>,
    /// Before which moment of the source everything is proven to be applied, in milliseconds. Never more
    /// than the checkpoint that is stored proves.
    pub proven_ms: Option<i64>,
    /// Seconds until the stream forgets the oldest record not applied.
    pub headroom_s: Option<i64>,
}

/// A shard's lease, held by this process until [`lost`](Lease::lost) or released.
///
/// Its end is counted from before its last renewal was *sent*: whoever observes the row cannot
/// have seen the counter move earlier than that.
pub struct Lease {
    state: StateTable,
    owner: String,
    duration: Duration,
    /// The row as this process last knew it. The lock makes updates of one row follow each other.
    row: Mutex<ShardRow>,
    /// Until when the lease is good, as this machine's uptime: a clock that goes on while the
    /// machine is suspended.
    valid_until: StdMutex<Duration>,
    /// What every update of the row says of the shard's position.
    progress: StdMutex<Progress>,
    /// Cancelled when somebody else has the lease.
    lost: CancellationToken,
    /// Whether a page of the shard has come.
    read: AtomicBool,
    /// Asks for a renewal now.
    renew_now: Notify,
    /// Whether a release was sent: a row without an owner is then ours to leave.
    releasing: AtomicBool,
    shard: ShardId,
}

impl Lease {
    /// Takes the lease of `row`. `None` if somebody else was faster.
    ///
    /// # Errors
    /// The fault of the call; whether the lease was taken is then unknown, and it is left to
    /// expire.
    pub async fn take(
        state: &StateTable,
        mut row: ShardRow,
        owner: &str,
        duration: Duration,
    ) -> Result<Option<Arc<Self>>, Fault> {
        let known_counter = row.lease_counter;
        let owner = take_name(owner, rand::random());
        row.lease_owner = Some(owner.clone());
        row.lease_counter += 1;
        row.owner_switches_since_checkpoint += 1;
        row.updated_at = Some(host_ms());
        let sent = uptime();
        match state.replace(&row, known_counter).await? {
            Written::Refused => Ok(None),
            Written::Yes => Ok(Some(Arc::new(Self {
                state: state.clone(),
                owner,
                duration,
                shard: row.shard(),
                progress: StdMutex::new(Progress {
                    watermark_ms: row.watermark,
                    proven_ms: row.proven_until,
                    headroom_s: row.headroom,
                }),
                row: Mutex::new(row),
                valid_until: StdMutex::new(sent + duration),
                lost: CancellationToken::new(),
                read: AtomicBool::new(false),
                renew_now: Notify::new(),
                releasing: AtomicBool::new(false),
            }))),
        }
    }

    /// The shard it is for.
    pub fn shard(&self) -> &ShardId {
        &self.shard
    }

    /// The row as last known.
    pub async fn row(&self) -> ShardRow {
        self.row.lock().await.clone()
    }

    /// Cancelled once somebody else has the lease.
    pub fn lost(&self) -> &CancellationToken {
        &self.lost
    }

    /// Takes note of where the shard stands. The next update of the row says so, and every renewal
    /// is one: an idle shard's row tells as much as a busy one's.
    pub fn note(&self, progress: Progress) {
        *self.progress.lock().unwrap_or_else(PoisonError::into_inner) = progress;
    }

    /// A page of the shard has come. The first one is told at once: the fleet waits for it before it calls
    /// the table followed.
    pub fn note_read(&self) {
        if !self.read.swap(true, Ordering::Relaxed) {
            self.renew_now.notify_one();
        }
    }

    /// Renews the lease, and says where the shard stands.
    ///
    /// # Errors
    /// The fault of the call, or class `Condition` when the lease is lost.
    pub async fn renew(&self) -> Result<(), Fault> {
        self.update(|_| {}).await
    }

    /// Stores the last sequence number that is durable with all before it, and with it before which moment
    /// everything is proven to be applied then. Renews the lease as well.
    ///
    /// # Errors
    /// As [`renew`](Self::renew).
    pub async fn checkpoint(
        &self,
        sequence: &SequenceNumber,
        proven_ms: Option<i64>,
    ) -> Result<(), Fault> {
        self.update(|row| {
            row.checkpoint_at(sequence);
            row.proven_until = row.proven_until.max(proven_ms);
        })
        .await
    }

    /// Says that the shard was applied to its end, found at `at_ms` of the source, what that proves, and
    /// names its children, which must have rows.
    ///
    /// # Errors
    /// As [`renew`](Self::renew).
    pub async fn finish(
        &self,
        children: &[ShardId],
        at_ms: i64,
        proven_ms: Option<i64>,
    ) -> Result<(), Fault> {
        self.update(|row| {
            row.finished_at = row.finished_at.or(Some(at_ms));
            row.proven_until = row.proven_until.max(proven_ms);
            row.checkpoint = SHARD_END.to_owned();
            row.child_shard_ids = children.iter().map(|child| child.0.clone()).collect();
            row.owner_switches_since_checkpoint = 0;
            row.headroom = None;
        })
        .await
    }

    /// Says that the shard's position was lost, as the gap found at `found_ms` tells, and that it is read
    /// anew. Only once everything read before is durable, or stored as a doubt.
    ///
    /// # Errors
    /// As [`renew`](Self::renew).
    pub async fn restart(&self, found_ms: i64) -> Result<(), Fault> {
        self.update(|row| row.restart(found_ms)).await
    }

    /// Gives the lease up: clears the owner and keeps the row, so that its counter only grows.
    /// Only for a shard with nothing in flight.
    ///
    /// # Errors
    /// As [`renew`](Self::renew).
    pub async fn release(&self) -> Result<(), Fault> {
        self.releasing.store(true, Ordering::Relaxed);
        let result = self.update(|row| row.lease_owner = None).await;
        // After a failure the lease may still be ours, and release may be tried again.
        if result.is_ok() {
            self.lost.cancel();
        }
        result
    }

    /// Writes the row on condition of its counter. An update whose answer was lost is recognised
    /// as ours and built upon.
    async fn update(&self, change: impl Fn(&mut ShardRow)) -> Result<(), Fault> {
        let mut known = self.row.lock().await;
        // Twice: the first refusal may be an echo of our own earlier update.
        for _ in 0..2 {
            if self.lost.is_cancelled() {
                break;
            }
            let mut next = known.clone();
            let progress = *self.progress.lock().unwrap_or_else(PoisonError::into_inner);
            next.watermark = progress.watermark_ms.or(next.watermark);
            // What was true once stays true.
            next.proven_until = next.proven_until.max(progress.proven_ms);
            next.headroom = progress.headroom_s;
            if self.read.load(Ordering::Relaxed) {
                next.read_by = Some(self.owner.clone());
            }
            change(&mut next);
            next.lease_counter = known.lease_counter + 1;
            next.updated_at = Some(host_ms());
            let sent = uptime();
            match self.state.replace(&next, known.lease_counter).await? {
                Written::Yes => {
                    *known = next;
                    self.extend(sent);
                    return Ok(());
                }
                Written::Refused => {
                    let current = self.state.shard(&known.lease_key).await?;
                    let releasing = self.releasing.load(Ordering::Relaxed);
                    match after_refusal(
                        current.as_ref(),
                        &self.owner,
                        known.lease_counter,
                        releasing,
                    ) {
                        Refused::Released => return Ok(()),
                        Refused::StillOurs { counter } => {
                            if let Some(current) = current {
                                *known = current;
                            }
                            known.lease_counter = counter;
                        }
                        Refused::Lost => self.lost.cancel(),
                    }
                }
            }
        }
        self.lost.cancel();
        Err(Fault::own(
            Operation::State,
            Class::Condition,
            "lease lost",
            format!("another worker took the lease of {}", self.shard),
        ))
    }

    fn extend(&self, sent: Duration) {
        let mut until = self
            .valid_until
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *until = (*until).max(sent + self.duration);
    }

    /// Renews the lease at a third of its duration until `stop` is cancelled or it is lost.
    /// `report` hears of every renewal.
    pub async fn keep(&self, stop: &CancellationToken, report: impl Fn(Result<(), &Fault>)) {
        let mut pause = self.duration / 3;
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.lost.cancelled() => return,
                () = self.renew_now.notified() => {}
                () = tokio::time::sleep(pause) => {}
            }
            let sent = uptime();
            match self.renew().await {
                Ok(()) => {
                    report(Ok(()));
                    // Counted from before it was sent, as the lease is.
                    pause = (self.duration / 3).saturating_sub(uptime().saturating_sub(sent));
                }
                Err(_) if self.lost.is_cancelled() => return,
                Err(fault) => {
                    report(Err(&fault));
                    // The lease runs on: the next attempt cannot wait its turn.
                    pause = self.duration / 20;
                }
            }
        }
    }
}

impl Bound for Lease {
    /// How long the lease is still good. Zero when expired or lost.
    fn remaining(&self) -> Duration {
        if self.lost.is_cancelled() {
            return Duration::ZERO;
        }
        // A poisoned lock still holds a whole time.
        let until = *self
            .valid_until
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        until.saturating_sub(uptime())
    }
}
