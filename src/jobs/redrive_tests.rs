//! What of a letter decides whether it is brought home.

use serde_json::json;

use super::settle::refused_again;
use super::*;
use crate::dead_letter::message::{Place, Reason, VERSION};
use crate::dynamo::table::KeyPart;
use crate::error::Fault;

pub(super) fn letter() -> DeadLetter {
    let place = |region: &str| Place {
        region: region.to_owned(),
        table: "orders".to_owned(),
    };
    DeadLetter {
        version: VERSION,
        group: "g".to_owned(),
        epoch: 3,
        table: "orders".to_owned(),
        source: place("east"),
        target: place("west"),
        stream_arn: String::new(),
        shard_id: String::new(),
        origin: None,
        sequence_number: None,
        event: None,
        keys: Some(json!({ "id": { "S": "k" } })),
        new_image: None,
        old_image: None,
        compressed: BTreeMap::new(),
        omitted: Vec::new(),
        error: Reason {
            class: "validation".to_owned(),
            code: "ValidationException".to_owned(),
            message: String::new(),
        },
        attempts: 3,
        created_at: String::new(),
        failed_at: String::new(),
        redriven: 0,
    }
}

/// The key of all tables here.
pub(super) fn key() -> Vec<KeyPart> {
    vec![KeyPart {
        name: "id".to_owned(),
        role: "HASH".to_owned(),
        kind: "S".to_owned(),
    }]
}

fn judge(wanted: Option<&str>, change: impl FnOnce(&mut DeadLetter)) -> Verdict {
    let tables = Followed::from([("orders".to_owned(), key()), ("other".to_owned(), key())]);
    let flow = Flow {
        group: "g",
        epoch: 3,
        source: "east",
        target: "west",
        tables: &tables,
        wanted,
    };
    let mut letter = letter();
    change(&mut letter);
    flow.judge(&letter)
}

#[test]
fn only_letters_of_this_flow_are_brought_home() {
    assert_eq!(judge(None, |_| ()), Verdict::Bring);
    assert_eq!(judge(Some("orders"), |_| ()), Verdict::Bring);
    assert_eq!(judge(Some("other"), |_| ()), Verdict::Other);
    type Change = fn(&mut DeadLetter);
    let stays: [(Change, &str); 10] = [
        (|l| l.keys = Some(json!({ "id": { "N": "1" } })), "the form"),
        (|l| l.keys = Some(json!({ "no": { "S": "k" } })), "the form"),
        (
            |l| l.keys = Some(json!({ "id": { "S": "k" }, "at": { "N": "1" } })),
            "the form",
        ),
        (|l| l.group = "h".to_owned(), "group h"),
        (|l| l.epoch = 2, "its flow is over"),
        (|l| l.epoch = 4, "its flow is over"),
        (
            |l| std::mem::swap(&mut l.source, &mut l.target),
            "from west to east",
        ),
        (|l| l.table = "gone".to_owned(), "not followed"),
        (|l| l.keys = None, "no key"),
        (|l| l.keys = Some(json!({ "id": { "X": 1 } })), "no key"),
    ];
    for (change, why) in stays {
        match judge(None, change) {
            Verdict::Stays(said) => assert!(said.contains(why), "{said}"),
            other => panic!("{other:?} instead of `{why}`"),
        }
    }
}

#[test]
fn a_letter_refused_again_says_why_and_how_often() {
    let fault = Fault::own(
        crate::error::Operation::Write,
        crate::error::Class::CollectionFull,
        "ItemCollectionSizeLimitExceededException",
        "full",
    );
    let again = refused_again(letter(), &fault, 5);
    assert_eq!(again.error.class, "collection-full");
    assert_eq!((again.attempts, again.redriven), (5, 1));
    assert_eq!(refused_again(again, &fault, 5).redriven, 2);
}
