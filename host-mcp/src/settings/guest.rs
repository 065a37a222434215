//! A guest binary that is used in place of the one in nexusd.

use std::ffi::OsString;
use std::fmt;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use fs_err::os::unix::fs::OpenOptionsExt as _;
use nexus_schema::Arch;

/// The largest binary that is read, in bytes. An initramfs with it has to fit into the memory of small VMs.
const LARGEST: u64 = 64 << 20;
/// Source of the numbers: the ELF specification (`elf.h`).
const MAGIC: &[u8] = b"\x7fELF";
const KINDS: [u16; 2] = [2, 3]; // an executable; one that is loaded anywhere
const INTERPRETER: u32 = 3;
/// How many links are followed, as by the kernel.
const LINKS_MAX: usize = 40;

/// The contents of a guest binary, for the rest of the process. Cheap to copy.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct GuestBinary(&'static [u8]);

impl GuestBinary {
    /// Reads and checks a binary: a regular file of root or of the daemon's user that nobody else may change or replace, and a static
    /// program of that architecture. It becomes root of every VM that has it.
    ///
    /// # Errors
    /// What is wrong with the file.
    pub(super) fn read(path: &Path, uid: u32, arch: Arch) -> Result<Self, String> {
        let wrong = |what: String| format!("{}: {what}", path.display());
        let whole = follow(path, uid)?;
        // A FIFO is not waited for, and refused below.
        let flags = rustix::fs::OFlags::NONBLOCK.bits();
        let file = fs_err::OpenOptions::new()
            .read(true)
            .custom_flags(flags.cast_signed())
            .open(&whole)
            .map_err(|e| e.to_string())?;
        let facts = file.metadata().map_err(|e| e.to_string())?;
        if !facts.is_file() {
            return Err(wrong("not a regular file".to_owned()));
        }
        if facts.uid() != 0 && facts.uid() != uid {
            return Err(wrong(format!("belongs to user {}: chown it to root or to user {uid}", facts.uid())));
        }
        if facts.mode() & 0o022 != 0 {
            return Err(wrong("others may change it: chmod go-w".to_owned()));
        }
        let mut bytes = Vec::new();
        file.take(LARGEST + 1).read_to_end(&mut bytes).map_err(|e| e.to_string())?;
        if u64::try_from(bytes.len()).is_ok_and(|length| length > LARGEST) {
            return Err(wrong(format!("larger than {} MiB", LARGEST >> 20)));
        }
        check(&bytes, arch).map_err(|what| wrong(what.to_owned()))?;
        Ok(Self(bytes.leak()))
    }

    /// The file's contents.
    pub(super) const fn bytes(self) -> &'static [u8] {
        self.0
    }
}

impl fmt::Debug for GuestBinary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

/// Returns where a path leads, without links. Refuses one that others than root and the daemon's user may lead elsewhere: by a directory on the way, of
/// links too, or by a link of theirs.
fn follow(path: &Path, uid: u32) -> Result<PathBuf, String> {
    let parts = |path: &Path| -> Vec<OsString> {
        path.components().rev().map(|part| part.as_os_str().to_owned()).collect()
    };
    let given = std::path::absolute(path).map_err(|e| format!("{}: {e}", path.display()))?;
    let (mut left, mut at, mut links) = (parts(&given), PathBuf::from("/"), 0);
    while let Some(part) = left.pop() {
        match part.as_encoded_bytes() {
            b"/" => at = PathBuf::from("/"),
            b"." => {}
            b".." => {
                at.pop();
            }
            _ => {
                keeps_files(&at, uid)?;
                let next = at.join(&part);
                let facts = fs_err::symlink_metadata(&next).map_err(|e| e.to_string())?;
                if !facts.is_symlink() {
                    at = next;
                    continue;
                }
                links += 1;
                if links > LINKS_MAX {
                    return Err(format!("{}: too many links", path.display()));
                }
                if facts.uid() != 0 && facts.uid() != uid {
                    return Err(format!("the link {}: belongs to user {}", next.display(), facts.uid()));
                }
                left.extend(parts(&fs_err::read_link(&next).map_err(|e| e.to_string())?));
            }
        }
    }
    Ok(at)
}

/// Refuses a directory in which others than root and the daemon's user may replace what these have there.
fn keeps_files(directory: &Path, uid: u32) -> Result<(), String> {
    let wrong = |what: String| format!("the directory {}: {what}", directory.display());
    let facts = fs_err::metadata(directory).map_err(|e| e.to_string())?;
    if facts.uid() != 0 && facts.uid() != uid {
        return Err(wrong(format!("belongs to user {}: chown it to root or to user {uid}", facts.uid())));
    }
    // In one with the sticky bit, such as /tmp, everyone removes and renames only what is their own.
    if facts.mode() & 0o022 != 0 && facts.mode() & 0o1000 == 0 {
        return Err(wrong("others may replace files in it: chmod go-w".to_owned()));
    }
    Ok(())
}

/// Whether these are the bytes of a static program for machines of an architecture.
fn check(bytes: &[u8], arch: Arch) -> Result<(), &'static str> {
    if !bytes.starts_with(MAGIC) {
        return Err("not an ELF program");
    }
    if Arch::of_elf(bytes) != Some(arch) {
        return Err(match arch {
            Arch::X86_64 => "a program for another architecture than x86_64",
            Arch::Aarch64 => "a program for another architecture than aarch64",
        });
    }
    if !number::<2>(bytes, 16).map(u16::from_le_bytes).is_some_and(|kind| KINDS.contains(&kind)) {
        return Err("not a program: a library or an object file");
    }
    let headers = headers(bytes).ok_or("a damaged ELF program: its headers are not in the file")?;
    if headers.contains(&INTERPRETER) {
        return Err("linked dynamically, and there are no libraries where it starts: link it statically");
    }
    Ok(())
}

/// The kinds of the program headers; `None` if they are not all in the file.
fn headers(bytes: &[u8]) -> Option<Vec<u32>> {
    let first = usize::try_from(u64::from_le_bytes(number(bytes, 32)?)).ok()?;
    let size = usize::from(u16::from_le_bytes(number(bytes, 54)?));
    let count = usize::from(u16::from_le_bytes(number(bytes, 56)?));
    let kind = |index: usize| {
        let at = first.checked_add(size.checked_mul(index)?)?;
        number(bytes, at).map(u32::from_le_bytes)
    };
    (count > 0).then(|| (0..count).map(kind).collect())?
}

/// The bytes at an offset.
fn number<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;
    use crate::daemon::AGENT;

    /// Writes a file of this user, and reads it as the guest binary.
    fn read(bytes: &[u8], mode: u32) -> Result<GuestBinary, String> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("guest");
        fs_err::write(&path, bytes).unwrap();
        fs_err::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        GuestBinary::read(&path, rustix::process::getuid().as_raw(), Arch::HOST)
    }

    #[test]
    fn the_embedded_guest_would_be_taken() {
        assert_eq!(read(AGENT, 0o755).unwrap().bytes(), AGENT);
        assert_eq!(read(AGENT, 0o600).unwrap().bytes(), AGENT);
    }

    #[test]
    fn what_is_no_guest_is_refused_with_the_reason() {
        let changed = |at: usize, to: u8| {
            let mut bytes = AGENT.to_vec();
            bytes[at] = to;
            bytes
        };
        // The beginning is enough; with what is for a debugger it may be larger than any guest.
        let mut own = fs_err::read(std::env::current_exe().unwrap()).unwrap();
        own.truncate(1 << 16);
        for (bytes, reason) in [
            (b"#!/bin/sh\n".to_vec(), "not an ELF program"),
            (b"\x7fELF".to_vec(), "another architecture"),
            (changed(4, 1), "another architecture"),
            (changed(18, 3), "another architecture"),
            (changed(16, 1), "not a program"),
            (AGENT[..64].to_vec(), "damaged"),
            (changed(39, 0xff), "damaged"),
            (own, "link it statically"),
        ] {
            let said = read(&bytes, 0o755).unwrap_err();
            assert!(said.contains(reason), "{reason}: {said}");
        }
    }

    #[test]
    fn a_guest_of_the_other_architecture_is_taken_for_that_only() {
        let mut bytes = AGENT.to_vec();
        bytes[18..20].copy_from_slice(&Arch::FOREIGN.elf_machine().to_le_bytes());
        assert_eq!(check(&bytes, Arch::FOREIGN), Ok(()));
        assert!(check(&bytes, Arch::HOST).unwrap_err().ends_with(Arch::HOST.as_str()));
        assert!(check(AGENT, Arch::FOREIGN).unwrap_err().ends_with(Arch::FOREIGN.as_str()));
    }

    #[test]
    fn a_file_that_others_may_change_is_refused() {
        assert!(read(AGENT, 0o775).unwrap_err().contains("others may change it"));
        let directory = tempfile::tempdir().unwrap();
        let own = rustix::process::getuid().as_raw();
        assert!(
            GuestBinary::read(directory.path(), own, Arch::HOST).unwrap_err().contains("not a regular file")
        );
        assert!(GuestBinary::read(&directory.path().join("none"), own, Arch::HOST).is_err());
        let fifo = directory.path().join("fifo");
        let made = std::process::Command::new("mkfifo").arg(&fifo).status().unwrap();
        assert!(made.success());
        assert!(GuestBinary::read(&fifo, own, Arch::HOST).unwrap_err().contains("not a regular file"));
        // A link is followed: what it leads to counts.
        let (file, link) = (directory.path().join("file"), directory.path().join("link"));
        fs_err::write(&file, AGENT).unwrap();
        symlink(&file, &link).unwrap();
        assert!(GuestBinary::read(&link, own, Arch::HOST).is_ok());
        // Who may write to a directory puts another file in its place; but not with the sticky bit.
        let below = directory.path().join("below");
        fs_err::create_dir(&below).unwrap();
        let deep = below.join("file");
        fs_err::write(&deep, AGENT).unwrap();
        let beside = below.join("link");
        symlink(&file, &beside).unwrap();
        let set = |mode: u32| fs_err::set_permissions(&below, std::fs::Permissions::from_mode(mode)).unwrap();
        for (mode, is_refused) in [(0o755, false), (0o775, true), (0o757, true), (0o1777, false)] {
            set(mode);
            for path in [&deep, &beside] {
                let said = GuestBinary::read(path, own, Arch::HOST).err().unwrap_or_default();
                assert_eq!(said.contains("others may replace files in it"), is_refused, "{mode:o}: {said}");
            }
        }
        // Wherever a link is on the way: one to a directory, or one that another link leads to.
        let safe = directory.path().join("safe");
        fs_err::create_dir(&safe).unwrap();
        fs_err::write(safe.join("file"), AGENT).unwrap();
        symlink("../safe", below.join("place")).unwrap();
        let first = safe.join("first");
        symlink(&beside, &first).unwrap();
        for (mode, is_refused) in [(0o755, false), (0o757, true)] {
            set(mode);
            for path in [&below.join("place/file"), &first] {
                let said = GuestBinary::read(path, own, Arch::HOST).err().unwrap_or_default();
                assert_eq!(said.contains("others may replace files in it"), is_refused, "{mode:o}: {said}");
            }
        }
        set(0o755);
        symlink("ring", directory.path().join("ring")).unwrap();
        let said = GuestBinary::read(&directory.path().join("ring"), own, Arch::HOST).unwrap_err();
        assert!(said.contains("too many links"), "{said}");
        if own == 0 {
            std::os::unix::fs::chown(&below, Some(12345), None).unwrap();
            let said = GuestBinary::read(&deep, own, Arch::HOST).unwrap_err();
            assert!(said.contains("below: belongs to user 12345"), "{said}");
            std::os::unix::fs::lchown(&link, Some(12345), None).unwrap();
            let said = GuestBinary::read(&link, own, Arch::HOST).unwrap_err();
            assert!(said.contains("link: belongs to user 12345"), "{said}");
            std::os::unix::fs::chown(&file, Some(12345), None).unwrap();
            let said = GuestBinary::read(&file, own, Arch::HOST).unwrap_err();
            assert!(said.contains("belongs to user 12345"), "{said}");
            assert!(GuestBinary::read(&file, 12345, Arch::HOST).is_ok());
        }
    }
}
