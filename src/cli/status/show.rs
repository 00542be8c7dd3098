//! A view as text, for a terminal.

use std::time::Duration;

use crate::config::read::Loaded;
use crate::lease::row::HowFar;
use crate::observe::headline::span;
use crate::observe::health;
use crate::observe::view::{
    ClockOf, Doubts, Job, Level, Pause, RecoveryPoint, RegionState, Shard, ShardState, Table, View,
};

/// Events shown in a terminal.
const EVENTS_SHOWN: usize = 5;

/// Lines for a person.
pub(super) fn as_text(loaded: &Loaded, view: &View) -> String {
    let active = match (&view.active, view.epoch) {
        (Some(active), Some(epoch)) => format!("active {active} (epoch {epoch})"),
        _ => "no control record".to_owned(),
    };
    let mut lines = vec![format!(
        "group {}, here {}, {active}",
        loaded.config.group, loaded.here
    )];
    lines.push(head(view));
    lines.extend(view.headline.next.iter().map(|next| format!("  {next}.")));
    if view.flow.is_some() {
        lines.push(point(view));
    }
    let trouble = |state: RegionState| !matches!(state, RegionState::Ok | RegionState::Unknown);
    for region in view.regions.iter().filter(|region| trouble(region.state)) {
        let text = region.text.as_deref().unwrap_or("it does not answer");
        lines.push(format!("region {}: {text}", region.label));
    }
    let is_told = |text: &str| view.headline.text.contains(text);
    for home in view.home.iter().filter(|home| !is_told(&home.text)) {
        let captured = match (&home.captured_until, home.captured_records) {
            (Some(until), Some(records)) => {
                format!("; captured until {until}, {records} record(s)")
            }
            _ => String::new(),
        };
        lines.push(format!("way home: {}{captured}. {}.", home.text, home.next));
    }
    for pause in view.pauses.iter().filter(|pause| pause.table.is_none()) {
        lines.push(paused("ALL TABLES PAUSED", pause));
    }
    lines.extend(view.workers.iter().map(|worker| {
        let alive = match (worker.alive, worker.leaving) {
            (false, _) => "  SILENT: is it dead?",
            (true, true) => "  leaving",
            (true, false) => "",
        };
        format!(
            "worker {}  {}  {} shard(s)  since {}{alive}",
            worker.id, worker.version, worker.shards, worker.since
        )
    }));
    let letters = &view.dead_letters;
    if let Some(waiting) = letters.waiting.filter(|waiting| *waiting > 0) {
        lines.push(format!(
            "{waiting} dead letter(s) wait: those changes are not in the replica"
        ));
    }
    for table in &view.tables {
        of_table(&mut lines, view, table);
    }
    let events = view.events.iter().take(EVENTS_SHOWN);
    let events: Vec<String> = events
        .map(|event| {
            let table = event.table.as_deref().unwrap_or("");
            format!("  {}  {table}  {}", event.at, event.text)
        })
        .collect();
    if !events.is_empty() {
        lines.push("\nlately:".to_owned());
        lines.extend(events);
    }
    lines.join("\n")
}

/// The headline, with its level in letters where it matters: a terminal may have no colours.
fn head(view: &View) -> String {
    let headline = &view.headline;
    match headline.level {
        Level::Ok | Level::Busy => headline.text.clone(),
        Level::Warn => format!("WARNING: {}", headline.text),
        Level::Bad => format!("BAD: {}", headline.text),
    }
}

fn point(view: &View) -> String {
    let clock = match view.clock {
        ClockOf::Source => "by the source's clock",
        ClockOf::Replica => "by the replica region's clock, for the source was not heard",
        ClockOf::Host => "by this host's clock, for no region was heard",
    };
    let headroom = match view.headroom_seconds {
        Some(left) => format!(
            "; the stream forgets what may not be applied in {}",
            span(left)
        ),
        None => String::new(),
    };
    format!(
        "recovery point {}, {clock} (± {} s){headroom}",
        ages(view.recovery_point),
        view.clock_error_seconds
    )
}

fn ages(point: RecoveryPoint) -> String {
    let age = |seconds: Option<f64>| seconds.map_or_else(|| "unknown".to_owned(), span);
    format!(
        "proven {}, estimated {}",
        age(point.proven_seconds),
        age(point.estimated_seconds)
    )
}

fn of_table(lines: &mut Vec<String>, view: &View, table: &Table) {
    let reads = match table.shards.open {
        0 if view.flow.is_some() => ": NOBODY READS IT",
        _ => "",
    };
    lines.push(format!(
        "\n{}: {} open shard(s), {} finished{reads}",
        table.name, table.shards.open, table.shards.finished
    ));
    if view.flow.is_some() {
        lines.push(format!("  recovery point {}", ages(table.recovery_point)));
    }
    let own = view.pauses.iter();
    let own = own.filter(|pause| pause.table.as_deref() == Some(table.name.as_str()));
    lines.extend(own.map(|pause| paused("  PAUSED", pause)));
    let shards = view.shards.iter().filter(|shard| shard.table == table.name);
    let open = shards.filter(|shard| shard.state != ShardState::Finished);
    lines.extend(open.map(of_shard));
    for gap in view.gaps.iter().filter(|gap| gap.table == table.name) {
        lines.push(format!(
            "  GAP {} since {}: records were never applied. {}.",
            gap.reason, gap.at, gap.next
        ));
    }
    let doubts = view.doubts.iter();
    lines.extend(doubts.filter(|of| of.table == table.name).map(in_doubt));
    if table.audited {
        lines.push(match &table.verified_at {
            Some(at) => format!("  audit: found equal at {at}"),
            None => "  audit: not found equal yet".to_owned(),
        });
    }
    if let Some(letters) = table.dead_letters_total.filter(|letters| *letters > 0) {
        lines.push(format!(
            "  {letters} dead letter(s) since the worker started: they are not in the replica"
        ));
    }
    let jobs = view.jobs.iter().filter(|job| job.table == table.name);
    lines.extend(jobs.map(compared));
}

fn of_shard(shard: &Shard) -> String {
    let silence = shard.owner_silent_seconds.map_or_else(String::new, |s| {
        format!("  SILENT for {s} s: is its worker dead?")
    });
    let progress = match &shard.applied_until {
        Some(until) => {
            let proven = shard.age_seconds;
            let proven = proven.map_or_else(
                || "not known".to_owned(),
                |age| format!("{} ago", span(age)),
            );
            format!("applied until {until} (proven: {proven})")
        }
        None => format!("at {}", shard.position),
    };
    let headroom = shard.headroom_seconds.map_or_else(
        || "headroom unknown".to_owned(),
        |left| format!("{} until the stream forgets", span(left)),
    );
    let waits = match shard.state {
        ShardState::WaitsForParent => "  waits for its parent",
        ShardState::Open | ShardState::Finished => "",
    };
    format!(
        "  {}  {progress}  {headroom}  owner {}{waits}{silence}",
        shard.shard,
        shard.owner.as_deref().unwrap_or("none"),
    )
}

/// A line about a copy or a repair that the fleet makes by itself.
fn by_itself(job: &Job) -> String {
    let table = &job.table;
    let is_copy = job.kind == "bootstrap";
    let what = if is_copy { "COPYING" } else { "repair of gaps" };
    let how = match (job.deletes_outstanding, job.ended) {
        (Some(extra), _) => format!(
            "deletes-outstanding ({extra}): so many items of the replica are not in the source, and no more than {} are deleted without a person. Look at them with `farshore reconcile --table {table} --report FILE`, then delete them with `farshore reconcile --table {table} --apply --max-deletes {extra}`",
            job.deletes_allowed.unwrap_or(0)
        ),
        (None, true) if !is_copy && job.applies => "done".to_owned(),
        (None, true) if job.applies => {
            "all is read, and the stream has not passed its end yet".to_owned()
        }
        (None, true) => format!(
            "{} difference(s); reconcile.on_gap = \"report\"",
            job.different
        ),
        (None, false) => {
            let how_far = HowFar {
                percent: job.percent,
                left_s: job.seconds_left,
                ended: false,
            };
            let found = if is_copy {
                "item(s) copied"
            } else {
                "difference(s)"
            };
            let by = match job.alive {
                true => format!("{} process(es)", job.processes),
                false => "nobody is at it now (no worker, or a closed tap)".to_owned(),
            };
            format!(
                "{}, {by}, {} {found} so far",
                health::progress(how_far),
                job.different
            )
        }
    };
    format!("  {what} {} -> {}: {how}", job.source, job.target)
}

fn compared(job: &Job) -> String {
    if job.kind != "reconcile" {
        return by_itself(job);
    }
    let does = match job.applies {
        true => "repairs",
        false => "compares",
    };
    let how = match (job.alive, job.seconds_left) {
        (false, _) => format!("nobody is at it: `farshore reconcile --resume {}`", job.id),
        (true, None) => "just begun".to_owned(),
        (true, Some(left_s)) => {
            let left = humantime::format_duration(Duration::from_secs(left_s));
            format!("about {left} left, {} process(es)", job.processes)
        }
    };
    format!(
        "  reconcile {} {does} {} -> {}: {} %, {how}, {} difference(s) so far",
        job.id, job.source, job.target, job.percent, job.different
    )
}

fn paused(what: &str, pause: &Pause) -> String {
    format!(
        "{what} by {} since {}: {}",
        pause.by, pause.at, pause.reason
    )
}

fn in_doubt(doubts: &Doubts) -> String {
    let overdue = match doubts.overdue {
        0 => String::new(),
        n => format!("; {n} OVERDUE: they should have been repaired more than ten minutes ago"),
    };
    format!(
        "  {} range(s) in doubt: repaired after {}{overdue}",
        doubts.open, doubts.until
    )
}
