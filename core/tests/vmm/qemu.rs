//! The driver `qemu` with the real QEMU, by software emulation, and a distribution's kernel.
//!
//! The kernel is `$NEXUS_TEST_KERNEL_DIR/vmlinux`, or else the distribution's own, fetched by apt.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use nexus_core::internals::{PlanDrive, VmmError, console};
use nexus_schema::DriverKind;

use crate::support::{Vm, ended, eventually, in_time, is_alive, own_memory};

/// A kernel that QEMU boots. Kept below the target directory, for the next run.
fn kernel() -> PathBuf {
    if let Some(directory) = std::env::var_os("NEXUS_TEST_KERNEL_DIR") {
        return Path::new(&directory).join("vmlinux");
    }
    let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join("vmlinuz");
    if kept.exists() {
        return kept;
    }
    let scratch = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let script = "set -e; p=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: \\(linux-image-[^ ]*\\)/\\1/p' | head -n 1); \
        apt-get download \"$p\"; dpkg-deb -x ./*.deb root; mv root/boot/vmlinuz-* vmlinuz";
    let status = Command::new("sh").args(["-c", script]).current_dir(scratch.path()).status().unwrap();
    assert!(
        status.success(),
        "set NEXUS_TEST_KERNEL_DIR to a directory with a vmlinux, or make apt's linux-image-cloud-amd64 reachable"
    );
    std::fs::rename(scratch.path().join("vmlinuz"), &kept).unwrap();
    kept
}

/// An initramfs with one file in it (newc, as in the kernel's early-userspace documentation).
pub(crate) fn initramfs(name: &str, mode: u32, content: &[u8]) -> Vec<u8> {
    let mut archive = Vec::new();
    for (name, mode, content) in [(name, mode, content), ("TRAILER!!!", 0, &b""[..])] {
        let fields = [1, mode, 0, 0, 1, 0, content.len() as u32, 0, 0, 0, 0, name.len() as u32 + 1, 0];
        archive.extend_from_slice(b"070701");
        for field in fields {
            write!(archive, "{field:08X}").unwrap();
        }
        archive.extend_from_slice(name.as_bytes());
        archive.push(0);
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend_from_slice(content);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
    archive
}

/// Where a program's code is in its memory.
const CODE: u64 = BASE + HEADERS;
const BASE: u64 = 0x40_0000;
const HEADERS: u64 = 64 + 56;

/// A program without a library: writes `text` to stdout, then restarts the machine, or loops when it is not PID 1's right.
/// x86_64 machine code in the smallest ELF file that loads.
fn init_that_prints_and_restarts(text: &str) -> Vec<u8> {
    let mut code: Vec<u8> = Vec::new();
    let code_length = 5 + 5 + 10 + 5 + 2 + 5 + 5 + 5 + 5 + 2 + 2;
    print(&mut code, CODE + code_length, text);
    code.extend([0xb8, 169, 0, 0, 0]); // mov eax, 169: reboot
    code.push(0xbf); // mov edi, LINUX_REBOOT_MAGIC1
    code.extend(0xfee1_deadu32.to_le_bytes());
    code.push(0xbe); // mov esi, LINUX_REBOOT_MAGIC2
    code.extend(672_274_793u32.to_le_bytes());
    code.push(0xba); // mov edx, RESTART
    code.extend(0x0123_4567u32.to_le_bytes());
    code.extend([0x0f, 0x05]); // syscall
    code.extend([0xeb, 0xfe]); // jmp to itself
    assert_eq!(code.len() as u64, code_length);
    code.extend(text.as_bytes());
    elf(&code)
}

/// A program without a library: writes `first` to stdout, then `again` twenty times a second, for ever.
pub(crate) fn init_that_ticks(first: &str, again: &str) -> Vec<u8> {
    const PRINT: u64 = 5 + 5 + 10 + 5 + 2;
    const SLEEP: u64 = 5 + 10 + 2 + 2;
    let mut code: Vec<u8> = Vec::new();
    let data = CODE + 2 * PRINT + SLEEP + 2;
    print(&mut code, data + 16, first);
    print(&mut code, data + 16 + first.len() as u64, again);
    code.extend([0xb8, 35, 0, 0, 0]); // mov eax, 35: nanosleep
    code.extend([0x48, 0xbf]); // movabs rdi, data
    code.extend(data.to_le_bytes());
    code.extend([0x31, 0xf6]); // xor esi, esi
    code.extend([0x0f, 0x05]); // syscall
    let back = i8::try_from(PRINT + SLEEP + 2).unwrap();
    code.extend([0xeb, back.wrapping_neg().to_le_bytes()[0]]); // jmp to the second print
    assert_eq!(CODE + code.len() as u64, data);
    for value in [0u64, 50_000_000] {
        code.extend(value.to_le_bytes());
    }
    code.extend(first.as_bytes());
    code.extend(again.as_bytes());
    elf(&code)
}

/// Adds code that writes the text at an address to stdout.
fn print(code: &mut Vec<u8>, address: u64, text: &str) {
    code.extend([0xb8, 1, 0, 0, 0]); // mov eax, 1: write
    code.extend([0xbf, 1, 0, 0, 0]); // mov edi, 1
    code.extend([0x48, 0xbe]); // movabs rsi, address
    code.extend(address.to_le_bytes());
    code.push(0xba); // mov edx, length
    code.extend(u32::try_from(text.len()).unwrap().to_le_bytes());
    code.extend([0x0f, 0x05]); // syscall
}

/// An ELF file that loads this code, with its data behind it, at [`CODE`] and starts there.
fn elf(code: &[u8]) -> Vec<u8> {
    let size = HEADERS + code.len() as u64;
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    elf.extend(2u16.to_le_bytes());
    elf.extend(62u16.to_le_bytes());
    elf.extend(1u32.to_le_bytes());
    for value in [CODE, 64, 0] {
        elf.extend(value.to_le_bytes());
    }
    elf.extend(0u32.to_le_bytes());
    for value in [64u16, 56, 1, 0, 0, 0] {
        elf.extend(value.to_le_bytes());
    }
    elf.extend(1u32.to_le_bytes());
    elf.extend(5u32.to_le_bytes());
    for value in [0, BASE, BASE, size, size, 0x1000] {
        elf.extend(value.to_le_bytes());
    }
    elf.extend(code);
    elf
}

pub(crate) fn vm(initramfs: &[u8]) -> Vm {
    let mut vm = Vm::new(DriverKind::Qemu);
    vm.plan.binary = "/usr/bin/qemu-system-x86_64".into();
    vm.plan.kernel = kernel();
    vm.plan.initramfs = vm.scratch().join("initramfs, with a comma");
    std::fs::write(&vm.plan.initramfs, initramfs).unwrap();
    let disk = vm.scratch().join("disk, \"raw\".ext4");
    std::fs::File::create(&disk).unwrap().set_len(64 << 20).unwrap();
    vm.plan.drives = vec![PlanDrive { id: "root".into(), path: disk, read_only: false }];
    vm
}

#[tokio::test]
async fn boots_to_init_and_tells_a_restart() {
    let vm = vm(&initramfs("init", 0o100_755, &init_that_prints_and_restarts("init is up\n")));
    let shim = vm.launch().await;
    assert!(shim.vmm().unwrap().version.starts_with(|c: char| c.is_ascii_digit()), "{:?}", shim.vmm());
    let exit = ended(&shim).await;
    let text = String::from_utf8_lossy(&console::tail(vm.directory(), 64 << 10)).into_owned();
    assert!(text.contains("init is up"), "{exit:?}: {text}");
    assert_eq!((exit.code, exit.by_request), (Some(0), false), "{text}");
    assert_eq!(exit.message, "the guest restarted its machine");
    assert_eq!(vm.leftovers(), [""; 0]);
}

#[tokio::test]
async fn a_kernel_that_panics_ends_the_vm_with_its_last_words_on_the_console() {
    let vm = vm(&initramfs("init", 0o100_755, b"no program"));
    let shim = vm.launch().await;
    let exit = ended(&shim).await;
    let text = String::from_utf8_lossy(&console::tail(vm.directory(), 64 << 10)).into_owned();
    assert!(text.contains("Kernel panic - not syncing"), "{exit:?}: {text}");
    assert_eq!((exit.code, exit.shim_lost), (Some(0), false));
}

/// What /proc says of a VMM in a jail, and of its shim.
fn assert_jailed(vmm: u32, shim: u32) {
    assert!(nix::unistd::geteuid().is_root(), "this test makes mounts and changes users: run it as root");
    for pid in [vmm, shim] {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        for line in [
            "Uid:\t1879048195\t1879048195\t1879048195\t1879048195",
            "CapEff:\t0000000000000000",
            "CapPrm:\t0000000000000000",
            "NoNewPrivs:\t1",
            "Groups:\t \n",
        ] {
            assert!(status.contains(line), "{line} is not in {status}");
        }
        for thread in std::fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
            let status = std::fs::read_to_string(thread.unwrap().path().join("status")).unwrap();
            assert!(status.contains("Seccomp:\t2") && status.contains("Uid:\t1879048195\t"), "{status}");
        }
    }
    let ns = |pid: &str, kind: &str| std::fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
    for kind in ["mnt", "net", "ipc", "uts"] {
        assert_ne!(ns(&vmm.to_string(), kind), ns("self", kind), "{kind}");
    }
    let root = std::fs::read_dir(format!("/proc/{vmm}/root")).unwrap();
    let mut seen: Vec<_> = root.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    seen.retain(|name| !["lib", "lib64", "usr", "etc", "sys", "dev"].contains(&name.as_str()));
    seen.sort();
    assert_eq!(seen, ["drive-root", "initramfs", "kernel"]);
    for hidden in ["etc/passwd", "usr/bin/sh", "bin/sh", "proc/self", "root", "home", "var"] {
        assert!(!std::path::Path::new(&format!("/proc/{vmm}/root/{hidden}")).exists(), "{hidden}");
    }
    let interfaces = std::fs::read_to_string(format!("/proc/{vmm}/net/dev")).unwrap();
    assert_eq!(interfaces.lines().filter(|line| line.contains(':')).count(), 1, "{interfaces}");
}

#[tokio::test]
async fn pauses_resumes_and_dies_with_the_shim() {
    let vm = vm(&initramfs("none", 0o100_644, b""));
    let shim = vm.launch().await;
    in_time(shim.pause()).await.unwrap();
    in_time(shim.resume()).await.unwrap();
    in_time(shim.shutdown()).await.unwrap();
    // The sockets of the hybrid protocol and of the monitor are there.
    for name in ["v.sock", "s.sock", "q.sock"] {
        assert!(vm.directory().join(name).exists(), "{name}");
    }
    let pid = shim.vmm().unwrap().pid;
    assert_jailed(pid, shim.identity().pid);
    crate::support::signal(shim.identity().pid, nix::sys::signal::Signal::SIGKILL);
    assert!(ended(&shim).await.shim_lost);
    assert!(!is_alive(pid));
}

#[tokio::test]
async fn the_shim_with_its_vsock_device_is_small() {
    let vm = vm(&initramfs("none", 0o100_644, b""));
    let shim = vm.launch().await;
    eventually("the kernel speaks or the VM ends", || {
        (!console::tail(vm.directory(), 1).is_empty()
            || nexus_core::internals::read_exit(vm.directory()).is_some())
        .then_some(())
    })
    .await;
    let memory = own_memory(shim.identity().pid);
    assert!(memory < 6 << 20, "{memory}");
    in_time(shim.kill()).await.unwrap();
    ended(&shim).await;
}

#[tokio::test]
async fn a_guest_with_a_vsock_device_is_not_saved_and_runs_on() {
    let vm = vm(&initramfs("none", 0o100_644, b""));
    let shim = vm.launch().await;
    let error = in_time(shim.save(vm.scratch(), std::time::Duration::from_secs(10))).await.unwrap_err();
    let why =
        "qemu cannot save this VM: its guest link is a vsock device; make a VM with `checkpoints: true`";
    assert!(error.to_string().ends_with(why), "{error}");
    in_time(shim.pause()).await.unwrap();
    in_time(shim.kill()).await.unwrap();
    ended(&shim).await;
}

#[tokio::test]
async fn a_drive_is_not_used_by_two_vms() {
    let first = vm(&initramfs("none", 0o100_644, b""));
    let mut second = vm(&initramfs("none", 0o100_644, b""));
    second.plan.drives = first.plan.drives.clone();
    let shim = first.launch().await;
    in_time(shim.pause()).await.unwrap();
    let VmmError::Launch { exit, vmm_log, .. } = second.fails_to_launch().await else {
        panic!("another error")
    };
    assert_eq!(exit.code, Some(1));
    assert!(vmm_log.contains("lock"), "{vmm_log}");
    in_time(shim.kill()).await.unwrap();
    ended(&shim).await;
    // Free again.
    let shim = second.launch().await;
    in_time(shim.kill()).await.unwrap();
    ended(&shim).await;
}

#[tokio::test]
async fn what_qemu_refuses_is_in_the_error() {
    let mut vm = vm(b"");
    vm.plan.kernel = "/nowhere/vmlinux".into();
    // In a jail it would not be started at all.
    vm.plan.jail = false;
    let VmmError::Launch { exit, .. } = vm.fails_to_launch().await else { panic!("another error") };
    assert_eq!(exit.code, Some(1));
    assert!(exit.message.contains("/nowhere/vmlinux"), "{}", exit.message);
}
