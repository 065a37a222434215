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
    /// The name of the image in it, if there are several.
    pub(super) name: Option<String>,
}

/// The meaning of an argument that has the prefix of an image.
#[derive(Debug)]
pub(super) enum Argument {
    Remote(Remote),
    Saved(Saved),
}

/// The prefixes with their formats.
const FORMS: [(&str, Form); 3] =
    [("oci-layout:", Form::Layout), ("oci-archive:", Form::Layout), ("docker-archive:", Form::Docker)];

/// Parses `oci:REFERENCE`, `oci-layout:PATH`, `oci-archive:PATH` and `docker-archive:PATH`; a path may be followed by
/// `#NAME`. `None` for anything else.
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
            // A path may contain that character.
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
