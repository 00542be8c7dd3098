use super::*;
use crate::observe::health::Reason;

fn example() -> View {
    let example = include_str!("../../../tests/view/status.json");
    serde_json::from_str(example).unwrap()
}

#[test]
fn what_a_worker_knows_is_laid_over_what_the_rows_say() {
    let worker = example();
    let mut view = example();
    view.worker = None;
    view.events.clear();
    view.history = None;
    view.outages.clear();
    view.dead_letters = crate::observe::view::DeadLetters::default();
    view.tables[0].records_total = None;
    view.tables[0].recovery_point.proven_seconds = Some(600.0);
    view.tables[1].recovery_point.estimated_seconds = Some(3.0);
    view.reasons = vec![Reason {
        code: "paused".to_owned(),
        table: "customers".to_owned(),
        text: String::new(),
        next: String::new(),
    }];
    merge(&mut view, std::slice::from_ref(&worker));
    assert_eq!(view.worker, worker.worker);
    assert_eq!(view.tables[0].records_total, Some(1_048_576));
    assert_eq!(
        view.tables[0].recovery_point.proven_seconds,
        Some(600.0),
        "the rows were read later"
    );
    let codes: Vec<&str> = view.reasons.iter().map(|r| r.code.as_str()).collect();
    assert_eq!(codes, ["paused", "outage-replica"]);
    assert_eq!(view.headline.code, "outage-replica");
    assert_eq!(view.dead_letters.by_reason[0].count, 3);
    assert_eq!(view.history, worker.history);

    // A second worker of the same fleet.
    merge(&mut view, std::slice::from_ref(&worker));
    assert_eq!(view.tables[0].records_total, Some(2 * 1_048_576));
    assert_eq!(view.reasons.len(), 2, "said once");
    assert!(view.events.is_sorted_by(|a, b| a.at >= b.at));
}

#[test]
fn without_a_worker_it_stays_what_the_rows_say() {
    let mut view = example();
    let before = view.clone();
    merge(&mut view, &[]);
    assert_eq!(view.reasons, before.reasons);
    assert_eq!(view.tables, before.tables);
}
