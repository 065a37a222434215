//! The start of a VM, up to a VMM that runs.

use nexus_schema::ToolError;
use nexus_schema::id::BootId;
use nexus_schema::network::NetworkMode;
use nexus_schema::tools::vm::VmState;

use super::{Actor, processes_of, restore};
use crate::asset::KernelFiles;
use crate::context::{Decision, RestoreFrom};
use crate::guest::Restored;
use crate::op::store_error;
use crate::os::{failpoint, random};
use crate::progress::Progress;
use crate::store::vms::VmRecord;
use crate::store::{now, random_id, restores};
use crate::vm::boot::{self, Boot, Clock};
use crate::vm::network::Leased;
use crate::vm::{checkpoint, network, packages, policy, warm};
use crate::vmm::LaunchPlan;
use crate::vmm::doctor::Choice;

/// What a launch needs beside the drives.
#[derive(Debug)]
pub(super) struct Needs {
    choice: Choice,
    leased: Option<Leased>,
    kernel: Option<KernelFiles>,
}

impl Actor {
    pub(super) async fn start(
        &mut self,
        who: &str,
        why: &str,
        progress: &Progress,
    ) -> Result<BootId, ToolError> {
        let name = self.record.name.clone();
        if policy::start(name.as_str(), self.record.state)? == Decision::Already {
            if self.record.state == VmState::Paused {
                self.resume(who).await?;
            }
            return self
                .record
                .boot_id
                .ok_or_else(|| ToolError::internal(format!("{name} runs without a boot id")));
        }
        if self.record.state == VmState::Suspended {
            return Box::pin(self.wake(who, why, progress)).await;
        }
        if let Some(from) = self.record.spec.warm
            && self.record.state == VmState::Created
        {
            return Box::pin(self.start_warm(from, who, why, progress)).await;
        }
        self.had_mishap = false;
        self.launch(who, why, progress).await
    }

    /// Launches the VMM from a state in which none runs, or after a reboot.
    pub(super) async fn launch(
        &mut self,
        who: &str,
        why: &str,
        progress: &Progress,
    ) -> Result<BootId, ToolError> {
        self.launch_from(None, who, why, progress).await
    }

    /// The same, from a checkpoint if one is given.
    pub(super) async fn launch_from(
        &mut self,
        from: Option<&RestoreFrom>,
        who: &str,
        why: &str,
        progress: &Progress,
    ) -> Result<BootId, ToolError> {
        self.again_at = None;
        let mut clock = Clock::start();
        self.check_alone().await?;
        Box::pin(self.finish_rollback()).await?;
        // All checks come before any change.
        let Needs { choice, leased, kernel } = self.needs(from).await?;
        let search = network::search(&self.shared, &self.record, leased.as_ref()).await?;
        let _locked = self.lock_drives().await?;
        if from.is_none() {
            self.leave_prepared().await?;
        }
        self.check_drives()?;
        self.settle_drives().await?;
        if from.is_none() {
            self.label_forked().await?;
        }
        progress.step("starting the VMM");
        let before = self.record.clone();
        packages::refill(&self.shared, &mut self.record.spec.network).await;
        // That of a machine that waits for this VM is known already.
        let known = self.waiting.as_ref().filter(|_| from.is_some()).map(|waiting| waiting.boot_id);
        let boot_id: BootId = known.unwrap_or_else(random_id);
        if known.is_some() {
            // Its VMM runs: a later daemon has to know why.
            self.note_restore(boot_id).await?;
        }
        let token = random::token();
        self.record.boot_id = Some(boot_id);
        self.record.token = Some(token.clone());
        self.record.guest = None;
        self.record.timings = None;
        self.record.processes = None;
        self.record.driver = Some(choice.driver.as_str().into());
        self.record.driver_version = Some(choice.version.clone());
        self.record.accel = Some(choice.accel.as_str().into());
        self.record.started_at = Some(now());
        if let Err(error) = self.transition(VmState::Starting, None, why, who).await {
            // A start that cannot be recorded does not happen.
            self.record = VmRecord { generation: self.record.generation, ..before };
            self.unwritten = None;
            self.publish();
            return Err(error);
        }

        let mut configure = boot::configure(
            &self.shared,
            &self.record,
            &self.drives,
            boot_id,
            &token,
            leased.as_ref(),
            search,
        );
        let (restore, restored) = from.map(|from| restore::begin(from, &mut configure)).unzip();
        let waiting = self.waiting.take();
        let stray = waiting.as_ref().map(|waiting| waiting.shim.clone());
        let restored = match (restored, &waiting) {
            (Some(restored), Some(waiting)) => Some(Restored { nonce: waiting.nonce.clone(), ..restored }),
            (restored, _) => restored,
        };
        let launched = async {
            let initramfs = self.shared.initramfs(kernel.as_ref()).await?;
            if from.is_some() {
                self.note_restore(boot_id).await?;
            }
            let (shared, record, drives) = (&self.shared, &self.record, &self.drives);
            let interface = match &leased {
                Some(leased) => {
                    let tap = network::connect(shared, record, leased, boot_id).await?;
                    failpoint::reach("start-connected");
                    Some(network::interface(shared, record, leased, tap))
                }
                None => None,
            };
            let plan = LaunchPlan {
                interface,
                restore,
                ..boot::plan(shared, record, drives, boot_id, &choice, kernel.as_ref(), &initramfs)
            };
            fs_err::create_dir_all(&plan.directory)
                .map_err(|e| ToolError::internal(format!("make the VM's directory: {e}")))?;
            clock.timings.plan_ms = clock.step();
            let policy = network::of_proxy(&record.spec.network, leased.is_none());
            let egress = shared.egresses.of(record.id, &policy);
            let restored = (restored, waiting.map(|waiting| waiting.shim));
            Boot::launch(&self.shared, &plan, configure, restored, egress, clock)
                .await
                .map_err(|error| boot::launch_failed(self.record.name.as_str(), &error))
        }
        .await;
        match launched {
            Ok(mut boot) => {
                failpoint::reach("start-launched");
                boot.clock.timings.spawn_ms = boot.clock.step();
                self.record.processes = processes_of(&boot.shim);
                self.boot = Some(boot);
                self.write(None).await.ok();
                failpoint::reach("start-recorded");
                progress.step("booting");
                Ok(boot_id)
            }
            Err(error) => {
                if let Some(shim) = stray {
                    warm::pool::end_vmm(&shim).await;
                }
                if leased.is_some() {
                    network::disconnect(&self.shared, &self.record).await;
                }
                // A warm start becomes a cold one.
                if !self.sleep_on(&error.message).await && self.record.spec.warm.is_none() {
                    let reason = Some(error.message.clone());
                    self.settle(VmState::Failed, reason, "the VMM could not be started").await;
                }
                Err(error)
            }
        }
    }

    /// Records that this boot goes on from a checkpoint.
    async fn note_restore(&self, boot: BootId) -> Result<(), ToolError> {
        let id = self.record.id;
        let noted = self.shared.store.write(move |tx| restores::begin_restore(tx, id, boot)).await;
        noted.map_err(store_error)
    }

    /// Finds what a launch needs beside the drives. Nothing changes, except that the VM gets addresses if it is to have a network interface.
    pub(super) async fn needs(&self, from: Option<&RestoreFrom>) -> Result<Needs, ToolError> {
        let choice = match from {
            Some(from) => checkpoint::choose(&self.shared, &from.manifest).await?,
            None => self.shared.choose_driver_of(&self.record).await?,
        };
        let leased = match self.record.spec.network.mode {
            NetworkMode::Nat => {
                network::check(&*self.shared.host(false).await?, &choice)?;
                Some(network::lease(&self.shared, self.record.id).await?)
            }
            NetworkMode::None | NetworkMode::Proxy => None,
        };
        let kernel = self.shared.kernel_files(&self.record).await?;
        Ok(Needs { choice, leased, kernel })
    }
}
