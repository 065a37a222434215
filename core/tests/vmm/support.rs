//! VMs to vary, and waiting with a deadline.

use std::future::Future;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use nexus_core::internals::{Accel, Exit, LaunchPlan, Link, ShimClient, VmmError};
use nexus_schema::id::{BootId, VmId};
use nexus_schema::{Arch, ByteSize, DriverKind};

pub(crate) const SHIM: &str = env!("CARGO_BIN_EXE_nexus-test-shim");
/// The machine that runs the tests may be slow; what hangs, hangs longer.
pub(crate) const DEADLINE: Duration = Duration::from_secs(100);

/// A VM's directory, and a plan to vary.
pub(crate) struct Vm {
    pub(crate) plan: LaunchPlan,
    root: tempfile::TempDir,
    /// The shims that were launched, by pid.
    shims: Mutex<Vec<u32>>,
}

/// A test that fails leaves no processes: a VMM ends with its shim.
impl Drop for Vm {
    fn drop(&mut self) {
        let shims = self.shims.get_mut().unwrap_or_else(PoisonError::into_inner);
        for pid in shims.iter().filter_map(|pid| i32::try_from(*pid).ok()) {
            if std::thread::panicking() {
                // It may have ended.
                let _ = nix::sys::signal::kill(
                    nix::unistd::Pid::from_raw(pid),
                    nix::sys::signal::Signal::SIGKILL,
                );
            }
        }
    }
}

impl Vm {
    /// A VM whose "VMM" is a shell script. It counts as up once it has made `v.sock`.
    pub(crate) fn script(script: &str) -> Self {
        let mut vm = Self::new(DriverKind::Process);
        let path = vm.root.path().join("vmm");
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        vm.plan.binary = path;
        vm
    }

    pub(crate) fn new(driver: DriverKind) -> Self {
        let root = tempfile::tempdir().unwrap();
        // Longer than what a socket's address holds.
        let directory = root.path().join("d".repeat(150));
        std::fs::create_dir(&directory).unwrap();
        let plan = LaunchPlan {
            vm: VmId::from_i64(1).unwrap(),
            name: "web-1".parse().unwrap(),
            boot_id: BootId::from_i64(2).unwrap(),
            driver,
            binary: PathBuf::new(),
            arch: Arch::HOST,
            accel: Accel::Tcg,
            directory,
            vcpus: 1,
            memory: ByteSize::mib(128),
            kernel: PathBuf::new(),
            initramfs: PathBuf::new(),
            cmdline: vec![],
            drives: vec![],
            cid: 3,
            link: Link::Vsock,
            interface: None,
            jail: true,
            console_bytes: ByteSize::bytes(64 << 10),
            restore: None,
        };
        Self { plan, root, shims: Mutex::default() }
    }

    pub(crate) fn directory(&self) -> &Path {
        &self.plan.directory
    }

    pub(crate) fn scratch(&self) -> &Path {
        self.root.path()
    }

    pub(crate) async fn launch(&self) -> ShimClient {
        let shim = in_time(ShimClient::launch(Path::new(SHIM), &self.plan)).await.unwrap();
        self.shims.lock().unwrap().push(shim.identity().pid);
        shim
    }

    pub(crate) async fn fails_to_launch(&self) -> VmmError {
        in_time(ShimClient::launch(Path::new(SHIM), &self.plan)).await.unwrap_err()
    }

    /// The files of the directory that are sockets or half-written.
    pub(crate) fn leftovers(&self) -> Vec<String> {
        let names = std::fs::read_dir(self.directory()).unwrap().map(|e| e.unwrap().file_name());
        names
            .map(|n| n.into_string().unwrap())
            .filter(|n| n.contains("sock") || n.ends_with(".new"))
            .collect()
    }
}

pub(crate) async fn in_time<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future).await.expect("in time")
}

pub(crate) async fn ended(shim: &ShimClient) -> Exit {
    in_time(shim.wait()).await
}

/// Waits until `found` gives something.
pub(crate) async fn eventually<T>(what: &str, mut found: impl FnMut() -> Option<T>) -> T {
    let deadline = tokio::time::Instant::now() + DEADLINE;
    loop {
        if let Some(found) = found() {
            return found;
        }
        assert!(tokio::time::Instant::now() < deadline, "never: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Whether a process runs; a zombie does not.
pub(crate) fn is_alive(pid: u32) -> bool {
    nexus_core::internals::process::stat(pid).unwrap().is_some_and(|stat| !stat.is_dead())
}

pub(crate) fn signal(pid: u32, signal: nix::sys::signal::Signal) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap()), signal).unwrap();
}

/// The memory that a process has for itself, in bytes. Pages of its binary do not count: the daemon has the same.
pub(crate) fn own_memory(pid: u32) -> u64 {
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let anonymous = rollup.lines().find_map(|line| line.strip_prefix("Anonymous:")).unwrap();
    anonymous.trim().strip_suffix(" kB").unwrap().trim().parse::<u64>().unwrap() << 10
}
