//! The unsafe code of the guest, apart from its allocator: what a child does between fork and exec, what tokio watches, and a few ioctls.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::Command;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// The user and groups of a child process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Credentials {
    /// The user.
    pub(crate) uid: u32,
    /// The primary group.
    pub(crate) gid: u32,
    /// The supplementary groups.
    pub(crate) groups: Vec<u32>,
}

/// What a child process does between fork and exec.
#[derive(Debug, Default)]
pub(crate) struct ChildSetup {
    /// `cgroup.procs` of the cgroup that it enters.
    pub(crate) cgroup: Option<OwnedFd>,
    /// Whether the OOM killer may choose it again.
    pub(crate) reset_oom: bool,
    /// Its user; `None` keeps the parent's.
    pub(crate) credentials: Option<Credentials>,
    /// The directory that it starts in, entered with its own user's rights.
    pub(crate) directory: Option<OwnedFd>,
    /// Whether it dies with its parent.
    pub(crate) dies_with_parent: bool,
    /// A file that stays open across the exec, under its present number.
    pub(crate) kept: Option<OwnedFd>,
    /// Whether its standard input is a terminal that becomes its controlling terminal.
    pub(crate) terminal: bool,
    /// Its soft and hard limits of file descriptors; `None` keeps the parent's.
    pub(crate) descriptors: Option<(u64, u64)>,
}

/// Makes the child start its own session, and apply `setup` before it executes its program.
pub(crate) fn prepare_child(command: &mut Command, setup: ChildSetup) {
    use std::os::unix::process::CommandExt;

    let apply = move || {
        // SAFETY: only async-signal-safe system calls on plain integers and on memory that this closure owns.
        unsafe {
            libc::setsid();
            // An exec resets neither.
            let mut none = std::mem::zeroed();
            libc::sigemptyset(&mut none);
            libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut());
            libc::signal(libc::SIGPIPE, libc::SIG_DFL);
            if let Some(procs) = &setup.cgroup {
                // A command that cannot enter its cgroup runs anyway; it is then killed by its process group.
                libc::write(procs.as_raw_fd(), c"0".as_ptr().cast(), 1);
            }
            if setup.reset_oom {
                let file = libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
                if file >= 0 {
                    libc::write(file, c"0".as_ptr().cast(), 1);
                    libc::close(file);
                }
            }
            if let Some(file) = &setup.kept {
                libc::fcntl(file.as_raw_fd(), libc::F_SETFD, 0);
            }
            if setup.terminal {
                check(libc::ioctl(0, libc::TIOCSCTTY, 0).into())?;
            }
            if let Some(limits) = setup.descriptors {
                set_descriptors(limits);
            }
            if let Some(to) = &setup.credentials {
                give_streams(to, setup.terminal);
            }
            // Raw system calls: the C library's wrappers would signal all threads, and a forked child has only one.
            if let Some(to) = &setup.credentials {
                check(libc::syscall(libc::SYS_setgroups, to.groups.len(), to.groups.as_ptr()))?;
                check(libc::syscall(libc::SYS_setresgid, to.gid, to.gid, to.gid))?;
                check(libc::syscall(libc::SYS_setresuid, to.uid, to.uid, to.uid))?;
            }
            if let Some(directory) = &setup.directory {
                check(libc::fchdir(directory.as_raw_fd()).into())?;
            }
            if setup.dies_with_parent {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            }
        }
        Ok(())
    };
    // SAFETY: the closure allocates nothing, takes no lock, and makes only async-signal-safe system calls.
    unsafe {
        command.pre_exec(apply);
    }
}

/// Gives the child these soft and hard limits of file descriptors, and changes nothing else of it.
pub(crate) fn limit_descriptors(command: &mut Command, limits: (u64, u64)) {
    use std::os::unix::process::CommandExt;

    let apply = move || {
        set_descriptors(limits);
        Ok(())
    };
    // SAFETY: the closure allocates nothing, takes no lock, and makes only an async-signal-safe system call.
    unsafe {
        command.pre_exec(apply);
    }
}

/// Sets the soft and hard limits of file descriptors. A child whose limits cannot be set runs with its parent's.
fn set_descriptors((now, most): (u64, u64)) {
    let limit = libc::rlimit { rlim_cur: now, rlim_max: most };
    // SAFETY: the call reads one `rlimit` through its pointer and uses no other memory.
    unsafe {
        libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
    }
}

/// Makes a user the owner of the standard streams that are pipes, or the command's terminal, so that the user can open `/dev/stdout` and the like.
///
/// # Safety
/// Async-signal-safe: it makes only system calls on integers and on its own memory.
unsafe fn give_streams(to: &Credentials, terminal: bool) {
    for stream in 0..3 {
        // SAFETY: `fstat` writes one `stat`, which may be all zeros, and the calls use no other memory.
        unsafe {
            let mut stat: libc::stat = std::mem::zeroed();
            if libc::fstat(stream, &mut stat) != 0 {
                continue;
            }
            let kind = stat.st_mode & libc::S_IFMT;
            if kind == libc::S_IFIFO || (terminal && kind == libc::S_IFCHR) {
                // Without the new owner, the stream still works by its number.
                libc::fchown(stream, to.uid, to.gid);
            }
        }
    }
}

fn check(result: libc::c_long) -> std::io::Result<()> {
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

/// Registers a file with tokio.
pub(crate) fn watch(file: OwnedFd, interest: Interest) -> std::io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the descriptor stays open, and refers to the same file, as long as its owner lives.
    unsafe { AsyncFd::register_with_interest(file, interest) }.map_err(std::io::Error::from)
}

/// `EXT4_IOC_RESIZE_FS` of the kernel's fs/ext4/ext4.h: grows a mounted ext4 to this number of blocks.
pub(crate) fn resize_ext4(root: impl AsFd, blocks: u64) -> rustix::io::Result<()> {
    const EXT4_IOC_RESIZE_FS: rustix::ioctl::Opcode = rustix::ioctl::opcode::write::<u64>(b'f', 16);
    // SAFETY: this request reads one `__u64` through its pointer and writes nothing.
    unsafe { rustix::ioctl::ioctl(root, rustix::ioctl::Setter::<EXT4_IOC_RESIZE_FS, u64>::new(blocks)) }
}

/// `BLKRASET` of linux/fs.h: sets the read-ahead of a drive, in sectors of 512 bytes.
pub(crate) fn read_ahead(drive: impl AsFd, sectors: usize) -> rustix::io::Result<()> {
    const BLKRASET: rustix::ioctl::Opcode = rustix::ioctl::opcode::none(0x12, 98);
    // SAFETY: this request takes a number by value and does not use the process's memory.
    unsafe { rustix::ioctl::ioctl(drive, rustix::ioctl::IntegerSetter::<BLKRASET>::new_usize(sectors)) }
}

/// A seed of the kernel's generator of random numbers: `struct rand_pool_info` of linux/random.h, with 32 bytes.
#[repr(C)]
struct RandomSeed {
    entropy_bits: i32,
    bytes: i32,
    seed: [u8; 32],
}

/// `RNDADDENTROPY` and `RNDRESEEDCRNG` of linux/random.h: mixes in a seed, and has all later random numbers depend on it at once.
pub(crate) fn reseed(random: impl AsFd, seed: [u8; 32]) -> rustix::io::Result<()> {
    const RNDADDENTROPY: rustix::ioctl::Opcode = rustix::ioctl::opcode::write::<[i32; 2]>(b'R', 3);
    const RNDRESEEDCRNG: rustix::ioctl::Opcode = rustix::ioctl::opcode::none(b'R', 7);
    let info = RandomSeed { entropy_bits: 256, bytes: 32, seed };
    // SAFETY: this request reads a header of two numbers through its pointer and then as many bytes as the second says: all of `info`.
    unsafe { rustix::ioctl::ioctl(&random, rustix::ioctl::Setter::<RNDADDENTROPY, RandomSeed>::new(info)) }?;
    // SAFETY: this request takes nothing.
    unsafe { rustix::ioctl::ioctl(&random, rustix::ioctl::NoArg::<RNDRESEEDCRNG>::new()) }
}
