//! Adds an instance's rules to the chains that drop packets of its VMs, or removes them.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::time::Duration;

use nexus_schema::tools::network::{FirewallChain, FirewallHook};
use rustix::fs::{FlockOperation, flock, major, minor};
use rustix::io::Errno;

use super::socket::Socket;
use super::{Kind, Table, openings};

/// The lock that all programs take while they change tables.
const LOCK: &str = "/run/xtables.lock";
/// Number of tries for the lock at the end of an instance, and the time between them.
const TRIES: usize = 50;
const PAUSE: Duration = Duration::from_millis(20);
const HOOKS: [FirewallHook; 2] = [FirewallHook::Forward, FirewallHook::Input];

/// The chains that drop packets of VMs, and what was changed for that.
#[derive(Debug, Default)]
pub(crate) struct Applied {
    /// The chains. If rules could not be added, they say why.
    pub(crate) chains: Vec<FirewallChain>,
    /// Number of changed rules.
    pub(crate) changes: u64,
    /// Who kept tables from being changed, as a sentence; what is missing is to be tried again.
    pub(crate) held: Option<String>,
    /// The first error of a table whose rules could not be removed, other than for such a program. The other tables are changed all the same.
    pub(crate) error: Option<io::Error>,
}

/// Adds rules for a bridge to the chains that drop packets of VMs, or removes them. Waits for nobody.
pub(crate) fn apply(bridge: &str, is_wanted: bool) -> Applied {
    let tables = Kind::ALL.into_iter().filter_map(open);
    apply_to(tables, bridge, is_wanted, |socket| change(socket, bridge, is_wanted))
}

/// Applies to each of these tables what `change` does, also after one that it fails for.
fn apply_to<S>(
    tables: impl Iterator<Item = (S, Table)>,
    bridge: &str,
    is_wanted: bool,
    change: impl Fn(&S) -> io::Result<(Table, usize)>,
) -> Applied {
    let mut applied = Applied::default();
    for (socket, read) in tables {
        let mut planned = read.clone();
        if plan(&mut planned, bridge, is_wanted) == 0 {
            applied.chains.extend(shown(&read, bridge, is_wanted));
            continue;
        }
        match change(&socket) {
            Ok((table, count)) => {
                applied.changes += count as u64;
                applied.chains.extend(shown(&table, bridge, is_wanted));
            }
            Err(error) => {
                let what = if is_wanted { "add" } else { "remove" };
                let mut why = format!("{what} rules that accept packets from and to {bridge}: {error}");
                if is_held(&error) {
                    why.push_str("; nexus-net tries again until it lets go");
                    applied.held = Some(error.to_string());
                }
                let failed = shown(&read, bridge, is_wanted);
                let failed = failed.map(|chain| FirewallChain { problem: Some(why.clone()), ..chain });
                applied.chains.extend(failed);
                if !is_wanted && !is_held(&error) {
                    applied.error.get_or_insert(error);
                }
            }
        }
    }
    applied
}

/// Removes the rules for a bridge; returns their number. Waits about a second for programs that change tables themselves.
///
/// # Errors
/// If rules could not be removed; one for which [`is_held`] is true for such a program.
pub(crate) async fn clean(bridge: &str) -> io::Result<u64> {
    let mut changes = 0;
    let mut held = String::new();
    for _ in 0..TRIES {
        let applied = apply(bridge, false);
        changes += applied.changes;
        match (applied.held, applied.error) {
            (None, None) => return Ok(changes),
            (None, Some(error)) => return Err(error),
            // The other table is tried again, too.
            (Some(why), _) => held = why,
        }
        tokio::time::sleep(PAUSE).await;
    }
    Err(io::Error::new(io::ErrorKind::ResourceBusy, held))
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
///
/// # Errors
/// One for which [`is_held`] is true if another program has it.
fn lock() -> io::Result<Option<File>> {
    let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(LOCK);
    // Without the file, iptables takes no lock either.
    let Ok(file) = file else { return Ok(None) };
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(Errno::WOULDBLOCK | Errno::INTR) => {
            let who = holder_of(&file);
            Err(io::Error::new(io::ErrorKind::ResourceBusy, format!("{who} holds {LOCK}")))
        }
        Err(error) => Err(error.into()),
    }
}

/// Returns whether an error means that another program has the lock, and says who. Those of the kernel have a number instead.
pub(crate) fn is_held(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::ResourceBusy && error.get_ref().is_some()
}

/// Describes who has locked a file, as far as that can be found out.
fn holder_of(file: &File) -> String {
    let locks = std::fs::read_to_string("/proc/locks").unwrap_or_default();
    let found = file.metadata().ok();
    let found = found.and_then(|found| holder_in(&locks, (found.dev(), found.ino())));
    let Some(pid) = found else { return "another program".to_owned() };
    match std::fs::read_to_string(format!("/proc/{pid}/comm")) {
        Ok(name) => format!("process {pid} ({})", name.trim_end().escape_debug()),
        Err(_) => format!("process {pid}"),
    }
}

/// Finds the process that has locked the file with these numbers of device and inode. `locks` is `/proc/locks`, in which processes of other PID
/// namespaces have no number.
fn holder_in(locks: &str, (device, inode): (u64, u64)) -> Option<u32> {
    let place = format!("{:02x}:{:02x}:{inode}", major(device), minor(device));
    locks.lines().find_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            // Those that wait have an arrow before the kind.
            [_, "FLOCK", _, _, pid, at, ..] if *at == place => pid.parse().ok().filter(|pid| *pid > 0),
            _ => None,
        }
    })
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

#[cfg(test)]
mod tests {
    use super::super::DROP;
    use super::super::tests::table;
    use super::*;

    const BRIDGE: &str = "nxb0a1b2c3d";

    fn held() -> io::Error {
        io::Error::new(io::ErrorKind::ResourceBusy, "somebody holds it")
    }

    /// A table per family that drops, with the rules in it or without.
    fn tables(has_rules: bool) -> impl Iterator<Item = (Kind, Table)> {
        Kind::ALL.into_iter().map(move |kind| {
            let mut table = table(kind, DROP);
            plan(&mut table, BRIDGE, has_rules);
            (kind, table)
        })
    }

    #[test]
    fn one_table_that_fails_hides_nothing_of_the_other() {
        let busy = || io::Error::from(Errno::AGAIN);
        for held_first in [true, false] {
            let change = |kind: &Kind| Err(if (*kind == Kind::V4) == held_first { held() } else { busy() });
            let removed = apply_to(tables(true), BRIDGE, false, change);
            assert_eq!(removed.held.as_deref(), Some("somebody holds it"), "it is tried again");
            let error = removed.error.expect("it is told");
            assert_eq!(error.raw_os_error(), busy().raw_os_error());
            assert_eq!(removed.chains.iter().filter(|chain| chain.problem.is_some()).count(), 2);
            // The chains tell of rules that cannot be added.
            let added = apply_to(tables(false), BRIDGE, true, change);
            assert!(added.held.is_some() && added.error.is_none());
        }
        // After one that failed, the other is changed.
        let change = |kind: &Kind| match kind {
            Kind::V4 => Err(busy()),
            Kind::V6 => Ok((table(Kind::V6, DROP), 2)),
        };
        let removed = apply_to(tables(true), BRIDGE, false, change);
        assert_eq!((removed.changes, removed.held), (2, None));
        assert!(removed.error.is_some());
    }

    #[test]
    fn who_has_locked_a_file_is_found_among_all_locks() {
        let locks = "1: POSIX  ADVISORY  WRITE 700 00:18:567 0 EOF\n\
                     2: FLOCK  ADVISORY  WRITE 701 00:18:568 0 EOF\n\
                     3: FLOCK  ADVISORY  WRITE 702 00:18:567 0 EOF\n\
                     3: -> FLOCK  ADVISORY  WRITE 703 00:18:567 0 EOF\n\
                     4: FLOCK  ADVISORY  WRITE -1 08:01:99 0 EOF\n";
        assert_eq!(holder_in(locks, (0x18, 567)), Some(702));
        assert_eq!(holder_in(locks, (0x801, 99)), None, "it is of another namespace");
        assert_eq!(holder_in(locks, (0x18, 569)), None);
        assert_eq!(holder_in("", (0x18, 567)), None);
    }

    #[test]
    fn a_lock_that_is_held_is_told_from_a_busy_kernel() {
        assert!(is_held(&io::Error::new(io::ErrorKind::ResourceBusy, "another program holds it")));
        assert!(!is_held(&io::Error::from(Errno::BUSY)) && !is_held(&io::ErrorKind::ResourceBusy.into()));
        assert!(!is_held(&io::Error::from(Errno::AGAIN)));
    }
}
