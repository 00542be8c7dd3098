//! Items as DynamoDB JSON (`{"id": {"S": "a"}}`), the form of dead letters.

use aws_sdk_dynamodb::primitives::Blob;
use aws_sdk_dynamodb::types::AttributeValue;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};

use super::value::Item;

/// An item as DynamoDB JSON.
pub fn item_to_json(item: &Item) -> Value {
    // Sorted, so that the same item always gives the same text.
    let mut names: Vec<_> = item.keys().collect();
    names.sort_unstable();
    Value::Object(
        names
            .into_iter()
            .map(|name| (name.clone(), to_json(&item[name])))
            .collect::<Map<_, _>>(),
    )
}

fn to_json(value: &AttributeValue) -> Value {
    match value {
        AttributeValue::S(text) => json!({ "S": text }),
        AttributeValue::N(number) => json!({ "N": number }),
        AttributeValue::B(bytes) => json!({ "B": STANDARD.encode(bytes) }),
        AttributeValue::Bool(flag) => json!({ "BOOL": flag }),
        AttributeValue::Null(flag) => json!({ "NULL": flag }),
        AttributeValue::Ss(set) => json!({ "SS": set }),
        AttributeValue::Ns(set) => json!({ "NS": set }),
        AttributeValue::Bs(set) => {
            json!({ "BS": set.iter().map(|bytes| STANDARD.encode(bytes)).collect::<Vec<_>>() })
        }
        AttributeValue::L(list) => json!({ "L": list.iter().map(to_json).collect::<Vec<_>>() }),
        AttributeValue::M(map) => json!({ "M": item_to_json(map) }),
        // Only a value of a type unknown to the SDK; decoding has refused it before.
        _ => json!({ "UNKNOWN": true }),
    }
}

/// Reads DynamoDB JSON back. `None` where it is not of that form.
pub fn item_from_json(value: &Value) -> Option<Item> {
    value
        .as_object()?
        .iter()
        .map(|(name, value)| Some((name.clone(), from_json(value)?)))
        .collect()
}

fn from_json(value: &Value) -> Option<AttributeValue> {
    let object = value.as_object().filter(|object| object.len() == 1)?;
    let (kind, inner) = object.iter().next()?;
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let blob = |value: &Value| Some(Blob::new(STANDARD.decode(value.as_str()?).ok()?));
    let list = || inner.as_array();
    Some(match kind.as_str() {
        "S" => AttributeValue::S(text(inner)?),
        "N" => AttributeValue::N(text(inner)?),
        "B" => AttributeValue::B(blob(inner)?),
        "BOOL" => AttributeValue::Bool(inner.as_bool()?),
        "NULL" => AttributeValue::Null(inner.as_bool()?),
        "SS" => AttributeValue::Ss(list()?.iter().map(text).collect::<Option<_>>()?),
        "NS" => AttributeValue::Ns(list()?.iter().map(text).collect::<Option<_>>()?),
        "BS" => AttributeValue::Bs(list()?.iter().map(blob).collect::<Option<_>>()?),
        "L" => AttributeValue::L(list()?.iter().map(from_json).collect::<Option<_>>()?),
        "M" => AttributeValue::M(item_from_json(inner)?),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_survives_the_round_trip() {
        let nested = AttributeValue::M(Item::from([
            ("empty".to_owned(), AttributeValue::S(String::new())),
            (
                "list".to_owned(),
                AttributeValue::L(vec![
                    AttributeValue::Null(true),
                    AttributeValue::Bool(false),
                ]),
            ),
        ]));
        let item = Item::from([
            (
                "s".to_owned(),
                AttributeValue::S("ä\u{0}\u{ffff}".to_owned()),
            ),
            ("n".to_owned(), AttributeValue::N("-1.5E-130".to_owned())),
            ("b".to_owned(), AttributeValue::B(Blob::new(vec![0, 255]))),
            (
                "ss".to_owned(),
                AttributeValue::Ss(vec!["a".into(), "b".into()]),
            ),
            ("ns".to_owned(), AttributeValue::Ns(vec!["1".into()])),
            ("bs".to_owned(), AttributeValue::Bs(vec![Blob::new(vec![])])),
            ("m".to_owned(), nested),
        ]);
        let text = item_to_json(&item).to_string();
        let back = item_from_json(&serde_json::from_str(&text).unwrap()).unwrap();
        assert_eq!(back, item);
        assert_eq!(item_from_json(&json!({"a": {"X": 1}})), None);
    }
}
