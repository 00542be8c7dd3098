//! What is in doubt is stored before the checkpoint passes it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::backoff::Backoff;
use crate::dynamo::clock::{host_ms, rfc3339};
use crate::error::Fault;
use crate::lease::doubts::{End, Pending, Range, grow};
use crate::lease::row::DoubtRow;
use crate::lease::table::Written;
use crate::observe::health::Scope;
use crate::observe::metrics;
use crate::run::context::TableContext;
use crate::stream::ShardId;
use crate::stream::reader::Position;
use crate::stream::sequence::SequenceNumber;

const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// What one shard has in doubt, and the row last stored for it.
#[derive(Default)]
pub struct ShardDoubts {
    pending: Pending,
    /// Before which moment all was applied when the first of what is pending was noticed.
    applied_until: Option<i64>,
    last: Option<(DoubtRow, Instant)>,
}

impl ShardDoubts {
    /// The records after `durable` up to `last` may take effect until `until_ms`. All that was made before
    /// `applied_until` of the source is applied.
    pub fn add(
        &mut self,
        durable: &Position,
        last: &SequenceNumber,
        until_ms: i64,
        applied_until: Option<i64>,
    ) {
        self.applied_until = match self.is_stored() {
            true => applied_until,
            false => self.applied_until.min(applied_until),
        };
        self.pending.add(durable, last, until_ms);
    }

    /// Whether nothing is in doubt that is not stored.
    pub fn is_stored(&self) -> bool {
        self.pending.range().is_none()
    }

    /// Stores what is in doubt. Tell [`stored`](Self::stored) what it returns.
    pub fn store(
        &self,
        context: &Arc<TableContext>,
        shard: &ShardId,
    ) -> impl Future<Output = Result<Option<(Range, DoubtRow)>, Fault>> + Send + use<> {
        let (context, shard) = (Arc::clone(context), shard.clone());
        let range = self.pending.range();
        // A row grows for as long as half of a late effect, so that a line that fails now and then
        // makes a few rows and not thousands, and each still comes to its end.
        let young = context.shared.config.leases.late_effect / 2;
        let last = self.last.as_ref();
        let last = last.filter(|(_, at)| at.elapsed() < young);
        let last = last.map(|(row, _)| row.clone());
        let applied_until = self.applied_until;
        async move {
            match range {
                None => Ok(None),
                Some(range) => store_range(&context, &shard, (&range, applied_until), last)
                    .await
                    .map(|row| Some((range, row))),
            }
        }
    }

    /// This was stored.
    pub fn stored(&mut self, stored: Option<(Range, DoubtRow)>) {
        if let Some((range, row)) = stored {
            self.pending.stored(&range);
            let grown = self
                .last
                .take()
                .filter(|(last, _)| last.lease_key == row.lease_key);
            let at = grown.map_or_else(Instant::now, |(_, at)| at);
            self.last = Some((row, at));
        }
    }
}

/// Stores a range in doubt, in `last` where that can still grow.
async fn store_range(
    context: &TableContext,
    shard: &ShardId,
    (range, applied_until): (&Range, Option<i64>),
    last: Option<DoubtRow>,
) -> Result<DoubtRow, Fault> {
    let shared = &context.shared;
    let table = &context.table.name;
    if let Some(mut row) = last {
        let known = row.lease_counter;
        row.applied_until = row.applied_until.min(applied_until);
        if grow(&mut row, range) && shared.state.replace(&row, known).await? == Written::Yes {
            return Ok(row);
        }
    }
    let mut row = DoubtRow::new(
        shared.epoch,
        table,
        &context.stream_arn,
        shard,
        range.cause,
        &range.from,
        range.until_ms,
        rfc3339(host_ms()),
    );
    match &range.to {
        End::Record(to) => row.to = Some(to.as_str().to_owned()),
        End::Time(ms) => row.to_time = Some(*ms),
    }
    row.applied_until = applied_until;
    shared.state.create(&row).await?;
    metrics::doubted(table, range.cause);
    tracing::warn!(
        table,
        shard = %shard,
        cause = range.cause.label(),
        from = row.from,
        to = row.to,
        until = rfc3339(range.until_ms),
        "in doubt: writes may still take effect; the keys are repaired afterwards"
    );
    shared.rescan.notify_one();
    Ok(row)
}

/// Stores what the owner before left in doubt, however long it takes. All that was made before
/// `applied_until` of the source is applied.
pub async fn store_inherited(
    context: &TableContext,
    shard: &ShardId,
    range: &Range,
    applied_until: Option<i64>,
) {
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    let health = &context.shared.health;
    let table = &context.table.name;
    while let Err(fault) = store_range(context, shard, (range, applied_until), None).await {
        health.failed(Scope::State, table, &shard.0, &fault);
        tokio::time::sleep(backoff.pause()).await;
    }
    health.succeeded(Scope::State, table, &shard.0);
}
