//! The policy table: every error that the SDKs, the network or a record can give, mapped to exactly
//! one [`Policy`], with the sentence that tells the operator what to do.

use aws_smithy_runtime_api::client::orchestrator::HttpResponse;
use aws_smithy_runtime_api::client::result::SdkError;
use aws_smithy_types::error::metadata::ProvideErrorMetadata;

use super::{Fault, source_chain};

/// What is done about an error. Exactly one of these for every error there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Policy {
    /// Try again with backoff; it passes by itself.
    Retry,
    /// Try again with backoff, readiness red at once: a person has to mend something.
    WaitAndAlarm,
    /// Take a new shard iterator after the last position.
    NewIterator,
    /// The position is lost: record a gap and go on from the oldest record.
    Gap,
    /// The record can never be written: isolate it, then dead-letter it.
    DeadLetter,
    /// Stop this shard: another worker owns it.
    Stop,
}

/// Which call an error came from. One code means different things on different calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operation {
    /// Reading a table's description.
    DescribeTable,
    /// Listing a stream's shards.
    DescribeStream,
    /// Asking for a position in a shard.
    GetShardIterator,
    /// Reading a shard.
    GetRecords,
    /// Writing to a replica.
    Write,
    /// Reading a table from end to end.
    Scan,
    /// Reading items of the source by key.
    ReadSource,
    /// Reading items of a replica by key.
    ReadReplica,
    /// Reading or writing the state table.
    State,
    /// Anything that creates or describes resources for `provision`.
    Provision,
    /// Talking to the dead-letter queue.
    Queue,
    /// Writing a parameter, after a failover.
    PutParameter,
    /// Publishing a message, after a failover.
    Publish,
    /// Writing a DNS record, after a failover.
    ChangeRecord,
}

impl Operation {
    /// All of them.
    pub const ALL: [Self; 14] = [
        Self::DescribeTable,
        Self::DescribeStream,
        Self::GetShardIterator,
        Self::GetRecords,
        Self::Write,
        Self::Scan,
        Self::ReadSource,
        Self::ReadReplica,
        Self::State,
        Self::Provision,
        Self::Queue,
        Self::PutParameter,
        Self::Publish,
        Self::ChangeRecord,
    ];

    /// How the call is named in messages.
    pub const fn name(self) -> &'static str {
        match self {
            Operation::DescribeTable => "DescribeTable",
            Operation::DescribeStream => "DescribeStream",
            Operation::GetShardIterator => "GetShardIterator",
            Operation::GetRecords => "GetRecords",
            Operation::Write => "BatchWriteItem",
            Operation::Scan => "Scan",
            Operation::ReadSource | Operation::ReadReplica => "BatchGetItem",
            Operation::State => "state table access",
            Operation::Provision => "provisioning",
            Operation::Queue => "SQS",
            Operation::PutParameter => "PutParameter",
            Operation::Publish => "Publish",
            Operation::ChangeRecord => "ChangeResourceRecordSets",
        }
    }

    const fn is_of_an_action(self) -> bool {
        matches!(
            self,
            Operation::PutParameter | Operation::Publish | Operation::ChangeRecord
        )
    }

    const fn reads_stream(self) -> bool {
        matches!(self, Operation::GetShardIterator | Operation::GetRecords)
    }
}

/// The kind of an error: what metrics are labelled with and the policy table is keyed by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Class {
    /// The service asks for less.
    Throttled,
    /// The service failed by itself (5xx). A write may have happened.
    Service,
    /// No answer, or half of one: connection, DNS, TLS, timeout.
    Network,
    /// No usable credentials on this side.
    Credentials,
    /// The service refuses us: permissions, signature, expired token.
    Access,
    /// The key that encrypts the data is not usable.
    Kms,
    /// Table, stream, shard or queue is not there.
    NotFound,
    /// A shard iterator is over 15 minutes old.
    ExpiredIterator,
    /// The position in the stream is older than the stream remembers.
    Trimmed,
    /// The service says that the request itself is wrong.
    Validation,
    /// The item collection is at its limit of 10 GB.
    CollectionFull,
    /// A condition of a write did not hold.
    Condition,
    /// A stream record that this version cannot read.
    Undecodable,
    /// None of the above.
    Unknown,
}

impl Class {
    /// All of them.
    pub const ALL: [Self; 14] = [
        Self::Throttled,
        Self::Service,
        Self::Network,
        Self::Credentials,
        Self::Access,
        Self::Kms,
        Self::NotFound,
        Self::ExpiredIterator,
        Self::Trimmed,
        Self::Validation,
        Self::CollectionFull,
        Self::Condition,
        Self::Undecodable,
        Self::Unknown,
    ];

    /// The label used in metrics, logs and dead letters.
    pub const fn label(self) -> &'static str {
        match self {
            Class::Throttled => "throttled",
            Class::Service => "service",
            Class::Network => "network",
            Class::Credentials => "credentials",
            Class::Access => "access",
            Class::Kms => "kms",
            Class::NotFound => "not-found",
            Class::ExpiredIterator => "expired-iterator",
            Class::Trimmed => "trimmed",
            Class::Validation => "validation",
            Class::CollectionFull => "collection-full",
            Class::Condition => "condition",
            Class::Undecodable => "undecodable",
            Class::Unknown => "unknown",
        }
    }

    /// The policy table. Unknown errors wait and alarm: nothing is dropped for want of knowing.
    pub const fn policy(self, operation: Operation) -> Policy {
        match self {
            Class::Throttled | Class::Service | Class::Network => Policy::Retry,
            Class::Credentials | Class::Access | Class::Kms | Class::Unknown => {
                Policy::WaitAndAlarm
            }
            // A shard that is gone is a gap; a table, stream or queue that is gone may come back.
            Class::NotFound if operation.reads_stream() => Policy::Gap,
            Class::NotFound => Policy::WaitAndAlarm,
            Class::ExpiredIterator => Policy::NewIterator,
            Class::Trimmed => Policy::Gap,
            // Only a refused write condemns a record; a refused read or state access is our
            // mistake or the service's, and waits for a person.
            Class::Validation | Class::CollectionFull => match operation {
                Operation::Write => Policy::DeadLetter,
                _ => Policy::WaitAndAlarm,
            },
            Class::Undecodable => Policy::DeadLetter,
            Class::Condition => match operation {
                Operation::State => Policy::Stop,
                _ => Policy::WaitAndAlarm,
            },
        }
    }

    /// What the operator does next: one sentence, without its full stop.
    pub const fn next_step(self) -> &'static str {
        match self {
            Class::Throttled => {
                "Nothing if it passes; if it lasts, raise the table's write capacity or lower [writes] units_per_second"
            }
            Class::Service => "Nothing if it passes; if it lasts, look at the region's health page",
            Class::Network => {
                "Check that this host reaches the endpoint (DNS, route, security group, proxy) and that the endpoint_url in the configuration is right"
            }
            Class::Credentials => {
                "Give this process credentials through the SDK's chain: a role for the task or instance, AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            }
            Class::Access => {
                "Allow the action for this role in IAM (or renew the credentials), then wait: work goes on by itself"
            }
            Class::Kms => "Enable the KMS key and allow this role to use it",
            Class::NotFound => {
                "Check the name and region in the configuration; `farshore provision` shows what is missing"
            }
            Class::ExpiredIterator => "Nothing: a new iterator is taken",
            Class::Trimmed => {
                "Reconcile the table: records older than 24 hours were lost to the stream"
            }
            Class::Validation => {
                "Compare the schemas of source and replica with `farshore provision`, mend the cause and redrive"
            }
            Class::CollectionFull => {
                "Make room in the item collection (10 GB with a local index), then redrive"
            }
            Class::Condition => "Nothing: another worker changed the row first",
            Class::Undecodable => {
                "Upgrade Farshore: the record holds a type this version does not know"
            }
            Class::Unknown => {
                "Report the code to Farshore's developers; the record is kept and tried again"
            }
        }
    }
}

/// Maps an SDK error of `operation` to a fault. The only place that reads error codes.
pub fn classify<E>(operation: Operation, error: &SdkError<E, HttpResponse>) -> Fault
where
    E: ProvideErrorMetadata + std::error::Error + 'static,
{
    match error {
        SdkError::ServiceError(context) => {
            let status = context.raw().status().as_u16();
            let meta = context.err().meta();
            let code = meta.code().unwrap_or("").to_owned();
            Fault {
                operation,
                class: class_of(operation, &code, status),
                code: if code.is_empty() {
                    format!("HTTP {status}")
                } else {
                    code
                },
                message: meta.message().unwrap_or("").to_owned(),
            }
        }
        SdkError::TimeoutError(_) => Fault::own(
            operation,
            Class::Network,
            "no answer in time",
            "the service did not answer within the timeout",
        ),
        SdkError::DispatchFailure(failure) => {
            let message = source_chain(failure.as_connector_error().map(|e| e as _));
            if looks_like_credentials(&message) {
                Fault::own(operation, Class::Credentials, "no credentials", message)
            } else {
                Fault::own(operation, Class::Network, "no connection", message)
            }
        }
        SdkError::ResponseError(context) => {
            let status = context.raw().status().as_u16();
            // A 2xx that cannot be parsed came from something that is no DynamoDB, or was cut.
            let class = match class_of_code("", status) {
                Class::Unknown => Class::Network,
                class => class,
            };
            Fault::own(
                operation,
                class,
                "incomplete answer",
                format!("the answer (HTTP {status}) could not be read"),
            )
        }
        SdkError::ConstructionFailure(_) => {
            let message = source_chain(Some(error as &dyn std::error::Error));
            if looks_like_credentials(&message) {
                Fault::own(operation, Class::Credentials, "no credentials", message)
            } else {
                Fault::own(operation, Class::Unknown, "request not built", message)
            }
        }
        // SdkError is non-exhaustive: a kind this version does not know waits and alarms.
        _ => Fault::own(operation, Class::Unknown, "unknown failure", ""),
    }
}

/// The class of a code on `operation`. A call of an action carries what the configuration says and
/// nothing of an item: what the service refuses there with a code of its own is wrong in the
/// configuration.
fn class_of(operation: Operation, code: &str, status: u16) -> Class {
    match class_of_code(code, status) {
        Class::Unknown if operation.is_of_an_action() && (400..500).contains(&status) => {
            Class::Validation
        }
        class => class,
    }
}

/// The class of a service's error code, or of its HTTP status where the code says nothing.
pub fn class_of_code(code: &str, status: u16) -> Class {
    // SQS spells them `KMS.DisabledException`, DynamoDB `KMSDisabledException`.
    if code.starts_with("KMS") || code.starts_with("Kms") {
        return match code.contains("Throttl") {
            true => Class::Throttled,
            false => Class::Kms,
        };
    }
    // SQS sends its codes with a prefix on some endpoints.
    let code = code
        .rsplit(['#', '.'])
        .next()
        .unwrap_or(code)
        .split(':')
        .next()
        .unwrap_or(code);
    match code {
        "ThrottlingException"
        | "Throttling"
        | "ThrottledException"
        | "RequestThrottled"
        | "RequestThrottledException"
        | "TooManyRequestsException"
        | "ProvisionedThroughputExceededException"
        | "RequestLimitExceeded"
        | "LimitExceededException"
        // Too many messages of a queue are in flight.
        | "OverLimit"
        // One change of a parameter or hosted zone at a time.
        | "TooManyUpdates"
        | "PriorRequestNotComplete"
        | "SlowDown" => Class::Throttled,
        "InternalServerError"
        | "InternalFailure"
        | "InternalError"
        | "ServiceUnavailable"
        | "ServiceUnavailableException"
        | "TransactionConflictException"
        | "TransactionInProgressException"
        | "ContinuousBackupsUnavailableException"
        | "ReplicatedWriteConflictException" => Class::Service,
        "RequestTimeout" | "RequestTimeoutException" | "InvalidEndpointException" => Class::Network,
        "AccessDenied"
        | "AccessDeniedException"
        | "UnauthorizedOperation"
        | "UnrecognizedClientException"
        | "InvalidClientTokenId"
        | "InvalidSignatureException"
        | "SignatureDoesNotMatch"
        | "IncompleteSignature"
        | "IncompleteSignatureException"
        | "MissingAuthenticationToken"
        | "MissingAuthenticationTokenException"
        | "MissingAuthTokenException"
        | "ExpiredToken"
        | "ExpiredTokenException"
        | "RequestExpired"
        | "InvalidSecurity"
        | "AuthorizationError"
        | "OptInRequired"
        | "NotAuthorized" => Class::Access,
        "ResourceNotFoundException"
        | "TableNotFoundException"
        | "NonExistentQueue"
        | "QueueDoesNotExist"
        | "InvalidAddress"
        | "NotFound"
        | "NoSuchHostedZone"
        | "NoSuchHealthCheck"
        | "QueueDeletedRecently" => Class::NotFound,
        // A table that is being created or deleted answers so; it passes by itself or a person
        // has to look, like a table that is not there.
        "ResourceInUseException" | "TableInUseException" => Class::NotFound,
        "ExpiredIteratorException" => Class::ExpiredIterator,
        "TrimmedDataAccessException" => Class::Trimmed,
        "ValidationException" => Class::Validation,
        "ItemCollectionSizeLimitExceededException" => Class::CollectionFull,
        "ConditionalCheckFailedException" => Class::Condition,
        _ => match status {
            413 => Class::Validation,
            429 => Class::Throttled,
            401 | 403 => Class::Access,
            500..=599 => Class::Service,
            _ => Class::Unknown,
        },
    }
}

fn looks_like_credentials(message: &str) -> bool {
    let message = message.to_ascii_lowercase();
    message.contains("credential") || message.contains("failed to load identity")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outage_never_dead_letters() {
        for class in [
            Class::Throttled,
            Class::Service,
            Class::Network,
            Class::Credentials,
            Class::Access,
            Class::Kms,
            Class::NotFound,
            Class::Unknown,
        ] {
            assert_ne!(
                class.policy(Operation::Write),
                Policy::DeadLetter,
                "{class:?}"
            );
        }
    }

    #[test]
    fn codes_are_read_with_and_without_their_prefix() {
        assert_eq!(
            class_of_code("AWS.SimpleQueueService.NonExistentQueue", 400),
            Class::NotFound
        );
        assert_eq!(
            class_of_code(
                "com.amazonaws.dynamodb.v20120810#ProvisionedThroughputExceededException",
                400
            ),
            Class::Throttled
        );
        assert_eq!(class_of_code("", 503), Class::Service);
        assert_eq!(class_of_code("SomethingNew", 400), Class::Unknown);
        for code in [
            "KMSDisabledException",
            "KMS.DisabledException",
            "KMS.AccessDeniedException",
            "KmsInvalidState",
        ] {
            assert_eq!(class_of_code(code, 400), Class::Kms, "{code}");
        }
        assert_eq!(
            class_of_code("KMS.ThrottlingException", 400),
            Class::Throttled
        );
        assert_eq!(class_of_code("KmsThrottled", 403), Class::Throttled);
    }

    #[test]
    fn what_refuses_an_action_condemns_no_record() {
        for (operation, code) in [
            (Operation::ChangeRecord, "InvalidChangeBatch"),
            (Operation::Publish, "InvalidParameter"),
            (Operation::PutParameter, "HierarchyTypeMismatchException"),
        ] {
            assert_eq!(class_of(operation, code, 400), Class::Validation);
            assert_eq!(class_of(Operation::Write, code, 400), Class::Unknown);
            assert_eq!(class_of(operation, code, 500), Class::Service);
        }
        let busy = class_of(Operation::ChangeRecord, "PriorRequestNotComplete", 400);
        assert_eq!(busy, Class::Throttled);
    }

    #[test]
    fn an_unknown_error_waits_and_alarms() {
        assert_eq!(
            Class::Unknown.policy(Operation::Write),
            Policy::WaitAndAlarm
        );
        assert_eq!(
            Class::Unknown.policy(Operation::GetRecords),
            Policy::WaitAndAlarm
        );
    }
}
