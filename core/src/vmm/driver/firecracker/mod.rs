//! The driver `firecracker`, for 1.16.1 and newer.
//!
//! The process starts without a configuration. The requests of [`requests`] are then sent to its API socket ([`api`]); the last one starts
//! the guest. A saved guest goes on by one request instead ([`snapshot`]). Under root's daemon, its `jailer` ([`jail`]) starts it, with its own root directory and user and without privileges.

mod api;
mod full;
mod jail;
mod relay;
mod relink;
mod requests;
mod snapshot;

use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nexus_schema::network::Bandwidth;
use nexus_schema::{ByteSize, DriverKind};
use rustix::fs::{FileType, Mode, OFlags};

use self::api::Api;
use self::full::FullDisk;
use self::jail::Jailed;
use self::requests::Request;
use self::snapshot::{Loaded, Saver};
use super::{
    BRING_UP, BringUp, Caps, Driver, DriverError, Facts, LogPipe, Machine, PAUSE, Prepared, STATE, SaveFiles,
    Vmm, ended_with, jail_failed,
};
use crate::os::paths::vm_files;
use crate::os::process::ProcessHandle;
use crate::vmm::control::{Job, Saved, Stall};
use crate::vmm::jail::Files;
use crate::vmm::plan::PlanDrive;
use crate::vmm::process::CommandLine;
use crate::vmm::version::Version;

const WHAT: &str = "firecracker";
/// How often a resume is refused because the snapshot that it needs fails, before the guest is resumed without one.
const RESUMES_MAX: u32 = 30;

pub(super) static FACTS: Facts = Facts {
    kind: DriverKind::Firecracker,
    caps: CAPS,
    sockets: &[vm_files::API, vm_files::VMM_PIPE],
    dials: true,
    vmm: Some(Vmm {
        programs: &[WHAT, jail::JAILER],
        min_version: Version(1, 16, 1),
        fix: "nexusctl asset download vmm (or put firecracker 1.16.1 or newer, its release binary, into a directory of programs, or name it in the configuration)",
        needs_kvm: true,
        look_closer: jail::look_closer,
    }),
    make: || Box::new(Firecracker),
};

const CAPS: Caps = Caps {
    max_vcpus: 32,
    min_memory: ByteSize::mib(32),
    max_drives: 8,
    has_interface: true,
    takes_open_tap: false,
    limits_bandwidth: true,
    can_pause: true,
    pauses_on_full_disk: false,
    checkpoint: true,
    saves_vsock: true,
    fork: true,
    // A snapshot resets the vsock device, also of the guest that goes on.
    keeps_connections: false,
    can_ask_guest: true,
};

struct Firecracker;

impl Driver for Firecracker {
    fn prepare(&self, job: &Job) -> Result<Prepared, DriverError> {
        let is_jailed = crate::vmm::jail::is_for(&job.plan);
        let jail = match jail::find_jailer(&job.plan.binary).filter(|_| is_jailed) {
            Some(jailer) => Some(Jailed::make(job, jailer).map_err(jail_failed)?),
            None => None,
        };
        let root = jail.as_ref().map_or_else(PathBuf::new, |jailed| jailed.jail().root().to_owned());
        let log = make_log_pipe(&root.join(vm_files::VMM_PIPE))
            .map_err(|source| DriverError::Connection { source })?;
        let saver = Saver::make(job, &root, jail.as_ref())?;
        let loaded = job.plan.restore.as_ref();
        let loaded = loaded.map(|restore| Loaded::make(job, restore, &root, jail.as_ref())).transpose()?;
        let full_disk = FullDisk::new().map_err(|e| DriverError::Connection { source: e.into() })?;
        let (command, files) = match &jail {
            Some(jail) => {
                jail.jail().give(&root.join(vm_files::VMM_PIPE)).map_err(jail_failed)?;
                (jail.command(job), jail.jail().files().clone())
            }
            None => {
                let drives = link_drives(job).map_err(|source| DriverError::Connection { source })?;
                (command(job), Files { drives, ..Files::of(&job.plan) })
            }
        };
        Ok(Prepared {
            command,
            passed: Vec::new(),
            more_log: Some(LogPipe { pipe: log, listener: full_disk.listener() }),
            // The jailer changes the user, and the kernel then resets the parent-death signal.
            lifeline: jail.is_some(),
            // The jailer confines it.
            walls: None,
            is_jailed: jail.is_some(),
            bring_up: Box::new(Spawned {
                api: Api::new(root.join(vm_files::API)),
                start: match loaded {
                    Some(loaded) => Start::Load(requests::load(&job.plan), loaded),
                    None => Start::Boot(requests::configure(job, &files)),
                },
                saver,
                drives: job.plan.drives.iter().map(|drive| drive.id.clone()).zip(files.drives).collect(),
                first_writable: job.plan.drives.iter().position(|drive| !drive.read_only).unwrap_or_default(),
                full_disk,
                jail,
            }),
        })
    }
}

/// Returns the command line without a jailer.
fn command(job: &Job) -> CommandLine {
    // Ids contain no `_`, on which firecracker would abort.
    let own = ["--id", &job.plan.vm.to_string(), "--api-sock", vm_files::API];
    let arguments = own.into_iter().chain(LOG_OPTIONS).map(Into::into).collect();
    CommandLine { program: job.plan.binary.clone(), arguments }
}

/// Gives drives names in the working directory, and returns these. A saved guest has the names of its drives in its state, and so finds those of its own
/// VM. In a jail they have such names anyway.
fn link_drives(job: &Job) -> io::Result<Vec<PathBuf>> {
    let link = |drive: &PlanDrive| -> io::Result<PathBuf> {
        let name = PathBuf::from(format!("drive-{}", drive.id));
        match std::fs::remove_file(&name) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        std::os::unix::fs::symlink(&drive.path, &name)?;
        Ok(name)
    };
    job.plan.drives.iter().map(link).collect()
}

/// Options that make firecracker log to the pipe from its first line on. Without them, everything before a request `PUT /logger` would
/// go to stdout, which is the guest's console.
const LOG_OPTIONS: [&str; 5] = ["--log-path", vm_files::VMM_PIPE, "--level", "Warning", "--show-level"];

/// Makes the pipe for firecracker's log, which would go to the console otherwise. A pipe keeps the log bounded, and firecracker never
/// blocks on it.
fn make_log_pipe(path: &Path) -> io::Result<File> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    rustix::fs::mknodat(rustix::fs::CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?;
    // Also for writing, so that reads do not see an end before the VMM opens the pipe.
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    Ok(File::from(rustix::fs::open(path, flags, Mode::empty())?))
}

/// How the guest begins.
enum Start {
    /// By these requests, and a start.
    Boot(Vec<Request>),
    /// By this request, from a saved guest.
    Load(Request, Loaded),
}

struct Spawned {
    api: Api,
    start: Start,
    saver: Saver,
    /// Id and file of each drive, as firecracker sees them.
    drives: Vec<(String, PathBuf)>,
    /// Index of the first drive that the guest may write to.
    first_writable: usize,
    full_disk: FullDisk,
    jail: Option<Jailed>,
}

impl BringUp for Spawned {
    fn bring_up(self: Box<Self>, process: &ProcessHandle) -> Result<Arc<dyn Machine>, DriverError> {
        let deadline = Instant::now() + BRING_UP;
        self.wait_for_api(process, deadline)?;
        let version = self.api.get(requests::VERSION)?;
        let version = version.get("firecracker_version").and_then(|v| v.as_str()).unwrap_or("unknown");
        let open = || self.jail.as_ref().map_or(Ok(()), |jail| jail.open_to_host().map_err(jail_failed));
        match self.start {
            Start::Boot(requests) => {
                requests.iter().try_for_each(|request| self.api.send(request))?;
                // The vsock device exists now, and the guest does not run yet.
                open()?;
                self.api.send(&requests::action("InstanceStart"))?;
            }
            Start::Load(request, loaded) => {
                self.api.send_within(&request, STATE)?;
                open()?;
                let nonce = loaded.nonce().to_owned();
                drop(loaded);
                relink::relink(process, &nonce)?;
            }
        }
        Ok(Arc::new(Running {
            version: version.to_owned(),
            api: self.api,
            drives: self.drives,
            first_writable: self.first_writable,
            full_disk: self.full_disk,
            saver: self.saver,
            pause: Mutex::default(),
            _jail: self.jail,
        }))
    }
}

impl Spawned {
    fn wait_for_api(&self, process: &ProcessHandle, deadline: Instant) -> Result<(), DriverError> {
        loop {
            match self.api.connect() {
                Ok(_) => return Ok(()),
                Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {}
                Err(source) => return Err(DriverError::Connection { source }),
            }
            let ended = process.wait_ended(Duration::from_millis(1));
            if ended.map_err(|source| DriverError::Connection { source })? {
                return Err(DriverError::Ended { what: WHAT });
            }
            if Instant::now() > deadline {
                return Err(DriverError::Late { what: WHAT, seconds: BRING_UP.as_secs() });
            }
        }
    }
}

struct Running {
    version: String,
    api: Api,
    drives: Vec<(String, PathBuf)>,
    first_writable: usize,
    full_disk: FullDisk,
    saver: Saver,
    pause: Mutex<Pause>,
    _jail: Option<Jailed>,
}

/// Whether the guest is paused, and what was done meanwhile.
#[derive(Debug, Default)]
struct Pause {
    is_paused: bool,
    /// Without a snapshot between them, pause and resume leave a guest that the host cannot connect to any more (seen with 1.16).
    has_snapshot: bool,
    /// How many snapshots before a resume have failed.
    failed: u32,
}

impl Running {
    fn resume(&self, pause: &mut Pause) -> Result<(), DriverError> {
        if !pause.has_snapshot {
            match self.saver.write(&self.api) {
                Ok(()) => pause.has_snapshot = true,
                Err(error) if pause.failed < RESUMES_MAX => {
                    pause.failed += 1;
                    return Err(error);
                }
                // Better out of reach than paused for ever.
                Err(error) => {
                    tracing::error!(%error, "a guest is resumed without a snapshot: it cannot be reached")
                }
            }
            self.saver.empty();
        }
        self.api.send_within(&requests::set_paused(false), PAUSE)?;
        *pause = Pause::default();
        Ok(())
    }
}

impl Machine for Running {
    fn version(&self) -> &str {
        &self.version
    }

    fn shutdown(&self) -> Result<(), DriverError> {
        self.api.send(&requests::action("SendCtrlAltDel"))
    }

    fn set_paused(&self, paused: bool) -> Result<(), DriverError> {
        let mut pause = self.pause.lock().unwrap_or_else(PoisonError::into_inner);
        match (paused, pause.is_paused) {
            (true, true) => Ok(()),
            (true, false) => {
                // For the snapshot before the resume.
                self.saver.check_room()?;
                self.api.send_within(&requests::set_paused(true), PAUSE)?;
                *pause = Pause { is_paused: true, ..Pause::default() };
                Ok(())
            }
            (false, is_paused) => {
                // The next failed write is reported again.
                self.full_disk.forget();
                if is_paused { self.resume(&mut pause) } else { Ok(()) }
            }
        }
    }

    fn prepare_save(&self) -> Result<(), DriverError> {
        self.saver.prepare()
    }

    fn save(&self, files: &SaveFiles, is_wanted: &dyn Fn() -> bool) -> Result<Saved, DriverError> {
        let started = Instant::now();
        {
            let mut pause = self.pause.lock().unwrap_or_else(PoisonError::into_inner);
            self.saver.write(&self.api)?;
            pause.has_snapshot = true;
        }
        self.saver.copy(&self.version, files, started.elapsed(), is_wanted)
    }

    /// Does nothing: firecracker's interfaces are always connected. What a restored guest sends with the address of the saved one is dropped at its
    /// TAP device.
    fn set_link(&self, _up: bool) -> Result<(), DriverError> {
        Ok(())
    }

    fn events(&self) -> Option<BorrowedFd<'_>> {
        Some(self.full_disk.event())
    }

    fn take_events(&self) -> bool {
        self.full_disk.take_event();
        true
    }

    fn stall(&self) -> Option<Stall> {
        // The log does not name the drive.
        self.full_disk.is_reported().then_some(Stall::DiskFull { drive: self.first_writable })
    }

    fn resize_drive(&self, index: usize, _: u64) -> Result<(), DriverError> {
        // Firecracker reads the file's length itself.
        let (id, file) = self.drives.get(index).ok_or(DriverError::Unsupported { what: WHAT })?;
        self.api.send(&requests::update_drive(id, file))
    }

    fn limit(&self, bandwidth: Bandwidth) -> Result<(), DriverError> {
        self.api.send(&requests::limit(bandwidth))
    }

    fn ending(&self, status: ExitStatus) -> String {
        ending(status)
    }
}

/// Describes an exit status of firecracker. It does not tell how the guest ended: the status is 0 whenever the guest ended its
/// machine, orderly or not.
fn ending(status: ExitStatus) -> String {
    let meaning = match status.code() {
        Some(0) => return "the guest ended its machine".to_owned(),
        Some(1) => "an error of KVM, or a triple fault of the guest",
        Some(148) => "a system call forbidden by its seccomp filter",
        Some(134 | 152) => "an invalid configuration",
        Some(153) => "an unknown command-line option",
        _ => return ended_with(WHAT, status),
    };
    format!("{} ({meaning})", ended_with(WHAT, status))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;

    #[test]
    fn exits_have_meanings() {
        let exit = |code: i32| ending(ExitStatus::from_raw(code << 8));
        assert_eq!(exit(0), "the guest ended its machine");
        assert_eq!(
            exit(1),
            "firecracker exited with status 1 (an error of KVM, or a triple fault of the guest)"
        );
        assert_eq!(exit(153), "firecracker exited with status 153 (an unknown command-line option)");
        assert_eq!(exit(77), "firecracker exited with status 77");
        assert_eq!(ending(ExitStatus::from_raw(6)), "firecracker was killed by SIGABRT");
    }

    #[test]
    fn the_log_is_a_pipe_that_replaces_what_was_there() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        for _ in 0..2 {
            let pipe = make_log_pipe(&path).unwrap();
            assert_eq!(rustix::fs::fstat(&pipe).unwrap().st_mode & 0o170_777, 0o010_600);
        }
    }
}
