//! Runs one copy between known places.

use nexus_schema::stream::{Done, Ended, Open, TreeEnded, TreeInOpening, TreeOutOpening};
use nexus_schema::tools::tree::TreeSummary;
use nexus_schema::{ErrorCode, ToolError};
use nexus_tree::{
    ChunkReader, ChunkWriter, Limits, Owner, Packing, Source, Top, TreeError, Unpacking, pack, plan, stream,
    unpack,
};
use nexus_wire::frames::FrameError;

use super::guest::{Guest, Stream};
use super::{HostPath, on_host};
use crate::progress::Progress;

/// Bytes that must stay free on the host's disk.
const KEEP_FREE: u64 = 256 << 20;
/// Amount of work between two progress updates, in bytes and in entries.
const SHOW_EVERY: (u64, u64) = (1 << 20, 200);

/// A tree to copy into a VM.
pub(crate) struct In {
    pub(crate) source: Source,
    pub(crate) packing: Packing,
    pub(crate) opening: TreeInOpening,
}

/// A tree to copy out of a VM.
pub(crate) struct Out {
    pub(crate) opening: TreeOutOpening,
    /// The directory to copy to, and the name there; without a name, into the directory itself.
    pub(crate) into: HostPath,
    pub(crate) top: String,
}

impl In {
    /// What would be copied.
    pub(crate) async fn plan(self, progress: &Progress) -> Result<(Self, TreeSummary), ToolError> {
        let mut watch = shown(progress, None);
        blocking(move || {
            let planned = plan(&self.source, &self.packing, &mut watch);
            let summary = planned.map_err(|e| on_host(e.to_tool_error()))?;
            Ok((self, summary))
        })
        .await
    }

    /// Copies it.
    pub(crate) async fn run(self, guest: &Guest, progress: &Progress) -> Result<TreeEnded, ToolError> {
        unless_cancelled(progress, self.copy(guest, progress)).await
    }

    async fn copy(self, guest: &Guest, progress: &Progress) -> Result<TreeEnded, ToolError> {
        progress.step("reading the tree");
        let (this, planned) = self.plan(progress).await?;
        let Self { source, packing, opening } = this;
        let Stream { mut receiver, sender } = guest.open(Open::TreeIn(Box::new(opening))).await?;
        progress.step("copying into the VM");
        let mut watch = shown(progress, Some(planned.bytes));
        let (into, from) = nexus_tree::chunks();
        let work = blocking(move || {
            let packed = pack(&source, &packing, &mut ChunkWriter::new(into), &mut watch);
            packed.map_err(|e| on_host(e.to_tool_error()))
        });
        let sending = stream::send(&mut receiver, &sender, from);
        let (sent, packed) = tokio::join!(sending, work);
        let words = match sent.map_err(|e| lost(guest, &e))? {
            // The guest failed first: its reason is the cause.
            Some(words) => words,
            None => {
                // Without the end mark the guest discards what it has unpacked.
                let packed = packed?;
                sender.end().await.map_err(|e| lost(guest, &e))?;
                let words = stream::last_words(&mut receiver).await.map_err(|e| lost(guest, &e))?;
                let mut ended = ended(guest, &words)?;
                // The guest does not know what was skipped.
                ended.summary.skipped = packed.skipped;
                ended.summary.skipped_names = packed.skipped_names;
                return Ok(ended);
            }
        };
        ended(guest, &words)
    }
}

impl Out {
    /// What would be copied.
    pub(crate) async fn plan(&self, guest: &Guest) -> Result<TreeSummary, ToolError> {
        let opening = TreeOutOpening { plan: true, ..self.opening.clone() };
        let mut stream = guest.open(Open::TreeOut(Box::new(opening))).await?;
        let words = stream::last_words(&mut stream.receiver).await.map_err(|e| lost(guest, &e))?;
        Ok(ended(guest, &words)?.summary)
    }

    /// Copies it.
    pub(crate) async fn run(self, guest: &Guest, progress: &Progress) -> Result<TreeEnded, ToolError> {
        unless_cancelled(progress, self.copy(guest, progress)).await
    }

    async fn copy(self, guest: &Guest, progress: &Progress) -> Result<TreeEnded, ToolError> {
        let Stream { mut receiver, sender } = guest.open(Open::TreeOut(Box::new(self.opening))).await?;
        progress.step("copying out of the VM");
        let mut watch = shown(progress, None);
        let (into, from) = nexus_tree::chunks();
        let (host, top) = (self.into, self.top);
        let work = blocking(move || {
            let directory = host.directory()?;
            let mut how = Unpacking {
                owner: Owner::OfDirectory,
                // Setuid and similar bits of a guest's files must not take effect on the host.
                modes: 0o777,
                top: if top.is_empty() { Top::Kept } else { Top::Only(top.into_bytes()) },
                limits: Limits { keep_free: KEEP_FREE, ..Limits::default() },
                ..Unpacking::default()
            };
            let unpacked = unpack(ChunkReader::new(from), directory, &mut how, &mut watch);
            unpacked.map_err(|broken| on_host(broken.to_tool_error()))
        });
        let receiving = stream::receive(&mut receiver, &sender, into);
        let (received, unpacked) = tokio::join!(receiving, work);
        // The guest's error is more useful than the truncated archive.
        let said = match received {
            Ok(Some(words)) => Some(ended(guest, &words)),
            Ok(None) | Err(_) => None,
        };
        let said = match (said, &unpacked) {
            (Some(said), _) => said,
            (None, Ok(_)) => {
                let words = stream::last_words(&mut receiver).await.map_err(|e| lost(guest, &e))?;
                ended(guest, &words)
            }
            (None, Err(error)) => return Err(with_guest(guest, error.clone())),
        };
        let (mut said, unpacked) = match (said, unpacked) {
            (Ok(said), Ok(unpacked)) => (said, unpacked),
            (Err(error), Ok(_)) => return Err(error),
            (Ok(_), Err(error)) => return Err(error),
            (Err(mut error), Err(done)) => {
                // The host reports what is left on the host.
                if let Some((_, left)) = done.message.split_once("; ") {
                    error.message = format!("{}; {left}", error.message);
                }
                return Err(error);
            }
        };
        let skipped = std::mem::take(&mut said.summary);
        said.summary = unpacked;
        let mut all = skipped.skipped;
        all.special += said.summary.skipped.special;
        said.summary.skipped = all;
        said.summary.skipped_names.extend(skipped.skipped_names);
        Ok(said)
    }
}

/// Runs `work` until it is cancelled. Dropping it drops its stream, which ends the packing or unpacking on the other thread.
async fn unless_cancelled<T>(
    progress: &Progress,
    work: impl Future<Output = Result<T, ToolError>>,
) -> Result<T, ToolError> {
    tokio::select! {
        biased;
        () = progress.cancelled() => Err(TreeError::Cancelled.to_tool_error()),
        done = work => done,
    }
}

/// Reports the progress of a copy, and fails once it is cancelled.
fn shown(progress: &Progress, total: Option<u64>) -> impl FnMut(u64, u64) -> Result<(), TreeError> + use<> {
    let (progress, mut next) = (progress.clone(), (0, 0));
    move |bytes, entries| {
        progress.check().map_err(|_| TreeError::Cancelled)?;
        if bytes >= next.0 || entries >= next.1 {
            next = (bytes + SHOW_EVERY.0, entries + SHOW_EVERY.1);
            progress.advance(bytes, total);
        }
        Ok(())
    }
}

/// Parses the guest's final message.
fn ended(guest: &Guest, words: &[u8]) -> Result<TreeEnded, ToolError> {
    match serde_json::from_slice(words) {
        Ok(Done::Ok(Ended { tree: Some(ended), .. })) => Ok(*ended),
        Ok(Done::Ok(_)) => Err(guest.misbehaved("its final message does not say what was copied")),
        Ok(Done::Error(error)) => Err(guest.said(error)),
        Err(_) => Err(guest.misbehaved("its final message is malformed")),
    }
}

fn lost(guest: &Guest, error: &FrameError) -> ToolError {
    let text = format!("{}: the stream was interrupted: {error}", guest.name);
    ToolError::new(ErrorCode::GuestUnreachable, text)
        .hint("copied files are complete; call again to copy the rest")
}

fn with_guest(guest: &Guest, error: ToolError) -> ToolError {
    match error.code {
        ErrorCode::GuestUnreachable => {
            ToolError { message: format!("{}: {}", guest.name, error.message), ..error }
                .hint("copied files are complete; call again to copy the rest")
        }
        _ => error,
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ToolError> + Send + 'static,
) -> Result<T, ToolError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(ToolError::internal(format!("copy a tree: {error}"))))
}
