//! Names of tools in texts. The host has the guest's tools under other names than the guest.

use std::borrow::Cow;

use serde_json::Value;

use super::GUEST_PREFIX;
use crate::tools::GUEST_NAMES;

/// The words of a text that may be names of tools, and where they start, in bytes. All such names have an underscore, except words that are
/// also plain English. Words that are part of a path are left out.
pub fn words(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let is_of_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let mut from = 0;
    std::iter::from_fn(move || {
        let start = from + text[from..].find(is_of_name)?;
        let end = text[start..].find(|c| !is_of_name(c)).map_or(text.len(), |length| start + length);
        from = end;
        Some((start, end))
    })
    .filter(move |&(start, end)| {
        let is_of_path =
            text[..start].ends_with(['/', '.', '-', '=']) || text[end..].starts_with(['/', '-', '=']);
        text[start..end].contains('_') && !is_of_path
    })
    .map(move |(start, end)| (start, &text[start..end]))
}

/// Returns a text with the host's names of the guest's tools.
pub fn on_host(text: &str) -> Cow<'_, str> {
    renamed(text, |word| GUEST_NAMES.contains(&word).then(|| format!("{GUEST_PREFIX}{word}").into()))
}

/// Returns a text with the guest's own names of its tools.
pub fn in_guest(text: &str) -> Cow<'_, str> {
    renamed(text, |word| {
        let own = word.strip_prefix(GUEST_PREFIX).filter(|own| GUEST_NAMES.contains(own));
        own.map(Cow::Borrowed)
    })
}

/// Returns a text with other words in place of those for which there is one.
fn renamed<'a>(text: &'a str, other: impl Fn(&'a str) -> Option<Cow<'a, str>>) -> Cow<'a, str> {
    let mut out = String::new();
    let mut copied = 0;
    for (at, word) in words(text) {
        if let Some(name) = other(word) {
            out.push_str(&text[copied..at]);
            out.push_str(&name);
            copied = at + word.len();
        }
    }
    if copied == 0 {
        return text.into();
    }
    out.push_str(&text[copied..]);
    out.into()
}

/// Puts the host's names of the guest's tools into the descriptions of a schema.
pub(super) fn describe_on_host(schema: &mut Value) {
    match schema {
        Value::Object(members) => {
            // A member of that name has a schema, the word has a text.
            if let Some(Value::String(text)) = members.get_mut("description") {
                *text = on_host(text).into_owned();
            }
            members.values_mut().for_each(describe_on_host);
        }
        Value::Array(items) => items.iter_mut().for_each(describe_on_host),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_words_become_the_hosts_names() {
        for (text, expected) in [
            ("Then: command_output, `command_list`.", "Then: guest_command_output, `guest_command_list`."),
            ("guest_run_command and run_commands", "guest_run_command and run_commands"),
            ("its `command_id`; export the rest", "its `command_id`; export the rest"),
            ("/srv/file_read, vm_list", "/srv/file_read, vm_list"),
            ("", ""),
        ] {
            assert_eq!(on_host(text), expected);
        }
    }

    #[test]
    fn the_hosts_form_of_a_tool_names_the_hosts_tools_only() {
        fn own_names(value: &Value, found: &mut Vec<String>) {
            match value {
                Value::Object(members) => members.values().for_each(|value| own_names(value, found)),
                Value::Array(items) => items.iter().for_each(|value| own_names(value, found)),
                Value::String(text) => {
                    let own = words(text).map(|(_, word)| word).filter(|word| GUEST_NAMES.contains(word));
                    found.extend(own.map(str::to_owned));
                }
                Value::Null | Value::Bool(_) | Value::Number(_) => {}
            }
        }
        for info in crate::tools::guest_on_host() {
            let mut found = Vec::new();
            own_names(&info.description.clone().into(), &mut found);
            own_names(&info.input_schema.clone().into(), &mut found);
            own_names(&info.output_schema.clone().into(), &mut found);
            assert_eq!(found, Vec::<String>::new(), "{}", info.name);
        }
        // Inside of a VM they are named as they are there.
        let within = crate::tool::info::<crate::tools::command::RunCommand>();
        assert!(within.description.contains(" command_output"), "{}", within.description);
    }
}
