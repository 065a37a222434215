//! The shim process: the parent of one VMM.
//!
//! It survives the daemon's end, writes the console's log, answers on the control socket, and writes `exit.json` when the VMM has ended.
//! The VMM dies with it. It uses little memory on purpose: no runtime, and a few threads with small stacks.
//!
//! ```text
//! lock ─> job ─> logs ─> control socket ─> prepare ─> spawn ─> bring up ─> report ─> serve ─> reap ─> exit.json
//!                                             └────────┴─────────┴─ failed: kill, reap ──┘      (logs drained first)
//! ```

mod lease;
mod lock;
mod pause;
mod pump;
mod save;
mod serve;
mod stall;

pub(crate) use lock::{Holder, read_holder};

use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use self::lock::Lock;
use self::pause::Pauses;
use self::pump::Pump;
use super::control::{Job, Launched, Status, VmmInfo};
use super::driver::{self, DriverError, Machine};
use super::exit::{self, Exit};
use super::jail;
use super::log::{self, LogWriter};
use super::process::{self, VmmProcess};
use super::walls;
use super::wire::{self, WireError};
use crate::os::paths::vm_files;
use crate::os::socket::bind_in;
use nexus_schema::DriverKind;
use nexus_schema::error::chain;

/// Size at which the log of a VMM's stderr is rotated, in bytes. One rotated file is kept.
const VMM_LOG_BYTES: u64 = 256 << 10;
/// Timeout of a VMM to end by itself after a failed start, before it is killed.
const LEAVE: Duration = Duration::from_millis(500);

/// Runs a shim: `nexusd vm-shim DIR`. Reads `plan.json`, runs the VMM to its end and writes `exit.json`. Call it at the start of a
/// separate process, before anything opens files or starts threads.
pub fn shim_main(directory: &Path) -> ExitCode {
    process::become_shim();
    match run(directory) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&chain(&error));
            ExitCode::FAILURE
        }
    }
}

/// An error that ends a shim before it has a VMM.
#[derive(Debug, thiserror::Error)]
enum ShimError {
    #[error("enter the VM's directory")]
    Directory {
        #[source]
        source: io::Error,
    },
    #[error("another shim runs in this directory")]
    Locked,
    #[error("use {file} in the VM's directory")]
    File {
        file: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("read the plan")]
    Plan {
        #[source]
        source: WireError,
    },
    #[error("receive signals")]
    Signals {
        #[source]
        source: nix::Error,
    },
    #[error("confine this process")]
    Confine {
        #[source]
        source: io::Error,
    },
    #[error("start a thread")]
    Thread {
        #[source]
        source: io::Error,
    },
    #[error("read the start time of this process")]
    Myself {
        #[source]
        source: io::Error,
    },
}

/// Writes a line to the shim's own log.
fn say(line: &str) {
    // A failure cannot be reported anywhere.
    let _ = writeln!(io::stderr(), "{line}");
}

fn file(file: &'static str) -> impl Fn(io::Error) -> ShimError {
    move |source| ShimError::File { file, source }
}

/// The VM's directory. All paths are relative to it, since a Unix socket's path has at most 107 bytes.
const HERE: &str = ".";

fn run(directory: &Path) -> Result<(), ShimError> {
    std::env::set_current_dir(directory).map_err(|source| ShimError::Directory { source })?;
    let here = Path::new(HERE);
    let Some(lock) = Lock::take(here).map_err(file(vm_files::SHIM_LOCK))? else {
        return Err(ShimError::Locked);
    };
    let job = std::fs::read(vm_files::PLAN).map_err(file(vm_files::PLAN))?;
    let job = wire::read_job(&job).map_err(|source| ShimError::Plan { source })?;
    if job.plan.driver == DriverKind::Process {
        process::be_no_parent_of_vmms();
    }
    let confined = |source| ShimError::Confine { source };
    if let Some(lacking) = walls::confine_shim(&job).map_err(confined)? {
        say(lacking);
    }
    let signals = receive_signals()?;
    let control = bind_in(here, vm_files::SHIM).map_err(file(vm_files::SHIM))?;
    let mut shim = Live { job: &job, by_request: false };

    let exit = match shim.launch() {
        Ok((vmm, status)) => {
            if let Err(error) = walls::forbid_programs(&job, vmm.is_jailed) {
                say(&format!("cannot forbid this process to start programs: {error}"));
            }
            if report(&Launched::Running(status.clone())).is_err() {
                say("the daemon that launched this VM ended before the VM was up");
                shim.by_request = true;
                kill(&vmm.process);
            }
            let waiting = serve::serve(&vmm, &job.plan, &status, &control, &signals, &mut shim.by_request);
            let exit = vmm.end(shim.by_request);
            write_exit(here, &exit);
            waiting.answer(&exit);
            exit
        }
        Err(exit) => {
            write_exit(here, &exit);
            // If the daemon has ended, the next one reads exit.json.
            let _ = report(&Launched::Failed(exit.clone()));
            exit
        }
    };
    process::end_children();
    remove_sockets();
    say(&format!("{}: {}", job.plan.name, exit.message));
    drop(lock);
    Ok(())
}

/// A running VMM with its resources.
struct Vmm {
    process: VmmProcess,
    machine: Arc<dyn Machine>,
    /// Whether this process and its VMM run as the VM's user.
    is_jailed: bool,
    pumps: Vec<Pump>,
    pauses: Pauses,
}

impl Vmm {
    /// Reaps a VMM that has ended, and drains its output.
    fn end(mut self, by_request: bool) -> Exit {
        for pump in self.pumps {
            pump.finish();
        }
        match self.process.reap() {
            Ok(status) => Exit {
                machine: self.machine.end(),
                ..Exit::seen(status, by_request, self.machine.ending(status))
            },
            Err(error) => Exit {
                message: format!("the VMM ended, but its exit status is unknown: {error}"),
                ..Exit::lost()
            },
        }
    }
}

struct Live<'a> {
    job: &'a Job,
    by_request: bool,
}

impl Live<'_> {
    fn launch(&mut self) -> Result<(Vmm, Status), Exit> {
        let plan = &self.job.plan;
        let here = Path::new(HERE);
        let failed = |error: &dyn std::error::Error| Exit::never_ran(chain(error));

        if plan.restore.is_some() && !driver::facts(plan.driver).caps.checkpoint {
            let what = plan.driver.as_str();
            let why = "the driver does not support checkpoints; use qemu";
            return Err(failed(&DriverError::NoCheckpoints { what, action: "restore", why }));
        }
        let separator = format!("\n--- boot {} ---\n", plan.boot_id);
        let open = |name, limit| {
            let log = LogWriter::open(here, name, limit, &separator).map_err(|e| failed(&e))?;
            Ok(Arc::new(Mutex::new(log)))
        };
        let console = open(vm_files::CONSOLE, plan.console_bytes.as_bytes())?;
        let vmm_log = open(vm_files::VMM_LOG, VMM_LOG_BYTES)?;

        let prepared = (driver::facts(plan.driver).make)().prepare(self.job).map_err(|e| failed(&e))?;
        let walls = match &prepared.walls {
            Some(walls) => Some(walls.prepare()),
            None => walls::of_vmm(self.job).transpose(),
        };
        let walls = walls.transpose().map_err(|e| failed(&e))?;
        let spawned = VmmProcess::spawn(&prepared.command, prepared.passed, prepared.lifeline, walls);
        let (vmm, outputs) = spawned.map_err(|source| {
            failed(&SpawnError { program: prepared.command.program.display().to_string(), source })
        })?;
        let pumps = || {
            let mut pumps = vec![
                Pump::start("console", outputs.stdout, console)?,
                Pump::start("vmm-log", outputs.stderr, Arc::clone(&vmm_log))?,
            ];
            if let Some(pipe) = prepared.more_log {
                pumps.push(Pump::start("vmm-pipe", pipe, vmm_log)?);
            }
            Ok(pumps)
        };
        let pumps = pumps().map_err(|source| {
            kill(&vmm);
            failed(&ShimError::Thread { source })
        })?;

        if prepared.is_jailed
            && let Err(error) = jail::leave_root(plan)
        {
            return Err(give_up(vmm, pumps, &error));
        }
        let machine = match prepared.bring_up.bring_up(vmm.handle()) {
            Ok(machine) => machine,
            Err(error) => return Err(give_up(vmm, pumps, &error)),
        };
        let pauses = match Pauses::start(&machine, plan) {
            Ok(pauses) => pauses,
            Err(source) => return Err(give_up(vmm, pumps, &ShimError::Thread { source })),
        };
        let me = std::process::id();
        let mine = crate::os::process::stat(me).and_then(|s| s.ok_or_else(|| io::ErrorKind::NotFound.into()));
        let start_time = match mine {
            Ok(stat) => stat.start_time,
            Err(source) => return Err(give_up(vmm, pumps, &ShimError::Myself { source })),
        };
        let status = Status {
            protocol: wire::PROTOCOL,
            pid: me,
            start_time,
            vm: plan.vm,
            boot_id: plan.boot_id,
            vmm: VmmInfo { pid: vmm.handle().pid(), version: machine.version().to_owned() },
            vmm_start_time: vmm.handle().start_time(),
        };
        return Ok((Vmm { process: vmm, machine, is_jailed: prepared.is_jailed, pumps, pauses }, status));

        /// Ends a VMM that did not start. Returns how it ended, with the reason.
        fn give_up(mut vmm: VmmProcess, pumps: Vec<Pump>, error: &dyn std::error::Error) -> Exit {
            // Most often it has ended by itself; its exit status then says more than the broken connection.
            let ended_itself = matches!(vmm.handle().wait_ended(LEAVE), Ok(true));
            if !ended_itself {
                kill(&vmm);
            }
            for pump in pumps {
                pump.finish();
            }
            match vmm.reap() {
                Ok(status) if ended_itself => {
                    let said = log::tail(Path::new(HERE), vm_files::VMM_LOG, 512);
                    let said = String::from_utf8_lossy(&said);
                    let last = said.trim_end().lines().next_back().unwrap_or_default();
                    let colon = if last.is_empty() { "" } else { ": " };
                    let message = format!("it {} at once{colon}{last}", exit::describe(status));
                    Exit::seen(status, false, message)
                }
                Ok(status) => Exit::seen(status, false, chain(error)),
                Err(_) => Exit::never_ran(chain(error)),
            }
        }
    }
}

#[derive(Debug, thiserror::Error)]
#[error("start {program}")]
struct SpawnError {
    program: String,
    #[source]
    source: io::Error,
}

fn kill(vmm: &VmmProcess) {
    if let Err(error) = vmm.handle().kill() {
        say(&format!("cannot kill the VMM: {error}"));
    }
}

fn write_exit(here: &Path, exit: &Exit) {
    if let Err(error) = exit::write_exit(here, exit) {
        say(&format!("cannot write {}: {error}", vm_files::EXIT));
    }
}

/// Blocks the signals of a shim and returns a descriptor to read them from.
fn receive_signals() -> Result<SignalFd, ShimError> {
    let mut set = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT] {
        set.add(signal);
    }
    set.thread_block().map_err(|source| ShimError::Signals { source })?;
    SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
        .map_err(|source| ShimError::Signals { source })
}

/// Sends the report to the daemon that launched this shim, then closes the pipe to it.
fn report(launched: &Launched) -> io::Result<()> {
    let mut line = serde_json::to_vec(launched)?;
    line.push(b'\n');
    let launcher = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdout(), 3)?;
    let nowhere = fs_err::OpenOptions::new().write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdout(&nowhere)?;
    // One write is enough: the line is shorter than an atomic write to a pipe.
    rustix::io::write(&launcher, &line)?;
    Ok(())
}

/// Returns the names of the sockets and pipes that shim and VMM make, without those of the daemon.
pub(crate) fn sockets() -> impl Iterator<Item = &'static str> {
    let of_drivers = driver::DRIVERS.iter().flat_map(|driver| driver.sockets).copied();
    [vm_files::VSOCK, vm_files::SHIM].into_iter().chain(of_drivers)
}

fn remove_sockets() {
    for name in sockets() {
        match std::fs::remove_file(name) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                say(&format!("cannot remove {name}: {error}"))
            }
            _ => {}
        }
    }
}
