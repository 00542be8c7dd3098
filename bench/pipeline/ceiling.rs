//! What the SDK itself can do: the same calls with no logic around them. Each shard reads the next page while
//! the last one is written, in batches of 25, so many at once; nothing is kept, checked or counted.

use std::collections::HashMap;

use aws_sdk_dynamodb::types::{AttributeValue, PutRequest, WriteRequest};
use aws_sdk_dynamodbstreams::types::{AttributeValue as StreamValue, Record, ShardIteratorType};
use futures::stream::{StreamExt, TryStreamExt};
use tokio::task::JoinSet;

use crate::load::Load;
use crate::{Error, TARGET_TABLE};

/// The service takes no more.
const BATCH: usize = 25;

/// Replays the whole load; `concurrency` batches at once for each shard.
pub async fn replay(endpoint: &str, load: Load, concurrency: usize) -> Result<(), Error> {
    let sdk = aws_config::defaults(aws_config::BehaviorVersion::v2026_01_12())
        .region(aws_config::Region::new("us-east-1"))
        .endpoint_url(endpoint)
        .retry_config(aws_config::retry::RetryConfig::disabled())
        .load()
        .await;
    let streams = aws_sdk_dynamodbstreams::Client::new(&sdk);
    let tables = aws_sdk_dynamodb::Client::new(&sdk);
    let mut shards = JoinSet::new();
    for shard in 0..load.shards {
        let (streams, tables) = (streams.clone(), tables.clone());
        shards.spawn(async move {
            let got = streams
                .get_shard_iterator()
                .stream_arn("bench")
                .shard_id(format!("shardId-{shard:020}"))
                .shard_iterator_type(ShardIteratorType::TrimHorizon)
                .send()
                .await?;
            let mut iterator = got.shard_iterator;
            let (mut left, mut records) = (load.records, Vec::new());
            while left > 0 || !records.is_empty() {
                let reads = async {
                    if left == 0 {
                        return Ok::<_, Error>((None, Vec::new()));
                    }
                    let page = streams
                        .get_records()
                        .set_shard_iterator(iterator)
                        .limit(1_000)
                        .send()
                        .await?;
                    Ok((page.next_shard_iterator, page.records.unwrap_or_default()))
                };
                let writes = write(&tables, records, concurrency);
                let (page, ()) = tokio::try_join!(reads, writes)?;
                iterator = page.0;
                records = page.1;
                left = left.saturating_sub(records.len() as u64);
            }
            Ok::<(), Error>(())
        });
    }
    while let Some(ended) = shards.join_next().await {
        ended??;
    }
    Ok(())
}

async fn write(
    tables: &aws_sdk_dynamodb::Client,
    records: Vec<Record>,
    concurrency: usize,
) -> Result<(), Error> {
    let mut images = records
        .into_iter()
        .filter_map(|record| record.dynamodb?.new_image)
        .peekable();
    let batches = std::iter::from_fn(|| {
        images.peek()?;
        Some(images.by_ref().take(BATCH).collect::<Vec<_>>())
    });
    futures::stream::iter(batches)
        .map(|batch| async move {
            let mut requests = Vec::with_capacity(BATCH);
            for image in batch {
                let item = item_from_stream(image).ok_or("an unknown type")?;
                let put = PutRequest::builder().set_item(Some(item)).build()?;
                requests.push(WriteRequest::builder().put_request(put).build());
            }
            let call = tables.batch_write_item();
            call.request_items(TARGET_TABLE, requests).send().await?;
            Ok::<(), Error>(())
        })
        .buffer_unordered(concurrency)
        .try_collect()
        .await
}

/// Moves an item from the types of the one client to those of the other; `None` where a type is unknown.
pub fn item_from_stream(
    item: HashMap<String, StreamValue>,
) -> Option<HashMap<String, AttributeValue>> {
    // Collecting options knows no size, and would grow the map step by step.
    let mut moved = HashMap::with_capacity(item.len());
    for (name, value) in item {
        moved.insert(name, from_stream(value)?);
    }
    Some(moved)
}

fn from_stream(value: StreamValue) -> Option<AttributeValue> {
    Some(match value {
        StreamValue::S(text) => AttributeValue::S(text),
        StreamValue::N(number) => AttributeValue::N(number),
        // Both blobs are the same type of aws-smithy-types.
        StreamValue::B(bytes) => AttributeValue::B(bytes),
        StreamValue::Bool(flag) => AttributeValue::Bool(flag),
        StreamValue::Null(flag) => AttributeValue::Null(flag),
        StreamValue::Ss(set) => AttributeValue::Ss(set),
        StreamValue::Ns(set) => AttributeValue::Ns(set),
        StreamValue::Bs(set) => AttributeValue::Bs(set),
        StreamValue::L(list) => {
            AttributeValue::L(list.into_iter().map(from_stream).collect::<Option<_>>()?)
        }
        StreamValue::M(map) => AttributeValue::M(item_from_stream(map)?),
        _ => return None,
    })
}
