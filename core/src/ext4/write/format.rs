//! Empty filesystems.

use std::path::Path;
use std::time::UNIX_EPOCH;

use super::super::Ext4Error;
use super::{Node, Options, Purpose, Writer};
use crate::os::random;
use crate::progress::Progress;

/// Makes an empty filesystem that fills a file of zeros.
pub(crate) async fn format(file: &Path, label: &str, progress: &Progress) -> Result<(), Ext4Error> {
    let (file, label, progress) = (file.to_owned(), label.to_owned(), progress.clone());
    let write = move || {
        // Random, because empty filesystems must differ too.
        let mut identity = [0; 32];
        random::fill(&mut identity);
        let now = UNIX_EPOCH.elapsed().unwrap_or_default().as_secs();
        let made = u32::try_from(now).unwrap_or(u32::MAX);
        let root = Node::implied_directory_at(made.into());
        let identity = Some(identity);
        let options = Options { purpose: Purpose::Drive, label: &label, identity, made };
        Writer::format(&file, &progress)?.finish(&[root], &options)
    };
    tokio::task::spawn_blocking(write).await.map_err(|_| Ext4Error::Worker)?.map(drop)
}
