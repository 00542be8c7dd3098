//! What a running gateway knows: the database behind it, the streams in front of it, the faults,
//! the log. Everything here outlives single connections.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering::SeqCst};
use std::sync::{Arc, PoisonError, RwLock};

use dynoxide::Database;
use dynoxide::actions::list_streams::ListStreamsRequest;

use super::clock::{Clock, stream_label};
use super::dice::Seed;
use super::held::Held;
use super::keys::KeySchema;
use super::log::CallLog;
use super::options::Options;
use super::records;
use super::rules::Rules;
use super::shards::{OPEN_SHARDS_MAX, ShardError, ShardTree};
use super::stream::{State, Stream, StreamParts, View};
use super::upstream::Upstream;

pub(crate) struct Region {
    pub(crate) options: Options,
    /// The seed as this region draws from it.
    dice: Seed,
    pub(crate) clock: Clock,
    pub(crate) database: Database,
    pub(crate) upstream: Upstream,
    pub(crate) rules: Rules,
    pub(crate) log: CallLog,
    pub(crate) held: Held,
    pub(crate) round_trip_us: std::sync::atomic::AtomicU64,
    /// Connections taken so far.
    pub(crate) connections: std::sync::atomic::AtomicU64,
    /// Calls that write items share it; a call that changes a table or its stream has it alone,
    /// so that no write falls between the end of one stream and the start of the next.
    pub(crate) gate: tokio::sync::RwLock<()>,
    streams: RwLock<Streams>,
    schemas: RwLock<HashMap<String, KeySchema>>,
    now_every: Every,
}

#[derive(Default)]
struct Streams {
    by_arn: BTreeMap<String, Arc<Stream>>,
    /// The newest stream of each table name, enabled or not.
    newest: HashMap<String, Arc<Stream>>,
    last_label_ms: i64,
}

/// When things on schedule were done last, milliseconds by the gateway's clock.
#[derive(Default)]
struct Every {
    swept_ms: AtomicI64,
    /// Nothing rotates or splits by itself any more.
    reshards_no_more: AtomicBool,
}

impl Region {
    pub(crate) fn new(options: Options, database: Database, upstream: Upstream) -> Self {
        let resource = format!(
            "arn:aws:dynamodb:{}:{}:table/",
            options.region, options.account
        );
        let dice = options.seed.of(&options.region);
        let rules = Rules::new(dice, resource);
        for fault in &options.faults {
            rules.add(fault.clone());
        }
        let round_trip = u64::try_from(options.round_trip.as_micros()).unwrap_or(u64::MAX);
        Self {
            clock: Clock::default(),
            database,
            upstream,
            rules,
            log: CallLog::new(),
            held: Held::default(),
            round_trip_us: round_trip.into(),
            connections: 0.into(),
            gate: tokio::sync::RwLock::new(()),
            streams: RwLock::default(),
            schemas: RwLock::default(),
            now_every: Every::default(),
            dice,
            options,
        }
    }

    /// The prefix of this region's ARNs, up to the table's name.
    pub(crate) fn arn_prefix(&self) -> String {
        let Options {
            region, account, ..
        } = &self.options;
        format!("arn:aws:dynamodb:{region}:{account}:")
    }

    /// The key attributes of a table, or `None` if there is no such table.
    pub(crate) fn schema(&self, table: &str) -> Option<KeySchema> {
        let known = self.schemas.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(schema) = known.get(table) {
            return Some(schema.clone());
        }
        drop(known);
        let metadata = self.database.get_table_metadata(table).ok()??;
        let schema = KeySchema::parse(&metadata.key_schema)?;
        let mut known = self.schemas.write().unwrap_or_else(PoisonError::into_inner);
        known.insert(table.to_owned(), schema.clone());
        Some(schema)
    }

    /// Forgets what it knew of a table that was deleted.
    pub(crate) fn forget_schema(&self, table: &str) {
        let mut known = self.schemas.write().unwrap_or_else(PoisonError::into_inner);
        known.remove(table);
    }

    pub(crate) fn stream(&self, arn: &str) -> Option<Arc<Stream>> {
        let streams = self.streams.read().unwrap_or_else(PoisonError::into_inner);
        streams.by_arn.get(arn).cloned()
    }

    /// All streams, by ARN.
    pub(crate) fn streams(&self) -> Vec<Arc<Stream>> {
        let streams = self.streams.read().unwrap_or_else(PoisonError::into_inner);
        streams.by_arn.values().cloned().collect()
    }

    /// The newest stream of a table, enabled or not.
    pub(crate) fn newest_stream(&self, table: &str) -> Option<Arc<Stream>> {
        let streams = self.streams.read().unwrap_or_else(PoisonError::into_inner);
        streams.newest.get(table).cloned()
    }

    pub(crate) fn enabled_stream(&self, table: &str) -> Result<Arc<Stream>, ShardError> {
        let stream = self.newest_stream(table).filter(|s| s.is_enabled());
        stream.ok_or_else(|| ShardError::NoStream(table.to_owned()))
    }

    /// Opens the stream of a table whose stream the database has just enabled. With `from_start`
    /// it takes over what the database already recorded.
    pub(crate) fn open_stream(
        &self,
        table: &str,
        view: &str,
        from_start: bool,
    ) -> Option<Arc<Stream>> {
        let metadata = self.database.get_table_metadata(table).ok()??;
        let schema = KeySchema::parse(&metadata.key_schema)?;
        let inner_label = metadata.stream_label.unwrap_or_default();
        let inner_arn = dynoxide::streams::stream_arn(table, &inner_label);
        let taken = if from_start {
            0
        } else {
            records::newest_number(&self.database, table, &inner_arn)
        };
        let mut streams = self.streams.write().unwrap_or_else(PoisonError::into_inner);
        // Two streams of one millisecond must not share a label.
        let created_ms = self.clock.now_ms().max(streams.last_label_ms + 1);
        streams.last_label_ms = created_ms;
        let label = stream_label(created_ms);
        // The time would make every run another: the seed counts streams instead.
        let about = format!("{table} {}", streams.by_arn.len());
        let tree = ShardTree::new(self.dice, &about, self.options.shards, created_ms);
        let stream = Arc::new(Stream::new(StreamParts {
            arn: format!("{}table/{table}/stream/{label}", self.arn_prefix()),
            label,
            table: table.to_owned(),
            table_id: metadata.table_id.unwrap_or_default(),
            schema,
            view: View::named(view),
            created_ms,
            tree,
            taken,
        }));
        streams
            .by_arn
            .insert(stream.arn.clone(), Arc::clone(&stream));
        streams.newest.insert(table.to_owned(), Arc::clone(&stream));
        Some(stream)
    }

    /// Takes over what was written to a stream's table. Blocks as the database does.
    pub(crate) fn take_over(&self, stream: &Stream) {
        let ahead_us = self.clock.ahead_us();
        let taken = records::take_over(&self.database, &self.options.region, stream, ahead_us);
        if taken.is_err() && matches!(self.database.get_table_metadata(&stream.table), Ok(None)) {
            // The table was deleted without the gateway.
            stream.disable(self.clock.now_ms());
        }
    }

    /// Finds streams of tables that were made without the gateway.
    pub(crate) fn find_streams(&self) {
        let Ok(listed) = self.database.list_streams(ListStreamsRequest::default()) else {
            return;
        };
        for found in listed.streams {
            let known = self.newest_stream(&found.table_name);
            if known.as_ref().is_some_and(|stream| stream.is_enabled()) {
                continue;
            }
            let metadata = self.database.get_table_metadata(&found.table_name);
            let view = metadata.ok().flatten().and_then(|m| m.stream_view_type);
            let view = view.unwrap_or_default();
            self.open_stream(&found.table_name, &view, known.is_none());
        }
    }

    /// Does what is due: takes records over, rotates, splits, trims, sweeps. Blocks as the
    /// database does.
    pub(crate) fn tend(&self) {
        let now_ms = self.clock.now_ms();
        self.sweep_if_due(now_ms);
        for stream in self.streams() {
            self.take_over(&stream);
            let mut state = stream.state();
            let settled = self.now_every.reshards_no_more.load(SeqCst);
            if state.disabled_ms.is_none() && !settled {
                self.rotate_due(&mut state, now_ms);
                self.split_due(&stream, &mut state, now_ms);
            }
            state.tree.trim(now_ms, self.retention_ms());
        }
        self.forget_old_streams(now_ms);
    }

    /// Shards stay as they are from now on, unless somebody turns one.
    pub(crate) fn stop_resharding(&self) {
        self.now_every.reshards_no_more.store(true, SeqCst);
    }

    fn retention_ms(&self) -> i64 {
        i64::try_from(self.options.retention.as_millis()).unwrap_or(i64::MAX)
    }

    fn rotate_due(&self, state: &mut State, now_ms: i64) {
        let Some(every) = self.options.rotate_every else {
            return;
        };
        let every = i64::try_from(every.as_millis()).unwrap_or(i64::MAX);
        for id in state.tree.open_ids() {
            // Up to a quarter sooner, so that the shards do not all turn over in one moment.
            let sooner = every as f64 / 4.0 * self.dice.fraction(&id, 0);
            let age = state
                .tree
                .get(&id)
                .map_or(0, |shard| now_ms - shard.created_ms);
            if age >= every - sooner as i64 {
                // It is open: rotating it cannot fail.
                let _ = state.tree.rotate(&id, now_ms);
            }
        }
    }

    fn split_due(&self, stream: &Stream, state: &mut State, now_ms: i64) {
        let Some(every) = self.options.split_every else {
            return;
        };
        let every = i64::try_from(every.as_millis()).unwrap_or(i64::MAX);
        let open = state.tree.open_ids();
        if now_ms - state.split_ms < every || open.len() >= OPEN_SHARDS_MAX {
            return;
        }
        state.split_ms = now_ms;
        let pick = self.dice.bits(&stream.table, open.len() as u64);
        let pick = pick as usize % open.len().max(1);
        if let Some(id) = open.get(pick) {
            // A shard too narrow to split stays whole.
            let _ = state.tree.split(id, now_ms);
        }
    }

    fn sweep_if_due(&self, now_ms: i64) {
        let Some(every) = self.options.sweep_every else {
            return;
        };
        let every = i64::try_from(every.as_millis()).unwrap_or(i64::MAX);
        if now_ms - self.now_every.swept_ms.load(SeqCst) >= every {
            self.now_every.swept_ms.store(now_ms, SeqCst);
            if let Err(error) = self.database.sweep_ttl() {
                tracing::error!(%error, "the embedded DynamoDB did not sweep expired items");
            }
        }
    }

    /// A stream that was disabled is gone once its records would be.
    fn forget_old_streams(&self, now_ms: i64) {
        let horizon = now_ms.saturating_sub(self.retention_ms());
        let gone = |stream: &Arc<Stream>| stream.state().disabled_ms.is_some_and(|ms| ms < horizon);
        let mut streams = self.streams.write().unwrap_or_else(PoisonError::into_inner);
        streams.by_arn.retain(|_, stream| !gone(stream));
        streams.newest.retain(|_, stream| !gone(stream));
    }
}
