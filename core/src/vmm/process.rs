//! Starting processes: shims, VMMs under them, and VMM binaries that are only asked for their version.

use std::ffi::OsString;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Resource, Rlimit, Signal};

use crate::os::confine::Walls;
use crate::os::process::ProcessHandle;

/// A program with its arguments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CommandLine {
    pub program: PathBuf,
    pub arguments: Vec<OsString>,
}

/// A live VMM, child of this process.
#[derive(Debug)]
pub(crate) struct VmmProcess {
    child: Child,
    handle: ProcessHandle,
    /// The other end is the VMM's stdin.
    _lifeline: Option<OwnedFd>,
}

/// The reading ends of what a VMM writes.
pub(crate) struct Outputs {
    pub stdout: ChildStdout,
    pub stderr: ChildStderr,
}

/// The number under which a VMM finds the one descriptor that it is given beside stdin, stdout and stderr.
pub(crate) const PASSED_FD: i32 = 3;

impl VmmProcess {
    /// Starts a VMM that dies with the calling **thread**: call it where that is the process's main thread.
    ///
    /// The kernel forgets that when the VMM changes its user (commit_creds() in the kernel's cred.c). With `lifeline`, the VMM's
    /// stdin is a pipe that only this process holds the other end of, and whose closing sends SIGKILL (F_SETSIG); who may
    /// send it was settled before the change. `walls` are put around it last.
    pub(crate) fn spawn(
        line: &CommandLine,
        passed: Option<OwnedFd>,
        lifeline: bool,
        walls: Option<Walls>,
    ) -> io::Result<(Self, Outputs)> {
        let (stdin, held) = if lifeline {
            let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
            (Stdio::from(reader), Some(writer))
        } else {
            (Stdio::null(), None)
        };
        let mut command = Command::new(&line.program);
        command
            .args(&line.arguments)
            .stdin(stdin)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        let parent = rustix::process::getpid();
        let passed_raw = passed.as_ref().map(AsRawFd::as_raw_fd);
        // SAFETY: between fork and exec only system calls are made; nothing is allocated or locked.
        unsafe {
            command.pre_exec(move || {
                become_vmm(parent, passed_raw, lifeline)?;
                walls.as_ref().map_or(Ok(()), Walls::apply)
            });
        }
        let mut child = command.spawn()?;
        let (Some(stdout), Some(stderr)) = (child.stdout.take(), child.stderr.take()) else {
            return Err(io::Error::other("a piped child without pipes"));
        };
        let handle = match ProcessHandle::of_child(&child) {
            Ok(handle) => handle,
            Err(e) => {
                child.kill()?;
                child.wait()?;
                return Err(e);
            }
        };
        Ok((Self { child, handle, _lifeline: held }, Outputs { stdout, stderr }))
    }

    pub(crate) fn handle(&self) -> &ProcessHandle {
        &self.handle
    }

    /// Waits for the end and reaps.
    pub(crate) fn reap(&mut self) -> io::Result<ExitStatus> {
        self.child.wait()
    }
}

/// Runs in the child before exec.
fn become_vmm(parent: Pid, passed: Option<i32>, lifeline: bool) -> io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    if lifeline {
        die_with_stdin()?;
    }
    if rustix::process::getppid() != Some(parent) {
        // The parent died before the line above: nobody would ever send the signal.
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    // A shim takes its signals in another way; its VMM shall be reached by them.
    nix::sys::signal::SigSet::empty().thread_set_mask()?;
    // A core file of a VMM would be as large as its guest's memory.
    rustix::process::setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
    reset_oom_score();
    // SAFETY: a plain system call; it closes nothing before exec. Where the kernel does not know it, what this process opened
    // itself is closed on exec all the same.
    unsafe {
        libc::syscall(libc::SYS_close_range, PASSED_FD, u32::MAX, libc::CLOSE_RANGE_CLOEXEC);
    }
    if let Some(raw) = passed {
        // SAFETY: plain system calls on descriptor numbers; `PASSED_FD` is not in use in this child by anything that
        // outlives exec.
        let result = unsafe {
            if raw == PASSED_FD { libc::fcntl(raw, libc::F_SETFD, 0) } else { libc::dup2(raw, PASSED_FD) }
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Has the kernel send SIGKILL to this process when the other end of its stdin is closed.
fn die_with_stdin() -> io::Result<()> {
    /// `F_SETSIG` of fcntl(2); not in libc for every target.
    const F_SETSIG: i32 = 10;
    // SAFETY: plain system calls on the descriptor of stdin.
    unsafe {
        for (operation, argument) in
            [(libc::F_SETOWN, libc::getpid()), (F_SETSIG, libc::SIGKILL), (libc::F_SETFL, libc::O_ASYNC)]
        {
            if libc::fcntl(libc::STDIN_FILENO, operation, argument) < 0 {
                return Err(io::Error::last_os_error());
            }
        }
    }
    Ok(())
}

/// A shim may be protected from the OOM killer; its VMM shall be the one to go.
fn reset_oom_score() {
    use rustix::fs::{Mode, OFlags, open};
    if let Ok(file) = open(c"/proc/self/oom_score_adj", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()) {
        // Raising it is always allowed; where it fails all the same, the score stays as it was.
        let _ = rustix::io::write(&file, b"0");
    }
}

/// Makes this process a shim: a session of its own, none of the launcher's descriptors beside stdin, stdout and stderr,
/// files for its owner only.
pub(crate) fn become_shim() {
    // Fails only where it leads a session already.
    let _ = rustix::process::setsid();
    rustix::process::umask(rustix::fs::Mode::RWXG | rustix::fs::Mode::RWXO);
    // SAFETY: called first thing in a process of its own: nothing here owns a descriptor above stderr yet.
    unsafe {
        libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, 0u32);
    }
    // Where it may not be lowered, it stays as inherited.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-250");
    // What a VMM leaves behind becomes this process's child, and is ended with it.
    let _ = rustix::process::set_child_subreaper(Some(rustix::process::getpid()));
    // A name in `ps`; the binary was started by descriptor number.
    let _ = rustix::thread::set_name(c"nexus-shim");
}

/// Ends and reaps every child that is left of this process.
pub(crate) fn end_children() {
    // Each round ends the children of those that the round before ended.
    for _ in 0..64 {
        let children = children();
        if children.is_empty() {
            break;
        }
        for pid in children {
            let _ = rustix::process::kill_process(pid, Signal::KILL);
            let _ = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty());
        }
    }
}

fn children() -> Vec<Pid> {
    let tasks = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    let pids = lists.flat_map(|list| {
        list.split_ascii_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<i32>>()
    });
    pids.filter_map(Pid::from_raw).collect()
}

/// Starts a shim from an open descriptor of its binary, so that an upgrade of the file does not matter. Its stdout is a
/// pipe on which it reports once; its stderr is `log`.
pub(crate) fn spawn_shim(binary: &Path, directory: &Path, log: std::fs::File) -> io::Result<Child> {
    let binary = std::fs::File::open(binary)?;
    // The child has the descriptor until exec, which is done by then.
    Command::new(format!("/proc/self/fd/{}", binary.as_fd().as_raw_fd()))
        .arg0("nexusd")
        .arg("vm-shim")
        .arg(directory)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
}

/// What a program printed that was asked for something quick.
#[derive(Debug)]
pub(crate) struct Printed {
    pub status: ExitStatus,
    /// The start of stdout and stderr.
    pub text: String,
}

/// Runs a program that shall answer at once, such as `qemu-system-x86_64 --version`; ends it at the deadline.
pub(crate) fn ask(program: &Path, arguments: &[&str], timeout: Duration) -> io::Result<Printed> {
    const PRINTED_MAX: u64 = 16 << 10;
    let deadline = Instant::now() + timeout;
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let handle = ProcessHandle::of_child(&child)?;
    // What it prints fits in a pipe; one that prints more blocks, and is ended at the deadline.
    let in_time = handle.wait_ended(deadline.saturating_duration_since(Instant::now()))?;
    if !in_time {
        handle.kill()?;
    }
    let status = child.wait()?;
    if !in_time {
        return Err(io::Error::new(
            io::ErrorKind::TimedOut,
            format!("no answer within {} s", timeout.as_secs()),
        ));
    }
    let mut text = Vec::new();
    // A grandchild may hold the pipe open: what is there is read, nothing is waited for.
    if let Some(pipe) = stdout {
        read_available(pipe, PRINTED_MAX, &mut text)?;
    }
    if let Some(pipe) = stderr {
        read_available(pipe, PRINTED_MAX, &mut text)?;
    }
    Ok(Printed { status, text: String::from_utf8_lossy(&text).into_owned() })
}

fn read_available(pipe: impl Read + AsFd, max: u64, into: &mut Vec<u8>) -> io::Result<()> {
    set_nonblocking(&pipe)?;
    match pipe.take(max).read_to_end(into) {
        Err(e) if e.kind() != io::ErrorKind::WouldBlock => Err(e),
        _ => Ok(()),
    }
}

/// Makes reads and writes of a descriptor return at once.
pub(crate) fn set_nonblocking(fd: impl AsFd) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(&fd)?;
    Ok(rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> CommandLine {
        CommandLine { program: "/bin/sh".into(), arguments: vec!["-c".into(), script.into()] }
    }

    #[test]
    fn a_vmm_gets_one_descriptor_and_no_other() {
        let (ours, theirs) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let (mut vmm, mut outputs) = VmmProcess::spawn(
            &shell("echo passed >&3; ls /proc/self/fd; ulimit -c"),
            Some(theirs),
            false,
            None,
        )
        .unwrap();
        let mut text = String::new();
        outputs.stdout.read_to_string(&mut text).unwrap();
        let mut passed = String::new();
        std::fs::File::from(ours).read_to_string(&mut passed).unwrap();
        assert_eq!(passed, "passed\n");
        // 4 is the directory that `ls` itself reads.
        assert_eq!(text.split_whitespace().collect::<Vec<_>>(), ["0", "1", "2", "3", "4", "0"]);
        assert!(vmm.reap().unwrap().success());
    }

    #[test]
    fn a_vmm_that_ends_at_once_is_still_reaped_with_its_status() {
        for _ in 0..20 {
            let (mut vmm, _outputs) = VmmProcess::spawn(&shell("exit 7"), None, false, None).unwrap();
            assert!(vmm.handle().wait_ended(Duration::from_secs(20)).unwrap());
            assert_eq!(vmm.reap().unwrap().code(), Some(7));
        }
    }

    #[test]
    fn asking_is_bounded_in_time_and_size() {
        let sh = Path::new("/bin/sh");
        let printed = ask(sh, &["-c", "echo out; echo err >&2; exit 3"], Duration::from_secs(20)).unwrap();
        assert_eq!((printed.text.as_str(), printed.status.code()), ("out\nerr\n", Some(3)));
        let slow = ask(sh, &["-c", "exec sleep 1000"], Duration::from_millis(50)).unwrap_err();
        assert_eq!(slow.kind(), io::ErrorKind::TimedOut);
        let endless = ask(sh, &["-c", "exec cat /dev/zero"], Duration::from_millis(200)).unwrap_err();
        assert_eq!(endless.kind(), io::ErrorKind::TimedOut);
    }
}
