//! What happens after the fence of a failover: `[[actions]]`, one after another.
//!
//! ```text
//!   configuration ─▶ template ─▶ describe (the plan)
//!                       └──────▶ run_one ─▶ file │ command │ webhook │ aws ─▶ Outcome ─▶ course
//! ```
//!
//! [`template`], [`describe`] and [`course`] are pure. An action is done at least once: one that was
//! cut off is done again, so each is made so that a second time changes nothing more.

#[cfg(feature = "actions")]
mod aws;
mod command;
pub mod course;
mod describe;
mod file;
pub mod template;
mod webhook;

use std::panic::AssertUnwindSafe;
use std::time::{Duration, Instant};

use futures::FutureExt;

pub use describe::describe;

use crate::backoff::Backoff;
use crate::config::Action;
use crate::config::actions::Kind;
use crate::dynamo::Regions;
use crate::error::Failure;

const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// While a region is down, nobody waits longer to try again.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// What a failover knows when its fence is complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment<'a> {
    /// The group.
    pub group: &'a str,
    /// Label of the region that is active now.
    pub region: &'a str,
    /// Label of the region that was active before.
    pub previous: &'a str,
    /// Number of the new epoch.
    pub epoch: u64,
    /// Why, as the person who did it said.
    pub reason: &'a str,
}

impl Moment<'_> {
    /// Any moment, to see what a text looks like once it is filled.
    pub(crate) const SAMPLE: Moment<'static> = Moment {
        group: "group",
        region: "region",
        previous: "previous",
        epoch: 1,
        reason: "reason",
    };

    /// One sentence for people.
    pub(crate) fn sentence(&self) -> String {
        let reason = template::plain(self.reason);
        format!(
            "{} is active in {} since epoch {}, before in {}: {reason}",
            self.group, self.region, self.epoch, self.previous
        )
    }
}

/// How an action went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// The action's name.
    pub name: String,
    /// Its kind, as the configuration calls it.
    pub kind: &'static str,
    /// Whether a failover stops at it when it fails.
    pub required: bool,
    /// Done, or why not and what to do.
    pub result: Result<(), Failure>,
    /// Attempts made.
    pub attempts: u32,
    /// Time from the first attempt to the end of the last.
    pub took: Duration,
}

/// Why an attempt did not succeed.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Trouble {
    why: String,
    next: String,
    /// It will be the same next time.
    lasts: bool,
}

impl Trouble {
    fn passing(why: impl Into<String>, next: impl Into<String>) -> Self {
        let (why, next) = (why.into(), next.into());
        Self {
            why,
            next,
            lasts: false,
        }
    }

    fn lasting(why: impl Into<String>, next: impl Into<String>) -> Self {
        Self {
            lasts: true,
            ..Self::passing(why, next)
        }
    }
}

/// Does one action: `retries` more times while it fails in a way that may pass, each attempt within
/// its `timeout`, with pauses of at most two seconds between them. Never panics.
pub async fn run_one(action: &Action, moment: &Moment<'_>, regions: &Regions) -> Outcome {
    let begin = Instant::now();
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    let mut attempts = 0;
    let result = loop {
        attempts += 1;
        let Err(trouble) = bounded(action, moment, regions).await else {
            break Ok(());
        };
        tracing::warn!(
            action = action.name,
            kind = action.kind.name(),
            attempt = attempts,
            why = trouble.why,
            "an attempt of an action failed"
        );
        if trouble.lasts || attempts > action.retries {
            break Err(failure(action, &trouble));
        }
        tokio::time::sleep(backoff.pause()).await;
    };
    Outcome {
        name: action.name.clone(),
        kind: action.kind.name(),
        required: action.required,
        result,
        attempts,
        took: begin.elapsed(),
    }
}

fn failure(action: &Action, trouble: &Trouble) -> Failure {
    let (name, kind) = (&action.name, action.kind.name());
    Failure::new(
        format!("The action {name} ({kind}) was not done"),
        trouble.why.clone(),
        trouble.next.clone(),
    )
}

/// One attempt within its time. What it began is ended with it.
async fn bounded(action: &Action, moment: &Moment<'_>, regions: &Regions) -> Result<(), Trouble> {
    let attempt = AssertUnwindSafe(attempt(action, moment, regions)).catch_unwind();
    match tokio::time::timeout(action.timeout, attempt).await {
        Ok(Ok(result)) => result,
        Ok(Err(_)) => Err(Trouble::passing(
            "It ended in a way that is a mistake of Farshore's own",
            "Do by hand what it should have done, and report the log to Farshore's developers",
        )),
        Err(_) => Err(Trouble::passing(
            format!(
                "It was not finished after {}",
                humantime::format_duration(action.timeout)
            ),
            "See what it waits for, or give it more time with `timeout`",
        )),
    }
}

async fn attempt(action: &Action, moment: &Moment<'_>, regions: &Regions) -> Result<(), Trouble> {
    match &action.kind {
        Kind::File(file) => file::rewrite(file, moment).await,
        Kind::Command { argv } => command::run(argv, &action.name, moment).await,
        Kind::Webhook(webhook) => webhook::post(webhook, &action.name, moment).await,
        #[cfg(feature = "actions")]
        Kind::SsmParameter(_) | Kind::Sns(_) | Kind::Route53Record(_) => {
            aws::call(action, moment, regions).await
        }
        // The configuration refuses them before it comes to this.
        #[cfg(not(feature = "actions"))]
        Kind::SsmParameter(_) | Kind::Sns(_) | Kind::Route53Record(_) => {
            let _ = regions;
            Err(Trouble::lasting(
                "This build cannot call AWS for an action",
                "Use a build with the cargo feature `actions`",
            ))
        }
    }
}

/// What makes two deliveries of one action one, for who receives both: the same for every attempt
/// of an epoch, and different for every other.
fn delivery_id(name: &str, moment: &Moment<'_>) -> String {
    use sha2::{Digest, Sha256};

    let mut digest = Sha256::new();
    for part in [moment.group, moment.region, &moment.epoch.to_string(), name] {
        digest.update(part.len().to_be_bytes());
        digest.update(part.as_bytes());
    }
    hex(&digest.finalize())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_epoch_has_one_delivery_of_an_action_and_another_epoch_another() {
        let again = Moment {
            reason: "said otherwise",
            ..Moment::SAMPLE
        };
        let first = delivery_id("a", &Moment::SAMPLE);
        assert_eq!(first, delivery_id("a", &again));
        assert_ne!(first, delivery_id("b", &again));
        let next = Moment { epoch: 2, ..again };
        assert_ne!(first, delivery_id("a", &next));
        // A name cannot run over into the group.
        let other = Moment {
            group: "groupr",
            region: "egion",
            ..again
        };
        assert_ne!(first, delivery_id("a", &other));
        assert_eq!(first.len(), 64);
    }
}
