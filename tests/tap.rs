//! The tap: pause and resume through the real binary, for a whole fleet.

mod common;
mod suite;

use std::path::Path;
use std::process::Output;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use aws_sdk_dynamodb::Client;
use common::binary::{Worker, farshore, provision, run, stderr, stdout};
use common::stand::{Stand, put};
use common::{checker, eventually};
use farshore::embedded::gateway::{Fault, Options};
use farshore::lease::row::{DoubtCause, DoubtRow, WorkerRow};
use farshore::lease::table::StateTable;
use farshore::stream::ShardId;
use farshore::stream::reader::Position;
use serde_json::Value;

/// The lease of a stand's configuration.
const LEASE: Duration = Duration::from_secs(1);
/// What a busy host may add between a decision and its effect.
const SLACK: Duration = Duration::from_millis(1_500);

/// `pause` or `resume`, asked by alice.
fn turn(config: &Path, arguments: &[&str]) -> Output {
    let mut command = farshore(arguments);
    command.args(["--config", config.to_str().unwrap()]);
    command.env("USER", "alice").output().unwrap()
}

fn pause(config: &Path, more: &[&str]) -> Output {
    let arguments = ["pause", "--reason", "a bad write", "--apply"];
    turn(config, &[&arguments, more].concat())
}

fn resume(config: &Path, more: &[&str]) -> Output {
    let arguments = ["resume", "--reason", "mended", "--apply"];
    turn(config, &[&arguments, more].concat())
}

fn code(output: &Output, code: i32) -> String {
    let text = format!("{}{}", stdout(output), stderr(output));
    assert_eq!(output.status.code(), Some(code), "{text}");
    text
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", stderr(output)))
}

/// The names of an answer's fields.
fn fields(value: &Value) -> Vec<&str> {
    value
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect()
}

/// Changes of `table`, without end.
struct Changes {
    stop: Arc<AtomicBool>,
    task: tokio::task::JoinHandle<()>,
}

impl Changes {
    fn of(client: &Client, table: &str) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (client, table, stopped) = (client.clone(), table.to_owned(), Arc::clone(&stop));
        let task = tokio::spawn(async move {
            let mut number = 0;
            while !stopped.load(Ordering::Relaxed) {
                put(&client, &table, &format!("k{}", number % 200), number).await;
                number += 1;
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        Self { stop, task }
    }

    async fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await.unwrap();
    }
}

async fn red_with(worker: &Worker, parts: &[&str]) {
    let start = Instant::now();
    loop {
        let answer = worker.get("/readyz").await;
        let shown = answer
            .as_ref()
            .is_some_and(|(status, body)| *status == 503 && parts.iter().all(|p| body.contains(p)));
        if shown {
            return;
        }
        assert!(
            start.elapsed().as_secs() < 15,
            "{parts:?} not in {answer:?}"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn green(worker: &Worker) {
    let ready = async || {
        worker
            .get("/readyz")
            .await
            .is_some_and(|(status, _)| status == 200)
    };
    eventually("readiness is green", Duration::from_secs(20), ready).await;
}

/// How much later than the pause was stored the last write arrived at the replica, if later at all.
fn last_write_after_pause(stand: &Stand) -> Duration {
    let calls = stand.gateways[1].calls();
    let stored = calls
        .iter()
        .filter(|call| call.keys.iter().any(|key| key.json.contains("pause#")))
        .filter(|call| call.operation == "PutItem")
        .find_map(|call| call.ended)
        .expect("no pause was stored");
    let last = calls
        .iter()
        .filter(|call| call.operation == "BatchWriteItem")
        .map(|call| call.arrived)
        .max()
        .expect("nothing was ever written");
    last.saturating_sub(stored)
}

/// The whole fleet stops within one lease, says who stopped it and why, keeps its leases and its
/// headroom running, and loses nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pause_stops_the_whole_fleet_and_a_resume_brings_everything() {
    let seed = common::seed();
    let stand = Stand::gateways(Options::new(seed).shards(4), Options::new(seed)).await;
    let table = stand.table("orders");
    stand.create_source(&table).await;
    let configs = [stand.config(&[&table], ""), stand.config(&[&table], "")];
    provision(&configs[0]);
    let workers = [Worker::start(&configs[0]), Worker::start(&configs[1])];
    for worker in &workers {
        green(worker).await;
    }
    let changes = Changes::of(&stand.source, &table);
    let flows = async || checker::items(&stand.target, &table).await.len() > 20;
    eventually("changes flow", Duration::from_secs(20), flows).await;
    // The plan alone changes nothing.
    let plan = turn(&configs[0], &["pause", "--reason", "a bad write"]);
    assert!(code(&plan, 1).contains("add --apply"));
    let done = pause(&configs[0], &["--json"]);
    code(&done, 0);
    let expected = "applied command done headroom notes planned table version";
    assert_eq!(fields(&json(&done)).join(" "), expected);
    assert_eq!(json(&done)["version"], 1);
    assert_eq!(json(&done)["headroom"][0]["table"], table.as_str());
    for worker in &workers {
        let parts = ["\"paused\"", "alice@", "a bad write", "the stream forgets"];
        red_with(worker, &parts).await;
        assert_eq!(worker.metric("farshore_paused").await, 1.0);
    }
    tokio::time::sleep(2 * LEASE + SLACK).await;
    let late = last_write_after_pause(&stand);
    println!("the last write arrived {late:?} after the pause was stored");
    assert!(late <= LEASE + SLACK, "{late:?}");
    // Whoever holds shards sees their headroom run down.
    let headroom = async || {
        let mut least = f64::MAX;
        for worker in &workers {
            least = least.min(worker.metric("farshore_stream_headroom_seconds").await);
        }
        least
    };
    let before = headroom().await;
    let runs_down = async || headroom().await < before - 2.0;
    eventually("headroom runs down", Duration::from_secs(15), runs_down).await;
    let held = workers[0].metric("farshore_leases_held").await
        + workers[1].metric("farshore_leases_held").await;
    assert_eq!(held, 4.0, "leases are kept");
    let again = pause(&configs[1], &[]);
    assert!(code(&again, 0).contains("already paused by alice@"));
    changes.stop().await;
    code(&resume(&configs[1], &[]), 0);
    stand.converge(&table, 100).await;
    for worker in workers {
        green(&worker).await;
        assert_eq!(worker.metric("farshore_paused").await, 0.0);
        for (event, why) in [("paused", "a bad write"), ("resumed", "mended")] {
            let told = common::stand::text_of(&worker.log);
            let lines = told
                .lines()
                .filter(|line| line.contains(&format!(" {event}: ")));
            let lines: Vec<&str> = lines.collect();
            assert_eq!(lines.len(), 1, "one event: {lines:?}");
            assert!(
                lines[0].contains("alice@") && lines[0].contains(why),
                "{lines:?}"
            );
        }
        assert!(worker.stop().await.success());
    }
}

/// A pause of one table leaves the other flowing; a worker stops cleanly while paused and starts
/// paused.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pause_of_one_table_leaves_the_other_flowing_and_outlives_its_worker() {
    let stand = Stand::gateways(Options::new(common::seed()), Options::new(1)).await;
    let (orders, people) = (stand.table("orders"), stand.table("people"));
    stand.create_source(&orders).await;
    stand.create_source(&people).await;
    let config = stand.config(&[&orders, &people], "");
    provision(&config);
    let worker = Worker::following(&config).await;
    green(&worker).await;
    code(&pause(&config, &["--table", &orders]), 0);
    red_with(&worker, &["\"paused\"", &orders]).await;
    tokio::time::sleep(LEASE + SLACK).await;
    for id in 0..30 {
        put(&stand.source, &orders, &format!("k{id}"), id).await;
        put(&stand.source, &people, &format!("k{id}"), id).await;
    }
    stand.converge(&people, 30).await;
    assert!(checker::items(&stand.target, &orders).await.is_empty());
    assert!(worker.stop().await.success(), "it drains while paused");
    let worker = Worker::following(&config).await;
    red_with(&worker, &["\"paused\"", &orders]).await;
    put(&stand.source, &people, "later", 1).await;
    stand.converge(&people, 31).await;
    tokio::time::sleep(LEASE).await;
    assert!(checker::items(&stand.target, &orders).await.is_empty());
    // The pause of all tables is another one.
    assert!(
        code(&resume(&config, &[]), 0).contains(&format!("table {orders} has a pause of its own"))
    );
    code(&pause(&config, &[]), 0);
    code(&resume(&config, &["--table", &orders]), 1);
    red_with(&worker, &["\"paused\"", &people]).await;
    assert!(checker::items(&stand.target, &orders).await.is_empty());
    code(&resume(&config, &[]), 0);
    stand.converge(&orders, 30).await;
    green(&worker).await;
    assert!(worker.stop().await.success());
}

/// While the state table cannot be read there may be a pause in it: a lease later nothing is sent.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pause_that_cannot_be_seen_holds() {
    let stand = Stand::gateways(Options::new(common::seed()), Options::new(1)).await;
    let table = stand.table("orders");
    let (config, worker) = suite::replicated(&stand, &table, "").await;
    let changes = Changes::of(&stand.source, &table);
    let flows = async || checker::items(&stand.target, &table).await.len() > 20;
    eventually("changes flow", Duration::from_secs(20), flows).await;
    // Leases can still be renewed.
    let blind = Fault::access_denied()
        .on("Scan")
        .table(&stand.state_table());
    let blind = stand.gateways[1].inject(blind);
    let said = pause(&config, &[]);
    assert!(
        code(&said, 0).contains("could not be read"),
        "{}",
        stdout(&said)
    );
    red_with(&worker, &["outage-state"]).await;
    tokio::time::sleep(2 * LEASE + SLACK).await;
    let late = last_write_after_pause(&stand);
    println!("the last write arrived {late:?} after the pause was stored");
    assert!(late <= LEASE + SLACK, "{late:?}");
    assert_eq!(worker.metric("farshore_leases_held").await, 1.0);
    red_with(&worker, &["state-unread"]).await;
    let writes = || stand.gateways[1].calls_of("BatchWriteItem").len();
    let before = writes();
    blind.off();
    red_with(&worker, &["\"paused\"", "alice@"]).await;
    tokio::time::sleep(LEASE).await;
    assert_eq!(writes(), before, "the pause was there to be seen");
    changes.stop().await;
    code(&resume(&config, &[]), 0);
    stand.converge(&table, 100).await;
    green(&worker).await;
    assert!(worker.stop().await.success());
}

/// What is waiting for the write budget when the tap closes is not sent either.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pause_stops_what_waits_for_the_write_budget() {
    let stand = Stand::gateways(Options::new(common::seed()), Options::new(1)).await;
    let table = stand.table("orders");
    stand.create_source(&table).await;
    let slow = format!("name = \"{table}\"\nunits_per_second = 10");
    let config = stand.config(&[&slow], "");
    provision(&config);
    let worker = Worker::following(&config).await;
    for id in 0..400 {
        put(&stand.source, &table, &format!("k{id}"), id).await;
    }
    // A batch may wait for its units longer than the changes above took: the pause comes after one.
    let writing = async || !stand.gateways[1].calls_of("BatchWriteItem").is_empty();
    eventually("something is written", Duration::from_secs(20), writing).await;
    code(&pause(&config, &[]), 0);
    tokio::time::sleep(3 * LEASE + 2 * SLACK).await;
    let late = last_write_after_pause(&stand);
    assert!(late <= LEASE + SLACK, "{late:?}");
    assert!(checker::items(&stand.target, &table).await.len() < 300);
    assert!(worker.stop().await.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tap_that_is_not_there_is_not_turned() {
    let stand = Stand::embedded().await;
    let table = stand.table("orders");
    stand.create_source(&table).await;
    let config = stand.config(&[&table], "");
    provision(&config);
    let wrong = format!("{table}x");
    let unknown = pause(&config, &["--table", &wrong]);
    assert!(code(&unknown, 2).contains(&format!("Did you mean `{table}`?")));
    let nothing = resume(&config, &["--table", &table]);
    assert!(code(&nothing, 0).contains("has no pause of its own"));
    assert!(code(&resume(&config, &[]), 0).contains("Nothing to do"));
    let empty = turn(&config, &["pause", "--apply", "--reason", " "]);
    assert!(code(&empty, 2).contains("It is empty"));
    // In the active region a pause would stop nothing.
    let mut active = farshore(&["pause", "--apply", "--reason", "x"]);
    active.args(["--config", config.to_str().unwrap()]);
    let active = active.env("FARSHORE_HERE", "us-east-1").output().unwrap();
    assert_eq!(active.status.code(), Some(2), "{}", stdout(&active));
    let rows = common::stand::state_rows(&stand.target, &stand.state_table()).await;
    assert!(
        rows.iter()
            .all(|row| row["entityType"] != common::stand::s("pause")),
        "{rows:?}"
    );
}

/// Status shows pauses, doubts and workers, as text and in one documented form.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn status_shows_pauses_doubts_and_workers() {
    let stand = Stand::embedded().await;
    let table = stand.table("orders");
    stand.create_source(&table).await;
    let config = stand.config(&[&table], "");
    provision(&config);
    code(&pause(&config, &["--table", &table]), 0);
    let state = StateTable::new(stand.target.clone(), stand.state_table());
    let now_ms = farshore::dynamo::clock::host_ms();
    let mut worker = WorkerRow::new("host-1#abc", 1, "2026-11-20T12:00:00Z".into());
    worker.updated_at = now_ms;
    state.create(&worker).await.unwrap();
    for until in [now_ms - 11 * 60_000, now_ms + 60_000] {
        let doubt = DoubtRow::new(
            1,
            &table,
            "arn:aws:dynamodb:r:1:table/t/stream/1",
            &ShardId("s".into()),
            DoubtCause::Unanswered,
            &Position::TrimHorizon,
            until,
            "2026-11-20T12:00:00Z".into(),
        );
        state.create(&doubt).await.unwrap();
    }
    let path = config.to_str().unwrap();
    let text = code(&run(&["status", "--config", path]), 1);
    for part in [
        "PAUSED by alice@",
        "a bad write",
        "2 range(s) in doubt",
        "1 OVERDUE",
        "worker host-1#abc",
    ] {
        assert!(text.contains(part), "{part} is missing:\n{text}");
    }
    let answer = json(&run(&["status", "--json", "--config", path]));
    let expected = "active at clock clockErrorSeconds deadLetters doubts epoch events flow gaps group headline headroomSeconds here history home jobs outages pauses reasons recoveryPoint regions shards tables version worker workers";
    assert_eq!(fields(&answer).join(" "), expected);
    assert_eq!(answer["version"], 1);
    assert_eq!(fields(&answer["pauses"][0]).join(" "), "at by reason table");
    assert_eq!(answer["pauses"][0]["table"], table.as_str());
    assert_eq!(
        fields(&answer["doubts"][0]).join(" "),
        "open overdue table until"
    );
    assert_eq!(
        (
            &answer["doubts"][0]["open"],
            &answer["doubts"][0]["overdue"]
        ),
        (&2.into(), &1.into())
    );
    let expected = "alive epoch id leaving shards since updatedAt version";
    assert_eq!(fields(&answer["workers"][0]).join(" "), expected);
    assert_eq!(answer["workers"][0]["alive"], true);
}
