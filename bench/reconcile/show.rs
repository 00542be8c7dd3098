//! What was measured, for people and as JSON, and whether it is what it should be.

use serde_json::{Value, json};

use crate::Error;
use crate::data::Answer;

pub const FARSHORE: &str = "farshore";
pub const SCAN_AND_GET: &str = "scan + BatchGet both ways";
pub const LOAD_BOTH: &str = "load both and compare";
pub const OPPOSITE: &str = "farshore, opposite order";

/// Scans a side that farshore may need where both sides are equal.
const SCANS_MAX: f64 = 1.05;
/// Megabytes that farshore may need.
const PEAK_MAX: f64 = 150.0;
const PEAK_OPPOSITE_MAX: f64 = 300.0;
/// By how much farshore should be better than scan + BatchGet, in reads and in time.
const BETTER_MIN: f64 = 2.0;
/// What part of the memory of load-both-and-compare farshore may need.
const MEMORY_PART_MAX: f64 = 0.1;

/// What one comparer took.
pub struct Row {
    pub what: &'static str,
    pub seconds: f64,
    pub processor_seconds: Option<f64>,
    pub peak_bytes: Option<u64>,
    pub answer: Answer,
    /// What is wrong with its answer.
    pub wrong: Option<String>,
}

pub struct Report {
    pub items: u64,
    pub drift: u64,
    pub loading_seconds: f64,
    pub rows: Vec<Row>,
}

/// What a comparer read on the side that it read more of.
#[derive(Default)]
struct Reads {
    /// Items scanned and keys read, for each item.
    per_item: f64,
    /// Read units, in those of one scan of the table.
    scans: f64,
}

/// A measured value, and what it should be.
struct Target {
    what: &'static str,
    /// `None` where it could not be measured.
    measured: Option<f64>,
    bound: Bound,
}

#[derive(Clone, Copy)]
enum Bound {
    AtMost(f64),
    AtLeast(f64),
}

impl Row {
    fn items_per_second(&self, items: u64) -> f64 {
        items as f64 / self.seconds
    }

    fn peak_megabytes(&self) -> Option<f64> {
        self.peak_bytes.map(|bytes| bytes as f64 / 1e6)
    }

    /// `scan` is of a comparer that read nothing by key.
    fn reads(&self, scan: &Answer) -> Reads {
        let mut reads = Reads::default();
        let sides = self.answer.sides().into_iter().zip(scan.sides());
        for ((items, units), (scan_items, scan_units)) in sides {
            // A consistent read of a small item, or of none, costs one unit. Pages of another size
            // round otherwise, by less than one unit each.
            let keys = (units - scan_units).max(0.0);
            reads.per_item = reads.per_item.max((items + keys) / scan_items);
            reads.scans = reads.scans.max(units / scan_units);
        }
        reads
    }

    fn as_json(&self, items: u64, scan: &Answer) -> Value {
        let reads = self.reads(scan);
        json!({
            "what": self.what,
            "seconds": self.seconds,
            "processor_seconds": self.processor_seconds,
            "items_per_second": self.items_per_second(items),
            "reads_per_item": reads.per_item,
            "scans_a_side": reads.scans,
            "peak_megabytes": self.peak_megabytes(),
            "answer": self.answer,
            "wrong": self.wrong,
        })
    }
}

impl Target {
    fn holds(&self) -> Option<bool> {
        self.measured.map(|measured| match self.bound {
            Bound::AtMost(most) => measured <= most,
            Bound::AtLeast(least) => measured >= least,
        })
    }

    fn as_json(&self) -> Value {
        let (word, bound) = match self.bound {
            Bound::AtMost(most) => ("at_most", most),
            Bound::AtLeast(least) => ("at_least", least),
        };
        json!({"what": self.what, "measured": self.measured, word: bound, "holds": self.holds()})
    }
}

impl Report {
    fn row(&self, what: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.what == what)
    }

    /// One scan of both sides, and nothing else.
    fn scan(&self) -> Option<&Answer> {
        self.row(LOAD_BOTH).map(|row| &row.answer)
    }

    fn targets(&self) -> Option<Vec<Target>> {
        let (farshore, opposite) = (self.row(FARSHORE)?, self.row(OPPOSITE)?);
        let (scan_and_get, load_both) = (self.row(SCAN_AND_GET)?, self.row(LOAD_BOTH)?);
        let scan = self.scan()?;
        let (reads, other_reads) = (farshore.reads(scan), scan_and_get.reads(scan));
        let part = |one: Option<f64>, of: Option<f64>| Some(one? / of?);
        let (peak, peak_of_both) = (farshore.peak_megabytes(), load_both.peak_megabytes());
        let better = other_reads.per_item / reads.per_item;
        use Bound::{AtLeast, AtMost};
        // What differs is looked at again, by key.
        let where_equal = [
            (
                "farshore, scans a side",
                Some(reads.scans),
                AtMost(SCANS_MAX),
            ),
            (
                "scan + BatchGet / farshore, reads per item",
                // Told from units, which pages round: not known to more digits.
                Some((better * 100.0).round() / 100.0),
                AtLeast(BETTER_MIN),
            ),
        ];
        let always = [
            (
                "scan + BatchGet / farshore, read units",
                Some(other_reads.scans / reads.scans),
                AtLeast(BETTER_MIN),
            ),
            (
                "scan + BatchGet / farshore, seconds",
                Some(scan_and_get.seconds / farshore.seconds),
                AtLeast(BETTER_MIN),
            ),
            ("farshore, MB", peak, AtMost(PEAK_MAX)),
            (
                "farshore in opposite order, MB",
                opposite.peak_megabytes(),
                AtMost(PEAK_OPPOSITE_MAX),
            ),
            (
                "farshore / load both, MB",
                part(peak, peak_of_both),
                AtMost(MEMORY_PART_MAX),
            ),
        ];
        let where_equal = where_equal.into_iter().filter(|_| self.drift == 0);
        let target = |(what, measured, bound)| Target {
            what,
            measured,
            bound,
        };
        Some(where_equal.chain(always).map(target).collect())
    }

    pub fn print(&self) {
        let (Some(scan), Some(targets)) = (self.scan(), self.targets()) else {
            return;
        };
        println!("{} items a side, {} differ", self.items, self.drift);
        println!(
            "{:<26} {:>8} {:>8} {:>8} {:>11} {:>13} {:>8}",
            "", "seconds", "CPU s", "items/s", "reads/item", "scans a side", "peak MB"
        );
        for row in &self.rows {
            let reads = row.reads(scan);
            println!(
                "{:<26} {:>8.1} {:>8} {:>8.0} {:>11.3} {:>13.3} {:>8}",
                row.what,
                row.seconds,
                shown(row.processor_seconds, 1),
                row.items_per_second(self.items),
                reads.per_item,
                reads.scans,
                shown(row.peak_megabytes(), 0),
            );
        }
        println!("\n{:<44} {:>9} {:>9}", "", "measured", "target");
        for target in &targets {
            let bound = match target.bound {
                Bound::AtMost(most) => format!("<= {most}"),
                Bound::AtLeast(least) => format!(">= {least}"),
            };
            let holds = match target.holds() {
                Some(true) => "holds",
                Some(false) => "DOES NOT HOLD",
                None => "not measured",
            };
            let measured = shown(target.measured, 3);
            println!("{:<44} {measured:>9} {bound:>9}  {holds}", target.what);
        }
    }

    pub fn as_json(&self) -> Value {
        let scan = self.scan();
        let rows = self.rows.iter();
        let rows: Vec<Value> = rows
            .filter_map(|row| Some(row.as_json(self.items, scan?)))
            .collect();
        let targets = self.targets().unwrap_or_default();
        json!({
            "version": 1,
            "items": self.items,
            "drift": self.drift,
            "loading_seconds": self.loading_seconds,
            "rows": rows,
            "targets": targets.iter().map(Target::as_json).collect::<Vec<_>>(),
        })
    }

    /// # Errors
    /// The wrong answers.
    pub fn check(&self) -> Result<(), Error> {
        let rows = self.rows.iter();
        let wrong: Vec<String> = rows
            .filter_map(|row| Some(format!("{}: {}", row.what, row.wrong.as_ref()?)))
            .collect();
        match wrong.is_empty() {
            true => Ok(()),
            false => Err(format!("wrong answers: {}", wrong.join("; ")).into()),
        }
    }
}

fn shown(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(|| "?".to_owned(), |value| format!("{value:.digits$}"))
}
