//! Reports the state of the network.

use nexus_net_wire::{Counters, Instance, State, VmState};

use super::Network;
use crate::error::Error;
use crate::link::{Found as FoundLinks, sysctl};
use crate::{firewall, host_firewall};

/// Fill level of the kernel's connection table from which on there is a warning, in percent.
const CONNTRACK_FULL: u64 = 90;

impl Network {
    /// Returns the current state.
    pub(crate) async fn state(&self) -> Result<State, Error> {
        let Some(instance) = self.instance.clone() else {
            return Ok(State {
                instance: None,
                bridge: None,
                dns_servers: Vec::new(),
                vms: Vec::new(),
                // `configure` reports a missing nf_tables.
                firewall: firewall::open()
                    .ok()
                    .and_then(|mut netfilter| host_firewall::look(&mut netfilter).ok())
                    .unwrap_or_default(),
                warnings: Vec::new(),
            });
        };
        let found = self.links.read().await?;
        let mut netfilter = firewall::open()?;
        let counts = firewall::counts(&mut netfilter, instance.id)?;
        let open = firewall::open_connections(&mut netfilter)?;
        let room = crate::denials::room(self.vms.len());
        let vms = self.vms.values().map(|wired| {
            let link = found.links.iter().find(|link| link.index == wired.index);
            let (sent, received) = link.map(|link| (link.received, link.sent)).unwrap_or_default();
            let [allowed, refused, spoofed] = counts.get(&wired.index).copied().unwrap_or_default();
            let (denied, names) = self.shared.denials.of(wired.vm.id, room);
            VmState {
                id: wired.vm.id,
                name: wired.vm.name.clone(),
                tap: wired.tap.clone(),
                is_in_use: link.is_some_and(|link| link.has_carrier),
                counters: Counters {
                    sent_bytes: sent.bytes,
                    received_bytes: received.bytes,
                    sent_packets: sent.packets,
                    received_packets: received.packets,
                    open: open.get(&wired.index).copied().unwrap_or_default(),
                    allowed,
                    denied: refused + names,
                    spoofed,
                },
                denied,
            }
        });
        Ok(State {
            bridge: found.bridge(instance.id).map(|link| link.name.clone()),
            dns_servers: crate::dns::upstream::servers(&instance.dns, self.relay()),
            vms: vms.collect(),
            warnings: self.warnings(&instance, &found),
            firewall: self.firewall.clone(),
            instance: Some(instance),
        })
    }

    fn warnings(&self, instance: &Instance, found: &FoundLinks) -> Vec<String> {
        let mut warnings = Vec::new();
        if found.uplinks.is_empty() {
            warnings.push(
                "the host has no default route: VMs can only reach networks that the host has routes to"
                    .to_owned(),
            );
        }
        if crate::dns::upstream::servers(&instance.dns, self.relay()).is_empty() {
            warnings.push(
                "the host's resolv.conf has no server, so VMs cannot resolve names: add one, or give nexusd DNS servers".to_owned(),
            );
        }
        let (count, max) =
            (sysctl::number("netfilter/nf_conntrack_count"), sysctl::number("netfilter/nf_conntrack_max"));
        if let (Some(count), Some(max)) = (count, max)
            && max > 0
            && count >= max / 100 * CONNTRACK_FULL
        {
            warnings.push(format!(
                "the kernel tracks {count} of at most {max} connections: raise net.netfilter.nf_conntrack_max"
            ));
        }
        let dropping = self.firewall.iter().filter(|chain| !chain.open).map(|chain| {
            let from = chain.from.as_ref().map(|from| format!(" ({from})")).unwrap_or_default();
            let next = chain.problem.as_deref().unwrap_or("run nexusctl setup-firewall");
            format!(
                "the host's firewall may drop packets of VMs: chain {} of table {}{from}; {next}",
                chain.chain, chain.table
            )
        });
        warnings.extend(dropping);
        warnings
    }
}
