//! The command line.

use std::path::PathBuf;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Parser, Subcommand};
use serde::de::DeserializeOwned;

use super::{
    asset, audit, build, call, checkpoint, completion, cp, drive, events, exec, firewall, forward, guest,
    image, kernel, launch, man, mcp, network, op, provider, prune, run, settings, shell, template, token, vm,
};
use crate::ctl::list::Paging;

/// microVMs for AI agents: the command line of the Nexus daemon
#[derive(Debug, Parser)]
#[command(
    name = "nexusctl",
    version,
    propagate_version = false,
    infer_subcommands = false,
    max_term_width = 100
)]
pub(crate) struct Cli {
    /// The daemon's Unix socket [default: $NEXUS_SOCKET, else nexus.sock in the runtime directory]
    #[arg(long, global = true, value_name = "PATH", help_heading = "Global options")]
    pub(crate) socket: Option<PathBuf>,
    /// Print the structured result as JSON
    #[arg(long, global = true, help_heading = "Global options", conflicts_with = "quiet")]
    pub(crate) json: bool,
    /// Print ids only
    #[arg(short, long, global = true, help_heading = "Global options")]
    pub(crate) quiet: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Virtual machines
    #[command(subcommand)]
    Vm(vm::Command),
    /// Commands and files inside a VM
    #[command(subcommand)]
    Guest(guest::Command),
    /// Images that VMs are created from
    #[command(subcommand)]
    Image(image::Command),
    /// Blueprints of images
    #[command(subcommand)]
    Template(template::Command),
    /// Builds of templates
    #[command(subcommand)]
    Build(build::Command),
    /// Disks that VMs start from or keep their data on
    #[command(subcommand, aliases = ["drives", "dr", "ws"])]
    Drive(drive::Command),
    /// A VM's memory and drives at one moment
    #[command(subcommand, alias = "checkpoints")]
    Checkpoint(checkpoint::Command),
    /// Kernels and other verified files
    #[command(subcommand)]
    Asset(asset::Command),
    /// Kernels: `asset` for this kind, and kernels of your own: checked, built, published
    #[command(subcommand)]
    Kernel(kernel::Command),
    /// Root filesystems: `asset` for this kind
    #[command(subcommand)]
    Rootfs(asset::OfKind),
    /// Firecracker's programs: `asset` for this kind
    #[command(subcommand, visible_alias = "vmm")]
    Firecracker(asset::OfKind),
    /// Where assets come from
    #[command(subcommand, alias = "providers")]
    Provider(provider::Command),
    /// Network access of VMs
    #[command(subcommand, alias = "networks")]
    Network(network::Command),
    /// Open the host's firewall (Docker, UFW, firewalld, nftables) for VMs with network nat (root's daemon only)
    SetupFirewall(firewall::Args),
    /// Long operations
    #[command(subcommand)]
    Op(op::Command),
    /// The defaults for new VMs
    #[command(subcommand)]
    Settings(settings::Command),
    /// Remove unused images, caches and leftovers
    Prune(prune::Args),
    /// Access tokens: limited rights to hand out
    #[command(subcommand, alias = "tokens")]
    Token(token::Command),
    /// List who called what; with -f as it happens
    Audit(audit::Args),
    /// List what happened to VMs, operations and commands; with -f as it happens
    #[command(alias = "event")]
    Events(events::Args),
    /// Check what this host can run and what it lacks
    Doctor,
    /// Show a summary of the daemon's state
    Status,
    /// Call any tool with raw JSON arguments
    Call(call::Args),
    /// Bridge an MCP client's stdio to the daemon, or print a client's configuration
    #[command(alias = "mcp-bridge")]
    Mcp(mcp::Args),
    /// Print a completion script for a shell
    Completion(completion::Args),
    /// Write the manual pages of nexusctl into a directory, for packages
    #[command(hide = true)]
    Man(man::Args),
    /// Show the versions of nexusctl and the daemon
    Version,
    /// Run one command in a new VM and delete the VM, like `docker run --rm`: `nexusctl run debian -- uname -a`
    Run(Box<run::Args>),
    /// Run a command in a VM, like `docker exec`: `nexusctl exec -it web-1 bash`
    Exec(Box<exec::Args>),
    /// Open a login shell in a VM; ctrl-p ctrl-q detaches from it, `--attach ID` reattaches
    Shell(shell::Args),
    /// Forward ports of this host to ports in a VM, until ctrl-c: `nexusctl forward web-1 8080:80`
    Forward(forward::Args),
    /// Copy files between this host and a VM, like `docker cp`: `nexusctl cp ./site web-1:/srv/`
    Cp(cp::Args),
    /// List running VMs; with -a all
    Ps(vm::PsArgs),
    /// List VMs: the same as `vm list`
    Ls(vm::ListArgs),
    /// Start VMs: the same as `vm start`
    Start(vm::StartArgs),
    /// Shut VMs down: the same as `vm stop`
    Stop(vm::StopArgs),
    /// Shut VMs down and start them again: the same as `vm restart`
    Restart(vm::StopArgs),
    /// Pause VMs: the same as `vm pause`
    Pause(vm::SuspendArgs),
    /// Resume paused VMs: the same as `vm resume`
    Resume(vm::PauseArgs),
    /// Wait for a VM, a port or a file in it, or a command's end: the same as `vm wait`
    Wait(vm::WaitArgs),
    /// Cut the power of VMs: the same as `vm kill`
    Kill(vm::KillArgs),
    /// Delete VMs with their drives: the same as `vm delete`
    Rm(vm::DeleteArgs),
    /// Rename a VM: the same as `vm rename`
    Rename(vm::RenameArgs),
    /// Show a VM's console: the same as `vm logs`
    Logs(vm::LogsArgs),
    /// Show what VMs use, again and again: the same as `vm stats`
    Stats(vm::StatsArgs),
    /// List images: the same as `image list`
    Images(Paging),
    /// Create an image from one in a registry, like `image from-oci`
    Pull(image::PullArgs),
    /// Become the daemon, in a session of its own
    #[command(name = launch::COMMAND, hide = true)]
    LaunchDaemon(launch::Args),
}

/// Parses one of a fixed set of words.
pub(crate) fn word<T>(words: &'static [&'static str]) -> impl TypedValueParser<Value = T>
where
    T: DeserializeOwned + Clone + Send + Sync + 'static,
{
    PossibleValuesParser::new(words).try_map(|word| serde_json::from_value::<T>(word.into()))
}

/// Parses `KEY=VALUE`.
pub(crate) fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.into(), value.into())),
        Some(_) | None => Err(format!("`{text}` is not KEY=VALUE")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(std::iter::once("nexusctl").chain(line.split_whitespace()))
    }

    #[test]
    fn definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn no_command_redefines_a_global_option() {
        fn walk(command: &clap::Command, globals: &[String], path: &str) {
            for sub in command.get_subcommands() {
                let path = format!("{path} {}", sub.get_name());
                for arg in sub.get_arguments() {
                    assert!(
                        !globals.contains(&arg.get_id().to_string()),
                        "{path} redefines --{}",
                        arg.get_id()
                    );
                }
                walk(sub, globals, &path);
            }
        }
        let cli = Cli::command();
        let globals =
            cli.get_arguments().filter(|arg| arg.is_global_set()).map(|arg| arg.get_id().to_string());
        walk(&cli, &globals.collect::<Vec<_>>(), "nexusctl");
    }

    #[test]
    fn what_people_type_is_understood() {
        for line in [
            "ps",
            "ps -a --tag a=b",
            "vm ps",
            "ls",
            "start web-1 web-2",
            "start web-1 --if-boot-id aaaaaaaaaaaac",
            "stop -f web-1",
            "restart web-1 --detach",
            "pause web-1 web-2",
            "resume web-1 --if-boot-id aaaaaaaaaaaac",
            "kill web-1",
            "vm restart web-1 --if-boot-id aaaaaaaaaaaac",
            "wait web-1",
            "wait web-1 --port 80 --timeout 5m",
            "vm wait web-1 --file /tmp/x",
            "wait web-1 --state stopped",
            "vm create --ttl 2h --idle-stop 30m --run true",
            "vm update web-1 --ttl 0",
            "vm kill web-1 web-2",
            "vm publish web-1 8080:80",
            "vm publish web-1 80 --if-boot-id aaaaaaaaaaaac",
            "vm publish web-1 80 --unix --socket /x",
            "vm unpublish web-1 80 --if-boot-id aaaaaaaaaaaac",
            "rename web-1 web-2",
            "vm rename web-1 web-2",
            "logs -f web-1",
            "stats",
            "stats web-1 --no-stream",
            "images -q",
            "pull python:3.12-slim --name py",
            "run debian -- uname -a",
            "run --rm -i --cpus 2 -m 1G -e A=B python:3.12 python -V",
            "run --keep --name web-1 busybox -c true",
            "run -c true busybox",
            "run --network none --ttl 2h --allow a.example busybox -- true",
            "run --entrypoint /bin/sh python:3.12 -- -c true",
            "vm ls --json",
            "vm list -q --tag a=b --state ready",
            "vm create",
            "vm create --name web-1 --from busybox --memory 1G --vcpus 2 -d",
            "vm rm web-1 web-2 --force",
            "rm web-1",
            "vm stop web-1 --wait 0",
            "vm logs -f web-1",
            "vm update web-1 --tag a=b --untag c --protect",
            "guest run web-1 -- ls -l /",
            "guest run web-1 ls -l /",
            "guest run web-1 -c true",
            "guest run --cwd /tmp -e A=B -u nobody --timeout 5 web-1 -c true",
            "exec web-1 uname -a",
            "exec -it -u web -w /srv -e A=B -e TERM web-1 -- bash -l",
            "exec -d web-1 -c true",
            "exec --detach-keys ctrl-a,d -t web-1 top",
            "forward web-1 8080:80 443",
            "shell web-1",
            "shell -u web -w /srv -e LANG web-1",
            "shell web-1 --attach aaaaaaaaaaaac --take-over --scroll-back 100",
            "vm console web-1 --raw",
            "cp file web-1:/srv/",
            "cp -a -L --exclude *.o -u web web-1:/srv/. ./srv",
            "cp - web-1:/srv",
            "-q cp web-1:/srv -",
            "guest ls web-1",
            "guest cat web-1 /etc/os-release",
            "image ls",
            "drive create data --size 10G",
            "drive create data --from oci:alpine:3.21 --dry-run",
            "drive from-rootfs alpine 3.21 data --size 2G",
            "drive from-oci python:3.12-slim --name data -n",
            "drive from-template web data --read-only",
            "dr from-image web",
            "drive from-drive data copy -d",
            "dr ls --free",
            "ws attach data web-1 --mount /data",
            "drive grow data 20G",
            "drive rm data other",
            "checkpoint create web-1 clean --ttl 2h --tag a=b",
            "checkpoint ls web-1",
            "checkpoint rm clean aaaaaaaaaaaac -y",
            "vm rollback web-1 clean --discard -y",
            "vm fork web-1 --name try-1 --name try-2 --ttl 1h",
            "vm fork --checkpoint clean -c 3",
            "vm fork web-1 --network proxy --allow example.org:443 --no-deny",
            "template create web --source debian -p nginx --overlay /etc/motd=motd --size 2G",
            "template update web --no-packages --remove-overlay /etc/motd",
            "build start web --no-cache -d",
            "build trigger web",
            "build logs web -f",
            "asset download kernel --from debian",
            "asset download rootfs alpine@3.21 --check",
            "asset download rootfs url:http://host.example/r.tar.xz --unverified",
            "asset verify",
            "asset providers --kind kernel",
            "provider ls",
            "provider show alpine --json",
            "provider set alpine mirrors=https://a.example mirrors=https://b.example --reset about",
            "provider set ours --file ours.json kind=kernel",
            "provider set ours -f -",
            "provider rm ours",
            "asset verify debian-6-1 --kind kernel",
            "asset rm debian-6-1",
            "kernel list",
            "kernel installed -q",
            "kernel download 6.1.150",
            "kernel download anvil 6.1.150 --make-default",
            "kernel verify",
            "rootfs download alpine 3.21",
            "rootfs rm alpine-3-21-3",
            "firecracker download v1.16.1",
            "firecracker show firecracker-1-16-1",
            "vmm ls",
            "token create ci -s exec,lifecycle --vm web-1 --tag a=b --tools work,drives --max-vms 3 --max-memory 4G -e 12h",
            "token ls --all",
            "token revoke ci other --yes",
            "audit -f --vm web-1 --outcome denied",
            "audit --since 1h --until 10m",
            "audit --since 2026-01-02T15:00:00Z",
            "token create ci -e 2026-01-02T15:00:00Z",
            "events -f --vm web-1 --kind vm,command --after 12 --json",
            "rm web-1 -y",
            "prune --images --yes",
            "settings get default.memory",
            "settings set default.memory=1G dns=9.9.9.9,1.1.1.1",
            "settings rollback 3 --key dns",
            "prune --dry-run",
            "prune -n --images --assets",
            "image rm web",
            "vm from-image web web-1 --memory 1G",
            "vm from-template web --name web-1 -d",
            "vm from-oci python:3.12-slim --dry-run",
            "vm from-rootfs alpine 3.21 web-1",
            "image from-template web --name mine",
            "image from-rootfs alpine 3.21 --dry-run",
            "op ls --state running",
            "op get aaaaaaaaaaaac --wait 5",
            "op get aaaaaaaaaaaac --wait 5m",
            "exec --timeout 5m web-1 true",
            "call vm_list",
            "call vm_list {}",
            "mcp",
            "mcp-bridge --vm web-1",
            "mcp config claude-code --vm web-1",
            "--socket /x doctor",
            "completion bash",
        ] {
            if let Err(error) = parse(line) {
                panic!("{line}: {error}");
            }
        }
    }

    #[test]
    fn the_rest_of_a_command_line_belongs_to_the_guest() {
        let Ok(Cli { command: Command::Exec(args), json: false, .. }) = parse("exec web-1 ls -l --json -c x")
        else {
            panic!("not parsed");
        };
        assert_eq!(args.argv(), ["ls", "-l", "--json", "-c", "x"]);
        let Ok(Cli { command: Command::Exec(args), .. }) = parse("exec web-1 -- -c x") else {
            panic!("not parsed");
        };
        assert_eq!(args.argv(), ["-c", "x"]);
    }

    #[test]
    fn mistakes_are_usage_errors() {
        for line in [
            "",
            "vm",
            "vm create --memory much",
            "vm create --driver xen",
            "vm create --name -x",
            "vm inspect",
            "vm inspect Web_1",
            "vm update web-1 --tag nothing",
            "guest run web-1",
            "guest run web-1 -c true -- ls",
            "vm list --json --quiet",
            "vm stop web-1 --wait 3 --detach",
            "op get web-1",
            "op get aaaaaaaaaaaac --wait soon",
            "audit --since yesterday",
            "token create ci -e 1w",
            "asset remove",
            "provider set",
            "provider set Ours about=x",
            "provider set ours about",
            "kernel download --from a b",
            "call",
        ] {
            let code = parse(line).map(|_| 0).unwrap_or_else(|e| e.exit_code());
            assert_eq!(code, 2, "{line}");
        }
    }
}
