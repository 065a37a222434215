//! Restricts the files that a process may open, by Landlock.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, PathBeneath, RulesetAttr, RulesetCreatedAttr, Scope,
};

use super::ConfineError;
use super::program::interpreter;
use crate::os::paths::{LIBRARIES, LOADER_FILES};

/// The newest version of the rules; older kernels apply those that they know.
const RULES: ABI = ABI::V7;

/// The allowed access to a file, or to everything below a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// Read, and list.
    Read,
    /// Read and execute.
    Execute,
    /// Read and write existing files, without making or removing any.
    Write,
    /// Read, write and control a device.
    Device,
    /// Make sockets and pipes in a directory, and use them; nothing else is read or written.
    Sockets,
    /// Everything except executing and controlling devices.
    Manage,
}

impl Access {
    fn rights(self) -> BitFlags<AccessFs> {
        let read = AccessFs::ReadFile | AccessFs::ReadDir;
        let write = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::Truncate;
        match self {
            Self::Read => read,
            Self::Execute => read | AccessFs::Execute,
            Self::Write => write,
            Self::Device => write | AccessFs::IoctlDev,
            Self::Sockets => AccessFs::MakeSock | AccessFs::MakeFifo,
            Self::Manage => AccessFs::from_all(RULES) & !(AccessFs::Execute | AccessFs::IoctlDev),
        }
    }
}

#[derive(Debug, Clone)]
enum Place {
    Path(PathBuf),
    Open(Arc<OwnedFd>),
}

#[derive(Debug, Clone)]
struct Rule {
    place: Place,
    access: Access,
    /// Whether the file may be missing.
    is_optional: bool,
}

/// The files that a program may use. Without rules it may use none.
#[derive(Debug, Clone, Default)]
pub(crate) struct Files {
    rules: Vec<Rule>,
    has_own_mounts: bool,
}

impl Files {
    /// Allows a file, or a directory with everything below it.
    pub(crate) fn allow(self, path: impl Into<PathBuf>, access: Access) -> Self {
        self.with(Rule { place: Place::Path(path.into()), access, is_optional: false })
    }

    /// The same, if it exists.
    pub(crate) fn allow_if_there(self, path: impl Into<PathBuf>, access: Access) -> Self {
        self.with(Rule { place: Place::Path(path.into()), access, is_optional: true })
    }

    /// Allows an open file, regardless of its path.
    pub(crate) fn allow_open(self, file: Arc<OwnedFd>, access: Access) -> Self {
        self.with(Rule { place: Place::Open(file), access, is_optional: false })
    }

    /// Allows a program to be executed with its interpreter, and the host's libraries to be read.
    pub(crate) fn program(mut self, program: &Path) -> Self {
        self = self.allow(program, Access::Execute);
        // The shell of a script needs a loader itself.
        let mut next = interpreter(program).ok().flatten();
        for _ in 0..3 {
            let Some(path) = next else { break };
            next = interpreter(&path).ok().flatten();
            self = self.allow_if_there(path, Access::Execute);
        }
        let libraries = LIBRARIES.into_iter().chain(LOADER_FILES);
        libraries.fold(self, |files, path| files.allow_if_there(path, Access::Read))
    }

    /// Allows the process to read the mounts that it sees.
    pub(crate) fn own_mounts(mut self) -> Self {
        self.has_own_mounts = true;
        self
    }

    fn with(mut self, rule: Rule) -> Self {
        self.rules.push(rule);
        self
    }

    /// Builds the rules; `None` if the kernel has no Landlock.
    pub(super) fn prepare(&self) -> Result<Option<Ruleset>, ConfineError> {
        let refused = |source| ConfineError::Landlock { source };
        let mut ruleset = landlock::Ruleset::default()
            .handle_access(AccessFs::from_all(RULES))
            .and_then(|ruleset| ruleset.handle_access(AccessNet::from_all(RULES)))
            .and_then(|ruleset| ruleset.scope(Scope::from_all(RULES)))
            .and_then(landlock::Ruleset::create)
            .map_err(refused)?;
        for rule in &self.rules {
            let opened;
            let (fd, path): (BorrowedFd<'_>, &Path) = match &rule.place {
                Place::Open(file) => (file.as_fd(), Path::new("an open file")),
                Place::Path(path) => match open(path) {
                    Ok(file) => {
                        opened = file;
                        (opened.as_fd(), path)
                    }
                    Err(error) if rule.is_optional && is_absent(&error) => continue,
                    Err(source) => return Err(ConfineError::File { path: path.clone(), source }),
                },
            };
            let stat = rustix::fs::fstat(fd)
                .map_err(|e| ConfineError::File { path: path.to_owned(), source: e.into() })?;
            let is_directory = rustix::fs::FileType::from_raw_mode(stat.st_mode).is_dir();
            let possible = if is_directory { BitFlags::all() } else { AccessFs::from_file(RULES) };
            let beneath = PathBeneath::new(fd, rule.access.rights() & possible);
            ruleset = ruleset.add_rule(beneath).map_err(refused)?;
        }
        let fd: Option<OwnedFd> = ruleset.into();
        Ok(fd.map(|fd| Ruleset { fd, has_own_mounts: self.has_own_mounts }))
    }
}

fn open(path: &Path) -> io::Result<OwnedFd> {
    use rustix::fs::{Mode, OFlags};
    Ok(rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?)
}

fn is_absent(error: &io::Error) -> bool {
    use io::ErrorKind::{NotADirectory, NotFound, PermissionDenied};
    matches!(error.kind(), NotFound | NotADirectory | PermissionDenied)
}

/// Rules loaded into the kernel.
#[derive(Debug)]
pub(super) struct Ruleset {
    fd: OwnedFd,
    has_own_mounts: bool,
}

/// `struct landlock_path_beneath_attr` of linux/landlock.h.
#[repr(C, packed)]
struct BeneathAttribute {
    allowed: u64,
    parent: i32,
}

/// `LANDLOCK_RULE_PATH_BENEATH` and `LANDLOCK_ACCESS_FS_READ_FILE` of linux/landlock.h.
const RULE_PATH_BENEATH: u32 = 1;
const READ_FILE: u64 = 1 << 2;

impl Ruleset {
    /// Runs in the child, because the file differs for each process. It stays open in the program: while it is open, the
    /// kernel keeps the inode that the rule refers to.
    pub(super) fn allow_own_mounts(&self) -> io::Result<()> {
        use rustix::fs::{Mode, OFlags, open};
        if !self.has_own_mounts {
            return Ok(());
        }
        let Ok(file) = open(c"/proc/self/mounts", OFlags::RDONLY, Mode::empty()) else { return Ok(()) };
        let attribute = BeneathAttribute { allowed: READ_FILE, parent: file.as_raw_fd() };
        // SAFETY: a plain system call; the kernel reads the attribute, which outlives the call.
        let result = unsafe {
            libc::syscall(
                libc::SYS_landlock_add_rule,
                self.fd.as_raw_fd(),
                RULE_PATH_BENEATH,
                &raw const attribute,
                0u32,
            )
        };
        std::mem::forget(file);
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Requires `no_new_privs`.
    pub(super) fn apply(&self) -> io::Result<()> {
        // SAFETY: a plain system call on a descriptor that this value holds.
        let result = unsafe { libc::syscall(libc::SYS_landlock_restrict_self, self.fd.as_raw_fd(), 0u32) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

/// The kernel's version of Landlock; `None` if it is missing or disabled.
pub(crate) fn landlock_abi() -> Option<u32> {
    /// `LANDLOCK_CREATE_RULESET_VERSION` of linux/landlock.h.
    const VERSION: u32 = 1;
    // SAFETY: a plain system call; with this flag it takes no attribute.
    let version = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<libc::c_void>(), 0usize, VERSION)
    };
    u32::try_from(version).ok().filter(|version| *version > 0)
}
