//! The dead letter: versioned JSON with everything needed to look at a record and bring it home.
//! `docs/DEAD_LETTER.schema.json` describes it.

use std::collections::BTreeMap;
use std::io::{Read, Write};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::dynamo::json::item_from_json;
use crate::dynamo::value::Item;

/// Version of the message's form.
pub const VERSION: u32 = 1;
/// SQS takes at most 1 MiB a message, and a whole batch, attributes included.
pub const MESSAGE_BYTES_MAX: usize = 1_048_576;
/// What a letter may need without its images: a key of 3 KB, each byte of it six in JSON, and the
/// names around it.
pub const LETTER_BYTES_MIN: usize = 28_672;
/// A queue's letter longer than this has its images compressed. SQS bills every 64 KiB as a request.
const PLAIN_BYTES_MAX: usize = 65_536;
/// No image of an item is longer: 400 KB, each byte six in JSON.
const IMAGE_BYTES_MAX: u64 = 4 << 20;

/// One record that its replica can never take.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DeadLetter {
    /// Version of this form.
    pub version: u32,
    /// The group.
    pub group: String,
    /// Epoch in which it failed.
    pub epoch: u64,
    /// The table, by its name in the configuration.
    pub table: String,
    /// Where it came from.
    pub source: Place,
    /// Where it could not go.
    pub target: Place,
    /// The stream.
    pub stream_arn: String,
    /// The shard.
    pub shard_id: String,
    /// What refused it found it for, where that is no record of the stream: `doubt`, `bootstrap` or
    /// `gap-repair`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<String>,
    /// Position in the shard; absent where the record had none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sequence_number: Option<String>,
    /// INSERT, MODIFY or REMOVE; absent where the record could not be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub event: Option<String>,
    /// The key, as DynamoDB JSON.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keys: Option<Value>,
    /// The item after the change, as DynamoDB JSON.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub new_image: Option<Value>,
    /// The item before the change, as DynamoDB JSON.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub old_image: Option<Value>,
    /// Large images, by name: the DynamoDB JSON of each, compressed by gzip, in Base64. Only on its
    /// way: a letter that was [read](Self::read) has them in their places.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub compressed: BTreeMap<String, String>,
    /// Images left out because the message would have been too large.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub omitted: Vec<String>,
    /// Why the replica refused it.
    pub error: Reason,
    /// How often it was tried alone.
    pub attempts: u32,
    /// When the source made the change, RFC 3339.
    pub created_at: String,
    /// When it was given up, RFC 3339.
    pub failed_at: String,
    /// How often a redrive could not bring it home.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub redriven: u32,
}

#[allow(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde hands out references"
)]
fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// A table in a region.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// The region's label.
    pub region: String,
    /// The table's name there.
    pub table: String,
}

/// Why a record was refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reason {
    /// The class in the policy table.
    pub class: String,
    /// The service's code.
    pub code: String,
    /// The service's message.
    pub message: String,
}

/// A message that is no letter this version can read. It stays where it is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unreadable {
    /// A newer Farshore wrote it.
    #[error(
        "it has version {0}, and this Farshore reads up to {VERSION}: upgrade and redrive again"
    )]
    Newer(u64),
    /// It is no dead letter at all, or a broken one.
    #[error("it is no dead letter: {0}")]
    Malformed(String),
}

const NEW_IMAGE: &str = "newImage";
const OLD_IMAGE: &str = "oldImage";

impl DeadLetter {
    /// The message as one line of JSON for people and programs alike, whatever its length.
    ///
    /// # Errors
    /// What the serializer said; it has no reason to.
    pub fn to_plain(&self) -> Result<String, String> {
        serde_json::to_string(self)
            .map(|text| xml_safe(&text))
            .map_err(|error| error.to_string())
    }

    /// The message as one line of JSON of at most `bytes_max` bytes. Images of a large one are
    /// compressed; those that still do not fit are left out, the old one first, and named in
    /// `omitted`.
    ///
    /// # Errors
    /// A message that is too long even without images.
    pub fn to_line(&self, bytes_max: usize) -> Result<String, String> {
        let whole = self.to_plain()?;
        if whole.len() <= bytes_max.min(PLAIN_BYTES_MAX) {
            return Ok(whole);
        }
        let mut smaller = self.clone();
        for (name, image) in [
            (NEW_IMAGE, smaller.new_image.take()),
            (OLD_IMAGE, smaller.old_image.take()),
        ] {
            if let Some(image) = image {
                smaller.compressed.insert(name.to_owned(), pack(&image)?);
            }
        }
        let mut line = smaller.to_plain()?;
        if whole.len() <= line.len().min(bytes_max) {
            return Ok(whole);
        }
        for name in [OLD_IMAGE, NEW_IMAGE] {
            if line.len() > bytes_max && smaller.compressed.remove(name).is_some() {
                smaller.omitted.push(name.to_owned());
                line = smaller.to_plain()?;
            }
        }
        match line.len() <= bytes_max {
            true => Ok(line),
            false => Err(format!(
                "the letter holds {} bytes even without its images",
                line.len()
            )),
        }
    }

    /// Reads a message.
    ///
    /// # Errors
    /// [`Unreadable`], and the message is then to stay where it is.
    pub fn read(text: &str) -> Result<Self, Unreadable> {
        let malformed = |error: String| Unreadable::Malformed(error);
        // The version first: a newer form may differ in everything else.
        let value: Value = serde_json::from_str(text).map_err(|e| malformed(e.to_string()))?;
        match value.get("version").and_then(Value::as_u64) {
            None => return Err(malformed("it has no version".to_owned())),
            Some(version) if version > u64::from(VERSION) => {
                return Err(Unreadable::Newer(version));
            }
            Some(_) => {}
        }
        let mut letter: Self =
            serde_json::from_value(value).map_err(|e| malformed(e.to_string()))?;
        for (name, packed) in std::mem::take(&mut letter.compressed) {
            let place = match name.as_str() {
                NEW_IMAGE => &mut letter.new_image,
                OLD_IMAGE => &mut letter.old_image,
                _ => return Err(malformed(format!("`compressed` holds `{name}`"))),
            };
            if place.is_some() {
                return Err(malformed(format!("`{name}` stands in it twice")));
            }
            *place = Some(unpack(&packed).map_err(malformed)?);
        }
        Ok(letter)
    }

    /// The key of the item. `None` where the letter has none, or none that can be read.
    pub fn item_key(&self) -> Option<Item> {
        self.keys
            .as_ref()
            .and_then(item_from_json)
            .filter(|keys| !keys.is_empty())
    }
}

/// The JSON of an image, compressed, in Base64.
fn pack(image: &Value) -> Result<String, String> {
    let json = serde_json::to_vec(image).map_err(|error| error.to_string())?;
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder
        .write_all(&json)
        .and_then(|()| encoder.finish())
        .map(|bytes| STANDARD.encode(bytes))
        .map_err(|error| error.to_string())
}

/// What [`pack`] has packed; bounded, whatever it claims to hold.
fn unpack(packed: &str) -> Result<Value, String> {
    let bytes = STANDARD.decode(packed).map_err(|error| error.to_string())?;
    let mut json = Vec::new();
    GzDecoder::new(bytes.as_slice())
        .take(IMAGE_BYTES_MAX + 1)
        .read_to_end(&mut json)
        .map_err(|error| error.to_string())?;
    if json.len() as u64 > IMAGE_BYTES_MAX {
        return Err("a compressed image is larger than any item".to_owned());
    }
    serde_json::from_slice(&json).map_err(|error| error.to_string())
}

/// Replaces characters that SQS refuses (all that XML 1.0 does) by JSON escapes. In serialized
/// JSON they can stand only inside strings, where an escape means the same; control characters
/// below U+0020 are escaped already.
fn xml_safe(json: &str) -> String {
    if !json.contains(['\u{fffe}', '\u{ffff}']) {
        return json.to_owned();
    }
    json.replace('\u{fffe}', "\\ufffe")
        .replace('\u{ffff}', "\\uffff")
}

#[cfg(test)]
#[path = "message_tests.rs"]
pub(super) mod tests;
