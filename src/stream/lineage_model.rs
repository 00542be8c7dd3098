//! The lineage rules against a model of the service: shards split, rotate and are trimmed,
//! listings miss some, rows are read in part, planners die and come back.

use super::*;
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// A listing older than so many events makes no rows, and a row goes no sooner after the service said that
/// its shard is gone.
const FRESH: u64 = 12;

type Rows = BTreeMap<ShardId, Tracked>;

fn id(n: usize) -> ShardId {
    ShardId(format!("shardId-{n:04}"))
}

fn number(id: &ShardId) -> usize {
    id.0.trim_start_matches("shardId-").parse().unwrap()
}

/// What the service knows of a shard.
#[derive(Clone, Default)]
struct Truth {
    parent: Option<usize>,
    open: bool,
    trimmed: bool,
    /// Read to its end, or trimmed before anybody looked.
    done: bool,
}

/// One worker's planner: all of it is lost in a crash.
#[derive(Default)]
struct Planner {
    listing: Vec<Shard>,
    listings: u64,
    listed_at: u64,
    rows: Rows,
    known_before_listing: BTreeSet<ShardId>,
    gone: BTreeSet<ShardId>,
    lacking: BTreeMap<ShardId, u64>,
    /// When the service said that these are gone.
    forgotten: BTreeMap<ShardId, u64>,
}

struct World {
    /// Events so far.
    now: u64,
    random: StdRng,
    shards: Vec<Truth>,
    rows: Rows,
    /// The rows as they were one event ago.
    rows_before: Rows,
    reading: BTreeSet<ShardId>,
    planners: [Planner; 2],
    misses: f64,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut world = Self {
            now: 0,
            random: StdRng::seed_from_u64(seed),
            shards: vec![
                Truth {
                    open: true,
                    ..Truth::default()
                };
                3
            ],
            rows: Rows::new(),
            rows_before: Rows::new(),
            reading: BTreeSet::new(),
            planners: Default::default(),
            misses: 0.2,
        };
        // A history that nobody saw: some of it is trimmed before the first listing.
        for _ in 0..4 {
            world.turn_over();
        }
        for n in 0..world.shards.len() {
            if !world.shards[n].open && world.parents_are(n, |parent| parent.trimmed) {
                let trimmed = world.random.random_bool(0.5);
                world.shards[n].trimmed = trimmed;
                world.shards[n].done = trimmed;
            }
        }
        world
    }

    fn chance(&mut self, probability: f64) -> bool {
        self.random.random_bool(probability)
    }

    fn parents_are(&self, n: usize, holds: impl Fn(&Truth) -> bool) -> bool {
        self.shards[n]
            .parent
            .is_none_or(|parent| holds(&self.shards[parent]))
    }

    fn children(&self, n: usize) -> Vec<usize> {
        (0..self.shards.len())
            .filter(|child| self.shards[*child].parent == Some(n))
            .collect()
    }

    /// An open shard splits or rotates.
    fn turn_over(&mut self) {
        let open: Vec<usize> = (0..self.shards.len())
            .filter(|n| self.shards[*n].open)
            .collect();
        if open.is_empty() {
            return;
        }
        let parent = open[self.random.random_range(0..open.len())];
        self.shards[parent].open = false;
        for _ in 0..self.random.random_range(1..=2) {
            self.shards.push(Truth {
                parent: Some(parent),
                open: true,
                ..Truth::default()
            });
        }
    }

    /// The service forgets the oldest shards. Those unread are not: that would be a gap.
    fn trim(&mut self) {
        for n in 0..self.shards.len() {
            let old = self.shards[n].done && self.parents_are(n, |parent| parent.trimmed);
            if old && self.chance(0.7) {
                self.shards[n].trimmed = true;
            }
        }
    }

    fn list(&mut self, who: usize) {
        let mut listing = Vec::new();
        for n in 0..self.shards.len() {
            if !self.shards[n].trimmed && !self.chance(self.misses) {
                listing.push(Shard {
                    id: id(n),
                    parent: self.shards[n].parent.map(id),
                });
            }
        }
        let planner = &mut self.planners[who];
        planner.known_before_listing = planner.rows.keys().cloned().collect();
        planner.listing = listing;
        planner.listed_at = self.now;
        planner.listings += 1;
    }

    /// Reads the rows: some as they are, some as they were a moment ago.
    fn read_rows(&mut self, who: usize) {
        let mut rows = Rows::new();
        let keys: BTreeSet<ShardId> = self
            .rows
            .keys()
            .chain(self.rows_before.keys())
            .cloned()
            .collect();
        for key in keys {
            let now = self.chance(0.8);
            let seen = if now { &self.rows } else { &self.rows_before };
            if let Some(row) = seen.get(&key) {
                rows.insert(key, row.clone());
            }
        }
        self.planners[who].rows = rows;
    }

    /// What a worker does with the rows and the listing it has: it creates, confirms, deletes, and
    /// takes one shard.
    fn step(&mut self, who: usize) -> Result<(), TestCaseError> {
        let planner = &mut self.planners[who];
        if planner.listings == 0 {
            return Ok(());
        }
        let plan = plan(&planner.listing, true, &planner.rows, &planner.gone);
        for parent in &plan.missing_parents {
            let child_was_known = planner.rows.iter().any(|(id, row)| {
                row.parent.as_ref() == Some(parent) && planner.known_before_listing.contains(id)
            });
            if child_was_known && self.shards[number(parent)].trimmed {
                planner.gone.insert(parent.clone());
            }
        }
        let deletable = deletable(&planner.listing, &planner.rows);
        planner.lacking.retain(|id, _| deletable.contains(id));
        planner.forgotten.retain(|id, _| deletable.contains(id));
        for id in &deletable {
            let first = *planner
                .lacking
                .entry(id.clone())
                .or_insert(planner.listings);
            // On condition of its counter: the row is still as it was read.
            let unchanged = self.rows.get(id) == planner.rows.get(id);
            if planner.listings > first && self.shards[number(id)].trimmed {
                let since = *planner.forgotten.entry(id.clone()).or_insert(self.now);
                if self.now - since >= FRESH && unchanged {
                    self.rows.remove(id);
                }
            }
        }
        let is_fresh = self.now - planner.listed_at < FRESH;
        for new in plan.create.into_iter().filter(|_| is_fresh) {
            self.rows.entry(new.id).or_insert(Tracked {
                parent: new.parent,
                children: Vec::new(),
                started: false,
                finished: false,
            });
        }
        let startable: Vec<ShardId> = plan.startable.into_iter().collect();
        if !startable.is_empty() {
            let chosen = startable[self.random.random_range(0..startable.len())].clone();
            let unchanged = self.rows.get(&chosen) == self.planners[who].rows.get(&chosen);
            if unchanged && !self.reading.contains(&chosen) {
                self.start(chosen)?;
            }
        }
        Ok(())
    }

    fn start(&mut self, shard: ShardId) -> Result<(), TestCaseError> {
        let n = number(&shard);
        prop_assert!(!self.shards[n].done, "{shard} is read a second time");
        let mut ancestor = self.shards[n].parent;
        while let Some(parent) = ancestor {
            prop_assert!(self.shards[parent].done, "{shard} is read before {parent}");
            ancestor = self.shards[parent].parent;
        }
        self.reading.insert(shard);
        Ok(())
    }

    /// A shard being read moves on, and ends if the service closed it. Its children get rows first,
    /// those that are listed already.
    fn read(&mut self, shard: &ShardId) {
        let n = number(shard);
        if self.shards[n].open {
            if let Some(row) = self.rows.get_mut(shard) {
                row.started = true;
            }
            return;
        }
        let mut children = Vec::new();
        for child in self.children(n) {
            if !self.chance(self.misses) {
                children.push(id(child));
                self.rows.entry(id(child)).or_insert(Tracked {
                    parent: Some(shard.clone()),
                    children: Vec::new(),
                    started: false,
                    finished: false,
                });
            }
        }
        let row = self.rows.get_mut(shard).unwrap();
        row.started = true;
        row.finished = true;
        row.children = children;
        self.shards[n].done = true;
        self.reading.remove(shard);
    }

    fn read_one(&mut self) {
        let reading: Vec<ShardId> = self.reading.iter().cloned().collect();
        if !reading.is_empty() {
            let chosen = self.random.random_range(0..reading.len());
            self.read(&reading[chosen]);
        }
    }

    /// Everything this worker knew is lost, and whatever was read by anybody has to be taken again.
    fn crash(&mut self, who: usize) {
        self.planners[who] = Planner::default();
        self.reading.clear();
    }

    fn event(&mut self, kind: u8) -> Result<(), TestCaseError> {
        let before = self.rows.clone();
        self.now += 1;
        let who = usize::from(kind % 2);
        match kind / 2 % 10 {
            0 => self.turn_over(),
            1 => self.trim(),
            2 => self.list(0),
            3 => self.list(1),
            4 | 5 => self.read_rows(who),
            6 => self.read_one(),
            7 if kind > 230 => self.crash(who),
            _ => self.step(who)?,
        }
        self.rows_before = before;
        Ok(())
    }

    /// Whether everything is read, and only shards that the service still has keep their rows.
    fn is_settled(&self) -> bool {
        (0..self.shards.len()).all(|n| {
            let (shard, row) = (&self.shards[n], self.rows.get(&id(n)));
            if shard.open {
                row.is_some_and(|row| row.started)
            } else {
                shard.done && shard.trimmed && row.is_none()
            }
        })
    }

    /// The service calms down, until everything is settled or clearly never will be.
    fn settle(&mut self) -> Result<(), TestCaseError> {
        self.misses = 0.0;
        for _ in 0..20 * self.shards.len() {
            if self.is_settled() {
                return Ok(());
            }
            self.now += FRESH;
            for who in [0, 1] {
                self.rows_before = self.rows.clone();
                self.read_rows(who);
                self.list(who);
                self.step(who)?;
            }
            for shard in self.reading.clone() {
                self.read(&shard);
            }
            self.trim();
        }
        Ok(())
    }
}

proptest! {
    // A case takes some 50 ms.
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever listings miss, whoever dies, whichever rows are deleted: no shard is read before
    /// its ancestors were read to their end, none is read again after its own, each is read, and
    /// in the end only shards that the service still has keep their rows.
    #[test]
    fn lineage_is_kept_through_trims_crashes_and_deleted_rows(
        seed: u64,
        events in prop::collection::vec(any::<u8>(), 0..300),
    ) {
        let mut world = World::new(seed);
        for kind in events {
            world.event(kind)?;
        }
        world.settle()?;
        for (n, shard) in world.shards.iter().enumerate() {
            prop_assert!(shard.open || shard.done, "{n} was never read");
            let row = world.rows.get(&id(n));
            prop_assert!(!shard.open || row.is_some_and(|row| row.started), "{n} has no row");
            prop_assert!(shard.open || row.is_none(), "the row of {n} stays for ever");
        }
    }
}
