//! One port that carries packets of a device, on either side. Reading and writing are the caller's.

use std::io::{self, ErrorKind};

use crate::connection::Cids;
use crate::device::{Device, Front};
use crate::session::{Expected, Incoming, Nonce, Receiver, Sender};

/// Maximum number of reads or writes before others get their turn.
const TURNS: usize = 8;

/// Why a lane stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pause {
    /// There is nothing more.
    Done,
    /// The port would make it wait.
    Blocked,
    /// Others get their turn.
    Turn,
}

/// A port that carries packets.
#[derive(Debug)]
pub struct Lane {
    index: usize,
    cids: Cids,
    is_host: bool,
    receiver: Receiver,
    sender: Sender,
}

impl Lane {
    /// Makes the host's end of the lane with this index. It waits for the guest's HELLO, and answers each.
    #[must_use]
    pub fn of_host(index: usize, cids: Cids) -> Self {
        let receiver = Receiver::new(cids, Expected::Any);
        Self { index, cids, is_host: true, receiver, sender: Sender::default() }
    }

    /// Makes the guest's end, which begins a session with this nonce.
    #[must_use]
    pub fn of_guest(index: usize, cids: Cids, nonce: Nonce) -> Self {
        let receiver = Receiver::new(cids, Expected::This(nonce));
        let mut sender = Sender::default();
        sender.hello(cids, nonce);
        Self { index, cids, is_host: false, receiver, sender }
    }

    /// Returns whether there is a session.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.receiver.is_open()
    }

    /// Ends the session and its connections, on the host's side, until the guest begins one with this nonce.
    pub fn wait_for<F: Front>(&mut self, device: &mut Device<F>, nonce: Nonce) {
        self.end(device);
        self.receiver.wait(Expected::This(nonce));
    }

    /// Ends the session and its connections.
    pub fn end<F: Front>(&mut self, device: &mut Device<F>) {
        self.receiver.wait(Expected::Any);
        self.sender.clear();
        device.far_reset(self.index);
    }

    /// Passes what `read` returns to the device.
    ///
    /// # Errors
    /// When the port has ended ([`ErrorKind::UnexpectedEof`]) or fails; on the guest's side also when the host does not keep to the protocol
    /// ([`ErrorKind::InvalidData`]), and needs a new session.
    pub fn receive<F: Front>(
        &mut self,
        device: &mut Device<F>,
        mut read: impl FnMut(&mut [u8]) -> io::Result<usize>,
    ) -> io::Result<Pause> {
        for _ in 0..TURNS {
            match self.receiver.fill(&mut read) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(_) => self.deliver(device)?,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(Pause::Blocked),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Pause::Turn)
    }

    fn deliver<F: Front>(&mut self, device: &mut Device<F>) -> io::Result<()> {
        loop {
            match self.receiver.take() {
                Ok(None) => return Ok(()),
                Ok(Some(Incoming::Packet(header, payload))) => device.receive(self.index, &header, payload),
                // The answer, or one to an earlier HELLO of the same session.
                Ok(Some(Incoming::Hello(_))) if !self.is_host => {}
                Ok(Some(Incoming::Hello(nonce))) => {
                    device.far_reset(self.index);
                    self.sender.hello(self.cids, nonce);
                }
                Err(broken) => {
                    device.malformed();
                    self.end(device);
                    if !self.is_host {
                        return Err(io::Error::new(ErrorKind::InvalidData, broken));
                    }
                }
            }
        }
    }

    /// Passes packets of the device to `write`.
    ///
    /// # Errors
    /// Those of `write`.
    pub fn send<F: Front>(
        &mut self,
        device: &mut Device<F>,
        mut write: impl FnMut(&[u8]) -> io::Result<usize>,
    ) -> io::Result<Pause> {
        for _ in 0..TURNS {
            let has_bytes = if self.is_open() {
                self.sender.fill(device, self.index)
            } else {
                !self.sender.pending().is_empty()
            };
            if !has_bytes {
                return Ok(Pause::Done);
            }
            match write(self.sender.pending()) {
                Ok(0) => return Ok(Pause::Blocked),
                Ok(count) => self.sender.consume(count),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(Pause::Blocked),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Pause::Turn)
    }
}

#[cfg(test)]
mod tests;
