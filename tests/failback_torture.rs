//! The ledger test of failback: two regions behind gateways, the real binary, and an application that keeps a ledger of
//! what it wrote where. The active region is cut off in mid-flow; the other one becomes active and is written to;
//! the first comes back, and is brought home while the command and the workers are killed. Then each key's last write
//! of each side has to be in the tables, in the report, or in the store.
//!
//! Three seeds, with `--ignored`; `FARSHORE_TORTURE_SEEDS=N` runs N, `FARSHORE_TEST_SEED=S` that one. Every seventh one
//! trims the stream of the region that comes home.

mod common;
mod failover_support;

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use aws_sdk_dynamodb::types::{AttributeValue, ReturnValue};
use common::binary::{Worker, farshore, spawn};
use common::checker;
use common::stand::{state_rows, text_of};
use failover_support::{A, B, Group, LABELS, TABLE, command};
use farshore::embedded::gateway::Outage;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use rustix::process::Signal;
use serde_json::Value;

const LEASE: Duration = Duration::from_secs(1);
const KEYS: u64 = 40;
const STORE: &str = "farshore-g-failback";
/// More than all the waits of a seed at its slowest.
const SEED_MAX: Duration = Duration::from_secs(180);
/// Seeds that have failed: in the long form they are run again.
const ONCE_FAILED: [u64; 0] = [];
/// Where the command dies, one after another, in an order of the seed's.
const COMMAND_DIES: [&str; 6] = [
    "home-written",
    "home-reported",
    "home-applied",
    "home-decided",
    "home-turned",
    "home-equal",
];
/// And the worker in quarantine.
const WORKER_DIES: [&str; 3] = ["track-begun", "track-kept", "track-stored"];

fn seeds() -> Vec<u64> {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    if let Some(seed) = number("FARSHORE_TEST_SEED") {
        return vec![seed];
    }
    let count = number("FARSHORE_TORTURE_SEEDS").unwrap_or(3);
    let mut seeds: Vec<u64> = (1..=count).collect();
    seeds.extend(ONCE_FAILED.iter().filter(|seed| **seed > count));
    seeds
}

/// A worker that an orchestrator starts again whenever it ends.
struct Member {
    config: PathBuf,
    worker: Option<Worker>,
    again: Instant,
    paused: Option<Instant>,
    /// Where it is to die when it is started next.
    dies: Vec<&'static str>,
}

impl Member {
    fn new(group: &Group, here: usize) -> Self {
        Self {
            config: group.config(here, ""),
            worker: None,
            again: Instant::now(),
            paused: None,
            dies: Vec::new(),
        }
    }

    fn tend(&mut self) {
        if self.paused.is_some_and(|until| until <= Instant::now()) {
            self.paused = None;
            if let Some(worker) = &self.worker {
                worker.signal(Signal::CONT);
            }
        }
        let ended = self.worker.as_mut().is_some_and(|w| w.exited().is_some());
        if ended {
            self.worker = None;
            self.again = Instant::now() + Duration::from_millis(200);
        }
        if self.worker.is_none() && self.again <= Instant::now() {
            let dies = self.dies.pop();
            let environment = dies.map(|step| ("FARSHORE_TEST_CRASH", step));
            let environment: Vec<_> = environment.into_iter().collect();
            self.worker = Some(Worker::start_with(&self.config, &environment));
        }
    }

    fn kill(&mut self, again: Duration) {
        if let Some(worker) = self.worker.take() {
            worker.kill();
        }
        self.paused = None;
        self.again = Instant::now() + again;
    }

    fn harm(&mut self, random: &mut StdRng) {
        if random.random_bool(0.5) {
            self.kill(Duration::from_millis(random.random_range(0..900)));
        } else if self.paused.is_none()
            && let Some(worker) = &self.worker
        {
            worker.signal(Signal::STOP);
            let time = LEASE.mul_f64(random.random_range(0.2..1.8));
            self.paused = Some(Instant::now() + time);
        }
    }

    fn calm(&mut self) {
        if self.paused.is_some() {
            self.paused = Some(Instant::now());
        }
        self.tend();
    }
}

/// What the application did, region by region: the last write of each key, `None` for a delete.
type Last = BTreeMap<String, Option<u64>>;

struct Application {
    next: u64,
    last: [Last; 2],
    /// Everything that was ever written in the second region.
    ever: BTreeSet<(String, Option<u64>)>,
}

impl Application {
    async fn write(&mut self, group: &Group, region: usize, id: &str, deletes: bool) {
        self.next += 1;
        let client = &group.clients[region];
        let value = match deletes {
            true => {
                let delete = client.delete_item().table_name(TABLE);
                let delete = delete.key("id", common::stand::s(id));
                let delete = delete.return_values(ReturnValue::AllOld).send().await;
                // Where nothing was, nothing was deleted, and no stream tells of it.
                let Some(old) = delete.unwrap().attributes else {
                    return;
                };
                self.replaced(region, id, Some(old));
                None
            }
            false => {
                let put = client.put_item().table_name(TABLE);
                let put = put.item("id", common::stand::s(id));
                let put = put.item("v", common::stand::n(self.next));
                let put = put.return_values(ReturnValue::AllOld).send().await.unwrap();
                self.replaced(region, id, put.attributes);
                Some(self.next)
            }
        };
        self.last[region].insert(id.to_owned(), value);
        if region == B {
            self.ever.insert((id.to_owned(), value));
        }
    }

    /// The region held this until then: a stranded write that was applied may be replaced by a newer one.
    fn replaced(&mut self, region: usize, id: &str, old: Option<failover_support::Row>) {
        if region == B {
            let v = old.map(|old| old["v"].as_n().unwrap().parse().unwrap());
            self.ever.insert((id.to_owned(), v));
        }
    }

    /// Writes at random for `time`, while `tend` looks after the rest.
    async fn work(
        &mut self,
        group: &Group,
        region: usize,
        random: &mut StdRng,
        time: Duration,
        mut tend: impl FnMut(&mut StdRng),
    ) {
        let until = Instant::now() + time;
        while Instant::now() < until {
            let id = format!("k{}", random.random_range(0..KEYS));
            let deletes = random.random_bool(0.25);
            self.write(group, region, &id, deletes).await;
            tend(random);
            tokio::time::sleep(Duration::from_millis(random.random_range(2..25))).await;
        }
    }
}

fn value_of(item: &serde_json::Map<String, Value>) -> Option<u64> {
    item.get("v")?.get("N")?.as_str()?.parse().ok()
}

/// What the report says of each key that its write left: it may say so more than once.
fn reported(path: &Path) -> BTreeMap<String, BTreeSet<Option<u64>>> {
    let mut found: BTreeMap<String, BTreeSet<Option<u64>>> = BTreeMap::new();
    for line in text_of(path).lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        let id = line["key"]["id"]["S"].as_str().unwrap().to_owned();
        let value = line["stranded"].as_object().and_then(value_of);
        found.entry(id).or_default().insert(value);
    }
    found
}

/// What the store holds, read by other means than the program's.
async fn kept(group: &Group, region: usize) -> BTreeMap<String, Option<u64>> {
    let mut found = BTreeMap::new();
    for row in state_rows(&group.clients[region], STORE).await {
        let Some(keys) = row.get("keys").and_then(|keys| keys.as_m().ok()) else {
            continue;
        };
        let id = keys["id"].as_s().unwrap().clone();
        let value = row.get("image").map(|image| {
            let AttributeValue::B(packed) = image else {
                panic!("no image: {image:?}")
            };
            let mut json = String::new();
            let mut unpacked = flate2::read::DeflateDecoder::new(packed.as_ref());
            unpacked.read_to_string(&mut json).unwrap();
            let item: Value = serde_json::from_str(&json).unwrap();
            value_of(item.as_object().unwrap()).unwrap()
        });
        found.insert(id, value);
    }
    found
}

async fn held(group: &Group, region: usize) -> BTreeMap<String, u64> {
    let mut found = BTreeMap::new();
    for row in state_rows(&group.clients[region], TABLE).await {
        let v = row["v"].as_n().unwrap().parse().unwrap();
        found.insert(row["id"].as_s().unwrap().clone(), v);
    }
    found
}

/// Types the command, and kills it after a while, or at a step.
async fn typed(
    config: &Path,
    arguments: &[String],
    dies: Option<&str>,
    kill_after: Option<Duration>,
    mut tend: impl FnMut(),
) -> (Option<i32>, String) {
    let mut all: Vec<&str> = arguments.iter().map(String::as_str).collect();
    all.extend(["--config", config.to_str().unwrap()]);
    let mut command = farshore(&all);
    if let Some(step) = dies {
        command.env("FARSHORE_TEST_CRASH", step);
    }
    let path = config.with_extension("said");
    let said = std::fs::File::create(&path).unwrap();
    command.stdout(said.try_clone().unwrap()).stderr(said);
    let mut child = spawn(command).unwrap();
    let begun = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return (status.code(), text_of(&path));
        }
        let is_due = kill_after.is_some_and(|after| begun.elapsed() > after);
        if is_due || begun.elapsed() > Duration::from_secs(60) {
            child.kill().unwrap();
        }
        tend();
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
}

/// Writes, while an orchestrator keeps the first two workers alive.
async fn work(
    group: &Group,
    (application, members): (&mut Application, &mut [Member]),
    region: usize,
    time: Duration,
    random: &mut StdRng,
) {
    let tend = |_: &mut StdRng| members[..2].iter_mut().for_each(Member::tend);
    application.work(group, region, random, time, tend).await;
}

struct Story {
    troubles: Vec<String>,
    text: String,
}

async fn torture(seed: u64) -> Story {
    let mut random = StdRng::seed_from_u64(seed);
    let trims = seed.is_multiple_of(7);
    let mut group = Group::new(seed, 2).await;
    group.late_effect = "2s";
    group.provision(&[B, A]);
    let mut members = [
        Member::new(&group, A),
        Member::new(&group, B),
        Member::new(&group, A),
    ];
    members[..2].iter_mut().for_each(Member::tend);
    let follows = async || {
        let rows = group.rows_of(B, "shard").await;
        !rows.is_empty() && rows.iter().all(|row| row.contains_key("readBy"))
    };
    common::eventually("it follows", Duration::from_secs(30), follows).await;
    let mut application = Application {
        next: 0,
        last: Default::default(),
        ever: BTreeSet::new(),
    };
    let begun = Instant::now();
    // A flow, cut in its middle: the application writes on where nobody reads it.
    let time = Duration::from_millis(random.random_range(900..2_000));
    work(
        &group,
        (&mut application, &mut members),
        A,
        time,
        &mut random,
    )
    .await;
    members[1].kill(Duration::from_secs(600));
    let time = Duration::from_millis(random.random_range(200..900));
    work(
        &group,
        (&mut application, &mut members),
        A,
        time,
        &mut random,
    )
    .await;
    let how = match random.random_bool(0.5) {
        true => Outage::Refused,
        false => Outage::Silent,
    };
    group.gateways[A].go_away(how).await;
    // Sometimes at once, so that the flow's last writes are of the same second.
    tokio::time::sleep(Duration::from_millis([0, 2_200][random.random_range(0..2)])).await;
    let config = group.config(B, "");
    let failover: Vec<String> = ["failover", "--to", LABELS[B], "--apply"]
        .map(str::to_owned)
        .into();
    for attempt in 0.. {
        // Nobody writes in the other region before the fence is complete.
        let kill = (attempt < 3 && random.random_bool(0.3))
            .then(|| Duration::from_millis(random.random_range(50..1_500)));
        let (code, said) = typed(&config, &failover, None, kill, || {}).await;
        if code.is_some() {
            let told = group.told(B).await.unwrap();
            assert_eq!((told.0, told.1.as_str()), (2, LABELS[B]), "{said}");
            break;
        }
    }
    // What had come to the other region by then.
    let arrived = held(&group, B).await;
    members[1].again = Instant::now();
    let mut trouble = Vec::new();
    // A delete while a delete may be late cannot be told from that one.
    tokio::time::sleep(Duration::from_secs(5)).await;
    let time = Duration::from_millis(random.random_range(600..1_800));
    work(
        &group,
        (&mut application, &mut members),
        B,
        time,
        &mut random,
    )
    .await;
    if trims {
        group.gateways[A].trim(TABLE);
    }
    group.gateways[A].come_back().await;
    members[0].dies = WORKER_DIES.to_vec();
    members[0].kill(Duration::ZERO);
    // Its application has not been stopped yet.
    let time = Duration::from_millis(random.random_range(0..600));
    work(
        &group,
        (&mut application, &mut members),
        A,
        time,
        &mut random,
    )
    .await;
    let mut failover = failover;
    if trims {
        // What was in flight cannot be read any more: a person accepts that.
        failover.extend(["--accept-loss", "late-writes"].map(str::to_owned));
    }
    for _ in 0..10 {
        if group.told(B).await.unwrap().2 == "steady" {
            break;
        }
        typed(&config, &failover, None, None, || {
            members[..2].iter_mut().for_each(Member::tend)
        })
        .await;
    }
    let policies = [
        ["--stranded", "apply", "--conflicts", "active"],
        ["--stranded", "apply", "--conflicts", "newest=v"],
        ["--stranded", "apply", "--conflicts", "keep"],
        ["--stranded", "keep", "--conflicts", "active"],
        ["--stranded", "discard", "--conflicts", "active"],
        ["--stranded", "discard", "--conflicts", "keep"],
    ];
    let policy = policies[random.random_range(0..policies.len())];
    let report = group.temp.path().join("report.jsonl");
    let mut home: Vec<String> = vec!["failback".to_owned()];
    home.extend(policy.map(str::to_owned));
    home.extend([
        "--report".to_owned(),
        report.to_str().unwrap().to_owned(),
        "--apply".to_owned(),
    ]);
    let mut dies: Vec<&str> = COMMAND_DIES
        .iter()
        .copied()
        .filter(|_| random.random_bool(0.5))
        .collect();
    // The first one first.
    dies.reverse();
    let mut codes = Vec::new();
    let mut said = String::new();
    // A second process in the region that comes home.
    members[2].tend();
    let mut next = Instant::now();
    let storm_ends = Instant::now() + Duration::from_secs(12);
    while begun.elapsed() < SEED_MAX {
        let storms = codes.len() < 5 && storm_ends > Instant::now();
        let step = dies.pop();
        let kill = (storms && step.is_none() && random.random_bool(0.5))
            .then(|| Duration::from_millis(random.random_range(100..4_000)));
        let mut harms = StdRng::seed_from_u64(random.random());
        let (code, text) = typed(&config, &home, step, kill, || {
            let storms = storms && storm_ends > Instant::now();
            if storms && next <= Instant::now() {
                let place = harms.random_range(0..members.len());
                members[place].harm(&mut harms);
                next = Instant::now() + Duration::from_millis(harms.random_range(300..1_500));
            }
            match storms {
                true => members.iter_mut().for_each(Member::tend),
                false => members.iter_mut().for_each(Member::calm),
            }
        })
        .await;
        codes.push(code);
        said = text;
        if said.contains("is home") || said.contains("Nobody is away") {
            break;
        }
        if let Some(deletes) = said.split("--max-deletes ").nth(1) {
            let many: String = deletes.chars().take_while(char::is_ascii_digit).collect();
            let mend = [
                "reconcile",
                "--table",
                TABLE,
                "--max-deletes",
                &many,
                "--apply",
            ];
            let (code, out, error) = command(&group.config(A, ""), &mend).await;
            codes.push(code);
            if code == Some(2) {
                said = format!("{out}{error}");
            }
        }
        // It goes on being written to.
        let id = format!("k{}", random.random_range(0..KEYS));
        let deletes = random.random_bool(0.25);
        application.write(&group, B, &id, deletes).await;
    }
    if !said.contains("is home") && !said.contains("Nobody is away") {
        trouble.push(format!("it does not come home: {said}"));
    }
    let equal = async || group.equal(A, B).await;
    let until = Instant::now() + Duration::from_secs(30);
    let mut is_equal = equal().await;
    while !is_equal && Instant::now() < until {
        members.iter_mut().for_each(Member::calm);
        tokio::time::sleep(Duration::from_millis(100)).await;
        is_equal = equal().await;
    }
    if !is_equal {
        let [one, other] = [A, B].map(|region| (&group.clients[region], TABLE));
        trouble.push(format!(
            "both differ: {:?}",
            checker::differences(one, other).await
        ));
    }
    trouble.extend(unaccounted(&group, &application, &arrived, &report, policy).await);
    if !trouble.is_empty() {
        for member in &members {
            let log = text_of(&member.config.with_extension("log"));
            let tail: Vec<&str> = log.lines().rev().take(25).collect();
            println!("-- worker:\n{}", tail.join("\n"));
        }
        println!("-- command:\n{said}\n{:?}", group.control(B).await);
    }
    let text = format!(
        "seed {seed}: {policy:?}{}, {} writes, {} reported, {} kept, codes {codes:?}, {:.0} s",
        if trims { ", trimmed" } else { "" },
        application.next,
        reported(&report).len(),
        kept(&group, A).await.len(),
        begun.elapsed().as_secs_f64()
    );
    Story {
        troubles: trouble,
        text,
    }
}

/// What became of nothing: writes that are in no table, in no report and in no store; and writes of the active
/// region that were replaced by an older one.
async fn unaccounted(
    group: &Group,
    application: &Application,
    arrived: &BTreeMap<String, u64>,
    report: &Path,
    policy: [&str; 4],
) -> Vec<String> {
    let (told, kept, now) = (reported(report), kept(group, A).await, held(group, B).await);
    let mut troubles = Vec::new();
    let [old, new] = &application.last;
    for id in old.keys().chain(new.keys()).collect::<BTreeSet<_>>() {
        let now = now.get(id).copied();
        let is_told = |value: &Option<u64>| {
            let reported = told.get(id).is_some_and(|values| values.contains(value));
            reported || kept.get(id) == Some(value)
        };
        if let Some(written) = new.get(id) {
            let newer = policy[3] == "newest=v" && policy[1] == "apply";
            let stranded = old.get(id).copied().flatten();
            let by_policy = newer && now == stranded && stranded > *written && written.is_some();
            if now != *written && !by_policy {
                troubles.push(format!(
                    "{id} holds {now:?}, and {written:?} was written in the active region last"
                ));
            }
        }
        if let Some(stranded) = old.get(id) {
            let had_arrived = arrived.get(id).copied() == *stranded;
            // What equals what the active region held when it was judged needs nothing.
            let was_equal = application.ever.contains(&(id.clone(), *stranded));
            if now != *stranded && !had_arrived && !was_equal && !is_told(stranded) {
                troubles.push(format!(
                    "{id}: {stranded:?} was written in the old region last, and is in no table, report or store ({now:?}, reported {:?}, kept {:?})",
                    told.get(id),
                    kept.get(id)
                ));
            }
            let nobody_else = !new.contains_key(id);
            let left = [*stranded, arrived.get(id).copied()];
            if nobody_else && !left.contains(&now) {
                troubles.push(format!(
                    "{id} holds {now:?}, and it should hold one of {left:?}"
                ));
            }
        }
    }
    troubles
}

#[test]
#[ignore = "a minute for each seed: the long lane has it"]
fn each_last_write_of_each_side_is_in_the_tables_in_the_report_or_in_the_store() {
    let mut failed = Vec::new();
    for seed in seeds() {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let story = runtime.block_on(torture(seed));
        runtime.shutdown_timeout(Duration::from_secs(1));
        println!("{}", story.text);
        if !story.troubles.is_empty() {
            println!("{}", story.troubles.join("\n"));
            failed.push(format!(
                "FARSHORE_TEST_SEED={seed}: {}",
                story.troubles.join("; ")
            ));
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}
