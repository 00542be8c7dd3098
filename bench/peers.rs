//! The worker beside what a user would otherwise run: the same records of one shard, replayed into the same null
//! endpoint by Farshore, by a plain boto3 loop of one PutItem or DeleteItem a record (the shape of a typical
//! replication Lambda), and by boto3's batch writer; next door, and 80 ms away.
//!
//! `.ci/peers && cargo bench --bench peers -- --json FILE`
//!
//! Each has the same core to itself, one after the other. A slow one is given fewer records, so that the bench
//! stays short: what is compared is records a second, from the first page to the last item, by the endpoint's
//! own clock. Of some rounds the one with the median ratio is shown.

#[path = "pipeline/load.rs"]
mod load;
#[path = "pipeline/null.rs"]
mod null;
#[path = "reconcile/process.rs"]
#[allow(dead_code, reason = "its processes do not end by themselves")]
mod process;
#[path = "pipeline/stage.rs"]
#[allow(dead_code, reason = "nothing but the time is compared")]
mod stage;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use clap::{Parser, Subcommand};
use serde_json::json;

use load::{Keys, Load};
use process::Running;
use stage::{CORE, Endpoint, Measured, by_worker, on_core, pinned};

type Error = Box<dyn std::error::Error + Send + Sync>;

pub const SOURCE_TABLE: &str = "bench";
pub const TARGET_TABLE: &str = "bench-replica";
const ITEM_BYTES: usize = 1_000;

#[derive(Parser)]
#[command(args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(subcommand)]
    role: Option<Role>,
    /// Rounds for each row.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..))]
    rounds: u64,
    /// Only this round trip, in milliseconds.
    #[arg(long)]
    only: Option<u64>,
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
    /// Runs a command on one core.
    #[command(hide = true)]
    On {
        core: usize,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
}

/// How far away the endpoint is, and how many records each gets there.
struct Distance {
    round_trip: Duration,
    worker: u64,
    peers: [Peer; 2],
}

/// One that is compared with.
#[derive(Clone, Copy)]
struct Peer {
    what: &'static str,
    /// As `replay.py` calls it.
    how: &'static str,
    records: u64,
    /// How many times as fast the worker should be.
    ratio_min: f64,
}

const fn plain(records: u64, ratio_min: f64) -> Peer {
    Peer {
        what: "boto3, a call for each record",
        how: "put",
        records,
        ratio_min,
    }
}

const fn batched(records: u64, ratio_min: f64) -> Peer {
    Peer {
        what: "boto3, batch_writer",
        how: "batch",
        records,
        ratio_min,
    }
}

const DISTANCES: [Distance; 2] = [
    Distance {
        round_trip: Duration::ZERO,
        worker: 200_000,
        peers: [plain(5_000, 30.0), batched(10_000, 12.0)],
    },
    Distance {
        round_trip: Duration::from_millis(80),
        worker: 60_000,
        peers: [plain(100, 300.0), batched(2_000, 12.0)],
    },
];

/// One peer at one distance, by the round with the median ratio.
struct Row {
    round_trip: Duration,
    peer: Peer,
    per_second: f64,
    worker_per_second: f64,
}

fn main() -> Result<(), Error> {
    let arguments = Arguments::parse();
    if let Some(Role::On { core, command }) = &arguments.role {
        return on_core(*core, command);
    }
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(async {
            match &arguments.role {
                Some(Role::Null {
                    round_trip_ms,
                    load,
                }) => null::serve(*load, Duration::from_millis(*round_trip_ms)).await,
                _ => measure(&arguments).await,
            }
        })
}

async fn measure(arguments: &Arguments) -> Result<(), Error> {
    let temp = tempfile::tempdir()?;
    let python = python()?;
    let mut rows = Vec::new();
    for distance in &DISTANCES {
        let milliseconds = distance.round_trip.as_millis();
        if arguments
            .only
            .is_some_and(|only| u128::from(only) != milliseconds)
        {
            continue;
        }
        let mut rounds: [Vec<Row>; 2] = Default::default();
        for _ in 0..arguments.rounds {
            let load = load(distance.worker);
            let endpoint = Endpoint::start(load, distance.round_trip).await?;
            let worker = per_second(load, &by_worker(temp.path(), &endpoint).await?);
            for (rows, peer) in rounds.iter_mut().zip(distance.peers) {
                rows.push(Row {
                    round_trip: distance.round_trip,
                    peer,
                    per_second: by_peer(&python, peer, distance.round_trip).await?,
                    worker_per_second: worker,
                });
            }
        }
        for mut rounds in rounds {
            rounds.sort_by(|a, b| a.ratio().total_cmp(&b.ratio()));
            let row = rounds.swap_remove(rounds.len() / 2);
            row.print(rows.is_empty());
            rows.push(row);
        }
    }
    if let Some(file) = &arguments.json {
        let rows: Vec<_> = rows.iter().map(Row::as_json).collect();
        std::fs::write(file, json!({"version": 1, "rows": rows}).to_string())?;
    }
    Ok(())
}

/// The environment that `.ci/peers` makes.
fn python() -> Result<PathBuf, Error> {
    let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/peers/bin/python");
    match python.exists() {
        true => Ok(python),
        false => Err(
            "boto3 is not installed: run .ci/peers first, which puts it under target/peers".into(),
        ),
    }
}

fn load(records: u64) -> Load {
    Load {
        shards: 1,
        records,
        item_bytes: ITEM_BYTES,
        keys: Keys::Distinct,
    }
}

fn per_second(load: Load, measured: &Measured) -> f64 {
    load.all_records() as f64 / measured.seconds
}

/// Records a second of one peer.
async fn by_peer(python: &Path, peer: Peer, round_trip: Duration) -> Result<f64, Error> {
    let load = load(peer.records);
    let endpoint = Endpoint::start(load, round_trip).await?;
    let mut command = Command::new(python);
    command
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("bench/peers/replay.py"))
        .args([peer.how, &endpoint.address.null, "arn:bench", TARGET_TABLE])
        .arg(peer.records.to_string())
        .env("AWS_ACCESS_KEY_ID", "bench")
        .env("AWS_SECRET_ACCESS_KEY", "bench")
        .env("AWS_EC2_METADATA_DISABLED", "true");
    let mut command = pinned(CORE, command)?;
    command.stdin(Stdio::null());
    let mut process = Running(command.spawn()?);
    Ok(per_second(load, &endpoint.watch(&mut process).await?))
}

impl Row {
    fn ratio(&self) -> f64 {
        self.worker_per_second / self.per_second
    }

    fn print(&self, first: bool) {
        if first {
            println!(
                "{:>5} {:<30} {:>10} {:>11} {:>7} {:>7}",
                "ms", "beside", "records/s", "farshore/s", "times", "target"
            );
        }
        let missed = self.ratio() < self.peer.ratio_min;
        println!(
            "{:>5} {:<30} {:>10.0} {:>11.0} {:>6.0}{} {:>7.0}",
            self.round_trip.as_millis(),
            self.peer.what,
            self.per_second,
            self.worker_per_second,
            self.ratio(),
            if missed { "!" } else { " " },
            self.peer.ratio_min,
        );
    }

    fn as_json(&self) -> serde_json::Value {
        json!({
            "round_trip_ms": self.round_trip.as_millis(),
            "peer": self.peer.what,
            "peer_records": self.peer.records,
            "peer_records_per_second": self.per_second,
            "records_per_second": self.worker_per_second,
            "ratio": self.ratio(),
            "ratio_min": self.peer.ratio_min,
        })
    }
}
