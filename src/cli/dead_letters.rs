//! `farshore dead-letters`: what waits to be brought home. Nothing is consumed.

use std::time::Duration;

use serde_json::json;

use super::{answer, answer_json};
use crate::config::read::Loaded;
use crate::dead_letter::Store;
use crate::dead_letter::survey::{Survey, survey};
use crate::dynamo::Regions;
use crate::dynamo::clock::host_ms;
use crate::error::{Exit, Failure};

/// Arguments of `dead-letters`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// How many letters of a queue are looked at to tell them by kind
    #[arg(long, value_name = "N", default_value_t = 1_000)]
    look: u64,
    /// Answers as JSON
    #[arg(long)]
    json: bool,
}

pub(super) async fn run(loaded: Loaded, args: &Args) -> Result<Exit, Failure> {
    super::provision::refuse_embedded(&loaded, "dead-letters")?;
    let regions = Regions::connect(&loaded.config).await?;
    let region = regions.get(&loaded.here).ok_or_else(|| {
        Failure::new(
            format!("Region {} is not known", loaded.here),
            "It is not in the configuration",
            "Set `here` to one of the regions",
        )
    })?;
    let store = Store::open(&loaded.config.dead_letters, region).await?;
    let found = survey(&store, args.look).await.map_err(|fault| {
        Failure::from_fault(
            format!("The dead letters in {} could not be read", store.name()),
            &fault,
        )
    })?;
    if args.json {
        answer_json(&as_json(&store.name(), &found))?;
    } else {
        answer(&as_text(&store.name(), &found))?;
    }
    Ok(match found.is_empty() {
        true => Exit::Done,
        false => Exit::Remains,
    })
}

fn as_json(place: &str, found: &Survey) -> serde_json::Value {
    json!({
        "version": 1,
        "place": place,
        "waiting": found.waiting,
        "inFlight": found.in_flight,
        "lookedAt": found.looked_at,
        "notLooked": found.not_looked,
        "oldestSecondsLeft": found.time_left(host_ms()).map(|left| left.as_secs()),
        "groups": found.groups.iter().map(|(kind, group)| json!({
            "table": kind.table,
            "event": kind.event,
            "code": kind.code,
            "class": kind.class,
            "letters": group.letters,
            "oldest": group.oldest,
        })).collect::<Vec<_>>(),
        "unreadable": found.unreadable,
        "brokenLines": found.broken,
    })
}

/// The survey for people.
pub(super) fn as_text(place: &str, found: &Survey) -> String {
    let mut lines = vec![format!("dead letters in {place}")];
    if found.is_empty() {
        lines.push("  none".to_owned());
    } else {
        let mut head = format!("  {} waiting", found.waiting);
        if found.in_flight > 0 {
            head += &format!(
                ", {} received by somebody and neither deleted nor given back",
                found.in_flight
            );
        }
        lines.push(head);
    }
    if let Some(left) = found.time_left(host_ms()) {
        lines.push(format!(
            "  the queue forgets the oldest in {}",
            humantime::format_duration(Duration::from_secs(left.as_secs() / 60 * 60))
        ));
    }
    if let Some(why) = &found.not_looked {
        lines.push(format!("  not looked into: {why}"));
    } else if found.looked_at < found.waiting {
        lines.push(format!("  of the {} looked at:", found.looked_at));
    }
    for (kind, group) in &found.groups {
        lines.push(format!(
            "  {:>7}  {}  {}  {} ({}), oldest of {}",
            group.letters, kind.table, kind.event, kind.code, kind.class, group.oldest
        ));
    }
    for (why, letters) in &found.unreadable {
        lines.push(format!("  {letters:>7}  not readable: {why}"));
    }
    if found.broken > 0 {
        lines.push(format!(
            "  {} line(s) that a crash left half-written: their letters were made again",
            found.broken
        ));
    }
    lines.join("\n")
}
