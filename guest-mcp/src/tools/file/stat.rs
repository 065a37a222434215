//! `file_stat`.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use data_encoding::BASE64;
use nexus_schema::ToolError;
use nexus_schema::tools::file::{FileEntry, FileStat, FileStatParams, FileType};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;

use super::{failed, file_type, parse_path, timestamp};
use crate::tools::text::{decode, shown};
use crate::tools::{Call, Reply, Run, human_bytes};

impl Run for FileStat {
    async fn run(call: Call, params: FileStatParams) -> Result<Reply<FileEntry>, ToolError> {
        let path = parse_path(&params.path)?;
        let follow = params.follow.unwrap_or(false);
        let named = params.path;
        // If the kernel has the file in its caches, this is fast; only a lookup that must ask a disk or a server goes to the pool.
        let near = if params.user.is_none() { open(&path, follow, ResolveFlags::CACHED).ok() } else { None };
        let entry = match near {
            Some(file) => entry_of(&file, named, &path)?,
            None => {
                let work = move |_, _: &_| {
                    let file = open(&path, follow, ResolveFlags::empty())
                        .map_err(|error| failed("stat", &path, error))?;
                    entry_of(&file, named, &path)
                };
                call.blocking_as(params.user, work).await?
            }
        };
        Ok(Reply::new(describe(&entry), entry))
    }
}

fn open(path: &Path, follow: bool, resolve: ResolveFlags) -> Result<OwnedFd, Errno> {
    let mut flags = OFlags::PATH | OFlags::CLOEXEC;
    if !follow {
        flags |= OFlags::NOFOLLOW;
    }
    match rustix::fs::openat2(CWD, path, flags, Mode::empty(), resolve) {
        // For kernels before Linux 5.6.
        Err(Errno::NOSYS) if resolve.is_empty() => rustix::fs::open(path, flags, Mode::empty()),
        other => other,
    }
}

fn entry_of(file: &OwnedFd, named: String, path: &Path) -> Result<FileEntry, ToolError> {
    let stat = rustix::fs::fstat(file).map_err(|error| failed("stat", path, error))?;
    let is_link = file_type(stat.st_mode) == FileType::Symlink;
    let target = if is_link { rustix::fs::readlinkat(file, c"", Vec::new()).ok() } else { None };
    Ok(entry(named, None, &stat, target.map(|target| target.into_bytes())))
}

/// Returns the entry of a file in an open directory.
pub(super) fn entry_at(directory: impl AsFd, name: &[u8], path: &[u8]) -> Result<FileEntry, Errno> {
    let stat = rustix::fs::statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let is_link = file_type(stat.st_mode) == FileType::Symlink;
    let target = if is_link { rustix::fs::readlinkat(&directory, name, Vec::new()).ok() } else { None };
    let (text, lossy) = decode(path);
    let exact = lossy.then(|| BASE64.encode(path));
    Ok(entry(text, exact, &stat, target.map(|target| target.into_bytes())))
}

/// Builds an entry; `exact` is its exact path if `path` had to be changed.
fn entry(path: String, exact: Option<String>, stat: &Stat, target: Option<Vec<u8>>) -> FileEntry {
    let kind = file_type(stat.st_mode);
    let (target, target_lossy) = match target {
        Some(target) => {
            let (text, lossy) = decode(&target);
            (Some(text), lossy)
        }
        None => (None, false),
    };
    FileEntry {
        path,
        kind,
        size_bytes: u64::try_from(stat.st_size).unwrap_or(0),
        mode: format!("{:04o}", stat.st_mode & 0o7777),
        uid: stat.st_uid,
        gid: stat.st_gid,
        modified_at: timestamp(stat.st_mtime, stat.st_mtime_nsec as i64),
        target,
        lossy: exact.is_some() || target_lossy,
        path_base64: exact,
    }
}

/// Describes a file in one line.
pub(super) fn describe(entry: &FileEntry) -> String {
    let kind = match entry.kind {
        FileType::File => "file",
        FileType::Directory => "directory",
        FileType::Symlink => "symlink",
        FileType::BlockDevice => "block device",
        FileType::CharDevice => "char device",
        FileType::Fifo => "fifo",
        FileType::Socket => "socket",
    };
    let mut line = format!(
        "{} · {kind} · {} · {} · {}:{} · {}",
        shown(&entry.path),
        human_bytes(entry.size_bytes),
        entry.mode,
        entry.uid,
        entry.gid,
        entry.modified_at,
    );
    if let Some(target) = &entry.target {
        line.push_str(" -> ");
        line.push_str(&shown(target));
    }
    line
}
