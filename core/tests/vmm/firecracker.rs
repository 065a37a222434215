//! The driver `firecracker` against what was recorded from a real one: the stand-in of `bin/test_firecracker.rs` answers and exits
//! as that did, through the shim, with and without a (stand-in) jailer. Where hardware KVM and a firecracker are, the tests of the
//! whole system run on the real one.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nexus_core::host::socket::{bind_in, connect_in};
use nexus_core::internals::{Caps, PlanDrive, Restore, SavedKind, Stall, VmmError, console, read_exit};
use nexus_schema::id::{BootId, VmId};
use nexus_schema::network::Bandwidth;
use nexus_schema::{ByteSize, DriverKind};
use nix::sys::signal::Signal;

use crate::support::{Vm, ended, eventually, in_time, is_alive, signal};

const STAND_IN: &str = env!("CARGO_BIN_EXE_nexus-test-firecracker");
const HOLD: Duration = Duration::from_secs(30);

/// A VM for the stand-in; with a jailer beside it, which only root can use.
fn vm(with_jailer: bool) -> Vm {
    let mut vm = Vm::new(DriverKind::Firecracker);
    let scratch = vm.scratch().to_owned();
    let file = |name: &str| {
        let path: PathBuf = scratch.join(name);
        std::fs::write(&path, name).unwrap();
        path
    };
    vm.plan.kernel = file("the kernel");
    vm.plan.initramfs = file("the initramfs");
    let drives = [("root", "the root drive", false), ("data", "the data drive", true)];
    vm.plan.drives =
        drives.map(|(id, name, read_only)| PlanDrive { id: id.into(), path: file(name), read_only }).into();
    let mut names = vec!["firecracker"];
    if with_jailer {
        assert!(nix::unistd::geteuid().is_root(), "this test makes mounts and changes users: run it as root");
        names.push("jailer");
    }
    for name in names {
        std::fs::copy(STAND_IN, vm.scratch().join(name)).unwrap();
    }
    vm.plan.binary = vm.scratch().join("firecracker");
    vm
}

/// What the guest wrote first: what it was given.
async fn seen(vm: &Vm) -> serde_json::Value {
    eventually("the guest's first line", || {
        let text = String::from_utf8(console::tail(vm.directory(), 1 << 16)).unwrap();
        text.split_once('\n').map(|(line, _)| serde_json::from_str(line).unwrap())
    })
    .await
}

fn assert_vsock_works(vm: &Vm) {
    let mut stream = connect_in(vm.directory(), "v.sock").unwrap();
    stream.write_all(b"CONNECT 200\nping\n").unwrap();
    let lines: Vec<_> = BufReader::new(stream).lines().take(2).map(Result::unwrap).collect();
    assert_eq!(lines, ["OK 1073741824", "ping"]);
}

#[tokio::test]
async fn runs_a_guest_and_asks_it_to_shut_down() {
    let mut vm = vm(false);
    vm.plan.cmdline = vec!["nexus.init=agent".into()];
    let shim = vm.launch().await;
    assert_eq!(shim.vmm().unwrap().version, "1.16.1");
    let seen = seen(&vm).await;
    assert_eq!(
        (&seen["kernel"], &seen["initramfs"], &seen["drives"]),
        (&"the kernel".into(), &"the initramfs".into(), &vec!["the data drive", "the root drive"].into())
    );
    let words = seen["words"].as_str().unwrap();
    assert!(words.starts_with("console=ttyS0 ") && words.ends_with(" nexus.init=agent"), "{words}");
    assert_vsock_works(&vm);
    eventually("its log", || {
        std::fs::read_to_string(vm.directory().join("vmm.log")).ok().filter(|log| log == "the logger is on\n")
    })
    .await;
    let console = console::tail(vm.directory(), 1 << 16);
    assert!(console.starts_with(b"{"), "its own lines are not on the console");
    in_time(shim.shutdown()).await.unwrap();
    let exit = ended(&shim).await;
    assert_eq!((exit.code, exit.by_request), (Some(0), true));
    assert_eq!(exit.message, "the guest ended its machine");
    assert!(console::tail(vm.directory(), 1 << 16).ends_with(b"reboot: Restarting system\n"));
    assert_eq!(vm.leftovers(), [""; 0]);
}

/// Has firecracker do something, beside its shim; the status of the answer.
fn ask(vm: &Vm, method: &str, path: &str, body: &str) -> String {
    let mut stream = connect_in(vm.directory(), "api.sock").unwrap();
    let length = body.len();
    write!(stream, "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n{body}")
        .unwrap();
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    line.split(' ').nth(1).unwrap().to_owned()
}

#[tokio::test]
async fn limits_of_an_interface_are_changed_by_its_api() {
    let vm = vm(false);
    let shim = vm.launch().await;
    assert!(Caps::of(DriverKind::Firecracker).limits_bandwidth);
    // No interface was recorded, so the request is refused here as an unknown one; its form is checked by the description of the API.
    let limits = Bandwidth { rx: Some(ByteSize::mib(10)), tx: None };
    let refused = in_time(shim.limit(limits)).await.unwrap_err().to_string();
    let expected =
        "the VMM refused to limit the bandwidth: firecracker refused PATCH /network-interfaces/net0";
    assert!(refused.starts_with(expected), "{refused}");
    in_time(shim.kill()).await.unwrap();
    ended(&shim).await;
}

/// The lengths of the files that snapshots are written to.
fn snapshot_files(vm: &Vm) -> [Option<u64>; 4] {
    ["saved.state", "saved.ram", "loaded.state", "loaded.ram"]
        .map(|name| std::fs::metadata(vm.directory().join(name)).ok().map(|found| found.len()))
}

#[tokio::test]
async fn a_guest_is_in_reach_after_a_pause_since_a_snapshot_comes_before_its_resume() {
    let vm = vm(false);
    let shim = vm.launch().await;
    assert!(Caps::of(DriverKind::Firecracker).can_pause);
    for _ in 0..3 {
        in_time(shim.pause()).await.unwrap();
        in_time(shim.pause()).await.unwrap();
        in_time(shim.resume()).await.unwrap();
        in_time(shim.resume()).await.unwrap();
        assert_vsock_works(&vm);
        in_time(shim.hold_guest(HOLD)).await.unwrap();
        in_time(shim.release_guest()).await.unwrap();
        assert_vsock_works(&vm);
    }
    // The snapshots are thrown away.
    assert_eq!(snapshot_files(&vm), [Some(0), Some(0), None, None]);

    // What was recorded: without a snapshot, the guest cannot be reached any more.
    for body in [r#"{"state":"Paused"}"#, r#"{"state":"Resumed"}"#] {
        assert_eq!(ask(&vm, "PATCH", "/vm", body), "204");
    }
    let mut stream = connect_in(vm.directory(), "v.sock").unwrap();
    stream.write_all(b"CONNECT 200\n").unwrap();
    stream.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    let silence = stream.read(&mut [0; 1]).unwrap_err();
    assert_eq!(silence.kind(), std::io::ErrorKind::WouldBlock);
    in_time(shim.kill()).await.unwrap();
    ended(&shim).await;
}

#[tokio::test]
async fn a_guest_is_never_paused_for_ever_for_lack_of_a_snapshot() {
    let mut vm = vm(false);
    vm.plan.cmdline = vec!["fake.full".into()];
    let shim = vm.launch().await;
    in_time(shim.pause()).await.unwrap();
    let mut refusals = 0;
    while let Err(error) = in_time(shim.resume()).await {
        assert!(error.to_string().contains("No space left on device"), "{error}");
        refusals += 1;
    }
    assert_eq!(refusals, 30);
    assert_eq!(snapshot_files(&vm), [Some(0), Some(0), None, None]);
    in_time(shim.kill()).await.unwrap();
    ended(&shim).await;
}

/// A VM that goes on from what was saved in `directory`.
fn restored(saved: &Vm, directory: &Path, with_jailer: bool) -> Vm {
    let mut child = vm(with_jailer);
    child.plan.vm = VmId::from_i64(5).unwrap();
    child.plan.boot_id = BootId::from_i64(6).unwrap();
    child.plan.cid = saved.plan.cid + 1;
    // Its kernel is in its memory.
    child.plan.kernel = "/nowhere/kernel".into();
    child.plan.initramfs = "/nowhere/initramfs".into();
    child.plan.restore = Some(Restore {
        state: directory.join("state"),
        ram: directory.join("ram"),
        kind: SavedKind::Shared,
        nonce: "00ff".into(),
    });
    child
}

async fn saved_goes_on(with_jailer: bool) {
    let mut parent = vm(with_jailer);
    parent.plan.cmdline = vec!["of-the-parent".into()];
    let shim = parent.launch().await;
    seen(&parent).await;
    let directory = parent.scratch().join("save");
    std::fs::create_dir(&directory).unwrap();
    let saved = in_time(shim.save(&directory, HOLD)).await.unwrap();
    assert_eq!((saved.kind, saved.qemu.version.as_str()), (SavedKind::Shared, "1.16.1"));
    assert_eq!(saved.qemu.binary_sha256.len(), 64);
    let [state, ram] = ["state", "ram"].map(|name| std::fs::metadata(directory.join(name)).unwrap());
    assert_eq!((saved.state_bytes, parent.plan.memory.as_bytes()), (state.len(), ram.len()));
    // Pages of zeros are left out of what firecracker writes in full.
    assert_eq!(saved.ram_bytes, 4096);
    assert!(ram.blocks() * 512 <= 64 << 10, "{} blocks", ram.blocks());
    in_time(shim.hold_guest(HOLD)).await.unwrap();
    in_time(shim.release_guest()).await.unwrap();
    assert_vsock_works(&parent);

    let mut children = Vec::new();
    for number in 0..2 {
        let mut child = restored(&parent, &directory, with_jailer);
        child.plan.cid += number;
        let drive = format!("the root drive of child {number}");
        std::fs::write(&child.plan.drives[0].path, &drive).unwrap();
        let shim = child.launch().await;
        let found = seen(&child).await;
        let memory = found["memory"].as_str().unwrap();
        assert!(memory.starts_with("memory of ") && memory.ends_with(" of-the-parent"), "{memory}");
        // Not those of its parent, whose paths are in the state.
        assert_eq!(found["drives"], serde_json::json!(["the data drive", drive]));
        if with_jailer {
            assert_eq!(found["uid"], 0x7000_0004 + number);
        } else {
            assert_eq!(snapshot_files(&child), [Some(0), Some(0), None, None]);
        }
        assert_vsock_works(&child);
        children.push((child, shim));
    }
    // One that was restored is saved like any other, also while it is paused for good.
    let (child, of_child) = &children[0];
    let again = child.scratch().join("save");
    std::fs::create_dir(&again).unwrap();
    in_time(of_child.pause()).await.unwrap();
    let second = in_time(of_child.save(&again, HOLD)).await.unwrap();
    assert_eq!(second.ram_sha256, saved.ram_sha256);
    in_time(of_child.release_guest()).await.unwrap();
    in_time(of_child.resume()).await.unwrap();
    assert_vsock_works(child);
    for (_, of_child) in &children {
        in_time(of_child.kill()).await.unwrap();
        ended(of_child).await;
    }
    in_time(shim.kill()).await.unwrap();
    ended(&shim).await;
}

#[tokio::test]
async fn a_saved_guest_goes_on_in_other_vms() {
    saved_goes_on(false).await;
}

#[tokio::test]
async fn a_saved_guest_goes_on_in_other_jails() {
    saved_goes_on(true).await;
}

#[tokio::test]
async fn what_is_wrong_with_a_saved_guest_is_in_the_error() {
    let parent = vm(false);
    let shim = parent.launch().await;
    let directory = parent.scratch().join("save");
    std::fs::create_dir(&directory).unwrap();
    in_time(shim.save(&directory, HOLD)).await.unwrap();
    in_time(shim.kill()).await.unwrap();
    ended(&shim).await;
    let mut other = restored(&parent, &directory, false);
    other.plan.memory = ByteSize::mib(256);
    let error = other.fails_to_launch().await.to_string();
    assert!(error.contains("but the VM's memory has"), "{error}");
    let state = std::fs::File::options().write(true).open(directory.join("state")).unwrap();
    state.set_len(10).unwrap();
    let error = restored(&parent, &directory, false).fails_to_launch().await.to_string();
    assert!(error.contains("exited with status 1"), "{error}");
    std::fs::remove_file(directory.join("state")).unwrap();
    let error = restored(&parent, &directory, false).fails_to_launch().await.to_string();
    assert!(error.contains("copy the state of the saved guest"), "{error}");
}

#[tokio::test]
async fn writes_that_fail_on_a_full_disk_are_reported_until_there_is_space() {
    let vm = vm(false);
    let shim = vm.launch().await;
    let mut stalls = shim.stalls();
    assert_eq!(in_time(stalls.recv()).await, Some(None));
    // What a real one logs when a write of its guest fails with ENOSPC.
    let mut log = std::fs::OpenOptions::new().write(true).open(vm.directory().join("vmm.pipe")).unwrap();
    let line = "2026-11-30T10:00:00.1 [web:fc_vcpu 0:ERROR] Failed to execute Out virtio block request: FileEngine(Sync(Transfer(\
        IOError(Os { code: 28, kind: StorageFull, message: \"No space left on device\" }))))\n";
    for _ in 0..2 {
        log.write_all(line.as_bytes()).unwrap();
        assert_eq!(in_time(stalls.recv()).await, Some(Some(Stall::DiskFull { drive: 0 })));
        // There is space: the report ends, and the next failed write is a new one.
        assert_eq!(in_time(stalls.recv()).await, Some(None));
    }
    assert_vsock_works(&vm);
    in_time(shim.kill()).await.unwrap();
    ended(&shim).await;
}

#[tokio::test]
async fn what_firecracker_refuses_is_in_the_error() {
    let refused = async |change: fn(&mut Vm)| {
        let mut vm = vm(false);
        change(&mut vm);
        let VmmError::Launch { exit, .. } = vm.fails_to_launch().await else { panic!("another error") };
        assert_eq!(exit.signal, Some(9));
        assert_eq!(read_exit(vm.directory()).as_ref(), Some(&exit));
        exit.message
    };
    assert_eq!(
        refused(|vm| vm.plan.vcpus = 33).await,
        "firecracker refused PUT /machine-config: Machine config error: The number of vCPUs must be greater than 0, less than \
        32 and must be 1 or an even number if SMT is enabled."
    );
    assert_eq!(
        refused(|vm| vm.plan.kernel = "/nowhere/vmlinux".into()).await,
        "firecracker refused PUT /boot-source: Boot source error: The kernel file cannot be opened: No such file or directory \
        (os error 2)"
    );
    let drive = refused(|vm| vm.plan.drives[0].path = "/nowhere/disk".into()).await;
    assert!(drive.starts_with("firecracker refused PUT /drives/root: Drive config error"), "{drive}");
}

#[tokio::test]
async fn exits_say_what_they_mean() {
    for (word, message) in [
        ("fake.exit=0", "the guest ended its machine"),
        ("fake.exit=1", "firecracker exited with status 1 (an error of KVM, or a triple fault of the guest)"),
        (
            "fake.exit=148",
            "firecracker exited with status 148 (a system call forbidden by its seccomp filter)",
        ),
    ] {
        let mut vm = vm(false);
        vm.plan.cmdline = vec![word.into()];
        let launched = nexus_core::internals::ShimClient::launch(crate::support::SHIM.as_ref(), &vm.plan);
        // It may end before it is known to run.
        let exit = match in_time(launched).await {
            Ok(shim) => ended(&shim).await,
            Err(VmmError::Launch { exit, .. }) => exit,
            Err(other) => panic!("{other}"),
        };
        assert_eq!((exit.message.as_str(), exit.by_request), (message, false));
        assert!(console::tail(vm.directory(), 1 << 16).ends_with(b"}\n"));
    }
}

#[tokio::test]
async fn sockets_that_were_left_behind_do_not_get_in_the_way() {
    let mut vm = vm(false);
    vm.plan.cmdline = vec!["fake.deaf".into()];
    let shim = vm.launch().await;
    signal(shim.identity().pid, Signal::SIGKILL);
    assert!(ended(&shim).await.shim_lost);
    assert!(!is_alive(shim.vmm().unwrap().pid));
    assert!(vm.leftovers().contains(&"api.sock".to_owned()));
    let shim = vm.launch().await;
    in_time(shim.shutdown()).await.unwrap();
    // This guest does not listen.
    assert_vsock_works(&vm);
    in_time(shim.kill()).await.unwrap();
    assert_eq!(ended(&shim).await.signal, Some(9));
}

#[tokio::test]
async fn a_jailed_firecracker_reaches_what_it_needs_and_nothing_else() {
    let vm = vm(true);
    let hello = bind_in(vm.directory(), "v.sock_1024").unwrap();
    let host = std::thread::spawn(move || {
        let (stream, _) = hello.accept().unwrap();
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line).unwrap();
        (&stream).write_all(b"configure\n").unwrap();
        line
    });
    let shim = vm.launch().await;
    assert_eq!(host.join().unwrap(), "hello\n");
    let seen = seen(&vm).await;
    assert_eq!(seen["uid"], 0x7000_0003);
    assert_eq!(seen["is_root_of_a_jail"], true);
    assert_eq!(seen["drives"], serde_json::json!(["the data drive", "the root drive"]));
    eventually("the host's answer", || {
        String::from_utf8(console::tail(vm.directory(), 1 << 16))
            .ok()
            .filter(|t| t.contains("answered: configure"))
    })
    .await;
    assert_vsock_works(&vm);
    // The mounts are not the host's.
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains("/jail/firecracker/"), "{mounts}");
    let status = std::fs::read_to_string(format!("/proc/{}/status", shim.vmm().unwrap().pid)).unwrap();
    assert!(status.contains("Uid:\t1879048195\t1879048195"), "{status}");
    in_time(shim.shutdown()).await.unwrap();
    assert_eq!(ended(&shim).await.message, "the guest ended its machine");
    assert!(!vm.directory().join("jail").exists());
    assert_eq!(std::fs::read_to_string(&vm.plan.drives[0].path).unwrap(), "the root drive");
}

#[tokio::test]
async fn a_jailed_firecracker_may_be_a_link_to_a_release() {
    let mut vm = vm(true);
    // As a release is unpacked and installed: the jailer makes its directory by the name of what the link leads to.
    let release = vm.scratch().join("release-v1.16.1-x86_64");
    std::fs::create_dir(&release).unwrap();
    let program = release.join("fc-v1.16.1-x86_64");
    std::fs::rename(&vm.plan.binary, &program).unwrap();
    std::os::unix::fs::symlink(&program, &vm.plan.binary).unwrap();
    let shim = vm.launch().await;
    assert_eq!(seen(&vm).await["is_root_of_a_jail"], true);
    assert_vsock_works(&vm);
    in_time(shim.kill()).await.unwrap();
    ended(&shim).await;
    // The jailer may be beside the program that the link leads to.
    std::fs::rename(vm.scratch().join("jailer"), release.join("jailer")).unwrap();
    vm.plan.boot_id = BootId::from_i64(3).unwrap();
    let shim = vm.launch().await;
    assert_eq!(seen(&vm).await["is_root_of_a_jail"], true);
    in_time(shim.kill()).await.unwrap();
    ended(&shim).await;
}

#[tokio::test]
async fn a_jailed_firecracker_dies_with_its_shim() {
    let vm = vm(true);
    let shim = vm.launch().await;
    signal(shim.identity().pid, Signal::SIGKILL);
    // Before anyone else could see to it.
    eventually("the VMM is gone", || (!is_alive(shim.vmm().unwrap().pid)).then_some(())).await;
    assert!(ended(&shim).await.shim_lost);
    assert!(!vm.directory().join("jail").exists());
    let shim = vm.launch().await;
    in_time(shim.kill()).await.unwrap();
    ended(&shim).await;
    assert!(!vm.directory().join("jail").exists());
}
