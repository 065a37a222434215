//! The file tools. Paths are absolute. Only regular files and directories are opened for their content, so that no call waits for a device or a pipe.
//! A change as a user is made with that user's rights.

mod change;
mod copy;
mod delete;
mod diff;
mod draft;
mod edit;
mod lines;
mod list;
mod mkdir;
mod patch;
mod patterns;
mod read;
mod rename;
mod search;
mod stat;
mod target;
mod upload;
mod write;

use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use nexus_schema::ToolError;
use nexus_schema::error::ErrorCode;
use nexus_schema::time::Timestamp;
use nexus_schema::tools::ContentEncoding;
use nexus_schema::tools::file::FileType;
use rustix::fs::{FileType as Kind, Mode, OFlags};
use rustix::io::Errno;

use crate::os::{reason, with_errno};
use crate::tools::text::shown;

pub(crate) use upload::Uploads;

/// The longest path of the kernel, in bytes.
const PATH_MAX: usize = 4095;

/// The prefix of a path in base64, for paths that are not UTF-8.
const ENCODED: &str = "base64:";

/// Parses the path in an argument: an absolute path, plain or in base64 after `base64:`.
fn parse_path(text: &str) -> Result<PathBuf, ToolError> {
    let bytes = match text.strip_prefix(ENCODED) {
        Some(encoded) => {
            let decoded = ContentEncoding::Base64.decode(encoded.to_owned());
            decoded.map_err(|error| ToolError::invalid(format!("the path after `{ENCODED}`: {error}")))?
        }
        None => text.as_bytes().to_vec(),
    };
    if bytes.first() != Some(&b'/') {
        let text: String = text.chars().take(200).collect();
        return Err(ToolError::invalid(format!("`{}` is not an absolute path", shown(&text))));
    }
    if bytes.contains(&0) {
        return Err(ToolError::invalid("a path cannot contain a NUL byte"));
    }
    if bytes.len() > PATH_MAX {
        return Err(ToolError::invalid(format!("a path can have at most {PATH_MAX} bytes")));
    }
    Ok(PathBuf::from(OsString::from_vec(bytes)))
}

/// Opens the directory of a file, which need not be readable.
fn open_parent(directory: &Path) -> Result<OwnedFd, Errno> {
    rustix::fs::open(directory, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

/// Returns the error of a tool that could not do `what` to `path`.
fn failed(what: &str, path: impl AsRef<Path>, error: impl Into<io::Error>) -> ToolError {
    let error = error.into();
    let code = match error.kind() {
        io::ErrorKind::NotFound => ErrorCode::FileNotFound,
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorCode::DiskFull,
        _ => ErrorCode::FileRefused,
    };
    let text = format!("{what} {}: {}", path.as_ref().display(), reason(&error));
    with_errno(ToolError::new(code, text), &error)
}

/// Returns the error for a file of the wrong kind.
fn refused(what: &str, path: impl AsRef<Path>, why: &str) -> ToolError {
    ToolError::new(ErrorCode::FileRefused, format!("{what} {}: {why}", path.as_ref().display()))
}

/// Returns the error for a file that is not a regular one.
fn not_regular(what: &str, path: impl AsRef<Path>, kind: Kind) -> ToolError {
    let error = refused(what, path, &format!("it is {}", kind_words(kind)));
    if kind == Kind::Directory { error.errno("EISDIR") } else { error }
}

/// Describes the kind of a file.
fn kind_words(kind: Kind) -> &'static str {
    match kind {
        Kind::RegularFile => "a regular file",
        Kind::Directory => "a directory",
        Kind::Symlink => "a symbolic link",
        Kind::Fifo => "a named pipe",
        Kind::Socket => "a socket",
        Kind::CharacterDevice => "a character device",
        Kind::BlockDevice => "a block device",
        Kind::Unknown => "of an unknown kind",
    }
}

/// Returns the kind of a file in the form of the tools' results.
fn file_type(mode: u32) -> FileType {
    match Kind::from_raw_mode(mode) {
        Kind::Directory => FileType::Directory,
        Kind::Symlink => FileType::Symlink,
        Kind::Fifo => FileType::Fifo,
        Kind::Socket => FileType::Socket,
        Kind::CharacterDevice => FileType::CharDevice,
        Kind::BlockDevice => FileType::BlockDevice,
        Kind::RegularFile | Kind::Unknown => FileType::File,
    }
}

/// Returns a file time in the form of the tools' results.
fn timestamp(seconds: i64, nanoseconds: i64) -> Timestamp {
    Timestamp::from_millis(seconds.saturating_mul(1000).saturating_add(nanoseconds / 1_000_000))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_absolute() {
        use std::os::unix::ffi::OsStrExt;

        let bytes = |text: &str| parse_path(text).map(|path| path.as_os_str().as_bytes().to_vec());
        assert_eq!(bytes("/etc/passwd").unwrap(), b"/etc/passwd");
        assert_eq!(bytes("base64:L2H/").unwrap(), b"/a\xff");
        for bad in [
            "",
            "etc",
            "./x",
            "/a\0b",
            &format!("/{}", "a".repeat(5000)),
            "base64:!",
            "base64:YQ==",
            "base64:LwA=",
        ] {
            assert_eq!(bytes(bad).unwrap_err().code, ErrorCode::InvalidArgument, "{bad:?}");
        }
    }
}
