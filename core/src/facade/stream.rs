//! Streams of their own into guests.

use std::sync::Arc;

use nexus_schema::id::{BootId, VmId, VmKind};
use nexus_schema::stream::{LINE_MAX, Open, Opening, VERSION};
use nexus_schema::tools::stream::{GuestStreamOpenOutput, GuestStreamOpenParams, PATH};
use nexus_schema::{ErrorCode, Reference, ToolError};

use super::{CallContext, Caller, Nexus};
use crate::context::{Handle, Place, TICKET_LIFE};
use crate::guest::{GuestStream, StreamError};

/// An open stream of a VM. It counts as one until it is dropped.
#[derive(Debug)]
pub struct VmStream {
    /// The VM.
    pub vm: VmId,
    /// The boot that it is of.
    pub boot_id: BootId,
    /// The guest's end.
    pub guest: GuestStream,
    /// Tells when the VM's boot is over.
    pub life: StreamLife,
}

/// Why a stream was not opened.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct StreamRefusal {
    /// The error.
    pub error: ToolError,
    /// Whether it is in the guest's words.
    pub is_of_guest: bool,
}

impl From<ToolError> for StreamRefusal {
    fn from(error: ToolError) -> Self {
        Self { error, is_of_guest: false }
    }
}

/// How long a stream may live.
#[derive(Debug)]
pub struct StreamLife {
    handle: Handle,
    boot_id: BootId,
    _place: Place,
}

impl StreamLife {
    /// Waits until the boot that the stream is of is over.
    pub async fn ended(&self) {
        let mut view = self.handle.view.clone();
        let is_over = |view: &crate::context::View| {
            view.deleted || view.record.boot_id != Some(self.boot_id) || !view.record.state.may_run()
        };
        // A VM without a task is deleted, or the daemon ends.
        let _ = view.wait_for(is_over).await;
    }
}

impl Nexus {
    /// The tool `guest_stream_open`.
    pub async fn guest_stream_open(
        &self,
        ctx: &CallContext,
        params: GuestStreamOpenParams,
    ) -> Result<GuestStreamOpenOutput, ToolError> {
        let guest = self.guest(&ctx.caller, &params.vm)?;
        let owner = ctx.caller.owner.clone();
        let opening = Opening { version: VERSION, client: Some(owner.to_string()), open: params.open };
        let length = serde_json::to_vec(&opening).map_or(usize::MAX, |line| line.len());
        if length > LINE_MAX {
            let text = format!("what is to be opened takes {length} bytes, at most {LINE_MAX} can be given");
            return Err(ToolError::new(ErrorCode::TooLarge, text).hint(
                "write what is long to a file in the VM with guest_file_write, or give it by standard input",
            ));
        }
        let boot = (guest.vm, guest.boot_id);
        let ticket = self.shared.streams.issue(owner, ctx.caller.scope, boot, opening)?;
        let expires_in_s = u32::try_from(TICKET_LIFE.as_secs()).unwrap_or(u32::MAX);
        Ok(GuestStreamOpenOutput { path: format!("{PATH}?ticket={ticket}"), ticket, expires_in_s })
    }

    /// Opens what a ticket is good for.
    pub async fn redeem_stream(&self, caller: &Caller, ticket: &str) -> Result<VmStream, StreamRefusal> {
        let ticket = self.shared.streams.redeem(&caller.owner, caller.scope, ticket).ok_or_else(|| {
            ToolError::new(ErrorCode::Forbidden, "this ticket is none, was used, or is older than 30 s")
                .hint("get another one: guest_stream_open")
        })?;
        self.open_opening(caller, &Reference::Id(ticket.vm), Some(ticket.boot_id), &ticket.opening).await
    }

    /// Opens a stream of a running guest.
    pub async fn open_stream(
        &self,
        caller: &Caller,
        vm: &Reference<VmKind>,
        open: Open,
    ) -> Result<VmStream, StreamRefusal> {
        let opening = Opening { version: VERSION, client: Some(caller.owner.to_string()), open };
        self.open_opening(caller, vm, None, &opening).await
    }

    async fn open_opening(
        &self,
        caller: &Caller,
        vm: &Reference<VmKind>,
        of_boot: Option<BootId>,
        opening: &Opening,
    ) -> Result<VmStream, StreamRefusal> {
        // Looked at anew: much may have happened since the ticket was given.
        let guest = self.guest(caller, vm)?;
        let name = guest.name.as_str();
        if of_boot.is_some_and(|boot| boot != guest.boot_id) {
            let text = format!("{name} was restarted since the ticket was given");
            return Err(ToolError::new(ErrorCode::VmGone, text)
                .hint("get another one: guest_stream_open")
                .into());
        }
        let owner: &Arc<str> = &caller.owner;
        let place = self.shared.streams.enter(guest.vm, owner)?;
        let handle = self.shared.vms.get(caller, &Reference::Id(guest.vm))?;
        let directory = self.shared.paths.vm(guest.vm);
        let life = StreamLife { handle, boot_id: guest.boot_id, _place: place };
        let opened = tokio::select! {
            opened = GuestStream::open(&directory, opening) => opened,
            () = life.ended() => {
                let text = format!("{name} ended while a stream was opened");
                return Err(ToolError::new(ErrorCode::VmGone, text).into());
            }
        };
        let opened = opened.map_err(|error| StreamRefusal {
            error: error.to_tool_error(name),
            is_of_guest: matches!(error, StreamError::Refused(_)),
        })?;
        Ok(VmStream { vm: guest.vm, boot_id: guest.boot_id, guest: opened, life })
    }
}
