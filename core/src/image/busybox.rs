//! A root filesystem with one static BusyBox: tiny and fast.

use std::path::Path;

use super::ImageError;
use super::contents::Contents;
use super::tree::{Attributes, Body, Tree};

/// Anything larger is not a BusyBox.
const BINARY_MAX: u64 = 32 << 20;

const DIRECTORIES: [(&str, u16); 20] = [
    ("/", 0o755),
    ("/bin", 0o755),
    ("/dev", 0o755),
    ("/etc", 0o755),
    ("/etc/init.d", 0o755),
    ("/home", 0o755),
    ("/lib", 0o755),
    ("/mnt", 0o755),
    ("/opt", 0o755),
    ("/proc", 0o555),
    ("/root", 0o700),
    ("/run", 0o755),
    ("/srv", 0o755),
    ("/sys", 0o555),
    ("/tmp", 0o1777),
    ("/usr", 0o755),
    ("/usr/lib", 0o755),
    ("/usr/share", 0o755),
    ("/var/log", 0o755),
    ("/var/tmp", 0o1777),
];

const LINKS: [(&str, &str); 5] = [
    ("/sbin", "bin"),
    ("/usr/bin", "../bin"),
    ("/usr/sbin", "../bin"),
    ("/var/run", "../run"),
    ("/etc/mtab", "/proc/self/mounts"),
];

const FILES: [(&str, u16, &str); 11] = [
    (
        "/etc/passwd",
        0o644,
        "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n",
    ),
    ("/etc/group", 0o644, "root:x:0:\ntty:x:5:\nusers:x:100:\nnogroup:x:65534:\n"),
    ("/etc/shadow", 0o640, "root:*:19000:0:99999:7:::\nnobody:*:19000:0:99999:7:::\n"),
    ("/etc/shells", 0o644, "/bin/sh\n/bin/ash\n"),
    (
        "/etc/profile",
        0o644,
        "export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\numask 022\n",
    ),
    ("/etc/hostname", 0o644, "nexus\n"),
    ("/etc/hosts", 0o644, "127.0.0.1 localhost\n::1 localhost\n"),
    ("/etc/resolv.conf", 0o644, ""),
    ("/etc/nsswitch.conf", 0o644, "passwd: files\ngroup: files\nhosts: files dns\n"),
    (
        "/etc/inittab",
        0o644,
        "::sysinit:/etc/init.d/rcS\n::ctrlaltdel:/sbin/reboot\n::shutdown:/bin/umount -a -r\n",
    ),
    ("/etc/init.d/rcS", 0o755, "#!/bin/sh\nmount -a 2>/dev/null\nhostname -F /etc/hostname\n"),
];

/// Applets of every BusyBox; used if the binary's own list cannot be read.
const USUAL: [&str; 24] = [
    "ash", "cat", "chmod", "chown", "cp", "df", "echo", "env", "false", "grep", "head", "kill", "ln", "ls",
    "mkdir", "mount", "mv", "ps", "rm", "sh", "sleep", "tail", "true", "umount",
];

/// Puts the root filesystem into a tree.
pub(crate) fn put(
    binary: &Path,
    tree: &mut Tree,
    contents: &mut Contents,
    now: i64,
) -> Result<(), ImageError> {
    let failed = |e| ImageError::source(binary, e);
    let size = fs_err::metadata(binary).map_err(failed)?.len();
    if size > BINARY_MAX {
        return Err(ImageError::TooLarge { limit: BINARY_MAX, what: "bytes in its BusyBox" });
    }
    let bytes = fs_err::read(binary).map_err(failed)?;
    if !bytes.starts_with(b"\x7fELF") {
        let none = std::io::Error::new(std::io::ErrorKind::InvalidData, "not an ELF program");
        return Err(ImageError::source(binary, none));
    }
    for (path, mode) in DIRECTORIES {
        tree.put_directory(path.as_bytes(), Attributes::root(mode, now))?;
    }
    tree.put_directory(b"/var", Attributes::root(0o755, now))?;
    for (path, target) in LINKS {
        tree.put(path.as_bytes(), Attributes::root(0o777, now), Body::Symlink(target.as_bytes().into()))?;
    }
    for (path, mode, text) in FILES {
        let content = contents.keep(text.as_bytes())?;
        tree.put(path.as_bytes(), Attributes::root(mode, now), Body::File(content))?;
    }
    let release = "ID=busybox\nNAME=BusyBox\nPRETTY_NAME=\"BusyBox\"\n";
    let release = match version(&bytes) {
        Some(version) => format!("{release}VERSION_ID={version}\n"),
        None => release.to_owned(),
    };
    let content = contents.keep(release.as_bytes())?;
    tree.put(b"/etc/os-release", Attributes::root(0o644, now), Body::File(content))?;
    let content = contents.keep(&bytes)?;
    tree.put(b"/bin/busybox", Attributes::root(0o755, now), Body::File(content))?;
    let own = applets(&bytes);
    let names = if own.is_empty() { USUAL.to_vec() } else { own };
    for name in names {
        if name != "busybox" {
            let path = format!("/bin/{name}");
            tree.put(path.as_bytes(), Attributes::root(0o777, now), Body::Symlink((*b"busybox").into()))?;
        }
    }
    Ok(())
}

/// The applets in a binary. BusyBox keeps their names sorted, each NUL-terminated, starting with `[` and `[[`.
fn applets(binary: &[u8]) -> Vec<&str> {
    const FIRST: &[u8] = b"\0[\0[[\0";
    let starts = binary.windows(FIRST.len()).enumerate().filter(|(_, w)| *w == FIRST);
    for (at, _) in starts {
        let names: Vec<&str> =
            binary[at + 1..].split(|b| *b == 0).map_while(|name| applet(name)).take(1000).collect();
        if names.contains(&"sh") && names.is_sorted() {
            return names;
        }
    }
    Vec::new()
}

fn applet(name: &[u8]) -> Option<&str> {
    let fine = |b: &u8| b.is_ascii_alphanumeric() || b"[_-.".contains(b);
    let plausible = !name.is_empty() && name.len() < 32 && name != b"." && name.iter().all(fine);
    std::str::from_utf8(name).ok().filter(|_| plausible)
}

/// The version in a binary: `BusyBox v1.35.0 (…)`.
fn version(binary: &[u8]) -> Option<&str> {
    const BEFORE: &[u8] = b"BusyBox v";
    let at = binary.windows(BEFORE.len()).position(|w| w == BEFORE)? + BEFORE.len();
    let rest = &binary[at..(at + 32).min(binary.len())];
    let end = rest.iter().position(|b| !(b.is_ascii_digit() || *b == b'.'))?;
    std::str::from_utf8(&rest[..end]).ok().filter(|v| !v.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn applets_are_read_from_the_binary() {
        let binary =
            b"\x7fELF..\0[\0[[\0no\n\0..BusyBox v1.36.1 (Debian)\0\0[\0[[\0ash\0cat\0sh\0zcat\0\0rest\0";
        assert_eq!(applets(binary), ["[", "[[", "ash", "cat", "sh", "zcat"]);
        assert_eq!(version(binary), Some("1.36.1"));
        assert!(applets(b"\0[\0[[\0").is_empty() && version(b"BusyBox v").is_none());
    }
}
