//! What is kept of ways home that have come to their end: a person decides, and drops it once it is in a report.

use std::collections::BTreeMap;

use super::compare;
use super::judge::{Class, Fate};
use super::report::{Line, Lines};
use super::store::{Decided, Store};
use crate::config::Config;
use crate::dynamo::{RegionClients, Regions};
use crate::error::{Class as FaultClass, Failure, Fault};

/// Stranded writes that are kept, by region and table; and the regions that could not be asked, with why.
#[derive(Debug, Default)]
pub struct Kept {
    /// How many.
    pub many: BTreeMap<(String, String), u64>,
    /// Who did not answer.
    pub silent: Vec<(String, String)>,
    /// How many were dropped.
    pub dropped: u64,
}

/// Looks for what is kept in every region, writes it into `report`, and with `drops` removes it then.
///
/// # Errors
/// The report could not be written, or what is in it could not be removed.
pub async fn kept(
    config: &Config,
    regions: &Regions,
    report: &mut Option<Lines>,
    drops: bool,
) -> Result<Kept, Failure> {
    let mut found = Kept::default();
    for region in regions.iter() {
        let store = Store::new(region.tables.clone(), config.failback_table());
        if let Err(fault) = of_region(region, &store, report, drops, &mut found).await? {
            match fault.class {
                // Nobody made its table: nothing is kept there.
                FaultClass::NotFound => {}
                _ => found.silent.push((region.label.clone(), fault.summary())),
            }
        }
    }
    Ok(found)
}

async fn of_region(
    region: &RegionClients,
    store: &Store,
    report: &mut Option<Lines>,
    drops: bool,
    found: &mut Kept,
) -> Result<Result<(), Fault>, Failure> {
    let mut after = None;
    loop {
        let page = match compare::patiently(|| store.any_page(after.clone())).await {
            Ok(page) => page,
            Err(fault) => return Ok(Err(fault)),
        };
        let rows: Vec<_> = page
            .rows
            .into_iter()
            .filter(|one| one.decided.is_none())
            .collect();
        if let Some(report) = report {
            for one in &rows {
                report.write(&Line {
                    table: one.table(),
                    region: &region.label,
                    stranded: one,
                    active: None,
                    class: Class::Unknown,
                    fate: match drops {
                        true => Fate::Report,
                        false => Fate::Keep,
                    },
                    why: Some("kept of a way home that has come to its end; what the active region holds was not looked at"),
                })?;
            }
            report.sync()?;
        }
        for one in &rows {
            if drops && report.is_some() {
                let removed = async {
                    if store.decide(one, Decided::Reported).await? {
                        store.remove(one).await?;
                    }
                    Ok::<(), Fault>(())
                };
                if let Err(fault) = removed.await {
                    return Ok(Err(fault));
                }
                found.dropped += 1;
            } else {
                let place = (region.label.clone(), one.table().to_owned());
                *found.many.entry(place).or_default() += 1;
            }
        }
        after = page.next;
        if after.is_none() {
            return Ok(Ok(()));
        }
    }
}
