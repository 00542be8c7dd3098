//! What the tasks of a worker share: the regions, the state table, health, and for each table its
//! writer.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Notify, Semaphore, watch};

use super::ahead::Ahead;
use super::discovery::{Discovery, Surroundings};
use super::fleet::Fleet;
use super::halt::Halts;
use super::member::Member;
use super::rows::Snapshot;
use crate::apply::batch::Writer;
use crate::backoff::Backoff;
use crate::config::{Config, Table};
use crate::dead_letter::Store;
use crate::dynamo::RegionClients;
use crate::error::Fault;
use crate::lease::budget_keeper::BudgetKeeper;
use crate::lease::doubts::until_ms;
use crate::lease::row::{GapRow, ShardRow};
use crate::lease::table::{StateTable, record_gap};
use crate::lease::term::Term;
use crate::observe::board::Board;
use crate::observe::health::{Health, Scope};
use crate::observe::metrics;
use crate::observe::metrics::replay::Replay;
use crate::stream::listing::Lister;
use crate::stream::reader::Position;
use crate::stream::{ShardId, stream_label};

const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// What all tasks of a feeding worker share.
pub struct Shared {
    /// The configuration.
    pub config: Config,
    /// Number of the epoch all leases belong to.
    pub epoch: u64,
    /// The right to write in that epoch.
    pub term: Arc<Term>,
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
    /// This worker's shares of the write budgets.
    pub budgets: BudgetKeeper,
    /// Where dead letters go.
    pub dead_letters: Store,
    /// Dead letters on their way at once. Without a bound, mass poison would take every thread and
    /// connection there is.
    pub letters: Semaphore,
    /// Tables audited at once.
    pub audits: Semaphore,
    /// Tables copied or repaired at once: each takes memory, and looks at the state table.
    pub copies: Semaphore,
    /// What was refused lately, and which tables are halted for it.
    pub halts: Halts,
    /// What shards hold and have in flight.
    pub ahead: Arc<Ahead>,
    /// Lists shards at one pace.
    pub lister: Lister,
    /// Live, ready, and why not.
    pub health: Arc<Health>,
    /// Where the shards stand.
    pub board: Arc<Board>,
    /// Snapshots of the state table.
    pub rows: watch::Receiver<Arc<Snapshot>>,
    /// This worker's part in the fleet.
    pub fleet: Arc<Fleet>,
    /// The row that says that it lives.
    pub member: Member,
    /// Asks for a new snapshot.
    pub rescan: Arc<Notify>,
}

impl Shared {
    /// Until when a write given up now may take effect, by the replica region's clock.
    pub fn doubt_until_ms(&self) -> i64 {
        let late_effect = self.config.leases.late_effect;
        until_ms(self.target.clock.now_ms(), late_effect)
    }

    /// Whether the epoch still allows to write: repairs are right in one direction only, and that is its
    /// epoch's.
    pub fn is_in_epoch(&self) -> bool {
        !self.term.over().is_cancelled()
    }

    /// Stores a gap row, however long it takes. `part` is what health knows the caller by. Returns it as
    /// it is stored.
    pub async fn store_gap(&self, gap: &GapRow, part: &str) -> GapRow {
        let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
        loop {
            match record_gap(&self.state, gap).await {
                Ok(stored) => {
                    self.health.succeeded(Scope::State, &gap.table, part);
                    self.rescan.notify_one();
                    return stored;
                }
                Err(fault) => self.health.failed(Scope::State, &gap.table, part, &fault),
            }
            tokio::time::sleep(backoff.pause()).await;
        }
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
    /// Lists the stream.
    pub discovery: Discovery,
    /// What each replayed record moves.
    pub meters: Replay,
}

impl TableContext {
    /// For the stream `stream_arn` of `table`; `None` for a table that is not configured.
    /// `discovery` lists it.
    pub fn of(
        shared: &Arc<Shared>,
        table: &Table,
        stream_arn: &str,
        discovery: Discovery,
    ) -> Option<Arc<Self>> {
        let writer = shared.writers.get(&table.name)?;
        Some(Arc::new(Self {
            writer: Arc::clone(writer),
            shared: Arc::clone(shared),
            table: table.clone(),
            stream_arn: stream_arn.to_owned(),
            discovery,
            meters: Replay::of(&table.name, &shared.board),
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

    /// Finds the children of an ended shard and sees to it that they have rows. A stream that was
    /// disabled has none. Waits until the service answers, and may be dropped while it does.
    ///
    /// # Errors
    /// The fault of the state table.
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
        let children = self.discovery.children(&parent, !known.is_empty()).await;
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

    /// Whether this is the stream that the table has now.
    pub fn is_current(&self) -> bool {
        let board = &self.shared.board;
        board.is_current_stream(&self.table.name, &self.stream_arn)
    }

    /// What health knows the stream's own trouble by: an old stream's is not a new one's.
    pub fn part(&self) -> String {
        format!("listing {}", stream_label(&self.stream_arn))
    }
}

impl Surroundings for TableContext {
    fn paged(&self) {
        let board = &self.shared.board;
        board.note_listing(&self.table.name, &self.stream_arn, None);
    }

    fn listed(&self, began: Instant) {
        let board = &self.shared.board;
        board.note_listing(&self.table.name, &self.stream_arn, Some(began));
        self.shared.health.listed(&self.table.name);
    }

    fn succeeded(&self) {
        let health = &self.shared.health;
        health.succeeded(Scope::Source, &self.table.name, &self.part());
    }

    fn failed(&self, fault: &Fault) {
        metrics::retried(&self.table.name, fault.class);
        let health = &self.shared.health;
        health.failed(Scope::Source, &self.table.name, &self.part(), fault);
    }

    fn died(&self) {
        self.shared.health.task_died("discovery", &self.table.name);
    }

    fn is_replaced(&self) -> bool {
        !self.is_current()
    }
}
