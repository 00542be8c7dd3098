//! `farshore provision`.

use serde_json::json;

use super::{answer, answer_json};
use crate::config::read::Loaded;
use crate::dynamo::Regions;
use crate::error::{Exit, Failure};
use crate::jobs::provision::{Applied, Plan, apply, plan};

/// Arguments of `provision`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Creates what the plan names; without it nothing is changed
    #[arg(long)]
    apply: bool,
    /// Answers as JSON
    #[arg(long)]
    json: bool,
}

/// Embedded regions live only within one process, so commands about lasting things cannot use
/// them.
pub(super) fn refuse_embedded(loaded: &Loaded, command: &str) -> Result<(), Failure> {
    if !loaded.config.has_embedded_region() {
        return Ok(());
    }
    Err(Failure::new(
        format!("`{command}` cannot work on embedded regions"),
        "endpoint_url = \"embedded\" lives inside one process and ends with it",
        "Use `farshore run` with this file: it provisions embedded regions by itself",
    ))
}

pub(super) async fn run(loaded: Loaded, args: &Args) -> Result<Exit, Failure> {
    refuse_embedded(&loaded, "provision")?;
    let regions = Regions::connect(&loaded.config).await?;
    let plan = plan(&loaded, &regions).await?;
    let planned: Vec<String> = plan.steps.iter().map(|step| step.text.clone()).collect();
    let notes = plan.notes.clone();
    if !args.apply {
        return show_plan(&plan, args.json);
    }
    let applied = apply(plan).await;
    show_applied(&applied, &planned, &notes, args.json)?;
    match applied.failed {
        Some(failure) => Err(failure),
        None => Ok(Exit::Done),
    }
}

fn show_plan(plan: &Plan, as_json: bool) -> Result<Exit, Failure> {
    let steps: Vec<&str> = plan.steps.iter().map(|step| step.text.as_str()).collect();
    if as_json {
        answer_json(&json!({
            "version": 1,
            "applied": false,
            "planned": steps,
            "done": [],
            "notes": plan.notes,
        }))?;
    } else {
        let mut lines: Vec<String> = plan
            .notes
            .iter()
            .map(|note| format!("  = {note}"))
            .collect();
        lines.extend(steps.iter().map(|step| format!("  + {step}")));
        lines.push(match steps.len() {
            0 => "Nothing is missing.".to_owned(),
            n => format!("{n} step(s) to do. Nothing was changed: add --apply to do them."),
        });
        answer(&lines.join("\n"))?;
    }
    Ok(if steps.is_empty() {
        Exit::Done
    } else {
        Exit::Remains
    })
}

/// Says what exists now, above all when a step failed.
fn show_applied(
    applied: &Applied,
    planned: &[String],
    notes: &[String],
    as_json: bool,
) -> Result<(), Failure> {
    let all_notes: Vec<&String> = notes.iter().chain(&applied.notes).collect();
    let undone: Vec<&String> = planned.iter().skip(applied.done.len()).collect();
    if as_json {
        return answer_json(&json!({
            "version": 1,
            "applied": true,
            "planned": planned,
            "done": applied.done,
            "undone": undone,
            "notes": all_notes,
        }));
    }
    let mut lines: Vec<String> = all_notes.iter().map(|note| format!("  = {note}")).collect();
    lines.extend(applied.done.iter().map(|done| format!("  ✓ {done}")));
    lines.extend(
        undone
            .iter()
            .map(|undone| format!("  ✗ not done: {undone}")),
    );
    lines.push(if undone.is_empty() {
        format!("Done: {} created.", applied.done.len())
    } else {
        format!(
            "Stopped: {} of {} step(s) done; what is marked ✓ exists now.",
            applied.done.len(),
            planned.len()
        )
    });
    answer(&lines.join("\n"))
}
