//! Copies that were reported before they were synced, and what happens to them.

use std::process::Command;

use super::*;
use crate::os::mounted::run;

/// An earlier boot of the host.
const EARLIER: &str = "00000000-0000-4000-8000-000000000000";

fn this_run() -> &'static str {
    crate::os::boot_id::of_host().unwrap()
}

/// The names of the files beside the disk.
fn marks(drive: &Path) -> Vec<String> {
    names(drive).into_iter().filter(|name| name != DISK).collect()
}

struct Scene {
    disk: Mounted,
    image: PathBuf,
    drives: Drives,
    progress: Progress,
}

impl Scene {
    fn new() -> Self {
        let disk = Mounted::fresh("ext4", 300);
        let image = image(&disk.path().join("image"));
        let drives = Drives::probe(&disk.path().join("drives")).unwrap();
        assert_eq!(drives.backend(), "copy");
        Self { disk, image, drives, progress: Progress::default() }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.disk.path().join("drives").join(name)
    }

    async fn copy(&self, name: &str) -> PathBuf {
        let drive = self.at(name);
        self.drives.clone_image(&self.image, &drive, ByteSize::mib(40), &self.progress).await.unwrap();
        self.drives.settle(&drive).await.unwrap();
        assert_eq!(marks(&drive), Vec::<String>::new());
        drive
    }
}

#[test]
fn a_copy_has_a_mark_until_it_is_on_the_disk() {
    let disk = Mounted::fresh("ext4", 300);
    let image = image(&disk.path().join("image"));
    let drive = disk.path().join("drive");
    Copy.clone_image(&image, &drive, ByteSize::mib(40), &Progress::default()).unwrap();
    assert_eq!(marks(&drive), [format!("unsynced-image-{}", this_run())]);
    // It is complete for everybody, and so is a copy of it.
    let copy = disk.path().join("copy");
    Copy.clone_image(&drive.join(DISK), &copy, ByteSize::mib(40), &Progress::default()).unwrap();
    assert_eq!(marks(&copy), [format!("unsynced-drive-{}", this_run())]);
    for drive in [&drive, &copy] {
        assert_is_clone(&drive.join(DISK), &image, 40 * MIB);
        assert_eq!(pending::lost(drive).unwrap(), None);
        std::thread::scope(|scope| {
            let all: Vec<_> = (0..4).map(|_| scope.spawn(|| pending::settle(drive))).collect();
            for one in all {
                one.join().unwrap().unwrap();
            }
        });
        assert_eq!(marks(drive), Vec::<String>::new());
        assert_is_clone(&drive.join(DISK), &image, 40 * MIB);
    }
}

#[tokio::test]
async fn what_an_earlier_daemon_left_is_put_on_the_disk() {
    let scene = Scene::new();
    let (one, other) = (scene.copy("one").await, scene.copy("other").await);
    pending::mark(&one, Origin::Drive, this_run()).unwrap();
    assert_eq!(scene.drives.settle_all().unwrap(), []);
    // It is synced in the background.
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(120);
    while !marks(&one).is_empty() {
        assert!(std::time::Instant::now() < deadline, "the mark stays");
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    assert_eq!(marks(&other), Vec::<String>::new());
    // A drive that is deleted meanwhile is gone with its marker.
    pending::mark(&other, Origin::Drive, this_run()).unwrap();
    scene.drives.settle_later(&other);
    scene.drives.delete(&other).await.unwrap();
    scene.drives.settle(&other).await.unwrap();
    assert_eq!(names(&scene.disk.path().join("drives")), ["one"]);
}

#[tokio::test]
async fn a_copy_that_the_host_did_not_get_on_the_disk_is_not_taken_for_whole() {
    let scene = Scene::new();
    let (progress, size) = (&scene.progress, ByteSize::mib(40));
    let drive = scene.copy("a").await;
    // A possible state after a crash: only the names exist.
    pending::mark(&drive, Origin::of(&scene.image), EARLIER).unwrap();
    fs::OpenOptions::new().write(true).open(drive.join(DISK)).unwrap().set_len(0).unwrap();

    let copy_of_it = scene.drives.clone_image(&drive.join(DISK), &scene.at("b"), size, progress).await;
    for error in [
        scene.drives.settle(&drive).await.unwrap_err(),
        scene.drives.grow(&drive, ByteSize::mib(64), progress).await.unwrap_err(),
        scene.drives.label(&drive, "data", progress).await.unwrap_err(),
        copy_of_it.unwrap_err(),
    ] {
        assert!(matches!(error, DriveError::Lost { .. }), "{error}");
        assert!(error.hint().unwrap().contains("make it again"));
    }
    assert!(scene.drives.problem(&drive).await.unwrap().contains("is incomplete"));
    assert_eq!(scene.drives.settle_all().unwrap(), [(drive.clone(), Origin::Image)]);
    assert_eq!(marks(&drive), [format!("unsynced-image-{EARLIER}")]);

    scene.drives.clone_again(&scene.image, &drive, size, progress).await.unwrap();
    assert_is_clone(&drive.join(DISK), &scene.image, 40 * MIB);
    assert_eq!(scene.drives.problem(&drive).await, None);
    assert_eq!(scene.drives.settle_all().unwrap(), []);
    assert_eq!(names(&scene.disk.path().join("drives")), ["a"]);

    // Copies of drives, and unknown markers, are not copies of images; all of them can be deleted.
    for mark in [format!("unsynced-drive-{EARLIER}"), "unsynced-".into(), "unsynced-image".into()] {
        fs::write(drive.join(&mark), "").unwrap();
        assert_eq!(scene.drives.settle_all().unwrap(), [(drive.clone(), Origin::Drive)], "{mark}");
        fs::remove_file(drive.join(&mark)).unwrap();
    }
    pending::mark(&drive, Origin::Drive, EARLIER).unwrap();
    scene.drives.delete(&drive).await.unwrap();
    assert!(names(&scene.disk.path().join("drives")).is_empty());
}

/// A tmpfs of limited size.
struct Memory(tempfile::TempDir);

impl Memory {
    fn mount(mebibytes: u64) -> Self {
        let place = tempfile::tempdir().unwrap();
        let size = format!("size={mebibytes}m");
        run(Command::new("/bin/mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(place.path()));
        Self(place)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let unmounted = Command::new("/bin/umount").arg("--lazy").arg(self.0.path()).status();
        assert!(unmounted.is_ok_and(|status| status.success()), "it is unmounted");
    }
}

#[tokio::test]
async fn a_disk_that_does_not_take_a_copy_is_told_and_the_copy_is_lost() {
    // A disk of 200 MiB that fails when more than 24 MiB are really written to it.
    let memory = Memory::mount(24);
    let disk = Mounted::fresh_in(memory.0.path(), "ext4", 200);
    let elsewhere = tempfile::tempdir().unwrap();
    let image = elsewhere.path().join("rootfs.ext4");
    fs::write(&image, vec![5; 60 << 20]).unwrap();
    let drive = disk.path().join("drive");
    let drives = Drives::with(disk.path(), Copy);
    // The kernel may write back on its own and fail early: then the copy itself fails.
    match Copy.clone_image(&image, &drive, ByteSize::mib(60), &Progress::default()) {
        Ok(_) => {
            drives.settle(&drive).await.unwrap_err();
            // The kernel reports the error once, the drive always.
            let error = drives.settle(&drive).await.unwrap_err();
            assert!(matches!(error, DriveError::Lost { .. }), "{error}");
            assert_eq!(drives.settle_all().unwrap(), [(drive.clone(), Origin::Image)]);
        }
        Err(error) => assert!(names(disk.path()).is_empty(), "{error}"),
    }
}
