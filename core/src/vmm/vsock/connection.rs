//! The protocol state of one connection: its state, its credit, and what must be sent to the guest. No sockets, no clock.
//!
//! ```text
//!  host: CONNECT                                guest: REQUEST
//!        │                                            │
//!   Requesting ──────── guest: RESPONSE ──────> Open <┘ (owes RESPONSE)
//!        │                                      │  │
//!        │             host gone: SHUTDOWN both │  │ guest: SHUTDOWN both, RESET,
//!        │                                      v  │ or anything out of order
//!        │                                Closing  │
//!        │ guest: RESET, or out of order     │     │
//!        └────────────────> over <───────────┴─────┘
//! ```
//! [`Connection::next`] computes the next packet without changing anything; [`Connection::sent`] records the packet once it is sent.

use super::packet::{HOST_CID, Header, Operation, SHUT_BOTH, SHUT_RECEIVE, SHUT_SEND, STREAM};

/// Size of a connection's buffer for a host program that does not read, in bytes. It is announced to the guest.
pub(super) const BUFFER_SPACE: u32 = 256 << 10;

/// The two ports of a connection. They identify it, since both context ids are fixed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Ports {
    pub(super) host: u32,
    pub(super) guest: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Requesting { sent: bool },
    Open { owes_response: bool },
    Closing,
}

/// Present state of the host's end.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct HostSide {
    /// Number of pending bytes for the guest.
    pub(super) pending: usize,
    /// There may be more bytes to read.
    pub(super) readable: bool,
    /// No more bytes come after the pending ones.
    pub(super) ended: bool,
    /// The host program does not read the guest's bytes any more.
    pub(super) deaf: bool,
}

/// A packet to send: its operation, its flags, and how many of the pending bytes it carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Packet {
    pub(super) operation: Operation,
    pub(super) flags: u32,
    pub(super) length: u32,
}

/// Effect of a packet from the guest on the host's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// No effect.
    Continue,
    /// The guest accepted the connection.
    Accepted,
    /// The payload must be passed on to the host program.
    Deliver,
    /// The guest ended a direction: see [`Connection::guest_sends`] and [`Connection::guest_receives`].
    Shut,
    /// The connection is over.
    Over {
        /// Whether to send a reset to the guest.
        reset: bool,
    },
}

/// One connection between a host program and the guest.
#[derive(Debug, Clone, Copy)]
pub(super) struct Connection {
    ports: Ports,
    state: State,
    /// Directions that the guest has ended.
    guest_shut: u32,
    /// Ended directions of the host that were announced to the guest.
    told_shut: u32,
    owes_update: bool,
    /// A credit request was sent and not answered yet.
    asked: bool,
    /// Number of bytes sent to the guest, modulo 2^32; then the size of the guest's buffer and its count of consumed bytes.
    sent: u32,
    guest_space: u32,
    guest_forwarded: u32,
    /// Number of bytes received from the guest, passed on, and announced to the guest as passed on; modulo 2^32.
    received: u32,
    forwarded: u32,
    announced: u32,
}

impl Connection {
    fn new(ports: Ports, state: State) -> Self {
        Self {
            ports,
            state,
            guest_shut: 0,
            told_shut: 0,
            owes_update: false,
            asked: false,
            sent: 0,
            guest_space: 0,
            guest_forwarded: 0,
            received: 0,
            forwarded: 0,
            announced: 0,
        }
    }

    /// Returns a connection requested by a host program.
    pub(super) fn from_host(ports: Ports) -> Self {
        Self::new(ports, State::Requesting { sent: false })
    }

    /// Returns a connection that the guest requested with `request` and that a host program has accepted.
    pub(super) fn from_guest(request: &Header) -> Self {
        let ports = Ports { host: request.destination_port, guest: request.source_port };
        let mut connection = Self::new(ports, State::Open { owes_response: true });
        connection.guest_space = request.buffer_space;
        connection.guest_forwarded = request.forwarded;
        connection
    }

    pub(super) fn ports(&self) -> Ports {
        self.ports
    }

    /// Returns whether the guest has not accepted yet.
    pub(super) fn is_requesting(&self) -> bool {
        matches!(self.state, State::Requesting { .. })
    }

    /// Returns whether the guest knows of this connection.
    pub(super) fn is_known(&self) -> bool {
        self.state != State::Requesting { sent: false }
    }

    /// Returns whether the host's end is closed and only the guest's reset is missing.
    pub(super) fn is_closing(&self) -> bool {
        self.state == State::Closing
    }

    /// Returns whether the guest may send more.
    pub(super) fn guest_sends(&self) -> bool {
        self.guest_shut & SHUT_SEND == 0
    }

    /// Returns whether the guest receives more.
    pub(super) fn guest_receives(&self) -> bool {
        self.guest_shut & SHUT_RECEIVE == 0
    }

    /// Returns the free space in the guest's buffer, in bytes.
    fn credit(&self) -> u32 {
        self.guest_space.saturating_sub(self.sent.wrapping_sub(self.guest_forwarded))
    }

    /// Returns how many bytes may be read from the host program now.
    pub(super) fn wants(&self) -> usize {
        match self.state {
            State::Open { .. } if self.guest_receives() => self.credit() as usize,
            _ => 0,
        }
    }

    /// Handles a packet from the guest. After a [`Verdict::Deliver`], the caller must pass on or drop all bytes, and count them with
    /// [`Connection::forward`].
    pub(super) fn receive(&mut self, header: &Header) -> Verdict {
        self.guest_space = header.buffer_space;
        self.guest_forwarded = header.forwarded;
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
                if !self.guest_sends() || self.held().saturating_add(header.length) > BUFFER_SPACE {
                    return out_of_order;
                }
                self.received = received;
                Verdict::Deliver
            }
            (State::Open { .. }, Operation::Shutdown) => {
                self.guest_shut |= header.flags & SHUT_BOTH;
                if self.guest_shut == SHUT_BOTH { Verdict::Over { reset: true } } else { Verdict::Shut }
            }
            // Sent before the guest received the host's shutdown.
            (State::Closing, Operation::Data) => Verdict::Continue,
            (State::Closing, Operation::Shutdown) if header.flags & SHUT_BOTH != SHUT_BOTH => {
                Verdict::Continue
            }
            (State::Requesting { .. } | State::Open { .. } | State::Closing, _) => out_of_order,
        }
    }

    /// Returns the number of bytes from the guest that were received and not yet passed on.
    pub(super) fn held(&self) -> u32 {
        self.received.wrapping_sub(self.forwarded)
    }

    /// Counts bytes from the guest that were passed on or dropped.
    pub(super) fn forward(&mut self, count: usize) {
        debug_assert!(count <= self.held() as usize);
        // The count is at most what was held, so it fits.
        self.forwarded = self.forwarded.wrapping_add(count as u32);
    }

    /// Returns the next packet for the guest, if any. `room` is the space for its payload, in bytes (at least one).
    pub(super) fn next(&self, host: HostSide, room: usize) -> Option<Packet> {
        let bare = |operation| Some(Packet { operation, flags: 0, length: 0 });
        match self.state {
            State::Requesting { sent: false } => return bare(Operation::Request),
            State::Open { owes_response: true } => return bare(Operation::Response),
            State::Requesting { sent: true } | State::Closing => return None,
            State::Open { owes_response: false } => {}
        }
        let receives = self.guest_receives();
        let length = host.pending.min(self.credit() as usize).min(room) as u32;
        if receives && length > 0 {
            return Some(Packet { operation: Operation::Data, flags: 0, length });
        }
        let told = self.told_shut | self.shut_by(host);
        if told != self.told_shut {
            return Some(Packet { operation: Operation::Shutdown, flags: told, length: 0 });
        }
        if self.owes_update || self.forwarded.wrapping_sub(self.announced) >= BUFFER_SPACE / 4 {
            return bare(Operation::CreditUpdate);
        }
        let waits = host.pending > 0 || (host.readable && !host.ended);
        if receives && waits && self.credit() == 0 && !self.asked {
            return bare(Operation::CreditRequest);
        }
        None
    }

    /// Returns the directions that have ended on the host's side.
    fn shut_by(&self, host: HostSide) -> u32 {
        let mut flags = 0;
        if host.deaf {
            flags |= SHUT_RECEIVE;
        }
        // Once the guest receives no more, the host's pending bytes do not matter.
        let ended =
            if self.guest_receives() { host.ended && host.pending == 0 } else { host.deaf || host.ended };
        if ended {
            flags |= SHUT_SEND;
        }
        flags
    }

    /// Records that `packet` is sent, and returns its header.
    pub(super) fn sent(&mut self, packet: Packet, guest_cid: u64) -> Header {
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
        self.header(packet, guest_cid)
    }

    /// Returns the header of a reset for this connection.
    pub(super) fn reset(&self, guest_cid: u64) -> Header {
        self.header(Packet { operation: Operation::Reset, flags: 0, length: 0 }, guest_cid)
    }

    fn header(&self, packet: Packet, guest_cid: u64) -> Header {
        Header {
            source_cid: HOST_CID,
            destination_cid: guest_cid,
            source_port: self.ports.host,
            destination_port: self.ports.guest,
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
