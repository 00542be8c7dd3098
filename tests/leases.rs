//! Leases and status when things go wrong around them.

mod common;
mod suite;

use std::time::Duration;

use aws_sdk_dynamodb::types::{KeyType, ScalarAttributeType};
use common::binary::{Worker, provision, run, stdout};
use common::eventually;
use common::stand::{Stand, attribute, create_table, key, put, s, state_rows};
use farshore::embedded::gateway::{Fault, Limit, Options, Outage};

async fn two_gateways() -> Stand {
    let seed = common::seed();
    Stand::gateways(Options::new(seed), Options::new(seed)).await
}

/// One throttled release is tried again: exit 0, and the lease is given up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_release_that_fails_is_tried_again() {
    let stand = two_gateways().await;
    let table = stand.table("orders");
    let (_config, worker) = suite::replicated(&stand, &table, "").await;
    put(&stand.source, &table, "a", 1).await;
    stand.converge(&table, 1).await;
    // Every other write of the state table fails, whichever it is.
    let failing = Fault::throttle(Limit::Account)
        .on("PutItem")
        .table(&stand.state_table());
    let fault = stand.gateways[1].inject(failing.chance(0.5));
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(worker.stop().await.code(), Some(0));
    fault.off();
    for row in state_rows(&stand.target, &stand.state_table()).await {
        assert!(!row.contains_key("leaseOwner"), "not released: {row:?}");
    }
}

/// With the state table away nothing can be released: it says so and exits 1, within the grace.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_state_table_it_does_not_claim_to_have_released() {
    let stand = two_gateways().await;
    let table = stand.table("orders");
    let (_config, worker) = suite::replicated(&stand, &table, "").await;
    put(&stand.source, &table, "a", 1).await;
    stand.converge(&table, 1).await;
    stand.gateways[1].inject(Fault::access_denied().table(&stand.state_table()));
    let log = worker.log.clone();
    assert_eq!(worker.stop().await.code(), Some(1));
    let text = common::stand::text_of(&log);
    assert!(!text.contains("checkpointed and released"), "{text}");
}

/// Asked to stop while the replica region is away for the data, it does not wait for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_does_not_wait_for_a_replica_that_refuses() {
    let stand = two_gateways().await;
    let table = stand.table("orders");
    let (config, worker) = suite::replicated(&stand, &table, "").await;
    stand.gateways[1].inject(Fault::access_denied().on("BatchWriteItem"));
    for id in 0..100 {
        put(&stand.source, &table, &format!("k{id}"), id).await;
    }
    let red = async || {
        worker
            .get("/readyz")
            .await
            .is_some_and(|(status, _)| status == 503)
    };
    eventually("readiness turns red", Duration::from_secs(10), red).await;
    assert_eq!(worker.stop().await.code(), Some(0));
    stand.gateways[1].clear_faults();
    let worker = Worker::following(&config).await;
    stand.converge(&table, 100).await;
    assert!(worker.stop().await.success());
}

/// Asked to stop with a backlog that a small write budget would take minutes for, it stops at once,
/// gives its leases up, and the next run finishes the work.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_does_not_wait_for_the_write_budget() {
    let stand = two_gateways().await;
    let table = stand.table("orders");
    stand.create_source(&table).await;
    let slow = format!("name = \"{table}\"\nunits_per_second = 2");
    let config = stand.config(&[&slow], "");
    provision(&config);
    let worker = Worker::following(&config).await;
    for id in 0..300 {
        put(&stand.source, &table, &format!("k{id}"), id).await;
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    let start = std::time::Instant::now();
    assert_eq!(worker.stop().await.code(), Some(0));
    // The grace is 10 s; the backlog would take 150 s.
    assert!(
        start.elapsed() < Duration::from_secs(9),
        "{:?}",
        start.elapsed()
    );
    for row in state_rows(&stand.target, &stand.state_table()).await {
        assert!(!row.contains_key("leaseOwner"), "not released: {row:?}");
    }
    let text =
        common::stand::text_of(&config).replace("units_per_second = 2", "units_per_second = 0");
    std::fs::write(&config, text).unwrap();
    let worker = Worker::following(&config).await;
    stand.converge(&table, 300).await;
    assert!(worker.stop().await.success());
}

/// A worker that was killed is shown as silent, and a table nobody reads as such.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn status_is_not_green_while_the_worker_is_dead() {
    let stand = Stand::embedded().await;
    let table = stand.table("orders");
    stand.create_source(&table).await;
    let config = stand.config(&[&table], "");
    provision(&config);
    let path = config.to_str().unwrap().to_owned();
    let status = || run(&["status", "--config", &path]);
    let before = status();
    assert_eq!(before.status.code(), Some(1));
    assert!(
        stdout(&before).contains("NOBODY READS IT"),
        "{}",
        stdout(&before)
    );
    let worker = Worker::following(&config).await;
    let green = async || status().status.code() == Some(0);
    eventually("status is green", Duration::from_secs(10), green).await;
    worker.kill();
    let silent = async || {
        let status = status();
        status.status.code() == Some(1) && stdout(&status).contains("SILENT")
    };
    eventually("status shows the silence", Duration::from_secs(10), silent).await;
}

/// A replica made anew with another key refuses every record, and none of them is to blame:
/// nothing is dead-lettered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_with_another_key_is_an_outage_and_no_poison() {
    let stand = two_gateways().await;
    let table = stand.table("orders");
    let (_config, worker) = suite::replicated(&stand, &table, "").await;
    put(&stand.source, &table, "a", 1).await;
    stand.converge(&table, 1).await;
    stand
        .target
        .delete_table()
        .table_name(&table)
        .send()
        .await
        .unwrap();
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
    for id in 0..30 {
        put(&stand.source, &table, &format!("k{id}"), id).await;
    }
    let red = async || {
        let (status, body) = worker.get("/readyz").await.unwrap();
        status == 503 && body.contains("outage-replica") && body.contains("replica changed")
    };
    eventually(
        "readiness says that the replica changed",
        Duration::from_secs(15),
        red,
    )
    .await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(
        stand.dead_letters().is_empty(),
        "good records were dead-lettered"
    );
    // Made again as it should be, it takes everything.
    stand
        .target
        .delete_table()
        .table_name(&table)
        .send()
        .await
        .unwrap();
    create_table(&stand.target, &table, None).await;
    let all = async || common::checker::items(&stand.target, &table).await.len() == 30;
    eventually("what waited arrives", Duration::from_secs(20), all).await;
    assert!(worker.stop().await.success());
}

/// A start that was not read for a day may have lost records, although the stream does not say so:
/// a gap.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_not_read_for_a_day_is_a_gap() {
    let stand = two_gateways().await;
    let table = stand.table("orders");
    let (config, worker) = suite::replicated(&stand, &table, suite::whole::SHOWN_ONLY).await;
    assert!(worker.stop().await.success());
    let rows = state_rows(&stand.target, &stand.state_table()).await;
    let mut row = rows
        .into_iter()
        .find(|row| row["entityType"] == s("shard"))
        .unwrap();
    assert_eq!(row["checkpoint"], s("TRIM_HORIZON"));
    for name in ["createdAt", "watermark"] {
        row.insert(name.to_owned(), common::stand::n(1_700_000_000_000_i64));
    }
    let state = stand.state_table();
    stand
        .target
        .put_item()
        .table_name(&state)
        .set_item(Some(row))
        .send()
        .await
        .unwrap();
    let worker = Worker::following(&config).await;
    let red = async || {
        worker
            .get("/readyz")
            .await
            .is_some_and(|(_, body)| body.contains("gap-trimmed"))
    };
    eventually("the gap shows", Duration::from_secs(10), red).await;
    assert!(worker.stop().await.success());
}

/// A region that takes connections and never answers: the lease runs out, and nothing is claimed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_replica_region_is_waited_out() {
    let mut stand = two_gateways().await;
    let table = stand.table("orders");
    let (_config, worker) = suite::replicated(&stand, &table, "").await;
    put(&stand.source, &table, "a", 1).await;
    stand.converge(&table, 1).await;
    stand.gateways[1].go_away(Outage::Silent).await;
    for id in 0..40 {
        put(&stand.source, &table, &format!("k{id}"), id).await;
    }
    let red = async || {
        worker
            .get("/readyz")
            .await
            .is_some_and(|(status, _)| status == 503)
    };
    eventually("readiness turns red", Duration::from_secs(20), red).await;
    stand.gateways[1].come_back().await;
    stand.converge(&table, 41).await;
    assert!(stand.dead_letters().is_empty());
    assert!(worker.stop().await.success());
}

/// What an idle shard costs, with the intervals of production: calls by kind and minute, printed,
/// and none of them more often than its interval says.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_shard_costs_no_more_calls_than_its_intervals_say() {
    let stand = two_gateways().await;
    let table = stand.table("orders");
    stand.create_source(&table).await;
    let config = stand.config(&[&table], "");
    let text = common::stand::text_of(&config)
        .replace("idle_interval = \"50ms\"", "idle_interval = \"1s\"")
        .replace("poll_interval = \"20ms\"", "poll_interval = \"250ms\"")
        .replace("checkpoint_every = \"100ms\"", "checkpoint_every = \"1s\"")
        .replace("discover_every = \"1s\"", "discover_every = \"30s\"")
        .replace("duration = \"1s\"", "duration = \"10s\"");
    std::fs::write(&config, text).unwrap();
    provision(&config);
    let worker = Worker::following(&config).await;
    put(&stand.source, &table, "a", 1).await;
    stand.converge(&table, 1).await;
    // What the start and the first change cost is over.
    tokio::time::sleep(Duration::from_secs(5)).await;
    let first = [0, 1].map(|region: usize| stand.gateways[region].next_call());
    let seconds = 20;
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    let mut calls: std::collections::BTreeMap<String, u64> = std::collections::BTreeMap::new();
    for (region, first) in first.into_iter().enumerate() {
        for call in stand.gateways[region].calls_where(|call| call.number >= first) {
            *calls.entry(call.operation).or_default() += 1;
        }
    }
    let per_minute = |operation: &str| calls.get(operation).map_or(0, |n| n * 60 / seconds);
    for operation in calls.keys() {
        println!("{operation}: {} a minute", per_minute(operation));
    }
    // One read a second; renewals of a shard, of the worker's row and of its share of the write budget every
    // 3.3 s each; the state table every 1.5 s; the source table's description and the listing every 30 s.
    for (operation, most) in [
        ("GetRecords", 66),
        ("PutItem", 63),
        ("Scan", 48),
        ("DescribeStream", 9),
        ("DescribeTable", 9),
        ("BatchWriteItem", 0),
        ("BatchGetItem", 0),
    ] {
        assert!(per_minute(operation) <= most, "{operation}: {calls:?}");
    }
    assert!(per_minute("GetRecords") >= 30, "nobody reads: {calls:?}");
    assert!(worker.stop().await.success());
}
