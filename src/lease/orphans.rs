//! Which open shards could be read now. Pure: whoever of them has no owner is forgotten by the fleet,
//! and not only waiting for its turn.

use std::collections::{HashMap, HashSet};

use super::row::ShardRow;
use crate::stream::stream_label;

/// The open shards of `epoch` that nothing holds back: their parents are finished or gone, and so are
/// older streams of their table, which are finished first. Stream labels are times.
pub fn readable(rows: &[ShardRow], epoch: u64) -> impl Iterator<Item = &ShardRow> {
    let open: Vec<&ShardRow> = rows
        .iter()
        .filter(|row| row.epoch == epoch && !row.is_finished())
        .collect();
    let shards: HashSet<(&str, &str)> = open
        .iter()
        .map(|row| (row.stream_arn.as_str(), row.shard_id.as_str()))
        .collect();
    let mut oldest: HashMap<&str, &str> = HashMap::new();
    for row in &open {
        let label = stream_label(&row.stream_arn);
        let known = oldest.entry(&row.table).or_insert(label);
        *known = (*known).min(label);
    }
    open.into_iter().filter(move |row| {
        let waits_for_parent = row
            .parent_shard_id
            .iter()
            .any(|parent| shards.contains(&(row.stream_arn.as_str(), parent.as_str())));
        !waits_for_parent && oldest.get(row.table.as_str()) == Some(&stream_label(&row.stream_arn))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::row::SHARD_END;
    use crate::stream::ShardId;
    use crate::stream::reader::Position;

    fn row(stream: &str, shard: &str, parent: Option<&str>) -> ShardRow {
        let arn = format!("arn:aws:dynamodb:r:1:table/t/stream/{stream}");
        let parent = parent.map(|parent| ShardId(parent.to_owned()));
        let shard = ShardId(shard.to_owned());
        ShardRow::new(
            1,
            "t",
            &arn,
            &shard,
            parent.as_ref(),
            &Position::TrimHorizon,
            0,
        )
    }

    fn names(rows: &[ShardRow]) -> Vec<&str> {
        readable(rows, 1).map(|row| row.shard_id.as_str()).collect()
    }

    #[test]
    fn a_child_waits_for_its_parent_and_not_for_one_that_is_gone() {
        let mut rows = [row("1", "a", Some("gone")), row("1", "b", Some("a"))];
        assert_eq!(names(&rows), ["a"]);
        rows[0].checkpoint = SHARD_END.to_owned();
        assert_eq!(names(&rows), ["b"]);
    }

    #[test]
    fn a_new_stream_waits_for_the_old_one() {
        let mut rows = [row("2", "new", None), row("1", "old", None)];
        assert_eq!(names(&rows), ["old"]);
        rows[1].checkpoint = SHARD_END.to_owned();
        assert_eq!(names(&rows), ["new"]);
    }

    #[test]
    fn rows_of_other_epochs_are_nobodys() {
        let mut other = row("1", "a", None);
        other.epoch = 2;
        assert!(names(&[other]).is_empty());
    }
}
