//! `farshore reconcile`: compares tables of two regions, and repairs those of one.

mod ground;
mod show;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use self::ground::{Ground, Pair, ground};
use self::show::show;
use super::one_shot::Line;
use crate::apply::batch::Writer;
use crate::apply::budget::Budget;
use crate::backoff::Backoff;
use crate::config::MaxDeletes;
use crate::config::read::Loaded;
use crate::dynamo::clock::{host_ms, rfc3339};
use crate::dynamo::{RegionClients, Regions};
use crate::error::{Exit, Failure, Operation};
use crate::jobs::reconcile::place::Place;
use crate::jobs::reconcile::report::{Counts, Lines};
use crate::jobs::reconcile::{FlowSource, Found, Reconcile, Repairs};
use crate::lease::hold::Hold;
use crate::lease::row::{JobRow, RECONCILE};
use crate::run::owner;

/// How often the row of a repair is tried to be removed.
const REMOVE_ATTEMPTS: u32 = 5;
/// How often a person is told where it stands, where there is no terminal.
const TOLD_EVERY: Duration = Duration::from_secs(30);

/// Arguments of `reconcile`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Only this table, by its name in the configuration; may be given more than once
    #[arg(long, value_name = "TABLE")]
    table: Vec<String>,
    /// The region that is right; the active one by default
    #[arg(long, value_name = "LABEL")]
    source: Option<String>,
    /// The region that is compared with it, and repaired; this one by default
    #[arg(long, value_name = "LABEL")]
    target: Option<String>,
    /// Makes the target as the source is; without it nothing is changed
    #[arg(long)]
    apply: bool,
    /// Writes a JSON line for each difference to a new file
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// With both items in every line of the report
    #[arg(long, requires = "report")]
    images: bool,
    /// Items that only the target has: more than this many (500) or this part of it (1%) are not
    /// deleted [default: reconcile.max_deletes]
    #[arg(long, value_name = "N|P%")]
    max_deletes: Option<MaxDeletes>,
    /// Parts that each table is read in [default: reconcile.segments]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    segments: Option<u32>,
    /// Read units per second on each side; 0 means no limit [default:
    /// reconcile.read_units_per_second]
    #[arg(long, value_name = "UNITS")]
    read_units: Option<u32>,
    /// Write units per second; 0 means no limit [default: writes.units_per_second]
    #[arg(long, value_name = "UNITS")]
    write_units: Option<u32>,
    /// How long a suspect is looked at where a worker applies changes [default: reconcile.settle]
    #[arg(long, value_name = "DURATION", value_parser = settle)]
    settle: Option<Duration>,
    /// Answers as JSON
    #[arg(long)]
    json: bool,
}

/// A time to settle, as the configuration takes it.
fn settle(text: &str) -> Result<Duration, String> {
    let settle = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    match settle < Duration::from_millis(100) {
        true => Err("at least 100ms: two looks have to be apart".to_owned()),
        false => Ok(settle),
    }
}

/// How one table came out.
struct Outcome {
    table: String,
    counts: Counts,
    took: Duration,
    ended: Option<String>,
    exit: Exit,
}

pub(super) async fn run(loaded: Loaded, args: &Args) -> Result<Exit, Failure> {
    super::provision::refuse_embedded(&loaded, "reconcile")?;
    for table in &args.table {
        super::tap::check_table(&loaded, Some(table))?;
    }
    let regions = Regions::connect(&loaded.config).await?;
    let ground = ground(&loaded, args, &regions).await?;
    let mut pairs = Vec::new();
    for table in &loaded.config.tables {
        if args.table.is_empty() || args.table.contains(&table.name) {
            pairs.push(ground.pair(table).await?);
        }
    }
    if args.apply {
        ground.flow(&args.table)?.refuse_closed().await?;
        for pair in &pairs {
            ground.refuse_empty_source(pair).await?;
            ground.refuse_another_table(pair).await?;
        }
    }
    let lines = match &args.report {
        None => None,
        Some(path) => Some(Arc::new(Lines::create(path, args.images).map_err(
            |error| {
                Failure::new(
                    format!("The report {} could not be made", path.display()),
                    error.to_string(),
                    "Name a file that does not exist yet, in a directory that can be written to",
                )
            },
        )?)),
    };
    eprintln!("{}", ground.plan(&pairs).await);
    let stop = super::stop_on_signal()?;
    let mut outcomes: Vec<Outcome> = Vec::new();
    for pair in &pairs {
        if stop.is_cancelled() {
            // For the same reason as the one before it, a signal or the tap.
            let exit = outcomes.last().map_or(Exit::Interrupted, |last| last.exit);
            let why = "not looked at: it ended before";
            outcomes.push(Outcome::not_begun(pair, why, exit));
            continue;
        }
        match ground.compare(pair, lines.clone(), &stop).await {
            Ok(outcome) => outcomes.push(outcome),
            // What was done to the tables before it is told all the same.
            Err(failure) if !outcomes.is_empty() => {
                let why = failure.to_string().replace('\n', " ");
                outcomes.push(Outcome::not_begun(pair, &why, Exit::CouldNotRun));
            }
            Err(failure) => {
                if let Some(path) = &args.report {
                    // Nothing is in it yet, and it would be in the next one's way.
                    let _ = std::fs::remove_file(path);
                }
                return Err(failure);
            }
        }
    }
    if let Some(lines) = &lines {
        lines.finish().map_err(|error| {
            Failure::new(
                "The report could not be written to its end",
                error.to_string(),
                "Make room on the disk and compare again",
            )
        })?;
    }
    show(&ground, &outcomes)?;
    // The most serious one: could not run, then cut short, then differences, then none.
    let rank = |exit: &Exit| match exit {
        Exit::Done => 0,
        Exit::Remains => 1,
        Exit::Interrupted => 2,
        Exit::CouldNotRun => 3,
    };
    let worst = outcomes.iter().map(|outcome| outcome.exit).max_by_key(rank);
    Ok(worst.unwrap_or(Exit::Done))
}

impl Outcome {
    fn not_begun(pair: &Pair<'_>, why: &str, exit: Exit) -> Self {
        Self {
            table: pair.table.name.clone(),
            counts: Counts::default(),
            took: Duration::ZERO,
            ended: Some(why.to_owned()),
            exit,
        }
    }
}

impl Ground<'_> {
    async fn compare(
        &self,
        pair: &Pair<'_>,
        lines: Option<Arc<Lines>>,
        stop: &CancellationToken,
    ) -> Result<Outcome, Failure> {
        let begun = Instant::now();
        let names = [pair.table.name.clone()];
        let mut held = None;
        if self.args.apply {
            let flow = self.flow(&names)?;
            // Much may have happened while the tables before it were compared.
            flow.refuse_closed().await?;
            let id = format!("{}#{}", self.target.label, pair.table.name);
            let (from, to) = (&self.source.label, &self.target.label);
            let row = JobRow {
                table: Some(pair.table.name.clone()),
                ..JobRow::new(RECONCILE, &id, self.epoch, from, to, rfc3339(host_ms()))
            };
            let subject = format!("reconcile of {} in {to}", pair.table.name);
            let (hold, took_over) = flow.hold(row, &owner(), &subject).await?;
            held = Some((flow, hold, took_over));
        }
        let job = self.job(pair, lines, held.as_ref().map(|(_, hold, _)| hold), stop);
        let done = CancellationToken::new();
        let moved = Mutex::new(None);
        let work = async {
            let result = match &held {
                Some((_, hold, _)) => hold.keep(job.run()).await,
                None => job.run().await,
            };
            done.cancel();
            result
        };
        let watched = async {
            if let Some((flow, ..)) = &held {
                flow.watch(stop, &done, &moved).await;
            }
        };
        let (result, (), ()) = tokio::join!(work, watched, self.tell(pair, &job, &done));
        let counts = job.counts();
        // What is not settled, or not deleted, may be what the one that died wrote last.
        let is_whole = result.is_ok() && counts.unsettled == 0;
        if let Some((_, hold, took_over)) = &held {
            // The row of one that died stays an alarm until one has come to its end; and so does this
            // one's where nobody verified what it wrote.
            if counts.unverified == 0 && (is_whole || !took_over) {
                remove(hold).await;
            }
        }
        let moved = moved.into_inner().unwrap_or_else(PoisonError::into_inner);
        let (ended, exit) = self.verdict(result, moved, &counts);
        Ok(Outcome {
            table: pair.table.name.clone(),
            counts,
            took: begun.elapsed(),
            ended,
            exit,
        })
    }

    fn job(
        &self,
        pair: &Pair<'_>,
        lines: Option<Arc<Lines>>,
        hold: Option<&Arc<Hold<JobRow>>>,
        stop: &CancellationToken,
    ) -> Reconcile {
        let config = &self.loaded.config;
        let table = pair.table;
        let place = |region: &RegionClients, reading| {
            let name = table.name_in(&region.label);
            Place::new(region, name, reading, self.read_units(), stop)
        };
        let repairs = hold.map(|hold| {
            let units = match self.args.write_units {
                Some(units) => (units > 0).then_some(units),
                None => config.units_per_second(table),
            };
            Repairs {
                writer: Writer::new(
                    self.target.tables.clone(),
                    table.name_in(&self.target.label),
                    &table.name,
                    Arc::new(Budget::new(units)),
                    config.dead_letters.max_attempts,
                    pair.key.clone(),
                ),
                hold: Arc::clone(hold),
                max_deletes: self
                    .args
                    .max_deletes
                    .unwrap_or(config.reconcile.max_deletes),
                late_effect: config.leases.late_effect,
            }
        });
        // Only the target's own state table says how far changes are applied to it.
        let flow = self.target_state.as_ref();
        Reconcile {
            table: table.name.clone(),
            source: place(self.source, Operation::ReadSource),
            target: place(self.target, Operation::ReadReplica),
            key_names: pair.key.iter().map(|part| part.name.clone()).collect(),
            keep_expired: pair.keep_expired.clone(),
            segments: self.segments(pair),
            memory: usize::try_from(config.reconcile.memory.as_u64()).unwrap_or(usize::MAX),
            settle: self.args.settle.unwrap_or(config.reconcile.settle),
            flow: flow.map(|state| FlowSource {
                state: state.clone(),
                epoch: self.epoch,
                patience: config.leases.duration * 2,
            }),
            repairs,
            lines,
            stop: stop.clone(),
            found: Arc::new(Found::default()),
        }
    }

    /// Says how far it is, until `done`.
    async fn tell(&self, pair: &Pair<'_>, job: &Reconcile, done: &CancellationToken) {
        let line = Line::new(self.args.json);
        let quiet = self.args.json || std::io::IsTerminal::is_terminal(&std::io::stderr());
        let mut told = Instant::now();
        loop {
            tokio::select! {
                () = done.cancelled() => return,
                () = tokio::time::sleep(Duration::from_millis(500)) => {}
            }
            let counts = job.counts();
            let read = counts.source_items + counts.target_items;
            let text = format!(
                "{}: {read} of about {} items read, {} suspects, {} differences, {} repaired",
                pair.table.name,
                pair.items.max(read as i64),
                counts.suspects,
                counts.different(),
                counts.repaired,
            );
            if !quiet && told.elapsed() >= TOLD_EVERY {
                told = Instant::now();
                eprintln!("{text}");
            }
            line.say(text);
        }
    }
}

/// Removes the row of a repair that came to its end. Left behind it would make the next one wait, and
/// be an alarm.
async fn remove(hold: &Hold<JobRow>) {
    let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(2));
    for _ in 0..REMOVE_ATTEMPTS {
        match hold.finish().await {
            Ok(_) => return,
            Err(_) => tokio::time::sleep(backoff.pause()).await,
        }
    }
    eprintln!(
        "note: the row {} of this repair could not be removed: it will show as reconcile-unfinished until the next repair has ended",
        hold.row().lease_key
    );
}
