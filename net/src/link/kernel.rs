//! Reads and changes interfaces over rtnetlink.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures::TryStreamExt as _;
use nexus_net_wire::{InstanceId, Mac};
use rtnetlink::packet_core::Nla as _;
use rtnetlink::packet_route::address::AddressAttribute;
use rtnetlink::packet_route::link::{
    InfoBridgePort, InfoData, InfoKind, InfoPortData, InfoTun, LinkAttribute, LinkFlags, LinkInfo,
    LinkMessage,
};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourState,
};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteProtocol, RouteType};
use rtnetlink::{Handle, LinkBridge, LinkBridgePort, LinkMessageBuilder, LinkUnspec, RouteMessageBuilder};

use super::plan::Change;
use super::shape;
use super::tap::Tap;
use super::{Found, Link, Passed, bridge_mac, bridge_name, group, tap_alias};

/// The attribute of a TUN device that holds its owner (`IFLA_TUN_OWNER`).
const TUN_OWNER: u16 = 1;
/// Bit mask of the link-local groups 01:80:c2:00:00:00 to 0f whose frames a port treats like others. The kernel allows all except PAUSE's.
const LINK_LOCAL: u16 = 0xfffd;

/// Why an operation on interfaces failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinkError {
    /// The kernel refused a request.
    #[error("{what}")]
    Netlink {
        what: String,
        #[source]
        source: rtnetlink::Error,
    },
    /// Something was removed meanwhile by another program.
    #[error("{what}: it does not exist")]
    Gone { what: String },
    /// An operation on a TAP device failed.
    #[error("{what}")]
    Tap {
        what: String,
        #[source]
        source: io::Error,
    },
}

/// Access to the interfaces of the network namespace in which it was opened.
#[derive(Debug, Clone)]
pub(crate) struct Links {
    handle: Handle,
    /// A socket in the host's network namespace, if this one is not it.
    outside: Option<Handle>,
}

/// Adds to an error what failed.
trait What<T> {
    fn what(self, what: impl FnOnce() -> String) -> Result<T, LinkError>;
}

impl<T> What<T> for Result<T, rtnetlink::Error> {
    fn what(self, what: impl FnOnce() -> String) -> Result<T, LinkError> {
        self.map_err(|source| LinkError::Netlink { what: what(), source })
    }
}

impl LinkError {
    /// Returns the kernel's error number, if there is one.
    pub(crate) fn errno(&self) -> Option<i32> {
        match self {
            Self::Netlink { source: rtnetlink::Error::NetlinkError(message), .. } => {
                message.code.map(|code| -code.get())
            }
            Self::Tap { source, .. } => source.raw_os_error(),
            Self::Netlink { .. } | Self::Gone { .. } => None,
        }
    }
}

impl Links {
    /// Opens the socket. A task of the current runtime handles its messages.
    pub(crate) fn open() -> io::Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        tokio::spawn(connection);
        Ok(Self { handle, outside: None })
    }

    /// Adds access to the host's network namespace, in which `outside` was opened: the host's addresses are read there.
    pub(crate) fn with_outside(self, outside: Option<Self>) -> Self {
        Self { outside: outside.map(|outside| outside.handle), ..self }
    }

    /// Returns whether its network namespace is not the host's.
    pub(crate) const fn is_apart(&self) -> bool {
        self.outside.is_some()
    }

    /// Reads the current state.
    pub(crate) async fn read(&self) -> Result<Found, LinkError> {
        let mut found = Found::default();
        let failed = |what: &'static str| move || format!("read the {what}");
        let links = self.handle.link().get().execute().try_collect::<Vec<_>>().await;
        found.links = links.what(failed("interfaces"))?.into_iter().map(read_link).collect();
        found.addresses = addresses(&self.handle).await?;
        if let Some(outside) = &self.outside {
            found.outside = addresses(outside).await?.into_iter().map(|(_, address, _)| address).collect();
        }
        for request in
            [RouteMessageBuilder::<Ipv4Addr>::new().build(), RouteMessageBuilder::<Ipv6Addr>::new().build()]
        {
            let routes = self.handle.route().get(request).execute().try_collect::<Vec<_>>().await;
            for route in routes.what(failed("routes"))? {
                let mut to = None;
                let mut over = None;
                for attribute in &route.attributes {
                    match attribute {
                        RouteAttribute::Destination(RouteAddress::Inet(v4)) => to = Some(IpAddr::V4(*v4)),
                        RouteAttribute::Destination(RouteAddress::Inet6(v6)) => to = Some(IpAddr::V6(*v6)),
                        RouteAttribute::Oif(index) => over = Some(*index),
                        _ => {}
                    }
                }
                let header = &route.header;
                if let (Some(over), 0, RouteType::Unicast) =
                    (over, header.destination_prefix_length, header.kind)
                {
                    found.uplinks.insert(over);
                }
                let is_ours = header.kind == RouteType::Unicast && header.protocol == RouteProtocol::Static;
                if let (Some(to), Some(over), true) = (to, over, is_ours)
                    && header.destination_prefix_length == if to.is_ipv4() { 32 } else { 128 }
                {
                    found.routes.push((over, to));
                }
            }
        }
        found.shapes = shape::read(&self.handle).await.what(failed("limits of interfaces"))?;
        let neighbours = self.handle.neighbours().get().execute().try_collect::<Vec<_>>().await;
        for message in neighbours.what(failed("neighbours"))? {
            let mut address = None;
            let mut mac = None;
            for attribute in &message.attributes {
                match attribute {
                    NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => {
                        address = Some(IpAddr::V4(*v4));
                    }
                    NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => {
                        address = Some(IpAddr::V6(*v6));
                    }
                    NeighbourAttribute::LinkLayerAddress(bytes) => {
                        mac = <[u8; 6]>::try_from(&bytes[..]).ok().map(Mac);
                    }
                    _ => {}
                }
            }
            if let (Some(address), Some(mac), NeighbourState::Permanent) =
                (address, mac, message.header.state)
            {
                found.neighbours.push((message.header.ifindex, address, mac));
            }
        }
        Ok(found)
    }

    async fn index(&self, name: &str) -> Result<u32, LinkError> {
        let links = self.handle.link().get().match_name(name).execute().try_next().await;
        let link = links.what(|| format!("look for the interface {name}"))?;
        let what = || format!("look for the interface {name}");
        link.map(|link| link.header.index).ok_or_else(|| LinkError::Gone { what: what() })
    }

    /// Creates a VM's TAP, without a bridge and down. It is made persistent last, so that it vanishes if this process ends before that.
    pub(crate) async fn make_tap(
        &self,
        id: InstanceId,
        vm: nexus_schema::id::VmId,
        owner: u32,
    ) -> Result<(String, u32), LinkError> {
        let failed =
            |what: &'static str| move |source| LinkError::Tap { what: format!("{what} for VM {vm}"), source };
        let tap = Tap::make().map_err(failed("create a TAP"))?;
        crate::failpoint::hit("tap-made");
        let name = tap.name().to_owned();
        let index = self.index(&name).await?;
        let named = LinkUnspec::new_with_index(index).alias(tap_alias(id, vm)).link_group(group(id)).build();
        self.handle.link().set(named).execute().await.what(|| format!("name the TAP {name}"))?;
        crate::failpoint::hit("tap-named");
        tap.set_owner(owner).map_err(failed("set the owner of a TAP"))?;
        tap.keep().map_err(failed("make a TAP persistent"))?;
        crate::failpoint::hit("tap-kept");
        Ok((name, index))
    }

    /// Changes the user who may open an existing TAP.
    pub(crate) fn change_owner(name: &str, owner: u32) -> Result<(), LinkError> {
        let failed = |source| LinkError::Tap { what: format!("set the owner of the TAP {name}"), source };
        let tap = Tap::open(name).map_err(failed)?;
        tap.set_owner(owner).map_err(failed)
    }

    /// Makes one change. It is no error if the thing exists already, or is removed already.
    pub(crate) async fn apply(&self, id: InstanceId, change: &Change) -> Result<(), LinkError> {
        let bridge = bridge_name(id);
        let done = match change {
            Change::MakeBridge => {
                let message =
                    LinkBridge::new(&bridge).address(bridge_mac(id).0.to_vec()).append_extra(id).build();
                self.handle.link().add(message).execute().await
            }
            Change::NameBridge(alias) => {
                let index = self.index(&bridge).await?;
                let message =
                    LinkUnspec::new_with_index(index).alias(alias.clone()).link_group(group(id)).build();
                self.handle.link().set(message).execute().await
            }
            Change::RaiseBridge => {
                let index = self.index(&bridge).await?;
                self.handle.link().set(LinkUnspec::new_with_index(index).up().build()).execute().await
            }
            Change::AddAddress(address) => {
                let index = self.index(&bridge).await?;
                let prefix = if address.is_ipv4() { 32 } else { 128 };
                self.handle.address().add(index, *address, prefix).execute().await
            }
            Change::RemoveAddress(address, prefix) => {
                let index = self.index(&bridge).await?;
                let mut request = self.handle.address().add(index, *address, *prefix);
                let message = request.message_mut().clone();
                self.handle.address().del(message).execute().await
            }
            Change::AddRoute(address) => {
                let route = self.route(&bridge, *address).await?;
                self.handle.route().add(route).replace().execute().await
            }
            Change::RemoveRoute(address) => {
                let route = self.route(&bridge, *address).await?;
                self.handle.route().del(route).execute().await
            }
            Change::SetNeighbour(address, mac) => {
                let index = self.index(&bridge).await?;
                let request = self.handle.neighbours().add(index, *address).link_layer_address(&mac.0);
                request.state(NeighbourState::Permanent).replace().execute().await
            }
            Change::RemoveNeighbour(address) => {
                let index = self.index(&bridge).await?;
                let mut request = self.handle.neighbours().add(index, *address);
                let message = request.message_mut().clone();
                self.handle.neighbours().del(message).execute().await
            }
            Change::Join(index, mac) => {
                let bridge = self.index(&bridge).await?;
                let message = LinkUnspec::new_with_index(*index).controller(bridge).down().build();
                self.handle.link().set(message).execute().await.what(|| format!("{change:?}"))?;
                // The port never gets frames for other addresses, whatever senders it has shown. Frames to link-local groups take the same way as
                // all others, through the guard.
                let message = LinkBridgePort::new(*index)
                    .isolated(true)
                    .learning(false)
                    .flood(false)
                    .group_fwd_mask(LINK_LOCAL)
                    .build();
                self.handle.link().set_port(message).execute().await.what(|| format!("{change:?}"))?;
                let request = self.handle.neighbours().add_bridge(*index, &mac.0);
                let request = request.state(NeighbourState::Noarp).flags(NeighbourFlags::Controller);
                request.replace().execute().await
            }
            Change::Raise(index) => {
                self.handle.link().set(LinkUnspec::new_with_index(*index).up().build()).execute().await
            }
            Change::Shape(index, shape) => shape::set(&self.handle, *index, *shape).await,
        };
        match done {
            Err(rtnetlink::Error::NetlinkError(message))
                if message.code.is_some_and(|code| change.is_done_by(-code.get())) =>
            {
                Ok(())
            }
            done => done.what(|| format!("{} on {bridge}", change.words())),
        }
    }

    async fn route(
        &self,
        bridge: &str,
        address: IpAddr,
    ) -> Result<rtnetlink::packet_route::route::RouteMessage, LinkError> {
        let index = self.index(bridge).await?;
        Ok(match address {
            IpAddr::V4(v4) => RouteMessageBuilder::<Ipv4Addr>::new()
                .destination_prefix(v4, 32)
                .output_interface(index)
                .scope(rtnetlink::packet_route::route::RouteScope::Link)
                .build(),
            IpAddr::V6(v6) => RouteMessageBuilder::<Ipv6Addr>::new()
                .destination_prefix(v6, 128)
                .output_interface(index)
                .build(),
        })
    }

    /// Removes one interface, if it still exists.
    pub(crate) async fn remove(&self, index: u32) -> Result<(), LinkError> {
        match self.handle.link().del(index).execute().await {
            Err(rtnetlink::Error::NetlinkError(message))
                if message.code.is_some_and(|code| -code.get() == nix::libc::ENODEV) =>
            {
                Ok(())
            }
            done => done.what(|| format!("remove interface {index}")),
        }
    }

    /// Removes all interfaces of an instance at once. That takes about as long as removing a single one.
    pub(crate) async fn remove_group(&self, id: InstanceId) -> Result<(), LinkError> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::Group(group(id)));
        match self.handle.link().del_with_message(message).execute().await {
            Err(rtnetlink::Error::NetlinkError(message))
                if message.code.is_some_and(|code| -code.get() == nix::libc::ENODEV) =>
            {
                Ok(())
            }
            done => done.what(|| format!("remove the interfaces of instance {id}")),
        }
    }
}

/// Returns the addresses in a network namespace, as [`Found`] has them.
async fn addresses(handle: &Handle) -> Result<Vec<(u32, IpAddr, u8)>, LinkError> {
    let messages = handle.address().get().execute().try_collect::<Vec<_>>().await;
    let mut addresses = Vec::new();
    for message in messages.what(|| "read the addresses".to_owned())? {
        let local = message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Local(address) => Some(*address),
            _ => None,
        });
        let other = message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        });
        // Link-local addresses are assigned by the kernel.
        if let Some(address) = local.or(other).filter(|address| !is_link_local(*address)) {
            addresses.push((message.header.index, address, message.header.prefix_len));
        }
    }
    Ok(addresses)
}

fn is_link_local(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local())
}

/// Options of this process's bridges.
trait BridgeExtras {
    fn append_extra(self, id: InstanceId) -> Self;
}

impl BridgeExtras for LinkMessageBuilder<LinkBridge> {
    fn append_extra(self, id: InstanceId) -> Self {
        // No forwarding delay: a VM can send as soon as it runs. Routed packets pass the inet table once, and not for the bridge as well.
        self.mcast_snooping(false)
            .nf_call_iptables(false)
            .nf_call_ip6tables(false)
            .forward_delay(0)
            .link_group(group(id))
    }
}

impl Change {
    /// Returns whether an error means that there is nothing to do.
    fn is_done_by(&self, errno: i32) -> bool {
        use nix::libc::{EADDRNOTAVAIL, EEXIST, ENOENT, ESRCH};
        match self {
            Self::MakeBridge | Self::AddAddress(_) | Self::AddRoute(_) => errno == EEXIST,
            Self::RemoveAddress(..) => errno == EADDRNOTAVAIL,
            Self::RemoveRoute(_) => errno == ESRCH,
            Self::RemoveNeighbour(_) | Self::Shape(_, None) => errno == ENOENT,
            Self::NameBridge(_)
            | Self::RaiseBridge
            | Self::SetNeighbour(..)
            | Self::Join(..)
            | Self::Raise(_)
            | Self::Shape(_, Some(_)) => false,
        }
    }

    fn words(&self) -> String {
        match self {
            Self::MakeBridge => "make the bridge".to_owned(),
            Self::NameBridge(_) => "name the bridge".to_owned(),
            Self::RaiseBridge => "set the bridge up".to_owned(),
            Self::AddAddress(address) => format!("add the address {address}"),
            Self::RemoveAddress(address, _) => format!("remove the address {address}"),
            Self::AddRoute(address) => format!("add the route to {address}"),
            Self::RemoveRoute(address) => format!("remove the route to {address}"),
            Self::SetNeighbour(address, mac) => format!("set the neighbour {address} to {mac}"),
            Self::RemoveNeighbour(address) => format!("remove the neighbour {address}"),
            Self::Join(index, _) => format!("add interface {index}"),
            Self::Raise(index) => format!("set interface {index} up"),
            Self::Shape(index, Some(_)) => format!("limit the traffic to interface {index}"),
            Self::Shape(index, None) => format!("end the limit of the traffic to interface {index}"),
        }
    }
}

fn read_link(message: LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        alias: String::new(),
        group: 0,
        bridge: None,
        is_isolated: false,
        is_up: message.header.flags.contains(LinkFlags::Up),
        has_carrier: false,
        is_bridge: false,
        owner: None,
        received: Passed::default(),
        sent: Passed::default(),
        is_card: !message.header.flags.contains(LinkFlags::Loopback),
        is_of_others: false,
    };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::IfAlias(alias) => link.alias = alias,
            LinkAttribute::Group(group) => link.group = group,
            LinkAttribute::Controller(index) => link.bridge = Some(index),
            LinkAttribute::Carrier(carrier) => link.has_carrier = carrier != 0,
            LinkAttribute::Stats64(stats) => {
                link.received = Passed { bytes: stats.rx_bytes, packets: stats.rx_packets };
                link.sent = Passed { bytes: stats.tx_bytes, packets: stats.tx_packets };
            }
            LinkAttribute::LinkInfo(infos) => read_info(&mut link, &infos),
            _ => {}
        }
    }
    link
}

fn read_info(link: &mut Link, infos: &[LinkInfo]) {
    for info in infos {
        match info {
            LinkInfo::Kind(kind) => {
                link.is_bridge = *kind == InfoKind::Bridge;
                link.is_card &= matches!(
                    kind,
                    InfoKind::Vlan
                        | InfoKind::Bond
                        | InfoKind::MacVlan
                        | InfoKind::MacVtap
                        | InfoKind::IpVlan
                        | InfoKind::IpVtap
                );
                link.is_of_others = matches!(kind, InfoKind::Bridge | InfoKind::Tun | InfoKind::Wireguard);
            }
            LinkInfo::Data(InfoData::Tun(attributes)) => {
                for attribute in attributes {
                    let InfoTun::Other(attribute) = attribute else { continue };
                    let mut value = vec![0; attribute.value_len()];
                    attribute.emit_value(&mut value);
                    if attribute.kind() == TUN_OWNER {
                        link.owner = value.try_into().ok().map(u32::from_ne_bytes);
                    }
                }
            }
            LinkInfo::PortData(InfoPortData::BridgePort(attributes)) => {
                let wanted = [
                    InfoBridgePort::Isolated(true),
                    InfoBridgePort::Learning(false),
                    InfoBridgePort::UnicastFlood(false),
                    InfoBridgePort::GroupFwdMask(LINK_LOCAL),
                ];
                link.is_isolated = wanted.iter().all(|wanted| attributes.contains(wanted));
            }
            _ => {}
        }
    }
}
