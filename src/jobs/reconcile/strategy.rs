//! What becomes of a difference. Pure.

use std::fmt;
use std::str::FromStr;

use aws_sdk_dynamodb::types::AttributeValue;

use super::judge::Kind;
use crate::dynamo::value::{Item, compare_numbers};

/// How the target is made.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Strategy {
    /// As the source is: what only the target has is deleted.
    #[default]
    Mirror,
    /// What the target lacks is put there; nothing that it has is touched.
    Fill,
    /// As [`Fill`](Self::Fill), and where both have an item the one whose attribute of this name is the
    /// greater one stays.
    Newest(String),
}

/// What is done about one difference.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deed {
    /// The key is made as the source has it.
    Mirror,
    /// The item is put there, on condition.
    Put,
    /// The item is deleted, once all are counted.
    Delete,
    /// Nothing.
    Leave,
}

impl Strategy {
    /// What is done about a key that differs so. `source` and `target` are its items.
    pub fn deed(&self, kind: Kind, source: Option<&Item>, target: Option<&Item>) -> Deed {
        match (self, kind) {
            (Strategy::Mirror, Kind::Extra) => Deed::Delete,
            (Strategy::Mirror, Kind::Missing | Kind::Changed) => Deed::Mirror,
            (Strategy::Fill | Strategy::Newest(_), Kind::Missing) => Deed::Put,
            (Strategy::Newest(attribute), Kind::Changed) => {
                let of = |item: Option<&Item>| item?.get(attribute).cloned();
                match is_newer(of(source).as_ref(), of(target).as_ref()) {
                    true => Deed::Put,
                    false => Deed::Leave,
                }
            }
            (Strategy::Fill, Kind::Changed)
            | (Strategy::Fill | Strategy::Newest(_), Kind::Extra) => Deed::Leave,
        }
    }
}

/// Whether `one` is greater than `other`: both numbers or both strings, as DynamoDB compares them.
/// Where nobody can say it is not.
pub fn is_newer(one: Option<&AttributeValue>, other: Option<&AttributeValue>) -> bool {
    match (one, other) {
        (Some(AttributeValue::N(one)), Some(AttributeValue::N(other))) => {
            compare_numbers(one, other).is_some_and(std::cmp::Ordering::is_gt)
        }
        (Some(AttributeValue::S(one)), Some(AttributeValue::S(other))) => {
            one.as_bytes() > other.as_bytes()
        }
        _ => false,
    }
}

impl FromStr for Strategy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            None if text == "mirror" => Ok(Strategy::Mirror),
            None if text == "fill" => Ok(Strategy::Fill),
            Some(("newest", attribute)) if !attribute.is_empty() => {
                Ok(Strategy::Newest(attribute.to_owned()))
            }
            _ => Err(format!(
                "`{text}` is no strategy: mirror, fill, or newest=ATTRIBUTE"
            )),
        }
    }
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Strategy::Mirror => f.write_str("mirror"),
            Strategy::Fill => f.write_str("fill"),
            Strategy::Newest(attribute) => write!(f, "newest={attribute}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(value: AttributeValue) -> Item {
        Item::from([("at".to_owned(), value)])
    }

    #[test]
    fn only_what_a_strategy_promises_is_touched() {
        let newest = Strategy::Newest("at".to_owned());
        let n = |text: &str| item(AttributeValue::N(text.to_owned()));
        let s = |text: &str| item(AttributeValue::S(text.to_owned()));
        let deed = |strategy: &Strategy, kind, one: Item, other: Item| {
            strategy.deed(kind, Some(&one), Some(&other))
        };
        for (one, other, put) in [
            (n("2"), n("1.5"), true),
            (n("1.0"), n("1"), false),
            (n("-1"), n("1"), false),
            (n("1e30"), n("99999999999999999999999999999"), true),
            (s("b"), s("a"), true),
            (s("a"), s("b"), false),
            // Nobody can say which is newer.
            (s("2"), n("1"), false),
            (n("2"), Item::new(), false),
            (Item::new(), n("1"), false),
        ] {
            let wanted = if put { Deed::Put } else { Deed::Leave };
            assert_eq!(
                deed(&newest, Kind::Changed, one.clone(), other.clone()),
                wanted
            );
            let (mirror, fill) = (Strategy::Mirror, Strategy::Fill);
            assert_eq!(
                deed(&mirror, Kind::Changed, one.clone(), other.clone()),
                Deed::Mirror
            );
            assert_eq!(deed(&fill, Kind::Changed, one, other), Deed::Leave);
        }
        for strategy in [Strategy::Fill, newest] {
            assert_eq!(strategy.deed(Kind::Missing, None, None), Deed::Put);
            assert_eq!(strategy.deed(Kind::Extra, None, None), Deed::Leave);
        }
        assert_eq!(Strategy::Mirror.deed(Kind::Extra, None, None), Deed::Delete);
    }

    #[test]
    fn a_strategy_is_spelled_as_it_is_shown() {
        for text in ["mirror", "fill", "newest=updated_at", "newest=a=b"] {
            assert_eq!(text.parse::<Strategy>().unwrap().to_string(), text);
        }
        for wrong in ["", "newest", "newest=", "oldest=at", "Mirror"] {
            assert!(wrong.parse::<Strategy>().is_err(), "{wrong}");
        }
    }
}
