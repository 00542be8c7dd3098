//! The torture of failover: three regions behind gateways, the real binary, and whatever may go wrong on
//! the way. Workers are killed, paused and cut off from single regions, the active region goes away, writes
//! are held back and delivered late, the command is killed at any moment and typed again, and now and then
//! somebody else means another region at the same time.
//!
//! One seed by default, three with `FARSHORE_LONG=1`; `FARSHORE_TORTURE_SEEDS=N` runs N, `FARSHORE_TEST_SEED=S`
//! that one; `FARSHORE_TORTURE_MUTATION=late` turns a safeguard off, to see it fail.

mod common;
mod failover_support;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Child;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use common::binary::{Worker, farshore, spawn};
use common::proxy::Proxy;
use common::stand::{s, state_rows, text_of};
use failover_support::{A, B, C, Group, LABELS, TABLE, command};
use farshore::embedded::gateway::{Fault, Outage};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use rustix::process::Signal;

const LEASE: Duration = Duration::from_secs(1);
const LATE: Duration = Duration::from_secs(3);
const KEYS: u64 = 40;
/// Seeds that have failed: in the long form they are run again.
const ONCE_FAILED: [u64; 1] = [30];
/// More than all the waits of a seed at its slowest.
const SEED_MAX: Duration = Duration::from_secs(150);

fn seeds() -> Vec<u64> {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    if let Some(seed) = number("FARSHORE_TEST_SEED") {
        return vec![seed];
    }
    let count = number("FARSHORE_TORTURE_SEEDS").unwrap_or_else(|| common::long(3, 1));
    let mut seeds: Vec<u64> = (1..=count).collect();
    if common::long(1, 0) == 1 {
        seeds.extend(ONCE_FAILED.iter().filter(|seed| **seed > count));
    }
    seeds
}

fn now_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    i64::try_from(since.as_millis()).unwrap()
}

/// A worker with a line of its own to each region.
struct Member {
    here: usize,
    config: PathBuf,
    lines: Vec<Proxy>,
    worker: Option<Worker>,
    again: Instant,
    paused: Option<Instant>,
}

impl Member {
    async fn new(group: &Group, here: usize) -> Self {
        let lines = group.partition().await;
        let urls: Vec<String> = lines.iter().map(Proxy::url).collect();
        let config = group.config_at(here, &urls, "");
        Self {
            here,
            config,
            lines,
            worker: None,
            again: Instant::now(),
            paused: None,
        }
    }

    fn tend(&mut self) {
        if self.paused.is_some_and(|until| until <= Instant::now()) {
            self.paused = None;
            if let Some(worker) = &self.worker {
                worker.signal(Signal::CONT);
            }
        }
        let ended = self
            .worker
            .as_mut()
            .is_some_and(|worker| worker.exited().is_some());
        if ended {
            // It may give up while it finds its role; an orchestrator starts it again.
            self.worker = None;
            self.again = Instant::now() + Duration::from_millis(300);
        }
        if self.worker.is_none() && self.again <= Instant::now() {
            let off = std::env::var("FARSHORE_TORTURE_MUTATION").unwrap_or_default();
            let environment = [("FARSHORE_TEST_MUTATION", off.as_str())];
            self.worker = Some(Worker::start_with(&self.config, &environment));
        }
    }

    fn harm(&mut self, random: &mut StdRng) {
        match random.random_range(0..9) {
            0..2 => {
                if let Some(worker) = self.worker.take() {
                    worker.kill();
                    self.paused = None;
                    self.again =
                        Instant::now() + Duration::from_millis(random.random_range(0..1_500));
                }
            }
            2..4 if self.paused.is_none() => {
                if let Some(worker) = &self.worker {
                    worker.signal(Signal::STOP);
                    let time = LEASE.mul_f64(random.random_range(0.2..2.5));
                    self.paused = Some(Instant::now() + time);
                }
            }
            4..7 => self.lines[random.random_range(0..3)].cut(),
            _ => self.lines.iter().for_each(Proxy::heal),
        }
    }

    fn recover(&mut self) {
        self.lines.iter().for_each(Proxy::heal);
        if self.paused.is_some() {
            self.paused = Some(Instant::now());
        }
        self.again = Instant::now();
        self.tend();
    }
}

/// The command, typed until it comes to its end.
struct Operator {
    config: PathBuf,
    to: usize,
    process: Option<Child>,
    kill_at: Option<Instant>,
    begin: Instant,
    /// Exit codes so far.
    codes: Vec<Option<i32>>,
}

impl Operator {
    fn tend(&mut self, random: &mut StdRng, calm: bool) {
        if let Some(process) = &mut self.process {
            if self.kill_at.is_some_and(|at| at <= Instant::now()) && !calm {
                process.kill().unwrap();
            }
            if let Some(status) = process.try_wait().unwrap() {
                self.codes.push(status.code());
                self.process = None;
                self.begin = Instant::now() + Duration::from_millis(random.random_range(50..600));
            }
            return;
        }
        let is_done = matches!(self.codes.last(), Some(Some(_)));
        if is_done || Instant::now() < self.begin {
            return;
        }
        let config = self.config.to_str().unwrap();
        let mut typed = farshore(&[
            "failover",
            "--to",
            LABELS[self.to],
            "--apply",
            "--config",
            config,
            "--accept-loss",
            "late-writes",
        ]);
        let off = std::env::var("FARSHORE_TORTURE_MUTATION").unwrap_or_default();
        typed.env("FARSHORE_TEST_MUTATION", off);
        let said = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.config.with_extension("said"))
            .unwrap();
        typed.stdout(said.try_clone().unwrap()).stderr(said);
        self.process = Some(spawn(typed).unwrap());
        self.kill_at = random
            .random_bool(0.6)
            .then(|| Instant::now() + Duration::from_millis(random.random_range(20..2_500)));
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        if let Some(process) = &mut self.process {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

/// What is written by the application: unique values, in the region that it believes in.
struct Application {
    place: Arc<std::sync::atomic::AtomicUsize>,
    stop: Arc<AtomicBool>,
    task: tokio::task::JoinHandle<BTreeMap<(usize, String), u64>>,
}

impl Application {
    fn start(group: &Group) -> Self {
        let place = Arc::new(std::sync::atomic::AtomicUsize::new(A));
        let stop = Arc::new(AtomicBool::new(false));
        let (at, stopped) = (Arc::clone(&place), Arc::clone(&stop));
        // Past the faults: this is not the application's torture.
        let clients: Vec<_> = group
            .gateways
            .iter()
            .zip(LABELS)
            .map(|(gateway, label)| common::stand::client(&gateway.endpoint_url(), label))
            .collect();
        let task = tokio::spawn(async move {
            let mut last = BTreeMap::new();
            let mut v = 0u64;
            while !stopped.load(Ordering::Relaxed) {
                tokio::time::sleep(Duration::from_millis(8)).await;
                v += 1;
                let place = at.load(Ordering::Relaxed);
                let id = format!("k{}", v % KEYS);
                let put = clients[place].put_item().table_name(TABLE);
                let put = put.item("id", s(&id)).item("v", common::stand::n(v)).send();
                let written = tokio::time::timeout(Duration::from_millis(400), put).await;
                if matches!(written, Ok(Ok(_))) {
                    last.insert((place, id), v);
                } else {
                    // It may have been written, or not: nobody can say what the key holds.
                    last.remove(&(place, id));
                }
            }
            last
        });
        Self { place, stop, task }
    }
}

/// What the records of a region have said so far.
#[derive(Default)]
struct Watch {
    epochs: BTreeMap<usize, u64>,
    acknowledged: BTreeMap<String, u64>,
    troubles: Vec<String>,
}

impl Watch {
    async fn look(&mut self, group: &Group) {
        for region in [A, B, C] {
            let url = group.gateways[region].embedded().endpoint_url();
            let client = common::stand::client(&url, LABELS[region]);
            for row in state_rows(&client, &group.state_table()).await {
                let number = |name: &str| row.get(name)?.as_n().ok()?.parse::<u64>().ok();
                if row["entityType"] == s("control") {
                    let epoch = number("epoch").unwrap();
                    let known = self.epochs.entry(region).or_insert(epoch);
                    if epoch < *known {
                        self.troubles.push(format!(
                            "the record of {} went back from {known} to {epoch}",
                            LABELS[region]
                        ));
                    }
                    *known = epoch;
                }
                if let Some(by) = number("acknowledged") {
                    let key = row["leaseKey"].as_s().unwrap().clone();
                    let known = self.acknowledged.entry(key.clone()).or_insert(by);
                    if by < *known {
                        self.troubles
                            .push(format!("{key} takes {known} back to {by}"));
                    }
                    *known = (*known).max(by);
                    if self.epochs.get(&region).is_some_and(|epoch| *epoch < by) {
                        self.troubles.push(format!(
                            "{key} acknowledged {by}, and {} says {}",
                            LABELS[region], self.epochs[&region]
                        ));
                    }
                }
            }
        }
    }
}

struct Outcome {
    troubles: Vec<String>,
    story: String,
}

async fn torture(seed: u64) -> Outcome {
    let mut random = StdRng::seed_from_u64(seed);
    let mut group = Group::new(seed, 3).await;
    group.late_effect = "3s";
    let started_ms = now_ms();
    group.provision(&[A, B, C]);
    let mut members = Vec::new();
    for here in [A, B, B, C] {
        members.push(Member::new(&group, here).await);
    }
    members.iter_mut().for_each(Member::tend);
    let mut watch = Watch::default();
    // Everybody follows an empty table before anything goes wrong: this is no torture of the first copy.
    let follows = async || {
        for region in [B, C] {
            let rows = group.rows_of(region, "shard").await;
            if rows.is_empty() || rows.iter().any(|row| !row.contains_key("readBy")) {
                return false;
            }
        }
        true
    };
    common::eventually("all follow", Duration::from_secs(30), follows).await;
    for region in [B, C] {
        let gateway = &group.gateways[region];
        let time = Duration::from_millis(random.random_range(800..2_600));
        gateway.inject(
            Fault::hold(time)
                .hanging_up()
                .on("BatchWriteItem")
                .table(TABLE)
                .chance(0.08),
        );
        gateway.inject(
            Fault::error_after()
                .on("BatchWriteItem")
                .table(TABLE)
                .chance(0.03),
        );
    }
    let application = Application::start(&group);
    tokio::time::sleep(Duration::from_millis(700)).await;
    let mut operators = vec![Operator {
        config: group.config(B, ""),
        to: B,
        process: None,
        kill_at: None,
        begin: Instant::now() + Duration::from_millis(random.random_range(500..3_000)),
        codes: Vec::new(),
    }];
    if random.random_bool(0.3) {
        let begin = operators[0].begin + Duration::from_millis(random.random_range(0..150));
        operators.push(Operator {
            config: group.config(C, ""),
            to: C,
            process: None,
            kill_at: None,
            begin,
            codes: Vec::new(),
        });
    }
    let away = random.random_bool(0.7).then(|| {
        let how = match random.random_bool(0.5) {
            true => Outage::Refused,
            false => Outage::Silent,
        };
        (
            how,
            Instant::now() + Duration::from_millis(random.random_range(200..3_000)),
        )
    });
    let (mut is_away, mut harms) = (false, 0);
    let begun = Instant::now();
    let mut next = Instant::now();
    let mut moves: Option<Instant> = None;
    let storm = Duration::from_secs(7);
    loop {
        let calm = begun.elapsed() > storm;
        if calm && is_away {
            group.gateways[A].come_back().await;
            is_away = false;
        }
        if let Some((how, at)) = away
            && !calm
            && !is_away
            && at <= Instant::now()
        {
            group.gateways[A].go_away(how).await;
            is_away = true;
        }
        if calm {
            members.iter_mut().for_each(Member::recover);
        } else if next <= Instant::now() {
            let index = random.random_range(0..members.len());
            members[index].harm(&mut random);
            harms += 1;
            next = Instant::now() + Duration::from_millis(random.random_range(80..500));
        }
        members.iter_mut().for_each(Member::tend);
        operators
            .iter_mut()
            .for_each(|one| one.tend(&mut random, calm));
        watch.look(&group).await;
        // The application moves some time after the new epoch was stored: nobody fences it.
        if watch.epochs.get(&B).is_some_and(|epoch| *epoch > 1) {
            let at = *moves.get_or_insert_with(|| {
                Instant::now() + Duration::from_millis(random.random_range(0..1_500))
            });
            if at <= Instant::now() {
                application.place.store(B, Ordering::Relaxed);
            }
            // It rests before the last late write can come.
            if at + LATE.mul_f64(0.5) <= Instant::now() {
                application.stop.store(true, Ordering::Relaxed);
            }
        }
        let all_done = operators
            .iter()
            .all(|one| matches!(one.codes.last(), Some(Some(_))));
        if calm && all_done {
            break;
        }
        if begun.elapsed() > SEED_MAX {
            watch.troubles.push("no end of it".to_owned());
            break;
        }
        tokio::time::sleep(Duration::from_millis(40)).await;
    }
    application.stop.store(true, Ordering::Relaxed);
    let last = application.task.await.unwrap();
    let mut troubles = std::mem::take(&mut watch.troubles);
    let settled = settle(&group, &mut watch).await;
    troubles.extend(settled.err());
    troubles.append(&mut watch.troubles);
    troubles.extend(flows(&group, started_ms).await);
    // Everything that was late is so no more.
    let told = group.told(B).await.unwrap();
    // The old region did not answer at the end of the watch, and that was accepted: then it stays.
    let said = operators
        .iter()
        .map(|one| text_of(&one.config.with_extension("said")));
    let unwatched = said
        .into_iter()
        .any(|said| said.contains("could not be looked for"));
    if told.1 == LABELS[B] && !unwatched {
        for ((place, id), v) in &last {
            let now = group.value(B, id).await;
            if *place == B && now.as_deref() != Some(v.to_string().as_str()) {
                troubles.push(format!(
                    "{id} holds {now:?} in the new active region, and {v} was written there last"
                ));
            }
        }
    }
    let codes: Vec<_> = operators.iter().map(|one| one.codes.clone()).collect();
    let story = format!(
        "seed {seed}: {harms} harms, away {}{}, codes {codes:?}, epoch {}, {} active, {} writes in B, {:.0} s",
        away.is_some(),
        if unwatched { " and not watched" } else { "" },
        told.0,
        told.1,
        last.keys().filter(|(place, _)| *place == B).count(),
        begun.elapsed().as_secs_f64(),
    );
    if !troubles.is_empty() {
        for member in &members {
            let log = text_of(&member.config.with_extension("log"));
            let tail: Vec<&str> = log.lines().rev().take(12).collect();
            println!("-- worker in {}:\n{}", LABELS[member.here], tail.join("\n"));
        }
        for operator in &operators {
            println!(
                "-- operator:\n{}",
                text_of(&operator.config.with_extension("said"))
            );
        }
    }
    Outcome { troubles, story }
}

/// A person comes and finishes it: what was left unfinished is gone on with, a conflict is decided.
async fn settle(group: &Group, watch: &mut Watch) -> Result<(), String> {
    let config = group.config(B, "");
    for _ in 0..8 {
        watch.look(group).await;
        let (b, c) = (group.told(B).await.unwrap(), group.told(C).await.unwrap());
        let contradict =
            b.0 == c.0 && b.1 != c.1 || b.2 == "conflict" || c.2 == "conflict" && c.0 >= b.0;
        if b.2 == "steady" && b.1 == LABELS[B] && !contradict && b.0 >= c.0 {
            return Ok(());
        }
        if c.1 == LABELS[C] && c.2 == "steady" && c.0 > b.0 {
            return Ok(());
        }
        let (_, plan, _) = command(&config, &["failover", "--to", LABELS[B]]).await;
        let losses = plan.lines().filter_map(|line| {
            let (name, _) = line.strip_prefix("  ! ")?.split_once(": ")?;
            Some(name.to_owned())
        });
        let losses: Vec<String> = losses.collect();
        let mut typed = vec![
            "failover",
            "--to",
            LABELS[B],
            "--apply",
            "--accept-loss",
            "late-writes",
        ];
        for loss in &losses {
            typed.extend(["--accept-loss", loss]);
        }
        let (code, answer, said) = command(&config, &typed).await;
        if code == Some(2) {
            println!("settling: {answer}{said}");
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }
    let (b, c) = (group.told(B).await, group.told(C).await);
    Err(format!("it does not come to an end: {b:?} {c:?}"))
}

/// What the gateways saw: whose flow wrote where, and when.
async fn flows(group: &Group, started_ms: i64) -> Vec<String> {
    let mut troubles = Vec::new();
    let of_table = |call: &farshore::embedded::gateway::Call| {
        call.operation == "BatchWriteItem" && call.tables.iter().any(|table| table == TABLE)
    };
    let into_a = group.gateways[A].calls_where(of_table);
    if !into_a.is_empty() {
        troubles.push(format!(
            "{} batches were written into the quarantine",
            into_a.len()
        ));
    }
    for region in [B, C] {
        let Some(control) = group.control(region).await else {
            continue;
        };
        if control["active"] != s(LABELS[region]) {
            continue;
        }
        let epoch: u64 = control["epoch"].as_n().unwrap().parse().unwrap();
        let steps = control.get("steps").and_then(|steps| steps.as_l().ok());
        let fenced = steps.into_iter().flatten().find_map(|step| {
            let step = step.as_m().ok()?;
            (step["step"] == s("fenced"))
                .then(|| step["atMs"].as_n().unwrap().parse::<i64>().unwrap())
        });
        let Some(fenced) = fenced else { continue };
        for call in group.gateways[region].calls_where(of_table) {
            let of: u64 = call.epoch.as_deref().unwrap_or("0").parse().unwrap_or(0);
            let arrived = started_ms + i64::try_from(call.arrived.as_millis()).unwrap();
            // The gateway started before the clock was read; a call is on its way for a moment.
            if of < epoch && arrived > fenced + 500 {
                troubles.push(format!(
                    "a batch of epoch {of} arrived in {} {} ms after its fence was complete",
                    LABELS[region],
                    arrived - fenced
                ));
            }
        }
    }
    troubles
}

#[test]
fn whatever_goes_wrong_a_failover_leaves_one_flow_and_no_late_write() {
    let mut failed = Vec::new();
    for seed in seeds() {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let outcome = runtime.block_on(torture(seed));
        runtime.shutdown_timeout(Duration::from_secs(1));
        println!("{}", outcome.story);
        if !outcome.troubles.is_empty() {
            println!("{}", outcome.troubles.join("\n"));
            failed.push(format!(
                "FARSHORE_TEST_SEED={seed}: {}",
                outcome.troubles.join("; ")
            ));
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}
