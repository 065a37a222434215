//! The guest's front: the far side's connections are handed to the agent as ends of socket pairs.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};

use crate::device::Front;

/// Connections that nobody has taken yet.
#[derive(Debug)]
pub struct Pairs {
    ports: &'static [u32],
    accepted: VecDeque<(u32, OwnedFd)>,
}

impl Pairs {
    /// Accepts connections to these ports.
    #[must_use]
    pub fn new(ports: &'static [u32]) -> Self {
        Self { ports, accepted: VecDeque::new() }
    }

    /// Takes a connection that was accepted, with its port.
    pub fn take(&mut self) -> Option<(u32, OwnedFd)> {
        self.accepted.pop_front()
    }

    /// Makes a socket pair: the device's end, and the one for a program. Both are non-blocking.
    ///
    /// # Errors
    /// When the process has run out of descriptors.
    pub fn make() -> io::Result<(UnixStream, OwnedFd)> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        theirs.set_nonblocking(true)?;
        Ok((ours, theirs.into()))
    }
}

impl Front for Pairs {
    fn connect(&mut self, port: u32, _: u32) -> io::Result<UnixStream> {
        if !self.ports.contains(&port) {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let (ours, theirs) = Self::make()?;
        self.accepted.push_back((port, theirs));
        Ok(ours)
    }

    fn listener(&self) -> Option<&UnixListener> {
        None
    }
}
