//! Images that leave this host come back as they were; those of a machine have nothing that is only that machine's.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use nexus_schema::link::ImageConfig;
use nexus_schema::{Arch, ErrorCode, Timestamp};
use serde_json::json;

use super::faithful::populate;
use super::listing::{Facts, assert_same, facts};
use super::registry::{Registry, pull_by};
use super::*;
use crate::config::Environment;
use crate::image::oci::{About, Access, Exported, Form, Keychain, Remote, export};
use crate::os::mounted::Mounted;

/// An image of a root filesystem with every awkward case.
async fn awkward(base: &Path) -> Built {
    let root = base.join("root");
    fs::create_dir(&root).unwrap();
    populate(&root);
    // With room for what a machine writes.
    let additions = Additions { size: Some(ByteSize::bytes(128 << 20)), ..Additions::default() };
    let (into, meta, progress) = (base.join("image"), meta(InitMode::Agent), Progress::default());
    build_with(Source::Directory(root), &into, &meta, &additions, Limits::default(), &progress).await.unwrap()
}

fn config() -> ImageConfig {
    ImageConfig {
        env: BTreeMap::from([("LANG".into(), "C.UTF-8".into())]),
        working_dir: Some("/srv".into()),
        user: Some("app".into()),
        entrypoint: vec!["/entry".into()],
        cmd: vec!["--all".into()],
    }
}

fn packed(image: &Built, scratch: &Path) -> Exported {
    fs::create_dir(scratch).unwrap();
    let config = config();
    let about = About {
        name: "prepared",
        config: Some(&config),
        arch: Arch::HOST,
        created: Timestamp::from_millis(0),
    };
    export(&image.path, &about, scratch, &Progress::default()).unwrap()
}

fn mounted(image: &Built) -> Facts {
    facts(Mounted::read_only(&image.path).path())
}

#[tokio::test]
async fn an_archive_makes_the_image_again() {
    let base = tempfile::tempdir().unwrap();
    let image = awkward(base.path()).await;
    let mut bytes = Vec::new();
    for name in ["one", "two"] {
        let exported = packed(&image, &base.path().join(name));
        assert!(exported.notes.is_empty(), "{:?}", exported.notes);
        let path = base.path().join(format!("{name}.tar"));
        let file = fs::File::create_new(&path).unwrap();
        let length = exported.write_archive(file, &path, &Progress::default()).unwrap();
        assert_eq!(length, fs::metadata(&path).unwrap().len());
        bytes.push(fs::read(&path).unwrap());
    }
    assert!(bytes[0] == bytes[1], "the same image makes the same bytes");
    let path = base.path().join("one.tar");
    for (name, source) in [
        (
            "docker",
            Source::Saved { path: path.clone(), form: Form::Docker, name: Some("prepared:latest".into()) },
        ),
        ("layout", Source::Saved { path: path.clone(), form: Form::Layout, name: Some("latest".into()) }),
        ("detected", Source::detect(&path).unwrap()),
    ] {
        let again = make(source, &base.path().join(name)).await.unwrap();
        assert_eq!(again.config, Some(config()), "{name}");
        assert_eq!((again.distro, again.init_system), (image.distro.clone(), image.init_system), "{name}");
        assert_same(&mounted(&Built { path: again.path, ..image.clone() }), &mounted(&image));
    }
}

#[tokio::test]
async fn a_cancelled_export_ends_soon() {
    let base = tempfile::tempdir().unwrap();
    let image = awkward(base.path()).await;
    let token = tokio_util::sync::CancellationToken::new();
    token.cancel();
    let about = About { name: "a", config: None, arch: Arch::HOST, created: Timestamp::from_millis(0) };
    let error = export(&image.path, &about, base.path(), &Progress::new(token)).unwrap_err();
    assert_eq!(error.code(), ErrorCode::Cancelled, "{error}");
}

#[tokio::test]
async fn a_name_that_would_hide_files_is_refused() {
    let base = tempfile::tempdir().unwrap();
    let root = base.path().join("root");
    fs::create_dir(&root).unwrap();
    fs::write(root.join(".wh.etc"), "").unwrap();
    let image = make(Source::Directory(root), &base.path().join("image")).await.unwrap();
    let about = About { name: "a", config: None, arch: Arch::HOST, created: Timestamp::from_millis(0) };
    let error = export(&image.path, &about, base.path(), &Progress::default()).unwrap_err();
    assert!(error.to_string().contains(".wh."), "{error}");
}

#[tokio::test]
async fn what_is_a_machines_own_is_not_in_an_image_of_it() {
    const SECRET: &[u8] = b"only this machine may know this, and nobody may find it in free blocks";
    let base = tempfile::tempdir().unwrap();
    let image = awkward(base.path()).await;
    let drive = base.path().join("drive.ext4");
    fs::copy(&image.path, &drive).unwrap();
    fs::set_permissions(&drive, fs::Permissions::from_mode(0o600)).unwrap();
    let machine = Mounted::writable(&drive);
    let own = [
        "etc/NetworkManager/system-connections/home.nmconnection",
        "etc/dropbear/dropbear_ed25519_host_key",
        "etc/ssh/ssh_host_ed25519_key",
        "etc/ssh/ssh_host_ed25519_key.pub",
        "run/nexus/token",
        "tmp/build/output",
        "var/lib/NetworkManager/secret_key",
        "var/lib/dbus/machine-id",
        "var/lib/dhcp/dhclient.eth0.leases",
        "var/lib/systemd/random-seed",
    ];
    let kept = ["etc/ssh/sshd_config", "var/log/app.log", "srv/data"];
    for path in own.iter().chain(&kept).chain(&["etc/machine-id", "srv/deleted"]) {
        let path = machine.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let is_kept = kept.iter().any(|kept| machine.path().join(kept) == path);
        fs::write(path, if is_kept { &b"kept"[..] } else { SECRET }).unwrap();
    }
    fs::remove_file(machine.path().join("srv/deleted")).unwrap();
    fs::hard_link(machine.path().join("tmp/build/output"), machine.path().join("srv/output")).unwrap();
    fs::write(machine.path().join("srv/output"), "linked").unwrap();
    let mut expected = facts(machine.path());
    drop(machine);

    let made = make(Source::Filesystem(drive), &base.path().join("prepared")).await.unwrap();
    assert_eq!(made.distro.as_deref(), Some("debian-12"));
    let prepared = Mounted::read_only(&made.path);
    let at = |path: &str| prepared.path().join(path);
    for path in own {
        assert!(!at(path).exists(), "{path}");
    }
    assert!(at("run").is_dir() && at("tmp").is_dir());
    assert_eq!(fs::read(at("etc/machine-id")).unwrap(), b"");
    assert_eq!(fs::read(at("srv/output")).unwrap(), b"linked");
    for path in kept {
        assert_eq!(fs::read(at(path)).unwrap(), b"kept", "{path}");
    }
    // All the rest is as it was.
    let mut is = facts(prepared.path());
    for facts in [&mut is, &mut expected] {
        facts.retain(|path, _| {
            let path = path.strip_prefix(".").unwrap_or(path);
            let gone = own.iter().any(|own| Path::new(own) == path);
            let emptied = ["run", "tmp"].iter().any(|place| path.starts_with(place));
            let changed = ["etc/machine-id", "srv/output"].iter().any(|own| Path::new(own) == path);
            !(gone || emptied || changed)
        });
    }
    assert_same(&is, &expected);
    let bytes = fs::read(&made.path).unwrap();
    assert!(!bytes.windows(SECRET.len()).any(|window| window == SECRET), "a secret is in the image");
}

#[tokio::test]
async fn a_pushed_image_is_pulled_as_it_was() {
    let registry = Registry::start(Some(("me", "secret"))).await;
    let (at, base) = (&registry.address, registry.base.path());
    let image = awkward(base).await;
    let exported = packed(&image, &base.join("packed"));
    let access = |password: &str| {
        let file = base.join(format!("{password}.json"));
        let auth = data_encoding::BASE64.encode(format!("me:{password}").as_bytes());
        fs::write(&file, json!({ "auths": { at: { "auth": auth } } }).to_string()).unwrap();
        Access { keychain: Keychain::new(Some(file), Environment::default()), ..Access::default() }
    };
    let name = format!("{at}/team/prepared:1");
    let push = async |access: &Access| {
        Remote::parse_to_push(&name, access).unwrap().push(&exported, &Progress::default()).await
    };
    let error = push(&access("wrong")).await.unwrap_err();
    assert!(!error.to_string().contains("wrong"), "{error}");
    let access = access("secret");
    let pushed = push(&access).await.unwrap();
    assert!(pushed.sent > 10_000, "{pushed:?}");
    assert_eq!(pushed.reference, format!("{name}@{}", exported.digest()));
    // What is there is not sent again.
    let again = push(&access).await.unwrap();
    assert_eq!((again.sent, &again.digest), (0, &pushed.digest));
    for (into, reference) in
        [("by-tag", name.clone()), ("by-digest", format!("{at}/team/prepared@{}", pushed.digest))]
    {
        let pulled = pull_by(&reference, &access, &base.join(into)).await.unwrap();
        assert_eq!(pulled.config, Some(config()));
        assert_same(&mounted(&pulled), &mounted(&image));
    }
    let to_digest = Remote::parse_to_push(&format!("{at}/team/prepared@{}", pushed.digest), &access);
    assert_eq!(to_digest.unwrap_err().code(), ErrorCode::InvalidArgument);
}

/// Passes connections on to a registry. The first one on which much is sent is cut off.
fn cutting(to: String) -> (String, Arc<AtomicUsize>) {
    const MUCH: usize = 20_000;
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let cuts = Arc::new(AtomicUsize::new(0));
    let counted = cuts.clone();
    std::thread::spawn(move || {
        for mut client in listener.incoming().flatten() {
            let (mut registry, cuts) = (std::net::TcpStream::connect(&to).unwrap(), counted.clone());
            let (mut back, mut answers) = (client.try_clone().unwrap(), registry.try_clone().unwrap());
            std::thread::spawn(move || {
                std::io::copy(&mut answers, &mut back).ok();
                back.shutdown(Shutdown::Both).ok();
            });
            std::thread::spawn(move || {
                let (mut buffer, mut sent) = ([0; 4096], 0);
                while let Ok(read @ 1..) = client.read(&mut buffer) {
                    sent += read;
                    if sent > MUCH && cuts.load(Ordering::SeqCst) == 0 {
                        cuts.fetch_add(1, Ordering::SeqCst);
                        break;
                    }
                    if registry.write_all(&buffer[..read]).is_err() {
                        break;
                    }
                }
                client.shutdown(Shutdown::Both).ok();
                registry.shutdown(Shutdown::Both).ok();
            });
        }
    });
    (address, cuts)
}

#[tokio::test]
async fn a_blob_is_sent_again_after_a_lost_connection() {
    let registry = Registry::start(None).await;
    let base = registry.base.path();
    let image = awkward(base).await;
    let exported = packed(&image, &base.join("packed"));
    let (address, cuts) = cutting(registry.address.clone());
    let access = Access::default();
    let remote = Remote::parse_to_push(&format!("{address}/cut:1"), &access).unwrap();
    remote.push(&exported, &Progress::default()).await.unwrap();
    assert_eq!(cuts.load(Ordering::SeqCst), 1);
    let pulled =
        pull_by(&format!("{}/cut:1", registry.address), &access, &base.join("pulled")).await.unwrap();
    assert_same(&mounted(&pulled), &mounted(&image));
}
