//! Images: items as DynamoDB JSON, spelled as the service spelled them.
//!
//! An image is only carried from the stream to the replica, and both speak the same JSON. So its text is kept
//! as it came and written as it is: no value of it is made, moved from one client's types to the other's, or
//! spelled anew. What has to be known of it is told from the text in one look: that each of its values is of a
//! known type, and how large the item is.

use std::fmt;

use aws_sdk_dynamodb::types::AttributeValue;
use base64::display::Base64Display;
use base64::engine::general_purpose::STANDARD;
use serde::de::{DeserializeSeed, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::ser::{Error as _, SerializeMap};
use serde::{Deserializer, Serialize, Serializer};
use serde_json::Value;
use serde_json::value::RawValue;

use super::value::{Item, UnknownType, number_bytes};

/// An item in the service's own spelling.
#[derive(Clone)]
pub struct Image {
    text: Box<RawValue>,
    bytes: usize,
}

impl Image {
    /// Takes the text of an item.
    ///
    /// # Errors
    /// [`UnknownType`] where any value in it, at any depth, is of an unknown type, or of none.
    pub fn parse(text: &RawValue) -> Result<Self, UnknownType> {
        let mut reader = serde_json::Deserializer::from_str(text.get());
        let bytes = AttributesSize { own: 0, each: 0 }
            .deserialize(&mut reader)
            .map_err(|_| UnknownType)?;
        Ok(Self {
            text: text.to_owned(),
            bytes,
        })
    }

    /// The image of an item that did not come from a stream.
    ///
    /// # Errors
    /// As [`parse`](Self::parse).
    pub fn of(item: &Item) -> Result<Self, UnknownType> {
        let text = serde_json::value::to_raw_value(&Attributes(item)).map_err(|_| UnknownType)?;
        let bytes = super::value::item_bytes(item);
        Ok(Self { text, bytes })
    }

    /// Its text.
    pub fn json(&self) -> &RawValue {
        &self.text
    }

    /// Its text, taken apart; names in order.
    pub fn to_value(&self) -> Value {
        // It was read once, so it is JSON.
        serde_json::from_str(self.text.get()).unwrap_or_default()
    }

    /// Size of the item in bytes, as DynamoDB counts it.
    pub fn item_bytes(&self) -> usize {
        self.bytes
    }

    /// Bytes that the text takes.
    pub fn text_bytes(&self) -> usize {
        self.text.get().len()
    }
}

impl fmt::Debug for Image {
    /// Never the item itself: debug output ends up in logs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Image({} bytes)", self.bytes)
    }
}

/// An item, written as DynamoDB JSON.
pub(crate) struct Attributes<'a>(pub &'a Item);

struct Attribute<'a>(&'a AttributeValue);

struct Binary<'a>(&'a [u8]);

/// What an iterator gives, as a sequence.
pub(crate) struct Sequence<F>(pub F);

impl<F, I> Serialize for Sequence<F>
where
    F: Fn() -> I,
    I: Iterator<Item: Serialize>,
{
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq((self.0)())
    }
}

impl Serialize for Attributes<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, value)| (name, Attribute(value))))
    }
}

impl Serialize for Attribute<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut typed = serializer.serialize_map(Some(1))?;
        match self.0 {
            AttributeValue::S(text) => typed.serialize_entry("S", text)?,
            AttributeValue::N(number) => typed.serialize_entry("N", number)?,
            AttributeValue::B(bytes) => typed.serialize_entry("B", &Binary(bytes.as_ref()))?,
            AttributeValue::Bool(flag) => typed.serialize_entry("BOOL", flag)?,
            AttributeValue::Null(flag) => typed.serialize_entry("NULL", flag)?,
            AttributeValue::Ss(set) => typed.serialize_entry("SS", set)?,
            AttributeValue::Ns(set) => typed.serialize_entry("NS", set)?,
            AttributeValue::Bs(set) => {
                let all = Sequence(|| set.iter().map(|bytes| Binary(bytes.as_ref())));
                typed.serialize_entry("BS", &all)?;
            }
            AttributeValue::L(list) => {
                let all = Sequence(|| list.iter().map(Attribute));
                typed.serialize_entry("L", &all)?;
            }
            AttributeValue::M(map) => typed.serialize_entry("M", &Attributes(map))?,
            _ => {
                return Err(S::Error::custom(
                    "an attribute has a type that is not known",
                ));
            }
        }
        typed.end()
    }
}

impl Serialize for Binary<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&Base64Display::new(self.0, &STANDARD))
    }
}

// What follows reads the text of an item, and makes of each part of it nothing but its size, as
// `value::item_bytes` tells it of an item.

/// A map: `own` bytes, and `each` for every entry besides its name and value.
#[derive(Clone, Copy)]
struct AttributesSize {
    own: usize,
    each: usize,
}

/// A value, with its type.
#[derive(Clone, Copy)]
struct TypedSize;

/// The name of a type.
#[derive(Clone, Copy)]
struct TypeName;

#[derive(Clone, Copy)]
enum Type {
    Text,
    Number,
    Binary,
    Flag,
    Texts,
    Numbers,
    Binaries,
    List,
    Map,
}

/// A text, whose size the function tells.
#[derive(Clone, Copy)]
struct TextSize(fn(&str) -> usize);

#[derive(Clone, Copy)]
struct FlagSize;

/// A list: `own` bytes, and `each` for every element besides its size.
#[derive(Clone, Copy)]
struct ListSize<S> {
    element: S,
    own: usize,
    each: usize,
}

/// Bytes that Base64 stands for.
fn blob_bytes(text: &str) -> usize {
    text.trim_end_matches('=').len() * 3 / 4
}

impl<'de> DeserializeSeed<'de> for AttributesSize {
    type Value = usize;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<usize, D::Error> {
        from.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for AttributesSize {
    type Value = usize;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("attributes")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<usize, A::Error> {
        let mut bytes = self.own;
        while let Some(name) = map.next_key_seed(TextSize(str::len))? {
            bytes += self.each + name + map.next_value_seed(TypedSize)?;
        }
        Ok(bytes)
    }
}

impl<'de> DeserializeSeed<'de> for TypedSize {
    type Value = usize;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<usize, D::Error> {
        from.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for TypedSize {
    type Value = usize;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value with its type")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<usize, A::Error> {
        let (text, number, binary) = (
            TextSize(str::len),
            TextSize(number_bytes),
            TextSize(blob_bytes),
        );
        let set = |element| ListSize {
            element,
            own: 0,
            each: 0,
        };
        let Some(kind) = map.next_key_seed(TypeName)? else {
            return Err(A::Error::custom("a value without a type"));
        };
        let bytes = match kind {
            Type::Text => map.next_value_seed(text)?,
            Type::Number => map.next_value_seed(number)?,
            Type::Binary => map.next_value_seed(binary)?,
            Type::Flag => map.next_value_seed(FlagSize)?,
            Type::Texts => map.next_value_seed(set(text))?,
            Type::Numbers => map.next_value_seed(set(number))?,
            Type::Binaries => map.next_value_seed(set(binary))?,
            Type::List => map.next_value_seed(ListSize {
                element: TypedSize,
                own: 3,
                each: 1,
            })?,
            Type::Map => map.next_value_seed(AttributesSize { own: 3, each: 1 })?,
        };
        match map.next_key::<IgnoredAny>()? {
            None => Ok(bytes),
            Some(_) => Err(A::Error::custom("a value of two types")),
        }
    }
}

impl<'de> DeserializeSeed<'de> for TypeName {
    type Value = Type;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Type, D::Error> {
        from.deserialize_str(self)
    }
}

impl Visitor<'_> for TypeName {
    type Value = Type;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the name of a type")
    }

    fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<Type, E> {
        Ok(match name {
            "S" => Type::Text,
            "N" => Type::Number,
            "B" => Type::Binary,
            "BOOL" | "NULL" => Type::Flag,
            "SS" => Type::Texts,
            "NS" => Type::Numbers,
            "BS" => Type::Binaries,
            "L" => Type::List,
            "M" => Type::Map,
            _ => return Err(E::custom("an unknown type")),
        })
    }
}

impl<'de> DeserializeSeed<'de> for TextSize {
    type Value = usize;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<usize, D::Error> {
        from.deserialize_str(self)
    }
}

impl Visitor<'_> for TextSize {
    type Value = usize;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text")
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<usize, E> {
        Ok((self.0)(text))
    }
}

impl<'de> DeserializeSeed<'de> for FlagSize {
    type Value = usize;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<usize, D::Error> {
        from.deserialize_bool(self)
    }
}

impl Visitor<'_> for FlagSize {
    type Value = usize;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("true or false")
    }

    fn visit_bool<E: serde::de::Error>(self, _: bool) -> Result<usize, E> {
        Ok(1)
    }
}

impl<'de, S: DeserializeSeed<'de, Value = usize> + Copy> DeserializeSeed<'de> for ListSize<S> {
    type Value = usize;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<usize, D::Error> {
        from.deserialize_seq(self)
    }
}

impl<'de, S: DeserializeSeed<'de, Value = usize> + Copy> Visitor<'de> for ListSize<S> {
    type Value = usize;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<usize, A::Error> {
        let mut bytes = self.own;
        while let Some(element) = list.next_element_seed(self.element)? {
            bytes += self.each + element;
        }
        Ok(bytes)
    }
}

#[cfg(test)]
#[path = "image_tests.rs"]
pub(crate) mod tests;
