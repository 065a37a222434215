//! Reads the part of apt's configuration that downloads need. Source of the syntax: `apt.conf(5)`.

use std::collections::BTreeMap;
use std::path::Path;

use fs_err as fs;
use reqwest::Url;

use crate::asset::fetch::ProxyRules;

/// The largest configuration file that is read.
const MAX_FILE: u64 = 1 << 20;

/// Options by their lowercase name; the last value of each.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct AptConf {
    options: BTreeMap<String, String>,
}

/// Reads one of apt's files; `None` if it is missing or not a text file that apt could use.
pub(super) fn read_file(file: &Path) -> std::io::Result<Option<String>> {
    if !fs::metadata(file).is_ok_and(|m| m.is_file() && m.len() <= MAX_FILE) {
        return Ok(None);
    }
    Ok(Some(String::from_utf8_lossy(&fs::read(file)?).into_owned()))
}

impl AptConf {
    /// Reads `etc/apt/apt.conf.d/*` and `etc/apt/apt.conf` under `apt_root`. A file that cannot be read is skipped: apt
    /// itself would fail, but here only its proxy setting is lost.
    pub(crate) fn read(apt_root: &Path) -> Self {
        let mut conf = Self::default();
        let dir = apt_root.join("etc/apt/apt.conf.d");
        let mut parts: Vec<_> = fs::read_dir(&dir)
            .into_iter()
            .flatten()
            .filter_map(|e| e.ok()?.file_name().into_string().ok())
            .filter(|name| is_part(name))
            .collect();
        parts.sort();
        let files = parts.iter().map(|name| dir.join(name)).chain([apt_root.join("etc/apt/apt.conf")]);
        for file in files {
            match read_file(&file) {
                Ok(text) => conf.parse(&text.unwrap_or_default()),
                Err(error) => tracing::warn!(file = %file.display(), %error, "apt configuration left out"),
            }
        }
        conf
    }

    /// The value of an option, `Acquire::http::Proxy` for instance.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.options.get(&name.to_ascii_lowercase()).map(String::as_str)
    }

    /// Whether an option is on.
    pub(crate) fn is_on(&self, name: &str, default: bool) -> bool {
        self.get(name).and_then(truth).unwrap_or(default)
    }

    /// Whether a proxy is configured at all; if so, the proxy variables of the environment are ignored.
    pub(crate) fn has_proxy(&self) -> bool {
        self.options.keys().any(|name| is_of_proxies(name))
    }

    /// The proxy to use for a scheme and host.
    pub(crate) fn proxy(&self, scheme: &str, host: &str) -> Option<&str> {
        let schemes: &[&str] = if scheme == "https" { &["https", "http"] } else { &["http"] };
        schemes
            .iter()
            .find_map(|s| {
                self.get(&format!("Acquire::{s}::Proxy::{host}"))
                    .or_else(|| self.get(&format!("Acquire::{s}::Proxy")))
            })
            .filter(|p| !p.is_empty() && !p.eq_ignore_ascii_case("direct") && truth(p) != Some(false))
    }

    /// The proxy settings, in apt's own syntax.
    pub(crate) fn proxies(&self) -> String {
        let said = self.options.iter().filter(|(name, _)| is_of_proxies(name));
        said.map(|(name, value)| format!("{name} \"{value}\";\n")).collect()
    }

    /// Adds the text of one file. Anything unknown is ignored.
    fn parse(&mut self, text: &str) {
        let mut tokens = tokens(text).into_iter().peekable();
        let mut scopes: Vec<String> = Vec::new();
        let mut words: Vec<String> = Vec::new();
        while let Some(token) = tokens.next() {
            match token {
                Token::Word(word) => words.push(word),
                Token::Open => {
                    scopes.push(joined(&scopes, words.first().map_or("", String::as_str)));
                    words.clear();
                }
                Token::Close => {
                    scopes.pop();
                    words.clear();
                    // `};` is usual, and so is `}`.
                    tokens.next_if_eq(&Token::End);
                }
                Token::End => {
                    self.statement(&scopes, &words);
                    words.clear();
                }
            }
        }
    }

    fn statement(&mut self, scopes: &[String], words: &[String]) {
        match words {
            [clear, name] if clear.eq_ignore_ascii_case("#clear") => {
                let name = joined(scopes, name);
                let below = format!("{name}::");
                self.options.retain(|k, _| *k != name && !k.starts_with(&below));
            }
            // A lone value in braces is an element of a list, and none of the options used here is a list.
            [name, value] if !name.ends_with("::") => {
                self.options.insert(joined(scopes, name), value.clone());
            }
            _ => {}
        }
    }
}

impl ProxyRules for AptConf {
    fn proxy_for(&self, url: &Url) -> Option<Url> {
        let proxy = self.proxy(url.scheme(), url.host_str()?)?;
        Url::parse(proxy).or_else(|_| Url::parse(&format!("http://{proxy}"))).ok()
    }
}

fn is_of_proxies(name: &str) -> bool {
    ["acquire::http::proxy", "acquire::https::proxy"].iter().any(|option| name.starts_with(option))
}

/// Parses apt's words for yes and no.
pub(crate) fn truth(word: &str) -> Option<bool> {
    match word.trim().to_ascii_lowercase().as_str() {
        "yes" | "true" | "with" | "on" | "enable" | "1" => Some(true),
        "no" | "false" | "without" | "off" | "disable" | "0" => Some(false),
        _ => None,
    }
}

/// Whether apt reads a file of this name in `apt.conf.d`.
fn is_part(name: &str) -> bool {
    let stem = name.strip_suffix(".conf").unwrap_or(name);
    !stem.is_empty() && stem.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
}

fn joined(scopes: &[String], name: &str) -> String {
    let name = name.to_ascii_lowercase();
    match scopes.last() {
        Some(scope) if !scope.is_empty() => format!("{scope}::{name}"),
        _ => name,
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Token {
    Word(String),
    Open,
    Close,
    End,
}

fn tokens(text: &str) -> Vec<Token> {
    let mut out = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        if first.is_whitespace() {
            rest = rest.trim_start();
        } else if rest.starts_with("//") || (first == '#' && !is_directive(rest)) {
            rest = rest.split_once('\n').map_or("", |(_, after)| after);
        } else if let Some(comment) = rest.strip_prefix("/*") {
            rest = comment.split_once("*/").map_or("", |(_, after)| after);
        } else if let Some(quoted) = rest.strip_prefix('"') {
            let (word, after) = quoted.split_once('"').unwrap_or((quoted, ""));
            out.push(Token::Word(word.to_owned()));
            rest = after;
        } else if let Some(token) = match first {
            '{' => Some(Token::Open),
            '}' => Some(Token::Close),
            ';' => Some(Token::End),
            _ => None,
        } {
            out.push(token);
            rest = &rest[1..];
        } else {
            let end = rest.find(|c: char| c.is_whitespace() || "{};\"".contains(c)).unwrap_or(rest.len());
            out.push(Token::Word(rest[..end].to_owned()));
            rest = &rest[end..];
        }
    }
    out
}

fn is_directive(rest: &str) -> bool {
    rest.get(..6).is_some_and(|s| s.eq_ignore_ascii_case("#clear"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conf(text: &str) -> AptConf {
        let mut conf = AptConf::default();
        conf.parse(text);
        conf
    }

    #[test]
    fn both_ways_of_writing_an_option_are_read() {
        let flat =
            conf("Acquire::http::Proxy \"http://p:3128\"; # why\nAcquire::Check-Valid-Until \"false\";");
        let nested = conf(
            "/* all */ acquire { http { Proxy \"http://p:3128\"; } // one\n Check-Valid-Until false; };",
        );
        assert_eq!(flat, nested);
        assert_eq!(flat.get("Acquire::HTTP::proxy"), Some("http://p:3128"));
        assert!(!flat.is_on("Acquire::Check-Valid-Until", true));
        assert!(flat.is_on("Acquire::Check-Date", true));
    }

    #[test]
    fn proxies_are_chosen_as_apt_does() {
        let conf = conf(
            "Acquire { http::Proxy \"http://p:1\"; http::Proxy::inside.test \"DIRECT\"; https::Proxy::s.test \"http://q:2\"; };",
        );
        assert!(conf.has_proxy());
        let proxy = |url: &str| conf.proxy_for(&url.parse().unwrap()).map(String::from);
        assert_eq!(proxy("http://a.test/x").as_deref(), Some("http://p:1/"));
        assert_eq!(proxy("http://inside.test/x"), None);
        assert_eq!(proxy("https://s.test/").as_deref(), Some("http://q:2/"));
        assert_eq!(proxy("https://a.test/").as_deref(), Some("http://p:1/"));
        let none = AptConf::default();
        assert!(!none.has_proxy() && none.proxies().is_empty());
        let mut again = AptConf::default();
        again.parse(&conf.proxies());
        assert_eq!(again, conf);
        again.parse("Acquire::Check-Date false;");
        assert_eq!(again.proxies(), conf.proxies());
    }

    #[test]
    fn later_values_win_and_clear_clears() {
        let mut conf = conf("A::B \"1\"; A::B \"2\"; A::C::D \"3\"; L { \"x\"; \"y\"; }; A::L:: \"z\";");
        assert_eq!(conf.get("a::b"), Some("2"));
        conf.parse("#clear A::C;\nE \"5\";");
        assert_eq!((conf.get("A::C::D"), conf.get("E")), (None, Some("5")));
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_taken(text: String) {
            conf(&text);
        }
    }
}
