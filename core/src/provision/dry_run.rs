//! Dry runs: what would be found, downloaded or made.

use nexus_schema::tools::asset::AssetKind;
use nexus_schema::tools::image::{BUILT_IN, BUSYBOX};
use nexus_schema::tools::plan::{PlanAction, PlanStep, PlanThing};
use nexus_schema::tools::template::TemplateSpec;
use nexus_schema::{Arch, Name, Reference, ToolError};

use super::image::{BUSYBOX_PACKAGE, Want, image_error};
use super::kernel::{arch_of_version, asset_error};
use super::rootfs::wanted_rootfs;
use super::wanted::WantedAsset;
use super::{DEBIAN, Provision, blocking};
use crate::asset::check_kernel;
use crate::image::Source;
use crate::op::store_error;
use crate::os::given::Kind;
use crate::progress::Progress;
use crate::store::assets::AssetRecord;
use crate::store::images::{self, ImageRecord};

/// How an image would be obtained.
#[derive(Debug, Default)]
pub(crate) struct ImagePlan {
    /// What would be done.
    pub(crate) steps: Vec<PlanStep>,
    /// The image, if it exists.
    pub(crate) image: Option<ImageRecord>,
}

/// A step with only an action and its object.
pub(crate) fn step(action: PlanAction, what: PlanThing) -> PlanStep {
    PlanStep { action, what, name: None, source: None, size: None, bytes: None }
}

impl Provision {
    /// Where the kernel would come from, for a VM of an architecture.
    pub(crate) async fn plan_kernel(&self, want: &str, arch: Arch) -> Result<PlanStep, ToolError> {
        use super::kernel::Want;
        let of_kernel = |action| step(action, PlanThing::Kernel);
        let version = match self.want_kernel(want).await? {
            Want::Installed(asset) => return Ok(used(&asset, PlanThing::Kernel)),
            Want::File(path) => {
                let bytes = match self.looks.kind(path.clone()).await {
                    Ok(Kind::File { bytes }) => Some(bytes),
                    Ok(Kind::Directory) | Err(_) => None,
                };
                blocking(move || check_kernel(&path).map_err(asset_error)).await?;
                return Ok(PlanStep {
                    source: Some(want.to_owned()),
                    bytes,
                    ..of_kernel(PlanAction::Import)
                });
            }
            Want::Debian(version) => version,
        };
        let arch = arch_of_version(version.as_deref()).unwrap_or(arch);
        if let Some(asset) = self.installed_debian(version.clone(), arch).await? {
            return Ok(used(&asset, PlanThing::Kernel));
        }
        let wanted = WantedAsset {
            kind: AssetKind::Kernel,
            from: Some(DEBIAN.into()),
            version,
            name: None,
            sha256: None,
            unverified: false,
        };
        self.plan_download(wanted, arch, PlanThing::Kernel).await
    }

    /// How the image that `from` means would be obtained, if that is not a template.
    pub(crate) async fn plan_image(&self, from: &str) -> Result<ImagePlan, ToolError> {
        let (want, name) = match self.want_image(from).await? {
            Want::Installed(image) => return Ok(ImagePlan::here(*image)),
            Want::BuiltIn(name) => return self.plan_making(Want::BuiltIn(name), name.parse().ok()).await,
            Want::Rootfs(from) => match self.installed_rootfs(&from).await? {
                Some(asset) => {
                    let name = Self::image_of_rootfs(&asset)?;
                    (Want::Asset(Box::new(asset)), name)
                }
                None => return self.plan_making(Want::Rootfs(from), None).await,
            },
            want => self.identify(want, None).await?,
        };
        let reference = Reference::Name(name.clone());
        let found = self.store.read(move |db| images::get(db, &reference)).await.map_err(store_error)?;
        match found.filter(|image| image.ready) {
            Some(image) => Ok(ImagePlan::here(image)),
            None => self.plan_making(want, Some(name)).await,
        }
    }

    /// How a new image of `from` would be made, if that is not a template: `image_create` makes one even if one exists.
    pub(crate) async fn plan_new_image(&self, from: &str, name: Name) -> Result<ImagePlan, ToolError> {
        let want = match BUILT_IN.into_iter().find(|built_in| *built_in == from) {
            Some(built_in) => Want::BuiltIn(built_in),
            None => match self.want_image(from).await? {
                Want::Rootfs(from) => match self.installed_rootfs(&from).await? {
                    Some(asset) => Want::Asset(Box::new(asset)),
                    None => Want::Rootfs(from),
                },
                want @ Want::Remote(_) => self.identify(want, None).await?.0,
                want => want,
            },
        };
        self.plan_making(want, Some(name)).await
    }

    /// The image that a build of a template would use: one with the same inputs, if it exists.
    pub(crate) async fn plan_build(&self, spec: &TemplateSpec, called: &str) -> Result<ImagePlan, ToolError> {
        let mut base = ImagePlan::default();
        if spec.packages.is_empty() && !matches!(self.want_image(&spec.source).await?, Want::File(_)) {
            base = self.plan_image(&spec.source).await?;
        }
        if let Some(digest) = self.digest_beforehand(spec, base.image.as_ref()).await?
            && let Some(image) = self.built_before(&digest).await?
        {
            return Ok(ImagePlan::here(image));
        }
        if !spec.packages.is_empty() {
            base.steps.push(packages_of(&spec.source));
        }
        let build = PlanStep {
            source: Some(called.to_owned()),
            size: spec.size,
            ..step(PlanAction::Build, PlanThing::Image)
        };
        base.steps.push(build);
        Ok(ImagePlan { steps: base.steps, image: None })
    }

    async fn plan_making(&self, want: Want, name: Option<Name>) -> Result<ImagePlan, ToolError> {
        let mut steps = Vec::new();
        match &want {
            Want::Rootfs(from) => {
                steps.push(self.plan_download(wanted_rootfs(from), Arch::HOST, PlanThing::Rootfs).await?);
            }
            Want::Asset(asset) => steps.push(used(asset, PlanThing::Rootfs)),
            Want::Installed(image) => steps.extend(ImagePlan::here((**image).clone()).steps),
            Want::Resolved(resolved) => steps.push(PlanStep {
                source: Some(want.source()),
                bytes: Some(resolved.download_bytes().await.map_err(|e| image_error(e.into()))?),
                ..step(PlanAction::Download, PlanThing::Layers)
            }),
            Want::BuiltIn(BUSYBOX) => steps.push(self.plan_busybox().await?),
            Want::BuiltIn(name) => steps.push(packages_of(name)),
            Want::File(path) => {
                let path = path.clone();
                blocking(move || Source::detect(&path).map(drop).map_err(image_error)).await?;
            }
            Want::Saved(_) | Want::Remote(_) | Want::Copied(_) => {}
        }
        steps.push(PlanStep {
            name: name.map(|name| name.to_string()),
            source: Some(want.source()),
            ..step(PlanAction::Build, PlanThing::Image)
        });
        Ok(ImagePlan { steps, image: None })
    }

    async fn plan_busybox(&self) -> Result<PlanStep, ToolError> {
        let archive = self.archive(&Progress::default()).await?;
        let (version, bytes) = archive.find_package(BUSYBOX_PACKAGE).await.map_err(asset_error)?;
        Ok(PlanStep {
            name: Some(BUSYBOX_PACKAGE.into()),
            source: Some(format!("{DEBIAN}@{version}")),
            bytes: Some(bytes),
            ..step(PlanAction::Download, PlanThing::Packages)
        })
    }

    async fn plan_download(
        &self,
        wanted: WantedAsset,
        arch: Arch,
        what: PlanThing,
    ) -> Result<PlanStep, ToolError> {
        let found = self.look_up_for(arch, wanted, &Progress::default()).await?;
        Ok(PlanStep {
            name: Some(found.name.to_string()),
            source: Some(format!("{}@{}", found.provider, found.version)),
            bytes: found.size_bytes,
            ..step(PlanAction::Download, what)
        })
    }
}

impl ImagePlan {
    fn here(image: ImageRecord) -> Self {
        let used = PlanStep {
            name: Some(image.name.to_string()),
            source: Some(image.origin(false).to_owned()),
            size: Some(image.size),
            bytes: Some(image.used_bytes),
            ..step(PlanAction::Use, PlanThing::Image)
        };
        Self { steps: vec![used], image: Some(image) }
    }
}

/// mmdebstrap chooses these packages, so their size is known only afterwards.
fn packages_of(source: &str) -> PlanStep {
    PlanStep { source: Some(source.to_owned()), ..step(PlanAction::Download, PlanThing::Packages) }
}

fn used(asset: &AssetRecord, what: PlanThing) -> PlanStep {
    PlanStep {
        name: Some(asset.name.to_string()),
        source: Some(format!("{}@{}", asset.provider, asset.version)),
        bytes: Some(asset.size_bytes),
        ..step(PlanAction::Use, what)
    }
}
