//! What images and drives are made from, as the words behind `from-rootfs`, `from-oci`, `from-template` and `from-image`.

use clap::Args;
use nexus_schema::Reference;
use nexus_schema::id::{ImageKind, TemplateKind};

/// A root filesystem of a provider.
#[derive(Debug, Args)]
pub(crate) struct Rootfs {
    /// The provider, such as alpine
    provider: String,
    /// Its version, such as 3.21 [default: the newest]
    version: Option<String>,
}

impl Rootfs {
    /// The reference that it means.
    pub(crate) fn reference(&self) -> String {
        match &self.version {
            Some(version) => format!("rootfs:{}@{version}", self.provider),
            None => format!("rootfs:{}", self.provider),
        }
    }
}

/// An OCI image.
#[derive(Debug, Args)]
pub(crate) struct Oci {
    /// The image, such as python:3.12-slim or REGISTRY/REPOSITORY@sha256:DIGEST
    reference: String,
}

impl Oci {
    /// The reference that it means.
    pub(crate) fn reference(&self) -> String {
        format!("oci:{}", self.reference.trim_start_matches("oci:"))
    }
}

/// A template.
#[derive(Debug, Args)]
pub(crate) struct Template {
    /// The template: its name or id
    template: Reference<TemplateKind>,
}

impl Template {
    /// The reference that it means.
    pub(crate) fn reference(&self) -> String {
        format!("template:{}", self.template)
    }
}

/// An image.
#[derive(Debug, Args)]
pub(crate) struct Image {
    /// The image: its name or id
    image: Reference<ImageKind>,
}

impl Image {
    /// The reference that it means.
    pub(crate) fn reference(&self) -> String {
        format!("image:{}", self.image)
    }
}
