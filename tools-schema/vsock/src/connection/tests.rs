//! Tests of the state machine against a model of the guest, and against a guest that breaks the protocol.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;
use crate::packet::HOST_CID;

const CID: u64 = 5;
const CIDS: Cids = Cids { near: HOST_CID, far: CID };
const PORTS: Ports = Ports { near: 0x4000_0001, far: 200 };

fn from_far(operation: u16) -> Header {
    Header {
        source_cid: CID,
        destination_cid: HOST_CID,
        source_port: PORTS.far,
        destination_port: PORTS.near,
        kind: STREAM,
        operation,
        buffer_space: 65_536,
        ..Header::default()
    }
}

fn of(operation: Operation) -> Header {
    from_far(operation as u16)
}

/// Sends all due packets and returns them.
fn drain(connection: &mut Connection, host: NearSide) -> Vec<Operation> {
    let mut sent = vec![];
    while let Some(packet) = connection.next(NearSide { pending: 0, ..host }, 1) {
        connection.sent(packet, CIDS);
        sent.push(packet.operation);
        assert!(sent.len() < 10, "there is no end to it: {sent:?}");
    }
    sent
}

fn open() -> Connection {
    let mut connection = Connection::from_near(PORTS);
    assert_eq!(drain(&mut connection, NearSide::default()), [Operation::Request]);
    assert_eq!(connection.receive(&of(Operation::Response)), Verdict::Accepted);
    connection
}

#[test]
fn a_response_counts_only_after_the_request() {
    let mut connection = Connection::from_near(PORTS);
    assert!(!connection.is_known());
    assert_eq!(connection.receive(&of(Operation::Response)), Verdict::Over { reset: true });

    let mut connection = open();
    assert!(!connection.is_requesting());
    assert_eq!(connection.receive(&of(Operation::Response)), Verdict::Over { reset: true });
    assert_eq!(
        Connection::from_far(&of(Operation::Request)).receive(&of(Operation::Response)),
        Verdict::Over { reset: true }
    );
}

#[test]
fn no_data_before_the_guest_has_accepted() {
    let mut connection = Connection::from_near(PORTS);
    assert_eq!(connection.wants(), 0);
    drain(&mut connection, NearSide::default());
    assert_eq!(connection.wants(), 0);
    assert_eq!(connection.receive(&of(Operation::Data)), Verdict::Over { reset: true });
}

#[test]
fn the_guest_may_send_what_it_was_granted_and_no_byte_more() {
    let mut connection = open();
    let data = |length| Header { length, ..of(Operation::Data) };
    assert_eq!(connection.receive(&data(BUFFER_SPACE)), Verdict::Deliver);
    assert_eq!(connection.receive(&data(0)), Verdict::Deliver);
    let mut greedy = connection;
    assert_eq!(greedy.receive(&data(1)), Verdict::Over { reset: true });
    connection.forward(BUFFER_SPACE as usize / 4);
    assert_eq!(drain(&mut connection, NearSide::default()), [Operation::CreditUpdate]);
    assert_eq!(connection.receive(&data(BUFFER_SPACE / 4)), Verdict::Deliver);
    assert_eq!(connection.receive(&data(1)), Verdict::Over { reset: true });
}

#[test]
fn credit_is_asked_for_once() {
    let mut connection = open();
    let host = NearSide { pending: 100_000, ..NearSide::default() };
    let packet = connection.next(host, usize::MAX).unwrap();
    assert_eq!((packet.operation, packet.length), (Operation::Data, 65_536));
    connection.sent(packet, CIDS);
    assert_eq!(connection.wants(), 0);
    let packet = connection.next(host, usize::MAX).unwrap();
    assert_eq!(packet.operation, Operation::CreditRequest);
    connection.sent(packet, CIDS);
    assert_eq!(connection.next(host, usize::MAX), None);
    // A packet without room for it changes nothing.
    connection.receive(&of(Operation::CreditUpdate));
    assert_eq!(connection.next(host, usize::MAX), None);
    connection.receive(&Header { forwarded: 10, ..of(Operation::CreditUpdate) });
    let packet = connection.next(host, usize::MAX).unwrap();
    assert_eq!((packet.operation, packet.length), (Operation::Data, 10));
}

#[test]
fn ends_are_told_once_and_after_the_data() {
    let mut connection = open();
    let ending = NearSide { pending: 10, ended: true, ..NearSide::default() };
    assert_eq!(connection.next(ending, 100).unwrap().operation, Operation::Data);
    let ended = NearSide { ended: true, ..NearSide::default() };
    let packet = connection.next(ended, 100).unwrap();
    assert_eq!((packet.operation, packet.flags), (Operation::Shutdown, SHUT_SEND));
    connection.sent(packet, CIDS);
    assert_eq!(connection.next(ended, 100), None);
    assert!(!connection.is_closing());
    let gone = NearSide { ended: true, deaf: true, ..NearSide::default() };
    let packet = connection.next(gone, 100).unwrap();
    assert_eq!((packet.operation, packet.flags), (Operation::Shutdown, SHUT_BOTH));
    connection.sent(packet, CIDS);
    assert!(connection.is_closing());
    assert_eq!(connection.next(gone, 100), None);
    assert_eq!(connection.receive(&of(Operation::Data)), Verdict::Continue);
    assert_eq!(connection.receive(&of(Operation::Reset)), Verdict::Over { reset: false });
}

#[test]
fn the_guest_ends_one_direction_and_then_the_other() {
    let mut connection = open();
    let shutdown = |flags| Header { flags, ..of(Operation::Shutdown) };
    assert_eq!(connection.receive(&shutdown(SHUT_SEND)), Verdict::Shut);
    assert!(!connection.far_sends() && connection.far_receives());
    assert!(connection.wants() > 0);
    let mut liar = connection;
    assert_eq!(liar.receive(&of(Operation::Data)), Verdict::Over { reset: true });
    assert_eq!(connection.receive(&shutdown(SHUT_RECEIVE)), Verdict::Over { reset: true });
}

/// One step of a host program, of the wire, or of the guest, in the model below.
#[derive(Debug, Clone)]
enum Step {
    /// The host program writes this many bytes.
    HostWrites(u16),
    /// The device has room for a packet with a payload of this many bytes.
    DeviceSends(u16),
    /// The guest program reads this many bytes.
    GuestReads(u32),
    /// The guest program writes at most this many bytes, limited by its credit.
    GuestWrites(u32),
    /// The host program reads this many bytes.
    HostReads(u32),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        any::<u16>().prop_map(Step::HostWrites),
        (1..5000u16).prop_map(Step::DeviceSends),
        (0..100_000u32).prop_map(Step::GuestReads),
        (0..100_000u32).prop_map(Step::GuestWrites),
        (0..100_000u32).prop_map(Step::HostReads),
    ]
}

/// A guest that follows the protocol, as Linux does.
struct Guest {
    space: u32,
    held: u32,
    forwarded: u32,
    sent: u32,
    host_space: u32,
    host_forwarded: u32,
    answers: VecDeque<Header>,
}

impl Guest {
    fn header(&self, operation: Operation, length: u32) -> Header {
        Header { length, buffer_space: self.space, forwarded: self.forwarded, ..of(operation) }
    }

    fn receive(&mut self, header: &Header) {
        self.host_space = header.buffer_space;
        self.host_forwarded = header.forwarded;
        match header.operation() {
            Some(Operation::Request) => self.answers.push_back(self.header(Operation::Response, 0)),
            Some(Operation::CreditRequest) => self.answers.push_back(self.header(Operation::CreditUpdate, 0)),
            Some(Operation::Data) => {
                self.held += header.length;
                assert!(self.held <= self.space, "the guest's buffer overflows");
            }
            Some(Operation::CreditUpdate) => {}
            other => panic!("{other:?} has no place here"),
        }
    }
}

proptest! {
    #[test]
    fn with_a_guest_that_keeps_the_rules_all_bytes_arrive_and_nothing_stalls(
        space in prop_oneof![1..2000u32, 65_536..300_000u32],
        start in prop_oneof![Just(0), Just(u32::MAX - 1000)],
        steps in proptest::collection::vec(step(), 1..200),
    ) {
        let mut connection = Connection::from_near(PORTS);
        // Counters wrap around.
        (connection.sent, connection.far_forwarded) = (start, start);
        (connection.received, connection.forwarded, connection.announced) = (start, start, start);
        let mut guest = Guest {
            space, held: 0, forwarded: start, sent: start, host_space: 0, host_forwarded: start, answers: VecDeque::new(),
        };
        let (mut pending, mut kept) = (0u64, 0u32);
        let (mut written, mut arrived, mut from_far, mut at_host) = (0u64, 0u64, 0u64, 0u64);

        let mut act = |step: &Step| -> bool {
            let mut moved = false;
            match *step {
                Step::HostWrites(count) => {
                    pending += u64::from(count);
                    written += u64::from(count);
                }
                Step::DeviceSends(room) => {
                    let at_hand = pending.min(connection.wants() as u64) as usize;
                    let host = NearSide { pending: at_hand, readable: pending > 0, ..NearSide::default() };
                    if let Some(packet) = connection.next(host, room.into()) {
                        let header = connection.sent(packet, CIDS);
                        pending -= u64::from(packet.length);
                        guest.receive(&header);
                        moved = true;
                    }
                }
                Step::GuestReads(count) => {
                    let count = count.min(guest.held);
                    guest.held -= count;
                    guest.forwarded = guest.forwarded.wrapping_add(count);
                    arrived += u64::from(count);
                    moved |= count > 0;
                    // Linux sends an update when the peer may run out of credit.
                    if count > 0 {
                        guest.answers.push_back(guest.header(Operation::CreditUpdate, 0));
                    }
                }
                Step::GuestWrites(count) => {
                    let used = guest.sent.wrapping_sub(guest.host_forwarded);
                    let count = count.min(guest.host_space.saturating_sub(used));
                    if count > 0 && !connection.is_requesting() {
                        guest.sent = guest.sent.wrapping_add(count);
                        from_far += u64::from(count);
                        guest.answers.push_back(guest.header(Operation::Data, count));
                    }
                }
                Step::HostReads(count) => {
                    let count = count.min(kept);
                    kept -= count;
                    connection.forward(count as usize);
                    at_host += u64::from(count);
                    moved |= count > 0;
                }
            }
            for header in std::mem::take(&mut guest.answers) {
                match connection.receive(&header) {
                    Verdict::Continue | Verdict::Accepted => {}
                    Verdict::Deliver => kept += header.length,
                    other => panic!("{other:?} on {header:?}"),
                }
            }
            assert!(kept <= BUFFER_SPACE);
            moved
        };
        for step in &steps {
            act(step);
        }
        // From any state, once both programs read, all bytes arrive and no more packets are due.
        let mut rest = 0;
        let mut moved = true;
        while moved {
            moved = act(&Step::DeviceSends(4096));
            moved |= act(&Step::GuestReads(u32::MAX));
            moved |= act(&Step::HostReads(u32::MAX));
            rest += 1;
            assert!(rest < 1_000_000, "no rest");
        }
        prop_assert_eq!((arrived, at_host), (written, from_far));
    }

    #[test]
    fn a_guest_that_follows_no_rules_breaks_no_invariant(
        by_far: bool,
        script in proptest::collection::vec(
            (0..10u16, any::<u32>(), any::<u32>(), any::<u32>(), 0..5u32, any::<[bool; 5]>()), 1..300),
    ) {
        let mut connection =
            if by_far { Connection::from_far(&of(Operation::Request)) } else { Connection::from_near(PORTS) };
        let mut requested = false;
        for (operation, length, buffer_space, forwarded, flags, [sends, ended, deaf, readable, flush]) in script {
            let header = Header { length: length % 100_000, buffer_space, forwarded, flags, ..from_far(operation) };
            let held = connection.held();
            match connection.receive(&header) {
                Verdict::Over { .. } => break,
                Verdict::Deliver => prop_assert_eq!(connection.held(), held + header.length),
                Verdict::Accepted => prop_assert!(requested && !by_far),
                Verdict::Continue | Verdict::Shut => prop_assert_eq!(connection.held(), held),
            }
            prop_assert!(connection.held() <= BUFFER_SPACE);
            prop_assert!(connection.wants() as u64 <= u64::from(buffer_space));
            if flush {
                connection.forward(connection.held() as usize);
            }
            let host = NearSide { pending: (length % 5000) as usize, readable, ended, deaf };
            if sends && let Some(packet) = connection.next(host, 1000) {
                prop_assert!(packet.length as usize <= host.pending.min(1000).min(connection.wants()));
                requested |= packet.operation == Operation::Request;
                let sent = connection.sent(packet, CIDS);
                prop_assert_eq!(sent.destination_port, connection.ports().far);
                // What was sent is not due again, except for data.
                prop_assert!(packet.length > 0 || connection.next(host, 1000) != Some(packet));
            }
        }
    }
}
