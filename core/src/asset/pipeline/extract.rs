//! Extracts chosen files from a tar archive. The archive is treated as hostile: only regular files at exactly the wanted
//! paths are extracted, under names of our own; nothing else is written.

use std::collections::HashSet;
use std::io::{self, Read};
use std::path::Path;

use nexus_schema::tools::asset::AssetFile;

use super::flow::write_file;
use crate::asset::AssetError;
use crate::asset::error::PackageProblem;
use crate::asset::provider::Taken;

/// The most entries that an archive may have.
const ENTRIES_MAX: usize = 1_000_000;

/// Extracts the wanted files from an archive, in the order in which they are listed.
pub(super) fn files(
    reader: &mut dyn Read,
    wanted: &[Taken],
    into: &Path,
    what: &str,
    read_error: &dyn Fn(io::Error) -> AssetError,
) -> Result<Vec<AssetFile>, AssetError> {
    let failed = |problem| AssetError::Package { package: what.to_owned(), problem };
    let mut archive = tar::Archive::new(reader);
    let mut found: Vec<Option<AssetFile>> = vec![None; wanted.len()];
    let mut seen = HashSet::new();
    for (number, entry) in archive.entries().map_err(read_error)?.enumerate() {
        if number >= ENTRIES_MAX {
            let problem =
                PackageProblem::TooLarge { what: "its list of files".into(), limit: ENTRIES_MAX as u64 };
            return Err(failed(problem));
        }
        let mut entry = entry.map_err(read_error)?;
        let path = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let path = path.strip_prefix("./").unwrap_or(&path);
        let Some(at) = wanted.iter().position(|taken| taken.path == path) else { continue };
        if !entry.header().entry_type().is_file() {
            return Err(failed(PackageProblem::NotAFile(path.to_owned())));
        }
        // A second entry of the same name would replace a file that was already checked.
        if !seen.insert(at) {
            return Err(failed(PackageProblem::UnsafePath(path.to_owned())));
        }
        let Taken { name, executable, .. } = &wanted[at];
        found[at] = Some(write_file(&mut entry, into, name, *executable, read_error)?.0);
    }
    wanted
        .iter()
        .zip(found)
        .map(|(taken, file)| file.ok_or_else(|| failed(PackageProblem::NoMember(taken.path.clone()))))
        .collect()
}
