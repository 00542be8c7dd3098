//! The identity of an item: its key attributes in one comparable form.

use std::fmt;
use std::sync::Arc;

use aws_sdk_dynamodb::types::AttributeValue;
use aws_smithy_types::Blob;

use super::value::{Item, canonical_number};

/// What a key attribute takes besides its name, at most times.
const KEY_BYTES: usize = 64;

/// Key attributes of an item in one canonical byte string: equal keys give equal bytes, whatever
/// the order of the attributes or the spelling of a number. Cheap to clone.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ItemKey(Arc<[u8]>);

impl ItemKey {
    /// The identity that the key attributes `keys` give.
    pub fn new(keys: &Item) -> Self {
        let mut names: Vec<_> = keys.keys().collect();
        names.sort_unstable();
        let about = names.iter().map(|name| KEY_BYTES + name.len()).sum();
        let mut bytes = Vec::with_capacity(about);
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
        Self(bytes.into())
    }

    /// The identity of a whole item, by the key attributes that `names` has.
    pub fn of(item: &Item, names: &Item) -> Self {
        let keys = item.iter().filter(|(name, _)| names.contains_key(*name));
        Self::new(&keys.map(|(n, v)| (n.clone(), v.clone())).collect())
    }

    /// The canonical bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The key attributes themselves; numbers may be spelled otherwise than they were.
    pub fn to_keys(&self) -> Item {
        let mut keys = Item::new();
        let mut rest: &[u8] = &self.0;
        while let Some((_, name)) = take(&mut rest)
            && let Some((kind, part)) = take(&mut rest)
        {
            let text = || String::from_utf8_lossy(part).into_owned();
            let value = match kind {
                b'n' => AttributeValue::N(text()),
                b'b' => AttributeValue::B(Blob::new(part)),
                _ => AttributeValue::S(text()),
            };
            keys.insert(String::from_utf8_lossy(name).into_owned(), value);
        }
        keys
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

/// What [`push`] put there: its kind and the part. `None` at the end.
fn take<'a>(bytes: &mut &'a [u8]) -> Option<(u8, &'a [u8])> {
    let (kind, rest) = bytes.split_first()?;
    let (length, rest) = rest.split_first_chunk::<8>()?;
    let (part, rest) = rest.split_at_checked(u64::from_be_bytes(*length) as usize)?;
    *bytes = rest;
    Some((*kind, part))
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
        let all = keys(&[("a", n("-12.50")), ("b", s("größe")), ("c", s(""))]);
        let blob = AttributeValue::B(Blob::new([0, 255]));
        for keys in [all, keys(&[("a", blob)]), keys(&[])] {
            assert_eq!(
                ItemKey::new(&ItemKey::new(&keys).to_keys()),
                ItemKey::new(&keys)
            );
        }
        assert_ne!(
            ItemKey::new(&keys(&[("a", s("xb")), ("b", s("y"))])),
            ItemKey::new(&keys(&[("a", s("x")), ("b", s("by"))]))
        );
    }
}
