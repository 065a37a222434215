//! Which OCI or Docker image an argument means.

use std::path::PathBuf;

use nexus_schema::ToolError;

use super::file_argument;
use super::image::image_error;
use crate::image::oci::{Access, Form, Remote};
use crate::os::given::Looks;

/// An image in a file or directory of the host.
#[derive(Debug, Clone)]
pub(super) struct Saved {
    pub(super) path: PathBuf,
    pub(super) form: Form,
    /// Which of the images in it.
    pub(super) name: Option<String>,
}

/// What an argument means, if it begins like one for an image.
#[derive(Debug)]
pub(super) enum Argument {
    Remote(Remote),
    Saved(Saved),
}

/// The forms by the words that arguments begin with.
const FORMS: [(&str, Form); 3] =
    [("oci-layout:", Form::Layout), ("oci-archive:", Form::Layout), ("docker-archive:", Form::Docker)];

/// Reads `oci:REFERENCE`, `oci-layout:PATH`, `oci-archive:PATH` and `docker-archive:PATH`, where a path may have `#NAME`
/// behind it. `None`: it is something else.
pub(super) async fn argument(
    argument: &str,
    registries: &Access,
    looks: &Looks,
) -> Result<Option<Argument>, ToolError> {
    if let Some(reference) = argument.strip_prefix("oci:") {
        let remote = Remote::parse(reference, registries).map_err(|e| image_error(e.into()))?;
        return Ok(Some(Argument::Remote(remote)));
    }
    for (word, form) in FORMS {
        let Some(path) = argument.strip_prefix(word) else { continue };
        let (path, name) = match path.rsplit_once('#') {
            // A path may have that character in it.
            Some((before, name)) if looks.kind(path.into()).await.is_err() => (before, Some(name.to_owned())),
            _ => (path, None),
        };
        let path = file_argument(looks, argument, path).await?;
        return Ok(Some(Argument::Saved(Saved { path, form, name })));
    }
    Ok(None)
}

impl Saved {
    /// The argument that means it.
    pub(super) fn source(&self) -> String {
        let word = match self.form {
            Form::Layout => "oci-layout",
            Form::Docker => "docker-archive",
        };
        let name = self.name.as_ref().map(|name| format!("#{name}")).unwrap_or_default();
        format!("{word}:{}{name}", self.path.display())
    }
}
