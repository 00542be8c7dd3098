//! The actions after the fence: in order, each done once as far as anybody can know, gone on with where a
//! command that was killed stopped.
//!
//! Whoever runs one says so in the record, and moves its counter while that lasts. A second command waits
//! until it is done, or until the counter has stood still for a lease: then the first one is dead, and the
//! action is done again.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use super::rivals::overtaken;
use super::{Ended, Failover, Watcher};
use crate::actions::course::{Course, Standing};
use crate::actions::{Moment, run_one};
use crate::error::Failure;
use crate::lease::row::{ActionRun, ControlRow};
use crate::mutation::crash;

/// How an action stands at the end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Acted {
    /// Its name.
    pub name: String,
    /// `done`, `done-before`, `failed` or `skipped`.
    pub standing: &'static str,
    /// Why it failed, where it did.
    pub failure: Option<Failure>,
}

impl Acted {
    fn of(course: &Course<'_>) -> Vec<Self> {
        let of = |(action, standing): (&crate::config::Action, Standing)| Self {
            name: action.name.clone(),
            standing: standing.label(),
            failure: match standing {
                Standing::Failed(failure) => Some(failure),
                Standing::Done | Standing::DoneBefore | Standing::Skipped => None,
            },
        };
        course.standings().map(of).collect()
    }
}

impl Failover<'_> {
    /// Does the actions that are not done yet.
    ///
    /// # Errors
    /// [`Ended::Action`] where a required one failed.
    pub(super) async fn act(&mut self, watcher: &mut dyn Watcher) -> Result<Vec<Acted>, Ended> {
        let (config, survey, regions) = (self.config, self.survey, self.regions);
        let done: BTreeSet<String> = self.record.actions.iter().cloned().collect();
        let mut course = Course::new(&config.actions, &done);
        let previous = self.record.previous.as_ref();
        let previous = previous.map_or_else(String::new, |previous| previous.active.clone());
        let reason = self.record.reason.clone();
        let moment = Moment {
            group: &config.group,
            region: &survey.to,
            previous: &previous,
            epoch: self.record.epoch,
            reason: &reason,
        };
        while let Some(action) = course.next() {
            watcher.under_way(&format!("action {}", action.name));
            if !self.claim(&action.name).await? {
                // Another command has done it meanwhile.
                let done: BTreeSet<String> = self.record.actions.iter().cloned().collect();
                course = Course::new(&config.actions, &done);
                continue;
            }
            let stop = self.stop.clone();
            let ended = tokio::select! {
                outcome = run_one(action, &moment, regions) => Ok(outcome),
                // Beside it: a state table that answers slowly stops no command, and none of its timeouts.
                ended = self.keep_touching() => Err(ended),
                () = stop.cancelled() => Err(Ended::Stopped),
            };
            // What ran is gone by now, if it was cut short.
            let me = self.me.clone();
            let is_mine = |row: &ControlRow| {
                let running = row.running.as_ref();
                running.is_some_and(|running| running.by == me)
            };
            let outcome = match ended {
                Ok(outcome) => outcome,
                Err(Ended::Stopped) => {
                    self.store(|row| {
                        if is_mine(row) {
                            row.running = None;
                        }
                    })
                    .await?;
                    return Err(Ended::Stopped);
                }
                Err(ended) => return Err(ended),
            };
            crash("failover-acted");
            course.ended(&outcome);
            let name = action.name.clone();
            let is_done = outcome.result.is_ok();
            self.store(|row| {
                // Somebody who took this process for dead may run the next one.
                if is_mine(row) {
                    row.running = None;
                }
                if is_done && !row.actions.contains(&name) {
                    row.actions.push(name.clone());
                }
            })
            .await?;
            let failure = outcome.result.err().filter(|_| action.required);
            if let Some(failure) = failure {
                return Err(Ended::Action(Box::new((failure, Acted::of(&course)))));
            }
        }
        Ok(Acted::of(&course))
    }

    /// Moves the counter of the record again and again. Returns only where this is no longer the failover
    /// that counts.
    async fn keep_touching(&mut self) -> Ended {
        loop {
            tokio::time::sleep(self.config.leases.duration / 3).await;
            match self.touch().await {
                // A fault passes, or the step after the action meets it again.
                Ok(()) | Err(Ended::Failed(_)) => {}
                Err(ended) => return ended,
            }
        }
    }

    /// Moves the counter of the record: who runs an action lives.
    async fn touch(&mut self) -> Result<(), Ended> {
        let mut next = self.record.clone();
        next.lease_counter += 1;
        let (state, known) = (self.state, self.record.clone());
        let written = self
            .patiently(async || state.replace_control(&next, Some(&known)).await)
            .await?;
        match written {
            crate::lease::table::Written::Yes => self.record = next,
            // Somebody else has written it: the next look tells.
            crate::lease::table::Written::Refused => self.reread().await?,
        }
        Ok(())
    }

    /// Reads the record anew.
    ///
    /// # Errors
    /// [`Ended::Overtaken`] where it is another failover's by now.
    pub(super) async fn reread(&mut self) -> Result<(), Ended> {
        let state = self.state;
        let now = self.patiently(async || state.control().await).await?;
        match now {
            Some(now) if now.epoch == self.record.epoch && now.active == self.record.active => {
                self.record = now;
                Ok(())
            }
            now => Err(Ended::Overtaken(overtaken(now.as_ref(), &self.survey.to))),
        }
    }

    /// Makes the action this command's, once nobody else runs one. False if it is done by then.
    async fn claim(&mut self, name: &str) -> Result<bool, Ended> {
        let lease = self.config.leases.duration;
        let mut seen: Option<(u64, Instant)> = None;
        loop {
            self.reread().await?;
            if self.record.actions.iter().any(|done| done == name) {
                return Ok(false);
            }
            let counter = self.record.lease_counter;
            let still = match seen {
                Some((known, since)) if known == counter => since.elapsed(),
                _ => {
                    seen = Some((counter, Instant::now()));
                    Duration::ZERO
                }
            };
            let is_free = match &self.record.running {
                None => true,
                Some(running) => running.by == self.me || still >= lease,
            };
            if is_free {
                let run = ActionRun {
                    name: name.to_owned(),
                    by: self.me.clone(),
                };
                let free = self.record.running.clone();
                self.store(|row: &mut ControlRow| {
                    if row.running == free {
                        row.running = Some(run.clone());
                    }
                })
                .await?;
                if self.record.running.as_ref() == Some(&run) {
                    return Ok(true);
                }
            }
            tokio::select! {
                () = self.stop.cancelled() => return Err(Ended::Stopped),
                () = tokio::time::sleep(lease / 10) => {}
            }
        }
    }
}
