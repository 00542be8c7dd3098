//! Creates what replication into `here` needs and is not there yet: replica tables, the state
//! table with its control record, the dead-letter queue. Changes nothing that exists.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::operation::create_table::builders::CreateTableFluentBuilder;
use aws_sdk_dynamodb::types::{
    AttributeDefinition, BillingMode, GlobalSecondaryIndex, KeySchemaElement, KeyType,
    LocalSecondaryIndex, PointInTimeRecoverySpecification, PointInTimeRecoveryStatus,
    ProvisionedThroughput, ScalarAttributeType, StreamSpecification, StreamViewType,
    TableDescription, TableStatus,
};
use aws_sdk_sqs::types::QueueAttributeName;

use crate::config::Table;
use crate::config::read::Loaded;
use crate::dead_letter::sqs::Queue;
use crate::dynamo::clock::{host_ms, rfc3339};
use crate::dynamo::table::{describe, enabled_stream, primary_key, show_key};
use crate::dynamo::{RegionClients, Regions};
use crate::error::{Class, Failure, Fault, Operation, classify, source_chain};
use crate::jobs::failback::store::KEY;
use crate::lease::control::{copy_for, newest};
use crate::lease::row::{ControlRow, KEY_ATTRIBUTE};
use crate::lease::table::StateTable;
use crate::run::start::{Standing, check_keys, check_stream, find_standing, unusable};

/// Longest wait for a table to become active.
const ACTIVE_WITHIN: Duration = Duration::from_secs(300);
const ACTIVE_POLL: Duration = Duration::from_millis(200);
const RECOVERY_POLL: Duration = Duration::from_secs(1);
/// 14 days, the longest SQS keeps a message: a dead letter waits for a person.
const RETENTION_SECONDS: &str = "1209600";
/// Long enough to repair a key and delete its letter before anybody else sees it.
const VISIBILITY_SECONDS: &str = "300";

/// What is to be done, and what was found.
pub struct Plan {
    /// What would be created, in order.
    pub steps: Vec<Step>,
    /// What exists and is left alone, and what a person should know.
    pub notes: Vec<String>,
}

/// One thing to create.
pub struct Step {
    /// One line for a person.
    pub text: String,
    action: Action,
}

enum Action {
    Replica {
        client: Client,
        request: Box<CreateTableFluentBuilder>,
        name: String,
    },
    /// A table with one key of this name, a string.
    Keyed {
        client: Client,
        name: String,
        key: &'static str,
    },
    Recovery {
        client: Client,
        name: String,
    },
    Control {
        state: StateTable,
        row: Box<ControlRow>,
    },
    Queue(Box<Queue>),
}

/// How far applying a plan came.
pub struct Applied {
    /// What exists now, in the words of the plan.
    pub done: Vec<String>,
    /// What came up on the way.
    pub notes: Vec<String>,
    /// The step that failed, if one did. The steps after it were not tried.
    pub failed: Option<Failure>,
}

/// Looks at both regions and says what is missing in `here`. Changes nothing.
///
/// # Errors
/// What makes replication impossible: a source without a stream, keys that differ, a region that
/// does not answer.
pub async fn plan(loaded: &Loaded, regions: &Regions) -> Result<Plan, Failure> {
    let config = &loaded.config;
    let mut plan = Plan {
        steps: Vec::new(),
        notes: Vec::new(),
    };
    let standing = find_standing(config, &loaded.here, regions).await?;
    let active = standing.active.clone();
    let (Some(source), Some(target)) = (regions.get(&active), regions.get(&loaded.here)) else {
        return Err(Failure::new(
            format!("Region {active} is not known"),
            "The control record names a region that this configuration lacks",
            format!("Add [regions.{active}] to the configuration"),
        ));
    };
    if active == loaded.here {
        plan.notes.push(format!(
            "{active} is the active region: its tables are the sources and are left alone"
        ));
    } else {
        for table in &config.tables {
            plan_replica(&mut plan, table, source, target).await?;
        }
    }
    plan_state(&mut plan, loaded, target, &standing).await?;
    plan_failback(&mut plan, loaded, target).await?;
    if let Some(url) = &config.dead_letters.queue_url {
        plan_queue(
            &mut plan,
            config.dead_letters.endpoint_url.as_deref(),
            url,
            target,
        )
        .await?;
    }
    Ok(plan)
}

async fn plan_replica(
    plan: &mut Plan,
    table: &Table,
    source: &RegionClients,
    target: &RegionClients,
) -> Result<(), Failure> {
    let from_name = table.name_in(&source.label);
    let name = table.name_in(&target.label);
    let from = describe(&source.tables, from_name)
        .await
        .map_err(|fault| unusable(source, from_name, &fault))?
        .ok_or_else(|| {
            Failure::new(
                format!("There is no table {from_name} in {} ({})", source.label, source.endpoint),
                "It is the source, and a replica is made after it",
                "Create the table, or correct tables[].name (or tables[].names) in the configuration",
            )
        })?;
    check_stream(source, &from)?;
    let existing = describe(&target.tables, name)
        .await
        .map_err(|fault| unusable(target, name, &fault))?;
    if let Some(to) = existing {
        check_keys((source, &from), (target, &to))?;
        plan.notes
            .push(format!("table {name} exists in {}", target.label));
        if !matches!(
            enabled_stream(&to),
            Some((_, Some(StreamViewType::NewAndOldImages)))
        ) {
            plan.notes.push(format!(
                "table {name} in {} has no stream of NEW_AND_OLD_IMAGES: after a failover its changes could not flow back",
                target.label
            ));
        }
        return Ok(());
    }
    let request = replica_request(&target.tables, name, &from).map_err(|why| {
        Failure::new(
            format!("A replica of {from_name} could not be planned"),
            why,
            "Report this with the output of `aws dynamodb describe-table`",
        )
    })?;
    plan.steps.push(Step {
        text: format!(
            "create table {name} in {} like {from_name} in {}: key {}; {}; {} GSI, {} LSI; stream NEW_AND_OLD_IMAGES; TTL off",
            target.label,
            source.label,
            show_key(&primary_key(&from)),
            billing(&from).as_str(),
            from.global_secondary_indexes().len(),
            from.local_secondary_indexes().len(),
        ),
        action: Action::Replica {
            client: target.tables.clone(),
            request: Box::new(request),
            name: name.to_owned(),
        },
    });
    Ok(())
}

/// On-demand unless the source has provisioned throughput.
fn billing(table: &TableDescription) -> BillingMode {
    let mode = table
        .billing_mode_summary()
        .and_then(|summary| summary.billing_mode());
    match mode {
        Some(mode) => mode.clone(),
        None => match throughput(table.provisioned_throughput()) {
            Some(_) => BillingMode::Provisioned,
            None => BillingMode::PayPerRequest,
        },
    }
}

fn throughput(
    description: Option<&aws_sdk_dynamodb::types::ProvisionedThroughputDescription>,
) -> Option<ProvisionedThroughput> {
    let description = description?;
    let (read, write) = (
        description.read_capacity_units()?,
        description.write_capacity_units()?,
    );
    if read < 1 || write < 1 {
        return None;
    }
    ProvisionedThroughput::builder()
        .read_capacity_units(read)
        .write_capacity_units(write)
        .build()
        .ok()
}

/// The request that creates `name` like the table `from`.
fn replica_request(
    client: &Client,
    name: &str,
    from: &TableDescription,
) -> Result<CreateTableFluentBuilder, String> {
    let unbuilt = |error: aws_sdk_dynamodb::error::BuildError| source_chain(Some(&error));
    let mode = billing(from);
    let provisioned = mode == BillingMode::Provisioned;
    let mut request = client
        .create_table()
        .table_name(name)
        .set_attribute_definitions(from.attribute_definitions.clone())
        .set_key_schema(from.key_schema.clone())
        .billing_mode(mode)
        .stream_specification(
            StreamSpecification::builder()
                .stream_enabled(true)
                .stream_view_type(StreamViewType::NewAndOldImages)
                .build()
                .map_err(unbuilt)?,
        );
    if provisioned {
        request = request.set_provisioned_throughput(throughput(from.provisioned_throughput()));
    }
    for index in from.local_secondary_indexes() {
        request = request.local_secondary_indexes(
            LocalSecondaryIndex::builder()
                .set_index_name(index.index_name.clone())
                .set_key_schema(index.key_schema.clone())
                .set_projection(index.projection.clone())
                .build()
                .map_err(unbuilt)?,
        );
    }
    for index in from.global_secondary_indexes() {
        let mut copy = GlobalSecondaryIndex::builder()
            .set_index_name(index.index_name.clone())
            .set_key_schema(index.key_schema.clone())
            .set_projection(index.projection.clone());
        if provisioned {
            copy = copy.set_provisioned_throughput(throughput(index.provisioned_throughput()));
        }
        request = request.global_secondary_indexes(copy.build().map_err(unbuilt)?);
    }
    Ok(request)
}

async fn plan_state(
    plan: &mut Plan,
    loaded: &Loaded,
    target: &RegionClients,
    standing: &Standing,
) -> Result<(), Failure> {
    let (active, epoch) = (&standing.active, standing.epoch);
    let state = StateTable::new(target.tables.clone(), loaded.config.state_table());
    let name = state.name().to_owned();
    let existing = describe(&target.tables, &name)
        .await
        .map_err(|fault| unusable(target, &name, &fault))?;
    let control = match &existing {
        None => {
            plan.steps.push(Step {
                text: format!("create state table {name} in {}: on-demand", target.label),
                action: Action::Keyed {
                    client: target.tables.clone(),
                    name: name.clone(),
                    key: KEY_ATTRIBUTE,
                },
            });
            plan.steps.push(recovery_step(target, &name));
            None
        }
        Some(table) => {
            let key = primary_key(table);
            if key.len() != 1 || key[0].name != KEY_ATTRIBUTE || key[0].kind != "S" {
                return Err(Failure::new(
                    format!("Table {name} in {} is no state table", target.label),
                    format!(
                        "Its key is {}, and a state table's is {KEY_ATTRIBUTE} (S, HASH)",
                        show_key(&key)
                    ),
                    "Name another table in leases.table",
                ));
            }
            plan.notes
                .push(format!("state table {name} exists in {}", target.label));
            // A run that stopped between the two left the table without it.
            if lacks_recovery(&target.tables, &name)
                .await
                .map_err(|fault| unusable(target, &name, &fault))?
            {
                plan.steps.push(recovery_step(target, &name));
            }
            state
                .control()
                .await
                .map_err(|fault| unusable(target, &name, &fault))?
        }
    };
    match control {
        Some(control) => plan.notes.push(format!(
            "control record exists: active {}, epoch {}",
            control.active, control.epoch
        )),
        None => {
            let at = rfc3339(host_ms());
            // Where there is one already, what it says of this region counts here, too.
            let known = newest(standing.records.values(), active, epoch);
            let copy = known.and_then(|known| copy_for(&loaded.here, standing.part, known, None));
            let row = copy.unwrap_or_else(|| {
                let by = "farshore provision";
                let mut row = ControlRow::first(&loaded.config.group, active, by, at);
                row.epoch = epoch;
                row.epoch_label = format!("{epoch}-{active}");
                row
            });
            plan.steps.push(Step {
                text: format!(
                    "write the control record of group {} in {}: active {active}, epoch {epoch}",
                    loaded.config.group, target.label
                ),
                action: Action::Control {
                    state,
                    row: Box::new(row),
                },
            });
        }
    }
    Ok(())
}

/// The table in which a region keeps what the way home needs: there before anybody needs it.
async fn plan_failback(
    plan: &mut Plan,
    loaded: &Loaded,
    target: &RegionClients,
) -> Result<(), Failure> {
    let name = loaded.config.failback_table();
    let existing = describe(&target.tables, &name)
        .await
        .map_err(|fault| unusable(target, &name, &fault))?;
    let Some(table) = existing else {
        plan.steps.push(Step {
            text: format!(
                "create failback table {name} in {}: on-demand",
                target.label
            ),
            action: Action::Keyed {
                client: target.tables.clone(),
                name: name.clone(),
                key: KEY,
            },
        });
        plan.steps.push(recovery_step(target, &name));
        return Ok(());
    };
    let key = primary_key(&table);
    if key.len() != 1 || key[0].name != KEY || key[0].kind != "S" {
        return Err(Failure::new(
            format!("Table {name} in {} is no failback table", target.label),
            format!(
                "Its key is {}, and a failback table's is {KEY} (S, HASH)",
                show_key(&key)
            ),
            "Name another state table in leases.table: the failback table is named after it",
        ));
    }
    plan.notes
        .push(format!("failback table {name} exists in {}", target.label));
    if lacks_recovery(&target.tables, &name)
        .await
        .map_err(|fault| unusable(target, &name, &fault))?
    {
        plan.steps.push(recovery_step(target, &name));
    }
    Ok(())
}

fn recovery_step(target: &RegionClients, name: &str) -> Step {
    Step {
        text: format!(
            "turn on point-in-time recovery of {name} in {}",
            target.label
        ),
        action: Action::Recovery {
            client: target.tables.clone(),
            name: name.to_owned(),
        },
    }
}

/// Whether a table is known to have no point-in-time recovery. Servers other than AWS may not know
/// the call.
async fn lacks_recovery(client: &Client, name: &str) -> Result<bool, Fault> {
    let answer = client
        .describe_continuous_backups()
        .table_name(name)
        .send()
        .await;
    match answer {
        Ok(answer) => Ok(answer
            .continuous_backups_description
            .and_then(|backups| backups.point_in_time_recovery_description)
            .and_then(|recovery| recovery.point_in_time_recovery_status)
            .is_some_and(|status| status == PointInTimeRecoveryStatus::Disabled)),
        Err(error) => match classify(Operation::Provision, &error) {
            fault if fault.code == "UnknownOperationException" => Ok(false),
            fault => Err(fault),
        },
    }
}

async fn plan_queue(
    plan: &mut Plan,
    endpoint_url: Option<&str>,
    url: &str,
    target: &RegionClients,
) -> Result<(), Failure> {
    let queue = Queue::new(target, url, endpoint_url);
    let exists = queue.exists().await.map_err(|fault| {
        Failure::from_fault(
            format!("The dead-letter queue {url} could not be reached"),
            &fault,
        )
    })?;
    if exists {
        plan.notes.push(format!("queue {} exists", queue.name()));
    } else {
        plan.steps.push(Step {
            text: format!(
                "create queue {}: 14 days, encrypted by SQS, invisible for {VISIBILITY_SECONDS} s once received",
                queue.name()
            ),
            action: Action::Queue(Box::new(queue)),
        });
    }
    Ok(())
}

/// Carries a plan out, step by step, and stops at the first that fails.
pub async fn apply(plan: Plan) -> Applied {
    let mut applied = Applied {
        done: Vec::new(),
        notes: Vec::new(),
        failed: None,
    };
    for step in plan.steps {
        match run(step.action).await {
            Ok(note) => {
                applied.done.push(step.text);
                applied.notes.extend(note);
            }
            Err(fault) => {
                let what = format!("Provisioning stopped at: {}", step.text);
                let mut failure = Failure::from_fault(what, &fault);
                failure.next = format!(
                    "{}; then run the command again: it goes on with what is missing",
                    failure.next.trim_end_matches('.')
                );
                applied.failed = Some(failure);
                break;
            }
        }
    }
    applied
}

/// Runs one step. Returns a note where something is other than asked.
async fn run(action: Action) -> Result<Option<String>, Fault> {
    let provision = Operation::Provision;
    match action {
        Action::Replica {
            client,
            request,
            name,
        } => {
            request
                .send()
                .await
                .map_err(|error| classify(provision, &error))?;
            wait_until_active(&client, &name).await.map(|()| None)
        }
        Action::Keyed { client, name, key } => {
            let request = keyed_request(&client, &name, key).map_err(|error| {
                Fault::own(
                    provision,
                    Class::Unknown,
                    "request not built",
                    error.to_string(),
                )
            })?;
            request
                .send()
                .await
                .map_err(|error| classify(provision, &error))?;
            wait_until_active(&client, &name).await.map(|()| None)
        }
        Action::Recovery { client, name } => turn_on_recovery(&client, &name).await,
        Action::Control { state, row } => state.create(row.as_ref()).await.map(|_| None),
        Action::Queue(queue) => create_queue(&queue).await,
    }
}

fn keyed_request(
    client: &Client,
    name: &str,
    key: &str,
) -> Result<CreateTableFluentBuilder, aws_sdk_dynamodb::error::BuildError> {
    Ok(client
        .create_table()
        .table_name(name)
        .attribute_definitions(
            AttributeDefinition::builder()
                .attribute_name(key)
                .attribute_type(ScalarAttributeType::S)
                .build()?,
        )
        .key_schema(
            KeySchemaElement::builder()
                .attribute_name(key)
                .key_type(KeyType::Hash)
                .build()?,
        )
        .billing_mode(BillingMode::PayPerRequest))
}

async fn turn_on_recovery(client: &Client, name: &str) -> Result<Option<String>, Fault> {
    let specification = PointInTimeRecoverySpecification::builder()
        .point_in_time_recovery_enabled(true)
        .build()
        .map_err(|error| {
            Fault::own(
                Operation::Provision,
                Class::Unknown,
                "request not built",
                error.to_string(),
            )
        })?;
    let began = Instant::now();
    loop {
        let answer = client
            .update_continuous_backups()
            .table_name(name)
            .point_in_time_recovery_specification(specification.clone())
            .send()
            .await;
        let fault = match answer {
            Ok(_) => return Ok(None),
            Err(error) => classify(Operation::Provision, &error),
        };
        match fault.code.as_str() {
            // Servers other than AWS may not know the call; AWS always does.
            "UnknownOperationException" => {
                return Ok(Some(format!(
                    "point-in-time recovery of {name} is off: this endpoint does not know it"
                )));
            }
            // AWS enables the backups of a new table behind the scenes, and refuses until it has.
            "ContinuousBackupsUnavailableException" if began.elapsed() < ACTIVE_WITHIN => {
                tokio::time::sleep(RECOVERY_POLL).await;
            }
            _ => return Err(fault),
        }
    }
}

async fn create_queue(queue: &Queue) -> Result<Option<String>, Fault> {
    let mut attributes = HashMap::from([
        (
            QueueAttributeName::MessageRetentionPeriod,
            RETENTION_SECONDS.to_owned(),
        ),
        (
            QueueAttributeName::VisibilityTimeout,
            VISIBILITY_SECONDS.to_owned(),
        ),
        (QueueAttributeName::SqsManagedSseEnabled, "true".to_owned()),
    ]);
    if queue.name().ends_with(".fifo") {
        attributes.insert(QueueAttributeName::FifoQueue, "true".to_owned());
    }
    let answer = queue
        .client()
        .create_queue()
        .queue_name(queue.name())
        .set_attributes(Some(attributes))
        .send()
        .await
        .map_err(|error| classify(Operation::Provision, &error))?;
    let url = answer.queue_url.unwrap_or_default();
    Ok((url != queue.url()).then(|| {
        format!(
            "the queue's URL is {url}, and the configuration says {}: correct dead_letters.queue_url",
            queue.url()
        )
    }))
}

async fn wait_until_active(client: &Client, name: &str) -> Result<(), Fault> {
    let waited = tokio::time::timeout(ACTIVE_WITHIN, async {
        loop {
            // A table just created may not be shown yet.
            let status = describe(client, name).await?.and_then(|t| t.table_status);
            if status == Some(TableStatus::Active) {
                return Ok(());
            }
            tokio::time::sleep(ACTIVE_POLL).await;
        }
    })
    .await;
    waited.unwrap_or_else(|_| {
        Err(Fault::own(
            Operation::Provision,
            Class::Service,
            "not active in time",
            format!("table {name} was created and is not active after 5 minutes"),
        ))
    })
}
