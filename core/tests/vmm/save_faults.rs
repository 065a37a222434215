//! Saves that fail: on a full disk, and with a VMM or a shim that is killed meanwhile. With the real QEMU.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nexus_core::internals::{Saved, ShimClient, VmmError};
use nix::sys::signal::Signal;

use crate::saves::{goes_on, ticking};
use crate::support::{Vm, ended, eventually, in_time, is_alive, signal};

const HOLD: Duration = Duration::from_secs(10);

/// A filesystem of a few KiB; unmounted when dropped.
struct SmallDisk(std::path::PathBuf);

impl SmallDisk {
    fn mount(at: std::path::PathBuf, kib: u32) -> Self {
        std::fs::create_dir(&at).unwrap();
        let size = format!("size={kib}k");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "none"]).arg(&at).output();
        let mounted = mounted.unwrap();
        assert!(
            mounted.status.success(),
            "mounting takes root: {}",
            String::from_utf8_lossy(&mounted.stderr)
        );
        Self(at)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg("--lazy").arg(&self.0).status();
        assert!(unmounted.is_ok_and(|status| status.success()) || std::thread::panicking());
    }
}

#[tokio::test]
async fn a_save_to_a_full_disk_fails_and_the_guest_goes_on() {
    let vm = ticking(true);
    let shim = vm.launch().await;
    goes_on(&vm).await;
    // The state of the devices does not fit; it does, but the memory does not.
    for kib in [4, 2048] {
        let disk = SmallDisk::mount(vm.scratch().join(format!("small-{kib}")), kib);
        let error = in_time(shim.save(&disk.0, HOLD)).await.unwrap_err();
        let VmmError::Refused { message, .. } = &error else { panic!("another error: {error:?}") };
        assert!(message.contains("No space left"), "{kib} KiB: {message}");
        let state = std::fs::metadata(disk.0.join("state")).unwrap().len();
        assert_eq!(state > 4096, kib > 4, "{kib} KiB: {state} bytes of state");
        goes_on(&vm).await;
    }
    // Nothing of it is in the way of the next one.
    let directory = vm.scratch().join("save");
    std::fs::create_dir(&directory).unwrap();
    in_time(shim.save(&directory, HOLD)).await.unwrap();
    in_time(shim.release_guest()).await.unwrap();
    goes_on(&vm).await;
    in_time(shim.kill()).await.unwrap();
    ended(&shim).await;
}

/// Begins a save of a VM whose VMM is stopped, so that it cannot get on, and kills a process of it.
async fn save_and_kill(vm: &Vm, shim: &ShimClient, victim: u32) -> Result<Saved, VmmError> {
    let directory = vm.scratch().join("save");
    std::fs::create_dir(&directory).unwrap();
    signal(shim.vmm().unwrap().pid, Signal::SIGSTOP);
    let kill = async {
        has_begun(&directory).await;
        signal(victim, Signal::SIGKILL);
    };
    let (saved, ()) = in_time(async { tokio::join!(shim.save(&directory, HOLD), kill) }).await;
    saved
}

/// Waits until the shim has been asked for a save to this directory.
async fn has_begun(directory: &Path) {
    eventually("the files of the save", || directory.join("ram").exists().then_some(())).await;
    // The request follows the files at once.
    tokio::time::sleep(Duration::from_millis(300)).await;
}

#[tokio::test]
async fn a_save_ends_with_the_vmm_that_is_killed_meanwhile() {
    let vm = ticking(true);
    let shim = vm.launch().await;
    goes_on(&vm).await;
    let vmm = shim.vmm().unwrap().pid;
    let error = save_and_kill(&vm, &shim, vmm).await.unwrap_err();
    assert!(matches!(error, VmmError::Refused { .. } | VmmError::Unanswered { .. }), "{error:?}");
    assert_eq!(ended(&shim).await.signal, Some(9));
    assert!(!is_alive(vmm));
    assert_eq!(vm.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn a_save_ends_with_the_shim_that_is_killed_meanwhile() {
    let vm = ticking(true);
    let shim = vm.launch().await;
    goes_on(&vm).await;
    let (vmm, own) = (shim.vmm().unwrap().pid, shim.identity().pid);
    let error = save_and_kill(&vm, &shim, own).await.unwrap_err();
    assert!(matches!(error, VmmError::Unanswered { .. }), "{error:?}");
    // A VMM without its shim is not left paused: it ends.
    assert!(ended(&shim).await.shim_lost);
    eventually("the VMM has ended", || (!is_alive(vmm)).then_some(())).await;
}
