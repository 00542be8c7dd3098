//! The reading half of a shard: a task that stays a bounded number of pages ahead.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use super::context::TableContext;
use crate::apply::batch::BATCH_OPS_MAX;
use crate::backoff::Backoff;
use crate::dynamo::clock::{host_ms, rfc3339};
use crate::error::{Class, Fault, Policy};
use crate::lease::row::{GapReason, GapRow, UNREAD_LIMIT_MS, shard_key};
use crate::mutation::trouble;
use crate::observe::health::Scope;
use crate::observe::metrics;
use crate::stream::reader::{Page, Position, ShardReader};
use crate::stream::{ShardId, stream_label};

/// A page with this many records, or of so many bytes, was cut by count or size: more is waiting.
const FULL_PAGE_RECORDS: usize = 200;
const FULL_PAGE_BYTES: usize = 512 << 10;
/// Pause after a page of a backlog that does not fill a batch.
const SHORT_PAUSE: Duration = Duration::from_millis(50);
/// Records so old are of a backlog, however few come at once.
const BACKLOG_MS: i64 = 3_000;
/// Consecutive empty pages after which a shard counts as holding nothing more. One proves
/// nothing: empty pages are normal in the middle of a shard.
const EMPTY_PAGES_PROVE: usize = 5;
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// What the reader hands on.
#[derive(Debug)]
pub struct Read {
    /// The page.
    pub page: Page,
    /// Whether more is waiting for certain.
    pub is_full: bool,
    /// A moment of the source, in milliseconds, up to which the shard was seen to hold nothing
    /// that was not read.
    pub caught_up_ms: Option<i64>,
    /// When the page was asked for that ended the shard, by the source's clock, in milliseconds.
    pub ended_ms: Option<i64>,
    /// The position was lost: nothing more is read before everything taken in so far is durable, and
    /// the new position stored.
    pub restart: Option<Restart>,
}

/// A position that was lost. The reader goes on from the oldest record once it is told.
#[derive(Debug)]
pub struct Restart {
    /// When the gap was found, as its row says.
    pub found_ms: i64,
    /// Told once the new position is stored.
    pub stored: oneshot::Sender<()>,
}

impl Read {
    fn page(page: Page, is_full: bool, caught_up_ms: Option<i64>, asked_ms: i64) -> Self {
        Self {
            ended_ms: page.end.then_some(asked_ms),
            page,
            is_full,
            caught_up_ms,
            restart: None,
        }
    }

    fn empty(end: bool) -> Self {
        Self {
            page: Page {
                records: Vec::new(),
                end,
            },
            is_full: false,
            caught_up_ms: None,
            ended_ms: None,
            restart: None,
        }
    }
}

/// Reads a shard to its end and sends its pages; returns when the receiver is gone. `proven_ms` is
/// the last moment of the source at which nothing of the shard can have been trimmed unread.
pub async fn read_shard(
    context: Arc<TableContext>,
    stream_arn: String,
    shard: ShardId,
    position: Position,
    proven_ms: i64,
    pages: mpsc::Sender<Read>,
) {
    let source = &context.shared.source;
    let table = &context.table.name;
    let health = &context.shared.health;
    let worker = &context.shared.config.worker;
    let mut reader = ShardReader::new(source.streams.clone(), &stream_arn, &shard, position);
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    let mut pause = worker.poll_interval;
    let mut empty: VecDeque<i64> = VecDeque::with_capacity(EMPTY_PAGES_PROVE);
    let mut proven_ms = proven_ms;
    let mut expired = 0u32;
    let mut record_bytes = None;
    loop {
        trouble("reader").await;
        // Nothing is read before what was read last is taken in.
        let Ok(room) = pages.reserve().await else {
            return;
        };
        drop(room);
        let asked_ms = source.clock.now_ms();
        // A position after a record is refused once it is trimmed; a start by name or time silently
        // begins at what is left. Unread for a day, it may have lost records.
        if !matches!(reader.position(), Position::After(_))
            && asked_ms - proven_ms > UNREAD_LIMIT_MS
        {
            let found_ms = record_gap(&context, GapReason::Trimmed, &stream_arn, &shard).await;
            if !is_stored(&pages, found_ms).await {
                return;
            }
            reader.restart();
            proven_ms = asked_ms;
        }
        let limit = context.shared.ahead.share().page_records(record_bytes);
        match reader.next(limit).await {
            Ok(page) => {
                health.succeeded(Scope::Source, table, &shard.0);
                backoff.reset();
                expired = 0;
                let records = page.records.len();
                let size = size(&page);
                let is_full = records >= FULL_PAGE_RECORDS.min(limit as usize)
                    || size.bytes >= FULL_PAGE_BYTES
                    || size.newest_ms.is_some_and(|ms| asked_ms - ms > BACKLOG_MS);
                record_bytes = size.record_bytes(records).or(record_bytes);
                let end = page.end;
                if records > 0 {
                    empty.clear();
                } else {
                    if empty.len() == EMPTY_PAGES_PROVE {
                        empty.pop_front();
                    }
                    empty.push_back(asked_ms);
                }
                let caught_up_ms = (empty.len() == EMPTY_PAGES_PROVE)
                    .then(|| empty.front().copied())
                    .flatten();
                proven_ms = proven_ms.max(caught_up_ms.unwrap_or(0));
                if pages
                    .send(Read::page(page, is_full, caught_up_ms, asked_ms))
                    .await
                    .is_err()
                    || end
                {
                    return;
                }
                pause = match records {
                    0 => (pause * 2).clamp(worker.poll_interval, worker.idle_interval),
                    _ => worker.poll_interval,
                };
                if !is_full {
                    tokio::time::sleep(pause.min(worker.idle_interval)).await;
                } else if records < BATCH_OPS_MAX && size.bytes < FULL_PAGE_BYTES {
                    // Old, but few: they may be live ones of a source whose clock goes otherwise.
                    tokio::time::sleep(pause.min(SHORT_PAUSE)).await;
                }
            }
            Err(fault) => {
                metrics::retried(table, fault.class);
                match fault.policy() {
                    Policy::NewIterator => {
                        expired += 1;
                        // Once is normal. Again and again it is trouble of the service's.
                        if expired > 1 {
                            health.failed(Scope::Source, table, &shard.0, &fault);
                            tokio::time::sleep(backoff.pause()).await;
                        }
                    }
                    Policy::Gap => {
                        match lost_position(&context, &stream_arn, &shard, &fault).await {
                            Lost::Maybe => {}
                            Lost::Position(found_ms) => {
                                if !is_stored(&pages, found_ms).await {
                                    return;
                                }
                                reader.restart();
                            }
                            Lost::Shard => {
                                // A receiver that is gone has no use for it.
                                let _ = pages.send(Read::empty(true)).await;
                                return;
                            }
                        }
                        tokio::time::sleep(backoff.pause()).await;
                    }
                    Policy::Retry | Policy::WaitAndAlarm | Policy::DeadLetter | Policy::Stop => {
                        health.failed(Scope::Source, table, &shard.0, &fault);
                        tokio::time::sleep(backoff.pause()).await;
                    }
                }
            }
        }
    }
}

/// What a page holds.
struct Size {
    /// Bytes of its changes in memory, about.
    bytes: usize,
    /// When the source made the last of its records, in milliseconds since the epoch.
    newest_ms: Option<i64>,
}

impl Size {
    /// What one of its `records` takes in memory, about.
    fn record_bytes(&self, records: usize) -> Option<usize> {
        (records > 0).then(|| self.bytes / records)
    }
}

fn size(page: &Page) -> Size {
    let changes = page.records.iter().flatten();
    let newest = page.records.last().map(|record| match record {
        Ok(change) => change.created_ms,
        Err(bad) => bad.created_ms,
    });
    Size {
        bytes: changes.map(|change| change.bytes).sum(),
        // Zero where it is not known.
        newest_ms: newest.filter(|ms| *ms > 0),
    }
}

/// Has the new position stored. False if nobody is there any more to do it.
async fn is_stored(pages: &mpsc::Sender<Read>, found_ms: i64) -> bool {
    let (stored, told) = oneshot::channel();
    let read = Read {
        restart: Some(Restart { found_ms, stored }),
        ..Read::empty(false)
    };
    pages.send(read).await.is_ok() && told.await.is_ok()
}

/// What is lost, for certain.
enum Lost {
    /// Nobody can say.
    Maybe,
    /// The position, by a gap found at this moment.
    Position(i64),
    /// The shard itself: there is nothing more to read.
    Shard,
}

/// The position is lost. Records a gap where that is certain.
async fn lost_position(
    context: &TableContext,
    stream_arn: &str,
    shard: &ShardId,
    fault: &Fault,
) -> Lost {
    let health = &context.shared.health;
    let table = &context.table.name;
    if fault.class == Class::Trimmed {
        let found_ms = record_gap(context, GapReason::Trimmed, stream_arn, shard).await;
        return Lost::Position(found_ms);
    }
    // Not found: only a complete listing without the shard makes it certain; a stream or table
    // that is gone as a whole may come back.
    let listed = context.discovery.listing().await;
    if listed.shards.iter().any(|listed| listed.id == *shard) {
        health.failed(Scope::Source, table, &shard.0, fault);
        return Lost::Maybe;
    }
    record_gap(context, GapReason::ShardVanished, stream_arn, shard).await;
    Lost::Shard
}

/// Stores a gap row, and says when it was found. Reading does not go on before it is durable: a gap
/// that nobody sees is a silent loss.
async fn record_gap(
    context: &TableContext,
    reason: GapReason,
    stream_arn: &str,
    shard: &ShardId,
) -> i64 {
    let shared = &context.shared;
    let table = &context.table.name;
    let detail = format!("{}/{shard}", stream_label(stream_arn));
    let at = rfc3339(host_ms());
    let row = shard_key(shared.epoch, table, stream_arn, shard);
    let gap = GapRow::new(shared.epoch, table, reason, &detail, at);
    let gap = gap.found(shared.source.clock.now_ms());
    // What its owner has applied so far was made before what is lost.
    let applied_until = shared.proven_of_shard(&row);
    let gap = gap.applied_until(applied_until).awaiting(row);
    shared.store_gap(&gap, &shard.0).await.found_at
}
