//! 128 bits that stand for an item: equal items have equal digests, however they are spelled.
//!
//! Attributes come in any order, sets in any order, and a number in many spellings; DynamoDB calls
//! them equal, and so does this. The digest is the first half of SHA-256 over one spelling of it
//! all: two different items of one table with the same digest will not be met, not even where
//! somebody tries to make them.

use aws_sdk_dynamodb::types::AttributeValue;
use sha2::{Digest as _, Sha256};

use super::item::ItemKey;
use super::value::{Item, canonical_number};

/// What stands for an item or for its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest(u128);

impl Digest {
    /// The digest of a key.
    pub fn of_key(key: &ItemKey) -> Self {
        Self::of_bytes(key.as_bytes())
    }

    /// The digest of a whole item. `None` where it holds a value of a type that this version does
    /// not know: nobody can say what that equals.
    pub fn of_item(item: &Item) -> Option<Self> {
        let mut bytes = Vec::with_capacity(512);
        push_map(&mut bytes, item)?;
        Some(Self::of_bytes(&bytes))
    }

    /// As it is stored.
    pub fn to_bytes(&self) -> [u8; 16] {
        self.0.to_be_bytes()
    }

    /// As it was stored.
    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(u128::from_be_bytes(bytes))
    }

    fn of_bytes(bytes: &[u8]) -> Self {
        let hash = Sha256::digest(bytes);
        let mut half = [0; 16];
        half.copy_from_slice(&hash[..16]);
        Self(u128::from_be_bytes(half))
    }
}

impl std::fmt::Display for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

fn push_map(bytes: &mut Vec<u8>, map: &Item) -> Option<()> {
    let mut entries: Vec<_> = map.iter().collect();
    entries.sort_unstable_by_key(|(name, _)| *name);
    push_count(bytes, b'M', entries.len());
    for (name, value) in entries {
        push(bytes, b'k', name.as_bytes());
        push_value(bytes, value)?;
    }
    Some(())
}

fn push_value(bytes: &mut Vec<u8>, value: &AttributeValue) -> Option<()> {
    match value {
        AttributeValue::S(text) => push(bytes, b's', text.as_bytes()),
        AttributeValue::N(number) => push(bytes, b'n', canonical_number(number).as_bytes()),
        AttributeValue::B(blob) => push(bytes, b'b', blob.as_ref()),
        AttributeValue::Bool(yes) => push(bytes, b'o', &[u8::from(*yes)]),
        AttributeValue::Null(yes) => push(bytes, b'0', &[u8::from(*yes)]),
        AttributeValue::Ss(set) => {
            push_set(bytes, b'S', set.iter().map(String::as_bytes).collect());
        }
        AttributeValue::Ns(set) => {
            let numbers: Vec<String> = set.iter().map(|n| canonical_number(n)).collect();
            push_set(bytes, b'N', numbers.iter().map(String::as_bytes).collect());
        }
        AttributeValue::Bs(set) => push_set(bytes, b'B', set.iter().map(AsRef::as_ref).collect()),
        AttributeValue::L(list) => {
            push_count(bytes, b'L', list.len());
            for value in list {
                push_value(bytes, value)?;
            }
        }
        AttributeValue::M(map) => push_map(bytes, map)?,
        _ => return None,
    }
    Some(())
}

fn push_set(bytes: &mut Vec<u8>, kind: u8, mut members: Vec<&[u8]>) {
    members.sort_unstable();
    push_count(bytes, kind, members.len());
    for member in members {
        push(bytes, b'e', member);
    }
}

fn push_count(bytes: &mut Vec<u8>, kind: u8, count: usize) {
    bytes.push(kind);
    bytes.extend_from_slice(&(count as u64).to_be_bytes());
}

/// With its length before it, so that no two values run into each other.
fn push(bytes: &mut Vec<u8>, kind: u8, part: &[u8]) {
    push_count(bytes, kind, part.len());
    bytes.extend_from_slice(part);
}

#[cfg(test)]
mod tests {
    use aws_smithy_types::Blob;
    use proptest::prelude::*;

    use super::*;
    use crate::dynamo::value::same_item;

    /// Few values, so that two items are equal now and then.
    fn value() -> impl Strategy<Value = AttributeValue> {
        let number = prop_oneof![
            Just("1"),
            Just("1.0"),
            Just("+1"),
            Just("10e-1"),
            Just("-1"),
            Just("0.10"),
            Just("0")
        ];
        let number = number.prop_map(str::to_owned);
        let text = prop_oneof![Just(""), Just("a"), Just("ab"), Just("1")].prop_map(str::to_owned);
        let blob = prop::collection::vec(0u8..2, 0..3).prop_map(Blob::new);
        let leaf = prop_oneof![
            number.clone().prop_map(AttributeValue::N),
            text.clone().prop_map(AttributeValue::S),
            blob.clone().prop_map(AttributeValue::B),
            any::<bool>().prop_map(AttributeValue::Bool),
            Just(AttributeValue::Null(true)),
            prop::collection::hash_set(text, 1..3)
                .prop_map(|set| AttributeValue::Ss(set.into_iter().collect())),
            prop::collection::vec(number, 1..3).prop_map(AttributeValue::Ns),
            prop::collection::vec(blob, 1..3).prop_map(AttributeValue::Bs),
        ];
        leaf.prop_recursive(3, 12, 3, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..3).prop_map(AttributeValue::L),
                prop::collection::hash_map("[ab]", inner, 0..3).prop_map(AttributeValue::M),
            ]
        })
    }

    fn item() -> impl Strategy<Value = Item> {
        prop::collection::hash_map("[ab]", value(), 0..3)
    }

    /// The same item, spelled another way.
    fn respelled(value: &AttributeValue) -> AttributeValue {
        let number = |text: &str| match text.strip_prefix('-') {
            Some(rest) => format!("-0{rest}e0"),
            None => format!("0{}e0", text.trim_start_matches('+')),
        };
        match value {
            AttributeValue::N(text) if !text.contains('e') => AttributeValue::N(number(text)),
            AttributeValue::Ss(set) => AttributeValue::Ss(set.iter().rev().cloned().collect()),
            AttributeValue::Ns(set) => AttributeValue::Ns(set.iter().rev().cloned().collect()),
            AttributeValue::Bs(set) => AttributeValue::Bs(set.iter().rev().cloned().collect()),
            AttributeValue::L(list) => AttributeValue::L(list.iter().map(respelled).collect()),
            AttributeValue::M(map) => AttributeValue::M(respelled_item(map)),
            other => other.clone(),
        }
    }

    fn respelled_item(item: &Item) -> Item {
        item.iter()
            .map(|(name, value)| (name.clone(), respelled(value)))
            .collect()
    }

    proptest! {
        #[test]
        fn digests_are_equal_when_dynamodb_calls_the_items_equal(a in item(), b in item()) {
            prop_assert_eq!(
                same_item(&a, &b),
                Digest::of_item(&a).unwrap() == Digest::of_item(&b).unwrap()
            );
        }

        #[test]
        fn another_spelling_has_the_same_digest(item in item()) {
            let other = respelled_item(&item);
            prop_assert!(same_item(&item, &other));
            prop_assert_eq!(Digest::of_item(&item), Digest::of_item(&other));
        }

        #[test]
        fn a_change_deep_inside_changes_the_digest(item in item(), value in value()) {
            let nested = |value: &AttributeValue| {
                let list = AttributeValue::L(vec![AttributeValue::M(item.clone()), value.clone()]);
                Item::from([("deep".to_owned(), list)])
            };
            let changed = AttributeValue::L(vec![value.clone()]);
            prop_assert_ne!(Digest::of_item(&nested(&value)), Digest::of_item(&nested(&changed)));
        }
    }

    #[test]
    fn a_digest_is_the_same_in_every_version() {
        let item = Item::from([("id".to_owned(), AttributeValue::S("a".to_owned()))]);
        assert_eq!(
            Digest::of_item(&item).unwrap().to_string(),
            "84e33fb8ffaef0f9f4ce8faa507b5452"
        );
    }
}
