//! The signed index of one suite. Source of the format: <https://wiki.debian.org/DebianRepository/Format>.

use std::collections::HashMap;

use crate::asset::debian::control::{self, Stanza};
use crate::asset::debian::signature::Seconds;
use crate::asset::error::IndexProblem;
use crate::asset::stream::{Compression, Sha256};

/// How far clocks may differ, in seconds.
const SKEW: Seconds = 600;

/// Suffixes of suites that only add to a distribution.
const ADDITIONS: [&str; 4] = ["-updates", "-security", "-proposed", "-backports"];

/// The fields of a `Release` file that matter here.
#[derive(Debug, Clone)]
pub(crate) struct Release {
    /// Whose packages these are.
    pub(crate) origin: String,
    /// The suite, such as `oldstable-security`.
    pub(crate) suite: String,
    /// The code name, such as `bookworm-security`.
    pub(crate) codename: String,
    /// The version of the distribution, such as `12.15`; unreleased ones have none.
    pub(crate) version: Option<String>,
    /// Whether its packages are installed only on request for this suite.
    pub(crate) not_automatic: bool,
    /// Whether files are also available by their hash.
    pub(crate) by_hash: bool,
    date: (Seconds, String),
    valid_until: Option<(Seconds, String)>,
    files: HashMap<String, Listed>,
}

/// A file whose hash is in the index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Listed {
    pub(crate) size: u64,
    pub(crate) sha256: Sha256,
}

impl Release {
    /// Parses the text, keeping what is listed under `/binary-{arch}/`.
    pub(crate) fn parse(text: &str, arch: &str) -> Result<Self, IndexProblem> {
        let stanza = control::stanzas(text)
            .map_err(|why| IndexProblem::Damaged(why.into()))?
            .into_iter()
            .next()
            .ok_or(IndexProblem::Field("Origin"))?;
        let text_of = |name| stanza.get(name).map(str::trim).unwrap_or_default().to_owned();
        let is = |name| stanza.get(name).is_some_and(|v| v.trim() == "yes");
        let date = time(&stanza, "Date")?.ok_or(IndexProblem::Field("Date"))?;
        let mut files = HashMap::new();
        let directory = format!("/binary-{arch}/");
        for line in stanza.get("SHA256").ok_or(IndexProblem::Field("SHA256"))?.lines() {
            let mut words = line.split_whitespace();
            let (Some(sha256), Some(size), Some(name)) = (words.next(), words.next(), words.next()) else {
                continue;
            };
            if name.contains(&directory) {
                let bad = || IndexProblem::Field("SHA256");
                let listed = Listed {
                    size: size.parse().map_err(|_| bad())?,
                    sha256: sha256.parse().map_err(|_| bad())?,
                };
                files.insert(name.to_owned(), listed);
            }
        }
        Ok(Self {
            origin: text_of("Origin"),
            suite: text_of("Suite"),
            codename: text_of("Codename"),
            version: stanza.get("Version").map(|v| v.trim().to_owned()),
            not_automatic: is("NotAutomatic"),
            by_hash: is("Acquire-By-Hash"),
            date,
            valid_until: time(&stanza, "Valid-Until")?,
            files,
        })
    }

    /// Checks that the index is neither expired nor from the future.
    pub(crate) fn check_time(
        &self,
        now: Seconds,
        check_valid_until: bool,
        check_date: bool,
    ) -> Result<(), IndexProblem> {
        if check_date && self.date.0 > now + SKEW {
            return Err(IndexProblem::FromTheFuture(self.date.1.clone()));
        }
        match &self.valid_until {
            Some((until, text)) if check_valid_until && *until < now => {
                Err(IndexProblem::Expired(text.clone()))
            }
            _ => Ok(()),
        }
    }

    /// The list of a component's packages: its path below the suite and how it is compressed.
    pub(crate) fn packages(&self, component: &str, arch: &str) -> Option<(String, Compression, Listed)> {
        [".xz", ".zst", ".gz", ""].into_iter().find_map(|extension| {
            let name = format!("{component}/binary-{arch}/Packages{extension}");
            let listed = *self.files.get(&name)?;
            Some((name, Compression::of_name(extension), listed))
        })
    }

    /// The code name without `-updates` and the like: the distribution's own.
    pub(crate) fn base_codename(&self) -> &str {
        let name = if self.codename.is_empty() { &self.suite } else { &self.codename };
        name.split(['-', '/']).next().unwrap_or(name)
    }

    /// Whether this is the distribution itself, not an addition to it.
    pub(crate) fn is_base(&self) -> bool {
        let name = if self.codename.is_empty() { &self.suite } else { &self.codename };
        // Ubuntu gives an addition the code name of its base; only the suite differs.
        let is_addition = ADDITIONS.iter().any(|ending| self.suite.ends_with(ending));
        self.base_codename() == name && !is_addition
    }
}

/// A field's time with its text.
fn time(stanza: &Stanza, name: &'static str) -> Result<Option<(Seconds, String)>, IndexProblem> {
    let Some(text) = stanza.get(name).map(str::trim) else { return Ok(None) };
    let bad = || IndexProblem::Field(name);
    // RFC 2822 with the zone spelt out, always UTC here.
    let numeric = match text.rsplit_once(' ').ok_or_else(bad)? {
        (time, "UTC" | "GMT" | "Z") => format!("{time} +0000"),
        _ => text.to_owned(),
    };
    let time = jiff::fmt::rfc2822::parse(&numeric).map_err(|_| bad())?.timestamp();
    Ok(Some((Seconds::try_from(time.as_second()).map_err(|_| bad())?, text.to_owned())))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "Origin: Debian\nLabel: Debian\nSuite: oldstable\nVersion: 12.15\nCodename: bookworm\n\
        Date: Sat, 11 Jul 2026 10:16:37 UTC\nValid-Until: Sat, 18 Jul 2026 10:16:37 UTC\nAcquire-By-Hash: yes\n\
        MD5Sum:\n 0ed6d4c8891eb86358b94bb35d9e4da4  7 main/binary-amd64/Packages.xz\nSHA256:\n \
        e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855        7 main/binary-amd64/Packages.gz\n \
        e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855        9 main/binary-amd64/Packages.xz\n \
        e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855        0 main/binary-arm64/Packages\n";

    #[test]
    fn a_release_is_parsed() {
        let release = Release::parse(TEXT, "amd64").unwrap();
        assert_eq!((release.origin.as_str(), release.base_codename()), ("Debian", "bookworm"));
        assert!(release.is_base() && release.by_hash && !release.not_automatic);
        let (name, compression, listed) = release.packages("main", "amd64").unwrap();
        assert_eq!(
            (name.as_str(), compression, listed.size),
            ("main/binary-amd64/Packages.xz", Compression::Xz, 9)
        );
        assert!(release.packages("main", "arm64").is_none());
        assert!(release.packages("contrib", "amd64").is_none());
    }

    #[test]
    fn additions_to_a_distribution_are_not_it() {
        for (suite, codename, is_base) in [
            ("noble", "noble", true),
            ("noble-updates", "noble", false),
            ("noble-security", "noble", false),
            ("noble-backports", "noble", false),
            ("stable", "bookworm", true),
            ("stable-updates", "bookworm-updates", false),
            ("oldstable-security", "bookworm-security", false),
        ] {
            let text = TEXT.replace("Suite: oldstable", &format!("Suite: {suite}"));
            let text = text.replace("Codename: bookworm", &format!("Codename: {codename}"));
            let release = Release::parse(&text, "amd64").unwrap();
            assert_eq!(release.is_base(), is_base, "{suite} {codename}");
        }
    }

    #[test]
    fn time_is_checked_where_that_is_wanted() {
        let release = Release::parse(TEXT, "amd64").unwrap();
        let made = 1_783_764_997;
        assert_eq!(release.date.0, made);
        release.check_time(made, true, true).unwrap();
        let week = 7 * 86400;
        assert!(matches!(release.check_time(made + week + 1, true, true), Err(IndexProblem::Expired(_))));
        release.check_time(made + week + 1, false, true).unwrap();
        assert!(matches!(release.check_time(made - 3600, true, true), Err(IndexProblem::FromTheFuture(_))));
        release.check_time(made - 3600, true, false).unwrap();
    }

    #[test]
    fn damaged_fields_are_refused() {
        for (from, to) in
            [("Date: Sat", "Date: Tomorrow"), ("SHA256:", "SHA1:"), ("b855        9", "b8        9")]
        {
            assert!(Release::parse(&TEXT.replace(from, to), "amd64").is_err(), "{from}");
        }
    }
}
