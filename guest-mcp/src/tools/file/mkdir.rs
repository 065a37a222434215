//! `file_mkdir`.

use std::path::Path;

use nexus_schema::ToolError;
use nexus_schema::tools::file::{FileMkdir, FileMkdirOutput, FileMkdirParams};
use rustix::fs::{FileType as Kind, Mode, OFlags};
use rustix::io::Errno;

use super::write::parse_mode;
use super::{failed, kind_words, open_parent, parse_path, refused};
use crate::places::{Owner, inherit_owner, make_directories_for};
use crate::tools::text::shown;
use crate::tools::{Call, Reply, Run};

/// The default mode of a directory.
const MODE: u32 = 0o755;

impl Run for FileMkdir {
    async fn run(call: Call, params: FileMkdirParams) -> Result<Reply<FileMkdirOutput>, ToolError> {
        let path = parse_path(&params.path)?;
        let mode = params.mode.as_deref().map(parse_mode).transpose()?;
        let parents = params.parents.unwrap_or(true);
        let created =
            call.blocking_as(params.user, move |owner, _| make(&path, parents, mode, owner)).await?;
        let done = if created { "directory created" } else { "already exists" };
        let header = format!("{} · {done}", shown(&params.path));
        Ok(Reply::new(header, FileMkdirOutput { path: params.path, created }))
    }
}

/// Makes a directory; returns whether it is new.
fn make(path: &Path, parents: bool, mode: Option<u32>, owner: Owner) -> Result<bool, ToolError> {
    const WHAT: &str = "create the directory";
    let fail = |error: Errno| failed(WHAT, path, error);
    let there =
        |kind| refused(WHAT, path, &format!("it already exists and is {}", kind_words(kind))).errno("EEXIST");
    match rustix::fs::stat(path) {
        Ok(stat) => {
            return match Kind::from_raw_mode(stat.st_mode) {
                Kind::Directory if parents => Ok(false),
                kind => Err(there(kind)),
            };
        }
        Err(Errno::NOENT) => {}
        Err(error) => return Err(fail(error)),
    }
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(refused(WHAT, path, "it has no name of its own"));
    };
    if parents {
        make_directories_for(parent, owner).map_err(|error| failed(WHAT, parent, error))?;
    }
    let parent = open_parent(parent).map_err(fail)?;
    match rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(MODE)) {
        Ok(()) => {}
        // Another process was faster.
        Err(Errno::EXIST) if parents && path.is_dir() => return Ok(false),
        Err(error) => return Err(fail(error)),
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let made = rustix::fs::openat(&parent, name, flags, Mode::empty()).map_err(fail)?;
    if owner == Owner::OfDirectory {
        inherit_owner(&made, &rustix::fs::fstat(&parent).map_err(fail)?).map_err(fail)?;
    }
    if let Some(mode) = mode {
        rustix::fs::fchmod(&made, Mode::from_raw_mode(mode)).map_err(fail)?;
    }
    Ok(true)
}
