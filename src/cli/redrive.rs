//! `farshore redrive`: brings dead letters home.

use std::collections::{BTreeMap, BTreeSet};
use std::io::IsTerminal;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::{answer, answer_json};
use crate::config::TtlDeletes;
use crate::config::read::Loaded;
use crate::dead_letter::Store;
use crate::dead_letter::survey::{Survey, survey};
use crate::dynamo::Regions;
use crate::dynamo::clock::{host_ms, rfc3339};
use crate::dynamo::table::ttl_attribute;
use crate::error::{Exit, Failure, Fault};
use crate::jobs::redrive::{Options, Redrive, Report, Watcher};
use crate::lease::hold::{Hold, Terms};
use crate::lease::row::{JobRow, Row};
use crate::lease::rules::take_name;
use crate::repair::KeepExpired;
use crate::run::owner;
use crate::run::start::{Feed, Role, find_role, unusable};

/// How many letters of a queue are looked at for a plan.
const LOOK_MAX: u64 = 1_000;
const KIND: &str = "redrive";

/// Arguments of `redrive`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Only letters of this table, by its name in the configuration
    #[arg(long, value_name = "TABLE")]
    table: Option<String>,
    /// At most so many letters
    #[arg(long, value_name = "N")]
    limit: Option<u64>,
    /// At most so many letters a second
    #[arg(long, value_name = "N")]
    rate: Option<NonZeroU32>,
    /// Does it; without it nothing is changed
    #[arg(long)]
    apply: bool,
    /// Answers as JSON
    #[arg(long)]
    json: bool,
}

pub(super) async fn run(loaded: Loaded, args: &Args) -> Result<Exit, Failure> {
    super::provision::refuse_embedded(&loaded, "redrive")?;
    super::tap::check_table(&loaded, args.table.as_deref())?;
    let regions = Regions::connect(&loaded.config).await?;
    let feed = match find_role(&loaded, &regions).await? {
        Role::Feed(feed) => feed,
        Role::Standby { active } => {
            return Err(Failure::new(
                format!("There are no dead letters to bring home in {active}"),
                "It is the active region: nothing is fed into it",
                "Set AWS_REGION (or `here`) to the region whose replica is fed, and ask again",
            ));
        }
    };
    let state_failed = |fault: Fault| unusable(&feed.target, feed.state.name(), &fault);
    let followed = followed(&feed, &loaded).await.map_err(state_failed)?;
    refuse_closed(&feed, &loaded, args.table.as_deref())
        .await
        .map_err(state_failed)??;
    if !args.apply {
        return plan(&loaded, &feed, args).await;
    }
    let hold = hold(&loaded, &feed).await?;
    let stop = super::stop_on_signal()?;
    let options = Options {
        table: args.table.clone(),
        limit: args.limit,
        rate: args.rate,
    };
    let keep_expired = keep_expired(&loaded, &feed).await?;
    let ended = Arc::new(std::sync::Mutex::new(None));
    let redrive = Redrive::new(
        &loaded.config,
        &feed,
        &options,
        Arc::clone(&hold),
        followed,
        keep_expired,
        &stop,
    );
    let mut watcher = Progress::new(&loaded, &feed, args);
    let done = CancellationToken::new();
    let watched = watch_flow(&feed, &loaded, &stop, &done, &ended);
    let work = async {
        let report = hold.keep(redrive.run(&mut watcher)).await;
        done.cancel();
        report
    };
    let (mut report, ()) = tokio::join!(work, watched);
    if let Some(why) = ended.lock().ok().and_then(|mut why| why.take()) {
        report.ended = Some(why);
    }
    // A directory hides nothing: the row speaks for the write that may still take effect.
    if !(report.unanswered && matches!(feed.dead_letters, Store::Directory(_))) {
        // Left behind it would only make the next redrive of a directory wait.
        let _ = hold.finish().await;
    }
    if let Store::Directory(directory) = &feed.dead_letters {
        let tidied = directory.tidy().await;
        if let Err(fault) = tidied {
            tracing::warn!(
                code = fault.code,
                "files of older days could not be removed"
            );
        }
    }
    show(&report, &feed, args)?;
    Ok(match report.left.is_empty() && report.ended.is_none() {
        true => Exit::Done,
        false => Exit::Remains,
    })
}

/// The tables whose shards a worker of this epoch has begun to follow: later records of their items
/// will be applied.
async fn followed(feed: &Feed, loaded: &Loaded) -> Result<BTreeSet<String>, Fault> {
    let rows = feed.state.rows().await?;
    let followed: BTreeSet<String> = rows
        .into_iter()
        .filter_map(|row| match row {
            Row::Shard(row) if row.epoch == feed.epoch => Some(row.table),
            _ => None,
        })
        .collect();
    let tables = loaded.config.tables.iter().map(|table| &table.name);
    Ok(tables
        .filter(|name| followed.contains(*name))
        .cloned()
        .collect())
}

/// Why nothing may be written now: the epoch has moved, or a tap is closed.
async fn closed(
    feed: &Feed,
    loaded: &Loaded,
    wanted: Option<&str>,
) -> Result<Option<String>, Fault> {
    if let Some(control) = feed.state.control().await?
        && (control.epoch != feed.epoch || control.active != feed.active)
    {
        return Ok(Some(format!(
            "the active region is {} since epoch {}",
            control.active, control.epoch
        )));
    }
    let mut pauses = vec![feed.state.pause(None).await?];
    for table in &loaded.config.tables {
        if wanted.is_none_or(|wanted| wanted == table.name) {
            pauses.push(feed.state.pause(Some(&table.name)).await?);
        }
    }
    let standing = pauses.into_iter().flatten().find(|row| row.is_closed());
    Ok(standing.map(|row| {
        let subject = row.table.unwrap_or_else(|| "all tables".to_owned());
        format!(
            "the tap of {subject} is closed by {}: {}",
            row.by, row.reason
        )
    }))
}

async fn refuse_closed(
    feed: &Feed,
    loaded: &Loaded,
    wanted: Option<&str>,
) -> Result<Result<(), Failure>, Fault> {
    Ok(match closed(feed, loaded, wanted).await? {
        None => Ok(()),
        Some(why) => Err(Failure::new(
            "Nothing may be written to the replica now",
            why,
            "Open the tap with `farshore resume` (or name one open table with --table), and ask again",
        )),
    })
}

/// Ends the redrive when the epoch moves or a tap closes, until `done`.
async fn watch_flow(
    feed: &Feed,
    loaded: &Loaded,
    stop: &CancellationToken,
    done: &CancellationToken,
    ended: &std::sync::Mutex<Option<String>>,
) {
    loop {
        tokio::select! {
            () = done.cancelled() => return,
            () = tokio::time::sleep(loaded.config.leases.duration / 3) => {}
        }
        // A failure says nothing; the hold ends by itself where the state table stays away.
        if let Ok(Some(why)) = closed(feed, loaded, None).await {
            if let Ok(mut ended) = ended.lock() {
                *ended = Some(why);
            }
            stop.cancel();
            return;
        }
    }
}

/// The row of this job. A directory has one job at a time, for it hides nothing from a second one.
async fn hold(loaded: &Loaded, feed: &Feed) -> Result<Arc<Hold<JobRow>>, Failure> {
    let terms = Terms {
        state: feed.state.clone(),
        clock: Arc::clone(&feed.target.clock),
        duration: loaded.config.leases.duration,
        late_effect: loaded.config.leases.late_effect,
    };
    let me = owner();
    let id = match &feed.dead_letters {
        Store::Queue(_) => me.replace('#', "-"),
        Store::Directory(directory) => directory.place().display().to_string(),
    };
    let at = rfc3339(host_ms());
    let (source, target) = (&feed.source.label, &feed.target.label);
    let row = JobRow::new(KIND, &id, feed.epoch, source, target, at);
    let holder = take_name(&me, rand::random());
    let failed = |fault: Fault| unusable(&feed.target, feed.state.name(), &fault);
    let known = feed.state.job(&row.lease_key).await.map_err(failed)?;
    let held = match known {
        None => Hold::create(terms, row, holder).await,
        Some(known) if known.until <= feed.target.clock.now_ms() => {
            let row = JobRow {
                lease_counter: known.lease_counter,
                until: known.until,
                ..row
            };
            Hold::take(terms, row, holder).await
        }
        Some(known) => {
            return Err(Failure::new(
                "Another redrive of this directory is at work, or died a short while ago",
                format!(
                    "It began at {}, and its writes may take effect until {}",
                    known.at,
                    rfc3339(known.until)
                ),
                "Wait until then, or until it has ended, and ask again",
            ));
        }
    };
    held.map_err(failed)?.ok_or_else(|| {
        Failure::new(
            "Another redrive of this directory began at the same moment",
            "Both would have worked at the same letters",
            "Wait until it has ended, and ask again",
        )
    })
}

async fn keep_expired(
    loaded: &Loaded,
    feed: &Feed,
) -> Result<BTreeMap<String, KeepExpired>, Failure> {
    let mut kept = BTreeMap::new();
    let tables = loaded.config.tables.iter();
    for table in tables.filter(|table| table.ttl_deletes == TtlDeletes::Skip) {
        let name = table.name_in(&feed.source.label);
        let attribute = ttl_attribute(&feed.source.tables, name)
            .await
            .map_err(|fault| unusable(&feed.source, name, &fault))?;
        if let Some(attribute) = attribute {
            kept.insert(table.name.clone(), KeepExpired { attribute });
        }
    }
    Ok(kept)
}

/// Says what would be done.
async fn plan(loaded: &Loaded, feed: &Feed, args: &Args) -> Result<Exit, Failure> {
    let place = feed.dead_letters.name();
    let found: Survey = survey(&feed.dead_letters, LOOK_MAX)
        .await
        .map_err(|fault| {
            Failure::from_fault(
                format!("The dead letters in {place} could not be read"),
                &fault,
            )
        })?;
    let tables: Vec<String> = loaded
        .config
        .tables
        .iter()
        .filter(|table| args.table.as_deref().is_none_or(|name| name == table.name))
        .map(|table| {
            format!(
                "will OVERWRITE items of {} in {} with what {} holds, where a letter names them",
                table.name_in(&feed.target.label),
                feed.target.label,
                feed.source.label
            )
        })
        .collect();
    if args.json {
        answer_json(&json!({
            "version": 1,
            "command": "redrive",
            "applied": false,
            "waiting": found.waiting,
            "planned": tables,
        }))?;
    } else {
        let mut text = super::dead_letters::as_text(&place, &found);
        if !found.is_empty() {
            text += "\nplan:\n  ";
            text += &tables.join("\n  ");
            text += "\nnothing was changed: add --apply to do it";
        }
        answer(&text)?;
    }
    Ok(match found.is_empty() {
        true => Exit::Done,
        false => Exit::Remains,
    })
}

fn show(report: &Report, feed: &Feed, args: &Args) -> Result<(), Failure> {
    if args.json {
        return answer_json(&json!({
            "version": 1,
            "command": "redrive",
            "applied": true,
            "home": report.home,
            "left": report.left.iter().map(|((table, why), letters)| json!({
                "table": table,
                "why": why,
                "letters": letters,
            })).collect::<Vec<_>>(),
            "ended": report.ended,
        }));
    }
    let mut lines = Vec::new();
    for (table, letters) in &report.home {
        lines.push(format!(
            "{letters} letter(s) of {table} are home: {} holds what {} does",
            feed.target.label, feed.source.label
        ));
    }
    for ((table, why), letters) in &report.left {
        let subject = match table.as_str() {
            "" => String::new(),
            table => format!(" of {table}"),
        };
        lines.push(format!("{letters} letter(s){subject} stay: {why}"));
    }
    if let Some(why) = &report.ended {
        lines.push(format!("it ended early: {why}"));
    }
    if lines.is_empty() {
        lines.push("no letter was there to bring home".to_owned());
    }
    answer(&lines.join("\n"))
}

/// A line on stderr that tells how far it is, on a terminal.
struct Progress(ProgressBar);

impl Progress {
    fn new(_loaded: &Loaded, _feed: &Feed, args: &Args) -> Self {
        let bar = match std::io::stderr().is_terminal() && !args.json {
            true => ProgressBar::new_spinner(),
            false => ProgressBar::hidden(),
        };
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} ({elapsed})") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(200));
        Self(bar)
    }
}

impl Watcher for Progress {
    fn progressed(&mut self, home: u64, left: u64) {
        self.0
            .set_message(format!("{home} letter(s) home, {left} stay"));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
