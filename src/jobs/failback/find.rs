//! Which region comes home, and from which epoch.

use std::time::Duration;

use futures::future::join_all;
use tokio_util::sync::CancellationToken;

use super::store::Store;
use super::{Home, step};
use crate::config::Config;
use crate::dynamo::clock::uptime;
use crate::dynamo::{RegionClients, Regions};
use crate::error::{Class, Failure};
use crate::lease::control::{Answer, Verdict, decide};
use crate::lease::row::{ControlRow, state};
use crate::lease::table::StateTable;
use crate::lease::term::Term;
use crate::run::start::unusable;

/// Longest wait for the record of a region.
const RECORD_TIMEOUT: Duration = Duration::from_secs(5);

/// What there is to do.
pub enum Way<'a> {
    /// A region comes home.
    Home(Box<Home<'a>>),
    /// Nobody is away.
    None {
        /// The active region.
        active: String,
        /// The epoch.
        epoch: u64,
    },
}

/// Finds the region that comes home: `wanted`, or the only one that waits.
///
/// # Errors
/// Nobody can say which region is active, it does not answer, or which one is meant is not clear.
pub async fn find<'a>(
    config: &'a Config,
    regions: &'a Regions,
    wanted: Option<&str>,
    stop: &CancellationToken,
) -> Result<Way<'a>, Failure> {
    let begun = uptime();
    let asked = regions.iter().map(async |region| {
        let state = StateTable::new(region.tables_within(RECORD_TIMEOUT), config.state_table());
        (region, state.control().await)
    });
    let mut answers = Vec::new();
    let mut silent = Vec::new();
    for (region, answer) in join_all(asked).await {
        answers.push(match answer {
            Ok(Some(record)) if record.group != config.group => {
                return Err(Failure::new(
                    format!(
                        "The state table {} in {} belongs to another group",
                        config.state_table(),
                        region.label
                    ),
                    format!(
                        "Its control record says `{}`, this configuration `{}`",
                        record.group, config.group
                    ),
                    "Give this group its own state table with leases.table",
                ));
            }
            Ok(Some(record)) => Answer::Record(Box::new(record)),
            Ok(None) => Answer::None,
            Err(fault) if fault.class == Class::NotFound => Answer::None,
            Err(fault) if fault.is_unreadable() => {
                return Err(unusable(region, &config.state_table(), &fault));
            }
            Err(fault) => {
                silent.push(format!("{} ({})", region.label, fault.code));
                Answer::Unreachable
            }
        });
    }
    let (label, epoch) = match decide(&answers) {
        Verdict::Decided { active, epoch } => (active, epoch),
        Verdict::FromFile => {
            return Ok(Way::None {
                active: config.active.clone(),
                epoch: 1,
            });
        }
        Verdict::Conflict { epoch, actives } => {
            return Err(Failure::new(
                format!(
                    "Epoch {epoch} names several active regions: {}",
                    actives.join(", ")
                ),
                "Two failovers ran against each other, and nobody can come home to two regions",
                "Decide which region is active: `farshore failover --to LABEL --accept-loss conflict`",
            ));
        }
        Verdict::Unknown => {
            return Err(Failure::new(
                "Nobody can say which region is active",
                format!("These regions did not answer: {}", silent.join(", ")),
                "Make them reachable",
            ));
        }
    };
    let active = known(regions, &label)?;
    let is_own = |record: &&ControlRow| record.active == label && record.epoch == epoch;
    let place = regions.iter().position(|region| region.label == label);
    let own = place
        .and_then(|place| answers[place].record())
        .filter(is_own);
    let Some(record) = own.cloned() else {
        return Err(Failure::new(
            format!("The active region {label} does not tell its own control record"),
            match silent.is_empty() {
                true => format!("Others say that it is active in epoch {epoch}"),
                false => format!("These regions did not answer: {}", silent.join(", ")),
            },
            format!("Make {label} reachable: what is stranded is judged by what it holds"),
        ));
    };
    let waiting = waiting(&record);
    let back = match (wanted, waiting.as_slice()) {
        (Some(wanted), _) if waiting.iter().any(|label| label == wanted) => wanted.to_owned(),
        (Some(wanted), _) => {
            known(regions, wanted)?;
            return Err(Failure::new(
                format!("{wanted} is not in quarantine, and not on its way home"),
                match waiting.is_empty() {
                    true => format!("Nobody is away: {label} is active in epoch {epoch}"),
                    false => format!("These are: {}", waiting.join(", ")),
                },
                "Leave --region away, or name one of them",
            ));
        }
        (None, []) => {
            return Ok(Way::None {
                active: label,
                epoch,
            });
        }
        (None, [only]) => only.clone(),
        (None, several) => {
            return Err(Failure::new(
                "Several regions are on their way home",
                format!("They are {}", several.join(", ")),
                "Say which with --region: one after another",
            ));
        }
    };
    let region = known(regions, &back)?;
    let tables = |region: &RegionClients| region.tables.clone();
    let past = record.past.iter();
    let past = past.filter(|one| one.active == back && one.epoch < epoch);
    Ok(Way::Home(Box::new(Home {
        config,
        regions,
        active,
        back: region,
        state: StateTable::new(tables(active), config.state_table()),
        state_back: StateTable::new(tables(region), config.state_table()),
        store: Store::new(tables(active), config.failback_table()),
        store_back: Store::new(tables(region), config.failback_table()),
        epoch_back: past.map(|one| one.epoch).max(),
        term: Term::new(epoch, config.leases.duration, begun),
        record,
        stop: stop.clone(),
    })))
}

/// The regions that are in quarantine, and those on their way home.
fn waiting(record: &ControlRow) -> Vec<String> {
    let is_on_its_way = |label: &&String| {
        let home = step::of(step::HOME, label);
        record.done_ms(&home).is_none()
    };
    let returned = record.returned.iter().filter(is_on_its_way);
    let mut waiting: Vec<String> = record.quarantined.iter().chain(returned).cloned().collect();
    waiting.sort_unstable();
    waiting.dedup();
    waiting
}

fn known<'a>(regions: &'a Regions, label: &str) -> Result<&'a RegionClients, Failure> {
    regions.get(label).ok_or_else(|| {
        let labels: Vec<&str> = regions.iter().map(|region| region.label.as_str()).collect();
        Failure::new(
            format!("Region {label} is not known"),
            format!("The configuration has {}", labels.join(", ")),
            "Name one of them, or add it to the configuration",
        )
    })
}

impl Home<'_> {
    /// Why nobody may come home yet: the failover has not come to its end.
    ///
    /// # Errors
    /// That, in three sentences.
    pub fn refuse_unfinished(&self) -> Result<(), Failure> {
        if self.record.state == state::STEADY {
            return Ok(());
        }
        let active = &self.active.label;
        Err(Failure::new(
            format!(
                "The failover to {active} has not come to its end: its record says `{}`",
                self.record.state
            ),
            "Writes of the epoch before may still take effect late, and nothing is judged beside them",
            format!("Type `farshore failover --to {active} --apply` again, and then this"),
        ))
    }
}
