use super::*;
use proptest::prelude::*;

fn id(n: usize) -> ShardId {
    ShardId(format!("shardId-{n:04}"))
}

fn shard(n: usize, parent: Option<usize>) -> Shard {
    Shard {
        id: id(n),
        parent: parent.map(id),
    }
}

fn row(parent: Option<usize>, started: bool, finished: bool) -> Tracked {
    Tracked {
        parent: parent.map(id),
        children: Vec::new(),
        started,
        finished,
    }
}

fn none() -> BTreeSet<ShardId> {
    BTreeSet::new()
}

#[test]
fn a_child_waits_for_its_parent() {
    let listing = [shard(1, None), shard(2, Some(1))];
    let rows = BTreeMap::from([
        (id(1), row(None, true, false)),
        (id(2), row(Some(1), false, false)),
    ]);
    assert_eq!(
        plan(&listing, true, &rows, &none()).startable,
        BTreeSet::from([id(1)])
    );
    let rows = BTreeMap::from([
        (id(1), row(None, true, true)),
        (id(2), row(Some(1), false, false)),
    ]);
    assert_eq!(
        plan(&listing, true, &rows, &none()).startable,
        BTreeSet::from([id(2)])
    );
}

#[test]
fn a_parent_that_is_nowhere_holds_its_child_until_the_service_says_gone() {
    let listing = [shard(2, Some(1))];
    let rows = BTreeMap::from([(id(2), row(Some(1), false, false))]);
    let incomplete = plan(&listing, false, &rows, &none());
    assert!(incomplete.startable.is_empty() && incomplete.missing_parents.is_empty());
    let complete = plan(&listing, true, &rows, &none());
    assert!(complete.startable.is_empty());
    assert_eq!(complete.missing_parents, BTreeSet::from([id(1)]));
    let gone = plan(&listing, true, &rows, &BTreeSet::from([id(1)]));
    assert_eq!(gone.startable, BTreeSet::from([id(2)]));
}

#[test]
fn a_parent_listed_late_is_read_before_its_waiting_child() {
    let rows = BTreeMap::from([(id(2), row(Some(1), false, false))]);
    let late = plan(&[shard(1, None), shard(2, Some(1))], true, &rows, &none());
    assert_eq!(late.create, [shard(1, None)]);
    assert!(late.startable.is_empty());
}

#[test]
fn a_parent_is_never_read_again_after_its_child_began() {
    let rows = BTreeMap::from([
        (id(2), row(Some(1), true, false)),
        (id(3), row(Some(1), false, false)),
    ]);
    let again = plan(
        &[shard(1, None), shard(2, Some(1)), shard(3, Some(1))],
        true,
        &rows,
        &none(),
    );
    assert!(again.create.is_empty());
    assert_eq!(again.startable, BTreeSet::from([id(2), id(3)]));
}

#[test]
fn an_unfinished_shard_that_vanishes_is_reported_and_a_finished_one_is_not() {
    let rows = BTreeMap::from([
        (id(1), row(None, true, true)),
        (id(2), row(Some(1), true, false)),
    ]);
    assert_eq!(
        plan(&[], true, &rows, &none()).vanished,
        BTreeSet::from([id(2)])
    );
    assert!(plan(&[], false, &rows, &none()).vanished.is_empty());
}

#[test]
fn no_ancestor_is_read_again_once_a_descendant_began() {
    // Only the grandchild has a row; the listing still knows how it came to be.
    let listing = [shard(1, None), shard(2, Some(1)), shard(3, Some(2))];
    let rows = BTreeMap::from([(id(3), row(Some(2), true, false))]);
    let again = plan(&listing, true, &rows, &none());
    assert!(again.create.is_empty(), "{:?}", again.create);
    // A row made anew all the same is not read, and goes when the service forgets the shard.
    let rows = BTreeMap::from([
        (id(1), row(None, false, false)),
        (id(2), row(Some(1), false, true)),
        (id(3), row(Some(2), true, false)),
    ]);
    assert_eq!(
        plan(&listing, true, &rows, &none()).startable,
        BTreeSet::from([id(3)])
    );
    let later = plan(&listing[2..], true, &rows, &none());
    assert!(later.vanished.is_empty(), "{:?}", later.vanished);
    assert_eq!(
        deletable(&listing[2..], &rows),
        BTreeSet::from([id(1), id(2)])
    );
}

#[test]
fn a_row_is_kept_while_its_shard_is_listed_or_a_child_has_not_begun() {
    let finished = |children: &[usize]| Tracked {
        children: children.iter().copied().map(id).collect(),
        ..row(None, true, true)
    };
    let waiting = BTreeMap::from([
        (id(1), finished(&[2, 3])),
        (id(2), row(Some(1), true, false)),
        (id(3), row(Some(1), false, false)),
    ]);
    let children = [shard(2, Some(1)), shard(3, Some(1))];
    assert!(deletable(&children, &waiting).is_empty());
    let mut begun = waiting.clone();
    begun.insert(id(3), row(Some(1), true, false));
    assert_eq!(deletable(&children, &begun), BTreeSet::from([id(1)]));
    let all = [shard(1, None), shard(2, Some(1)), shard(3, Some(1))];
    assert!(deletable(&all, &begun).is_empty(), "still listed");
    // A child whose row is not there: still listed, it may never have had one; else it was deleted
    // as finished.
    begun.remove(&id(3));
    assert!(deletable(&children, &begun).is_empty());
    assert_eq!(deletable(&children[..1], &begun), BTreeSet::from([id(1)]));
    // The row of a child counts even if its parent does not name it.
    let unnamed = BTreeMap::from([(id(1), finished(&[])), (id(2), row(Some(1), false, false))]);
    assert!(deletable(&[shard(2, Some(1))], &unnamed).is_empty());
}

/// A forest of shards: each has a parent among the earlier ones, or none.
fn forest() -> impl Strategy<Value = Vec<Option<usize>>> {
    prop::collection::vec(any::<prop::sample::Index>(), 1..20).prop_map(|picks| {
        picks
            .iter()
            .enumerate()
            .map(|(n, pick)| match pick.index(n + 1) {
                0 => None,
                p => Some(p - 1),
            })
            .collect()
    })
}

proptest! {
    /// Drives the whole lineage with listings that miss shards at random: in the end every shard
    /// was read, each exactly once and each after its parent.
    #[test]
    fn every_shard_is_read_once_and_after_its_parent(
        forest in forest(),
        misses in prop::collection::vec(any::<bool>(), 0..400),
        picks in prop::collection::vec(any::<prop::sample::Index>(), 1..40),
    ) {
        let mut misses = misses.into_iter();
        let mut picks = picks.into_iter().cycle();
        let mut rows: BTreeMap<ShardId, Tracked> = BTreeMap::new();
        let mut read: Vec<usize> = Vec::new();
        for _ in 0..1000 {
            let listing: Vec<Shard> = forest
                .iter()
                .enumerate()
                .filter(|_| !misses.next().unwrap_or(false))
                .map(|(n, parent)| shard(n, *parent))
                .collect();
            // A listing that misses a shard looks complete: the service does not say so.
            let plan = plan(&listing, true, &rows, &none());
            for new in plan.create {
                rows.insert(new.id, Tracked { parent: new.parent, children: Vec::new(), started: false, finished: false });
            }
            let startable: Vec<ShardId> = plan.startable.into_iter().collect();
            if startable.is_empty() {
                if rows.len() == forest.len() && rows.values().all(|row| row.finished) {
                    break;
                }
                continue;
            }
            let chosen = picks.next().unwrap().get(&startable).clone();
            let n = (0..forest.len()).find(|n| id(*n) == chosen).unwrap();
            prop_assert!(!read.contains(&n), "read twice");
            if let Some(parent) = forest[n] {
                prop_assert!(read.contains(&parent), "child before its parent");
            }
            read.push(n);
            let row = rows.get_mut(&chosen).unwrap();
            row.started = true;
            row.finished = true;
        }
        prop_assert_eq!(read.len(), forest.len(), "a shard was skipped");
    }
}
