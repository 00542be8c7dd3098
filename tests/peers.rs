//! The lane of real peers: Farshore between servers and clients that are not its own. Two
//! ministacks as two regions, SQS in one of them, and boto3 as the one who writes and compares.

mod common;
mod peers_support;
mod suite;

use common::ministack::Ministacks;

/// The replication suite, as `tests/replication.rs` runs it on embedded regions.
macro_rules! promises {
    ($($name:ident => $run:path;)*) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            #[ignore = "needs ministack and boto3: .ci/peers installs them under target/peers"]
            async fn $name() {
                let peers = Ministacks::start().await;
                $run(&peers.stand()).await;
            }
        )*
    };
}

promises! {
    inserts_updates_and_deletes_arrive => suite::changes_arrive;
    all_types_arrive_byte_for_byte => suite::shapes::all_types_arrive_byte_for_byte;
    it_resumes_after_sigkill => suite::resumes_after_sigkill;
    it_stops_gracefully => suite::stops_gracefully;
    two_tables_replicate_at_once => suite::two_tables_at_once;
    latest_is_resolved_once => suite::latest_is_resolved_once;
    never_copied_is_never_green => suite::never_copied_is_never_green;
    what_a_table_holds_is_copied => suite::whole::what_a_table_holds_is_copied;
    the_active_region_stands_by => suite::the_active_region_stands_by;
    poison_is_isolated => suite::faults::poison_is_isolated;
    a_queue_that_refuses_holds_the_checkpoint => suite::faults::a_queue_that_refuses_holds_the_checkpoint;
    an_outage_of_the_source_is_waited_out => suite::faults::an_outage_of_the_source;
    an_outage_of_the_replica_is_waited_out => suite::faults::an_outage_of_the_replica;
    drift_of_every_kind_is_found_and_repaired => suite::reconcile::drift_of_every_kind_is_found_and_repaired;
}

/// What only servers with a queue, and a client that is not ours, can show.
macro_rules! with_peers {
    ($($name:ident => $run:path;)*) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            #[ignore = "needs ministack and boto3: .ci/peers installs them under target/peers"]
            async fn $name() {
                $run(&Ministacks::start().await).await;
            }
        )*
    };
}

with_peers! {
    a_standard_queue_is_provisioned_once => peers_support::queues::a_standard_queue_is_provisioned_once;
    a_fifo_queue_is_provisioned_once => peers_support::queues::a_fifo_queue_is_provisioned_once;
    poison_goes_to_a_standard_queue => peers_support::queues::poison_goes_to_a_standard_queue;
    poison_goes_to_a_fifo_queue => peers_support::queues::poison_goes_to_a_fifo_queue;
    odd_characters_survive_the_queue => peers_support::queues::odd_characters_survive_the_queue;
    sqs_is_reached_at_its_endpoint_url_where_it_has_one => peers_support::queues::sqs_is_reached_at_its_endpoint_url_where_it_has_one;
    poison_of_two_tables_meets_in_one_fifo_queue => peers_support::queues::poison_of_two_tables_meets_in_one_fifo_queue;
    poison_of_two_groups_meets_in_one_fifo_queue => peers_support::queues::poison_of_two_groups_meets_in_one_fifo_queue;
    an_outage_of_the_queue_holds_the_checkpoint => peers_support::queues::an_outage_of_the_queue_holds_the_checkpoint;
    a_redrive_empties_a_standard_queue => peers_support::queues::a_redrive_empties_a_standard_queue;
    a_redrive_empties_a_fifo_queue => peers_support::queues::a_redrive_empties_a_fifo_queue;
    all_poison_comes_home_from_a_standard_queue => peers_support::queues::all_poison_comes_home_from_a_standard_queue;
    all_poison_comes_home_from_a_fifo_queue => peers_support::queues::all_poison_comes_home_from_a_fifo_queue;
    an_alarm_comes_before_the_queue_forgets => peers_support::queues::an_alarm_comes_before_the_queue_forgets;
    letters_fit_the_largest_message => peers_support::sizes::letters_fit_the_largest_message;
    letters_fit_a_queue_with_a_lower_limit => peers_support::sizes::letters_fit_a_queue_with_a_lower_limit;
    a_queue_too_small_for_any_letter_is_refused => peers_support::sizes::a_queue_too_small_for_any_letter_is_refused;
    a_parameter_says_where_the_active_region_is => peers_support::actions::a_parameter_says_where_the_active_region_is;
    a_topic_tells_its_subscribers => peers_support::actions::a_topic_tells_its_subscribers;
    a_record_points_to_the_active_region => peers_support::actions::a_record_points_to_the_active_region;
    a_service_that_is_away_is_asked_again => peers_support::actions::a_service_that_is_away_is_asked_again;
    the_health_checks_of_the_example_are_taken => peers_support::actions::the_health_checks_of_the_example_are_taken;
    what_boto3_writes_while_the_worker_runs_arrives => peers_support::main_job::what_boto3_writes_while_the_worker_runs_arrives;
    what_boto3_writes_while_the_worker_is_killed_arrives => peers_support::main_job::what_boto3_writes_while_the_worker_is_killed_arrives;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs the python of the peers, which .ci/peers installs, and openssl"]
async fn a_webhook_goes_over_tls() {
    peers_support::actions::a_webhook_goes_over_tls("a_webhook_goes_over_tls").await;
}
