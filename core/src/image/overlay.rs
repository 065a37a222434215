//! Files that are added on top of a source: those of a template, and those that an init system needs in a VM.

use std::collections::BTreeMap;

use nexus_schema::ByteSize;
use serde::Deserialize;

use super::contents::Contents;
use super::facts::InitSystem;
use super::tree::{Attributes, Body, Tree, refuse};
use super::{ImageError, facts};
use crate::progress::Progress;

/// What the init systems need, as data.
const SYSTEM: &str = include_str!("system.yaml");

/// A file that is added on top of the source. It is owned by root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Overlay {
    /// Its content.
    pub content: Vec<u8>,
    /// Its permission bits.
    pub mode: u16,
}

/// What an image gets in addition to its source.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Additions {
    /// Files by absolute path; they replace existing ones.
    pub overlays: BTreeMap<String, Overlay>,
    /// Whether it gets what its init system needs in a VM.
    pub for_init: bool,
    /// The minimum size of its filesystem.
    pub size: Option<ByteSize>,
}

impl Additions {
    /// All files for an image with this init system; `is_there` tells which exist already.
    pub(super) fn files(
        &self,
        init: Option<InitSystem>,
        mut is_there: impl FnMut(&str) -> bool,
    ) -> BTreeMap<String, Overlay> {
        let mut files = BTreeMap::new();
        if let Some(init) = init.filter(|_| self.for_init) {
            for file in system() {
                if file.init.contains(&init) && !(file.keep && is_there(&file.path)) {
                    let overlay = Overlay { content: file.content.into_bytes(), mode: file.mode.0 };
                    files.insert(file.path, overlay);
                }
            }
        }
        files.extend(self.overlays.clone());
        files
    }

    /// Adds everything to a tree.
    pub(super) fn put(
        &self,
        tree: &mut Tree,
        contents: &mut Contents,
        now: i64,
        progress: &Progress,
    ) -> Result<(), ImageError> {
        let init = facts::init_system(tree);
        let files = self.files(init, |path| tree.find(path.as_bytes()).is_some());
        for (path, overlay) in files {
            progress.log(&format!("laying over {path}"));
            let path = path.as_bytes();
            if tree.find(path).is_some_and(|node| tree.children(node).is_some()) {
                return Err(refuse(path, "a file is to be laid over a directory"));
            }
            let content = contents.keep(&overlay.content)?;
            tree.put(path, Attributes::root(overlay.mode, now), Body::File(content))?;
        }
        Ok(())
    }
}

/// One entry of the data.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct SystemFile {
    init: Vec<InitSystem>,
    path: String,
    #[serde(default)]
    mode: Mode,
    #[serde(default)]
    keep: bool,
    content: String,
}

/// Permission bits, written in octal.
#[derive(Debug, Deserialize)]
#[serde(try_from = "String")]
struct Mode(u16);

impl Default for Mode {
    fn default() -> Self {
        Self(0o644)
    }
}

impl TryFrom<String> for Mode {
    type Error = std::num::ParseIntError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        u16::from_str_radix(&text, 8).map(Self)
    }
}

fn system() -> Vec<SystemFile> {
    serde_yaml_ng::from_str(SYSTEM).expect("a test reads the built-in data")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_data_is_sound() {
        for file in system() {
            assert!(file.path.starts_with('/') && !file.init.is_empty());
            assert!(file.content.is_empty() || file.content.ends_with('\n'), "{}", file.path);
            assert!(file.mode.0 <= 0o755);
        }
    }

    #[test]
    fn an_init_system_gets_its_own_files_and_the_template_wins() {
        let mut additions = Additions { for_init: true, ..Additions::default() };
        let files = additions.files(Some(InitSystem::OpenRc), |_| true);
        let inittab = String::from_utf8(files["/etc/inittab"].content.clone()).unwrap();
        assert!(inittab.contains("openrc") && inittab.contains("ttyS0"), "{inittab}");
        assert!(!files.contains_key("/etc/securetty"), "what is there is kept");
        assert!(additions.files(Some(InitSystem::OpenRc), |_| false).contains_key("/etc/securetty"));
        assert!(additions.files(Some(InitSystem::Other), |_| false).is_empty());
        assert!(additions.files(None, |_| false).is_empty());

        let own = Overlay { content: b"mine".to_vec(), mode: 0o600 };
        additions.overlays.insert("/etc/inittab".into(), own.clone());
        assert_eq!(additions.files(Some(InitSystem::BusyBox), |_| false)["/etc/inittab"], own);
        additions.for_init = false;
        assert_eq!(additions.files(Some(InitSystem::Systemd), |_| false).len(), 1, "only what was asked for");
    }
}
