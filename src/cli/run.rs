//! `farshore run`.

use std::sync::Arc;

use super::stop_on_signal;
use crate::config::read::Loaded;
use crate::dynamo::Regions;
use crate::error::{Exit, Failure};
use crate::observe::{metrics, server};
use crate::run::Worker;
use crate::run::start::find_role;

pub(super) async fn run(loaded: Loaded) -> Result<Exit, Failure> {
    // First of all, so that a signal during the start is not lost.
    let stop = stop_on_signal()?;
    let listener = server::bind(loaded.config.worker.listen).await?;
    let handle = metrics::install(&loaded.config.group)?;
    let regions = Arc::new(Regions::connect(&loaded.config).await?);
    #[cfg(feature = "embedded")]
    if loaded.config.has_embedded_region() {
        crate::jobs::local::prepare(&loaded, &regions).await?;
    }
    let role = tokio::select! {
        role = find_role(&loaded, &regions) => role?,
        () = stop.cancelled() => return Ok(Exit::Done),
    };
    tracing::info!(
        listen = %loaded.config.worker.listen,
        "metrics and health are served"
    );
    let exit = Worker::new(loaded, Arc::clone(&regions), role, listener, Some(handle))
        .run(stop)
        .await;
    drop(regions);
    Ok(exit)
}
