//! Turns an image into an OCI image: one layer, a configuration and a manifest. The same image makes the same bytes.

mod archive;
mod layer;

use std::path::{Path, PathBuf};

use nexus_schema::link::ImageConfig;
use nexus_schema::{Arch, Timestamp};
use serde_json::{Value, json};

use super::digest::Digest;
use super::document::Blob;
use crate::image::ImageError;
use crate::progress::Progress;

pub(super) const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG_TYPE: &str = "application/vnd.oci.image.config.v1+json";
const LAYER_TYPE: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// What is said of an image besides its files.
#[derive(Debug)]
pub(crate) struct About<'a> {
    /// Its name.
    pub(crate) name: &'a str,
    /// How it should be run.
    pub(crate) config: Option<&'a ImageConfig>,
    /// The architecture of its programs.
    pub(crate) arch: Arch,
    /// When it was made.
    pub(crate) created: Timestamp,
}

/// An image in the form of OCI. Its layer is a file.
#[derive(Debug)]
pub(crate) struct Exported {
    name: String,
    arch: Arch,
    pub(super) layer: Blob,
    pub(super) layer_file: PathBuf,
    pub(super) config: Vec<u8>,
    pub(super) manifest: Vec<u8>,
    /// What was left out, and why.
    pub(crate) notes: Vec<String>,
}

impl Exported {
    /// The digest of the manifest, by which the image can be named.
    pub(crate) fn digest(&self) -> Digest {
        Digest::of(&self.manifest)
    }

    /// The bytes of its layer.
    pub(crate) fn layer_bytes(&self) -> u64 {
        self.layer.size
    }
}

/// Packs the filesystem `image` into a layer in the directory `scratch`, and describes it. Blocks.
pub(crate) fn export(
    image: &Path,
    about: &About<'_>,
    scratch: &Path,
    progress: &Progress,
) -> Result<Exported, ImageError> {
    let layer_file = scratch.join("layer.tar.gz");
    let layer::Layer { blob, diff_id, notes } = layer::write(image, &layer_file, progress)?;
    let config = configuration(about, &diff_id).to_string().into_bytes();
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": descriptor(CONFIG_TYPE, &Digest::of(&config), config.len() as u64),
        "layers": [descriptor(LAYER_TYPE, &blob.digest, blob.size)],
    });
    let manifest = manifest.to_string().into_bytes();
    let (name, arch) = (about.name.to_owned(), about.arch);
    Ok(Exported { name, arch, layer: blob, layer_file, config, manifest, notes })
}

fn descriptor(media_type: &str, digest: &Digest, size: u64) -> Value {
    json!({ "mediaType": media_type, "digest": digest.to_string(), "size": size })
}

/// The configuration. Nothing in it comes from a VM: what callers gave a VM may be secret.
fn configuration(about: &About<'_>, diff_id: &Digest) -> Value {
    let run = about.config.cloned().unwrap_or_default();
    let env: Vec<String> = run.env.iter().map(|(name, value)| format!("{name}={value}")).collect();
    let mut config = json!({ "Labels": { "org.opencontainers.image.title": about.name } });
    for (key, value, is_empty) in [
        ("Env", json!(env), env.is_empty()),
        ("WorkingDir", json!(run.working_dir), run.working_dir.is_none()),
        ("User", json!(run.user), run.user.is_none()),
        ("Entrypoint", json!(run.entrypoint), run.entrypoint.is_empty()),
        ("Cmd", json!(run.cmd), run.cmd.is_empty()),
    ] {
        if !is_empty && let Some(all) = config.as_object_mut() {
            all.insert(key.to_owned(), value);
        }
    }
    let created = about.created.to_string();
    json!({
        "architecture": about.arch.of_packages(),
        "os": "linux",
        "created": created,
        "config": config,
        "rootfs": { "type": "layers", "diff_ids": [diff_id.to_string()] },
        "history": [{ "created": created, "created_by": "nexus" }],
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::document::Configuration;
    use super::*;

    #[test]
    fn a_configuration_comes_back_as_it_was() {
        let config = ImageConfig {
            env: BTreeMap::from([("A".into(), "b=c".into())]),
            working_dir: Some("/srv".into()),
            user: Some("app:app".into()),
            entrypoint: vec!["/bin/app".into()],
            cmd: vec!["--serve".into(), String::new()],
        };
        let diff_id = Digest::of(b"layer");
        for (config, arch) in [(config, Arch::HOST), (ImageConfig::default(), Arch::FOREIGN)] {
            let about =
                About { name: "web", config: Some(&config), arch, created: Timestamp::from_millis(0) };
            let written = configuration(&about, &diff_id).to_string();
            let read = Configuration::parse(written.as_bytes(), arch.of_packages()).unwrap();
            assert_eq!(read.config, config);
            assert_eq!(read.diff_ids, std::slice::from_ref(&diff_id));
            assert_eq!(configuration(&about, &diff_id).to_string(), written);
        }
    }
}
