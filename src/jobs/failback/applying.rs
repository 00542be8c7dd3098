//! Does with each stranded write what was decided: applies it to the active region where that still holds what it was
//! compared with, keeps it, or reports it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::judge::{Class, Fate, Since};
use super::judging::{Counts, Judged, Reading, is_same};
use super::report::{Line, Lines};
use super::store::{Decided, Stranded};
use super::{Ended, Home, Policies, compare, step};
use crate::apply::budget::Budget;
use crate::config::Table;
use crate::dynamo::transmit::{Bound, within};
use crate::error::{Class as FaultClass, Failure, Policy};
use crate::jobs::exact::{Written, put_back, unsayable, write};
use crate::jobs::failover::Watcher;
use crate::lease::doubts::until_ms;
use crate::lease::row::print_of;
use crate::mutation::crash;

/// How often everything left is judged anew because keys changed meanwhile.
const ROUNDS_MAX: u32 = 20;
/// How often one write is tried while its failure may pass by itself.
const ATTEMPTS_MAX: u32 = 20;
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
const THROTTLED_PAUSE: Duration = Duration::from_millis(500);
/// Keys between two readings of the ledger.
const AT_ONCE: usize = 1_000;

/// How one stranded write ended.
enum Done {
    Applied,
    /// The key changed meanwhile, here or there: it is judged anew.
    Anew,
    /// The active region refuses it.
    Cannot(String),
}

/// What was done with what is stranded in a table.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Outcome {
    /// As it was judged last, with what had been decided before.
    pub counts: Counts,
    /// Found equal by this command.
    pub equal: u64,
    /// Applied before this command.
    pub applied_before: u64,
    /// Reported before this command.
    pub reported_before: u64,
    /// Applied to the active region by this command.
    pub applied: u64,
    /// Reported, and not to be kept.
    pub reported: u64,
    /// Kept in the store.
    pub kept: u64,
    /// Why some were kept that were to be applied, by reason.
    pub refused: Vec<String>,
}

impl Home<'_> {
    /// Waits until what is stranded is captured up to now, of all tables.
    ///
    /// # Errors
    /// A region could not be asked, or it was asked to stop.
    pub async fn captured(&mut self, watcher: &mut dyn Watcher) -> Result<(), Ended> {
        let until_ms = self.back.clock.now_ms();
        loop {
            let mut waits = Vec::new();
            for table in &self.config.tables {
                let row = self.capture(&table.name).await?;
                if !row.is_some_and(|row| row.is_closed() || row.holds_until(until_ms)) {
                    waits.push(table.name.clone());
                }
            }
            if waits.is_empty() {
                return Ok(());
            }
            watcher.under_way(&format!(
                "waiting for the worker in {} to capture what is stranded in {}",
                self.back.label,
                waits.join(", ")
            ));
            self.confirm().await?;
            self.pause().await?;
        }
    }

    /// Applies what is to be applied, reports what is to be reported, and leaves the rest where it is, of all tables.
    ///
    /// # Errors
    /// A region could not be asked, the report could not be written, or it was asked to stop.
    pub async fn apply(
        &mut self,
        policies: &Policies,
        report: &mut Option<Lines>,
        watcher: &mut dyn Watcher,
    ) -> Result<Vec<(String, Outcome)>, Ended> {
        let mut outcomes = Vec::new();
        for table in &self.config.tables {
            let mut reading = self.open_ledger(table).await?;
            let outcome = self
                .apply_table(table, &mut reading, policies, report, watcher)
                .await?;
            outcomes.push((table.name.clone(), outcome));
        }
        crash("home-applied");
        Ok(outcomes)
    }

    async fn apply_table(
        &mut self,
        table: &Table,
        reading: &mut Reading,
        policies: &Policies,
        report: &mut Option<Lines>,
        watcher: &mut dyn Watcher,
    ) -> Result<Outcome, Ended> {
        let mut outcome = Outcome::default();
        let budget = Budget::new(self.config.units_per_second(table));
        for round in 1.. {
            let mut counts = Counts::default();
            let judged = self
                .judge(table, reading, policies, &mut counts, watcher)
                .await?;
            if report.is_none() && counts.fate(Fate::Report) > 0 {
                return Err(Ended::Waits(Failure::new(
                    format!(
                        "{} stranded write(s) of {} would be dropped",
                        counts.fate(Fate::Report),
                        table.name
                    ),
                    "Nothing is dropped that is not in a report",
                    "Say where it is to be written: --report FILE",
                )));
            }
            if round == 1 {
                outcome.applied_before = counts.decided(Decided::Applied);
                outcome.reported_before = counts.decided(Decided::Reported);
            }
            outcome.counts = counts;
            let is_last = round >= ROUNDS_MAX;
            let mut anew = 0;
            let mut confirmed = Instant::now();
            let lease = self.config.leases.duration;
            let (mut to_report, mut kept) = (Vec::new(), Vec::new());
            let many = judged.len();
            for (number, one) in judged.into_iter().enumerate() {
                if one.fate == Fate::Apply {
                    // Before the right to write is confirmed: it may take long.
                    budget.spend(one.known.units).await;
                }
                if number % AT_ONCE == AT_ONCE - 1 {
                    // A key may be written and made what it was again.
                    self.catch_up(reading, self.active.clock.now_ms()).await?;
                }
                if number == 0 || confirmed.elapsed() >= lease / 10 {
                    self.confirm().await?;
                    confirmed = Instant::now();
                    watcher.under_way(&format!(
                        "{}: {number} of {many} stranded key(s), {} applied to {}",
                        table.name, outcome.applied, self.active.label
                    ));
                }
                match one.fate {
                    Fate::Nothing => {
                        self.decide(&one, Decided::Equal).await?;
                        outcome.equal += 1;
                    }
                    Fate::Report => to_report.push(one),
                    Fate::Keep => kept.push((one, None)),
                    Fate::Apply if is_last => {
                        kept.push((
                            one,
                            Some(
                                "the key changed, or the region throttled, all the time".to_owned(),
                            ),
                        ));
                    }
                    Fate::Apply
                        if one.class == Class::Free
                            && reading.since(&one.known.keys) != Since::Untouched =>
                    {
                        anew += 1;
                    }
                    Fate::Apply => match self.apply_one(table, &one).await? {
                        Done::Applied => outcome.applied += 1,
                        Done::Anew => anew += 1,
                        Done::Cannot(why) => kept.push((one, Some(why))),
                    },
                }
                if self.stop.is_cancelled() {
                    return Err(Ended::Stopped);
                }
            }
            outcome.reported += to_report.len() as u64;
            self.report(report, table, to_report).await?;
            if anew > 0 && !is_last {
                continue;
            }
            outcome.kept = kept.len() as u64;
            for (one, why) in kept {
                self.tell(report, table, &one, why.as_deref()).await?;
                outcome.refused.extend(why);
            }
            if let Some(report) = report {
                report.sync()?;
            }
            break;
        }
        outcome.refused.sort();
        outcome.refused.dedup();
        Ok(outcome)
    }

    async fn decide(&self, one: &Judged, decided: Decided) -> Result<(), Ended> {
        let row = &one.known;
        let stub = Stranded {
            row: row.row.clone(),
            keys: row.keys.clone(),
            image: None,
            sequence: String::new(),
            version: row.version.clone(),
            at_ms: 0,
            writes: 0,
            decided: None,
            sent_ms: None,
            parts: 0,
            parts_of: String::new(),
        };
        let noted = compare::patiently(|| self.store_back.decide(&stub, decided)).await;
        noted.map(|_| ()).map_err(|fault| {
            let what = "What was decided could not be stored";
            self.could_not(what, self.back, &fault).into()
        })
    }

    /// Writes what is dropped into the report, and only then takes note that it is dropped.
    async fn report(
        &self,
        report: &mut Option<Lines>,
        table: &Table,
        judged: Vec<Judged>,
    ) -> Result<(), Ended> {
        for one in &judged {
            self.tell(report, table, one, None).await?;
        }
        if let Some(report) = report {
            report.sync()?;
        }
        crash("home-reported");
        for one in &judged {
            self.decide(one, Decided::Reported).await?;
        }
        Ok(())
    }

    /// Writes a line of the report, where one is wanted.
    async fn tell(
        &self,
        report: &mut Option<Lines>,
        table: &Table,
        one: &Judged,
        why: Option<&str>,
    ) -> Result<(), Ended> {
        let Some(report) = report else { return Ok(()) };
        let Some(stranded) = self.row(one).await? else {
            return Ok(());
        };
        let held = self
            .held(table, std::slice::from_ref(&stranded.keys))
            .await?;
        let fate = match why {
            Some(_) => Fate::Keep,
            None => one.fate,
        };
        report.write(&Line {
            table: &table.name,
            region: &self.back.label,
            stranded: &stranded,
            active: held.first().and_then(Option::as_ref),
            class: one.class,
            fate,
            why,
        })?;
        Ok(())
    }

    /// Writes what the plan says of each write into a report: with both values.
    ///
    /// # Errors
    /// A region could not be asked, or the report could not be written.
    pub async fn tell_all(
        &self,
        report: &mut Option<Lines>,
        table: &Table,
        judged: &[Judged],
    ) -> Result<(), Ended> {
        for one in judged.iter().filter(|one| one.class != Class::Equal) {
            self.tell(report, table, one, None).await?;
        }
        match report {
            Some(report) => Ok(report.sync()?),
            None => Ok(()),
        }
    }

    async fn row(&self, one: &Judged) -> Result<Option<Stranded>, Ended> {
        let row = compare::patiently(|| self.store_back.get(&one.known.row)).await;
        row.map_err(|fault| {
            self.could_not("What is stranded could not be read", self.back, &fault)
                .into()
        })
    }

    /// Writes one to the active region, where that still holds what it was compared with. Once: whatever is not known to
    /// be done, or to have done nothing, is judged anew, beside a ledger that has what took effect in it.
    async fn apply_one(&mut self, table: &Table, one: &Judged) -> Result<Done, Ended> {
        let late = self.config.leases.late_effect;
        let Some(stranded) = self.row(one).await? else {
            return Ok(Done::Anew);
        };
        if stranded.version != one.known.version || stranded.decided.is_some() {
            return Ok(Done::Anew);
        }
        // One that got no answer, or was sent by a command that died, may take effect for so long. Sent once more before
        // that, the earlier one could come after somebody's next write, and undo it.
        if let Some(sent_ms) = stranded.sent_ms
            && one.known.read_ms <= until_ms(sent_ms, late)
        {
            self.outwait(until_ms(sent_ms, late)).await?;
            return Ok(Done::Anew);
        }
        let name = table.name_in(&self.active.label);
        let keys = std::slice::from_ref(&stranded.keys);
        for _ in 0..ATTEMPTS_MAX {
            let held = self.held(table, keys).await?.into_iter().next().flatten();
            if print_of(held.as_ref()) != one.known.held {
                return Ok(Done::Anew);
            }
            if let Some(why) = unsayable(held.as_ref()) {
                return Ok(Done::Cannot(why));
            }
            let there = self.held_in(self.back, table, keys).await?;
            if !is_same(
                there.first().and_then(Option::as_ref),
                stranded.image.as_ref(),
            ) {
                return Ok(Done::Anew);
            }
            let bound: Arc<dyn Bound> = Arc::clone(&self.term) as _;
            if bound.remaining() < self.config.leases.duration / 2 {
                self.confirm().await?;
            }
            let now_ms = self.active.clock.now_ms();
            let noted = compare::patiently(|| self.store_back.note_sent(&stranded, now_ms)).await;
            let noted = noted.map_err(|fault| {
                let what = "What is about to be written could not be stored";
                self.could_not(what, self.back, &fault)
            })?;
            if !noted {
                return Ok(Done::Anew);
            }
            let timeout = bound.remaining().min(WRITE_TIMEOUT);
            let place = (self.active, name, &stranded.keys);
            let writing = write(place, held.as_ref(), stranded.image.as_ref());
            let (answer, _) = within(bound, timeout, writing).await;
            crash("home-written");
            match answer {
                Some(Ok(Written::AsSeen)) => {
                    self.decide(one, Decided::Applied).await?;
                    return Ok(Done::Applied);
                }
                // Somebody added an attribute in that moment: the item is theirs, and is put back.
                Some(Ok(Written::Over(theirs))) => {
                    let put = put_back(place, stranded.image.as_ref(), theirs).await;
                    put.map_err(|fault| {
                        let what =
                            "An item that somebody else had just changed could not be put back";
                        self.could_not(what, self.active, &fault)
                    })?;
                    return Ok(Done::Anew);
                }
                Some(Err(fault)) if fault.class == FaultClass::Condition => {
                    return Ok(Done::Anew);
                }
                Some(Err(fault)) if fault.policy() == Policy::DeadLetter => {
                    return Ok(Done::Cannot(fault.summary()));
                }
                // It did nothing, and says so.
                Some(Err(fault)) if fault.class == FaultClass::Throttled => {
                    tokio::time::sleep(THROTTLED_PAUSE).await;
                }
                Some(Err(fault)) if fault.policy() != Policy::Retry => {
                    let what = "A stranded write could not be applied";
                    return Err(self.could_not(what, self.active, &fault).into());
                }
                Some(Err(_)) | None => {
                    self.outwait(until_ms(now_ms, late)).await?;
                    return Ok(Done::Anew);
                }
            }
        }
        Ok(Done::Anew)
    }

    /// Waits until then, by the active region's clock, and goes on confirming the right to write.
    async fn outwait(&mut self, until_ms: i64) -> Result<(), Ended> {
        while self.active.clock.now_ms() <= until_ms {
            self.confirm().await?;
            self.pause().await?;
        }
        self.confirm().await
    }

    /// Everything up to here is captured and decided; stored.
    ///
    /// # Errors
    /// The control record could not be written.
    pub async fn reach_applied(&mut self, outcomes: &[(String, Outcome)]) -> Result<(), Ended> {
        let sum = |of: fn(&Outcome) -> u64| outcomes.iter().map(|(_, one)| of(one)).sum::<u64>();
        let note = format!(
            "{} applied, {} reported, {} kept",
            sum(|one| one.applied + one.applied_before),
            sum(|one| one.reported + one.reported_before),
            sum(|one| one.kept)
        );
        self.reach(step::APPLIED, &note).await
    }
}
