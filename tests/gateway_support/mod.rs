//! What the gateway's own tests share: official SDK clients, a writer that knows what it wrote, a
//! walker of streams that shares no code with Farshore, and the checker that compares the two.

// Each test program uses a part of it.
#![allow(dead_code)]

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::{Duration, Instant};

use aws_config::BehaviorVersion;
use aws_config::retry::RetryConfig;
use aws_config::timeout::TimeoutConfig;
use aws_credential_types::Credentials;
use aws_sdk_dynamodb::types::{
    AttributeDefinition, AttributeValue, BillingMode, DeleteRequest, KeySchemaElement, KeyType,
    PutRequest, ScalarAttributeType, StreamSpecification, StreamViewType, WriteRequest,
};
use aws_sdk_dynamodbstreams::types::{Record, Shard, ShardIteratorType};
use farshore::embedded::gateway::{Gateway, Options};

pub type Dynamo = aws_sdk_dynamodb::Client;
pub type Streams = aws_sdk_dynamodbstreams::Client;

/// A gateway with the table `orders`, and its clients.
pub async fn started(options: Options) -> (Gateway, Dynamo, Streams, String) {
    let gateway = Gateway::start(options).await.unwrap();
    let (dynamo, streams) = clients(&gateway).await;
    let arn = table(&dynamo, "orders").await;
    (gateway, dynamo, streams, arn)
}

/// What a walk may take; far more than it needs, far less than a test may hang.
pub const PATIENCE: Duration = Duration::from_secs(120);

pub async fn config(gateway: &Gateway) -> aws_config::SdkConfig {
    aws_config::defaults(BehaviorVersion::latest())
        .region("us-east-1")
        .endpoint_url(gateway.endpoint_url())
        .credentials_provider(Credentials::for_tests())
        .retry_config(RetryConfig::disabled())
        .timeout_config(
            TimeoutConfig::builder()
                .operation_timeout(Duration::from_secs(10))
                .build(),
        )
        .load()
        .await
}

/// Clients that never retry, so that every fault is seen.
pub async fn clients(gateway: &Gateway) -> (Dynamo, Streams) {
    let config = config(gateway).await;
    (Dynamo::new(&config), Streams::new(&config))
}

pub async fn patient(gateway: &Gateway, timeout: Duration) -> Dynamo {
    let timeouts = TimeoutConfig::builder().operation_timeout(timeout).build();
    let config = config(gateway).await.into_builder();
    Dynamo::new(&config.timeout_config(timeouts).build())
}

pub fn s(text: &str) -> AttributeValue {
    AttributeValue::S(text.to_owned())
}

pub fn n(number: u64) -> AttributeValue {
    AttributeValue::N(number.to_string())
}

pub fn streaming(view: StreamViewType) -> StreamSpecification {
    StreamSpecification::builder()
        .stream_enabled(true)
        .stream_view_type(view)
        .build()
        .unwrap()
}

/// Makes a table with a partition key `pk` and a stream of both images; the stream's ARN.
pub async fn table(dynamo: &Dynamo, name: &str) -> String {
    let key = KeySchemaElement::builder()
        .attribute_name("pk")
        .key_type(KeyType::Hash);
    let attribute = AttributeDefinition::builder()
        .attribute_name("pk")
        .attribute_type(ScalarAttributeType::S);
    let made = dynamo
        .create_table()
        .table_name(name)
        .key_schema(key.build().unwrap())
        .attribute_definitions(attribute.build().unwrap())
        .billing_mode(BillingMode::PayPerRequest)
        .stream_specification(streaming(StreamViewType::NewAndOldImages))
        .send()
        .await
        .unwrap();
    made.table_description.unwrap().latest_stream_arn.unwrap()
}

pub async fn put(dynamo: &Dynamo, table: &str, pk: &str, version: u64) {
    let put = dynamo.put_item().table_name(table);
    put.item("pk", s(pk))
        .item("v", n(version))
        .send()
        .await
        .unwrap();
}

pub fn put_request(pk: &str, version: u64) -> WriteRequest {
    let put = PutRequest::builder()
        .item("pk", s(pk))
        .item("v", n(version));
    WriteRequest::builder()
        .put_request(put.build().unwrap())
        .build()
}

/// The versions each key had, in order; `None` for its deletion.
pub type History = BTreeMap<String, Vec<Option<u64>>>;

/// Writes rounds over `keys` keys named after `prefix`: puts, batches, updates, deletes and writes
/// that change nothing, all different by key and round. What it wrote is returned.
pub async fn write(dynamo: &Dynamo, table: &str, prefix: &str, keys: u64, rounds: u64) -> History {
    let mut history = History::new();
    for round in 1..=rounds {
        let mut batch = Vec::new();
        for key in 0..keys {
            let pk = format!("{prefix}-{key}");
            let versions = history.entry(pk.clone()).or_default();
            let exists = versions.last().is_some_and(Option::is_some);
            match (key * 7 + round * 3) % 10 {
                0 if exists => {
                    let delete = dynamo.delete_item().table_name(table);
                    delete.key("pk", s(&pk)).send().await.unwrap();
                    versions.push(None);
                }
                1 if exists => {
                    // Changes nothing: no record.
                    let version = versions.last().copied().flatten().unwrap();
                    put(dynamo, table, &pk, version).await;
                }
                2 | 3 => {
                    let update = dynamo.update_item().table_name(table).key("pk", s(&pk));
                    let update = update.update_expression("SET v = :v");
                    let update = update.expression_attribute_values(":v", n(round));
                    update.send().await.unwrap();
                    versions.push(Some(round));
                }
                4 if exists => {
                    let delete = DeleteRequest::builder().key("pk", s(&pk)).build().unwrap();
                    batch.push(WriteRequest::builder().delete_request(delete).build());
                    versions.push(None);
                }
                5 => {
                    put(dynamo, table, &pk, round).await;
                    versions.push(Some(round));
                }
                _ => {
                    batch.push(put_request(&pk, round));
                    versions.push(Some(round));
                }
            }
        }
        for chunk in batch.chunks(25) {
            let write = dynamo.batch_write_item();
            let answer = write
                .request_items(table, chunk.to_vec())
                .send()
                .await
                .unwrap();
            assert!(answer.unprocessed_items.unwrap_or_default().is_empty());
        }
    }
    history
}

/// A walk through a stream: what it found, in the order in which it was found, and where it is.
#[derive(Debug, Default)]
pub struct Walk {
    pub records: Vec<Record>,
    pub shards: HashMap<String, Shard>,
    pub finished: HashSet<String>,
    pub pages: usize,
    /// Pages that carried records and no next iterator.
    pub last_pages_with_records: usize,
    pub empty_pages: usize,
    iterators: HashMap<String, String>,
    /// How many listings lacked a parent that a child names.
    absent: HashMap<String, usize>,
}

/// A parent that so many listings lack is trimmed, not just missed.
const ABSENCES: usize = 2;

impl Walk {
    /// The history its records tell; panics where a record contradicts the one before it.
    pub fn history(&self) -> History {
        let mut history = History::new();
        for record in &self.records {
            let data = record.dynamodb().unwrap();
            let version = |image: &HashMap<String, _>| match image.get("v") {
                Some(aws_sdk_dynamodbstreams::types::AttributeValue::N(v)) => v.parse().unwrap(),
                other => panic!("a version like {other:?}"),
            };
            let pk = data.keys().unwrap()["pk"].as_s().unwrap().clone();
            let versions: &mut Vec<Option<u64>> = history.entry(pk).or_default();
            let before = versions.last().copied().flatten();
            assert_eq!(data.old_image().map(version), before, "{record:?}");
            let now = data.new_image().map(version);
            let event = match (before, now) {
                (None, Some(_)) => "INSERT",
                (Some(_), Some(_)) => "MODIFY",
                _ => "REMOVE",
            };
            assert_eq!(record.event_name().unwrap().as_str(), event);
            versions.push(now);
        }
        history
    }
}

/// All pages of DescribeStream.
pub async fn listing(streams: &Streams, arn: &str) -> Vec<Shard> {
    let (mut shards, mut after) = (Vec::new(), None);
    loop {
        let page = streams.describe_stream().stream_arn(arn);
        let page = page
            .set_exclusive_start_shard_id(after)
            .send()
            .await
            .unwrap();
        let description = page.stream_description.unwrap();
        shards.extend(description.shards.unwrap_or_default());
        after = description.last_evaluated_shard_id;
        if after.is_none() {
            return shards;
        }
    }
}

pub async fn iterator(
    streams: &Streams,
    arn: &str,
    shard: &str,
    kind: ShardIteratorType,
) -> String {
    let asked = streams.get_shard_iterator().stream_arn(arn).shard_id(shard);
    let answer = asked.shard_iterator_type(kind).send().await.unwrap();
    answer.shard_iterator.unwrap()
}

impl Walk {
    /// One round: a listing, and a page of every shard whose parent is finished.
    pub async fn round(&mut self, streams: &Streams, arn: &str) {
        for shard in listing(streams, arn).await {
            self.shards.insert(shard.shard_id.clone().unwrap(), shard);
        }
        let parents = self
            .shards
            .values()
            .filter_map(|shard| shard.parent_shard_id());
        let unknown: HashSet<String> = parents
            .filter(|parent| !self.shards.contains_key(*parent))
            .map(str::to_owned)
            .collect();
        for parent in unknown {
            *self.absent.entry(parent).or_default() += 1;
        }
        let mut ready: Vec<String> = Vec::new();
        for (id, shard) in &self.shards {
            let waits = shard.parent_shard_id().is_some_and(|parent| {
                let absences = self.absent.get(parent).copied().unwrap_or_default();
                let trimmed = !self.shards.contains_key(parent) && absences >= ABSENCES;
                !trimmed && !self.finished.contains(parent)
            });
            if !waits && !self.finished.contains(id) {
                ready.push(id.clone());
            }
        }
        ready.sort();
        for id in ready {
            let at = match self.iterators.remove(&id) {
                Some(at) => at,
                None => iterator(streams, arn, &id, ShardIteratorType::TrimHorizon).await,
            };
            let page = streams
                .get_records()
                .shard_iterator(at)
                .send()
                .await
                .unwrap();
            let records = page.records.unwrap_or_default();
            self.pages += 1;
            self.empty_pages += usize::from(records.is_empty());
            match page.next_shard_iterator {
                Some(next) => {
                    self.iterators.insert(id, next);
                }
                None => {
                    self.last_pages_with_records += usize::from(!records.is_empty());
                    self.finished.insert(id);
                }
            }
            self.records.extend(records);
        }
    }

    /// Goes on until it has found so many records, and a little further, to see that there are
    /// no more.
    pub async fn reach(&mut self, streams: &Streams, arn: &str, count: usize) {
        let (start, mut rest) = (Instant::now(), 3);
        while rest > 0 {
            let found = self.records.len();
            assert!(
                start.elapsed() < PATIENCE,
                "{found} records of {count}, {:?}",
                self.finished
            );
            self.round(streams, arn).await;
            if self.records.len() >= count {
                rest -= 1;
            }
        }
    }
}

/// Walks until as many records were found as a history holds.
pub async fn walk(streams: &Streams, arn: &str, expected: &History) -> Walk {
    let mut walk = Walk::default();
    walk.reach(streams, arn, changes(expected)).await;
    walk
}

/// How many records a history makes.
pub fn changes(history: &History) -> usize {
    history.values().map(Vec::len).sum()
}

/// A history without the keys that never changed.
pub fn tidy(history: History) -> History {
    history
        .into_iter()
        .filter(|(_, versions)| !versions.is_empty())
        .collect()
}

/// Sequence numbers as integers of any size: without leading zeros, by length, then by digits.
pub fn as_integer(number: &str) -> (usize, String) {
    let digits = number.trim_start_matches('0');
    (digits.len(), digits.to_owned())
}

pub fn sequence(record: &Record) -> String {
    record
        .dynamodb()
        .unwrap()
        .sequence_number()
        .unwrap()
        .to_owned()
}

/// The partition key of a record.
pub fn pk(record: &Record) -> String {
    record.dynamodb().unwrap().keys().unwrap()["pk"]
        .as_s()
        .unwrap()
        .clone()
}
