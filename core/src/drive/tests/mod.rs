//! Drives on real btrfs, XFS and ext4. These tests run as root.

mod unsynced;

use std::fs;
use std::os::unix::fs::FileExt;

use nexus_schema::ErrorCode;

use super::*;
use crate::os::disk::free_bytes;
use crate::os::mounted::{Mounted, USER, as_user};

const MIB: u64 = 1 << 20;

/// An image: 40 MiB long, 3 MiB of data in two places.
fn image(directory: &Path) -> PathBuf {
    create_home(directory).unwrap();
    let file = directory.join("rootfs.ext4");
    let open = fs::File::create_new(&file).unwrap();
    open.set_len(40 * MIB).unwrap();
    open.write_all_at(&vec![7; 2 << 20], 0).unwrap();
    open.write_all_at(&vec![9; 1 << 20], 30 * MIB).unwrap();
    open.sync_all().unwrap();
    fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o444)).unwrap();
    fs::write(directory.join("note"), "not part of a drive").unwrap();
    file
}

/// Checks that a disk holds the image and is `length` long.
#[track_caller]
fn assert_is_clone(disk: &Path, image: &Path, length: u64) {
    assert_eq!(fs::metadata(disk).unwrap().len(), length, "{}", disk.display());
    let (disk_file, image_file) = (fs::File::open(disk).unwrap(), fs::File::open(image).unwrap());
    let mut chunks = (vec![0; 1 << 20], vec![0; 1 << 20]);
    for at in (0..length).step_by(1 << 20) {
        let read = disk_file.read_at(&mut chunks.0, at).unwrap();
        // Zeros follow the image's end.
        let of_image = image_file.read_at(&mut chunks.1, at).unwrap();
        chunks.1[of_image..].fill(0);
        assert!(read > 0 && chunks.0[..read] == chunks.1[..read], "{} at {at}", disk.display());
    }
}

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .filter(|name| name != "lost+found")
        .collect();
    names.sort();
    names
}

/// All promises of a backend, in one place.
async fn life_of_drives(on: &Path, backend: &str) {
    let image = image(&on.join("image"));
    let (drives_in, progress) = (on.join("drives"), Progress::default());
    let drives = Drives::probe(&drives_in).unwrap();
    assert_eq!(drives.backend(), backend);
    assert!(names(&drives_in).is_empty(), "the probe leaves nothing");

    let drive = drives_in.join("a");
    let disk = drives.clone_image(&image, &drive, ByteSize::mib(64), &progress).await.unwrap();
    assert_eq!(disk, drive.join(DISK));
    drives.settle(&drive).await.unwrap();
    assert_eq!(names(&drive), [DISK]);
    assert_is_clone(&disk, &image, 64 * MIB);
    let allocated = drives.allocated_bytes(&drive).await.unwrap();
    assert!((3 * MIB..5 * MIB).contains(&allocated), "{allocated}");

    // Writes to one are not visible in the other.
    let open = fs::OpenOptions::new().write(true).open(&disk).unwrap();
    open.write_all_at(b"written", 100).unwrap();
    let other = drives.clone_image(&disk, &drives_in.join("b"), ByteSize::mib(64), &progress).await.unwrap();
    open.write_all_at(b"later", 200).unwrap();
    assert_eq!(&fs::read(&other).unwrap()[100..107], b"written");
    assert_eq!(&fs::read(&other).unwrap()[200..205], &[7; 5]);
    assert_eq!(&fs::read(&image).unwrap()[100..107], &[7; 7]);

    // Growing keeps the content, shrinking is refused, names are unique, and sizes are whole blocks.
    drives.grow(&drive, ByteSize::mib(100), &progress).await.unwrap();
    assert_eq!(fs::metadata(&disk).unwrap().len(), 100 * MIB);
    assert_eq!(&fs::read(&disk).unwrap()[200..205], b"later");
    let error = drives.grow(&drive, ByteSize::mib(99), &progress).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::InvalidArgument, "{error}");
    let error =
        drives.clone_image(&image, &drives_in.join("c"), ByteSize::mib(39), &progress).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::InvalidArgument, "{error}");
    assert!(error.hint().unwrap().contains("40MiB"));
    let error = drives.clone_image(&image, &drive, ByteSize::mib(64), &progress).await.unwrap_err();
    assert!(matches!(error, DriveError::Exists { .. }), "{error}");
    let missing = on.join("missing");
    drives.clone_image(&missing, &drives_in.join("c"), ByteSize::mib(64), &progress).await.unwrap_err();
    let empty = drives.create_empty(&drives_in.join("e"), ByteSize::bytes(10 * MIB + 1)).await.unwrap();
    assert_eq!(fs::metadata(&empty).unwrap().len(), 10 * MIB + 4096);
    assert_eq!(names(&drives_in), ["a", "b", "e"]);

    for name in ["a", "b", "e", "never-was"] {
        drives.delete(&drives_in.join(name)).await.unwrap();
    }
    assert!(names(&drives_in).is_empty());

    // A hundred at once.
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..100 {
        let (drives, image, progress) = (drives.clone(), image.clone(), progress.clone());
        let drive = drives_in.join(format!("d{number}"));
        tasks.spawn(async move { drives.clone_image(&image, &drive, ByteSize::mib(48), &progress).await });
    }
    for disk in tasks.join_all().await {
        assert_is_clone(&disk.unwrap(), &image, 48 * MIB);
    }
    assert_eq!(names(&drives_in).len(), 100);
    for number in 0..100 {
        drives.delete(&drives_in.join(format!("d{number}"))).await.unwrap();
    }

    // A sweep removes what a crash left, but not drives.
    drives.create_empty(&drives_in.join("stays"), ByteSize::mib(1)).await.unwrap();
    let half = stage::temporary(&drives_in);
    create_home(&half).unwrap();
    fs::write(half.join(DISK), "half").unwrap();
    drives.sweep(&HashSet::new()).unwrap();
    assert_eq!(names(&drives_in), ["stays"]);
    drives.delete(&drives_in.join("stays")).await.unwrap();
    assert!(names(&drives_in).is_empty());
}

#[tokio::test]
async fn a_drive_is_replaced_whatever_cut_it_off_before() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let drives = Drives::with(directory.path(), Copy);
    let made = |name: &str, text: &str| {
        fs::create_dir(at(name)).unwrap();
        fs::write(at(name).join(DISK), text).unwrap();
    };
    let disk = || fs::read_to_string(at("d").join(DISK)).unwrap();
    // Cut off before anything, between the two renames, and after them: each is gone on with, twice.
    for cut in ["before", "between", "after"] {
        made("d", "old");
        made(".nexus-s", "new");
        if cut != "before" {
            fs::rename(at("d"), at(".nexus-s-old")).unwrap();
        }
        if cut == "after" {
            fs::rename(at(".nexus-s"), at("d")).unwrap();
        }
        // The daemon's start keeps what a rollback needs.
        drives.sweep(&HashSet::from([".nexus-s".into()])).unwrap();
        for _ in 0..2 {
            drives.put_in_place(&at("d"), &at(".nexus-s")).await.unwrap();
            assert_eq!(disk(), "new", "{cut}");
        }
        drives.forget_replaced(&at(".nexus-s")).await.unwrap();
        assert_eq!(names(directory.path()), ["d"], "{cut}");
        drives.delete(&at("d")).await.unwrap();
    }
    // Nothing to put there, and nothing there.
    drives.put_in_place(&at("d"), &at(".nexus-s")).await.unwrap_err();
    made("d", "old");
    drives.put_in_place(&at("d"), &at(".nexus-s")).await.unwrap();
    assert_eq!(disk(), "old");
}

#[tokio::test]
async fn drives_live_on_ext4() {
    let disk = Mounted::fresh("ext4", 700);
    life_of_drives(disk.path(), "copy").await;
}

#[tokio::test]
async fn drives_live_on_xfs() {
    let disk = Mounted::fresh("xfs", 400);
    life_of_drives(disk.path(), "reflink").await;
}

#[tokio::test]
async fn drives_live_on_btrfs() {
    let disk = Mounted::fresh("btrfs", 400);
    life_of_drives(disk.path(), "btrfs").await;
}

#[test]
fn drives_of_an_ordinary_user_live_on_btrfs() {
    let disk = Mounted::fresh("btrfs", 400);
    let own = disk.path().join("own");
    fs::create_dir(&own).unwrap();
    std::os::unix::fs::chown(&own, Some(USER), Some(USER)).unwrap();
    as_user(life_of_drives(&own, "btrfs"));
    // Another user's image cannot be snapshotted, but reflinked.
    let image = image(&disk.path().join("of-root"));
    as_user(async {
        let drives = Drives::probe(&own.join("drives")).unwrap();
        let drive = own.join("drives/a");
        let cloned =
            drives.clone_image(&image, &drive, ByteSize::mib(64), &Progress::default()).await.unwrap();
        assert_is_clone(&cloned, &image, 64 * MIB);
        drives.delete(&drive).await.unwrap();
    });
    assert!(names(&own.join("drives")).is_empty());
}

#[tokio::test]
async fn a_full_disk_leaves_nothing() {
    for (kind, mebibytes) in [("ext4", 80), ("xfs", 400), ("btrfs", 200)] {
        let disk = Mounted::fresh(kind, mebibytes);
        let image = image(&disk.path().join("image"));
        let drives = Drives::probe(&disk.path().join("drives")).unwrap();
        // Until less than the reserve is free.
        let filler = fs::File::create(disk.path().join("filler")).unwrap();
        let mut at = 0;
        while free_bytes(disk.path()).unwrap() >= KEEP_FREE {
            filler.write_all_at(&vec![3; 1 << 20], at).unwrap();
            filler.sync_all().unwrap();
            at += MIB;
        }
        let drive = disk.path().join("drives/a");
        let progress = Progress::default();
        let error = drives.clone_image(&image, &drive, ByteSize::mib(64), &progress).await.unwrap_err();
        assert_eq!(error.code(), ErrorCode::DiskFull, "{kind}: {error}");
        let error = drives.create_empty(&drive, ByteSize::mib(64)).await.unwrap_err();
        assert_eq!(error.code(), ErrorCode::DiskFull, "{kind}: {error}");
        assert!(names(&disk.path().join("drives")).is_empty(), "{kind}");
    }
}

#[tokio::test]
async fn a_copy_is_cancelled_or_fails_without_a_trace() {
    let base = tempfile::tempdir().unwrap();
    let image = image(&base.path().join("image"));
    let drives = Drives::with(base.path(), Copy);
    let progress = Progress::default();
    progress.token().cancel();
    let drive = base.path().join("drive");
    let error = drives.clone_image(&image, &drive, ByteSize::mib(64), &progress).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::Cancelled);
    assert_eq!(names(base.path()), ["image"]);
    // A reflink that is not supported is an error and leaves no half-made drive.
    let disk = Mounted::fresh("ext4", 200);
    let drives = Drives::with(disk.path(), Reflink);
    let drive = disk.path().join("drive");
    drives.clone_image(&image, &drive, ByteSize::mib(64), &Progress::default()).await.unwrap_err();
    assert!(names(disk.path()).is_empty());
}

#[tokio::test]
async fn copies_cross_filesystems() {
    let (from, to) = (Mounted::fresh("xfs", 400), Mounted::fresh("ext4", 200));
    let image = image(&from.path().join("image"));
    let drives = Drives::probe(&to.path().join("drives")).unwrap();
    let drive = to.path().join("drives/a");
    let disk = drives.clone_image(&image, &drive, ByteSize::mib(64), &Progress::default()).await.unwrap();
    assert_is_clone(&disk, &image, 64 * MIB);
    assert!(drives.allocated_bytes(&drive).await.unwrap() < 5 * MIB);
}

#[tokio::test]
async fn a_filesystem_fills_its_drive_and_is_whole() {
    let base = tempfile::tempdir().unwrap();
    let progress = Progress::default();
    let image = base.path().join("image.ext4");
    std::fs::File::create_new(&image).unwrap().set_len(40 * MIB).unwrap();
    crate::ext4::format(&image, "data", &progress).await.unwrap();
    let drives = Drives::probe(&base.path().join("drives")).unwrap();
    let drive = base.path().join("drives/a");
    let disk = drives.clone_image(&image, &drive, ByteSize::gib(8), &progress).await.unwrap();
    let size = |disk: &Path| {
        let mounted = Mounted::read_only(disk);
        let stat = rustix::fs::statvfs(mounted.path()).unwrap();
        stat.f_blocks * stat.f_frsize
    };
    assert!(size(&disk) > 8_000 * MIB, "{}", size(&disk));
    assert!(drives.allocated_bytes(&drive).await.unwrap() < 4 * MIB);
    drives.grow(&drive, ByteSize::gib(100), &progress).await.unwrap();
    assert!(size(&disk) > 100_000 * MIB);
    crate::os::mounted::run(std::process::Command::new("/sbin/e2fsck").arg("-fn").arg(&disk));
}

/// How many blocks a filesystem has (`s_blocks_count_lo`).
fn blocks(disk: &Path) -> u64 {
    let mut count = [0; 4];
    fs::File::open(disk).unwrap().read_exact_at(&mut count, 1024 + 4).unwrap();
    u32::from_le_bytes(count).into()
}

#[tokio::test]
async fn what_a_guest_wrote_is_grown_by_a_guest() {
    let base = tempfile::tempdir().unwrap();
    let progress = Progress::default();
    let drives = Drives::probe(&base.path().join("drives")).unwrap();
    let drive = base.path().join("drives/a");
    let disk = drives.create_formatted(&drive, ByteSize::mib(40), "data", &progress).await.unwrap();
    drop(Mounted::writable(&disk));
    drives.grow(&drive, ByteSize::mib(100), &progress).await.unwrap();
    assert_eq!(std::fs::metadata(&disk).unwrap().len(), 100 * MIB);
    assert_eq!(blocks(&disk), 40 * MIB / 4096);
}

#[tokio::test]
async fn a_filesystem_that_a_guest_damaged_is_repaired_or_refused() {
    use std::os::unix::fs::MetadataExt;
    let base = tempfile::tempdir().unwrap();
    let progress = Progress::default();
    let drives = Drives::probe(&base.path().join("drives")).unwrap();
    let drive = base.path().join("drives/a");
    let disk = drives.create_formatted(&drive, ByteSize::mib(40), "data", &progress).await.unwrap();
    // As the disk is after a crash: copied while it is mounted.
    let cut_off = {
        let mounted = Mounted::writable(&disk);
        std::fs::write(mounted.path().join("file"), [7; 10_000]).unwrap();
        rustix::fs::syncfs(std::fs::File::open(mounted.path()).unwrap()).unwrap();
        std::fs::read(&disk).unwrap()
    };
    // What is damaged, and whether it can be repaired without asking: nothing; the superblock's checksum; the group table; both.
    for (damaged, is_repaired) in
        [(&[][..], true), (&[1040], false), (&[4096], false), (&[1056, 4096], false)]
    {
        let mut bytes = cut_off.clone();
        for at in damaged {
            bytes[*at..*at + 32].fill(0xa5);
        }
        std::fs::write(&disk, bytes).unwrap();
        let labelled = drives.label(&drive, "other", &progress).await;
        assert_eq!(labelled.is_ok(), is_repaired, "{damaged:?}: {labelled:?}");
        assert_eq!(std::fs::metadata(&disk).unwrap().uid(), 0, "it stays with nobody");
    }
}
