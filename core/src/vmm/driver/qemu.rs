//! The driver `qemu`: its smallest machine of each architecture, under KVM or by software emulation (TCG).

#[cfg(test)]
mod fake;
mod link;
mod machine;
mod memory;
mod pipe;
#[cfg(test)]
mod real;
mod restore;
mod save;

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Instant;

use nexus_schema::{Arch, ByteSize, DriverKind};
use serde_json::json;

use self::link::GuestLink;
use self::machine::Machine as Board;
use self::restore::Incoming;
use self::save::Saver;
use super::qmp::Monitor;
use super::{
    BRING_UP, BringUp, Caps, Closer, Driver, DriverError, Facts, Machine, Prepared, SaveFiles, Vmm,
    ended_with, jail_failed,
};
use crate::os::confine::{self, VmmFiles};
use crate::os::paths::{QEMU_FILES, vm_files};
use crate::os::process::ProcessHandle;
use crate::os::socket::bind_in;
use crate::os::tap;
use crate::vmm::control::{Job, Saved, Stall};
use crate::vmm::exit::MachineEnd;
use crate::vmm::jail::{Files, Jail, JailError, file, is_for};
use crate::vmm::plan::{Accel, Link};
use crate::vmm::process::{CommandLine, PASSED_FD};
use crate::vmm::version::Version;

pub(super) static FACTS: Facts = Facts {
    kind: DriverKind::Qemu,
    caps: CAPS,
    sockets: &[vm_files::VHOST, vm_files::QMP],
    // The vsock device in the shim does.
    dials: false,
    vmm: Some(Vmm {
        programs: PROGRAMS,
        min_version: Version(6, 0, 0),
        fix: match Arch::HOST {
            Arch::X86_64 => "apt-get install qemu-system-x86",
            Arch::Aarch64 => "apt-get install qemu-system-arm",
        },
        needs_kvm: false,
        look_closer: |_| Closer::default(),
    }),
    make: || Box::new(Qemu),
};

/// For VMs of the host's architecture.
const PROGRAMS: &[&str] = &[Arch::HOST.qemu()];

const CAPS: Caps = Caps {
    max_vcpus: 32,
    min_memory: ByteSize::mib(32),
    max_drives: 8,
    has_interface: true,
    takes_open_tap: true,
    limits_bandwidth: false,
    can_pause: true,
    pauses_on_full_disk: true,
    checkpoint: true,
    saves_vsock: false,
    fork: true,
    keeps_connections: true,
    can_ask_guest: false,
};

/// Why some VMs can be neither saved nor restored: QEMU cannot save the vsock device, whose other half is in the shim.
const NO_CHECKPOINTS: &str = "its guest link is a vsock device; make a VM with `checkpoints: true`";

const WHAT: &str = "qemu";
/// Prefix of the name of a drive's block node; its index in the plan follows.
const NODE: &str = "disk";

struct Qemu;

impl Driver for Qemu {
    fn prepare(&self, job: &Job) -> Result<Prepared, DriverError> {
        let plan = &job.plan;
        let (link, of_link) = GuestLink::start(plan.link, plan.cid)?;
        let (ours, theirs) = UnixStream::pair().map_err(|source| DriverError::Connection { source })?;
        let monitor = Monitor::new(ours).map_err(|source| DriverError::Connection { source })?;
        // Pass the sockets to QEMU as descriptors: in a jail it cannot find them by name.
        let here = Path::new(".");
        let others = bind_in(here, vm_files::QMP).map_err(|source| DriverError::Connection { source })?;
        let jail = is_for(plan).then(|| jail(job)).transpose().map_err(jail_failed)?;
        let mut files = jail.as_ref().map_or_else(|| Files::of(plan), |jail| jail.files().clone());
        let numbers = Descriptors::of(plan.link);
        let mut passed = vec![theirs.into()];
        passed.extend(of_link);
        passed.push(others.into());
        let mut memory = None;
        if plan.link == Link::Serial {
            let (file, name) = memory::make(plan, jail.as_ref(), numbers.memory)?;
            files.memory = Some(name);
            let theirs = file.try_clone().map_err(|source| DriverError::Memory { source })?;
            passed.push(theirs.into());
            memory = Some(file);
        }
        if let Some(interface) = &plan.interface {
            // Pass the TAP device as a descriptor: QEMU's own network namespace does not contain it.
            let tap = match &interface.from {
                None => tap::connect(&interface.tap),
                Some(directory) => tap::take(directory, &interface.tap),
            };
            passed.push(tap.map_err(|source| DriverError::Tap { tap: interface.tap.clone(), source })?);
        }
        let incoming = incoming(job, memory.as_ref(), &mut passed)?;
        let has_interface = job.plan.interface.is_some();
        let saver = memory.map(|memory| Saver::new(memory, has_interface, &job.plan.binary)).transpose()?;
        Ok(Prepared {
            command: command(job, &files),
            passed,
            more_log: None,
            lifeline: false,
            walls: jail.as_ref().map(|jail| jail.confine(confine::vmm(&VmmFiles::default()))),
            is_jailed: jail.is_some(),
            bring_up: Box::new(Spawned { monitor, link, jail, saver, incoming }),
        })
    }
}

/// The numbers that passed descriptors have in QEMU, in this order.
struct Descriptors {
    /// The shim's connection to the monitor.
    monitor: i32,
    /// The first one of the guest link.
    link: i32,
    /// The socket for other connections to the monitor.
    others: i32,
    /// The guest's memory, for [`Link::Serial`].
    memory: i32,
    /// The network device, if there is one.
    tap: i32,
}

impl Descriptors {
    const fn of(link: Link) -> Self {
        let (monitor, first) = (PASSED_FD, PASSED_FD + 1);
        let others = first + link::descriptors(link);
        let memory = others + 1;
        let tap = match link {
            Link::Vsock => memory,
            Link::Serial => memory + 1,
        };
        Self { monitor, link: first, others, memory, tap }
    }
}

/// Prepares the restore of a saved guest, if the job is one, and adds what QEMU needs for it to the descriptors.
fn incoming(
    job: &Job,
    memory: Option<&File>,
    passed: &mut Vec<OwnedFd>,
) -> Result<Option<Incoming>, DriverError> {
    let Some(restore) = &job.plan.restore else { return Ok(None) };
    let Some(memory) = memory else {
        return Err(DriverError::NoCheckpoints { what: WHAT, action: "restore", why: NO_CHECKPOINTS });
    };
    let number = PASSED_FD + i32::try_from(passed.len()).unwrap_or(i32::MAX - PASSED_FD);
    let (incoming, pipe) = Incoming::prepare(restore, memory, number)?;
    passed.push(pipe);
    Ok(Some(incoming))
}

/// Makes the jail of a QEMU: its binary, libraries, modules and firmware, and the VM's files.
fn jail(job: &Job) -> Result<Jail, JailError> {
    let jail = Jail::make(&job.plan, Path::new(""), true)?;
    let binary = &job.plan.binary;
    let real = std::fs::canonicalize(binary).map_err(file("find", binary))?;
    let mut more: Vec<PathBuf> = QEMU_FILES.map(PathBuf::from).into();
    if let Some(prefix) = real.parent().and_then(Path::parent) {
        let modules = format!("lib/{}-linux-gnu/qemu", Arch::HOST);
        let own = ["lib/qemu", "lib64/qemu", &modules, "share/qemu", "share/qemu-firmware", "share/seabios"];
        more.extend(own.map(|name| prefix.join(name)));
    }
    jail.bring_program(binary, &more, job.plan.accel == Accel::Kvm)?;
    Ok(jail)
}

/// Returns the command line. File names are absolute; sockets are passed as descriptors.
fn command(job: &Job, files: &Files) -> CommandLine {
    let plan = &job.plan;
    let mib = plan.memory.as_mib();
    let numbers = Descriptors::of(plan.link);
    let mut arguments: Vec<OsString> = Vec::new();
    let mut option = |name: &str, value: String| {
        arguments.push(name.into());
        arguments.push(value.into());
    };
    let mut board = Board::new(plan.arch, plan.accel);
    board.options(&mut option);
    option("-smp", plan.vcpus.to_string());
    option("-m", format!("{mib}M"));
    // Shared, so that the shim can access it: its vsock device, or to save it.
    let memory = match &files.memory {
        None => format!("memory-backend-memfd,id=mem0,size={mib}M,share=on"),
        Some(path) => format!("memory-backend-file,id=mem0,size={mib}M,share=on,mem-path={}", path.display()),
    };
    option("-object", memory);
    option("-name", format!("{},debug-threads=on", plan.name));
    option("-display", "none".to_owned());
    option("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny".to_owned());
    if plan.restore.is_none() {
        option("-append", kernel_command_line(job, &board));
    }
    option("-chardev", "stdio,id=console,signal=off".to_owned());
    option("-serial", "chardev:console".to_owned());
    option("-chardev", format!("socket,id=shim,fd={}", numbers.monitor));
    option("-mon", "chardev=shim,mode=control".to_owned());
    option("-chardev", format!("socket,id=monitor,fd={},server=on,wait=off", numbers.others));
    option("-mon", "chardev=monitor,mode=control".to_owned());
    for (index, (drive, path)) in plan.drives.iter().zip(&files.drives).enumerate() {
        let [file, format] = block_nodes(index, path, drive.read_only);
        option("-blockdev", file);
        option("-blockdev", format);
        option("-device", board.device(&format!("virtio-blk-device,drive=disk{index},id=drive{index}")));
    }
    if let Some(interface) = &plan.interface {
        option("-netdev", format!("tap,id=net0,fd={}", numbers.tap));
        option("-device", board.device(&format!("virtio-net-device,netdev=net0,mac={}", interface.mac)));
    }
    option("-device", board.device("virtio-rng-device"));
    link::devices(plan.link, numbers.link, &mut board, &mut option);
    for flag in ["-nodefaults", "-no-user-config", "-no-reboot"] {
        arguments.push(flag.into());
    }
    if plan.restore.is_some() {
        // The guest has its kernel in its memory.
        arguments.extend(restore::OPTIONS.map(OsString::from));
    } else {
        for (name, path) in [("-kernel", &files.kernel), ("-initrd", &files.initramfs)] {
            arguments.extend([name.into(), path.into()]);
        }
    }
    CommandLine { program: plan.binary.clone(), arguments }
}

/// Returns the block nodes of a drive: file and format. The guest's flushes reach the disk, blocks that it discards are freed on the
/// host's filesystem, and the file is locked against a second VMM.
fn block_nodes(index: usize, path: &Path, read_only: bool) -> [String; 2] {
    let cache = json!({ "direct": false, "no-flush": false });
    let file = json!({
        "driver": "file",
        "node-name": format!("file{index}"),
        "filename": path,
        "locking": "on",
        "cache": cache,
        "discard": "unmap",
        "read-only": read_only,
    });
    let format = json!({
        "driver": "raw",
        "node-name": format!("disk{index}"),
        "file": format!("file{index}"),
        "cache": cache,
        "discard": "unmap",
        "read-only": read_only,
    });
    [file.to_string(), format.to_string()]
}

fn kernel_command_line(job: &Job, board: &Board) -> String {
    let mut words = board.kernel_words(job.tsc_khz);
    if job.plan.link == Link::Serial {
        words.push(nexus_vsock::serial::WORD.to_owned());
    }
    words.extend(job.plan.cmdline.iter().cloned());
    words.join(" ")
}

struct Spawned {
    monitor: Monitor,
    link: GuestLink,
    jail: Option<Jail>,
    saver: Option<Saver>,
    incoming: Option<Incoming>,
}

impl BringUp for Spawned {
    fn bring_up(self: Box<Self>, _: &ProcessHandle) -> Result<Arc<dyn Machine>, DriverError> {
        let Self { monitor, link, jail, saver, incoming } = *self;
        let deadline = Instant::now() + BRING_UP;
        // If the process ends, the connection ends too, so the process needs no separate check.
        let version = monitor.open(deadline)?;
        if let Some(incoming) = incoming {
            incoming.load(&monitor, deadline, |nonce| link.relink(nonce))?;
        }
        Ok(Arc::new(Running { version, monitor, saver, _link: link, _jail: jail }))
    }
}

struct Running {
    version: String,
    monitor: Monitor,
    /// `None` if this VM cannot be saved.
    saver: Option<Saver>,
    _link: GuestLink,
    _jail: Option<Jail>,
}

impl Running {
    fn saver(&self) -> Result<&Saver, DriverError> {
        let no = DriverError::NoCheckpoints { what: WHAT, action: "save", why: NO_CHECKPOINTS };
        self.saver.as_ref().ok_or(no)
    }
}

impl Machine for Running {
    fn version(&self) -> &str {
        &self.version
    }

    fn shutdown(&self) -> Result<(), DriverError> {
        self.monitor.execute("system_powerdown").map(drop)
    }

    fn set_paused(&self, paused: bool) -> Result<(), DriverError> {
        self.monitor.set_paused(paused)
    }

    fn resize_drive(&self, index: usize, bytes: u64) -> Result<(), DriverError> {
        let arguments = json!({ "node-name": format!("disk{index}"), "size": bytes });
        self.monitor.execute_with("block_resize", &arguments).map(drop)
    }

    fn prepare_save(&self) -> Result<(), DriverError> {
        self.saver()?.binary_sha256().map(drop)
    }

    fn save(&self, files: &SaveFiles, is_wanted: &dyn Fn() -> bool) -> Result<Saved, DriverError> {
        self.saver()?.save(&self.monitor, &self.version, files, is_wanted)
    }

    fn set_link(&self, up: bool) -> Result<(), DriverError> {
        save::set_link(&self.monitor, up)
    }

    fn events(&self) -> Option<BorrowedFd<'_>> {
        Some(self.monitor.as_fd())
    }

    fn take_events(&self) -> bool {
        self.monitor.take()
    }

    fn stall(&self) -> Option<Stall> {
        self.monitor.full_node().map(|node| {
            let drive = node.strip_prefix(NODE).and_then(|number| number.parse().ok()).unwrap_or_default();
            Stall::DiskFull { drive }
        })
    }

    fn end(&self) -> Option<MachineEnd> {
        match self.monitor.shutdown_reason().as_deref() {
            Some("guest-reset") => Some(MachineEnd::Reset),
            Some("guest-shutdown") => Some(MachineEnd::Off),
            _ => None,
        }
    }

    fn ending(&self, status: ExitStatus) -> String {
        match self.monitor.shutdown_reason().as_deref() {
            Some("guest-reset") if status.success() => "the guest restarted its machine".to_owned(),
            Some("guest-shutdown") if status.success() => "the guest powered its machine off".to_owned(),
            Some("guest-panic") if status.success() => "the guest's kernel panicked".to_owned(),
            _ => ended_with("qemu", status),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::plan::tests::plan;

    fn text(command: &CommandLine) -> String {
        let mut text = command.program.display().to_string();
        for argument in &command.arguments {
            let argument = argument.to_str().unwrap();
            text.push_str(if argument.starts_with('-') { "\n" } else { " " });
            text.push_str(argument);
        }
        text
    }

    fn command_of(plan: crate::vmm::plan::LaunchPlan) -> CommandLine {
        let files = Files::of(&plan);
        command(&Job { plan, tsc_khz: None }, &files)
    }

    #[test]
    fn command_line_under_tcg() {
        let job = Job { plan: plan(), tsc_khz: Some(2_445_432) };
        insta::assert_snapshot!("qemu_tcg", text(&command(&job, &Files::of(&job.plan))));
    }

    #[test]
    fn command_line_under_kvm() {
        let mut plan = plan();
        plan.accel = Accel::Kvm;
        plan.vcpus = 4;
        plan.drives.clear();
        insta::assert_snapshot!("qemu_kvm", text(&command_of(plan)));
    }

    #[test]
    fn command_line_of_a_vm_of_arm64() {
        let mut plan = crate::vmm::plan::LaunchPlan { arch: Arch::Aarch64, ..plan() };
        plan.interface = Some(crate::vmm::plan::tests::interface());
        plan.drives.push(plan.drives[0].clone());
        let files = Files::of(&plan);
        let text = text(&command(&Job { plan, tsc_khz: Some(2_445_432) }, &files));
        let devices: Vec<&str> = text.lines().filter(|line| line.starts_with("-device ")).collect();
        assert_eq!(
            devices,
            [
                "-device virtio-blk-device,drive=disk0,id=drive0,bus=virtio-mmio-bus.0",
                "-device virtio-blk-device,drive=disk1,id=drive1,bus=virtio-mmio-bus.1",
                "-device virtio-net-device,netdev=net0,mac=02:4e:58:00:00:01,bus=virtio-mmio-bus.2",
                "-device virtio-rng-device,bus=virtio-mmio-bus.3",
                "-device vhost-user-vsock-device,chardev=vsock,bus=virtio-mmio-bus.4",
            ]
        );
        for option in [
            "\n-machine virt,accel=tcg,gic-version=max,memory-backend=mem0\n",
            "\n-append console=ttyAMA0 loglevel=5 panic=-1 mitigations=off nokaslr init_on_alloc=0 nexus.init=agent nexus.root=/dev/vda\n",
            "\n-serial chardev:console\n",
            "\n-kernel /var/lib/nexus/assets/k/vmlinux\n",
        ] {
            assert!(text.contains(option), "{option} in {text}");
        }
    }

    #[test]
    fn command_line_of_a_vm_that_can_be_checkpointed() {
        let interface = Some(crate::vmm::plan::tests::interface());
        let plan = crate::vmm::plan::LaunchPlan { link: Link::Serial, interface, ..plan() };
        let mut files = Files::of(&plan);
        files.memory = Some("/memory/guest".into());
        insta::assert_snapshot!("qemu_serial", text(&command(&Job { plan, tsc_khz: None }, &files)));
    }

    #[test]
    fn an_interface_is_connected_to_the_device_that_is_passed() {
        let plan =
            crate::vmm::plan::LaunchPlan { interface: Some(crate::vmm::plan::tests::interface()), ..plan() };
        let text = text(&command_of(plan));
        assert!(text.contains("\n-netdev tap,id=net0,fd=6\n"), "{text}");
        assert!(text.contains("\n-device virtio-net-device,netdev=net0,mac=02:4e:58:00:00:01\n"), "{text}");
    }

    #[test]
    fn a_restored_guest_waits_for_its_state_and_boots_no_kernel() {
        let mut plan = plan();
        let booted = text(&command_of(plan.clone()));
        plan.restore = Some(crate::vmm::plan::Restore {
            state: "/c/state".into(),
            ram: "/c/ram".into(),
            kind: crate::vmm::plan::SavedKind::Shared,
            nonce: "00ff".into(),
        });
        let restored = text(&command_of(plan));
        let options = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
        let (booted, restored) = (options(&booted), options(&restored));
        let lost: Vec<_> = booted.iter().filter(|option| !restored.contains(option)).collect();
        let new: Vec<_> = restored.iter().filter(|option| !booted.contains(option)).collect();
        let names = |options: &[&String]| -> Vec<String> {
            options.iter().filter_map(|option| Some(option.split_once(' ')?.0.to_owned())).collect()
        };
        assert_eq!(names(&lost), ["-append", "-kernel", "-initrd"]);
        assert_eq!(new, ["-incoming defer", "-S"]);
    }

    #[test]
    fn hostile_paths_stay_one_argument() {
        let mut plan = plan();
        plan.kernel = "/a,b c=d\"e".into();
        plan.drives[0].path = "/a,b c=d\"e/disk".into();
        let command = command_of(plan);
        assert!(command.arguments.contains(&"/a,b c=d\"e".into()));
        let node = command.arguments.iter().find(|a| a.to_str().unwrap().contains("disk\"")).unwrap();
        let node: serde_json::Value = serde_json::from_str(node.to_str().unwrap()).unwrap();
        assert_eq!(node["filename"], "/a,b c=d\"e/disk");
    }
}
