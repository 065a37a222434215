//! Which archives the host's apt uses. Source of the formats: `sources.list(5)`.

use std::path::{Path, PathBuf};

use fs_err as fs;
use reqwest::Url;

use crate::asset::debian::apt_conf::truth;
use crate::asset::debian::auth::Logins;
use crate::asset::debian::control::{self, Stanza};
use crate::asset::error::SourceProblem;
use crate::asset::{AssetError, fetch};

/// The largest configuration file that is read.
const MAX_FILE: u64 = 4 << 20;

/// One suite of one archive with binary packages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Where it is; several addresses are mirrors of each other.
    pub(crate) mirrors: Vec<Url>,
    /// The suite as configured, such as `bookworm-updates`.
    pub(crate) suite: String,
    /// The components.
    pub(crate) components: Vec<String>,
    /// Who may sign for it.
    pub(crate) signed_by: Option<SignedBy>,
    /// Whether an expired index is refused, if the entry says so.
    pub(crate) check_valid_until: Option<bool>,
    /// Whether an index from the future is refused, if the entry says so.
    pub(crate) check_date: Option<bool>,
}

impl Entry {
    /// The entry in a few words, for messages.
    pub(crate) fn shown(&self) -> String {
        let mirror = self.mirrors.first().map(fetch::shown).unwrap_or_default();
        format!("{} {}", mirror.trim_end_matches('/'), self.suite)
    }
}

/// Who may sign.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum SignedBy {
    /// The keys of these files, restricted to these fingerprints if there are any. No files means apt's own trusted keys.
    Keys { files: Vec<PathBuf>, fingerprints: Vec<String> },
    /// Keys written out in the entry itself, in ASCII armor.
    Embedded(String),
}

/// The usable entries, and what is wrong with the others.
#[derive(Debug, Default)]
pub(crate) struct Sources {
    pub(crate) entries: Vec<Entry>,
    pub(crate) problems: Vec<AssetError>,
}

/// Reads `etc/apt/sources.list` and `etc/apt/sources.list.d/` under `apt_root`, for packages of `arch`.
pub(crate) fn read(apt_root: &Path, arch: &'static str) -> Result<Sources, AssetError> {
    let doing = AssetError::io("read apt's sources");
    let etc = apt_root.join("etc/apt");
    let mut files = vec![etc.join("sources.list")];
    match fs::read_dir(etc.join("sources.list.d")) {
        Ok(dir) => {
            let mut parts = Vec::new();
            for entry in dir {
                parts.push(entry.map_err(&doing)?.path());
            }
            parts.sort();
            files.extend(parts);
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => return Err(doing(e)),
    }
    let logins = Logins::read(apt_root);
    let mut reader = Reader { apt_root, arch, logins, sources: Sources::default(), file: PathBuf::new() };
    for file in files {
        let deb822 = match file.extension().and_then(|e| e.to_str()) {
            Some("list") => false,
            Some("sources") => true,
            _ => continue,
        };
        let text = match read_small(&file) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
            Err(e) => return Err(doing(e)),
        };
        reader.file = file;
        if deb822 { reader.stanzas(&text) } else { reader.lines(&text) }
    }
    Ok(reader.sources)
}

/// Reads a text file, up to the maximum size of configuration files.
fn read_small(file: &Path) -> std::io::Result<String> {
    if fs::metadata(file)?.len() > MAX_FILE {
        return Err(std::io::ErrorKind::FileTooLarge.into());
    }
    Ok(String::from_utf8_lossy(&fs::read(file)?).into_owned())
}

struct Reader<'a> {
    apt_root: &'a Path,
    arch: &'static str,
    logins: Logins,
    sources: Sources,
    file: PathBuf,
}

/// The options that both formats have, by their name in stanzas.
#[derive(Debug, Clone, Default)]
struct Options {
    architectures: Vec<String>,
    signed_by: Option<SignedBy>,
    check_valid_until: Option<bool>,
    check_date: Option<bool>,
}

impl Reader<'_> {
    fn lines(&mut self, text: &str) {
        for line in text.lines() {
            let line = line.split('#').next().unwrap_or_default().trim();
            let Some((kind, rest)) = line.split_once(char::is_whitespace) else { continue };
            if kind == "deb" {
                let result = self.line(rest.trim_start());
                self.note(result, line);
            }
        }
    }

    /// Parses one line, after its `deb`.
    fn line(&mut self, mut rest: &str) -> Result<(), SourceProblem> {
        let mut options = Options::default();
        if let Some(after) = rest.strip_prefix('[') {
            let (text, after) = after.split_once(']').ok_or(SourceProblem::Malformed("[ without ]"))?;
            rest = after;
            for option in text.split_whitespace() {
                let (name, value) =
                    option.split_once('=').ok_or(SourceProblem::Malformed("an option without ="))?;
                match name.trim_end_matches(['+', '-']) {
                    "arch" => options.architectures = value.split(',').map(str::to_owned).collect(),
                    "signed-by" => options.signed_by = Some(self.keys(value.split(','))),
                    "check-valid-until" => options.check_valid_until = truth(value),
                    "check-date" => options.check_date = truth(value),
                    // `trusted=yes` is ignored like other options: nothing is trusted without a signature.
                    _ => {}
                }
            }
        }
        let mut words = rest.split_whitespace();
        let uri = words.next().ok_or(SourceProblem::Malformed("no address"))?;
        let suite = words.next().ok_or(SourceProblem::Malformed("no suite"))?;
        let components = words.map(str::to_owned).collect();
        self.entry(uri, suite, components, options)
    }

    fn stanzas(&mut self, text: &str) {
        let stanzas = match control::stanzas(text) {
            Ok(stanzas) => stanzas,
            Err(why) => return self.note(Err(SourceProblem::Malformed(why)), ""),
        };
        for stanza in stanzas {
            if stanza.get("Enabled").and_then(truth) == Some(false)
                || !stanza.words("Types").any(|t| t == "deb")
            {
                continue;
            }
            for uri in stanza.words("URIs") {
                for suite in stanza.words("Suites") {
                    let components = stanza.words("Components").map(str::to_owned).collect();
                    let options = self.options(&stanza);
                    let result = self.entry(uri, suite, components, options);
                    self.note(result, &format!("{uri} {suite}"));
                }
            }
        }
    }

    fn options(&self, stanza: &Stanza) -> Options {
        let signed_by = stanza.get("Signed-By").filter(|v| !v.trim().is_empty()).map(|value| {
            if value.contains("-----BEGIN PGP") {
                // A lone dot stands for an empty line, which would end the stanza.
                let lines = value.trim().lines().map(|l| if l == "." { "" } else { l });
                SignedBy::Embedded(lines.collect::<Vec<_>>().join("\n") + "\n")
            } else {
                self.keys(value.split([',', ' ', '\t', '\n']))
            }
        });
        Options {
            architectures: stanza.words("Architectures").map(str::to_owned).collect(),
            signed_by,
            check_valid_until: stanza.get("Check-Valid-Until").and_then(truth),
            check_date: stanza.get("Check-Date").and_then(truth),
        }
    }

    fn keys<'t>(&self, words: impl Iterator<Item = &'t str>) -> SignedBy {
        let (mut files, mut fingerprints) = (Vec::new(), Vec::new());
        for word in words.map(str::trim).filter(|w| !w.is_empty()) {
            match word.strip_prefix('/') {
                Some(path) => files.push(self.apt_root.join(path)),
                None => fingerprints.push(word.trim_end_matches('!').to_ascii_lowercase()),
            }
        }
        SignedBy::Keys { files, fingerprints }
    }

    fn entry(
        &mut self,
        uri: &str,
        suite: &str,
        components: Vec<String>,
        options: Options,
    ) -> Result<(), SourceProblem> {
        if suite.ends_with('/') {
            return Err(SourceProblem::Flat);
        }
        if !options.architectures.is_empty() && !options.architectures.iter().any(|a| a == self.arch) {
            return Err(SourceProblem::Architecture(self.arch));
        }
        if components.is_empty() {
            return Err(SourceProblem::Malformed("no component"));
        }
        let unsafe_word = |w: &str| {
            w.split('/').any(|part| part.is_empty() || part == "." || part == "..")
                || w.contains(['?', '#', '%'])
        };
        let suite = suite.replace("$(ARCH)", self.arch);
        if unsafe_word(&suite) || components.iter().any(|c| unsafe_word(c)) {
            return Err(SourceProblem::Malformed("a suite or component is no plain name"));
        }
        let entry = Entry {
            mirrors: self.mirrors(&uri.replace("$(ARCH)", self.arch))?,
            suite,
            components,
            signed_by: options.signed_by,
            check_valid_until: options.check_valid_until,
            check_date: options.check_date,
        };
        let same =
            self.sources.entries.iter_mut().find(|e| e.mirrors == entry.mirrors && e.suite == entry.suite);
        match same {
            Some(known) => {
                known.components.extend(entry.components);
                known.components.dedup();
            }
            None => self.sources.entries.push(entry),
        }
        Ok(())
    }

    /// The mirrors that one address stands for.
    fn mirrors(&self, uri: &str) -> Result<Vec<Url>, SourceProblem> {
        let (scheme, rest) =
            uri.split_once(':').ok_or(SourceProblem::Malformed("an address without a scheme"))?;
        match scheme {
            "http" | "https" => {
                let url = format!("{}/", uri.trim_end_matches('/'));
                let mut url =
                    Url::parse(&url).map_err(|_| SourceProblem::Malformed("an address that is none"))?;
                self.logins.apply(&mut url);
                Ok(vec![url])
            }
            "mirror+file" => {
                let path = rest.trim_start_matches('/');
                let text = read_small(&self.apt_root.join(path))
                    .map_err(|_| SourceProblem::Malformed("a list of mirrors that cannot be read"))?;
                let mut mirrors = Vec::new();
                for line in text.lines() {
                    let mut words = line.split('#').next().unwrap_or_default().split_whitespace();
                    let Some(uri) = words.next().filter(|u| u.starts_with("http")) else { continue };
                    let priority = words.find_map(|w| w.strip_prefix("priority:")?.parse::<u32>().ok());
                    mirrors.push((priority.unwrap_or(u32::MAX), self.mirrors(uri)?));
                }
                mirrors.sort_by_key(|(priority, _)| *priority);
                let mirrors: Vec<_> = mirrors.into_iter().flat_map(|(_, m)| m).collect();
                if mirrors.is_empty() {
                    return Err(SourceProblem::Malformed("a list of mirrors without one"));
                }
                Ok(mirrors)
            }
            other => Err(SourceProblem::Scheme(other.chars().take(20).collect())),
        }
    }

    fn note(&mut self, result: Result<(), SourceProblem>, what: &str) {
        if let Err(problem) = result {
            let source_entry = format!("{} in {}", what, self.file.display()).trim_start().to_owned();
            self.sources.problems.push(AssetError::Source { source_entry, problem });
        }
    }
}
