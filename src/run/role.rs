//! What a worker does in its region, one role after another: it feeds, stands by, or keeps its hands
//! off. When the active region changes it finds its role anew, without a restart.
//!
//! ```text
//!            ┌──────────────────────────────────────────────┐
//!            ▼                                              │
//!      find the role ─▶ feed ────────── its epoch is over ──┤
//!            │    │                                         │
//!            │    └───▶ stand by, quarantined ── the records say otherwise
//!            └ nobody can say, or records contradict each other: told, and asked again
//! ```

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use metrics_exporter_prometheus::PrometheusHandle;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::homeward::{Aim, Homeward, last_active};
use super::records::Records;
use super::seen::Standby;
use super::start::{Role, Told, find_role};
use super::{Fed, beat, feed_until};
use crate::config::read::Loaded;
use crate::dynamo::Regions;
use crate::dynamo::clock::uptime;
use crate::error::{Exit, Failure};
use crate::lease::control::{Flow, Heed, Part, Verdict, heed, newest, part, verdict};
use crate::lease::row::ControlRow;
use crate::observe::board::Board;
use crate::observe::health::{Health, Idle};
use crate::observe::metrics;
use crate::observe::server::Stage;
use crate::observe::whereabouts::Whereabouts;

/// How often a role is looked for anew where none could be found: no more often than this.
const ASK_EVERY_MIN: Duration = Duration::from_millis(200);

/// What a worker has, whatever its role.
pub(super) struct Roles {
    pub(super) loaded: Loaded,
    pub(super) regions: Arc<Regions>,
    pub(super) health: Arc<Health>,
    pub(super) board: Arc<Board>,
    pub(super) whereabouts: Whereabouts,
    pub(super) metrics: Option<PrometheusHandle>,
    pub(super) stage: Stage,
    /// The record that counts, as last seen: for who looks.
    pub(super) record: Arc<Mutex<Option<ControlRow>>>,
}

/// What an idle worker waits in.
struct Waiting {
    active: String,
    epoch: u64,
    part: Part,
}

impl Roles {
    /// Plays `role`, and those that follow it, until `stop`.
    pub(super) async fn play(&self, role: Role, stop: &CancellationToken) -> Exit {
        let mut next = Some(role);
        // Over all roles: an epoch seen once is never forgotten.
        let records = Records::new(
            &self.loaded.config,
            &self.loaded.here,
            &self.regions,
            self.whereabouts.clone(),
        );
        let Some(records) = records else {
            // Validation has seen to it that `here` is a region.
            return Exit::CouldNotRun;
        };
        loop {
            let role = match next.take() {
                Some(role) => role,
                None => match self.find(&records, stop).await {
                    Some(role) => role,
                    None => return Exit::Done,
                },
            };
            let waiting = match role {
                Role::Feed(feed) => {
                    let tables = self.loaded.config.tables.iter();
                    let starting = tables.map(|table| table.name.as_str());
                    self.health.begin_role(None, starting);
                    self.board.begin_role();
                    metrics::standby(false);
                    let fed = feed_until(
                        self.loaded.config.clone(),
                        *feed,
                        Arc::clone(&records),
                        Arc::clone(&self.health),
                        (Arc::clone(&self.board), &self.stage),
                        self.metrics.as_ref(),
                        stop,
                    );
                    match fed.await {
                        Fed::Stopped(exit) => return exit,
                        Fed::Over => {
                            self.begin(Idle::Changing);
                            self.show_idle(None);
                            continue;
                        }
                    }
                }
                Role::Standby {
                    active,
                    epoch,
                    told,
                } => {
                    records.learn(&told);
                    Waiting {
                        active,
                        epoch,
                        part: Part::Active,
                    }
                }
                Role::Quarantined {
                    active,
                    epoch,
                    told,
                } => {
                    records.learn(&told);
                    Waiting {
                        active,
                        epoch,
                        part: Part::Quarantined,
                    }
                }
            };
            self.tell(&waiting);
            let begun = uptime();
            let read = records.read_own_if_any().await;
            let current = (waiting.active.as_str(), waiting.epoch);
            records.tell(begun, &read, current, &self.health);
            if !self.beating(self.wait(&waiting, &records, stop)).await {
                return Exit::Done;
            }
            self.begin(Idle::Changing);
        }
    }

    fn begin(&self, idle: Idle) {
        self.health.begin_role(Some(idle), std::iter::empty());
    }

    /// Shows a worker that does not feed; what it fed before says nothing any more.
    fn show_idle(&self, active: Option<&str>) {
        let tables = self.loaded.config.tables.iter();
        metrics::feeds_no_more(tables.map(|table| table.name.as_str()));
        self.board.begin_role();
        self.stage.put(Arc::new(Standby::new(
            &self.loaded,
            active,
            &self.health,
            Arc::clone(&self.record),
        )));
    }

    fn tell(&self, waiting: &Waiting) {
        let Waiting {
            active,
            epoch,
            part,
        } = waiting;
        metrics::standby(*part != Part::Quarantined);
        self.show_idle(Some(active));
        match part {
            Part::Active | Part::Fed => {
                tracing::info!(
                    active,
                    epoch,
                    "standby: this region is active, nothing is fed into it"
                );
                self.health.begin_role(None, std::iter::empty());
                self.health.set_standby(active);
            }
            Part::Quarantined => {
                tracing::warn!(
                    active,
                    epoch,
                    here = self.loaded.here,
                    "quarantined: this region was active, and may hold writes that never left; nothing is written to it"
                );
                self.begin(self.quarantine(waiting, ""));
            }
        }
    }

    /// Does `work` while the heart beats.
    async fn beating<T>(&self, work: impl Future<Output = T>) -> T {
        let never = CancellationToken::new();
        tokio::pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return done,
                () = beat(&self.health, None, self.metrics.as_ref(), &never) => {}
            }
        }
    }

    /// Waits until the records say that this worker has another part. False once asked to stop.
    async fn wait(
        &self,
        waiting: &Waiting,
        records: &Arc<Records>,
        stop: &CancellationToken,
    ) -> bool {
        let lease = self.loaded.config.leases.duration;
        let mut kept: Option<Instant> = None;
        let mut homeward: Option<Homeward> = None;
        let mut told = String::new();
        // Dropped with this function, and what it reads with it.
        let mut others = JoinSet::new();
        loop {
            if waiting.part == Part::Quarantined && kept.is_none_or(|at| at.elapsed() >= lease / 3)
            {
                kept = Some(Instant::now());
                self.keep_quarantine(records).await;
            }
            self.note_record(waiting, records);
            homeward = self.look_homeward(waiting, records, homeward).await;
            if let Some(homeward) = &homeward
                && waiting.part == Part::Quarantined
                && told != homeward.told()
            {
                told = homeward.told();
                self.health.set_idle(self.quarantine(waiting, &told));
            }
            tokio::select! {
                () = stop.cancelled() => {
                    if let Some(homeward) = homeward {
                        homeward.stop().await;
                    }
                    return false;
                }
                () = tokio::time::sleep(records.own_every()) => {}
            }
            // What does not answer changes nothing, and holds nothing up.
            while others.try_join_next().is_some() {}
            if others.is_empty() {
                let records = Arc::clone(records);
                others.spawn(async move { records.read_others().await });
            }
            let begun = uptime();
            let read = records.read_own_if_any().await;
            records.tell(begun, &read, (&waiting.active, waiting.epoch), &self.health);
            if self.has_moved(waiting, records) {
                return match homeward {
                    // Nothing is fed here before everything until now is captured.
                    Some(homeward) if self.has_returned(waiting, records) => {
                        self.close(homeward, waiting, records, stop).await
                    }
                    Some(homeward) => {
                        homeward.stop().await;
                        true
                    }
                    None => true,
                };
            }
        }
    }

    /// Waits until everything until now is captured; another epoch ends that. False once asked to stop.
    async fn close(
        &self,
        homeward: Homeward,
        waiting: &Waiting,
        records: &Arc<Records>,
        stop: &CancellationToken,
    ) -> bool {
        let ending = homeward.ending();
        let closing = homeward.close(stop);
        tokio::pin!(closing);
        loop {
            tokio::select! {
                closed = &mut closing => return closed,
                () = tokio::time::sleep(records.others_every()) => {}
            }
            let begun = uptime();
            let read = records.read_own_if_any().await;
            records.tell(begun, &read, (&waiting.active, waiting.epoch), &self.health);
            records.read_others().await;
            if !self.is_epoch(waiting, records) {
                ending.cancel();
            }
        }
    }

    /// Whether the epoch is still the one that is waited in.
    fn is_epoch(&self, waiting: &Waiting, records: &Records) -> bool {
        match verdict(&records.seen()) {
            Verdict::Decided { active, epoch } => {
                (epoch, active.as_str()) == (waiting.epoch, waiting.active.as_str())
            }
            Verdict::Conflict { .. } => false,
            Verdict::FromFile | Verdict::Unknown => true,
        }
    }

    /// Keeps the record that counts for who looks.
    fn note_record(&self, waiting: &Waiting, records: &Records) {
        let seen = records.seen();
        let newest = newest(&seen, &waiting.active, waiting.epoch).cloned();
        let mut record = self.record.lock().unwrap_or_else(PoisonError::into_inner);
        *record = newest;
    }

    /// Whether the quarantine has ended, in its epoch.
    fn has_returned(&self, waiting: &Waiting, records: &Records) -> bool {
        let seen = records.seen();
        let record = newest(&seen, &waiting.active, waiting.epoch);
        waiting.part == Part::Quarantined
            && self.is_epoch(waiting, records)
            && record.is_some_and(|record| record.has_returned(&self.loaded.here))
    }

    /// Begins, ends or looks after the reading of the own streams, as the records ask for it.
    async fn look_homeward(
        &self,
        waiting: &Waiting,
        records: &Records,
        homeward: Option<Homeward>,
    ) -> Option<Homeward> {
        let own = records.own();
        let here = &self.loaded.here;
        let aim = match waiting.part {
            Part::Quarantined => {
                let seen = records.seen();
                let newest = newest(&seen, &waiting.active, waiting.epoch);
                Some(Aim::Capture {
                    epoch: last_active(here, waiting.epoch, newest, own.as_ref()),
                    active: waiting.active.clone(),
                    now: waiting.epoch,
                })
            }
            Part::Active => own
                .filter(|own| own.epoch == waiting.epoch && own.active == *here)
                .and_then(|own| Aim::ledger(&own)),
            Part::Fed => None,
        };
        match (homeward, aim) {
            (Some(mut homeward), Some(aim)) if *homeward.aim() == aim => {
                homeward.tend();
                Some(homeward)
            }
            (Some(homeward), aim) => {
                homeward.stop().await;
                aim.and_then(|aim| self.begin_homeward(aim))
            }
            (None, Some(aim)) => self.begin_homeward(aim),
            (None, None) => None,
        }
    }

    fn begin_homeward(&self, aim: Aim) -> Option<Homeward> {
        let (config, here) = (&self.loaded.config, &self.loaded.here);
        Homeward::begin(aim, config, here, &self.regions, &self.health)
    }

    fn quarantine(&self, waiting: &Waiting, told: &str) -> Idle {
        Idle::Quarantined {
            here: self.loaded.here.clone(),
            active: waiting.active.clone(),
            epoch: waiting.epoch,
            captured: told.to_owned(),
        }
    }

    /// Makes the quarantine outlast this process: the own state table says it, too.
    async fn keep_quarantine(&self, records: &Records) {
        if let Err(fault) = records.adopt().await {
            tracing::warn!(
                code = fault.code,
                "the quarantine could not be stored in this region yet; it holds all the same"
            );
        }
    }

    fn has_moved(&self, waiting: &Waiting, records: &Records) -> bool {
        let seen = records.seen();
        match verdict(&seen) {
            Verdict::Decided { active, epoch } => {
                let own = records.own();
                let now = part(&self.loaded.here, (&active, epoch), own.as_ref(), &seen);
                (epoch, active.as_str()) != (waiting.epoch, waiting.active.as_str())
                    || now != waiting.part
            }
            Verdict::Conflict { .. } => true,
            // Nobody has a record yet, as before.
            Verdict::FromFile | Verdict::Unknown => false,
        }
    }

    /// Finds the next role, however long it takes; `None` once asked to stop.
    async fn find(&self, records: &Records, stop: &CancellationToken) -> Option<Role> {
        let every = (self.loaded.config.leases.duration / 3).max(ASK_EVERY_MIN);
        self.beating(async {
            let mut told: Option<Failure> = None;
            loop {
                let found = tokio::select! {
                    found = self.look(records) => found,
                    () = stop.cancelled() => return None,
                };
                match found {
                    Ok(role) => return Some(role),
                    Err(failure) => {
                        if told.as_ref() != Some(&failure) {
                            tracing::error!(
                                why = failure.why,
                                next = failure.next,
                                "{}",
                                failure.what
                            );
                            self.begin(Idle::Unknown(failure.clone()));
                            self.show_idle(None);
                        }
                        told = Some(failure);
                    }
                }
                tokio::select! {
                    () = stop.cancelled() => return None,
                    () = tokio::time::sleep(every) => {}
                }
            }
        })
        .await
    }

    /// Looks for the role once. What was seen before counts beside what answers now: an epoch that was
    /// acknowledged does not come back because a region fell silent.
    async fn look(&self, records: &Records) -> Result<Role, Failure> {
        let begun = uptime();
        let read = records.read_own_if_any().await;
        if let Verdict::Decided { active, epoch } = verdict(&records.seen()) {
            records.tell(begun, &read, (&active, epoch), &self.health);
        }
        if let Verdict::Conflict { .. } = verdict(&records.seen()) {
            // A higher epoch may have ended it.
            records.read_others().await;
        }
        if let Verdict::Conflict { epoch, actives } = verdict(&records.seen()) {
            return Err(contradiction(epoch, &actives));
        }
        if let Some(role) = self.idle_role(records) {
            // Nobody else has to answer for that.
            return Ok(role);
        }
        let role = find_role(&self.loaded, &self.regions).await?;
        let epoch = match &role {
            Role::Feed(feed) => feed.epoch,
            Role::Standby { epoch, .. } | Role::Quarantined { epoch, .. } => *epoch,
        };
        let seen = records.seen();
        if let Role::Feed(feed) = &role {
            let flow = Flow {
                epoch,
                active: &feed.active,
            };
            if let Heed::Conflict { epoch, actives } = heed(flow, &seen) {
                return Err(contradiction(epoch, &actives));
            }
        }
        match seen.iter().map(|record| record.epoch).max() {
            Some(highest) if highest > epoch => Err(Failure::new(
                format!("Epoch {highest} was seen, and its record cannot be read now"),
                "The regions that answer know of an older one only, and that is over",
                "Make the region reachable whose state table holds the record",
            )),
            _ => Ok(role),
        }
    }

    /// The role that what was seen says, if that is one in which nothing is written.
    fn idle_role(&self, records: &Records) -> Option<Role> {
        let seen = records.seen();
        let Verdict::Decided { active, epoch } = verdict(&seen) else {
            return None;
        };
        let own = records.own();
        match part(&self.loaded.here, (&active, epoch), own.as_ref(), &seen) {
            Part::Active => Some(Role::Standby {
                active,
                epoch,
                told: Told::default(),
            }),
            Part::Quarantined => Some(Role::Quarantined {
                active,
                epoch,
                told: Told::default(),
            }),
            Part::Fed => None,
        }
    }
}

fn contradiction(epoch: u64, actives: &[String]) -> Failure {
    Failure::new(
        format!(
            "Epoch {epoch} names several active regions: {}",
            actives.join(", ")
        ),
        "Two failovers ran against each other, and whoever applies now may overwrite the other",
        "Decide which region is active, and make a higher epoch: `farshore failover --to LABEL --accept-loss conflict`",
    )
}
