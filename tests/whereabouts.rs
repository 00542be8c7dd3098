//! `/active` and `/region`: right, or they say that nobody can say.

mod common;
mod whereabouts_support;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::binary::{Worker, provision};
use common::eventually;
use common::stand::{SOURCE, Stand, TARGET, free_port, n, s};
use serde_json::Value;
use whereabouts_support::Served;

/// A lease of these workers, and a moment more.
const A_LEASE: Duration = Duration::from_millis(1_300);

/// The same configuration for the other region.
fn in_source(config: &Path) -> PathBuf {
    let text = std::fs::read_to_string(config).unwrap();
    let lines = text.lines().map(|line| match line.split(" = ").next() {
        Some("here") => format!("here = \"{SOURCE}\""),
        Some("listen") => format!("listen = \"127.0.0.1:{}\"", free_port()),
        _ => line.to_owned(),
    });
    let other = config.with_file_name("source.toml");
    std::fs::write(&other, lines.collect::<Vec<_>>().join("\n")).unwrap();
    other
}

async fn asked(worker: &Worker, path: &str) -> (u16, Value) {
    let (status, body) = worker.get(path).await.unwrap();
    (status, serde_json::from_str(&body).unwrap())
}

async fn until(worker: &Worker, path: &str, status: u16, within: Duration) -> Value {
    let what = format!("{path} answers {status}");
    let answers = async || {
        worker
            .get(path)
            .await
            .is_some_and(|(code, _)| code == status)
    };
    eventually(&what, within, answers).await;
    asked(worker, path).await.1
}

/// What a failover to the target does to its control record.
async fn write_epoch(stand: &Stand, epoch: u64, state: &str) {
    let update = stand.target.update_item().table_name(stand.state_table());
    update
        .key("leaseKey", s("control"))
        .update_expression("SET #a = :a, #e = :e, #s = :s")
        .expression_attribute_names("#a", "active")
        .expression_attribute_names("#e", "epoch")
        .expression_attribute_names("#s", "state")
        .expression_attribute_values(":a", s(TARGET))
        .expression_attribute_values(":e", n(epoch))
        .expression_attribute_values(":s", s(state))
        .send()
        .await
        .unwrap();
}

/// The active region says so and the other one does not; a change is told to who waits; what was seen
/// once is not taken back when the region that holds it is away.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_active_region_and_it_alone_says_that_it_is_active() {
    let stand = Stand::embedded().await;
    let table = stand.table("orders");
    stand.create_source(&table).await;
    let to_target = stand.proxy(&stand.target_url).await;
    let letters = format!("[dead_letters]\ndirectory = {:?}\n", stand.letters());
    let feeding = stand.config(&[&table], "");
    let standing =
        in_source(&stand.config_at(&stand.source_url, &to_target.url(), &[&table], &letters));
    provision(&feeding);
    provision(&standing);
    let (feeder, standby) = (Worker::following(&feeding).await, Worker::start(&standing));
    let yes = until(&standby, "/active", 200, Duration::from_secs(10)).await;
    assert_eq!(
        (&yes["active"], &yes["region"], &yes["epoch"]),
        (&true.into(), &SOURCE.into(), &1.into())
    );
    let no = until(&feeder, "/active", 503, Duration::from_secs(10)).await;
    assert_eq!(
        (&no["active"], &no["here"], &no["region"]),
        (&false.into(), &TARGET.into(), &SOURCE.into())
    );
    assert_eq!(no["reason"], format!("the active region is {SOURCE}"));
    let (status, region) = asked(&feeder, "/region").await;
    assert_eq!(
        (status, &region["label"], &region["state"]),
        (200, &SOURCE.into(), &"steady".into())
    );
    assert_eq!(region["endpoint"], stand.source_url);

    // Who waits for an epoch that is over already, or is told of none, is not kept.
    let begin = Instant::now();
    assert_eq!(asked(&standby, "/region?epoch=0&wait=4s").await.0, 200);
    assert!(begin.elapsed() < Duration::from_secs(1));
    assert_eq!(
        asked(&standby, "/region?epoch=1&wait=300ms").await.1["epoch"],
        1
    );
    assert!(begin.elapsed() >= Duration::from_millis(300));
    assert_eq!(asked(&standby, "/region?wait=4s").await.0, 400);

    // The other region away: this one's own record still says that it is active.
    to_target.cut();
    tokio::time::sleep(2 * A_LEASE).await;
    assert_eq!(asked(&standby, "/active").await.0, 200);
    to_target.heal();

    // While the fence is not complete nobody may be written to.
    let begin = Instant::now();
    let waiting = tokio::spawn({
        let (feeder, standby) = (Arc::new(feeder), Arc::new(standby));
        let pair = (Arc::clone(&feeder), Arc::clone(&standby));
        async move {
            let path = "/region?epoch=1&wait=4s";
            let answers = tokio::join!(asked(&feeder, path), asked(&standby, path));
            (answers, Instant::now(), pair)
        }
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    write_epoch(&stand, 2, "fencing").await;
    let ((from_feeder, from_standby), at, pair) = waiting.await.unwrap();
    assert!(at - begin < Duration::from_secs(3), "{:?}", at - begin);
    for (status, body) in [from_feeder, from_standby] {
        assert_eq!(body["writable"], false);
        let told = (status, &body["label"], &body["epoch"], &body["state"]);
        assert_eq!(told, (200, &TARGET.into(), &2.into(), &"fencing".into()));
    }
    let (feeder, standby) = pair;
    for worker in [&feeder, &standby] {
        let no = until(worker, "/active", 503, A_LEASE).await;
        assert_eq!(no["epoch"], 2);
    }
    write_epoch(&stand, 2, "steady").await;
    until(&feeder, "/active", 200, A_LEASE).await;

    // The record of epoch 2 is away, and this region's own still says 1.
    to_target.cut();
    let begin = Instant::now();
    while begin.elapsed() < 2 * A_LEASE {
        let (status, no) = asked(&standby, "/active").await;
        assert_eq!((status, &no["epoch"]), (503, &2.into()));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// A worker that cannot read its state table for a lease says so, whatever it knew, and knows again
/// once it can.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_cannot_read_its_state_table_for_a_lease_does_not_say_that_it_is_active() {
    let stand = Stand::embedded().await;
    let table = stand.table("orders");
    stand.create_source(&table).await;
    let to_source = stand.proxy(&stand.source_url).await;
    let letters = format!("[dead_letters]\ndirectory = {:?}\n", stand.letters());
    let config = stand.config_at(&to_source.url(), &stand.target_url, &[&table], &letters);
    provision(&config);
    let standing = in_source(&config);
    provision(&standing);
    let standby = Worker::start(&standing);
    until(&standby, "/active", 200, Duration::from_secs(10)).await;
    to_source.cut();
    let no = until(&standby, "/active", 503, A_LEASE).await;
    let reason = no["reason"].as_str().unwrap();
    assert!(
        reason.contains(&format!("the control record in {SOURCE} could not be read")),
        "{no}"
    );
    assert_eq!(no["region"], Value::Null);
    assert_eq!(asked(&standby, "/region").await.0, 503);
    let red = async || {
        let (_, ready) = asked(&standby, "/readyz").await;
        ready["reasons"][0]["code"] == "outage-state"
    };
    eventually("readiness says so", Duration::from_secs(5), red).await;
    to_source.heal();
    until(&standby, "/active", 200, Duration::from_secs(5)).await;
    assert!(standby.stop().await.success());
}

/// An answer counts no longer than the reading it rests on, to the moment, even if nobody says that
/// anything failed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_read_a_lease_ago_counts_no_more() {
    let served = Served::start(SOURCE, "1s").await;
    assert!(served.get("/active").await.starts_with("HTTP/1.0 503"));
    served.tell(SOURCE, 1, "steady");
    let told = Instant::now();
    let mut last_yes = Duration::ZERO;
    while told.elapsed() < Duration::from_millis(1_200) {
        let asked = told.elapsed();
        match served.get("/active").await.starts_with("HTTP/1.0 200") {
            true => last_yes = asked,
            false => assert!(told.elapsed() >= Duration::from_secs(1), "too early"),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(
        last_yes < Duration::from_secs(1),
        "still active after {last_yes:?}"
    );
    assert!(
        last_yes > Duration::from_millis(500),
        "never asked in between"
    );
    let no = served.get("/active").await;
    assert!(
        no.contains("not read for 1s") && no.contains("no-store"),
        "{no}"
    );
    served.tell(SOURCE, 1, "conflict");
    assert!(served.get("/active").await.contains("says `conflict`"));
    assert!(served.get("/region").await.starts_with("HTTP/1.0 503"));
}

/// Those who wait are bounded, and answered when the server stops.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_waits_is_bounded_and_does_not_hold_the_end() {
    let served = Served::start(SOURCE, "1h").await;
    served.tell(SOURCE, 1, "steady");
    let waiting: Vec<_> = (0..256)
        .map(|_| tokio::spawn(served.get("/region?epoch=1&wait=50s")))
        .collect();
    let full = async || {
        served
            .get("/region?epoch=1&wait=1ms")
            .await
            .starts_with("HTTP/1.0 503")
    };
    eventually("no place is left", Duration::from_secs(10), full).await;
    let refused = served.get("/region?epoch=1&wait=50s").await;
    assert!(
        refused.contains("retry-after: 5") && refused.contains("too many"),
        "{refused}"
    );
    assert!(
        served.get("/region").await.starts_with("HTTP/1.0 200"),
        "who does not wait is answered"
    );
    served.tell(TARGET, 2, "steady");
    for answer in waiting {
        let answer = answer.await.unwrap();
        assert!(
            answer.contains("\"epoch\":2") && answer.contains("\"endpoint\":null"),
            "{answer}"
        );
    }
    let waits = tokio::spawn(served.get("/region?epoch=2&wait=50s"));
    tokio::time::sleep(Duration::from_millis(200)).await;
    served.stop.cancel();
    let within = Duration::from_secs(5);
    assert!(
        tokio::time::timeout(within, waits)
            .await
            .unwrap()
            .unwrap()
            .contains("\"epoch\":2")
    );
    tokio::time::timeout(within, served.task)
        .await
        .unwrap()
        .unwrap();
}
