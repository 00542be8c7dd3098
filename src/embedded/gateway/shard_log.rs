//! The records of one shard, oldest first, with the positions iterators point at.

use std::cmp::Ordering;
use std::collections::VecDeque;

use super::sequence;

/// One record as it is served.
#[derive(Debug)]
pub(crate) struct Stored {
    pub(crate) sequence: Box<str>,
    /// When the write was made, microseconds since 1970.
    pub(crate) created_us: i64,
    /// The JSON of the record.
    pub(crate) json: Box<[u8]>,
}

/// A position lies before the oldest record that is kept.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the position was trimmed")]
pub(crate) struct Trimmed;

/// A log that loses its oldest records. Positions count every record the shard ever had, so they
/// stay true while the front is trimmed.
#[derive(Debug, Default)]
pub(crate) struct ShardLog {
    records: VecDeque<Stored>,
    trimmed: u64,
    last_trimmed: Option<Box<str>>,
}

/// What one GetRecords answers.
#[derive(Debug)]
pub(crate) struct Page<'a> {
    pub(crate) records: Vec<&'a Stored>,
    /// The position after the page.
    pub(crate) next: u64,
}

impl ShardLog {
    pub(crate) fn append(&mut self, record: Stored) {
        self.records.push_back(record);
    }

    /// The position of the oldest record kept.
    pub(crate) fn oldest(&self) -> u64 {
        self.trimmed
    }

    /// The position after the newest record.
    pub(crate) fn end(&self) -> u64 {
        self.trimmed + self.records.len() as u64
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    pub(crate) fn newest(&self) -> Option<&Stored> {
        self.records.back()
    }

    pub(crate) fn records(&self) -> impl Iterator<Item = &Stored> {
        self.records.iter()
    }

    /// Forgets the records created before `before_us`.
    pub(crate) fn trim(&mut self, before_us: i64) {
        while let Some(oldest) = self.records.front()
            && oldest.created_us < before_us
        {
            self.trimmed += 1;
            self.last_trimmed = self.records.pop_front().map(|r| r.sequence);
        }
    }

    /// The first position at or `after` a sequence number, which need not be that of a record
    /// but must not lie at or before the trim point.
    pub(crate) fn position(&self, number: &str, after: bool) -> Result<u64, Trimmed> {
        if let Some(trimmed) = &self.last_trimmed
            && sequence::compare(number, trimmed) != Ordering::Greater
        {
            return Err(Trimmed);
        }
        let before = |record: &Stored| match sequence::compare(&record.sequence, number) {
            Ordering::Less => true,
            Ordering::Equal => after,
            Ordering::Greater => false,
        };
        Ok(self.trimmed + self.records.partition_point(before) as u64)
    }

    /// The position of the first record created at `at_us` or later.
    pub(crate) fn position_at_time(&self, at_us: i64) -> u64 {
        // Records arrive in the order of their writes, so their times do not fall.
        self.trimmed + self.records.partition_point(|r| r.created_us < at_us) as u64
    }

    /// Up to `limit` records from `position` on, as long as their JSON fits in `bytes_max`; one
    /// record at least if there is any. [`Trimmed`] if there were some before `position` that are gone.
    pub(crate) fn page(
        &self,
        position: u64,
        limit: usize,
        bytes_max: usize,
    ) -> Result<Page<'_>, Trimmed> {
        let Some(skip) = position.checked_sub(self.trimmed) else {
            return Err(Trimmed);
        };
        let skip = usize::try_from(skip)
            .unwrap_or(usize::MAX)
            .min(self.records.len());
        let mut bytes = 0;
        let mut records = Vec::new();
        for record in self.records.range(skip..).take(limit) {
            bytes += record.json.len();
            if bytes > bytes_max && !records.is_empty() {
                break;
            }
            records.push(record);
        }
        let next = position + records.len() as u64;
        Ok(Page { records, next })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn log(sizes: &[usize]) -> ShardLog {
        let mut log = ShardLog::default();
        for (n, size) in sizes.iter().enumerate() {
            log.append(Stored {
                sequence: format!("{:021}", 1_000 + 10 * n).into(),
                created_us: n as i64,
                json: vec![b'x'; *size].into(),
            });
        }
        log
    }

    proptest! {
        #[test]
        fn pages_give_every_record_once_within_their_bounds(
            sizes in proptest::collection::vec(1usize..400, 0..300),
            limit in 1usize..50,
            bytes_max in 100usize..2_000,
        ) {
            let log = log(&sizes);
            let (mut position, mut seen) = (0, Vec::new());
            while position < log.end() {
                let page = log.page(position, limit, bytes_max).unwrap();
                let bytes: usize = page.records.iter().map(|r| r.json.len()).sum();
                prop_assert!(page.records.len() <= limit && !page.records.is_empty());
                prop_assert!(bytes <= bytes_max || page.records.len() == 1);
                seen.extend(page.records.iter().map(|r| r.created_us));
                position = page.next;
            }
            prop_assert_eq!(seen, (0..sizes.len() as i64).collect::<Vec<_>>());
        }

        #[test]
        fn a_position_is_right_wherever_the_log_was_trimmed(
            length in 1usize..50, cut in 0i64..50, at in 0u64..600, after: bool,
        ) {
            let mut log = log(&vec![1; length]);
            log.trim(cut);
            let number = format!("{at:021}");
            let kept = |n: &usize| *n as i64 >= cut;
            let matches = |n: &usize| {
                let of = 1_000 + 10 * *n as u64;
                of > at || (of == at && !after)
            };
            let trimmed = (0..length).filter(|n| !kept(n)).any(|n| 1_000 + 10 * n as u64 >= at);
            let expected = if trimmed {
                Err(Trimmed)
            } else {
                Ok((0..length).filter(kept).find(matches).unwrap_or(length) as u64)
            };
            prop_assert_eq!(log.position(&number, after), expected);
        }
    }

    #[test]
    fn a_caught_up_position_outlives_the_trimming_of_what_it_has_read() {
        let mut log = log(&[1, 1, 1]);
        log.trim(3);
        assert!(log.page(3, 10, 100).unwrap().records.is_empty());
        assert_eq!(log.page(2, 10, 100).unwrap_err(), Trimmed);
    }
}
