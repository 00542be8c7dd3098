//! The first copy of a large table: how long it takes, how long it said that it takes, and what it costs,
//! at the default rates.
//!
//! `cargo bench --bench bootstrap -- --items 1000000 --json FILE`
//!
//! A source with that many items and a stream that remembers none of them, an empty replica, one worker.
//! Each side is an embedded server in a process of its own, as in `bench/reconcile.rs`; the replica's is asked
//! directly, for it is empty when it is scanned. At the default of
//! 500 read units a second a million items take 35 minutes; `--read-units 0` reads without a limit.

#[path = "reconcile/data.rs"]
#[allow(dead_code, reason = "this bench compares nothing itself")]
mod data;
#[path = "reconcile/process.rs"]
#[allow(dead_code, reason = "its process does not end by itself")]
mod process;
#[path = "reconcile/server.rs"]
#[allow(dead_code, reason = "both sides come in the same order")]
mod server;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use aws_sdk_dynamodb::types::{Select, StreamSpecification, StreamViewType};
use clap::{Parser, Subcommand};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use data::{Data, Region, TABLE};
use process::{Running, farshore};
use server::{Server, client};

type Error = Box<dyn std::error::Error + Send + Sync>;

const SOURCE: &str = "us-east-1";
const TARGET: &str = "us-west-2";
/// Nothing takes longer, at whatever rate.
const PATIENCE: Duration = Duration::from_secs(3 * 60 * 60);
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Items are counted in so many parts: one scan of all would take the server minutes.
const COUNT_PARTS: i32 = 256;

#[derive(Parser)]
#[command(args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(subcommand)]
    role: Option<Role>,
    /// Items of the source.
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1..))]
    items: u64,
    /// Read units per second on each side; the configuration's default if it is not given.
    #[arg(long)]
    read_units: Option<u32>,
    /// Also writes the figures as JSON to this file.
    #[arg(long)]
    json: Option<PathBuf>,
    /// What `cargo bench` passes to every bench.
    #[arg(long, hide = true)]
    bench: bool,
}

// What the bench starts itself as. No doc comment: it would be the bench's own help.
#[derive(Subcommand)]
enum Role {
    /// One side: serves a table until its standard input is closed.
    #[command(hide = true)]
    Serve {
        /// Parts that a scan of the whole table is served in.
        parts: u64,
    },
}

#[tokio::main]
async fn main() -> Result<(), Error> {
    let arguments = Arguments::parse();
    match &arguments.role {
        None => measure(&arguments).await,
        Some(Role::Serve { parts }) => server::serve(*parts).await,
    }
}

async fn measure(arguments: &Arguments) -> Result<(), Error> {
    let data = Data::new(arguments.items, 0)?;
    let temp = tempfile::tempdir()?;
    let source = Server::start(data.parts()).await?;
    let target = Server::start(data.parts()).await?;
    let (from, to) = (client(&source.direct), client(&target.direct));
    let begun = Instant::now();
    data.load(&from, Region::Source).await?;
    eprintln!(
        "{} items loaded in {:.1} s",
        data.items,
        begun.elapsed().as_secs_f64()
    );
    // Only now, so that the stream brings nothing.
    let stream = StreamSpecification::builder()
        .stream_enabled(true)
        .stream_view_type(StreamViewType::NewAndOldImages)
        .build()?;
    let enable = from.update_table().table_name(TABLE);
    enable.stream_specification(stream).send().await?;
    let port = std::net::TcpListener::bind("127.0.0.1:0")?
        .local_addr()?
        .port();
    let config = config(
        temp.path(),
        arguments,
        port,
        &source.ascending,
        &target.direct,
    )?;
    let provisioned = farshore(&config, &["provision", "--apply"]).output()?;
    if !provisioned.status.success() {
        return Err(String::from_utf8_lossy(&provisioned.stderr).into());
    }
    let mut worker = farshore(&config, &["run"]);
    worker.stdout(Stdio::null()).stderr(Stdio::null());
    let begun = Instant::now();
    let worker = Running(worker.spawn()?);
    let figures = watch(&worker, port, begun).await?;
    drop(worker);
    let copied = count(&to).await?;
    let report = json!({
        "items": data.items,
        "readUnitsPerSecond": arguments.read_units.map_or(json!("default"), |units| json!(units)),
        "copiedItems": copied,
        "saidSeconds": figures.said,
        "copySeconds": figures.copied.as_secs_f64(),
        "readySeconds": figures.ready.as_secs_f64(),
        "itemsPerSecond": data.items as f64 / figures.copied.as_secs_f64(),
        "tookOfSaid": figures.said.map(|said| figures.copied.as_secs_f64() / said),
        "saidInBetween": figures.in_between.iter().map(|(at, percent, left)| json!({
            "atSeconds": at, "percent": percent, "secondsLeft": left,
        })).collect::<Vec<_>>(),
        "peakBytes": figures.peak_bytes,
        "processorSeconds": figures.processor_seconds,
    });
    print(&report)?;
    if let Some(file) = &arguments.json {
        std::fs::write(file, report.to_string())?;
    }
    match copied == data.items {
        true => Ok(()),
        false => Err(format!("{copied} items are in the replica").into()),
    }
}

/// What was seen of a copy.
struct Figures {
    /// Seconds that it said it would take, when it had just begun.
    said: Option<f64>,
    /// Until all was copied.
    copied: Duration,
    /// Until the stream had passed that, and readiness was green.
    ready: Duration,
    /// At about each tenth: seconds since the start, percent, and how many seconds it said were left.
    in_between: Vec<(f64, f64, f64)>,
    peak_bytes: Option<u64>,
    processor_seconds: Option<f64>,
}

async fn watch(worker: &Running, port: u16, begun: Instant) -> Result<Figures, Error> {
    let pid = worker.0.id();
    let (mut said, mut copied) = (None, None);
    let mut in_between: Vec<(f64, f64, f64)> = Vec::new();
    let (mut peak_bytes, mut ticks) = (None, None);
    loop {
        if begun.elapsed() > PATIENCE {
            return Err(format!("not ready within {PATIENCE:?}").into());
        }
        tokio::time::sleep(LOOK_EVERY).await;
        peak_bytes = peak_bytes.max(process::peak_bytes_of(pid));
        ticks = ticks.max(process::ticks_of(pid));
        let Some(body) = get(port, "/readyz").await else {
            continue;
        };
        let at = begun.elapsed();
        if body.contains("\"ready\":true") {
            let seconds = ticks.map(|ticks: u64| ticks as f64 / process::TICKS_PER_SECOND);
            return Ok(Figures {
                said,
                copied: copied.unwrap_or(at),
                ready: at,
                in_between,
                peak_bytes,
                processor_seconds: seconds,
            });
        }
        if body.contains("all is copied") {
            copied = copied.or(Some(at));
            continue;
        }
        let Some(metrics) = get(port, "/metrics").await else {
            continue;
        };
        let of = |name: &str| {
            let line = metrics
                .lines()
                .find(|line| line.starts_with(name) && line.contains("job=\"bootstrap\""))?;
            line.rsplit(' ').next()?.parse::<f64>().ok()
        };
        if let (true, Some(ratio), Some(left)) = (
            body.contains("\"copying\""),
            of("farshore_job_progress_ratio"),
            of("farshore_job_left_seconds"),
        ) {
            said = said.or(Some(left));
            let last = in_between.last().map_or(0.0, |(_, percent, _)| *percent);
            let percent = (ratio * 100.0).round();
            if percent >= last + 10.0 {
                eprintln!(
                    "{percent} % after {:.0} s, {left:.0} s left",
                    at.as_secs_f64()
                );
                in_between.push((at.as_secs_f64(), percent, left));
            }
        }
    }
}

fn print(report: &Value) -> Result<(), Error> {
    let mut text = String::new();
    for (name, value) in report.as_object().into_iter().flatten() {
        if !value.is_array() {
            writeln!(text, "{name:>22}  {value}")?;
        }
    }
    println!("{text}");
    Ok(())
}

/// Items in a table.
async fn count(client: &aws_sdk_dynamodb::Client) -> Result<u64, Error> {
    let mut items = 0;
    for part in 0..COUNT_PARTS {
        let mut after = None;
        loop {
            let scan = client.scan().table_name(TABLE).select(Select::Count);
            let scan = scan.segment(part).total_segments(COUNT_PARTS);
            let page = scan.set_exclusive_start_key(after).send().await?;
            items += u64::try_from(page.count)?;
            after = page.last_evaluated_key;
            if after.is_none() {
                break;
            }
        }
    }
    Ok(items)
}

async fn get(port: u16, path: &str) -> Option<String> {
    let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", port))
        .await
        .ok()?;
    let request = format!("GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n");
    stream.write_all(request.as_bytes()).await.ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.ok()?;
    Some(answer.split_once("\r\n\r\n")?.1.to_owned())
}

fn config(
    directory: &Path,
    arguments: &Arguments,
    port: u16,
    source: &str,
    target: &str,
) -> Result<PathBuf, Error> {
    let letters = directory.join("letters");
    let rate = arguments.read_units.map_or_else(String::new, |units| {
        format!("[reconcile]\nread_units_per_second = {units}\n")
    });
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
[worker]
listen = "127.0.0.1:{port}"
[dead_letters]
directory = {letters:?}
{rate}"#
    );
    let file = directory.join("bench.toml");
    std::fs::write(&file, text)?;
    Ok(file)
}
