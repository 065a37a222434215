//! Applies the host's configuration to the running system. Whatever fails is reported as a problem; the VM becomes ready anyway.

use std::io::{self, Write};
use std::net::IpAddr;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::Path;
use std::time::Duration;

use nexus_schema::link::{Configure, GuestFile, InitMode};

use super::{clock, network};
use crate::identity::Identity;
use crate::os::{Users, read_small, reason};
use crate::places::{give_to_owner_of, make_directories};

/// The clock is not changed if its error is at most this.
const CLOCK_TOLERANCE: Duration = Duration::from_millis(20);

/// Applies a whole configuration; adds what failed to `problems`.
pub(super) fn apply(configure: &Configure, init: InitMode, problems: &mut Vec<String>) {
    // The clock first, because certificates, logs and file times depend on it.
    note(problems, "set the clock", set_clock(configure.time_unix_ns));
    note(problems, &format!("set the hostname {}", configure.hostname), set_hostname(&configure.hostname));
    for interface in &configure.interfaces {
        note(problems, &format!("bring up the interface {}", interface.mac), network::bring_up(interface));
    }
    if !configure.dns.is_empty() {
        note(problems, "write /etc/resolv.conf", write_resolv_conf(&configure.dns, &configure.search));
    }
    super::mounts::mount_all(&configure.mounts, problems);
    for file in &configure.files {
        note(problems, &format!("write {}", file.path), write_file(file, configure.image_user.as_deref()));
    }
    if let Some(path) = &configure.working_dir {
        let path = Path::new("/").join(path);
        note(problems, &format!("make the working directory {}", path.display()), make_directories(&path));
    }
    // In both modes, PID 1 does the rest.
    let (InitMode::Agent | InitMode::System) = init;
}

fn note(problems: &mut Vec<String>, what: &str, result: io::Result<()>) {
    if let Err(error) = result {
        problems.push(format!("{what}: {}", reason(&error)));
    }
}

/// Returns the parts of the configuration that an agent on a host (outside a VM) refuses, as messages.
pub(super) fn refuse_on_host(configure: &Configure) -> Vec<String> {
    let mut problems = Vec::new();
    if !configure.files.is_empty() {
        problems.push("write files: this guest is a process of the host".into());
    }
    if !configure.mounts.is_empty() {
        problems.push("mount drives: this guest is a process of the host".into());
    }
    if !configure.interfaces.is_empty() {
        problems.push("bring up interfaces: this guest is a process of the host".into());
    }
    problems
}

fn set_clock(unix_ns: u64) -> io::Result<()> {
    let wanted = Duration::from_nanos(unix_ns);
    if clock::now().abs_diff(wanted) <= CLOCK_TOLERANCE { Ok(()) } else { clock::set(wanted) }
}

/// Sets the hostname, now and for programs that look it up.
pub(super) fn set_hostname(name: &str) -> io::Result<()> {
    rustix::system::sethostname(name.as_bytes())?;
    // For the image's own init, which reads it again, and for programs that look up their own name.
    if read_small("/etc/hostname", 256).is_none_or(|old| old.trim() != name) {
        // Written in place, which is less work than a new file. If it is interrupted, the next boot writes it again.
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o644)
            .open("/etc/hostname")?;
        let text = format!("{name}\n");
        file.write_all(text.as_bytes())?;
        file.set_len(text.len() as u64)?;
    }
    let hosts = read_small("/etc/hosts", 1 << 20).unwrap_or_default();
    let known = hosts
        .lines()
        .map(|line| line.split('#').next().unwrap_or_default())
        .any(|line| line.split_whitespace().skip(1).any(|word| word == name));
    if known {
        return Ok(());
    }
    let mut text =
        if hosts.is_empty() { "127.0.0.1\tlocalhost\n::1\tlocalhost\n".to_owned() } else { String::new() };
    if !hosts.is_empty() && !hosts.ends_with('\n') {
        text.push('\n');
    }
    text.push_str(&format!("127.0.1.1\t{name}\n"));
    let mut file = std::fs::OpenOptions::new().append(true).create(true).mode(0o644).open("/etc/hosts")?;
    file.write_all(text.as_bytes())
}

fn write_resolv_conf(servers: &[IpAddr], search: &[String]) -> io::Result<()> {
    let mut text: String = servers.iter().map(|server| format!("nameserver {server}\n")).collect();
    if !search.is_empty() {
        text.push_str(&format!("search {}\n", search.join(" ")));
    }
    // If it is a link to the file of another resolver, the link is replaced.
    replace("/etc/resolv.conf", text.as_bytes(), 0o644)
}

/// Writes a file and syncs it to disk, because the host sends it only once.
fn write_file(file: &GuestFile, image_user: Option<&str>) -> io::Result<()> {
    let refuse = |text: &str| io::Error::new(io::ErrorKind::InvalidInput, text);
    let path = Path::new(&file.path);
    if !path.is_absolute() || file.path.contains('\0') {
        return Err(refuse("not an absolute path"));
    }
    let content = data_encoding::BASE64.decode(file.content_base64.as_bytes());
    let content = content.map_err(|_| refuse("not base64"))?;
    let owner = match &file.user {
        None => None,
        Some(user) => {
            let who = Identity::resolve(Some(user), image_user, &Users::read());
            let who = who.map_err(|error| refuse(&error.message))?;
            let (own, own_group) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
            Some(who.credentials.map_or((own, own_group), |is| (is.uid, is.gid)))
        }
    };
    let parent = path.parent().ok_or_else(|| refuse("not the path of a file"))?;
    make_directories(parent)?;
    replace_for(path, &content, file.mode & 0o7777, owner)?;
    sync(path, libc::O_NOFOLLOW)?;
    sync(parent, libc::O_DIRECTORY)
}

/// Syncs what is at a path to disk. Never waits for a pipe that took its place, and no terminal there becomes the agent's own.
fn sync(path: &Path, flags: i32) -> io::Result<()> {
    let flags = flags | libc::O_NONBLOCK | libc::O_NOCTTY;
    std::fs::OpenOptions::new().read(true).custom_flags(flags).open(path)?.sync_all()
}

/// Replaces a file atomically. The new file has the owner of the old one, or of its directory.
pub(crate) fn replace(path: impl AsRef<Path>, content: &[u8], mode: u32) -> io::Result<()> {
    replace_for(path.as_ref(), content, mode, None)
}

/// Replaces a file atomically, with the given uid and gid as owner.
fn replace_for(path: &Path, content: &[u8], mode: u32, owner: Option<(u32, u32)>) -> io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".nexus-new");
    let _ = std::fs::remove_file(&temporary);
    let written = (|| {
        let mut file =
            std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
        file.write_all(content)?;
        match (std::fs::symlink_metadata(path), path.parent()) {
            _ if owner.is_some() => fchown(&file, owner.map(|is| is.0), owner.map(|is| is.1))?,
            (Ok(old), _) if old.is_file() => fchown(&file, Some(old.uid()), Some(old.gid()))?,
            (_, Some(directory)) => give_to_owner_of(directory, &file)?,
            (_, None) => {}
        }
        // After the owner, because changing the owner clears setuid bits.
        file.set_permissions(std::fs::Permissions::from_mode(mode))?;
        drop(file);
        std::fs::rename(&temporary, path)
    })();
    if written.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_became_a_pipe_is_not_waited_for() {
        let root = tempfile::tempdir().unwrap();
        let (file, pipe) = (root.path().join("file"), root.path().join("pipe"));
        std::fs::write(&file, "content").unwrap();
        let (kind, mode) = (rustix::fs::FileType::Fifo, rustix::fs::Mode::from_raw_mode(0o600));
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, kind, mode, 0).unwrap();
        sync(&file, libc::O_NOFOLLOW).unwrap();
        sync(root.path(), libc::O_DIRECTORY).unwrap();
        let (told, hears) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let synced = [libc::O_NOFOLLOW, libc::O_DIRECTORY].map(|flags| sync(&pipe, flags).is_ok());
            let _ = told.send(synced);
        });
        assert_eq!(hears.recv_timeout(Duration::from_secs(60)), Ok([false; 2]));
    }
}
