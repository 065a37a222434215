//! Kills the daemon at every step of a download. At its next start everything listed is complete, partial downloads are gone
//! or resumed, and the same call succeeds.

use std::fs;
use std::io::Write;

use data_encoding::HEXLOWER;
use nexus_tests::client::Client;
use nexus_tests::daemon::Daemon;
use nexus_tests::order::assert_in_order;
use nexus_tests::web::Web;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::kills::{kill_at, kill_daemon_at, last_op};
use crate::world::{SOON, World, refused};

const ARCH: &str = std::env::consts::ARCH;

/// A tar archive with a text and something that does not compress.
pub(crate) fn archive(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, bytes) in entries {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o755);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_700_000_000);
        builder.append_data(&mut header, path, *bytes).expect("an entry fits in memory");
    }
    builder.into_inner().expect("an archive fits in memory")
}

fn noise(mebibytes: u32) -> Vec<u8> {
    let words = mebibytes << 18;
    (0..words)
        .flat_map(|n| (n ^ n << 7).wrapping_mul(2_654_435_761).rotate_left(n % 31).to_le_bytes())
        .collect()
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).expect("packed in memory");
    encoder.finish().expect("packed in memory")
}

pub(crate) fn digest(bytes: &[u8]) -> String {
    HEXLOWER.encode(&Sha256::digest(bytes))
}

/// A server of assets, and a daemon that uses it.
struct Scene {
    web: Web,
    world: World,
}

impl Scene {
    fn new() -> Self {
        let web = Web::start();
        let mirror = json!({ "mirrors": [web.url("/m")] });
        let with_api = json!({ "mirrors": [web.url("/m")], "api": web.url("/api") });
        let providers = json!({ "alpine": mirror, "firecracker": with_api }).to_string();
        let world = World::with(&[("NEXUS_PROVIDERS", &providers), ("NO_PROXY", "127.0.0.1")]);
        Self { web, world }
    }

    /// Serves a root filesystem; returns its path and the digest of its content.
    fn serve_rootfs(&self, version: &str) -> (String, String) {
        let tar = archive(&[
            ("etc/os-release", format!("ID=trial\nVERSION_ID={version}\n").as_bytes()),
            ("data", &noise(8)),
        ]);
        let packed = gzip(&tar);
        let name = format!("alpine-minirootfs-{version}-{ARCH}.tar.gz");
        let branch = version.rsplit_once('.').expect("a version of three parts").0;
        let path = format!("/m/v{branch}/releases/{ARCH}/{name}");
        self.web.put(&format!("{path}.sha256"), format!("{}  {name}\n", digest(&packed)));
        self.web.put(&path, packed);
        (path, digest(&tar))
    }

    /// Serves a VMM: a program that exits at once.
    fn serve_vmm(&self, version: &str) -> String {
        let program = fs::read("/bin/true").expect("there is a program");
        let at = |name: &str| format!("release-v{version}-{ARCH}/{name}-v{version}-{ARCH}");
        let packed = gzip(&archive(&[(&at("firecracker"), &program), (&at("jailer"), &program)]));
        let name = format!("firecracker-v{version}-{ARCH}.tgz");
        let path = format!("/m/v{version}/{name}");
        self.web.put(&format!("{path}.sha256.txt"), format!("{}  {name}\n", digest(&packed)));
        self.web.put(&path, packed);
        path
    }

    fn parts(&self) -> Vec<String> {
        let entries = fs::read_dir(self.world.daemon.state().join("downloads")).expect("the downloads");
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    }
}

/// The names of the installed assets; each is still unchanged.
pub(crate) fn installed(client: &mut Client) -> Vec<String> {
    let checked = client.to_the_end("asset_verify", json!({}), SOON);
    assert_eq!(checked["ok"], true, "{checked}");
    let listed = client.must("asset_list", json!({ "available": false, "limit": 500 }));
    let assets = listed["assets"].as_array().expect("a list");
    assert_eq!(checked["assets"].as_array().map(Vec::len), Some(assets.len()), "{listed} {checked}");
    let name = |asset: &Value| asset["name"].as_str().expect("a name").to_owned();
    let mut names: Vec<String> = assets.iter().map(name).collect();
    names.sort();
    names
}

/// What the same call requests from the server after a kill.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Again {
    /// The missing part.
    Rest,
    /// Only whether anything is missing.
    End,
    /// Everything.
    All,
    /// Nothing, because it is already installed.
    Nothing,
}

#[test]
fn the_proxy_of_the_environment_is_asked_and_not_for_those_it_is_not_for() {
    let (proxy, server) = (Web::start(), Web::start());
    let address = proxy.url("");
    let mut settings = Vec::new();
    for (name, value) in [("http_proxy", address.as_str()), ("no_proxy", "127.0.0.1")] {
        settings.extend([(name.to_owned(), value), (name.to_uppercase(), value)]);
    }
    let settings: Vec<_> = settings.iter().map(|(name, value)| (name.as_str(), *value)).collect();
    let world = World::with(&settings);
    let mut client = world.client();
    let far = "http://files.test/far.tar.gz".to_owned();
    let near = server.url("/near.tar.gz");
    for (url, at, path, name) in
        [(&far, &proxy, far.as_str(), "far"), (&near, &server, "/near.tar.gz", "near")]
    {
        let packed = gzip(&archive(&[("etc/os-release", format!("ID={name}\n").as_bytes())]));
        at.put(path, packed.clone());
        let wanted = json!({ "kind": "rootfs", "from": format!("url:{url}"), "sha256": digest(&packed), "name": name });
        let asset = client.to_the_end("asset_download", wanted, SOON);
        assert_eq!(asset["verified"], "checksum", "{asset}");
        assert_eq!(at.asked(path).len(), 1, "{url}");
    }
    assert!(proxy.asked(&near).is_empty());
    assert_eq!(installed(&mut client), ["far", "near"]);
}

#[test]
fn a_download_that_is_cut_off_goes_on_where_it_was() {
    let mut scene = Scene::new();
    let mut expected = Vec::new();
    for (number, (point, again)) in [
        ("download-piece", Again::Rest),
        ("download-unpacking", Again::Rest),
        ("download-arrived", Again::End),
        ("download-checked", Again::End),
        ("asset-placed", Again::All),
        ("asset-noted", Again::Nothing),
    ]
    .into_iter()
    .enumerate()
    {
        let version = format!("3.21.{number}");
        let (path, sha256) = scene.serve_rootfs(&version);
        let name = format!("alpine-3-21-{number}");
        let wanted = json!({ "kind": "rootfs", "from": format!("alpine@{version}"), "wait_s": 45 });
        let mut client = kill_at(&mut scene.world, point, "asset_download", &wanted);
        assert_eq!(scene.web.asked(&path), [None], "{point}");
        // Everything listed is complete, and nothing else exists.
        if again == Again::Nothing {
            expected.push(name.clone());
        }
        assert_eq!(installed(&mut client), expected, "{point}");
        let op = last_op_of(&mut client, "asset_download");
        assert_eq!(
            (&op["state"], &op["error"]["code"]),
            (&json!("failed"), &json!("shutting_down")),
            "{point}"
        );
        if again != Again::Nothing {
            assert_eq!(
                refused(&mut client, "asset_inspect", json!({ "asset": name })).code,
                "asset_not_found"
            );
        }
        assert_eq!(!scene.parts().is_empty(), matches!(again, Again::Rest | Again::End), "{point}");
        scene.world.assert_in_order();

        let asset = client.to_the_end("asset_download", wanted, SOON);
        assert_eq!((&asset["name"], &asset["sha256"]), (&json!(name), &json!(sha256)), "{point}: {asset}");
        let packed_bytes = packed_bytes(&scene, &version);
        match (again, &scene.web.asked(&path)[1..]) {
            (Again::Rest, [Some(from)]) => assert!(*from > 0 && *from < packed_bytes, "{point}: from {from}"),
            (Again::End, [Some(from)]) => assert_eq!(*from, packed_bytes, "{point}"),
            (Again::All, [None]) | (Again::Nothing, []) => {}
            (again, asked) => panic!("{point}: {again:?}, but it asked for {asked:?}"),
        }
        if again != Again::Nothing {
            expected.push(name);
        }
        assert_eq!(installed(&mut client), expected, "{point}");
        assert!(scene.parts().is_empty(), "{point}: {:?}", scene.parts());
        scene.world.assert_in_order();
    }
}

/// The length of the file served for a version.
fn packed_bytes(scene: &Scene, version: &str) -> u64 {
    let branch = version.rsplit_once('.').expect("a version of three parts").0;
    let path = format!("/m/v{branch}/releases/{ARCH}/alpine-minirootfs-{version}-{ARCH}.tar.gz");
    scene.web.length(&path)
}

/// The newest operation of a tool, once it has ended.
fn last_op_of(client: &mut Client, tool: &str) -> Value {
    last_op(client);
    let ops = client.must("op_list", json!({ "limit": 10 }));
    let found = ops["ops"].as_array().into_iter().flatten().find(|op| op["tool"] == tool).cloned();
    found.unwrap_or_else(|| panic!("no {tool} in {ops}"))
}

#[test]
fn programs_that_are_cut_off_are_linked_when_they_are_whole() {
    let mut scene = Scene::new();
    let link = scene.world.daemon.state().join("bin/firecracker");
    for (number, point) in ["download-unpacking", "asset-placed", "asset-noted"].into_iter().enumerate() {
        let version = format!("1.20.{number}");
        let path = scene.serve_vmm(&version);
        let wanted = json!({ "kind": "vmm", "from": format!("firecracker@{version}"), "make_default": true, "wait_s": 45 });
        let mut client = kill_at(&mut scene.world, point, "asset_download", &wanted);
        let is_there = point == "asset-noted";
        assert_eq!(installed(&mut client).len(), number + usize::from(is_there), "{point}");
        match number {
            0 => assert!(fs::read_link(&link).is_err(), "a program is linked that never was whole"),
            _ => assert!(link.exists(), "{point}: the link leads nowhere"),
        }
        scene.world.assert_in_order();
        let asset = client.to_the_end("asset_download", wanted, SOON);
        let program = fs::canonicalize(&link).expect("the program is linked");
        assert!(
            program.starts_with(fs::canonicalize(asset_directory(&asset)).expect("it is there")),
            "{point}"
        );
        assert_eq!(scene.web.asked(&path).len(), if is_there { 1 } else { 2 }, "{point}");
        assert_eq!(installed(&mut client).len(), number + 1);
        scene.world.assert_in_order();
    }
}

fn asset_directory(asset: &Value) -> std::path::PathBuf {
    let path = std::path::Path::new(asset["path"].as_str().expect("a path"));
    path.parent().expect("a file is in a directory").to_owned()
}

#[test]
fn a_kernel_whose_import_is_cut_off_is_whole_or_gone() {
    let mut daemon = Daemon::start();
    let mut client = daemon.client();
    let before = installed(&mut client);
    let listed = client.must("asset_list", json!({ "kind": "kernel", "available": false }));
    let kernel = fs::read(listed["assets"][0]["path"].as_str().expect("a path")).expect("the kernel is read");
    for (number, point) in ["kernel-placed", "kernel-noted"].into_iter().enumerate() {
        let file = daemon.root().join(format!("kernel-{number}"));
        fs::write(&file, [&kernel[..], &[1; 4][..=number]].concat()).expect("a kernel is written");
        let wanted = json!({ "name": format!("box-{number}"), "from": "busybox", "start": false, "wait_s": 45,
            "kernel": format!("file:{}", file.display()) });
        let mut client = kill_daemon_at(&mut daemon, point, "vm_create", &wanted);
        let there = installed(&mut client).len() - before.len() - number;
        assert_eq!(there, usize::from(point == "kernel-noted"), "{point}");
        assert_eq!(client.must("vm_list", json!({}))["vms"].as_array().map(Vec::len), Some(number));
        assert_in_order(&daemon);
        let vm = client.to_the_end("vm_create", wanted, SOON);
        assert_eq!(vm["state"], "created", "{vm}");
        assert_eq!(installed(&mut client).len(), before.len() + number + 1, "{point}");
        assert_in_order(&daemon);
    }
}
