//! From nothing to the first command's result, compared with a bare boot: the same QEMU line and kernel with an `/init` that
//! prints a line. As root, also compared with a daemon whose VMs have no jails.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nexus_core::internals::Backend;
use nexus_core::internals::vm_files;
use nexus_tests::client::{BOOT, Client};
use nexus_tests::daemon::Daemon;
use nexus_tests::vsock::{Archive, compile};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::Options;
use super::samples::{Samples, show};
use super::table::Table;

const GOAL: f64 = 1.3;
/// How much longer a VM may take with a jail than without.
const JAIL_GOAL: f64 = 1.03;

pub(crate) fn measure(options: &Options) -> Table {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let plain = Daemon::start_set(&[("NEXUS_JAIL", "false")]);
    let mut unjailed_client = plain.client();
    // In a jail files have other names.
    let bare = Bare::like_a_vm_of(&mut unjailed_client);
    let (mut floor, mut whole, mut unjailed) = (Samples::default(), Samples::default(), Samples::default());
    let mut boots = Vec::new();
    // The first run of each warms the page cache.
    for run in 0..=options.boots() {
        let bare = bare.boot();
        let without = boot(&mut unjailed_client);
        let boot = boot(&mut client);
        if run > 0 {
            floor.add(bare);
            unjailed.add(without.whole);
            whole.add(boot.whole);
            boots.push(boot);
        }
    }

    let mut table = Table::new("Create to the first command's result, cold, TCG, busybox (p50 / p95)");
    let ratio = whole.p50().as_secs_f64() / floor.p50().as_secs_f64();
    table.judged(
        format!("`vm_create` and the first `guest_run_command`, {} runs", boots.len()),
        whole.pair(0.5, 0.95),
        floor.pair(0.5, 0.95),
        format!("{ratio:.2} x"),
        ("≤ 1.3 x", ratio <= GOAL),
    );
    if rustix::process::geteuid().is_root() {
        let ratio = whole.p50().as_secs_f64() / unjailed.p50().as_secs_f64();
        table.judged(
            "the same, next to one without a jail",
            whole.pair(0.5, 0.95),
            unjailed.pair(0.5, 0.95),
            format!("{ratio:.2} x"),
            ("≤ 1.03 x", ratio <= JAIL_GOAL),
        );
    }
    let part = |of: &dyn Fn(&Boot) -> Duration| boots.iter().map(of).collect::<Samples>();
    let mut told = |what: &str, of: &dyn Fn(&Boot) -> Duration| {
        table.told(format!("- {what}"), part(of).pair(0.5, 0.95), "", "");
    };
    told("before the start: rows, the drive", &|boot| boot.created.saturating_sub(boot.step("total_ms")));
    told("plan: driver, kernel, initramfs", &|boot| boot.step("plan_ms"));
    told("spawn: shim and VMM, until QEMU answers", &|boot| boot.step("spawn_ms"));
    told("QEMU: from then on until the kernel's clock starts", &|boot| {
        boot.step("boot_ms").saturating_sub(boot.step("guest_uptime_ms"))
    });
    told("kernel and agent: until the hello, by the guest's clock", &|boot| boot.step("guest_uptime_ms"));
    told("hello: until it is configured", &|boot| boot.step("configure_ms"));
    told("MCP: the link into the guest", &|boot| boot.step("link_ms"));
    told("the first command", &|boot| boot.command);
    let to_hello = part(&|boot| boot.step("spawn_ms") + boot.step("boot_ms"));
    table.told(
        "shim, modules, root drive and agent: spawn to hello, next to the bare boot",
        to_hello.pair(0.5, 0.95),
        floor.pair(0.5, 0.95),
        format!("+{}", show(to_hello.p50().saturating_sub(floor.p50()))),
    );
    table.told("a second command in the same VM", part(&|boot| boot.second).pair(0.5, 0.95), "", "");
    table
}

/// The timings of one VM.
struct Boot {
    whole: Duration,
    created: Duration,
    command: Duration,
    second: Duration,
    timings: Value,
}

impl Boot {
    fn step(&self, name: &str) -> Duration {
        Duration::from_millis(self.timings[name].as_u64().unwrap_or(0))
    }
}

fn boot(client: &mut Client) -> Boot {
    let command = |client: &mut Client| {
        let start = Instant::now();
        let ran = client.call_whole("guest_run_command", json!({ "vm": "cold", "argv": ["true"] }));
        ran.unwrap_or_else(|e| panic!("the first command: {}", e.text));
        start.elapsed()
    };
    let start = Instant::now();
    let vm = client.create(json!({ "name": "cold", "from": "busybox" }));
    let created = start.elapsed();
    let first = command(client);
    let whole = start.elapsed();
    let second = command(client);
    client.must("vm_delete", json!({ "vm": "cold", "force": true }));
    Boot { whole, created, command: first, second, timings: vm["timings"].clone() }
}

/// QEMU as started by Nexus, but with an initramfs that does nothing.
struct Bare {
    directory: TempDir,
    command: Vec<String>,
    cid: u32,
}

/// The file name of the bare machine's initramfs, in its directory.
pub(crate) const INITRAMFS: &str = "bare.cpio";
/// The vsock device's connection to the backend of [`Bare::boot`].
const VSOCK: &str = "socket,id=vsock,path=vu.sock";

impl Bare {
    /// Takes the command line of a running VM and stops the VM, because the bare machine uses the same drive.
    fn like_a_vm_of(client: &mut Client) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let vm = client.create(json!({ "name": "bare", "from": "busybox" }));
        let line = fs::read_to_string(format!("/proc/{}/cmdline", vm["process"]["pid"]))
            .expect("QEMU's command line");
        client.to_the_end("vm_stop", json!({ "vm": "bare" }), BOOT);
        let line: Vec<&str> = line.split_terminator('\0').collect();

        let mut archive = Archive::default();
        archive.add("dev", 0o040_755, 0, &[]);
        archive.add("dev/console", 0o020_600, 0x0501, &[]);
        archive.add("init", 0o100_755, 0, &compile("line", directory.path()));
        fs::write(directory.path().join(INITRAMFS), archive.finish()).expect("write the initramfs");
        let cid = u32::try_from(vm["cid"].as_u64().expect("a VM has a cid")).expect("a cid is 32 bits");
        Self { directory, command: bare_line(&line), cid }
    }

    /// From the start of the process to the line on its serial port.
    fn boot(&self) -> Duration {
        let at = |name: &str| self.directory.path().join(name);
        let backend = Backend::start(self.cid, &at(vm_files::VHOST), &at(vm_files::VSOCK))
            .expect("start a vsock backend");
        let start = Instant::now();
        let mut qemu = Command::new(&self.command[0])
            .args(&self.command[1..])
            .current_dir(self.directory.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("start QEMU");
        let console = BufReader::new(qemu.stdout.take().expect("stdout is piped"));
        let seen = console.lines().map_while(Result::ok).find(|line| line.contains("init: up"));
        let took = start.elapsed();
        qemu.kill().and_then(|()| qemu.wait()).expect("end QEMU");
        drop(backend);
        assert!(seen.is_some(), "QEMU ended without the line");
        took
    }
}

/// The same line with the bare initramfs, a vsock device found by its path, and without monitors, because there is no
/// shim to pass anything to the VMM.
pub(crate) fn bare_line(line: &[&str]) -> Vec<String> {
    let mut bare = Vec::with_capacity(line.len());
    let mut words = line.iter();
    while let Some(word) = words.next() {
        match *word {
            option @ ("-chardev" | "-mon") => match words.next() {
                Some(value) if ["shim", "monitor"].iter().any(|name| is_about(value, name)) => {}
                Some(value) if is_about(value, "vsock") => {
                    bare.extend([option, VSOCK]);
                }
                Some(value) => bare.extend([option, value]),
                None => bare.push(option),
            },
            "-initrd" => {
                words.next();
                bare.extend(["-initrd", INITRAMFS]);
            }
            other => bare.push(other),
        }
    }
    bare.into_iter().map(str::to_owned).collect()
}

/// Whether a value concerns the character device of this name.
fn is_about(value: &str, name: &str) -> bool {
    value.split(',').any(|part| part.strip_prefix("id=").or(part.strip_prefix("chardev=")) == Some(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_line_is_the_same_but_for_the_initramfs_and_the_shim() {
        let line = [
            "qemu",
            "-m",
            "512M",
            "-chardev",
            "socket,id=shim,fd=3",
            "-mon",
            "chardev=shim,mode=control",
            "-chardev",
            "socket,id=monitor,fd=5,server=on,wait=off",
            "-mon",
            "chardev=monitor,mode=control",
            "-chardev",
            "socket,id=vsock,fd=4",
            "-device",
            "vhost-user-vsock-device,chardev=vsock",
            "-initrd",
            "/x/initramfs",
        ];
        let bare = [
            "qemu",
            "-m",
            "512M",
            "-chardev",
            "socket,id=vsock,path=vu.sock",
            "-device",
            "vhost-user-vsock-device,chardev=vsock",
            "-initrd",
            "bare.cpio",
        ];
        assert_eq!(bare_line(&line), bare);
    }
}
