//! Saves and restores with the real QEMU, confined as under a daemon of an ordinary user. Its guest is a firmware that counts in its memory.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::fake::pump;
use super::restore::{Incoming, OPTIONS};
use super::save::Saver;
use crate::os::confine::{self, VmmFiles};
use crate::vmm::control::Saved;
use crate::vmm::driver::qmp::Monitor;
use crate::vmm::driver::{BRING_UP, DriverError, SaveFiles};
use crate::vmm::plan::{Restore, SavedKind};
use crate::vmm::process::{CommandLine, Outputs, PASSED_FD, VmmProcess};

const QEMU: &str = "/usr/bin/qemu-system-x86_64";
const MIB: u64 = 64;
/// Where the firmware counts.
const COUNTER: u64 = 0x500;
/// Where the tests leave a mark.
const MARK: u64 = 32 << 20;

/// A firmware in real mode: at the reset vector, a jump to the start, which counts in a double word for ever.
fn firmware() -> Vec<u8> {
    let code = [
        0x31, 0xc0, // xor ax, ax
        0x8e, 0xd8, // mov ds, ax
        0x66, 0xff, 0x06, 0x00, 0x05, // inc dword [COUNTER]
        0xeb, 0xf9, // jmp to the line before
    ];
    let reset = [0xea, 0x00, 0x00, 0x00, 0xf0]; // jmp f000:0000
    let mut firmware = vec![0xf4; 64 << 10];
    firmware[..code.len()].copy_from_slice(&code);
    firmware[0xfff0..][..reset.len()].copy_from_slice(&reset);
    firmware
}

struct Vm {
    process: VmmProcess,
    _outputs: Outputs,
    monitor: Arc<Monitor>,
    memory: File,
    saver: Saver,
}

impl Vm {
    /// Boots the firmware, or goes on with a saved guest, whose directory this is.
    fn start(directory: &Path, restore: Option<&Restore>) -> Result<Self, DriverError> {
        let (firmware_file, disk) = (directory.join("firmware"), directory.join("disk"));
        std::fs::write(&firmware_file, firmware()).unwrap();
        File::create(&disk).unwrap().set_len(1 << 20).unwrap();
        let memory = super::memory::anonymous(MIB << 20).unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let monitor = Monitor::new(ours).unwrap();
        let mut passed: Vec<OwnedFd> = vec![theirs.into(), memory.try_clone().unwrap().into()];
        let incoming = restore.map(|restore| {
            let (incoming, pipe) = Incoming::prepare(restore, &memory, PASSED_FD + 2).unwrap();
            passed.push(pipe);
            incoming
        });
        let files = VmmFiles {
            binary: QEMU.into(),
            directory: directory.to_owned(),
            read: vec![firmware_file.clone()],
            write: vec![disk.clone()],
            ..VmmFiles::default()
        };
        let walls = confine::vmm(&files).prepare().unwrap();
        let command = command(&firmware_file, &disk, restore.is_some());
        let (process, outputs) = VmmProcess::spawn(&command, passed, false, Some(walls)).unwrap();
        let deadline = Instant::now() + BRING_UP;
        monitor.open(deadline)?;
        if let Some(incoming) = incoming {
            let mut nonces = Vec::new();
            incoming.load(&monitor, deadline, |nonce| {
                nonces.push(nonce.to_owned());
                Ok(())
            })?;
            assert_eq!(nonces, ["00ff"]);
        }
        let monitor = Arc::new(monitor);
        let read = Arc::clone(&monitor);
        std::thread::spawn(move || pump(&read));
        let saver = Saver::new(memory.try_clone().unwrap(), true, Path::new(QEMU))?;
        Ok(Self { process, _outputs: outputs, monitor, memory, saver })
    }

    fn count(&self) -> u32 {
        let mut bytes = [0; 4];
        self.memory.read_exact_at(&mut bytes, COUNTER).unwrap();
        u32::from_le_bytes(bytes)
    }

    /// Waits until the guest has counted further.
    fn counts(&self) {
        let (before, deadline) = (self.count(), Instant::now() + Duration::from_secs(60));
        while self.count() == before {
            assert!(Instant::now() < deadline, "the guest does not run");
            self.monitor.linger(Duration::from_millis(5));
        }
    }

    fn mark(&self) -> [u8; 4] {
        let mut mark = [0; 4];
        self.memory.read_exact_at(&mut mark, MARK).unwrap();
        mark
    }

    /// Saves the guest to a new directory; it stays paused.
    fn save(&self, directory: &Path) -> Result<(Saved, Restore), DriverError> {
        std::fs::create_dir_all(directory).unwrap();
        let path = |name: &str| -> PathBuf { directory.join(name) };
        let file =
            |name: &str| File::options().read(true).write(true).create_new(true).open(path(name)).unwrap();
        let files = SaveFiles { state: file("state"), ram: file("ram") };
        self.monitor.set_paused(true)?;
        let saved = self.saver.save(&self.monitor, "a version", &files, &|| true)?;
        let (kind, nonce) = (SavedKind::Shared, "00ff".to_owned());
        Ok((saved, Restore { state: path("state"), ram: path("ram"), kind, nonce }))
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.process.handle().kill().ok();
        self.process.reap().ok();
    }
}

/// The driver's command line without a kernel and a guest link.
fn command(firmware: &Path, disk: &Path, is_restored: bool) -> CommandLine {
    let memory = PASSED_FD + 1;
    let [file, format] = super::block_nodes(0, disk, false);
    let options = [
        ("-machine", "microvm,accel=tcg,memory-backend=mem0".to_owned()),
        ("-cpu", "max,erms=off,fsrm=off".to_owned()),
        ("-m", format!("{MIB}M")),
        (
            "-object",
            format!("memory-backend-file,id=mem0,size={MIB}M,share=on,mem-path=/proc/self/fd/{memory}"),
        ),
        ("-display", "none".to_owned()),
        ("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny".to_owned()),
        ("-chardev", format!("socket,id=shim,fd={PASSED_FD}")),
        ("-mon", "chardev=shim,mode=control".to_owned()),
        ("-blockdev", file),
        ("-blockdev", format),
        ("-device", "virtio-blk-device,drive=disk0,id=drive0".to_owned()),
        ("-netdev", "hubport,id=net0,hubid=0".to_owned()),
        ("-device", "virtio-net-device,netdev=net0,mac=02:4e:58:00:00:01".to_owned()),
        ("-device", "virtio-rng-device".to_owned()),
        ("-device", "virtio-serial-device,id=vser,max_ports=4".to_owned()),
        ("-bios", firmware.display().to_string()),
    ];
    let options = options.into_iter().flat_map(|(name, value)| [OsString::from(name), value.into()]);
    let mut arguments: Vec<OsString> = options.collect();
    arguments.extend(["-nodefaults", "-no-user-config", "-no-reboot"].map(OsString::from));
    if is_restored {
        arguments.extend(OPTIONS.map(OsString::from));
    }
    CommandLine { program: QEMU.into(), arguments }
}

#[test]
fn a_saved_guest_goes_on_and_so_do_the_guests_made_of_it() {
    let directory = tempfile::tempdir().unwrap();
    let place = |name: &str| {
        let place = directory.path().join(name);
        std::fs::create_dir(&place).unwrap();
        place
    };
    let parent = Vm::start(&place("parent"), None).unwrap();
    parent.counts();
    parent.memory.write_all_at(b"kept", MARK).unwrap();
    let (saved, restore) = parent.save(&directory.path().join("checkpoint")).unwrap();
    let at = parent.count();
    // The memory is not in the state, and what is all zeros is nowhere.
    assert!((1000..4 << 20).contains(&saved.state_bytes), "{saved:?}");
    assert!((8192..8 << 20).contains(&saved.ram_bytes), "{saved:?}");
    parent.monitor.set_paused(false).unwrap();
    parent.counts();
    parent.memory.write_all_at(b"lost", MARK).unwrap();

    let children = ["child-1", "child-2"].map(|name| Vm::start(&place(name), Some(&restore)).unwrap());
    for child in &children {
        assert!(child.count().wrapping_sub(at) < 1 << 31, "{} is before {at}", child.count());
        child.counts();
        assert_eq!(&child.mark(), b"kept");
        super::save::set_link(&child.monitor, true).unwrap();
    }
    // A guest that was made of a saved one is saved like any other, also twice in one pause.
    let [child, _] = &children;
    child.memory.write_all_at(b"more", MARK).unwrap();
    child.save(&directory.path().join("checkpoint-2")).unwrap();
    let (_, restore) = child.save(&directory.path().join("checkpoint-3")).unwrap();
    child.monitor.set_paused(false).unwrap();
    child.counts();
    let grandchild = Vm::start(&place("grandchild"), Some(&restore)).unwrap();
    grandchild.counts();
    assert_eq!((&grandchild.mark(), &parent.mark()), (b"more", b"lost"));
}

#[test]
fn a_save_that_fails_leaves_a_guest_that_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let vm = Vm::start(directory.path(), None).unwrap();
    vm.counts();
    let full = || File::options().read(true).write(true).open("/dev/full").unwrap();
    let empty = || tempfile::tempfile().unwrap();
    vm.monitor.set_paused(true).unwrap();
    for files in [SaveFiles { state: full(), ram: empty() }, SaveFiles { state: empty(), ram: full() }] {
        let failed = vm.saver.save(&vm.monitor, "a version", &files, &|| true);
        assert!(matches!(failed, Err(DriverError::Saving { .. })), "{failed:?}");
        vm.monitor.set_paused(false).unwrap();
        vm.counts();
        vm.monitor.set_paused(true).unwrap();
    }
    vm.save(&directory.path().join("checkpoint")).unwrap();
    vm.monitor.set_paused(false).unwrap();
    vm.counts();
}

#[test]
fn a_state_that_is_cut_off_ends_qemu() {
    let directory = tempfile::tempdir().unwrap();
    let vm = Vm::start(directory.path(), None).unwrap();
    let (_, restore) = vm.save(&directory.path().join("checkpoint")).unwrap();
    let state = File::options().write(true).open(&restore.state).unwrap();
    state.set_len(state.metadata().unwrap().len() / 2).unwrap();
    let other = directory.path().join("other");
    std::fs::create_dir(&other).unwrap();
    let failed = Vm::start(&other, Some(&restore)).err();
    // It may end before or after the next question.
    let is_end = matches!(failed, Some(DriverError::Ended { .. } | DriverError::Unanswered { .. }));
    assert!(is_end, "{failed:?}");
}
