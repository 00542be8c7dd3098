//! The gateway's streams are right: an official SDK client walks them through splits, rotations
//! and trims and gets every record once, in order per key.

mod gateway_support;

use std::time::Duration;

use farshore::embedded::gateway::{Gateway, Options};
use gateway_support::*;

#[tokio::test(flavor = "multi_thread")]
async fn every_write_is_one_record_in_order_per_key_through_splits_and_rotations() {
    let options = Options::new(1).shards(8);
    let options = options.rotate_every(Duration::from_millis(400));
    let gateway = Gateway::start(options.split_every(Duration::from_millis(300)))
        .await
        .unwrap();
    let (dynamo, streams) = clients(&gateway).await;
    let arn = table(&dynamo, "orders").await;
    let writers = (0..4).map(|writer| {
        let dynamo = dynamo.clone();
        async move { write(&dynamo, "orders", &format!("w{writer}"), 20, 30).await }
    });
    let histories = futures::future::join_all(writers).await;
    let expected = tidy(histories.into_iter().flatten().collect());
    let walk = walk(&streams, &arn, &expected).await;
    assert_eq!(walk.history(), expected);
    assert!(walk.shards.len() > 16, "{} shards", walk.shards.len());
    assert!(walk.last_pages_with_records > 0);
}
