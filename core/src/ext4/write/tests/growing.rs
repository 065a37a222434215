//! Filesystems that are written to and grown afterwards.

use std::path::Path;

use super::*;
use crate::os::mounted::{Mounted, run};

fn some(size: Size) -> trial::Image {
    let mut trial = Trial::new(size);
    for number in 0..3_000 {
        trial.file(format!("many/a-file-with-a-name-{number:05}").as_bytes(), b"x");
    }
    trial.file(b"large", &noise(1, 3 << 20));
    trial.finish(&drive("grown"))
}

/// Adds, changes and removes files, also in a directory with an index.
fn use_it(root: &Path) {
    for number in (0..3_000).step_by(2) {
        fs::remove_file(root.join(format!("many/a-file-with-a-name-{number:05}"))).unwrap();
        fs::write(root.join(format!("many/another-one-{number:05}")), noise(number, 300)).unwrap();
    }
    for number in 0..40 {
        fs::create_dir(root.join(format!("directory-{number}"))).unwrap();
        fs::write(root.join(format!("directory-{number}/file")), noise(number, 50_000)).unwrap();
    }
    let file = fs::OpenOptions::new().append(true).open(root.join("large")).unwrap();
    std::io::Write::write_all(&mut &file, &noise(2, 1 << 20)).unwrap();
    file.sync_all().unwrap();
}

#[test]
fn a_filesystem_stays_whole_when_it_is_mounted_and_written_to() {
    let image = some(Size::AtLeast(100 << 20));
    let mounted = Mounted::writable(&image.path());
    use_it(mounted.path());
    drop(mounted);
    check(&image.path());
}

#[test]
fn a_filesystem_can_be_grown_and_mounted_and_is_whole() {
    // Within the first block of descriptors, beyond it (64 groups), and beyond the whole reserve.
    for (from, to) in [(0, 1 << 30), (5 << 30, 20 << 30), (1 << 40, 1100 << 30)] {
        let image = some(Size::AtLeast(from));
        let path = image.path();
        fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(to).unwrap();
        run(Command::new("/sbin/resize2fs").arg(&path));
        check(&path);
        let mounted = Mounted::writable(&path);
        image.assert_same(mounted.path());
        use_it(mounted.path());
        let size = rustix::fs::statvfs(mounted.path()).unwrap();
        assert!(size.f_blocks * size.f_frsize > to / 100 * 97, "{}", size.f_blocks * size.f_frsize);
        drop(mounted);
        check(&path);
    }
}
