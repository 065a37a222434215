use nexus_net_wire::Vm;
use nexus_schema::network::{NetworkMode, NetworkPolicy};

use super::*;
use crate::conntrack::Flow;

fn wired(allow: &[&str]) -> Wired {
    let policy = NetworkPolicy {
        mode: NetworkMode::Nat,
        allow: allow.iter().map(|text| text.parse().unwrap()).collect(),
        ..NetworkPolicy::default()
    };
    let vm = Vm {
        id: VmId::from_i64(1).unwrap(),
        name: "web".to_owned(),
        owner_uid: 1,
        mac: "02:4e:00:00:00:02".parse().unwrap(),
        ipv4: "10.77.0.2".parse().unwrap(),
        ipv6: None,
        policy,
        groups: Vec::new(),
    };
    Wired::new(vm, "nx0".to_owned(), 7, &nexus_net_policy::Surroundings::default())
}

#[test]
fn a_connection_that_cannot_be_cut_keeps_no_other_one_open() {
    let wired = wired(&["8.8.8.8"]);
    let mark = wired.mark();
    let view = View { vms: BTreeMap::from([(wired.vm.id, wired)]), ..View::default() };
    let to = |address: &str, is_cut| {
        let flow = Flow { protocol: 6, address: address.parse().unwrap(), port: 443 };
        Connection::to(flow, mark, is_cut)
    };
    let all = [
        to("8.8.4.4", false),
        to("8.8.8.8", false),
        to("1.1.1.1", false),
        to("9.9.9.9", false),
        to("8.8.8.8", true),
    ];
    let mut set = Vec::new();
    let judged = judge_all(&all, &view, &Pins::default(), |connection, is_cut| {
        set.push((connection.flow.address.to_string(), is_cut));
        match set.len() {
            1 | 2 => Err(io::Error::from_raw_os_error(nix::libc::ENOBUFS)),
            _ => Ok(()),
        }
    });
    let expected = [("8.8.4.4", true), ("1.1.1.1", true), ("9.9.9.9", true), ("8.8.8.8", false)];
    assert_eq!(set, expected.map(|(address, is_cut)| (address.to_owned(), is_cut)));
    let (count, first) = judged.not_cut.unwrap();
    assert_eq!((count, first.raw_os_error()), (2, Some(nix::libc::ENOBUFS)));
    let cut: Vec<_> = judged.cut.iter().filter_map(|denial| denial.address).collect();
    assert_eq!(cut, ["9.9.9.9".parse::<IpAddr>().unwrap()]);
}
