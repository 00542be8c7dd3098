//! `farshore status`: shards, owners, checkpoints and gaps, from the state table of this region.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::{answer, answer_json};
use crate::config::read::Loaded;
use crate::dynamo::Regions;
use crate::dynamo::clock::{host_ms, rfc3339};
use crate::error::{Exit, Failure};
use crate::lease::row::{ControlRow, GapRow, Row, ShardRow};
use crate::lease::table::StateTable;
use crate::observe::board::RETENTION_MS;
use crate::run::start::unusable;
use crate::stream::stream_label;

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
    let rows = state
        .rows()
        .await
        .map_err(|fault| unusable(region, state.name(), &fault))?;
    let mut found = Found::default();
    for row in rows {
        match row {
            Row::Control(row) => found.control = Some(row),
            Row::Shard(row) => found.shards.push(row),
            Row::Gap(row) => found.gaps.push(row),
            Row::Stream(_) | Row::Worker(_) | Row::Doubt(_) | Row::Pause(_) | Row::Other(_) => {}
        }
    }
    found.keep_current(&loaded);
    found.shards.sort_by(|a, b| a.lease_key.cmp(&b.lease_key));
    found.gaps.sort_by(|a, b| a.lease_key.cmp(&b.lease_key));
    if args.json {
        answer_json(&as_json(&loaded, &found))?;
    } else {
        answer(&as_text(&loaded, &found))?;
    }
    let silent_after_ms = silent_after_ms(&loaded);
    let unread = loaded
        .config
        .tables
        .iter()
        .any(|table| !found.open().any(|row| row.table == table.name));
    let feeds = found
        .control
        .as_ref()
        .is_none_or(|control| control.active != loaded.here);
    let needs_person = !found.gaps.is_empty()
        || found.orphans(silent_after_ms).next().is_some()
        || found
            .open()
            .any(|row| silence_s(row, silent_after_ms).is_some())
        || (unread && feeds);
    Ok(if needs_person {
        Exit::Remains
    } else {
        Exit::Done
    })
}

/// A row that its owner has not written for this long has no living owner: three leases.
fn silent_after_ms(loaded: &Loaded) -> i64 {
    i64::try_from(loaded.config.leases.duration.as_millis())
        .unwrap_or(i64::MAX)
        .saturating_mul(3)
}

/// For how many seconds the owner of `row` has been silent, if that is too long.
fn silence_s(row: &ShardRow, silent_after_ms: i64) -> Option<i64> {
    let silent_ms = host_ms() - row.updated_at?;
    (row.lease_owner.is_some() && silent_ms > silent_after_ms).then_some(silent_ms / 1_000)
}

/// Seconds until the stream forgets the oldest position not known to be applied, now; `None` for a
/// shard of which nothing is known yet.
fn headroom_s(row: &ShardRow) -> Option<i64> {
    Some((row.watermark? + RETENTION_MS - host_ms()).max(0) / 1_000)
}

impl Found {
    /// Leaves out what nobody follows any more: tables no longer in the file, other epochs, and
    /// what is finished of streams that were re-created (their gap says so). Stream labels are
    /// times, so the highest is the newest.
    fn keep_current(&mut self, loaded: &Loaded) {
        let epoch = self.control.as_ref().map(|control| control.epoch);
        self.shards.retain(|row| {
            epoch.is_none_or(|epoch| row.epoch == epoch)
                && loaded.config.tables.iter().any(|t| t.name == row.table)
        });
        let mut newest: BTreeMap<String, String> = BTreeMap::new();
        for row in &self.shards {
            let label = stream_label(&row.stream_arn);
            let known = newest.entry(row.table.clone()).or_default();
            if label > known.as_str() {
                label.clone_into(known);
            }
        }
        // What an old stream still has to say is applied before the new one's.
        self.shards.retain(|row| {
            !row.is_finished()
                || newest.get(&row.table).map(String::as_str) == Some(stream_label(&row.stream_arn))
        });
    }

    /// Shards that are not applied to their end.
    fn open(&self) -> impl Iterator<Item = &ShardRow> {
        self.shards.iter().filter(|row| !row.is_finished())
    }

    /// Open shards that nobody owns although nothing holds them back. A child waits for its
    /// parent, and a new stream for the old one, without an owner, and rightly so; at a rotation or
    /// a deploy nobody owns a shard for a moment.
    fn orphans(&self, after_ms: i64) -> impl Iterator<Item = &ShardRow> {
        self.open().filter(move |row| {
            let waits = self.open().any(|other| {
                let of_parent = other.stream_arn == row.stream_arn
                    && row.parent_shard_id.contains(&other.shard_id);
                // A new stream waits for the old one.
                let of_old_stream = other.table == row.table
                    && stream_label(&other.stream_arn) < stream_label(&row.stream_arn);
                of_parent || of_old_stream
            });
            let since_ms = row.updated_at.unwrap_or(row.created_at);
            row.lease_owner.is_none() && !waits && host_ms() - since_ms > after_ms
        })
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
            "headroomSeconds": headroom_s(row),
            "ownerSilentSeconds": silence_s(row, silent_after_ms(loaded)),
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
            "\n{}: {} open shard(s), {finished} finished{}",
            table.name,
            open.len(),
            if open.is_empty() {
                ": NOBODY READS IT"
            } else {
                ""
            }
        ));
        for row in open {
            let silence = silence_s(row, silent_after_ms(loaded)).map_or_else(String::new, |s| {
                format!("  SILENT for {s} s: is its worker dead?")
            });
            lines.push(format!(
                "  {}  {}  {}  owner {}{silence}",
                row.shard_id,
                progress(row),
                headroom_s(row).map_or_else(
                    || "headroom unknown".to_owned(),
                    |s| format!("{} h until the stream forgets", s / 3_600)
                ),
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
