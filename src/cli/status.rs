//! `farshore status`: all that there is to see, from the state table of this region and, where they can be
//! reached, from its workers.

mod show;

use std::io::{IsTerminal, Write};
use std::time::Duration;

use futures::future::join_all;

use super::ask::{authority, get, reachable};
use super::{answer, answer_json};
use crate::config::read::Loaded;
use crate::dynamo::Regions;
use crate::dynamo::clock::{host_ms, rfc3339};
use crate::error::{Class, Exit, Failure, Fault};
use crate::lease::control::{Verdict, newest, verdict};
use crate::lease::row::{ControlRow, ShardRow, state};
use crate::lease::table::StateTable;
use crate::observe::board::RETENTION_MS;
use crate::observe::health::{Idle, Reason, Scope};
use crate::observe::recovery::Live;
use crate::observe::view::build::{Asked, Facts, Seen, build};
use crate::observe::view::merge::merge;
use crate::observe::view::{Outage, VERSION, View};
use crate::run::proven::heard;
use crate::run::rows::Snapshot;
use crate::run::start::unusable;

/// Arguments of `status`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Answers as JSON
    #[arg(long)]
    json: bool,
    /// Looks again every two seconds, until Ctrl-C; redraws on a terminal
    #[arg(long)]
    watch: bool,
    /// A worker to ask as well, such as http://10.0.0.7:9464; may be given several times. Without it the
    /// one on worker.listen of this host is asked, if there is one
    #[arg(long, value_name = "URL")]
    worker: Vec<String>,
}

/// How often it looks with `--watch`.
const WATCH_EVERY: Duration = Duration::from_secs(2);
/// How long the active region may take to say what time it is.
const SOURCE_TIMEOUT: Duration = Duration::from_millis(1_500);

pub(super) async fn run(loaded: Loaded, args: &Args) -> Result<Exit, Failure> {
    super::provision::refuse_embedded(&loaded, "status")?;
    let regions = Regions::connect(&loaded.config).await?;
    let workers = workers(&loaded, args)?;
    if !args.watch {
        let view = look(&loaded, &regions, &workers).await?;
        print(&loaded, args, &view)?;
        return Ok(exit(&view));
    }
    let stop = super::stop_on_signal()?;
    let mut last = Exit::CouldNotRun;
    loop {
        let looked = tokio::select! {
            looked = look(&loaded, &regions, &workers) => looked,
            () = stop.cancelled() => return Ok(last),
        };
        if std::io::stdout().is_terminal() && !args.json {
            clear()?;
        }
        match looked {
            Ok(view) => {
                print(&loaded, args, &view)?;
                last = exit(&view);
            }
            // What cannot be read now may be read in a moment.
            Err(failure) => {
                let _ = write!(std::io::stderr(), "{failure}");
                last = Exit::CouldNotRun;
            }
        }
        tokio::select! {
            () = tokio::time::sleep(WATCH_EVERY) => {}
            () = stop.cancelled() => return Ok(last),
        }
    }
}

fn print(loaded: &Loaded, args: &Args, view: &View) -> Result<(), Failure> {
    match args.json {
        // One view a line where there are many.
        true if args.watch => answer(&json(view)?.to_string()),
        true => answer_json(&json(view)?),
        false => answer(&show::as_text(loaded, view)),
    }
}

fn json(view: &View) -> Result<serde_json::Value, Failure> {
    serde_json::to_value(view).map_err(|error| {
        Failure::new(
            "The status could not be written as JSON",
            error.to_string(),
            "Report this",
        )
    })
}

/// Clears a terminal and goes to its upper left corner.
fn clear() -> Result<(), Failure> {
    let mut stdout = std::io::stdout().lock();
    let cleared = stdout
        .write_all(b"\x1b[H\x1b[2J")
        .and_then(|()| stdout.flush());
    cleared.map_err(|error| {
        Failure::new(
            "The terminal could not be cleared",
            error.to_string(),
            "Give the command a stdout that takes its text",
        )
    })
}

/// 1 where something needs a person.
fn exit(view: &View) -> Exit {
    match view.reasons.is_empty() {
        true => Exit::Done,
        false => Exit::Remains,
    }
}

/// The workers to be asked, as `host:port`, and whether a person named them.
fn workers(loaded: &Loaded, args: &Args) -> Result<Vec<(String, bool)>, Failure> {
    if args.worker.is_empty() {
        let own = reachable(loaded.config.worker.listen);
        return Ok(vec![(own.to_string(), false)]);
    }
    let named = args.worker.iter().map(|url| {
        let authority = authority(url).map_err(|why| {
            Failure::new(
                format!("The worker {url} cannot be asked"),
                why,
                "Give its address as http://HOST:PORT",
            )
        });
        authority.map(|authority| (authority, true))
    });
    named.collect()
}

/// One look at everything.
async fn look(
    loaded: &Loaded,
    regions: &Regions,
    workers: &[(String, bool)],
) -> Result<View, Failure> {
    let Some(region) = regions.get(&loaded.here) else {
        return Err(Failure::new(
            format!("Region {} is not known", loaded.here),
            "It is not in the configuration",
            "Set `here` to one of the regions",
        ));
    };
    let state = StateTable::new(region.tables.clone(), loaded.config.state_table());
    let answers = join_all(workers.iter().map(|worker| ask(loaded, worker)));
    // Before the rows are read: what a worker says then is no newer than they are.
    let answers: Vec<View> = answers.await.into_iter().flatten().collect();
    let rows = state.rows().await;
    let rows = rows.map_err(|fault| unusable(region, state.name(), &fault))?;
    let mut rows = Snapshot::of(rows);
    let told = elsewhere(loaded, regions).await;
    let conflict = highest(loaded, &mut rows, &told);
    let active = rows.control.as_ref().map(|control| control.active.as_str());
    let active = active.unwrap_or(&loaded.config.active);
    let mut asked = vec![Asked {
        label: loaded.here.clone(),
        trouble: None,
    }];
    let source = regions.get(active).filter(|_| active != loaded.here);
    if let Some(source) = source {
        let answer = told.iter().find(|(label, _)| *label == source.label);
        let trouble = answer.and_then(|(_, answer)| answer.clone().err());
        let is_away = |class: Class| matches!(class, Class::Network | Class::Service);
        asked.push(Asked {
            label: source.label.clone(),
            trouble: trouble
                .filter(|fault| is_away(fault.class))
                .map(|fault| (fault, None)),
        });
    }
    // A worker says better since when, if it sees the same.
    let outages = asked.iter().filter_map(away).collect();
    let source_clock = source.and_then(|source| source.clock.reading());
    let (clock, clock_of) = heard(source_clock, region.clock.reading());
    let mut view = build(Seen {
        config: &loaded.config,
        here: &loaded.here,
        active: None,
        clock,
        clock_of,
        replica_ms: region.clock.now_ms(),
        host_ms: host_ms(),
        rows: rows.seen(),
        live: &Live::new(),
        facts: Facts {
            asked,
            outages,
            reasons: conflict.into_iter().collect(),
            ..Facts::default()
        },
    });
    merge(&mut view, &answers);
    Ok(view)
}

/// What the state tables of the other regions say of who is active. For their clocks as well, and to see
/// whether they answer.
async fn elsewhere(
    loaded: &Loaded,
    regions: &Regions,
) -> Vec<(String, Result<Option<ControlRow>, Fault>)> {
    let others = regions.iter().filter(|region| region.label != loaded.here);
    let asked = others.map(|region| async {
        let tables = region.tables_within(SOURCE_TIMEOUT);
        let control = StateTable::new(tables, loaded.config.state_table());
        (region.label.clone(), control.control().await)
    });
    join_all(asked).await
}

/// Lets the record of the highest epoch count, wherever it was found. Returns the reason why none does,
/// where they contradict each other.
fn highest(
    loaded: &Loaded,
    rows: &mut Snapshot,
    told: &[(String, Result<Option<ControlRow>, Fault>)],
) -> Option<Reason> {
    let told = told
        .iter()
        .filter_map(|(_, answer)| answer.as_ref().ok()?.as_ref());
    let own = rows.control.clone();
    let of_group = told
        .chain(own.as_ref())
        .filter(|row| row.group == loaded.config.group);
    let seen: Vec<&ControlRow> = of_group.collect();
    match verdict(seen.iter().copied()) {
        Verdict::Decided { active, epoch } => {
            let newest = newest(seen, &active, epoch).cloned();
            let quarantined = own.as_ref().is_some_and(|own| own.state == state::QUARANTINED);
            // What is read here says more of here than any other.
            let returned = newest
                .as_ref()
                .is_some_and(|newest| newest.has_returned(&loaded.here));
            let is_old = own.as_ref().is_none_or(|own| own.epoch < epoch);
            if is_old || returned || !quarantined {
                rows.control = newest.or(own);
            }
            None
        }
        Verdict::Conflict { epoch, actives } => Some(
            Idle::Unknown(Failure::new(
                format!("Epoch {epoch} names several active regions: {}", actives.join(", ")),
                "nobody applies until that is decided",
                "Decide which region is active, and make a higher epoch: `farshore failover --to LABEL --accept-loss conflict`",
            ))
            .reason(),
        ),
        Verdict::FromFile | Verdict::Unknown => None,
    }
}

/// The outage of a region that was asked now and does not answer.
fn away(asked: &Asked) -> Option<Outage> {
    let (fault, _) = asked.trouble.as_ref()?;
    Some(Outage {
        scope: Scope::Source.label().to_owned(),
        table: None,
        region: asked.label.clone(),
        since: rfc3339(host_ms()),
        class: fault.class.label().to_owned(),
        text: fault.summary().to_owned(),
        next: fault.next_step().to_owned(),
    })
}

/// What a worker of this group and region says; `None` where none does.
async fn ask(loaded: &Loaded, (worker, is_named): &(String, bool)) -> Option<View> {
    let view = match get(worker, "/status").await {
        Ok((status, body)) if status.is_success() => {
            serde_json::from_slice::<View>(&body).map_err(|error| error.to_string())
        }
        Ok((status, _)) => Err(format!("it answers {status}")),
        Err(error) => Err(error.to_string()),
    };
    let why = match view {
        Ok(view) if view.version != VERSION => "it runs another version".to_owned(),
        Ok(view) if view.group != loaded.config.group || view.here != loaded.here => {
            "it is a worker of another group or region".to_owned()
        }
        Ok(view) => return Some(view),
        Err(why) => why,
    };
    if *is_named {
        tracing::warn!(worker, why, "this worker is not seen");
    }
    None
}

/// The least headroom of the open shards of `table`, in seconds.
pub(super) fn headroom_of(open: &[ShardRow], table: &str) -> Option<i64> {
    open.iter()
        .filter(|row| row.table == table)
        .filter_map(|row| Some((row.watermark? + RETENTION_MS - host_ms()).max(0) / 1_000))
        .min()
}
