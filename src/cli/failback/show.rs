//! The way home, in words and as JSON.

use serde_json::{Value, json};

use super::super::{answer, answer_json};
use super::{Args, Looked};
use crate::config::read::Loaded;
use crate::dynamo::clock::rfc3339;
use crate::error::{Exit, Failure};
use crate::jobs::failback::judge::{Class, ConflictPolicy, Fate, StrandedPolicy};
use crate::jobs::failback::judging::Counts;
use crate::jobs::failback::kept::Kept;
use crate::jobs::failback::store::Decided;
use crate::jobs::failback::turning::Report;
use crate::jobs::failback::{Home, step};
use crate::lease::row::TrackRow;
use crate::observe::headline::span;

/// What it does not do, whoever reads the plan.
const NOT_STOPPED: &str = "Farshore does not stop an application that still writes in the region that comes home. What it writes until the quarantine ends is captured; what it writes later is replaced, and told by nobody";

/// The steps, and what they are in words.
fn steps(home: &Home<'_>) -> Vec<(&'static str, String)> {
    let (active, back) = (&home.active.label, &home.back.label);
    vec![
        (
            step::CAPTURED,
            format!("wait until what is stranded in {back} is captured up to now"),
        ),
        (
            step::APPLIED,
            format!(
                "write what was chosen to {active}, where it still holds what it was compared with; report or keep the rest"
            ),
        ),
        (
            step::TURNED,
            format!(
                "end the quarantine of {back}: its worker feeds it from {active}, from the fence on"
            ),
        ),
        (
            step::EQUAL,
            format!(
                "make {back} equal to {active} (mirror), and wait until that is verified and everything is applied"
            ),
        ),
        (
            step::HOME,
            format!("remove the ledger and what was decided; {back} is a replica again"),
        ),
    ]
}

fn command(args: &Args) -> String {
    let mut words = vec!["farshore failback".to_owned()];
    if let Some(region) = &args.region {
        words.push(format!("--region {region}"));
    }
    words.push(format!("--stranded {}", stranded_name(args.stranded)));
    words.push(format!("--conflicts {}", conflicts_name(&args.conflicts)));
    if let Some(report) = &args.report {
        words.push(format!("--report {}", report.display()));
    }
    words.push("--apply".to_owned());
    words.join(" ")
}

fn stranded_name(policy: StrandedPolicy) -> &'static str {
    match policy {
        StrandedPolicy::Apply => "apply",
        StrandedPolicy::Keep => "keep",
        StrandedPolicy::Discard => "discard",
    }
}

fn conflicts_name(policy: &ConflictPolicy) -> String {
    match policy {
        ConflictPolicy::Active => "active".to_owned(),
        ConflictPolicy::Keep => "keep".to_owned(),
        ConflictPolicy::Newest(attribute) => format!("newest={attribute}"),
    }
}

/// Shows that nobody is away, and what is kept of earlier ways home.
pub(super) fn nobody(
    loaded: &Loaded,
    (active, epoch): (&str, u64),
    kept: &Kept,
    args: &Args,
) -> Result<Exit, Failure> {
    let remains = !kept.many.is_empty() || !kept.silent.is_empty();
    let exit = match remains {
        true => Exit::Remains,
        false => Exit::Done,
    };
    if args.json {
        let rows = kept
            .many
            .iter()
            .map(|((region, table), many)| json!({"region": region, "table": table, "keys": many}));
        let silent = kept.silent.iter();
        answer_json(&json!({
            "version": 1,
            "command": "failback",
            "group": loaded.config.group,
            "applied": args.apply,
            "active": active,
            "epoch": epoch,
            "region": null,
            "kept": rows.collect::<Vec<_>>(),
            "dropped": kept.dropped,
            "silent": silent.map(|(region, why)| json!({"region": region, "why": why})).collect::<Vec<_>>(),
        }))?;
        return Ok(exit);
    }
    let mut lines = vec![format!(
        "Nobody is away: {active} is active in epoch {epoch}, and no region is in quarantine or on its way home."
    )];
    for ((region, table), many) in &kept.many {
        lines.push(format!(
            "  ! table {table}: {many} stranded write(s) of an earlier way home are kept in {} in {region}",
            loaded.config.failback_table()
        ));
    }
    for (region, why) in &kept.silent {
        lines.push(format!(
            "  ! {region}: what is kept there is not known: {why}"
        ));
    }
    if kept.dropped > 0 {
        lines.push(format!("  {} were reported and dropped", kept.dropped));
    }
    if !kept.many.is_empty() {
        lines.push("See them with --report FILE; `farshore failback --stranded discard --report FILE --apply` reports and drops them.".to_owned());
    }
    answer(&lines.join("\n"))?;
    Ok(exit)
}

fn capture_line(home: &Home<'_>, row: Option<&TrackRow>) -> String {
    let back = &home.back.label;
    let Some(row) = row else {
        return format!("nothing is captured yet: start `farshore run` in {back}");
    };
    let until = row.read_until.map_or_else(
        || "not read to where it stands yet".to_owned(),
        |ms| {
            let age_s = (home.back.clock.now_ms() - ms).max(0) as f64 / 1_000.0;
            format!("captured until {} ({} ago)", rfc3339(ms), span(age_s))
        },
    );
    let lacks = match (&row.lacks, row.compared) {
        (None, _) => String::new(),
        (Some(why), None) => format!("; {why}: both tables are being compared from end to end"),
        (Some(why), Some(_)) => {
            format!("; {why}: both tables were compared from end to end, and what differs is in")
        }
    };
    format!("{until}{lacks}")
}

fn counts_line(counts: &Counts) -> String {
    let of = |class: Class| format!("{} {}", counts.class(class), class.label());
    let classes: Vec<String> = Class::ALL.into_iter().map(of).collect();
    let decided: Vec<String> = counts
        .decided
        .iter()
        .map(|(decided, many)| format!("{many} {}", decided.label()))
        .collect();
    let before = match decided.is_empty() {
        true => String::new(),
        false => format!("; decided before: {}", decided.join(", ")),
    };
    format!(
        "{} stranded: {}{before}",
        counts.stranded,
        classes.join(", ")
    )
}

fn fates_line(counts: &Counts) -> String {
    let of = |fate: Fate| format!("{} {}", counts.fate(fate), fate.label());
    let fates = [Fate::Apply, Fate::Report, Fate::Keep].map(of);
    format!("as asked for: {}", fates.join(", "))
}

/// What the other policies would do with the same keys.
fn choices(counts: &Counts) -> Vec<String> {
    let (free, conflicting, unknown) = (
        counts.class(Class::Free),
        counts.class(Class::Conflicting),
        counts.class(Class::Unknown),
    );
    let mut lines = Vec::new();
    if free > 0 {
        lines.push(format!(
            "{free} free: `--stranded apply` writes them to the active region, `keep` leaves them in the store, `discard` reports and drops them"
        ));
    }
    if conflicting > 0 {
        lines.push(format!(
            "{conflicting} conflicting: `--conflicts active` reports and drops them; `newest=ATTR` applies those whose ATTR is greater, reports and drops the rest, and leaves those without it in the store; `keep` leaves all in the store"
        ));
    }
    if unknown > 0 {
        lines.push(format!(
            "{unknown} unknown: they stay in the store, whatever is asked for: look at them with --report FILE"
        ));
    }
    lines
}

fn counts_json(counts: &Counts) -> Value {
    json!({
        "stranded": counts.stranded,
        "equal": counts.class(Class::Equal),
        "free": counts.class(Class::Free),
        "conflicting": counts.class(Class::Conflicting),
        "unknown": counts.class(Class::Unknown),
        "wouldApply": counts.fate(Fate::Apply),
        "wouldReport": counts.fate(Fate::Report),
        "wouldKeep": counts.fate(Fate::Keep),
        "decidedBefore": {
            "equal": counts.decided(Decided::Equal),
            "applied": counts.decided(Decided::Applied),
            "reported": counts.decided(Decided::Reported),
        },
    })
}

fn steps_json(home: &Home<'_>) -> Vec<Value> {
    steps(home)
        .into_iter()
        .map(|(step, words)| {
            json!({
                "step": step,
                "what": words,
                "doneAt": home.done_ms(step).map(rfc3339),
            })
        })
        .collect()
}

/// Shows what would be done.
pub(super) fn plan(home: &Home<'_>, looked: &[Looked], args: &Args) -> Result<(), Failure> {
    let refused = home.refuse_unfinished().err();
    if args.json {
        let tables: Vec<Value> = looked
            .iter()
            .map(|one| {
                json!({
                    "table": one.table,
                    "capture": one.capture.as_ref().map(|row| json!({
                        "until": row.read_until.map(rfc3339),
                        "lacks": row.lacks,
                        "compared": row.compared.map(rfc3339),
                        "records": row.records,
                    })),
                    "ledger": { "keys": one.ledger_keys, "lacks": one.ledger_lacks },
                    "counts": counts_json(&one.counts),
                })
            })
            .collect();
        return answer_json(&json!({
            "version": 1,
            "command": "failback",
            "group": home.config.group,
            "applied": false,
            "active": home.active.label,
            "region": home.back.label,
            "epoch": home.record.epoch,
            "refused": refused.map(|failure| failure.to_string()),
            "tables": tables,
            "steps": steps_json(home),
            "notStopped": NOT_STOPPED,
            "next": command(args),
        }));
    }
    let mut lines = vec![format!(
        "{} is active in epoch {}; {} {}",
        home.active.label,
        home.record.epoch,
        home.back.label,
        match home.is_done(step::TURNED) {
            true => "is on its way home",
            false => "is in quarantine and comes home",
        }
    )];
    for one in looked {
        let table = &one.table;
        lines.push(format!(
            "  table {table}: {}",
            capture_line(home, one.capture.as_ref())
        ));
        let lacks = one
            .ledger_lacks
            .as_ref()
            .map_or_else(String::new, |why| format!("; it is not whole: {why}"));
        lines.push(format!(
            "  table {table}: {} key(s) may have been written in {} since the fence{lacks}",
            one.ledger_keys, home.active.label
        ));
        if one.capture.is_some() {
            lines.push(format!("  table {table}: {}", counts_line(&one.counts)));
        }
        if one.counts.stranded > 0 {
            lines.push(format!("  table {table}: {}", fates_line(&one.counts)));
        }
        let choices = choices(&one.counts);
        lines.extend(choices.iter().map(|choice| format!("    {choice}")));
    }
    for (step, words) in steps(home) {
        match home.done_ms(step) {
            Some(ms) => lines.push(format!("  ✓ {words} ({})", rfc3339(ms))),
            None => lines.push(format!("  + {words}")),
        }
    }
    lines.push(format!("note: {NOT_STOPPED}"));
    lines.push(match refused {
        Some(failure) => format!(
            "Nothing was changed, and it would be refused: {}. {}.",
            failure.what, failure.next
        ),
        None => format!("Nothing was changed: `{}` does it.", command(args)),
    });
    answer(&lines.join("\n"))
}

/// Shows that a person has to do something first.
pub(super) fn waits(home: &Home<'_>, failure: &Failure, args: &Args) -> Result<(), Failure> {
    if args.json {
        return answer_json(&json!({
            "version": 1,
            "command": "failback",
            "group": home.config.group,
            "applied": home.is_done(step::TURNED),
            "active": home.active.label,
            "region": home.back.label,
            "epoch": home.record.epoch,
            "waits": { "what": failure.what, "why": failure.why, "next": failure.next },
            "steps": steps_json(home),
        }));
    }
    answer(&format!(
        "It waits: {}\n  why: {}\n   do: {}",
        failure.what, failure.why, failure.next
    ))
}

/// Shows what was done.
pub(super) fn done(home: &Home<'_>, report: &Report, args: &Args) -> Result<Exit, Failure> {
    let kept: u64 = report.kept.iter().map(|(_, many)| many).sum();
    let exit = match kept {
        0 => Exit::Done,
        _ => Exit::Remains,
    };
    let (active, back) = (&home.active.label, &home.back.label);
    let next = format!("farshore failover --to {back} --planned --apply");
    if args.json {
        let tables: Vec<Value> = report
            .outcomes
            .iter()
            .map(|(table, one)| {
                json!({
                    "table": table,
                    "applied": one.applied,
                    "equal": one.equal,
                    "reported": one.reported,
                    "kept": one.kept,
                    "refused": one.refused,
                })
            })
            .collect();
        answer_json(&json!({
            "version": 1,
            "command": "failback",
            "group": home.config.group,
            "applied": true,
            "active": active,
            "region": back,
            "epoch": home.record.epoch,
            "tables": tables,
            "kept": report.kept.iter().map(|(table, many)| json!({"table": table, "keys": many})).collect::<Vec<_>>(),
            "steps": steps_json(home),
            "next": next,
        }))?;
        return Ok(exit);
    }
    let mut lines = vec![format!(
        "{back} is home: it is a replica of {active} in epoch {}",
        home.record.epoch
    )];
    for (table, one) in &report.outcomes {
        lines.push(format!(
            "  table {table}: {} equal, {} applied, {} reported, {} kept",
            one.equal, one.applied, one.reported, one.kept
        ));
        for why in &one.refused {
            lines.push(format!("    some were kept: {why}"));
        }
    }
    for (table, many) in &report.kept {
        lines.push(format!(
            "  ! table {table}: {many} stranded write(s) are kept in {} in {back}",
            home.store_back.name()
        ));
    }
    lines.push(format!(
        "{active} stays active. Where {back} is to become so again: `{next}`"
    ));
    answer(&lines.join("\n"))?;
    Ok(exit)
}
