//! Kernels that are compiled in a VM instead of by the host's compiler.
//!
//! ```text
//! template kernel-builder ─> VM without a network <── source (verified), configuration
//!                                make ─> vmlinux ──> this host, which adds it to the assets as any other
//! ```
//! The VM of a build that did not end stays for a week, and a call for the same kernel goes on in it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use nexus_schema::id::{CommandId, VmKind};
use nexus_schema::network::NetworkMode;
use nexus_schema::stream::{TreeInOpening, TreeOutOpening};
use nexus_schema::tools::command::{
    CommandOutput, CommandOutputParams, CommandStart, CommandStartParams, CommandState,
};
use nexus_schema::tools::template::TemplateCreateParams;
use nexus_schema::tools::vm::{NetworkParams, VmCreateParams, VmState};
use nexus_schema::{ByteSize, ErrorCode, Name, Reference, TimeSpan, ToolError};
use nexus_tree::Packing;

use super::tree::{blocking, destination, filter};
use super::{CallContext, GuestHandle, Nexus};
use crate::asset::source::{
    BUILDER, COMPILE, CONFIG, CONFIGURE, IS_UNPACKED, KERNEL, LONGEST, MADE, SOURCE, needed,
};
use crate::context::Handle;
use crate::os::paths::GUEST_KERNELS;
use crate::progress::Progress;
use crate::provision::{BegunKernel, BuiltKernel, PendingKernel, WantedKernel, asset_error};
use crate::tree::{In, Out, Places};
use crate::vm::create::{self, start_and_wait, stop_and_wait};
use crate::vm::guest_call::{self, is_of_link};
use crate::vm::one_shot;

/// The template of the VMs, made from the host's package archive if there is none of this name.
const TEMPLATE: &str = "kernel-builder";
/// How much of a kernel's key is in names.
const KEY: usize = 12;
/// What the VM has: a configuration for microVMs takes a fraction of that, one of a distribution most of it.
const MEMORY: ByteSize = ByteSize::gib(2);
const DISK: ByteSize = ByteSize::gib(24);
const VCPUS_MAX: usize = 16;
/// How long the VM of a build that did not end stays.
const KEPT: TimeSpan = TimeSpan::seconds(7 * 86400);
/// How long it runs on without a command, such as after the end of the daemon that built in it.
const LEFT_ALONE: TimeSpan = TimeSpan::seconds(3600);
/// The maximum sizes of what comes out of it, in bytes.
const CONFIG_MAX: u64 = 4 << 20;
const KERNEL_MAX: u64 = 1 << 30;
/// How long one question for output waits for more, and how much of it one answer has, in bytes.
const WAIT: Duration = Duration::from_secs(20);
const PIECE: u32 = 32 << 10;
/// How long the guest has for an answer besides.
const SLACK: Duration = Duration::from_secs(15);
/// How long to wait until a guest that could not be asked is asked again.
const AGAIN: Duration = Duration::from_millis(300);

/// A place in a VM.
struct Builder {
    handle: Handle,
    vm: Reference<VmKind>,
    directory: String,
}

impl Nexus {
    /// `kernel_build` with `in_vm`: the kernel, which is built unless the same was built before.
    pub(super) async fn kernel_in_vm(
        &self,
        ctx: &CallContext,
        wanted: WantedKernel,
        progress: &Progress,
    ) -> Result<BuiltKernel, ToolError> {
        let provision = &self.shared.provision;
        let pending = match provision.begin_kernel(wanted, Vec::new, progress).await? {
            BegunKernel::Built(built) => return Ok(*built),
            BegunKernel::Pending(pending) => pending,
        };
        let file = self.compiled_in_vm(ctx, &pending).await?;
        provision.finish_kernel(*pending, file, &ctx.caller.owner).await
    }

    /// Compiles a kernel in a VM; returns its file on this host.
    async fn compiled_in_vm(&self, ctx: &CallContext, kernel: &PendingKernel) -> Result<PathBuf, ToolError> {
        let builder = Box::pin(self.builder(ctx, kernel)).await?;
        let cancelled = || ToolError::new(ErrorCode::Cancelled, "the build of the kernel was cancelled");
        let late = || ToolError::new(ErrorCode::Timeout, "the kernel is not compiled after 12 hours");
        let compiled = tokio::select! {
            compiled = Box::pin(self.compile_in(ctx, &builder, kernel)) => compiled,
            () = kernel.progress.cancelled() => Err(cancelled()),
            () = tokio::time::sleep(LONGEST) => Err(late().hint("call again to go on from there")),
        };
        if compiled.is_ok() {
            one_shot::delete(&builder.handle, "deleted: its kernel is built").await;
        } else {
            self.put_down(ctx, &builder).await;
        }
        compiled
    }

    /// Ends what runs in the VM of a build; what it has on its disk stays.
    async fn put_down(&self, ctx: &CallContext, builder: &Builder) {
        let (who, progress) = (&ctx.caller.owner, Progress::default());
        if let Err(error) = stop_and_wait(&builder.handle, who, false, None, &progress).await {
            tracing::warn!(vm = %builder.vm, %error, "cannot stop the VM in which a kernel was being built");
        }
    }

    /// The VM of a build, ready and without commands: that of an earlier call, or a new one.
    async fn builder(&self, ctx: &CallContext, kernel: &PendingKernel) -> Result<Builder, ToolError> {
        let (shared, who, progress) = (&self.shared, &ctx.caller.owner, &kernel.progress);
        let key: String = kernel.key.chars().take(KEY).collect();
        let name = name(&format!("kernel-{key}"))?;
        let vm = Reference::Name(name.clone());
        let builder = |handle| Builder { handle, vm: vm.clone(), directory: format!("{GUEST_KERNELS}{key}") };
        if let Ok(handle) = shared.vms.get(&ctx.caller, &vm) {
            progress.step("going on in the VM of an interrupted build");
            let state = {
                let view = handle.view.borrow();
                // What others prepare is not trusted to compile a kernel of this host.
                if *view.record.owner != **who {
                    let message = format!("the VM {vm} belongs to another caller ({})", view.record.owner);
                    return Err(ToolError::new(ErrorCode::NameTaken, message)
                        .hint("delete or rename it (vm_rename), then call again"));
                }
                view.record.state
            };
            if state.may_run() && state != VmState::Starting {
                stop_and_wait(&handle, who, false, None, progress).await?;
            }
            start_and_wait(&handle, who, None, progress).await?;
            return Ok(builder(handle));
        }
        self.make_template(ctx).await?;
        let vcpus = std::thread::available_parallelism().map_or(1, usize::from).min(VCPUS_MAX);
        let params = VmCreateParams {
            name: Some(name),
            from: Some(format!("template:{TEMPLATE}")),
            vcpus: u32::try_from(vcpus).ok(),
            memory: Some(MEMORY),
            disk: Some(DISK),
            network: Some(NetworkParams { mode: Some(NetworkMode::None), ..NetworkParams::default() }),
            ttl: Some(KEPT),
            idle_stop: Some(LEFT_ALONE),
            ..VmCreateParams::default()
        };
        let op = create::begin(shared, who, params).await?;
        shared.ops.join(op, progress).await?;
        Ok(builder(shared.vms.get(&ctx.caller, &vm)?))
    }

    /// Makes the template of the VMs, unless there is one.
    async fn make_template(&self, ctx: &CallContext) -> Result<(), ToolError> {
        let name = name(TEMPLATE)?;
        match self.shared.provision.template(&Reference::Name(name.clone())).await {
            Err(error) if error.code == ErrorCode::TemplateNotFound => {}
            found => return found.map(drop),
        }
        let params = TemplateCreateParams {
            name,
            source: "debian-minimal".to_owned(),
            overlays: BTreeMap::new(),
            services: BTreeMap::new(),
            packages: needed(),
            init: None,
            size: None,
            ttl: None,
            idle_stop: None,
            idle_action: None,
        };
        self.template_create(ctx, params).await.map(drop)
    }

    /// Brings source and configuration in, compiles, and brings the kernel out.
    async fn compile_in(
        &self,
        ctx: &CallContext,
        builder: &Builder,
        kernel: &PendingKernel,
    ) -> Result<PathBuf, ToolError> {
        let (work, progress) = (&kernel.work, &kernel.progress);
        work.put_config(&kernel.config).map_err(asset_error)?;
        progress.step("copying the source into the VM");
        self.bring(ctx, builder, kernel, CONFIG).await?;
        if !self.run_in(ctx, builder, IS_UNPACKED, progress).await? {
            self.bring(ctx, builder, kernel, SOURCE).await?;
        }
        progress.step("configuring in the VM");
        self.must_run(ctx, builder, "configuring the kernel", CONFIGURE, progress).await?;
        let made = self.fetch(ctx, builder, kernel, (MADE, CONFIG_MAX)).await?;
        let made = tokio::fs::read_to_string(&made).await;
        let made = made.map_err(|error| ToolError::internal(format!("read a configuration: {error}")))?;
        work.check_config(&kernel.config, &made).map_err(asset_error)?;
        progress.step("compiling in the VM");
        self.must_run(ctx, builder, "compiling the kernel", COMPILE, progress).await?;
        self.fetch(ctx, builder, kernel, (KERNEL, KERNEL_MAX)).await
    }

    /// Copies a file of the build's directory into the VM.
    async fn bring(
        &self,
        ctx: &CallContext,
        builder: &Builder,
        kernel: &PendingKernel,
        file: &str,
    ) -> Result<(), ToolError> {
        let from = place(kernel, file)?;
        let source = blocking(move || from.source()).await?;
        let opening = TreeInOpening {
            directory: builder.directory.clone(),
            top: file.to_owned(),
            make: true,
            fresh: false,
            user: None,
            arrival: None,
            own: false,
            same_owner: false,
            specials: false,
            track: None,
            resume: None,
        };
        let packing =
            Packing { top: file.as_bytes().to_vec(), filter: filter(&[], None)?, specials: false, from: 0 };
        let guest = self.shared.streams_of(&self.there(ctx, builder)?, ctx);
        In { source, packing, opening }.run(&guest, &kernel.progress).await.map(drop)
    }

    /// Copies a file out of the VM into the build's directory; returns where it is. With the maximum size, in bytes.
    async fn fetch(
        &self,
        ctx: &CallContext,
        builder: &Builder,
        kernel: &PendingKernel,
        (file, max): (&str, u64),
    ) -> Result<PathBuf, ToolError> {
        let to = place(kernel, file)?;
        let path = to.path.clone();
        let (into, top) = blocking(move || destination(to, true)).await?;
        let opening = TreeOutOpening {
            path: format!("{}/{file}", builder.directory),
            follow: false,
            top: top.clone(),
            user: None,
            exclude: Vec::new(),
            gitignore: false,
            specials: false,
            plan: false,
            part: None,
        };
        let guest = self.shared.streams_of(&self.there(ctx, builder)?, ctx);
        Out { opening, into, top }.run(&guest, &kernel.progress).await?;
        // It is read next: a link would lead to other files of this host.
        let came = tokio::fs::symlink_metadata(&path).await;
        if came.is_ok_and(|meta| meta.is_file() && meta.len() <= max) {
            return Ok(path);
        }
        let message = format!("{file} of the VM {} is no file, or has more than {max} bytes", builder.vm);
        Err(ToolError::new(ErrorCode::GuestMisbehaved, message))
    }

    fn there(&self, ctx: &CallContext, builder: &Builder) -> Result<GuestHandle, ToolError> {
        self.guest(&ctx.caller, &builder.vm)
    }

    async fn must_run(
        &self,
        ctx: &CallContext,
        builder: &Builder,
        doing: &str,
        line: &str,
        progress: &Progress,
    ) -> Result<(), ToolError> {
        if self.run_in(ctx, builder, line, progress).await? {
            return Ok(());
        }
        Err(ToolError::new(ErrorCode::ImageFailed, format!("{doing} in the VM {} failed", builder.vm))
            .hint("the log of the build has all that it said; call again to go on from there"))
    }

    /// Runs a shell line in the build's directory to its end, and logs what it says. Returns whether it succeeded.
    async fn run_in(
        &self,
        ctx: &CallContext,
        builder: &Builder,
        line: &str,
        progress: &Progress,
    ) -> Result<bool, ToolError> {
        let id = self.start_in(ctx, builder, line).await?;
        let vm = builder.vm.to_string();
        let (mut cursor, mut lines) = (None, 0);
        loop {
            let params = CommandOutputParams {
                cursor: cursor.clone(),
                wait_ms: u32::try_from(WAIT.as_millis()).ok(),
                limit: Some(PIECE),
                ..CommandOutputParams::of(id)
            };
            let asked = async {
                let link = self.there(ctx, builder)?.link;
                guest_call::call::<CommandOutput>(&link, &vm, &params, None, WAIT + SLACK).await
            };
            let said = match asked.await {
                Ok(said) => said,
                Err(error) if is_of_link(error.code) => {
                    tokio::time::sleep(AGAIN).await;
                    continue;
                }
                Err(error) => return Err(error),
            };
            for line in said.stream("stdout").lines() {
                progress.log(line);
                lines += 1;
            }
            progress.advance(lines, None);
            let facts = said.facts;
            if facts.state == CommandState::Lost {
                let message = format!("a command of the build in the VM {vm} was killed");
                return Err(ToolError::new(ErrorCode::ImageFailed, message).hint("call again to go on"));
            }
            if facts.state == CommandState::Ended && !facts.more {
                return Ok(facts.status == Some(0));
            }
            cursor = facts.cursor.or(cursor);
        }
    }

    async fn start_in(
        &self,
        ctx: &CallContext,
        builder: &Builder,
        line: &str,
    ) -> Result<CommandId, ToolError> {
        let vm = builder.vm.to_string();
        let params = CommandStartParams {
            command: Some(line.to_owned()),
            cwd: Some(builder.directory.clone()),
            env: BUILDER.map(|(name, value)| (name.to_owned(), value.to_owned())).into(),
            timeout_s: Some(0.0),
            merge: true,
            ..CommandStartParams::default()
        };
        let link = self.there(ctx, builder)?.link;
        let started = guest_call::call::<CommandStart>(&link, &vm, &params, None, SLACK).await?;
        let lost = || ToolError::new(ErrorCode::GuestMisbehaved, format!("{vm}: its command has no id"));
        started.facts.command_id.ok_or_else(lost)
    }
}

/// A file of the build's directory on this host.
fn place(kernel: &PendingKernel, file: &str) -> Result<crate::tree::HostPath, ToolError> {
    let directory = kernel.work.directory();
    let places = Places::new(&[directory.to_owned()], kernel.work.arrival());
    places.find(&directory.join(file).display().to_string())
}

fn name(text: &str) -> Result<Name, ToolError> {
    text.parse::<Name>().map_err(|error| ToolError::internal(format!("the name {text}: {error}")))
}
