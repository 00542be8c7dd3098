//! Other failovers of the same group: who has overtaken this one, and in which words that is said.

use std::time::Duration;

use super::{Ended, Failover, Survey};
use crate::error::Failure;
use crate::lease::control::{Verdict, newest, verdict};
use crate::lease::row::ControlRow;

/// How long they are waited for before what follows the fence begins.
const HEAR_TIMEOUT: Duration = Duration::from_secs(1);

impl Failover<'_> {
    /// Gives up where somebody else has failed over to another region. Nobody waits for a region that does
    /// not answer longer than a moment.
    pub(super) async fn refuse_overtaken(&self) -> Result<(), Ended> {
        let looked = overtaken_by(self.survey, self.record.epoch);
        match tokio::time::timeout(HEAR_TIMEOUT, looked).await {
            Ok(Some(failure)) => Err(Ended::Overtaken(failure)),
            Ok(None) | Err(_) => Ok(()),
        }
    }
}

/// Another failover has written the record, or it is gone.
pub(super) fn overtaken(now: Option<&ControlRow>, to: &str) -> Failure {
    match now {
        Some(now) if now.active == to => Failure::new(
            format!("Another failover to {to} is at work"),
            format!("{} began it at {}", now.by, now.at),
            "Type the same command again: it goes on with that one",
        ),
        Some(now) => Failure::new(
            format!(
                "Another failover was faster: {} is active in epoch {}",
                now.active, now.epoch
            ),
            format!("{} wrote that at {} ({})", now.by, now.at, now.reason),
            "Agree on one region; then fail over to it if it is still needed",
        ),
        None => Failure::new(
            "The control record is gone",
            "Somebody deleted it, or the state table was made anew",
            "Find out who, and begin anew",
        ),
    }
}

fn contradicted(epoch: u64, rivals: &[String]) -> Failure {
    Failure::new(
        format!(
            "Epoch {epoch} names several active regions: {}",
            rivals.join(", ")
        ),
        "Two failovers to different regions began at once; nobody applies anything anywhere until a higher epoch exists",
        "Agree on one region, and fail over to it once more with --accept-loss conflict",
    )
}

/// Who has overtaken the failover that made `epoch`: two to different regions began at once, or one has begun
/// since. Regions that do not answer say nothing.
pub(super) async fn overtaken_by(survey: &Survey, epoch: u64) -> Option<Failure> {
    let asked = survey
        .regions
        .iter()
        .map(async |seen| seen.state.control().await);
    let answers = futures::future::join_all(asked).await;
    let records: Vec<ControlRow> = answers
        .into_iter()
        .filter_map(|answer| answer.ok().flatten())
        .collect();
    match verdict(&records) {
        Verdict::Conflict { epoch: of, actives } if of >= epoch => Some(contradicted(of, &actives)),
        Verdict::Decided { active, epoch: of } if of > epoch => {
            Some(overtaken(newest(&records, &active, of), &survey.to))
        }
        _ => None,
    }
}
