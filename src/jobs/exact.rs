//! Writes an item where the key still holds exactly what it was seen to hold.

use std::collections::HashMap;

use aws_sdk_dynamodb::types::{AttributeValue, ReturnValue};

use crate::dynamo::RegionClients;
use crate::dynamo::value::{Item, same_item};
use crate::error::{Fault, Operation, classify};

/// An expression has at most 4 KB, and an attribute takes some 20 bytes of it.
const ATTRIBUTES_MAX: usize = 150;

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

/// How such a write ended.
#[derive(Debug)]
pub(in crate::jobs) enum Written {
    /// It replaced what was seen.
    AsSeen,
    /// It replaced this: somebody had added an attribute since, which no condition can exclude.
    Over(Item),
}
