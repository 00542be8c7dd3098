//! The ledger: which keys the active region has written since the fence. Pure.
//!
//! ```text
//!   records of the active region's own stream ─▶ digests of keys ─▶ pages, stored one after another
//!                                                                    and then how far the stream was read
//! ```
//!
//! It is kept while the old region is away, which may be longer than a stream remembers. How far the stream was
//! read is stored only once every key up to there is in a page, so that who goes on with it after a kill may read
//! again what is in it already, and skips nothing. Once it has a hole (a stream that was trimmed before it was
//! read, more keys than it may hold) it is not whole any more, for good: then a key that it lacks is *unknown*.

use std::collections::HashSet;

use super::judge::Since;
use crate::dynamo::digest::Digest;

/// Digests in one page: an item has at most 400 KB.
pub const PAGE_KEYS_MAX: usize = 20_000;

/// A part of the ledger, as it is stored.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Page {
    /// Its place; they follow each other from 0.
    pub number: u64,
    /// Keys that no earlier page has.
    pub keys: Vec<Digest>,
}

/// The keys that were written since the fence, as far as is known.
#[derive(Debug, Clone)]
pub struct Ledger {
    keys: HashSet<Digest>,
    /// Those that no page has yet.
    pending: Vec<Digest>,
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
            whole: true,
            pages: 0,
            keys_max,
        }
    }

    /// The ledger that `pages` hold, of which there should be so many. One that lacks a page is not whole.
    pub fn of(mut pages: Vec<Page>, many: u64, keys_max: usize) -> Self {
        let mut ledger = Self::new(keys_max);
        pages.sort_by_key(|page| page.number);
        for page in pages {
            ledger.whole &= page.number == ledger.pages;
            ledger.pages = page.number + 1;
            ledger.keys.extend(page.keys.iter().copied());
        }
        ledger.whole &= ledger.pages >= many && ledger.keys.len() <= keys_max;
        ledger
    }

    /// A record wrote the key.
    pub fn note(&mut self, key: Digest) {
        if self.keys.len() >= self.keys_max && !self.keys.contains(&key) {
            self.whole = false;
        } else if self.keys.insert(key) {
            self.pending.push(key);
        }
    }

    /// Records since the fence were gone before they were read, or could not be read.
    pub fn lost(&mut self) {
        self.whole = false;
    }

    /// Whether everything since the fence is in it, as far as it was read.
    pub fn is_whole(&self) -> bool {
        self.whole
    }

    /// How many keys it holds.
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// How many pages there are.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The page that is to be stored next. While there is one, nothing may be said of how far the stream was
    /// read: what is not stored is read again.
    pub fn next_page(&self) -> Option<Page> {
        let keys: Vec<Digest> = self.pending.iter().copied().take(PAGE_KEYS_MAX).collect();
        (!keys.is_empty()).then_some(Page {
            number: self.pages,
            keys,
        })
    }

    /// `page` is stored.
    pub fn stored(&mut self, page: &Page) {
        self.pages = page.number + 1;
        self.pending
            .drain(..page.keys.len().min(self.pending.len()));
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

    #[test]
    fn a_key_that_a_ledger_with_a_hole_lacks_is_unknown() {
        let mut ledger = Ledger::new(10);
        ledger.note(key(1));
        assert_eq!(ledger.since(key(1)), Since::Changed);
        assert_eq!(ledger.since(key(2)), Since::Untouched);
        ledger.lost();
        assert_eq!(ledger.since(key(1)), Since::Changed);
        assert_eq!(ledger.since(key(2)), Since::Unknown);
        let page = ledger.next_page().unwrap();
        ledger.stored(&page);
        assert_eq!(ledger.next_page(), None);
        // Pages that do not follow each other, or of which one is gone.
        let second = Page { number: 1, ..page };
        assert!(!Ledger::of(vec![second.clone()], 1, 10).is_whole());
        let first = Page::default();
        assert!(Ledger::of(vec![second.clone(), first.clone()], 2, 10).is_whole());
        assert!(!Ledger::of(vec![first, second], 3, 10).is_whole());
    }

    #[test]
    fn more_keys_than_it_may_hold_are_a_hole() {
        let mut ledger = Ledger::new(1);
        ledger.note(key(1));
        ledger.note(key(1));
        assert!(ledger.is_whole());
        ledger.note(key(2));
        assert_eq!(ledger.since(key(2)), Since::Unknown);
    }

    #[test]
    fn many_keys_are_stored_in_several_pages() {
        let mut ledger = Ledger::new(usize::MAX);
        for number in 0..PAGE_KEYS_MAX as u64 + 5 {
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&number.to_be_bytes());
            ledger.note(Digest::from_bytes(bytes));
        }
        let first = ledger.next_page().unwrap();
        assert_eq!(first.keys.len(), PAGE_KEYS_MAX);
        ledger.stored(&first);
        let second = ledger.next_page().unwrap();
        assert_eq!((second.number, second.keys.len()), (1, 5));
        ledger.stored(&second);
        assert_eq!(ledger.next_page(), None);
        let again = Ledger::of(vec![second, first], 2, usize::MAX);
        assert!(again.is_whole() && again.len() == PAGE_KEYS_MAX + 5);
    }

    proptest! {
        /// However often it is killed, whatever was stored by then: no key that was written is taken for one
        /// that was not, and a whole one knows all of those that were read.
        #[test]
        fn no_written_key_is_taken_for_untouched(
            stream in proptest::collection::vec(0..12_u8, 1..40),
            acts in proptest::collection::vec(0..6_u8, 1..60),
        ) {
            let mut pages: Vec<Page> = Vec::new();
            let mut row = (0_usize, 0_u64);
            let mut ledger = Ledger::new(100);
            let mut read = 0;
            let mut acts = acts.into_iter().chain(std::iter::repeat_n(0, 200));
            while row.0 < stream.len() {
                match acts.next() {
                    // Killed: the next one goes on with what was stored.
                    Some(4) => {
                        ledger = Ledger::of(pages.clone(), row.1, 100);
                        read = row.0;
                    }
                    Some(3) => {
                        if let Some(page) = ledger.next_page() {
                            pages.push(page.clone());
                            ledger.stored(&page);
                        }
                    }
                    Some(5) if ledger.next_page().is_none() => row = (read, ledger.pages()),
                    _ => match stream.get(read) {
                        Some(number) => {
                            ledger.note(key(*number));
                            read += 1;
                        }
                        None => match ledger.next_page() {
                            Some(page) => {
                                pages.push(page.clone());
                                ledger.stored(&page);
                            }
                            None => row = (read, ledger.pages()),
                        },
                    },
                }
            }
            let again = Ledger::of(pages, row.1, 100);
            prop_assert!(again.is_whole());
            for number in 0..12_u8 {
                let told = match stream.contains(&number) {
                    true => Since::Changed,
                    false => Since::Untouched,
                };
                prop_assert_eq!(again.since(key(number)), told);
            }
        }
    }
}
