//! The commands: arguments in, one exit code out. Answers go to stdout, all else to stderr.

mod ask;
mod dead_letters;
#[cfg(feature = "embedded")]
mod demo;
#[cfg(feature = "embedded")]
mod demo_load;
mod failback;
mod failover;
mod health;
mod one_shot;
mod provision;
mod reconcile;
mod redrive;
mod run;
mod status;
mod tap;

use std::io::{IsTerminal, Write};
use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::{LevelFilter, filter_fn};
use tracing_subscriber::prelude::*;

use crate::config::read::{Loaded, load};
use crate::error::{Exit, Failure};
use crate::observe::events;

/// Keeps DynamoDB tables alive in a second region.
#[derive(Debug, Parser)]
#[command(name = "farshore", version, about, long_about = None, propagate_version = true)]
struct Cli {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Command,
}

/// Arguments of every command.
#[derive(Debug, clap::Args)]
struct Common {
    /// The configuration file, the same in every region
    #[arg(
        long,
        global = true,
        env = "FARSHORE_CONFIG",
        default_value = "farshore.toml",
        value_name = "FILE"
    )]
    config: PathBuf,
    /// Form of the log on stderr
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text, value_name = "FORMAT")]
    log_format: LogFormat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum LogFormat {
    /// Lines for people
    Text,
    /// One JSON object a line
    Json,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Feeds this region's replicas from the active region, for as long as it runs
    ///
    /// Reads the stream of every table in the active region and replays it into the replicas
    /// here. Metrics and health are served on worker.listen. SIGTERM or Ctrl-C drains,
    /// checkpoints and releases. Exit code 0: drained; 1: the grace ran out; 2: could not start.
    Run,
    /// Shows how far behind the replica is, whether it is right and whether somebody is at it
    ///
    /// From the state table of this region alone, also while the active region is away, and from the
    /// workers that can be reached. Exit code 0: nothing needs a person; 1: a gap is open, a tap is closed,
    /// a shard has no owner or a silent one, nobody feeds the replica, a region is away, less than six hours are left until
    /// the stream forgets, a doubt should have been repaired more than ten minutes ago (a doubt that waits
    /// for its time is normal), or a worker is not ready; 2: could not read.
    Status(status::Args),
    /// Creates replica tables, the state table with its control record, and the queue
    ///
    /// Without --apply it prints what it would do. It changes nothing that exists.
    Provision(provision::Args),
    /// Closes the tap: nothing more is written to the replica, by the whole fleet
    ///
    /// Every worker stops sending within one leases.duration, keeps its leases, and goes on from where
    /// it stood after `resume`. The stream forgets after 24 hours: headroom keeps running down. Without
    /// --apply it prints what it would do. Exit code 0: closed, or closed already; 1: only planned; 2:
    /// could not be done.
    Pause(tap::Args),
    /// Opens the tap again
    ///
    /// Without --table it lifts the pause of all tables and leaves those of single tables. Without
    /// --apply it prints what it would do. Exit code 0: opened, or not closed at all; 1: only planned,
    /// or the table stays closed by the pause of all tables; 2: could not be done.
    Resume(tap::Args),
    /// Counts the dead letters of this region, by table, event and reason; consumes none
    ///
    /// Of a queue it looks at the first letters and gives them back; others do not see those
    /// meanwhile. Exit code 0: none waits; 1: some do; 2: could not read.
    DeadLetters(dead_letters::Args),
    /// Brings dead letters home: makes each item as the active region holds it, then deletes the letter
    ///
    /// Mend first what the replica refused. Works beside `run` and beside another redrive; it may be
    /// interrupted at any point. Without --apply it prints what it would do. Exit code 0: no letter is
    /// left; 1: some stay, and it says why, or only planned; 2: could not begin.
    Redrive(redrive::Args),
    /// Compares tables of two regions, live or not, and with --apply repairs the target
    ///
    /// Each side is scanned once. What differs is looked at again until it is no longer in flight.
    /// Without --apply nothing is changed. Exit code 0: equal, or repaired and verified; 1:
    /// differences remain; 2: could not run, or not to the end; 130: cut short.
    Reconcile(reconcile::Args),
    /// Makes another region the active one: fenced by its epoch, resumable, one command
    ///
    /// Without --apply it says what it would do, what may be lost, and what it does not fence. With it,
    /// the new epoch is stored in the target region, every writer of the old one is stopped or outwaited,
    /// and the exact positions are kept. Until then only the target region has to answer. The same command
    /// goes on where one that was killed stopped. Exit code 0: done; 1: only planned, or something remains
    /// that it names; 2: could not be done.
    Failover(failover::Args),
    /// Brings a region home that was active, with the writes that never left it
    ///
    /// A region that was active is in quarantine, and its worker captures what was written there and never
    /// left. Without --apply it says how much that is, how it stands to what the active region has written
    /// since, and what would become of it. With it, what was chosen is written to the active region where
    /// that still holds what it was compared with; then the region is fed again and made equal. Nothing is
    /// dropped that is not in the report. The same command goes on where one that was killed stopped. Exit code 0:
    /// done, or nobody is away; 1: only planned, something is kept, or a person has to do something first;
    /// 2: could not be done.
    Failback(failback::Args),
    /// Asks a running worker whether it lives: the probe of a container
    Health,
    /// Two embedded regions, a live workload, the worker; ends with a comparison of both tables
    #[cfg(feature = "embedded")]
    Demo(demo::Args),
}

/// Parses the command line, runs the command, and says how it ended.
pub fn main() -> Exit {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are answers, not errors. A stream that is closed takes no text.
            let _ = error.print();
            return if error.use_stderr() {
                Exit::CouldNotRun
            } else {
                Exit::Done
            };
        }
    };
    let quiet = match &cli.command {
        #[cfg(feature = "embedded")]
        Command::Demo(_) => true,
        Command::Run => false,
        _ => true,
    };
    start_logging(cli.common.log_format, quiet);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build();
    let outcome = match runtime {
        Ok(runtime) => {
            let outcome = runtime.block_on(dispatch(cli));
            // A resolver thread or a half-open connection must not hold the exit.
            runtime.shutdown_background();
            outcome
        }
        Err(error) => Err(Failure::new(
            "The program could not start its threads",
            error.to_string(),
            "Raise the limit of threads of this user or container",
        )),
    };
    match outcome {
        Ok(exit) => exit,
        Err(failure) => {
            let _ = write!(std::io::stderr(), "{failure}");
            Exit::CouldNotRun
        }
    }
}

async fn dispatch(cli: Cli) -> Result<Exit, Failure> {
    match cli.command {
        Command::Run => run::run(loaded(&cli.common)?).await,
        Command::Status(args) => status::run(loaded(&cli.common)?, &args).await,
        Command::Provision(args) => provision::run(loaded(&cli.common)?, &args).await,
        Command::Pause(args) => tap::run(loaded(&cli.common)?, tap::Turn::Pause, &args).await,
        Command::Resume(args) => tap::run(loaded(&cli.common)?, tap::Turn::Resume, &args).await,
        Command::DeadLetters(args) => dead_letters::run(loaded(&cli.common)?, &args).await,
        Command::Redrive(args) => redrive::run(loaded(&cli.common)?, &args).await,
        Command::Reconcile(args) => reconcile::run(loaded(&cli.common)?, &args).await,
        Command::Failback(args) => failback::run(loaded(&cli.common)?, &args).await,
        Command::Failover(args) => failover::run(loaded(&cli.common)?, &args).await,
        Command::Health => health::run(loaded(&cli.common)?).await,
        #[cfg(feature = "embedded")]
        Command::Demo(args) => demo::run(&args).await,
    }
}

fn loaded(common: &Common) -> Result<Loaded, Failure> {
    let environment: Vec<(String, String)> = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect();
    let loaded = load(&common.config, &environment)?;
    for name in &loaded.unknown_variables {
        tracing::warn!(
            variable = name,
            "this variable names no configuration key and is ignored"
        );
    }
    Ok(loaded)
}

fn start_logging(format: LogFormat, quiet: bool) {
    let default = if quiet { "warn" } else { "info" };
    let filter = EnvFilter::try_from_env("FARSHORE_LOG").unwrap_or_else(|_| {
        // What the SDK and the embedded server say of refused calls is said better by our errors.
        EnvFilter::new(format!(
            "{default},aws_config=error,aws_runtime=error,aws_smithy_runtime=error,dynoxide=error"
        ))
    });
    // What is shown as recent does not depend on what the log is filtered to.
    let kept = filter_fn(events::is_kept).with_max_level_hint(LevelFilter::INFO);
    let recent = events::Recent.with_filter(kept);
    let registry = tracing_subscriber::registry().with(recent);
    let logging = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    match format {
        LogFormat::Text => {
            let ansi = std::io::stderr().is_terminal();
            let logging = logging.with_target(false).with_ansi(ansi);
            registry.with(logging.with_filter(filter)).init();
        }
        LogFormat::Json => {
            let logging = logging.json().flatten_event(true);
            registry.with(logging.with_filter(filter)).init();
        }
    }
}

/// Prints an answer to stdout.
///
/// # Errors
/// A closed or full stdout.
fn answer(text: &str) -> Result<(), Failure> {
    let mut stdout = std::io::stdout().lock();
    stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.write_all(b"\n"))
        .and_then(|()| stdout.flush())
        .map_err(|error| {
            Failure::new(
                "The answer could not be printed",
                error.to_string(),
                "Give the command a stdout that takes its text",
            )
        })
}

/// Prints an answer as JSON to stdout.
///
/// # Errors
/// As [`answer`].
fn answer_json(value: &serde_json::Value) -> Result<(), Failure> {
    // The alternate form of a JSON value is its indented one.
    answer(&format!("{value:#}"))
}

/// A token that SIGTERM or Ctrl-C cancels.
///
/// # Errors
/// When the signals cannot be received.
fn stop_on_signal() -> Result<CancellationToken, Failure> {
    use tokio::signal::unix::{SignalKind, signal};
    let failed = |error: std::io::Error| {
        Failure::new(
            "Signals cannot be received",
            error.to_string(),
            "Run on a system that delivers SIGTERM to this process",
        )
    };
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let stop = CancellationToken::new();
    let stopped = stop.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        stopped.cancel();
    });
    Ok(stop)
}
