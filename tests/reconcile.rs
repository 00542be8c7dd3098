//! Reconcile: what differs is found, what is in flight is not, and what is repaired stays.

mod common;
mod suite;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::binary::{Worker, farshore, provision, run, spawn, stderr, stdout};
use common::stand::{
    SOURCE, Stand, TARGET, attribute, create_table, delete, key, put, s, state_rows,
};
use common::{eventually, long, seed};
use farshore::embedded::gateway::{Fault, Options};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use suite::reconcile::{
    Item, assert_same, counted, drift_is_found_and_repaired, drifted, ends, item, pair, plain,
    put_all, reconcile, refused, reported,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn drift_of_every_kind_is_found_and_repaired() {
    let first = seed();
    for seed in first..first + long(94, 4) {
        drift_is_found_and_repaired(&Stand::new().await, seed).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_items_that_wait_than_memory_allows_are_looked_up() {
    let stand = Stand::gateways(Options::new(1), Options::new(1)).await;
    let (table, config) = pair(&stand, "[reconcile]\nmemory = \"1 MiB\"\nsegments = 4\n").await;
    // Pages of some hundred items, so that many wait before a side has ended.
    let large = |id: usize| {
        Item::from([
            ("id".to_owned(), s(format!("k{id}"))),
            ("text".to_owned(), s("x".repeat(3_200))),
        ])
    };
    tokio::join!(
        put_all(&stand.source, &table, (0..3_000).map(large)),
        put_all(&stand.target, &table, (2_900..5_900).map(large))
    );
    // Reads by key, counted by a fault that does nothing.
    let counted_reads = |memory: &str| {
        let text = std::fs::read_to_string(&config).unwrap();
        let config = config.with_file_name("memory.toml");
        let memory = format!("memory = \"{memory}\"");
        std::fs::write(&config, text.replace("memory = \"1 MiB\"", &memory)).unwrap();
        let reads = Fault::slow_answer(Duration::ZERO).on("BatchGetItem");
        let reads = stand.gateways[1].inject(reads);
        let dry = ends(1, &config, &[]);
        assert_eq!(counted(&dry), (2_900, 0, 2_900));
        reads.off();
        reads.hits()
    };
    let (little, much) = (counted_reads("1 MiB"), counted_reads("256 MB"));
    // Some hundred in each segment, a hundred a call, beside the looks that both need.
    assert!(
        little >= much + 4,
        "{little} reads by key, {much} with much memory"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deletes_beyond_the_limit_end_the_job_before_the_first() {
    let stand = Stand::new().await;
    let (table, config) = pair(&stand, "").await;
    for id in 0..40 {
        put(&stand.source, &table, &format!("k{id}"), id).await;
        put(&stand.target, &table, &format!("k{id}"), id % 39).await;
    }
    for id in 0..11 {
        put(&stand.target, &table, &format!("x{id}"), id).await;
    }
    let ended = ends(1, &config, &["--apply"]);
    assert_eq!(counted(&ended), (0, 1, 11));
    let why = ended["ended"].as_str().unwrap();
    assert!(
        why.contains("11 items") && why.contains("10 may be deleted"),
        "{why}"
    );
    // What is no delete is repaired, and no item is gone.
    assert_eq!(stand.differences(&table).await.len(), 11);
    let done = ends(0, &config, &["--apply", "--max-deletes", "11"]);
    assert_eq!(done["repaired"], 11);
    stand.converge(&table, 40).await;
}

/// Writes to the source until told to stop: every value is another one, deletes between them.
async fn write_on(stand: &Stand, table: &str, seed: u64, stop: &AtomicBool) -> usize {
    let mut random = StdRng::seed_from_u64(seed);
    let mut writes = 0;
    while !stop.load(Ordering::Relaxed) {
        let id = format!("k{}", random.random_range(0..400));
        match random.random_range(0..5) {
            0 => delete(&stand.source, table, &id).await,
            _ => put(&stand.source, table, &id, writes).await,
        }
        writes += 1;
    }
    writes
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_in_flight_is_no_drift() {
    let seed = seed();
    // Answers that take their time leave much in flight.
    let stand = Stand::gateways(Options::new(2), Options::new(1)).await;
    let (table, config) = pair(&stand, "").await;
    let slow = Fault::slow_answer(Duration::from_millis(120)).on("BatchWriteItem");
    stand.gateways[1].inject(slow.chance(0.5));
    let worker = Worker::following(&config).await;
    let stop = Arc::new(AtomicBool::new(false));
    let comparing = async {
        let mut suspects = 0;
        for _ in 0..long(20, 4) {
            let config = config.clone();
            let seen = tokio::task::spawn_blocking(move || ends(0, &config, &["--settle", "1s"]));
            let seen = seen.await.unwrap();
            assert_eq!(counted(&seen), (0, 0, 0), "seed {seed}");
            suspects += seen["suspects"].as_u64().unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        suspects
    };
    let (suspects, writes) = tokio::join!(comparing, write_on(&stand, &table, seed, &stop));
    assert!(suspects > 0, "nothing was in flight after {writes} writes");
    stand.converge(&table, 1).await;
    assert!(worker.stop().await.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn drift_is_found_and_repaired_beside_the_worker() {
    let seed = seed();
    let stand = Stand::gateways(Options::new(2), Options::new(1)).await;
    let (table, config) = pair(&stand, "").await;
    for id in 0..60 {
        put(&stand.source, &table, &format!("quiet{id}"), id).await;
    }
    let worker = Worker::following(&config).await;
    stand.converge(&table, 60).await;
    // Somebody else writes to the replica.
    for id in 0..20 {
        put(&stand.target, &table, &format!("quiet{id}"), 1_000).await;
        delete(&stand.target, &table, &format!("quiet{}", id + 20)).await;
    }
    for id in 0..5 {
        put(&stand.target, &table, &format!("stray{id}"), id).await;
    }
    let stop = Arc::new(AtomicBool::new(false));
    let comparing = async {
        let blocking = |more: &'static [&'static str], code| {
            let config = config.clone();
            tokio::task::spawn_blocking(move || ends(code, &config, more))
        };
        let dry = blocking(&["--settle", "1s"], 1).await.unwrap();
        let done = blocking(&["--settle", "1s", "--apply"], 0).await.unwrap();
        stop.store(true, Ordering::Relaxed);
        (counted(&dry), counted(&done))
    };
    let ((dry, done), _) = tokio::join!(comparing, write_on(&stand, &table, seed, &stop));
    assert_eq!((dry, done), ((20, 20, 5), (20, 20, 5)), "seed {seed}");
    stand.converge(&table, 60).await;
    assert!(worker.stop().await.success());
}

/// The failback of DESIGN section 8, without its fence: the primary was cut off, the standby took
/// writes, and some writes never left the primary.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_that_was_cut_off_is_made_as_the_standby() {
    let (taken, stranded) = (long(10_000, 600) as usize, long(500, 40) as usize);
    let mut random = StdRng::seed_from_u64(seed());
    let stand = Stand::new().await;
    let (table, config) = pair(&stand, "").await;
    let items = taken * 2;
    // State tables on both sides: each region has fed the other once.
    let text = std::fs::read_to_string(&config).unwrap();
    let at_home = config.with_file_name("home.toml");
    let here = |label: &str| format!("here = \"{label}\"");
    std::fs::write(&at_home, text.replace(&here(TARGET), &here(SOURCE))).unwrap();
    provision(&at_home);
    let all: Vec<Item> = (0..items).map(|id| item(id, &mut random)).collect();
    put_all(&stand.source, &table, all.clone()).await;
    let worker = Worker::following(&config).await;
    stand.converge(&table, items).await;
    let home = ["--source", TARGET, "--target", SOURCE];
    refused(
        &config,
        &[&home[..], &["--apply"]].concat(),
        &["feeds the other way round", "stop the worker"],
    );
    // One that was killed owns its shards for ever, and does not stand in the way for ever.
    worker.kill();
    let mut expected = BTreeMap::new();
    let mut writes = Vec::new();
    for (id, one) in all.iter().enumerate().take(taken) {
        match id % 10 {
            0 => {
                delete(&stand.target, &table, &format!("k{id}")).await;
                expected.insert(format!("k{id}"), "extra");
            }
            1 => {
                writes.push(item(items + id, &mut random));
                expected.insert(format!("k{}", items + id), "missing");
            }
            _ => {
                writes.push(drifted(one, &mut random));
                expected.insert(format!("k{id}"), "changed");
            }
        }
    }
    put_all(&stand.target, &table, writes).await;
    for number in 0..stranded {
        // Some of the same items, and some new ones.
        let (id, kind) = match number % 2 {
            0 => (format!("k{}", taken - 1 - number), "changed"),
            _ => (format!("stranded{number}"), "extra"),
        };
        put(&stand.source, &table, &id, 1_000_000 + number).await;
        // What the standby left alone differs now, too.
        expected.entry(id).or_insert(kind);
    }
    let report = stand.temp.path().join("report.jsonl");
    let named = [&home[..], &["--report", report.to_str().unwrap()]].concat();
    let dry = reconcile(&config, &named);
    assert_eq!(
        dry.status.code(),
        Some(1),
        "{}{}",
        stdout(&dry),
        stderr(&dry)
    );
    let kinds: BTreeMap<String, String> = expected
        .iter()
        .map(|(key, kind)| (key.clone(), (*kind).to_owned()))
        .collect();
    assert_same(&reported(&report), &kinds, "");
    // The tap of the other direction says nothing of this one.
    let path = config.to_str().unwrap();
    run(&[
        "pause",
        "--apply",
        "--reason",
        "home again",
        "--config",
        path,
    ]);
    let plan = reconcile(
        &config,
        &[&home[..], &["--apply", "--max-deletes", "10%"]].concat(),
    );
    let told = stderr(&plan);
    assert!(
        told.contains(&format!(
            "will OVERWRITE {table} in {SOURCE}, the ACTIVE region"
        )),
        "{told}"
    );
    assert_eq!(plan.status.code(), Some(0), "{}{told}", stdout(&plan));
    assert_eq!(stand.differences(&table).await, [""; 0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn its_own_writes_that_take_effect_late_are_repaired() {
    let stand = Stand::gateways(Options::new(1), Options::new(1)).await;
    let (table, config) = pair(&stand, "").await;
    let worker = Worker::following(&config).await;
    for id in 0..60 {
        put(&stand.source, &table, &format!("k{id}"), 1).await;
    }
    stand.converge(&table, 60).await;
    for id in 0..60 {
        put(&stand.target, &table, &format!("k{id}"), 0).await;
    }
    // One of its writes is held beyond its patience. Meanwhile the worker brings something newer.
    let replica = &stand.gateways[1];
    replica.inject(Fault::hold_until_delivered().on("BatchWriteItem").once());
    let repairing = {
        let config = config.clone();
        tokio::task::spawn_blocking(move || reconcile(&config, &["--apply", "--settle", "1s"]))
    };
    assert!(replica.wait_for_held(1, Duration::from_secs(60)).await);
    for id in 0..60 {
        put(&stand.source, &table, &format!("k{id}"), 2).await;
    }
    let newer = async || {
        let held = common::checker::items(&stand.target, &table).await;
        held.values().all(|item| item.contains("N2"))
    };
    eventually(
        "the worker brings the newer items",
        Duration::from_secs(20),
        newer,
    )
    .await;
    let held = replica.held();
    replica.deliver(held[0].call).await.unwrap();
    assert!(
        !stand.differences(&table).await.is_empty(),
        "the late write did nothing"
    );
    let output = repairing.await.unwrap();
    let told = format!("{}{}", stdout(&output), stderr(&output));
    assert_eq!(output.status.code(), Some(0), "{told}");
    assert_eq!(stand.differences(&table).await, [""; 0], "{told}");
    assert!(worker.stop().await.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_repair_is_finished_by_the_next_and_an_interrupted_one_says_so() {
    let stand = Stand::gateways(Options::new(1), Options::new(1)).await;
    let (table, config) = pair(&stand, "").await;
    put_all(&stand.source, &table, (0..600).map(plain)).await;
    let slow = Fault::slow_answer(Duration::from_millis(800)).on("BatchWriteItem");
    let slow = stand.gateways[1].inject(slow);
    let path = config.to_str().unwrap();
    let start = || {
        let mut command = farshore(&["reconcile", "--apply", "--config", path]);
        command
            .stderr(std::process::Stdio::null())
            .stdout(std::process::Stdio::null());
        spawn(command).unwrap()
    };
    let mut killed = start();
    let some = async || {
        !common::checker::items(&stand.target, &table)
            .await
            .is_empty()
    };
    eventually("something is repaired", Duration::from_secs(20), some).await;
    killed.kill().unwrap();
    killed.wait().unwrap();
    refused(
        &config,
        &["--apply"],
        &["reconcile of orders", "may take effect until"],
    );
    // A late effect (5 s) and a lease (3 s) after its last renewal.
    let free = async || {
        let rows = state_rows(&stand.target, &stand.state_table()).await;
        let segments = rows.iter().filter(|row| row["entityType"] == s("segment"));
        let until = segments.map(|row| row["until"].as_n().unwrap().parse::<i64>().unwrap());
        until.max().unwrap() < farshore::dynamo::clock::host_ms()
    };
    eventually("its writes are dead", Duration::from_secs(20), free).await;
    // What it wrote last nobody verified: that is an alarm.
    let status = run(&["status", "--config", path]);
    assert_eq!(status.status.code(), Some(1), "{}", stdout(&status));
    assert!(
        stdout(&status).contains("reconcile-unfinished"),
        "{}",
        stdout(&status)
    );
    let mut interrupted = start();
    let before = common::checker::items(&stand.target, &table).await.len();
    let more = async || common::checker::items(&stand.target, &table).await.len() > before;
    eventually("it goes on", Duration::from_secs(20), more).await;
    let pid = rustix::process::Pid::from_raw(interrupted.id().cast_signed()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    assert_eq!(interrupted.wait().unwrap().code(), Some(130));
    slow.off();
    // What was under way when it was interrupted was verified, or its row says that it was not.
    let free = async || reconcile(&config, &["--apply"]).status.code() == Some(0);
    eventually("the next one repairs", Duration::from_secs(30), free).await;
    assert_eq!(stand.differences(&table).await, [""; 0]);
    let status = run(&["status", "--config", path]);
    assert!(
        !stdout(&status).contains("reconcile-unfinished"),
        "{}",
        stdout(&status)
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_compared_is_refused_with_a_reason() {
    let stand = Stand::gateways(Options::new(1), Options::new(1)).await;
    let (table, config) = pair(&stand, "").await;
    put(&stand.target, &table, "only", 1).await;
    refused(
        &config,
        &["--apply"],
        &["is empty in us-east-1", "lose all its items"],
    );
    ends(1, &config, &[]);
    refused(
        &config,
        &["--target", "us-east-1"],
        &["with itself", "Name two regions"],
    );
    refused(
        &config,
        &["--target", "us-nowhere"],
        &["us-nowhere is not known", "us-west-2"],
    );
    refused(&config, &["--table", "ordres"], &["no table `ordres`"]);
    let report = stand.temp.path().join("farshore.toml");
    std::fs::write(&report, "mine").unwrap();
    refused(
        &config,
        &["--report", report.to_str().unwrap()],
        &["could not be made", "does not exist yet"],
    );
    assert_eq!(std::fs::read_to_string(&report).unwrap(), "mine");
    // Where the active region is at home, the target has to be named.
    let text = std::fs::read_to_string(&config).unwrap();
    let at_home = config.with_file_name("home.toml");
    std::fs::write(
        &at_home,
        text.replace("here = \"us-west-2\"", "here = \"us-east-1\""),
    )
    .unwrap();
    refused(&at_home, &[], &["no --target was named"]);
    // A closed tap stops this, too.
    run(&[
        "pause",
        "--apply",
        "--reason",
        "test",
        "--config",
        config.to_str().unwrap(),
    ]);
    put(&stand.source, &table, "some", 1).await;
    refused(
        &config,
        &["--apply"],
        &["the tap of all tables is closed", "resume"],
    );
    run(&[
        "resume",
        "--apply",
        "--reason",
        "test",
        "--config",
        config.to_str().unwrap(),
    ]);
    // No permission on one side.
    for (gateway, region) in [(0, "us-east-1"), (1, "us-west-2")] {
        let denied = Fault::code(
            400,
            "AccessDeniedException",
            "not authorized to perform: Scan",
        );
        let denied = stand.gateways[gateway].inject(denied.on("Scan"));
        refused(&config, &[], &["could not be read", region, "AccessDenied"]);
        denied.off();
    }
    let left = ends(1, &config, &["--apply", "--max-deletes", "0"]);
    assert_eq!(counted(&left), (1, 0, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tables_with_other_keys_or_the_same_table_twice_are_refused() {
    use aws_sdk_dynamodb::types::{BillingMode, KeyType, ScalarAttributeType};
    let stand = Stand::new().await;
    let table = stand.table("orders");
    create_table(&stand.source, &table, None).await;
    let other = stand.target.create_table().table_name(&table);
    let other = other
        .attribute_definitions(attribute("other", ScalarAttributeType::N))
        .key_schema(key("other", KeyType::Hash))
        .billing_mode(BillingMode::PayPerRequest);
    other.send().await.unwrap();
    let config = stand.config(&[&table], "");
    refused(
        &config,
        &[],
        &[
            "another key in each region",
            "id (S, HASH)",
            "other (N, HASH)",
        ],
    );
    let letters = format!("[dead_letters]\ndirectory = {:?}\n", stand.letters());
    let twice = stand.config_at(&stand.source_url, &stand.source_url, &[&table], &letters);
    refused(&twice, &[], &["with itself", "lead to the same table"]);
}
