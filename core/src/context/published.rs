//! The published guest ports: those for which this daemon listens on the host.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nexus_schema::id::VmId;
use nexus_schema::tools::vm::PublishedPort;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::os::paths::Paths;
use crate::store::ports::PortRecord;

/// The published ports by their ids in the store. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Published(Arc<Mutex<HashMap<i64, Listening>>>);

#[derive(Debug)]
struct Listening {
    _until: DropGuard,
    problem: Option<String>,
}

impl Published {
    fn listening(&self) -> MutexGuard<'_, HashMap<i64, Listening>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Registers a port and returns the token that is cancelled when its listener must end.
    pub(crate) fn begin(&self, id: i64) -> CancellationToken {
        let until = CancellationToken::new();
        let listening = Listening { _until: until.clone().drop_guard(), problem: None };
        self.listening().insert(id, listening);
        until
    }

    /// Unpublishes a port and ends its connections.
    pub(crate) fn end(&self, id: i64) {
        self.listening().remove(&id);
    }

    /// Records why clients cannot connect to a port, or `None` if they can.
    pub(crate) fn say(&self, id: i64, problem: Option<String>) {
        if let Some(listening) = self.listening().get_mut(&id) {
            listening.problem = problem;
        }
    }

    /// Returns the description of a port for callers.
    pub(crate) fn shown(&self, paths: &Paths, port: &PortRecord) -> PublishedPort {
        let problem = self.listening().get(&port.id).and_then(|listening| listening.problem.clone());
        let address = match port.host_port {
            Some(host_port) => format!("127.0.0.1:{host_port}"),
            None => paths.sockets().join(socket_name(port.vm, port.guest_port)).display().to_string(),
        };
        PublishedPort { guest_port: port.guest_port, host_port: port.host_port, address, problem }
    }
}

/// Returns the file name of the socket of a published port.
pub(crate) fn socket_name(vm: VmId, guest_port: u16) -> String {
    format!("{vm}-{guest_port}")
}
