//! The replication suite through the gateway, with no faults on: eight shards, and every one of
//! them gives way to a child every two seconds.

mod common;
mod suite;

use std::collections::HashSet;
use std::time::Duration;

use common::binary::{Worker, provision, run, stdout};
use common::stand::{Stand, put};
use farshore::embedded::gateway::Options;

async fn stand() -> Stand {
    let seed = common::seed();
    let source = Options::new(seed)
        .shards(8)
        .rotate_every(Duration::from_secs(2));
    Stand::gateways(source, Options::new(seed)).await
}

macro_rules! promises {
    ($($name:ident => $run:path;)*) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                let stand = stand().await;
                $run(&stand).await;
                let read = stand.gateways[0].calls_of("GetRecords");
                let shards: HashSet<_> = read.into_iter().filter_map(|call| call.shard).collect();
                assert!(shards.len() >= 8, "only {} shards were read", shards.len());
            }
        )*
    };
}

promises! {
    inserts_updates_and_deletes_arrive => suite::changes_arrive;
    all_types_arrive_byte_for_byte => suite::shapes::all_types_arrive_byte_for_byte;
    it_resumes_after_sigkill => suite::resumes_after_sigkill;
    it_stops_gracefully => suite::stops_gracefully;
    it_stops_gracefully_in_mid_flow => suite::stops_gracefully_in_mid_flow;
    two_tables_replicate_at_once => suite::two_tables_at_once;
    latest_is_resolved_once => suite::latest_is_resolved_once;
    never_copied_is_never_green => suite::never_copied_is_never_green;
    the_active_region_stands_by => suite::the_active_region_stands_by;
    poison_is_isolated => suite::faults::poison_is_isolated;
    an_outage_of_the_source_is_waited_out => suite::faults::an_outage_of_the_source;
    an_outage_of_the_replica_is_waited_out => suite::faults::an_outage_of_the_replica;
}

/// A shard whose parent has just ended has no owner for a moment. That is no reason to call a
/// person, however often somebody asks.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn status_stays_green_while_shards_roll_over() {
    // Four ends a second: more would wait for the ten DescribeStream calls that AWS allows.
    let seed = common::seed();
    let source = Options::new(seed)
        .shards(2)
        .rotate_every(Duration::from_millis(500));
    let stand = Stand::gateways(source, Options::new(seed)).await;
    let table = stand.table("orders");
    stand.create_source(&table).await;
    let config = stand.config(&[&table], "");
    // Three leases are what a busy machine may take to find a child.
    let text = common::stand::text_of(&config).replace("duration = \"1s\"", "duration = \"4s\"");
    std::fs::write(&config, text).unwrap();
    provision(&config);
    let worker = Worker::following(&config).await;
    let path = config.to_str().unwrap().to_owned();
    for round in 0..40 {
        put(&stand.source, &table, &format!("k{round}"), round).await;
        let status = run(&["status", "--json", "--config", &path]);
        assert_eq!(status.status.code(), Some(0), "{}", stdout(&status));
    }
    assert!(worker.stop().await.success());
    // Left without a worker for three leases, it does call one.
    let red = async || run(&["status", "--json", "--config", &path]).status.code() == Some(1);
    common::eventually("status turns red", Duration::from_secs(40), red).await;
}
