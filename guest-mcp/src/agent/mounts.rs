//! Data drives: found by the label of their filesystem, mounted at the path that the host gives, and grown when the drive has grown.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nexus_schema::link::Mount;
use rustix::mount::MountFlags;

use crate::ext4::{self, Superblock};
use crate::initramfs::drive::{Events, read_further_ahead};
use crate::os::{read_small, reason, unescape};
use crate::places::{make_directories, mounted_on};

/// Timeout for a drive to appear.
const APPEAR_TIMEOUT: Duration = Duration::from_secs(10);
/// The interval of checks for a drive while no event arrives: a filesystem may become visible late.
const STEP: Duration = Duration::from_millis(500);

/// Timeout for the kernel to notice that a drive has grown.
const RESIZE_TIMEOUT: Duration = Duration::from_secs(2);
/// The kernel's list of block devices.
const BLOCK_DEVICES: &str = "/sys/block";
/// The unit of their sizes, in bytes.
const SECTOR: u64 = 512;

/// Mounts the drives of a configuration in the given order; adds what could not be mounted to `problems`.
pub(super) fn mount_all(mounts: &[Mount], problems: &mut Vec<String>) {
    for wanted in mounts {
        if let Err(error) = mount(wanted, problems) {
            problems.push(format!("mount the drive {} at {}: {}", wanted.label, wanted.path, reason(&error)));
        }
    }
}

fn mount(wanted: &Mount, problems: &mut Vec<String>) -> io::Result<()> {
    let place = Path::new(&wanted.path);
    if !place.is_absolute() || wanted.path.contains('\0') {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not an absolute path"));
    }
    let device = wait_for(&wanted.label)?;
    // After a restart of the agent, the drives are mounted already.
    let drive = File::open(&device)?;
    let number = drive.metadata()?.rdev();
    if mounted_on(place) == Some((libc::major(number), libc::minor(number))) {
        return Ok(());
    }
    make_directories(place)?;
    read_further_ahead(&drive);
    let flags = if wanted.read_only { MountFlags::RDONLY } else { MountFlags::empty() };
    rustix::mount::mount(&device, place, "ext4", flags, None)?;
    if !wanted.read_only
        && let Err(error) = ext4::grow(&device, place)
    {
        problems.push(format!("grow the filesystem at {} to its drive: {}", wanted.path, reason(&error)));
    }
    Ok(())
}

/// Grows every mounted filesystem to the size of its drive, once a drive has the size `bytes`; returns the failures as messages.
pub(super) fn grow_all(bytes: Option<u64>) -> Vec<String> {
    if let Some(bytes) = bytes {
        wait_for_size(Path::new(BLOCK_DEVICES), bytes, RESIZE_TIMEOUT);
    }
    let mut problems = Vec::new();
    let mut done: Vec<PathBuf> = Vec::new();
    for (device, place) in mounted() {
        if done.contains(&device) {
            continue;
        }
        if let Err(error) = ext4::grow(&device, &place) {
            problems.push(format!("grow the filesystem at {}: {}", place.display(), reason(&error)));
        }
        done.push(device);
    }
    problems
}

/// Waits until a drive has a size. The kernel hears of a new size by itself, perhaps a moment later than this agent.
fn wait_for_size(devices: &Path, bytes: u64, most: Duration) {
    let events = Events::listen();
    let deadline = Instant::now() + most;
    while !has_size(devices, bytes) {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        events.wait(left.min(STEP));
    }
}

/// Returns whether a block device has a size, which its VMM may have rounded up to a page.
fn has_size(devices: &Path, bytes: u64) -> bool {
    let sizes = bytes..=bytes.next_multiple_of(4096);
    let devices = std::fs::read_dir(devices).into_iter().flatten().flatten();
    let mut sectors =
        devices.filter_map(|device| read_small(device.path().join("size"), 32)?.trim().parse::<u64>().ok());
    sectors.any(|sectors| sizes.contains(&sectors.saturating_mul(SECTOR)))
}

fn wait_for(label: &str) -> io::Result<PathBuf> {
    let events = Events::listen();
    let deadline = Instant::now() + APPEAR_TIMEOUT;
    loop {
        if let Some(device) = find(label) {
            return Ok(device);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::Error::new(io::ErrorKind::NotFound, "no drive has this label"));
        }
        events.wait(left.min(STEP));
    }
}

/// Returns the drive whose filesystem has this label.
fn find(label: &str) -> Option<PathBuf> {
    let drives = std::fs::read_dir(BLOCK_DEVICES).ok()?;
    drives.flatten().map(|drive| Path::new("/dev").join(drive.file_name())).find(|device| {
        let superblock = File::open(device).and_then(|file| Superblock::read(&file));
        superblock.is_ok_and(|superblock| superblock.is_labelled(label))
    })
}

/// Returns every mounted writable ext4 filesystem: its drive and one of its mount points.
///
/// Fields of proc_pid_mountinfo(5): the 3rd is the device number, the 5th the mount point; after ` - ` come type, source and options.
fn mounted() -> Vec<(PathBuf, PathBuf)> {
    let table = read_small("/proc/self/mountinfo", 4 << 20).unwrap_or_default();
    table.lines().filter_map(parse).collect()
}

fn parse(line: &str) -> Option<(PathBuf, PathBuf)> {
    let (left, right) = line.split_once(" - ")?;
    let mut right = right.split(' ');
    if right.next()? != "ext4" {
        return None;
    }
    let _source = right.next()?;
    if right.next()?.split(',').any(|option| option == "ro") {
        return None;
    }
    let number = left.split(' ').nth(2)?;
    let place = unescape(left.split(' ').nth(4)?);
    // By number, because the source can be any text.
    let link = std::fs::read_link(Path::new("/sys/dev/block").join(number)).ok()?;
    Some((Path::new("/dev").join(link.file_name()?), place))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drive_has_a_size_once_the_kernel_says_so() {
        let devices = tempfile::tempdir().unwrap();
        let (none, some) = (devices.path().join("zram0"), devices.path().join("vda"));
        std::fs::create_dir(none).unwrap();
        std::fs::create_dir(&some).unwrap();
        std::fs::write(some.join("size"), "524288\n").unwrap();
        let size = 256 << 20;
        for (bytes, is_there) in
            [(size, true), (size - 1, true), (size - 4096, false), (size + 1, false), (0, false)]
        {
            assert_eq!(has_size(devices.path(), bytes), is_there, "{bytes}");
        }
        let start = Instant::now();
        wait_for_size(devices.path(), size, Duration::from_secs(60));
        assert!(start.elapsed() < Duration::from_secs(30));
        // One that never has it is not waited for without end.
        wait_for_size(devices.path(), 2 * size, Duration::from_millis(20));
    }

    #[test]
    fn other_filesystems_and_read_only_ones_are_left_alone() {
        assert_eq!(parse("22 28 0:21 / /sys rw,nosuid - sysfs sysfs rw"), None);
        assert_eq!(parse("30 28 254:16 / /mnt/x ro - ext4 /dev/vdb ro"), None);
        assert_eq!(parse("nonsense"), None);
    }
}
