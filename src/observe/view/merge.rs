//! What workers answer, laid over what the state table says. Pure.

use std::collections::BTreeMap;

use super::{RegionState, View};
use crate::observe::events::EVENTS_MAX;
use crate::observe::headline::headline;

/// Adds to `view`, made of the state table, what `workers` of the same group and region say. The proven
/// recovery point stays that of the state table: it was computed now.
pub fn merge(view: &mut View, workers: &[View]) {
    for worker in workers {
        view.worker = view.worker.take().or_else(|| worker.worker.clone());
        regions(view, worker);
        tables(view, worker);
        dead_letters(view, worker);
        for reason in &worker.reasons {
            let known = (view.reasons.iter())
                .any(|known| known.code == reason.code && known.table == reason.table);
            if !known {
                view.reasons.push(reason.clone());
            }
        }
        for outage in &worker.outages {
            if !view.outages.contains(outage) {
                view.outages.push(outage.clone());
            }
        }
        view.events.extend(worker.events.iter().cloned());
        let points = |view: &View| view.history.as_ref().map_or(0, |h| h.points.len());
        if points(worker) > points(view) || view.history.is_none() {
            view.history.clone_from(&worker.history);
        }
    }
    view.events.sort_by(|a, b| b.at.cmp(&a.at));
    view.events.truncate(EVENTS_MAX);
    view.headline = headline(view);
}

/// The worst state that somebody sees.
fn regions(view: &mut View, worker: &View) {
    for region in &mut view.regions {
        let Some(theirs) = (worker.regions.iter()).find(|theirs| theirs.label == region.label)
        else {
            continue;
        };
        let is_worse = match (region.state, theirs.state) {
            (_, RegionState::Unknown) => false,
            (RegionState::Unknown, _) => true,
            (RegionState::Ok, theirs) => theirs != RegionState::Ok,
            _ => false,
        };
        if is_worse {
            *region = theirs.clone();
        }
    }
}

fn tables(view: &mut View, worker: &View) {
    for table in &mut view.tables {
        let Some(theirs) = (worker.tables.iter()).find(|theirs| theirs.name == table.name) else {
            continue;
        };
        let most = |a: Option<f64>, b: Option<f64>| match (a, b) {
            (Some(a), Some(b)) => Some(a.max(b)),
            (a, b) => a.or(b),
        };
        let sum = |a: Option<u64>, b: Option<u64>| match (a, b) {
            (Some(a), Some(b)) => Some(a + b),
            (a, b) => a.or(b),
        };
        table.lag_seconds = most(table.lag_seconds, theirs.lag_seconds);
        table.iterator_age_seconds = most(table.iterator_age_seconds, theirs.iterator_age_seconds);
        table.records_total = sum(table.records_total, theirs.records_total);
        table.dead_letters_total = sum(table.dead_letters_total, theirs.dead_letters_total);
        // What is in the worker's memory is newer than what it last stored.
        let (ours, theirs) = (&mut table.recovery_point, theirs.recovery_point);
        if let (Some(estimated), Some(newer)) = (ours.estimated_seconds, theirs.estimated_seconds) {
            ours.estimated_seconds = Some(estimated.min(newer));
        }
    }
    let estimated = view.tables.iter();
    let estimated = estimated.map(|table| table.recovery_point.estimated_seconds);
    view.recovery_point.estimated_seconds = estimated.reduce(|a, b| Some(a?.max(b?))).flatten();
}

fn dead_letters(view: &mut View, worker: &View) {
    let (ours, theirs) = (&mut view.dead_letters, &worker.dead_letters);
    ours.waiting = ours.waiting.max(theirs.waiting);
    ours.oldest_seconds_left = match (ours.oldest_seconds_left, theirs.oldest_seconds_left) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    };
    ours.since = match (ours.since.take(), theirs.since.clone()) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    };
    let mut counts: BTreeMap<(String, String), u64> = BTreeMap::new();
    for refused in ours.by_reason.drain(..).chain(theirs.by_reason.clone()) {
        *counts.entry((refused.table, refused.class)).or_default() += refused.count;
    }
    ours.by_reason = counts
        .into_iter()
        .map(|((table, class), count)| super::Refused {
            table,
            class,
            count,
        })
        .collect();
}

#[cfg(test)]
#[path = "merge_tests.rs"]
mod tests;
