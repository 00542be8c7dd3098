//! Repair by key (tenet 8): the one primitive that brings a replica's item back to what the source
//! holds, beside a worker that goes on replaying.
//!
//! ```text
//!   durable intent (a doubt, a dead letter, a job's page), claimed within a bound
//!      │
//!      ▼
//!   read the source ──same as what was written──▶ clean
//!      ▲    │ other, or nothing written yet
//!      │    ▼
//!      │  read the replica ──same as the source's──▶ clean
//!      │    │ other
//!      │    ▼
//!      └─ write (or delete); only a complete answer leads on
//!           │ no complete answer: stop here. The intent stays, and is taken up again when this
//!           ▼ write is dead as well.
//!   all keys clean ──▶ drop the intent
//! ```
//!
//! *Why the source is read again after the write*: between reading and writing, the source may have
//! changed and the worker may have applied that change; then the write put an older value over a
//! newer one, and no later record would mend it.
//!
//! *Why the intent must be durable, and claimed with a bound*: a repair that dies after such a write,
//! or is continued long after, leaves the older value behind. The next one begins only when no
//! write of this one can take effect any more.
//!
//! *Why one more change is enough beside a worker*: seen after the last write was answered, its record
//! is applied later than that write. So a key that changes all the time is repaired, too.
//!
//! *When it is right*: while data flows in one direction only, and records made after the last read
//! of the source will still be applied. Who calls it checks both.
//!
//! [`KeyRepair`] is the protocol and pure; [`Repairer`] carries it out. `repair_tests.rs` plays it
//! against worker, source, crashes and late effects in every order.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use aws_sdk_dynamodb::Client;
use tokio_util::sync::CancellationToken;

use crate::apply::batch::{BATCH_OPS_MAX, Outcome, Writer};
use crate::apply::coalesce::Op;
use crate::backoff::Backoff;
use crate::dynamo::clock::host_ms;
use crate::dynamo::item::ItemKey;
use crate::dynamo::read::batch_get;
use crate::dynamo::transmit::Bound;
use crate::dynamo::value::{Item, UnknownType, item_bytes, same_item};
use crate::error::{Class, Fault, Operation, Policy};
use crate::stream::change::{Change, write_units};

/// How often the source of one key is read before it counts as too hot to settle now.
const ROUNDS_MAX: usize = 20;
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// How often a call that fails in a way that passes by itself is made again at once. Then the
/// repair is left, reported and begun again: its intent stays, and nobody waits unseen.
const ATTEMPTS_MAX: u32 = 10;

/// Counts the attempts of one call.
#[derive(Debug, Default)]
pub struct Attempts(u32);

impl Attempts {
    /// Whether there is to be another attempt after one that failed.
    pub fn again(&mut self) -> bool {
        self.0 += 1;
        self.0 < ATTEMPTS_MAX
    }

    /// An attempt succeeded.
    pub fn reset(&mut self) {
        self.0 = 0;
    }
}

/// What to do next for one key.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Step<V> {
    /// Read the source, consistently, and tell [`KeyRepair::source`].
    ReadSource,
    /// Read the replica, consistently, and tell [`KeyRepair::replica`].
    ReadReplica,
    /// Write this; after a complete answer tell [`KeyRepair::written`], otherwise give up.
    Write(V),
    /// Nothing: the replica holds what the source does, or a later record will bring it.
    Clean,
}

/// The repair of one key; `V` is what a table holds under it, absence included.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct KeyRepair<V> {
    state: State<V>,
    /// Somebody applies what the source changes from now on.
    flows: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum State<V> {
    Source {
        written: Option<V>,
    },
    /// The source held this after the last write, and that is not what was written.
    Again {
        seen: V,
    },
    Replica {
        source: V,
    },
    Write {
        source: V,
    },
    Clean,
}

impl<V> Default for KeyRepair<V> {
    fn default() -> Self {
        Self {
            state: State::Source { written: None },
            flows: false,
        }
    }
}

impl<V: PartialEq + Clone> KeyRepair<V> {
    /// The source held `source` when somebody read it, however long ago: it is written at once, and
    /// verified as any other. The first read decides nothing, so it need not be consistent.
    pub fn of_read(source: V) -> Self {
        Self {
            state: State::Write { source },
            flows: false,
        }
    }

    /// Somebody applies what the source changes from now on. Then a change seen after the last write was
    /// answered is enough: its record comes later than that write, and brings what is right. Without this
    /// a key that changes all the time could never be repaired.
    #[must_use]
    pub fn beside_flow(self, flows: bool) -> Self {
        Self { flows, ..self }
    }

    /// What to do next.
    pub fn step(&self) -> Step<V> {
        match &self.state {
            State::Source { .. } | State::Again { .. } => Step::ReadSource,
            State::Replica { .. } => Step::ReadReplica,
            State::Write { source } => Step::Write(source.clone()),
            State::Clean => Step::Clean,
        }
    }

    /// The source holds this.
    pub fn source(&mut self, source: V) {
        self.state = match &self.state {
            State::Source { written } if written.as_ref() == Some(&source) => State::Clean,
            State::Source { written: Some(_) } if self.flows => State::Again { seen: source },
            State::Again { seen } if *seen != source => State::Clean,
            State::Source { .. } | State::Again { .. } => State::Replica { source },
            _ => return,
        };
    }

    /// The replica holds this.
    pub fn replica(&mut self, replica: &V) {
        if let State::Replica { source } = &self.state {
            self.state = match source == replica {
                true => State::Clean,
                false => State::Write {
                    source: source.clone(),
                },
            };
        }
    }

    /// The write was answered completely.
    pub fn written(&mut self) {
        if let State::Write { source } = &self.state {
            self.state = State::Source {
                written: Some(source.clone()),
            };
        }
    }

    /// Nothing is to be done for this key after all.
    pub fn leave(&mut self) {
        self.state = State::Clean;
    }
}

/// What a table holds under a key. Two are equal when DynamoDB says so.
#[derive(Debug, Clone)]
struct Held(Option<Arc<Item>>);

impl PartialEq for Held {
    fn eq(&self, other: &Self) -> bool {
        match (&self.0, &other.0) {
            (None, None) => true,
            (Some(a), Some(b)) => same_item(a, b),
            _ => false,
        }
    }
}

/// Items that TTL deleted in the source and that the replica keeps (`ttl_deletes = "skip"`).
#[derive(Debug, Clone)]
pub struct KeepExpired {
    /// The source table's TTL attribute.
    pub attribute: String,
}

impl KeepExpired {
    /// Whether `item` had expired at `now_ms`, so that its absence from the source is TTL's doing.
    pub fn keeps(&self, item: &Item, now_ms: i64) -> bool {
        let expiry = item
            .get(&self.attribute)
            .and_then(|value| value.as_n().ok())
            .and_then(|number| number.parse::<f64>().ok());
        expiry.is_some_and(|seconds| seconds * 1_000.0 <= now_ms as f64)
    }
}

/// Repairs keys of one table.
pub struct Repairer<'a> {
    /// The source table.
    pub source: (&'a Client, &'a str),
    /// The replica table, for reading.
    pub replica: (&'a Client, &'a str),
    /// Writes to the replica.
    pub writer: &'a Writer,
    /// Nothing is written once it is over.
    pub bound: Arc<dyn Bound>,
    /// Nothing is begun once it is cancelled.
    pub stop: &'a CancellationToken,
    /// Items that stay although the source lacks them.
    pub keep_expired: Option<KeepExpired>,
    /// Whether a worker applies what the source changes from now on.
    pub flows: bool,
    /// Set once a write took effect, or may have: a repair that is left then has to be made again.
    pub wrote: Option<&'a AtomicBool>,
}

/// What a repair did.
#[derive(Debug, Default)]
pub struct Repaired {
    /// Items written or deleted.
    pub written: usize,
    /// Items that the replica can never take: they belong into the dead letters.
    pub refused: Vec<Refused>,
}

/// An item that a repair found different and the replica refuses.
#[derive(Debug)]
pub struct Refused {
    /// The write, as the source held the item.
    pub change: Arc<Change>,
    /// What the replica holds instead.
    pub held: Option<Arc<Item>>,
    /// Why it refuses.
    pub fault: Fault,
    /// How often it was tried alone.
    pub attempts: u32,
}

/// Why a repair did not come to its end. The intent stays.
#[derive(Debug)]
pub enum Unfinished {
    /// A write left without a complete answer: it may take effect later.
    Unanswered(Fault),
    /// A call failed in a way that does not pass by itself.
    Failed(Fault),
    /// Some key changes faster than it can be read and written.
    Unsettled,
    /// Asked to stop, or the bound is over.
    Stopped,
}

struct Key {
    keys: Item,
    id: ItemKey,
    repair: KeyRepair<Held>,
    /// What the replica held when it was read last.
    held: Option<Arc<Item>>,
}

impl Repairer<'_> {
    /// Repairs all `keys`, given by their key attributes.
    ///
    /// # Errors
    /// [`Unfinished`]; the intent must then be kept.
    pub async fn repair(
        &self,
        keys: impl IntoIterator<Item = Item>,
    ) -> Result<Repaired, Unfinished> {
        self.repair_read(keys.into_iter().map(|keys| (keys, None)))
            .await
    }

    /// As [`repair`](Self::repair), of keys whose item in the source was read before, where it is given:
    /// one read of the source a key, and none of the replica, where nothing has changed since.
    ///
    /// # Errors
    /// As [`repair`](Self::repair).
    pub async fn repair_read(
        &self,
        keys: impl IntoIterator<Item = (Item, Option<Arc<Item>>)>,
    ) -> Result<Repaired, Unfinished> {
        let mut repaired = Repaired::default();
        let mut keys = keys.into_iter();
        loop {
            let batch: Vec<_> = keys.by_ref().take(BATCH_OPS_MAX).collect();
            if batch.is_empty() {
                return Ok(repaired);
            }
            self.repair_batch(batch, &mut repaired).await?;
        }
    }

    async fn repair_batch(
        &self,
        batch: Vec<(Item, Option<Arc<Item>>)>,
        repaired: &mut Repaired,
    ) -> Result<(), Unfinished> {
        let mut open: Vec<Key> = batch
            .into_iter()
            .map(|(keys, read)| Key {
                id: ItemKey::new(&keys),
                keys,
                repair: read
                    .map_or_else(KeyRepair::default, |item| {
                        KeyRepair::of_read(Held(Some(item)))
                    })
                    .beside_flow(self.flows),
                held: None,
            })
            .collect();
        for round in 0..ROUNDS_MAX {
            if round > 0 {
                // A key that is written to all the time gets a moment.
                tokio::time::sleep(FIRST_PAUSE * u32::try_from(round).unwrap_or(1)).await;
            }
            self.read_source(&mut open, round == 0).await?;
            open.retain(|key| key.repair.step() != Step::Clean);
            self.read_replica(&mut open).await?;
            open.retain(|key| key.repair.step() != Step::Clean);
            self.write(&mut open, repaired).await?;
            if open.is_empty() {
                return Ok(());
            }
        }
        Err(Unfinished::Unsettled)
    }

    async fn read_source(&self, open: &mut [Key], first: bool) -> Result<(), Unfinished> {
        // What was written is verified before a stop is heard: an older value may lie there now.
        let heard = first.then_some(self.stop);
        let wanted: Vec<&Key> = open
            .iter()
            .filter(|key| key.repair.step() == Step::ReadSource)
            .collect();
        let found = self
            .read(Operation::ReadSource, self.source, &wanted, heard)
            .await?;
        for key in open {
            key.repair.source(Held(found.get(&key.id).cloned()));
        }
        Ok(())
    }

    async fn read_replica(&self, open: &mut [Key]) -> Result<(), Unfinished> {
        let wanted: Vec<&Key> = open
            .iter()
            .filter(|key| key.repair.step() == Step::ReadReplica)
            .collect();
        let found = self
            .read(
                Operation::ReadReplica,
                self.replica,
                &wanted,
                Some(self.stop),
            )
            .await?;
        for key in open {
            if key.repair.step() != Step::ReadReplica {
                continue;
            }
            let held = found.get(&key.id).cloned();
            let gone = matches!(&key.repair.state, State::Replica { source } if source.0.is_none());
            if let (true, Some(keep), Some(item)) = (gone, &self.keep_expired, &held)
                && keep.keeps(item, host_ms())
            {
                key.repair.leave();
                continue;
            }
            key.held.clone_from(&held);
            key.repair.replica(&Held(held));
        }
        Ok(())
    }

    /// Writes what is to be written. Keys that the replica refuses for good are taken out.
    async fn write(&self, open: &mut Vec<Key>, repaired: &mut Repaired) -> Result<(), Unfinished> {
        let mut ops: Vec<Op> = Vec::with_capacity(open.len());
        for (slot, key) in open.iter().enumerate() {
            if let Step::Write(held) = key.repair.step() {
                let change = Change::of_item(&key.keys, held.0.as_deref(), host_ms());
                let mut change = change.map_err(not_built)?;
                // What is replaced is paid for as well, where that is larger.
                let held = key.held.as_deref().map_or(0, item_bytes);
                change.units = change.units.max(write_units(held));
                ops.push(Op {
                    slot: slot as u64,
                    change: Arc::new(change),
                });
            }
        }
        let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
        let mut attempts = Attempts::default();
        let mut refused: Vec<u64> = Vec::new();
        while !ops.is_empty() {
            let asked = ops.len();
            if self.stop.is_cancelled() || self.bound.remaining().is_zero() {
                return Err(Unfinished::Stopped);
            }
            let sent = self.writer.write(&self.bound, self.stop, ops).await;
            let any = |outcome: &Outcome| matches!(outcome, Outcome::Applied);
            if let Some(wrote) = self.wrote
                && (sent.unanswered.is_some() || sent.outcomes.iter().any(|(_, one)| any(one)))
            {
                wrote.store(true, Ordering::Relaxed);
            }
            if sent.unanswered.is_some() {
                return Err(Unfinished::Unanswered(sent.fault.unwrap_or_else(|| {
                    Fault::own(
                        Operation::Write,
                        Class::Network,
                        "answered too late",
                        "the answer came after the claim had ended",
                    )
                })));
            }
            ops = Vec::new();
            for (op, outcome) in sent.outcomes {
                match outcome {
                    Outcome::Applied => {
                        repaired.written += 1;
                        if let Some(key) = open.get_mut(op.slot as usize) {
                            key.repair.written();
                        }
                    }
                    Outcome::Returned => ops.push(op),
                    Outcome::Refused { fault, attempts } => {
                        refused.push(op.slot);
                        let key = open.get(op.slot as usize);
                        repaired.refused.push(Refused {
                            change: op.change,
                            held: key.and_then(|key| key.held.clone()),
                            fault,
                            attempts,
                        });
                    }
                }
            }
            if ops.len() < asked {
                attempts.reset();
            }
            match sent.fault {
                Some(fault) if fault.policy() != Policy::Retry || !attempts.again() => {
                    return Err(Unfinished::Failed(fault));
                }
                Some(_) => tokio::time::sleep(backoff.pause()).await,
                None => {}
            }
        }
        let mut slot = 0;
        open.retain(|_| {
            slot += 1;
            !refused.contains(&(slot - 1))
        });
        Ok(())
    }

    /// Reads the items of `open` from a table, consistently. What passes by itself is waited for.
    async fn read(
        &self,
        operation: Operation,
        table: (&Client, &str),
        open: &[&Key],
        stop: Option<&CancellationToken>,
    ) -> Result<HashMap<ItemKey, Arc<Item>>, Unfinished> {
        let mut found = HashMap::with_capacity(open.len());
        let Some(names) = open.first().map(|key| &key.keys) else {
            return Ok(found);
        };
        let mut left: Vec<Item> = open.iter().map(|key| key.keys.clone()).collect();
        let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
        let mut attempts = Attempts::default();
        while !left.is_empty() {
            if stop.is_some_and(CancellationToken::is_cancelled) || self.bound.remaining().is_zero()
            {
                return Err(Unfinished::Stopped);
            }
            match batch_get(operation, table, &left).await {
                Ok(got) => {
                    attempts.reset();
                    for item in got.items {
                        found.insert(ItemKey::of(&item, names), Arc::new(item));
                    }
                    left = got.left;
                    if !left.is_empty() {
                        tokio::time::sleep(backoff.pause()).await;
                    }
                }
                Err(fault) => {
                    if fault.policy() != Policy::Retry || !attempts.again() {
                        return Err(Unfinished::Failed(fault));
                    }
                    tokio::time::sleep(backoff.pause()).await;
                }
            }
        }
        Ok(found)
    }
}

/// A write that cannot be spelled.
fn not_built(unknown: UnknownType) -> Unfinished {
    Unfinished::Failed(Fault::own(
        Operation::Write,
        Class::Unknown,
        "request not built",
        unknown.to_string(),
    ))
}

#[cfg(test)]
#[path = "repair_tests.rs"]
mod tests;
