//! The requests that configure, start, save and restore a guest. Pure functions.

use std::path::Path;

use nexus_schema::ByteSize;
use nexus_schema::network::Bandwidth;
use serde_json::{Value, json};

use crate::os::paths::vm_files;
use crate::vmm::control::Job;
use crate::vmm::jail::Files;
use crate::vmm::plan::LaunchPlan;

/// One request to the API.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Request {
    pub(super) method: &'static str,
    pub(super) path: String,
    pub(super) body: Value,
}

/// Id of a VM's network interface.
const INTERFACE: &str = "net0";
/// The limiters of an interface: of the traffic to the guest, and from it.
const RX: &str = "rx_rate_limiter";
const TX: &str = "tx_rate_limiter";
/// What may pass at once, at least, in bytes: the largest packet of segmentation offload.
const BURST_MIN: u64 = 64 << 10;
/// The time in which what may pass at once comes again, in milliseconds, unless the limit is very low.
const REFILL_MS: u64 = 100;
/// Path of the request for firecracker's version.
pub(super) const VERSION: &str = "/version";

fn put(path: impl Into<String>, body: Value) -> Request {
    Request { method: "PUT", path: path.into(), body }
}

/// Returns the request for an action, such as `InstanceStart`.
pub(super) fn action(action: &str) -> Request {
    put("/actions", json!({ "action_type": action }))
}

fn patch(path: impl Into<String>, body: Value) -> Request {
    Request { method: "PATCH", path: path.into(), body }
}

/// Returns the request that pauses or resumes the guest's processors.
pub(super) fn set_paused(paused: bool) -> Request {
    patch("/vm", json!({ "state": if paused { "Paused" } else { "Resumed" } }))
}

/// Returns the request that writes a paused guest to the files for saved guests. Afterwards, its connections to the host are new ones.
pub(super) fn save() -> Request {
    let (state, ram) = (vm_files::SAVED_STATE, vm_files::SAVED_RAM);
    put("/snapshot/create", json!({ "snapshot_type": "Full", "snapshot_path": state, "mem_file_path": ram }))
}

/// Returns the request that goes on with a saved guest, in a firecracker that was not configured. Its drives are found at the paths that they had.
pub(super) fn load(plan: &LaunchPlan) -> Request {
    let (state, ram) = (vm_files::LOADED_STATE, vm_files::LOADED_RAM);
    let mut body = json!({
        "snapshot_path": state,
        "mem_backend": { "backend_type": "File", "backend_path": ram },
        "vsock_override": { "uds_path": vm_files::VSOCK },
        "resume_vm": true,
    });
    if let Some(interface) = &plan.interface {
        body["network_overrides"] = json!([{ "iface_id": INTERFACE, "host_dev_name": interface.tap }]);
    }
    put("/snapshot/load", body)
}

/// Returns the request that makes firecracker read the size of a drive's file again and tell the guest. `file` is the drive's file as
/// firecracker sees it.
pub(super) fn update_drive(id: &str, file: &Path) -> Request {
    let body = json!({ "drive_id": id, "path_on_host": text(file) });
    patch(format!("/drives/{id}"), body)
}

/// Returns the request that changes the limits of a running VM's interface, or ends them.
pub(super) fn limit(bandwidth: Bandwidth) -> Request {
    let Bandwidth { rx, tx } = bandwidth;
    let body = json!({ "iface_id": INTERFACE, RX: limiter(rx), TX: limiter(tx) });
    patch(format!("/network-interfaces/{INTERFACE}"), body)
}

/// Returns a limiter of so many bytes per second. A bucket of no size ends a limit.
fn limiter(per_second: Option<ByteSize>) -> Value {
    let (size, refill_time) = match per_second.map(ByteSize::as_bytes) {
        None => (0, 0),
        Some(rate) => {
            let size = (rate * REFILL_MS / 1000).max(BURST_MIN);
            (size, (size * 1000).div_ceil(rate.max(1)))
        }
    };
    json!({ "bandwidth": { "size": size, "refill_time": refill_time } })
}

/// Returns all requests before the start.
pub(super) fn configure(job: &Job, files: &Files) -> Vec<Request> {
    let plan = &job.plan;
    let mut requests = vec![
        put(
            "/machine-config",
            json!({ "vcpu_count": plan.vcpus, "mem_size_mib": plan.memory.as_mib(), "smt": false }),
        ),
        put(
            "/boot-source",
            json!({
                "kernel_image_path": text(&files.kernel),
                "initrd_path": text(&files.initramfs),
                "boot_args": kernel_command_line(plan),
            }),
        ),
    ];
    for (drive, path) in plan.drives.iter().zip(&files.drives) {
        requests.push(put(
            format!("/drives/{}", drive.id),
            json!({
                "drive_id": drive.id,
                "path_on_host": text(path),
                // The initramfs mounts it by its device name; firecracker must not add it to the kernel's command line.
                "is_root_device": false,
                "is_read_only": drive.read_only,
                // The guest's flushes reach the disk.
                "cache_type": "Writeback",
            }),
        ));
    }
    if let Some(interface) = &plan.interface {
        let mut body =
            json!({ "iface_id": INTERFACE, "host_dev_name": interface.tap, "guest_mac": interface.mac });
        let Bandwidth { rx, tx } = interface.bandwidth;
        for (name, limit) in [(RX, rx), (TX, tx)] {
            if let Some(limit) = limit {
                body[name] = limiter(Some(limit));
            }
        }
        requests.push(put(format!("/network-interfaces/{INTERFACE}"), body));
    }
    requests.push(put("/vsock", json!({ "guest_cid": plan.cid, "uds_path": vm_files::VSOCK })));
    requests.push(put("/entropy", json!({})));
    requests
}

/// Converts a path to text. Lossless: the paths come from the plan, which is JSON.
fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn kernel_command_line(plan: &LaunchPlan) -> String {
    // Reboot through the keyboard controller's reset, which ends firecracker. There is no PCI, and no other device on that controller.
    let own = "console=ttyS0 quiet panic=-1 reboot=k pci=off i8042.noaux i8042.nomux i8042.dumbkbd";
    let words = std::iter::once(own).chain(plan.cmdline.iter().map(String::as_str));
    words.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod description;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::plan::tests::plan;
    use crate::vmm::plan::{PlanDrive, PlanInterface};

    pub(super) fn all() -> Vec<Request> {
        let mut plan = plan();
        let bandwidth = Bandwidth { rx: Some(ByteSize::mib(10)), tx: Some(ByteSize::bytes(16 << 10)) };
        plan.interface = Some(PlanInterface { bandwidth, ..crate::vmm::plan::tests::interface() });
        plan.drives.push(PlanDrive { id: "data1".into(), path: "/data/disk".into(), read_only: true });
        let files = Files::of(&plan);
        let load = load(&plan);
        let mut requests = configure(&Job { plan, tsc_khz: None }, &files);
        requests.push(action("InstanceStart"));
        requests.push(action("SendCtrlAltDel"));
        requests.push(update_drive("data1", Path::new("/data/disk")));
        requests.push(limit(Bandwidth { rx: None, tx: bandwidth.rx }));
        requests.extend([set_paused(true), save(), set_paused(false), load]);
        requests
    }

    #[test]
    fn limiters_let_pass_what_is_asked_for() {
        for rate in [Bandwidth::MIN, ByteSize::mib(1), ByteSize::bytes(1_234_567), Bandwidth::MAX] {
            let limiter = limiter(Some(rate));
            let number = |key: &str| limiter["bandwidth"][key].as_u64().unwrap();
            let passes = number("size") as f64 * 1000.0 / number("refill_time") as f64;
            let wanted = rate.as_bytes() as f64;
            assert!(passes <= wanted && passes > 0.98 * wanted, "{rate}: {passes}");
            assert!(number("size") >= BURST_MIN && i64::try_from(number("size")).is_ok());
        }
        // An interface without limits is configured as ever.
        let mut plan = plan();
        plan.interface = Some(crate::vmm::plan::tests::interface());
        let files = Files::of(&plan);
        let requests = configure(&Job { plan, tsc_khz: None }, &files);
        let interface = requests.iter().find(|request| request.path.ends_with(INTERFACE)).unwrap();
        assert_eq!(interface.body.as_object().unwrap().len(), 3, "{}", interface.body);
    }

    #[test]
    fn requests_of_a_vm() {
        let text: Vec<String> = all().iter().map(|r| format!("{} {} {}", r.method, r.path, r.body)).collect();
        insta::assert_snapshot!("firecracker", text.join("\n"));
    }
}
