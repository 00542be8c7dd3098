//! The rows of a comparison of two tables: what it is about, and its segments.

use serde::{Deserialize, Serialize};

use super::{Counted, FORMAT_VERSION, Row};
use crate::jobs::reconcile::report::Counts;
use crate::lease::hold::Holdable;

/// `job#<id>#<table>`: the comparison of one table, as it was asked for. Whoever goes on with it, or
/// joins it, goes by what stands here.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ReconcileRow {
    /// Hash key.
    pub lease_key: String,
    /// `reconcile`.
    pub entity_type: String,
    /// Version of the row's form.
    pub format_version: u32,
    /// Epoch it belongs to.
    pub epoch: u64,
    /// The job, which may be about several tables.
    pub job: String,
    /// The table, by its name in the configuration.
    pub table: String,
    /// Its place among the tables of the job.
    pub order: u32,
    /// Label of the region that is right.
    pub source: String,
    /// Label of the region that is compared with it.
    pub target: String,
    /// Whether it repairs.
    pub apply: bool,
    /// How: `mirror`, `fill`, `newest=…`.
    pub strategy: String,
    /// What may be deleted, as it was asked for.
    pub max_deletes: String,
    /// Parts that each table is read in.
    pub segments: u32,
    /// Items of both tables together, about.
    pub items: u64,
    /// When it began, RFC 3339.
    pub at: String,
    /// The same, by the clock of the state table's region, in milliseconds.
    pub at_ms: i64,
    /// Grows with every update.
    pub lease_counter: u64,
    /// Somebody is at the job until then, by the same clock; every process that takes part moves it on.
    pub until: i64,
    /// Processes that took part.
    pub joined: u32,
    /// What came of it, once it has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<Counts>,
    /// When, by the clock of the state table's region, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at_ms: Option<i64>,
    /// Of an audit: when the last pass began that found both tables equal, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verified_at_ms: Option<i64>,
    /// More would have been deleted than may be, and nothing was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub too_many_deletes: Option<(u64, u64)>,
}

/// What the jobs of audits are called, before their epochs and numbers.
const AUDIT: &str = "audit";

impl ReconcileRow {
    /// The job of the pass `number` of audits.
    pub fn audit_job(epoch: u64, number: u64) -> String {
        format!("{AUDIT}-{epoch}-{number}")
    }

    /// The number of the pass, where it is one of an audit in this epoch.
    pub fn audit_pass(&self) -> Option<u64> {
        let (name, number) = self.job.rsplit_once('-')?;
        let is_audit = name == format!("{AUDIT}-{}", self.epoch);
        number.parse().ok().filter(|_| is_audit)
    }

    /// When the last pass of an audit began that found both tables equal, in milliseconds.
    pub fn verified_ms(&self) -> Option<i64> {
        let clean = |counts: &Counts| counts.different() == 0 && counts.unsettled == 0;
        match self.ended.as_ref().is_some_and(clean) {
            true => Some(self.at_ms),
            false => self.verified_at_ms,
        }
    }

    /// Key of the row of `table`.
    pub fn key(job: &str, table: &str) -> String {
        format!("job#{job}#{table}")
    }
}

impl Counted for ReconcileRow {
    fn key(&self) -> &str {
        &self.lease_key
    }

    fn counter(&self) -> u64 {
        self.lease_counter
    }
}

/// `job#<id>#<table>#<number>`: a part of both tables, held like a lease by the process that reads it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SegmentRow {
    /// Hash key.
    pub lease_key: String,
    /// `segment`.
    pub entity_type: String,
    /// Version of the row's form.
    pub format_version: u32,
    /// The job.
    pub job: String,
    /// The table, by its name in the configuration.
    pub table: String,
    /// Its number among the segments.
    pub number: u32,
    /// Who is at it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease_owner: Option<String>,
    /// Grows with every update.
    pub lease_counter: u64,
    /// No write of its owner takes effect later, by the clock of the state table's region, in
    /// milliseconds.
    pub until: i64,
    /// Where the source is read on: everything before it is settled.
    pub source: Mark,
    /// The same of the target.
    pub target: Mark,
    /// What was found before these two.
    pub counts: Counts,
    /// Digests of keys that are counted there and stand behind one of the two marks, in base64: they
    /// are met again, and not counted again.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub counted: String,
    /// Keys that are being repaired, in base64, and are not known to be right: whoever takes the row repairs
    /// them first, for what its owner wrote last may be wrong.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mending: Vec<String>,
    /// Its owner died while it repaired, or the owner before that, and nobody has come to its end since.
    #[serde(default)]
    pub dirty: bool,
    /// Keys that only the target has, in base64, while they wait to be deleted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub extra: Vec<String>,
    /// Both parts are read to their ends, and found to hold so much: items of the target, and those
    /// that only it has. What is not before the marks is in the hands of the owner.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scanned: Option<(u64, u64)>,
    /// Nothing is left to do.
    pub done: bool,
}

/// How far a side is settled.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Mark {
    /// Not at all.
    #[default]
    Start,
    /// Up to this key, as DynamoDB JSON.
    After(String),
    /// To its end.
    End,
}

impl SegmentRow {
    /// The segment `number` of a job, not begun yet.
    pub fn new(job: &str, table: &str, number: u32) -> Self {
        Self {
            lease_key: format!("{}#{number}", ReconcileRow::key(job, table)),
            entity_type: "segment".to_owned(),
            format_version: FORMAT_VERSION,
            job: job.to_owned(),
            table: table.to_owned(),
            number,
            lease_owner: None,
            lease_counter: 0,
            until: 0,
            source: Mark::Start,
            target: Mark::Start,
            counts: Counts::default(),
            counted: String::new(),
            mending: Vec::new(),
            dirty: false,
            extra: Vec::new(),
            scanned: None,
            done: false,
        }
    }

    /// Whether everything found stands in the row itself.
    pub fn is_whole(&self) -> bool {
        self.source == Mark::End && self.target == Mark::End
    }
}

impl Counted for SegmentRow {
    fn key(&self) -> &str {
        &self.lease_key
    }

    fn counter(&self) -> u64 {
        self.lease_counter
    }
}

impl Holdable for SegmentRow {
    fn count(&mut self) {
        self.lease_counter += 1;
    }

    fn set_holder(&mut self, holder: Option<String>) {
        self.lease_owner = holder;
    }

    fn until_mut(&mut self) -> &mut i64 {
        &mut self.until
    }
}

/// A comparison as the state table shows it.
#[derive(Debug, Clone, PartialEq)]
pub struct Progress<'a> {
    /// What it is about.
    pub plan: &'a ReconcileRow,
    /// Its segments that were begun.
    pub segments: Vec<&'a SegmentRow>,
}

/// The rows of comparisons among all rows of the state table.
pub fn comparison_rows(
    rows: impl IntoIterator<Item = Row>,
) -> (Vec<ReconcileRow>, Vec<SegmentRow>) {
    let (mut plans, mut segments) = (Vec::new(), Vec::new());
    for row in rows {
        match row {
            Row::Reconcile(row) => plans.push(row),
            Row::Segment(row) => segments.push(row),
            _ => {}
        }
    }
    (plans, segments)
}

/// All comparisons of the state table.
pub fn comparisons<'a>(plans: &'a [ReconcileRow], segments: &'a [SegmentRow]) -> Vec<Progress<'a>> {
    let of = |plan: &'a ReconcileRow| Progress {
        plan,
        segments: segments
            .iter()
            .filter(|row| row.job == plan.job && row.table == plan.table)
            .collect(),
    };
    plans.iter().map(of).collect()
}

/// What the audits of `table` say: when it was last found equal, in milliseconds, and how many items
/// differ now, as far as anybody knows.
pub fn audited(jobs: &[Progress<'_>], epoch: u64, table: &str) -> Option<(Option<i64>, u64)> {
    let of_table = |job: &&Progress<'_>| job.plan.table == table && job.plan.epoch == epoch;
    let mut passes: Vec<_> = jobs
        .iter()
        .filter(of_table)
        .filter_map(|job| Some((job.plan.audit_pass()?, job)))
        .collect();
    passes.sort_by_key(|(number, _)| std::cmp::Reverse(*number));
    let (_, newest) = passes.first()?;
    let ended = passes.iter().find(|(_, job)| job.plan.ended.is_some());
    let before = ended.map_or(0, |(_, job)| job.counts().different());
    Some((
        newest.plan.verified_ms(),
        newest.counts().different().max(before),
    ))
}

impl Progress<'_> {
    /// Whether somebody is at it at `now_ms`, or its last writes may still take effect.
    pub fn is_alive(&self, now_ms: i64) -> bool {
        let at_work = self.segments.iter().any(|row| row.until >= now_ms);
        self.plan.ended.is_none() && (at_work || self.plan.until >= now_ms)
    }

    /// Whether a process of it died while it repaired, in this epoch: what it wrote last nobody has
    /// verified. One that stopped cleanly left nothing unverified.
    pub fn is_unfinished(&self, epoch: u64, now_ms: i64) -> bool {
        let died = |row: &SegmentRow| row.lease_owner.is_some() && row.until < now_ms;
        let plan = self.plan;
        let is_open = plan.apply && plan.ended.is_none() && plan.epoch == epoch;
        is_open && self.segments.iter().any(|row| row.dirty || died(row))
    }

    /// What was found so far.
    pub fn counts(&self) -> Counts {
        if let Some(ended) = &self.plan.ended {
            return ended.clone();
        }
        let counts = self.segments.iter().map(|row| &row.counts);
        counts.fold(Counts::default(), |sum, one| sum + one)
    }

    /// Segments with nothing left to do.
    pub fn done(&self) -> usize {
        self.segments.iter().filter(|row| row.done).count()
    }

    /// Which part of the items was read, from 0 to 1, about.
    pub fn part(&self) -> f64 {
        let counts = self.counts();
        let read = (counts.source_items + counts.target_items) as f64;
        let by_items = match self.plan.items {
            0 => 0.0,
            items => (read / items as f64).min(0.99),
        };
        match self.done() >= self.plan.segments as usize {
            true => 1.0,
            false => by_items,
        }
    }
}
