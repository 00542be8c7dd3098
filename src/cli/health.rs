//! `farshore health`: the probe of a container. Asks whether the worker is live, not whether it
//! is ready: an outage elsewhere is no reason to restart it.

use super::answer;
use super::ask::{get, reachable};
use crate::config::read::Loaded;
use crate::error::{Exit, Failure};

pub(super) async fn run(loaded: Loaded) -> Result<Exit, Failure> {
    let address = reachable(loaded.config.worker.listen);
    let asked = get(&address.to_string(), "/livez").await;
    let (exit, text) = match asked {
        Ok((status, _)) if status.is_success() => {
            (Exit::Done, format!("live: the worker at {address} answers"))
        }
        Ok(_) => (
            Exit::Remains,
            format!("not live: the worker at {address} no longer comes round"),
        ),
        Err(error) => (
            Exit::Remains,
            format!("not live: no worker answers at {address}: {error}"),
        ),
    };
    answer(&text)?;
    Ok(exit)
}
