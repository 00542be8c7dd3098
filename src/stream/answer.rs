//! What `GetRecords` answers, read straight into changes.
//!
//! The SDK would make a value of its own of each attribute, which is most of what reading a record costs, and
//! only to spell them again for the replica. Here the images stay text ([`Image`]), and of the rest nothing is
//! made that a change does not hold.

use std::fmt;

use serde::de::{Error, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

use super::change::{Change, Event, Undecodable, decode};
use super::sequence::SequenceNumber;
use crate::dynamo::value::Item;
use aws_sdk_dynamodb::types::AttributeValue;
use aws_smithy_types::Blob;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;

/// A record, as a change or as what could be told of it.
pub type Decoded = Result<Change, Box<Undecodable>>;

/// An answer.
#[derive(Debug)]
pub struct Answer {
    /// Its records, oldest first; `None` where it has no list of them.
    pub records: Option<Vec<Decoded>>,
    /// Where to read on; `None` at the end of the shard.
    pub next_iterator: Option<String>,
}

/// An answer that is not of the form that the service's have.
#[derive(Debug, thiserror::Error)]
#[error("the answer to GetRecords is not of its form")]
pub struct Malformed;

/// Reads the body of an answer.
///
/// # Errors
/// [`Malformed`] where it is not of the form that every answer has. A record that no change can be made of
/// is an element of the answer, and no error.
pub fn read(body: &[u8]) -> Result<Answer, Malformed> {
    // Once for all of it, and not for each text in it.
    let text = std::str::from_utf8(body).map_err(|_| Malformed)?;
    let wire: Wire<'_> = serde_json::from_str(text).map_err(|_| Malformed)?;
    Ok(Answer {
        records: wire
            .records
            .map(|records| records.into_iter().map(decode).collect()),
        next_iterator: wire.next_shard_iterator,
    })
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Wire<'a> {
    #[serde(borrow)]
    records: Option<Vec<Record<'a>>>,
    next_shard_iterator: Option<String>,
}

/// A record as the service spells it.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record<'a> {
    /// What happened; `None` where it is none of the known events.
    #[serde(default, deserialize_with = "event")]
    pub event_name: Option<Event>,
    /// The change itself.
    #[serde(borrow, default)]
    pub dynamodb: Option<Body<'a>>,
    /// Who made it, where the service did.
    pub user_identity: Option<Identity>,
}

/// The change that a record tells of.
#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Body<'a> {
    /// Seconds since the epoch.
    pub approximate_creation_date_time: Option<f64>,
    /// The key attributes.
    #[serde(borrow, default)]
    pub keys: Option<&'a RawValue>,
    /// The item after the change.
    #[serde(borrow, default)]
    pub new_image: Option<&'a RawValue>,
    /// The item before it.
    #[serde(borrow, default)]
    pub old_image: Option<&'a RawValue>,
    /// Its position.
    #[serde(default, deserialize_with = "sequence")]
    pub sequence_number: Option<SequenceNumber>,
}

/// Who made a change that no application made.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Identity {
    /// `Service`, where the service itself did.
    pub r#type: Option<String>,
    /// Which service.
    pub principal_id: Option<String>,
}

/// Reads a text by `told`, without a copy of it; what is `null` is nothing.
fn text<'de, D: Deserializer<'de>, T>(
    from: D,
    told: fn(&str) -> Option<T>,
) -> Result<Option<T>, D::Error> {
    struct Text<T>(fn(&str) -> Option<T>);

    impl<'de, T> Visitor<'de> for Text<T> {
        type Value = Option<T>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a text")
        }

        fn visit_none<E>(self) -> Result<Option<T>, E> {
            Ok(None)
        }

        fn visit_unit<E>(self) -> Result<Option<T>, E> {
            Ok(None)
        }

        fn visit_some<D: Deserializer<'de>>(self, from: D) -> Result<Option<T>, D::Error> {
            from.deserialize_str(self)
        }

        fn visit_str<E>(self, text: &str) -> Result<Option<T>, E> {
            Ok((self.0)(text))
        }
    }

    from.deserialize_option(Text(told))
}

fn event<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Event>, D::Error> {
    text(from, |name| {
        Event::ALL.into_iter().find(|event| event.name() == name)
    })
}

fn sequence<'de, D: Deserializer<'de>>(from: D) -> Result<Option<SequenceNumber>, D::Error> {
    text(from, SequenceNumber::parse)
}

/// Reads key attributes. `None` where there are none, or one is no text, number or binary.
pub fn read_keys(text: &RawValue) -> Option<Item> {
    let Keys(keys) = serde_json::from_str(text.get()).ok()?;
    (!keys.is_empty()).then_some(keys)
}

struct Keys(Item);

impl<'de> Deserialize<'de> for Keys {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Attributes;

        impl<'de> Visitor<'de> for Attributes {
            type Value = Keys;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("key attributes")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Keys, A::Error> {
                let mut keys = Item::with_capacity(2);
                while let Some((name, KeyValue(value))) = map.next_entry()? {
                    keys.insert(name, value);
                }
                Ok(Keys(keys))
            }
        }

        from.deserialize_map(Attributes)
    }
}

struct KeyValue(AttributeValue);

impl<'de> Deserialize<'de> for KeyValue {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        /// Exactly one of the types that a key may have.
        #[derive(Deserialize)]
        enum Typed {
            S(String),
            N(String),
            B(String),
        }

        Ok(Self(match Typed::deserialize(from)? {
            Typed::S(text) => AttributeValue::S(text),
            Typed::N(number) => AttributeValue::N(number),
            Typed::B(text) => {
                let bytes = STANDARD.decode(text);
                AttributeValue::B(Blob::new(bytes.map_err(D::Error::custom)?))
            }
        }))
    }
}

#[cfg(test)]
#[path = "answer_tests.rs"]
mod tests;
