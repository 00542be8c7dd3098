//! The ledger: which keys the active region has written since the fence. Pure.
//!
//! ```text
//!   records of the active region's own stream ─▶ digests of keys ─▶ pages, stored one after another
//!                                                                   each with how far the stream was read
//! ```
//!
//! It is kept while the old region is away, which may be longer than a stream remembers. A page says how far
//! the stream was read when it was stored, so that who goes on with it after a kill reads nothing twice that
//! is not in it, and skips nothing. Once it has a hole (a stream that was trimmed before it was read, more keys
//! than it may hold) it is not whole any more, for good: then a key that it lacks is *unknown*.

use std::collections::{BTreeMap, HashSet};

use super::judge::Since;
use crate::dynamo::digest::Digest;
use crate::stream::sequence::SequenceNumber;

/// Digests in one page: a row has at most 400 KB.
pub const PAGE_KEYS_MAX: usize = 20_000;

/// A part of the ledger, as it is stored.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Page {
    /// Its place; they follow each other from 0.
    pub number: u64,
    /// Keys that no earlier page has.
    pub keys: Vec<Digest>,
    /// Up to where each shard was read when it was stored; those that were read to their ends have `None`.
    pub read: BTreeMap<String, Option<SequenceNumber>>,
    /// Whether everything since the fence is in the pages up to this one.
    pub whole: bool,
}

/// The keys that were written since the fence, as far as is known.
#[derive(Debug, Clone)]
pub struct Ledger {
    keys: HashSet<Digest>,
    /// Those that no page has yet.
    pending: Vec<Digest>,
    read: BTreeMap<String, Option<SequenceNumber>>,
    /// The same, as the last page says it.
    stored: BTreeMap<String, Option<SequenceNumber>>,
    /// Something was read since the last page.
    moved: bool,
    whole: bool,
    pages: u64,
    keys_max: usize,
}

impl Ledger {
    /// One that begins with the fence, and holds at most `keys_max` keys.
    pub fn new(keys_max: usize) -> Self {
        Self {
            keys: HashSet::new(),
            pending: Vec::new(),
            read: BTreeMap::new(),
            stored: BTreeMap::new(),
            moved: false,
            whole: true,
            pages: 0,
            keys_max,
        }
    }

    /// The ledger that `pages` hold, in their order. One that lacks a page in between is not whole.
    pub fn of(pages: &[Page], keys_max: usize) -> Self {
        let mut ledger = Self::new(keys_max);
        for page in pages {
            ledger.whole &= page.whole && page.number == ledger.pages;
            ledger.pages = page.number + 1;
            ledger.keys.extend(page.keys.iter().copied());
            ledger.read.clone_from(&page.read);
        }
        ledger.stored.clone_from(&ledger.read);
        ledger.whole &= ledger.keys.len() <= keys_max;
        ledger
    }

    /// From where the shard is to be read: after this position. `None`: from the fence. `Some(None)`: it was
    /// read to its end.
    pub fn position(&self, shard: &str) -> Option<Option<&SequenceNumber>> {
        self.read.get(shard).map(Option::as_ref)
    }

    /// A record of `shard` at `sequence` wrote the key.
    pub fn note(&mut self, shard: &str, sequence: &SequenceNumber, key: Digest) {
        if self.keys.len() >= self.keys_max && !self.keys.contains(&key) {
            self.whole = false;
        } else if self.keys.insert(key) {
            self.pending.push(key);
        }
        self.read.insert(shard.to_owned(), Some(sequence.clone()));
        self.moved = true;
    }

    /// `shard` was read to its end.
    pub fn ended(&mut self, shard: &str) {
        self.read.insert(shard.to_owned(), None);
        self.moved = true;
    }

    /// Records since the fence were gone before they were read, or could not be read.
    pub fn lost(&mut self) {
        self.whole = false;
        self.moved = true;
    }

    /// Whether everything since the fence is in it, as far as it was read.
    pub fn is_whole(&self) -> bool {
        self.whole
    }

    /// The page that is to be stored next, where there is anything to store. The position of a record is told only
    /// by a page that holds its key, or that comes after it: what is not stored is read again.
    pub fn next_page(&self) -> Option<Page> {
        if !self.moved && self.pending.is_empty() {
            return None;
        }
        let fits = self.pending.len() <= PAGE_KEYS_MAX;
        Some(Page {
            number: self.pages,
            keys: self.pending.iter().copied().take(PAGE_KEYS_MAX).collect(),
            // With keys left over for the page after it, it must not say that they are stored.
            read: match fits {
                true => self.read.clone(),
                false => self.stored.clone(),
            },
            whole: self.whole,
        })
    }

    /// `page` is stored.
    pub fn stored(&mut self, page: &Page) {
        self.pages = page.number + 1;
        self.pending
            .drain(..page.keys.len().min(self.pending.len()));
        self.moved = !self.pending.is_empty();
        self.stored.clone_from(&page.read);
    }

    /// Whether the key was written since the fence.
    pub fn since(&self, key: Digest) -> Since {
        match (self.keys.contains(&key), self.whole) {
            (true, _) => Since::Changed,
            (false, true) => Since::Untouched,
            (false, false) => Since::Unknown,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key(number: u8) -> Digest {
        Digest::from_bytes([number; 16])
    }

    fn sequence(number: u64) -> SequenceNumber {
        SequenceNumber::parse(&number.to_string()).unwrap()
    }

    #[test]
    fn a_key_that_a_ledger_with_a_hole_lacks_is_unknown() {
        let mut ledger = Ledger::new(10);
        ledger.note("s", &sequence(1), key(1));
        assert_eq!(ledger.since(key(1)), Since::Changed);
        assert_eq!(ledger.since(key(2)), Since::Untouched);
        ledger.lost();
        assert_eq!(ledger.since(key(1)), Since::Changed);
        assert_eq!(ledger.since(key(2)), Since::Unknown);
        let page = ledger.next_page().unwrap();
        ledger.stored(&page);
        assert!(!Ledger::of(&[page.clone()], 10).is_whole(), "it stays so");
        assert_eq!(ledger.next_page(), None);
        // Pages that do not follow each other.
        let second = Page {
            number: 1,
            whole: true,
            ..page
        };
        assert!(!Ledger::of(&[second], 10).is_whole());
    }

    #[test]
    fn more_keys_than_it_may_hold_are_a_hole() {
        let mut ledger = Ledger::new(1);
        ledger.note("s", &sequence(1), key(1));
        ledger.note("s", &sequence(2), key(1));
        assert!(ledger.is_whole());
        ledger.note("s", &sequence(3), key(2));
        assert_eq!(ledger.since(key(2)), Since::Unknown);
    }

    #[test]
    fn a_page_that_does_not_hold_all_keys_says_nothing_of_their_positions() {
        let mut ledger = Ledger::new(usize::MAX);
        for number in 0..PAGE_KEYS_MAX as u64 + 5 {
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&number.to_be_bytes());
            ledger.note("s", &sequence(number + 1), Digest::from_bytes(bytes));
        }
        let first = ledger.next_page().unwrap();
        assert_eq!((first.keys.len(), first.read.len()), (PAGE_KEYS_MAX, 0));
        ledger.stored(&first);
        let second = ledger.next_page().unwrap();
        assert_eq!((second.keys.len(), second.read.len()), (5, 1));
        ledger.stored(&second);
        assert_eq!(ledger.next_page(), None);
        assert!(Ledger::of(&[first, second], usize::MAX).is_whole());
    }

    proptest! {
        /// However often it is killed, whatever was stored by then: no key that was written is taken for one
        /// that was not, and a whole one knows all of those that were read.
        #[test]
        fn no_written_key_is_taken_for_untouched(
            writes in proptest::collection::vec((0..2_usize, 0..12_u8), 1..40),
            acts in proptest::collection::vec(0..5_u8, 1..60),
        ) {
            let shards = ["s0", "s1"];
            let mut streams: [Vec<u8>; 2] = Default::default();
            for (shard, number) in &writes {
                streams[*shard].push(*number);
            }
            let mut pages: Vec<Page> = Vec::new();
            let mut ledger = Ledger::new(100);
            let mut read = [0_usize; 2];
            let mut acts = acts.into_iter().chain(std::iter::repeat_n(0, 200));
            while read[0] < streams[0].len() || read[1] < streams[1].len() || ledger.next_page().is_some() {
                match acts.next() {
                    // Killed: the next one goes on with what was stored.
                    Some(4) => {
                        ledger = Ledger::of(&pages, 100);
                        for (place, shard) in shards.iter().enumerate() {
                            read[place] = match ledger.position(shard) {
                                Some(Some(at)) => at.as_str().parse().unwrap(),
                                Some(None) => streams[place].len(),
                                None => 0,
                            };
                        }
                    }
                    Some(3) => {
                        if let Some(page) = ledger.next_page() {
                            pages.push(page.clone());
                            ledger.stored(&page);
                        }
                    }
                    _ => {
                        let place = usize::from(read[0] >= streams[0].len());
                        match streams[place].get(read[place]) {
                            Some(number) => {
                                read[place] += 1;
                                let at = sequence(read[place] as u64);
                                ledger.note(shards[place], &at, key(*number));
                            }
                            None => {
                                if let Some(page) = ledger.next_page() {
                                    pages.push(page.clone());
                                    ledger.stored(&page);
                                }
                            }
                        }
                    }
                }
            }
            prop_assert!(ledger.is_whole());
            let again = Ledger::of(&pages, 100);
            for number in 0..12_u8 {
                let was_written = streams.iter().flatten().any(|one| *one == number);
                let told = match was_written {
                    true => Since::Changed,
                    false => Since::Untouched,
                };
                prop_assert_eq!(ledger.since(key(number)), told);
                prop_assert_eq!(again.since(key(number)), told);
            }
        }
    }
}
