//! The rows of a comparison of two tables: what it is about, and its segments.

use serde::{Deserialize, Serialize};

use super::{Counted, FORMAT_VERSION, GapRow, Row};
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
    /// Gaps that are closed once it has found or made the tables equal: those it began after.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub closes: Vec<Closes>,
    /// Seconds that it takes, as was said before it began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected_s: Option<u64>,
}

/// A gap as it stood when a job began: found again since, it is another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Closes {
    /// Key of its row.
    pub key: String,
    /// Counter of its row.
    pub counter: u64,
}

impl Closes {
    /// `gap` as it stands.
    pub fn of(gap: &GapRow) -> Self {
        Self {
            key: gap.lease_key.clone(),
            counter: gap.lease_counter,
        }
    }
}

/// Who wanted a comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobKind {
    /// A person.
    Asked,
    /// The audit: this pass of it.
    Audit(u64),
    /// The worker: the first copy of a table.
    Bootstrap,
    /// The worker: this repair of a table's gaps.
    GapRepair(u64),
}

impl JobKind {
    /// The name in metrics and answers.
    pub const fn label(self) -> &'static str {
        match self {
            JobKind::Asked => "reconcile",
            JobKind::Audit(_) => "audit",
            JobKind::Bootstrap => "bootstrap",
            JobKind::GapRepair(_) => "gap-repair",
        }
    }

    /// Whether the fleet works at it by itself: nobody goes on with it by hand.
    pub const fn is_the_workers(self) -> bool {
        !matches!(self, JobKind::Asked)
    }

    /// The job's name in this epoch. A person's has a name of its own.
    pub fn job(self, epoch: u64) -> String {
        let label = self.label();
        match self {
            JobKind::Asked | JobKind::Bootstrap => format!("{label}-{epoch}"),
            JobKind::Audit(number) | JobKind::GapRepair(number) => {
                format!("{label}-{epoch}-{number}")
            }
        }
    }
}

impl JobKind {
    /// Who wanted the job of this name in this epoch.
    pub fn of(job: &str, epoch: u64) -> Self {
        let number = job.rsplit_once('-').and_then(|(_, n)| n.parse().ok());
        let number: u64 = number.unwrap_or_default();
        [
            JobKind::Bootstrap,
            JobKind::Audit(number),
            JobKind::GapRepair(number),
        ]
        .into_iter()
        .find(|kind| kind.job(epoch) == job)
        .unwrap_or(JobKind::Asked)
    }
}

impl ReconcileRow {
    /// Who wanted it.
    pub fn kind(&self) -> JobKind {
        JobKind::of(&self.job, self.epoch)
    }

    /// The number of the pass, where it is one of an audit in this epoch.
    pub fn audit_pass(&self) -> Option<u64> {
        match self.kind() {
            JobKind::Audit(number) => Some(number),
            _ => None,
        }
    }

    /// Whether it has ended with the tables equal, but for items that stand in the dead letters: a worker
    /// letters what the target refuses, and nobody else does.
    pub fn is_whole(&self) -> bool {
        let lettered = self.kind().is_the_workers();
        let ended = self.ended.as_ref();
        self.too_many_deletes.is_none() && ended.is_some_and(|counts| counts.is_whole(lettered))
    }

    /// Whether `counts`, found at its end, close the gaps it was begun after. What a person only compares
    /// changes nothing.
    pub fn closes_gaps(&self, counts: &Counts) -> bool {
        let is_the_workers = self.kind().is_the_workers();
        (self.apply || is_the_workers) && counts.is_whole(self.apply && is_the_workers)
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
    /// When the job began whose part it is: one that begins anew under the same name has other segments.
    #[serde(default)]
    pub begun: i64,
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
    /// The segment `number` of `plan`, not begun yet. Its counter begins with the time, so that no holder
    /// of one of the same name from before can take it for his.
    pub fn new(plan: &ReconcileRow, number: u32, now_ms: i64) -> Self {
        Self {
            lease_key: format!("{}#{number}", plan.lease_key),
            entity_type: "segment".to_owned(),
            format_version: FORMAT_VERSION,
            job: plan.job.clone(),
            table: plan.table.clone(),
            number,
            begun: plan.at_ms,
            lease_owner: None,
            lease_counter: u64::try_from(now_ms).unwrap_or_default(),
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

    /// Whether it is a part of `plan`, as that began.
    pub fn is_of(&self, plan: &ReconcileRow) -> bool {
        self.job == plan.job && self.table == plan.table && self.begun == plan.at_ms
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

/// Before this part of the items is read, the pace so far says nothing.
const FIRST_PART: f64 = 0.01;

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
        segments: segments.iter().filter(|row| row.is_of(plan)).collect(),
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

/// What the fleet does by itself for a table to be whole, and what it leaves to a person.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Mending {
    /// The first copy.
    pub copying: Option<HowFar>,
    /// The repair of gaps.
    pub repairing: Option<HowFar>,
    /// So many items of the replica are not in the source, and so many may be deleted.
    pub outstanding: Option<(u64, u64)>,
}

/// How far a job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HowFar {
    /// Percent of the items that were read, about.
    pub percent: u32,
    /// Seconds until the end, about; `None` where nobody can say.
    pub left_s: Option<u64>,
    /// Its own work is done.
    pub ended: bool,
}

impl Mending {
    /// Of `table`, by all comparisons.
    pub fn of(jobs: &[Progress<'_>], epoch: u64, table: &str, now_ms: i64) -> Self {
        let mut mending = Self::default();
        let of_table = |job: &&Progress<'_>| job.plan.table == table && job.plan.epoch == epoch;
        for job in jobs.iter().filter(of_table) {
            let ended = job.plan.ended.is_some();
            let how_far = HowFar {
                percent: (job.part() * 100.0) as u32,
                left_s: if ended { None } else { job.left_s(now_ms) },
                ended,
            };
            let too_many = job.plan.too_many_deletes;
            match job.plan.kind() {
                JobKind::Asked | JobKind::Audit(_) => continue,
                JobKind::Bootstrap => mending.copying = too_many.is_none().then_some(how_far),
                JobKind::GapRepair(_) if ended => {}
                JobKind::GapRepair(_) => mending.repairing = Some(how_far),
            }
            mending.outstanding = mending.outstanding.max(too_many);
        }
        mending
    }
}

impl Progress<'_> {
    /// Whether a write of it may take effect at `now_ms` or later.
    pub fn may_write(&self, now_ms: i64) -> bool {
        self.plan.apply && self.segments.iter().any(|row| row.until >= now_ms)
    }

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

    /// Seconds until its end, about, at the pace so far; as was said beforehand where it has just begun.
    /// `None` where nobody can say.
    pub fn left_s(&self, now_ms: i64) -> Option<u64> {
        let part = self.part();
        let took_s = (now_ms - self.plan.at_ms).max(0) as f64 / 1_000.0;
        let left = |whole_s: f64| Some((whole_s * (1.0 - part)) as u64);
        match (part >= FIRST_PART, self.plan.expected_s) {
            // How much there is, nobody knows.
            _ if self.plan.items == 0 => None,
            (true, _) => left(took_s / part),
            (false, Some(expected_s)) => left(expected_s as f64),
            (false, None) => None,
        }
    }

    /// Which part of the items was read, from 0 to 1, about.
    pub fn part(&self) -> f64 {
        if self.plan.ended.is_some() {
            return 1.0;
        }
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
