//! Suggestions for unknown sources.

use nexus_schema::tools::asset::AssetKind;
use nexus_schema::{ErrorCode, ToolError};

use super::Provision;
use crate::asset::provider::Provider;
use crate::op::{did_you_mean, store_error};
use crate::store::{StoreError, images, providers, templates};
use nexus_schema::tools::image::BUILT_IN;

impl Provision {
    /// The error for an unknown source of drives, with a suggestion.
    pub(super) async fn no_source(&self, bare: &str) -> Result<ToolError, ToolError> {
        let (all, templates, providers) = self
            .store
            .read(|db| -> Result<_, StoreError> {
                Ok((images::all(db)?, templates::list(db, None, u32::MAX)?, providers::all(db)?))
            })
            .await
            .map_err(store_error)?;
        let error = ToolError::new(ErrorCode::ImageNotFound, format!("there is no image `{bare}`"))
            .hint("call image_list to see the images, or give `debian`, `debian-minimal`, `busybox`, oci:IMAGE, rootfs:PROVIDER@VERSION or file:PATH");
        let names = all.iter().map(|image| image.name.as_str()).chain(BUILT_IN);
        let alike = did_you_mean(error.clone(), bare, names);
        if alike != error {
            return Ok(alike);
        }
        let is_provider = |name: &str| {
            let kinds = providers
                .iter()
                .find(|row| row.name == name)
                .map(|row| Provider::parse(&row.name, &row.spec));
            matches!(kinds, Some(Ok(provider)) if provider.may_have(AssetKind::Rootfs))
        };
        let meant = if templates.iter().any(|template| template.name.as_str() == bare) {
            Some(format!("template:{bare}"))
        } else if is_provider(bare.split('@').next().unwrap_or(bare)) {
            Some(format!("rootfs:{bare}"))
        } else {
            // Anything that could be the name of an image in a registry.
            let is_name = bare.starts_with(|c: char| c.is_ascii_alphanumeric())
                && bare.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "._-/:@".contains(c));
            is_name.then(|| format!("oci:{bare}"))
        };
        Ok(match meant {
            Some(meant) => error
                .clone()
                .hint(format!("did you mean `{meant}`? else {}", error.hint.as_deref().unwrap_or_default())),
            None => error,
        })
    }
}
