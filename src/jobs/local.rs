//! A two-region set-up on one machine: what an embedded region needs before `run` can feed it.
//!
//! An embedded region begins empty and ends with the process, so `run` makes what is missing
//! there by itself: source tables with the key `id` (S), and what `provision` makes.

use aws_sdk_dynamodb::types::{
    AttributeDefinition, BillingMode, KeySchemaElement, KeyType, ScalarAttributeType,
    StreamSpecification, StreamViewType,
};

use super::provision::{apply, plan};
use crate::config::read::Loaded;
use crate::dynamo::table::describe;
use crate::dynamo::{RegionClients, Regions};
use crate::error::{Failure, Fault, Operation, classify, source_chain};

/// Makes source tables in embedded regions and provisions an embedded `here`.
///
/// # Errors
/// What could not be made.
pub async fn prepare(loaded: &Loaded, regions: &Regions) -> Result<(), Failure> {
    let config = &loaded.config;
    for region in regions.iter().filter(|region| region.embedded) {
        tracing::info!(
            region = region.label,
            endpoint = region.endpoint,
            "embedded region: it lives in this process, and ends with it"
        );
    }
    if let Some(source) = regions.get(&config.active)
        && source.embedded
    {
        for table in &config.tables {
            let name = table.name_in(&source.label);
            let failed = |fault: &Fault| {
                Failure::from_fault(
                    format!(
                        "Table {name} could not be made in the embedded region {}",
                        source.label
                    ),
                    fault,
                )
            };
            let exists = describe(&source.tables, name)
                .await
                .map_err(|f| failed(&f))?;
            if exists.is_none() {
                create_source(source, name).await.map_err(|f| failed(&f))?;
                tracing::info!(
                    region = source.label,
                    table = name,
                    key = "id (S)",
                    "source table made; write to it with any AWS client at the endpoint above"
                );
            }
        }
    }
    if regions.get(&loaded.here).is_some_and(|here| here.embedded) {
        let applied = apply(plan(loaded, regions).await?).await;
        for done in &applied.done {
            tracing::info!("provisioned: {done}");
        }
        if let Some(failure) = applied.failed {
            return Err(failure);
        }
    }
    Ok(())
}

/// Creates a table with the key `id` (S) and a stream.
///
/// # Errors
/// The fault of the call.
pub async fn create_source(region: &RegionClients, name: &str) -> Result<(), Fault> {
    let unbuilt = |error: aws_sdk_dynamodb::error::BuildError| {
        Fault::own(
            Operation::Provision,
            crate::error::Class::Unknown,
            "request not built",
            source_chain(Some(&error)),
        )
    };
    region
        .tables
        .create_table()
        .table_name(name)
        .attribute_definitions(
            AttributeDefinition::builder()
                .attribute_name("id")
                .attribute_type(ScalarAttributeType::S)
                .build()
                .map_err(unbuilt)?,
        )
        .key_schema(
            KeySchemaElement::builder()
                .attribute_name("id")
                .key_type(KeyType::Hash)
                .build()
                .map_err(unbuilt)?,
        )
        .billing_mode(BillingMode::PayPerRequest)
        .stream_specification(
            StreamSpecification::builder()
                .stream_enabled(true)
                .stream_view_type(StreamViewType::NewAndOldImages)
                .build()
                .map_err(unbuilt)?,
        )
        .send()
        .await
        .map(|_| ())
        .map_err(|error| classify(Operation::Provision, &error))
}
