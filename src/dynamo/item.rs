//! The identity of an item: its key attributes in one comparable form.

use std::fmt;

use aws_sdk_dynamodb::types::AttributeValue;

use super::value::{Item, canonical_number};

/// Key attributes of an item in one canonical byte string: equal keys give equal bytes, whatever
/// the order of the attributes or the spelling of a number.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ItemKey(Box<[u8]>);

impl ItemKey {
    /// The identity that the key attributes `keys` give.
    pub fn new(keys: &Item) -> Self {
        let mut names: Vec<_> = keys.keys().collect();
        names.sort_unstable();
        let mut bytes = Vec::with_capacity(32);
        for name in names {
            push(&mut bytes, b'k', name.as_bytes());
            match &keys[name] {
                AttributeValue::S(text) => push(&mut bytes, b's', text.as_bytes()),
                AttributeValue::N(number) => {
                    push(&mut bytes, b'n', canonical_number(number).as_bytes());
                }
                AttributeValue::B(blob) => push(&mut bytes, b'b', blob.as_ref()),
                // Keys have no other type; kept apart from the three all the same.
                other => push(&mut bytes, b'?', format!("{other:?}").as_bytes()),
            }
        }
        Self(bytes.into_boxed_slice())
    }

    /// The canonical bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// An identity for tests and models.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        Self(bytes.into())
    }
}

/// Length-prefixed, so that no two keys run into each other.
fn push(bytes: &mut Vec<u8>, kind: u8, part: &[u8]) {
    bytes.push(kind);
    bytes.extend_from_slice(&(part.len() as u64).to_be_bytes());
    bytes.extend_from_slice(part);
}

impl fmt::Debug for ItemKey {
    /// Never the key itself: debug output ends up in logs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ItemKey(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(pairs: &[(&str, AttributeValue)]) -> Item {
        pairs
            .iter()
            .map(|(name, value)| (name.to_string(), value.clone()))
            .collect()
    }

    #[test]
    fn keys_are_equal_when_dynamodb_says_so() {
        let n = |text: &str| AttributeValue::N(text.to_owned());
        let s = |text: &str| AttributeValue::S(text.to_owned());
        assert_eq!(
            ItemKey::new(&keys(&[("a", n("1.0")), ("b", s("x"))])),
            ItemKey::new(&keys(&[("b", s("x")), ("a", n("1"))]))
        );
        assert_ne!(
            ItemKey::new(&keys(&[("a", s("1"))])),
            ItemKey::new(&keys(&[("a", n("1"))]))
        );
        assert_ne!(
            ItemKey::new(&keys(&[("a", s("xb")), ("b", s("y"))])),
            ItemKey::new(&keys(&[("a", s("x")), ("b", s("by"))]))
        );
    }
}
