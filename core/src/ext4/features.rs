//! Which features an imported ext4 filesystem may have, so that guests can mount it for writing and grow it.
//!
//! Bits: `EXT4_FEATURE_*` of linux/fs/ext4/ext4.h.

use std::path::Path;

use super::Ext4Error;
use super::superblock::Superblock;

/// The supported incompatible features (required for mounting): filetype, needs_recovery, meta_bg, extents, 64bit, mmp,
/// flex_bg, ea_inode, csum_seed, large_dir, inline_data.
const INCOMPATIBLE: u32 = 0x2 | 0x4 | 0x10 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x2000 | 0x4000 | 0x8000;
/// The supported read-only compatible features (required for writing): sparse_super, large_file, btree_dir, huge_file,
/// uninit_bg, dir_nlink, extra_isize, quota, metadata_csum, project, orphan_present.
const WRITABLE: u32 = 0x1 | 0x2 | 0x4 | 0x8 | 0x10 | 0x20 | 0x40 | 0x100 | 0x400 | 0x2000 | 0x1_0000;
/// Names of unsupported features, by field and bits.
const NAMES: [(Place, u32, &str); 9] = [
    (Place::Incompatible, 0x1, "compression"),
    (Place::Incompatible, 0x8, "journal_dev"),
    (Place::Incompatible, 0x1_0000, "encrypt"),
    (Place::Incompatible, 0x2_0000, "casefold"),
    (Place::Writable, 0x200, "bigalloc"),
    (Place::Writable, 0x1000, "read-only"),
    (Place::Writable, 0x4000, "shared_blocks"),
    (Place::Writable, 0x8000, "verity"),
    (Place::Compatible, 0x200, "sparse_super2"),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Compatible,
    Incompatible,
    Writable,
}

/// Refuses a filesystem with features that guests cannot mount for writing or grow; the error names them.
pub(crate) fn check_features(disk: &Path) -> Result<(), Ext4Error> {
    let Some(superblock) = Superblock::read(disk)? else {
        return Err(Ext4Error::NoFilesystem { disk: disk.to_owned() });
    };
    let (compatible, incompatible, writable) = superblock.features();
    // Unknown compatible features are harmless.
    let mut left = [
        (Place::Compatible, compatible & 0x200),
        (Place::Incompatible, incompatible & !INCOMPATIBLE),
        (Place::Writable, writable & !WRITABLE),
    ];
    let mut found: Vec<String> = Vec::new();
    for (place, bit, name) in NAMES {
        for (at, bits) in &mut left {
            if *at == place && *bits & bit != 0 {
                *bits &= !bit;
                found.push(name.to_owned());
            }
        }
    }
    found.extend(
        left.iter().filter(|(_, bits)| *bits != 0).map(|(_, bits)| format!("unknown features {bits:#x}")),
    );
    if superblock.has_external_journal() {
        found.push("a journal on another device".to_owned());
    }
    if found.is_empty() { Ok(()) } else { Err(Ext4Error::Features { what: found.join(", ") }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::os::mounted::run;

    fn checked(options: &[&str]) -> Result<(), String> {
        let base = tempfile::tempdir().unwrap();
        let disk = base.path().join("disk");
        std::fs::File::create(&disk).unwrap().set_len(64 << 20).unwrap();
        run(std::process::Command::new("/sbin/mke2fs")
            .args(["-q", "-F", "-t", "ext4"])
            .args(options)
            .arg(&disk));
        check_features(&disk).map_err(|error| error.to_string())
    }

    #[test]
    fn filesystems_that_guests_can_mount_and_grow_are_taken() {
        for options in [
            &[][..],
            &["-O", "^has_journal"],
            &["-O", "inline_data,ea_inode,large_dir,metadata_csum_seed,quota,project,mmp"],
            &["-O", "^metadata_csum,^64bit"],
            &["-O", "^extents,^flex_bg,^64bit,^metadata_csum,uninit_bg"],
            &["-O", "meta_bg,^resize_inode"],
        ] {
            assert_eq!(checked(options), Ok(()), "{options:?}");
        }
    }

    #[test]
    fn other_features_are_refused_by_name() {
        for (feature, option) in [
            ("bigalloc", "bigalloc"),
            ("casefold", "casefold"),
            ("encrypt", "encrypt"),
            ("sparse_super2", "sparse_super2"),
            ("journal_dev", "journal_dev"),
        ] {
            let error = checked(&["-O", option]).unwrap_err();
            assert!(error.contains(feature), "{option}: {error}");
        }
    }

    #[test]
    fn features_of_the_future_are_refused_by_their_bits() {
        let base = tempfile::tempdir().unwrap();
        let disk = base.path().join("disk");
        std::fs::File::create(&disk).unwrap().set_len(64 << 20).unwrap();
        run(std::process::Command::new("/sbin/mke2fs").args(["-q", "-F", "-t", "ext4"]).arg(&disk));
        let mut bytes = std::fs::read(&disk).unwrap();
        bytes[1024 + 0x63] |= 0x80;
        std::fs::write(&disk, bytes).unwrap();
        let error = check_features(&disk).unwrap_err().to_string();
        assert!(error.contains("unknown features 0x80000000"), "{error}");
    }
}
