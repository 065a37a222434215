//! Part files of incomplete downloads: the bytes, and the validator that the server sent for them.

use std::path::{Path, PathBuf};
use std::time::Duration;

use fs_err as fs;
use reqwest::header::HeaderValue;
use serde::{Deserialize, Serialize};

use super::Job;
use crate::asset::AssetError;
use crate::asset::stream::Sha256;

/// How long an abandoned part file is kept.
const KEPT: Duration = Duration::from_secs(7 * 86400);

/// The part file of one download; nothing if the download could not be resumed.
pub(super) struct Part {
    files: Option<(PathBuf, PathBuf)>,
    url: String,
}

/// The metadata of a part file.
#[derive(Serialize, Deserialize)]
struct Facts {
    url: String,
    validator: Option<String>,
}

impl Part {
    /// The part file for a job's download from an address.
    pub(super) fn of(job: &Job, url: &str, is_checked: bool) -> Result<Self, AssetError> {
        fs::create_dir_all(&job.parts).map_err(AssetError::io("make the directory of downloads"))?;
        // Mirrors serve the same file under different addresses.
        let identity = match &job.version {
            Some(version) => format!("{}\0{version}", job.provider.name),
            None => format!("{}\0{url}", job.provider.name),
        };
        let key = &Sha256::of(identity.as_bytes()).to_string()[..32];
        let files = (job.parts.join(format!("{key}.part")), job.parts.join(format!("{key}.json")));
        let part = Self { files: is_checked.then_some(files), url: url.to_owned() };
        Ok(part)
    }

    /// The file with the bytes.
    pub(super) fn file(&self) -> Option<PathBuf> {
        self.files.as_ref().map(|(file, _)| file.clone())
    }

    /// How many bytes can be resumed from, and their validator. Resuming requires a digest of the whole file or a validator
    /// of the same server.
    pub(super) fn have(&self, digest_known: bool) -> (u64, Option<HeaderValue>) {
        let Some((file, facts)) = &self.files else { return (0, None) };
        let length = fs::metadata(file).map_or(0, |meta| meta.len());
        let facts = fs::read(facts).ok().and_then(|json| serde_json::from_slice::<Facts>(&json).ok());
        let same = facts.filter(|facts| facts.url == self.url);
        let validator = same.and_then(|facts| HeaderValue::try_from(facts.validator?).ok());
        if digest_known || validator.is_some() { (length, validator) } else { (0, None) }
    }

    /// A callback that saves the validator.
    pub(super) fn on_head(&self) -> Option<crate::asset::fetch::OnHead> {
        let (_, path) = self.files.clone()?;
        let url = self.url.clone();
        Some(Box::new(move |validator| {
            let validator = validator.and_then(|value| value.to_str().ok()).map(str::to_owned);
            let written = serde_json::to_vec(&Facts { url: url.clone(), validator })
                .map_err(std::io::Error::from)
                .and_then(|json| fs::write(&path, json));
            if let Err(error) = written {
                tracing::debug!(%error, "a download could not be made resumable");
            }
        }))
    }

    /// Removes the part file.
    pub(super) fn remove(&self) -> Result<(), AssetError> {
        let doing = AssetError::io("remove a part of a download");
        for file in self.files.iter().flat_map(|(part, facts)| [part, facts]) {
            match fs::remove_file(file) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(doing(e)),
                _ => {}
            }
        }
        Ok(())
    }
}

/// Removes part files that were abandoned for days, and files that are not part files.
pub(crate) fn sweep(parts: &Path) -> std::io::Result<()> {
    if !parts.exists() {
        return Ok(());
    }
    for entry in fs::read_dir(parts)? {
        let path = entry?.path();
        let is_of_part = matches!(path.extension().and_then(|e| e.to_str()), Some("part" | "json"));
        let age = fs::metadata(&path)?.modified()?.elapsed().unwrap_or_default();
        if !is_of_part || age > KEPT {
            tracing::info!(path = %path.display(), "removing an old part of a download");
            fs::remove_file(path)?;
        }
    }
    Ok(())
}
