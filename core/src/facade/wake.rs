//! Guests that sleep: a call wakes them.

use std::time::Duration;

use nexus_schema::id::VmKind;
use nexus_schema::limits::WAIT_DEFAULT;
use nexus_schema::{Reference, ToolError};

use super::{Caller, GuestHandle, Nexus};
use crate::vm::{policy, wake};

impl Nexus {
    /// Whether a call of this guest's tools waits for the VM to wake: it is suspended, or about to be, or waking already. In memory, without waiting.
    pub fn is_asleep(&self, caller: &Caller, vm: &Reference<VmKind>) -> bool {
        let Ok(handle) = self.shared.vms.get(caller, vm) else { return false };
        let view = handle.view.borrow();
        let record = &view.record;
        policy::is_asleep(record) && caller.scope.is_none_or(|scope| scope == record.id)
    }

    /// Wakes a VM that sleeps, and waits until its guest's tools can be called, at most for `limit`. Returns how long that took; `None` of a VM that does
    /// not sleep, or that the caller may not reach. `what` says in its history what it was woken for. The caller must be authorised for that.
    pub async fn wake(
        &self,
        caller: &Caller,
        vm: &Reference<VmKind>,
        what: &str,
        limit: Duration,
    ) -> Result<Option<Duration>, ToolError> {
        if !self.is_asleep(caller, vm) {
            return Ok(None);
        }
        let handle = self.shared.vms.get(caller, vm)?;
        let woken = wake(&handle, &caller.owner, what, limit).await?;
        // A wake takes a while, in which the token may have been revoked.
        if caller.ended().is_cancelled() {
            return Err(Caller::ended_error());
        }
        Ok(woken)
    }

    /// The same as [`Nexus::guest`], of a guest that is woken if it sleeps.
    pub(super) async fn guest_awake(
        &self,
        caller: &Caller,
        vm: &Reference<VmKind>,
        what: &str,
    ) -> Result<GuestHandle, ToolError> {
        self.wake(caller, vm, what, WAIT_DEFAULT).await?;
        match self.guest(caller, vm) {
            // It has just fallen asleep.
            Err(_) if self.is_asleep(caller, vm) => {
                self.wake(caller, vm, what, WAIT_DEFAULT).await?;
                self.guest(caller, vm)
            }
            found => found,
        }
    }
}
