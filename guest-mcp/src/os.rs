//! Facts about the running system, read without the C library's databases (a static binary has none).

use std::ffi::{CString, OsString};
use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nexus_schema::ToolError;
use rustix::mount::MountFlags;

/// Reads at most `max` bytes of a small file as text; `None` if it cannot be read. Never waits: in the place of a file there may be a pipe.
pub(crate) fn read_small(path: impl AsRef<Path>, max: u64) -> Option<String> {
    let mut bytes = Vec::new();
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = File::options().read(true).custom_flags(flags).open(path).ok()?;
    file.take(max).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// A filesystem that could not be mounted.
#[derive(Debug, thiserror::Error)]
#[error("mount {kind} on {place}")]
pub(crate) struct MountError {
    kind: String,
    place: String,
    #[source]
    source: std::io::Error,
}

/// Mounts a filesystem of the kernel with `nosuid`. Creates the mount point if it is missing.
pub(crate) fn mount(source: &str, place: &str, kind: &str, options: &str) -> Result<(), MountError> {
    let fail = |source| MountError { kind: kind.into(), place: place.into(), source };
    if !Path::new(place).is_dir() {
        std::fs::create_dir_all(place).map_err(fail)?;
    }
    let options = CString::new(options).map_err(|error| fail(error.into()))?;
    let mounted = rustix::mount::mount(source, place, kind, MountFlags::NOSUID, Some(options.as_c_str()));
    mounted.map_err(|error| fail(error.into()))
}

/// Returns the mount points of a mount table in the form of `/proc/self/mountinfo`, in its order.
pub(crate) fn mount_points(table: &str) -> impl Iterator<Item = PathBuf> {
    table.lines().filter_map(|line| line.split(' ').nth(4)).map(unescape)
}

/// Decodes a path of the mount table, where blanks are written as `\040`.
pub(crate) fn unescape(field: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field.as_bytes();
    while let [first, more @ ..] = rest {
        let code = match (first, more) {
            (b'\\', [a, b, c, ..]) => {
                std::str::from_utf8(&[*a, *b, *c]).ok().and_then(|d| u8::from_str_radix(d, 8).ok())
            }
            _ => None,
        };
        bytes.push(code.unwrap_or(*first));
        rest = if code.is_some() { &more[3..] } else { more };
    }
    PathBuf::from(OsString::from_vec(bytes))
}

/// `os-release` of the root filesystem.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct OsRelease {
    /// `PRETTY_NAME`.
    pub(crate) pretty_name: Option<String>,
    /// `ID`.
    pub(crate) id: Option<String>,
    /// `VERSION_ID`.
    pub(crate) version_id: Option<String>,
}

impl OsRelease {
    /// Reads the file, if there is one.
    pub(crate) fn read() -> Self {
        ["/etc/os-release", "/usr/lib/os-release"]
            .iter()
            .find_map(|path| read_small(path, 16 << 10))
            .map(|text| Self::parse(&text))
            .unwrap_or_default()
    }

    fn parse(text: &str) -> Self {
        let mut release = Self::default();
        for line in text.lines() {
            let Some((key, value)) = line.split_once('=') else { continue };
            let value = value.trim().trim_matches(['"', '\'']);
            let value = (!value.is_empty()).then(|| value.chars().take(200).collect());
            match key.trim() {
                "PRETTY_NAME" => release.pretty_name = value,
                "ID" => release.id = value,
                "VERSION_ID" => release.version_id = value,
                _ => {}
            }
        }
        release
    }
}

/// One line of `/etc/passwd`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct User {
    /// The login name.
    pub(crate) name: String,
    /// The user's number.
    pub(crate) uid: u32,
    /// The primary group's number.
    pub(crate) gid: u32,
    /// The home directory.
    pub(crate) home: String,
    /// The login shell.
    pub(crate) shell: String,
}

/// The user databases of the root filesystem.
pub(crate) struct Users {
    passwd: String,
    group: String,
}

impl Users {
    /// Reads `/etc/passwd` and `/etc/group`. A missing file counts as empty.
    pub(crate) fn read() -> Self {
        let read = |path| read_small(path, 4 << 20).unwrap_or_default();
        Self { passwd: read("/etc/passwd"), group: read("/etc/group") }
    }

    /// Parses databases from text.
    #[cfg(test)]
    pub(crate) fn of(passwd: &str, group: &str) -> Self {
        Self { passwd: passwd.to_owned(), group: group.to_owned() }
    }

    /// Returns the number of the group with this name.
    pub(crate) fn gid_of(&self, name: &str) -> Option<u32> {
        let line = self.group.lines().find(|line| line.split(':').next() == Some(name))?;
        line.split(':').nth(2)?.parse().ok()
    }

    fn all(&self) -> impl Iterator<Item = User> {
        self.passwd.lines().filter_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next()?.to_owned();
            let uid = fields.nth(1)?.parse().ok()?;
            let gid = fields.next()?.parse().ok()?;
            let home = fields.nth(1)?.to_owned();
            let shell = fields.next().unwrap_or_default().to_owned();
            Some(User { name, uid, gid, home, shell })
        })
    }

    /// Returns the user with this name.
    pub(crate) fn by_name(&self, name: &str) -> Option<User> {
        self.all().find(|user| user.name == name)
    }

    /// Returns the first user with this number.
    pub(crate) fn by_uid(&self, uid: u32) -> Option<User> {
        self.all().find(|user| user.uid == uid)
    }

    /// Returns the groups that list a user, and its primary group, sorted.
    pub(crate) fn groups_of(&self, user: &User) -> Vec<u32> {
        let mut groups = vec![user.gid];
        for line in self.group.lines() {
            let mut fields = line.split(':');
            let Some(gid) = fields.nth(2).and_then(|gid| gid.parse().ok()) else { continue };
            if fields
                .next()
                .is_some_and(|members| members.split(',').any(|member| member.trim() == user.name))
            {
                groups.push(gid);
            }
        }
        groups.sort_unstable();
        groups.dedup();
        // The kernel accepts no more.
        groups.truncate(65_536);
        groups
    }
}

/// Returns the shell for command lines: bash if there is one, otherwise sh.
pub(crate) fn shell() -> Option<&'static str> {
    ["/bin/bash", "/usr/bin/bash", "/usr/local/bin/bash", "/bin/sh", "/usr/bin/sh"]
        .into_iter()
        .find(|path| rustix::fs::access(*path, rustix::fs::Access::EXEC_OK).is_ok())
}

/// Returns the time since the kernel started.
pub(crate) fn uptime() -> std::time::Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    std::time::Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs() as u32)
}

/// Returns the text of a system error, without the number that Rust appends.
pub(crate) fn reason(error: &std::io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or_default();
    let mut chars = text.chars();
    match chars.next() {
        Some(first) if !text.starts_with("I/O") => first.to_lowercase().chain(chars).collect(),
        Some(_) | None => text.to_owned(),
    }
}

/// Adds the system's errno to an error, as data.
pub(crate) fn with_errno(error: ToolError, cause: &std::io::Error) -> ToolError {
    match cause.raw_os_error().map(nix::errno::Errno::from_raw) {
        None | Some(nix::errno::Errno::UnknownErrno) => error,
        Some(errno) => error.errno(format!("{errno:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blanks_in_mount_points_are_read() {
        assert_eq!(unescape(r"/mnt/a\040b\134c"), Path::new(r"/mnt/a b\c"));
        assert_eq!(unescape(r"/plain\0"), Path::new(r"/plain\0"));
        let table = "21 28 0:20 / / rw - ext4 /dev/vda rw\n22 21 0:21 / /a\\040b rw - tmpfs x rw\nbad\n";
        assert_eq!(mount_points(table).collect::<Vec<_>>(), [Path::new("/"), Path::new("/a b")]);
    }

    #[test]
    fn os_release_is_read_with_and_without_quotes() {
        let release =
            OsRelease::parse("PRETTY_NAME=\"Debian GNU/Linux 12\"\nID=debian\nVERSION_ID='12'\nJUNK\n");
        assert_eq!(release.pretty_name.as_deref(), Some("Debian GNU/Linux 12"));
        assert_eq!(release.id.as_deref(), Some("debian"));
        assert_eq!(release.version_id.as_deref(), Some("12"));
    }

    #[test]
    fn a_pipe_in_the_place_of_a_small_file_is_not_waited_for() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("passwd");
        let (kind, mode) = (rustix::fs::FileType::Fifo, rustix::fs::Mode::from_raw_mode(0o600));
        rustix::fs::mknodat(rustix::fs::CWD, &path, kind, mode, 0).unwrap();
        assert_eq!(read_small(&path, 100).as_deref(), Some(""));
        let _writer = File::options().read(true).write(true).open(&path).unwrap();
        assert_eq!(read_small(&path, 100), None);
    }

    #[test]
    fn users_and_their_groups_are_found() {
        let users = Users {
            passwd: "root:x:0:0:root:/root:/bin/bash\nbroken\nweb:x:33:33:,,:/var/www:/usr/sbin/nologin\n"
                .into(),
            group: "root:x:0:\nwww:x:33:\nadm:x:4:syslog,web\nbad\n".into(),
        };
        let web = users.by_name("web").unwrap();
        assert_eq!((web.uid, web.gid, web.home.as_str()), (33, 33, "/var/www"));
        assert_eq!(users.groups_of(&web), [4, 33]);
        assert_eq!(users.by_uid(0).unwrap().name, "root");
        assert!(users.by_name("broken").is_none());
    }

    #[test]
    fn reasons_read_like_a_sentence() {
        let error = std::io::Error::from_raw_os_error(libc::ENOENT);
        assert_eq!(reason(&error), "no such file or directory");
    }
}
