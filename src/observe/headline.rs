//! The headline: the worst that there is, in one plain sentence, and what to do about it. Pure.

use super::health::Reason;
use super::history::{Pace, pace};
use super::view::{Headline, Level, Outage, View};

/// An estimated recovery point no older than this counts as in sync, in seconds: an idle shard is known to
/// hold nothing more only after five empty pages, and others tell of theirs now and then.
pub const IN_SYNC_S: f64 = 30.0;

/// The headline of all that a view shows.
pub fn headline(view: &View) -> Headline {
    let steps: [fn(&View) -> Option<Headline>; 10] = [
        idle, dead, outage, stands, gap, paused, urgent, copying, moving, quiet,
    ];
    let found = steps.into_iter().find_map(|step| step(view));
    found.unwrap_or_else(|| say(Level::Ok, "in-sync", "in sync".to_owned(), None))
}

fn say(level: Level, code: &str, text: String, next: Option<&str>) -> Headline {
    Headline {
        level,
        code: code.to_owned(),
        text,
        next: next.map(str::to_owned),
    }
}

/// The reasons with this code, or those that begin with it where it ends with a dash.
fn reasons<'a>(view: &'a View, code: &str) -> Vec<&'a Reason> {
    let is_it = |reason: &&Reason| match code.strip_suffix('-') {
        Some(_) => reason.code.starts_with(code),
        None => reason.code == code,
    };
    view.reasons.iter().filter(is_it).collect()
}

/// The first of `codes` that is among the reasons, told with its own sentence.
fn told(view: &View, level: Level, codes: &[&str]) -> Option<Headline> {
    let found = codes.iter().map(|code| reasons(view, code));
    let found = found.into_iter().find(|found| !found.is_empty())?;
    let first = found.first()?;
    let table = match first.table.as_str() {
        "" => String::new(),
        table => format!("{table}: "),
    };
    let text = format!("{table}{}{}", first.text, more(found.len()));
    Some(say(level, &first.code, text, Some(&first.next)))
}

fn more(found: usize) -> String {
    match found {
        0 | 1 => String::new(),
        n => format!(" (and {} more)", n - 1),
    }
}

/// ` (orders)`, unless all tables of the group are meant.
fn of_tables(view: &View, tables: &[&str]) -> String {
    let all = view
        .tables
        .iter()
        .all(|table| tables.contains(&table.name.as_str()));
    match tables.iter().any(|table| table.is_empty()) || all {
        true => String::new(),
        false => format!(" ({})", tables.join(", ")),
    }
}

/// `03:12`, with its date where that is not today's.
fn clock_time(view: &View, at: &str) -> String {
    let (Some(day), Some(time)) = (at.get(..10), at.get(11..16)) else {
        return at.to_owned();
    };
    match view.at.starts_with(day) {
        true => time.to_owned(),
        false => format!("{day} {time}"),
    }
}

/// Nobody may write here, or nobody can say whether somebody may: what else there is waits for that.
fn idle(view: &View) -> Option<Headline> {
    told(view, Level::Bad, &["no-role"])
        .or_else(|| told(view, Level::Warn, &["quarantined"]))
        .or_else(|| told(view, Level::Busy, &["role-changing"]))
}

/// Nobody is at it, or the one who is stands still.
fn dead(view: &View) -> Option<Headline> {
    if let Some(reason) = reasons(view, "nobody-feeds").first() {
        let text = format!("nobody feeds {}: {}", view.here, reason.text);
        return Some(say(Level::Bad, &reason.code, text, Some(&reason.next)));
    }
    told(view, Level::Bad, &["not-live", "table-stopped"])
}

/// What it needs does not answer.
fn outage(view: &View) -> Option<Headline> {
    let scopes = ["state", "replica", "source", "dead-letters"];
    let open = |scope: &str| -> Vec<&Outage> {
        let outages = view.outages.iter();
        outages.filter(|outage| outage.scope == scope).collect()
    };
    let (scope, open) = scopes
        .into_iter()
        .map(|scope| (scope, open(scope)))
        .find(|(_, open)| !open.is_empty())?;
    let first = open.iter().min_by(|a, b| a.since.cmp(&b.since))?;
    let region = &first.region;
    let what = match scope {
        "state" => format!("cannot use the state table in {region}"),
        "replica" => format!("cannot write to {region}"),
        "source" => format!("cannot read from {region}"),
        _ => "cannot store dead letters".to_owned(),
    };
    let tables: Vec<&str> = open
        .iter()
        .map(|outage| outage.table.as_deref().unwrap_or(""))
        .collect();
    let text = format!(
        "{what} since {}: {}{}{}",
        clock_time(view, &first.since),
        first.class,
        of_tables(view, &tables),
        running_out(view)
    );
    let code = format!("outage-{scope}");
    Some(say(Level::Bad, &code, text, Some(&first.next)))
}

/// What little time the stream leaves, where it is little.
fn running_out(view: &View) -> String {
    match reasons(view, "headroom").first() {
        Some(reason) => format!("; {}", reason.text),
        None => String::new(),
    }
}

/// Something stands still, or time runs out, and no outage explains it.
fn stands(view: &View) -> Option<Headline> {
    // A closed tap explains it, and says the time itself.
    if !view.pauses.is_empty() && !reasons(view, "headroom").is_empty() {
        return paused(view).map(|paused| Headline {
            level: Level::Bad,
            ..paused
        });
    }
    let codes = [
        "headroom",
        "shard-unowned",
        "shard-stalled",
        "discovery-stalled",
        "loop-stalled",
        "state-unread",
    ];
    told(view, Level::Bad, &codes)
}

fn gap(view: &View) -> Option<Headline> {
    let found = reasons(view, "gap-");
    let first = found.iter().find(|reason| reason.code != "gap-repair")?;
    let is_mended = view
        .jobs
        .iter()
        .any(|job| job.kind == "gap-repair" && job.table == first.table && job.alive);
    let text = format!(
        "{}: {} ({}){}",
        first.table,
        first.text,
        first.code,
        more(found.len())
    );
    let level = if is_mended { Level::Warn } else { Level::Bad };
    Some(say(level, &first.code, text, Some(&first.next)))
}

fn paused(view: &View) -> Option<Headline> {
    let first = view.pauses.first()?;
    let tables: Vec<&str> = view
        .pauses
        .iter()
        .map(|pause| pause.table.as_deref().unwrap_or(""))
        .collect();
    let text = format!(
        "paused by {} because {}{}{}",
        first.by,
        first.reason,
        of_tables(view, &tables),
        running_out(view)
    );
    let next = "Open the tap again with `farshore resume` before the stream forgets";
    Some(say(Level::Warn, "paused", text, Some(next)))
}

/// What a person should look at, though all flows.
fn urgent(view: &View) -> Option<Headline> {
    let codes = [
        "dead-letters-expire",
        "deletes-outstanding",
        "doubt-overdue",
        "task-died",
    ];
    told(view, Level::Warn, &codes)
}

fn copying(view: &View) -> Option<Headline> {
    let mut copied = view.tables.iter().filter_map(|table| {
        let copying = table.copying?;
        Some((table, copying))
    });
    if let Some((table, copying)) = copied.next() {
        let left = match copying.left_seconds {
            Some(left) if copying.percent < 100 => format!(", about {} left", span(left as f64)),
            _ => String::new(),
        };
        let text = format!(
            "copying {}: {} %{left}{}",
            table.name,
            copying.percent,
            more(copied.count() + 1)
        );
        let next = "Wait: until then there is nothing to fail over to";
        return Some(say(Level::Busy, "copying", text, Some(next)));
    }
    told(view, Level::Busy, &["gap-repair", "starting"])
}

/// Behind, and how long it takes.
fn moving(view: &View) -> Option<Headline> {
    view.flow.as_ref()?;
    if let Some(doubts) = view.doubts.first() {
        let open: usize = view.doubts.iter().map(|doubts| doubts.open).sum();
        let text = format!(
            "applying, with {open} range(s) in doubt that are repaired after {}",
            clock_time(view, &doubts.until)
        );
        return Some(say(Level::Busy, "in-doubt", text, None));
    }
    let Some(age_s) = view.recovery_point.estimated_seconds else {
        let text = "how far the replica is behind is not known yet".to_owned();
        return Some(say(Level::Busy, "starting", text, Some("Wait a moment")));
    };
    if age_s <= IN_SYNC_S {
        return None;
    }
    Some(match pace(view.history.as_ref(), age_s) {
        Pace::Left(left) => {
            let text = format!("catching up, about {} left", span(left));
            say(Level::Busy, "catching-up", text, None)
        }
        Pace::Unknown => {
            let text = format!("catching up: {} behind", span(age_s));
            say(Level::Busy, "catching-up", text, None)
        }
        Pace::Behind => {
            let text = format!("falling behind: {} behind", span(age_s));
            let next = "Look at the throttles and write units: raise writes.units_per_second or the replica's capacity, or add workers";
            say(Level::Warn, "falling-behind", text, Some(next))
        }
    })
}

/// All is well, and what is worth saying all the same.
fn quiet(view: &View) -> Option<Headline> {
    if view.flow.is_none() {
        let text = "standby: this region is active".to_owned();
        return Some(match view.home.first() {
            None => say(Level::Ok, "standby", text, None),
            Some(home) => {
                let text = format!("{text}; {}", home.text);
                say(Level::Warn, "region-away", text, Some(&home.next))
            }
        });
    }
    let waiting = view.dead_letters.waiting.filter(|waiting| *waiting > 0)?;
    let text =
        format!("in sync, but {waiting} dead letter(s) wait: those changes are not in the replica");
    let next = "Look at them with `farshore dead-letters`, mend what the replica refused, and bring them home with `farshore redrive --apply`";
    Some(say(Level::Warn, "dead-letters", text, Some(next)))
}

/// Seconds as a person says them.
pub fn span(seconds: f64) -> String {
    let seconds = seconds.max(0.0) as u64;
    match seconds {
        0..=89 => format!("{seconds} s"),
        90..=5_399 => format!("{} min", (seconds + 30) / 60),
        5_400..=172_799 => format!("{} h", (seconds + 1_800) / 3_600),
        _ => format!("{} days", (seconds + 43_200) / 86_400),
    }
}

#[cfg(test)]
#[path = "headline_tests.rs"]
mod tests;
