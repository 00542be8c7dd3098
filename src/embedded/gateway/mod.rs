//! A DynamoDB that does to its clients what AWS does.
//!
//! No server that runs on a developer's machine reshards, throttles, forgets or answers late. A
//! [`Gateway`] is an HTTP server on a free loopback port in front of an embedded one: it passes
//! table calls on and serves the Streams API itself from the real records, with many shards,
//! splits, rotations and trimming; and it does harm on request, by a short list of [`Fault`]s.
//!
//! ```text
//!           ┌ log ─▶ rules (faults.rs, dice.rs) ─▶ held ─▶ admission (throttle.rs) ─┐
//! server ─▶ call                                                                    ▼
//!           └◀─────────────── answer ◀── streams (shards.rs) │ tables │ upstream ◀──┘
//!                                            ▲
//!                       records: taken over from the database's own stream
//! ```
//!
//! One [`Seed`] decides everything left to chance; it is printed when a test fails, and
//! `FARSHORE_TEST_SEED` repeats it.

mod admission;
mod body;
mod call;
mod clock;
mod dice;
mod faults;
mod hash;
mod held;
mod iterator;
mod keys;
mod listing;
mod log;
mod options;
mod protocol;
mod records;
mod region;
mod rules;
mod sequence;
mod server;
mod shard_log;
mod shards;
mod stream;
mod streams;
mod tables;
mod throttle;
mod touched;
mod upstream;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::watch;

pub use dice::{SEED_VARIABLE, Seed};
pub use faults::{Fault, Limit};
pub use held::HeldWrite;
pub use keys::Key;
pub use log::{CALLS_MAX, Call, Outcome};
pub use options::Options;
pub use rules::FaultHandle;
pub use shards::ShardError;

use super::server::{EmbeddedServer, StartError};
use region::Region;
use server::Reach;

/// How often records are taken over and schedules looked at.
const TEND_EVERY: Duration = Duration::from_millis(20);

/// A shard as a test sees it, whatever listings show of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardView {
    /// Its id.
    pub id: String,
    /// Its parent's id; the parent may be trimmed.
    pub parent: Option<String>,
    /// Whether records can still arrive.
    pub open: bool,
    /// How many records it holds, trimmed ones not counted.
    pub records: usize,
}

/// How a region goes away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outage {
    /// Open connections are cut, new ones refused.
    Refused,
    /// Connections are taken and never answered; what was under way is not answered either.
    Silent,
}

/// One region: an embedded DynamoDB with a gateway in front. It ends when it is dropped.
pub struct Gateway {
    region: Arc<Region>,
    embedded: EmbeddedServer,
    address: SocketAddr,
    wanted: watch::Sender<Reach>,
    reached: watch::Receiver<Reach>,
}

impl Gateway {
    /// Starts an empty embedded DynamoDB and a gateway in front of it, on free loopback ports.
    ///
    /// # Errors
    /// [`StartError`] if the database could not be opened or no port could be bound.
    pub async fn start(options: Options) -> Result<Self, StartError> {
        Self::in_front_of(EmbeddedServer::start().await?, options).await
    }

    /// Starts a gateway in front of a server that may hold tables; their streams are found with
    /// all records they have.
    ///
    /// # Errors
    /// [`StartError`] if no port could be bound.
    pub async fn in_front_of(
        embedded: EmbeddedServer,
        options: Options,
    ) -> Result<Self, StartError> {
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        let listen = |source| StartError::Listen { address, source };
        let listener = TcpListener::bind(address).await.map_err(listen)?;
        let address = listener.local_addr().map_err(listen)?;
        let uri = embedded.endpoint_url().parse();
        let uri = uri.map_err(|error| StartError::Database(format!("{error}")))?;
        let upstream = upstream::Upstream::new(uri);
        let region = Region::new(options, embedded.database().clone(), upstream);
        region.find_streams();
        let region = Arc::new(region);
        let (wanted, asked) = watch::channel(Reach::Up);
        let (reports, reached) = watch::channel(Reach::Up);
        tokio::spawn(tend(Arc::clone(&region), asked.clone()));
        tokio::spawn(server::run(
            listener,
            address,
            Arc::clone(&region),
            asked,
            reports,
        ));
        Ok(Self {
            region,
            embedded,
            address,
            wanted,
            reached,
        })
    }

    /// The address it listens on.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The endpoint URL for SDK clients, tables and streams alike.
    pub fn endpoint_url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The seed of everything left to chance.
    pub fn seed(&self) -> Seed {
        self.region.options.seed
    }

    /// The server behind it, which does no harm: for a checker that must not meet faults.
    pub fn embedded(&self) -> &EmbeddedServer {
        &self.embedded
    }

    /// The server behind it, to cut it and let it serve again: the gateway then answers table calls
    /// with 500.
    pub fn embedded_mut(&mut self) -> &mut EmbeddedServer {
        &mut self.embedded
    }

    /// Adds a fault to the end of the list.
    pub fn inject(&self, fault: Fault) -> FaultHandle {
        self.region.rules.add(fault)
    }

    /// Takes all faults off the list; writes that are held back stay so.
    pub fn clear_faults(&self) {
        self.region.rules.clear();
    }

    /// Sets the latency added to every call from now on.
    pub fn set_round_trip(&self, time: Duration) {
        let time = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.region.round_trip_us.store(time, Ordering::Relaxed);
    }

    /// How many connections were made to it so far.
    pub fn connections(&self) -> u64 {
        self.region.connections.load(Ordering::Relaxed)
    }

    /// Every call so far, oldest first.
    pub fn calls(&self) -> Vec<Call> {
        self.calls_where(|_| true)
    }

    /// The calls of one operation.
    pub fn calls_of(&self, operation: &str) -> Vec<Call> {
        self.calls_where(|call| call.operation == operation)
    }

    /// The calls that satisfy a condition.
    pub fn calls_where(&self, wanted: impl Fn(&Call) -> bool) -> Vec<Call> {
        self.region.log.matching(wanted)
    }

    /// The number the next call will have: a mark to tell later calls from earlier ones.
    pub fn next_call(&self) -> u64 {
        self.region.log.next()
    }

    /// How many calls the log had to forget, beyond [`CALLS_MAX`].
    pub fn calls_forgotten(&self) -> u64 {
        self.region.log.forgotten()
    }

    /// The writes that are held back, oldest first.
    pub fn held(&self) -> Vec<HeldWrite> {
        self.region.held.list()
    }

    /// Waits until so many writes at least are held back; false if `patience` ran out first.
    pub async fn wait_for_held(&self, count: usize, patience: Duration) -> bool {
        self.region.held.reaches(count, patience).await
    }

    /// Carries out a write that is held back, whoever has given it up meanwhile, and waits for its
    /// effect.
    ///
    /// # Errors
    /// What refused it: the code of the answer, or that no such call is held back.
    pub async fn deliver(&self, call: u64) -> Result<(), String> {
        self.region.held.deliver(call).await
    }

    /// The ARN of a table's newest stream, enabled or not.
    pub fn stream_arn(&self, table: &str) -> Option<String> {
        self.region
            .newest_stream(table)
            .map(|stream| stream.arn.clone())
    }

    /// The shards of a table's newest stream, oldest first, with all that was written so far.
    pub fn shards(&self, table: &str) -> Vec<ShardView> {
        let Some(stream) = self.region.newest_stream(table) else {
            return Vec::new();
        };
        self.region.take_over(&stream);
        let state = stream.state();
        let view = |shard: &shards::Shard| ShardView {
            id: shard.id.clone(),
            parent: shard.parent.clone(),
            open: shard.is_open(),
            records: shard.log.records().count(),
        };
        state.tree.iter().map(view).collect()
    }

    /// Closes a shard and opens two in its place; their ids.
    ///
    /// # Errors
    /// [`ShardError`] if it is not an open shard of the table's enabled stream.
    pub fn split(&self, table: &str, shard: &str) -> Result<[String; 2], ShardError> {
        let stream = self.region.enabled_stream(table)?;
        self.region.take_over(&stream);
        let now_ms = self.region.clock.now_ms();
        stream.state().tree.split(shard, now_ms)
    }

    /// Closes a shard and opens one in its place; its id.
    ///
    /// # Errors
    /// [`ShardError`] if it is not an open shard of the table's enabled stream.
    pub fn rotate(&self, table: &str, shard: &str) -> Result<String, ShardError> {
        let stream = self.region.enabled_stream(table)?;
        self.region.take_over(&stream);
        let now_ms = self.region.clock.now_ms();
        stream.state().tree.rotate(shard, now_ms)
    }

    /// Rotates all open shards of a table; the ids of the new ones.
    ///
    /// # Errors
    /// [`ShardError`] if the table has no enabled stream.
    pub fn rotate_all(&self, table: &str) -> Result<Vec<String>, ShardError> {
        let stream = self.region.enabled_stream(table)?;
        self.region.take_over(&stream);
        let now_ms = self.region.clock.now_ms();
        let mut state = stream.state();
        let open = state.tree.open_ids();
        open.iter()
            .map(|id| state.tree.rotate(id, now_ms))
            .collect()
    }

    /// Trims every record written so far to a table, as if it were old; shards stay.
    pub fn trim(&self, table: &str) {
        if let Some(stream) = self.region.newest_stream(table) {
            self.region.take_over(&stream);
            stream.state().tree.trim_records(i64::MAX);
        }
    }

    /// Ends what `rotate_every` and `split_every` began. Who reads slower than shards are made would
    /// never come to their end.
    pub fn stop_resharding(&self) {
        self.region.stop_resharding();
    }

    /// Sets the gateway's clock forward: records and iterators grow older, schedules fall due.
    /// Signatures and capacity go by the system's clock.
    pub fn advance(&self, time: Duration) {
        // What was written until now was written before the jump.
        self.region.tend();
        self.region.clock.advance(time);
        self.region.tend();
    }

    /// Deletes the items whose time to live is over, as the service `dynamodb.amazonaws.com`;
    /// how many it deleted.
    ///
    /// # Errors
    /// What the database said.
    pub fn sweep_ttl(&self) -> Result<usize, String> {
        self.region
            .database
            .sweep_ttl()
            .map_err(|error| error.to_string())
    }

    /// Takes the region away.
    pub async fn go_away(&mut self, outage: Outage) {
        self.reach(match outage {
            Outage::Refused => Reach::Refused,
            Outage::Silent => Reach::Silent,
        })
        .await;
    }

    /// Brings the region back, on the same port with the same data.
    pub async fn come_back(&mut self) {
        self.reach(Reach::Up).await;
    }

    async fn reach(&mut self, reach: Reach) {
        // Both fail only once the gateway's task has ended, which it has logged.
        let _ = self.wanted.send(reach);
        let _ = self.reached.wait_for(|reached| *reached == reach).await;
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        // Nobody listens if the runtime has ended already.
        let _ = self.wanted.send(Reach::Stopped);
        self.region.held.abandon();
        if std::thread::panicking() {
            let Options { region, seed, .. } = &self.region.options;
            eprintln!("the gateway of {region} ran with {SEED_VARIABLE}={seed}");
        }
    }
}

/// Tends a region until its gateway is dropped.
async fn tend(region: Arc<Region>, mut asked: watch::Receiver<Reach>) {
    let mut turns = tokio::time::interval(TEND_EVERY);
    turns.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            stopped = asked.wait_for(|reach| *reach == Reach::Stopped) => {
                drop(stopped);
                return;
            }
            _ = turns.tick() => {}
        }
        let region = Arc::clone(&region);
        if tokio::task::spawn_blocking(move || region.tend())
            .await
            .is_err()
        {
            // It panicked, which has been logged, or the runtime is ending.
            return;
        }
    }
}
