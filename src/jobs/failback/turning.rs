//! The flow turns round: the quarantine ends, the region that comes home is fed, made equal, and is a replica again.

use super::applying::Outcome;
use super::report::Lines;
use super::{Ended, Home, Policies, compare, step};
use crate::config::OnGap;
use crate::dynamo::table::{describe, enabled_stream, holds_new_images};
use crate::error::{Class, Failure};
use crate::jobs::failover::Watcher;
use crate::jobs::failover::survey::tables_seen;
use crate::lease::control::{Part, copy_for};
use crate::lease::row::{JobKind, Row, Track, TrackRow, comparisons};
use crate::mutation::crash;
use crate::run::proven::heard;
use crate::run::rows::Snapshot;
use crate::run::start::{check_stream, unusable};

/// How often what came in after the judgement is judged as well: somebody may write there for ever.
const PASSES_MAX: u32 = 3;

/// What was done.
#[derive(Debug, Default)]
pub struct Report {
    /// Of each table, what became of what is stranded; empty where that was done by an earlier command.
    pub outcomes: Vec<(String, Outcome)>,
    /// Stranded writes that are kept, by table.
    pub kept: Vec<(String, u64)>,
}

impl Home<'_> {
    /// Does what is left to do.
    ///
    /// # Errors
    /// Why it did not come to its end. What is done stays done.
    pub async fn run(
        &mut self,
        policies: &Policies,
        report: &mut Option<Lines>,
        watcher: &mut dyn Watcher,
    ) -> Result<Report, Ended> {
        let (active, back) = (self.active.label.clone(), self.back.label.clone());
        let mut done = Report::default();
        self.confirm().await?;
        if !self.is_done(step::TURNED) {
            self.refuse_unfinished()?;
            self.check_streams().await?;
            self.captured(watcher).await?;
            self.reach(step::CAPTURED, "").await?;
            watcher.reached(&format!(
                "captured: what is stranded in {back} is in its store"
            ));
            for _ in 0..PASSES_MAX {
                let before = self.records().await?;
                let outcomes = self.apply(policies, report, watcher).await?;
                merge(&mut done.outcomes, outcomes);
                self.captured(watcher).await?;
                if self.records().await? == before {
                    break;
                }
            }
            self.reach_applied(&done.outcomes).await?;
            crash("home-decided");
            watcher.reached(&format!(
                "applied: {}",
                self.record
                    .steps
                    .iter()
                    .find(|done| done.step == step::of(step::APPLIED, &back))
                    .map_or("", |done| done.note.as_str())
            ));
            self.turn().await?;
            crash("home-turned");
            watcher.reached(&format!(
                "turned: the quarantine of {back} is over, and it is fed from {active}"
            ));
        }
        if !self.is_done(step::EQUAL) {
            self.equal(watcher).await?;
            self.reach(step::EQUAL, "").await?;
            crash("home-equal");
            watcher.reached(&format!("equal: {back} is a whole replica of {active}"));
        }
        done.kept = self.tidy(watcher).await?;
        let kept: u64 = done.kept.iter().map(|(_, many)| many).sum();
        self.reach(step::HOME, &format!("{kept} kept")).await?;
        self.tell_home().await;
        Ok(done)
    }

    /// Makes the state table of the region say that it is home: good to know, and no more than that.
    async fn tell_home(&self) {
        let Ok(own) = self.state_back.control().await else {
            return;
        };
        let label = &self.back.label;
        if let Some(copy) = copy_for(label, Part::Fed, &self.record, own.as_ref()) {
            // Somebody else may write it at the same moment.
            let _ = self.state_back.replace_control(&copy, own.as_ref()).await;
        }
    }

    /// How many records were captured, of all tables.
    async fn records(&self) -> Result<u64, Ended> {
        let mut sum = 0;
        for table in &self.config.tables {
            sum += self
                .capture(&table.name)
                .await?
                .map_or(0, |row| row.records);
        }
        Ok(sum)
    }

    /// Refuses where the flow could not turn round: a table of the active region has no stream of new images.
    ///
    /// # Errors
    /// That, or the active region does not answer.
    pub async fn check_streams(&self) -> Result<(), Failure> {
        for table in &self.config.tables {
            let name = table.name_in(&self.active.label);
            let described = compare::patiently(|| describe(&self.active.tables, name)).await;
            let described = described.map_err(|fault| unusable(self.active, name, &fault))?;
            let described = described.ok_or_else(|| {
                Failure::new(
                    format!("There is no table {name} in {}", self.active.label),
                    "It is the source of the flow home",
                    "Correct tables[].name (or tables[].names) in the configuration",
                )
            })?;
            let stream = enabled_stream(&described).filter(|(_, view)| holds_new_images(*view));
            if stream.is_none() {
                check_stream(self.active, &described)?;
            }
        }
        Ok(())
    }

    /// Ends the quarantine. The worker there captures what was written until it hears of it, and is fed then.
    async fn turn(&mut self) -> Result<(), Ended> {
        self.confirm().await?;
        let label = self.back.label.clone();
        let (name, now_ms) = (step::of(step::TURNED, &label), self.active.clock.now_ms());
        self.write(|row| {
            row.quarantined.retain(|waiting| *waiting != label);
            if !row.has_returned(&label) {
                row.returned.push(label.clone());
            }
            row.note(&name, now_ms, "");
        })
        .await
    }

    /// Waits until the region that comes home is whole and has applied everything up to the turn.
    async fn equal(&mut self, watcher: &mut dyn Watcher) -> Result<(), Ended> {
        let turned_ms = self.done_ms(step::TURNED).unwrap_or_default();
        let mut said = String::new();
        loop {
            self.confirm().await?;
            let rows = compare::patiently(|| self.state_back.rows()).await;
            let rows = rows.map_err(|fault| unusable(self.back, self.state_back.name(), &fault))?;
            let found = Snapshot::of(rows);
            self.refuse_what_waits(&found)?;
            let (clock, _) = heard(self.active.clock.reading(), self.back.clock.reading());
            let replica_ms = self.back.clock.now_ms();
            let seen = tables_seen(self.config, &found, self.record.epoch, (clock, replica_ms));
            let missing = seen.iter().find_map(|table| {
                let loss = table
                    .losses
                    .first()
                    .map(|(name, why)| format!("{name}: {why}"));
                let behind = || {
                    // Proven where records came since; a stream in which nothing happens proves nothing.
                    let until = table.moments.estimated_ms.max(table.moments.proven_ms);
                    let open = table.doubts > 0 || until.is_none_or(|ms| ms < turned_ms);
                    open.then(|| format!("{}: not everything is applied yet", table.name))
                };
                loss.or_else(behind)
            });
            let Some(missing) = missing else {
                return Ok(());
            };
            if said != missing {
                said.clone_from(&missing);
                watcher.under_way(&format!("waiting for {}: {missing}", self.back.label));
            }
            self.pause().await?;
        }
    }

    /// What nobody does unasked.
    fn refuse_what_waits(&self, found: &Snapshot) -> Result<(), Ended> {
        let (epoch, back) = (self.record.epoch, &self.back.label);
        for job in comparisons(&found.plans, &found.segments) {
            let plan = job.plan;
            let is_ours = plan.epoch == epoch && matches!(plan.kind(), JobKind::GapRepair(_));
            let open = found.gaps.iter().any(|gap| gap.table == plan.table);
            if let (true, true, Some((extra, allowed))) = (is_ours, open, plan.too_many_deletes) {
                return Err(Ended::Waits(Failure::new(
                    format!(
                        "{extra} items of {} are in {back} and not in {}",
                        plan.table, self.active.label
                    ),
                    format!(
                        "{allowed} may be deleted unasked (reconcile.max_deletes); they are in the store or in the report where they are stranded"
                    ),
                    format!(
                        "In {back}: `farshore reconcile --table {} --max-deletes {extra} --apply`; then type the same command again",
                        plan.table
                    ),
                )));
            }
        }
        let gap = found.gaps.iter().find(|gap| gap.epoch == epoch);
        match (gap, self.config.reconcile.on_gap) {
            (Some(gap), on_gap) if on_gap != OnGap::Repair => Err(Ended::Waits(Failure::new(
                format!("{} in {back} has to be made equal", gap.table),
                "Nobody repairs a gap unasked here: reconcile.on_gap says so",
                format!(
                    "In {back}: `farshore reconcile --table {} --apply`; then type the same command again",
                    gap.table
                ),
            ))),
            _ => Ok(()),
        }
    }

    /// Removes what nobody needs any more, and counts what is kept.
    async fn tidy(&mut self, watcher: &mut dyn Watcher) -> Result<Vec<(String, u64)>, Ended> {
        let mut kept = Vec::new();
        for table in &self.config.tables {
            watcher.under_way(&format!("tidying up {}", table.name));
            let many = self.tidy_table(&table.name).await?;
            if many > 0 {
                kept.push((table.name.clone(), many));
            }
            // The row of the capture stays, closed: a worker that stood still must not begin it anew.
            let is_alone = self.record.quarantined.is_empty();
            if is_alone {
                let place = (self.record.epoch, table.name.as_str());
                let removed = compare::patiently(|| self.store.remove_ledger(place)).await;
                match removed {
                    Err(fault) if fault.class != Class::NotFound => {
                        let what = "The ledger could not be removed";
                        return Err(self.could_not(what, self.active, &fault).into());
                    }
                    _ => {}
                }
                let key = TrackRow::key_of(Track::Ledger, place.0, place.1);
                self.remove_row(&key).await?;
            }
        }
        self.remove_doubts().await?;
        Ok(kept)
    }

    async fn tidy_table(&self, table: &str) -> Result<u64, Ended> {
        let (mut kept, mut after) = (0, None);
        let failed = |fault: crate::error::Fault| {
            let what = "What was stranded could not be tidied up";
            Ended::from(self.could_not(what, self.back, &fault))
        };
        loop {
            let place = self.place(table);
            let page = compare::patiently(|| self.store_back.page(place, after.clone())).await;
            let page = page.map_err(failed)?;
            for one in page.rows {
                match one.decided {
                    Some(_) => compare::patiently(|| self.store_back.remove(&one))
                        .await
                        .map_err(failed)?,
                    None => kept += 1,
                }
            }
            after = page.next;
            if after.is_none() {
                break;
            }
        }
        if kept == 0 {
            compare::patiently(|| self.store_back.remove_parts(self.place(table)))
                .await
                .map_err(failed)?;
        }
        Ok(kept)
    }

    async fn remove_row(&self, key: &str) -> Result<(), Ended> {
        let removed = compare::patiently(|| self.state.delete_key(key)).await;
        removed.map(|_| ()).map_err(|fault| {
            let what = "A row of the way home could not be removed";
            self.could_not(what, self.active, &fault).into()
        })
    }

    /// What was in doubt when the epoch of the region that comes home ended is captured.
    async fn remove_doubts(&self) -> Result<(), Ended> {
        let rows = compare::patiently(|| self.state.rows()).await;
        let rows = rows.map_err(|fault| unusable(self.active, self.state.name(), &fault))?;
        for row in rows {
            if let Row::PastDoubt(row) = row
                && Some(row.epoch) == self.epoch_back
            {
                self.remove_row(&row.lease_key).await?;
            }
        }
        Ok(())
    }
}

/// What later passes did, added to what the first ones did.
fn merge(known: &mut Vec<(String, Outcome)>, new: Vec<(String, Outcome)>) {
    if known.is_empty() {
        *known = new;
        return;
    }
    for ((_, known), (_, new)) in known.iter_mut().zip(new) {
        known.applied += new.applied;
        known.reported += new.reported;
        known.kept = new.kept;
        known.refused.extend(new.refused);
        known.refused.sort();
        known.refused.dedup();
        known.equal += new.equal;
    }
}
