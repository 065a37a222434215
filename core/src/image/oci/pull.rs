//! Pulls an image. A few blobs at a time are downloaded into a layout of the build's own; a layer is unpacked as soon as
//! it and all layers below it are there.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use tokio::io::AsyncWriteExt;
use tokio::sync::mpsc;

use super::blobs::{Blobs, missing, name_of};
use super::digest::shown;
use super::document::{self, Blob, DOCUMENT_MAX, Descriptor, Document};
use super::registry::Resolved;
use super::{INDEXES_MAX, Image, ImageError, OciError, image_of, put_layer};
use crate::image::place::Place;
use crate::image::place::check_room;
use crate::image::source::{Room, Staged, blocking};
use crate::os::failpoint;
use crate::progress::Progress;

/// How many blobs are downloaded at once.
const AT_ONCE: usize = 3;
/// How many failures of one blob are tolerated.
pub(super) const RETRIES: u32 = 4;
/// The delay after the first failure; it doubles with each one.
pub(super) const BACKOFF: Duration = Duration::from_millis(500);
/// After how many bytes the free disk space is checked again.
const LOOK: u64 = 16 << 20;

/// Pulls an image into the place's scratch directory.
pub(crate) async fn stage(
    resolved: Resolved,
    room: Room,
    progress: &Progress,
) -> Result<(Place, Staged), ImageError> {
    progress.step("reading the image's manifest");
    let Room { place, limits, .. } = &room;
    let directory = place.scratch().join("layout");
    let pull = Arc::new(Pull {
        resolved,
        directory: directory.clone(),
        keep_free: limits.keep_free,
        bytes: AtomicU64::new(0),
        total: AtomicU64::new(0),
    });
    let image = tokio::select! {
        image = pull.image(progress) => image?,
        () = progress.cancelled() => return Err(ImageError::Cancelled),
    };
    let layers: Vec<Blob> = image.layers.iter().map(|(blob, _)| blob.clone()).collect();
    let mut wanted: Vec<Blob> = Vec::new();
    for blob in &layers {
        // Layers without changes have the same digest.
        if !wanted.contains(blob) {
            wanted.push(blob.clone());
        }
    }
    let total = wanted.iter().fold(0, |sum: u64, blob| sum.saturating_add(blob.size));
    if total > limits.bytes {
        return Err(ImageError::TooLarge { limit: limits.bytes, what: "bytes of layers" });
    }
    check_room(place.scratch(), total.saturating_add(limits.keep_free))?;
    pull.total.store(total, Ordering::Relaxed);
    progress.step(format!("downloading {} layers", layers.len()));
    progress.advance(0, Some(total));

    let (there, arrivals) = mpsc::channel(wanted.len().max(1));
    // Its own progress would replace that of the downloads.
    let quiet = Progress::new(progress.token().clone());
    let shown = progress.clone();
    let of = pull.clone();
    let reading = quiet.clone();
    let reader = blocking(room, &reading, move |staged, limits| {
        let mut arrivals = Arrivals { there: Vec::new(), arrivals };
        let mut blobs = Blobs::Directory(directory);
        let count = image.layers.len();
        for (at, (blob, diff_id)) in image.layers.iter().enumerate() {
            arrivals.wait_for(blob)?;
            if of.is_whole() {
                shown.step(format!("unpacking layer {} of {count}", at + 1));
            }
            let name = name_of(&blob.digest);
            let content = blobs.open(&name)?.ok_or_else(|| missing(&name))?;
            put_layer(content, diff_id, staged, limits, &quiet)?;
        }
        staged.config = Some(image.config);
        Ok(())
    });
    let fetched = async {
        let all = futures::stream::iter(wanted)
            .map(|blob| pull.fetch(blob, progress))
            .buffered(AT_ONCE)
            .map_err(ImageError::from)
            .try_for_each(async |blob| {
                // If the reader stopped early, its own error says why.
                there.send(blob).await.map_err(|_| ImageError::Worker)
            });
        let fetched = tokio::select! {
            fetched = all => fetched,
            // Stops downloading once the image was refused.
            () = there.closed() => Err(ImageError::Worker),
            () = progress.cancelled() => Err(ImageError::Cancelled),
        };
        drop(there);
        fetched
    };
    let (read, fetched) = tokio::join!(reader, fetched);
    progress.check()?;
    match (read, fetched) {
        // The reader is done only after it had every layer.
        (Ok(staged), Ok(()) | Err(ImageError::Worker)) => Ok(staged),
        // A reader that waits in vain reports only that; the download's error is the cause.
        (Err(ImageError::Worker) | Ok(_), Err(error)) => Err(error),
        (Err(error), _) => Err(error),
    }
}

/// The blobs that have arrived.
struct Arrivals {
    there: Vec<Blob>,
    arrivals: mpsc::Receiver<Blob>,
}

impl Arrivals {
    fn wait_for(&mut self, blob: &Blob) -> Result<(), ImageError> {
        while !self.there.contains(blob) {
            self.there.push(self.arrivals.blocking_recv().ok_or(ImageError::Worker)?);
        }
        Ok(())
    }
}

impl Resolved {
    /// The manifest of the image for this machine: the descriptors of its configuration and its layers.
    async fn manifest(&self) -> Result<(Descriptor, Vec<Descriptor>), OciError> {
        let mut document = Document::parse(&self.document)?;
        for _ in 0..INDEXES_MAX {
            match document {
                Document::Manifest { config, layers } => return Ok((config, layers)),
                Document::Index(entries) => {
                    let chosen = document::choose(&entries, None, document::architecture())?;
                    document = Document::parse(&self.remote.manifest(&chosen.blob()?).await?)?;
                }
            }
        }
        Err(OciError::Document { what: "its indexes are nested too deeply".into() })
    }

    /// The total size that its configuration and layers state.
    pub(crate) async fn download_bytes(&self) -> Result<u64, OciError> {
        let (config, layers) = self.manifest().await?;
        let mut bytes = config.blob()?.size;
        let mut seen = Vec::new();
        for layer in &layers {
            let blob = layer.blob()?;
            if !seen.contains(&blob) {
                bytes = bytes.saturating_add(blob.size);
                seen.push(blob);
            }
        }
        Ok(bytes)
    }
}

struct Pull {
    resolved: Resolved,
    directory: PathBuf,
    keep_free: u64,
    /// Bytes downloaded, and bytes in total.
    bytes: AtomicU64,
    total: AtomicU64,
}

impl Pull {
    fn is_whole(&self) -> bool {
        self.bytes.load(Ordering::Relaxed) >= self.total.load(Ordering::Relaxed)
    }

    /// Resolves the name to the image for this machine.
    async fn image(&self, progress: &Progress) -> Result<Image<Blob>, ImageError> {
        let (config, layers) = self.resolved.manifest().await?;
        let blob = config.blob()?;
        if blob.size > DOCUMENT_MAX {
            let limit = nexus_schema::ByteSize::bytes(DOCUMENT_MAX);
            return Err(OciError::TooLarge { what: "its configuration".into(), limit }.into());
        }
        let blob = self.fetch(blob, progress).await?;
        let mut blobs = Blobs::Directory(self.directory.clone());
        self.bytes.store(0, Ordering::Relaxed);
        Ok(image_of(&blobs.verified_document(&blob)?, &layers)?)
    }

    /// Downloads a blob, resuming after interruptions, and verifies it.
    async fn fetch(&self, blob: Blob, progress: &Progress) -> Result<Blob, ImageError> {
        let path = self.directory.join(name_of(&blob.digest));
        let parent = path.parent().unwrap_or(&self.directory);
        fs_err::tokio::create_dir_all(parent).await.map_err(|e| ImageError::write(parent, e))?;
        let file = fs_err::tokio::File::create(&path).await.map_err(|e| ImageError::write(&path, e))?;
        let mut sink = Sink { path: &path, file, hasher: blob.digest.hasher(), written: 0, unseen: 0 };
        let mut failures = 0;
        loop {
            match self.go_on(&blob, &mut sink, progress).await {
                Ok(()) => break,
                Err(ImageError::Oci(error)) if failures < RETRIES && is_passing(&error) => {
                    tracing::debug!(%error, failures, "a blob is asked for again");
                    tokio::time::sleep(BACKOFF * 2_u32.pow(failures)).await;
                    failures += 1;
                }
                Err(error) => return Err(error),
            }
        }
        sink.file.flush().await.map_err(|e| ImageError::write(&path, e))?;
        let what = format!("the blob {}", shown(&blob.digest.to_string()));
        super::blobs::check_size(&what, &blob, sink.written)?;
        blob.digest.expect(&what, sink.hasher)?;
        failpoint::reach("image-blob");
        Ok(blob)
    }

    async fn go_on(&self, blob: &Blob, sink: &mut Sink<'_>, progress: &Progress) -> Result<(), ImageError> {
        let (goes_on, mut pieces) = self.resolved.remote.blob(blob, sink.written).await?;
        if !goes_on && sink.written > 0 {
            self.bytes.fetch_sub(sink.written, Ordering::Relaxed);
            sink.start_over(blob).await?;
        }
        while let Some(piece) = pieces.next().await {
            let piece = match piece {
                // The blob is complete, so an error at the end of the connection does not matter.
                Err(_) if sink.written == blob.size => return Ok(()),
                piece => piece?,
            };
            if sink.written + piece.len() as u64 > blob.size {
                let what = format!("the blob {}", shown(&blob.digest.to_string()));
                let found = blob.size.saturating_add(1);
                return Err(OciError::Size { what, expected: blob.size, found }.into());
            }
            sink.write(&piece, self.keep_free).await?;
            let bytes = self.bytes.fetch_add(piece.len() as u64, Ordering::Relaxed) + piece.len() as u64;
            let total = self.total.load(Ordering::Relaxed);
            if total > 0 {
                progress.advance(bytes, Some(total));
            }
        }
        Ok(())
    }
}

/// Whether a retry may help.
pub(super) fn is_passing(error: &OciError) -> bool {
    match error {
        OciError::Transfer { .. } | OciError::Slow { .. } => true,
        OciError::Status { status, .. } => matches!(status, 408 | 429 | 500..=599),
        _ => false,
    }
}

/// A blob that is being written.
struct Sink<'p> {
    path: &'p Path,
    file: fs_err::tokio::File,
    hasher: super::digest::Hasher,
    written: u64,
    unseen: u64,
}

impl Sink<'_> {
    async fn write(&mut self, piece: &[u8], keep_free: u64) -> Result<(), ImageError> {
        self.hasher.update(piece);
        self.file.write_all(piece).await.map_err(|e| ImageError::write(self.path, e))?;
        self.written += piece.len() as u64;
        self.unseen += piece.len() as u64;
        if self.unseen >= LOOK {
            self.unseen = 0;
            check_room(self.path.parent().unwrap_or(self.path), keep_free)?;
        }
        Ok(())
    }

    async fn start_over(&mut self, blob: &Blob) -> Result<(), ImageError> {
        self.file =
            fs_err::tokio::File::create(self.path).await.map_err(|e| ImageError::write(self.path, e))?;
        self.hasher = blob.digest.hasher();
        self.written = 0;
        Ok(())
    }
}
