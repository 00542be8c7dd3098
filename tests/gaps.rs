//! The way back from a gap: found, drained, repaired, closed; killed at any step gone on with; and never
//! called whole before it is.

mod common;
mod suite;

use std::path::Path;
use std::time::{Duration, Instant};

use aws_sdk_dynamodb::types::StreamViewType;
use common::binary::{Worker, provision, run, stderr, stdout};
use common::stand::{Stand, delete, n, put, s, state_rows, text_of};
use common::{eventually, long, seed};
use farshore::embedded::EmbeddedServer;
use farshore::embedded::gateway::{Fault, Options};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use suite::reconcile::{is_of_job, plain, put_all};
use suite::whole::{
    WITHIN, assert_whole, green_and_right, is_green, open_rows, set_stream, some_changes, some_of,
};

const ITEMS: usize = 200;

/// A replica that was equal once, with nobody at work: the worker was stopped, or killed.
async fn left(stand: &Stand, more: &str, killed: bool) -> (String, std::path::PathBuf) {
    let table = stand.table("orders");
    let (config, worker) = suite::replicated(stand, &table, more).await;
    put_all(&stand.source, &table, (0..ITEMS).map(plain)).await;
    stand.converge(&table, ITEMS).await;
    match killed {
        true => worker.kill(),
        false => assert!(worker.stop().await.success()),
    }
    (table, config)
}

/// Changes of every kind that the stream forgets before anybody reads them.
async fn lose(stand: &Stand, table: &str, random: &mut StdRng) {
    some_changes(stand, table, ITEMS, random).await;
    stand.gateways[0].trim(table);
}

/// The whole fleet was away for longer than the stream remembers: writes and deletes before, in and
/// after the gap, and all of it is as in the source at the end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_stream_forgot_is_repaired_and_the_gap_is_closed() {
    let mut random = StdRng::seed_from_u64(seed());
    let first: bool = random.random();
    for killed in [first, !first].into_iter().take(long(2, 1) as usize) {
        let stand = Stand::gateways(Options::new(1).shards(2), Options::new(1)).await;
        let more = "[reconcile]\nmax_deletes = \"50%\"\nsegments = 3\n";
        let (table, config) = left(&stand, more, killed).await;
        lose(&stand, &table, &mut random).await;
        some_changes(&stand, &table, ITEMS / 4, &mut random).await;
        assert!(stand.differences(&table).await.len() > 20);
        let other = stand.config(&[&table], more);
        let worker = Worker::start(&config);
        let second = Worker::start(&other);
        some_changes(&stand, &table, ITEMS / 4, &mut random).await;
        green_and_right(&stand, &table, &worker, WITHIN).await;
        // A killed worker's writes are in doubt, and what was in doubt the stream has forgotten, too.
        let settled = async || {
            let rows = state_rows(&stand.target, &stand.state_table()).await;
            !rows.iter().any(|row| row["entityType"] == s("doubt"))
        };
        eventually("no doubt is left", WITHIN, settled).await;
        green_and_right(&stand, &table, &worker, WITHIN).await;
        let mut told = 0;
        for worker in [&worker, &second] {
            told += worker.logged("gap closed");
            // Each sees it when it reads the state table next.
            let closed = async || worker.metric("farshore_gaps_open").await == 0.0;
            eventually("no gap is shown", WITHIN, closed).await;
        }
        assert!(told >= 1);
        assert_whole(&stand, &table, &config).await;
        assert!(worker.stop().await.success());
        assert!(second.stop().await.success());
    }
}

/// A stream made anew: what was written while there was none is found and repaired.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_written_without_a_stream_is_repaired() {
    let mut random = StdRng::seed_from_u64(seed());
    let stand = Stand::gateways(Options::new(1).shards(2), Options::new(1)).await;
    let table = stand.table("orders");
    let more = "[reconcile]\nmax_deletes = \"50%\"\n";
    let (config, worker) = suite::replicated(&stand, &table, more).await;
    put_all(&stand.source, &table, (0..ITEMS).map(plain)).await;
    stand.converge(&table, ITEMS).await;
    some_changes(&stand, &table, ITEMS / 4, &mut random).await;
    set_stream(&stand, &table, None).await;
    some_changes(&stand, &table, ITEMS, &mut random).await;
    set_stream(&stand, &table, Some(StreamViewType::NewAndOldImages)).await;
    some_changes(&stand, &table, ITEMS / 4, &mut random).await;
    let closed = async || worker.logged("gap closed") >= 1;
    eventually("the gap is found and closed", WITHIN, closed).await;
    green_and_right(&stand, &table, &worker, WITHIN).await;
    assert_whole(&stand, &table, &config).await;
    assert!(worker.stop().await.success());
}

/// A shard that is gone before its end, with all that it held.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_vanished_shard_held_is_repaired() {
    let mut random = StdRng::seed_from_u64(seed());
    let stand = Stand::gateways(Options::new(1), Options::new(1)).await;
    let more = "[reconcile]\nmax_deletes = \"50%\"\n";
    let (table, config) = left(&stand, more, false).await;
    some_changes(&stand, &table, ITEMS, &mut random).await;
    stand.gateways[0].rotate_all(&table).unwrap();
    stand.gateways[0].advance(Duration::from_secs(25 * 3_600));
    some_changes(&stand, &table, ITEMS / 4, &mut random).await;
    let worker = Worker::start(&config);
    let closed = async || worker.logged("shard-vanished") >= 1 && worker.logged("gap closed") >= 1;
    eventually("the gap is found and closed", WITHIN, closed).await;
    green_and_right(&stand, &table, &worker, WITHIN).await;
    assert_whole(&stand, &table, &config).await;
    assert!(worker.stop().await.success());
}

/// What was read before the gap is durable, and the new position stored, before anything is compared:
/// otherwise a write on its way would undo the repair, and the record that mends it is lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_read_before_a_gap_is_applied_before_it_is_repaired() {
    let stand = Stand::gateways(Options::new(1), Options::new(1)).await;
    let table = stand.table("orders");
    let (config, worker) = suite::replicated(&stand, &table, "").await;
    put(&stand.source, &table, "a", 1).await;
    stand.converge(&table, 1).await;
    let slow = Fault::delay(Duration::from_millis(600)).on("BatchWriteItem");
    let slow = stand.gateways[1].inject(slow.table(&table));
    put(&stand.source, &table, "a", 2).await;
    let sent = async || slow.hits() >= 1;
    eventually("the write is on its way", WITHIN, sent).await;
    // The next record is lost.
    put(&stand.source, &table, "a", 3).await;
    stand.gateways[0].trim(&table);
    stand.gateways[0].inject(Fault::trimmed().on("GetRecords").once());
    let begun = Instant::now();
    let mut drained = false;
    loop {
        let rows = state_rows(&stand.target, &stand.state_table()).await;
        let found = |kind: &str| rows.iter().find(|row| row["entityType"] == s(kind));
        let restarted = found("shard").is_some_and(|row| row.contains_key("restartedAt"));
        if restarted {
            // Older than the restart: the write of before is there, or what the repair made of it.
            let held = common::checker::items(&stand.target, &table).await;
            assert!(!held["Sa"].contains("N1"), "{held:?}");
            drained = true;
        } else {
            assert!(
                found("reconcile").is_none(),
                "compared before it was drained"
            );
        }
        if drained && found("gap").is_none() {
            break;
        }
        assert!(begun.elapsed() < WITHIN, "{rows:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    slow.off();
    green_and_right(&stand, &table, &worker, WITHIN).await;
    assert_whole(&stand, &table, &config).await;
    assert!(worker.stop().await.success());
}

/// Killed at each of its steps it is gone on with, and nobody says meanwhile that all is well.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repair_of_a_gap_that_dies_at_any_step_is_gone_on_with() {
    let mut random = StdRng::seed_from_u64(seed());
    let steps = [
        "gap-stored",
        "position-stored",
        "repair-planned",
        "page-mended",
        "segment-read",
        "gap-closed",
        "job-ended",
        "job-removed",
    ];
    for step in some_of(&steps, 3) {
        println!("step {step}");
        let stand = Stand::gateways(Options::new(1), Options::new(1)).await;
        let more = "[reconcile]\nmax_deletes = \"50%\"\n";
        let (table, config) = left(&stand, more, false).await;
        lose(&stand, &table, &mut random).await;
        dies_at(&stand, &table, &config, step).await;
        // And by the stream's being made anew.
        if long(1, 0) == 1 && matches!(step, "gap-stored" | "repair-planned" | "gap-closed") {
            let stand = Stand::gateways(Options::new(1), Options::new(1)).await;
            let (table, config) = left(&stand, more, false).await;
            set_stream(&stand, &table, None).await;
            some_changes(&stand, &table, ITEMS, &mut random).await;
            set_stream(&stand, &table, Some(StreamViewType::NewAndOldImages)).await;
            dies_at(&stand, &table, &config, step).await;
        }
    }
}

async fn dies_at(stand: &Stand, table: &str, config: &Path, step: &str) {
    let mut worker = Worker::start_with(config, &[("FARSHORE_TEST_CRASH", step)]);
    let begun = Instant::now();
    while worker.exited().is_none() {
        if is_green(&worker).await {
            assert_eq!(stand.differences(table).await, [""; 0], "{step}: green");
        }
        assert!(begun.elapsed() < WITHIN, "{step}: it never came to it");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let worker = Worker::start(config);
    green_and_right(stand, table, &worker, WITHIN).await;
    let settled = async || open_rows(stand).await.is_empty();
    eventually("nothing is left", WITHIN, settled).await;
    green_and_right(stand, table, &worker, WITHIN).await;
    assert!(worker.stop().await.success());
}

/// Deletes beyond the limit are left to a person, who is told what to type; all else is repaired.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deletes_of_a_gap_beyond_the_limit_wait_for_a_person() {
    let stand = Stand::gateways(Options::new(1), Options::new(1)).await;
    let (table, config) = left(&stand, "", false).await;
    for id in 0..60 {
        delete(&stand.source, &table, &format!("k{id}")).await;
    }
    put(&stand.source, &table, "k70", "700").await;
    stand.gateways[0].trim(&table);
    let worker = Worker::start(&config);
    let says = async || {
        let (_, body) = worker.get("/readyz").await.unwrap_or_default();
        body.contains("deletes-outstanding (60)") && body.contains("gap-trimmed")
    };
    eventually("it says how many", WITHIN, says).await;
    assert_eq!(stand.differences(&table).await.len(), 60);
    let path = config.to_str().unwrap();
    let command = [
        "reconcile",
        "--table",
        &table,
        "--apply",
        "--max-deletes",
        "60",
    ];
    let status = run(&["status", "--config", path]);
    assert_eq!(status.status.code(), Some(1));
    assert!(
        stdout(&status).contains(&command.join(" ")),
        "{}",
        stdout(&status)
    );
    let done = run(&[&command[..], &["--config", path]].concat());
    assert!(done.status.success(), "{}{}", stdout(&done), stderr(&done));
    green_and_right(&stand, &table, &worker, WITHIN).await;
    let settled = async || open_rows(&stand).await.is_empty();
    eventually("nothing is left", WITHIN, settled).await;
    assert!(worker.stop().await.success());
}

/// `on_gap = "report"`: nothing is written, and it says how many items differ.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gap_may_be_reported_only() {
    let stand = Stand::gateways(Options::new(1), Options::new(1)).await;
    let (table, config) = left(&stand, "[reconcile]\non_gap = \"report\"\n", false).await;
    for id in 0..7 {
        put(&stand.source, &table, &format!("k{id}"), "700").await;
    }
    stand.gateways[0].trim(&table);
    let worker = Worker::start(&config);
    let path = config.to_str().unwrap();
    let told = async || {
        let status = run(&["status", "--config", path]);
        stdout(&status).contains("7 difference(s); reconcile.on_gap = \"report\"")
    };
    eventually("it says how many", WITHIN, told).await;
    assert_eq!(stand.differences(&table).await.len(), 7);
    assert!(!is_green(&worker).await);
    let done = run(&["reconcile", "--apply", "--config", path]);
    assert!(done.status.success(), "{}{}", stdout(&done), stderr(&done));
    green_and_right(&stand, &table, &worker, WITHIN).await;
    assert!(worker.stop().await.success());
}

/// Another region is the source now: the replica is made as it is, once nobody writes what the one
/// before held.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_source_is_a_gap_and_the_replica_is_made_as_it_is() {
    let stand = Stand::gateways(Options::new(1), Options::new(1)).await;
    let third = EmbeddedServer::start().await.unwrap();
    let other = common::stand::client(&third.endpoint_url(), "eu-west-1");
    let table = stand.table("orders");
    stand.create_source(&table).await;
    common::stand::create_table(&other, &table, Some(StreamViewType::NewAndOldImages)).await;
    put_all(&stand.source, &table, (0..50).map(plain)).await;
    // The third region was a replica itself, and some writes never reached it.
    put_all(&other, &table, (0..45).map(plain)).await;
    let config = stand.config(&[&table], "[reconcile]\nmax_deletes = \"50%\"\n");
    let url = third.endpoint_url();
    let text = text_of(&config).replace(
        "[worker]",
        &format!("[regions.eu-west-1]\nendpoint_url = \"{url}\"\n[worker]"),
    );
    std::fs::write(&config, text).unwrap();
    provision(&config);
    let worker = Worker::start(&config);
    green_and_right(&stand, &table, &worker, WITHIN).await;
    worker.kill();
    // A failover to the third region.
    let rows = state_rows(&stand.target, &stand.state_table()).await;
    let is_control = |row: &std::collections::HashMap<_, _>| row["entityType"] == s("control");
    let mut control = rows.into_iter().find(is_control).unwrap();
    control.insert("epoch".to_owned(), n(2));
    control.insert("active".to_owned(), s("eu-west-1"));
    control.insert("epochLabel".to_owned(), s("2-eu-west-1"));
    let call = stand.target.put_item().table_name(stand.state_table());
    call.set_item(Some(control)).send().await.unwrap();
    put(&other, &table, "there", 1).await;
    let worker = Worker::start(&config);
    let says = async || {
        let (_, body) = worker.get("/readyz").await.unwrap_or_default();
        body.contains("gap-source-switched")
    };
    eventually("the gap shows", WITHIN, says).await;
    let begun = Instant::now();
    while !is_green(&worker).await {
        assert!(begun.elapsed() < WITHIN, "{:?}", open_rows(&stand).await);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let differences = common::checker::differences((&other, &table), (&stand.target, &table)).await;
    assert_eq!(differences, [""; 0]);
    // Five that only the old source had are gone, and what came since is there.
    assert_eq!(
        common::checker::items(&stand.target, &table).await.len(),
        46
    );
    let rows = state_rows(&stand.target, &stand.state_table()).await;
    assert!(!rows.iter().any(is_of_job), "a job stays");
    assert!(worker.stop().await.success());
}
