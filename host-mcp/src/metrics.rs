//! Counts calls, and writes what is counted as text for Prometheus.
//!
//! Nothing here names a VM, a caller or what a guest says: the labels are names of tools, codes of errors and states, of which there are few.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt::{Display, Write};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use nexus_core::Measures;

use crate::host::Counters;

/// The upper bounds of the histograms' buckets, in microseconds.
const BOUNDS_US: [u64; 13] = [
    100,
    250,
    500,
    1_000,
    2_500,
    10_000,
    50_000,
    250_000,
    1_000_000,
    5_000_000,
    15_000_000,
    45_000_000,
    120_000_000,
];

/// The calls of each tool since the daemon started.
#[derive(Debug, Default)]
pub struct Calls(Mutex<BTreeMap<Cow<'static, str>, OfTool>>);

/// The calls of one tool.
#[derive(Debug, Default)]
struct OfTool {
    /// How many took at most as long as each bound, and longer than the one before; the last is for all others.
    buckets: [u64; BOUNDS_US.len() + 1],
    took_us: u64,
    /// How many ended with each outcome; there are few, and mostly `ok`.
    outcomes: Vec<(&'static str, u64)>,
    bytes_in: u64,
    bytes_out: u64,
}

/// One call that ended.
#[derive(Debug)]
pub(crate) struct Ended<'a> {
    /// One of the tools' names.
    pub(crate) tool: &'a Cow<'static, str>,
    /// `ok`, or an error's code.
    pub(crate) outcome: &'static str,
    pub(crate) took: Duration,
    pub(crate) bytes_in: u64,
    pub(crate) bytes_out: u64,
}

impl Calls {
    /// Counts a call.
    pub(crate) fn count(&self, call: &Ended<'_>) {
        let took_us = u64::try_from(call.took.as_micros()).unwrap_or(u64::MAX);
        let bucket = BOUNDS_US.partition_point(|bound| *bound < took_us);
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !all.contains_key(call.tool) {
            all.insert(call.tool.clone(), OfTool::default());
        }
        let Some(tool) = all.get_mut(call.tool) else { return };
        tool.buckets[bucket] += 1;
        tool.took_us = tool.took_us.saturating_add(took_us);
        tool.bytes_in = tool.bytes_in.saturating_add(call.bytes_in);
        tool.bytes_out = tool.bytes_out.saturating_add(call.bytes_out);
        match tool.outcomes.iter_mut().find(|(outcome, _)| *outcome == call.outcome) {
            Some((_, count)) => *count += 1,
            None => tool.outcomes.push((call.outcome, 1)),
        }
    }
}

/// Text in the format of Prometheus, version 0.0.4.
#[derive(Debug, Default)]
struct Text(String);

impl Text {
    /// Begins a family of samples.
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        self.0.push_str(name);
        for (at, (label, value)) in labels.iter().enumerate() {
            let _ = write!(self.0, "{}{label}=\"{}\"", if at == 0 { '{' } else { ',' }, escaped(value));
        }
        let _ = writeln!(self.0, "{} {value}", if labels.is_empty() { "" } else { "}" });
    }

    fn single(&mut self, name: &str, kind: &str, help: &str, value: impl Display) {
        self.family(name, kind, help);
        self.sample(name, &[], value);
    }
}

fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// Seconds with all digits of the microseconds.
fn seconds(us: u64) -> String {
    let text = format!("{}.{:06}", us / 1_000_000, us % 1_000_000);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

impl Calls {
    fn write(&self, out: &mut Text) {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        out.family("nexus_tool_calls_total", "counter", "Calls that ended, by tool and outcome.");
        for (tool, calls) in &*all {
            for (outcome, count) in &calls.outcomes {
                let labels = [("tool", tool.as_ref()), ("outcome", *outcome)];
                out.sample("nexus_tool_calls_total", &labels, count);
            }
        }
        let name = "nexus_tool_call_duration_seconds";
        out.family(name, "histogram", "How long calls took, by tool.");
        for (tool, calls) in &*all {
            let (of_tool, mut sum) = (("tool", tool.as_ref()), 0);
            for (count, bound) in calls.buckets.iter().zip(BOUNDS_US) {
                sum += count;
                let bound = seconds(bound);
                out.sample(&format!("{name}_bucket"), &[of_tool, ("le", bound.as_str())], sum);
            }
            let count: u64 = calls.buckets.iter().sum();
            out.sample(&format!("{name}_bucket"), &[of_tool, ("le", "+Inf")], count);
            out.sample(&format!("{name}_sum"), &[of_tool], seconds(calls.took_us));
            out.sample(&format!("{name}_count"), &[of_tool], count);
        }
        let name = "nexus_call_bytes_total";
        out.family(name, "counter", "Bytes of arguments and results of calls, and of streams into guests.");
        let sum = |of: fn(&OfTool) -> u64| all.values().map(of).fold(0, u64::saturating_add);
        out.sample(name, &[("direction", "in")], sum(|calls| calls.bytes_in));
        out.sample(name, &[("direction", "out")], sum(|calls| calls.bytes_out));
    }
}

/// Everything that is counted, as text.
pub(crate) fn text(counters: &Counters, under_way: usize, sessions: usize, core: &Measures) -> String {
    let mut out = Text::default();
    for (name, kind, help, value) in [
        ("nexus_host_calls_total", "counter", "Calls of the host's own tools.", counters.host_calls.get()),
        ("nexus_guest_calls_total", "counter", "Calls forwarded to guests.", counters.guest_calls.get()),
        ("nexus_call_errors_total", "counter", "Calls that ended in an error.", counters.errors.get()),
        ("nexus_http_requests_total", "counter", "HTTP requests.", counters.requests.get()),
        ("nexus_spans_sent_total", "counter", "Spans that the collector took.", counters.spans_sent.get()),
        ("nexus_spans_lost_total", "counter", "Spans that were not exported.", counters.spans_lost.get()),
        ("nexus_calls_under_way", "gauge", "Calls that have not ended.", under_way as u64),
        ("nexus_streams", "gauge", "Streams that are open.", counters.streams.get()),
        ("nexus_guest_streams", "gauge", "Streams into guests that are open.", counters.guest_streams.get()),
        ("nexus_http_sessions", "gauge", "HTTP sessions.", sessions as u64),
        ("nexus_boots_total", "counter", "Guests that became ready.", core.boots),
        ("nexus_link_losses_total", "counter", "Links to guests that were lost.", core.link_losses),
        (
            "nexus_connections_denied_total",
            "counter",
            "Connections of VMs in mode proxy that policy refused.",
            core.denied,
        ),
        (
            "nexus_events_dropped_total",
            "counter",
            "Events that were dropped because there were too many.",
            core.events_dropped,
        ),
        ("nexus_audit_lost_total", "counter", "Calls that are not in the audit log.", core.audit_lost),
    ] {
        out.single(name, kind, help, value);
    }
    out.family("nexus_vms", "gauge", "VMs by state.");
    for (state, count) in &core.vms {
        out.sample("nexus_vms", &[("state", *state)], count);
    }
    let name = "nexus_network_bytes_total";
    out.family(name, "counter", "Bytes of connections of VMs in mode proxy.");
    out.sample(name, &[("direction", "sent")], core.sent_bytes);
    out.sample(name, &[("direction", "received")], core.received_bytes);
    counters.calls.write(&mut out);
    out.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_counted_by_tool_outcome_and_time() {
        let counters = Counters::default();
        let call = |tool: &'static str, outcome, us| {
            let took = Duration::from_micros(us);
            counters.calls.count(&Ended { tool: &tool.into(), outcome, took, bytes_in: 2, bytes_out: 3 });
        };
        call("vm_list", "ok", 100);
        call("vm_list", "ok", 101);
        call("vm_list", "forbidden", 300_000_000);
        call("run_command", "ok", 1_500_000);
        let core = Measures { vms: [("ready", 2)].into(), boots: 7, ..Measures::default() };
        let text = text(&counters, 1, 4, &core);
        for line in [
            r#"nexus_tool_calls_total{tool="vm_list",outcome="ok"} 2"#,
            r#"nexus_tool_calls_total{tool="vm_list",outcome="forbidden"} 1"#,
            r#"nexus_tool_call_duration_seconds_bucket{tool="vm_list",le="0.0001"} 1"#,
            r#"nexus_tool_call_duration_seconds_bucket{tool="vm_list",le="0.00025"} 2"#,
            r#"nexus_tool_call_duration_seconds_bucket{tool="vm_list",le="120"} 2"#,
            r#"nexus_tool_call_duration_seconds_bucket{tool="vm_list",le="+Inf"} 3"#,
            r#"nexus_tool_call_duration_seconds_count{tool="vm_list"} 3"#,
            r#"nexus_tool_call_duration_seconds_sum{tool="run_command"} 1.5"#,
            r#"nexus_call_bytes_total{direction="in"} 8"#,
            r#"nexus_vms{state="ready"} 2"#,
            "nexus_boots_total 7",
            "nexus_calls_under_way 1",
            "nexus_http_sessions 4",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
        }
        // Each family is described once, before its samples, and each sample belongs to one.
        let mut family = "";
        for line in text.lines() {
            if let Some(described) = line.strip_prefix("# TYPE ") {
                family = described.split(' ').next().unwrap();
                assert_eq!(text.matches(&format!("# TYPE {family} ")).count(), 1);
            }
            assert!(line.starts_with('#') || line.starts_with(family), "{line} of {family}");
        }
    }

    #[test]
    fn labels_cannot_break_the_text() {
        let mut out = Text::default();
        out.sample("x", &[("a", "b\"\n\\c")], 1);
        assert_eq!(out.0, "x{a=\"b\\\"\\n\\\\c\"} 1\n");
    }
}
