//! What `run` finds out before it writes anything: which region is active, whether source and
//! replica fit together, whether there is somewhere for dead letters to go.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::future::Future;
use std::time::Duration;

use aws_sdk_dynamodb::primitives::Blob;
use aws_sdk_dynamodb::types::{AttributeValue, StreamViewType, TableDescription};
use futures::future::join_all;

use super::homeward::last_active;
use crate::backoff::Backoff;
use crate::config::read::Loaded;
use crate::config::{Config, Table, TtlDeletes};
use crate::dead_letter::Store;
use crate::dynamo::clock::uptime;
use crate::dynamo::read::batch_get;
use crate::dynamo::table::{
    KeyPart, describe, enabled_stream, holds_new_images, primary_key, show_key, ttl_attribute,
};
use crate::dynamo::{RegionClients, Regions};
use crate::error::{Class, Failure, Fault, Operation, Policy, classify};
use crate::lease::control::{Answer, Part, Verdict, decide, newest, part};
use crate::lease::row::{ControlRow, Track, TrackRow};
use crate::lease::table::StateTable;
use crate::mutation::{self, Mutation};
use crate::stream::ShardId;
use crate::stream::reader::{Position, ShardReader};

/// How often a call is made at the start while its failure may pass by itself.
const START_ATTEMPTS: u32 = 4;
const START_PAUSE: Duration = Duration::from_millis(200);
const START_LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// The control record of another region gets this long to be read, each time it is asked for.
const OTHERS_TIMEOUT: Duration = Duration::from_secs(2);
/// A call to the state table gets this long, however short the leases are.
const STATE_TIMEOUT_MIN: Duration = Duration::from_millis(400);

/// What this process does in its region.
pub enum Role {
    /// It feeds `here` from the active region.
    Feed(Box<Feed>),
    /// `here` is the active region: nothing is fed into it.
    Standby {
        /// Label of the active region.
        active: String,
        /// Number of the epoch.
        epoch: u64,
        /// What says so.
        told: Told,
    },
    /// `here` was active and may hold writes that never left: nobody writes there.
    Quarantined {
        /// Label of the active region.
        active: String,
        /// Number of the epoch.
        epoch: u64,
        /// What says so.
        told: Told,
    },
}

/// The control records that a role was found by.
#[derive(Debug, Clone, Default)]
pub struct Told {
    /// By region.
    pub records: BTreeMap<String, ControlRow>,
    /// When their reading began, by [`uptime`].
    pub begun: Duration,
}

/// What the records of all regions say of one of them.
pub struct Standing {
    /// Label of the active region.
    pub active: String,
    /// Number of the epoch.
    pub epoch: u64,
    /// What `here` is for.
    pub part: Part,
    /// The record of each region that has one, by label.
    pub records: BTreeMap<String, ControlRow>,
    /// When the reading began, by [`uptime`].
    pub begun: Duration,
    /// Regions whose quarantine has ended, and whose stranded writes are not all captured yet: nobody writes there
    /// before.
    pub uncaptured: BTreeSet<String>,
}

impl Standing {
    /// What `label` is for.
    pub fn part_of(&self, label: &str) -> Part {
        if self.uncaptured.contains(label) {
            return Part::Quarantined;
        }
        let own = self.records.get(label);
        let current = (self.active.as_str(), self.epoch);
        part(label, current, own, self.records.values())
    }

    /// Refuses to write to `label` while it is in quarantine.
    ///
    /// # Errors
    /// A failure that says why, and what to do.
    pub fn refuse_quarantined(&self, label: &str) -> Result<(), Failure> {
        match self.part_of(label) {
            Part::Quarantined => Err(quarantined(label, &self.active, self.epoch)),
            Part::Active | Part::Fed => Ok(()),
        }
    }
}

/// Nothing may be written to `label`.
pub fn quarantined(label: &str, active: &str, epoch: u64) -> Failure {
    Failure::new(
        format!("{label} is in quarantine: nothing may be written there"),
        format!(
            "It was active before {active} became so in epoch {epoch}, and may hold writes that never left it"
        ),
        "Bring it home with `farshore failback`, which says what those are; docs/RUNBOOK.md says how",
    )
}

/// Everything that feeding needs, checked.
pub struct Feed {
    /// Label of the active region.
    pub active: String,
    /// Number of the epoch.
    pub epoch: u64,
    /// When the reading of the control records began that says so, by [`uptime`].
    pub begun: Duration,
    /// The control records that say so.
    pub told: Told,
    /// The active region.
    pub source: RegionClients,
    /// The region fed.
    pub target: RegionClients,
    /// The state table, in the region fed.
    pub state: StateTable,
    /// Primary key of every table, by its name in the configuration.
    pub keys: BTreeMap<String, Vec<KeyPart>>,
    /// Where dead letters go.
    pub dead_letters: Store,
}

/// Finds this process's role and checks that it can be played. Nothing is written, except that a
/// dead-letter directory is made.
///
/// # Errors
/// The first thing that is wrong, with what to do about it.
pub async fn find_role(loaded: &Loaded, regions: &Regions) -> Result<Role, Failure> {
    let config = &loaded.config;
    // Validation has seen to it that both labels are regions; a missing one is said plainly.
    let region = |label: &str| {
        regions.get(label).cloned().ok_or_else(|| {
            Failure::new(
                format!("Region {label} is not known"),
                "The control record names a region that this configuration lacks",
                format!("Add [regions.{label}] to the configuration"),
            )
        })
    };
    let target = region(&loaded.here)?;
    // The first renewal goes out after a third of a lease; with a quarter each, two more attempts
    // find room before its end.
    let patience = (config.leases.duration / 4).max(STATE_TIMEOUT_MIN);
    let state = StateTable::new(target.tables_within(patience), config.state_table());
    let standing = find_standing(config, &loaded.here, regions).await?;
    let Standing { epoch, begun, .. } = standing;
    let told = Told {
        records: standing.records,
        begun,
    };
    let part = standing.part;
    let active = standing.active;
    match part {
        Part::Active => {
            return Ok(Role::Standby {
                active,
                epoch,
                told,
            });
        }
        Part::Quarantined => {
            return Ok(Role::Quarantined {
                active,
                epoch,
                told,
            });
        }
        Part::Fed => {}
    }
    let source = region(&active)?;
    if patiently(|| describe(&target.tables, state.name()))
        .await
        .map_err(|fault| unusable(&target, state.name(), &fault))?
        .is_none()
    {
        return Err(Failure::new(
            format!(
                "There is no state table {} in {}",
                state.name(),
                target.label
            ),
            "Leases and checkpoints live there, and `run` creates nothing",
            "Create it with `farshore provision --apply`",
        ));
    }
    // Read as the worker will read it, so that a denied scan shows now.
    patiently(|| state.rows())
        .await
        .map_err(|fault| unusable(&target, state.name(), &fault))?;
    let mut keys = BTreeMap::new();
    for table in &config.tables {
        let key = check_table(table, &source, &target).await?;
        keys.insert(table.name.clone(), key);
    }
    let dead_letters = Store::open(&config.dead_letters, &target).await?;
    Ok(Role::Feed(Box::new(Feed {
        active,
        epoch,
        begun,
        told,
        source,
        target,
        state,
        keys,
        dead_letters,
    })))
}

/// Asks every region's state table what `here` is for.
///
/// # Errors
/// When `here` does not answer, when records contradict each other, or when nobody can say.
pub async fn find_standing(
    config: &Config,
    here: &str,
    regions: &Regions,
) -> Result<Standing, Failure> {
    let name = config.state_table();
    let begun = uptime();
    let asked = regions.iter().map(|region| {
        let name = name.clone();
        async move {
            if region.label == here {
                let table = StateTable::new(region.tables.clone(), name);
                return (region, patiently(|| table.control()).await);
            }
            // A region that is gone must not keep the others from starting.
            let table = StateTable::new(region.tables_within(OTHERS_TIMEOUT), name);
            (region, patiently(|| table.control()).await)
        }
    });
    let mut answers = Vec::new();
    let mut records = BTreeMap::new();
    let mut silent = Vec::new();
    for (region, answer) in join_all(asked).await {
        answers.push(match answer {
            Ok(Some(record)) if record.group != config.group => {
                return Err(Failure::new(
                    format!(
                        "The state table {name} in {} belongs to another group",
                        region.label
                    ),
                    format!(
                        "Its control record says `{}`, this configuration `{}`",
                        record.group, config.group
                    ),
                    "Give this group its own state table with leases.table",
                ));
            }
            Ok(Some(record)) => {
                records.insert(region.label.clone(), record.clone());
                Answer::Record(Box::new(record))
            }
            Ok(None) => Answer::None,
            Err(fault) if fault.class == Class::NotFound => Answer::None,
            // The region this process feeds must answer; nothing works without it. A record that
            // this version cannot read is there all the same, and may say anything.
            Err(fault) if region.label == here || fault.is_unreadable() => {
                return Err(unusable(region, &name, &fault));
            }
            Err(fault) => {
                silent.push(format!("{} ({})", region.label, fault.code));
                Answer::Unreachable
            }
        });
    }
    let found = async |active: String, epoch: u64| {
        let uncaptured = uncaptured(config, regions, &records, (&active, epoch)).await;
        let mut standing = Standing {
            part: Part::Active,
            active,
            epoch,
            records,
            begun,
            uncaptured,
        };
        standing.part = standing.part_of(here);
        standing
    };
    match decide(&answers) {
        Verdict::Decided { active, epoch } => Ok(found(active, epoch).await),
        Verdict::FromFile => Ok(found(config.active.clone(), 1).await),
        Verdict::Conflict { epoch, actives } => Err(Failure::new(
            format!(
                "Epoch {epoch} names several active regions: {}",
                actives.join(", ")
            ),
            "Two failovers ran against each other; whoever applies now may overwrite the other",
            "Decide which region is active, and make a higher epoch: `farshore failover --to LABEL --accept-loss conflict`",
        )),
        Verdict::Unknown => Err(Failure::new(
            "Nobody can say which region is active",
            format!(
                "No control record was found, and these regions did not answer: {}",
                silent.join(", ")
            ),
            "Make them reachable, or create the control record with `farshore provision --apply` where it is missing",
        )),
    }
}

/// The regions that came home in this epoch and whose stranded writes are not all captured: a worker that starts anew
/// in between must not feed over them. What cannot be asked counts as such.
async fn uncaptured(
    config: &Config,
    regions: &Regions,
    records: &BTreeMap<String, ControlRow>,
    (active, epoch): (&str, u64),
) -> BTreeSet<String> {
    let mut open = BTreeSet::new();
    if mutation::is_off(Mutation::Capture) {
        return open;
    }
    let Some(record) = newest(records.values(), active, epoch) else {
        return open;
    };
    for label in record
        .returned
        .iter()
        .filter(|label| !record.is_home(label))
    {
        let Some(region) = regions.get(label) else {
            continue;
        };
        let state = StateTable::new(region.tables_within(OTHERS_TIMEOUT), config.state_table());
        let own = records.get(label);
        let of = last_active(label, epoch, Some(record), own).unwrap_or(0);
        for table in &config.tables {
            let key = TrackRow::key_of(Track::Stranded, of, &table.name);
            let row = patiently(|| state.track(&key)).await;
            if !matches!(row, Ok(Some(row)) if row.is_closed()) {
                open.insert(label.clone());
                break;
            }
        }
    }
    open
}

/// Checks that `table` can flow from `source` to `target`. Returns its primary key.
async fn check_table(
    table: &Table,
    source: &RegionClients,
    target: &RegionClients,
) -> Result<Vec<KeyPart>, Failure> {
    let from = described(source, table.name_in(&source.label), "It is the source").await?;
    check_stream(source, &from)?;
    let to = described(
        target,
        table.name_in(&target.label),
        "It is the replica; `farshore provision --apply` creates it",
    )
    .await?;
    check_keys((source, &from), (target, &to))?;
    if from.table_id().is_some() && from.table_id() == to.table_id() {
        return Err(Failure::new(
            format!(
                "Table {} in {} and its replica in {} are one and the same table",
                table.name, source.label, target.label
            ),
            "Both have the same table id, so it would be replicated into itself",
            "Correct the regions' endpoints and credentials, or the table's name in tables[].names",
        ));
    }
    check_reading(source, &from).await?;
    let key = primary_key(&from);
    check_repairing((source, &from), (target, &to), table.ttl_deletes, &key).await?;
    Ok(key)
}

/// Makes one call of each kind that the worker makes to the source, so that a denied permission
/// or a wrong endpoint shows before anything is written. Whether the replica may be written to
/// cannot be asked harmlessly.
async fn check_reading(source: &RegionClients, table: &TableDescription) -> Result<(), Failure> {
    let name = table.table_name().unwrap_or_default();
    let Some((arn, _)) = enabled_stream(table) else {
        return Ok(());
    };
    let failed = |fault: Fault| {
        Failure::from_fault(
            format!(
                "Table {name} could not be read in {} ({})",
                source.label, source.endpoint
            ),
            &fault,
        )
    };
    let streams = &source.streams;
    let shard = patiently(|| async {
        let call = streams.describe_stream().stream_arn(arn).limit(1);
        let answer = call.send().await;
        answer.map_err(|error| classify(Operation::DescribeStream, &error))
    });
    let shard = shard
        .await
        .map_err(failed)?
        .stream_description
        .and_then(|stream| stream.shards?.into_iter().next()?.shard_id);
    if let Some(shard) = shard.map(ShardId) {
        let read = patiently(|| async {
            ShardReader::new(streams.clone(), arn, &shard, Position::TrimHorizon)
                .next(1)
                .await
        });
        match read.await {
            Ok(_) => {}
            // The shard may have been trimmed a moment ago.
            Err(fault) if matches!(fault.policy(), Policy::Gap | Policy::NewIterator) => {}
            Err(fault) => return Err(failed(fault)),
        }
    }
    let scanned = patiently(|| async {
        let call = source.tables.scan().table_name(name).limit(1);
        let answer = call.send().await;
        answer.map_err(|error| classify(Operation::Scan, &error))
    });
    scanned.await.map(|_| ()).map_err(failed)
}

/// Makes one call of each kind that a repair makes to either table: repairs come due when there is
/// trouble already.
async fn check_repairing(
    (source, from): (&RegionClients, &TableDescription),
    (target, to): (&RegionClients, &TableDescription),
    ttl_deletes: TtlDeletes,
    key: &[KeyPart],
) -> Result<(), Failure> {
    for (region, table, operation) in [
        (source, from, Operation::ReadSource),
        (target, to, Operation::ReadReplica),
    ] {
        let name = table.table_name().unwrap_or_default();
        let keys = [any_key(key)];
        let asked = patiently(|| batch_get(operation, (&region.tables, name), &keys));
        if let Err(fault) = asked.await {
            return Err(Failure::from_fault(
                format!(
                    "An item of table {name} could not be read in {} ({}), and repairs would have to",
                    region.label, region.endpoint
                ),
                &fault,
            ));
        }
    }
    if ttl_deletes == TtlDeletes::Skip {
        let name = from.table_name().unwrap_or_default();
        patiently(|| ttl_attribute(&source.tables, name))
            .await
            .map_err(|fault| {
                Failure::from_fault(
                    format!(
                        "The time to live of table {name} could not be read in {} ({}), and \
                         ttl_deletes = \"skip\" needs it",
                        source.label, source.endpoint
                    ),
                    &fault,
                )
            })?;
    }
    Ok(())
}

/// A key of the right form; whether there is such an item does not matter.
pub fn any_key(key: &[KeyPart]) -> HashMap<String, AttributeValue> {
    key.iter()
        .map(|part| {
            let value = match part.kind.as_str() {
                "N" => AttributeValue::N("0".to_owned()),
                "B" => AttributeValue::B(Blob::new([0])),
                _ => AttributeValue::S("0".to_owned()),
            };
            (part.name.clone(), value)
        })
        .collect()
}

/// Makes a call a few times while it fails in a way that may pass by itself: one throttled call is
/// no reason not to start.
async fn patiently<T, F: Future<Output = Result<T, Fault>>>(
    call: impl Fn() -> F,
) -> Result<T, Fault> {
    let mut backoff = Backoff::new(START_PAUSE, START_LONGEST_PAUSE);
    for _ in 1..START_ATTEMPTS {
        match call().await {
            Err(fault) if fault.policy() == Policy::Retry => {
                tokio::time::sleep(backoff.pause()).await;
            }
            answer => return answer,
        }
    }
    call().await
}

async fn described(
    region: &RegionClients,
    name: &str,
    role: &str,
) -> Result<TableDescription, Failure> {
    patiently(|| describe(&region.tables, name))
        .await
        .map_err(|fault| unusable(region, name, &fault))?
        .ok_or_else(|| {
            Failure::new(
                format!("There is no table {name} in {} ({})", region.label, region.endpoint),
                role,
                "Create the table, or correct tables[].name (or tables[].names) in the configuration",
            )
        })
}

/// Checks that a source has a stream that says enough.
///
/// # Errors
/// A table without an enabled stream, or with one that leaves the new image out.
pub fn check_stream(region: &RegionClients, table: &TableDescription) -> Result<(), Failure> {
    let name = table.table_name().unwrap_or_default();
    let what = format!("Table {name} in {} cannot be replicated", region.label);
    let enable = format!(
        "aws dynamodb update-table --region {} --table-name {name} --stream-specification StreamEnabled=true,StreamViewType=NEW_AND_OLD_IMAGES",
        region.region
    );
    match enabled_stream(table) {
        None => Err(Failure::new(
            what,
            "It has no stream",
            format!("Enable one: {enable}"),
        )),
        Some((_, view)) if holds_new_images(view) => Ok(()),
        Some((_, view)) => Err(Failure::new(
            what,
            format!(
                "Its stream holds {}, and replication needs NEW_AND_OLD_IMAGES",
                view.map_or("an unknown view", StreamViewType::as_str)
            ),
            format!(
                "Disable the stream (a view type cannot be changed in place), then enable it anew: {enable}"
            ),
        )),
    }
}

/// Checks that two tables have the same primary key.
///
/// # Errors
/// A failure that shows both.
pub fn check_keys(
    source: (&RegionClients, &TableDescription),
    target: (&RegionClients, &TableDescription),
) -> Result<(), Failure> {
    let (from, to) = (primary_key(source.1), primary_key(target.1));
    if from == to {
        return Ok(());
    }
    Err(Failure::new(
        format!(
            "Table {} in {} cannot take the items of {} in {}",
            target.1.table_name().unwrap_or_default(),
            target.0.label,
            source.1.table_name().unwrap_or_default(),
            source.0.label
        ),
        format!(
            "Their keys differ: {} here, {} at the source",
            show_key(&to),
            show_key(&from)
        ),
        "Name another replica table in tables[].names, or delete this one and run `farshore provision --apply`",
    ))
}

/// A table that could not be asked at all.
pub fn unusable(region: &RegionClients, table: &str, fault: &crate::error::Fault) -> Failure {
    let what = match fault.operation {
        Operation::State => "read from",
        _ => "described in",
    };
    Failure::from_fault(
        format!(
            "Table {table} could not be {what} {} ({})",
            region.label, region.endpoint
        ),
        fault,
    )
}
