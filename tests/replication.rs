//! The replication suite on two embedded regions, or on those that `FARSHORE_TEST_ENDPOINT` names.

mod common;
mod suite;

use common::stand::Stand;

macro_rules! promises {
    ($($name:ident => $run:expr;)*) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                let stand = Stand::new().await;
                $run(&stand).await;
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
    what_a_table_holds_is_copied => suite::whole::what_a_table_holds_is_copied;
    the_active_region_stands_by => suite::the_active_region_stands_by;
    poison_is_isolated => suite::faults::poison_is_isolated;
    a_queue_that_refuses_holds_the_checkpoint => suite::faults::a_queue_that_refuses_holds_the_checkpoint;
    an_outage_of_the_source_is_waited_out => suite::faults::an_outage_of_the_source;
    an_outage_of_the_replica_is_waited_out => suite::faults::an_outage_of_the_replica;
}
