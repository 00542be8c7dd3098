use std::cmp::Ordering;
use std::collections::HashMap;

use proptest::prelude::*;

use super::super::sequence::compare;
use super::*;

#[derive(Clone, Debug)]
enum Step {
    Write(u64),
    Split(usize),
    Rotate(usize),
    Trim(i64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => any::<u64>().prop_map(Step::Write),
        1 => any::<usize>().prop_map(Step::Split),
        1 => any::<usize>().prop_map(Step::Rotate),
        1 => (1i64..200).prop_map(Step::Trim),
    ]
}

/// A tree after the steps, one millisecond apart, with every record it was given: hash and time.
fn grown(seed: u64, count: usize, steps: &[Step]) -> (ShardTree, Vec<(u64, i64)>) {
    let mut tree = ShardTree::new(Seed::new(seed), "stream", count, 0);
    let mut written = Vec::new();
    for (ms, step) in steps.iter().enumerate() {
        let ms = ms as i64;
        let open = tree.open_ids();
        match step {
            Step::Write(hash) => {
                assert!(tree.append(*hash, ms * 1_000, |_| hash.to_string().into_bytes()));
                written.push((*hash, ms));
            }
            Step::Split(n) => {
                tree.split(&open[n % open.len()], ms).unwrap();
            }
            Step::Rotate(n) => {
                tree.rotate(&open[n % open.len()], ms).unwrap();
            }
            Step::Trim(retention) => {
                tree.trim(ms, *retention);
                written.retain(|(_, at)| *at >= ms - retention);
            }
        }
    }
    (tree, written)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn the_open_shards_always_share_out_the_whole_range(
        seed: u64, count in 1usize..20, steps in proptest::collection::vec(step(), 0..60),
    ) {
        let (tree, _) = grown(seed, count, &steps);
        let mut ranges: Vec<_> = tree.iter().filter(|s| s.is_open()).map(|s| s.range).collect();
        ranges.sort_unstable();
        prop_assert_eq!(ranges[0].0, 0);
        prop_assert_eq!(ranges[ranges.len() - 1].1, u64::MAX);
        for pair in ranges.windows(2) {
            prop_assert_eq!(pair[0].1 + 1, pair[1].0);
        }
    }

    #[test]
    fn a_child_starts_after_its_parent_ended_and_keeps_its_range(
        seed: u64, steps in proptest::collection::vec(step(), 0..80),
    ) {
        let (tree, _) = grown(seed, 4, &steps);
        for child in tree.iter() {
            let Some(parent) = child.parent.as_deref().and_then(|id| tree.get(id)) else {
                continue;
            };
            let ending = parent.ending.as_deref().expect("a parent is closed");
            prop_assert_eq!(compare(ending, &child.starting), Ordering::Less);
            prop_assert!(parent.id < child.id);
            prop_assert!(parent.range.0 <= child.range.0 && child.range.1 <= parent.range.1);
        }
    }

    #[test]
    fn the_records_of_a_key_keep_their_order_through_the_lineage(
        seed: u64, steps in proptest::collection::vec(step(), 0..120),
    ) {
        let (tree, written) = grown(seed, 3, &steps);
        let mut found: Vec<_> = tree
            .iter()
            .flat_map(|shard| shard.log.records().map(move |record| (shard, record)))
            .collect();
        found.sort_by(|a, b| compare(&a.1.sequence, &b.1.sequence));
        let times: Vec<i64> = found.iter().map(|(_, r)| r.created_us / 1_000).collect();
        prop_assert_eq!(times, written.iter().map(|(_, at)| *at).collect::<Vec<_>>());
        for (shard, record) in found {
            let hash: u64 = String::from_utf8_lossy(&record.json).parse().unwrap();
            prop_assert!((shard.range.0..=shard.range.1).contains(&hash));
            prop_assert_eq!(compare(&shard.starting, &record.sequence), Ordering::Less);
            if let Some(ending) = &shard.ending {
                prop_assert_eq!(compare(&record.sequence, ending), Ordering::Less);
            }
        }
    }

    #[test]
    fn the_same_seed_grows_the_same_tree(
        seed: u64, steps in proptest::collection::vec(step(), 0..40),
    ) {
        let ids = |tree: &ShardTree| tree.iter().map(|s| s.id.clone()).collect::<Vec<_>>();
        let (one, other) = (grown(seed, 5, &steps).0, grown(seed, 5, &steps).0);
        prop_assert_eq!(ids(&one), ids(&other));
    }
}

#[test]
fn a_closed_shard_is_gone_once_it_and_its_records_are_old() {
    let mut tree = ShardTree::new(Seed::new(1), "stream", 1, 0);
    let parent = tree.open_ids().remove(0);
    tree.append(5, 10_000, |_| b"{}".to_vec());
    let child = tree.rotate(&parent, 20).unwrap();
    tree.trim(100, 85);
    assert!(tree.get(&parent).is_some(), "closed 80 ms ago, kept 85");
    tree.trim(200, 85);
    let left: HashMap<_, _> = tree
        .iter()
        .map(|s| (s.id.clone(), s.parent.clone()))
        .collect();
    // The child still names the parent that is gone, as AWS lists it.
    assert_eq!(left, HashMap::from([(child, Some(parent))]));
}

#[test]
fn a_closed_or_unknown_shard_is_neither_split_nor_rotated() {
    let mut tree = ShardTree::new(Seed::new(1), "stream", 1, 0);
    let id = tree.open_ids().remove(0);
    tree.rotate(&id, 1).unwrap();
    assert_eq!(tree.split(&id, 2), Err(ShardError::Closed(id.clone())));
    assert_eq!(tree.rotate("x", 2), Err(ShardError::Unknown("x".into())));
}
