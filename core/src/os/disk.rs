//! Disk usage and free space.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use fs_err as fs;

/// How many bytes a file occupies on disk.
pub(crate) fn allocated_bytes(file: &Path) -> io::Result<u64> {
    Ok(fs::metadata(file)?.blocks() * 512)
}

/// How many bytes this user may still write to the filesystem of `path`.
pub(crate) fn free_bytes(path: &Path) -> io::Result<u64> {
    let stat = rustix::fs::statvfs(path)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Whether an error means that the disk or its quota is full.
pub(crate) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}
