//! Other failovers of the same group: who has overtaken this one, and in which words that is said.

use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;

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
        let looked = overtaken_by(self.survey, &self.record);
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

/// Who has overtaken the failover that made `own`: two to different regions began at once, or one has begun
/// since. Judged with each answer as it comes: a region that does not answer says nothing, and keeps nobody
/// from hearing of the others.
pub(super) async fn overtaken_by(survey: &Survey, own: &ControlRow) -> Option<Failure> {
    let asked = survey.regions.iter().map(|seen| seen.state.control());
    let mut answers: FuturesUnordered<_> = asked.collect();
    let mut records = vec![own.clone()];
    while let Some(answer) = answers.next().await {
        let Ok(Some(record)) = answer else { continue };
        records.push(record);
        match verdict(&records) {
            Verdict::Conflict { epoch, actives } if epoch >= own.epoch => {
                return Some(contradicted(epoch, &actives));
            }
            Verdict::Decided { active, epoch } if epoch > own.epoch => {
                return Some(overtaken(newest(&records, &active, epoch), &survey.to));
            }
            _ => {}
        }
    }
    None
}
