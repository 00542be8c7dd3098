//! Doubts: stored before the checkpoint passes them, repaired when their time has come.

mod store;

pub use store::{ShardDoubts, store_inherited};

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use aws_smithy_types::DateTime;
use aws_smithy_types::date_time::Format;
use futures::future::join_all;
use rand::seq::SliceRandom;
use tokio_util::sync::CancellationToken;

use super::context::{Shared, TableContext};
use super::covered::{Covered, DoubtedShard, Reading, SeenDue};
use super::discovery::discovery;
use super::letter::Letter;
use super::tap::Gate;
use crate::backoff::Backoff;
use crate::config::{Table, TtlDeletes};
use crate::dynamo::clock::{host_ms, rfc3339, uptime};
use crate::dynamo::item::ItemKey;
use crate::dynamo::table::{describe, ttl_attribute};
use crate::dynamo::value::Item;
use crate::error::{Class, Fault, Operation};
use crate::lease::doubts::may_claim;
use crate::lease::hold::{Hold, Terms};
use crate::lease::row::{DoubtRow, GapReason, GapRow, UNREAD_LIMIT_MS, known_table_id};
use crate::lease::rules::take_name;
use crate::lease::table::Written;
use crate::observe::health::Scope;
use crate::observe::metrics;
use crate::repair::{Attempts, KeepExpired, Refused, Repaired, Repairer, Unfinished};
use crate::stream::reader::{PAGE_RECORDS_MAX, Page, Position, ShardReader};
use crate::stream::sequence::SequenceNumber;
use crate::stream::stream_label;

/// Consecutive empty pages after which nothing older than the time asked for is expected any more.
const EMPTY_PAGES_PROVE: usize = 5;
const EMPTY_PAUSE: Duration = Duration::from_millis(200);
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Longest wait before the doubts are looked at again.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// Doubts of a table repaired at once.
const REPAIRS_AT_ONCE: usize = 8;
/// Keys that wait to be repaired at once; more are repaired in turns.
const KEYS_MAX: usize = 1_000;
/// Refused items held at once until their letters are written.
const REFUSED_BYTES_MAX: usize = 8 << 20;

/// The right to repair a doubt.
type Claim = Hold<DoubtRow>;

/// Repairs the doubts of a table as they come due, until `stop`.
pub async fn repair_doubts(shared: Arc<Shared>, table: Table, stop: CancellationToken) {
    let covered = Mutex::new(Covered::default());
    let mut seen_due = SeenDue::default();
    let mut rows = shared.rows.clone();
    let mut gate = Gate::new(&shared, &table.name, &stop);
    let patience = shared.config.leases.duration * 2;
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    while !stop.is_cancelled() {
        let snapshot = rows.borrow_and_update().clone();
        let now_ms = shared.target.clock.now_ms();
        let mut due: Vec<&DoubtRow> = snapshot.doubts.iter().collect();
        // Repair is right in one direction only, and that is its epoch's.
        due.retain(|doubt| {
            doubt.table == table.name
                && doubt.epoch == shared.epoch
                && shared.is_in_epoch()
                && may_claim(doubt, &snapshot.shards, &shared.owner, now_ms, patience)
        });
        // After the rows were read, so that whatever they tell had happened by then.
        let rows_due = due.iter().map(|d| (d.lease_key.as_str(), d.lease_counter));
        seen_due.see(rows_due, uptime());
        // In any order, so that one that cannot be repaired holds no other back.
        due.shuffle(&mut rand::rng());
        // One of a shard at a time: its ranges share most of their keys.
        let mut shards = HashSet::new();
        due.retain(|doubt| shards.insert((&doubt.stream_arn, &doubt.shard_id)));
        due.truncate(REPAIRS_AT_ONCE);
        if !gate.is_open() {
            due.clear();
            // Nothing is tried, and nothing can be told, until it opens.
            shared.health.forget(&table.name, "repair");
        }
        let flow = gate.flow();
        let repairs = due
            .into_iter()
            .filter_map(|doubt| {
                let dead_since = seen_due.since(&doubt.lease_key, doubt.lease_counter)?;
                Some((doubt.clone(), dead_since))
            })
            .map(|(doubt, dead_since)| {
                repair_doubt(&shared, &table, doubt, dead_since, &covered, &flow)
            });
        let done = tokio::select! {
            done = join_all(repairs) => done,
            // Cancels the flow when the tap closes; the repairs then end by themselves.
            () = watch_gate(&mut gate) => return,
        };
        let mut pause = if done.is_empty() {
            LOOK_EVERY
        } else {
            Duration::ZERO
        };
        // A round without repairs proves nothing as long as a doubt is left that failed before.
        let none_left = !snapshot.doubts.iter().any(|row| row.table == table.name);
        if done.iter().all(Result::is_ok) && (none_left || !done.is_empty()) {
            shared.health.forget(&table.name, "repair");
            backoff.reset();
        }
        for unfinished in done.iter().filter_map(|done| done.as_ref().err()) {
            report(&shared, &table.name, unfinished);
            pause = backoff.pause();
        }
        let failed = done.iter().any(Result::is_err);
        if pause.is_zero() {
            shared.rescan.notify_one();
        }
        tokio::select! {
            () = stop.cancelled() => {}
            // After a repair the next snapshot no longer shows its row. After one that failed its own
            // claim has changed the rows: that is no reason to try again at once.
            changed = rows.changed(), if !failed => if changed.is_err() { return },
            () = tokio::time::sleep(pause), if !pause.is_zero() => {}
        }
    }
}

/// Looks at the tap whenever it may have moved, for ever.
async fn watch_gate(gate: &mut Gate) {
    loop {
        gate.is_open();
        gate.moved().await;
    }
}

fn report(shared: &Shared, table: &str, unfinished: &Unfinished) {
    let fault = match unfinished {
        Unfinished::Unanswered(fault) | Unfinished::Failed(fault) => fault,
        Unfinished::Unsettled => {
            tracing::info!(
                table,
                "a key in doubt changes all the time; tried again later"
            );
            return;
        }
        Unfinished::Stopped => return,
    };
    metrics::retried(table, fault.class);
    let scope = match fault.operation {
        Operation::State => Scope::State,
        Operation::Write | Operation::ReadReplica => Scope::Replica,
        Operation::Queue => Scope::DeadLetters,
        _ => Scope::Source,
    };
    shared.health.failed(scope, table, "repair", fault);
}

/// Repairs every key of one doubt and removes its row.
async fn repair_doubt(
    shared: &Arc<Shared>,
    table: &Table,
    doubt: DoubtRow,
    dead_since: Duration,
    covered: &Mutex<Covered>,
    stop: &CancellationToken,
) -> Result<(), Unfinished> {
    let terms = Terms {
        state: shared.state.clone(),
        clock: Arc::clone(&shared.target.clock),
        duration: shared.config.leases.duration,
        late_effect: shared.config.leases.late_effect,
    };
    let holder = take_name(&shared.owner, rand::random());
    let taken = Claim::take(terms, doubt, holder).await;
    let Some(claim) = taken.map_err(Unfinished::Failed)? else {
        return Ok(());
    };
    let repaired = claim
        .keep(repair_claimed(
            shared, table, &claim, dead_since, covered, stop,
        ))
        .await;
    match &repaired {
        Ok(()) | Err(Unfinished::Unanswered(_)) => {}
        Err(_) => claim.give_back().await,
    }
    repaired
}

async fn repair_claimed(
    shared: &Arc<Shared>,
    table: &Table,
    claim: &Arc<Claim>,
    dead_since: Duration,
    covered: &Mutex<Covered>,
    stop: &CancellationToken,
) -> Result<(), Unfinished> {
    let arn = claim.row().stream_arn;
    // Nobody lists for a repair, and a repair asks for no listing.
    let (discovery, _) = discovery();
    let Some(context) = TableContext::of(shared, table, &arn, discovery) else {
        return Ok(());
    };
    refuse_another_table(shared, table).await?;
    let row = claim.row();
    let Some(from) = row.position() else {
        return Err(Unfinished::Failed(Fault::own(
            Operation::State,
            Class::Unknown,
            crate::error::UNREADABLE_ROW,
            "a doubt's `from` is not readable: a person or a newer version has changed it",
        )));
    };
    let doubted = DoubtedShard {
        stream_arn: row.stream_arn,
        shard_id: row.shard_id,
        start_timestamp: row.start_timestamp,
    };
    let mut repair = DoubtRepair {
        context: &context,
        keep_expired: keep_expired(shared, table).await?,
        claim: Arc::clone(claim),
        reading: Reading::new(doubted, from.clone(), dead_since),
        covered,
        stop,
        keys: HashMap::new(),
        written: 0,
        refused: Vec::new(),
        lettered: 0,
        seen: 0,
    };
    repair.run(from).await?;
    let row = repair.claim.row();
    let gone = claim.finish().await.map_err(Unfinished::Failed)?;
    // Refused: somebody else claimed it meanwhile, and removes it.
    if gone == Written::Yes {
        metrics::repaired(&table.name, repair.written);
        tracing::info!(
            table = table.name,
            shard = row.shard_id,
            cause = row.cause.label(),
            keys = repair.seen,
            written = repair.written,
            lettered = repair.lettered,
            "a doubt is settled: its keys are as in the source, or dead letters"
        );
    }
    Ok(())
}

/// What a table made anew holds is not what the records in doubt were made of: repaired by it, the
/// replica would lose its items. A person decides first.
pub(super) async fn refuse_another_table(shared: &Shared, table: &Table) -> Result<(), Unfinished> {
    let name = table.name_in(&shared.source.label);
    let described = describe(&shared.source.tables, name)
        .await
        .map_err(Unfinished::Failed)?;
    let rows = shared.rows.borrow().clone();
    let known = known_table_id(&rows.streams, shared.epoch, &table.name);
    let now = described.as_ref().and_then(|table| table.table_id());
    if described.is_some() && known.is_none_or(|known| Some(known) == now) {
        return Ok(());
    }
    Err(Unfinished::Failed(Fault::own(
        Operation::DescribeTable,
        Class::NotFound,
        "another table",
        "the source table is not the one whose records are in doubt: it is gone, or was made anew",
    )))
}

/// The repair of one doubt: its range is read again, its keys are repaired.
struct DoubtRepair<'a> {
    context: &'a TableContext,
    keep_expired: Option<KeepExpired>,
    claim: Arc<Claim>,
    reading: Reading,
    /// What this and other repairs did.
    covered: &'a Mutex<Covered>,
    stop: &'a CancellationToken,
    /// Keys read and not repaired yet.
    keys: HashMap<ItemKey, Item>,
    written: usize,
    /// Refused by the replica, and not dead-lettered yet, with when their repairs began.
    refused: Vec<(Refused, Duration)>,
    /// Refused by the replica and dead-lettered.
    lettered: usize,
    seen: usize,
}

impl<'a> DoubtRepair<'a> {
    async fn run(&mut self, from: Position) -> Result<(), Unfinished> {
        let row = self.claim.row();
        // A position by name silently begins at what the stream still holds.
        if !matches!(from, Position::After(_)) && is_too_old(&row) {
            return self.lost(GapReason::Trimmed).await;
        }
        let last = row.to.as_deref().and_then(SequenceNumber::parse);
        let mut reader = self.reader(&row, from);
        let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
        let mut attempts = Attempts::default();
        let mut empty = 0;
        loop {
            if self.stop.is_cancelled() || self.claim.is_over() {
                return Err(Unfinished::Stopped);
            }
            let read = self.reading.skip(&self.covered(), reader.position());
            if let Some(read) = read {
                if last.as_ref().is_some_and(|last| *last <= read) {
                    return self.repair_keys(None).await;
                }
                reader = self.reader(&row, Position::After(read));
                continue;
            }
            let page = match reader.next(PAGE_RECORDS_MAX).await {
                Ok(page) => page,
                Err(fault) => match fault.class {
                    Class::Trimmed => return self.lost(GapReason::Trimmed).await,
                    Class::NotFound if self.is_gone(&row).await? => {
                        return self.lost(GapReason::ShardVanished).await;
                    }
                    Class::ExpiredIterator | Class::Throttled | Class::Service | Class::Network
                        if attempts.again() =>
                    {
                        tokio::time::sleep(backoff.pause()).await;
                        continue;
                    }
                    _ => return Err(Unfinished::Failed(fault)),
                },
            };
            backoff.reset();
            attempts.reset();
            empty = if page.records.is_empty() {
                empty + 1
            } else {
                0
            };
            let end = page.end;
            let over = self.take_in(page, &row, last.as_ref());
            let proven = row.to_time.is_some() && empty >= EMPTY_PAGES_PROVE;
            if over || end || proven {
                return self.repair_keys(None).await;
            }
            if self.keys.len() >= KEYS_MAX {
                let position = reader.position().clone();
                self.repair_keys(Some(&position)).await?;
            }
            if empty > 0 {
                tokio::time::sleep(EMPTY_PAUSE).await;
            }
        }
    }

    fn covered(&self) -> MutexGuard<'a, Covered> {
        let covered: &'a Mutex<Covered> = self.covered;
        covered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reader(&self, row: &DoubtRow, position: Position) -> ShardReader {
        let streams = self.context.shared.source.streams.clone();
        ShardReader::new(streams, &row.stream_arn, &row.shard(), position)
    }

    /// Takes in a page's keys. Returns whether the range is over.
    fn take_in(&mut self, page: Page, row: &DoubtRow, last: Option<&SequenceNumber>) -> bool {
        for record in page.records {
            let (sequence, created_ms, keys) = match record {
                Ok(change) => (Some(change.sequence), change.created_ms, Some(change.keys)),
                Err(bad) => (bad.sequence, bad.created_ms, bad.keys),
            };
            if let (Some(last), Some(sequence)) = (last, &sequence)
                && sequence > last
            {
                return true;
            }
            if row.to_time.is_some_and(|to_time| created_ms > to_time) {
                return true;
            }
            // What was never to be replayed is none of ours.
            let before_start = row.start_timestamp.is_some_and(|start| created_ms < start);
            let keys = keys.filter(|_| !before_start);
            let key = keys.as_ref().map(ItemKey::new);
            let is_last = last.is_some() && sequence.as_ref() == last;
            let covered = self.covered();
            if self.reading.take(&covered, sequence, key.as_ref())
                && let (Some(key), Some(keys)) = (key, keys)
            {
                self.keys.insert(key, keys);
            }
            if is_last {
                return true;
            }
        }
        false
    }

    /// Repairs the keys read so far; `done` is how far the range is clean then.
    async fn repair_keys(&mut self, done: Option<&Position>) -> Result<(), Unfinished> {
        let context = self.context;
        let shared = &context.shared;
        let keys: Vec<Item> = self.keys.drain().map(|(_, keys)| keys).collect();
        self.seen += keys.len();
        let mut unsettled = false;
        for chunk in keys.chunks(crate::apply::batch::BATCH_OPS_MAX) {
            let repairer = Repairer {
                source: (
                    &shared.source.tables,
                    context.table.name_in(&shared.source.label),
                ),
                replica: (
                    &shared.target.tables,
                    context.table.name_in(&shared.target.label),
                ),
                writer: &context.writer,
                bound: Arc::clone(&self.claim) as _,
                stop: self.stop,
                keep_expired: self.keep_expired.clone(),
                flows: true,
                wrote: None,
            };
            let begun = uptime();
            match repairer.repair(chunk.iter().cloned()).await {
                Ok(repaired) => self.settle(chunk, begun, repaired).await?,
                // One hot key must not keep its neighbours, or their letters.
                Err(Unfinished::Unsettled) if chunk.len() > 1 => {
                    for key in chunk {
                        let begun = uptime();
                        match repairer.repair([key.clone()]).await {
                            Ok(repaired) => {
                                let one = std::slice::from_ref(key);
                                self.settle(one, begun, repaired).await?;
                            }
                            Err(Unfinished::Unsettled) => unsettled = true,
                            Err(other) => return Err(other),
                        }
                    }
                }
                Err(other) => return Err(other),
            }
        }
        // Letters come last, so that a repair that is made again and again, as for a hot key, does not
        // make them again and again. Until then the doubt stands and shows.
        if unsettled {
            return Err(Unfinished::Unsettled);
        }
        self.deliver_refused().await?;
        self.reading.done(&mut self.covered());
        if let Some(done) = done {
            let renewed = self.claim.renew(|row| row.set_position(done)).await;
            if !renewed.map_err(Unfinished::Failed)? {
                return Err(Unfinished::Stopped);
            }
        }
        Ok(())
    }

    /// Notes what the repair of `keys` did that began at `begun`.
    async fn settle(
        &mut self,
        keys: &[Item],
        begun: Duration,
        repaired: Repaired,
    ) -> Result<(), Unfinished> {
        self.written += repaired.written;
        self.reading.rely_on(begun);
        let refused: HashSet<&ItemKey> = repaired.refused.iter().map(|r| &r.change.key).collect();
        for key in keys.iter().map(ItemKey::new) {
            if !refused.contains(&key) {
                self.covered().note(&key, begun);
            }
        }
        let refused = repaired.refused.into_iter();
        self.refused.extend(refused.map(|refused| (refused, begun)));
        let bytes = self.refused.iter().map(|(refused, _)| refused.change.bytes);
        if bytes.sum::<usize>() > REFUSED_BYTES_MAX {
            return self.deliver_refused().await;
        }
        Ok(())
    }

    /// What the replica refuses is dead-lettered before its range counts as clean: its record mostly
    /// is already; but where the replica took it, a late write undid that and the replica's schema
    /// changed since, this letter is the only one.
    ///
    /// Refusals of repairs are no flood: beside them no record is applied that they could be measured
    /// by, and there are no more of them than keys in doubt.
    async fn deliver_refused(&mut self) -> Result<(), Unfinished> {
        let context = self.context;
        let table = &context.table.name;
        let shard = self.claim.row().shard_id;
        for (refused, begun) in std::mem::take(&mut self.refused) {
            let letter = Letter::refused_repair(context, ("doubt", &shard), &refused);
            tokio::select! {
                delivered = letter.deliver_or_leave(context, "repair") => {
                    delivered.map_err(Unfinished::Failed)?;
                }
                () = self.stop.cancelled() => return Err(Unfinished::Stopped),
            }
            self.covered().note(&refused.change.key, begun);
            self.lettered += 1;
            metrics::repair_refused(table, 1);
            context
                .shared
                .board
                .dead_lettered(table, refused.fault.class);
        }
        Ok(())
    }

    /// Whether the service itself no longer knows the shard.
    async fn is_gone(&self, row: &DoubtRow) -> Result<bool, Unfinished> {
        let lister = &self.context.shared.lister;
        let gone = lister.is_gone(&row.stream_arn, &row.shard()).await;
        gone.map_err(Unfinished::Failed)
    }

    /// What was in doubt can no longer be told: a gap, before the doubt is dropped.
    async fn lost(&mut self, reason: GapReason) -> Result<(), Unfinished> {
        let shared = &self.context.shared;
        let row = self.claim.row();
        let detail = format!("{}/{} doubt", stream_label(&row.stream_arn), row.shard_id);
        let at = rfc3339(host_ms());
        // Nothing has to be drained for it: its writes are dead, and what is read now is younger.
        let gap = GapRow::new(row.epoch, &row.table, reason, &detail, at)
            .found(shared.source.clock.now_ms())
            .applied_until(row.applied_until);
        shared.store_gap(&gap, "repair").await;
        // Nobody reads the state table for longer than a lease: who does not see the gap yet still sees the
        // doubt, and the recovery point is held back by one of them.
        tokio::time::sleep(shared.config.leases.duration).await;
        Ok(())
    }
}

/// Whether the stream may have forgotten the beginning of a doubt's range: its records were made
/// before it was noticed.
fn is_too_old(row: &DoubtRow) -> bool {
    let noticed = DateTime::from_str(&row.at, Format::DateTime);
    let noticed_ms = noticed.ok().and_then(|at| at.to_millis().ok());
    noticed_ms.is_none_or(|at| host_ms() - at > UNREAD_LIMIT_MS)
}

/// The items that stay in the replica although TTL deleted them in the source.
pub(super) async fn keep_expired(
    shared: &Shared,
    table: &Table,
) -> Result<Option<KeepExpired>, Unfinished> {
    if table.ttl_deletes != TtlDeletes::Skip {
        return Ok(None);
    }
    let name = table.name_in(&shared.source.label);
    let attribute = ttl_attribute(&shared.source.tables, name)
        .await
        .map_err(Unfinished::Failed)?;
    Ok(attribute.map(|attribute| KeepExpired { attribute }))
}
