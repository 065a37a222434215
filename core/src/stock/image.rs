//! Images.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nexus_schema::id::{ImageId, ImageKind};
use nexus_schema::link::{ImageMetadata, InitMode};
use nexus_schema::{ByteSize, ErrorCode, Name, Reference, ToolError};

use super::{DEBIAN, Stock, blocking, file_argument, hex_sha256, slug};
use crate::asset::debian::Archive;
use crate::image::{self, Bootstrap, ImageError, Source};
use crate::nexus::described;
use crate::op::{Progress, store_error};
use crate::stock::kernel::asset_error;
use crate::store::assets::AssetRecord;
use crate::store::images::ImageRecord;
use crate::store::{images, now, random_id};

/// The static shell that the tiny image is made of.
const BUSYBOX: &str = "busybox";
/// Images that are made on first use.
pub(crate) const BUILT_IN: [&str; 2] = [BUSYBOX, DEBIAN];

/// Which image was asked for.
enum Want {
    /// One that is here.
    Installed(Box<ImageRecord>),
    /// One that is made on first use.
    BuiltIn(&'static str),
    /// A file or directory on the host.
    File(PathBuf),
    /// A root filesystem of a provider.
    Rootfs(String),
    /// The same, now that it is here.
    Asset(Box<AssetRecord>),
}

impl Stock {
    async fn want_image(&self, want: &str) -> Result<Want, ToolError> {
        if let Some(path) = want.strip_prefix("file:") {
            return file_argument(want, path).map(Want::File);
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
            None => Err(ToolError::new(ErrorCode::ImageNotFound, format!("there is no image `{want}`"))
                .hint("call image_list to see the images, or give `debian`, `busybox`, rootfs:PROVIDER@VERSION or file:PATH")),
        }
    }

    /// Refuses an image that cannot be had, as far as that can be told at once.
    pub(crate) async fn check_image(&self, want: &str) -> Result<(), ToolError> {
        self.want_image(want).await.map(drop)
    }

    /// The image that was asked for, made if it is not here.
    pub(crate) async fn image(
        &self,
        want: &str,
        owner: &str,
        progress: &Progress,
    ) -> Result<ImageRecord, ToolError> {
        match self.want_image(want).await? {
            Want::Installed(image) => Ok(*image),
            Want::BuiltIn(name) => {
                let turn = self.only_one(&format!("image {name}")).await;
                // Somebody else may have made it meanwhile.
                if let Want::Installed(image) = self.want_image(name).await? {
                    return Ok(*image);
                }
                let named = name.parse().map_err(|e| ToolError::internal(format!("{e}")))?;
                let made = self.build(named, Want::BuiltIn(name), InitMode::Agent, owner, progress).await;
                drop(turn);
                made
            }
            Want::Rootfs(from) => {
                let asset = self.rootfs(&from, owner, progress).await?;
                let name = Self::image_of_rootfs(&asset)?;
                let _turn = self.only_one(&format!("image {name}")).await;
                let reference = Reference::Name(name.clone());
                let found =
                    self.store.read(move |db| images::get(db, &reference)).await.map_err(store_error)?;
                match found {
                    Some(image) if image.ready => Ok(image),
                    _ => {
                        let want = Want::Asset(Box::new(asset));
                        self.build(name, want, InitMode::Agent, owner, progress).await
                    }
                }
            }
            // What is wanted is never known as an asset before it is looked for.
            Want::Asset(_) => Err(ToolError::internal(format!("{want} is an asset already"))),
            Want::File(path) => {
                let of = path.clone();
                let digest = blocking(move || fingerprint(&of)).await?;
                let stem = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
                let name = slug("file-", &stem, Some(&digest))?;
                let _turn = self.only_one(&format!("image {name}")).await;
                let reference = Reference::Name(name.clone());
                let found =
                    self.store.read(move |db| images::get(db, &reference)).await.map_err(store_error)?;
                match found {
                    Some(image) if image.ready => Ok(image),
                    _ => self.build(name, Want::File(path), InitMode::Agent, owner, progress).await,
                }
            }
        }
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
                want => want,
            },
        };
        let _turn = self.only_one(&format!("image {name}")).await;
        self.build(name, want, init, owner, progress).await
    }

    /// The name that an image of this source gets when none is given.
    pub(crate) async fn image_name(&self, from: &str) -> Result<Name, ToolError> {
        match from.strip_prefix("file:") {
            Some(path) => {
                let path = file_argument(from, path)?;
                let stem = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
                let of = path.clone();
                slug("file-", &stem, Some(&blocking(move || fingerprint(&of)).await?))
            }
            None => match from.strip_prefix("rootfs:") {
                Some(from) => slug("rootfs-", from, None),
                None => from.parse().map_err(|e| ToolError::invalid(format!("{e}"))),
            },
        }
    }

    async fn build(
        &self,
        name: Name,
        want: Want,
        init: InitMode,
        owner: &str,
        progress: &Progress,
    ) -> Result<ImageRecord, ToolError> {
        let id: ImageId = random_id();
        let record = ImageRecord {
            id,
            parent_id: None,
            name: name.clone(),
            source: match &want {
                Want::BuiltIn(name) => (*name).to_owned(),
                Want::File(path) => format!("file:{}", path.display()),
                Want::Installed(image) => format!("image:{}", image.name),
                Want::Rootfs(from) => format!("rootfs:{from}"),
                Want::Asset(asset) => format!("rootfs:{}@{}", asset.provider, asset.version),
            },
            ready: false,
            distro: None,
            init,
            arch: std::env::consts::ARCH.into(),
            size: ByteSize::default(),
            used_bytes: 0,
            sha256: String::new(),
            owner: owner.into(),
            created_at: now(),
        };
        let row = record.clone();
        self.store.write(move |tx| images::insert(tx, &row)).await.map_err(store_error)?;
        let built = tokio::select! {
            built = self.build_files(&record, want, progress) => built,
            () = progress.cancelled() => {
                Err(ToolError::new(ErrorCode::Cancelled, format!("making image {name} was cancelled")))
            }
        };
        if built.is_err() {
            self.store.write(move |tx| images::delete(tx, id)).await.map_err(store_error)?;
            crate::nexus::remove_tree(&self.paths.image(id)).await;
        }
        built
    }

    async fn build_files(
        &self,
        record: &ImageRecord,
        want: Want,
        progress: &Progress,
    ) -> Result<ImageRecord, ToolError> {
        let mut keyring = None;
        let source = match want {
            Want::BuiltIn(BUSYBOX) => {
                progress.step("downloading busybox");
                let archive = Archive::open(&self.apt_root, progress).await.map_err(asset_error)?;
                let into = self.paths.scratch().join(record.id.to_string());
                let fetched = archive
                    .fetch_package_file("busybox-static", "./bin/busybox", &into, progress)
                    .await
                    .map_err(asset_error)?;
                Source::Busybox { binary: fetched.path }
            }
            Want::BuiltIn(_) => {
                progress.step("reading the package archive");
                let archive = Archive::open(&self.apt_root, progress).await.map_err(asset_error)?;
                let packages = archive.bootstrap_source();
                let bootstrap = Bootstrap {
                    mirrors: packages.mirrors.clone(),
                    suite: packages.suite.clone(),
                    keyring: packages.keyring.clone(),
                    distro: packages.distro.clone(),
                    proxy: packages.proxy.clone(),
                    check_valid_until: packages.check_valid_until,
                    packages: image::PACKAGES.iter().map(|p| (*p).to_owned()).collect(),
                };
                // The keyring's file is there as long as what names it.
                keyring = Some(packages);
                Source::Bootstrap(bootstrap)
            }
            Want::File(path) => Source::detect(&path).map_err(image_error)?,
            Want::Asset(asset) => self.rootfs_source(&asset)?,
            Want::Rootfs(from) => return Err(ToolError::internal(format!("rootfs:{from} is not here yet"))),
            Want::Installed(image) => Source::Ext4(self.paths.image(image.id).join(image::ROOTFS)),
        };
        let metadata = ImageMetadata {
            name: record.name.to_string(),
            build_id: Some(record.id.to_string()),
            distro: None,
            init: record.init,
        };
        let built = image::build(source, &self.paths.image(record.id), &metadata, progress)
            .await
            .map_err(image_error)?;
        drop(keyring);
        crate::nexus::remove_tree(&self.paths.scratch().join(record.id.to_string())).await;
        let whole = ImageRecord {
            ready: true,
            distro: built.distro,
            init: record.init,
            size: built.size,
            used_bytes: built.used_bytes,
            sha256: built.sha256,
            ..record.clone()
        };
        let row = whole.clone();
        self.store.write(move |tx| images::set_ready(tx, &row)).await.map_err(store_error)?;
        tracing::info!(image = %whole.name, source = whole.source, "image made");
        Ok(whole)
    }
}

/// Tells whether a file or tree is still what it was: names, sizes, modes, owners and times, not contents.
fn fingerprint(path: &Path) -> Result<String, ToolError> {
    const ENTRIES_MAX: usize = 5_000_000;
    let refuse = |error: std::io::Error| ToolError::invalid(format!("{error}"));
    let mut lines = Vec::new();
    let mut queue = vec![path.to_owned()];
    while let Some(path) = queue.pop() {
        let meta = fs_err::symlink_metadata(&path).map_err(refuse)?;
        lines.push(format!(
            "{}\0{}\0{:o}\0{}\0{}\0{}.{}",
            path.display(),
            meta.size(),
            meta.mode(),
            meta.uid(),
            meta.gid(),
            meta.mtime(),
            meta.mtime_nsec()
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

fn image_error(error: ImageError) -> ToolError {
    described(error.code(), &error, error.hint())
}
