//! Files that a new database knows nothing of, say because the old one was moved away: they are of VMs that somebody may still want, so they are
//! kept until somebody removes them.

use std::collections::{BTreeSet, HashSet};
use std::io::{self, Write};
use std::path::Path;

use nexus_schema::ToolError;
use tokio::task::spawn_blocking;

use crate::context::Shared;
use crate::op::store_error;
use crate::os::paths::Paths;
use crate::store::health::is_unused;

/// Returns the names of entries of the state directory that are kept although no row names them.
pub(super) async fn kept(shared: &Shared) -> Result<HashSet<String>, ToolError> {
    let is_new = shared.store.read(is_unused).await.map_err(store_error)?;
    let paths = shared.paths.clone();
    let found = spawn_blocking(move || look(&paths, is_new));
    found.await.map_err(io::Error::other).flatten().map_err(|error| {
        let list = shared.paths.kept();
        ToolError::internal(format!("look for what is not to be removed in {}: {error}", list.display()))
            .hint("make that file readable, or remove it: then what the database does not know is removed")
    })
}

/// Reads those names. If the database `is_new`, all that there are belong to them from now on. Blocks.
fn look(paths: &Paths, is_new: bool) -> io::Result<HashSet<String>> {
    let list = paths.kept();
    let mut kept: BTreeSet<String> = match std::fs::read(&list) {
        Ok(text) => serde_json::from_slice(&text)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => BTreeSet::new(),
        Err(error) => return Err(error),
    };
    if is_new {
        let before = kept.len();
        let data = [paths.vms(), paths.drives(), paths.images(), paths.assets(), paths.checkpoints()];
        for directory in data.iter().chain([&paths.all_suspended()]) {
            add_names(directory, &mut kept)?;
        }
        if kept.len() > before {
            write(&list, &kept)?;
        }
    }
    if !kept.is_empty() {
        tracing::warn!(
            count = kept.len(),
            list = %list.display(),
            "the state directory has VMs, disks, images or checkpoints that the database does not know, since it is a new one: they are kept"
        );
    }
    Ok(kept.into_iter().collect())
}

fn add_names(directory: &Path, names: &mut BTreeSet<String>) -> io::Result<()> {
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        names.extend(entry?.file_name().into_string());
    }
    Ok(())
}

/// Writes the list whole or not at all.
fn write(list: &Path, names: &BTreeSet<String>) -> io::Result<()> {
    let part = list.with_extension("part");
    let mut file = std::fs::File::create(&part)?;
    file.write_all(&serde_json::to_vec(names)?)?;
    file.sync_all()?;
    std::fs::rename(&part, list)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_new_database_does_not_know_is_kept_and_what_came_later_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let paths = Paths::new(directory.path());
        for place in [paths.vms().join("a"), paths.checkpoints().join("b")] {
            std::fs::create_dir_all(place).unwrap();
        }
        assert!(look(&paths, false).unwrap().is_empty());
        let both = HashSet::from(["a".to_owned(), "b".to_owned()]);
        assert_eq!(look(&paths, true).unwrap(), both);
        std::fs::create_dir_all(paths.images().join("c")).unwrap();
        assert_eq!(look(&paths, false).unwrap(), both);
        std::fs::write(paths.kept(), "no list").unwrap();
        assert!(look(&paths, false).is_err());
    }
}
