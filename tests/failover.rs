//! Failover: one direction, one epoch, and everybody heeds it.

mod common;
mod failover_support;

use std::time::{Duration, Instant};

use common::binary::Worker;
use common::eventually;
use common::stand::{n, s};
use failover_support::{A, B, C, Group, LABELS, command, until_ready};

const PATIENCE: Duration = Duration::from_secs(20);

/// Whether every worker row of `region` that is there has acknowledged `epoch`.
async fn acknowledged(group: &Group, region: usize, epoch: u64) -> bool {
    let rows = group.rows_of(region, "worker").await;
    !rows.is_empty()
        && rows
            .iter()
            .all(|row| row.get("acknowledged") == Some(&n(epoch)))
}

/// A worker whose epoch is over stops at once, stores exactly how far it came, says so, and stands by:
/// the process goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_whose_epoch_is_over_drains_acknowledges_and_stands_by() {
    let mut group = Group::new(1, 2).await;
    group.lease = "3s";
    group.provision(&[B]);
    let worker = group.worker(B).await;
    for id in 0..50 {
        group.put(A, &format!("k{id}"), id).await;
    }
    group.converge(A, B, 50).await;
    let begun = Instant::now();
    group.write_epoch(B, 2, B).await;
    let told = async || acknowledged(&group, B, 2).await;
    eventually("it acknowledges", Duration::from_secs(2), told).await;
    println!("acknowledged after {:?}", begun.elapsed());
    for row in group.rows_of(B, "shard").await {
        assert!(!row.contains_key("leaseOwner"), "not released: {row:?}");
        assert!(
            row["checkpoint"].as_s().unwrap().parse::<u128>().is_ok(),
            "{row:?}"
        );
    }
    group.put(A, "late", 1).await;
    until_ready(&worker, |body| body.contains("\"standby\":\"us-west-2\"")).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(group.get(B, "late").await, None, "it feeds on");
    assert_eq!(worker.logged("feeding"), 1);
    assert!(worker.stop().await.success());
}

/// A region that was active keeps its hands off, and everybody else's, over restarts and while the
/// active region cannot be asked.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_region_that_was_active_is_written_to_by_nobody() {
    let mut group = Group::new(2, 2).await;
    group.provision(&[A, B]);
    group.put(A, "k", 1).await;
    let here = group.config(A, "");
    let worker = Worker::start(&here);
    until_ready(&worker, |body| body.contains("\"standby\":\"us-east-1\"")).await;
    group.write_epoch(B, 2, B).await;
    let reason = until_ready(&worker, |body| body.contains("\"quarantined\"")).await;
    assert!(
        reason.contains("us-west-2 became so in epoch 2"),
        "{reason}"
    );
    let stored = async || {
        let told = group.told(A).await;
        told == Some((2, LABELS[B].to_owned(), "quarantined".to_owned()))
    };
    eventually("it is stored", PATIENCE, stored).await;
    let marked = group.gateways[A].next_call();
    for refused in [
        vec!["redrive", "--apply"],
        vec![
            "reconcile",
            "--source",
            LABELS[B],
            "--target",
            LABELS[A],
            "--apply",
        ],
    ] {
        let (code, _, said) = command(&here, &refused).await;
        assert_eq!(code, Some(2), "{refused:?}: {said}");
        assert!(
            said.contains("us-east-1 is in quarantine"),
            "{refused:?}: {said}"
        );
    }
    worker.kill();
    group.gateways[B]
        .go_away(farshore::embedded::gateway::Outage::Refused)
        .await;
    let again = Worker::start(&here);
    until_ready(&again, |body| body.contains("\"quarantined\"")).await;
    group.gateways[B].come_back().await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let writes = group.gateways[A].calls_where(|call| {
        let is_write = ["BatchWriteItem", "PutItem", "DeleteItem", "UpdateItem"];
        let of_table = call
            .tables
            .iter()
            .any(|table| table == failover_support::TABLE);
        call.number >= marked && of_table && is_write.contains(&call.operation.as_str())
    });
    assert!(writes.is_empty(), "{writes:?}");
    assert!(again.stop().await.success());
}

/// A third region follows the new active one, without a restart, and is made as that is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_third_region_follows_the_new_active_one() {
    let group = Group::new(3, 3).await;
    group.provision(&[B, C]);
    let (b, c) = (group.worker(B).await, group.worker(C).await);
    group.put(A, "k", 1).await;
    group.converge(A, B, 1).await;
    group.converge(A, C, 1).await;
    group.write_epoch(B, 2, B).await;
    until_ready(&b, |body| body.contains("\"standby\":\"us-west-2\"")).await;
    // Stranded, and it must not reach anybody.
    group.put(A, "stranded", 1).await;
    group.put(B, "k", 2).await;
    group.converge(B, C, 1).await;
    assert_eq!(group.value(C, "k").await.as_deref(), Some("2"));
    assert_eq!(
        group.told(C).await,
        Some((2, LABELS[B].to_owned(), "steady".to_owned()))
    );
    assert_eq!(c.logged("feeding"), 2);
    let closed = async || group.rows_of(C, "gap").await.is_empty();
    eventually("the gap of the new source is closed", PATIENCE, closed).await;
    let flows: Vec<_> = group.rows_of(C, "stream").await;
    assert_eq!(flows.len(), 2, "the old flow's rows are kept: {flows:?}");
    assert_eq!(
        flows
            .iter()
            .filter(|row| row["table"] == s("orders"))
            .count(),
        2
    );
    assert!(b.stop().await.success() && c.stop().await.success());
}
