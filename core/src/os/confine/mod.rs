//! Confines a child process: takes rights away from it between fork and exec.
//!
//! A [`Confinement`] describes the restrictions of a program. [`Confinement::prepare`] builds and checks everything that
//! needs memory or files before the fork. [`Walls::apply`] only makes system calls, so it may run in `pre_exec`.
//!
//! ```text
//! Confinement ── prepare ──> Walls ── fork ── apply: namespaces, root directory, limits, user, capabilities,
//!                                                    no_new_privs, Landlock, seccomp ── exec
//! ```
//! A restriction that the kernel or the daemon's rights do not allow is left out if another one covers it: namespaces without
//! `CAP_SYS_ADMIN` (seccomp also refuses network sockets), Landlock on kernels before 5.13. Any other failure fails the start.

mod files;
mod identity;
mod profile;
pub(crate) mod program;
mod syscalls;
#[cfg(test)]
mod tests;

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use nix::sched::{CloneFlags, unshare};
use rustix::process::{Resource, Rlimit};
pub(crate) use rustix::thread::CapabilitySet;

pub(crate) use self::files::{Access, Files, landlock_abi};
pub(crate) use self::identity::{NOBODY, User};
pub(crate) use self::profile::{VmmFiles, is_root, shim, tools, vmm};
pub(crate) use self::syscalls::Syscalls;

/// The restrictions of a child process. The default only prevents it from gaining privileges by exec (`no_new_privs`).
#[derive(Debug, Clone)]
pub(crate) struct Confinement {
    /// New, empty namespaces of these kinds, if this process may make them.
    pub namespaces: CloneFlags,
    /// The directory that becomes its root and working directory. Requires root.
    pub root: Option<PathBuf>,
    /// The user and group that it becomes, without supplementary groups. Requires root.
    pub user: Option<User>,
    /// The capabilities that it keeps, in all sets; `None` keeps all.
    pub capabilities: Option<CapabilitySet>,
    /// Resource limits, soft and hard; lower existing limits stay.
    pub limits: Vec<(Resource, u64)>,
    /// The files that it may open, by Landlock; `None` allows everything that its user may open.
    pub files: Option<Files>,
    /// The system calls that it may make.
    pub syscalls: Syscalls,
}

impl Default for Confinement {
    fn default() -> Self {
        Self {
            namespaces: CloneFlags::empty(),
            root: None,
            user: None,
            capabilities: None,
            limits: Vec::new(),
            files: None,
            syscalls: Syscalls::All,
        }
    }
}

/// Why the restrictions could not be built.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfineError {
    /// A file that the program needs cannot be opened.
    #[error("allow a confined program to use {path}")]
    File {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// Landlock refused the rules.
    #[error("limit a program's files with Landlock")]
    Landlock {
        #[source]
        source: landlock::RulesetError,
    },
    /// There is no system call filter for this architecture.
    #[error("build a system call filter")]
    Syscalls {
        #[source]
        source: seccompiler::BackendError,
    },
    /// The root directory's path contains a NUL byte.
    #[error("the path of the root directory {path} contains a NUL byte")]
    Root { path: PathBuf },
}

impl From<ConfineError> for io::Error {
    fn from(error: ConfineError) -> Self {
        Self::other(error)
    }
}

/// Restrictions that are ready to be applied to the child.
#[derive(Debug)]
pub(crate) struct Walls {
    namespaces: CloneFlags,
    root: Option<CString>,
    user: Option<User>,
    capabilities: Option<CapabilitySet>,
    limits: Vec<(Resource, u64)>,
    files: Option<files::Ruleset>,
    syscalls: syscalls::Filters,
}

impl Confinement {
    /// Builds the restrictions. Opens files; blocks for some microseconds.
    pub(crate) fn prepare(&self) -> Result<Walls, ConfineError> {
        let zero_byte = |path: &PathBuf| {
            CString::new(path.clone().into_os_string().into_vec())
                .map_err(|_| ConfineError::Root { path: path.clone() })
        };
        Ok(Walls {
            namespaces: self.namespaces,
            root: self.root.as_ref().map(zero_byte).transpose()?,
            user: self.user,
            capabilities: self.capabilities,
            limits: self.limits.clone(),
            files: self.files.as_ref().map(Files::prepare).transpose()?.flatten(),
            syscalls: self.syscalls.filters()?,
        })
    }
}

impl Walls {
    /// Applies these restrictions to the calling thread, and to the program that it executes, permanently. Makes system calls
    /// only. Restores the parent-death signal, which the kernel clears when the user changes.
    ///
    /// # Errors
    /// The kernel's error for the first restriction that fails.
    pub(crate) fn apply(&self) -> io::Result<()> {
        let death = rustix::process::parent_process_death_signal()?;
        for kind in self.namespaces {
            match unshare(kind) {
                // Not allowed, not supported by this kernel, or too many of them.
                Ok(()) | Err(nix::Error::EPERM | nix::Error::EINVAL | nix::Error::ENOSPC) => {}
                Err(error) => return Err(error.into()),
            }
        }
        if let Some(files) = &self.files {
            files.allow_own_mounts()?;
        }
        if let Some(root) = &self.root {
            rustix::process::chroot(root.as_c_str())?;
            rustix::process::chdir(c"/")?;
        }
        for (resource, most) in &self.limits {
            let now = rustix::process::getrlimit(*resource);
            let least = |limit: Option<u64>| Some(limit.map_or(*most, |limit| limit.min(*most)));
            let limit = Rlimit { current: least(now.current), maximum: least(now.maximum) };
            rustix::process::setrlimit(*resource, limit)?;
        }
        if let Some(keep) = self.capabilities {
            identity::drop_bounding(keep)?;
        }
        if let Some(user) = self.user {
            user.become_it()?;
        }
        if let Some(keep) = self.capabilities {
            identity::keep_only(keep)?;
        }
        rustix::process::set_parent_process_death_signal(death)?;
        rustix::thread::set_no_new_privs(true)?;
        if let Some(files) = &self.files {
            files.apply()?;
        }
        self.syscalls.apply()
    }
}
