//! The control record: which region is active, who may write where. Pure rules; the rows come from
//! outside.
//!
//! ```text
//!                 part of a region, by the highest epoch seen anywhere
//!
//!    feeds ◀──────── another region is active ────────┐
//!      │  it becomes active                           │ its stranded writes are captured
//!      ▼                                              │
//!    active ──── another becomes active ────▶ quarantined: nobody writes there
//!
//!    two records of one epoch that name different regions: nobody applies anywhere, until a higher one exists
//! ```
//!
//! *Why a region that was active waits, even after a planned switchover in which everything was applied
//! and its stream showed nothing any more*: its application is not fenced. It may write after the last
//! look at the stream, and a flow back that has begun would put the new active region's value over that
//! write, with no trace of it: in the quarantine it is still there to be captured. No look is late enough,
//! so the way back never begins by itself.

use super::row::{ControlRow, PAST_MAX, Previous, state};
use crate::mutation::{self, Mutation};

/// What a region's state table said.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    /// It holds this record.
    Record(Box<ControlRow>),
    /// It answered and has no record (or there is no state table).
    None,
    /// It did not answer. That is not the same as having none.
    Unreachable,
}

impl Answer {
    /// The record, where there is one.
    pub fn record(&self) -> Option<&ControlRow> {
        match self {
            Answer::Record(record) => Some(record),
            Answer::None | Answer::Unreachable => None,
        }
    }
}

/// Which region is active, as all answers together say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// A record decides.
    Decided {
        /// Label of the active region.
        active: String,
        /// Number of the epoch.
        epoch: u64,
    },
    /// Two records of one epoch name different regions: nobody applies.
    Conflict {
        /// The epoch.
        epoch: u64,
        /// The regions named.
        actives: Vec<String>,
    },
    /// Nobody has a record, and all answered: the file's `active` counts, in epoch 1.
    FromFile,
    /// Nobody who answered has a record, and not all answered: nobody may decide.
    Unknown,
}

/// Highest epoch wins wherever seen; one number with two targets is a conflict; absence counts
/// only if everybody answered.
pub fn decide<'a>(answers: impl IntoIterator<Item = &'a Answer>) -> Verdict {
    let mut all_answered = true;
    let mut records = Vec::new();
    for answer in answers {
        match answer {
            Answer::Record(record) => records.push(record.as_ref()),
            Answer::None => {}
            Answer::Unreachable => all_answered = false,
        }
    }
    match verdict(records.iter().copied()) {
        Verdict::Unknown if all_answered => Verdict::FromFile,
        verdict => verdict,
    }
}

/// As [`decide`], of the records that were seen. Nobody else was asked.
pub fn verdict<'a>(seen: impl IntoIterator<Item = &'a ControlRow, IntoIter: Clone>) -> Verdict {
    match highest(seen.into_iter()) {
        None => Verdict::Unknown,
        Some((epoch, actives)) => match actives.as_slice() {
            [active] => Verdict::Decided {
                active: (*active).to_owned(),
                epoch,
            },
            _ => Verdict::Conflict {
                epoch,
                actives: actives.into_iter().map(str::to_owned).collect(),
            },
        },
    }
}

/// The highest epoch among `records`, and the regions that its records name, in order.
fn highest<'a>(
    records: impl Iterator<Item = &'a ControlRow> + Clone,
) -> Option<(u64, Vec<&'a str>)> {
    let epoch = records.clone().map(|record| record.epoch).max()?;
    let of_epoch = records.filter(|record| record.epoch == epoch);
    let mut actives: Vec<&str> = of_epoch
        .flat_map(|record| record.rivals.iter().chain([&record.active]))
        .map(String::as_str)
        .collect();
    actives.sort_unstable();
    actives.dedup();
    Some((epoch, actives))
}

/// The newest of the records that name `active` in `epoch`: copies are older than what they were made
/// of, or as old.
pub fn newest<'a>(
    records: impl IntoIterator<Item = &'a ControlRow>,
    active: &str,
    epoch: u64,
) -> Option<&'a ControlRow> {
    let of_epoch = records
        .into_iter()
        .filter(|record| record.epoch == epoch && record.active == active);
    of_epoch.max_by_key(|record| (record.state != state::QUARANTINED, record.lease_counter))
}

/// A flow of data: what a writer believes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flow<'a> {
    /// Number of its epoch.
    pub epoch: u64,
    /// Label of the region that is active in it.
    pub active: &'a str,
}

/// What a writer has to do, given the records it has seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Heed {
    /// It goes on: nobody has seen a later epoch.
    GoOn,
    /// Its epoch is over: it stops at once, and acknowledges that.
    Over {
        /// The epoch that ended it.
        epoch: u64,
        /// The region that is active in that.
        active: String,
    },
    /// Records of one epoch contradict each other: it stops as well.
    Conflict {
        /// The epoch.
        epoch: u64,
        /// The regions named.
        actives: Vec<String>,
    },
}

impl Heed {
    /// The epoch that is acknowledged by stopping; `None` for who goes on.
    pub fn epoch(&self) -> Option<u64> {
        match self {
            Heed::GoOn => None,
            Heed::Over { epoch, .. } | Heed::Conflict { epoch, .. } => Some(*epoch),
        }
    }
}

/// Whether a writer of `flow` goes on, given every record that was ever seen.
pub fn heed<'a>(
    flow: Flow<'_>,
    seen: impl IntoIterator<Item = &'a ControlRow, IntoIter: Clone>,
) -> Heed {
    if mutation::is_off(Mutation::Epoch) {
        return Heed::GoOn;
    }
    let Some((epoch, actives)) = highest(seen.into_iter()) else {
        return Heed::GoOn;
    };
    if epoch < flow.epoch {
        return Heed::GoOn;
    }
    match actives.as_slice() {
        [active] if epoch == flow.epoch && *active == flow.active => Heed::GoOn,
        [active] if epoch > flow.epoch => Heed::Over {
            epoch,
            active: (*active).to_owned(),
        },
        _ => {
            let mut actives: Vec<String> = actives.into_iter().map(str::to_owned).collect();
            if epoch == flow.epoch && !actives.iter().any(|active| active == flow.active) {
                actives.push(flow.active.to_owned());
                actives.sort_unstable();
            }
            Heed::Conflict { epoch, actives }
        }
    }
}

/// What a region is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Part {
    /// It is the active one: nothing is fed into it.
    Active,
    /// It is fed from the active one.
    Fed,
    /// It was active, and may hold writes that never left: nobody writes there.
    Quarantined,
}

/// The part of the region `here` while `active` is active in `epoch`. `own` is the record in the state
/// table of `here`, `seen` all records.
pub fn part<'a>(
    here: &str,
    (active, epoch): (&str, u64),
    own: Option<&ControlRow>,
    seen: impl IntoIterator<Item = &'a ControlRow>,
) -> Part {
    if here == active {
        return Part::Active;
    }
    if mutation::is_off(Mutation::Quarantine) {
        return Part::Fed;
    }
    let was_active = |own: &ControlRow| own.epoch < epoch && own.active == here;
    let says_so = |own: &ControlRow| own.state == state::QUARANTINED;
    let newest = newest(seen, active, epoch);
    // Said by the record itself, of this very epoch, once what it held is captured.
    if newest.is_some_and(|record| record.has_returned(here)) {
        return Part::Fed;
    }
    let told = newest.is_some_and(|record| record.quarantined.iter().any(|label| label == here));
    match told || own.is_some_and(|own| was_active(own) || says_so(own)) {
        true => Part::Quarantined,
        false => Part::Fed,
    }
}

/// The copy of `record` that the state table of `here` is to hold, in place of `own`. `None` where that
/// says as much already.
pub fn copy_for(
    here: &str,
    part: Part,
    record: &ControlRow,
    own: Option<&ControlRow>,
) -> Option<ControlRow> {
    let known = own.is_some_and(|own| {
        let stays = match part {
            Part::Quarantined => own.state == state::QUARANTINED,
            // It came home: a copy that says that it waits would bring the quarantine back.
            _ if own.state == state::QUARANTINED => !record.has_returned(here),
            // That it is home is worth knowing there, too.
            _ => own.is_home(here) || !record.is_home(here),
        };
        // Another failover's record of the same epoch, or the copy that tells of both: overwritten, it
        // would be a conflict that nobody sees.
        let contradicts = own.active != record.active || !own.rivals.is_empty();
        own.epoch > record.epoch || (own.epoch == record.epoch && (stays || contradicts))
    });
    // The record itself, and not a copy.
    if known || record.active == here {
        return None;
    }
    let mut copy = record.clone();
    copy.state = match part {
        Part::Quarantined => state::QUARANTINED,
        Part::Active | Part::Fed => state::STEADY,
    }
    .to_owned();
    // When the epoch began is where the way home begins.
    let begun = ["begun-first", "begun"];
    copy.steps
        .retain(|step| begun.contains(&step.step.as_str()) || step.step.starts_with("home:"));
    copy.actions.clear();
    copy.running = None;
    copy.closing_until = None;
    Some(copy)
}

/// The copy in the state table of `here` that says that `actives` contradict each other in `epoch`, in place
/// of `own`: without it, who starts anew while those do not answer would go on with an epoch that is over.
pub fn conflict_copy(
    group: &str,
    here: &str,
    (epoch, actives): (u64, &[String]),
    own: Option<&ControlRow>,
    at: String,
) -> Option<ControlRow> {
    let known = own.is_some_and(|own| {
        let tells = actives.iter().all(|active| own.rivals.contains(active));
        // The record itself of one of them: nothing is fed there, and it is the only one there is.
        let is_one = own.active == here && own.rivals.is_empty();
        own.epoch > epoch || (own.epoch == epoch && (tells || is_one))
    });
    let first = actives.first().filter(|_| !known)?;
    let mut copy = ControlRow::first(group, first, "farshore", at);
    copy.epoch = epoch;
    copy.epoch_label = format!("{epoch}-conflict");
    state::CONFLICT.clone_into(&mut copy.state);
    "several failovers to one epoch were seen".clone_into(&mut copy.reason);
    copy.rivals = actives.to_vec();
    if let Some(own) = own {
        // What was quarantined stays so, this region as well: the copy replaces what says that it was active.
        let waits = own.state == state::QUARANTINED || (own.active == here && own.epoch < epoch);
        let quarantined = own.quarantined.iter().cloned();
        copy.quarantined = quarantined.chain(waits.then(|| here.to_owned())).collect();
        copy.quarantined.sort_unstable();
        copy.quarantined.dedup();
        copy.past.clone_from(&own.past);
        if own.epoch < epoch {
            copy.past.push(Previous {
                active: own.active.clone(),
                epoch: own.epoch,
            });
        }
    }
    Some(copy)
}

/// What the state table of `here` is to say before anybody there acknowledges what was `seen`, in place of
/// `own`; `None` where it says as much already. It goes by all that was seen by now, and not by what ended
/// an epoch first: that may be over itself.
pub fn adopted(
    group: &str,
    here: &str,
    seen: &[ControlRow],
    own: Option<&ControlRow>,
    at: String,
) -> Option<ControlRow> {
    match verdict(seen) {
        Verdict::Decided { active, epoch } => {
            let record = newest(seen, &active, epoch)?;
            let part = part(here, (&active, epoch), own, seen);
            copy_for(here, part, record, own)
        }
        Verdict::Conflict { epoch, actives } => {
            conflict_copy(group, here, (epoch, &actives), own, at)
        }
        Verdict::FromFile | Verdict::Unknown => None,
    }
}

/// The record that makes `to` active, after all that was `seen`; `active` and `epoch` are what they say
/// together. `aside` are regions that contradict each other, or wait in quarantine, whoever says so; `first` is what it
/// is made of.
pub fn successor<'a>(
    to: &str,
    (active, epoch): (&str, u64),
    aside: &[String],
    seen: impl IntoIterator<Item = &'a ControlRow>,
    first: ControlRow,
) -> ControlRow {
    let seen: Vec<&ControlRow> = seen.into_iter().collect();
    let current = seen.iter().filter(|record| record.epoch == epoch);
    // Copies may be older than the record that says that somebody came home.
    let came_home = |label: &String| current.clone().any(|record| record.is_home(label));
    let back = current.clone().flat_map(|record| record.returned.clone());
    // Who was on its way home waits again.
    let waiting = current
        .clone()
        .flat_map(|record| record.quarantined.clone());
    let mut quarantined: Vec<String> = waiting
        .chain(back)
        .filter(|label| !came_home(label))
        .chain(aside.iter().cloned())
        .chain([active.to_owned()])
        .filter(|label| label != to)
        .collect();
    quarantined.sort_unstable();
    quarantined.dedup();
    let previous = Previous {
        active: active.to_owned(),
        epoch,
    };
    let mut past: Vec<Previous> = seen
        .iter()
        .flat_map(|record| {
            let itself = Previous {
                active: record.active.clone(),
                epoch: record.epoch,
            };
            let rivals = record.rivals.iter().map(|rival| Previous {
                active: rival.clone(),
                epoch: record.epoch,
            });
            record.past.iter().cloned().chain([itself]).chain(rivals)
        })
        .chain([previous.clone()])
        .collect();
    past.sort_by(|one, other| (one.epoch, &one.active).cmp(&(other.epoch, &other.active)));
    past.dedup();
    let too_many = past.len().saturating_sub(PAST_MAX);
    past.drain(..too_many);
    ControlRow {
        active: to.to_owned(),
        past,
        epoch: epoch + 1,
        epoch_label: format!("{}-{to}", epoch + 1),
        state: state::FENCING.to_owned(),
        previous: Some(previous),
        quarantined,
        ..first
    }
}

#[cfg(test)]
#[path = "control_tests.rs"]
mod tests;
