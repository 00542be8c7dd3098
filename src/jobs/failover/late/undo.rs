//! Takes a late write back, on condition that nobody has written the key since.

use std::sync::Arc;
use std::time::Duration;

use super::Held;
use crate::backoff::Backoff;
use crate::dynamo::RegionClients;
use crate::dynamo::item::ItemKey;
use crate::dynamo::read::batch_get;
use crate::dynamo::transmit::{Bound, within};
use crate::dynamo::value::Item;
use crate::error::{Class, Fault, Operation, Policy};
use crate::jobs::exact::{Written, put_back, unsayable, write};
use crate::lease::term::Term;

/// How often it is tried while its failure may pass by itself.
const ATTEMPTS_MAX: u32 = 20;
/// Longest wait for the answer to a write.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// How it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Undone {
    /// The key holds what is right.
    Yes,
    /// Somebody has written it since: that counts.
    Overwritten,
    /// It can never be.
    Cannot(String),
}

impl Undone {
    pub(super) const fn label(&self) -> &'static str {
        match self {
            Undone::Yes => "undone",
            Undone::Overwritten => "overwritten since",
            Undone::Cannot(_) => "it cannot be undone",
        }
    }
}

/// Makes the item under `keys` what is `right`, where it is still what the `late` write left; while `term`
/// is good. `noted` stores that a write is about to leave.
pub(super) async fn undo(
    (region, table, keys): (&RegionClients, &str, &Item),
    term: &Arc<Term>,
    (late, right): (&Held, &Held),
    noted: impl AsyncFn() -> Result<(), Fault>,
) -> Result<Undone, Fault> {
    if let Some(why) = unsayable(late.0.as_ref()) {
        return Ok(Undone::Cannot(why));
    }
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    let mut attempts = 0;
    loop {
        // Read first: a condition cannot say that there is no other attribute.
        let asked = batch_get(
            Operation::ReadReplica,
            (&region.tables, table),
            std::slice::from_ref(keys),
        );
        let tried = match asked.await {
            Ok(got) if got.left.is_empty() => {
                let found = got.items.into_iter().find(|item| {
                    // Of the one key that was asked for.
                    ItemKey::of(item, keys) == ItemKey::new(keys)
                });
                let now = Held(found);
                if now == *right {
                    return Ok(Undone::Yes);
                }
                if now != *late {
                    return Ok(Undone::Overwritten);
                }
                // Where that fails nothing leaves; and its effect is known for what it is, however late
                // it comes and whoever reads of it then.
                match noted().await {
                    Ok(()) => send(region, (table, keys), term, (late, right)).await?,
                    Err(fault) => Err(fault),
                }
            }
            Ok(_) => Err(Fault::own(
                Operation::ReadReplica,
                Class::Throttled,
                "UnprocessedKeys",
                "the service returned the key unprocessed",
            )),
            Err(fault) => Err(fault),
        };
        attempts += 1;
        match tried {
            // What is there now is told by the next look.
            Ok(()) => {}
            Err(fault) if fault.class == Class::Condition => {}
            Err(fault) if fault.policy() == Policy::DeadLetter => {
                return Ok(Undone::Cannot(fault.summary()));
            }
            Err(fault) if fault.policy() == Policy::Retry && attempts < ATTEMPTS_MAX => {
                tokio::time::sleep(backoff.pause()).await;
            }
            Err(fault) => return Err(fault),
        }
    }
}

/// Sends it once. The outer fault: it did not leave, and would not.
async fn send(
    region: &RegionClients,
    (table, keys): (&str, &Item),
    term: &Arc<Term>,
    (late, right): (&Held, &Held),
) -> Result<Result<(), Fault>, Fault> {
    let bound: Arc<dyn Bound> = Arc::clone(term) as _;
    let timeout = bound.remaining().min(WRITE_TIMEOUT);
    if timeout.is_zero() {
        // Nothing here confirms it: the next look does.
        return Err(epoch_unconfirmed());
    }
    let writing = write((region, table, keys), late.0.as_ref(), right.0.as_ref());
    let (answer, _) = within(bound, timeout, writing).await;
    Ok(match answer {
        Some(Ok(Written::AsSeen)) => Ok(()),
        // Somebody added an attribute in that moment: the item is theirs, and is put back.
        Some(Ok(Written::Over(theirs))) => {
            put_back((region, table, keys), right.0.as_ref(), theirs).await
        }
        Some(Err(fault)) => Err(fault),
        None => Err(Fault::own(
            Operation::Write,
            Class::Network,
            "no answer in time",
            "the region did not answer within the timeout or the epoch",
        )),
    })
}

fn epoch_unconfirmed() -> Fault {
    Fault::own(
        Operation::State,
        Class::Network,
        "epoch not confirmed",
        "the control record was not read for a lease",
    )
}
