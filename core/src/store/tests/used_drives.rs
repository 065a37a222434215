//! What is known of drives: whether a guest may have written to one is decided by what the daemon did with it.

use nexus_schema::id::DriveId;

use super::*;
use crate::store::drives::{Attachment, DriveRecord};

fn drive(name: &str) -> DriveRecord {
    DriveRecord {
        id: random_id(),
        name: name.parse().unwrap(),
        image_id: None,
        parent_id: None,
        made_for: None,
        attachment: None,
        ready: false,
        size: ByteSize::mib(16),
        read_only: false,
        owner: "uid:0".into(),
        created_at: Timestamp::from_millis(1),
    }
}

#[tokio::test]
async fn a_writable_drive_of_a_started_vm_and_its_copies_may_hold_data() {
    let (_dir, store) = open();
    write(&store, |tx| {
        let holds = |id: DriveId| drives::may_hold_data(tx, id);
        let mut web = vm("web", 3);
        vms::insert(tx, &web)?;
        let data = drive("data");
        let fixed = DriveRecord { read_only: true, ..drive("fixed") };
        let (spare, early) = (drive("spare"), DriveRecord { parent_id: Some(data.id), ..drive("early") });
        for (position, row) in (0..).zip([&data, &fixed]) {
            drives::insert(tx, row)?;
            drives::attach(tx, row.id, &Attachment { vm: web.id, position, mount: None })?;
        }
        for row in [&spare, &early] {
            drives::insert(tx, row)?;
            drives::made(tx, row)?;
        }
        // Attached to a VM that was not started, and a copy of such a drive.
        web.state = VmState::Stopped;
        web.generation = 2;
        vms::update(tx, &web, 1)?;
        assert!(!holds(data.id)? && !holds(early.id)?);

        web.state = VmState::Starting;
        web.generation = 3;
        vms::update(tx, &web, 2)?;
        assert!(holds(data.id)? && !holds(fixed.id)? && !holds(spare.id)? && !holds(early.id)?);
        // It stays so without the VM.
        drives::detach(tx, data.id)?;
        vms::delete(tx, web.id)?;
        let late = DriveRecord { parent_id: Some(data.id), ..drive("late") };
        drives::insert(tx, &late)?;
        assert!(!holds(late.id)?, "it is not copied yet");
        drives::made(tx, &late)?;
        assert!(holds(data.id)? && holds(late.id)?);
        Ok(())
    })
    .await
    .unwrap();
}
