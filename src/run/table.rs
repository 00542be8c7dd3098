//! One table: which table it is, and which of its streams are followed.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::context::{Shared, TableContext};
use super::discovery::discovery;
use super::rows::Snapshot;
use super::stream::{Left, follow_stream, known_streams};
use crate::backoff::Backoff;
use crate::config::Table;
use crate::dynamo::table::{describe, enabled_stream, holds_new_images};
use crate::error::{Class, Fault, Operation};
use crate::lease::row::known_table_id;
use crate::mutation::trouble;
use crate::observe::health::Scope;
use crate::observe::metrics;
use crate::observe::pulse::Pulse;
use crate::stream::stream_label;
use crate::stream::succession::{current, to_follow};

const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Why a table is stopped whose source was deleted and created anew.
const ANOTHER_TABLE: &str =
    "the source table was deleted and created anew: it is another table now";

/// What the source says of a table now.
struct Identity {
    stream_arn: Option<String>,
    table_id: Option<String>,
}

/// A table and the streams of it that are followed.
struct Following {
    shared: Arc<Shared>,
    table: Table,
    pulse: Pulse,
    stop: CancellationToken,
    streams: JoinSet<Left>,
    /// The stream that each task follows.
    arns: HashMap<tokio::task::Id, String>,
    /// The stream that the table has now.
    current: Option<String>,
    /// The id of the source table when its stream was first followed.
    table_id: Option<String>,
}

/// Follows a table until `stop`: its current stream, and older ones until nothing of them is left.
/// Returns whether all its shards were drained and released.
pub async fn follow_table(shared: Arc<Shared>, table: Table, stop: CancellationToken) -> bool {
    metrics::begin(&table.name);
    let mut following = Following {
        pulse: Pulse::start(&shared.health, &table.name, "table"),
        shared,
        table,
        stop: stop.clone(),
        streams: JoinSet::new(),
        arns: HashMap::new(),
        current: None,
        table_id: None,
    };
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    while !stop.is_cancelled() {
        following.pulse.beat();
        trouble("table").await;
        let pause = match until(&stop, following.look()).await {
            None => break,
            Some(Ok(())) => {
                backoff.reset();
                following.shared.config.worker.discover_every
            }
            Some(Err(fault)) => {
                let health = &following.shared.health;
                health.failed(Scope::Source, &following.table.name, "table", &fault);
                backoff.pause()
            }
        };
        // The stop first: a stream that ends because of it is counted below.
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            () = following.pulse.sleep_until(Instant::now() + pause) => {}
            Some(ended) = following.streams.join_next_with_id(), if !stop.is_cancelled() => {
                if !following.on_ended(&ended) {
                    let _ = until(&stop, tokio::time::sleep(backoff.pause())).await;
                }
            }
        }
    }
    let Following {
        pulse, mut streams, ..
    } = following;
    drop(pulse);
    let mut drained = true;
    while let Some(ended) = streams.join_next().await {
        drained &= matches!(ended, Ok(Left::Drained | Left::Over));
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

impl Following {
    /// Looks at the source and follows what has to be followed.
    async fn look(&mut self) -> Result<(), Fault> {
        let shared = Arc::clone(&self.shared);
        let identity = self.pulse.during(identify(&shared, &self.table)).await?;
        let table = &self.table.name;
        shared.health.succeeded(Scope::Source, table, "table");
        // The rows of earlier runs know as much as this one does.
        let mut rows = shared.rows.clone();
        // That it is read is watched where it is read.
        let read = self.pulse.during(rows.wait_for(|snapshot| snapshot.read));
        let snapshot = match read.await {
            Ok(snapshot) => Arc::clone(&snapshot),
            // The reader of the state table is gone: the worker is ending.
            Err(_) => return Ok(()),
        };
        if identity.stream_arn.is_none() {
            let fault = Fault::own(
                Operation::DescribeStream,
                Class::NotFound,
                "no usable stream",
                "the source table has no stream with new images any more",
            );
            shared.health.failed(Scope::Source, table, "stream", &fault);
        } else {
            shared.health.succeeded(Scope::Source, table, "stream");
        }
        if self.is_another_table(&snapshot, &identity) {
            shared.health.stop_table(
                table,
                ANOTHER_TABLE,
                "Decide whether the replica should follow the new table; if so, delete this table's rows from the state table and start again",
            );
            return Ok(());
        }
        shared.health.unstop_table(table, ANOTHER_TABLE);
        self.follow_all(&snapshot, identity);
        Ok(())
    }

    /// Whether the source table is not the one that was followed, now or by an earlier run.
    fn is_another_table(&self, snapshot: &Snapshot, identity: &Identity) -> bool {
        let known = known_table_id(&snapshot.streams, self.shared.epoch, &self.table.name)
            .or(self.table_id.as_deref());
        matches!((known, identity.table_id.as_deref()), (Some(known), Some(now)) if known != now)
    }

    /// Starts a task for each stream that has to be followed and is not yet, oldest first.
    fn follow_all(&mut self, snapshot: &Snapshot, identity: Identity) {
        let known = known_streams(snapshot, self.shared.epoch, &self.table.name);
        if let Some(told) = &identity.stream_arn {
            let now = current(&known, told);
            if self.current.as_deref() != Some(now) {
                if let Some(old) = &self.current {
                    tracing::warn!(
                        table = self.table.name,
                        old = stream_label(old),
                        new = stream_label(now),
                        "the table's stream was re-created"
                    );
                }
                self.shared.board.set_stream(&self.table.name, now);
                self.current = Some(now.to_owned());
            }
        }
        self.table_id = identity.table_id.or(self.table_id.take());
        let current = self.current.clone();
        for arn in to_follow(&known, current.as_deref()) {
            if !self.arns.values().any(|followed| followed == arn) {
                self.follow(arn);
            }
        }
    }

    fn follow(&mut self, arn: &str) {
        if self.current.as_deref() == Some(arn) {
            self.shared.health.set_starting(&self.table.name);
        }
        let (discovery, duty) = discovery();
        let Some(context) = TableContext::of(&self.shared, &self.table, arn, discovery) else {
            return;
        };
        let (id, stop) = (self.table_id.clone(), self.stop.clone());
        let task = self.streams.spawn(follow_stream(context, duty, id, stop));
        self.arns.insert(task.id(), arn.to_owned());
    }

    /// A stream's task ended. Returns whether it was meant to; if not, it is started anew.
    fn on_ended(
        &mut self,
        ended: &Result<(tokio::task::Id, Left), tokio::task::JoinError>,
    ) -> bool {
        let (id, left) = match ended {
            Ok((id, left)) => (*id, Some(*left)),
            Err(error) => (error.id(), None),
        };
        let arn = self.arns.remove(&id).unwrap_or_default();
        let stream = stream_label(&arn);
        if left == Some(Left::Over) {
            tracing::info!(
                table = self.table.name,
                stream,
                "nothing of an old stream is left; it is not followed any more"
            );
            return true;
        }
        tracing::error!(
            table = self.table.name,
            stream,
            panicked = left.is_none(),
            "the task of a stream ended by itself; it starts over"
        );
        self.shared.health.task_died("stream", &self.table.name);
        false
    }
}
