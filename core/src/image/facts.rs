//! What an image says about itself: its distribution, its init system, and `/etc/nexus/image.yaml`.

use std::collections::BTreeMap;
use std::io::Read;

use nexus_schema::Arch;
use nexus_schema::link::{ImageMetadata, InitMode};

use super::ImageError;
use super::contents::Contents;
use super::tree::{Attributes, Body, Tree, refuse};

/// The file in which an image describes itself.
pub(crate) const METADATA: &[u8] = b"/etc/nexus/image.yaml";
/// How much of `os-release` is read.
pub(crate) const OS_RELEASE_MAX: u64 = 64 << 10;

/// The init system of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InitSystem {
    /// systemd.
    Systemd,
    /// OpenRC (with its own init or BusyBox's).
    OpenRc,
    /// BusyBox's init.
    BusyBox,
    /// Another one.
    Other,
}

/// The distribution in a tree, such as `debian-12`.
pub(crate) fn distro(tree: &Tree, contents: &mut Contents) -> Option<String> {
    [&b"/etc/os-release"[..], b"/usr/lib/os-release"].iter().find_map(|path| {
        let Body::File(content) = &tree.node(tree.find(path)?).body else { return None };
        let mut text = Vec::new();
        contents.reader(*content).ok()?.take(OS_RELEASE_MAX).read_to_end(&mut text).ok()?;
        parse_os_release(&text)
    })
}

/// Programs, at least one of which is in every image that can run commands.
const PROGRAMS: [&[u8]; 5] = [b"/bin/sh", b"/usr/bin/env", b"/bin/busybox", b"/sbin/init", b"/usr/bin/bash"];

/// The architecture of the programs in a tree, by the first of some that is one.
pub(crate) fn arch(tree: &Tree, contents: &mut Contents) -> Option<Arch> {
    PROGRAMS.iter().find_map(|path| {
        let Body::File(content) = &tree.node(tree.find(path)?).body else { return None };
        let mut start = Vec::new();
        contents.reader(*content).ok()?.take(64).read_to_end(&mut start).ok()?;
        Arch::of_elf(&start)
    })
}

/// `ID-VERSION_ID` of an `os-release`, or `ID-VERSION_CODENAME`, or `ID`.
pub(crate) fn parse_os_release(text: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(text);
    let mut values = BTreeMap::new();
    for (key, value) in text.lines().filter_map(|line| line.trim().split_once('=')) {
        let value = value.trim_matches(|c| c == '"' || c == '\'');
        let word = |c: char| c.is_ascii_alphanumeric() || "._~+-".contains(c);
        if !value.is_empty() && value.len() <= 64 && value.chars().all(word) {
            values.insert(key, value);
        }
    }
    let id = values.get("ID")?;
    match values.get("VERSION_ID").or_else(|| values.get("VERSION_CODENAME")) {
        Some(version) => Some(format!("{id}-{version}")),
        None => Some((*id).to_owned()),
    }
}

/// The init system in a tree, if any.
pub(crate) fn init_system(tree: &Tree) -> Option<InitSystem> {
    let init =
        [&b"/sbin/init"[..], b"/etc/init", b"/bin/init"].into_iter().find_map(|path| tree.find(path))?;
    let is = |path: &[u8]| tree.find(path) == Some(init);
    if is(b"/lib/systemd/systemd") || is(b"/usr/lib/systemd/systemd") {
        Some(InitSystem::Systemd)
    } else if tree.find(b"/sbin/openrc").is_some() {
        Some(InitSystem::OpenRc)
    } else if is(b"/bin/busybox") || is(b"/usr/bin/busybox") {
        Some(InitSystem::BusyBox)
    } else {
        Some(InitSystem::Other)
    }
}

/// Where a VM mounts the kernel's and in-memory filesystems.
pub(super) const MOUNT_POINTS: [&str; 5] = ["/dev", "/proc", "/run", "/sys", "/tmp"];

/// Refuses a tree that has something other than a directory at a mount point. Links are followed; a missing target is made at boot.
pub(crate) fn check_mount_points(tree: &Tree) -> Result<(), ImageError> {
    for path in MOUNT_POINTS.map(str::as_bytes) {
        if tree.find(path).is_some_and(|node| tree.children(node).is_none()) {
            return Err(no_mount_point(path));
        }
    }
    Ok(())
}

/// The error for a mount point that is not a directory.
pub(super) fn no_mount_point(path: &[u8]) -> ImageError {
    refuse(path, "it has to be a directory, or a link to one: a VM mounts a filesystem there")
}

/// The metadata for an image; the distribution is filled in if it is not given.
pub(crate) fn complete(
    meta: &ImageMetadata,
    distro: Option<String>,
    init: Option<InitSystem>,
) -> Result<ImageMetadata, ImageError> {
    if meta.init == InitMode::System && init.is_none() {
        return Err(ImageError::NoInit);
    }
    let mut meta = meta.clone();
    meta.distro = meta.distro.or(distro);
    Ok(meta)
}

/// The text of `image.yaml`.
pub(crate) fn text(meta: &ImageMetadata) -> String {
    serde_yaml_ng::to_string(meta).expect("strings and an enum are always YAML")
}

/// Puts `image.yaml` into a tree, replacing an existing one.
pub(crate) fn put(
    tree: &mut Tree,
    contents: &mut Contents,
    meta: &ImageMetadata,
    now: i64,
) -> Result<(), ImageError> {
    let content = contents.keep(text(meta).as_bytes())?;
    for directory in [&b"/etc"[..], b"/etc/nexus"] {
        if tree.find(directory).is_none_or(|node| tree.children(node).is_none()) {
            tree.put_directory(directory, Attributes::root(0o755, now))?;
        }
    }
    tree.put(METADATA, Attributes::root(0o644, now), Body::File(content))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_distribution_is_told_from_os_release() {
        for (text, is) in [
            ("NAME=\"Debian GNU/Linux\"\nID=debian\nVERSION_ID=\"12\"\n", Some("debian-12")),
            ("ID='alpine'\nVERSION_ID=3.21.0", Some("alpine-3.21.0")),
            ("ID=debian\nVERSION_CODENAME=trixie\n", Some("debian-trixie")),
            ("ID=arch\n", Some("arch")),
            ("ID=a/../b\n", None),
            ("\u{0}\u{1}", None),
            ("", None),
        ] {
            assert_eq!(parse_os_release(text.as_bytes()).as_deref(), is, "{text:?}");
        }
    }
}
