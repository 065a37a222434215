//! Publishes ports of guests on the host: one listener per published port, and a stream into the guest per connection.
//!
//! ```text
//! client ── 127.0.0.1:PORT or a Unix socket ── nexusd ── stream on the guest's port 201 ── 127.0.0.1:GUEST_PORT in the VM
//! ```
//! A listener exists as long as its VM, running or stopped, so that no other program takes the port meanwhile. While clients connect, one
//! connection into the guest is kept for the next of them (`spare`).

mod listener;
mod relay;
mod spare;

use std::sync::Arc;

use nexus_schema::ToolError;

pub(crate) use listener::{Listener, bind};

use crate::context::Shared;
use crate::op::store_error;
use crate::store::ports::{self, PortRecord};

/// Starts all listeners at the daemon's start.
pub(crate) async fn take_up(shared: &Arc<Shared>) -> Result<(), ToolError> {
    for port in shared.store.read(ports::all).await.map_err(store_error)? {
        let bound = bind(&shared.paths, &port);
        if let Err(error) = &bound {
            tracing::warn!(guest_port = port.guest_port, host_port = port.host_port, %error, "cannot listen for a published port yet");
        }
        listen(shared, port, bound.ok());
    }
    Ok(())
}

/// Serves a published port until it is unpublished or its VM is deleted.
pub(crate) fn listen(shared: &Arc<Shared>, port: PortRecord, listener: Option<Listener>) {
    let until = shared.published.begin(port.id);
    shared.tasks.spawn(listener::serve(Arc::downgrade(shared), port, listener, until));
}
