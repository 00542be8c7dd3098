//! What comes after the fence: actions, time to live.

use crate::common::eventually;
use crate::failover_support::{A, B, Group, LABELS, command};
use crate::{PATIENCE, common, fail_over, failover_support};

/// Actions run once, in their order, after the fence; one that is required and fails stops the command, and
/// the same command goes on with it, also when it was killed in the middle of one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_required_action_that_fails_stops_and_the_same_command_goes_on() {
    let group = Group::new(14, 2).await;
    group.provision(&[B]);
    let worker = group.worker(B).await;
    group.put(A, "k", 1).await;
    group.converge(A, B, 1).await;
    let file = |name: &str| group.temp.path().join(name).display().to_string();
    let (first, gate, told) = (file("first"), file("gate"), file("told"));
    let actions = format!(
        r#"
[[actions]]
kind = "command"
name = "first"
command = ["/bin/sh", "-c", "echo done >> {first}"]
[[actions]]
kind = "command"
name = "second"
retries = 0
command = ["/bin/sh", "-c", "test -e {gate}"]
[[actions]]
kind = "command"
name = "third"
command = ["/bin/sh", "-c", "echo {{region}} {{epoch}} >> {told}"]
"#
    );
    let config = group.config(B, &actions);
    let (code, answer, said) = fail_over(&config, &["--to", LABELS[B]]).await;
    assert_eq!(code, Some(1), "{answer:#}\n{said}");
    assert!(
        answer["stoppedAt"].as_str().unwrap().contains("second"),
        "{answer:#}"
    );
    let acted = answer["actions"].as_array().unwrap();
    let standings: Vec<_> = acted.iter().map(|one| one["standing"].clone()).collect();
    assert_eq!(standings, ["done", "failed", "skipped"]);
    assert_eq!(group.told(B).await.unwrap().2, "actions");
    let active = async || {
        worker
            .get("/active")
            .await
            .is_some_and(|(code, _)| code == 200)
    };
    eventually("it serves, the fence is complete", PATIENCE, active).await;
    std::fs::write(group.temp.path().join("gate"), "open").unwrap();
    let path = config.to_str().unwrap().to_owned();
    let mut dying =
        common::binary::farshore(&["failover", "--to", LABELS[B], "--apply", "--config", &path]);
    dying.env("FARSHORE_TEST_CRASH", "failover-acted");
    let died = tokio::task::spawn_blocking(move || dying.output());
    assert_eq!(died.await.unwrap().unwrap().status.code(), None);
    let (code, answer, said) = fail_over(&config, &["--to", LABELS[B]]).await;
    assert_eq!(code, Some(0), "{answer:#}\n{said}");
    let text = |path: &str| std::fs::read_to_string(path).unwrap();
    assert_eq!(text(&first), "done\n", "it was done once");
    assert_eq!(text(&told), "us-west-2 2\n");
    assert!(worker.stop().await.success());
}

/// Time to live is turned on in the new active region though the old one cannot be asked any more, and what is
/// left to be done there is told.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn time_to_live_is_turned_on_while_the_old_region_is_away() {
    let mut group = Group::new(17, 2).await;
    let specification = aws_sdk_dynamodb::types::TimeToLiveSpecification::builder()
        .enabled(true)
        .attribute_name("expires")
        .build()
        .unwrap();
    let update = group.clients[A].update_time_to_live();
    let update = update.table_name(failover_support::TABLE);
    let update = update.time_to_live_specification(specification);
    update.send().await.unwrap();
    group.provision(&[B]);
    let worker = group.worker(B).await;
    let noted = async || !group.rows_of(B, "ttl").await.is_empty();
    eventually("it is noted", PATIENCE, noted).await;
    let refused = farshore::embedded::gateway::Outage::Refused;
    group.gateways[A].go_away(refused).await;
    let config = group.config(B, "");
    let (code, answer, said) = fail_over(&config, &["--to", LABELS[B]]).await;
    assert_eq!(code, Some(1), "{answer:#}\n{said}");
    assert_eq!(answer["ttl"][0]["attribute"], "expires", "{answer:#}");
    let left = answer["ttl"][0]["left"].as_array().unwrap();
    assert_eq!(left.len(), 1, "{answer:#}");
    assert!(
        left[0]["command"]
            .as_str()
            .unwrap()
            .contains("Enabled=false")
    );
    let asked = group.clients[B].describe_time_to_live();
    let asked = asked.table_name(failover_support::TABLE);
    let told = asked
        .send()
        .await
        .unwrap()
        .time_to_live_description
        .unwrap();
    assert_eq!(told.attribute_name.as_deref(), Some("expires"));
    assert!(worker.stop().await.success());
}

/// Time to live moves with the active region.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn time_to_live_is_turned_on_in_the_new_active_region_and_off_in_the_old() {
    let group = Group::new(15, 2).await;
    group.provision(&[B]);
    let worker = group.worker(B).await;
    let specification = aws_sdk_dynamodb::types::TimeToLiveSpecification::builder()
        .enabled(true)
        .attribute_name("expires")
        .build()
        .unwrap();
    let update = group.clients[A].update_time_to_live();
    let update = update.table_name(failover_support::TABLE);
    let update = update.time_to_live_specification(specification);
    update.send().await.unwrap();
    let config = group.config(B, "");
    let (_, plan, _) = command(&config, &["failover", "--to", LABELS[B]]).await;
    assert!(
        plan.contains("time to live of orders (expires): on in us-west-2"),
        "{plan}"
    );
    let (code, answer, said) = fail_over(&config, &["--to", LABELS[B]]).await;
    assert_eq!(code, Some(0), "{answer:#}\n{said}");
    for (region, on) in [(A, false), (B, true)] {
        let asked = group.clients[region].describe_time_to_live();
        let asked = asked
            .table_name(failover_support::TABLE)
            .send()
            .await
            .unwrap();
        let status = asked
            .time_to_live_description
            .unwrap()
            .time_to_live_status
            .unwrap();
        assert_eq!(
            status.as_str() == "ENABLED",
            on,
            "{}: {status:?}",
            LABELS[region]
        );
    }
    assert!(worker.stop().await.success());
}

/// A worker that starts in the region that was failed over from, and that nobody has told, never says that it is
/// the active one: what it found its role by counts from the first answer on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_starts_in_the_old_region_never_says_that_it_is_active() {
    let mut group = Group::new(18, 2).await;
    group.provision(&[A, B]);
    let worker = group.worker(B).await;
    group.put(A, "k", 1).await;
    group.converge(A, B, 1).await;
    let refused = farshore::embedded::gateway::Outage::Refused;
    group.gateways[A].go_away(refused).await;
    let config = group.config(B, "");
    let (_, answer, said) = fail_over(&config, &["--to", LABELS[B]]).await;
    assert_eq!(
        answer["untold"][0]["region"], LABELS[A],
        "{answer:#}\n{said}"
    );
    group.gateways[A].come_back().await;
    assert_eq!(group.told(A).await.unwrap().0, 1, "nobody has told it");
    let old = common::binary::Worker::start(&group.config(A, ""));
    let started = std::time::Instant::now();
    let mut answers = 0;
    while started.elapsed() < std::time::Duration::from_secs(4) {
        if let Some((code, body)) = old.get("/active").await {
            answers += 1;
            assert_eq!(code, 503, "{body}");
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    assert!(answers > 20, "{answers}");
    assert_eq!(group.told(A).await.unwrap().2, "quarantined");
    assert!(old.stop().await.success() && worker.stop().await.success());
}
