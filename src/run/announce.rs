//! Tells [`Whereabouts`] which region is active: of a worker that feeds by its snapshots of the state
//! table, of one that stands by from the control records of all regions.

use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use tokio::sync::watch;

use super::rows::Snapshot;
use super::start::Standby;
use crate::dynamo::clock::uptime;
use crate::error::{Class, Fault, Operation, UNREADABLE_ROW};
use crate::lease::control::{Answer, Verdict, decide};
use crate::lease::row::ControlRow;
use crate::observe::health::{Health, Scope};
use crate::observe::whereabouts::{CONFLICT, Known, STEADY, Whereabouts};

/// Readings in a lease: two may fail before what is known grows too old.
const READINGS: u32 = 3;

/// Tells what each snapshot says. Where the state table has no control record, or one of an earlier
/// epoch, `active` and `epoch` count, which decided at the start.
pub async fn tell_of_snapshots(
    mut rows: watch::Receiver<Arc<Snapshot>>,
    (active, epoch): (String, u64),
    whereabouts: Whereabouts,
) {
    loop {
        let snapshot = Arc::clone(&rows.borrow_and_update());
        if let Some(read) = snapshot.begun_uptime {
            let record = snapshot.control.as_ref();
            let known = match record.filter(|record| record.epoch >= epoch) {
                Some(record) => Known {
                    active: record.active.clone(),
                    epoch: record.epoch,
                    state: record.state.clone(),
                    read,
                },
                None => Known {
                    active: active.clone(),
                    epoch,
                    state: STEADY.to_owned(),
                    read,
                },
            };
            whereabouts.set(known);
        }
        if rows.changed().await.is_err() {
            return;
        }
    }
}

/// Reads the control records of all regions, for ever.
pub async fn watch_records(
    standby: Standby,
    lease: Duration,
    whereabouts: Whereabouts,
    health: Arc<Health>,
) {
    loop {
        let begun = uptime();
        read_records(&standby, &whereabouts, &health).await;
        let spent = uptime().saturating_sub(begun);
        tokio::time::sleep((lease / READINGS).saturating_sub(spent)).await;
    }
}

async fn read_records(standby: &Standby, whereabouts: &Whereabouts, health: &Health) {
    let read = uptime();
    let asked = standby.tables.iter().map(|(label, table)| async move {
        let answer = table.control().await;
        (label, answer_of(answer, whereabouts.group()))
    });
    let mut answers = Vec::new();
    let mut silent = Vec::new();
    for (label, answer) in join_all(asked).await {
        let is_here = label == whereabouts.here();
        match answer {
            Ok(answer) => {
                if is_here {
                    health.succeeded(Scope::State, "", "control");
                }
                answers.push((label.as_str(), answer));
            }
            // Without its own state table a worker knows nothing, and a record that it cannot read may
            // say anything.
            Err(fault) if is_here || fault.is_unreadable() => {
                if is_here {
                    health.failed(Scope::State, "", "control", &fault);
                }
                return whereabouts.unknown(format!(
                    "the control record in {label} could not be read: {}",
                    fault.summary()
                ));
            }
            Err(_) => {
                silent.push(label.as_str());
                answers.push((label.as_str(), Answer::Unreachable));
            }
        }
    }
    let known = |active: String, epoch, state| Known {
        active,
        epoch,
        state,
        read,
    };
    match decide(answers.iter().map(|(_, answer)| answer)) {
        Verdict::Decided { active, epoch } => {
            let state = state_of(&answers, &active, epoch);
            whereabouts.set(known(active, epoch, state));
        }
        Verdict::FromFile => whereabouts.set(known(standby.by_file.clone(), 1, STEADY.to_owned())),
        Verdict::Conflict { epoch, actives } => {
            whereabouts.set(known(actives.join(", "), epoch, CONFLICT.to_owned()));
        }
        Verdict::Unknown => whereabouts.unknown(format!(
            "there is no control record here, and {} did not answer; `farshore provision --apply` here creates one",
            silent.join(", ")
        )),
    }
}

/// What a region's state table said to who belongs to `group`.
fn answer_of(answer: Result<Option<ControlRow>, Fault>, group: &str) -> Result<Answer, Fault> {
    match answer {
        Ok(Some(record)) if record.group != group => Err(Fault::own(
            Operation::State,
            Class::Unknown,
            UNREADABLE_ROW,
            "the control record is another group's",
        )),
        Ok(Some(record)) => Ok(Answer::Record(Box::new(record))),
        Ok(None) => Ok(Answer::None),
        Err(fault) if fault.class == Class::NotFound => Ok(Answer::None),
        Err(fault) => Err(fault),
    }
}

/// The state of `epoch`, as the region says that it makes active: its record is the one that counts, and
/// those of other regions are copies. Where it does not answer, a copy that is not steady goes first.
fn state_of(answers: &[(&str, Answer)], active: &str, epoch: u64) -> String {
    let states = answers.iter().filter_map(|(label, answer)| match answer {
        Answer::Record(record) if record.epoch == epoch => Some((*label, record.state.as_str())),
        _ => None,
    });
    let counts = states.max_by_key(|(label, state)| (*label == active, *state != STEADY));
    counts.map_or(STEADY, |(_, state)| state).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(epoch: u64, state: &str) -> Answer {
        let mut row = ControlRow::first("g", "a", "test", "now".into());
        (row.epoch, row.state) = (epoch, state.to_owned());
        Answer::Record(Box::new(row))
    }

    #[test]
    fn the_record_of_the_active_region_counts_and_then_the_copy_that_is_not_steady() {
        let copies = [
            ("b", record(2, STEADY)),
            ("c", record(2, "quarantined")),
            ("d", record(1, "other")),
        ];
        assert_eq!(state_of(&copies, "a", 2), "quarantined");
        assert_eq!(state_of(&copies, "b", 2), STEADY);
        assert_eq!(state_of(&copies[..1], "a", 2), STEADY);
        let none = [("a", Answer::None), ("d", record(1, "other"))];
        assert_eq!(state_of(&none, "a", 1), "other");
    }
}
