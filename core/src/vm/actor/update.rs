//! Changes of a VM that do not change its machine: tags, protection, name, lifetime, network.

use nexus_schema::link::ProxyParams;
use nexus_schema::network::NetworkMode;
use nexus_schema::tools::vm::{IdleAction, VmState};
use nexus_schema::{DriverKind, ErrorCode, Name, ToolError};

use super::Actor;
use crate::context::Change;
use crate::egress;
use crate::op::store_error;
use crate::store::vms;
use crate::vm::{lifetime, network, packages, policy};
use crate::vmm::Caps;

impl Actor {
    pub(super) async fn update(&mut self, change: Change, who: &str) -> Result<(), ToolError> {
        self.same_boot(change.if_boot)?;
        let mut tags = self.record.tags.clone();
        for key in &change.remove_tags {
            tags.remove(key);
        }
        tags.extend(change.tags);
        let mut mistakes = Vec::new();
        crate::vm::spec::check_tags(&tags, &mut |mistake| mistakes.push(mistake));
        let mut network = match &change.network {
            Some(asked) => egress::merge(&self.record.spec.network, asked).unwrap_or_else(|mistake| {
                mistakes.push(mistake);
                self.record.spec.network.clone()
            }),
            None => self.record.spec.network.clone(),
        };
        if !mistakes.is_empty() {
            return Err(ToolError::invalid(mistakes.join("; ")));
        }
        if change.network.is_some() {
            packages::fill(&self.shared, &mut network).await?;
        }
        if network.mode == NetworkMode::Nat && self.record.spec.network.mode != NetworkMode::Nat {
            self.check_nat().await?;
        }
        self.check_card(network.mode)?;
        if change.idle_action == Some(IdleAction::Suspend) {
            policy::suspendable(&self.record)?;
        }
        let new_name = change.name.filter(|name| *name != self.record.name);
        if let Some(name) = &new_name {
            self.check_rename(name).await?;
        }
        let before = self.record.clone();
        self.record.tags = tags;
        self.record.protected = change.protected.unwrap_or(before.protected);
        self.record.spec.network = network;
        if let Some(ttl) = change.ttl {
            self.record.expires_at = lifetime::end_of(ttl);
        }
        if let Some(limit) = change.idle_stop {
            self.record.spec.idle_stop = Some(limit).filter(|limit| !limit.is_zero());
        }
        if let Some(action) = change.idle_action {
            self.record.spec.idle_action = action;
        }
        let mut what = "changed by vm_update".to_owned();
        let line = new_name.clone().map(|name| {
            if self.record.spec.hostname == before.name.as_str() {
                name.as_str().clone_into(&mut self.record.spec.hostname);
            }
            what = format!("{} renamed to {name}", before.name);
            self.record.name = name;
            (self.record.state, what.clone(), who.to_owned())
        });
        if let Err(error) = self.write(line).await {
            if new_name.is_some() {
                // The new name was refused: do not retry to write this line.
                self.unwritten = None;
            }
            self.record = before;
            self.publish();
            return Err(error);
        }
        self.shared.events.vm(&self.record, Some(self.record.state), &what);
        if change.ttl.is_some() || change.idle_stop.is_some() {
            self.shared.lifetimes.notify_one();
        }
        // Even if the policy is unchanged: an earlier attempt to apply it may have failed.
        let applied = if change.network.is_some() {
            self.apply_network(before.spec.network.mode).await
        } else if new_name.is_some() {
            self.update_interface().await
        } else {
            Ok(())
        };
        if let Some(name) = new_name {
            tracing::info!(vm = %before.name, %name, who, "vm renamed");
            self.shared.vms.rename(before.id, &before.name, name);
            if before.spec.hostname != self.record.spec.hostname
                && let Some(boot) = &self.boot
            {
                boot.tell_hostname(&self.record.spec.hostname);
            }
        }
        applied
    }

    /// Reads the names of the preset `packages` again, and applies them.
    pub(super) async fn refresh_packages(&mut self) -> Result<(), ToolError> {
        if !packages::has_registries(&self.record.spec.network) {
            return Ok(());
        }
        let before = self.record.clone();
        packages::refill(&self.shared, &mut self.record.spec.network).await;
        if self.record.spec.network != before.spec.network {
            if let Err(error) = self.write(None).await {
                self.record = before;
                self.publish();
                return Err(error);
            }
            let what = "its package registries are others, by the setting network.packages";
            self.shared.events.vm(&self.record, Some(self.record.state), what);
        }
        // Even if nothing is different: an earlier attempt to apply it may have failed.
        self.apply_network(before.spec.network.mode).await
    }

    /// Applies the recorded policy: closes connections that it does not allow, and tells the guest if the mode has changed.
    async fn apply_network(&self, before: NetworkMode) -> Result<(), ToolError> {
        let network = &self.record.spec.network;
        tracing::info!(vm = %self.record.name, mode = network.mode.as_str(), preset = network.preset.as_str(), "vm's network changes");
        let lacks_interface = !self.boot.as_ref().is_some_and(|boot| boot.has_interface);
        let now = network::of_proxy(network, lacks_interface);
        self.shared.egresses.of(self.record.id, &now);
        if let Some(boot) = self.boot.as_ref().filter(|_| network.mode != before) {
            boot.tell_proxy(ProxyParams { enabled: now.mode == NetworkMode::Proxy });
        }
        let applied = self.update_interface().await;
        // A VM with an interface releases its addresses when it stops.
        if network.mode != NetworkMode::Nat
            && lacks_interface
            && let Err(error) = network::release(&self.shared, self.record.id).await
        {
            tracing::warn!(vm = %self.record.name, %error, "cannot release the vm's addresses");
        }
        applied
    }

    /// Applies policy, groups and name to the VM's interface, if it has one. If that fails, the change stays recorded, and the error tells the
    /// caller that connections which the change forbids may still be open.
    async fn update_interface(&self) -> Result<(), ToolError> {
        if !self.boot.as_ref().is_some_and(|boot| boot.has_interface) {
            return Ok(());
        }
        self.limit_bandwidth().await;
        network::update(&self.shared, &self.record).await.map_err(|error| {
            tracing::error!(vm = %self.record.name, %error, "a change of the vm's network was not applied");
            let message =
                format!("the change of {} is saved but not applied yet: {}", self.record.name, error.message);
            ToolError { message, ..error }.hint("call vm_update again; vm_stop closes all open connections")
        })
    }

    /// Tells the VMM its limits, if it holds traffic to them itself. If that fails, the host still does.
    async fn limit_bandwidth(&self) {
        let driver = self.record.driver.as_deref().and_then(DriverKind::named);
        let Some(boot) =
            self.boot.as_ref().filter(|_| driver.is_some_and(|driver| Caps::of(driver).limits_bandwidth))
        else {
            return;
        };
        if let Err(error) = boot.shim.limit(self.record.spec.network.bandwidth).await {
            let error = nexus_schema::error::chain(&error);
            tracing::warn!(vm = %self.record.name, error, "the VMM keeps its limits of bandwidth until the next start; the host applies the new ones");
        }
    }

    /// Fails if mode `nat` is not possible, before anything changes.
    async fn check_nat(&self) -> Result<(), ToolError> {
        let choice = self.shared.choose_driver_of(&self.record).await?;
        network::check(&*self.shared.host(false).await?, &choice)?;
        network::lease(&self.shared, self.record.id).await.map(drop)
    }

    /// Fails if the VM cannot have a new name, before anything changes.
    async fn check_rename(&self, name: &Name) -> Result<(), ToolError> {
        let old = &self.record.name;
        if self.record.state == VmState::Creating {
            return Err(ToolError::new(ErrorCode::VmWrongState, format!("{old} is being created"))
                .hint("rename it once it is created: vm_inspect shows its state"));
        }
        if self.unwritten.is_some() {
            return Err(ToolError::new(ErrorCode::Busy, format!("the state of {old} cannot be written now"))
                .hint("free some disk space, then try again"));
        }
        let wanted = name.clone();
        let is_taken =
            self.shared.store.read(move |db| vms::name_exists(db, &wanted)).await.map_err(store_error)?;
        match is_taken {
            true => {
                Err(store_error(crate::store::StoreError::NameTaken { kind: "VM", name: name.to_string() }))
            }
            false => Ok(()),
        }
    }
}
