//! Dead letters at the size limit of their queue.

use std::time::Duration;

use aws_sdk_dynamodb::primitives::Blob;
use aws_sdk_dynamodb::types::AttributeValue;
use aws_sdk_sqs::types::QueueAttributeName;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use flate2::read::GzDecoder;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::Value;

use super::{Received, check_against_schema, config_with_queue, receive, sqs};
use crate::common::binary::{Worker, provision, run, stderr};
use crate::common::eventually;
use crate::common::ministack::Ministacks;
use crate::common::stand::{Stand, n, s};
use crate::suite::faults::{checkpoint, picky_replica, put_kind};

/// The largest message of SQS, attributes included.
const MESSAGE_BYTES: usize = 1_048_576;
/// 400 KB, less the names (id, kind, payload) and the other values (an id of 5, a kind of 8).
const PAYLOAD_BYTES: usize = 409_600 - 2 - 4 - 7 - 5 - 8;

async fn put_payload(stand: &Stand, table: &str, id: &str, payload: &AttributeValue, poison: bool) {
    let kind = if poison { n(7) } else { s("good") };
    let put = stand.source.put_item().table_name(table);
    let put = put.item("id", s(id)).item("kind", kind);
    put.item("payload", payload.clone()).send().await.unwrap();
}

/// An image of a letter, wherever it carries it; null if it does not.
fn image(letter: &Received, name: &str) -> Value {
    let Some(packed) = letter.body["compressed"][name].as_str() else {
        return letter.body[name].clone();
    };
    assert!(letter.body[name].is_null(), "{name} stands there twice");
    let bytes = STANDARD.decode(packed).unwrap();
    serde_json::from_reader(GzDecoder::new(bytes.as_slice())).unwrap()
}

/// Bytes that cannot be compressed.
fn noise(length: usize) -> Vec<u8> {
    let mut random = StdRng::seed_from_u64(1);
    (0..length).map(|_| random.random()).collect()
}

/// Whether the images a letter carries are whole, and those it lacks are named.
fn assert_images(letter: &Received, payload: &AttributeValue, omitted: &[&str]) {
    let named = letter.body.get("omitted").cloned().unwrap_or_default();
    let named: Vec<&str> = named
        .as_array()
        .map(|names| names.iter().map(|name| name.as_str().unwrap()).collect())
        .unwrap_or_default();
    assert_eq!(named, omitted, "{}", letter.bytes());
    for (name, kind) in [("oldImage", "S"), ("newImage", "N")] {
        let held = image(letter, name);
        assert_eq!(held.is_null(), omitted.contains(&name), "{name}");
        if held.is_null() {
            continue;
        }
        assert!(held["kind"].get(kind).is_some(), "{name}");
        match payload {
            AttributeValue::S(text) => assert_eq!(held["payload"]["S"], text.as_str()),
            AttributeValue::B(blob) => {
                assert_eq!(held["payload"]["B"], STANDARD.encode(blob));
            }
            _ => unreachable!(),
        }
    }
    assert_eq!(letter.body["event"], "MODIFY");
}

/// Old and new image of 400 KB each: both go along where they fit compressed, and what does not is
/// left out and named.
pub async fn letters_fit_the_largest_message(peers: &Ministacks) {
    let stand = peers.stand();
    let table = stand.table("picky");
    picky_replica(&stand, &table).await;
    let config = config_with_queue(&stand, &[&table], &peers.target.url(), "letters");
    provision(&config);
    let worker = Worker::following(&config).await;
    let text = s("x".repeat(PAYLOAD_BYTES));
    let binary = AttributeValue::B(Blob::new(noise(PAYLOAD_BYTES)));
    let control = s("\u{1}".repeat(PAYLOAD_BYTES));
    let cases: [(&str, &AttributeValue, &[&str]); 3] = [
        ("text-", &text, &[]),
        ("bytes", &binary, &["oldImage"]),
        ("ctrl-", &control, &[]),
    ];
    for (id, payload, omitted) in cases {
        put_payload(&stand, &table, id, payload, false).await;
        let arrived = async || stand.differences(&table).await.is_empty();
        eventually("the old item arrives", Duration::from_secs(20), arrived).await;
        put_payload(&stand, &table, id, payload, true).await;
        let letter = receive(&sqs(peers), peers, "letters", 1).await.remove(0);
        assert_eq!(letter.body["keys"]["id"]["S"], id);
        println!("{id}: a message of {} bytes", letter.bytes());
        assert!(letter.bytes() <= MESSAGE_BYTES, "{}", letter.bytes());
        assert_images(&letter, payload, omitted);
        check_against_schema(&[letter]);
        put_kind(&stand, &table, id, false).await;
        stand.converge(&table, 1).await;
    }
    let (status, body) = worker.get("/readyz").await.unwrap();
    assert_eq!(status, 200, "{body}");
    assert!(worker.stop().await.success());
}

async fn create_queue(client: &aws_sdk_sqs::Client, name: &str, bytes_max: usize) {
    let queue = client.create_queue().queue_name(name);
    let queue = queue.attributes(
        QueueAttributeName::MaximumMessageSize,
        bytes_max.to_string(),
    );
    queue.send().await.unwrap();
}

/// A queue that a person made may take less than SQS allows: its letters are cut to its own limit,
/// and the checkpoint goes on.
pub async fn letters_fit_a_queue_with_a_lower_limit(peers: &Ministacks) {
    const LIMIT: usize = 65_536;
    let stand = peers.stand();
    let table = stand.table("picky");
    picky_replica(&stand, &table).await;
    let client = sqs(peers);
    create_queue(&client, "small", LIMIT).await;
    let config = config_with_queue(&stand, &[&table], &peers.target.url(), "small");
    provision(&config);
    let worker = Worker::following(&config).await;
    let payload = AttributeValue::B(Blob::new(noise(40_000)));
    put_payload(&stand, &table, "k", &payload, false).await;
    stand.converge(&table, 1).await;
    put_payload(&stand, &table, "k", &payload, true).await;
    let letter = receive(&client, peers, "small", 1).await.remove(0);
    assert!(letter.bytes() <= LIMIT, "{}", letter.bytes());
    assert_images(&letter, &payload, &["oldImage"]);
    let position = letter.body["sequenceNumber"].as_str().unwrap().to_owned();
    put_kind(&stand, &table, "k", false).await;
    let passed = async || checkpoint(&stand).await > position;
    eventually("the checkpoint passes", Duration::from_secs(10), passed).await;
    assert!(worker.stop().await.success());
}

/// A queue that could not even take a letter without its images would hold the checkpoint for
/// ever at the first poison: the worker says so at start instead.
pub async fn a_queue_too_small_for_any_letter_is_refused(peers: &Ministacks) {
    let stand = peers.stand();
    let table = stand.table("orders");
    stand.create_source(&table).await;
    create_queue(&sqs(peers), "tiny", 4_096).await;
    let config = config_with_queue(&stand, &[&table], &peers.target.url(), "tiny");
    provision(&config);
    let refused = run(&["run", "--config", config.to_str().unwrap()]);
    assert_eq!(refused.status.code(), Some(2));
    let text = stderr(&refused);
    for part in ["/tiny", "4096 bytes", "MaximumMessageSize"] {
        assert!(text.contains(part), "`{part}` is missing in:\n{text}");
    }
}
