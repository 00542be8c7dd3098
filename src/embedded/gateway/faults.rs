//! What a gateway does to its clients, as a small list: each fault names what it does, to which
//! calls, how often. `docs/GATEWAY.md` has a sentence on each.

use std::ops::Range;
use std::time::Duration;

use super::protocol::{Failure, is_read, is_streams, is_write};

/// The limit a throttling error names in its reasons.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// `…ProvisionedThroughputExceeded`: the whole table is slowed.
    Provisioned,
    /// `…KeyRangeThroughputExceeded`: only one range of keys is slowed.
    KeyRange,
    /// `…AccountLimitExceeded`: the account's quota is used up.
    Account,
    /// `…MaxOnDemandThroughputExceeded`: the table's own maximum is used up.
    MaxOnDemand,
}

impl Limit {
    /// The reason as the SDK spells it, such as `TableWriteKeyRangeThroughputExceeded`.
    pub(crate) fn reason(self, operation: &str) -> String {
        let side = if is_read(operation) { "Read" } else { "Write" };
        let limit = match self {
            Self::Provisioned => "ProvisionedThroughputExceeded",
            Self::KeyRange => "KeyRangeThroughputExceeded",
            Self::Account => "AccountLimitExceeded",
            Self::MaxOnDemand => "MaxOnDemandThroughputExceeded",
        };
        format!("Table{side}{limit}")
    }
}

/// What a fault does.
#[derive(Clone, Debug)]
pub(crate) enum Kind {
    /// Refuses before any effect.
    Refuse(Failure),
    /// Throttles by chance, with a reason.
    Throttle { limit: Limit, code: &'static str },
    /// Throttles by real use of write units.
    Capacity {
        rate: f64,
        burst: f64,
        ranges: usize,
    },
    /// Refuses calls beyond a rate.
    CallRate { rate: f64 },
    /// Sends a share of a batch back.
    Unprocessed { share: f64 },
    /// Carries out, then answers with an error.
    FailAfter(Failure),
    /// Holds a write back; `hang_up` cuts its connection at once.
    Hold {
        time: Option<Duration>,
        hang_up: bool,
    },
    /// Refuses signatures older than this.
    StaleSignature { age: Duration },
    /// Waits before the effect.
    Delay(Duration),
    /// Waits after the effect.
    SlowAnswer(Duration),
    /// Breaks the connection before any effect.
    Cut,
    /// Carries out and breaks the connection without an answer.
    CutAfter,
    /// Carries out and breaks the connection in the middle of the answer.
    CutWithin,
    /// GetRecords answers nothing and goes on later.
    EmptyPage,
    /// GetRecords answers fewer records than it could.
    ShortPage,
    /// The last page of a shard gives another iterator, to an empty page.
    EmptyLastPage,
    /// Children are listed this long after they were made.
    LateChildren { time: Duration },
    /// A closed parent is listed as open for this long.
    OpenParents { time: Duration },
    /// A listing leaves a shard out, each shard once.
    MissingShard,
    /// The first so many CHILD_SHARDS answers for a parent are empty.
    EmptyChildren { first: u64 },
}

/// One fault: what happens, and to which calls.
///
/// ```
/// use farshore::embedded::gateway::{Fault, Limit};
///
/// let fault = Fault::throttle(Limit::KeyRange).on("BatchWriteItem").chance(0.1).times(20);
/// ```
#[derive(Clone, Debug)]
pub struct Fault {
    pub(crate) kind: Kind,
    pub(crate) name: String,
    operations: Vec<String>,
    tables: Vec<String>,
    key: Option<String>,
    range: Option<Range<f64>>,
    pub(crate) chance: f64,
    pub(crate) times: u64,
    pub(crate) skip: u64,
    pub(crate) starts_on: bool,
}

impl Fault {
    fn new(name: &str, kind: Kind) -> Self {
        Self {
            kind,
            name: name.to_owned(),
            operations: Vec::new(),
            tables: Vec::new(),
            key: None,
            range: None,
            chance: 1.0,
            times: u64::MAX,
            skip: 0,
            starts_on: true,
        }
    }

    /// `ProvisionedThroughputExceededException` with its reason; by default on writes.
    pub fn throttle(limit: Limit) -> Self {
        let code = "ProvisionedThroughputExceededException";
        Self::new("throttle", Kind::Throttle { limit, code })
    }

    /// `ThrottlingException` with its reason; by default on writes. On the Streams API it has no
    /// reasons and is not modelled by the SDK.
    pub fn throttling_exception(limit: Limit) -> Self {
        let code = "ThrottlingException";
        Self::new("throttling exception", Kind::Throttle { limit, code })
    }

    /// A table has `units_per_second` write units and a second's worth of them in reserve; what
    /// goes beyond is throttled, in part for batches. A table each if it names several or none.
    pub fn capacity(units_per_second: f64) -> Self {
        let kind = Kind::Capacity {
            rate: units_per_second,
            burst: units_per_second,
            ranges: 1,
        };
        Self::new("capacity", kind)
    }

    /// Refuses what goes beyond so many calls a second with `LimitExceededException`: of an
    /// operation, or of GetRecords and GetShardIterator for a shard. By default on DescribeStream,
    /// which AWS allows 10 times a second.
    pub fn call_rate(calls_per_second: f64) -> Self {
        let rate = calls_per_second;
        Self::new("call rate", Kind::CallRate { rate })
    }

    /// Sends this share of a batch back as `UnprocessedItems`, one item at least; a batch of one
    /// is throttled whole, as on AWS. By default on BatchWriteItem; on BatchGetItem the share comes
    /// back as `UnprocessedKeys`, and a batch of one is read.
    pub fn unprocessed(share: f64) -> Self {
        Self::new("unprocessed items", Kind::Unprocessed { share })
    }

    /// 500 `InternalServerError` without any effect; by default on everything.
    pub fn error_before() -> Self {
        Self::new("500 before", Kind::Refuse(Failure::internal()))
    }

    /// 500 `InternalServerError` after the write took effect; by default on writes.
    pub fn error_after() -> Self {
        Self::new("500 after", Kind::FailAfter(Failure::internal()))
    }

    /// Any error at all before any effect, such as a code the SDK does not model.
    pub fn code(status: u16, code: &str, message: &str) -> Self {
        Self::new(code, Kind::Refuse(Failure::new(status, code, message)))
    }

    /// 503 `ServiceUnavailable`.
    pub fn unavailable() -> Self {
        Self::code(
            503,
            "ServiceUnavailable",
            "The service is currently unavailable",
        )
    }

    /// 400 `AccessDeniedException`; use [`on`](Self::on) to name the actions.
    pub fn access_denied() -> Self {
        let message = "User is not authorized to perform this action";
        Self::code(400, "AccessDeniedException", message)
    }

    /// 400 `ExpiredIteratorException`, by default on GetRecords, however young the iterator is.
    pub fn expired_iterator() -> Self {
        let message = "Iterator expired";
        Self::code(400, "ExpiredIteratorException", message).on("GetRecords")
    }

    /// 400 `TrimmedDataAccessException`, by default on GetRecords and GetShardIterator.
    pub fn trimmed() -> Self {
        let message = "Attempt to access trimmed data";
        let fault = Self::code(400, "TrimmedDataAccessException", message);
        fault.on("GetRecords").on("GetShardIterator")
    }

    /// Holds a write back, unanswered, and carries it out after `time`: later than its client's
    /// timeout, its lease, newer writes. By default on writes.
    pub fn hold(time: Duration) -> Self {
        let kind = Kind::Hold {
            time: Some(time),
            hang_up: false,
        };
        Self::new("hold", kind)
    }

    /// Holds a write back until the test delivers it
    /// ([`Gateway::deliver`](super::Gateway::deliver)). By default on writes.
    pub fn hold_until_delivered() -> Self {
        let kind = Kind::Hold {
            time: None,
            hang_up: false,
        };
        Self::new("hold until delivered", kind)
    }

    /// Refuses requests signed longer ago than `age` with `InvalidSignatureException`, by the
    /// system's clock; what was held or delayed is judged again when its time has come.
    pub fn stale_signature(age: Duration) -> Self {
        Self::new("stale signature", Kind::StaleSignature { age })
    }

    /// Waits before the effect; by default on everything.
    pub fn delay(time: Duration) -> Self {
        Self::new("delay", Kind::Delay(time))
    }

    /// Waits between the effect and the answer; by default on everything.
    pub fn slow_answer(time: Duration) -> Self {
        Self::new("slow answer", Kind::SlowAnswer(time))
    }

    /// Breaks the connection before any effect; by default on everything.
    pub fn cut() -> Self {
        Self::new("cut", Kind::Cut)
    }

    /// Carries the call out and breaks the connection without an answer.
    pub fn cut_after() -> Self {
        Self::new("cut after", Kind::CutAfter)
    }

    /// Carries the call out and breaks the connection in the middle of the answer.
    pub fn cut_within() -> Self {
        Self::new("cut within", Kind::CutWithin)
    }

    /// GetRecords answers no records though there are some, and an iterator to the same place.
    pub fn empty_page() -> Self {
        Self::new("empty page", Kind::EmptyPage)
    }

    /// GetRecords answers only some of the records it could.
    pub fn short_page() -> Self {
        Self::new("short page", Kind::ShortPage)
    }

    /// The last records of a closed shard come with an iterator, which leads to an empty page
    /// without one. Without this fault the last page carries records.
    pub fn empty_last_page() -> Self {
        Self::new("empty last page", Kind::EmptyLastPage)
    }

    /// New shards with a parent are listed only `time` after they were made.
    pub fn late_children(time: Duration) -> Self {
        Self::new("late children", Kind::LateChildren { time })
    }

    /// Closed shards are listed without their end for `time`, beside their children.
    pub fn open_parents(time: Duration) -> Self {
        Self::new("open parents", Kind::OpenParents { time })
    }

    /// A page of a listing leaves one of its shards out; each shard is missed once at most.
    pub fn missing_shard() -> Self {
        Self::new("missing shard", Kind::MissingShard)
    }

    /// The `first` so many CHILD_SHARDS answers for each parent are empty.
    pub fn empty_children(first: u64) -> Self {
        Self::new("empty children", Kind::EmptyChildren { first })
    }

    /// With [`capacity`](Self::capacity): the units are shared out among this many equal ranges
    /// of partition keys, and a range that has none left is throttled by itself.
    pub fn per_key_range(mut self, count: usize) -> Self {
        if let Kind::Capacity { ranges, .. } = &mut self.kind {
            *ranges = count.max(1);
        }
        self
    }

    /// With [`capacity`](Self::capacity): so many seconds' worth of units in reserve.
    pub fn reserve(mut self, seconds: f64) -> Self {
        if let Kind::Capacity { rate, burst, .. } = &mut self.kind {
            *burst = *rate * seconds;
        }
        self
    }

    /// With a held write: cuts its connection at once, so that no client timeout is needed.
    pub fn hanging_up(mut self) -> Self {
        if let Kind::Hold { hang_up, .. } = &mut self.kind {
            *hang_up = true;
        }
        self
    }

    /// Only on this operation; each call of it adds one.
    pub fn on(mut self, operation: &str) -> Self {
        self.operations.push(operation.to_owned());
        self
    }

    /// Only on this table; each call of it adds one.
    pub fn table(mut self, name: &str) -> Self {
        self.tables.push(name.to_owned());
        self
    }

    /// Only on calls that name a key whose JSON (`{"pk":{"S":"a"}}`) contains this text.
    pub fn key(mut self, text: &str) -> Self {
        self.key = Some(text.to_owned());
        self
    }

    /// Only on calls that name a key in this range of the hashes of partition keys, from 0 to 1.
    pub fn key_range(mut self, range: Range<f64>) -> Self {
        self.range = Some(range);
        self
    }

    /// Strikes each call it could strike with this probability; 1 by default.
    pub fn chance(mut self, probability: f64) -> Self {
        self.chance = probability;
        self
    }

    /// Strikes so many times at most.
    pub fn times(mut self, times: u64) -> Self {
        self.times = times;
        self
    }

    /// Strikes once.
    pub fn once(self) -> Self {
        self.times(1)
    }

    /// Lets the first so many calls it could strike pass.
    pub fn after(mut self, calls: u64) -> Self {
        self.skip = calls;
        self
    }

    /// The name the call log shows and its dice are drawn by; by default what it does.
    pub fn named(mut self, name: &str) -> Self {
        self.name = name.to_owned();
        self
    }

    /// Off until its handle switches it on.
    pub fn switched_off(mut self) -> Self {
        self.starts_on = false;
        self
    }

    /// True if it could strike such a call.
    pub(crate) fn concerns(&self, call: &Subject<'_>) -> bool {
        let operation = if self.operations.is_empty() {
            self.concerns_by_default(call.operation)
        } else {
            self.operations.iter().any(|o| o == call.operation)
        };
        let table = self.tables.is_empty() || self.tables.iter().any(|t| call.tables.contains(t));
        let key = self.key.as_ref();
        let key = key.is_none_or(|text| call.keys.iter().any(|key| key.json.contains(text)));
        let range = self.range.as_ref();
        let range =
            range.is_none_or(|range| call.keys.iter().any(|key| range.contains(&key.place())));
        operation && table && key && range
    }

    fn concerns_by_default(&self, operation: &str) -> bool {
        match self.kind {
            Kind::Throttle { .. } | Kind::FailAfter(_) | Kind::Hold { .. } => is_write(operation),
            Kind::Capacity { .. } => is_write(operation),
            Kind::Unprocessed { .. } => operation == "BatchWriteItem",
            Kind::EmptyPage | Kind::ShortPage | Kind::EmptyLastPage => operation == "GetRecords",
            Kind::CallRate { .. } => operation == "DescribeStream",
            Kind::LateChildren { .. }
            | Kind::OpenParents { .. }
            | Kind::MissingShard
            | Kind::EmptyChildren { .. } => operation == "DescribeStream",
            Kind::CutAfter | Kind::CutWithin => !is_streams(operation),
            _ => true,
        }
    }
}

/// What a fault looks at in a call.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Subject<'a> {
    pub(crate) operation: &'a str,
    pub(crate) tables: &'a [String],
    pub(crate) keys: &'a [super::keys::Key],
    pub(crate) shard: Option<&'a str>,
}
