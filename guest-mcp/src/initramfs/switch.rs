//! From the initramfs to the root drive, as switch_root(8) does it.

use std::convert::Infallible;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use nexus_schema::link::InitMode;

use super::BootError;
use crate::console::say;
use crate::os::{mount, reason};
use crate::role::{BINARY, POWER_NAMES};

/// Where the root drive is mounted before it is the root.
pub(super) const NEW_ROOT: &str = "/newroot";
/// The inits of images, in the kernel's own order after systemd's usual places.
const INITS: [&str; 6] = [
    "/sbin/init",
    "/usr/sbin/init",
    "/lib/systemd/systemd",
    "/usr/lib/systemd/systemd",
    "/etc/init",
    "/bin/init",
];

/// Keeps this binary, its other names and what went wrong so far in `/run/nexus` of the new root.
pub(super) fn prepare(problems: &[String]) -> Result<(), BootError> {
    let run = format!("{NEW_ROOT}/run");
    let ours = format!("{run}/nexus");
    // On a mount point of its own: an image's init leaves a mounted /run alone, and may forbid programs in it.
    mount("tmpfs", &run, "tmpfs", "mode=755")?;
    mount("tmpfs", &ours, "tmpfs", "mode=755,size=32m")?;
    let inside = |path: &str| format!("{NEW_ROOT}{path}");
    let file = |what, path: String| move |source| BootError::File { what, path: path.into(), source };

    // The file itself and no copy: its pages are in memory already, and an emulator has translated them.
    let binary = inside(BINARY);
    std::fs::File::create(&binary)
        .and_then(|_| Ok(rustix::mount::mount_bind("/init", &binary)?))
        .map_err(file("place the agent at", binary))?;
    let bin = format!("{ours}/bin");
    std::fs::create_dir(&bin).map_err(file("create", bin.clone()))?;
    for name in POWER_NAMES {
        let link = format!("{bin}/{name}");
        std::os::unix::fs::symlink("../nexus-guest", &link).map_err(file("create", link))?;
    }
    if !problems.is_empty() {
        let list = format!("{ours}/problems");
        std::fs::write(&list, problems.join("\n")).map_err(file("write", list))?;
    }
    Ok(())
}

/// Makes the new root the root, and gives the initramfs's memory back.
pub(super) fn switch() -> Result<(), BootError> {
    for name in ["dev", "proc", "sys"] {
        let target = format!("{NEW_ROOT}/{name}");
        let moved = make_directory(&target)
            .and_then(|()| Ok(rustix::mount::mount_move(format!("/{name}"), &target)?));
        moved.map_err(|source| BootError::File {
            what: "move a filesystem to",
            path: target.into(),
            source,
        })?;
    }
    // What stays is memory lost, no more.
    let _ = std::fs::remove_dir_all("/modules");
    let switched = (|| {
        rustix::process::chdir(NEW_ROOT)?;
        rustix::mount::mount_move(".", "/")?;
        rustix::process::chroot(".")?;
        rustix::process::chdir("/")
    })();
    switched.map_err(|error| BootError::Switch(error.into()))
}

fn make_directory(path: &str) -> io::Result<()> {
    match std::fs::create_dir(path) {
        Err(error) if !Path::new(path).is_dir() => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Becomes PID 1 of the new root.
pub(super) fn start(init: InitMode) -> Result<Infallible, BootError> {
    match init {
        // This binary itself, which need not be executed again for that.
        InitMode::Agent => Ok(crate::init::live()?),
        InitMode::System => {
            if let Err(source) = Command::new(BINARY).arg("supervise").spawn() {
                return Err(BootError::File { what: "execute", path: BINARY.into(), source });
            }
            for path in INITS {
                if !Path::new(path).exists() {
                    continue;
                }
                let error = Command::new(path).exec();
                say(format_args!("execute {path}: {}", reason(&error)));
            }
            Err(BootError::NoInit { tried: INITS.join(", ") })
        }
    }
}
