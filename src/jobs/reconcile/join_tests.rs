//! The join finds exactly what differs, whatever the order and however little it may hold.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::dynamo::item::ItemKey;

impl Key for u16 {
    fn digest(&self) -> Digest {
        Digest::of_key(&ItemKey::from_bytes(&self.to_be_bytes()))
    }

    fn bytes(&self) -> usize {
        2
    }
}

type Table = BTreeMap<u16, u8>;

fn digest(value: u8) -> Option<Digest> {
    // One that nobody can read is equal to nothing.
    (value != 0).then(|| Digest::of_key(&ItemKey::from_bytes(&[value])))
}

/// What a join said of two tables, and what it took.
#[derive(Debug, Default)]
struct Played {
    suspects: BTreeSet<u16>,
    looks: Vec<u16>,
    bytes_max: usize,
}

/// Plays a join over what is read on either side in this order.
fn play(tables: [&Table; 2], reads: impl IntoIterator<Item = (Side, u16)>, bytes: usize) -> Played {
    let mut join = Join::new(bytes);
    let mut played = Played::default();
    let table = |side: Side| tables[usize::from(side == Side::Target)];
    let note = |met: Met<u16>, suspects: &mut BTreeSet<u16>| {
        if let Met::Suspect(key, _) = met {
            suspects.insert(key);
        }
    };
    for (side, key) in reads {
        let met = join.meet(Origin { side, page: 0 }, key, digest(table(side)[&key]));
        note(met, &mut played.suspects);
        while let Some(look) = join.overflow() {
            played.looks.push(look.key);
            let found = table(look.origin.side.other()).get(&look.key).copied();
            let met = join.looked_up(look, found.map(digest));
            note(met, &mut played.suspects);
        }
        played.bytes_max = played.bytes_max.max(join.bytes());
    }
    for side in [Side::Source, Side::Target] {
        played
            .suspects
            .extend(join.end(side).into_iter().map(|(key, _)| key));
    }
    assert_eq!(join.waiting(), 0);
    played
}

fn differences(source: &Table, target: &Table) -> BTreeSet<u16> {
    let keys = source.keys().chain(target.keys());
    let differs = |key: &&u16| match (source.get(key), target.get(key)) {
        (Some(one), Some(other)) => one != other || *one == 0,
        _ => true,
    };
    keys.filter(differs).copied().collect()
}

fn table() -> impl Strategy<Value = Table> {
    prop::collection::btree_map(0u16..60, 0u8..4, 0..60)
}

/// Both sides, each in an order of its own, mixed.
fn reads(source: &Table, target: &Table, seed: u64) -> Vec<(Side, u16)> {
    use rand::SeedableRng;
    use rand::seq::SliceRandom;
    let from = source.keys().map(|key| (Side::Source, *key));
    let to = target.keys().map(|key| (Side::Target, *key));
    let mut reads: Vec<_> = from.chain(to).collect();
    reads.shuffle(&mut rand::rngs::StdRng::seed_from_u64(seed));
    reads
}

proptest! {
    /// Enough room for everything that was looked up: nothing else is suspected.
    #[test]
    fn any_order_gives_exactly_the_differences(
        source in table(), target in table(), seed in any::<u64>(), entries in 31usize..100,
    ) {
        let bytes = entries * (ENTRY_BYTES + 2);
        let played = play([&source, &target], reads(&source, &target, seed), bytes);
        prop_assert_eq!(played.suspects, differences(&source, &target));
    }

    /// However little it may hold: no difference is missed, and no more is held.
    #[test]
    fn memory_is_bounded_and_nothing_is_missed(
        source in table(), target in table(), seed in any::<u64>(), bytes in 0usize..4_000,
    ) {
        let played = play([&source, &target], reads(&source, &target, seed), bytes);
        let differences = differences(&source, &target);
        prop_assert!(played.suspects.is_superset(&differences), "{played:?}");
        prop_assert!(played.bytes_max <= bytes.max(SETTLED_BYTES), "{played:?}");
        prop_assert!(played.looks.len() <= source.len() + target.len());
    }

    /// A page that is read again after an interruption changes nothing.
    #[test]
    fn pages_read_twice_change_nothing(
        source in table(), target in table(), seed in any::<u64>(), again in 0usize..60,
    ) {
        let mut reads = reads(&source, &target, seed);
        let from = again.min(reads.len());
        let repeated: Vec<_> = reads[from..(from + 10).min(reads.len())].to_vec();
        reads.splice(from..from, repeated);
        let played = play([&source, &target], reads, usize::MAX);
        prop_assert!(played.suspects.is_superset(&differences(&source, &target)));
    }
}

/// Two scans alike hold a few pages and look nothing up.
#[test]
fn scans_that_run_alike_need_a_few_pages() {
    let table: Table = (0..20_000)
        .map(|key| (key, 1 + (key % 200) as u8))
        .collect();
    let page = 500;
    let pages = (0..20_000u16).step_by(page).flat_map(|first| {
        let page = move |side| (first..first + 500).map(move |key| (side, key));
        page(Side::Source).chain(page(Side::Target))
    });
    let bytes = 3 * page * (ENTRY_BYTES + 2);
    let played = play([&table, &table], pages, bytes);
    assert_eq!((played.suspects.len(), played.looks.len()), (0, 0));
    assert!(played.bytes_max <= page * (ENTRY_BYTES + 2));
}

/// Scans in opposite order look up what does not fit, and nothing twice.
#[test]
fn scans_in_opposite_order_look_up_what_does_not_fit() {
    let table: Table = (0..10_000).map(|key| (key, 1)).collect();
    let reads = (0..10_000).flat_map(|key| [(Side::Source, key), (Side::Target, 9_999 - key)]);
    let entries = 6_000;
    let played = play([&table, &table], reads, entries * (ENTRY_BYTES + 2));
    assert_eq!(played.suspects.len(), 0);
    // Those that were looked up take some of the room, too.
    let looks = played.looks.len();
    assert!((1..=10_000 - entries / 2).contains(&looks), "{looks}");
    let distinct: BTreeSet<_> = played.looks.into_iter().collect();
    assert_eq!(distinct.len(), looks);
}
