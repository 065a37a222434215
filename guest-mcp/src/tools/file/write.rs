//! `file_write`.
//!
//! A file is replaced in one step: the new content goes to a temporary file beside it, which then takes its name. Where
//! that cannot be (files of the kernel, single files that are mount points) it is written in place.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nexus_schema::ToolError;
use nexus_schema::error::ErrorCode;
use nexus_schema::limits::FILE_WRITE_MAX;
use nexus_schema::tools::file::{FileWrite, FileWriteOutput, FileWriteParams};
use rustix::fs::{FileType as Kind, XattrFlags};

use super::{check_path, failed, kind_words, refused};
use crate::places::{give_to_owner_of, make_directories};
use crate::tools::{Call, Reply, Run, human_bytes};

/// How many symbolic links are followed to the file; as many as the kernel follows.
const LINKS_MAX: usize = 40;
/// The most that all extended attributes of a file may hold to be carried over, in bytes.
const XATTR_MAX: usize = 64 << 10;
/// Filesystems whose files are interfaces of the kernel (linux/magic.h): proc, sysfs, cgroup2, cgroup, debugfs, tracefs.
const KERNEL_FILESYSTEMS: [u64; 6] =
    [0x9fa0, 0x6265_6572, 0x6367_7270, 0x0027_e0eb, 0x6462_6720, 0x7472_6163];

impl Run for FileWrite {
    async fn run(call: Call, params: FileWriteParams) -> Result<Reply<FileWriteOutput>, ToolError> {
        check_path(&params.path)?;
        let content = params.encoding.unwrap_or_default().decode(params.content);
        let content = content.map_err(|error| ToolError::invalid(format!("content: {error}")))?;
        if content.len() as u64 > FILE_WRITE_MAX {
            let text =
                format!("content holds {} bytes, at most {FILE_WRITE_MAX} can be given", content.len());
            return Err(ToolError::new(ErrorCode::TooLarge, text).hint("write it in parts with append"));
        }
        let mode = params.mode.as_deref().map(parse_mode).transpose()?;
        let request = Request {
            path: params.path,
            content,
            mode,
            create_parents: params.create_parents.unwrap_or(true),
            append: params.append.unwrap_or(false),
        };
        let output = call.blocking(move |_| request.write()).await?;
        let header = format!(
            "{} · {} {} · {} now",
            output.path,
            human_bytes(output.written_bytes),
            if output.created { "written to a new file" } else { "written" },
            human_bytes(output.size_bytes),
        );
        Ok(Reply::new(header, output))
    }
}

fn parse_mode(text: &str) -> Result<u32, ToolError> {
    let digits = text.strip_prefix("0o").unwrap_or(text);
    let mode = (!digits.is_empty() && digits.bytes().all(|digit| digit.is_ascii_digit()))
        .then(|| u32::from_str_radix(digits, 8).ok())
        .flatten()
        .filter(|mode| *mode <= 0o7777);
    mode.ok_or_else(|| {
        let shown: String = text.chars().take(40).collect();
        ToolError::invalid(format!("`{shown}` is not a mode: octal digits such as 0644"))
    })
}

struct Request {
    path: String,
    content: Vec<u8>,
    mode: Option<u32>,
    create_parents: bool,
    append: bool,
}

/// What is there before.
struct Existing {
    mode: u32,
    uid: u32,
    gid: u32,
}

impl Request {
    fn write(self) -> Result<FileWriteOutput, ToolError> {
        let fail = |error: io::Error| failed("write", &self.path, error);
        let target = self.resolve()?;
        let (Some(directory), Some(_)) = (target.parent(), target.file_name()) else {
            return Err(refused("write", &self.path, "it is a directory"));
        };
        if self.path.ends_with('/') {
            return Err(refused("write", &self.path, "it names a directory"));
        }
        if self.create_parents {
            make_directories(directory)
                .map_err(|error| failed("create the directory", &directory.to_string_lossy(), error))?;
        }
        let existing = self.existing(&target)?;
        let size = if self.append {
            self.append(&target, existing.as_ref()).map_err(fail)?
        } else if is_kernels(directory) {
            self.overwrite(&target).map_err(fail)?
        } else {
            match self.replace(&target, directory, existing.as_ref()) {
                // A file that something is mounted on cannot be replaced, only written.
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy && existing.is_some() => {
                    self.overwrite(&target).map_err(fail)?
                }
                result => result.map_err(fail)?,
            }
        };
        Ok(FileWriteOutput {
            path: self.path,
            written_bytes: self.content.len() as u64,
            size_bytes: size,
            created: existing.is_none(),
        })
    }

    /// The file that the path means, with the links at its end followed, so that a link stays a link.
    fn resolve(&self) -> Result<PathBuf, ToolError> {
        let mut path = PathBuf::from(&self.path);
        for _ in 0..LINKS_MAX {
            match std::fs::read_link(&path) {
                Ok(target) => {
                    let parent = path.parent().unwrap_or(Path::new("/"));
                    path = parent.join(target);
                }
                Err(_) => return Ok(path),
            }
        }
        Err(refused("write", &self.path, "too many symbolic links"))
    }

    fn existing(&self, target: &Path) -> Result<Option<Existing>, ToolError> {
        let metadata = match std::fs::symlink_metadata(target) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed("write", &self.path, error)),
        };
        match Kind::from_raw_mode(metadata.mode()) {
            Kind::RegularFile => Ok(Some(Existing {
                mode: metadata.mode() & 0o7777,
                uid: metadata.uid(),
                gid: metadata.gid(),
            })),
            other => Err(refused("write", &self.path, &format!("it is {}", kind_words(other)))),
        }
    }

    fn replace(&self, target: &Path, directory: &Path, existing: Option<&Existing>) -> io::Result<u64> {
        let (temporary, mut file) = create_temporary(directory)?;
        let written = (|| {
            file.write_all(&self.content)?;
            match existing {
                Some(old) => {
                    std::os::unix::fs::fchown(&file, Some(old.uid), Some(old.gid))?;
                    copy_attributes(target, &file);
                }
                None => give_to_owner_of(directory, &file)?,
            }
            // After the owner: a change of owner takes setuid bits away.
            let mode = self.mode.or(existing.map(|old| old.mode)).unwrap_or(0o644);
            file.set_permissions(std::fs::Permissions::from_mode(mode))?;
            sync(&file)?;
            std::fs::rename(&temporary, target)
        })();
        if let Err(error) = written {
            // The name is ours; if it cannot be removed, the error that follows says more.
            let _ = std::fs::remove_file(&temporary);
            return Err(error);
        }
        sync(&File::open(directory)?)?;
        Ok(self.content.len() as u64)
    }

    fn append(&self, target: &Path, existing: Option<&Existing>) -> io::Result<u64> {
        let mut options = File::options();
        options.append(true).create(true).mode(self.mode.unwrap_or(0o644)).custom_flags(libc::O_NOFOLLOW);
        let mut file = options.open(target)?;
        let before = file.metadata()?.len();
        if existing.is_none()
            && let Some(directory) = target.parent()
        {
            give_to_owner_of(directory, &file)?;
        }
        if let Err(error) = file.write_all(&self.content).and_then(|()| sync(&file)) {
            // All or nothing, as far as a file that others may append to as well allows it.
            let _ = file.set_len(before);
            return Err(error);
        }
        if let Some(mode) = self.mode {
            file.set_permissions(std::fs::Permissions::from_mode(mode))?;
        } else if existing.is_none() {
            file.set_permissions(std::fs::Permissions::from_mode(0o644))?;
        }
        Ok(file.metadata()?.len())
    }

    fn overwrite(&self, target: &Path) -> io::Result<u64> {
        let mut file =
            File::options().write(true).truncate(true).custom_flags(libc::O_NOFOLLOW).open(target)?;
        // Interfaces of the kernel take a value in one write.
        file.write_all(&self.content)?;
        if let Some(mode) = self.mode {
            file.set_permissions(std::fs::Permissions::from_mode(mode))?;
        }
        sync(&file)?;
        Ok(file.metadata()?.len())
    }
}

/// Has a file on its disk. Files that have none, as those of the kernel, cannot be synced, which is no loss.
fn sync(file: &File) -> io::Result<()> {
    match file.sync_all() {
        Err(error)
            if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS | libc::EOPNOTSUPP)) =>
        {
            Ok(())
        }
        other => other,
    }
}

fn is_kernels(directory: &Path) -> bool {
    rustix::fs::statfs(directory).is_ok_and(|found| KERNEL_FILESYSTEMS.contains(&(found.f_type as u64)))
}

fn create_temporary(directory: &Path) -> io::Result<(PathBuf, File)> {
    let mut tries = 0;
    loop {
        let mut random = [0; 8];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
        let path = directory.join(format!(".nexus-{:016x}", u64::from_ne_bytes(random)));
        match File::options().write(true).create_new(true).mode(0o600).open(&path) {
            Ok(file) => return Ok((path, file)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && tries < 8 => tries += 1,
            Err(error) => return Err(error),
        }
    }
}

/// Carries over capabilities, ACLs and the like, as far as the filesystem has them.
fn copy_attributes(from: &Path, to: &File) {
    let mut names = vec![0; XATTR_MAX];
    let Ok(length) = rustix::fs::llistxattr(from, &mut names) else { return };
    for name in names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let mut value = vec![0; XATTR_MAX];
        if let Ok(length) = rustix::fs::lgetxattr(from, name, &mut value) {
            let _ = rustix::fs::fsetxattr(to, name, &value[..length], XattrFlags::empty());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_octal() {
        for (text, mode) in [("0644", 0o644), ("755", 0o755), ("4755", 0o4755), ("0o600", 0o600), ("0", 0)] {
            assert_eq!(parse_mode(text), Ok(mode), "{text}");
        }
        for bad in ["", "8", "rw-r--r--", "10000", "-1", "0x1", "+644"] {
            assert!(parse_mode(bad).is_err(), "{bad}");
        }
    }
}
