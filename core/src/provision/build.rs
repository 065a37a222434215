//! Builds of templates: computes the digest of all inputs, and makes the image.

use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nexus_schema::id::BuildId;
use nexus_schema::link::InitMode;
use nexus_schema::tools::build::BuildStatus;
use nexus_schema::tools::image::{DEBIAN, DEBIAN_MINIMAL};
use nexus_schema::tools::template::{Overlay, TemplateSpec};
use nexus_schema::{Arch, ErrorCode, Name, ToolError};
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::image::{Recipe, Want, fingerprint, more_packages};
use super::kernel::asset_error;
use super::{Provision, blocking, hex_sha256};
use crate::asset::debian;
use crate::image::{self, Additions};
use crate::op::store_error;
use crate::os::failpoint;
use crate::os::given;
use crate::progress::Progress;
use crate::store::builds;
use crate::store::images::ImageRecord;

/// Increase it when the same inputs make a different image.
const BUILDER: u32 = 2;
/// How much is hashed between two checks for cancellation.
const CHUNK: usize = 1 << 20;

/// Everything that determines an image.
#[derive(Serialize)]
struct Inputs<'a> {
    version: &'a str,
    builder: u32,
    arch: &'a str,
    source: &'a str,
    overlays: Vec<(&'a str, &'a Overlay)>,
    packages: &'a [String],
    init: InitMode,
    size: Option<u64>,
}

/// A template that is ready to be built.
pub(crate) struct Prepared {
    recipe: Recipe,
    /// SHA-256 over all inputs.
    pub(crate) digest: String,
    /// The file or directory that it starts from, with its fingerprint.
    watched: Option<(PathBuf, String)>,
}

impl Provision {
    /// Determines all inputs of a build. `called` is the source that its image will name.
    pub(crate) async fn prepare_build(
        &self,
        spec: &TemplateSpec,
        called: &str,
        owner: &str,
        progress: &Progress,
    ) -> Result<Prepared, ToolError> {
        progress.step("reading the inputs");
        let mut watched = None;
        let (want, content) = if spec.packages.is_empty() {
            match self.want_image(&spec.source).await? {
                Want::File(path) => {
                    let (content, looks) = self.content(&path, true, progress).await?;
                    watched = Some((path.clone(), looks));
                    (Want::File(path), content)
                }
                // Any other source is first made into an image of its own, which other templates can share.
                _ => {
                    let base = self.source_image(&spec.source, owner, progress).await?;
                    let content = of_image(&base);
                    (Want::Installed(Box::new(base)), content)
                }
            }
        } else {
            let base = base_of_packages(&spec.source)?;
            (Want::BuiltIn(base), self.packages(base)?)
        };
        let digest = digest(spec, &content)?;
        let recipe = Recipe {
            want,
            source: Some(called.to_owned()),
            packages: spec.packages.clone(),
            additions: additions(spec)?,
            init: spec.init,
            build: None,
        };
        Ok(Prepared { recipe, digest, watched })
    }

    /// The digest of a build's inputs, if it is known without making anything. `base` is the image that it starts from, if that exists.
    pub(super) async fn digest_beforehand(
        &self,
        spec: &TemplateSpec,
        base: Option<&ImageRecord>,
    ) -> Result<Option<String>, ToolError> {
        let content = if !spec.packages.is_empty() {
            self.packages(base_of_packages(&spec.source)?)?
        } else if let Some(base) = base {
            of_image(base)
        } else if let Want::File(path) = self.want_image(&spec.source).await? {
            self.content(&path, false, &Progress::default()).await?.0
        } else {
            return Ok(None);
        };
        digest(spec, &content).map(Some)
    }

    /// What determines an image of packages: their names, and apt's sources.
    fn packages(&self, base: &str) -> Result<String, ToolError> {
        let configured = debian::configured(&self.apt_root).map_err(asset_error)?;
        let packages = [&image::PACKAGES[..], more_packages(base)].concat();
        Ok(format!("packages {} {configured}", packages.join(",")))
    }

    /// The image that an earlier build made of the same inputs.
    pub(crate) async fn built_before(&self, digest: &str) -> Result<Option<ImageRecord>, ToolError> {
        let digest = digest.to_owned();
        self.store.read(move |db| builds::image_by_digest(db, &digest)).await.map_err(store_error)
    }

    /// Makes the image of a build, or uses one with the same inputs if `cached` allows it; records it in the build's row.
    pub(crate) async fn make_build(
        &self,
        build: BuildId,
        mut prepared: Prepared,
        name: Name,
        cached: bool,
        owner: &str,
        progress: &Progress,
    ) -> Result<ImageRecord, ToolError> {
        prepared.recipe.build = Some(build);
        // Others who wait for this turn will find the row.
        let _turn = self.turn(&format!("build {}", prepared.digest), progress).await?;
        let before = if cached { self.built_before(&prepared.digest).await? } else { None };
        let was_cached = before.is_some();
        let image = match before {
            Some(image) => {
                progress.log(&format!("nothing to do: the image {} is of the same inputs", image.name));
                image
            }
            None => self.make_unchanged(prepared, name, owner, progress).await?,
        };
        failpoint::reach("build-made");
        let id = image.id;
        self.store
            .write(move |tx| builds::finish(tx, build, BuildStatus::Success, was_cached, Some(id), None))
            .await
            .map_err(store_error)?;
        failpoint::reach("build-ended");
        Ok(image)
    }

    /// Makes an image, and checks that its source did not change meanwhile.
    async fn make_unchanged(
        &self,
        prepared: Prepared,
        name: Name,
        owner: &str,
        progress: &Progress,
    ) -> Result<ImageRecord, ToolError> {
        let image = self.make(name, prepared.recipe, owner, progress).await?;
        if let Some((path, looks)) = prepared.watched {
            let of = path.clone();
            let now = blocking(move || fingerprint(&of)).await;
            if now.as_ref().ok() != Some(&looks) {
                self.remove_image(image.id).await?;
                return Err(ToolError::new(
                    ErrorCode::Changed,
                    format!("{} changed while it was read", path.display()),
                )
                .hint("build again when it no longer changes"));
            }
        }
        Ok(image)
    }

    /// The digest of a path's content, and the path's fingerprint. A file with an unchanged fingerprint is not hashed again,
    /// if the digest may be cached.
    async fn content(
        &self,
        path: &Path,
        remember: bool,
        progress: &Progress,
    ) -> Result<(String, String), ToolError> {
        let of = path.to_owned();
        let looks = blocking(move || fingerprint(&of)).await?;
        let meta = fs_err::tokio::metadata(path).await.map_err(|e| ToolError::invalid(format!("{e}")))?;
        if meta.is_dir() {
            return Ok((format!("directory {looks}"), looks));
        }
        let (name, seen) = (path.display().to_string(), format!("{looks} {} {}", meta.dev(), meta.ino()));
        let (asked, look) = (name.clone(), seen.clone());
        let known =
            self.store.read(move |db| builds::hashed(db, &asked, &look)).await.map_err(store_error)?;
        let hash = match known {
            Some(hash) => hash,
            None => {
                let (of, watched) = (path.to_owned(), progress.clone());
                let hash = blocking(move || hash(&of, &watched)).await?;
                if remember {
                    let row = hash.clone();
                    self.store
                        .write(move |tx| builds::remember_hash(tx, &name, &seen, &row))
                        .await
                        .map_err(store_error)?;
                }
                hash
            }
        };
        Ok((format!("file {hash}"), looks))
    }
}

/// The digest of an image that another one starts from.
fn of_image(image: &ImageRecord) -> String {
    format!("image {}", image.sha256)
}

/// The digest of all inputs of a build that starts from `content`.
fn digest(spec: &TemplateSpec, content: &str) -> Result<String, ToolError> {
    let inputs = Inputs {
        version: env!("CARGO_PKG_VERSION"),
        builder: BUILDER,
        arch: Arch::HOST.as_str(),
        source: content,
        overlays: spec.overlays.iter().map(|(path, overlay)| (path.as_str(), overlay)).collect(),
        packages: &spec.packages,
        init: spec.init,
        size: spec.size.map(|size| size.as_bytes()),
    };
    let inputs =
        serde_json::to_vec(&inputs).map_err(|e| ToolError::internal(format!("encode the inputs: {e}")))?;
    Ok(hex_sha256(&inputs))
}

/// The built-in image that packages are installed on; an error if they cannot be.
pub(crate) fn base_of_packages(source: &str) -> Result<&'static str, ToolError> {
    if let Some(base) = [DEBIAN, DEBIAN_MINIMAL].into_iter().find(|base| *base == source) {
        return Ok(base);
    }
    Err(ToolError::invalid(format!(
        "packages cannot be installed on the source `{source}`, only on `{DEBIAN}` and `{DEBIAN_MINIMAL}`"
    ))
    .hint("leave packages out, and install them inside a VM"))
}

/// The additions of a template, decoded and checked.
pub(crate) fn additions(spec: &TemplateSpec) -> Result<Additions, ToolError> {
    let overlays = spec
        .overlays
        .iter()
        .map(|(path, overlay)| Ok((path.clone(), decode(path, overlay)?)))
        .collect::<Result<_, ToolError>>()?;
    Ok(Additions { overlays, for_init: true, size: spec.size })
}

fn decode(path: &str, overlay: &Overlay) -> Result<image::Overlay, ToolError> {
    let content = overlay
        .encoding
        .decode(overlay.content.clone())
        .map_err(|e| ToolError::invalid(format!("the content of the overlay {path} is {e}")))?;
    let mode = overlay.mode.as_deref().unwrap_or("0644");
    let bits = u16::from_str_radix(mode, 8).ok().filter(|bits| *bits <= 0o7777 && mode.len() <= 5);
    let mode = bits.ok_or_else(|| {
        ToolError::invalid(format!("the mode of the overlay {path} is `{mode}`, not octal such as 0755"))
    })?;
    Ok(image::Overlay { content, mode })
}

fn hash(path: &Path, progress: &Progress) -> Result<String, ToolError> {
    let failed = |e: std::io::Error| ToolError::invalid(format!("{e}"));
    let mut file = given::open_file(path).map_err(failed)?;
    let total = file.metadata().map_err(failed)?.len();
    let (mut hash, mut buffer, mut done) = (Sha256::new(), vec![0; CHUNK], 0);
    loop {
        progress.check().map_err(|_| ToolError::new(ErrorCode::Cancelled, "the build was cancelled"))?;
        let read = file.read(&mut buffer).map_err(failed)?;
        if read == 0 {
            return Ok(data_encoding::HEXLOWER.encode(&hash.finalize()));
        }
        hash.update(&buffer[..read]);
        done += read as u64;
        progress.advance(done, Some(total));
    }
}
