//! Restricts the system calls of a process, by seccomp.
//!
//! Filesystem tools get an allow list, VMMs a deny list: QEMU's calls vary with its version, libraries and accelerator, and it
//! adds a filter of its own (`-sandbox`).

use std::collections::BTreeMap;
use std::io;
use std::sync::OnceLock;

use libc::c_long;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, sock_filter,
};

use super::ConfineError;

/// Which system calls a process may make.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Syscalls {
    /// All of them.
    #[default]
    All,
    /// Those of a program that works on one file: no sockets, no other processes, no change of privileges.
    Tool,
    /// All except those that extend what a process can reach: mounts, namespaces, kernel modules, tracing, keys, io_uring,
    /// network sockets, connections to other programs. Unix sockets that others connect to, and executing other programs, are allowed.
    Vmm,
    /// As [`Syscalls::Vmm`], for VMMs that connect to sockets of the host for their guests.
    DiallingVmm,
    /// As [`Syscalls::DiallingVmm`], but without executing other programs, and with the name and the children that it has: by these, sockets tell what
    /// belongs to a VM.
    Shim,
}

/// The error for calls that C libraries should take as missing from an older kernel.
const UNKNOWN: u32 = libc::ENOSYS as u32;
const REFUSED: u32 = libc::EPERM as u32;

/// `TIOCSTI` and `TIOCLINUX` of asm-generic/ioctls.h; their type in libc differs between C libraries.
const TIOCSTI: u64 = 0x5412;
const TIOCLINUX: u64 = 0x541c;

/// The calls of a tool on all architectures: memory, its files, itself, its threads.
const TOOL: &[c_long] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_openat,
    libc::SYS_close,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_statfs,
    libc::SYS_fstatfs,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_readlinkat,
    libc::SYS_getxattr,
    libc::SYS_lgetxattr,
    libc::SYS_fgetxattr,
    libc::SYS_listxattr,
    libc::SYS_llistxattr,
    libc::SYS_flistxattr,
    libc::SYS_getdents64,
    libc::SYS_getcwd,
    libc::SYS_lseek,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_sync_file_range,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_fadvise64,
    libc::SYS_flock,
    libc::SYS_fcntl,
    libc::SYS_ioctl,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_umask,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_getrandom,
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_setitimer,
    libc::SYS_uname,
    libc::SYS_sysinfo,
    libc::SYS_getrusage,
    libc::SYS_prlimit64,
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_gettid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_getresuid,
    libc::SYS_getresgid,
    libc::SYS_prctl,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_tgkill,
    libc::SYS_restart_syscall,
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_set_tid_address,
    libc::SYS_rseq,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_execve,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// The calls that exist only on this architecture.
#[cfg(target_arch = "x86_64")]
const TOOL_HERE: &[c_long] = &[
    libc::SYS_open,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_access,
    libc::SYS_readlink,
    libc::SYS_getdents,
    libc::SYS_dup2,
    libc::SYS_time,
    libc::SYS_getrlimit,
    libc::SYS_arch_prctl,
];
#[cfg(not(target_arch = "x86_64"))]
const TOOL_HERE: &[c_long] = &[];

/// The calls that no VMM needs.
const NOT_VMM: &[c_long] = &[
    // Mounts.
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_quotactl,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    // Namespaces.
    libc::SYS_unshare,
    libc::SYS_setns,
    // The kernel itself.
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_syslog,
    libc::SYS_reboot,
    libc::SYS_acct,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    libc::SYS_fanotify_init,
    libc::SYS_lookup_dcookie,
    libc::SYS_nfsservctl,
    libc::SYS_vhangup,
    // Other processes. Sockets tell those of a VM by the session that its shim leads.
    libc::SYS_setsid,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    // Keys.
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    // Opening files by handle, and parts of the kernel with known exploited bugs.
    libc::SYS_name_to_handle_at,
    libc::SYS_open_by_handle_at,
    libc::SYS_userfaultfd,
    libc::SYS_personality,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
];

#[cfg(target_arch = "x86_64")]
const NOT_VMM_HERE: &[c_long] = &[
    libc::SYS_kexec_file_load,
    libc::SYS_iopl,
    libc::SYS_ioperm,
    libc::SYS_modify_ldt,
    libc::SYS_uselib,
    libc::SYS_ustat,
    libc::SYS_sysfs,
    libc::SYS__sysctl,
];
#[cfg(not(target_arch = "x86_64"))]
const NOT_VMM_HERE: &[c_long] = &[];

/// Requests that change the host's end of a network device, which the kernel lets everybody make who has the device open: its hardware address,
/// which could be another VM's, and who owns it. `SIOCSIFHWADDR` of linux/sockios.h; TUNSETDEBUG, TUNSETPERSIST, TUNSETOWNER, TUNSETLINK,
/// TUNSETGROUP, TUNATTACHFILTER, TUNDETACHFILTER, TUNSETSTEERINGEBPF, TUNSETFILTEREBPF and TUNSETCARRIER of linux/if_tun.h.
const OF_DEVICES: [u64; 11] = [
    0x8924,
    0x4004_54c9,
    0x4004_54cb,
    0x4004_54cc,
    0x4004_54cd,
    0x4004_54ce,
    0x4010_54d5,
    0x4010_54d6,
    0x8004_54e0,
    0x8004_54e1,
    0x4004_54e2,
];

/// The kinds of namespace that clone(2) makes.
const NAMESPACES: [i32; 7] = [
    libc::CLONE_NEWNS,
    libc::CLONE_NEWCGROUP,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWNET,
];

/// What a shim may not do to itself by prctl(2): change its name, or no longer be the parent of orphans below it.
const NOT_ITSELF: [i32; 3] = [libc::PR_SET_NAME, libc::PR_SET_MM, libc::PR_SET_CHILD_SUBREAPER];

/// Compiled filters; all of them apply.
#[derive(Debug)]
pub(super) struct Filters(&'static [BpfProgram]);

impl Syscalls {
    /// The filters, compiled once per process.
    pub(super) fn filters(self) -> Result<Filters, ConfineError> {
        static COMPILED: [OnceLock<Vec<BpfProgram>>; 5] = [const { OnceLock::new() }; 5];
        let place = &COMPILED[self as usize];
        if let Some(there) = place.get() {
            return Ok(Filters(there));
        }
        let compiled = self.compile().map_err(|source| ConfineError::Syscalls { source })?;
        Ok(Filters(place.get_or_init(|| compiled)))
    }

    fn compile(self) -> Result<Vec<BpfProgram>, BackendError> {
        match self {
            Self::All => Ok(Vec::new()),
            Self::Tool => tool(),
            Self::Vmm => vmm(NOT_VMM.iter().chain(NOT_VMM_HERE).copied().chain([libc::SYS_connect]), &[]),
            Self::DiallingVmm => vmm(NOT_VMM.iter().chain(NOT_VMM_HERE).copied(), &[]),
            Self::Shim => {
                let programs = [libc::SYS_execve, libc::SYS_execveat];
                vmm(NOT_VMM.iter().chain(NOT_VMM_HERE).copied().chain(programs), &NOT_ITSELF)
            }
        }
    }

    /// Applies the filter to all threads of this process. Sets `no_new_privs` on each of them, which it requires.
    pub(crate) fn apply_to_all_threads(self) -> io::Result<()> {
        for filter in self.filters()?.0 {
            seccompiler::apply_filter_all_threads(filter).map_err(io::Error::other)?;
        }
        Ok(())
    }
}

impl Filters {
    /// Applies to the calling thread and the program that it executes. Makes system calls only.
    pub(super) fn apply(&self) -> io::Result<()> {
        for filter in self.0 {
            match seccompiler::apply_filter(filter) {
                Ok(()) => {}
                Err(seccompiler::Error::Prctl(error) | seccompiler::Error::Seccomp(error)) => {
                    return Err(error);
                }
                Err(_) => return Err(io::Error::from_raw_os_error(libc::EINVAL)),
            }
        }
        Ok(())
    }
}

fn tool() -> Result<Vec<BpfProgram>, BackendError> {
    let mut rules: BTreeMap<_, _> = TOOL.iter().chain(TOOL_HERE).map(|call| (*call, Vec::new())).collect();
    // Threads, but no processes. C libraries prefer clone3, whose flags are in memory where a filter cannot see them.
    rules.insert(libc::SYS_clone, vec![SeccompRule::new(vec![has_bit(0, libc::CLONE_THREAD)?])?]);
    Ok(vec![compiled(rules, SeccompAction::Errno(UNKNOWN), SeccompAction::Allow)?])
}

/// A deny list; of prctl(2) it has these options.
fn vmm(refused: impl Iterator<Item = c_long>, options: &[i32]) -> Result<Vec<BpfProgram>, BackendError> {
    let mut rules: BTreeMap<_, _> = refused.map(|call| (call, Vec::new())).collect();
    let namespaces = NAMESPACES.into_iter().map(|kind| SeccompRule::new(vec![has_bit(0, kind)?]));
    rules.insert(libc::SYS_clone, namespaces.collect::<Result<_, _>>()?);
    let not_unix = is(0, SeccompCmpOp::Ne, libc::AF_UNIX as u64)?;
    rules.insert(libc::SYS_socket, vec![SeccompRule::new(vec![not_unix])?]);
    if !options.is_empty() {
        let options = options.iter().map(|option| {
            SeccompRule::new(vec![is(0, SeccompCmpOp::Eq, u64::from(option.cast_unsigned()))?])
        });
        rules.insert(libc::SYS_prctl, options.collect::<Result<_, _>>()?);
    }
    // Injecting input into a terminal, and changing devices.
    let requests = [TIOCSTI, TIOCLINUX]
        .into_iter()
        .chain(OF_DEVICES)
        .map(|request| SeccompRule::new(vec![is(1, SeccompCmpOp::Eq, request)?]));
    rules.insert(libc::SYS_ioctl, requests.collect::<Result<_, _>>()?);
    let refused = compiled(rules, SeccompAction::Allow, SeccompAction::Errno(REFUSED))?;
    // A filter cannot see its flags, which are in memory; C libraries fall back to clone.
    let clone3 = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    Ok(vec![refused, compiled(clone3, SeccompAction::Allow, SeccompAction::Errno(UNKNOWN))?])
}

fn has_bit(argument: u8, bit: i32) -> Result<SeccompCondition, BackendError> {
    let bit = u64::from(bit.cast_unsigned());
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(bit), bit)
}

fn is(argument: u8, how: SeccompCmpOp, value: u64) -> Result<SeccompCondition, BackendError> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, how, value)
}

fn compiled(
    rules: BTreeMap<c_long, Vec<SeccompRule>>,
    others: SeccompAction,
    these: SeccompAction,
) -> Result<BpfProgram, BackendError> {
    let machine = TargetArch::try_from(std::env::consts::ARCH)?;
    let mut program = no_x32(machine);
    program.append(&mut SeccompFilter::new(rules, others, these, machine)?.try_into()?);
    Ok(program)
}

/// Refuses the second set of system call numbers on x86-64 (x32), which would bypass a list of numbers.
fn no_x32(machine: TargetArch) -> BpfProgram {
    if machine != TargetArch::x86_64 {
        return Vec::new();
    }
    // `BPF_LD | BPF_W | BPF_ABS`, `BPF_JMP | BPF_JGE | BPF_K` and `BPF_RET | BPF_K` of linux/bpf_common.h.
    let (load, at_least, give_back) = (0x20, 0x35, 0x06);
    /// `__X32_SYSCALL_BIT` of asm/unistd.h.
    const X32: u32 = 0x4000_0000;
    vec![
        sock_filter { code: load, jt: 0, jf: 0, k: 0 },
        sock_filter { code: at_least, jt: 0, jf: 1, k: X32 },
        sock_filter { code: give_back, jt: 0, jf: 0, k: SeccompAction::Errno(UNKNOWN).into() },
    ]
}
