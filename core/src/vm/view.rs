//! Conversions of a VM's view into results for callers: the link for guest calls, a row of a list, or all details.

use nexus_schema::id::{VmId, VmKind};
use nexus_schema::link::{PROTOCOL, PROTOCOL_MIN};
use nexus_schema::network::NetworkMode;
use nexus_schema::tools::vm::{
    IdleAction, PublishedPort, VmConnect, VmDetails, VmDrive, VmGuest, VmImage, VmNetwork, VmProcess,
    VmSummary,
};
use nexus_schema::{ErrorCode, Reference, ToolError};

use super::{lifetime, network, policy};
use crate::context::{Shared, View};
use crate::guest::Link;
use crate::op::store_error;
use crate::os::paths::{Paths, vm_files};
use crate::store::vms::VmRecord;
use crate::store::{StoreError, assets, images, ports};

impl View {
    /// Returns the link, if the guest's tools may be called now.
    pub(crate) fn guest_link(&self) -> Result<&Link, ToolError> {
        let record = &self.record;
        let name = record.name.as_str();
        if record.state.may_run()
            && let Some(guest) = &record.guest
            && guest.protocol < PROTOCOL_MIN
        {
            return Err(outdated(name, guest.protocol));
        }
        policy::guest_call(name, record.state, record.reason.as_deref())?;
        self.link.as_ref().ok_or_else(|| {
            ToolError::new(ErrorCode::GuestUnreachable, format!("the agent of {name} does not answer"))
                .hint("try again; vm_inspect shows its state")
        })
    }

    /// Returns the VM's row of a list.
    pub(crate) fn summary(record: &VmRecord) -> VmSummary {
        VmSummary {
            id: record.id,
            name: record.name.clone(),
            state: record.state,
            reason: record.reason.clone(),
            image: record.image_name.clone(),
            vcpus: record.spec.vcpus,
            memory: record.spec.memory,
            created_at: record.created_at,
            boot_id: record.boot_id,
            expires_at: record.expires_at,
            protected: record.protected,
            tags: record.tags.clone(),
        }
    }

    /// Returns all details of the VM.
    fn details(
        &self,
        paths: &Paths,
        image: VmImage,
        kernel: String,
        published: Vec<PublishedPort>,
        network: VmNetwork,
        note: String,
    ) -> VmDetails {
        let record = &self.record;
        let directory = paths.vm(record.id);
        let show = |name: &str| directory.join(name).display().to_string();
        VmDetails {
            id: record.id,
            name: record.name.clone(),
            state: record.state,
            reason: record.reason.clone(),
            owner: record.owner.clone(),
            vcpus: record.spec.vcpus,
            memory: record.spec.memory,
            driver: record.driver.clone().unwrap_or_else(|| "auto".into()),
            driver_version: record.driver_version.clone(),
            accel: record.accel.clone(),
            init: record.spec.init,
            network_note: Some(note),
            network,
            image,
            kernel,
            drives: self
                .drives
                .iter()
                .map(|drive| VmDrive {
                    id: drive.id,
                    name: drive.name.clone(),
                    root: drive.is_root(),
                    mount: drive.attachment.as_ref().and_then(|a| a.mount.clone()),
                    read_only: drive.read_only,
                    size: drive.size,
                    path: paths.drive(drive.id).join(crate::drive::DISK).display().to_string(),
                })
                .collect(),
            guest: record.guest.as_ref().map(|guest| VmGuest {
                protocol: guest.protocol,
                build: guest.hello.build.clone(),
                kernel: guest.hello.kernel.clone(),
                os: guest.hello.os.clone(),
                image: guest.hello.image.clone(),
                problems: guest.problems.clone(),
            }),
            process: record.processes.filter(|_| record.state.may_run()).map(|processes| VmProcess {
                pid: processes.vmm_pid,
                shim_pid: processes.shim_pid,
                vsock_socket: show(vm_files::VSOCK),
                directory: directory.display().to_string(),
                walls: None,
            }),
            usage: None,
            boot_id: record.boot_id,
            cid: record.cid,
            connect: VmConnect { shell: format!("nexusctl shell {}", record.name) },
            published,
            console_log: show(vm_files::CONSOLE),
            timings: record.timings,
            protected: record.protected,
            tags: record.tags.clone(),
            created_at: record.created_at,
            started_at: record.started_at,
            expires_at: record.expires_at,
            idle_stop: record.spec.idle_stop,
            idle_action: Some(record.spec.idle_action).filter(|action| *action != IdleAction::Stop),
            idle_stop_at: None,
            parent_id: record.lineage.parent,
            checkpoint_id: record.lineage.checkpoint,
            run: None,
            generation: record.generation,
        }
    }
}

/// Returns all details of a VM.
pub(crate) async fn details(shared: &Shared, vm: &Reference<VmKind>) -> Result<VmDetails, ToolError> {
    let handle = shared.vms.of_daemon(vm)?;
    let (view, idle) = (handle.view.borrow().clone(), handle.activity.idle());
    let (vm, image_id, kernel_id) = (view.record.id, view.record.image_id, view.record.kernel_id);
    let (image, kernel, lineage, published) = shared
        .store
        .read(move |db| -> Result<_, StoreError> {
            let image = match image_id {
                Some(id) => images::get(db, &Reference::Id(id))?,
                None => None,
            };
            let mut lineage = Vec::new();
            let mut parent = image.as_ref().and_then(|i| i.parent_id);
            while let Some(id) = parent
                && lineage.len() < 32
            {
                let Some(ancestor) = images::get(db, &Reference::Id(id))? else { break };
                parent = ancestor.parent_id;
                lineage.push(format!("{} ({})", ancestor.name, ancestor.origin(false)));
            }
            let kernel = match kernel_id {
                Some(id) => assets::get(db, &Reference::Id(id))?,
                None => None,
            };
            Ok((image, kernel, lineage, ports::of_vm(db, vm)?))
        })
        .await
        .map_err(store_error)?;
    let image = VmImage {
        id: image.as_ref().map(|i| i.id),
        name: view.record.image_name.clone(),
        distro: image.as_ref().and_then(|i| i.distro.clone()),
        config: image.as_ref().and_then(|i| i.config.clone()),
        // Whoever sees this VM need not see the one that its image was made of.
        source: image.map(|i| i.origin(false).to_owned()),
        lineage,
    };
    let kernel = kernel.map_or_else(|| view.record.spec.kernel.clone(), |k| k.name.to_string());
    let published = published.iter().map(|port| shared.published.shown(&shared.paths, port)).collect();
    let network = network::shown(shared, &view.record).await?;
    let idle_stop_at = lifetime::idle_stop_at(&view.record, idle);
    let note = note(shared, vm, &network);
    let details = view.details(&shared.paths, image, kernel, published, network, note);
    Ok(VmDetails { idle_stop_at, ..details })
}

/// Explains a VM's network to whoever works in the VM, or says what is wrong with it.
pub(crate) fn note(shared: &Shared, vm: VmId, network: &VmNetwork) -> String {
    match shared.nat.problem(vm) {
        Some(why) => format!(
            "nexus-net could not attach the VM's interface again: it may not work, and changes of its policy do not apply yet; nexusd \
            tries again: {why}"
        ),
        None => meaning(network),
    }
}

fn meaning(network: &VmNetwork) -> String {
    if network.until_next_start.is_some() {
        return "nat takes effect at the next start (vm_restart); until then programs reach other machines through the proxy \
            in http_proxy, https_proxy and all_proxy"
            .into();
    }
    match (network.mode, network.counts.denied) {
        (NetworkMode::None, _) => {
            r#"this VM has no network; move files with the guest_file tools or at creation, or ask for vm_update network={"mode":"proxy"}"#.into()
        }
        (NetworkMode::Proxy, 0) => {
            "programs reach other machines through the proxy in http_proxy, https_proxy and all_proxy; there is no interface".into()
        }
        (NetworkMode::Nat, 0) => {
            let address = network.interface.as_ref().map(|interface| format!(" {}", interface.ipv4)).unwrap_or_default();
            format!("programs reach other machines through the VM's interface; the host translates its address{address} to its own")
        }
        (NetworkMode::Proxy | NetworkMode::Nat, denied) => {
            format!("{denied} connections were refused by policy; to change it, use vm_update network.allow")
        }
    }
}

/// Returns the error for a guest whose protocol version this daemon does not support.
pub(crate) fn outdated(name: &str, protocol: u32) -> ToolError {
    let than = if protocol < PROTOCOL_MIN {
        format!("older than {PROTOCOL_MIN}, the oldest")
    } else {
        format!("newer than {PROTOCOL}, the newest")
    };
    ToolError::new(
        ErrorCode::GuestOutdated,
        format!("the agent of {name} speaks protocol {protocol}, {than} that this daemon supports"),
    )
    .hint("restart the VM with vm_restart: it gets the agent of this daemon")
}
