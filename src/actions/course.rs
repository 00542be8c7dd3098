//! In which order actions are done, where that stops, and where it goes on. Pure.
//!
//! ```text
//!   Course::new(actions, done before) ─▶ next ─▶ (it is done) ─▶ ended ─┬▶ next …
//!                                                                       ├▶ a required one failed: stopped
//!                                                                       └▶ none is left: complete
//! ```

use std::collections::BTreeSet;

use super::Outcome;
use crate::config::Action;
use crate::error::Failure;

/// How an action stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// Done by this run.
    Done,
    /// Done by an earlier run of the same failover.
    DoneBefore,
    /// Not done, and why.
    Failed(Failure),
    /// Not tried: a required one before it failed, or the run ended.
    Skipped,
}

impl Standing {
    /// The name in reports.
    pub const fn label(&self) -> &'static str {
        match self {
            Standing::Done => "done",
            Standing::DoneBefore => "done-before",
            Standing::Failed(_) => "failed",
            Standing::Skipped => "skipped",
        }
    }

    /// Whether it need not be done any more.
    pub const fn is_done(&self) -> bool {
        matches!(self, Standing::Done | Standing::DoneBefore)
    }
}

/// The actions of one failover on their way.
#[derive(Debug, Clone)]
pub struct Course<'a> {
    actions: &'a [Action],
    standings: Vec<Option<Standing>>,
    stopped: bool,
}

impl<'a> Course<'a> {
    /// The course of `actions`, of which those called `done` were done before.
    pub fn new(actions: &'a [Action], done: &BTreeSet<String>) -> Self {
        let standing =
            |action: &Action| done.contains(&action.name).then_some(Standing::DoneBefore);
        Self {
            actions,
            standings: actions.iter().map(standing).collect(),
            stopped: false,
        }
    }

    /// The next action to do: none once all are, or a required one failed.
    pub fn next(&self) -> Option<&'a Action> {
        if self.stopped {
            return None;
        }
        let open = self.standings.iter().position(Option::is_none)?;
        self.actions.get(open)
    }

    /// Takes down how the [`next`](Self::next) action went. One of another name is none of this
    /// course's and changes nothing.
    pub fn ended(&mut self, outcome: &Outcome) {
        let Some(open) = self.standings.iter().position(Option::is_none) else {
            return;
        };
        if self.stopped || self.actions[open].name != outcome.name {
            return;
        }
        self.standings[open] = Some(match &outcome.result {
            Ok(()) => Standing::Done,
            Err(failure) => {
                self.stopped = self.actions[open].required;
                Standing::Failed(failure.clone())
            }
        });
    }

    /// The names to remember: these are not done again.
    pub fn done(&self) -> BTreeSet<String> {
        self.standings()
            .filter(|(_, standing)| standing.is_done())
            .map(|(action, _)| action.name.clone())
            .collect()
    }

    /// Whether every required action is done and every other was tried.
    pub fn is_complete(&self) -> bool {
        !self.stopped && self.next().is_none()
    }

    /// How each action stands, in order.
    pub fn standings(&self) -> impl Iterator<Item = (&'a Action, Standing)> + '_ {
        let standing = |standing: &Option<Standing>| standing.clone().unwrap_or(Standing::Skipped);
        self.actions.iter().zip(self.standings.iter().map(standing))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::config::actions::Kind;

    fn actions(required: &[bool]) -> Vec<Action> {
        let action = |(index, required): (usize, &bool)| Action {
            name: format!("a{index}"),
            required: *required,
            timeout: Duration::from_secs(1),
            retries: 0,
            kind: Kind::Command { argv: Vec::new() },
        };
        required.iter().enumerate().map(action).collect()
    }

    fn outcome(action: &Action, works: bool) -> Outcome {
        Outcome {
            name: action.name.clone(),
            kind: action.kind.name(),
            required: action.required,
            result: match works {
                true => Ok(()),
                false => Err(Failure::new("what", "why", "next")),
            },
            attempts: 1,
            took: Duration::ZERO,
        }
    }

    #[test]
    fn a_required_one_that_failed_stops_and_the_next_run_goes_on_there() {
        let actions = actions(&[true, false, true, true]);
        let mut course = Course::new(&actions, &BTreeSet::new());
        for works in [true, false, false] {
            let action = course.next().unwrap();
            course.ended(&outcome(action, works));
        }
        assert!(course.next().is_none() && !course.is_complete());
        let labels = |course: &Course<'_>| -> Vec<&'static str> {
            course.standings().map(|(_, s)| s.label()).collect()
        };
        assert_eq!(labels(&course), ["done", "failed", "failed", "skipped"]);
        let mut again = Course::new(&actions, &course.done());
        // The optional one that failed has another try as well.
        assert_eq!(again.next().unwrap().name, "a1");
        while let Some(action) = again.next() {
            again.ended(&outcome(action, true));
        }
        assert!(again.is_complete());
        assert_eq!(labels(&again), ["done-before", "done", "done", "done"]);
    }

    proptest! {
        /// Whatever fails, and wherever a run is cut off: nothing that is done is done again, nothing
        /// runs before a required one that stands before it, and it ends once nothing fails.
        #[test]
        fn runs_go_on_where_the_last_one_stood(
            required in proptest::collection::vec(any::<bool>(), 0..6),
            works in proptest::collection::vec(any::<bool>(), 0..40),
            cut in 1_usize..8,
        ) {
            let actions = actions(&required);
            let mut works = works.into_iter();
            let mut done = BTreeSet::new();
            for _ in 0..50 {
                let mut course = Course::new(&actions, &done);
                for _ in 0..cut {
                    let Some(action) = course.next() else { break };
                    prop_assert!(!done.contains(&action.name));
                    for earlier in actions.iter().take_while(|a| a.name != action.name) {
                        prop_assert!(!earlier.required || course.done().contains(&earlier.name));
                    }
                    course.ended(&outcome(action, works.next().unwrap_or(true)));
                }
                prop_assert!(done.is_subset(&course.done()), "what is done stays done");
                done = course.done();
            }
            prop_assert_eq!(done.len(), actions.len());
            prop_assert!(Course::new(&actions, &done).is_complete());
        }
    }
}
