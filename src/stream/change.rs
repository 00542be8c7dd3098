//! A stream record as a change of one item.

use std::collections::HashMap;

use aws_sdk_dynamodbstreams::types::{AttributeValue as StreamValue, OperationType, Record};

use super::sequence::SequenceNumber;
use crate::dynamo::item::ItemKey;
use crate::dynamo::value::{Item, item_bytes, item_from_stream};

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

/// One change of one item, in the types that are written.
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
    pub new_image: Option<Item>,
    /// The item before the change, as the stream gave it: only a dead letter needs it.
    pub old_image: Option<HashMap<String, StreamValue>>,
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

impl Change {
    /// A change that brings the item under `keys` to `item`, or deletes it. It comes from no stream.
    pub fn of_item(keys: &Item, item: Option<&Item>, now_ms: i64) -> Self {
        let bytes = item.map_or(0, item_bytes);
        Self {
            sequence: SequenceNumber::default(),
            event: match item {
                Some(_) => Event::Modify,
                None => Event::Remove,
            },
            key: ItemKey::new(keys),
            keys: keys.clone(),
            new_image: item.cloned(),
            old_image: None,
            created_ms: now_ms,
            bytes: 256 + item_bytes(keys) + bytes,
            units: write_units(bytes),
            ttl_delete: false,
        }
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

/// Turns a record into a change, moving its images.
///
/// # Errors
/// [`Undecodable`] where it lacks what every record has, or holds a type this version does not
/// know.
pub fn decode(record: Record) -> Result<Change, Box<Undecodable>> {
    let Some(data) = record.dynamodb else {
        return Err(undecodable(None, 0, None, "it has no body"));
    };
    let created_ms = data
        .approximate_creation_date_time
        .and_then(|time| time.to_millis().ok())
        .unwrap_or(0);
    let sequence = data
        .sequence_number
        .as_deref()
        .and_then(SequenceNumber::parse);
    let Some(sequence) = sequence else {
        return Err(undecodable(
            None,
            created_ms,
            None,
            "it has no sequence number",
        ));
    };
    let keys = data.keys.and_then(|keys| item_from_stream(keys).ok());
    let refuse = |why: &str| undecodable(Some(sequence.clone()), created_ms, keys.clone(), why);
    let event = match record.event_name {
        Some(OperationType::Insert) => Event::Insert,
        Some(OperationType::Modify) => Event::Modify,
        Some(OperationType::Remove) => Event::Remove,
        _ => return Err(refuse("its event is none of INSERT, MODIFY and REMOVE")),
    };
    let unknown = |_| refuse("it holds an attribute of a type this version does not know");
    let old_bytes = data.old_image.as_ref().map_or(0, stream_item_bytes);
    let new_image = match (event, data.new_image) {
        (Event::Remove, _) => None,
        (_, Some(image)) => Some(item_from_stream(image).map_err(unknown)?),
        (_, None) => return Err(refuse("it has no new image, so the view type is wrong")),
    };
    let new_bytes = new_image.as_ref().map_or(0, item_bytes);
    let keys = match keys {
        Some(keys) if !keys.is_empty() => keys,
        _ => {
            let why = "it has no key that can be read";
            return Err(undecodable(Some(sequence), created_ms, None, why));
        }
    };
    let ttl_delete = event == Event::Remove
        && record.user_identity.is_some_and(|identity| {
            identity.r#type.as_deref() == Some("Service")
                && identity.principal_id.as_deref() == Some("dynamodb.amazonaws.com")
        });
    Ok(Change {
        key: ItemKey::new(&keys),
        bytes: 256 + item_bytes(&keys) + new_bytes + old_bytes,
        units: write_units(new_bytes.max(old_bytes)),
        sequence,
        event,
        keys,
        new_image,
        old_image: data.old_image,
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

/// Size of an image that stays in the stream's types. An estimate: nested structure is counted
/// without its overhead.
fn stream_item_bytes(item: &HashMap<String, StreamValue>) -> usize {
    fn bytes(value: &StreamValue) -> usize {
        match value {
            StreamValue::S(text) => text.len(),
            StreamValue::N(number) => number.len() / 2 + 2,
            StreamValue::B(blob) => blob.as_ref().len(),
            StreamValue::Ss(set) => set.iter().map(String::len).sum(),
            StreamValue::Ns(set) => set.iter().map(|n| n.len() / 2 + 2).sum(),
            StreamValue::Bs(set) => set.iter().map(|blob| blob.as_ref().len()).sum(),
            StreamValue::L(list) => 3 + list.iter().map(|value| 1 + bytes(value)).sum::<usize>(),
            StreamValue::M(map) => 3 + map.len() + stream_item_bytes(map),
            _ => 1,
        }
    }
    item.iter()
        .map(|(name, value)| name.len() + bytes(value))
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use aws_sdk_dynamodbstreams::types::{Identity, StreamRecord};

    fn record(event: OperationType, new: Option<&str>) -> Record {
        let mut data = StreamRecord::builder()
            .sequence_number("000000000000000000042")
            .keys("id", StreamValue::S("a".into()));
        if let Some(text) = new {
            data = data
                .new_image("id", StreamValue::S("a".into()))
                .new_image("v", StreamValue::S(text.into()));
        }
        Record::builder()
            .event_name(event)
            .dynamodb(data.build())
            .build()
    }

    #[test]
    fn a_record_becomes_a_change() {
        let change = decode(record(OperationType::Insert, Some(&"x".repeat(2000)))).unwrap();
        assert_eq!(change.event, Event::Insert);
        assert_eq!(change.units, 2);
        assert!(!change.ttl_delete);
        let mut removed = record(OperationType::Remove, None);
        removed.user_identity = Some(
            Identity::builder()
                .r#type("Service")
                .principal_id("dynamodb.amazonaws.com")
                .build(),
        );
        let change = decode(removed).unwrap();
        assert!(change.ttl_delete && change.new_image.is_none());
        assert_eq!(change.units, 1);
    }

    #[test]
    fn a_record_without_what_it_needs_is_undecodable_and_keeps_its_position() {
        let bad = decode(record(OperationType::Modify, None)).unwrap_err();
        assert_eq!(bad.sequence, SequenceNumber::parse("42"));
        assert!(bad.keys.is_some_and(|keys| keys.contains_key("id")));
        assert!(
            decode(Record::builder().build())
                .unwrap_err()
                .sequence
                .is_none()
        );
        assert!(decode(record(OperationType::from("RENAME"), Some("x"))).is_err());
    }
}
