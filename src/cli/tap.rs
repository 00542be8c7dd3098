//! `farshore pause` and `farshore resume`: the tap between source and replica, for the whole fleet.

use serde_json::json;

use super::status::headroom_of;
use super::{answer, answer_json};
use crate::config::read::Loaded;
use crate::dynamo::Regions;
use crate::dynamo::clock::{host_ms, rfc3339};
use crate::error::{Exit, Failure, Fault};
use crate::lease::row::{PauseRow, Resumed, Row};
use crate::lease::table::{StateTable, Written};
use crate::run::start::unusable;

/// A reason is a sentence, not a report: it stands in every alarm.
const REASON_MAX: usize = 500;

/// Arguments of `pause` and `resume`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Only this table, by its name in the configuration; without it all tables
    #[arg(long, value_name = "TABLE")]
    table: Option<String>,
    /// Why; stored, and shown by readiness, status and the log
    #[arg(long, value_name = "TEXT")]
    reason: String,
    /// Does it; without it nothing is changed
    #[arg(long)]
    apply: bool,
    /// Answers as JSON
    #[arg(long)]
    json: bool,
}

/// Which way the tap is turned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    /// Closed.
    Pause,
    /// Opened.
    Resume,
}

impl Turn {
    const fn name(self) -> &'static str {
        match self {
            Turn::Pause => "pause",
            Turn::Resume => "resume",
        }
    }
}

/// What is to be done, and what a person should know.
#[derive(Debug)]
struct Plan {
    /// The row to write in place of the one known, and what that means in one line.
    step: Option<(PauseRow, String)>,
    notes: Vec<String>,
    /// Whether what was asked for holds once the step is done.
    reached: bool,
}

/// What the state table says of taps.
struct Known {
    /// The pause that was asked about, as it is now.
    own: Option<PauseRow>,
    /// Pauses of all kinds that stand.
    closed: Vec<PauseRow>,
    /// Seconds left, by table, and a note where that is not known.
    headroom: Vec<(String, Option<i64>)>,
}

pub(super) async fn run(loaded: Loaded, turn: Turn, args: &Args) -> Result<Exit, Failure> {
    super::provision::refuse_embedded(&loaded, turn.name())?;
    let reason = checked_reason(&args.reason)?;
    check_table(&loaded, args.table.as_deref())?;
    let regions = Regions::connect(&loaded.config).await?;
    let region = regions.get(&loaded.here).ok_or_else(|| {
        Failure::new(
            format!("Region {} is not known", loaded.here),
            "It is not in the configuration",
            "Set `here` to one of the regions",
        )
    })?;
    let state = StateTable::new(region.tables.clone(), loaded.config.state_table());
    let failed = |fault: Fault| unusable(region, state.name(), &fault);
    let control = state.control().await.map_err(failed)?;
    let active = control.map_or_else(|| loaded.config.active.clone(), |row| row.active);
    if active == loaded.here {
        return Err(Failure::new(
            format!("There is no tap in {active}"),
            "It is the active region: nothing is fed into it",
            "Set AWS_REGION (or `here`) to the region whose replica is fed, and ask again",
        ));
    }
    let (known, note) = known(&state, &loaded, args.table.as_deref())
        .await
        .map_err(failed)?;
    let by = who();
    let at = rfc3339(host_ms());
    let mut plan = match turn {
        Turn::Pause => plan_pause(&known, args.table.as_deref(), &by, &reason, at),
        Turn::Resume => plan_resume(&known, args.table.as_deref(), &by, &reason, at),
    };
    plan.notes.extend(note);
    if let Some((row, _)) = plan.step.as_ref().filter(|_| args.apply) {
        let written = match &known.own {
            None => state.create(row).await,
            Some(own) => state.replace(row, own.lease_counter).await,
        };
        if written.map_err(failed)? == Written::Refused {
            return Err(Failure::new(
                format!("The {} was not stored", turn.name()),
                "Somebody else turned the same tap at the same moment",
                "Look at `farshore status`, and ask again if it is still needed",
            ));
        }
        if turn == Turn::Pause {
            plan.notes.push(format!(
                "no worker starts a write later than {} from now; what was sent before may still arrive",
                humantime::format_duration(loaded.config.leases.duration)
            ));
        }
    }
    show(&plan, &known, turn, args)?;
    Ok(match plan.step {
        Some(_) if !args.apply => Exit::Remains,
        _ if !plan.reached => Exit::Remains,
        _ => Exit::Done,
    })
}

/// The reason, if it can stand in a log line.
pub(super) fn checked_reason(reason: &str) -> Result<String, Failure> {
    let reason = reason.trim();
    let why = if reason.is_empty() {
        "It is empty"
    } else if reason.chars().count() > REASON_MAX {
        "It is longer than 500 characters"
    } else if reason.chars().any(char::is_control) {
        "It holds line breaks or other control characters"
    } else {
        return Ok(reason.to_owned());
    };
    Err(Failure::new(
        "The reason cannot be stored",
        why,
        "Say why in one line: it is stored, and stands in alarms",
    ))
}

pub(super) fn check_table(loaded: &Loaded, table: Option<&str>) -> Result<(), Failure> {
    let tables = &loaded.config.tables;
    let Some(wanted) = table.filter(|name| !tables.iter().any(|table| table.name == **name)) else {
        return Ok(());
    };
    let nearest = tables
        .iter()
        .min_by_key(|table| strsim::damerau_levenshtein(&table.name, wanted));
    Err(Failure::new(
        format!("There is no table `{wanted}` in the configuration"),
        "A pause of a table that nobody replicates would stop nothing",
        match nearest {
            Some(table) => format!("Did you mean `{}`?", table.name),
            None => "Add the table to the configuration".to_owned(),
        },
    ))
}

/// Reads the pauses that matter one by one: closing the tap must not need more than it has to. What
/// is only good to know (headroom) may be missing, and is then said to be.
async fn known(
    state: &StateTable,
    loaded: &Loaded,
    table: Option<&str>,
) -> Result<(Known, Option<String>), Fault> {
    let own = state.pause(table).await?;
    let rows = state.rows().await;
    let tables = &loaded.config.tables;
    let (closed, headroom, note) = match rows {
        Ok(rows) => {
            let mut shards = Vec::new();
            let mut closed = Vec::new();
            for row in rows {
                match row {
                    Row::Shard(row) if !row.is_finished() => shards.push(row),
                    Row::Pause(row) if row.is_closed() => closed.push(row),
                    _ => {}
                }
            }
            let headroom = tables
                .iter()
                .map(|table| (table.name.clone(), headroom_of(&shards, &table.name)))
                .collect();
            (closed, headroom, None)
        }
        Err(fault) => {
            let all = state.pause(None).await?;
            let closed = [own.clone(), all.filter(|_| table.is_some())];
            let closed = closed.into_iter().flatten().filter(PauseRow::is_closed);
            let headroom = tables.iter().map(|table| (table.name.clone(), None));
            let note = format!(
                "the rest of the state table could not be read ({}): headroom and other pauses are not known",
                fault.class.label()
            );
            (closed.collect(), headroom.collect(), Some(note))
        }
    };
    let known = Known {
        own,
        closed,
        headroom,
    };
    Ok((known, note))
}

fn subject(table: Option<&str>) -> String {
    table.map_or_else(|| "all tables".to_owned(), |name| format!("table {name}"))
}

fn told(row: &PauseRow) -> String {
    format!("paused by {} since {}: {}", row.by, row.at, row.reason)
}

fn plan_pause(known: &Known, table: Option<&str>, by: &str, reason: &str, at: String) -> Plan {
    let mut notes = Vec::new();
    if let Some(own) = known.own.as_ref().filter(|row| row.is_closed()) {
        notes.push(format!("{} is already {}", subject(table), told(own)));
        return Plan {
            step: None,
            notes,
            reached: true,
        };
    }
    if table.is_some()
        && let Some(all) = known.closed.iter().find(|row| row.table.is_none())
    {
        notes.push(format!(
            "all tables are {}; this pause outlasts that one",
            told(all)
        ));
    }
    let mut row = PauseRow::new(table, by, reason, at);
    row.lease_counter = known.own.as_ref().map_or(0, |own| own.lease_counter + 1);
    let text = format!("pause {} as {by}: {reason}", subject(table));
    Plan {
        step: Some((row, text)),
        notes,
        reached: true,
    }
}

fn plan_resume(known: &Known, table: Option<&str>, by: &str, reason: &str, at: String) -> Plan {
    let mut notes = Vec::new();
    let own = known.own.as_ref().filter(|row| row.is_closed());
    let step = own.map(|own| {
        let mut row = own.clone();
        row.lease_counter += 1;
        row.resumed = Some(Resumed {
            by: by.to_owned(),
            reason: reason.to_owned(),
            at,
        });
        let text = format!(
            "resume {} as {by}: {reason} (it is {})",
            subject(table),
            told(own)
        );
        (row, text)
    });
    if step.is_none() {
        notes.push(format!("{} has no pause of its own", subject(table)));
    }
    let mut reached = true;
    for other in &known.closed {
        match (table, other.table.as_deref()) {
            (None, Some(name)) => notes.push(format!(
                "table {name} has a pause of its own and stays closed, {}",
                told(other)
            )),
            (Some(_), None) => {
                reached = false;
                notes.push(format!(
                    "all tables are {}; resume them with `farshore resume` without --table",
                    told(other)
                ));
            }
            _ => {}
        }
    }
    Plan {
        step,
        notes,
        reached,
    }
}

/// The person, as far as the environment knows: user and host.
pub(super) fn who() -> String {
    let user = ["USER", "LOGNAME"]
        .into_iter()
        .filter_map(|name| std::env::var(name).ok())
        .find(|user| !user.trim().is_empty())
        .unwrap_or_else(|| "unknown".to_owned());
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname")
        .or_else(|_| std::env::var("HOSTNAME").map_err(std::io::Error::other))
        .unwrap_or_default();
    let host = match host.trim() {
        "" => "unknown",
        host => host,
    };
    let who = format!("{}@{host}", user.trim());
    who.chars().filter(|c| !c.is_control()).take(200).collect()
}

fn show(plan: &Plan, known: &Known, turn: Turn, args: &Args) -> Result<(), Failure> {
    let planned: Vec<&str> = plan.step.iter().map(|(_, text)| text.as_str()).collect();
    let done: &[&str] = if args.apply { &planned } else { &[] };
    let concerns = |name: &str| args.table.as_deref().is_none_or(|table| table == name);
    let headroom = known.headroom.iter().filter(|(name, _)| concerns(name));
    if args.json {
        return answer_json(&json!({
            "version": 1,
            "command": turn.name(),
            "table": args.table,
            "applied": args.apply,
            "planned": planned,
            "done": done,
            "notes": plan.notes,
            "headroom": headroom.map(|(table, seconds)| json!({
                "table": table,
                "seconds": seconds,
            })).collect::<Vec<_>>(),
        }));
    }
    let mut lines: Vec<String> = plan
        .notes
        .iter()
        .map(|note| format!("  = {note}"))
        .collect();
    let mark = if args.apply { '✓' } else { '+' };
    lines.extend(planned.iter().map(|step| format!("  {mark} {step}")));
    lines.extend(headroom.map(|(table, seconds)| match seconds {
        Some(seconds) => format!(
            "  {table}: the stream forgets what waits in {} h {} min",
            seconds / 3_600,
            seconds / 60 % 60
        ),
        None => format!("  {table}: how long the stream remembers what waits is not known"),
    }));
    lines.push(match (planned.len(), args.apply) {
        (0, _) => "Nothing to do.".to_owned(),
        (_, true) => "Done.".to_owned(),
        (_, false) => "Nothing was changed: add --apply to do it.".to_owned(),
    });
    answer(&lines.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(rows: &[PauseRow], table: Option<&str>) -> Known {
        Known {
            own: rows
                .iter()
                .find(|row| row.table.as_deref() == table)
                .cloned(),
            closed: rows.iter().filter(|r| r.is_closed()).cloned().collect(),
            headroom: Vec::new(),
        }
    }

    fn pause(table: Option<&str>) -> PauseRow {
        PauseRow::new(table, "alice@a", "bad write", "t1".into())
    }

    #[test]
    fn pausing_what_is_paused_changes_nothing_and_says_who_closed_it() {
        let rows = [pause(Some("orders"))];
        let plan = plan_pause(
            &known(&rows, Some("orders")),
            Some("orders"),
            "bob@b",
            "also bad",
            "t2".into(),
        );
        assert!(plan.step.is_none() && plan.reached);
        assert!(plan.notes[0].contains("alice@a since t1: bad write"));
    }

    #[test]
    fn a_tap_is_closed_anew_on_condition_of_the_row_that_was_left() {
        let mut row = pause(None);
        let resumed = plan_resume(
            &known(std::slice::from_ref(&row), None),
            None,
            "bob@b",
            "mended",
            "t2".into(),
        );
        row = resumed.step.unwrap().0;
        assert!(!row.is_closed());
        let plan = plan_pause(&known(&[row], None), None, "eve@e", "again", "t3".into());
        let again = plan.step.unwrap().0;
        assert!(again.is_closed());
        assert_eq!((again.lease_counter, again.by.as_str()), (2, "eve@e"));
    }

    #[test]
    fn resuming_all_leaves_the_pauses_of_tables_and_names_them() {
        let rows = [pause(None), pause(Some("orders"))];
        let plan = plan_resume(&known(&rows, None), None, "bob@b", "mended", "t2".into());
        assert_eq!(plan.step.unwrap().0.table, None);
        assert!(plan.notes[0].contains("table orders has a pause of its own"));
        assert!(plan.reached);
    }

    #[test]
    fn resuming_a_table_that_the_pause_of_all_holds_says_so_and_is_not_done() {
        let rows = [pause(None)];
        let plan = plan_resume(
            &known(&rows, Some("orders")),
            Some("orders"),
            "bob@b",
            "mended",
            "t2".into(),
        );
        assert!(plan.step.is_none() && !plan.reached);
        assert!(plan.notes[1].contains("without --table"));
    }

    #[test]
    fn a_reason_is_one_line() {
        assert!(checked_reason("  ").is_err());
        assert!(checked_reason("a\nb").is_err());
        assert!(checked_reason(&"x".repeat(501)).is_err());
        assert_eq!(checked_reason(" bad write ").unwrap(), "bad write");
    }
}
