//! Root filesystems made from the host's package archive, and the daemon killed at every step of making them and of
//! downloading packages. The archive is the one that this host's apt uses; `mmdebstrap` is replaced.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use data_encoding::HEXLOWER;
use nexus_tests::client::Client;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::kills::{kill_at, last_op};
use crate::world::{SOON, World, refused, soon};

/// A root filesystem that is small, but not too small.
fn archive() -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let noise: Vec<u8> = (0..1_u32 << 20).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    for (path, bytes) in [("etc/os-release", &b"ID=trial\nVERSION_ID=1\n"[..]), ("data", &noise)] {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        builder.append_data(&mut header, path, bytes).expect("an entry fits in memory");
    }
    builder.into_inner().expect("an archive fits in memory")
}

/// A program in place of `mmdebstrap` that records its arguments.
fn program(directory: &Path, text: &str) -> String {
    fs::create_dir_all(directory).expect("a directory");
    let path = directory.join("mmdebstrap");
    fs::write(&path, format!("#!/bin/sh\necho \"$@\" >> {}\n{text}\n", directory.join("asked").display()))
        .expect("a program is written");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("it is made executable");
    path.display().to_string()
}

struct Scene {
    world: World,
    things: tempfile::TempDir,
    sha256: String,
}

impl Scene {
    fn new() -> Self {
        let things = tempfile::tempdir().expect("a directory");
        let tar = archive();
        fs::write(things.path().join("root.tar"), &tar).expect("an archive is written");
        let good = format!("exec cat {}", things.path().join("root.tar").display());
        let program = program(things.path(), &good);
        // Other providers are not asked.
        let providers = json!({ "alpine": { "mirrors": ["http://127.0.0.1:9/x"] } }).to_string();
        let world = World::with(&[("NEXUS_MMDEBSTRAP", &program), ("NEXUS_PROVIDERS", &providers)]);
        Self { world, things, sha256: HEXLOWER.encode(&Sha256::digest(&tar)) }
    }

    fn program(&self, text: &str) {
        program(self.things.path(), text);
    }

    /// How often a root filesystem was made.
    fn made(&self) -> usize {
        fs::read_to_string(self.things.path().join("asked")).map_or(0, |asked| asked.lines().count())
    }
}

/// The names and versions of the listed root filesystems of Debian.
fn listed(client: &mut Client, installed: bool) -> Vec<(String, String)> {
    let all = client.must("asset_list", json!({ "kind": "rootfs", "available": !installed, "limit": 500 }));
    let of_debian = all["assets"].as_array().expect("a list").iter().filter(|a| a["provider"] == "debian");
    let text = |asset: &Value, key: &str| asset[key].as_str().expect("a text").to_owned();
    of_debian.map(|asset| (text(asset, "name"), text(asset, "version"))).collect()
}

#[test]
fn a_release_of_the_hosts_archive_is_a_root_filesystem_like_any_other() {
    let scene = Scene::new();
    let mut client = scene.world.client();
    let (name, release) = listed(&mut client, false).first().cloned().expect("apt names a release of Debian");
    assert_eq!(name, format!("debian-{release}"));
    let wanted = json!({ "kind": "rootfs", "from": "debian", "version": release, "wait_s": 45 });
    let mut check = wanted.clone();
    check["check"] = json!(true);
    let found = client.to_the_end("asset_download", check, SOON);
    assert_eq!((&found["name"], &found["installed"]), (&json!(name), &json!(false)), "{found}");
    let plan =
        client.must("vm_create", json!({ "from": format!("rootfs:debian@{release}"), "dry_run": true }));
    assert!(plan.to_string().contains(&format!("debian@{release}")), "{plan}");
    assert_eq!(scene.made(), 0);

    let asset = client.to_the_end("asset_download", wanted.clone(), SOON);
    assert_eq!(
        (&asset["name"], &asset["version"], &asset["sha256"], &asset["verified"]),
        (&json!(name), &json!(release), &json!(scene.sha256), &json!("signature")),
        "{asset}"
    );
    let asked = fs::read_to_string(scene.things.path().join("asked")).expect("it was asked");
    assert!(asked.contains("--keyring=") && asked.contains(&format!("-- {release} - deb ")), "{asked}");
    let details = client.must("asset_inspect", json!({ "asset": name }));
    assert!(details["origin"].as_str().is_some_and(|origin| origin.contains("deb ")), "{details}");
    assert_eq!(client.to_the_end("asset_verify", json!({ "asset": name }), SOON)["ok"], true);

    // Once is enough, regardless of the request's form.
    for words in [json!({ "kind": "rootfs", "from": format!("debian@{release}") }), wanted] {
        assert_eq!(client.to_the_end("asset_download", words, SOON)["id"], asset["id"]);
    }
    let image = client.to_the_end("image_create", json!({ "from": "rootfs:debian", "name": "made" }), SOON);
    assert_eq!(image["source"], format!("rootfs:debian@{release}"), "{image}");
    client.must("template_create", json!({ "name": "web", "source": format!("rootfs:debian@{release}") }));
    let build = client.to_the_end("build_start", json!({ "template": "web" }), SOON);
    assert_eq!(build["status"], "success", "{build}");
    assert_eq!(scene.made(), 1);
    scene.world.assert_in_order();
}

#[test]
fn a_release_that_cannot_be_made_is_refused_with_what_is_missing() {
    let mut scene = Scene::new();
    let mut client = scene.world.client();
    for (from, check, said) in [
        ("debian@zurg", true, "no release zurg of debian, only "),
        ("debian@zurg", false, "no release zurg of debian, only "),
        ("ubuntu", true, "no release of ubuntu"),
        ("ubuntu@noble", false, "no release of ubuntu"),
    ] {
        let wanted = json!({ "kind": "rootfs", "from": from, "check": check, "wait_s": 45 });
        let failure = refused(&mut client, "asset_download", wanted);
        assert!(failure.code == "asset_not_found" && failure.text.contains(said), "{}", failure.text);
        assert!(failure.text.contains("keyring") && failure.text.contains("Suites"), "{}", failure.text);
    }
    let failure = refused(&mut client, "asset_download", json!({ "kind": "vmm", "from": "debian" }));
    assert!(failure.text.contains("kernel and rootfs, not vmm"), "{}", failure.text);
    let wrong = json!({ "kind": "rootfs", "from": "debian", "sha256": "0".repeat(64), "wait_s": 45 });
    assert_eq!(refused(&mut client, "asset_download", wrong).code, "verification_failed");
    // A truncated archive, and an empty one.
    for text in ["head -c 100000 /dev/zero; echo 'E: no such luck' >&2; exit 3", "true"] {
        scene.program(text);
        let failure = refused(
            &mut client,
            "asset_download",
            json!({ "kind": "rootfs", "from": "debian", "wait_s": 45 }),
        );
        let is_told = failure.text.contains("no such luck") || failure.text.contains("not a root filesystem");
        assert!(is_told, "{}", failure.text);
    }
    fs::remove_file(scene.things.path().join("mmdebstrap")).expect("it was there");
    let check = json!({ "kind": "rootfs", "from": "debian", "check": true, "wait_s": 45 });
    let failure = refused(&mut client, "asset_download", check);
    assert!(failure.text.contains("mmdebstrap is not installed"), "{}", failure.text);
    assert_eq!(listed(&mut client, true), []);
    drop(client);
    scene.world.daemon.stop();
    scene.world.daemon.restart();
    scene.world.assert_in_order();
}

#[test]
fn a_release_whose_making_is_cut_off_is_whole_or_gone() {
    let mut scene = Scene::new();
    let wanted = json!({ "kind": "rootfs", "from": "debian", "wait_s": 45 });
    for point in ["release-piece", "release-made", "asset-placed", "asset-noted"] {
        let mut client = kill_at(&mut scene.world, point, "asset_download", &wanted);
        assert_eq!(last_op(&mut client)["state"], "failed", "{point}");
        let there = listed(&mut client, true).len();
        assert_eq!(there, usize::from(point == "asset-noted"), "{point}");
        assert_eq!(client.to_the_end("asset_verify", json!({}), SOON)["ok"], true, "{point}");
        scene.world.assert_in_order();
    }
    let made = scene.made();
    let asset = scene.world.client().to_the_end("asset_download", wanted, SOON);
    assert_eq!((&asset["sha256"], scene.made()), (&json!(scene.sha256), made), "it is whole already");
    scene.world.assert_in_order();
}

#[test]
fn nothing_stays_mounted_where_packages_were_unpacked() {
    let mut scene = Scene::new();
    let good = fs::read_to_string(scene.things.path().join("mmdebstrap")).expect("a program");
    let mounted = scene.things.path().join("mounted");
    // Does what mmdebstrap does in its tree, and then takes a while.
    scene.program(&format!(
        "mkdir $TMPDIR/proc && mount -t proc proc $TMPDIR/proc && echo $TMPDIR/proc > {} && exec sleep 600",
        mounted.display()
    ));
    let wanted = json!({ "kind": "rootfs", "from": "debian", "wait_s": 0 });
    scene.world.client().must("asset_download", wanted);
    let place = soon("a mount", || {
        fs::read_to_string(&mounted)
            .ok()
            .filter(|text| text.ends_with('\n'))
            .map(|text| text.trim().to_owned())
    });
    let is_mounted = || fs::read_to_string("/proc/self/mountinfo").expect("mounts").contains(&place);
    assert!(!is_mounted(), "what it mounts is seen by others");
    assert!(Path::new(&place).is_dir());
    scene.world.daemon.kill();
    scene.world.daemon.restart();
    assert_eq!(last_op(&mut scene.world.client())["state"], "failed");
    assert!(!is_mounted() && !Path::new(&place).exists(), "{place} is left");
    scene.world.assert_in_order();
    fs::write(scene.things.path().join("mmdebstrap"), good).expect("a program is written");
    let wanted = json!({ "kind": "rootfs", "from": "debian", "wait_s": 45 });
    let asset = scene.world.client().to_the_end("asset_download", wanted, SOON);
    assert_eq!(asset["sha256"], scene.sha256, "{asset}");
}

#[test]
fn packages_whose_download_is_cut_off_come_again() {
    let mut world = World::new();
    let image = json!({ "from": "busybox", "name": "tiny", "wait_s": 45 });
    let kernel = json!({ "kind": "kernel", "from": "debian", "wait_s": 45 });
    for (point, tool, wanted) in [
        ("package-piece", "image_create", &image),
        ("package-fetched", "image_create", &image),
        ("package-piece", "asset_download", &kernel),
        ("kernel-unpacked", "asset_download", &kernel),
    ] {
        let mut client = kill_at(&mut world, point, tool, wanted);
        assert_eq!(last_op(&mut client)["state"], "failed", "{point}");
        let assets = client.must("asset_list", json!({ "available": false }));
        assert_eq!(assets["assets"], json!([]), "{tool} at {point}");
        assert_eq!(refused(&mut client, "image_inspect", json!({ "image": "tiny" })).code, "image_not_found");
        for place in ["assets", "images", "scratch"] {
            let left = fs::read_dir(world.daemon.state().join(place)).map_or(0, Iterator::count);
            assert_eq!(left, 0, "{tool} at {point} leaves something in {place}");
        }
        world.assert_in_order();
    }
    let mut client = world.client();
    client.to_the_end("image_create", image, SOON);
    let kernel = client.to_the_end("asset_download", kernel, SOON);
    assert_eq!(kernel["verified"], "signature", "{kernel}");
    assert_eq!(client.to_the_end("asset_verify", json!({}), SOON)["ok"], true);
    world.assert_in_order();
}
