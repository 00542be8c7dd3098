//! What the tasks of a worker share: the regions, the state table, health, and for each table its
//! writer.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, Semaphore, watch};

use super::rows::Snapshot;
use crate::apply::batch::Writer;
use crate::backoff::Backoff;
use crate::config::{Config, Table};
use crate::dead_letter::Store;
use crate::dynamo::RegionClients;
use crate::error::{Fault, Policy};
use crate::lease::doubts::until_ms;
use crate::lease::row::{GapRow, ShardRow};
use crate::lease::table::{StateTable, record_gap};
use crate::observe::board::Board;
use crate::observe::health::{Health, Scope};
use crate::stream::ShardId;
use crate::stream::listing::Lister;
use crate::stream::reader::Position;

/// How often the children of an ended shard are asked for before the whole stream is listed: the
/// answer may be empty at first.
const CHILDREN_ATTEMPTS: u32 = 10;
const CHILDREN_FIRST_PAUSE: Duration = Duration::from_millis(50);
const CHILDREN_LONGEST_PAUSE: Duration = Duration::from_secs(1);
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// What all tasks of a feeding worker share.
pub struct Shared {
    /// The configuration.
    pub config: Config,
    /// Number of the epoch all leases belong to.
    pub epoch: u64,
    /// This process start, as lease rows name it.
    pub owner: String,
    /// The active region.
    pub source: RegionClients,
    /// The region fed.
    pub target: RegionClients,
    /// The state table.
    pub state: StateTable,
    /// Writes to every replica, by the table's name in the configuration: replay and repair share
    /// its budget.
    pub writers: BTreeMap<String, Arc<Writer>>,
    /// Where dead letters go.
    pub dead_letters: Store,
    /// Dead letters on their way at once. Without a bound, mass poison would take every thread and
    /// connection there is.
    pub letters: Semaphore,
    /// Lists shards at one pace.
    pub lister: Lister,
    /// Live, ready, and why not.
    pub health: Arc<Health>,
    /// Where the shards stand.
    pub board: Arc<Board>,
    /// Snapshots of the state table.
    pub rows: watch::Receiver<Arc<Snapshot>>,
    /// Asks for a new snapshot.
    pub rescan: Arc<Notify>,
}

impl Shared {
    /// Until when a write given up now may take effect, by the replica region's clock.
    pub fn doubt_until_ms(&self) -> i64 {
        let late_effect = self.config.leases.late_effect;
        until_ms(self.target.clock.now_ms(), late_effect)
    }

    /// Stores a gap row, however long it takes. `part` is what health knows the caller by.
    pub async fn store_gap(&self, gap: &GapRow, part: &str) {
        let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
        while let Err(fault) = record_gap(&self.state, gap).await {
            self.health.failed(Scope::State, &gap.table, part, &fault);
            tokio::time::sleep(backoff.pause()).await;
        }
        self.health.succeeded(Scope::State, &gap.table, part);
        self.rescan.notify_one();
    }

    /// The id that the source table had when its stream was first followed.
    pub async fn known_table_id(&self, table: &str) -> Option<String> {
        let mut rows = self.rows.clone();
        let snapshot = rows.wait_for(|snapshot| snapshot.read).await.ok()?;
        snapshot
            .streams
            .iter()
            .filter(|row| row.table == table)
            .find_map(|row| row.table_id.clone())
    }
}

/// One stream of one table, and what is needed to replay it.
pub struct TableContext {
    /// What the whole worker shares.
    pub shared: Arc<Shared>,
    /// The table's configuration.
    pub table: Table,
    /// The stream being replayed.
    pub stream_arn: String,
    /// Writes to the replica.
    pub writer: Arc<Writer>,
}

impl TableContext {
    /// For the stream `stream_arn` of `table`; `None` for a table that is not configured.
    pub fn of(shared: &Arc<Shared>, table: &Table, stream_arn: &str) -> Option<Arc<Self>> {
        let writer = shared.writers.get(&table.name)?;
        Some(Arc::new(Self {
            writer: Arc::clone(writer),
            shared: Arc::clone(shared),
            table: table.clone(),
            stream_arn: stream_arn.to_owned(),
        }))
    }

    /// Makes the row of a shard that starts at `start`. One that is there already is as good.
    ///
    /// # Errors
    /// The fault of the call.
    pub async fn create_shard_row(
        &self,
        shard: &ShardId,
        parent: Option<&ShardId>,
        start: &Position,
    ) -> Result<(), Fault> {
        let shared = &self.shared;
        let row = ShardRow::new(
            shared.epoch,
            &self.table.name,
            &self.stream_arn,
            shard,
            parent,
            start,
            shared.source.clock.now_ms(),
        );
        shared.state.create(&row).await.map(|_| ())
    }

    /// Finds the children of an ended shard and sees to it that they have rows. The listing of
    /// children may lag behind the end of their parent, so it is asked several times, and then
    /// the whole stream is listed. A stream that was disabled has none.
    ///
    /// # Errors
    /// The fault of the call that failed.
    pub async fn children_of(&self, row: &ShardRow) -> Result<Vec<ShardId>, Fault> {
        let parent = row.shard();
        // A listing may have shown some already, and then they have rows.
        let known: Vec<ShardId> = self
            .shared
            .rows
            .borrow()
            .shards
            .iter()
            .filter(|other| other.stream_arn == row.stream_arn && other.epoch == row.epoch)
            .filter(|other| other.parent_shard_id.contains(&row.shard_id))
            .map(ShardRow::shard)
            .collect();
        let lister = &self.shared.lister;
        let mut backoff = Backoff::new(CHILDREN_FIRST_PAUSE, CHILDREN_LONGEST_PAUSE);
        let mut children = Vec::new();
        for _ in 0..CHILDREN_ATTEMPTS {
            children = match lister.children(&row.stream_arn, &parent).await {
                Ok(children) => children,
                // A server that does not know the filter, or no longer knows the parent: the whole
                // listing tells as much.
                Err(fault) if fault.policy() != Policy::Retry => break,
                Err(fault) => return Err(fault),
            };
            // Those known are no reason not to ask: a sibling must have its row as well.
            if !children.is_empty() || !known.is_empty() {
                break;
            }
            tokio::time::sleep(backoff.pause()).await;
        }
        if children.is_empty() && known.is_empty() {
            let listing = lister.all(&row.stream_arn).await?;
            children = listing
                .shards
                .into_iter()
                .filter(|shard| shard.parent.as_ref() == Some(&parent))
                .collect();
        }
        for child in &children {
            self.create_shard_row(&child.id, Some(&parent), &Position::TrimHorizon)
                .await?;
        }
        let all: BTreeSet<ShardId> = children
            .into_iter()
            .map(|child| child.id)
            .chain(known)
            .collect();
        Ok(all.into_iter().collect())
    }
}
