//! Starting of processes: shims, VMMs under them, and short queries such as `--version` of a VMM's binary.

use std::ffi::{CStr, OsString};
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

/// A running VMM, child of this process.
#[derive(Debug)]
pub(crate) struct VmmProcess {
    child: Child,
    handle: ProcessHandle,
    /// Pipe whose other end is the VMM's stdin.
    _lifeline: Option<OwnedFd>,
}

/// The reading ends of a VMM's output pipes.
pub(crate) struct Outputs {
    pub stdout: ChildStdout,
    pub stderr: ChildStderr,
}

/// Number of the first descriptor that is passed to a VMM in addition to stdin, stdout and stderr; the others follow.
pub(crate) const PASSED_FD: i32 = 3;

impl VmmProcess {
    /// Starts a VMM that dies with the calling **thread**. Call it from the process's main thread.
    ///
    /// The kernel resets this setting when the VMM changes its user (commit_creds() in the kernel's cred.c). With `lifeline`, the VMM's
    /// stdin is a pipe whose other end only this process holds, and whose closing sends SIGKILL (F_SETSIG); the permission to
    /// send it was checked before the change. `walls` are applied last.
    pub(crate) fn spawn(
        line: &CommandLine,
        passed: Vec<OwnedFd>,
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
        // Move the descriptors above the numbers that they get in the child.
        let aside = PASSED_FD + i32::try_from(passed.len()).unwrap_or(i32::MAX - PASSED_FD);
        let passed: Vec<OwnedFd> = passed
            .into_iter()
            .map(|fd| rustix::io::fcntl_dupfd_cloexec(fd, aside))
            .collect::<Result<_, _>>()?;
        // SAFETY: between fork and exec only system calls are made; nothing is allocated or locked.
        unsafe {
            command.pre_exec(move || {
                become_vmm(parent, &passed, lifeline)?;
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

    /// Waits for the end of the VMM and reaps it.
    pub(crate) fn reap(&mut self) -> io::Result<ExitStatus> {
        self.child.wait()
    }
}

/// Runs in the child before exec.
fn become_vmm(parent: Pid, passed: &[OwnedFd], lifeline: bool) -> io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    if lifeline {
        die_with_stdin()?;
    }
    if rustix::process::getppid() != Some(parent) {
        // The parent died before the line above, so the signal would never be sent.
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    // A shim blocks its signals and reads them from a descriptor; its VMM must receive them normally.
    nix::sys::signal::SigSet::empty().thread_set_mask()?;
    // No core dumps: one would be as large as the guest's memory.
    rustix::process::setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
    reset_oom_score();
    // SAFETY: a plain system call; it closes nothing before exec. If the kernel does not support it, the descriptors that this process
    // opened itself are closed on exec anyway.
    unsafe {
        libc::syscall(libc::SYS_close_range, PASSED_FD, u32::MAX, libc::CLOSE_RANGE_CLOEXEC);
    }
    for (number, fd) in (PASSED_FD..).zip(passed) {
        // SAFETY: a plain system call on descriptor numbers. It replaces no descriptor that this child still needs: those to be
        // passed have higher numbers.
        if unsafe { libc::dup2(fd.as_raw_fd(), number) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Makes the kernel send SIGKILL to this process when the other end of its stdin is closed.
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

/// Resets the OOM score: a shim may be protected from the OOM killer, but its VMM must not be.
fn reset_oom_score() {
    use rustix::fs::{Mode, OFlags, open};
    if let Ok(file) = open(c"/proc/self/oom_score_adj", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()) {
        // Raising the score is always allowed. If it fails anyway, the score stays unchanged.
        let _ = rustix::io::write(&file, b"0");
    }
}

/// Makes this process a shim: with its own session, without the launcher's descriptors except stdin, stdout and stderr,
/// and with a umask that makes new files accessible to their owner only.
pub(crate) fn become_shim() {
    // Fails only if this process is a session leader already.
    let _ = rustix::process::setsid();
    rustix::process::umask(rustix::fs::Mode::RWXG | rustix::fs::Mode::RWXO);
    // SAFETY: called at the very start of a separate process: nothing owns a descriptor above stderr yet.
    unsafe {
        libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, 0u32);
    }
    // Without the permission to lower it, the inherited score stays.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-250");
    // Orphaned children of a VMM become children of this process, which kills them at its end.
    let _ = rustix::process::set_child_subreaper(Some(rustix::process::getpid()));
    // A name for `ps`, as the binary was started by its descriptor number. Sockets refuse the children of a process with this name.
    let _ = rustix::thread::set_name(nexus_net_wire::peer::SHIM);
}

/// The name of a shim whose guest is an ordinary process of the host.
pub(super) const NAME_WITHOUT_VMM: &CStr = c"nexus-shim-proc";

/// Gives this shim another name: its guest is an ordinary process of the host, and may do what those do.
pub(crate) fn be_no_parent_of_vmms() {
    let _ = rustix::thread::set_name(NAME_WITHOUT_VMM);
}

/// Kills and reaps all remaining children of this process.
pub(crate) fn end_children() {
    // The children of a killed process become children of this one: the next round kills them.
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

/// Starts a shim from an open descriptor of its binary, so that a concurrent upgrade of the file does not matter. Its stdout is a
/// pipe for its one report; its stderr is `log`.
pub(crate) fn spawn_shim(binary: &Path, directory: &Path, log: std::fs::File) -> io::Result<Child> {
    let binary = std::fs::File::open(binary)?;
    // The child has the descriptor until exec, and spawning returns only after exec.
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

/// The output of a short query.
#[derive(Debug)]
pub(crate) struct Printed {
    pub status: ExitStatus,
    /// The start of stdout and stderr.
    pub text: String,
}

/// Runs a program that should end at once, such as `qemu-system-x86_64 --version`, and kills it at the deadline.
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
    // The expected output fits in a pipe; a program that prints more blocks, and is killed at the deadline.
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
    // A grandchild may hold the pipe open: read only what is available.
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

/// Makes a descriptor non-blocking.
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
    fn a_vmm_gets_its_descriptors_and_no_others() {
        let (ours, theirs) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let (mut vmm, mut outputs) = VmmProcess::spawn(
            &shell("echo passed >&3; echo too >&4; ls /proc/self/fd; ulimit -c"),
            vec![theirs.try_clone().unwrap(), theirs],
            false,
            None,
        )
        .unwrap();
        let mut text = String::new();
        outputs.stdout.read_to_string(&mut text).unwrap();
        let mut passed = String::new();
        std::fs::File::from(ours).read_to_string(&mut passed).unwrap();
        assert_eq!(passed, "passed\ntoo\n");
        // 5 is the directory that `ls` itself reads.
        assert_eq!(text.split_whitespace().collect::<Vec<_>>(), ["0", "1", "2", "3", "4", "5", "0"]);
        assert!(vmm.reap().unwrap().success());
    }

    #[test]
    fn a_vmm_that_ends_at_once_is_still_reaped_with_its_status() {
        for _ in 0..20 {
            let (mut vmm, _outputs) = VmmProcess::spawn(&shell("exit 7"), vec![], false, None).unwrap();
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
