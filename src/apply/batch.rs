//! Sending: batches of 25, what came back unprocessed, and the search for what is refused.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::operation::batch_write_item::BatchWriteItemOutput;
use aws_sdk_dynamodb::types::WriteRequest;
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;

use super::budget::Budget;
use super::coalesce::Op;
use super::payment::{Funded, Payment, Strain};
use super::request::{batch_body, replace_body};
use crate::dynamo::item::ItemKey;
use crate::dynamo::table::{KeyPart, describe, primary_key, show_key};
use crate::dynamo::transmit::{Bound, Left, within};
use crate::error::{Class, Fault, Operation, Policy, classify};
use crate::lease::doubts::effect_unknown;
use crate::lease::term::{EPOCH_HEADER, Term, within_term};
use crate::observe::metrics;
use crate::stream::sequence::SequenceNumber;

/// Operations of one `BatchWriteItem`; the service takes no more.
pub const BATCH_OPS_MAX: usize = 25;
/// Bytes of one `BatchWriteItem`, about. The service takes 16 MB; a tenth of it still gets through
/// a slow line within the timeout.
pub const BATCH_BYTES_MAX: usize = 2 << 20;
/// How long a look at the replica's key is believed.
const KEY_BELIEVED: Duration = Duration::from_secs(5);
/// Longest wait for the answer to a write.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(10);
/// A write is not sent when less than this is left of its lease.
const LEASE_MARGIN: Duration = Duration::from_millis(100);
/// Pause before a record that was refused alone is tried again.
const REFUSED_PAUSE: Duration = Duration::from_millis(100);

/// How the write of one change ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It is durable.
    Applied,
    /// It is not known to be durable; send it again.
    Returned,
    /// The replica refused it alone, `attempts` times.
    Refused {
        /// Why.
        fault: Fault,
        /// How often it was tried alone.
        attempts: u32,
    },
}

/// How a batch ended.
#[derive(Debug)]
pub struct Sent {
    /// Each change with its outcome.
    pub outcomes: Vec<(Op, Outcome)>,
    /// Why changes were returned, where the service gave a reason.
    pub fault: Option<Fault>,
    /// The last record among those whose writes left without a complete answer in time: they may
    /// still take effect, whatever their outcome here.
    pub unanswered: Option<SequenceNumber>,
}

/// Writes to one replica table.
pub struct Writer {
    client: Client,
    /// The replica table's name.
    target: String,
    /// The table's name in the configuration, for metrics.
    table: String,
    budget: Arc<Budget>,
    /// What throttling leaves to those who write without a lane of their own.
    lane: Arc<Budget>,
    max_attempts: u32,
    /// The primary key of source and replica, as they were when the worker started.
    key: Vec<KeyPart>,
    /// When the replica was last seen to have that key.
    key_seen: Mutex<Option<Instant>>,
    /// The right to write in the epoch at all.
    term: Option<Arc<Term>>,
}

/// What one call did to its operations.
enum Answer {
    /// All applied but these, by position.
    Done {
        unprocessed: Vec<usize>,
    },
    Failed(Fault),
}

impl Writer {
    /// A writer of the table `target`. A record refused alone `max_attempts` times is poison.
    pub fn new(
        client: Client,
        target: &str,
        table: &str,
        budget: Arc<Budget>,
        max_attempts: u32,
        key: Vec<KeyPart>,
    ) -> Self {
        Self {
            client,
            target: target.to_owned(),
            table: table.to_owned(),
            lane: Arc::new(budget.lane()),
            budget,
            max_attempts,
            key,
            key_seen: Mutex::new(None),
            term: None,
        }
    }

    /// The same, whose writes leave only while `term` is good as well.
    #[must_use]
    pub fn within_term(self, term: Arc<Term>) -> Self {
        Self {
            term: Some(term),
            ..self
        }
    }

    /// The table's write budget.
    pub fn budget(&self) -> &Arc<Budget> {
        &self.budget
    }

    /// Checks that the replica still has the key that the records have. With another one it
    /// refuses every record, and none of them is to blame: that is an outage, not poison.
    async fn check_key(&self) -> Result<(), Fault> {
        let mut seen = self.key_seen.lock().await;
        if seen.is_some_and(|at| at.elapsed() < KEY_BELIEVED) {
            return Ok(());
        }
        let changed = |message: String| {
            Fault::own(
                Operation::Write,
                Class::NotFound,
                "replica changed",
                message,
            )
        };
        let table = describe(&self.client, &self.target)
            .await?
            .ok_or_else(|| changed("the replica table is not there".to_owned()))?;
        let key = primary_key(&table);
        if key != self.key {
            return Err(changed(format!(
                "the replica's key is {} now, and the records have {}",
                show_key(&key),
                show_key(&self.key)
            )));
        }
        *seen = Some(Instant::now());
        Ok(())
    }

    /// Writes `ops` within `bound`. A batch that the replica rejects is bisected until each record
    /// that it refuses stands alone. Returns early, with the rest unsent, at the first failure
    /// that is not the records' own.
    /// Once `stop` is cancelled nothing more is sent, however much of a batch or a budget is left.
    /// A batch of one is a `BatchWriteItem`, too: it costs the same units, needs one permission instead of
    /// three, is written without a copy of the item, and passes the same check when it leaves.
    pub async fn write(
        &self,
        bound: &Arc<dyn Bound>,
        stop: &CancellationToken,
        ops: Vec<Op>,
    ) -> Sent {
        self.write_in(&self.lane, bound, stop, ops).await
    }

    /// As [`write`](Self::write), in a lane of its own: what is throttled for its keys' sake slows that alone.
    pub async fn write_in(
        &self,
        lane: &Budget,
        bound: &Arc<dyn Bound>,
        stop: &CancellationToken,
        ops: Vec<Op>,
    ) -> Sent {
        let mut sent = Sent {
            outcomes: Vec::with_capacity(ops.len()),
            fault: None,
            unanswered: None,
        };
        // Depth first, so that at most one half for each halving waits here.
        let mut groups: Vec<Vec<Op>> = vec![ops];
        let mut refused_alone: Vec<(Op, Fault)> = Vec::new();
        while let Some(mut group) = groups.pop() {
            if sent.fault.is_some() {
                sent.returned(group);
                continue;
            }
            let payment = match self.pay(lane, bound, stop, &group).await {
                Ok(payment) => payment,
                Err(fault) => {
                    sent.returned(group);
                    sent.fault = fault;
                    continue;
                }
            };
            if payment.count() < group.len() {
                // The budget is small: the others wait for their units.
                groups.push(group.split_off(payment.count()));
            }
            match self
                .send(bound, payment, &group, &mut sent.unanswered)
                .await
            {
                Answer::Done { unprocessed } => {
                    if !unprocessed.is_empty() {
                        sent.fault = Some(unprocessed_fault());
                    }
                    for (index, op) in group.into_iter().enumerate() {
                        let outcome = if unprocessed.contains(&index) {
                            Outcome::Returned
                        } else {
                            Outcome::Applied
                        };
                        sent.outcomes.push((op, outcome));
                    }
                }
                Answer::Failed(refused) if refused.policy() == Policy::DeadLetter => {
                    if group.len() > 1 {
                        let right = group.split_off(group.len() / 2);
                        groups.push(right);
                        groups.push(group);
                    } else if let Some(op) = group.pop() {
                        refused_alone.push((op, refused));
                    }
                }
                Answer::Failed(other) => {
                    sent.returned(group);
                    sent.fault = Some(other);
                }
            }
        }
        self.try_alone(lane, bound, stop, refused_alone, &mut sent)
            .await;
        sent
    }

    /// Waits until the first of `ops` may be written, one at least.
    ///
    /// # Errors
    /// `None` once `stop` is cancelled; that `bound` is over, for then nobody waits for units any more.
    async fn pay<'a>(
        &'a self,
        lane: &'a Budget,
        bound: &Arc<dyn Bound>,
        stop: &CancellationToken,
        ops: &[Op],
    ) -> Result<Payment<'a>, Option<Fault>> {
        tokio::select! {
            biased;
            () = stop.cancelled() => Err(None),
            payment = Payment::make(lane, &self.budget, ops) => Ok(payment),
            () = over(bound) => Err(Some(lease_over())),
        }
    }

    /// Tries records alone until each has been refused `max_attempts` times, counting the one that
    /// gave its fault. They wait together, so that much poison holds its neighbours up no longer than
    /// little.
    async fn try_alone(
        &self,
        lane: &Budget,
        bound: &Arc<dyn Bound>,
        stop: &CancellationToken,
        mut refused: Vec<(Op, Fault)>,
        sent: &mut Sent,
    ) {
        // That a neighbour was throttled says nothing of them: they must not wait for as long as it is.
        let is_in_the_way = |fault: &Fault| fault.class != Class::Throttled;
        let mut broken_off = sent.fault.as_ref().is_some_and(is_in_the_way);
        for _ in 1..self.max_attempts {
            if refused.is_empty() || broken_off {
                break;
            }
            tokio::time::sleep(REFUSED_PAUSE).await;
            let mut again = Vec::with_capacity(refused.len());
            for (op, fault) in refused {
                if broken_off {
                    sent.outcomes.push((op, Outcome::Returned));
                    continue;
                }
                metrics::retried(&self.table, fault.class);
                let one = std::slice::from_ref(&op);
                let payment = match self.pay(lane, bound, stop, one).await {
                    Ok(payment) => payment,
                    Err(fault) => {
                        sent.outcomes.push((op, Outcome::Returned));
                        broken_off |= fault.is_some();
                        sent.fault = fault.or(sent.fault.take());
                        continue;
                    }
                };
                let answer = self.send(bound, payment, one, &mut sent.unanswered);
                let (outcome, other) = match answer.await {
                    Answer::Done { unprocessed } if unprocessed.is_empty() => {
                        (Outcome::Applied, None)
                    }
                    Answer::Done { .. } => (Outcome::Returned, Some(unprocessed_fault())),
                    Answer::Failed(fault) if fault.policy() == Policy::DeadLetter => {
                        again.push((op, fault));
                        continue;
                    }
                    Answer::Failed(other) => (Outcome::Returned, Some(other)),
                };
                sent.outcomes.push((op, outcome));
                if other.is_some() {
                    sent.fault = other;
                    broken_off = true;
                }
            }
            refused = again;
        }
        if !refused.is_empty()
            && !broken_off
            && let Err(changed) = self.check_key().await
        {
            sent.fault = Some(changed);
            broken_off = true;
        }
        let is_poison = !broken_off;
        let attempts = self.max_attempts;
        for (op, fault) in refused {
            let outcome = match is_poison {
                true => Outcome::Refused { fault, attempts },
                false => Outcome::Returned,
            };
            sent.outcomes.push((op, outcome));
        }
    }

    /// One call that is paid for, within `bound`. Takes note in `unanswered` of one that may take effect
    /// later.
    async fn send(
        &self,
        bound: &Arc<dyn Bound>,
        payment: Payment<'_>,
        ops: &[Op],
        unanswered: &mut Option<SequenceNumber>,
    ) -> Answer {
        let bound = &within_term(bound, self.term.as_ref());
        let remaining = bound.remaining();
        if remaining <= LEASE_MARGIN {
            payment.give_back();
            return Answer::Failed(lease_over());
        }
        let body = match batch_body(&self.target, ops) {
            Ok(body) => body,
            Err(fault) => {
                payment.give_back();
                return Answer::Failed(fault);
            }
        };
        let epoch = self.term.as_ref().map(|term| term.epoch().to_string());
        let call = self
            .client
            .batch_write_item()
            .request_items(&self.target, Vec::new())
            .customize()
            .mutate_request(move |request| {
                replace_body(request, &body);
                if let Some(epoch) = &epoch {
                    request.headers_mut().insert(EPOCH_HEADER, epoch.clone());
                }
            })
            .send();
        // Not answered before the lease's end is as good as not answered.
        let timeout = ATTEMPT_TIMEOUT.min(remaining - LEASE_MARGIN);
        let funded = Funded::within(bound, &self.budget);
        let (answer, left) = within(funded, timeout, call).await;
        let mut strain = None;
        let answer = match answer {
            None => Err(Fault::own(
                Operation::Write,
                Class::Network,
                "no answer in time",
                "the replica did not answer within the timeout or the lease",
            )),
            Some(Err(error)) => {
                strain = Some(Strain::of_batch(&error));
                Err(classify(Operation::Write, &error))
            }
            Some(Ok(output)) => Ok(output),
        };
        let in_time = !bound.remaining().is_zero();
        let settled = match &answer {
            Ok(_) => in_time,
            Err(fault) => !effect_unknown(fault.class),
        };
        if left == Left::Yes && !settled {
            let last = ops.iter().map(|op| op.change.sequence.clone()).max();
            *unanswered = last.max(unanswered.take());
        }
        match answer {
            Ok(output) => self.done(payment, ops, output),
            Err(fault) => {
                if fault.class == Class::Throttled {
                    payment.throttled(strain.unwrap_or(Strain::Table));
                } else if left == Left::No || !effect_unknown(fault.class) {
                    payment.give_back();
                }
                Answer::Failed(fault)
            }
        }
    }

    /// The replica answered.
    fn done(&self, payment: Payment<'_>, ops: &[Op], output: BatchWriteItemOutput) -> Answer {
        let told = output.consumed_capacity.unwrap_or_default();
        let told: f64 = told.iter().filter_map(|table| table.capacity_units).sum();
        let unprocessed = output.unprocessed_items.unwrap_or_default();
        let unprocessed = positions(ops, unprocessed.into_values().flatten());
        let units = payment.answered(ops, &unprocessed, told);
        metrics::written(&self.table, ops.len() - unprocessed.len(), units);
        Answer::Done { unprocessed }
    }
}

impl Sent {
    /// None of `ops` is known to be durable.
    fn returned(&mut self, ops: Vec<Op>) {
        self.outcomes
            .extend(ops.into_iter().map(|op| (op, Outcome::Returned)));
    }
}

/// Returns once too little of `bound` is left to send anything.
async fn over(bound: &Arc<dyn Bound>) {
    loop {
        match bound.remaining().checked_sub(LEASE_MARGIN) {
            Some(left) if !left.is_zero() => tokio::time::sleep(left).await,
            _ => return,
        }
    }
}

fn lease_over() -> Fault {
    Fault::own(
        Operation::State,
        Class::Network,
        "lease not renewed",
        "the lease ended before the write could be sent",
    )
}

fn unprocessed_fault() -> Fault {
    Fault::own(
        Operation::Write,
        Class::Throttled,
        "UnprocessedItems",
        "the service returned part of a batch unprocessed",
    )
}

/// Positions in `ops` of the requests that came back. One that belongs to none of them makes all
/// count as unprocessed: then nobody knows what was written.
fn positions(ops: &[Op], unprocessed: impl Iterator<Item = WriteRequest>) -> Vec<usize> {
    let mut unprocessed = unprocessed.peekable();
    if unprocessed.peek().is_none() {
        return Vec::new();
    }
    let by_key: HashMap<&ItemKey, usize> = ops
        .iter()
        .enumerate()
        .map(|(index, op)| (&op.change.key, index))
        .collect();
    let mut found = Vec::new();
    for request in unprocessed {
        let key = match (request.put_request, request.delete_request) {
            (Some(put), _) => {
                let names = ops.first().map(|op| &op.change.keys);
                let keys = put
                    .item
                    .into_iter()
                    .filter(|(name, _)| names.is_some_and(|names| names.contains_key(name)))
                    .collect();
                ItemKey::new(&keys)
            }
            (None, Some(delete)) => ItemKey::new(&delete.key),
            (None, None) => return (0..ops.len()).collect(),
        };
        match by_key.get(&key) {
            Some(index) if found.contains(index) => {}
            Some(index) => found.push(*index),
            None => return (0..ops.len()).collect(),
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dynamo::image::Image;
    use crate::dynamo::json::item_from_json;
    use crate::dynamo::value::Item;
    use crate::stream::change::{Change, Event};
    use crate::stream::sequence::SequenceNumber;
    use aws_sdk_dynamodb::types::{AttributeValue, DeleteRequest, PutRequest};

    fn op(slot: u64, id: &str, delete: bool) -> Op {
        let keys = Item::from([("id".to_owned(), AttributeValue::S(id.to_owned()))]);
        let mut image = keys.clone();
        image.insert("v".into(), AttributeValue::Bool(true));
        Op {
            slot,
            change: Arc::new(Change {
                sequence: SequenceNumber::parse("1").unwrap(),
                event: if delete { Event::Remove } else { Event::Insert },
                key: ItemKey::new(&keys),
                keys,
                new_image: (!delete).then(|| Image::of(&image).unwrap()),
                old_image: None,
                created_ms: 0,
                bytes: 0,
                units: 1,
                ttl_delete: false,
            }),
        }
    }

    /// As the service sends it back.
    fn request(op: &Op) -> WriteRequest {
        let builder = WriteRequest::builder();
        let keys = Some(op.change.keys.clone());
        match &op.change.new_image {
            Some(image) => {
                let put = PutRequest::builder().set_item(item_from_json(&image.to_value()));
                builder.put_request(put.build().unwrap())
            }
            None => {
                let delete = DeleteRequest::builder().set_key(keys);
                builder.delete_request(delete.build().unwrap())
            }
        }
        .build()
    }

    #[test]
    fn unprocessed_requests_are_matched_to_their_changes() {
        let ops = [op(0, "a", false), op(1, "b", true), op(2, "c", false)];
        let back = |index: usize| request(&ops[index]);
        assert_eq!(positions(&ops, [back(2), back(1)].into_iter()), [2, 1]);
        assert!(positions(&ops, std::iter::empty()).is_empty());
        let stranger = request(&op(9, "z", false));
        assert_eq!(positions(&ops, [stranger].into_iter()), [0, 1, 2]);
    }
}
