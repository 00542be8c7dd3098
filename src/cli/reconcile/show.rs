//! How comparisons ended, in words and as JSON.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use super::super::{answer, answer_json};
use super::Outcome;
use super::ground::Ground;
use crate::dynamo::clock::{host_ms, rfc3339};
use crate::error::{Exit, Failure};
use crate::jobs::reconcile::Ended;
use crate::jobs::reconcile::report::Counts;

impl Ground<'_> {
    /// Why it ended early, in words, and the exit code.
    pub(super) fn verdict(
        &self,
        result: Result<(), Ended>,
        moved: Option<String>,
        counts: &Counts,
    ) -> (Option<String>, Exit) {
        let remains = match counts.remaining() + counts.unverified {
            0 => Exit::Done,
            _ => Exit::Remains,
        };
        match (result, moved) {
            (Ok(()), _) => (None, remains),
            (Err(_), Some(why)) => (Some(why), Exit::Remains),
            (Err(Ended::Stopped), None) => {
                (Some("it was asked to stop".to_owned()), Exit::Interrupted)
            }
            (Err(Ended::TooManyDeletes { extra, allowed }), None) => (
                Some(format!(
                    "{extra} items are only in {}, and {allowed} may be deleted: none was. Check that {} is the side that is right; if they are to go, ask again with a larger --max-deletes",
                    self.target.label, self.source.label
                )),
                Exit::Remains,
            ),
            (Err(Ended::Failed { subject, fault }), None) => (
                Some(format!("{subject}: {fault}. {}", fault.next_step())),
                Exit::CouldNotRun,
            ),
            (Err(Ended::Lost), None) => (
                Some("its row in the state table could not be kept: ask again once that table answers".to_owned()),
                Exit::CouldNotRun,
            ),
            (Err(Ended::Unverified), None) => (
                Some(format!("{} keys that were written could not be verified, their writes were not answered: ask again once {} answers", counts.unverified, self.target.label)),
                Exit::Remains,
            ),
            (Err(Ended::Gone), None) => (
                Some("another process has ended the job, and says what came of it".to_owned()),
                Exit::CouldNotRun,
            ),
            (Err(Ended::File(error)), None) => (
                Some(format!("a file could not be written: {error}. Make room on the disk and ask again")),
                Exit::CouldNotRun,
            ),
        }
    }
}

pub(super) fn show(ground: &Ground<'_>, outcomes: &[Outcome]) -> Result<(), Failure> {
    let applied = ground.asked.apply;
    if ground.args.json {
        let tables: Vec<Value> = outcomes
            .iter()
            .map(|outcome| {
                let mut value = json!(outcome.counts);
                value["table"] = json!(outcome.table);
                value["seconds"] = json!((outcome.took.as_secs_f64() * 10.0).round() / 10.0);
                value["ended"] = json!(outcome.ended);
                value
            })
            .collect();
        return answer_json(&json!({
            "version": 1,
            "command": "reconcile",
            "source": ground.source.label,
            "target": ground.target.label,
            "job": outcomes.iter().any(|outcome| outcome.resumable).then_some(&ground.asked.id),
            "strategy": ground.asked.strategy.to_string(),
            "applied": applied,
            "equal": outcomes.iter().all(|outcome| outcome.exit == Exit::Done),
            "tables": tables,
        }));
    }
    let blocks = outcomes.iter().map(|outcome| as_text(ground, outcome));
    answer(&blocks.collect::<Vec<_>>().join("\n"))
}

fn as_text(ground: &Ground<'_>, outcome: &Outcome) -> String {
    let counts = &outcome.counts;
    let (source, target) = (&ground.source.label, &ground.target.label);
    let took = humantime::format_duration(Duration::from_secs(outcome.took.as_secs()));
    let mut lines = vec![
        format!("{}: {source} compared with {target}, {took}", outcome.table),
        format!(
            "  read: {} items and {:.1} units in {source}, {} items and {:.1} units in {target}",
            counts.source_items, counts.source_units, counts.target_items, counts.target_units
        ),
        format!(
            "  different: {} missing in {target}, {} changed, {} only in {target}",
            counts.missing, counts.changed, counts.extra
        ),
    ];
    if counts.unsettled > 0 {
        lines.push(format!(
            "  not settled: {} keys change all the time, or what changed them is not applied yet",
            counts.unsettled
        ));
    }
    if ground.asked.apply {
        lines.push(format!(
            "  repaired: {}, verified by reading again",
            counts.repaired
        ));
    }
    if counts.left > 0 {
        lines.push(format!(
            "  left: {} that the strategy {} does not touch",
            counts.left, ground.asked.strategy
        ));
    }
    if counts.refused > 0 {
        lines.push(format!(
            "  refused: {} that {target} does not take",
            counts.refused
        ));
    }
    if counts.unverified > 0 {
        let at = host_ms() + ground.loaded.config.leases.late_effect.as_millis() as i64;
        lines.push(format!(
            "  not verified: {} keys that were being written, maybe with older items: ask again after {}",
            counts.unverified,
            rfc3339(at)
        ));
    }
    lines.push(match (&outcome.ended, outcome.exit) {
        (Some(why), _) => format!("  it ended early: {why}"),
        (None, Exit::Done) if counts.repaired > 0 => "  equal now".to_owned(),
        (None, Exit::Done) => "  equal".to_owned(),
        (None, _) if counts.different() == 0 => {
            "  no difference, but for the keys that are not settled: ask again later".to_owned()
        }
        (None, _) if ground.asked.apply => "  differences remain".to_owned(),
        (None, _) => "  nothing was changed: add --apply to repair".to_owned(),
    });
    if outcome.resumable {
        let id = &ground.asked.id;
        lines.push(format!("  go on with `farshore reconcile --resume {id}`"));
    }
    lines.join("\n")
}

/// A bar that tells how far a table is read, on a terminal.
pub(super) struct Bar(ProgressBar);

impl Bar {
    /// `quiet`: none at all. `items` of both sides together, about.
    pub(super) fn new(quiet: bool, table: &str, items: i64) -> Self {
        let bar = match std::io::stderr().is_terminal() && !quiet {
            true => ProgressBar::new(u64::try_from(items).unwrap_or_default()),
            false => ProgressBar::hidden(),
        };
        let form = "{prefix} [{bar:30}] {pos}/~{len} items, {per_sec}, about {eta} left: {msg}";
        if let Ok(style) = ProgressStyle::with_template(form) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_prefix(table.to_owned());
        bar.enable_steady_tick(Duration::from_millis(200));
        Self(bar)
    }

    pub(super) fn say(&self, read: u64, found: String) {
        // What the service told of the size is hours old.
        if self.0.length().is_some_and(|length| length < read) {
            self.0.set_length(read);
        }
        self.0.set_position(read);
        self.0.set_message(found);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
