//! How much the gateway carries, so that it is never the bottleneck of a test: stream writes by
//! BatchWriteItem, and records read through it, with a client that does next to nothing itself.
//!
//! `cargo bench --bench gateway -- --seconds 5 --json FILE`

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use bytes::Bytes;
use clap::Parser;
use farshore::embedded::EmbeddedServer;
use farshore::embedded::gateway::{Gateway, Options};
use http_body_util::{BodyExt, Full};
use hyper::Request;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::json;

/// Keys that are written again and again, so that records carry both images.
const KEYS: u64 = 10_000;
const WRITERS: u64 = 8;
const READERS: usize = 4;
const SHARDS: usize = 8;

#[derive(Parser)]
struct Arguments {
    /// Seconds of writing, for each row.
    #[arg(long, default_value_t = 5)]
    seconds: u64,
    /// Also writes the rows as JSON to this file.
    #[arg(long)]
    json: Option<PathBuf>,
    /// What `cargo bench` passes to every bench.
    #[arg(long, hide = true)]
    bench: bool,
}

struct Row {
    what: &'static str,
    per_second: f64,
    target: Option<f64>,
}

type Error = Box<dyn std::error::Error + Send + Sync>;

#[tokio::main]
async fn main() -> Result<(), Error> {
    let arguments = Arguments::parse();
    let time = Duration::from_secs(arguments.seconds);
    let mut rows = Vec::new();

    let embedded = EmbeddedServer::start().await?;
    let direct = Wire::new(embedded.endpoint_url());
    direct.create_table().await?;
    rows.push(Row {
        what: "new items, embedded server alone",
        per_second: write(&direct, u64::MAX, time).await?,
        target: None,
    });
    drop(embedded);

    let options = Options::new(1).shards(SHARDS);
    let gateway = Gateway::start(options.rotate_every(Duration::from_secs(2))).await?;
    let wire = Wire::new(gateway.endpoint_url());
    wire.create_table().await?;
    rows.push(Row {
        what: "new items through the gateway",
        per_second: write(&wire, u64::MAX, time).await?,
        target: Some(20_000.0),
    });
    rows.push(Row {
        what: "overwritten items through the gateway",
        per_second: write(&wire, KEYS, time).await?,
        target: None,
    });
    let (records, megabytes) = read(&wire, &gateway).await?;
    rows.push(Row {
        what: "records read through the gateway",
        per_second: records,
        target: Some(150_000.0),
    });
    rows.push(Row {
        what: "megabytes read through the gateway",
        per_second: megabytes,
        target: None,
    });
    show(&rows);
    if let Some(file) = arguments.json {
        let rows: Vec<_> = rows
            .iter()
            .map(
                |row| json!({"what": row.what, "per_second": row.per_second, "target": row.target}),
            )
            .collect();
        std::fs::write(file, json!({ "version": 1, "rows": rows }).to_string())?;
    }
    Ok(())
}

fn show(rows: &[Row]) {
    println!("{:<40} {:>12} {:>10}", "", "per second", "target");
    for row in rows {
        let target = row
            .target
            .map_or(String::new(), |target| format!("{target:.0}"));
        println!("{:<40} {:>12.0} {:>10}", row.what, row.per_second, target);
    }
}

/// Writes batches of 25 over so many keys from several writers at once; items a second.
async fn write(wire: &Wire, keys: u64, time: Duration) -> Result<f64, Error> {
    let start = Instant::now();
    let versions = Arc::new(AtomicU64::new(0));
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..WRITERS {
        let (wire, versions) = (wire.clone(), Arc::clone(&versions));
        writers.spawn(async move {
            let mut written = 0;
            let mut key = keys / WRITERS * writer;
            while start.elapsed() < time {
                let version = versions.fetch_add(1, Relaxed);
                wire.call(
                    "DynamoDB_20120810.BatchWriteItem",
                    batch(key, keys, version),
                )
                .await?;
                key += 25;
                written += 25;
            }
            Ok::<u64, Error>(written)
        });
    }
    let mut written = 0;
    while let Some(done) = writers.join_next().await {
        written += done??;
    }
    Ok(written as f64 / start.elapsed().as_secs_f64())
}

fn batch(first: u64, keys: u64, version: u64) -> String {
    let text = "x".repeat(200);
    let puts: Vec<String> = (first..first + 25)
        .map(|key| {
            format!(
                r#"{{"PutRequest":{{"Item":{{"pk":{{"S":"key-{}"}},"version":{{"N":"{version}"}},"state":{{"S":"shipped"}},"text":{{"S":"{text}"}}}}}}}}"#,
                key % keys
            )
        })
        .collect();
    format!(r#"{{"RequestItems":{{"bench":[{}]}}}}"#, puts.join(","))
}

/// Reads all records of all shards; records and megabytes a second.
async fn read(wire: &Wire, gateway: &Gateway) -> Result<(f64, f64), Error> {
    let arn = gateway.stream_arn("bench").ok_or("no stream")?;
    let shards: Vec<String> = gateway.shards("bench").into_iter().map(|s| s.id).collect();
    let expected: usize = gateway.shards("bench").iter().map(|s| s.records).sum();
    let (records, bytes) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let next = Arc::new(AtomicU64::new(0));
    let shards = Arc::new(shards);
    let start = Instant::now();
    let mut readers = tokio::task::JoinSet::new();
    for _ in 0..READERS {
        let (wire, arn, shards) = (wire.clone(), arn.clone(), Arc::clone(&shards));
        let (records, bytes, next) = (Arc::clone(&records), Arc::clone(&bytes), Arc::clone(&next));
        readers.spawn(async move {
            while let Some(shard) = shards.get(next.fetch_add(1, Relaxed) as usize) {
                read_shard(&wire, &arn, shard, &records, &bytes).await?;
            }
            Ok::<(), Error>(())
        });
    }
    while let Some(done) = readers.join_next().await {
        done??;
    }
    let seconds = start.elapsed().as_secs_f64();
    let read = records.load(Relaxed);
    assert_eq!(read, expected as u64, "every record is read once");
    let megabytes = bytes.load(Relaxed) as f64 / 1e6;
    Ok((read as f64 / seconds, megabytes / seconds))
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Page {
    records: Vec<IgnoredAny>,
    next_shard_iterator: Option<String>,
}

async fn read_shard(
    wire: &Wire,
    arn: &str,
    shard: &str,
    records: &AtomicU64,
    bytes: &AtomicU64,
) -> Result<(), Error> {
    let asked = json!({"StreamArn": arn, "ShardId": shard, "ShardIteratorType": "TRIM_HORIZON"});
    let answer = wire
        .call(
            "DynamoDBStreams_20120810.GetShardIterator",
            asked.to_string(),
        )
        .await?;
    let answer: serde_json::Value = serde_json::from_slice(&answer)?;
    let mut at = answer["ShardIterator"].as_str().map(str::to_owned);
    while let Some(iterator) = at {
        let asked = json!({ "ShardIterator": iterator }).to_string();
        let answer = wire
            .call("DynamoDBStreams_20120810.GetRecords", asked)
            .await?;
        let page: Page = serde_json::from_slice(&answer)?;
        records.fetch_add(page.records.len() as u64, Relaxed);
        bytes.fetch_add(answer.len() as u64, Relaxed);
        // An empty page: an open shard is read to its end.
        at = page
            .next_shard_iterator
            .filter(|_| !page.records.is_empty());
    }
    Ok(())
}

/// A client of the bare protocol: its cost is not the SDK's.
#[derive(Clone)]
struct Wire {
    client: Client<HttpConnector, Full<Bytes>>,
    url: String,
}

impl Wire {
    fn new(url: String) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        let client = Client::builder(TokioExecutor::new()).build(connector);
        Self { client, url }
    }

    async fn call(&self, target: &str, body: String) -> Result<Bytes, Error> {
        let request = Request::post(&self.url)
            .header("content-type", "application/x-amz-json-1.0")
            .header("x-amz-target", target)
            .header("x-amz-date", "20260101T000000Z")
            .header(
                "authorization",
                "AWS4-HMAC-SHA256 Credential=bench/20260101/us-east-1/dynamodb/aws4_request, \
                 SignedHeaders=host;x-amz-date, Signature=0",
            )
            .body(Full::new(Bytes::from(body)))?;
        let response = self.client.request(request).await?;
        let status = response.status();
        let body = response.into_body().collect().await?.to_bytes();
        if !status.is_success() {
            return Err(format!("{status}: {}", String::from_utf8_lossy(&body)).into());
        }
        Ok(body)
    }

    async fn create_table(&self) -> Result<(), Error> {
        let table = json!({
            "TableName": "bench",
            "KeySchema": [{"AttributeName": "pk", "KeyType": "HASH"}],
            "AttributeDefinitions": [{"AttributeName": "pk", "AttributeType": "S"}],
            "BillingMode": "PAY_PER_REQUEST",
            "StreamSpecification": {
                "StreamEnabled": true,
                "StreamViewType": "NEW_AND_OLD_IMAGES",
            },
        });
        self.call("DynamoDB_20120810.CreateTable", table.to_string())
            .await?;
        Ok(())
    }
}
