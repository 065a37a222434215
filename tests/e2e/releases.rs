//! From a distribution's release to a machine: its packages, by the real mmdebstrap, from a mirror with TLS.

use std::time::Duration;

use nexus_tests::daemon::Daemon;
use nexus_tests::mirror::{Mirror, PASSWORD};
use serde_json::json;

#[test]
fn a_release_becomes_an_asset_and_that_a_machine() {
    let mirror = Mirror::start();
    let (apt_root, ca_file) = (mirror.apt_root().display().to_string(), mirror.ca_file());
    let ca_file = ca_file.to_str().expect("a path of UTF-8");
    let direct = "localhost";
    let daemon = Daemon::start_set(&[
        ("NEXUS_APT_ROOT", &apt_root),
        ("NEXUS_CA_FILE", ca_file),
        ("NO_PROXY", direct),
        ("no_proxy", direct),
    ]);
    let mut client = daemon.client();
    let wanted = json!({ "kind": "rootfs", "from": "debian", "wait_s": 0 });
    let asset = client.to_the_end("asset_download", wanted.clone(), Duration::from_mins(15));
    assert_eq!((&asset["provider"], &asset["verified"]), (&json!("debian"), &json!("signature")), "{asset}");
    let origin = client.must("asset_inspect", json!({ "asset": asset["id"] }))["origin"].take();
    assert!(origin.as_str().is_some_and(|origin| origin.contains("deb https://localhost:")), "{origin}");
    // Each package came from the mirror, to an apt that was told of its CA.
    let asked = mirror.asked();
    let by_apt = asked.iter().filter(|asked| asked.agent.contains("APT") && asked.path.ends_with(".deb"));
    assert!(by_apt.count() > 50, "{asked:?}");
    let through_the_proxy = asked.iter().filter(|asked| asked.path.starts_with("localhost:"));
    assert!(through_the_proxy.clone().any(|asked| asked.agent.contains("APT")), "{asked:?}");
    assert!(through_the_proxy.clone().any(|asked| !asked.agent.contains("APT")), "{asked:?}");
    let again = client.to_the_end("asset_download", wanted, Duration::from_mins(1));
    assert_eq!(again["id"], asset["id"]);

    let from = format!("rootfs:debian@{}", asset["version"].as_str().expect("a version"));
    client.create(json!({ "name": "release", "from": from, "disk": "2GiB" }));
    let debs = |asked: Vec<_>| {
        asked.iter().filter(|a: &&nexus_tests::mirror::Asked| a.path.ends_with(".deb")).count()
    };
    assert_eq!(debs(mirror.asked()), debs(asked), "the image is made of the asset");
    let codename = client.run("release", ". /etc/os-release; echo $ID $VERSION_CODENAME").stdout;
    assert_eq!(codename.trim(), format!("debian {}", asset["version"].as_str().expect("a version")));
    assert_eq!(client.run("release", "python3 -c 'print(6 * 7)'; dpkg --audit").stdout, "42\n");
    // The host's proxy, its file of CAs and its passwords are not here.
    let left = format!(
        "apt-config dump | grep -iE 'CAInfo|http.*proxy'; ls /tmp /etc/apt/auth.conf.d; cat /etc/resolv.conf; \
         grep -rlF -e {PASSWORD} -e NEXUS_APT -e nexus-ca- -e nexus-mirror- /etc /var /root /usr/share"
    );
    let left = client.run("release", &left);
    assert_eq!(left.stdout, "/etc/apt/auth.conf.d:\n\n/tmp:\n", "{left:?}");
    // What belongs to the archive is.
    let sources = client.run("release", "cat /etc/apt/sources.list; ls /etc/apt/trusted.gpg.d").stdout;
    let archive = |line: &&str| line.starts_with("deb https://localhost:") && line.ends_with(" main");
    assert!(sources.lines().filter(archive).count() > 1 && sources.contains("debian-archive"), "{sources}");
}
