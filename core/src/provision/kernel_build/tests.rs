//! Sources of kernels, from a server with the layout of kernel.org.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};

use super::super::wanted::WantedAsset;
use super::*;
use crate::access::Tokens;
use crate::asset::Sha256;
use crate::asset::testing::Server;
use crate::asset::testing::keys::{Key, Manner, Shape};
use crate::config::{AssetConfig, FetchSettings};
use crate::image::oci::Keychain;
use crate::op::Ops;
use crate::os::paths::Paths;
use crate::store::Store;

/// When keys and signatures of these tests were made: long ago, for the store's clock is the host's.
const MADE: u32 = 1_600_000_000;
/// The packed source of the version.
const SOURCE: &[u8] = b"a packed archive";

struct Scene {
    server: Server,
    key: Key,
    dir: tempfile::TempDir,
    provision: Provision,
    progress: Progress,
}

impl Scene {
    async fn new() -> Self {
        let key = Key::new(&Shape { made: MADE, ..Shape::default() });
        let keys = json!([key.armored()]);
        Self::with(key, keys).await
    }

    async fn with(key: Key, keys: Value) -> Self {
        let server = Server::start();
        let dir = tempfile::tempdir().unwrap();
        let row = json!({ "mirrors": [server.url("/pub")], "api": server.url(""), "keys": keys });
        let providers = BTreeMap::from([("kernel-org".to_owned(), row)]);
        let fetch =
            FetchSettings { retries: 1, backoff: Duration::from_millis(5), ..FetchSettings::default() };
        let assets = AssetConfig { providers, fetch, ..AssetConfig::default() };
        let paths = Paths::new(dir.path());
        for directory in [paths.assets(), paths.scratch(), paths.downloads(), paths.kernels()] {
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
        let scene = Self { server, key, dir, provision, progress: Progress::default() };
        scene.serve(&["6.12.48", "6.12.3", "6.17.7", "6.13"]);
        scene
    }

    /// Serves sources, and the list of the current ones.
    fn serve(&self, versions: &[&str]) {
        let names = |version: &&str| {
            ["ChangeLog-V", "linux-V.tar.gz", "linux-V.tar.xz", "patch-V.xz"]
                .map(|name| name.replace('V', version))
        };
        let line = |name: String| {
            let digest = Sha256::of(if name.ends_with(".tar.xz") { SOURCE } else { name.as_bytes() });
            format!("{digest}  {name}\n")
        };
        let sums: String = versions.iter().flat_map(names).map(line).collect();
        let manner = Manner { made: MADE + 100, ..Manner::default() };
        self.server.put("/pub/v6.x/sha256sums.asc", self.key.sign_so(&sums, manner));
        for version in versions {
            self.server.put(&Self::path(version), SOURCE);
        }
        let release =
            |version: &str, moniker: &str| json!({ "version": version, "moniker": moniker, "iseol": false });
        let releases = [
            release("6.18-rc3", "mainline"),
            release("6.17.7", "stable"),
            release("6.12.48", "longterm"),
            release("next-20261030", "linux-next"),
        ];
        let list = json!({ "latest_stable": { "version": "6.17.7" }, "releases": releases });
        self.server.put("/releases.json", list.to_string());
    }

    fn path(version: &str) -> String {
        format!("/pub/v6.x/linux-{version}.tar.xz")
    }

    async fn check(&self, version: Option<&str>) -> Vec<KernelSource> {
        self.provision.kernel_sources(&wanted(version), &self.progress).await.unwrap()
    }
}

fn wanted(version: Option<&str>) -> WantedKernel {
    WantedKernel { version: version.map(str::to_owned), ..WantedKernel::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_says_which_sources_have_a_version_and_downloads_none() {
    let scene = Scene::new().await;
    for (asked, version, newer) in [
        (None, "6.17.7", None),
        (Some("6.12"), "6.12.48", None),
        (Some("v6.12.48"), "6.12.48", None),
        // Not on the list of current releases any more, but there, and signed.
        (Some("6.12.3"), "6.12.3", Some("6.12.48")),
        (Some("6.13"), "6.13", None),
    ] {
        let sources = scene.check(asked).await;
        let expected = KernelSource {
            provider: "kernel-org".into(),
            version: Some(version.into()),
            origin: Some(scene.server.url(&Scene::path(version))),
            verified: Some(Verified::Signature),
            newer: newer.map(str::to_owned),
            problem: None,
        };
        assert_eq!(sources[0], expected, "{asked:?}");
        // This host has no package archive.
        assert_eq!((sources[1].provider.as_str(), &sources[1].version), ("debian", &None));
        assert!(sources[1].problem.as_ref().is_some_and(|p| p.contains("package archive")), "{sources:?}");
        assert_eq!(scene.server.count(&Scene::path(version)), 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn versions_that_no_source_has_are_said_to_be_missing() {
    let scene = Scene::new().await;
    for version in ["6.12.99", "6.14", "5.10.1", "7.0"] {
        let sources = scene.check(Some(version)).await;
        let of = sources.iter().find(|source| source.provider == "kernel-org").unwrap();
        assert_eq!(of.problem.as_deref(), Some(&*format!("it has no version {version}")), "{sources:?}");
        let error = scene.provision.build_kernel(wanted(Some(version)), "uid:0", &scene.progress).await;
        let error = error.unwrap_err();
        assert_eq!(error.code, ErrorCode::AssetNotFound);
        assert!(error.message.contains(version) && error.message.contains("kernel-org"), "{error}");
    }
    let error = scene.provision.kernel_sources(&wanted(Some("../6")), &scene.progress).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::InvalidArgument, "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_nobody_vouches_for_is_not_used() {
    let key = || Key::new(&Shape { made: MADE, ..Shape::default() });
    for (keys, said) in
        [(json!([]), "no key to check signatures with"), (json!([key().armored()]), "no trusted key made it")]
    {
        let scene = Scene::with(key(), keys).await;
        let sources = scene.check(Some("6.12")).await;
        assert!(sources.iter().all(|source| source.problem.is_some()), "{sources:?}");
        let of = sources.iter().find(|source| source.provider == "kernel-org").unwrap();
        assert!(of.problem.as_ref().is_some_and(|problem| problem.contains(said)), "{of:?}");
        scene.provision.build_kernel(wanted(Some("6.12")), "uid:0", &scene.progress).await.unwrap_err();
        assert_eq!(scene.server.count(&Scene::path("6.12.48")), 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_source_is_downloaded_as_its_list_says_and_refused_otherwise() {
    let scene = Scene::new().await;
    let work = Work::new(scene.dir.path().to_owned(), "6.12.48");
    let candidates = scene.provision.candidates(&wanted(Some("6.12")), &scene.progress).await.unwrap();
    let place = candidates[0].place.as_ref().unwrap();
    scene.provision.fetch_source(place, &work, &scene.progress).await.unwrap();
    assert_eq!(fs_err::read(work.source()).unwrap(), SOURCE);

    scene.server.put(&Scene::path("6.12.48"), "something else");
    fs_err::remove_file(work.source()).unwrap();
    let error = scene.provision.fetch_source(place, &work, &scene.progress).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::VerificationFailed, "{error}");
    assert!(!work.source().exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn providers_of_sources_have_no_assets_and_others_have_no_sources() {
    let scene = Scene::new().await;
    let wanted_asset = WantedAsset {
        kind: AssetKind::Kernel,
        from: Some("kernel-org".into()),
        version: Some("6.12.48".into()),
        name: None,
        sha256: None,
        unverified: true,
    };
    let error = scene.provision.download(wanted_asset, "uid:0", &scene.progress).await.unwrap_err();
    assert!(error.to_string().contains("has sources of kernels"), "{error}");
    for (from, said) in [("alpine", "has no sources of kernels"), ("kernel-ork", "kernel-org")] {
        let wanted = WantedKernel { from: Some(from.into()), ..wanted(None) };
        let error = scene.provision.kernel_sources(&wanted, &scene.progress).await.unwrap_err();
        assert!(error.to_string().contains(said), "{error}");
    }
}
