//! OCI and Docker images: from a registry, from an OCI layout (a directory or an archive), or from an archive of `docker save`.
//!
//! ```text
//! registry ─ blobs into a layout of the build's own ─┐
//! layout ────────────────────────────────────────────┼─> manifest ─> configuration ─> layers, lowest first ─> one tree
//! archive ─ read like any archive, into a tree ──────┘
//! ```
//! The other way, an image becomes one layer (`export`), in an archive or pushed to a registry.
//!
//! Every blob is checked against its digest and size before it is parsed, and every unpacked layer against its digest in
//! the configuration. Nothing is extracted under a name from the image: image archives are treated as hostile, like
//! archives of root filesystems, and blobs are found by their digests.

mod blobs;
mod credentials;
mod digest;
mod document;
mod error;
mod export;
mod pull;
mod push;
mod reach;
mod registry;
mod session;

use std::path::Path;

use nexus_schema::link::ImageConfig;

pub use credentials::Keychain;
pub use error::OciError;
pub(crate) use export::{About, Exported, export};
pub(crate) use push::Pushed;
pub(crate) use reach::is_public;
pub use registry::{Access, Remote, Resolved};

use super::source::{Staged, unpacked};
use super::tree::{Body, Tree};
use super::{ImageError, Limits, archive};
use crate::progress::Progress;
use blobs::Blobs;
use digest::{Digest, Hashed};
use document::{Blob, Configuration, Document, Saved};

#[cfg(test)]
pub(crate) use document::architecture;
pub(crate) use pull::stage as stage_remote;

/// How deep indexes may be nested.
const INDEXES_MAX: usize = 4;
const LAYOUT: &str = "oci-layout";
const INDEX: &str = "index.json";
const MANIFEST: &str = "manifest.json";
/// The image beside the archive that it comes from.
const IMAGE: &str = "image.ext4";

/// The file format of a saved image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// An OCI layout.
    Layout,
    /// What `docker save` writes.
    Docker,
}

/// An image whose layers are known.
struct Image<T> {
    config: ImageConfig,
    /// Lowest first, with the digests of their contents.
    layers: Vec<(T, Digest)>,
}

/// Whether a directory is an OCI layout.
pub(crate) fn is_layout(directory: &Path) -> bool {
    directory.join(LAYOUT).is_file() && directory.join(INDEX).is_file()
}

/// Detects the format of the image in an archive, if there is one.
fn recognize(blobs: &mut Blobs) -> Result<Option<Form>, ImageError> {
    if blobs.open(LAYOUT)?.is_some() && blobs.open(INDEX)?.is_some() {
        return Ok(Some(Form::Layout));
    }
    if blobs.open(MANIFEST)?.is_none() {
        return Ok(None);
    }
    // A root filesystem may contain a file of that name.
    let saved = blobs.document(MANIFEST).ok().and_then(|bytes| Saved::parse(&bytes).ok());
    let is_one = saved.is_some_and(|all| !all.is_empty());
    Ok(is_one.then_some(Form::Docker))
}

/// Turns an archive that was read into the image in it. Returns `false` and changes nothing if it contains none. If the
/// caller names a format, the archive must have it.
pub(crate) fn unfold(
    staged: &mut Staged,
    said: Option<Form>,
    name: Option<&str>,
    limits: &Limits,
    progress: &Progress,
) -> Result<bool, ImageError> {
    let files = |tree: &Tree| matches!(tree.find(MANIFEST.as_bytes()).or(tree.find(INDEX.as_bytes())), Some(id) if matches!(tree.node(id).body, Body::File(_)));
    if said.is_none() && !files(&staged.tree) {
        return Ok(false);
    }
    let tree = std::mem::replace(&mut staged.tree, Tree::new(limits.clone()));
    let image = staged.contents.beside(IMAGE)?;
    let contents = std::mem::replace(&mut staged.contents, image);
    let archive = contents.path().to_owned();
    let mut blobs = Blobs::Archive { tree, contents };
    let found = match said {
        Some(Form::Docker) => blobs.open(MANIFEST)?.map(|_| Form::Docker),
        Some(Form::Layout) => blobs.open(INDEX)?.map(|_| Form::Layout),
        None => recognize(&mut blobs)?,
    };
    let Some(form) = found else {
        let Blobs::Archive { tree, contents } = blobs else { return Ok(false) };
        remove(staged.contents.path())?;
        (staged.tree, staged.contents) = (tree, contents);
        return Ok(false);
    };
    match form {
        Form::Layout => unpack_layout(&mut blobs, name, staged, limits, progress)?,
        Form::Docker => unpack_saved(&mut blobs, name, staged, limits, progress)?,
    }
    remove(&archive)?;
    Ok(true)
}

fn remove(file: &Path) -> Result<(), ImageError> {
    fs_err::remove_file(file).map_err(|e| ImageError::write(file, e))
}

/// Reads an OCI layout in a directory.
pub(crate) fn read_layout(
    directory: &Path,
    name: Option<&str>,
    staged: &mut Staged,
    limits: &Limits,
    progress: &Progress,
) -> Result<(), ImageError> {
    if !is_layout(directory) {
        return Err(not_one(directory, Form::Layout).into());
    }
    unpack_layout(&mut Blobs::Directory(directory.to_owned()), name, staged, limits, progress)
}

/// The error for a path without an image of that format.
pub(crate) fn not_one(path: &Path, form: Form) -> OciError {
    let wanted = match form {
        Form::Layout => "an OCI layout (a directory or an archive with oci-layout and index.json)",
        Form::Docker => "an archive of `docker save` (a tar archive with manifest.json)",
    };
    OciError::NotOne { path: path.display().to_string(), wanted }
}

fn unpack_layout(
    blobs: &mut Blobs,
    name: Option<&str>,
    staged: &mut Staged,
    limits: &Limits,
    progress: &Progress,
) -> Result<(), ImageError> {
    let mut document = Document::parse(&blobs.document(INDEX)?)?;
    let mut name = name;
    for _ in 0..INDEXES_MAX {
        let entries = match document {
            Document::Manifest { config, layers } => {
                let config = blobs.verified_document(&config.blob()?)?;
                let image = image_of(&config, &layers)?;
                return unpack(image, staged, limits, progress, |blob| blobs.verified(blob, progress));
            }
            Document::Index(entries) => entries,
        };
        let chosen = document::choose(&entries, name.take(), document::architecture())?;
        document = Document::parse(&blobs.verified_document(&chosen.blob()?)?)?;
    }
    Err(OciError::Document { what: "its indexes are nested too deeply".into() }.into())
}

fn unpack_saved(
    blobs: &mut Blobs,
    name: Option<&str>,
    staged: &mut Staged,
    limits: &Limits,
    progress: &Progress,
) -> Result<(), ImageError> {
    let all = Saved::parse(&blobs.document(MANIFEST)?)?;
    let saved = Saved::choose(&all, name)?;
    let config = blobs.document(&saved.config)?;
    // The configuration is named by its digest.
    let stem = saved.config.rsplit('/').next().unwrap_or_default().trim_end_matches(".json");
    if let Ok(digest) = Digest::parse(&format!("sha256:{stem}")) {
        let mut hasher = digest.hasher();
        hasher.update(&config);
        digest.expect("its configuration", hasher)?;
    }
    let configuration = Configuration::parse(&config, document::architecture())?;
    let (config, layers) = configuration.layers(saved.layers.clone())?;
    unpack(Image { config, layers }, staged, limits, progress, |name| {
        blobs.open(name)?.ok_or_else(|| blobs::missing(name).into())
    })
}

fn image_of(config: &[u8], layers: &[document::Descriptor]) -> Result<Image<Blob>, OciError> {
    let configuration = Configuration::parse(config, document::architecture())?;
    let blobs = layers.iter().map(document::Descriptor::blob).collect::<Result<Vec<_>, _>>()?;
    let (config, layers) = configuration.layers(blobs)?;
    Ok(Image { config, layers })
}

/// Applies the layers, one on top of the other.
fn unpack<T>(
    image: Image<T>,
    staged: &mut Staged,
    limits: &Limits,
    progress: &Progress,
    mut open: impl FnMut(&T) -> Result<Box<dyn blobs::Content>, ImageError>,
) -> Result<(), ImageError> {
    let count = image.layers.len();
    for (at, (layer, diff_id)) in image.layers.iter().enumerate() {
        progress.step(format!("unpacking layer {} of {count}", at + 1));
        put_layer(open(layer)?, diff_id, staged, limits, progress)?;
    }
    staged.config = Some(image.config);
    Ok(())
}

/// Applies one layer to the tree.
fn put_layer(
    content: Box<dyn blobs::Content>,
    diff_id: &Digest,
    staged: &mut Staged,
    limits: &Limits,
    progress: &Progress,
) -> Result<(), ImageError> {
    let source = unpacked(content, Path::new("a layer"))?;
    let mut reader = Hashed { source, hasher: diff_id.hasher() };
    archive::read_layer(&mut reader, &mut staged.tree, &mut staged.contents, limits, progress)?;
    diff_id.expect("an unpacked layer", reader.hasher)?;
    Ok(())
}
