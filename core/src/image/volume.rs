//! Makes a filesystem from given files, to be mounted read-only by many VMs: a kernel's modules.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use fs_err as fs;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use super::contents::Contents;
use super::tree::{Attributes, Body, Tree};
use super::{ImageError, Limits, MADE};
use crate::ext4::{Options, Purpose};
use crate::progress::Progress;

/// The files added so far.
pub(crate) struct Volume {
    /// In the directory in which the filesystem will be.
    scratch: TempDir,
    tree: Tree,
    contents: Contents,
    digest: Sha256,
}

impl Volume {
    /// An empty one, in a directory of its own within `beside`, which exists until it is written or dropped.
    pub(crate) fn new(beside: &Path, progress: &Progress) -> Result<Self, ImageError> {
        let scratch = tempfile::Builder::new().prefix(".volume-").tempdir_in(beside);
        let scratch = scratch.map_err(|e| ImageError::write(beside, e))?;
        let limits = Limits::default();
        let tree = Tree::new(limits.clone());
        let contents = Contents::create(&scratch.path().join("filesystem"), None, limits, progress)?;
        Ok(Self { scratch, tree, contents, digest: Sha256::new() })
    }

    /// Adds a world-readable file; missing directories are made.
    pub(crate) fn put(&mut self, path: &str, content: &[u8]) -> Result<(), ImageError> {
        for part in [path.as_bytes(), content] {
            self.digest.update((part.len() as u64).to_le_bytes());
            self.digest.update(part);
        }
        let content = self.contents.keep(content)?;
        self.tree.put(path.as_bytes(), Attributes::root(0o644, 0), Body::File(content))
    }

    /// Writes the filesystem to `file`, which must not exist, and returns its UUID: the same files get the same UUID. Blocks.
    pub(crate) fn write(self, file: &Path, label: &str) -> Result<String, ImageError> {
        let half = self.contents.path().to_owned();
        let identity = Some(self.digest.finalize().into());
        let options = Options { purpose: Purpose::ReadOnly, label, identity, made: MADE };
        let made = self.contents.finish(&self.tree, &options)?;
        let published = || -> std::io::Result<()> {
            let open = fs::File::open(&half)?;
            // VMMs of any user read it; nobody writes to it.
            open.set_permissions(std::fs::Permissions::from_mode(0o444))?;
            open.sync_data()?;
            fs::rename(&half, file)
        };
        published().map_err(|e| ImageError::write(file, e))?;
        self.scratch.close().map_err(|e| ImageError::write(file, e))?;
        Ok(uuid_text(&made.uuid))
    }
}

/// A UUID in text form.
fn uuid_text(uuid: &[u8; 16]) -> String {
    let hex = data_encoding::HEXLOWER.encode(uuid);
    [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_same_files_make_a_filesystem_of_the_same_uuid() {
        let dir = tempfile::tempdir().unwrap();
        let progress = Progress::default();
        let write = |name: &str, last: &str| {
            let mut volume = Volume::new(dir.path(), &progress).unwrap();
            volume.put("kernel/a/b.ko", &[7; 10_000]).unwrap();
            volume.put("modules.dep", last.as_bytes()).unwrap();
            volume.write(&dir.path().join(name), "some-label").unwrap()
        };
        let (one, two, other) = (write("1", "x"), write("2", "x"), write("3", "y"));
        assert_eq!(one, two);
        assert_ne!(one, other);
        let tools = crate::ext4::Tools::find().unwrap();
        tools.check(&dir.path().join("1"), &progress).await.unwrap();
        let file = dir.path().join("1");
        let facts = tools.ask(&file, "stats -h", 1 << 16, &progress).await.unwrap();
        let facts = String::from_utf8(facts).unwrap();
        assert!(facts.contains(&one) && facts.contains("some-label"), "{facts}");
        assert!(!facts.contains("has_journal"), "{facts}");
        let listed = tools.ask(&file, "ls -p kernel/a", 1 << 16, &progress).await.unwrap();
        let listed = String::from_utf8(listed).unwrap();
        assert!(listed.contains("/100644/0/0/b.ko/10000/"), "{listed}");
        let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left.len(), 3, "nothing half-made is left: {left:?}");
        assert!(std::fs::metadata(&file).unwrap().len() < 4 << 20);
    }

    #[tokio::test]
    async fn what_is_dropped_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let mut volume = Volume::new(dir.path(), &Progress::default()).unwrap();
        volume.put("a", b"a").unwrap();
        drop(volume);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
