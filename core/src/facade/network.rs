//! The network tools.

use std::collections::BTreeMap;
use std::time::Duration;

use nexus_net_wire::State;
use nexus_schema::network::NetworkMode;
use nexus_schema::tools::network::{
    InspectedNetwork, NatNetwork, NetworkCleanupOutput, NetworkCleanupParams, NetworkFirewallOutput,
    NetworkFirewallParams, NetworkInspectOutput, NetworkInspectParams, NetworkLogOutput, NetworkLogParams,
};
use nexus_schema::{Reference, ToolError};
use tokio::time::{Instant, sleep_until};

use super::{CallContext, Nexus, page, patience};
use crate::context::network_error;
use crate::egress::read_log;
use crate::vm::defaults::FIREWALL;
use crate::vm::{network, note};

/// Interval between two checks for a new line.
const LOOK: Duration = Duration::from_millis(200);

impl Nexus {
    /// The tool `network_inspect`.
    pub async fn network_inspect(
        &self,
        ctx: &CallContext,
        params: NetworkInspectParams,
    ) -> Result<NetworkInspectOutput, ToolError> {
        let handles = match &params.vm {
            Some(vm) => vec![self.shared.vms.get(&ctx.caller, vm)?],
            None => self.shared.vms.seen_by(&ctx.caller),
        };
        let state = self.shared.nat.state().await.map_err(network_error);
        let mut vms = Vec::new();
        for handle in handles {
            let record = handle.view.borrow().record.clone();
            let known = state.as_ref().ok().and_then(|state| state.as_ref()).map(|(_, state)| state);
            let network = network::shown_with(&self.shared, &record, known).await?;
            let note = note(&self.shared, record.id, &network);
            vms.push(InspectedNetwork {
                id: record.id,
                name: record.name,
                state: record.state,
                network,
                note,
            });
        }
        vms.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        let is_used = vms.iter().any(|vm| vm.network.mode == NetworkMode::Nat);
        Ok(NetworkInspectOutput { nat: self.nat(is_used, state).await?, vms })
    }

    /// Returns the state of the shared network. Does not choose its addresses if they are not chosen yet.
    async fn nat(
        &self,
        is_used: bool,
        state: Result<Option<(u32, State)>, ToolError>,
    ) -> Result<NatNetwork, ToolError> {
        let unavailable = self.shared.host(false).await?.check_nat().err();
        let mut nat = NatNetwork {
            available: unavailable.is_none(),
            unavailable_because: unavailable.map(|error| match error.hint {
                Some(hint) => format!("{}; {hint}", error.message),
                None => error.message,
            }),
            ..NatNetwork::default()
        };
        let state = match state {
            Ok(state) => state,
            Err(error) => {
                nat.warnings.push(error.message);
                None
            }
        };
        if let Some((pid, state)) = state {
            nat.pid = Some(pid);
            nat.bridge = state.bridge;
            nat.warnings.extend(state.warnings);
        }
        if is_used || nat.pid.is_some() {
            let (v4, v6) = network::addresses(&self.shared).await?.subnets();
            nat.subnet = Some(v4.subnet.to_string());
            nat.subnet6 = Some(v6.subnet.to_string());
        }
        Ok(nat)
    }

    /// The tool `network_log`.
    pub async fn network_log(
        &self,
        ctx: &CallContext,
        params: NetworkLogParams,
    ) -> Result<NetworkLogOutput, ToolError> {
        let limit = page(params.limit)? as usize;
        let deadline = Instant::now()
            + match params.wait_s {
                Some(_) => patience(params.wait_s)?,
                None => Duration::ZERO,
            };
        let from: Option<u64> = match &params.cursor {
            Some(cursor) => Some(
                cursor
                    .parse()
                    .map_err(|_| ToolError::invalid("invalid cursor: pass one that network_log returned"))?,
            ),
            None => None,
        };
        let vm = self.shared.vms.get(&ctx.caller, &params.vm)?.view.borrow().record.id;
        loop {
            let directory = self.shared.paths.network();
            let read = tokio::task::spawn_blocking(move || read_log(&directory, vm, from, limit)).await;
            let read = read.map_err(|e| ToolError::internal(format!("read the log: {e}")))?;
            let (connections, next) = read.map_err(|e| ToolError::internal(format!("read the log: {e}")))?;
            if !connections.is_empty() || Instant::now() >= deadline {
                return Ok(NetworkLogOutput { connections, cursor: next.to_string() });
            }
            sleep_until((Instant::now() + LOOK).min(deadline)).await;
            // Fails if the VM was deleted meanwhile.
            self.shared.vms.get(&ctx.caller, &Reference::Id(vm))?;
        }
    }

    /// The tool `network_firewall`.
    pub async fn network_firewall(
        &self,
        ctx: &CallContext,
        params: NetworkFirewallParams,
    ) -> Result<NetworkFirewallOutput, ToolError> {
        self.shared.host(false).await?.check_nat()?;
        let state = if params.dry_run == Some(true) {
            self.shared.nat.look().await.map_err(network_error)?
        } else {
            let value = (params.undo != Some(true)).then(|| "true".to_owned());
            let change = BTreeMap::from([(FIREWALL.to_owned(), value)]);
            self.shared.change_settings(change, &ctx.caller.owner).await?;
            network::apply(&self.shared).await?
        };
        let enabled = state.instance.as_ref().is_some_and(|instance| instance.opens_firewall);
        Ok(NetworkFirewallOutput { enabled, bridge: state.bridge, chains: state.firewall })
    }

    /// The tool `network_cleanup`.
    pub async fn network_cleanup(
        &self,
        _: &CallContext,
        _: NetworkCleanupParams,
    ) -> Result<NetworkCleanupOutput, ToolError> {
        Ok(NetworkCleanupOutput { removed: network::clean_up(&self.shared).await? })
    }
}
