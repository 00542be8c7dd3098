use std::collections::HashMap;

use aws_sdk_dynamodbstreams::config::{BehaviorVersion, Credentials, Region};
use aws_sdk_dynamodbstreams::types::{AttributeValue as StreamValue, Record as SdkRecord};
use aws_sdk_dynamodbstreams::{Client, Config};
use aws_smithy_runtime_api::client::http::{
    HttpConnector, HttpConnectorFuture, SharedHttpConnector, http_client_fn,
};
use aws_smithy_runtime_api::client::orchestrator::{HttpRequest, HttpResponse};
use aws_smithy_runtime_api::http::StatusCode;
use aws_smithy_types::body::SdkBody;
use proptest::collection::vec;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::dynamo::image::Image;
use crate::dynamo::image::tests::items;
use crate::dynamo::json::item_to_json;
use crate::stream::change::OldImage;

/// Answers everything with one body.
#[derive(Debug, Clone)]
struct Canned(String);

impl HttpConnector for Canned {
    fn call(&self, _: HttpRequest) -> HttpConnectorFuture {
        // Two hundred is a status.
        let status = StatusCode::try_from(200).unwrap();
        HttpConnectorFuture::ready(Ok(HttpResponse::new(
            status,
            SdkBody::from(self.0.as_str()),
        )))
    }
}

/// What the SDK itself reads in `body`.
fn read_by_sdk(body: String) -> Vec<SdkRecord> {
    let connector = SharedHttpConnector::new(Canned(body));
    let config = Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::new("eu-west-1"))
        .credentials_provider(Credentials::new("a", "b", None, None, "test"))
        .endpoint_url("http://127.0.0.1:9")
        .http_client(http_client_fn(move |_, _| connector.clone()))
        .build();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let call = Client::from_conf(config)
        .get_records()
        .shard_iterator("i")
        .send();
    runtime.block_on(call).unwrap().records.unwrap()
}

fn value_of(value: &StreamValue) -> Value {
    let blob = |bytes: &Blob| STANDARD.encode(bytes);
    match value {
        StreamValue::S(text) => json!({"S": text}),
        StreamValue::N(number) => json!({"N": number}),
        StreamValue::B(bytes) => json!({"B": blob(bytes)}),
        StreamValue::Bool(flag) => json!({"BOOL": flag}),
        StreamValue::Null(flag) => json!({"NULL": flag}),
        StreamValue::Ss(set) => json!({"SS": set}),
        StreamValue::Ns(set) => json!({"NS": set}),
        StreamValue::Bs(set) => json!({"BS": set.iter().map(blob).collect::<Vec<_>>()}),
        StreamValue::L(list) => json!({"L": list.iter().map(value_of).collect::<Vec<_>>()}),
        StreamValue::M(map) => json!({"M": item_of(map)}),
        other => panic!("{other:?}"),
    }
}

fn item_of(item: &HashMap<String, StreamValue>) -> Value {
    item.iter()
        .map(|(name, value)| (name.clone(), value_of(value)))
        .collect()
}

fn keys() -> impl Strategy<Value = Item> {
    let value = prop_oneof![
        any::<String>().prop_map(AttributeValue::S),
        "-?[0-9]{1,38}".prop_map(AttributeValue::N),
        vec(any::<u8>(), 0..20).prop_map(|bytes| AttributeValue::B(Blob::new(bytes))),
    ];
    proptest::collection::hash_map(any::<String>(), value, 1..3)
}

fn records() -> impl Strategy<Value = Value> {
    (
        keys(),
        items(),
        items(),
        0..3usize,
        1_500_000_000i64..2_000_000_000,
        any::<u128>(),
        any::<bool>(),
    )
        .prop_map(|(keys, new, old, event, created, sequence, by_service)| {
            let event = Event::ALL[event];
            let mut body = json!({
                "ApproximateCreationDateTime": created,
                "Keys": item_to_json(&keys),
                "SequenceNumber": format!("{sequence:021}"),
                "SizeBytes": 1,
                "StreamViewType": "NEW_AND_OLD_IMAGES",
            });
            if event != Event::Remove {
                body["NewImage"] = item_to_json(&new);
            }
            if event != Event::Insert {
                body["OldImage"] = item_to_json(&old);
            }
            let mut record = json!({"eventID": "1", "eventName": event.name(), "dynamodb": body});
            if by_service {
                record["userIdentity"] =
                    json!({"Type": "Service", "PrincipalId": "dynamodb.amazonaws.com"});
            }
            record
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn an_answer_is_read_as_the_sdk_reads_it(records in vec(records(), 0..5), is_pretty in any::<bool>()) {
        let body = json!({"Records": records, "NextShardIterator": "next"});
        let body = match is_pretty {
            true => serde_json::to_string_pretty(&body).unwrap(),
            false => body.to_string(),
        };
        let own = read(body.as_bytes()).unwrap();
        prop_assert_eq!(own.next_iterator.as_deref(), Some("next"));
        let by_sdk = read_by_sdk(body);
        let own = own.records.unwrap();
        prop_assert_eq!(own.len(), by_sdk.len());
        for (own, sdk) in own.into_iter().zip(by_sdk) {
            let own = own.unwrap();
            let is_service = sdk.user_identity.is_some();
            let data = sdk.dynamodb.unwrap();
            prop_assert_eq!(Some(own.event.name()), sdk.event_name.as_ref().map(|name| name.as_str()));
            prop_assert_eq!(Some(own.sequence.as_str()), data.sequence_number.as_deref());
            let created = data.approximate_creation_date_time.unwrap();
            prop_assert_eq!(own.created_ms, created.to_millis().unwrap());
            prop_assert_eq!(own.ttl_delete, own.event == Event::Remove && is_service);
            prop_assert_eq!(item_to_json(&own.keys), item_of(&data.keys.unwrap()));
            let new = own.new_image.as_ref().map(Image::to_value);
            prop_assert_eq!(new, data.new_image.as_ref().map(item_of));
            let old = own.old_image.map(|old| match old {
                OldImage::Known(image) => image.to_value(),
                OldImage::Unknown => Value::Null,
            });
            prop_assert_eq!(old, data.old_image.as_ref().map(item_of));
        }
    }

    /// Whatever answers, it is read or it is none.
    #[test]
    fn no_answer_is_too_strange(body in vec(any::<u8>(), 0..200)) {
        let _ = read(&body);
    }
}

#[test]
fn what_is_no_answer_is_malformed() {
    for body in [
        "",
        "[",
        "null",
        "[]",
        "<html>",
        r#"{"Records": 1}"#,
        r#"{"Records": [1]}"#,
        r#"{} {}"#,
    ] {
        assert!(read(body.as_bytes()).is_err(), "{body}");
    }
    let cut = json!({"Records": [{"dynamodb": {"Keys": {}}}]}).to_string();
    assert!(read(&cut.as_bytes()[..cut.len() - 2]).is_err());
}

#[test]
fn the_end_of_a_shard_has_no_iterator_and_may_have_records() {
    let answer = read(br#"{"Records": [{}], "NextShardIterator": null, "New": [1]}"#).unwrap();
    assert_eq!(answer.next_iterator, None);
    assert_eq!(answer.records.unwrap().len(), 1);
    let answer = read(b"{}").unwrap();
    assert!(answer.records.is_none() && answer.next_iterator.is_none());
}
