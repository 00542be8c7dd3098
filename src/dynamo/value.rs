//! Attribute values: their size, and when they are the same.

use std::cmp::Ordering;
use std::collections::HashMap;

use aws_sdk_dynamodb::types::AttributeValue;

/// An item as DynamoDB's client takes it.
pub type Item = HashMap<String, AttributeValue>;

/// A value of a type that this version's SDK does not know. It is poison: writing it would lose
/// what it holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the record holds an attribute of a type this version does not know")]
pub struct UnknownType;

/// Size of an item in bytes as DynamoDB counts it: names and values, three bytes for each list
/// or map and one for each of their elements.
/// Source: the developer guide, "DynamoDB item sizes and formats".
pub fn item_bytes(item: &Item) -> usize {
    item.iter()
        .map(|(name, value)| name.len() + value_bytes(value))
        .sum()
}

fn value_bytes(value: &AttributeValue) -> usize {
    match value {
        AttributeValue::S(text) => text.len(),
        AttributeValue::N(number) => number_bytes(number),
        AttributeValue::B(bytes) => bytes.as_ref().len(),
        AttributeValue::Ss(set) => set.iter().map(String::len).sum(),
        AttributeValue::Ns(set) => set.iter().map(|number| number_bytes(number)).sum(),
        AttributeValue::Bs(set) => set.iter().map(|bytes| bytes.as_ref().len()).sum(),
        AttributeValue::L(list) => {
            3 + list
                .iter()
                .map(|value| 1 + value_bytes(value))
                .sum::<usize>()
        }
        AttributeValue::M(map) => 3 + map.len() + item_bytes(map),
        _ => 1,
    }
}

/// About one byte for two digits and one more, as the guide says.
pub(super) fn number_bytes(number: &str) -> usize {
    let digits = number.bytes().filter(u8::is_ascii_digit).count();
    digits.div_ceil(2) + 1 + usize::from(number.starts_with('-'))
}

/// A number in one spelling: equal numbers give equal text. `1`, `1.0`, `+1` and `10e-1` are all
/// the same key to DynamoDB. Text that is no number comes back unchanged.
pub fn canonical_number(text: &str) -> String {
    let (negative, rest) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let (mantissa, exponent) = match rest.find(['e', 'E']) {
        Some(at) => match rest[at + 1..].parse::<i64>() {
            Ok(exponent) => (&rest[..at], exponent),
            Err(_) => return text.to_owned(),
        },
        None => (rest, 0),
    };
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits = format!("{whole}{fraction}");
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return text.to_owned();
    }
    // The value is 0.<digits> · 10^point.
    let leading = digits.len() - digits.trim_start_matches('0').len();
    let significant = digits.trim_matches('0');
    if significant.is_empty() {
        return "0".to_owned();
    }
    let point = whole.len() as i64 - leading as i64 + exponent;
    format!("{}0.{significant}e{point}", if negative { "-" } else { "" })
}

/// Which of two numbers is greater, as DynamoDB compares them. `None` where one of them is none.
pub fn compare_numbers(one: &str, other: &str) -> Option<Ordering> {
    Some(magnitude(one)?.cmp(&magnitude(other)?))
}

/// What orders numbers: the sign, then the place of the first digit, then the digits; turned round below
/// zero.
fn magnitude(text: &str) -> Option<(i8, i64, Vec<u8>)> {
    let canonical = canonical_number(text);
    if canonical == "0" {
        return Some((0, 0, Vec::new()));
    }
    let (sign, rest) = match canonical.strip_prefix('-') {
        Some(rest) => (-1, rest),
        None => (1, canonical.as_str()),
    };
    let (digits, point) = rest.strip_prefix("0.")?.split_once('e')?;
    let point: i64 = point.parse().ok()?;
    let digits = digits.bytes();
    Some(match sign {
        // A shorter one is nearer to zero: its end counts as more than any digit.
        -1 => (
            sign,
            -point,
            digits.map(|digit| !digit).chain([u8::MAX]).collect(),
        ),
        _ => (sign, point, digits.collect()),
    })
}

/// Whether two items are the same to DynamoDB: numbers by value, sets in any order.
pub fn same_item(a: &Item, b: &Item) -> bool {
    a.len() == b.len()
        && a.iter()
            .all(|(name, value)| b.get(name).is_some_and(|other| same_value(value, other)))
}

fn same_value(a: &AttributeValue, b: &AttributeValue) -> bool {
    use AttributeValue::{B, Bs, L, M, N, Ns, Ss};
    fn sorted<T: Ord>(set: impl Iterator<Item = T>) -> Vec<T> {
        let mut set: Vec<T> = set.collect();
        set.sort_unstable();
        set
    }
    match (a, b) {
        (N(a), N(b)) => a == b || canonical_number(a) == canonical_number(b),
        (Ns(a), Ns(b)) => {
            sorted(a.iter().map(|n| canonical_number(n)))
                == sorted(b.iter().map(|n| canonical_number(n)))
        }
        (Ss(a), Ss(b)) => sorted(a.iter()) == sorted(b.iter()),
        (Bs(a), Bs(b)) => {
            sorted(a.iter().map(|x| x.as_ref())) == sorted(b.iter().map(|x| x.as_ref()))
        }
        (B(a), B(b)) => a == b,
        (L(a), L(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same_value(a, b)),
        (M(a), M(b)) => same_item(a, b),
        (a, b) => a == b,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Against numbers that a machine can hold.
        #[test]
        fn numbers_compare_by_value(a in -1_000_000i64..1_000_000, b in -1_000_000i64..1_000_000, shift in 0u32..9) {
            let spell = |number: i64| format!("{number}e-{shift}");
            prop_assert_eq!(compare_numbers(&spell(a), &spell(b)), Some(a.cmp(&b)));
            let spell = |number: i64| (number as f64 / 1024.0).to_string();
            prop_assert_eq!(compare_numbers(&spell(a), &spell(b)), Some(a.cmp(&b)));
        }
    }

    #[test]
    fn what_is_no_number_compares_with_nothing() {
        assert_eq!(compare_numbers("1", "x"), None);
        assert_eq!(compare_numbers("0.0", "-0"), Some(Ordering::Equal));
        assert_eq!(compare_numbers("9e125", "1e-130"), Some(Ordering::Greater));
        assert_eq!(compare_numbers("-12", "-123"), Some(Ordering::Greater));
        assert_eq!(compare_numbers("-1.2", "-1.23"), Some(Ordering::Greater));
    }

    #[test]
    fn items_are_the_same_whatever_the_spelling_of_numbers_and_the_order_of_sets() {
        let item = |number: &str, set: [&str; 2]| {
            let inner = Item::from([("n".to_owned(), AttributeValue::N(number.to_owned()))]);
            Item::from([
                (
                    "l".to_owned(),
                    AttributeValue::L(vec![AttributeValue::M(inner)]),
                ),
                (
                    "s".to_owned(),
                    AttributeValue::Ss(set.map(str::to_owned).to_vec()),
                ),
            ])
        };
        assert!(same_item(&item("1.0", ["a", "b"]), &item("1", ["b", "a"])));
        assert!(!same_item(&item("1.1", ["a", "b"]), &item("1", ["b", "a"])));
        assert!(!same_item(&item("1", ["a", "c"]), &item("1", ["b", "a"])));
        assert!(!same_item(&item("1", ["a", "c"]), &Item::new()));
    }

    #[test]
    fn equal_numbers_have_one_spelling() {
        for (left, right) in [
            ("1", "1.0"),
            ("1", "+1"),
            ("1", "10e-1"),
            ("100", "1E2"),
            ("0.05", "5e-2"),
            ("-0", "0.000"),
            ("00120.500", "120.5"),
        ] {
            assert_eq!(
                canonical_number(left),
                canonical_number(right),
                "{left} {right}"
            );
        }
        for (left, right) in [("1", "-1"), ("1", "10"), ("0.1", "0.01"), ("12", "1.2")] {
            assert_ne!(
                canonical_number(left),
                canonical_number(right),
                "{left} {right}"
            );
        }
    }

    proptest! {
        #[test]
        fn shifting_the_point_changes_nothing(n in -1_000_000i64..1_000_000, shift in 0usize..6) {
            let moved = format!("{n}{}e-{shift}", "0".repeat(shift));
            prop_assert_eq!(canonical_number(&n.to_string()), canonical_number(&moved));
        }

        #[test]
        fn different_integers_stay_different(a in any::<i64>(), b in any::<i64>()) {
            prop_assert_eq!(
                a == b,
                canonical_number(&a.to_string()) == canonical_number(&b.to_string())
            );
        }
    }
}
