//! The hosts of package registries and forges that this host's own configuration names: of apt, pip, npm and cargo. The code names none.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use fs_err as fs;
use nexus_schema::network::NetworkRule;
use reqwest::Url;

use super::debian;

/// The largest configuration file that is read, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// Which values of a program's configuration are addresses of registries.
#[derive(Debug, Clone, Copy)]
enum Format {
    /// `index-url = URL` and the like in any section; a value may go on in indented lines.
    Pip,
    /// `registry=URL` and `@scope:registry=URL`.
    Npm,
    /// Every URL in a section whose name starts with `registries`, `registry` or `source`.
    Cargo,
}

impl Format {
    fn has(self, section: &str, key: &str) -> bool {
        match self {
            Self::Pip => ["index-url", "extra-index-url", "find-links"].contains(&key),
            Self::Npm => key == "registry" || key.ends_with(":registry"),
            Self::Cargo => ["registries", "registry", "source"]
                .iter()
                .any(|word| section.split('.').next().is_some_and(|first| first == *word)),
        }
    }
}

/// Returns the configuration files of a host whose files are below `root`, and of a user with this home.
fn files(root: &Path, home: Option<&Path>) -> Vec<(Format, PathBuf)> {
    let of_root = [(Format::Pip, "etc/pip.conf"), (Format::Npm, "etc/npmrc")];
    let of_home = [
        (Format::Pip, ".config/pip/pip.conf"),
        (Format::Pip, ".pip/pip.conf"),
        (Format::Npm, ".npmrc"),
        (Format::Cargo, ".cargo/config.toml"),
        (Format::Cargo, ".cargo/config"),
    ];
    let all = of_root.map(|(format, name)| (format, root.join(name))).into_iter();
    all.chain(of_home.into_iter().filter_map(|(format, name)| Some((format, home?.join(name))))).collect()
}

/// Returns the registries as entries of an allow list, each with its port, sorted. Files that cannot be read are left out.
pub(crate) fn registries(root: &Path, home: Option<&Path>) -> Vec<NetworkRule> {
    let mut urls = debian::mirrors(root).unwrap_or_else(|error| {
        tracing::warn!(%error, "apt's sources are not among the package registries");
        Vec::new()
    });
    for (format, file) in files(root, home) {
        match read(&file) {
            Ok(text) => urls.extend(addresses(format, &text)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => tracing::warn!(%error, "its package registries are left out"),
        }
    }
    let rules: BTreeSet<String> = urls.iter().filter_map(rule).map(|rule| rule.to_string()).collect();
    rules.iter().filter_map(|rule| rule.parse().ok()).collect()
}

fn read(file: &Path) -> std::io::Result<String> {
    if fs::metadata(file)?.len() > MAX_FILE {
        return Err(std::io::Error::new(
            std::io::ErrorKind::FileTooLarge,
            format!("{} is too large", file.display()),
        ));
    }
    Ok(String::from_utf8_lossy(&fs::read(file)?).into_owned())
}

fn rule(url: &Url) -> Option<NetworkRule> {
    let is_web = matches!(url.scheme(), "http" | "https");
    let host = url.host_str().filter(|_| is_web)?;
    NetworkRule::exact(host.trim_start_matches('[').trim_end_matches(']'), url.port_or_known_default()?)
}

/// Returns the addresses of registries in a configuration.
fn addresses(format: Format, text: &str) -> Vec<Url> {
    let mut urls = Vec::new();
    let (mut section, mut is_meant) = (String::new(), false);
    for line in text.lines() {
        let is_more = line.starts_with([' ', '\t']);
        let line = line.trim();
        if line.starts_with(['#', ';']) || line.is_empty() {
            continue;
        }
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.split(']').next()) {
            section = name.trim_matches(['[', '"', ' ']).to_owned();
            is_meant = false;
            continue;
        }
        let value = match line.split_once('=') {
            // Only pip has values that go on, and addresses may contain `=`.
            _ if is_more && is_meant && matches!(format, Format::Pip) => line,
            Some((key, value)) => {
                is_meant = format.has(&section, key.trim());
                value
            }
            None => continue,
        };
        if is_meant {
            urls.extend(value.split([' ', '\t', '"', '\'', ',']).filter_map(url));
        }
    }
    urls
}

/// Parses an address, with or without cargo's `sparse+`.
fn url(word: &str) -> Option<Url> {
    let word = word.split_once('+').filter(|(kind, _)| !kind.contains(':')).map_or(word, |(_, rest)| rest);
    word.contains("://").then(|| Url::parse(word).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(format: Format, text: &str) -> Vec<String> {
        addresses(format, text).iter().filter_map(rule).map(|rule| rule.to_string()).collect()
    }

    #[test]
    fn configurations_of_programs_are_read() {
        let pip = "[global]\nindex-url = https://index.example/simple?a=b\nextra-index-url =\n    https://one.example:8443/simple\n    \
                   http://two.example/simple\ntimeout = 60\n# index-url = https://no.example/\n[install]\nfind-links=https://links.example/ wheels\ntrusted-host = https://no.example\n";
        assert_eq!(
            shown(Format::Pip, pip),
            ["index.example:443", "one.example:8443", "two.example:80", "links.example:443"]
        );
        let npm = "registry=https://npm.example/\n@own:registry = \"https://own.example/npm/\"\n//npm.example/:_authToken=https://no.example/\nproxy=http://no.example\n";
        assert_eq!(shown(Format::Npm, npm), ["npm.example:443", "own.example:443"]);
        let cargo = "[build]\njobs = 2\nx = \"https://no.example\"\n[registries.own]\nindex = \"sparse+https://crates.example/index/\"\n\
                     [registries]\nother = { index = \"https://other.example:444/i\", x = 1 }\n[source.\"crates\"]\nreplace-with = 'mirror'\n\
                     [source.mirror]\nregistry = \"https://mirror.example/\"\n[net]\ny = \"https://no.example\"\n[source.forge]\ngit = \"https://forge.example/a.git\"\nlocal = \"file:///srv\"\nother = \"ssh://git@no.example/\"\n";
        assert_eq!(
            shown(Format::Cargo, cargo),
            ["crates.example:443", "other.example:444", "mirror.example:443", "forge.example:443"]
        );
        for format in [Format::Pip, Format::Npm, Format::Cargo] {
            assert!(shown(format, "[[[\n=\nregistry\n   https://x\n").is_empty());
        }
    }

    #[test]
    fn a_host_has_the_registries_of_its_own_programs() {
        let host = tempfile::tempdir().unwrap();
        let (root, home) = (host.path(), host.path().join("home/me"));
        assert!(registries(root, Some(&home)).is_empty());
        for (name, text) in [
            (
                "etc/apt/sources.list",
                "deb [signed-by=/k.gpg] http://archive.example/debian bookworm main\ndeb-src http://no.example/debian bookworm main\n",
            ),
            (
                "etc/apt/sources.list.d/more.sources",
                "Types: deb\nURIs: https://10.0.0.7:8080/apt https://archive.example/security\nSuites: bookworm\nComponents: main\n",
            ),
            ("etc/pip.conf", "[global]\nindex-url=https://pip.example/simple\n"),
            ("home/me/.npmrc", "registry=https://npm.example/\n"),
            ("home/me/.cargo/config.toml", "[source.x]\nregistry = \"https://npm.example/\"\n"),
        ] {
            let path = root.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let shown =
            |home| -> Vec<String> { registries(root, home).iter().map(ToString::to_string).collect() };
        assert_eq!(
            shown(Some(home.as_path())),
            [
                "10.0.0.7:8080",
                "archive.example:443",
                "archive.example:80",
                "npm.example:443",
                "pip.example:443"
            ]
        );
        assert_eq!(shown(None).len(), 4);
    }
}
