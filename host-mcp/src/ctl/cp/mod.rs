//! `nexusctl cp`: copies files and trees between this host and a VM, like `docker cp`.
//!
//! ```text
//! SRC ── pack ──> stream of the VM ──> unpacked there       into a VM
//! DST <── unpack ── stream of the VM <── packed there       out of it; the data is not trusted
//! ```
//! `-` is a tar stream on standard input or output, which is passed through unchanged.

mod end;
mod inwards;
mod outwards;
mod progress;

use std::ffi::OsString;
use std::path::Path;

use nexus_schema::ToolError;
use nexus_schema::error::{ErrorCode, is_errno};
use nexus_schema::stream::{Done, Ended, TreeEnded};
use nexus_schema::tools::tree::{SkipReason, SkippedEntry, TreeCopied, TreeSummary};
use nexus_tree::{Filter, TreeError};
use tokio::signal::unix::{SignalKind, signal};

use self::end::{End, InVm, end};
use self::progress::Meter;
use super::App;
use super::client::raw;
use super::error::{Error, Refusal};
use super::format;
use super::hint::About;
use super::ui::Format;
use crate::frames::FrameError;

/// The exit code of a failed or incomplete copy.
const FAILED: u8 = 1;
/// The maximum number of skipped names that are shown.
const SHOWN: usize = 5;

/// What to copy where.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Keep the owners' numeric ids; on this host that needs root [default: in a VM root or --user, on this host you]
    #[arg(short, long)]
    archive: bool,
    /// If SRC is a symbolic link, copy its target
    #[arg(short = 'L', long)]
    follow_link: bool,
    /// If the copy of a file is interrupted, keep its part as `.NAME.nexus-part` beside DST; the same command resumes it
    #[arg(long)]
    resume: bool,
    /// Skip files that match this pattern, as in a .gitignore at the top of SRC: `node_modules/`, `*.o`
    #[arg(long, value_name = "PATTERN")]
    exclude: Vec<String>,
    /// The user in the VM who reads or writes the files, and owns new ones: a name, a number, uid:gid, or `image` [default: root]
    #[arg(short, long)]
    user: Option<String>,
    /// A local path, `VM:PATH`, or `-` for a tar stream on standard input; `DIR/.` means the contents of DIR
    #[arg(value_name = "SRC")]
    src: OsString,
    /// `VM:PATH`, a local path, or `-` for a tar stream on standard output
    #[arg(value_name = "DST")]
    dst: OsString,
}

/// The options of a copy in either direction.
struct How {
    archive: bool,
    follow: bool,
    resume: bool,
    exclude: Vec<String>,
    user: Option<String>,
}

/// Copies. As with `docker cp`, any failure is exit code 1.
pub(crate) async fn run(app: &App, args: Args) -> Result<u8, Error> {
    match copy(app, args).await {
        Err(error @ (Error::Tool(_) | Error::Guest(_) | Error::File { .. } | Error::Input { .. })) => {
            app.ui.fail(&error);
            Ok(FAILED)
        }
        done => done,
    }
}

async fn copy(app: &App, args: Args) -> Result<u8, Error> {
    let Args { archive, follow_link: follow, resume, exclude, user, src, dst } = args;
    // Invalid patterns are reported before anything is opened.
    Filter::new(&exclude, false).map_err(|error| Error::usage(error.to_string()))?;
    if archive && user.is_some() {
        return Err(Error::usage("--archive and --user cannot be used together"));
    }
    let shown = format::tame(&dst.to_string_lossy());
    let (src, dst) = (end(&src)?, end(&dst)?);
    if resume && (src == End::Pipe || dst == End::Pipe) {
        return Err(Error::usage("--resume is for a file, not for a tar stream"));
    }
    let how = How { archive, follow, resume, exclude, user };
    let meter = Meter::default();
    let copied = match (src, dst) {
        (End::Vm(src), End::Vm(dst)) => {
            return Err(Error::Usage {
                message: "cannot copy directly from one VM to another".into(),
                hint: Some(format!(
                    "nexusctl cp {}:{} - | nexusctl cp - {}:{}",
                    src.vm, src.path, dst.vm, dst.path
                )),
            });
        }
        (End::Here(src), End::Vm(dst)) => inwards::tree(app, &src, &dst, how, &meter).await?,
        (End::Pipe, End::Vm(dst)) => inwards::tar(app, &dst, how, &meter).await?,
        (End::Vm(src), End::Here(dst)) => outwards::tree(app, &src, &dst, how, &meter).await?,
        (End::Vm(src), End::Pipe) => {
            let summary = outwards::tar(app, &src, how, &meter).await?;
            return Ok(complain(app, &summary));
        }
        (_, _) => {
            return Err(Error::Usage {
                message: "either SRC or DST must be in a VM".into(),
                hint: Some("use VM:PATH, such as `nexusctl cp file web-1:/srv/`".into()),
            });
        }
    };
    let code = complain(app, &copied);
    match app.ui.format {
        Format::Json => {
            let done = TreeCopied { to: shown, summary: copied, tracked: false, not_tracked_why: None };
            app.ui.json(&raw(&done)?)?;
        }
        Format::Human => app.ui.say(&format!("Copied {} to {shown}", words(&copied))),
        Format::Quiet => {}
    }
    Ok(code)
}

/// What was copied, such as `3 files, 1.2 MiB`.
fn words(summary: &TreeSummary) -> String {
    let files = summary.files + summary.hard_links + summary.symlinks;
    let what = match (files, summary.directories) {
        (0, 1) => "1 directory".to_owned(),
        (0, directories @ 2..) => format!("{directories} directories"),
        (files, _) => format::count(files, "file"),
    };
    format!("{what}, {}", format::size(summary.bytes))
}

/// Warns of files that were skipped unexpectedly; returns the exit code.
fn complain(app: &App, summary: &TreeSummary) -> u8 {
    let is_asked_for = |why| matches!(why, SkipReason::Excluded | SkipReason::Ignored);
    let skipped = &summary.skipped;
    let mut more = skipped.special + skipped.unreadable + skipped.changed;
    let names = summary.skipped_names.iter().filter(|left| !is_asked_for(left.why));
    for SkippedEntry { path, why } in names.take(SHOWN) {
        let why = match why {
            SkipReason::Special => "skipped: a device, a pipe or a socket",
            SkipReason::Changed => "skipped: removed or truncated during the copy",
            _ => "skipped: cannot be read",
        };
        app.ui.warn(&format!("{}: {why}", format::tame(path)));
        more = more.saturating_sub(1);
    }
    if more > 0 {
        app.ui.warn(&format!("{more} more were skipped"));
    }
    if skipped.is_incomplete() { FAILED } else { 0 }
}

/// Waits for a signal that terminates programs.
async fn interrupted() -> Result<(), Error> {
    let listen = |kind| signal(kind).map_err(|source| Error::Input { source });
    let [mut interrupt, mut terminate, mut hangup] =
        [listen(SignalKind::interrupt())?, listen(SignalKind::terminate())?, listen(SignalKind::hangup())?];
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
        _ = hangup.recv() => {}
    }
    Ok(())
}

/// Prints how much of the file is already there.
fn resuming(app: &App, bytes: u64) {
    if bytes > 0 {
        app.ui.say(&format!("Resuming after {}", format::size(bytes)));
    }
}

/// Only the copy of a file can be resumed.
fn not_a_file(path: &str) -> Error {
    Error::Usage {
        message: format!("{path} is not a file, and --resume is for a file"),
        hint: Some("copy it without --resume".into()),
    }
}

/// A failure on this host.
fn here(error: ToolError) -> Error {
    ToolError { message: format!("on this host: {}", error.message), ..error }.into()
}

/// Why a tree could not be read on this host.
fn failed_here(error: &TreeError) -> Error {
    here(error.to_tool_error())
}

/// A guest's error, with advice.
fn of_guest(error: Error, at: &InVm) -> Error {
    let Error::Guest(mut refusal) = error else { return error };
    refusal.about = About::subject("vm", Some(&at.vm.to_string()));
    if refusal.error.hint.is_none() {
        refusal.error.hint = match (refusal.error.code, refusal.error.errno.as_deref()) {
            (ErrorCode::FileNotFound, _) => {
                let parent = Path::new(&at.path).parent().unwrap_or(Path::new("/")).display();
                Some(format!("list the directory: `nexusctl guest ls {} {parent}`", at.vm))
            }
            (ErrorCode::DiskFull, _) => {
                Some("free space in the VM, then copy again: copied files are complete".into())
            }
            (_, Some("EACCES" | "EPERM")) => Some("choose a user with permission: --user root".into()),
            (_, _) => None,
        };
    }
    Error::Guest(refusal)
}

/// Parses the guest's final message.
fn ended(words: &[u8], at: &InVm) -> Result<TreeSummary, Error> {
    Ok(tree_ended(words, at)?.summary)
}

/// The same with all that the guest says.
fn tree_ended(words: &[u8], at: &InVm) -> Result<TreeEnded, Error> {
    let misbehaved =
        |what: &str| ToolError::new(ErrorCode::GuestMisbehaved, format!("{}: {what}", at.vm)).into();
    match serde_json::from_slice(words) {
        Ok(Done::Ok(Ended { tree: Some(tree), .. })) => Ok(*tree),
        Ok(Done::Ok(_)) => Err(misbehaved("its final message does not say what was copied")),
        Ok(Done::Error(error)) if error.code.may_be_of_guest() => {
            let message = format!("inside {}: {}", at.vm, format::tame(&error.message));
            let hint =
                error.hint.as_deref().map(|hint| format!("the guest suggests: {}", format::tame(hint)));
            let errno = error.errno.filter(|errno| is_errno(errno));
            let refusal =
                Refusal { error: ToolError { message, hint, errno, ..error }, about: About::default() };
            Err(of_guest(Error::Guest(refusal), at))
        }
        Ok(Done::Error(_)) | Err(_) => Err(misbehaved("its final message is malformed")),
    }
}

/// The stream was lost.
fn lost(error: &FrameError, at: &InVm) -> Error {
    let text = format!("{}: the stream was interrupted: {error}", at.vm);
    let error = ToolError::new(ErrorCode::GuestUnreachable, text)
        .hint("copied files are complete; check vm_inspect, then copy again");
    let about = About::subject("vm", Some(&at.vm.to_string()));
    Error::Tool(Refusal { error, about })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_copied_is_one_line() {
        for (files, directories, bytes, expected) in [
            (3, 1, 1_258_291, "3 files, 1.2 MiB"),
            (1, 0, 5, "1 file, 5 B"),
            (0, 1, 0, "1 directory, 0 B"),
            (0, 2, 0, "2 directories, 0 B"),
            (0, 0, 0, "0 files, 0 B"),
        ] {
            let summary = TreeSummary { files, directories, bytes, ..TreeSummary::default() };
            assert_eq!(words(&summary), expected);
        }
    }
}
