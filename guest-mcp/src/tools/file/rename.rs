//! `file_move`.

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nexus_schema::ToolError;
use nexus_schema::tools::file::{FileMove, FileMoveOutput, FileMoveParams};
use rustix::fs::{AtFlags, FileType as Kind, RenameFlags};
use rustix::io::Errno;
use tokio_util::sync::CancellationToken;

use super::copy::{Order, copy};
use super::delete::{delete, refuse_mount_points, split};
use super::{failed, not_regular, open_parent, parse_path, refused};
use crate::places::{Owner, make_directories_for};
use crate::tools::text::shown;
use crate::tools::{Call, Reply, Run};

impl Run for FileMove {
    async fn run(call: Call, params: FileMoveParams) -> Result<Reply<FileMoveOutput>, ToolError> {
        let (from, to) = (parse_path(&params.from)?, parse_path(&params.to)?);
        let overwrite = params.overwrite.unwrap_or(false);
        let work = move |owner, cancel: &_| rename(&from, &to, overwrite, owner, cancel);
        let copied = call.blocking_as(params.user, work).await?;
        let how = if copied { "moved to another filesystem" } else { "moved" };
        let header = format!("{} · {how} to {}", shown(&params.from), shown(&params.to));
        Ok(Reply::new(header, FileMoveOutput { from: params.from, to: params.to, copied }))
    }
}

/// Opens the parent directory of a path to be created, which is itself created if missing; also returns the name in it.
pub(super) fn place<'a>(what: &str, to: &'a Path, owner: Owner) -> Result<(OwnedFd, &'a [u8]), ToolError> {
    let (parent, name) = split(to).ok_or_else(|| refused(what, to, "it has no name of its own"))?;
    let parent = Path::new(OsStr::from_bytes(parent));
    make_directories_for(parent, owner).map_err(|error| failed("create the directory", parent, error))?;
    Ok((open_parent(parent).map_err(|error| failed(what, to, error))?, name))
}

/// Returns the error for a destination that already exists.
pub(super) fn in_the_way(what: &str, to: &Path) -> ToolError {
    refused(what, to, "a file already exists there")
        .errno("EEXIST")
        .hint("give overwrite: true to replace it")
}

/// Moves a file; returns whether it had to be copied.
fn rename(
    from: &Path,
    to: &Path,
    overwrite: bool,
    owner: Owner,
    cancel: &CancellationToken,
) -> Result<bool, ToolError> {
    const WHAT: &str = "move";
    let (parent, name) = split(from).ok_or_else(|| refused(WHAT, from, "it has no name of its own"))?;
    let source =
        open_parent(Path::new(OsStr::from_bytes(parent))).map_err(|error| failed(WHAT, from, error))?;
    let stat = rustix::fs::statat(&source, name, AtFlags::SYMLINK_NOFOLLOW)
        .map_err(|error| failed(WHAT, from, error))?;
    let is_directory = Kind::from_raw_mode(stat.st_mode) == Kind::Directory;
    if is_directory {
        refuse_mount_points(&source, name, from)?;
    }
    let (target, new_name) = place("move to", to, owner)?;
    match rustix::fs::statat(&target, new_name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(there) if Kind::from_raw_mode(there.st_mode) == Kind::Directory && !is_directory => {
            return Err(not_regular("move to", to, Kind::Directory)
                .hint("give the full new path, including the name"));
        }
        Ok(_) if !overwrite => return Err(in_the_way("move to", to)),
        Ok(_) | Err(Errno::NOENT) => {}
        Err(error) => return Err(failed("move to", to, error)),
    }
    let renamed = if overwrite {
        rustix::fs::renameat(&source, name, &target, new_name)
    } else {
        match rustix::fs::renameat_with(&source, name, &target, new_name, RenameFlags::NOREPLACE) {
            // The filesystem cannot do this in one step.
            Err(Errno::INVAL | Errno::NOSYS) => rustix::fs::renameat(&source, name, &target, new_name),
            other => other,
        }
    };
    match renamed {
        Ok(()) => Ok(false),
        Err(Errno::EXIST) => Err(in_the_way("move to", to)),
        Err(Errno::XDEV) => {
            copy(&Order { from, to, recursive: true, overwrite, owner }, cancel)?;
            delete(from, true, cancel)?;
            Ok(true)
        }
        Err(Errno::INVAL) if is_directory => {
            Err(refused(WHAT, from, "a directory cannot be moved into itself").errno("EINVAL"))
        }
        Err(error) => Err(failed(WHAT, from, error)),
    }
}
