//! What counts for the quota of disk of an owner.

use nexus_schema::tools::asset::{AssetKind, Verified};
use nexus_schema::tools::image::BUSYBOX;

use super::*;
use crate::store::assets::AssetRecord;
use crate::store::images::ImageRecord;

/// An image of an owner, as it is once it is made.
fn image(name: &str, owner: &str, used_bytes: u64) -> ImageRecord {
    ImageRecord {
        id: random_id(),
        parent_id: None,
        name: name.parse().unwrap(),
        source: "file:/srv/tree".into(),
        ready: true,
        distro: None,
        init: InitMode::Agent,
        has_init: Some(false),
        config: None,
        arch: "x86_64".into(),
        // Most of it is not there.
        size: ByteSize::gib(8),
        used_bytes,
        sha256: "00".into(),
        owner: owner.into(),
        created_at: Timestamp::from_millis(1),
    }
}

fn asset(name: &str, owner: &str, kind: AssetKind) -> AssetRecord {
    AssetRecord {
        id: random_id(),
        name: name.parse().unwrap(),
        kind,
        provider: "ours".into(),
        version: name.into(),
        arch: "x86_64".into(),
        sha256: name.into(),
        size_bytes: 1000,
        verified: Verified::Checksum,
        files: Vec::new(),
        origin: "here".into(),
        download_sha256: None,
        owner: owner.into(),
        installed_at: Timestamp::from_millis(1),
    }
}

#[tokio::test]
async fn images_and_what_they_are_made_from_count_for_their_maker() {
    let (_dir, store) = open();
    write(&store, |tx| {
        let disk = |owners: &[&str]| -> Result<u64, StoreError> {
            let owners: Vec<String> = owners.iter().map(|owner| (*owner).to_owned()).collect();
            Ok(tokens::usage(tx, &owners, None)?.disk)
        };
        let (own, other) = (image("own", "token:a", 70), image("other", "token:b", 5));
        for image in [&own, &other, &image(BUSYBOX, "token:a", 10_000)] {
            images::insert(tx, image)?;
        }
        assert_eq!(disk(&["token:a"])?, 0, "nothing is made yet");
        for image in images::all(tx)? {
            let used_bytes = if image.id == own.id { 70 } else { 5 };
            images::set_ready(tx, &ImageRecord { used_bytes, ..image })?;
        }
        assert_eq!(disk(&["token:a"])?, 70, "one that is built in counts for nobody");
        assert_eq!(disk(&["token:a", "token:b"])?, 75);
        for (name, kind) in
            [("rootfs", AssetKind::Rootfs), ("kernel", AssetKind::Kernel), ("vmm", AssetKind::Vmm)]
        {
            assets::insert(tx, &asset(name, "token:a", kind))?;
        }
        assert_eq!((disk(&["token:a"])?, disk(&["token:b"])?), (1070, 5));
        images::delete(tx, own.id)?;
        assert_eq!(disk(&["token:a"])?, 1000);
        Ok(())
    })
    .await
    .unwrap();
}
