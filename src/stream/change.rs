//! A stream record as a change of one item.

use super::answer::{Record, read_keys};
use super::sequence::SequenceNumber;
use crate::dynamo::image::Image;
use crate::dynamo::item::ItemKey;
use crate::dynamo::value::{Item, UnknownType, item_bytes};

/// What a change takes in memory besides its key and its images, about.
const CHANGE_BYTES: usize = 256;

/// What a record says happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Event {
    /// The item is new.
    Insert,
    /// The item was there before.
    Modify,
    /// The item is gone.
    Remove,
}

impl Event {
    /// All of them, in the order of their declaration.
    pub const ALL: [Event; 3] = [Event::Insert, Event::Modify, Event::Remove];

    /// The name the service uses.
    pub const fn name(self) -> &'static str {
        match self {
            Event::Insert => "INSERT",
            Event::Modify => "MODIFY",
            Event::Remove => "REMOVE",
        }
    }
}

/// One change of one item.
#[derive(Clone)]
pub struct Change {
    /// Its position in the shard.
    pub sequence: SequenceNumber,
    /// What happened.
    pub event: Event,
    /// Which item.
    pub key: ItemKey,
    /// The key attributes.
    pub keys: Item,
    /// The item after the change; `None` for a delete.
    pub new_image: Option<Image>,
    /// The item before the change: only a dead letter needs it.
    pub old_image: Option<OldImage>,
    /// When the source made the change, in milliseconds since the epoch; whole seconds, rounded
    /// down by the service.
    pub created_ms: i64,
    /// Bytes it holds in memory, about.
    pub bytes: usize,
    /// Write units that applying it costs: the larger of old and new item, in KB, rounded up.
    pub units: u32,
    /// Whether TTL made this delete.
    pub ttl_delete: bool,
}

/// The item before a change.
#[derive(Debug, Clone)]
pub enum OldImage {
    /// As the stream gave it.
    Known(Image),
    /// It holds a value of a type that this version does not know. That is no reason not to write the new one.
    Unknown,
}

impl Change {
    /// A change that brings the item under `keys` to `item`, or deletes it. It comes from no stream.
    ///
    /// # Errors
    /// [`UnknownType`] where the item holds a value of a type that this version does not know.
    pub fn of_item(keys: &Item, item: Option<&Item>, now_ms: i64) -> Result<Self, UnknownType> {
        let new_image = item.map(Image::of).transpose()?;
        Ok(Self {
            sequence: SequenceNumber::default(),
            event: match item {
                Some(_) => Event::Modify,
                None => Event::Remove,
            },
            key: ItemKey::new(keys),
            keys: keys.clone(),
            bytes: CHANGE_BYTES
                + item_bytes(keys)
                + new_image.as_ref().map_or(0, Image::text_bytes),
            units: write_units(new_image.as_ref().map_or(0, Image::item_bytes)),
            new_image,
            old_image: None,
            created_ms: now_ms,
            ttl_delete: false,
        })
    }
}

impl std::fmt::Debug for Change {
    /// Without keys and images: debug output ends up in logs.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} at {}", self.event.name(), self.sequence)
    }
}

/// A record that cannot be turned into a change.
#[derive(Debug)]
pub struct Undecodable {
    /// Its position, where it has one.
    pub sequence: Option<SequenceNumber>,
    /// When the source made it, in milliseconds; 0 where unknown.
    pub created_ms: i64,
    /// The key attributes, where those could be read: enough to bring the item home.
    pub keys: Option<Item>,
    /// Why, without anything of the item.
    pub why: String,
}

/// Turns a record into a change.
///
/// # Errors
/// [`Undecodable`] where it lacks what every record has, or holds a type this version does not
/// know.
pub fn decode(record: Record<'_>) -> Result<Change, Box<Undecodable>> {
    let Some(data) = record.dynamodb else {
        return Err(undecodable(None, 0, None, "it has no body"));
    };
    // Whole seconds, as the service sends them, survive this.
    let created_ms = (data.approximate_creation_date_time).map_or(0, |s| (s * 1_000.0) as i64);
    let keys = data.keys.and_then(read_keys);
    let Some(sequence) = data.sequence_number else {
        let why = "it has no sequence number";
        return Err(undecodable(None, created_ms, keys, why));
    };
    let Some(event) = record.event_name else {
        let why = "its event is none of INSERT, MODIFY and REMOVE";
        return Err(undecodable(Some(sequence), created_ms, keys, why));
    };
    let new_image = match (event, data.new_image) {
        (Event::Remove, _) => None,
        (_, Some(image)) => match Image::parse(image) {
            Ok(image) => Some(image),
            Err(UnknownType) => {
                let why = "it holds an attribute of a type this version does not know";
                return Err(undecodable(Some(sequence), created_ms, keys, why));
            }
        },
        (_, None) => {
            let why = "it has no new image, so the view type is wrong";
            return Err(undecodable(Some(sequence), created_ms, keys, why));
        }
    };
    let Some(keys) = keys else {
        let why = "it has no key that can be read";
        return Err(undecodable(Some(sequence), created_ms, None, why));
    };
    let old_image = data.old_image.map(|image| match Image::parse(image) {
        Ok(image) => OldImage::Known(image),
        Err(UnknownType) => OldImage::Unknown,
    });
    let old = match &old_image {
        Some(OldImage::Known(image)) => Some(image),
        Some(OldImage::Unknown) | None => None,
    };
    let images = || new_image.iter().chain(old);
    let ttl_delete = event == Event::Remove
        && record.user_identity.is_some_and(|identity| {
            identity.r#type.as_deref() == Some("Service")
                && identity.principal_id.as_deref() == Some("dynamodb.amazonaws.com")
        });
    Ok(Change {
        key: ItemKey::new(&keys),
        bytes: CHANGE_BYTES + item_bytes(&keys) + images().map(Image::text_bytes).sum::<usize>(),
        units: write_units(images().map(Image::item_bytes).max().unwrap_or(0)),
        sequence,
        event,
        keys,
        new_image,
        old_image,
        created_ms,
        ttl_delete,
    })
}

fn undecodable(
    sequence: Option<SequenceNumber>,
    created_ms: i64,
    keys: Option<Item>,
    why: &str,
) -> Box<Undecodable> {
    Box::new(Undecodable {
        sequence,
        created_ms,
        keys,
        why: why.to_owned(),
    })
}

/// Write units of an item of `bytes`: a KB each, at least one (deleting what is not there costs
/// one, too).
pub fn write_units(bytes: usize) -> u32 {
    u32::try_from(bytes.div_ceil(1024))
        .unwrap_or(u32::MAX)
        .max(1)
}

#[cfg(test)]
mod tests {
    use super::super::answer::read;
    use super::*;
    use serde_json::{Value, json};

    fn decoded(record: Value) -> Result<Change, Box<Undecodable>> {
        let answer = json!({"Records": [record], "NextShardIterator": "i"}).to_string();
        let mut records = read(answer.as_bytes()).unwrap().records.unwrap();
        records.pop().unwrap()
    }

    fn record(event: &str, new: Option<&str>) -> Value {
        let mut record = json!({
            "eventName": event,
            "dynamodb": {
                "SequenceNumber": "000000000000000000042",
                "Keys": {"id": {"S": "a"}},
            },
        });
        if let Some(text) = new {
            record["dynamodb"]["NewImage"] = json!({"id": {"S": "a"}, "v": {"S": text}});
        }
        record
    }

    #[test]
    fn a_record_becomes_a_change() {
        let change = decoded(record("INSERT", Some(&"x".repeat(2000)))).unwrap();
        assert_eq!(change.event, Event::Insert);
        assert_eq!(change.units, 2);
        assert!(!change.ttl_delete);
        let mut removed = record("REMOVE", None);
        removed["userIdentity"] =
            json!({"Type": "Service", "PrincipalId": "dynamodb.amazonaws.com"});
        let change = decoded(removed).unwrap();
        assert!(change.ttl_delete && change.new_image.is_none());
        assert_eq!(change.units, 1);
    }

    #[test]
    fn a_record_without_what_it_needs_is_undecodable_and_keeps_its_position() {
        let bad = decoded(record("MODIFY", None)).unwrap_err();
        assert_eq!(bad.sequence, SequenceNumber::parse("42"));
        assert!(bad.keys.is_some_and(|keys| keys.contains_key("id")));
        assert!(decoded(json!({})).unwrap_err().sequence.is_none());
        assert!(decoded(record("RENAME", Some("x"))).is_err());
    }

    #[test]
    fn a_type_that_is_not_known_is_poison_in_a_new_image_and_no_reason_in_an_old_one() {
        let mut new = record("MODIFY", Some("x"));
        new["dynamodb"]["NewImage"]["v"] = json!({"L": [{"S": "a"}, {"VECTOR": "b"}]});
        let bad = decoded(new).unwrap_err();
        assert_eq!(bad.sequence, SequenceNumber::parse("42"));
        assert!(bad.keys.is_some() && !bad.why.contains("VECTOR"));
        let mut old = record("MODIFY", Some("x"));
        old["dynamodb"]["OldImage"] = json!({"v": {"VECTOR": "b"}});
        let change = decoded(old).unwrap();
        assert!(matches!(change.old_image, Some(OldImage::Unknown)));
        let mut key = record("MODIFY", Some("x"));
        key["dynamodb"]["Keys"] = json!({"id": {"BOOL": true}});
        assert!(decoded(key).unwrap_err().keys.is_none());
    }
}
