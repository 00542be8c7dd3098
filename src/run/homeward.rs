//! What a worker that feeds nothing reads all the same: in quarantine, the writes that never left its region; in the
//! active region, which keys were written since the fence, while another region is away.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::dynamo::clock::rfc3339;
use crate::dynamo::{RegionClients, Regions};
use crate::error::{Class, Fault, Operation};
use crate::jobs::failback::capture::Stranding;
use crate::jobs::failback::follow::{Ending, Ground, follow};
use crate::jobs::failback::keeper::Keeper;
use crate::jobs::failback::store::Store;
use crate::lease::row::{ControlRow, TrackRow};
use crate::lease::table::StateTable;
use crate::observe::health::{Health, Scope};

/// What health knows it by.
const PART: &str = "homeward";

/// What is read, and for whom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Aim {
    /// What is stranded here since that epoch, while this region is active.
    Capture {
        /// The last epoch in which this region was active.
        epoch: Option<u64>,
        /// Label of the active region.
        active: String,
        /// The epoch of now.
        now: u64,
    },
    /// What this region writes in that epoch, which began then.
    Ledger {
        /// The epoch.
        epoch: u64,
        /// Milliseconds of the region; `None` where nobody remembers.
        begun_ms: Option<i64>,
    },
}

impl Aim {
    /// The ledger that the active region's own `record` asks for: while somebody is away.
    pub(super) fn ledger(record: &ControlRow) -> Option<Self> {
        (!record.quarantined.is_empty()).then(|| Aim::Ledger {
            epoch: record.epoch,
            begun_ms: record.begun_ms(),
        })
    }
}

/// How far each table is.
type Seen = Arc<Mutex<BTreeMap<String, TrackRow>>>;

/// The tasks that read, one for each table.
pub(super) struct Homeward {
    aim: Aim,
    config: Arc<Config>,
    here: RegionClients,
    active: Option<RegionClients>,
    health: Arc<Health>,
    me: String,
    ending: Ending,
    seen: Seen,
    tasks: JoinSet<String>,
    /// Tables that are done.
    done: Vec<String>,
}

impl Homeward {
    /// Begins. `None` where a region is not known.
    pub(super) fn begin(
        aim: Aim,
        config: &Config,
        here: &str,
        regions: &Regions,
        health: &Arc<Health>,
    ) -> Option<Self> {
        let active = match &aim {
            Aim::Capture { active, .. } => Some(regions.get(active)?.clone()),
            Aim::Ledger { .. } => None,
        };
        let mut homeward = Self {
            aim,
            config: Arc::new(config.clone()),
            here: regions.get(here)?.clone(),
            active,
            health: Arc::clone(health),
            me: super::owner(),
            ending: Ending::new(CancellationToken::new()),
            seen: Arc::default(),
            tasks: JoinSet::new(),
            done: Vec::new(),
        };
        let tables: Vec<String> = config.tables.iter().map(|t| t.name.clone()).collect();
        for table in tables {
            homeward.spawn(table);
        }
        Some(homeward)
    }

    pub(super) fn aim(&self) -> &Aim {
        &self.aim
    }

    fn spawn(&mut self, name: String) {
        let (aim, config) = (self.aim.clone(), Arc::clone(&self.config));
        let (here, active) = (self.here.clone(), self.active.clone());
        let (health, me) = (Arc::clone(&self.health), self.me.clone());
        let (ending, seen) = (self.ending.clone(), Arc::clone(&self.seen));
        self.tasks.spawn(async move {
            let Some(table) = config.tables.iter().find(|table| table.name == name) else {
                return name;
            };
            let store = Store::new(here.tables.clone(), config.failback_table());
            let state = StateTable::new(here.tables.clone(), config.state_table());
            let ground = Ground {
                config: &config,
                region: &here,
                state: &state,
                me: &me,
            };
            let tell = |told: Result<&TrackRow, &Fault>| tell(&health, &name, &seen, told);
            match (aim, active) {
                (Aim::Capture { epoch, now, .. }, Some(active)) => {
                    let mut kept = Stranding {
                        config: &config,
                        table,
                        here: &here,
                        active: &active,
                        state: StateTable::new(active.tables.clone(), config.state_table()),
                        store,
                        epoch,
                        now,
                    };
                    let place = (epoch.unwrap_or(0), name.as_str());
                    follow(&ground, place, &mut kept, &ending, tell).await;
                }
                (Aim::Ledger { epoch, begun_ms }, _) => {
                    let mut kept = Keeper::new(table, &here, store, epoch, begun_ms);
                    follow(&ground, (epoch, name.as_str()), &mut kept, &ending, tell).await;
                }
                (Aim::Capture { .. }, None) => {}
            }
            name
        });
    }

    /// Starts again what ended by itself.
    pub(super) fn tend(&mut self) {
        while let Some(ended) = self.tasks.try_join_next() {
            self.ended(ended);
        }
        let at_work = self.tasks.len() + self.done.len();
        if at_work < self.config.tables.len() && !self.ending.stop.is_cancelled() {
            tracing::error!("the reading of a table's own stream ended by itself; all start over");
            self.health.task_died(PART, "");
            self.tasks.abort_all();
            self.tasks = JoinSet::new();
            let names = self.config.tables.iter().map(|table| table.name.clone());
            let left: Vec<String> = names.filter(|name| !self.done.contains(name)).collect();
            for table in left {
                self.spawn(table);
            }
        }
    }

    fn ended(&mut self, ended: Result<String, tokio::task::JoinError>) {
        if let Ok(table) = ended {
            self.health.succeeded(Scope::State, &table, PART);
            self.health.succeeded(Scope::Source, &table, PART);
            self.done.push(table);
        }
    }

    /// Ends at once; somebody goes on with it later.
    pub(super) async fn stop(mut self) {
        self.ending.stop.cancel();
        while self.tasks.join_next().await.is_some() {}
        self.forget();
    }

    /// Ends it, whoever waits for it.
    pub(super) fn ending(&self) -> CancellationToken {
        self.ending.stop.clone()
    }

    /// The quarantine is over: takes in what was written until now, however long that takes, and ends. False if
    /// `stop` came first.
    pub(super) async fn close(mut self, stop: &CancellationToken) -> bool {
        // The clock is known to a second.
        self.ending.close(self.here.clock.now_ms() + 1_000);
        while self.done.len() < self.config.tables.len() {
            tokio::select! {
                () = stop.cancelled() => {
                    self.stop().await;
                    return false;
                }
                ended = self.tasks.join_next() => match ended {
                    Some(Ok(table)) => self.done.push(table),
                    _ => self.tend(),
                },
            }
        }
        self.forget();
        true
    }

    fn forget(&self) {
        for table in &self.config.tables {
            self.health.succeeded(Scope::State, &table.name, PART);
            self.health.succeeded(Scope::Source, &table.name, PART);
        }
    }

    /// One sentence on how far it is.
    pub(super) fn told(&self) -> String {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let tables = self.config.tables.len();
        let read = seen.values().filter_map(|row| row.read_until);
        match read.clone().min().filter(|_| read.count() == tables) {
            None => "what was written there since is being captured".to_owned(),
            Some(ms) => {
                let records: u64 = seen.values().map(|row| row.records).sum();
                let compares = seen
                    .values()
                    .any(|row| row.lacks.is_some() && row.compared.is_none());
                // To the minute: it is told anew when it changes.
                let until = rfc3339(ms - ms.rem_euclid(60_000));
                format!(
                    "what was written there since is captured until {until} at least, {records} record(s) so far{}",
                    match compares {
                        true => "; what the stream had forgotten is being looked for",
                        false => "",
                    }
                )
            }
        }
    }
}

fn tell(health: &Health, table: &str, seen: &Seen, told: Result<&TrackRow, &Fault>) {
    match told {
        Ok(row) => {
            health.succeeded(Scope::State, table, PART);
            health.succeeded(Scope::Source, table, PART);
            let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
            let known = seen.insert(table.to_owned(), row.clone());
            if let Some(lacks) = &row.lacks
                && known.is_none_or(|known| known.lacks.is_none())
            {
                let track = row.entity_type.as_str();
                tracing::warn!(
                    table,
                    track,
                    lacks,
                    "the stream alone does not tell everything"
                );
            }
        }
        Err(fault) => {
            let scope = match fault.operation {
                Operation::State => Scope::State,
                _ => Scope::Source,
            };
            health.failed(scope, table, PART, fault);
            // The service's message may name attributes, where it is about what was written.
            let why = match fault.class {
                Class::NotFound => fault.to_string(),
                _ => fault.summary(),
            };
            tracing::warn!(
                table,
                code = fault.code,
                why,
                "a table's own stream could not be read or kept yet; it is tried again"
            );
        }
    }
}

/// The last epoch in which `here` was active, as `records` remember while another one is.
pub(super) fn last_active(
    here: &str,
    epoch: u64,
    newest: Option<&ControlRow>,
    own: Option<&ControlRow>,
) -> Option<u64> {
    let past = newest.into_iter().flat_map(|record| &record.past);
    let past = past.filter(|one| one.active == here && one.epoch < epoch);
    let own = own.filter(|own| own.active == here && own.epoch < epoch);
    past.map(|one| one.epoch)
        .chain(own.map(|own| own.epoch))
        .max()
}
