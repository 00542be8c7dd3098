//! One shard from its checkpoint to its end: read, decode, coalesce, apply, checkpoint.

mod ending;
mod poison;
mod proof;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::ahead::AtWork;
use super::context::TableContext;
use super::doubts::{ShardDoubts, store_inherited};
use super::letter::Letter;
use super::source::{Read, Restart, read_shard};
use super::tap::Gate;
use super::vital::Vital;
use crate::apply::batch::{BATCH_BYTES_MAX, BATCH_OPS_MAX, Outcome, Sent};
use crate::apply::budget::Budget;
use crate::apply::coalesce::{SlotId, Window};
use crate::backoff::Backoff;
use crate::config::TtlDeletes;
use crate::dynamo::item::ItemKey;
use crate::dynamo::transmit::Bound;
use crate::error::{Class, Fault, Operation};
use crate::lease::doubts::Range;
use crate::lease::held::{Lease, Progress};
use crate::lease::row::{DoubtRow, ShardRow};
use crate::mutation::trouble;
use crate::observe::board::{Board, Standing};
use crate::observe::health::Scope;
use crate::observe::metrics;
use crate::observe::metrics::replay::Tally;
use crate::observe::recovery::Proof;
use crate::stream::change::Event;
use crate::stream::reader::Position;
use crate::stream::sequence::SequenceNumber;

/// How a shard's consumption ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// Applied to its end, and its children have rows.
    Finished,
    /// Drained, checkpointed and given up, as asked.
    Released,
    /// Asked to stop before the doubt about its last owner could be stored: the lease is left to
    /// expire, so that whoever takes it stores that doubt.
    Kept,
    /// Another worker has the lease.
    Lost,
}

const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

type Later<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A delivered dead letter.
struct Delivered {
    slot: SlotId,
    key: Option<ItemKey>,
    event: Option<Event>,
    class: Class,
}

/// How storing a checkpoint ended.
struct Checkpointed {
    sequence: SequenceNumber,
    /// What it proves, and what its row says of that, in milliseconds.
    proves: (Option<i64>, Option<i64>),
    /// The doubt stored before it.
    doubt: Option<(Range, DoubtRow)>,
    result: Result<(), Fault>,
}

/// The state of one shard's consumption.
struct Consumer<'a> {
    context: &'a Arc<TableContext>,
    lease: &'a Arc<Lease>,
    stop: &'a CancellationToken,
    shard: String,
    /// Key of its row.
    key: String,
    /// Where it began to read.
    start: Position,
    /// What may still take effect and is not stored as a doubt yet.
    doubts: ShardDoubts,
    window: Window,
    /// What throttling of its keys leaves to it.
    lane: Arc<Budget>,
    writes: FuturesUnordered<Later<'a, Sent>>,
    letters: FuturesUnordered<Later<'a, Delivered>>,
    checkpointing: Option<Later<'a, Checkpointed>>,
    /// The sequence number last stored.
    stored: Option<SequenceNumber>,
    /// Records made before this time are left out, in milliseconds.
    start_ms: Option<i64>,
    backoff: Backoff,
    /// Nothing is sent before this.
    not_before: Instant,
    standing: Standing,
    /// What may be said to be proven.
    proof: Proof,
    /// When the page was asked for that ended the shard, by the source's clock.
    ended_ms: Option<i64>,
    /// Whether no record of it was ever taken in by this owner.
    is_untouched: bool,
    /// The last position taken in; a record without one of its own stands there.
    last_sequence: Option<SequenceNumber>,
    /// The position was lost: once what was taken in is durable, the new one is stored.
    restart: Option<Restart>,
    /// Whether writes may start.
    gate: Gate,
    vital: Vital,
    /// While there is something in the window, or more to be read.
    at_work: Option<AtWork>,
    /// Whether the last page was full.
    is_behind: bool,
}

/// Consumes the shard of `lease` until its end, until `stop` asks to drain, or until the lease is
/// lost. `inherited` is what the owner before left in doubt: it is stored before anything is read.
pub async fn consume(
    context: Arc<TableContext>,
    lease: Arc<Lease>,
    row: ShardRow,
    position: Position,
    inherited: Option<Range>,
    stop: CancellationToken,
) -> Ended {
    if let Some(range) = inherited {
        let shared = &context.shared;
        let applied_until = row.proven_until;
        let applied_until = applied_until.or_else(|| shared.proven_of_shard(&row.lease_key));
        let stored = store_inherited(&context, lease.shard(), &range, applied_until);
        tokio::select! {
            biased;
            () = lease.lost().cancelled() => return Ended::Lost,
            () = stored => {}
            () = stop.cancelled() => return Ended::Kept,
        }
    }
    let (pages, mut reads) = mpsc::channel(1);
    let reader = tokio::spawn(read_shard(
        Arc::clone(&context),
        row.stream_arn.clone(),
        lease.shard().clone(),
        position.clone(),
        row.proven_ms(),
        pages,
    ));
    // Dropped with this future, whichever way it ends.
    let mut reader = AbortOnDrop(reader);
    let mut consumer = Consumer {
        context: &context,
        lease: &lease,
        stop: &stop,
        shard: lease.shard().0.clone(),
        key: row.lease_key.clone(),
        start: position,
        doubts: ShardDoubts::default(),
        window: Window::new(context.shared.config.coalesces(&context.table)),
        lane: Arc::new(context.writer.budget().lane()),
        writes: FuturesUnordered::new(),
        letters: FuturesUnordered::new(),
        checkpointing: None,
        stored: None,
        start_ms: row.start_timestamp,
        backoff: Backoff::new(FIRST_PAUSE, LONGEST_PAUSE),
        not_before: Instant::now(),
        standing: Standing {
            oldest_open_ms: None,
            applied_until_ms: row.watermark,
            proven_ms: row.proven_until,
        },
        // Whatever was stored before by others, an inherited doubt included, is read later.
        proof: Proof::new(row.proven_until, Instant::now()),
        ended_ms: None,
        is_untouched: true,
        last_sequence: None,
        restart: None,
        gate: Gate::new(&context.shared, &context.table.name, &stop),
        vital: Vital::new(&context, &lease.shard().0),
        at_work: None,
        is_behind: false,
    };
    let ended = consumer.run(&mut reads).await;
    drop(consumer);
    // The reader must be gone before its reports are forgotten.
    reader.end().await;
    let shared = &context.shared;
    shared.board.remove(&context.table.name, &lease.shard().0);
    shared.health.forget(&context.table.name, &lease.shard().0);
    ended
}

impl<'a> Consumer<'a> {
    async fn run(&mut self, reads: &mut mpsc::Receiver<Read>) -> Ended {
        let stop = self.stop;
        let worker = &self.context.shared.config.worker;
        let mut checkpoints = tokio::time::interval(worker.checkpoint_every);
        checkpoints.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut draining = false;
        let mut at_end = false;
        loop {
            trouble("shard").await;
            if stop.is_cancelled() && !draining {
                draining = true;
                reads.close();
            }
            let rests = self.window.is_empty() && !self.is_behind;
            match (rests, &self.at_work) {
                (true, Some(_)) => self.at_work = None,
                (false, None) => self.at_work = Some(self.context.shared.ahead.begin()),
                _ => {}
            }
            if let Some(at_work) = &mut self.at_work {
                // Others may have the calls that it does not make.
                at_work.wait(!self.gate.is_open() || self.not_before > Instant::now());
            }
            let share = self.context.shared.ahead.share();
            // A page fits beside what is held.
            let has_room = self.window.bytes() <= share.bytes / 4;
            // Draining, nothing new is sent: what is not durable yet is read again by the next
            // owner, and a shard must not keep its lease for a slow replica's sake.
            if self.gate.is_open() && !draining {
                let more = !at_end && has_room && !reads.is_empty();
                self.send(share.calls, more);
            }
            let answered = self.writes.is_empty() && self.checkpointing.is_none();
            if answered && at_end && self.window.is_empty() {
                return self.finish(stop).await;
            }
            if answered && draining {
                return self.release().await;
            }
            if answered
                && self.window.is_empty()
                && let Some(restart) = self.restart.take()
            {
                match self.begin_anew(&restart).await {
                    Ok(true) => drop(restart.stored.send(())),
                    // Asked to stop: whoever reads on finds the gap again.
                    Ok(false) => continue,
                    Err(ended) => return ended,
                }
            }
            let waits = self.window.has_ready() && self.not_before > Instant::now();
            // In order of priority:
            tokio::select! {
                biased;
                // 1. The lease is lost: nothing may be sent any more, and what is under way ends
                //    with this future.
                () = self.lease.lost().cancelled() => return Ended::Lost,
                // 2. A checkpoint was stored, or was not.
                stored = poll_option(&mut self.checkpointing) => self.on_checkpointed(stored),
                // 3. A checkpoint is due: rare, so it may go before the answers.
                _ = checkpoints.tick() => {
                    self.show();
                    self.checkpoint();
                    let full = draining
                        || at_end
                        || self.restart.is_some()
                        || !has_room;
                    self.live(full);
                }
                // 4. Answers make room and move the watermark.
                Some(sent) = self.writes.next(), if !self.writes.is_empty() => self.on_sent(sent),
                // 5. So do delivered dead letters.
                Some(delivered) = self.letters.next(), if !self.letters.is_empty() => {
                    self.on_delivered(&delivered);
                }
                // 6. Asked to stop: no more is taken in; what was is finished.
                () = stop.cancelled(), if !draining => {}
                // 7. A pause after a failure is over.
                () = tokio::time::sleep_until(self.not_before.into()), if waits => {}
                // 8. The tap was opened or closed.
                () = self.gate.moved() => {}
                // 9. More records, as long as not too many wait.
                read = reads.recv(), if !draining && !at_end && has_room => {
                    match read {
                        Some(mut read) => {
                            self.vital.read();
                            self.lease.note_read();
                            at_end = read.page.end;
                            self.ended_ms = read.ended_ms;
                            self.restart = read.restart.take();
                            self.is_behind = read.is_full && !at_end;
                            self.admit(read);
                        }
                        // The reader ends only after the page that ends the shard. If it ended
                        // otherwise, somebody else goes on from the checkpoint.
                        None => {
                            tracing::error!(
                                table = self.context.table.name,
                                shard = self.shard,
                                "the reader of a shard ended by itself; the shard starts over"
                            );
                            let health = &self.context.shared.health;
                            health.task_died("reader", &self.context.table.name);
                            draining = true;
                        }
                    }
                }
            }
        }
    }

    /// Takes a page into the window.
    fn admit(&mut self, read: Read) {
        if let Some(caught_up_ms) = read.caught_up_ms
            && self.window.is_empty()
        {
            self.standing.applied_until(caught_up_ms);
            self.note_nothing(caught_up_ms);
        }
        self.is_untouched &= read.page.records.is_empty();
        let table = &self.context.table;
        for record in read.page.records {
            let change = match record {
                Ok(change) => change,
                Err(bad) => {
                    let sequence = bad.sequence.or_else(|| self.last_sequence.clone());
                    // The reader refuses a page whose last record has no number, so there is one
                    // before or after; a first record without one stands at zero.
                    let sequence = sequence.or_else(|| SequenceNumber::parse("0"));
                    if let Some(sequence) = sequence {
                        let slot = self.window.push_poison(sequence.clone(), bad.created_ms);
                        let letter = Letter::undecodable(
                            self.context,
                            &self.shard,
                            &sequence,
                            bad.created_ms,
                            bad.keys.as_ref(),
                            &bad.why,
                        );
                        self.deliver(slot, None, None, Class::Undecodable, letter);
                    }
                    continue;
                }
            };
            self.last_sequence = Some(change.sequence.clone());
            if self
                .start_ms
                .is_some_and(|start_ms| change.created_ms < start_ms)
            {
                metrics::skipped(&table.name, "before-start");
                self.window.push_done(change.sequence, change.created_ms);
            } else if change.ttl_delete && table.ttl_deletes == TtlDeletes::Skip {
                metrics::skipped(&table.name, "ttl-delete");
                self.window.push_done(change.sequence, change.created_ms);
            } else {
                self.window.push(change);
            }
        }
        // Records left out are done, too.
        self.note_durable();
    }

    /// Shows that the loop comes round. `full` says that nothing has to be read.
    fn live(&mut self, full: bool) {
        let rests = self.window.is_empty() || !self.gate.is_open();
        let durable = self.window.durable().map(|durable| &durable.sequence);
        self.vital.turned(durable, rests, full);
    }

    /// Starts writes while there is something to send and fewer than `calls` are in flight. Where `more`
    /// is there to be taken in, only full batches leave: the rest fills up.
    fn send(&mut self, calls: usize, more: bool) {
        if Instant::now() < self.not_before {
            return;
        }
        let least = if more { BATCH_OPS_MAX } else { 1 };
        while self.writes.len() < calls && self.window.ready() >= least {
            let ops = self.window.take(BATCH_OPS_MAX, BATCH_BYTES_MAX);
            if ops.is_empty() {
                break;
            }
            let (context, flow) = (self.context, self.gate.flow());
            let bound: Arc<dyn Bound> = Arc::clone(self.lease) as _;
            let lane = Arc::clone(&self.lane);
            self.writes.push(Box::pin(async move {
                context.writer.write_in(&lane, &bound, &flow, ops).await
            }));
        }
    }

    fn on_sent(&mut self, sent: Sent) {
        let table = &self.context.table.name;
        let health = &self.context.shared.health;
        let mut applied_any = false;
        // Before anything of it counts as durable: the range begins there.
        if let Some(last) = &sent.unanswered {
            let from = match self.window.durable() {
                Some(durable) => Position::After(durable.sequence.clone()),
                None => self.start.clone(),
            };
            let shared = &self.context.shared;
            let applied_until = (self.window.proven_ms())
                .or(self.proof.stored_ms())
                .or_else(|| shared.proven_of_shard(&self.key));
            self.proof.doubted(applied_until);
            self.doubts
                .add(&from, last, shared.doubt_until_ms(), applied_until);
        }
        let mut tally = Tally::default();
        for (op, outcome) in sent.outcomes {
            match outcome {
                Outcome::Applied => {
                    applied_any = true;
                    let before = tally.records();
                    self.window
                        .applied(&op, |change| tally.add(change.event, change.created_ms));
                    let finished = tally.records() - before;
                    tally.add_coalesced(finished.saturating_sub(1));
                }
                Outcome::Returned => self.window.returned(&op),
                Outcome::Refused { fault, attempts } => {
                    // The replica answered: it is there.
                    applied_any = true;
                    self.on_refused(&op, fault, attempts);
                }
            }
        }
        self.on_applied(&tally);
        match sent.fault {
            Some(fault) => {
                metrics::retried(table, fault.class);
                if fault.class == Class::Throttled {
                    metrics::throttled(table);
                }
                // A lease that could not be renewed is the state table's trouble.
                let scope = match fault.operation {
                    Operation::State => Scope::State,
                    _ => Scope::Replica,
                };
                health.failed(scope, table, &self.shard, &fault);
                if applied_any {
                    self.backoff.reset();
                }
                // Several answers of one moment are one failure.
                if Instant::now() >= self.not_before {
                    self.not_before = Instant::now() + self.backoff.pause();
                }
            }
            None if applied_any => {
                self.backoff.reset();
                health.succeeded(Scope::Replica, table, &self.shard);
            }
            None => {}
        }
    }

    fn on_applied(&mut self, tally: &Tally) {
        if tally.records() == 0 {
            return;
        }
        let shared = &self.context.shared;
        let now_ms = shared.source.clock.now_ms();
        self.context.meters.applied(tally, now_ms);
        Board::add(&shared.board.totals.coalesced, tally.coalesced());
        Board::add(&shared.board.totals.records, tally.records());
        let table = &self.context.table.name;
        shared.halts.applied(table, tally.records());
        self.note_durable();
    }

    fn note_durable(&mut self) {
        if let Some(durable) = self.window.durable() {
            self.standing.applied_until(durable.created_ms);
        }
    }

    fn show(&mut self) {
        self.standing.oldest_open_ms = self.window.oldest_open_ms();
        // What held it back may be gone.
        self.proof.said(self.may_say(self.proof.stored_ms()));
        self.standing.proven_ms = self.proof.said_ms();
        let shared = &self.context.shared;
        let now_ms = shared.source.clock.now_ms();
        self.lease.note(Progress {
            watermark_ms: self.standing.applied_until_ms,
            proven_ms: self.standing.proven_ms,
            headroom_s: self.standing.headroom_s(now_ms).map(|s| s as i64),
        });
        shared
            .board
            .set(&self.context.table.name, &self.shard, self.standing);
    }

    /// What is durable now, if it is more than what is stored.
    fn progress(&self) -> Option<SequenceNumber> {
        let durable = self.window.durable()?;
        (self.stored.as_ref() != Some(&durable.sequence)).then(|| durable.sequence.clone())
    }

    fn checkpoint(&mut self) {
        if self.checkpointing.is_some() {
            return;
        }
        if let Some(sequence) = self.progress() {
            let lease = Arc::clone(self.lease);
            let proves = self.window.proven_ms();
            let proves = (proves, self.may_say(proves));
            let doubt = self.doubts.store(self.context, lease.shard());
            self.checkpointing = Some(Box::pin(async move {
                // The checkpoint must not pass what is in doubt nowhere but here.
                let doubt = match doubt.await {
                    Ok(doubt) => doubt,
                    Err(fault) => {
                        return Checkpointed {
                            sequence,
                            proves,
                            doubt: None,
                            result: Err(fault),
                        };
                    }
                };
                let result = lease.checkpoint(&sequence, proves.1).await;
                Checkpointed {
                    sequence,
                    proves,
                    doubt,
                    result,
                }
            }));
        }
    }

    fn on_checkpointed(&mut self, done: Checkpointed) {
        self.checkpointing = None;
        self.doubts_stored(done.doubt);
        let health = &self.context.shared.health;
        let table = &self.context.table.name;
        match done.result {
            Ok(()) => {
                self.stored = Some(done.sequence);
                self.proof.checkpointed(done.proves.0, done.proves.1);
                health.succeeded(Scope::State, table, &self.shard);
                self.show();
            }
            // A lost lease shows in the main loop.
            Err(_) if self.lease.lost().is_cancelled() => {}
            Err(fault) => health.failed(Scope::State, table, &self.shard, &fault),
        }
    }
}

/// Polls what may be there; waits for ever when it is not.
async fn poll_option<T>(later: &mut Option<Later<'_, T>>) -> T {
    match later {
        Some(later) => later.await,
        None => std::future::pending().await,
    }
}

/// Ends a task when dropped.
struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl AbortOnDrop {
    /// Ends the task and waits until it has.
    async fn end(&mut self) {
        self.0.abort();
        // An aborted task ends with an error, and so does one that panicked: both are gone.
        let _ = (&mut self.0).await;
    }
}

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}
