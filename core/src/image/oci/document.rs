//! The documents of an OCI image: indexes, manifests and configurations. Docker's own types have the same structure.

use std::collections::BTreeMap;

use nexus_schema::link::ImageConfig;
use nexus_schema::{Arch, ByteSize};
use serde::Deserialize;

use super::OciError;
use super::digest::{Digest, shown};

/// The largest index, manifest or configuration that is read.
pub(crate) const DOCUMENT_MAX: u64 = 4 << 20;
/// The maximum number of layers.
const LAYERS_MAX: usize = 500;
/// The largest stored configuration: environment, entry point and the like.
const CONFIG_MAX: usize = 32 << 10;
/// How many names are shown in an error.
const NAMES_SHOWN: usize = 8;

const REF_NAME: &str = "org.opencontainers.image.ref.name";
const FULL_NAME: &str = "io.containerd.image.name";
/// Media types of layers with the suffixes that are supported. Sources: the image specification of OCI, layer.md and
/// media-types.md; Docker's image manifest version 2, schema 2.
const LAYERS: [(&str, &[&str]); 4] = [
    ("application/vnd.oci.image.layer.v1.tar", &["", "+gzip", "+zstd"]),
    ("application/vnd.oci.image.layer.nondistributable.v1.tar", &["", "+gzip", "+zstd"]),
    ("application/vnd.docker.image.rootfs.diff.tar", &["", ".gzip", ".zstd"]),
    ("application/vnd.docker.image.rootfs.foreign.diff.tar", &["", ".gzip", ".zstd"]),
];
/// The annotation of a manifest that describes another one and is not an image itself.
const REFERENCE_TYPE: &str = "vnd.docker.reference.type";

/// A blob with its digest and size, both of which are verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Blob {
    pub(crate) digest: Digest,
    pub(crate) size: u64,
}

/// A reference to a blob.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Descriptor {
    media_type: Option<String>,
    digest: String,
    size: u64,
    platform: Option<Platform>,
    annotations: Option<BTreeMap<String, String>>,
}

#[derive(Debug, Clone, Deserialize)]
struct Platform {
    architecture: String,
    os: String,
    variant: Option<String>,
}

impl Descriptor {
    /// The blob that it refers to.
    pub(crate) fn blob(&self) -> Result<Blob, OciError> {
        Ok(Blob { digest: Digest::parse(&self.digest)?, size: self.size })
    }

    /// Refuses a layer (with this number) that is encrypted or not a tar archive. A layer without a media type, as in archives
    /// of `docker save`, is checked later.
    fn check_layer(&self, number: usize) -> Result<(), OciError> {
        let Some(kind) = self.media_type.as_deref().filter(|kind| !kind.is_empty()) else { return Ok(()) };
        if LAYERS
            .iter()
            .any(|(stem, packed)| kind.strip_prefix(stem).is_some_and(|rest| packed.contains(&rest)))
        {
            return Ok(());
        }
        let why = if kind.ends_with("+encrypted") { "which is encrypted" } else { "which is no tar archive" };
        Err(OciError::Document {
            what: format!("its layer {number} has the media type {}, {why}", shown(kind)),
        })
    }

    fn annotation(&self, key: &str) -> Option<&str> {
        self.annotations.as_ref()?.get(key).map(String::as_str)
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        [REF_NAME, FULL_NAME].into_iter().filter_map(|key| self.annotation(key))
    }
}

/// A document that a reference or a descriptor refers to.
#[derive(Debug)]
pub(crate) enum Document {
    /// Several images, of which one is chosen.
    Index(Vec<Descriptor>),
    /// One image.
    Manifest { config: Descriptor, layers: Vec<Descriptor> },
}

impl Document {
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, OciError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Raw {
            schema_version: Option<u64>,
            manifests: Option<Vec<Descriptor>>,
            config: Option<Descriptor>,
            layers: Option<Vec<Descriptor>>,
        }
        let raw: Raw = parse(bytes, "a manifest")?;
        match raw {
            Raw { schema_version: Some(version), .. } if version != 2 => Err(OciError::Document {
                what: format!("its manifest has the version {version}, which is not supported"),
            }),
            Raw { manifests: Some(manifests), .. } => Ok(Self::Index(manifests)),
            Raw { config: Some(config), layers: Some(layers), .. } => {
                layers.iter().enumerate().try_for_each(|(at, layer)| layer.check_layer(at + 1))?;
                Ok(Self::Manifest { config, layers })
            }
            _ => Err(OciError::Document { what: "its manifest has neither manifests nor layers".into() }),
        }
    }
}

/// The name of this machine's architecture in images.
pub(crate) fn architecture() -> &'static str {
    Arch::HOST.of_packages()
}

/// Chooses an image for this machine from an index, by name if one is given.
pub(crate) fn choose<'d>(
    entries: &'d [Descriptor],
    name: Option<&str>,
    architecture: &str,
) -> Result<&'d Descriptor, OciError> {
    let images = || {
        let unknown = |d: &&Descriptor| d.platform.as_ref().is_some_and(|p| p.os == "unknown");
        entries.iter().filter(|d| d.annotation(REFERENCE_TYPE).is_none()).filter(move |d| !unknown(d))
    };
    let named: Vec<&Descriptor> =
        images().filter(|d| name.is_none_or(|name| d.names().any(|n| n == name))).collect();
    if let (Some(name), []) = (name, named.as_slice()) {
        return Err(OciError::NoSuchName { name: shown(name), names: names(images()) });
    }
    let fits = |d: &&Descriptor| {
        d.platform.as_ref().is_some_and(|p| p.os == "linux" && p.architecture == architecture)
    };
    let mut fitting: Vec<&Descriptor> = named.iter().copied().filter(fits).collect();
    if fitting.is_empty() {
        // An entry without a platform has it in its configuration.
        fitting = named.iter().copied().filter(|d| d.platform.is_none()).collect();
    }
    // Variants for newer processors are listed beside the plain one.
    if fitting.len() > 1 && fitting.iter().any(|d| is_plain(d)) {
        fitting.retain(|d| is_plain(d));
    }
    fitting.dedup_by(|a, b| a.digest == b.digest);
    match fitting.as_slice() {
        [one] => Ok(one),
        [] => Err(OciError::Platform {
            wanted: format!("linux/{architecture}"),
            has: list(named.iter().filter_map(|d| d.platform.as_ref()).map(Platform::shown)),
        }),
        // With names, several entries for one platform are several images; without names they are one image, best variant first.
        [first, ..] if first.names().next().is_none() && first.platform.is_some() => Ok(first),
        several => Err(OciError::Several { names: names(several.iter().copied()) }),
    }
}

fn is_plain(descriptor: &Descriptor) -> bool {
    let variant = descriptor.platform.as_ref().and_then(|p| p.variant.as_deref());
    matches!(variant, None | Some("" | "v1" | "v8"))
}

impl Platform {
    fn shown(&self) -> String {
        shown(&format!("{}/{}", self.os, self.architecture))
    }
}

fn names<'d>(descriptors: impl Iterator<Item = &'d Descriptor>) -> String {
    list(descriptors.map(|d| shown(d.names().last().unwrap_or(&d.digest))))
}

/// Joins a few words.
pub(crate) fn list(words: impl Iterator<Item = String>) -> String {
    let mut words: Vec<String> = words.collect();
    words.dedup();
    let more = words.len().saturating_sub(NAMES_SHOWN);
    words.truncate(NAMES_SHOWN);
    match (words.is_empty(), more) {
        (true, _) => "none".into(),
        (false, 0) => words.join(", "),
        (false, more) => format!("{} and {more} more", words.join(", ")),
    }
}

/// The contents of a configuration.
#[derive(Debug)]
pub(crate) struct Configuration {
    pub(crate) config: ImageConfig,
    /// The digests of the unpacked layers, lowest first.
    pub(crate) diff_ids: Vec<Digest>,
}

impl Configuration {
    /// Parses a configuration, which must be for this machine.
    pub(crate) fn parse(bytes: &[u8], wanted: &str) -> Result<Self, OciError> {
        #[derive(Deserialize)]
        struct Raw {
            architecture: Option<String>,
            os: Option<String>,
            config: Option<Run>,
            rootfs: Option<RootFs>,
        }
        #[derive(Deserialize)]
        struct RootFs {
            diff_ids: Option<Vec<String>>,
        }
        #[derive(Default, Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Run {
            env: Option<Vec<String>>,
            working_dir: Option<String>,
            user: Option<String>,
            entrypoint: Option<Vec<String>>,
            cmd: Option<Vec<String>>,
        }
        let raw: Raw = parse(bytes, "a configuration")?;
        let Some(diff_ids) = raw.rootfs.and_then(|r| r.diff_ids) else {
            return Err(OciError::Document { what: "its configuration names no layers".into() });
        };
        let os = raw.os.unwrap_or_default();
        let architecture = raw.architecture.unwrap_or_default();
        // Some tools leave one of them empty.
        if !(os.is_empty() || os == "linux") || !(architecture.is_empty() || architecture == wanted) {
            return Err(OciError::Platform {
                wanted: format!("linux/{wanted}"),
                has: shown(&format!("{os}/{architecture}")),
            });
        }
        let run = raw.config.unwrap_or_default();
        let some = |text: Option<String>| text.filter(|t| !t.is_empty() && !t.contains('\0'));
        let config = ImageConfig {
            env: run.env.unwrap_or_default().into_iter().filter_map(variable).collect(),
            working_dir: some(run.working_dir),
            user: some(run.user),
            entrypoint: run.entrypoint.unwrap_or_default(),
            cmd: run.cmd.unwrap_or_default(),
        };
        if size(&config) > CONFIG_MAX {
            return Err(OciError::TooLarge {
                what: "what its configuration says of environment and commands".into(),
                limit: ByteSize::bytes(CONFIG_MAX as u64),
            });
        }
        let diff_ids = diff_ids.iter().map(|id| Digest::parse(id)).collect::<Result<_, _>>()?;
        Ok(Self { config, diff_ids })
    }

    /// The layers with the digests of their contents, lowest first.
    pub(crate) fn layers<T>(self, layers: Vec<T>) -> Result<(ImageConfig, Vec<(T, Digest)>), OciError> {
        if layers.len() != self.diff_ids.len() {
            let what =
                format!("it has {} layers but its configuration {}", layers.len(), self.diff_ids.len());
            return Err(OciError::Document { what });
        }
        if layers.len() > LAYERS_MAX {
            return Err(OciError::Document { what: format!("it has more than {LAYERS_MAX} layers") });
        }
        Ok((self.config, layers.into_iter().zip(self.diff_ids).collect()))
    }
}

/// Parses an environment variable; an invalid one is left out.
fn variable(text: String) -> Option<(String, String)> {
    let (name, value) = text.split_once('=')?;
    (!name.is_empty() && !text.contains('\0')).then(|| (name.to_owned(), value.to_owned()))
}

fn size(config: &ImageConfig) -> usize {
    let words = config.env.iter().map(|(k, v)| k.len() + v.len() + 8);
    let lists = config.entrypoint.iter().chain(&config.cmd).map(|w| w.len() + 8);
    let rest = config.working_dir.iter().chain(&config.user).map(String::len);
    words.chain(lists).chain(rest).sum()
}

fn parse<'b, T: Deserialize<'b>>(bytes: &'b [u8], what: &str) -> Result<T, OciError> {
    serde_json::from_slice(bytes).map_err(|e| OciError::Document {
        what: format!("{what} of it cannot be read: {}", shown(&e.to_string())),
    })
}

/// An image in an archive of `docker save`.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Saved {
    pub(crate) config: String,
    #[serde(default)]
    pub(crate) repo_tags: Option<Vec<String>>,
    pub(crate) layers: Vec<String>,
}

impl Saved {
    /// Reads the `manifest.json` of an archive.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Vec<Self>, OciError> {
        parse(bytes, "manifest.json")
    }

    /// Chooses the image of that name, or the only one.
    pub(crate) fn choose<'s>(all: &'s [Self], name: Option<&str>) -> Result<&'s Self, OciError> {
        let tags = |saved: &'s Self| saved.repo_tags.iter().flatten().map(String::as_str);
        let names = || list(all.iter().map(|s| shown(tags(s).next().unwrap_or(&s.config))));
        match (name, all) {
            (Some(name), _) => all
                .iter()
                .find(|saved| tags(saved).any(|tag| tag == name))
                .ok_or_else(|| OciError::NoSuchName { name: shown(name), names: names() }),
            (None, [one]) => Ok(one),
            (None, []) => Err(OciError::Missing { what: "an image".into() }),
            (None, _) => Err(OciError::Several { names: names() }),
        }
    }
}

#[cfg(test)]
mod tests;
