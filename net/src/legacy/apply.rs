//! Adds an instance's rules to the chains that drop packets of its VMs, or removes them.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::time::Duration;

use nexus_schema::tools::network::{FirewallChain, FirewallHook};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::socket::Socket;
use super::{Kind, Table, openings};

/// The lock that all programs take while they change tables.
const LOCK: &str = "/run/xtables.lock";
/// Number of tries for the lock, and the time between them.
const TRIES: usize = 50;
const PAUSE: Duration = Duration::from_millis(20);
const HOOKS: [FirewallHook; 2] = [FirewallHook::Forward, FirewallHook::Input];

/// Adds rules for a bridge to the chains that drop packets of VMs, or removes them. Returns the chains, and the number of changed rules. If rules
/// could not be added, the chains say why; an error means that rules could not be removed.
pub(crate) fn apply(bridge: &str, is_wanted: bool) -> io::Result<(Vec<FirewallChain>, u64)> {
    let mut chains = Vec::new();
    let mut changes = 0;
    for kind in Kind::ALL {
        let Some((socket, read)) = open(kind) else { continue };
        let mut planned = read.clone();
        if plan(&mut planned, bridge, is_wanted) == 0 {
            chains.extend(shown(&read, bridge, is_wanted));
            continue;
        }
        match change(&socket, bridge, is_wanted) {
            Ok((table, count)) => {
                changes += count as u64;
                chains.extend(shown(&table, bridge, is_wanted));
            }
            Err(error) if is_wanted => {
                let why = format!("add rules that accept packets from and to {bridge}: {error}");
                let failed = shown(&read, bridge, is_wanted);
                chains.extend(failed.map(|chain| FirewallChain { problem: Some(why.clone()), ..chain }));
            }
            Err(error) => return Err(error),
        }
    }
    Ok((chains, changes))
}

/// Returns the chains that drop packets of VMs unless rules are added.
pub(crate) fn look() -> Vec<FirewallChain> {
    let tables = Kind::ALL.into_iter().filter_map(open);
    tables.flat_map(|(_, table)| shown(&table, "", false).collect::<Vec<_>>()).collect()
}

/// Reads a family's table, if somebody has made it. Asking the kernel would make it.
fn open(kind: Kind) -> Option<(Socket, Table)> {
    let list = match kind {
        Kind::V4 => "/proc/net/ip_tables_names",
        Kind::V6 => "/proc/net/ip6_tables_names",
    };
    let names = std::fs::read_to_string(list).ok()?;
    names.lines().find(|name| *name == "filter")?;
    let socket = Socket::open(kind).ok()?;
    match socket.read() {
        Ok(table) => Some((socket, table)),
        Err(error) => {
            tracing::debug!(?kind, %error, "cannot read the rules of iptables-legacy");
            None
        }
    }
}

/// Reads the table again and changes it while no other program does. Returns it with the number of changed rules.
fn change(socket: &Socket, bridge: &str, is_wanted: bool) -> io::Result<(Table, usize)> {
    let _locked = lock()?;
    let mut table = socket.read()?;
    let count = table.entries.len();
    let changes = plan(&mut table, bridge, is_wanted);
    if changes > 0 {
        socket.replace(&table, count)?;
    }
    Ok((table, changes))
}

/// Changes a table as it should be; returns the number of changed rules.
fn plan(table: &mut Table, bridge: &str, is_wanted: bool) -> usize {
    let change = |hook| {
        let rules = openings(table.kind, hook, bridge);
        match is_wanted && table.drops(hook) {
            true => table.insert(hook, &rules),
            false => table.remove(hook, &rules),
        }
    };
    HOOKS.into_iter().map(change).sum()
}

/// Takes the lock; `None` if there can be none.
fn lock() -> io::Result<Option<File>> {
    let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(LOCK);
    // Without the file, iptables takes no lock either.
    let Ok(file) = file else { return Ok(None) };
    for _ in 0..TRIES {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(Some(file)),
            Err(Errno::WOULDBLOCK | Errno::INTR) => std::thread::park_timeout(PAUSE),
            Err(error) => return Err(error.into()),
        }
    }
    Err(io::Error::new(io::ErrorKind::ResourceBusy, "another program is changing the tables of iptables"))
}

/// Describes the chains that drop packets.
fn shown(table: &Table, bridge: &str, is_wanted: bool) -> impl Iterator<Item = FirewallChain> {
    let makers = [("docker", "DOCKER"), ("ufw", "ufw")];
    let makers = makers.into_iter().filter(|(_, start)| table.has_chain(start)).map(|(maker, _)| maker);
    let from = makers.chain(["iptables-legacy"]).collect::<Vec<_>>().join(", ");
    let family = if table.kind == Kind::V4 { "ip" } else { "ip6" };
    let hooks = HOOKS.into_iter().filter(move |hook| table.drops(*hook));
    hooks.map(move |hook| {
        let rules = openings(table.kind, hook, bridge);
        FirewallChain {
            table: format!("{family} filter"),
            chain: if hook == FirewallHook::Forward { "FORWARD" } else { "INPUT" }.to_owned(),
            hook,
            from: Some(from.clone()),
            rules_in: None,
            open: is_wanted && rules.iter().all(|rule| table.has(hook, rule)),
            problem: None,
        }
    })
}
