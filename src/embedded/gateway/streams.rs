//! The four calls of the Streams API, served from the shards.

use serde::Deserialize;
use serde_json::{Value, json};

use super::iterator::Iterator;
use super::listing;
use super::options::LISTING_PAGE_MAX;
use super::protocol::{Answer, Failure};
use super::region::Region;
use super::rules::{PageFaults, Rule};
use super::sequence;
use super::shards::Shard;

/// AWS's bounds of a page of records.
const RECORDS_MAX: usize = 1_000;
const BYTES_MAX: usize = 1_024 * 1_024;

/// Answers one call. `listing` are the faults that concern listings, `page` what happens to a page.
/// Blocks as the database does.
pub(crate) fn serve(
    region: &Region,
    operation: &str,
    body: &[u8],
    faults: &[std::sync::Arc<Rule>],
    page: &PageFaults,
) -> Answer {
    let answered = match operation {
        "DescribeStream" => describe_stream(region, body, faults),
        "GetShardIterator" => get_shard_iterator(region, body),
        "GetRecords" => get_records(region, body, page),
        "ListStreams" => list_streams(region, body),
        _ => Err(Failure::new(400, "UnknownOperationException", "")),
    };
    answered.unwrap_or_else(|failure| failure.answer())
}

fn read<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, Failure> {
    let wrong = |error| Failure::new(400, "SerializationException", format!("{error}"));
    serde_json::from_slice(body).map_err(wrong)
}

/// A page size: what was asked for, or the maximum; a validation error outside its bounds.
fn limit(asked: Option<i64>, max: usize) -> Result<usize, Failure> {
    let Some(asked) = asked else {
        return Ok(max);
    };
    let fits = usize::try_from(asked)
        .ok()
        .filter(|n| (1..=max).contains(n));
    fits.ok_or_else(|| {
        let what = format!("Value '{asked}' at 'limit' failed to satisfy constraint");
        Failure::validation(format!("1 validation error detected: {what}"))
    })
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DescribeStream {
    stream_arn: String,
    limit: Option<i64>,
    exclusive_start_shard_id: Option<String>,
    shard_filter: Option<ShardFilter>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ShardFilter {
    r#type: Option<String>,
    shard_id: Option<String>,
}

fn describe_stream(
    region: &Region,
    body: &[u8],
    faults: &[std::sync::Arc<Rule>],
) -> Result<Answer, Failure> {
    let asked: DescribeStream = read(body)?;
    let stream = region.stream(&asked.stream_arn);
    let stream = stream
        .ok_or_else(|| Failure::not_found(&format!("Stream: {} not found", asked.stream_arn)))?;
    let limit = limit(asked.limit, LISTING_PAGE_MAX)?.min(region.options.describe_page);
    let children_of = match &asked.shard_filter {
        None => None,
        Some(filter) if filter.r#type.as_deref() == Some("CHILD_SHARDS") => {
            let missing = || Failure::validation("ShardFilter needs a ShardId");
            Some(filter.shard_id.clone().ok_or_else(missing)?)
        }
        Some(_) => return Err(Failure::validation("ShardFilter has an unknown Type")),
    };
    region.take_over(&stream);
    let now_ms = region.clock.now_ms();
    let state = stream.state();
    if let Some(parent) = &children_of
        && state.tree.get(parent).is_none()
    {
        return Err(Failure::not_found(&format!("Shard: {parent} not found")));
    }
    let page = listing::page(
        &state.tree,
        &listing::Query {
            after: asked.exclusive_start_shard_id.as_deref(),
            children_of: children_of.as_deref(),
            limit,
            now_ms,
        },
        faults,
    );
    let shards: Vec<Value> = page.shards.iter().map(|s| shard_json(s)).collect();
    let status = if state.disabled_ms.is_some() {
        "DISABLED"
    } else {
        "ENABLED"
    };
    // A schema that was read from the database is JSON.
    let schema: Value = serde_json::from_str(&stream.schema.json).unwrap_or_default();
    let mut description = json!({
        "StreamArn": stream.arn,
        "StreamLabel": stream.label,
        "StreamStatus": status,
        "StreamViewType": stream.view.name,
        "CreationRequestDateTime": stream.created_ms as f64 / 1e3,
        "TableName": stream.table,
        "KeySchema": schema,
        "Shards": shards,
    });
    if let Some(last) = page.last {
        description["LastEvaluatedShardId"] = Value::String(last);
    }
    let answer = json!({ "StreamDescription": description });
    Ok(Answer::ok(answer.to_string()))
}

fn shard_json(listed: &listing::Listed<'_>) -> Value {
    let shard: &Shard = listed.shard;
    let mut range = json!({ "StartingSequenceNumber": shard.starting });
    if let Some(ending) = shard.ending.as_deref().filter(|_| !listed.shown_open) {
        range["EndingSequenceNumber"] = Value::from(ending);
    }
    let mut json = json!({ "ShardId": shard.id, "SequenceNumberRange": range });
    if let Some(parent) = &shard.parent {
        json["ParentShardId"] = Value::from(parent.as_str());
    }
    json
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct GetShardIterator {
    stream_arn: String,
    shard_id: String,
    shard_iterator_type: String,
    sequence_number: Option<String>,
    timestamp: Option<f64>,
}

fn get_shard_iterator(region: &Region, body: &[u8]) -> Result<Answer, Failure> {
    let asked: GetShardIterator = read(body)?;
    let missing = || Failure::not_found("Shard does not exist");
    let stream = region.stream(&asked.stream_arn);
    let stream = stream
        .ok_or_else(|| Failure::not_found(&format!("Stream: {} not found", asked.stream_arn)))?;
    region.take_over(&stream);
    let now_us = region.clock.now_us();
    let state = stream.state();
    let shard = state.tree.get(&asked.shard_id).ok_or_else(missing)?;
    let position = match asked.shard_iterator_type.as_str() {
        "TRIM_HORIZON" => shard.log.oldest(),
        "LATEST" => shard.log.end(),
        "AT_SEQUENCE_NUMBER" => at_number(shard, asked.sequence_number.as_deref(), false)?,
        "AFTER_SEQUENCE_NUMBER" => at_number(shard, asked.sequence_number.as_deref(), true)?,
        "AT_TIMESTAMP" => {
            let needed = || Failure::validation("AT_TIMESTAMP needs a Timestamp");
            let at_us = (asked.timestamp.ok_or_else(needed)? * 1e6).round() as i64;
            if at_us > now_us {
                return Err(Failure::validation("Timestamp lies in the future"));
            }
            shard.log.position_at_time(at_us)
        }
        other => {
            let message = format!("Value '{other}' at 'shardIteratorType' is not known");
            return Err(Failure::validation(message));
        }
    };
    let iterator = Iterator {
        stream: asked.stream_arn,
        shard: asked.shard_id,
        position,
        issued_ms: now_us / 1_000,
    };
    let answer = json!({ "ShardIterator": iterator.encode() });
    Ok(Answer::ok(answer.to_string()))
}

/// The position of a sequence number, which must be between the shard's first and last one.
fn at_number(shard: &Shard, number: Option<&str>, after: bool) -> Result<u64, Failure> {
    use std::cmp::Ordering::{Greater, Less};
    let invalid = || Failure::validation("Invalid SequenceNumber for the shard");
    let number = number.ok_or_else(|| Failure::validation("SequenceNumber is missing"))?;
    if !sequence::is_well_formed(number) {
        return Err(Failure::validation(
            "1 validation error detected: Value at 'sequenceNumber' failed to satisfy constraint: \
             Member must have 21 to 40 digits",
        ));
    }
    // An open shard has given no number beyond its newest record's.
    let newest = shard.log.newest().map(|record| &*record.sequence);
    let last = shard.ending.as_deref().or(newest);
    let beyond = last.is_some_and(|last| sequence::compare(number, last) == Greater);
    if beyond || sequence::compare(number, &shard.starting) == Less {
        return Err(invalid());
    }
    shard.log.position(number, after).map_err(|_| trimmed())
}

fn trimmed() -> Failure {
    let message = "The operation attempted to read past the oldest stream record in a shard";
    Failure::new(400, "TrimmedDataAccessException", message)
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct GetRecords {
    shard_iterator: String,
    limit: Option<i64>,
}

fn get_records(region: &Region, body: &[u8], faults: &PageFaults) -> Result<Answer, Failure> {
    let asked: GetRecords = read(body)?;
    let iterator = Iterator::decode(&asked.shard_iterator);
    let iterator = iterator.ok_or_else(|| Failure::validation("Invalid ShardIterator"))?;
    let mut limit = limit(asked.limit, RECORDS_MAX)?;
    let life_ms = i64::try_from(region.options.iterator_life.as_millis()).unwrap_or(i64::MAX);
    if region.clock.now_ms() - iterator.issued_ms > life_ms {
        let message = "The shard iterator has expired";
        return Err(Failure::new(400, "ExpiredIteratorException", message));
    }
    let stream = region.stream(&iterator.stream);
    let stream = stream
        .ok_or_else(|| Failure::not_found(&format!("Stream: {} not found", iterator.stream)))?;
    region.take_over(&stream);
    let state = stream.state();
    let shard = state.tree.get(&iterator.shard);
    let shard = shard.ok_or_else(|| Failure::not_found("Shard does not exist"))?;
    if let Some(choice) = faults.short {
        limit = 1 + choice as usize % limit.max(1);
    }
    let page = shard.log.page(iterator.position, limit, BYTES_MAX);
    let mut page = page.map_err(|_| trimmed())?;
    if faults.empty && !page.records.is_empty() {
        page.records.clear();
        page.next = iterator.position;
    }
    let at_end = !shard.is_open() && page.next >= shard.log.end();
    let ended = at_end && (page.records.is_empty() || !faults.empty_last);
    let next = (!ended).then(|| Iterator {
        position: page.next,
        issued_ms: region.clock.now_ms(),
        ..iterator
    });
    let length: usize = page.records.iter().map(|r| r.json.len() + 1).sum();
    let mut answer = Vec::with_capacity(length + 512);
    answer.extend_from_slice(b"{\"Records\":[");
    for (n, record) in page.records.iter().enumerate() {
        if n > 0 {
            answer.push(b',');
        }
        answer.extend_from_slice(&record.json);
    }
    answer.push(b']');
    if let Some(next) = next {
        answer.extend_from_slice(b",\"NextShardIterator\":\"");
        answer.extend_from_slice(next.encode().as_bytes());
        answer.push(b'"');
    }
    answer.push(b'}');
    Ok(Answer::ok(answer))
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ListStreams {
    table_name: Option<String>,
    limit: Option<i64>,
    exclusive_start_stream_arn: Option<String>,
}

fn list_streams(region: &Region, body: &[u8]) -> Result<Answer, Failure> {
    let asked: ListStreams = read(body)?;
    let limit = limit(asked.limit, LISTING_PAGE_MAX)?;
    region.find_streams();
    let mut streams = region.streams();
    streams.retain(|stream| {
        let table = asked.table_name.as_deref();
        let table = table.is_none_or(|table| super::touched::table_name(table) == stream.table);
        let start = asked.exclusive_start_stream_arn.as_ref();
        table && start.is_none_or(|start| stream.arn > *start)
    });
    let more = streams.len() > limit;
    streams.truncate(limit);
    let listed = streams.iter().map(|stream| {
        json!({
            "StreamArn": stream.arn,
            "TableName": stream.table,
            "StreamLabel": stream.label,
        })
    });
    let mut answer = json!({ "Streams": listed.collect::<Vec<_>>() });
    if let Some(last) = streams.last().filter(|_| more) {
        answer["LastEvaluatedStreamArn"] = Value::from(last.arn.as_str());
    }
    Ok(Answer::ok(answer.to_string()))
}
