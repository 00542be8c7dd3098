//! What repairs of doubts need not do again. Pure.
//!
//! Where a worker dies again and again with much still to be applied, each of its successors leaves
//! almost the same range in doubt. Repaired one by one each key would be read, and each that the
//! replica refuses be dead-lettered, once for every death. But a repair of a key that begins when no
//! write of a range can take effect any more says all there is to say of that key for that range,
//! whichever range it was made for. `repair_tests.rs` plays this, too.

use std::collections::HashMap;

use crate::dynamo::digest::Digest;
use crate::dynamo::item::ItemKey;

/// Keys remembered; with more, those are forgotten and repaired once more. Some megabytes.
const KEYS_MAX: usize = 100_000;

/// The keys of one table that this process has repaired, each with when its last repair began, by
/// the replica region's clock in milliseconds.
#[derive(Debug, Default)]
pub struct Covered(HashMap<Digest, i64>);

impl Covered {
    /// The repair of `key` that began at `begun_ms` came to its end: it is as in the source, or its
    /// letter is delivered.
    pub fn note(&mut self, key: &ItemKey, begun_ms: i64) {
        let key = Digest::of_key(key);
        if self.0.len() >= KEYS_MAX && !self.0.contains_key(&key) {
            self.0.clear();
        }
        let begun = self.0.entry(key).or_insert(begun_ms);
        *begun = begun_ms.max(*begun);
    }

    /// Whether `key` needs no repair for a range whose last write is dead at `until_ms`.
    pub fn has(&self, key: &ItemKey, until_ms: i64) -> bool {
        let begun = self.0.get(&Digest::of_key(key));
        begun.is_some_and(|begun| *begun >= until_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repair_covers_the_ranges_that_were_dead_when_it_began() {
        let key = |id: usize| ItemKey::from_bytes(&id.to_be_bytes());
        let mut covered = Covered::default();
        assert!(!covered.has(&key(1), 0));
        covered.note(&key(1), 1_000);
        assert!(covered.has(&key(1), 1_000) && covered.has(&key(1), 999));
        assert!(!covered.has(&key(1), 1_001) && !covered.has(&key(2), 1_000));
        // One that began earlier and took longer takes nothing back.
        covered.note(&key(1), 500);
        assert!(covered.has(&key(1), 1_000));
        for id in 2..KEYS_MAX + 2 {
            covered.note(&key(id), 2_000);
        }
        assert!(covered.0.len() <= KEYS_MAX && covered.has(&key(KEYS_MAX + 1), 2_000));
    }
}
