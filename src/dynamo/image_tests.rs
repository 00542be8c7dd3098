use aws_smithy_types::Blob;
use proptest::collection::{hash_map, vec};
use proptest::prelude::*;
use serde_json::json;

use super::super::json::{item_from_json, item_to_json};
use super::super::value::item_bytes;
use super::*;

pub(crate) fn values() -> impl Strategy<Value = AttributeValue> {
    let bytes = || vec(any::<u8>(), 0..20).prop_map(Blob::new);
    let leaf = prop_oneof![
        // Quotes, backslashes, control characters and all planes of Unicode among them.
        any::<String>().prop_map(AttributeValue::S),
        "-?[0-9]{1,38}(\\.[0-9]{1,5})?".prop_map(AttributeValue::N),
        bytes().prop_map(AttributeValue::B),
        any::<bool>().prop_map(AttributeValue::Bool),
        Just(AttributeValue::Null(true)),
        vec(any::<String>(), 1..4).prop_map(AttributeValue::Ss),
        vec("[0-9]{1,9}", 1..4).prop_map(AttributeValue::Ns),
        vec(bytes(), 1..4).prop_map(AttributeValue::Bs),
    ];
    leaf.prop_recursive(4, 24, 5, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..5).prop_map(AttributeValue::L),
            hash_map(any::<String>(), inner, 0..5).prop_map(AttributeValue::M),
        ]
    })
}

pub(crate) fn items() -> impl Strategy<Value = Item> {
    hash_map(any::<String>(), values(), 0..6)
}

fn parsed(text: &str) -> Result<Image, UnknownType> {
    Image::parse(serde_json::from_str::<&RawValue>(text).unwrap())
}

proptest! {
    /// Both ways to an image, and back.
    #[test]
    fn an_image_is_its_item(item in items(), pretty in any::<bool>()) {
        let value = item_to_json(&item);
        let text = match pretty {
            true => serde_json::to_string_pretty(&value).unwrap(),
            false => value.to_string(),
        };
        for image in [parsed(&text).unwrap(), Image::of(&item).unwrap()] {
            prop_assert_eq!(image.item_bytes(), item_bytes(&item));
            prop_assert_eq!(item_from_json(&image.to_value()), Some(item.clone()));
        }
        let image = parsed(&text).unwrap();
        prop_assert_eq!(image.json().get(), text, "as it came");
    }
}

#[test]
fn what_has_no_known_type_is_no_image() {
    for value in [
        json!({"VECTOR": "a"}),
        json!({}),
        json!({"S": 1}),
        json!({"S": "a", "N": "1"}),
        json!({"BOOL": "true"}),
        json!({"L": [{"S": "a"}, {"M": {"deep": {"X": []}}}]}),
        json!({"SS": ["a", 1]}),
        json!("a"),
        json!(null),
    ] {
        let text = json!({"good": {"S": "a"}, "v": value}).to_string();
        assert!(parsed(&text).is_err(), "{text}");
    }
    assert!(parsed("[]").is_err());
}

#[test]
fn the_deepest_item_that_the_service_takes_is_read() {
    let mut value = json!({"S": "a"});
    for _ in 0..32 {
        value = json!({"M": {"v": value}});
    }
    assert!(parsed(&json!({"v": value}).to_string()).is_ok());
}
