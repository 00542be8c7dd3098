//! First copies and repairs of gaps: what a replica lacks comes by itself, and nobody calls it whole
//! before.

use std::path::Path;
use std::time::{Duration, Instant};

use aws_sdk_dynamodb::types::{StreamSpecification, StreamViewType};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};

use super::reconcile::{is_of_job, item, put_all};
use crate::common::binary::{Worker, provision, run, stdout};
use crate::common::seed;
use crate::common::stand::{Stand, delete, n, put, s, state_rows};

/// Gaps are found and stay.
pub const SHOWN_ONLY: &str = "[reconcile]\non_gap = \"off\"\n";

pub const WITHIN: Duration = Duration::from_secs(60);

/// So many of `steps`, by chance; all of them in the long lane.
pub fn some_of<'a>(steps: &[&'a str], count: usize) -> Vec<&'a str> {
    let mut random = StdRng::seed_from_u64(seed());
    let count = crate::common::long(steps.len() as u64, count as u64) as usize;
    steps.sample(&mut random, count).copied().collect()
}

/// Whether a worker says that nothing needs attention.
pub async fn is_green(worker: &Worker) -> bool {
    worker
        .get("/readyz")
        .await
        .is_some_and(|(status, _)| status == 200)
}

/// Waits until a worker says that nothing needs attention. The source must be still: at each moment that
/// it says so, both tables have to be equal.
pub async fn green_and_right(stand: &Stand, table: &str, worker: &Worker, within: Duration) {
    let begun = Instant::now();
    while !is_green(worker).await {
        if begun.elapsed() >= within {
            let (_, body) = worker.get("/readyz").await.unwrap_or_default();
            let log = crate::common::stand::text_of(&worker.log);
            let from = log.len().saturating_sub(6_000);
            let tail = log.get(from..).unwrap_or_default();
            panic!("not green within {within:?}: {body}\n{tail}");
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let differences = stand.differences(table).await;
    assert!(
        differences.is_empty(),
        "green, and {} items differ: {:?}",
        differences.len(),
        &differences[..differences.len().min(5)]
    );
}

/// Rows of the state table about gaps and jobs.
pub async fn open_rows(stand: &Stand) -> Vec<String> {
    let rows = state_rows(&stand.target, &stand.state_table()).await;
    let open = rows
        .iter()
        .filter(|row| is_of_job(row) || row["entityType"] == s("gap"));
    open.map(|row| row["leaseKey"].as_s().unwrap().clone())
        .collect()
}

/// Nothing is left to do, and `status` says so.
pub async fn assert_whole(stand: &Stand, table: &str, config: &Path) {
    // The row of a job that has ended goes a moment later.
    let is_left = async || !open_rows(stand).await.is_empty();
    let begun = Instant::now();
    while is_left().await {
        assert!(begun.elapsed() < WITHIN, "{:?}", open_rows(stand).await);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(stand.differences(table).await, [""; 0]);
    let status = run(&["status", "--config", config.to_str().unwrap()]);
    assert_eq!(status.status.code(), Some(0), "{}", stdout(&status));
}

/// Puts, changes and deletes of items `k0` to `k<items>`, and a few new ones.
pub async fn some_changes(stand: &Stand, table: &str, items: usize, random: &mut StdRng) {
    for id in 0..items {
        match random.random_range(0..6) {
            0 => delete(&stand.source, table, &format!("k{id}")).await,
            1 => put(&stand.source, table, &format!("k{id}"), 1_000_000 + id).await,
            2 => put(&stand.source, table, &format!("new{id}"), id).await,
            _ => {}
        }
    }
}

/// What a table held before the first run is copied beside the stream: changed and deleted items end
/// as in the source. Until then readiness says how far it is; afterwards nobody copies again.
pub async fn what_a_table_holds_is_copied(stand: &Stand) {
    let mut random = StdRng::seed_from_u64(seed());
    let table = stand.table("orders");
    stand.create_source(&table).await;
    let items = 400;
    let all: Vec<_> = (0..items).map(|id| item(id, &mut random)).collect();
    put_all(&stand.source, &table, all).await;
    // What the stream still remembers it does not bring: "latest" begins three seconds early.
    let settings = format!("name = \"{table}\"\nstart = \"latest\"");
    let config = stand.config(&[&settings], "[reconcile]\nsegments = 3\n");
    provision(&config);
    tokio::time::sleep(Duration::from_millis(4_500)).await;
    let worker = Worker::start(&config);
    let mut said = String::new();
    let copying = async || {
        let (_, body) = worker.get("/readyz").await.unwrap_or_default();
        let is_said = body.contains("\"copying\"");
        if is_said {
            said = body;
        }
        is_said
    };
    let mut copying = copying;
    let begun = Instant::now();
    while !copying().await {
        assert!(begun.elapsed() < WITHIN, "it does not say that it copies");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(said.contains("nothing to fail over to"), "{said}");
    let status = run(&["status", "--config", config.to_str().unwrap()]);
    assert_eq!(status.status.code(), Some(1));
    assert!(stdout(&status).contains("COPYING"), "{}", stdout(&status));
    some_changes(stand, &table, items, &mut random).await;
    green_and_right(stand, &table, &worker, WITHIN).await;
    assert_whole(stand, &table, &config).await;
    assert_eq!(worker.metric("farshore_copying").await, 0.0);
    assert!(worker.metric("farshore_copied_items_total").await >= 100.0);
    assert!(worker.stop().await.success());
    put(&stand.source, &table, "later", 1).await;
    let worker = Worker::following(&config).await;
    stand.converge(&table, 1).await;
    assert_eq!(worker.metric("farshore_copied_items_total").await, 0.0);
    assert!(worker.stop().await.success());
}

/// An item so large that a page holds few of them.
pub fn large(id: usize, value: usize) -> super::reconcile::Item {
    super::reconcile::Item::from([
        ("id".to_owned(), s(format!("k{id}"))),
        ("v".to_owned(), n(value)),
        ("text".to_owned(), s("x".repeat(30_000))),
    ])
}

/// Disables the stream of a source table, or enables one.
pub async fn set_stream(stand: &Stand, table: &str, view: Option<StreamViewType>) {
    let specification = StreamSpecification::builder()
        .stream_enabled(view.is_some())
        .set_stream_view_type(view)
        .build()
        .unwrap();
    stand
        .source
        .update_table()
        .table_name(table)
        .stream_specification(specification)
        .send()
        .await
        .unwrap();
}
