//! Writes an item where the key still holds exactly what it was seen to hold.

use std::collections::HashMap;
use std::time::Duration;

use aws_sdk_dynamodb::types::{AttributeValue, ReturnValue};

use crate::backoff::Backoff;
use crate::dynamo::RegionClients;
use crate::dynamo::value::{Item, same_item};
use crate::error::{Class, Fault, Operation, Policy, classify};

/// An expression has at most 4 KB, and an attribute takes some 20 bytes of it.
const ATTRIBUTES_MAX: usize = 150;
/// How often an item is put back while that fails in a way that may pass by itself.
const ATTEMPTS_MAX: u32 = 60;
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Why no condition can say that a key still holds `item`, where none can.
pub(in crate::jobs) fn unsayable(item: Option<&Item>) -> Option<String> {
    let too_many = item.is_some_and(|item| item.len() > ATTRIBUTES_MAX);
    too_many.then(|| {
        format!("it has more than {ATTRIBUTES_MAX} attributes, and no condition can name them all")
    })
}

/// That an item is still there as it was seen, or still gone.
struct Condition {
    text: String,
    names: HashMap<String, String>,
    values: Option<HashMap<String, AttributeValue>>,
}

impl Condition {
    fn of(keys: &Item, seen: Option<&Item>) -> Self {
        let mut names = HashMap::new();
        let Some(seen) = seen else {
            let key = keys.keys().min().cloned().unwrap_or_default();
            names.insert("#k".to_owned(), key);
            return Self {
                text: "attribute_not_exists(#k)".to_owned(),
                names,
                values: None,
            };
        };
        let mut parts = Vec::new();
        let mut values = HashMap::new();
        for (number, (name, value)) in seen.iter().enumerate() {
            parts.push(format!("#a{number} = :a{number}"));
            names.insert(format!("#a{number}"), name.clone());
            values.insert(format!(":a{number}"), value.clone());
        }
        Self {
            text: parts.join(" AND "),
            names,
            values: Some(values),
        }
    }
}

/// Makes the item under `keys` what `wanted` is, where the key still holds what was `seen`. A condition cannot say
/// that there is no other attribute: it was looked at a moment ago.
///
/// # Errors
/// The fault of the call; of class `Condition` where the key holds something else.
pub(in crate::jobs) async fn write(
    (region, table, keys): (&RegionClients, &str, &Item),
    seen: Option<&Item>,
    wanted: Option<&Item>,
) -> Result<Written, Fault> {
    let condition = Condition::of(keys, seen);
    let failed = Operation::Write;
    let replaced = match wanted {
        Some(item) => region
            .tables
            .put_item()
            .table_name(table)
            .set_item(Some(item.clone()))
            .condition_expression(condition.text)
            .set_expression_attribute_names(Some(condition.names))
            .set_expression_attribute_values(condition.values)
            .return_values(ReturnValue::AllOld)
            .send()
            .await
            .map(|answer| answer.attributes)
            .map_err(|error| classify(failed, &error)),
        None => region
            .tables
            .delete_item()
            .table_name(table)
            .set_key(Some(keys.clone()))
            .condition_expression(condition.text)
            .set_expression_attribute_names(Some(condition.names))
            .set_expression_attribute_values(condition.values)
            .return_values(ReturnValue::AllOld)
            .send()
            .await
            .map(|answer| answer.attributes)
            .map_err(|error| classify(failed, &error)),
    };
    let replaced = replaced?.filter(|item| !item.is_empty());
    let was_as_seen = match (&replaced, seen) {
        (Some(replaced), Some(seen)) => same_item(replaced, seen),
        (None, None) => true,
        // Servers other than AWS may not say what they replaced.
        (None, Some(_)) => true,
        (Some(_), None) => false,
    };
    match replaced {
        Some(replaced) if !was_as_seen => Ok(Written::Over(replaced)),
        _ => Ok(Written::AsSeen),
    }
}

/// Puts `theirs` back, which was replaced by `ours` in the moment in which somebody changed it, and whatever is replaced
/// by that in its turn, until nothing is or somebody has written the key since.
///
/// # Errors
/// The fault of the last call, once it was tried for a while.
pub(in crate::jobs) async fn put_back(
    place: (&RegionClients, &str, &Item),
    ours: Option<&Item>,
    theirs: Item,
) -> Result<(), Fault> {
    let (mut ours, mut theirs) = (ours.cloned(), theirs);
    let mut attempts = 0;
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    loop {
        attempts += 1;
        match write(place, ours.as_ref(), Some(&theirs)).await {
            Ok(Written::AsSeen) => return Ok(()),
            Ok(Written::Over(newer)) => ours = Some(std::mem::replace(&mut theirs, newer)),
            // They have written it since; or this has taken effect without an answer.
            Err(fault) if fault.class == Class::Condition => return Ok(()),
            Err(fault) if fault.policy() == Policy::Retry && attempts < ATTEMPTS_MAX => {
                tokio::time::sleep(backoff.pause()).await;
            }
            Err(fault) => return Err(fault),
        }
    }
}

/// How such a write ended.
#[derive(Debug)]
pub(in crate::jobs) enum Written {
    /// It replaced what was seen.
    AsSeen,
    /// It replaced this: somebody had added an attribute since, which no condition can exclude.
    Over(Item),
}
