//! The recovery point is told against the truth: a writer that knows when each of its writes was
//! acknowledged, and a replica that is read whole at every sample.
//!
//! The short form takes one fault after the other. The long form (`FARSHORE_LONG=1`) lets a seed decide,
//! for some minutes; `FARSHORE_TEST_SEED` repeats it.

mod common;
mod suite;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use aws_sdk_dynamodb::Client;
use common::binary::{Worker, farshore, provision, run};
use common::stand::{SOURCE, Stand, TARGET, client, n, s, text_of};
use common::{eventually, long};
use farshore::embedded::gateway::{Fault, Options, Outage};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use rustix::process::Signal;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

/// So many that every shard has some: one that is never written to proves nothing new.
const KEYS: u64 = 60;
/// Open shards of the long form at most.
const OPEN_MAX: usize = 6;

/// What was written: the versions of each key, each with when it was acknowledged.
#[derive(Default)]
struct Ledger(Mutex<BTreeMap<String, Vec<(u64, Instant)>>>);

impl Ledger {
    /// When the oldest write was acknowledged that `replica` lacks, of those acknowledged by `until`.
    fn oldest_missing(&self, replica: &HashMap<String, u64>, until: Instant) -> Option<Instant> {
        let keys = self.0.lock().unwrap();
        let missing = keys.iter().filter_map(|(key, versions)| {
            let held = replica.get(key).copied().unwrap_or(0);
            let newer = versions.iter().find(|(version, _)| *version > held);
            newer.map(|(_, acknowledged)| *acknowledged)
        });
        missing.filter(|acknowledged| *acknowledged <= until).min()
    }
}

/// Writes until it is stopped. A write that failed may have taken effect, and is not in the ledger.
async fn write(source: Client, table: String, ledger: Arc<Ledger>, stop: CancellationToken) -> u64 {
    let mut version = 0;
    while !stop.is_cancelled() {
        version += 1;
        let key = format!("k{}", version % KEYS);
        let put = source.put_item().table_name(&table);
        let put = put.item("id", s(key.as_str())).item("v", n(version)).send();
        if let Ok(Ok(_)) = tokio::time::timeout(Duration::from_secs(1), put).await {
            let mut keys = ledger.0.lock().unwrap();
            keys.entry(key).or_default().push((version, Instant::now()));
        }
        tokio::time::sleep(Duration::from_millis(8)).await;
    }
    version
}

/// The version of every key in the replica, read past its faults.
async fn replica(target: &Client, table: &str) -> HashMap<String, u64> {
    let scan = target.scan().table_name(table).consistent_read(true);
    let items = scan.send().await.unwrap().items.unwrap_or_default();
    let version = |item: &HashMap<String, _>| {
        let v: &aws_sdk_dynamodb::types::AttributeValue = &item["v"];
        v.as_n().unwrap().parse().unwrap()
    };
    items
        .iter()
        .map(|item| (item["id"].as_s().unwrap().clone(), version(item)))
        .collect()
}

/// What was shown, and between which times.
struct Shown {
    by: &'static str,
    before: Instant,
    after: Instant,
    /// Infinite where unknown. Without what it includes for the clock's error: here both clocks are one.
    proven_s: f64,
    estimated_s: f64,
}

fn seconds(point: &Value, kind: &str) -> f64 {
    point[kind].as_f64().unwrap_or(f64::INFINITY)
}

fn error_s(view: &Value) -> f64 {
    view["clockErrorSeconds"].as_f64().unwrap_or(0.0)
}

/// By `/metrics`, or now and then by `/status`.
async fn ask_worker(worker: &Worker, whole: bool) -> Option<Shown> {
    let before = Instant::now();
    let path = if whole { "/status" } else { "/metrics" };
    let (status, text) = worker.get(path).await?;
    let after = Instant::now();
    if status != 200 {
        return None;
    }
    if whole {
        let view: Value = serde_json::from_str(&text).ok()?;
        let point = &view["recoveryPoint"];
        return Some(Shown {
            by: "/status",
            before,
            after,
            proven_s: seconds(point, "provenSeconds") - error_s(&view),
            estimated_s: seconds(point, "estimatedSeconds"),
        });
    }
    let gauge = |name: &str, label: &str| {
        let is_it = |line: &&str| line.starts_with(&format!("{name}{{")) && line.contains(label);
        let line = text.lines().find(is_it)?;
        line.rsplit(' ').next()?.parse::<f64>().ok()
    };
    let point = |label: &str| gauge("farshore_group_recovery_point_seconds", label);
    let error_s = gauge("farshore_source_clock_error_seconds", "").unwrap_or(0.0);
    Some(Shown {
        by: "/metrics",
        before,
        after,
        // A worker that has just started has not looked yet.
        proven_s: point("kind=\"proven\"").map_or(f64::INFINITY, |s| s - error_s.min(s)),
        estimated_s: point("kind=\"estimated\"").unwrap_or(f64::INFINITY),
    })
}

/// By `farshore status`, which needs no worker.
async fn ask_status(config: &Path) -> Option<Shown> {
    let mut command = farshore(&["status", "--json", "--config", config.to_str().unwrap()]);
    let before = Instant::now();
    let output = tokio::task::spawn_blocking(move || command.output().unwrap());
    let output = output.await.unwrap();
    let after = Instant::now();
    let view: Value = serde_json::from_slice(&output.stdout).ok()?;
    let point = &view["recoveryPoint"];
    Some(Shown {
        by: "status",
        before,
        after,
        proven_s: seconds(point, "provenSeconds") - error_s(&view),
        estimated_s: seconds(point, "estimatedSeconds"),
    })
}

/// What the samples of one phase came to.
#[derive(Default)]
struct Tally {
    samples: usize,
    /// Samples whose proven recovery point was a number.
    known: usize,
    /// The least by which the shown one was above the truth, in seconds.
    least_above: Option<f64>,
    /// The most by which the estimated one was off, in seconds.
    most_off: f64,
    oldest_truth: f64,
}

/// Samples one after the other, each held against the truth.
struct Sampler {
    ledger: Arc<Ledger>,
    target: Client,
    table: String,
    phases: Vec<(&'static str, Tally)>,
    wrong: Vec<String>,
}

impl Sampler {
    fn phase(&mut self, name: &'static str) {
        self.phases.push((name, Tally::default()));
    }

    /// `ask` shows a recovery point. With `estimated` that one is judged as well.
    async fn sample(&mut self, estimated: bool, ask: impl AsyncFnOnce() -> Option<Shown>) {
        let held_before = replica(&self.target, &self.table).await;
        let Some(shown) = ask().await else {
            return;
        };
        let held_after = replica(&self.target, &self.table).await;
        // Missing before and acknowledged by the end: no write has been missing for longer. Missing after
        // and acknowledged before: at the moment of the answer it was missing for so long at least.
        let age = |missing: Option<Instant>, at: Instant| {
            missing.map_or(0.0, |since| at.duration_since(since).as_secs_f64())
        };
        let most = age(
            self.ledger.oldest_missing(&held_before, shown.after),
            shown.after,
        );
        let least = age(
            self.ledger.oldest_missing(&held_after, shown.before),
            shown.before,
        );
        let Some((phase, tally)) = self.phases.last_mut() else {
            return;
        };
        tally.samples += 1;
        tally.oldest_truth = tally.oldest_truth.max(least);
        if shown.proven_s.is_finite() {
            tally.known += 1;
            let above = shown.proven_s - least;
            tally.least_above = Some(tally.least_above.map_or(above, |known| known.min(above)));
        }
        if shown.proven_s < least {
            self.wrong.push(format!(
                "{phase}: {} shows {} s proven, and a write is missing for {least} s",
                shown.by, shown.proven_s
            ));
        }
        if estimated {
            let off = (shown.estimated_s - most).max(least - shown.estimated_s);
            tally.most_off = tally.most_off.max(off);
            if off > 2.0 {
                self.wrong.push(format!(
                    "{phase}: {} shows {} s estimated, and the truth is between {least} and {most} s",
                    shown.by, shown.estimated_s
                ));
            }
        }
    }

    fn judge(&self, seed: u64) {
        for (phase, tally) in &self.phases {
            println!(
                "{phase}: {} samples, {} known; proven above the truth by {:?} s at least, estimated off by {:.2} s \
                 at most, oldest truth {:.2} s",
                tally.samples, tally.known, tally.least_above, tally.most_off, tally.oldest_truth
            );
        }
        assert!(
            self.wrong.is_empty(),
            "seed {seed}: {} of the samples are wrong:\n{}",
            self.wrong.len(),
            self.wrong[..self.wrong.len().min(12)].join("\n")
        );
    }
}

/// Two regions, a fleet, a writer and a sampler.
struct Scene {
    stand: Stand,
    configs: [PathBuf; 2],
    workers: [Option<Worker>; 2],
    sampler: Sampler,
    stop: CancellationToken,
    writing: tokio::task::JoinHandle<u64>,
    turn: usize,
}

impl Scene {
    async fn new(seed: u64, source: Options) -> Self {
        let stand = Stand::gateways(source, Options::new(seed)).await;
        let table = stand.table("orders");
        stand.create_source(&table).await;
        let configs = [stand.config(&[&table], ""), stand.config(&[&table], "")];
        provision(&configs[0]);
        let first = Worker::following(&configs[0]).await;
        let ledger = Arc::new(Ledger::default());
        let stop = CancellationToken::new();
        let source = client(&stand.gateways[0].endpoint_url(), SOURCE);
        let writing = tokio::spawn(write(
            source,
            table.clone(),
            Arc::clone(&ledger),
            stop.clone(),
        ));
        let target = client(&stand.gateways[1].embedded().endpoint_url(), TARGET);
        let sampler = Sampler {
            ledger,
            target,
            table,
            phases: Vec::new(),
            wrong: Vec::new(),
        };
        Self {
            stand,
            configs,
            workers: [Some(first), None],
            sampler,
            stop,
            writing,
            turn: 0,
        }
    }

    /// Samples every worker that lives in turn, or `status` where none does, for so long.
    async fn sample_for(&mut self, time: Duration, estimated: bool) {
        let end = Instant::now() + time;
        while Instant::now() < end {
            self.turn += 1;
            let living: Vec<&Worker> = self.workers.iter().flatten().collect();
            let config = &self.configs[0];
            if living.is_empty() || self.turn.is_multiple_of(16) {
                // A process of its own takes its time, in which the truth moves on.
                let ask = async || ask_status(config).await;
                self.sampler.sample(false, ask).await;
            } else {
                let worker = living[self.turn % living.len()];
                let whole = self.turn.is_multiple_of(5);
                let ask = async || ask_worker(worker, whole).await;
                self.sampler.sample(estimated, ask).await;
            }
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
    }

    /// Waits until the proven recovery point is a number.
    async fn until_known(&self) {
        let Some(worker) = self.workers.iter().flatten().next() else {
            return;
        };
        let known = async || {
            let shown = ask_worker(worker, true).await;
            shown.is_some_and(|shown| shown.proven_s.is_finite())
        };
        eventually("a recovery point is known", Duration::from_secs(20), known).await;
    }

    async fn start(&mut self, which: usize) {
        if self.workers[which].is_none() {
            self.workers[which] = Some(Worker::start(&self.configs[which]));
        }
    }

    fn kill(&mut self, which: usize) {
        if let Some(worker) = self.workers[which].take() {
            worker.kill();
        }
    }

    /// The writer ends, and the replica has caught up with all that it wrote.
    async fn settle(&mut self) {
        self.stop.cancel();
        let written = (&mut self.writing).await.unwrap();
        println!("{written} writes");
        let (ledger, target) = (&self.sampler.ledger, &self.sampler.target);
        let table = &self.sampler.table;
        let arrived = async || {
            let held = replica(target, table).await;
            ledger.oldest_missing(&held, Instant::now()).is_none()
        };
        eventually("all has arrived", Duration::from_secs(40), arrived).await;
    }
}

/// Shards rotate, a worker is killed and replaced, the replica and the source go away, writes take effect
/// late over newer ones: at every sample the proven recovery point is no younger than the truth, and the
/// estimated one is within two seconds of it while nothing is wrong.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_proven_recovery_point_is_never_younger_than_the_truth() {
    let seed = common::seed();
    let source = Options::new(seed)
        .shards(3)
        .fault(Fault::empty_page().chance(0.3));
    let mut scene = Scene::new(seed, source).await;
    scene.sampler.phase("calm");
    scene.sample_for(Duration::from_millis(2_500), true).await;

    scene.sampler.phase("the source is away");
    scene.stand.gateways[0].go_away(Outage::Refused).await;
    scene.sample_for(Duration::from_millis(1_000), false).await;
    // The same from the state table alone, by the clock of its region.
    let path = scene.configs[0].to_str().unwrap();
    let view: Value =
        serde_json::from_slice(&run(&["status", "--json", "--config", path]).stdout).unwrap();
    assert_eq!(
        (&view["clock"], &view["clockErrorSeconds"]),
        (&"replica".into(), &2.0.into())
    );
    assert_eq!(view["regions"][0]["state"], "unreachable", "{view:#}");
    assert_eq!(view["headline"]["code"], "outage-source", "{view:#}");
    scene.stand.gateways[0].come_back().await;
    scene.sample_for(Duration::from_millis(1_500), false).await;

    scene.sampler.phase("calm again");
    scene.until_known().await;
    scene.sample_for(Duration::from_millis(500), true).await;

    scene.sampler.phase("the replica is away");
    let denied = Fault::access_denied().on("BatchWriteItem");
    let denied = scene.stand.gateways[1].inject(denied);
    scene.sample_for(Duration::from_millis(1_800), false).await;
    denied.off();
    scene.sample_for(Duration::from_millis(700), false).await;

    scene.sampler.phase("late effects");
    // Held for much longer than a lease: given up, written again, overtaken, and then delivered.
    let held = Fault::hold(Duration::from_millis(3_500))
        .on("BatchWriteItem")
        .times(3);
    let held = scene.stand.gateways[1].inject(held);
    scene.sample_for(Duration::from_millis(4_200), false).await;
    assert!(held.hits() > 0, "nothing was held back");

    scene.sampler.phase("rotated");
    scene.stand.gateways[0]
        .rotate_all(&scene.sampler.table)
        .unwrap();
    scene.sample_for(Duration::from_millis(1_000), false).await;

    scene.sampler.phase("killed, and nobody there");
    scene.kill(0);
    scene.sample_for(Duration::from_millis(1_500), false).await;
    scene.sampler.phase("taken over");
    scene.start(1).await;
    scene.sample_for(Duration::from_millis(2_500), false).await;
    scene.settle().await;
    scene.sampler.judge(seed);
    let [_, Some(second)] = scene.workers else {
        panic!("the second worker is gone")
    };
    assert!(second.stop().await.success());
}

/// What a seed does to the scene next.
async fn mishap(scene: &mut Scene, random: &mut StdRng) {
    let second = Duration::from_millis(random.random_range(600..2_500));
    match random.random_range(0..9) {
        0 => {
            scene.sampler.phase("a kill");
            let which = random.random_range(0..2);
            scene.kill(which);
            scene.sample_for(second, false).await;
            scene.start(which).await;
        }
        1 => {
            scene.sampler.phase("all killed");
            scene.kill(0);
            scene.kill(1);
            scene.sample_for(second, false).await;
            scene.start(0).await;
            scene.start(1).await;
        }
        2 => {
            scene.sampler.phase("a pause");
            let which = random.random_range(0..2);
            if let Some(worker) = &scene.workers[which] {
                worker.signal(Signal::STOP);
                // It does not answer; the other does.
                let stopped = scene.workers[which].take();
                scene.sample_for(second, false).await;
                if let Some(worker) = stopped {
                    worker.signal(Signal::CONT);
                    scene.workers[which] = Some(worker);
                }
            }
        }
        3 => {
            scene.sampler.phase("replica away");
            scene.stand.gateways[1].go_away(Outage::Silent).await;
            tokio::time::sleep(second).await;
            scene.stand.gateways[1].come_back().await;
        }
        4 => {
            scene.sampler.phase("writes denied");
            let fault = Fault::access_denied().on("BatchWriteItem");
            let fault = scene.stand.gateways[1].inject(fault);
            scene.sample_for(second, false).await;
            fault.off();
        }
        5 => {
            scene.sampler.phase("source away");
            scene.stand.gateways[0].go_away(Outage::Refused).await;
            scene.sample_for(second, false).await;
            scene.stand.gateways[0].come_back().await;
        }
        6 => {
            scene.sampler.phase("late effects");
            let fault = Fault::hold(Duration::from_millis(1_800)).on("BatchWriteItem");
            scene.stand.gateways[1].inject(fault.times(3));
            scene.sample_for(second, false).await;
        }
        7 => {
            scene.sampler.phase("errors after");
            let fault = Fault::error_after().on("BatchWriteItem").chance(0.3);
            let fault = scene.stand.gateways[1].inject(fault);
            scene.sample_for(second, false).await;
            fault.off();
        }
        _ => {
            scene.sampler.phase("splits");
            let table = scene.sampler.table.clone();
            let gateway = &scene.stand.gateways[0];
            let open = gateway.shards(&table).into_iter();
            let open: Vec<_> = open.filter(|shard| shard.open).collect();
            let room = OPEN_MAX.saturating_sub(open.len());
            for shard in open.iter().take(room) {
                // Rotated meanwhile, it is no open shard any more.
                let _ = gateway.split(&table, &shard.id);
            }
        }
    }
    scene.sample_for(Duration::from_millis(1_500), false).await;
}

/// The same for minutes, with two workers, rotations, splits, listings that lack shards, and whatever
/// else the seed thinks of.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_happens_the_proven_recovery_point_is_never_younger_than_the_truth() {
    let seed = common::seed();
    let minutes = long(4, 0);
    if minutes == 0 {
        return;
    }
    let source = Options::new(seed)
        .shards(3)
        .rotate_every(Duration::from_secs(60))
        .fault(Fault::empty_page().chance(0.3))
        .fault(Fault::missing_shard().chance(0.3))
        .fault(Fault::late_children(Duration::from_secs(2)));
    let mut scene = Scene::new(seed, source).await;
    scene.start(1).await;
    scene.sampler.phase("calm");
    scene.sample_for(Duration::from_secs(3), false).await;
    let mut random = StdRng::seed_from_u64(seed);
    let end = Instant::now() + Duration::from_secs(60 * minutes);
    while Instant::now() < end {
        mishap(&mut scene, &mut random).await;
    }
    scene.stand.gateways[0].stop_resharding();
    scene.settle().await;
    scene.sampler.judge(seed);
    // An old one is no feat.
    let near = |(_, tally): &&(&str, Tally)| tally.least_above.is_some_and(|above| above < 10.0);
    let near = scene.sampler.phases.iter().filter(near).count();
    assert!(
        near > 3,
        "seed {seed}: the point was near the truth in {near} phases only"
    );
}

/// An outage is two lines of the log, however many shards and retries it has.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outage_is_two_lines_and_not_two_thousand() {
    let seed = common::seed();
    let mut stand = Stand::gateways(Options::new(seed).shards(8), Options::new(seed)).await;
    let table = stand.table("orders");
    let (_config, worker) = suite::replicated(&stand, &table, "").await;
    let mut random = StdRng::seed_from_u64(seed);
    suite::random_changes(&stand, &table, &mut random, 60, 30).await;
    stand.converge(&table, 1).await;
    let lines = || text_of(&worker.log).lines().count();
    let red = async || (worker.get("/readyz").await).is_some_and(|(status, _)| status == 503);
    let green = async || (worker.get("/readyz").await).is_some_and(|(status, _)| status == 200);

    let before = lines();
    let denied = stand.gateways[1].inject(Fault::access_denied().on("BatchWriteItem"));
    suite::random_changes(&stand, &table, &mut random, 200, 100).await;
    eventually("readiness is red", Duration::from_secs(10), red).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(denied.hits() > 5, "hardly anything was refused");
    denied.off();
    eventually("readiness is green", Duration::from_secs(10), green).await;
    stand.converge(&table, 1).await;
    let log = text_of(&worker.log);
    let replica: Vec<&str> = log.lines().skip(before).collect();
    assert_eq!(replica.len(), 2, "{}", replica.join("\n"));
    assert!(replica[0].contains("outage begins: waiting until it passes"));
    assert!(replica[1].contains("outage ends"));

    let before = lines();
    stand.gateways[0].go_away(Outage::Refused).await;
    eventually("readiness is red", Duration::from_secs(15), red).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    stand.gateways[0].come_back().await;
    eventually("readiness is green", Duration::from_secs(15), green).await;
    let log = text_of(&worker.log);
    let source: Vec<&str> = log.lines().skip(before).collect();
    assert_eq!(source.len(), 2, "{}", source.join("\n"));

    // Whoever looks at the page sees them as well.
    let (_, text) = worker.get("/status").await.unwrap();
    let view: Value = serde_json::from_str(&text).unwrap();
    let shape: farshore::observe::view::View = serde_json::from_str(&text).unwrap();
    assert_eq!(serde_json::to_value(shape).unwrap(), view, "another shape");
    let events = view["events"].as_array().unwrap();
    let texts = events.iter().filter_map(|event| event["text"].as_str());
    let begun = texts.filter(|text| text.starts_with("outage begins"));
    assert_eq!(begun.count(), 2, "{events:#?}");
    assert!(worker.stop().await.success());
}
