//! Kernels of one's own, with the real daemon: published into a directory, served from there, and downloaded by the provider
//! `anvil`.

use std::fs;
use std::path::{Path, PathBuf};

use nexus_tests::client::Client;
use nexus_tests::linux::{self, signing_key};
use nexus_tests::saved::outcome;
use nexus_tests::web::Web;
use pgp::composed::ArmorOptions;
use serde_json::json;

use crate::downloads::digest;
use crate::kills::{kill_at, last_op};
use crate::world::{SOON, World, refused};

/// An ELF file that loads itself, with a text in it.
fn kernel(text: &str) -> Vec<u8> {
    let machine = nexus_schema::Arch::HOST.elf_machine();
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

/// An armored secret key without a passphrase.
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
    let providers = linux::providers(web, keys);
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

/// Failpoints of a build by the host's compiler.
const POINTS: [&str; 2] = ["kernel-source-unpacked", "kernel-compiled"];

#[test]
fn a_build_on_the_host_that_is_cut_off_goes_on_and_is_done_once() {
    let web = Web::start();
    let mut world = trusting(&web, &[linux::serve(&web, "")]);
    let build = json!({ "version": "6.12", "from": "kernel-org", "config": "CONFIG_64BIT=y\n", "name": "mine",
        "wait_s": 45 });
    let check = json!({ "version": "6.12", "from": "kernel-org", "check": true });
    let checked = world.client().to_the_end("kernel_build", check, SOON);
    assert_eq!(checked["ok"], true, "`make setup-test` installs what a build needs: {checked}");
    let installed = json!({ "kind": "kernel", "available": false });
    for point in POINTS {
        let mut client = kill_at(&mut world, point, "kernel_build", &build);
        let op = last_op(&mut client);
        assert_eq!((&op["tool"], &op["state"]), (&json!("kernel_build"), &json!("failed")), "{point}: {op}");
        assert_eq!(client.must("asset_list", installed.clone())["assets"], json!([]), "{point}");
        world.assert_in_order();
        // The source is not downloaded again: now it is another one than its list says.
        web.put(&format!("/pub/v6.x/linux-{}.tar.xz", linux::VERSION), "damaged");
    }

    let mut client = world.client();
    let built = client.to_the_end("kernel_build", build.clone(), SOON);
    assert_eq!((&built["ok"], &built["cached"]), (&json!(true), &json!(false)), "{built}");
    let asset = &built["asset"];
    assert_eq!((&asset["name"], &asset["version"]), (&json!("mine"), &json!(linux::BUILT)), "{built}");
    let log = Path::new(built["log"].as_str().expect("a path"));
    let said = fs::read_to_string(log).expect("the log");
    assert_eq!(said.matches("unpacking Linux").count(), 1, "{said}");
    assert_eq!(said.matches("going on with what an interrupted build left").count(), POINTS.len(), "{said}");
    for name in ["tree", "source.tar.xz", "vmlinux"] {
        assert!(!log.with_file_name(name).exists(), "{name} is left beside {}", log.display());
    }

    let again = client.to_the_end("kernel_build", build, SOON);
    assert_eq!((&again["cached"], &again["asset"]["id"]), (&json!(true), &asset["id"]), "{again}");
    assert_eq!(fs::read_to_string(log).expect("the log"), said, "nothing was done");
    world.assert_in_order();
}

#[test]
fn a_kernel_is_built_in_a_vm_where_a_failed_build_goes_on() {
    let web = Web::start();
    let things = tempfile::tempdir().expect("a directory");
    // Its kernel is made at the second try, once there is a file: a first try fails, and what it left is needed.
    let go = things.path().join("go");
    let recipe =
        format!("\techo tried >> tried\n\ttest -e {}\n\ttest \"$$(wc -l < tried)\" = 2\n", go.display());
    let world = trusting(&web, &[linux::serve(&web, &recipe)]);
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

    // A VM that somebody else made is not used, whatever its name.
    client.must("vm_rename", json!({ "vm": name, "name": "aside" }));
    let rights = json!({ "name": "other", "scopes": ["read", "lifecycle"], "tools": "all" });
    let made = client.must("token_create", rights);
    let secret = made["token"].as_str().expect("a token");
    let mut other = Client::connect_with(&world.daemon.socket(), secret).expect("its holder connects");
    other.to_the_end(
        "vm_create",
        json!({ "name": name, "from": "template:kernel-builder", "start": false }),
        SOON,
    );
    let failure = outcome(&mut client, "kernel_build", build.clone()).expect_err("it is another's");
    assert_eq!(failure.code, "name_taken", "{}", failure.text);
    client.must_confirmed("vm_delete", json!({ "vm": name }));
    client.must("vm_rename", json!({ "vm": "aside", "name": name }));

    fs::write(&go, "").expect("a file is written");
    let built = client.to_the_end("kernel_build", build.clone(), SOON);
    assert_eq!((&built["ok"], &built["cached"]), (&json!(true), &json!(false)), "{built}");
    let asset = &built["asset"];
    assert_eq!((&asset["name"], &asset["version"]), (&json!("mine"), &json!(linux::BUILT)), "{built}");
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
