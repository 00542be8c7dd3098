//! The clients: regions, endpoints, credentials, timeouts.
//!
//! Every SDK client of the program is made here, so that one place decides timeouts and that
//! nobody but the caller retries: the SDK's own retries are off.

pub mod clock;
pub mod digest;
#[cfg(feature = "failpoints")]
mod failpoint;
pub mod image;
pub mod item;
pub mod json;
pub mod pause;
pub mod read;
pub mod table;
pub mod transmit;
pub mod value;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use aws_config::{BehaviorVersion, SdkConfig};
use aws_credential_types::Credentials;
use aws_credential_types::provider::SharedCredentialsProvider;
use aws_smithy_types::retry::RetryConfig;
use aws_smithy_types::timeout::TimeoutConfig;

use crate::config::{Config, Region};
use crate::error::Failure;
use clock::{ClockInterceptor, ServiceClock};

/// Longest wait for a TCP and TLS connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Longest wait for a whole answer. Writes to replicas are bounded further by their lease.
const OPERATION_TIMEOUT: Duration = Duration::from_secs(10);

/// One region of the group, with its clients.
#[derive(Clone)]
pub struct RegionClients {
    /// The label in the configuration.
    pub label: String,
    /// The AWS region name requests are signed for.
    pub region: String,
    /// Where requests go, for messages.
    pub endpoint: String,
    /// URL of DynamoDB; `None` where the SDK's own for the region is meant.
    pub endpoint_url: Option<String>,
    /// Tables: items, descriptions, state.
    pub tables: aws_sdk_dynamodb::Client,
    /// Streams.
    pub streams: aws_sdk_dynamodbstreams::Client,
    /// The service's clock, as its answers tell it.
    pub clock: Arc<ServiceClock>,
    /// The shared SDK configuration, for further clients (SQS).
    sdk: SdkConfig,
    /// Whether this region lives inside the process.
    pub embedded: bool,
}

/// All regions of a group. Embedded ones live as long as this value.
pub struct Regions {
    by_label: BTreeMap<String, RegionClients>,
    #[cfg(feature = "embedded")]
    _embedded: Vec<crate::embedded::EmbeddedServer>,
}

impl Regions {
    /// Makes the clients of every region and starts the embedded ones. Nothing is called yet.
    ///
    /// # Errors
    /// An embedded region that cannot start.
    pub async fn connect(config: &Config) -> Result<Self, Failure> {
        let mut by_label = BTreeMap::new();
        #[cfg(feature = "embedded")]
        let mut embedded = Vec::new();
        for (label, region) in &config.regions {
            let inside = region.is_embedded();
            #[cfg(feature = "embedded")]
            let started = match inside {
                true => Some(start_embedded(label).await?),
                false => None,
            };
            #[cfg(feature = "embedded")]
            let region = &match &started {
                Some(server) => Region {
                    endpoint_url: Some(server.endpoint_url()),
                    ..region.clone()
                },
                None => region.clone(),
            };
            #[cfg(feature = "embedded")]
            embedded.extend(started);
            let clients = connect_region(label, region, inside).await;
            by_label.insert(label.clone(), clients);
        }
        Ok(Self {
            by_label,
            #[cfg(feature = "embedded")]
            _embedded: embedded,
        })
    }

    /// The region called `label`.
    pub fn get(&self, label: &str) -> Option<&RegionClients> {
        self.by_label.get(label)
    }

    /// All regions, by label.
    pub fn iter(&self) -> impl Iterator<Item = &RegionClients> {
        self.by_label.values()
    }
}

#[cfg(feature = "embedded")]
async fn start_embedded(label: &str) -> Result<crate::embedded::EmbeddedServer, Failure> {
    crate::embedded::EmbeddedServer::start()
        .await
        .map_err(|error| {
            Failure::new(
                format!("The embedded region {label} could not start"),
                error.to_string(),
                "Free a loopback port and try again",
            )
        })
}

async fn connect_region(label: &str, region: &Region, inside: bool) -> RegionClients {
    let name = region.region.clone().unwrap_or_else(|| label.to_owned());
    let clock = Arc::new(ServiceClock::default());
    let mut loader = aws_config::defaults(BehaviorVersion::v2026_01_12())
        .region(aws_config::Region::new(name.clone()))
        .http_client(transmit::http_client())
        .retry_config(RetryConfig::disabled())
        .timeout_config(
            TimeoutConfig::builder()
                .connect_timeout(CONNECT_TIMEOUT)
                .operation_timeout(OPERATION_TIMEOUT)
                .build(),
        );
    if inside {
        // The embedded server checks no signature; any key pair will do.
        loader = loader.credentials_provider(Credentials::new(
            "embedded", "embedded", None, None, "embedded",
        ));
    }
    if let Some(profile) = &region.profile {
        loader = loader.profile_name(profile);
    }
    let mut sdk = loader.load().await;
    if let Some(role) = &region.role_arn {
        let mut assume = aws_config::sts::AssumeRoleProvider::builder(role)
            .session_name("farshore")
            .region(aws_config::Region::new(name.clone()))
            .configure(&sdk);
        if let Some(external_id) = &region.external_id {
            assume = assume.external_id(external_id);
        }
        let provider = assume.build().await;
        sdk = sdk
            .into_builder()
            .credentials_provider(SharedCredentialsProvider::new(provider))
            .build();
    }
    let mut tables = aws_sdk_dynamodb::config::Builder::from(&sdk)
        .interceptor(ClockInterceptor::new(Arc::clone(&clock)));
    let mut streams = aws_sdk_dynamodbstreams::config::Builder::from(&sdk)
        .interceptor(ClockInterceptor::new(Arc::clone(&clock)));
    if let Some(url) = &region.endpoint_url {
        tables = tables.endpoint_url(url);
        streams = streams.endpoint_url(url);
    }
    if let Some(url) = &region.streams_endpoint_url {
        streams = streams.endpoint_url(url);
    }
    RegionClients {
        label: label.to_owned(),
        endpoint: region
            .endpoint_url
            .clone()
            .unwrap_or_else(|| format!("DynamoDB in {name}")),
        endpoint_url: region.endpoint_url.clone(),
        region: name,
        tables: aws_sdk_dynamodb::Client::from_conf(tables.build()),
        streams: aws_sdk_dynamodbstreams::Client::from_conf(streams.build()),
        clock,
        sdk,
        embedded: inside,
    }
}

impl RegionClients {
    /// A client for tables that waits at most `timeout` for an answer.
    pub fn tables_within(&self, timeout: Duration) -> aws_sdk_dynamodb::Client {
        let config = self.tables.config().to_builder().timeout_config(
            TimeoutConfig::builder()
                .connect_timeout(timeout.min(CONNECT_TIMEOUT))
                .operation_timeout(timeout.min(OPERATION_TIMEOUT))
                .build(),
        );
        aws_sdk_dynamodb::Client::from_conf(config.build())
    }

    /// The settings of a client for another service, which waits at most `timeout` for an answer.
    #[cfg(feature = "actions")]
    fn within(&self, endpoint_url: Option<&str>, timeout: Duration) -> SdkConfig {
        let mut sdk = self.sdk.to_builder();
        sdk.set_endpoint_url(endpoint_url.map(str::to_owned));
        sdk.timeout_config(
            TimeoutConfig::builder()
                .connect_timeout(timeout.min(CONNECT_TIMEOUT))
                .operation_timeout(timeout)
                .build(),
        )
        .build()
    }

    /// A client of Systems Manager in this region.
    #[cfg(feature = "actions")]
    pub fn ssm(&self, endpoint_url: Option<&str>, timeout: Duration) -> aws_sdk_ssm::Client {
        aws_sdk_ssm::Client::new(&self.within(endpoint_url, timeout))
    }

    /// A client of SNS in the AWS region `region`, with this region's credentials.
    #[cfg(feature = "actions")]
    pub fn sns(
        &self,
        region: &str,
        endpoint_url: Option<&str>,
        timeout: Duration,
    ) -> aws_sdk_sns::Client {
        let config = aws_sdk_sns::config::Builder::from(&self.within(endpoint_url, timeout))
            .region(aws_config::Region::new(region.to_owned()))
            .build();
        aws_sdk_sns::Client::from_conf(config)
    }

    /// A client of Route 53, with this region's credentials.
    #[cfg(feature = "actions")]
    pub fn route53(
        &self,
        endpoint_url: Option<&str>,
        timeout: Duration,
    ) -> aws_sdk_route53::Client {
        aws_sdk_route53::Client::new(&self.within(endpoint_url, timeout))
    }

    /// An SQS client in this region with its endpoint at `endpoint_url`.
    pub fn sqs(&self, endpoint_url: &str) -> aws_sdk_sqs::Client {
        let config = aws_sdk_sqs::config::Builder::from(&self.sdk)
            .endpoint_url(endpoint_url)
            .build();
        aws_sdk_sqs::Client::from_conf(config)
    }
}
