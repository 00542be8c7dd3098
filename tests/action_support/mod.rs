//! Actions as a configuration writes them, run as a failover runs them.
#![allow(dead_code, reason = "each test binary uses a part of it")]

pub mod hook;

use farshore::actions::{Moment, Outcome, run_one};
use farshore::config::read::parse;
use farshore::config::{Action, Config};
use farshore::dynamo::Regions;

/// A configuration with `actions`, each as the text of its section.
pub fn config(actions: &[&str]) -> Config {
    let mut text = r#"group = "orders"
active = "us-east-1"
here = "us-west-2"
[regions.us-east-1]
[regions.us-west-2]
[[tables]]
name = "orders"
[dead_letters]
directory = "/nonexistent"
"#
    .to_owned();
    for action in actions {
        text.push_str(&format!("[[actions]]\n{action}\n"));
    }
    parse("farshore.toml", &text, &[]).unwrap().config
}

pub fn actions(actions: &[&str]) -> Vec<Action> {
    config(actions).actions
}

/// Clients of both regions; nothing is called by making them.
pub async fn regions() -> Regions {
    Regions::connect(&config(&[])).await.unwrap()
}

pub fn moment(epoch: u64) -> Moment<'static> {
    Moment {
        group: "orders",
        region: "us-west-2",
        previous: "us-east-1",
        epoch,
        reason: "fire in \"AZ 1\"",
    }
}

/// Runs one action in epoch 7.
pub async fn run(action: &str) -> Outcome {
    at_epoch(action, 7).await
}

pub async fn at_epoch(action: &str, epoch: u64) -> Outcome {
    let actions = actions(&[action]);
    run_one(&actions[0], &moment(epoch), &regions().await).await
}
