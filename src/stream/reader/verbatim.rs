//! `GetRecords` by the SDK, but for the reading of its answer.
//!
//! ```text
//!   SDK: build, sign, send ─▶ answer ─▶ [a success? then ours reads it] ─▶ the SDK's own otherwise
//! ```
//!
//! The orchestrator asks its settings for what reads an answer, after the last interceptor saw the head of
//! that answer. So one is enough to put another reader there.

use std::sync::{Arc, Mutex, PoisonError};

use aws_sdk_dynamodbstreams::operation::get_records::GetRecordsOutput;
use aws_sdk_dynamodbstreams::operation::get_records::builders::GetRecordsFluentBuilder;
use aws_smithy_runtime_api::box_error::BoxError;
use aws_smithy_runtime_api::client::interceptors::context::{
    BeforeDeserializationInterceptorContextMut, Output, OutputOrError,
};
use aws_smithy_runtime_api::client::interceptors::{Intercept, dyn_dispatch_hint};
use aws_smithy_runtime_api::client::orchestrator::{HttpResponse, OrchestratorError};
use aws_smithy_runtime_api::client::runtime_components::RuntimeComponents;
use aws_smithy_runtime_api::client::ser_de::{DeserializeResponse, SharedResponseDeserializer};
use aws_smithy_types::config_bag::ConfigBag;

use super::incomplete;
use crate::error::{Fault, Operation, classify};
use crate::stream::answer::{Answer, Malformed, read};

/// Makes the call.
///
/// # Errors
/// The fault of the call.
pub async fn send(call: GetRecordsFluentBuilder) -> Result<Answer, Fault> {
    let reads = Reads::default();
    let sent = call.customize().interceptor(reads.clone()).send().await;
    sent.map_err(|error| classify(Operation::GetRecords, &error))?;
    // A success was read by it, or is none.
    reads
        .take()
        .ok_or_else(|| incomplete(Operation::GetRecords))
}

/// Reads the answer of one call, and keeps it.
#[derive(Clone, Debug, Default)]
struct Reads(Arc<Mutex<Option<Answer>>>);

impl Reads {
    fn take(&self) -> Option<Answer> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

#[dyn_dispatch_hint]
impl Intercept for Reads {
    fn name(&self) -> &'static str {
        "ReadsRecords"
    }

    fn modify_before_deserialization(
        &self,
        context: &mut BeforeDeserializationInterceptorContextMut<'_>,
        _components: &RuntimeComponents,
        config: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        // Errors are the SDK's to read.
        if context.response().status().is_success() {
            let reader = SharedResponseDeserializer::new(self.clone());
            config.interceptor_state().store_put(reader);
        }
        Ok(())
    }
}

impl DeserializeResponse for Reads {
    fn deserialize_nonstreaming_with_config(
        &self,
        response: &HttpResponse,
        _config: &ConfigBag,
    ) -> OutputOrError {
        let body = response.body().bytes();
        let answer = body
            .ok_or(Malformed)
            .and_then(read)
            .map_err(OrchestratorError::other)?;
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(answer);
        Ok(Output::erase(GetRecordsOutput::builder().build()))
    }
}
