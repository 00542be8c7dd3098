//! Jobs: several processes share one, what a killed one leaves is gone on with, and each strategy
//! touches what it promises and nothing else.

mod common;
mod suite;

use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use common::binary::{Worker, farshore, run, spawn, stderr, stdout};
use common::stand::{SOURCE, Stand, TARGET, delete, n, put, s, state_rows};
use common::{checker, eventually, seed};
use farshore::embedded::gateway::{Fault, Options};
use rand::SeedableRng;
use rand::rngs::StdRng;
use serde_json::Value;
use suite::reconcile::{
    Item, assert_same, counted, ends, is_of_job, pair, put_all, reconcile, refused, reported,
    with_drift,
};

const WITHIN: Duration = Duration::from_secs(40);

/// An item so large that a page holds few of them.
fn large(id: usize, value: usize) -> Item {
    Item::from([
        ("id".to_owned(), s(format!("k{id}"))),
        ("v".to_owned(), n(value)),
        ("text".to_owned(), s("x".repeat(30_000))),
    ])
}

fn start(config: &Path, more: &[&str]) -> Child {
    let mut arguments = vec!["reconcile", "--config", config.to_str().unwrap()];
    arguments.extend(more);
    let mut command = farshore(&arguments);
    command.stdout(Stdio::piped()).stderr(Stdio::null());
    spawn(command).unwrap()
}

/// What a process that was started with `--json` says of its only table, and its exit code.
async fn answer(child: Child) -> (i32, Value) {
    let output = tokio::task::spawn_blocking(move || child.wait_with_output().unwrap());
    let output = output.await.unwrap();
    let value: Value = serde_json::from_slice(&output.stdout).unwrap();
    (output.status.code().unwrap(), value["tables"][0].clone())
}

/// The jobs that `status` shows.
fn jobs(config: &Path) -> Vec<Value> {
    let status = run(&["status", "--json", "--config", config.to_str().unwrap()]);
    let value: Value = serde_json::from_str(&stdout(&status)).unwrap();
    value["jobs"].as_array().unwrap().clone()
}

/// The only job, once it reads.
async fn job_at_work(config: &Path) -> String {
    let at_work = async || jobs(config).iter().any(|job| job["alive"] == true);
    eventually("a job is at work", WITHIN, at_work).await;
    jobs(config)[0]["id"].as_str().unwrap().to_owned()
}

async fn segments(
    stand: &Stand,
) -> Vec<std::collections::HashMap<String, aws_sdk_dynamodb::types::AttributeValue>> {
    let rows = state_rows(&stand.target, &stand.state_table()).await;
    let segments = rows.into_iter();
    segments
        .filter(|row| row["entityType"] == s("segment"))
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_job_loses_no_more_than_the_pages_in_its_hands() {
    let stand = Stand::gateways(Options::new(1), Options::new(1)).await;
    let (table, config) = pair(&stand, "[reconcile]\nsegments = 1\n").await;
    // Some twenty pages a side, with differences in all of them.
    let items = 700;
    put_all(&stand.source, &table, (0..items).map(|id| large(id, id))).await;
    let other = |id: usize| large(id, if id.is_multiple_of(7) { 1_000_000 } else { id });
    let kept = (0..items + 10).filter(|id| id % 11 != 0);
    put_all(&stand.target, &table, kept.map(other)).await;
    let mut expected = BTreeMap::new();
    for id in 0..items + 10 {
        let kind = match (id < items, id % 11 == 0, id % 7 == 0) {
            (true, true, _) => "missing",
            (true, false, true) => "changed",
            (false, false, _) => "extra",
            _ => continue,
        };
        expected.insert(format!("k{id}"), kind.to_owned());
    }
    let scans = Fault::slow_answer(Duration::ZERO).on("Scan").table(&table);
    let counter = stand.gateways[0].inject(scans);
    let whole = reconcile(&config, &[]);
    assert_eq!(whole.status.code(), Some(1), "{}", stderr(&whole));
    let pages = counter.hits();
    assert!(pages > 15, "{pages} pages");
    let slow = Fault::slow_answer(Duration::from_millis(400)).on("Scan");
    let slow = stand.gateways[0].inject(slow.table(&table));
    let first = stand.temp.path().join("first.jsonl");
    let mut killed = start(&config, &["--report", first.to_str().unwrap()]);
    let job = job_at_work(&config).await;
    let half = async || jobs(&config)[0]["percent"].as_u64() >= Some(40);
    eventually("half of it is read", WITHIN, half).await;
    killed.kill().unwrap();
    killed.wait().unwrap();
    slow.off();
    // A lease after its last renewal the segment is anybody's.
    let free = async || jobs(&config)[0]["alive"] == false;
    eventually("its lease is over", WITHIN, free).await;
    let status = run(&["status", "--config", config.to_str().unwrap()]);
    assert!(
        stdout(&status).contains(&format!("--resume {job}")),
        "{}",
        stdout(&status)
    );
    let before = counter.hits();
    let report = stand.temp.path().join("second.jsonl");
    let resumed = ends(
        1,
        &config,
        &["--resume", &job, "--report", report.to_str().unwrap()],
    );
    let again = counter.hits() - before;
    // A third of a lease between two renewals, 400 ms a page, and two pages ahead.
    assert!(
        again <= pages * 3 / 4,
        "{again} of {pages} pages were read again"
    );
    let of = |kind: &str| expected.values().filter(|known| *known == kind).count() as u64;
    assert_eq!(
        counted(&resumed),
        (of("missing"), of("changed"), of("extra"))
    );
    assert_eq!(resumed["sourceItems"], items);
    // What the two reports say together is everything; what stood between the marks stands in both.
    let lines = std::fs::read_to_string(&first).unwrap();
    let whole_lines = lines.lines().filter(|line| line.ends_with('}')).count();
    assert!(whole_lines > 0, "the first one reported nothing");
    std::fs::write(
        &first,
        lines
            .lines()
            .take(whole_lines)
            .fold(String::new(), |text, line| text + line + "\n"),
    )
    .unwrap();
    let mut together = reported(&first);
    together.extend(reported(&report));
    assert_same(&together, &expected, "both reports");
    assert!(jobs(&config).is_empty());
    // It has ended, and says so to whoever took part.
    let told = ends(1, &config, &["--resume", &job]);
    assert_eq!(counted(&told), counted(&resumed));
    let unknown = reconcile(&config, &["--resume", "20260101-000000-0000"]);
    assert_eq!(unknown.status.code(), Some(2));
    assert!(stderr(&unknown).contains("no job"), "{}", stderr(&unknown));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_processes_share_a_job_and_what_one_leaves_the_other_takes() {
    let mut random = StdRng::seed_from_u64(seed());
    let stand = Stand::gateways(Options::new(1), Options::new(1)).await;
    let (table, config) = pair(&stand, "").await;
    let expected = with_drift(&stand, &table, 2_000, &mut random).await;
    let slow = Fault::slow_answer(Duration::from_millis(300)).on("Scan");
    let slow = stand.gateways[1].inject(slow.table(&table));
    let more = [
        "--apply",
        "--segments",
        "24",
        "--max-deletes",
        "20%",
        "--json",
    ];
    let first = start(&config, &more);
    let job = job_at_work(&config).await;
    // Nobody else may repair the table meanwhile, in either direction.
    refused(&config, &["--apply"], &["reconcile of", &job, "--resume"]);
    let home = ["--source", TARGET, "--target", SOURCE, "--apply"];
    refused(&config, &home, &[&job, "repairs"]);
    let second = start(&config, &["--resume", &job, "--json"]);
    let mut doomed = start(&config, &["--resume", &job, "--json"]);
    let mut owners = HashSet::new();
    let three = async || {
        for row in segments(&stand).await {
            if let Some(owner) = row.get("leaseOwner") {
                let owner = owner.as_s().unwrap();
                owners.insert(owner.rsplit_once('.').unwrap().0.to_owned());
            }
        }
        owners.len() == 3
    };
    let mut three = three;
    let begun = tokio::time::Instant::now();
    while !three().await {
        assert!(begun.elapsed() < WITHIN, "not all three took a part");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    doomed.kill().unwrap();
    doomed.wait().unwrap();
    slow.off();
    let ((code, told), other) = tokio::join!(answer(first), answer(second));
    assert_eq!((code, &told), (0, &told), "{told}");
    assert_eq!(other.0, 0, "{}", other.1);
    let of = |kind: &str| expected.values().filter(|known| *known == kind).count() as u64;
    let all = (of("missing"), of("changed"), of("extra"));
    // What the killed one repaired between its last renewal and its end nobody counted.
    let (missing, changed, extra) = counted(&told);
    assert!(
        missing <= all.0 && changed <= all.1 && extra <= all.2,
        "{told}"
    );
    assert_eq!(counted(&other.1), counted(&told), "both tell the same");
    assert_eq!(stand.differences(&table).await, [""; 0]);
    assert!(jobs(&config).is_empty());
    let status = run(&["status", "--config", config.to_str().unwrap()]);
    assert!(!stdout(&status).contains("reconcile-unfinished"));
}

/// More to delete than a row holds: it waits in the process that found it, and is found again where that
/// one dies.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deletes_that_wait_are_found_again_where_their_process_dies() {
    let stand = Stand::gateways(Options::new(1), Options::new(1)).await;
    let (table, config) = pair(&stand, "").await;
    let plain = |id: usize| {
        Item::from([
            ("id".to_owned(), s(format!("k{id:060}"))),
            ("v".to_owned(), n(id)),
        ])
    };
    put_all(&stand.source, &table, (0..100).map(plain)).await;
    put_all(&stand.target, &table, (0..1_500).map(plain)).await;
    let slow = Fault::slow_answer(Duration::from_millis(1_500)).on("BatchWriteItem");
    let slow = stand.gateways[1].inject(slow.table(&table));
    let mut killed = start(
        &config,
        &["--apply", "--segments", "2", "--max-deletes", "100%"],
    );
    let job = job_at_work(&config).await;
    let some = async || checker::items(&stand.target, &table).await.len() < 1_500;
    eventually("it deletes", WITHIN, some).await;
    killed.kill().unwrap();
    killed.wait().unwrap();
    slow.off();
    let resumed = ends(0, &config, &["--resume", &job]);
    assert!(resumed["extra"].as_u64() >= Some(1_000), "{resumed}");
    assert_eq!(stand.differences(&table).await, [""; 0]);
    assert_eq!(checker::items(&stand.target, &table).await.len(), 100);
    let rows = state_rows(&stand.target, &stand.state_table()).await;
    let left: Vec<_> = rows.iter().filter(|row| is_of_job(row)).collect();
    assert!(left.iter().all(|row| row.contains_key("ended")), "{left:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fill_adds_what_is_missing_and_touches_nothing() {
    let stand = Stand::new().await;
    let (table, config) = pair(&stand, "").await;
    for id in 0..60 {
        put(&stand.source, &table, &format!("k{id}"), id).await;
    }
    for id in 40..70 {
        put(&stand.target, &table, &format!("k{id}"), id % 50).await;
    }
    let before = checker::items(&stand.target, &table).await;
    let dry = ends(1, &config, &["--strategy", "fill"]);
    assert_eq!((counted(&dry), &dry["left"]), ((40, 10, 10), &20.into()));
    let done = ends(1, &config, &["--strategy", "fill", "--apply"]);
    assert_eq!((counted(&done), &done["left"]), ((40, 10, 10), &20.into()));
    assert_eq!(done["repaired"], 40);
    let source = checker::items(&stand.source, &table).await;
    let after = checker::items(&stand.target, &table).await;
    assert_eq!(after.len(), 70);
    for (key, item) in &after {
        assert_eq!(before.get(key).unwrap_or_else(|| &source[key]), item);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn newest_lets_the_item_stay_whose_attribute_is_greater() {
    let stand = Stand::new().await;
    let (table, config) = pair(&stand, "").await;
    let at = |id: usize, at: usize, text: &str| {
        Item::from([
            ("id".to_owned(), s(format!("k{id}"))),
            ("at".to_owned(), n(at)),
            ("text".to_owned(), s(text)),
        ])
    };
    // 0..20 newer in the source, 20..40 newer in the target, 40..50 as old, 50..60 only here, 60..70 there.
    let source = (0..60).map(|id| at(id, if id < 20 { 200 } else { 100 }, "source"));
    put_all(&stand.source, &table, source).await;
    let target = (0..50).chain(60..70);
    let target = target.map(|id| at(id, if (20..40).contains(&id) { 150 } else { 100 }, "target"));
    put_all(&stand.target, &table, target).await;
    let newest = ["--strategy", "newest=at", "--apply"];
    let told = stderr(&reconcile(&config, &["--strategy", "newest=at"]));
    assert!(!told.contains("OVERWRITE"), "{told}");
    let done = ends(1, &config, &newest);
    assert_eq!(counted(&done), (10, 50, 10));
    assert_eq!((&done["repaired"], &done["left"]), (&30.into(), &40.into()));
    let after = checker::items(&stand.target, &table).await;
    assert_eq!(after.len(), 70);
    for (key, item) in &after {
        let id: usize = key
            .split('k')
            .next_back()
            .unwrap()
            .trim_matches(|c: char| !c.is_ascii_digit())
            .parse()
            .unwrap();
        let wanted = if (0..20).contains(&id) || (50..60).contains(&id) {
            "source"
        } else {
            "target"
        };
        assert!(item.contains(wanted), "{key}: {item}");
    }
    // Both ways round, and both tables hold the newest of each.
    let home = ["--source", TARGET, "--target", SOURCE];
    ends(1, &config, &[&home[..], &newest].concat());
    let equal_but_ties = stand.differences(&table).await;
    assert_eq!(equal_but_ties.len(), 10, "{equal_but_ties:?}");
    // Beside a worker it would be wrong.
    let worker = Worker::following(&config).await;
    refused(&config, &newest, &["feeds these tables", "worker"]);
    assert!(worker.stop().await.success());
    // It brought what only its stream could tell: the ties.
    ends(0, &config, &newest);
}

/// The source loses an item just after it was read, and the worker has applied that already.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_source_loses_is_not_filled_in() {
    let stand = Stand::gateways(Options::new(1), Options::new(1)).await;
    let (table, config) = pair(&stand, "").await;
    let worker = Worker::following(&config).await;
    put(&stand.source, &table, "k1", 1).await;
    stand.converge(&table, 1).await;
    delete(&stand.target, &table, "k1").await;
    let held = Fault::hold(Duration::from_secs(3))
        .on("PutItem")
        .table(&table);
    let held = stand.gateways[1].inject(held.once());
    let filling = start(
        &config,
        &["--strategy", "fill", "--apply", "--settle", "1s", "--json"],
    );
    let sent = async || held.hits() > 0;
    eventually("it is put", WITHIN, sent).await;
    delete(&stand.source, &table, "k1").await;
    let (_, told) = answer(filling).await;
    let gone = async || checker::items(&stand.target, &table).await.is_empty();
    eventually("what the source lost is gone", WITHIN, gone).await;
    assert_eq!(told["unverified"], 0, "{told}");
    assert!(worker.stop().await.success());
}

/// Somebody writes to the replica: the audit of a fleet finds it, says so, and changes nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_audit_finds_foreign_writes_and_repairs_nothing() {
    let stand = Stand::gateways(Options::new(1), Options::new(1)).await;
    let (table, config) = pair(&stand, "[audit]\nread_units_per_second = 200\n").await;
    let other = stand.config(&[&table], "[audit]\nread_units_per_second = 200\n");
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, text.replace("\"3s\"", "\"1s\"")).unwrap();
    for id in 0..200 {
        put(&stand.source, &table, &format!("k{id}"), id).await;
    }
    let workers = [Worker::following(&config).await, Worker::start(&other)];
    stand.converge(&table, 200).await;
    let told = async |worker: &Worker, name: &str| {
        let metrics = worker.get("/metrics").await.map(|(_, text)| text);
        let metrics = metrics.unwrap_or_default();
        let line = metrics.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok())
    };
    for worker in &workers {
        let verified = async || {
            let age = told(worker, "farshore_verified_age_seconds").await;
            age.is_some_and(|age| age < 30.0)
        };
        eventually("it is found equal", WITHIN, verified).await;
        assert_eq!(told(worker, "farshore_drift_items").await, Some(0.0));
    }
    put(&stand.target, &table, "k7", 1_000).await;
    put(&stand.target, &table, "foreign", 1).await;
    for worker in &workers {
        let drifts = async || told(worker, "farshore_drift_items").await == Some(2.0);
        eventually("the drift is found", WITHIN, drifts).await;
        let (code, ready) = worker.get("/readyz").await.unwrap();
        assert!(code == 503 && ready.contains("gap-drift"), "{ready}");
    }
    let path = config.to_str().unwrap();
    let status = run(&["status", "--config", path]);
    assert_eq!(status.status.code(), Some(1));
    let text = stdout(&status);
    assert!(
        text.contains("drift") && text.contains("audit: found equal at"),
        "{text}"
    );
    assert_eq!(
        stand.differences(&table).await.len(),
        2,
        "it repaired something"
    );
    let mended = ends(0, &config, &["--apply", "--settle", "1s"]);
    assert_eq!(counted(&mended), (0, 1, 1));
    for worker in &workers {
        let ready = async || {
            let ready = worker.get("/readyz").await;
            ready.is_some_and(|(_, text)| !text.contains("gap-drift"))
        };
        eventually("nothing differs any more", WITHIN, ready).await;
        let none = async || told(worker, "farshore_drift_items").await == Some(0.0);
        eventually("and the metric says so", WITHIN, none).await;
    }
    // What a killed worker had in hand the other one goes on with.
    let [first, second] = workers;
    let killed_at = tokio::time::Instant::now();
    first.kill();
    let again = async || {
        let age = told(&second, "farshore_verified_age_seconds").await;
        age.is_some_and(|age| age < killed_at.elapsed().as_secs_f64())
    };
    eventually("it is found equal again", WITHIN, again).await;
    assert!(second.stop().await.success());
}

/// A repair writes what the source lost a moment later, and dies before it looks again: whoever goes on
/// with the job knows which keys it had in hand.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_repair_had_in_hand_when_it_died_is_repaired_by_the_next() {
    let stand = Stand::gateways(Options::new(1), Options::new(1)).await;
    let (table, config) = pair(&stand, "").await;
    for id in 0..30 {
        put(&stand.source, &table, &format!("k{id}"), id).await;
    }
    let replica = &stand.gateways[1];
    let held = Fault::hold_until_delivered().on("BatchWriteItem");
    let holding = replica.inject(held.table(&table));
    let mut killed = start(&config, &["--apply"]);
    let job = job_at_work(&config).await;
    assert!(replica.wait_for_held(1, WITHIN).await);
    killed.kill().unwrap();
    killed.wait().unwrap();
    holding.off();
    // Nobody reads the source again for these keys, unless somebody knows of them.
    for id in 0..30 {
        delete(&stand.source, &table, &format!("k{id}")).await;
    }
    put(&stand.source, &table, "other", 1).await;
    for held in replica.held() {
        let _ = replica.deliver(held.call).await;
    }
    let ghosts = stand.differences(&table).await.len();
    assert!(ghosts > 1, "the late write did nothing");
    let status = run(&["status", "--config", config.to_str().unwrap()]);
    assert!(stdout(&status).contains(&job), "{}", stdout(&status));
    let changed = reconcile(&config, &["--resume", &job, "--max-deletes", "0"]);
    assert_eq!(
        changed.status.code(),
        Some(2),
        "its options stand in its rows"
    );
    // One that may not read the source, but for the first look, can verify nothing: the alarm stays.
    let unfinished = || {
        let status = run(&["status", "--config", config.to_str().unwrap()]);
        stdout(&status).contains("reconcile-unfinished")
    };
    eventually("it is known to be dead", WITHIN, async || unfinished()).await;
    let denied = Fault::access_denied().on("BatchGetItem").table(&table);
    let denied = stand.gateways[0].inject(denied.after(1));
    let failed = reconcile(&config, &["--resume", &job]);
    assert_eq!(failed.status.code(), Some(2), "{}", stderr(&failed));
    assert!(denied.hits() > 0 && unfinished(), "{}", stdout(&failed));
    denied.off();
    assert_eq!(stand.differences(&table).await.len(), ghosts);
    let resumed = reconcile(&config, &["--resume", &job]);
    let told = format!("{}{}", stdout(&resumed), stderr(&resumed));
    assert_eq!(resumed.status.code(), Some(0), "{told}");
    assert_eq!(stand.differences(&table).await, [""; 0], "{told}");
    assert!(!unfinished());
    // A table that the configuration lacks is not left out in silence.
    let text = std::fs::read_to_string(&config).unwrap();
    let other = config.with_file_name("other.toml");
    std::fs::write(&other, text.replace(&table, "another")).unwrap();
    let missing = reconcile(&other, &["--resume", &job]);
    assert_eq!(missing.status.code(), Some(2), "{}", stderr(&missing));
}
