//! Finds out why a packet was refused: the kernel only reports that it was, so the policy decides about it again. Pure.

use std::net::IpAddr;

use nexus_net_policy::{Surroundings, decide_address, has_name_list, is_closed};
use nexus_net_wire::Protocol;
use nexus_schema::network::{DenyReason, NetworkPolicy, RuleProtocol};

use crate::conntrack::Flow;

/// The port of QUIC, and those of DNS, plain and over TLS.
const QUIC_PORT: u16 = 443;
const RESOLVER_PORTS: [u16; 2] = [53, 853];
const UDP: u8 = 17;

/// Returns the protocol with this number in IP headers.
pub(crate) const fn protocol(number: u8) -> Protocol {
    match number {
        0 => Protocol::Arp,
        1 | 58 => Protocol::Icmp,
        6 => Protocol::Tcp,
        17 => Protocol::Udp,
        other => Protocol::Other(other),
    }
}

/// Returns why a connection to this destination is refused; `gateways` are the host's addresses on the bridge.
pub(crate) fn reason(
    policy: &NetworkPolicy,
    around: &Surroundings,
    gateways: &[IpAddr],
    flow: Flow,
) -> DenyReason {
    let Flow { address, port, protocol } = flow;
    let policy = &*policy.over(RuleProtocol::of_number(protocol));
    if gateways.contains(&address) {
        return DenyReason::Host;
    }
    if is_closed(address) {
        return DenyReason::Reserved;
    }
    let place = around.place(address, port);
    if place.is_own && place.is_of_vms {
        // An address of the uplink, which is no VM's.
        return DenyReason::Host;
    }
    let decided = decide_address(policy, place, false);
    match decided {
        Err(DenyReason::AddressNotAllowed) | Ok(()) if has_name_list(policy) => {
            if protocol == UDP && port == QUIC_PORT {
                DenyReason::Quic
            } else if RESOLVER_PORTS.contains(&port) {
                DenyReason::Resolver
            } else {
                DenyReason::AddressNotAllowed
            }
        }
        Err(reason) => reason,
        // The policy has changed since the refusal.
        Ok(()) => DenyReason::AddressNotAllowed,
    }
}

#[cfg(test)]
mod tests {
    use nexus_schema::network::{NetworkMode, NetworkPreset};

    use super::*;

    #[test]
    fn reasons_are_those_of_the_policy_and_of_the_place() {
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        let policy = |allow: &[&str]| NetworkPolicy {
            mode: NetworkMode::Proxy,
            preset: NetworkPreset::Internet,
            allow: allow.iter().map(|text| text.parse().unwrap()).collect(),
            deny: vec!["8.8.8.8".parse().unwrap()],
            ..NetworkPolicy::default()
        };
        let around = Surroundings {
            own: [address("198.51.100.1"), address("240.0.2.3")].into(),
            closed: vec![
                (address("10.77.0.0"), address("10.77.255.255")),
                (address("240.0.2.0"), address("240.0.2.255")),
            ],
        };
        let (all, listed) = (policy(&[]), policy(&["a.example"]));
        let opened = policy(&["*", "240.0.2.3", "240.0.0.0/8"]);
        for (policy, to, port, protocol, expected) in [
            (&all, "10.77.0.1", 22, 6, DenyReason::Host),
            (&all, "10.77.0.9", 22, 6, DenyReason::OtherVm),
            (&all, "198.51.100.1", 22, 6, DenyReason::Host),
            (&all, "10.0.0.1", 22, 6, DenyReason::Private),
            (&all, "169.254.169.254", 80, 6, DenyReason::Metadata),
            (&all, "8.8.8.8", 80, 6, DenyReason::Denied),
            (&opened, "240.0.2.3", 53, 17, DenyReason::Host),
            (&opened, "240.0.2.9", 53, 17, DenyReason::OtherVm),
            (&listed, "8.8.4.4", 80, 6, DenyReason::AddressNotAllowed),
            (&listed, "8.8.4.4", 443, 17, DenyReason::Quic),
            (&listed, "8.8.4.4", 53, 17, DenyReason::Resolver),
            (&listed, "10.0.0.1", 80, 6, DenyReason::AddressNotAllowed),
        ] {
            let flow = Flow { protocol, address: address(to), port };
            assert_eq!(reason(policy, &around, &[address("10.77.0.1")], flow), expected, "{to}:{port}");
        }
    }
}
