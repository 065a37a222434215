//! Operations that had done their work when the daemon ended, and only had not said so.

use nexus_schema::ToolError;
use nexus_schema::tools::build::BuildStatus;
use nexus_schema::tools::op::OpSummary;
use nexus_schema::{Name, Reference};
use serde::Serialize;

use super::Shared;
use crate::op::{StoredResult, store_error};
use crate::store::{builds, drives, images};

impl Shared {
    /// The result of an operation whose thing is whole; `None` if it is not, or if only the call itself could tell.
    pub(crate) async fn finished_already(&self, op: &OpSummary) -> Result<Option<StoredResult>, ToolError> {
        match op.tool.as_str() {
            "drive_create" => {
                let Some(Ok(id)) = op.subject_id.as_deref().map(str::parse) else { return Ok(None) };
                let reference = Reference::Id(id);
                let drive =
                    self.store.read(move |db| drives::get(db, &reference)).await.map_err(store_error)?;
                match drive {
                    Some(drive) => as_result(&self.drive_details(drive).await?).map(Some),
                    None => Ok(None),
                }
            }
            "build_start" => {
                let Some(Ok(id)) = op.subject_id.as_deref().map(str::parse) else { return Ok(None) };
                let build = self.store.read(move |db| builds::get(db, id)).await.map_err(store_error)?;
                match build.filter(|build| build.status == BuildStatus::Success) {
                    Some(build) => as_result(&self.build_details(build)).map(Some),
                    None => Ok(None),
                }
            }
            "image_create" => {
                let Some(Ok(name)) = op.subject_name.as_deref().map(str::parse::<Name>) else {
                    return Ok(None);
                };
                let reference = Reference::Name(name);
                let image =
                    self.store.read(move |db| images::get(db, &reference)).await.map_err(store_error)?;
                // The name may be a template's, and there be an image of that name from before.
                let Some(image) = image.filter(|image| image.ready && image.created_at >= op.started_at)
                else {
                    return Ok(None);
                };
                let default = self.defaults().await?.image;
                as_result(&self.image_details(image, 0, &default)).map(Some)
            }
            _ => Ok(None),
        }
    }
}

fn as_result(value: &impl Serialize) -> Result<StoredResult, ToolError> {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::Object(result)) => Ok(result),
        Ok(_) => Err(ToolError::internal("the result of an operation is not an object")),
        Err(error) => Err(ToolError::internal(format!("encode the result: {error}"))),
    }
}
