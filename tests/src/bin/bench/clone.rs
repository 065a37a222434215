//! Clones of drives on the three kinds of filesystem.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nexus_core::internals::Drives;
use nexus_core::internals::Progress;
use nexus_schema::ByteSize;
use nexus_tests::daemon::Daemon;
use serde_json::json;
use tempfile::TempDir;

use super::Options;
use super::material::{home, median, ratio, run, settle};
use super::samples::{Samples, show};
use super::table::Table;

const GOAL: Duration = Duration::from_millis(10);
const COPY: f64 = 1.2;
const TIMES: usize = 20;
const COPIES: usize = 5;
const TOGETHER: usize = 100;
const SOON: Duration = Duration::from_mins(5);
/// How much data the source contains.
const SIZES: [u64; 2] = [64 << 20, 1 << 30];

pub(crate) fn measure(options: &Options) -> Table {
    let mut table = Table::new("Clones of drives");
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    for (filesystem, make) in
        [("btrfs", &["mkfs.btrfs", "-q"][..]), ("xfs", &["mkfs.xfs", "-q", "-m", "reflink=1"])]
    {
        let disk = Disk::mount(make);
        for size in SIZES {
            let mut clones = cloned(&runtime, disk.place(), size, options.times(TIMES).max(3));
            let p50 = median(&mut clones);
            table.judged(
                format!("{filesystem}: a clone of {} MiB of data in {} MiB", size >> 20, size >> 19),
                show(p50),
                "",
                "",
                ("< 10 ms", p50 < GOAL),
            );
        }
        together(&mut table, filesystem, disk.place(), options);
    }
    let place = tempfile::Builder::new().prefix("clone-").tempdir_in(home()).expect("a directory");
    for size in SIZES {
        copies(&mut table, &runtime, place.path(), size, if options.quick { 1 } else { COPIES });
    }
    together(&mut table, "copy", place.path(), options);
    table.note(
        "A clone is what stands for it on the disk: the drive's directory and its disk. What was copied gets on the disk in the \
         background, marked until it is there; `cp` leaves that to the system. 100 at once are `drive_create` by as many clients of \
         one daemon, rows and all.",
    );
    table
}

/// A mounted filesystem in a file; unmounted when dropped.
struct Disk {
    place: TempDir,
}

impl Disk {
    fn mount(make: &[&str]) -> Self {
        let place = tempfile::Builder::new().prefix("disk-").tempdir_in(home()).expect("a directory");
        let file = place.path().join("file");
        File::create(&file).and_then(|file| file.set_len(8 << 30)).expect("a sparse file");
        run(Command::new(format!("/sbin/{}", make[0])).args(&make[1..]).arg(&file));
        fs::create_dir(place.path().join("mounted")).expect("a place to mount it");
        run(Command::new("mount").args(["-o", "loop"]).arg(&file).arg(place.path().join("mounted")));
        Self { place }
    }

    fn place(&self) -> PathBuf {
        self.place.path().join("mounted")
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg("--lazy").arg(self.place()).status();
        assert!(unmounted.is_ok_and(|status| status.success()), "the disk is unmounted");
    }
}

/// The size of one piece of data.
const PIECE: u64 = 8 << 20;

/// A file with this much data, and an equally large hole after each piece; in a directory of its own, as images are.
fn master(place: &Path, size: u64) -> PathBuf {
    let home = place.join(format!("image-{size}"));
    nexus_core::internals::create_home(&home).expect("a home for the image");
    let path = home.join("rootfs.ext4");
    let mut file = File::create(&path).expect("the image");
    let mut state: u64 = 1;
    let mut piece = vec![0; PIECE as usize];
    for at in 0..size / PIECE {
        for word in piece.chunks_exact_mut(8) {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            word.copy_from_slice(&state.to_le_bytes());
        }
        std::io::Seek::seek(&mut file, std::io::SeekFrom::Start(at * 2 * PIECE)).expect("a hole");
        file.write_all(&piece).expect("the image's data");
    }
    file.set_len(size << 1).and_then(|()| file.sync_all()).expect("the image is on the disk");
    path
}

fn cloned(runtime: &tokio::runtime::Runtime, place: PathBuf, size: u64, times: usize) -> Vec<Duration> {
    let image = master(&place, size);
    let drives = Drives::probe(&place.join("drives")).expect("a backend");
    let length = ByteSize::bytes(size << 1);
    (0..times)
        .map(|at| {
            let drive = place.join("drives").join(format!("{size}-{at}"));
            let start = Instant::now();
            let disk = runtime.block_on(drives.clone_image(&image, &drive, length, &Progress::default()));
            let took = start.elapsed();
            assert_eq!(fs::metadata(disk.expect("a clone")).expect("its disk").len(), size << 1);
            took
        })
        .collect()
}

/// A sparse copy, compared with `cp`'s.
fn copies(table: &mut Table, runtime: &tokio::runtime::Runtime, place: &Path, size: u64, times: usize) {
    let image = master(place, size);
    let drives = Drives::with(&place.join("drives"), nexus_core::internals::Copy);
    fs::create_dir_all(place.join("drives")).expect("a directory for drives");
    let length = ByteSize::bytes(size << 1);
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    let (mut ours_synced, mut theirs_synced) = (Vec::new(), Vec::new());
    for _ in 0..times {
        settle(place);
        let copy = place.join("copy");
        let mut cp = Command::new("cp");
        let copied = run(cp.args(["--sparse=always", "--reflink=never"]).arg(&image).arg(&copy));
        theirs.push(copied);
        theirs_synced.push(copied + run(Command::new("sync").arg(&copy)));
        fs::remove_file(&copy).expect("the copy goes");
        settle(place);
        let drive = place.join("drives/one");
        let start = Instant::now();
        runtime.block_on(drives.clone_image(&image, &drive, length, &Progress::default())).expect("a copy");
        ours.push(start.elapsed());
        runtime.block_on(drives.settle(&drive)).expect("it gets on the disk");
        ours_synced.push(start.elapsed());
        runtime.block_on(drives.delete(&drive)).expect("the drive goes");
    }
    let (ours, theirs) = (median(&mut ours), median(&mut theirs));
    let times = ratio(ours, theirs);
    table.judged(
        format!("sparse copy of {} MiB of data in {} MiB", size >> 20, size >> 19),
        show(ours),
        show(theirs),
        format!("{times:.2} x"),
        (format!("≤ {COPY} x `cp --sparse=always`"), times <= COPY),
    );
    let (ours, theirs) = (median(&mut ours_synced), median(&mut theirs_synced));
    table.told(
        "- until it is on the disk",
        show(ours),
        show(theirs),
        format!("{:.2} x", ratio(ours, theirs)),
    );
}

/// Many clones at once, by a daemon.
fn together(table: &mut Table, what: &str, place: impl AsRef<Path>, options: &Options) {
    let state = place.as_ref().join("state");
    let daemon = Daemon::start_bare_at(&state, &[]);
    let root = daemon.root().join("rootfs");
    fs::create_dir(&root)
        .and_then(|()| fs::write(root.join("file"), [7; 1 << 20]))
        .expect("a root filesystem");
    let mut client = daemon.client();
    let from = format!("file:{}", root.display());
    client.to_the_end("image_create", json!({ "from": from, "name": "small", "wait_s": 45 }), SOON);
    let image = client.must("image_inspect", json!({ "image": "small" }));
    let image = fs::read(image["path"].as_str().expect("it is here")).expect("the image");
    let size = format!("{}B", image.len());
    let count = options.times(TOGETHER);
    let start = Instant::now();
    let made: Vec<(String, Duration)> = std::thread::scope(|scope| {
        let clone = |_| {
            let mut client = daemon.client();
            let size = size.clone();
            scope.spawn(move || {
                let start = Instant::now();
                let arguments = json!({ "from": "image:small", "size": size, "wait_s": 45 });
                let drive = client.to_the_end("drive_create", arguments, SOON);
                (drive["path"].as_str().expect("a drive has a file").to_owned(), start.elapsed())
            })
        };
        let all: Vec<_> = (0..count).map(clone).collect();
        all.into_iter().map(|one| one.join().expect("a clone")).collect()
    });
    let took = start.elapsed();
    let whole: HashSet<_> = made
        .iter()
        .map(|(path, _)| path)
        .filter(|path| fs::read(path).is_ok_and(|disk| disk == image))
        .collect();
    let listed = client.must("drive_list", json!({ "limit": 500 }))["drives"].as_array().map_or(0, Vec::len);
    let samples: Samples = made.iter().map(|(_, took)| *took).collect();
    table.judged(
        format!("{what}: {count} at once, all of them / the slowest"),
        format!("{} / {}", show(took), show(samples.quantile(1.0))),
        "",
        "",
        ("none lost", whole.len() == count && listed == count),
    );
    for path in client.must("drive_list", json!({ "limit": 500 }))["drives"].as_array().into_iter().flatten()
    {
        client.must("drive_delete", json!({ "drive": path["id"] }));
    }
}
