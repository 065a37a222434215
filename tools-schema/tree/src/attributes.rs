//! Extended attributes of files: of programs (`user.*`), and those that belong to a file's owner and mode: capabilities and its access control list.

use std::os::fd::AsFd;

use rustix::fs::XattrFlags;
use rustix::io::Errno;

use crate::destination::{Facts, settle};

/// The name and the value of one.
pub(crate) type Attribute = (Vec<u8>, Vec<u8>);

/// The prefix of those of programs.
const OF_PROGRAMS: &[u8] = b"user.";
/// Those of them that are left out: where a file was downloaded from, which may be a secret, and what file systems of containers and of virtual machines
/// take for owners, modes and deleted files.
const NOT_COPIED: [&[u8]; 4] = [b"user.xdg.", b"user.overlay.", b"user.virtfs.", b"user.containers."];
/// Those that give rights, so that they are kept only where owner and mode are, too.
const OF_RIGHTS: [&[u8]; 2] = [b"security.capability", b"system.posix_acl_access"];
/// The size of the buffer for names that suffices for nearly all files, in bytes.
const NAMES: usize = 256;
/// The maximum size of all names, and of a value, of Linux (`XATTR_LIST_MAX` of linux/limits.h), in bytes.
const MAX: usize = 64 << 10;
/// The maximum size of all attributes of a file that are copied, in bytes: a receiver takes no header of a mebibyte.
const ALL_MAX: usize = 256 << 10;

/// Returns whether an attribute is copied. `rights` says whether owner and mode are kept.
pub(crate) fn is_kept(name: &[u8], rights: bool) -> bool {
    let is_of_program =
        name.starts_with(OF_PROGRAMS) && !NOT_COPIED.iter().any(|left| name.starts_with(left));
    is_of_program || (rights && OF_RIGHTS.contains(&name))
}

/// Reads the attributes of an open file that can be copied. What cannot be read is left out.
pub(crate) fn read(file: impl AsFd) -> Vec<Attribute> {
    let mut few = [0_u8; NAMES];
    let names = match rustix::fs::flistxattr(&file, &mut few) {
        Ok(0) => return Vec::new(),
        Ok(length) => few[..length].to_vec(),
        Err(Errno::RANGE) => {
            let mut many = vec![0_u8; MAX];
            let Ok(length) = rustix::fs::flistxattr(&file, &mut many) else { return Vec::new() };
            many.truncate(length);
            many
        }
        Err(_) => return Vec::new(),
    };
    let (mut found, mut all, mut value) = (Vec::new(), 0, Vec::new());
    for name in names.split(|byte| *byte == 0).filter(|name| is_kept(name, true)) {
        value.resize(MAX, 0_u8);
        let Ok(length) = rustix::fs::fgetxattr(&file, name, &mut value) else { continue };
        all += name.len() + length;
        if all > ALL_MAX {
            break;
        }
        found.push((name.to_vec(), value[..length].to_vec()));
    }
    found
}

/// Sets attributes of an open file besides its owner, mode and time; attributes as far as its filesystem and the rights of this process allow.
pub(crate) fn settle_with(file: impl AsFd, facts: &Facts, attributes: &[&Attribute]) -> Result<(), Errno> {
    // A file that is read-only by its mode takes none from its owner.
    write(&file, attributes);
    settle(&file, facts)?;
    // Changing the owner removed capabilities.
    write(&file, attributes);
    Ok(())
}

fn write(file: impl AsFd, attributes: &[&Attribute]) {
    for (name, value) in attributes {
        let _ = rustix::fs::fsetxattr(&file, name.as_slice(), value, XattrFlags::empty());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_that_mean_something_to_a_host_are_left_out() {
        for kept in ["user.mime_type", "user.checksum", "user.overlays"] {
            assert!(is_kept(kept.as_bytes(), false), "{kept}");
        }
        for left in [
            "user.xdg.origin.url",
            "user.overlay.whiteout",
            "user.virtfs.uid",
            "user.containers.override_stat",
        ] {
            assert!(!is_kept(left.as_bytes(), true), "{left}");
        }
        assert!(is_kept(b"security.capability", true) && !is_kept(b"security.capability", false));
        assert!(!is_kept(b"trusted.overlay.opaque", true) && !is_kept(b"security.selinux", true));
    }
}
