//! What this worker shows of itself and its group.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use super::context::Shared;
use super::proven::heard;
use crate::config::Config;
use crate::config::read::Loaded;
use crate::dynamo::clock::{host_ms, rfc3339};
use crate::lease::row::ControlRow;
use crate::observe::events;
use crate::observe::headline::headline;
use crate::observe::health::{Health, OpenOutage, Scope};
use crate::observe::history::rounded;
use crate::observe::metrics;
use crate::observe::recovery::{Live, of_group};
use crate::observe::server::Show;
use crate::observe::view::build::{Asked, Facts, Rows, Seen, TableFacts, build};
use crate::observe::view::homeward;
use crate::observe::view::{Answering, Outage, View};

/// A worker that feeds.
pub struct Feeding {
    shared: Arc<Shared>,
    since: String,
}

impl Feeding {
    /// Shows the worker of `shared`, which has just started.
    pub fn new(shared: &Arc<Shared>) -> Self {
        Self {
            shared: Arc::clone(shared),
            since: rfc3339(host_ms()),
        }
    }

    fn facts(&self) -> Facts {
        let shared = &self.shared;
        let (health, board) = (&shared.health, &shared.board);
        let outages = health.outages();
        let letters = health.letters();
        let tables = board.tables();
        let of_table = |table: &crate::config::Table| {
            let totals = tables.get(&table.name);
            let facts = TableFacts {
                records: totals.map_or(0, |totals| totals.records.load(Ordering::Relaxed)),
                lag_s: board.history.lag_s(&table.name),
            };
            (table.name.clone(), facts)
        };
        Facts {
            answering: Some(answering(&shared.owner, &self.since)),
            reasons: health.reasons(),
            asked: self.asked(&outages),
            outages: outages.iter().map(|open| self.outage(open)).collect(),
            letters: letters.map(|letters| {
                let left = letters.left.map(|left| rounded(left.as_secs_f64()));
                (letters.waiting, left)
            }),
            lettered: board.letters(),
            tables: shared.config.tables.iter().map(of_table).collect(),
            events: events::recent(),
            history: Some(board.history.shown()),
        }
    }

    fn region_of(&self, scope: Scope) -> &str {
        match scope {
            Scope::Source => &self.shared.source.label,
            Scope::Replica | Scope::State | Scope::DeadLetters => &self.shared.target.label,
        }
    }

    /// Both regions are asked all the time; what does not answer is an outage.
    fn asked(&self, outages: &[OpenOutage]) -> Vec<Asked> {
        let both = [&self.shared.source.label, &self.shared.target.label];
        let quiet = both.into_iter().map(|label| Asked {
            label: label.clone(),
            trouble: None,
        });
        // Dead letters may lie anywhere.
        let troubles = outages
            .iter()
            .filter(|open| open.scope != Scope::DeadLetters)
            .map(|open| Asked {
                label: self.region_of(open.scope).to_owned(),
                trouble: Some((open.fault.clone(), Some(since(open)))),
            });
        quiet.chain(troubles).collect()
    }

    fn outage(&self, open: &OpenOutage) -> Outage {
        Outage {
            scope: open.scope.label().to_owned(),
            table: Some(open.table.clone()).filter(|table| !table.is_empty()),
            region: self.region_of(open.scope).to_owned(),
            since: since(open),
            class: open.fault.class.label().to_owned(),
            text: open.fault.summary().to_owned(),
            next: open.fault.next_step().to_owned(),
        }
    }
}

fn since(open: &OpenOutage) -> String {
    let lasted = i64::try_from(open.lasted.as_millis()).unwrap_or(i64::MAX);
    rfc3339(host_ms().saturating_sub(lasted))
}

fn answering(id: &str, since: &str) -> Answering {
    Answering {
        id: id.to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        since: since.to_owned(),
    }
}

impl Show for Feeding {
    fn view(&self) -> View {
        let shared = &self.shared;
        let rows = shared.rows.borrow().clone();
        let (clock, clock_of) = shared.clock_and_whose();
        let live = shared.board.live();
        build(Seen {
            config: &shared.config,
            here: &shared.target.label,
            active: Some(&shared.source.label),
            clock,
            clock_of,
            replica_ms: shared.target.clock.now_ms(),
            host_ms: host_ms(),
            rows: rows.seen(),
            live: &live,
            facts: self.facts(),
        })
    }

    fn before_metrics(&self) {
        let shared = &self.shared;
        let clock = shared.clock();
        let points = shared.board.points();
        for (table, moments) in &points {
            metrics::recovery_point(table, moments.age(clock));
        }
        let heard = shared.source.clock.reading();
        let error_s = heard.map_or(f64::INFINITY, |heard| heard.error_ms as f64 / 1_000.0);
        let group = of_group(points.values());
        metrics::group_recovery_point(group.age(clock), error_s);
        let outages = shared.health.outages();
        let tables = shared.config.tables.iter().map(|table| table.name.as_str());
        for table in tables.chain([""]) {
            for scope in Scope::ALL {
                let is_open = (outages.iter()).any(|of| of.table == table && of.scope == scope);
                metrics::outage(table, scope, is_open);
            }
        }
        for (table, totals) in shared.board.tables() {
            let at_ms = totals.last_record_ms.load(Ordering::Relaxed);
            metrics::last_record(&table, at_ms);
        }
    }
}

/// A worker that feeds nothing: its region is the active one, in quarantine, or it cannot be said what it
/// is for.
pub struct Standby {
    config: Config,
    here: String,
    active: Option<String>,
    health: Arc<Health>,
    /// The record that counts, as last seen.
    record: Arc<Mutex<Option<ControlRow>>>,
    /// This process start, and when that was.
    id: String,
    since: String,
}

impl Standby {
    /// Shows a worker that does not feed from now on; `active` is the active region, where that is known.
    pub fn new(
        loaded: &Loaded,
        active: Option<&str>,
        health: &Arc<Health>,
        record: Arc<Mutex<Option<ControlRow>>>,
    ) -> Self {
        Self {
            record,
            config: loaded.config.clone(),
            here: loaded.here.clone(),
            active: active.map(str::to_owned),
            health: Arc::clone(health),
            id: super::owner(),
            since: rfc3339(host_ms()),
        }
    }
}

impl Show for Standby {
    fn view(&self) -> View {
        let (clock, clock_of) = heard(None, None);
        let record = self.record.lock().unwrap_or_else(PoisonError::into_inner);
        let record = record.clone();
        let active = self.active.as_deref();
        let of_role = record
            .as_ref()
            .filter(|record| Some(record.active.as_str()) == active);
        let mut view = build(Seen {
            config: &self.config,
            here: &self.here,
            active: self.active.as_deref(),
            clock,
            clock_of,
            replica_ms: host_ms(),
            host_ms: host_ms(),
            rows: Rows::default(),
            live: &Live::new(),
            facts: Facts {
                answering: Some(answering(&self.id, &self.since)),
                reasons: self.health.reasons(),
                tables: BTreeMap::new(),
                events: events::recent(),
                ..Facts::default()
            },
        });
        view.home = homeward(&self.here, of_role, &[]);
        view.headline = headline(&view);
        view
    }

    fn before_metrics(&self) {}
}
