//! From apt's sources to the files of a kernel, with every way in which the chain can break.

use nexus_schema::Arch;
use nexus_schema::error::chain;
use pgp::crypto::hash::HashAlgorithm;

use super::archive::{Host, Package, SuiteToBe, cloud, kernel_elf};
use crate::asset::KernelFiles;
use crate::asset::debian::ARCH;
use crate::asset::error::SignatureProblem;
use crate::asset::error::{AssetError, IndexProblem};
use crate::asset::stream::{Compression, Sha256};
use crate::asset::testing::keys::{DAY, Key, Manner, NOW, Shape};
use crate::asset::testing::tls::Authority;
use crate::asset::testing::{Fault, Server, arm64_image};
use crate::config::FetchSettings;

fn suite() -> SuiteToBe {
    SuiteToBe::new(vec![Package::kernel(&cloud("6.1.0-9"), "6.1.100-1", false), Package::busybox()])
}

#[tokio::test]
async fn a_kernel_and_a_file_are_fetched() {
    let suite = suite();
    let host = Host::serving(&suite);
    let archive = host.open().await.unwrap();
    assert!(archive.problems().is_empty(), "{:?}", archive.problems());
    let kernels = archive.kernels().await.unwrap();
    assert_eq!(kernels.len(), 1);
    assert_eq!(
        (kernels[0].version.clone(), kernels[0].package_version.as_str()),
        (cloud("6.1.0-9"), "6.1.100-1")
    );
    assert_eq!(kernels[0].sha256, Sha256::of(&suite.packages[0].deb).to_string());

    let into = host.path().join("assets/kernel");
    let kernel = archive.fetch_kernel(None, &into, &host.progress).await.unwrap();
    assert_eq!(std::fs::read(&kernel.vmlinux).unwrap(), kernel_elf(&cloud("6.1.0-9")));
    assert_eq!(kernel, KernelFiles::load(&into).unwrap());
    assert_eq!(kernel.verified, nexus_schema::tools::asset::Verified::Signature);
    let names: Vec<_> = kernel.modules.iter().map(|m| m.file_name().unwrap().to_str().unwrap()).collect();
    assert_eq!(
        names,
        [
            "00-virtio_ring.ko",
            "01-virtio_mmio.ko",
            "02-second_surprise.ko",
            "03-surprise.ko",
            "04-virtio_blk.ko",
            "05-virtio_net.ko",
            "06-vsock.ko",
            "07-vmw_vsock_virtio_transport.ko",
            "08-virtio_rng.ko",
        ]
    );
    let mut left: Vec<_> = std::fs::read_dir(&into).unwrap().map(|e| e.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["kernel.json", "modules", "modules.ext4", "vmlinux"], "nothing half-made is left");

    let busybox = archive
        .fetch_package_file("busybox-static", "./bin/busybox", host.path(), &host.progress)
        .await
        .unwrap();
    assert_eq!(std::fs::read(&busybox.path).unwrap(), b"a busybox");
    assert_eq!(busybox.path, host.path().join("busybox"));
    assert_eq!((busybox.size_bytes, busybox.version.as_deref()), (9, Some("1:1.35.0-4+b1")));
    // The index and the list were fetched only once for all of this.
    assert_eq!((host.server.count(&suite.in_release()), host.server.count(&suite.list_by_hash())), (1, 1));
}

#[tokio::test]
async fn an_archive_with_tls_must_be_trusted() {
    let authority = Authority::new("ours");
    let suite = suite();
    let mut host = Host::of(Server::start_tls(authority.server("127.0.0.1")));
    suite.publish(&host.server, &host.key);
    let refused = host.refused().await;
    assert!(
        refused.contains("https://127.0.0.1") && refused.contains("not issued by a trusted CA"),
        "{refused}"
    );
    assert_eq!(host.server.connections(), 1, "it is not asked again");
    host.trust = authority.trusted();
    let archive = host.open().await.unwrap();
    archive.fetch_kernel(None, &host.path().join("k"), &host.progress).await.unwrap();
}

#[tokio::test]
async fn newer_releases_have_all_below_usr_and_packed_modules() {
    let files: [(&str, &[u8]); 1] = [("./usr/bin/busybox", b"usr")];
    let packages = vec![
        Package::kernel(&cloud("6.12.1+deb13"), "6.12.1-1", true),
        Package::new("busybox-static", "1:1.37", &files, Compression::Zstd),
    ];
    for list in [Compression::Plain, Compression::Gzip, Compression::Zstd, Compression::Xz] {
        let suite = SuiteToBe { list, by_hash: false, ..SuiteToBe::new(packages.clone()) };
        let host = Host::serving(&suite);
        let archive = host.open().await.unwrap();
        let kernel = archive.fetch_kernel(None, &host.path().join("k"), &host.progress).await.unwrap();
        assert_eq!((kernel.version, kernel.modules.len()), (cloud("6.12.1+deb13"), 9));
        let busybox =
            archive.fetch_package_file("busybox-static", "./bin/busybox", host.path(), &host.progress).await;
        assert_eq!(std::fs::read(busybox.unwrap().path).unwrap(), b"usr");
    }
}

#[tokio::test]
async fn a_kernel_of_an_architecture_is_in_that_ones_list() {
    let uname = "6.1.0-9-cloud-arm64";
    let image = arm64_image(b"a kernel");
    let needed = ["virtio_mmio", "virtio_blk", "virtio_net", "vmw_vsock_virtio_transport", "ext4"];
    let builtin = needed.map(|module| format!("kernel/{module}.ko\n")).concat();
    let (boot, list) = (format!("./boot/vmlinuz-{uname}"), format!("./lib/modules/{uname}/modules.builtin"));
    let files = [(boot.as_str(), image.as_slice()), (list.as_str(), builtin.as_bytes())];
    let package = Package::new(&format!("linux-image-{uname}"), "6.1.100-1", &files, Compression::Xz);
    let suite = SuiteToBe { arch: Arch::Aarch64, ..SuiteToBe::new(vec![package]) };
    let host = Host::serving(&suite);
    let archive = host.open_for(Arch::Aarch64).await.unwrap();
    let kernel = archive.fetch_kernel(None, &host.path().join("k"), &host.progress).await.unwrap();
    assert_eq!((kernel.arch, kernel.version.as_str()), (Arch::Aarch64, uname));
    assert_eq!(std::fs::read(&kernel.vmlinux).unwrap(), image);
    let error = host.open_for(Arch::X86_64).await.unwrap().kernels().await.unwrap_err();
    assert!(chain(&error).contains("main/binary-amd64/Packages"), "{error:?}");
}

#[tokio::test]
async fn the_newest_of_all_suites_comes_first() {
    let kernel = |n: &str, version: &str| Package::kernel(&cloud(n), version, false);
    let meta = |name: &str| Package::new(name, "99", &[], Compression::Xz);
    let main = SuiteToBe::new(vec![
        kernel("6.1.0-9", "6.1.100-1"),
        kernel("6.1.0-10", "6.1.101-1"),
        meta(&format!("linux-image-cloud-{ARCH}")),
        meta(&format!("linux-image-6.12-cloud-{ARCH}")),
        meta(&format!("linux-image-6.1.0-10-{ARCH}")),
        meta(&format!("linux-image-6.1.0-10-cloud-{ARCH}-dbg")),
    ]);
    let security = SuiteToBe {
        root: "/debian-security".into(),
        suite: "bookworm-security".into(),
        codename: "bookworm-security".into(),
        packages: vec![kernel("6.1.0-9", "6.1.100-1+deb12u1"), kernel("6.1.0-11", "6.1.102-1")],
        ..SuiteToBe::new(vec![])
    };
    let host = Host::serving(&main);
    security.publish(&host.server, &host.key);
    host.source("/debian-security", "bookworm-security");
    let archive = host.open().await.unwrap();
    let kernels: Vec<_> =
        archive.kernels().await.unwrap().into_iter().map(|k| (k.version, k.package_version)).collect();
    let expected = [("6.1.0-11", "6.1.102-1"), ("6.1.0-10", "6.1.101-1"), ("6.1.0-9", "6.1.100-1+deb12u1")];
    assert_eq!(kernels, expected.map(|(v, p)| (cloud(v), p.to_owned())));

    let fetch = async |version: &str| {
        archive.fetch_kernel(Some(version), &host.path().join("k"), &host.progress).await
    };
    assert_eq!(fetch(&cloud("6.1.0-10")).await.unwrap().version, cloud("6.1.0-10"));
    assert_eq!(fetch("6.1.100-1+deb12u1").await.unwrap().version, cloud("6.1.0-9"));
    assert_eq!(
        fetch(&format!("linux-image-6.1.0-11-cloud-{ARCH}")).await.unwrap().version,
        cloud("6.1.0-11")
    );
    let error = fetch("5.0").await.unwrap_err();
    assert!(matches!(&error, AssetError::NoKernel { version: Some(v) } if v == "5.0"), "{error:?}");

    let source = archive.bootstrap_source().unwrap();
    assert_eq!(
        source.mirrors,
        [
            format!("deb {} bookworm main", host.server.url("/debian")),
            format!("deb {} bookworm-security main", host.server.url("/debian-security")),
        ]
    );
    assert_eq!((source.suite.as_str(), source.distro.as_str()), ("bookworm", "debian-12"));
    assert_eq!(source.keyring, host.path().join("usr/share/keyrings/test.gpg"));
    assert!(source.proxies.reveal().is_empty() && source.credentials.reveal().is_empty());
}

#[tokio::test]
async fn signatures_that_are_not_good_are_refused() {
    let suite = suite();
    let host = Host::serving(&suite);
    let release = suite.release();
    let put = |signed: String| host.server.put(&suite.in_release(), signed);

    let good = host.key.sign(&release);
    put(good.replace("Suite: stable", "Suite: stabel"));
    assert!(host.refused().await.contains("no trusted key made it"));
    put(good[..good.len() / 2].to_owned());
    assert!(host.refused().await.contains("it cannot be read"));
    put(release.clone());
    assert!(host.refused().await.contains("it cannot be read"));
    put(Key::good().sign(&release));
    assert!(host.refused().await.contains("no trusted key made it"));
    host.server.put(&suite.in_release(), vec![b'x'; 2 << 20]);
    assert!(host.refused().await.contains("larger than the 1048576 bytes"));
    put(good);
    host.open().await.unwrap();

    for (shape, why) in [
        (Shape { lifetime: Some(DAY), ..Shape::default() }, "its key has expired"),
        (Shape { signs: false, ..Shape::default() }, "its key is not meant for signing"),
    ] {
        let key = Key::new(&shape);
        host.write("usr/share/keyrings/test.gpg", key.binary());
        put(key.sign(&release));
        let text = host.refused().await;
        assert!(text.contains(why), "{text}");
    }
    // RSA, because with elliptic curves the crate refuses to make weak signatures.
    let mut key = Key::new(&Shape { rsa: true, ..Shape::default() });
    host.write("usr/share/keyrings/test.gpg", key.binary());
    put(key.sign_so(&release, Manner { hash: HashAlgorithm::Sha1, ..Manner::default() }));
    assert!(host.refused().await.contains("its hash is too weak"));
    put(key.sign(&release));
    host.open().await.unwrap();
    key.revoke(NOW - 10);
    host.write("usr/share/keyrings/test.gpg", key.binary());
    assert!(host.refused().await.contains("its key is revoked"));
}

#[tokio::test]
async fn an_index_out_of_date_is_refused_unless_apt_takes_it() {
    let old = SuiteToBe { date: NOW - 30 * DAY, valid_until: Some(NOW - 20 * DAY), ..suite() };
    let host = Host::serving(&old);
    let text = host.refused().await;
    assert!(text.contains("it expired on"), "{text}");
    host.write("etc/apt/apt.conf.d/99frozen", "Acquire::Check-Valid-Until \"false\";\n");
    let archive = host.open().await.unwrap();
    assert!(archive.bootstrap_source().unwrap().mirrors[0].starts_with("deb [check-valid-until=no] http"));

    let host = Host::serving(&SuiteToBe { valid_until: Some(NOW + DAY), ..suite() });
    host.open().await.unwrap();
    let host = Host::serving(&SuiteToBe { date: NOW + 30 * DAY, ..suite() });
    let text = host.refused().await;
    assert!(text.contains("in the future"), "{text}");
    host.write("etc/apt/apt.conf", "Acquire { Check-Date \"no\"; };\n");
    host.open().await.unwrap();
}

#[tokio::test]
async fn lists_that_are_not_what_was_signed_are_refused() {
    let suite = suite();
    let host = Host::serving(&suite);
    let mut damaged = suite.packed_list();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 1;
    host.server.put(&suite.list_by_hash(), damaged);
    // The other place is tried too, but has none.
    let archive = host.open().await.unwrap();
    let error = archive.kernels().await.unwrap_err();
    assert!(matches!(error, AssetError::Status { status: 404, .. }), "{error:?}");
    host.server.put(&suite.list_path(), vec![0; suite.packed_list().len()]);
    let error = archive.kernels().await.unwrap_err();
    assert!(matches!(error, AssetError::Checksum { .. }), "{error:?}");
    host.server.put(&suite.list_path(), vec![0; suite.packed_list().len() + 1]);
    let error = archive.kernels().await.unwrap_err();
    assert!(matches!(error, AssetError::Length { .. }), "{error:?}");
    // Both places are tried, and a good copy in one of them is enough.
    host.server.put(&suite.list_path(), suite.packed_list());
    assert_eq!(archive.kernels().await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_list_that_is_signed_but_broken_is_an_error() {
    let mut suite = suite();
    suite.packages[0].name = "linux-image-6.1.0-9-cloud-x/../../../../x".replace("-x/", &format!("-{ARCH}/"));
    suite.packages[0].name.push_str(&format!("-cloud-{ARCH}"));
    let host = Host::serving(&suite);
    let error = host.open().await.unwrap().kernels().await.unwrap_err();
    assert!(matches!(error, AssetError::Index { problem: IndexProblem::UnsafePath(_), .. }), "{error:?}");
}

#[tokio::test]
async fn packages_that_are_not_what_was_listed_are_refused() {
    let suite = suite();
    let host = Host::serving(&suite);
    let archive = host.open().await.unwrap();
    let into = host.path().join("k");
    let mut damaged = suite.packages[0].deb.clone();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 1;
    host.server.put(&suite.deb_path(0), damaged);
    let error = archive.fetch_kernel(None, &into, &host.progress).await.unwrap_err();
    assert!(matches!(error, AssetError::Checksum { .. }), "{error:?}");
    assert_eq!(std::fs::read_dir(&into).unwrap().count(), 0, "nothing of it is left");

    host.server.remove(&suite.deb_path(0));
    let error = archive.fetch_kernel(None, &into, &host.progress).await.unwrap_err();
    assert!(matches!(error, AssetError::Status { status: 404, .. }), "{error:?}");

    // Interrupted, resumed, redirected: the result is the same.
    host.server.put(&suite.deb_path(0), suite.packages[0].deb.clone());
    host.server.misbehave(&suite.deb_path(0), [Fault::CutAfter(2000)]);
    archive.fetch_kernel(None, &into, &host.progress).await.unwrap();
    host.server.put("/elsewhere", suite.packages[0].deb.clone());
    host.server.misbehave(&suite.deb_path(0), [Fault::Redirect("/elsewhere".into())]);
    archive.fetch_kernel(None, &into, &host.progress).await.unwrap();
    host.server.misbehave(&suite.deb_path(0), [Fault::Status(500)]);
    archive.fetch_kernel(None, &into, &host.progress).await.unwrap();
}

#[tokio::test]
async fn packages_without_what_is_wanted_are_told() {
    let mut suite = suite();
    let uname = cloud("6.1.0-9");
    let files: [(&str, &[u8]); 1] = [("./boot/README", b"x")];
    suite.packages[0] = Package::new(&format!("linux-image-{uname}"), "1", &files, Compression::Xz);
    let host = Host::serving(&suite);
    let archive = host.open().await.unwrap();
    let error = archive.fetch_kernel(None, &host.path().join("k"), &host.progress).await.unwrap_err();
    assert!(chain(&error).contains(&format!("it has no file boot/vmlinuz-{uname}")), "{error:?}");
    let fetch = async |package, member| {
        archive.fetch_package_file(package, member, host.path(), &host.progress).await
    };
    let error = fetch("busybox-static", "./bin/other").await.unwrap_err();
    assert!(chain(&error).contains("it has no file ./bin/other"), "{error:?}");
    assert!(matches!(fetch("nothing", "./x").await, Err(AssetError::NoPackage { .. })));
    assert!(fetch("busybox-static", "").await.is_err());
    assert!(fetch("busybox-static", "../..").await.is_err());
}

#[tokio::test]
async fn third_parties_and_other_suites_are_passed_over() {
    let host = Host::serving(&suite());
    let others = [
        ("/third", "stable", "Third Party Inc.", ""),
        ("/backports", "bookworm-backports", "Debian Backports", ""),
        ("/debian", "experimental", "Debian", "NotAutomatic: yes\n"),
    ];
    for (root, name, origin, more) in others {
        let newer = Package::kernel(&cloud("9.9.9-9"), "9.9.9-9", false);
        let other = SuiteToBe {
            root: root.into(),
            suite: name.into(),
            origin: origin.into(),
            codename: name.into(),
            more: more.into(),
            ..SuiteToBe::new(vec![newer])
        };
        other.publish(&host.server, &host.key);
        host.source(root, name);
    }
    // A source without a server.
    host.source("/gone", "stable");
    let archive = host.open().await.unwrap();
    let kernels = archive.kernels().await.unwrap();
    assert_eq!((kernels.len(), kernels[0].version.clone()), (1, cloud("6.1.0-9")));
    let problems = archive.problems().join("\n");
    assert_eq!(archive.problems().len(), 4, "{problems}");
    for part in [
        "Third Party Inc.",
        "Debian Backports",
        "NotAutomatic",
        "/gone/dists/stable/InRelease: the server answered 404",
    ] {
        assert!(problems.contains(part), "{problems}");
    }
}

#[tokio::test]
async fn a_host_without_usable_sources_is_told_what_to_do() {
    let host = Host::new();
    let text = host.refused().await;
    assert!(text.contains("/debian/dists/bookworm/InRelease: the server answered 404"), "{text}");
    let empty = tempfile::tempdir().unwrap();
    let progress = crate::progress::Progress::default();
    let error = crate::asset::debian::Archive::open(empty.path(), &FetchSettings::default(), &progress)
        .await
        .unwrap_err();
    let text = nexus_schema::ToolError::from(error).to_string();
    for part in ["there are none", "--kernel FILE", "--rootfs DIR", "asset_list"] {
        assert!(text.contains(part), "{text}");
    }
}

#[tokio::test]
async fn a_release_without_sha256_is_refused() {
    let suite = suite();
    let host = Host::serving(&suite);
    host.server.put(&suite.in_release(), host.key.sign(&suite.release().replace("SHA256:", "SHA1:")));
    let text = host.refused().await;
    assert!(text.contains("field SHA256 is missing"), "{text}");
}

#[tokio::test]
async fn mirrors_are_tried_one_after_the_other() {
    let suite = suite();
    let host = Host::new();
    let (second, third) = (Server::start(), Server::start());
    suite.publish(&third, &host.key);
    // The second one has an index of its own, but nothing else.
    second.put(&suite.in_release(), host.key.sign(&suite.release()));
    let list = [&host.server, &second, &third].map(|s| s.url("/debian"));
    let list = format!("{} priority:1\n{}\tpriority:3\n{}\n", list[0], list[1], list[2]);
    host.write("etc/apt/mirrors/list", list);
    host.write(
        "etc/apt/sources.list.d/_debian-bookworm.sources",
        "Types: deb\nURIs: mirror+file:///etc/apt/mirrors/list\nSuites: bookworm\nComponents: main\n\
         Signed-By: /usr/share/keyrings/test.gpg\n",
    );
    let archive = host.open().await.unwrap();
    archive.fetch_kernel(None, &host.path().join("k"), &host.progress).await.unwrap();
    assert_eq!((host.server.requests().len(), second.count(&suite.in_release())), (1, 1));
    assert_eq!((third.count(&suite.in_release()), third.count(&suite.deb_path(0))), (0, 1));
}

#[tokio::test]
async fn apts_proxy_is_used() {
    let suite = suite();
    let host = Host::new();
    let proxy = Server::start();
    let far = SuiteToBe { root: "http://archive.invalid/debian".into(), ..suite };
    far.publish(&proxy, &host.key);
    host.write("etc/apt/apt.conf.d/80proxy", format!("Acquire::http::Proxy \"{}\";", proxy.url("/")));
    let source = "deb [signed-by=/usr/share/keyrings/test.gpg] http://archive.invalid/debian bookworm main\n";
    std::fs::remove_dir_all(host.path().join("etc/apt/sources.list.d")).unwrap();
    host.write("etc/apt/sources.list", source);
    let archive = host.open().await.unwrap();
    assert_eq!(archive.kernels().await.unwrap().len(), 1);
    let told = archive.bootstrap_source().unwrap().proxies;
    assert_eq!(told.reveal(), format!("acquire::http::proxy \"{}\";\n", proxy.url("/")));
}

#[tokio::test]
async fn embedded_keys_become_a_keyring_for_as_long_as_it_is_needed() {
    let suite = suite();
    let host = Host::serving(&suite);
    let armored: Vec<_> = host
        .key
        .armored()
        .lines()
        .map(|l| if l.is_empty() { " .".into() } else { format!(" {l}") })
        .collect();
    let source = format!(
        "Types: deb\nURIs: {}\nSuites: bookworm\nComponents: main\nSigned-By:\n{}\n",
        host.server.url("/debian"),
        armored.join("\n")
    );
    host.write("etc/apt/sources.list.d/_debian-bookworm.sources", source);
    let source = host.open().await.unwrap().bootstrap_source().unwrap();
    assert_eq!(std::fs::read_to_string(&source.keyring).unwrap().trim(), host.key.armored().trim());
    let path = source.keyring.clone();
    let again = source.clone();
    drop(source);
    assert!(path.exists());
    drop(again);
    assert!(!path.exists());
}

#[tokio::test]
async fn ubuntu_has_its_modules_in_a_package_of_their_own() {
    let whole = Package::kernel("6.8.0-40-generic", "6.8.0-40.40", false);
    let archive = tar_parts(&whole);
    let suite = SuiteToBe {
        origin: "Ubuntu".into(),
        codename: "noble".into(),
        more: "Version: 24.04\n".into(),
        ..SuiteToBe::new(archive)
    };
    let host = Host::serving(&suite);
    let archive = host.open().await.unwrap();
    let kernel = archive.fetch_kernel(None, &host.path().join("k"), &host.progress).await.unwrap();
    assert_eq!((kernel.version.as_str(), kernel.modules.len()), ("6.8.0-40-generic", 9));
    assert_eq!(archive.bootstrap_source().unwrap().distro, "ubuntu-24.04");
}

/// A kernel's package cut in two: the image, and the modules.
fn tar_parts(whole: &Package) -> Vec<Package> {
    let dir = tempfile::tempdir().unwrap();
    let deb = dir.path().join("deb");
    std::fs::write(&deb, &whole.deb).unwrap();
    let (mut image, mut modules) = (Vec::new(), Vec::new());
    crate::asset::debian::deb::each_file(&deb, 1 << 30, &mut |_| true, &mut |path, file| {
        let part = if path.starts_with("boot/") { &mut image } else { &mut modules };
        part.push((format!("./{path}"), crate::asset::debian::deb::read_whole(path, file, 1 << 30)?));
        Ok(crate::asset::debian::deb::More::Wanted)
    })
    .unwrap();
    let package = |name: &str, files: &[(String, Vec<u8>)]| {
        let files: Vec<_> = files.iter().map(|(p, b)| (p.as_str(), b.as_slice())).collect();
        Package::new(name, &whole.version, &files, Compression::Zstd)
    };
    vec![package("linux-image-6.8.0-40-generic", &image), package("linux-modules-6.8.0-40-generic", &modules)]
}

#[tokio::test]
async fn what_is_cancelled_ends_and_leaves_nothing_published() {
    let suite = suite();
    let host = Host::serving(&suite);
    let archive = host.open().await.unwrap();
    host.progress.token().cancel();
    let into = host.path().join("k");
    let error = archive.fetch_kernel(None, &into, &host.progress).await.unwrap_err();
    assert!(matches!(error, AssetError::Cancelled), "{error:?}");
    assert!(!into.join("kernel.json").exists());
    assert!(matches!(host.open().await, Err(AssetError::Cancelled)));
}

#[test]
fn problems_of_signatures_say_what_and_why() {
    let error = AssetError::Signature {
        what: "http://x stable InRelease".into(),
        problem: SignatureProblem::NoneGood {
            count: 1,
            reasons: vec!["no trusted key made it (ab12)".into()],
        },
    };
    let expected = "signature of http://x stable InRelease: none of 1 signatures is valid: no trusted key made it (ab12)";
    assert_eq!(chain(&error), expected);
}
