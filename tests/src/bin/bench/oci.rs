//! An OCI image from a registry, compared with `skopeo copy` and `umoci unpack`.

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use nexus_tests::daemon::Daemon;
use nexus_tests::registry::{Layer, Registry};
use serde_json::json;

use super::Options;
use super::material::{bash, has, home, kept, median, ratio, rootfs, run, settle};
use super::samples::show;
use super::table::Table;

const LONGEST: Duration = Duration::from_mins(10);
const GOAL: f64 = 0.4;
const TURNS: usize = 5;
/// The size of both layers together, unpacked.
const SIZE: u64 = 436_000_000;

pub(crate) fn measure(options: &Options) -> Table {
    let (lower, upper) = (rootfs(), kept("upper-436.tar", upper));
    let layers = [("lower.tar.gz", lower), ("upper-436.tar.gz", upper)].map(|(name, tar)| {
        let packed = kept(name, |path| {
            bash(&format!("gzip -6 -c {} > {}", tar.display(), path.display()));
        });
        Layer { packed: fs::read(packed).expect("it was made"), plain: fs::read(tar).expect("it was made") }
    });
    let megabytes = layers.iter().map(|layer| layer.plain.len()).sum::<usize>() / 1_000_000;
    let registry = Registry::start();
    registry.put_packed("measured", "1", &layers, &json!({ "Cmd": ["sh"] }));
    drop(layers);
    let mut table =
        Table::new(format!("An OCI image of two layers, {megabytes} MB unpacked, from a local registry"));
    let root = rustix::process::geteuid().is_root();
    let programs = has("skopeo") && has("umoci");
    let daemon = Daemon::start_bare_at(&home().join("oci-state"), &[]);
    let mut client = daemon.client();
    let (mut products, mut yardsticks) = (Vec::new(), Vec::new());
    for _ in 0..if options.quick { 1 } else { TURNS } {
        settle(daemon.state());
        if root && programs {
            let (layout, bundle) = (home().join("layout"), home().join("bundle"));
            let start = Instant::now();
            run(Command::new("skopeo")
                .args(["copy", "--quiet", "--src-tls-verify=false"])
                .arg(format!("docker://{}/measured:1", registry.address()))
                .arg(format!("oci:{}:measured", layout.display())));
            run(Command::new("umoci")
                .args(["unpack", "--image"])
                .arg(format!("{}:measured", layout.display()))
                .arg(&bundle));
            yardsticks.push(start.elapsed());
            fs::remove_dir_all(&layout).and_then(|()| fs::remove_dir_all(&bundle)).expect("its output goes");
            settle(daemon.state());
        }
        let start = Instant::now();
        let from = format!("oci:{}/measured:1", registry.address());
        let image = client.to_the_end(
            "image_create",
            json!({ "from": from, "name": "measured", "wait_s": 45 }),
            LONGEST,
        );
        products.push(start.elapsed());
        assert_eq!(image["installed"], true, "{image}");
        client.must("image_delete", json!({ "image": "measured" }));
    }
    drop(client);
    drop(daemon);
    fs::remove_dir_all(home().join("oci-state")).expect("the state goes");
    let product = median(&mut products);
    if yardsticks.is_empty() {
        table.told("pulled, unpacked and made an image", show(product), "takes root, skopeo and umoci", "");
    } else {
        let yardstick = median(&mut yardsticks);
        let times = ratio(product, yardstick);
        let goal = (format!("≤ {GOAL} x"), times <= GOAL);
        table.judged(
            "pulled, unpacked, made an image, checked and on the disk",
            show(product),
            show(yardstick),
            format!("{times:.2} x"),
            goal,
        );
    }
    table.note("Yardstick: `skopeo copy` to a layout and `umoci unpack` to a directory, by root; `make bench` installs both, and without them nothing is compared.");
    table
}

/// A layer that repeats the files of the root filesystem up to the required size, with whiteouts for some of those below it.
fn upper(path: &Path) {
    let mut out = tar::Builder::new(io::BufWriter::new(File::create(path).expect("a file for the layer")));
    let mut left = SIZE - fs::metadata(rootfs()).expect("the root filesystem").len();
    for turn in 1.. {
        let mut archive =
            tar::Archive::new(io::BufReader::new(File::open(rootfs()).expect("the root filesystem")));
        for entry in archive.entries().expect("it is a tar") {
            let mut entry = entry.expect("it is whole");
            let mut header = entry.header().clone();
            let at = Path::new("srv").join(format!("copy-{turn}")).join(entry.path().expect("a path"));
            if header.entry_type().is_dir() || header.entry_type().is_file() {
                // Including its header and padding.
                left = left.saturating_sub(512 + entry.size().next_multiple_of(512));
                out.append_data(&mut header, at, &mut entry).expect("it is copied");
            }
            if left == 0 {
                break;
            }
        }
        if left == 0 {
            break;
        }
    }
    for hidden in ["usr/share/.wh.doc", "usr/share/.wh.locale", "var/cache/.wh..wh..opq"] {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(0);
        out.append_data(&mut header, hidden, io::empty()).expect("a whiteout is written");
    }
    out.into_inner().and_then(|mut out| io::Write::flush(&mut out)).expect("the layer is written");
}
