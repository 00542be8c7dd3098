//! Taking real records over from the database's own stream into the shards.

use dynoxide::actions::get_records::{GetRecordsRequest, Record, StreamRecord};
use dynoxide::actions::get_shard_iterator::{
    GetShardIteratorRequest, decode_shard_iterator, encode_shard_iterator,
};
use dynoxide::types::item_size;
use dynoxide::{Database, DynoxideError};
use serde::Serialize;

use super::keys::{partition_hash, same_item};
use super::stream::Stream;

/// The database's public numbers are its stored ones, microseconds since 1970, plus this.
const STORED_OFFSET: u128 = 100_000_000_000_000_000_000;
const PAGE: usize = 1_000;
/// Pages taken over at a time: more writes than this wait for the next turn.
const PAGES_MAX: usize = 1_000;

/// Takes over what was written since the last time, so that a write that was answered before this
/// call can be read after it. `ahead_us` is how far the gateway's clock is ahead. Blocks for as long
/// as the database does.
///
/// # Errors
/// What the database said, above all that the table is gone.
pub(crate) fn take_over(
    database: &Database,
    region: &str,
    stream: &Stream,
    ahead_us: i64,
) -> Result<(), DynoxideError> {
    let mut taken = stream.taken();
    if !stream.is_enabled() {
        return Ok(());
    }
    let shard = dynoxide::streams::shard_id(&stream.table);
    for _ in 0..PAGES_MAX {
        let records = database
            .get_records(GetRecordsRequest {
                shard_iterator: encode_shard_iterator(&stream.table, &shard, *taken),
                limit: Some(PAGE),
            })?
            .records;
        let last = records.len() < PAGE;
        for record in records {
            let Some(stored) = stored_number(&record.dynamodb.sequence_number) else {
                tracing::error!(
                    table = stream.table,
                    "a record without a number was left out"
                );
                continue;
            };
            *taken = (*taken).max(stored);
            store(stream, region, record, stored + ahead_us);
        }
        if last {
            break;
        }
    }
    Ok(())
}

/// The number of the newest record the database holds for a table.
pub(crate) fn newest_number(database: &Database, table: &str, arn: &str) -> i64 {
    let request = GetShardIteratorRequest {
        stream_arn: arn.to_owned(),
        shard_id: dynoxide::streams::shard_id(table),
        shard_iterator_type: "LATEST".to_owned(),
        sequence_number: None,
    };
    let iterator = database.get_shard_iterator(request).ok();
    let iterator = iterator.and_then(|answer| answer.shard_iterator);
    iterator
        .and_then(|iterator| decode_shard_iterator(&iterator))
        .map_or(0, |(_, _, position)| position)
}

fn stored_number(public: &str) -> Option<i64> {
    let public: u128 = public.parse().ok()?;
    i64::try_from(public.checked_sub(STORED_OFFSET)?).ok()
}

fn store(stream: &Stream, region: &str, mut record: Record, created_us: i64) {
    let inner = &mut record.dynamodb;
    if let (Some(old), Some(new)) = (&inner.old_image, &inner.new_image)
        && same_item(old, new)
    {
        // AWS writes no record for a write that changes nothing; the database does.
        return;
    }
    let hash = inner
        .keys
        .get(&stream.schema.partition)
        .map_or(0, partition_hash);
    if !stream.view.old {
        inner.old_image = None;
    }
    if !stream.view.new {
        inner.new_image = None;
    }
    let images = [&inner.new_image, &inner.old_image];
    let images: usize = images.into_iter().flatten().map(item_size).sum();
    inner.size_bytes = i64::try_from(item_size(&inner.keys) + images).unwrap_or(i64::MAX);
    inner.stream_view_type = stream.view.name.to_owned();
    // AWS rounds it down to the second.
    inner.approximate_creation_date_time = (created_us / 1_000_000) as f64;
    let mut state = stream.state();
    state.tree.append(hash, created_us, |sequence| {
        record.dynamodb.sequence_number = sequence.to_owned();
        // A record is made of strings and maps with string keys: serialising it cannot fail.
        serde_json::to_vec(&Served::from(&record, region)).unwrap_or_default()
    });
}

/// A record with the names of the Streams API, which spells an identity's fields with capitals.
#[derive(Serialize)]
struct Served<'a> {
    #[serde(rename = "eventID")]
    event_id: &'a str,
    #[serde(rename = "eventName")]
    event_name: &'a str,
    #[serde(rename = "eventVersion")]
    event_version: &'a str,
    #[serde(rename = "eventSource")]
    event_source: &'a str,
    #[serde(rename = "awsRegion")]
    region: &'a str,
    dynamodb: &'a StreamRecord,
    #[serde(rename = "userIdentity", skip_serializing_if = "Option::is_none")]
    identity: Option<Identity<'a>>,
}

#[derive(Serialize)]
struct Identity<'a> {
    #[serde(rename = "Type")]
    kind: &'a str,
    #[serde(rename = "PrincipalId")]
    principal: &'a str,
}

impl<'a> Served<'a> {
    fn from(record: &'a Record, region: &'a str) -> Self {
        let identity = record.user_identity.as_ref().map(|identity| Identity {
            kind: &identity.identity_type,
            principal: &identity.principal_id,
        });
        Self {
            event_id: &record.event_id,
            event_name: &record.event_name,
            event_version: &record.event_version,
            event_source: &record.event_source,
            region,
            dynamodb: &record.dynamodb,
            identity,
        }
    }
}
