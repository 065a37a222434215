//! Kernels of one's own, with the real daemon: published into a directory, served from there, and downloaded by the provider
//! `anvil`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use nexus_tests::saved::outcome;
use nexus_tests::web::Web;
use pgp::composed::{ArmorOptions, CleartextSignedMessage, KeyType, SecretKeyParamsBuilder, SignedSecretKey};
use pgp::types::Password;
use rand::thread_rng;
use serde_json::json;

use crate::downloads::digest;
use crate::world::{SOON, World, refused};

const ARCH: &str = std::env::consts::ARCH;

/// An ELF file that loads itself, with a text in it.
fn kernel(text: &str) -> Vec<u8> {
    let machine: u16 = if ARCH == "aarch64" { 183 } else { 62 };
    let mut elf = vec![0; 64 + 56];
    elf[..6].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1]);
    elf[0x10..0x12].copy_from_slice(&2u16.to_le_bytes());
    elf[0x12..0x14].copy_from_slice(&machine.to_le_bytes());
    elf[0x20..0x28].copy_from_slice(&64u64.to_le_bytes());
    elf[0x36..0x38].copy_from_slice(&56u16.to_le_bytes());
    elf[0x38..0x3a].copy_from_slice(&1u16.to_le_bytes());
    elf[64..68].copy_from_slice(&1u32.to_le_bytes());
    let length = (elf.len() + text.len()) as u64;
    elf[64 + 32..64 + 40].copy_from_slice(&length.to_le_bytes());
    elf.extend_from_slice(text.as_bytes());
    elf
}

/// A secret key without a passphrase.
fn signing_key() -> SignedSecretKey {
    let mut params = SecretKeyParamsBuilder::default();
    params.key_type(KeyType::Ed25519Legacy).can_certify(true).can_sign(true);
    params.primary_user_id("Kernels <kernels@host.example>".into());
    params.build().expect("a key").generate(thread_rng()).expect("a key")
}

/// The same, armored.
fn secret_key() -> String {
    signing_key().to_armored_string(ArmorOptions::default()).expect("armor")
}

/// Serves the files below a directory; what follows a `?` makes no difference.
fn serve(web: &Web, directory: &Path, above: &str) {
    for entry in fs::read_dir(directory).expect("a directory").flatten() {
        let path = format!("{above}/{}", entry.file_name().to_string_lossy());
        if entry.path().is_dir() {
            serve(web, &entry.path(), &path);
            continue;
        }
        let bytes = fs::read(entry.path()).expect("a file");
        if path.ends_with("/releases") {
            web.put(&format!("{path}?per_page=100"), bytes.clone());
        }
        web.put(&path, bytes);
    }
}

/// A daemon that knows no servers but this one.
fn world(web: &Web) -> World {
    trusting(web, &[])
}

/// The same, which trusts kernel.org's lists if these keys signed them.
fn trusting(web: &Web, keys: &[String]) -> World {
    let row = json!({ "mirrors": [web.url("/pub")], "api": web.url(""), "keys": keys });
    let providers = json!({ "kernel-org": row });
    let providers = providers.to_string();
    World::with(&[
        ("NEXUS_APT_ROOT", "/nonexistent"),
        ("NEXUS_PROVIDERS", &providers),
        ("NO_PROXY", "127.0.0.1"),
    ])
}

#[test]
fn what_one_daemon_publishes_another_downloads() {
    let web = Web::start();
    let publisher = world(&web);
    let mut client = publisher.client();
    let things = tempfile::tempdir().expect("a directory");
    let path = |name: &str| things.path().join(name).display().to_string();
    let bytes = kernel("Linux version 6.12.1-own (nexus@nexus) ");
    fs::write(path("vmlinux"), &bytes).expect("a file is written");
    fs::write(path("key.asc"), secret_key()).expect("a file is written");
    let imported = json!({ "kind": "kernel", "from": format!("file:{}", path("vmlinux")), "name": "own" });
    client.to_the_end("asset_download", imported, SOON);

    let publish = json!({ "directory": path("mirror"), "key": path("key.asc"), "kernels": ["own"] });
    let published = client.to_the_end("kernel_publish", publish, SOON);
    let kernel = &published["kernels"][0];
    assert_eq!((&kernel["name"], &kernel["version"]), (&json!("own"), &json!("6.12.1-own")), "{published}");
    assert_eq!(published["public_key"], json!(path("mirror/public.asc")));

    serve(&web, &things.path().join("mirror"), "");
    fs::copy(path("mirror/public.asc"), path("trusted.asc")).expect("a file is copied");
    let other = world(&web);
    let mut client = other.client();
    let anvil = json!({ "provider": "anvil", "mirrors": [web.url("")], "api": web.url(""), "keys": [path("trusted.asc")] });
    client.must("provider_set", anvil);
    let check = json!({ "kind": "kernel", "from": "anvil", "check": true });
    assert_eq!(client.to_the_end("asset_download", check, SOON)["version"], "6.12.1-own");
    let made = client.to_the_end("asset_download", json!({ "kind": "kernel", "from": "anvil" }), SOON);
    assert_eq!((&made["verified"], &made["sha256"]), (&json!("signature"), &json!(digest(&bytes))), "{made}");
    // What another key signs is not trusted.
    fs::write(path("other.asc"), secret_key()).expect("a file is written");
    let again = json!({ "directory": path("mirror"), "key": path("other.asc"), "kernels": ["own"] });
    publisher.client().to_the_end("kernel_publish", again, SOON);
    serve(&web, &things.path().join("mirror"), "");
    client.must("asset_remove", json!({ "asset": made["name"] }));
    let failure =
        refused(&mut client, "asset_download", json!({ "kind": "kernel", "from": "anvil", "wait_s": 45 }));
    assert_eq!(failure.code, "verification_failed", "{}", failure.text);
    publisher.assert_in_order();
    other.assert_in_order();
}

#[test]
fn what_cannot_be_published_or_built_is_refused_and_says_why() {
    let web = Web::start();
    let world = world(&web);
    let mut client = world.client();
    let things = tempfile::tempdir().expect("a directory");
    let path = |name: &str| things.path().join(name).display().to_string();
    fs::write(path("key.asc"), "no key").expect("a file is written");
    let publish = |more: serde_json::Value| {
        let mut all = json!({ "directory": path("mirror"), "key": path("key.asc") });
        all.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        all
    };
    for (arguments, code, said) in [
        (publish(json!({})), "asset_not_found", "no kernel was built here"),
        (publish(json!({ "kernels": ["none"] })), "asset_not_found", "there is no asset none"),
        (publish(json!({ "directory": "mirror" })), "invalid_argument", "directory: not an absolute path"),
        (publish(json!({ "key": "key.asc" })), "invalid_argument", "key: not an absolute path"),
    ] {
        let failure = refused(&mut client, "kernel_publish", arguments.clone());
        assert_eq!(failure.code, code, "{arguments}: {}", failure.text);
        assert!(failure.text.contains(said), "{arguments}: {}", failure.text);
    }
    fs::write(path("vmlinux"), kernel("Linux version 6.12.1 (a@b) ")).expect("a file is written");
    let imported = json!({ "kind": "kernel", "from": format!("file:{}", path("vmlinux")), "name": "own" });
    client.to_the_end("asset_download", imported, SOON);
    let failure =
        refused(&mut client, "kernel_publish", publish(json!({ "kernels": ["own"], "wait_s": 45 })));
    assert!(failure.text.contains("not an armored secret key"), "{}", failure.text);
    assert!(!things.path().join("mirror").exists(), "nothing was written");

    let checked = client.to_the_end("kernel_build", json!({ "version": "6.12", "check": true }), SOON);
    assert_eq!(checked["ok"], false, "{checked}");
    let problems = checked["sources"]
        .as_array()
        .expect("sources")
        .iter()
        .map(|source| (source["provider"].as_str().unwrap_or_default(), source["problem"].is_string()));
    assert_eq!(problems.collect::<Vec<_>>(), [("debian", true), ("kernel-org", true)]);
    for (arguments, code, said) in [
        (json!({ "version": "6.12" }), "asset_not_found", "no source of Linux 6.12"),
        (json!({ "arch": "s390x" }), "invalid_argument", "not for s390x"),
        (json!({ "version": "6 12" }), "invalid_argument", "`6 12` is not a version"),
        (json!({ "from": "alpine" }), "invalid_argument", "no sources of kernels"),
        (json!({ "check": true, "make_default": true }), "invalid_argument", "cannot be used together"),
    ] {
        let failure = refused(&mut client, "kernel_build", arguments.clone());
        assert_eq!(failure.code, code, "{arguments}: {}", failure.text);
        assert!(failure.text.contains(said), "{arguments}: {}", failure.text);
    }
    world.assert_in_order();
}

/// A source with the targets of Linux that a build asks for. Its kernel is made at the second try, once there is a file: a first try fails, and
/// what it left is needed.
const MAKEFILE: &str = "\
allnoconfig:
\tcp \"$$KCONFIG_ALLCONFIG\" .config
vmlinux: .config
\techo tried >> tried
\ttest -e GO
\ttest \"$$(wc -l < tried)\" = 2
\techo \"  LD      vmlinux by $$KBUILD_BUILD_USER\"
\t{ echo 'const char banner[] = \"Linux version 6.12.1-test (nexus@nexus) \";'; echo 'void _start(void) { for (;;); }'; } > main.c
\tgcc -static -nostdlib -no-pie -g -o vmlinux main.c
";

/// Serves that source as kernel.org does, signed by a key.
fn serve_source(web: &Web, things: &Path, key: &SignedSecretKey) {
    let inner = things.join("linux-6.12.1");
    fs::create_dir(&inner).expect("a directory");
    let makefile = MAKEFILE.replace("GO", &things.join("go").display().to_string());
    fs::write(inner.join("Makefile"), makefile).expect("a file is written");
    let packed = things.join("packed");
    let tar = Command::new("tar").arg("-cJf").arg(&packed).arg("-C").arg(things).arg("linux-6.12.1").status();
    assert!(tar.expect("tar runs").success(), "tar failed");
    let source = fs::read(&packed).expect("the source");
    let sums = format!("{}  linux-6.12.1.tar.xz\n", digest(&source));
    let signed = CleartextSignedMessage::sign(thread_rng(), &sums, &key.primary_key, &Password::empty());
    let signed = signed.expect("a signature").to_armored_string(ArmorOptions::default()).expect("armor");
    web.put("/pub/v6.x/sha256sums.asc", signed);
    web.put("/pub/v6.x/linux-6.12.1.tar.xz", source);
    let release = json!({ "version": "6.12.1", "moniker": "longterm", "iseol": false });
    let list = json!({ "latest_stable": { "version": "6.12.1" }, "releases": [release] });
    web.put("/releases.json", list.to_string());
}

#[test]
fn a_kernel_is_built_in_a_vm_where_a_failed_build_goes_on() {
    let (web, key) = (Web::start(), signing_key());
    let things = tempfile::tempdir().expect("a directory");
    serve_source(&web, things.path(), &key);
    let public = key.to_public_key().to_armored_string(ArmorOptions::default()).expect("armor");
    let world = trusting(&web, &[public]);
    let mut client = world.client();
    // The template that is used if it is there. Its VMs are processes of this host, with the programs of this host.
    client.must("template_create", json!({ "name": "kernel-builder", "source": world.from }));
    let build = json!({ "version": "6.12", "from": "kernel-org", "config": "CONFIG_64BIT=y\n", "name": "mine",
        "in_vm": true, "wait_s": 45 });

    let failure = outcome(&mut client, "kernel_build", build.clone()).expect_err("there is no such file yet");
    assert_eq!(failure.code, "image_failed", "{}", failure.text);
    assert!(failure.text.contains("compiling the kernel in the VM kernel-"), "{}", failure.text);
    // Its VM stays.
    let vms = client.must("vm_list", json!({}));
    let vm = &vms["vms"][0];
    assert_eq!(vm["state"], "stopped", "{vms}");
    let name = vm["name"].as_str().expect("a name");
    let key = name.strip_prefix("kernel-").unwrap_or_else(|| panic!("another name: {name}"));
    // The disk of this VM is that of the host.
    let place = PathBuf::from(format!("/var/tmp/nexus-kernel-{key}"));
    assert!(place.join("unpacked").exists(), "{}", place.display());

    fs::write(things.path().join("go"), "").expect("a file is written");
    let built = client.to_the_end("kernel_build", build.clone(), SOON);
    assert_eq!((&built["ok"], &built["cached"]), (&json!(true), &json!(false)), "{built}");
    let asset = &built["asset"];
    assert_eq!((&asset["name"], &asset["version"]), (&json!("mine"), &json!("6.12.1-test")), "{built}");
    assert_eq!(asset["verified"], "signature", "{built}");
    let log = fs::read_to_string(built["log"].as_str().expect("a path")).expect("the log");
    assert!(log.contains("LD      vmlinux by nexus"), "{log}");
    assert_eq!(client.must("vm_list", json!({}))["vms"], json!([]), "its VM is deleted");

    let again = client.to_the_end("kernel_build", build, SOON);
    assert_eq!((&again["cached"], &again["asset"]["id"]), (&json!(true), &asset["id"]), "{again}");
    assert_eq!(client.must("vm_list", json!({}))["vms"], json!([]), "there was nothing to do");
    fs::remove_dir_all(place).expect("what the process left on this host");
    world.assert_in_order();
}
