//! One shard from its checkpoint to its end. Mirrors `src/run/shard.rs`; the reader of
//! `src/run/source.rs` is a step of the same loop.

use std::collections::BTreeSet;
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};

use aws_sdk_dynamodb::types::AttributeValue;
use farshore::apply::coalesce::{Op, Window};
use farshore::dynamo::image::Image;
use farshore::dynamo::item::ItemKey;
use farshore::lease::doubts::{Range, until_ms};
use farshore::lease::row::{DoubtRow, ShardRow};
use farshore::stream::change::{Change, Event};
use farshore::stream::reader::Position;
use farshore::stream::sequence::SequenceNumber;
use farshore::stream::{Shard, ShardId};

use super::doubts::{ShardDoubts, store_range};
use super::lease::{Bound, Lease};
use super::replica::{self, Answer, Put};
use super::sim::{Alarm, Later, Ms, Signal, sleep, unless};
use super::source::{self, Page, Record, ShardNo, number_of, passed, sequence_of};
use super::state::{self, Unknown};
use super::worker::Worker;
use super::world::{LATE_EFFECT_DURATION, World};

/// Writes of one shard at once; small batches, so that there are several.
const CONCURRENCY: usize = 3;
const BATCH_OPS: i64 = 3;
const PAGE_RECORDS: i64 = 4;
const READ_AHEAD: usize = 8 * 1024;
/// Mirrors `run::discovery::PATIENCE`.
const PATIENCE: Ms = 5_000;

/// How a shard's consumption ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    Finished,
    Released,
    Kept,
    Lost,
}

struct Sent {
    ops: Vec<Op>,
    answer: Answer,
    unanswered: bool,
}

struct Checkpointed {
    sequence: SequenceNumber,
    doubt: Option<(Range, DoubtRow)>,
    stored: bool,
}

/// What the main loop wakes up for, in order of priority.
enum Next {
    Lost,
    Checkpointed(Box<Checkpointed>),
    CheckpointDue,
    Sent(Sent),
    Stop,
    Resume,
    Read,
}

struct Consumer {
    worker: Rc<Worker>,
    world: Rc<World>,
    lease: Rc<Lease>,
    /// Asks this shard to drain: with its worker, or for another.
    drain: Rc<Signal>,
    log: ShardNo,
    start: Position,
    doubts: ShardDoubts,
    window: Window,
    writes: Vec<Later<Sent>>,
    checkpointing: Option<Later<Checkpointed>>,
    stored: Option<SequenceNumber>,
    /// The number of the last record read.
    read: u64,
    not_before: Ms,
    next_checkpoint: Ms,
    next_read: Ms,
    alarms: [Alarm; 3],
}

/// Mirrors `run::shard::consume`.
pub async fn consume(
    worker: Rc<Worker>,
    lease: Rc<Lease>,
    position: Position,
    inherited: Option<Range>,
    drain: Rc<Signal>,
) -> Ended {
    let world = Rc::clone(&worker.world);
    if let Some(range) = inherited {
        // What the owner before left in doubt is stored before anything is read.
        let mut storing: Later<()> = Box::pin(store_inherited(
            Rc::clone(&worker),
            lease.shard.clone(),
            range,
        ));
        let ended = poll_fn(|context| {
            if lease.lost.look(&world.sim) {
                return Poll::Ready(Some(Ended::Lost));
            }
            if storing.as_mut().poll(context).is_ready() {
                return Poll::Ready(None);
            }
            match drain.look(&world.sim) {
                true => Poll::Ready(Some(Ended::Kept)),
                false => Poll::Pending,
            }
        })
        .await;
        if let Some(ended) = ended {
            return ended;
        }
    }
    let log = world.source.borrow().number(&lease.shard);
    let now = world.sim.now();
    let mut consumer = Consumer {
        log,
        read: passed(&position),
        start: position,
        doubts: ShardDoubts::default(),
        window: Window::new(world.coalesce),
        writes: Vec::new(),
        checkpointing: None,
        stored: None,
        not_before: now,
        next_checkpoint: now,
        next_read: now,
        alarms: Default::default(),
        worker,
        world,
        lease,
        drain,
    };
    consumer.run().await
}

/// Mirrors `run::doubts::store_inherited`: however long it takes.
async fn store_inherited(worker: Rc<Worker>, shard: ShardId, range: Range) {
    let sim = &worker.world.sim;
    while store_range(&worker, &shard, &range, None).await.is_err() {
        sleep(sim, sim.between(100, 1_000)).await;
    }
}

impl Consumer {
    async fn run(&mut self) -> Ended {
        let mut at_end = false;
        loop {
            let draining = self.drain.is_set();
            if !draining {
                self.send();
            }
            let answered = self.writes.is_empty() && self.checkpointing.is_none();
            if answered && at_end && self.window.is_empty() {
                return self.finish().await;
            }
            if answered && draining {
                return self.release().await;
            }
            let next = poll_fn(|context| self.select(context, draining, at_end)).await;
            match next {
                Next::Lost => return Ended::Lost,
                Next::Checkpointed(done) => self.on_checkpointed(*done),
                Next::CheckpointDue => {
                    self.next_checkpoint = self.world.sim.now() + self.world.checkpoint_every;
                    self.checkpoint();
                }
                Next::Sent(sent) => self.on_sent(sent),
                Next::Stop | Next::Resume => {}
                Next::Read => at_end = self.read_page(),
            }
        }
    }

    /// Mirrors the `select!` of `Consumer::run`.
    fn select(&mut self, context: &mut Context, draining: bool, at_end: bool) -> Poll<Next> {
        let sim = &self.world.sim;
        if self.lease.lost.look(sim) {
            return Poll::Ready(Next::Lost);
        }
        if let Some(checkpointing) = &mut self.checkpointing
            && let Poll::Ready(done) = checkpointing.as_mut().poll(context)
        {
            return Poll::Ready(Next::Checkpointed(Box::new(done)));
        }
        if self.alarms[0].is_due(sim, self.next_checkpoint) {
            return Poll::Ready(Next::CheckpointDue);
        }
        for at in 0..self.writes.len() {
            if let Poll::Ready(sent) = self.writes[at].as_mut().poll(context) {
                drop(self.writes.swap_remove(at));
                return Poll::Ready(Next::Sent(sent));
            }
        }
        if !draining && self.drain.look(sim) {
            return Poll::Ready(Next::Stop);
        }
        let waits = self.window.has_ready() && self.not_before > sim.now();
        if waits && self.alarms[1].is_due(sim, self.not_before) {
            return Poll::Ready(Next::Resume);
        }
        let reads = !draining && !at_end && self.window.bytes() < READ_AHEAD;
        if reads && self.alarms[2].is_due(sim, self.next_read) {
            return Poll::Ready(Next::Read);
        }
        Poll::Pending
    }

    /// Reads a page and takes it in (mirrors `read_shard` and `Consumer::admit`). Returns whether
    /// the shard has ended.
    fn read_page(&mut self) -> bool {
        let sim = &self.world.sim;
        let most = sim.between(1, PAGE_RECORDS) as usize;
        let empty = self.world.fate(100);
        let page = match empty {
            // Empty pages are normal in the middle of a shard.
            true => None,
            false => self.world.source.borrow().read(self.log, self.read, most),
        };
        let Page { records, end } = page.unwrap_or(Page {
            records: Vec::new(),
            end: false,
        });
        let pause = match records.is_empty() {
            true => sim.between(300, 2_000),
            false => sim.between(10, 300),
        };
        self.next_read = sim.now() + pause;
        for record in records {
            self.read = record.number;
            self.window.push(change_of(&record));
        }
        end
    }

    fn send(&mut self) {
        let sim = &self.world.sim;
        if sim.now() < self.not_before {
            return;
        }
        while self.writes.len() < CONCURRENCY && self.window.has_ready() {
            let ops = self
                .window
                .take(sim.between(1, BATCH_OPS) as usize, usize::MAX);
            if ops.is_empty() {
                break;
            }
            let (worker, lease) = (Rc::clone(&self.worker), Rc::clone(&self.lease));
            let drain = Rc::clone(&self.drain);
            self.writes.push(Box::pin(write(worker, lease, drain, ops)));
        }
    }

    fn on_sent(&mut self, sent: Sent) {
        let sim = &self.world.sim;
        // Before anything of it counts as durable: the range begins there.
        let last = sent.ops.iter().map(|op| &op.change.sequence).max();
        if let (true, Some(last)) = (sent.unanswered, last) {
            let from = match self.window.durable() {
                Some(durable) => Position::After(durable.sequence.clone()),
                None => self.start.clone(),
            };
            let until = until_ms(sim.wall_ms(self.worker.id), LATE_EFFECT_DURATION);
            self.doubts.add(&from, last, until);
        }
        let mut failed = true;
        if let Answer::Done { unprocessed } = &sent.answer {
            failed = !unprocessed.is_empty();
        }
        for (at, op) in sent.ops.iter().enumerate() {
            match &sent.answer {
                Answer::Done { unprocessed } if !unprocessed.contains(&at) => {
                    self.window.applied(op, |_| {});
                }
                _ => self.window.returned(op),
            }
        }
        if failed && sim.now() >= self.not_before {
            self.not_before = sim.now() + sim.between(25, 1_000);
        }
    }

    fn progress(&self) -> Option<SequenceNumber> {
        let durable = self.window.durable()?;
        (self.stored.as_ref() != Some(&durable.sequence)).then(|| durable.sequence.clone())
    }

    /// What is in doubt first, then the checkpoint that passes it.
    fn checkpoint(&mut self) {
        if self.checkpointing.is_some() {
            return;
        }
        let Some(sequence) = self.progress() else {
            return;
        };
        let lease = Rc::clone(&self.lease);
        let doubt = self.doubts.store(&self.worker, &lease.shard);
        self.checkpointing = Some(Box::pin(async move {
            let Ok(doubt) = doubt.await else {
                return Checkpointed {
                    sequence,
                    doubt: None,
                    stored: false,
                };
            };
            let stored = lease.checkpoint(&sequence).await.is_ok();
            Checkpointed {
                sequence,
                doubt,
                stored,
            }
        }));
    }

    fn on_checkpointed(&mut self, done: Checkpointed) {
        self.checkpointing = None;
        self.doubts.stored(&self.world, done.doubt);
        if done.stored {
            self.stored = Some(done.sequence);
        }
    }

    /// Mirrors `Consumer::release`.
    async fn release(&mut self) -> Ended {
        loop {
            let result = match self.store_progress().await {
                Ok(()) => self.lease.release().await,
                Err(unknown) => Err(unknown),
            };
            match result {
                Ok(()) => return Ended::Released,
                Err(Unknown) if self.lease.lost.is_set() => return Ended::Lost,
                Err(Unknown) => self.pause().await,
            }
        }
    }

    async fn store_progress(&mut self) -> Result<(), Unknown> {
        self.store_doubts().await?;
        if let Some(sequence) = self.progress() {
            self.lease.checkpoint(&sequence).await?;
            self.stored = Some(sequence);
        }
        Ok(())
    }

    async fn store_doubts(&mut self) -> Result<(), Unknown> {
        let doubt = self.doubts.store(&self.worker, &self.lease.shard).await?;
        self.doubts.stored(&self.world, doubt);
        Ok(())
    }

    async fn pause(&self) {
        let sim = &self.world.sim;
        sleep(sim, sim.between(25, 2_000)).await;
    }

    /// Mirrors `Consumer::finish`: rows of the children, doubts, SHARD_END.
    async fn finish(&mut self) -> Ended {
        let (world, lease) = (Rc::clone(&self.world), Rc::clone(&self.lease));
        loop {
            let row = lease.row().await;
            let mut children: Later<_> = Box::pin(children_of(Rc::clone(&self.worker), row));
            let children = poll_fn(|context| {
                if lease.lost.look(&world.sim) {
                    return Poll::Ready(Err(true));
                }
                if let Poll::Ready(children) = children.as_mut().poll(context) {
                    return Poll::Ready(Ok(children));
                }
                match self.drain.look(&world.sim) {
                    true => Poll::Ready(Err(false)),
                    false => Poll::Pending,
                }
            })
            .await;
            let children = match children {
                Err(true) => return Ended::Lost,
                Err(false) => return self.release().await,
                Ok(children) => children,
            };
            let finished = async {
                self.store_doubts().await?;
                lease.finish(&children?).await
            };
            match unless(&world.sim, &lease.lost, finished).await {
                None => return Ended::Lost,
                Some(Ok(())) => {
                    let _ = lease.release().await;
                    return Ended::Finished;
                }
                Some(Err(Unknown)) if lease.lost.is_set() => return Ended::Lost,
                Some(Err(Unknown)) => {
                    if self.drain.is_set() {
                        return self.release().await;
                    }
                    self.pause().await;
                }
            }
        }
    }
}

/// Mirrors `Writer::write`: here no record is poison, so no batch is bisected.
async fn write(worker: Rc<Worker>, lease: Rc<Lease>, drain: Rc<Signal>, ops: Vec<Op>) -> Sent {
    let puts: Vec<Put> = ops.iter().map(|op| put_of(&worker.world, op)).collect();
    let bound: Rc<dyn Bound> = lease;
    let world = &worker.world;
    let (answer, unanswered) = replica::send(world, worker.id, &bound, &drain, &puts).await;
    Sent {
        ops,
        answer,
        unanswered,
    }
}

/// Mirrors `TableContext::children_of`.
async fn children_of(worker: Rc<Worker>, row: ShardRow) -> Result<Vec<ShardId>, Unknown> {
    let parent = row.shard();
    let known: Vec<ShardId> = {
        let snapshot = worker.snapshot();
        let rows = snapshot.shards.iter();
        let rows = rows.filter(|other| other.parent_shard_id.contains(&row.shard_id));
        rows.map(|row| row.shard()).collect()
    };
    let children = listed_children(&worker.world, &parent, !known.is_empty()).await;
    for child in &children {
        create_row(&worker, &child.id, Some(&parent)).await?;
    }
    let all: BTreeSet<ShardId> = children
        .into_iter()
        .map(|child| child.id)
        .chain(known)
        .collect();
    Ok(all.into_iter().collect())
}

/// Mirrors `Discovery::children`: asked again and again, and only a complete listing begun
/// [`PATIENCE`] later decides that there are none.
async fn listed_children(world: &Rc<World>, parent: &ShardId, some_known: bool) -> Vec<Shard> {
    let sim = &world.sim;
    let asked = sim.now();
    loop {
        let patient = sim.now() - asked >= PATIENCE;
        let answer = source::children(world, parent).await;
        if let Ok(children) = answer
            && (!children.is_empty() || some_known || patient)
        {
            return children;
        }
        sleep(sim, sim.between(25, 1_000)).await;
    }
}

/// Mirrors `TableContext::create_shard_row`: one that is there already is as good.
pub async fn create_row(
    worker: &Rc<Worker>,
    shard: &ShardId,
    parent: Option<&ShardId>,
) -> Result<(), Unknown> {
    let world = &worker.world;
    let now = world.sim.wall_ms(worker.id);
    let start = Position::TrimHorizon;
    let row = ShardRow::new(1, "t", source::ARN, shard, parent, &start, now);
    let change = state::Change::CreateShard(row);
    state::write(world, worker.id, change).await.map(|_| ())
}

/// A record as the window wants it. The value stays with the source; the window needs none.
fn change_of(record: &Record) -> Change {
    let image = || Image::of(&[("v".to_owned(), AttributeValue::Bool(true))].into());
    Change {
        sequence: sequence_of(record.number),
        event: match record.value {
            Some(_) => Event::Modify,
            None => Event::Remove,
        },
        key: ItemKey::from_bytes(&[record.key]),
        keys: Default::default(),
        new_image: record.value.map(|_| image().unwrap()),
        old_image: None,
        created_ms: record.created_ms,
        bytes: 256,
        units: 1,
        ttl_delete: false,
    }
}

fn put_of(world: &World, op: &Op) -> Put {
    let change: &Arc<Change> = &op.change;
    let number = number_of(&change.sequence);
    let record = world.source.borrow().record(number);
    Put {
        key: record.key,
        value: record.value,
        number,
    }
}
