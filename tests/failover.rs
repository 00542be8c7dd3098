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

/// `failover --to … --apply --json` and what it answers.
async fn fail_over(
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
        let (_, answer, said) = fail_over(&one, &settle).await;
        assert_eq!(answer["epoch"], 3, "{answer:#}\n{said}");
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

/// An application that heeds the control record: it writes where that says, waits while it says `closing`,
/// and notes every write that was acknowledged.
struct Application {
    task: tokio::task::JoinHandle<Noted>,
    stop: tokio_util::sync::CancellationToken,
}

#[derive(Default)]
struct Noted {
    /// The last value acknowledged of each key.
    last: std::collections::BTreeMap<String, u64>,
    written: [u64; 2],
    /// Longest time between two acknowledged writes.
    waited: Duration,
}

impl Application {
    fn start(group: &Group, every: Duration) -> Self {
        let stop = tokio_util::sync::CancellationToken::new();
        let stopped = stop.clone();
        let clients = group.clients.clone();
        let state_table = group.state_table();
        let task = tokio::spawn(async move {
            let mut noted = Noted::default();
            let mut place = Some(A);
            let mut looked = Instant::now();
            let mut last = Instant::now();
            let mut ticks = tokio::time::interval(every);
            let mut v = 0u64;
            while !stopped.is_cancelled() {
                ticks.tick().await;
                if looked.elapsed() > Duration::from_millis(100) || place.is_none() {
                    looked = Instant::now();
                    let rows = common::stand::state_rows(&clients[B], &state_table).await;
                    let control = rows
                        .iter()
                        .find(|row| row["entityType"] == s("control"))
                        .unwrap();
                    place = match (
                        control["active"].as_s().unwrap(),
                        control["state"].as_s().unwrap(),
                    ) {
                        (_, state) if state == "closing" || state == "fencing" => None,
                        (active, _) if active == LABELS[A] => Some(A),
                        _ => Some(B),
                    };
                }
                let Some(place) = place else { continue };
                v += 1;
                let id = format!("k{}", v % 97);
                common::stand::put(&clients[place], failover_support::TABLE, &id, v).await;
                noted.waited = noted.waited.max(last.elapsed());
                last = Instant::now();
                noted.written[place] += 1;
                noted.last.insert(id, v);
            }
            noted
        });
        Self { task, stop }
    }

    async fn stop(self) -> Noted {
        self.stop.cancel();
        self.task.await.unwrap()
    }
}

/// A planned switchover under load loses nothing, and says how long writes had to wait.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_planned_switchover_under_load_loses_nothing_and_says_how_long_writes_waited() {
    let mut group = Group::new(9, 2).await;
    group.lease = "3s";
    group.provision(&[B]);
    let worker = group.worker(B).await;
    let application = Application::start(&group, Duration::from_millis(2));
    tokio::time::sleep(Duration::from_secs(1)).await;
    let config = group.config(B, "");
    let (code, answer, said) = fail_over(
        &config,
        &["--to", LABELS[B], "--planned", "--within", "60s"],
    )
    .await;
    assert_eq!(code, Some(0), "{answer:#}\n{said}");
    tokio::time::sleep(Duration::from_millis(500)).await;
    let noted = application.stop().await;
    let told = answer["writesWaitedSeconds"].as_f64().unwrap();
    println!(
        "{:?} writes; told {told} s, the application saw {:?}",
        noted.written, noted.waited
    );
    assert!(
        noted.written[A] > 100 && noted.written[B] > 10,
        "{:?}",
        noted.written
    );
    assert_eq!(answer["leftBehind"], 0, "{answer:#}");
    assert_eq!(answer["inFlight"], serde_json::json!([]));
    for (id, v) in &noted.last {
        assert_eq!(group.value(B, id).await, Some(v.to_string()), "{id}");
    }
    assert!((told - noted.waited.as_secs_f64()).abs() < 2.0, "{told}");
    assert!(worker.stop().await.success());
}

/// An application that does not wait makes a planned switchover give up, and nothing has changed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_planned_switchover_that_is_never_quiet_is_given_up() {
    let group = Group::new(10, 2).await;
    group.provision(&[B]);
    let worker = group.worker(B).await;
    let client = group.clients[A].clone();
    let writing = tokio::spawn(async move {
        for v in 0u64.. {
            common::stand::put(&client, failover_support::TABLE, "k", v).await;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
    let config = group.config(B, "");
    let (code, answer, said) =
        fail_over(&config, &["--to", LABELS[B], "--planned", "--within", "3s"]).await;
    assert_eq!(code, Some(1), "{answer:#}\n{said}");
    assert!(
        answer["givenUp"]
            .as_str()
            .unwrap()
            .contains("stop the application"),
        "{answer:#}"
    );
    let steady = (1, LABELS[A].to_owned(), "steady".to_owned());
    assert_eq!(group.told(B).await, Some(steady.clone()));
    // One that is killed while writes wait does not make them wait for ever.
    let path = config.to_str().unwrap().to_owned();
    let mut dying = common::binary::farshore(&[
        "failover",
        "--to",
        LABELS[B],
        "--planned",
        "--within",
        "1s",
        "--apply",
        "--config",
        &path,
    ]);
    dying.env("FARSHORE_TEST_CRASH", "failover-closed");
    let died = tokio::task::spawn_blocking(move || dying.output())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(died.status.code(), None);
    assert_eq!(group.told(B).await.unwrap().2, "closing");
    let reopened = async || group.told(B).await == Some(steady.clone());
    eventually("writes need not wait any more", PATIENCE, reopened).await;
    writing.abort();
    group.converge(A, B, 1).await;
    assert!(worker.stop().await.success());
}

/// The form of an answer: every path in it, with the kind of its value.
fn shape(value: &serde_json::Value, path: &str, lines: &mut std::collections::BTreeSet<String>) {
    use serde_json::Value;
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                shape(value, &format!("{path}.{name}"), lines);
            }
        }
        Value::Array(values) => {
            lines.insert(format!("{path}[]"));
            for value in values {
                shape(value, &format!("{path}[]"), lines);
            }
        }
        other => {
            let kind = match other {
                Value::Null => "null",
                Value::Bool(_) => "bool",
                Value::Number(_) => "number",
                _ => "string",
            };
            lines.insert(format!("{path} {kind}"));
        }
    }
}

/// The JSON of plan and report is a contract: docs/FAILOVER.md says what each field means.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_answers_of_failover_have_the_documented_form() {
    let mut group = Group::new(11, 2).await;
    group.late_effect = "2s";
    group.provision(&[B]);
    let worker = group.worker(B).await;
    group.put(A, "k", 1).await;
    group.converge(A, B, 1).await;
    let stored = async || {
        let rows = group.rows_of(B, "shard").await;
        rows.iter().all(|row| row.contains_key("watermark"))
    };
    eventually("how far it came is stored", PATIENCE, stored).await;
    worker.kill();
    group.gateways[A]
        .go_away(farshore::embedded::gateway::Outage::Refused)
        .await;
    let config = group.config(B, "");
    let (_, plan, _) = command(&config, &["failover", "--to", LABELS[B], "--json"]).await;
    let plan: serde_json::Value = serde_json::from_str(&plan).unwrap();
    let (_, report, _) = fail_over(&config, &["--to", LABELS[B]]).await;
    let mut lines = std::collections::BTreeSet::new();
    shape(&plan, "plan", &mut lines);
    shape(&report, "report", &mut lines);
    let now: Vec<String> = lines.into_iter().collect();
    let known = include_str!("failover_support/answers.txt");
    assert_eq!(now.join("\n"), known.trim_end());
    let page = include_str!("../docs/FAILOVER.md");
    for line in &now {
        let name = line
            .rsplit('.')
            .next()
            .unwrap()
            .split([' ', '['])
            .next()
            .unwrap();
        assert!(
            page.contains(&format!("`{name}`")),
            "docs/FAILOVER.md lacks `{name}`"
        );
    }
}

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
    let group = Group::new(12, 2).await;
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
    let group = Group::new(13, 2).await;
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
}

/// Actions run once, in their order, after the fence; one that is required and fails stops the command, and
/// the same command goes on with it, also when it was killed in the middle of one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_required_action_that_fails_stops_and_the_same_command_goes_on() {
    let group = Group::new(14, 2).await;
    group.provision(&[B]);
    let worker = group.worker(B).await;
    group.put(A, "k", 1).await;
    group.converge(A, B, 1).await;
    let file = |name: &str| group.temp.path().join(name).display().to_string();
    let (first, gate, told) = (file("first"), file("gate"), file("told"));
    let actions = format!(
        r#"
[[actions]]
kind = "command"
name = "first"
command = ["/bin/sh", "-c", "echo done >> {first}"]
[[actions]]
kind = "command"
name = "second"
retries = 0
command = ["/bin/sh", "-c", "test -e {gate}"]
[[actions]]
kind = "command"
name = "third"
command = ["/bin/sh", "-c", "echo {{region}} {{epoch}} >> {told}"]
"#
    );
    let config = group.config(B, &actions);
    let (code, answer, said) = fail_over(&config, &["--to", LABELS[B]]).await;
    assert_eq!(code, Some(1), "{answer:#}\n{said}");
    assert!(
        answer["stoppedAt"].as_str().unwrap().contains("second"),
        "{answer:#}"
    );
    let acted = answer["actions"].as_array().unwrap();
    let standings: Vec<_> = acted.iter().map(|one| one["standing"].clone()).collect();
    assert_eq!(standings, ["done", "failed", "skipped"]);
    assert_eq!(group.told(B).await.unwrap().2, "actions");
    let active = async || {
        worker
            .get("/active")
            .await
            .is_some_and(|(code, _)| code == 200)
    };
    eventually("it serves, the fence is complete", PATIENCE, active).await;
    std::fs::write(group.temp.path().join("gate"), "open").unwrap();
    let path = config.to_str().unwrap().to_owned();
    let mut dying =
        common::binary::farshore(&["failover", "--to", LABELS[B], "--apply", "--config", &path]);
    dying.env("FARSHORE_TEST_CRASH", "failover-acted");
    let died = tokio::task::spawn_blocking(move || dying.output());
    assert_eq!(died.await.unwrap().unwrap().status.code(), None);
    let (code, answer, said) = fail_over(&config, &["--to", LABELS[B]]).await;
    assert_eq!(code, Some(0), "{answer:#}\n{said}");
    let text = |path: &str| std::fs::read_to_string(path).unwrap();
    assert_eq!(text(&first), "done\n", "it was done once");
    assert_eq!(text(&told), "us-west-2 2\n");
    assert!(worker.stop().await.success());
}

/// Time to live moves with the active region.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn time_to_live_is_turned_on_in_the_new_active_region_and_off_in_the_old() {
    let group = Group::new(15, 2).await;
    group.provision(&[B]);
    let worker = group.worker(B).await;
    let specification = aws_sdk_dynamodb::types::TimeToLiveSpecification::builder()
        .enabled(true)
        .attribute_name("expires")
        .build()
        .unwrap();
    let update = group.clients[A].update_time_to_live();
    let update = update.table_name(failover_support::TABLE);
    let update = update.time_to_live_specification(specification);
    update.send().await.unwrap();
    let config = group.config(B, "");
    let (_, plan, _) = command(&config, &["failover", "--to", LABELS[B]]).await;
    assert!(
        plan.contains("time to live of orders (expires): on in us-west-2"),
        "{plan}"
    );
    let (code, answer, said) = fail_over(&config, &["--to", LABELS[B]]).await;
    assert_eq!(code, Some(0), "{answer:#}\n{said}");
    for (region, on) in [(A, false), (B, true)] {
        let asked = group.clients[region].describe_time_to_live();
        let asked = asked
            .table_name(failover_support::TABLE)
            .send()
            .await
            .unwrap();
        let status = asked
            .time_to_live_description
            .unwrap()
            .time_to_live_status
            .unwrap();
        assert_eq!(
            status.as_str() == "ENABLED",
            on,
            "{}: {status:?}",
            LABELS[region]
        );
    }
    assert!(worker.stop().await.success());
}
