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
//!
//! `-- --idle` asks what a worker costs whose shards hold nothing, at default settings: calls, renewals and
//! memory.

#[path = "pipeline/ceiling.rs"]
mod ceiling;
#[path = "pipeline/load.rs"]
mod load;
#[path = "pipeline/null.rs"]
mod null;
#[path = "reconcile/process.rs"]
#[allow(dead_code, reason = "its processes do not end by themselves")]
mod process;

#[path = "pipeline/stage.rs"]
mod stage;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand};
use serde_json::json;

use load::{Keys, Load};
use null::Seen;
use process::{Running, peak_bytes_of, ticks_of};
use stage::{CORE, Endpoint, Measured, Worker, by_worker, on_core, own, pinned};

type Error = Box<dyn std::error::Error + Send + Sync>;

pub const SOURCE_TABLE: &str = "bench";
pub const TARGET_TABLE: &str = "bench-replica";
/// Batches of a shard in flight, for the ceiling: the worker's default.
const CONCURRENCY: usize = 32;
/// What the worker should reach of the ceiling with distinct keys of 1 KB.
const RATIO_MIN: f64 = 0.80;
const CALLS_MAX: f64 = 45.0;
/// What it may take while it catches up a hundred shards.
const PEAK_MAX: u64 = 256_000_000;

/// What an idle shard may cost: calls of GetRecords a second.
const IDLE_READS_MAX: f64 = 1.2;
/// And a hundred of them, in bytes.
const IDLE_PEAK_MAX: u64 = 64_000_000;
/// How long a worker settles before it counts as idle, and how long it is looked at.
const IDLE_AFTER: Duration = Duration::from_secs(15);
const IDLE_FOR: Duration = Duration::from_secs(30);

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
    /// Instead of all that: what idle shards cost.
    #[arg(long)]
    idle: bool,
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
        #[arg(long)]
        round_trip_ms: u64,
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

/// What a worker with idle shards costs.
struct Idle {
    shards: u64,
    seconds: f64,
    processor_seconds: f64,
    peak_bytes: u64,
    before: Seen,
    after: Seen,
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
                Some(Role::Null {
                    round_trip_ms,
                    load,
                }) => null::serve(*load, Duration::from_millis(*round_trip_ms)).await,
                Some(Role::Ceiling { endpoint, load }) => {
                    ceiling::replay(endpoint, *load, CONCURRENCY).await
                }
                _ if arguments.idle => idle(&arguments).await,
                _ => measure(&arguments).await,
            }
        })
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
                    let endpoint = Endpoint::start(load, Duration::ZERO).await?;
                    let ceiling = by_ceiling(&endpoint, load).await?;
                    let endpoint = Endpoint::start(load, Duration::ZERO).await?;
                    rounds.push(Row {
                        load,
                        ceiling,
                        worker: by_worker(temp.path(), &endpoint).await?,
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

async fn by_ceiling(endpoint: &Endpoint, load: Load) -> Result<Measured, Error> {
    let mut command = own("ceiling", &[&endpoint.address.null], load)?;
    command
        .env("AWS_ACCESS_KEY_ID", "bench")
        .env("AWS_SECRET_ACCESS_KEY", "bench");
    let mut process = Running(pinned(CORE, command)?.spawn()?);
    endpoint.watch(&mut process).await
}

async fn idle(arguments: &Arguments) -> Result<(), Error> {
    let temp = tempfile::tempdir()?;
    let mut rows = Vec::new();
    for shards in [1, 100] {
        if arguments.shards.is_none_or(|wanted| wanted == shards) {
            let row = idle_shards(temp.path(), shards).await?;
            row.print(rows.is_empty());
            rows.push(row);
        }
    }
    if let Some(file) = &arguments.json {
        let rows: Vec<_> = rows.iter().map(Idle::as_json).collect();
        std::fs::write(file, json!({"version": 1, "idle": rows}).to_string())?;
    }
    Ok(())
}

async fn idle_shards(directory: &Path, shards: u64) -> Result<Idle, Error> {
    let load = Load {
        shards,
        records: 0,
        item_bytes: 1_000,
        keys: Keys::Distinct,
    };
    let endpoint = Endpoint::start(load, Duration::ZERO).await?;
    let worker = Worker::start(directory, &endpoint).await?;
    let id = worker.process.0.id();
    let begun = Instant::now();
    while !endpoint.seen().await?.begun {
        if begun.elapsed() > IDLE_FOR {
            return Err(worker.explain(&"not all shards are read".into()));
        }
        tokio::time::sleep(IDLE_AFTER / 100).await;
    }
    tokio::time::sleep(IDLE_AFTER).await;
    let (start, before) = (Instant::now(), endpoint.seen().await?);
    let ticks = ticks_of(id).ok_or("the worker ended")?;
    tokio::time::sleep(IDLE_FOR).await;
    let after = endpoint.seen().await?;
    Ok(Idle {
        shards,
        seconds: start.elapsed().as_secs_f64(),
        processor_seconds: (ticks_of(id).ok_or("the worker ended")? - ticks) as f64
            / process::TICKS_PER_SECOND,
        peak_bytes: peak_bytes_of(id).unwrap_or(0),
        before,
        after,
    })
}

impl Idle {
    /// Calls of `operation` a second.
    fn per_second(&self, operation: &str) -> f64 {
        let calls = |seen: &Seen| seen.calls.get(operation).copied().unwrap_or(0);
        (calls(&self.after) - calls(&self.before)) as f64 / self.seconds
    }

    fn reads_per_shard(&self) -> f64 {
        self.per_second("GetRecords") / self.shards as f64
    }

    /// Every renewal is a PutItem; so is the worker's own row, once in a while.
    fn renewals_per_shard(&self) -> f64 {
        self.per_second("PutItem") / self.shards as f64
    }

    fn processor_percent(&self) -> f64 {
        self.processor_seconds * 100.0 / self.seconds
    }

    fn print(&self, first: bool) {
        if first {
            println!(
                "{:>7} {:>18} {:>16} {:>13} {:>7} {:>9}",
                "shards",
                "GetRecords/s/shard",
                "PutItem/s/shard",
                "other calls/s",
                "CPU %",
                "peak MB"
            );
        }
        let missed = |is_missed: bool| if is_missed { "!" } else { " " };
        println!(
            "{:>7} {:>17.2}{} {:>16.3} {:>13.2} {:>7.1} {:>8.1}{}",
            self.shards,
            self.reads_per_shard(),
            missed(self.reads_per_shard() > IDLE_READS_MAX),
            self.renewals_per_shard(),
            self.others_per_second(),
            self.processor_percent(),
            self.peak_bytes as f64 / 1e6,
            missed(self.peak_bytes > IDLE_PEAK_MAX),
        );
    }

    fn others_per_second(&self) -> f64 {
        let all: u64 = self.after.calls.values().sum();
        let before: u64 = self.before.calls.values().sum();
        let known = self.per_second("GetRecords") + self.per_second("PutItem");
        (all - before) as f64 / self.seconds - known
    }

    fn as_json(&self) -> serde_json::Value {
        json!({
            "shards": self.shards,
            "seconds": self.seconds,
            "get_records_per_second_and_shard": self.reads_per_shard(),
            "put_item_per_second_and_shard": self.renewals_per_shard(),
            "other_calls_per_second": self.others_per_second(),
            "cpu_percent": self.processor_percent(),
            "peak_bytes": self.peak_bytes,
        })
    }
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
            "{:>7} {:>8} {:>9} {:>11.0} {:>11.0} {:>6.2}{} {:>9.1} {:>9.1} {:>9.1}{} {:>8.0}{}",
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
            missed(self.worker.peak_bytes > PEAK_MAX),
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
