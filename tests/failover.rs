//! Failover: one direction, one epoch, and everybody heeds it.

mod common;
mod failover_parts;
mod failover_support;

use std::time::{Duration, Instant};

use common::binary::Worker;
use common::eventually;
use common::stand::{n, s};
use failover_support::{A, B, C, Group, LABELS, command, until_ready};
use farshore::dynamo::clock::{host_ms, rfc3339};

pub const PATIENCE: Duration = Duration::from_secs(20);

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

/// `failover --to … --apply --json` and what it answers.
pub async fn fail_over(
    config: &std::path::Path,
    more: &[&str],
) -> (Option<i32>, serde_json::Value, String) {
    let mut arguments = vec!["failover", "--apply", "--json", "--reason", "a test"];
    arguments.extend(more);
    let (code, answer, said) = command(config, &arguments).await;
    let answer = serde_json::from_str(&answer).unwrap_or(serde_json::Value::Null);
    (code, answer, said)
}

/// Rows of old epochs, none of which anybody can take or renew any more.
async fn assert_fenced(group: &Group, region: usize, epoch: u64) {
    for row in group.rows_of(region, "shard").await {
        if row["epoch"] != n(epoch) {
            assert_eq!(row.get("fenced"), Some(&n(epoch)), "{row:?}");
            assert!(!row.contains_key("leaseOwner"), "{row:?}");
        }
    }
}

/// With living workers the fence is complete within two seconds, nothing is in flight, the old region is
/// told, and its worker keeps its hands off.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failover_with_living_workers_is_fenced_within_two_seconds() {
    let mut group = Group::new(4, 2).await;
    // With the default lease nothing but acknowledgement can be so fast.
    group.lease = "10s";
    group.provision(&[A, B]);
    let (a, b) = (group.worker(A).await, group.worker(B).await);
    let second = Worker::start(&group.config(B, ""));
    for id in 0..40 {
        group.put(A, &format!("k{id}"), id).await;
    }
    group.converge(A, B, 40).await;
    let beating = async || group.rows_of(B, "worker").await.len() == 2;
    eventually("both work", PATIENCE, beating).await;
    let config = group.config(B, "");
    let (code, answer, said) = fail_over(&config, &["--to", LABELS[B]]).await;
    assert_eq!(code, Some(0), "{answer:#}\n{said}");
    let fence = answer["fenceSeconds"].as_f64().unwrap();
    println!("fence with two living workers: {fence} s");
    assert!(fence < 2.0, "{answer:#}");
    assert_eq!(answer["inFlight"], serde_json::json!([]), "{answer:#}");
    assert_fenced(&group, B, 2).await;
    until_ready(&b, |body| body.contains("\"standby\":\"us-west-2\"")).await;
    until_ready(&second, |body| body.contains("\"standby\":\"us-west-2\"")).await;
    until_ready(&a, |body| body.contains("\"quarantined\"")).await;
    let told = group.told(A).await;
    assert_eq!(
        told,
        Some((2, LABELS[B].to_owned(), "quarantined".to_owned()))
    );
    let (code, _, said) = fail_over(&config, &["--to", LABELS[B]]).await;
    assert_eq!(code, Some(2), "{said}");
    assert!(
        said.contains("us-west-2 is the active region already"),
        "{said}"
    );
    for worker in [a, b, second] {
        assert!(worker.stop().await.success());
    }
}

/// With a dead worker, and the old region gone without an answer, it takes a lease and not three seconds
/// more; what may have been in flight is named.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failover_with_a_dead_worker_takes_a_lease_and_less_than_three_seconds() {
    let mut group = Group::new(5, 2).await;
    group.lease = "3s";
    group.late_effect = "2s";
    group.provision(&[B]);
    let worker = group.worker(B).await;
    group.put(A, "k", 1).await;
    group.converge(A, B, 1).await;
    worker.kill();
    group.gateways[A]
        .go_away(farshore::embedded::gateway::Outage::Silent)
        .await;
    let config = group.config(B, "");
    let (code, plan, _) = command(&config, &["failover", "--to", LABELS[B]]).await;
    assert_eq!(code, Some(1));
    println!("{plan}");
    for told in [
        "us-east-1: does not answer",
        "does not stop the application",
        "epoch 2",
        "applied",
    ] {
        assert!(plan.contains(told), "{told} is not in:\n{plan}");
    }
    let (code, answer, said) = fail_over(&config, &["--to", LABELS[B]]).await;
    assert_eq!(code, Some(1), "{answer:#}\n{said}");
    let fence = answer["fenceSeconds"].as_f64().unwrap();
    println!("fence with a dead worker and a lease of 3 s: {fence} s");
    assert!((3.0..6.0).contains(&fence), "{answer:#}");
    assert_eq!(answer["inFlight"][0]["table"], "orders", "{answer:#}");
    assert_eq!(answer["untold"][0]["region"], LABELS[A], "{answer:#}");
    assert_fenced(&group, B, 2).await;
}

/// Killed at any step, the same command goes on; the epoch is the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failover_killed_at_any_step_is_gone_on_with_by_the_same_command() {
    let steps = [
        "failover-begun",
        "failover-rows",
        "failover-complete",
        "failover-told",
        "failover-watched",
    ];
    let killed = steps.map(async |step| {
        let group = Group::new(6, 2).await;
        group.provision(&[B]);
        let worker = group.worker(B).await;
        group.put(A, "k", 1).await;
        group.converge(A, B, 1).await;
        let config = group.config(B, "");
        let path = config.to_str().unwrap().to_owned();
        let mut dying = common::binary::farshore(&[
            "failover", "--to", LABELS[B], "--apply", "--config", &path,
        ]);
        dying.env("FARSHORE_TEST_CRASH", step);
        let died = tokio::task::spawn_blocking(move || dying.output())
            .await
            .unwrap()
            .unwrap();
        assert_eq!(died.status.code(), None, "{step}: it was to die");
        let (code, answer, said) = fail_over(&config, &["--to", LABELS[B]]).await;
        assert_eq!(code, Some(0), "{step}: {answer:#}\n{said}");
        assert_eq!(answer["epoch"], 2, "{step}");
        assert_eq!(group.told(B).await.unwrap().2, "steady", "{step}");
        assert_fenced(&group, B, 2).await;
        assert!(worker.stop().await.success(), "{step}");
    });
    futures::future::join_all(killed).await;
}

/// Two operators who mean different regions at the same moment: at most one wins, or both are told, and
/// nobody feeds anybody until a person has decided.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_failovers_to_different_regions_end_in_one_or_are_told() {
    let group = Group::new(7, 3).await;
    group.provision(&[B, C]);
    let (b, c) = (group.worker(B).await, group.worker(C).await);
    group.put(A, "k", 1).await;
    group.converge(A, B, 1).await;
    group.converge(A, C, 1).await;
    let (one, two) = (group.config(B, ""), group.config(C, ""));
    let (first, second) = (["--to", LABELS[B]], ["--to", LABELS[C]]);
    let both = tokio::join!(fail_over(&one, &first), fail_over(&two, &second));
    println!("{:?} {:?}", both.0.0, both.1.0);
    let won = |code: Option<i32>| matches!(code, Some(0 | 1));
    let told = [group.told(B).await.unwrap(), group.told(C).await.unwrap()];
    let contradict = told[0].0 == told[1].0 && told[0].1 != told[1].1;
    if contradict {
        let said = format!("{}{}", both.0.2, both.1.2);
        assert!(
            said.contains("Epoch 2 names several active regions"),
            "{said}"
        );
        assert!(!won(both.0.0) || !won(both.1.0), "{both:?}");
        for worker in [&b, &c] {
            until_ready(worker, |body| body.contains("\"no-role\"")).await;
        }
        let (code, _, said) = fail_over(&one, &["--to", LABELS[B]]).await;
        assert_eq!(code, Some(2), "{said}");
        assert!(said.contains("--accept-loss conflict"), "{said}");
        let settle = ["--to", LABELS[B], "--accept-loss", "conflict"];
        let before = rfc3339(host_ms() - 2_000);
        let (_, answer, said) = fail_over(&one, &settle).await;
        assert_eq!(answer["epoch"], 3, "{answer:#}\n{said}");
        // Its own steps, and none of the one that was contradicted.
        let steps = answer["done"].as_array().unwrap();
        let own = steps.iter().filter(|step| step["step"] != "begun-first");
        let at = own.map(|step| step["at"].as_str().unwrap());
        assert!(at.clone().min() >= Some(before.as_str()), "{answer:#}");
        assert!(
            steps.iter().any(|step| step["step"] == "told"),
            "{answer:#}"
        );
        until_ready(&c, |body| body.contains("\"quarantined\"")).await;
        until_ready(&b, |body| body.contains("\"standby\":\"us-west-2\"")).await;
    } else {
        assert!(won(both.0.0) != won(both.1.0), "{both:?}");
    }
    assert!(b.stop().await.success() && c.stop().await.success());
}

/// What cannot be is said in plain words, and nothing is changed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_failed_over_to_is_said_plainly() {
    let mut group = Group::new(8, 3).await;
    group.provision(&[B]);
    let config = group.config(B, "");
    let refused = async |arguments: &[&str], told: &[&str]| {
        let (code, _, said) = fail_over(&config, arguments).await;
        assert_eq!(code, Some(2), "{arguments:?}: {said}");
        for text in told {
            assert!(
                said.contains(text),
                "{arguments:?}: {text} is not in {said}"
            );
        }
    };
    refused(
        &["--to", "us-west-9"],
        &["Region us-west-9 is not known", "us-west-2"],
    )
    .await;
    refused(
        &["--to", LABELS[A]],
        &["There is no state table farshore-g in us-east-1"],
    )
    .await;
    refused(
        &["--to", LABELS[C]],
        &["There is no state table farshore-g in eu-west-1"],
    )
    .await;
    // Nobody has followed it yet.
    refused(
        &["--to", LABELS[B]],
        &[
            "not fit to become active",
            "--accept-loss orders:not-followed",
        ],
    )
    .await;
    refused(
        &["--to", LABELS[B], "--accept-loss", "orders:gap-trimed"],
        &["There is no loss `orders:gap-trimed` to accept"],
    )
    .await;
    group.provision(&[A]);
    refused(
        &["--to", LABELS[A]],
        &["us-east-1 is the active region already"],
    )
    .await;
    assert_eq!(group.told(B).await.unwrap().0, 1);
    group.gateways[B]
        .go_away(farshore::embedded::gateway::Outage::Refused)
        .await;
    refused(&["--to", LABELS[B]], &["could not be read", "us-west-2"]).await;
}
