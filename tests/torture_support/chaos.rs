//! What happens while the application writes, drawn from the seed: workers are killed, paused,
//! stopped and started, regions and parts of them go away, shards split and rotate.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use farshore::embedded::gateway::Outage;
use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;

use crate::common::stand::Stand;

use super::faults::{Faults, PAUSES, is_left_out};
use super::fleet::Fleet;
use super::{Pace, Tables, WRITES_MIN};

const TICK: Duration = Duration::from_millis(30);
/// Open shards of a table; beyond this none is split.
const SHARDS_MAX: usize = 6;
/// One outage begins this often (in milliseconds), in random order, so that a seed sees each kind
/// about once.
const OUTAGE_EVERY: u32 = 900;

/// An outage, of a part or of a whole region.
#[derive(Clone, Copy, Debug)]
enum Away {
    Part(usize),
    Region(usize, Outage),
}

pub struct Chaos<'a> {
    pub stand: &'a mut Stand,
    pub tables: &'a Tables,
    pub fleet: &'a mut Fleet,
    pub faults: &'a mut Faults,
    pub regions_away: u64,
    pace: Pace,
    random: StdRng,
    /// When a region comes back.
    away: [Option<Instant>; 2],
    next: Instant,
    next_outage: Instant,
    outages: Vec<Away>,
}

impl<'a> Chaos<'a> {
    pub fn new(
        stand: &'a mut Stand,
        tables: &'a Tables,
        fleet: &'a mut Fleet,
        faults: &'a mut Faults,
        pace: Pace,
        random: StdRng,
    ) -> Self {
        let now = Instant::now();
        Self {
            stand,
            tables,
            fleet,
            faults,
            regions_away: 0,
            pace,
            random,
            away: [None; 2],
            next: now,
            next_outage: now + pace.times(OUTAGE_EVERY),
            outages: Vec::new(),
        }
    }

    /// Rages until its time is up and enough items are `written`.
    pub async fn run(&mut self, written: &AtomicU64) {
        let (start, pace) = (Instant::now(), self.pace);
        let over = |since: Duration| match written.load(Ordering::Relaxed) {
            0..WRITES_MIN => since > pace.chaos_max(),
            _ => since > pace.chaos(),
        };
        while !over(start.elapsed()) {
            self.step().await;
        }
    }

    /// Rages on for that time, worse than before.
    pub async fn run_on(&mut self, time: Duration) {
        self.faults.volley();
        let start = Instant::now();
        while start.elapsed() < time {
            self.step().await;
        }
    }

    async fn step(&mut self) {
        self.fleet.tend();
        self.faults.tend();
        self.bring_back().await;
        if Instant::now() >= self.next {
            self.act();
            self.next = Instant::now() + self.pace.times(self.random.random_range(100..450));
        }
        if Instant::now() >= self.next_outage {
            if self.outages.is_empty() {
                self.outages = self.every_outage();
            }
            if let Some(outage) = self.outages.pop() {
                self.begin(outage).await;
            }
            self.next_outage = Instant::now() + self.pace.times(OUTAGE_EVERY);
        }
        tokio::time::sleep(TICK).await;
    }

    /// Everything comes back.
    pub async fn recover(&mut self) {
        self.faults.end();
        for region in 0..2 {
            if self.away[region].take().is_some() {
                self.stand.gateways[region].come_back().await;
            }
        }
        self.fleet.recover();
    }

    fn every_outage(&mut self) -> Vec<Away> {
        let mut all: Vec<Away> = (0..self.faults.episodes()).map(Away::Part).collect();
        for region in 0..2 {
            all.push(Away::Region(region, Outage::Refused));
            all.push(Away::Region(region, Outage::Silent));
        }
        all.shuffle(&mut self.random);
        all
    }

    async fn begin(&mut self, outage: Away) {
        let length = self.pace.times(self.random.random_range(250..1_400));
        match outage {
            Away::Part(kind) => self.faults.begin(kind, length),
            Away::Region(region, how) if self.away[region].is_none() => {
                self.stand.gateways[region].go_away(how).await;
                self.away[region] = Some(Instant::now() + length);
                self.regions_away += 1;
            }
            Away::Region(..) => {}
        }
    }

    async fn bring_back(&mut self) {
        for region in 0..2 {
            if self.away[region].is_some_and(|until| until <= Instant::now()) {
                self.away[region] = None;
                self.stand.gateways[region].come_back().await;
            }
        }
    }

    fn act(&mut self) {
        match self.random.random_range(0..16) {
            0..2 => self.fleet.kill(&mut self.random),
            2..4 => self.fleet.ask_to_stop(&mut self.random),
            4..7 if !is_left_out(PAUSES) => self.fleet.pause(&mut self.random),
            4..7 => {}
            7..9 => self.fleet.start_another(),
            9..14 => self.reshard(),
            _ => {}
        }
    }

    /// Splits or rotates a shard, or rotates all of a table.
    fn reshard(&mut self) {
        let table = match self.random.random_bool(0.5) {
            true => &self.tables.flat.name,
            false => &self.tables.sorted.name,
        };
        let gateway = &self.stand.gateways[0];
        let shards = gateway.shards(table).into_iter();
        let open: Vec<_> = shards.filter(|shard| shard.open).collect();
        if open.is_empty() {
            return;
        }
        let shard = &open[self.random.random_range(0..open.len())].id;
        // A shard found open a moment ago is open still: nobody else closes any.
        match self.random.random_range(0..5) {
            0 => drop(gateway.rotate_all(table).unwrap()),
            1 | 2 if open.len() < SHARDS_MAX => drop(gateway.split(table, shard).unwrap()),
            _ => drop(gateway.rotate(table, shard).unwrap()),
        }
    }
}
