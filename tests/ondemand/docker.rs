//! Docker in a VM: every module that it wants is there. Run by `make e2e-docker`, since it makes an image of many packages first.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use nexus_tests::daemon::Daemon;
use nexus_tests::wait::until;
use serde_json::json;

use crate::run::must;

/// What the image has beside the essential packages.
const PACKAGES: &str = "docker.io,kmod,busybox-static,ca-certificates";
/// How long one of Docker's daemons may take to answer, under software emulation on a busy machine.
const DAEMON: Duration = Duration::from_mins(5);

#[test]
fn docker_runs_a_loaded_image_in_a_machine() {
    let started = Instant::now();
    let said = |what: &str| println!("{what} after {} s", started.elapsed().as_secs());
    let daemon = Daemon::start();
    let rootfs = daemon.state().join("docker.tar");
    bootstrap(PACKAGES, &rootfs);
    said("packages installed");
    let mut client = daemon.client();
    let image = json!({ "from": format!("file:{}", rootfs.display()), "name": "with-docker" });
    client.to_the_end("image_create", image, Duration::from_mins(10));
    fs::remove_file(&rootfs).expect("the archive is of no more use");
    said("image made");
    client.create(json!({ "name": "dock", "from": "with-docker", "memory": "1GiB" }));
    said("machine ready");

    // As the packages' units start them, each once the one before it is up; with Docker's own bridge, iptables and overlay.
    for (start, is_up) in [
        ("containerd", "ctr version"),
        ("dockerd --containerd=/run/containerd/containerd.sock", "docker version"),
    ] {
        must(&mut client, "dock", &format!("setsid {start} </dev/null >>/var/log/docker.log 2>&1 &"));
        let up = until(DAEMON, || (client.run("dock", is_up).exit_code == Some(0)).then_some(()));
        assert!(up.is_some(), "{start}: {}", client.run("dock", "tail -n 30 /var/log/docker.log").stdout);
    }
    said("dockerd up");
    let info =
        must(&mut client, "dock", "docker info --format '{{.Driver}} {{.CgroupVersion}} {{.CgroupDriver}}'");
    assert_eq!(info.trim(), "overlay2 2 cgroupfs");

    // An image of nothing but a static shell, as others would hand it over.
    must(
        &mut client,
        "dock",
        "mkdir -p /tmp/i/bin && cp /bin/busybox /tmp/i/bin/ && ln -s busybox /tmp/i/bin/sh",
    );
    must(
        &mut client,
        "dock",
        "tar -C /tmp/i -c . | docker import - tiny && docker save tiny -o /tmp/tiny.tar",
    );
    let loaded = must(&mut client, "dock", "docker rmi tiny >/dev/null && docker load -i /tmp/tiny.tar");
    assert!(loaded.contains("Loaded image: tiny:latest"), "{loaded}");
    said("image loaded");
    let shell = "echo from a container; busybox ip -4 -o addr show eth0; busybox id -u";
    let ran = must(&mut client, "dock", &format!("docker run --rm -m 64m tiny /bin/sh -c '{shell}'"));
    assert!(
        ran.starts_with("from a container\n") && ran.contains("172.17.0.2") && ran.ends_with("\n0\n"),
        "{ran}"
    );
    said("container ran");
    let loaded = must(&mut client, "dock", "cut -d' ' -f1 /proc/modules");
    for module in ["overlay", "bridge", "veth", "nf_tables"] {
        assert!(loaded.lines().any(|name| name == module), "{module} is not loaded: {loaded}");
    }
}

/// A root filesystem with these packages beside the essential ones, from the archive that the host's apt is configured for.
pub(crate) fn bootstrap(packages: &str, into: &Path) {
    let (suite, sources) = archive();
    let made = Command::new("mmdebstrap")
        .args(["--quiet", "--variant=minbase", "--format=tar", "--aptopt=APT::Install-Recommends \"false\""])
        .args([&format!("--include={packages}"), &suite])
        .arg(into)
        .arg(sources)
        .status();
    assert!(made.expect("mmdebstrap is installed").success(), "mmdebstrap failed");
}

/// The release of this host, and the file that tells apt where its packages are.
pub(crate) fn archive() -> (String, &'static str) {
    let release = fs::read_to_string("/etc/os-release").expect("the host says what it is");
    let suite = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME=")).expect("a code name");
    let sources = ["/etc/apt/sources.list.d/debian.sources", "/etc/apt/sources.list"];
    let sources = sources.into_iter().find(|path| fs::metadata(path).is_ok_and(|file| file.len() > 0));
    (suite.to_owned(), sources.expect("apt is configured"))
}
