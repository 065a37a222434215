//! Fills a filesystem with a tree: how large it has to be, and the script that puts everything in its place.

mod script;
mod size;

use std::path::Path;

use super::ImageError;
use super::staging::Staging;
use super::tree::Tree;
use crate::ext4::Tools;
use crate::progress::Progress;

pub(crate) use size::{measure, measure_read_only};

/// Fills an empty filesystem with a tree.
pub(crate) async fn fill(
    tools: &Tools,
    file: &Path,
    tree: &Tree,
    staging: &Staging,
    progress: &Progress,
) -> Result<(), ImageError> {
    let script = staging.directory().join("script");
    let commands = script::write(&script, tree, staging)?;
    Ok(tools.run_script(file, &script, staging.directory(), Some(commands), progress).await?)
}
