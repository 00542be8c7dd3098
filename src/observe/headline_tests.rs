use super::*;
use crate::observe::view::{Closed, Copying, Doubts, History, Job, Pause, Point};

/// A group in which all is well.
fn calm() -> View {
    let example = include_str!("../../tests/view/status.json");
    let mut view: View = serde_json::from_str(example).unwrap();
    view.reasons.clear();
    view.outages.clear();
    view.pauses.clear();
    view.gaps.clear();
    view.doubts.clear();
    view.jobs.clear();
    view.dead_letters.waiting = Some(0);
    view.history = None;
    for table in &mut view.tables {
        table.paused = None::<Closed>;
        table.copying = None::<Copying>;
    }
    view.recovery_point.estimated_seconds = Some(1.5);
    view
}

fn reason(view: &mut View, code: &str, table: &str, text: &str) {
    view.reasons.push(Reason {
        code: code.to_owned(),
        table: table.to_owned(),
        text: text.to_owned(),
        next: "do this".to_owned(),
    });
}

fn outage(view: &mut View, scope: &str, table: Option<&str>, class: &str) {
    reason(
        view,
        &format!("outage-{scope}"),
        table.unwrap_or(""),
        "it fails",
    );
    view.outages.push(Outage {
        scope: scope.to_owned(),
        table: table.map(str::to_owned),
        region: "us-west-2".to_owned(),
        since: "2026-11-27T03:12:00.250Z".to_owned(),
        class: class.to_owned(),
        text: "it fails".to_owned(),
        next: "do this".to_owned(),
    });
}

fn pause(view: &mut View, table: Option<&str>) {
    reason(view, "paused", table.unwrap_or(""), "paused");
    view.pauses.push(Pause {
        table: table.map(str::to_owned),
        by: "alice@host".to_owned(),
        reason: "bad write".to_owned(),
        at: "2026-11-27T03:00:00Z".to_owned(),
    });
}

fn behind(view: &mut View, ages: &[f64]) {
    view.recovery_point.estimated_seconds = ages.last().copied();
    let point = |age: &f64| Point {
        at: String::new(),
        lag_seconds: None,
        records_per_second: 0.0,
        proven_seconds: None,
        estimated_seconds: Some(*age),
    };
    view.history = Some(History {
        step_seconds: 10,
        points: ages.iter().map(point).collect(),
    });
}

fn said(view: &View) -> (Level, String, String) {
    let headline = headline(view);
    (headline.level, headline.code, headline.text)
}

fn expect(view: &View, level: Level, code: &str, text: &str) {
    assert_eq!(said(view), (level, code.to_owned(), text.to_owned()));
}

#[test]
fn it_says_plainly_what_is() {
    let mut view = calm();
    expect(&view, Level::Ok, "in-sync", "in sync");
    view.flow = None;
    expect(
        &view,
        Level::Ok,
        "standby",
        "standby: this region is active",
    );

    let mut view = calm();
    view.dead_letters.waiting = Some(3);
    let text = "in sync, but 3 dead letter(s) wait: those changes are not in the replica";
    expect(&view, Level::Warn, "dead-letters", text);

    let mut view = calm();
    behind(&mut view, &[280.0, 270.0, 260.0]);
    expect(
        &view,
        Level::Busy,
        "catching-up",
        "catching up, about 4 min left",
    );
    behind(&mut view, &[260.0, 270.0, 280.0]);
    expect(
        &view,
        Level::Warn,
        "falling-behind",
        "falling behind: 5 min behind",
    );
    view.history = None;
    expect(
        &view,
        Level::Busy,
        "catching-up",
        "catching up: 5 min behind",
    );
    view.recovery_point.estimated_seconds = None;
    assert_eq!(said(&view).1, "starting");

    let mut view = calm();
    outage(&mut view, "replica", None, "throttled");
    let text = "cannot write to us-west-2 since 03:12: throttled";
    expect(&view, Level::Bad, "outage-replica", text);
    view.at = "2026-11-28T00:01:00Z".to_owned();
    let text = "cannot write to us-west-2 since 2026-11-27 03:12: throttled";
    expect(&view, Level::Bad, "outage-replica", text);

    let mut view = calm();
    pause(&mut view, None);
    expect(
        &view,
        Level::Warn,
        "paused",
        "paused by alice@host because bad write",
    );
    reason(&mut view, "headroom", "orders", "the stream forgets in 5 h");
    let text = "paused by alice@host because bad write; the stream forgets in 5 h";
    expect(&view, Level::Bad, "paused", text);
}

#[test]
fn one_table_of_several_is_named_and_all_of_them_are_not() {
    let mut view = calm();
    outage(&mut view, "source", Some("orders"), "network");
    let text = "cannot read from us-west-2 since 03:12: network (orders)";
    expect(&view, Level::Bad, "outage-source", text);
    outage(&mut view, "source", Some("customers"), "network");
    let text = "cannot read from us-west-2 since 03:12: network";
    expect(&view, Level::Bad, "outage-source", text);
}

/// From nothing to the worst: each trouble that is added is worse than all before it.
#[test]
fn the_worst_comes_first() {
    let mut view = calm();
    let mut codes = Vec::new();
    let mut last = Level::Ok;
    let mut look = |view: &View| {
        let (level, code, _) = said(view);
        assert!(level >= last, "{code}: {level:?} after {last:?}");
        last = level;
        codes.push(code);
    };
    look(&view);
    behind(&mut view, &[280.0, 270.0, 260.0]);
    look(&view);
    view.doubts.push(Doubts {
        table: "orders".to_owned(),
        open: 1,
        until: "2026-11-27T03:25:40Z".to_owned(),
        overdue: 0,
    });
    look(&view);
    reason(&mut view, "starting", "orders", "not read yet");
    look(&view);
    view.tables[0].copying = Some(Copying {
        percent: 40,
        left_seconds: Some(240),
    });
    look(&view);
    assert_eq!(
        headline(&view).text,
        "copying orders: 40 %, about 4 min left"
    );
    reason(&mut view, "dead-letters-expire", "", "they expire");
    look(&view);
    pause(&mut view, Some("orders"));
    look(&view);
    reason(&mut view, "gap-trimmed", "orders", "1 gap(s)");
    look(&view);
    reason(&mut view, "shard-unowned", "orders", "nobody owns it");
    look(&view);
    outage(&mut view, "dead-letters", None, "access");
    look(&view);
    outage(&mut view, "source", None, "network");
    look(&view);
    outage(&mut view, "replica", None, "throttled");
    look(&view);
    outage(&mut view, "state", None, "network");
    look(&view);
    reason(&mut view, "not-live", "", "it stands still");
    look(&view);
    reason(&mut view, "nobody-feeds", "", "no worker");
    look(&view);
    let expected = "in-sync catching-up in-doubt starting copying dead-letters-expire paused \
         gap-trimmed shard-unowned outage-dead-letters outage-source outage-replica outage-state \
         not-live nobody-feeds";
    assert_eq!(codes.join(" "), expected);
}

#[test]
fn a_gap_that_is_being_mended_is_no_call() {
    let mut view = calm();
    reason(&mut view, "gap-trimmed", "orders", "1 gap(s)");
    assert_eq!(said(&view).0, Level::Bad);
    view.jobs.push(Job {
        kind: "gap-repair".to_owned(),
        id: "gap-repair-1-1".to_owned(),
        table: "orders".to_owned(),
        source: "us-east-1".to_owned(),
        target: "us-west-2".to_owned(),
        applies: true,
        percent: 3,
        seconds_left: None,
        processes: 1,
        different: 0,
        alive: true,
        ended: false,
        deletes_outstanding: None,
        deletes_allowed: None,
    });
    assert_eq!(said(&view).0, Level::Warn);
}

#[test]
fn spans_are_said_as_people_say_them() {
    let spans = [0.4, 89.0, 90.0, 3_570.0, 5_400.0, 172_800.0].map(span);
    assert_eq!(spans, ["0 s", "89 s", "2 min", "60 min", "2 h", "2 days"]);
}
