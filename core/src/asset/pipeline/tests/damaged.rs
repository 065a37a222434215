//! Damaged and inconsistent releases.

use super::right::tgz;
use super::*;
use crate::asset::error::SignatureProblem;
use crate::asset::testing::keys::{DAY, NOW, Shape};

async fn fails(scene: &Scene, job: &Job) -> AssetError {
    let error = scene.run(job).await.unwrap_err();
    assert!(scene.parts().is_empty(), "nothing wrong is kept: {:?}", scene.parts());
    error
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_is_found_by_the_checksum() {
    let anvil = Anvil::new(Key::good());
    let at = anvil.packed.len() / 2;
    let mut flipped = anvil.packed.clone();
    flipped[at] ^= 1;
    let mut longer = anvil.packed.clone();
    longer.extend_from_slice(b"more");
    for bad in [flipped, anvil.packed[..at].to_vec(), longer, b"<html>".to_vec(), Vec::new()] {
        let scene = Scene::new();
        anvil.serve(&scene.server);
        scene.server.put(&anvil.xz(), bad.clone());
        let error = fails(&scene, &anvil.job(&scene)).await;
        let AssetError::Checksum { expected, found, .. } = error else { panic!("{error}") };
        assert_eq!((expected, found), (Sha256::of(&anvil.packed), Sha256::of(&bad)));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_unpacks_to_something_else_is_refused() {
    let scene = Scene::new();
    let mut anvil = Anvil::new(Key::good());
    anvil.kernel.push(0);
    // The list has the longer kernel; the compressed file is right.
    anvil.serve(&scene.server);
    let error = fails(&scene, &anvil.job(&scene)).await;
    let AssetError::Checksum { expected, .. } = error else { panic!("{error}") };
    assert_eq!(expected, Sha256::of(&anvil.kernel));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_signed_wrongly_is_refused() {
    let expired = Shape { lifetime: Some(99 * DAY), ..Shape::default() };
    let not_for_signing = Shape { signs: false, ..Shape::default() };
    for (key, manner, reason) in [
        (Key::new(&expired), binary(), "its key has expired"),
        (Key::new(&not_for_signing), binary(), "its key is not meant for signing"),
        (Key::good(), Manner { lifetime: Some(60), ..binary() }, "it has expired"),
        (Key::good(), Manner { made: NOW + DAY, ..binary() }, "made in the future"),
    ] {
        let scene = Scene::new();
        let anvil = Anvil::new(key);
        scene.server.put(&anvil.xz(), anvil.packed.clone());
        anvil.serve_sums(&scene.server, &anvil.sums(), &anvil.sums(), &manner);
        let error = fails(&scene, &anvil.job(&scene)).await;
        let AssetError::Signature { problem: SignatureProblem::NoneGood { reasons, .. }, .. } = error else {
            panic!("{error}")
        };
        assert!(reasons[0].contains(reason), "{reasons:?}");
        assert_eq!(scene.server.count(&anvil.xz()), 0, "the file itself is not asked for");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn another_key_another_text_or_none_is_refused() {
    let scene = Scene::new();
    let anvil = Anvil::new(Key::good());
    anvil.serve(&scene.server);
    let stranger = scene.provider("anvil", json!({ "keys": [Key::good().armored()] }));
    let error = fails(&scene, &scene.job(stranger, Some(VERSION))).await;
    assert!(matches!(&error, AssetError::Signature { .. }), "{error}");

    let keyless = scene.provider("anvil", json!({}));
    let error = fails(&scene, &scene.job(keyless, Some(VERSION))).await;
    assert!(matches!(&error, AssetError::Provider { problem: ProviderProblem::NoKey, .. }), "{error}");

    let other = anvil.sums().replace("another", "changed");
    anvil.serve_sums(&scene.server, &anvil.sums(), &other, &binary());
    let error = fails(&scene, &anvil.job(&scene)).await;
    assert!(matches!(&error, AssetError::Signature { .. }), "{error}");

    scene.server.put(&anvil.path("SHA256SUMS.asc"), "no signature");
    let error = fails(&scene, &anvil.job(&scene)).await;
    assert!(matches!(&error, AssetError::Signature { .. }), "{error}");

    let unlisted = format!("{}  something-else\n{0}  more\n", Sha256::of(&anvil.packed));
    anvil.serve_sums(&scene.server, &unlisted, &unlisted, &binary());
    let error = fails(&scene, &anvil.job(&scene)).await;
    assert!(matches!(&error, AssetError::Index { problem: IndexProblem::NotListed(_), .. }), "{error}");
    assert_eq!(scene.server.count(&anvil.xz()), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn too_much_is_refused_before_it_fills_the_disk() {
    let scene = Scene::new();
    let small = |stages: Value| {
        let mut stages = stages;
        stages.as_array_mut().unwrap().push(json!({ "stage": "store" }));
        scene.provider("url", json!({ "mirrors": [], "stages": stages }))
    };
    let given = Values::from([("url".into(), scene.server.url("/f"))]);
    let download = json!({ "stage": "download", "url": "{url}", "max_bytes": 10_000 });

    scene.server.put("/f", body(10_000));
    let job = Job { given: given.clone(), ..scene.job(small(json!([download])), None) };
    let error = fails(&scene, &job).await;
    assert!(matches!(error, AssetError::TooLarge { limit: 10_000, .. }), "{error}");

    scene.server.misbehave("/f", [Fault::Endless(vec![7; 4096])]);
    let error = fails(&scene, &job).await;
    assert!(matches!(error, AssetError::TooLarge { limit: 10_000, .. }), "{error}");

    for (format, compression) in
        [("gzip", Compression::Gzip), ("xz", Compression::Xz), ("zstd", Compression::Zstd)]
    {
        let bomb = pack(&vec![0; 20 << 20], compression);
        assert!(bomb.len() < 1 << 20);
        scene.server.put("/f", bomb);
        let unpack = json!({ "stage": "decompress", "format": format, "max_bytes": 1 << 20 });
        let stages = json!([{ "stage": "download", "url": "{url}" }, unpack]);
        let job = Job { given: given.clone(), ..scene.job(small(stages), None) };
        let error = fails(&scene, &job).await;
        assert!(matches!(error, AssetError::TooLarge { limit: 0x10_0000, .. }), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn files_of_many_blocks_are_held_to_the_same() {
    let scene = Scene::new();
    // 12 MiB in four blocks.
    let plain = body(3 << 20);
    let good = pack_in_blocks(&plain, 3 << 20);
    let job_for = |file: &[u8], max_unpacked: u64, digest: Sha256| {
        scene.server.put("/f", file.to_vec());
        let stages = json!([
            { "stage": "download", "url": "{url}" },
            { "stage": "checksum", "given": true },
            { "stage": "decompress", "format": "xz", "max_bytes": max_unpacked },
            { "stage": "store" },
        ]);
        let provider = scene.provider("url", json!({ "mirrors": [], "stages": stages }));
        let given = Values::from([("url".into(), scene.server.url("/f"))]);
        Job { given, sha256: Some(digest), ..scene.job(provider, None) }
    };
    scene.run(&job_for(&good, 12 << 20, Sha256::of(&good))).await.unwrap();
    assert!(scene.read("main") == plain);
    fs::remove_dir_all(scene.dir.path().join("into")).unwrap();

    let error = fails(&scene, &job_for(&good, (12 << 20) - 1, Sha256::of(&good))).await;
    assert!(matches!(error, AssetError::TooLarge { limit: 0xbf_ffff, .. }), "{error}");

    let mut damaged = good.clone();
    let second = good.len() * 3 / 10;
    damaged[second] ^= 8;
    let error = fails(&scene, &job_for(&damaged, 12 << 20, Sha256::of(&damaged))).await;
    let AssetError::Package { problem: crate::asset::error::PackageProblem::Data(cause), .. } = &error else {
        panic!("{error}")
    };
    assert_eq!(cause.kind(), std::io::ErrorKind::InvalidData, "{cause}");
}

#[tokio::test(flavor = "multi_thread")]
async fn archives_with_traps_are_refused() {
    let arch = std::env::consts::ARCH;
    let at = |name: &str| format!("release-v1.16.1-{arch}/{name}-v1.16.1-{arch}");
    let (program, jailer) = (at("firecracker"), at("jailer"));
    let link = {
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        builder.append_link(&mut header, &program, "/bin/sh").unwrap();
        pack(&builder.into_inner().unwrap(), Compression::Gzip)
    };
    let bomb = tgz(&[(&jailer, b"j"), (&program, &vec![0; 8 << 20])]);
    let path = format!("/m/v1.16.1/firecracker-v1.16.1-{arch}.tgz");
    for (tgz, word) in [
        (tgz(&[(&program, b"x")]), "has no file"),
        (tgz(&[(&jailer, b"j"), (&program, b"x"), (&program, b"y")]), "leaves the tree"),
        (link, "is not a regular file"),
        (
            pack(b"no tar at all, but long enough to be looked at".repeat(100).as_slice(), Compression::Gzip),
            "cannot be read",
        ),
        (bomb, "larger than the"),
    ] {
        let scene = Scene::new();
        scene.server.put(&path, tgz.clone());
        scene.server.put(&format!("{path}.sha256.txt"), Sha256::of(&tgz).to_string());
        let mut stages = serde_json::to_value(&scene.provider("firecracker", json!({})).stages).unwrap();
        stages[2]["max_bytes"] = json!(4 << 20);
        let provider = scene.provider("firecracker", json!({ "stages": stages }));
        let error = fails(&scene, &scene.job(provider, Some("1.16.1"))).await;
        let text = nexus_schema::error::chain(&error);
        assert!(text.contains(word), "{word} in {text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_is_told() {
    let scene = Scene::new();
    let anvil = Anvil::new(Key::good());
    let error = fails(&scene, &anvil.job(&scene)).await;
    assert!(matches!(error, AssetError::Status { status: 404, .. }), "{error}");
    let missing = Job {
        given: Values::from([("path".into(), "/nowhere/kernel".into())]),
        ..scene.job(scene.provider("file", json!({ "mirrors": [] })), None)
    };
    let error = fails(&scene, &missing).await;
    assert!(nexus_schema::error::chain(&error).contains("/nowhere/kernel"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_counts_requests_is_understood() {
    let scene = Scene::new();
    let provider = scene.provider("firecracker", json!({ "api": scene.server.url("") }));
    let path = "/repos/firecracker-microvm/firecracker/releases?per_page=100";
    let soon = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs() + 900;
    let token = crate::config::Secret::new("t");
    for (token, hint) in [(None, "NEXUS_GITHUB_TOKEN"), (Some(&token), "wait, then call again")] {
        for head in [
            format!(
                "403 Forbidden\r\nx-ratelimit-limit: 60\r\nx-ratelimit-remaining: 0\r\nx-ratelimit-reset: {soon}"
            ),
            "429 Too Many\r\nx-ratelimit-limit: 60\r\nx-ratelimit-remaining: 3\r\nretry-after: 880"
                .to_owned(),
        ] {
            scene.server.misbehave(path, [Fault::Head(head)]);
            let wanted = crate::asset::provider::Wanted {
                fetcher: &scene.fetcher,
                token,
                like: None,
                progress: &scene.progress,
            };
            let error = provider.discover(&wanted).await.unwrap_err();
            let AssetError::RateLimited { seconds: Some(seconds), .. } = error else { panic!("{error}") };
            assert!((800..=900).contains(&seconds), "{seconds}");
            assert!(error.hint().unwrap().contains(hint), "{error}");
        }
    }
    // A 403 without rate limit headers is just a refusal.
    scene.server.misbehave(path, [Fault::Status(403)]);
    scene.server.put(path, "[]");
    let wanted = crate::asset::provider::Wanted {
        fetcher: &scene.fetcher,
        token: None,
        like: None,
        progress: &scene.progress,
    };
    let error = provider.discover(&wanted).await.unwrap_err();
    assert!(matches!(error, AssetError::Status { status: 403, .. }), "{error}");
}
