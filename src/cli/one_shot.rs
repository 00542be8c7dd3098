//! What one-shot commands that write to a replica have in common: the tap and the epoch they heed,
//! the row they hold, the line that tells how far they are.

use std::io::IsTerminal;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::dynamo::RegionClients;
use crate::dynamo::clock::rfc3339;
use crate::error::{Failure, Fault};
use crate::lease::hold::{Hold, Terms};
use crate::lease::row::JobRow;
use crate::lease::rules::take_name;
use crate::lease::table::StateTable;
use crate::run::owner;
use crate::run::start::unusable;

/// The flow that is written in.
#[derive(Clone, Copy)]
pub(super) struct Flow<'a> {
    pub(super) config: &'a Config,
    /// The region of the state table.
    pub(super) region: &'a RegionClients,
    pub(super) state: &'a StateTable,
    /// Label of the active region.
    pub(super) active: &'a str,
    pub(super) epoch: u64,
    /// Tables written to, by their names in the configuration; none means all.
    pub(super) tables: &'a [String],
}

impl Flow<'_> {
    /// Why nothing may be written now: the epoch has moved, or a tap is closed.
    async fn closed(&self) -> Result<Option<String>, Fault> {
        if let Some(control) = self.state.control().await?
            && (control.epoch != self.epoch || control.active != self.active)
        {
            return Ok(Some(format!(
                "the active region is {} since epoch {}",
                control.active, control.epoch
            )));
        }
        let mut pauses = vec![self.state.pause(None).await?];
        for table in &self.config.tables {
            if self.tables.is_empty() || self.tables.contains(&table.name) {
                pauses.push(self.state.pause(Some(&table.name)).await?);
            }
        }
        let standing = pauses.into_iter().flatten().find(|row| row.is_closed());
        Ok(standing.map(|row| {
            let subject = row.table.unwrap_or_else(|| "all tables".to_owned());
            format!(
                "the tap of {subject} is closed by {}: {}",
                row.by, row.reason
            )
        }))
    }

    pub(super) async fn refuse_closed(&self) -> Result<(), Failure> {
        let failed = |fault: Fault| unusable(self.region, self.state.name(), &fault);
        match self.closed().await.map_err(failed)? {
            None => Ok(()),
            Some(why) => Err(Failure::new(
                "Nothing may be written to the replica now",
                why,
                "Open the tap with `farshore resume` (or name one open table with --table), and ask again",
            )),
        }
    }

    /// Cancels `stop` when the epoch moves or a tap closes, and says why in `ended`; until `done`.
    pub(super) async fn watch(
        &self,
        stop: &CancellationToken,
        done: &CancellationToken,
        ended: &Mutex<Option<String>>,
    ) {
        loop {
            tokio::select! {
                () = done.cancelled() => return,
                () = tokio::time::sleep(self.config.leases.duration / 3) => {}
            }
            // A failure says nothing; the hold ends by itself where the state table stays away.
            if let Ok(Some(why)) = self.closed().await {
                *ended.lock().unwrap_or_else(PoisonError::into_inner) = Some(why);
                stop.cancel();
                return;
            }
        }
    }

    /// Takes the row of a job. `subject` names the job in messages: one at a time may have it.
    pub(super) async fn hold(
        &self,
        row: JobRow,
        subject: &str,
    ) -> Result<Arc<Hold<JobRow>>, Failure> {
        let terms = Terms {
            state: self.state.clone(),
            clock: Arc::clone(&self.region.clock),
            duration: self.config.leases.duration,
            late_effect: self.config.leases.late_effect,
        };
        let holder = take_name(&owner(), rand::random());
        let failed = |fault: Fault| unusable(self.region, self.state.name(), &fault);
        let known = self.state.job(&row.lease_key).await.map_err(failed)?;
        let held = match known {
            None => Hold::create(terms, row, holder).await,
            Some(known) if known.until <= self.region.clock.now_ms() => {
                let row = JobRow {
                    lease_counter: known.lease_counter,
                    until: known.until,
                    ..row
                };
                Hold::take(terms, row, holder).await
            }
            Some(known) => {
                return Err(Failure::new(
                    format!("Another {subject} is at work, or died a short while ago"),
                    format!(
                        "It began at {}, and its writes may take effect until {}",
                        known.at,
                        rfc3339(known.until)
                    ),
                    "Wait until then, or until it has ended, and ask again",
                ));
            }
        };
        held.map_err(failed)?.ok_or_else(|| {
            Failure::new(
                format!("Another {subject} began at the same moment"),
                "Both would have worked at the same items",
                "Wait until it has ended, and ask again",
            )
        })
    }
}

/// A line on stderr that tells how far it is, on a terminal.
pub(super) struct Line(ProgressBar);

impl Line {
    /// `quiet`: none at all.
    pub(super) fn new(quiet: bool) -> Self {
        let bar = match std::io::stderr().is_terminal() && !quiet {
            true => ProgressBar::new_spinner(),
            false => ProgressBar::hidden(),
        };
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} ({elapsed})") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(200));
        Self(bar)
    }

    pub(super) fn say(&self, message: String) {
        self.0.set_message(message);
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
