//! The tools by which images leave this host.

use nexus_schema::access::Scope;
use nexus_schema::id::ImageKind;
use nexus_schema::tools::OpOutcome;
use nexus_schema::tools::image::{ImagePushParams, ImagePushed, ImageSaveParams, ImageSaved};
use nexus_schema::{ErrorCode, Reference, ToolError};

use super::tree::blocking;
use super::{CallContext, Nexus, Shared, patience};
use crate::image::check_room;
use crate::image::oci::Exported;
use crate::op::{described, store_error};
use crate::os::failpoint;
use crate::progress::Progress;
use crate::store::images::{self, ImageRecord};
use crate::store::random_id;
use crate::tree::NewFile;

/// How many bytes must stay free on the disk where an archive is written, as for copies out of VMs.
const KEEP_FREE: u64 = 256 << 20;

impl Nexus {
    /// The tool `image_save`.
    pub async fn image_save(
        &self,
        ctx: &CallContext,
        params: ImageSaveParams,
    ) -> Result<OpOutcome<ImageSaved>, ToolError> {
        let wait = patience(params.wait_s)?;
        let image = self.shared.whole_image(&params.image).await?;
        let to = self.shared.copy_places(ctx).find(&params.to)?;
        let file = blocking(move || NewFile::begin(&to)).await?;
        let op = self.shared.begin_op("image_save", ctx, Some(subject(&image))).await?;
        let shared = self.shared.clone();
        self.shared.ops.run(op, move |progress| async move {
            shared.exported(&image, &progress, |exported| save(exported, file, &progress)).await
        });
        self.shared.ops.wait(ctx, op, wait).await
    }

    /// The tool `image_push`.
    pub async fn image_push(
        &self,
        ctx: &CallContext,
        params: ImagePushParams,
    ) -> Result<OpOutcome<ImagePushed>, ToolError> {
        let wait = patience(params.wait_s)?;
        let image = self.shared.whole_image(&params.image).await?;
        let to = self.shared.provision.push_target(&params.to)?;
        if !ctx.caller.has(Scope::Network) {
            let message = "image_push sends an image to another machine with the host's credentials: it needs the \
                scope network besides, which this token lacks";
            return Err(ToolError::new(ErrorCode::Forbidden, message)
                .hint("use image_save, or ask for a token with the scope network"));
        }
        let op = self.shared.begin_op("image_push", ctx, Some(subject(&image))).await?;
        let shared = self.shared.clone();
        self.shared.ops.run(op, move |progress| async move {
            let (provision, to) = (&shared.provision, &to);
            let shown = &progress;
            let push = |exported: Exported| async move {
                let pushed = provision.push_image(&exported, to, shown).await?;
                Ok(ImagePushed {
                    reference: pushed.reference,
                    digest: pushed.digest.to_string(),
                    sent_bytes: pushed.sent,
                    notes: exported.notes,
                })
            };
            shared.exported(&image, &progress, push).await
        });
        self.shared.ops.wait(ctx, op, wait).await
    }
}

impl Shared {
    /// An image that is here.
    async fn whole_image(&self, image: &Reference<ImageKind>) -> Result<ImageRecord, ToolError> {
        let wanted = image.clone();
        let found = self.store.read(move |db| images::get(db, &wanted)).await.map_err(store_error)?;
        match found.filter(|image| image.ready) {
            Some(image) => Ok(image),
            None => Err(self.no_image(image).await?),
        }
    }

    /// Packs an image, and does something with it. What was packed is removed, whatever happens.
    async fn exported<T, F: Future<Output = Result<T, ToolError>>>(
        &self,
        image: &ImageRecord,
        progress: &Progress,
        then: impl FnOnce(Exported) -> F,
    ) -> Result<T, ToolError> {
        let stage = self.provision.scratch().claim(random_id::<ImageKind>());
        let done = async {
            let exported = self.provision.export_image(image, stage.path(), progress).await?;
            failpoint::reach("image-packed");
            exported.notes.iter().for_each(|note| progress.log(note));
            then(exported).await
        };
        let done = done.await;
        stage.clear().await;
        done
    }
}

/// Writes the archive of an image to a file.
async fn save(exported: Exported, file: NewFile, progress: &Progress) -> Result<ImageSaved, ToolError> {
    progress.step("writing the archive");
    let watched = progress.clone();
    blocking(move || {
        let place = file.path.parent().unwrap_or(&file.path);
        let room = check_room(place, exported.layer_bytes().saturating_add(KEEP_FREE));
        room.map_err(|error| described(error.code(), &error, error.hint()))?;
        let sink = std::io::BufWriter::with_capacity(1 << 20, file.file());
        let written = exported.write_archive(sink, &file.path, &watched);
        let bytes = written.map_err(|error| described(error.code(), &error, error.hint()))?;
        failpoint::reach("image-saved");
        let saved = ImageSaved {
            path: file.path.display().to_string(),
            bytes,
            digest: exported.digest().to_string(),
            notes: exported.notes,
        };
        file.finish()?;
        Ok(saved)
    })
    .await
}

fn subject(image: &ImageRecord) -> (String, String) {
    (image.id.to_string(), image.name.to_string())
}
