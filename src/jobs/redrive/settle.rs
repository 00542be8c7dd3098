//! What becomes of letters once their keys are verified or refused.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use super::bound::BatchBound;
use super::{ATTEMPTS_MAX, Bringing, FIRST_PAUSE, LONGEST_PAUSE, Redrive, lock};
use crate::backoff::Backoff;
use crate::dead_letter::Receipt;
use crate::dead_letter::message::{DeadLetter, Reason};
use crate::dynamo::clock::{host_ms, rfc3339};
use crate::dynamo::item::ItemKey;
use crate::dynamo::transmit::Bound;
use crate::error::{Fault, Policy};
use crate::repair::{Refused, Repaired, Unfinished};

impl Redrive<'_> {
    /// The keys are verified: deletes the letters, and writes new ones for what was refused again.
    pub(super) async fn settle(
        &mut self,
        table: &str,
        letters: Vec<Bringing>,
        repaired: Repaired,
        bound: &Arc<BatchBound>,
        open: &Mutex<Vec<Receipt>>,
    ) -> Result<(), String> {
        let mut refused: HashMap<ItemKey, Refused> = repaired
            .refused
            .into_iter()
            .map(|refused| (refused.change.key.clone(), refused))
            .collect();
        let (home, again): (Vec<_>, Vec<_>) = letters
            .into_iter()
            .partition(|bringing| !refused.contains_key(&ItemKey::new(&bringing.keys)));
        if let Err(unfinished) = self.delete(&home, bound, open).await {
            let all = home.into_iter().chain(again).collect();
            return self.leave(table, all, unfinished, bound);
        }
        if !home.is_empty() {
            *self.report.home.entry(table.to_owned()).or_default() += home.len() as u64;
        }
        let mut old = Vec::with_capacity(again.len());
        let mut again = again.into_iter();
        while let Some(bringing) = again.next() {
            let Some(why) = refused.get_mut(&ItemKey::new(&bringing.keys)) else {
                continue;
            };
            let letter = refused_again(bringing.letter.clone(), &why.fault, why.attempts);
            // The new one before the old one goes: between the two there are both.
            let delivered = self
                .patiently(bound, async |redrive: &Self| {
                    redrive.feed.dead_letters.deliver(&letter).await
                })
                .await;
            if let Err(unfinished) = delivered {
                self.park_all(old, bound);
                let rest = std::iter::once(bringing).chain(again).collect();
                return self.leave(table, rest, unfinished, bound);
            }
            let said = format!(
                "refused again: {} ({})",
                why.fault.code,
                why.fault.class.label()
            );
            self.report.leave(table, said, 1);
            self.again.insert(identity(&letter));
            old.push(bringing);
        }
        match self.delete(&old, bound, open).await {
            Ok(()) => Ok(()),
            // Counted already: each of them is there twice now.
            Err(unfinished) => {
                self.park_all(old, bound);
                self.leave(table, Vec::new(), unfinished, bound)
            }
        }
    }

    async fn delete(
        &self,
        letters: &[Bringing],
        bound: &Arc<BatchBound>,
        open: &Mutex<Vec<Receipt>>,
    ) -> Result<(), Unfinished> {
        if letters.is_empty() {
            return Ok(());
        }
        let receipts = letters.iter().map(|bringing| bringing.receipt.clone());
        let receipts: Vec<Receipt> = receipts.collect();
        self.patiently(bound, async |redrive: &Self| {
            redrive.inbox.delete(&receipts).await
        })
        .await?;
        lock(open).retain(|receipt| !receipts.contains(receipt));
        Ok(())
    }

    /// Asks the place a few times while it fails in a way that passes by itself, and no longer than
    /// the letters are ours: after a pause of the process, say, they may be in somebody else's hands,
    /// with writes of his that only these letters will mend.
    async fn patiently(
        &self,
        bound: &BatchBound,
        call: impl AsyncFn(&Self) -> Result<(), Fault>,
    ) -> Result<(), Unfinished> {
        let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
        let mut attempts = 1;
        loop {
            if bound.remaining().is_zero() {
                return Err(Unfinished::Stopped);
            }
            match call(self).await {
                Ok(()) => return Ok(()),
                Err(fault) if fault.policy() == Policy::Retry && attempts < ATTEMPTS_MAX => {
                    attempts += 1;
                    tokio::select! {
                        () = self.stop.cancelled() => return Err(Unfinished::Stopped),
                        () = tokio::time::sleep(backoff.pause()) => {}
                    }
                }
                Err(fault) => return Err(Unfinished::Failed(fault)),
            }
        }
    }
}

/// What tells a letter from any other, the same record's earlier letters included: a refused repair
/// has no position in the stream.
pub(super) type Identity = (String, Option<String>, u32, String, Option<ItemKey>);

pub(super) fn identity(letter: &DeadLetter) -> Identity {
    (
        letter.shard_id.clone(),
        letter.sequence_number.clone(),
        letter.redriven,
        letter.failed_at.clone(),
        letter.item_key().as_ref().map(ItemKey::new),
    )
}

/// The letter of a record that was refused again.
pub(super) fn refused_again(mut letter: DeadLetter, fault: &Fault, attempts: u32) -> DeadLetter {
    letter.error = Reason {
        class: fault.class.label().to_owned(),
        code: fault.code.clone(),
        message: fault.message.clone(),
    };
    letter.attempts = attempts;
    letter.failed_at = rfc3339(host_ms());
    letter.redriven += 1;
    letter
}
