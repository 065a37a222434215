//! Images from registries: a real one on the loopback interface, and malicious ones.

mod safe;
mod tokens;

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nexus_schema::ErrorCode;
use oci_client::client::{ClientConfig, ClientProtocol};
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, Reference, RegistryOperation};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::oci::{check_layered, layered};
use super::recipe::{Packed, Recipe, digest};
use super::tar::Tar;
use super::*;
use crate::asset::testing::{Fault, Server};
use crate::config::Environment;
use crate::image::oci::{Access, Keychain, OciError, Remote};

/// A free port outside the range that the system assigns automatically.
fn free_port() -> u16 {
    let first = 20_000 + u16::try_from(std::process::id() * 37 % 10_000).expect("it is small");
    (first..32_000).find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok()).expect("a free port")
}

/// A running `docker-registry` on the loopback interface.
pub(super) struct Registry {
    process: Child,
    pub(super) address: String,
    auth: RegistryAuth,
    pub(super) base: tempfile::TempDir,
}

impl Registry {
    /// Starts one, with authentication if a user and password are given.
    pub(super) async fn start(login: Option<(&str, &str)>) -> Self {
        let base = tempfile::tempdir().unwrap();
        let free = format!("127.0.0.1:{}", free_port());
        let mut config = format!(
            "version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\n\
             storage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: '{free}'}}\n",
            base.path().join("storage").display()
        );
        if login.is_some() {
            // `me` with the password `secret`.
            let known = "me:$2b$05$kzppWrXwyOuoz0cFWALmE.1dL5WTWWml2uFPThqjzBUpAPBq17DIK\n";
            fs::write(base.path().join("known"), known).unwrap();
            let path = base.path().join("known");
            config += &format!("auth: {{htpasswd: {{realm: here, path: {}}}}}\n", path.display());
        }
        let file = base.path().join("config.yml");
        fs::write(&file, config).unwrap();
        let process = Command::new("docker-registry")
            .arg("serve")
            .arg(&file)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("docker-registry is installed (.ci/setup test)");
        let deadline = Instant::now() + Duration::from_secs(60);
        while TcpStream::connect(&free).is_err() {
            assert!(Instant::now() < deadline, "docker-registry listens");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let auth = login.map_or(RegistryAuth::Anonymous, |(user, password)| {
            RegistryAuth::Basic(user.to_owned(), password.to_owned())
        });
        Self { process, address: free, auth, base }
    }

    /// Pushes all blobs of a recipe and a manifest under a name.
    async fn push(&self, repository: &str, recipe: &Recipe, tag: &str, manifest: &Value) {
        crate::os::tls::provide();
        let config = ClientConfig { protocol: ClientProtocol::Http, ..ClientConfig::default() };
        let client = Client::try_from(config).unwrap();
        let reference: Reference = format!("{}/{repository}:{tag}", self.address).parse().unwrap();
        client.auth(&reference, &self.auth, RegistryOperation::Push).await.unwrap();
        for (digest, bytes) in &recipe.blobs {
            client.push_blob(&reference, bytes.clone(), digest).await.unwrap();
        }
        let media_type = manifest["mediaType"].as_str().unwrap().parse().unwrap();
        client.push_manifest_raw(&reference, manifest.to_string().into_bytes(), media_type).await.unwrap();
    }

    async fn push_image(&self, name: &str, mut recipe: Recipe) {
        let manifest = recipe.manifest();
        let (repository, tag) = name.split_once(':').unwrap();
        self.push(repository, &recipe, tag, &manifest).await;
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let ended = self.process.kill().and_then(|()| self.process.wait());
        assert!(ended.is_ok(), "{ended:?}");
    }
}

async fn resolve(text: &str) -> Result<Source, ImageError> {
    let resolved = Remote::parse(text, &Access::default())?.resolve().await?;
    Ok(Source::Remote(Box::new(resolved)))
}

async fn pull(text: &str, into: &Path) -> Result<Built, ImageError> {
    make(resolve(text).await?, into).await
}

pub(super) async fn pull_by(text: &str, access: &Access, into: &Path) -> Result<Built, ImageError> {
    let resolved = Remote::parse(text, access)?.resolve().await?;
    make(Source::Remote(Box::new(resolved)), into).await
}

#[tokio::test]
async fn a_real_registry_gives_images() {
    let registry = Registry::start(None).await;
    let at = &registry.address;
    registry.push_image("group/layered:1.0", layered()).await;
    let image = registry.base.path().join("image");
    check_layered(&pull(&format!("{at}/group/layered:1.0"), &image).await.unwrap());
    assert_eq!(names(&image), ["rootfs.ext4"]);

    // By digest; the reference contains the digest that the name was resolved to.
    let resolved = Remote::parse(&format!("{at}/group/layered:1.0"), &Access::default())
        .unwrap()
        .resolve()
        .await
        .unwrap();
    let layers: u64 = layered().layers.iter().map(|layer| layer["size"].as_u64().unwrap()).sum();
    let foreseen = resolved.download_bytes().await.unwrap();
    assert!(
        (layers..layers + 4096).contains(&foreseen),
        "{foreseen} of layers of {layers} and a configuration"
    );
    let exact = resolved.reference();
    assert!(exact.starts_with(&format!("{at}/group/layered:1.0@sha256:")), "{exact}");
    let by_digest = format!("{at}/group/layered@sha256:{}", resolved.hex());
    check_layered(&pull(&by_digest, &registry.base.path().join("by-digest")).await.unwrap());

    // An index of images for several machines.
    let mut index = Recipe::new();
    let mut entries = Vec::new();
    for architecture in ["s390x", crate::image::oci::architecture(), "ppc64le"] {
        let mut recipe = Recipe::of(architecture);
        recipe.config["architecture"] = json!(architecture);
        let manifest = recipe.manifest();
        registry.push("many", &recipe, architecture, &manifest).await;
        let mut entry = recipe.described();
        entry["platform"] = json!({ "os": "linux", "architecture": architecture });
        entries.push(entry);
    }
    let described = json!({ "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": entries });
    index.blobs.clear();
    registry.push("many", &index, "latest", &described).await;
    let built = pull(&format!("{at}/many"), &registry.base.path().join("many")).await.unwrap();
    let mounted = crate::os::mounted::Mounted::read_only(&built.path);
    assert!(mounted.path().join(crate::image::oci::architecture()).is_file());
    drop(mounted);
    let other = pull(&format!("{at}/many:s390x"), &registry.base.path().join("other")).await.unwrap_err();
    assert!(other.to_string().contains("linux/s390x"), "{other}");

    for missing in
        [format!("{at}/group/layered:2.0"), format!("{at}/nothing"), format!("{at}/many@{}", digest(b""))]
    {
        let error = resolve(&missing).await.unwrap_err();
        assert_eq!(error.code(), ErrorCode::ImageNotFound, "{missing}: {error}");
    }
}

#[tokio::test]
async fn credentials_open_a_private_registry() {
    let registry = Registry::start(Some(("me", "secret"))).await;
    let at = &registry.address;
    registry.push_image("private:1", Recipe::of("mine")).await;
    let error = resolve(&format!("{at}/private:1")).await.unwrap_err();
    assert!(matches!(error, ImageError::Oci(OciError::Unauthorized { .. })), "{error}");
    assert!(error.hint().unwrap().contains("docker login"));
    open_by_helper(&registry).await;
    let file = registry.base.path().join("config.json");
    for (password, fits) in [("wrong", false), ("secret", true)] {
        let auth = data_encoding::BASE64.encode(format!("me:{password}").as_bytes());
        fs::write(&file, json!({ "auths": { at: { "auth": auth } } }).to_string()).unwrap();
        let keychain = Keychain::new(Some(file.clone()), Environment::default());
        let access = Access { keychain, ..Access::default() };
        let remote = Remote::parse(&format!("{at}/private:1"), &access).unwrap();
        match remote.resolve().await {
            Ok(resolved) => {
                assert!(fits);
                let source = Source::Remote(Box::new(resolved));
                make(source, &registry.base.path().join("image")).await.unwrap();
            }
            Err(error) => assert!(!fits && !error.to_string().contains(password), "{error}"),
        }
    }
}

/// The same with a credential helper.
async fn open_by_helper(registry: &Registry) {
    use std::os::unix::fs::PermissionsExt;
    let (at, base) = (&registry.address, registry.base.path());
    let (file, helper) = (base.join("helped.json"), base.join("docker-credential-trial"));
    fs::write(&file, json!({ "credHelpers": { at: "trial" } }).to_string()).unwrap();
    let environment: Environment =
        [("PATH".into(), format!("{}:/usr/bin:/bin", base.display()).into())].into_iter().collect();
    let access = Access { keychain: Keychain::new(Some(file), environment), ..Access::default() };
    for (secret, fits) in [("wrong", false), ("secret", true)] {
        // It knows only this registry.
        let answer = json!({ "ServerURL": at, "Username": "me", "Secret": secret });
        let script =
            format!("#!/bin/sh\nread -r key\n[ \"$1 $key\" = 'get {at}' ] || exit 3\necho '{answer}'\n");
        fs::write(&helper, script).unwrap();
        fs::set_permissions(&helper, fs::Permissions::from_mode(0o755)).unwrap();
        let pulled = pull_by(&format!("{at}/private:1"), &access, &base.join("helped")).await;
        assert_eq!(pulled.is_ok(), fits, "{pulled:?}");
    }
    fs::remove_file(helper).unwrap();
    let error = pull_by(&format!("{at}/private:1"), &access, &base.join("again")).await.unwrap_err();
    assert!(error.to_string().contains("docker-credential-trial"), "{error}");
    assert_eq!(error.code(), ErrorCode::HostUnsuitable);
}

/// A registry that serves one image, `test:1`, in configurable ways.
struct Liar {
    server: Server,
    manifest: String,
    layers: Vec<String>,
}

impl Liar {
    /// With the blobs of a recipe; `replaced` may substitute their bytes.
    fn new(recipe: Recipe, replaced: impl Fn(usize, &[u8]) -> Option<Vec<u8>>) -> Self {
        Self::of(Server::start(), recipe, replaced)
    }

    fn of(server: Server, mut recipe: Recipe, replaced: impl Fn(usize, &[u8]) -> Option<Vec<u8>>) -> Self {
        server.put("/v2/", "{}");
        let manifest = recipe.manifest();
        let layers: Vec<String> =
            recipe.layers.iter().map(|l| l["digest"].as_str().unwrap().to_owned()).collect();
        for (digest, bytes) in &recipe.blobs {
            let other = layers.iter().position(|layer| layer == digest).and_then(|at| replaced(at, bytes));
            server.put(&format!("/v2/test/blobs/{digest}"), other.unwrap_or_else(|| bytes.clone()));
        }
        let path = "/v2/test/manifests/1".to_owned();
        server.put(&path, manifest.to_string());
        Self { server, manifest: path, layers }
    }

    fn name(&self) -> String {
        self.server.url("/test:1").strip_prefix("http://").unwrap().to_owned()
    }

    fn blob(&self, at: usize) -> String {
        format!("/v2/test/blobs/{}", self.layers[at])
    }
}

/// An image of two layers, the second of some length.
fn two_layers() -> Recipe {
    let noise: Vec<u8> = (0..400_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    Recipe::of("small").layer(Tar::default().entry(b'0', b"large", b"", &noise).end(), Packed::Not)
}

#[tokio::test]
async fn lies_about_digests_and_sizes_are_found_out() {
    let base = tempfile::tempdir().unwrap();
    type Lie = fn(&[u8]) -> Vec<u8>;
    let lies: [(&str, Lie, &str); 5] = [
        ("one bit", |bytes| [&[bytes[0] ^ 1], &bytes[1..]].concat(), "has the digest"),
        ("longer", |bytes| [bytes, b"x"].concat(), "bytes instead of"),
        ("shorter", |bytes| bytes[..bytes.len() - 1].to_vec(), "bytes instead of"),
        ("nothing", |_| Vec::new(), "has 0 bytes instead of"),
        ("another archive", |_| Tar::default().file("evil", "x").end(), "bytes instead of"),
    ];
    for (what, lie, expected) in lies {
        for layer in 0..2 {
            let liar = Liar::new(two_layers(), |at, bytes| (at == layer).then(|| lie(bytes)));
            let error = pull(&liar.name(), &base.path().join("image")).await.expect_err(what);
            assert_eq!(error.code(), ErrorCode::VerificationFailed, "{what}: {error}");
            assert!(error.to_string().contains(expected), "{what}: {error}");
            assert!(names(base.path()).is_empty(), "{what}");
        }
    }
    // Without a length, and endless.
    let liar = Liar::new(two_layers(), |_, _| None);
    liar.server.misbehave(&liar.blob(1), [Fault::Endless(vec![7; 100_000])]);
    let error = pull(&liar.name(), &base.path().join("image")).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::VerificationFailed, "{error}");
    let liar = Liar::new(two_layers(), |_, _| None);
    liar.server.misbehave(&liar.manifest, [Fault::Endless(b" ".repeat(100_000))]);
    let error = pull(&liar.name(), &base.path().join("image")).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::TooLarge, "{error}");
    // Another manifest than the requested one.
    let liar = Liar::new(two_layers(), |_, _| None);
    let wanted = digest(b"another");
    liar.server.put(&format!("/v2/test/manifests/{wanted}"), "{}");
    let name = format!("{}@{wanted}", liar.name().strip_suffix(":1").unwrap());
    let error = pull(&name, &base.path().join("image")).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::VerificationFailed, "{error}");
    // Sizes larger than any disk.
    let mut recipe = two_layers();
    recipe.layers[1]["size"] = json!(u64::MAX);
    let liar = Liar::new(recipe, |_, _| None);
    let error = pull(&liar.name(), &base.path().join("image")).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::TooLarge, "{error}");
    assert!(names(base.path()).is_empty());
}

#[tokio::test]
async fn interrupted_blobs_are_gone_on_with() {
    let base = tempfile::tempdir().unwrap();
    let liar = Liar::new(two_layers(), |_, _| None);
    let blob = liar.blob(1);
    liar.server.misbehave(&blob, [Fault::CutAfter(150_000), Fault::Status(503), Fault::CutAfter(100_000)]);
    pull(&liar.name(), &base.path().join("image")).await.unwrap();
    let ranges: Vec<_> =
        liar.server.requests().into_iter().filter(|r| r.target == blob).map(|r| r.range).collect();
    let expected = [None, Some("bytes=150000-"), Some("bytes=150000-"), Some("bytes=250000-")];
    assert_eq!(ranges, expected.map(|r| r.map(str::to_owned)));
    // A server without support for ranges sends everything again.
    let liar = Liar::new(two_layers(), |_, _| None);
    liar.server.misbehave(&liar.blob(1), [Fault::CutAfter(150_000), Fault::NoRange]);
    pull(&liar.name(), &base.path().join("again")).await.unwrap();
    // After repeated failures it gives up.
    let liar = Liar::new(two_layers(), |_, _| None);
    liar.server.misbehave(&liar.blob(0), vec![Fault::Status(500); 20]);
    let error = pull(&liar.name(), &base.path().join("never")).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::DownloadFailed, "{error}");
    assert_eq!(liar.server.count(&liar.blob(0)), 5);
    // A missing blob is not retried.
    let liar = Liar::new(two_layers(), |_, _| None);
    liar.server.remove(&liar.blob(0));
    let error = pull(&liar.name(), &base.path().join("never")).await.unwrap_err();
    assert!(error.to_string().contains("is missing"), "{error}");
    assert_eq!(
        (liar.server.count(&liar.blob(0)), names(base.path())),
        (1, vec!["again".into(), "image".into()])
    );
}

#[tokio::test]
async fn a_pull_shows_its_progress_and_is_cancelled() {
    let base = tempfile::tempdir().unwrap();
    let liar = Liar::new(two_layers(), |_, _| None);
    liar.server.misbehave(&liar.blob(1), [Fault::StallAfter(100_000)]);
    let token = CancellationToken::new();
    let progress = Progress::new(token.clone());
    let mut watched = progress.watch();
    let (source, into) = (resolve(&liar.name()).await.unwrap(), base.path().join("image"));
    let built = tokio::spawn(async move { build(source, &into, &meta(InitMode::Agent), &progress).await });
    let enough = watched.wait_for(|p| p.step.starts_with("downloading 2") && p.done >= Some(100_000)).await;
    assert!(enough.unwrap().total > Some(400_000));
    token.cancel();
    let error = built.await.unwrap().unwrap_err();
    assert_eq!(error.code(), ErrorCode::Cancelled, "{error}");
    assert!(names(base.path()).is_empty());
}
