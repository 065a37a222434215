//! Assets in a store, from servers that serve the real layouts.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use nexus_schema::tools::asset::{AssetKind, Verified};
use nexus_schema::tools::plan::{PlanAction, PlanStep, PlanThing};
use nexus_schema::tools::provider::ProviderOrigin;
use nexus_schema::{Arch, ErrorCode, Reference, ToolError};
use serde_json::{Value, json};

use super::wanted::WantedAsset;
use super::*;
use crate::access::Caller;
use crate::asset::Compression;
use crate::asset::Sha256;
use crate::asset::provider::{self, Provider};
use crate::asset::testing::{Fault, Server, elf_kernel, pack};
use crate::config::FetchSettings;
use crate::image::oci::Keychain;
use crate::op::Ops;
use crate::progress::Progress;
use crate::store::assets::{self, AssetRecord};
use crate::store::providers::ProviderRow;

const ARCH: &str = std::env::consts::ARCH;

struct Scene {
    server: Arc<Server>,
    dir: tempfile::TempDir,
    provision: Provision,
    progress: Progress,
}

impl Scene {
    async fn new() -> Self {
        let server = Arc::new(Server::start());
        let dir = tempfile::tempdir().unwrap();
        let mirror = json!({ "mirrors": [server.url("/m")] });
        let with_api = json!({ "mirrors": [server.url("/m")], "api": server.url("") });
        let providers = BTreeMap::from([
            ("alpine".to_owned(), mirror.clone()),
            ("firecracker-ci".to_owned(), mirror),
            ("firecracker".to_owned(), with_api.clone()),
            ("anvil".to_owned(), with_api),
        ]);
        let fetch =
            FetchSettings { retries: 1, backoff: Duration::from_millis(5), ..FetchSettings::default() };
        let assets = AssetConfig { providers, fetch, ..AssetConfig::default() };
        let paths = Paths::new(dir.path());
        for directory in [paths.assets(), paths.scratch(), paths.downloads()] {
            fs_err::create_dir_all(directory).unwrap();
        }
        let store = Store::open(&paths.database()).unwrap();
        let ops = Ops::new(store.clone(), crate::event::Events::new());
        let provision = Provision::new(
            store,
            ops,
            paths,
            dir.path().join("no-apt"),
            assets,
            Keychain::default(),
            Tokens::default(),
        );
        provision.sync_providers().await.unwrap();
        Self { server, dir, provision, progress: Progress::default() }
    }

    async fn download(&self, wanted: WantedAsset) -> Result<AssetRecord, ToolError> {
        let made = self.provision.download(wanted, "uid:0", &self.progress).await;
        let scratch = self.provision.paths.scratch();
        assert_eq!(fs_err::read_dir(scratch).unwrap().count(), 0, "nothing is left in scratch");
        made
    }

    /// The number of asset directories, which must equal the number of rows.
    async fn directories(&self) -> usize {
        let rows = self.provision.store.read(assets::all).await.unwrap().len();
        let there = fs_err::read_dir(self.provision.paths.assets()).unwrap().count();
        assert_eq!(rows, there);
        there
    }

    fn serve_alpine(&self, version: &str) -> String {
        let path = format!("{}/alpine-minirootfs-{version}-{ARCH}.tar.gz", branch(version));
        let packed = pack(&rootfs(version), Compression::Gzip);
        let name = path.rsplit('/').next().unwrap();
        self.server.put(&format!("{path}.sha256"), format!("{}  {name}\n", Sha256::of(&packed)));
        self.server.put(&path, packed);
        path
    }

    fn serve_branch(&self, branch: &str, version: &str) {
        let entry = |flavor: &str, arch: &str| {
            format!(
                "-\n  title: \"T\"\n  desc: |\n    version: 9.9.9\n  branch: v{branch}\n  arch: {arch}\n  version: {version}\n  flavor: {flavor}\n  size: 1234\n  sha256: x\n"
            )
        };
        let index = format!("---\n{}{}", entry("alpine-netboot", ARCH), entry("alpine-minirootfs", ARCH));
        self.server.put(&format!("/m/v{branch}/releases/{ARCH}/latest-releases.yaml"), index);
    }

    fn serve_firecracker(&self, version: &str, program: &[u8]) {
        let at = |name: &str| format!("release-v{version}-{ARCH}/{name}-v{version}-{ARCH}");
        let mut builder = tar::Builder::new(Vec::new());
        for (path, bytes) in [
            (format!("{}.debug", at("firecracker")), b"debug".as_slice()),
            (at("firecracker"), program),
            (at("jailer"), &elf_kernel(b"jailer")),
        ] {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o755);
            builder.append_data(&mut header, path, bytes).unwrap();
        }
        let tgz = pack(&builder.into_inner().unwrap(), Compression::Gzip);
        let path = format!("/m/v{version}/firecracker-v{version}-{ARCH}.tgz");
        self.server.put(
            &format!("{path}.sha256.txt"),
            format!("{}  firecracker-v{version}-{ARCH}.tgz\n", Sha256::of(&tgz)),
        );
        self.server.put(&path, tgz);
    }

    fn serve_releases(&self, versions: &[&str]) {
        let release = |version: &&str| {
            json!({
                "tag_name": format!("v{version}"), "draft": false, "prerelease": version.contains("rc"),
                "assets": [{ "name": format!("firecracker-v{version}-{ARCH}.tgz"), "size": 77 }, { "name": "other" }],
            })
        };
        let mut all: Vec<Value> = versions.iter().map(release).collect();
        all.push(json!({ "tag_name": "cli-v9", "assets": [] }));
        all.push(json!({ "tag_name": "v99.0.0", "assets": [{ "name": "elsewhere.tgz" }] }));
        self.server.put(RELEASES, serde_json::to_vec(&all).unwrap());
    }
}

const RELEASES: &str = "/repos/firecracker-microvm/firecracker/releases?per_page=100";

fn branch(version: &str) -> String {
    let branch: Vec<_> = version.split('.').take(2).collect();
    format!("/m/v{}/releases/{ARCH}", branch.join("."))
}

/// A tar archive.
fn rootfs(what: &str) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(what.len() as u64);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1_700_000_000);
    builder.append_data(&mut header, "etc/release", what.as_bytes()).unwrap();
    builder.into_inner().unwrap()
}

fn wanted(kind: AssetKind, from: &str) -> WantedAsset {
    WantedAsset { kind, from: Some(from.into()), version: None, name: None, sha256: None, unverified: false }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_newest_version_that_begins_so_is_taken() {
    let scene = Scene::new().await;
    scene.serve_branch("3.21", "3.21.3");
    scene.serve_branch("3.9", "3.9.6");
    scene.server.put("/m/", "<a href=\"../\">..</a> <a href=\"v3.9/\">v3.9/</a> <a href=\"v3.21/\"> <a href=\"v3.20/\"> <a href=\"edge/\">");
    scene.serve_alpine("3.21.3");
    let (available, problems) = scene.provision.available(Some(AssetKind::Rootfs)).await.unwrap();
    let [of_apt] = &problems[..] else { panic!("told once: {problems:?}") };
    assert!(of_apt.starts_with("debian: ") && of_apt.contains("no-apt"), "{of_apt}");
    let versions: Vec<_> = available.iter().map(|asset| asset.version.as_str()).collect();
    assert_eq!(versions, ["3.21.3", "3.9.6"], "a branch without this architecture is passed over");
    assert_eq!(available[0].size_bytes, Some(1234));

    let asset = scene.download(wanted(AssetKind::Rootfs, "alpine@3.21")).await.unwrap();
    assert_eq!((asset.version.as_str(), asset.name.as_str()), ("3.21.3", "alpine-3-21-3"));
    assert_eq!(asset.verified, Verified::Checksum);
    let file = scene.provision.paths.asset(asset.id).join("rootfs");
    assert_eq!(fs_err::read(file).unwrap(), rootfs("3.21.3"));
    let newest = scene.download(wanted(AssetKind::Rootfs, "alpine")).await.unwrap();
    assert_eq!(newest.id, asset.id, "what is here is not downloaded again");
    // A version that is no longer in any index is still requested; one that is nowhere is not found.
    scene.serve_alpine("3.21.0");
    scene.download(wanted(AssetKind::Rootfs, "alpine@3.21.0")).await.unwrap();
    for gone in ["alpine@3.21.9", "alpine@3.4", "alpine@3.9.7"] {
        let error = scene.download(wanted(AssetKind::Rootfs, gone)).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::AssetNotFound, "{gone}: {error}");
    }
    assert_eq!(scene.directories().await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_would_be_downloaded_is_foreseen_and_left_alone() {
    let scene = Scene::new().await;
    scene.serve_branch("3.21", "3.21.3");
    scene.server.put("/m/", "<a href=\"v3.21/\">");
    let path = scene.serve_alpine("3.21.3");
    let image_plan = async |from: &str| {
        let foreseen = scene.provision.plan_image(from).await.unwrap();
        let step = |step: PlanStep| (step.action, step.what, step.source.unwrap(), step.bytes);
        foreseen.steps.into_iter().map(step).collect::<Vec<_>>()
    };
    let build = |from: &str| (PlanAction::Build, PlanThing::Image, from.to_owned(), None);
    let download = (PlanAction::Download, PlanThing::Rootfs, "alpine@3.21.3".to_owned(), Some(1234));
    assert_eq!(image_plan("rootfs:alpine@3.21").await, [download, build("rootfs:alpine@3.21")]);
    assert_eq!((scene.server.count(&path), scene.directories().await), (0, 0));

    let asset = scene.download(wanted(AssetKind::Rootfs, "alpine@3.21")).await.unwrap();
    let used = (PlanAction::Use, PlanThing::Rootfs, "alpine@3.21.3".to_owned(), Some(asset.size_bytes));
    assert_eq!(image_plan("rootfs:alpine@3.21").await, [used, build("rootfs:alpine@3.21.3")]);
    let nowhere = scene.provision.plan_image("rootfs:alpine@9.9").await.unwrap_err();
    assert_eq!(nowhere.code, ErrorCode::AssetNotFound, "{nowhere}");

    // What a file holds is looked at, too.
    let file = scene.dir.path().join("notes");
    fs_err::write(&file, "no image, and no kernel").unwrap();
    let file = format!("file:{}", file.display());
    let refused = scene.provision.plan_image(&file).await.unwrap_err();
    assert!(refused.message.contains("neither a directory, nor a tar archive"), "{refused}");
    let refused = scene.provision.plan_kernel(&file, Arch::HOST).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::VerificationFailed, "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_downloads_of_one_asset_are_one() {
    let scene = Scene::new().await;
    let path = scene.serve_alpine("3.21.3");
    let want =
        || scene.provision.download(wanted(AssetKind::Rootfs, "alpine@3.21.3"), "uid:0", &scene.progress);
    let (a, b, c) = tokio::join!(want(), want(), want());
    let ids = [a, b, c].map(|made| made.unwrap().id);
    assert!(ids.iter().all(|id| *id == ids[0]));
    assert_eq!(scene.server.count(&path), 1);
    assert_eq!(scene.directories().await, 1);
}

#[tokio::test]
async fn who_waits_for_the_same_download_says_so_and_nobody_else() {
    let scene = Scene::new().await;
    let (first, second) = (Progress::default(), Progress::default());
    let turn = scene.provision.turn("one", &first).await.unwrap();
    assert_eq!(first.watch().borrow().step, "");
    let waiting = scene.provision.turn("one", &second);
    tokio::pin!(waiting);
    assert!(futures::poll!(waiting.as_mut()).is_pending());
    assert_eq!(second.watch().borrow().step, "waiting for the same download");
    drop(turn);
    waiting.await.unwrap();
    // Another one does not wait.
    let third = Progress::default();
    scene.provision.turn("other", &third).await.unwrap();
    assert_eq!(third.watch().borrow().step, "");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_name_is_never_two_versions() {
    let scene = Scene::new().await;
    let paths = ["3.21.2", "3.21.3"].map(|version| scene.serve_alpine(version));
    let named =
        |from: &str| WantedAsset { name: Some("mine".parse().unwrap()), ..wanted(AssetKind::Rootfs, from) };
    let (one, other) = tokio::join!(
        scene.provision.download(named("alpine@3.21.2"), "a", &scene.progress),
        scene.provision.download(named("alpine@3.21.3"), "b", &scene.progress)
    );
    let (good, bad) = if one.is_ok() { (one, other) } else { (other, one) };
    let good = good.unwrap();
    assert_eq!(bad.unwrap_err().code, ErrorCode::NameTaken);
    assert_eq!(scene.directories().await, 1);
    // A later caller gets the answer before anything is downloaded.
    let later = if good.version == "3.21.2" { 1 } else { 0 };
    let before = scene.server.count(&paths[later]);
    let error = scene.download(named(["alpine@3.21.2", "alpine@3.21.3"][later])).await.unwrap_err();
    assert_eq!((error.code, scene.server.count(&paths[later])), (ErrorCode::NameTaken, before));
    assert!(error.message.contains(&good.version), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nothing_vouches_for_must_be_asked_for() {
    let scene = Scene::new().await;
    let kernel = elf_kernel(b"Linux version 6.1.102 (x)");
    scene.server.put(&format!("/m/firecracker-ci/v1.15/{ARCH}/vmlinux-6.1.102"), kernel.clone());
    let listing = ["5.10.225", "6.1.102", "6.1.102.config", "6.1.99", "6.1.102-no-acpi"]
        .map(|v| format!("<Contents><Key>firecracker-ci/v1.15/{ARCH}/vmlinux-{v}</Key></Contents>"));
    scene
        .server
        .put(&format!("/m/?prefix=firecracker-ci/v1.15/{ARCH}/vmlinux-&list-type=2"), listing.concat());
    let (available, _) = scene.provision.available(Some(AssetKind::Kernel)).await.unwrap();
    let versions: Vec<_> = available.iter().map(|asset| asset.version.as_str()).collect();
    assert_eq!(versions, ["6.1.102", "6.1.99", "5.10.225"]);
    assert_eq!(available[0].drivers, ["firecracker"]);

    let plain = wanted(AssetKind::Kernel, "firecracker-ci");
    let error = scene.download(plain.clone()).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::VerificationFailed);
    assert!(error.hint.unwrap().contains("unverified"));
    let wrong = WantedAsset { sha256: Some(Sha256::of(b"x")), ..plain.clone() };
    assert_eq!(scene.download(wrong).await.unwrap_err().code, ErrorCode::VerificationFailed);
    assert_eq!(scene.directories().await, 0);
    let asset = scene.download(WantedAsset { unverified: true, ..plain.clone() }).await.unwrap();
    assert_eq!((asset.verified, asset.version.as_str()), (Verified::None, "6.1.102"));
    assert_eq!(scene.provision.kernel_files(asset.id).await.unwrap().version, "6.1.102");

    let url = scene.server.url("/k.xz");
    scene.server.put("/k.xz", pack(&elf_kernel(b"Linux version 6.6.6 (x)"), Compression::Xz));
    let error = scene.download(wanted(AssetKind::Kernel, &url)).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::VerificationFailed);
    let digest = Sha256::of(&elf_kernel(b"Linux version 6.6.6 (x)"));
    let asset = scene
        .download(WantedAsset { sha256: Some(digest), ..wanted(AssetKind::Kernel, &format!("url:{url}")) })
        .await
        .unwrap();
    assert_eq!((asset.verified, asset.version.as_str()), (Verified::Checksum, "6.6.6"));
    assert!(asset.name.as_str().starts_with("url-k-xz-"), "{}", asset.name);
    assert_eq!(asset.sha256, digest.to_string());
    assert!(asset.download_sha256.is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_such_thing_is_refused() {
    let scene = Scene::new().await;
    let file = scene.dir.path().join("file");
    for (kind, bytes) in [
        (AssetKind::Rootfs, Vec::new()),
        (AssetKind::Rootfs, b"<html>not found</html>".repeat(50)),
        (AssetKind::Kernel, rootfs("x")),
        (AssetKind::Vmm, b"#!/bin/sh\n".to_vec()),
        (AssetKind::Vmm, Vec::new()),
    ] {
        fs_err::write(&file, &bytes).unwrap();
        let error = scene.download(wanted(kind, &format!("file:{}", file.display()))).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::VerificationFailed, "{kind:?}: {error}");
    }
    for (from, word) in [
        ("file:relative", "not an absolute path"),
        ("file", "give a URL or a path"),
        ("url:ftp://host.example/x", "not an address"),
        ("nobody", "there is no provider `nobody`"),
        ("firecracker", "of the kind vmm, not rootfs"),
        ("alpine@../../x", "is not a version"),
    ] {
        let error = scene.download(wanted(AssetKind::Rootfs, from)).await.unwrap_err();
        assert!(error.message.contains(word), "{from}: {error}");
    }
    assert_eq!(scene.directories().await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_is_found_again_and_named() {
    let scene = Scene::new().await;
    scene.serve_alpine("3.21.3");
    let asset = scene.download(wanted(AssetKind::Rootfs, "alpine@3.21.3")).await.unwrap();
    let check = scene.provision.verify(&asset, &scene.progress).await.unwrap();
    assert!(check.ok && check.bytes == asset.size_bytes);
    let file = scene.provision.paths.asset(asset.id).join("rootfs");
    let good = fs_err::read(&file).unwrap();
    let mut flipped = good.clone();
    flipped[700] ^= 1;
    for (bytes, word) in [(flipped, "SHA-256"), (good[1..].to_vec(), "bytes instead of")] {
        fs_err::write(&file, bytes).unwrap();
        let check = scene.provision.verify(&asset, &scene.progress).await.unwrap();
        assert!(!check.ok && check.problems[0].contains(word), "{check:?}");
        assert!(check.problems[0].contains("rootfs"), "{check:?}");
    }
    fs_err::remove_file(&file).unwrap();
    assert!(!scene.provision.verify(&asset, &scene.progress).await.unwrap().ok);
    // After removal and a new download it is complete.
    assert!(!scene.provision.remove(&asset, &Caller::owner("uid:0")).await.unwrap());
    let again = scene.download(wanted(AssetKind::Rootfs, "alpine@3.21.3")).await.unwrap();
    assert!(scene.provision.verify(&again, &scene.progress).await.unwrap().ok);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_newest_firecracker_is_used_and_an_old_one_told() {
    let scene = Scene::new().await;
    scene.serve_releases(&["1.16.1", "1.17.0", "1.18.0-rc1", "1.10.0"]);
    for version in ["1.16.1", "1.17.0"] {
        scene.serve_firecracker(version, &elf_kernel(version.as_bytes()));
    }
    let old = WantedAsset { version: Some("v1.10".into()), ..wanted(AssetKind::Vmm, "firecracker") };
    let seen = scene.provision.look_up(old, &scene.progress).await.unwrap();
    assert_eq!((seen.version.as_str(), seen.installed, seen.size_bytes), ("1.10.0", false, Some(77)));
    assert!(seen.unsuitable.unwrap().contains("1.16.1 or newer"));
    let newest =
        scene.provision.look_up(wanted(AssetKind::Vmm, "firecracker"), &scene.progress).await.unwrap();
    assert_eq!((newest.version.as_str(), newest.unsuitable), ("1.17.0", None), "a prerelease is none");
    let error = scene
        .provision
        .look_up(wanted(AssetKind::Vmm, "firecracker@1.15"), &scene.progress)
        .await
        .unwrap_err();
    assert_eq!(error.code, ErrorCode::AssetNotFound);
    assert_eq!(scene.server.count(RELEASES), 2, "asked once, and once more for what was not there");

    let link = scene.provision.paths.programs().join("firecracker");
    let mut made = Vec::new();
    for version in ["1.17.0", "1.16.1"] {
        made.push(scene.download(wanted(AssetKind::Vmm, &format!("firecracker@{version}"))).await.unwrap());
        assert_eq!(fs_err::read(&link).unwrap(), elf_kernel(b"1.17.0"));
    }
    assert!(link.with_file_name("jailer").is_file());
    scene.provision.remove(&made[0], &Caller::owner("uid:0")).await.unwrap();
    assert_eq!(fs_err::read(&link).unwrap(), elf_kernel(b"1.16.1"));
    scene.provision.remove(&made[1], &Caller::owner("uid:0")).await.unwrap();
    assert!(fs_err::symlink_metadata(&link).is_err());
    assert_eq!(scene.directories().await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_is_wrong_harms_no_other() {
    let scene = Scene::new().await;
    let rows: BTreeMap<String, Value> = [
        ("alpine", json!({ "name": "alpine", "kind": "rootfs", "versions": { "from": "list", "versions": ["1.0"] }, "stages": [{ "stage": "teleport" }] })),
        ("ours", json!({ "name": "ours", "kind": "rootfs", "mirrors": [scene.server.url("")], "versions": { "from": "list", "versions": ["1.0"] },
            "stages": [{ "stage": "download", "url": "{mirror}/r" }, { "stage": "checksum", "sha256": Sha256::of(&rootfs("r")).to_string() }, { "stage": "store" }] })),
    ]
    .map(|(name, row)| (name.to_owned(), row))
    .into();
    let row = |(name, spec)| ProviderRow { name, spec, origin: ProviderOrigin::Set };
    let rows: Vec<ProviderRow> = rows.into_iter().map(row).collect();
    scene.provision.store.write(move |tx| crate::store::providers::replace(tx, &rows)).await.unwrap();
    scene.server.put("/r", rootfs("r"));
    let (available, problems) = scene.provision.available(None).await.unwrap();
    assert_eq!(available.len(), 1);
    assert!(problems[0].contains("alpine: stages[0]") && problems[0].contains("`teleport`"), "{problems:?}");
    let error = scene.download(wanted(AssetKind::Rootfs, "alpine")).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::InvalidArgument);
    assert!(error.message.contains("unknown variant `teleport`"), "{error}");
    scene.download(wanted(AssetKind::Rootfs, "ours")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_download_leaves_no_asset() {
    let scene = Scene::new().await;
    let path = scene.serve_alpine("3.21.3");
    scene.server.misbehave(&path, [Fault::StallAfter(50)]);
    let (made, ()) = tokio::join!(
        scene.provision.download(wanted(AssetKind::Rootfs, "alpine@3.21.3"), "uid:0", &scene.progress),
        async {
            // In the middle of the archive: the list with its checksum, which comes first, is longer than that.
            scene.progress.watch().wait_for(|progress| progress.done == Some(50)).await.unwrap();
            // Others who wait for the same are answered at once, too.
            scene.progress.token().cancel();
        }
    );
    assert_eq!(made.unwrap_err().code, ErrorCode::Cancelled);
    assert_eq!(scene.directories().await, 0);
    let again = Progress::default();
    scene.provision.download(wanted(AssetKind::Rootfs, "alpine@3.21.3"), "uid:0", &again).await.unwrap();
    let reference = Reference::Name("alpine-3-21-3".parse().unwrap());
    assert!(scene.provision.store.read(move |db| assets::get(db, &reference)).await.unwrap().is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn images_are_made_of_root_filesystems() {
    let scene = Scene::new().await;
    fs_err::create_dir_all(scene.provision.paths.images()).unwrap();
    scene.serve_branch("3.21", "3.21.3");
    let path = scene.serve_alpine("3.21.3");
    let made = |from: &'static str| scene.provision.source_image(from, "uid:0", &scene.progress);
    let image = made("rootfs:alpine@3.21").await.unwrap();
    assert_eq!(image.source, "rootfs:alpine@3.21.3");
    assert!(image.name.as_str().starts_with("rootfs-alpine-3-21-3-"), "{}", image.name);
    assert!(scene.provision.paths.image(image.id).join(crate::image::ROOTFS).is_file());
    for again in ["rootfs:alpine", "rootfs:alpine@3.21.3", "rootfs:alpine-3-21-3", "rootfs:alpine@v3.21"] {
        assert_eq!(made(again).await.unwrap().id, image.id, "{again}");
    }
    assert_eq!(scene.server.count(&path), 1);
    let name = scene.provision.image_name("rootfs:alpine@3.21").await.unwrap();
    assert_eq!(name.as_str(), "rootfs-alpine-3-21");
    let fresh = scene.provision.create_image(
        "rootfs:alpine@3.21",
        name,
        Default::default(),
        "uid:0",
        &scene.progress,
    );
    assert_ne!(fresh.await.unwrap().id, image.id);
    for (from, code) in [
        ("rootfs:nobody", ErrorCode::AssetNotFound),
        ("rootfs:firecracker", ErrorCode::InvalidArgument),
        ("rootfs:alpine@../x", ErrorCode::InvalidArgument),
    ] {
        assert_eq!(scene.provision.check_image(from).await.unwrap_err().code, code, "{from}");
    }
}

#[test]
fn slugs_are_names() {
    let name = slug("debian-", "6.1.0-40-cloud-amd64", None).unwrap();
    assert_eq!(name.as_str(), "debian-6-1-0-40-cloud-amd64");
    let name = slug("file-", "My Kernel (1).ELF", Some("0123456789abcdef")).unwrap();
    assert_eq!(name.as_str(), "file-my-kernel-1-elf-01234567");
    let name = slug("file-", &"x".repeat(200), Some("0123456789abcdef")).unwrap();
    assert_eq!(name.as_str().len(), 63);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_token_goes_where_the_shipped_or_configured_rows_send_it() {
    let scene = Scene::new().await;
    let provider = |change: Value| {
        let row = provider::row("firecracker", change.as_object().unwrap());
        Provider::parse("firecracker", &row).unwrap()
    };
    let releases =
        |url: &str| json!({ "from": "github_releases", "url": url, "tag": "v{version}", "asset": "a" });
    let configured = scene.server.url("");
    for (change, may) in [
        (json!({}), false),
        (json!({ "api": configured }), true),
        (json!({ "api": "https://elsewhere.example" }), false),
        (json!({ "api": configured, "versions": releases("{api}/repos/a/b/releases") }), true),
        (json!({ "api": configured, "versions": releases("https://elsewhere.example/{api}/") }), false),
        (json!({ "api": configured, "versions": releases("{api}.elsewhere.example/") }), false),
        (json!({ "api": configured, "versions": { "from": "list", "versions": [] } }), false),
    ] {
        assert_eq!(scene.provision.may_have_token(&provider(change.clone())), may, "{change}");
    }
    // As shipped, because nothing is configured.
    let paths = Paths::new(scene.dir.path());
    let bare = Provision::new(
        scene.provision.store.clone(),
        scene.provision.ops.clone(),
        paths,
        "/".into(),
        AssetConfig::default(),
        Keychain::default(),
        Tokens::default(),
    );
    assert!(bare.may_have_token(&provider(json!({}))));
}

#[tokio::test]
async fn a_default_changes_only_when_that_is_asked_for() {
    let scene = Scene::new().await;
    let add = async |kind: AssetKind, provider: &str, version: &str, at: i64| {
        let record = AssetRecord {
            id: crate::store::random_id(),
            name: slug(&format!("{provider}-"), version, None).unwrap(),
            kind,
            provider: provider.into(),
            version: version.into(),
            arch: ARCH.into(),
            sha256: version.into(),
            size_bytes: 1,
            verified: Verified::Signature,
            files: Vec::new(),
            origin: "here".into(),
            download_sha256: None,
            owner: "uid:0".into(),
            installed_at: nexus_schema::Timestamp::from_millis(at),
        };
        let row = record.clone();
        scene.provision.store.write(move |tx| assets::insert(tx, &row)).await.unwrap();
        record
    };
    let meant = async |version: Option<&str>| {
        let version = version.map(str::to_owned);
        scene.provision.installed_debian(version, Arch::HOST).await.unwrap().unwrap().version
    };
    let of_all = async || {
        let all = scene.provision.store.read(assets::all).await.unwrap();
        let name = |asset: Option<&AssetRecord>| asset.unwrap().version.clone();
        (name(meant_kernel(&all, "debian")), name(vmm_in_force(&all, None)))
    };
    add(AssetKind::Kernel, "debian", "6.12.9", 2).await;
    add(AssetKind::Vmm, "firecracker", "1.10.0", 2).await;
    assert_eq!((meant(None).await, of_all().await), ("6.12.9".into(), ("6.12.9".into(), "1.10.0".into())));
    // Versions requested explicitly, older or newer, do not change the default.
    for (at, kernel, vmm) in [(3, "6.1.5", "1.9.0"), (4, "7.0.1", "1.16.1")] {
        add(AssetKind::Kernel, "debian", kernel, at).await;
        add(AssetKind::Vmm, "firecracker", vmm, at).await;
        assert_eq!(meant(Some(kernel)).await, kernel);
        assert_eq!(
            (meant(None).await, of_all().await),
            ("6.12.9".into(), ("6.12.9".into(), "1.10.0".into()))
        );
    }
    // A kernel for VMs of the other architecture is never the default of this host's.
    let same = add(AssetKind::Kernel, "debian", "7.0.2", 5).await;
    let (id, name) = (crate::store::random_id(), "other".parse().unwrap());
    let (arch, installed_at) = (Arch::FOREIGN.as_str().into(), nexus_schema::Timestamp::from_millis(1));
    let other = AssetRecord { id, name, arch, installed_at, ..same };
    scene.provision.store.write(move |tx| assets::insert(tx, &other)).await.unwrap();
    assert_eq!((meant(None).await, of_all().await.0), ("6.12.9".into(), "6.12.9".into()));
    assert!(scene.provision.installed_debian(None, Arch::FOREIGN).await.unwrap().is_some());
    let all = scene.provision.store.read(assets::all).await.unwrap();
    let chosen = all.iter().find(|asset| asset.version == "1.16.1").map(|asset| asset.name.to_string());
    assert_eq!(vmm_in_force(&all, chosen.as_deref()).unwrap().version, "1.16.1");
}

#[tokio::test]
async fn a_panic_of_blocking_work_is_a_bug_and_not_a_shutdown() {
    let work = super::blocking::<()>(|| panic!("words"));
    let error = crate::op::caught("the operation", work).await.unwrap_err();
    assert_eq!((error.code, error.message.contains("words")), (ErrorCode::Internal, true), "{error:?}");
}
