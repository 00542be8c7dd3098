//! What bad input gets: one sentence of what, one of why, one of what to do, exit code 2, before
//! anything was written.

mod common;

use std::path::{Path, PathBuf};
use std::process::Output;

use aws_sdk_dynamodb::types::{KeyType, ScalarAttributeType, StreamViewType};
use common::binary::{farshore, provision, run, stderr, stdout};
use common::stand::{Stand, attribute, create_table, free_port, key, put, state_rows};
use farshore::embedded::gateway::{Fault, Options};

/// Runs `farshore run` on a configuration that cannot work, and gives what it says.
fn refused(config: &Path) -> String {
    said(&run(&["run", "--config", config.to_str().unwrap()]))
}

fn said(output: &Output) -> String {
    let text = stderr(output);
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(stdout(output).is_empty(), "an error belongs to stderr");
    let starts: Vec<&str> = text
        .lines()
        .filter(|line| !line.contains(" WARN "))
        .map(|line| line.trim_start().split(": ").next().unwrap_or_default())
        .collect();
    assert_eq!(
        starts,
        ["error", "why", "do"],
        "three sentences are wanted:\n{text}"
    );
    text
}

fn contains(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "`{part}` is missing in:\n{text}");
    }
}

async fn nothing_written(stand: &Stand) {
    for row in state_rows(&stand.target, &stand.state_table()).await {
        assert_eq!(
            row["leaseKey"].as_s().unwrap(),
            "control",
            "a row was written: {row:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_missing_or_wrong_file() {
    let stand = Stand::embedded().await;
    let text = refused(&stand.temp.path().join("none.toml"));
    contains(
        &text,
        &["none.toml could not be read", "No such file", "--config"],
    );
    let config = stand.config(&["orders"], "[wrokers]\nlisten = \"127.0.0.1:1\"\n");
    contains(&refused(&config), &["line ", "wrokers", "no key"]);
    let path = stand.temp.path().join("broken.toml");
    std::fs::write(&path, "group = \n").unwrap();
    contains(&refused(&path), &["broken.toml is not usable", "line 1"]);
    let output = run(&["run", "--nonsense"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("--nonsense"));
}

/// An action that could not be done when it is needed is refused when the file is read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn actions_that_cannot_be_done() {
    let stand = Stand::embedded().await;
    for (action, parts) in [
        (
            "kind = \"file\"\npath = \"/etc/active\"\ncontent = \"{regoin}\"",
            ["line 25, actions[].content", "{regoin}", "{region}"],
        ),
        (
            "kind = \"command\"",
            ["line 22, actions[0].command", "missing", "docs/ACTIONS.md"],
        ),
        (
            "kind = \"webhook\"\nurl = \"https://user:hidden@x/\"",
            ["line 24, actions[0].url", "password", "secret_env"],
        ),
        (
            "kind = \"ssm_parameter\"\nparameter = \"/a\"\nvalue = \"x\"\nregion = \"mars\"",
            ["line 26, actions[0].region", "`mars`", "{previous}"],
        ),
    ] {
        let config = stand.config(&["orders"], &format!("[[actions]]\n{action}\n"));
        let text = refused(&config);
        contains(&text, &parts);
        assert!(!text.contains("hidden"), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_without_a_usable_stream() {
    let stand = Stand::embedded().await;
    let table = stand.table("orders");
    stand.create_source(&table).await;
    let config = stand.config(&[&table], "");
    provision(&config);
    for (name, view, says) in [
        (stand.table("none"), None, "It has no stream"),
        (
            stand.table("keys"),
            Some(StreamViewType::KeysOnly),
            "KEYS_ONLY",
        ),
        (
            stand.table("olds"),
            Some(StreamViewType::OldImage),
            "OLD_IMAGE",
        ),
    ] {
        create_table(&stand.source, &name, view).await;
        create_table(&stand.target, &name, None).await;
        let config = stand.config(&[&table, &name], "");
        contains(
            &refused(&config),
            &[
                &name,
                "us-east-1",
                says,
                "StreamViewType=NEW_AND_OLD_IMAGES",
            ],
        );
        let output = run(&["provision", "--config", config.to_str().unwrap()]);
        contains(&said(&output), &[&name, says]);
    }
    nothing_written(&stand).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn key_schemas_that_differ() {
    let stand = Stand::embedded().await;
    let table = stand.table("orders");
    stand.create_source(&table).await;
    let config = stand.config(&[&table], "");
    // The replica exists with another key; provision must not touch it, nor create anything.
    stand
        .target
        .create_table()
        .table_name(&table)
        .attribute_definitions(attribute("id", ScalarAttributeType::N))
        .key_schema(key("id", KeyType::Hash))
        .billing_mode(aws_sdk_dynamodb::types::BillingMode::PayPerRequest)
        .send()
        .await
        .unwrap();
    let output = run(&["provision", "--apply", "--config", config.to_str().unwrap()]);
    contains(
        &said(&output),
        &["keys differ", "id (N, HASH)", "id (S, HASH)"],
    );
    let tables = stand.target.list_tables().send().await.unwrap();
    assert_eq!(tables.table_names(), std::slice::from_ref(&table));
    // With a state table in place `run` refuses as well.
    let other = stand.table("other");
    stand.create_source(&other).await;
    provision(&stand.config(&[&other], ""));
    contains(
        &refused(&config),
        &["keys differ", "id (N, HASH)", "id (S, HASH)"],
    );
    nothing_written(&stand).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tables_that_are_not_there() {
    let stand = Stand::embedded().await;
    let table = stand.table("orders");
    stand.create_source(&table).await;
    let config = stand.config(&[&table], "");
    contains(
        &refused(&config),
        &[
            "no state table",
            &stand.state_table(),
            "us-west-2",
            "farshore provision --apply",
        ],
    );
    provision(&config);
    stand
        .target
        .delete_table()
        .table_name(&table)
        .send()
        .await
        .unwrap();
    contains(
        &refused(&config),
        &[
            "no table",
            &table,
            "us-west-2",
            "farshore provision --apply",
        ],
    );
    stand
        .source
        .delete_table()
        .table_name(&table)
        .send()
        .await
        .unwrap();
    contains(&refused(&config), &["no table", &table, "us-east-1"]);
    nothing_written(&stand).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endpoint_that_cannot_be_reached() {
    let stand = Stand::embedded().await;
    let table = stand.table("orders");
    stand.create_source(&table).await;
    provision(&stand.config(&[&table], ""));
    let nowhere = format!("http://127.0.0.1:{}", free_port());
    let letters = format!("[dead_letters]\ndirectory = {:?}\n", stand.letters());
    let source_gone = stand.config_at(&nowhere, &stand.target_url, &[&table], &letters);
    contains(
        &refused(&source_gone),
        &["us-east-1", &nowhere, "no connection", "endpoint_url"],
    );
    let target_gone = stand.config_at(&stand.source_url, &nowhere, &[&table], &letters);
    contains(
        &refused(&target_gone),
        &["us-west-2", &nowhere, "no connection", "endpoint_url"],
    );
    // A queue that cannot be reached is found before anything is written, too.
    let queue = format!("[dead_letters]\nqueue_url = \"{nowhere}/000000000000/letters\"\n");
    let queue_gone = stand.config_at(&stand.source_url, &stand.target_url, &[&table], &queue);
    contains(
        &refused(&queue_gone),
        &["dead-letter queue", &nowhere, "no connection"],
    );
    nothing_written(&stand).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn credentials_that_are_missing() {
    let stand = Stand::embedded().await;
    let table = stand.table("orders");
    stand.create_source(&table).await;
    let config = stand.config(&[&table], "");
    provision(&config);
    let output = farshore(&["run", "--config", config.to_str().unwrap()])
        .env_remove("AWS_ACCESS_KEY_ID")
        .env_remove("AWS_SECRET_ACCESS_KEY")
        .env("HOME", stand.temp.path())
        .output()
        .unwrap();
    contains(&said(&output), &["no credentials", "AWS_PROFILE"]);
    nothing_written(&stand).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_permission_that_is_denied() {
    let stand = Stand::gateways(Options::new(1), Options::new(1)).await;
    let table = stand.table("orders");
    stand.create_source(&table).await;
    let config = stand.config(&[&table], "");
    provision(&config);
    for (gateway, operation, label) in [
        (0, "DescribeTable", "us-east-1"),
        (1, "GetItem", "us-west-2"),
        (0, "BatchGetItem", "us-east-1"),
        (1, "BatchGetItem", "us-west-2"),
    ] {
        stand.gateways[gateway].inject(Fault::access_denied().on(operation));
        contains(&refused(&config), &[label, "AccessDeniedException", "IAM"]);
        stand.gateways[gateway].clear_faults();
    }
    nothing_written(&stand).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_port_that_is_taken_and_a_directory_that_cannot_be_written() {
    let stand = Stand::embedded().await;
    let table = stand.table("orders");
    stand.create_source(&table).await;
    let config = stand.config(&[&table], "");
    provision(&config);
    let text = std::fs::read_to_string(&config).unwrap();
    let address = text
        .lines()
        .find_map(|line| line.strip_prefix("listen = "))
        .unwrap();
    let taken = std::net::TcpListener::bind(address.trim_matches('"')).unwrap();
    contains(&refused(&config), &["could not listen", "worker.listen"]);
    drop(taken);
    std::fs::write(stand.letters(), "a file").unwrap();
    contains(
        &refused(&config),
        &["dead-letter directory", "cannot be used"],
    );
    nothing_written(&stand).await;
}

/// A configuration of another group on the same state table.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_state_table_of_another_group() {
    let stand = Stand::embedded().await;
    let table = stand.table("orders");
    stand.create_source(&table).await;
    let config = stand.config(&[&table], "");
    provision(&config);
    let text = std::fs::read_to_string(&config).unwrap();
    let path: PathBuf = stand.temp.path().join("other.toml");
    let own = format!("group = \"{}\"", stand.group());
    let text = text.replace(&own, "group = \"other\"").replace(
        "[leases]",
        &format!("[leases]\ntable = \"{}\"", stand.state_table()),
    );
    std::fs::write(&path, text).unwrap();
    contains(
        &refused(&path),
        &["belongs to another group", "leases.table"],
    );
    nothing_written(&stand).await;
}

/// An epoch that names two regions: nobody applies.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_conflict_of_epochs() {
    let stand = Stand::embedded().await;
    let table = stand.table("orders");
    stand.create_source(&table).await;
    let config = stand.config(&[&table], "");
    provision(&config);
    let row = state_rows(&stand.target, &stand.state_table())
        .await
        .remove(0);
    create_state_copy(&stand, row).await;
    put(&stand.source, &table, "x", 1).await;
    contains(
        &refused(&config),
        &[
            "Epoch 1 names several active regions",
            "us-east-1",
            "us-west-2",
        ],
    );
    nothing_written(&stand).await;
}

async fn create_state_copy(
    stand: &Stand,
    mut row: std::collections::HashMap<String, aws_sdk_dynamodb::types::AttributeValue>,
) {
    let name = stand.state_table();
    stand
        .source
        .create_table()
        .table_name(&name)
        .attribute_definitions(attribute("leaseKey", ScalarAttributeType::S))
        .key_schema(key("leaseKey", KeyType::Hash))
        .billing_mode(aws_sdk_dynamodb::types::BillingMode::PayPerRequest)
        .send()
        .await
        .unwrap();
    row.insert("active".to_owned(), common::stand::s("us-west-2"));
    stand
        .source
        .put_item()
        .table_name(&name)
        .set_item(Some(row))
        .send()
        .await
        .unwrap();
}
