//! How a gateway behaves when no fault is on.

use std::time::Duration;

use super::dice::Seed;
use super::faults::Fault;

/// AWS keeps stream records for a day.
const RETENTION: Duration = Duration::from_secs(24 * 60 * 60);
/// AWS's iterators live a quarter of an hour.
const ITERATOR_LIFE: Duration = Duration::from_secs(15 * 60);
/// AWS lists at most this many shards or streams a page.
pub(crate) const LISTING_PAGE_MAX: usize = 100;

/// What a gateway is started with.
///
/// ```
/// use std::time::Duration;
/// use farshore::embedded::gateway::{Fault, Options};
///
/// let options = Options::new(7)
///     .shards(8)
///     .rotate_every(Duration::from_secs(2))
///     .fault(Fault::error_after().on("BatchWriteItem").chance(0.1));
/// ```
#[derive(Clone, Debug)]
pub struct Options {
    pub(crate) seed: Seed,
    pub(crate) region: String,
    pub(crate) account: String,
    pub(crate) shards: usize,
    pub(crate) rotate_every: Option<Duration>,
    pub(crate) split_every: Option<Duration>,
    pub(crate) sweep_every: Option<Duration>,
    pub(crate) retention: Duration,
    pub(crate) iterator_life: Duration,
    pub(crate) describe_page: usize,
    pub(crate) round_trip: Duration,
    pub(crate) metered: bool,
    pub(crate) faults: Vec<Fault>,
}

impl Options {
    /// One shard a stream, no schedule, no fault; AWS's own times and limits. What is left to
    /// chance follows from `seed`, or from the variable `FARSHORE_TEST_SEED` if that is set.
    pub fn new(seed: u64) -> Self {
        Self::with(Seed::new(seed))
    }

    /// As [`new`](Self::new), with a seed nobody chose.
    pub fn random() -> Self {
        Self::with(Seed::random())
    }

    fn with(seed: Seed) -> Self {
        Self {
            seed,
            region: "us-east-1".to_owned(),
            account: "000000000000".to_owned(),
            shards: 1,
            rotate_every: None,
            split_every: None,
            sweep_every: None,
            retention: RETENTION,
            iterator_life: ITERATOR_LIFE,
            describe_page: LISTING_PAGE_MAX,
            round_trip: Duration::ZERO,
            metered: false,
            faults: Vec::new(),
        }
    }

    /// The region in ARNs and records; `us-east-1` by default.
    pub fn region(mut self, name: &str) -> Self {
        name.clone_into(&mut self.region);
        self
    }

    /// The account in ARNs; twelve zeros by default.
    pub fn account(mut self, number: &str) -> Self {
        number.clone_into(&mut self.account);
        self
    }

    /// The shards a new stream starts with, one at least.
    pub fn shards(mut self, count: usize) -> Self {
        self.shards = count.max(1);
        self
    }

    /// Every open shard gives way to one child about this long after it was opened (up to a
    /// quarter sooner, as the seed has it), as AWS's do about every four hours.
    pub fn rotate_every(mut self, time: Duration) -> Self {
        self.rotate_every = Some(time);
        self
    }

    /// One open shard of each stream, picked by the seed, splits into two this often, up to 64
    /// open shards.
    pub fn split_every(mut self, time: Duration) -> Self {
        self.split_every = Some(time);
        self
    }

    /// Deletes items whose time to live is over this often; never by default.
    pub fn sweep_ttl_every(mut self, time: Duration) -> Self {
        self.sweep_every = Some(time);
        self
    }

    /// How long records and closed shards are kept; a day by default.
    pub fn retention(mut self, time: Duration) -> Self {
        self.retention = time;
        self
    }

    /// How long an iterator is good for; 15 minutes by default.
    pub fn iterator_life(mut self, time: Duration) -> Self {
        self.iterator_life = time;
        self
    }

    /// Shards in a page of DescribeStream at most, from 1 to 100; 100 by default.
    pub fn describe_page(mut self, shards: usize) -> Self {
        self.describe_page = shards.clamp(1, LISTING_PAGE_MAX);
        self
    }

    /// Latency added to every call: half before and half after its effect.
    pub fn round_trip(mut self, time: Duration) -> Self {
        self.round_trip = time;
        self
    }

    /// Measures the write units of every write for the call log, which costs a read each.
    pub fn metered(mut self) -> Self {
        self.metered = true;
        self
    }

    /// Adds a fault.
    pub fn fault(mut self, fault: Fault) -> Self {
        self.faults.push(fault);
        self
    }
}
