//! Failback: a region that was active comes home, with the writes that never left it.

mod common;
mod failover_support;

use std::time::Duration;

use common::binary::Worker;
use common::eventually;
use common::stand::{delete, s};
use failover_support::{A, B, Group, LABELS, TABLE, command, until_ready};
use farshore::embedded::gateway::Outage;
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(30);

/// Two regions, provisioned, with a worker in each; `keys` items in both.
async fn group(seed: u64, keys: u32) -> (Group, Worker, Worker) {
    group_of(seed, keys, "1s").await
}

async fn group_of(seed: u64, keys: u32, lease: &'static str) -> (Group, Worker, Worker) {
    let mut group = Group::new(seed, 2).await;
    group.lease = lease;
    group.late_effect = "2s";
    group.provision(&[B, A]);
    let worker = group.worker(B).await;
    let standby = group.worker(A).await;
    for id in 0..keys {
        group.put(A, &format!("k{id}"), id).await;
    }
    group.converge(A, B, keys as usize).await;
    // And checkpointed: what is not is among what is stranded.
    let checkpointed = async || {
        let rows = group.rows_of(B, "shard").await;
        let last = rows
            .iter()
            .map(|row| row["checkpoint"].as_s().unwrap().clone());
        tokio::time::sleep(Duration::from_millis(400)).await;
        let rows = group.rows_of(B, "shard").await;
        let now = rows
            .iter()
            .map(|row| row["checkpoint"].as_s().unwrap().clone());
        last.eq(now)
    };
    eventually("all is checkpointed", PATIENCE, checkpointed).await;
    (group, worker, standby)
}

/// A falls silent, and B becomes active; its worker goes on, standing by.
async fn cut_and_switch(group: &mut Group, more: &[&str]) -> Worker {
    group.gateways[A].go_away(Outage::Refused).await;
    // What the flow wrote in the two seconds before counts as written since: stream times are whole seconds.
    tokio::time::sleep(Duration::from_millis(2_500)).await;
    let here = group.config(B, "");
    let mut arguments = vec!["failover", "--to", LABELS[B], "--apply"];
    arguments.extend(more);
    let (_, _, said) = command(&here, &arguments).await;
    let told = group.told(B).await.unwrap();
    assert_eq!((told.0, told.1.as_str()), (2, LABELS[B]), "{said}");
    let worker = Worker::start(&here);
    until_ready(&worker, |body| body.contains("\"standby\":\"us-west-2\"")).await;
    worker
}

async fn steady(group: &Group) {
    let here = group.config(B, "");
    if group.told(B).await.unwrap().2 != "steady" {
        let again = ["failover", "--to", LABELS[B], "--apply"];
        let (_, out, said) = command(&here, &again).await;
        assert_eq!(group.told(B).await.unwrap().2, "steady", "{out}{said}");
    }
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// Waits until the plan says that what is stranded is captured up to after now.
async fn captured(group: &Group) {
    let rows = group.rows_of(A, "capture").await;
    let before = rows.first().and_then(|row| row.get("readUntil").cloned());
    let moved = async || {
        let rows = group.rows_of(A, "capture").await;
        let read = rows.first().and_then(|row| row.get("readUntil").cloned());
        read.is_some() && read != before
    };
    eventually("it is captured", PATIENCE, moved).await;
}

async fn plan(group: &Group, more: &[&str]) -> Value {
    let mut arguments = vec!["failback", "--json"];
    arguments.extend(more);
    let (code, out, said) = command(&group.config(B, ""), &arguments).await;
    assert_eq!(code, Some(1), "{out}{said}");
    json(&out)
}

/// What the old region wrote and nobody got is captured, judged, applied where nobody else wrote, and the region is
/// a replica again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stranded_writes_come_home() {
    let (mut group, worker, standby) = group(1, 20).await;
    worker.kill();
    group.put(A, "free", 1).await;
    group.put(A, "k1", 100).await;
    delete(&group.clients[A], TABLE, "k2").await;
    group.put(A, "k3", 100).await;
    group.put(A, "k4", 100).await;
    let second = cut_and_switch(&mut group, &[]).await;
    group.put(B, "k3", 200).await;
    delete(&group.clients[B], TABLE, "k4").await;
    group.put(B, "k5", 200).await;
    delete(&group.clients[B], TABLE, "k6").await;
    group.put(B, "new", 1).await;
    group.gateways[A].come_back().await;
    until_ready(&standby, |body| body.contains("quarantined")).await;
    captured(&group).await;
    steady(&group).await;
    // It may still be written to, and that is captured as well.
    group.put(A, "after", 7).await;
    captured(&group).await;
    let reason = until_ready(&standby, |body| body.contains("is captured")).await;
    assert!(reason.contains("farshore failback"), "{reason}");
    let found = plan(&group, &[]).await;
    let counts = &found["tables"][0]["counts"];
    assert_eq!(counts["free"], 4, "{found}");
    assert_eq!(counts["conflicting"], 2, "{found}");
    assert_eq!(counts["unknown"], 0, "{found}");
    assert_eq!(
        found["tables"][0]["ledger"]["lacks"],
        Value::Null,
        "{found}"
    );
    let here = group.config(B, "");
    // What would be dropped has to be reported somewhere.
    let dropping = ["failback", "--conflicts", "active", "--apply"];
    let (code, out, said) = command(&here, &dropping).await;
    assert_eq!(code, Some(1), "{out}{said}");
    assert!(out.contains("--report FILE"), "{out}");
    let report = group.temp.path().join("report.jsonl");
    let mut arguments = dropping.to_vec();
    arguments.extend(["--report", report.to_str().unwrap()]);
    let (code, out, said) = command(&here, &arguments).await;
    assert_eq!(code, Some(0), "{out}{said}");
    assert!(out.contains("us-east-1 is home"), "{out}");
    group.converge(A, B, 20).await;
    let value = async |id: &str| group.value(B, id).await;
    assert_eq!(value("free").await.as_deref(), Some("1"));
    assert_eq!(value("after").await.as_deref(), Some("7"));
    assert_eq!(value("k1").await.as_deref(), Some("100"));
    assert_eq!(value("k2").await, None);
    assert_eq!(value("k3").await.as_deref(), Some("200"));
    assert_eq!(value("k4").await, None);
    let lines = std::fs::read_to_string(&report).unwrap();
    let lines: Vec<Value> = lines.lines().map(json).collect();
    assert_eq!(lines.len(), 2, "{lines:?}");
    for line in &lines {
        assert_eq!(line["class"], "conflicting");
        assert_eq!(line["fate"], "reported");
        assert_eq!(line["stranded"]["v"]["N"], "100");
    }
    // From now on it is fed as any replica, and nothing is left of the way.
    group.put(B, "last", 5).await;
    group.converge(B, A, 20).await;
    assert!(group.rows_of(B, "ledger").await.is_empty());
    let (code, out, _) = command(&here, &["failback"]).await;
    assert_eq!(code, Some(0));
    assert!(out.contains("Nobody is away"), "{out}");
    // And the role goes home, when a person wants it.
    let switch = ["failover", "--to", LABELS[A], "--planned", "--apply"];
    let (code, out, said) = command(&group.config(A, ""), &switch).await;
    assert_eq!(code, Some(0), "{out}{said}");
    assert_eq!(group.told(A).await.unwrap().1, LABELS[A]);
    assert!(standby.stop().await.success());
    assert!(second.stop().await.success());
}

/// What was applied and not checkpointed when the region was cut off is among what is stranded; deleted in the new
/// active region since, it stays deleted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_applied_but_not_checkpointed_and_deleted_since_does_not_come_back() {
    let mut group = Group::new(2, 2).await;
    group.provision(&[B, A]);
    let slow = group.config(B, "");
    let text = std::fs::read_to_string(&slow).unwrap();
    let text = text.replace("checkpoint_every = \"100ms\"", "checkpoint_every = \"60s\"");
    std::fs::write(&slow, text).unwrap();
    let worker = Worker::following(&slow).await;
    let standby = group.worker(A).await;
    group.put(A, "dead", 1).await;
    group.put(A, "alive", 1).await;
    group.converge(A, B, 2).await;
    worker.kill();
    let second = cut_and_switch(&mut group, &[]).await;
    delete(&group.clients[B], TABLE, "dead").await;
    group.gateways[A].come_back().await;
    until_ready(&standby, |body| body.contains("quarantined")).await;
    captured(&group).await;
    steady(&group).await;
    let found = plan(&group, &[]).await;
    let counts = &found["tables"][0]["counts"];
    assert_eq!(counts["stranded"], 2, "{found}");
    assert_eq!(counts["equal"], 1, "{found}");
    assert_eq!(counts["conflicting"], 1, "{found}");
    let home = [
        "failback",
        "--stranded",
        "apply",
        "--conflicts",
        "newest=v",
        "--apply",
    ];
    let (code, out, said) = command(&group.config(B, ""), &home).await;
    // A delete has no age: it is kept for a person.
    assert_eq!(code, Some(1), "{out}{said}");
    group.converge(A, B, 1).await;
    assert_eq!(group.get(B, "dead").await, None);
    assert_eq!(group.get(A, "dead").await, None);
    let store = common::stand::state_rows(&group.clients[A], "farshore-g-failback").await;
    let kept = store
        .iter()
        .find(|row| row["keys"].as_m().unwrap()["id"] == s("dead"));
    assert!(kept.is_some(), "{store:?}");
    assert!(standby.stop().await.success());
    assert!(second.stop().await.success());
}

/// What is written in the old region after the turn, while its worker is down, is captured before anything is fed
/// there: the quarantine is not over because a record says so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_starts_after_the_turn_captures_before_it_feeds() {
    let (mut group, worker, standby) = group_of(3, 5, "2s").await;
    worker.kill();
    group.put(A, "free", 1).await;
    let second = cut_and_switch(&mut group, &[]).await;
    group.put(B, "k1", 200).await;
    group.gateways[A].come_back().await;
    until_ready(&standby, |body| body.contains("quarantined")).await;
    captured(&group).await;
    steady(&group).await;
    let home = ["failback", "--apply"];
    let here = group.config(B, "");
    let dying = died(&here, &home, "home-turned", || {}).await;
    assert_eq!(dying, None, "it dies after the turn");
    // Nobody reads there any more, and the application still writes. It had no time to close the capture.
    standby.kill();
    group.put(A, "late", 9).await;
    let standby = Worker::start(&group.config(A, ""));
    let (code, out, said) = command(&here, &home).await;
    assert_eq!(code, Some(1), "{out}{said}");
    assert!(out.contains("1 stranded write(s) are kept"), "{out}");
    group.converge(B, A, 5).await;
    assert_eq!(group.value(A, "free").await.as_deref(), Some("1"));
    // A person looks at what is kept, and drops it.
    let (code, out, _) = command(&here, &["failback"]).await;
    assert_eq!(code, Some(1), "{out}");
    assert!(
        out.contains("1 stranded write(s) of an earlier way home"),
        "{out}"
    );
    let report = group.temp.path().join("kept.jsonl");
    let report = report.to_str().unwrap();
    let drops = ["failback", "--stranded", "discard", "--apply"];
    let (code, _, said) = command(&here, &drops).await;
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("--report FILE"), "{said}");
    let mut drops = drops.to_vec();
    drops.extend(["--report", report]);
    let (code, out, said) = command(&here, &drops).await;
    assert_eq!(code, Some(0), "{out}{said}");
    let line = json(std::fs::read_to_string(report).unwrap().trim());
    assert_eq!(line["stranded"]["v"]["N"], "9");
    assert_eq!(line["key"]["id"]["S"], "late");
    assert!(standby.stop().await.success());
    assert!(second.stop().await.success());
}

/// Runs the command until it dies at `step`; its exit code otherwise.
async fn died(
    config: &std::path::Path,
    arguments: &[&str],
    step: &str,
    mut tend: impl FnMut(),
) -> Option<i32> {
    let mut all = arguments.to_vec();
    all.extend(["--config", config.to_str().unwrap()]);
    let mut typed = common::binary::farshore(&all);
    typed.env("FARSHORE_TEST_CRASH", step);
    let said = std::fs::File::create(config.with_extension("said")).unwrap();
    typed.stdout(said.try_clone().unwrap()).stderr(said);
    let mut child = common::binary::spawn(typed).unwrap();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code();
        }
        tend();
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// What the stream had forgotten is found by comparing both tables, and the plan says so; items that time to live
/// deleted are not stranded.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "most of a minute: the long lane has it"]
async fn what_the_stream_had_forgotten_is_found_by_comparing_both_tables() {
    let (mut group, worker, standby) = group(4, 6).await;
    let ttl = aws_sdk_dynamodb::types::TimeToLiveSpecification::builder();
    let ttl = ttl.enabled(true).attribute_name("expires").build().unwrap();
    let on = group.clients[A].update_time_to_live().table_name(TABLE);
    on.time_to_live_specification(ttl).send().await.unwrap();
    let put = group.clients[A].put_item().table_name(TABLE);
    let put = put.item("id", s("expired")).item("v", common::stand::n(1));
    let put = put.item("expires", common::stand::n(1_000));
    put.send().await.unwrap();
    group.converge(A, B, 7).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    worker.kill();
    assert_eq!(group.gateways[A].sweep_ttl().unwrap(), 1);
    group.put(A, "forgotten", 1).await;
    group.put(A, "k1", 100).await;
    group.put(A, "k2", 100).await;
    delete(&group.clients[A], TABLE, "k3").await;
    let second = cut_and_switch(&mut group, &["--accept-loss", "late-writes"]).await;
    group.put(B, "k2", 200).await;
    group.gateways[A].trim(TABLE);
    group.gateways[A].come_back().await;
    until_ready(&standby, |body| body.contains("quarantined")).await;
    let compared = async || {
        let rows = group.rows_of(A, "capture").await;
        rows.first().is_some_and(|row| row.contains_key("compared"))
    };
    eventually("both are compared", PATIENCE, compared).await;
    captured(&group).await;
    let again = [
        "failover",
        "--to",
        LABELS[B],
        "--apply",
        "--accept-loss",
        "late-writes",
    ];
    command(&group.config(B, ""), &again).await;
    let (_, out, _) = command(&group.config(B, ""), &["failback"]).await;
    assert!(out.contains("had forgotten records"), "{out}");
    assert!(out.contains("compared from end to end"), "{out}");
    let found = plan(&group, &[]).await;
    let counts = &found["tables"][0]["counts"];
    assert_eq!(counts["free"], 3, "{found}");
    assert_eq!(counts["conflicting"], 1, "{found}");
    let home = ["failback", "--conflicts", "keep", "--apply"];
    let (code, out, said) = command(&group.config(B, ""), &home).await;
    assert_eq!(code, Some(1), "{out}{said}");
    group.converge(B, A, 6).await;
    assert_eq!(group.value(B, "forgotten").await.as_deref(), Some("1"));
    assert_eq!(group.value(B, "k1").await.as_deref(), Some("100"));
    assert_eq!(group.value(B, "k2").await.as_deref(), Some("200"));
    assert_eq!(group.get(B, "k3").await, None);
    assert!(standby.stop().await.success());
    assert!(second.stop().await.success());
}

/// The new active region is lost in the middle of the way home: the old one takes over with what it holds, and what
/// the other one wrote is stranded there. Nothing of which nobody can say is applied by itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "most of a minute: the long lane has it"]
async fn a_second_outage_in_the_middle_of_the_way_home_loses_nothing() {
    let (mut group, worker, standby) = group(5, 5).await;
    worker.kill();
    group.put(A, "free", 1).await;
    group.put(A, "k1", 100).await;
    let second = cut_and_switch(&mut group, &[]).await;
    group.put(B, "k1", 200).await;
    group.put(B, "new", 1).await;
    group.gateways[A].come_back().await;
    until_ready(&standby, |body| body.contains("quarantined")).await;
    captured(&group).await;
    steady(&group).await;
    let here = group.config(B, "");
    let dying = died(&here, &["failback", "--apply"], "home-decided", || {}).await;
    assert_eq!(dying, None);
    assert_eq!(group.value(B, "free").await.as_deref(), Some("1"));
    // Before the turn, the other way round.
    group.gateways[B].go_away(Outage::Refused).await;
    let there = group.config(A, "");
    let (_, out, _) = command(&there, &["failover", "--to", LABELS[A]]).await;
    let losses = out.lines().filter_map(|line| {
        let (name, _) = line.strip_prefix("  ! ")?.split_once(": ")?;
        Some(name.to_owned())
    });
    let losses: Vec<String> = losses.collect();
    let mut switch = vec!["failover", "--to", LABELS[A], "--apply"];
    for loss in &losses {
        switch.extend(["--accept-loss", loss]);
    }
    switch.extend(["--accept-loss", "late-writes"]);
    let (_, out, said) = command(&there, &switch).await;
    assert_eq!(group.told(A).await.unwrap().0, 3, "{out}{said}");
    until_ready(&standby, |body| body.contains("\"standby\":\"us-east-1\"")).await;
    group.put(A, "third", 3).await;
    group.gateways[B].come_back().await;
    until_ready(&second, |body| body.contains("quarantined")).await;
    let compared = async || {
        let rows = group.rows_of(B, "capture").await;
        rows.iter().any(|row| row.contains_key("compared"))
    };
    eventually("both are compared", PATIENCE, compared).await;
    if group.told(A).await.unwrap().2 != "steady" {
        command(&there, &switch).await;
    }
    let home = [
        "failback",
        "--stranded",
        "apply",
        "--conflicts",
        "newest=v",
        "--apply",
    ];
    let report = group.temp.path().join("second.jsonl");
    let mut home = home.to_vec();
    home.extend(["--report", report.to_str().unwrap()]);
    let (code, out, said) = command(&there, &home).await;
    assert_eq!(code, Some(1), "{out}{said}");
    group.converge(A, B, 5).await;
    // What the second region wrote stands in the store and in the report, and replaces nothing here.
    assert_eq!(group.value(A, "k1").await.as_deref(), Some("100"));
    assert_eq!(group.value(A, "third").await.as_deref(), Some("3"));
    let lines = std::fs::read_to_string(&report).unwrap();
    let told = |id: &str| {
        lines
            .lines()
            .map(json)
            .any(|line| line["key"]["id"]["S"] == id)
    };
    assert!(told("k1") && told("new"), "{lines}");
    assert!(standby.stop().await.success());
    assert!(second.stop().await.success());
}

/// A comparison that finds something newer under a key makes what was decided about the older one void, and whoever
/// looked before decides nothing any more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_comparison_has_changed_is_decided_by_nobody_who_looked_before() {
    use farshore::jobs::failback::store::{Decided, Store, Write};
    use farshore::stream::sequence::SequenceNumber;
    let group = Group::new(6, 2).await;
    group.provision(&[B, A]);
    let store = Store::new(group.clients[A].clone(), "farshore-g-failback".to_owned());
    let keys: failover_support::Row = [("id".to_owned(), s("k"))].into();
    let item = |v: u32| {
        let mut item = keys.clone();
        item.insert("v".to_owned(), common::stand::n(v));
        item
    };
    let (one, two) = (item(1), item(2));
    let write = |image| Write {
        keys: &keys,
        image: Some(image),
        at_ms: 1,
        writes: 1,
    };
    let place = (1, TABLE);
    let told = SequenceNumber::parse("7").unwrap();
    store.put(place, &write(&one), &told).await.unwrap();
    let seen = store.page(place, None).await.unwrap().rows.remove(0);
    store.put_found(place, &write(&two)).await.unwrap();
    assert!(!store.decide(&seen, Decided::Equal).await.unwrap());
    assert!(!store.note_sent(&seen, 5).await.unwrap());
    // What the stream tells again changes nothing, what it tells next does.
    store.put(place, &write(&one), &told).await.unwrap();
    let now = store.get(&seen.row).await.unwrap().unwrap();
    assert_eq!((now.image.as_ref(), now.decided), (Some(&two), None));
    assert!(store.decide(&now, Decided::Reported).await.unwrap());
    let next = SequenceNumber::parse("8").unwrap();
    store.put(place, &write(&one), &next).await.unwrap();
    store.remove(&now).await.unwrap();
    let now = store.get(&seen.row).await.unwrap().unwrap();
    assert_eq!((now.image.as_ref(), now.decided), (Some(&one), None));
}
