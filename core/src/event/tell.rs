//! The events of each kind, and their lines of text.

use std::sync::Arc;
use std::time::Duration;

use nexus_schema::ErrorCode;
use nexus_schema::id::{BootId, VmId};
use nexus_schema::link::CommandEnded;
use nexus_schema::tools::event::{Event, EventKind};
use nexus_schema::tools::op::{OpState, OpSummary};
use nexus_schema::tools::vm::{DeniedConnection, VmState};

use super::Events;
use super::ring::{VmFacts, Whose};
use crate::store::vms::VmRecord;

/// The most characters of text of an event.
const TEXT_MAX: usize = 300;
/// The state of a VM in the event of its deletion.
const DELETED: &str = "deleted";

/// The VM that an operation is about.
pub(crate) fn vm_of(op: &OpSummary) -> Option<VmId> {
    let is_of_vm = op.tool.starts_with("vm_") || op.tool.starts_with("guest_");
    op.subject_id.as_deref().filter(|_| is_of_vm)?.parse().ok()
}

/// One line that cannot move a terminal's cursor. A reason's further lines may hold a guest's words.
fn line(text: &str) -> String {
    let first = text.lines().next().unwrap_or_default();
    first.chars().filter(|c| !c.is_control()).take(TEXT_MAX).collect()
}

impl Events {
    /// Has the name of a VM and who may see it known.
    pub(crate) fn know(&self, vm: &VmRecord) {
        let facts = VmFacts { name: vm.name.clone(), owner: vm.owner.as_str().into(), tags: vm.tags.clone() };
        self.0.ring().know(vm.id, facts);
    }

    /// A VM changed its state, or something was noted in its history.
    pub(crate) fn vm(&self, vm: &VmRecord, from: Option<VmState>, why: &str) {
        self.know(vm);
        let text = match from {
            Some(from) if from == vm.state => format!("{}: {why}", vm.name),
            Some(from) => format!("{}: {from} -> {}: {why}", vm.name, vm.state),
            None => format!("{}: {}: {why}", vm.name, vm.state),
        };
        self.of_vm(vm, from, vm.state.as_str(), &text);
    }

    /// A VM was deleted.
    pub(crate) fn deleted(&self, vm: &VmRecord, why: &str) {
        self.know(vm);
        self.of_vm(vm, Some(vm.state), DELETED, &format!("{}: {why}", vm.name));
        self.0.ring().gone(vm.id);
    }

    fn of_vm(&self, vm: &VmRecord, from: Option<VmState>, state: &str, text: &str) {
        let event = Event {
            vm: Some(vm.id),
            boot_id: vm.boot_id,
            state: Some(state.to_owned()),
            from: from.map(|from| from.as_str().to_owned()),
            ..Event::new(EventKind::Vm, line(text))
        };
        self.add(Whose::Vm(vm.id), event);
    }

    /// An operation began or ended.
    pub(crate) fn op(&self, op: &OpSummary, state: OpState, error: Option<ErrorCode>) {
        let of = op.subject_name.as_ref().map_or_else(String::new, |name| format!(" of {name}"));
        let why = error.map_or_else(String::new, |code| format!(": {}", code.as_str()));
        let event = Event {
            vm: vm_of(op),
            op_id: Some(op.op_id),
            tool: Some(op.tool.clone()),
            state: Some(state.as_str().to_owned()),
            error: error.map(|code| code.as_str().to_owned()),
            ..Event::new(EventKind::Op, line(&format!("{}{of}: {}{why}", op.tool, state.as_str())))
        };
        self.add(Whose::Owner(Arc::from(op.owner.as_str())), event);
    }

    /// A guest says that a command of it has ended.
    pub(crate) fn command_ended(&self, vm: VmId, boot: Option<BootId>, ended: CommandEnded) {
        let Some(name) = self.0.ring().facts(vm).map(|facts| facts.name.clone()) else { return };
        let CommandEnded { command_id, status, duration_ms } = ended;
        let took = Duration::from_millis(duration_ms).as_secs_f64();
        let event = Event {
            vm: Some(vm),
            boot_id: boot,
            state: Some("ended".into()),
            command_id: Some(command_id),
            status: Some(status),
            ..Event::new(
                EventKind::Command,
                format!("{name}: command {command_id} ended with status {status} after {took:.1} s"),
            )
        };
        self.add(Whose::Vm(vm), event);
    }

    /// A connection of a VM was refused by policy.
    pub(crate) fn denied(&self, vm: VmId, protocol: &str, one: &DeniedConnection) {
        let Some(name) = self.0.ring().facts(vm).map(|facts| facts.name.clone()) else { return };
        let port = if one.port == 0 { String::new() } else { format!(":{}", one.port) };
        let text = format!("{name}: {protocol} to {}{port} refused: {}", one.host, one.reason.words());
        self.add(Whose::Vm(vm), Event { vm: Some(vm), ..Event::new(EventKind::Denied, line(&text)) });
    }

    /// Something of the host became scarce, or is no longer.
    pub(crate) fn pressure(&self, is_low: bool, text: &str) {
        let state = if is_low { "low" } else { "enough" };
        let event = Event { state: Some(state.into()), ..Event::new(EventKind::Pressure, line(text)) };
        self.add(Whose::Host, event);
    }

    /// The host's disk has no room for what a VM writes, or has room again.
    pub(crate) fn pressure_of(&self, vm: &VmRecord, is_low: bool) {
        let text = match is_low {
            true => format!("{}: the host's disk has no space for what it writes", vm.name),
            false => format!("{}: the host's disk has space again for what it writes", vm.name),
        };
        let event = Event {
            vm: Some(vm.id),
            boot_id: vm.boot_id,
            state: Some(if is_low { "low" } else { "enough" }.into()),
            ..Event::new(EventKind::Pressure, text)
        };
        self.add(Whose::Vm(vm.id), event);
    }
}
