//! Trace context (W3C Trace Context, Level 1): which trace a call belongs to. In MCP it is in `_meta`, as `traceparent` and `tracestate`; commands
//! have it in the environment variables `TRACEPARENT` and `TRACESTATE`.

use serde::{Deserialize, Serialize};

/// The member of `_meta` with the ids of the trace and of the caller's span.
pub const PARENT: &str = "traceparent";
/// The member of `_meta` with what tracing systems add to it.
pub const STATE: &str = "tracestate";

/// The maximum length of a parent of a later version, in bytes.
const PARENT_MAX: usize = 128;
/// The maximum length of a state, in bytes; the specification asks to keep at least that much.
const STATE_MAX: usize = 512;
/// The maximum number of members of a state.
const MEMBERS_MAX: usize = 32;

/// The trace that a call belongs to. Its form was checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceContext {
    /// `00-TRACE-SPAN-FLAGS` in lowercase hexadecimal.
    #[serde(rename = "traceparent")]
    pub parent: String,
    /// `key=value` members, separated by commas.
    #[serde(default, rename = "tracestate", skip_serializing_if = "Option::is_none")]
    pub state: Option<String>,
}

impl TraceContext {
    /// The context of a call; `None` if the parent does not have its form. A state without its form is left out.
    pub fn checked(parent: &str, state: Option<&str>) -> Option<Self> {
        let state = state.filter(|state| is_state(state)).map(str::to_owned);
        is_parent(parent).then(|| Self { parent: parent.to_owned(), state })
    }

    /// The environment variables of a command that belongs to the trace.
    pub fn environment(&self) -> impl Iterator<Item = (&'static str, &str)> {
        let state = self.state.as_deref().map(|state| ("TRACESTATE", state));
        std::iter::once(("TRACEPARENT", self.parent.as_str())).chain(state)
    }
}

fn is_parent(text: &str) -> bool {
    let is_hex = |part: &str, length: usize| {
        part.len() == length && part.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    };
    let is_some = |part: &str| part.bytes().any(|b| b != b'0');
    let mut parts = text.splitn(5, '-');
    let (Some(version), Some(trace), Some(span), Some(flags)) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return false;
    };
    // Later versions may add parts, version 0 has none.
    let rest = parts.next();
    let is_printable = text.bytes().all(|b| b.is_ascii_graphic());
    text.len() <= PARENT_MAX
        && is_printable
        && is_hex(version, 2)
        && version != "ff"
        && (rest.is_none() || version != "00")
        && is_hex(trace, 32)
        && is_some(trace)
        && is_hex(span, 16)
        && is_some(span)
        && is_hex(flags, 2)
}

fn is_state(text: &str) -> bool {
    let is_member = |member: &str| {
        let member = member.trim_matches([' ', '\t']);
        let Some((key, value)) = member.split_once('=') else { return member.is_empty() };
        let is_key = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"_-*/@".contains(&b);
        !key.is_empty()
            && key.len() <= 256
            && key.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
            && key.bytes().all(is_key)
            && !value.is_empty()
            && value.bytes().all(|b| (0x20..=0x7e).contains(&b) && b != b'=')
    };
    !text.is_empty()
        && text.len() <= STATE_MAX
        && text.split(',').count() <= MEMBERS_MAX
        && text.split(',').all(is_member)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn only_the_form_of_the_specification_passes() {
        let passes = |parent: &str| TraceContext::checked(parent, None).is_some();
        assert!(
            passes(GOOD)
                && passes(&GOOD.replacen("00", "cc", 1))
                && passes(&format!("cc{}-what", &GOOD[2..]))
        );
        for bad in [
            String::new(),
            GOOD[1..].to_owned(),
            GOOD.to_uppercase(),
            format!("{GOOD}-x"),
            format!("{GOOD}\n"),
            GOOD.replacen("00", "ff", 1),
            GOOD.replace("0af7651916cd43dd8448eb211c80319c", &"0".repeat(32)),
            GOOD.replace("b7ad6b7169203331", &"0".repeat(16)),
            GOOD.replace('-', "_"),
            format!("cc{}-{}", &GOOD[2..], "x".repeat(200)),
        ] {
            assert!(!passes(&bad), "{bad}");
        }
    }

    #[test]
    fn a_bad_state_is_left_out() {
        let state = |text: &str| TraceContext::checked(GOOD, Some(text)).unwrap().state;
        for good in ["a=b", "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE", "a@b=c d, e=f", "a=b,"] {
            assert_eq!(state(good).as_deref(), Some(good));
        }
        for bad in [
            "",
            "a",
            "A=b",
            "a=",
            "=b",
            "a=b\nc",
            "a=\u{e9}",
            &"a=b,".repeat(40),
            &format!("a={}", "b".repeat(600)),
        ] {
            assert_eq!(state(bad), None, "{bad}");
        }
        let both = TraceContext::checked(GOOD, Some("a=b")).unwrap();
        assert_eq!(both.environment().collect::<Vec<_>>(), [("TRACEPARENT", GOOD), ("TRACESTATE", "a=b")]);
        let json = serde_json::to_value(&both).unwrap();
        assert_eq!(json, serde_json::json!({ "traceparent": GOOD, "tracestate": "a=b" }));
    }
}
