//! Rules about what is allowed in which state: pure functions.

use nexus_schema::tools::vm::VmState;
use nexus_schema::{ErrorCode, ToolError};

use crate::context::Decision;
use VmState::{Crashed, Created, Creating, Failed, Ready, Running, Starting, Stopped, Stopping, Unreachable};

/// Returns whether the transition from one state to another is allowed.
pub(crate) const fn is_edge(from: VmState, to: VmState) -> bool {
    match from {
        Creating => matches!(to, Created | Failed),
        Created => matches!(to, Starting),
        Stopped | Crashed | Failed => matches!(to, Starting),
        // To itself: a boot that failed because of the emulator is retried once.
        Starting => matches!(to, Running | Stopping | Failed | Starting),
        Running => matches!(to, Ready | Stopping | Stopped | Starting | Failed | Crashed),
        Ready => matches!(to, Unreachable | Stopping | Stopped | Starting | Failed | Crashed),
        Unreachable => matches!(to, Ready | Stopping | Stopped | Starting | Failed | Crashed),
        Stopping => matches!(to, Stopped),
    }
}

/// Decides whether a VM may be started.
pub(crate) fn start(name: &str, state: VmState) -> Result<Decision, ToolError> {
    match state {
        Created | Stopped | Crashed | Failed => Ok(Decision::Go),
        Starting | Running | Ready => Ok(Decision::Already),
        Unreachable => Err(wrong_state(name, state, "it is running but does not answer")
            .hint("call vm_stop with force: true, then vm_start")),
        Stopping => Err(wrong_state(name, state, "it can be started once it is stopped")
            .hint("wait for it with vm_inspect, then call vm_start")),
        Creating => Err(wrong_state(name, state, "its drives are still being made")
            .hint("wait for the operation that creates it with op_get")),
    }
}

/// Decides whether a VM may be stopped.
pub(crate) fn stop(name: &str, state: VmState) -> Result<Decision, ToolError> {
    match state {
        Starting | Running | Ready | Unreachable => Ok(Decision::Go),
        Stopping | Created | Stopped | Crashed | Failed => Ok(Decision::Already),
        Creating => Err(wrong_state(name, state, "its drives are still being made")
            .hint("cancel the operation that creates it with op_cancel")),
    }
}

/// Decides whether a VM may be deleted.
pub(crate) fn delete(name: &str, state: VmState, protected: bool, force: bool) -> Result<(), ToolError> {
    if protected {
        return Err(ToolError::new(ErrorCode::VmProtected, format!("{name} is protected against deletion"))
            .hint("call vm_update with protected: false first, if you really want to delete it"));
    }
    match state {
        Created | Stopped | Crashed | Failed => Ok(()),
        Creating => Err(wrong_state(name, state, "its drives are still being made")
            .hint("cancel the operation that creates it with op_cancel")),
        Starting | Running | Ready | Unreachable | Stopping if force => Ok(()),
        Starting | Running | Ready | Unreachable | Stopping => {
            Err(wrong_state(name, state, "it is still running")
                .hint("call vm_stop first, or vm_delete with force: true to cut its power"))
        }
    }
}

/// Decides whether drives can be attached to and detached from a VM.
pub(crate) fn change_drives(name: &str, state: VmState) -> Result<(), ToolError> {
    match state {
        Created | Stopped | Crashed | Failed => Ok(()),
        Creating => Err(wrong_state(name, state, "its drives are still being made")),
        Starting | Running | Ready | Unreachable | Stopping => {
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
        Creating | Created | Stopped | Crashed | Failed => {
            Err(ToolError::new(ErrorCode::VmNotRunning, format!("{name} is {state}")).hint("call vm_start"))
        }
        Starting | Running => Err(ToolError::new(ErrorCode::VmNotReady, format!("{name} is {state}"))
            .hint("wait until it is ready: vm_start waits for it")),
        Unreachable => Err(unreachable(name, reason)),
        Stopping => Err(ToolError::new(ErrorCode::VmNotRunning, format!("{name} is stopping"))
            .hint("call vm_start once it is stopped")),
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
        .hint("check vm_logs; to restart the VM, call vm_stop with force: true, then vm_start")
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
    }
}
