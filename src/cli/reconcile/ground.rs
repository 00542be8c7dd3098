//! Between which tables, and what may not be compared or repaired.

use std::sync::Arc;
use std::time::Duration;

use aws_sdk_dynamodb::types::TableDescription;

use super::super::one_shot::{Fed, Flow, Owners, elsewhere};
use super::Args;
use super::job::Asked;
use crate::config::read::Loaded;
use crate::config::{Table, TtlDeletes};
use crate::dynamo::read::{batch_get, scan_page};
use crate::dynamo::table::{KeyPart, describe, primary_key, show_key, ttl_attribute};
use crate::dynamo::{RegionClients, Regions};
use crate::error::{Failure, Fault, Operation};
use crate::jobs::reconcile::segments_of;
use crate::jobs::reconcile::strategy::Strategy;
use crate::lease::gaps;
use crate::lease::row::{
    Closes, Row, ShardRow, StreamRow, comparison_rows, comparisons, known_table_id,
};
use crate::lease::table::StateTable;
use crate::lease::term::Term;
use crate::repair::KeepExpired;
use crate::run::start::{any_key, find_standing, unusable};

/// An eventually consistent read unit.
const BYTES_PER_UNIT: f64 = 8_192.0;
/// Dollars for a million read units, on demand, in us-east-1 (AWS's price list of 2026).
const DOLLARS_PER_MILLION: f64 = 0.125;

/// Between which regions, and what is known of them.
pub(super) struct Ground<'a> {
    pub(super) loaded: &'a Loaded,
    pub(super) args: &'a Args,
    pub(super) asked: Asked,
    pub(super) source: &'a RegionClients,
    pub(super) target: &'a RegionClients,
    /// Label of the active region.
    pub(super) active: String,
    pub(super) epoch: u64,
    /// The right to write in that epoch.
    pub(super) term: Arc<Term>,
    /// The state tables of the other regions.
    pub(super) elsewhere: Vec<StateTable>,
    /// The state tables of the two regions, where they have one.
    pub(super) source_state: Option<StateTable>,
    pub(super) target_state: Option<StateTable>,
}

/// A table to compare, described on both sides.
pub(super) struct Pair<'a> {
    pub(super) table: &'a Table,
    pub(super) key: Vec<KeyPart>,
    pub(super) keep_expired: Option<KeepExpired>,
    /// Items and bytes of both sides together, as DescribeTable knows them.
    pub(super) items: i64,
    pub(super) bytes: i64,
    /// The larger side's.
    pub(super) largest_bytes: i64,
    /// What the service calls the source table.
    pub(super) source_id: Option<String>,
    /// Gaps that are closed once the tables are equal.
    pub(super) closes: Vec<Closes>,
}

pub(super) async fn ground<'a>(
    loaded: &'a Loaded,
    args: &'a Args,
    asked: Asked,
    regions: &'a Regions,
) -> Result<Ground<'a>, Failure> {
    let config = &loaded.config;
    let standing = find_standing(config, &loaded.here, regions).await?;
    let (active, epoch) = (standing.active.clone(), standing.epoch);
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
    let source = region(asked.source.as_deref().unwrap_or(&active))?;
    let target = match &asked.target {
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
    if asked.apply {
        standing.refuse_quarantined(&target.label)?;
    }
    let name = config.state_table();
    let state = async |place: &RegionClients| {
        let described = describe(&place.tables, &name).await;
        let described = described.map_err(|fault| unusable(place, &name, &fault))?;
        let table = || StateTable::new(place.tables.clone(), name.clone());
        Ok::<_, Failure>(described.map(|_| table()))
    };
    let target_state = state(target).await?;
    let source_state = match state(source).await {
        // With the flow nobody feeds the source: a role that may not look there may still repair.
        Err(failure) if source.label == active => {
            eprintln!(
                "note: whether anybody feeds {} could not be asked, and nobody should: {}",
                source.label,
                failure.to_string().replace('\n', " ").trim_end()
            );
            None
        }
        asked => asked?,
    };
    Ok(Ground {
        loaded,
        args,
        asked,
        source,
        target,
        active,
        epoch,
        term: Term::new(epoch, config.leases.duration, standing.begun),
        elsewhere: elsewhere(config, regions, &[&source.label, &target.label]),
        source_state,
        target_state,
    })
}

impl<'a> Ground<'a> {
    /// Describes a table on both sides, and refuses what cannot be compared.
    pub(super) async fn pair(&self, table: &'a Table) -> Result<Pair<'a>, Failure> {
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
            source_id: from.table_id().map(str::to_owned),
            closes: self.closes(table).await?,
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

    /// The gaps of `table` that a repair closes which begins now, with the flow. The others stay, as what was
    /// read before them may still be on its way.
    async fn closes(&self, table: &Table) -> Result<Vec<Closes>, Failure> {
        let (Some(state), true) = (&self.target_state, self.asked.apply) else {
            return Ok(Vec::new());
        };
        if !self.is_with_the_flow() {
            return Ok(Vec::new());
        }
        let rows = state.rows().await;
        let rows = rows.map_err(|fault| unusable(self.target, state.name(), &fault))?;
        let (mut shards, mut streams, mut doubts) = (Vec::new(), Vec::new(), Vec::new());
        let (mut open, mut others) = (Vec::new(), Vec::new());
        for row in rows {
            match row {
                Row::Shard(row) => shards.push(row),
                Row::Stream(row) => streams.push(row),
                Row::Doubt(row) => doubts.push(row),
                Row::Gap(row) if row.table == table.name => open.push(row),
                other => others.push(other),
            }
        }
        let (plans, segments) = comparison_rows(others);
        let now_ms = self.target.clock.now_ms();
        let ground = gaps::Ground {
            epoch: self.epoch,
            shards: &shards,
            streams: &streams,
            doubts: &doubts,
            jobs: &comparisons(&plans, &segments),
            now_ms,
        };
        let leases = &self.loaded.config.leases;
        let dead_after_ms = (leases.duration + leases.late_effect).as_millis() as i64;
        // Whoever is there renews its leases; clocks of workers and of this host may differ by as much.
        let is_dead = |row: &ShardRow| {
            let last_ms = row.updated_at.unwrap_or(row.created_at);
            last_ms + dead_after_ms * 2 < now_ms
        };
        let (closes, stay): (Vec<_>, Vec<_>) = open
            .into_iter()
            .partition(|gap| ground.is_repairable(gap, is_dead));
        for gap in stay {
            eprintln!(
                "note: the gap {} of {} is not closed by this: what was read before it may still be on its way",
                gap.reason.label(),
                table.name
            );
        }
        Ok(closes.iter().map(Closes::of).collect())
    }

    /// What is heeded while `tables` are written to.
    pub(super) fn flow<'b>(&'b self, tables: &'b [String]) -> Result<Flow<'b>, Failure> {
        let of =
            |region, state: &'b Option<StateTable>| state.as_ref().map(|state| (region, state));
        let place = of(self.target, &self.target_state).or(of(self.source, &self.source_state));
        let Some((region, state)) = place else {
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
        Ok(Flow {
            config: &self.loaded.config,
            region,
            state,
            active: &self.active,
            epoch: self.epoch,
            tables,
            heeds_tap: self.is_with_the_flow(),
            other: self.source_state.as_ref(),
            source: &self.source.label,
            target: &self.target.label,
            elsewhere: &self.elsewhere,
            term: &self.term,
            is_alone: matches!(self.asked.strategy, Strategy::Newest(_)),
        })
    }

    pub(super) fn is_with_the_flow(&self) -> bool {
        self.active == self.source.label
    }

    /// What a table made anew holds is not what the replica was made of: a person decides first.
    pub(super) async fn refuse_another_table(&self, pair: &Pair<'_>) -> Result<(), Failure> {
        let (Some(state), true) = (&self.target_state, self.is_with_the_flow()) else {
            return Ok(());
        };
        let rows = state.rows().await;
        let rows = rows.map_err(|fault| unusable(self.target, state.name(), &fault))?;
        let streams: Vec<StreamRow> = rows
            .into_iter()
            .filter_map(|row| match row {
                Row::Stream(row) => Some(row),
                _ => None,
            })
            .collect();
        let known = known_table_id(&streams, self.epoch, &pair.table.name);
        if known.is_none() || known == pair.source_id.as_deref() {
            return Ok(());
        }
        Err(Failure::new(
            format!(
                "Table {} in {} is not the one that was followed: it was made anew",
                pair.table.name, self.source.label
            ),
            "Its items may be older than the replica's, which would be overwritten",
            "Compare without --apply, and decide which side is right",
        ))
    }

    /// An empty source is a wrong source more often than it is right.
    pub(super) async fn refuse_empty_source(&self, pair: &Pair<'_>) -> Result<(), Failure> {
        for (region, should_hold) in [(self.source, true), (self.target, false)] {
            let name = pair.table.name_in(&region.label);
            let first = scan_page((&region.tables, name), (0, 1), None, Some(1)).await;
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

    pub(super) fn segments(&self, pair: &Pair<'_>) -> u32 {
        let chosen = self.loaded.config.reconcile.segments;
        self.asked.segments.unwrap_or_else(|| match chosen {
            0 => segments_of(pair.largest_bytes),
            segments => segments,
        })
    }

    /// The limit in units per second; `None` means none.
    pub(super) fn read_units(&self) -> Option<u32> {
        let config = &self.loaded.config.reconcile;
        let units = self.args.read_units.unwrap_or(config.read_units_per_second);
        (units > 0).then_some(units)
    }

    /// What will be read, and what may be overwritten.
    pub(super) async fn plan(&self, pairs: &[Pair<'_>]) -> String {
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
            if self.asked.apply {
                let active = match self.target.label == self.active {
                    true => ", the ACTIVE region",
                    false => "",
                };
                let name = pair.table.name_in(&self.target.label);
                let place = format!("{name} in {}{active}", self.target.label);
                let source = &self.source.label;
                let does = match &self.asked.strategy {
                    Strategy::Mirror => {
                        format!(
                            "will OVERWRITE {place} with what {source} holds, where they differ"
                        )
                    }
                    Strategy::Fill => format!(
                        "will ADD to {place} what only {source} holds; what is there is not touched"
                    ),
                    Strategy::Newest(attribute) => format!(
                        "will OVERWRITE {place} with what {source} holds, where its {attribute} is the greater one, and ADD what only {source} holds; nothing is deleted"
                    ),
                };
                lines.push(format!("{}: {does}", pair.table.name));
            }
        }
        lines.push("sizes are the service's own, up to six hours old".to_owned());
        if let Ok(flow) = self.flow(&self.asked.tables)
            && let Ok(Fed::Yes(who) | Fed::Maybe(who)) =
                flow.fed_the_other_way(&mut Owners::new()).await
        {
            lines.push(format!(
                "note: of {}, {who}: what is on its way there shows as a difference",
                self.source.label
            ));
        }
        lines.join("\n")
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
    scan_page(table, (0, 1), None, Some(1))
        .await
        .map_err(failed)?;
    let keys = [any_key(key)];
    batch_get(reading, table, &keys).await.map_err(failed)?;
    Ok(())
}
