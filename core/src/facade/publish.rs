//! The tools that publish ports of guests on the host.

use std::io;

use nexus_schema::id::{BootId, VmId};
use nexus_schema::tools::vm::{PublishedPort, VmPublishParams, VmUnpublishOutput, VmUnpublishParams};
use nexus_schema::{ErrorCode, Name, Reference, ToolError};

use super::{CallContext, Nexus};
use crate::access::Caller;
use crate::context::Handle;
use crate::op::store_error;
use crate::publish::{self, Listener};
use crate::store::now;
use crate::store::ports::{self, PortRecord};
use crate::vm::policy;

/// The lowest port of the host that is chosen automatically.
const UNPRIVILEGED: u16 = 1024;

impl Nexus {
    /// The tool `vm_publish`.
    pub async fn vm_publish(
        &self,
        ctx: &CallContext,
        params: VmPublishParams,
    ) -> Result<PublishedPort, ToolError> {
        let is_socket = params.socket == Some(true);
        if is_socket && params.host_port.is_some() {
            return Err(
                ToolError::invalid("host_port and socket cannot be used together").hint("give one of them")
            );
        }
        check_port("guest_port", params.guest_port)?;
        params.host_port.map(|port| check_port("host_port", port)).transpose()?;
        let handle = self.shared.vms.get(&ctx.caller, &params.vm)?;
        let (vm, _) = of_boot(&handle, params.if_boot_id)?;
        let wanted = PortRecord { id: 0, vm, guest_port: params.guest_port, host_port: params.host_port };
        let there = self.shared.store.read(move |db| ports::of_vm(db, vm)).await.map_err(store_error)?;
        let same = there.into_iter().find(|port| {
            port.guest_port == wanted.guest_port
                && match (wanted.host_port, is_socket) {
                    (Some(_), _) => port.host_port == wanted.host_port,
                    (None, is_socket) => port.host_port.is_none() == is_socket,
                }
        });
        if let Some(same) = same {
            return Ok(self.shared.published.shown(&self.shared.paths, &same));
        }
        let (listener, host_port) = if is_socket {
            self.bind(&ctx.caller, &wanted).await?
        } else {
            self.bind_port(&ctx.caller, &wanted).await?
        };
        let (row, owner) = (PortRecord { host_port, ..wanted }, ctx.caller.owner.clone());
        let added = self.shared.store.write(move |tx| ports::insert(tx, &row, &owner, now())).await;
        let Some(port) = added.map_err(store_error)? else {
            // Another published port waited for this one, and got it first.
            return Err(self.taken(&ctx.caller, host_port.unwrap_or_default()).await);
        };
        let shown = self.shared.published.shown(&self.shared.paths, &port);
        publish::listen(&self.shared, port, Some(listener));
        Ok(shown)
    }

    /// The tool `vm_unpublish`.
    pub async fn vm_unpublish(
        &self,
        ctx: &CallContext,
        params: VmUnpublishParams,
    ) -> Result<VmUnpublishOutput, ToolError> {
        check_port("guest_port", params.guest_port)?;
        let handle = self.shared.vms.get(&ctx.caller, &params.vm)?;
        let (vm, name) = of_boot(&handle, params.if_boot_id)?;
        let there = self.shared.store.read(move |db| ports::of_vm(db, vm)).await.map_err(store_error)?;
        let (ending, others): (Vec<_>, Vec<_>) = there.into_iter().partition(|port| {
            port.guest_port == params.guest_port
                && (params.host_port.is_none() || params.host_port == port.host_port)
        });
        if ending.is_empty() {
            let error = ToolError::new(
                ErrorCode::NotPublished,
                format!(
                    "port {} of {name} is not published{}",
                    params.guest_port,
                    match params.host_port {
                        Some(port) => format!(" on host port {port}"),
                        None => String::new(),
                    }
                ),
            );
            let others: Vec<_> = others.iter().map(|port| port.guest_port.to_string()).collect();
            return Err(match others.as_slice() {
                [] => error.hint("this VM has no published ports"),
                others => error.hint(format!(
                    "its published ports are {}: vm_inspect shows the host's side",
                    others.join(", ")
                )),
            });
        }
        let ids: Vec<_> = ending.iter().map(|port| port.id).collect();
        let removed =
            self.shared.store.write(move |tx| ids.into_iter().try_for_each(|id| ports::delete(tx, id)));
        removed.await.map_err(store_error)?;
        let published = &self.shared.published;
        let unpublished = ending
            .iter()
            .map(|port| PublishedPort { problem: None, ..published.shown(&self.shared.paths, port) });
        let unpublished = unpublished.collect();
        ending.iter().for_each(|port| published.end(port.id));
        Ok(VmUnpublishOutput { unpublished })
    }

    /// Binds the port that the caller chose. Without one, binds the port with the guest's number, or else any free port.
    async fn bind_port(
        &self,
        caller: &Caller,
        wanted: &PortRecord,
    ) -> Result<(Listener, Option<u16>), ToolError> {
        if wanted.host_port.is_some() {
            return self.bind(caller, wanted).await;
        }
        let of_guest = PortRecord { host_port: Some(wanted.guest_port), ..wanted.clone() };
        if of_guest.guest_port >= UNPRIVILEGED
            && let Ok(bound) = self.bind(caller, &of_guest).await
        {
            return Ok(bound);
        }
        self.bind(caller, &PortRecord { host_port: Some(0), ..wanted.clone() }).await
    }

    async fn bind(&self, caller: &Caller, port: &PortRecord) -> Result<(Listener, Option<u16>), ToolError> {
        let bound = publish::bind(&self.shared.paths, port).and_then(|listener| {
            let host_port = listener.host_port()?;
            Ok((listener, host_port))
        });
        let wanted = port.host_port.unwrap_or_default();
        match bound {
            Ok(bound) => Ok(bound),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => Err(self.taken(caller, wanted).await),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Err(ToolError::new(
                ErrorCode::HostUnsuitable,
                format!("the daemon is not permitted to listen on port {wanted}: {error}"),
            )
            .hint("choose a host_port of 1024 or more")),
            Err(error) => {
                Err(ToolError::new(ErrorCode::HostUnsuitable, format!("cannot listen for clients: {error}")))
            }
        }
    }

    /// Returns the error for a port of the host that is in use.
    async fn taken(&self, caller: &Caller, host_port: u16) -> ToolError {
        let of_vm = self.shared.store.read(move |db| ports::at(db, host_port)).await.ok().flatten();
        let name = of_vm.and_then(|port| {
            let vm = self.shared.vms.get(caller, &Reference::Id(port.vm)).ok()?;
            let name = vm.view.borrow().record.name.clone();
            Some(format!("port {} of the VM {name}", port.guest_port))
        });
        let by = name.unwrap_or_else(|| "another program".into());
        ToolError::new(ErrorCode::InUse, format!("port {host_port} of this host is in use by {by}"))
            .hint("choose another host_port, or leave it out to get a free one")
    }
}

/// The id and the name of a VM, if `if_boot` is its boot.
fn of_boot(handle: &Handle, if_boot: Option<BootId>) -> Result<(VmId, Name), ToolError> {
    let view = handle.view.borrow();
    policy::same_boot(view.record.name.as_str(), view.record.boot_id, if_boot)?;
    Ok((view.record.id, view.record.name.clone()))
}

fn check_port(what: &str, port: u16) -> Result<(), ToolError> {
    if port == 0 { Err(ToolError::invalid(format!("{what} must be 1 to 65535, got 0"))) } else { Ok(()) }
}
