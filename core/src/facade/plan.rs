//! What a creation would do: the answers to `dry_run`. Nothing is changed: no rows, no files, no operations.

use nexus_schema::network::NetworkMode;
use nexus_schema::tools::drive::DriveCreateParams;
use nexus_schema::tools::image::ImageCreateParams;
use nexus_schema::tools::plan::{Plan, PlanAction, PlanDriver, PlanStep, PlanThing};
use nexus_schema::tools::vm::VmCreateParams;
use nexus_schema::{ByteSize, ErrorCode, Name, Reference, ToolError};

use super::Shared;
use super::drive::{From, check_not_smaller};
use crate::op::store_error;
use crate::os::disk::free_bytes;
use crate::provision::called;
use crate::provision::{ImagePlan, step};
use crate::store::images::ImageRecord;
use crate::store::{drives, images, vms};
use crate::vm::create::{check_host_memory, disk_of};
use crate::vm::defaults;
use crate::vm::spec::{self, DISK_DEFAULT};
use crate::vm::{network, packages};

impl Shared {
    /// Returns what `vm_create` would do.
    pub(super) async fn plan_vm(&self, params: &VmCreateParams) -> Result<Plan, ToolError> {
        if let Some(name) = params.name.clone() {
            let wanted = name.clone();
            let taken = self.store.read(vms::all).await.map_err(store_error)?;
            if taken.iter().any(|vm| vm.name == wanted) {
                return Err(name_taken("VM", &name));
            }
        }
        // For the checks any name will do.
        let name = params.name.clone().map_or_else(|| "made-up".parse(), Ok);
        let name = name.map_err(|e| ToolError::internal(format!("{e}")))?;
        let mut spec = spec::check(params, &name, &defaults::read(&self.store).await?)?;
        check_host_memory(self, spec.memory).await?;
        packages::fill(self, &mut spec.network).await?;
        let arch = self.provision.arch_of_image(&spec.from).await?;
        let choice = self.choose_driver_for(&spec, arch).await?;
        if spec.network.mode == NetworkMode::Nat {
            network::check(&*self.host(false).await?, &choice)?;
        }
        self.provision.check_image(&spec.from).await?;
        let mut steps = Vec::new();
        if self.needs_kernel() {
            steps.push(self.provision.plan_kernel(&spec.kernel, arch).await?);
        }
        let image = self.image_plan(&spec.from).await?;
        let disk = match &image.image {
            Some(image) => disk_of(&spec, image)?,
            None => spec.disk,
        };
        steps.extend(image.steps);
        steps.push(PlanStep { size: Some(disk), ..step(PlanAction::Clone, PlanThing::Drive) });
        if spec.start {
            steps.push(PlanStep {
                name: params.name.as_ref().map(ToString::to_string),
                ..step(PlanAction::Start, PlanThing::Vm)
            });
        }
        let driver = PlanDriver {
            name: choice.driver.as_str().into(),
            accel: choice.accel.as_str().into(),
            version: choice.version,
        };
        self.plan(PlanThing::Vm, params.name.clone(), Some(driver), steps)
    }

    /// Returns what `image_create` would do.
    pub(super) async fn plan_image(&self, params: &ImageCreateParams) -> Result<Plan, ToolError> {
        let is_template = params.from.starts_with("template:");
        let name = match &params.name {
            Some(name) => name.clone(),
            None if is_template => {
                let foreseen = self.image_plan(&params.from).await?;
                let name = foreseen.image.map(|image| image.name);
                return self.plan(PlanThing::Image, name, None, foreseen.steps);
            }
            None => self.provision.image_name(&params.from).await?,
        };
        let reference = Reference::Name(name.clone());
        if self.store.read(move |db| images::get(db, &reference)).await.map_err(store_error)?.is_some() {
            return Err(name_taken("image", &name));
        }
        let foreseen = match is_template {
            false => self.provision.plan_new_image(&params.from, name.clone()).await?,
            true => {
                let mut built = self.image_plan(&params.from).await?;
                built.steps.push(PlanStep {
                    name: Some(name.to_string()),
                    source: Some(params.from.clone()),
                    ..step(PlanAction::Build, PlanThing::Image)
                });
                built
            }
        };
        self.plan(PlanThing::Image, Some(name), None, foreseen.steps)
    }

    /// Returns what `drive_create` would do.
    pub(super) async fn plan_drive(&self, params: &DriveCreateParams, from: From) -> Result<Plan, ToolError> {
        if let Some(name) = params.name.clone() {
            let wanted = Reference::Name(name.clone());
            if self.store.read(move |db| drives::get(db, &wanted)).await.map_err(store_error)?.is_some() {
                return Err(name_taken("drive", &name));
            }
        }
        let mut steps = Vec::new();
        let (action, size) = match from {
            From::Nothing => (PlanAction::Format, params.size.unwrap_or(DISK_DEFAULT)),
            From::Image(from) => {
                let foreseen = self.image_plan(&from).await?;
                let size = match &foreseen.image {
                    Some(image) => size_of_clone(params.size, image)?,
                    None => params.size.unwrap_or(DISK_DEFAULT),
                };
                steps = foreseen.steps;
                (PlanAction::Clone, size)
            }
            From::Drive(source) => {
                self.check_down(&source)?;
                check_not_smaller(params.size, source.size, &source.name)?;
                steps.push(PlanStep {
                    name: Some(source.name.to_string()),
                    size: Some(source.size),
                    ..step(PlanAction::Use, PlanThing::Drive)
                });
                (PlanAction::Clone, params.size.unwrap_or(source.size))
            }
        };
        steps.push(PlanStep {
            name: params.name.as_ref().map(ToString::to_string),
            size: Some(size),
            ..step(action, PlanThing::Drive)
        });
        self.plan(PlanThing::Drive, params.name.clone(), None, steps)
    }

    /// Returns how the image that `from` names would be obtained.
    async fn image_plan(&self, from: &str) -> Result<ImagePlan, ToolError> {
        let Some(template) = crate::provision::template_argument(from) else {
            return self.provision.plan_image(from).await;
        };
        let template = self.provision.template(&template?).await?;
        self.provision.plan_build(&template.spec, &called(&template.name, template.version)).await
    }

    pub(super) fn plan(
        &self,
        makes: PlanThing,
        name: Option<Name>,
        driver: Option<PlanDriver>,
        steps: Vec<PlanStep>,
    ) -> Result<Plan, ToolError> {
        let downloads = steps.iter().filter(|step| step.action == PlanAction::Download);
        let download_bytes = downloads.filter_map(|step| step.bytes).sum();
        let free_bytes = free_bytes(self.paths.root())
            .map_err(|e| ToolError::internal(format!("read the free disk space: {e}")))?;
        Ok(Plan { makes, name, driver, steps, download_bytes, free_bytes })
    }
}

/// Returns the size of a drive that is cloned from an image.
pub(super) fn size_of_clone(size: Option<ByteSize>, image: &ImageRecord) -> Result<ByteSize, ToolError> {
    check_not_smaller(size, image.size, &image.name)?;
    Ok(size.unwrap_or(image.size.max(DISK_DEFAULT)))
}

pub(super) fn name_taken(what: &str, name: &Name) -> ToolError {
    ToolError::new(ErrorCode::NameTaken, format!("{what} {name} already exists"))
        .hint("choose another name, or use the existing one")
}
