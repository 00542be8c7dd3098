//! Which writes of a call are let through: real capacity, and shares sent back by chance.

use std::collections::HashSet;
use std::sync::Arc;

use bytes::Bytes;
use dynoxide::actions::get_item::GetItemRequest;
use dynoxide::types::item_size;
use serde_json::json;

use super::faults::{Kind, Limit, Subject};
use super::protocol::{Answer, Failure};
use super::region::Region;
use super::rules::{Plan, Rule};
use super::throttle::write_units;
use super::touched::{
    Touched, Write, split_batch, split_batch_get, with_consumed, with_unprocessed,
};

/// Writes or keys of a batch that were not let through.
#[derive(Debug)]
pub(crate) struct Left {
    pub(crate) count: usize,
    /// Where the answer says so, and the JSON of it.
    field: &'static str,
    json: Vec<u8>,
}

/// What may go on.
#[derive(Debug)]
pub(crate) enum Admitted {
    All { units: f64 },
    Part { body: Bytes, left: Left, units: f64 },
    None(Failure),
}

pub(crate) async fn admit(
    region: &Arc<Region>,
    operation: &str,
    body: &Bytes,
    touched: &Touched,
    plan: &Plan,
) -> Admitted {
    let metered = region.options.metered || !plan.capacity.is_empty();
    if !metered && plan.unprocessed.is_none() {
        return Admitted::All { units: 0.0 };
    }
    let units = if metered {
        units(region, operation, &touched.writes).await
    } else {
        vec![0.0; touched.writes.len()]
    };
    let mut refused = HashSet::new();
    let mut limit = None;
    for (place, (write, units)) in touched.writes.iter().zip(&units).enumerate() {
        let short = plan
            .capacity
            .iter()
            .find(|rule| !affords(rule, operation, write, *units));
        if let Some(rule) = short {
            limit = Some(limit_of(rule));
            refused.insert(place);
        }
    }
    let total = touched.writes.len();
    let by_chance = plan.unprocessed.filter(|_| operation == "BatchWriteItem");
    if let Some((share, choice)) = by_chance
        && refused.is_empty()
    {
        refused = chosen(total, share, choice);
    }
    if refused.is_empty() {
        let units = units.iter().sum();
        return Admitted::All { units };
    }
    if operation != "BatchWriteItem" || refused.len() >= total {
        let limit = limit.unwrap_or(Limit::Provisioned);
        return Admitted::None(throttled(region, operation, touched, &refused, limit));
    }
    part(body, touched, &units, &refused).unwrap_or_else(|error| {
        tracing::error!(%error, "a batch could not be taken apart");
        Admitted::None(Failure::internal())
    })
}

/// A share of `total` places, one at least and all but one at most, unless there is only one.
fn chosen(total: usize, share: f64, choice: u64) -> HashSet<usize> {
    let wanted = (total as f64 * share).ceil() as usize;
    let count = wanted.clamp(1, total.saturating_sub(1).max(1));
    let first = choice as usize % total.max(1);
    (0..count).map(|n| (first + n) % total.max(1)).collect()
}

/// A BatchGetItem without a share of its keys; `None` if all of them go on.
pub(crate) fn leave_keys(body: &Bytes, touched: &Touched, plan: &Plan) -> Option<(Bytes, Left)> {
    let (share, choice) = plan.unprocessed?;
    let total = touched.keys.len();
    // At least one key goes on, as at least one item of a batch of writes does.
    let left = Some(chosen(total, share, choice)).filter(|_| total > 1)?;
    let (body, json) = split_batch_get(body, &|place| !left.contains(&place)).ok()?;
    let left = Left {
        count: left.len(),
        field: "UnprocessedKeys",
        json,
    };
    Some((body.into(), left))
}

fn part(
    body: &Bytes,
    touched: &Touched,
    units: &[f64],
    refused: &HashSet<usize>,
) -> serde_json::Result<Admitted> {
    let left: HashSet<(&str, usize)> = refused
        .iter()
        .map(|place| &touched.writes[*place])
        .map(|write| (write.key.table.as_str(), write.index))
        .collect();
    let (body, json) = split_batch(body, &|table, index| !left.contains(&(table, index)))?;
    let used = units
        .iter()
        .enumerate()
        .filter(|(n, _)| !refused.contains(n));
    Ok(Admitted::Part {
        body: body.into(),
        left: Left {
            count: refused.len(),
            field: "UnprocessedItems",
            json,
        },
        units: used.map(|(_, units)| units).sum(),
    })
}

/// The answer to the part that went on, with the part that did not.
pub(crate) fn with_left(answer: Answer, left: &Left) -> Answer {
    if !answer.is_ok() {
        return answer;
    }
    match with_unprocessed(&answer.body, left.field, &left.json) {
        Ok(body) => answer.with_body(body),
        Err(error) => {
            tracing::error!(%error, "the embedded DynamoDB's answer could not be read");
            Failure::internal().answer()
        }
    }
}

/// The answer to a write of `units` that asked what it took: the log and the client are told the same.
pub(crate) fn with_units(answer: Answer, touched: &Touched, units: f64) -> Answer {
    if !answer.is_ok() || units <= 0.0 || touched.tables.len() != 1 {
        return answer;
    }
    match with_consumed(&answer.body, units) {
        Ok(Some(body)) => answer.with_body(body),
        Ok(None) => answer,
        Err(error) => {
            tracing::error!(%error, "the embedded DynamoDB's answer could not be read");
            Failure::internal().answer()
        }
    }
}

fn throttled(
    region: &Region,
    operation: &str,
    touched: &Touched,
    refused: &HashSet<usize>,
    limit: Limit,
) -> Failure {
    let table = touched.tables.first().map_or("", String::as_str);
    if operation == "TransactWriteItems" {
        let code = |place| {
            if refused.contains(&place) {
                "ThrottlingError"
            } else {
                "None"
            }
        };
        let codes: Vec<_> = (0..touched.writes.len()).map(code).collect();
        let message = format!(
            "Transaction cancelled, please refer cancellation reasons for specific reasons [{}]",
            codes.join(", ")
        );
        let mut failure = Failure::new(400, "TransactionCanceledException", message);
        failure.cancellations = codes;
        return failure;
    }
    let code = "ProvisionedThroughputExceededException";
    region.rules.throttled(code, limit, operation, table)
}

fn limit_of(rule: &Rule) -> Limit {
    match rule.fault.kind {
        Kind::Capacity { ranges, .. } if ranges > 1 => Limit::KeyRange,
        _ => Limit::Provisioned,
    }
}

/// Takes a write's units from the bucket of its table and key range; true if there is no such.
fn affords(rule: &Rule, operation: &str, write: &Write, units: f64) -> bool {
    let Kind::Capacity {
        rate,
        burst,
        ranges,
    } = rule.fault.kind
    else {
        return true;
    };
    let one = Subject {
        operation,
        tables: std::slice::from_ref(&write.key.table),
        keys: std::slice::from_ref(&write.key),
        shard: None,
    };
    if !rule.concerns(&one) {
        return true;
    }
    let range = (write.key.place() * ranges as f64) as usize;
    let share = ranges as f64;
    let what = format!("{} {range}", write.key.table);
    rule.take(&what, units, rate / share, burst / share)
}

/// What each write costs: by the larger of the old and the new item, twice in a transaction.
async fn units(region: &Arc<Region>, operation: &str, writes: &[Write]) -> Vec<f64> {
    let (of, writes) = (Arc::clone(region), writes.to_vec());
    let times = if operation == "TransactWriteItems" {
        2.0
    } else {
        1.0
    };
    let measure = move || {
        let measured = writes.iter().map(|write| {
            let old = old_size(&of, write);
            times * write_units(old.max(write.size))
        });
        measured.collect()
    };
    // It fails only if the reading panicked, which has been logged by then.
    tokio::task::spawn_blocking(measure)
        .await
        .unwrap_or_default()
}

fn old_size(region: &Region, write: &Write) -> usize {
    let request = json!({
        "TableName": write.key.table,
        "Key": write.key_item,
        "ConsistentRead": true,
    });
    let request: Option<GetItemRequest> = serde_json::from_value(request).ok();
    let found = request.and_then(|request| region.database.get_item(request).ok());
    found
        .and_then(|found| found.item)
        .map_or(0, |item| item_size(&item))
}
