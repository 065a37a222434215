//! The file tools. Paths are absolute; nothing that is not a regular file or a directory is ever opened for its content, so
//! that no call waits for a device or a pipe.

mod delete;
mod list;
mod read;
mod stat;
mod write;

use std::io;

use nexus_schema::ToolError;
use nexus_schema::error::ErrorCode;
use nexus_schema::time::Timestamp;
use nexus_schema::tools::file::FileType;
use rustix::fs::FileType as Kind;

use crate::os::reason;

/// The longest path of the kernel, in bytes.
const PATH_MAX: usize = 4095;

/// Refuses what is not an absolute path.
fn check_path(path: &str) -> Result<(), ToolError> {
    if !path.starts_with('/') {
        let shown: String = path.chars().take(200).collect();
        return Err(ToolError::invalid(format!("`{shown}` is not an absolute path")));
    }
    if path.contains('\0') {
        return Err(ToolError::invalid("a path cannot hold a zero byte"));
    }
    if path.len() > PATH_MAX {
        return Err(ToolError::invalid(format!("a path holds at most {PATH_MAX} bytes")));
    }
    Ok(())
}

/// The error of a tool that could not do `what` to `path`.
fn failed(what: &str, path: &str, error: impl Into<io::Error>) -> ToolError {
    let error = error.into();
    let code = match error.kind() {
        io::ErrorKind::NotFound => ErrorCode::FileNotFound,
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorCode::DiskFull,
        _ => ErrorCode::FileRefused,
    };
    ToolError::new(code, format!("{what} {path}: {}", reason(&error)))
}

/// A file that is not of the right sort.
fn refused(what: &str, path: &str, why: &str) -> ToolError {
    ToolError::new(ErrorCode::FileRefused, format!("{what} {path}: {why}"))
}

/// The sort of a file in words.
fn kind_words(kind: Kind) -> &'static str {
    match kind {
        Kind::RegularFile => "a regular file",
        Kind::Directory => "a directory",
        Kind::Symlink => "a symbolic link",
        Kind::Fifo => "a named pipe",
        Kind::Socket => "a socket",
        Kind::CharacterDevice => "a character device",
        Kind::BlockDevice => "a block device",
        Kind::Unknown => "of an unknown sort",
    }
}

/// The sort of a file on the wire.
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

/// A file time on the wire.
fn timestamp(seconds: i64, nanoseconds: i64) -> Timestamp {
    Timestamp::from_millis(seconds.saturating_mul(1000).saturating_add(nanoseconds / 1_000_000))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_absolute() {
        assert!(check_path("/etc/passwd").is_ok());
        for bad in ["", "etc", "./x", "/a\0b", &format!("/{}", "a".repeat(5000))] {
            assert_eq!(check_path(bad).unwrap_err().code, ErrorCode::InvalidArgument, "{bad:?}");
        }
    }
}
