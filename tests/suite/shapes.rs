//! Items of every shape arrive byte for byte, and nothing is added to them.

use std::collections::HashMap;

use aws_sdk_dynamodb::primitives::Blob;
use aws_sdk_dynamodb::types::AttributeValue as V;

use super::replicated;
use crate::common::stand::{Stand, n, s};

/// Items that hold all ten types, nested, with every edge that a value has.
pub fn items() -> Vec<HashMap<String, V>> {
    let item = |id: &str, attributes: Vec<(&str, V)>| {
        let mut item: HashMap<String, V> = attributes
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .collect();
        item.insert("id".to_owned(), s(id));
        item
    };
    let map = |entries: Vec<(&str, V)>| {
        V::M(
            entries
                .into_iter()
                .map(|(name, value)| (name.to_owned(), value))
                .collect(),
        )
    };
    let mut deep = n(1);
    for _ in 0..15 {
        deep = V::L(vec![map(vec![("x", deep)])]);
    }
    vec![
        item(
            "scalars",
            vec![
                ("string", s("plain")),
                ("empty", s("")),
                (
                    "odd",
                    s("\u{1}\u{7f}\u{fffd}\u{ffff}\u{10ffff}\n\"\\ ä 漢 🙂"),
                ),
                ("yes", V::Bool(true)),
                ("no", V::Bool(false)),
                ("nothing", V::Null(true)),
                ("bytes", V::B(Blob::new((0..=255u8).collect::<Vec<_>>()))),
                ("empty-bytes", V::B(Blob::new(Vec::new()))),
            ],
        ),
        item(
            "numbers",
            vec![
                ("digits-38", n("12345678901234567890123456789012345678")),
                ("fraction-38", n("0.12345678901234567890123456789012345678")),
                ("negative", n("-99999999999999999999999999999999999999")),
                ("zero", n("0")),
                ("largest", n("99999999999999999999999999999999999999")),
                ("small", n("0.001")),
            ],
        ),
        item(
            "sets",
            vec![
                ("strings", V::Ss(vec!["a".into(), "ä".into(), "z".into()])),
                (
                    "numbers",
                    V::Ns(vec![
                        "1".into(),
                        "-2.5".into(),
                        "12345678901234567890123456789012345678".into(),
                    ]),
                ),
                (
                    "binaries",
                    V::Bs(vec![Blob::new([0]), Blob::new([1, 2, 3])]),
                ),
            ],
        ),
        item(
            "nested",
            vec![
                ("deep", deep),
                ("empty-list", V::L(vec![])),
                ("empty-map", V::M(HashMap::new())),
                (
                    "mixed",
                    V::L(vec![
                        s(""),
                        n(1),
                        V::Null(true),
                        V::Bool(false),
                        V::B(Blob::new([9])),
                    ]),
                ),
                (
                    "map",
                    map(vec![
                        ("a name with spaces", s("x")),
                        ("ss", V::Ss(vec!["only".into()])),
                    ]),
                ),
            ],
        ),
        item(
            "names",
            vec![
                ("with space", n(1)),
                ("with.dot", n(2)),
                ("ümlaut", n(3)),
                ("#:$", n(4)),
            ],
        ),
        // 400 KB is 409,600 bytes with the names: id (2) + its value (5) + payload (7).
        item("large", vec![("payload", s("x".repeat(409_600 - 14)))]),
        item(
            "large-binary",
            vec![("payload", V::B(Blob::new(vec![7u8; 409_600 - 2 - 12 - 7])))],
        ),
    ]
}

/// All ten attribute types, empty values, 38 digits and 400 KB arrive byte for byte.
pub async fn all_types_arrive_byte_for_byte(stand: &Stand) {
    let table = stand.table("shapes");
    let (_config, worker) = replicated(stand, &table, "").await;
    let items = items();
    for item in &items {
        stand
            .source
            .put_item()
            .table_name(&table)
            .set_item(Some(item.clone()))
            .send()
            .await
            .unwrap();
    }
    stand.converge(&table, items.len()).await;
    // What the replica holds is what was written, not merely what the source gives back; and
    // no attribute was added.
    for item in &items {
        let answer = stand
            .target
            .get_item()
            .table_name(&table)
            .key("id", item["id"].clone())
            .consistent_read(true)
            .send()
            .await
            .unwrap();
        let mut held = answer.item.unwrap();
        let mut names: Vec<_> = held.keys().cloned().collect();
        let mut wanted: Vec<_> = item.keys().cloned().collect();
        names.sort();
        wanted.sort();
        assert_eq!(names, wanted);
        for (name, value) in item {
            match (value, held.remove(name).unwrap()) {
                // Sets have no order.
                (V::Ss(a), V::Ss(b)) | (V::Ns(a), V::Ns(b)) => assert_eq!(sorted(a), sorted(&b)),
                (V::Bs(a), V::Bs(b)) => {
                    let sorted = |set: &[Blob]| {
                        let mut set: Vec<_> = set.iter().map(|b| b.as_ref().to_vec()).collect();
                        set.sort();
                        set
                    };
                    assert_eq!(sorted(a), sorted(&b));
                }
                (a, b) => assert_eq!(*a, b, "{name}"),
            }
        }
    }
    assert!(worker.stop().await.success());
}

fn sorted(set: &[String]) -> Vec<String> {
    let mut set = set.to_vec();
    set.sort();
    set
}
