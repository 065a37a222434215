//! Disk usage and free space.

use std::fs::File;
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
    Ok(free(&rustix::fs::statvfs(path)?))
}

/// The same for the filesystem of an open file.
pub(crate) fn free_bytes_of(file: &File) -> io::Result<u64> {
    Ok(free(&rustix::fs::fstatvfs(file)?))
}

fn free(stat: &rustix::fs::StatVfs) -> u64 {
    stat.f_bavail.saturating_mul(stat.f_frsize)
}

/// Whether an error means that the disk or its quota is full.
pub(crate) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}
