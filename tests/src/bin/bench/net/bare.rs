//! A machine with the QEMU line of a VM of Nexus, whose TAP is bare: it has an address, and the host of its own namespaces routes.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Stdio};

use nexus_core::internals::Backend;
use nexus_tests::daemon::Daemon;
use nexus_tests::netns::{HOST, Internet};
use nexus_tests::vsock::{VHOST, VSOCK, compose, until};
use serde_json::Value;

use super::{Probe, serve_data};
use crate::boot::{INITRAMFS, bare_line};
use crate::vsock;

const TAP: &str = "bare0";
/// The network of TAP and guest, and their addresses in it.
const NETWORK: &str = "10.66.0.0/24";
const GATEWAY: &str = "10.66.0.1";
const GUEST: &str = "10.66.0.2";

/// The machine, in a world of its own.
pub(super) struct Bare {
    pub(super) probe: Probe,
    qemu: Child,
    _backend: Backend,
    _directory: tempfile::TempDir,
    _world: Internet,
}

impl Bare {
    /// Boots one like a VM that runs, but for its drives and its initramfs.
    pub(super) fn like(daemon: &Daemon, vm: &Value) -> Self {
        let world = Internet::new();
        serve_data(&world.outside);
        world.host.ip(&format!("tuntap add dev {TAP} mode tap vnet_hdr"));
        world.host.ip(&format!("address add {GATEWAY}/24 dev {TAP}"));
        world.host.ip(&format!("link set {TAP} up"));
        world.outside.ip(&format!("route add {NETWORK} via {HOST}"));
        let forward = || fs::write("/proc/sys/net/ipv4/ip_forward", "1");
        world.host.within(forward).expect("the namespace forwards");

        let directory = tempfile::tempdir().expect("a directory");
        let kernel = vsock::kernel(daemon);
        fs::write(directory.path().join(INITRAMFS), compose(&kernel, directory.path()))
            .expect("an initramfs");
        let line = fs::read_to_string(format!("/proc/{}/cmdline", vm["process"]["pid"]))
            .expect("QEMU's command line");
        let line = like(&line.split_terminator('\0').collect::<Vec<_>>(), &kernel.image);
        let cid = u32::try_from(vm["cid"].as_u64().expect("a VM has a cid")).expect("a cid is 32 bits");
        let at = |name: &str| directory.path().join(name);
        let backend = Backend::start(cid, &at(VHOST), &at(VSOCK)).expect("start a vsock backend");
        let hello = UnixListener::bind(at(&format!("{VSOCK}_1024"))).expect("bind a socket");
        hello.set_nonblocking(true).expect("make a listener non-blocking");
        let log = fs::File::create(at("qemu.log")).expect("a log");
        let mut command = world.host.command(&line[0]);
        command.args(&line[1..]).current_dir(directory.path()).stdin(Stdio::null());
        command.stdout(log.try_clone().expect("share the log")).stderr(log);
        let qemu = command.spawn().expect("start QEMU");
        let log = at("qemu.log");
        let mut bare = Self {
            probe: Probe(directory.path().to_owned()),
            qemu,
            _backend: backend,
            _directory: directory,
            _world: world,
        };
        until("the bare machine's hello", || {
            let ended = bare.qemu.try_wait().expect("look at QEMU");
            let said = || fs::read_to_string(&log).unwrap_or_default();
            assert!(ended.is_none(), "QEMU ended with {ended:?}: {}", said());
            assert!(!said().contains("probe failed"), "the guest gave up: {}", said());
            hello.accept().ok()
        });
        bare.probe.outward(&format!("interface {GUEST} {GATEWAY}"));
        bare
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        // Fails if QEMU has already exited.
        self.qemu.kill().ok();
        self.qemu.wait().expect("wait for QEMU");
    }
}

/// The line of a VM with this kernel, without drives, and with the bare TAP in place of the one that was handed over.
fn like(line: &[&str], kernel: &Path) -> Vec<String> {
    let kernel = kernel.display().to_string();
    let mut like = Vec::with_capacity(line.len());
    let mut words = bare_line(line).into_iter();
    while let Some(word) = words.next() {
        match word.as_str() {
            "-blockdev" => drop(words.next()),
            "-netdev" => {
                words.next();
                like.extend([word, format!("tap,id=net0,ifname={TAP},script=no,downscript=no")]);
            }
            "-kernel" => {
                words.next();
                like.extend([word, kernel.clone()]);
            }
            "-device" => match words.next() {
                Some(value) if value.starts_with("virtio-blk-device,") => {}
                value => like.extend(std::iter::once(word).chain(value)),
            },
            _ => like.push(word),
        }
    }
    like
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_is_the_same_but_for_drives_kernel_and_tap() {
        let line = [
            "qemu",
            "-blockdev",
            "{}",
            "-device",
            "virtio-blk-device,drive=disk0,id=drive0",
            "-netdev",
            "tap,id=net0,fd=6",
            "-device",
            "virtio-net-device,netdev=net0,mac=02:00:00:00:00:01",
            "-kernel",
            "/kernel",
            "-initrd",
            "/initramfs",
        ];
        let expected = [
            "qemu",
            "-netdev",
            "tap,id=net0,ifname=bare0,script=no,downscript=no",
            "-device",
            "virtio-net-device,netdev=net0,mac=02:00:00:00:00:01",
            "-kernel",
            "/assets/vmlinux",
            "-initrd",
            INITRAMFS,
        ];
        assert_eq!(like(&line, Path::new("/assets/vmlinux")), expected);
    }
}
