//! The root drive: waited for, mounted, and its filesystem grown to it.
//!
//! Layout of the superblock: Documentation/filesystems/ext4/super.rst of the kernel.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::Timespec;
use rustix::mount::MountFlags;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, netlink};

use super::BootError;
use crate::os::reason;
use crate::sys::resize_ext4;

/// How long the drive may take to appear; generous, for a busy host that emulates.
const APPEAR_TIMEOUT: Duration = Duration::from_secs(30);
/// The multicast group of the kernel's own events (lib/kobject_uevent.c).
const KERNEL_GROUP: u32 = 1;

/// The kernel's announcements of devices.
pub(super) struct Events {
    socket: Option<OwnedFd>,
}

impl Events {
    /// Starts to listen; before the modules are loaded, so that nothing is missed.
    pub(super) fn listen() -> Self {
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

    /// Waits until something was announced, or for `most`.
    pub(super) fn wait(&self, most: Duration) {
        // Without events it is looked again every so often.
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

/// Waits until the device is there.
pub(super) fn wait_for(device: &str, events: &Events) -> Result<(), BootError> {
    let deadline = Instant::now() + APPEAR_TIMEOUT;
    loop {
        // Opening, not only looking: the node comes a moment before the drive does.
        match File::open(device) {
            Ok(_) => return Ok(()),
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENXIO | libc::ENODEV)) => {
            }
            Err(source) => return Err(BootError::File { what: "open", path: device.into(), source }),
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(BootError::NoDrive { device: device.into(), seconds: APPEAR_TIMEOUT.as_secs() });
        }
        events.wait(left);
    }
}

/// Mounts the root filesystem and grows it; what could not be done well is added to `problems`.
pub(super) fn mount_root(device: &str, at: &str, problems: &mut Vec<String>) -> Result<(), BootError> {
    let fail = |source: io::Error| BootError::Root { device: device.into(), source };
    std::fs::create_dir_all(at).map_err(fail)?;
    let mount = |flags| rustix::mount::mount(device, at, "ext4", flags, None);
    match mount(MountFlags::empty()) {
        Ok(()) => {}
        Err(rustix::io::Errno::ACCESS | rustix::io::Errno::ROFS) => {
            mount(MountFlags::RDONLY).map_err(|error| fail(error.into()))?;
            problems.push(format!("the root drive {device} is read-only"));
            return Ok(());
        }
        Err(error) => return Err(fail(error.into())),
    }
    if let Err(error) = grow(device, at) {
        problems.push(format!("grow the root filesystem to its drive: {}", reason(&error)));
    }
    Ok(())
}

/// Where a filesystem's superblock is on its device.
pub(super) const SUPERBLOCK_AT: u64 = 1024;

/// What is needed of an ext4 superblock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Superblock {
    blocks: u64,
    block_size: u64,
    blocks_per_group: u64,
}

impl Superblock {
    fn read(device: &File) -> io::Result<Self> {
        let mut bytes = [0; 1024];
        device.read_exact_at(&mut bytes, SUPERBLOCK_AT)?;
        Self::parse(&bytes).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no ext4 superblock"))
    }

    /// The UUID of the filesystem; `None` if it is no ext4.
    pub(super) fn uuid(bytes: &[u8; 1024]) -> Option<[u8; 16]> {
        Self::parse(bytes)?;
        bytes[0x68..0x78].try_into().ok()
    }

    fn parse(bytes: &[u8; 1024]) -> Option<Self> {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let magic = u16::from_le_bytes([bytes[0x38], bytes[0x39]]);
        let log_block_size = word(0x18);
        if magic != 0xEF53 || log_block_size > 6 {
            return None;
        }
        // INCOMPAT_64BIT
        let high = if word(0x60) & 0x80 != 0 { u64::from(word(0x150)) } else { 0 };
        Some(Self {
            blocks: high << 32 | u64::from(word(0x4)),
            block_size: 1024 << log_block_size,
            blocks_per_group: u64::from(word(0x20)),
        })
    }
}

/// Grows a mounted filesystem to the size of its device.
///
/// The kernel itself goes on with meta_bg once the blocks reserved for group descriptors are used up.
fn grow(device: &str, mounted_at: &str) -> io::Result<()> {
    let mut drive = File::open(device)?;
    let size = drive.seek(SeekFrom::End(0))?;
    let before = Superblock::read(&drive)?;
    let wanted = size / before.block_size;
    // A last group that would be smaller than its own bookkeeping is not made.
    let is_enough = |blocks: u64| blocks.saturating_add(before.blocks_per_group) > wanted;
    if wanted <= before.blocks || (is_enough(before.blocks) && wanted - before.blocks < 1024) {
        return Ok(());
    }
    resize_ext4(File::open(mounted_at)?, wanted)?;
    let after = Superblock::read(&drive)?;
    if is_enough(after.blocks) {
        return Ok(());
    }
    let mib = |blocks: u64| blocks.saturating_mul(before.block_size) >> 20;
    let text = format!("it stays at {} of {} MiB", mib(after.blocks), mib(wanted));
    Err(io::Error::other(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn superblocks_are_read() {
        let mut bytes = [0; 1024];
        assert_eq!(Superblock::parse(&bytes), None);
        bytes[0x38..0x3a].copy_from_slice(&0xEF53_u16.to_le_bytes());
        bytes[0x4..0x8].copy_from_slice(&65_536_u32.to_le_bytes());
        bytes[0x18] = 2;
        bytes[0x20..0x24].copy_from_slice(&32_768_u32.to_le_bytes());
        let parsed = Superblock { blocks: 65_536, block_size: 4096, blocks_per_group: 32_768 };
        assert_eq!(Superblock::parse(&bytes), Some(parsed));
        bytes[0x68..0x78].copy_from_slice(&[7; 16]);
        assert_eq!(Superblock::uuid(&bytes), Some([7; 16]));
        assert_eq!(Superblock::uuid(&[0; 1024]), None);
        bytes[0x60] = 0x80;
        bytes[0x150] = 1;
        assert_eq!(Superblock::parse(&bytes).map(|s| s.blocks), Some((1 << 32) + 65_536));
    }
}
