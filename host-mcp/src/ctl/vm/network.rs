//! What a VM may reach, as options.

use nexus_schema::Name;
use nexus_schema::network::{NetworkMode, NetworkPreset, NetworkRule};
use nexus_schema::tools::vm::NetworkParams;

use crate::ctl::args::word;

/// What a VM may reach.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// How the VM reaches other machines: none, proxy (http_proxy and its kin in the VM), or nat (a network interface, root's daemon only)
    /// [default for new VMs: proxy]
    #[arg(long, value_parser = word::<NetworkMode>(&["none", "proxy", "nat"]))]
    network: Option<NetworkMode>,
    /// What the lists do not decide: internet, or open (private networks too) [default for new VMs: internet]
    #[arg(long, value_parser = word::<NetworkPreset>(&["internet", "open"]))]
    preset: Option<NetworkPreset>,
    /// Allow only this, and what other --allow name: a name, *.NAME, an address or CIDR, each with :PORT or :PORT-PORT; * is what the preset allows
    #[arg(long, value_name = "WHAT")]
    allow: Vec<NetworkRule>,
    /// Never allow this
    #[arg(long, value_name = "WHAT")]
    deny: Vec<NetworkRule>,
    /// Empty the list of what is allowed
    #[arg(long, conflicts_with = "allow")]
    no_allow: bool,
    /// Empty the list of what is denied
    #[arg(long, conflicts_with = "deny")]
    no_deny: bool,
    /// With network nat: be in this group, whose VMs may talk to each other, and in what other --group name
    #[arg(long, value_name = "GROUP")]
    group: Vec<Name>,
    /// Leave all groups
    #[arg(long, conflicts_with = "group")]
    no_group: bool,
}

impl Args {
    /// What is asked for; `None` if nothing is.
    pub(super) fn params(self) -> Option<NetworkParams> {
        fn list<T>(entries: Vec<T>, is_empty: bool) -> Option<Vec<T>> {
            (is_empty || !entries.is_empty()).then_some(entries)
        }
        let params = NetworkParams {
            mode: self.network,
            preset: self.preset,
            allow: list(self.allow, self.no_allow),
            deny: list(self.deny, self.no_deny),
            groups: list(self.group, self.no_group),
        };
        (params != NetworkParams::default()).then_some(params)
    }
}
