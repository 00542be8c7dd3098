//! How far a segment is settled: the pages in hand, and what was found before them. Pure.
//!
//! A page is *open* while an item of it waits for its partner, or is a suspect that is not judged, or
//! is to be repaired. The marks stand before the first open page of each side. Who goes on from there
//! meets again what stands behind them, and a key that was read in two pages may stand behind one
//! mark only: it is remembered, so that it is not counted twice.

use std::collections::{HashMap, HashSet, VecDeque};

use super::join::{Side, index};
use super::report::Counts;
use crate::dynamo::digest::Digest;

/// Keys remembered as counted; with more, the marks wait.
pub(super) const COUNTED_MAX: usize = 10_000;

/// A page of one side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Origin {
    /// The side.
    pub side: Side,
    /// Its number there.
    pub page: u64,
}

/// Where a side is read on.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Position<P> {
    /// At its beginning.
    #[default]
    Start,
    /// After this.
    After(P),
    /// It was read to its end.
    End,
}

/// What may be stored: everything before both positions is settled and counted.
#[derive(Debug, Clone, PartialEq)]
pub struct Cut<P> {
    /// Where each side is read on.
    pub positions: [Position<P>; 2],
    /// What was found before.
    pub counts: Counts,
    /// Keys that are counted and may be met again.
    pub counted: HashSet<Digest>,
}

struct Page<P> {
    /// Where it begins.
    from: Position<P>,
    open: usize,
    counts: Counts,
}

struct Pages<P> {
    /// Number of the first one in `open`.
    first: u64,
    pages: VecDeque<Page<P>>,
    next: Position<P>,
}

/// A key that was judged.
struct Judged {
    id: Digest,
    origins: Vec<Origin>,
    counts: Counts,
}

/// The ledger of one segment.
pub struct Ledger<P> {
    sides: [Pages<P>; 2],
    /// Judged, with a page that is not settled.
    judged: Vec<Judged>,
    /// Before the marks.
    counts: Counts,
    /// Counted before, by whoever was here before.
    known: HashSet<Digest>,
    /// Counted before the marks, and behind one of them: the page.
    behind: HashMap<Digest, Origin>,
    /// All that are in `judged` or `behind`.
    met: HashSet<Digest>,
}

/// A page that was not read yet, or nobody knows which.
const SOME_PAGE: u64 = u64::MAX;

impl<P: Clone> Ledger<P> {
    /// Goes on from `cut`.
    pub fn resume(cut: Cut<P>) -> Self {
        let pages = |next| Pages {
            first: 0,
            pages: VecDeque::new(),
            next,
        };
        let [source, target] = cut.positions;
        Self {
            sides: [pages(source), pages(target)],
            judged: Vec::new(),
            counts: cut.counts,
            known: cut.counted,
            behind: HashMap::new(),
            met: HashSet::new(),
        }
    }

    /// Where the next page of `side` is read.
    pub fn next(&self, side: Side) -> &Position<P> {
        &self.pages(side).next
    }

    /// A page was read, with so many items; the next one is at `next`. Each of its items is open.
    pub fn page(&mut self, side: Side, items: usize, counts: Counts, next: Position<P>) -> Origin {
        let pages = &mut self.sides[index(side)];
        let page = pages.first + pages.pages.len() as u64;
        let from = std::mem::replace(&mut pages.next, next);
        pages.pages.push_back(Page {
            from,
            open: items,
            counts,
        });
        Origin { side, page }
    }

    /// An item equals its partner: neither holds its page any more.
    pub fn settle(&mut self, origins: &[Origin]) {
        for origin in origins {
            if let Some(page) = self.page_mut(*origin) {
                page.open = page.open.saturating_sub(1);
            }
        }
    }

    /// Whether a key was counted, by whoever was here before or by this one.
    pub fn is_known(&self, id: Digest) -> bool {
        self.known.contains(&id) || self.met.contains(&id)
    }

    /// A suspect was judged: `counts` say what it is. Its pages stay open until it is settled.
    pub fn note(&mut self, id: Digest, origins: &[Origin], counts: Counts) {
        if counts == Counts::default() || self.is_known(id) {
            return;
        }
        let mut origins = origins.to_vec();
        // One that was looked up is met on the other side, too.
        let sides: HashSet<Side> = origins.iter().map(|origin| origin.side).collect();
        let is_on_both = counts.changed + counts.unsettled > 0;
        // One that stands on one side passes with its page, and needs no place of its own.
        if let (false, [origin]) = (is_on_both, &origins[..])
            && let Some(page) = self.page_mut(*origin)
        {
            page.counts += &counts;
            return;
        }
        if let (true, 1, Some(side)) = (is_on_both, sides.len(), sides.iter().next()) {
            origins.push(Origin {
                side: side.other(),
                page: SOME_PAGE,
            });
        }
        self.met.insert(id);
        self.judged.push(Judged {
            id,
            origins,
            counts,
        });
    }

    /// Counts what belongs to no page.
    pub fn add(&mut self, counts: &Counts) {
        self.counts += counts;
    }

    /// Nothing is left to do in any page that was read.
    pub fn finish(&mut self) {
        let pages = self.sides.iter_mut().flat_map(|side| &mut side.pages);
        pages.for_each(|page| page.open = 0);
    }

    /// Moves the marks as far as they go, and says where they are.
    pub fn cut(&mut self) -> Cut<P> {
        let ends = [self.end(Side::Source), self.end(Side::Target)];
        let is_behind = |origin: &Origin| origin.page >= ends[index(origin.side)];
        let mut behind: HashMap<Digest, Origin> = HashMap::new();
        for (id, origin) in &self.behind {
            if is_behind(origin) {
                behind.insert(*id, *origin);
            }
        }
        let first = [self.sides[0].first, self.sides[1].first];
        for judged in &self.judged {
            let passed = |origin: &&Origin| !is_behind(origin);
            let left = judged.origins.iter().find(|origin| is_behind(origin));
            if let (Some(_), Some(left)) = (judged.origins.iter().find(passed), left) {
                behind.insert(judged.id, *left);
            }
        }
        if self.is_over(ends) {
            self.advance(ends);
            self.behind.clear();
        } else if self.known.len() + behind.len() <= COUNTED_MAX && ends != first {
            self.advance(ends);
            self.met = self.judged.iter().map(|judged| judged.id).collect();
            self.met.extend(behind.keys());
            self.behind = behind;
        }
        self.as_cut()
    }

    /// Whether both sides were read to their ends and nothing is open: nothing will be met again.
    fn is_over(&self, ends: [u64; 2]) -> bool {
        let closed = |(side, end): (&Pages<P>, u64)| {
            let ended = matches!(side.next, Position::End);
            ended && end == side.first + side.pages.len() as u64
        };
        self.sides.iter().zip(ends).all(closed)
    }

    /// The number of the first page of `side` that is open.
    fn end(&self, side: Side) -> u64 {
        let pages = self.pages(side);
        let closed = pages.pages.iter().take_while(|page| page.open == 0).count();
        pages.first + closed as u64
    }

    fn advance(&mut self, ends: [u64; 2]) {
        for (pages, end) in self.sides.iter_mut().zip(ends) {
            while pages.first < end
                && let Some(page) = pages.pages.pop_front()
            {
                self.counts += &page.counts;
                pages.first += 1;
            }
        }
        let counts = &mut self.counts;
        self.judged.retain(|judged| {
            let passed = |origin: &Origin| origin.page < ends[index(origin.side)];
            let is_passed = judged.origins.iter().any(passed);
            if is_passed {
                *counts += &judged.counts;
            }
            !is_passed
        });
    }

    fn as_cut(&self) -> Cut<P> {
        let at = |pages: &Pages<P>| match pages.pages.front() {
            Some(page) => page.from.clone(),
            None => pages.next.clone(),
        };
        let behind = self.behind.keys().copied();
        Cut {
            positions: [at(&self.sides[0]), at(&self.sides[1])],
            counts: self.counts.clone(),
            counted: behind.chain(self.known.iter().copied()).collect(),
        }
    }

    /// Everything found so far, settled or not.
    pub fn total(&self) -> Counts {
        let pages = self.sides.iter().flat_map(|side| &side.pages);
        let open = pages.map(|page| &page.counts);
        let judged = self.judged.iter().map(|judged| &judged.counts);
        open.chain(judged)
            .fold(self.counts.clone(), |sum, one| sum + one)
    }

    fn pages(&self, side: Side) -> &Pages<P> {
        &self.sides[index(side)]
    }

    fn page_mut(&mut self, origin: Origin) -> Option<&mut Page<P>> {
        let pages = &mut self.sides[index(origin.side)];
        let place = origin.page.checked_sub(pages.first)?;
        pages.pages.get_mut(usize::try_from(place).ok()?)
    }
}

#[cfg(test)]
#[path = "ledger_tests.rs"]
mod tests;
