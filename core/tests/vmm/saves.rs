//! Saves and restores of VMs whose driver or guest link does not support them.

use std::time::Duration;

use nexus_core::internals::{Restore, SavedKind, VmmError};

use crate::support::{Vm, in_time, is_alive};

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
