//! Images.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nexus_schema::id::{BuildId, ImageId, ImageKind, TemplateKind};
use nexus_schema::link::{ImageMetadata, InitMode};
use nexus_schema::tools::image::{BUILT_IN, BUSYBOX, DEBIAN};
use nexus_schema::{Arch, ByteSize, ErrorCode, Name, Reference, ToolError};

use super::oci::{self, Argument, Saved};
use super::{Provision, blocking, file_argument, hex_sha256, slug};
use crate::access::Charge;
use crate::image::oci::{Remote, Resolved};
use crate::image::{self, Additions, ImageError, Limits, Source};
use crate::op::{described, store_error};
use crate::os::failpoint;
use crate::progress::Progress;
use crate::provision::kernel::asset_error;
use crate::store::assets::AssetRecord;
use crate::store::images::ImageRecord;
use crate::store::{StoreError, builds, images, now, random_id, templates};

/// The package with its program.
pub(super) const BUSYBOX_PACKAGE: &str = "busybox-static";

/// Which image is wanted.
pub(super) enum Want {
    /// An existing image.
    Installed(Box<ImageRecord>),
    /// An image that is made on first use.
    BuiltIn(&'static str),
    /// A file or directory on the host.
    File(PathBuf),
    /// An OCI or Docker image in a file or directory on the host.
    Saved(Saved),
    /// An image in a registry.
    Remote(Remote),
    /// The same, resolved to a digest.
    Resolved(Box<Resolved>),
    /// A root filesystem of a provider.
    Rootfs(String),
    /// The same, after it was downloaded.
    Asset(Box<AssetRecord>),
    /// A copy of a VM's root drive.
    Copied(Box<Copied>),
}

/// A copy of a VM's root drive, of which an image is made.
#[derive(Debug, Clone)]
pub(crate) struct Copied {
    /// The VM's name.
    pub(crate) vm: Name,
    /// The copy, which nobody else uses.
    pub(crate) file: PathBuf,
    /// The image that the drive was made from: how it should be run is kept.
    pub(crate) image: Option<ImageRecord>,
    /// What was PID 1.
    pub(crate) init: InitMode,
}

impl Want {
    /// The argument that means it.
    pub(super) fn source(&self) -> String {
        match self {
            Self::BuiltIn(name) => (*name).to_owned(),
            Self::File(path) => format!("file:{}", path.display()),
            Self::Installed(image) => format!("image:{}", image.name),
            Self::Saved(saved) => saved.source(),
            Self::Remote(remote) => format!("oci:{}", remote.reference()),
            Self::Resolved(resolved) => format!("oci:{}", resolved.reference()),
            Self::Rootfs(from) => format!("rootfs:{from}"),
            Self::Asset(asset) => format!("rootfs:{}@{}", asset.provider, asset.version),
            Self::Copied(copied) => format!("vm:{}", copied.vm),
        }
    }
}

/// How an image is made.
pub(super) struct Recipe {
    /// What it starts from.
    pub(super) want: Want,
    /// The name of the source, if it says more than `want`.
    pub(super) source: Option<String>,
    /// Packages in addition to those that every such image has.
    pub(super) packages: Vec<String>,
    /// What is added to the source.
    pub(super) additions: Additions,
    /// What is PID 1.
    pub(super) init: InitMode,
    /// The build that it is for.
    pub(super) build: Option<BuildId>,
}

impl Recipe {
    fn plain(want: Want, init: InitMode) -> Self {
        let additions = Additions { for_init: init == InitMode::System, ..Additions::default() };
        Self { want, source: None, packages: Vec::new(), additions, init, build: None }
    }
}

impl Provision {
    pub(super) async fn want_image(&self, want: &str) -> Result<Want, ToolError> {
        if let Some(path) = want.strip_prefix("file:") {
            return file_argument(&self.looks, want, path).await.map(Want::File);
        }
        match oci::argument(want, &self.registries, &self.looks).await? {
            Some(Argument::Remote(remote)) => return Ok(Want::Remote(remote)),
            Some(Argument::Saved(saved)) => return Ok(Want::Saved(saved)),
            None => {}
        }
        if let Some(from) = want.strip_prefix("rootfs:") {
            self.check_rootfs(from).await?;
            return Ok(Want::Rootfs(from.to_owned()));
        }
        let bare = want.strip_prefix("image:").unwrap_or(want);
        if let Ok(reference) = bare.parse::<Reference<ImageKind>>() {
            let found = self.store.read(move |db| images::get(db, &reference)).await.map_err(store_error)?;
            match found {
                Some(image) if image.ready => return Ok(Want::Installed(Box::new(image))),
                Some(_) | None => {}
            }
        }
        match BUILT_IN.into_iter().find(|name| *name == bare) {
            Some(name) => Ok(Want::BuiltIn(name)),
            None => Err(self.no_source(bare).await?),
        }
    }

    /// Refuses an image that cannot exist, as far as that is known at once.
    pub(crate) async fn check_image(&self, want: &str) -> Result<(), ToolError> {
        if let Some(template) = template_argument(want) {
            let template = template?;
            let wanted = template.clone();
            let found = self.store.read(move |db| templates::get(db, &wanted)).await.map_err(store_error)?;
            return match found {
                Some(_) => Ok(()),
                None => Err(self.no_template(&template).await?),
            };
        }
        self.want_image(want).await.map(drop)
    }

    /// The architecture of VMs that start from this image, as far as it is known before the image exists; or else the host's.
    pub(crate) async fn arch_of_image(&self, want: &str) -> Result<Arch, ToolError> {
        if template_argument(want).is_some() {
            return Ok(Arch::HOST);
        }
        match self.want_image(want).await? {
            Want::Installed(image) => Arch::known(&image.arch),
            _ => Ok(Arch::HOST),
        }
    }

    /// The wanted image, which is made if it does not exist.
    pub(super) async fn source_image(
        &self,
        want: &str,
        owner: &str,
        progress: &Progress,
    ) -> Result<ImageRecord, ToolError> {
        match self.want_image(want).await? {
            Want::Installed(image) => Ok(*image),
            want => {
                let (want, name) = match want {
                    Want::Rootfs(from) => {
                        let asset = self.rootfs(&from, owner, progress).await?;
                        let name = Self::image_of_rootfs(&asset)?;
                        (Want::Asset(Box::new(asset)), name)
                    }
                    want => self.identify(want, Some(progress)).await?,
                };
                let _turn = self.turn(&format!("image {name}"), progress).await?;
                // Another call may have made it meanwhile.
                let reference = Reference::Name(name.clone());
                let found =
                    self.store.read(move |db| images::get(db, &reference)).await.map_err(store_error)?;
                match found {
                    Some(image) if image.ready => Ok(image),
                    _ => self.make(name, Recipe::plain(want, InitMode::Agent), owner, progress).await,
                }
            }
        }
    }

    /// The name of the image for the current state of a source; it is the same while the source is unchanged.
    pub(super) async fn identify(
        &self,
        want: Want,
        progress: Option<&Progress>,
    ) -> Result<(Want, Name), ToolError> {
        let stem =
            |path: &Path| path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let print = |path: &Path| {
            let of = path.to_owned();
            blocking(move || fingerprint(&of))
        };
        Ok(match want {
            Want::File(path) => {
                let name = slug("file-", &stem(&path), Some(&print(&path).await?))?;
                (Want::File(path), name)
            }
            Want::Saved(saved) => {
                let digest = hex_sha256(format!("{}\0{:?}", print(&saved.path).await?, saved).as_bytes());
                let name = slug("oci-", &stem(&saved.path), Some(&digest))?;
                (Want::Saved(saved), name)
            }
            Want::Remote(remote) => {
                if let Some(progress) = progress {
                    progress.step("asking the registry");
                }
                let asked = Box::pin(remote.resolve());
                let resolved = match progress {
                    None => asked.await,
                    Some(progress) => tokio::select! {
                        resolved = asked => resolved,
                        () = progress.cancelled() => return Err(image_error(ImageError::Cancelled)),
                    },
                };
                let resolved = resolved.map_err(|e| image_error(e.into()))?;
                let name = slug("oci-", &remote.short(), Some(resolved.hex()))?;
                (Want::Resolved(Box::new(resolved)), name)
            }
            Want::Resolved(resolved) => {
                let name = slug("oci-", "", Some(resolved.hex()))?;
                (Want::Resolved(resolved), name)
            }
            Want::Rootfs(_) | Want::Asset(_) => {
                return Err(ToolError::internal("a root filesystem is named by its asset"));
            }
            Want::Installed(image) => {
                let name = image.name.clone();
                (Want::Installed(image), name)
            }
            Want::Copied(copied) => {
                let name = copied.vm.clone();
                (Want::Copied(copied), name)
            }
            Want::BuiltIn(name) => {
                let named = name.parse().map_err(|e| ToolError::internal(format!("{e}")))?;
                (Want::BuiltIn(name), named)
            }
        })
    }

    /// `image_create`: always a new image.
    pub(crate) async fn create_image(
        &self,
        from: &str,
        name: Name,
        init: InitMode,
        owner: &str,
        progress: &Progress,
    ) -> Result<ImageRecord, ToolError> {
        let want = match BUILT_IN.into_iter().find(|b| *b == from) {
            Some(name) => Want::BuiltIn(name),
            None => match self.want_image(from).await? {
                Want::Rootfs(from) => Want::Asset(Box::new(self.rootfs(&from, owner, progress).await?)),
                want @ Want::Remote(_) => self.identify(want, Some(progress)).await?.0,
                want => want,
            },
        };
        let _turn = self.turn(&format!("image {name}"), progress).await?;
        self.make(name, Recipe::plain(want, init), owner, progress).await
    }

    /// Makes an image of a copy of a VM's root drive. What the VM was set up with by its own init is kept as it is.
    pub(crate) async fn create_image_of_copy(
        &self,
        copied: Copied,
        name: Name,
        init: InitMode,
        owner: &str,
        progress: &Progress,
    ) -> Result<ImageRecord, ToolError> {
        let had_init = copied.init == InitMode::System;
        let mut recipe = Recipe::plain(Want::Copied(Box::new(copied)), init);
        recipe.additions.for_init &= !had_init;
        let _turn = self.turn(&format!("image {name}"), progress).await?;
        self.make(name, recipe, owner, progress).await
    }

    /// The default name of an image made from this source.
    pub(crate) async fn image_name(&self, from: &str) -> Result<Name, ToolError> {
        if let Some(from) = from.strip_prefix("rootfs:") {
            return slug("rootfs-", from, None);
        }
        if let Ok(name) = from.parse() {
            return Ok(name);
        }
        match self.want_image(from).await? {
            want @ (Want::File(_) | Want::Saved(_) | Want::Remote(_)) => {
                Ok(self.identify(want, None).await?.1)
            }
            // Made under its own name, as on first use.
            Want::BuiltIn(name) => name.parse().map_err(|e| ToolError::internal(format!("{e}"))),
            Want::Installed(image) => slug("copy-of-", image.name.as_str(), None),
            _ => from.parse().map_err(|e| ToolError::invalid(format!("{e}"))),
        }
    }

    /// Makes an image; a failure leaves nothing behind.
    pub(super) async fn make(
        &self,
        name: Name,
        recipe: Recipe,
        owner: &str,
        progress: &Progress,
    ) -> Result<ImageRecord, ToolError> {
        let id: ImageId = random_id();
        let host = Arch::HOST.as_str().to_owned();
        let record = ImageRecord {
            id,
            parent_id: match &recipe.want {
                Want::Installed(image) => Some(image.id),
                Want::Copied(copied) => copied.image.as_ref().map(|image| image.id),
                _ => None,
            },
            name: name.clone(),
            source: recipe.source.clone().unwrap_or_else(|| recipe.want.source()),
            ready: false,
            distro: None,
            init: recipe.init,
            has_init: None,
            config: match &recipe.want {
                Want::Installed(image) => image.config.clone(),
                Want::Copied(copied) => copied.image.as_ref().and_then(|image| image.config.clone()),
                _ => None,
            },
            arch: match &recipe.want {
                Want::Installed(image) => image.arch.clone(),
                Want::Copied(copied) => copied.image.as_ref().map_or(host, |image| image.arch.clone()),
                _ => host,
            },
            size: ByteSize::default(),
            used_bytes: 0,
            sha256: String::new(),
            owner: owner.into(),
            created_at: now(),
        };
        let charges = self.charges_of_image(&name, owner);
        let (row, build, charged) = (record.clone(), recipe.build, charges.clone());
        self.store
            .write(move |tx| -> Result<(), StoreError> {
                charged.iter().try_for_each(|charge| charge.check_room(tx))?;
                images::insert(tx, &row)?;
                match build {
                    Some(build) => builds::set_image(tx, build, row.id),
                    None => Ok(()),
                }
            })
            .await
            .map_err(store_error)?;
        failpoint::reach("image-begun");
        let scratch = self.scratch.claim(id);
        let directory = scratch.path();
        let built = tokio::select! {
            built = self.make_files(&record, recipe, charges, &directory, progress) => built,
            () = progress.cancelled() => {
                Err(ToolError::new(ErrorCode::Cancelled, format!("making image {name} was cancelled")))
            }
        };
        scratch.clear().await;
        if built.is_err() {
            self.remove_image(id).await?;
        }
        built
    }

    /// Removes an unused image: first its files, then its row, so that space on a full disk is freed first.
    pub(crate) async fn remove_image(&self, id: ImageId) -> Result<(), ToolError> {
        crate::os::remove::tree(&self.paths.image(id)).await;
        self.store.write(move |tx| images::delete(tx, id)).await.map_err(store_error)
    }

    async fn make_files(
        &self,
        record: &ImageRecord,
        recipe: Recipe,
        charges: Vec<Charge>,
        scratch: &Path,
        progress: &Progress,
    ) -> Result<ImageRecord, ToolError> {
        let mut keyring = None;
        let source = match recipe.want {
            Want::BuiltIn(BUSYBOX) => {
                progress.step("downloading busybox");
                let archive = self.archive(progress).await?;
                let fetched = archive
                    .fetch_package_file(BUSYBOX_PACKAGE, "./bin/busybox", scratch, progress)
                    .await
                    .map_err(asset_error)?;
                Source::Busybox { binary: fetched.path }
            }
            Want::BuiltIn(name) => {
                progress.step("reading the package archive");
                let archive = self.archive(progress).await?;
                let packages = archive.bootstrap_source().map_err(asset_error)?;
                let more = more_packages(name).iter().map(|package| (*package).to_owned());
                let more: Vec<String> = more.chain(recipe.packages).collect();
                let bootstrap = self.bootstrap(&packages, &more);
                // Keeps the keyring's file as long as it is referred to.
                keyring = Some(packages);
                Source::Bootstrap(bootstrap)
            }
            Want::File(path) => blocking(move || Source::detect(&path).map_err(image_error)).await?,
            Want::Asset(asset) => self.rootfs_source(&asset)?,
            Want::Rootfs(from) => return Err(ToolError::internal(format!("rootfs:{from} is not here yet"))),
            Want::Installed(image) => Source::Ext4(self.paths.image(image.id).join(image::ROOTFS)),
            Want::Saved(Saved { path, form, name }) => Source::Saved { path, form, name },
            Want::Remote(remote) => {
                let resolved = Box::pin(remote.resolve()).await;
                Source::Remote(Box::new(resolved.map_err(|e| image_error(e.into()))?))
            }
            Want::Resolved(resolved) => Source::Remote(resolved),
            Want::Copied(copied) => Source::Filesystem(copied.file),
        };
        let metadata = ImageMetadata {
            name: record.name.to_string(),
            build_id: Some(record.id.to_string()),
            distro: None,
            init: record.init,
            config: record.config.clone().map(Box::new),
        };
        let into = self.paths.image(record.id);
        let built =
            image::build_with(source, &into, &metadata, &recipe.additions, Limits::default(), progress)
                .await
                .map_err(image_error)?;
        built.notes.iter().for_each(|note| progress.log(note));
        drop(keyring);
        let whole = ImageRecord {
            ready: true,
            distro: built.distro,
            arch: built.arch.map_or_else(|| record.arch.clone(), |arch| arch.as_str().to_owned()),
            init: record.init,
            has_init: Some(built.init_system.is_some()),
            config: built.config,
            size: built.size,
            used_bytes: built.used_bytes,
            sha256: built.sha256,
            ..record.clone()
        };
        let row = whole.clone();
        let held = self.store.write(move |tx| {
            // Only now it is known how large it is.
            images::set_ready(tx, &row)?;
            charges.iter().try_for_each(|charge| charge.check_held(tx))
        });
        held.await.map_err(store_error)?;
        failpoint::reach("image-ready");
        tracing::info!(image = %whole.name, source = whole.source, "image made");
        Ok(whole)
    }
}

/// Packages that a built-in image has in addition to [`image::PACKAGES`].
pub(super) fn more_packages(name: &str) -> &'static [&'static str] {
    if name == DEBIAN { &image::FOR_WORK } else { &[] }
}

/// The template that `template:NAME` means; `None` for anything else.
pub(crate) fn template_argument(from: &str) -> Option<Result<Reference<TemplateKind>, ToolError>> {
    let name = from.strip_prefix("template:")?;
    Some(name.parse().map_err(|e| ToolError::invalid(format!("{e}"))))
}

/// A fingerprint of a file or tree that shows whether it changed: names, sizes, modes, owners and times, not
/// contents. Every change of content updates the change time (`ctime`), which only the kernel sets.
pub(super) fn fingerprint(path: &Path) -> Result<String, ToolError> {
    const ENTRIES_MAX: usize = 5_000_000;
    let refuse = |error: std::io::Error| ToolError::invalid(format!("{error}"));
    let mut lines = Vec::new();
    let mut queue = vec![path.to_owned()];
    while let Some(path) = queue.pop() {
        let meta = fs_err::symlink_metadata(&path).map_err(refuse)?;
        lines.push(format!(
            "{}\0{}\0{:o}\0{}\0{}\0{}.{}\0{}.{}",
            path.display(),
            meta.size(),
            meta.mode(),
            meta.uid(),
            meta.gid(),
            meta.mtime(),
            meta.mtime_nsec(),
            meta.ctime(),
            meta.ctime_nsec()
        ));
        if lines.len() > ENTRIES_MAX {
            return Err(ToolError::invalid(format!(
                "{} has more than {ENTRIES_MAX} entries",
                path.display()
            )));
        }
        if meta.is_dir() {
            for entry in fs_err::read_dir(&path).map_err(refuse)? {
                queue.push(entry.map_err(refuse)?.path());
            }
        }
    }
    lines.sort_unstable();
    Ok(hex_sha256(lines.join("\n").as_bytes()))
}

pub(super) fn image_error(error: ImageError) -> ToolError {
    described(error.code(), &error, error.hint())
}
