//! What is published is downloaded again, by the provider as it is shipped.

use std::collections::BTreeMap;
use std::sync::Arc;

use nexus_schema::tools::asset::Verified;
use pgp::composed::ArmorOptions;

use super::*;
use crate::asset::fetch::{FetchSettings, Fetcher};
use crate::asset::pipeline::{self, Job};
use crate::asset::provider::{self, Found, Values, Wanted};
use crate::asset::testing::Server;
use crate::asset::testing::keys::{Key, NOW_SECONDS};

/// A directory with kernels, and a key.
struct Scene {
    dir: tempfile::TempDir,
    key: Key,
    progress: Progress,
}

impl Scene {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap(), key: Key::good(), progress: Progress::default() }
    }

    fn signer(&self) -> Signer {
        let armored = self.key.secret.to_armored_string(ArmorOptions::default()).unwrap();
        Signer::of_armor(armored.as_bytes()).unwrap()
    }

    fn mirror(&self) -> PathBuf {
        self.dir.path().join("mirror")
    }

    /// A kernel of that version; different ones have different bytes.
    fn kernel(&self, name: &str, version: &str) -> Kernel {
        let file = self.dir.path().join(name);
        fs::write(&file, body(name)).unwrap();
        Kernel { name: name.parse().unwrap(), version: version.to_owned(), file }
    }

    fn publish(&self, kernels: &[Kernel]) -> Result<Vec<Written>, AssetError> {
        let provider = provider("anvil", json!({}));
        publish(&self.mirror(), &provider, kernels, &self.signer(), NOW_SECONDS, &self.progress)
    }

    /// A server of the directory, as any web server would serve it: what follows a `?` makes no difference.
    fn serve(&self) -> Server {
        let server = Server::start();
        for (path, bytes) in files(&self.mirror(), "") {
            if path.ends_with("/releases") {
                server.put(&format!("{path}?per_page=100"), bytes.clone());
            }
            server.put(&path, bytes);
        }
        server
    }
}

/// More than one block, which does not compress to nothing. Its parts are alike, because packing different ones takes long; each begins with
/// its number, so that none can be in another's place.
fn body(seed: &str) -> Vec<u8> {
    let seed = u32::from(seed.bytes().last().unwrap_or_default());
    let part: Vec<u8> =
        (0..262_144u32).flat_map(|n| (n ^ seed).wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    let mut body = Vec::new();
    for number in 0..9u32 {
        body.extend(number.to_le_bytes());
        body.extend_from_slice(&part);
    }
    assert!(body.len() as u64 > BLOCK);
    body
}

fn provider(name: &str, change: Value) -> Provider {
    let rows = provider::rows(&BTreeMap::from([(name.to_owned(), change)]));
    Provider::parse(name, &rows[name]).unwrap()
}

/// The files below a directory, with their paths.
fn files(directory: &Path, above: &str) -> Vec<(String, Vec<u8>)> {
    let mut all = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let entry = entry.unwrap();
        let path = format!("{above}/{}", entry.file_name().to_str().unwrap());
        match entry.file_type().unwrap().is_dir() {
            true => all.extend(files(&entry.path(), &path)),
            false => all.push((path, fs::read(entry.path()).unwrap())),
        }
    }
    all.sort();
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_published_is_downloaded_by_the_provider() {
    let scene = Scene::new();
    let written = scene.publish(&[scene.kernel("a", "6.12.1"), scene.kernel("b", "6.12.2-own")]).unwrap();
    let arch = std::env::consts::ARCH;
    let file = if arch == "aarch64" { "Image" } else { "vmlinux" };
    assert_eq!(written[0].file, format!("v6.12.1/{file}-6.12.1-{arch}.xz"));
    assert!(scene.mirror().join(PUBLIC_KEY).is_file());

    let server = scene.serve();
    let key = scene.mirror().join(PUBLIC_KEY);
    let row = json!({ "mirrors": [server.url("")], "api": server.url(""), "keys": [key] });
    let anvil = Arc::new(provider("anvil", row));
    let fetcher = Fetcher::new(FetchSettings::default()).unwrap();
    let wanted = Wanted { fetcher: &fetcher, token: None, like: None, progress: &scene.progress };
    let found = anvil.discover(&wanted).await.unwrap().found;
    let expected = [&written[1], &written[0]];
    let expected =
        expected.map(|w| Found { version: w.version.clone(), size_bytes: Some(w.size_bytes) }).to_vec();
    assert_eq!(found, expected);
    for (name, written) in [("a", &written[0]), ("b", &written[1])] {
        let into = scene.dir.path().join(format!("into-{name}"));
        let job = Job {
            provider: anvil.clone(),
            version: Some(written.version.clone()),
            given: Values::new(),
            sha256: None,
            name: "kernel",
            executable: false,
            into: into.clone(),
            parts: scene.dir.path().join("parts"),
            now: NOW_SECONDS,
        };
        let known = pipeline::known(&fetcher, &job, &scene.progress).await.unwrap();
        assert_eq!((known.sha256, known.verified), (Some(written.sha256), Verified::Signature));
        let made = pipeline::run(&fetcher, &job, &scene.progress).await.unwrap();
        assert_eq!((made.verified, made.download), (Verified::Signature, written.sha256));
        assert!(fs::read(into.join("kernel")).unwrap() == body(name), "{name}");
    }
}

#[test]
fn publishing_again_writes_the_same_files_and_keeps_other_versions() {
    let scene = Scene::new();
    scene.publish(&[scene.kernel("a", "6.12.1")]).unwrap();
    let packed = |all: &[(String, Vec<u8>)]| -> Vec<_> {
        all.iter()
            .filter(|(path, _)| path.ends_with(".xz") || path.ends_with("SHA256SUMS"))
            .cloned()
            .collect()
    };
    let before = packed(&files(&scene.mirror(), ""));
    assert_eq!(before.len(), 2);
    scene.publish(&[scene.kernel("a", "6.12.1")]).unwrap();
    assert!(packed(&files(&scene.mirror(), "")) == before, "the same kernel gives the same files");

    scene.publish(&[scene.kernel("b", "6.12.2")]).unwrap();
    let all = files(&scene.mirror(), "");
    let (_, releases) = all.iter().find(|(path, _)| path.ends_with("/releases")).unwrap();
    let releases: Value = serde_json::from_slice(releases).unwrap();
    assert_eq!((&releases[0]["tag_name"], &releases[1]["tag_name"]), (&json!("v6.12.2"), &json!("v6.12.1")));
    assert_eq!(releases.as_array().map(Vec::len), Some(2));
    assert!(before.iter().all(|file| all.contains(file)), "other versions stay");
}

#[test]
fn what_would_be_lost_or_not_be_read_is_refused() {
    let scene = Scene::new();
    let refused = |kernels: &[Kernel]| scene.publish(kernels).unwrap_err().to_string();
    let same = refused(&[scene.kernel("a", "6.12.1"), scene.kernel("b", "6.12.1")]);
    assert!(same.contains("a and b have the same version, 6.12.1"), "{same}");
    let version = refused(&[scene.kernel("a", "../6")]);
    assert!(version.contains("`../6` is not a version"), "{version}");
    assert!(!scene.mirror().exists(), "nothing was written");

    scene.publish(&[scene.kernel("a", "6.12.1")]).unwrap();
    let sums = scene.mirror().join("v6.12.1/SHA256SUMS");
    let more = fs::read_to_string(&sums).unwrap() + &format!("{}  Image-6.12.1-other.xz\n", Sha256::of(b"x"));
    fs::write(&sums, &more).unwrap();
    let lost = refused(&[scene.kernel("a", "6.12.1")]);
    assert!(lost.contains("Image-6.12.1-other.xz, which would be lost"), "{lost}");
    assert_eq!(fs::read_to_string(&sums).unwrap(), more);

    for name in ["firecracker-ci", "alpine", "kernel-org", "file", "debian"] {
        let other = provider(name, json!({}));
        let result = publish(
            &scene.mirror(),
            &other,
            &[scene.kernel("a", "6.12.3")],
            &scene.signer(),
            NOW_SECONDS,
            &scene.progress,
        );
        let error = result.unwrap_err().to_string();
        assert!(error.contains("does not read what this writes"), "{name}: {error}");
    }
}
