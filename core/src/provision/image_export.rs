//! Images that leave this host: packed as OCI images, and pushed to registries.

use std::path::PathBuf;

use nexus_schema::{Arch, ToolError};

use super::image::image_error;
use super::{Provision, blocking};
use crate::image::oci::{About, Exported, Pushed, Remote, export};
use crate::image::{self, Limits, check_room};
use crate::progress::Progress;
use crate::store::images::ImageRecord;

impl Provision {
    /// Packs an image in the directory `stage`, which is made.
    pub(crate) async fn export_image(
        &self,
        image: &ImageRecord,
        stage: PathBuf,
        progress: &Progress,
    ) -> Result<Exported, ToolError> {
        progress.step("packing the image");
        let file = self.paths.image(image.id).join(image::ROOTFS);
        let arch = Arch::known(&image.arch)?;
        let (image, watched) = (image.clone(), progress.clone());
        blocking(move || {
            let packed = || {
                fs_err::create_dir_all(&stage).map_err(|e| image::ImageError::write(&stage, e))?;
                // What is packed needs less than its files, mostly far less.
                check_room(&stage, (image.used_bytes / 2).saturating_add(Limits::default().keep_free))?;
                let about = About {
                    name: image.name.as_str(),
                    config: image.config.as_ref(),
                    arch,
                    created: image.created_at,
                };
                export(&file, &about, &stage, &watched)
            };
            packed().map_err(image_error)
        })
        .await
    }

    /// Parses where an image is to be pushed.
    pub(crate) fn push_target(&self, to: &str) -> Result<Remote, ToolError> {
        let bare = to.strip_prefix("oci:").unwrap_or(to);
        Remote::parse_to_push(bare, &self.registries).map_err(|e| image_error(e.into()))
    }

    /// Pushes a packed image.
    pub(crate) async fn push_image(
        &self,
        image: &Exported,
        to: &Remote,
        progress: &Progress,
    ) -> Result<Pushed, ToolError> {
        let pushed = tokio::select! {
            pushed = Box::pin(to.push(image, progress)) => pushed.map_err(image::ImageError::from),
            () = progress.cancelled() => Err(image::ImageError::Cancelled),
        };
        pushed.map_err(image_error)
    }
}
