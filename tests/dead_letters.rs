//! Dead letters: when records become such, when they must not, and how they come home.

mod common;
mod suite;

use std::io::Write;
use std::path::Path;
use std::process::{Child, Output, Stdio};
use std::time::Duration;

use common::binary::{Worker, farshore, provision, run, stderr, stdout};
use common::stand::{Stand, delete, put, state_rows};
use common::{eventually, long};
use farshore::embedded::gateway::{Fault, FaultHandle, Limit, Options};
use serde_json::Value;
use suite::poison::Size;

/// Refuses every write to the replica that names a key with `poison` in it.
fn poisoned(stand: &Stand) -> FaultHandle {
    let refused = Fault::code(400, "ValidationException", "Type mismatch for Index Key");
    stand.gateways[1].inject(refused.on("BatchWriteItem").key("poison"))
}

fn with_config<'a>(arguments: &[&'a str], config: &'a Path) -> Vec<&'a str> {
    let mut all = arguments.to_vec();
    all.extend(["--config", config.to_str().unwrap()]);
    all
}

/// Runs a command, which must end with `code`.
fn ends(code: i32, arguments: &[&str], config: &Path) -> Output {
    let output = run(&with_config(arguments, config));
    let told = format!("{}{}", stdout(&output), stderr(&output));
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {told}");
    output
}

fn json(output: &Output) -> Value {
    serde_json::from_str(&stdout(output)).unwrap()
}

/// How many letters wait, as the command says.
fn waiting(config: &Path) -> u64 {
    let output = run(&with_config(&["dead-letters", "--json"], config));
    json(&output)["waiting"].as_u64().unwrap()
}

/// A worker whose replica refuses all `poison-…` keys, with `good` good items and `poison` others.
async fn lettered(good: u64, poison: u64, more: &str) -> Lettered {
    let stand = Stand::gateways(Options::new(1), Options::new(1)).await;
    let table = stand.table("orders");
    stand.create_source(&table).await;
    let config = stand.config(&[&table], more);
    provision(&config);
    let worker = Worker::following(&config).await;
    let refused = poisoned(&stand);
    for id in 0..good.max(poison) {
        if id < good {
            put(&stand.source, &table, &format!("k{id}"), id).await;
        }
        if id < poison {
            put(&stand.source, &table, &format!("poison-{id}"), id).await;
        }
    }
    let arrived = async || waiting(&config) == poison;
    eventually("all poison is lettered", Duration::from_secs(30), arrived).await;
    let applied = async || stand.differences(&table).await.len() as u64 == poison;
    eventually("all else is applied", Duration::from_secs(20), applied).await;
    Lettered {
        stand,
        table,
        config,
        worker,
        refused,
    }
}

struct Lettered {
    stand: Stand,
    table: String,
    config: std::path::PathBuf,
    worker: Worker,
    refused: FaultHandle,
}

/// One page of 25 records is one batch: halving it finds each poison with two calls a halving.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn poison_is_found_with_two_calls_a_halving() {
    const BATCH: usize = 25;
    const HALVINGS: usize = 5;
    for poison in [vec![0], vec![24], vec![7, 8], vec![3, 12, 19]] {
        let stand = Stand::gateways(Options::new(1), Options::new(1)).await;
        let table = stand.table("orders");
        stand.create_source(&table).await;
        let settings = format!("name = \"{table}\"\nbootstrap = false");
        let config = stand.config(&[&settings], "");
        provision(&config);
        let _refused = poisoned(&stand);
        for id in 0..BATCH {
            let kind = if poison.contains(&id) { "poison-" } else { "" };
            put(&stand.source, &table, &format!("{kind}{id}"), id).await;
        }
        let worker = Worker::following(&config).await;
        let arrived = async || waiting(&config) == poison.len() as u64;
        eventually("all poison is lettered", Duration::from_secs(30), arrived).await;
        let calls = stand.gateways[1].calls_where(|call| {
            let writes = ["BatchWriteItem", "PutItem", "DeleteItem"];
            writes.contains(&call.operation.as_str()) && call.tables.contains(&table)
        });
        // The whole batch first; then each is tried alone until it has been refused three times.
        let most = 1 + poison.len() * (2 * HALVINGS + 2);
        assert!(calls.len() <= most, "{poison:?}: {} calls", calls.len());
        let first = calls.iter().map(|call| call.keys.len()).max();
        assert_eq!(first, Some(BATCH), "not one batch: the count says nothing");
        assert!(worker.stop().await.success());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_redrive_brings_all_letters_home_once_the_cause_is_mended() {
    let Lettered {
        stand,
        table,
        config,
        worker,
        refused,
    } = lettered(30, 25, "").await;
    let listed = json(&ends(1, &["dead-letters", "--json"], &config));
    assert_eq!(listed["groups"][0]["letters"], 25);
    assert_eq!(listed["groups"][0]["code"], "ValidationException");
    assert_eq!(listed["groups"][0]["table"], table.as_str());
    // Only a plan: nothing changes.
    let plan = ends(1, &["redrive"], &config);
    assert!(stdout(&plan).contains("will OVERWRITE items of"));
    assert_eq!(waiting(&config), 25);
    // Not mended yet: each comes back with the new reason, and none is lost.
    let again = json(&ends(1, &["redrive", "--apply", "--json"], &config));
    assert_eq!(again["left"][0]["letters"], 25, "{again}");
    let why = again["left"][0]["why"].as_str().unwrap();
    assert!(why.contains("refused again: ValidationException"), "{why}");
    assert_eq!(waiting(&config), 25);
    let letters = stand.dead_letters();
    assert_eq!(letters.iter().filter(|l| l["redriven"] == 1).count(), 25);
    refused.off();
    // Changed since: what the source holds now wins, not what the letter holds.
    put(&stand.source, &table, "poison-0", 700).await;
    delete(&stand.source, &table, "poison-1").await;
    let limited = json(&ends(
        1,
        &["redrive", "--apply", "--json", "--limit", "5"],
        &config,
    ));
    assert_eq!(limited["home"][&table], 5, "{limited}");
    assert_eq!(waiting(&config), 20);
    let home = ends(0, &["redrive", "--apply"], &config);
    assert!(stdout(&home).contains("20 letter(s)"), "{}", stdout(&home));
    assert_eq!(waiting(&config), 0);
    ends(0, &["dead-letters"], &config);
    ends(0, &["redrive", "--apply"], &config);
    stand.converge(&table, 54).await;
    let rows = state_rows(&stand.target, &stand.state_table()).await;
    let jobs = rows
        .iter()
        .filter(|row| row["entityType"].as_s().unwrap() == "job");
    assert_eq!(jobs.count(), 0, "a row of a job was left behind");
    assert!(worker.stop().await.success());
}

/// A redrive at a crawl, for somebody to strike in its middle.
fn crawling(config: &Path) -> Child {
    farshore(&with_config(&["redrive", "--apply", "--rate", "4"], config))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redrive_that_is_killed_loses_nothing_and_the_next_waits_for_its_writes() {
    let lettered = lettered(5, 40, "").await;
    let config = &lettered.config;
    lettered.refused.off();
    let mut crawl = crawling(config);
    let begun = async || waiting(config) < 40;
    eventually("some are home", Duration::from_secs(20), begun).await;
    crawl.kill().unwrap();
    crawl.wait().unwrap();
    let left = waiting(config);
    assert!(left > 0, "it was faster than its rate");
    let refused = ends(2, &["redrive", "--apply"], config);
    let told = stderr(&refused);
    assert!(told.contains("may take effect until"), "{told}");
    let over = async || {
        run(&with_config(&["redrive", "--apply"], config))
            .status
            .success()
    };
    eventually("the next one", Duration::from_secs(30), over).await;
    assert_eq!(waiting(config), 0);
    lettered.stand.converge(&lettered.table, 45).await;
    assert!(lettered.worker.stop().await.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redrive_that_is_interrupted_gives_back_what_is_not_home() {
    let lettered = lettered(1, 40, "").await;
    let config = &lettered.config;
    lettered.refused.off();
    let mut crawl = crawling(config);
    let begun = async || waiting(config) < 40;
    eventually("some are home", Duration::from_secs(20), begun).await;
    let pid = rustix::process::Pid::from_raw(crawl.id() as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    assert_eq!(crawl.wait().unwrap().code(), Some(130));
    assert!(waiting(config) > 0);
    // Nothing is waited for: every write of it was answered.
    ends(0, &["redrive", "--apply"], config);
    assert_eq!(waiting(config), 0);
    assert!(lettered.worker.stop().await.success());
}

/// While keys are written and deleted and the worker replays them, one redrive after the other
/// brings the same keys home: the source's state always wins.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redrive_races_newer_changes_and_the_source_wins() {
    let lettered = lettered(5, 20, "").await;
    let (stand, table, config) = (&lettered.stand, &lettered.table, &lettered.config);
    lettered.refused.off();
    let source = stand.source.clone();
    let writing = tokio::spawn({
        let table = table.clone();
        async move {
            for round in 0..30 {
                for id in 0..20 {
                    let id = format!("poison-{id}");
                    match (round + id.len()) % 5 {
                        0 => delete(&source, &table, &id).await,
                        _ => put(&source, &table, &id, round * 100).await,
                    }
                }
            }
        }
    });
    let mut redrives = 0;
    while !writing.is_finished() || waiting(config) > 0 {
        let output = run(&with_config(
            &["redrive", "--apply", "--rate", "40"],
            config,
        ));
        // A key that changes all the time may stay for the next one.
        assert!(
            matches!(output.status.code(), Some(0 | 1)),
            "{}",
            stderr(&output)
        );
        redrives += 1;
        assert!(redrives < 60, "it never ends: {}", stdout(&output));
    }
    writing.await.unwrap();
    stand.converge(table, 25).await;
    assert!(lettered.worker.stop().await.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn letters_that_are_not_this_flows_stay_with_a_clear_word() {
    let lettered = lettered(1, 3, "").await;
    let config = &lettered.config;
    lettered.refused.off();
    let mut letters = lettered.stand.dead_letters();
    letters[0]["epoch"] = 7.into();
    letters[1]["version"] = 9.into();
    letters[2]["group"] = "another".into();
    let mut file = std::fs::OpenOptions::new()
        .append(true)
        .open(newest(&lettered.stand.letters()))
        .unwrap();
    for letter in letters {
        writeln!(file, "{letter}").unwrap();
    }
    // A crash in the middle of a line.
    write!(file, "{{\"version\":1,\"gro").unwrap();
    assert_eq!(waiting(config), 6);
    let output = ends(1, &["redrive", "--apply"], config);
    let told = stdout(&output);
    for word in [
        "3 letter(s) of",
        "its flow is over",
        "version 9, and this Farshore reads up to 1: upgrade",
        "the group another",
    ] {
        assert!(told.contains(word), "no `{word}` in: {told}");
    }
    assert_eq!(waiting(config), 3);
    let listed = stdout(&ends(1, &["dead-letters"], config));
    assert!(listed.contains("half-written"), "{listed}");
    lettered.stand.converge(&lettered.table, 4).await;
    assert!(lettered.worker.stop().await.success());
}

/// A source table that was made anew, empty, is no reason to delete what the replica holds: its letters
/// stay until a person has decided.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn letters_of_a_table_made_anew_stay_and_the_replica_is_not_emptied() {
    let lettered = lettered(3, 2, "").await;
    let (stand, table) = (&lettered.stand, &lettered.table);
    // What the replica holds of one of them is older than the letter, and all that is left.
    lettered.refused.off();
    put(&stand.target, table, "poison-0", 1).await;
    let deleted = stand.source.delete_table().table_name(table).send().await;
    deleted.unwrap();
    stand.create_source(table).await;
    let output = ends(1, &["redrive", "--apply"], &lettered.config);
    assert!(stdout(&output).contains("made anew"), "{}", stdout(&output));
    assert_eq!(waiting(&lettered.config), 2);
    let held = stand.target.scan().table_name(table).send().await.unwrap();
    assert_eq!(held.count, 4, "the replica was emptied");
    assert!(lettered.worker.stop().await.success());
}

/// The source is gone: what its letters carry is applied where nothing newer was, in its order; what
/// does not fit stays, and says so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_its_source_a_letter_comes_home_from_its_images() {
    let lettered = lettered(2, 3, "").await;
    let (stand, config) = (&lettered.stand, &lettered.config);
    // poison-0 is changed twice more and refused each time, poison-1 is changed and applied.
    for value in [10, 20] {
        put(&stand.source, &lettered.table, "poison-0", value).await;
    }
    let refused = async || waiting(config) == 5;
    eventually("it is refused again", Duration::from_secs(20), refused).await;
    lettered.refused.off();
    put(&stand.source, &lettered.table, "poison-1", 77).await;
    let differences = async || stand.differences(&lettered.table).await.len() == 2;
    eventually(
        "the later change is applied",
        Duration::from_secs(20),
        differences,
    )
    .await;
    // As long as the source answers, it is asked.
    let living = ends(2, &["redrive", "--from-images", "--apply"], config);
    assert!(stderr(&living).contains("Redrive without --from-images"));
    assert!(lettered.worker.stop().await.success());
    let text = common::stand::text_of(config).replace(&stand.source_url, "http://127.0.0.1:9");
    let alone = config.with_file_name("alone.toml");
    std::fs::write(&alone, text).unwrap();
    let plan = ends(1, &["redrive", "--from-images"], &alone);
    assert!(stdout(&plan).contains("comes back"), "{}", stdout(&plan));
    let waited = waiting(&alone);
    let output = json(&ends(
        1,
        &["redrive", "--from-images", "--apply", "--json"],
        &alone,
    ));
    assert_eq!(output["home"][&lettered.table], waited - 1, "{output}");
    let why = output["left"][0]["why"].as_str().unwrap();
    assert!(why.contains("compare by hand"), "{why}");
    assert_eq!(waiting(&alone), 1);
    stand.converge(&lettered.table, 5).await;
}

fn newest(directory: &Path) -> std::path::PathBuf {
    let files = std::fs::read_dir(directory).unwrap();
    let mut paths: Vec<_> = files.map(|file| file.unwrap().path()).collect();
    paths.retain(|path| {
        path.extension()
            .is_some_and(|extension| extension == "jsonl")
    });
    paths.into_iter().max().unwrap()
}

/// More refusals than `halt_after` are no poison: the tap closes, no letter is written beyond the
/// limit, another table goes on, and once the replica is mended and the tap opened all is applied.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_refusals_halts_its_table_until_a_person_resumes() {
    let stand = Stand::gateways(Options::new(1), Options::new(1)).await;
    let tables = [stand.table("orders"), stand.table("others")];
    for table in &tables {
        stand.create_source(table).await;
    }
    let names = tables.each_ref().map(String::as_str);
    let config = stand.config(&names, "halt_after = 10\n");
    provision(&config);
    let worker = Worker::following(&config).await;
    let refused = poisoned(&stand);
    for id in 0..60 {
        put(&stand.source, &tables[0], &format!("poison-{id}"), id).await;
    }
    let halted = async || {
        let (status, body) = worker.get("/readyz").await.unwrap();
        status == 503 && body.contains("the schemas have probably diverged")
    };
    eventually("readiness is red", Duration::from_secs(30), halted).await;
    put(&stand.source, &tables[0], "good", 1).await;
    put(&stand.source, &tables[1], "good", 1).await;
    stand.converge(&tables[1], 1).await;
    assert!(stand.dead_letters().len() <= 10);
    assert_eq!(worker.metric("farshore_halts_total").await, 1.0);
    // The tap is closed for a redrive as well.
    let output = ends(2, &["redrive", "--apply"], &config);
    assert!(
        stderr(&output).contains("closed by farshore"),
        "{}",
        stderr(&output)
    );
    refused.off();
    let reason = [
        "resume", "--reason", "mended", "--apply", "--table", names[0],
    ];
    ends(0, &reason, &config);
    let lettered = stand.dead_letters().len();
    let applied = async || stand.differences(&tables[0]).await.len() == lettered;
    eventually("all else is applied", Duration::from_secs(20), applied).await;
    assert!(stand.dead_letters().len() <= 10, "it went on");
    ends(0, &["redrive", "--apply"], &config);
    stand.converge(&tables[0], 61).await;
    assert!(worker.stop().await.success());
}

/// The replica is gone, throttled, denied and deleted, each in turn: no record is dead-lettered for
/// it, and all is applied afterwards.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_trouble_of_the_replica_ever_dead_letters() {
    let stand = Stand::gateways(Options::new(1), Options::new(1)).await;
    let table = stand.table("orders");
    let (config, worker) = suite::replicated(&stand, &table, "").await;
    let replica = &stand.gateways[1];
    let on_table = |fault: Fault| fault.table(&table);
    let troubles = [
        Fault::cut(),
        Fault::throttling_exception(Limit::Provisioned),
        Fault::access_denied(),
        Fault::unavailable(),
        Fault::code(400, "SomethingNobodyModels", "?"),
    ];
    let mut items = 0;
    for fault in troubles {
        let name = format!("{fault:?}");
        let trouble = replica.inject(on_table(fault).on("BatchWriteItem"));
        for _ in 0..10 {
            put(&stand.source, &table, &format!("k{items}"), items).await;
            items += 1;
        }
        let struck = async || trouble.hits() > 2;
        eventually(&name, Duration::from_secs(10), struck).await;
        trouble.off();
        stand.converge(&table, items).await;
    }
    stand
        .target
        .delete_table()
        .table_name(&table)
        .send()
        .await
        .unwrap();
    for _ in 0..10 {
        put(&stand.source, &table, &format!("k{items}"), items).await;
        items += 1;
    }
    let red = async || {
        worker
            .get("/readyz")
            .await
            .unwrap()
            .1
            .contains("outage-replica")
    };
    eventually("readiness tells why", Duration::from_secs(15), red).await;
    provision(&config);
    let late: Vec<String> = (items - 10..items).map(|id| format!("k{id}")).collect();
    let arrived = async || {
        let differences = stand.differences(&table).await;
        // What was there before the table was deleted is for a copy to bring back.
        let is_late = |difference: &String| late.iter().any(|id| difference.contains(id));
        !differences.iter().any(is_late)
    };
    eventually("the rest is applied", Duration::from_secs(30), arrived).await;
    assert_eq!(stand.dead_letters(), Vec::<Value>::new());
    assert_eq!(worker.metric("farshore_dead_letters_total").await, 0.0);
    assert!(worker.stop().await.success());
}

/// With `FARSHORE_LONG` 2,000 records that are poison among 50,000 that are not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_good_is_applied_and_all_poison_comes_home_whoever_is_killed() {
    let size = Size {
        good: long(50_000, 4_000) as usize,
        poison: long(2_000, 160) as usize,
        kills: long(10, 3) as usize,
    };
    let source = Options::new(common::seed()).shards(4);
    let stand = Stand::gateways(source, Options::new(1)).await;
    let table = stand.table("orders");
    stand.create_source(&table).await;
    let config = stand.config(&[&table], "halt_after = 0\n");
    provision(&config);
    let aside = stand.letters().with_extension("aside");
    let outage = async |begins: bool| {
        if begins {
            // A file where the directory was: not even root can write there.
            std::fs::rename(stand.letters(), &aside).unwrap();
            std::fs::write(stand.letters(), "in the way").unwrap();
        } else {
            std::fs::remove_file(stand.letters()).unwrap();
            std::fs::rename(&aside, stand.letters()).unwrap();
        }
    };
    let lettered = || {
        let there = match aside.exists() {
            true => Stand::dead_letters_in(&aside),
            false => stand.dead_letters(),
        };
        // Letters of repairs come from no record.
        let place = |letter: Value| {
            let text = |name: &str| letter[name].as_str().map(str::to_owned);
            Some((text("shardId")?, text("sequenceNumber")?))
        };
        Some(there.into_iter().filter_map(place).collect())
    };
    let sent = async || unreachable!("a directory can be looked into");
    suite::poison::poison_among_good(&stand, &table, &config, size, outage, lettered, sent).await;
}
