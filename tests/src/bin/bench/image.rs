//! An image of a root filesystem's tar, built as an ordinary user, next to what root does with `tar` and `mke2fs`.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use nexus_tests::daemon::Daemon;
use serde_json::json;

use super::Options;
use super::material::{home, median, ratio, rootfs, run, settle};
use super::samples::show;
use super::table::Table;

const LONGEST: Duration = Duration::from_mins(10);
const GOAL: f64 = 1.3;
const CACHED: Duration = Duration::from_millis(50);
const TURNS: usize = 5;
/// A user of no special power: `nobody`.
const USER: u32 = 65_534;

pub(crate) fn measure(options: &Options) -> Table {
    let tar = rootfs();
    let megabytes = fs::metadata(&tar).expect("it was made").len() / 1_000_000;
    let root = rustix::process::geteuid().is_root();
    let daemon = if root { Daemon::start_as(USER, &home()) } else { Daemon::start_bare(&[]) };
    // Where that user can read it.
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
    table.note("Yardstick: root's `tar -x` and `mke2fs -d`, neither checked nor synced.");
    table
}
