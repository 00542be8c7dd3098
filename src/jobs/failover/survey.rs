//! What is known before a failover: who answers, what the target lacks, what would be lost.

use std::collections::BTreeSet;
use std::time::Duration;

use futures::future::join_all;

use crate::config::Config;
use crate::config::read::Loaded;
use crate::dynamo::clock::Reading;
use crate::dynamo::table::{describe, enabled_stream, holds_new_images};
use crate::dynamo::{RegionClients, Regions};
use crate::error::{Class, Failure, Fault};
use crate::lease::control::{Answer, Part, Verdict, decide, part};
use crate::lease::row::{ControlRow, JobKind, Row, ShardRow, WorkerRow, comparisons, state};
use crate::lease::table::StateTable;
use crate::observe::board::RETENTION_MS;
use crate::observe::liveness::Limits;
use crate::observe::recovery::{Age, Ground, Live, Moments, of_tables};
use crate::run::proven::heard;
use crate::run::rows::Snapshot;
use crate::run::start::unusable;

/// Longest wait for a region that need not answer.
const OTHERS_TIMEOUT: Duration = Duration::from_secs(2);

/// A region, as far as it answered.
pub struct RegionSeen {
    /// Its label.
    pub label: String,
    /// Its state table.
    pub state: StateTable,
    /// What that said.
    pub answer: Answer,
    /// Why it did not answer, where it did not.
    pub fault: Option<String>,
}

/// A table in the target, as far as its rows tell.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct TableSeen {
    /// Its name in the configuration.
    pub name: String,
    /// Its recovery point: before which moments of the source everything is known to be applied.
    pub moments: Moments,
    /// How old that is: what may be lost.
    pub age: Age,
    /// Seconds until the stream forgets the oldest position not known to be applied.
    pub headroom_s: Option<i64>,
    /// Open shards.
    pub shards: usize,
    /// Open shards that nobody owns.
    pub unowned: usize,
    /// Ranges in doubt.
    pub doubts: usize,
    /// What is missing in it, by the name that `--accept-loss` takes, with one sentence.
    pub losses: Vec<(String, String)>,
    /// Whether it has a stream that the way back, and late writes, could be read from. `None`: not known.
    pub stream: Option<bool>,
}

/// What is known before a failover.
pub struct Survey {
    /// Label of the target.
    pub to: String,
    /// The target.
    pub target: RegionClients,
    /// All regions, the target first.
    pub regions: Vec<RegionSeen>,
    /// Label of the active region now.
    pub active: String,
    /// Number of the epoch now.
    pub epoch: u64,
    /// Regions that contradict each other in that epoch.
    pub rivals: Vec<String>,
    /// The record in the target's state table.
    pub own: Option<ControlRow>,
    /// What the target's state table holds of tables.
    pub tables: Vec<TableSeen>,
    /// Processes that feed the target, as their rows say.
    pub workers: Vec<WorkerRow>,
    /// What has a name that `--accept-loss` takes and is no table's.
    pub losses: Vec<(String, String)>,
}

impl Survey {
    /// Every record that was seen.
    pub fn records(&self) -> Vec<ControlRow> {
        let answers = self.regions.iter().filter_map(|seen| seen.answer.record());
        answers.cloned().collect()
    }

    /// The state table of the target.
    pub fn state(&self) -> &StateTable {
        // The first one is always there, and it is the target's.
        &self.regions[0].state
    }

    /// How old the recovery point of the group is, the worst of its tables.
    pub fn age(&self) -> Age {
        let ages = self.tables.iter().map(|table| table.age);
        let worst = |of: fn(&Age) -> Option<f64>| {
            let all: Option<Vec<f64>> = ages.clone().map(|age| of(&age)).collect();
            all.and_then(|all| all.into_iter().reduce(f64::max))
        };
        Age {
            proven_s: worst(|age| age.proven_s),
            estimated_s: worst(|age| age.estimated_s),
        }
    }

    /// Everything that is lost, by the name that `--accept-loss` takes.
    pub fn all_losses(&self) -> Vec<(String, String)> {
        let of_tables = self.tables.iter().flat_map(|table| table.losses.clone());
        self.losses.iter().cloned().chain(of_tables).collect()
    }

    /// Regions other than the target that wait, whoever says so: they contradict each other, or are in
    /// quarantine.
    pub fn aside(&self) -> Vec<String> {
        let records = self.records();
        let current = (self.active.as_str(), self.epoch);
        let waits = |seen: &&RegionSeen| {
            let part = part(&seen.label, current, seen.answer.record(), &records);
            seen.label != self.to && part == Part::Quarantined
        };
        let waiting = self.regions.iter().filter(waits);
        let waiting = waiting.map(|seen| seen.label.clone());
        self.rivals.iter().cloned().chain(waiting).collect()
    }

    /// Whether a failover to the target has begun and not come to its end.
    pub fn is_under_way(&self) -> bool {
        self.own.as_ref().is_some_and(|own| {
            own.active == self.to
                && own.epoch == self.epoch
                && self.rivals.is_empty()
                && [state::FENCING, state::ACTIONS, state::WATCHING].contains(&own.state.as_str())
        })
    }
}

/// Looks at what a failover to `to` would meet. Writes nothing, and asks other regions only for what need
/// not be answered.
///
/// # Errors
/// What makes it impossible: an unknown region, one that is active already, no state table there, a
/// target that does not answer, records that nobody can read.
pub async fn survey(loaded: &Loaded, regions: &Regions, to: &str) -> Result<Survey, Failure> {
    let config = &loaded.config;
    let target = regions.get(to).ok_or_else(|| {
        let labels: Vec<&str> = config.regions.keys().map(String::as_str).collect();
        let nearest = labels
            .iter()
            .min_by_key(|label| strsim::damerau_levenshtein(label, to));
        Failure::new(
            format!("Region {to} is not known"),
            format!("The configuration has {}", labels.join(", ")),
            nearest.map_or_else(
                || "Name one of them".to_owned(),
                |label| format!("Did you mean `{label}`?"),
            ),
        )
    })?;
    let all = regions;
    let regions = ask(config, regions, target).await?;
    let (active, epoch, rivals) = standing(config, &regions)?;
    let own = regions[0].answer.record().cloned();
    let state = &regions[0].state;
    let rows = state.rows().await;
    let rows = rows.map_err(|fault| unusable(target, state.name(), &fault))?;
    let mut survey = Survey {
        to: to.to_owned(),
        target: target.clone(),
        regions,
        active,
        epoch,
        rivals,
        own,
        tables: Vec::new(),
        workers: Vec::new(),
        losses: Vec::new(),
    };
    if survey.active == to && survey.rivals.is_empty() && !survey.is_under_way() {
        let since = survey.own.as_ref().map_or_else(String::new, |own| {
            format!(", since {} ({}, {})", own.at, own.by, own.reason)
        });
        return Err(Failure::new(
            format!("{to} is the active region already"),
            format!("It is so in epoch {}{since}", survey.epoch),
            "Name the region that is to become active",
        ));
    }
    survey.look_at(config, all, rows);
    survey.look_at_streams(config).await;
    survey.name_losses();
    Ok(survey)
}

/// Reads the record of every region; only the target has to answer.
async fn ask(
    config: &Config,
    regions: &Regions,
    target: &RegionClients,
) -> Result<Vec<RegionSeen>, Failure> {
    let name = config.state_table();
    let others = regions.iter().filter(|region| region.label != target.label);
    let asked = std::iter::once(target).chain(others).map(async |region| {
        let is_target = region.label == target.label;
        let client = match is_target {
            true => region.tables.clone(),
            false => region.tables_within(OTHERS_TIMEOUT),
        };
        let state = StateTable::new(client, name.clone());
        let answer = state.control().await;
        (region, state, answer)
    });
    let mut seen = Vec::new();
    for (region, state, answer) in join_all(asked).await {
        let (answer, fault) = match answer {
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
            Ok(Some(record)) => (Answer::Record(Box::new(record)), None),
            Ok(None) => (Answer::None, None),
            Err(fault) if fault.class == Class::NotFound && region.label == target.label => {
                return Err(Failure::new(
                    format!("There is no state table {name} in {}", region.label),
                    "Nothing was ever replicated into it that could be failed over to",
                    "Create it there with `farshore provision --apply` and let `farshore run` feed it, or name another region",
                ));
            }
            Err(fault) if fault.class == Class::NotFound => (Answer::None, None),
            // A record that this version cannot read is there all the same, and may say anything.
            Err(fault) if region.label == target.label || fault.is_unreadable() => {
                return Err(unusable(region, &name, &fault));
            }
            Err(fault) => (Answer::Unreachable, Some(fault.to_string())),
        };
        seen.push(RegionSeen {
            label: region.label.clone(),
            state,
            answer,
            fault,
        });
    }
    Ok(seen)
}

/// The active region, the epoch, and who contradict each other in it.
fn standing(
    config: &Config,
    regions: &[RegionSeen],
) -> Result<(String, u64, Vec<String>), Failure> {
    match decide(regions.iter().map(|seen| &seen.answer)) {
        Verdict::Decided { active, epoch } => Ok((active, epoch, Vec::new())),
        Verdict::FromFile => Ok((config.active.clone(), 1, Vec::new())),
        Verdict::Conflict { epoch, actives } => {
            let first = actives.first().cloned().unwrap_or_default();
            Ok((first, epoch, actives))
        }
        Verdict::Unknown => Err(Failure::new(
            "Nobody can say which region is active",
            "The target has no control record, and not all other regions answered",
            "Make them reachable, or create the record with `farshore provision --apply` where it is missing",
        )),
    }
}

impl Survey {
    fn look_at(&mut self, config: &Config, regions: &Regions, rows: Vec<Row>) {
        let found = Snapshot::of(rows);
        self.workers.clone_from(&found.workers);
        // Of a failover under way, or of two that contradict each other, the epoch before counts.
        let before = found.shards.iter().map(|row| row.epoch);
        let before = before.filter(|epoch| *epoch < self.epoch).max();
        let epoch = match self.is_under_way() || !self.rivals.is_empty() {
            true => before.unwrap_or(self.epoch),
            false => self.epoch,
        };
        let source = regions
            .get(&self.active)
            .map(|source| source.clock.reading());
        let (clock, _) = heard(source.flatten(), self.target.clock.reading());
        let replica_ms = self.target.clock.now_ms();
        self.tables = tables_seen(config, &found, epoch, (clock, replica_ms));
    }

    /// Whether the tables are there, and have a stream. It is good to know, and nobody waits for it longer
    /// than a moment: what says so is no data plane, and may be down with the other region.
    async fn look_at_streams(&mut self, config: &Config) {
        let client = &self.target.tables;
        let label = &self.target.label;
        let names: Vec<String> = (self.tables.iter())
            .map(|seen| {
                let table = config.tables.iter().find(|table| table.name == seen.name);
                table
                    .map_or(seen.name.as_str(), |table| table.name_in(label))
                    .to_owned()
            })
            .collect();
        let asked = names
            .iter()
            .map(async |name| tokio::time::timeout(OTHERS_TIMEOUT, describe(client, name)).await);
        let described = join_all(asked).await;
        for ((seen, name), described) in self.tables.iter_mut().zip(&names).zip(described) {
            seen.stream = match described {
                Ok(Ok(Some(described))) => {
                    Some(enabled_stream(&described).is_some_and(|(_, view)| holds_new_images(view)))
                }
                Ok(Ok(None)) => {
                    let why = format!("there is no table {name} in {label}");
                    seen.losses.push((format!("{}:absent", seen.name), why));
                    None
                }
                Ok(Err(_)) | Err(_) => None,
            };
        }
    }

    fn name_losses(&mut self) {
        if !self.rivals.is_empty() {
            self.losses.push((
                "conflict".to_owned(),
                format!(
                    "epoch {} names several active regions ({}): what was written in the others is stranded there",
                    self.epoch,
                    self.rivals.join(", ")
                ),
            ));
        }
        let records = self.records();
        let own = self.own.as_ref();
        let current = (self.active.as_str(), self.epoch);
        if part(&self.to, current, own, &records) == Part::Quarantined {
            self.losses.push((
                "quarantined".to_owned(),
                format!(
                    "{} was active before and is in quarantine: it lacks what was written in {} since",
                    self.to, self.active
                ),
            ));
        }
    }
}

/// What the rows of a replica's state table tell of its tables in `epoch`, by the source's clock and by the
/// replica's.
pub(in crate::jobs) fn tables_seen(
    config: &Config,
    found: &Snapshot,
    epoch: u64,
    (clock, replica_ms): (Reading, i64),
) -> Vec<TableSeen> {
    let jobs = comparisons(&found.plans, &found.segments);
    let limit = Limits::of(config).listing.as_millis();
    let ground = Ground {
        epoch,
        shards: &found.shards,
        streams: &found.streams,
        gaps: &found.gaps,
        doubts: &found.doubts,
        jobs: &jobs,
        // What the workers have in memory only would die with them.
        live: &Live::new(),
        source_ms: clock.now_ms,
        replica_ms,
        listing_limit_ms: i64::try_from(limit).unwrap_or(i64::MAX),
    };
    let names = config.tables.iter().map(|table| table.name.as_str());
    of_tables(ground, names)
        .into_iter()
        .map(|(name, moments)| {
            let mut seen = table_seen(found, name, epoch, (clock.now_ms, replica_ms));
            (seen.moments, seen.age) = (moments, moments.age(clock));
            seen
        })
        .collect()
}

/// What the rows tell of a table at this time, by the source's clock and by the target's.
fn table_seen(
    rows: &Snapshot,
    name: &str,
    epoch: u64,
    (source_ms, now_ms): (i64, i64),
) -> TableSeen {
    let of_table = |row: &&ShardRow| row.epoch == epoch && row.table == *name;
    let of_table = rows.shards.iter().filter(of_table);
    let open: Vec<&ShardRow> = of_table.filter(|row| !row.is_finished()).collect();
    let oldest_ms = open.iter().map(|row| row.proven_ms()).min();
    let doubts = rows.doubts.iter();
    let doubts = doubts.filter(|row| row.epoch == epoch && row.table == *name);
    TableSeen {
        name: name.to_owned(),
        headroom_s: oldest_ms.map(|ms| (ms + RETENTION_MS - source_ms).max(0) / 1_000),
        shards: open.len(),
        unowned: open.iter().filter(|row| row.lease_owner.is_none()).count(),
        doubts: doubts.count(),
        losses: losses_of(rows, name, epoch, now_ms),
        ..TableSeen::default()
    }
}

/// What is missing in the replica of a table, by the name that `--accept-loss` takes, with one sentence.
pub(super) fn losses_of(
    rows: &Snapshot,
    name: &str,
    epoch: u64,
    now_ms: i64,
) -> Vec<(String, String)> {
    let mut losses = Vec::new();
    let mut streams = rows.streams.iter();
    if !streams.any(|row| row.is_of(epoch, name) && row.initialised) {
        losses.push((
            format!("{name}:not-followed"),
            "no worker has begun to replicate it in this epoch".to_owned(),
        ));
    }
    let mut gaps = BTreeSet::new();
    for gap in rows.gaps.iter().filter(|gap| gap.table == name) {
        if gaps.insert(gap.reason) {
            losses.push((
                format!("{name}:gap-{}", gap.reason.label()),
                format!("records were never applied, noticed at {}", gap.at),
            ));
        }
    }
    for job in comparisons(&rows.plans, &rows.segments) {
        let plan = job.plan;
        if plan.table != name || plan.epoch != epoch {
            continue;
        }
        match plan.kind() {
            JobKind::Bootstrap => losses.push((
                format!("{name}:copying"),
                "its first copy has not come to its end, or the stream has not passed that"
                    .to_owned(),
            )),
            JobKind::Asked if job.is_unfinished(epoch, now_ms) => losses.push((
                format!("{name}:reconcile-unfinished"),
                format!("the repair {} did not come to its end", plan.job),
            )),
            _ => {}
        }
    }
    losses
}

/// The names of `losses` that `accepted` lacks.
pub fn unaccepted<'a>(
    losses: &'a [(String, String)],
    accepted: &[String],
) -> Vec<&'a (String, String)> {
    losses
        .iter()
        .filter(|(name, _)| !accepted.contains(name))
        .collect()
}

/// A call to the target failed.
pub(super) fn failed(target: &RegionClients, state: &StateTable, fault: &Fault) -> Failure {
    unusable(target, state.name(), fault)
}
