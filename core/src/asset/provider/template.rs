//! Strings with placeholders: `{mirror}/v{version}/vmlinux-{arch}.xz`.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// The values that templates are filled with, by name.
pub(crate) type Values = BTreeMap<String, String>;

/// A string with placeholders.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct Template {
    text: String,
    parts: Vec<Part>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Text(String),
    Value(String),
}

/// The string is not a valid template.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` has an unmatched brace or an empty placeholder")]
pub(crate) struct NotATemplate(String);

impl TryFrom<String> for Template {
    type Error = NotATemplate;

    fn try_from(text: String) -> Result<Self, NotATemplate> {
        let mut parts = Vec::new();
        let mut rest = text.as_str();
        while let Some(at) = rest.find(['{', '}']) {
            let (before, from) = rest.split_at(at);
            let name = from.strip_prefix('{').and_then(|from| from.split_once('}'));
            let is_name =
                |name: &str| !name.is_empty() && name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
            match name {
                Some((name, after)) if is_name(name) => {
                    parts.push(Part::Text(before.to_owned()));
                    parts.push(Part::Value(name.to_owned()));
                    rest = after;
                }
                _ => return Err(NotATemplate(text)),
            }
        }
        parts.push(Part::Text(rest.to_owned()));
        Ok(Self { text, parts })
    }
}

impl From<Template> for String {
    fn from(template: Template) -> Self {
        template.text
    }
}

impl fmt::Display for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Template {
    /// The names of its placeholders.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.parts.iter().filter_map(|part| match part {
            Part::Value(name) => Some(name.as_str()),
            Part::Text(_) => None,
        })
    }

    /// The string with its values. A placeholder without a value is left empty; rows are checked for that when they are parsed.
    pub(crate) fn fill(&self, values: &Values) -> String {
        self.parts
            .iter()
            .map(|part| match part {
                Part::Text(text) => text.as_str(),
                Part::Value(name) => values.get(name).map_or("", String::as_str),
            })
            .collect()
    }

    /// The string between the text before `{name}` and the text after it, if `text` matches the template.
    pub(crate) fn find(&self, name: &str, values: &Values, text: &str) -> Option<String> {
        let at = self.parts.iter().position(|part| matches!(part, Part::Value(n) if n == name))?;
        let fill = |parts: &[Part]| Self { text: String::new(), parts: parts.to_vec() }.fill(values);
        let (before, after) = (fill(&self.parts[..at]), fill(&self.parts[at + 1..]));
        Some(text.strip_prefix(&before)?.strip_suffix(&after)?.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(text: &str) -> Template {
        text.to_owned().try_into().unwrap()
    }

    #[test]
    fn places_are_filled_and_found() {
        let values = Values::from([("a".into(), "1".into()), ("b_c".into(), "2".into())]);
        let t = template("x{a}y{b_c}{a}");
        assert_eq!(t.fill(&values), "x1y21");
        assert_eq!(t.names().collect::<Vec<_>>(), ["a", "b_c", "a"]);
        assert_eq!(String::from(t), "x{a}y{b_c}{a}");
        assert_eq!(template("v{version}").find("version", &values, "v1.2").as_deref(), Some("1.2"));
        assert_eq!(template("v{version}").find("version", &values, "1.2"), None);
    }

    #[test]
    fn unbalanced_braces_are_refused() {
        for bad in ["{", "}", "{}", "a{b", "a}b", "{A}", "{a{b}}", "{a b}"] {
            assert!(Template::try_from(bad.to_owned()).is_err(), "{bad}");
        }
    }
}
