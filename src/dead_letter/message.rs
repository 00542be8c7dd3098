//! The dead letter: versioned JSON with everything needed to look at a record and bring it home.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Version of the message's form.
pub const VERSION: u32 = 1;
/// SQS takes at most 1 MiB a message, attributes included; a little is kept for those.
pub const MESSAGE_BYTES_MAX: usize = 1_048_576 - 4_096;

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

impl DeadLetter {
    /// The message as one line of JSON of at most `bytes_max` bytes. Images that do not fit are
    /// left out, the old one first, and named in `omitted`.
    ///
    /// # Errors
    /// A message that is too long even without images.
    pub fn to_line(&self, bytes_max: usize) -> Result<String, String> {
        let whole = self.to_json()?;
        if whole.len() <= bytes_max {
            return Ok(whole);
        }
        let mut smaller = self.clone();
        if smaller.old_image.take().is_some() {
            smaller.omitted.push("oldImage".to_owned());
        }
        let without_old = smaller.to_json()?;
        if without_old.len() <= bytes_max {
            return Ok(without_old);
        }
        if smaller.new_image.take().is_some() {
            smaller.omitted.push("newImage".to_owned());
        }
        let without_images = smaller.to_json()?;
        if without_images.len() <= bytes_max {
            return Ok(without_images);
        }
        Err(format!(
            "the letter holds {} bytes even without its images",
            without_images.len()
        ))
    }

    fn to_json(&self) -> Result<String, String> {
        serde_json::to_string(self)
            .map(|text| xml_safe(&text))
            .map_err(|error| error.to_string())
    }
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
pub(super) mod tests {
    use super::*;
    use serde_json::json;

    pub(in crate::dead_letter) fn letter(text: &str) -> DeadLetter {
        DeadLetter {
            version: VERSION,
            group: "g".into(),
            epoch: 1,
            table: "t".into(),
            source: Place {
                region: "a".into(),
                table: "t".into(),
            },
            target: Place {
                region: "b".into(),
                table: "t".into(),
            },
            stream_arn: "arn".into(),
            shard_id: "s".into(),
            sequence_number: Some("1".into()),
            event: Some("INSERT".into()),
            keys: Some(json!({"id": {"S": "k"}})),
            new_image: Some(json!({"id": {"S": "k"}, "v": {"S": text}})),
            old_image: Some(json!({"id": {"S": "k"}, "v": {"S": text}})),
            omitted: vec![],
            error: Reason {
                class: "validation".into(),
                code: "ValidationException".into(),
                message: "m".into(),
            },
            attempts: 3,
            created_at: "2026-01-01T00:00:00Z".into(),
            failed_at: "2026-01-01T00:00:01Z".into(),
        }
    }

    #[test]
    fn images_that_do_not_fit_are_left_out_and_named() {
        let large = letter(&"x".repeat(1_000));
        let back = |line: &str| serde_json::from_str::<DeadLetter>(line).unwrap();
        assert_eq!(back(&large.to_line(10_000).unwrap()), large);
        let without_old = back(&large.to_line(2_000).unwrap());
        assert_eq!(without_old.omitted, ["oldImage"]);
        assert!(without_old.new_image.is_some());
        let without = back(&large.to_line(900).unwrap());
        assert_eq!(without.omitted, ["oldImage", "newImage"]);
        assert!(without.keys.is_some());
        assert!(large.to_line(10).is_err());
    }

    #[test]
    fn forbidden_characters_are_encoded_and_come_back() {
        let odd = letter("a\u{ffff}b\u{fffe}\u{0}\u{1f}\u{7f}ä\n");
        let line = odd.to_line(10_000).unwrap();
        assert!(
            line.chars()
                .all(|c| c >= ' ' && c != '\u{ffff}' && c != '\u{fffe}')
        );
        assert_eq!(serde_json::from_str::<DeadLetter>(&line).unwrap(), odd);
    }
}
