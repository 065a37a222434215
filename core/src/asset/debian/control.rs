//! Debian's control syntax: stanzas of fields, continued on lines that begin with a space. Source: `deb822(5)`.

/// One stanza.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Stanza {
    fields: Vec<(String, String)>,
}

impl Stanza {
    /// The value of a field, lines of a continued one separated by newlines.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v.as_str())
    }

    /// The words of a field.
    pub(crate) fn words(&self, name: &str) -> impl Iterator<Item = &str> {
        self.get(name).unwrap_or_default().split_whitespace()
    }
}

/// Parses stanzas. Lines that begin with `#` are comments; any line that is neither a field nor a continuation is an error.
pub(crate) fn stanzas(text: &str) -> Result<Vec<Stanza>, &'static str> {
    let mut all = Vec::new();
    let mut stanza = Stanza::default();
    for line in text.lines() {
        let line = line.trim_end();
        if line.starts_with('#') {
            continue;
        }
        if line.is_empty() {
            if !stanza.fields.is_empty() {
                all.push(std::mem::take(&mut stanza));
            }
        } else if line.starts_with([' ', '\t']) {
            let (_, value) = stanza.fields.last_mut().ok_or("a continued line continues nothing")?;
            value.push('\n');
            value.push_str(line.trim_start());
        } else {
            let (name, value) = line.split_once(':').ok_or("a line has no colon")?;
            if name.is_empty() || name.contains(char::is_whitespace) {
                return Err("a field's name is empty or has a space");
            }
            stanza.fields.push((name.to_owned(), value.trim_start().to_owned()));
        }
    }
    if !stanza.fields.is_empty() {
        all.push(stanza);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stanzas_have_comments_and_continued_lines() {
        let text = "# top\nTypes: deb\nURIs: a\n# between\n b\n\n\n\nSuites:\n x\n .\n y\n";
        let all = stanzas(text).unwrap();
        assert_eq!(all.len(), 2);
        assert_eq!(all[0].words("uris").collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(all[1].get("Suites"), Some("\nx\n.\ny"));
        assert!(stanzas("no colon here").is_err());
        assert!(stanzas(" continued").is_err());
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_parsed_or_refused(text: String) {
            let _ = stanzas(&text);
        }
    }
}
