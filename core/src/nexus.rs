//! The facade: what the host's tools can do, a method per tool.

use nexus_schema::id::{BootId, VmId, VmKind};
use nexus_schema::tools::op::OpProgress;
use nexus_schema::{Name, Reference, Tool, ToolError, for_each_host_tool};
use tokio::sync::watch;

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
}

/// One Nexus: a state directory and all that runs under it. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Nexus {}

impl Nexus {
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
