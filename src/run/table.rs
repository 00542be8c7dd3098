//! One table: which stream it has, which shards may be read, and a task for each that is ours.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::context::{Shared, TableContext};
use super::rows::Snapshot;
use super::shard::{Ended, consume};
use super::vital::{Farewell, beyond_repair};
use crate::backoff::Backoff;
use crate::config::{Start, Table};
use crate::dynamo::clock::{host_ms, rfc3339};
use crate::dynamo::table::{describe, enabled_stream, holds_new_images};
use crate::error::{Class, Fault, Operation};
use crate::lease::doubts::on_take;
use crate::lease::held::Lease;
use crate::lease::row::{FORMAT_VERSION, GapReason, GapRow, ShardRow, StreamRow};
use crate::mutation::trouble;
use crate::observe::health::Scope;
use crate::observe::metrics;
use crate::observe::pulse::Pulse;
use crate::stream::lineage::{Tracked, plan};
use crate::stream::reader::Position;
use crate::stream::{Shard, ShardId, stream_label};

/// How much earlier than asked a start by time begins: stream times are whole seconds, and the
/// source's clock is known to two.
const LATEST_MARGIN_MS: i64 = 3_000;
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// What the source says of a table now.
struct Identity {
    stream_arn: Option<String>,
    table_id: Option<String>,
}

/// Follows a table until `stop`: its current stream, and a new one when it is re-created. Returns
/// whether all its shards were drained and released.
pub async fn follow_table(shared: Arc<Shared>, table: Table, stop: CancellationToken) -> bool {
    metrics::begin(&table.name);
    let mut streams: JoinSet<bool> = JoinSet::new();
    let mut current: Option<tokio::task::Id> = None;
    let mut followed: Option<(String, Option<String>)> = None;
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    let pulse = Pulse::start(&shared.health, &table.name, "table");
    while !stop.is_cancelled() {
        pulse.beat();
        trouble("table").await;
        let pause = match pulse.during(until(&stop, identify(&shared, &table))).await {
            None => break,
            Some(Ok(identity)) => {
                shared.health.succeeded(Scope::Source, &table.name, "table");
                backoff.reset();
                let accepted = until(&stop, accept(&shared, &table, &mut followed, identity));
                // Storing a gap reports by itself what holds it.
                let arn = pulse.during(accepted).await.flatten();
                if let Some(context) = arn.and_then(|arn| TableContext::of(&shared, &table, &arn)) {
                    shared.board.set_stream(&table.name, &context.stream_arn);
                    let table_id = followed.as_ref().and_then(|(_, id)| id.clone());
                    let task = streams.spawn(follow_stream(context, table_id, stop.clone()));
                    current = Some(task.id());
                }
                shared.config.worker.discover_every
            }
            Some(Err(fault)) => {
                shared
                    .health
                    .failed(Scope::Source, &table.name, "table", &fault);
                backoff.pause()
            }
        };
        tokio::select! {
            () = stop.cancelled() => {}
            () = pulse.sleep_until(Instant::now() + pause) => {}
            // A stream's task ends only when told to; otherwise it is started anew.
            Some(ended) = streams.join_next_with_id(), if !stop.is_cancelled() => {
                let (id, panicked) = match &ended {
                    Ok((id, _)) => (*id, false),
                    Err(error) => (error.id(), true),
                };
                // A stream that is no longer the table's ends once the service has forgotten it.
                if !panicked && current != Some(id) {
                    continue;
                }
                tracing::error!(
                    table = table.name,
                    panicked,
                    "the task of a stream ended by itself; it starts over"
                );
                shared.health.task_died("stream", &table.name);
                // Another stream that is still followed must not be followed twice.
                if current == Some(id) {
                    followed = None;
                }
                let _ = until(&stop, tokio::time::sleep(backoff.pause())).await;
            }
        }
    }
    drop(pulse);
    let mut drained = true;
    while let Some(ended) = streams.join_next().await {
        drained &= ended.unwrap_or(false);
    }
    drained
}

/// Waits for `work`, or gives `None` once `stop` is cancelled.
async fn until<T>(stop: &CancellationToken, work: impl Future<Output = T>) -> Option<T> {
    tokio::select! {
        biased;
        () = stop.cancelled() => None,
        done = work => Some(done),
    }
}

async fn identify(shared: &Shared, table: &Table) -> Result<Identity, Fault> {
    let name = table.name_in(&shared.source.label);
    let description = describe(&shared.source.tables, name)
        .await?
        .ok_or_else(|| {
            Fault::own(
                Operation::DescribeTable,
                Class::NotFound,
                "ResourceNotFoundException",
                "the source table is not there",
            )
        })?;
    // A stream made anew may hold less than replication needs: records without new images would
    // all be refused, so it is not followed at all.
    let stream_arn = enabled_stream(&description)
        .filter(|(_, view)| holds_new_images(*view))
        .map(|(arn, _)| arn.to_owned());
    Ok(Identity {
        stream_arn,
        table_id: description.table_id,
    })
}

/// Compares what the source says with what is being followed. Returns a stream to follow from now
/// on.
async fn accept(
    shared: &Shared,
    table: &Table,
    followed: &mut Option<(String, Option<String>)>,
    identity: Identity,
) -> Option<String> {
    let health = &shared.health;
    let Some(arn) = identity.stream_arn else {
        let fault = Fault::own(
            Operation::DescribeStream,
            Class::NotFound,
            "no usable stream",
            "the source table has no stream with new images any more",
        );
        health.failed(Scope::Source, &table.name, "stream", &fault);
        return None;
    };
    health.succeeded(Scope::Source, &table.name, "stream");
    // Ids known from rows of earlier runs count as much as the one of this run.
    let known_id = match followed {
        Some((_, id)) => id.clone(),
        None => shared.known_table_id(&table.name).await,
    };
    if let (Some(known), Some(now)) = (&known_id, &identity.table_id)
        && known != now
    {
        health.stop_table(
            &table.name,
            "the source table was deleted and created anew: it is another table now",
            "Decide whether the replica should follow the new table; if so, delete this table's rows from the state table and start again",
        );
        return None;
    }
    match followed {
        Some((current, _)) if *current == arn => None,
        Some((current, _)) => {
            tracing::warn!(
                table = table.name,
                old = stream_label(current),
                new = stream_label(&arn),
                "the table's stream was re-created"
            );
            let detail = stream_label(&arn).to_owned();
            let at = rfc3339(host_ms());
            let reason = GapReason::StreamRecreated;
            let gap = GapRow::new(shared.epoch, &table.name, reason, &detail, at);
            shared.store_gap(&gap, "stream").await;
            *followed = Some((arn.clone(), identity.table_id));
            Some(arn)
        }
        None => {
            *followed = Some((arn.clone(), identity.table_id));
            Some(arn)
        }
    }
}

/// The shards of one stream.
struct Stream {
    context: Arc<TableContext>,
    table_id: Option<String>,
    listing: Vec<Shard>,
    listed: bool,
    /// Shards that had a row when the last listing began.
    known_before_listing: BTreeSet<ShardId>,
    /// Shards that the service itself does not know any more.
    gone: BTreeSet<ShardId>,
    /// Keys of the leases that a task of ours works on.
    running: HashMap<tokio::task::Id, String>,
    /// Whether a shard was left otherwise than finished or released.
    unclean: bool,
    next_listing: Instant,
    backoff: Backoff,
    tasks: JoinSet<Ended>,
    /// What health knows the listing by: an old stream's trouble is not a new one's.
    part: String,
    pulse: Arc<Pulse>,
    stop: CancellationToken,
}

/// Follows one stream until `stop`, then drains its shards. Returns whether all were.
async fn follow_stream(
    context: Arc<TableContext>,
    table_id: Option<String>,
    stop: CancellationToken,
) -> bool {
    context.shared.health.set_starting(&context.table.name);
    context.shared.health.listed(&context.table.name);
    let mut rows = context.shared.rows.clone();
    let part = format!("listing {}", stream_label(&context.stream_arn));
    let mut stream = Stream {
        table_id,
        listing: Vec::new(),
        listed: false,
        known_before_listing: BTreeSet::new(),
        gone: BTreeSet::new(),
        running: HashMap::new(),
        unclean: false,
        pulse: Arc::new(Pulse::start(
            &context.shared.health,
            &context.table.name,
            &part,
        )),
        part,
        next_listing: Instant::now(),
        backoff: Backoff::new(FIRST_PAUSE, LONGEST_PAUSE),
        tasks: JoinSet::new(),
        stop: stop.clone(),
        context,
    };
    loop {
        stream.pulse.beat();
        trouble("stream").await;
        let snapshot = rows.borrow_and_update().clone();
        if snapshot.read {
            match stream.step(&snapshot).await {
                Ok(()) => {}
                Err(fault) if stream.is_over(&fault) => {
                    tracing::info!(
                        table = stream.context.table.name,
                        stream = stream_label(&stream.context.stream_arn),
                        "an old stream is forgotten by the service; it is not followed any more"
                    );
                    let health = &stream.context.shared.health;
                    health.forget(&stream.context.table.name, &stream.part);
                    return true;
                }
                Err(fault) => stream.failed(&fault),
            }
        }
        // In order of priority:
        tokio::select! {
            biased;
            // 1. Asked to stop.
            () = stop.cancelled() => break,
            // 2. A shard ended: its children may start at once.
            Some(ended) = stream.tasks.join_next_with_id() => stream.on_ended(ended),
            // 3. The state table changed, or was read again: a lease may have expired.
            changed = rows.changed() => {
                if changed.is_err() {
                    break;
                }
            }
            // 4. A listing is due.
            () = stream.pulse.sleep_until(stream.next_listing) => {}
        }
    }
    // Every shard's task has the same token: they drain by themselves, within the grace.
    stream.unclean = false;
    while let Some(ended) = (stream.pulse)
        .during(stream.tasks.join_next_with_id())
        .await
    {
        stream.on_ended(ended);
    }
    !stream.unclean
}

impl Stream {
    /// Whether this is an old stream of its table that the service no longer knows, with nothing
    /// left to read. Its gap is recorded already.
    fn is_over(&self, fault: &Fault) -> bool {
        let context = &self.context;
        fault.operation == Operation::DescribeStream
            && fault.class == Class::NotFound
            && self.running.is_empty()
            && !context
                .shared
                .board
                .is_current_stream(&context.table.name, &context.stream_arn)
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
        self.next_listing = Instant::now() + self.backoff.pause();
    }

    fn on_ended(&mut self, ended: Result<(tokio::task::Id, Ended), tokio::task::JoinError>) {
        let table = &self.context.table.name;
        match ended {
            Ok((id, ended)) => {
                let lease = self.running.remove(&id);
                self.unclean |= matches!(ended, Ended::Lost | Ended::Kept);
                tracing::info!(table, lease, how = ?ended, "shard left");
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

    /// Lists if due, creates the rows that are missing, takes what may be read.
    async fn step(&mut self, snapshot: &Snapshot) -> Result<(), Fault> {
        let context = Arc::clone(&self.context);
        let shared = &context.shared;
        let rows: BTreeMap<ShardId, &ShardRow> = snapshot
            .shards
            .iter()
            .filter(|row| row.epoch == shared.epoch && row.stream_arn == context.stream_arn)
            .filter(|row| row.table == context.table.name)
            .map(|row| (row.shard(), row))
            .collect();
        if Instant::now() >= self.next_listing {
            // The one part of a step that may take long, and can be cut anywhere.
            let stop = self.stop.clone();
            // That it ends is watched by its outcome.
            let pulse = Arc::clone(&self.pulse);
            if let Some(listed) = pulse.during(until(&stop, self.list(&rows))).await {
                listed?;
            }
        }
        if !self.listed {
            return Ok(());
        }
        let stream = self.stream_row(snapshot).await?;
        let tracked: BTreeMap<ShardId, Tracked> = rows
            .iter()
            .map(|(id, row)| (id.clone(), row.tracked()))
            .collect();
        let plan = plan(&self.listing, true, &tracked, &self.gone);
        let created = !plan.create.is_empty();
        for shard in &plan.create {
            self.pulse.beat();
            // A shard found after the first listing starts at its beginning, whatever `start` says.
            let start = if stream.initialised {
                Position::TrimHorizon
            } else {
                stream.start()
            };
            self.create_row(shard, &start).await?;
        }
        if !stream.initialised {
            let mut done = stream.clone();
            done.initialised = true;
            shared.state.replace_stream(&done).await?;
        }
        if created || !stream.initialised {
            shared.rescan.notify_one();
        }
        for id in &plan.startable {
            self.pulse.beat();
            if self.stop.is_cancelled() {
                break;
            }
            if let Some(row) = rows.get(id)
                && snapshot.takeable.contains(&row.lease_key)
                && !self.running.values().any(|key| *key == row.lease_key)
            {
                self.start_shard(row).await?;
            }
        }
        // Last, so that trouble about one parent holds no other shard back.
        self.look_for_gone(&plan.missing_parents, &tracked).await?;
        self.backoff.reset();
        shared.health.set_started(&context.table.name);
        shared
            .health
            .succeeded(Scope::Source, &context.table.name, &self.part);
        shared
            .health
            .succeeded(Scope::State, &context.table.name, &self.part);
        Ok(())
    }

    async fn list(&mut self, rows: &BTreeMap<ShardId, &ShardRow>) -> Result<(), Fault> {
        let context = &self.context;
        trouble("discovery").await;
        self.known_before_listing = rows.keys().cloned().collect();
        let listing = context.shared.lister.all(&context.stream_arn).await?;
        self.listing = listing.shards;
        self.listed = true;
        context.shared.health.listed(&context.table.name);
        self.next_listing = Instant::now() + context.shared.config.worker.discover_every;
        Ok(())
    }

    /// The row that says where the first run of this stream started, made if it is not there.
    async fn stream_row(&self, snapshot: &Snapshot) -> Result<StreamRow, Fault> {
        let context = &self.context;
        let shared = &context.shared;
        let table = &context.table;
        let key = StreamRow::key(shared.epoch, &table.name, &context.stream_arn);
        if let Some(row) = snapshot.streams.iter().find(|row| row.lease_key == key) {
            return Ok(row.clone());
        }
        // The snapshot may be older than the row.
        if let Some(row) = shared.state.stream(&key).await? {
            return Ok(row);
        }
        let seen_before = snapshot
            .streams
            .iter()
            .any(|row| row.table == table.name && row.lease_key != key);
        // Resolved before the source is looked at, and a little early: what is written in between
        // is either seen there or replayed. Too early is right, too late is not.
        let start_timestamp = match table.start {
            // A re-created stream is read from its beginning.
            _ if seen_before => None,
            Start::TrimHorizon => None,
            Start::Latest => Some(shared.source.clock.now_ms() - LATEST_MARGIN_MS),
            Start::At(time) => Some(time.to_millis().unwrap_or(0) - LATEST_MARGIN_MS),
        };
        // The gap is durable before anything that would hide it.
        if seen_before {
            self.gap(GapReason::StreamRecreated).await;
        } else if !self.source_is_empty().await? {
            self.gap(GapReason::NeverCopied).await;
        }
        let row = StreamRow {
            lease_key: key,
            entity_type: "stream".to_owned(),
            format_version: FORMAT_VERSION,
            table: table.name.clone(),
            stream_arn: context.stream_arn.clone(),
            table_id: self.table_id.clone(),
            start_timestamp,
            initialised: false,
        };
        shared.state.create(&row).await?;
        // Somebody else may have been faster: what is stored counts.
        let stored = shared.state.stream(&row.lease_key).await?;
        Ok(stored.unwrap_or(row))
    }

    async fn gap(&self, reason: GapReason) {
        let context = &self.context;
        let detail = stream_label(&context.stream_arn);
        let at = rfc3339(host_ms());
        let gap = GapRow::new(
            context.shared.epoch,
            &context.table.name,
            reason,
            detail,
            at,
        );
        let stored = context.shared.store_gap(&gap, &self.part);
        self.pulse.during(stored).await;
    }

    async fn source_is_empty(&self) -> Result<bool, Fault> {
        let shared = &self.context.shared;
        let answer = shared
            .source
            .tables
            .scan()
            .table_name(self.context.table.name_in(&shared.source.label))
            .limit(1)
            .consistent_read(true)
            .send()
            .await
            .map_err(|error| crate::error::classify(Operation::ReadItems, &error))?;
        // A page that is empty and goes on proves nothing.
        Ok(answer.count == 0 && answer.last_evaluated_key.is_none_or(|key| key.is_empty()))
    }

    async fn create_row(&self, shard: &Shard, start: &Position) -> Result<(), Fault> {
        self.context
            .create_shard_row(&shard.id, shard.parent.as_ref(), start)
            .await
    }

    /// Asks the service about parents that neither a listing nor a row knows. Only a listing that
    /// began after the child was seen counts; otherwise one is due at once.
    async fn look_for_gone(
        &mut self,
        missing: &BTreeSet<ShardId>,
        tracked: &BTreeMap<ShardId, Tracked>,
    ) -> Result<(), Fault> {
        for parent in missing {
            self.pulse.beat();
            let child_was_known = tracked.iter().any(|(id, row)| {
                row.parent.as_ref() == Some(parent) && self.known_before_listing.contains(id)
            });
            if !child_was_known {
                self.next_listing = Instant::now();
                continue;
            }
            let context = &self.context;
            let lister = &context.shared.lister;
            if lister.is_gone(&context.stream_arn, parent).await? {
                tracing::info!(table = context.table.name, shard = %parent, "parent is gone: it counts as finished");
                self.gone.insert(parent.clone());
                context.shared.rescan.notify_one();
            }
        }
        Ok(())
    }

    /// Takes a lease and starts reading.
    async fn start_shard(&mut self, row: &ShardRow) -> Result<(), Fault> {
        let context = Arc::clone(&self.context);
        let shared = &context.shared;
        let Some(position) = row.position() else {
            shared.health.stop_table(
                &context.table.name,
                "a checkpoint in the state table is not readable",
                "Look at the row's `checkpoint`; a person or a newer version has changed it",
            );
            return Ok(());
        };
        let duration = shared.config.leases.duration;
        let taken = Lease::take(&shared.state, row.clone(), &shared.owner, duration).await?;
        let Some(lease) = taken else {
            return Ok(());
        };
        tracing::info!(
            table = context.table.name,
            shard = row.shard_id,
            checkpoint = row.checkpoint,
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
        let stop = self.stop.clone();
        let task = self.tasks.spawn(async move {
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
                stop,
            );
            tokio::select! {
                ended = consumed => ended,
                // Renewal ends only when the lease is lost; consume sees that as well, and gets to
                // clean up after itself.
                () = async {
                    lease.keep(&never, report).await;
                    std::future::pending::<()>().await;
                } => Ended::Lost,
                () = beyond_repair(&health, &table, &shard) => Ended::Lost,
            }
        });
        self.running.insert(task.id(), key);
        Ok(())
    }
}
