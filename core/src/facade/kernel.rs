//! The tools that build and publish kernels.

use std::path::PathBuf;

use nexus_schema::tools::OpOutcome;
use nexus_schema::tools::kernel::{KernelBuildParams, KernelBuilt, KernelPublishParams, KernelPublished};
use nexus_schema::{Arch, ToolError};

use super::provider::may_change;
use super::{CallContext, Nexus, patience};
use crate::asset::source;
use crate::provision::{BuiltKernel, WantedKernel};

/// The provider whose layout is published unless the caller names another.
const ANVIL: &str = "anvil";

impl Nexus {
    /// The tool `kernel_build`.
    pub async fn kernel_build(
        &self,
        ctx: &CallContext,
        params: KernelBuildParams,
    ) -> Result<OpOutcome<KernelBuilt>, ToolError> {
        may_change(ctx)?;
        let wait = patience(params.wait_s)?;
        let own = Arch::HOST;
        if let Some(arch) = params.arch.as_deref().filter(|arch| Arch::named(arch) != Some(own)) {
            return Err(ToolError::invalid(format!(
                "this host builds kernels for {own} only, not for {arch}"
            ))
            .hint("build it on a host of that architecture"));
        }
        let only_check = params.check.unwrap_or(false);
        let in_vm = params.in_vm.unwrap_or(false);
        let default = params.make_default.unwrap_or(false);
        if only_check && default {
            return Err(ToolError::invalid("check and make_default cannot be used together"));
        }
        let named = params.name.as_ref().map(|name| (name.to_string(), name.to_string()));
        let wanted = WantedKernel {
            version: params.version,
            from: params.from,
            config: params.config,
            name: params.name,
        };
        let id = self.shared.begin_op("kernel_build", ctx, named).await?;
        let (this, called) = (self.clone(), ctx.clone());
        self.shared.ops.run(id, move |progress| async move {
            let (shared, owner) = (&this.shared, &called.caller.owner);
            if only_check {
                let sources = shared.provision.kernel_sources(&wanted, &progress).await?;
                // A VM has all that it takes.
                let missing = if in_vm { Vec::new() } else { source::missing() };
                let ok = missing.is_empty() && sources.first().is_some_and(|source| source.problem.is_none());
                return Ok(KernelBuilt { ok, sources, missing, cached: false, asset: None, log: None });
            }
            let built = match in_vm {
                true => Box::pin(this.kernel_in_vm(&called, wanted, &progress)).await?,
                false => Box::pin(shared.provision.build_kernel(wanted, owner, &progress)).await?,
            };
            let BuiltKernel { asset, sources, cached, log } = built;
            if default {
                shared.make_default(&asset, owner).await?;
            }
            let chosen = shared.chosen().await?;
            Ok(KernelBuilt {
                ok: true,
                sources,
                missing: Vec::new(),
                cached,
                asset: Some(shared.asset_summary(asset, &chosen)),
                log: Some(log.display().to_string()),
            })
        });
        self.shared.ops.wait(ctx, id, wait).await
    }

    /// The tool `kernel_publish`.
    pub async fn kernel_publish(
        &self,
        ctx: &CallContext,
        params: KernelPublishParams,
    ) -> Result<OpOutcome<KernelPublished>, ToolError> {
        may_change(ctx)?;
        let wait = patience(params.wait_s)?;
        let directory = absolute("directory", params.directory)?;
        let key = absolute("key", params.key)?;
        let kernels = self.shared.provision.publishable(&params.kernels).await?;
        let provider = params.provider.unwrap_or_else(|| ANVIL.to_owned());
        let id = self.shared.begin_op("kernel_publish", ctx, None).await?;
        let shared = self.shared.clone();
        self.shared.ops.run(id, move |progress| async move {
            shared.provision.publish_kernels(kernels, &provider, directory, key, &progress).await
        });
        self.shared.ops.wait(ctx, id, wait).await
    }
}

/// A path of the host that does not depend on a working directory.
fn absolute(argument: &str, path: String) -> Result<PathBuf, ToolError> {
    let path = PathBuf::from(path);
    if path.is_absolute() {
        Ok(path)
    } else {
        Err(ToolError::invalid(format!("{argument}: not an absolute path")))
    }
}
