//! `farshore redrive`: brings dead letters home.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::one_shot::{Flow, Line, elsewhere};
use super::{answer, answer_json};
use crate::config::TtlDeletes;
use crate::config::read::Loaded;
use crate::dead_letter::Store;
use crate::dead_letter::survey::{Survey, survey};
use crate::dynamo::clock::{host_ms, rfc3339};
use crate::dynamo::table::{describe, primary_key, ttl_attribute};
use crate::dynamo::{RegionClients, Regions};
use crate::error::{Class, Exit, Failure, Fault};
use crate::jobs::redrive::{
    Followed, FromImages, Ground, Options, Redrive, Report, Rights, Watcher,
};
use crate::lease::budget_keeper::BudgetKeeper;
use crate::lease::hold::Hold;
use crate::lease::row::{JobRow, Row, known_table_id};
use crate::lease::table::StateTable;
use crate::lease::term::Term;
use crate::repair::KeepExpired;
use crate::run::owner;
use crate::run::start::{Feed, Role, find_role, find_standing, quarantined, unusable};

/// How many letters of a queue are looked at for a plan.
const LOOK_MAX: u64 = 1_000;
const KIND: &str = "redrive";
/// Rows of jobs that are dead for so long say nothing any more: an hour.
const FORGOTTEN_MS: i64 = 3_600_000;

/// Arguments of `redrive`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Only letters of this table, by its name in the configuration
    #[arg(long, value_name = "TABLE")]
    table: Option<String>,
    /// At most so many letters
    #[arg(long, value_name = "N", conflicts_with = "from_images")]
    limit: Option<u64>,
    /// At most so many letters a second
    #[arg(long, value_name = "N")]
    rate: Option<NonZeroU32>,
    /// From the images in the letters, for a source that is gone: applies a letter only where the
    /// replica still holds what its record replaced
    #[arg(long)]
    from_images: bool,
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
    if args.from_images {
        return from_images(&loaded, &regions, args).await;
    }
    let feed = match find_role(&loaded, &regions).await? {
        Role::Feed(feed) => feed,
        Role::Standby { active, .. } => return Err(nothing_to_feed(&active)),
        Role::Quarantined { active, epoch, .. } => {
            return Err(quarantined(&loaded.here, &active, epoch));
        }
    };
    let term = Term::new(feed.epoch, loaded.config.leases.duration, feed.begun);
    let records = elsewhere(&loaded.config, &regions, &[&loaded.here]);
    let ground = Ground::of(&feed, &term);
    let followed = followed(&feed, &loaded).await?;
    let named = named(args);
    flow(&loaded, ground, &named, &records)
        .refuse_closed()
        .await?;
    if !args.apply {
        return plan(&loaded, ground, args).await;
    }
    let keep_expired = keep_expired(&loaded, &feed).await?;
    let options = options(args);
    let work = async |rights: Rights, stop: &CancellationToken, watcher: &mut dyn Watcher| {
        Redrive::new(
            &loaded.config,
            &feed,
            &term,
            &options,
            rights,
            followed,
            keep_expired,
            stop,
        )
        .run(watcher)
        .await
    };
    under_hold(&loaded, ground, &records, args, work).await
}

fn options(args: &Args) -> Options {
    Options {
        table: args.table.clone(),
        limit: args.limit,
        rate: args.rate,
    }
}

/// The table that was named; none means all.
fn named(args: &Args) -> Vec<String> {
    args.table.iter().cloned().collect()
}

fn nothing_to_feed(active: &str) -> Failure {
    Failure::new(
        format!("There are no dead letters to bring home in {active}"),
        "It is the active region: nothing is fed into it",
        "Set AWS_REGION (or `here`) to the region whose replica is fed, and ask again",
    )
}

/// The redrive for a source that is gone: nothing is asked of it but whether it is.
async fn from_images(loaded: &Loaded, regions: &Regions, args: &Args) -> Result<Exit, Failure> {
    let region = |label: &str| {
        regions.get(label).ok_or_else(|| {
            Failure::new(
                format!("Region {label} is not known"),
                "It is not in the configuration",
                format!("Add [regions.{label}] to the configuration"),
            )
        })
    };
    let target = region(&loaded.here)?;
    let standing = find_standing(&loaded.config, &loaded.here, regions).await?;
    standing.refuse_quarantined(&loaded.here)?;
    let term = Term::new(
        standing.epoch,
        loaded.config.leases.duration,
        standing.begun,
    );
    let (active, epoch) = (standing.active, standing.epoch);
    if active == loaded.here {
        return Err(nothing_to_feed(&active));
    }
    let records = elsewhere(&loaded.config, regions, &[&loaded.here]);
    let source = region(&active)?;
    let wanted = |name: &str| args.table.as_deref().is_none_or(|table| table == name);
    let mut tables = Followed::new();
    for table in loaded.config.tables.iter().filter(|t| wanted(&t.name)) {
        refuse_living(source, table.name_in(&source.label)).await?;
        let name = table.name_in(&target.label);
        let replica = describe(&target.tables, name)
            .await
            .map_err(|fault| unusable(target, name, &fault))?;
        if let Some(replica) = replica {
            tables.insert(table.name.clone(), primary_key(&replica));
        }
    }
    let state = StateTable::new(target.tables.clone(), loaded.config.state_table());
    let dead_letters = Store::open(&loaded.config.dead_letters, target).await?;
    let ground = Ground {
        source: &active,
        target,
        state: &state,
        epoch,
        term: &term,
        dead_letters: &dead_letters,
    };
    let named = named(args);
    flow(loaded, ground, &named, &records)
        .refuse_closed()
        .await?;
    refuse_fed(ground).await?;
    if !args.apply {
        return plan(loaded, ground, args).await;
    }
    let options = options(args);
    let work = async |rights: Rights, stop: &CancellationToken, watcher: &mut dyn Watcher| {
        let redrive = FromImages {
            config: &loaded.config,
            ground,
            options: &options,
            rights: &rights,
            tables,
            stop,
        };
        redrive.run(watcher).await
    };
    under_hold(loaded, ground, &records, args, work).await
}

/// A source that answers is better than any image.
async fn refuse_living(source: &RegionClients, table: &str) -> Result<(), Failure> {
    let why = match describe(&source.tables, table).await {
        Ok(None) => return Ok(()),
        Ok(Some(_)) => "Its items can be read, and an image in a letter may be older".to_owned(),
        Err(fault) => match fault.class {
            Class::Network | Class::Service => return Ok(()),
            _ => format!("It is not gone: {fault}"),
        },
    };
    Err(Failure::new(
        format!("Table {table} in {} answers", source.label),
        why,
        "Redrive without --from-images",
    ))
}

/// Does `work` as the holder of a row, until it is done, the epoch moves, a tap closes or a signal
/// comes; and shows what was done.
async fn under_hold(
    loaded: &Loaded,
    ground: Ground<'_>,
    records: &[StateTable],
    args: &Args,
    work: impl AsyncFnOnce(Rights, &CancellationToken, &mut dyn Watcher) -> Report,
) -> Result<Exit, Failure> {
    refuse_counting(ground).await?;
    let named = named(args);
    let flow = flow(loaded, ground, &named, records);
    let hold = hold(flow, ground).await?;
    // A failover that began before the row was there has not seen it: then its record is there to be seen.
    if let Err(failure) = flow.refuse_closed().await {
        let _ = hold.finish().await;
        return Err(failure);
    }
    let stop = super::stop_on_signal()?;
    let ended = Mutex::new(None);
    let mut watcher = Progress(Line::new(args.json));
    let done = CancellationToken::new();
    let watched = flow.watch(&stop, &done, &ended);
    let tables = loaded.config.tables.iter();
    let tables = tables.filter(|table| named.is_empty() || named.contains(&table.name));
    let state = ground.state.clone();
    let budgets = BudgetKeeper::new(state, &owner(), &loaded.config, tables, None);
    let budgets = Arc::new(budgets);
    let rights = Rights {
        hold: Arc::clone(&hold),
        budgets: Arc::clone(&budgets),
    };
    let work = async {
        let report = hold.keep(work(rights, &stop, &mut watcher)).await;
        done.cancel();
        report
    };
    let (mut report, (), ()) = tokio::join!(work, watched, budgets.keep_until(&done));
    drop(watcher);
    let moved = ended.into_inner().unwrap_or_else(PoisonError::into_inner);
    // Asked by a signal, and not because the flow has changed.
    let interrupted = stop.is_cancelled() && moved.is_none() && report.ended.is_some();
    if moved.is_some() {
        report.ended = moved;
    }
    // While the row is held: two that tidy at once would remove what the other has not seen.
    if let Store::Directory(directory) = ground.dead_letters
        && let Err(fault) = directory.tidy().await
    {
        tracing::warn!(
            code = fault.code,
            "files of older days could not be removed"
        );
    }
    // The row speaks for the write that may still take effect: to the next redrive of a directory, which
    // hides nothing, and to a failover.
    if report.unanswered == 0 {
        // Left behind it would only make the next redrive of a directory wait.
        let _ = hold.finish().await;
    }
    show(&report, ground, args)?;
    Ok(match report.left.is_empty() && report.ended.is_none() {
        _ if interrupted => Exit::Interrupted,
        true => Exit::Done,
        false => Exit::Remains,
    })
}

/// Bringing home is receiving: a queue that counts receives would move away what stays.
async fn refuse_counting(ground: Ground<'_>) -> Result<(), Failure> {
    let Store::Queue(queue) = ground.dead_letters else {
        return Ok(());
    };
    let said = queue.attributes().await.map_err(|fault| {
        let place = ground.dead_letters.name();
        Failure::from_fault(format!("The queue {place} could not be asked"), &fault)
    })?;
    match said.and_then(|said| said.receives_max) {
        None => Ok(()),
        Some(receives) => Err(Failure::new(
            format!("The queue {} moves messages away", queue.url()),
            format!(
                "After {receives} receives a message goes to another queue, and a redrive receives"
            ),
            "Take away the queue's RedrivePolicy, redrive, and set it again",
        )),
    }
}

/// The tables whose shards a worker of this epoch has begun to follow, with their keys: later records
/// of their items will be applied. One that was made anew since is not among them.
async fn followed(feed: &Feed, loaded: &Loaded) -> Result<Followed, Failure> {
    let failed = |fault: Fault| unusable(&feed.target, feed.state.name(), &fault);
    let rows = feed.state.rows().await.map_err(failed)?;
    let mut begun = BTreeSet::new();
    let mut streams = Vec::new();
    let forgotten = feed.target.clock.now_ms() - FORGOTTEN_MS;
    for row in rows {
        match row {
            Row::Shard(row) if row.epoch == feed.epoch => {
                begun.insert(row.table);
            }
            Row::Stream(row) => streams.push(row),
            // Of a redrive that was killed. If it cannot be removed it does no harm.
            Row::Job(row) if row.kind == KIND && row.until < forgotten => {
                let _ = feed.state.delete(&row).await;
            }
            _ => {}
        }
    }
    let mut followed = Followed::new();
    for table in loaded
        .config
        .tables
        .iter()
        .filter(|t| begun.contains(&t.name))
    {
        let name = table.name_in(&feed.source.label);
        let described = describe(&feed.source.tables, name)
            .await
            .map_err(|fault| unusable(&feed.source, name, &fault))?;
        let now = described.as_ref().and_then(|table| table.table_id());
        let known = known_table_id(&streams, feed.epoch, &table.name);
        if described.is_some() && known.is_none_or(|known| Some(known) == now) {
            let key = feed.keys.get(&table.name).cloned().unwrap_or_default();
            followed.insert(table.name.clone(), key);
        }
    }
    Ok(followed)
}

/// A worker that feeds the table will read what the source holds once that answers again.
async fn refuse_fed(ground: Ground<'_>) -> Result<(), Failure> {
    let failed = |fault: Fault| unusable(ground.target, ground.state.name(), &fault);
    let rows = ground.state.rows().await.map_err(failed)?;
    let owned = rows.into_iter().find_map(|row| match row {
        Row::Shard(row) if row.epoch == ground.epoch && !row.is_finished() => row.lease_owner,
        _ => None,
    });
    match owned {
        None => Ok(()),
        Some(owner) => Err(Failure::new(
            "A worker feeds the replica, or was not stopped",
            format!("The worker {owner} holds a shard: its source may answer it"),
            "Stop the workers of this region, and ask again",
        )),
    }
}

/// The flow that the letters are of.
fn flow<'a>(
    loaded: &'a Loaded,
    ground: Ground<'a>,
    wanted: &'a [String],
    records: &'a [StateTable],
) -> Flow<'a> {
    Flow {
        config: &loaded.config,
        region: ground.target,
        state: ground.state,
        active: ground.source,
        epoch: ground.epoch,
        tables: wanted,
        heeds_tap: true,
        other: None,
        source: ground.source,
        target: &ground.target.label,
        elsewhere: records,
        term: ground.term,
        is_alone: false,
    }
}

/// The row of this job. A directory has one job at a time, for it hides nothing from a second one.
async fn hold(flow: Flow<'_>, ground: Ground<'_>) -> Result<Arc<Hold<JobRow>>, Failure> {
    let me = owner();
    let id = match ground.dead_letters {
        Store::Queue(_) => me.replace('#', "-"),
        Store::Directory(directory) => directory.place().display().to_string(),
    };
    let at = rfc3339(host_ms());
    let (source, target) = (ground.source, &ground.target.label);
    let row = JobRow::new(KIND, &id, ground.epoch, source, target, at);
    flow.hold(row, &me, "redrive of this directory").await
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
async fn plan(loaded: &Loaded, ground: Ground<'_>, args: &Args) -> Result<Exit, Failure> {
    let place = ground.dead_letters.name();
    let found: Survey = survey(ground.dead_letters, LOOK_MAX)
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
                "will OVERWRITE items of {} in {} with {}",
                table.name_in(&ground.target.label),
                ground.target.label,
                match args.from_images {
                    true => "the new images of letters, where it holds their old ones".to_owned(),
                    false => format!("what {} holds, where a letter names them", ground.source),
                }
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
            if args.from_images {
                text += "\nnote: an item whose refused change was undone by a later one comes back";
            }
            text += "\nnothing was changed: add --apply to do it";
        }
        answer(&text)?;
    }
    Ok(match found.is_empty() {
        true => Exit::Done,
        false => Exit::Remains,
    })
}

fn show(report: &Report, ground: Ground<'_>, args: &Args) -> Result<(), Failure> {
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
            "{letters} letter(s) of {table} are home: {}",
            match args.from_images {
                true => format!("{} holds what their records wrote", ground.target.label),
                false => format!("{} holds what {} does", ground.target.label, ground.source),
            }
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

/// Tells how far it is.
struct Progress(Line);

impl Watcher for Progress {
    fn progressed(&mut self, home: u64, left: u64) {
        self.0.say(format!("{home} letter(s) home, {left} stay"));
    }
}
