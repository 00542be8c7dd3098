//! What the rows alone show of what needs a person. Pure.

use super::build::Builder;
use super::{Table, View};
use crate::dynamo::clock::rfc3339;
use crate::observe::health::{Idle, Reason};

/// So much of the 24 hours has to be left before somebody has to know: six hours.
pub const HEADROOM_ALARM_S: f64 = 6.0 * 3_600.0;

impl Builder<'_> {
    /// What the rows alone show of what needs a person.
    pub(super) fn reasons(&self, view: &View) -> Vec<Reason> {
        let mut reasons = Vec::new();
        let mut say = |code: &str, table: &str, text: String, next: &str| {
            reasons.push(Reason {
                code: code.to_owned(),
                table: table.to_owned(),
                text,
                next: next.to_owned(),
            });
        };
        if self.quarantined {
            let idle = Idle::Quarantined {
                here: self.seen.here.to_owned(),
                active: self.source.clone(),
                epoch: self.epoch,
                captured: view
                    .home
                    .iter()
                    .find(|home| home.region == self.seen.here)
                    .and_then(|home| home.captured_until.as_ref().zip(home.captured_records))
                    .map_or_else(String::new, |(until, records)| {
                        format!("what was written there since is captured until {until}, {records} record(s)")
                    }),
            };
            let reason = idle.reason();
            say(&reason.code, "", reason.text, &reason.next);
        }
        let living = self.seen.rows.workers.iter().any(|row| self.is_alive(row));
        let last = self.seen.rows.workers.iter().map(|row| row.updated_at);
        let last = last.chain(
            self.seen
                .rows
                .shards
                .iter()
                .filter_map(|row| row.updated_at),
        );
        let last_ms = last.max();
        let is_long = last_ms.is_none_or(|at| self.seen.host_ms - at > self.silent_after_ms());
        if self.feeds && !living && is_long {
            let since = last_ms.map_or_else(
                || "no worker has ever been at work".to_owned(),
                |at| format!("no worker has been alive since {}", rfc3339(at)),
            );
            let next =
                "Start `farshore run` in this region, and look at the log of the worker that ended";
            say("nobody-feeds", "", since, next);
        }
        for outage in &view.outages {
            let text = format!("{} ({})", outage.text, outage.class);
            say(&format!("outage-{}", outage.scope), "", text, &outage.next);
        }
        for table in &view.tables {
            self.reasons_of(table, &mut say);
        }
        for doubts in view.doubts.iter().filter(|doubts| doubts.overdue > 0) {
            let text = format!(
                "{} of {} doubt(s) should have been repaired more than ten minutes ago",
                doubts.overdue, doubts.open
            );
            let next = "Look at the log of the workers: what holds the repair back is said there";
            say("doubt-overdue", &doubts.table, text, next);
        }
        for gap in &view.gaps {
            let text = format!("records were never applied, found at {}", gap.at);
            say(&format!("gap-{}", gap.reason), &gap.table, text, &gap.next);
        }
        for pause in &view.pauses {
            let text = format!(
                "paused by {} since {}: {}",
                pause.by, pause.at, pause.reason
            );
            let next = "Open the tap again with `farshore resume` before the stream forgets";
            say("paused", pause.table.as_deref().unwrap_or(""), text, next);
        }
        for job in view.jobs.iter().filter(|job| job.kind != "reconcile") {
            let code = match (job.deletes_outstanding, job.kind.as_str()) {
                (Some(_), _) => "deletes-outstanding",
                (None, "bootstrap") => "copying",
                (None, _) => "gap-repair",
            };
            let text = format!("{} of {}: {} %", job.kind, job.table, job.percent);
            let next = match job.deletes_outstanding {
                Some(extra) => format!(
                    "Look at them with `farshore reconcile --table {0} --report FILE`, then delete them with `farshore reconcile --table {0} --apply --max-deletes {extra}`",
                    job.table
                ),
                None => "Wait: the fleet works at it by itself".to_owned(),
            };
            say(code, &job.table, text, &next);
        }
        reasons
    }

    fn reasons_of(&self, table: &Table, say: &mut impl FnMut(&str, &str, String, &str)) {
        if !self.feeds {
            return;
        }
        if table.shards.open == 0 {
            let text = "nobody reads it: no open shard of it is known".to_owned();
            let next = "Start `farshore run` in this region; if it runs, wait a moment";
            say("starting", &table.name, text, next);
        }
        if table.shards.unowned > 0 {
            let text = format!(
                "{} shard(s) that could be read have no living owner",
                table.shards.unowned
            );
            let next = "Look whether the workers of this region live, and start one";
            say("shard-unowned", &table.name, text, next);
        }
        if let Some(reason) = low_headroom(&table.name, table.headroom_seconds) {
            say(&reason.code, &reason.table, reason.text, &reason.next);
        }
    }
}

/// Somebody has to know that so little is left for `table`.
pub fn low_headroom(table: &str, headroom_s: Option<f64>) -> Option<Reason> {
    let left_s = headroom_s.filter(|left| *left < HEADROOM_ALARM_S)?;
    let minutes = (left_s / 60.0) as u64;
    Some(Reason {
        code: "headroom".to_owned(),
        table: table.to_owned(),
        text: format!(
            "the stream forgets records that may not be applied in {} h {} min",
            minutes / 60,
            minutes % 60
        ),
        next: "Mend what the other reasons say before then; what the stream forgets is a gap, and has to be compared and copied".to_owned(),
    })
}
