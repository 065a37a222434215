//! Download, both hashes and decompression of a large .xz, compared with a pipe of programs that does the same.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use data_encoding::HEXLOWER;
use nexus_tests::daemon::Daemon;
use serde_json::json;
use sha2::{Digest, Sha256};

use super::Options;
use super::material::{bash, kept, median, ratio, rootfs, settle};
use super::memory::peak_mib;
use super::samples::show;
use super::table::Table;

/// How often the download contains the root filesystem.
const COPIES: usize = 2;
const LONGEST: Duration = Duration::from_mins(10);
const MEMORY: f64 = 80.0;
const TURNS: usize = 3;

/// The kind of packing, the file name, the command, and how much faster Nexus should be. `xz -T2` makes blocks of 24 MiB.
const WAYS: [(&str, &str, &str, f64); 3] = [
    ("single-block", "single-block", "xz -6 -T1", 1.4),
    ("multi-block", "default-blocks", "xz -6 -T2", 2.2),
    ("multi-block, small", "multi-block", "xz -6 -T2 --block-size=8MiB", 2.2),
];

pub(crate) fn measure(options: &Options) -> Table {
    let plain =
        kept(if options.quick { "quick.bin" } else { "large.bin" }, |path| large(path, options.quick));
    let bytes = fs::metadata(&plain).expect("it was made").len();
    let digest = digest(&plain);
    let mut table =
        Table::new(format!("Download of {} MB of a root filesystem, packed by xz", bytes / 1_000_000));
    for (what, name, way, goal) in WAYS {
        let name = format!("{}.{name}.xz", if options.quick { "quick" } else { "large" });
        let packed = kept(&name, |path| {
            bash(&format!("{way} -c {} > {}", plain.display(), path.display()));
        });
        let server = serve(packed.clone());
        let url = format!("http://{server}/file.xz");
        let daemon = Daemon::start_bare(&[]);
        let mut client = daemon.client();
        // The memory of a daemon that has done a little work.
        client.must("vm_list", json!({}));
        let (mut pipes, mut products, mut peak) = (Vec::new(), Vec::new(), 0.0_f64);
        for _ in 0..if options.quick { 1 } else { TURNS } {
            settle(daemon.state());
            let sums = daemon.root().join("sums");
            pipes.push(bash(&format!(
                "curl -sSf {url} | tee >(sha256sum > {sums}-packed) | xz -dc | sha256sum > {sums}",
                sums = sums.display()
            )));
            let found = fs::read_to_string(&sums).expect("the pipe's digest");
            assert_eq!(found.split(' ').next(), Some(&*digest));

            peak_mib(daemon.pid());
            let start = Instant::now();
            let arguments =
                json!({ "kind": "rootfs", "from": url, "name": "large", "sha256": digest, "wait_s": 45 });
            let asset = client.to_the_end("asset_download", arguments, LONGEST);
            products.push(start.elapsed());
            peak = peak.max(peak_mib(daemon.pid()));
            assert_eq!(asset["sha256"], *digest);
            client.must("asset_remove", json!({ "asset": "large" }));
        }
        let (pipe, product) = (median(&mut pipes), median(&mut products));
        let times = ratio(pipe, product);
        let size = fs::metadata(&packed).map_or(0, |file| file.len() / 1_000_000);
        table.judged(
            format!("{what} .xz of {size} MB (`{way}`)"),
            show(product),
            show(pipe),
            format!("{times:.2} x as fast"),
            (format!("≥ {goal} x"), times >= goal),
        );
        table.judged(
            format!("{what}: nexusd, resident, at most"),
            format!("{peak:.1} MiB"),
            "",
            "",
            (format!("< {MEMORY} MiB"), peak < MEMORY),
        );
    }
    table.note(
        "Yardstick: `curl | tee >(sha256sum) | xz -dc | sha256sum`, which keeps nothing. Nexus also writes both files and waits until \
         the unpacked one is on the disk.",
    );
    table
}

/// The root filesystem several times, or its beginning.
fn large(path: &Path, is_quick: bool) {
    let tar = rootfs();
    let mut out = File::create(path).expect("a file for the material");
    for _ in 0..if is_quick { 1 } else { COPIES } {
        let mut from = File::open(&tar).expect("the root filesystem");
        let copied = match is_quick {
            true => io::copy(&mut io::Read::take(from, 40 << 20), &mut out),
            false => io::copy(&mut from, &mut out),
        };
        copied.expect("a copy of the root filesystem");
    }
}

fn digest(path: &Path) -> String {
    let mut hasher = Sha256::new();
    let mut file = BufReader::with_capacity(1 << 20, File::open(path).expect("it was made"));
    loop {
        let piece = file.fill_buf().expect("it can be read");
        if piece.is_empty() {
            break;
        }
        hasher.update(piece);
        let n = piece.len();
        file.consume(n);
    }
    HEXLOWER.encode(&hasher.finalize())
}

/// Serves one file under every path, on threads of this process; returns the address.
fn serve(file: PathBuf) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("a bound socket");
    let file = Arc::new(file);
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let file = file.clone();
            // A disconnected client ends its thread.
            std::thread::spawn(move || answer(&stream, &file));
        }
    });
    address
}

fn answer(stream: &TcpStream, file: &Path) -> io::Result<()> {
    let mut head = BufReader::new(stream);
    let mut line = String::new();
    while head.read_line(&mut line)? > 2 {
        line.clear();
    }
    let mut file = File::open(file)?;
    let length = file.metadata()?.len();
    let mut out = stream;
    write!(out, "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n")?;
    io::copy(&mut file, &mut out).map(drop)
}
