//! Reads and replaces the tables by options of a socket: the only code that does.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};

use nix::errno::Errno;
use nix::libc;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use super::{COUNTERS, FILTER, INFO, Kind, LIST_HEAD, NAME, REPLACE_COUNTERS, Table, u32_at};

/// `IPT_SO_GET_INFO`, `IPT_SO_GET_ENTRIES`, `IPT_SO_SET_REPLACE` and `IPT_SO_SET_ADD_COUNTERS`. They are the same for IPv6.
const GET_INFO: libc::c_int = 64;
const GET_ENTRIES: libc::c_int = 65;
const SET_REPLACE: libc::c_int = 64;
const ADD_COUNTERS: libc::c_int = 65;

/// The tables of one family in the calling thread's network namespace.
#[derive(Debug)]
pub(super) struct Socket {
    socket: OwnedFd,
    kind: Kind,
}

fn invalid(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

impl Socket {
    /// Opens a socket in the calling thread's network namespace.
    pub(super) fn open(kind: Kind) -> io::Result<Self> {
        let family = match kind {
            Kind::V4 => AddressFamily::INET,
            Kind::V6 => AddressFamily::INET6,
        };
        let socket = socket_with(family, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
        Ok(Self { socket, kind })
    }

    /// Reads the table `filter`. The kernel makes it if it is not there.
    pub(super) fn read(&self) -> io::Result<Table> {
        let mut info = [0; INFO];
        info[..FILTER.len()].copy_from_slice(FILTER);
        self.get(GET_INFO, &mut info)?;
        let size = u32_at(&info, INFO - 4).ok_or_else(|| invalid("the kernel's answer is too short"))?;
        let size = usize::try_from(size).map_err(|_| invalid("the table is too large"))?;
        let mut list = vec![0; LIST_HEAD + size];
        list[..NAME].copy_from_slice(&info[..NAME]);
        list[NAME..NAME + 4].copy_from_slice(&info[INFO - 4..]);
        self.get(GET_ENTRIES, &mut list)?;
        Table::read(self.kind, &info, &list[LIST_HEAD..])
            .ok_or_else(|| invalid("the table is not understood"))
    }

    /// Replaces the table by a changed one; `count` is how many entries it had when it was read. Rules that stay keep their counters.
    pub(super) fn replace(&self, table: &Table, count: usize) -> io::Result<()> {
        let mut bytes =
            table.replacement().ok_or_else(|| invalid("a rule jumps to a place that is not there"))?;
        let number = u32::try_from(count).map_err(|_| invalid("the table is too large"))?;
        let mut old = vec![0_u8; count * COUNTERS];
        let pointer = old.as_mut_ptr().expose_provenance() as u64;
        bytes[REPLACE_COUNTERS..REPLACE_COUNTERS + 4].copy_from_slice(&number.to_ne_bytes());
        bytes[REPLACE_COUNTERS + 4..REPLACE_COUNTERS + 12].copy_from_slice(&pointer.to_ne_bytes());
        // The kernel writes the counters of as many entries as it has into `old`, and fails if these are not `count`.
        self.set(SET_REPLACE, &bytes)?;
        let read_as = table.read_as();
        let mut counters = vec![0; LIST_HEAD];
        counters[..FILTER.len()].copy_from_slice(FILTER);
        let number = u32::try_from(read_as.len()).map_err(|_| invalid("the table is too large"))?;
        counters[NAME..NAME + 4].copy_from_slice(&number.to_ne_bytes());
        for index in read_as {
            let of = |index: usize| old.get(index * COUNTERS..(index + 1) * COUNTERS);
            counters.extend_from_slice(index.and_then(of).unwrap_or(&[0; COUNTERS]));
        }
        self.set(ADD_COUNTERS, &counters)
    }

    const fn level(&self) -> libc::c_int {
        match self.kind {
            Kind::V4 => libc::IPPROTO_IP,
            Kind::V6 => libc::IPPROTO_IPV6,
        }
    }

    fn get(&self, option: libc::c_int, bytes: &mut [u8]) -> io::Result<()> {
        let mut length =
            libc::socklen_t::try_from(bytes.len()).map_err(|_| invalid("the table is too large"))?;
        let (fd, pointer) = (self.socket.as_raw_fd(), bytes.as_mut_ptr().cast());
        // SAFETY: the kernel writes at most `length` bytes, which is the length of the buffer.
        let done = unsafe { libc::getsockopt(fd, self.level(), option, pointer, &raw mut length) };
        Errno::result(done)?;
        Ok(())
    }

    fn set(&self, option: libc::c_int, bytes: &[u8]) -> io::Result<()> {
        let length = libc::socklen_t::try_from(bytes.len()).map_err(|_| invalid("the table is too large"))?;
        let (fd, pointer) = (self.socket.as_raw_fd(), bytes.as_ptr().cast());
        // SAFETY: the kernel reads `length` bytes, which is the length of the buffer. The buffer that a replacement points to lives until this
        // returns, and has room for the counters of as many entries as the replacement says.
        let done = unsafe { libc::setsockopt(fd, self.level(), option, pointer, length) };
        Errno::result(done)?;
        Ok(())
    }
}
