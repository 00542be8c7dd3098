//! The reading half of a shard: a task that stays a bounded number of pages ahead.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;

use super::context::TableContext;
use crate::backoff::Backoff;
use crate::dynamo::clock::{host_ms, rfc3339};
use crate::error::{Class, Fault, Policy};
use crate::lease::row::{GapReason, GapRow, UNREAD_LIMIT_MS};
use crate::mutation::trouble;
use crate::observe::health::Scope;
use crate::observe::metrics;
use crate::stream::reader::{Page, Position, ShardReader};
use crate::stream::{ShardId, stream_label};

/// A page with this many records was cut by size or count: more is waiting.
const FULL_PAGE_RECORDS: usize = 200;
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
    /// A moment of the source, in milliseconds, up to which the shard was seen to hold nothing
    /// that was not read.
    pub caught_up_ms: Option<i64>,
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
    loop {
        trouble("reader").await;
        let asked_ms = source.clock.now_ms();
        // A position after a record is refused once it is trimmed; a start by name or time silently
        // begins at what is left. Unread for a day, it may have lost records.
        if !matches!(reader.position(), Position::After(_))
            && asked_ms - proven_ms > UNREAD_LIMIT_MS
        {
            record_gap(&context, GapReason::Trimmed, &stream_arn, &shard).await;
            proven_ms = asked_ms;
        }
        match reader.next().await {
            Ok(page) => {
                health.succeeded(Scope::Source, table, &shard.0);
                backoff.reset();
                expired = 0;
                let records = page.records.len();
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
                if pages.send(Read { page, caught_up_ms }).await.is_err() || end {
                    return;
                }
                pause = match records {
                    0 => (pause * 2).clamp(worker.poll_interval, worker.idle_interval),
                    _ => worker.poll_interval,
                };
                if records < FULL_PAGE_RECORDS {
                    tokio::time::sleep(pause.min(worker.idle_interval)).await;
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
                        if lost_position(&context, &mut reader, &stream_arn, &shard, &fault).await {
                            let page = Page {
                                records: Vec::new(),
                                end: true,
                            };
                            let caught_up_ms = None;
                            // A receiver that is gone has no use for it.
                            let _ = pages.send(Read { page, caught_up_ms }).await;
                            return;
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

/// The position is lost. Records a gap where that is certain. Returns whether the shard itself is
/// gone, so that there is nothing more to read.
async fn lost_position(
    context: &TableContext,
    reader: &mut ShardReader,
    stream_arn: &str,
    shard: &ShardId,
    fault: &Fault,
) -> bool {
    let health = &context.shared.health;
    let table = &context.table.name;
    if fault.class == Class::Trimmed {
        record_gap(context, GapReason::Trimmed, stream_arn, shard).await;
        reader.restart();
        return false;
    }
    // Not found: only a complete listing without the shard makes it certain; a stream or table
    // that is gone as a whole may come back.
    let listed = context.discovery.listing().await;
    if listed.shards.iter().any(|listed| listed.id == *shard) {
        health.failed(Scope::Source, table, &shard.0, fault);
        return false;
    }
    record_gap(context, GapReason::ShardVanished, stream_arn, shard).await;
    true
}

/// Stores a gap row. Reading does not go on before it is durable: a gap that nobody sees is a
/// silent loss.
async fn record_gap(context: &TableContext, reason: GapReason, stream_arn: &str, shard: &ShardId) {
    let shared = &context.shared;
    let detail = format!("{}/{shard}", stream_label(stream_arn));
    let at = rfc3339(host_ms());
    let gap = GapRow::new(shared.epoch, &context.table.name, reason, &detail, at);
    shared.store_gap(&gap, &shard.0).await;
}
