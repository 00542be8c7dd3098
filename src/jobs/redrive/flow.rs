//! Which letters a redrive may bring home. Pure.

use std::collections::BTreeMap;

use aws_sdk_dynamodb::types::AttributeValue;

use crate::dead_letter::message::DeadLetter;
use crate::dynamo::table::KeyPart;
use crate::dynamo::value::Item;

/// The tables that are followed, by their names in the configuration, with their keys.
pub type Followed = BTreeMap<String, Vec<KeyPart>>;

/// What becomes of a letter.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is brought home: its key is repaired.
    Bring,
    /// It was not asked for.
    Other,
    /// It stays, for this reason.
    Stays(String),
}

/// The flow that a redrive repairs, and what it was asked for.
pub struct Flow<'a> {
    /// The group.
    pub group: &'a str,
    /// The epoch.
    pub epoch: u64,
    /// Label of the active region.
    pub source: &'a str,
    /// Label of the region fed.
    pub target: &'a str,
    /// The tables that are followed, by their names in the configuration.
    pub tables: &'a Followed,
    /// The only table asked for.
    pub wanted: Option<&'a str>,
}

impl Flow<'_> {
    /// Judges a letter. Repair by key is right in the flow's own direction and epoch only, and while
    /// later records of its table will still be applied.
    pub fn judge(&self, letter: &DeadLetter) -> Verdict {
        let stays = |why: String| Verdict::Stays(why);
        if self.wanted.is_some_and(|table| table != letter.table) {
            return Verdict::Other;
        }
        if letter.group != self.group {
            return stays(format!("it belongs to the group {}", letter.group));
        }
        if letter.epoch != self.epoch {
            return stays(format!(
                "it is of epoch {}, and this is epoch {}: its flow is over, and the item is not repaired from another one: see docs/DEAD_LETTERS.md",
                letter.epoch, self.epoch
            ));
        }
        if (letter.source.region.as_str(), letter.target.region.as_str())
            != (self.source, self.target)
        {
            return stays(format!(
                "it goes from {} to {}, and data flows from {} to {} now",
                letter.source.region, letter.target.region, self.source, self.target
            ));
        }
        let Some(parts) = self.tables.get(&letter.table) else {
            return stays(
                "its table is not followed: no worker of this epoch has begun with it, or it was made anew"
                    .to_owned(),
            );
        };
        match letter.item_key() {
            None => {
                stays("it has no key that can be read: compare the whole table instead".to_owned())
            }
            Some(key) if !fits(&key, parts) => {
                stays("its key is not of the form that the table has now".to_owned())
            }
            Some(_) => Verdict::Bring,
        }
    }
}

/// Whether a key has the attributes and types of a table's.
fn fits(key: &Item, parts: &[KeyPart]) -> bool {
    let is = |part: &KeyPart| match key.get(&part.name) {
        Some(AttributeValue::S(_)) => part.kind == "S",
        Some(AttributeValue::N(_)) => part.kind == "N",
        Some(AttributeValue::B(_)) => part.kind == "B",
        _ => false,
    };
    key.len() == parts.len() && parts.iter().all(is)
}
