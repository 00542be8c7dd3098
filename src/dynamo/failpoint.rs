//! Stops this process just before it transmits a request (cargo feature `failpoints`, tests only).
//!
//! `FARSHORE_TEST_FAILPOINT=BatchWriteItem@3` stops it (SIGSTOP to itself) before the third
//! BatchWriteItem leaves: signed, after every check of its own, the way a suspended machine would.
//! The test continues it with SIGCONT.

use std::sync::atomic::{AtomicU64, Ordering};

use aws_smithy_runtime_api::box_error::BoxError;
use aws_smithy_runtime_api::client::interceptors::Intercept;
use aws_smithy_runtime_api::client::interceptors::context::BeforeTransmitInterceptorContextRef;
use aws_smithy_runtime_api::client::interceptors::dyn_dispatch_hint;
use aws_smithy_runtime_api::client::runtime_components::RuntimeComponents;
use aws_smithy_types::config_bag::ConfigBag;
use rustix::process::{Signal, getpid, kill_process};

/// Names the operation and which of its calls.
const VARIABLE: &str = "FARSHORE_TEST_FAILPOINT";

/// Calls of the operation so far, over all clients of the process.
static CALLS: AtomicU64 = AtomicU64::new(0);

/// Stops the process before one call.
#[derive(Debug)]
pub(super) struct Failpoint {
    operation: String,
    call: u64,
}

impl Failpoint {
    /// The failpoint that the environment asks for.
    pub(super) fn from_environment() -> Option<Self> {
        let text = std::env::var(VARIABLE).ok()?;
        let (operation, call) = text.split_once('@')?;
        Some(Self {
            operation: operation.to_owned(),
            call: call.parse().ok()?,
        })
    }
}

#[dyn_dispatch_hint]
impl Intercept for Failpoint {
    fn name(&self) -> &'static str {
        "Failpoint"
    }

    fn read_before_transmit(
        &self,
        context: &BeforeTransmitInterceptorContextRef<'_>,
        _components: &RuntimeComponents,
        _config: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let target = context.request().headers().get("x-amz-target");
        let meant = target.is_some_and(|target| target.rsplit('.').next() == Some(&self.operation));
        if meant && CALLS.fetch_add(1, Ordering::SeqCst) + 1 == self.call {
            kill_process(getpid(), Signal::STOP)?;
        }
        Ok(())
    }
}
