//! Lists what providers offer for download.

use nexus_schema::tools::asset::{AssetKind, AssetSummary};
use nexus_schema::{Arch, ErrorCode, ToolError};
use tokio::sync::OnceCell;

use super::asset::plan;
use super::kernel::{arch_of_version, asset_error, available_kernels, newest_of};
use super::release::available_releases;
use super::wanted::WantedAsset;
use super::{Provision, slug};
use crate::asset::AssetError;
use crate::asset::debian::Archive;
use crate::asset::provider::{Apt, Found, Provider};
use crate::op::store_error;
use crate::progress::Progress;
use crate::store::providers::{self, ProviderRow};

impl Provision {
    /// `asset_download` with `check`: what would be downloaded, and whether it is usable.
    pub(crate) async fn look_up(
        &self,
        wanted: WantedAsset,
        progress: &Progress,
    ) -> Result<AssetSummary, ToolError> {
        self.look_up_for(Arch::HOST, wanted, progress).await
    }

    /// The same; `arch` is the architecture of the distribution's kernel, unless its version says another one.
    pub(super) async fn look_up_for(
        &self,
        arch: Arch,
        wanted: WantedAsset,
        progress: &Progress,
    ) -> Result<AssetSummary, ToolError> {
        let order = self.order(&wanted).await?;
        if order.provider.apt().is_some() {
            if wanted.kind == AssetKind::Rootfs {
                return self.look_up_release(&order, progress).await;
            }
            progress.step("reading the package archive");
            let arch = arch_of_version(order.version.as_deref()).unwrap_or(arch);
            let kernels = available_kernels(&self.archive_for(arch, progress).await?).await?;
            let kernel = newest_of(&kernels, order.version.as_deref(), |kernel| &kernel.version).cloned();
            return kernel.ok_or_else(|| asset_error(AssetError::NoKernel { version: order.version }));
        }
        let found = self.found(&order, progress).await?;
        plan(&order)?;
        match found {
            Some(found) => available(&order.provider, wanted.kind, &found),
            None => {
                let given = order.given.values().next().cloned().unwrap_or_default();
                Err(ToolError::invalid(format!(
                    "provider {} has no versions to look up",
                    order.provider.name
                ))
                .hint(format!("download {given}: it is checked then")))
            }
        }
    }

    /// What providers offer for download, and why some of them could not be asked.
    pub(crate) async fn available(
        &self,
        kind: Option<AssetKind>,
    ) -> Result<(Vec<AssetSummary>, Vec<String>), ToolError> {
        let rows = self.store.read(providers::all).await.map_err(store_error)?;
        let (mut asked, mut problems) = (Vec::new(), Vec::new());
        for ProviderRow { name, spec, .. } in rows {
            match Provider::parse(&name, &spec) {
                // Without a kind there is no list either, and sources of kernels are no assets.
                Ok(provider) if provider.kinds().is_empty() || provider.has_sources() => {}
                Ok(provider) if kind.is_none_or(|kind| provider.may_have(kind)) => asked.push(provider),
                Ok(_) => {}
                Err(problem) => problems.push(format!("{name}: {problem}")),
            }
        }
        // Several providers use the archive, which is read only once.
        let archive = OnceCell::new();
        let asking = asked.iter().map(|provider| {
            let archive = &archive;
            async move {
                let result = match provider.apt() {
                    Some(apt) => {
                        let opened =
                            archive.get_or_init(|| async { self.archive(&Progress::default()).await });
                        match opened.await {
                            Ok(archive) => available_of_packages(provider, apt, kind, archive).await,
                            Err(error) => Err(error.clone()),
                        }
                    }
                    None => self.available_of(provider).await,
                };
                (provider.name.clone(), result)
            }
        });
        let mut all = Vec::new();
        let mut failed: Vec<(String, ToolError)> = Vec::new();
        for (name, result) in futures::future::join_all(asking).await {
            match result {
                Ok(some) => all.extend(some),
                Err(error) => failed.push((name.to_string(), error)),
            }
        }
        let unreached = match all.is_empty() {
            true => unreached(&mut failed),
            false => None,
        };
        problems.extend(unreached);
        problems.extend(told(failed));
        Ok((all, problems))
    }

    async fn available_of(&self, provider: &Provider) -> Result<Vec<AssetSummary>, ToolError> {
        let discovery = self.versions(provider, None, &Progress::default()).await?;
        let kind = provider.kind.unwrap_or(AssetKind::Kernel);
        discovery.found.iter().map(|found| available(provider, kind, found)).collect()
    }
}

/// If several providers are unreachable, the network is probably down: replaces their errors by a single problem.
fn unreached(failed: &mut Vec<(String, ToolError)>) -> Option<String> {
    let is_unreached = |(_, error): &&(String, ToolError)| error.code == ErrorCode::DownloadFailed;
    if failed.iter().filter(is_unreached).count() < 2 {
        return None;
    }
    let (_, first) = failed.iter().find(is_unreached)?;
    let hint = first.hint.as_ref().map(|hint| format!("\n{hint}")).unwrap_or_default();
    let cause = first.message.rsplit(": ").next().unwrap_or_default().to_owned();
    // A different error with the same cause, such as that no archive can be used, also counts.
    let is_one = |failed: &(String, ToolError)| is_unreached(&failed) || failed.1.message.ends_with(&cause);
    let (unreached, others): (Vec<_>, Vec<_>) = std::mem::take(failed).into_iter().partition(is_one);
    *failed = others;
    let names: Vec<&str> = unreached.iter().map(|(name, _)| name.as_str()).collect();
    Some(format!("offline: none of {} can be reached ({cause}){hint}", names.join(", ")))
}

/// One error per provider; each hint is shown once, after the last error that has it.
fn told(mut failed: Vec<(String, ToolError)>) -> Vec<String> {
    // Each cause is reported once.
    let mut seen: Vec<String> = Vec::new();
    failed.retain(|(_, error)| {
        let is_new = !seen.contains(&error.message);
        seen.push(error.message.clone());
        is_new
    });
    let last_with =
        |hint: &Option<String>| failed.iter().rposition(|(_, error)| error.hint == *hint).unwrap_or_default();
    let one = |(at, (name, error)): (usize, &(String, ToolError))| match &error.hint {
        Some(hint) if last_with(&error.hint) == at => {
            format!("{name}: {}: {}\n{hint}", error.code, error.message)
        }
        _ => format!("{name}: {}: {}", error.code, error.message),
    };
    failed.iter().enumerate().map(one).collect()
}

/// The versions available from the package archive.
async fn available_of_packages(
    provider: &Provider,
    apt: &Apt,
    kind: Option<AssetKind>,
    archive: &Archive,
) -> Result<Vec<AssetSummary>, ToolError> {
    let is_asked =
        |wanted| apt.take.iter().any(|take| take.kind() == wanted) && kind.is_none_or(|k| k == wanted);
    let mut all = Vec::new();
    if is_asked(AssetKind::Kernel) {
        all.extend(available_kernels(archive).await?);
    }
    if is_asked(AssetKind::Rootfs) {
        all.extend(available_releases(provider, archive)?);
    }
    Ok(all)
}

/// A version as it is listed before its download.
pub(super) fn available(
    provider: &Provider,
    kind: AssetKind,
    found: &Found,
) -> Result<AssetSummary, ToolError> {
    Ok(AssetSummary {
        id: None,
        name: slug(&format!("{}-", provider.name), &found.version, None)?,
        kind,
        provider: provider.name.to_string(),
        version: found.version.clone(),
        arch: Arch::HOST.as_str().into(),
        installed: false,
        default: false,
        sha256: None,
        size_bytes: found.size_bytes,
        verified: None,
        path: None,
        installed_at: None,
        drivers: provider.drivers(),
        unsuitable: provider.unsuitable(&found.version),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offline_is_said_once() {
        let down = |name: &str| {
            let error =
                ToolError::new(ErrorCode::DownloadFailed, format!("get https://{name}.example: no route"));
            (name.to_owned(), error.hint("check the network"))
        };
        let odd = ("odd".to_owned(), ToolError::new(ErrorCode::HostUnsuitable, "no apt"));
        let archive = ToolError::new(
            ErrorCode::HostUnsuitable,
            "no usable package archive configured in /etc/apt: get http://d.example: no route",
        );
        let mut failed = vec![down("a"), odd.clone(), ("debian".to_owned(), archive), down("b"), down("c")];
        assert_eq!(
            unreached(&mut failed).unwrap(),
            "offline: none of a, debian, b, c can be reached (no route)\ncheck the network"
        );
        assert_eq!(failed, std::slice::from_ref(&odd));
        // A single one may be down by itself.
        let mut failed = vec![down("a"), odd];
        assert_eq!((unreached(&mut failed), failed.len()), (None, 2));
    }

    #[test]
    fn the_same_advice_is_given_once() {
        let failed = |name: &str, hint: &str| {
            let error = ToolError::new(ErrorCode::DownloadFailed, format!("get {name}"));
            (name.to_owned(), if hint.is_empty() { error } else { error.hint(hint) })
        };
        let told = told(vec![failed("a", "wait"), failed("b", ""), failed("c", "look"), failed("d", "wait")]);
        let expected =
            ["a: download_failed: get a", "b: download_failed: get b", "c: download_failed: get c\nlook"];
        assert_eq!(told[..3], expected);
        assert_eq!(told[3], "d: download_failed: get d\nwait");
    }
}
