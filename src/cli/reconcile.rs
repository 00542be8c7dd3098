//! `farshore reconcile`: compares tables of two regions, and repairs those of one.

mod ground;
mod job;
mod show;

use std::path::PathBuf;
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use self::ground::{Ground, Pair, ground};
use self::job::Asked;
use self::show::{Bar, show};
use crate::apply::batch::Writer;
use crate::apply::budget::Budget;
use crate::apply::conditional::Conditional;
use crate::config::MaxDeletes;
use crate::config::read::Loaded;
use crate::dynamo::{RegionClients, Regions};
use crate::error::{Exit, Failure, Operation};
use crate::jobs::reconcile::desk::Desk;
use crate::jobs::reconcile::flow::FlowSource;
use crate::jobs::reconcile::place::Place;
use crate::jobs::reconcile::report::{Counts, Lines};
use crate::jobs::reconcile::strategy::Strategy;
use crate::jobs::reconcile::{Ended, Found, Reconcile, Repairs, SEGMENTS_AT_ONCE, WAIT_FOR_OTHERS};
use crate::lease::budget_keeper::BudgetKeeper;
use crate::run::owner;

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
    /// Repairs the target; without it nothing is changed
    #[arg(long)]
    apply: bool,
    /// How it is repaired: `mirror` makes it as the source is, `fill` adds what it lacks,
    /// `newest=ATTRIBUTE` lets the item stay whose attribute is greater [default: mirror]
    #[arg(long, value_name = "STRATEGY")]
    strategy: Option<Strategy>,
    /// Goes on with a job that was cut short, or takes part in one at work
    #[arg(long, value_name = "JOB",
        conflicts_with_all = ["table", "source", "target", "apply", "strategy", "max_deletes", "segments"])]
    resume: Option<String>,
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
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    segments: Option<u32>,
    /// Read units per second on each side; 0 means no limit [default:
    /// reconcile.read_units_per_second]
    #[arg(long, value_name = "UNITS")]
    read_units: Option<u32>,
    /// Write units per second of this process, at most: a part of the table's budget
    /// (writes.units_per_second), which the workers share; 0 sets no bound of its own
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
    /// Whether it can be gone on with.
    resumable: bool,
    exit: Exit,
}

pub(super) async fn run(loaded: Loaded, args: &Args) -> Result<Exit, Failure> {
    super::provision::refuse_embedded(&loaded, "reconcile")?;
    for table in &args.table {
        super::tap::check_table(&loaded, Some(table))?;
    }
    let regions = Regions::connect(&loaded.config).await?;
    let asked = match &args.resume {
        Some(job) => Asked::resumed(&loaded, &regions, job).await?,
        None => Asked::by(args),
    };
    for plan in &asked.plans {
        super::tap::check_table(&loaded, Some(&plan.table))?;
    }
    let ground = ground(&loaded, args, asked, &regions).await?;
    let asked = &ground.asked;
    let mut pairs = Vec::new();
    for table in &loaded.config.tables {
        if asked.tables.is_empty() || asked.tables.contains(&table.name) {
            pairs.push(ground.pair(table).await?);
        }
    }
    if asked.apply {
        ground.flow(&asked.tables)?.refuse_closed().await?;
        for pair in &pairs {
            ground.refuse_empty_source(pair).await?;
            ground.refuse_another_table(pair).await?;
        }
    }
    let lines = match &args.report {
        None => None,
        Some(path) => {
            let lines = Lines::create(path, args.images, asked.is_resumed());
            Some(Arc::new(lines.map_err(|error| {
                Failure::new(
                    format!("The report {} could not be made", path.display()),
                    error.to_string(),
                    "Name a file that does not exist yet, in a directory that can be written to",
                )
            })?))
        }
    };
    let stored = match ground.begin(&pairs).await {
        Ok(stored) => stored,
        Err(failure) => {
            forget(args);
            return Err(failure);
        }
    };
    if stored && asked.apply {
        // A failover that began before the job was stored has not seen it: then its record is there to be
        // seen.
        if let Err(failure) = ground.flow(&asked.tables)?.refuse_closed().await {
            forget(args);
            return Err(failure);
        }
    }
    eprintln!("{}", ground.plan(&pairs).await);
    if stored {
        eprintln!(
            "job {id}: `farshore reconcile --resume {id}` goes on with it if it is cut short, or takes part in it from another host",
            id = asked.id
        );
    }
    let stop = super::stop_on_signal()?;
    let done = CancellationToken::new();
    let compared = async {
        let compared = ground.compare_all(&pairs, &lines, &stop, stored).await;
        done.cancel();
        compared
    };
    let (outcomes, ()) = tokio::join!(compared, ground.stay(&pairs, stored, &done));
    let outcomes = outcomes?;
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
            resumable: false,
            exit,
        }
    }
}

/// Removes a report with nothing in it, which would be in the next one's way.
fn forget(args: &Args) {
    if let Some(path) = &args.report
        && std::fs::metadata(path).is_ok_and(|file| file.len() == 0)
    {
        let _ = std::fs::remove_file(path);
    }
}

impl Ground<'_> {
    async fn compare_all(
        &self,
        pairs: &[Pair<'_>],
        lines: &Option<Arc<Lines>>,
        stop: &CancellationToken,
        stored: bool,
    ) -> Result<Vec<Outcome>, Failure> {
        let mut outcomes: Vec<Outcome> = Vec::new();
        for pair in pairs {
            if stop.is_cancelled() {
                // For the same reason as the one before it, a signal or the tap.
                let exit = outcomes.last().map_or(Exit::Interrupted, |last| last.exit);
                let why = "not looked at: it ended before";
                outcomes.push(Outcome::not_begun(pair, why, exit));
                continue;
            }
            match self.compare(pair, lines.clone(), stop, stored).await {
                Ok(outcome) => outcomes.push(outcome),
                // What was done to the tables before it is told all the same.
                Err(failure) if !outcomes.is_empty() => {
                    let why = failure.to_string().replace('\n', " ");
                    outcomes.push(Outcome::not_begun(pair, &why, Exit::CouldNotRun));
                }
                Err(failure) => {
                    forget(self.args);
                    return Err(failure);
                }
            }
        }
        Ok(outcomes)
    }

    async fn compare(
        &self,
        pair: &Pair<'_>,
        lines: Option<Arc<Lines>>,
        stop: &CancellationToken,
        stored: bool,
    ) -> Result<Outcome, Failure> {
        let begun = Instant::now();
        let names = [pair.table.name.clone()];
        let flow = match self.asked.apply {
            true => Some(self.flow(&names)?),
            false => None,
        };
        if let Some(flow) = &flow {
            // Much may have happened while the tables before it were compared.
            flow.refuse_closed().await?;
            self.refuse_another(std::slice::from_ref(pair)).await?;
        }
        let stop = stop.child_token();
        let desk = self.desk(pair, stored, &stop).await?;
        let (budgets, budget) = self.budget(pair);
        let job = self.job(pair, desk, lines, budget, &stop);
        let done = CancellationToken::new();
        let moved = Mutex::new(None);
        let work = async {
            let result = job.run().await;
            done.cancel();
            result
        };
        let watched = async {
            if let Some(flow) = &flow {
                flow.watch(&stop, &done, &moved).await;
            }
        };
        let shared = async {
            if let Some(budgets) = &budgets {
                budgets.keep_until(&done).await;
            }
        };
        let (result, (), (), ()) =
            tokio::join!(work, watched, shared, self.tell(pair, &job, &done));
        let (counts, result) = match result {
            Ok(counts) => (counts, Ok(())),
            Err((counts, ended)) => (counts, Err(ended)),
        };
        // What is not settled, or not deleted, may be what one that died wrote last.
        let mirrors = self.asked.apply && self.asked.strategy == Strategy::Mirror;
        let whole = mirrors && result.is_ok() && counts.unsettled == 0;
        let equal = whole && counts.remaining() == 0;
        self.clean(&pair.table.name, whole, equal).await;
        let moved = moved.into_inner().unwrap_or_else(PoisonError::into_inner);
        let resumable = stored
            && !matches!(
                result,
                Ok(()) | Err(Ended::TooManyDeletes { .. } | Ended::Gone)
            );
        let (ended, exit) = self.verdict(result, moved, &counts);
        Ok(Outcome {
            table: pair.table.name.clone(),
            counts,
            took: begun.elapsed(),
            ended,
            resumable,
            exit,
        })
    }

    /// What may be written with: a share of the fleet's, where the target has a fleet.
    fn budget(&self, pair: &Pair<'_>) -> (Option<BudgetKeeper>, Arc<Budget>) {
        let config = &self.loaded.config;
        let table = pair.table;
        let most = self.args.write_units.filter(|units| *units > 0);
        match &self.target_state {
            Some(state) if self.asked.apply => {
                let (state, me) = (state.clone(), owner());
                let budgets = BudgetKeeper::new(state, &me, config, [table], most);
                let budget = budgets.budget(&table.name);
                (Some(budgets), budget)
            }
            _ => {
                let limits = [config.units_per_second(table), most];
                let units = limits.into_iter().flatten().min();
                let budget = Budget::fixed(units, config.writes.adaptive);
                (None, Arc::new(budget))
            }
        }
    }

    fn job(
        &self,
        pair: &Pair<'_>,
        desk: Desk,
        lines: Option<Arc<Lines>>,
        budget: Arc<Budget>,
        stop: &CancellationToken,
    ) -> Reconcile {
        let config = &self.loaded.config;
        let table = pair.table;
        let place = |region: &RegionClients, reading| {
            let name = table.name_in(&region.label);
            let units = self.read_units();
            Arc::new(Place::new(region, name, reading, units, stop))
        };
        let key_names: Vec<String> = pair.key.iter().map(|part| part.name.clone()).collect();
        let repairs = self.asked.apply.then(|| {
            let term = &self.term;
            let (client, name) = (&self.target.tables, table.name_in(&self.target.label));
            Repairs {
                writer: Arc::new(
                    Writer::new(
                        client.clone(),
                        name,
                        &table.name,
                        Arc::clone(&budget),
                        config.dead_letters.max_attempts,
                        pair.key.clone(),
                    )
                    .within_term(Arc::clone(term)),
                ),
                heard_by: None,
                conditional: Conditional::new(client.clone(), name, key_names.clone(), budget)
                    .within_term(Arc::clone(term)),
                max_deletes: self
                    .asked
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
            key_names: key_names.into(),
            keep_expired: pair.keep_expired.clone(),
            segments: match &desk {
                Desk::Shared(shared) => shared.plan.segments,
                Desk::Alone(_) => self.segments(pair),
            },
            desk,
            at_once: SEGMENTS_AT_ONCE,
            wait: WAIT_FOR_OTHERS,
            strategy: self.asked.strategy.clone(),
            eager: false,
            memory: usize::try_from(config.reconcile.memory.as_u64()).unwrap_or(usize::MAX),
            settle: self.args.settle.unwrap_or(config.reconcile.settle),
            flow: flow.map(|state| {
                FlowSource::new(state.clone(), self.epoch, config.leases.duration * 2)
            }),
            repairs,
            lines,
            stop: stop.clone(),
            found: Arc::new(Found::default()),
            lost: AtomicU32::new(0),
        }
    }

    /// Says how far it is, until `done`.
    async fn tell(&self, pair: &Pair<'_>, job: &Reconcile, done: &CancellationToken) {
        let bar = Bar::new(self.args.json, &pair.table.name, pair.items);
        let quiet = self.args.json || std::io::IsTerminal::is_terminal(&std::io::stderr());
        let mut told = Instant::now();
        loop {
            tokio::select! {
                () = done.cancelled() => return,
                () = tokio::time::sleep(Duration::from_millis(500)) => {}
            }
            let counts = job.found.counts();
            let read = counts.source_items + counts.target_items;
            let found = format!(
                "{} suspects, {} differences, {} repaired",
                counts.suspects,
                counts.different(),
                counts.repaired,
            );
            if !quiet && told.elapsed() >= TOLD_EVERY {
                told = Instant::now();
                let items = pair.items.max(i64::try_from(read).unwrap_or(i64::MAX));
                eprintln!(
                    "{}: {read} of about {items} items read, {found}",
                    pair.table.name
                );
            }
            bar.say(read, found);
        }
    }
}
