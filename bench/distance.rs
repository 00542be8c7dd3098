//! One shard across an ocean: how late changes arrive under a steady load, and how fast a backlog is caught up
//! with, where every call takes 80 ms.
//!
//! `cargo bench --bench distance -- --json FILE`
//!
//! Two embedded regions, each behind a gateway that adds the round trip to every call of the worker's: to its
//! reads of the stream, to its writes and to its leases. The real worker runs beside them at default settings.
//! The bench writes to the source itself, next to its database, and each item carries in its key the millisecond
//! at which it was sent. The replica's gateway notes when its database had carried out each write: the lag is
//! from the one to the other, by one clock.
//!
//! The load comes first. Then the worker is stopped, a backlog is written, and it is started again, as after an
//! outage: the rate is from its first read of the shard to the last item.

#[path = "reconcile/process.rs"]
#[allow(dead_code, reason = "its process does not end by itself")]
mod process;

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::types::{
    AttributeDefinition, AttributeValue, BillingMode, KeySchemaElement, KeyType, PutRequest,
    ScalarAttributeType, StreamSpecification, StreamViewType, WriteRequest,
};
use clap::Parser;
use farshore::embedded::gateway::{Call, Gateway, Options};
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use process::{Running, farshore};

type Error = Box<dyn std::error::Error + Send + Sync>;

const TABLE: &str = "bench";
const REPLICA: &str = "bench-replica";
const SOURCE: &str = "us-east-1";
const TARGET: &str = "us-west-2";
/// Nothing takes longer.
const PATIENCE: Duration = Duration::from_secs(120);
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// The load's first seconds are not judged: the worker still reads at the pace of an idle shard.
const SETTLING: Duration = Duration::from_secs(2);
/// Puts of the load under way at once: more says that the source itself is slow.
const PUTS_MAX: usize = 64;
const BATCH: u64 = 25;
const WRITERS: u64 = 4;

/// Records a second that one shard should reach in catch-up.
const CATCH_UP_MIN: f64 = 5_000.0;
/// And how late changes may be under load, in milliseconds.
const LAG_P50_MAX: i64 = 600;
const LAG_P99_MAX: i64 = 1_500;

#[derive(Parser)]
struct Arguments {
    /// Milliseconds that each call takes.
    #[arg(long, default_value_t = 80)]
    round_trip_ms: u64,
    /// Writes a second, for the lag.
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u64).range(1..=1_000))]
    writes: u64,
    /// Seconds of them.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(3..))]
    seconds: u64,
    /// Records of the backlog.
    #[arg(long, default_value_t = 60_000, value_parser = clap::value_parser!(u64).range(1..))]
    backlog: u64,
    /// Bytes of an item, about.
    #[arg(long, default_value_t = 1_000)]
    item_bytes: usize,
    /// Also writes the figures as JSON to this file.
    #[arg(long)]
    json: Option<PathBuf>,
    /// What `cargo bench` passes to every bench.
    #[arg(long, hide = true)]
    bench: bool,
}

#[tokio::main]
async fn main() -> Result<(), Error> {
    let arguments = Arguments::parse();
    let temp = tempfile::tempdir()?;
    let ocean = Ocean::start(temp.path(), &arguments).await?;
    let worker = ocean.start_worker()?;
    let lag = ocean.load(&arguments).await?;
    stop(worker)?;
    let catch_up = ocean.catch_up(&arguments).await?;
    println!(
        "one shard, items of {} bytes, {} ms a round trip",
        arguments.item_bytes, arguments.round_trip_ms
    );
    println!("{:<46} {:>10} {:>10}", "", "", "target");
    show(
        "catch-up of a backlog, records/s",
        catch_up,
        CATCH_UP_MIN,
        catch_up < CATCH_UP_MIN,
    );
    let rows = [
        ("lag p50", 50, Some(LAG_P50_MAX)),
        ("lag p90", 90, None),
        ("lag p99", 99, Some(LAG_P99_MAX)),
        ("lag at most", 100, None),
    ];
    for (what, percent, target) in rows {
        let lag = percentile(&lag, percent);
        let what = format!("{what} at {} writes/s, ms", arguments.writes);
        match target {
            Some(target) => show(&what, lag as f64, target as f64, lag > target),
            None => println!("{what:<46} {lag:>10}"),
        }
    }
    if let Some(file) = &arguments.json {
        let figures = json!({
            "version": 1,
            "round_trip_ms": arguments.round_trip_ms,
            "item_bytes": arguments.item_bytes,
            "catch_up": {"records": arguments.backlog, "records_per_second": catch_up, "target": CATCH_UP_MIN},
            "lag": {
                "writes_per_second": arguments.writes,
                "writes_judged": lag.len(),
                "p50_ms": percentile(&lag, 50),
                "p90_ms": percentile(&lag, 90),
                "p99_ms": percentile(&lag, 99),
                "max_ms": percentile(&lag, 100),
                "p50_target_ms": LAG_P50_MAX,
                "p99_target_ms": LAG_P99_MAX,
            },
        });
        std::fs::write(file, figures.to_string())?;
    }
    Ok(())
}

fn show(what: &str, figure: f64, target: f64, is_missed: bool) {
    let missed = if is_missed { "!" } else { " " };
    println!("{what:<46} {figure:>10.0}{missed} {target:>9.0}");
}

/// Of sorted figures.
fn percentile(sorted: &[i64], percent: usize) -> i64 {
    let last = sorted.len().saturating_sub(1);
    sorted.get(last * percent / 100).copied().unwrap_or(0)
}

fn now_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_millis() as i64)
}

/// Asks a worker to end, and waits until it has.
fn stop(mut worker: Running) -> Result<(), Error> {
    let id = rustix::process::Pid::from_child(&worker.0);
    rustix::process::kill_process(id, rustix::process::Signal::TERM)?;
    let status = worker.0.wait()?;
    match status.success() {
        true => Ok(()),
        false => Err(format!("the worker ended with {status}").into()),
    }
}

/// Both regions, and what is between them.
struct Ocean {
    source: Gateway,
    target: Gateway,
    /// Next to the source's database.
    writer: Client,
    config: PathBuf,
    log: PathBuf,
    /// When the replica's gateway began to count, in milliseconds since the epoch.
    target_began_ms: i64,
    item_bytes: usize,
}

impl Ocean {
    async fn start(directory: &Path, arguments: &Arguments) -> Result<Self, Error> {
        let round_trip = Duration::from_millis(arguments.round_trip_ms);
        let source = Gateway::start(Options::new(1).region(SOURCE)).await?;
        let target = Gateway::start(Options::new(2).region(TARGET)).await?;
        let writer = client(&source.embedded().endpoint_url()).await;
        create_table(&writer).await?;
        let config = config(directory, &source.endpoint_url(), &target.endpoint_url())?;
        let provisioned = farshore(&config, &["provision", "--apply"]).output()?;
        if !provisioned.status.success() {
            return Err(String::from_utf8_lossy(&provisioned.stderr).into());
        }
        let target_began_ms = began_ms(&target).await?;
        source.set_round_trip(round_trip);
        target.set_round_trip(round_trip);
        Ok(Self {
            source,
            target,
            writer,
            config,
            log: directory.join("stderr"),
            target_began_ms,
            item_bytes: arguments.item_bytes,
        })
    }

    fn start_worker(&self) -> Result<Running, Error> {
        let mut command = farshore(&self.config, &["run"]);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(&self.log)?);
        Ok(Running(command.spawn()?))
    }

    /// Writes the load, and says how late each change was, sorted.
    async fn load(&self, arguments: &Arguments) -> Result<Vec<i64>, Error> {
        let first = self.put("first").await?;
        self.until_written(0, &HashSet::from([first])).await?;
        let mark = self.target.next_call();
        let all = arguments.writes * arguments.seconds;
        let mut beat = tokio::time::interval(Duration::from_secs(1) / arguments.writes as u32);
        let at_once = Arc::new(Semaphore::new(PUTS_MAX));
        let mut puts = JoinSet::new();
        let begun = now_ms();
        for number in 0..all {
            beat.tick().await;
            let permit = Arc::clone(&at_once).acquire_owned().await?;
            let (writer, item_bytes) = (self.writer.clone(), self.item_bytes);
            puts.spawn(async move {
                let put = put(&writer, &number.to_string(), item_bytes).await;
                drop(permit);
                put
            });
        }
        let mut keys = HashSet::new();
        while let Some(put) = puts.join_next().await {
            keys.insert(put??);
        }
        let took = (now_ms() - begun) as f64 / 1e3;
        if took > arguments.seconds as f64 * 1.1 {
            return Err(format!("the source itself took {took:.1} s for the load").into());
        }
        let written = self.until_written(mark, &keys).await?;
        let judged_from = begun + SETTLING.as_millis() as i64;
        let mut lag: Vec<i64> = written
            .into_iter()
            .map(|(key, effect_ms)| (sent_ms(&key), effect_ms))
            .filter(|(sent_ms, _)| *sent_ms >= judged_from)
            .map(|(sent_ms, effect_ms)| effect_ms - sent_ms)
            .collect();
        lag.sort_unstable();
        Ok(lag)
    }

    /// Writes the backlog, starts a worker, and says how many records a second it applied.
    async fn catch_up(&self, arguments: &Arguments) -> Result<f64, Error> {
        let mut writers = JoinSet::new();
        for part in 0..WRITERS {
            let (writer, item_bytes) = (self.writer.clone(), self.item_bytes);
            let numbers: Vec<u64> = (0..arguments.backlog)
                .filter(|number| number / BATCH % WRITERS == part)
                .collect();
            writers.spawn(async move { put_batches(&writer, &numbers, item_bytes).await });
        }
        let mut keys = HashSet::new();
        while let Some(written) = writers.join_next().await {
            keys.extend(written??);
        }
        let (read, wrote) = (self.source.next_call(), self.target.next_call());
        let worker = self.start_worker()?;
        let written = self.until_written(wrote, &keys).await?;
        let reads = self
            .source
            .calls_where(|call| call.number >= read && call.operation == "GetRecords");
        let first = reads.first().ok_or("the shard was never read")?;
        let ended = written.values().max().ok_or("nothing was written")?;
        // Both gateways count from their own start.
        let source_began_ms = began_ms(&self.source).await?;
        let took = ended - source_began_ms - first.arrived.as_millis() as i64;
        drop(worker);
        Ok(keys.len() as f64 * 1e3 / took.max(1) as f64)
    }

    async fn put(&self, name: &str) -> Result<String, Error> {
        put(&self.writer, name, self.item_bytes).await
    }

    /// Waits until all of `keys` were written to the replica by calls from `mark` on. Says when each was
    /// first, in milliseconds since the epoch.
    async fn until_written(
        &self,
        mark: u64,
        keys: &HashSet<String>,
    ) -> Result<HashMap<String, i64>, Error> {
        let begun = Instant::now();
        let mut from = mark;
        let mut written = HashMap::new();
        loop {
            // Older calls may still be under way: looked at again.
            let calls = self
                .target
                .calls_where(|call| call.number >= from && writes(call));
            let mut pending = self.target.next_call();
            for call in &calls {
                match call.effect {
                    Some(effect) => self.note(call, effect, &mut written),
                    None => pending = pending.min(call.number),
                }
            }
            from = pending;
            if keys.iter().all(|key| written.contains_key(key)) {
                return Ok(written);
            }
            if begun.elapsed() > PATIENCE {
                let log = std::fs::read_to_string(&self.log).unwrap_or_default();
                let last: Vec<&str> = log.lines().rev().take(20).collect();
                let (have, all) = (written.len(), keys.len());
                return Err(format!("{have} of {all} were written:\n{}", last.join("\n")).into());
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    fn note(&self, call: &Call, effect: Duration, written: &mut HashMap<String, i64>) {
        let effect_ms = self.target_began_ms + effect.as_millis() as i64;
        for key in &call.keys {
            let json: Value = serde_json::from_str(&key.json).unwrap_or_default();
            if let Some(id) = json["id"]["S"].as_str() {
                written.entry(id.to_owned()).or_insert(effect_ms);
            }
        }
    }
}

fn writes(call: &Call) -> bool {
    matches!(call.operation.as_str(), "BatchWriteItem" | "PutItem")
        && call.tables.iter().any(|table| table == REPLICA)
}

/// When `gateway` began to count, in milliseconds since the epoch: by a call that it notes.
async fn began_ms(gateway: &Gateway) -> Result<i64, Error> {
    let client = client(&gateway.endpoint_url()).await;
    // The second call has its connection.
    client.list_tables().send().await?;
    let mark = gateway.next_call();
    let now_ms = now_ms();
    client.list_tables().send().await?;
    let calls = gateway.calls_where(|call| call.number >= mark && call.operation == "ListTables");
    let call = calls.last().ok_or("the gateway did not note a call")?;
    Ok(now_ms - call.arrived.as_millis() as i64)
}

/// The millisecond that a key carries.
fn sent_ms(key: &str) -> i64 {
    let sent = key.rsplit('@').next().unwrap_or("");
    sent.parse().unwrap_or(0)
}

fn item(name: &str, item_bytes: usize) -> (String, HashMap<String, AttributeValue>) {
    let key = format!("{name}@{}", now_ms());
    let payload = "x".repeat(item_bytes.saturating_sub(key.len() + 10));
    let item = HashMap::from([
        ("id".to_owned(), AttributeValue::S(key.clone())),
        ("payload".to_owned(), AttributeValue::S(payload)),
    ]);
    (key, item)
}

/// Puts one item, whose key tells when; returns that key.
async fn put(writer: &Client, name: &str, item_bytes: usize) -> Result<String, Error> {
    let (key, item) = item(name, item_bytes);
    let call = writer.put_item().table_name(TABLE).set_item(Some(item));
    call.send().await?;
    Ok(key)
}

async fn put_batches(
    writer: &Client,
    numbers: &[u64],
    item_bytes: usize,
) -> Result<Vec<String>, Error> {
    let mut keys = Vec::with_capacity(numbers.len());
    for numbers in numbers.chunks(BATCH as usize) {
        let mut requests = Vec::with_capacity(numbers.len());
        for number in numbers {
            let (key, item) = item(&format!("backlog-{number}"), item_bytes);
            let put = PutRequest::builder().set_item(Some(item)).build()?;
            requests.push(WriteRequest::builder().put_request(put).build());
            keys.push(key);
        }
        let call = writer.batch_write_item().request_items(TABLE, requests);
        let answer = call.send().await?;
        if answer
            .unprocessed_items
            .is_some_and(|left| !left.is_empty())
        {
            return Err("the source left items of the backlog unprocessed".into());
        }
    }
    Ok(keys)
}

async fn client(endpoint: &str) -> Client {
    let credentials = aws_credential_types::Credentials::new("bench", "bench", None, None, "bench");
    let sdk = aws_config::defaults(aws_config::BehaviorVersion::v2026_01_12())
        .region(aws_config::Region::new(SOURCE))
        .credentials_provider(credentials)
        .endpoint_url(endpoint)
        .load()
        .await;
    Client::new(&sdk)
}

async fn create_table(client: &Client) -> Result<(), Error> {
    let key = AttributeDefinition::builder()
        .attribute_name("id")
        .attribute_type(ScalarAttributeType::S);
    let hash = KeySchemaElement::builder()
        .attribute_name("id")
        .key_type(KeyType::Hash);
    let stream = StreamSpecification::builder()
        .stream_enabled(true)
        .stream_view_type(StreamViewType::NewAndOldImages);
    client
        .create_table()
        .table_name(TABLE)
        .attribute_definitions(key.build()?)
        .key_schema(hash.build()?)
        .billing_mode(BillingMode::PayPerRequest)
        .stream_specification(stream.build()?)
        .send()
        .await?;
    Ok(())
}

fn config(directory: &Path, source: &str, target: &str) -> Result<PathBuf, Error> {
    let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let letters = directory.join("letters");
    let text = format!(
        r#"group = "bench"
active = "{SOURCE}"
here = "{TARGET}"
[regions.{SOURCE}]
endpoint_url = "{source}"
[regions.{TARGET}]
endpoint_url = "{target}"
[[tables]]
name = "{TABLE}"
names = {{ {TARGET} = "{REPLICA}" }}
[writes]
units_per_second = 0
[dead_letters]
directory = {letters:?}
[worker]
listen = "{port}"
"#
    );
    let file = directory.join("farshore.toml");
    std::fs::write(&file, text)?;
    Ok(file)
}
