//! What the main loop looks at once a second: where the shards stand, taps, doubts, signs of life.

use std::collections::BTreeMap;

use super::context::Shared;
use super::rows::Snapshot;
use super::tap::pause_of;
use crate::lease::orphans::readable;
use crate::lease::row::{PauseRow, ShardRow};
use crate::observe::health::{TableDoubts, TableTap};
use crate::observe::metrics;
use crate::observe::recovery::of_group;
pub use crate::observe::view::build::DOUBT_PATIENCE_MS;

/// Shows where everything stands.
pub fn look(shared: &Shared) {
    let rows = shared.rows.borrow().clone();
    let open = rows
        .shards
        .iter()
        .filter(|row| row.epoch == shared.epoch && !row.is_finished())
        .filter(|row| shared.config.tables.iter().any(|t| t.name == row.table))
        .map(|row| (row.table.as_str(), row.shard_id.as_str(), row.proven_ms()));
    let now_ms = shared.source.clock.now_ms();
    let headroom = shared.board.publish(open, now_ms);
    let points = shared.recovery_points(&rows);
    let age = of_group(points.values()).age(shared.clock());
    shared.board.set_points(points, age, now_ms);
    if rows.read {
        show_rows(shared, &rows, &headroom);
        note_unowned(shared, &rows);
    }
    for (table, writer) in &shared.writers {
        let budget = writer.budget();
        metrics::write_budget(table, budget.share(), budget.rate());
    }
    shared.look_at_halts();
    shared.health.watch();
}

/// Shows taps and doubts.
fn show_rows(shared: &Shared, rows: &Snapshot, headroom: &BTreeMap<String, f64>) {
    let now_ms = shared.target.clock.now_ms();
    for table in &shared.config.tables {
        let name = table.name.as_str();
        let pause = pause_of(&rows.pauses, name);
        metrics::paused(name, pause.is_some());
        shared
            .health
            .set_headroom(name, headroom.get(name).copied());
        shared.health.set_tap(
            name,
            pause.map(|row| TableTap {
                by: row.by.clone(),
                reason: row.reason.clone(),
                since: row.at.clone(),
                headroom_s: headroom.get(name).copied(),
            }),
            last_resumed(&rows.pauses, name),
        );
        let doubts = doubts_of(rows, shared.epoch, name, now_ms);
        metrics::doubts_open(name, doubts.open);
        shared.health.set_doubts(name, doubts);
    }
}

/// Who opened the tap of `table` last, and why.
fn last_resumed<'a>(pauses: &'a [PauseRow], table: &str) -> Option<(&'a str, &'a str)> {
    pauses
        .iter()
        .filter(|row| row.is_about(table))
        .filter_map(|row| row.resumed.as_ref())
        .max_by(|a, b| a.at.cmp(&b.at))
        .map(|resumed| (resumed.by.as_str(), resumed.reason.as_str()))
}

fn doubts_of(rows: &Snapshot, epoch: u64, table: &str, now_ms: i64) -> TableDoubts {
    let mut doubts = TableDoubts::default();
    for row in &rows.doubts {
        if row.table == table && row.epoch == epoch {
            doubts.open += 1;
            doubts.overdue += usize::from(row.due + DOUBT_PATIENCE_MS < now_ms);
        }
    }
    doubts
}

/// Tells health which shards could be read and have no living owner.
fn note_unowned(shared: &Shared, rows: &Snapshot) {
    let Some(begun) = rows.begun else {
        return;
    };
    let ours = |table: &str| shared.config.tables.iter().any(|t| t.name == table);
    let unowned = readable(&rows.shards, shared.epoch)
        .filter(|row| ours(&row.table) && rows.takeable.contains(&row.lease_key))
        .map(|row| (row.table.clone(), row.lease_key.clone()));
    let unowned: Vec<(String, String)> = unowned.collect();
    for table in &shared.config.tables {
        let of_table = |row: &&ShardRow| row.epoch == shared.epoch && row.table == table.name;
        let open = rows.shards.iter().filter(of_table);
        let open = open.filter(|row| !row.is_finished()).count();
        let nobodys = unowned.iter().filter(|(of, _)| *of == table.name).count();
        metrics::shards(&table.name, open, nobodys);
    }
    let unowned = unowned.into_iter();
    shared.health.set_unowned(unowned, begun);
}
