//! The small documents of a pipeline: lists of digests, and their signatures.

use std::collections::HashMap;

use super::{Job, listed};
use crate::asset::AssetError;
use crate::asset::debian::signature::{Keyring, MAX_SIGNED};
use crate::asset::fetch::{Fetcher, Want, shown};
use crate::asset::provider::{Check, Expect, Plan, ProviderProblem, Signed, address};
use crate::asset::stream::Sha256;
use crate::progress::Progress;

/// Documents by their address; for signed ones, the signed text.
pub(super) type Documents = HashMap<String, String>;

/// The digests that the documents state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Resolved {
    /// The expected digests of the downloaded bytes.
    pub(super) raw: Vec<Sha256>,
    /// The expected digests after decompression.
    pub(super) unpacked: Vec<Sha256>,
    /// Whether a signature covers one of them.
    pub(super) is_signed: bool,
}

/// Fetches the documents, checks their signatures, and extracts the digests.
pub(super) async fn resolve(
    fetcher: &Fetcher,
    job: &Job,
    plan: &Plan,
    progress: &Progress,
) -> Result<Resolved, AssetError> {
    let mut documents = Documents::new();
    if !plan.signed.is_empty() {
        let keyring = Keyring::of_keys(&job.provider.keys)?;
        if keyring.is_empty() {
            return Err(job.provider.failed(ProviderProblem::NoKey));
        }
        for Signed { document, signature } in &plan.signed {
            let (shown, bytes) = fetch(fetcher, document, progress).await?;
            let text = match signature {
                Some(signature) => {
                    let (_, signature) = fetch(fetcher, signature, progress).await?;
                    keyring.check_detached(&shown, &bytes, &signature, job.now)?;
                    String::from_utf8_lossy(&bytes).into_owned()
                }
                None => keyring.signed_text(&shown, &bytes, job.now)?,
            };
            documents.insert(document.clone(), text);
        }
    }
    for check in plan.raw.iter().chain(&plan.unpacked) {
        if let Expect::Listed { document, .. } = &check.expect
            && !documents.contains_key(document)
        {
            let (_, bytes) = fetch(fetcher, document, progress).await?;
            documents.insert(document.clone(), String::from_utf8_lossy(&bytes).into_owned());
        }
    }
    let digests = |checks: &[Check]| -> Result<Vec<Sha256>, AssetError> {
        let mut digests = Vec::new();
        for check in checks {
            let what = match &check.expect {
                Expect::Listed { document, .. } => address(document).map(|url| shown(&url))?,
                Expect::Known(_) | Expect::Given => String::new(),
            };
            digests.extend(listed(&check.expect, &what, &documents)?);
        }
        Ok(digests)
    };
    Ok(Resolved {
        raw: digests(&plan.raw)?,
        unpacked: digests(&plan.unpacked)?,
        // A row whose signed document provides no digest is refused when it is parsed.
        is_signed: !plan.signed.is_empty(),
    })
}

async fn fetch(fetcher: &Fetcher, url: &str, progress: &Progress) -> Result<(String, Vec<u8>), AssetError> {
    let url = address(url)?;
    let shown = shown(&url);
    let name = shown.rsplit('/').next().unwrap_or_default();
    progress.step(format!("downloading {name}"));
    let want = Want { url, size: None, sha256: None, max_bytes: MAX_SIGNED };
    Ok((shown, fetcher.to_memory(&want, progress).await?))
}

/// The digest of a file in a list in the format of sha256sum (plain, binary or tagged), or in a document that holds only
/// a digest. A name with two different digests has none.
pub(super) fn digest_in(text: &str, name: Option<&str>) -> Option<Sha256> {
    let mut only = text.split_whitespace();
    if let (Some(word), None) = (only.next(), only.next()) {
        return word.parse().ok();
    }
    let mut found = None;
    for line in text.lines() {
        let tagged = || {
            let (name, digest) = line.strip_prefix("SHA256 (")?.rsplit_once(") = ")?;
            Some((digest, name))
        };
        let plain = || {
            let (digest, rest) = line.split_once([' ', '\t'])?;
            Some((digest, rest.trim_start_matches([' ', '\t', '*']).trim_end()))
        };
        let Some((digest, listed)) = tagged().or_else(plain) else { continue };
        let listed = listed.strip_prefix("./").unwrap_or(listed);
        if name.is_none_or(|name| name == listed)
            && let Ok(digest) = digest.parse::<Sha256>()
        {
            match found {
                Some(other) if other != digest => return None,
                _ => found = Some(digest),
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_as_their_tools_write_them() {
        let (a, b) = (Sha256::of(b"a"), Sha256::of(b"b"));
        let lists = [
            format!("{a}  file\n{b}  other\n"),
            format!("{b} *other\n{a} *file\r\n"),
            format!("{a}  ./file\n{b}  x/file\n"),
            format!("SHA256 (other) = {b}\nSHA256 (file) = {a}\n"),
            format!("# comment\n\n{a}\tfile"),
            format!("{a}\n"),
        ];
        for list in &lists {
            assert_eq!(digest_in(list, Some("file")), Some(a), "{list}");
        }
        assert_eq!(digest_in(&format!("{a}  file\n"), None), Some(a));
        for bad in
            ["", "file", "xyz  file", &format!("{a}  file\n{b}  file\n"), &format!("{a}  files\n{b} x\n")]
        {
            assert_eq!(digest_in(bad, Some("file")), None, "{bad}");
        }
    }
}
