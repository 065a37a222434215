//! An image from a root filesystem's tar, built as an ordinary user, compared with `tar` and `mke2fs` as root.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use nexus_tests::client::Client;
use nexus_tests::daemon::Daemon;
use serde_json::json;

use super::Options;
use super::material::{home, median, ratio, rootfs, run, settle};
use super::memory::peak_mib;
use super::samples::show;
use super::table::Table;

const LONGEST: Duration = Duration::from_mins(10);
const GOAL: f64 = 0.4;
/// How much longer the same files may take in one directory than in a thousand.
const CROWDED: f64 = 1.5;
const FILES: usize = 100_000;
const ENTRIES: usize = 1_000_000;
/// The memory limit of the daemon while it makes an image of the most files.
const MEMORY: f64 = 200.0;
const CACHED: Duration = Duration::from_millis(50);
const TURNS: usize = 5;
/// An unprivileged user: `nobody`.
const USER: u32 = 65_534;

pub(crate) fn measure(options: &Options) -> Table {
    let tar = rootfs();
    let megabytes = fs::metadata(&tar).expect("it was made").len() / 1_000_000;
    let root = rustix::process::geteuid().is_root();
    let daemon = if root { Daemon::start_as(USER, &home()) } else { Daemon::start_bare(&[]) };
    // A place where that user can read it.
    let source = daemon.root().join("rootfs.tar");
    fs::copy(&tar, &source).expect("a copy of the root filesystem");
    let mut client = daemon.client();
    let overlays = json!({ "/etc/motd": { "content": "measured\n" },
        "/usr/local/bin/greet": { "content": "#!/bin/sh\necho hello\n", "mode": "0755" } });
    let source = format!("file:{}", source.display());
    client.must("template_create", json!({ "name": "measured", "source": source, "overlays": overlays }));

    let (mut products, mut yardsticks, mut cached) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..if options.quick { 1 } else { TURNS } {
        settle(daemon.state());
        if root {
            let place = home().join("unpacked");
            let image = home().join("unpacked.ext4");
            let start = Instant::now();
            fs::create_dir(&place).expect("a place for the root filesystem");
            run(Command::new("tar")
                .args(["-x", "--xattrs", "--xattrs-include=*", "--numeric-owner", "-p", "-C"])
                .arg(&place)
                .arg("-f")
                .arg(&tar));
            run(Command::new("mke2fs")
                .args(["-q", "-t", "ext4", "-d"])
                .arg(&place)
                .arg(&image)
                .arg(format!("{}M", megabytes * 2)));
            yardsticks.push(start.elapsed());
            fs::remove_dir_all(&place)
                .and_then(|()| fs::remove_file(&image))
                .expect("the yardstick's output goes");
            settle(daemon.state());
        }
        let start = Instant::now();
        let build = client.to_the_end(
            "build_start",
            json!({ "template": "measured", "no_cache": true, "wait_s": 45 }),
            LONGEST,
        );
        products.push(start.elapsed());
        assert_eq!(build["cached"], false, "{build}");
        let start = Instant::now();
        let build =
            client.to_the_end("build_start", json!({ "template": "measured", "wait_s": 45 }), LONGEST);
        cached.push(start.elapsed());
        assert_eq!(build["cached"], true, "{build}");
        client.must("image_delete", json!({ "image": build["image"]["id"] }));
    }
    let many = many(options, &daemon, &mut client);
    let mut table =
        Table::new(format!("An image of a tar of {megabytes} MB, with two overlays, by an ordinary user"));
    let (product, cached) = (median(&mut products), median(&mut cached));
    if root {
        let yardstick = median(&mut yardsticks);
        let times = ratio(product, yardstick);
        let goal = (format!("≤ {GOAL} x"), times <= GOAL);
        table.judged(
            "built, checked, hashed and on the disk",
            show(product),
            show(yardstick),
            format!("{times:.2} x"),
            goal,
        );
    } else {
        table.told("built, checked, hashed and on the disk", show(product), "root is needed", "");
    }
    table.judged("the same again, cached", show(cached), "", "", ("< 50 ms", cached < CACHED));
    let times = ratio(many.crowded, many.spread);
    table.judged(
        format!("{FILES} files in one directory, next to the same over 1,000"),
        show(many.crowded),
        show(many.spread),
        format!("{times:.2} x"),
        (format!("≤ {CROWDED} x"), times <= CROWDED),
    );
    if let Some((took, peak)) = many.largest {
        let memory = (format!("< {MEMORY} MiB"), peak < MEMORY);
        table.judged(
            format!("{ENTRIES} entries: nexusd, resident, at most"),
            format!("{peak:.0} MiB, {}", show(took)),
            "",
            "",
            memory,
        );
    }
    table.note("Yardstick: root's `tar -x` and `mke2fs -d`, neither checked nor synced.");
    table
}

/// Images with very many small files.
struct Many {
    spread: Duration,
    crowded: Duration,
    /// With the maximum number: duration and memory.
    largest: Option<(Duration, f64)>,
}

fn many(options: &Options, daemon: &Daemon, client: &mut Client) -> Many {
    let mut build = |files: usize, directories: usize| {
        let tar = daemon.root().join("many.tar");
        write_many(&tar, files, directories);
        settle(daemon.state());
        let start = Instant::now();
        let from = format!("file:{}", tar.display());
        let asked = json!({ "from": from, "name": "many", "wait_s": 45 });
        let image = client.to_the_end("image_create", asked, LONGEST);
        let took = start.elapsed();
        assert_eq!(image["installed"], true, "{image}");
        client.must("image_delete", json!({ "image": "many" }));
        fs::remove_file(&tar).expect("the archive goes");
        took
    };
    let (mut spread, mut crowded) = (Vec::new(), Vec::new());
    for _ in 0..if options.quick { 1 } else { 3 } {
        spread.push(build(FILES, 1_000));
        crowded.push(build(FILES, 1));
    }
    let largest = (!options.quick).then(|| (build(ENTRIES - 20_000, 10_000), peak_mib(daemon.pid())));
    Many { spread: median(&mut spread), crowded: median(&mut crowded), largest }
}

/// An archive of small files in some directories.
fn write_many(path: &Path, files: usize, directories: usize) {
    let mut out = tar::Builder::new(BufWriter::new(File::create(path).expect("a file for the archive")));
    for number in 0..files {
        let name = format!("directory-{}/file-{number}", number * directories / files);
        let content = format!("This is the file of the number {number}.\n");
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_700_000_000);
        header.set_size(content.len() as u64);
        out.append_data(&mut header, name, content.as_bytes()).expect("a file is written");
    }
    out.into_inner().and_then(|mut out| out.flush()).expect("the archive is written");
}
