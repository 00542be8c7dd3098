//! `farshore status`: shards, owners, checkpoints and gaps, from the state table of this region.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{answer, answer_json};
use crate::config::read::Loaded;
use crate::dynamo::Regions;
use crate::dynamo::clock::{host_ms, rfc3339};
use crate::error::{Exit, Failure};
use crate::lease::row::{ControlRow, GapRow, Row, ShardRow};
use crate::lease::table::StateTable;
use crate::run::start::unusable;

/// Pause before a shard without an owner is looked at again.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// Arguments of `status`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Answers as JSON
    #[arg(long)]
    json: bool,
}

/// What the state table says, sorted.
#[derive(Default)]
struct Found {
    control: Option<ControlRow>,
    shards: Vec<ShardRow>,
    gaps: Vec<GapRow>,
}

pub(super) async fn run(loaded: Loaded, args: &Args) -> Result<Exit, Failure> {
    super::provision::refuse_embedded(&loaded, "status")?;
    let regions = Regions::connect(&loaded.config).await?;
    let Some(region) = regions.get(&loaded.here) else {
        return Err(Failure::new(
            format!("Region {} is not known", loaded.here),
            "It is not in the configuration",
            "Set `here` to one of the regions",
        ));
    };
    let state = StateTable::new(region.tables.clone(), loaded.config.state_table());
    let look = async || {
        let rows = state.rows().await;
        rows.map(Found::new)
            .map_err(|fault| unusable(region, state.name(), &fault))
    };
    let mut found = look().await?;
    // Between the end of a shard and the moment its child is taken nobody owns the child, and all
    // is well. Workers look for such rows three times in a lease's duration.
    let patience = Instant::now() + loaded.config.leases.duration;
    let mut orphans = found.orphans();
    while !orphans.is_empty() && Instant::now() < patience {
        tokio::time::sleep(LOOK_AGAIN).await;
        found = look().await?;
        let still = found.orphans();
        orphans.retain(|row| still.contains(row));
    }
    if args.json {
        answer_json(&as_json(&loaded, &found))?;
    } else {
        answer(&as_text(&loaded, &found))?;
    }
    let needs_person = !found.gaps.is_empty() || !orphans.is_empty();
    Ok(if needs_person {
        Exit::Remains
    } else {
        Exit::Done
    })
}

impl Found {
    fn new(rows: Vec<Row>) -> Self {
        let mut found = Self::default();
        for row in rows {
            match row {
                Row::Control(row) => found.control = Some(row),
                Row::Shard(row) => found.shards.push(row),
                Row::Gap(row) => found.gaps.push(row),
                Row::Stream(_) | Row::Other(_) => {}
            }
        }
        found.shards.sort_by(|a, b| a.lease_key.cmp(&b.lease_key));
        found.gaps.sort_by(|a, b| a.lease_key.cmp(&b.lease_key));
        found
    }

    /// Shards that are not applied to their end.
    fn open(&self) -> impl Iterator<Item = &ShardRow> {
        self.shards.iter().filter(|row| !row.is_finished())
    }

    /// Lease keys of open shards that nobody owns although nothing holds them back. A child waits
    /// for its parent without an owner, and rightly so.
    fn orphans(&self) -> Vec<String> {
        let waits = |row: &ShardRow| {
            self.open().any(|parent| {
                parent.stream_arn == row.stream_arn
                    && row.parent_shard_id.contains(&parent.shard_id)
            })
        };
        self.open()
            .filter(|row| row.lease_owner.is_none() && !waits(row))
            .map(|row| row.lease_key.clone())
            .collect()
    }
}

fn as_json(loaded: &Loaded, found: &Found) -> Value {
    json!({
        "version": 1,
        "group": loaded.config.group,
        "here": loaded.here,
        "active": found.control.as_ref().map(|control| &control.active),
        "epoch": found.control.as_ref().map(|control| control.epoch),
        "finishedShards": found.shards.len() - found.open().count(),
        "shards": found.open().map(|row| json!({
            "table": row.table,
            "shard": row.shard_id,
            "epoch": row.epoch,
            "owner": row.lease_owner,
            "checkpoint": row.checkpoint,
            "appliedUntil": row.watermark.map(rfc3339),
            "headroomSeconds": row.headroom,
        })).collect::<Vec<_>>(),
        "gaps": found.gaps.iter().map(|gap| json!({
            "table": gap.table,
            "reason": gap.reason.label(),
            "detail": gap.detail,
            "at": gap.at,
            "next": gap.reason.next_step(),
        })).collect::<Vec<_>>(),
    })
}

fn as_text(loaded: &Loaded, found: &Found) -> String {
    let mut lines = Vec::new();
    let active = match &found.control {
        Some(control) => format!("active {} (epoch {})", control.active, control.epoch),
        None => "no control record".to_owned(),
    };
    lines.push(format!(
        "group {}, here {}, {active}",
        loaded.config.group, loaded.here
    ));
    for table in &loaded.config.tables {
        let open: Vec<&ShardRow> = found.open().filter(|row| row.table == table.name).collect();
        let finished = found
            .shards
            .iter()
            .filter(|row| row.table == table.name && row.is_finished())
            .count();
        lines.push(format!(
            "\n{}: {} open shard(s), {finished} finished",
            table.name,
            open.len()
        ));
        for row in open {
            lines.push(format!(
                "  {}  {}  owner {}",
                row.shard_id,
                progress(row),
                row.lease_owner.as_deref().unwrap_or("none"),
            ));
        }
        for gap in found.gaps.iter().filter(|gap| gap.table == table.name) {
            lines.push(format!(
                "  GAP {} since {}: records were never applied. {}.",
                gap.reason.label(),
                gap.at,
                gap.reason.next_step()
            ));
        }
    }
    lines.join("\n")
}

fn progress(row: &ShardRow) -> String {
    match row.watermark {
        Some(watermark) => {
            let age = (host_ms() - watermark).max(0) / 1_000;
            format!("applied until {} ({age} s ago)", rfc3339(watermark))
        }
        None => format!("at {}", row.checkpoint),
    }
}
