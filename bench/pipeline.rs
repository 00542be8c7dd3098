//! How much of what the SDK can do is left once Farshore does it: the real worker beside a bare loop of the
//! same calls, both against an endpoint that costs next to nothing, each on one core.
//!
//! `cargo bench --bench pipeline -- --json FILE`
//!
//! The endpoint ([`null`]) gives out pages of real shape and takes every batch without looking at it; it runs
//! on another core. It counts the calls, and the time from the first page to the last item, so that what it
//! takes to start is not measured. The ceiling ([`ceiling`]) reads, converts and writes, and does nothing else:
//! no leases, no order, no checkpoints. `ratio_to_ceiling` is source records a second of the one by those of
//! the other, in one run. Machines are noisy: both take turns for some rounds, and the round with the median
//! ratio is shown.

#[path = "pipeline/ceiling.rs"]
mod ceiling;
#[path = "pipeline/load.rs"]
mod load;
#[path = "pipeline/null.rs"]
mod null;
#[path = "reconcile/process.rs"]
#[allow(dead_code, reason = "its processes do not end by themselves")]
mod process;

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use aws_sdk_dynamodb::types::{
    AttributeDefinition, BillingMode, KeySchemaElement, KeyType, ScalarAttributeType,
    StreamSpecification, StreamViewType,
};
use clap::{Parser, Subcommand};
use http_body_util::{BodyExt, Empty};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use serde_json::json;

use load::{Keys, Load};
use null::{Address, Seen};
use process::{Running, farshore, peak_bytes_of, ticks_of};

type Error = Box<dyn std::error::Error + Send + Sync>;

pub const SOURCE_TABLE: &str = "bench";
pub const TARGET_TABLE: &str = "bench-replica";
const SOURCE: &str = "us-east-1";
const TARGET: &str = "us-west-2";
/// Longest time for one row.
const PATIENCE: Duration = Duration::from_secs(10 * 60);
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Batches of a shard in flight, for the ceiling: the worker's default.
const CONCURRENCY: usize = 32;
/// The core of what is measured, and that of everything else.
const CORE: usize = 0;
const OTHER_CORE: usize = 1;

/// What the worker should reach of the ceiling with distinct keys of 1 KB.
const RATIO_MIN: f64 = 0.80;
const CALLS_MAX: f64 = 45.0;

#[derive(Parser)]
#[command(args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(subcommand)]
    role: Option<Role>,
    /// Megabytes of items for each round.
    #[arg(long, default_value_t = 100)]
    megabytes: u64,
    /// Rounds for each row.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..))]
    rounds: u64,
    /// Only rows with so many shards.
    #[arg(long)]
    shards: Option<u64>,
    /// Only rows with items of so many bytes.
    #[arg(long)]
    item_bytes: Option<usize>,
    /// Only rows with such keys.
    #[arg(long)]
    keys: Option<Keys>,
    /// Also writes the rows as JSON to this file.
    #[arg(long)]
    json: Option<PathBuf>,
    /// What `cargo bench` passes to every bench.
    #[arg(long, hide = true)]
    bench: bool,
}

// What the bench starts itself as. No doc comment: it would be the bench's own help.
#[derive(Subcommand)]
enum Role {
    #[command(hide = true)]
    Null {
        #[command(flatten)]
        load: Load,
    },
    #[command(hide = true)]
    Ceiling {
        endpoint: String,
        #[command(flatten)]
        load: Load,
    },
    /// Runs a command on one core.
    #[command(hide = true)]
    On {
        core: usize,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
}

/// One scenario, by the worker and by the ceiling.
struct Row {
    load: Load,
    worker: Measured,
    ceiling: Measured,
}

struct Measured {
    seconds: f64,
    processor_seconds: f64,
    peak_bytes: u64,
    seen: Seen,
}

fn main() -> Result<(), Error> {
    let arguments = Arguments::parse();
    if let Some(Role::On { core, command }) = &arguments.role {
        return on_core(*core, command);
    }
    // One thread is enough for each role: each has one core.
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(async {
            match &arguments.role {
                Some(Role::Null { load }) => null::serve(*load, Duration::ZERO).await,
                Some(Role::Ceiling { endpoint, load }) => {
                    ceiling::replay(endpoint, *load, CONCURRENCY).await
                }
                _ => measure(&arguments).await,
            }
        })
}

/// Becomes `command`, on one core.
fn on_core(core: usize, command: &[String]) -> Result<(), Error> {
    let mut cores = rustix::thread::CpuSet::new();
    cores.set(core);
    rustix::thread::sched_setaffinity(None, &cores)?;
    let (program, arguments) = command.split_first().ok_or("no command")?;
    Err(Command::new(program).args(arguments).exec().into())
}

/// `command` on one core.
fn pinned(core: usize, command: Command) -> Result<Command, Error> {
    let mut on = Command::new(std::env::current_exe()?);
    on.args(["on", &core.to_string(), "--"]);
    on.arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => on.env(name, value),
            None => on.env_remove(name),
        };
    }
    Ok(on)
}

fn own(role: &str, arguments: &[&str], load: Load) -> Result<Command, Error> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg(role).args(arguments);
    command.args(["--shards", &load.shards.to_string()]);
    command.args(["--records", &load.records.to_string()]);
    command.args(["--item-bytes", &load.item_bytes.to_string()]);
    let keys = match load.keys {
        Keys::Distinct => "distinct",
        Keys::Hot => "hot",
    };
    command.args(["--keys", keys]);
    Ok(command)
}

async fn measure(arguments: &Arguments) -> Result<(), Error> {
    let temp = tempfile::tempdir()?;
    let mut rows = Vec::new();
    for item_bytes in [300, 1_000, 20_000] {
        for shards in [1, 4, 100] {
            for keys in [Keys::Distinct, Keys::Hot] {
                let is_wanted = arguments.shards.is_none_or(|wanted| wanted == shards)
                    && arguments
                        .item_bytes
                        .is_none_or(|wanted| wanted == item_bytes)
                    && arguments.keys.is_none_or(|wanted| wanted == keys);
                if !is_wanted {
                    continue;
                }
                // Small items cost more than their bytes.
                let records = arguments.megabytes * 1_000_000 / (item_bytes as u64).max(600);
                let load = Load {
                    shards,
                    records: (records / shards).max(1),
                    item_bytes,
                    keys,
                };
                let mut rounds = Vec::new();
                for _ in 0..arguments.rounds {
                    rounds.push(Row {
                        load,
                        ceiling: by_ceiling(load).await?,
                        worker: by_worker(temp.path(), load).await?,
                    });
                }
                rounds.sort_by(|a, b| a.ratio().total_cmp(&b.ratio()));
                let row = rounds.swap_remove(rounds.len() / 2);
                row.print(rows.is_empty());
                rows.push(row);
            }
        }
    }
    if let Some(file) = &arguments.json {
        let rows: Vec<_> = rows.iter().map(Row::as_json).collect();
        std::fs::write(file, json!({"version": 1, "rows": rows}).to_string())?;
    }
    Ok(())
}

/// A running null endpoint.
struct Endpoint {
    _process: Running,
    address: Address,
}

impl Endpoint {
    async fn start(load: Load) -> Result<Self, Error> {
        let mut command = pinned(OTHER_CORE, own("null", &[], load)?)?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = Running(command.spawn()?);
        let stdout = process.0.stdout.take().ok_or("no standard output")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        Ok(Self {
            _process: process,
            address: serde_json::from_str(&line)?,
        })
    }

    async fn seen(&self) -> Result<Seen, Error> {
        let client = Client::builder(TokioExecutor::new()).build_http::<Empty<bytes::Bytes>>();
        let answer = client.get(self.address.null.parse()?).await?;
        let body = answer.into_body().collect().await?.to_bytes();
        Ok(serde_json::from_slice(&body)?)
    }

    /// Watches `process` until everything is written.
    async fn watch(&self, process: &mut Running) -> Result<Measured, Error> {
        let begun = Instant::now();
        let id = process.0.id();
        let (mut peak_bytes, mut ticks_before, mut ticks) = (0, None, 0);
        loop {
            peak_bytes = peak_bytes_of(id).unwrap_or(0).max(peak_bytes);
            ticks = ticks_of(id).unwrap_or(ticks);
            let seen = self.seen().await?;
            if seen.begun {
                ticks_before.get_or_insert(ticks);
            }
            if let Some(took_us) = seen.took_us {
                let ticks = ticks - ticks_before.unwrap_or(0);
                return Ok(Measured {
                    seconds: took_us as f64 / 1e6,
                    processor_seconds: ticks as f64 / process::TICKS_PER_SECOND,
                    peak_bytes,
                    seen,
                });
            }
            if let Some(status) = process.0.try_wait()?
                && !status.success()
            {
                return Err(format!("what is measured ended: {status}").into());
            }
            if begun.elapsed() > PATIENCE {
                return Err(format!("not done within {PATIENCE:?}: {seen:?}").into());
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}

async fn by_ceiling(load: Load) -> Result<Measured, Error> {
    let endpoint = Endpoint::start(load).await?;
    let mut command = own("ceiling", &[&endpoint.address.null], load)?;
    command
        .env("AWS_ACCESS_KEY_ID", "bench")
        .env("AWS_SECRET_ACCESS_KEY", "bench");
    let mut process = Running(pinned(CORE, command)?.spawn()?);
    endpoint.watch(&mut process).await
}

async fn by_worker(directory: &Path, load: Load) -> Result<Measured, Error> {
    let endpoint = Endpoint::start(load).await?;
    create_tables(&endpoint.address.behind).await?;
    let config = config(directory, &endpoint.address.null)?;
    let provisioned = farshore(&config, &["provision", "--apply"]).output()?;
    if !provisioned.status.success() {
        return Err(String::from_utf8_lossy(&provisioned.stderr).into());
    }
    let mut command = pinned(CORE, farshore(&config, &["run"]))?;
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(std::fs::File::create(directory.join("stderr"))?);
    let mut process = Running(command.spawn()?);
    let measured = endpoint.watch(&mut process).await;
    measured.map_err(|error| {
        let log = std::fs::read_to_string(directory.join("stderr")).unwrap_or_default();
        let last: Vec<&str> = log.lines().rev().take(20).collect();
        format!("{error}\n{}", last.join("\n")).into()
    })
}

async fn create_tables(endpoint: &str) -> Result<(), Error> {
    let sdk = aws_config::defaults(aws_config::BehaviorVersion::v2026_01_12())
        .region(aws_config::Region::new(SOURCE))
        .credentials_provider(aws_credential_types::Credentials::new(
            "bench", "bench", None, None, "bench",
        ))
        .endpoint_url(endpoint)
        .load()
        .await;
    let client = aws_sdk_dynamodb::Client::new(&sdk);
    for table in [SOURCE_TABLE, TARGET_TABLE] {
        let key = AttributeDefinition::builder()
            .attribute_name("id")
            .attribute_type(ScalarAttributeType::S);
        let hash = KeySchemaElement::builder()
            .attribute_name("id")
            .key_type(KeyType::Hash);
        let stream = StreamSpecification::builder()
            .stream_enabled(true)
            .stream_view_type(StreamViewType::NewAndOldImages)
            .build()?;
        client
            .create_table()
            .table_name(table)
            .attribute_definitions(key.build()?)
            .key_schema(hash.build()?)
            .billing_mode(BillingMode::PayPerRequest)
            .set_stream_specification((table == SOURCE_TABLE).then_some(stream))
            .send()
            .await?;
    }
    Ok(())
}

fn config(directory: &Path, endpoint: &str) -> Result<PathBuf, Error> {
    let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let letters = directory.join("letters");
    let text = format!(
        r#"group = "bench"
active = "{SOURCE}"
here = "{TARGET}"
[regions.{SOURCE}]
endpoint_url = "{endpoint}"
[regions.{TARGET}]
endpoint_url = "{endpoint}"
[[tables]]
name = "{SOURCE_TABLE}"
names = {{ {TARGET} = "{TARGET_TABLE}" }}
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

impl Row {
    fn ratio(&self) -> f64 {
        self.ceiling.seconds / self.worker.seconds
    }

    fn per_second(&self, measured: &Measured) -> f64 {
        self.load.all_records() as f64 / measured.seconds
    }

    /// Seconds of processor time for a million records.
    fn processor(&self, measured: &Measured) -> f64 {
        measured.processor_seconds * 1e6 / self.load.all_records() as f64
    }

    fn calls_per_thousand(&self) -> f64 {
        let calls: u64 = self.worker.seen.calls.values().sum();
        calls as f64 * 1e3 / self.load.all_records() as f64
    }

    fn print(&self, first: bool) {
        if first {
            println!(
                "{:>7} {:>8} {:>9} {:>11} {:>11} {:>7} {:>9} {:>9} {:>10} {:>8}",
                "shards",
                "bytes",
                "keys",
                "records/s",
                "ceiling/s",
                "ratio",
                "CPU s/M",
                "ceiling",
                "calls/1000",
                "peak MB"
            );
        }
        let missed = |is_missed: bool| if is_missed { "!" } else { " " };
        let is_judged = self.load.item_bytes == 1_000 && self.load.keys == Keys::Distinct;
        println!(
            "{:>7} {:>8} {:>9} {:>11.0} {:>11.0} {:>6.2}{} {:>9.1} {:>9.1} {:>9.1}{} {:>8.0}",
            self.load.shards,
            self.load.item_bytes,
            format!("{:?}", self.load.keys).to_lowercase(),
            self.per_second(&self.worker),
            self.per_second(&self.ceiling),
            self.ratio(),
            missed(is_judged && self.ratio() < RATIO_MIN),
            self.processor(&self.worker),
            self.processor(&self.ceiling),
            self.calls_per_thousand(),
            missed(is_judged && self.calls_per_thousand() > CALLS_MAX),
            self.worker.peak_bytes as f64 / 1e6,
        );
    }

    fn as_json(&self) -> serde_json::Value {
        json!({
            "shards": self.load.shards,
            "item_bytes": self.load.item_bytes,
            "keys": format!("{:?}", self.load.keys).to_lowercase(),
            "records": self.load.all_records(),
            "records_per_second": self.per_second(&self.worker),
            "ceiling_records_per_second": self.per_second(&self.ceiling),
            "ratio_to_ceiling": self.ratio(),
            "cpu_seconds_per_million": self.processor(&self.worker),
            "ceiling_cpu_seconds_per_million": self.processor(&self.ceiling),
            "calls_per_thousand": self.calls_per_thousand(),
            "calls": self.worker.seen.calls,
            "items_written": self.worker.seen.written,
            "peak_bytes": self.worker.peak_bytes,
        })
    }
}
