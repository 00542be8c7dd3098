//! Sequence numbers: digit strings of 21 to 40 places, compared as integers of any size.

use std::cmp::Ordering;
use std::fmt;
use std::sync::Arc;

/// A position in a shard. Kept as the service spelled it, compared by value: some servers pad
/// with zeros, and no machine integer is wide enough. Cheap to clone.
#[derive(Clone, Debug)]
pub struct SequenceNumber(Arc<str>);

impl Default for SequenceNumber {
    /// Zero: before every record.
    fn default() -> Self {
        Self("0".into())
    }
}

impl SequenceNumber {
    /// Takes a digit string.
    ///
    /// # Errors
    /// `None` where it is empty or holds anything but digits.
    pub fn parse(text: &str) -> Option<Self> {
        (!text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()))
            .then(|| Self(text.into()))
    }

    /// As the service spelled it.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn significant(&self) -> &str {
        self.0.trim_start_matches('0')
    }
}

impl fmt::Display for SequenceNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Ord for SequenceNumber {
    fn cmp(&self, other: &Self) -> Ordering {
        let (left, right) = (self.significant(), other.significant());
        left.len().cmp(&right.len()).then_with(|| left.cmp(right))
    }
}

impl PartialOrd for SequenceNumber {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for SequenceNumber {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for SequenceNumber {}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn number(text: &str) -> SequenceNumber {
        SequenceNumber::parse(text).unwrap()
    }

    #[test]
    fn numbers_compare_by_value_not_by_text() {
        assert!(number("9") < number("10"));
        assert_eq!(number("007"), number("7"));
        assert!(
            number("4000000000000000000000000000000000000000") > number("18446744073709551616")
        );
        assert!(SequenceNumber::parse("").is_none());
        assert!(SequenceNumber::parse("12a").is_none());
    }

    proptest! {
        #[test]
        fn order_is_that_of_the_integers(a in any::<u128>(), b in any::<u128>(), pad in 0usize..5) {
            let left = number(&format!("{}{a}", "0".repeat(pad)));
            prop_assert_eq!(left.cmp(&number(&b.to_string())), a.cmp(&b));
        }
    }
}
