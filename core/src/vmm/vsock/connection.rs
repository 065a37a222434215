//! One connection as the protocol sees it: states, credit, and what is owed to the guest. No sockets, no clock.
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
//! What is to be sent next is computed by [`Connection::next`], which changes nothing, and settled by
//! [`Connection::sent`] once the packet is on its way.

use super::packet::{HOST_CID, Header, Operation, SHUT_BOTH, SHUT_RECEIVE, SHUT_SEND, STREAM};

/// How many bytes of one connection are kept for a host program that does not read, in bytes. The guest is told.
pub(super) const BUFFER_SPACE: u32 = 256 << 10;

/// The two ports of a connection; with both context ids fixed, its name.
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

/// What the host's end has for the guest at this moment.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct HostSide {
    /// Bytes at hand for the guest.
    pub(super) pending: usize,
    /// There may be more to read.
    pub(super) readable: bool,
    /// Nothing comes behind the pending bytes.
    pub(super) ended: bool,
    /// Nothing that the guest sends is read any more.
    pub(super) deaf: bool,
}

/// A packet to send: what, with which flags, and how many of the pending bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Packet {
    pub(super) operation: Operation,
    pub(super) flags: u32,
    pub(super) length: u32,
}

/// What a packet from the guest means for the host's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing.
    Continue,
    /// The guest accepted the connection.
    Accepted,
    /// The payload is for the host.
    Deliver,
    /// The guest ended a direction; ask [`Connection::guest_sends`] and [`Connection::guest_receives`].
    Shut,
    /// The connection is over.
    Over {
        /// The guest is to be told so.
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
    /// Directions that the guest was told have ended on the host's side.
    told_shut: u32,
    owes_update: bool,
    /// A credit request is under way.
    asked: bool,
    /// Bytes sent to the guest, modulo 2^32; then what the guest says about its buffer.
    sent: u32,
    guest_space: u32,
    guest_forwarded: u32,
    /// Bytes received from the guest, those passed on, and those that the guest knows were passed on; modulo 2^32.
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

    /// A connection that a host program asks for.
    pub(super) fn from_host(ports: Ports) -> Self {
        Self::new(ports, State::Requesting { sent: false })
    }

    /// A connection that the guest asks for with `request` and that a host program has taken.
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

    /// Whether the guest has yet to accept.
    pub(super) fn is_requesting(&self) -> bool {
        matches!(self.state, State::Requesting { .. })
    }

    /// Whether the guest has heard of this connection.
    pub(super) fn is_known(&self) -> bool {
        self.state != State::Requesting { sent: false }
    }

    /// Whether the host's end is gone and only the guest's answer is waited for.
    pub(super) fn is_closing(&self) -> bool {
        self.state == State::Closing
    }

    /// Whether the guest may send more.
    pub(super) fn guest_sends(&self) -> bool {
        self.guest_shut & SHUT_SEND == 0
    }

    /// Whether the guest takes more.
    pub(super) fn guest_receives(&self) -> bool {
        self.guest_shut & SHUT_RECEIVE == 0
    }

    /// How many bytes the guest has room for.
    fn credit(&self) -> u32 {
        self.guest_space.saturating_sub(self.sent.wrapping_sub(self.guest_forwarded))
    }

    /// How many bytes may be read from the host now.
    pub(super) fn wants(&self) -> usize {
        match self.state {
            State::Open { .. } if self.guest_receives() => self.credit() as usize,
            _ => 0,
        }
    }

    /// Takes a packet from the guest. Of a [`Verdict::Deliver`], all bytes must be passed on or dropped, and counted with
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
            // Sent before the guest heard that the host is gone.
            (State::Closing, Operation::Data) => Verdict::Continue,
            (State::Closing, Operation::Shutdown) if header.flags & SHUT_BOTH != SHUT_BOTH => {
                Verdict::Continue
            }
            (State::Requesting { .. } | State::Open { .. } | State::Closing, _) => out_of_order,
        }
    }

    /// How many bytes from the guest were received and not yet passed on.
    pub(super) fn held(&self) -> u32 {
        self.received.wrapping_sub(self.forwarded)
    }

    /// Counts bytes from the guest that were passed on or dropped.
    pub(super) fn forward(&mut self, count: usize) {
        debug_assert!(count <= self.held() as usize);
        // Never more than was held, so it fits.
        self.forwarded = self.forwarded.wrapping_add(count as u32);
    }

    /// The packet that the guest is to get next, when there is room for `room` bytes of payload (at least one).
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

    /// The directions that have ended on the host's side.
    fn shut_by(&self, host: HostSide) -> u32 {
        let mut flags = 0;
        if host.deaf {
            flags |= SHUT_RECEIVE;
        }
        // Once the guest takes nothing more, nobody reads up to the host's end.
        let ended =
            if self.guest_receives() { host.ended && host.pending == 0 } else { host.deaf || host.ended };
        if ended {
            flags |= SHUT_SEND;
        }
        flags
    }

    /// Settles that `packet` is on its way, and makes its header.
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

    /// The header of a reset for this connection.
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
