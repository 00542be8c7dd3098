//! Writes of the old epoch that take effect late.

use std::time::{Duration, Instant};

use crate::common::eventually;
use crate::failover_support::{A, B, Group, LABELS};
use crate::{PATIENCE, common, fail_over, failover_support};

/// The write of one key that is held back in the target's region.
async fn held(group: &Group, key: &str) -> u64 {
    let wanted = format!(r#"{{"id":{{"S":"{key}"}}}}"#);
    let start = Instant::now();
    loop {
        for held in group.gateways[B].held() {
            if held.keys.iter().any(|key| key.json == wanted) {
                return held.call;
            }
        }
        assert!(start.elapsed() < PATIENCE, "no write of {key} is held back");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn hold(key: &str) -> farshore::embedded::gateway::Fault {
    let fault = farshore::embedded::gateway::Fault::hold_until_delivered().hanging_up();
    fault.on("BatchWriteItem").key(&format!("\"{key}\"")).once()
}

/// Waits until `key` holds `v` in the new active region.
async fn until_holds(group: &Group, key: &str, v: &str) {
    let holds = async || group.value(B, key).await.as_deref() == Some(v);
    eventually(&format!("{key} holds {v}"), PATIENCE, holds).await;
}

/// Writes of the old epoch that were given up, tried again and overtaken take effect after the application
/// has written in the new active region: they are undone, wherever they were the last thing the key got.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_write_of_the_old_epoch_over_the_applications_is_undone() {
    let mut group = Group::new(12, 2).await;
    group.late_effect = "3s";
    group.provision(&[B]);
    let worker = group.worker(B).await;
    for key in ["twice", "gone", "still"] {
        group.put(A, key, 1).await;
    }
    group.converge(A, B, 3).await;
    let mut late = Vec::new();
    for key in ["twice", "gone", "still"] {
        group.gateways[B].inject(hold(key));
        group.put(A, key, 2).await;
        late.push(held(&group, key).await);
        until_holds(&group, key, "2").await;
    }
    group.put(A, "twice", 3).await;
    until_holds(&group, "twice", "3").await;
    group.put(A, "gone", 3).await;
    until_holds(&group, "gone", "3").await;
    let doubts = async || !group.rows_of(B, "doubt").await.is_empty();
    eventually("they are in doubt", PATIENCE, doubts).await;
    let config = group.config(B, "");
    // Nobody has stopped the application of the old region: what it writes there on and on is no concern.
    let old = group.clients[A].clone();
    let writing = tokio::spawn(async move {
        for v in 0u64.. {
            common::stand::put(&old, failover_support::TABLE, "on and on", v).await;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    // And neither is the one of the new active region held up by its own.
    let new = group.clients[B].clone();
    let going_on = tokio::spawn(async move {
        for v in 0u64.. {
            common::stand::put(&new, failover_support::TABLE, "here as well", v).await;
            tokio::time::sleep(Duration::from_millis(150)).await;
        }
    });
    // A call that fails while one is taken back makes nobody forget it.
    let refused = farshore::embedded::gateway::Fault::access_denied();
    let refused = refused.on("PutItem").key("\"twice\"");
    group.gateways[B].inject(refused.after(1).once());
    let switched = tokio::spawn(async move { fail_over(&config, &["--to", LABELS[B]]).await });
    let watching = async || group.told(B).await.is_some_and(|told| told.2 == "watching");
    eventually("it watches", PATIENCE, watching).await;
    // The application, and then what it must not lose to.
    group.put(B, "twice", 9).await;
    common::stand::delete(&group.clients[B], failover_support::TABLE, "gone").await;
    for call in late {
        group.gateways[B].deliver(call).await.unwrap();
    }
    until_holds(&group, "twice", "9").await;
    let gone = async || group.get(B, "gone").await.is_none();
    eventually("what was deleted is not back", PATIENCE, gone).await;
    let (code, answer, said) = switched.await.unwrap();
    writing.abort();
    going_on.abort();
    assert_eq!(code, Some(0), "{answer:#}\n{said}");
    assert_eq!(answer["late"]["undone"], 2, "{answer:#}");
    assert_eq!(answer["state"], "steady");
    assert_eq!(group.value(B, "twice").await.as_deref(), Some("9"));
    assert_eq!(group.get(B, "gone").await, None);
    assert_eq!(group.value(B, "still").await.as_deref(), Some("2"));
    assert!(group.rows_of(B, "doubt").await.is_empty());
    assert!(worker.stop().await.success());
}

/// What a dead worker had sent last: over the application's write it is undone; where nobody has written
/// since it is what the application of the old region wrote last, and is left.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_dead_worker_sent_last_never_stands_over_a_newer_write() {
    let mut group = Group::new(13, 2).await;
    group.late_effect = "3s";
    group.provision(&[B]);
    let worker = group.worker(B).await;
    for key in ["over", "alone"] {
        group.put(A, key, 1).await;
    }
    group.converge(A, B, 2).await;
    let mut late = Vec::new();
    for key in ["over", "alone"] {
        // Not hung up: it waits for the answer until it dies.
        let fault = farshore::embedded::gateway::Fault::hold_until_delivered();
        let fault = fault.on("BatchWriteItem").key(&format!("\"{key}\"")).once();
        group.gateways[B].inject(fault);
        group.put(A, key, 2).await;
        late.push(held(&group, key).await);
    }
    worker.kill();
    let config = group.config(B, "");
    let switched = tokio::spawn(async move { fail_over(&config, &["--to", LABELS[B]]).await });
    let watching = async || group.told(B).await.is_some_and(|told| told.2 == "watching");
    eventually("it watches", PATIENCE, watching).await;
    group.put(B, "over", 9).await;
    for call in late {
        group.gateways[B].deliver(call).await.unwrap();
    }
    until_holds(&group, "over", "9").await;
    let (code, answer, said) = switched.await.unwrap();
    assert_eq!(code, Some(1), "{answer:#}\n{said}");
    assert_eq!(answer["late"]["undone"], 1, "{answer:#}");
    assert_eq!(answer["late"]["arrived"], 1, "{answer:#}");
    assert_eq!(group.value(B, "over").await.as_deref(), Some("9"));
    assert_eq!(group.value(B, "alone").await.as_deref(), Some("2"));
    // The next failover to it does not wait for the dead, and keeps the positions.
    let rows = group.rows_of(B, "shard").await;
    assert!(
        rows.iter()
            .all(|row| !row.contains_key("fencedOwner") && row.contains_key("fenced"))
    );
}
