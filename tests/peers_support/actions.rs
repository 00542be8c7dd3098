//! The actions that call AWS, each against the service it calls; webhooks over TLS; and what DNS is told
//! to go by.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use aws_sdk_sqs::types::QueueAttributeName;
use farshore::actions::{Moment, Outcome, run_one};
use farshore::config::Config;
use farshore::config::read::parse;
use farshore::dynamo::Regions;
use serde_json::Value;
use tempfile::TempDir;

use super::sqs;
use crate::common::binary::{die_with_parent, spawn};
use crate::common::ministack::{Ministack, Ministacks, python, script};
use crate::common::stand::{SOURCE, TARGET};

/// The account of every ministack.
const ACCOUNT: &str = "000000000000";

/// A group with one action. Its regions are embedded ones: those have credentials that every server
/// here takes.
fn config(action: &str) -> Config {
    let text = format!(
        "group = \"orders\"\nactive = \"{SOURCE}\"\nhere = \"{TARGET}\"\n\
         [regions.{SOURCE}]\nendpoint_url = \"embedded\"\n[regions.{TARGET}]\nendpoint_url = \"embedded\"\n\
         [[tables]]\nname = \"orders\"\n[dead_letters]\ndirectory = \"/nonexistent\"\n[[actions]]\n{action}\n"
    );
    parse("farshore.toml", &text, &[]).unwrap().config
}

async fn run(action: &str, epoch: u64) -> Outcome {
    let config = config(action);
    let regions = Regions::connect(&config).await.unwrap();
    let moment = Moment {
        group: "orders",
        region: TARGET,
        previous: SOURCE,
        epoch,
        reason: "fire in \"AZ 1\"",
    };
    run_one(&config.actions[0], &moment, &regions).await
}

/// What boto3 is told by a call; every call is one line of Python.
fn boto3(server: &Ministack, region: &str, service: &str, call: &str) -> Value {
    let program = format!(
        "import boto3, json\nc = boto3.client({service:?}, endpoint_url={:?}, region_name={region:?}, \
         aws_access_key_id='test', aws_secret_access_key='test')\nprint(json.dumps(c.{call}, default=str))\n",
        server.url()
    );
    let answer = python().args(["-c", &program]).output().unwrap();
    let faults = String::from_utf8_lossy(&answer.stderr).into_owned();
    assert!(answer.status.success(), "{call}: {faults}");
    serde_json::from_slice(&answer.stdout).unwrap()
}

/// A parameter is made, and written over, in the new active region or in one that is named.
pub async fn a_parameter_says_where_the_active_region_is(peers: &Ministacks) {
    let action = format!(
        "kind = \"ssm_parameter\"\nparameter = \"/{{group}}/active\"\nvalue = \"{{region}}@{{epoch}}\"\nendpoint_url = {:?}\n",
        peers.target.url()
    );
    let held = |region: &str| {
        let get = "get_parameter(Name='/orders/active')";
        boto3(&peers.target, region, "ssm", get)["Parameter"].clone()
    };
    for epoch in [7, 8] {
        run(&action, epoch).await.result.unwrap();
        let parameter = held(TARGET);
        assert_eq!(parameter["Value"], format!("{TARGET}@{epoch}"));
        assert_eq!(parameter["Type"], "String");
    }
    run(&format!("{action}region = \"{{previous}}\"\n"), 9)
        .await
        .result
        .unwrap();
    assert_eq!(held(SOURCE)["Value"], format!("{TARGET}@9"));
    assert_eq!(held(TARGET)["Value"], format!("{TARGET}@8"));
    // Refused for what it is: not tried again.
    let outcome = run(&action.replace("/{group}/active", "aws/x"), 9).await;
    let failure = outcome.result.unwrap_err();
    assert!(failure.why.contains("PutParameter failed"), "{failure}");
    assert_eq!(outcome.attempts, 1, "{failure}");
}

/// A message arrives in a queue that has subscribed; of a FIFO topic once, however often it is sent.
pub async fn a_topic_tells_its_subscribers(peers: &Ministacks) {
    for (name, arrivals) in [("failover", 2), ("failover.fifo", 1)] {
        subscribe(peers, name).await;
        let arn = format!("arn:aws:sns:{{region}}:{ACCOUNT}:{name}");
        let action = format!(
            "kind = \"sns\"\ntopic_arn = {arn:?}\nsubject = \"{{group}} → {{region}}\"\nendpoint_url = {:?}\n",
            peers.target.url()
        );
        for _ in 0..2 {
            run(&action, 7).await.result.unwrap();
        }
        let messages = received(peers, name, arrivals).await;
        for message in messages {
            assert_eq!(message["Subject"], format!("orders ? {TARGET}"));
            let text = message["Message"].as_str().unwrap();
            assert!(
                text.contains("orders is active in us-west-2 since epoch 7"),
                "{text}"
            );
            assert!(text.contains("fire in \"AZ 1\""), "{text}");
        }
    }
    let action = format!(
        "kind = \"sns\"\ntopic_arn = \"arn:aws:sns:{{region}}:{ACCOUNT}:nobody\"\nmessage = \"x\"\nendpoint_url = {:?}\n",
        peers.target.url()
    );
    let outcome = run(&action, 7).await;
    let failure = outcome.result.unwrap_err();
    assert!(
        failure.why.contains("Publish failed: NotFound"),
        "{failure}"
    );
    assert!(
        failure.next.contains("Create what the action names"),
        "{failure}"
    );
    assert_eq!(outcome.attempts, 1);
}

/// What lies in a queue: `count` messages, and no more.
async fn received(peers: &Ministacks, name: &str, count: usize) -> Vec<Value> {
    let url = Ministack::queue_url(&peers.target.url(), name);
    let mut messages = Vec::new();
    // One answer may hold them all, or only some; after the last it is empty.
    for _ in 0..10 {
        let ask = sqs(peers).receive_message().queue_url(&url);
        let ask = ask.max_number_of_messages(10).visibility_timeout(60);
        let wait = i32::from(messages.len() < count);
        let answer = ask.wait_time_seconds(wait).send().await.unwrap();
        for message in answer.messages() {
            messages.push(serde_json::from_str(message.body().unwrap()).unwrap());
            // A FIFO queue gives nothing more of a group before its last message is gone.
            let delete = sqs(peers).delete_message().queue_url(&url);
            let handle = message.receipt_handle().unwrap();
            delete.receipt_handle(handle).send().await.unwrap();
        }
        if answer.messages().is_empty() && messages.len() >= count {
            break;
        }
    }
    assert_eq!(messages.len(), count, "{messages:?}");
    messages
}

/// A queue of the same name as the topic, subscribed to it.
async fn subscribe(peers: &Ministacks, name: &str) {
    let fifo = name.ends_with(".fifo");
    let mut create = sqs(peers).create_queue().queue_name(name);
    if fifo {
        create = create.attributes(QueueAttributeName::FifoQueue, "true");
    }
    create.send().await.unwrap();
    let attributes = if fifo {
        "Attributes={'FifoTopic': 'true'}"
    } else {
        "Attributes={}"
    };
    let call = format!("create_topic(Name={name:?}, {attributes})");
    let topic = boto3(&peers.target, TARGET, "sns", &call);
    let topic = topic["TopicArn"].as_str().unwrap();
    let queue = format!("arn:aws:sqs:{TARGET}:{ACCOUNT}:{name}");
    let call = format!("subscribe(TopicArn={topic:?}, Protocol='sqs', Endpoint={queue:?})");
    boto3(&peers.target, TARGET, "sns", &call);
}

/// A record is made, and written over; a zone that is not there is said plainly.
pub async fn a_record_points_to_the_active_region(peers: &Ministacks) {
    let zone = boto3(
        &peers.target,
        TARGET,
        "route53",
        "create_hosted_zone(Name='example.com', CallerReference='a')",
    );
    let path = zone["HostedZone"]["Id"].as_str().unwrap();
    let id = path.rsplit('/').next().unwrap();
    let action = format!(
        "kind = \"route53_record\"\nhosted_zone_id = {id:?}\nrecord = \"{{group}}.example.com\"\nrecord_type = \"CNAME\"\n\
         ttl = \"20s\"\nvalue = \"e{{epoch}}.{{region}}.example.com\"\nendpoint_url = {:?}\n",
        peers.target.url()
    );
    let list = format!("list_resource_record_sets(HostedZoneId={id:?})");
    for epoch in [7, 7, 8] {
        run(&action, epoch).await.result.unwrap();
        let records = boto3(&peers.target, TARGET, "route53", &list);
        let records = records["ResourceRecordSets"].as_array().unwrap();
        let ours: Vec<&Value> = records
            .iter()
            .filter(|record| record["Type"] == "CNAME")
            .collect();
        let [record] = &ours[..] else {
            panic!("{records:?}")
        };
        assert_eq!(
            (&record["Name"], &record["TTL"]),
            (&"orders.example.com.".into(), &20.into())
        );
        let value = &record["ResourceRecords"][0]["Value"];
        assert_eq!(value, &format!("e{epoch}.{TARGET}.example.com"));
    }
    let outcome = run(&action.replace(id, "ZNOBODY"), 8).await;
    let failure = outcome.result.unwrap_err();
    assert!(
        failure
            .why
            .contains("ChangeResourceRecordSets failed: NoSuchHostedZone"),
        "{failure}"
    );
    assert_eq!(outcome.attempts, 1);
}

/// A service that is away is asked again; the action fails in its time.
pub async fn a_service_that_is_away_is_asked_again(peers: &Ministacks) {
    let nowhere = crate::common::stand::free_port();
    let action = format!(
        "kind = \"ssm_parameter\"\nparameter = \"/a\"\nvalue = \"x\"\nretries = 1\nendpoint_url = \"http://127.0.0.1:{nowhere}\"\n"
    );
    let outcome = run(&action, 7).await;
    let failure = outcome.result.unwrap_err();
    assert!(
        failure.why.contains("PutParameter failed: no connection"),
        "{failure}"
    );
    assert_eq!(outcome.attempts, 2);
    let back = action.replace(
        &format!("127.0.0.1:{nowhere}"),
        peers.target.url().trim_start_matches("http://"),
    );
    run(&back, 7).await.result.unwrap();
}

/// What `config/route53-health-check.json` describes is taken by Route 53, and asks for `/active`.
pub async fn the_health_checks_of_the_example_are_taken(peers: &Ministacks) {
    let answer = script("route53.py")
        .arg(peers.target.url())
        .output()
        .unwrap();
    let faults = String::from_utf8_lossy(&answer.stderr).into_owned();
    assert!(answer.status.success(), "{faults}");
    let made: Value = serde_json::from_slice(&answer.stdout).unwrap();
    let checks = made["checks"].as_object().unwrap();
    let records = made["records"].as_array().unwrap();
    assert_eq!((checks.len(), records.len()), (2, 2));
    assert_eq!(
        made["resources"], 4,
        "a resource of another kind was not tried"
    );
    for (record, label) in records.iter().zip([SOURCE, TARGET]) {
        let check = &checks[record["HealthCheckId"].as_str().unwrap()];
        assert_eq!(check["ResourcePath"], "/active");
        assert_eq!(
            check["FullyQualifiedDomainName"],
            format!("farshore.{label}.example.com")
        );
        let value = &record["ResourceRecords"][0]["Value"];
        assert_eq!(value, &format!("orders.{label}.example.com"));
    }
}

/// A certificate for `localhost` that nobody signed but itself, and its key.
fn self_signed(temp: &TempDir, name: &str) -> (PathBuf, PathBuf) {
    let path = |end: &str| temp.path().join(format!("{name}.{end}"));
    let (asked, certificate, key) = (path("conf"), path("pem"), path("key"));
    let text = format!(
        "[req]\nprompt = no\ndistinguished_name = who\nx509_extensions = what\n[who]\nCN = {name}\n\
         [what]\nsubjectAltName = DNS:localhost\nbasicConstraints = critical, CA:FALSE\n"
    );
    std::fs::write(&asked, text).unwrap();
    let made = Command::new("openssl")
        .args([
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
        ])
        .args(["-nodes", "-days", "2", "-config"])
        .arg(asked)
        .arg("-keyout")
        .arg(&key)
        .arg("-out")
        .arg(&certificate)
        .output()
        .expect("openssl makes the server's certificate");
    let log = String::from_utf8_lossy(&made.stderr).into_owned();
    assert!(made.status.success(), "{log}");
    (certificate, key)
}

/// Tells the second process of [`a_webhook_goes_over_tls`] where the server is.
const HTTPS: &str = "FARSHORE_TEST_HTTPS";

/// A webhook reaches a server over TLS whose authority this host trusts, and no other. The trust of a
/// process is fixed by its environment, so the hook is sent by processes of their own.
pub async fn a_webhook_goes_over_tls(test: &str) {
    if let Ok(url) = std::env::var(HTTPS) {
        let outcome = run(
            &format!("kind = \"webhook\"\nurl = {url:?}\nretries = 0\n"),
            7,
        )
        .await;
        return outcome.result.unwrap();
    }
    let temp = tempfile::tempdir().unwrap();
    let [(certificate, key), (other, _)] = ["server", "other"].map(|name| self_signed(&temp, name));
    let mut command = script("https.py");
    command.arg(&certificate).arg(&key);
    die_with_parent(&mut command);
    command.stdout(Stdio::piped());
    let mut server = Server(spawn(command).unwrap());
    let mut says = BufReader::new(server.0.stdout.take().unwrap()).lines();
    let port: u16 = says.next().unwrap().unwrap().parse().unwrap();
    let url = format!("https://localhost:{port}/hook");
    let send = |trusted: &std::path::Path| {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", test, "--ignored"])
            .env(HTTPS, &url)
            .env("SSL_CERT_FILE", trusted)
            .output()
            .unwrap()
    };
    let sent = send(&certificate);
    let log = String::from_utf8_lossy(&sent.stdout).into_owned();
    assert!(sent.status.success() && log.contains("1 passed"), "{log}");
    let came: Value = serde_json::from_str(&says.next().unwrap().unwrap()).unwrap();
    assert_eq!(came["headers"]["content-type"], "application/json");
    let body: Value = serde_json::from_str(came["body"].as_str().unwrap()).unwrap();
    assert_eq!(body["epoch"], 7);
    // Another authority: nothing is sent.
    let refused = send(&other);
    let log = String::from_utf8_lossy(&refused.stdout).into_owned();
    assert!(
        !refused.status.success() && log.contains("invalid peer certificate"),
        "{log}"
    );
}

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
