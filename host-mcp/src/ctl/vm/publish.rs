//! `nexusctl vm publish` and `unpublish`: ports of VMs on this host.

use std::str::FromStr;

use nexus_schema::Reference;
use nexus_schema::id::{BootId, VmKind};
use nexus_schema::tools::vm::{PublishedPort, VmPublish, VmPublishParams, VmUnpublish, VmUnpublishParams};

use crate::ctl::App;
use crate::ctl::client::raw;
use crate::ctl::error::Error;
use crate::ctl::ui::Format;

/// What to publish.
#[derive(Debug, clap::Args)]
pub(crate) struct PublishArgs {
    /// The VM: its name or id
    vm: Reference<VmKind>,
    /// The port in the VM, after the port on this host if that is different: 80, or 8080:80
    #[arg(value_name = "[HOST_PORT:]PORT")]
    ports: Ports,
    /// On a Unix socket instead of a port of this host
    #[arg(long)]
    unix: bool,
    /// Only if this is the VM's boot
    #[arg(long, value_name = "BOOT_ID")]
    if_boot_id: Option<BootId>,
}

/// What not to publish any more.
#[derive(Debug, clap::Args)]
pub(crate) struct UnpublishArgs {
    /// The VM: its name or id
    vm: Reference<VmKind>,
    /// The port in the VM, optionally after a single port on this host: 80, or 8080:80
    #[arg(value_name = "[HOST_PORT:]PORT")]
    ports: Ports,
    /// Only if this is the VM's boot
    #[arg(long, value_name = "BOOT_ID")]
    if_boot_id: Option<BootId>,
}

/// A port in a VM, and optionally one on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ports {
    host: Option<u16>,
    guest: u16,
}

impl FromStr for Ports {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let number = |text: &str| match text.parse::<u16>() {
            Ok(0) | Err(_) => Err(format!("`{text}` is not a valid port: a number from 1 to 65535")),
            Ok(port) => Ok(port),
        };
        match text.rsplit_once(':') {
            Some((host, guest)) => Ok(Self { host: Some(number(host)?), guest: number(guest)? }),
            None => Ok(Self { host: None, guest: number(text)? }),
        }
    }
}

/// Publishes a port.
pub(crate) async fn publish(app: &App, args: PublishArgs) -> Result<u8, Error> {
    let params = VmPublishParams {
        vm: args.vm,
        guest_port: args.ports.guest,
        host_port: args.ports.host,
        socket: args.unix.then_some(true),
        if_boot_id: args.if_boot_id,
    };
    let port = app.connect().await?.call::<VmPublish>(&params).await?;
    match app.ui.format {
        Format::Json => app.ui.json(&raw(&port)?)?,
        Format::Quiet => app.ui.line(&port.address)?,
        Format::Human => app.ui.line(&one(&port))?,
    }
    Ok(0)
}

/// Unpublishes a port.
pub(crate) async fn unpublish(app: &App, args: UnpublishArgs) -> Result<u8, Error> {
    let params = VmUnpublishParams {
        vm: args.vm,
        guest_port: args.ports.guest,
        host_port: args.ports.host,
        if_boot_id: args.if_boot_id,
    };
    let gone = app.connect().await?.call::<VmUnpublish>(&params).await?;
    match app.ui.format {
        Format::Json => app.ui.json(&raw(&gone)?)?,
        Format::Quiet => gone.unpublished.iter().try_for_each(|port| app.ui.line(&port.address))?,
        Format::Human => gone
            .unpublished
            .iter()
            .try_for_each(|port| app.ui.line(&format!("{} is no longer published", one(port))))?,
    }
    Ok(0)
}

/// Where a port is published.
pub(super) fn one(port: &PublishedPort) -> String {
    let problem = port.problem.as_ref().map(|problem| format!(" ({problem})"));
    format!("{} -> port {}{}", port.address, port.guest_port, problem.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_read() {
        let read = |text: &str| text.parse::<Ports>();
        assert_eq!(read("80"), Ok(Ports { host: None, guest: 80 }));
        assert_eq!(read("8080:80"), Ok(Ports { host: Some(8080), guest: 80 }));
        for wrong in ["", "0", "65536", "a", "80:", ":80", "1:2:3", "-1", "8080:0"] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }
}
