//! A page of DescribeStream: which shards it shows and how, with the inconsistencies AWS is known
//! for if faults ask for them.

use std::sync::Arc;

use super::faults::Kind;
use super::rules::Rule;
use super::shards::{Shard, ShardTree};

pub(crate) struct Query<'a> {
    /// Only shards listed after this one, which need not exist any more.
    pub(crate) after: Option<&'a str>,
    pub(crate) children_of: Option<&'a str>,
    pub(crate) limit: usize,
    pub(crate) now_ms: i64,
}

pub(crate) struct Listed<'a> {
    pub(crate) shard: &'a Shard,
    /// A closed shard shown as if it were open.
    pub(crate) shown_open: bool,
}

pub(crate) struct Page<'a> {
    pub(crate) shards: Vec<Listed<'a>>,
    /// The last shard of the page, if there are more after it.
    pub(crate) last: Option<String>,
}

pub(crate) fn page<'a>(tree: &'a ShardTree, query: &Query<'_>, faults: &[Arc<Rule>]) -> Page<'a> {
    let mut shards: Vec<&Shard> = tree
        .iter()
        .filter(|shard| query.after.is_none_or(|after| shard.id.as_str() > after))
        .filter(|shard| {
            query
                .children_of
                .is_none_or(|p| shard.parent.as_deref() == Some(p))
        })
        .filter(|shard| !is_late(shard, query.now_ms, faults))
        .collect();
    if let Some(parent) = query.children_of
        && answers_empty(parent, faults)
    {
        shards.clear();
    }
    let more = shards.len() > query.limit;
    shards.truncate(query.limit);
    let last = shards.last().filter(|_| more).map(|shard| shard.id.clone());
    // After the page was cut: a shard left out leaves a hole, and does not move up the next one.
    shards.retain(|shard| !is_missed(shard, faults));
    let shards = shards.into_iter().map(|shard| Listed {
        shard,
        shown_open: is_shown_open(shard, query.now_ms, faults),
    });
    Page {
        shards: shards.collect(),
        last,
    }
}

fn is_late(shard: &Shard, now_ms: i64, faults: &[Arc<Rule>]) -> bool {
    faults.iter().any(|rule| {
        let Kind::LateChildren { time } = rule.fault.kind else {
            return false;
        };
        let young = shard.parent.is_some() && now_ms - shard.created_ms < millis(time);
        let late = young && rule.picks_shard(&shard.id);
        if late {
            rule.hit();
        }
        late
    })
}

fn is_shown_open(shard: &Shard, now_ms: i64, faults: &[Arc<Rule>]) -> bool {
    faults.iter().any(|rule| {
        let Kind::OpenParents { time } = rule.fault.kind else {
            return false;
        };
        let fresh = shard
            .closed_ms
            .is_some_and(|closed| now_ms - closed < millis(time));
        let shown = fresh && rule.picks_shard(&shard.id);
        if shown {
            rule.hit();
        }
        shown
    })
}

fn is_missed(shard: &Shard, faults: &[Arc<Rule>]) -> bool {
    let missing = |rule: &&Arc<Rule>| matches!(rule.fault.kind, Kind::MissingShard);
    let mut missing = faults.iter().filter(missing);
    missing.any(|rule| rule.misses_once(&shard.id))
}

fn answers_empty(parent: &str, faults: &[Arc<Rule>]) -> bool {
    faults.iter().any(|rule| {
        let Kind::EmptyChildren { first } = rule.fault.kind else {
            return false;
        };
        let empty = rule.picks_shard(parent) && rule.asked_before(parent) < first;
        if empty {
            rule.hit();
        }
        empty
    })
}

fn millis(time: std::time::Duration) -> i64 {
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::super::dice::Seed;
    use super::super::faults::{Fault, Subject};
    use super::super::rules::Rules;
    use super::*;

    fn tree(seed: u64, count: usize, turns: &[usize]) -> ShardTree {
        let mut tree = ShardTree::new(Seed::new(seed), "stream", count, 0);
        for (ms, turn) in turns.iter().enumerate() {
            let open = tree.open_ids();
            let id = &open[turn % open.len()];
            let ms = ms as i64;
            let turned = match turn % 2 {
                0 => tree.rotate(id, ms).map(|_| ()),
                _ => tree.split(id, ms).map(|_| ()),
            };
            turned.unwrap();
        }
        tree
    }

    /// The ids of a whole listing, page by page.
    fn listed(tree: &ShardTree, limit: usize, faults: &[Arc<Rule>]) -> Vec<String> {
        let (mut ids, mut after) = (Vec::new(), None::<String>);
        loop {
            let query = Query {
                after: after.as_deref(),
                children_of: None,
                limit,
                now_ms: 1_000,
            };
            let page = page(tree, &query, faults);
            assert!(page.shards.len() <= limit);
            ids.extend(page.shards.iter().map(|listed| listed.shard.id.clone()));
            after = page.last;
            if after.is_none() {
                return ids;
            }
        }
    }

    proptest! {
        #[test]
        fn pages_of_any_size_list_every_shard_once(
            seed: u64, count in 1usize..12, limit in 1usize..8,
            turns in proptest::collection::vec(0usize..100, 0..30),
        ) {
            let tree = tree(seed, count, &turns);
            let all: Vec<String> = tree.iter().map(|shard| shard.id.clone()).collect();
            prop_assert_eq!(listed(&tree, limit, &[]), all);
        }

        #[test]
        fn a_shard_is_missed_once_at_most_and_others_do_not_move(
            seed: u64, limit in 1usize..8,
            turns in proptest::collection::vec(0usize..100, 0..30),
        ) {
            let tree = tree(seed, 3, &turns);
            let rules = Rules::new(Seed::new(seed), String::new());
            rules.add(Fault::missing_shard().chance(0.5));
            let subject = Subject {
                operation: "DescribeStream",
                tables: &[],
                keys: &[],
                shard: None,
            };
            let faults = rules.concerning(&subject);
            let mut seen: HashMap<String, usize> = HashMap::new();
            for _ in 0..3 {
                for id in listed(&tree, limit, &faults) {
                    *seen.entry(id).or_default() += 1;
                }
            }
            prop_assert_eq!(seen.len(), tree.iter().count());
            prop_assert!(seen.values().all(|times| *times >= 2));
        }
    }
}
