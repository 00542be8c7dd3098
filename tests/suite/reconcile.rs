//! Comparing tables: drift of every kind is found, on any two DynamoDB regions.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::process::Output;

use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::types::{AttributeValue, PutRequest, WriteRequest};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use serde_json::Value;

use crate::common::binary::{provision, run, stderr, stdout};
use crate::common::seed;
use crate::common::stand::{Stand, n, s, state_rows};

pub type Item = BTreeMap<String, AttributeValue>;

pub fn reconcile(config: &Path, more: &[&str]) -> Output {
    let mut arguments = vec!["reconcile", "--config", config.to_str().unwrap()];
    arguments.extend(more);
    run(&arguments)
}

/// Runs it with `--json`; it must end with `code`. Returns what it says of its only table.
pub fn ends(code: i32, config: &Path, more: &[&str]) -> Value {
    let output = reconcile(config, &[more, &["--json"]].concat());
    let told = format!("{}{}", stdout(&output), stderr(&output));
    assert_eq!(output.status.code(), Some(code), "{more:?}: {told}");
    let answer: Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!(answer["version"], 1);
    assert_eq!(answer["command"], "reconcile");
    assert_eq!(answer["equal"], code == 0, "{told}");
    let fields = |value: &Value| {
        let names = value.as_object().unwrap().keys().cloned();
        names.collect::<Vec<String>>().join(" ")
    };
    assert_eq!(
        fields(&answer),
        "applied command equal job source strategy tables target version"
    );
    assert_eq!(
        fields(&answer["tables"][0]),
        "changed ended extra left missing refused repaired seconds sourceItems sourceUnits suspects \
         table targetItems targetUnits unsettled unverified"
    );
    answer["tables"][0].clone()
}

pub fn refused(config: &Path, more: &[&str], words: &[&str]) {
    let output = reconcile(config, more);
    let told = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{more:?}: {told}");
    for word in words {
        assert!(told.contains(word), "{word:?} is missing: {told}");
    }
}

/// Differences as the answer counts them.
pub fn counted(table: &Value) -> (u64, u64, u64) {
    let count = |name: &str| table[name].as_u64().unwrap();
    (count("missing"), count("changed"), count("extra"))
}

pub async fn put_all(client: &Client, table: &str, items: impl IntoIterator<Item = Item>) {
    let put = |item: Item| {
        let put = PutRequest::builder().set_item(Some(item.into_iter().collect()));
        let put = put.build().unwrap();
        WriteRequest::builder().put_request(put).build()
    };
    let writes: Vec<WriteRequest> = items.into_iter().map(put).collect();
    for writes in writes.chunks(25) {
        let call = client.batch_write_item();
        let call = call.request_items(table, writes.to_vec());
        let answer = call.send().await.unwrap();
        assert!(answer.unprocessed_items.unwrap_or_default().is_empty());
    }
}

/// An item with something of everything.
pub fn item(id: usize, random: &mut StdRng) -> Item {
    let word = |random: &mut StdRng| s(format!("w{}", random.random_range(0..1_000)));
    let nested = AttributeValue::M(
        [
            (
                "deep".to_owned(),
                AttributeValue::L(vec![word(random), n(7)]),
            ),
            ("flag".to_owned(), AttributeValue::Bool(true)),
        ]
        .into(),
    );
    let tags: Vec<String> = (0..3)
        .map(|tag| format!("t{tag}-{}", random.random_range(0..9)))
        .collect();
    let numbers = (1..4).map(|number| format!("{number}.5"));
    BTreeMap::from([
        ("id".to_owned(), s(format!("k{id}"))),
        ("v".to_owned(), n(random.random_range(0..1_000_000))),
        ("nested".to_owned(), nested),
        ("tags".to_owned(), AttributeValue::Ss(tags)),
        ("numbers".to_owned(), AttributeValue::Ns(numbers.collect())),
    ])
}

/// An item with nothing but its key and a number.
pub fn plain(id: usize) -> Item {
    BTreeMap::from([
        ("id".to_owned(), s(format!("k{id}"))),
        ("v".to_owned(), n(id)),
    ])
}

/// The same item, spelled another way.
pub fn respelled(item: &Item) -> Item {
    let mut item = item.clone();
    for value in item.values_mut() {
        match value {
            AttributeValue::N(number) => number.push_str(".00"),
            AttributeValue::Ss(set) | AttributeValue::Ns(set) => set.reverse(),
            _ => {}
        }
    }
    item
}

/// Changed deep inside, or in its type alone.
pub fn drifted(item: &Item, random: &mut StdRng) -> Item {
    let mut item = item.clone();
    match random.random_range(0..4) {
        0 => {
            let Some(AttributeValue::M(nested)) = item.get_mut("nested") else {
                unreachable!()
            };
            let deep = AttributeValue::L(vec![s("other"), n(7)]);
            nested.insert("deep".to_owned(), deep);
        }
        1 => {
            let text = item["v"].as_n().unwrap().clone();
            item.insert("v".to_owned(), s(text));
        }
        2 => {
            item.remove("tags");
        }
        _ => {
            let list = AttributeValue::L(vec![]);
            item.insert("more".to_owned(), list);
        }
    }
    item
}

/// Whether a row of the state table belongs to a comparison.
pub fn is_of_job(row: &HashMap<String, AttributeValue>) -> bool {
    ["reconcile", "segment"].map(s).contains(&row["entityType"])
}

/// What a report says, by key: the kind.
pub fn reported(path: &Path) -> BTreeMap<String, String> {
    let text = std::fs::read_to_string(path).unwrap();
    let lines = text
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap());
    let found: Vec<(String, String)> = lines
        .map(|line| {
            let key = line["key"]["id"]["S"].as_str().unwrap().to_owned();
            (key, line["kind"].as_str().unwrap().to_owned())
        })
        .collect();
    let by_key: BTreeMap<String, String> = found.iter().cloned().collect();
    assert_eq!(by_key.len(), found.len(), "a key was reported twice");
    by_key
}

pub fn assert_same(
    found: &BTreeMap<String, String>,
    wanted: &BTreeMap<String, String>,
    seed: &str,
) {
    let without = |one: &BTreeMap<String, String>, other: &BTreeMap<String, String>| {
        let lines = one
            .iter()
            .filter(|(key, kind)| other.get(*key) != Some(*kind));
        lines
            .map(|(key, kind)| format!("{key} {kind}"))
            .take(10)
            .collect::<Vec<_>>()
    };
    let differ = (without(found, wanted), without(wanted, found));
    assert_eq!(
        differ,
        (vec![], vec![]),
        "{seed}: found too much, and not found"
    );
}

/// Two tables that were provisioned, with a configuration; no worker.
pub async fn pair(stand: &Stand, more: &str) -> (String, PathBuf) {
    let table = stand.table("orders");
    stand.create_source(&table).await;
    // Nobody but the command under test compares.
    let settings = format!("name = \"{table}\"\nbootstrap = false");
    let config = stand.config(&[&settings], more);
    // Not so short that a machine that stands still for a second ends a repair.
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(
        &config,
        text.replace("duration = \"1s\"", "duration = \"3s\""),
    )
    .unwrap();
    provision(&config);
    (table, config)
}

/// Both tables alike but for drift of every kind. Returns what differs, by key.
pub async fn with_drift(
    stand: &Stand,
    table: &str,
    items: usize,
    random: &mut StdRng,
) -> BTreeMap<String, String> {
    let mut expected = BTreeMap::new();
    let (mut source, mut target) = (Vec::new(), Vec::new());
    for id in 0..items {
        let one = item(id, random);
        let mut note = |kind: &str| expected.insert(format!("k{id}"), kind.to_owned());
        match random.random_range(0..100) {
            0..2 => {
                note("missing");
                source.push(one);
            }
            2..4 => {
                note("changed");
                target.push(drifted(&one, random));
                source.push(one);
            }
            4 => {
                note("extra");
                target.push(one);
            }
            5..10 => {
                target.push(respelled(&one));
                source.push(one);
            }
            _ => {
                target.push(one.clone());
                source.push(one);
            }
        }
    }
    put_all(&stand.source, table, source).await;
    put_all(&stand.target, table, target).await;
    expected
}

/// One comparison that finds all drift, one that repairs it, one that finds none.
pub async fn drift_of_every_kind_is_found_and_repaired(stand: &Stand) {
    drift_is_found_and_repaired(stand, seed()).await;
}

pub async fn drift_is_found_and_repaired(stand: &Stand, seed: u64) {
    let mut random = StdRng::seed_from_u64(seed);
    // So little memory that much has to be looked up, now and then.
    let memory = *["1 MiB", "256 MB"].choose(&mut random).unwrap();
    let (table, config) = pair(stand, &format!("[reconcile]\nmemory = {memory:?}\n")).await;
    let expected = with_drift(stand, &table, 1_500, &mut random).await;
    let segments = random.random_range(1..6).to_string();
    let report = stand.temp.path().join("report.jsonl");
    let more = [
        "--segments",
        &segments,
        "--report",
        report.to_str().unwrap(),
    ];
    let dry = ends(1, &config, &more);
    assert_same(&reported(&report), &expected, &format!("seed {seed}"));
    let of = |kind: &str| expected.values().filter(|known| *known == kind).count() as u64;
    let all = (of("missing"), of("changed"), of("extra"));
    assert_eq!(counted(&dry), all, "seed {seed}");
    assert_eq!(stand.differences(&table).await.len(), expected.len());
    let rows = state_rows(&stand.target, &stand.state_table()).await;
    assert!(!rows.iter().any(is_of_job), "a comparison left rows");
    let done = ends(0, &config, &["--apply", "--max-deletes", "10%"]);
    assert_eq!(counted(&done), all, "seed {seed}");
    assert_eq!(done["repaired"], expected.len(), "seed {seed}");
    assert_eq!(stand.differences(&table).await, [""; 0], "seed {seed}");
    let rows = state_rows(&stand.target, &stand.state_table()).await;
    assert!(!rows.iter().any(is_of_job), "a repair left rows");
    let again = ends(0, &config, &[]);
    assert_eq!(
        (counted(&again), &again["suspects"]),
        ((0, 0, 0), &0.into())
    );
}
