//! What a VM may reach, as options.

use nexus_schema::network::{Bandwidth, NetworkMode, NetworkPreset, NetworkRule};
use nexus_schema::tools::vm::NetworkParams;
use nexus_schema::{ByteSize, Name};

use crate::ctl::args::word;

/// What a VM may reach.
#[derive(Debug, clap::Args)]
#[group(id = "network-options")]
pub(crate) struct Args {
    /// The VM's network access: none, proxy (http_proxy and similar variables in the VM), or nat (a network interface; needs a daemon of root)
    /// [default for new VMs: proxy]
    #[arg(long, value_parser = word::<NetworkMode>(&["none", "proxy", "nat"]))]
    network: Option<NetworkMode>,
    /// What is reachable without lists: internet, open (also private networks), or packages (the package registries that the host itself uses) [default for new VMs: internet]
    #[arg(long, value_parser = word::<NetworkPreset>(&["internet", "open", "packages"]))]
    preset: Option<NetworkPreset>,
    /// Allow only this (may be repeated): a name, *.NAME, an address or CIDR, each with optional :PORT or :PORT-PORT; * is what the preset allows
    #[arg(long, value_name = "WHAT")]
    allow: Vec<NetworkRule>,
    /// Deny this; may be repeated
    #[arg(long, value_name = "WHAT")]
    deny: Vec<NetworkRule>,
    /// Clear the allow list
    #[arg(long, conflicts_with = "allow")]
    no_allow: bool,
    /// Clear the deny list
    #[arg(long, conflicts_with = "deny")]
    no_deny: bool,
    /// With network nat: join this group, whose VMs may connect to each other; may be repeated
    #[arg(long, value_name = "GROUP")]
    group: Vec<Name>,
    /// Limit of traffic to the VM, in bytes per second, e.g. 10MiB
    #[arg(long, value_name = "SIZE")]
    rx_limit: Option<ByteSize>,
    /// Limit of traffic from the VM; a direction without an option has no limit
    #[arg(long, value_name = "SIZE")]
    tx_limit: Option<ByteSize>,
    /// Remove both limits
    #[arg(long, conflicts_with_all = ["rx_limit", "tx_limit"])]
    no_limit: bool,
    /// Leave all groups
    #[arg(long, conflicts_with = "group")]
    no_group: bool,
}

impl Args {
    /// What is asked for; `None` if nothing is.
    pub(crate) fn params(self) -> Option<NetworkParams> {
        fn list<T>(entries: Vec<T>, is_empty: bool) -> Option<Vec<T>> {
            (is_empty || !entries.is_empty()).then_some(entries)
        }
        let limit = Bandwidth { rx: self.rx_limit, tx: self.tx_limit };
        let params = NetworkParams {
            mode: self.network,
            preset: self.preset,
            allow: list(self.allow, self.no_allow),
            deny: list(self.deny, self.no_deny),
            groups: list(self.group, self.no_group),
            bandwidth: (limit.is_empty() == self.no_limit).then_some(limit),
        };
        (params != NetworkParams::default()).then_some(params)
    }
}
