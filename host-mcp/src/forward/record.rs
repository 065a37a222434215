//! A running call, for the audit log.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use nexus_core::{Authorised, CallRecord, Caller};
use nexus_schema::error::ErrorCode;
use nexus_schema::id::{BootId, VmId};
use nexus_schema::{Timestamp, TraceContext};
use tokio_util::task::task_tracker::TaskTrackerToken;

use crate::host::Host;
use crate::metrics::Ended;
use crate::otlp::Call;

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
    boot: Option<BootId>,
    rule: Authorised,
    denied: bool,
    trace: Option<Arc<TraceContext>>,
    bytes_in: u64,
    bytes_out: u64,
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
            boot: None,
            rule: "none",
            denied: false,
            trace: None,
            bytes_in: 0,
            bytes_out: 0,
            _under_way: host.under_way().token(),
        }
    }

    /// Records a request of nobody that is known, which is refused.
    pub(crate) fn refused(host: &Host, what: &'static str, rule: Authorised) {
        Self::start(host, &"unknown".into(), what, None).deny(rule, ErrorCode::Forbidden.as_str());
    }

    /// Records a request of a caller that lacks the scope for it.
    pub(crate) fn denied_request(host: &Host, caller: &Caller, what: &'static str) {
        Self::start(host, &caller.owner, what, None).deny("no scope", ErrorCode::Forbidden.as_str());
    }

    /// Sets the VM and the boot that answers.
    pub(crate) fn guest(&mut self, vm: VmId, boot: BootId) {
        self.vm = Some(vm);
        self.boot = Some(boot);
    }

    /// Sets the trace that the call belongs to.
    pub(crate) fn trace(&mut self, trace: Option<Arc<TraceContext>>) {
        self.trace = trace;
    }

    /// Sets what allowed the call.
    pub(crate) fn allow(&mut self, rule: Authorised) {
        self.rule = rule;
    }

    /// Sets what denied the call.
    pub(crate) fn deny(&mut self, rule: Authorised, outcome: &'static str) {
        (self.rule, self.denied, self.outcome) = (rule, true, outcome);
    }

    /// Adds bytes of arguments, or to the guest.
    pub(crate) fn took(&mut self, bytes: usize) {
        self.bytes_in += bytes as u64;
    }

    /// Adds bytes of the result, or from the guest.
    pub(crate) fn gave(&mut self, bytes: usize) {
        self.bytes_out += bytes as u64;
    }

    /// Sets the outcome: `ok`, or the error's code.
    pub(crate) fn outcome(&mut self, outcome: &'static str) {
        self.outcome = outcome;
    }

    /// Sets the outcome to an error's code. Some errors are denials.
    pub(crate) fn failed(&mut self, code: ErrorCode) {
        match code {
            ErrorCode::Forbidden => self.deny("forbidden", code.as_str()),
            ErrorCode::QuotaExceeded => self.deny("quota", code.as_str()),
            ErrorCode::ConfirmationRequired => self.deny("confirmation", code.as_str()),
            code => self.outcome = code.as_str(),
        }
    }
}

impl Drop for Recorded {
    fn drop(&mut self) {
        let counters = self.host.counters();
        if self.outcome != "ok" {
            counters.errors.add();
        }
        let duration = self.start.elapsed();
        counters.calls.count(&Ended {
            tool: &self.tool,
            outcome: self.outcome,
            took: duration,
            bytes_in: self.bytes_in,
            bytes_out: self.bytes_out,
        });
        let record = CallRecord {
            started: Timestamp::from(self.wall),
            owner: Arc::clone(&self.owner),
            tool: std::mem::take(&mut self.tool),
            vm: self.vm,
            duration,
            outcome: self.outcome,
            boot: self.boot,
            rule: self.rule,
            denied: self.denied,
            trace: self.trace.take(),
            bytes_in: self.bytes_in,
            bytes_out: self.bytes_out,
        };
        if let Some(exporter) = self.host.exporter() {
            exporter.add(Call { record: record.clone(), started: self.wall }, counters);
        }
        self.host.guests().record(record);
    }
}
