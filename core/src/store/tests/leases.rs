//! Leases of addresses: no address twice, whatever is taken, released and deleted in whatever order.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::store::leases::{self, NUMBER_FIRST};

fn database(vms: u32) -> (Connection, Vec<VmId>) {
    let mut db = Connection::open_in_memory().unwrap();
    migrations().to_latest(&mut db).unwrap();
    db.pragma_update(None, "foreign_keys", true).unwrap();
    let rows: Vec<_> = (0..vms).map(|number| vm(&format!("vm-{number}"), 3 + number)).collect();
    rows.iter().for_each(|row| vms::insert(&db, row).unwrap());
    (db, rows.iter().map(|row| row.id).collect())
}

#[derive(Debug, Clone)]
enum Step {
    Take(usize),
    Release(usize),
    Delete(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = (0..3_u8, 0..12_usize).prop_map(|(kind, vm)| match kind {
        0 => Step::Release(vm),
        1 if vm % 4 == 0 => Step::Delete(vm),
        _ => Step::Take(vm),
    });
    proptest::collection::vec(step, 0..60)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn no_address_is_given_twice(steps in steps()) {
        let (db, ids) = database(12);
        // Eight addresses for twelve VMs.
        let last = NUMBER_FIRST + 7;
        let (mut held, mut deleted) = (BTreeMap::new(), BTreeSet::new());
        for step in steps {
            match step {
                Step::Take(vm) if deleted.contains(&vm) => continue,
                Step::Take(vm) => match leases::take(&db, ids[vm], last) {
                    Ok(lease) => {
                        prop_assert!((NUMBER_FIRST..=last).contains(&lease.number));
                        let now = (lease.number, lease.mac);
                        if let Some(before) = held.insert(vm, now.clone()) {
                            prop_assert_eq!(before, now, "it keeps what it has");
                        }
                    }
                    Err(error) => {
                        prop_assert!(matches!(error, StoreError::NoAddress), "{error}");
                        prop_assert_eq!(held.len(), 8, "only when all are in use");
                    }
                },
                Step::Release(vm) => {
                    leases::release(&db, ids[vm]).unwrap();
                    held.remove(&vm);
                }
                Step::Delete(vm) => {
                    vms::delete(&db, ids[vm]).unwrap();
                    held.remove(&vm);
                    deleted.insert(vm);
                }
            }
            let numbers: BTreeSet<_> = held.values().map(|(number, _)| number).collect();
            let macs: BTreeSet<_> = held.values().map(|(_, mac)| mac).collect();
            prop_assert_eq!((numbers.len(), macs.len()), (held.len(), held.len()));
        }
    }
}

#[test]
fn hardware_addresses_are_of_this_machine_alone_and_follow_from_the_id() {
    let (db, ids) = database(2);
    let lease = leases::take(&db, ids[0], 9).unwrap();
    let first = u8::from_str_radix(&lease.mac[..2], 16).unwrap();
    assert_eq!(
        (first & 0b11, lease.mac.len()),
        (0b10, 17),
        "locally administered, of one machine: {}",
        lease.mac
    );
    leases::release(&db, ids[0]).unwrap();
    assert_eq!(leases::take(&db, ids[0], 9).unwrap(), lease);
    assert_ne!(leases::take(&db, ids[1], 9).unwrap().mac, lease.mac);
}

#[test]
fn a_lease_that_does_not_fit_a_smaller_subnet_is_another_one() {
    let (db, ids) = database(3);
    for vm in &ids {
        leases::take(&db, *vm, 9).unwrap();
    }
    leases::release(&db, ids[0]).unwrap();
    assert_eq!(leases::take(&db, ids[2], 3).unwrap().number, 2);
}

#[test]
fn a_boot_has_an_interface_until_it_is_disconnected() {
    let (db, ids) = database(2);
    let boot = random_id();
    leases::take(&db, ids[0], 9).unwrap();
    assert_eq!(leases::connected(&db).unwrap(), []);
    leases::connect(&db, ids[0], boot, "nx0").unwrap();
    let lease = leases::of_vm(&db, ids[0]).unwrap().unwrap();
    assert_eq!((lease.boot, lease.tap.as_deref()), (Some(boot), Some("nx0")));
    assert_eq!(leases::connected(&db).unwrap(), ["vm-0".parse().unwrap()]);
    leases::disconnect(&db, ids[0]).unwrap();
    assert_eq!(leases::of_vm(&db, ids[0]).unwrap().unwrap().boot, None);
    assert_eq!(leases::subnet(&db).unwrap(), None);
    leases::set_subnet(&db, "10.1.0.0/20").unwrap();
    leases::set_subnet(&db, "10.2.0.0/20").unwrap();
    assert_eq!(leases::subnet(&db).unwrap().as_deref(), Some("10.2.0.0/20"));
}
