//! Waking a VM that sleeps: its VMM starts with the memory that was saved, on the drives as they are.
//!
//! ```text
//! suspended ─> checked: memory, host, drives, free memory ─> starting ─> running: hello ─> renewed ─> ready ─> the saved memory is removed
//!      ^                          │                             │           │                └─ from here on what was saved is of the past
//!      └────── with a reason ─────┴─────────────────────────────┴───────────┘
//! ```

use std::time::Instant;

use nexus_schema::id::BootId;
use nexus_schema::link::ResumeKind;
use nexus_schema::network::NetworkMode;
use nexus_schema::tools::vm::VmState;
use nexus_schema::{ErrorCode, ToolError};
use tokio::task::spawn_blocking;

use super::Actor;
use super::suspend::marks;
use crate::context::RestoreFrom;
use crate::os::{failpoint, meminfo, remove};
use crate::progress::Progress;
use crate::store::suspended::Suspended;
use crate::store::vms::VmRecord;
use crate::vm::checkpoint::{check_at, same_card};
use crate::vm::policy;

/// Memory of the host that a wake leaves free, besides what the VM had in use.
const MEMORY_LEFT: u64 = 64 << 20;
/// What to do about a memory that cannot be restored.
const COLD: &str = "vm_start with cold: true gives the memory up and starts the VM from its disk";

impl Actor {
    /// Wakes the VM for a call, if it is suspended. Returns the boot that was begun or is running.
    pub(super) async fn wake_for_call(
        &mut self,
        who: &str,
        why: &str,
        asked: Instant,
    ) -> Result<BootId, ToolError> {
        match self.record.state {
            VmState::Suspended => match self.unwoken.as_ref().filter(|(failed, _)| asked < *failed) {
                Some((_, error)) => Err(error.clone()),
                None => self.wake(who, why, &Progress::default()).await,
            },
            VmState::Starting
            | VmState::Running
            | VmState::Ready
            | VmState::Unreachable
            | VmState::Paused => self
                .record
                .boot_id
                .ok_or_else(|| ToolError::internal(format!("{} runs without a boot id", self.record.name))),
            VmState::Creating
            | VmState::Created
            | VmState::Stopping
            | VmState::Stopped
            | VmState::Crashed
            | VmState::Failed => {
                let (name, state) = (self.record.name.as_str(), self.record.state);
                policy::guest_call(name, state, self.record.reason.as_deref())?;
                Err(ToolError::internal(format!("{name} is {state}, and cannot be woken")))
            }
        }
    }

    /// Wakes the VM, which is suspended. If that fails, it stays so, with the reason.
    pub(super) async fn wake(
        &mut self,
        who: &str,
        why: &str,
        progress: &Progress,
    ) -> Result<BootId, ToolError> {
        let Some(memory) = self.record.suspended.clone() else {
            return Err(ToolError::internal(format!("{} is suspended without a memory", self.record.name)));
        };
        progress.step("checking the memory");
        let woken = match self.check_wake(&memory).await {
            Ok(()) => {
                failpoint::reach("wake-checked");
                // A fault of the emulator must not make a cold start of it.
                self.had_mishap = true;
                let from = RestoreFrom {
                    who: who.to_owned(),
                    kind: ResumeKind::Wake,
                    directory: self.shared.paths.suspended(memory.manifest.checkpoint),
                    manifest: memory.manifest,
                    token: memory.token,
                    drives: Vec::new(),
                    if_boot: None,
                    progress: progress.clone(),
                };
                self.launch_from(Some(&from), who, why, progress).await
            }
            Err(error) => Err(error),
        };
        match &woken {
            Ok(_) => failpoint::reach("wake-launched"),
            Err(error) => {
                self.unwoken = Some((Instant::now(), error.clone()));
                let reason = Some(format!("it could not be woken: {}", error.message));
                if self.record.state == VmState::Suspended && self.record.reason != reason {
                    self.record.reason = reason;
                    self.write(None).await.ok();
                }
            }
        }
        woken
    }

    /// Fails if the saved memory cannot be restored, or the host has no memory for it. Nothing changes here.
    async fn check_wake(&self, memory: &Suspended) -> Result<(), ToolError> {
        let name = &self.record.name;
        let files = self.drive_files();
        let looked = spawn_blocking(move || (marks(&files), meminfo::read()));
        let (now, free) =
            looked.await.map_err(|e| ToolError::internal(format!("look at the drives: {e}")))?;
        let now = now.map_err(|error| {
            ToolError::new(ErrorCode::DriveNotFound, format!("wake {name}: {error}")).hint(COLD)
        })?;
        if now != memory.drives {
            let message =
                format!("wake {name}: its drives were written to, or are others, since it was suspended");
            return Err(ToolError::new(ErrorCode::Changed, message).hint(COLD));
        }
        same_card(&memory.manifest, self.record.spec.network.mode).map_err(|error| {
            ToolError::new(error.code, format!("wake {name}: {}", error.message)).hint(COLD)
        })?;
        let needed = memory.memory_bytes.saturating_add(MEMORY_LEFT);
        // Where it is not known, the VMM says whether there is enough.
        if let Ok(free) = free
            && free.available < needed
        {
            let message = format!(
                "wake {name}: it needs {} MiB of memory, and the host has {} MiB",
                needed >> 20,
                free.available >> 20
            );
            return Err(ToolError::new(ErrorCode::HostOutOfMemory, message)
                .hint("stop or suspend another VM with vm_stop or vm_pause, then call again"));
        }
        let directory = self.shared.paths.suspended(memory.manifest.checkpoint);
        let checked = check_at(&self.shared, directory, memory.manifest.clone()).await;
        let checked = checked.map_err(|error| error.hint(COLD))?;
        checked.map(drop).map_err(|error| {
            let code = match error.is_of_files() {
                true => ErrorCode::VerificationFailed,
                false => ErrorCode::HostUnsuitable,
            };
            let message = format!("wake {name}: {}", nexus_schema::error::chain(&error));
            ToolError::new(code, message).hint(COLD)
        })
    }

    /// Gives the memory of a suspended VM up: it is stopped then.
    pub(super) async fn give_up_memory(&mut self, who: &str, why: &str) -> Result<(), ToolError> {
        let before = self.record.clone();
        let memory = self.record.suspended.take();
        let why = format!("{why}: its memory was given up");
        if let Err(error) = self.transition(VmState::Stopped, None, &why, who).await {
            self.record = VmRecord { generation: self.record.generation, ..before };
            self.unwritten = None;
            self.publish();
            return Err(error);
        }
        failpoint::reach("suspend-given-up");
        if let Some(memory) = memory {
            remove::tree(&self.shared.paths.suspended(memory.manifest.checkpoint)).await;
        }
        Ok(())
    }

    /// After the end of the VMM: whether the VM is suspended, since it was to be, or could not be woken for the reason `why`.
    pub(super) async fn sleep_on(&mut self, why: &str) -> bool {
        let Some(memory) = self.record.suspended.as_ref().map(|memory| memory.manifest.checkpoint) else {
            return false;
        };
        let was = self.record.state;
        if !policy::falls_asleep(&mut self.record) {
            remove::tree(&self.shared.paths.suspended(memory)).await;
            return false;
        }
        let reason = (was != VmState::Stopping).then(|| format!("it could not be woken: {why}"));
        self.settle(VmState::Suspended, reason, "its memory is on the disk").await;
        true
    }

    /// Forgets the saved memory of a VM whose guest has gone on from it.
    pub(super) async fn forget_if_renewed(&mut self) {
        let is_up = self.record.state == VmState::Running;
        let is_renewed = is_up && self.record.guest.as_ref().is_some_and(|guest| guest.configured);
        if is_renewed && let Some(memory) = self.record.suspended.take() {
            remove::tree(&self.shared.paths.suspended(memory.manifest.checkpoint)).await;
        }
    }

    /// Refuses a network mode that a suspended VM could not be woken with.
    pub(super) fn check_card(&self, mode: NetworkMode) -> Result<(), ToolError> {
        match &self.record.suspended {
            Some(memory) => same_card(&memory.manifest, mode),
            None => Ok(()),
        }
    }
}
