//! Doubts: stored before the checkpoint passes them, claimed and repaired when their time has come.
//! Mirrors `src/run/doubts.rs`, and `Repairer` of `src/repair.rs`.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::future::poll_fn;
use std::rc::Rc;

use futures::future::{join, join_all};

use farshore::lease::doubts::{End, Pending, Range, grow, may_claim, until_ms};
use farshore::lease::row::{DoubtRow, ShardRow};
use farshore::lease::rules::take_name;
use farshore::repair::{KeyRepair, Step};
use farshore::stream::ShardId;
use farshore::stream::reader::Position;
use farshore::stream::sequence::SequenceNumber;

use super::lease::Bound;
use super::replica::{self, Answer, Put};
use super::sim::{Alarm, Ms, note, ready, sleep};
use super::source::{self, Key, Page, Value, number_of, passed, sequence_of};
use super::state::{self, Change, Unknown, Why};
use super::worker::{Snapshot, Worker};
use super::world::{
    DURATION, DURATION_DURATION, LATE_EFFECT, LATE_EFFECT_DURATION, SKEW, World, stumble,
};

const LOOK_EVERY: Ms = 5_000;
/// Doubts repaired at once.
const REPAIRS_AT_ONCE: usize = 3;
/// Small, so that one doubt is repaired in several turns.
const KEYS_MAX: usize = 4;
const BATCH_KEYS: usize = 3;
const ROUNDS_MAX: usize = 20;
const EMPTY_PAGES_PROVE: usize = 5;

/// Mirrors `run::doubts::ShardDoubts`.
#[derive(Default)]
pub struct ShardDoubts {
    pending: Pending,
    last: Option<(DoubtRow, Ms)>,
}

impl ShardDoubts {
    pub fn add(&mut self, durable: &Position, last: &SequenceNumber, until_ms: i64) {
        self.pending.add(durable, last, until_ms);
    }

    pub fn store(
        &self,
        worker: &Rc<Worker>,
        shard: &ShardId,
    ) -> impl Future<Output = Result<Option<(Range, DoubtRow)>, Unknown>> + use<> {
        let (worker, shard) = (Rc::clone(worker), shard.clone());
        let range = self.pending.range();
        let now = worker.world.sim.now();
        let last = self.last.as_ref();
        let last = last.filter(|(_, at)| now - at < LATE_EFFECT / 2);
        let last = last.map(|(row, _)| row.clone());
        async move {
            match range {
                None => Ok(None),
                Some(range) => {
                    let row = store_range(&worker, &shard, &range, last).await?;
                    Ok(Some((range, row)))
                }
            }
        }
    }

    pub fn stored(&mut self, world: &World, stored: Option<(Range, DoubtRow)>) {
        if let Some((range, row)) = stored {
            self.pending.stored(&range);
            let grown = self.last.take();
            let grown = grown.filter(|(last, _)| last.lease_key == row.lease_key);
            let at = grown.map_or_else(|| world.sim.now(), |(_, at)| at);
            self.last = Some((row, at));
        }
    }
}

/// Mirrors `run::doubts::store_range`.
pub async fn store_range(
    worker: &Rc<Worker>,
    shard: &ShardId,
    range: &Range,
    last: Option<DoubtRow>,
) -> Result<DoubtRow, Unknown> {
    let world = &worker.world;
    if let Some(mut row) = last {
        let known = row.lease_counter;
        if grow(&mut row, range) {
            let change = Change::ReplaceDoubt(row.clone(), known, Why::Grow);
            if state::write(world, worker.id, change).await? {
                return Ok(row);
            }
        }
    }
    let at = String::new();
    let mut row = DoubtRow::new(
        1,
        "t",
        source::ARN,
        shard,
        range.cause,
        &range.from,
        range.until_ms,
        at,
    );
    // Keys that a seed repeats.
    row.lease_key = format!("doubt#{}", world.next_doubt());
    match &range.to {
        End::Record(to) => row.to = Some(to.as_str().to_owned()),
        End::Time(ms) => row.to_time = Some(*ms),
    }
    state::write(world, worker.id, Change::CreateDoubt(row.clone())).await?;
    worker.rescan();
    Ok(row)
}

/// Mirrors `run::doubts::Claim`.
struct Claim {
    worker: Rc<Worker>,
    row: RefCell<DoubtRow>,
    valid_until: Cell<Ms>,
    renewing: Cell<bool>,
}

impl Bound for Claim {
    fn remaining(&self, now: Ms) -> Ms {
        (self.valid_until.get() - now).max(0)
    }

    /// Another worker repairs the same doubt, by its own belief; or this write may take effect after
    /// the doubt may be claimed again.
    fn objection(&self, now: Ms) -> Option<String> {
        let world = &self.worker.world;
        let key = &self.row.borrow().lease_key;
        let mut claims = world.claims.borrow_mut();
        claims.retain(|(_, until, _)| *until > now);
        let rival = claims
            .iter()
            .find(|(other, _, worker)| other == key && *worker != self.worker.id);
        if let Some((_, _, worker)) = rival {
            return Some(format!("beside p{worker}, which repairs the same doubt"));
        }
        let state = world.state.borrow();
        let until = state.doubt(key).map(|row| row.until);
        (until.is_none_or(|until| until + 2 * SKEW < now + LATE_EFFECT))
            .then(|| format!("under a claim that ends too early, at {until:?}"))
    }
}

/// Why a repair did not come to its end (mirrors `repair::Unfinished`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unfinished {
    Unanswered,
    Failed,
    Unsettled,
    Stopped,
}

impl From<Unknown> for Unfinished {
    fn from(_: Unknown) -> Self {
        Unfinished::Failed
    }
}

impl Claim {
    async fn take(worker: &Rc<Worker>, row: &DoubtRow) -> Result<Option<Rc<Self>>, Unknown> {
        let nonce = worker.world.sim.below(u64::from(u32::MAX)) as u32;
        let claim = Rc::new(Self {
            worker: Rc::clone(worker),
            row: RefCell::new(DoubtRow {
                lease_owner: Some(take_name(&worker.name, nonce)),
                ..row.clone()
            }),
            valid_until: Cell::new(0),
            renewing: Cell::new(false),
        });
        Ok(claim.renew(None).await?.then_some(claim))
    }

    /// One at a time.
    async fn renew(&self, done: Option<&Position>) -> Result<bool, Unknown> {
        let sim = &self.worker.world.sim;
        poll_fn(|_| ready(!self.renewing.get())).await;
        self.renewing.set(true);
        let renewed = self.renew_now(done).await;
        self.renewing.set(false);
        sim.wake(sim.current());
        renewed
    }

    async fn renew_now(&self, done: Option<&Position>) -> Result<bool, Unknown> {
        let worker = &self.worker;
        let world = &worker.world;
        let mut row = self.row.borrow().clone();
        let known = row.lease_counter;
        row.lease_counter += 1;
        if let Some(done) = done {
            row.set_position(done);
        }
        let sent = world.sim.now();
        stumble(world, worker.id).await;
        let end = until_ms(world.sim.wall_ms(worker.id), LATE_EFFECT_DURATION);
        row.until = row.until.max(until_ms(end, DURATION_DURATION));
        let change = Change::ReplaceDoubt(row.clone(), known, Why::Claim);
        if !state::write(world, worker.id, change).await? {
            self.valid_until.set(0);
            world.drop_claim(&row.lease_key, worker.id);
            return Ok(false);
        }
        self.valid_until.set(sent + DURATION);
        let claim = (row.lease_key.clone(), sent + DURATION, worker.id);
        world.drop_claim(&row.lease_key, worker.id);
        world.claims.borrow_mut().push(claim);
        *self.row.borrow_mut() = row;
        Ok(true)
    }

    /// Every write of it was answered completely, so the next one need not wait.
    async fn give_back(&self) {
        let worker = &self.worker;
        let world = &worker.world;
        let mut row = self.row.borrow().clone();
        let known = row.lease_counter;
        row.lease_counter += 1;
        row.lease_owner = None;
        row.until = world.sim.wall_ms(worker.id);
        let key = row.lease_key.clone();
        world.drop_claim(&key, worker.id);
        let change = Change::ReplaceDoubt(row, known, Why::Claim);
        let _ = state::write(world, worker.id, change).await;
        worker.rescan();
    }

    /// Renews the claim as long as `repair` takes.
    async fn keep<T>(&self, repair: impl Future<Output = T>) -> T {
        let sim = &self.worker.world.sim;
        let done = Cell::new(false);
        let renewals = async {
            loop {
                let at = sim.now() + DURATION / 3;
                let mut alarm = Alarm::default();
                poll_fn(|_| ready(done.get() || alarm.is_due(sim, at))).await;
                if done.get() || matches!(self.renew(None).await, Ok(false)) {
                    return;
                }
            }
        };
        let repair = async {
            let repaired = repair.await;
            done.set(true);
            repaired
        };
        join(repair, renewals).await.0
    }

    fn is_over(&self) -> bool {
        self.remaining(self.worker.world.sim.now()) == 0
    }
}

/// Mirrors `run::doubts::repair_doubts`.
pub async fn repair_doubts(worker: Rc<Worker>) {
    let sim = &worker.world.sim;
    while !worker.stop.is_set() {
        let snapshot = worker.snapshot();
        let due = due(&worker, &snapshot);
        let repairs = due.iter().map(|doubt| repair_doubt(&worker, doubt));
        let done = join_all(repairs).await;
        let mut pause = match done.is_empty() {
            true => LOOK_EVERY,
            false => 0,
        };
        if done.iter().any(Result::is_err) {
            pause = sim.between(100, 2_000);
        }
        if pause == 0 {
            worker.rescan();
        }
        let until = sim.now() + pause;
        let mut alarm = Alarm::default();
        poll_fn(|_| {
            ready(
                worker.stop.look(sim)
                    || worker.has_changed(&snapshot)
                    || (pause != 0 && alarm.is_due(sim, until)),
            )
        })
        .await;
    }
}

/// Doubts that this worker may repair, a few of them, in any order.
fn due(worker: &Worker, snapshot: &Snapshot) -> Vec<Rc<DoubtRow>> {
    let sim = &worker.world.sim;
    let now = sim.wall_ms(worker.id);
    if snapshot.doubts.iter().all(|doubt| doubt.until > now) {
        return Vec::new();
    }
    let shards: Vec<ShardRow> = snapshot.shards.iter().map(|row| (**row).clone()).collect();
    let patience = DURATION_DURATION * 2;
    let mut due = snapshot.doubts.clone();
    due.retain(|doubt| may_claim(doubt, &shards, &worker.name, now, patience));
    while due.len() > REPAIRS_AT_ONCE {
        due.swap_remove(sim.below(due.len() as u64) as usize);
    }
    due
}

/// Mirrors `run::doubts::repair_doubt`.
async fn repair_doubt(worker: &Rc<Worker>, doubt: &DoubtRow) -> Result<(), Unfinished> {
    let Some(claim) = Claim::take(worker, doubt).await? else {
        return Ok(());
    };
    let repaired = claim.keep(repair_claimed(&claim)).await;
    note!(
        worker.world,
        "p{}: repair of {}: {repaired:?}",
        worker.id,
        doubt.lease_key
    );
    match &repaired {
        Ok(()) | Err(Unfinished::Unanswered) => {}
        Err(_) => claim.give_back().await,
    }
    repaired
}

async fn repair_claimed(claim: &Rc<Claim>) -> Result<(), Unfinished> {
    let mut repair = DoubtRepair {
        claim: Rc::clone(claim),
        world: Rc::clone(&claim.worker.world),
        keys: BTreeSet::new(),
    };
    repair.run().await?;
    let row = claim.row.borrow().clone();
    let worker = &claim.worker;
    state::write(&worker.world, worker.id, Change::DeleteDoubt(row)).await?;
    Ok(())
}

/// Mirrors `run::doubts::DoubtRepair`.
struct DoubtRepair {
    claim: Rc<Claim>,
    world: Rc<World>,
    keys: BTreeSet<Key>,
}

impl DoubtRepair {
    async fn run(&mut self) -> Result<(), Unfinished> {
        let world = Rc::clone(&self.world);
        let sim = &world.sim;
        let row = self.claim.row.borrow().clone();
        let Some(position) = row.position() else {
            return Err(Unfinished::Failed);
        };
        let shard = world.source.borrow().number(&row.shard());
        let mut read = passed(&position);
        let mut empty = 0;
        loop {
            self.read_ok()?;
            sleep(sim, sim.between(2, 30)).await;
            let page = world.source.borrow().read(shard, read, 3);
            let Some(page) = page else {
                // Mirrors `DoubtRepair::lost`: a gap is stored, and the doubt dropped. Here the shard
                // is kept while a doubt about it has a row, so that one that came late is left:
                // one that was stored twice.
                return Ok(());
            };
            let (last, end) = (page.records.last().copied(), page.end);
            empty = match last {
                None => empty + 1,
                Some(_) => 0,
            };
            let over = self.take_in(&page, &row);
            read = last.map_or(read, |record| record.number);
            if over || end || (row.to_time.is_some() && empty >= EMPTY_PAGES_PROVE) {
                return self.repair_keys(None).await;
            }
            if self.keys.len() >= KEYS_MAX {
                let done = Position::After(sequence_of(read));
                self.repair_keys(Some(&done)).await?;
            }
        }
    }

    /// Mirrors `DoubtRepair::take_in`: returns whether the range is over.
    fn take_in(&mut self, page: &Page, row: &DoubtRow) -> bool {
        let last = row.to.as_deref().and_then(SequenceNumber::parse);
        let last = last.as_ref().map(number_of);
        for record in &page.records {
            if last.is_some_and(|last| record.number > last)
                || row.to_time.is_some_and(|to| record.created_ms > to)
            {
                return true;
            }
            self.keys.insert(record.key);
            if last == Some(record.number) {
                return true;
            }
        }
        false
    }

    async fn repair_keys(&mut self, done: Option<&Position>) -> Result<(), Unfinished> {
        let keys: Vec<Key> = std::mem::take(&mut self.keys).into_iter().collect();
        for chunk in keys.chunks(BATCH_KEYS) {
            self.repair_batch(chunk).await?;
        }
        if done.is_some() && !self.claim.renew(done).await? {
            return Err(Unfinished::Stopped);
        }
        Ok(())
    }

    /// Mirrors `Repairer::repair_batch`.
    async fn repair_batch(&self, keys: &[Key]) -> Result<(), Unfinished> {
        let world = &self.world;
        let mut open: Vec<(Key, KeyRepair<Value>)> = keys
            .iter()
            .map(|key| (*key, KeyRepair::default()))
            .collect();
        for round in 0..ROUNDS_MAX {
            if round > 0 {
                sleep(&world.sim, 50 * round as Ms).await;
            }
            self.read_ok()?;
            for (key, repair) in &mut open {
                repair.source(source::item(world, *key).await);
            }
            open.retain(|(_, repair)| repair.step() != Step::Clean);
            self.read_ok()?;
            for (key, repair) in &mut open {
                repair.replica(&replica::item(world, *key).await);
            }
            open.retain(|(_, repair)| repair.step() != Step::Clean);
            self.write(&mut open).await?;
            if open.is_empty() {
                return Ok(());
            }
        }
        Err(Unfinished::Unsettled)
    }

    /// Mirrors the look at stop and bound before each read and write of `Repairer`.
    fn read_ok(&self) -> Result<(), Unfinished> {
        match self.claim.is_over() || self.claim.worker.stop.is_set() {
            true => Err(Unfinished::Stopped),
            false => Ok(()),
        }
    }

    /// Mirrors `Repairer::write`.
    async fn write(&self, open: &mut [(Key, KeyRepair<Value>)]) -> Result<(), Unfinished> {
        let world = &self.world;
        let worker = &self.claim.worker;
        let mut left: Vec<usize> = (0..open.len()).collect();
        let bound: Rc<dyn Bound> = self.claim.clone();
        while !left.is_empty() {
            self.read_ok()?;
            let put = |at: &usize| match open[*at].1.step() {
                Step::Write(value) => Some(Put {
                    key: open[*at].0,
                    value,
                    number: 0,
                }),
                _ => None,
            };
            let puts: Vec<Put> = left.iter().filter_map(put).collect();
            let (answer, unanswered) =
                replica::send(world, worker.id, &bound, &worker.stop, &puts).await;
            if unanswered {
                return Err(Unfinished::Unanswered);
            }
            if let Answer::Done { unprocessed } = answer {
                let mut at = 0;
                left.retain(|slot| {
                    at += 1;
                    let again = unprocessed.contains(&(at - 1));
                    if !again {
                        world.count(|counts| counts.repaired_keys += 1);
                        open[*slot].1.written();
                    }
                    again
                });
            }
            if !left.is_empty() {
                sleep(&world.sim, world.sim.between(25, 500)).await;
            }
        }
        Ok(())
    }
}
