//! The end of a VM's life, and of one that is idle. Looked at again here, since things may have changed since somebody else looked.

use std::time::Duration;

use nexus_schema::ToolError;
use nexus_schema::tools::vm::{IdleAction, VmState};

use super::{Actor, DAEMON};
use crate::os::failpoint;
use crate::store::now;

impl Actor {
    /// Deletes the VM if its life is over. A protected one is only stopped, and lives on without a limit.
    pub(super) async fn expire(&mut self) -> Result<(), ToolError> {
        if self.record.expires_at.is_none_or(|at| at > now()) {
            return Ok(());
        }
        failpoint::reach("expired");
        if !self.record.protected {
            tracing::info!(vm = %self.record.name, "the vm's time to live is over: deleting it");
            return self.delete(DAEMON, true, "deleted: its time to live is over").await.map(drop);
        }
        let before = self.record.expires_at.take();
        // One that is suspended uses nothing but the disk.
        let is_suspended = self.record.state == VmState::Suspended;
        let what = match is_suspended {
            true => "its time to live is over; it is protected, so it is kept, suspended",
            false => "its time to live is over; it is protected, so it is stopped and kept",
        };
        let line = (self.record.state, what.to_owned(), DAEMON.to_owned());
        if let Err(error) = self.write(Some(line)).await {
            self.record.expires_at = before;
            self.unwritten = None;
            return Err(error);
        }
        self.shared.events.vm(&self.record, Some(self.record.state), what);
        if is_suspended {
            return Ok(());
        }
        self.stop(DAEMON, false, what).await.map(drop)
    }

    /// Stops or suspends the VM if it has been idle for as long as it may be.
    pub(super) async fn stop_idle(&mut self) -> Result<(), ToolError> {
        let Some(limit) = self.record.spec.idle_stop else { return Ok(()) };
        let is_idle = self.activity.idle().is_some_and(|idle| idle >= limit.duration());
        if self.record.state != VmState::Ready || !is_idle {
            return Ok(());
        }
        if self.record.spec.idle_action == IdleAction::Suspend {
            tracing::info!(vm = %self.record.name, %limit, "the vm is idle: suspending it");
            let why = format!("suspended: idle for {limit}");
            let suspended = Box::pin(self.suspend(DAEMON, &why, Some(limit.duration()))).await;
            if suspended.is_err() {
                // It is tried again after another such time.
                self.activity.touch(Duration::ZERO);
            }
            return suspended.map(drop);
        }
        tracing::info!(vm = %self.record.name, %limit, "the vm is idle: stopping it");
        self.stop(DAEMON, false, &format!("stopped: idle for {limit}")).await.map(drop)
    }
}
