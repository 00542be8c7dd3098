//! The control record: which region is active. Pure rules; the rows come from outside.

use super::row::ControlRow;

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
    let mut highest: Option<u64> = None;
    let mut actives: Vec<String> = Vec::new();
    let mut all_answered = true;
    for answer in answers {
        match answer {
            Answer::Record(record) => {
                if highest.is_none_or(|epoch| record.epoch > epoch) {
                    highest = Some(record.epoch);
                    actives.clear();
                }
                if highest == Some(record.epoch) && !actives.contains(&record.active) {
                    actives.push(record.active.clone());
                }
            }
            Answer::None => {}
            Answer::Unreachable => all_answered = false,
        }
    }
    match (highest, actives.as_slice()) {
        (Some(epoch), [active]) => Verdict::Decided {
            active: active.clone(),
            epoch,
        },
        (Some(epoch), _) => {
            actives.sort();
            Verdict::Conflict { epoch, actives }
        }
        (None, _) if all_answered => Verdict::FromFile,
        (None, _) => Verdict::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(epoch: u64, active: &str) -> Answer {
        let mut row = ControlRow::first("g", active, "test", "now".into());
        row.epoch = epoch;
        Answer::Record(Box::new(row))
    }

    fn decided(active: &str, epoch: u64) -> Verdict {
        Verdict::Decided {
            active: active.to_owned(),
            epoch,
        }
    }

    #[test]
    fn the_highest_epoch_wins_wherever_seen() {
        assert_eq!(decide(&[record(1, "a"), record(2, "b")]), decided("b", 2));
        assert_eq!(decide(&[record(2, "b"), record(1, "a")]), decided("b", 2));
        assert_eq!(
            decide(&[record(1, "a"), Answer::Unreachable]),
            decided("a", 1)
        );
        assert_eq!(decide(&[record(1, "a"), record(1, "a")]), decided("a", 1));
    }

    #[test]
    fn one_epoch_with_two_targets_is_a_conflict_unless_a_higher_one_exists() {
        assert_eq!(
            decide(&[record(2, "b"), record(2, "a"), Answer::None]),
            Verdict::Conflict {
                epoch: 2,
                actives: vec!["a".into(), "b".into()]
            }
        );
        assert_eq!(
            decide(&[record(2, "b"), record(2, "a"), record(3, "a")]),
            decided("a", 3)
        );
    }

    #[test]
    fn unreachable_is_not_absent() {
        assert_eq!(decide(&[Answer::None, Answer::None]), Verdict::FromFile);
        assert_eq!(
            decide(&[Answer::None, Answer::Unreachable]),
            Verdict::Unknown
        );
    }
}
