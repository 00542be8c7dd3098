//! Compares two tables completely, in memory: for the demo's few thousand items.

use std::collections::HashMap;

use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::types::AttributeValue;

use crate::dynamo::item::ItemKey;
use crate::dynamo::table::{describe, primary_key};
use crate::dynamo::value::Item;
use crate::error::{Class, Fault, Operation, classify};

/// Pages of a scan; more is no table for this.
const PAGES_MAX: usize = 100_000;

/// How two tables differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Comparison {
    /// Items in the source.
    pub source_items: usize,
    /// Items in the target.
    pub target_items: usize,
    /// In the source only.
    pub missing: usize,
    /// In the target only.
    pub extra: usize,
    /// In both, and not the same.
    pub different: usize,
}

impl Comparison {
    /// Whether every item of each side equals one of the other.
    pub fn is_equal(&self) -> bool {
        self.missing == 0 && self.extra == 0 && self.different == 0
    }
}

/// Reads both tables whole and compares them item by item.
///
/// # Errors
/// The fault of the first call that failed.
pub async fn compare(
    source: (&Client, &str),
    target: (&Client, &str),
) -> Result<Comparison, Fault> {
    let from = load(source.0, source.1).await?;
    let mut to = load(target.0, target.1).await?;
    let mut result = Comparison {
        source_items: from.len(),
        target_items: to.len(),
        missing: 0,
        extra: 0,
        different: 0,
    };
    for (key, item) in &from {
        match to.remove(key) {
            None => result.missing += 1,
            Some(other) if other != *item => result.different += 1,
            Some(_) => {}
        }
    }
    result.extra = to.len();
    Ok(result)
}

async fn load(client: &Client, table: &str) -> Result<HashMap<ItemKey, Item>, Fault> {
    let missing = || {
        Fault::own(
            Operation::DescribeTable,
            Class::NotFound,
            "ResourceNotFoundException",
            format!("there is no table {table}"),
        )
    };
    let description = describe(client, table).await?.ok_or_else(missing)?;
    let names: Vec<String> = primary_key(&description)
        .into_iter()
        .map(|part| part.name)
        .collect();
    let mut items = HashMap::new();
    let mut after = None;
    for _ in 0..PAGES_MAX {
        let page = client
            .scan()
            .table_name(table)
            .consistent_read(true)
            .set_exclusive_start_key(after.take())
            .send()
            .await
            .map_err(|error| classify(Operation::Scan, &error))?;
        for mut item in page.items.unwrap_or_default() {
            item.values_mut().for_each(sort_sets);
            let keys: Item = names
                .iter()
                .filter_map(|name| Some((name.clone(), item.get(name)?.clone())))
                .collect();
            items.insert(ItemKey::new(&keys), item);
        }
        after = page.last_evaluated_key.filter(|key| !key.is_empty());
        if after.is_none() {
            return Ok(items);
        }
    }
    Err(Fault::own(
        Operation::Scan,
        Class::Unknown,
        "scan without end",
        format!("the scan of {table} did not end"),
    ))
}

/// Sets have no order; the servers give them in any.
fn sort_sets(value: &mut AttributeValue) {
    match value {
        AttributeValue::Ss(set) | AttributeValue::Ns(set) => set.sort_unstable(),
        AttributeValue::Bs(set) => set.sort_by(|a, b| a.as_ref().cmp(b.as_ref())),
        AttributeValue::L(list) => list.iter_mut().for_each(sort_sets),
        AttributeValue::M(map) => map.values_mut().for_each(sort_sets),
        _ => {}
    }
}
