//! Writes that take effect only where they may: one item a call, on condition of what the table holds.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::types::{AttributeValue, ConsumedCapacity, ReturnConsumedCapacity};
use tokio_util::sync::CancellationToken;

use super::budget::Budget;
use super::payment::{Funded, Payment, Strain};
use crate::backoff::Backoff;
use crate::dynamo::transmit::{Bound, Left, within};
use crate::dynamo::value::{Item, item_bytes};
use crate::error::{Class, Fault, Operation, Policy, classify};
use crate::lease::doubts::effect_unknown;
use crate::lease::term::{Term, within_term};
use crate::repair::Attempts;
use crate::stream::change::write_units;

/// Longest wait for an answer.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(10);
/// Nothing is sent when less than this is left of the bound.
const BOUND_MARGIN: Duration = Duration::from_millis(100);
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// How a write on condition ended.
#[derive(Debug)]
pub enum Put {
    /// It took effect.
    Done,
    /// The condition did not hold, and nothing changed.
    Held,
    /// The table can never take it.
    Refused(Fault),
    /// It may take effect later.
    Unanswered(Fault),
    /// It failed in a way that does not pass by itself; nothing left that could take effect.
    Failed(Fault),
    /// Asked to stop, or the bound is over.
    Stopped,
}

/// What a write goes by.
struct Condition {
    expression: String,
    names: HashMap<String, String>,
    values: HashMap<String, AttributeValue>,
}

/// Writes to one table, on condition.
pub struct Conditional {
    client: Client,
    table: String,
    /// Attributes of the key: an item that is there has them.
    key_names: Vec<String>,
    budget: Arc<Budget>,
    lane: Budget,
    /// The right to write in the epoch at all.
    term: Option<Arc<Term>>,
}

/// What came of a call: the units it took, where the service says so.
type Answer = Result<f64, (Fault, Strain)>;

impl Conditional {
    /// Writes to `table` within `budget`. `key_names` are the attributes of its key.
    pub fn new(client: Client, table: &str, key_names: Vec<String>, budget: Arc<Budget>) -> Self {
        Self {
            client,
            table: table.to_owned(),
            key_names,
            lane: budget.lane(),
            budget,
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

    /// Puts `item` where there is none; `newer`: or where this attribute is less.
    pub async fn put(
        &self,
        bound: &Arc<dyn Bound>,
        stop: &CancellationToken,
        item: &Item,
        newer: Option<&str>,
    ) -> Put {
        let absent = "attribute_not_exists(#key)".to_owned();
        let mut condition = Condition {
            expression: absent,
            names: self
                .key_names
                .first()
                .map(|name| ("#key".to_owned(), name.clone()))
                .into_iter()
                .collect(),
            values: HashMap::new(),
        };
        if let Some(name) = newer
            && let Some(value @ (AttributeValue::S(_) | AttributeValue::N(_))) = item.get(name)
        {
            condition.expression.push_str(" OR #newer < :newer");
            condition.names.insert("#newer".to_owned(), name.to_owned());
            condition.values.insert(":newer".to_owned(), value.clone());
        }
        self.patiently(bound, stop, item, &condition, false).await
    }

    /// Takes `item` away again, where the table still holds it as it is here.
    pub async fn take_back(
        &self,
        bound: &Arc<dyn Bound>,
        stop: &CancellationToken,
        item: &Item,
    ) -> Put {
        let mut condition = Condition {
            expression: String::new(),
            names: HashMap::new(),
            values: HashMap::new(),
        };
        for (number, (name, value)) in item.iter().enumerate() {
            let and = if number == 0 { "" } else { " AND " };
            condition.expression += &format!("{and}#a{number} = :a{number}");
            condition.names.insert(format!("#a{number}"), name.clone());
            condition
                .values
                .insert(format!(":a{number}"), value.clone());
        }
        self.patiently(bound, stop, item, &condition, true).await
    }

    async fn patiently(
        &self,
        bound: &Arc<dyn Bound>,
        stop: &CancellationToken,
        item: &Item,
        condition: &Condition,
        delete: bool,
    ) -> Put {
        let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
        let mut attempts = Attempts::default();
        loop {
            let put = self.once(bound, stop, item, condition, delete).await;
            match put {
                Put::Failed(fault) if fault.policy() == Policy::Retry && attempts.again() => {}
                put => return put,
            }
            tokio::select! {
                () = stop.cancelled() => return Put::Stopped,
                () = tokio::time::sleep(backoff.pause()) => {}
            }
        }
    }

    async fn once(
        &self,
        bound: &Arc<dyn Bound>,
        stop: &CancellationToken,
        item: &Item,
        condition: &Condition,
        delete: bool,
    ) -> Put {
        let units = f64::from(write_units(item_bytes(item)));
        let payment = tokio::select! {
            biased;
            () = stop.cancelled() => return Put::Stopped,
            payment = Payment::of(&self.lane, &self.budget, std::slice::from_ref(&units)) => payment,
        };
        let bound = &within_term(bound, self.term.as_ref());
        let remaining = bound.remaining();
        if remaining <= BOUND_MARGIN {
            payment.give_back();
            return Put::Stopped;
        }
        let timeout = ATTEMPT_TIMEOUT.min(remaining - BOUND_MARGIN);
        let call = async {
            match delete {
                true => self.delete(item, condition).await,
                false => self.send(item, condition).await,
            }
        };
        let (answer, left) = within(Funded::within(bound, &self.budget), timeout, call).await;
        match &answer {
            Some(Ok(told)) => {
                payment.took(units, *told);
            }
            Some(Err((fault, strain))) if fault.class == Class::Throttled => {
                payment.throttled(*strain);
            }
            // Where a condition does not hold, the item is paid for all the same.
            Some(Err((fault, _))) if fault.class == Class::Condition => {
                payment.took(units, 0.0);
            }
            Some(Err((fault, _))) if !effect_unknown(fault.class) => payment.give_back(),
            _ if left == Left::No => payment.give_back(),
            _ => {
                payment.took(units, 0.0);
            }
        }
        let fault = match answer {
            Some(Ok(_)) if !bound.remaining().is_zero() => return Put::Done,
            Some(Err((fault, _))) if fault.class == Class::Condition => return Put::Held,
            Some(Err((fault, _))) => fault,
            Some(Ok(_)) | None => Fault::own(
                Operation::Write,
                Class::Network,
                "no answer in time",
                "the target did not answer within the timeout or the bound",
            ),
        };
        match left {
            Left::Yes if effect_unknown(fault.class) => Put::Unanswered(fault),
            _ if fault.policy() == Policy::DeadLetter => Put::Refused(fault),
            _ => Put::Failed(fault),
        }
    }

    async fn send(&self, item: &Item, condition: &Condition) -> Answer {
        let call = self.client.put_item().table_name(&self.table);
        let call = call
            .set_item(Some(item.clone()))
            .condition_expression(&condition.expression)
            .set_expression_attribute_names(some(&condition.names))
            .set_expression_attribute_values(some(&condition.values))
            .return_consumed_capacity(ReturnConsumedCapacity::Total);
        let answer = call.send().await;
        answer
            .map(|answer| units_of(answer.consumed_capacity.as_ref()))
            .map_err(|error| (classify(Operation::Write, &error), Strain::of_put(&error)))
    }

    async fn delete(&self, item: &Item, condition: &Condition) -> Answer {
        let keys = item.iter();
        let key: Item = keys
            .filter(|(name, _)| self.key_names.contains(name))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect();
        let call = self.client.delete_item().table_name(&self.table);
        let call = call
            .set_key(Some(key))
            .condition_expression(&condition.expression)
            .set_expression_attribute_names(some(&condition.names))
            .set_expression_attribute_values(some(&condition.values))
            .return_consumed_capacity(ReturnConsumedCapacity::Total);
        let answer = call.send().await;
        answer
            .map(|answer| units_of(answer.consumed_capacity.as_ref()))
            .map_err(|error| {
                let strain = Strain::of_delete(&error);
                (classify(Operation::Write, &error), strain)
            })
    }
}

/// The units that a single write took; 0 where the service says nothing.
pub fn units_of(consumed: Option<&ConsumedCapacity>) -> f64 {
    consumed
        .and_then(|consumed| consumed.capacity_units)
        .unwrap_or(0.0)
}

/// The service refuses an empty map.
fn some<T: Clone>(map: &HashMap<String, T>) -> Option<HashMap<String, T>> {
    (!map.is_empty()).then(|| map.clone())
}
