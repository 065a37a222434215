//! What nexusd asks for.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use nexus_schema::id::VmId;
use nexus_schema::network::NetworkPolicy;
use serde::{Deserialize, Serialize};

use crate::{Cidr, Mac};

/// A request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// The first one of a connection. Every other one may follow, whatever the answer's protocol is; it is up to the client to go.
    Hello {
        /// The generation that the client speaks.
        protocol: u32,
    },
    /// Makes the instance's bridge, addresses, tables and resolver, or changes them to this. To be asked before the VMs' requests, once per
    /// connection to a `nexus-net` that is new. What a killed predecessor left is taken up: its VMs keep their network.
    Configure {
        /// The instance, whole.
        instance: Instance,
    },
    /// Gives a VM its TAP and its rules, before its VMM is started. Repeated, it changes what is different and answers the same TAP.
    Attach {
        /// The VM, whole.
        vm: Vm,
    },
    /// Changes policy, groups and name of a VM that is attached, and cuts the connections that are no longer allowed.
    Update {
        /// The VM, whole.
        vm: Vm,
    },
    /// Removes a VM's TAP and rules; nothing happens if it has none.
    Detach {
        /// The VM.
        id: VmId,
    },
    /// What there is.
    State {},
    /// Removes all TAPs and rules of the instance but those of these VMs.
    Retain {
        /// The VMs that stay.
        ids: Vec<VmId>,
    },
    /// Removes all that is the instance's, answers, and ends the process. Works without `configure` if `instance` is given.
    Cleanup {
        /// Whose; the configured one if it is left out.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        instance: Option<InstanceId>,
    },
    /// From now on this connection is sent events.
    Watch {},
}

/// One daemon's network: a bridge, two nftables tables and a resolver.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Instance {
    /// Its name in interfaces and tables.
    pub id: InstanceId,
    /// Its IPv4 addresses.
    pub v4: Subnet<Ipv4Addr>,
    /// Its IPv6 addresses, a ULA network; without it VMs have no IPv6.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub v6: Option<Subnet<Ipv6Addr>>,
    /// Addresses of the host besides those that this network namespace has, which are known without being told.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub host_addresses: Vec<IpAddr>,
    /// Where the resolver forwards to.
    #[serde(default)]
    pub dns: Dns,
}

/// The addresses of an instance in one family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Subnet<A> {
    /// The network that the VMs' addresses are of.
    pub subnet: Cidr,
    /// The host's address in it: the VMs' gateway and resolver.
    pub gateway: A,
}

/// Where the resolver forwards to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Dns {
    /// To the servers that the host itself asks, read anew when its configuration changes.
    #[default]
    FromHost,
    /// To these.
    Servers(Vec<SocketAddr>),
}

/// A VM's network. The addresses are of the instance's subnets, and no other VM has them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vm {
    /// Its id; also the alias of its TAP.
    pub id: VmId,
    /// Its name, which other VMs of its groups look up as `NAME.nexus.internal`.
    pub name: String,
    /// The user that its VMM runs as: only this one (and root) can attach to the TAP.
    pub owner_uid: u32,
    /// The address of its network card; frames from others are dropped.
    pub mac: Mac,
    /// Its IPv4 address.
    pub ipv4: Ipv4Addr,
    /// Its IPv6 address, where the instance has such ones. Its link-local address is the EUI-64 one of its MAC address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv6: Option<Ipv6Addr>,
    /// What it may reach. The mode says nothing here, but that `none` allows nothing.
    pub policy: NetworkPolicy,
    /// VMs that have a group in common may talk to each other.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<String>,
}

/// The name of an instance: 8 digits of hexadecimal in small letters, not all zero. In JSON it is its text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InstanceId(u32);

impl InstanceId {
    /// The id with this number; `None` for 0.
    pub const fn new(number: u32) -> Option<Self> {
        if number == 0 { None } else { Some(Self(number)) }
    }

    /// The number that the digits write.
    pub const fn number(self) -> u32 {
        self.0
    }
}

/// A text that is no name of an instance.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not an instance: 8 digits of hexadecimal, not all of them 0")]
pub struct ParseInstanceIdError {
    /// What was given.
    pub text: String,
}

impl fmt::Display for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}", self.0)
    }
}

impl FromStr for InstanceId {
    type Err = ParseInstanceIdError;

    fn from_str(text: &str) -> Result<Self, ParseInstanceIdError> {
        let is_plain = text.len() == 8 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        let number = is_plain.then(|| u32::from_str_radix(text, 16).ok()).flatten();
        number.and_then(Self::new).ok_or_else(|| ParseInstanceIdError { text: text.to_owned() })
    }
}
