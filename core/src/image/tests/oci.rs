//! OCI and Docker images in files and directories: their layers, and errors in them.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nexus_schema::ErrorCode;
use serde_json::{Value, json};

use super::recipe::{Packed, Recipe, digest, pack};
use super::tar::Tar;
use super::*;
use crate::image::oci::Form;
use crate::os::mounted::{Mounted, run};

fn saved(path: PathBuf, form: Form, name: Option<&str>) -> Source {
    Source::Saved { path, form, name: name.map(str::to_owned) }
}

/// Every file and link of an image except its own metadata, with contents.
fn contents(built: &Built) -> Vec<(String, String)> {
    fn walk(directory: &Path, at: &str, found: &mut Vec<(String, String)>) {
        for name in names(directory) {
            let (path, shown) = (directory.join(&name), format!("{at}/{name}"));
            let kind = fs::symlink_metadata(&path).unwrap().file_type();
            if shown == "/lost+found" || shown == "/etc/nexus" {
                continue;
            }
            if kind.is_dir() {
                walk(&path, &shown, found);
                if names(&path).is_empty() {
                    found.push((shown, "empty directory".into()));
                }
            } else if kind.is_symlink() {
                found.push((shown, format!("-> {}", fs::read_link(&path).unwrap().display())));
            } else {
                found.push((shown, fs::read_to_string(&path).unwrap()));
            }
        }
    }
    let mounted = Mounted::read_only(&built.path);
    let mut found = Vec::new();
    walk(mounted.path(), "", &mut found);
    found
}

fn expect(built: &Built, expected: &[(&str, &str)]) {
    let expected: Vec<_> = expected.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect();
    assert_eq!(contents(built), expected);
}

/// Layers that hide, replace and link.
pub(super) fn layered() -> Recipe {
    let lowest = Tar::default()
        .file("gone", "1")
        .file("stays", "1")
        .file("replaced", "1")
        .link(b'5', "opaque", "")
        .file("opaque/lower", "1")
        .link(b'5', "opaque/deep", "")
        .file("opaque/deep/lower", "1")
        .link(b'5', "marked-last", "")
        .file("marked-last/lower", "1")
        .file("back", "1")
        .link(b'5', "tree", "")
        .file("tree/a", "1")
        .file("tree/b", "1")
        .file("one", "linked")
        .link(b'1', "two", "one")
        .link(b'5', "usr", "")
        .link(b'5', "usr/lib", "")
        .link(b'2', "lib", "usr/lib")
        .link(b'2', "was-link", "usr")
        .file("was-file", "1")
        .link(b'5', "was-directory", "")
        .file("was-directory/inside", "1")
        .link(b'5', "half", "")
        .file("half/lower", "1");
    let middle = Tar::default()
        .file(".wh.gone", "")
        .file("opaque/.wh..wh..opq", "")
        .file("opaque/upper", "2")
        .file("marked-last/upper", "2")
        .file("marked-last/.wh..wh..opq", "")
        // A whiteout hides nothing in its own layer, wherever it is.
        .file(".wh.back", "")
        .file("back", "2")
        .file("half/upper", "2")
        .file(".wh.half", "")
        .file("replaced", "2")
        .file(".wh.tree", "")
        .file("lib/by-link", "2")
        .link(b'5', "was-link", "")
        .file("was-link/inside", "2")
        .link(b'5', "was-file", "")
        .file("was-file/inside", "2")
        .file("was-directory", "2")
        // A link to a file of the layer below.
        .link(b'1', "three", "stays")
        .file(".wh.not-there", "")
        .file("not/there/.wh.either", "")
        .file(".wh..wh.plnk/1.2", "notes of the layers' own")
        .file(".wh..wh.aufs", "");
    let highest = Tar::default()
        .file("tree/c", "3")
        .file("gone-too", "3")
        // One of two names: the file stays under the other.
        .file(".wh.one", "")
        .link(b'1', "four", "two");
    let last = Tar::default().file(".wh.gone-too", "");
    Recipe::new()
        .layer(lowest.end(), Packed::Gzip)
        .layer(middle.end(), Packed::Zstd)
        .layer(Tar::default().end(), Packed::Gzip)
        .layer(highest.end(), Packed::Not)
        .layer(Tar::default().end(), Packed::Gzip)
        .layer(last.end(), Packed::Gzip)
        .run(json!({
            "Env": ["PATH=/usr/bin:/bin", "EMPTY=", "A=b=c", "nonsense", "=none"], "WorkingDir": "/usr",
            "User": "1000:1000", "Entrypoint": ["/bin/tool", "run"], "Cmd": ["all"], "ExposedPorts": { "80/tcp": {} },
        }))
}

const LAYERED: [(&str, &str); 15] = [
    ("/back", "2"),
    ("/four", "linked"),
    ("/half/upper", "2"),
    ("/lib", "-> usr/lib"),
    ("/marked-last/upper", "2"),
    ("/opaque/upper", "2"),
    ("/replaced", "2"),
    ("/stays", "1"),
    ("/three", "1"),
    ("/tree/c", "3"),
    ("/two", "linked"),
    ("/usr/lib/by-link", "2"),
    ("/was-directory", "2"),
    ("/was-file/inside", "2"),
    ("/was-link/inside", "2"),
];

pub(super) fn check_layered(built: &Built) {
    expect(built, &LAYERED);
    let config = built.config.clone().unwrap();
    let env = [("A", "b=c"), ("EMPTY", ""), ("PATH", "/usr/bin:/bin")];
    assert_eq!(config.env, env.map(|(k, v)| (k.to_owned(), v.to_owned())).into());
    assert_eq!((config.working_dir.as_deref(), config.user.as_deref()), (Some("/usr"), Some("1000:1000")));
    assert_eq!((config.entrypoint, config.cmd), (vec!["/bin/tool".into(), "run".into()], vec!["all".into()]));
    let mounted = Mounted::read_only(&built.path);
    let inode = |name: &str| fs::metadata(mounted.path().join(name)).unwrap().ino();
    assert_eq!((inode("two"), inode("stays")), (inode("four"), inode("three")));
    let text = fs::read_to_string(mounted.path().join("etc/nexus/image.yaml")).unwrap();
    let said: ImageMetadata = serde_yaml_ng::from_str(&text).unwrap();
    assert_eq!(said.config.as_deref(), built.config.as_ref());
}

#[tokio::test]
async fn layers_are_put_on_each_other() {
    let base = tempfile::tempdir().unwrap();
    let layout = base.path().join("layout");
    layered().layout(&layout);
    let source = Source::detect(&layout).unwrap();
    assert!(matches!(source, Source::Saved { form: Form::Layout, .. }));
    check_layered(&make(source, &base.path().join("image")).await.unwrap());
}

#[tokio::test]
async fn archives_of_images_are_told_from_root_filesystems() {
    let base = tempfile::tempdir().unwrap();
    let (layout, archive) = (base.path().join("layout"), base.path().join("oci.tar"));
    layered().layout(&layout);
    run(Command::new("tar").arg("-cf").arg(&archive).arg("-C").arg(&layout).arg("."));
    let (entry, tar) = layered().saved(&["example.com/a:1"], Tar::default());
    let tar = tar.file("manifest.json", &json!([entry]).to_string()).file("repositories", "{}").end();
    let (docker, packed) = (base.path().join("docker.tar"), base.path().join("docker.tar.gz"));
    fs::write(&packed, pack(&tar, Packed::Gzip)).unwrap();
    fs::write(&docker, tar).unwrap();
    for path in [&archive, &docker, &packed] {
        let source = Source::detect(path).unwrap();
        assert!(matches!(source, Source::Tar(_)));
        let image = base.path().join("image");
        check_layered(&make(source, &image).await.unwrap());
        assert_eq!(names(&image), ["rootfs.ext4"]);
        fs::remove_dir_all(&image).unwrap();
    }
    // A file of that name alone is just part of a root filesystem.
    for text in ["{}", "[]", r#"[{"Config":1}]"#, "no"] {
        fs::write(&archive, Tar::default().file("manifest.json", text).end()).unwrap();
        let built = make(Source::Tar(archive.clone()), &base.path().join("image")).await.unwrap();
        expect(&built, &[("/manifest.json", text)]);
        assert_eq!(built.config, None);
        fs::remove_dir_all(base.path().join("image")).unwrap();
        let error = make(saved(archive.clone(), Form::Docker, None), &base.path().join("image")).await;
        assert!(error.is_err(), "{text}");
    }
    for (form, word) in [(Form::Docker, "docker save"), (Form::Layout, "OCI layout")] {
        fs::write(&archive, Tar::default().file("a", "b").end()).unwrap();
        let error = make(saved(archive.clone(), form, None), &base.path().join("image")).await.unwrap_err();
        assert_eq!(error.code(), ErrorCode::InvalidArgument, "{error}");
        assert!(error.to_string().contains(word), "{error}");
    }
    fs::write(&archive, "").unwrap();
    let error =
        make(saved(archive.clone(), Form::Docker, None), &base.path().join("image")).await.unwrap_err();
    assert!(matches!(error, ImageError::Empty), "{error}");
    let error = make(saved(base.path().into(), Form::Layout, None), &base.path().join("image")).await;
    assert_eq!(error.unwrap_err().code(), ErrorCode::InvalidArgument);
}

#[tokio::test]
async fn one_of_several_images_is_named() {
    let base = tempfile::tempdir().unwrap();
    let (mut all, mut entries, mut described) = (Tar::default(), Vec::new(), Vec::new());
    let mut blobs = Recipe::new();
    for name in ["first", "second"] {
        let mut recipe = Recipe::of(name);
        let (entry, tar) = recipe.saved(&[&format!("{name}:1"), &format!("{name}:latest")], all);
        all = tar;
        entries.push(entry);
        let mut descriptor = recipe.described();
        descriptor["annotations"] = json!({ "org.opencontainers.image.ref.name": name });
        described.push(descriptor);
        blobs.blobs.append(&mut recipe.blobs);
    }
    let (docker, layout) = (base.path().join("docker.tar"), base.path().join("layout"));
    fs::write(&docker, all.file("manifest.json", &Value::from(entries).to_string()).end()).unwrap();
    blobs.layout_of(&layout, &Value::from(described));
    let image = base.path().join("image");
    for (source, form, second) in
        [(docker, Form::Docker, "second:latest"), (layout.clone(), Form::Layout, "second")]
    {
        let built = make(saved(source.clone(), form, Some(second)), &image).await.unwrap();
        expect(&built, &[("/second", "second")]);
        fs::remove_dir_all(&image).unwrap();
        for (name, expected) in
            [(None, "several images: first"), (Some("third"), "no image `third`, only first")]
        {
            let error = make(saved(source.clone(), form, name), &image).await.unwrap_err();
            assert_eq!(error.code(), ErrorCode::InvalidArgument);
            assert!(error.to_string().contains(expected), "{error}");
            assert!(error.hint().unwrap().contains('#'));
        }
    }
}

/// Changes one thing of a valid image, and expects it to be refused with these words.
async fn refused(what: &str, expected: &str, change: impl FnOnce(&mut Recipe, &Path)) {
    let base = tempfile::tempdir().unwrap();
    let layout = base.path().join("layout");
    let mut recipe = Recipe::of("file").layer(Tar::default().file("other", "x").end(), Packed::Not);
    recipe.clone().layout(&layout);
    change(&mut recipe, &layout);
    let error = make(saved(layout, Form::Layout, None), &base.path().join("image")).await.expect_err(what);
    assert!(error.to_string().contains(expected), "{what}: {error}");
    assert_eq!(names(base.path()), ["layout"], "{what}");
}

/// The file of a blob.
fn blob_file(layout: &Path, descriptor: &Value) -> PathBuf {
    layout.join("blobs/sha256").join(&descriptor["digest"].as_str().unwrap()[7..])
}

#[tokio::test]
async fn damaged_images_are_refused_and_leave_nothing() {
    refused("a layer of other bytes", "has the digest", |recipe, layout| {
        let file = blob_file(layout, &recipe.layers[1]);
        let mut bytes = fs::read(&file).unwrap();
        bytes[600] ^= 1;
        fs::write(file, bytes).unwrap();
    })
    .await;
    refused("a longer layer", "bytes instead of", |recipe, layout| {
        let file = blob_file(layout, &recipe.layers[0]);
        let mut bytes = fs::read(&file).unwrap();
        bytes.push(0);
        fs::write(file, bytes).unwrap();
    })
    .await;
    refused("an empty layer", "has 0 bytes instead of", |recipe, layout| {
        fs::write(blob_file(layout, &recipe.layers[0]), "").unwrap();
    })
    .await;
    refused("a layer that is missing", "is missing", |recipe, layout| {
        fs::remove_file(blob_file(layout, &recipe.layers[0])).unwrap();
    })
    .await;
    refused("a layer that is a FIFO", "is missing", |recipe, layout| {
        let file = blob_file(layout, &recipe.layers[0]);
        fs::remove_file(&file).unwrap();
        run(Command::new("mkfifo").arg(file));
    })
    .await;
    refused("a size that lies", "bytes instead of", |recipe, layout| {
        recipe.layers[0]["size"] = json!(5);
        recipe.clone().layout(layout);
    })
    .await;
    refused("an impossible size", "cannot be read", |recipe, layout| {
        recipe.layers[0]["size"] = json!(-1);
        recipe.clone().layout(layout);
    })
    .await;
    refused("a digest that is a path", "is no sha256 or sha512 digest", |recipe, layout| {
        recipe.layers[0]["digest"] = json!("sha256:../../../../../../etc/passwd");
        recipe.clone().layout(layout);
    })
    .await;
    refused(
        "other contents than the configuration says",
        "an unpacked layer has the digest",
        |recipe, layout| {
            recipe.config["rootfs"]["diff_ids"][1] = json!(digest(b"other"));
            recipe.clone().layout(layout);
        },
    )
    .await;
    refused("fewer contents than layers", "2 layers but its configuration 1", |recipe, layout| {
        recipe.config["rootfs"]["diff_ids"].as_array_mut().unwrap().pop();
        recipe.clone().layout(layout);
    })
    .await;
    refused("another machine's", "only for linux/s390x", |recipe, layout| {
        recipe.config["architecture"] = json!("s390x");
        recipe.clone().layout(layout);
    })
    .await;
    refused("another system's", "only for windows", |recipe, layout| {
        recipe.config["os"] = json!("windows");
        recipe.clone().layout(layout);
    })
    .await;
    refused("a huge environment", "is larger than 32KiB", |recipe, layout| {
        recipe.config["config"]["Env"] = json!([format!("A={}", "x".repeat(40_000))]);
        recipe.clone().layout(layout);
    })
    .await;
    refused("a huge configuration", "is larger than 4MiB", |recipe, layout| {
        recipe.config["author"] = json!("x".repeat(5 << 20));
        recipe.clone().layout(layout);
    })
    .await;
    refused("no image at all", "names no layers", |recipe, layout| {
        recipe.config = json!({ "mediaType": "application/vnd.cncf.helm.config.v1+json" });
        recipe.clone().layout(layout);
    })
    .await;
    refused("nothing in it", "the source is empty", |_, layout| Recipe::new().layout(layout)).await;
    refused("an index without images", "only for none", |recipe, layout| {
        recipe.layout_of(layout, &json!([]));
    })
    .await;
    refused("an index of an index of an index", "nested too deeply", |recipe, layout| {
        let mut described = recipe.described();
        for _ in 0..8 {
            let index = json!({ "schemaVersion": 2, "manifests": [described] });
            described = recipe.json("application/vnd.oci.image.index.v1+json", &index);
        }
        recipe.layout_of(layout, &json!([described]));
    })
    .await;
    refused("an old manifest", "version 1", |recipe, layout| {
        let manifest = json!({ "schemaVersion": 1, "fsLayers": [] });
        let described = recipe.json("application/vnd.docker.distribution.manifest.v1+json", &manifest);
        recipe.layout_of(layout, &json!([described]));
    })
    .await;
    refused("text", "cannot be read", |_, layout| fs::write(layout.join("index.json"), "hello").unwrap())
        .await;
    refused("a layer of text", "checksum", |recipe, layout| {
        *recipe = Recipe::new().layer(b"hello".repeat(200), Packed::Not);
        recipe.clone().layout(layout);
    })
    .await;
    refused("a whiteout of nothing", "hides no name", |recipe, layout| {
        *recipe = Recipe::new().layer(Tar::default().file(".wh...", "").end(), Packed::Not);
        recipe.clone().layout(layout);
    })
    .await;
    refused("a whiteout outside", "leaves the tree", |recipe, layout| {
        *recipe = Recipe::new().layer(Tar::default().file("../.wh.etc", "").end(), Packed::Not);
        recipe.clone().layout(layout);
    })
    .await;
}

#[tokio::test]
async fn an_archive_of_an_image_reaches_nothing_of_the_host() {
    let base = tempfile::tempdir().unwrap();
    let secret = base.path().join("secret");
    fs::write(&secret, Tar::default().file("secret", "of the host").end()).unwrap();
    let path = secret.to_str().unwrap();
    let config = Recipe::of("a").config.to_string();
    let tar = base.path().join("a.tar");
    let layers = [path.to_owned(), format!("..{path}"), format!("{}{path}", "../".repeat(20)), "link".into()];
    for layer in layers {
        let manifest = json!([{ "Config": "config", "Layers": [layer] }]);
        let archive = Tar::default().file("config", &config).link(b'2', "link", path);
        fs::write(&tar, archive.file("manifest.json", &manifest.to_string()).end()).unwrap();
        let error = make(Source::Tar(tar.clone()), &base.path().join("image")).await.unwrap_err();
        assert!(error.to_string().contains("is missing"), "{error}");
        assert_eq!(names(base.path()), ["a.tar", "secret"]);
    }
}

#[tokio::test]
async fn bombs_in_layers_are_stopped_by_the_caps() {
    let base = tempfile::tempdir().unwrap();
    let limits = Limits { bytes: 8 << 20, entries: 1_000, ..Limits::default() };
    let mut zeros = Tar::default();
    zeros.header(b'0', b"zeros", b"", 1 << 26);
    zeros.0.resize(zeros.0.len() + (1 << 26), 0);
    let mut many = Tar::default();
    for number in 0..300 {
        many = many.file(&format!("d/.wh.{number}"), "");
    }
    let many = many.end();
    let mut layers = Recipe::new();
    for _ in 0..4 {
        layers = layers.layer(many.clone(), Packed::Gzip);
    }
    let padded = [Tar::default().file("a", "b").end(), vec![0; 64 << 20]].concat();
    for (name, recipe, expected) in [
        ("zeros", Recipe::new().layer(zeros.end(), Packed::Gzip), "bytes of content"),
        ("whiteouts", layers, "more than 1000 entries"),
        ("padding", Recipe::new().layer(padded, Packed::Gzip), "it has no end"),
    ] {
        let layout = base.path().join("layout");
        recipe.layout(&layout);
        let source = saved(layout.clone(), Form::Layout, None);
        let (image, meta, progress) = (base.path().join("image"), meta(InitMode::Agent), Progress::default());
        let built = build_within(source, &image, &meta, limits.clone(), &progress);
        let error = built.await.unwrap_err();
        assert!(error.to_string().contains(expected), "{name}: {error}");
        fs::remove_dir_all(&layout).unwrap();
        assert!(names(base.path()).is_empty(), "{name}");
    }
}

#[tokio::test]
async fn what_a_layer_hides_is_not_in_the_file() {
    let base = tempfile::tempdir().unwrap();
    // A line that does not compress and is in no other file.
    let secret: String = (0..20_000_u32).map(|n| format!("{:x}", n.wrapping_mul(2_654_435_761))).collect();
    let lower = Tar::default()
        .file("kept", "kept")
        .file("hidden", &secret)
        .file("replaced", &secret)
        .file("opaque/inside", &secret);
    let upper = Tar::default().file(".wh.hidden", "").file("replaced", "now").file("opaque/.wh..wh..opq", "");
    let recipe = Recipe::new().layer(lower.end(), Packed::Gzip).layer(upper.end(), Packed::Gzip);
    let layout = base.path().join("layout");
    recipe.layout(&layout);
    let built = make(Source::detect(&layout).unwrap(), &base.path().join("image")).await.unwrap();
    expect(&built, &[("/kept", "kept"), ("/opaque", "empty directory"), ("/replaced", "now")]);
    let bytes = fs::read(&built.path).unwrap();
    for part in [&secret[..60], &secret[9_000..9_060]] {
        assert!(memchr::memmem::find(&bytes, part.as_bytes()).is_none(), "a hidden content is in the file");
    }
    assert_eq!(names(&base.path().join("image")), ["rootfs.ext4"]);
}
