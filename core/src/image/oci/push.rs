//! Pushes an image to a registry: what it lacks of the blobs, then the manifest under the tag.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::stream::{BoxStream, StreamExt};
use http::header::{self, HeaderValue};
use reqwest::{Body, Response, StatusCode, Url};
use tokio::io::AsyncReadExt;

use super::OciError;
use super::digest::{Digest, shown};
use super::document::Blob;
use super::export::{Exported, MANIFEST_TYPE};
use super::pull::{BACKOFF, RETRIES, is_passing};
use super::registry::Remote;
use super::session::Session;
use crate::progress::Progress;

/// How much of a blob is read at once.
const PIECE: usize = 256 << 10;
/// The timeout while nothing is sent; at the end it is the registry's time to check what it got.
const STALL: Duration = Duration::from_secs(120);

/// Where the bytes of a blob are.
#[derive(Debug, Clone)]
enum Content {
    Memory(Bytes),
    File(PathBuf),
}

/// A pushed image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pushed {
    /// The reference with the manifest's digest.
    pub(crate) reference: String,
    /// That digest.
    pub(crate) digest: Digest,
    /// Bytes of the blobs that the registry did not have.
    pub(crate) sent: u64,
}

impl Remote {
    /// Pushes an image under the tag of this reference, which was parsed to push. Blobs that the repository has are not sent; one whose connection is lost
    /// is sent again.
    ///
    /// # Errors
    /// The reference has a digest in place of a tag, access was denied, or the registry refused or does not answer.
    pub(crate) async fn push(&self, image: &Exported, progress: &Progress) -> Result<Pushed, OciError> {
        let pushed = self.push_all(image, progress).await;
        pushed.map_err(|error| match error {
            // Some registries want repositories to be made first.
            OciError::Missing { .. } => self.not_found(),
            other => other,
        })
    }

    async fn push_all(&self, image: &Exported, progress: &Progress) -> Result<Pushed, OciError> {
        let tag = self.tag()?;
        let config = Blob { digest: Digest::of(&image.config), size: image.config.len() as u64 };
        let blobs = [
            (image.layer.clone(), Content::File(image.layer_file.clone())),
            (config, Content::Memory(image.config.clone().into())),
        ];
        let mut sent = 0;
        for (blob, content) in blobs {
            progress.step("asking the registry");
            if self.within("a blob", self.session().has_blob(&blob.digest)).await? {
                continue;
            }
            progress.step("sending the image");
            self.send_blob(&blob, &content, progress).await?;
            sent += blob.size;
        }
        progress.step("sending the manifest");
        let digest = image.digest();
        let put = self.session().put_manifest(tag, image.manifest.clone().into());
        self.within("the manifest", put).await?;
        let reference = self.reference();
        Ok(Pushed { reference: format!("{reference}@{digest}"), digest, sent })
    }

    /// Sends a blob, anew after failures that may pass.
    async fn send_blob(&self, blob: &Blob, content: &Content, progress: &Progress) -> Result<(), OciError> {
        let mut failures = 0;
        loop {
            match self.session().upload(blob, content, progress).await {
                Ok(()) => return Ok(()),
                Err(error) if failures < RETRIES && is_passing(&error) => {
                    tracing::debug!(%error, failures, "a blob is sent again");
                    tokio::time::sleep(BACKOFF * 2_u32.pow(failures)).await;
                    failures += 1;
                }
                Err(error) => return Err(error),
            }
        }
    }
}

impl Session {
    async fn has_blob(&self, digest: &Digest) -> Result<bool, OciError> {
        let what = "a blob";
        let url = self.parsed(&self.url(&format!("blobs/{digest}")))?;
        let response = self.call(&url, what, &|| self.http().head(url.clone())).await?;
        match response.status() {
            StatusCode::NOT_FOUND => Ok(false),
            _ => self.accepted(response, what).await.map(|_| true),
        }
    }

    /// Sends a whole blob: begins an upload, and puts all of it where the registry says.
    async fn upload(&self, blob: &Blob, content: &Content, progress: &Progress) -> Result<(), OciError> {
        let what = format!("the upload of the blob {}", shown(&blob.digest.to_string()));
        let url = self.parsed(&self.url("blobs/uploads/"))?;
        let begin = || self.http().post(url.clone()).header(header::CONTENT_LENGTH, 0);
        let begun = async {
            let begun = self.call(&url, &what, &begin).await?;
            self.accepted(begun, &what).await
        };
        let begun = tokio::time::timeout(STALL, begun).await.unwrap_or_else(|_| Err(self.slow(&what)))?;
        let mut place = self.place_of(&begun)?;
        place.query_pairs_mut().append_pair("digest", &blob.digest.to_string());

        let sent = Arc::new(AtomicU64::new(0));
        let total = blob.size;
        let put = || {
            sent.store(0, Ordering::Relaxed);
            let (counted, shown) = (sent.clone(), progress.clone());
            let pieces = pieces(content).map(move |piece| {
                if let Ok(piece) = &piece {
                    let length = piece.len() as u64;
                    let done = counted.fetch_add(length, Ordering::Relaxed) + length;
                    shown.advance(done, Some(total));
                }
                piece
            });
            self.uploads()
                .put(place.clone())
                .header(header::CONTENT_TYPE, "application/octet-stream")
                .header(header::CONTENT_LENGTH, total)
                .body(Body::wrap_stream(pieces))
        };
        // What a refusal says is waited for no longer than the rest.
        let answered = async {
            let answered = self.call(&place, &what, &put).await?;
            self.accepted(answered, &what).await.map(drop)
        };
        tokio::select! {
            answered = answered => answered,
            () = stalled(&sent) => Err(self.slow(&what)),
        }
    }

    async fn put_manifest(&self, tag: &str, manifest: Bytes) -> Result<(), OciError> {
        let what = format!("the upload of the manifest {}", shown(tag));
        let expected = Digest::of(&manifest);
        let url = self.parsed(&self.url(&format!("manifests/{tag}")))?;
        let put = || {
            self.uploads()
                .put(url.clone())
                .header(header::CONTENT_TYPE, HeaderValue::from_static(MANIFEST_TYPE))
                .body(manifest.clone())
        };
        let response = self.call(&url, &what, &put).await?;
        let response = self.accepted(response, &what).await?;
        let said = response.headers().get("docker-content-digest").and_then(|value| value.to_str().ok());
        match said.and_then(|said| Digest::parse(said).ok()) {
            Some(said) if said != expected => Err(OciError::Digest {
                what: "the manifest in the registry".into(),
                expected: expected.to_string(),
                found: said.to_string(),
            }),
            _ => Ok(()),
        }
    }

    /// Where an upload goes on. Only the registry itself gets it, because the request has its credentials.
    fn place_of(&self, begun: &Response) -> Result<Url, OciError> {
        let location = begun.headers().get(header::LOCATION).and_then(|value| value.to_str().ok());
        let place = location.and_then(|location| begun.url().join(location).ok());
        let own = self.parsed(&self.url(""))?;
        match place {
            Some(place) if place.origin() == own.origin() => Ok(place),
            Some(_) => Err(self.misled("sends uploads to another server")),
            None => Err(self.misled("does not say where an upload goes")),
        }
    }
}

/// Resolves once nothing was sent for [`STALL`].
async fn stalled(sent: &AtomicU64) {
    let mut before = sent.load(Ordering::Relaxed);
    loop {
        tokio::time::sleep(STALL).await;
        let now = sent.load(Ordering::Relaxed);
        if now == before {
            return;
        }
        before = now;
    }
}

/// The bytes of a blob, from its beginning.
fn pieces(content: &Content) -> BoxStream<'static, std::io::Result<Bytes>> {
    match content {
        Content::Memory(bytes) => {
            let bytes = bytes.clone();
            futures::stream::once(async move { Ok(bytes) }).boxed()
        }
        Content::File(path) => of_file(path).boxed(),
    }
}

fn of_file(path: &Path) -> impl futures::Stream<Item = std::io::Result<Bytes>> + Send + use<> {
    let path = path.to_owned();
    futures::stream::try_unfold(None, move |open: Option<fs_err::tokio::File>| {
        let path = path.clone();
        async move {
            let mut file = match open {
                Some(file) => file,
                None => fs_err::tokio::File::open(&path).await?,
            };
            let mut piece = vec![0; PIECE];
            let read = file.read(&mut piece).await?;
            piece.truncate(read);
            Ok::<_, std::io::Error>((read > 0).then(|| (Bytes::from(piece), Some(file))))
        }
    })
}
