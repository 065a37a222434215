//! `nexus-net --check`: makes a network in namespaces of its own, and removes it again, to see whether this host lets an ordinary user.

use std::io::{self, Write as _};
use std::net::Ipv4Addr;
use std::process::Stdio;
use std::sync::Arc;

use nexus_net_wire::{
    CONNECTIONS_MAX, Check, Dns, ErrorCode, Instance, InstanceId, Lack, Mac, NetError, Subnet, Vm, tap,
};
use nexus_schema::id::VmId;
use nexus_schema::network::NetworkPolicy;
use tokio::sync::{mpsc, oneshot};

use super::process::Process;
use super::{OwnError, holder, join, uplink};
use crate::dns::Setup;
use crate::error::Error;
use crate::link::kernel::Links;
use crate::network::Network;
use crate::view::Shared;

/// Settings of the kernel that forbid user namespaces, with the value that does, and the fix.
const FORBIDDEN: [(&str, &str, &str); 3] = [
    ("user/max_user_namespaces", "0", "sysctl -w user.max_user_namespaces=15000"),
    ("kernel/unprivileged_userns_clone", "0", "sysctl -w kernel.unprivileged_userns_clone=1"),
    (
        "kernel/apparmor_restrict_unprivileged_userns",
        "1",
        "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0; or allow it for nexus-net alone, by an AppArmor profile with `userns,`",
    ),
];
/// The groups that may send ICMP echo requests.
const PING_GROUPS: &str = "net/ipv4/ping_group_range";
const OTHERWISE: &str = "run nexusd as root";

/// Reads a setting of the kernel.
fn setting(name: &str) -> Option<String> {
    Some(std::fs::read_to_string(format!("/proc/sys/{name}")).ok()?.trim().to_owned())
}

fn lack(why: impl Into<String>, fix: impl Into<String>) -> Lack {
    Lack { why: why.into(), fix: fix.into() }
}

/// Prints the result as a line of JSON. Must be called while there is only one thread.
pub(crate) fn check() -> io::Result<()> {
    // Before the namespace is entered, which has settings of its own.
    let ping = lacks_ping();
    let mut started = Vec::new();
    let result = match find_lack(&mut started) {
        Ok(()) => Check::Usable {
            found: "in a network namespace of this user, by slirp4netns".to_owned(),
            lack: ping,
        },
        Err(lack) => Check::Unusable(lack),
    };
    started.into_iter().for_each(Process::end);
    let mut line = serde_json::to_vec(&result)?;
    line.push(b'\n');
    io::stdout().write_all(&line)
}

/// Fails with what the host lacks. Adds the processes that must be ended.
fn find_lack(started: &mut Vec<Process>) -> Result<(), Lack> {
    uplink::find().map_err(|error| lack(error.to_string(), "apt-get install slirp4netns"))?;
    let holder = holder::start(None, holder::Namespaces::New).map_err(|error| no_namespaces(&error))?;
    let pid = holder.pid();
    started.push(holder);
    std::fs::File::options().read(true).write(true).open(tap::DEVICE).map_err(|error| no_tun(&error))?;
    let uplink = uplink::start(None, pid, Some(Stdio::piped()));
    started.push(uplink.map_err(|error| lack(nexus_schema::error::chain(&error), OTHERWISE))?);
    join(pid).map_err(|error| no_namespaces(&error))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| lack(format!("start the runtime: {error}"), OTHERWISE))?;
    runtime.block_on(Box::pin(make()))
}

/// Makes a network with a VM.
async fn make() -> Result<(), Lack> {
    let links = Links::open().map_err(|error| lack(format!("open rtnetlink: {error}"), OTHERWISE))?;
    let (setups, mut to_serve) = mpsc::channel::<(Setup, oneshot::Sender<Result<(), Error>>)>(1);
    tokio::spawn(async move {
        while let Some((_, done)) = to_serve.recv().await {
            // There is no resolver, and nobody asks it.
            let _ = done.send(Ok(()));
        }
    });
    let mut network = Network::new(links, Arc::new(Shared::default()), setups);
    let made = async {
        network.configure(instance()).await?;
        network.attach(vm()).await
    };
    made.await.map(drop).map_err(|error| {
        let error = error.to_wire();
        lack(error.message.clone(), fix_of(error, setting))
    })
}

/// Returns what to change on a host with these settings where making a network in a namespace failed like this.
fn fix_of(error: NetError, setting: impl Fn(&str) -> Option<String>) -> String {
    match error.code {
        // Some hosts let their users make namespaces, but give them no rights in these.
        ErrorCode::NotPermitted => what_forbids(setting),
        _ => error.hint.unwrap_or_else(|| OTHERWISE.to_owned()),
    }
}

fn instance() -> Instance {
    let gateway = Ipv4Addr::new(10, 0, 0, 1);
    Instance {
        id: InstanceId::new(1).expect("it is not 0"),
        v4: Subnet { subnet: "10.0.0.0/24".parse().expect("it is a network"), gateway },
        v6: None,
        host_addresses: Vec::new(),
        dns: Dns::Servers(Vec::new()),
        opens_firewall: false,
        connections_max: CONNECTIONS_MAX,
    }
}

fn vm() -> Vm {
    Vm {
        id: VmId::from_i64(1).expect("it is an id"),
        name: "check".to_owned(),
        owner_uid: 0,
        mac: Mac([0x02, 0x4e, 0x58, 0, 0, 2]),
        ipv4: Ipv4Addr::new(10, 0, 0, 2),
        ipv6: None,
        policy: NetworkPolicy::default(),
        groups: Vec::new(),
    }
}

fn no_namespaces(error: &OwnError) -> Lack {
    lack(
        format!(
            "this host does not let its users make network namespaces: {}",
            nexus_schema::error::chain(error)
        ),
        what_forbids(setting),
    )
}

/// Returns what to change on a host with these settings so that its users can make namespaces.
fn what_forbids(setting: impl Fn(&str) -> Option<String>) -> String {
    let found = FORBIDDEN.iter().find(|(name, value, _)| setting(name).as_deref() == Some(*value));
    match found {
        Some((_, _, fix)) => format!("as root: {fix}"),
        None => {
            format!(
                "{OTHERWISE}, or let its user make user namespaces (in a container, by its security profile)"
            )
        }
    }
}

fn no_tun(error: &io::Error) -> Lack {
    let device = tap::DEVICE;
    let fix = match error.kind() {
        io::ErrorKind::PermissionDenied => format!("as root: chmod 0666 {device}"),
        _ => format!(
            "as root: modprobe tun, and make sure that {device} exists (in a container: --device {device})"
        ),
    };
    lack(format!("TAP devices cannot be used: {device}: {error}"), fix)
}

/// Returns what to change if VMs get no answers to pings of other machines.
fn lacks_ping() -> Option<Lack> {
    let range = setting(PING_GROUPS)?;
    let mut ends = range.split_whitespace().filter_map(|end| end.parse::<u32>().ok());
    let (first, last) = (ends.next()?, ends.next()?);
    let group = rustix::process::getegid().as_raw();
    (!(first..=last).contains(&group)).then(|| {
        lack(
            "VMs get no answers to pings of other machines, because net.ipv4.ping_group_range excludes this user",
            "as root: sysctl -w net.ipv4.ping_group_range=\"0 2147483647\"",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rights_that_lack_in_a_namespace_are_for_the_host_to_give() {
        let error = |code, hint: Option<&str>| NetError {
            code,
            message: "create the bridge".to_owned(),
            hint: hint.map(str::to_owned),
        };
        let [.., (apparmor, value, _)] = FORBIDDEN;
        let restricts = |name: &str| (name == apparmor).then(|| value.to_owned());
        let not_permitted = error(ErrorCode::NotPermitted, Some("start it as root"));
        assert!(fix_of(not_permitted, restricts).starts_with("as root: sysctl -w kernel.apparmor_"));
        let no_tables = error(ErrorCode::NoNfTables, Some("modprobe nf_tables"));
        assert_eq!(fix_of(no_tables, restricts), "modprobe nf_tables");
        assert_eq!(fix_of(error(ErrorCode::Kernel, None), restricts), OTHERWISE);
    }

    #[test]
    fn the_setting_that_forbids_namespaces_is_named() {
        let host = |values: &[(&str, &str)]| {
            what_forbids(|name| {
                values.iter().find(|(of, _)| *of == name).map(|(_, value)| (*value).to_owned())
            })
        };
        let [users, clone, apparmor] = FORBIDDEN.map(|(name, ..)| name);
        assert!(host(&[(apparmor, "1")]).starts_with(
            "as root: sysctl -w kernel.apparmor_restrict_unprivileged_userns=0; or allow it for nexus-net alone"
        ));
        assert_eq!(
            host(&[(clone, "0"), (apparmor, "0")]),
            "as root: sysctl -w kernel.unprivileged_userns_clone=1"
        );
        assert_eq!(
            host(&[(users, "0"), (clone, "0"), (apparmor, "1")]),
            "as root: sysctl -w user.max_user_namespaces=15000",
            "one at a time: the next check names the next one"
        );
        for values in [&[][..], &[(users, "15000"), (clone, "1"), (apparmor, "0")]] {
            assert!(host(values).starts_with(OTHERWISE), "{values:?}");
        }
    }
}
