//! The torture test. Whatever goes wrong on the way, once Farshore says that it has caught up the
//! replica equals its source, item by item, except for what is dead-lettered.
//!
//! Two seeds by default; twenty and all that ever failed with `FARSHORE_LONG=1`;
//! `FARSHORE_TORTURE_SEEDS=N` runs N, `FARSHORE_TEST_SEED=S` that one. To find out what is to
//! blame, `FARSHORE_TORTURE_WITHOUT=fault;fault` leaves faults out; to see it fail,
//! `FARSHORE_TORTURE_MUTATION=doubts` turns a safeguard off.

mod common;
mod torture_support;

use std::collections::BTreeMap;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use common::binary::{Worker, provision};
use common::eventually;
use common::stand::{Stand, text_of};
use torture_support::seeds::ONCE_FAILED;
use torture_support::{Report, torture};

/// A fault must strike if this many seeds have it.
const SEEDS_TO_STRIKE: usize = 4;

/// More than all the waits of a seed at its slowest.
const SEED_MAX: Duration = Duration::from_secs(480);

/// The seeds of this run.
fn seeds() -> Vec<u64> {
    let asked = std::env::var("FARSHORE_TORTURE_SEEDS");
    let count = asked.ok().and_then(|count| count.parse().ok());
    let first = common::seed();
    if std::env::var_os("FARSHORE_TEST_SEED").is_some() {
        return vec![first];
    }
    let count = count.unwrap_or_else(|| common::long(20, 2));
    let mut seeds: Vec<u64> = (first..first + count).collect();
    if std::env::var_os("FARSHORE_LONG").is_some() {
        seeds.extend(ONCE_FAILED);
    }
    seeds
}

/// Runs a seed on a runtime of its own; a panic is a trouble like any other.
fn run(seed: u64) -> Report {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let bounded = async { tokio::time::timeout(SEED_MAX, torture(seed)).await };
    let told = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let in_time = runtime.block_on(bounded);
        in_time.unwrap_or_else(|_| panic!("no verdict within {SEED_MAX:?}"))
    }));
    runtime.shutdown_timeout(Duration::from_secs(1));
    told.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        Report {
            seed,
            troubles: vec![text.unwrap_or_else(|| "a panic without words".to_owned())],
            ..Report::default()
        }
    })
}

fn show(report: &Report) {
    let Report { seed, done, .. } = report;
    println!(
        "seed {seed} at pace {}: {} writes, {} records, {} kills, {} stops, {} pauses, {} starts ({} refused), \
         {} regions away, {} faults struck, {} + {} held writes took effect late, {} dead letters, \
         {} divergent, settled in {:.1} s, {:.1} s, {}",
        report.pace,
        report.writes,
        report.records,
        done.kills,
        done.stops,
        done.pauses,
        done.starts,
        done.refused,
        report.regions_away,
        report.hits(),
        report.late[0],
        report.late[1],
        report.letters,
        report.divergent,
        report.settled.as_secs_f64(),
        report.took.as_secs_f64(),
        if report.troubles.is_empty() {
            "ok"
        } else {
            "FAILED"
        },
    );
}

/// Faults that several seeds had and none met: then this test does not test what it says.
fn never_struck(reports: &[Report]) -> Vec<&str> {
    let mut met: BTreeMap<&str, (usize, u64)> = BTreeMap::new();
    for (name, hits, must) in reports.iter().flat_map(|report| &report.faults) {
        if *must {
            let (seeds, all) = met.entry(name).or_default();
            *seeds += 1;
            *all += hits;
        }
    }
    let idle = met
        .into_iter()
        .filter(|(_, (seeds, hits))| *seeds >= SEEDS_TO_STRIKE && *hits == 0);
    idle.map(|(name, _)| name).collect()
}

fn show_all(reports: &[Report], took: Duration) {
    let sum = |count: fn(&Report) -> u64| reports.iter().map(count).sum::<u64>();
    println!(
        "{} seeds in {:.0} s: {} writes, {} records, {} kills, {} stops, {} pauses, {} faults struck, \
         {} + {} held writes took effect late, {} dead letters, {} divergent keys, {} seeds failed",
        reports.len(),
        took.as_secs_f64(),
        sum(|r| r.writes),
        sum(|r| r.records),
        sum(|r| r.done.kills),
        sum(|r| r.done.stops),
        sum(|r| r.done.pauses),
        sum(Report::hits),
        sum(|r| r.late[0]),
        sum(|r| r.late[1]),
        sum(|r| r.letters),
        sum(|r| r.divergent as u64),
        reports.iter().filter(|r| !r.troubles.is_empty()).count(),
    );
}

#[test]
fn whatever_goes_wrong_a_replica_said_to_be_caught_up_equals_its_source() {
    let start = Instant::now();
    let seeds = Mutex::new(seeds());
    let reports = Mutex::new(Vec::new());
    let cores = std::thread::available_parallelism().map_or(2, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..cores.clamp(2, 4) {
            scope.spawn(|| {
                while let Some(seed) = next(&seeds) {
                    let report = run(seed);
                    show(&report);
                    // Now, and not after an hour of other seeds.
                    if !report.troubles.is_empty() {
                        println!("{}\n{}", report.troubles.join("\n"), report.tails);
                    }
                    reports.lock().unwrap().push(report);
                }
            });
        }
    });
    let reports = reports.into_inner().unwrap();
    show_all(&reports, start.elapsed());
    let mut troubles = String::new();
    for report in reports.iter().filter(|report| !report.troubles.is_empty()) {
        let (seed, what, tails) = (report.seed, report.troubles.join("\n"), &report.tails);
        troubles.push_str(&format!("FARSHORE_TEST_SEED={seed}:\n{what}\n{tails}\n"));
    }
    assert!(troubles.is_empty(), "{troubles}");
    let idle = never_struck(&reports);
    assert!(idle.is_empty(), "these faults never struck: {idle:?}");
}

fn next(seeds: &Mutex<Vec<u64>>) -> Option<u64> {
    seeds.lock().unwrap().pop()
}

/// Where the test below wants to read the process id of a worker.
const ORPHAN_VARIABLE: &str = "FARSHORE_TEST_ORPHAN";

/// A killed test run leaves no worker behind.
#[test]
fn a_worker_ends_with_the_test_process_however_that_ends() {
    let temp = tempfile::tempdir().unwrap();
    let told = temp.path().join("pid");
    let run = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--ignored", "starts_a_worker_and_is_killed"])
        .env(ORPHAN_VARIABLE, &told)
        // It is killed and cannot clear up after itself.
        .env("TMPDIR", temp.path())
        .stdout(Stdio::null())
        .spawn();
    let mut run = Killed(run.unwrap());
    let start = Instant::now();
    let pid: u32 = loop {
        if let Ok(pid) = text_of(&told).parse() {
            break pid;
        }
        assert!(start.elapsed() < ORPHAN_PATIENCE, "no worker was started");
        std::thread::sleep(Duration::from_millis(20));
    };
    let alive = || {
        let stat = text_of(format!("/proc/{pid}/stat").as_ref());
        // Dead, it may wait for somebody to ask how it ended.
        let state = stat.rsplit(')').next().unwrap_or_default().trim_start();
        stat.contains("(farshore)") && !state.starts_with('Z')
    };
    assert!(alive(), "the worker is not there to begin with");
    run.kill();
    let start = Instant::now();
    while alive() {
        assert!(start.elapsed() < ORPHAN_PATIENCE, "the worker lives on");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A process that ends with this value.
struct Killed(Child);

impl Killed {
    fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Killed {
    fn drop(&mut self) {
        self.kill();
    }
}

const ORPHAN_PATIENCE: Duration = Duration::from_secs(30);

/// The other half of the test above: a test run that is killed.
#[tokio::test]
#[ignore = "run by a_worker_ends_with_the_test_process_however_that_ends"]
async fn starts_a_worker_and_is_killed() {
    let Some(told) = std::env::var_os(ORPHAN_VARIABLE) else {
        return;
    };
    let stand = Stand::embedded().await;
    stand.create_source("orders").await;
    let config = stand.config(&["orders"], "");
    provision(&config);
    // From a thread that is gone a moment later.
    let start = std::thread::spawn(move || Worker::start(&config));
    let worker = start.join().unwrap();
    let held = async || worker.metric("farshore_leases_held").await >= 1.0;
    eventually("it reads", ORPHAN_PATIENCE, held).await;
    // In one step, so that no half of a number is read.
    let whole = std::path::Path::new(&told).with_extension("new");
    std::fs::write(&whole, worker.pid().to_string()).unwrap();
    std::fs::rename(&whole, &told).unwrap();
    tokio::time::sleep(2 * ORPHAN_PATIENCE).await;
}
