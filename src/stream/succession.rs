//! A table's streams, one after another. Pure.
//!
//! A stream that was disabled and enabled again is another stream with the same items behind it.
//! What the old one still holds is older than anything in the new one, so it is applied first.
//! Stream labels are times: the higher one is the newer stream.

use super::stream_label;

/// A stream of a table that has a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Known<'a> {
    /// Its ARN.
    pub arn: &'a str,
    /// Whether its row says that all its shards are finished for good.
    pub finished: bool,
    /// Whether any of its shards still has a row.
    pub has_rows: bool,
}

/// The stream that a table has now, when its description says `told`. Descriptions may be late: one
/// that names a stream already succeeded by another is not believed.
pub fn current<'a>(known: &[Known<'a>], told: &'a str) -> &'a str {
    let newest = known.iter().max_by_key(|stream| stream_label(stream.arn));
    match newest {
        Some(newest) if known.iter().any(|stream| stream.arn == told) => newest.arn,
        // One never seen before is new, whatever its label says.
        _ => told,
    }
}

/// Which streams have to be followed, oldest first: the table's `current` one, each that is not
/// finished, and each whose rows have yet to be deleted.
pub fn to_follow<'a>(known: &[Known<'a>], current: Option<&'a str>) -> Vec<&'a str> {
    let mut arns: Vec<&str> = known
        .iter()
        .filter(|stream| !stream.finished || stream.has_rows)
        .map(|stream| stream.arn)
        .chain(current)
        .collect();
    arns.sort_unstable_by_key(|arn| stream_label(arn));
    arns.dedup();
    arns
}

/// Whether an older stream of the table still has to be finished before a shard of `arn` may be
/// read.
pub fn is_held_back(known: &[Known<'_>], arn: &str) -> bool {
    known
        .iter()
        .any(|stream| !stream.finished && stream_label(stream.arn) < stream_label(arn))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(arn: &str, finished: bool, has_rows: bool) -> Known<'_> {
        Known {
            arn,
            finished,
            has_rows,
        }
    }

    #[test]
    fn a_new_stream_waits_until_every_older_one_is_finished() {
        let mut streams = [
            known("t/stream/2026-01", true, false),
            known("t/stream/2026-02", false, true),
            known("t/stream/2026-03", false, false),
        ];
        let [first, second, third] = streams.map(|stream| stream.arn);
        assert!(!is_held_back(&streams, first));
        assert!(!is_held_back(&streams, second));
        assert!(is_held_back(&streams, third));
        streams[1].finished = true;
        assert!(!is_held_back(&streams, third));
    }

    #[test]
    fn a_late_description_does_not_bring_an_old_stream_back() {
        let streams = [
            known("t/stream/2026-01", true, false),
            known("t/stream/2026-02", false, true),
        ];
        assert_eq!(current(&streams, streams[0].arn), streams[1].arn);
        assert_eq!(current(&streams, streams[1].arn), streams[1].arn);
        assert_eq!(current(&streams, "t/stream/2026-03"), "t/stream/2026-03");
        assert_eq!(current(&[], "t/stream/2026-03"), "t/stream/2026-03");
    }

    #[test]
    fn unfinished_streams_are_followed_oldest_first_and_finished_ones_until_their_rows_are_gone() {
        let streams = [
            known("t/stream/2026-03", false, false),
            known("t/stream/2026-01", true, false),
            known("t/stream/2026-02", true, true),
        ];
        assert_eq!(
            to_follow(&streams, Some("t/stream/2026-04")),
            ["t/stream/2026-02", "t/stream/2026-03", "t/stream/2026-04"]
        );
        assert_eq!(
            to_follow(&streams, Some("t/stream/2026-03")),
            ["t/stream/2026-02", "t/stream/2026-03"]
        );
        assert_eq!(
            to_follow(&streams, None),
            ["t/stream/2026-02", "t/stream/2026-03"]
        );
    }
}
