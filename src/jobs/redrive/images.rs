//! Bringing letters home without their source: from the images that they carry.
//!
//! Without a source nobody can say what an item ought to be now, so a letter is applied only where
//! the replica still holds what its record replaced: then nothing newer was applied. Of one item
//! several letters may wait, each the next one's predecessor; those that do not fit yet are tried
//! again until nothing fits any more.
//!
//! What this cannot know: a record that was refused may have been undone by a later one that was
//! applied (an item inserted and deleted again). Then the replica holds what the refused one
//! replaced, and the letter brings back what is gone. The command says so before it does anything.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::time::Duration;

use aws_sdk_dynamodb::types::AttributeValue;
use tokio_util::sync::CancellationToken;

use super::{EMPTY_MAX, Flow, Ground, Options, Report, Verdict, Watcher, told};
use crate::apply::budget::Budget;
use crate::config::Config;
use crate::dead_letter::message::DeadLetter;
use crate::dead_letter::{Inbox, Receipt, Waiting};
use crate::dynamo::json::item_from_json;
use crate::dynamo::transmit::Bound;
use crate::dynamo::value::{Item, same_item};
use crate::error::{Class, Fault, Operation, Policy, classify};
use crate::lease::doubts::effect_unknown;
use crate::lease::hold::Hold;
use crate::lease::row::JobRow;

/// For how long letters are hidden. A write is made on condition of what it replaces, so one that is
/// late, or made twice by two redrives, does no harm.
const HIDDEN: Duration = Duration::from_secs(15 * 60);
/// Letters that wait for their predecessors; more stay where they are.
const PARKED_MAX: usize = 1_000;
/// An expression has at most 4 KB, and an attribute takes some 20 bytes of it.
const ATTRIBUTES_MAX: usize = 150;

const NOT_FITTING: &str =
    "the replica holds neither what its record replaced nor what it wrote: compare by hand";
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

/// What is to be done with a record, given what the replica holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fit {
    /// It was applied already.
    Home,
    /// It is the next one.
    Next,
    /// Something else was applied, or its predecessor was not.
    No,
}

/// How the record of `images` fits to what the replica holds.
pub fn fit(images: &Images, held: Option<&Item>) -> Fit {
    let same = |image: &Option<Item>| match (image, held) {
        (None, None) => true,
        (Some(image), Some(held)) => same_item(image, held),
        _ => false,
    };
    // First what it wrote: a record that changed nothing is home.
    if same(&images.new) {
        Fit::Home
    } else if same(&images.old) {
        Fit::Next
    } else {
        Fit::No
    }
}

struct Letter {
    table: String,
    keys: Item,
    images: Images,
    receipt: Receipt,
}

/// A redrive from images at work.
pub struct FromImages<'a> {
    /// The configuration.
    pub config: &'a Config,
    /// Where it works.
    pub ground: Ground<'a>,
    /// What it was asked for.
    pub options: &'a Options,
    /// Its row in the state table.
    pub hold: &'a Hold<JobRow>,
    /// The tables whose replicas are there, by their names in the configuration.
    pub tables: BTreeSet<String>,
    /// Ends it.
    pub stop: &'a CancellationToken,
}

impl FromImages<'_> {
    /// Applies what fits until nothing does any more, or `stop`.
    pub async fn run(&self, watcher: &mut dyn Watcher) -> Report {
        let mut report = Report::default();
        let mut inbox = self.ground.dead_letters.inbox();
        let mut back = Vec::new();
        let mut parked = Vec::new();
        let brought = self
            .bring_all(&mut inbox, &mut report, &mut back, &mut parked, watcher)
            .await;
        if let Err(why) = brought {
            report.ended = Some(why);
        }
        for letter in parked {
            report.leave(&letter.table, NOT_FITTING, 1);
            back.push(letter.receipt);
        }
        // If it fails they show again by themselves, later.
        let _ = inbox.give_back(&back, Duration::ZERO).await;
        report
    }

    async fn bring_all(
        &self,
        inbox: &mut Inbox,
        report: &mut Report,
        back: &mut Vec<Receipt>,
        parked: &mut Vec<Letter>,
        watcher: &mut dyn Watcher,
    ) -> Result<(), String> {
        let pace = Budget::new(self.options.rate.map(std::num::NonZeroU32::get));
        let flow = Flow {
            group: &self.config.group,
            epoch: self.ground.epoch,
            source: self.ground.source,
            target: &self.ground.target.label,
            tables: &self.tables,
            wanted: self.options.table.as_deref(),
        };
        let mut seen = HashSet::new();
        let (mut empty, mut taken) = (0, 0);
        while empty < EMPTY_MAX {
            self.go_on()?;
            let batch = inbox.next(HIDDEN).await.map_err(|fault| told(&fault))?;
            empty = if batch.is_empty() { empty + 1 } else { 0 };
            for waiting in batch {
                let is_new = seen.insert(waiting.id.clone());
                if is_new && self.options.limit.is_some_and(|limit| taken >= limit) {
                    back.push(waiting.receipt);
                    return Err("--limit is reached, and there are more".to_owned());
                }
                let letter = match is_new {
                    true => judged(&flow, waiting, report, back),
                    false => None,
                };
                let Some(letter) = letter else { continue };
                taken += 1;
                pace.spend(1).await;
                self.bring(letter, inbox, report, back, parked).await?;
                watcher.progressed(report.home_count(), report.left_count());
            }
        }
        // Each round applies those whose predecessors the last one has applied.
        loop {
            let before = parked.len();
            for letter in std::mem::take(parked) {
                self.bring(letter, inbox, report, back, parked).await?;
                watcher.progressed(report.home_count(), report.left_count());
            }
            if parked.is_empty() || parked.len() == before {
                return Ok(());
            }
        }
    }

    fn go_on(&self) -> Result<(), String> {
        if self.stop.is_cancelled() {
            Err("it was asked to stop".to_owned())
        } else if self.hold.remaining().is_zero() {
            Err("its row in the state table was lost".to_owned())
        } else {
            Ok(())
        }
    }

    /// Applies one letter if it fits. An error ends the redrive.
    async fn bring(
        &self,
        letter: Letter,
        inbox: &Inbox,
        report: &mut Report,
        back: &mut Vec<Receipt>,
        parked: &mut Vec<Letter>,
    ) -> Result<(), String> {
        let stays = |report: &mut Report, back: &mut Vec<Receipt>, letter: Letter, why: &str| {
            report.leave(&letter.table, why, 1);
            back.push(letter.receipt);
        };
        if let Err(why) = self.go_on() {
            stays(report, back, letter, "the redrive ended before it");
            return Err(why);
        }
        let done = match self.held(&letter).await {
            Ok(held) => match fit(&letter.images, held.as_ref()) {
                Fit::Home => Ok(()),
                Fit::Next => self.write(&letter).await,
                Fit::No if parked.len() < PARKED_MAX => {
                    parked.push(letter);
                    return Ok(());
                }
                Fit::No => {
                    stays(report, back, letter, NOT_FITTING);
                    return Ok(());
                }
            },
            Err(fault) => Err(fault),
        };
        match done {
            Ok(()) => {
                let receipts = std::slice::from_ref(&letter.receipt);
                inbox.delete(receipts).await.map_err(|f| told(&f))?;
                *report.home.entry(letter.table).or_default() += 1;
                Ok(())
            }
            Err(fault) if fault.policy() == Policy::DeadLetter => {
                let why = format!("refused again: {} ({})", fault.code, fault.class.label());
                stays(report, back, letter, &why);
                Ok(())
            }
            // Somebody wrote the item since it was read.
            Err(fault) if fault.class == Class::Condition => {
                stays(report, back, letter, NOT_FITTING);
                Ok(())
            }
            Err(fault) => {
                report.unanswered |= effect_unknown(fault.class);
                stays(report, back, letter, "the redrive ended before it");
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

    /// Writes what the record wrote, on condition that the replica holds what it replaced.
    async fn write(&self, letter: &Letter) -> Result<(), Fault> {
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
                .send()
                .await
                .map(|_| ())
                .map_err(|error| classify(Operation::Write, &error)),
            None => client
                .delete_item()
                .table_name(table)
                .set_key(Some(letter.keys.clone()))
                .condition_expression(condition.text)
                .set_expression_attribute_names(Some(condition.names))
                .set_expression_attribute_values(condition.values)
                .send()
                .await
                .map(|_| ())
                .map_err(|error| classify(Operation::Write, &error)),
        }
    }
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
        (Verdict::Bring, Some(keys), Some(images)) => {
            return Some(Letter {
                table: letter.table,
                keys,
                images,
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

    use super::super::tests::letter;
    use super::*;

    fn item(value: &str) -> Item {
        Item::from([
            ("id".to_owned(), AttributeValue::S("k".to_owned())),
            ("v".to_owned(), AttributeValue::N(value.to_owned())),
        ])
    }

    #[test]
    fn a_record_fits_where_the_replica_holds_what_it_replaced() {
        let images = |old: Option<&str>, new: Option<&str>| Images {
            old: old.map(item),
            new: new.map(item),
        };
        let insert = images(None, Some("1"));
        assert_eq!(fit(&insert, None), Fit::Next);
        assert_eq!(fit(&insert, Some(&item("1.0"))), Fit::Home);
        assert_eq!(fit(&insert, Some(&item("2"))), Fit::No);
        let modify = images(Some("1"), Some("2"));
        assert_eq!(fit(&modify, None), Fit::No);
        assert_eq!(fit(&modify, Some(&item("1"))), Fit::Next);
        assert_eq!(fit(&modify, Some(&item("2"))), Fit::Home);
        assert_eq!(fit(&modify, Some(&item("3"))), Fit::No);
        let remove = images(Some("1"), None);
        assert_eq!(fit(&remove, None), Fit::Home);
        assert_eq!(fit(&remove, Some(&item("1"))), Fit::Next);
        assert_eq!(fit(&remove, Some(&item("2"))), Fit::No);
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
