//! One seed of the torture test: a random workload through every fault while workers are killed,
//! paused, stopped and started; then quiet; then the verdict.

pub mod chaos;
pub mod faults;
pub mod fleet;
pub mod seeds;
pub mod verdict;
pub mod workload;

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use aws_sdk_dynamodb::types::AttributeValue as V;
use farshore::embedded::gateway::Options;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::common::binary::provision;
use crate::common::stand::{SOURCE, Stand};

use chaos::Chaos;
use faults::Faults;
use fleet::Fleet;
use verdict::Views;
use workload::{Poison, Workload};

/// Until all is settled: far more than it takes. On a machine that is overloaded leases go on being
/// lost, and each loss leaves a doubt.
const PATIENCE: Duration = Duration::from_secs(240);
/// Until the first workers read every shard.
const START_PATIENCE: Duration = Duration::from_secs(60);
/// Items written before the faults end, as long as their time allows.
const WRITES_MIN: u64 = 800;
/// How keys begin that the replica refuses.
const POISON: &str = "poison-";
const WORKERS_MAX: usize = 4;

/// All times of a seed, longer on a machine that has much else to do: a lease that is lost because
/// nobody was let run tests nothing.
#[derive(Clone, Copy, Debug)]
pub struct Pace(u32);

impl Pace {
    const SLOWEST: u32 = 4;
    /// A process starts and makes a dozen calls within this, on a machine with nothing else to do.
    const QUICK: Duration = Duration::from_millis(400);
    /// Tasks that wait for a core while nothing runs but this test.
    const LOAD: f64 = 3.0;

    /// By how long a process took, and by what waits for the cores.
    fn measured(took: Duration) -> Self {
        let slow = took.as_secs_f64() / Self::QUICK.as_secs_f64();
        let waiting = load().unwrap_or(0.0) / Self::LOAD;
        Self((slow.max(waiting).ceil() as u32).clamp(1, Self::SLOWEST))
    }

    fn times(self, ms: u32) -> Duration {
        Duration::from_millis(u64::from(ms * self.0))
    }

    fn lease(self) -> Duration {
        self.times(1_500)
    }

    /// How late a write may take effect, as the workers are told.
    fn late_effect(self) -> Duration {
        self.times(4_500)
    }

    /// No signature lives longer. It has whole seconds, so a write takes effect up to one later, and
    /// half a second is left for its way through the database.
    fn signature(self) -> Duration {
        self.times(3_000)
    }

    fn grace(self) -> Duration {
        self.times(3_000)
    }

    /// How long the faults rage, if enough is written by then, and if not.
    fn chaos(self) -> Duration {
        self.times(9_000)
    }

    fn chaos_max(self) -> Duration {
        self.times(20_000)
    }

    /// Leases short enough to be lost often, polling slow enough for two cores and many processes.
    fn settings(self) -> [(&'static str, Duration); 6] {
        [
            ("duration", self.lease()),
            ("late_effect", self.late_effect()),
            ("shutdown_grace", self.grace()),
            ("poll_interval", Duration::from_millis(50)),
            ("idle_interval", Duration::from_millis(150)),
            ("checkpoint_every", Duration::from_millis(250)),
        ]
    }
}

/// A replicated table.
#[derive(Clone, Debug)]
pub struct Table {
    pub name: String,
    key: &'static [&'static str],
}

impl Table {
    fn name(&self) -> &str {
        &self.name
    }

    /// The attributes of its key.
    pub fn key(&self) -> &'static [&'static str] {
        self.key
    }

    pub fn is_sorted(&self) -> bool {
        self.key.len() == 2
    }

    /// How messages name an item: its table, and its key as the checker writes it.
    pub fn name_of(&self, item: &HashMap<String, V>) -> String {
        let parts = self.key.iter().map(|name| match &item[*name] {
            V::S(text) => format!("S{text}"),
            V::N(number) => format!("N{number}"),
            other => format!("{other:?}"),
        });
        format!("{} {}", self.name, parts.collect::<Vec<_>>().join("/"))
    }

    /// The same of a key as DynamoDB JSON. `None` if it is not of this table's shape.
    pub fn named_in(&self, keys: &serde_json::Value) -> Option<String> {
        let parts = self.key.iter().map(|name| {
            let (kind, value) = keys[*name].as_object()?.iter().next()?;
            Some(format!("{kind}{}", value.as_str()?))
        });
        let parts: Option<Vec<_>> = parts.collect();
        Some(format!("{} {}", self.name, parts?.join("/")))
    }

    /// A key as the checker writes it, as the gateway's log writes it.
    pub fn json_of(&self, key: &str) -> String {
        let parts = self.key.iter().zip(key.split('/')).map(|(name, part)| {
            let (kind, value) = part.split_at(1);
            format!(r#""{name}":{{"{kind}":"{value}"}}"#)
        });
        format!("{{{}}}", parts.collect::<Vec<_>>().join(","))
    }
}

/// The names of one seed's tables.
#[derive(Clone, Debug)]
pub struct Tables {
    pub flat: Table,
    pub sorted: Table,
    pub state: String,
}

impl Tables {
    fn of(stand: &Stand) -> Self {
        let table = |name: &str, key| Table {
            name: stand.table(name),
            key,
        };
        Self {
            flat: table("flat", &["id"]),
            sorted: table("sorted", &["id", "at"]),
            state: stand.state_table(),
        }
    }

    pub fn all(&self) -> [&Table; 2] {
        [&self.flat, &self.sorted]
    }
}

/// What became of one seed.
#[derive(Debug, Default)]
pub struct Report {
    pub seed: u64,
    /// How much longer all times were than on an idle machine.
    pub pace: u32,
    /// What must not be; empty where the promise held.
    pub troubles: Vec<String>,
    /// The workers' last words, where there is trouble.
    pub tails: String,
    pub writes: u64,
    pub records: u64,
    pub letters: u64,
    pub done: fleet::Done,
    pub regions_away: u64,
    /// Hits of every fault that was on, and whether it has to strike somewhere.
    pub faults: Vec<(String, u64, bool)>,
    /// Held writes that took effect, of the replicas and of the state table.
    pub late: [u64; 2],
    pub divergent: usize,
    /// From the last write to all being settled.
    pub settled: Duration,
    pub took: Duration,
}

impl Report {
    pub fn hits(&self) -> u64 {
        self.faults.iter().map(|(_, hits, _)| hits).sum()
    }
}

/// Runs one seed.
pub async fn torture(seed: u64) -> Report {
    let start = Instant::now();
    let mut random = StdRng::seed_from_u64(seed);
    let source = Options::new(seed)
        .shards(random.random_range(2..5))
        .iterator_life(Duration::from_secs(4))
        .describe_page(random.random_range(8..30));
    let mut stand = Stand::gateways(source, Options::new(seed)).await;
    let tables = Tables::of(&stand);
    let (mut fleet, pace) = started(&stand, &tables, &mut random).await;

    let writers = Workload::start(&stand.source_url, SOURCE, &tables.all(), seed);
    let mut faults = Faults::inject(&stand.gateways, &tables, pace, &mut random);
    let written = writers.written();
    let mut chaos = Chaos::new(&mut stand, &tables, &mut fleet, &mut faults, pace, random);
    chaos.run(&written).await;
    // Late effects show best on the last versions of the items.
    chaos.run_on(pace.times(1_200)).await;
    let poison = writers.stop().await;
    chaos.run_on(pace.times(1_500)).await;
    chaos.recover().await;
    let regions_away = chaos.regions_away;

    let quiet = Instant::now();
    let open = verdict::settle(&stand, &tables, &mut fleet, host_ms(), PATIENCE).await;
    let settled = quiet.elapsed();
    let mut report = if open.is_empty() {
        judged(&stand, &tables, &mut fleet, &poison).await
    } else {
        let more = open.len().saturating_sub(5);
        let first = open[..open.len() - more].join("; ");
        let trouble = format!("not settled after {settled:?}: {first} (and {more} more)");
        Report {
            troubles: vec![trouble],
            ..Report::default()
        }
    };
    if !report.troubles.is_empty() {
        report.tails = fleet.tails();
    }
    report.seed = seed;
    report.pace = pace.0;
    report.done = fleet.done;
    report.writes = written.load(Ordering::Relaxed);
    report.regions_away = regions_away;
    report.settled = settled;
    let faults = faults.all().iter();
    report.faults = faults
        .map(|struck| (struck.name.clone(), struck.hits(), struck.must))
        .collect();
    report.took = start.elapsed();
    report
}

/// Tables, replicas, and the first workers, all well.
async fn started(stand: &Stand, tables: &Tables, random: &mut StdRng) -> (Fleet, Pace) {
    for table in tables.all() {
        workload::create(&stand.source, table).await;
    }
    let configs = (0..WORKERS_MAX).map(|_| stand.config(&tables.all().map(Table::name), ""));
    let configs: Vec<_> = configs.collect();
    let start = Instant::now();
    provision(&configs[0]);
    let pace = Pace::measured(start.elapsed());
    for config in &configs {
        let text = std::fs::read_to_string(config).unwrap();
        std::fs::write(config, pace.settings().iter().fold(text, set)).unwrap();
    }
    let mut fleet = Fleet::new(configs, pace);
    for _ in 0..random.random_range(2..4) {
        fleet.start_another();
    }
    // Without a fault so far, every shard finds its owner. What is written from then on is
    // replicated, and a table that already holds items is a gap.
    let open = verdict::settle(stand, tables, &mut fleet, 0, START_PATIENCE).await;
    assert!(
        open.is_empty(),
        "not even begun: {open:?}\n{}",
        fleet.tails()
    );
    (fleet, pace)
}

/// Sets a duration of a configuration.
fn set(text: String, (key, value): &(&str, Duration)) -> String {
    let line = text.lines().find(|line| line.starts_with(key)).unwrap();
    text.replace(line, &format!("{key} = \"{}ms\"", value.as_millis()))
}

/// Compares, and looks at what is left behind.
async fn judged(stand: &Stand, tables: &Tables, fleet: &mut Fleet, poison: &Poison) -> Report {
    let views = Views::of(stand);
    let (source, target) = (&stand.gateways[0], &stand.gateways[1]);
    let mut report = Report::default();
    for table in tables.all() {
        let (count, shown, taken) = verdict::divergences(&views, target, table).await;
        if count > 0 {
            let shown = shown.join("\n");
            let name = &table.name;
            report
                .troubles
                .push(format!("{count} keys of {name} differ:\n{shown}"));
        }
        report.divergent += count;
        for key in taken {
            report
                .troubles
                .push(format!("the replica took the poison {key}"));
        }
        let shards = source.shards(&table.name);
        report.records += shards.iter().map(|shard| shard.records as u64).sum::<u64>();
    }
    report
        .troubles
        .extend(verdict::judge_letters(stand, tables, poison));
    report
        .troubles
        .extend(verdict::judge_rows(&views.rows(tables).await, tables));
    fleet.stop().await;
    report.troubles.append(&mut fleet.troubles);
    report.letters = stand.dead_letters().len() as u64;
    let late = |prefix: &str| {
        let held = |call: &farshore::embedded::gateway::Call| {
            let mut names = call.faults.iter();
            call.effect.is_some() && names.any(|name| name.starts_with(prefix))
        };
        target.calls_where(held).len() as u64
    };
    report.late = [late("replica: held"), late("state: held")];
    report
}

/// Tasks that wait for each core, on the average of the last minute; `None` where nobody says.
fn load() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/loadavg").ok()?;
    let tasks: f64 = text.split(' ').next()?.parse().ok()?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    Some(tasks / cores as f64)
}

fn host_ms() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    i64::try_from(now.as_millis()).unwrap()
}
