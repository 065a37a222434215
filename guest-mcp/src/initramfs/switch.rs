//! Switches from the initramfs to the root drive, as switch_root(8) does.

use std::convert::Infallible;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use nexus_schema::link::InitMode;

use rustix::fs::Mode;
use rustix::io::Errno;

use super::image::{Place, Root};
use super::{BootError, Orders, fill};
use crate::console::say;
use crate::os::{mount, reason};
use crate::role::{BINARY, POWER_NAMES};

/// Where the root drive is mounted before it becomes the root.
pub(super) const NEW_ROOT: &str = "/newroot";
/// The paths of inits in images: systemd's usual places, then the kernel's own order.
const INITS: [&str; 6] = [
    "/sbin/init",
    "/usr/sbin/init",
    "/lib/systemd/systemd",
    "/usr/lib/systemd/systemd",
    "/etc/init",
    "/bin/init",
];

/// Files of an earlier init in /run, which would confuse the next one.
const OF_INITS: [&str; 6] = ["nexus", "systemd", "udev", "openrc", "initctl", "utmp"];
/// Never copied from an image's /run.
const OURS: &str = "nexus";

/// Mounts /run in the new root, and /tmp if it should be in memory, both filled with what the image has there. Puts this
/// binary, its other names and the problems so far into `/run/nexus`.
pub(super) fn prepare(orders: &Orders, problems: &mut Vec<String>) -> Result<Root, BootError> {
    let root = Root::open(NEW_ROOT).map_err(|error| BootError::Switch(error.into()))?;
    let but: &[&str] = match orders.init {
        InitMode::Agent => &[OURS],
        InitMode::System => &OF_INITS,
    };
    let run = mount_filled(&root, "run", "mode=755", but, problems)?;
    let is_read_only = rustix::fs::statvfs(NEW_ROOT)
        .is_ok_and(|root| root.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY));
    if orders.tmp_in_memory || is_read_only {
        mount_filled(&root, "tmp", "mode=1777", &[], problems)?;
    } else if root.find("tmp").is_ok_and(|tmp| tmp.is_none()) {
        let made =
            root.place("tmp").and_then(|tmp| rustix::fs::chmod(tmp.path(), Mode::from_raw_mode(0o1777)));
        if let Err(error) = made {
            problems.push(format!("create /tmp: {}", reason(&error.into())));
        }
    }

    let run = run.path();
    let ours = format!("{run}/nexus");
    // A separate mount: an image's init leaves a mounted /run alone, but may remount it `noexec`.
    mount("tmpfs", &ours, "tmpfs", "mode=755,size=32m")?;
    let file = |what, path: String| move |source| BootError::File { what, path: path.into(), source };

    // A bind mount instead of a copy: its pages are in memory already, and an emulator has already translated them.
    let binary = format!("{ours}/nexus-guest");
    std::fs::File::create(&binary)
        .and_then(|_| Ok(rustix::mount::mount_bind("/init", &binary)?))
        .map_err(file("place the agent at", BINARY.into()))?;
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
    Ok(root)
}

/// Mounts an in-memory filesystem on a directory of the image, filled with what the image has there except for the names in
/// `but`.
fn mount_filled(
    root: &Root,
    path: &str,
    options: &str,
    but: &[&str],
    problems: &mut Vec<String>,
) -> Result<Place, BootError> {
    let fail = |error: Errno| BootError::File {
        what: "mount a tmpfs on",
        path: format!("/{path}").into(),
        source: error.into(),
    };
    let hidden = root.find(path).map_err(fail)?;
    let below = root.place(path).map_err(fail)?;
    mount("tmpfs", &below.path(), "tmpfs", options)?;
    // Opened again, because the earlier descriptor refers to the directory that is now hidden.
    let place = root.place(path).map_err(fail)?;
    if let Some(hidden) = hidden {
        let owned = fill::own_as(&place.0, &hidden.0).err().map(|error| reason(&error.into()));
        if let Some(problem) = fill::fill(&hidden.0, &place.0, but).or(owned) {
            problems.push(format!("fill /{path} from the image: {problem}"));
        }
    }
    Ok(place)
}

/// Makes the new root the root, and frees the initramfs's memory.
pub(super) fn switch(root: &Root) -> Result<(), BootError> {
    // /proc last, because the places are addressed through it.
    for name in ["dev", "sys", "proc"] {
        let moved =
            root.place(name).and_then(|place| rustix::mount::mount_move(format!("/{name}"), place.path()));
        moved.map_err(|error| BootError::File {
            what: "move a filesystem to",
            path: format!("/{name}").into(),
            source: error.into(),
        })?;
    }
    // A failure only wastes memory.
    let _ = std::fs::remove_dir_all("/modules");
    let switched = (|| {
        rustix::process::chdir(NEW_ROOT)?;
        rustix::mount::mount_move(".", "/")?;
        rustix::process::chroot(".")?;
        rustix::process::chdir("/")
    })();
    switched.map_err(|error| BootError::Switch(error.into()))
}

/// Becomes PID 1 of the new root.
pub(super) fn start(init: InitMode) -> Result<Infallible, BootError> {
    match init {
        // This process itself, without another exec.
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
