//! Sources of VMs, images and drives: the arguments of `from-rootfs`, `from-oci`, `from-template`, `from-image` and
//! `from-drive`.

use clap::Args;
use nexus_schema::Reference;
use nexus_schema::id::{DriveKind, ImageKind, TemplateKind};

/// One sort of source.
pub(crate) trait Source: Args {
    /// Its value for the tools' `from`.
    fn reference(&self) -> String;
}

/// A source, and how something is made of it.
#[derive(Debug, Args)]
pub(crate) struct Of<S: Source, O: Args> {
    #[command(flatten)]
    source: S,
    #[command(flatten)]
    options: O,
}

impl<S: Source, O: Args> Of<S, O> {
    /// The value of `from`, and the rest.
    pub(crate) fn split(self) -> (String, O) {
        (self.source.reference(), self.options)
    }
}

/// A root filesystem of a provider.
#[derive(Debug, Args)]
pub(crate) struct Rootfs {
    /// The provider, such as alpine
    provider: String,
    /// Its version, such as 3.21 [default: the newest]
    version: Option<String>,
}

impl Source for Rootfs {
    fn reference(&self) -> String {
        match &self.version {
            Some(version) => format!("rootfs:{}@{version}", self.provider),
            None => format!("rootfs:{}", self.provider),
        }
    }
}

/// An OCI image.
#[derive(Debug, Args)]
pub(crate) struct Oci {
    /// The image, such as python:3.12-slim or REGISTRY/REPOSITORY@sha256:DIGEST; or docker-archive:FILE, oci-layout:DIRECTORY
    reference: String,
}

impl Source for Oci {
    fn reference(&self) -> String {
        let forms = ["oci:", "oci-layout:", "oci-archive:", "docker-archive:"];
        match forms.iter().any(|form| self.reference.starts_with(form)) {
            true => self.reference.clone(),
            false => format!("oci:{}", self.reference),
        }
    }
}

/// A template.
#[derive(Debug, Args)]
pub(crate) struct Template {
    /// The template: its name or id
    template: Reference<TemplateKind>,
}

impl Source for Template {
    fn reference(&self) -> String {
        format!("template:{}", self.template)
    }
}

/// An image.
#[derive(Debug, Args)]
pub(crate) struct Image {
    /// The image: its name or id
    image: Reference<ImageKind>,
}

impl Source for Image {
    fn reference(&self) -> String {
        format!("image:{}", self.image)
    }
}

/// A drive.
#[derive(Debug, Args)]
pub(crate) struct Drive {
    /// The drive: its name or id
    drive: Reference<DriveKind>,
}

impl Source for Drive {
    fn reference(&self) -> String {
        format!("drive:{}", self.drive)
    }
}

/// The prefixes that mark the form of a source.
const FORMS: [&str; 10] = [
    "oci:",
    "rootfs:",
    "image:",
    "template:",
    "drive:",
    "vm:",
    "file:",
    "oci-layout:",
    "oci-archive:",
    "docker-archive:",
];

fn is_of_form(source: &str) -> bool {
    is_path(source) || FORMS.iter().any(|form| source.starts_with(form))
}

/// The meaning of an image in `nexusctl run`: with a tag, a digest or a path it is in a registry, as in `docker run`; otherwise
/// it is a local name.
pub(crate) fn pulled_or_named(image: String) -> String {
    if !is_of_form(&image) && image.contains([':', '/', '@']) { format!("oci:{image}") } else { image }
}

/// The meaning of an image in `nexusctl pull`: one in a registry, unless its form says otherwise.
pub(crate) fn pulled(image: String) -> String {
    if is_of_form(&image) { image } else { format!("oci:{image}") }
}

fn is_path(source: &str) -> bool {
    [".", ".."].contains(&source) || ["/", "./", "../"].iter().any(|start| source.starts_with(start))
}

/// The forms that contain a path of the host.
const OF_FILES: [&str; 4] = ["file:", "oci-layout:", "oci-archive:", "docker-archive:"];

/// Rewrites a source for the daemon, which runs in another directory: paths become absolute, and an obvious path becomes a
/// `file:` source.
pub(crate) fn located(source: String) -> String {
    let (form, path) = match OF_FILES.iter().find(|form| source.starts_with(**form)) {
        Some(form) => (*form, &source[form.len()..]),
        None if is_path(&source) => ("file:", &*source),
        None => return source,
    };
    match std::path::absolute(path) {
        Ok(absolute) => format!("{form}{}", absolute.display()),
        // An empty path, which the daemon refuses.
        Err(_) => source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_those_of_whoever_calls() {
        let here = std::env::current_dir().unwrap();
        let here = here.to_str().unwrap();
        for (given, meant) in [
            ("debian", "debian".to_owned()),
            ("image:a", "image:a".to_owned()),
            ("vm:web-1", "vm:web-1".to_owned()),
            ("oci:./a", "oci:./a".to_owned()),
            ("rootfs:alpine@3.21", "rootfs:alpine@3.21".to_owned()),
            ("/a/b", "file:/a/b".to_owned()),
            ("./b.tar", format!("file:{here}/b.tar")),
            (".", format!("file:{here}")),
            ("file:/a", "file:/a".to_owned()),
            ("file:b", format!("file:{here}/b")),
            ("docker-archive:b.tar#c:1", format!("docker-archive:{here}/b.tar#c:1")),
            ("file:", "file:".to_owned()),
        ] {
            assert_eq!(located(given.to_owned()), meant);
        }
    }

    #[test]
    fn images_are_named_as_for_docker() {
        for (given, run, pull) in [
            ("debian", "debian", "oci:debian"),
            ("web", "web", "oci:web"),
            ("python:3.12", "oci:python:3.12", "oci:python:3.12"),
            ("ghcr.example/a/b", "oci:ghcr.example/a/b", "oci:ghcr.example/a/b"),
            ("a@sha256:0", "oci:a@sha256:0", "oci:a@sha256:0"),
            ("oci:alpine", "oci:alpine", "oci:alpine"),
            ("rootfs:alpine@3.21", "rootfs:alpine@3.21", "rootfs:alpine@3.21"),
            ("./root", "./root", "./root"),
            ("docker-archive:a.tar", "docker-archive:a.tar", "docker-archive:a.tar"),
        ] {
            assert_eq!((pulled_or_named(given.into()), pulled(given.into())), (run.into(), pull.into()));
        }
    }

    #[test]
    fn an_oci_image_may_be_saved_in_a_file() {
        for (given, meant) in [
            ("python:3.12-slim", "oci:python:3.12-slim"),
            ("oci:python", "oci:python"),
            ("docker-archive:/a/b.tar#c:1", "docker-archive:/a/b.tar#c:1"),
            ("oci-layout:/a", "oci-layout:/a"),
            ("oci-archive:/a.tar", "oci-archive:/a.tar"),
        ] {
            assert_eq!(Oci { reference: given.into() }.reference(), meant);
        }
    }
}
