//! Compares two tables item by item. Shares no code with Farshore: it talks to the servers with
//! the SDK alone and has its own idea of equality.

use std::collections::BTreeMap;

use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::types::AttributeValue;

/// An item with its attributes in order and its sets sorted, as text.
fn canonical(value: &AttributeValue) -> String {
    match value {
        AttributeValue::M(map) => {
            let sorted: BTreeMap<&String, String> =
                map.iter().map(|(k, v)| (k, canonical(v))).collect();
            format!("M{sorted:?}")
        }
        AttributeValue::L(list) => format!("L{:?}", list.iter().map(canonical).collect::<Vec<_>>()),
        AttributeValue::Ss(set) => {
            let mut set = set.clone();
            set.sort();
            format!("SS{set:?}")
        }
        AttributeValue::Ns(set) => {
            let mut set = set.clone();
            set.sort();
            format!("NS{set:?}")
        }
        AttributeValue::Bs(set) => {
            let mut set: Vec<Vec<u8>> = set.iter().map(|b| b.clone().into_inner()).collect();
            set.sort();
            format!("BS{set:?}")
        }
        other => format!("{other:?}"),
    }
}

/// All items of a table, by their `id`.
pub async fn items(client: &Client, table: &str) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut after = None;
    loop {
        let page = client
            .scan()
            .table_name(table)
            .consistent_read(true)
            .set_exclusive_start_key(after)
            .send()
            .await
            .unwrap();
        for item in page.items() {
            let id = canonical(&item["id"]);
            let text = canonical(&AttributeValue::M(item.clone()));
            assert!(
                found.insert(id, text).is_none(),
                "the scan of {table} gave an item twice"
            );
        }
        after = page.last_evaluated_key;
        if after.as_ref().is_none_or(|key| key.is_empty()) {
            return found;
        }
    }
}

/// What differs, as a few lines; empty when both tables are equal.
pub async fn differences(source: (&Client, &str), target: (&Client, &str)) -> Vec<String> {
    let from = items(source.0, source.1).await;
    let to = items(target.0, target.1).await;
    let mut lines = Vec::new();
    for (id, item) in &from {
        match to.get(id) {
            None => lines.push(format!("missing {id}")),
            Some(other) if other != item => {
                lines.push(format!("different {id}:\n  {item}\n  {other}"))
            }
            Some(_) => {}
        }
    }
    lines.extend(
        to.keys()
            .filter(|id| !from.contains_key(*id))
            .map(|id| format!("extra {id}")),
    );
    lines
}
