//! Pausing a VM, and resuming it. The row says whether a VM is paused, and the shim is brought in line with it: the row is written first at a
//! pause and last at a resume, so after a crash of the daemon in between, the VM is paused.

use std::time::{Duration, Instant};

use nexus_schema::tools::vm::VmState;
use nexus_schema::{ErrorCode, ToolError};

use super::{Actor, DAEMON};
use crate::context::Decision;
use crate::os::failpoint;
use crate::progress::Progress;
use crate::vm::policy;

/// Time after which a guest that said bye before its pause is looked at.
const FAREWELL_LOOK: Duration = Duration::from_secs(2);

impl Actor {
    /// Pauses the VM, if it is ready.
    pub(super) async fn pause(&mut self, who: &str) -> Result<Decision, ToolError> {
        let name = self.record.name.clone();
        let decision = policy::pause(name.as_str(), self.record.state)?;
        if decision == Decision::Already {
            return Ok(decision);
        }
        policy::pausable(name.as_str(), self.record.driver.as_deref().unwrap_or_default())?;
        if self.boot.as_ref().is_some_and(|boot| boot.bye.is_some()) {
            let message = format!("{name} is going down: its guest has said goodbye");
            return Err(ToolError::new(ErrorCode::VmWrongState, message).hint("wait until it is stopped"));
        }
        self.transition(VmState::Paused, None, "pause requested", who).await?;
        let Some(boot) = &mut self.boot else {
            return Err(ToolError::internal(format!("{name} is ready, but has no boot")));
        };
        boot.hold();
        if let Err(error) = boot.shim.pause().await {
            tracing::warn!(vm = %name, %error, "the pause failed");
            // It may still come: then it is undone at once.
            if let Err(error) = boot.shim.resume().await {
                tracing::warn!(vm = %name, %error, "cannot resume a vm whose pause failed");
            }
            let message = format!("pause {name}: {}", nexus_schema::error::chain(&error));
            self.run_again("the pause failed", DAEMON).await;
            return Err(ToolError::new(ErrorCode::HostUnsuitable, message)
                .hint("look at the VM with vm_inspect, then try again"));
        }
        failpoint::reach("pause-paused");
        Ok(Decision::Go)
    }

    /// Resumes the VM, if it is paused, and wakes it, if it is suspended.
    pub(super) async fn resume(&mut self, who: &str) -> Result<Decision, ToolError> {
        let name = self.record.name.clone();
        let decision = policy::resume(name.as_str(), self.record.state)?;
        if decision == Decision::Already {
            return Ok(decision);
        }
        if self.record.state == VmState::Suspended {
            let progress = Progress::default();
            return Box::pin(self.wake(who, "resume requested", &progress)).await.map(|_| Decision::Go);
        }
        let Some(boot) = &mut self.boot else {
            return Err(ToolError::internal(format!("{name} is paused, but has no boot")));
        };
        if let Err(error) = boot.shim.resume().await {
            let message = format!("resume {name}: {}", nexus_schema::error::chain(&error));
            return Err(ToolError::new(ErrorCode::HostUnsuitable, message)
                .hint("try again; vm_stop with force: true cuts its power"));
        }
        failpoint::reach("resume-resumed");
        self.run_again("resume requested", who).await;
        Ok(Decision::Go)
    }

    /// Records that a guest that was paused runs, and goes on with it.
    async fn run_again(&mut self, why: &str, who: &str) {
        let Some(boot) = &mut self.boot else { return };
        let was_linked = boot.agent_answers();
        boot.let_go(&self.shared, &self.record);
        if was_linked {
            boot.set_clock().await;
        }
        if boot.bye.is_some() {
            boot.deadline = Some(Instant::now() + FAREWELL_LOOK);
        }
        // The link may have ended meanwhile, or this daemon has never had one.
        let (to, reason) = match boot.agent_answers() {
            true => (VmState::Ready, None),
            false => (VmState::Unreachable, Some("it was resumed; waiting for its agent".to_owned())),
        };
        if let Err(error) = self.transition(to, reason, why, who).await {
            tracing::error!(vm = %self.record.name, %to, %error, "a resume was not recorded");
        }
    }

    /// Lets the guest run for its shutdown. What fails is left to the later steps of the stop.
    pub(super) async fn run_on(&mut self) {
        let Some(boot) = &mut self.boot else { return };
        if let Err(error) = boot.shim.resume().await {
            tracing::warn!(vm = %self.record.name, %error, "cannot resume a paused vm that is to be stopped");
        }
        boot.release(&self.record);
    }

    /// Pauses the VMM of a VM that is paused, after another daemon or shim has lost that; resumes one that another daemon was only about to suspend.
    pub(super) async fn pause_anew(&self) {
        let Some(boot) = &self.boot else { return };
        let done = match self.record.state {
            VmState::Paused => boot.shim.pause().await,
            // It ends as it is.
            VmState::Stopping => Ok(()),
            _ if self.record.spec.checkpoints => boot.shim.resume().await,
            _ => Ok(()),
        };
        if let Err(error) = done {
            tracing::error!(vm = %self.record.name, %error, "the vm may be paused, or not, against its state");
        }
    }
}
