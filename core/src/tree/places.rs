//! Paths of the host that a client may use: below directories that the configuration allows, or in a folder of the client's
//! own. Nothing outside can be reached, not even through links.

use std::ffi::OsStr;
use std::fs::DirBuilder;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Component, Path, PathBuf};

use nexus_schema::{ErrorCode, ToolError};
use nexus_tree::{Source, TreeError};
use rustix::fs::{AtFlags, Gid, Mode, OFlags, ResolveFlags, Uid};
use rustix::io::Errno;

use super::on_host;

/// Resolution flags: neither `..` nor any link, including those of /proc, can lead out of the directory.
const BENEATH: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_MAGICLINKS);
/// Flags for opening a directory on the way.
const PASSAGE: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);
/// Flags for opening a directory to be read.
const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// The places of one client.
#[derive(Debug, Clone)]
pub(crate) struct Places {
    roots: Vec<Root>,
    /// The client's own folder, which is made on demand.
    pub(crate) scratch: PathBuf,
}

/// A directory that a client may use: one of the configuration, or one below it, which is reached without following links.
#[derive(Debug, Clone)]
struct Root {
    configured: PathBuf,
    below: PathBuf,
    path: PathBuf,
}

impl Root {
    fn of(path: &Path) -> Self {
        Self { configured: path.to_owned(), below: PathBuf::new(), path: path.to_owned() }
    }

    fn open(&self) -> Result<OwnedFd, Errno> {
        let root = rustix::fs::open(&self.configured, PASSAGE, Mode::empty())?;
        if self.below.as_os_str().is_empty() {
            return Ok(root);
        }
        rustix::fs::openat2(root, &self.below, PASSAGE, Mode::empty(), BENEATH | ResolveFlags::NO_SYMLINKS)
    }
}

/// A path of the host that a client may use.
#[derive(Debug)]
pub(crate) struct HostPath {
    root: OwnedFd,
    /// Relative to the root; empty for the root itself.
    below: PathBuf,
    /// The whole path.
    pub(crate) path: PathBuf,
    /// Whether it was given with a trailing slash.
    pub(crate) is_directory: bool,
}

impl Places {
    /// The places of a client that may use all configured directories.
    pub(crate) fn new(configured: &[PathBuf], scratch: PathBuf) -> Self {
        Self { roots: configured.iter().map(|path| Root::of(path)).collect(), scratch }
    }

    /// The places of a client that may use these directories only, as far as they are configured or below one that is.
    pub(crate) fn narrowed(configured: &[PathBuf], allowed: &[String], scratch: PathBuf) -> Self {
        let root = |path: &String| {
            let path = Path::new(path);
            let of = configured
                .iter()
                .filter(|root| path.starts_with(root))
                .max_by_key(|root| root.components().count())?;
            let below = path.strip_prefix(of).ok()?.to_owned();
            Some(Root { configured: of.clone(), below, path: path.to_owned() })
        };
        Self { roots: allowed.iter().filter_map(root).collect(), scratch }
    }

    /// The directories, without the client's own folder.
    pub(crate) fn roots(&self) -> impl Iterator<Item = &Path> {
        self.roots.iter().map(|root| root.path.as_path())
    }

    /// Resolves a path from a client; a relative one is in the client's own folder.
    pub(crate) fn find(&self, given: &str) -> Result<HostPath, ToolError> {
        if given.is_empty() || given.contains('\0') {
            return Err(ToolError::invalid(format!("`{given}` is not a path")));
        }
        // Joining with an absolute path gives that path.
        let path = self.scratch.join(given);
        let mut plain = PathBuf::new();
        for part in path.components() {
            match part {
                Component::ParentDir => {
                    return Err(ToolError::invalid(format!("`{given}`: give the path without `..`")));
                }
                Component::CurDir => {}
                other => plain.push(other),
            }
        }
        let scratch = Root::of(&self.scratch);
        let all = self.roots.iter().chain([&scratch]);
        let roots = all.filter(|root| plain.starts_with(&root.path));
        let Some(root) = roots.max_by_key(|root| root.path.components().count()) else {
            return Err(self.forbidden(&plain));
        };
        if root.path == self.scratch {
            self.make_scratch()?;
        }
        let below = plain.strip_prefix(&root.path).unwrap_or(&plain).to_owned();
        let root = root.open().map_err(|error| failed("open", &root.path, error))?;
        let is_directory = given.ends_with('/') || given.ends_with("/.");
        Ok(HostPath { root, below, path: plain, is_directory })
    }

    /// Creates the client's own folder, which is private to the daemon's user.
    pub(crate) fn make_scratch(&self) -> Result<(), ToolError> {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&self.scratch);
        let failed = |error: io::Error| {
            TreeError::file("make the folder", bytes(&self.scratch), error).to_tool_error()
        };
        made.map_err(|error| on_host(failed(error)))
    }

    fn forbidden(&self, path: &Path) -> ToolError {
        let roots: Vec<String> =
            self.roots().chain([self.scratch.as_path()]).map(|root| root.display().to_string()).collect();
        let text = format!("{} is not in an allowed directory", path.display());
        ToolError::new(ErrorCode::Forbidden, text).hint(format!(
            "use a path below {}, or have the administrator add its directory to copy_roots",
            roots.join(" or ")
        ))
    }
}

impl HostPath {
    /// Returns its last component; `None` for the root of a filesystem.
    pub(crate) fn name(&self) -> Option<&OsStr> {
        self.path.file_name()
    }

    /// Opens it for reading. A link at its end is copied as a link, unless the path was given with a trailing slash.
    pub(crate) fn source(&self) -> Result<Source, ToolError> {
        let shown = bytes(&self.path);
        let name = self.below.file_name().filter(|_| !self.is_directory);
        let source = match (name, self.below.parent()) {
            (Some(name), Some(parent)) => {
                let parent = self.open(parent, PASSAGE).map_err(|error| self.failed("read", error))?;
                Source::at(parent, name, shown)
            }
            _ => {
                let directory =
                    self.open(&self.below, DIRECTORY).map_err(|error| self.failed("read", error))?;
                Ok(Source::of_directory(directory, shown))
            }
        };
        source.map_err(|error| on_host(error.to_tool_error()))
    }

    /// Returns whether it exists.
    pub(crate) fn is_there(&self) -> Result<bool, ToolError> {
        match self.open(&self.below, OFlags::PATH | OFlags::CLOEXEC | OFlags::NOFOLLOW) {
            Ok(_) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(error) => Err(self.failed("read", error)),
        }
    }

    /// Opens it as a directory to unpack into, and creates it and its parents if they are missing. A new directory is owned by
    /// the owner of its parent.
    pub(crate) fn directory(&self) -> Result<OwnedFd, ToolError> {
        let mut at = PathBuf::new();
        let mut parent = self.open(&at, PASSAGE).map_err(|error| self.failed("open", error))?;
        for name in &self.below {
            at.push(name);
            parent = match self.open(&at, PASSAGE) {
                Err(Errno::NOENT) => make(parent.as_fd(), name)
                    .and_then(|()| self.open(&at, PASSAGE))
                    .map_err(|error| self.failed("create the directory", error))?,
                other => other.map_err(|error| self.failed("open the directory", error))?,
            };
        }
        let opened = rustix::fs::openat(&parent, ".", DIRECTORY, Mode::empty());
        opened.map_err(|error| self.failed("open the directory", error))
    }

    /// Returns the path of its parent; for a root, the root itself.
    pub(crate) fn parent(&self) -> io::Result<Self> {
        let (below, path) = match (self.below.parent(), self.path.parent()) {
            (Some(below), Some(path)) => (below.to_owned(), path.to_owned()),
            _ => (self.below.clone(), self.path.clone()),
        };
        Ok(Self { root: self.root.try_clone()?, below, path, is_directory: true })
    }

    /// Returns whether it is one of the places themselves.
    pub(crate) fn is_root(&self) -> bool {
        self.below.as_os_str().is_empty()
    }

    /// Appends a name.
    pub(crate) fn join(mut self, name: &OsStr) -> Self {
        self.below.push(name);
        self.path.push(name);
        self.is_directory = false;
        self
    }

    fn open(&self, below: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
        let below = if below.as_os_str().is_empty() { Path::new(".") } else { below };
        rustix::fs::openat2(&self.root, below, flags, Mode::empty(), BENEATH)
    }

    fn failed(&self, action: &'static str, error: Errno) -> ToolError {
        failed(action, &self.path, error)
    }
}

/// Creates a directory that is owned by the owner of its parent.
fn make(parent: BorrowedFd<'_>, name: &OsStr) -> Result<(), Errno> {
    match rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o755)) {
        Ok(()) => {}
        Err(Errno::EXIST) => return Ok(()),
        Err(error) => return Err(error),
    }
    if !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    let owner = rustix::fs::fstat(parent)?;
    let (uid, gid) = (Uid::from_raw(owner.st_uid), Gid::from_raw(owner.st_gid));
    rustix::fs::chownat(parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
}

fn failed(action: &'static str, path: &Path, error: Errno) -> ToolError {
    let told = TreeError::file(action, bytes(path), error).to_tool_error();
    match error {
        Errno::XDEV => {
            let text = format!("{action} {}: a link points outside the allowed directory", path.display());
            ToolError::new(ErrorCode::Forbidden, text).hint("give the link's target, if that is allowed")
        }
        Errno::NOSYS => ToolError::new(ErrorCode::HostUnsuitable, told.message)
            .hint("copying needs Linux 5.6 or newer on the host"),
        _ => on_host(told),
    }
}

fn bytes(path: &Path) -> &[u8] {
    path.as_os_str().as_encoded_bytes()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, symlink};

    use super::*;

    fn places(root: &Path) -> Places {
        let roots = vec![root.join("allowed"), root.join("allowed/deep")];
        std::fs::create_dir_all(root.join("allowed/deep")).unwrap();
        std::fs::create_dir(root.join("outside")).unwrap();
        std::fs::write(root.join("outside/secret"), "x").unwrap();
        Places::new(&roots, root.join("own/uid-1"))
    }

    #[test]
    fn narrower_places_stay_below_the_configured_ones() {
        let root = tempfile::tempdir().unwrap();
        places(root.path());
        let at = |path: &str| root.path().join(path).to_str().unwrap().to_owned();
        symlink("deep", root.path().join("allowed/link")).unwrap();
        let configured = [root.path().join("allowed")];
        let given = [at("allowed/deep"), at("allowed/link"), at("outside"), at("allowed2")];
        let narrow = Places::narrowed(&configured, &given, root.path().join("own/token-1"));
        assert_eq!(narrow.roots().count(), 2, "what is not configured is not allowed");
        narrow.find(&at("allowed/deep/x")).unwrap();
        for path in ["allowed/x", "allowed", "outside/secret"] {
            assert_eq!(narrow.find(&at(path)).unwrap_err().code, ErrorCode::Forbidden, "{path}");
        }
        assert!(narrow.find(&at("allowed/link/x")).is_err(), "a root may not be replaced by a link");
        std::fs::write(root.path().join("allowed/secret"), "x").unwrap();
        symlink("../secret", root.path().join("allowed/deep/up")).unwrap();
        let up = narrow.find(&format!("{}/", at("allowed/deep/up"))).unwrap();
        assert!(up.source().is_err(), "a link may not lead out of the narrower root");
    }

    #[test]
    fn only_what_is_allowed_is_found() {
        let root = tempfile::tempdir().unwrap();
        let places = places(root.path());
        let at = |path: &str| root.path().join(path).to_str().unwrap().to_owned();
        for path in ["outside/secret", "allowed2", "", "own/uid-2/x"] {
            let error = places.find(&at(path)).unwrap_err();
            assert_eq!(error.code, ErrorCode::Forbidden, "{path}");
            assert!(error.hint.unwrap().contains("copy_roots"), "{path}");
        }
        for path in [at("allowed/../outside"), String::new(), "../uid-2".into(), at("allowed/a\0b")] {
            assert_eq!(places.find(&path).unwrap_err().code, ErrorCode::InvalidArgument, "{path:?}");
        }
        assert_eq!(places.find(&at("allowed/./x")).unwrap().path, root.path().join("allowed/x"));
        let own = places.find("sub/file").unwrap();
        assert_eq!(own.path, places.scratch.join("sub/file"));
        assert_eq!(std::fs::metadata(&places.scratch).unwrap().mode() & 0o777, 0o700);
    }

    #[test]
    fn what_is_missing_on_the_host_is_not_looked_for_in_a_vm() {
        let root = tempfile::tempdir().unwrap();
        let places = places(root.path());
        std::fs::write(root.path().join("allowed/file"), "x").unwrap();
        let at = |path: &str| root.path().join("allowed").join(path).to_str().unwrap().to_owned();
        for path in [at("none"), at("none/x"), at("none/"), at("file/x"), "none".to_owned()] {
            let error = places.find(&path).unwrap().source().unwrap_err();
            assert_eq!(error.code, ErrorCode::FileNotFound, "{path}");
            assert!(error.hint.unwrap().contains("on the host"), "{path}");
        }
    }

    #[test]
    fn links_do_not_lead_out() {
        let root = tempfile::tempdir().unwrap();
        let places = places(root.path());
        let allowed = root.path().join("allowed");
        symlink("../outside", allowed.join("up")).unwrap();
        symlink(root.path().join("outside"), allowed.join("abs")).unwrap();
        symlink("deep", allowed.join("inside")).unwrap();
        symlink("/proc/self/root", allowed.join("magic")).unwrap();
        let find = |path: &str| places.find(allowed.join(path).to_str().unwrap()).unwrap();
        for path in ["up/secret", "abs/secret", "up/", "abs/", "magic/etc/passwd"] {
            let error = find(path).source().unwrap_err();
            assert_eq!(error.code, ErrorCode::Forbidden, "{path}: {error}");
            assert_eq!(
                find(&format!("{path}/x")).directory().unwrap_err().code,
                ErrorCode::Forbidden,
                "{path}"
            );
        }
        assert!(!root.path().join("outside/x").exists());
        // A link itself may be copied, and a link that stays inside may be followed.
        assert!(!find("up").source().unwrap().is_directory());
        assert!(find("inside/").source().unwrap().is_directory());
        find("inside/new/er").directory().unwrap();
        assert!(allowed.join("deep/new/er").is_dir());
    }

    #[test]
    fn what_is_made_belongs_to_the_owner_of_where_it_is() {
        let root = tempfile::tempdir().unwrap();
        let places = places(root.path());
        let allowed = root.path().join("allowed");
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(&allowed, Some(54321), Some(54322)).unwrap();
        }
        let made = places.find(allowed.join("a/b").to_str().unwrap()).unwrap();
        assert!(!made.is_there().unwrap());
        made.directory().unwrap();
        assert!(made.is_there().unwrap());
        let owner = |path: &Path| std::fs::metadata(path).map(|meta| (meta.uid(), meta.gid())).unwrap();
        assert_eq!(owner(&allowed.join("a/b")), owner(&allowed));
        let parent = made.parent().unwrap();
        assert_eq!((parent.path.as_path(), parent.is_root()), (&*allowed.join("a"), false));
    }
}
