//! One stream: the rows of its shards, and a task for each shard that is ours.

mod begun;
mod forgotten;
mod listed;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::try_join_all;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::context::TableContext;
use super::discovery::{Duty, Listed};
use super::gone::Gone;
use super::rows::Snapshot;
use super::shard::{Ended, consume};
use super::vital::{Farewell, beyond_repair};
use crate::backoff::Backoff;
use crate::error::{Fault, Operation};
use crate::lease::doubts::on_take;
use crate::lease::held::Lease;
use crate::lease::row::{ShardRow, StreamRow};
use crate::mutation::{crash, trouble};
use crate::observe::health::Scope;
use crate::observe::liveness::PULSE_EVERY;
use crate::observe::metrics;
use crate::observe::pulse::Pulse;
use crate::stream::lineage::{Tracked, plan};
use crate::stream::reader::Position;
use crate::stream::succession::{Known, is_held_back};
use crate::stream::{Shard, ShardId, stream_label};

const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Rows made or deleted in one step: a thousand new shards do not keep others from being taken.
const ROWS_A_STEP: usize = 200;
/// Rows being made or deleted at once.
const ROWS_AT_ONCE: usize = 16;

/// How the following of a stream ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Left {
    /// All its shards were drained and released, as asked.
    Drained,
    /// Asked to stop, and not all could be released.
    Unclean,
    /// It is an old stream: finished, forgotten by the service, and without rows.
    Over,
}

/// The streams of `table` in this epoch, as the state table knows them.
pub fn known_streams<'a>(snapshot: &'a Snapshot, epoch: u64, table: &str) -> Vec<Known<'a>> {
    let with_rows: BTreeSet<&str> = snapshot
        .shards
        .iter()
        .filter(|row| row.epoch == epoch && row.table == table)
        .map(|row| row.stream_arn.as_str())
        .collect();
    snapshot
        .streams
        .iter()
        .filter(|row| row.is_of(epoch, table))
        .map(|row| Known {
            arn: &row.stream_arn,
            finished: row.finished,
            has_rows: with_rows.contains(row.stream_arn.as_str()),
        })
        .collect()
}

/// The shards of one stream.
struct Stream {
    context: Arc<TableContext>,
    table_id: Option<String>,
    /// When this task first saw a row of each shard.
    first_seen: BTreeMap<ShardId, Instant>,
    /// Shards that the service may not know any more.
    gone: Gone,
    /// Shards whose rows may be deleted, and the number of the first listing that said so.
    lacking: BTreeMap<ShardId, u64>,
    /// Shards whose gap is recorded.
    gaps: BTreeSet<ShardId>,
    /// The number of the last listing when all shards of this old stream were first seen finished.
    finished_at: Option<u64>,
    /// Keys of the shards that could be read when this task began, and that nobody was seen to read since.
    unread: Option<BTreeSet<String>>,
    /// Since when there are none.
    read_since: Option<Instant>,
    /// Keys of the leases that a task of ours works on.
    running: HashMap<tokio::task::Id, String>,
    /// Whether a shard was left otherwise than finished or released.
    unclean: bool,
    /// When to try again what failed.
    retry: Option<Instant>,
    backoff: Backoff,
    tasks: JoinSet<Ended>,
    /// What health knows the stream's own trouble by.
    part: String,
    pulse: Arc<Pulse>,
    /// Workers of the fleet when last looked.
    workers: usize,
    /// What the fleet knows it by.
    key: String,
    stop: CancellationToken,
}

/// Follows one stream until `stop`, then drains its shards. An old stream is left once nothing of
/// it remains.
pub async fn follow_stream(
    context: Arc<TableContext>,
    duty: Duty,
    table_id: Option<String>,
    stop: CancellationToken,
) -> Left {
    let shared = &context.shared;
    let (table, arn) = (&context.table.name, &context.stream_arn);
    let mut rows = shared.rows.clone();
    let mut listings = context.discovery.listings();
    shared.board.note_listing(table, arn, None);
    shared.health.listed(table);
    // Dropped with this function, and the task with it.
    let mut listing = JoinSet::new();
    listing.spawn(duty.run(
        shared.lister.clone(),
        arn.clone(),
        shared.config.worker.discover_every,
        Arc::clone(&context) as _,
    ));
    let mut stream = Stream::new(Arc::clone(&context), table_id, stop.clone());
    let mut due = true;
    let over = loop {
        stream.pulse.beat();
        trouble("stream").await;
        if due {
            let snapshot = rows.borrow_and_update().clone();
            listings.mark_unchanged();
            if snapshot.read {
                match stream.step(&snapshot).await {
                    Ok(true) => break true,
                    Ok(false) => {}
                    Err(fault) => stream.failed(&fault),
                }
            }
        }
        // In order of priority:
        due = tokio::select! {
            biased;
            // 1. Asked to stop.
            () = stop.cancelled() => break false,
            // 2. A shard ended: the rows read next show what may start now.
            Some(ended) = stream.tasks.join_next_with_id() => {
                stream.on_ended(ended);
                false
            }
            // 3. The service said whether it still knows a shard.
            Some(answer) = stream.gone.next(&shared.lister, arn) => stream.on_answer(answer),
            // 4. The state table changed, or was read again: a lease may have expired.
            changed = rows.changed() => {
                if changed.is_err() {
                    break false;
                }
                true
            }
            // 5. A listing is there.
            Ok(()) = listings.changed() => true,
            // 6. What failed may work now.
            () = until_then(stream.retry) => true,
            // 7. Nothing: it shows that it comes round.
            () = tokio::time::sleep(PULSE_EVERY) => false,
        };
    };
    // Every shard's task has the same token: they drain by themselves, within the grace.
    stream.unclean = false;
    while let Some(ended) = (stream.pulse)
        .during(stream.tasks.join_next_with_id())
        .await
    {
        stream.on_ended(ended);
    }
    drop(listing);
    shared.board.forget_listing(table, arn);
    for part in [stream.part.clone(), stream.answers()] {
        shared.health.forget(table, &part);
    }
    match (over, stream.unclean) {
        (true, _) => Left::Over,
        (false, false) => Left::Drained,
        (false, true) => Left::Unclean,
    }
}

/// Waits until `then`; for ever if there is no such moment.
async fn until_then(then: Option<Instant>) {
    match then {
        Some(then) => tokio::time::sleep_until(then.into()).await,
        None => std::future::pending().await,
    }
}

impl Stream {
    fn new(context: Arc<TableContext>, table_id: Option<String>, stop: CancellationToken) -> Self {
        Self {
            table_id,
            first_seen: BTreeMap::new(),
            gone: Gone::default(),
            lacking: BTreeMap::new(),
            gaps: BTreeSet::new(),
            finished_at: None,
            unread: None,
            read_since: None,
            running: HashMap::new(),
            unclean: false,
            retry: None,
            backoff: Backoff::new(FIRST_PAUSE, LONGEST_PAUSE),
            tasks: JoinSet::new(),
            pulse: Arc::new(Pulse::start(
                &context.shared.health,
                &context.table.name,
                &context.part(),
            )),
            workers: 1,
            key: StreamRow::key(
                context.shared.epoch,
                &context.table.name,
                &context.stream_arn,
            ),
            part: context.part(),
            stop,
            context,
        }
    }

    /// What health knows trouble about single shards by.
    fn answers(&self) -> String {
        format!("shards of {}", stream_label(&self.context.stream_arn))
    }

    fn failed(&mut self, fault: &Fault) {
        let shared = &self.context.shared;
        let table = &self.context.table.name;
        let scope = match fault.operation {
            Operation::State => Scope::State,
            _ => Scope::Source,
        };
        metrics::retried(table, fault.class);
        shared.health.failed(scope, table, &self.part, fault);
        self.retry = Some(Instant::now() + self.backoff.pause());
    }

    fn on_ended(&mut self, ended: Result<(tokio::task::Id, Ended), tokio::task::JoinError>) {
        let table = &self.context.table.name;
        match ended {
            Ok((id, ended)) => {
                self.running.remove(&id);
                self.unclean |= matches!(ended, Ended::Lost | Ended::Kept);
                if ended == Ended::Lost {
                    metrics::lease_lost(table);
                }
            }
            Err(error) => {
                let lease = self.running.remove(&error.id());
                self.unclean = true;
                self.context.shared.health.task_died("shard", table);
                tracing::error!(
                    table,
                    lease,
                    panicked = error.is_panic(),
                    "the task of a shard died; its lease expires and is taken again"
                );
            }
        }
        self.context.shared.rescan.notify_one();
    }

    /// Whether there is something to do about an answer of the service.
    fn on_answer(&self, answer: Result<bool, Fault>) -> bool {
        let health = &self.context.shared.health;
        let table = &self.context.table.name;
        match answer {
            Ok(gone) => {
                health.succeeded(Scope::Source, table, &self.answers());
                gone
            }
            Err(fault) => {
                metrics::retried(table, fault.class);
                health.failed(Scope::Source, table, &self.answers(), &fault);
                false
            }
        }
    }

    /// Whether every shard that could be read at the beginning has been read since, or ended. Until its first
    /// page has come nobody knows whether a position is still there. Those that come later begin while
    /// somebody looks.
    fn is_read<'a>(
        &mut self,
        snapshot: &Snapshot,
        readable: impl Iterator<Item = &'a ShardRow>,
    ) -> bool {
        let keys = || readable.map(|row| row.lease_key.clone()).collect();
        let unread = self.unread.get_or_insert_with(keys);
        let open = snapshot.shards.iter().filter(|row| !row.is_finished());
        let open: BTreeSet<&String> = open.map(|row| &row.lease_key).collect();
        unread.retain(|key| open.contains(key) && !snapshot.read_now.contains(key));
        unread.is_empty()
    }

    /// Creates the rows that are missing, takes what may be read, deletes what nobody needs. Never
    /// waits for a listing. Returns whether nothing of the stream is left.
    async fn step(&mut self, snapshot: &Arc<Snapshot>) -> Result<bool, Fault> {
        let context = Arc::clone(&self.context);
        let shared = &context.shared;
        let rows: BTreeMap<ShardId, &ShardRow> = snapshot
            .shards
            .iter()
            .filter(|row| row.epoch == shared.epoch && row.stream_arn == context.stream_arn)
            .filter(|row| row.table == context.table.name)
            .map(|row| (row.shard(), row))
            .collect();
        let stream = self.stream_row(snapshot).await?;
        let now = Instant::now();
        self.first_seen.retain(|id, _| rows.contains_key(id));
        for id in rows.keys() {
            self.first_seen.entry(id.clone()).or_insert(now);
        }
        let Some(listed) = context.discovery.last() else {
            return Ok(false);
        };
        let tracked: BTreeMap<ShardId, Tracked> = rows
            .iter()
            .map(|(id, row)| (id.clone(), row.tracked()))
            .collect();
        let mut plan = plan(&listed.shards, true, &tracked, self.gone.confirmed());
        if stream.finished {
            // A late listing must not bring back what was deleted.
            plan.create.clear();
        }
        let known = known_streams(snapshot, shared.epoch, &context.table.name);
        if is_held_back(&known, &context.stream_arn) {
            plan.startable.clear();
        }
        self.create_rows(&plan.create, &stream, &tracked, &listed)
            .await?;
        self.take_share(snapshot, &rows, &plan.startable).await?;
        self.look_for_gone(snapshot, &rows, &tracked, &plan, &listed)
            .await?;
        if !stream.finished && self.is_finished(&tracked, &plan, &listed) {
            self.finish(&stream).await?;
        }
        self.retry = None;
        self.backoff.reset();
        let readable = plan.startable.iter().filter_map(|id| rows.get(id).copied());
        // As the rows say that are looked at, and not only the stream's own.
        let mut streams = snapshot.streams.iter();
        let is_known = streams.any(|row| row.lease_key == stream.lease_key && row.initialised);
        self.confirm(snapshot, &rows, &stream, &plan, &listed)
            .await?;
        if is_known && self.is_read(snapshot, readable) {
            let since = *self.read_since.get_or_insert(now);
            // By a reading of the rows that began after all this: it shows what was found meanwhile.
            if context.is_current() && snapshot.begun.is_some_and(|begun| begun >= since) {
                shared.health.set_started(&context.table.name);
            }
        }
        for scope in [Scope::State, Scope::Source] {
            shared
                .health
                .succeeded(scope, &context.table.name, &self.part);
        }
        let is_left = stream.finished && rows.is_empty() && self.running.is_empty();
        Ok(is_left && !context.is_current())
    }

    /// Makes the rows of new shards, a part of them at a time. Once the first listing's are all
    /// made, the stream's row says so.
    async fn create_rows(
        &self,
        create: &[Shard],
        stream: &StreamRow,
        tracked: &BTreeMap<ShardId, Tracked>,
        listed: &Listed,
    ) -> Result<(), Fault> {
        let context = &self.context;
        let leases = &context.shared.config.leases;
        // A shard found after the first listing starts at its beginning, whatever `start` says.
        let start = if stream.initialised {
            Position::TrimHorizon
        } else {
            stream.start()
        };
        // Children of shards still being read can wait longest.
        let mut create: Vec<&Shard> = create.iter().collect();
        create.sort_by_key(|shard| {
            let parent = shard.parent.as_ref().and_then(|parent| tracked.get(parent));
            parent.is_some_and(|parent| !parent.finished)
        });
        let new = &create[..create.len().min(ROWS_A_STEP)];
        for some in new.chunks(ROWS_AT_ONCE) {
            // Asked again for each part: the process may have been stopped in between.
            if !listed.is_fresh(leases.duration + leases.late_effect) {
                context.discovery.list_soon();
                return Ok(());
            }
            let made = some.iter().map(|shard| {
                let parent = shard.parent.as_ref();
                context.create_shard_row(&shard.id, parent, &start)
            });
            try_join_all(made).await?;
            self.pulse.beat();
        }
        if !stream.initialised && new.len() == create.len() {
            let mut done = stream.clone();
            done.initialised = true;
            context.shared.state.replace_stream(&done).await?;
            crash("leases-made");
        }
        if !new.is_empty() || !stream.initialised {
            context.shared.rescan.notify_one();
        }
        Ok(())
    }

    /// Tells the fleet what may be read, and takes what this worker is to have of it.
    async fn take_share(
        &mut self,
        snapshot: &Arc<Snapshot>,
        rows: &BTreeMap<ShardId, &ShardRow>,
        startable: &BTreeSet<ShardId>,
    ) -> Result<(), Fault> {
        let context = Arc::clone(&self.context);
        let shared = &context.shared;
        let mut readable = BTreeMap::new();
        for row in startable.iter().filter_map(|id| rows.get(id)) {
            let Some(position) = row.position() else {
                shared.health.stop_table(
                    &context.table.name,
                    "a checkpoint in the state table is not readable",
                    "Look at the row's `checkpoint`; a person or a newer version has changed it",
                );
                continue;
            };
            readable.insert(&row.lease_key, (*row, position));
        }
        let keys = readable.keys().map(|key| (*key).clone()).collect();
        shared.fleet.set_readable(&self.key, keys);
        // The limit of listings is one for the whole fleet.
        let workers = snapshot.living.len();
        shared.lister.set_workers(workers);
        shared.health.set_workers(workers);
        // Fewer of them list more often each.
        if workers < self.workers {
            context.discovery.list_soon();
        }
        self.workers = workers;
        let take = shared.fleet.share_out(snapshot);
        let mut refused = false;
        for (key, (row, position)) in readable {
            self.pulse.beat();
            if self.stop.is_cancelled() {
                break;
            }
            if take.contains(key) && !self.running.values().any(|running| running == key) {
                refused |= !self.start_shard(row, position).await?;
            }
        }
        // Others were faster, so there may be room for what they left.
        if refused {
            shared.rescan.notify_one();
        }
        Ok(())
    }

    /// Takes a lease and starts reading. Whether it was taken.
    async fn start_shard(&mut self, row: &ShardRow, position: Position) -> Result<bool, Fault> {
        let context = Arc::clone(&self.context);
        let shared = &context.shared;
        let duration = shared.config.leases.duration;
        // Cancelled as well when another worker is to have the shard.
        let drain = self.stop.child_token();
        let held = shared.fleet.hold(&row.lease_key, drain.clone());
        let taken = Lease::take(&shared.state, row.clone(), &shared.owner, duration).await?;
        let Some(lease) = taken else {
            return Ok(false);
        };
        let expired = row.lease_owner.is_some();
        metrics::lease_taken(&context.table.name, expired);
        tracing::info!(
            table = context.table.name,
            shard = row.shard_id,
            checkpoint = row.checkpoint,
            expired,
            "shard taken"
        );
        let key = row.lease_key.clone();
        let inherited = on_take(
            row,
            shared.source.clock.now_ms(),
            shared.target.clock.now_ms(),
            shared.config.leases.late_effect,
        );
        let row = row.clone();
        let task = self.tasks.spawn(async move {
            let _held = held;
            let health = Arc::clone(&context.shared.health);
            let table = context.table.name.clone();
            let part = format!("{} renewal", lease.shard());
            let shard = lease.shard().0.clone();
            let _farewell = Farewell {
                context: Arc::clone(&context),
                shard: shard.clone(),
                renewal: part.clone(),
            };
            let report = |result: Result<(), &Fault>| match result {
                Ok(()) => health.succeeded(Scope::State, &table, &part),
                Err(fault) => health.failed(Scope::State, &table, &part, fault),
            };
            // Renewal goes on while the shard drains, and ends with it.
            let never = CancellationToken::new();
            let consumed = consume(
                Arc::clone(&context),
                Arc::clone(&lease),
                row,
                position,
                inherited,
                drain,
            );
            let ended = tokio::select! {
                ended = consumed => ended,
                // Renewal ends only when the lease is lost; consume sees that as well, and gets to
                // clean up after itself.
                () = async {
                    lease.keep(&never, report).await;
                    std::future::pending::<()>().await;
                } => Ended::Lost,
                () = beyond_repair(&health, &table, &shard) => Ended::Lost,
            };
            let row = lease.row().await;
            tracing::info!(
                table,
                shard,
                checkpoint = row.checkpoint,
                lease = row.lease_key,
                how = ?ended,
                "shard left"
            );
            ended
        });
        self.running.insert(task.id(), key);
        Ok(true)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.context.shared.fleet.forget(&self.key);
    }
}
