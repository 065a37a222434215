//! Pipelines over servers that serve the real layouts, with really compressed and really signed files, and
//! damaged variants.

mod damaged;
mod interrupted;
mod right;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::*;
use crate::asset::stream::Compression;
use crate::asset::testing::keys::{Key, Manner, NOW_SECONDS};
use crate::asset::testing::{Fault, Server, pack, pack_in_blocks};
use crate::config::FetchSettings;

/// A server, and a directory for what is downloaded from it.
struct Scene {
    server: Server,
    fetcher: Fetcher,
    dir: tempfile::TempDir,
    progress: Progress,
}

impl Scene {
    fn new() -> Self {
        let settings = FetchSettings {
            connect_timeout: Duration::from_secs(20),
            idle_timeout: Duration::from_secs(20),
            deadline: Duration::from_secs(120),
            retries: 2,
            backoff: Duration::from_millis(5),
            ..FetchSettings::default()
        };
        Self {
            server: Server::start(),
            fetcher: Fetcher::new(settings).unwrap(),
            dir: tempfile::tempdir().unwrap(),
            progress: Progress::default(),
        }
    }

    /// A built-in provider with this server as its mirror, and other changes.
    fn provider(&self, name: &str, changes: Value) -> Provider {
        let mut change = json!({ "mirrors": [self.server.url("/m")] });
        for (key, value) in changes.as_object().unwrap() {
            change[key] = value.clone();
        }
        let rows = crate::asset::provider::rows(&BTreeMap::from([(name.to_owned(), change)]));
        Provider::parse(name, &rows[name]).unwrap()
    }

    fn job(&self, provider: Provider, version: Option<&str>) -> Job {
        Job {
            provider: Arc::new(provider),
            version: version.map(str::to_owned),
            given: Values::new(),
            sha256: None,
            name: "main",
            executable: false,
            into: self.dir.path().join("into"),
            parts: self.dir.path().join("parts"),
            now: NOW_SECONDS,
        }
    }

    fn url_job(&self, path: &str, sha256: Option<Sha256>) -> Job {
        let given = Values::from([("url".into(), self.server.url(path))]);
        let url = self.provider("url", json!({ "mirrors": [] }));
        Job { given, sha256, ..self.job(url, None) }
    }

    async fn run(&self, job: &Job) -> Result<Made, AssetError> {
        let made = run(&self.fetcher, job, &self.progress).await;
        if made.is_err() {
            assert!(!job.into.exists(), "a failed run leaves no files");
        }
        made
    }

    fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.dir.path().join("into").join(name)).unwrap()
    }

    fn parts(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.dir.path().join("parts")) else { return Vec::new() };
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

/// A file that does not compress to almost nothing.
fn body(length: u32) -> Vec<u8> {
    (0..length).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect()
}

/// A release of anvil on the server.
struct Anvil {
    kernel: Vec<u8>,
    packed: Vec<u8>,
    key: Key,
    file: String,
}

const VERSION: &str = "6.1.150";

impl Anvil {
    fn new(key: Key) -> Self {
        let kernel = body(200_000);
        let packed = pack(&kernel, Compression::Xz);
        let file = if cfg!(target_arch = "aarch64") { "Image" } else { "vmlinux" };
        Self { kernel, packed, key, file: format!("{file}-{VERSION}-{}", std::env::consts::ARCH) }
    }

    fn path(&self, name: &str) -> String {
        format!("/m/v{VERSION}/{name}")
    }

    fn xz(&self) -> String {
        self.path(&format!("{}.xz", self.file))
    }

    fn sums(&self) -> String {
        let (packed, kernel) = (Sha256::of(&self.packed), Sha256::of(&self.kernel));
        format!("{packed}  {0}.xz\n{kernel}  {0}\n{kernel}  another\n", self.file)
    }

    fn serve(&self, server: &Server) {
        server.put(&self.xz(), self.packed.clone());
        self.serve_sums(server, &self.sums(), &self.sums(), &binary());
    }

    fn serve_sums(&self, server: &Server, sums: &str, signed: &str, manner: &Manner) {
        server.put(&self.path("SHA256SUMS"), sums);
        server.put(&self.path("SHA256SUMS.asc"), self.key.sign_beside(signed, manner));
    }

    fn job(&self, scene: &Scene) -> Job {
        let provider = scene.provider("anvil", json!({ "keys": [self.key.armored()] }));
        scene.job(provider, Some(VERSION))
    }
}

fn binary() -> Manner {
    Manner { typ: pgp::packet::SignatureType::Binary, ..Manner::default() }
}
