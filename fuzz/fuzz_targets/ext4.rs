//! Filesystems of a hostile guest: bytes of a real one are changed, also in its journal, and everything in it is read.
#![no_main]

#[path = "../../core/src/ext4/read/mod.rs"]
#[allow(dead_code, unused_imports, reason = "the room has more users")]
mod read;

use std::fs::{self, File};
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use read::{Filesystem, Kind};

/// A filesystem with something of most kinds, whose journal has what is not in its place yet.
struct Base {
    file: File,
    whole: Vec<u8>,
    /// Where it has anything but zeros.
    used: Vec<usize>,
}

fn base() -> &'static Base {
    static BASE: OnceLock<Base> = OnceLock::new();
    BASE.get_or_init(|| {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let at = |name: &str| directory.path().join(name);
        fs::create_dir_all(at("content/a/b")).expect("a directory");
        for number in 0..40 {
            fs::write(at(&format!("content/a/{number}")), vec![b'x'; number * 37]).expect("a file");
        }
        std::os::unix::fs::symlink("t".repeat(100), at("content/a/b/link")).expect("a link");
        File::create(at("disk")).expect("a file").set_len(4 << 20).expect("a size");
        fs::write(at("blocks"), [7; 2048]).expect("a file");
        fs::write(
            at("commands"),
            format!("jo -c\njw -b 900,901 {}\njw -r 901\njc\n", at("blocks").display()),
        )
        .expect("a file");
        let run = |command: &mut Command| {
            assert!(command.output().expect("it runs").status.success(), "{command:?}")
        };
        let content = at("content");
        let made = ["-q", "-F", "-t", "ext4", "-b", "1024", "-O", "inline_data", "-d"];
        run(Command::new("/sbin/mke2fs").args(made).arg(content).arg(at("disk")));
        run(Command::new("/sbin/debugfs").arg("-w").arg("-f").arg(at("commands")).arg(at("disk")));
        let whole = fs::read(at("disk")).expect("it is there");
        let used = (0..whole.len()).filter(|at| whole[*at] != 0).collect();
        let file = File::options().read(true).write(true).open(at("disk")).expect("it is there");
        Base { file, whole, used }
    })
}

fuzz_target!(|data: &[u8]| {
    let base = base();
    let changes: Vec<(usize, u8)> = data
        .chunks_exact(4)
        .take(64)
        .map(|change| {
            let place = usize::from(change[0]) << 16 | usize::from(change[1]) << 8 | usize::from(change[2]);
            (base.used[place % base.used.len()], change[3])
        })
        .collect();
    for (at, byte) in &changes {
        base.file.write_all_at(&[*byte], *at as u64).expect("it is written");
    }
    read_all(base.file.try_clone().expect("a file"));
    for (at, _) in &changes {
        base.file.write_all_at(&base.whole[*at..=*at], *at as u64).expect("it is written");
    }
});

fn read_all(file: File) {
    let Ok(filesystem) = Filesystem::open(file) else { return };
    let mut buffer = vec![0; 10_000];
    // What is wrong with one file is no reason to leave out the next.
    let _ = filesystem.walk(&mut |entry| {
        assert!(!entry.path.starts_with(b"/") && !entry.path.contains(&0));
        let _ = filesystem.xattrs(entry.inode);
        let _ = filesystem.link_target(entry.inode);
        if entry.inode.kind() == Kind::File {
            for offset in [0, 5_000, entry.inode.size.saturating_sub(100)] {
                let _ = filesystem.read(entry.inode, offset, &mut buffer);
            }
        }
        ControlFlow::Continue(())
    });
}
