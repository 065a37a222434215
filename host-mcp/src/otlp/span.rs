//! Calls as spans, in the JSON form of OTLP: ids are hexadecimal, and numbers of 64 bits are texts.

use std::time::{Duration, SystemTime};

use nexus_schema::TraceContext;
use serde_json::{Value, json};

use super::Call;

/// The kind of a span that serves a request.
const SERVER: u8 = 2;
/// The status of a span that failed.
const FAILED: u8 = 2;
/// The last bit of a trace's flags: its spans are wanted.
const SAMPLED: u8 = 1;

/// The ids of a caller's trace and span, and whether spans are wanted.
fn parent(trace: &TraceContext) -> Option<(&str, &str, bool)> {
    let mut parts = trace.parent.split('-').skip(1);
    let (id, span, flags) = (parts.next()?, parts.next()?, parts.next()?);
    let flags = u8::from_str_radix(flags.get(..2)?, 16).ok()?;
    Some((id, span, flags & SAMPLED != 0))
}

/// Whether the caller of a trace wants its spans.
pub(super) fn is_sampled(trace: &TraceContext) -> bool {
    parent(trace).is_none_or(|(_, _, is_sampled)| is_sampled)
}

/// A request for export.
pub(super) fn request(calls: &[Call]) -> String {
    let spans: Vec<Value> = calls.iter().map(span).collect();
    json!({ "resourceSpans": [{
        "resource": { "attributes": [text("service.name", "nexusd"), text("service.version", env!("CARGO_PKG_VERSION"))] },
        "scopeSpans": [{ "scope": { "name": "nexus", "version": env!("CARGO_PKG_VERSION") }, "spans": spans }],
    }] })
    .to_string()
}

fn span(call: &Call) -> Value {
    let Call { record, started } = call;
    let trace = record.trace.as_deref();
    let found = trace.and_then(parent);
    let start = started.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let mut attributes = vec![
        text("gen_ai.operation.name", "execute_tool"),
        text("gen_ai.tool.name", &record.tool),
        text("nexus.caller", &record.owner),
        text("nexus.outcome", record.outcome),
        text("nexus.rule", record.rule),
        number("nexus.bytes_in", record.bytes_in),
        number("nexus.bytes_out", record.bytes_out),
    ];
    attributes.extend(record.vm.map(|vm| text("nexus.vm.id", &vm.to_string())));
    attributes.extend(record.boot.map(|boot| text("nexus.boot.id", &boot.to_string())));
    let mut span = json!({
        "traceId": found.map_or_else(random::<16>, |(id, _, _)| id.to_owned()),
        "spanId": random::<8>(),
        "name": record.tool,
        "kind": SERVER,
        "startTimeUnixNano": nanos(start),
        "endTimeUnixNano": nanos(start + record.duration),
        "attributes": attributes,
    });
    if let Some((_, parent, _)) = found {
        span["parentSpanId"] = parent.into();
    }
    if let Some(state) = trace.and_then(|trace| trace.state.as_deref()) {
        span["traceState"] = state.into();
    }
    if record.outcome != "ok" {
        span["status"] = json!({ "code": FAILED, "message": record.outcome });
    }
    span
}

fn text(key: &str, value: &str) -> Value {
    json!({ "key": key, "value": { "stringValue": value } })
}

fn number(key: &str, value: u64) -> Value {
    json!({ "key": key, "value": { "intValue": value.to_string() } })
}

fn nanos(time: Duration) -> String {
    time.as_nanos().to_string()
}

/// A new id of so many bytes, in hexadecimal; not all zeros.
fn random<const N: usize>() -> String {
    let mut bytes = [0_u8; N];
    let filled = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    if filled.is_err() || bytes == [0; N] {
        bytes = [1; N];
    }
    data_encoding::HEXLOWER.encode(&bytes)
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::Arc;

    use nexus_core::CallRecord;
    use nexus_schema::Timestamp;

    use super::*;

    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

    /// A call; with the flags of its trace, if it belongs to one.
    pub(crate) fn call(flags: Option<&str>) -> Call {
        let trace = flags.map(|flags| {
            let parent = format!("00-{TRACE}-00f067aa0ba902b7-{flags}");
            Arc::new(TraceContext::checked(&parent, Some("a=b")).unwrap())
        });
        let record = CallRecord {
            started: Timestamp::from_millis(1),
            owner: "uid:0".into(),
            tool: "vm_list".into(),
            vm: None,
            boot: None,
            duration: Duration::from_nanos(2_000_000_001),
            outcome: "ok",
            rule: "owner",
            denied: false,
            trace,
            bytes_in: 7,
            bytes_out: 8,
        };
        Call { record, started: SystemTime::UNIX_EPOCH + Duration::from_nanos(1_000_000_000_000_000_001) }
    }

    #[test]
    fn a_span_continues_the_trace_of_its_call() {
        let sent: Value = serde_json::from_str(&request(&[call(Some("01")), call(None)])).unwrap();
        let spans = &sent["resourceSpans"][0]["scopeSpans"][0]["spans"];
        let (of_trace, alone) = (&spans[0], &spans[1]);
        assert_eq!(
            (&of_trace["traceId"], &of_trace["parentSpanId"]),
            (&json!(TRACE), &json!("00f067aa0ba902b7"))
        );
        assert_eq!((&of_trace["traceState"], of_trace.get("status")), (&json!("a=b"), None));
        assert_eq!(of_trace["startTimeUnixNano"], "1000000000000000001");
        assert_eq!(of_trace["endTimeUnixNano"], "1000000002000000002");
        assert_eq!(
            (alone["traceId"].as_str().unwrap().len(), alone["spanId"].as_str().unwrap().len()),
            (32, 16)
        );
        assert!(alone.get("parentSpanId").is_none() && alone["traceId"] != TRACE);
        let attributes = of_trace["attributes"].as_array().unwrap();
        assert!(attributes.contains(&json!({ "key": "nexus.bytes_in", "value": { "intValue": "7" } })));
    }

    #[test]
    fn the_caller_says_whether_it_wants_spans() {
        let is = |flags| is_sampled(call(Some(flags)).record.trace.as_deref().unwrap());
        assert_eq!([is("00"), is("01"), is("03"), is("02")], [false, true, true, false]);
    }

    #[test]
    fn a_failure_is_a_status() {
        let mut failed = call(None);
        failed.record.outcome = "vm_not_found";
        assert_eq!(span(&failed)["status"], json!({ "code": 2, "message": "vm_not_found" }));
    }
}
