//! One call: its caller, and how its failures are reported.

use nexus_schema::error::chain;
use nexus_schema::tools::op::OpProgress;
use nexus_schema::{ErrorCode, ToolError};
use tokio::sync::watch;

use crate::access::Caller;

/// One call: its caller, and where its progress is sent.
#[derive(Debug, Clone)]
pub struct CallContext {
    /// The caller.
    pub caller: Caller,
    /// Receives the progress of the operation that the call waits for.
    pub progress: watch::Sender<OpProgress>,
}

/// Turns a room's error into the error that callers see.
pub(crate) fn described(code: ErrorCode, error: &dyn std::error::Error, hint: Option<String>) -> ToolError {
    let error = ToolError::new(code, chain(error));
    match hint {
        Some(hint) => error.hint(hint),
        None => error,
    }
}
