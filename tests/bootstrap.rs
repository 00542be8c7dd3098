//! The first copy of a table: under load, through kills, splits and refusals, and never called whole before
//! it is.

mod common;
mod suite;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use aws_sdk_dynamodb::types::{
    BillingMode, GlobalSecondaryIndex, KeyType, Projection, ProjectionType, ScalarAttributeType,
};
use common::binary::{Worker, provision, run, stderr, stdout};
use common::stand::{Stand, attribute, delete, key, n, put, s, text_of};
use common::{checker, eventually, long, seed};
use farshore::embedded::gateway::{Fault, Options};
use futures::StreamExt;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use suite::reconcile::{item, plain, put_all};
use suite::whole::{
    WITHIN, assert_whole, green_and_right, is_green, large, open_rows, some_changes, some_of,
};

/// A source with `items` items of which its stream remembers nothing, provisioned, nobody at work.
async fn held(stand: &Stand, items: usize, more: &str) -> (String, std::path::PathBuf) {
    let table = stand.table("orders");
    stand.create_source(&table).await;
    let mut random = StdRng::seed_from_u64(1);
    let all: Vec<_> = (0..items).map(|id| item(id, &mut random)).collect();
    put_all(&stand.source, &table, all).await;
    stand.gateways[0].trim(&table);
    let config = stand.config(&[&table], more);
    provision(&config);
    (table, config)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_under_load_survives_kills_and_splits() {
    let first = seed();
    // Most of it is waiting.
    let seeds = futures::stream::iter(first..first + long(20, 1));
    let run = async |seed| {
        println!("FARSHORE_TEST_SEED={seed}");
        under_load(seed).await;
        println!("seed {seed} ok");
    };
    seeds.for_each_concurrent(2, run).await;
}

/// Two workers copy; they are killed and started again while the source is written to and its shards
/// are split.
async fn under_load(seed: u64) {
    let mut random = StdRng::seed_from_u64(seed);
    let source = Options::new(seed)
        .shards(3)
        .rotate_every(Duration::from_secs(3))
        .split_every(Duration::from_secs(4));
    let stand = Stand::gateways(source, Options::new(seed)).await;
    let items = 1_500;
    let more = "[reconcile]\nsegments = 6\nread_units_per_second = 600\n";
    let (table, config) = held(&stand, items, more).await;
    let other = stand.config(&[&table], more);
    for (region, fault) in [
        (0, Fault::unavailable().chance(0.02)),
        (0, Fault::error_before().on("Scan").chance(0.1)),
        (0, Fault::error_before().on("BatchGetItem").chance(0.05)),
        (1, Fault::error_before().on("BatchWriteItem").chance(0.05)),
        (1, Fault::error_after().on("BatchWriteItem").chance(0.03)),
        (1, Fault::unprocessed(0.3).chance(0.2)),
    ] {
        stand.gateways[region].inject(fault);
    }
    let stop = Arc::new(AtomicBool::new(false));
    let changes = Arc::new(AtomicU64::new(0));
    let load = {
        let (stop, client, table) = (Arc::clone(&stop), stand.source.clone(), table.clone());
        let changes = Arc::clone(&changes);
        let mut random = StdRng::seed_from_u64(seed ^ 7);
        tokio::spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                let id = format!("k{}", random.random_range(0..2_000));
                // Refused for a moment: the application would try again.
                let done = match random.random_range(0..3) {
                    0 => {
                        let call = client.delete_item().table_name(&table);
                        call.key("id", s(id)).send().await.is_ok()
                    }
                    _ => {
                        let call = client.put_item().table_name(&table).item("id", s(id));
                        let call = call.item("v", n(random.random::<u32>()));
                        call.send().await.is_ok()
                    }
                };
                changes.fetch_add(u64::from(done), Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
    };
    let mut workers = [Some(Worker::start(&config)), Some(Worker::start(&other))];
    let configs = [&config, &other];
    let begun = Instant::now();
    let mut kills = 0;
    // A busy machine takes longer to bring as much about.
    let is_enough = |kills| kills >= 4 && changes.load(Ordering::Relaxed) > 200;
    while begun.elapsed() < Duration::from_secs(9)
        || !is_enough(kills) && begun.elapsed() < Duration::from_secs(60)
    {
        tokio::time::sleep(Duration::from_millis(random.random_range(300..1_200))).await;
        let at = random.random_range(0..2);
        if let Some(worker) = workers[at].take() {
            worker.kill();
            kills += 1;
        }
        tokio::time::sleep(Duration::from_millis(random.random_range(0..600))).await;
        workers[at] = Some(Worker::start(configs[at]));
    }
    stop.store(true, Ordering::Relaxed);
    load.await.unwrap();
    for gateway in &stand.gateways {
        gateway.clear_faults();
        gateway.stop_resharding();
    }
    assert!(is_enough(kills), "{kills} kills, {changes:?} changes");
    let [worker, _other] = &workers;
    let worker = worker.as_ref().unwrap();
    green_and_right(&stand, &table, worker, Duration::from_secs(120)).await;
    assert!(checker::items(&stand.target, &table).await.len() > 500);
    assert_eq!(open_rows(&stand).await, [""; 0]);
    for worker in workers.into_iter().flatten() {
        assert!(worker.stop().await.success());
    }
}

/// Killed at each of its steps it is gone on with, and nobody says meanwhile that all is well.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_that_dies_at_any_step_is_gone_on_with() {
    let steps = [
        "bootstrap-planned",
        "stream-pinned",
        "leases-made",
        "page-mended",
        "segment-read",
        "gap-closed",
        "job-ended",
        "job-removed",
    ];
    for step in some_of(&steps, 3) {
        println!("step {step}");
        let stand = Stand::gateways(Options::new(1), Options::new(1)).await;
        let (table, config) = held(&stand, 120, "[reconcile]\nsegments = 2\n").await;
        let variable = [("FARSHORE_TEST_CRASH", step)];
        let mut worker = Worker::start_with(&config, &variable);
        let begun = Instant::now();
        while worker.exited().is_none() {
            if is_green(&worker).await {
                assert_eq!(stand.differences(&table).await, [""; 0], "{step}: green");
            }
            assert!(begun.elapsed() < WITHIN, "{step}: it never came to it");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let status = run(&["status", "--config", config.to_str().unwrap()]);
        assert_eq!(status.status.code(), Some(1), "{step}: {}", stdout(&status));
        if step != "job-removed" {
            // What is changed now, nobody sees but the stream.
            put(&stand.source, &table, "k3", 7).await;
            delete(&stand.source, &table, "k4").await;
        }
        let worker = Worker::start(&config);
        green_and_right(&stand, &table, &worker, WITHIN).await;
        assert_whole(&stand, &table, &config).await;
        assert!(worker.stop().await.success());
    }
}

/// What is deleted while the copy is under way stays deleted, however long it takes: much longer than
/// the stream remembers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_may_take_longer_than_the_stream_remembers() {
    let source = Options::new(seed()).retention(Duration::from_secs(2));
    let stand = Stand::gateways(source, Options::new(1)).await;
    let table = stand.table("orders");
    stand.create_source(&table).await;
    put_all(&stand.source, &table, (0..300).map(|id| large(id, id))).await;
    // A page of some 30 items costs 125 units to scan, and each item 8 more.
    let more = "[reconcile]\nsegments = 1\nread_units_per_second = 400\n";
    let config = stand.config(&[&table], more);
    provision(&config);
    let worker = Worker::start(&config);
    let copied = async || checker::items(&stand.target, &table).await.len() >= 30;
    eventually("a part is copied", WITHIN, copied).await;
    let begun = Instant::now();
    for id in (0..300).step_by(3) {
        delete(&stand.source, &table, &format!("k{id}")).await;
        tokio::time::sleep(Duration::from_millis(40)).await;
    }
    assert!(begun.elapsed() > Duration::from_secs(4));
    assert!(!is_green(&worker).await);
    green_and_right(&stand, &table, &worker, WITHIN).await;
    assert_eq!(checker::items(&stand.target, &table).await.len(), 200);
    assert_eq!(worker.metric("farshore_gaps_open").await, 0.0);
    assert_whole(&stand, &table, &config).await;
    assert!(worker.stop().await.success());
}

/// What the replica refuses is a dead letter that says where it comes from; the copy ends all the same,
/// and a redrive brings it home.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_replica_refuses_in_a_copy_is_a_dead_letter() {
    let stand = Stand::gateways(Options::new(1), Options::new(1)).await;
    let (table, config) = held(&stand, 10, "").await;
    let gone = stand.target.delete_table().table_name(&table);
    gone.send().await.unwrap();
    // An index by `v`, as text: numbers do not fit it.
    let index = GlobalSecondaryIndex::builder()
        .index_name("by-v")
        .key_schema(key("v", KeyType::Hash))
        .projection(
            Projection::builder()
                .projection_type(ProjectionType::KeysOnly)
                .build(),
        );
    let create = stand.target.create_table().table_name(&table);
    create
        .attribute_definitions(attribute("id", ScalarAttributeType::S))
        .attribute_definitions(attribute("v", ScalarAttributeType::S))
        .key_schema(key("id", KeyType::Hash))
        .global_secondary_indexes(index.build().unwrap())
        .billing_mode(BillingMode::PayPerRequest)
        .send()
        .await
        .unwrap();
    let worker = Worker::start(&config);
    let copied = async || {
        let (_, body) = worker.get("/readyz").await.unwrap_or_default();
        !body.contains("copying") && !body.contains("starting") && stand.dead_letters().len() >= 10
    };
    eventually("the copy has ended", WITHIN, copied).await;
    let letters = stand.dead_letters();
    let of_copy = letters.iter().filter(|one| one["origin"] == "bootstrap");
    assert_eq!(of_copy.count(), 10, "{letters:?}");
    assert!(letters.iter().all(|one| one["keys"]["id"]["S"].is_string()));
    assert_eq!(open_rows(&stand).await, [""; 0]);
    let path = config.to_str().unwrap();
    let listed = run(&["dead-letters", "--config", path]);
    assert!(
        stdout(&listed).contains("(bootstrap)"),
        "{}",
        stdout(&listed)
    );
    for id in 0..10 {
        put_text(&stand, &table, id).await;
    }
    stand.converge(&table, 10).await;
    let redriven = run(&["redrive", "--apply", "--config", path]);
    assert!(redriven.status.success(), "{}", stderr(&redriven));
    assert!(worker.stop().await.success());
}

async fn put_text(stand: &Stand, table: &str, id: usize) {
    let call = stand.source.put_item().table_name(table);
    let call = call.item("id", s(format!("k{id}"))).item("v", s("text"));
    call.send().await.unwrap();
}

/// What only the replica holds is deleted within the limit, and beyond it a person says so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deletes_beyond_the_limit_wait_for_a_person() {
    let stand = Stand::gateways(Options::new(1), Options::new(1)).await;
    let (table, config) = held(&stand, 50, "").await;
    put_all(&stand.target, &table, (100..140).map(plain)).await;
    put_all(&stand.target, &table, (0..10).map(plain)).await;
    // One of the others is refused, and stays so.
    let refused = Fault::code(400, "ValidationException", "Type mismatch for Index Key");
    let refused = refused.on("BatchWriteItem").key("\"k49\"");
    stand.gateways[1].inject(refused);
    let worker = Worker::start(&config);
    let mut body = String::new();
    let begun = Instant::now();
    while !body.contains("deletes-outstanding (40)") {
        assert!(begun.elapsed() < WITHIN, "{body}");
        tokio::time::sleep(Duration::from_millis(50)).await;
        (_, body) = worker.get("/readyz").await.unwrap_or_default();
    }
    // All else is right already, or a dead letter.
    assert_eq!(stand.differences(&table).await.len(), 41);
    let command = format!("reconcile --table {table} --apply --max-deletes 40");
    assert!(body.contains(&command), "{body}");
    let path = config.to_str().unwrap();
    let status = run(&["status", "--config", path]);
    assert_eq!(status.status.code(), Some(1));
    assert!(stdout(&status).contains(&command), "{}", stdout(&status));
    assert_eq!(worker.metric("farshore_deletes_outstanding").await, 40.0);
    // Still so after a restart: nobody deletes, and nobody calls it whole.
    assert!(worker.stop().await.success());
    let worker = Worker::following(&config).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(!is_green(&worker).await);
    assert_eq!(stand.differences(&table).await.len(), 41);
    let arguments: Vec<&str> = command.split(' ').collect();
    let done = run(&[&arguments[..], &["--config", path]].concat());
    // The one that is refused is left.
    let told = format!("{}{}", stdout(&done), stderr(&done));
    assert_eq!(done.status.code(), Some(1), "{told}");
    // The worker looks once more, and is done: what is refused is a dead letter.
    eventually("it is green", WITHIN, async || is_green(&worker).await).await;
    let differences = stand.differences(&table).await;
    assert!(
        differences.len() == 1 && differences[0].contains("k49"),
        "{differences:?}"
    );
    assert!(
        stand
            .dead_letters()
            .iter()
            .all(|one| one["origin"] == "bootstrap")
    );
    assert_eq!(open_rows(&stand).await, [""; 0]);
    assert!(worker.stop().await.success());
}

/// An empty source and a replica that is not: no copy, and no silence, however few items it holds.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_empty_source_empties_no_replica() {
    let stand = Stand::gateways(Options::new(1), Options::new(1)).await;
    let (table, config) = held(&stand, 0, "").await;
    put_all(&stand.target, &table, (0..7).map(plain)).await;
    let worker = Worker::following(&config).await;
    let outstanding = async || {
        let (_, body) = worker.get("/readyz").await.unwrap_or_default();
        body.contains("deletes-outstanding (7)")
    };
    eventually("it says so", WITHIN, outstanding).await;
    assert_eq!(checker::items(&stand.target, &table).await.len(), 7);
    assert!(worker.stop().await.success());
}

/// A copy heeds the tap, and a person's repair beside it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_heeds_the_tap() {
    let stand = Stand::gateways(Options::new(1), Options::new(1)).await;
    let more = "[reconcile]\nread_units_per_second = 100\n";
    let (table, config) = held(&stand, 1_500, more).await;
    let path = config.to_str().unwrap().to_owned();
    let worker = Worker::start(&config);
    let copied = async || checker::items(&stand.target, &table).await.len() >= 25;
    eventually("a part is copied", WITHIN, copied).await;
    let refused = run(&["reconcile", "--apply", "--config", &path]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(
        stderr(&refused).contains("worker's own"),
        "{}",
        stderr(&refused)
    );
    let paused = run(&["pause", "--reason", "test", "--apply", "--config", &path]);
    assert!(paused.status.success(), "{}", stderr(&paused));
    let written = checker::items(&stand.target, &table).await.len();
    assert!(written < 1_500, "too fast to be tested");
    tokio::time::sleep(Duration::from_millis(700)).await;
    let then = checker::items(&stand.target, &table).await.len();
    tokio::time::sleep(Duration::from_secs(2)).await;
    let now = checker::items(&stand.target, &table).await.len();
    assert_eq!(then, now, "written although the tap is closed");
    let mut random = StdRng::seed_from_u64(1);
    some_changes(&stand, &table, 100, &mut random).await;
    let resumed = run(&["resume", "--reason", "test", "--apply", "--config", &path]);
    assert!(resumed.status.success(), "{}", stderr(&resumed));
    green_and_right(&stand, &table, &worker, WITHIN).await;
    assert_whole(&stand, &table, &config).await;
    assert!(worker.stop().await.success());
}

/// What a copy costs is what it says, at most: a scan of each side, and one more read by key and one write
/// of each item that the replica lacks.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_scans_once_and_reads_each_item_once_more() {
    let stand = Stand::gateways(Options::new(1), Options::new(1).metered()).await;
    let (items, there) = (300, 100);
    let (table, config) = held(&stand, items, "").await;
    // Some of it was brought over by other means.
    let mut random = StdRng::seed_from_u64(1);
    let all: Vec<_> = (0..items).map(|id| item(id, &mut random)).collect();
    put_all(&stand.target, &table, all[..there].to_vec()).await;
    let mark = stand.gateways[1].next_call();
    let worker = Worker::start(&config);
    green_and_right(&stand, &table, &worker, WITHIN).await;
    let keys_read = |region: usize| -> usize {
        let calls = stand.gateways[region].calls_of("BatchGetItem");
        let of_table = calls.iter().filter(|call| call.tables.contains(&table));
        of_table.map(|call| call.keys.len()).sum()
    };
    // The start asks each side for one key, to see whether it may.
    assert_eq!((keys_read(0), keys_read(1)), (items - there + 1, 1));
    let said = text_of(&worker.log);
    let said = said.lines().find(|line| line.contains("what it will cost"));
    let said = said.unwrap().to_owned();
    let number = |name: &str| -> f64 {
        let rest = said.split(&format!("{name}=")).nth(1).unwrap();
        rest.split(' ').next().unwrap().parse().unwrap()
    };
    // Each item is smaller than a unit, and all of them smaller than a page.
    let said = number("source_read_units");
    assert!(
        (items as f64 + 1.0..items as f64 + 10.0).contains(&said),
        "{said}"
    );
    // A page or two for the copy, and looks at whether there is anything and whether it may be read.
    let scans = stand.gateways[0]
        .calls_where(|call| call.operation == "Scan" && call.tables.contains(&table));
    assert!(scans.len() <= 4, "{}", scans.len());
    let writes = stand.gateways[1]
        .calls_where(|call| call.operation == "BatchWriteItem" && call.number >= mark);
    let written: f64 = writes.iter().map(|call| call.units).sum();
    assert_eq!(written, (items - there) as f64);
    assert_eq!(number("write_units"), items as f64);
    assert!(worker.stop().await.success());
}
