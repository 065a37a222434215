//! All modules of a kernel, as a filesystem that its VMs share and mount on `/lib/modules/VERSION`.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::depmod::Depmod;
use crate::image::{ImageError, Volume};
use crate::progress::Progress;

/// Its name in a kernel's directory.
const FILE: &str = "modules.ext4";
/// Its label, for people; guests identify it by its UUID.
const LABEL: &str = "nexus-modules";

/// The filesystem with a kernel's modules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModuleImage {
    /// An ext4 filesystem without a journal.
    pub path: PathBuf,
    /// The UUID by which guests find it.
    pub uuid: String,
}

/// What `kernel.json` says of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ModuleFacts {
    uuid: String,
}

impl ModuleImage {
    pub(super) fn of(dir: &Path, facts: ModuleFacts) -> Self {
        Self { path: dir.join(FILE), uuid: facts.uuid }
    }

    pub(super) fn facts(&self) -> ModuleFacts {
        ModuleFacts { uuid: self.uuid.clone() }
    }
}

/// Modules, as they come out of a package.
pub(crate) struct ModuleTree {
    volume: Volume,
    depmod: Depmod,
}

impl ModuleTree {
    /// An empty one in a kernel's directory.
    pub(crate) fn new(into: &Path, progress: Progress) -> Result<Self, ImageError> {
        Ok(Self { volume: Volume::new(into, &progress)?, depmod: Depmod::default() })
    }

    /// Adds an unpacked module. `path` is below the directory of the kernel's version and may end in a compression suffix.
    pub(crate) fn module(&mut self, path: &str, file: &[u8]) -> Result<(), ImageError> {
        let unpacked = path.find(".ko.").map_or(path, |at| &path[..at + 3]);
        if let Err(problem) = self.depmod.module(unpacked, file) {
            tracing::debug!(module = path, problem, "a module without a name to load it by");
        }
        self.volume.put(unpacked, file)
    }

    /// Adds one of the [`super::MODULE_LISTS`].
    pub(crate) fn list(&mut self, name: &str, content: &[u8]) -> Result<(), ImageError> {
        self.depmod.list(name, content);
        self.volume.put(name, content)
    }

    /// Writes the filesystem into the kernel's directory; `None` if the kernel has no modules. Blocks.
    pub(crate) fn write(mut self, into: &Path) -> Result<Option<ModuleImage>, ImageError> {
        if self.depmod.is_empty() {
            return Ok(None);
        }
        for (name, content) in self.depmod.files() {
            self.volume.put(name, &content)?;
        }
        let path = into.join(FILE);
        let uuid = self.volume.write(&path, LABEL)?;
        Ok(Some(ModuleImage { path, uuid }))
    }
}
