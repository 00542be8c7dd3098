//! The main job on real input: a client that is not ours writes, the worker replicates, and that
//! client compares.

use std::process::Command;
use std::time::Duration;

use aws_sdk_dynamodb::types::{
    BillingMode, KeyType, ScalarAttributeType, StreamSpecification, StreamViewType,
};
use serde_json::Value;

use crate::common::binary::{Worker, provision, run, stderr};
use crate::common::ministack::{Ministacks, script};
use crate::common::stand::{Stand, attribute, key, n, s};
use crate::common::{eventually, seed};

/// Calls of the workload; a batch writes up to 25 items with one.
const CALLS: &str = "3000";
/// Slow enough that a worker can be killed three times meanwhile, on a fast machine too.
const CALLS_PER_SECOND: &str = "250";
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
    the_main_job(peers, 0).await;
}

/// The same, with the worker killed three times while boto3 writes.
pub async fn what_boto3_writes_while_the_worker_is_killed_arrives(peers: &Ministacks) {
    the_main_job(peers, 3).await;
}

async fn the_main_job(peers: &Ministacks, kills: u32) {
    let stand = peers.stand();
    let table = stand.table("orders");
    create_source(&stand, &table).await;
    let config = stand.config(&[&table], "");
    provision(&config);
    let mut worker = Worker::following(&config).await;
    let places = peers.arguments();
    let mut workload = script("workload.py");
    workload.args(&places[..2]).arg(&table);
    workload
        .arg(seed().to_string())
        .args([CALLS, CALLS_PER_SECOND]);
    let writing = tokio::spawn(told(workload));
    // The replica follows while there is still something to write, each worker anew.
    for kill in 0..=kills {
        let follows = async || worker.metric("farshore_items_written_total").await >= 200.0;
        eventually("the replica follows", Duration::from_secs(30), follows).await;
        assert!(!writing.is_finished(), "all was written before it followed");
        if kill < kills {
            worker.kill();
            worker = Worker::following(&config).await;
        }
    }
    let (code, written) = writing.await.unwrap();
    assert_eq!(code, 0);
    let writes = written["writes"].as_f64().unwrap();
    assert!(writes > 5_000.0, "{written}");
    assert_eq!(written["types"].as_array().unwrap().len(), 10, "{written}");
    let compare = async |seconds: &str| {
        let mut compare = script("compare.py");
        compare.args(&places).arg(&table).arg(seconds);
        told(compare).await
    };
    let (code, compared) = compare(EQUAL_WITHIN_SECONDS).await;
    assert_eq!(code, 0, "{compared:#}");
    assert_eq!(compared["equal"], true);
    let items = compared["source_items"].as_u64().unwrap();
    assert!(items > 100, "{compared}");
    if kills == 0 {
        // A delete of what is not there makes no record; every other write does, and once.
        let records = worker.metric("farshore_records_total").await;
        assert!(
            records > writes * 0.7 && records <= writes,
            "{records} records of {writes} writes"
        );
    }
    let (status, body) = worker.get("/readyz").await.unwrap();
    assert_eq!(status, 200, "{body}");
    let path = config.to_str().unwrap();
    let status = run(&["status", "--config", path]);
    assert_eq!(status.status.code(), Some(0), "{}", stderr(&status));
    assert!(stand.dead_letters().is_empty());
    assert!(worker.stop().await.success());
    // Nor does the comparison find everything equal: this is for it to find.
    let stray = stand.target.put_item().table_name(&table);
    let stray = stray.item("pk", s("stray")).item("sk", n(1));
    stray.send().await.unwrap();
    let (code, compared) = compare("0").await;
    assert_eq!((code, &compared["extra"]), (1, &Value::from(1)));
}
