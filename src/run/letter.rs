//! From a refused record to a delivered dead letter.

use std::collections::BTreeMap;
use std::time::Duration;

use super::context::TableContext;
use crate::backoff::Backoff;
use crate::dead_letter::message::{DeadLetter, Place, Reason, VERSION};
use crate::dynamo::clock::{host_ms, rfc3339};
use crate::dynamo::image::Image;
use crate::dynamo::json::item_to_json;
use crate::dynamo::value::Item;
use crate::error::{Class, Fault};
use crate::observe::health::Scope;
use crate::observe::metrics;
use crate::repair::{Attempts, Refused};
use crate::stream::change::{Change, Event, OldImage};
use crate::stream::sequence::SequenceNumber;

const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

fn reason(fault: &Fault) -> Reason {
    Reason {
        class: fault.class.label().to_owned(),
        code: fault.code.clone(),
        message: fault.message.clone(),
    }
}

/// A dead letter on its way.
pub struct Letter(DeadLetter);

impl Letter {
    /// For a change that the replica refused alone.
    pub fn refused(
        context: &TableContext,
        shard: &str,
        change: &Change,
        fault: &Fault,
        attempts: u32,
    ) -> Self {
        let mut letter = Self::blank(context, shard, change.created_ms);
        letter.sequence_number = Some(change.sequence.as_str().to_owned());
        letter.event = Some(change.event.name().to_owned());
        letter.keys = Some(item_to_json(&change.keys));
        letter.new_image = change.new_image.as_ref().map(Image::to_value);
        match &change.old_image {
            Some(OldImage::Known(old)) => letter.old_image = Some(old.to_value()),
            Some(OldImage::Unknown) => letter.omitted.push("oldImage".to_owned()),
            None => {}
        }
        letter.attempts = attempts;
        letter.error = reason(fault);
        Self(letter)
    }

    /// For an item that a repair found different and the replica refused alone. It has no record: its
    /// images are what the replica holds and what the source held.
    pub fn refused_repair(
        context: &TableContext,
        (origin, shard): (&str, &str),
        refused: &Refused,
    ) -> Self {
        let change = &refused.change;
        let mut letter = Self::blank(context, shard, change.created_ms);
        letter.origin = Some(origin.to_owned());
        let event = match (&refused.held, &change.new_image) {
            (None, _) => Event::Insert,
            (Some(_), Some(_)) => Event::Modify,
            (Some(_), None) => Event::Remove,
        };
        letter.event = Some(event.name().to_owned());
        letter.keys = Some(item_to_json(&change.keys));
        letter.new_image = change.new_image.as_ref().map(Image::to_value);
        letter.old_image = refused.held.as_deref().map(item_to_json);
        letter.attempts = refused.attempts;
        letter.error = reason(&refused.fault);
        Self(letter)
    }

    /// For a record of which no write can be made.
    pub fn undecodable(
        context: &TableContext,
        shard: &str,
        sequence: &SequenceNumber,
        created_ms: i64,
        keys: Option<&Item>,
        why: &str,
    ) -> Self {
        let mut letter = Self::blank(context, shard, created_ms);
        letter.keys = keys.map(item_to_json);
        letter.sequence_number = Some(sequence.as_str().to_owned());
        letter.error = Reason {
            class: Class::Undecodable.label().to_owned(),
            code: "Undecodable".to_owned(),
            message: why.to_owned(),
        };
        Self(letter)
    }

    fn blank(context: &TableContext, shard: &str, created_ms: i64) -> DeadLetter {
        let shared = &context.shared;
        let place = |region: &str| Place {
            region: region.to_owned(),
            table: context.table.name_in(region).to_owned(),
        };
        DeadLetter {
            version: VERSION,
            group: shared.config.group.clone(),
            epoch: shared.epoch,
            table: context.table.name.clone(),
            source: place(&shared.source.label),
            target: place(&shared.target.label),
            stream_arn: context.stream_arn.clone(),
            shard_id: shard.to_owned(),
            origin: None,
            sequence_number: None,
            event: None,
            keys: None,
            new_image: None,
            old_image: None,
            compressed: BTreeMap::new(),
            omitted: Vec::new(),
            error: Reason {
                class: String::new(),
                code: String::new(),
                message: String::new(),
            },
            attempts: 0,
            created_at: rfc3339(created_ms),
            failed_at: rfc3339(host_ms()),
            redriven: 0,
        }
    }

    /// Delivers it, waiting out whatever is in the way. `part` names the shard in health.
    pub async fn deliver(&self, context: &TableContext, part: &str) {
        let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
        while self.try_deliver(context, part).await.is_err() {
            tokio::time::sleep(backoff.pause()).await;
        }
    }

    /// Delivers it in as many attempts as a repair makes of each call.
    ///
    /// # Errors
    /// The last fault.
    pub async fn deliver_or_leave(&self, context: &TableContext, part: &str) -> Result<(), Fault> {
        let mut attempts = Attempts::default();
        let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
        loop {
            match self.try_deliver(context, part).await {
                Err(_) if attempts.again() => tokio::time::sleep(backoff.pause()).await,
                done => return done,
            }
        }
    }

    async fn try_deliver(&self, context: &TableContext, part: &str) -> Result<(), Fault> {
        let health = &context.shared.health;
        let table = &context.table.name;
        // The semaphore is never closed; without a permit the letter would go all the same.
        let permit = context.shared.letters.acquire().await;
        let delivered = context.shared.dead_letters.deliver(&self.0).await;
        drop(permit);
        match &delivered {
            Ok(()) => {
                health.succeeded(Scope::DeadLetters, table, part);
                tracing::warn!(
                    table,
                    shard = self.0.shard_id,
                    sequence = self.0.sequence_number,
                    class = self.0.error.class,
                    code = self.0.error.code,
                    attempts = self.0.attempts,
                    "dead letter: the replica refuses this change"
                );
            }
            Err(fault) => {
                metrics::retried(table, fault.class);
                health.failed(Scope::DeadLetters, table, part, fault);
            }
        }
        delivered
    }
}
