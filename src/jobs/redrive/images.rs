//! Bringing letters home without their source: from the images that they carry.
//!
//! Without a source nobody can say what an item ought to be now, so a letter is applied only where
//! the replica still holds what its record replaced: then nothing newer was applied. All letters are
//! received before the first is applied, and those of one item are applied in the order of the
//! stream: out of it, one that restored an older value would look as if it had been applied.
//!
//! What this cannot know: a record that was refused may have been undone by a later one that was
//! applied (an item inserted and deleted again). Then the replica holds what the refused one
//! replaced, and the letter brings back what is gone. The command says so before it does anything.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use aws_sdk_dynamodb::types::{AttributeValue, ReturnConsumedCapacity};
use tokio_util::sync::CancellationToken;

use super::{
    ATTEMPTS_MAX, EMPTY_MAX, FIRST_PAUSE, Flow, Followed, Ground, LONGEST_PAUSE, LOST, Options,
    Report, Rights, Verdict, Watcher, told,
};
use crate::apply::budget::Budget;
use crate::apply::conditional::units_of;
use crate::apply::payment::{Payment, Strain};
use crate::backoff::Backoff;
use crate::config::Config;
use crate::dead_letter::message::DeadLetter;
use crate::dead_letter::{Inbox, Receipt, Store, Waiting};
use crate::dynamo::clock::uptime;
use crate::dynamo::item::ItemKey;
use crate::dynamo::json::item_from_json;
use crate::dynamo::transmit::{Bound, Left, within};
use crate::dynamo::value::{Item, item_bytes, same_item};
use crate::error::{Class, Fault, Operation, Policy, classify};
use crate::lease::doubts::effect_unknown;
use crate::lease::term::within_term;
use crate::repair::Attempts;
use crate::stream::change::write_units;
use crate::stream::stream_label;

/// For how long letters are hidden. A write is made on condition of what it replaces.
const HIDDEN: Duration = Duration::from_secs(15 * 60);
/// Letters are left alone this long before they show again: longer than the three calls that bring
/// one home may take.
const MARGIN: Duration = Duration::from_secs(60);
/// Letters held at once: all that there are must be, or their order is not known.
const LETTERS_MAX: usize = 5_000;
/// Longest wait for the answer to a write.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(10);
/// How often it is looked whether who waits for write units may go on waiting.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// An expression has at most 4 KB, and an attribute takes some 20 bytes of it.
const ATTRIBUTES_MAX: usize = 150;

const NOT_FITTING: &str =
    "the replica holds neither what its record replaced nor what it wrote: compare by hand";
const AFTER_OTHERS: &str = "an earlier letter of its item stays";
const NOT_BEGUN: &str = "the redrive ended before it";
const NO_PLACE: &str =
    "it comes from a repair, and has no place among the records of its item: compare by hand";
const NO_IMAGES: &str = "the images that it would take are not in it";

/// What a record did to an item; `None` is no item.
#[derive(Debug, Clone, PartialEq)]
pub struct Images {
    /// Before.
    pub old: Option<Item>,
    /// After.
    pub new: Option<Item>,
}

impl Images {
    /// The images of a letter; `None` where one that it should have is missing.
    pub fn of(letter: &DeadLetter) -> Option<Self> {
        let read = |image: &Option<serde_json::Value>| image.as_ref().and_then(item_from_json);
        let (old, new) = (read(&letter.old_image), read(&letter.new_image));
        match letter.event.as_deref()? {
            "INSERT" if new.is_some() && letter.old_image.is_none() => {}
            "MODIFY" if new.is_some() && old.is_some() => {}
            "REMOVE" if old.is_some() && letter.new_image.is_none() => {}
            _ => return None,
        }
        letter.omitted.is_empty().then_some(Self { old, new })
    }
}

/// What is to be done with the letters of one item, in the order of the stream, given what the
/// replica holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fit {
    /// The first so many were applied already.
    Home(usize),
    /// The first is the next one.
    Next,
    /// Something else was applied.
    No,
}

/// How the records `chain` of one item fit to what the replica holds.
pub fn fit(chain: &[Images], held: Option<&Item>) -> Fit {
    let same = |image: &Option<Item>| match (image, held) {
        (None, None) => true,
        (Some(image), Some(held)) => same_item(image, held),
        _ => false,
    };
    match chain.first() {
        // A record that changed nothing is home.
        Some(first) if same(&first.new) => Fit::Home(1),
        // Before a later one is looked at: what that wrote may be what this one replaced.
        Some(first) if same(&first.old) => Fit::Next,
        _ => match chain.iter().rposition(|images| same(&images.new)) {
            Some(last) => Fit::Home(last + 1),
            None => Fit::No,
        },
    }
}

struct Letter {
    table: String,
    keys: Item,
    images: Images,
    /// Its place in the stream.
    at: (String, usize, String),
    receipt: Receipt,
}

/// Letters by item, in the order of the stream.
type Chains = BTreeMap<(String, ItemKey), VecDeque<Letter>>;

/// A redrive from images at work.
pub struct FromImages<'a> {
    /// The configuration.
    pub config: &'a Config,
    /// Where it works.
    pub ground: Ground<'a>,
    /// What it was asked for.
    pub options: &'a Options,
    /// What it works under.
    pub rights: &'a Rights,
    /// The tables whose replicas are there, by their names in the configuration.
    pub tables: Followed,
    /// Ends it.
    pub stop: &'a CancellationToken,
}

impl FromImages<'_> {
    /// Applies what fits until nothing does any more, or `stop`.
    pub async fn run(&self, watcher: &mut dyn Watcher) -> Report {
        let mut report = Report::default();
        let begun = uptime();
        let mut inbox = self.ground.dead_letters.inbox();
        let mut back = Vec::new();
        let mut chains = Chains::new();
        let mut ended = self
            .receive_all(begun, &mut inbox, &mut report, &mut back, &mut chains)
            .await;
        let pace = Budget::new(self.options.rate.map(std::num::NonZeroU32::get));
        for ((table, _), mut chain) in chains {
            let mut why = NOT_BEGUN;
            while ended.is_ok() && !chain.is_empty() {
                pace.spend(1).await;
                match self.bring(&mut chain, &inbox, begun, &mut report).await {
                    Ok(true) => {}
                    Ok(false) => break,
                    Err(error) => ended = Err(error),
                }
                watcher.progressed(report.home_count(), report.left_count());
            }
            if ended.is_ok() && !chain.is_empty() {
                // Why the first stays was noted; the others wait for it.
                why = AFTER_OTHERS;
                back.extend(chain.pop_front().map(|first| first.receipt));
            }
            if !chain.is_empty() {
                report.leave(&table, why, chain.len() as u64);
            }
            back.extend(chain.into_iter().map(|letter| letter.receipt));
        }
        report.ended = ended.err();
        // Later they may have shown again, and be in somebody else's hands. If it fails they show again
        // by themselves.
        if uptime() < begun + HIDDEN - MARGIN {
            let _ = inbox.give_back(&back, Duration::ZERO).await;
        }
        report
    }

    fn hides(&self) -> bool {
        matches!(self.ground.dead_letters, Store::Queue(_))
    }

    /// Receives everything there is: only then the order of an item's letters is known.
    async fn receive_all(
        &self,
        begun: Duration,
        inbox: &mut Inbox,
        report: &mut Report,
        back: &mut Vec<Receipt>,
        chains: &mut Chains,
    ) -> Result<(), String> {
        let flow = Flow {
            group: &self.config.group,
            epoch: self.ground.epoch,
            source: self.ground.source,
            target: &self.ground.target.label,
            tables: &self.tables,
            wanted: self.options.table.as_deref(),
        };
        let mut seen = HashSet::new();
        let (mut empty, mut failures, mut taken) = (0, 0, 0);
        let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
        while empty < EMPTY_MAX {
            self.go_on(begun)?;
            let batch = match inbox.next(HIDDEN).await {
                Ok(batch) => batch,
                Err(fault) if fault.policy() == Policy::Retry && failures < ATTEMPTS_MAX => {
                    failures += 1;
                    tokio::time::sleep(backoff.pause()).await;
                    continue;
                }
                Err(fault) => return Err(told(&fault)),
            };
            failures = 0;
            let news = batch.iter().any(|waiting| !seen.contains(&waiting.id));
            empty = if news { 0 } else { empty + 1 };
            for waiting in batch {
                if !seen.insert(waiting.id.clone()) {
                    back.push(waiting.receipt);
                    continue;
                }
                if let Some(letter) = judged(&flow, waiting, report, back) {
                    taken += 1;
                    let key = (letter.table.clone(), ItemKey::new(&letter.keys));
                    chains.entry(key).or_default().push_back(letter);
                }
            }
            if taken > LETTERS_MAX {
                return Err(format!(
                    "there are more than {LETTERS_MAX} letters, and their order is known only when all \
                     are held at once: narrow it with --table"
                ));
            }
        }
        for chain in chains.values_mut() {
            chain.make_contiguous().sort_by(|a, b| a.at.cmp(&b.at));
        }
        Ok(())
    }

    /// Whether another letter may be taken up; letters are hidden since `begun`.
    fn go_on(&self, begun: Duration) -> Result<(), String> {
        if self.hides() && uptime() >= begun + HIDDEN - MARGIN {
            // Received by somebody else and applied once more, a change that another one undid would
            // come back.
            Err("it took longer than letters can be held: ask again".to_owned())
        } else if self.stop.is_cancelled() {
            Err("it was asked to stop".to_owned())
        } else if (self.rights.hold.remaining())
            .min(self.ground.term.remaining())
            .is_zero()
        {
            Err(LOST.to_owned())
        } else {
            Ok(())
        }
    }

    /// Applies the first letter of an item, if it fits; false if it stays. An error ends the redrive.
    async fn bring(
        &self,
        chain: &mut VecDeque<Letter>,
        inbox: &Inbox,
        begun: Duration,
        report: &mut Report,
    ) -> Result<bool, String> {
        self.go_on(begun)?;
        let Some(first) = chain.front() else {
            return Ok(false);
        };
        let table = first.table.clone();
        let images: Vec<Images> = chain.iter().map(|letter| letter.images.clone()).collect();
        let budget = self.rights.budgets.budget(&table);
        let lane = budget.lane();
        let (mut attempts, mut backoff) = (
            Attempts::default(),
            Backoff::new(FIRST_PAUSE, LONGEST_PAUSE),
        );
        let done = loop {
            // Before the item is read: units may be long in coming.
            let payment = self.pay(&lane, &budget, first, begun).await?;
            let fitting = match self.held(first).await {
                Ok(held) => Ok(fit(&images, held.as_ref())),
                Err(fault) => Err(fault),
            };
            let written = match fitting {
                Ok(Fit::Next) => self.write(first, payment, &budget).await.map(|()| 1),
                fitting => {
                    payment.give_back();
                    match fitting {
                        Ok(Fit::Home(count)) => Ok(count),
                        Ok(_) => {
                            report.leave(&table, NOT_FITTING, 1);
                            return Ok(false);
                        }
                        Err(fault) => Err(fault),
                    }
                }
            };
            match written {
                Err(fault) if fault.class == Class::Throttled && attempts.again() => {
                    tokio::time::sleep(backoff.pause()).await;
                }
                done => break done,
            }
        };
        match done {
            Ok(count) => {
                let receipts: Vec<Receipt> = chain
                    .iter()
                    .take(count)
                    .map(|letter| letter.receipt.clone())
                    .collect();
                inbox.delete(&receipts).await.map_err(|f| told(&f))?;
                chain.drain(..count);
                *report.home.entry(table).or_default() += count as u64;
                Ok(true)
            }
            Err(fault) if fault.policy() == Policy::DeadLetter => {
                let why = format!("refused again: {} ({})", fault.code, fault.class.label());
                report.leave(&table, why, 1);
                Ok(false)
            }
            // Somebody wrote the item since it was read.
            Err(fault) if fault.class == Class::Condition => {
                report.leave(&table, NOT_FITTING, 1);
                Ok(false)
            }
            Err(fault) => {
                report.unanswered += u64::from(effect_unknown(fault.class));
                Err(told(&fault))
            }
        }
    }

    fn replica(&self, table: &str) -> String {
        let known = self.config.tables.iter().find(|known| known.name == table);
        let label = &self.ground.target.label;
        known.map_or_else(|| table.to_owned(), |known| known.name_in(label).to_owned())
    }

    async fn held(&self, letter: &Letter) -> Result<Option<Item>, Fault> {
        let asked = self
            .ground
            .target
            .tables
            .get_item()
            .table_name(self.replica(&letter.table))
            .set_key(Some(letter.keys.clone()))
            .consistent_read(true);
        let answer = asked.send().await;
        answer
            .map(|answer| answer.item)
            .map_err(|error| classify(Operation::ReadReplica, &error))
    }

    /// Pays for what a letter wants to write, and sees to it that it may still be written then.
    async fn pay<'b>(
        &self,
        lane: &'b Budget,
        budget: &'b Budget,
        letter: &Letter,
        begun: Duration,
    ) -> Result<Payment<'b>, String> {
        let units = [units_by_size(letter)];
        let mut paying = std::pin::pin!(Payment::of(lane, budget, &units));
        loop {
            tokio::select! {
                biased;
                payment = &mut paying => match self.go_on(begun) {
                    Ok(()) => return Ok(payment),
                    Err(why) => {
                        payment.give_back();
                        return Err(why);
                    }
                },
                () = tokio::time::sleep(LOOK_EVERY) => self.go_on(begun)?,
            }
        }
    }

    /// Writes what the record wrote, on condition that the replica holds what it replaced, while the epoch
    /// lasts.
    async fn write(
        &self,
        letter: &Letter,
        payment: Payment<'_>,
        budget: &Arc<Budget>,
    ) -> Result<(), Fault> {
        let bound: Arc<dyn Bound> = Arc::clone(budget) as _;
        let bound = within_term(&bound, Some(self.ground.term));
        let timeout = bound.remaining().min(ATTEMPT_TIMEOUT);
        let (answer, left) = within(bound, timeout, self.send(letter)).await;
        match answer {
            Some(Ok(told)) => {
                payment.took(units_by_size(letter), told);
                Ok(())
            }
            Some(Err((fault, strain))) => {
                match fault.class {
                    Class::Throttled => payment.throttled(strain),
                    // Where a condition does not hold, the item is paid for all the same.
                    Class::Condition => drop(payment),
                    class if left == Left::No || !effect_unknown(class) => payment.give_back(),
                    _ => drop(payment),
                }
                Err(fault)
            }
            None => Err(Fault::own(
                Operation::Write,
                Class::Network,
                "no answer in time",
                "the replica did not answer within the timeout or the epoch",
            )),
        }
    }

    async fn send(&self, letter: &Letter) -> Result<f64, (Fault, Strain)> {
        let client = &self.ground.target.tables;
        let table = self.replica(&letter.table);
        let condition = Condition::of(&letter.keys, letter.images.old.as_ref());
        match &letter.images.new {
            Some(item) => client
                .put_item()
                .table_name(table)
                .set_item(Some(item.clone()))
                .condition_expression(condition.text)
                .set_expression_attribute_names(Some(condition.names))
                .set_expression_attribute_values(condition.values)
                .return_consumed_capacity(ReturnConsumedCapacity::Total)
                .send()
                .await
                .map(|answer| units_of(answer.consumed_capacity.as_ref()))
                .map_err(|error| (classify(Operation::Write, &error), Strain::of_put(&error))),
            None => client
                .delete_item()
                .table_name(table)
                .set_key(Some(letter.keys.clone()))
                .condition_expression(condition.text)
                .set_expression_attribute_names(Some(condition.names))
                .set_expression_attribute_values(condition.values)
                .return_consumed_capacity(ReturnConsumedCapacity::Total)
                .send()
                .await
                .map(|answer| units_of(answer.consumed_capacity.as_ref()))
                .map_err(|error| {
                    let strain = Strain::of_delete(&error);
                    (classify(Operation::Write, &error), strain)
                }),
        }
    }
}

/// Write units of a letter: of the larger of both images.
fn units_by_size(letter: &Letter) -> f64 {
    let images = [&letter.images.old, &letter.images.new];
    let bytes = images.into_iter().flatten().map(item_bytes).max();
    f64::from(write_units(bytes.unwrap_or(0)))
}

/// That an item is still what it was.
struct Condition {
    text: String,
    names: HashMap<String, String>,
    values: Option<HashMap<String, AttributeValue>>,
}

impl Condition {
    fn of(keys: &Item, old: Option<&Item>) -> Self {
        let mut names = HashMap::new();
        let Some(old) = old else {
            let key = keys.keys().min().cloned().unwrap_or_default();
            names.insert("#k".to_owned(), key);
            return Self {
                text: "attribute_not_exists(#k)".to_owned(),
                names,
                values: None,
            };
        };
        let mut values = HashMap::new();
        let mut parts = Vec::with_capacity(old.len());
        // More than an expression can hold were compared a moment ago.
        for (index, (name, value)) in old.iter().take(ATTRIBUTES_MAX).enumerate() {
            names.insert(format!("#n{index}"), name.clone());
            values.insert(format!(":v{index}"), value.clone());
            parts.push(format!("#n{index}=:v{index}"));
        }
        Self {
            text: parts.join(" AND "),
            names,
            values: Some(values),
        }
    }
}

/// A letter to apply; what is none is noted and given back.
fn judged(
    flow: &Flow<'_>,
    waiting: Waiting,
    report: &mut Report,
    back: &mut Vec<Receipt>,
) -> Option<Letter> {
    let letter = match waiting.letter {
        Ok(letter) => letter,
        Err(unreadable) => {
            report.leave("", unreadable.to_string(), 1);
            back.push(waiting.receipt);
            return None;
        }
    };
    let why = match (flow.judge(&letter), letter.item_key(), Images::of(&letter)) {
        (Verdict::Bring, ..) if letter.sequence_number.is_none() => Some(NO_PLACE.to_owned()),
        (Verdict::Bring, Some(keys), Some(images)) => {
            // Numbers of one item grow over its lineage, and get wider.
            let sequence = letter.sequence_number.unwrap_or_default();
            let sequence = sequence.trim_start_matches('0').to_owned();
            return Some(Letter {
                table: letter.table,
                keys,
                images,
                at: (
                    stream_label(&letter.stream_arn).to_owned(),
                    sequence.len(),
                    sequence,
                ),
                receipt: waiting.receipt,
            });
        }
        (Verdict::Stays(why), _, _) => Some(why),
        (Verdict::Bring, _, _) => Some(NO_IMAGES.to_owned()),
        (Verdict::Other, _, _) => None,
    };
    if let Some(why) = why {
        report.leave(&letter.table, why, 1);
    }
    back.push(waiting.receipt);
    None
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::{key, letter};
    use super::*;

    fn item(value: &str) -> Item {
        Item::from([
            ("id".to_owned(), AttributeValue::S("k".to_owned())),
            ("v".to_owned(), AttributeValue::N(value.to_owned())),
        ])
    }

    fn images(old: Option<&str>, new: Option<&str>) -> Images {
        Images {
            old: old.map(item),
            new: new.map(item),
        }
    }

    #[test]
    fn a_record_fits_where_the_replica_holds_what_it_replaced() {
        let fits = |images: &Images, held: Option<&str>| {
            fit(std::slice::from_ref(images), held.map(item).as_ref())
        };
        let insert = images(None, Some("1"));
        assert_eq!(fits(&insert, None), Fit::Next);
        assert_eq!(fits(&insert, Some("1.0")), Fit::Home(1));
        assert_eq!(fits(&insert, Some("2")), Fit::No);
        let modify = images(Some("1"), Some("2"));
        assert_eq!(fits(&modify, None), Fit::No);
        assert_eq!(fits(&modify, Some("1")), Fit::Next);
        assert_eq!(fits(&modify, Some("2")), Fit::Home(1));
        assert_eq!(fits(&modify, Some("3")), Fit::No);
        let remove = images(Some("1"), None);
        assert_eq!(fits(&remove, None), Fit::Home(1));
        assert_eq!(fits(&remove, Some("1")), Fit::Next);
        assert_eq!(fits(&remove, Some("2")), Fit::No);
    }

    #[test]
    fn a_change_that_was_undone_ends_undone() {
        let toggled = [images(Some("1"), Some("2")), images(Some("2"), Some("1"))];
        let mut held = item("1");
        let mut rest = &toggled[..];
        while !rest.is_empty() {
            let home = match fit(rest, Some(&held)) {
                Fit::Home(count) => count,
                Fit::Next => {
                    held = rest[0].new.clone().unwrap();
                    1
                }
                Fit::No => panic!("it fits"),
            };
            rest = &rest[home..];
        }
        assert_eq!(held, item("1"));
        // Both were applied and neither deleted: the last of a chain says so.
        let chain = [images(Some("1"), Some("2")), images(Some("2"), Some("3"))];
        assert_eq!(fit(&chain, Some(&item("3"))), Fit::Home(2));
        assert_eq!(fit(&chain, Some(&item("4"))), Fit::No);
    }

    #[test]
    fn a_letter_of_a_repair_has_no_place_among_records_and_stays() {
        let tables = Followed::from([("orders".to_owned(), key())]);
        let flow = Flow {
            group: "g",
            epoch: 3,
            source: "east",
            target: "west",
            tables: &tables,
            wanted: None,
        };
        let judge = |sequence: Option<&str>| {
            let mut letter = letter();
            letter.event = Some("INSERT".to_owned());
            letter.new_image = Some(json!({"id": {"S": "k"}}));
            letter.sequence_number = sequence.map(str::to_owned);
            let waiting = Waiting {
                letter: Ok(letter),
                id: String::new(),
                sent_ms: None,
                receipt: Receipt::Line("day".to_owned(), 0),
            };
            let (mut report, mut back) = (Report::default(), Vec::new());
            let taken = judged(&flow, waiting, &mut report, &mut back).is_some();
            (taken, report.left_count(), back.len())
        };
        assert_eq!(judge(Some("111")), (true, 0, 0));
        assert_eq!(judge(None), (false, 1, 1));
    }

    #[test]
    fn a_letter_without_the_images_it_takes_is_not_applied() {
        let image = || Some(json!({"id": {"S": "k"}, "v": {"N": "1"}}));
        let of = |event: &str, old: bool, new: bool| {
            let mut letter = letter();
            letter.event = Some(event.to_owned());
            letter.old_image = image().filter(|_| old);
            letter.new_image = image().filter(|_| new);
            Images::of(&letter).is_some()
        };
        assert!(of("INSERT", false, true) && of("MODIFY", true, true));
        assert!(of("REMOVE", true, false));
        for (event, old, new) in [
            ("INSERT", false, false),
            ("INSERT", true, true),
            ("MODIFY", false, true),
            ("MODIFY", true, false),
            ("REMOVE", false, false),
            ("REMOVE", true, true),
            ("OTHER", true, true),
        ] {
            assert!(!of(event, old, new), "{event} {old} {new}");
        }
        let mut omitted = letter();
        omitted.event = Some("INSERT".to_owned());
        omitted.new_image = image();
        omitted.omitted = vec!["oldImage".to_owned()];
        assert_eq!(Images::of(&omitted), None);
    }
}
