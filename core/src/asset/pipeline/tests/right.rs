//! Correct releases.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_signed_kernel_comes_with_both_checksums() {
    let scene = Scene::new();
    let anvil = Anvil::new(Key::good());
    anvil.serve(&scene.server);
    let made = scene.run(&anvil.job(&scene)).await.unwrap();
    assert_eq!(made.verified, Verified::Signature);
    assert_eq!(made.download, Sha256::of(&anvil.packed));
    assert_eq!(made.origin, scene.server.url(&anvil.xz()));
    let file = AssetFile {
        name: "main".into(),
        sha256: Sha256::of(&anvil.kernel).to_string(),
        size_bytes: anvil.kernel.len() as u64,
    };
    assert_eq!(made.files, [file]);
    assert_eq!(scene.read("main"), anvil.kernel);
    assert!(scene.parts().is_empty(), "{:?}", scene.parts());
    assert_eq!(scene.server.count(&anvil.xz()), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_of_files_and_signatures_of_text_do_too() {
    let scene = Scene::new();
    let anvil = Anvil::new(Key::good());
    scene.server.put(&anvil.xz(), anvil.packed.clone());
    // A text signature covers the lines regardless of their ends.
    anvil.serve_sums(&scene.server, &anvil.sums(), &anvil.sums().replace('\n', "\r\n"), &Manner::default());
    let keyring = scene.dir.path().join("key.gpg");
    fs::write(&keyring, anvil.key.binary()).unwrap();
    let provider = scene.provider("anvil", json!({ "keys": [keyring] }));
    let made = scene.run(&scene.job(provider, Some(VERSION))).await.unwrap();
    assert_eq!(made.verified, Verified::Signature);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_root_filesystem_comes_unpacked() {
    let scene = Scene::new();
    let tar = body(50_000);
    let packed = pack(&tar, Compression::Gzip);
    let arch = std::env::consts::ARCH;
    let path = format!("/m/v3.21/releases/{arch}/alpine-minirootfs-3.21.3-{arch}.tar.gz");
    scene.server.put(&path, packed.clone());
    let sums = format!("{}  alpine-minirootfs-3.21.3-{arch}.tar.gz\n", Sha256::of(&packed));
    scene.server.put(&format!("{path}.sha256"), sums);
    let made = scene.run(&scene.job(scene.provider("alpine", json!({})), Some("3.21.3"))).await.unwrap();
    assert_eq!((made.verified, scene.read("main")), (Verified::Checksum, tar));
}

/// A tar archive of regular files.
pub(super) fn tgz(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, bytes) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, path, *bytes).unwrap();
    }
    pack(&builder.into_inner().unwrap(), Compression::Gzip)
}

#[tokio::test(flavor = "multi_thread")]
async fn of_an_archive_the_release_programs_are_taken_and_nothing_else() {
    use std::os::unix::fs::PermissionsExt;
    let scene = Scene::new();
    let arch = std::env::consts::ARCH;
    let at = |name: &str| format!("release-v1.16.1-{arch}/{name}-v1.16.1-{arch}");
    let (debug, program, jailer) = (format!("{}.debug", at("firecracker")), at("firecracker"), at("jailer"));
    let tgz = tgz(&[
        (&debug, b"debug"),
        (&at("snapshot-editor"), b"x"),
        (&jailer, b"jailer"),
        (&program, b"release"),
    ]);
    let path = format!("/m/v1.16.1/firecracker-v1.16.1-{arch}.tgz");
    scene.server.put(&path, tgz.clone());
    let sums = format!("{}  firecracker-v1.16.1-{arch}.tgz\n", Sha256::of(&tgz));
    scene.server.put(&format!("{path}.sha256.txt"), sums);
    let made = scene.run(&scene.job(scene.provider("firecracker", json!({})), Some("1.16.1"))).await.unwrap();
    let names: Vec<_> = made.files.iter().map(|file| file.name.as_str()).collect();
    assert_eq!(names, ["firecracker", "jailer"]);
    assert_eq!((scene.read("firecracker"), scene.read("jailer")), (b"release".to_vec(), b"jailer".to_vec()));
    let mut there: Vec<_> = fs::read_dir(scene.dir.path().join("into"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    there.sort();
    assert_eq!(there, ["firecracker", "jailer"]);
    let mode = fs::metadata(scene.dir.path().join("into/firecracker")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o755);
}

#[tokio::test(flavor = "multi_thread")]
async fn any_address_will_do_with_a_digest_or_without() {
    for compression in [Compression::Plain, Compression::Xz, Compression::Gzip, Compression::Zstd] {
        let scene = Scene::new();
        let (plain, packed) = (body(1000), pack(&body(1000), compression));
        scene.server.put("/f", packed.clone());
        for (digest, verified) in [
            (None, Verified::None),
            (Some(Sha256::of(&packed)), Verified::Checksum),
            (Some(Sha256::of(&plain)), Verified::Checksum),
        ] {
            let made = scene.run(&scene.url_job("/f", digest)).await.unwrap();
            assert_eq!((made.verified, scene.read("main")), (verified, plain.clone()), "{compression:?}");
            fs::remove_dir_all(scene.dir.path().join("into")).unwrap();
        }
        let error = scene.run(&scene.url_job("/f", Some(Sha256::of(b"x")))).await.unwrap_err();
        assert!(matches!(error, AssetError::Checksum { .. }), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_of_the_host_is_taken_like_a_download() {
    let scene = Scene::new();
    let file = scene.dir.path().join("kernel.zst");
    fs::write(&file, pack(&body(1000), Compression::Zstd)).unwrap();
    let given = Values::from([("path".into(), file.display().to_string())]);
    let job = Job { given, ..scene.job(scene.provider("file", json!({ "mirrors": [] })), None) };
    let made = scene.run(&job).await.unwrap();
    assert_eq!((made.verified, scene.read("main")), (Verified::None, body(1000)));
    assert_eq!(made.origin, file.display().to_string());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_mirror_is_asked_when_one_fails() {
    let scene = Scene::new();
    let anvil = Anvil::new(Key::good());
    anvil.serve(&scene.server);
    let mirrors = [scene.server.url("/gone"), scene.server.url("/m")];
    let provider = scene.provider("anvil", json!({ "keys": [anvil.key.armored()], "mirrors": mirrors }));
    scene.run(&scene.job(provider, Some(VERSION))).await.unwrap();
    assert_eq!(scene.server.count(&format!("/gone/v{VERSION}/SHA256SUMS")), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn redirections_are_followed_without_secrets() {
    let scene = Scene::new();
    let other = Server::start();
    other.put("/list", "[]");
    scene.server.put("/repos/Work-Fort/Anvil/releases?per_page=100", "x");
    let faults = [Fault::Redirect(other.url("/list"))];
    scene.server.misbehave("/repos/Work-Fort/Anvil/releases?per_page=100", faults);
    let provider = scene.provider("anvil", json!({ "api": scene.server.url("") }));
    let token = crate::config::Secret::new("ghs_secret");
    let wanted = crate::asset::provider::Wanted {
        fetcher: &scene.fetcher,
        token: Some(&token),
        like: None,
        progress: &scene.progress,
    };
    assert_eq!(provider.discover(&wanted).await.unwrap().found, []);
    assert_eq!(scene.server.requests()[0].authorization.as_deref(), Some("Bearer ghs_secret"));
    assert_eq!(other.requests()[0].authorization, None, "another host is not told");
    assert!(!format!("{token:?}").contains("ghs"));
}
