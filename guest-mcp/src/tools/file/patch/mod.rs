//! `file_patch`.

mod apply;
mod parse;

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use nexus_schema::ToolError;
use nexus_schema::error::ErrorCode;
use nexus_schema::limits::FILE_WRITE_MAX;
use nexus_schema::tools::file::{FileChangeOutput, FilePatch, FilePatchParams};

use super::change::Changes;
use super::diff::{reply, with_endings};
use super::target::Target;
use super::{failed, parse_path, refused};
use crate::places::{Owner, beneath};
use crate::tools::text::decode;
use crate::tools::{Call, Reply, Run};

/// What is wrong with a patch, or with a file that it changes.
#[derive(Debug)]
struct Bad {
    what: String,
}

impl Run for FilePatch {
    async fn run(call: Call, params: FilePatchParams) -> Result<Reply<FileChangeOutput>, ToolError> {
        let root = parse_path(&params.path)?;
        if params.patch.len() as u64 > FILE_WRITE_MAX {
            let text =
                format!("patch has {} bytes, at most {FILE_WRITE_MAX} are allowed", params.patch.len());
            return Err(ToolError::new(ErrorCode::TooLarge, text).hint("apply it in parts"));
        }
        let files = parse::parse(&params.patch).map_err(|bad| ToolError::invalid(bad.what))?;
        let (strip, dry_run) = (params.strip, params.dry_run);
        call.blocking_as(params.user, move |owner, _| patch(&root, &files, strip, dry_run, owner)).await
    }
}

fn patch(
    root: &Path,
    files: &[parse::FilePatch],
    strip: Option<u32>,
    dry_run: bool,
    owner: Owner,
) -> Result<Reply<FileChangeOutput>, ToolError> {
    let root = root.canonicalize().map_err(|error| failed("patch in", root, error))?;
    let strip = strip.map_or_else(|| usize::from(has_prefixes(files)), |strip| strip as usize);
    let (mut changes, mut count) = (Changes::within(&root), 0);
    for file in files {
        let place =
            |name: &Option<Vec<u8>>| name.as_deref().map(|name| below(&root, name, strip)).transpose();
        let (old, new) = (place(&file.old)?, place(&file.new)?);
        let crlf_known =
            file.hunks.iter().any(|hunk| hunk.old.iter().chain(&hunk.new).any(|line| line.contains(&b'\r')));
        let patched = |name: &Path, content: &[u8]| {
            with_endings(content, crlf_known, |content| apply::apply(content, &file.hunks)).map_err(|bad| {
                let text = format!("patch {}: {}", name.display(), bad.what);
                ToolError::new(ErrorCode::EditMismatch, text).hint(
                    "nothing was changed; read the file again, and make the patch for its present content",
                )
            })
        };
        match (old, new) {
            (Some(old), Some(new)) if old == new => {
                let change = changes.of(&text(&old), &old)?;
                let content = change
                    .new
                    .take()
                    .ok_or_else(|| refused("patch", &old, "the patch deletes it earlier"))?;
                change.new = Some(patched(&old, &content)?);
                change.mode = file.mode.or(change.mode);
            }
            (Some(old), Some(new)) => {
                let change = changes.of(&text(&old), &old)?;
                let content = change
                    .new
                    .take()
                    .ok_or_else(|| refused("patch", &old, "the patch deletes it earlier"))?;
                let mode =
                    file.mode.or_else(|| change.target.existing.as_ref().map(|existing| existing.mode));
                let content = patched(&old, &content)?;
                changes.create(&text(&new), free(&root, &new)?, content, mode)?;
            }
            (None, Some(new)) => {
                changes.create(&text(&new), free(&root, &new)?, patched(&new, b"")?, file.mode)?;
            }
            (Some(old), None) => {
                let change = changes.of(&text(&old), &old)?;
                let content =
                    change.new.take().ok_or_else(|| refused("patch", &old, "the patch deletes it twice"))?;
                let left = patched(&old, &content)?;
                if !left.is_empty() {
                    let what = format!(
                        "patch {}: the patch deletes it, but it has more content than the patch says",
                        old.display()
                    );
                    return Err(ToolError::new(ErrorCode::EditMismatch, what));
                }
            }
            (None, None) => {}
        }
        count += file.hunks.len() as u64;
    }
    for change in &changes.all {
        check_within(&root, change.target.path())?;
    }
    if !dry_run {
        changes.apply(owner)?;
    }
    Ok(reply(&changes, count, "hunks applied", dry_run))
}

/// Returns whether all names begin with `a/` and `b/`, as git writes them.
fn has_prefixes(files: &[parse::FilePatch]) -> bool {
    let begins =
        |name: &Option<Vec<u8>>, with: &[u8]| name.as_ref().is_none_or(|name| name.starts_with(with));
    files.iter().all(|file| begins(&file.old, b"a/") && begins(&file.new, b"b/"))
}

/// Returns the path that a name in a patch refers to; refuses one outside the root.
fn below(root: &Path, name: &[u8], strip: usize) -> Result<PathBuf, ToolError> {
    let path = Path::new(OsStr::from_bytes(name));
    let out = || refused("patch", path, &format!("it is not in {}", root.display()));
    if path.is_absolute() {
        let inside = path.strip_prefix(root).map_err(|_| out())?;
        return if inside.components().all(is_name) { Ok(path.to_owned()) } else { Err(out()) };
    }
    let parts: Vec<Component<'_>> = path.components().filter(|part| *part != Component::CurDir).collect();
    if parts.len() <= strip {
        let text = format!("`{}` in the patch does not have {strip} leading parts to strip", path.display());
        return Err(ToolError::invalid(text).hint("give another `strip`"));
    }
    if !parts.iter().copied().all(is_name) {
        return Err(out());
    }
    Ok(root.join(parts[strip..].iter().collect::<PathBuf>()))
}

fn is_name(part: Component<'_>) -> bool {
    matches!(part, Component::Normal(_))
}

/// Returns the target of a file that the patch creates.
fn free(root: &Path, path: &Path) -> Result<Target, ToolError> {
    check_within(root, path)?;
    let target = Target::find(path)?;
    if target.existing.is_some() {
        return Err(refused("patch", path, "the patch creates it, but it already exists").errno("EEXIST"));
    }
    Ok(target)
}

/// Refuses a path that leads out of the root through links.
fn check_within(root: &Path, path: &Path) -> Result<(), ToolError> {
    if beneath(root, path).is_some() {
        return Ok(());
    }
    Err(refused("patch", path, &format!("a symbolic link leads out of {}", root.display())))
}

fn text(path: &Path) -> String {
    decode(path.as_os_str().as_bytes()).0
}
