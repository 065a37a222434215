//! Stopping a VM: step by step, each with a timeout.

use std::time::{Duration, Instant};

use nexus_schema::ToolError;
use nexus_schema::tools::vm::VmState;

use super::Actor;
use crate::context::Decision;
use crate::os::failpoint;
use crate::vm::boot::Boot;
use crate::vm::policy;
use crate::vm::stop::Rung;

impl Actor {
    pub(super) async fn stop(&mut self, who: &str, force: bool, why: &str) -> Result<Decision, ToolError> {
        if self.again_at.take().is_some() {
            self.record.reason = None;
            self.note("stop requested: the pending start was cancelled").await;
        }
        let decision = policy::stop(self.record.name.as_str(), self.record.state)?;
        if self.record.state == VmState::Suspended {
            self.give_up_memory(who, why).await?;
            return Ok(decision);
        }
        if self.record.state == VmState::Stopping {
            if force {
                self.climb(Rung::Kill).await;
            }
            return Ok(Decision::Go);
        }
        if decision == Decision::Already {
            return Ok(decision);
        }
        if self.record.state == VmState::Paused && !force {
            self.run_on().await;
        }
        // One that is still waking sleeps on; what another goes on from is of the past.
        self.forget_if_renewed().await;
        if let Err(error) = self.transition(VmState::Stopping, None, why, who).await {
            if self.record.state != VmState::Stopping {
                return Err(error);
            }
            // A full disk must not keep the VM from stopping; the stop is recorded once the VM is stopped.
            tracing::warn!(vm = %self.record.name, %error, "stopping although the stop could not be recorded");
        }
        let answers = self.boot.as_ref().is_some_and(Boot::agent_answers);
        // A shutdown of one that is waking would write to its drives.
        let force = force || self.record.suspended.is_some();
        self.climb(Rung::first(force, answers)).await;
        failpoint::reach("stop-asked");
        Ok(Decision::Go)
    }

    /// Executes one step of a stop.
    pub(super) async fn climb(&mut self, rung: Rung) {
        let graceful = Duration::from_secs(self.shared.config.stop_timeout_s.into());
        let name = &self.record.name;
        let Some(boot) = self.boot.as_mut() else { return };
        tracing::debug!(vm = %name, ?rung, "stopping");
        boot.rung = Some(rung);
        boot.deadline = Some(Instant::now() + rung.patience(graceful));
        let result = match rung {
            Rung::AskAgent => {
                boot.ask_agent();
                Ok(())
            }
            Rung::AskVmm => boot.shim.shutdown().await,
            Rung::Kill => boot.shim.kill().await,
        };
        if let Err(error) = result {
            tracing::warn!(vm = %name, ?rung, %error, "this step of the stop failed");
            boot.deadline = Some(Instant::now() + Duration::from_millis(200));
        }
    }
}
