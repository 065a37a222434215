//! Streams into VMs on their own connections, for programs that need more than MCP.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::id::VmKind;
use crate::name::Reference;
use crate::stream::Open;
use crate::tool::{Effect, Tool};

/// The path at which a stream is opened: `GET` on the daemon's Unix socket, with an upgrade to [`PROTOCOL`].
pub const PATH: &str = "/stream";
/// The protocol that the connection is upgraded to: a line about what was opened, then frames in both directions.
pub const PROTOCOL: &str = "nexus-stream";

/// Returns a ticket for a stream.
pub enum GuestStreamOpen {}

/// Arguments of `guest_stream_open`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GuestStreamOpenParams {
    /// The VM: its name or id.
    pub vm: Reference<VmKind>,
    /// What to open, as docs/guest-link.md has it: `{"tcp":{"port":80}}`, `{"exec":{"start":{…}}}` with the arguments of
    /// guest_command_start, `{"attach":{"id":…}}`, or `{"tree_in":{…}}` and `{"tree_out":{…}}` for files.
    #[schemars(with = "Map<String, Value>")]
    pub open: Open,
}

/// The result of `guest_stream_open`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct GuestStreamOpenOutput {
    /// Good for this stream and this caller, once.
    pub ticket: String,
    /// What to `GET` on the daemon's Unix socket with `Upgrade: nexus-stream`.
    pub path: String,
    /// How long the ticket is good, in seconds.
    pub expires_in_s: u32,
}

impl Tool for GuestStreamOpen {
    const NAME: &'static str = "guest_stream_open";
    const TITLE: &'static str = "Open a stream into a VM";
    const DESCRIPTION: &'static str = "Gives a ticket for a byte stream into a VM: a command's input and output, a TCP connection, or files; \
        only programs on the daemon's Unix socket can use it, as `nexusctl exec`, `forward` and `cp` do. Models take guest_run_command and \
        guest_copy_in.";
    const EFFECT: Effect = Effect::Destructive { idempotent: false };
    const OPEN_WORLD: bool = true;
    type Params = GuestStreamOpenParams;
    type Output = GuestStreamOpenOutput;
}
