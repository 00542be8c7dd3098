//! Tests of the message's form.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::json;

use super::*;

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
        origin: None,
        sequence_number: Some("1".into()),
        event: Some("INSERT".into()),
        keys: Some(json!({"id": {"S": "k"}})),
        new_image: Some(json!({"id": {"S": "k"}, "v": {"S": text}})),
        old_image: Some(json!({"id": {"S": "k"}, "v": {"S": text}})),
        compressed: BTreeMap::new(),
        omitted: vec![],
        error: Reason {
            class: "validation".into(),
            code: "ValidationException".into(),
            message: "m".into(),
        },
        attempts: 3,
        created_at: "2026-01-01T00:00:00Z".into(),
        failed_at: "2026-01-01T00:00:01Z".into(),
        redriven: 0,
    }
}

/// Text that no compression makes shorter than 6 bits a character.
fn noise(length: usize) -> String {
    const LETTERS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut random = StdRng::seed_from_u64(1);
    (0..length)
        .map(|_| char::from(LETTERS[random.random_range(0..LETTERS.len())]))
        .collect()
}

#[test]
fn small_images_are_plain_and_large_ones_compressed() {
    let small = letter(&"x".repeat(1_000));
    let line = small.to_line(MESSAGE_BYTES_MAX).unwrap();
    assert!(line.contains("newImage") && !line.contains("compressed"));
    let large = letter(&"x".repeat(300_000));
    let line = large.to_line(MESSAGE_BYTES_MAX).unwrap();
    assert!(line.len() < 5_000, "{} bytes", line.len());
    assert_eq!(DeadLetter::read(&line).unwrap(), large);
    assert!(large.to_plain().unwrap().len() > 600_000);
}

#[test]
fn images_that_do_not_fit_are_left_out_and_named() {
    let large = letter(&noise(10_000));
    let back = |bytes_max: usize| {
        let line = large.to_line(bytes_max).unwrap();
        assert!(line.len() <= bytes_max);
        DeadLetter::read(&line).unwrap()
    };
    assert_eq!(back(30_000), large);
    let without_old = back(12_000);
    assert_eq!(without_old.omitted, ["oldImage"]);
    assert_eq!(without_old.new_image, large.new_image);
    let without = back(900);
    assert_eq!(without.omitted, ["oldImage", "newImage"]);
    assert_eq!(without.item_key(), large.item_key());
    assert!(large.to_line(10).is_err());
}

#[test]
fn what_does_not_fit_plain_is_compressed() {
    let letter = letter(&"x".repeat(5_000));
    let line = letter.to_line(2_000).unwrap();
    assert!(line.len() <= 2_000);
    assert_eq!(DeadLetter::read(&line).unwrap(), letter);
}

#[test]
fn forbidden_characters_are_encoded_and_come_back() {
    let odd = letter("a\u{ffff}b\u{fffe}\u{0}\u{1f}\u{7f}ä\n");
    let line = odd.to_line(10_000).unwrap();
    let legal = |c: char| c >= ' ' && c != '\u{ffff}' && c != '\u{fffe}';
    assert!(line.chars().all(legal));
    assert_eq!(DeadLetter::read(&line).unwrap(), odd);
}

#[test]
fn what_is_no_letter_of_this_version_is_told_apart() {
    let mut value = serde_json::to_value(letter("x")).unwrap();
    value["version"] = json!(2);
    let newer = DeadLetter::read(&value.to_string()).unwrap_err();
    assert_eq!(newer, Unreadable::Newer(2));
    assert!(newer.to_string().contains("upgrade"), "{newer}");
    // Whatever else a newer version changes.
    let strange = DeadLetter::read(r#"{"version": 7, "table": 3}"#);
    assert_eq!(strange, Err(Unreadable::Newer(7)));
    for text in ["", "{", "[]", "3", "{\"version\":1}", "{\"table\":\"t\"}"] {
        let unreadable = DeadLetter::read(text);
        assert!(
            matches!(unreadable, Err(Unreadable::Malformed(_))),
            "{text}"
        );
    }
}

#[test]
fn compressed_images_are_checked() {
    let with = |name: &str, packed: String| {
        let mut broken = letter("x");
        broken.new_image = None;
        broken.compressed.insert(name.to_owned(), packed);
        DeadLetter::read(&broken.to_plain().unwrap())
    };
    assert!(with("newImage", pack(&json!({})).unwrap()).is_ok());
    let twice = with("oldImage", pack(&json!({})).unwrap());
    for broken in [
        twice,
        with("other", pack(&json!({})).unwrap()),
        with("newImage", "?".to_owned()),
        with("newImage", STANDARD.encode(b"no gzip")),
        // A few KB that would unpack to 64 MB.
        with("newImage", pack(&json!("x".repeat(64 << 20))).unwrap()),
    ] {
        assert!(matches!(broken, Err(Unreadable::Malformed(_))));
    }
}

/// `docs/DEAD_LETTER.schema.json` names what a letter holds, no more and no less; the lane of real
/// peers checks letters against it.
#[test]
fn the_schema_names_every_field() {
    let schema = include_str!("../../docs/DEAD_LETTER.schema.json");
    let schema: Value = serde_json::from_str(schema).unwrap();
    let mut full = letter("x");
    full.redriven = 1;
    full.origin = Some("doubt".to_owned());
    full.omitted = vec!["oldImage".to_owned()];
    full.compressed.insert("newImage".to_owned(), String::new());
    let full = serde_json::to_value(&full).unwrap();
    let names = |value: &Value| -> Vec<String> {
        let mut names: Vec<_> = value.as_object().unwrap().keys().cloned().collect();
        names.sort();
        names
    };
    assert_eq!(names(&full), names(&schema["properties"]));
    assert_eq!(
        names(&full["error"]),
        names(&schema["properties"]["error"]["properties"])
    );
    assert_eq!(
        names(&full["source"]),
        names(&schema["definitions"]["place"]["properties"])
    );
    // What is always there is required, and nothing else is.
    let bare = DeadLetter {
        sequence_number: None,
        event: None,
        keys: None,
        new_image: None,
        old_image: None,
        ..letter("x")
    };
    let required: Vec<&str> = schema["required"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(Value::as_str)
        .collect();
    let mut sorted = required.clone();
    sorted.sort_unstable();
    assert_eq!(names(&serde_json::to_value(&bare).unwrap()), sorted);
    assert_eq!(schema["properties"]["version"]["const"], VERSION);
}

/// What the fuzz target begins with, without a fuzzer.
#[test]
fn the_corpus_is_read_without_harm() {
    let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fuzz/corpus");
    let mut outcomes = [0; 3];
    for file in std::fs::read_dir(corpus).unwrap() {
        let bytes = std::fs::read(file.unwrap().path()).unwrap();
        match DeadLetter::read(&String::from_utf8_lossy(&bytes)) {
            Ok(letter) => {
                outcomes[0] += 1;
                let line = letter.to_line(MESSAGE_BYTES_MAX).unwrap();
                assert_eq!(DeadLetter::read(&line).unwrap(), letter);
            }
            Err(Unreadable::Newer(_)) => outcomes[1] += 1,
            Err(Unreadable::Malformed(_)) => outcomes[2] += 1,
        }
    }
    assert_eq!(outcomes, [8, 1, 4]);
}
