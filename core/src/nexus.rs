//! The facade: what the host's tools can do, a method per tool.

use nexus_schema::id::{BootId, VmId, VmKind};
use nexus_schema::tools::op::OpProgress;
use nexus_schema::{Name, Reference, Tool, ToolError, for_each_host_tool};
use tokio::sync::watch;

use crate::config::Config;
use crate::guest::Link;
pub use crate::store::calls::CallRecord;

/// Who calls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// `uid:N` of the peer, or the name of the token.
    pub owner: String,
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

/// A way into a running guest.
#[derive(Debug, Clone)]
pub struct GuestHandle {
    /// The VM.
    pub vm: VmId,
    /// Its name.
    pub name: Name,
    /// The boot that answers.
    pub boot_id: BootId,
    /// The connection into it.
    pub link: Link,
}

/// Why a Nexus could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another daemon has the state directory.
    #[error("another nexusd holds {directory}")]
    Locked {
        /// The state directory.
        directory: String,
    },
}

/// One Nexus: a state directory and all that runs under it. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Nexus {}

impl Nexus {
    /// Opens a state directory.
    pub async fn open(config: Config) -> Result<Self, OpenError> {
        let _ = config;
        Ok(Self {})
    }

    /// Ends all work; VMs keep running.
    pub async fn shutdown(&self) {}

    /// The way into the guest of a VM; in memory.
    pub fn guest(&self, _caller: &Caller, vm: &Reference<VmKind>) -> Result<GuestHandle, ToolError> {
        Err(ToolError::internal(format!("no VM {vm} yet")))
    }

    /// Remembers that a tool was called; never blocks.
    pub fn record_call(&self, call: CallRecord) {
        let _ = call;
    }

    /// The id of the VM that a reference means; in memory.
    pub fn resolve_vm(&self, vm: &Reference<VmKind>) -> Result<VmId, ToolError> {
        Err(ToolError::internal(format!("no VM {vm} yet")))
    }
}

macro_rules! methods {
    ($($tool:path => $method:ident,)*) => {
        impl Nexus {$(
            #[doc = concat!("The tool `", stringify!($method), "`.")]
            pub async fn $method(
                &self,
                _ctx: &CallContext,
                _params: <$tool as Tool>::Params,
            ) -> Result<<$tool as Tool>::Output, ToolError> {
                Err(ToolError::internal(concat!(stringify!($method), " is not wired yet")))
            }
        )*}
    };
}
for_each_host_tool!(methods);
