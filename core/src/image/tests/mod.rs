//! Images from real sources, mounted and compared with them. These tests run as root.

mod export;
mod failing;
mod faithful;
mod hostile;
mod listing;
mod oci;
mod overlaid;
mod recipe;
mod registry;
mod tar;

use std::path::Path;

use nexus_schema::link::{ImageMetadata, InitMode};

use super::*;

fn meta(init: InitMode) -> ImageMetadata {
    ImageMetadata { name: "trial".into(), build_id: Some("b1".into()), distro: None, init, config: None }
}

/// Builds an image that starts the agent.
async fn make(source: Source, into: &Path) -> Result<Built, ImageError> {
    build(source, into, &meta(InitMode::Agent), &Progress::default()).await
}

/// The names in a directory; none if it does not exist.
fn names(directory: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(directory) else { return Vec::new() };
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// Makes the image `into`/[`ROOTFS`] from a source. Makes `into` if it is missing, as a subvolume if that helps clones.
async fn build(
    source: Source,
    into: &Path,
    meta: &ImageMetadata,
    progress: &Progress,
) -> Result<Built, ImageError> {
    build_within(source, into, meta, Limits::default(), progress).await
}

/// The same with explicit limits.
async fn build_within(
    source: Source,
    into: &Path,
    meta: &ImageMetadata,
    limits: Limits,
    progress: &Progress,
) -> Result<Built, ImageError> {
    build_with(source, into, meta, &Additions::default(), limits, progress).await
}
