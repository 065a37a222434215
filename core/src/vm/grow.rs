//! Drives that grow while a guest uses them.

use std::time::Duration;

use nexus_schema::ByteSize;
use nexus_schema::link::{GROW_REQUEST, GrowParams};
use serde_json::value::to_raw_value;

use crate::guest::Link;
use crate::vmm::ShimClient;

/// Timeout for a guest to grow a filesystem.
const GROW_TIMEOUT: Duration = Duration::from_secs(30);

/// The guest's answer to [`GROW_REQUEST`].
#[derive(Debug, serde::Deserialize)]
struct Grown {
    problems: Vec<String>,
}

/// Makes a running guest use the new size of the drive at `index` among those of its VM. The drive's file has that size already.
///
/// # Errors
///
/// Why the guest cannot use all of it now. It can after its next start.
pub(crate) async fn grow_in_guest(
    shim: &ShimClient,
    link: Option<&Link>,
    index: usize,
    size: ByteSize,
) -> Result<(), String> {
    let resized = shim.resize_drive(index, size.as_bytes()).await;
    resized.map_err(|error| nexus_schema::error::chain(&error))?;
    let link = link.ok_or("there is no link to its agent")?;
    let params = to_raw_value(&GrowParams { size_bytes: Some(size.as_bytes()) });
    let params = params.map_err(|error| error.to_string())?;
    let answer =
        link.request(GROW_REQUEST, &params, GROW_TIMEOUT).await.map_err(|error| error.to_string())?;
    let Grown { problems } = serde_json::from_str(answer.get()).map_err(|error| error.to_string())?;
    if problems.is_empty() { Ok(()) } else { Err(problems.join("; ")) }
}
