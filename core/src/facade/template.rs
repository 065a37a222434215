//! The template tools.

use std::collections::BTreeMap;

use nexus_schema::limits::CONFIGURE_MAX;
use nexus_schema::service::Service;
use nexus_schema::tools::ContentEncoding;
use nexus_schema::tools::build::BuildStatus;
use nexus_schema::tools::template::{
    Overlay, TemplateBuild, TemplateCreateParams, TemplateDeleteOutput, TemplateDeleteParams,
    TemplateDetails, TemplateInspectParams, TemplateListOutput, TemplateListParams, TemplateSpec,
    TemplateSummary, TemplateUpdateParams,
};
use nexus_schema::{ErrorCode, Name, ToolError};

use super::source::may_use;
use super::{CallContext, Nexus, Shared, cut_page, page};
use crate::op::store_error;
use crate::os::paths::GUEST_SERVICES;
use crate::provision::{additions, base_of_packages};
use crate::store::templates::TemplateRecord;
use crate::store::{StoreError, builds, now, random_id, templates};
use crate::vm::spec::{DISK_MAX, DISK_MIN};

/// Number of builds that are shown with a template.
const BUILDS_SHOWN: u32 = 10;
/// Maximum size of all overlays of a template together, in bytes as they are passed.
const OVERLAYS_MAX: usize = CONFIGURE_MAX / 2;
/// Maximum number of packages of a template.
const PACKAGES_MAX: usize = 1000;

impl Nexus {
    /// The tool `template_create`.
    pub async fn template_create(
        &self,
        ctx: &CallContext,
        params: TemplateCreateParams,
    ) -> Result<TemplateDetails, ToolError> {
        let spec = TemplateSpec {
            source: params.source,
            overlays: with_services(params.overlays, params.services)?,
            packages: params.packages,
            init: params.init.unwrap_or_default(),
            size: params.size.filter(|size| size.as_bytes() > 0),
            ttl: params.ttl.filter(|ttl| !ttl.is_zero()),
            idle_stop: params.idle_stop.filter(|idle| !idle.is_zero()),
            idle_action: params.idle_action,
        };
        may_use(&ctx.caller, Some(&spec.source)).await?;
        self.shared.check_template(&spec).await?;
        let at = now();
        let record = TemplateRecord {
            id: random_id(),
            name: params.name,
            version: 1,
            spec,
            owner: ctx.caller.owner.to_string(),
            created_at: at,
            updated_at: at,
        };
        let row = record.clone();
        self.shared.store.write(move |tx| templates::insert(tx, &row)).await.map_err(store_error)?;
        self.shared.template_details(record, None).await
    }

    /// The tool `template_update`.
    pub async fn template_update(
        &self,
        ctx: &CallContext,
        params: TemplateUpdateParams,
    ) -> Result<TemplateDetails, ToolError> {
        let mut record = self.shared.provision.template(&params.template).await?;
        let before = record.spec.clone();
        if let Some(version) = params.version {
            record.spec = self.shared.provision.template_spec(&record, version).await?;
        }
        let spec = &mut record.spec;
        if let Some(source) = params.source {
            may_use(&ctx.caller, Some(&source)).await?;
            spec.source = source;
        }
        for path in params.remove_overlays {
            if spec.overlays.remove(&path).is_none() {
                return Err(ToolError::invalid(format!(
                    "the template {} has no overlay {path}",
                    record.name
                )));
            }
        }
        spec.overlays.extend(with_services(params.overlays, params.services)?);
        if let Some(packages) = params.packages {
            spec.packages = packages;
        }
        if let Some(init) = params.init {
            spec.init = init;
        }
        if let Some(size) = params.size {
            spec.size = Some(size).filter(|size| size.as_bytes() > 0);
        }
        if let Some(ttl) = params.ttl {
            spec.ttl = Some(ttl).filter(|ttl| !ttl.is_zero());
        }
        if let Some(idle) = params.idle_stop {
            spec.idle_stop = Some(idle).filter(|idle| !idle.is_zero());
        }
        spec.idle_action = params.idle_action.or(spec.idle_action);
        if record.spec != before {
            self.shared.check_template(&record.spec).await?;
            record.version += 1;
            record.updated_at = now();
            let (row, who) = (record.clone(), ctx.caller.owner.clone());
            self.shared
                .store
                .write(move |tx| templates::add_version(tx, &row, &who))
                .await
                .map_err(store_error)?;
        }
        self.shared.template_details(record, None).await
    }

    /// The tool `template_list`.
    pub async fn template_list(
        &self,
        _: &CallContext,
        params: TemplateListParams,
    ) -> Result<TemplateListOutput, ToolError> {
        let limit = page(params.limit)?;
        let rows = self
            .shared
            .store
            .read(move |db| templates::list(db, params.cursor.as_deref(), limit + 1))
            .await
            .map_err(store_error)?;
        let (rows, next_cursor) = cut_page(rows, limit, |row| row.name.to_string());
        let templates = rows
            .into_iter()
            .map(|row| TemplateSummary {
                id: row.id,
                name: row.name,
                version: row.version,
                source: row.spec.source,
                overlays: row.spec.overlays.len() as u64,
                packages: row.spec.packages.len() as u64,
                updated_at: row.updated_at,
            })
            .collect();
        Ok(TemplateListOutput { templates, next_cursor })
    }

    /// The tool `template_inspect`.
    pub async fn template_inspect(
        &self,
        _: &CallContext,
        params: TemplateInspectParams,
    ) -> Result<TemplateDetails, ToolError> {
        let record = self.shared.provision.template(&params.template).await?;
        self.shared.template_details(record, params.version).await
    }

    /// The tool `template_delete`.
    pub async fn template_delete(
        &self,
        _: &CallContext,
        params: TemplateDeleteParams,
    ) -> Result<TemplateDeleteOutput, ToolError> {
        let TemplateRecord { id, name, .. } = self.shared.provision.template(&params.template).await?;
        let busy = self
            .shared
            .store
            .write(move |tx| -> Result<_, StoreError> {
                let busy = builds::list(tx, Some(id), Some(BuildStatus::Building), None, 1)?.pop();
                if busy.is_none() {
                    templates::delete(tx, id)?;
                }
                Ok(busy)
            })
            .await
            .map_err(store_error)?;
        match busy {
            None => Ok(TemplateDeleteOutput { id, name }),
            Some(build) => Err(ToolError::new(
                ErrorCode::InUse,
                format!("the template {name} is in use by the build {}, which is under way", build.id),
            )
            .hint(format!("wait for it, or cancel it with op_cancel {}", build.op_id))),
        }
    }
}

impl Shared {
    async fn template_details(
        &self,
        mut record: TemplateRecord,
        version: Option<u32>,
    ) -> Result<TemplateDetails, ToolError> {
        if let Some(version) = version {
            record.spec = self.provision.template_spec(&record, version).await?;
            record.version = version;
        }
        let id = record.id;
        let (versions, rows) = self
            .store
            .read(move |db| -> Result<_, StoreError> {
                Ok((templates::versions(db, id)?, builds::list(db, Some(id), None, None, BUILDS_SHOWN)?))
            })
            .await
            .map_err(store_error)?;
        let builds = rows
            .into_iter()
            .map(|row| TemplateBuild { id: row.id, version: row.version, status: row.status })
            .collect();
        Ok(TemplateDetails {
            id: record.id,
            name: record.name,
            version: record.version,
            spec: record.spec,
            versions,
            builds,
            owner: record.owner,
            created_at: record.created_at,
        })
    }

    /// Refuses a template that obviously cannot be built. The error lists all mistakes.
    async fn check_template(&self, spec: &TemplateSpec) -> Result<(), ToolError> {
        let mut mistakes = Vec::new();
        check_overlays(&spec.overlays, &mut mistakes);
        if spec.packages.len() > PACKAGES_MAX {
            mistakes.push(format!("{} packages, the maximum is {PACKAGES_MAX}", spec.packages.len()));
        }
        for package in spec.packages.iter().filter(|package| !is_package(package)) {
            let shown: String = package.chars().take(60).flat_map(char::escape_debug).collect();
            mistakes.push(format!("`{shown}` is not a package name or NAME=VERSION"));
        }
        if let Some(size) = spec.size
            && (size < DISK_MIN || size > DISK_MAX || !size.as_bytes().is_multiple_of(4096))
        {
            mistakes
                .push(format!("size must be {DISK_MIN} to {DISK_MAX} and a multiple of 4KiB, got {size}"));
        }
        if spec.source.starts_with("template:") {
            mistakes.push(
                "source cannot be a template: give that template's source, or an image built from it".into(),
            );
        }
        if !mistakes.is_empty() {
            return Err(ToolError::invalid(mistakes.join("; ")));
        }
        additions(spec)?;
        if !spec.packages.is_empty() {
            base_of_packages(&spec.source)?;
        }
        self.provision.check_image(&spec.source).await
    }
}

/// Adds the files of services to overlays.
fn with_services(
    mut overlays: BTreeMap<String, Overlay>,
    services: BTreeMap<String, Service>,
) -> Result<BTreeMap<String, Overlay>, ToolError> {
    for (name, service) in services {
        let shown: String = name.chars().take(60).flat_map(char::escape_debug).collect();
        let mistake = |what: String| ToolError::invalid(format!("the service `{shown}`: {what}"));
        let name = name.parse::<Name>().map_err(|error| mistake(error.to_string()))?;
        service.check().map_err(mistake)?;
        let content = serde_json::to_string_pretty(&service)
            .map_err(|error| ToolError::internal(format!("write the service {name}: {error}")))?;
        let path = format!("{GUEST_SERVICES}/{name}.json");
        if overlays.contains_key(&path) {
            return Err(mistake(format!("the overlay {path} defines it as well: give only one of them")));
        }
        overlays.insert(path, Overlay { content, encoding: ContentEncoding::Text, mode: None });
    }
    Ok(overlays)
}

fn check_overlays(overlays: &BTreeMap<String, Overlay>, mistakes: &mut Vec<String>) {
    let bytes: usize = overlays.iter().map(|(path, overlay)| path.len() + overlay.content.len()).sum();
    if bytes > OVERLAYS_MAX {
        mistakes.push(format!("the overlays have {bytes} bytes together, the maximum is {OVERLAYS_MAX}"));
    }
    for path in overlays.keys() {
        let parts = path.strip_prefix('/').unwrap_or_default().split('/');
        let fine = |part: &str| !part.is_empty() && part != "." && part != ".." && part.len() <= 255;
        if path.len() > 1024 || path.contains(char::is_control) || !parts.clone().all(fine) {
            let shown: String = path.chars().take(60).flat_map(char::escape_debug).collect();
            mistakes.push(format!("the overlay `{shown}` is not the absolute path of a file"));
        }
        if path.as_bytes() == crate::image::METADATA {
            mistakes.push(format!("the overlay {path} is reserved: every build writes this file"));
        }
        let below = format!("{path}/");
        if overlays.range(below.clone()..).next().is_some_and(|(next, _)| next.starts_with(&below)) {
            mistakes.push(format!("the overlay {path} is both a file and a directory"));
        }
    }
}

/// Returns whether a text is a package name by Debian's rules (policy 5.6.1), optionally with a version after `=` (5.6.12).
fn is_package(text: &str) -> bool {
    let (name, version) = match text.split_once('=') {
        Some((name, version)) => (name, Some(version)),
        None => (text, None),
    };
    let of = |text: &str, more: &[u8], upper: bool| {
        !text.is_empty()
            && text.len() <= 128
            && text.bytes().all(|b| {
                b.is_ascii_lowercase()
                    || b.is_ascii_digit()
                    || more.contains(&b)
                    || (upper && b.is_ascii_uppercase())
            })
    };
    name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && of(name, b"+-.", false)
        && version.is_none_or(|version| of(version, b".+-~:", true))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_have_the_names_of_packages() {
        for good in ["bash", "libstdc++6", "python3.11-minimal", "nginx=1.22.1-9+deb12u1", "7zip"] {
            assert!(is_package(good), "{good}");
        }
        for bad in ["", "-o", "a b", "a,b", "A", "?essential", "~i", "a=", "a/b", "a=1 --hook", "a\n"] {
            assert!(!is_package(bad), "{bad}");
        }
    }

    #[test]
    fn overlays_are_files_at_absolute_paths() {
        let overlay = Overlay { content: "x".into(), encoding: Default::default(), mode: None };
        let mistakes = |paths: &[&str]| {
            let overlays = paths.iter().map(|path| ((*path).to_owned(), overlay.clone())).collect();
            let mut mistakes = Vec::new();
            check_overlays(&overlays, &mut mistakes);
            mistakes.len()
        };
        assert_eq!(mistakes(&["/etc/motd", "/etc/motd.d/a b", "/ä", "/a", "/a-b/c"]), 0);
        for bad in
            ["", "/", "relative", "/a/", "/a//b", "/a/../b", "/a/./b", "/a\nb", "/etc/nexus/image.yaml"]
        {
            assert_eq!(mistakes(&[bad]), 1, "{bad:?}");
        }
        assert_eq!(mistakes(&["/a", "/a-b", "/a/b/c"]), 1);
    }
}
