//! Separate streams into guests.

use std::sync::Arc;

use nexus_schema::id::{BootId, VmId, VmKind};
use nexus_schema::stream::{LINE_MAX, Open, Opening, VERSION};
use nexus_schema::tools::stream::{GuestStreamOpenOutput, GuestStreamOpenParams, PATH};
use nexus_schema::{ErrorCode, Reference, ToolError};

use super::{CallContext, Caller, Nexus};
use crate::context::{Busy, Handle, Place, TICKET_LIFE};
use crate::guest::{GuestStream, StreamError};

/// An open stream of a VM. It counts towards the limit until it is dropped.
#[derive(Debug)]
pub struct VmStream {
    /// The VM.
    pub vm: VmId,
    /// The boot that it is of.
    pub boot_id: BootId,
    /// The guest's end.
    pub guest: GuestStream,
    /// Tells when the VM's boot ends.
    pub life: StreamLife,
}

/// Why a stream was not opened.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct StreamRefusal {
    /// The error.
    pub error: ToolError,
    /// Whether the error is in the guest's words.
    pub is_of_guest: bool,
}

impl From<ToolError> for StreamRefusal {
    fn from(error: ToolError) -> Self {
        Self { error, is_of_guest: false }
    }
}

/// The lifetime of a stream.
#[derive(Debug)]
pub struct StreamLife {
    handle: Handle,
    boot_id: BootId,
    _place: Place,
    _busy: Busy,
}

impl StreamLife {
    /// Waits until the stream's boot has ended.
    pub async fn ended(&self) {
        let mut view = self.handle.view.clone();
        let is_over = |view: &crate::context::View| {
            view.deleted || view.record.boot_id != Some(self.boot_id) || !view.record.state.may_run()
        };
        // Without a task, the VM is deleted or the daemon is shutting down.
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
        let guest = self.guest_awake(&ctx.caller, &params.vm, "a stream").await?;
        let owner = ctx.caller.owner.clone();
        let opening = Opening { version: VERSION, client: Some(owner.to_string()), open: params.open };
        let length = serde_json::to_vec(&opening).map_or(usize::MAX, |line| line.len());
        if length > LINE_MAX {
            let text = format!("the arguments of the stream take {length} bytes, the maximum is {LINE_MAX}");
            return Err(ToolError::new(ErrorCode::TooLarge, text).hint(
                "write long data to a file in the VM with guest_file_write, or pass it on standard input",
            ));
        }
        let boot = (guest.vm, guest.boot_id);
        let ticket = self.shared.streams.issue(owner, ctx.caller.scope, boot, opening)?;
        let expires_in_s = u32::try_from(TICKET_LIFE.as_secs()).unwrap_or(u32::MAX);
        Ok(GuestStreamOpenOutput { path: format!("{PATH}?ticket={ticket}"), ticket, expires_in_s })
    }

    /// Opens the stream for which a ticket was issued.
    pub async fn redeem_stream(&self, caller: &Caller, ticket: &str) -> Result<VmStream, StreamRefusal> {
        let ticket = self.shared.streams.redeem(&caller.owner, caller.scope, ticket).ok_or_else(|| {
            ToolError::new(
                ErrorCode::Forbidden,
                "the ticket is invalid, was used already, or is older than 30 s",
            )
            .hint("call guest_stream_open for a new ticket")
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
        // Checked again: the state may have changed since the ticket was issued.
        let guest = match of_boot {
            None => self.guest_awake(caller, vm, "a stream").await?,
            // A ticket is of one boot.
            Some(_) => self.guest(caller, vm)?,
        };
        let name = guest.name.as_str();
        if of_boot.is_some_and(|boot| boot != guest.boot_id) {
            let text = format!("{name} was restarted after the ticket was issued");
            return Err(ToolError::new(ErrorCode::VmGone, text)
                .hint("call guest_stream_open for a new ticket")
                .into());
        }
        let owner: &Arc<str> = &caller.owner;
        let place = self.shared.streams.enter(guest.vm, owner)?;
        let handle = self.shared.vms.get(caller, &Reference::Id(guest.vm))?;
        let directory = self.shared.paths.vm(guest.vm);
        let life = StreamLife { handle, boot_id: guest.boot_id, _place: place, _busy: guest.busy };
        let opened = tokio::select! {
            opened = GuestStream::open(&directory, opening) => opened,
            () = life.ended() => {
                let text = format!("{name} stopped while the stream was being opened");
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
