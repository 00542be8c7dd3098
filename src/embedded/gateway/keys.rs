//! Keys of items: which attributes they are, where they fall in the range of hashes, how a log
//! shows them, and whether two items are the same item.

use std::collections::HashMap;

use dynoxide::types::{AttributeValue, Item};
use serde::Deserialize;

use super::hash::{hash_bytes, mix};
use crate::dynamo::value::canonical_number;

/// The key attributes of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct KeySchema {
    pub(crate) partition: String,
    pub(crate) sort: Option<String>,
    /// As DynamoDB describes it, for `KeySchema` in DescribeStream.
    pub(crate) json: String,
}

#[derive(Deserialize)]
struct SchemaElement {
    #[serde(rename = "AttributeName")]
    name: String,
    #[serde(rename = "KeyType")]
    kind: String,
}

impl KeySchema {
    /// Reads the JSON list of `AttributeName` and `KeyType`; `None` if it has no `HASH`.
    pub(crate) fn parse(json: &str) -> Option<Self> {
        let elements: Vec<SchemaElement> = serde_json::from_str(json).ok()?;
        let named = |kind: &str| {
            let found = elements.iter().find(|e| e.kind == kind);
            found.map(|e| e.name.clone())
        };
        Some(Self {
            partition: named("HASH")?,
            sort: named("RANGE"),
            json: json.to_owned(),
        })
    }

    /// The key of an item that has it.
    pub(crate) fn key_of(&self, table: &str, item: &Item) -> Option<Key> {
        let partition = item.get(&self.partition)?;
        let sort = match &self.sort {
            Some(name) => Some((name.as_str(), item.get(name)?)),
            None => None,
        };
        Some(Key::new(table, (&self.partition, partition), sort))
    }
}

/// One item's key, as the call log shows it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// The table's name.
    pub table: String,
    /// The key attributes as DynamoDB JSON, partition key first: `{"pk":{"S":"a"}}`.
    pub json: String,
    hash: u64,
}

impl Key {
    fn new(
        table: &str,
        partition: (&str, &AttributeValue),
        sort: Option<(&str, &AttributeValue)>,
    ) -> Self {
        let mut json = String::from("{");
        for (n, (name, value)) in std::iter::once(partition).chain(sort).enumerate() {
            // Key attributes are strings, numbers and binaries: all of them print as JSON.
            let name = serde_json::to_string(name).unwrap_or_default();
            let value = serde_json::to_string(value).unwrap_or_default();
            let comma = if n == 0 { "" } else { "," };
            json.push_str(&format!("{comma}{name}:{value}"));
        }
        json.push('}');
        Self {
            table: table.to_owned(),
            json,
            hash: partition_hash(partition.1),
        }
    }

    /// Where the partition key falls in the table's range of hashes, from 0 up to 1.
    pub fn place(&self) -> f64 {
        (self.hash >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// The hash that decides about shard and key range: equal for equal keys however they are written.
pub(crate) fn partition_hash(value: &AttributeValue) -> u64 {
    match value {
        AttributeValue::S(text) => mix(hash_bytes(text.as_bytes())),
        AttributeValue::N(number) => mix(hash_bytes(canonical_number(number).as_bytes()) ^ 1),
        AttributeValue::B(bytes) => mix(hash_bytes(bytes) ^ 2),
        // No other type can be a key.
        _ => 0,
    }
}

/// True if a write that turned `old` into `new` changed nothing: sets have no order and numbers
/// no spelling.
pub(crate) fn same_item(old: &Item, new: &Item) -> bool {
    same_map(old, new)
}

fn same_map(
    left: &HashMap<String, AttributeValue>,
    right: &HashMap<String, AttributeValue>,
) -> bool {
    left.len() == right.len()
        && left.iter().all(|(name, value)| {
            let other = right.get(name);
            other.is_some_and(|other| same_value(value, other))
        })
}

fn same_value(left: &AttributeValue, right: &AttributeValue) -> bool {
    use AttributeValue::{BS, L, M, N, NS, SS};
    match (left, right) {
        (N(l), N(r)) => l == r || canonical_number(l) == canonical_number(r),
        (SS(l), SS(r)) => same_set(l.iter(), r.iter()),
        (BS(l), BS(r)) => same_set(l.iter(), r.iter()),
        (NS(l), NS(r)) => same_set(
            l.iter().map(|n| canonical_number(n)),
            r.iter().map(|n| canonical_number(n)),
        ),
        (L(l), L(r)) => l.len() == r.len() && l.iter().zip(r).all(|(l, r)| same_value(l, r)),
        (M(l), M(r)) => same_map(l, r),
        _ => left == right,
    }
}

fn same_set<T: Ord>(left: impl Iterator<Item = T>, right: impl Iterator<Item = T>) -> bool {
    let sorted = |members: Vec<T>| {
        let mut members = members;
        members.sort();
        members
    };
    sorted(left.collect()) == sorted(right.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(text: &str) -> AttributeValue {
        AttributeValue::N(text.into())
    }

    #[test]
    fn every_spelling_of_a_number_is_the_same_key() {
        for (left, right) in [
            ("1", "1.0"),
            ("100", "1e2"),
            ("-0.50", "-5E-1"),
            ("0", "-0.000"),
            ("007", "7"),
        ] {
            let (l, r) = (number(left), number(right));
            assert_eq!(partition_hash(&l), partition_hash(&r), "{left} {right}");
            assert!(same_value(&l, &r), "{left} {right}");
        }
        assert_ne!(partition_hash(&number("10")), partition_hash(&number("1")));
        assert_ne!(
            partition_hash(&number("1")),
            partition_hash(&AttributeValue::S("1".into()))
        );
    }

    #[test]
    fn sets_are_the_same_in_any_order_and_lists_are_not() {
        let set = |m: &[&str]| AttributeValue::SS(m.iter().map(|s| (*s).into()).collect());
        let list = |m: &[&str]| AttributeValue::L(m.iter().map(|n| number(n)).collect());
        assert!(same_value(&set(&["a", "b"]), &set(&["b", "a"])));
        assert!(!same_value(&set(&["a", "b"]), &set(&["a", "c"])));
        assert!(!same_value(&list(&["1", "2"]), &list(&["2", "1"])));
        assert!(same_value(&list(&["1", "2.0"]), &list(&["1.0", "2"])));
    }

    #[test]
    fn a_key_prints_its_partition_key_first() {
        let schema = KeySchema::parse(
            r#"[{"AttributeName":"z","KeyType":"HASH"},{"AttributeName":"a","KeyType":"RANGE"}]"#,
        )
        .unwrap();
        let item: Item =
            serde_json::from_str(r#"{"a":{"N":"1"},"z":{"S":"q"},"o":{"S":""}}"#).unwrap();
        let key = schema.key_of("t", &item).unwrap();
        assert_eq!(key.json, r#"{"z":{"S":"q"},"a":{"N":"1"}}"#);
    }
}
