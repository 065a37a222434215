//! Network interfaces: finds them by MAC address, adds addresses and routes, and brings them up, all over netlink.

mod netlink;

use std::io;
use std::net::IpAddr;
use std::path::Path;

use nexus_schema::link::{Interface, InterfaceAddress};

use self::netlink::{Link, Netlink};

/// The directories of the kernel's interface settings, one per family.
const SETTINGS: [&str; 2] = ["/proc/sys/net/ipv4/conf", "/proc/sys/net/ipv6/conf"];
/// The settings that are switched off. All VMs of a host are behind one gateway; redirects, or router advertisements of another VM, must not lead
/// past it.
const OFF: [&str; 3] = ["accept_redirects", "accept_ra", "autoconf"];
/// The index of the interface `lo`.
const LOOPBACK: u32 = 1;
/// How much of a connection passes through it in one piece, in bytes. Each piece costs an emulated processor a path through the whole network stack,
/// and by default it has 64 KiB.
const PIECE: u32 = 256 << 10;

/// Configures one interface as the host wants it.
pub(super) fn bring_up(interface: &Interface) -> io::Result<()> {
    let addresses: Vec<_> = interface.addresses.iter().map(parse).collect::<io::Result<_>>()?;
    let netlink = Netlink::open()?;
    let link = find(&netlink, &interface.mac)?;
    for of in ["all", &link.name] {
        switch_off(of)?;
    }
    netlink.set_up(link.index, interface.mtu)?;
    for Address { address, prefix, gateway } in addresses {
        if address.is_ipv6() && !Path::new(SETTINGS[1]).exists() {
            // The kernel has no IPv6; this address is skipped.
            continue;
        }
        netlink.add_address(link.index, address, prefix)?;
        if let Some(gateway) = gateway {
            netlink.add_host_route(link.index, gateway)?;
            netlink.add_default_route(link.index, gateway)?;
        }
    }
    Ok(())
}

/// Has a restored guest's interface take over the addresses of a new one: its hardware address, and nothing of the old network. The interface
/// stays down until it is configured.
pub(super) fn take_over(interface: &Interface) -> io::Result<()> {
    let netlink = Netlink::open()?;
    let wanted = hardware_address(&interface.mac)?;
    let links = netlink.links()?;
    // What has this address already was not forked.
    if links.iter().any(|link| link.address == wanted) {
        return Ok(());
    }
    let is_card = |link: &&Link| {
        link.index != LOOPBACK && Path::new("/sys/class/net").join(&link.name).join("device").exists()
    };
    let mut cards = links.iter().filter(is_card);
    let (Some(card), None) = (cards.next(), cards.next()) else {
        return Err(io::Error::new(io::ErrorKind::NotFound, "there is not exactly one network card"));
    };
    netlink.set_down(card.index)?;
    netlink.remove_addresses(card.index)?;
    netlink.set_hardware_address(card.index, &wanted)
}

fn hardware_address(mac: &str) -> io::Result<Vec<u8>> {
    let bytes: Option<Vec<u8>> = mac.split(':').map(|part| u8::from_str_radix(part, 16).ok()).collect();
    let bytes = bytes.filter(|bytes| bytes.len() == 6);
    bytes.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "not a hardware address"))
}

/// Brings up the interface `lo`.
pub(crate) fn bring_up_loopback() -> io::Result<()> {
    let netlink = Netlink::open()?;
    netlink.set_up(LOOPBACK, None)?;
    // It works without, only slower.
    let _ = netlink.set_largest_piece(LOOPBACK, PIECE);
    Ok(())
}

/// An address of an interface, parsed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Address {
    address: IpAddr,
    prefix: u8,
    gateway: Option<IpAddr>,
}

fn parse(given: &InterfaceAddress) -> io::Result<Address> {
    let refuse = |why: &str| {
        let text = format!("`{}` {why}", given.address);
        Err(io::Error::new(io::ErrorKind::InvalidInput, text))
    };
    let Some((address, prefix)) = split(&given.address) else {
        return refuse("is not an address with a prefix length");
    };
    match given.gateway {
        Some(gateway) if gateway.is_ipv4() != address.is_ipv4() => refuse("has a gateway of another family"),
        gateway => Ok(Address { address, prefix, gateway }),
    }
}

fn split(text: &str) -> Option<(IpAddr, u8)> {
    let (address, prefix) = text.split_once('/')?;
    let address: IpAddr = address.parse().ok()?;
    let prefix = prefix.parse().ok()?;
    (prefix <= if address.is_ipv4() { 32 } else { 128 }).then_some((address, prefix))
}

fn find(netlink: &Netlink, mac: &str) -> io::Result<Link> {
    let wanted: Option<Vec<u8>> = mac.split(':').map(|part| u8::from_str_radix(part, 16).ok()).collect();
    let found = netlink.links()?.into_iter().find(|link| Some(&link.address) == wanted.as_ref());
    found.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no interface has this address"))
}

/// Switches off redirects and router advertisements for an interface, or for `all`.
fn switch_off(interface: &str) -> io::Result<()> {
    for settings in SETTINGS {
        for setting in OFF {
            match std::fs::write(Path::new(settings).join(interface).join(setting), "0") {
                // This family or setting does not exist in this kernel.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                written => written?,
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::netlink::{Message, RTM_NEWLINK};
    use super::*;

    fn address(text: &str, gateway: Option<&str>) -> InterfaceAddress {
        InterfaceAddress { address: text.into(), gateway: gateway.map(|gateway| gateway.parse().unwrap()) }
    }

    #[test]
    fn addresses_have_a_prefix_length() {
        assert_eq!(split("10.90.0.2/24"), Some((IpAddr::from([10, 90, 0, 2]), 24)));
        assert!(split("fd00::2/64").is_some());
        for bad in ["10.0.0.1", "10.0.0.1/33", "x/24", "fd00::1/129", ""] {
            assert_eq!(split(bad), None, "{bad}");
        }
        assert!(parse(&address("10.0.0.2/32", Some("fd00::1"))).is_err());
    }

    /// Runs `work` with an interface in a network namespace of its own.
    fn in_a_namespace(work: impl FnOnce(&Netlink) + Send + 'static) {
        std::thread::spawn(move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("tests of networks run as root");
            let netlink = Netlink::open().unwrap();
            // struct ifinfomsg; IFLA_IFNAME, IFLA_ADDRESS, IFLA_LINKINFO { IFLA_INFO_KIND }
            let kind = [&8_u16.to_ne_bytes()[..], &1_u16.to_ne_bytes(), b"veth"].concat();
            let message = Message::new(RTM_NEWLINK, 0x600, &[0; 16])
                .attribute(3, b"eth7\0")
                .attribute(1, &[0x02, 0x4e, 0, 0, 1, 2])
                .attribute(18, &kind);
            netlink.request(message).unwrap();
            // The peer is brought up too, for a carrier.
            let ends = netlink.links().unwrap();
            ends.iter()
                .filter(|end| end.name.starts_with("veth"))
                .for_each(|end| netlink.set_up(end.index, None).unwrap());
            work(&netlink);
        })
        .join()
        .unwrap();
    }

    fn kernel_says(file: &str) -> String {
        std::fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap()
    }

    #[test]
    fn an_interface_has_its_addresses_and_a_way_out_that_is_on_no_network_of_its_own() {
        in_a_namespace(|netlink| {
            let interface = Interface {
                mac: "02:4E:00:00:01:02".into(),
                addresses: vec![
                    address("10.77.0.9/32", Some("10.77.0.1")),
                    address("fd00:4e58::9/128", Some("fd00:4e58::1")),
                ],
                mtu: Some(1400),
            };
            // Twice, as after a restart of the agent.
            for _ in 0..2 {
                bring_up(&interface).unwrap();
            }
            let index = find(netlink, &interface.mac).unwrap().index;
            let hex = |address: [u8; 4]| format!("{:08X}", u32::from_ne_bytes(address));
            let (gateway, nowhere) = (hex([10, 77, 0, 1]), hex([0; 4]));
            let routes = kernel_says("route");
            let mut routes: Vec<_> = routes
                .lines()
                .skip(1)
                .map(|line| line.split_whitespace().take(3).collect::<Vec<_>>().join(" "))
                .collect();
            routes.sort();
            let mut expected = [format!("eth7 {nowhere} {gateway}"), format!("eth7 {gateway} {nowhere}")];
            expected.sort();
            assert_eq!(routes, expected);
            assert!(kernel_says("fib_trie").contains("10.77.0.9"));
            let own = "fd004e580000000000000000000000 09".replace(' ', "");
            let line =
                kernel_says("if_inet6").lines().find(|line| line.starts_with(&own)).unwrap().to_owned();
            let fields: Vec<_> = line.split_whitespace().collect();
            // The prefix length, and the flag that no duplicate address detection was done.
            assert_eq!((fields[1], fields[2]), (format!("{index:02x}").as_str(), "80"), "{line}");
            assert_eq!(u8::from_str_radix(fields[4], 16).unwrap() & 0x42, 0x02, "{line}");
            let routes6 = kernel_says("ipv6_route");
            let default = format!("{0} 00 {0} 00 fd004e58000000000000000000000001", "0".repeat(32));
            assert!(
                routes6.lines().any(|line| line.starts_with(&default) && line.ends_with("eth7")),
                "{routes6}"
            );
            for setting in [
                "ipv4/conf/eth7/accept_redirects",
                "ipv6/conf/eth7/accept_redirects",
                "ipv6/conf/eth7/accept_ra",
            ] {
                let value = std::fs::read_to_string(format!("/proc/sys/net/{setting}")).unwrap();
                assert_eq!(value.trim(), "0", "{setting}");
            }
        });
    }

    #[test]
    fn connections_on_the_loopback_interface_work_with_large_pieces() {
        in_a_namespace(|netlink| {
            bring_up_loopback().unwrap();
            netlink.set_largest_piece(LOOPBACK, PIECE).unwrap();
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            let address = listener.local_addr().unwrap();
            let sent: Vec<u8> = (0..8_000_000_u32).map(|n| (n * 31 / 7) as u8).collect();
            let expected = sent.clone();
            // It has the namespace of this thread.
            let writing = std::thread::spawn(move || {
                let mut stream = std::net::TcpStream::connect(address).unwrap();
                std::io::Write::write_all(&mut stream, &sent).unwrap();
            });
            let mut all = Vec::new();
            std::io::Read::read_to_end(&mut listener.accept().unwrap().0, &mut all).unwrap();
            writing.join().unwrap();
            assert!(all == expected);
        });
    }

    #[test]
    fn an_interface_that_is_not_there_is_said() {
        in_a_namespace(|_| {
            let interface = Interface { mac: "02:4e:00:00:00:01".into(), addresses: vec![], mtu: None };
            let error = bring_up(&interface).unwrap_err();
            assert_eq!(error.to_string(), "no interface has this address");
        });
    }
}
