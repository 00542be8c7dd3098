//! What the source tables expire, noted in the state table: a failover turns it on in the new active
//! region, and may not be able to ask the old one any more.

use std::sync::Arc;
use std::time::Duration;

use super::context::Shared;
use crate::dynamo::clock::{host_ms, rfc3339};
use crate::dynamo::table::ttl_attribute;
use crate::error::Fault;
use crate::lease::row::TtlRow;

/// How often it is looked at. It changes by hand, and the service lets it change once an hour.
const LOOK_EVERY: Duration = Duration::from_secs(3_600);
/// How soon after a look that failed.
const AGAIN_AFTER: Duration = Duration::from_secs(60);

/// Notes what every source table expires, for as long as the worker feeds.
pub(super) async fn keep_ttl(shared: Arc<Shared>) {
    loop {
        let mut pause = LOOK_EVERY;
        for table in &shared.config.tables {
            // Without the permission, or with the source away, what was noted before stays.
            if let Err(fault) =
                note(&shared, &table.name, table.name_in(&shared.source.label)).await
            {
                tracing::debug!(
                    table = table.name,
                    code = fault.code,
                    "what the table expires could not be noted"
                );
                pause = AGAIN_AFTER;
            }
        }
        tokio::time::sleep(pause).await;
    }
}

async fn note(shared: &Shared, table: &str, name: &str) -> Result<(), Fault> {
    let attribute = ttl_attribute(&shared.source.tables, name).await?;
    let known = shared.state.ttl(table).await?;
    let source = &shared.source.label;
    let mut next = TtlRow::new(table, source, attribute, rfc3339(host_ms()));
    // Somebody else of the fleet may be faster, with the same.
    match known {
        None => shared.state.create(&next).await.map(|_| ()),
        Some(known) if known.attribute == next.attribute && known.source == next.source => Ok(()),
        Some(known) => {
            next.lease_counter = known.lease_counter + 1;
            let replaced = shared.state.replace(&next, known.lease_counter).await;
            replaced.map(|_| ())
        }
    }
}
