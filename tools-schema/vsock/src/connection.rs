//! The protocol state of one connection: its state, its credit, and what must be sent to the far side. No sockets, no clock.
//!
//! ```text
//!  near: connects                               far: REQUEST
//!        │                                            │
//!   Requesting ───────── far: RESPONSE ───────> Open <┘ (owes RESPONSE)
//!        │                                      │  │
//!        │             near gone: SHUTDOWN both │  │ far: SHUTDOWN both, RESET,
//!        │                                      v  │ or anything out of order
//!        │                                Closing  │
//!        │ far: RESET, or out of order       │     │
//!        └────────────────> over <───────────┴─────┘
//! ```
//! [`Connection::next`] computes the next packet without changing anything; [`Connection::sent`] records the packet once it is sent.

use super::packet::{Header, Operation, SHUT_BOTH, SHUT_RECEIVE, SHUT_SEND, STREAM};

/// Size of a connection's buffer for a near program that does not read, in bytes. It is announced to the far side.
pub const BUFFER_SPACE: u32 = 256 << 10;

/// The context ids of the two sides of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cids {
    /// Of the side that this code runs on.
    pub near: u64,
    /// Of the other one.
    pub far: u64,
}

/// The two ports of a connection. They identify it, since both context ids are fixed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Ports {
    pub(super) near: u32,
    pub(super) far: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Requesting { sent: bool },
    Open { owes_response: bool },
    Closing,
}

/// Present state of the near end.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct NearSide {
    /// Number of pending bytes for the far side.
    pub(super) pending: usize,
    /// There may be more bytes to read.
    pub(super) readable: bool,
    /// No more bytes come after the pending ones.
    pub(super) ended: bool,
    /// The near program does not read the far side's bytes any more.
    pub(super) deaf: bool,
}

/// A packet to send: its operation, its flags, and how many of the pending bytes it carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Packet {
    pub(super) operation: Operation,
    pub(super) flags: u32,
    pub(super) length: u32,
}

/// Effect of a packet from the far side on the near end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// No effect.
    Continue,
    /// The far side accepted the connection.
    Accepted,
    /// The payload must be passed on to the near program.
    Deliver,
    /// The far side ended a direction: see [`Connection::far_sends`] and [`Connection::far_receives`].
    Shut,
    /// The connection is over.
    Over {
        /// Whether to send a reset to the far side.
        reset: bool,
    },
}

/// One connection between a near program and the far side.
#[derive(Debug, Clone, Copy)]
pub(super) struct Connection {
    ports: Ports,
    state: State,
    /// Directions that the far side has ended.
    far_shut: u32,
    /// Ended directions of the near side that were announced.
    told_shut: u32,
    owes_update: bool,
    /// A credit request was sent and not answered yet.
    asked: bool,
    /// Number of bytes sent to the far side, modulo 2^32; then the size of its buffer and its count of consumed bytes.
    sent: u32,
    far_space: u32,
    far_forwarded: u32,
    /// Number of bytes received from the far side, passed on, and announced as passed on; modulo 2^32.
    received: u32,
    forwarded: u32,
    announced: u32,
}

impl Connection {
    fn new(ports: Ports, state: State) -> Self {
        Self {
            ports,
            state,
            far_shut: 0,
            told_shut: 0,
            owes_update: false,
            asked: false,
            sent: 0,
            far_space: 0,
            far_forwarded: 0,
            received: 0,
            forwarded: 0,
            announced: 0,
        }
    }

    /// Returns a connection requested by a near program.
    pub(super) fn from_near(ports: Ports) -> Self {
        Self::new(ports, State::Requesting { sent: false })
    }

    /// Returns a connection that the far side requested with `request` and that a near program has accepted.
    pub(super) fn from_far(request: &Header) -> Self {
        let ports = Ports { near: request.destination_port, far: request.source_port };
        let mut connection = Self::new(ports, State::Open { owes_response: true });
        connection.far_space = request.buffer_space;
        connection.far_forwarded = request.forwarded;
        connection
    }

    pub(super) fn ports(&self) -> Ports {
        self.ports
    }

    /// Returns whether the far side has not accepted yet.
    pub(super) fn is_requesting(&self) -> bool {
        matches!(self.state, State::Requesting { .. })
    }

    /// Returns whether the far side knows of this connection.
    pub(super) fn is_known(&self) -> bool {
        self.state != State::Requesting { sent: false }
    }

    /// Returns whether the near end is closed and only the far side's reset is missing.
    pub(super) fn is_closing(&self) -> bool {
        self.state == State::Closing
    }

    /// Returns whether the far side may send more.
    pub(super) fn far_sends(&self) -> bool {
        self.far_shut & SHUT_SEND == 0
    }

    /// Returns whether the far side receives more.
    pub(super) fn far_receives(&self) -> bool {
        self.far_shut & SHUT_RECEIVE == 0
    }

    /// Returns the free space in the far side's buffer, in bytes.
    fn credit(&self) -> u32 {
        self.far_space.saturating_sub(self.sent.wrapping_sub(self.far_forwarded))
    }

    /// Returns how many bytes may be read from the near program now.
    pub(super) fn wants(&self) -> usize {
        match self.state {
            State::Open { .. } if self.far_receives() => self.credit() as usize,
            _ => 0,
        }
    }

    /// Handles a packet from the far side. After a [`Verdict::Deliver`], the caller must pass on or drop all bytes, and count them with
    /// [`Connection::forward`].
    pub(super) fn receive(&mut self, header: &Header) -> Verdict {
        self.far_space = header.buffer_space;
        self.far_forwarded = header.forwarded;
        if self.credit() > 0 {
            self.asked = false;
        }
        let out_of_order = Verdict::Over { reset: true };
        let Some(operation) = header.operation() else { return out_of_order };
        match (self.state, operation) {
            (_, Operation::Reset) => Verdict::Over { reset: false },
            (_, Operation::CreditUpdate) => Verdict::Continue,
            (_, Operation::CreditRequest) => {
                self.owes_update = true;
                Verdict::Continue
            }
            (State::Requesting { sent: true }, Operation::Response) => {
                self.state = State::Open { owes_response: false };
                Verdict::Accepted
            }
            (State::Open { .. }, Operation::Data) => {
                let received = self.received.wrapping_add(header.length);
                if !self.far_sends() || self.held().saturating_add(header.length) > BUFFER_SPACE {
                    return out_of_order;
                }
                self.received = received;
                Verdict::Deliver
            }
            (State::Open { .. }, Operation::Shutdown) => {
                self.far_shut |= header.flags & SHUT_BOTH;
                if self.far_shut == SHUT_BOTH { Verdict::Over { reset: true } } else { Verdict::Shut }
            }
            // Sent before the far side received the near side's shutdown.
            (State::Closing, Operation::Data) => Verdict::Continue,
            (State::Closing, Operation::Shutdown) if header.flags & SHUT_BOTH != SHUT_BOTH => {
                Verdict::Continue
            }
            (State::Requesting { .. } | State::Open { .. } | State::Closing, _) => out_of_order,
        }
    }

    /// Returns the number of bytes from the far side that were received and not yet passed on.
    pub(super) fn held(&self) -> u32 {
        self.received.wrapping_sub(self.forwarded)
    }

    /// Counts bytes from the far side that were passed on or dropped.
    pub(super) fn forward(&mut self, count: usize) {
        debug_assert!(count <= self.held() as usize);
        // The count is at most what was held, so it fits.
        self.forwarded = self.forwarded.wrapping_add(count as u32);
    }

    /// Returns the next packet for the far side, if any. `room` is the space for its payload, in bytes (at least one).
    pub(super) fn next(&self, near: NearSide, room: usize) -> Option<Packet> {
        let bare = |operation| Some(Packet { operation, flags: 0, length: 0 });
        match self.state {
            State::Requesting { sent: false } => return bare(Operation::Request),
            State::Open { owes_response: true } => return bare(Operation::Response),
            State::Requesting { sent: true } | State::Closing => return None,
            State::Open { owes_response: false } => {}
        }
        let receives = self.far_receives();
        let length = near.pending.min(self.credit() as usize).min(room) as u32;
        if receives && length > 0 {
            return Some(Packet { operation: Operation::Data, flags: 0, length });
        }
        let told = self.told_shut | self.shut_by(near);
        if told != self.told_shut {
            return Some(Packet { operation: Operation::Shutdown, flags: told, length: 0 });
        }
        if self.owes_update || self.forwarded.wrapping_sub(self.announced) >= BUFFER_SPACE / 4 {
            return bare(Operation::CreditUpdate);
        }
        let waits = near.pending > 0 || (near.readable && !near.ended);
        if receives && waits && self.credit() == 0 && !self.asked {
            return bare(Operation::CreditRequest);
        }
        None
    }

    /// Returns the directions that have ended on the near side.
    fn shut_by(&self, near: NearSide) -> u32 {
        let mut flags = 0;
        if near.deaf {
            flags |= SHUT_RECEIVE;
        }
        // Once the far side receives no more, the near side's pending bytes do not matter.
        let ended =
            if self.far_receives() { near.ended && near.pending == 0 } else { near.deaf || near.ended };
        if ended {
            flags |= SHUT_SEND;
        }
        flags
    }

    /// Records that `packet` is sent, and returns its header.
    pub(super) fn sent(&mut self, packet: Packet, cids: Cids) -> Header {
        match packet.operation {
            Operation::Request => self.state = State::Requesting { sent: true },
            Operation::Response => self.state = State::Open { owes_response: false },
            Operation::Data => self.sent = self.sent.wrapping_add(packet.length),
            Operation::CreditRequest => self.asked = true,
            Operation::Shutdown => {
                self.told_shut |= packet.flags;
                if self.told_shut == SHUT_BOTH {
                    self.state = State::Closing;
                }
            }
            Operation::CreditUpdate | Operation::Reset => {}
        }
        self.owes_update = false;
        self.announced = self.forwarded;
        self.header(packet, cids)
    }

    /// Returns the header of a reset for this connection.
    pub(super) fn reset(&self, cids: Cids) -> Header {
        self.header(Packet { operation: Operation::Reset, flags: 0, length: 0 }, cids)
    }

    fn header(&self, packet: Packet, cids: Cids) -> Header {
        Header {
            source_cid: cids.near,
            destination_cid: cids.far,
            source_port: self.ports.near,
            destination_port: self.ports.far,
            length: packet.length,
            kind: STREAM,
            operation: packet.operation as u16,
            flags: packet.flags,
            buffer_space: BUFFER_SPACE,
            forwarded: self.forwarded,
        }
    }
}

#[cfg(test)]
mod tests;
