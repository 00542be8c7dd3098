use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use aws_sdk_dynamodb::config::{BehaviorVersion, Credentials, Region};
use aws_sdk_dynamodb::types::{DeleteRequest, PutRequest, ReturnConsumedCapacity, WriteRequest};
use aws_sdk_dynamodb::{Client, Config};
use proptest::collection::vec;
use proptest::prelude::*;
use serde_json::Value;

use super::*;
use crate::dynamo::image::tests::items;
use crate::dynamo::value::Item;
use crate::stream::change::Change;

/// The body that the SDK itself makes.
async fn body_of_sdk(table: &str, requests: Vec<WriteRequest>) -> Value {
    let config = Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::new("eu-west-1"))
        .credentials_provider(Credentials::new("a", "b", None, None, "test"))
        // The discard port: it is never asked to answer.
        .endpoint_url("http://127.0.0.1:9")
        .retry_config(aws_smithy_types::retry::RetryConfig::disabled())
        .build();
    let seen = Arc::new(Mutex::new(Value::Null));
    let sees = Arc::clone(&seen);
    let call = Client::from_conf(config)
        .batch_write_item()
        .request_items(table, requests)
        .return_consumed_capacity(ReturnConsumedCapacity::Total)
        .customize()
        .mutate_request(move |request| {
            let body = request.body().bytes().unwrap_or_default();
            *sees.lock().unwrap() = serde_json::from_slice(body).unwrap();
        })
        .send();
    assert!(call.await.is_err(), "nobody listens there");
    std::mem::take(&mut *seen.lock().unwrap())
}

fn op(item: Item, is_delete: bool) -> (Op, WriteRequest) {
    let builder = WriteRequest::builder();
    let request = match is_delete {
        true => {
            let delete = DeleteRequest::builder().set_key(Some(item.clone()));
            builder.delete_request(delete.build().unwrap())
        }
        false => {
            let put = PutRequest::builder().set_item(Some(item.clone()));
            builder.put_request(put.build().unwrap())
        }
    };
    let change = match is_delete {
        true => Change::of_item(&item, None, 0),
        false => Change::of_item(&HashMap::new(), Some(&item), 0),
    };
    let op = Op {
        slot: 0,
        change: Arc::new(change.unwrap()),
    };
    (op, request.build())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn a_batch_is_written_as_the_sdk_writes_it(
        table in "[a-zA-Z0-9_.-]{3,20}",
        items in vec((items(), any::<bool>()), 1..6),
    ) {
        let (ops, requests): (Vec<Op>, Vec<WriteRequest>) =
            items.into_iter().map(|(item, is_delete)| op(item, is_delete)).unzip();
        let own: Value = serde_json::from_slice(&batch_body(&table, &ops).unwrap()).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let of_sdk = runtime.block_on(body_of_sdk(&table, requests));
        prop_assert_eq!(own, of_sdk);
    }
}
