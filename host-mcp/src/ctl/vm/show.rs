//! Formats VMs as tables.

use std::collections::BTreeMap;
use std::time::Duration;

use nexus_schema::link::InitMode;
use nexus_schema::network::{NetworkMode, NetworkRule};
use nexus_schema::tools::network::InspectedNetwork;
use nexus_schema::tools::vm::{
    IdleAction, NetworkCounts, VmDetails, VmNetwork, VmState, VmSummary, VmTimings, VmTransition, VmWalls,
};
use nexus_schema::{TimeSpan, Timestamp};

use crate::ctl::format;
use crate::ctl::ui::{Mood, Table, Text};

/// The mood of a state.
pub(super) fn mood(state: VmState) -> Mood {
    match state {
        VmState::Ready => Mood::Good,
        VmState::Creating
        | VmState::Starting
        | VmState::Running
        | VmState::Stopping
        | VmState::Unreachable
        | VmState::Paused => Mood::Uneasy,
        VmState::Crashed | VmState::Failed => Mood::Bad,
        VmState::Created | VmState::Suspended | VmState::Stopped => Mood::Plain,
    }
}

/// VMs in a list.
pub(super) fn summaries(vms: &[VmSummary], now: Timestamp) -> Table {
    let mut table =
        Table::with_headings(&["NAME", "ID", "STATE", "IMAGE", "CPUS", "MEMORY", "CREATED", "TAGS", "NOTE"])
            .prose(&["NOTE"])
            .dropping(&["TAGS", "CREATED", "ID", "CPUS", "MEMORY", "IMAGE", "NOTE"]);
    for vm in vms {
        let protected = vm.protected.then_some("protected".to_owned());
        // Reasons can contain the console's last lines, which only `vm inspect` shows.
        let reason = vm.reason.as_ref().and_then(|reason| reason.lines().next()).map(str::to_owned);
        let note: Vec<_> = reason.into_iter().chain(protected).collect();
        table.row([
            (&vm.name).into(),
            vm.id.into(),
            Text::new(vm.state, mood(vm.state)),
            (&vm.image).into(),
            vm.vcpus.into(),
            format::size(vm.memory.as_bytes()).into(),
            format::ago(vm.created_at, now).into(),
            tags(&vm.tags).into(),
            note.join(", ").into(),
        ]);
    }
    table
}

/// A VM that was just created.
pub(super) fn created(vm: &VmDetails) -> Table {
    let mut table = Table::with_headings(&["NAME", "ID", "STATE", "IMAGE", "CPUS", "MEMORY", "BOOTED IN"])
        .dropping(&["ID", "CPUS", "MEMORY", "BOOTED IN", "IMAGE"]);
    let booted = vm.timings.map(|t| format::millis(t.total_ms)).unwrap_or_default();
    table.row([
        (&vm.name).into(),
        vm.id.into(),
        Text::new(vm.state, mood(vm.state)),
        (&vm.image.name).into(),
        vm.vcpus.into(),
        format::size(vm.memory.as_bytes()).into(),
        booted.into(),
    ]);
    table
}

/// Only its network.
pub(super) fn of_network(vm: &VmDetails, now: Timestamp) -> Table {
    let mut table = Table::of_facts();
    network(&mut table, &vm.network, vm.network_note.as_deref(), now);
    table
}

/// A VM's network as one of several.
pub(crate) fn of_inspected_network(vm: &InspectedNetwork, now: Timestamp) -> Table {
    let mut table = Table::of_facts();
    table.fact("vm", &vm.name);
    table.fact("state", Text::new(vm.state, mood(vm.state)));
    network(&mut table, &vm.network, Some(&vm.note), now);
    table
}

/// What it may connect to, and what was refused.
fn network(table: &mut Table, network: &VmNetwork, note: Option<&str>, now: Timestamp) {
    // The note shows `until_next_start`.
    let VmNetwork {
        mode,
        preset,
        allow,
        deny,
        groups,
        bandwidth,
        interface,
        until_next_start: _,
        counts,
        denied,
        packages,
    } = network;
    let preset = if *mode == NetworkMode::None { "" } else { preset.as_str() };
    let words: Vec<_> = [mode.as_str(), preset].into_iter().filter(|word| !word.is_empty()).collect();
    let note = note.map(|note| format!(" ({note})")).unwrap_or_default();
    table.fact("network", format!("{}{note}", words.join(", ")));
    let list = |rules: &[NetworkRule]| rules.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    for (name, rules) in [("packages", packages), ("allow", allow), ("deny", deny)] {
        table.maybe(name, (!rules.is_empty()).then(|| list(rules)));
    }
    let groups = groups.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    table.maybe("groups", (!groups.is_empty()).then_some(groups));
    let limits = [("received", bandwidth.rx), ("sent", bandwidth.tx)].into_iter();
    let limits = limits.filter_map(|(way, limit)| Some(format!("{}/s {way}", limit?)));
    table.maybe("limit", (!bandwidth.is_empty()).then(|| limits.collect::<Vec<_>>().join(", ")));
    table.maybe(
        "interface",
        interface.as_ref().map(|it| {
            let tap = it.tap.as_ref().map(|tap| format!(", {tap} of the host")).unwrap_or_default();
            format!("{}, {}, {}{tap}", it.ipv4, it.ipv6, it.mac)
        }),
    );
    if *counts != NetworkCounts::default() {
        let NetworkCounts { allowed, denied, failed, open, sent_bytes, received_bytes, .. } = *counts;
        let [sent, received] = [sent_bytes, received_bytes].map(format::size);
        let text = format!(
            "{allowed} made, {open} open, {denied} refused, {failed} failed; {sent} sent, {received} received"
        );
        table.fact("connections", text);
    }
    for one in denied {
        let at = time(one.at, now);
        let port = if one.port == 0 { String::new() } else { format!(":{}", one.port) };
        table.fact("refused", format!("{}{port} ({}), {at}", one.host, one.reason.words()));
    }
}

/// Everything about a VM.
pub(super) fn details(vm: &VmDetails, now: Timestamp) -> Table {
    let mut table = Table::of_facts();
    table.fact("name", &vm.name);
    table.fact("id", vm.id);
    table.fact("state", Text::new(vm.state, mood(vm.state)));
    table.maybe("reason", vm.reason.as_ref());
    table.fact("image", image(vm));
    table.fact("kernel", &vm.kernel);
    table.fact("cpus", vm.vcpus);
    table.fact("memory", format::size(vm.memory.as_bytes()));
    let vmm = [Some(vm.driver.clone()), vm.driver_version.clone(), vm.accel.clone()];
    table.fact("vmm", vmm.into_iter().flatten().collect::<Vec<_>>().join(" "));
    table.fact(
        "init",
        match vm.init {
            InitMode::Agent => "agent",
            InitMode::System => "system",
        },
    );
    network(&mut table, &vm.network, vm.network_note.as_deref(), now);
    for drive in &vm.drives {
        let root = if drive.root { ", root" } else { "" };
        let read_only = if drive.read_only { ", read-only" } else { "" };
        let size = format::size(drive.size.as_bytes());
        table.fact("drive", format!("{} ({size}{root}{read_only}) {}", drive.name, drive.path));
    }
    for port in &vm.published {
        table.fact("published", super::publish::one(port));
    }
    if let Some(guest) = &vm.guest {
        table.fact("guest", guest.os.clone().unwrap_or_else(|| "unknown system".into()));
        table.fact("guest kernel", &guest.kernel);
        table.fact("agent", format!("{} (protocol {})", guest.build, guest.protocol));
        for problem in &guest.problems {
            table.fact("problem", Text::new(problem, Mood::Bad));
        }
    }
    if let Some(process) = &vm.process {
        table.fact("pid", format!("{} (shim {})", process.pid, process.shim_pid));
        table.maybe("walls", process.walls.as_ref().map(walls));
        table.fact("directory", &process.directory);
        table.fact("vsock", format!("{} (cid {})", process.vsock_socket, vm.cid));
    }
    table.maybe("lifetime", (vm.expires_at.is_some() || vm.idle_stop.is_some()).then(|| limits(vm, now)));
    table.fact("console", &vm.console_log);
    table.maybe("boot", vm.boot_id);
    table.maybe("booted in", vm.timings.map(timings));
    table.fact("owner", &vm.owner);
    table.fact("protected", if vm.protected { "yes" } else { "no" });
    table.fact("tags", tags(&vm.tags));
    table.fact("created", time(vm.created_at, now));
    table.maybe("started", vm.started_at.map(|at| time(at, now)));
    table
}

/// The restrictions of a VMM on one line.
fn walls(walls: &VmWalls) -> String {
    let mut words = vec![format!("user {}", walls.uid)];
    let says = [
        (walls.own_root, "own root directory"),
        (!walls.capabilities, "no capabilities"),
        (walls.no_new_privileges, "no new privileges"),
        (walls.seccomp, "seccomp"),
    ];
    words.extend(says.iter().filter(|(is, _)| *is).map(|(_, word)| (*word).to_owned()));
    if !walls.namespaces.is_empty() {
        words.push(format!("namespaces {}", walls.namespaces.join(" ")));
    }
    words.extend(walls.limits.iter().map(|(name, value)| format!("{name} {value}")));
    words.join(", ")
}

fn image(vm: &VmDetails) -> String {
    let more: Vec<_> = [vm.image.distro.clone(), vm.image.source.clone()]
        .into_iter()
        .flatten()
        .chain(vm.image.lineage.iter().map(|parent| format!("from {parent}")))
        .filter(|word| *word != vm.image.name)
        .collect();
    if more.is_empty() { vm.image.name.clone() } else { format!("{} ({})", vm.image.name, more.join(", ")) }
}

fn timings(t: VmTimings) -> String {
    let step = |name: &str, ms: u64| format!("{name} {}", format::duration(Duration::from_millis(ms)));
    let steps = [
        step("plan", t.plan_ms),
        step("spawn", t.spawn_ms),
        step("boot", t.boot_ms),
        step("configure", t.configure_ms),
        step("link", t.link_ms),
    ];
    format!("{} ({})", format::millis(t.total_ms), steps.join(", "))
}

/// The history of a VM.
pub(super) fn transitions(transitions: &[VmTransition], now: Timestamp) -> Table {
    let mut table = Table::with_headings(&["WHEN", "FROM", "TO", "WHO", "WHY"])
        .prose(&["WHY"])
        .dropping(&["FROM", "WHO"]);
    for change in transitions {
        table.row([
            time(change.at, now).into(),
            change.from.map_or("-", VmState::as_str).into(),
            change.to.map_or("deleted".into(), |state| Text::new(state, mood(state))),
            (&change.who).into(),
            (&change.reason).into(),
        ]);
    }
    table
}

/// How long it lives and may be idle.
pub(super) fn limits(vm: &VmDetails, now: Timestamp) -> String {
    let left = |at: Timestamp| {
        let millis = at.as_millis().saturating_sub(now.as_millis());
        TimeSpan::seconds(u64::try_from(millis / 1000).unwrap_or(0))
    };
    let what = if vm.protected { "stopped" } else { "deleted" };
    let expires = vm.expires_at.map(|at| format!("{what} in {} ({at})", left(at)));
    let done = match vm.idle_action {
        Some(IdleAction::Suspend) => "suspended",
        Some(IdleAction::Stop) | None => "stopped",
    };
    let idle = vm.idle_stop.map(|limit| match vm.idle_stop_at {
        Some(at) => format!("{done} once idle for {limit}, in {} at the earliest", left(at)),
        None => format!("{done} once idle for {limit}"),
    });
    let said: Vec<String> = expires.into_iter().chain(idle).collect();
    if said.is_empty() { "lives until it is deleted".into() } else { said.join("; ") }
}

/// Labels on one line.
pub(super) fn tags(tags: &BTreeMap<String, String>) -> String {
    if tags.is_empty() {
        return "-".into();
    }
    tags.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(",")
}

fn time(at: Timestamp, now: Timestamp) -> String {
    format!("{at} ({})", format::ago(at, now))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn now() -> Timestamp {
        "2026-01-02T03:04:05Z".parse().unwrap()
    }

    fn vm() -> VmDetails {
        serde_json::from_value(json!({
            "id": "bbbbbbbbbbbbe", "name": "web-1", "state": "ready", "owner": "uid:0", "vcpus": 1, "memory": "512MiB",
            "driver": "qemu", "driver_version": "7.2.22", "accel": "tcg", "init": "agent", "network": "none",
            "network_note": "this VM has no network",
            "image": { "id": "cccccccccccce", "name": "busybox", "distro": "debian-12", "source": "busybox" },
            "kernel": "debian-6-1-0-40-cloud-amd64",
            "drives": [{ "id": "ddddddddddddi", "name": "web-1-root", "root": true, "read_only": false, "size": "8GiB",
                "path": "/s/drives/ddddddddddddi/disk.ext4" }],
            "guest": { "protocol": 1, "build": "0.1.0", "kernel": "6.1.0-40-cloud-amd64", "os": "BusyBox",
                "problems": ["the clock could not be set"] },
            "process": { "pid": 12, "shim_pid": 11, "vsock_socket": "/s/vms/bbbbbbbbbbbbe/v.sock",
                "directory": "/s/vms/bbbbbbbbbbbbe" },
            "boot_id": "eeeeeeeeeeeem", "cid": 3, "console_log": "/s/vms/bbbbbbbbbbbbe/console.log",
            "timings": { "plan_ms": 40, "spawn_ms": 120, "boot_ms": 1900, "guest_uptime_ms": 1700, "configure_ms": 9,
                "link_ms": 3, "total_ms": 2072 },
            "protected": true, "tags": { "team": "a" }, "created_at": "2026-01-02T03:00:00Z",
            "started_at": "2026-01-02T03:04:00Z", "generation": 4
        }))
        .unwrap()
    }

    #[test]
    fn details_of_a_running_vm() {
        insta::assert_snapshot!(details(&vm(), now()).render(None, false));
    }

    #[test]
    fn how_long_it_lives_is_told() {
        let at = |text: &str| Some(text.parse().unwrap());
        let one = VmDetails {
            expires_at: at("2026-01-02T03:34:05Z"),
            idle_stop: Some(TimeSpan::seconds(600)),
            idle_stop_at: at("2026-01-02T03:13:05Z"),
            protected: false,
            ..vm()
        };
        assert_eq!(
            limits(&one, now()),
            "deleted in 30m (2026-01-02T03:34:05.000Z); stopped once idle for 10m, in 9m at the earliest"
        );
        assert_eq!(limits(&vm(), now()), "lives until it is deleted");
    }

    #[test]
    fn a_new_vm() {
        insta::assert_snapshot!(created(&vm()).render(None, false), @"
        NAME   ID             STATE  IMAGE    CPUS  MEMORY   BOOTED IN
        web-1  bbbbbbbbbbbbe  ready  busybox  1     512 MiB  2.1 s
        ");
    }

    #[test]
    fn a_list() {
        let vms: Vec<VmSummary> = serde_json::from_value(json!([
            { "id": "bbbbbbbbbbbbe", "name": "web-1", "state": "ready", "image": "busybox", "vcpus": 1,
              "memory": "512MiB", "created_at": "2026-01-02T03:00:00Z", "protected": true, "tags": {} },
            { "id": "bbbbbbbbbbbbi", "name": "db", "state": "crashed", "reason": "the VMM ended with signal 9\nlast lines of the console:\noops",
              "image": "debian", "vcpus": 2, "memory": "2GiB", "created_at": "2025-12-31T03:00:00Z",
              "protected": false, "tags": { "a": "1", "b": "2" } }
        ]))
        .unwrap();
        insta::assert_snapshot!(summaries(&vms, now()).render(None, false), @"
        NAME   ID             STATE    IMAGE    CPUS  MEMORY   CREATED    TAGS     NOTE
        web-1  bbbbbbbbbbbbe  ready    busybox  1     512 MiB  4 min ago  -        protected
        db     bbbbbbbbbbbbi  crashed  debian   2     2 GiB    2 d ago    a=1,b=2  the VMM ended with signal 9
        ");
    }
}
