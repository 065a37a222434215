//! One call: who makes it, and how what fails in it is told.

use std::sync::Arc;

use nexus_schema::error::chain;
use nexus_schema::id::VmId;
use nexus_schema::tools::op::OpProgress;
use nexus_schema::{ErrorCode, ToolError};
use tokio::sync::watch;

/// Who calls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// `uid:N` of the peer, or the name of the token.
    pub owner: Arc<str>,
    /// The one VM that this caller may see, on a scoped endpoint.
    pub scope: Option<VmId>,
}

/// One call: who calls, and where its progress goes.
#[derive(Debug, Clone)]
pub struct CallContext {
    /// Who calls.
    pub caller: Caller,
    /// Where the progress of what the call waits for is shown.
    pub progress: watch::Sender<OpProgress>,
}

/// A failure of a room as callers see it.
pub(crate) fn described(code: ErrorCode, error: &dyn std::error::Error, hint: Option<String>) -> ToolError {
    let error = ToolError::new(code, chain(error));
    match hint {
        Some(hint) => error.hint(hint),
        None => error,
    }
}
