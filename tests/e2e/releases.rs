//! From a distribution's release to a machine: its packages, installed by the real mmdebstrap, from a mirror with TLS.

use std::fs;
use std::time::Duration;

use nexus_tests::daemon::Daemon;
use nexus_tests::mirror::{Mirror, PASSWORD};
use nexus_tests::ubuntu::Ubuntu;
use nexus_tests::wait::until;
use serde_json::{Value, json};

/// An ordinary user, with the entries that define it and its subordinate ids.
const USER: u32 = 54_322;
const PASSWD: (&str, &str) = ("passwd", "nexus-test:x:54322:54322::/nonexistent:/bin/sh");
const IDS: [(&str, &str); 2] = [("subuid", "nexus-test:700000:65536"), ("subgid", "nexus-test:700000:65536")];

#[test]
fn a_release_becomes_an_asset_and_that_a_machine() {
    let mirror = Mirror::start();
    let (apt_root, ca_file) = (mirror.apt_root().display().to_string(), mirror.ca_file());
    let ca_file = ca_file.to_str().expect("a path of UTF-8");
    let direct = "localhost";
    let mut daemon = Daemon::start_set(&[
        ("NEXUS_APT_ROOT", &apt_root),
        ("NEXUS_CA_FILE", ca_file),
        ("NO_PROXY", direct),
        ("no_proxy", direct),
    ]);
    let wanted = json!({ "kind": "rootfs", "from": "debian", "wait_s": 0 });
    cut_off(&mut daemon, &wanted);
    let mut client = daemon.client();
    let asset = client.to_the_end("asset_download", wanted.clone(), Duration::from_mins(15));
    assert_eq!((&asset["provider"], &asset["verified"]), (&json!("debian"), &json!("signature")), "{asset}");
    let origin = client.must("asset_inspect", json!({ "asset": asset["id"] }))["origin"].take();
    assert!(origin.as_str().is_some_and(|origin| origin.contains("deb https://localhost:")), "{origin}");
    // Each package came from the mirror, to an apt that knows its CA.
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
    // The host's proxy, CA file and passwords are not in the image.
    let left = format!(
        "apt-config dump | grep -iE 'CAInfo|http.*proxy'; ls /tmp /etc/apt/auth.conf.d; cat /etc/resolv.conf; \
         grep -rlF -e {PASSWORD} -e NEXUS_APT -e nexus-ca- -e nexus-mirror- /etc /var /root /usr/share"
    );
    let left = client.run("release", &left);
    assert_eq!(left.stdout, "/etc/apt/auth.conf.d:\n\n/tmp:\n", "{left:?}");
    // The archive's own configuration is.
    let sources = client.run("release", "cat /etc/apt/sources.list; ls /etc/apt/trusted.gpg.d").stdout;
    let archive = |line: &&str| line.starts_with("deb https://localhost:") && line.ends_with(" main");
    assert!(sources.lines().filter(archive).count() > 1 && sources.contains("debian-archive"), "{sources}");
}

/// Kills the daemon while mmdebstrap has filesystems mounted: neither mounts nor files may be left.
fn cut_off(daemon: &mut Daemon, wanted: &Value) {
    let scratch = daemon.state().join("scratch");
    let below = format!(" {}/", scratch.display());
    // In any process.
    let mounted = |process: &str| {
        let mounts = fs::read_to_string(format!("/proc/{process}/mountinfo")).unwrap_or_default();
        mounts.lines().any(|line| line.contains(&below) && line.contains(" - proc "))
    };
    let op = daemon.client().must("asset_download", wanted.clone());
    let seen = until(Duration::from_mins(10), || {
        let mut processes = fs::read_dir("/proc").expect("processes").flatten();
        processes.find(|process| process.file_name().to_str().is_some_and(mounted))
    });
    assert!(seen.is_some(), "mmdebstrap mounts nothing");
    assert!(!mounted("self"), "the host sees what mmdebstrap mounted");
    daemon.kill();
    daemon.restart();
    let ended = daemon.client().must("op_get", json!({ "op_id": op["op_id"] }));
    assert_eq!(ended["state"], "failed", "{ended}");
    let left: Vec<_> =
        fs::read_dir(&scratch).expect("a directory").flatten().map(|left| left.path()).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_release_of_ubuntu_becomes_a_machine_of_an_ordinary_user() {
    let ubuntu = Ubuntu::start();
    let apt_root = ubuntu.apt_root().display().to_string();
    let settings =
        [("NEXUS_APT_ROOT", apt_root.as_str()), ("NO_PROXY", "127.0.0.1"), ("no_proxy", "127.0.0.1")];
    let daemon = Daemon::start_as_in(USER, &[PASSWD, IDS[0], IDS[1]], &settings);
    let mut client = daemon.client();
    let listed = client.must("asset_list", json!({ "kind": "rootfs", "limit": 500 }));
    let assets = listed["assets"].as_array().expect("a list");
    let offered: Vec<_> = assets.iter().filter(|asset| asset["provider"] == "ubuntu").collect();
    assert_eq!(offered.len(), 1, "{listed}");
    assert_eq!(
        (&offered[0]["version"], &offered[0]["installed"]),
        (&json!("noble"), &json!(false)),
        "{listed}"
    );
    let wanted = json!({ "kind": "rootfs", "from": "ubuntu", "version": "24.04", "wait_s": 0 });
    let asset = client.to_the_end("asset_download", wanted, Duration::from_mins(10));
    assert_eq!((&asset["version"], &asset["verified"]), (&json!("noble"), &json!("signature")), "{asset}");
    let origin = client.must("asset_inspect", json!({ "asset": asset["id"] }))["origin"].take();
    let origin = origin.as_str().expect("where it is from");
    let suites = ["/ubuntu noble main", "/ubuntu noble-updates main", "/ubuntu noble-security main"];
    assert!(suites.iter().all(|suite| origin.contains(suite)) && !origin.contains("backports"), "{origin}");

    client.create(json!({ "name": "release", "from": "rootfs:ubuntu@noble", "disk": "2GiB" }));
    let inside = client.run(
        "release",
        ". /etc/os-release; echo $ID $VERSION_ID $VERSION_CODENAME; dpkg-query -W -f '${Version}\n' base-files; \
         stat -c '%n %u:%g %a' / /etc/shadow /usr/bin/passwd /root /usr/bin/chage; dpkg --audit; \
         python3 -c 'print(6 * 7)'; grep -c ^deb /etc/apt/sources.list",
    );
    // Owners and modes are those of the packages, although nothing ran as root; packages from the updates are used.
    assert_eq!(
        inside.stdout,
        "ubuntu 24.04 noble\n13ubuntu10.2\n/ 0:0 755\n/etc/shadow 0:42 640\n/usr/bin/passwd 0:0 4755\n/root 0:0 700\n\
         /usr/bin/chage 0:42 2755\n42\n3\n",
        "{inside:?}"
    );
}

#[test]
fn who_has_no_ids_for_packages_is_told_before_anything_is_fetched() {
    let daemon = Daemon::start_as_in(USER, &[PASSWD, IDS[0]], &[]);
    let mut client = daemon.client();
    let told = "user nexus-test has no range of 65536 subordinate ids in /etc/subgid";
    for check in [true, false] {
        let wanted = json!({ "kind": "rootfs", "from": "debian", "check": check });
        let error = client.call("asset_download", wanted).expect_err("it cannot be made");
        assert!(error.text.contains(told) && error.text.contains("usermod --add-subuids"), "{}", error.text);
    }
    let doctor = client.must("system_info", json!({}))["doctor"].take();
    let checks = doctor["checks"].as_array().unwrap_or_else(|| panic!("{doctor}"));
    let found = checks.iter().find(|check| check["name"] == "subids").expect("it is looked at");
    assert_eq!(found["status"], "warn", "{found}");
    assert!(found["found"].as_str().is_some_and(|found| found.contains(told)), "{found}");
}
