use super::FirewallHook::{Forward, Input};
use super::*;

const BRIDGE: &str = "nxb0a1b2c3d";

/// An entry without matches.
fn entry(kind: Kind, name: &[u8], data: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; kind.head()];
    bytes[kind.sizes()..kind.sizes() + 2].copy_from_slice(&(kind.head() as u16).to_ne_bytes());
    let mut target = vec![0; PART];
    target[2..2 + name.len()].copy_from_slice(name);
    target.extend_from_slice(data);
    target.resize(target.len().next_multiple_of(8), 0);
    let length = target.len() as u16;
    target[..2].copy_from_slice(&length.to_ne_bytes());
    bytes.extend_from_slice(&target);
    let length = bytes.len() as u16;
    bytes[kind.sizes() + 2..kind.sizes() + 4].copy_from_slice(&length.to_ne_bytes());
    bytes
}

fn verdict(kind: Kind, verdict: i32) -> Vec<u8> {
    entry(kind, b"", &verdict.to_ne_bytes())
}

/// A table with a chain `mine` that FORWARD jumps to, and this policy of FORWARD: INPUT and OUTPUT accept. Each rule has counted its index.
pub(super) fn table(kind: Kind, policy: i32) -> Table {
    // The jump leads behind the head of `mine`.
    let head = entry(kind, b"ERROR", b"mine\0");
    let one = verdict(kind, ACCEPT).len();
    let jump = i32::try_from(4 * one + head.len()).unwrap();
    let all = [
        verdict(kind, ACCEPT),
        verdict(kind, jump),
        verdict(kind, policy),
        verdict(kind, ACCEPT),
        head,
        verdict(kind, DROP),
        verdict(kind, -5),
        entry(kind, b"ERROR", b"ERROR\0"),
    ];
    let mut places = Vec::new();
    let mut listed = Vec::new();
    for (index, mut bytes) in all.into_iter().enumerate() {
        places.push(listed.len() as u32);
        bytes[kind.counters()] = index as u8;
        listed.extend(bytes);
    }
    let mut info = vec![0; NAME];
    let hooks = |of: [usize; 3]| [0, places[of[0]], places[of[1]], places[of[2]], 0];
    let numbers = [0b1110_u32].into_iter().chain(hooks([0, 1, 3])).chain(hooks([0, 2, 3]));
    for number in numbers.chain([8, listed.len() as u32]) {
        info.extend(number.to_ne_bytes());
    }
    assert_eq!(info.len(), INFO);
    Table::read(kind, &info, &listed).unwrap()
}

/// Reads a replacement as the kernel would show it.
fn shown(table: &Table) -> Table {
    let bytes = table.replacement().unwrap();
    let mut info = bytes[..NAME + 4].to_vec();
    info.extend_from_slice(&bytes[NAME + 12..REPLACE_COUNTERS]);
    info.extend_from_slice(&bytes[NAME + 4..NAME + 12]);
    assert_eq!(info.len(), INFO);
    assert_eq!(u32_at(&info, INFO - 4), Some((bytes.len() - REPLACE_HEAD) as u32));
    Table::read(table.kind, &info, &bytes[REPLACE_HEAD..]).unwrap()
}

/// Returns the bytes of the entry that the jump of FORWARD leads to.
fn jumped_to(table: &Table) -> &[u8] {
    let jump = table.rules(Forward).last().unwrap().verdict(table.kind).unwrap();
    &table.entries.iter().find(|entry| entry.was_at(u32::try_from(jump).unwrap())).unwrap().bytes
}

#[test]
fn chains_that_drop_are_found_by_policy_and_by_their_last_rule() {
    for kind in Kind::ALL {
        assert!(table(kind, DROP).drops(Forward) && !table(kind, ACCEPT).drops(Forward));
        assert!(!table(kind, DROP).drops(Input));
        assert!(table(kind, DROP).has_chain("mine") && !table(kind, DROP).has_chain("ufw"));
        for (last, drops) in [
            (verdict(kind, DROP), true),
            (entry(kind, b"REJECT", &[0; 8]), true),
            (entry(kind, b"LOG", &[0; 8]), false),
            (rule(kind, BRIDGE, Accepted { is_from: true, protocol: None, port: None }), false),
        ] {
            let mut table = table(kind, ACCEPT);
            table.insert(Input, &[last]);
            assert_eq!(table.drops(Input), drops);
        }
        // It drops some packets only.
        let mut some = verdict(kind, DROP);
        some[0] = 10;
        let mut table = table(kind, ACCEPT);
        table.insert(Input, &[some]);
        assert!(!table.drops(Input));
    }
}

#[test]
fn rules_come_first_and_go_again_and_jumps_lead_where_they_did() {
    for kind in Kind::ALL {
        let before = table(kind, DROP);
        let target = jumped_to(&before).to_vec();
        assert_eq!(target[kind.counters()], 5);
        let mut changed = before.clone();
        for hook in [Forward, Input] {
            let rules = openings(kind, hook, BRIDGE);
            assert_eq!(changed.insert(hook, &rules), rules.len());
            assert_eq!(changed.insert(hook, &rules), 0, "they are there");
        }
        let read_as: Vec<_> = changed.read_as().collect();
        assert_eq!(read_as[..5], [None, None, None, Some(0), None]);
        assert_eq!(read_as[5..], [None, Some(1), Some(2), Some(3), Some(4), Some(5), Some(6), Some(7)]);
        let mut there = shown(&changed);
        assert_eq!((there.rules(Forward).len(), there.rules(Input).len()), (3, 3));
        assert_eq!(jumped_to(&there), target);
        for hook in [Forward, Input] {
            assert!(
                there.rules(hook).iter().zip(openings(kind, hook, BRIDGE)).all(|(is, rule)| is.bytes == rule)
            );
            assert_eq!(there.remove(hook, &openings(kind, hook, "nxb00000001")), 0, "those are another's");
        }
        // What the kernel has counted makes no other rule of it.
        there.entries[0].bytes[kind.counters()] = 9;
        assert_eq!(there.remove(Input, &openings(kind, Input, BRIDGE)), 3);
        assert_eq!(there.remove(Forward, &openings(kind, Forward, BRIDGE)), 2);
        let after = shown(&there);
        assert_eq!(after, before);
        assert_eq!(there.read_as().next(), Some(Some(3)), "it was behind three of ours");
    }
}

#[test]
fn rules_are_as_long_as_the_kernels() {
    for (kind, plain, with_port) in [(Kind::V4, 112 + 40, 112 + 48 + 40), (Kind::V6, 168 + 40, 168 + 48 + 40)]
    {
        let rules = openings(kind, Input, BRIDGE);
        let [dns, _, icmp] = &rules[..] else { panic!("three rules") };
        assert_eq!((icmp.len(), dns.len()), (plain, with_port));
        let name = &icmp[kind.addresses()..kind.addresses() + 12];
        assert_eq!(name, b"nxb0a1b2c3d\0");
        assert_eq!(
            icmp[kind.addresses() + 32..kind.addresses() + 45],
            *b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\0"
        );
    }
}

#[test]
fn what_is_cut_off_or_jumps_nowhere_is_not_used() {
    let kind = Kind::V4;
    let whole = shown(&table(kind, DROP));
    let listed: Vec<u8> = whole.entries.iter().flat_map(|entry| entry.bytes.clone()).collect();
    let info = [0; INFO];
    assert!(Table::read(kind, &info, &listed).is_some());
    for cut in [1, kind.head(), listed.len() - 1] {
        assert_eq!(Table::read(kind, &info, &listed[..cut]), None, "{cut}");
    }
    let mut lost = whole;
    lost.entries[1].bytes[kind.head() + PART..kind.head() + PART + 4].copy_from_slice(&7_i32.to_ne_bytes());
    assert_eq!(lost.replacement(), None);
}
