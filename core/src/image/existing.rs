//! Makes an image of an ext4 file: it is copied, checked, and given its `image.yaml`. Nothing else is changed.

mod put;

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use fs_err as fs;
use nexus_schema::link::ImageMetadata;

use super::facts::{self, InitSystem, OS_RELEASE_MAX};
use super::place::Place;
use super::place::check_room;
use super::{Additions, Built, ImageError, ROOTFS};
use crate::ext4::{Tools, check_features, quote};
use crate::os::disk::allocated_bytes;
use crate::progress::Progress;

/// The most output of `debugfs` that is read for one file.
const ANSWER_MAX: usize = 8 << 10;

/// Makes an image of an ext4 file.
pub(super) async fn adopt(
    tools: &Tools,
    source: &Path,
    place: Place,
    meta: &ImageMetadata,
    additions: &Additions,
    progress: &Progress,
) -> Result<Built, ImageError> {
    check_features(source)?;
    progress.step("copying the filesystem");
    let file = place.scratch().join(ROOTFS);
    check_room(place.scratch(), allocated_bytes(source).map_err(|e| ImageError::source(source, e))?)?;
    let (from, to, watched) = (source.to_owned(), file.clone(), progress.clone());
    let copy = move || (place, crate::drive::copy_file(&from, &to, &watched));
    let (place, copied) = tokio::task::spawn_blocking(copy).await.map_err(|_| ImageError::Worker)?;
    copied?;
    // Its journal may hold changes that are not applied yet.
    tools.recover(&file, progress).await?;
    if let Some(size) = additions.size {
        progress.step("growing the filesystem");
        crate::drive::lengthen(&file, size, progress).await?;
    }

    let ask = Ask { tools, file: &file, progress };
    let mut distro = None;
    for path in ["/usr/lib/os-release", "/etc/os-release"] {
        if distro.is_none() && ask.kind(path).await? == Some(Kind::File) {
            let command = format!("cat {path}");
            let text = tools.ask(&file, &command, OS_RELEASE_MAX as usize, progress).await?;
            distro = facts::parse_os_release(&text);
        }
    }
    let init_system = ask.init_system().await?;
    for path in facts::MOUNT_POINTS {
        if ask.kind(path).await? == Some(Kind::File) {
            return Err(facts::no_mount_point(path.as_bytes()));
        }
    }
    let meta = facts::complete(meta, distro, init_system)?;
    ask.put(additions, init_system, place.scratch()).await?;
    ask.put_metadata(&meta, place.scratch()).await?;
    let (place, finished) = place.finish(tools, file.clone(), progress).await?;
    place.keep();
    Ok(Built {
        path: finished.path,
        size: finished.size,
        used_bytes: finished.used_bytes,
        sha256: finished.sha256,
        distro: meta.distro,
        // It is that of what the file was made from, or else taken to be the host's.
        arch: None,
        init: meta.init,
        init_system,
        config: meta.config.map(|config| *config),
        notes: Vec::new(),
    })
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    File,
    Directory,
    Other,
}

struct Ask<'a> {
    tools: &'a Tools,
    file: &'a Path,
    progress: &'a Progress,
}

impl Ask<'_> {
    async fn stat(&self, path: &str) -> Result<String, ImageError> {
        let said = self.tools.ask(self.file, &format!("stat {path}"), ANSWER_MAX, self.progress).await?;
        Ok(String::from_utf8_lossy(&said).into_owned())
    }

    /// What is at a path, if anything.
    async fn kind(&self, path: &str) -> Result<Option<Kind>, ImageError> {
        let said = self.stat(path).await?;
        let first = said.lines().next().unwrap_or_default();
        Ok(match first.split_once("Type: ") {
            None => None,
            Some((_, kind)) if kind.starts_with("regular") => Some(Kind::File),
            Some((_, kind)) if kind.starts_with("directory") => Some(Kind::Directory),
            Some(_) => Some(Kind::Other),
        })
    }

    async fn init_system(&self) -> Result<Option<InitSystem>, ImageError> {
        let said = self.stat("/sbin/init").await?;
        if !said.contains("Type: ") {
            return Ok(None);
        }
        Ok(Some(if said.contains("systemd") {
            InitSystem::Systemd
        } else if self.kind("/sbin/openrc").await?.is_some() {
            InitSystem::OpenRc
        } else if said.contains("busybox") {
            InitSystem::BusyBox
        } else {
            InitSystem::Other
        }))
    }

    /// Writes `image.yaml`, replacing an existing one.
    async fn put_metadata(&self, meta: &ImageMetadata, scratch: &Path) -> Result<(), ImageError> {
        write_for_tool(&scratch.join("image.yaml"), facts::text(meta).as_bytes())?;
        let mut commands = Vec::new();
        for directory in ["/etc", "/etc/nexus"] {
            match self.kind(directory).await? {
                Some(Kind::Directory) => {}
                None => commands.push(format!("mkdir {directory}")),
                Some(_) => return Err(super::tree::refuse(directory.as_bytes(), "it is not a directory")),
            }
        }
        let path = std::str::from_utf8(facts::METADATA).unwrap_or_default();
        match self.kind(path).await? {
            None => {}
            Some(Kind::File) => commands.push(format!("rm {path}")),
            Some(_) => return Err(super::tree::refuse(facts::METADATA, "it is not a file")),
        }
        commands.push("cd /etc/nexus".to_owned());
        commands.push(format!("write {} image.yaml", String::from_utf8_lossy(&quote(b"image.yaml"))));
        commands.push("sif ./image.yaml mode 0100644".to_owned());
        self.change("script", &commands, scratch).await
    }

    /// Runs a `debugfs` script, stored in a file of this name in the scratch directory.
    async fn change(&self, script: &str, commands: &[String], scratch: &Path) -> Result<(), ImageError> {
        write_for_tool(&scratch.join(script), (commands.join("\n") + "\n").as_bytes())?;
        let opened = fs::set_permissions(scratch, Permissions::from_mode(0o755));
        opened.map_err(|e| ImageError::write(scratch, e))?;
        Ok(self.tools.change(self.file, script, scratch, self.progress).await?)
    }
}

/// Writes a file for a confined program, which runs as another user. The parent directories are closed to all others.
fn write_for_tool(path: &Path, content: &[u8]) -> Result<(), ImageError> {
    let written =
        fs::write(path, content).and_then(|()| fs::set_permissions(path, Permissions::from_mode(0o644)));
    written.map_err(|e| ImageError::write(path, e))
}
