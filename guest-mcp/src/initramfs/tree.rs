//! The kernel's modules: a read-only drive that VMs share, mounted on `/lib/modules/VERSION` of the root drive.
//!
//! It is identified by its UUID and by being read-only, not by its position among the drives. The root drive is not trusted:
//! only its usual link from `/lib` to `/usr/lib` is followed.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, Mode, OFlags, mkdirat, openat, readlinkat, statat};
use rustix::io::Errno;
use rustix::mount::MountFlags;

use super::drive::Events;
use crate::ext4::{SUPERBLOCK_AT, Superblock};
use crate::os::{read_small, reason};

/// How long the drive may take to appear after the root drive.
const APPEAR_TIMEOUT: Duration = Duration::from_secs(15);
/// Where the kernel lists its drives.
const DRIVES: &str = "/sys/block";

/// Mounts the modules with this filesystem UUID below `root`; adds any failure to `problems`.
pub(super) fn mount(uuid: &str, root: &str, events: &Events, problems: &mut Vec<String>) {
    if let Err(error) = try_mount(uuid, root, events) {
        problems.push(format!("mount the kernel's modules: {}", reason(&error)));
    }
}

fn try_mount(uuid: &str, root: &str, events: &Events) -> io::Result<()> {
    let wanted = parse_uuid(uuid).ok_or_else(|| io::Error::other(format!("{uuid:?} is not a UUID")))?;
    let name = rustix::system::uname();
    let version = name.release().to_str().ok().filter(|version| !version.contains('/') && *version != "..");
    let version = version.ok_or_else(|| io::Error::other("the kernel's version is not a file name"))?;
    let Some(place) = place(root, version)? else { return Ok(()) };

    let deadline = Instant::now() + APPEAR_TIMEOUT;
    let device = loop {
        if let Some(device) = find(&wanted) {
            break device;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::Error::other("no drive has them"));
        }
        events.wait(left);
    };
    let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOATIME;
    // Through the descriptor, so that it is the directory that was checked, even if its name changed.
    let place = format!("/proc/self/fd/{}", place.as_raw_fd());
    Ok(rustix::mount::mount(device, place, "ext4", flags, None)?)
}

/// Returns the read-only drive with this filesystem UUID.
fn find(uuid: &[u8; 16]) -> Option<String> {
    std::fs::read_dir(DRIVES).ok()?.flatten().find_map(|entry| {
        let name = entry.file_name().into_string().ok().filter(|name| name.starts_with("vd"))?;
        read_small(entry.path().join("ro"), 4).filter(|flag| flag.trim() == "1")?;
        let device = format!("/dev/{name}");
        let mut bytes = [0; 1024];
        File::open(&device).ok()?.read_exact_at(&mut bytes, SUPERBLOCK_AT).ok()?;
        (Superblock::uuid(&bytes)? == *uuid).then_some(device)
    })
}

/// Returns the mount point, created if it is missing; `None` if the image has its own modules for this kernel.
fn place(root: &str, version: &str) -> io::Result<Option<OwnedFd>> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(root, flags, Mode::empty())?;
    let lib = match readlinkat(&root, "lib", Vec::new()) {
        Ok(target) if matches!(target.to_bytes(), b"usr/lib" | b"/usr/lib") => {
            directory(&directory(&root, "usr")?, "lib")?
        }
        Ok(_) => return Err(io::Error::other("the image's /lib is a link to an unusual place")),
        Err(_) => directory(&root, "lib")?,
    };
    let place = directory(&directory(&lib, "modules")?, version)?;
    let has_own = statat(&place, "modules.dep", AtFlags::SYMLINK_NOFOLLOW).is_ok();
    Ok((!has_own).then_some(place))
}

/// Opens a directory that is not a link; creates it if it is missing.
fn directory(parent: &OwnedFd, name: &str) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let failed = |error: Errno| {
        let error = io::Error::from(error);
        io::Error::new(error.kind(), format!("the image's directory {name}: {}", reason(&error)))
    };
    match openat(parent, name, flags, Mode::empty()) {
        Err(Errno::NOENT) => {
            mkdirat(parent, name, Mode::from_raw_mode(0o755)).map_err(failed)?;
            openat(parent, name, flags, Mode::empty()).map_err(failed)
        }
        other => other.map_err(failed),
    }
}

fn parse_uuid(text: &str) -> Option<[u8; 16]> {
    let digits: String = text.chars().filter(|c| *c != '-').collect();
    data_encoding::HEXLOWER_PERMISSIVE.decode(digits.as_bytes()).ok()?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::path::Path;

    use super::*;

    fn path_of(place: &OwnedFd) -> std::path::PathBuf {
        std::fs::read_link(format!("/proc/self/fd/{}", place.as_raw_fd())).unwrap()
    }

    fn placed(root: &Path) -> io::Result<Option<std::path::PathBuf>> {
        let found = place(root.to_str().unwrap(), "6.1.0-x")?;
        Ok(found.map(|place| path_of(&place).strip_prefix(root).unwrap().to_owned()))
    }

    #[test]
    fn the_place_is_made_in_either_lib() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path().canonicalize().unwrap();
        assert_eq!(placed(&root).unwrap().unwrap(), Path::new("lib/modules/6.1.0-x"));
        std::fs::remove_dir_all(root.join("lib")).unwrap();
        for target in ["usr/lib", "/usr/lib"] {
            std::fs::create_dir_all(root.join("usr/lib")).unwrap();
            symlink(target, root.join("lib")).unwrap();
            assert_eq!(placed(&root).unwrap().unwrap(), Path::new("usr/lib/modules/6.1.0-x"));
            std::fs::remove_file(root.join("lib")).unwrap();
        }
    }

    #[test]
    fn modules_that_an_image_brings_itself_are_left_alone() {
        let root = tempfile::tempdir().unwrap();
        let own = root.path().join("lib/modules/6.1.0-x");
        std::fs::create_dir_all(&own).unwrap();
        assert!(placed(&root.path().canonicalize().unwrap()).unwrap().is_some());
        std::fs::write(own.join("modules.dep"), "").unwrap();
        assert_eq!(placed(&root.path().canonicalize().unwrap()).unwrap(), None);
    }

    #[test]
    fn links_of_an_image_lead_nowhere() {
        let outside = tempfile::tempdir().unwrap();
        let to_outside = outside.path().to_str().unwrap();
        for (link, target) in [
            ("lib", to_outside),
            ("lib", ".."),
            ("lib", "usr/lib/../.."),
            ("lib/modules", to_outside),
            ("lib/modules", "../etc"),
            ("lib/modules/6.1.0-x", to_outside),
            ("lib/modules/6.1.0-x", "/run"),
        ] {
            let root = tempfile::tempdir().unwrap();
            let link = root.path().join(link);
            std::fs::create_dir_all(link.parent().unwrap()).unwrap();
            symlink(target, &link).unwrap();
            assert!(placed(&root.path().canonicalize().unwrap()).is_err(), "{link:?} -> {target}");
        }
        // A link in place of /usr, which /lib points into.
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(outside.path().join("lib")).unwrap();
        symlink("usr/lib", root.path().join("lib")).unwrap();
        symlink(to_outside, root.path().join("usr")).unwrap();
        assert!(placed(&root.path().canonicalize().unwrap()).is_err());
        std::fs::remove_dir(outside.path().join("lib")).unwrap();
        assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0, "something was made outside");
        // A file in place of a directory.
        let root = tempfile::tempdir().unwrap();
        std::fs::write(root.path().join("lib"), "").unwrap();
        assert!(placed(&root.path().canonicalize().unwrap()).is_err());
    }

    #[test]
    fn uuids_are_read() {
        let uuid = parse_uuid("00010203-0405-8607-8809-0a0b0c0d0eFF").unwrap();
        assert_eq!((uuid[1], uuid[15]), (1, 0xff));
        for bad in ["", "00", "00010203-0405-8607-8809-0a0b0c0d0e", "x0010203-0405-8607-8809-0a0b0c0d0eff"] {
            assert!(parse_uuid(bad).is_none(), "{bad}");
        }
    }
}
