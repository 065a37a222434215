//! Finds the argument that is meant by a misspelt name, or by a name that other tools use.

use serde_json::{Map, Value};

use crate::tool::VM_ARGUMENT;

/// Names in other tools, and the corresponding names here. The first of ours that the tool has is suggested.
const ELSEWHERE: &[(&[&str], &[&str])] = &[
    (&["image", "template", "rootfs", "base", "source"], &["from", "source"]),
    (&["cpus", "cpu", "cpu_count", "cores", "num_cpus", "vcpu", "vcpu_count"], &["vcpus"]),
    (&["mem", "ram", "memory_mb", "memory_mib", "mem_size", "mem_size_mib"], &["memory"]),
    (&["disk_size", "disk_gb", "root_size", "size", "storage"], &["disk", "size"]),
    (&["cmd", "cmdline", "command_line", "shell", "script", "code", "exec"], &["command"]),
    (&["args", "arguments", "command_args", "program"], &["argv"]),
    (
        &["workdir", "working_dir", "working_directory", "work_dir", "dir", "directory", "pwd"],
        &["cwd", "path"],
    ),
    (&["environment", "envs", "env_vars", "environ", "variables"], &["env"]),
    (&["input"], &["stdin"]),
    (
        &["timeout", "timeout_s", "timeout_seconds", "timeout_sec", "time_limit", "timeout_ms"],
        &["timeout_s", "wait_s"],
    ),
    (&["wait", "wait_seconds", "wait_ms"], &["wait_s"]),
    (&["max_output", "output_limit"], &["max_output_bytes", "max_bytes"]),
    (&["uid", "username", "as_user", "run_as"], &["user"]),
    (&["file", "filename", "file_path", "filepath", "file_name", "target"], &["path"]),
    (&["text", "data", "contents", "body", "file_text"], &["content"]),
    (&["permissions", "perms", "chmod", "file_mode"], &["mode"]),
    (&["parents", "mkdir", "make_parents", "create_dirs"], &["create_parents"]),
    (&["old_string", "old_str", "old_text", "search", "find"], &["old", "pattern"]),
    (&["new_string", "new_str", "new_text", "replace", "replacement"], &["new"]),
    (&["regex", "query", "needle"], &["pattern"]),
    (&["diff"], &["patch"]),
    (&["source", "src"], &["from"]),
    (&["destination", "dest", "dst", "new_path"], &["to"]),
    (&["include", "globs", "glob_pattern"], &["globs", "glob"]),
    (&["line", "start_line", "first_line"], &["from_line"]),
    (&["count", "max", "length", "size", "n", "max_results", "page_size"], &["limit"]),
    (&["page", "next", "page_token", "next_cursor", "after"], &["cursor"]),
    (&["labels", "label", "metadata"], &["tags"]),
    (&["id", "name", "vm_id", "vm_name", "instance", "machine", "container", "sandbox"], &[VM_ARGUMENT]),
    (&["id", "name"], &["image", "drive", "template", "asset", "build", "provider", "op_id", "key"]),
    (&["op", "operation", "operation_id", "task_id"], &["op_id"]),
    (&["command_id", "cmd_id"], &["id"]),
    (&["port", "vm_port", "container_port", "target_port"], &["guest_port"]),
    (&["path", "uri", "address", "endpoint"], &["url"]),
    (&["new_name", "rename_to"], &["name"]),
    (&["dry", "plan", "preview"], &["dry_run"]),
    (&["autostart", "run"], &["start"]),
    (&["lifetime", "expires_in", "expires_at", "max_age", "time_to_live"], &["ttl"]),
    (&["idle_timeout", "autostop", "auto_stop", "idle"], &["idle_stop"]),
    (&["boot_id", "if_boot"], &["if_boot_id"]),
];

/// Names that results have for values, and the arguments that take these values. They are accepted where a tool has only the argument.
const IN_RESULTS: &[(&str, &str)] = &[("command_id", "id")];

/// Gives arguments under the names of results their own names.
pub(super) fn of_results(properties: &Map<String, Value>, arguments: &mut Map<String, Value>) {
    for (theirs, own) in IN_RESULTS {
        let is_meant = properties.contains_key(*own) && !properties.contains_key(*theirs);
        if is_meant
            && !arguments.contains_key(*own)
            && let Some(value) = arguments.remove(*theirs)
        {
            arguments.insert((*own).to_owned(), value);
        }
    }
}

/// Returns the tool's argument that is most likely meant by an unknown name.
pub(super) fn meant<'a>(properties: &'a Map<String, Value>, given: &str) -> Option<&'a str> {
    let squeezed = squeeze(given);
    let own = |name: &str| properties.get_key_value(name).map(|(name, _)| name.as_str());
    let elsewhere =
        ELSEWHERE.iter().filter(|(others, _)| others.iter().any(|other| squeeze(other) == squeezed));
    if let Some(name) = properties.keys().find(|name| squeeze(name) == squeezed) {
        return Some(name);
    }
    if let Some(name) = elsewhere.flat_map(|(_, ours)| *ours).find_map(|name| own(name)) {
        return Some(name);
    }
    let near = properties.keys().map(|name| (distance(&squeeze(name), &squeezed), name));
    let (distance, name) = near.min()?;
    (distance <= 1 + squeezed.len() / 6 && squeezed.len() > 2).then_some(name)
}

/// Returns whether a name asks for a terminal.
pub(super) fn is_terminal(given: &str) -> bool {
    matches!(&*squeeze(given), "tty" | "pty" | "terminal" | "interactive" | "usepty")
}

/// Returns the letters and digits of a name, in lower case.
fn squeeze(name: &str) -> String {
    name.chars().take(64).filter(char::is_ascii_alphanumeric).map(|c| c.to_ascii_lowercase()).collect()
}

/// Returns how many letters must be added, removed or replaced to turn one name into the other.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.bytes().enumerate() {
        let mut before = row[0];
        row[0] = i + 1;
        for (j, to) in b.bytes().enumerate() {
            let replaced = before + usize::from(from != to);
            before = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(before + 1);
        }
    }
    row[b.len()]
}
