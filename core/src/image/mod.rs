//! Images: read-only ext4 masters, made from packages, a BusyBox binary, directories, tar archives, OCI images or ext4
//! files.
//!
//! Every source becomes a tree in memory with the files' contents under numbers in a staging directory; from both one
//! filesystem is written. Owners, modes, setuid bits, links, attributes and device nodes of the source are kept, for root
//! and for ordinary users alike. Nothing of an archive is ever extracted under its own name, so no archive reaches
//! anything of the host; caps ([`Limits`]) keep it from filling memory or disk.
//!
//! An image appears under its name when it is whole, checked and on the disk; a failure leaves nothing. Nothing here
//! knows the store.

mod archive;
mod bootstrap;
mod busybox;
mod directory;
mod error;
mod existing;
pub mod facts;
mod fill;
mod limits;
pub mod oci;
mod overlay;
mod pax;
mod place;
mod source;
mod staging;
mod tree;
mod volume;

use std::path::{Path, PathBuf};

use nexus_schema::ByteSize;
use nexus_schema::link::{ImageConfig, ImageMetadata, InitMode};

pub use bootstrap::{Bootstrap, PACKAGES};
pub use error::ImageError;
pub use facts::InitSystem;
pub(crate) use facts::METADATA;
pub use limits::Limits;
pub use overlay::{Additions, Overlay};
pub use source::Source;
pub(crate) use staging::check_room;
pub(crate) use volume::Volume;

use crate::ext4::Tools;
use crate::os::failpoint;
use crate::progress::Progress;
use place::Place;
use staging::Staging;
use tree::Tree;

/// The image's file in its directory.
pub const ROOTFS: &str = "rootfs.ext4";

/// An image that was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Built {
    /// Its file.
    pub path: PathBuf,
    /// The size of its filesystem; drives cannot be smaller.
    pub size: ByteSize,
    /// What it takes on the disk, in bytes.
    pub used_bytes: u64,
    /// SHA-256 of the file, in hexadecimal.
    pub sha256: String,
    /// The distribution, such as `debian-12`, where it is known.
    pub distro: Option<String>,
    /// What is PID 1.
    pub init: InitMode,
    /// The init system that is in it, if any.
    pub init_system: Option<InitSystem>,
    /// How it means to be run, where it says so.
    pub config: Option<ImageConfig>,
    /// What was left out, and why.
    pub notes: Vec<String>,
}

/// Makes the image `into`/[`ROOTFS`] from a source. `into` is made if it is missing (a subvolume where that helps clones).
pub async fn build(
    source: Source,
    into: &Path,
    meta: &ImageMetadata,
    progress: &Progress,
) -> Result<Built, ImageError> {
    build_within(source, into, meta, Limits::default(), progress).await
}

/// The same with caps of one's own.
pub async fn build_within(
    source: Source,
    into: &Path,
    meta: &ImageMetadata,
    limits: Limits,
    progress: &Progress,
) -> Result<Built, ImageError> {
    build_with(source, into, meta, &Additions::default(), limits, progress).await
}

/// The same with files laid over the source.
pub async fn build_with(
    source: Source,
    into: &Path,
    meta: &ImageMetadata,
    additions: &Additions,
    limits: Limits,
    progress: &Progress,
) -> Result<Built, ImageError> {
    progress.check()?;
    let tools = Tools::find()?;
    let place = Place::prepare(into, limits.keep_free)?;
    if let Source::Ext4(file) = &source {
        return existing::adopt(&tools, file, place, meta, additions, progress).await;
    }
    let (mut place, mut staged) = source::stage(source, place, limits, progress).await?;
    failpoint::reach("image-staged");
    let now = i64::try_from(std::time::UNIX_EPOCH.elapsed().unwrap_or_default().as_secs()).unwrap_or(0);
    let distro = facts::distro(&staged.tree, &staged.staging).or(staged.distro.take());
    let init_system = facts::init_system(&staged.tree);
    facts::check_mount_points(&staged.tree)?;
    let mut meta = facts::complete(meta, distro, init_system)?;
    meta.config = staged.config.take().map(Box::new).or(meta.config);
    additions.put(&mut staged.tree, &mut staged.staging, now, progress)?;
    facts::put(&mut staged.tree, &mut staged.staging, &meta, now, progress)?;

    let file = place.scratch().join(ROOTFS);
    make(&tools, &file, &staged.tree, &staged.staging, additions.size, progress).await?;
    let finished;
    (place, finished) = place.finish(&tools, file, progress).await?;
    place.keep();
    Ok(Built {
        path: finished.path,
        size: finished.size,
        used_bytes: finished.used_bytes,
        sha256: finished.sha256,
        distro: meta.distro,
        init: meta.init,
        init_system,
        config: meta.config.map(|config| *config),
        notes: staged.notes,
    })
}

/// Writes a filesystem of a tree.
async fn make(
    tools: &Tools,
    file: &Path,
    tree: &Tree,
    staging: &Staging,
    size: Option<ByteSize>,
    progress: &Progress,
) -> Result<(), ImageError> {
    let geometry = fill::measure(tree).at_least(size);
    staging.check_room(tree.nodes().map(tree::Node::content_bytes).sum())?;
    progress.step("making the filesystem");
    tools.make(file, geometry, None, progress).await?;
    failpoint::reach("image-formatted");
    progress.step("filling the filesystem");
    fill::fill(tools, file, tree, staging, progress).await
}

#[cfg(test)]
mod tests;
