//! `farshore demo`: two embedded regions, a live workload, the very worker that `run` runs, and a
//! complete comparison at the end.

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::demo_load::{Ledger, Pair, write};
use super::{answer, answer_json};
use crate::config::read::{Loaded, parse};
use crate::dynamo::Regions;
use crate::error::{Exit, Failure};
use crate::jobs::compare::{Comparison, compare};
use crate::jobs::local;
use crate::observe::board::Board;
use crate::observe::{metrics, server};
use crate::run::Worker;
use crate::run::start::find_role;

const TABLE: &str = "orders";
const SHOW_EVERY: Duration = Duration::from_millis(200);
/// Without a terminal a line now and then is enough.
const SAY_EVERY: Duration = Duration::from_secs(5);
/// Longest wait for the replica to catch up once the writes have stopped.
const CATCH_UP_WITHIN: Duration = Duration::from_secs(60);

/// Arguments of `demo`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// How long to write
    #[arg(long = "for", value_name = "DURATION", default_value = "30s", value_parser = humantime::parse_duration)]
    duration: Duration,
    /// Changes a second
    #[arg(long, default_value_t = 500, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=20_000))]
    rate: u32,
    /// Answers as JSON
    #[arg(long)]
    json: bool,
}

/// How the demo went.
struct Outcome {
    seconds: f64,
    catch_up_seconds: f64,
    written: u64,
    applied: u64,
    coalesced: u64,
    dead_letters: u64,
    lag_ms: Option<(f64, f64, usize)>,
    comparison: Comparison,
}

pub(super) async fn run(args: &Args) -> Result<Exit, Failure> {
    let again = signals()?;
    let stop_writing = again.first.clone();
    tokio::select! {
        exit = demo(args, stop_writing) => exit,
        // A second Ctrl-C: the person does not want to wait for the comparison.
        () = again.second.cancelled() => Ok(Exit::Interrupted),
    }
}

async fn demo(args: &Args, stop_writing: CancellationToken) -> Result<Exit, Failure> {
    let letters = tempfile_directory();
    let loaded = configuration(&letters)?;
    let handle = metrics::install(&loaded.config.group)?;
    let regions = Arc::new(Regions::connect(&loaded.config).await?);
    local::prepare(&loaded, &regions).await?;
    let listener = server::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await?;
    let address = listener.local_addr().ok();
    let role = find_role(&loaded, &regions).await?;
    let (Some(source), Some(target)) = (regions.get("us-east-1"), regions.get("us-west-2")) else {
        return Err(Failure::new(
            "The demo has no regions",
            "Its own configuration lacks them",
            "Report this",
        ));
    };
    eprintln!(
        "us-east-1 {}  ─▶  us-west-2 {}   table {TABLE}",
        source.endpoint, target.endpoint
    );
    if let Some(address) = address {
        eprintln!("page http://{address}/   metrics http://{address}/metrics");
    }
    let worker = Worker::new(loaded, Arc::clone(&regions), role, listener, Some(handle));
    let (board, health) = (worker.board(), worker.health());
    let stop_worker = CancellationToken::new();
    let working = tokio::spawn(worker.run(stop_worker.clone()));
    // The worker reads from the moment its table is followed; before that it is not yet live.
    while !health.is_following() {
        if stop_writing.is_cancelled() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let pair = Pair {
        source: source.tables.clone(),
        target: target.tables.clone(),
        table: TABLE.to_owned(),
    };
    let outcome = play(args, &pair, &board, &stop_writing).await;
    stop_worker.cancel();
    let drained = working.await.unwrap_or(Exit::Remains);
    // Only this process's own directory; what lies in it was counted.
    let _ = std::fs::remove_dir_all(&letters);
    report(args, &outcome?, drained)
}

/// Writes, waits until the replica has caught up, and compares.
async fn play(
    args: &Args,
    pair: &Pair,
    board: &Arc<Board>,
    stop: &CancellationToken,
) -> Result<Outcome, Failure> {
    let ledger = Arc::new(Ledger::default());
    let line = live_line();
    let began = Instant::now();
    let seed = rand::random();
    let stopping = stop.child_token();
    let writing = write(pair, &ledger, args.rate, seed, &stopping);
    tokio::pin!(writing);
    let end = tokio::time::sleep(args.duration);
    tokio::pin!(end);
    let mut shows = tokio::time::interval(SHOW_EVERY);
    let mut said = Instant::now();
    let written = loop {
        tokio::select! {
            written = &mut writing => break written,
            () = &mut end, if !stopping.is_cancelled() => stopping.cancel(),
            _ = shows.tick() => show(&line, &mut said, &ledger, board, began.elapsed()),
        }
    };
    written
        .map_err(|fault| Failure::from_fault("The demo could not write to its source", &fault))?;
    let seconds = began.elapsed().as_secs_f64();
    let stopped = Instant::now();
    let done = |ledger: &Ledger| {
        let totals = &board.totals;
        totals.records.load(Ordering::Relaxed) >= ledger.written()
    };
    while !done(&ledger) && stopped.elapsed() < CATCH_UP_WITHIN {
        show(&line, &mut said, &ledger, board, began.elapsed());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let catch_up_seconds = stopped.elapsed().as_secs_f64();
    line.set_message("comparing both tables…");
    let comparison = compare((&pair.source, TABLE), (&pair.target, TABLE))
        .await
        .map_err(|fault| Failure::from_fault("The tables could not be compared", &fault))?;
    line.finish_and_clear();
    let totals = &board.totals;
    Ok(Outcome {
        seconds,
        catch_up_seconds,
        written: ledger.written(),
        applied: totals.records.load(Ordering::Relaxed),
        coalesced: totals.coalesced.load(Ordering::Relaxed),
        dead_letters: totals.dead_letters.load(Ordering::Relaxed),
        lag_ms: ledger.lag_ms(),
        comparison,
    })
}

fn live_line() -> ProgressBar {
    let line = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{msg}") {
        line.set_style(style);
    }
    line
}

fn show(line: &ProgressBar, said: &mut Instant, ledger: &Ledger, board: &Board, since: Duration) {
    let lag = match ledger.lag_ms() {
        Some((p50, p99, _)) => format!("lag p50 {p50:.0} ms p99 {p99:.0} ms"),
        None => "lag not measured yet".to_owned(),
    };
    let totals = &board.totals;
    let text = format!(
        "{:>4.0} s   written {}   applied {}   {lag}   dead letters {}",
        since.as_secs_f64(),
        ledger.written(),
        totals.records.load(Ordering::Relaxed),
        totals.dead_letters.load(Ordering::Relaxed),
    );
    if std::io::stderr().is_terminal() {
        line.set_message(text);
    } else if said.elapsed() >= SAY_EVERY {
        *said = Instant::now();
        eprintln!("{text}");
    }
}

fn report(args: &Args, outcome: &Outcome, drained: Exit) -> Result<Exit, Failure> {
    let comparison = &outcome.comparison;
    let equal = comparison.is_equal();
    if args.json {
        answer_json(&json!({
            "version": 1,
            "seconds": round(outcome.seconds),
            "catchUpSeconds": round(outcome.catch_up_seconds),
            "rate": args.rate,
            "written": outcome.written,
            "applied": outcome.applied,
            "coalesced": outcome.coalesced,
            "deadLetters": outcome.dead_letters,
            "lagMilliseconds": outcome.lag_ms.map(|(p50, p99, probes)| json!({
                "p50": round(p50), "p99": round(p99), "probes": probes,
            })),
            "sourceItems": comparison.source_items,
            "targetItems": comparison.target_items,
            "missing": comparison.missing,
            "extra": comparison.extra,
            "different": comparison.different,
            "equal": equal,
            "drained": drained == Exit::Done,
        }))?;
    } else {
        let lag = outcome
            .lag_ms
            .map_or_else(String::new, |(p50, p99, probes)| {
                format!(", lag p50 {p50:.0} ms and p99 {p99:.0} ms over {probes} probes")
            });
        let verdict = if equal {
            format!(
                "EQUAL: all {} items are the same in both tables",
                comparison.source_items
            )
        } else {
            format!(
                "NOT EQUAL: {} missing, {} extra, {} different of {} items",
                comparison.missing, comparison.extra, comparison.different, comparison.source_items
            )
        };
        answer(&format!(
            "{verdict}, after {} changes in {:.0} s, {} applied ({} of them coalesced), {} dead letters, caught up {:.1} s after the last write{lag}.",
            outcome.written,
            outcome.seconds,
            outcome.applied,
            outcome.coalesced,
            outcome.dead_letters,
            outcome.catch_up_seconds,
        ))?;
    }
    Ok(if equal && drained == Exit::Done {
        Exit::Done
    } else {
        Exit::Remains
    })
}

fn round(number: f64) -> f64 {
    (number * 10.0).round() / 10.0
}

/// The demo's own configuration, read like any other.
fn configuration(letters: &std::path::Path) -> Result<Loaded, Failure> {
    let text = format!(
        r#"group = "demo"
active = "us-east-1"
here = "us-west-2"
[regions.us-east-1]
endpoint_url = "embedded"
[regions.us-west-2]
endpoint_url = "embedded"
[[tables]]
name = "{TABLE}"
[writes]
units_per_second = 0
[dead_letters]
directory = {}
"#,
        toml::Value::String(letters.display().to_string())
    );
    parse("of the demo", &text, &[])
}

/// A directory of this process alone; it is made when the worker starts.
fn tempfile_directory() -> std::path::PathBuf {
    let nonce: u64 = rand::random();
    std::env::temp_dir().join(format!("farshore-demo-{}-{nonce:x}", std::process::id()))
}

/// The first and the second request to stop.
struct Signals {
    first: CancellationToken,
    second: CancellationToken,
}

fn signals() -> Result<Signals, Failure> {
    let first = super::stop_on_signal()?;
    let second = CancellationToken::new();
    let (seen, cancel) = (first.clone(), second.clone());
    tokio::spawn(async move {
        seen.cancelled().await;
        if tokio::signal::ctrl_c().await.is_ok() {
            cancel.cancel();
        }
    });
    Ok(Signals { first, second })
}
