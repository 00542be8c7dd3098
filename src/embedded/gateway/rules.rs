//! The faults of a running gateway: which are on, which strike a call, what they make of it.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use super::clock;
use super::dice::Seed;
use super::faults::{Fault, Kind, Limit, Subject};
use super::protocol::{Failure, is_streams};
use super::throttle::Buckets;

/// A fault in a running gateway, to switch on and off and to ask how often it struck.
#[derive(Clone, Debug)]
pub struct FaultHandle(Arc<Rule>);

impl FaultHandle {
    /// Lets it strike.
    pub fn on(&self) {
        self.0.on.store(true, SeqCst);
    }

    /// Stops it from striking.
    pub fn off(&self) {
        self.0.on.store(false, SeqCst);
    }

    /// How often it struck.
    pub fn hits(&self) -> u64 {
        self.0.hits.load(SeqCst)
    }
}

#[derive(Debug)]
pub(crate) struct Rule {
    pub(crate) fault: Fault,
    /// Two faults of one name are drawn apart.
    seed: Seed,
    on: AtomicBool,
    seen: AtomicU64,
    hits: AtomicU64,
    buckets: Mutex<Buckets>,
    /// What listing faults remember of shards.
    shards: Mutex<ShardMemory>,
}

#[derive(Debug, Default)]
struct ShardMemory {
    asked: HashMap<String, u64>,
    missed: HashSet<String>,
}

impl Rule {
    /// Decides about a call it is asked about, and counts it.
    fn strikes(&self, call: &Subject<'_>) -> bool {
        if !self.concerns(call) {
            return false;
        }
        let seen = self.seen.fetch_add(1, SeqCst);
        seen >= self.fault.skip && self.draw(&self.fault.name, seen) && self.count()
    }

    pub(crate) fn concerns(&self, call: &Subject<'_>) -> bool {
        self.on.load(SeqCst) && self.fault.concerns(call)
    }

    fn draw(&self, what: &str, count: u64) -> bool {
        self.fault.chance >= 1.0 || self.seed.fraction(what, count) < self.fault.chance
    }

    /// Counts a hit unless its times are up.
    fn count(&self) -> bool {
        let more = |hits| (hits < self.fault.times).then_some(hits + 1);
        self.hits.fetch_update(SeqCst, SeqCst, more).is_ok()
    }

    /// Takes units from the bucket of `what`; true if they were there.
    pub(crate) fn take(&self, what: &str, units: f64, rate: f64, burst: f64) -> bool {
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        let admitted = buckets.take(what, units, rate, burst, clock::system_us());
        if !admitted {
            self.hits.fetch_add(1, SeqCst);
        }
        admitted
    }

    /// A decision about a shard that stays the same however often it is asked, and in every run
    /// of one seed: the time in an id would let each run draw anew.
    pub(crate) fn picks_shard(&self, shard: &str) -> bool {
        let drawn = shard.rsplit('-').next().unwrap_or(shard);
        self.draw(&format!("{} {drawn}", self.fault.name), 0)
    }

    /// True the first time for each shard the dice pick.
    pub(crate) fn misses_once(&self, shard: &str) -> bool {
        let mut memory = self.shards.lock().unwrap_or_else(PoisonError::into_inner);
        if memory.missed.contains(shard) || !self.picks_shard(shard) {
            return false;
        }
        let counted = self.count();
        if counted {
            memory.missed.insert(shard.to_owned());
        }
        counted
    }

    /// How often the children of a shard were asked for before now.
    pub(crate) fn asked_before(&self, shard: &str) -> u64 {
        let mut memory = self.shards.lock().unwrap_or_else(PoisonError::into_inner);
        let asked = memory.asked.entry(shard.to_owned()).or_default();
        *asked += 1;
        *asked - 1
    }

    pub(crate) fn hit(&self) {
        self.hits.fetch_add(1, SeqCst);
    }

    /// Bits for a choice within a hit.
    pub(crate) fn choice(&self) -> u64 {
        self.seed
            .bits(&self.fault.name, self.hits.load(SeqCst) ^ (1 << 63))
    }
}

/// What the faults make of one call.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    pub(crate) names: Vec<String>,
    pub(crate) delay: Duration,
    pub(crate) hold: Option<HoldPlan>,
    pub(crate) refusal: Option<Refusal>,
    /// Buckets its writes must pass.
    pub(crate) capacity: Vec<Arc<Rule>>,
    /// The share of its writes sent back.
    pub(crate) unprocessed: Option<(f64, u64)>,
    pub(crate) page: PageFaults,
    pub(crate) slow: Duration,
    pub(crate) after: Option<After>,
}

#[derive(Debug)]
pub(crate) struct HoldPlan {
    pub(crate) time: Option<Duration>,
    pub(crate) hang_up: bool,
}

/// How a call ends before any effect.
#[derive(Debug)]
pub(crate) enum Refusal {
    Failure(Failure),
    Cut,
}

/// What happens to the answer of a call that took effect.
#[derive(Debug)]
pub(crate) enum After {
    Failure(Failure),
    Cut,
    CutWithin,
}

/// What happens to a page of records.
#[derive(Debug, Default)]
pub(crate) struct PageFaults {
    pub(crate) empty: bool,
    pub(crate) short: Option<u64>,
    pub(crate) empty_last: bool,
}

/// All faults of one gateway.
#[derive(Debug)]
pub(crate) struct Rules {
    seed: Seed,
    resource: String,
    rules: RwLock<Vec<Arc<Rule>>>,
}

impl Rules {
    /// `resource` is the ARN of a table up to its name.
    pub(crate) fn new(seed: Seed, resource: String) -> Self {
        Self {
            seed,
            resource,
            rules: RwLock::default(),
        }
    }

    pub(crate) fn add(&self, fault: Fault) -> FaultHandle {
        let mut rules = self.rules.write().unwrap_or_else(PoisonError::into_inner);
        let namesakes = rules.iter().filter(|rule| rule.fault.name == fault.name);
        let rule = Arc::new(Rule {
            seed: self.seed.of(&namesakes.count().to_string()),
            on: AtomicBool::new(fault.starts_on),
            fault,
            seen: AtomicU64::new(0),
            hits: AtomicU64::new(0),
            buckets: Mutex::default(),
            shards: Mutex::default(),
        });
        rules.push(Arc::clone(&rule));
        FaultHandle(rule)
    }

    pub(crate) fn clear(&self) {
        let mut rules = self.rules.write().unwrap_or_else(PoisonError::into_inner);
        for rule in rules.drain(..) {
            // A handle that outlives the list must not bring it back to life.
            rule.on.store(false, SeqCst);
        }
    }

    /// The rules that are on and concern a call, whatever their dice say.
    pub(crate) fn concerning(&self, call: &Subject<'_>) -> Vec<Arc<Rule>> {
        let rules = self.rules.read().unwrap_or_else(PoisonError::into_inner);
        rules
            .iter()
            .filter(|rule| rule.concerns(call))
            .cloned()
            .collect()
    }

    /// True if the writes of a call have to be measured for a bucket.
    pub(crate) fn meters(&self) -> bool {
        let rules = self.rules.read().unwrap_or_else(PoisonError::into_inner);
        let capacity = |rule: &Arc<Rule>| matches!(rule.fault.kind, Kind::Capacity { .. });
        rules
            .iter()
            .any(|rule| rule.on.load(SeqCst) && capacity(rule))
    }

    /// Asks every fault about a call, in the order of their list, until one refuses it.
    pub(crate) fn plan(&self, call: &Subject<'_>, signed: Option<i64>) -> Plan {
        let mut plan = Plan::default();
        for rule in self.concerning(call) {
            match &rule.fault.kind {
                // These have a state of their own instead of dice.
                Kind::Capacity { .. } => plan.capacity.push(rule),
                Kind::CallRate { rate } => {
                    let what = format!("{} {}", call.operation, call.shard.unwrap_or_default());
                    if !rule.take(&what, 1.0, *rate, rate.max(1.0)) {
                        let message = "Rate exceeded: too many calls of this operation";
                        let failure = Failure::new(400, "LimitExceededException", message);
                        plan.refuse(&rule, Refusal::Failure(failure));
                    }
                }
                Kind::StaleSignature { age } => {
                    if is_stale(*age, signed) && rule.strikes(call) {
                        plan.refuse(&rule, Refusal::Failure(stale_failure()));
                    }
                }
                Kind::LateChildren { .. }
                | Kind::OpenParents { .. }
                | Kind::MissingShard
                | Kind::EmptyChildren { .. } => {}
                _ => {
                    if rule.strikes(call) {
                        self.strike(&mut plan, &rule, call);
                    }
                }
            }
            if plan.refusal.is_some() {
                break;
            }
        }
        plan
    }

    /// Whether a signature has grown too old meanwhile: for writes that were held back.
    pub(crate) fn stale(&self, call: &Subject<'_>, signed: Option<i64>) -> Option<Failure> {
        self.concerning(call).into_iter().find_map(|rule| {
            let Kind::StaleSignature { age } = rule.fault.kind else {
                return None;
            };
            (is_stale(age, signed) && rule.strikes(call)).then(stale_failure)
        })
    }

    fn strike(&self, plan: &mut Plan, rule: &Arc<Rule>, call: &Subject<'_>) {
        plan.names.push(rule.fault.name.clone());
        match &rule.fault.kind {
            Kind::Refuse(failure) => plan.refusal = Some(Refusal::Failure(failure.clone())),
            Kind::Throttle { limit, code } => {
                let table = call.tables.first().map_or("", String::as_str);
                let failure = self.throttled(code, *limit, call.operation, table);
                plan.refusal = Some(Refusal::Failure(failure));
            }
            Kind::Cut => plan.refusal = Some(Refusal::Cut),
            Kind::FailAfter(failure) => plan.after = Some(After::Failure(failure.clone())),
            Kind::CutAfter => plan.after = Some(After::Cut),
            Kind::CutWithin => plan.after = Some(After::CutWithin),
            Kind::Unprocessed { share } => plan.unprocessed = Some((*share, rule.choice())),
            Kind::Hold { time, hang_up } => {
                plan.hold = Some(HoldPlan {
                    time: *time,
                    hang_up: *hang_up,
                });
            }
            Kind::Delay(time) => plan.delay += *time,
            Kind::SlowAnswer(time) => plan.slow += *time,
            Kind::EmptyPage => plan.page.empty = true,
            Kind::ShortPage => plan.page.short = Some(rule.choice()),
            Kind::EmptyLastPage => plan.page.empty_last = true,
            // `plan` has dealt with these.
            Kind::Capacity { .. }
            | Kind::CallRate { .. }
            | Kind::StaleSignature { .. }
            | Kind::LateChildren { .. }
            | Kind::OpenParents { .. }
            | Kind::MissingShard
            | Kind::EmptyChildren { .. } => {}
        }
    }

    /// A throttling error; the Streams API gives no reasons.
    pub(crate) fn throttled(
        &self,
        code: &str,
        limit: Limit,
        operation: &str,
        table: &str,
    ) -> Failure {
        let message = "Throughput exceeds the current capacity of your table or index";
        let mut failure = Failure::new(400, code, message);
        if !is_streams(operation) {
            let resource = format!("{}{table}", self.resource);
            failure.reasons.push((limit.reason(operation), resource));
        }
        failure
    }
}

impl Plan {
    fn refuse(&mut self, rule: &Rule, refusal: Refusal) {
        self.names.push(rule.fault.name.clone());
        self.refusal = Some(refusal);
    }
}

fn is_stale(age: Duration, signed: Option<i64>) -> bool {
    let age = i64::try_from(age.as_secs()).unwrap_or(i64::MAX);
    // A signature's date has whole seconds, so it looks up to one older than it is.
    signed.is_some_and(|signed| clock::system_us() / 1_000_000 - signed > age)
}

fn stale_failure() -> Failure {
    let message = "Signature expired: its date is now earlier than the oldest one accepted";
    Failure::new(400, "InvalidSignatureException", message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strikes(seed: u64, fault: Fault, calls: usize) -> Vec<bool> {
        let rules = Rules::new(Seed::new(seed), String::new());
        rules.add(fault);
        let subject = Subject {
            operation: "PutItem",
            tables: &[],
            keys: &[],
            shard: None,
        };
        (0..calls)
            .map(|_| rules.plan(&subject, None).refusal.is_some())
            .collect()
    }

    #[test]
    fn a_seed_strikes_the_same_calls_again() {
        let run = |seed| strikes(seed, Fault::error_before().chance(0.3), 200);
        assert_eq!(run(1), run(1));
        if std::env::var(super::super::dice::SEED_VARIABLE).is_err() {
            assert_ne!(run(1), run(2));
        }
        let hits = run(1).iter().filter(|hit| **hit).count();
        assert!((30..90).contains(&hits), "{hits} of 200 at 0.3");
    }

    #[test]
    fn times_and_after_bound_what_strikes() {
        let hits = strikes(1, Fault::error_before().after(2).times(3), 8);
        let expected = [false, false, true, true, true, false, false, false];
        assert_eq!(hits, expected);
    }
}
