//! The requests of nexusd.

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
    /// The first request of a connection. `nexus-net` answers with its own generation and does not enforce a match: a client that does not
    /// support it must close the connection.
    Hello {
        /// The protocol generation that the client speaks.
        protocol: u32,
    },
    /// Creates or changes the instance's bridge, addresses, tables and resolver. Must be sent before requests for VMs, once to each new
    /// `nexus-net`. The state that an earlier process left is adopted: its VMs keep their network.
    Configure {
        /// The complete instance.
        instance: Instance,
    },
    /// Creates a VM's TAP and rules, before its VMM is started. If it is repeated, it changes what is different and returns the same TAP.
    Attach {
        /// The complete VM.
        vm: Vm,
    },
    /// Changes policy, groups and name of an attached VM, and cuts the connections that are no longer allowed.
    Update {
        /// The complete VM.
        vm: Vm,
    },
    /// Removes a VM's TAP and rules. Does nothing if it has none.
    Detach {
        /// The VM.
        id: VmId,
    },
    /// Returns the current state.
    State {},
    /// Removes all TAPs and rules of the instance except those of these VMs.
    Retain {
        /// The VMs to keep.
        ids: Vec<VmId>,
    },
    /// Removes everything that belongs to the instance, answers, and ends the process. Works without `configure` if `instance` is given.
    Cleanup {
        /// The instance (default: the configured one).
        #[serde(default, skip_serializing_if = "Option::is_none")]
        instance: Option<InstanceId>,
    },
    /// Sends events to this connection from now on.
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
    /// Its IPv6 addresses, a ULA network. Without it VMs have no IPv6.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub v6: Option<Subnet<Ipv6Addr>>,
    /// Further addresses of the host, which are not in this network namespace. Those in the namespace are detected.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub host_addresses: Vec<IpAddr>,
    /// The servers that the resolver forwards to.
    #[serde(default)]
    pub dns: Dns,
}

/// The addresses of an instance in one family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Subnet<A> {
    /// The network of the VMs' addresses.
    pub subnet: Cidr,
    /// The host's address in it: the VMs' gateway and resolver.
    pub gateway: A,
}

/// The servers that the resolver forwards to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Dns {
    /// The host's own servers, which are read again when the host's configuration changes.
    #[default]
    FromHost,
    /// These servers.
    Servers(Vec<SocketAddr>),
}

/// A VM's network. The addresses must be in the instance's subnets, and no other VM may have them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vm {
    /// Its id; also the alias of its TAP.
    pub id: VmId,
    /// Its name. Other VMs of its groups can look it up as `NAME.nexus.internal`.
    pub name: String,
    /// The user that its VMM runs as: only this user and root can open the TAP.
    pub owner_uid: u32,
    /// The MAC address of its network card; frames from other addresses are dropped.
    pub mac: Mac,
    /// Its IPv4 address.
    pub ipv4: Ipv4Addr,
    /// Its IPv6 address, if the instance has IPv6. Its link-local address is the EUI-64 one of its MAC address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv6: Option<Ipv6Addr>,
    /// What it may reach. Of the modes only `none` matters here: it allows nothing.
    pub policy: NetworkPolicy,
    /// Its groups. VMs with a common group may connect to each other.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<String>,
}

/// The name of an instance: 8 lower-case hexadecimal digits, not all zero. In JSON it is a string.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InstanceId(u32);

impl InstanceId {
    /// Returns the id with this number; `None` for 0.
    pub const fn new(number: u32) -> Option<Self> {
        if number == 0 { None } else { Some(Self(number)) }
    }

    /// Returns the id as a number.
    pub const fn number(self) -> u32 {
        self.0
    }
}

/// The error for a text that is not the name of an instance.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not an instance: expected 8 hexadecimal digits, not all of them 0")]
pub struct ParseInstanceIdError {
    /// The text.
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
