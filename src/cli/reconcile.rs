//! `farshore reconcile`: compares tables of two regions, and repairs those of one.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use aws_sdk_dynamodb::types::TableDescription;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::one_shot::{Flow, Line};
use super::{answer, answer_json};
use crate::apply::batch::Writer;
use crate::apply::budget::Budget;
use crate::config::read::Loaded;
use crate::config::{MaxDeletes, Table, TtlDeletes};
use crate::dynamo::clock::{host_ms, rfc3339};
use crate::dynamo::read::{batch_get, scan_page};
use crate::dynamo::table::{KeyPart, describe, primary_key, show_key, ttl_attribute};
use crate::dynamo::{RegionClients, Regions};
use crate::error::{Exit, Failure, Fault, Operation};
use crate::jobs::reconcile::place::Place;
use crate::jobs::reconcile::report::{Counts, Lines};
use crate::jobs::reconcile::{Ended, FlowSource, Found, Reconcile, Repairs};
use crate::lease::hold::Hold;
use crate::lease::row::{JobRow, RECONCILE, Row};
use crate::lease::table::StateTable;
use crate::repair::KeepExpired;
use crate::run::start::{any_key, find_active, unusable};

/// Bytes of a table for each part that it is read in.
const SEGMENT_BYTES: i64 = 256 << 20;
/// More parts than this help no more.
const SEGMENTS_CHOSEN_MAX: u32 = 1_000;
/// An eventually consistent read unit.
const BYTES_PER_UNIT: f64 = 8_192.0;
/// Dollars for a million read units, on demand, in us-east-1 (AWS's price list of 2026).
const DOLLARS_PER_MILLION: f64 = 0.125;
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
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    settle: Option<Duration>,
    /// Answers as JSON
    #[arg(long)]
    json: bool,
}

/// Between which regions, and what is known of them.
struct Ground<'a> {
    loaded: &'a Loaded,
    args: &'a Args,
    source: &'a RegionClients,
    target: &'a RegionClients,
    /// Label of the active region.
    active: String,
    epoch: u64,
    /// The state table, where one of the two regions has it: the target's comes first.
    state: Option<(&'a RegionClients, StateTable)>,
}

/// A table to compare, described on both sides.
struct Pair<'a> {
    table: &'a Table,
    key: Vec<KeyPart>,
    keep_expired: Option<KeepExpired>,
    /// Items and bytes of both sides together, as DescribeTable knows them.
    items: i64,
    bytes: i64,
    /// The larger side's.
    largest_bytes: i64,
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
        ground.refuse_other_writers().await?;
        for pair in &pairs {
            ground.refuse_empty_source(pair).await?;
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
    eprintln!("{}", ground.plan(&pairs));
    let stop = super::stop_on_signal()?;
    let mut outcomes = Vec::new();
    for pair in &pairs {
        let outcome = ground.compare(pair, lines.clone(), &stop).await?;
        let ended = outcome.ended.is_some();
        outcomes.push(outcome);
        // The next one would fare no better.
        if ended && stop.is_cancelled() {
            break;
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

async fn ground<'a>(
    loaded: &'a Loaded,
    args: &'a Args,
    regions: &'a Regions,
) -> Result<Ground<'a>, Failure> {
    let config = &loaded.config;
    let (active, epoch) = find_active(config, &loaded.here, regions).await?;
    let region = |label: &str| {
        regions.get(label).ok_or_else(|| {
            let labels: Vec<&str> = config.regions.keys().map(String::as_str).collect();
            Failure::new(
                format!("Region {label} is not known"),
                format!("The configuration has {}", labels.join(", ")),
                "Name one of them",
            )
        })
    };
    let source = region(args.source.as_deref().unwrap_or(&active))?;
    let target = match &args.target {
        Some(label) => region(label)?,
        None if loaded.here == active => {
            return Err(Failure::new(
                format!("There is no replica to compare in {active}"),
                "It is the active region, and no --target was named",
                "Name the region to compare with --target, or set AWS_REGION to it",
            ));
        }
        None => region(&loaded.here)?,
    };
    if source.label == target.label {
        return Err(Failure::new(
            format!("{} would be compared with itself", source.label),
            "Source and target are the same region",
            "Name two regions with --source and --target",
        ));
    }
    let name = config.state_table();
    let mut state = None;
    for place in [target, source] {
        let described = describe(&place.tables, &name).await;
        let described = described.map_err(|fault| unusable(place, &name, &fault))?;
        if described.is_some() {
            state = Some((place, StateTable::new(place.tables.clone(), name)));
            break;
        }
    }
    Ok(Ground {
        loaded,
        args,
        source,
        target,
        active,
        epoch,
        state,
    })
}

impl<'a> Ground<'a> {
    /// Describes a table on both sides, and refuses what cannot be compared.
    async fn pair(&self, table: &'a Table) -> Result<Pair<'a>, Failure> {
        let from = self.described(self.source, table).await?;
        let to = self.described(self.target, table).await?;
        let (key, other) = (primary_key(&from), primary_key(&to));
        if key != other {
            return Err(Failure::new(
                format!("Table {} has another key in each region", table.name),
                format!(
                    "{} has {}, {} has {}",
                    self.source.label,
                    show_key(&key),
                    self.target.label,
                    show_key(&other)
                ),
                "Compare tables with the same key schema: make the replica again with `farshore provision`",
            ));
        }
        if from.table_id().is_some() && from.table_id() == to.table_id() {
            return Err(Failure::new(
                format!("Table {} would be compared with itself", table.name),
                format!(
                    "{} and {} lead to the same table",
                    self.source.label, self.target.label
                ),
                "Check endpoint, account and table name of both regions",
            ));
        }
        for (region, reading) in [
            (self.source, Operation::ReadSource),
            (self.target, Operation::ReadReplica),
        ] {
            may_read(region, table.name_in(&region.label), &key, reading).await?;
        }
        let mut keep_expired = None;
        if table.ttl_deletes == TtlDeletes::Skip {
            let name = table.name_in(&self.source.label);
            let attribute = ttl_attribute(&self.source.tables, name).await;
            keep_expired = attribute
                .map_err(|fault| unusable(self.source, name, &fault))?
                .map(|attribute| KeepExpired { attribute });
        }
        let items = |table: &TableDescription| table.item_count.unwrap_or_default();
        let bytes = |table: &TableDescription| table.table_size_bytes.unwrap_or_default();
        Ok(Pair {
            table,
            key,
            keep_expired,
            items: items(&from) + items(&to),
            bytes: bytes(&from) + bytes(&to),
            largest_bytes: bytes(&from).max(bytes(&to)),
        })
    }

    async fn described(
        &self,
        region: &RegionClients,
        table: &Table,
    ) -> Result<TableDescription, Failure> {
        let name = table.name_in(&region.label);
        let described = describe(&region.tables, name).await;
        described
            .map_err(|fault| unusable(region, name, &fault))?
            .ok_or_else(|| {
                Failure::new(
                    format!("There is no table {name} in {}", region.label),
                    "Both tables have to be there to be compared",
                    "Create it with `farshore provision --apply`, or correct its name",
                )
            })
    }

    fn flow<'b>(
        &'b self,
        region: &'b RegionClients,
        state: &'b StateTable,
        tables: &'b [String],
    ) -> Flow<'b> {
        Flow {
            config: &self.loaded.config,
            region,
            state,
            active: &self.active,
            epoch: self.epoch,
            tables,
        }
    }

    /// Refuses to write where the flow is stopped on purpose, or beside one the other way round.
    async fn refuse_other_writers(&self) -> Result<(), Failure> {
        let Some((region, state)) = &self.state else {
            return Err(Failure::new(
                format!(
                    "There is no state table {} in {} or {}",
                    self.loaded.config.state_table(),
                    self.target.label,
                    self.source.label
                ),
                "What writes to a table holds a row there, so that no two do it at once",
                "Create it with `farshore provision --apply`",
            ));
        };
        let with_flow = self.active == self.source.label;
        if with_flow {
            return self
                .flow(region, state, &self.args.table)
                .refuse_closed()
                .await;
        }
        let failed = |fault: Fault| unusable(region, state.name(), &fault);
        let rows = state.rows().await.map_err(failed)?;
        let owned = rows.into_iter().find_map(|row| match row {
            Row::Shard(row) if !row.is_finished() => row.lease_owner,
            _ => None,
        });
        match owned {
            None => Ok(()),
            Some(owner) => Err(Failure::new(
                "A worker feeds the other way round, or was not stopped",
                format!(
                    "The worker {owner} holds a shard: what is written to {} would come back to {}",
                    self.target.label, self.source.label
                ),
                "Stop the workers, and ask again",
            )),
        }
    }

    /// An empty source is a wrong source more often than it is right.
    async fn refuse_empty_source(&self, pair: &Pair<'_>) -> Result<(), Failure> {
        for (region, should_hold) in [(self.source, true), (self.target, false)] {
            let name = pair.table.name_in(&region.label);
            let first = scan_page((&region.tables, name), (0, 1), None).await;
            let first = first.map_err(|fault| unusable(region, name, &fault))?;
            let is_empty = first.items.is_empty() && first.next.is_none();
            if is_empty != should_hold {
                return Ok(());
            }
        }
        Err(Failure::new(
            format!(
                "Table {} is empty in {} and not in {}",
                pair.table.name, self.source.label, self.target.label
            ),
            "Repaired by it, the target would lose all its items",
            "Check which region is the source. If the target is to be emptied, empty it yourself",
        ))
    }

    fn segments(&self, pair: &Pair<'_>) -> u32 {
        let chosen = self.loaded.config.reconcile.segments;
        self.args.segments.unwrap_or_else(|| match chosen {
            0 => {
                let parts = pair.largest_bytes / SEGMENT_BYTES + 1;
                u32::try_from(parts).map_or(SEGMENTS_CHOSEN_MAX, |n| n.min(SEGMENTS_CHOSEN_MAX))
            }
            segments => segments,
        })
    }

    /// The limit in units per second; `None` means none.
    fn read_units(&self) -> Option<u32> {
        let config = &self.loaded.config.reconcile;
        let units = self.args.read_units.unwrap_or(config.read_units_per_second);
        (units > 0).then_some(units)
    }

    /// What will be read, and what may be overwritten.
    fn plan(&self, pairs: &[Pair<'_>]) -> String {
        let mut lines = Vec::new();
        for pair in pairs {
            let units = pair.bytes as f64 / BYTES_PER_UNIT;
            let time = match self.read_units() {
                None => "without a limit".to_owned(),
                Some(rate) => {
                    let seconds = (units / 2.0 / f64::from(rate)).ceil() as u64;
                    let time = humantime::format_duration(Duration::from_secs(seconds));
                    format!("{rate} units/s a side, at least {time}")
                }
            };
            lines.push(format!(
                "{}: will read about {} items, {:.3} GB, {:.0} read units (${:.2} on demand), {time}",
                pair.table.name,
                pair.items,
                pair.bytes as f64 / 1e9,
                units,
                units / 1e6 * DOLLARS_PER_MILLION,
            ));
            if self.args.apply {
                let active = match self.target.label == self.active {
                    true => ", the ACTIVE region",
                    false => "",
                };
                lines.push(format!(
                    "{}: will OVERWRITE {} in {}{active} with what {} holds, where they differ",
                    pair.table.name,
                    pair.table.name_in(&self.target.label),
                    self.target.label,
                    self.source.label
                ));
            }
        }
        lines.push("sizes are the service's own, up to six hours old".to_owned());
        lines.join("\n")
    }

    async fn compare(
        &self,
        pair: &Pair<'_>,
        lines: Option<Arc<Lines>>,
        stop: &CancellationToken,
    ) -> Result<Outcome, Failure> {
        let begun = Instant::now();
        let names = [pair.table.name.clone()];
        let mut held = None;
        if let (true, Some((region, state))) = (self.args.apply, &self.state) {
            let flow = self.flow(region, state, &names);
            let id = format!("{}#{}", self.target.label, pair.table.name);
            let (from, to) = (&self.source.label, &self.target.label);
            let row = JobRow {
                table: Some(pair.table.name.clone()),
                ..JobRow::new(RECONCILE, &id, self.epoch, from, to, rfc3339(host_ms()))
            };
            let subject = format!("reconcile of {} in {to}", pair.table.name);
            held = Some((flow, flow.hold(row, &subject).await?));
        }
        let job = self.job(pair, lines, held.as_ref().map(|(_, hold)| hold), stop);
        let done = CancellationToken::new();
        let moved = Mutex::new(None);
        let work = async {
            let result = match &held {
                Some((_, hold)) => hold.keep(job.run()).await,
                None => job.run().await,
            };
            done.cancel();
            result
        };
        let watched = async {
            // Against the flow there is no tap and no worker; its epoch is still heeded.
            if let Some((flow, _)) = &held {
                flow.watch(stop, &done, &moved).await;
            }
        };
        let (result, (), ()) = tokio::join!(work, watched, self.tell(pair, &job, &done));
        let counts = job.counts();
        if let Some((_, hold)) = &held
            && counts.unverified == 0
        {
            // Left behind it would only make the next one wait. With keys that nobody verified it stays,
            // and is an alarm until a next one has come to its end.
            let _ = hold.finish().await;
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
        let flow = self
            .state
            .as_ref()
            .filter(|(region, _)| region.label == self.target.label);
        Reconcile {
            table: table.name.clone(),
            source: place(self.source, Operation::ReadSource),
            target: place(self.target, Operation::ReadReplica),
            key_names: pair.key.iter().map(|part| part.name.clone()).collect(),
            keep_expired: pair.keep_expired.clone(),
            segments: self.segments(pair),
            memory: usize::try_from(config.reconcile.memory.as_u64()).unwrap_or(usize::MAX),
            settle: self.args.settle.unwrap_or(config.reconcile.settle),
            flow: flow.map(|(_, state)| FlowSource {
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

    /// Why it ended early, in words, and the exit code.
    fn verdict(
        &self,
        result: Result<(), Ended>,
        moved: Option<String>,
        counts: &Counts,
    ) -> (Option<String>, Exit) {
        let remains = match counts.left() + counts.unverified {
            0 => Exit::Done,
            _ => Exit::Remains,
        };
        match (result, moved) {
            (Ok(()), _) => (None, remains),
            (Err(_), Some(why)) => (Some(why), Exit::Remains),
            (Err(Ended::Stopped), None) => {
                (Some("it was asked to stop".to_owned()), Exit::Interrupted)
            }
            (Err(Ended::TooManyDeletes { extra, allowed }), None) => (
                Some(format!(
                    "{extra} items are only in {}, and {allowed} may be deleted: none was. If they are to go, ask again with --max-deletes {extra}",
                    self.target.label
                )),
                Exit::Remains,
            ),
            (Err(Ended::Failed { subject, fault }), None) => (
                Some(format!("{subject}: {fault}. {}", fault.next_step())),
                Exit::CouldNotRun,
            ),
            (Err(Ended::Lost), None) => (
                Some("its row in the state table could not be kept: ask again once that table answers".to_owned()),
                Exit::CouldNotRun,
            ),
            (Err(Ended::File(error)), None) => (
                Some(format!("a file could not be written: {error}. Make room on the disk and ask again")),
                Exit::CouldNotRun,
            ),
        }
    }
}

/// Makes each kind of read once, so that a denied permission shows now.
async fn may_read(
    region: &RegionClients,
    table: &str,
    key: &[KeyPart],
    reading: Operation,
) -> Result<(), Failure> {
    let failed = |fault: Fault| {
        let subject = format!("Table {table} could not be read in {}", region.label);
        Failure::from_fault(subject, &fault)
    };
    let table = (&region.tables, table);
    scan_page(table, (0, 1), None).await.map_err(failed)?;
    let keys = [any_key(key)];
    batch_get(reading, table, &keys).await.map_err(failed)?;
    Ok(())
}

fn show(ground: &Ground<'_>, outcomes: &[Outcome]) -> Result<(), Failure> {
    let applied = ground.args.apply;
    if ground.args.json {
        let tables: Vec<Value> = outcomes
            .iter()
            .map(|outcome| {
                let mut value = json!(outcome.counts);
                value["table"] = json!(outcome.table);
                value["seconds"] = json!((outcome.took.as_secs_f64() * 10.0).round() / 10.0);
                value["ended"] = json!(outcome.ended);
                value
            })
            .collect();
        return answer_json(&json!({
            "version": 1,
            "command": "reconcile",
            "source": ground.source.label,
            "target": ground.target.label,
            "applied": applied,
            "equal": outcomes.iter().all(|outcome| outcome.exit == Exit::Done),
            "tables": tables,
        }));
    }
    let blocks = outcomes.iter().map(|outcome| as_text(ground, outcome));
    answer(&blocks.collect::<Vec<_>>().join("\n"))
}

fn as_text(ground: &Ground<'_>, outcome: &Outcome) -> String {
    let counts = &outcome.counts;
    let (source, target) = (&ground.source.label, &ground.target.label);
    let took = humantime::format_duration(Duration::from_secs(outcome.took.as_secs()));
    let mut lines = vec![
        format!("{}: {source} compared with {target}, {took}", outcome.table),
        format!(
            "  read: {} items and {:.1} units in {source}, {} items and {:.1} units in {target}",
            counts.source_items, counts.source_units, counts.target_items, counts.target_units
        ),
        format!(
            "  different: {} missing in {target}, {} changed, {} only in {target}",
            counts.missing, counts.changed, counts.extra
        ),
    ];
    if counts.unsettled > 0 {
        lines.push(format!(
            "  not settled: {} keys change all the time, or what changed them is not applied yet",
            counts.unsettled
        ));
    }
    if ground.args.apply {
        lines.push(format!(
            "  repaired: {}, verified by reading again",
            counts.repaired
        ));
    }
    if counts.refused > 0 {
        lines.push(format!(
            "  refused: {} that {target} does not take",
            counts.refused
        ));
    }
    if counts.unverified > 0 {
        let at = host_ms() + ground.loaded.config.leases.late_effect.as_millis() as i64;
        lines.push(format!(
            "  not verified: {} keys that were being written, maybe with older items: ask again after {}",
            counts.unverified,
            rfc3339(at)
        ));
    }
    lines.push(match (&outcome.ended, outcome.exit) {
        (Some(why), _) => format!("  it ended early: {why}"),
        (None, Exit::Done) if counts.repaired > 0 => "  equal now".to_owned(),
        (None, Exit::Done) => "  equal".to_owned(),
        (None, _) if ground.args.apply => "  differences remain".to_owned(),
        (None, _) => "  nothing was changed: add --apply to repair".to_owned(),
    });
    lines.join("\n")
}
