//! A full disk of the host: firecracker does not pause its guest, whose writes fail, but says so in its log.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

use crate::vmm::driver::LogListener;

/// The longest start of a line that is kept until its end arrives, in bytes.
const LINE_MAX: usize = 4096;

/// Whether the log has reported writes that failed because the host's disk is full. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct FullDisk(Arc<State>);

#[derive(Debug)]
struct State {
    is_reported: AtomicBool,
    /// Readable after a report.
    event: OwnedFd,
}

impl FullDisk {
    pub(super) fn new() -> Result<Self, Errno> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self(Arc::new(State { is_reported: AtomicBool::new(false), event })))
    }

    /// Returns a listener for the log.
    pub(super) fn listener(&self) -> LogListener {
        let (full, mut line) = (self.clone(), Vec::new());
        Box::new(move |piece| {
            for part in piece.split_inclusive(|&byte| byte == b'\n') {
                line.extend_from_slice(&part[..part.len().min(LINE_MAX - line.len())]);
                if part.ends_with(b"\n") {
                    if reports_full_disk(&String::from_utf8_lossy(&line)) {
                        full.report();
                    }
                    line.clear();
                }
            }
        })
    }

    fn report(&self) {
        self.0.is_reported.store(true, Ordering::Release);
        // It stays readable if it was before.
        rustix::io::write(&self.0.event, &1u64.to_ne_bytes()).ok();
    }

    /// Whether writes have failed since the last [`FullDisk::forget`].
    pub(super) fn is_reported(&self) -> bool {
        self.0.is_reported.load(Ordering::Acquire)
    }

    /// Forgets the report; true if there was one.
    pub(super) fn forget(&self) -> bool {
        self.0.is_reported.swap(false, Ordering::AcqRel)
    }

    /// Returns the descriptor that is readable after a report.
    pub(super) fn event(&self) -> BorrowedFd<'_> {
        self.0.event.as_fd()
    }

    /// Makes the descriptor wait for the next report.
    pub(super) fn take_event(&self) {
        rustix::io::read(&self.0.event, &mut [0; 8]).ok();
    }
}

/// Whether a line of the log says that a request of a block device failed with `ENOSPC`.
fn reports_full_disk(line: &str) -> bool {
    line.contains("virtio block request") && line.contains("No space left on device")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A line of the form that firecracker's block device logs: the request's type, then the error by `Debug`.
    const LINE: &[u8] = b"[web:fc_vcpu 0:ERROR] Failed to execute Out virtio block request: FileEngine(Sync(Transfer(IOError(Os { \
        code: 28, kind: StorageFull, message: \"No space left on device\" }))))\n";

    #[test]
    fn reports_are_found_however_the_log_is_cut() {
        for size in [1, 7, LINE.len()] {
            let full = FullDisk::new().unwrap();
            let mut listener = full.listener();
            for piece in LINE.chunks(size) {
                assert!(!full.is_reported());
                listener(piece);
            }
            assert!(full.is_reported() && full.forget() && !full.is_reported());
        }
    }

    #[test]
    fn other_lines_are_no_reports() {
        let full = FullDisk::new().unwrap();
        let mut listener = full.listener();
        listener(b"Failed to execute Out virtio block request: FileEngine(Sync(Transfer(IOError(Os { code: 5 }))))\n");
        listener(b"No space left on device\n");
        listener(&[b'x'; 3 * LINE_MAX]);
        listener(LINE);
        assert!(!full.is_reported(), "the report is behind the part of the line that is kept");
        listener(LINE);
        assert!(full.is_reported());
    }
}
