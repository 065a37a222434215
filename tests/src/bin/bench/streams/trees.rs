//! Many small files: copied both ways, and searched.

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;

use super::{Subject, VM, judge_time, succeed, turns};
use crate::Options;
use crate::table::Table;

/// A part of 0.8 of the speed, as time.
const SLOWER: (&str, f64) = ("≤ 1.25 x the time", 1.25);
/// How much slower a search may be than ripgrep's.
const SEARCH: (&str, f64) = ("≤ 1.3 x the time", 1.3);
const PATTERN: &str = "needle[0-9]+";
/// How ripgrep runs in a VM with libraries of its own.
const RIPGREP: &str = "/ripgrep/ld-linux-x86-64.so.2 --library-path /ripgrep /ripgrep/rg";

pub(super) fn measure(subject: &Subject, options: &Options, table: &mut Table) {
    if options.has("trees") {
        copies(subject, options, table);
    }
    if options.has("search") {
        search(subject, options, table);
    }
}

/// Makes a tree of `count` files of about 1 KiB.
fn tree(subject: &Subject, name: &str, count: usize) -> String {
    let root = subject.scratch.path().join(name);
    for at in 0..count {
        let directory = root.join(format!("d{}", at / 100));
        if at % 100 == 0 {
            fs::create_dir_all(&directory).expect("a directory");
        }
        let mut text = format!("file {at}\n");
        for line in 0..20 {
            text += &format!("line {line} of {at}: the quick brown fox jumps over it\n");
        }
        if at % 50 == 0 {
            text += &format!("here is needle{at}\n");
        }
        fs::write(directory.join(format!("f{at}.txt")), text).expect("a file");
    }
    root.display().to_string()
}

fn copies(subject: &Subject, options: &Options, table: &mut Table) {
    let count = options.times(10_000);
    let own = tree(subject, "small", count);
    let clear = || subject.run("rm -rf /dev/shm/in /dev/shm/raw && mkdir /dev/shm/raw");
    let inwards = || {
        clear();
        let start = Instant::now();
        let stream = subject.ask_to_run("tar -x -C /dev/shm/raw");
        let socket = Stdio::from(std::os::fd::OwnedFd::from(stream.try_clone().expect("a socket")));
        let mut tar = Command::new("tar");
        succeed(tar.args(["-c", "-C", &own, "."]).stdout(socket).spawn().expect("tar runs"));
        drop(tar);
        finish(stream);
        start.elapsed()
    };
    let ours = || {
        clear();
        subject.copy(&[&own, &format!("{VM}:/dev/shm/in")])
    };
    let both = turns(options, inwards, ours);
    judge_time(
        table,
        format!("`cp`: {count} small files in, next to `tar` over a raw stream"),
        &both,
        SLOWER,
    );

    let (back, raw_back) = (subject.path("back"), subject.path("raw-back"));
    let clear = |path: &str| {
        // It may not exist.
        let _ = fs::remove_dir_all(path);
    };
    let outwards = || {
        clear(&raw_back);
        fs::create_dir(&raw_back).expect("a directory");
        let start = Instant::now();
        let stream = subject.ask_to_run("tar -c -C /dev/shm/in .");
        let socket = Stdio::from(std::os::fd::OwnedFd::from(stream));
        succeed(Command::new("tar").args(["-x", "-C", &raw_back]).stdin(socket).spawn().expect("tar runs"));
        start.elapsed()
    };
    let ours = || {
        clear(&back);
        subject.copy(&[&format!("{VM}:/dev/shm/in"), &back])
    };
    let both = turns(options, outwards, ours);
    judge_time(
        table,
        format!("`cp`: {count} small files out, next to `tar` over a raw stream"),
        &both,
        SLOWER,
    );
    subject.run("rm -rf /dev/shm/in /dev/shm/raw");
    [&own, &back, &raw_back].into_iter().for_each(|path| clear(path));
}

/// Ends a connection to a program in the VM, and waits until that has ended.
fn finish(mut stream: std::os::unix::net::UnixStream) {
    stream.shutdown(std::net::Shutdown::Write).expect("half of it can be closed");
    std::io::copy(&mut stream, &mut std::io::sink()).expect("the program in the VM ends");
}

fn search(subject: &Subject, options: &Options, table: &mut Table) {
    let count = options.times(20_000);
    let own = tree(subject, "searched", count);
    subject.copy(&[&own, &format!("{VM}:/dev/shm/tree")]);
    fs::remove_dir_all(&own).expect("it can be removed");
    let has_ripgrep = ripgrep(subject);
    let (what, other) = match has_ripgrep {
        true => ("ripgrep", format!("{RIPGREP} -c '{PATTERN}' /dev/shm/tree | wc -l")),
        false => ("busybox's `grep -r`", format!("grep -rcE '{PATTERN}' /dev/shm/tree | grep -vc ':0$'")),
    };
    let expected = count.div_ceil(50);
    let mut client = subject.client();
    let other = || {
        let start = Instant::now();
        assert_eq!(subject.run(&other).trim(), expected.to_string(), "{what} finds them all");
        start.elapsed()
    };
    let mut call = || -> Duration {
        let start = Instant::now();
        let search =
            json!({ "vm": VM, "path": "/dev/shm/tree", "pattern": PATTERN, "show": "counts", "all": true });
        let result = client.must_call("guest_file_search", search);
        assert_eq!(super::facts(&result)["files"], expected, "it finds them all");
        start.elapsed()
    };
    let both = turns(options, other, &mut call);
    let row = format!("`file_search` of {count} files, next to {what} in the same VM");
    match has_ripgrep {
        true => judge_time(table, row, &both, SEARCH),
        false => judge_time(table, row, &both, ("≤ 1.3 x ripgrep, which this machine lacks", SEARCH.1)),
    }
    subject.run("rm -rf /dev/shm/tree");
}

/// Copies this host's ripgrep with its libraries into the VM; false if there is none.
fn ripgrep(subject: &Subject) -> bool {
    let find = Command::new("sh").args(["-c", "p=$(command -v rg) && echo $p && ldd $p"]).output();
    let Some(found) = find.ok().filter(|output| output.status.success()) else { return false };
    let text = String::from_utf8_lossy(&found.stdout).into_owned();
    let directory = subject.scratch.path().join("ripgrep");
    fs::create_dir(&directory).expect("a directory");
    for path in text.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/'))) {
        let name = path.rsplit('/').next().unwrap_or_default();
        fs::copy(path, directory.join(name)).expect("a copy of a program or library");
    }
    // The image has no place for libraries.
    subject.copy(&[&directory.display().to_string(), &format!("{VM}:/ripgrep")]);
    true
}
