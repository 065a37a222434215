//! A running call, for the call record.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use nexus_core::CallRecord;
use nexus_schema::Timestamp;
use nexus_schema::error::ErrorCode;
use nexus_schema::id::VmId;
use tokio_util::task::task_tracker::TaskTrackerToken;

use crate::host::Host;

/// A running call. It is recorded when dropped: as cancelled, unless its outcome was set.
#[derive(Debug)]
pub(crate) struct Recorded {
    host: Host,
    owner: Arc<str>,
    tool: Cow<'static, str>,
    vm: Option<VmId>,
    wall: SystemTime,
    start: Instant,
    outcome: &'static str,
    _under_way: TaskTrackerToken,
}

impl Recorded {
    /// A call that starts now. `vm` is the VM, if known.
    pub(crate) fn start(
        host: &Host,
        owner: &Arc<str>,
        tool: impl Into<Cow<'static, str>>,
        vm: Option<VmId>,
    ) -> Self {
        Self {
            host: host.clone(),
            owner: Arc::clone(owner),
            tool: tool.into(),
            vm,
            wall: SystemTime::now(),
            start: Instant::now(),
            outcome: ErrorCode::Cancelled.as_str(),
            _under_way: host.under_way().token(),
        }
    }

    /// Sets the VM.
    pub(crate) fn vm(&mut self, vm: VmId) {
        self.vm = Some(vm);
    }

    /// Sets the outcome: `ok`, or the error's code.
    pub(crate) fn outcome(&mut self, outcome: &'static str) {
        self.outcome = outcome;
    }
}

impl Drop for Recorded {
    fn drop(&mut self) {
        if self.outcome != "ok" {
            self.host.counters().errors.add();
        }
        self.host.guests().record(CallRecord {
            started: Timestamp::from(self.wall),
            owner: Arc::clone(&self.owner),
            tool: std::mem::take(&mut self.tool),
            vm: self.vm,
            duration: self.start.elapsed(),
            outcome: self.outcome,
        });
    }
}
