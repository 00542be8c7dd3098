//! Where regions stand on their way home.

use super::Homeward;
use crate::dynamo::clock::rfc3339;
use crate::lease::row::{ControlRow, TrackRow};

/// The regions that were active and are no whole replicas yet, as the record and the rows of `here` tell.
pub(crate) fn homeward(
    here: &str,
    control: Option<&ControlRow>,
    tracks: &[TrackRow],
) -> Vec<Homeward> {
    let Some(control) = control else {
        return Vec::new();
    };
    let away = control.quarantined.iter().map(|label| (label, false));
    let back = control.returned.iter().map(|label| (label, true));
    let back = back.filter(|(label, _)| !control.is_home(label));
    away.chain(back)
        .map(|(label, returned)| {
            let done = |step: &str| control.done_ms(&format!("{step}:{label}"));
            let steps = ["home-equal", "home-turned", "home-applied", "home-captured"];
            let last = steps.iter().find_map(|step| Some((*step, done(step)?)));
            let (stage, text, next) = match (last, returned) {
                (Some(("home-equal", _)), _) => (
                    "equal",
                    format!("{label} is a whole replica again, and what is left of its way home is to be removed"),
                    "Type `farshore failback --apply` again",
                ),
                (_, true) => (
                    "turned",
                    format!("{label} is on its way home: it is fed again, and not known to be equal yet"),
                    "Type `farshore failback --apply` again, if it is not at work: it goes on",
                ),
                (Some(_), false) => (
                    "judged",
                    format!("{label} is in quarantine, and its way home has begun"),
                    "Type `farshore failback --apply` again, if it is not at work: it goes on",
                ),
                (None, false) => (
                    "quarantined",
                    format!("{label} is in quarantine: it was active, and may hold writes that never left"),
                    "See what that is, and bring it home, with `farshore failback`",
                ),
            };
            let own = tracks.iter().filter(|row| label == here && row.entity_type == "capture");
            let read: Vec<Option<i64>> = own.clone().map(|row| row.read_until).collect();
            Homeward {
                region: label.clone(),
                stage: stage.to_owned(),
                since: last.map(|(_, ms)| rfc3339(ms)),
                captured_until: read
                    .into_iter()
                    .collect::<Option<Vec<i64>>>()
                    .and_then(|read| read.into_iter().min())
                    .map(rfc3339),
                captured_records: (label == here).then(|| own.map(|row| row.records).sum()),
                text,
                next: next.to_owned(),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::row::Track;

    fn stage(control: &ControlRow) -> Vec<(String, String)> {
        let seen = homeward("a", Some(control), &[]);
        seen.into_iter()
            .map(|one| (one.region, one.stage))
            .collect()
    }

    fn told(label: &str, stage: &str) -> Vec<(String, String)> {
        vec![(label.to_owned(), stage.to_owned())]
    }

    #[test]
    fn a_region_is_seen_at_each_step_of_its_way_home() {
        let mut control = ControlRow::first("g", "b", "test", "now".into());
        assert_eq!(stage(&control), []);
        control.quarantined = vec!["a".into()];
        assert_eq!(stage(&control), told("a", "quarantined"));
        control.note("home-captured:a", 1, "");
        assert_eq!(stage(&control), told("a", "judged"));
        control.quarantined.clear();
        control.returned = vec!["a".into()];
        control.note("home-turned:a", 2, "");
        assert_eq!(stage(&control), told("a", "turned"));
        control.note("home-equal:a", 3, "");
        assert_eq!(stage(&control), told("a", "equal"));
        control.note("home:a", 4, "");
        assert_eq!(stage(&control), []);
    }

    #[test]
    fn how_much_is_captured_is_told_by_the_rows_of_the_region_itself() {
        let mut control = ControlRow::first("g", "b", "test", "now".into());
        control.quarantined = vec!["a".into()];
        let mut row = TrackRow::new(Track::Stranded, 1, "orders", "arn");
        (row.read_until, row.records) = (Some(60_000), 7);
        let seen = homeward("a", Some(&control), &[row.clone()]);
        assert_eq!(seen[0].captured_records, Some(7));
        assert!(seen[0].captured_until.is_some());
        let seen = homeward("b", Some(&control), &[row]);
        assert_eq!(seen[0].captured_records, None);
    }
}
