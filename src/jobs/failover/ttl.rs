//! Time to live: on in the new active region, off in the old one. Not a part of the switch: it is the
//! control plane of two regions, and one of them may be gone. So it is tried once everything else is done,
//! and what does not work is told as the commands that do it.

use std::time::Duration;

use aws_sdk_dynamodb::types::TimeToLiveSpecification;

use super::{Failover, Survey};
use crate::backoff::Backoff;
use crate::config::Config;
use crate::dynamo::table::{ttl_attribute, ttl_is_on};
use crate::dynamo::{RegionClients, Regions};
use crate::error::{Class, Fault, Operation, Policy, classify, source_chain};
use crate::lease::row::Previous;
use crate::lease::table::StateTable;

/// How long a region is asked for, that need not answer.
const LOOK_TIMEOUT: Duration = Duration::from_secs(3);
const ATTEMPTS_MAX: u32 = 4;
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// The time to live of one table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ttl {
    /// Its name in the configuration.
    pub table: String,
    /// The attribute, where it has one; why that is not known, where it is not.
    pub attribute: Result<Option<String>, String>,
    /// What is still to be done, as commands, each with why it was not.
    pub left: Vec<(String, String)>,
}

impl Ttl {
    /// Whether nothing is left to be done for it.
    pub fn is_done(&self) -> bool {
        self.attribute.is_ok() && self.left.is_empty()
    }
}

/// What the tables of the old active region have, as far as it answers; else what the workers that fed the
/// target have noted in `state`.
pub async fn look(config: &Config, source: &RegionClients, state: &StateTable) -> Vec<Ttl> {
    let client = source.tables_within(LOOK_TIMEOUT);
    let asked = config.tables.iter().map(async |table| {
        let found = ttl_attribute(&client, table.name_in(&source.label)).await;
        let attribute = match found {
            Ok(attribute) => Ok(attribute),
            Err(fault) => match state.ttl(&table.name).await {
                Ok(Some(noted)) if noted.source == source.label => Ok(noted.attribute),
                _ => Err(fault.to_string()),
            },
        };
        Ttl {
            table: table.name.clone(),
            attribute,
            left: Vec::new(),
        }
    });
    futures::future::join_all(asked).await
}

/// The region whose tables tell what time to live they have, before a failover that `survey` saw, where the
/// configuration has it: the one that was active last, and of which nobody says otherwise.
pub fn source<'a>(survey: &Survey, regions: &'a Regions) -> Option<&'a RegionClients> {
    let records = survey.records();
    let past = records
        .iter()
        .flat_map(|record| record.past.iter().cloned());
    let actives = match survey.rivals.is_empty() {
        true => std::slice::from_ref(&survey.active),
        false => survey.rivals.as_slice(),
    };
    let now = actives.iter().map(|active| Previous {
        active: active.clone(),
        epoch: survey.epoch,
    });
    let past: Vec<Previous> = past.chain(now).collect();
    sources(&past, &survey.to)
        .first()
        .and_then(|label| regions.get(label))
}

/// The regions that time to live moves away from to `to`, the one that tells the attribute first: the last
/// one that was the only one of its epoch. Those that contradicted each other since come after it.
fn sources(all: &[Previous], to: &str) -> Vec<String> {
    let mut past: Vec<&Previous> = all.iter().filter(|one| one.active != to).collect();
    past.sort_by(|one, other| (other.epoch, &one.active).cmp(&(one.epoch, &other.active)));
    past.dedup();
    let of = |epoch: u64| {
        let of_epoch = all.iter().filter(|one| one.epoch == epoch);
        let labels: std::collections::BTreeSet<&str> =
            of_epoch.map(|one| one.active.as_str()).collect();
        labels.len()
    };
    let only = past.iter().find(|one| of(one.epoch) == 1);
    let Some(only) = only else {
        return past.iter().map(|one| one.active.clone()).collect();
    };
    let later = past.iter().filter(|one| one.epoch > only.epoch);
    let later = later
        .map(|one| &one.active)
        .filter(|label| **label != only.active);
    let mut labels: Vec<String> = std::iter::once(&only.active)
        .chain(later)
        .cloned()
        .collect();
    let mut seen = std::collections::BTreeSet::new();
    labels.retain(|label| seen.insert(label.clone()));
    labels
}

impl Failover<'_> {
    /// Switches the time to live of every table over, as far as both regions answer.
    pub(super) async fn switch_ttl(&self) -> Vec<Ttl> {
        let labels = sources(&self.record.past, &self.survey.to);
        let sources: Vec<&RegionClients> = labels
            .iter()
            .filter_map(|label| self.regions.get(label))
            .collect();
        let asked = sources.iter();
        let asked = asked.map(|source| look(self.config, source, self.state));
        let told = futures::future::join_all(asked).await;
        let Some(mut tables) = told.into_iter().reduce(merge) else {
            return Vec::new();
        };
        for (ttl, table) in tables.iter_mut().zip(&self.config.tables) {
            let Ok(Some(attribute)) = ttl.attribute.clone() else {
                continue;
            };
            let mut is_on = false;
            let off = sources.iter().map(|source| (*source, false));
            for (region, on) in std::iter::once((self.target, true)).chain(off) {
                let name = table.name_in(&region.label);
                // Off in the old region only once it is on in the new one: read again later, the old one is
                // what tells which attribute it is.
                let done = match on || is_on {
                    true => set(region, name, &attribute, on).await,
                    false => {
                        let why = "only once it is on in the new active region".to_owned();
                        ttl.left.push((command(region, name, &attribute, on), why));
                        continue;
                    }
                };
                is_on |= on && done.is_ok();
                if let Err(fault) = done {
                    let command = command(region, name, &attribute, on);
                    ttl.left.push((command, fault.to_string()));
                }
            }
        }
        tables
    }
}

/// What one region says of the tables, and another one. Two that have failed over at once may both have
/// moved it: whoever has it tells the attribute.
fn merge(one: Vec<Ttl>, other: Vec<Ttl>) -> Vec<Ttl> {
    let both = one.into_iter().zip(other).map(|(one, other)| {
        let attribute = match (one.attribute, other.attribute) {
            (Ok(Some(attribute)), _) | (_, Ok(Some(attribute))) => Ok(Some(attribute)),
            (Err(why), _) | (_, Err(why)) => Err(why),
            (Ok(None), Ok(None)) => Ok(None),
        };
        Ttl { attribute, ..one }
    });
    both.collect()
}

/// The command that turns it on or off.
pub fn command(region: &RegionClients, table: &str, attribute: &str, on: bool) -> String {
    format!(
        "aws dynamodb update-time-to-live --region {} --table-name {table} --time-to-live-specification Enabled={on},AttributeName={attribute}",
        region.region
    )
}

async fn set(region: &RegionClients, table: &str, attribute: &str, on: bool) -> Result<(), Fault> {
    let specification = TimeToLiveSpecification::builder()
        .enabled(on)
        .attribute_name(attribute)
        .build()
        .map_err(|error| {
            let why = source_chain(Some(&error));
            Fault::own(
                Operation::Provision,
                Class::Unknown,
                "request not built",
                why,
            )
        })?;
    let client = region.tables_within(LOOK_TIMEOUT);
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    for _ in 1..ATTEMPTS_MAX {
        // As it is to be already: the service refuses to do that again.
        if ttl_is_on(&client, table, attribute).await? == on {
            return Ok(());
        }
        let answer = client
            .update_time_to_live()
            .table_name(table)
            .time_to_live_specification(specification.clone())
            .send()
            .await;
        match answer.map_err(|error| classify(Operation::Provision, &error)) {
            Ok(_) => return Ok(()),
            Err(fault) if fault.policy() == Policy::Retry => {
                tokio::time::sleep(backoff.pause()).await;
            }
            Err(fault) => return Err(fault),
        }
    }
    Err(Fault::own(
        Operation::Provision,
        Class::Service,
        "not done",
        "it was tried several times",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_to_live_moves_from_the_last_region_that_nobody_contradicted() {
        let past = |all: &[(u64, &str)]| -> Vec<Previous> {
            let of = |(epoch, active): &(u64, &str)| Previous {
                active: (*active).to_owned(),
                epoch: *epoch,
            };
            all.iter().map(of).collect()
        };
        assert_eq!(sources(&past(&[(1, "a")]), "b"), ["a"]);
        assert_eq!(sources(&past(&[(1, "b"), (2, "a")]), "b"), ["a"]);
        // b and c made epoch 2 at once, and one of them, or d, was agreed on.
        let torn = past(&[(1, "a"), (2, "b"), (2, "c")]);
        assert_eq!(sources(&torn, "b"), ["a", "c"]);
        assert_eq!(sources(&torn, "d"), ["a", "b", "c"]);
        assert!(sources(&past(&[(1, "b")]), "b").is_empty());
    }

    #[test]
    fn whoever_has_it_tells_the_attribute_and_who_is_silent_leaves_it_unknown() {
        let ttl = |attribute| {
            vec![Ttl {
                table: "t".to_owned(),
                attribute,
                left: Vec::new(),
            }]
        };
        let (none, some) = (Ok(None), Ok(Some("expires".to_owned())));
        let silent = Err("no answer".to_owned());
        let merged = |one: &Result<_, _>, other: &Result<_, _>| {
            merge(ttl(one.clone()), ttl(other.clone()))
                .remove(0)
                .attribute
        };
        assert_eq!(merged(&none, &some), some);
        assert_eq!(merged(&some, &silent), some);
        assert_eq!(merged(&none, &silent), silent);
        assert_eq!(merged(&none, &none), none);
    }
}
