//! The plan of a failover, and how one ended, in words and as JSON.

use std::time::Duration;

use serde_json::{Value, json};

use super::super::{answer, answer_json};
use super::Args;
use crate::actions::{Moment, describe};
use crate::config::read::Loaded;
use crate::dead_letter::Store;
use crate::dead_letter::survey::survey as survey_letters;
use crate::dynamo::clock::rfc3339;
use crate::error::{Exit, Failure};
use crate::jobs::failover::ttl::Ttl;
use crate::jobs::failover::{Acted, RegionSeen, Report, Survey, TableSeen, step, unaccepted};
use crate::lease::control::Answer;
use crate::observe::headline::span;
use crate::observe::history::rounded;
use crate::observe::recovery::Age;

/// How many letters of a queue are looked at.
const LOOK_MAX: u64 = 1_000;
/// Longest wait for what is only good to know.
const LOOK_TIMEOUT: Duration = Duration::from_secs(5);

/// What it does not fence, whoever reads the plan.
const NOT_FENCED: &str = "Farshore stops its own writers. It does not stop the application: what still writes in the old region after this is stranded there, kept, and reaches nobody";

/// One step of a plan.
fn steps(loaded: &Loaded, survey: &Survey, ttls: &[Ttl], args: &Args) -> Vec<String> {
    let (from, to, next) = (&survey.active, &survey.to, survey.epoch + 1);
    let mut steps = Vec::new();
    if survey.is_under_way() {
        steps.push(format!(
            "go on with the failover to {to} that began epoch {}",
            survey.epoch
        ));
        return steps;
    }
    if args.planned {
        steps.push("wait until everything is applied but what changes now".to_owned());
        steps.push(format!(
            "ask writes in {from} to wait (the control record says `closing`), until its tables are quiet and everything is applied; give up after {}",
            humantime::format_duration(args.within)
        ));
    }
    steps.push(format!(
        "store epoch {next} with the active region {to} in the state table there"
    ));
    steps.push(format!(
        "stop every writer of epoch {}: each acknowledges, or a lease passes after its rows were fenced; the exact positions are kept",
        survey.epoch
    ));
    let moment = Moment {
        group: &loaded.config.group,
        region: to,
        previous: from,
        epoch: next,
        reason: &args.reason,
    };
    for action in &loaded.config.actions {
        steps.push(format!("action {}", describe(action, &moment)));
    }
    steps.push(format!(
        "copy the record to the other regions that answer; {from} is in quarantine from then on"
    ));
    for ttl in ttls {
        match &ttl.attribute {
            Ok(Some(attribute)) => steps.push(format!(
                "time to live of {} ({attribute}): on in {to}, off in {from}",
                ttl.table
            )),
            Ok(None) => {}
            Err(_) => steps.push(format!(
                "time to live of {}: as {from} has it, if that answers by then",
                ttl.table
            )),
        }
    }
    steps.push("if anything was in flight: watch the new active region for writes of the old epoch that take effect late, and undo them".to_owned());
    steps
}

/// Shows what would be done.
pub(super) async fn plan(
    loaded: &Loaded,
    survey: &Survey,
    ttls: &[Ttl],
    args: &Args,
) -> Result<(), Failure> {
    let letters = letters(loaded, survey).await;
    let losses = survey.all_losses();
    let open = unaccepted(&losses, &args.accept_loss);
    let steps = steps(loaded, survey, ttls, args);
    if args.json {
        return answer_json(&json!({
            "version": 1,
            "command": "failover",
            "group": loaded.config.group,
            "applied": false,
            "planned": args.planned,
            "from": survey.active,
            "to": survey.to,
            "epoch": survey.epoch,
            "underWay": survey.is_under_way(),
            "regions": survey.regions.iter().map(region_json).collect::<Vec<_>>(),
            "tables": survey.tables.iter().map(table_json).collect::<Vec<_>>(),
            "recoveryPoint": age_json(survey.age()),
            "mayLoseSeconds": survey.age().proven_s.map(rounded),
            "workers": survey.workers.len(),
            "deadLetters": letters,
            "losses": losses.iter().map(|(name, why)| json!({
                "name": name,
                "why": why,
                "accepted": args.accept_loss.contains(name),
            })).collect::<Vec<_>>(),
            "refused": !open.is_empty() && !survey.is_under_way(),
            "steps": steps,
            "notFenced": NOT_FENCED,
        }));
    }
    let mut lines = vec![format!(
        "{} is active in epoch {}; {} is to become active",
        survey.active, survey.epoch, survey.to
    )];
    lines.extend(survey.regions.iter().map(region_line));
    lines.push(format!("  {}", loss_line(survey)));
    lines.extend(survey.tables.iter().map(table_line));
    lines.push(match letters {
        Some(0) => "  dead letters: none".to_owned(),
        Some(waiting) => {
            format!(
                "  dead letters: {waiting}, changes that {} never got",
                survey.to
            )
        }
        None => "  dead letters: not known".to_owned(),
    });
    for (name, why) in &losses {
        let accepted = match args.accept_loss.contains(name) {
            true => "accepted",
            false => "not accepted",
        };
        lines.push(format!("  ! {name}: {why} ({accepted})"));
    }
    lines.extend(steps.iter().map(|step| format!("  + {step}")));
    lines.push(format!("note: {NOT_FENCED}"));
    if !open.is_empty() && !survey.is_under_way() {
        let flags = open.iter().map(|(name, _)| format!("--accept-loss {name}"));
        lines.push(format!(
            "It would be refused without {}",
            flags.collect::<Vec<_>>().join(" ")
        ));
    }
    lines.push("Nothing was changed: add --apply to do it.".to_owned());
    answer(&lines.join("\n"))
}

/// How many dead letters wait; `None` where that cannot be said in time.
async fn letters(loaded: &Loaded, survey: &Survey) -> Option<u64> {
    let look = async {
        let store = Store::open(&loaded.config.dead_letters, &survey.target);
        let store = store.await.ok()?;
        survey_letters(&store, LOOK_MAX).await.ok()
    };
    let found = tokio::time::timeout(LOOK_TIMEOUT, look).await;
    found.ok().flatten().map(|found| found.waiting)
}

fn region_line(seen: &RegionSeen) -> String {
    let says = match (&seen.answer, &seen.fault) {
        (Answer::Record(record), _) => format!(
            "answers: {} is active in epoch {} ({})",
            record.active, record.epoch, record.state
        ),
        (Answer::None, _) => "answers, and has no control record".to_owned(),
        (Answer::Unreachable, fault) => {
            let why = fault.as_deref().unwrap_or("no reason is known");
            format!("does not answer: {why}")
        }
    };
    format!("  {}: {says}", seen.label)
}

fn region_json(seen: &RegionSeen) -> Value {
    let record = seen.answer.record();
    json!({
        "label": seen.label,
        "reachable": !matches!(seen.answer, Answer::Unreachable),
        "active": record.map(|record| &record.active),
        "epoch": record.map(|record| record.epoch),
        "state": record.map(|record| &record.state),
        "fault": seen.fault,
    })
}

/// What may be lost at worst, of the group.
fn loss_line(survey: &Survey) -> String {
    let Age {
        proven_s,
        estimated_s,
    } = survey.age();
    match (proven_s, estimated_s) {
        (Some(proven), Some(estimated)) => format!(
            "recovery point: {} old proven, {} estimated; lost are at worst the writes of the last {}",
            span(proven),
            span(estimated),
            span(proven)
        ),
        (None, Some(estimated)) => format!(
            "recovery point: not proven, {} old estimated; what may be lost at worst is not known",
            span(estimated)
        ),
        _ => "recovery point: not known; what may be lost at worst is not known".to_owned(),
    }
}

fn table_line(table: &TableSeen) -> String {
    let until = |ms: Option<i64>, age_s: Option<f64>| {
        let (ms, age_s) = ms.zip(age_s)?;
        Some(format!("{} ({} ago)", rfc3339(ms), span(age_s)))
    };
    let proven = until(table.moments.proven_ms, table.age.proven_s);
    let estimated = until(table.moments.estimated_ms, table.age.estimated_s);
    let applied = match (proven, estimated) {
        (Some(proven), Some(estimated)) => {
            format!("all is applied until {proven}, proven; until {estimated}, estimated")
        }
        (None, Some(estimated)) => {
            format!("all is applied until {estimated}, estimated; nothing is proven")
        }
        _ => "up to when all is applied is not known: anything may be missing".to_owned(),
    };
    let headroom = table.headroom_s.map_or_else(String::new, |seconds| {
        format!(
            "; the stream remembers what waits for {} h {} min",
            seconds / 3_600,
            seconds / 60 % 60
        )
    });
    let doubts = match table.doubts {
        0 => String::new(),
        some => format!("; {some} range(s) in doubt"),
    };
    let stream = match table.stream {
        Some(false) => {
            "; it has no stream of new and old images: changes after the failover could not flow back"
        }
        _ => "",
    };
    format!(
        "  table {}: {applied}; {} open shard(s), {} without an owner{headroom}{doubts}{stream}",
        table.name, table.shards, table.unowned
    )
}

fn age_json(age: Age) -> Value {
    json!({
        "provenSeconds": age.proven_s.map(rounded),
        "estimatedSeconds": age.estimated_s.map(rounded),
    })
}

fn table_json(table: &TableSeen) -> Value {
    json!({
        "table": table.name,
        "recoveryPoint": age_json(table.age),
        "provenUntil": table.moments.proven_ms.map(rfc3339),
        "estimatedUntil": table.moments.estimated_ms.map(rfc3339),
        "headroomSeconds": table.headroom_s,
        "openShards": table.shards,
        "unownedShards": table.unowned,
        "doubts": table.doubts,
        "stream": table.stream,
    })
}

fn subjects(of: &[(String, String)]) -> Vec<Value> {
    let one = |(subject, why): &(String, String)| json!({"subject": subject, "why": why});
    of.iter().map(one).collect()
}

/// Seconds between two steps.
fn seconds(report: &Report, from: &str, to: &str) -> Option<f64> {
    let ms = report.record.done_ms(to)? - report.record.done_ms(from)?;
    Some(ms.max(0) as f64 / 1_000.0)
}

/// For how long writes had to wait, in seconds, of a planned switchover.
fn waited_s(report: &Report) -> Option<f64> {
    seconds(report, step::CLOSED, step::FENCED)
}

/// Shows what was done.
pub(super) fn done(survey: &Survey, report: &Report, args: &Args) -> Result<Exit, Failure> {
    let late = &report.late;
    let remains = report.ttl.iter().any(|ttl| !ttl.is_done())
        || report.actions.iter().any(|acted| acted.failure.is_some())
        || !report.in_flight.is_empty()
        || !late.standing.is_empty()
        || !late.unwatched.is_empty()
        || !late.unknown.is_empty()
        || !matches!(report.left_behind, None | Some(Ok(0)));
    let exit = match remains {
        true => Exit::Remains,
        false => Exit::Done,
    };
    let record = &report.record;
    let previous = record.previous.as_ref();
    if args.json {
        answer_json(&json!({
            "version": 1,
            "command": "failover",
            "group": record.group,
            "applied": true,
            "planned": args.planned,
            "from": previous.map(|previous| &previous.active),
            "to": survey.to,
            "epoch": record.epoch,
            "state": record.state,
            "fenceSeconds": seconds(report, step::BEGUN, step::FENCED),
            "writesWaitedSeconds": waited_s(report),
            "done": record.steps.iter().map(|done| json!({
                "step": done.step,
                "at": rfc3339(done.at_ms),
                "note": done.note,
            })).collect::<Vec<_>>(),
            "actions": actions_json(&report.actions),
            "ttl": report.ttl.iter().map(ttl_json).collect::<Vec<_>>(),
            "inFlight": report.in_flight.iter().map(|one| json!({
                "table": one.table,
                "shard": one.shard,
                "after": one.after,
                "owner": one.owner,
            })).collect::<Vec<_>>(),
            "doubts": report.doubts,
            "late": {
                "keys": late.keys,
                "arrived": late.arrived,
                "undone": late.undone,
                "overwritten": late.overwritten,
                "standing": subjects(&late.standing),
                "unwatched": subjects(&late.unwatched),
                "unknown": subjects(&late.unknown),
            },
            "leftBehind": match &report.left_behind {
                Some(Ok(left)) => json!(left),
                _ => Value::Null,
            },
            "untold": report.untold.iter().map(|(label, why)| json!({
                "region": label,
                "why": why,
            })).collect::<Vec<_>>(),
            "notFenced": NOT_FENCED,
        }))?;
        return Ok(exit);
    }
    let mut lines: Vec<String> = record
        .steps
        .iter()
        .map(|done| match done.note.as_str() {
            "" => format!("  ✓ {} {}", rfc3339(done.at_ms), done.step),
            note => format!("  ✓ {} {}: {note}", rfc3339(done.at_ms), done.step),
        })
        .collect();
    lines.extend(report.actions.iter().map(action_line));
    lines.extend(report.ttl.iter().flat_map(ttl_lines));
    for one in &report.in_flight {
        lines.push(format!(
            "  ! {} shard {}: {} had not given it back; what came after {} may be applied in part, and is kept for the way home",
            one.table, one.shard, one.owner, one.after
        ));
    }
    if report.doubts > 0 {
        lines.push(format!(
            "  = {} range(s) of the old epoch were in doubt",
            report.doubts
        ));
    }
    if late.keys > 0 {
        lines.push(format!(
            "  = of {} key(s) in flight {} came late and were left, {} were late and undone, {} late but written since",
            late.keys, late.arrived, late.undone, late.overwritten
        ));
    }
    for (subject, why) in late.standing.iter().chain(&late.unknown) {
        lines.push(format!("  ! {subject}: a late write may stand: {why}"));
    }
    for (table, why) in &late.unwatched {
        lines.push(format!(
            "  ! {table}: late writes could not be looked for: {why}; type the same command again once that has passed, or go without with --accept-loss late-writes"
        ));
    }
    match &report.left_behind {
        Some(Ok(0)) => lines.push("  = the old region's streams hold nothing that was not applied".to_owned()),
        Some(Ok(left)) => lines.push(format!(
            "  ! {left} write(s) came to the old region after everything was applied: they are stranded there, and kept"
        )),
        Some(Err(why)) => lines.push(format!(
            "  ! whether the old region holds more writes is not known: {why}"
        )),
        None => {}
    }
    for (label, why) in &report.untold {
        lines.push(format!(
            "  = {label} was not told, and finds out by itself: {why}"
        ));
    }
    if let Some(waited) = waited_s(report) {
        lines.push(format!("Writes had to wait for {waited:.1} s."));
    }
    let fence = seconds(report, step::BEGUN, step::FENCED).unwrap_or_default();
    lines.push(format!("note: {NOT_FENCED}"));
    lines.push(format!(
        "{} is active in epoch {}; nothing of epoch {} was sent any more after {fence:.1} s.",
        survey.to,
        record.epoch,
        previous.map_or(0, |previous| previous.epoch)
    ));
    answer(&lines.join("\n"))?;
    Ok(exit)
}

fn ttl_json(ttl: &Ttl) -> Value {
    json!({
        "table": ttl.table,
        "attribute": ttl.attribute.as_ref().ok().and_then(Option::as_ref),
        "unknown": ttl.attribute.as_ref().err(),
        "left": ttl.left.iter().map(|(command, why)| json!({
            "command": command,
            "why": why,
        })).collect::<Vec<_>>(),
    })
}

fn ttl_lines(ttl: &Ttl) -> Vec<String> {
    let table = &ttl.table;
    let mut lines = Vec::new();
    match &ttl.attribute {
        Ok(None) => {}
        Ok(Some(attribute)) if ttl.left.is_empty() => lines.push(format!(
            "  = time to live of {table} ({attribute}): on here, off in the old region"
        )),
        Ok(Some(_)) => {}
        Err(why) => lines.push(format!(
            "  = time to live of {table}: not known, and left off here: {why}"
        )),
    }
    for (command, why) in &ttl.left {
        lines.push(format!(
            "  ! time to live of {table} is left to you: {command}: {why}"
        ));
    }
    lines
}

fn actions_json(actions: &[Acted]) -> Vec<Value> {
    let one = |acted: &Acted| {
        json!({
            "name": acted.name,
            "standing": acted.standing,
            "why": acted.failure.as_ref().map(|failure| &failure.why),
        })
    };
    actions.iter().map(one).collect()
}

fn action_line(acted: &Acted) -> String {
    let (name, standing) = (&acted.name, acted.standing);
    match &acted.failure {
        None => format!("  = action {name}: {standing}"),
        Some(failure) => format!(
            "  ! action {name}: {standing}: {}. {}",
            failure.why, failure.next
        ),
    }
}

/// Shows that a required action failed.
pub(super) fn stopped_at_action(
    survey: &Survey,
    failure: &Failure,
    actions: &[Acted],
    args: &Args,
) -> Result<(), Failure> {
    if args.json {
        return answer_json(&json!({
            "version": 1,
            "command": "failover",
            "applied": true,
            "to": survey.to,
            "stoppedAt": failure.what,
            "why": failure.why,
            "next": failure.next,
            "actions": actions_json(actions),
        }));
    }
    let mut lines: Vec<String> = actions.iter().map(action_line).collect();
    lines.push(format!("{}: {}.", failure.what, failure.why));
    lines.push(format!(
        "{} is active and fenced. {}; then type the same command again: it goes on with this action.",
        survey.to,
        failure.next.trim_end_matches('.')
    ));
    answer(&lines.join("\n"))
}

/// Shows that a planned switchover was given up.
pub(super) fn given_up(survey: &Survey, why: &str, args: &Args) -> Result<(), Failure> {
    if args.json {
        return answer_json(&json!({
            "version": 1,
            "command": "failover",
            "applied": true,
            "planned": true,
            "givenUp": why,
            "from": survey.active,
            "to": survey.to,
            "epoch": survey.epoch,
        }));
    }
    answer(&format!(
        "Given up: {why}.\n{} is active as before, in epoch {}.",
        survey.active, survey.epoch
    ))
}
