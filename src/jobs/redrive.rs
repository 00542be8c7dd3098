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

mod flow;
mod images;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

pub use flow::{Flow, Followed, Verdict};
pub use images::FromImages;

use crate::apply::batch::Writer;
use crate::apply::budget::Budget;
use crate::backoff::Backoff;
use crate::config::{Config, Table};
use crate::dead_letter::message::{DeadLetter, Reason};
use crate::dead_letter::{Inbox, Receipt, Store, Waiting};
use crate::dynamo::RegionClients;
use crate::dynamo::clock::{host_ms, rfc3339, uptime};
use crate::dynamo::item::ItemKey;
use crate::dynamo::transmit::Bound;
use crate::dynamo::value::Item;
use crate::error::{Fault, Policy};
use crate::lease::hold::Hold;
use crate::lease::row::JobRow;
use crate::lease::table::StateTable;
use crate::repair::{KeepExpired, Refused, Repaired, Repairer, Unfinished};
use crate::run::start::Feed;

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

/// What to bring home.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Only letters of this table.
    pub table: Option<String>,
    /// At most so many letters.
    pub limit: Option<u64>,
    /// At most so many letters a second.
    pub rate: Option<NonZeroU32>,
}

/// What was done.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Report {
    /// Letters brought home and deleted, by table.
    pub home: BTreeMap<String, u64>,
    /// Letters that stay, by table and reason. The table is empty where the letter does not tell.
    pub left: BTreeMap<(String, String), u64>,
    /// Why it ended before all letters had been looked at, if it did.
    pub ended: Option<String>,
    /// Whether a write was not answered: its letters show again once it is dead.
    pub unanswered: bool,
}

impl Report {
    /// Letters that stay.
    pub fn left_count(&self) -> u64 {
        self.left.values().sum()
    }

    /// Letters brought home.
    pub fn home_count(&self) -> u64 {
        self.home.values().sum()
    }

    fn leave(&mut self, table: &str, why: impl Into<String>, letters: u64) {
        *self.left.entry((table.to_owned(), why.into())).or_default() += letters;
    }
}

/// The right to write for a batch of letters: the job's, and no longer than the queue hides them.
struct BatchBound {
    hold: Arc<Hold<JobRow>>,
    /// As this machine's uptime; `None` where nothing is hidden.
    until: Mutex<Option<Duration>>,
}

impl BatchBound {
    fn move_to(&self, until: Duration) {
        *self.until.lock().unwrap_or_else(PoisonError::into_inner) = Some(until);
    }
}

impl Bound for BatchBound {
    fn remaining(&self) -> Duration {
        let until = *self.until.lock().unwrap_or_else(PoisonError::into_inner);
        let hold = self.hold.remaining();
        until.map_or(hold, |until| hold.min(until.saturating_sub(uptime())))
    }
}

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
    /// Where the letters lie.
    pub dead_letters: &'a Store,
}

impl<'a> Ground<'a> {
    /// Where a worker feeds.
    pub fn of(feed: &'a Feed) -> Self {
        Self {
            source: &feed.active,
            target: &feed.target,
            state: &feed.state,
            epoch: feed.epoch,
            dead_letters: &feed.dead_letters,
        }
    }
}

/// Who watches a redrive.
pub trait Watcher {
    /// So many letters are home, and so many stay.
    fn progressed(&mut self, home: u64, left: u64);
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
    parked: HashMap<String, Receipt>,
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
    /// A redrive under `hold` of the tables `tables`, which are followed.
    pub fn new(
        config: &'a Config,
        feed: &'a Feed,
        options: &'a Options,
        hold: Arc<Hold<JobRow>>,
        tables: Followed,
        keep_expired: BTreeMap<String, KeepExpired>,
        stop: &'a CancellationToken,
    ) -> Self {
        let writer = |table: &Table| {
            let key = feed.keys.get(&table.name).cloned().unwrap_or_default();
            let budget = Budget::new(config.units_per_second(table));
            Writer::new(
                feed.target.tables.clone(),
                table.name_in(&feed.target.label),
                &table.name,
                Arc::new(budget),
                config.dead_letters.max_attempts,
                key,
            )
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
            hold,
            tables,
            keep_expired,
            stop,
            report: Report::default(),
            parked: HashMap::new(),
            seen: HashSet::new(),
            again: HashSet::new(),
            begun: rfc3339(host_ms()),
            taken: 0,
            beyond: 0,
        }
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
        let parked: Vec<Receipt> = std::mem::take(&mut self.parked).into_values().collect();
        // If it fails they show again by themselves, later.
        let _ = self.inbox.give_back(&parked, Duration::ZERO).await;
        self.report
    }

    /// A queue that shows nothing more may hold letters in somebody's hands all the same.
    async fn count_held_by_others(&mut self) {
        let Store::Queue(queue) = &self.feed.dead_letters else {
            return;
        };
        let mut others = 0;
        // SQS counts what was deleted for a while.
        for _ in 0..HELD_LOOKS {
            let Ok(Some(said)) = queue.attributes().await else {
                return;
            };
            others = said.in_flight.saturating_sub(self.parked.len() as u64);
            if others == 0 {
                return;
            }
            tokio::time::sleep(HELD_PAUSE).await;
        }
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
            // Letters that were looked at show again while many others are brought home.
            let news = batch.iter().any(|waiting| !self.seen.contains(&waiting.id));
            if !news {
                let again = batch.into_iter();
                self.parked
                    .extend(again.map(|known| (known.id, known.receipt)));
                empty += 1;
                if empty >= EMPTY_MAX {
                    return Ok(());
                }
                continue;
            }
            empty = 0;
            self.bring_batch(batch, received).await?;
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
    async fn bring_batch(&mut self, batch: Vec<Waiting>, received: Duration) -> Result<(), String> {
        let mut tables: BTreeMap<String, Vec<Bringing>> = BTreeMap::new();
        let receipts = Mutex::new(Vec::new());
        for waiting in batch {
            let is_new = self.seen.insert(waiting.id.clone());
            let room = self.options.limit.is_none_or(|limit| self.taken < limit);
            // Received all the same, so that it is known whether any is left.
            self.beyond += u64::from(is_new && !room);
            match self.sort(waiting, is_new && room) {
                Some(bringing) => {
                    self.taken += 1;
                    lock(&receipts).push(bringing.receipt.clone());
                    let table = bringing.letter.table.clone();
                    tables.entry(table).or_default().push(bringing);
                }
                None => continue,
            }
        }
        let bound = Arc::new(BatchBound {
            hold: Arc::clone(&self.hold),
            until: Mutex::new(None),
        });
        let is_hidden = lock(&receipts)
            .iter()
            .any(|r| matches!(r, Receipt::Message(_)));
        if is_hidden {
            bound.move_to(received + WORK);
        }
        let done = CancellationToken::new();
        let hiding = self.feed.dead_letters.inbox();
        let hidden = self.hidden();
        // A small write budget may make a batch take longer than it is hidden.
        let keep_hidden = async {
            if !is_hidden {
                return;
            }
            loop {
                tokio::select! {
                    () = done.cancelled() => return,
                    () = tokio::time::sleep(WORK / 3) => {}
                }
                let sent = uptime();
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
                let shared: Arc<dyn Bound> = Arc::clone(&bound) as _;
                match ended {
                    Ok(()) => ended = self.bring_table(&table, letters, &shared, &receipts).await,
                    // Nothing was begun for these.
                    Err(_) => self.park(letters),
                }
            }
            done.cancel();
            ended
        };
        tokio::join!(bring, keep_hidden).0
    }

    /// A letter to bring home; what is not is noted and parked.
    fn sort(&mut self, waiting: Waiting, is_wanted: bool) -> Option<Bringing> {
        if !is_wanted {
            self.parked.insert(waiting.id, waiting.receipt);
            return None;
        }
        let letter = match waiting.letter {
            Ok(letter) => letter,
            Err(unreadable) => {
                self.report.leave("", unreadable.to_string(), 1);
                self.parked.insert(waiting.id, waiting.receipt);
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
            self.parked.insert(waiting.id, waiting.receipt);
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
        self.parked.insert(waiting.id, waiting.receipt);
        None
    }

    fn park(&mut self, letters: Vec<Bringing>) {
        let receipts = letters
            .into_iter()
            .map(|letter| (letter.id, letter.receipt));
        self.parked.extend(receipts);
    }

    /// Brings letters of one table home. An error ends the redrive.
    async fn bring_table(
        &mut self,
        table: &str,
        letters: Vec<Bringing>,
        bound: &Arc<dyn Bound>,
        open: &Mutex<Vec<Receipt>>,
    ) -> Result<(), String> {
        let paced = u32::try_from(letters.len()).unwrap_or(u32::MAX);
        self.pace.spend(paced).await;
        match self.repair(table, &letters, bound).await {
            Ok(repaired) => self.settle(table, letters, repaired, open).await,
            // One hot key must not keep its neighbours.
            Err(Unfinished::Unsettled) if letters.len() > 1 => {
                let mut ended = Ok(());
                for letter in letters {
                    let one = vec![letter];
                    match ended {
                        Ok(()) => {
                            ended = Box::pin(self.bring_table(table, one, bound, open)).await;
                        }
                        Err(_) => self.park(one),
                    }
                }
                ended
            }
            Err(unfinished) => self.leave(table, letters, unfinished),
        }
    }

    fn leave(
        &mut self,
        table: &str,
        letters: Vec<Bringing>,
        unfinished: Unfinished,
    ) -> Result<(), String> {
        let count = letters.len() as u64;
        match unfinished {
            Unfinished::Unsettled => {
                let why = "its item changes all the time: try again later";
                self.report.leave(table, why, count);
                self.park(letters);
                Ok(())
            }
            // Hidden until that write is dead: who gets them next must not be overtaken by it.
            Unfinished::Unanswered(fault) => {
                self.report.unanswered = true;
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
                self.report
                    .leave(table, "the redrive ended before it", count);
                self.park(letters);
                Err(told(&fault))
            }
            Unfinished::Stopped => {
                self.report
                    .leave(table, "the redrive ended before it", count);
                self.park(letters);
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
        bound: &Arc<dyn Bound>,
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
            bound: Arc::clone(bound),
            stop: self.stop,
            keep_expired: self.keep_expired.get(table).cloned(),
        };
        // Several letters of one item are one repair.
        let keys: HashMap<ItemKey, Item> = letters
            .iter()
            .map(|letter| (ItemKey::new(&letter.keys), letter.keys.clone()))
            .collect();
        repairer.repair(keys.into_values()).await
    }

    /// The keys are verified: deletes the letters, and writes new ones for what was refused again.
    async fn settle(
        &mut self,
        table: &str,
        letters: Vec<Bringing>,
        repaired: Repaired,
        open: &Mutex<Vec<Receipt>>,
    ) -> Result<(), String> {
        let refused: HashMap<ItemKey, Refused> = repaired
            .refused
            .into_iter()
            .map(|refused| (refused.change.key.clone(), refused))
            .collect();
        let mut home = Vec::new();
        let mut again = Vec::new();
        for bringing in letters {
            match refused.get(&ItemKey::new(&bringing.keys)) {
                None => home.push(bringing.receipt),
                Some(Refused {
                    fault, attempts, ..
                }) => {
                    let why = format!("refused again: {} ({})", fault.code, fault.class.label());
                    self.report.leave(table, why, 1);
                    let letter = refused_again(bringing.letter, fault, *attempts);
                    // The new one before the old one goes: between the two there are both.
                    self.patiently(async |redrive: &Self| {
                        redrive.feed.dead_letters.deliver(&letter).await
                    })
                    .await?;
                    self.again.insert(identity(&letter));
                    again.push(bringing.receipt);
                }
            }
        }
        let count = home.len() as u64;
        home.extend(again);
        lock(open).retain(|receipt| !home.contains(receipt));
        self.patiently(async |redrive: &Self| redrive.inbox.delete(&home).await)
            .await?;
        if count > 0 {
            *self.report.home.entry(table.to_owned()).or_default() += count;
        }
        Ok(())
    }

    /// Asks the place a few times while it fails in a way that passes by itself.
    async fn patiently(
        &self,
        call: impl AsyncFn(&Self) -> Result<(), Fault>,
    ) -> Result<(), String> {
        let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
        let mut attempts = 1;
        loop {
            match call(self).await {
                Ok(()) => return Ok(()),
                Err(fault) if fault.policy() == Policy::Retry && attempts < ATTEMPTS_MAX => {
                    attempts += 1;
                    tokio::time::sleep(backoff.pause()).await;
                }
                Err(fault) => return Err(told(&fault)),
            }
        }
    }
}

/// What tells a letter from any other, the same record's earlier letters included: a refused repair
/// has no position in the stream.
type Identity = (String, Option<String>, u32, String, Option<ItemKey>);

fn identity(letter: &DeadLetter) -> Identity {
    (
        letter.shard_id.clone(),
        letter.sequence_number.clone(),
        letter.redriven,
        letter.failed_at.clone(),
        letter.item_key().as_ref().map(ItemKey::new),
    )
}

/// The letter of a record that was refused again.
fn refused_again(mut letter: DeadLetter, fault: &Fault, attempts: u32) -> DeadLetter {
    letter.error = Reason {
        class: fault.class.label().to_owned(),
        code: fault.code.clone(),
        message: fault.message.clone(),
    };
    letter.attempts = attempts;
    letter.failed_at = rfc3339(host_ms());
    letter.redriven += 1;
    letter
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
