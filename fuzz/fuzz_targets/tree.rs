//! Archives of a hostile guest: nothing is written outside of the directory that they are unpacked in.
#![no_main]

use std::fs;
use std::os::fd::OwnedFd;

use libfuzzer_sys::fuzz_target;
use nexus_tree::{Limits, Unpacking, unpack};

fuzz_target!(|data: &[u8]| {
    let root = tempfile::tempdir().expect("a temporary directory");
    let (inside, outside) = (root.path().join("inside"), root.path().join("outside"));
    fs::create_dir(&inside).expect("a directory");
    fs::create_dir(&outside).expect("a directory");
    fs::write(outside.join("file"), "untouched").expect("a file");
    // A way out that was there before.
    std::os::unix::fs::symlink("../outside", inside.join("out")).expect("a link");
    let directory: OwnedFd = fs::File::open(&inside).expect("it is there").into();
    let limits = Limits { entries: 100, bytes: 1 << 20, depth: 20, ..Limits::default() };
    let mut how = Unpacking { limits, ..Unpacking::default() };
    let _ = unpack(data, directory, &mut how, &mut |_: u64, _: u64| Ok(()));
    let names = |path| fs::read_dir(path).expect("it is there").count();
    assert_eq!((names(root.path()), names(&outside)), (2, 1));
    assert_eq!(fs::read(outside.join("file")).expect("it is there"), b"untouched");
});
