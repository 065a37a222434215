//! Ports of guests that are published on the host.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::id::{BootId, VmKind};
use crate::name::Reference;
use crate::tool::{Effect, Tool};

/// A port of a guest that clients on the host reach.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PublishedPort {
    /// The TCP port on the guest's loopback.
    pub guest_port: u16,
    /// The TCP port on the host's loopback; absent for a socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_port: Option<u16>,
    /// Where clients connect: `127.0.0.1:PORT`, or the path of a Unix socket that the daemon's own user may use.
    pub address: String,
    /// Why nobody can connect just now, where that is so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// Publishes a guest's port on the host.
pub enum VmPublish {}

/// Arguments of `vm_publish`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VmPublishParams {
    /// The VM: its name or id.
    pub vm: Reference<VmKind>,
    /// The server's TCP port in the VM, on any address or 127.0.0.1.
    #[schemars(range(min = 1))]
    pub guest_port: u16,
    /// The TCP port on the host's 127.0.0.1 (default: the same number if free, else a free one).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub host_port: Option<u16>,
    /// A Unix socket instead of a port of the host (default false); the reply says where.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<bool>,
    /// Only if this is its boot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub if_boot_id: Option<BootId>,
}

impl Tool for VmPublish {
    const NAME: &'static str = "vm_publish";
    const TITLE: &'static str = "Publish a port";
    const DESCRIPTION: &'static str = "Makes a TCP server in a VM reachable on the host's loopback interface or by a Unix socket, whatever the \
        VM's network; use it to open or test what runs in the VM from the host. It stays until vm_unpublish or vm_delete.";
    const EFFECT: Effect = Effect::Additive { idempotent: true };
    type Params = VmPublishParams;
    type Output = PublishedPort;
}

/// Unpublishes a guest's port.
pub enum VmUnpublish {}

/// Arguments of `vm_unpublish`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VmUnpublishParams {
    /// The VM: its name or id.
    pub vm: Reference<VmKind>,
    /// The port in the VM.
    #[schemars(range(min = 1))]
    pub guest_port: u16,
    /// Only at this port of the host (default: wherever it is published).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub host_port: Option<u16>,
    /// Only if this is its boot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub if_boot_id: Option<BootId>,
}

/// Result of `vm_unpublish`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VmUnpublishOutput {
    /// The removed ports; their connections are closed.
    pub unpublished: Vec<PublishedPort>,
}

impl Tool for VmUnpublish {
    const NAME: &'static str = "vm_unpublish";
    const TITLE: &'static str = "Unpublish a port";
    const DESCRIPTION: &'static str = "Ends what vm_publish began: the host's port or socket is closed, with all connections \
        through it; use it when nobody needs the server in the VM any more.";
    const EFFECT: Effect = Effect::Destructive { idempotent: false };
    type Params = VmUnpublishParams;
    type Output = VmUnpublishOutput;
}
