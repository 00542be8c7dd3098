//! The verdict: once Farshore says that it has caught up, is it true?

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::types::AttributeValue as V;
use farshore::embedded::gateway::Gateway;

use crate::common::checker;
use crate::common::stand::{SOURCE, Stand, TARGET, client};

use super::fleet::Fleet;
use super::workload::Poison;
use super::{POISON, Table, Tables};

/// Differences shown in full.
const SHOWN: usize = 3;
const SHOWN_WIDTH: usize = 200;
/// Writes of a key shown with its difference, the newest.
const SHOWN_CALLS: usize = 10;

type Row = HashMap<String, V>;

/// Past all faults: clients of the servers behind the gateways.
pub struct Views {
    pub source: Client,
    pub target: Client,
}

impl Views {
    pub fn of(stand: &Stand) -> Self {
        let behind = |gateway: &Gateway, region| client(&gateway.embedded().endpoint_url(), region);
        Self {
            source: behind(&stand.gateways[0], SOURCE),
            target: behind(&stand.gateways[1], TARGET),
        }
    }

    /// All rows of the state table.
    pub async fn rows(&self, tables: &Tables) -> Vec<Row> {
        let mut rows = Vec::new();
        let mut after = None;
        loop {
            let scan = self.target.scan().table_name(&tables.state);
            let scan = scan.consistent_read(true).set_exclusive_start_key(after);
            let page = scan.send().await.unwrap();
            rows.extend(page.items.unwrap_or_default());
            after = page.last_evaluated_key.filter(|key| !key.is_empty());
            if after.is_none() {
                return rows;
            }
        }
    }
}

fn text<'a>(row: &'a Row, name: &str) -> &'a str {
    match row.get(name) {
        Some(V::S(text)) => text,
        _ => "",
    }
}

fn is(row: &Row, kind: &str) -> bool {
    text(row, "entityType") == kind
}

fn shard_rows<'a>(rows: &'a [Row], table: &str) -> BTreeMap<&'a str, &'a Row> {
    let ours = rows
        .iter()
        .filter(|row| is(row, "shard") && text(row, "table") == table);
    ours.map(|row| (text(row, "shardId"), row)).collect()
}

/// What is still to happen before Farshore itself says that everything until `quiet_ms` is applied,
/// and by whom the shards are read. Empty once all is settled.
pub async fn unsettled(
    stand: &Stand,
    tables: &Tables,
    fleet: &Fleet,
    quiet_ms: i64,
) -> Vec<String> {
    let rows = Views::of(stand).rows(tables).await;
    let mut open = Vec::new();
    let held = stand.gateways[1].held().len();
    if held > 0 {
        open.push(format!("{held} writes are held back"));
    }
    let doubts = rows.iter().filter(|row| is(row, "doubt")).count();
    if doubts > 0 {
        open.push(format!("{doubts} doubts"));
    }
    let alive: Vec<String> = fleet
        .up()
        .map(|worker| format!("-{}#", worker.pid()))
        .collect();
    let mut owned = 0;
    for table in tables.all() {
        let leases = shard_rows(&rows, &table.name);
        for shard in stand.gateways[0].shards(&table.name) {
            let Some(row) = leases.get(shard.id.as_str()) else {
                // The row of a finished shard may have been deleted.
                if shard.open {
                    open.push(format!("no row of {}", shard.id));
                }
                continue;
            };
            if !shard.open {
                if text(row, "checkpoint") != "SHARD_END" {
                    open.push(format!("not at its end: {}", shard.id));
                }
                continue;
            }
            let owner = text(row, "leaseOwner");
            if alive.iter().any(|worker| owner.contains(worker)) {
                owned += 1;
            } else {
                open.push(format!("{} is owned by `{owner}`", shard.id));
            }
            let watermark = row.get("watermark").and_then(|value| value.as_n().ok());
            let watermark: i64 = watermark.and_then(|ms| ms.parse().ok()).unwrap_or(0);
            if watermark < quiet_ms {
                let behind = quiet_ms - watermark;
                open.push(format!("{} is {behind} ms behind", shard.id));
            }
        }
    }
    let mut held = 0.0;
    for worker in fleet.up() {
        held += worker.metric("farshore_leases_held").await;
    }
    if held != f64::from(owned) {
        open.push(format!(
            "workers say they hold {held} leases, the rows {owned}"
        ));
    }
    open
}

/// Rules that hold of the rows at any time, and that nothing is missing at the end.
pub fn judge_rows(rows: &[Row], tables: &Tables) -> Vec<String> {
    let gaps = rows.iter().filter(|row| is(row, "gap"));
    let mut troubles: Vec<String> = gaps
        .map(|row| format!("a gap without a loss: {}", text(row, "leaseKey")))
        .collect();
    for table in tables.all() {
        let leases = shard_rows(rows, &table.name);
        for (id, row) in &leases {
            let begun = !matches!(text(row, "checkpoint"), "TRIM_HORIZON" | "AT_TIMESTAMP");
            let parents = match row.get("parentShardId") {
                Some(V::Ss(parents)) => parents.as_slice(),
                _ => &[],
            };
            for parent in parents {
                let parent = leases.get(parent.as_str());
                if begun && parent.is_some_and(|row| text(row, "checkpoint") != "SHARD_END") {
                    troubles.push(format!("{id} was begun before its parent had ended"));
                }
            }
        }
    }
    troubles
}

/// How the replica differs from its source, poison aside: how many keys, and the first few.
pub async fn divergences(
    views: &Views,
    target: &Gateway,
    table: &Table,
) -> (usize, Vec<String>, BTreeSet<String>) {
    let from = checker::items_by(&views.source, &table.name, table.key()).await;
    let to = checker::items_by(&views.target, &table.name, table.key()).await;
    let keys: BTreeSet<&String> = from.keys().chain(to.keys()).collect();
    let poisonous = |key: &str| key.starts_with(&format!("S{POISON}"));
    let differs = |key: &&&String| from.get(**key) != to.get(**key) && !poisonous(key);
    let differing: Vec<&&String> = keys.iter().filter(differs).collect();
    let show = |item: Option<&String>| match item {
        Some(item) => item.chars().take(SHOWN_WIDTH).collect(),
        None => "(none)".to_owned(),
    };
    let shown = differing.iter().take(SHOWN).map(|key| {
        let (from, to) = (show(from.get(**key)), show(to.get(**key)));
        let calls = calls_on(target, table, key);
        format!(
            "{key} of {}\n  source  {from}\n  replica {to}\n{calls}",
            table.name
        )
    });
    let taken = to.keys().filter(|key| poisonous(key)).cloned().collect();
    (differing.len(), shown.collect(), taken)
}

/// The newest writes of a key, as the replica's gateway saw them.
fn calls_on(target: &Gateway, table: &Table, key: &str) -> String {
    let json = table.json_of(key);
    let concerned = |call: &farshore::embedded::gateway::Call| {
        let mut keys = call.keys.iter();
        keys.any(|key| key.table == table.name && key.json == json)
    };
    let calls = target.calls_where(concerned);
    let newest = calls.iter().rev().take(SHOWN_CALLS).rev();
    let seconds = |at: Option<Duration>| match at {
        Some(at) => format!("{:.3}", at.as_secs_f64()),
        None => "never".to_owned(),
    };
    let lines = newest.map(|call| {
        let arrived = call.arrived.as_secs_f64();
        let (effect, outcome) = (seconds(call.effect), &call.outcome);
        let (operation, faults) = (&call.operation, &call.faults);
        format!("  {operation} at {arrived:.3}, effect {effect}, {outcome:?} {faults:?}\n")
    });
    lines.collect()
}

/// The dead letters are those of the poison that was written, and no others.
pub fn judge_letters(stand: &Stand, tables: &Tables, poison: &Poison) -> Vec<String> {
    let mut troubles = Vec::new();
    let mut told: BTreeSet<String> = BTreeSet::new();
    for letter in stand.dead_letters() {
        let table = letter["table"].as_str().unwrap_or_default();
        let key = tables.all().into_iter().find(|known| known.name == table);
        let key = key.and_then(|table| table.named_in(&letter["keys"]));
        let Some(key) = key else {
            troubles.push(format!("a dead letter of nobody knows what, in `{table}`"));
            continue;
        };
        let reason = (&letter["error"]["code"], &letter["error"]["class"]);
        let poisonous = key.contains(POISON);
        if !poisonous || *reason.0 != "ValidationException" || *reason.1 != "validation" {
            troubles.push(format!("{key} is dead-lettered for {reason:?}"));
        }
        told.insert(key);
    }
    let untold = poison.difference(&told);
    troubles.extend(untold.map(|key| format!("{key} is not among the dead letters")));
    troubles
}

/// Waits until all is settled; what is not after `patience`.
pub async fn settle(
    stand: &Stand,
    tables: &Tables,
    fleet: &mut Fleet,
    quiet_ms: i64,
    patience: Duration,
) -> Vec<String> {
    let start = Instant::now();
    loop {
        fleet.tend();
        let mut open = unsettled(stand, tables, fleet, quiet_ms).await;
        if !fleet.is_whole() {
            open.push("a worker is not up".to_owned());
        }
        if open.is_empty() || start.elapsed() > patience {
            return open;
        }
        tokio::time::sleep(Duration::from_millis(150)).await;
    }
}
