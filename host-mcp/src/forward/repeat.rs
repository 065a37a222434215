//! Repeated looks: whoever polls would fill the audit log with one sentence. That a caller looked at the state of the host, a VM or an operation
//! is recorded once a minute. What changes something, fails, is denied, reads contents or belongs to a trace is recorded each time.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nexus_core::CallRecord;
use nexus_schema::id::{BootId, VmId};

/// For how long a look is not recorded again.
const WINDOW: Duration = Duration::from_secs(60);
/// How many looks are remembered. Beyond it some are recorded more often.
const KEPT_MAX: usize = 1024;

/// Who looked, with what, and at which boot of which VM.
type Look = (Arc<str>, Cow<'static, str>, Option<VmId>, Option<BootId>);

/// The looks of the last minute.
#[derive(Debug, Default)]
pub(crate) struct Repeats(Mutex<HashMap<Look, Instant>>);

/// Whether a tool only shows how something is, so that clients poll it.
fn is_look(tool: &str) -> bool {
    matches!(
        tool,
        "audit_list"
            | "command_list"
            | "events_wait"
            | "network_log"
            | "op_get"
            | "op_list"
            | "os_info"
            | "system_info"
            | "vm_inspect"
            | "vm_list"
            | "vm_logs"
            | "vm_wait"
    )
}

impl Repeats {
    /// Whether a call repeats one that was recorded lately. If not, it counts as recorded now.
    pub(crate) fn has(&self, call: &CallRecord) -> bool {
        self.has_at(call, Instant::now())
    }

    fn has_at(&self, call: &CallRecord, now: Instant) -> bool {
        if !is_look(&call.tool) || call.outcome != "ok" || call.denied || call.trace.is_some() {
            return false;
        }
        let look = (Arc::clone(&call.owner), call.tool.clone(), call.vm, call.boot);
        let mut looks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_new = |recorded: &Instant| now.saturating_duration_since(*recorded) < WINDOW;
        if looks.get(&look).is_some_and(is_new) {
            return true;
        }
        if looks.len() >= KEPT_MAX {
            looks.retain(|_, recorded| is_new(recorded));
            if looks.len() >= KEPT_MAX {
                looks.clear();
            }
        }
        looks.insert(look, now);
        false
    }
}

#[cfg(test)]
mod tests {
    use nexus_schema::Timestamp;

    use super::*;

    fn call(owner: &str, tool: &'static str, outcome: &'static str) -> CallRecord {
        CallRecord {
            started: Timestamp::from_millis(1),
            owner: owner.into(),
            tool: tool.into(),
            vm: None,
            boot: None,
            duration: Duration::from_micros(60),
            outcome,
            rule: "owner",
            denied: false,
            trace: None,
            bytes_in: 0,
            bytes_out: 0,
        }
    }

    #[test]
    fn looks_are_recorded_once_a_minute_and_all_else_each_time() {
        let (repeats, start) = (Repeats::default(), Instant::now());
        let mut vm = call("uid:0", "vm_inspect", "ok");
        vm.vm = VmId::from_i64(1);
        for (call, after_s, is_repeated) in [
            (&call("uid:0", "vm_list", "ok"), 0, false),
            (&call("uid:0", "vm_list", "ok"), 59, true),
            (&call("token:a", "vm_list", "ok"), 59, false),
            (&call("uid:0", "vm_inspect", "ok"), 59, false),
            (&vm, 59, false),
            (&vm, 59, true),
            (&call("uid:0", "vm_list", "ok"), 60, false),
            (&call("uid:0", "vm_list", "forbidden"), 61, false),
            (&call("uid:0", "file_read", "ok"), 61, false),
            (&call("uid:0", "file_read", "ok"), 61, false),
            (&call("uid:0", "vm_start", "ok"), 61, false),
            (&call("uid:0", "vm_start", "ok"), 61, false),
        ] {
            let now = start + Duration::from_secs(after_s);
            assert_eq!(repeats.has_at(call, now), is_repeated, "{call:?} after {after_s} s");
        }
    }

    #[test]
    fn looks_need_little_memory() {
        let (repeats, now) = (Repeats::default(), Instant::now());
        for at in 0..3 * KEPT_MAX {
            assert!(!repeats.has_at(&call(&format!("token:{at}"), "vm_list", "ok"), now));
        }
        assert!(repeats.0.lock().unwrap().len() <= KEPT_MAX);
    }
}
