//! The answers of the command.

use crate::common::eventually;
use crate::failover_support::{A, B, Group, LABELS, Row, command};
use crate::{PATIENCE, fail_over};

/// The form of an answer: every path in it, with the kind of its value.
fn shape(value: &serde_json::Value, path: &str, lines: &mut std::collections::BTreeSet<String>) {
    use serde_json::Value;
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                shape(value, &format!("{path}.{name}"), lines);
            }
        }
        Value::Array(values) => {
            lines.insert(format!("{path}[]"));
            for value in values {
                shape(value, &format!("{path}[]"), lines);
            }
        }
        other => {
            let kind = match other {
                Value::Null => "null",
                Value::Bool(_) => "bool",
                Value::Number(_) => "number",
                _ => "string",
            };
            lines.insert(format!("{path} {kind}"));
        }
    }
}

/// The JSON of plan and report is a contract: docs/FAILOVER.md says what each field means.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_answers_of_failover_have_the_documented_form() {
    let mut group = Group::new(11, 2).await;
    group.late_effect = "2s";
    group.provision(&[B]);
    let worker = group.worker(B).await;
    group.put(A, "k", 1).await;
    group.converge(A, B, 1).await;
    let stored = async || {
        let (rows, streams) = (
            group.rows_of(B, "shard").await,
            group.rows_of(B, "stream").await,
        );
        let is_settled = |row: &Row| {
            row.get("settled")
                .is_some_and(|flag| flag.as_bool() == Ok(&true))
        };
        rows.iter()
            .all(|row| row.contains_key("watermark") && row.contains_key("provenUntil"))
            && streams.iter().all(is_settled)
            && !group.rows_of(B, "ttl").await.is_empty()
    };
    eventually("how far it came is stored", PATIENCE, stored).await;
    worker.kill();
    group.gateways[A]
        .go_away(farshore::embedded::gateway::Outage::Refused)
        .await;
    let config = group.config(B, "");
    let (_, plan, _) = command(&config, &["failover", "--to", LABELS[B], "--json"]).await;
    let plan: serde_json::Value = serde_json::from_str(&plan).unwrap();
    let (_, report, _) = fail_over(&config, &["--to", LABELS[B]]).await;
    let mut lines = std::collections::BTreeSet::new();
    shape(&plan, "plan", &mut lines);
    shape(&report, "report", &mut lines);
    let now: Vec<String> = lines.into_iter().collect();
    let known = include_str!("../failover_support/answers.txt");
    assert_eq!(now.join("\n"), known.trim_end());
    let page = include_str!("../../docs/FAILOVER.md");
    for line in &now {
        let name = line
            .rsplit('.')
            .next()
            .unwrap()
            .split([' ', '['])
            .next()
            .unwrap();
        assert!(
            page.contains(&format!("`{name}`")),
            "docs/FAILOVER.md lacks `{name}`"
        );
    }
}
