//! Images: read-only ext4 masters, made from packages, a BusyBox binary, directories, tar archives, OCI images or ext4
//! files.
//!
//! Every source is read once: contents go straight into the image, names and attributes into a tree in memory, which is written
//! after them. The same source makes the same image. Owners, modes, setuid bits, links, attributes and device nodes are kept,
//! for root and for ordinary users alike. Nothing from an archive is ever extracted under its own name, so no archive can reach
//! files of the host; limits ([`Limits`]) keep it from filling memory or disk.
//!
//! An image appears under its name once it is complete, checked and synced; a failure leaves nothing behind. This room does not
//! know the store.

mod archive;
mod bootstrap;
mod busybox;
mod contents;
mod directory;
mod error;
mod existing;
pub mod facts;
mod filesystem;
mod limits;
pub mod oci;
mod overlay;
mod place;
mod source;
mod tree;
mod volume;

use std::path::{Path, PathBuf};

use nexus_schema::link::{ImageConfig, ImageMetadata, InitMode};
use nexus_schema::{Arch, ByteSize};

pub use bootstrap::{Bootstrap, FOR_WORK, PACKAGES};
pub use error::ImageError;
pub use facts::InitSystem;
pub(crate) use facts::METADATA;
pub use limits::Limits;
pub use overlay::{Additions, Overlay};
pub(crate) use place::check_room;
pub use source::Source;
pub(crate) use volume::Volume;

use crate::ext4::{Options, Purpose, Tools};
use crate::os::failpoint;
use crate::progress::Progress;
use place::Place;
use source::{Room, Staged};

/// The image's file in its directory.
pub const ROOTFS: &str = "rootfs.ext4";

/// The time stamp of the filesystem, and of files whose source has none: the first second of 2024. A fixed time makes the bytes
/// reproducible.
const MADE: u32 = 1_704_067_200;

/// A finished image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Built {
    /// Its file.
    pub path: PathBuf,
    /// The size of its filesystem, which is the minimum size of its drives.
    pub size: ByteSize,
    /// How many bytes it occupies on disk.
    pub used_bytes: u64,
    /// SHA-256 of the file, in hexadecimal.
    pub sha256: String,
    /// The distribution, such as `debian-12`, if known.
    pub distro: Option<String>,
    /// The architecture of its programs, if known.
    pub arch: Option<Arch>,
    /// What runs as PID 1.
    pub init: InitMode,
    /// Its init system, if any.
    pub init_system: Option<InitSystem>,
    /// How it should be run, if it says so.
    pub config: Option<ImageConfig>,
    /// What was left out, and why.
    pub notes: Vec<String>,
}

/// Makes the image `into`/[`ROOTFS`] from a source and overlay files. Makes `into` if it is missing, as a subvolume if that helps clones.
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
    if let Source::Filesystem(file) = &source {
        progress.step("checking the filesystem");
        // Its journal may hold changes that are not applied yet.
        tools.recover(file, progress).await?;
    }
    let room = Room { place, limits, size: additions.size };
    let (place, staged) = source::stage(source, room, progress).await?;
    failpoint::reach("image-staged");
    progress.step("writing the filesystem");
    let (meta, additions, watched) = (meta.clone(), additions.clone(), progress.clone());
    let write = move || write(staged, &meta, &additions, &watched).map(|written| (place, written));
    let written = tokio::task::spawn_blocking(write).await.map_err(|_| ImageError::Worker)?;
    let (place, Written { file, meta, arch, init_system, notes }) = written?;
    let (place, finished) = place.finish(&tools, file, progress).await?;
    place.keep();
    Ok(Built {
        path: finished.path,
        size: finished.size,
        used_bytes: finished.used_bytes,
        sha256: finished.sha256,
        distro: meta.distro,
        arch,
        init: meta.init,
        init_system,
        config: meta.config.map(|config| *config),
        notes,
    })
}

/// A filesystem that was written.
struct Written {
    file: PathBuf,
    meta: ImageMetadata,
    arch: Option<Arch>,
    init_system: Option<InitSystem>,
    notes: Vec<String>,
}

/// Adds overlays and metadata to the tree, and writes everything.
fn write(
    staged: Staged,
    meta: &ImageMetadata,
    additions: &Additions,
    progress: &Progress,
) -> Result<Written, ImageError> {
    let Staged { mut tree, mut contents, distro, config, mut notes } = staged;
    let distro = facts::distro(&tree, &mut contents).or(distro);
    let arch = facts::arch(&tree, &mut contents);
    let init_system = facts::init_system(&tree);
    facts::check_mount_points(&tree)?;
    let mut meta = facts::complete(meta, distro, init_system)?;
    meta.config = config.map(Box::new).or(meta.config);
    additions.put(&mut tree, &mut contents, MADE.into(), progress)?;
    facts::put(&mut tree, &mut contents, &meta, MADE.into())?;
    if tree.left_out() > 0 {
        notes.push(format!(
            "{} extended attributes that Linux does not keep on ext4 were left out",
            tree.left_out()
        ));
    }
    let file = contents.path().to_owned();
    contents.finish(&tree, &Options { purpose: Purpose::Drive, label: "", identity: None, made: MADE })?;
    Ok(Written { file, meta, arch, init_system, notes })
}

#[cfg(test)]
mod tests;
