//! QEMU with the probe as its only program.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::{Kernel, until};

/// The guest's context id.
pub const CID: u32 = 77;
/// The name of the socket between QEMU and the backend.
pub const VHOST: &str = "vu.sock";
/// The name of the socket that host programs connect to.
pub const VSOCK: &str = "v.sock";
const MEMORY_MIB: u32 = 192;

/// A running guest. Its process ends when it is dropped.
#[derive(Debug)]
pub struct Guest {
    qemu: Child,
    monitor: BufReader<UnixStream>,
    hello: UnixListener,
    console: PathBuf,
}

impl Guest {
    /// Starts QEMU in `directory`, where a backend must already listen. Returns as soon as the process runs, before the guest
    /// has booted: see [`Guest::wait_for_hello`].
    ///
    /// Panics if QEMU cannot be started.
    pub fn start(kernel: &Kernel, directory: &Path) -> Guest {
        let initramfs = directory.join("initramfs");
        std::fs::write(&initramfs, compose(kernel, directory)).expect("write the initramfs");
        let bind = |name: &str| UnixListener::bind(directory.join(name)).expect("bind a socket");
        let monitor = bind("q.sock");
        let hello = bind(&format!("{VSOCK}_1024"));
        hello.set_nonblocking(true).expect("make a listener non-blocking");
        let log = File::create(directory.join("qemu.log")).expect("create QEMU's log");
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.current_dir(directory)
            .args(["-M", "microvm,accel=tcg,memory-backend=mem0", "-m", &MEMORY_MIB.to_string()])
            .args(["-object", &format!("memory-backend-memfd,id=mem0,size={MEMORY_MIB}M,share=on")])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-serial", "file:console.log"])
            .arg("-kernel")
            .arg(&kernel.image)
            .args(["-initrd", "initramfs", "-append", &command_line()])
            .args(["-chardev", &format!("socket,id=vs0,path={VHOST}")])
            .args(["-device", "vhost-user-vsock-device,chardev=vs0", "-qmp", "unix:q.sock"])
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("share QEMU's log"))
            .stderr(log);
        let mut qemu = qemu.spawn().expect("start qemu-system-x86_64; install qemu-system-x86");
        monitor.set_nonblocking(true).expect("make a listener non-blocking");
        let monitor = until("QEMU to open its monitor", || {
            let ended = qemu.try_wait().expect("look at QEMU");
            let log = || std::fs::read_to_string(directory.join("qemu.log")).unwrap_or_default();
            assert!(ended.is_none(), "QEMU ended with {ended:?}: {}", log());
            monitor.accept().ok()
        });
        let console = directory.join("console.log");
        let mut guest = Guest { qemu, monitor: BufReader::new(monitor.0), hello, console };
        guest.command("qmp_capabilities");
        guest
    }

    /// The next connection of the guest to the host's port 1024, which the probe opens once per boot.
    pub fn wait_for_hello(&mut self) -> UnixStream {
        let (hello, qemu, console) = (&self.hello, &mut self.qemu, &self.console);
        let stream = until("the guest's hello", || {
            let ended = qemu.try_wait().expect("look at QEMU");
            let text = || std::fs::read_to_string(console).unwrap_or_default();
            assert!(ended.is_none(), "QEMU ended with {ended:?}, on the console: {}", text());
            assert!(!text().contains("probe failed"), "the guest gave up: {}", text());
            hello.accept().ok()
        });
        stream.0.set_nonblocking(false).expect("make a socket blocking");
        stream.0.set_read_timeout(Some(super::PATIENCE)).expect("set a timeout");
        stream.0
    }

    /// Runs a command without arguments on QEMU's monitor, and waits for its answer.
    pub fn command(&mut self, name: &str) {
        let stream = self.monitor.get_mut();
        writeln!(stream, r#"{{"execute":"{name}"}}"#).expect("write to QEMU's monitor");
        loop {
            let mut line = String::new();
            self.monitor.read_line(&mut line).expect("read from QEMU's monitor");
            assert!(!line.is_empty(), "QEMU ended on {name}");
            assert!(!line.contains(r#""error""#), "QEMU refuses {name}: {line}");
            // Skips events.
            if line.contains(r#""return""#) {
                return;
            }
        }
    }

    /// Kills QEMU, as a crash would.
    pub fn kill(mut self) {
        self.end();
    }

    fn end(&mut self) {
        // Fails if QEMU has already exited.
        self.qemu.kill().ok();
        self.qemu.wait().expect("wait for QEMU");
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.end();
    }
}

/// The kernel's command line. A guest under emulation cannot calibrate its clock on a busy machine, so it is told the rate.
fn command_line() -> String {
    format!(
        "console=ttyS0 quiet panic=-1 reboot=t mitigations=off nokaslr no_timer_check init_on_alloc=0 tsc_early_khz={} tsc=reliable",
        nexus_core::internals::tsc::khz().expect("a host with a time stamp counter")
    )
}

/// The initramfs: the probe as `/init`, and the modules.
///
/// Panics if the probe cannot be compiled.
pub fn compose(kernel: &Kernel, scratch: &Path) -> Vec<u8> {
    let mut archive = Archive::default();
    for directory in ["dev", "modules"] {
        archive.add(directory, 0o040_755, 0, &[]);
    }
    archive.add("dev/console", 0o020_600, 0x0501, &[]);
    let mut order = String::new();
    for module in &kernel.modules {
        let name = module.file_name().and_then(|name| name.to_str()).expect("modules have plain names");
        let bytes = std::fs::read(module).expect("read a module");
        archive.add(&format!("modules/{name}"), 0o100_644, 0, &bytes);
        order += &format!("{name}\n");
    }
    archive.add("modules/order", 0o100_644, 0, order.as_bytes());
    archive.add("init", 0o100_755, 0, &compile("probe", scratch));
    archive.finish()
}

/// Compiles one of the programs in `tests/guest` for a guest. It only uses the standard library and is linked statically, so
/// this takes just a moment.
///
/// Panics if it cannot be compiled.
pub fn compile(program: &str, scratch: &Path) -> Vec<u8> {
    let source = format!("{}/guest/{program}.rs", env!("CARGO_MANIFEST_DIR"));
    let binary = scratch.join(program);
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = Command::new(rustc)
        // With an explicit target, so that the flags do not affect the build host's own programs.
        .args([
            "--edition",
            "2024",
            "--target",
            "x86_64-unknown-linux-gnu",
            "-C",
            "target-feature=+crt-static",
        ])
        .args(["-O", "-C", "panic=abort", "-C", "strip=symbols", &source, "-o"])
        .arg(&binary)
        .output()
        .expect("run rustc");
    assert!(output.status.success(), "compile {source}: {}", String::from_utf8_lossy(&output.stderr));
    std::fs::read(binary).expect("read a program")
}

/// A cpio archive in the format "newc", which the kernel unpacks.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: usize,
}

impl Archive {
    /// Adds a file: its full path, its mode with its type, its device number, its content.
    pub fn add(&mut self, name: &str, mode: u32, device: u32, content: &[u8]) {
        self.entries += 1;
        let (major, minor) = (device >> 8, device & 0xff);
        let fields = [
            self.entries as u32,
            mode,
            0,
            0,
            1,
            0,
            content.len() as u32,
            0,
            0,
            major,
            minor,
            name.len() as u32 + 1,
            0,
        ];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(name.bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend(content);
        self.align();
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// The archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, 0, &[]);
        self.bytes
    }
}
