//! What streams do in production, through the gateway: positions that are forgotten, streams and
//! tables made anew, TTL, split shards, throttling, expired iterators.

mod common;
mod suite;

use std::time::Duration;

use aws_sdk_dynamodb::types::{StreamViewType, TimeToLiveSpecification};
use common::binary::{Worker, provision, run, stdout};
use common::eventually;
use common::stand::{Stand, delete, n, put, s};
use farshore::embedded::gateway::{Fault, Limit, Options};
use suite::whole::set_stream;

async fn gap(worker: &Worker, code: &str) {
    let red = async || {
        worker
            .get("/readyz")
            .await
            .is_some_and(|(status, body)| status == 503 && body.contains(code))
    };
    eventually(code, Duration::from_secs(15), red).await;
}

/// The worker was away for longer than the stream remembers: a gap, and it goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_position_that_was_trimmed_is_a_gap_and_reading_goes_on() {
    let stand = Stand::gateways(Options::new(common::seed()), Options::new(1)).await;
    let table = stand.table("orders");
    let (config, worker) = suite::replicated(&stand, &table, suite::whole::SHOWN_ONLY).await;
    put(&stand.source, &table, "a", 1).await;
    stand.converge(&table, 1).await;
    assert!(worker.stop().await.success());
    put(&stand.source, &table, "lost", 2).await;
    stand.gateways[0].trim(&table);
    let worker = Worker::following(&config).await;
    put(&stand.source, &table, "after", 3).await;
    let arrived = async || stand.differences(&table).await.len() == 1;
    eventually("what came after arrives", Duration::from_secs(15), arrived).await;
    gap(&worker, "gap-trimmed").await;
    let status = run(&["status", "--config", config.to_str().unwrap()]);
    assert_eq!(status.status.code(), Some(1));
    assert!(
        stdout(&status).contains("GAP trimmed"),
        "{}",
        stdout(&status)
    );
    assert!(worker.stop().await.success());
}

/// A stream disabled and enabled anew is another stream: a gap, and the new one is read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_made_anew_is_a_gap_and_is_read_from_its_beginning() {
    let stand = Stand::gateways(Options::new(common::seed()).shards(2), Options::new(1)).await;
    let table = stand.table("orders");
    let (_config, worker) = suite::replicated(&stand, &table, suite::whole::SHOWN_ONLY).await;
    put(&stand.source, &table, "a", 1).await;
    stand.converge(&table, 1).await;
    set_stream(&stand, &table, None).await;
    put(&stand.source, &table, "unseen", 2).await;
    set_stream(&stand, &table, Some(StreamViewType::NewAndOldImages)).await;
    put(&stand.source, &table, "seen", 3).await;
    let arrived = async || stand.differences(&table).await.len() == 1;
    eventually("the new stream is read", Duration::from_secs(20), arrived).await;
    gap(&worker, "gap-stream-recreated").await;
    assert!(worker.stop().await.success());
}

/// Made anew without new images it cannot be replayed: nothing is dead-lettered, and readiness
/// says why.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_made_anew_without_new_images_is_not_followed() {
    let stand = Stand::gateways(Options::new(common::seed()), Options::new(1)).await;
    let table = stand.table("orders");
    let (_config, worker) = suite::replicated(&stand, &table, "").await;
    set_stream(&stand, &table, None).await;
    set_stream(&stand, &table, Some(StreamViewType::KeysOnly)).await;
    put(&stand.source, &table, "a", 1).await;
    gap(&worker, "outage-source").await;
    assert!(stand.dead_letters().is_empty());
    assert!(worker.stop().await.success());
}

/// A table deleted and created anew is another table: it stops and asks, and goes on by itself once
/// it is told to follow it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_made_anew_stops_and_asks() {
    let stand = Stand::gateways(Options::new(common::seed()), Options::new(1)).await;
    let table = stand.table("orders");
    let (config, worker) = suite::replicated(&stand, &table, "").await;
    put(&stand.source, &table, "a", 1).await;
    stand.converge(&table, 1).await;
    assert!(worker.stop().await.success());
    stand
        .source
        .delete_table()
        .table_name(&table)
        .send()
        .await
        .unwrap();
    stand.create_source(&table).await;
    put(&stand.source, &table, "b", 2).await;
    let worker = Worker::start(&config);
    gap(&worker, "table-stopped").await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let held = common::checker::items(&stand.target, &table).await;
    assert_eq!(
        held.len(),
        1,
        "the new table's items were applied to the old one's replica"
    );
    let state = stand.state_table();
    for row in common::stand::state_rows(&stand.target, &state).await {
        if row.get("table") == Some(&s(table.as_str())) {
            let delete = stand.target.delete_item().table_name(&state);
            let delete = delete.key("leaseKey", row["leaseKey"].clone());
            delete.send().await.unwrap();
        }
    }
    let followed = async || {
        let (_, body) = worker.get("/readyz").await.unwrap_or_default();
        let held = common::checker::items(&stand.target, &table).await;
        !body.contains("table-stopped") && held.len() == 2
    };
    eventually("it goes on", Duration::from_secs(20), followed).await;
    assert!(worker.stop().await.success());
}

/// Deletes by TTL are applied, or left out where the table says so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ttl_deletes_are_replicated_or_skipped_as_configured() {
    let stand = Stand::gateways(Options::new(common::seed()), Options::new(1)).await;
    let (kept, swept) = (stand.table("kept"), stand.table("swept"));
    for table in [&kept, &swept] {
        stand.create_source(table).await;
        let ttl = TimeToLiveSpecification::builder()
            .enabled(true)
            .attribute_name("expires");
        stand
            .source
            .update_time_to_live()
            .table_name(table)
            .time_to_live_specification(ttl.build().unwrap())
            .send()
            .await
            .unwrap();
    }
    let skipping = format!("name = \"{kept}\"\nttl_deletes = \"skip\"");
    let config = stand.config(&[&skipping, &swept], "");
    provision(&config);
    let worker = Worker::following(&config).await;
    for table in [&kept, &swept] {
        let item = stand
            .source
            .put_item()
            .table_name(table)
            .item("id", s("old"));
        item.item("expires", n(1_000_000_000)).send().await.unwrap();
        put(&stand.source, table, "mine", 1).await;
    }
    stand.converge(&kept, 2).await;
    stand.converge(&swept, 2).await;
    assert_eq!(stand.gateways[0].sweep_ttl(), Ok(2));
    // A delete of the application's own is applied in both.
    delete(&stand.source, &kept, "mine").await;
    delete(&stand.source, &swept, "mine").await;
    stand.converge(&swept, 0).await;
    let only_expired = async || common::checker::items(&stand.target, &kept).await.len() == 1;
    eventually(
        "the expired item stays",
        Duration::from_secs(10),
        only_expired,
    )
    .await;
    assert_eq!(worker.metric("farshore_records_skipped_total").await, 1.0);
    assert!(worker.stop().await.success());
}

/// Splits, late listings, expired iterators, empty pages, throttling and unprocessed items in one
/// run: order per key holds and nothing is lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rough_but_honest_service_loses_nothing() {
    let first = common::seed();
    for seed in first..first + common::long(10, 1) {
        println!("seed {seed}");
        roughly(seed).await;
    }
}

async fn roughly(seed: u64) {
    let source = Options::new(seed)
        .shards(4)
        .rotate_every(Duration::from_secs(3))
        .split_every(Duration::from_secs(4))
        .iterator_life(Duration::from_millis(700))
        .describe_page(10);
    let stand = Stand::gateways(source, Options::new(seed)).await;
    let faults = [
        (0, Fault::late_children(Duration::from_millis(300))),
        (0, Fault::empty_children(2)),
        // Each shard is missed once at the most, so the chance must be high for it to happen at all.
        (0, Fault::missing_shard().chance(0.7)),
        (0, Fault::empty_page().chance(0.2)),
        (0, Fault::short_page().chance(0.2)),
        (
            0,
            Fault::throttling_exception(Limit::Account)
                .on("GetRecords")
                .chance(0.05),
        ),
        (0, Fault::unavailable().on("GetRecords").chance(0.05)),
        (1, Fault::unprocessed(0.4).chance(0.3)),
        (1, Fault::error_before().on("BatchWriteItem").chance(0.1)),
        (1, Fault::error_after().on("BatchWriteItem").chance(0.1)),
        (
            1,
            Fault::throttle(Limit::Provisioned)
                .on("BatchWriteItem")
                .chance(0.1),
        ),
    ];
    let struck: Vec<_> = faults
        .into_iter()
        .map(|(region, fault)| (format!("{fault:?}"), stand.gateways[region].inject(fault)))
        .collect();
    let table = stand.table("orders");
    let (_config, worker) = suite::replicated(&stand, &table, "").await;
    let mut random = <rand::rngs::StdRng as rand::SeedableRng>::seed_from_u64(seed);
    for _ in 0..6 {
        suite::random_changes(&stand, &table, &mut random, 150, 50).await;
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    stand.converge(&table, 10).await;
    assert!(stand.dead_letters().is_empty());
    assert_eq!(worker.metric("farshore_gaps_open").await, 0.0);
    for (fault, handle) in &struck {
        assert!(handle.hits() > 0, "this fault never happened: {fault}");
    }
    assert!(worker.stop().await.success());
}

/// The write limit holds for a backlog: it takes at least as long as the limit says.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_write_limit_holds() {
    let stand = Stand::gateways(Options::new(1), Options::new(1)).await;
    let table = stand.table("orders");
    stand.create_source(&table).await;
    let limited = format!("name = \"{table}\"\nunits_per_second = 40");
    let config = stand.config(&[&limited], "");
    provision(&config);
    for id in 0..120 {
        put(&stand.source, &table, &format!("k{id}"), id).await;
    }
    let start = std::time::Instant::now();
    let worker = Worker::following(&config).await;
    stand.converge(&table, 120).await;
    // 120 units at 40 a second; 50 ms of it may be spent at once.
    assert!(
        start.elapsed() >= Duration::from_millis(2_800),
        "{:?}",
        start.elapsed()
    );
    assert!(worker.metric("farshore_write_units_total").await >= 120.0);
    assert!(worker.stop().await.success());
}
