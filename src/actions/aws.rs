//! The actions that call AWS: a parameter, a message, a DNS record.

use aws_sdk_route53::error::BuildError;
use aws_sdk_route53::types::{
    Change, ChangeAction, ChangeBatch, ResourceRecord, ResourceRecordSet, RrType,
};
use aws_sdk_ssm::types::ParameterType;

use super::template::plain;
use super::{Moment, Trouble, delivery_id};
use crate::config::Action;
use crate::config::actions::{Kind, RecordType, Route53Record, Sns, SsmParameter, topic_region};
use crate::dynamo::{RegionClients, Regions};
use crate::error::{Class, Fault, Operation, classify};

/// SNS refuses a longer subject.
const SUBJECT_CHARS_MAX: usize = 100;

/// Makes the call of `action`.
pub(super) async fn call(
    action: &Action,
    moment: &Moment<'_>,
    regions: &Regions,
) -> Result<(), Trouble> {
    match &action.kind {
        Kind::SsmParameter(parameter) => put_parameter(parameter, action, moment, regions).await,
        Kind::Sns(sns) => publish(sns, action, moment, regions).await,
        Kind::Route53Record(record) => change_record(record, action, moment, regions).await,
        Kind::File(_) | Kind::Command { .. } | Kind::Webhook(_) => Err(Trouble::lasting(
            "It is no action that calls AWS",
            "Report this to Farshore's developers",
        )),
    }
}

fn region<'a>(regions: &'a Regions, label: &str) -> Result<&'a RegionClients, Trouble> {
    regions.get(label).ok_or_else(|| {
        Trouble::lasting(
            format!("There is no region `{label}` in the configuration"),
            format!("Add [regions.{label}], or name another region"),
        )
    })
}

/// Writes over whatever the parameter holds.
async fn put_parameter(
    parameter: &SsmParameter,
    action: &Action,
    moment: &Moment<'_>,
    regions: &Regions,
) -> Result<(), Trouble> {
    let place = region(regions, &parameter.region.fill(moment))?;
    let client = place.ssm(parameter.endpoint_url.as_deref(), action.timeout);
    let put = client
        .put_parameter()
        .name(parameter.parameter.fill(moment));
    let put = put.value(parameter.value.fill(moment)).overwrite(true);
    let answer = put.r#type(ParameterType::String).send().await;
    let refused = |error| trouble(&classify(Operation::PutParameter, &error));
    answer.map(|_| ()).map_err(refused)
}

/// Publishes once more what was perhaps published: a FIFO topic drops the second within five minutes,
/// and of any other whoever receives it sees the epoch.
async fn publish(
    sns: &Sns,
    action: &Action,
    moment: &Moment<'_>,
    regions: &Regions,
) -> Result<(), Trouble> {
    let place = region(regions, moment.region)?;
    let arn = sns.topic_arn.fill(moment);
    let Some(topic_region) = topic_region(&arn) else {
        return Err(Trouble::lasting(
            format!("`{arn}` is no ARN of a topic"),
            "Correct `topic_arn`",
        ));
    };
    let client = place.sns(topic_region, sns.endpoint_url.as_deref(), action.timeout);
    let message = match &sns.message {
        Some(message) => message.fill(moment),
        None => moment.sentence(),
    };
    let mut publish = client.publish().topic_arn(&arn).message(message);
    if let Some(subject) = &sns.subject {
        publish = publish.subject(mail_subject(&subject.fill(moment)));
    }
    if arn.ends_with(".fifo") {
        publish = publish
            .message_group_id(moment.group)
            .message_deduplication_id(delivery_id(&action.name, moment));
    }
    let refused = |error| trouble(&classify(Operation::Publish, &error));
    publish.send().await.map(|_| ()).map_err(refused)
}

/// A subject as SNS takes it: one line of ASCII, not too long.
fn mail_subject(text: &str) -> String {
    plain(text)
        .chars()
        .map(|c| if c.is_ascii() { c } else { '?' })
        .take(SUBJECT_CHARS_MAX)
        .collect()
}

/// Creates the record or writes over it. It is done once Route 53 has taken it; its servers know it
/// within a minute.
async fn change_record(
    record: &Route53Record,
    action: &Action,
    moment: &Moment<'_>,
    regions: &Regions,
) -> Result<(), Trouble> {
    let place = region(regions, moment.region)?;
    let client = place.route53(record.endpoint_url.as_deref(), action.timeout);
    let batch = batch(record, moment).map_err(|error| {
        Trouble::lasting(
            format!("The change could not be made: {error}"),
            "Correct `record` and `value`",
        )
    })?;
    let change = client.change_resource_record_sets();
    let change = change.hosted_zone_id(&record.hosted_zone_id);
    let refused = |error| trouble(&classify(Operation::ChangeRecord, &error));
    let answer = change.change_batch(batch).send().await;
    answer.map(|_| ()).map_err(refused)
}

fn batch(record: &Route53Record, moment: &Moment<'_>) -> Result<ChangeBatch, BuildError> {
    let value = ResourceRecord::builder().value(record.value.fill(moment));
    let set = ResourceRecordSet::builder()
        .name(record.record.fill(moment))
        .r#type(match record.record_type {
            RecordType::A => RrType::A,
            RecordType::Aaaa => RrType::Aaaa,
            RecordType::Cname => RrType::Cname,
        })
        .ttl(i64::try_from(record.ttl.as_secs()).unwrap_or(i64::MAX))
        .resource_records(value.build()?)
        .build()?;
    let change = Change::builder()
        .action(ChangeAction::Upsert)
        .resource_record_set(set)
        .build()?;
    let comment = format!("Farshore, group {}, epoch {}", moment.group, moment.epoch);
    ChangeBatch::builder()
        .comment(comment)
        .changes(change)
        .build()
}

fn trouble(fault: &Fault) -> Trouble {
    let why = fault.to_string();
    match fault.class {
        Class::Throttled | Class::Service | Class::Unknown => Trouble::passing(
            why,
            "Look at the service's health page; the same command goes on from here",
        ),
        Class::Network => Trouble::passing(
            why,
            "Check that this host reaches the service, and `endpoint_url` where it is set",
        ),
        Class::Credentials => Trouble::lasting(why, fault.next_step()),
        Class::Access => Trouble::lasting(
            why,
            format!("Allow {} for this role in IAM", permission(fault.operation)),
        ),
        Class::Kms => Trouble::lasting(why, "Enable the KMS key and let this role use it"),
        Class::NotFound => Trouble::lasting(
            why,
            "Create what the action names, or correct its name and region",
        ),
        Class::Validation
        | Class::CollectionFull
        | Class::Condition
        | Class::ExpiredIterator
        | Class::Trimmed
        | Class::Undecodable => Trouble::lasting(why, "Correct the action as the service says"),
    }
}

const fn permission(operation: Operation) -> &'static str {
    match operation {
        Operation::PutParameter => "ssm:PutParameter",
        Operation::Publish => "sns:Publish",
        Operation::ChangeRecord => "route53:ChangeResourceRecordSets",
        _ => "the call",
    }
}
