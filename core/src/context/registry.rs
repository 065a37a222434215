//! The VMs in memory: by id and by name, each with the mailbox of its task and its last view.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use nexus_schema::id::{VmId, VmKind};
use nexus_schema::{ErrorCode, Name, Reference, ToolError};
use tokio::sync::{mpsc, watch};

use super::{Command, View};
use crate::op::did_you_mean;

/// Access to the task of one VM.
#[derive(Debug, Clone)]
pub(crate) struct Handle {
    pub(crate) commands: mpsc::Sender<Command>,
    pub(crate) view: watch::Receiver<View>,
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

    /// Resolves a reference to an id.
    pub(crate) fn resolve(&self, vm: &Reference<VmKind>) -> Result<VmId, ToolError> {
        let inner = self.inner.read().unwrap_or_else(PoisonError::into_inner);
        match vm {
            Reference::Id(id) if inner.by_id.contains_key(id) => Ok(*id),
            Reference::Name(name) if inner.by_name.contains_key(name) => Ok(inner.by_name[name]),
            Reference::Id(_) | Reference::Name(_) => Err(inner.not_found(vm)),
        }
    }

    /// Returns the handle of a VM's task.
    pub(crate) fn get(&self, vm: &Reference<VmKind>) -> Result<Handle, ToolError> {
        let inner = self.inner.read().unwrap_or_else(PoisonError::into_inner);
        let id = match vm {
            Reference::Id(id) => Some(id),
            Reference::Name(name) => inner.by_name.get(name),
        };
        id.and_then(|id| inner.by_id.get(id)).cloned().ok_or_else(|| inner.not_found(vm))
    }

    /// Returns the handles of all VMs.
    pub(crate) fn all(&self) -> Vec<Handle> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner).by_id.values().cloned().collect()
    }
}

impl Inner {
    /// Returns the error for a VM that does not exist, with similar names as suggestions.
    fn not_found(&self, vm: &Reference<VmKind>) -> ToolError {
        did_you_mean(not_found(vm), &vm.to_string(), self.by_name.keys().map(Name::as_str))
    }
}

/// Returns the error for a VM that does not exist.
pub(crate) fn not_found(vm: &Reference<VmKind>) -> ToolError {
    ToolError::new(ErrorCode::VmNotFound, format!("there is no VM {vm}")).hint("call vm_list to see the VMs")
}
