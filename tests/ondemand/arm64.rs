//! A VM of another architecture than the host's, emulated: arm64, on aarch64 x86_64. Run by `make e2e-arm64`, which builds a guest for it first.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use nexus_schema::Arch;
use nexus_tests::daemon::{Daemon, program};
use serde_json::json;

use crate::docker::archive;
use crate::run::must;

/// Packages with what a shell needs. They are only unpacked: their scripts are programs of the other architecture.
const PACKAGES: &str = "base-files,bash,dash,coreutils,libc-bin,sed,grep";
/// Nothing here writes what the script of base-passwd would.
const USERS: &str = r#"printf 'root:x:0:0:root:/root:/bin/sh\n' > "$1/etc/passwd""#;
/// How long a boot may take, in seconds: twice the time that it has by default.
const BOOT: &str = "360";

#[test]
fn a_debian_of_another_architecture_boots_and_runs_commands() {
    let started = Instant::now();
    let said = |what: &str| println!("{what} after {} s", started.elapsed().as_secs());
    let arch = Arch::FOREIGN;
    let nexusd = program("nexusd");
    let target = nexusd.ancestors().nth(2).expect("target/PROFILE/nexusd");
    let guest = target.join(format!("cross/nexus-guest-{arch}"));
    assert!(guest.is_file(), "{} is not built: .ci/cross", guest.display());
    let daemon = Daemon::start_set(&[
        ("NEXUS_FOREIGN_GUEST_BINARY", &guest.display().to_string()),
        ("NEXUS_BOOT_TIMEOUT_TCG_S", BOOT),
    ]);
    let mut client = daemon.client();
    let checks = client.must("system_info", json!({}))["doctor"]["checks"].take();
    let check = checks.as_array().expect("a list").iter().find(|check| check["name"] == arch.qemu());
    let check = check.expect("the doctor looks for it");
    assert_eq!(check["status"], "ok", "{check}");
    assert!(check["found"].as_str().is_some_and(|found| found.contains("experimental")), "{check}");

    let rootfs = daemon.state().join("other.tar");
    unpack(arch, &rootfs);
    said("packages unpacked");
    let image = json!({ "from": format!("file:{}", rootfs.display()), "name": "other" });
    let image = client.to_the_end("image_create", image, Duration::from_mins(10));
    assert_eq!(image["arch"], arch.as_str(), "{image}");
    said("image made");

    // The kernel is the distribution's for the image's architecture, which nobody has to say.
    let wanted = json!({ "name": "far", "from": "other", "memory": "512MiB", "checkpoints": false });
    let vm = client.to_the_end("vm_create", wanted, Duration::from_mins(15));
    assert_eq!(vm["state"], "ready", "{vm}");
    assert_eq!((&vm["driver"], &vm["accel"]), (&json!("qemu"), &json!("tcg")), "{vm}");
    said("machine ready");
    assert_eq!(must(&mut client, "far", "uname -m").trim(), arch.as_str());
    let kernels = client.must("asset_list", json!({ "kind": "kernel" }))["assets"].to_string();
    assert!(kernels.contains(arch.as_str()), "{kernels}");
    must(&mut client, "far", "echo kept > /kept && sync");
    let drives = must(&mut client, "far", "cat /proc/mounts");
    let is_root = |line: &str| line.starts_with("/dev/vda / ");
    assert!(drives.lines().any(is_root), "the root drive is the first: {drives}");
    said("commands ran");

    client.to_the_end("vm_restart", json!({ "vm": "far" }), Duration::from_mins(15));
    assert_eq!(must(&mut client, "far", "cat /kept").trim(), "kept");
    said("restarted");
    // VMs of this host are as before.
    client.create(json!({ "name": "near", "from": "busybox" }));
    assert_eq!(must(&mut client, "near", "uname -m").trim(), Arch::HOST.as_str());
    said("a machine of this host ran");
}

/// Unpacks a Debian of an architecture to a tar archive. No program of it is run.
fn unpack(arch: Arch, into: &Path) {
    let (suite, sources) = archive();
    let made = Command::new("mmdebstrap")
        .args(["--quiet", "--variant=extract", "--format=tar"])
        .args([format!("--architectures={}", arch.of_packages()), format!("--include={PACKAGES}")])
        .arg(format!("--extract-hook={USERS}"))
        .arg(suite)
        .arg(into)
        .arg(sources)
        .status();
    assert!(made.expect("mmdebstrap is installed").success(), "mmdebstrap failed");
}
