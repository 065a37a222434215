//! The VMs in memory: by id and by name, each with the mailbox of its task and its last view.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use nexus_schema::id::{VmId, VmKind};
use nexus_schema::{ErrorCode, Name, Reference, ToolError};
use tokio::sync::{mpsc, watch};

use super::{Activity, Command, View};
use crate::access::Caller;
use crate::op::did_you_mean;

/// Access to the task of one VM.
#[derive(Debug, Clone)]
pub(crate) struct Handle {
    pub(crate) commands: mpsc::Sender<Command>,
    pub(crate) view: watch::Receiver<View>,
    /// What is under way in it.
    pub(crate) activity: Activity,
}

/// All VMs. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Registry {
    inner: Arc<RwLock<Inner>>,
}

#[derive(Debug, Default)]
struct Inner {
    by_id: HashMap<VmId, Handle>,
    by_name: HashMap<Name, VmId>,
}

impl Registry {
    pub(crate) fn insert(&self, id: VmId, name: Name, handle: Handle) {
        let mut inner = self.inner.write().unwrap_or_else(PoisonError::into_inner);
        inner.by_id.insert(id, handle);
        inner.by_name.insert(name, id);
    }

    pub(crate) fn remove(&self, id: VmId, name: &Name) {
        let mut inner = self.inner.write().unwrap_or_else(PoisonError::into_inner);
        inner.by_id.remove(&id);
        if inner.by_name.get(name) == Some(&id) {
            inner.by_name.remove(name);
        }
    }

    /// Changes the name of a VM.
    pub(crate) fn rename(&self, id: VmId, from: &Name, to: Name) {
        let mut inner = self.inner.write().unwrap_or_else(PoisonError::into_inner);
        if inner.by_name.get(from) == Some(&id) {
            inner.by_name.remove(from);
        }
        inner.by_name.insert(to, id);
    }

    /// The id of the VM that a caller means by a reference.
    pub(crate) fn resolve(&self, caller: &Caller, vm: &Reference<VmKind>) -> Result<VmId, ToolError> {
        self.get(caller, vm).map(|handle| handle.view.borrow().record.id)
    }

    /// The task of the VM that a caller means by a reference. A VM that it may not see does not exist.
    pub(crate) fn get(&self, caller: &Caller, vm: &Reference<VmKind>) -> Result<Handle, ToolError> {
        let inner = self.inner.read().unwrap_or_else(PoisonError::into_inner);
        let handle = inner.find(vm).filter(|handle| handle.is_seen_by(caller));
        handle.cloned().ok_or_else(|| inner.not_found(caller, vm))
    }

    /// Every VM that a caller sees.
    pub(crate) fn seen_by(&self, caller: &Caller) -> Vec<Handle> {
        let mut all = self.all();
        all.retain(|handle| handle.is_seen_by(caller));
        all
    }

    /// The task of a VM, whoever asks: for the daemon's own work.
    pub(crate) fn of_daemon(&self, vm: &Reference<VmKind>) -> Result<Handle, ToolError> {
        let inner = self.inner.read().unwrap_or_else(PoisonError::into_inner);
        inner.find(vm).cloned().ok_or_else(|| not_found(vm))
    }

    /// Every VM: for the daemon's own work.
    pub(crate) fn all(&self) -> Vec<Handle> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner).by_id.values().cloned().collect()
    }
}

impl Handle {
    /// Whether the VM exists for a caller.
    pub(crate) fn is_seen_by(&self, caller: &Caller) -> bool {
        caller.grant().is_none() || caller.sees(&self.view.borrow().record)
    }
}

impl Inner {
    fn find(&self, vm: &Reference<VmKind>) -> Option<&Handle> {
        let id = match vm {
            Reference::Id(id) => Some(id),
            Reference::Name(name) => self.by_name.get(name),
        };
        id.and_then(|id| self.by_id.get(id))
    }

    /// There is no such VM; but perhaps one that is called alike and that the caller sees.
    fn not_found(&self, caller: &Caller, vm: &Reference<VmKind>) -> ToolError {
        let seen =
            self.by_name.iter().filter(|(_, id)| self.by_id.get(id).is_some_and(|vm| vm.is_seen_by(caller)));
        did_you_mean(not_found(vm), &vm.to_string(), seen.map(|(name, _)| name.as_str()))
    }
}

/// Returns the error for a VM that does not exist.
pub(crate) fn not_found(vm: &Reference<VmKind>) -> ToolError {
    ToolError::new(ErrorCode::VmNotFound, format!("there is no VM {vm}")).hint("call vm_list to see the VMs")
}
