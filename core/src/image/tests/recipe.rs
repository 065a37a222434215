//! OCI and Docker images made for tests.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::tar::Tar;

/// How a layer is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Packed {
    Not,
    Gzip,
    Zstd,
}

/// An image that is being made.
#[derive(Debug, Clone)]
pub(super) struct Recipe {
    /// By digest.
    pub(super) blobs: BTreeMap<String, Vec<u8>>,
    pub(super) layers: Vec<Value>,
    /// The layers unpacked.
    tars: Vec<Vec<u8>>,
    pub(super) config: Value,
}

pub(super) fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", data_encoding::HEXLOWER.encode(&Sha256::digest(bytes)))
}

pub(super) fn pack(bytes: &[u8], packed: Packed) -> Vec<u8> {
    match packed {
        Packed::Not => bytes.to_vec(),
        Packed::Gzip => {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(bytes).unwrap();
            encoder.finish().unwrap()
        }
        Packed::Zstd => zstd::stream::encode_all(bytes, 1).unwrap(),
    }
}

impl Recipe {
    pub(super) fn new() -> Self {
        let architecture = crate::image::oci::architecture();
        let config = json!({ "architecture": architecture, "os": "linux", "config": {},
            "rootfs": { "type": "layers", "diff_ids": [] } });
        Self { blobs: BTreeMap::new(), layers: Vec::new(), tars: Vec::new(), config }
    }

    /// One of a file `/name`.
    pub(super) fn of(name: &str) -> Self {
        Self::new().layer(Tar::default().file(name, name).end(), Packed::Gzip)
    }

    pub(super) fn layer(mut self, tar: Vec<u8>, packed: Packed) -> Self {
        let media_type = match packed {
            Packed::Not => "application/vnd.oci.image.layer.v1.tar",
            Packed::Gzip => "application/vnd.oci.image.layer.v1.tar+gzip",
            Packed::Zstd => "application/vnd.oci.image.layer.v1.tar+zstd",
        };
        let descriptor = self.blob(media_type, pack(&tar, packed));
        self.layers.push(descriptor);
        let diff_ids = self.config["rootfs"]["diff_ids"].as_array_mut().unwrap();
        diff_ids.push(digest(&tar).into());
        self.tars.push(tar);
        self
    }

    pub(super) fn run(mut self, run: Value) -> Self {
        self.config["config"] = run;
        self
    }

    /// Adds a blob; returns its descriptor.
    pub(super) fn blob(&mut self, media_type: &str, bytes: Vec<u8>) -> Value {
        let digest = digest(&bytes);
        let descriptor = json!({ "mediaType": media_type, "digest": digest, "size": bytes.len() });
        self.blobs.insert(digest, bytes);
        descriptor
    }

    pub(super) fn json(&mut self, media_type: &str, document: &Value) -> Value {
        self.blob(media_type, document.to_string().into_bytes())
    }

    /// The manifest; adds its configuration to the blobs.
    pub(super) fn manifest(&mut self) -> Value {
        let config = self.config.clone();
        let config = self.json("application/vnd.oci.image.config.v1+json", &config);
        json!({ "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": config,
            "layers": self.layers })
    }

    /// Adds the manifest to the blobs; returns its descriptor.
    pub(super) fn described(&mut self) -> Value {
        let manifest = self.manifest();
        self.json("application/vnd.oci.image.manifest.v1+json", &manifest)
    }

    /// Writes an OCI layout of this image, without a name.
    pub(super) fn layout(mut self, directory: &Path) {
        let described = self.described();
        self.layout_of(directory, &json!([described]));
    }

    /// Writes an OCI layout with these in its index.
    pub(super) fn layout_of(&self, directory: &Path, manifests: &Value) {
        fs::create_dir_all(directory.join("blobs/sha256")).unwrap();
        fs::write(directory.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        let index = json!({ "schemaVersion": 2, "manifests": manifests });
        fs::write(directory.join("index.json"), index.to_string()).unwrap();
        for (digest, bytes) in &self.blobs {
            let name = digest.strip_prefix("sha256:").unwrap();
            fs::write(directory.join("blobs/sha256").join(name), bytes).unwrap();
        }
    }

    /// The entry of this image in an archive of `docker save`, and its files in the form of older versions: a directory
    /// per layer, with links for equal layers.
    pub(super) fn saved(&self, tags: &[&str], mut tar: Tar) -> (Value, Tar) {
        let config = self.config.to_string();
        let name = format!("{}.json", digest(config.as_bytes()).strip_prefix("sha256:").unwrap());
        tar = tar.file(&name, &config);
        let mut names: Vec<String> = Vec::new();
        for (at, bytes) in self.tars.iter().enumerate() {
            let name = format!("{}{at}/layer.tar", &digest(bytes)[7..20]);
            tar = tar.link(b'5', name.trim_end_matches("layer.tar"), "");
            tar = match self.tars[..at].iter().position(|other| other == bytes) {
                Some(same) => tar.link(b'2', &name, &format!("../{}", names[same])),
                None => tar.entry(b'0', name.as_bytes(), b"", bytes),
            };
            names.push(name);
        }
        (json!({ "Config": name, "RepoTags": tags, "Layers": names }), tar)
    }
}
