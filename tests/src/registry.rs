//! A registry of OCI images on the loopback interface: Debian's `docker-registry`, with images made by tests.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use data_encoding::HEXLOWER;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::wait::until;

/// How long it may take to start listening.
const START: Duration = Duration::from_secs(60);

/// A running registry; it stops when dropped.
#[derive(Debug)]
pub struct Registry {
    process: Child,
    address: String,
    base: TempDir,
}

/// A file or link of a layer.
#[derive(Debug, Clone, Copy)]
pub enum Entry<'e> {
    /// A program.
    Program(&'e [u8]),
    /// A text file.
    Text(&'e str),
    /// A symbolic link.
    Link(&'e str),
    /// A directory.
    Directory,
}

/// A gzip-compressed layer, and its unpacked form.
#[derive(Debug, Clone)]
pub struct Layer {
    /// The compressed form.
    pub packed: Vec<u8>,
    /// The tar.
    pub plain: Vec<u8>,
}

/// A free port outside the range that the system assigns automatically.
fn free_port() -> u16 {
    let first = 20_000 + u16::try_from(std::process::id() * 37 % 10_000).expect("it is small");
    (first..32_000).find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok()).expect("a free port")
}

impl Registry {
    /// Starts one without any images.
    pub fn start() -> Self {
        let base =
            tempfile::Builder::new().prefix("nexus-registry-").tempdir().expect("a temporary directory");
        let address = format!("127.0.0.1:{}", free_port());
        let config = format!(
            "version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\n\
             storage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: '{address}'}}\n",
            base.path().join("storage").display()
        );
        let file = base.path().join("config.yml");
        fs::write(&file, config).expect("its configuration is written");
        let process = Command::new("docker-registry")
            .arg("serve")
            .arg(&file)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("docker-registry is installed (.ci/setup test)");
        let registry = Self { process, address, base };
        let listens = until(START, || TcpStream::connect(&registry.address).ok());
        assert!(listens.is_some(), "docker-registry does not listen");
        registry
    }

    /// Its address, which references begin with.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Pushes an image with some layers, lowest first, under a name and a tag; `run` is its configuration.
    pub fn put(&self, name: &str, tag: &str, layers: &[&[(&str, Entry<'_>)]], run: &Value) {
        let tars: Vec<Vec<u8>> = layers.iter().map(|entries| tar(entries)).collect();
        let diff_ids: Vec<String> = tars.iter().map(|tar| digest(tar)).collect();
        let layers: Vec<Value> =
            tars.iter().map(|tar| self.blob(name, "application/vnd.oci.image.layer.v1.tar", tar)).collect();
        self.put_image(name, tag, &layers, &diff_ids, run);
    }

    /// The same with already compressed layers.
    pub fn put_packed(&self, name: &str, tag: &str, layers: &[Layer], run: &Value) {
        let diff_ids: Vec<String> = layers.iter().map(|layer| digest(&layer.plain)).collect();
        let kind = "application/vnd.oci.image.layer.v1.tar+gzip";
        let layers: Vec<Value> = layers.iter().map(|layer| self.blob(name, kind, &layer.packed)).collect();
        self.put_image(name, tag, &layers, &diff_ids, run);
    }

    fn put_image(&self, name: &str, tag: &str, layers: &[Value], diff_ids: &[String], run: &Value) {
        let architecture = nexus_schema::Arch::HOST.of_packages();
        let config = json!({ "architecture": architecture, "os": "linux", "config": run,
            "rootfs": { "type": "layers", "diff_ids": diff_ids } });
        let config =
            self.blob(name, "application/vnd.oci.image.config.v1+json", config.to_string().as_bytes());
        let manifest = json!({ "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config, "layers": layers });
        let manifest = manifest.to_string();
        let digest = self.content(manifest.as_bytes());
        let hex = hex(&digest);
        let manifests = self.repository(name).join("_manifests");
        write(manifests.join("revisions/sha256").join(hex).join("link"), digest.as_bytes());
        write(manifests.join("tags").join(tag).join("current/link"), digest.as_bytes());
        write(
            manifests.join("tags").join(tag).join("index/sha256").join(hex).join("link"),
            digest.as_bytes(),
        );
    }

    /// Pushes a blob; returns its descriptor.
    fn blob(&self, name: &str, media_type: &str, bytes: &[u8]) -> Value {
        let digest = self.content(bytes);
        let link = self.repository(name).join("_layers/sha256").join(hex(&digest)).join("link");
        write(link, digest.as_bytes());
        json!({ "mediaType": media_type, "digest": digest, "size": bytes.len() })
    }

    fn content(&self, bytes: &[u8]) -> String {
        let digest = digest(bytes);
        let hex = hex(&digest);
        write(self.storage().join("blobs/sha256").join(&hex[..2]).join(hex).join("data"), bytes);
        digest
    }

    fn storage(&self) -> PathBuf {
        self.base.path().join("storage/docker/registry/v2")
    }

    fn repository(&self, name: &str) -> PathBuf {
        self.storage().join("repositories").join(name)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let ended = self.process.kill().and_then(|()| self.process.wait());
        if let Err(error) = ended {
            eprintln!("docker-registry did not end: {error}");
        }
    }
}

fn hex(digest: &str) -> &str {
    digest.strip_prefix("sha256:").expect("it is a SHA-256")
}

fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", HEXLOWER.encode(&Sha256::digest(bytes)))
}

fn write(path: PathBuf, bytes: &[u8]) {
    fs::create_dir_all(path.parent().expect("a file is in a directory")).expect("its directory is made");
    fs::write(path, bytes).expect("a file of the registry is written");
}

fn tar(entries: &[(&str, Entry<'_>)]) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    for (path, entry) in entries {
        let mut header = tar::Header::new_gnu();
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_700_000_000);
        let (kind, mode, content): (_, _, &[u8]) = match entry {
            Entry::Program(bytes) => (tar::EntryType::Regular, 0o755, bytes),
            Entry::Text(text) => (tar::EntryType::Regular, 0o644, text.as_bytes()),
            Entry::Link(_) => (tar::EntryType::Symlink, 0o777, &[]),
            Entry::Directory => (tar::EntryType::Directory, 0o755, &[]),
        };
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(content.len() as u64);
        let appended = match entry {
            Entry::Link(target) => archive.append_link(&mut header, path, target),
            _ => archive.append_data(&mut header, path, content),
        };
        appended.expect("an entry fits in memory");
    }
    archive.into_inner().expect("an archive fits in memory")
}
