//! The replication suite: what the main job promises, on any two DynamoDB regions.
#![allow(dead_code, reason = "each test binary runs what its servers can do")]

pub mod faults;
pub mod poison;
pub mod reconcile;
pub mod shapes;
pub mod whole;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use aws_sdk_dynamodb::types::AttributeValue;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use rustix::process::Signal;

use crate::common::binary::{Worker, provision, run, stderr, stdout};
use crate::common::stand::{Stand, delete, n, put, s, state_rows};
use crate::common::{eventually, seed};

/// A table in the source, provisioned, with its worker running.
pub async fn replicated(stand: &Stand, table: &str, more: &str) -> (std::path::PathBuf, Worker) {
    stand.create_source(table).await;
    let config = stand.config(&[table], more);
    provision(&config);
    let worker = Worker::following(&config).await;
    (config, worker)
}

/// `changes` random inserts, updates and deletes over `keys` keys.
pub async fn random_changes(
    stand: &Stand,
    table: &str,
    random: &mut StdRng,
    changes: usize,
    keys: u32,
) {
    for _ in 0..changes {
        let id = format!("k{}", random.random_range(0..keys));
        match random.random_range(0..10) {
            0..=1 => delete(&stand.source, table, &id).await,
            2..=4 => {
                stand
                    .source
                    .update_item()
                    .table_name(table)
                    .key("id", s(id))
                    .update_expression("SET touched = :t")
                    .expression_attribute_values(":t", n(random.random::<u32>()))
                    .send()
                    .await
                    .unwrap();
            }
            _ => put(&stand.source, table, &id, random.random::<u32>()).await,
        }
    }
}

/// Inserts, updates and deletes arrive, and the metrics say so.
pub async fn changes_arrive(stand: &Stand) {
    let seed = seed();
    let mut random = StdRng::seed_from_u64(seed);
    let table = stand.table("orders");
    let (config, worker) = replicated(stand, &table, "").await;
    random_changes(stand, &table, &mut random, 600, 80).await;
    stand.converge(&table, 20).await;
    let (status, body) = worker.get("/readyz").await.unwrap();
    assert_eq!(status, 200, "{body}");
    assert_eq!(worker.get("/livez").await.unwrap().0, 200);
    assert!(worker.metric("farshore_records_total").await >= 400.0);
    assert!(worker.metric("farshore_items_written_total").await >= 20.0);
    assert!(
        worker
            .metric("farshore_replication_lag_seconds_count")
            .await
            >= 400.0
    );
    assert!(
        worker
            .metric("farshore_replication_lag_seconds_bucket")
            .await
            > 0.0,
        "no buckets"
    );
    assert!(worker.metric("farshore_stream_headroom_seconds").await > 86_000.0);
    assert_eq!(worker.metric("farshore_gaps_open").await, 0.0);
    let path = config.to_str().unwrap();
    let health = run(&["health", "--config", path]);
    assert!(health.status.success(), "{}", stderr(&health));
    let status = run(&["status", "--json", "--config", path]);
    let answer: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap();
    assert_eq!(status.status.code(), Some(0), "{answer:#}");
    assert_eq!(answer["active"], "us-east-1");
    assert!(
        answer["shards"]
            .as_array()
            .is_some_and(|shards| !shards.is_empty())
    );
    assert!(worker.stop().await.success());
    let gone = run(&["health", "--config", path]);
    assert_eq!(gone.status.code(), Some(1));
}

/// Killed in mid-flow and started again, at least three times, it goes on after its checkpoint.
pub async fn resumes_after_sigkill(stand: &Stand) {
    let seed = seed();
    let table = stand.table("orders");
    let (config, mut worker) = replicated(stand, &table, "").await;
    let (stop, writer) = writing(stand, &table, seed);
    let mut random = StdRng::seed_from_u64(seed ^ 1);
    let mut handled = 0.0;
    for _ in 0..4 {
        tokio::time::sleep(Duration::from_millis(random.random_range(300..900))).await;
        handled += worker.metric("farshore_records_total").await;
        worker.kill();
        worker = Worker::following(&config).await;
    }
    stop.store(true, Ordering::Relaxed);
    let written = writer.await.unwrap();
    stand.converge(&table, 10).await;
    handled += worker.metric("farshore_records_total").await;
    // Most was checkpointed before each kill: it does not start over from the beginning.
    assert!(
        written > 200,
        "only {written} changes were written around the kills"
    );
    assert!(
        handled < 2.0 * written as f64,
        "{handled} records were handled for {written} changes"
    );
    assert!(worker.stop().await.success());
}

/// Changes written until told to stop, in the background; gives their number.
fn writing(
    stand: &Stand,
    table: &str,
    seed: u64,
) -> (Arc<AtomicBool>, tokio::task::JoinHandle<usize>) {
    let stop = Arc::new(AtomicBool::new(false));
    let (stopped, client, table) = (Arc::clone(&stop), stand.source.clone(), table.to_owned());
    let task = tokio::spawn(async move {
        let mut random = StdRng::seed_from_u64(seed);
        let mut written = 0;
        while !stopped.load(Ordering::Relaxed) && written < 20_000 {
            let id = format!("k{}", random.random_range(0..60));
            match random.random_range(0..5) {
                0 => delete(&client, &table, &id).await,
                _ => put(&client, &table, &id, random.random::<u32>()).await,
            }
            written += 1;
        }
        written
    });
    (stop, task)
}

/// Stopped in mid-flow it exits 0 at once, gives its leases up, and nothing is lost.
pub async fn stops_gracefully_in_mid_flow(stand: &Stand) {
    let table = stand.table("orders");
    let (config, mut worker) = replicated(stand, &table, "").await;
    let (stop, writer) = writing(stand, &table, seed());
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert!(
            worker.metric("farshore_records_total").await > 0.0,
            "nothing flowed"
        );
        assert_eq!(worker.stop().await.code(), Some(0));
        for row in state_rows(&stand.target, &stand.state_table()).await {
            assert!(!row.contains_key("leaseOwner"), "not released: {row:?}");
        }
        worker = Worker::following(&config).await;
    }
    stop.store(true, Ordering::Relaxed);
    writer.await.unwrap();
    stand.converge(&table, 10).await;
    assert!(worker.stop().await.success());
}

/// On SIGTERM and on Ctrl-C it drains, checkpoints, releases and exits 0; the next run replays
/// nothing.
pub async fn stops_gracefully(stand: &Stand) {
    let table = stand.table("orders");
    let (config, worker) = replicated(stand, &table, "").await;
    for id in 0..200 {
        put(&stand.source, &table, &format!("k{id}"), id).await;
    }
    stand.converge(&table, 200).await;
    let status = worker.stop().await;
    assert_eq!(status.code(), Some(0));
    let rows = state_rows(&stand.target, &stand.state_table()).await;
    let shards: Vec<_> = rows
        .iter()
        .filter(|row| row["entityType"] == s("shard"))
        .collect();
    assert!(!shards.is_empty());
    for row in &shards {
        assert!(!row.contains_key("leaseOwner"), "not released: {row:?}");
    }
    assert!(
        shards.iter().any(|row| matches!(&row["checkpoint"], AttributeValue::S(at) if at == "SHARD_END" || at.bytes().all(|b| b.is_ascii_digit()))),
        "nothing was checkpointed: {shards:?}"
    );
    put(&stand.source, &table, "late", 1).await;
    let worker = Worker::following(&config).await;
    stand.converge(&table, 201).await;
    assert_eq!(
        worker.metric("farshore_records_total").await,
        1.0,
        "it replayed what was checkpointed"
    );
    worker.signal(Signal::INT);
    let mut worker = worker;
    let status = worker.ended(Duration::from_secs(15)).await;
    assert_eq!(status.code(), Some(0));
    assert_eq!(worker.logged("drained"), 2);
}

/// Several tables in one worker, one of them under another name in the replica region.
pub async fn two_tables_at_once(stand: &Stand) {
    let (first, second) = (stand.table("orders"), stand.table("people"));
    let copy = stand.table("people-copy");
    stand.create_source(&first).await;
    stand.create_source(&second).await;
    let renamed = format!("name = \"{second}\"\nnames = {{ us-west-2 = \"{copy}\" }}");
    let config = stand.config(&[&first, &renamed], "");
    provision(&config);
    let worker = Worker::following(&config).await;
    for id in 0..60 {
        put(&stand.source, &first, &format!("a{id}"), id).await;
        put(&stand.source, &second, &format!("b{id}"), id).await;
    }
    stand.converge(&first, 60).await;
    let equal = async || {
        crate::common::checker::differences((&stand.source, &second), (&stand.target, &copy))
            .await
            .is_empty()
    };
    eventually("the second table converges", Duration::from_secs(20), equal).await;
    assert!(worker.stop().await.success());
}

/// With `start = "latest"` what was written before stays out, now and after a restart, and what
/// the table held is reported as never copied.
pub async fn latest_is_resolved_once(stand: &Stand) {
    let table = stand.table("orders");
    stand.create_source(&table).await;
    let settings = format!("name = \"{table}\"\nstart = \"latest\"\nbootstrap = false");
    let config = stand.config(&[&settings], "");
    provision(&config);
    put(&stand.source, &table, "before", 1).await;
    // "Latest" begins three seconds early, since stream times are whole seconds.
    tokio::time::sleep(Duration::from_millis(4_500)).await;
    let worker = Worker::following(&config).await;
    worker.kill();
    put(&stand.source, &table, "between", 2).await;
    let worker = Worker::following(&config).await;
    put(&stand.source, &table, "after", 3).await;
    let arrived = async || {
        crate::common::checker::items(&stand.target, &table)
            .await
            .len()
            == 2
    };
    eventually("both later items arrive", Duration::from_secs(15), arrived).await;
    assert_eq!(
        stand.differences(&table).await.len(),
        1,
        "the earlier item was copied"
    );
    let (status, body) = worker.get("/readyz").await.unwrap();
    assert_eq!(status, 503);
    assert!(body.contains("gap-never-copied"), "{body}");
    assert!(worker.stop().await.success());
}

/// A source that already holds items, and that nobody wants copied, is a gap in metric, readiness and
/// status; never a silent green. A person's repair closes it.
pub async fn never_copied_is_never_green(stand: &Stand) {
    let table = stand.table("orders");
    stand.create_source(&table).await;
    put(&stand.source, &table, "old", 1).await;
    let settings = format!("name = \"{table}\"\nbootstrap = false");
    let config = stand.config(&[&settings], "");
    provision(&config);
    let worker = Worker::following(&config).await;
    let red = async || {
        worker
            .get("/readyz")
            .await
            .is_some_and(|(status, _)| status == 503)
    };
    eventually("readiness turns red", Duration::from_secs(10), red).await;
    let (_, body) = worker.get("/readyz").await.unwrap();
    assert!(
        body.contains("gap-never-copied") && body.contains(&table),
        "{body}"
    );
    let shown = async || worker.metric("farshore_gaps_open").await == 1.0;
    eventually("the metric shows the gap", Duration::from_secs(5), shown).await;
    let path = config.to_str().unwrap();
    let status = run(&["status", "--config", path]);
    assert_eq!(status.status.code(), Some(1));
    assert!(
        stdout(&status).contains("GAP never-copied"),
        "{}",
        stdout(&status)
    );
    // It is live all the same, goes on replicating, and is still red after a restart.
    assert_eq!(worker.get("/livez").await.unwrap().0, 200);
    put(&stand.source, &table, "new", 2).await;
    stand.converge(&table, 2).await;
    assert!(worker.stop().await.success());
    let worker = Worker::following(&config).await;
    let red = async || {
        worker
            .get("/readyz")
            .await
            .is_some_and(|(status, _)| status == 503)
    };
    eventually("still red after a restart", Duration::from_secs(10), red).await;
    let repaired = run(&["reconcile", "--apply", "--config", path]);
    assert!(repaired.status.success(), "{}", stderr(&repaired));
    let green = async || {
        worker
            .get("/readyz")
            .await
            .is_some_and(|(status, _)| status == 200)
    };
    eventually("the gap is closed", Duration::from_secs(10), green).await;
    assert!(worker.stop().await.success());
}

/// Where `here` is active the worker stands by, and says so.
pub async fn the_active_region_stands_by(stand: &Stand) {
    let table = stand.table("orders");
    let (config, feeding) = replicated(stand, &table, "").await;
    let text = std::fs::read_to_string(&config).unwrap();
    let port = crate::common::stand::free_port();
    let other = config.with_file_name("standby.toml");
    let text = text.replace("here = \"us-west-2\"", "here = \"us-east-1\"");
    let listen = text
        .lines()
        .find(|line| line.starts_with("listen"))
        .unwrap()
        .to_owned();
    std::fs::write(
        &other,
        text.replace(&listen, &format!("listen = \"127.0.0.1:{port}\"")),
    )
    .unwrap();
    let standby = Worker::start(&other);
    let says = async || {
        standby.get("/readyz").await.is_some_and(|(status, body)| {
            status == 200 && body.contains("\"standby\":\"us-east-1\"")
        })
    };
    eventually("it says standby", Duration::from_secs(10), says).await;
    assert!(standby.stop().await.success());
    assert!(feeding.stop().await.success());
}
