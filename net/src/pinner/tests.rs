use std::collections::BTreeMap;
use std::io;

use nexus_net_policy::Surroundings;
use nexus_net_wire::{CONNECTIONS_MAX, Dns, Instance, Subnet, Vm};
use nexus_schema::network::{NetworkMode, NetworkPolicy};

use super::*;
use crate::nft::elements::Wired;

fn view() -> View {
    let wired = |number: u8| {
        let policy = NetworkPolicy {
            mode: NetworkMode::Nat,
            allow: vec!["*.example:443".parse().unwrap()],
            ..NetworkPolicy::default()
        };
        let vm = Vm {
            id: VmId::from_i64(number.into()).unwrap(),
            name: format!("vm-{number}"),
            owner_uid: 1,
            mac: nexus_net_wire::Mac([2, 0, 0, 0, 0, number]),
            ipv4: [10, 77, 0, number].into(),
            ipv6: None,
            policy,
            groups: Vec::new(),
        };
        Wired::new(vm, format!("nx{number}"), number.into(), &Surroundings::default())
    };
    let instance = Instance {
        id: "0a1b2c3d".parse().unwrap(),
        v4: Subnet { subnet: "10.77.0.0/16".parse().unwrap(), gateway: "10.77.0.1".parse().unwrap() },
        v6: None,
        host_addresses: Vec::new(),
        dns: Dns::FromHost,
        opens_firewall: false,
        connections_max: CONNECTIONS_MAX,
    };
    let vms: BTreeMap<_, _> = [1, 2].map(wired).into_iter().map(|wired| (wired.vm.id, wired)).collect();
    View { instance: Some(instance), vms, around: Surroundings::default() }
}

fn wanted(vm: i64, name: &str) -> Wanted {
    let addresses = vec!["8.8.8.8".parse().unwrap()];
    Wanted {
        vm: VmId::from_i64(vm).unwrap(),
        name: name.to_owned(),
        addresses,
        holds: Duration::from_secs(60),
    }
}

fn refused() -> Error {
    Error::Firewall { what: "open the addresses", source: io::Error::from_raw_os_error(nix::libc::EEXIST) }
}

#[test]
fn answers_that_wait_are_one_change_and_a_repeated_one_is_none() {
    let (view, mut pins, now) = (view(), Pins::default(), Instant::now());
    let mut commits = Vec::new();
    let asked = [wanted(1, "a.example"), wanted(2, "b.example"), wanted(3, "c.example"), wanted(1, "d.test")];
    let results = open_all(&asked, &view, &mut pins, now, |changes| {
        commits.push(changes.len());
        Ok(())
    });
    assert_eq!(results, [Ok(()), Ok(()), Err(PinError::Changed), Err(PinError::Changed)]);
    assert_eq!(commits, [2]);
    let again = open_all(&asked[..1], &view, &mut pins, now, |_| panic!("it is open"));
    assert_eq!(again, [Ok(())]);
}

#[test]
fn what_the_kernel_does_not_take_is_not_noted_and_takes_nothing_from_others() {
    let (view, mut pins, now) = (view(), Pins::default(), Instant::now());
    let asked = [wanted(1, "a.example"), wanted(2, "b.example")];
    let mut commits = 0;
    let results = open_all(&asked, &view, &mut pins, now, |changes| {
        commits += 1;
        // Together, and the first one alone.
        if changes.len() == 2 || commits == 2 { Err(refused()) } else { Ok(()) }
    });
    let Err(PinError::Refused { why }) = &results[0] else { panic!("{results:?}") };
    assert!(why.contains("open the addresses"), "{why}");
    assert_eq!((results[1].clone(), commits), (Ok(()), 3));
    let address = asked[0].addresses[0];
    assert_eq!(pins.name(asked[0].vm, address), None);
    assert_eq!(pins.name(asked[1].vm, address), Some("b.example"));
    // Asked again, it is tried again.
    assert_eq!(open_all(&asked[..1], &view, &mut pins, now, |_| Ok(())), [Ok(())]);
    assert_eq!(pins.name(asked[0].vm, address), Some("a.example"));
}

#[tokio::test]
async fn an_answer_waits_no_longer_than_its_deadline() {
    let (jobs, _nobody_takes) = mpsc::channel(1);
    let pinner = Pinner { jobs, patience: Duration::from_millis(20) };
    assert_eq!(pinner.open(wanted(1, "a.example")).await, Err(PinError::Late));
    // The channel is full.
    assert_eq!(pinner.open(wanted(1, "a.example")).await, Err(PinError::Late));
}
