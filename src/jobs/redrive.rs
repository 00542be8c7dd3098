//! Brings dead letters home: each is repaired by key, and deleted only after that.
//!
//! ```text
//!   receive ──▶ judge ──ours──▶ repair by key ──clean──▶ delete
//!   (hidden)      │                 ├─ refused again ──▶ a new letter with the new reason, then delete
//!                 │                 ├─ no answer ──────▶ stays hidden until that write is dead
//!                 └─ not ours ──┐   └─ anything else ──▶ given back
//!                               └─▶ given back at the end
//! ```
//!
//! A letter is the durable intent of [`crate::repair`]. Who receives it has it for as long as the
//! queue hides it, and writes for it leave only so early that they are dead when it shows again. A
//! directory hides nothing: there the job's row in the state table says who is at it, and until
//! when a dead one's writes may take effect.

mod bound;
mod flow;
mod images;
#[cfg(test)]
mod model_tests;
mod report;
mod settle;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use bound::{BatchBound, Parked};
pub use flow::{Flow, Followed, Verdict};
pub use images::FromImages;
pub use report::{Options, Report, Watcher};
use settle::{Identity, identity};

use crate::apply::batch::Writer;
use crate::apply::budget::Budget;
use crate::backoff::Backoff;
use crate::config::{Config, Table};
use crate::dead_letter::message::DeadLetter;
use crate::dead_letter::{Inbox, Receipt, Store, TOGETHER, Waiting};
use crate::dynamo::RegionClients;
use crate::dynamo::clock::{host_ms, rfc3339, uptime};
use crate::dynamo::item::ItemKey;
use crate::dynamo::value::Item;
use crate::error::{Fault, Policy};
use crate::lease::budget_keeper::BudgetKeeper;
use crate::lease::hold::Hold;
use crate::lease::row::JobRow;
use crate::lease::table::StateTable;
use crate::lease::term::Term;
use crate::repair::{KeepExpired, Repaired, Repairer, Unfinished};
use crate::run::start::Feed;

/// How far the clocks of two commands may be apart, in milliseconds.
const CLOCKS_MS: i64 = 2_000;
/// How long one batch of letters may take before it is hidden anew.
const WORK: Duration = Duration::from_secs(60);
/// Between the last write for a letter and its showing again, beyond a late effect.
const MARGIN: Duration = Duration::from_secs(5);
/// Answers without a letter after which there is none: a queue may overlook some once.
const EMPTY_MAX: usize = 3;
const LOST: &str =
    "its row in the state table could not be kept: ask again once that table answers";
/// How often a queue is asked whether others hold letters, before that is believed.
const HELD_LOOKS: usize = 6;
const HELD_PAUSE: Duration = Duration::from_secs(2);
/// How often the place is asked again when it fails in a way that passes by itself.
const ATTEMPTS_MAX: usize = 6;
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Where a redrive works: the region fed, and the flow into it.
#[derive(Clone, Copy)]
pub struct Ground<'a> {
    /// Label of the active region.
    pub source: &'a str,
    /// The region fed.
    pub target: &'a RegionClients,
    /// The state table, in the region fed.
    pub state: &'a StateTable,
    /// Number of the epoch.
    pub epoch: u64,
    /// The right to write in that epoch.
    pub term: &'a Arc<Term>,
    /// Where the letters lie.
    pub dead_letters: &'a Store,
}

impl<'a> Ground<'a> {
    /// Where a worker feeds.
    pub fn of(feed: &'a Feed, term: &'a Arc<Term>) -> Self {
        Self {
            term,
            source: &feed.active,
            target: &feed.target,
            state: &feed.state,
            epoch: feed.epoch,
            dead_letters: &feed.dead_letters,
        }
    }
}

/// What a redrive works under.
pub struct Rights {
    /// Its row in the state table.
    pub hold: Arc<Hold<JobRow>>,
    /// Its shares of the write budgets.
    pub budgets: Arc<BudgetKeeper>,
}

/// A redrive at work.
pub struct Redrive<'a> {
    config: &'a Config,
    feed: &'a Feed,
    options: &'a Options,
    hold: Arc<Hold<JobRow>>,
    tables: Followed,
    keep_expired: BTreeMap<String, KeepExpired>,
    writers: BTreeMap<String, Writer>,
    pace: Budget,
    inbox: Inbox,
    stop: &'a CancellationToken,
    report: Report,
    /// Received and not brought home: given back at the end, so that they are not received again.
    parked: HashMap<String, Parked>,
    /// What was looked at. A message that shows again was judged already.
    seen: HashSet<String>,
    /// Letters that this redrive wrote because they were refused again.
    again: HashSet<Identity>,
    /// When it began, RFC 3339.
    begun: String,
    /// Letters taken on.
    taken: u64,
    /// Letters received beyond the limit.
    beyond: u64,
}

/// A letter that is being brought home.
struct Bringing {
    letter: DeadLetter,
    keys: Item,
    id: String,
    receipt: Receipt,
}

impl<'a> Redrive<'a> {
    /// A redrive under `rights` of the tables `tables`, which are followed.
    #[allow(clippy::too_many_arguments, reason = "each is another thing")]
    pub fn new(
        config: &'a Config,
        feed: &'a Feed,
        term: &Arc<Term>,
        options: &'a Options,
        rights: Rights,
        tables: Followed,
        keep_expired: BTreeMap<String, KeepExpired>,
        stop: &'a CancellationToken,
    ) -> Self {
        let writer = |table: &Table| {
            let key = feed.keys.get(&table.name).cloned().unwrap_or_default();
            Writer::new(
                feed.target.tables.clone(),
                table.name_in(&feed.target.label),
                &table.name,
                rights.budgets.budget(&table.name),
                config.dead_letters.max_attempts,
                key,
            )
            .within_term(Arc::clone(term))
        };
        Self {
            writers: config
                .tables
                .iter()
                .map(|table| (table.name.clone(), writer(table)))
                .collect(),
            pace: Budget::new(options.rate.map(NonZeroU32::get)),
            inbox: feed.dead_letters.inbox(),
            config,
            feed,
            options,
            hold: rights.hold,
            tables,
            keep_expired,
            stop,
            report: Report::default(),
            parked: HashMap::new(),
            seen: HashSet::new(),
            again: HashSet::new(),
            // Letters tell times of a clock that is known to a second, by whomever.
            begun: rfc3339(host_ms() + CLOCKS_MS),
            taken: 0,
            beyond: 0,
        }
    }

    /// Whether letters in hand are hidden from others.
    fn hides(&self) -> bool {
        matches!(self.feed.dead_letters, Store::Queue(_))
    }

    /// For how long letters are hidden: while they are worked at, and until no write for them can
    /// take effect any more.
    fn hidden(&self) -> Duration {
        WORK + self.config.leases.late_effect + MARGIN
    }

    /// Brings letters home until there is none, the limit is reached, or `stop`. The report tells
    /// what stays, whatever happens.
    pub async fn run(mut self, watcher: &mut dyn Watcher) -> Report {
        if let Err(why) = self.bring_all(watcher).await {
            self.report.ended = Some(why);
        }
        if self.report.ended.is_none() {
            self.count_held_by_others().await;
        }
        let parked: Vec<Parked> = std::mem::take(&mut self.parked).into_values().collect();
        for parked in parked.chunks(TOGETHER) {
            let ours = parked.iter().filter(|parked| parked.is_ours());
            let ours: Vec<Receipt> = ours.map(|parked| parked.receipt.clone()).collect();
            // If it fails they show again by themselves, later.
            let _ = self.inbox.give_back(&ours, Duration::ZERO).await;
        }
        self.report
    }

    /// A queue that shows nothing more may hold letters in somebody's hands all the same.
    async fn count_held_by_others(&mut self) {
        let Store::Queue(queue) = &self.feed.dead_letters else {
            return;
        };
        let ours = self.parked.len() as u64 + self.report.unanswered;
        let mut seen = Ok(0);
        // SQS counts what was deleted for a while; and a call that failed may succeed.
        for _ in 0..HELD_LOOKS {
            seen = match queue.attributes().await {
                Ok(Some(said)) => Ok(said.in_flight.saturating_sub(ours)),
                Ok(None) => return,
                Err(fault) => Err(fault),
            };
            if matches!(seen, Ok(0)) {
                return;
            }
            tokio::time::sleep(HELD_PAUSE).await;
        }
        let others = match seen {
            Ok(others) => others,
            Err(fault) => {
                let asked = "whether others hold letters could not be asked";
                self.report.ended = Some(format!("{asked}: {}", told(&fault)));
                return;
            }
        };
        let why = "somebody has received it and neither deleted it nor given it back: another redrive, \
                   or one that died; it shows again by itself";
        self.report.leave("", why, others);
    }

    async fn bring_all(&mut self, watcher: &mut dyn Watcher) -> Result<(), String> {
        let mut empty = 0;
        let mut failures = 0;
        let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
        loop {
            if self.hold.is_over() {
                return Err(LOST.to_owned());
            }
            // Worked out before the call is sent: hidden counts from when the queue gets it.
            let received = uptime();
            let hidden = self.hidden();
            let next = tokio::select! {
                () = self.stop.cancelled() => return Err("it was asked to stop".to_owned()),
                next = self.inbox.next(hidden) => next,
            };
            let batch = match next {
                Ok(batch) => batch,
                Err(fault) if fault.policy() == Policy::Retry && failures < ATTEMPTS_MAX => {
                    failures += 1;
                    tokio::time::sleep(backoff.pause()).await;
                    continue;
                }
                Err(fault) => return Err(told(&fault)),
            };
            failures = 0;
            let bound = BatchBound::new(&self.hold, self.hides().then_some(received + WORK));
            // Letters that were looked at show again while many others are brought home.
            let news = batch.iter().any(|waiting| !self.seen.contains(&waiting.id));
            if !news {
                for known in batch {
                    self.park(known.id, known.receipt, &bound);
                }
                empty += 1;
                if empty >= EMPTY_MAX {
                    return Ok(());
                }
                continue;
            }
            empty = 0;
            self.bring_batch(batch, &bound).await?;
            if self.beyond > 0 {
                return Err(format!(
                    "--limit is reached, and there are {} more at least",
                    self.beyond
                ));
            }
            watcher.progressed(self.report.home_count(), self.report.left_count());
        }
    }

    /// Sorts a batch and brings home what is ours, table by table.
    async fn bring_batch(
        &mut self,
        batch: Vec<Waiting>,
        bound: &Arc<BatchBound>,
    ) -> Result<(), String> {
        let mut tables: BTreeMap<String, Vec<Bringing>> = BTreeMap::new();
        let receipts = Mutex::new(Vec::new());
        for waiting in batch {
            let is_new = self.seen.insert(waiting.id.clone());
            let room = self.options.limit.is_none_or(|limit| self.taken < limit);
            // Received all the same, so that it is known whether any is left.
            self.beyond += u64::from(is_new && !room);
            match self.sort(waiting, is_new && room, bound) {
                Some(bringing) => {
                    self.taken += 1;
                    lock(&receipts).push(bringing.receipt.clone());
                    let table = bringing.letter.table.clone();
                    tables.entry(table).or_default().push(bringing);
                }
                None => continue,
            }
        }
        let done = CancellationToken::new();
        let hiding = self.feed.dead_letters.inbox();
        let hidden = self.hidden();
        let hides = self.hides();
        // A small write budget may make a batch take longer than it is hidden.
        let keep_hidden = async {
            if !hides {
                return;
            }
            loop {
                tokio::select! {
                    () = done.cancelled() => return,
                    () = tokio::time::sleep(WORK / 3) => {}
                }
                let sent = uptime();
                // Past it they may be in somebody else's hands.
                if bound.until().is_some_and(|until| until <= sent) {
                    return;
                }
                // Those that are settled are no longer there to be hidden.
                let open = lock(&receipts).clone();
                if hiding.give_back(&open, hidden).await.is_ok() {
                    bound.move_to(sent + WORK);
                }
            }
        };
        let bring = async {
            let mut ended = Ok(());
            for (table, letters) in tables {
                match ended {
                    Ok(()) => ended = self.bring_table(&table, letters, bound, &receipts).await,
                    // Nothing was begun for these.
                    Err(_) => {
                        self.not_begun(&table, letters.len() as u64);
                        self.park_all(letters, bound);
                    }
                }
            }
            done.cancel();
            ended
        };
        tokio::join!(bring, keep_hidden).0
    }

    /// A letter to bring home; what is not is noted and parked.
    fn sort(&mut self, waiting: Waiting, is_wanted: bool, bound: &BatchBound) -> Option<Bringing> {
        if !is_wanted {
            self.park(waiting.id, waiting.receipt, bound);
            return None;
        }
        let letter = match waiting.letter {
            Ok(letter) => letter,
            Err(unreadable) => {
                self.report.leave("", unreadable.to_string(), 1);
                self.park(waiting.id, waiting.receipt, bound);
                return None;
            }
        };
        // Refused since this began: another try would find the same, for ever.
        let ours = self.again.contains(&identity(&letter));
        if ours || (letter.redriven > 0 && letter.failed_at >= self.begun) {
            if !ours {
                let why = "refused again a moment ago, by another redrive";
                self.report.leave(&letter.table, why, 1);
            }
            self.park(waiting.id, waiting.receipt, bound);
            return None;
        }
        let flow = Flow {
            group: &self.config.group,
            epoch: self.feed.epoch,
            source: &self.feed.source.label,
            target: &self.feed.target.label,
            tables: &self.tables,
            wanted: self.options.table.as_deref(),
        };
        let verdict = flow.judge(&letter);
        match (verdict, letter.item_key()) {
            (Verdict::Bring, Some(keys)) => {
                return Some(Bringing {
                    letter,
                    keys,
                    id: waiting.id,
                    receipt: waiting.receipt,
                });
            }
            (Verdict::Stays(why), _) => self.report.leave(&letter.table, why, 1),
            (Verdict::Other | Verdict::Bring, _) => {}
        }
        self.park(waiting.id, waiting.receipt, bound);
        None
    }

    fn not_begun(&mut self, table: &str, letters: u64) {
        if letters > 0 {
            let why = "the redrive ended before it";
            self.report.leave(table, why, letters);
        }
    }

    fn park(&mut self, id: String, receipt: Receipt, bound: &BatchBound) {
        // Letters are hidden for a late effect longer than they may be worked at.
        let late_effect = self.config.leases.late_effect;
        let ours_until = bound.until().map(|until| until + late_effect);
        let parked = Parked {
            receipt,
            ours_until,
        };
        self.parked.insert(id, parked);
    }

    fn park_all(&mut self, letters: Vec<Bringing>, bound: &BatchBound) {
        for letter in letters {
            self.park(letter.id, letter.receipt, bound);
        }
    }

    /// Brings letters of one table home. An error ends the redrive.
    async fn bring_table(
        &mut self,
        table: &str,
        letters: Vec<Bringing>,
        bound: &Arc<BatchBound>,
        open: &Mutex<Vec<Receipt>>,
    ) -> Result<(), String> {
        let paced = u32::try_from(letters.len()).unwrap_or(u32::MAX);
        self.pace.spend(paced).await;
        match self.repair(table, &letters, bound).await {
            Ok(repaired) => self.settle(table, letters, repaired, bound, open).await,
            // One hot key must not keep its neighbours.
            Err(Unfinished::Unsettled) if letters.len() > 1 => {
                let mut ended = Ok(());
                for letter in letters {
                    let one = vec![letter];
                    match ended {
                        Ok(()) => {
                            ended = Box::pin(self.bring_table(table, one, bound, open)).await;
                        }
                        Err(_) => {
                            self.not_begun(table, 1);
                            self.park_all(one, bound);
                        }
                    }
                }
                ended
            }
            Err(unfinished) => self.leave(table, letters, unfinished, bound),
        }
    }

    fn leave(
        &mut self,
        table: &str,
        letters: Vec<Bringing>,
        unfinished: Unfinished,
        bound: &BatchBound,
    ) -> Result<(), String> {
        let count = letters.len() as u64;
        match unfinished {
            Unfinished::Unsettled => {
                let why = "its item changes all the time: try again later";
                self.report.leave(table, why, count);
                self.park_all(letters, bound);
                Ok(())
            }
            // Hidden until that write is dead: who gets them next must not be overtaken by it.
            Unfinished::Unanswered(fault) => {
                self.report.unanswered += count;
                let why = format!("a write was not answered ({})", fault.code);
                self.report.leave(table, why, count);
                match letters
                    .iter()
                    .any(|l| matches!(l.receipt, Receipt::Line(..)))
                {
                    // The whole directory waits for it.
                    true => Err(told(&fault)),
                    false => Ok(()),
                }
            }
            Unfinished::Failed(fault) => {
                self.not_begun(table, count);
                self.park_all(letters, bound);
                Err(told(&fault))
            }
            Unfinished::Stopped => {
                self.not_begun(table, count);
                self.park_all(letters, bound);
                match self.stop.is_cancelled() {
                    true => Err("it was asked to stop".to_owned()),
                    false => Err("its time ran out before the letters were home".to_owned()),
                }
            }
        }
    }

    async fn repair(
        &self,
        table: &str,
        letters: &[Bringing],
        bound: &Arc<BatchBound>,
    ) -> Result<Repaired, Unfinished> {
        let known = self.config.tables.iter().find(|known| known.name == table);
        let (Some(known), Some(writer)) = (known, self.writers.get(table)) else {
            // `judge` lets nothing else through.
            return Err(Unfinished::Stopped);
        };
        let source = &self.feed.source;
        let target = &self.feed.target;
        let repairer = Repairer {
            source: (&source.tables, known.name_in(&source.label)),
            replica: (&target.tables, known.name_in(&target.label)),
            writer,
            bound: Arc::clone(bound) as _,
            stop: self.stop,
            keep_expired: self.keep_expired.get(table).cloned(),
            flows: false,
            wrote: None,
        };
        // Several letters of one item are one repair.
        let keys: HashMap<ItemKey, Item> = letters
            .iter()
            .map(|letter| (ItemKey::new(&letter.keys), letter.keys.clone()))
            .collect();
        repairer.repair(keys.into_values()).await
    }
}

fn lock(receipts: &Mutex<Vec<Receipt>>) -> MutexGuard<'_, Vec<Receipt>> {
    receipts.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A fault and what to do about it, in one line.
fn told(fault: &Fault) -> String {
    format!("{fault}. {}", fault.next_step())
}

#[cfg(test)]
#[path = "redrive_tests.rs"]
mod tests;
