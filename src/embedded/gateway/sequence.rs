//! Sequence numbers as DynamoDB Streams has them: strings of 21 to 40 digits that grow over a
//! lineage. Nobody may treat them as 64-bit numbers or compare them as text, so these grow wider
//! while a stream lives and skip ahead by uneven steps.

use std::cmp::Ordering;

use super::hash::mix;

pub(crate) const DIGITS_MIN: usize = 21;
pub(crate) const DIGITS_MAX: usize = 40;

/// Orders two digit strings as integers of any size.
pub(crate) fn compare(left: &str, right: &str) -> Ordering {
    let left = left.trim_start_matches('0');
    let right = right.trim_start_matches('0');
    left.len().cmp(&right.len()).then_with(|| left.cmp(right))
}

/// True for 21 to 40 decimal digits.
pub(crate) fn is_well_formed(number: &str) -> bool {
    (DIGITS_MIN..=DIGITS_MAX).contains(&number.len()) && number.bytes().all(|b| b.is_ascii_digit())
}

/// Hands out the sequence numbers of one stream, each greater than all before.
#[derive(Debug)]
pub(crate) struct Numbering {
    ordinal: u64,
    width: usize,
    state: u64,
}

impl Numbering {
    /// A numbering whose start, width and steps follow from `seed`.
    pub(crate) fn new(seed: u64) -> Self {
        let state = mix(seed);
        Self {
            ordinal: state % 1_000_000_000_000_000,
            width: DIGITS_MIN + (state % 8) as usize,
            state,
        }
    }

    /// The next number.
    pub(crate) fn next(&mut self) -> Box<str> {
        self.state = mix(self.state);
        self.ordinal += 1 + self.state % 997;
        // A leading 1 keeps the width; every u64 fits into the 20 digits or more behind it.
        let digits = self.width - 1;
        format!("1{:0digits$}", self.ordinal).into_boxed_str()
    }

    /// Lets later numbers be wider than all earlier ones, up to 40 digits.
    pub(crate) fn widen(&mut self) {
        self.state = mix(self.state);
        let step = (self.state >> 60) as usize % 3;
        self.width = (self.width + step).min(DIGITS_MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn numbers_have_21_to_40_digits_and_always_grow(
            seed: u64,
            widen in proptest::collection::vec(any::<bool>(), 1..200),
        ) {
            let mut numbering = Numbering::new(seed);
            let mut last: Box<str> = "0".into();
            for widen in widen {
                if widen {
                    numbering.widen();
                }
                let next = numbering.next();
                prop_assert!(is_well_formed(&next), "{next}");
                prop_assert_eq!(compare(&last, &next), Ordering::Less);
                last = next;
            }
        }

        #[test]
        fn comparison_is_that_of_integers(left: u128, right: u128, zeros in 0usize..4) {
            let padded = format!("{}{left}", "0".repeat(zeros));
            prop_assert_eq!(compare(&padded, &right.to_string()), left.cmp(&right));
        }
    }
}
