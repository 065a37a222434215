//! Copies out of a VM. The data is not trusted: it is unpacked only under the requested name.

use std::io::{ErrorKind, IsTerminal};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use nexus_schema::error::ErrorCode;
use nexus_schema::stream::{Open, TreeArrival, TreeOutOpening, TreePart};
use nexus_schema::tools::tree::TreeSummary;
use nexus_tree::{
    Broken, ChunkReader, Limits, Owner, Part, Target, Top, TopIs, TreeError, Unpacking, chunks, target,
    unpack,
};

use super::end::InVm;
use super::progress::{self, Meter};
use super::{How, ended, here, interrupted, lost, not_a_file, of_guest};
use crate::ctl::App;
use crate::ctl::error::Error;
use crate::ctl::stream::{self, Stream, write_all};

/// The name at the top of a stream if the source has none.
const NAMELESS: &str = "tree";
/// How long an interrupted copy may take to remove its partial files.
const UNDO_TIMEOUT: Duration = Duration::from_secs(10);
/// The mode bits that are applied: setuid and setgid of a guest's files must not take effect here.
const MODES: u32 = 0o1777;
/// The same if owners are kept, too.
const MODES_OF_ARCHIVE: u32 = 0o7777;

/// Copies a file or a tree to this host.
pub(super) async fn tree(
    app: &App,
    from: &InVm,
    to: &Path,
    how: How,
    meter: &Meter,
) -> Result<TreeSummary, Error> {
    if how.archive && !rustix::process::geteuid().is_root() {
        return Err(Error::Usage {
            message: "--archive keeps the owners, which needs root on this host".into(),
            hint: Some("omit --archive, or run nexusctl as root".into()),
        });
    }
    let archive = how.archive;
    let total = match progress::is_shown(app) {
        true => Some(plan(app, from, &how).await?.bytes),
        false => None,
    };
    let mut part = match how.resume {
        true => Some(find_part(from, to, meter).await?),
        false => None,
    };
    let described = part.as_ref().map(|(_, part)| part.clone()).filter(|part| part.bytes > 0);
    let stream = open(app, from, TreeOutOpening { part: described, ..opening(from, &how) }).await?;
    let Stream { opened, mut receiver, sender } = stream;
    if how.resume && opened.is_directory {
        return Err(not_a_file(&format!("{}:{}", from.vm, from.path)));
    }
    let what = match (from.is_contents(), opened.is_directory) {
        (true, _) => TreeArrival::Contents,
        (false, true) => TreeArrival::Directory,
        (false, false) => TreeArrival::File,
    };
    let Target { directory, under } = target(to, what).map_err(|error| match &error {
        TreeError::File { source, .. } if source.kind() == ErrorKind::NotFound => {
            here(error.to_tool_error().hint("create the directory first: mkdir -p"))
        }
        _ => here(error.to_tool_error()),
    })?;
    let own = from.name.as_deref().unwrap_or(NAMELESS).as_bytes().to_vec();
    let top = under.top(&own);
    let top_is = match what {
        TreeArrival::File => TopIs::Within,
        TreeArrival::Directory | TreeArrival::Contents => TopIs::Directory,
    };
    let (into, chunks) = chunks();
    let mut watch = meter.watch();
    let work = tokio::task::spawn_blocking(move || {
        let mut how = Unpacking {
            owner: if archive { Owner::Same } else { Owner::Own },
            modes: if archive { MODES_OF_ARCHIVE } else { MODES },
            top,
            top_is,
            part: part.take().map(|(part, _)| part),
            limits: Limits { entries: u64::MAX, bytes: u64::MAX >> 1, ..Limits::default() },
            ..Unpacking::default()
        };
        unpack(ChunkReader::new(chunks), directory, &mut how, &mut watch)
    });
    let mut work = std::pin::pin!(work);
    let copying = async {
        let received = nexus_tree::stream::receive(&mut receiver, &sender, into);
        let (received, unpacked) = tokio::join!(received, &mut work);
        let unpacked =
            unpacked.map_err(|error| Error::Unexpected { what: format!("the copy failed: {error}") })?;
        // The guest's error is more useful than the truncated archive.
        let said = match (received, &unpacked) {
            (Ok(Some(words)), _) => Some(words),
            (Ok(None), Ok(_)) => Some(
                nexus_tree::stream::last_words(&mut receiver).await.map_err(|error| lost(&error, from))?,
            ),
            (Err(error), Err(Broken { error: TreeError::Stream(_), .. })) => return Err(lost(&error, from)),
            (Ok(None) | Err(_), _) => None,
        };
        let said = said.map(|words| ended(&words, from)).transpose();
        let unpacked = match unpacked {
            Ok(unpacked) => unpacked,
            Err(broken) => return Err(said.err().unwrap_or_else(|| broken_here(&broken))),
        };
        let Some(said) = said? else { return Ok(unpacked) };
        Ok(merged(unpacked, said))
    };
    let step = format!("copying from {}", from.vm);
    let interrupted = tokio::select! {
        done = progress::shown(app, meter, step, total, copying) => return done,
        done = interrupted() => done,
    };
    // Partial files are removed before this process ends.
    meter.cancel();
    if !work.is_finished() {
        let _ = tokio::time::timeout(UNDO_TIMEOUT, work).await;
    }
    Err(interrupted.err().unwrap_or(Error::Interrupted))
}

/// What an interrupted copy of a file left here; an empty part if it left none.
async fn find_part(from: &InVm, to: &Path, meter: &Meter) -> Result<(Part, TreePart), Error> {
    let (own, to) = (from.name.clone().unwrap_or_else(|| NAMELESS.to_owned()), to.to_owned());
    let mut watch = meter.wanted();
    let finding = tokio::task::spawn_blocking(move || {
        let Target { directory, under } = target(&to, TreeArrival::File)?;
        let Top::Named(name) = under.top(own.as_bytes()) else {
            return Err(TreeError::refused(own.as_bytes(), "only a copy of one file can be resumed"));
        };
        let mut part = Part::find_or_make(directory.as_fd(), &name)?;
        let described = part.describe(&mut watch)?;
        part.keep(described.bytes)?;
        Ok((part, described))
    });
    let found = tokio::select! {
        found = finding => found,
        done = interrupted() => {
            meter.cancel();
            return Err(done.err().unwrap_or(Error::Interrupted));
        }
    };
    let found = found.map_err(|error| Error::Unexpected { what: format!("the copy failed: {error}") })?;
    found.map_err(|error| here(error.to_tool_error()))
}

/// Writes a tree to standard output as the tar stream from the VM.
pub(super) async fn tar(app: &App, from: &InVm, how: How, meter: &Meter) -> Result<TreeSummary, Error> {
    if app.ui.is_json() {
        return Err(Error::usage("standard output is the tar stream: omit --json"));
    }
    if std::io::stdout().is_terminal() {
        return Err(Error::Usage {
            message: "refusing to write a tar stream to a terminal".into(),
            hint: Some("redirect it to a file or a program: `... - > FILE`, `... - | tar -t`".into()),
        });
    }
    let Stream { mut receiver, sender, .. } = open(app, from, opening(from, &how)).await?;
    let (into, mut chunks) = chunks();
    let counted = meter.clone();
    let writing = tokio::task::spawn_blocking(move || {
        let stdout = std::io::stdout();
        while let Some(chunk) = chunks.blocking_recv() {
            // The receiving side reports why the stream ended.
            let Ok(bytes) = chunk else { return Ok(()) };
            write_all(&stdout, &bytes)?;
            counted.add(bytes.len() as u64);
        }
        Ok(())
    });
    let copying = async {
        let received = nexus_tree::stream::receive(&mut receiver, &sender, into);
        let (received, written) = tokio::join!(received, writing);
        let written =
            written.map_err(|error| Error::Unexpected { what: format!("the copy failed: {error}") })?;
        written.map_err(|source| Error::Output { source })?;
        let words = match received.map_err(|error| lost(&error, from))? {
            Some(words) => words,
            None => {
                nexus_tree::stream::last_words(&mut receiver).await.map_err(|error| lost(&error, from))?
            }
        };
        ended(&words, from)
    };
    let step = format!("copying from {}", from.vm);
    tokio::select! {
        done = progress::shown(app, meter, step, None, copying) => done,
        done = interrupted() => Err(done.err().unwrap_or(Error::Interrupted)),
    }
}

/// How much will be copied.
async fn plan(app: &App, from: &InVm, how: &How) -> Result<TreeSummary, Error> {
    let opening = TreeOutOpening { plan: true, ..opening(from, how) };
    let mut stream = open(app, from, opening).await?;
    let words = tokio::select! {
        words = nexus_tree::stream::last_words(&mut stream.receiver) => words,
        done = interrupted() => return Err(done.err().unwrap_or(Error::Interrupted)),
    };
    ended(&words.map_err(|error| lost(&error, from))?, from)
}

fn opening(from: &InVm, how: &How) -> TreeOutOpening {
    TreeOutOpening {
        path: from.path.clone(),
        follow: how.follow,
        top: from.name.clone().unwrap_or_else(|| NAMELESS.to_owned()),
        user: how.user.clone(),
        exclude: how.exclude.clone(),
        ..TreeOutOpening::default()
    }
}

async fn open(app: &App, from: &InVm, opening: TreeOutOpening) -> Result<Stream, Error> {
    let mut client = app.connect().await?;
    let open = Open::TreeOut(Box::new(opening));
    stream::open(app, &mut client, &from.vm, open).await.map_err(|error| of_guest(error, from))
}

/// The error for a failure to unpack here, with what was copied before.
fn broken_here(broken: &Broken) -> Error {
    let told = broken.to_tool_error();
    here(match told.code {
        ErrorCode::DiskFull => {
            told.hint("free space on that disk, then copy again: copied files are complete")
        }
        _ => told,
    })
}

/// The summary of what was unpacked here, including what either side skipped.
fn merged(here: TreeSummary, there: TreeSummary) -> TreeSummary {
    let mut summary = TreeSummary { last: None, ..here };
    let here = std::mem::replace(&mut summary.skipped, there.skipped);
    summary.skipped.special += here.special;
    summary.skipped_names.extend(there.skipped_names);
    summary
}
