//! Every fault that the torture test lets loose, with the calls it strikes.

use std::time::{Duration, Instant};

use farshore::embedded::gateway::{Fault, FaultHandle, Gateway, Limit};
use rand::RngExt;
use rand::rngs::StdRng;

use super::{POISON, Pace, Tables};

/// No fault of the service: workers are stopped (SIGSTOP) and continued.
pub const PAUSES: &str = "worker: paused";

const SOURCE: usize = 0;
const TARGET: usize = 1;

const READING: [&str; 3] = ["GetRecords", "GetShardIterator", "DescribeStream"];
const LOOKING_UP: [&str; 3] = ["GetItem", "BatchGetItem", "Query"];
const WRITING: [&str; 4] = ["BatchWriteItem", "PutItem", "UpdateItem", "DeleteItem"];

/// When a fault may strike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum When {
    /// By chance, in seeds that draw it, until the service recovers.
    Often,
    /// In moments that the seed picks: an outage of a part.
    Episode,
    /// From shortly before the last write on, until the service recovers. Before that, newer writes
    /// hide most of what a late one does.
    Volley,
    /// In every seed and to the end: how the service or the data is. It need not strike.
    Always,
}

struct Known {
    name: String,
    region: usize,
    when: When,
    fault: Fault,
    chance: f64,
}

/// A fault that is on in this seed.
pub struct Struck {
    pub name: String,
    /// Whether it has to strike in some of the seeds that have it.
    pub must: bool,
    handle: FaultHandle,
}

impl Struck {
    pub fn hits(&self) -> u64 {
        self.handle.hits()
    }
}

/// The faults of one seed.
#[derive(Default)]
pub struct Faults {
    all: Vec<Struck>,
    episodes: Vec<usize>,
    volley: Vec<usize>,
    open: Vec<(usize, Instant)>,
}

impl Faults {
    /// Draws faults and lets them loose.
    pub fn inject(gateways: &[Gateway], tables: &Tables, pace: Pace, random: &mut StdRng) -> Self {
        let mut faults = Self::default();
        for known in all(tables, pace) {
            let drawn = random.random_bool(0.75);
            let temper = random.random_range(0.5..1.5);
            if is_left_out(&known.name) || (known.when == When::Often && !drawn) {
                continue;
            }
            let fault = known.fault.named(&known.name);
            let fault = match known.when {
                When::Often if known.chance < 1.0 => fault.chance(known.chance * temper),
                When::Often => fault,
                When::Episode => fault.switched_off(),
                When::Volley => fault.chance(known.chance).switched_off(),
                When::Always => fault.chance(known.chance),
            };
            let handle = gateways[known.region].inject(fault);
            match known.when {
                When::Episode => faults.episodes.push(faults.all.len()),
                When::Volley => faults.volley.push(faults.all.len()),
                When::Often | When::Always => {}
            }
            faults.all.push(Struck {
                name: known.name,
                must: known.when != When::Always,
                handle,
            });
        }
        faults
    }

    /// How many kinds of episodes there are.
    pub fn episodes(&self) -> usize {
        self.episodes.len()
    }

    /// Begins an episode of that kind.
    pub fn begin(&mut self, kind: usize, length: Duration) {
        let fault = self.episodes[kind];
        self.all[fault].handle.on();
        self.open.push((fault, Instant::now() + length));
    }

    /// The last and worst: many writes are held back.
    pub fn volley(&self) {
        for fault in &self.volley {
            self.all[*fault].handle.on();
        }
    }

    /// Ends the episodes whose time is over.
    pub fn tend(&mut self) {
        let now = Instant::now();
        let (open, over) = std::mem::take(&mut self.open)
            .into_iter()
            .partition(|(_, until)| *until > now);
        self.open = open;
        for (fault, _) in over {
            self.all[fault].handle.off();
        }
    }

    /// The service recovers.
    pub fn end(&mut self) {
        for struck in self.all.iter().filter(|struck| struck.must) {
            struck.handle.off();
        }
        self.open.clear();
    }

    pub fn all(&self) -> &[Struck] {
        &self.all
    }
}

/// Whether a fault is left out to find out which one is to blame:
/// `FARSHORE_TORTURE_WITHOUT="replica: held;worker: paused"`.
pub fn is_left_out(name: &str) -> bool {
    let without = std::env::var("FARSHORE_TORTURE_WITHOUT").unwrap_or_default();
    without.split(';').any(|part| part.trim() == name)
}

/// All of them. Chances are small where one call has many dangers.
fn all(tables: &Tables, pace: Pace) -> Vec<Known> {
    let mut known = source_faults();
    known.extend(stream_faults());
    known.extend(replica_faults(tables, pace));
    known.extend(state_faults(tables, pace));
    known
}

fn on(fault: Fault, operations: &[&str]) -> Fault {
    operations.iter().fold(fault, |fault, name| fault.on(name))
}

const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn known(region: usize, when: When, name: &str, fault: Fault, chance: f64) -> Known {
    Known {
        name: name.to_owned(),
        region,
        when,
        fault,
        chance,
    }
}

/// What strikes any call that reads: the streams, and the items that a repair looks up.
fn source_faults() -> Vec<Known> {
    let read = |name: &str, fault: Fault, chance: f64| {
        let fault = on(on(fault, &READING), &LOOKING_UP);
        known(SOURCE, When::Often, name, fault, chance)
    };
    let throttled = Fault::throttling_exception(Limit::Account);
    let table_throttled = Fault::throttle(Limit::Provisioned);
    vec![
        read("source: throttled", throttled, 0.04),
        read("source: throttled by the table", table_throttled, 0.02),
        read("source: 500", Fault::error_before(), 0.03),
        read("source: 503", Fault::unavailable(), 0.02),
        read("source: cut", Fault::cut(), 0.02),
        read("source: cut within", Fault::cut_within(), 0.02),
        read("source: delayed", Fault::delay(ms(150)), 0.03),
        read("source: slow", Fault::slow_answer(ms(200)), 0.03),
    ]
}

/// What only streams do.
fn stream_faults() -> Vec<Known> {
    let often =
        |name: &str, fault: Fault, chance: f64| known(SOURCE, When::Often, name, fault, chance);
    let always =
        |name: &str, fault: Fault, chance: f64| known(SOURCE, When::Always, name, fault, chance);
    let denied = on(Fault::access_denied(), &READING);
    let unread = Fault::unprocessed(0.5).on("BatchGetItem");
    vec![
        often("stream: empty page", Fault::empty_page(), 0.2),
        often("stream: short page", Fault::short_page(), 0.2),
        often("stream: empty last page", Fault::empty_last_page(), 0.5),
        often("stream: expired iterator", Fault::expired_iterator(), 0.02),
        often("stream: late children", Fault::late_children(ms(400)), 0.5),
        often("stream: open parents", Fault::open_parents(ms(500)), 0.5),
        often("stream: missing shard", Fault::missing_shard(), 0.6),
        often("stream: empty children", Fault::empty_children(2), 1.0),
        known(SOURCE, When::Episode, "stream: denied", denied, 1.0),
        // AWS allows ten a second.
        always("stream: too many listings", Fault::call_rate(10.0), 1.0),
        always("source: keys unread", unread, 0.2),
    ]
}

/// What strikes writes of the replicas' items.
fn replica_faults(tables: &Tables, pace: Pace) -> Vec<Known> {
    let onto = |when: When, name: &str, fault: Fault, chance: f64| {
        let fault = on(fault, &WRITING);
        let fault = fault.table(&tables.flat.name).table(&tables.sorted.name);
        known(TARGET, when, name, fault, chance)
    };
    let often = |name: &str, fault: Fault, chance: f64| onto(When::Often, name, fault, chance);
    let episode = |name: &str, fault: Fault| onto(When::Episode, name, fault, 1.0);
    let always = |name: &str, fault: Fault| onto(When::Always, name, fault, 1.0);
    let provisioned = Fault::throttle(Limit::Provisioned);
    let maximum = Fault::throttle(Limit::MaxOnDemand);
    let account = Fault::throttling_exception(Limit::Account);
    let key_range = Fault::throttle(Limit::KeyRange).key_range(0.0..0.3);
    let new_code = Fault::code(400, "SomethingNewException", "Nobody has met this one yet");
    let held_hung_up = Fault::hold(pace.times(2_000)).hanging_up();
    let last = Fault::hold(pace.times(2_500)).hanging_up();
    let refused = "This replica refuses the item";
    let poison = Fault::code(400, "ValidationException", refused).key(POISON);
    vec![
        often("replica: throttled by the table", provisioned, 0.03),
        often("replica: throttled by its maximum", maximum, 0.03),
        often("replica: throttled by the account", account, 0.03),
        often("replica: throttled key range", key_range, 0.08),
        often("replica: unprocessed", Fault::unprocessed(0.4), 0.1),
        often("replica: 500 before", Fault::error_before(), 0.03),
        often("replica: 500 after", Fault::error_after(), 0.03),
        often("replica: 503", Fault::unavailable(), 0.02),
        often("replica: a new code", new_code, 0.02),
        often("replica: cut", Fault::cut(), 0.02),
        often("replica: cut after", Fault::cut_after(), 0.02),
        often("replica: cut within", Fault::cut_within(), 0.02),
        often("replica: delayed", Fault::delay(ms(120)), 0.03),
        often("replica: slow", Fault::slow_answer(ms(150)), 0.03),
        often("replica: held", Fault::hold(pace.times(900)), 0.03),
        often("replica: held long", Fault::hold(pace.times(2_900)), 0.03),
        often("replica: held, hung up", held_hung_up, 0.03),
        onto(When::Volley, "replica: held at the end", last, 0.4),
        episode("replica: denied", Fault::access_denied()),
        episode("replica: away", Fault::unavailable()),
        // Signed requests die: what is held or delayed for longer has no effect any more.
        always(
            "replica: signature too old",
            Fault::stale_signature(pace.signature()),
        ),
        // The data are so: the replica never takes these items.
        always("replica: poison", poison),
    ]
}

/// What strikes the state table.
fn state_faults(tables: &Tables, pace: Pace) -> Vec<Known> {
    let any = |when: When, name: &str, fault: Fault, chance: f64| {
        known(TARGET, when, name, fault.table(&tables.state), chance)
    };
    let often = |name: &str, fault: Fault, chance: f64| any(When::Often, name, fault, chance);
    let write = |name: &str, fault: Fault, chance: f64| often(name, on(fault, &WRITING), chance);
    let episode = |name: &str, fault: Fault| any(When::Episode, name, fault, 1.0);
    let throttled = Fault::throttle(Limit::Account);
    let held_hung_up = Fault::hold(pace.times(2_000)).hanging_up();
    vec![
        write("state: throttled", throttled, 0.02),
        write("state: 500 after", Fault::error_after(), 0.02),
        // A late effect is harmless here: every write has a condition.
        write("state: held", Fault::hold(pace.times(900)), 0.01),
        write("state: held long", Fault::hold(pace.times(2_900)), 0.01),
        write("state: held, hung up", held_hung_up, 0.01),
        often("state: 500 before", Fault::error_before(), 0.02),
        often("state: 503", Fault::unavailable(), 0.02),
        often("state: cut", Fault::cut(), 0.02),
        often("state: cut after", Fault::cut_after(), 0.02),
        often("state: cut within", Fault::cut_within(), 0.02),
        often("state: delayed", Fault::delay(ms(80)), 0.03),
        often("state: slow", Fault::slow_answer(ms(100)), 0.03),
        episode("state: away", Fault::unavailable()),
        episode("state: denied", Fault::access_denied()),
    ]
}
