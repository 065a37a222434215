//! Saves and restores of VMs through their shims: with the real QEMU, and of those whose driver does not support them.

use std::path::Path;
use std::time::Duration;

use nexus_core::internals::{Link, Restore, SavedKind, VmmError, console};
use nexus_schema::id::{BootId, VmId};

use crate::qemu;
use crate::support::{Vm, ended, eventually, in_time, is_alive};

const HOLD: Duration = Duration::from_secs(10);

fn forever() -> Vm {
    Vm::script("echo up; : > v.sock; exec sleep 1000")
}

#[tokio::test]
async fn a_vm_that_cannot_be_saved_says_so_and_runs_on() {
    let vm = forever();
    let shim = vm.launch().await;
    let directory = vm.scratch().join("save");
    std::fs::create_dir(&directory).unwrap();
    let error = in_time(shim.save(&directory, HOLD)).await.unwrap_err();
    assert_eq!(error.to_string(), "the VMM refused to save the guest: this VMM cannot do that");
    let vmm = shim.vmm().unwrap().pid;
    let stat = std::fs::read_to_string(format!("/proc/{vmm}/stat")).unwrap();
    assert!(!stat.rsplit_once(") ").unwrap().1.starts_with('T') && is_alive(vmm), "{stat}");
    let error = in_time(shim.set_link(true)).await.unwrap_err();
    assert_eq!(error.to_string(), "the VMM refused to connect its network: this VMM cannot do that");
    in_time(shim.kill()).await.unwrap();
}

#[tokio::test]
async fn a_save_never_overwrites_what_is_there() {
    let vm = forever();
    let shim = vm.launch().await;
    std::fs::write(vm.scratch().join("ram"), "precious").unwrap();
    let error = in_time(shim.save(vm.scratch(), HOLD)).await.unwrap_err();
    let VmmError::File { action: "make", path, .. } = error else { panic!("another error") };
    assert_eq!(path, vm.scratch().join("ram"));
    assert_eq!(std::fs::read_to_string(path).unwrap(), "precious");
    in_time(shim.kill()).await.unwrap();
}

#[tokio::test]
async fn a_driver_without_checkpoints_restores_nothing() {
    let mut vm = forever();
    vm.plan.restore = Some(Restore {
        state: vm.scratch().join("state"),
        ram: vm.scratch().join("ram"),
        kind: SavedKind::Shared,
        nonce: "00ff".into(),
    });
    let error = vm.fails_to_launch().await.to_string();
    let why = "process cannot restore this VM: the driver does not support checkpoints; use qemu";
    assert!(error.contains(why), "{error}");
}

const FIRST: &str = "init is up\n";
const TICK: &str = "tick\n";

/// A VM that can be saved; its guest says that it is up, then ticks.
pub(crate) fn ticking(jail: bool) -> Vm {
    let init = qemu::init_that_ticks(FIRST, TICK);
    let mut vm = qemu::vm(&qemu::initramfs("init", 0o100_755, &init));
    vm.plan.link = Link::Serial;
    vm.plan.jail = jail;
    vm
}

/// Another VM that goes on from what was saved in `directory`.
fn restored(saved: &Vm, directory: &Path) -> Vm {
    let mut vm = ticking(saved.plan.jail);
    vm.plan.vm = VmId::from_i64(5).unwrap();
    vm.plan.boot_id = BootId::from_i64(6).unwrap();
    vm.plan.cid = saved.plan.cid + 1;
    // Its kernel is in its memory.
    vm.plan.kernel = "/nowhere/kernel".into();
    vm.plan.initramfs = "/nowhere/initramfs".into();
    vm.plan.restore = Some(Restore {
        state: directory.join("state"),
        ram: directory.join("ram"),
        kind: SavedKind::Shared,
        nonce: "00ff".into(),
    });
    vm
}

fn ticks(vm: &Vm) -> (usize, bool) {
    let text = String::from_utf8_lossy(&console::tail(vm.directory(), 1 << 16)).replace('\r', "");
    (text.matches(TICK).count(), text.contains(FIRST))
}

/// Waits until the guest has ticked some more.
pub(crate) async fn goes_on(vm: &Vm) {
    let (before, _) = ticks(vm);
    eventually("further ticks", || (ticks(vm).0 > before + 2).then_some(())).await;
}

async fn saved_goes_on(jail: bool) {
    let vm = ticking(jail);
    let shim = vm.launch().await;
    goes_on(&vm).await;
    assert!(ticks(&vm).1);
    let directory = vm.scratch().join("save");
    std::fs::create_dir(&directory).unwrap();
    let saved = in_time(shim.save(&directory, Duration::from_secs(50))).await.unwrap();
    assert_eq!((saved.kind, saved.qemu.version.as_str()), (SavedKind::Shared, &*shim.vmm().unwrap().version));
    assert_eq!(saved.state_bytes, std::fs::metadata(directory.join("state")).unwrap().len());
    assert_eq!(vm.plan.memory.as_bytes(), std::fs::metadata(directory.join("ram")).unwrap().len());
    assert!(saved.ram_bytes < vm.plan.memory.as_bytes(), "{saved:?}");
    // Held, so that its drives can be copied.
    in_time(shim.hold_guest(Duration::from_secs(50))).await.unwrap();
    let child = restored(&vm, &directory);
    std::fs::copy(&vm.plan.drives[0].path, &child.plan.drives[0].path).unwrap();
    in_time(shim.release_guest()).await.unwrap();
    goes_on(&vm).await;

    let of_child = child.launch().await;
    goes_on(&child).await;
    assert!(!ticks(&child).1, "it has booted");
    goes_on(&vm).await;
    // It is saved as any other, also while it is paused for good.
    let again = child.scratch().join("save");
    std::fs::create_dir(&again).unwrap();
    in_time(of_child.pause()).await.unwrap();
    in_time(of_child.save(&again, Duration::from_secs(50))).await.unwrap();
    in_time(of_child.release_guest()).await.unwrap();
    in_time(of_child.kill()).await.unwrap();
    ended(&of_child).await;

    // A drive that another VM uses is not taken.
    let mut second = restored(&vm, &directory);
    second.plan.drives = vm.plan.drives.clone();
    let error = second.fails_to_launch().await.to_string();
    assert!(error.contains("lock"), "{error}");
    goes_on(&vm).await;
    in_time(shim.kill()).await.unwrap();
    ended(&shim).await;
}

#[tokio::test]
async fn a_saved_guest_goes_on_in_another_vm() {
    saved_goes_on(false).await;
}

#[tokio::test]
async fn a_saved_guest_goes_on_in_another_jail() {
    saved_goes_on(true).await;
}

#[tokio::test]
async fn a_saved_guest_that_nobody_releases_goes_on_by_itself() {
    let vm = ticking(true);
    let shim = vm.launch().await;
    goes_on(&vm).await;
    let directory = vm.scratch().join("save");
    std::fs::create_dir(&directory).unwrap();
    in_time(shim.save(&directory, Duration::from_millis(200))).await.unwrap();
    goes_on(&vm).await;
    in_time(shim.kill()).await.unwrap();
    ended(&shim).await;
}

#[tokio::test]
async fn a_state_that_is_cut_off_is_refused() {
    let vm = ticking(true);
    let shim = vm.launch().await;
    goes_on(&vm).await;
    let directory = vm.scratch().join("save");
    std::fs::create_dir(&directory).unwrap();
    in_time(shim.save(&directory, HOLD)).await.unwrap();
    in_time(shim.kill()).await.unwrap();
    ended(&shim).await;
    let state = std::fs::File::options().write(true).open(directory.join("state")).unwrap();
    state.set_len(state.metadata().unwrap().len() / 2).unwrap();
    let VmmError::Launch { exit, vmm_log, .. } = restored(&vm, &directory).fails_to_launch().await else {
        panic!("another error")
    };
    assert_eq!(exit.code, Some(1), "{exit:?}");
    assert!(vmm_log.contains("load of migration failed"), "{vmm_log}");
}
