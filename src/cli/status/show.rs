//! What was found, as JSON and as text.

use std::time::Duration;

use serde_json::{Value, json};

use super::{Doubts, Found, Job, headroom_s, silence_s, silent_after_ms};
use crate::config::read::Loaded;
use crate::dynamo::clock::{host_ms, rfc3339};
use crate::lease::row::{HowFar, JobKind, PauseRow, ShardRow, WorkerRow};
use crate::observe::health;

/// Whether a worker has written its row lately, as far as its clock and this host's agree.
fn is_alive(row: &WorkerRow, silent_after_ms: i64) -> bool {
    host_ms() - row.updated_at <= silent_after_ms
}

/// The documented form.
pub(super) fn as_json(loaded: &Loaded, found: &Found) -> Value {
    let silent_after_ms = silent_after_ms(loaded);
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
            "ownerSilentSeconds": silence_s(row, silent_after_ms),
        })).collect::<Vec<_>>(),
        "gaps": found.gaps.iter().map(|gap| json!({
            "table": gap.table,
            "reason": gap.reason.label(),
            "detail": gap.detail,
            "at": gap.at,
            "next": gap.reason.next_step(),
        })).collect::<Vec<_>>(),
        "pauses": found.pauses.iter().map(|pause| json!({
            "table": pause.table,
            "by": pause.by,
            "reason": pause.reason,
            "since": pause.at,
        })).collect::<Vec<_>>(),
        "doubts": found.doubts_by_table().iter().map(|(table, doubts)| json!({
            "table": table,
            "open": doubts.open,
            "until": rfc3339(doubts.until_ms),
            "overdue": doubts.overdue,
        })).collect::<Vec<_>>(),
        "audits": found.audits.iter().map(|(table, verified_ms)| json!({
            "table": table,
            "verifiedAt": verified_ms.map(rfc3339),
        })).collect::<Vec<_>>(),
        "jobs": found.jobs.iter().map(|job| json!({
            "kind": job.kind.label(),
            "id": job.id,
            "table": job.table,
            "source": job.source,
            "target": job.target,
            "applies": job.applies,
            "percent": job.percent,
            "secondsLeft": job.left_s,
            "processes": job.processes,
            "different": job.different,
            "alive": job.alive,
            "ended": job.ended,
            "deletesOutstanding": job.outstanding.map(|(extra, _)| extra),
        })).collect::<Vec<_>>(),
        "workers": found.workers.iter().map(|row| json!({
            "id": row.worker,
            "version": row.version,
            "epoch": row.epoch,
            "since": row.since,
            "shards": found.held_by(&row.worker),
            "updatedAt": rfc3339(row.updated_at),
            "alive": is_alive(row, silent_after_ms),
        })).collect::<Vec<_>>(),
    })
}

/// Lines for a person.
pub(super) fn as_text(loaded: &Loaded, found: &Found) -> String {
    let active = match &found.control {
        Some(control) => format!("active {} (epoch {})", control.active, control.epoch),
        None => "no control record".to_owned(),
    };
    let mut lines = vec![format!(
        "group {}, here {}, {active}",
        loaded.config.group, loaded.here
    )];
    for pause in found.pauses.iter().filter(|row| row.table.is_none()) {
        lines.push(paused("ALL TABLES PAUSED", pause));
    }
    lines.extend(found.workers.iter().map(|row| {
        let alive = if is_alive(row, silent_after_ms(loaded)) {
            ""
        } else {
            "  SILENT: is it dead?"
        };
        let held = found.held_by(&row.worker);
        format!(
            "worker {}  {}  {held} shard(s)  since {}{alive}",
            row.worker, row.version, row.since
        )
    }));
    let doubts = found.doubts_by_table();
    for table in &loaded.config.tables {
        of_table(&mut lines, loaded, found, &table.name);
        if let Some(doubts) = doubts.get(table.name.as_str()) {
            lines.push(in_doubt(doubts));
        }
        if let Some(verified_ms) = found.audits.get(&table.name) {
            lines.push(match verified_ms {
                Some(ms) => format!("  audit: found equal at {}", rfc3339(*ms)),
                None => "  audit: not found equal yet".to_owned(),
            });
        }
        let jobs = found.jobs.iter().filter(|job| job.table == table.name);
        lines.extend(jobs.map(compared));
    }
    lines.join("\n")
}

/// A line about a copy or a repair that the fleet makes by itself.
fn by_itself(job: &Job) -> String {
    let table = &job.table;
    let what = match job.kind {
        JobKind::Bootstrap => "COPYING",
        _ => "repair of gaps",
    };
    let how = match (job.outstanding, job.ended) {
        (Some((extra, allowed)), _) => format!(
            "deletes-outstanding ({extra}): so many items of the replica are not in the source, and no more than {allowed} are deleted without a person. Look at them with `farshore reconcile --table {table} --report FILE`, then delete them with `farshore reconcile --table {table} --apply --max-deletes {extra}`"
        ),
        (None, true) if job.kind != JobKind::Bootstrap && job.applies => "done".to_owned(),
        (None, true) if job.applies => {
            "all is read, and the stream has not passed its end yet".to_owned()
        }
        (None, true) => format!(
            "{} difference(s); reconcile.on_gap = \"report\"",
            job.different
        ),
        (None, false) => {
            let how_far = HowFar {
                percent: job.percent,
                left_s: job.left_s,
                ended: false,
            };
            let found = match job.kind {
                JobKind::Bootstrap => "item(s) copied",
                _ => "difference(s)",
            };
            let by = match job.alive {
                true => format!("{} process(es)", job.processes),
                false => "nobody is at it now (no worker, or a closed tap)".to_owned(),
            };
            format!(
                "{}, {by}, {} {found} so far",
                health::progress(how_far),
                job.different
            )
        }
    };
    format!("  {what} {} -> {}: {how}", job.source, job.target)
}

fn compared(job: &Job) -> String {
    if job.kind.is_the_workers() {
        return by_itself(job);
    }
    let does = match job.applies {
        true => "repairs",
        false => "compares",
    };
    let how = match (job.alive, job.left_s) {
        (false, _) => format!("nobody is at it: `farshore reconcile --resume {}`", job.id),
        (true, None) => "just begun".to_owned(),
        (true, Some(left_s)) => {
            let left = humantime::format_duration(Duration::from_secs(left_s));
            format!("about {left} left, {} process(es)", job.processes)
        }
    };
    format!(
        "  reconcile {} {does} {} -> {}: {} %, {how}, {} difference(s) so far",
        job.id, job.source, job.target, job.percent, job.different
    )
}

fn of_table(lines: &mut Vec<String>, loaded: &Loaded, found: &Found, table: &str) {
    let open: Vec<&ShardRow> = found.open().filter(|row| row.table == table).collect();
    let finished = found
        .shards
        .iter()
        .filter(|row| row.table == table && row.is_finished())
        .count();
    lines.push(format!(
        "\n{table}: {} open shard(s), {finished} finished{}",
        open.len(),
        if open.is_empty() {
            ": NOBODY READS IT"
        } else {
            ""
        }
    ));
    let own = |row: &&PauseRow| row.table.as_deref() == Some(table);
    lines.extend(
        found
            .pauses
            .iter()
            .filter(own)
            .map(|row| paused("  PAUSED", row)),
    );
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
    for gap in found.gaps.iter().filter(|gap| gap.table == table) {
        lines.push(format!(
            "  GAP {} since {}: records were never applied. {}.",
            gap.reason.label(),
            gap.at,
            gap.reason.next_step()
        ));
    }
}

fn paused(what: &str, row: &PauseRow) -> String {
    format!("{what} by {} since {}: {}", row.by, row.at, row.reason)
}

fn in_doubt(doubts: &Doubts) -> String {
    let overdue = match doubts.overdue {
        0 => String::new(),
        n => format!("; {n} OVERDUE: they should have been repaired more than ten minutes ago"),
    };
    format!(
        "  {} range(s) in doubt: repaired after {}{overdue}",
        doubts.open,
        rfc3339(doubts.until_ms)
    )
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
