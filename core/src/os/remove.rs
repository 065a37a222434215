//! Removes what is no longer needed. A failure is logged, and the rest is left for the next start.

use std::path::Path;

/// Removes a directory with its contents.
pub(crate) async fn tree(directory: &Path) {
    match fs_err::tokio::remove_dir_all(directory).await {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            tracing::warn!(%error, "cannot remove a directory; will retry at the next start");
        }
        _ => {}
    }
}

/// Removes a file, or a directory with its contents.
pub(crate) async fn path(path: &Path) {
    let is_directory = fs_err::tokio::symlink_metadata(path).await.is_ok_and(|meta| meta.is_dir());
    if is_directory {
        return tree(path).await;
    }
    match fs_err::tokio::remove_file(path).await {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            tracing::warn!(%error, "cannot remove a file; will retry at the next start");
        }
        _ => {}
    }
}
