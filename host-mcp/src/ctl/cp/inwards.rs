//! Copies into a VM.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use nexus_schema::ToolError;
use nexus_schema::error::ErrorCode;
use nexus_schema::stream::{Open, TreeArrival, TreeInOpening, TreeResume};
use nexus_schema::tools::tree::TreeSummary;
use nexus_tree::{Chunk, ChunkWriter, Filter, Packing, Source, chunks, pack, plan};
use tokio::sync::mpsc;

use super::end::{InVm, is_contents};
use super::progress::{self, Meter};
use super::{How, ended, failed_here, here, interrupted, lost, not_a_file, of_guest, resuming, tree_ended};
use crate::ctl::App;
use crate::ctl::error::Error;
use crate::ctl::stream::{self, Stream, input};

/// The name at the top of a stream if the source has none.
const NAMELESS: &[u8] = b"tree";

/// Copies a local file or tree.
pub(super) async fn tree(
    app: &App,
    from: &Path,
    to: &InVm,
    how: How,
    meter: &Meter,
) -> Result<TreeSummary, Error> {
    let filter = Filter::new(&how.exclude, false).map_err(|error| failed_here(&error))?;
    let source = Source::open(from, how.follow).map_err(|error| failed_here(&error))?;
    let what = match (is_contents(from.as_os_str()), source.is_directory()) {
        (true, _) => TreeArrival::Contents,
        (false, true) => TreeArrival::Directory,
        (false, false) => TreeArrival::File,
    };
    let top = own_name(from)?.unwrap_or_else(|| NAMELESS.to_vec());
    let mut packing = Packing { top, filter, specials: false, from: 0 };
    let mut opening = TreeInOpening { arrival: Some(what), ..opening(to, &how) };
    let mut source = source;
    if how.resume {
        if !source.is_file() {
            return Err(not_a_file(&from.display().to_string()));
        }
        let name = String::from_utf8(packing.top.clone())
            .map_err(|_| Error::usage("--resume needs a name in UTF-8"))?;
        let resume = TreeResume { name, from: None };
        (source, packing.from) = same_part(
            app,
            source,
            TreeInOpening { resume: Some(resume.clone()), ..opening.clone() },
            to,
            meter,
        )
        .await?;
        resuming(app, packing.from);
        opening.resume = Some(TreeResume { from: Some(packing.from), ..resume });
    }
    let mut stream = open(app, to, opening).await?;
    // The total is determined only if progress is shown.
    let (source, packing, total) = match progress::is_shown(app) {
        false => (source, packing, None),
        true => {
            let mut watch = meter.wanted();
            let planned = tokio::task::spawn_blocking(move || {
                let total = plan(&source, &packing, &mut watch).map(|planned| planned.bytes);
                (source, packing, total)
            });
            let planned = tokio::select! {
                planned = planned => planned,
                done = interrupted() => {
                    meter.cancel();
                    return Err(done.err().unwrap_or(Error::Interrupted));
                }
            };
            let (source, packing, total) = planned.map_err(|error| crashed(&error))?;
            (source, packing, Some(total.map_err(|error| failed_here(&error))?))
        }
    };
    let (into, chunks) = chunks();
    let mut watch = meter.watch();
    let packed =
        tokio::task::spawn_blocking(move || pack(&source, &packing, &mut ChunkWriter::new(into), &mut watch));
    let copying = async {
        let sent = stream::send(&mut stream, chunks).await.map_err(|error| lost(&error, to))?;
        if let Some(words) = sent {
            // The guest failed first: its reason is the cause.
            meter.cancel();
            return ended(&words, to);
        }
        let packed = packed.await.map_err(|error| crashed(&error))?.map_err(|error| failed_here(&error))?;
        if packed.entries() == 0 && packed.skipped.special > 0 {
            let text = format!("{} is a device, a pipe or a socket", from.display());
            return Err(here(
                ToolError::new(ErrorCode::FileRefused, text)
                    .hint("pipe its content: `... | nexusctl guest write VM PATH`"),
            ));
        }
        let summary = finish(stream, to).await?;
        // The guest does not know what was skipped.
        Ok(TreeSummary {
            skipped: packed.skipped,
            skipped_names: packed.skipped_names,
            last: None,
            ..summary
        })
    };
    let step = format!("copying to {}", to.vm);
    tokio::select! {
        done = progress::shown(app, meter, step, total, copying) => done,
        // Without the end mark the VM discards what it has unpacked.
        done = interrupted() => Err(done.err().unwrap_or(Error::Interrupted)),
    }
}

/// How many bytes of a file are in the VM already, left by an interrupted copy.
async fn same_part(
    app: &App,
    source: Source,
    opening: TreeInOpening,
    to: &InVm,
    meter: &Meter,
) -> Result<(Source, u64), Error> {
    let mut stream = open(app, to, opening).await?;
    let looking = async {
        // Nothing is copied, and the guest waits for the end of the data.
        stream.sender.end().await.map_err(|error| lost(&error, to))?;
        let words =
            nexus_tree::stream::last_words(&mut stream.receiver).await.map_err(|error| lost(&error, to))?;
        let Some(part) = tree_ended(&words, to)?.part else { return Ok((source, 0)) };
        let mut watch = meter.wanted();
        let compared = tokio::task::spawn_blocking(move || {
            let same = source.same_part(&part, &mut watch);
            (source, same)
        });
        let (source, same) = compared.await.map_err(|error| crashed(&error))?;
        Ok((source, same.map_err(|error| failed_here(&error))?))
    };
    tokio::select! {
        done = looking => done,
        done = interrupted() => {
            meter.cancel();
            Err(done.err().unwrap_or(Error::Interrupted))
        }
    }
}

/// Unpacks the tar stream of standard input.
pub(super) async fn tar(app: &App, to: &InVm, how: How, meter: &Meter) -> Result<TreeSummary, Error> {
    if !how.exclude.is_empty() || how.follow {
        return Err(Error::usage(
            "--exclude and --follow-link do not work with a tar stream on standard input",
        ));
    }
    let mut pieces = input();
    let first = match pieces.recv().await {
        Some(first) => first.map_err(|source| Error::Input { source })?,
        None => return Err(Error::usage("standard input is empty: a tar stream was expected")),
    };
    if let Some(program) = compressed(&first) {
        return Err(Error::Usage {
            message: format!("standard input is compressed by {program}"),
            hint: Some(format!("unpack it first: {program} -dc FILE | nexusctl cp - {}:{}", to.vm, to.path)),
        });
    }
    let mut stream = open(app, to, opening(to, &how)).await?;
    let (into, chunks) = chunks();
    let counted = meter.clone();
    let passing = tokio::spawn(pass(first, pieces, into, counted));
    let copying = async {
        let sent = stream::send(&mut stream, chunks).await;
        match sent {
            Ok(Some(words)) => return ended(&words, to),
            Ok(None) => {}
            // On this side, only reading stdin can fail.
            Err(error) => match passing.await {
                Ok(Err(source)) => return Err(Error::Input { source }),
                Ok(Ok(())) | Err(_) => return Err(lost(&error, to)),
            },
        }
        finish(stream, to).await
    };
    let step = format!("copying to {}", to.vm);
    tokio::select! {
        done = progress::shown(app, meter, step, None, copying) => done,
        done = interrupted() => Err(done.err().unwrap_or(Error::Interrupted)),
    }
}

/// Passes pieces on. If one cannot be read, the stream must know it too, so that it gets no end mark.
async fn pass(
    first: Vec<u8>,
    mut pieces: mpsc::Receiver<std::io::Result<Vec<u8>>>,
    into: mpsc::Sender<Chunk>,
    meter: Meter,
) -> std::io::Result<()> {
    let mut next = Some(std::io::Result::Ok(first));
    while let Some(piece) = next {
        let (chunk, failed) = match piece {
            Ok(bytes) => (Ok(Bytes::from(bytes)), None),
            Err(error) => (Err(std::io::Error::from(error.kind())), Some(error)),
        };
        meter.add(chunk.as_ref().map_or(0, |bytes| bytes.len() as u64));
        let sent = into.send(chunk).await;
        if let Some(error) = failed {
            return Err(error);
        }
        if sent.is_err() {
            return Ok(());
        }
        next = pieces.recv().await;
    }
    Ok(())
}

/// The program that a stream was compressed with.
fn compressed(first: &[u8]) -> Option<&'static str> {
    const KNOWN: [(&[u8], &str); 4] =
        [(b"\x1f\x8b", "gzip"), (b"BZh", "bzip2"), (b"\xfd7zXZ", "xz"), (b"\x28\xb5\x2f\xfd", "zstd")];
    KNOWN.iter().find(|(magic, _)| first.starts_with(magic)).map(|(_, program)| *program)
}

fn opening(to: &InVm, how: &How) -> TreeInOpening {
    TreeInOpening {
        directory: to.path.clone(),
        user: how.user.clone(),
        own: true,
        same_owner: how.archive,
        ..TreeInOpening::default()
    }
}

async fn open(app: &App, to: &InVm, opening: TreeInOpening) -> Result<Stream, Error> {
    let mut client = app.connect().await?;
    let open = Open::TreeIn(Box::new(opening));
    stream::open(app, &mut client, &to.vm, open).await.map_err(|mut error| {
        if let Error::Guest(refusal) = &mut error
            && refusal.error.errno.as_deref() == Some("ENOENT")
            && let Some(parent) = Path::new(&to.path).parent()
        {
            let parent = parent.display();
            let hint = format!("create the directory first: `nexusctl exec {} -- mkdir -p {parent}`", to.vm);
            refusal.error.hint.get_or_insert(hint);
        }
        of_guest(error, to)
    })
}

/// Sends the end mark, and waits until everything is in its place.
async fn finish(stream: Stream, to: &InVm) -> Result<TreeSummary, Error> {
    let Stream { mut receiver, sender, .. } = stream;
    sender.end().await.map_err(|error| lost(&error, to))?;
    let words = nexus_tree::stream::last_words(&mut receiver).await.map_err(|error| lost(&error, to))?;
    ended(&words, to)
}

/// The name of a local path; none for the root.
fn own_name(path: &Path) -> Result<Option<Vec<u8>>, Error> {
    let name = |path: &Path| path.file_name().map(|name| name.as_bytes().to_vec());
    match name(path) {
        Some(name) => Ok(Some(name)),
        // `..` or similar.
        None => {
            let fail = |source| Error::File { what: "read", path: PathBuf::from(path), source };
            Ok(name(&std::fs::canonicalize(path).map_err(fail)?))
        }
    }
}

fn crashed(error: &tokio::task::JoinError) -> Error {
    Error::Unexpected { what: format!("the copy failed: {error}") }
}
