//! The tools that copy trees of files between the host and VMs.

use std::path::{Component, Path};

use nexus_schema::stream::{TreeEnded, TreeInOpening, TreeOutOpening, TreeTrack};
use nexus_schema::tools::system::CopyPlaces;
use nexus_schema::tools::tree::{
    CopyOutcome, GuestCopyInParams, GuestCopyOutParams, TreeCopied, TreeSummary,
};
use nexus_schema::{ErrorCode, ToolError};
use nexus_tree::{Filter, Packing};

use super::{CallContext, GuestHandle, Nexus, Shared, patience};
use crate::progress::Progress;
use crate::tree::{Guest, HostPath, In, Out, Places};

/// Maximum number of patterns of one call.
const PATTERNS_MAX: usize = 1000;

impl Nexus {
    /// The tool `guest_copy_in`.
    pub async fn guest_copy_in(
        &self,
        ctx: &CallContext,
        params: GuestCopyInParams,
    ) -> Result<CopyOutcome, ToolError> {
        let wait = patience(params.wait_s)?;
        let filter = filter(&params.exclude, params.gitignore)?;
        let from = self.shared.copy_places(ctx).find(&params.from)?;
        let name = from.name().and_then(|name| name.to_str()).unwrap_or_default();
        let (directory, top) = split(&params.to, name)?;
        if params.same_owner == Some(true) && params.user.is_some() {
            return Err(ToolError::invalid("same_owner and user cannot be used together"));
        }
        let handle = self.guest_awake(&ctx.caller, &params.vm, "a copy").await?;
        let to = Path::new(&directory).join(&top).display().to_string();
        let opening = TreeInOpening {
            directory,
            top: top.clone(),
            make: true,
            fresh: params.overwrite == Some(false),
            user: params.user,
            arrival: None,
            own: false,
            same_owner: params.same_owner.unwrap_or(false),
            specials: false,
            track: params.track.unwrap_or(true).then_some(TreeTrack { exclude: params.exclude }),
            resume: None,
        };
        let source = blocking(move || from.source()).await?;
        let packing = Packing { top: top.into_bytes(), filter, specials: false, from: 0 };
        let copy = In { source, packing, opening };
        if params.dry_run == Some(true) {
            let (_, plan) = copy.plan(&Progress::default()).await?;
            return Ok(planned(to, plan));
        }
        let guest = self.shared.streams_of(&handle, ctx);
        let subject = Some((handle.vm.to_string(), handle.name.to_string()));
        let op = self.shared.begin_op("guest_copy_in", ctx, subject).await?;
        self.shared.ops.run(op, move |progress| async move {
            let _busy = handle.busy;
            Ok(copied(to, copy.run(&guest, &progress).await?))
        });
        let outcome = self.shared.ops.wait(ctx, op, wait).await?;
        Ok(CopyOutcome { outcome: Some(outcome), plan: None })
    }

    /// The tool `guest_copy_out`.
    pub async fn guest_copy_out(
        &self,
        ctx: &CallContext,
        params: GuestCopyOutParams,
    ) -> Result<CopyOutcome, ToolError> {
        let wait = patience(params.wait_s)?;
        filter(&params.exclude, params.gitignore)?;
        let to = self.shared.copy_places(ctx).find(&params.to)?;
        let (from_directory, from_name) = split(&params.from, "")?;
        let to = match (to.is_directory, from_name.is_empty()) {
            (true, false) => to.join(from_name.as_ref()),
            (false, _) => to,
            (true, true) => {
                return Err(ToolError::invalid("to: give a name for the copy, since the tree has none"));
            }
        };
        let handle = self.guest_awake(&ctx.caller, &params.vm, "a copy").await?;
        let (path, overwrite) = (to.path.clone(), params.overwrite.unwrap_or(false));
        let (into, top) = blocking(move || destination(to, overwrite)).await?;
        let shown = path.display().to_string();
        let opening = TreeOutOpening {
            path: Path::new(&from_directory).join(&from_name).display().to_string(),
            // As with a source on the host, a trailing slash follows a link to a directory.
            follow: params.from.ends_with('/'),
            top: top.clone(),
            user: params.user,
            exclude: params.exclude,
            gitignore: params.gitignore.unwrap_or(false),
            specials: false,
            plan: false,
            part: None,
        };
        let copy = Out { opening, into, top };
        let guest = self.shared.streams_of(&handle, ctx);
        if params.dry_run == Some(true) {
            return Ok(planned(shown, copy.plan(&guest).await?));
        }
        let subject = Some((handle.vm.to_string(), handle.name.to_string()));
        let op = self.shared.begin_op("guest_copy_out", ctx, subject).await?;
        self.shared.ops.run(op, move |progress| async move {
            let _busy = handle.busy;
            Ok(copied(shown, copy.run(&guest, &progress).await?))
        });
        let outcome = self.shared.ops.wait(ctx, op, wait).await?;
        Ok(CopyOutcome { outcome: Some(outcome), plan: None })
    }

    /// Returns the places that a client may copy from and to, and creates its own folder.
    pub(super) fn copy_places_of(&self, ctx: &CallContext) -> Result<CopyPlaces, ToolError> {
        let places = self.shared.copy_places(ctx);
        places.make_scratch()?;
        let shown = |path: &Path| path.display().to_string();
        Ok(CopyPlaces { roots: places.roots().map(shown).collect(), scratch: shown(&places.scratch) })
    }
}

impl Shared {
    pub(super) fn copy_places(&self, ctx: &CallContext) -> Places {
        let scratch = self.paths.of_client(&ctx.caller.owner);
        let configured = &self.config.copy_roots;
        match ctx.caller.grant() {
            None => Places::new(configured, scratch),
            Some(grant) => Places::narrowed(configured, grant.roots(), scratch),
        }
    }

    pub(super) fn streams_of(&self, handle: &GuestHandle, ctx: &CallContext) -> Guest {
        Guest {
            directory: self.paths.vm(handle.vm),
            name: handle.name.to_string(),
            client: ctx.caller.owner.to_string(),
        }
    }
}

pub(super) fn filter(exclude: &[String], gitignore: Option<bool>) -> Result<Filter, ToolError> {
    if exclude.len() > PATTERNS_MAX {
        return Err(ToolError::invalid(format!(
            "exclude has {} patterns, the maximum is {PATTERNS_MAX}",
            exclude.len()
        )));
    }
    Filter::new(exclude, gitignore.unwrap_or(false)).map_err(|error| error.to_tool_error())
}

/// Splits a path in a guest into directory and name; `name` is appended to a path with a trailing slash.
fn split(path: &str, name: &str) -> Result<(String, String), ToolError> {
    let refuse = |why: &str| Err(ToolError::invalid(format!("`{path}` is not a valid path in a VM: {why}")));
    if path.contains('\0') {
        return refuse("it contains a NUL byte");
    }
    let whole = if path.ends_with('/') { Path::new(path).join(name) } else { Path::new(path).to_owned() };
    if !whole.is_absolute() {
        return refuse("it is not absolute");
    }
    if whole.components().any(|part| part == Component::ParentDir) {
        return refuse("give it without `..`");
    }
    let plain: std::path::PathBuf = whole.components().collect();
    let text = |path: &Path| path.to_str().unwrap_or_default().to_owned();
    match (plain.parent(), plain.file_name()) {
        (Some(parent), Some(name)) => Ok((text(parent), text(Path::new(name)))),
        _ => Ok(("/".into(), String::new())),
    }
}

/// Returns the directory to unpack into, and the name of the copy there.
pub(super) fn destination(to: HostPath, overwrite: bool) -> Result<(HostPath, String), ToolError> {
    if to.is_root() {
        return Err(ToolError::invalid(format!(
            "{} itself cannot be the destination: give a path below it",
            to.path.display()
        )));
    }
    if !overwrite && to.is_there()? {
        return Err(ToolError::new(ErrorCode::FileRefused, format!("{} already exists", to.path.display()))
            .hint("copy to another path, or pass overwrite: true to replace its files"));
    }
    let top = to.name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
    let parent =
        to.parent().map_err(|error| ToolError::internal(format!("open {}: {error}", to.path.display())))?;
    Ok((parent, top))
}

fn planned(to: String, summary: TreeSummary) -> CopyOutcome {
    let plan = TreeCopied { to, summary, tracked: false, not_tracked_why: None };
    CopyOutcome { outcome: None, plan: Some(plan) }
}

fn copied(to: String, ended: TreeEnded) -> TreeCopied {
    let TreeEnded { summary, tracked, not_tracked_why, .. } = ended;
    // `last` is only of interest if the copy is not complete.
    TreeCopied { to, summary: TreeSummary { last: None, ..summary }, tracked, not_tracked_why }
}

pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ToolError> + Send + 'static,
) -> Result<T, ToolError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(ToolError::internal(format!("look at a path: {error}"))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slash_at_the_end_keeps_the_name() {
        let at = |path, name| split(path, name).map_err(|error| error.code);
        assert_eq!(at("/srv/repo", "x"), Ok(("/srv".into(), "repo".into())));
        assert_eq!(at("/srv/", "repo"), Ok(("/srv".into(), "repo".into())));
        assert_eq!(at("/", "repo"), Ok(("/".into(), "repo".into())));
        assert_eq!(at("/srv//a/./b", "x"), Ok(("/srv/a".into(), "b".into())));
        for bad in ["work", "", "/a/../b", "/a\0"] {
            assert_eq!(at(bad, "x"), Err(ErrorCode::InvalidArgument), "{bad:?}");
        }
    }
}
