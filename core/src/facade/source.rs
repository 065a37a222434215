//! What tokens may name as sources of VMs, images and the like.

use nexus_schema::access::Scope;
use nexus_schema::{ErrorCode, ToolError};

use crate::access::Caller;
use crate::image::oci;

/// Refuses to tokens sources that are files of the host, addresses of any server, or registries on the host and in private networks: a token could read
/// all that the daemon can otherwise, and have it talk to servers that only the host's own programs should reach.
pub(super) async fn may_use(caller: &Caller, source: Option<&str>) -> Result<(), ToolError> {
    let Some(source) = source.filter(|_| !caller.has(Scope::Admin)) else { return Ok(()) };
    let known = ["oci:", "image:", "template:"].iter().any(|word| source.starts_with(word));
    let bare = source.strip_prefix("rootfs:").unwrap_or(source);
    if !known && bare.contains([':', '/']) {
        let message =
            "files of the host and addresses as sources need the scope admin, which this token lacks";
        return Err(ToolError::new(ErrorCode::Forbidden, message)
            .hint("use an image, or a source such as oci:REF or rootfs:PROVIDER"));
    }
    let Some(reference) = source.strip_prefix("oci:").filter(|_| !caller.has(Scope::Network)) else {
        return Ok(());
    };
    if oci::is_public(reference).await {
        return Ok(());
    }
    let message =
        "registries on this host and in private networks need the scope network, which this token lacks";
    Err(ToolError::new(ErrorCode::Forbidden, message)
        .hint("use an image that is there (image_list), or ask for a token with the scope network"))
}
