//! `nexusctl cp`: what is left when a copy is interrupted, a disk is full, or a guest is malicious.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

use nexus_tests::daemon::{kill_process, signal};
use rustix::process::Signal;
use serde_json::json;

use crate::copies::SmallDisk;
use crate::cp::{Pair, listing};
use crate::streams::{ended, nexusctl, run, text};
use crate::world::{SOON, World, process, soon};

/// The size of a file that takes a while, in bytes.
const BIG: u64 = 2 << 30;

/// Small files followed by a large one, which takes a while.
fn make_large(root: &Path) {
    fs::create_dir(root).expect("a directory");
    (0..20_u8).for_each(|n| fs::write(root.join(format!("{n:02}")), vec![n; 300_000]).expect("a file"));
    let file = File::create(root.join("zz-big")).expect("a file");
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, BIG).expect("room on the disk");
}

/// The entries of a directory, including unnamed files.
fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).map(|entries| entries.collect::<Vec<_>>()).unwrap_or_default();
    let mut names: Vec<String> = entries
        .into_iter()
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8"))
        .collect();
    names.sort();
    names
}

#[test]
fn a_copy_that_is_killed_leaves_whole_files_and_can_be_made_again() {
    let pair = Pair::new();
    make_large(&pair.at("here/tree"));
    let guest = process(&pair.vm, "pid");
    let small: Vec<String> = (0..20).map(|n| format!("{n:02}")).collect();
    // A copy that is stopped in the middle of the large file.
    let begin = |src: &str, dst: &str| -> Child {
        let _ = fs::remove_dir_all(pair.at(dst));
        let mut child =
            nexusctl(&pair.world, &["cp", &pair.word(src), &pair.word(dst)]).spawn().expect("nexusctl runs");
        soon("the small files are there", || {
            assert!(child.try_wait().expect("a child can be asked").is_none(), "it is still under way");
            names(&pair.at(dst)).contains(&"19".to_owned()).then_some(())
        });
        signal(guest, Signal::STOP);
        child
    };
    let is_whole = |dst: &str| {
        names(&pair.at(dst)) == small
            && (0..20_u8).all(|n| {
                fs::read(pair.at(dst).join(format!("{n:02}"))).is_ok_and(|is| is == vec![n; 300_000])
            })
    };
    let kill: fn(&Child) = |child| kill_process(child.id());
    let interrupt: fn(&Child) = |child| signal(child.id(), Signal::INT);
    for (src, dst) in [("here/tree", "vm/tree"), ("vm/from", "here/to")] {
        for (end, status) in [(kill, None), (interrupt, Some(130))] {
            let mut child = begin(src, dst);
            end(&child);
            let ended = ended(&mut child);
            signal(guest, Signal::CONT);
            assert_eq!(ended.code(), status, "{src}");
            soon("whole files only", || is_whole(dst).then_some(()));
        }
        if src == "here/tree" {
            // A part of it already exists.
            fs::remove_file(pair.at("here/tree/zz-big")).expect("it is gone");
            pair.must(&[], "here/tree/.", "vm/tree");
            fs::write(pair.at("here/tree/zz-big"), "small").expect("a file");
            pair.must(&[], "here/tree/zz-big", "vm/tree");
            assert_eq!(fs::read(pair.at("vm/tree/zz-big")).expect("it is there"), b"small");
            fs::remove_dir_all(pair.at("here/tree")).expect("it is gone");
            make_large(&pair.at("vm/from"));
        }
    }
    // The machine is stopped during the copy, in both directions.
    let mut client = pair.world.client();
    let mut child = begin("vm/from", "here/to");
    client.must("vm_stop", json!({ "vm": "web-1", "force": true, "wait_s": 45 }));
    assert_eq!(ended(&mut child).code(), Some(1));
    let mut said = String::new();
    child.stderr.take().expect("its errors").read_to_string(&mut said).expect("it can be read");
    assert!(
        said.contains("the stream was interrupted") && said.contains("copied files are complete"),
        "{said}"
    );
    assert!(is_whole("here/to"), "{:?}", names(&pair.at("here/to")));
    let said = pair.fails(&[], "vm/from/01", "here/to");
    assert!(said.contains("nexusctl vm start web-1"), "{said}");
    pair.world.assert_in_order();
}

#[test]
fn a_full_disk_on_either_side_is_said() {
    let pair = Pair::new();
    fs::create_dir(pair.at("here/tree")).expect("a directory");
    (0..40_u8)
        .for_each(|n| fs::write(pair.at(&format!("here/tree/{n:02}")), vec![n; 300_000]).expect("a file"));
    pair.must(&[], "here/tree", "vm/tree");
    let _disks = ["vm/small", "here/small"].map(|place| SmallDisk::mount(&pair.at(place)));
    for (src, dst, side) in
        [("here/tree", "vm/small", "inside web-1: "), ("vm/tree", "here/small", "on this host: ")]
    {
        let said = pair.fails(&[], src, dst);
        assert!(
            said.contains(side) && said.contains("o space left on device") && said.contains("free space"),
            "{said}"
        );
        let came = names(&pair.at(dst).join("tree"));
        assert!((1..40).contains(&came.len()), "{came:?}");
        for name in came {
            let number: u8 = name.parse().expect("a file of the tree");
            assert_eq!(
                fs::read(pair.at(dst).join("tree").join(name)).expect("its content"),
                vec![number; 300_000]
            );
        }
    }
}

#[test]
fn a_hostile_guest_writes_nothing_but_what_was_asked_for() {
    let world = World::hostile(&[]);
    let mut client = world.client();
    let root = tempfile::tempdir().expect("a directory");
    let into = root.path().join("into");
    for (what, expected, said) in [
        ("absolute", &[][..], "absolute"),
        ("parent", &[], "leads out of the directory"),
        ("through-link", &[], "a link that leads elsewhere"),
        ("hard-link", &[], "leads out of the directory"),
        ("other-name", &["tree=not asked for"], "Copied 1 file"),
        ("device", &[], "skipped: a device"),
        ("setuid", &["tree=#!/bin/sh\n"], "Copied 1 file"),
        ("escapes", &["tree/"], "skipped: a device"),
        ("cut", &[], "ends within an entry"),
        ("words", &["tree=as it should be"], "inside"),
        ("nonsense", &["tree=as it should be"], "final message is malformed"),
    ] {
        let name = format!("tar-{what}-1");
        world.create(&mut client, &name);
        let _ = fs::remove_dir_all(&into);
        fs::create_dir(&into).expect("a directory");
        let output = run(&world, &["cp", &format!("{name}:/srv/tree"), into.to_str().expect("UTF-8")], b"");
        let told = text(&output.stderr);
        assert_eq!(listing(&into), expected, "{what}: {told}");
        assert!(told.contains(said) && !told.contains('\u{1b}'), "{what}: {told}");
        assert_eq!(names(root.path()), ["into"], "{what}: {told}");
        if what == "setuid" {
            let meta = fs::metadata(into.join("tree")).expect("its facts");
            assert_eq!((meta.mode() & 0o7777, meta.uid()), (0o755, 0));
        }
        client.must("vm_delete", json!({ "vm": name, "force": true }));
    }
    assert!(!Path::new("/tmp/nexus-escaped").exists());
}

/// Copies with `--resume`; how many bytes came.
fn go_on(pair: &Pair, src: &str, dst: &str) -> u64 {
    let words = ["--json", "cp", "--resume", &pair.word(src), &pair.word(dst)];
    let output = run(&pair.world, &words, b"");
    assert!(output.status.success(), "{src} {dst}: {}", text(&output.stderr));
    let told: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    told["bytes"].as_u64().expect("how much came")
}

#[test]
fn a_copy_of_a_file_goes_on_where_it_was_interrupted() {
    let pair = Pair::new();
    let content: Vec<u8> =
        (0..30_000_000_u32).flat_map(|at| at.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    let size = content.len() as u64;
    let guest = process(&pair.vm, "pid");
    for (src, dst, part) in [
        ("here/file", "vm/big", "vm/.big.nexus-part"),
        ("here/file", "vm/into/", "vm/into/.file.nexus-part"),
        ("vm/file", "here/big", "here/.big.nexus-part"),
    ] {
        let place = pair.at(dst);
        fs::write(pair.at(src), &content).expect("a file");
        if dst.ends_with('/') {
            fs::create_dir(&place).expect("a directory");
        }
        let target = if place.is_dir() { place.join("file") } else { place };
        let mut child = nexusctl(&pair.world, &["cp", "--resume", &pair.word(src), &pair.word(dst)])
            .spawn()
            .expect("nexusctl runs");
        let deadline = Instant::now() + SOON;
        while fs::metadata(pair.at(part)).map_or(0, |metadata| metadata.len()) <= 1 << 20 {
            let is_over = child.try_wait().expect("a child can be asked").is_some();
            assert!(!is_over && Instant::now() < deadline, "no part of {dst}");
            std::thread::park_timeout(Duration::from_millis(1));
        }
        signal(guest, Signal::STOP);
        kill_process(child.id());
        assert!(!ended(&mut child).success());
        signal(guest, Signal::CONT);
        // What was under way is still written, and the part is free again then.
        let came = soon("the rest comes", || {
            let output =
                run(&pair.world, &["--json", "cp", "--resume", &pair.word(src), &pair.word(dst)], b"");
            let said = text(&output.stderr);
            assert!(output.status.success() || said.contains("another copy to the same file"), "{said}");
            let told =
                output.status.success().then(|| serde_json::from_slice::<serde_json::Value>(&output.stdout));
            told.map(|told| told.expect("JSON")["bytes"].as_u64().expect("how much came"))
        });
        assert!(came < size - (1 << 20), "{came} bytes of {size} came, so it began anew");
        assert!(fs::read(&target).is_ok_and(|read| read == content), "{dst} is as the source");
        assert!(!pair.at(part).exists());

        // What is there is not the beginning of the file; then it is all of it, and then nothing.
        let content = &content[..1 << 20];
        fs::write(pair.at(src), content).expect("a file");
        for (there, came) in [(Some(&b"something else"[..]), 1 << 20), (Some(content), 0), (None, 1 << 20)] {
            there.into_iter().for_each(|there| fs::write(pair.at(part), there).expect("a part"));
            assert_eq!(go_on(&pair, src, dst), came);
            assert!(fs::read(&target).is_ok_and(|read| read == content) && !pair.at(part).exists());
        }
        fs::remove_file(pair.at(src)).expect("it is gone");
    }
    fs::create_dir(pair.at("here/tree")).expect("a directory");
    fs::create_dir(pair.at("vm/tree")).expect("a directory");
    for (src, dst) in [("here/tree", "vm/new"), ("vm/tree", "here/new"), ("-", "vm/new")] {
        let output = run(&pair.world, &["cp", "--resume", &pair.word(src), &pair.word(dst)], b"");
        assert_eq!(output.status.code(), Some(2), "{src}: {}", text(&output.stderr));
    }
    // A link in the place of a part leads nowhere.
    fs::write(pair.at("here/file"), "new").expect("a file");
    fs::write(pair.at("vm/other"), "old").expect("a file");
    std::os::unix::fs::symlink("other", pair.at("vm/.linked.nexus-part")).expect("a link");
    let said = pair.fails(&["--resume"], "here/file", "vm/linked");
    assert!(said.contains(".linked.nexus-part"), "{said}");
    assert_eq!(fs::read(pair.at("vm/other")).expect("it is there"), b"old");
    pair.world.assert_in_order();
}
