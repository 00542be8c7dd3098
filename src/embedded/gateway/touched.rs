//! What a call touches: tables, keys, and for writes their size. Attributes other than keys are
//! skipped without being decoded.

use std::collections::BTreeMap;

use dynoxide::types::{AttributeValue, Item, item_size};
use serde::Deserialize;
use serde_json::value::RawValue;

use super::keys::{Key, KeySchema};

type RawItem<'a> = BTreeMap<String, &'a RawValue>;

/// Looks up the key attributes of a table.
pub(crate) type Schemas<'a> = &'a dyn Fn(&str) -> Option<KeySchema>;

/// One item a call writes.
#[derive(Clone, Debug)]
pub(crate) struct Write {
    pub(crate) key: Key,
    /// The key attributes alone, to read the old item.
    pub(crate) key_item: Item,
    /// Bytes of the item put; of an update, of its key and values; 0 of a delete.
    pub(crate) size: usize,
    /// The write's place in its table's list, if the call is a batch.
    pub(crate) index: usize,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Touched {
    pub(crate) tables: Vec<String>,
    pub(crate) keys: Vec<Key>,
    pub(crate) writes: Vec<Write>,
}

/// Reads what a call touches. A body that cannot be read touches nothing: its refusal is left to
/// the database. Sizes of writes are worked out only if `sizes`.
pub(crate) fn touched(operation: &str, body: &[u8], schemas: Schemas<'_>, sizes: bool) -> Touched {
    let mut reader = Reader {
        schemas,
        sizes,
        found: Touched::default(),
    };
    // An unreadable body is the database's to refuse.
    let _ = reader.read(operation, body);
    reader.found
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct One<'a> {
    table_name: String,
    #[serde(borrow, default)]
    item: Option<RawItem<'a>>,
    #[serde(borrow, default)]
    key: Option<RawItem<'a>>,
    #[serde(borrow, default)]
    expression_attribute_values: Option<RawItem<'a>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Batch<'a> {
    #[serde(borrow)]
    request_items: BTreeMap<String, &'a RawValue>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct BatchGet<'a> {
    #[serde(borrow)]
    keys: Vec<RawItem<'a>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct WriteRequest<'a> {
    #[serde(borrow, default)]
    put_request: Option<PutRequest<'a>>,
    #[serde(borrow, default)]
    delete_request: Option<DeleteRequest<'a>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct PutRequest<'a> {
    #[serde(borrow)]
    item: RawItem<'a>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DeleteRequest<'a> {
    #[serde(borrow)]
    key: RawItem<'a>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Transaction<'a> {
    #[serde(borrow)]
    transact_items: Vec<BTreeMap<String, One<'a>>>,
}

struct Reader<'s> {
    schemas: Schemas<'s>,
    sizes: bool,
    found: Touched,
}

impl Reader<'_> {
    fn read(&mut self, operation: &str, body: &[u8]) -> serde_json::Result<()> {
        match operation {
            "BatchWriteItem" => {
                let batch: Batch<'_> = serde_json::from_slice(body)?;
                for (table, requests) in &batch.request_items {
                    let schema = self.table(table);
                    let requests: Vec<WriteRequest<'_>> = serde_json::from_str(requests.get())?;
                    for (index, request) in requests.iter().enumerate() {
                        let put = request.put_request.as_ref().map(|put| &put.item);
                        let delete = request.delete_request.as_ref().map(|delete| &delete.key);
                        self.write(schema.as_ref(), table, put.or(delete), put, index);
                    }
                }
            }
            "BatchGetItem" => {
                let batch: Batch<'_> = serde_json::from_slice(body)?;
                for (table, request) in &batch.request_items {
                    let schema = self.table(table);
                    let request: BatchGet<'_> = serde_json::from_str(request.get())?;
                    for key in &request.keys {
                        self.key(schema.as_ref(), table, key);
                    }
                }
            }
            "TransactWriteItems" | "TransactGetItems" => {
                let transaction: Transaction<'_> = serde_json::from_slice(body)?;
                for (index, action) in transaction.transact_items.iter().enumerate() {
                    for (kind, one) in action {
                        let reads = matches!(kind.as_str(), "Get" | "ConditionCheck");
                        self.one(one, !reads, index);
                    }
                }
            }
            _ => {
                let one: One<'_> = serde_json::from_slice(body)?;
                self.one(&one, super::protocol::is_write(operation), 0);
            }
        }
        Ok(())
    }

    fn one(&mut self, one: &One<'_>, writes: bool, index: usize) {
        let schema = self.table(&one.table_name);
        let table = table_name(&one.table_name);
        let item = one.item.as_ref().or(one.key.as_ref());
        if writes {
            let (item_put, values) = (one.item.as_ref(), &one.expression_attribute_values);
            self.write(
                schema.as_ref(),
                table,
                item,
                item_put.or(values.as_ref()),
                index,
            );
        } else if let Some(item) = item {
            self.key(schema.as_ref(), table, item);
        }
    }

    fn table(&mut self, name: &str) -> Option<KeySchema> {
        let name = table_name(name);
        if !self.found.tables.iter().any(|t| t == name) {
            self.found.tables.push(name.to_owned());
        }
        (self.schemas)(name)
    }

    fn key(&mut self, schema: Option<&KeySchema>, table: &str, item: &RawItem<'_>) -> Option<Item> {
        let schema = schema?;
        let mut key_item = Item::new();
        for name in std::iter::once(&schema.partition).chain(&schema.sort) {
            let value: AttributeValue = serde_json::from_str(item.get(name)?.get()).ok()?;
            key_item.insert(name.clone(), value);
        }
        let key = schema.key_of(table_name(table), &key_item)?;
        self.found.keys.push(key);
        Some(key_item)
    }

    fn write(
        &mut self,
        schema: Option<&KeySchema>,
        table: &str,
        item: Option<&RawItem<'_>>,
        sized: Option<&RawItem<'_>>,
        index: usize,
    ) {
        let Some(key_item) = item.and_then(|item| self.key(schema, table, item)) else {
            return;
        };
        let Some(key) = self.found.keys.last().cloned() else {
            return;
        };
        let size = if self.sizes {
            sized.map_or(0, raw_size)
        } else {
            0
        };
        self.found.writes.push(Write {
            key,
            key_item,
            size,
            index,
        });
    }
}

fn raw_size(item: &RawItem<'_>) -> usize {
    let decoded: Item = item
        .iter()
        .filter_map(|(name, raw)| Some((name.clone(), serde_json::from_str(raw.get()).ok()?)))
        .collect();
    item_size(&decoded)
}

/// The name in what may be a table's ARN.
pub(crate) fn table_name(name_or_arn: &str) -> &str {
    let in_arn = name_or_arn.split_once(":table/").map(|(_, rest)| rest);
    in_arn.map_or(name_or_arn, |rest| rest.split('/').next().unwrap_or(rest))
}

/// A BatchWriteItem body with only the writes `kept` names by table and place, and the writes left
/// out as the JSON of `UnprocessedItems`.
pub(crate) fn split_batch(
    body: &[u8],
    kept: &dyn Fn(&str, usize) -> bool,
) -> serde_json::Result<(Vec<u8>, Vec<u8>)> {
    let whole: BTreeMap<String, &RawValue> = serde_json::from_slice(body)?;
    let batch: Batch<'_> = serde_json::from_slice(body)?;
    let (mut sent, mut left) = (BTreeMap::new(), BTreeMap::new());
    for (table, requests) in &batch.request_items {
        let requests: Vec<&RawValue> = serde_json::from_str(requests.get())?;
        for (index, request) in requests.into_iter().enumerate() {
            let list = if kept(table_name(table), index) {
                &mut sent
            } else {
                &mut left
            };
            list.entry(table.as_str())
                .or_insert_with(Vec::new)
                .push(request);
        }
    }
    let request_items = serde_json::value::to_raw_value(&sent)?;
    let mut whole = whole;
    whole.insert("RequestItems".to_owned(), &request_items);
    Ok((serde_json::to_vec(&whole)?, serde_json::to_vec(&left)?))
}

/// A BatchGetItem body with only the keys `kept` names by their place among all keys of the call,
/// and the keys left out as the JSON of `UnprocessedKeys`.
pub(crate) fn split_batch_get(
    body: &[u8],
    kept: &dyn Fn(usize) -> bool,
) -> serde_json::Result<(Vec<u8>, Vec<u8>)> {
    let mut sent: serde_json::Value = serde_json::from_slice(body)?;
    let mut left = serde_json::Map::new();
    let mut place = 0;
    if let Some(tables) = sent["RequestItems"].as_object_mut() {
        for (table, request) in tables.iter_mut() {
            let mut behind = request.clone();
            let keys = request["Keys"].as_array_mut().map(std::mem::take);
            let (mut going, mut staying) = (Vec::new(), Vec::new());
            for key in keys.unwrap_or_default() {
                let list = if kept(place) {
                    &mut going
                } else {
                    &mut staying
                };
                list.push(key);
                place += 1;
            }
            request["Keys"] = going.into();
            if !staying.is_empty() {
                behind["Keys"] = staying.into();
                left.insert(table.clone(), behind);
            }
        }
        tables.retain(|_, request| request["Keys"].as_array().is_some_and(|k| !k.is_empty()));
    }
    Ok((serde_json::to_vec(&sent)?, serde_json::to_vec(&left)?))
}

/// A batch's answer with `left` as its `UnprocessedItems` or `UnprocessedKeys`.
pub(crate) fn with_unprocessed(
    answer: &[u8],
    field: &str,
    left: &[u8],
) -> serde_json::Result<Vec<u8>> {
    let left: &RawValue = serde_json::from_slice(left)?;
    let mut whole: BTreeMap<String, &RawValue> = serde_json::from_slice(answer)?;
    whole.insert(field.to_owned(), left);
    serde_json::to_vec(&whole)
}

/// An answer that tells what was consumed, with `units` as that; `None` for one that does not tell.
pub(crate) fn with_consumed(answer: &[u8], units: f64) -> serde_json::Result<Option<Vec<u8>>> {
    const FIELD: &str = "ConsumedCapacity";
    let mut whole: BTreeMap<String, &RawValue> = serde_json::from_slice(answer)?;
    let Some(told) = whole.get(FIELD) else {
        return Ok(None);
    };
    let mut told: serde_json::Value = serde_json::from_str(told.get())?;
    let one = match told.get(0).is_some() {
        true => &mut told[0],
        false => &mut told,
    };
    one["CapacityUnits"] = units.into();
    let told = serde_json::value::to_raw_value(&told)?;
    whole.insert(FIELD.to_owned(), &told);
    serde_json::to_vec(&whole).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schemas(_: &str) -> Option<KeySchema> {
        KeySchema::parse(r#"[{"AttributeName":"pk","KeyType":"HASH"}]"#)
    }

    const BATCH: &str = r#"{"RequestItems":{"t":[
        {"PutRequest":{"Item":{"pk":{"S":"a"},"v":{"L":[{"N":"1"},{"M":{}}]}}}},
        {"DeleteRequest":{"Key":{"pk":{"S":"b"}}}},
        {"PutRequest":{"Item":{"pk":{"S":"c"},"v":{"B":"AAAA"}}}}]},
        "ReturnConsumedCapacity":"TOTAL"}"#;

    fn json_keys(found: &Touched) -> Vec<&str> {
        found.keys.iter().map(|key| key.json.as_str()).collect()
    }

    #[test]
    fn the_keys_of_every_kind_of_call_are_found() {
        let found = touched("BatchWriteItem", BATCH.as_bytes(), &schemas, true);
        let keys = [
            r#"{"pk":{"S":"a"}}"#,
            r#"{"pk":{"S":"b"}}"#,
            r#"{"pk":{"S":"c"}}"#,
        ];
        assert_eq!(json_keys(&found), keys);
        let sizes: Vec<usize> = found.writes.iter().map(|write| write.size).collect();
        // Names and values: 2 + 1 + 1 + list of a number and an empty map; and 2 + 1 + 1 + 3.
        assert!(sizes[0] > 4 && sizes[1] == 0 && sizes[2] == 7, "{sizes:?}");

        let key = r#"{"pk":{"S":"a"}}"#;
        for (operation, body) in [
            ("PutItem", format!(r#"{{"TableName":"t","Item":{key}}}"#)),
            ("GetItem", format!(r#"{{"TableName":"t","Key":{key}}}"#)),
            (
                "BatchGetItem",
                format!(r#"{{"RequestItems":{{"t":{{"Keys":[{key}]}}}}}}"#),
            ),
            (
                "TransactWriteItems",
                format!(r#"{{"TransactItems":[{{"Delete":{{"TableName":"t","Key":{key}}}}}]}}"#),
            ),
        ] {
            let found = touched(operation, body.as_bytes(), &schemas, false);
            assert_eq!(found.tables, ["t"], "{operation}");
            assert_eq!(json_keys(&found), [key], "{operation}");
            let writes = usize::from(super::super::protocol::is_write(operation));
            assert_eq!(found.writes.len(), writes, "{operation}");
        }
    }

    #[test]
    fn a_split_batch_holds_each_write_once() {
        let (sent, left) = split_batch(BATCH.as_bytes(), &|_, n| n == 1).unwrap();
        let sent_keys = touched("BatchWriteItem", &sent, &schemas, false);
        assert_eq!(json_keys(&sent_keys), [r#"{"pk":{"S":"b"}}"#]);
        assert!(
            String::from_utf8(sent)
                .unwrap()
                .contains("ReturnConsumedCapacity")
        );
        let answer = with_unprocessed(
            br#"{"UnprocessedItems":{},"X":1}"#,
            "UnprocessedItems",
            &left,
        )
        .unwrap();
        let answer: serde_json::Value = serde_json::from_slice(&answer).unwrap();
        assert_eq!(answer["UnprocessedItems"]["t"].as_array().unwrap().len(), 2);
        assert_eq!(answer["X"], 1);
    }

    #[test]
    fn an_answer_tells_the_units_that_were_metered() {
        let units = |answer: &str| {
            let answer = with_consumed(answer.as_bytes(), 7.0).unwrap()?;
            serde_json::from_slice::<serde_json::Value>(&answer).ok()
        };
        assert_eq!(units("{}"), None);
        let batch = r#"{"ConsumedCapacity":[{"TableName":"t","CapacityUnits":2.0}]}"#;
        let told = units(batch).unwrap();
        assert_eq!(told["ConsumedCapacity"][0]["CapacityUnits"], 7.0);
        let put = r#"{"X":1,"ConsumedCapacity":{"TableName":"t","CapacityUnits":2.0}}"#;
        let told = units(put).unwrap();
        assert_eq!(told["ConsumedCapacity"]["CapacityUnits"], 7.0);
        assert_eq!(told["X"], 1);
    }

    #[test]
    fn a_table_is_named_by_itself_or_by_its_arn() {
        assert_eq!(table_name("t"), "t");
        assert_eq!(table_name("arn:aws:dynamodb:eu-west-1:1:table/t"), "t");
        assert_eq!(
            table_name("arn:aws:dynamodb:eu-west-1:1:table/t/stream/x"),
            "t"
        );
    }
}
