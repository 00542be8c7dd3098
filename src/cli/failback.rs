//! `farshore failback`: a region that was active comes home, with the writes that never left it.

mod show;

use std::path::PathBuf;

use super::failover::Progress;
use crate::config::read::Loaded;
use crate::dynamo::Regions;
use crate::error::{Exit, Failure};
use crate::jobs::failback::find::{Way, find};
use crate::jobs::failback::judge::{ConflictPolicy, StrandedPolicy};
use crate::jobs::failback::judging::Counts;
use crate::jobs::failback::kept::kept;
use crate::jobs::failback::report::Lines;
use crate::jobs::failback::{Ended, Home, Policies, step};
use crate::jobs::failover::Watcher as _;

/// Arguments of `failback`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The region that comes home, by its label; needed where several wait
    #[arg(long, value_name = "LABEL")]
    region: Option<String>,
    /// Stranded writes of keys that the active region has not written since: `apply` writes them there,
    /// `keep` leaves them in the store, `discard` reports and drops them
    #[arg(long, value_name = "WHAT", default_value = "apply", value_parser = stranded)]
    stranded: StrandedPolicy,
    /// Stranded writes of keys that the active region has written since: `active` reports and drops them,
    /// `newest=ATTR` applies those whose attribute ATTR is greater, `keep` leaves them in the store
    #[arg(long, value_name = "WHAT", default_value = "keep", value_parser = conflicts)]
    conflicts: ConflictPolicy,
    /// Writes a JSON line for each stranded write that is not applied, with both values: it holds items. Without
    /// --apply: for each that is not equal, with what would become of it
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Does it; without it nothing is changed
    #[arg(long)]
    apply: bool,
    /// Answers as JSON
    #[arg(long)]
    json: bool,
}

fn stranded(text: &str) -> Result<StrandedPolicy, String> {
    match text {
        "apply" => Ok(StrandedPolicy::Apply),
        "keep" => Ok(StrandedPolicy::Keep),
        "discard" => Ok(StrandedPolicy::Discard),
        _ => Err("it is `apply`, `keep` or `discard`".to_owned()),
    }
}

fn conflicts(text: &str) -> Result<ConflictPolicy, String> {
    match text.split_once('=') {
        None if text == "active" => Ok(ConflictPolicy::Active),
        None if text == "keep" => Ok(ConflictPolicy::Keep),
        Some(("newest", attribute)) if !attribute.is_empty() => {
            Ok(ConflictPolicy::Newest(attribute.to_owned()))
        }
        _ => Err("it is `active`, `keep` or `newest=ATTRIBUTE`".to_owned()),
    }
}

impl Args {
    fn policies(&self) -> Policies {
        Policies {
            stranded: self.stranded,
            conflicts: self.conflicts.clone(),
        }
    }
}

pub(super) async fn run(loaded: Loaded, args: &Args) -> Result<Exit, Failure> {
    super::provision::refuse_embedded(&loaded, "failback")?;
    let regions = Regions::connect(&loaded.config).await?;
    let stop = super::stop_on_signal()?;
    let config = &loaded.config;
    let mut home = match find(config, &regions, args.region.as_deref(), &stop).await? {
        Way::Home(home) => *home,
        Way::None { active, epoch } => {
            let mut report = args.report.as_deref().map(Lines::open).transpose()?;
            let drops = args.apply && args.stranded == StrandedPolicy::Discard;
            if drops && report.is_none() {
                return Err(Failure::new(
                    "What is kept would be dropped",
                    "Nothing is dropped that is not in a report",
                    "Say where it is to be written: --report FILE",
                ));
            }
            let kept = kept(config, &regions, &mut report, drops).await?;
            return show::nobody(&loaded, (&active, epoch), &kept, args);
        }
    };
    // Before anything else: a report that cannot be written must not be found out in the middle.
    let mut report = args.report.as_deref().map(Lines::open).transpose()?;
    let mut line = Progress::new(args.json);
    if !args.apply {
        let looked = look(&mut home, args, &mut report, &mut line).await;
        drop(line);
        return match looked {
            Ok(looked) => {
                show::plan(&home, &looked, args)?;
                Ok(Exit::Remains)
            }
            Err(ended) => ended_as(&home, ended, args),
        };
    }
    let done = home.run(&args.policies(), &mut report, &mut line).await;
    drop(line);
    match done {
        Ok(done) => show::done(&home, &done, args),
        Err(ended) => ended_as(&home, ended, args),
    }
}

fn ended_as(home: &Home<'_>, ended: Ended, args: &Args) -> Result<Exit, Failure> {
    match ended {
        Ended::Failed(failure) => Err(failure),
        Ended::Waits(failure) => {
            show::waits(home, &failure, args)?;
            Ok(Exit::Remains)
        }
        Ended::Stopped => {
            eprintln!("cut short: type the same command again, and it goes on where it stopped");
            Ok(Exit::Interrupted)
        }
    }
}

/// What the plan shows of a table.
struct Looked {
    table: String,
    /// How far what is stranded is captured; absent where nobody has begun.
    capture: Option<crate::lease::row::TrackRow>,
    /// Keys of the ledger.
    ledger_keys: usize,
    /// Why the ledger does not tell everything.
    ledger_lacks: Option<String>,
    counts: Counts,
}

async fn look(
    home: &mut Home<'_>,
    args: &Args,
    report: &mut Option<Lines>,
    line: &mut Progress,
) -> Result<Vec<Looked>, Ended> {
    let mut looked = Vec::new();
    if home.is_done(step::TURNED) {
        return Ok(looked);
    }
    home.check_streams().await?;
    for table in &home.config.tables {
        line.under_way(&format!("looking at {}", table.name));
        let capture = home.capture(&table.name).await?;
        let mut counts = Counts::default();
        let mut reading = home.open_ledger(table).await?;
        if capture.is_some() {
            let judged = home
                .judge(table, &mut reading, &args.policies(), &mut counts, line)
                .await?;
            home.tell_all(report, table, &judged).await?;
        }
        looked.push(Looked {
            table: table.name.clone(),
            capture,
            ledger_keys: reading.keys(),
            ledger_lacks: reading.lacks,
            counts,
        });
    }
    Ok(looked)
}
