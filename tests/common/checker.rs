//! Compares two tables item by item. Shares no code with Farshore: it talks to the servers with
//! the SDK alone and has its own idea of equality.

use std::collections::BTreeMap;

use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::types::AttributeValue;

/// A value with its attributes in order and its sets sorted, as text in which every part is
/// preceded by its length: different values give different text.
fn canonical(value: &AttributeValue) -> String {
    let parts = |kind: &str, parts: Vec<String>| {
        let body: String = parts
            .iter()
            .map(|part| format!("{}:{part}", part.len()))
            .collect();
        format!("{kind}[{body}]")
    };
    let sorted = |kind: &str, mut set: Vec<String>| {
        set.sort();
        parts(kind, set)
    };
    match value {
        AttributeValue::M(map) => {
            let in_order: BTreeMap<&String, String> = map
                .iter()
                .map(|(name, value)| (name, canonical(value)))
                .collect();
            let flat = in_order
                .into_iter()
                .flat_map(|(name, value)| [name.clone(), value]);
            parts("M", flat.collect())
        }
        AttributeValue::L(list) => parts("L", list.iter().map(canonical).collect()),
        AttributeValue::Ss(set) => sorted("SS", set.clone()),
        AttributeValue::Ns(set) => sorted("NS", set.clone()),
        AttributeValue::Bs(set) => sorted(
            "BS",
            set.iter().map(|b| format!("{:?}", b.as_ref())).collect(),
        ),
        AttributeValue::B(bytes) => format!("B{:?}", bytes.as_ref()),
        AttributeValue::S(text) => format!("S{text}"),
        AttributeValue::N(number) => format!("N{number}"),
        other => format!("{other:?}"),
    }
}

/// All items of a table, by their `id`.
pub async fn items(client: &Client, table: &str) -> BTreeMap<String, String> {
    items_by(client, table, &["id"]).await
}

/// All items of a table, by the attributes of their key.
pub async fn items_by(client: &Client, table: &str, key: &[&str]) -> BTreeMap<String, String> {
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
            let parts: Vec<_> = key.iter().map(|name| canonical(&item[*name])).collect();
            let id = parts.join("/");
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
