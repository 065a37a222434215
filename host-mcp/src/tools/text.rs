//! Formats the content of `structuredContent` as readable text, for clients that show the text.

use std::fmt::Write;

use serde_json::Value;

/// Writes a value as indented `key: value` lines, at most `max` characters.
pub(super) fn render(value: &Value, max: usize) -> String {
    let mut out = String::new();
    block(&mut out, value, 0);
    let text = out.trim_end();
    if text.chars().count() <= max {
        return text.to_owned();
    }
    let kept: String = text.chars().take(max.saturating_sub(80)).collect();
    format!("{kept}\n... (cut: ask for fewer rows with limit, or read structuredContent)")
}

/// Header and body of a text-first result: `text` is the body, the other facts are the header.
pub(super) fn text_first(value: &Value) -> (String, String) {
    let Value::Object(facts) = value else { return (String::new(), value.to_string()) };
    let body = facts.get("text").and_then(Value::as_str).unwrap_or_default().to_owned();
    let header: Vec<_> = facts
        .iter()
        .filter(|(key, _)| *key != "text")
        .map(|(key, value)| format!("{key} {}", scalar(value)))
        .collect();
    (format!("{} · {} B", header.join(" · "), body.len()), body)
}

fn block(out: &mut String, value: &Value, indent: usize) {
    match value {
        Value::Object(members) => {
            for (key, value) in members {
                pad(out, indent);
                member(out, key, value, indent);
            }
        }
        Value::Array(items) => items.iter().for_each(|value| item(out, value, indent)),
        other => {
            pad(out, indent);
            let _ = writeln!(out, "{}", scalar(other));
        }
    }
}

/// Writes `key: value`; the indent is already there.
fn member(out: &mut String, key: &str, value: &Value, indent: usize) {
    // Writing to a string cannot fail.
    let _ = match value {
        Value::Object(members) if members.is_empty() => writeln!(out, "{key}: none"),
        Value::Array(items) if items.is_empty() => writeln!(out, "{key}: none"),
        Value::Array(items) if items.iter().all(is_scalar) => {
            let items: Vec<_> = items.iter().map(scalar).collect();
            writeln!(out, "{key}: {}", items.join(", "))
        }
        Value::Object(_) => {
            let written = writeln!(out, "{key}:");
            block(out, value, indent + 2);
            written
        }
        Value::Array(_) => {
            let written = writeln!(out, "{key}:");
            block(out, value, indent);
            written
        }
        other => writeln!(out, "{key}: {}", scalar(other)),
    };
}

/// Writes `- ` and the value, with further lines indented.
fn item(out: &mut String, value: &Value, indent: usize) {
    pad(out, indent);
    match value {
        Value::Object(members) if !members.is_empty() => {
            for (at, (key, value)) in members.iter().enumerate() {
                if at == 0 {
                    out.push_str("- ");
                } else {
                    pad(out, indent + 2);
                }
                member(out, key, value, indent + 2);
            }
        }
        other => {
            let _ = writeln!(out, "- {}", scalar(other));
        }
    }
}

fn is_scalar(value: &Value) -> bool {
    !matches!(value, Value::Object(_) | Value::Array(_))
}

fn scalar(value: &Value) -> String {
    match value {
        Value::String(text) if text.contains('\n') => format!("|\n{}", text.trim_end()),
        Value::String(text) => text.clone(),
        Value::Null => "none".into(),
        Value::Bool(yes) => if *yes { "yes" } else { "no" }.into(),
        other => other.to_string(),
    }
}

fn pad(out: &mut String, indent: usize) {
    out.extend(std::iter::repeat_n(' ', indent));
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn facts_read_well() {
        let value = json!({
            "done": true,
            "result": {"name": "web-1", "tags": {}, "drives": [{"id": "x", "root": true}, {"id": "y", "root": false}]},
            "names": ["a", "b"],
        });
        let expected = "done: yes\nnames: a, b\nresult:\n  drives:\n  - id: x\n    root: yes\n  - id: y\n    root: no\n  name: web-1\n  tags: none";
        assert_eq!(render(&value, 1000), expected);
        assert!(render(&value, 100).chars().count() < 120);
    }

    #[test]
    fn a_text_is_the_body_and_the_rest_the_header() {
        let (header, body) = text_first(&json!({"cursor": "0:5", "lost_bytes": 0, "text": "hello\n"}));
        assert_eq!(header, "cursor 0:5 · lost_bytes 0 · 6 B");
        assert_eq!(body, "hello\n");
    }
}
