//! The main job on real input: a client that is not ours writes, the worker replicates, and that
//! client compares.

use std::process::Command;

use aws_sdk_dynamodb::types::{
    BillingMode, KeyType, ScalarAttributeType, StreamSpecification, StreamViewType,
};
use serde_json::Value;

use crate::common::binary::{Worker, provision, run, stderr};
use crate::common::ministack::{Ministacks, script};
use crate::common::seed;
use crate::common::stand::{Stand, attribute, key};

/// Calls of the workload; a batch writes up to 25 items with one.
const OPERATIONS: &str = "3000";
/// Longest wait for equality after the last write.
const EQUAL_WITHIN_SECONDS: &str = "60";

/// A source table with a partition key and a sort key.
async fn create_source(stand: &Stand, table: &str) {
    let stream = StreamSpecification::builder()
        .stream_enabled(true)
        .stream_view_type(StreamViewType::NewAndOldImages)
        .build()
        .unwrap();
    stand
        .source
        .create_table()
        .table_name(table)
        .attribute_definitions(attribute("pk", ScalarAttributeType::S))
        .attribute_definitions(attribute("sk", ScalarAttributeType::N))
        .key_schema(key("pk", KeyType::Hash))
        .key_schema(key("sk", KeyType::Range))
        .billing_mode(BillingMode::PayPerRequest)
        .stream_specification(stream)
        .send()
        .await
        .unwrap();
}

/// Runs a script to its end and returns its exit code with the JSON it printed.
async fn told(mut command: Command) -> (i32, Value) {
    let done = tokio::task::spawn_blocking(move || command.output());
    let done = done.await.unwrap().unwrap();
    let text = String::from_utf8_lossy(&done.stdout).into_owned();
    println!("{}", text.trim_end());
    let answer = serde_json::from_str(&text)
        .unwrap_or_else(|_| panic!("no answer:\n{text}{}", stderr(&done)));
    (done.status.code().unwrap(), answer)
}

/// Thousands of changes with values of every type, written by boto3 while the worker runs, are
/// found in the replica by boto3, item by item.
pub async fn what_boto3_writes_while_the_worker_runs_arrives(peers: &Ministacks) {
    let stand = peers.stand();
    let table = stand.table("orders");
    create_source(&stand, &table).await;
    let config = stand.config(&[&table], "");
    provision(&config);
    let worker = Worker::following(&config).await;
    let places = peers.arguments();
    let mut workload = script("workload.py");
    workload.args(&places[..2]).arg(&table);
    workload.arg((seed() >> 1).to_string()).arg(OPERATIONS);
    let writing = tokio::spawn(told(workload));
    // The replica follows while there is still something to write.
    let mut followed = false;
    while !writing.is_finished() {
        followed |= worker.metric("farshore_items_written_total").await > 0.0;
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    let (code, written) = writing.await.unwrap();
    assert_eq!(code, 0);
    assert!(followed, "nothing was replicated while it wrote");
    let writes = written["writes"].as_f64().unwrap();
    assert!(writes > 5_000.0, "{written}");
    assert_eq!(written["types"].as_array().unwrap().len(), 10, "{written}");
    let mut compare = script("compare.py");
    compare.args(&places).args([&table, EQUAL_WITHIN_SECONDS]);
    let (code, compared) = told(compare).await;
    assert_eq!(code, 0, "{compared:#}");
    assert_eq!(compared["equal"], true);
    assert!(
        compared["source_items"].as_u64().unwrap() > 100,
        "{compared}"
    );
    // A delete of what is not there makes no record; everything else does.
    let records = worker.metric("farshore_records_total").await;
    assert!(
        records > writes * 0.7 && records <= writes,
        "{records} of {writes}"
    );
    let (status, body) = worker.get("/readyz").await.unwrap();
    assert_eq!(status, 200, "{body}");
    let path = config.to_str().unwrap();
    let status = run(&["status", "--config", path]);
    assert_eq!(status.status.code(), Some(0), "{}", stderr(&status));
    assert!(stand.dead_letters().is_empty());
    assert!(worker.stop().await.success());
}
