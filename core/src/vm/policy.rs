//! Rules about what is allowed in which state: pure functions.

use nexus_schema::id::BootId;
use nexus_schema::tools::vm::VmState;
use nexus_schema::{DriverKind, ErrorCode, ToolError};

use crate::context::Decision;
use crate::store::vms::VmRecord;
use crate::vmm::{Caps, Link};
use VmState::{
    Crashed, Created, Creating, Failed, Paused, Ready, Running, Starting, Stopped, Stopping, Suspended,
    Unreachable,
};

/// Returns whether the transition from one state to another is allowed.
pub(crate) const fn is_edge(from: VmState, to: VmState) -> bool {
    match from {
        Creating => matches!(to, Created | Failed),
        Created => matches!(to, Starting),
        Stopped | Crashed | Failed => matches!(to, Starting),
        // Its memory may be given up.
        Suspended => matches!(to, Starting | Stopped),
        // To itself: a boot that failed because of the emulator is retried once.
        // To suspended: one that could not be woken.
        Starting => matches!(to, Running | Stopping | Suspended | Failed | Starting),
        Running => matches!(to, Ready | Stopping | Suspended | Stopped | Starting | Failed | Crashed),
        Ready => matches!(to, Unreachable | Paused | Stopping | Stopped | Starting | Failed | Crashed),
        Unreachable => matches!(to, Ready | Stopping | Stopped | Starting | Failed | Crashed),
        Paused => matches!(to, Ready | Unreachable | Stopping | Stopped | Starting | Failed | Crashed),
        Stopping => matches!(to, Stopped | Suspended),
    }
}

/// Decides whether a VM may be started.
pub(crate) fn start(name: &str, state: VmState) -> Result<Decision, ToolError> {
    match state {
        // A suspended one is woken.
        Created | Stopped | Crashed | Failed | Suspended => Ok(Decision::Go),
        // A paused VM is running: it is resumed.
        Starting | Running | Ready | Paused => Ok(Decision::Already),
        Unreachable => Err(wrong_state(name, state, "it is running but does not answer")
            .hint("call vm_restart with force: true")),
        Stopping => Err(wrong_state(name, state, "it can be started once it is stopped")
            .hint("call vm_restart, which waits until it is stopped and starts it")),
        Creating => Err(wrong_state(name, state, "its drives are still being made")
            .hint("wait for the operation that creates it with op_get")),
    }
}

/// Decides whether a VM may be stopped.
pub(crate) fn stop(name: &str, state: VmState) -> Result<Decision, ToolError> {
    match state {
        // The memory of a suspended one is given up.
        Starting | Running | Ready | Unreachable | Paused | Suspended => Ok(Decision::Go),
        Stopping | Created | Stopped | Crashed | Failed => Ok(Decision::Already),
        Creating => Err(wrong_state(name, state, "its drives are still being made")
            .hint("cancel the operation that creates it with op_cancel")),
    }
}

/// Whether a VM may be restarted: whatever runs of it is stopped, then it is started.
pub(crate) fn restart(name: &str, state: VmState) -> Result<(), ToolError> {
    match state {
        Created | Starting | Running | Ready | Unreachable | Paused | Stopping | Suspended | Stopped
        | Crashed | Failed => Ok(()),
        Creating => Err(wrong_state(name, state, "its drives are still being made")
            .hint("wait for the operation that creates it with op_get")),
    }
}

/// Decides whether a VM may be paused.
pub(crate) fn pause(name: &str, state: VmState) -> Result<Decision, ToolError> {
    match state {
        Ready => Ok(Decision::Go),
        Paused => Ok(Decision::Already),
        Starting | Running => Err(wrong_state(name, state, "it can be paused once it is ready")
            .hint("call vm_start, which waits until it is ready, then vm_pause")),
        Unreachable => Err(wrong_state(name, state, "it is running but does not answer")
            .hint("call vm_restart with force: true")),
        Stopping => Err(wrong_state(name, state, "only a VM that is ready can be paused").hint(
            "nothing of it uses the processors once it is stopped; call vm_stop, which waits for that",
        )),
        Suspended => Err(wrong_state(name, state, "it uses neither processors nor memory")
            .hint("call vm_start, which wakes it, if it is to be paused instead")),
        Created | Stopped | Crashed | Failed => {
            Err(wrong_state(name, state, "only a VM that is ready can be paused").hint("call vm_start first"))
        }
        Creating => Err(wrong_state(name, state, "its drives are still being made")
            .hint("wait for the operation that creates it with op_get")),
    }
}

/// Decides whether a VM may be suspended. A paused one is resumed for that.
pub(crate) fn suspend(name: &str, state: VmState) -> Result<Decision, ToolError> {
    let ready = "only a VM that is ready can be suspended";
    match state {
        Ready | Paused => Ok(Decision::Go),
        Suspended => Ok(Decision::Already),
        Starting | Running => {
            Err(wrong_state(name, state, ready).hint("call vm_start, which waits until it is ready"))
        }
        Unreachable => Err(wrong_state(name, state, "it is running but does not answer")
            .hint("call vm_restart with force: true")),
        Stopping => Err(wrong_state(name, state, ready)
            .hint("nothing of it uses memory once it is down; call vm_stop, which waits for that")),
        Created | Stopped | Crashed | Failed => {
            Err(wrong_state(name, state, ready).hint("it uses no memory now; call vm_start first"))
        }
        Creating => Err(wrong_state(name, state, "its drives are still being made")
            .hint("wait for the operation that creates it with op_get")),
    }
}

/// Refuses to suspend a VM that cannot be saved, or whose end would be taken for that of its command.
pub(crate) fn suspendable(vm: &VmRecord) -> Result<(), ToolError> {
    if vm.spec.run.is_some() {
        let message = format!("{} exists for one command, so it cannot be suspended", vm.name);
        return Err(ToolError::new(ErrorCode::VmWrongState, message)
            .hint("make a VM without run, and start the command in it with guest_command_start"));
    }
    checkpointable(vm)
}

/// Whether the calls of a VM's guest wake it or wait for its wake: its memory is saved, and it is not stopped.
pub(crate) fn is_asleep(vm: &VmRecord) -> bool {
    vm.suspended.is_some()
}

/// What becomes of a VM with a saved memory whose VMM has ended: whether it is suspended. Then its row is made as it was when the memory was
/// saved. Otherwise its guest went on from that memory, which is of the past: it is taken away.
pub(crate) fn falls_asleep(vm: &mut VmRecord) -> bool {
    let Some(suspended) = vm.suspended.take() else { return false };
    let is_renewed = vm.guest.as_ref().is_some_and(|guest| guest.configured);
    let sleeps = match vm.state {
        Stopping => true,
        Starting | Running => !is_renewed,
        _ => false,
    };
    if sleeps {
        vm.boot_id = Some(suspended.manifest.boot_id);
        vm.token = Some(suspended.token.clone());
        vm.guest = Some(suspended.manifest.guest.clone());
        vm.processes = None;
        vm.suspended = Some(suspended);
    }
    sleeps
}

/// Refuses to pause a VM whose driver cannot do that.
pub(crate) fn pausable(name: &str, driver: &str) -> Result<(), ToolError> {
    if DriverKind::named(driver).is_some_and(|driver| Caps::of(driver).can_pause) {
        return Ok(());
    }
    let message = format!("{name} runs under {driver}, which cannot pause a VM");
    Err(ToolError::new(ErrorCode::HostUnsuitable, message)
        .hint("create VMs that are to be paused with driver: qemu; vm_stop frees the processors, too"))
}

/// Decides whether a checkpoint of a VM may be taken.
pub(crate) fn checkpoint(name: &str, state: VmState) -> Result<(), ToolError> {
    let ready = "only a VM that is ready can be saved";
    match state {
        Ready => Ok(()),
        Paused => Err(wrong_state(name, state, ready).hint("call vm_start, which resumes it")),
        Suspended => Err(wrong_state(name, state, ready).hint("call vm_start, which wakes it")),
        Starting | Running => {
            Err(wrong_state(name, state, ready).hint("call vm_start, which waits until it is ready"))
        }
        Unreachable => Err(wrong_state(name, state, "it is running but does not answer")
            .hint("call vm_restart with force: true")),
        Created | Stopped | Crashed | Failed => Err(wrong_state(name, state, ready).hint(
            "call vm_start first; to keep a stopped VM's disk, clone it with drive_create from: drive:NAME",
        )),
        Stopping => Err(wrong_state(name, state, ready)
            .hint("call vm_restart, which waits until it is stopped and starts it")),
        Creating => Err(wrong_state(name, state, "its drives are still being made")
            .hint("wait for the operation that creates it with op_get")),
    }
}

/// Refuses a checkpoint of a VM that cannot be saved, with how to make one that can.
pub(crate) fn checkpointable(vm: &VmRecord) -> Result<(), ToolError> {
    let driver = vm.driver.as_deref().unwrap_or_default();
    // One that was never started is of no driver yet.
    let can =
        driver.is_empty() || DriverKind::named(driver).is_some_and(|driver| Caps::of(driver).checkpoint);
    let message = match (can, vm.spec.checkpoints) {
        (true, true) => return Ok(()),
        (true, false) => format!("{} was made without checkpoints: true, so it cannot be saved", vm.name),
        (false, _) => format!("{} runs under {driver}, which cannot save a VM", vm.name),
    };
    Err(ToolError::new(ErrorCode::HostUnsuitable, message).hint(
        "make a VM that can: vm_create with checkpoints: true; the setting default.checkpoints=true makes that the default \
         (on the host: `nexusctl settings set default.checkpoints=true`)",
    ))
}

/// Returns what carries the connections into a VM: one with a vsock device can be saved only where its driver saves that, too.
pub(crate) const fn link(checkpoints: bool, driver: &Caps) -> Link {
    if checkpoints && !driver.saves_vsock { Link::Serial } else { Link::Vsock }
}

/// Returns whether the connections into a VM are lost when it is paused or saved.
pub(crate) fn cuts_connections(vm: &VmRecord) -> bool {
    let driver = vm.driver.as_deref().and_then(DriverKind::named);
    driver.is_some_and(|driver| Caps::of(driver).cuts_connections())
}

/// Decides whether drives of a VM may be copied: [`Decision::Already`] if nothing of it runs, [`Decision::Go`] if its guest has to stand still for it.
pub(crate) fn copy_drives(vm: &VmRecord) -> Result<Decision, ToolError> {
    let (name, state) = (vm.name.as_str(), vm.state);
    let when = "drives are copied of a VM that is ready or stopped";
    match state {
        Ready => match pausable(name, vm.driver.as_deref().unwrap_or_default()) {
            Ok(()) => Ok(Decision::Go),
            Err(refusal) => Err(refusal.hint("call vm_stop first: the drives of a stopped VM can be copied")),
        },
        Created | Stopped | Crashed | Failed => Ok(Decision::Already),
        Paused => Err(wrong_state(name, state, when).hint("call vm_start, which resumes it")),
        Starting | Running => {
            Err(wrong_state(name, state, when).hint("call vm_start, which waits until it is ready"))
        }
        Suspended => Err(wrong_state(name, state, when).hint("call vm_start, which wakes it")),
        Unreachable => Err(wrong_state(name, state, "it is running but does not answer")
            .hint("call vm_stop with force: true; its drives are copied once it is stopped")),
        Stopping => Err(wrong_state(name, state, when).hint("call vm_stop, which waits until it is stopped")),
        Creating => Err(wrong_state(name, state, "its drives are still being made")
            .hint("wait for the operation that creates it with op_get")),
    }
}

/// Decides whether a VM may go on from a checkpoint: what runs of it is ended.
pub(crate) fn restore(name: &str, state: VmState) -> Result<(), ToolError> {
    match state {
        Created | Starting | Running | Ready | Unreachable | Paused | Stopping | Stopped | Crashed
        | Failed => Ok(()),
        Suspended => Err(wrong_state(name, state, "it has a present of its own on the disk")
            .hint("call vm_start, which wakes it, or vm_stop, which gives its memory up")),
        Creating => Err(wrong_state(name, state, "its drives are still being made")
            .hint("wait for the operation that creates it with op_get")),
    }
}

/// Decides whether a VM may be resumed.
pub(crate) fn resume(name: &str, state: VmState) -> Result<Decision, ToolError> {
    match state {
        // A suspended one is woken.
        Paused | Suspended => Ok(Decision::Go),
        Ready => Ok(Decision::Already),
        Starting | Running | Created | Stopped | Crashed | Failed => {
            Err(wrong_state(name, state, "it is not paused")
                .hint("call vm_start: it waits until the VM is ready"))
        }
        Unreachable => Err(wrong_state(name, state, "it is not paused, but does not answer")
            .hint("call vm_restart with force: true")),
        Stopping => Err(wrong_state(name, state, "it is not paused")
            .hint("call vm_restart, which waits until it is stopped and starts it")),
        Creating => Err(wrong_state(name, state, "its drives are still being made")
            .hint("wait for the operation that creates it with op_get")),
    }
}

/// Refuses what a caller means for another boot than the current or last one.
pub(crate) fn same_boot(name: &str, now: Option<BootId>, asked: Option<BootId>) -> Result<(), ToolError> {
    let Some(asked) = asked.filter(|asked| now != Some(*asked)) else { return Ok(()) };
    let message = match now {
        Some(now) => format!("{name} has booted anew: its boot is {now}, not {asked}"),
        None => format!("{name} has not booted yet, so its boot is not {asked}"),
    };
    Err(ToolError::new(ErrorCode::BootChanged, message).hint(
        "what ran in the earlier boot has ended: look at the VM with vm_inspect, then call again with its boot_id",
    ))
}

/// Decides whether a VM may be deleted.
pub(crate) fn delete(name: &str, state: VmState, protected: bool, force: bool) -> Result<(), ToolError> {
    if protected {
        return Err(ToolError::new(ErrorCode::VmProtected, format!("{name} is protected against deletion"))
            .hint("call vm_update with protected: false first, if you really want to delete it"));
    }
    match state {
        // With its memory.
        Created | Stopped | Crashed | Failed | Suspended => Ok(()),
        Creating => Err(wrong_state(name, state, "its drives are still being made")
            .hint("cancel the operation that creates it with op_cancel")),
        Starting | Running | Ready | Unreachable | Paused | Stopping if force => Ok(()),
        Starting | Running | Ready | Unreachable | Paused | Stopping => {
            Err(wrong_state(name, state, "it is still running")
                .hint("call vm_stop first, or vm_delete with force: true to cut its power"))
        }
    }
}

/// Decides whether drives can be attached to and detached from a VM.
pub(crate) fn change_drives(name: &str, state: VmState) -> Result<(), ToolError> {
    match state {
        Created | Stopped | Crashed | Failed => Ok(()),
        Creating => Err(wrong_state(name, state, "its drives are still being made")
            .hint("wait for the operation that creates it with op_get")),
        Suspended => Err(wrong_state(name, state, "its memory knows what is on its drives")
            .hint(format!("call vm_stop with vm: {name} first, which gives its memory up"))),
        Starting | Running | Ready | Unreachable | Paused | Stopping => {
            Err(wrong_state(name, state, "drives can be attached and detached only while the VM is stopped")
                .hint(format!("call vm_stop with vm: {name} first")))
        }
    }
}

/// Start of the reason of a VM that is paused because the host's disk is full.
pub(crate) const DISK_FULL: &str = "disk_full: ";

/// Decides whether a VM's guest tools may be called. `reason` says why the VM is in its state.
pub(crate) fn guest_call(name: &str, state: VmState, reason: Option<&str>) -> Result<(), ToolError> {
    match state {
        Ready => Ok(()),
        Creating => Err(ToolError::new(ErrorCode::VmNotRunning, format!("{name} is {state}"))
            .hint("wait for the operation that creates it with op_get")),
        Created | Stopped | Crashed | Failed => {
            Err(ToolError::new(ErrorCode::VmNotRunning, format!("{name} is {state}")).hint("call vm_start"))
        }
        Starting | Running => Err(ToolError::new(ErrorCode::VmNotReady, format!("{name} is {state}"))
            .hint("wait until it is ready: vm_start waits for it")),
        Unreachable => Err(unreachable(name, reason)),
        Suspended => Err(ToolError::new(ErrorCode::VmNotRunning, format!("{name} is {state}"))
            .hint("call vm_start, which wakes it; so does every call of a guest's tool")),
        Paused => Err(ToolError::new(ErrorCode::VmPaused, format!("{name} is paused"))
            .hint("call vm_start, which resumes it, or vm_resume")),
        Stopping => Err(ToolError::new(ErrorCode::VmNotRunning, format!("{name} is stopping"))
            .hint("call vm_restart, which waits until it is stopped and starts it")),
    }
}

/// Returns the error for a guest that cannot be reached, with the reason and a hint.
fn unreachable(name: &str, reason: Option<&str>) -> ToolError {
    if let Some(what) = reason.and_then(|reason| reason.strip_prefix(DISK_FULL)) {
        return ToolError::new(ErrorCode::DiskFull, format!("{name} is paused: {what}"))
            .hint("free space on the host, for example with the tool prune; the VM then resumes by itself");
    }
    let message = match reason {
        Some(reason) => format!("the agent of {name} does not answer: {reason}"),
        None => format!("the agent of {name} does not answer"),
    };
    ToolError::new(ErrorCode::GuestUnreachable, message)
        .hint("check vm_logs; to restart the VM, call vm_restart with force: true")
}

fn wrong_state(name: &str, state: VmState, why: &str) -> ToolError {
    ToolError::new(ErrorCode::VmWrongState, format!("{name} is {state}: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_can_be_reached_and_none_is_a_dead_end() {
        let mut reached = vec![Creating];
        let mut next = 0;
        while next < reached.len() {
            for to in VmState::ALL {
                if is_edge(reached[next], to) && !reached.contains(&to) {
                    reached.push(to);
                }
            }
            next += 1;
        }
        assert_eq!(reached.len(), VmState::ALL.len());
        for from in VmState::ALL {
            assert!(VmState::ALL.into_iter().any(|to| is_edge(from, to)), "{from} is a dead end");
            assert_eq!(is_edge(from, from), from == Starting, "{from} to itself");
        }
    }

    #[test]
    fn a_start_is_only_decided_where_the_edge_exists() {
        for state in VmState::ALL {
            let go = matches!(start("x", state), Ok(Decision::Go));
            assert_eq!(go, is_edge(state, Starting) && !state.may_run(), "{state}");
        }
    }

    /// What the tools say of each state.
    fn allows(tool: &str, state: VmState) -> bool {
        match tool {
            "vm_start" => start("x", state).is_ok(),
            "vm_stop" => stop("x", state).is_ok(),
            "vm_restart" => restart("x", state).is_ok(),
            "vm_pause" => pause("x", state).is_ok(),
            "vm_pause suspend" => suspend("x", state).is_ok(),
            "vm_resume" => resume("x", state).is_ok(),
            "vm_delete" => delete("x", state, false, false).is_ok(),
            "drive_attach" => change_drives("x", state).is_ok(),
            "guest_run_command" => guest_call("x", state, None).is_ok(),
            "vm_inspect" => true,
            other => panic!("{other} is no tool of this table"),
        }
    }

    #[test]
    fn every_state_has_its_tools_and_a_next_step_that_works() {
        for (state, allowed) in [
            (Creating, [false, false, false, false, false, false, false, false, false]),
            (Created, [true, true, true, false, false, false, true, true, false]),
            (Starting, [true, true, true, false, false, false, false, false, false]),
            (Running, [true, true, true, false, false, false, false, false, false]),
            (Ready, [true, true, true, true, true, true, false, false, true]),
            (Unreachable, [false, true, true, false, false, false, false, false, false]),
            (Paused, [true, true, true, true, true, true, false, false, false]),
            (Stopping, [false, true, true, false, false, false, false, false, false]),
            (Suspended, [true, true, true, false, true, true, true, false, false]),
            (Stopped, [true, true, true, false, false, false, true, true, false]),
            (Crashed, [true, true, true, false, false, false, true, true, false]),
            (Failed, [true, true, true, false, false, false, true, true, false]),
        ] {
            let tools = [
                "vm_start",
                "vm_stop",
                "vm_restart",
                "vm_pause",
                "vm_pause suspend",
                "vm_resume",
                "vm_delete",
                "drive_attach",
                "guest_run_command",
            ];
            assert_eq!(tools.map(|tool| allows(tool, state)), allowed, "{state}");
            let next = state.next();
            assert!(allows(next.tool, state), "{state}: {} is refused", next.tool);
        }
    }

    #[test]
    fn every_refusal_says_what_to_call_and_that_is_not_refused_too() {
        for state in VmState::ALL {
            let refusals = [
                start("x", state).err(),
                stop("x", state).err(),
                restart("x", state).err(),
                pause("x", state).err(),
                suspend("x", state).err(),
                resume("x", state).err(),
                delete("x", state, false, false).err(),
                change_drives("x", state).err(),
                guest_call("x", state, None).err(),
                checkpoint("x", state).err(),
                restore("x", state).err(),
            ];
            for error in refusals.into_iter().flatten() {
                let hint = error.hint.unwrap_or_else(|| panic!("{state}: {} has no hint", error.message));
                let known = ["vm_start", "vm_stop", "vm_restart", "op_get", "op_cancel"];
                let words = hint.split(|c: char| !c.is_ascii_lowercase() && c != '_');
                let first = words.into_iter().find(|word| known.contains(word));
                let first = first.unwrap_or_else(|| panic!("{state}: `{hint}` names no tool"));
                assert!(first.starts_with("op_") || allows(first, state), "{state}: {first} is refused too");
            }
        }
    }

    #[test]
    fn only_drivers_that_can_pause_do() {
        for driver in ["qemu", "firecracker", "process"] {
            pausable("x", driver).unwrap();
        }
        let refused = pausable("x", "bhyve").unwrap_err();
        assert_eq!(refused.code, ErrorCode::HostUnsuitable);
        assert!(refused.message.contains("bhyve") && refused.hint.unwrap().contains("qemu"));
        pausable("x", "").unwrap_err();
    }

    #[test]
    fn a_vm_that_cannot_be_saved_is_told_how_to_make_one_that_can() {
        let mut vm = crate::store::tests::vm("web", 3);
        for (driver, checkpoints, said) in [
            (None, false, "made without checkpoints: true"),
            (Some("process"), true, "runs under process, which cannot save"),
            (Some("qemu"), false, "made without checkpoints: true"),
        ] {
            vm.driver = driver.map(str::to_owned);
            vm.spec.checkpoints = checkpoints;
            let error = checkpointable(&vm).unwrap_err();
            assert_eq!(error.code, ErrorCode::HostUnsuitable);
            assert!(error.message.contains(said), "{error}");
            let hint = error.hint.unwrap();
            assert!(hint.contains("vm_create with checkpoints: true"), "{hint}");
            assert!(hint.contains("`nexusctl settings set default.checkpoints=true`"), "{hint}");
        }
        vm.spec.checkpoints = true;
        for (driver, cuts, serial) in [("qemu", false, Link::Serial), ("firecracker", true, Link::Vsock)] {
            vm.driver = Some(driver.into());
            checkpointable(&vm).unwrap();
            assert_eq!(cuts_connections(&vm), cuts);
            let caps = Caps::of(DriverKind::named(driver).unwrap());
            assert_eq!((link(true, &caps), link(false, &caps)), (serial, Link::Vsock));
        }
    }

    #[test]
    fn a_vm_whose_guest_went_on_does_not_sleep_any_more() {
        for (state, configured, sleeps) in [
            // It was to sleep: its guest was renewed long ago.
            (Stopping, true, true),
            (Starting, false, true),
            (Running, false, true),
            (Running, true, false),
            (Ready, true, false),
        ] {
            let mut vm = crate::store::tests::vm("web", 3);
            let saved = crate::store::tests::suspended(&vm);
            vm.state = state;
            vm.boot_id = BootId::from_i64(7);
            vm.token = Some("of-now".into());
            vm.guest = Some(crate::store::vms::GuestRecord { configured, ..saved.manifest.guest.clone() });
            vm.suspended = Some(Box::new(saved.clone()));
            assert_eq!(falls_asleep(&mut vm), sleeps, "{state} {configured}");
            assert_eq!(is_asleep(&vm), sleeps);
            let (boot, token) =
                if sleeps { (Some(saved.manifest.boot_id), "of-then") } else { (vm.boot_id, "of-now") };
            assert_eq!((vm.boot_id, vm.token.as_deref()), (boot, Some(token)), "{state} {configured}");
            assert!(!sleeps || is_edge(state, Suspended), "{state}");
        }
        assert!(!falls_asleep(&mut crate::store::tests::vm("web", 3)));
    }

    #[test]
    fn a_vm_for_one_command_is_not_suspended() {
        let mut vm = crate::store::tests::vm("web", 3);
        vm.driver = Some("qemu".into());
        vm.spec.checkpoints = true;
        suspendable(&vm).unwrap();
        vm.spec.run = Some("make test".into());
        assert_eq!(suspendable(&vm).unwrap_err().code, ErrorCode::VmWrongState);
    }

    #[test]
    fn another_boot_is_told_with_both_ids() {
        let [one, other] = [1, 2].map(BootId::from_i64);
        same_boot("x", one, None).unwrap();
        same_boot("x", one, one).unwrap();
        let error = same_boot("x", one, other).unwrap_err();
        assert_eq!(error.code, ErrorCode::BootChanged);
        for id in [one, other].into_iter().flatten() {
            assert!(error.message.contains(&id.to_string()), "{error}");
        }
        same_boot("x", None, one).unwrap_err();
    }

    #[test]
    fn a_stop_works_wherever_something_may_run() {
        for state in VmState::ALL {
            let decision = stop("x", state);
            match state {
                Stopping => assert_eq!(decision, Ok(Decision::Already)),
                _ if state.may_run() => {
                    assert_eq!(decision, Ok(Decision::Go), "{state}");
                    assert!(is_edge(state, Stopping), "{state}");
                }
                Creating => assert!(decision.is_err()),
                Suspended => {
                    assert_eq!(decision, Ok(Decision::Go));
                    assert!(is_edge(state, Stopped));
                }
                _ => assert_eq!(decision, Ok(Decision::Already), "{state}"),
            }
        }
    }

    #[test]
    fn deletion_is_refused_for_protected_and_running_ones() {
        for state in VmState::ALL {
            let refused = delete("x", state, true, true).unwrap_err();
            assert_eq!(refused.code, ErrorCode::VmProtected);
            assert_eq!(
                delete("x", state, false, false).is_ok(),
                !state.may_run() && state != Creating,
                "{state}"
            );
            assert_eq!(delete("x", state, false, true).is_ok(), state != Creating, "{state}");
        }
    }

    #[test]
    fn guest_calls_need_a_ready_guest_and_say_what_to_do_otherwise() {
        for state in VmState::ALL {
            match guest_call("web-1", state, Some("its link is lost")) {
                Ok(()) => assert_eq!(state, Ready),
                Err(error) => assert!(error.hint.is_some() && error.message.contains("web-1")),
            }
        }
        let why = |reason| guest_call("web-1", Unreachable, Some(reason)).unwrap_err();
        assert!(why("its link is lost").message.ends_with("does not answer: its link is lost"));
        assert_eq!(why("its link is lost").code, ErrorCode::GuestUnreachable);
        assert_eq!(why("disk_full: drive d").code, ErrorCode::DiskFull);
        assert_eq!(guest_call("web-1", Paused, None).unwrap_err().code, ErrorCode::VmPaused);
    }
}
