use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::os::mounted::{USER, as_user};

/// Runs a program with restrictions.
fn run(walls: Walls, program: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new(program);
    command.args(arguments).current_dir("/");
    // SAFETY: between fork and exec only system calls are made.
    unsafe {
        command.pre_exec(move || walls.apply());
    }
    command.output().unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr].concat()).into_owned()
}

fn tool_on(disk: &Path, program: &str) -> Confinement {
    let file = std::fs::OpenOptions::new().read(true).write(true).open(disk).unwrap();
    let length = file.metadata().unwrap().len();
    tools(Path::new(program), Arc::new(file.into()), Access::Write, length, Duration::from_secs(60))
}

#[test]
fn root_becomes_nobody_without_capabilities_in_namespaces_of_its_own() {
    let directory = tempfile::tempdir().unwrap();
    let disk = directory.path().join("disk");
    std::fs::write(&disk, [0; 4096]).unwrap();
    let mut walls = tool_on(&disk, "/bin/cat");
    // Only for the test: the program reads its own restrictions.
    walls.files = walls.files.map(|files| files.allow("/proc", Access::Read));
    let status = said(&run(walls.prepare().unwrap(), "/bin/cat", &["/proc/self/status"]));
    for line in [
        "Uid:\t65534\t65534\t65534\t65534",
        "Gid:\t65534\t65534\t65534\t65534",
        "Groups:\t \n",
        "CapInh:\t0000000000000000",
        "CapPrm:\t0000000000000000",
        "CapEff:\t0000000000000000",
        "CapBnd:\t0000000000000000",
        "CapAmb:\t0000000000000000",
        "NoNewPrivs:\t1",
        "Seccomp:\t2",
    ] {
        assert!(status.contains(line), "{line} is not in {status}");
    }
    let devices = said(&run(walls.prepare().unwrap(), "/bin/cat", &["/proc/self/net/dev"]));
    assert_eq!(devices.lines().filter(|line| line.contains(':')).count(), 1, "more than lo: {devices}");
    let limits = said(&run(walls.prepare().unwrap(), "/bin/cat", &["/proc/self/limits"]));
    for (name, value) in [("Max file size", "4096"), ("Max address space", "4294967296")] {
        let line = limits.lines().find(|line| line.starts_with(name)).unwrap();
        assert!(line.contains(value), "{line}");
    }
}

#[test]
fn a_tool_opens_its_disk_and_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let (disk, other) = (directory.path().join("disk"), directory.path().join("other"));
    for file in [&disk, &other] {
        std::fs::write(file, "content").unwrap();
        std::fs::set_permissions(file, std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
    }
    std::fs::set_permissions(directory.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let cat = |path: &str| {
        let ours = run(tool_on(&disk, "/bin/cat").prepare().unwrap(), "/bin/cat", &[path]);
        let users =
            as_user(async { run(tool_on(&disk, "/bin/cat").prepare().unwrap(), "/bin/cat", &[path]) });
        [ours, users]
    };
    assert!(landlock_abi().is_some(), "this kernel has no Landlock");
    for output in cat(disk.to_str().unwrap()) {
        assert_eq!(said(&output), "content");
    }
    for path in [other.to_str().unwrap(), "/etc/passwd", "/proc/self/environ", "/proc/1/status"] {
        for output in cat(path) {
            let said = said(&output);
            assert!(!output.status.success() && said.contains("Permission denied"), "{path}: {said}");
        }
    }
    for output in cat("/proc/self/mounts") {
        assert!(output.status.success() && said(&output).contains(" / "), "{}", said(&output));
    }
}

#[test]
fn a_tool_starts_no_program_and_no_process() {
    let directory = tempfile::tempdir().unwrap();
    let disk = directory.path().join("disk");
    std::fs::write(&disk, "content").unwrap();
    for script in ["exec /bin/true", "/bin/true; echo went on", "echo x >/dev/tcp/127.0.0.1/9"] {
        let output = run(tool_on(&disk, "/bin/bash").prepare().unwrap(), "/bin/bash", &["-c", script]);
        assert!(!output.status.success(), "{script}: {}", said(&output));
    }
    let script = "echo written and too long >\"$1\"";
    let arguments = ["-c", script, "bash", disk.to_str().unwrap()];
    let as_owner = || run(tool_on(&disk, "/bin/bash").prepare().unwrap(), "/bin/bash", &arguments);
    std::os::unix::fs::chown(directory.path(), Some(USER), Some(USER)).unwrap();
    std::os::unix::fs::chown(&disk, Some(USER), Some(USER)).unwrap();
    let output = as_user(async { as_owner() });
    assert!(!output.status.success(), "{}", said(&output));
    assert!(std::fs::metadata(&disk).unwrap().len() <= 7, "longer than it was");
}

/// Tries what a VMM may not do; in Python, which can make system calls by number.
const TRIES: &str = r#"
import ctypes, os, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
def tried(name, number, *arguments):
    result = libc.syscall(number, *arguments)
    print(name, "done" if result >= 0 else os.strerror(ctypes.get_errno()))
tried("unshare", 272, 0x10000000)
tried("clone", 56, 0x10000000 | 17, 0, 0, 0, 0)
tried("clone3", 435, 0, 0)
tried("mount", 165, b"x", b"/", b"tmpfs", 0, 0)
tried("ptrace", 101, 0, 0, 0, 0)
tried("bpf", 321, 0, 0, 0)
tried("io_uring", 425, 1, 0)
tried("userfaultfd", 323, 0)
tried("keyctl", 250, 0, -3, 0)
tried("setsid", 112)
tried("x32 getpid", 0x40000000 + 39)
for name, request in (("MAC", 0x8924), ("persist", 0x400454cb), ("owner", 0x400454cc), ("offload", 0x400454d0)):
    tried(name, 16, 0, request, 0)
for family in ("AF_INET", "AF_INET6", "AF_NETLINK", "AF_PACKET", "AF_VSOCK", "AF_UNIX"):
    try:
        socket.socket(getattr(socket, family), socket.SOCK_DGRAM if family == "AF_UNIX" else socket.SOCK_STREAM)
        print(family, "done")
    except OSError as error:
        print(family, error.strerror)
try:
    socket.socket(socket.AF_UNIX).connect("/nowhere/net.sock")
except OSError as error:
    print("connect", error.strerror)
"#;

#[cfg(target_arch = "x86_64")]
#[test]
fn a_vmm_widens_nothing() {
    let expected = "unshare Operation not permitted\nclone Operation not permitted\nclone3 Function not implemented\n\
        mount Operation not permitted\nptrace Operation not permitted\nbpf Operation not permitted\n\
        io_uring Operation not permitted\nuserfaultfd Operation not permitted\nkeyctl Operation not permitted\n\
        setsid Operation not permitted\nx32 getpid Function not implemented\nMAC Operation not permitted\npersist Operation not permitted\n\
        owner Operation not permitted\noffload Inappropriate ioctl for device\nAF_INET Operation not permitted\nAF_INET6 Operation not permitted\n\
        AF_NETLINK Operation not permitted\nAF_PACKET Operation not permitted\nAF_VSOCK Operation not permitted\n\
        AF_UNIX done\n";
    for (syscalls, connect) in
        [(Syscalls::Vmm, "Operation not permitted"), (Syscalls::DiallingVmm, "No such file or directory")]
    {
        let run_python = || {
            let confinement = Confinement { syscalls, ..Confinement::default() };
            said(&run(confinement.prepare().unwrap(), "/usr/bin/python3", &["-c", TRIES]))
        };
        let expected = format!("{expected}connect {connect}\n");
        assert_eq!(run_python(), expected);
        assert_eq!(as_user(async { run_python() }), expected);
    }
}

/// By its name and its children, sockets tell what belongs to a VM.
#[test]
fn a_shim_keeps_its_name_and_its_children() {
    use rustix::process::{getpid, set_child_subreaper};
    let tries = || {
        let named = rustix::thread::set_name(c"another").map_err(|error| error.raw_os_error());
        let adopts = set_child_subreaper(Some(getpid())).map_err(|error| error.raw_os_error());
        (named, adopts, rustix::thread::name().unwrap())
    };
    // On a thread of its own: a filter cannot be taken off.
    let confined = std::thread::spawn(move || {
        rustix::thread::set_name(c"nexus-shim").unwrap();
        Syscalls::Shim.filters().unwrap().apply().unwrap();
        tries()
    });
    let refused = Err(libc::EPERM);
    assert_eq!(confined.join().unwrap(), (refused, refused, c"nexus-shim".to_owned()));
}

#[test]
fn a_vmm_of_a_user_sees_its_files_and_makes_sockets_only() {
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str| {
        let path = directory.path().join(name);
        std::fs::write(&path, name).unwrap();
        std::os::unix::fs::chown(&path, Some(USER), Some(USER)).unwrap();
        path
    };
    let (drive, kernel, plan) = (file("drive"), file("kernel"), file("plan.json"));
    std::os::unix::fs::chown(directory.path(), Some(USER), Some(USER)).unwrap();
    let files = VmmFiles {
        binary: "/bin/bash".into(),
        directory: directory.path().into(),
        read: vec![kernel],
        write: vec![drive],
        dials: false,
        read_by_shim: vec![plan.clone()],
    };
    let script = "cd \"$1\" || exit; for f in drive kernel plan.json; do \
        read -r x <$f && echo $f read; echo >>$f && echo $f written; done; : >new && echo made; echo */";
    let walls = || vmm(&files).prepare().unwrap();
    let arguments = ["-c", script, "bash", directory.path().to_str().unwrap()];
    let output = as_user(async { run(walls(), "/bin/bash", &arguments) });
    let lines = String::from_utf8(output.stdout).unwrap();
    assert_eq!(lines, "drive written\n*/\n", "{}", String::from_utf8_lossy(&output.stderr));
    drop(plan);
}

#[test]
fn the_signal_for_a_parents_death_outlives_the_change_of_user() {
    use rustix::process::Signal;
    let confinement = Confinement { user: Some(NOBODY), ..Confinement::default() };
    let walls = confinement.prepare().unwrap();
    let kept = std::thread::spawn(move || {
        let mut command = Command::new("/usr/bin/python3");
        let code =
            "import ctypes; n = ctypes.c_int(); ctypes.CDLL(None).prctl(2, ctypes.byref(n)); print(n.value)";
        command.args(["-c", code]);
        // SAFETY: between fork and exec only system calls are made.
        unsafe {
            command.pre_exec(move || {
                rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
                walls.apply()
            });
        }
        command.output().unwrap()
    });
    assert_eq!(said(&kept.join().unwrap()).trim(), "9");
}
