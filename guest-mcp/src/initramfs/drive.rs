//! The root drive: waits for it, mounts it, and grows its filesystem.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::Timespec;
use rustix::mount::MountFlags;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, netlink};

use super::BootError;
use crate::ext4::grow;
use crate::os::reason;
use crate::sys::read_ahead;

/// How long the drive may take to appear. Generous, for a busy host with software emulation.
const APPEAR_TIMEOUT: Duration = Duration::from_secs(30);
/// The same timeout if no modules had to be loaded.
const BUILT_IN_TIMEOUT: Duration = Duration::from_secs(10);
/// How much of a file is read ahead, in sectors of 512 bytes. Each read is a round trip to the host, and starting a program
/// reads most of it; Linux's default of 128 KiB needs many.
const READ_AHEAD_SECTORS: usize = 1024;
/// The multicast group of the kernel's own events (lib/kobject_uevent.c).
const KERNEL_GROUP: u32 = 1;

/// A listener for the kernel's device events.
pub(crate) struct Events {
    socket: Option<OwnedFd>,
}

impl Events {
    /// Starts to listen. Call it before modules are loaded, so that no event is missed.
    pub(crate) fn listen() -> Self {
        let open = || {
            let protocol = Some(netlink::KOBJECT_UEVENT);
            let kind =
                (AddressFamily::NETLINK, SocketType::DGRAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK);
            let socket = rustix::net::socket_with(kind.0, kind.1, kind.2, protocol)?;
            rustix::net::bind(&socket, &SocketAddrNetlink::new(0, KERNEL_GROUP))?;
            Ok::<_, rustix::io::Errno>(socket)
        };
        Self { socket: open().ok() }
    }

    /// Waits for an event, at most for `most`.
    pub(crate) fn wait(&self, most: Duration) {
        // Without events, the caller must check again periodically.
        let most = if self.socket.is_some() { most } else { most.min(Duration::from_millis(50)) };
        let timeout = Timespec { tv_sec: most.as_secs() as i64, tv_nsec: i64::from(most.subsec_nanos()) };
        let mut fds: Vec<PollFd<'_>> =
            self.socket.iter().map(|socket| PollFd::new(socket, PollFlags::IN)).collect();
        if poll(&mut fds, Some(&timeout)).is_err() {
            return;
        }
        drop(fds);
        let mut event = [0; 4096];
        while let Some(socket) = &self.socket
            && rustix::net::recv(socket, &mut event, RecvFlags::empty()).is_ok()
        {}
    }
}

/// Waits until the device exists; `modules` is how many modules were loaded.
pub(super) fn wait_for(device: &str, events: &Events, modules: usize) -> Result<(), BootError> {
    // Devices of built-in drivers existed before this program started.
    let limit = if modules == 0 { BUILT_IN_TIMEOUT } else { APPEAR_TIMEOUT };
    let deadline = Instant::now() + limit;
    loop {
        // Opened, not just looked at: the node appears a moment before the drive does.
        match File::open(device) {
            Ok(drive) => {
                read_further_ahead(&drive);
                return Ok(());
            }
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENXIO | libc::ENODEV)) => {
            }
            Err(source) => return Err(BootError::File { what: "open", path: device.into(), source }),
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(BootError::NoDrive { device: device.into(), seconds: limit.as_secs(), modules });
        }
        events.wait(left);
    }
}

/// Sets a larger read-ahead for a drive that is mounted after this.
pub(crate) fn read_further_ahead(drive: &File) {
    // A failure only makes programs start more slowly.
    let _ = read_ahead(drive, READ_AHEAD_SECTORS);
}

/// Mounts the root filesystem and grows it; adds minor problems to `problems`.
pub(super) fn mount_root(device: &str, at: &str, problems: &mut Vec<String>) -> Result<(), BootError> {
    let fail = |source: io::Error| BootError::Root { device: device.into(), source };
    std::fs::create_dir_all(at).map_err(fail)?;
    // The inode tables of a new drive are holes, which read as zeros. Writing them would only fill the host's disk.
    let mount = |flags| rustix::mount::mount(device, at, "ext4", flags, Some(c"noinit_itable"));
    match mount(MountFlags::empty()) {
        Ok(()) => {}
        Err(rustix::io::Errno::ACCESS | rustix::io::Errno::ROFS) => {
            mount(MountFlags::RDONLY).map_err(|error| fail(error.into()))?;
            problems.push(format!("the root drive {device} is read-only"));
            return Ok(());
        }
        Err(error) => return Err(fail(error.into())),
    }
    if let Err(error) = grow(Path::new(device), Path::new(at)) {
        problems.push(format!("grow the root filesystem to its drive: {}", reason(&error)));
    }
    Ok(())
}
