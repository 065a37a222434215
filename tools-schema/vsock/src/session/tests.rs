//! Tests of the codec: whatever comes before a HELLO, in whatever pieces, and a guest that breaks the protocol.

use proptest::prelude::*;

use super::*;
use crate::packet::Operation;

const GUEST: Cids = Cids { near: 3, far: 2 };
const HOST: Cids = Cids { near: 2, far: 3 };

fn nonce(text: &str) -> Nonce {
    text.parse().unwrap()
}

fn hello(cids: Cids, text: &str) -> Vec<u8> {
    let mut sender = Sender::default();
    sender.hello(cids, nonce(text));
    sender.pending().to_vec()
}

fn packet(length: usize) -> Vec<u8> {
    let header = Header {
        source_cid: 3,
        destination_cid: 2,
        kind: STREAM,
        operation: Operation::Data as u16,
        length: length as u32,
        ..Header::default()
    };
    [&header.encode()[..], &vec![7; length]].concat()
}

/// Returns what a receiver makes of bytes that come in pieces of at most this size.
fn all(receiver: &mut Receiver, mut bytes: &[u8], piece: usize) -> Result<Vec<String>, Broken> {
    let mut seen = vec![];
    loop {
        while let Some(incoming) = receiver.take()? {
            seen.push(match incoming {
                Incoming::Hello(nonce) => format!("hello {nonce}"),
                Incoming::Packet(header, payload) => {
                    assert_eq!(header.length as usize, payload.len());
                    payload.len().to_string()
                }
            });
        }
        if bytes.is_empty() {
            return Ok(seen);
        }
        let read = |room: &mut [u8]| {
            assert!(room.len() >= FRAME_MAX);
            let count = piece.min(bytes.len()).min(room.len());
            room[..count].copy_from_slice(&bytes[..count]);
            Ok(count)
        };
        let count = receiver.fill(read).unwrap();
        bytes = &bytes[count..];
    }
}

#[test]
fn nonces_are_short_words() {
    let long = "x".repeat(65);
    for bad in ["", "a b", "a\n", "ä", &long] {
        assert!(bad.parse::<Nonce>().is_err(), "{bad:?}");
    }
    assert_eq!(nonce(&long[1..]).to_string(), long[1..]);
    assert_eq!(Nonce::decode(b"ab\0c"), None);
}

#[test]
fn a_session_begins_with_the_hello_that_is_waited_for() {
    // The tail of an earlier session, an old HELLO, the host's own words, and a HELLO that was cut off.
    let stale = [
        &packet(30_000)[44..],
        &hello(GUEST, "old"),
        &hello(HOST, "new"),
        &packet(100),
        &hello(GUEST, "new")[..60],
        &hello(GUEST, "new"),
        &packet(5),
        &packet(FRAME_MAX - HEADER_LEN),
        &packet(0),
    ]
    .concat();
    for piece in [1, 7, 43, 4096, 100_000] {
        let mut receiver = Receiver::new(HOST, Expected::This(nonce("new")));
        let seen = all(&mut receiver, &stale, piece).unwrap();
        assert_eq!(seen, ["hello new", "5", "32724", "0"], "in pieces of {piece}");
        assert!(receiver.is_open());
    }
    let mut receiver = Receiver::new(HOST, Expected::Any);
    let seen = all(&mut receiver, &stale, 4096);
    assert_eq!(seen, Err(Broken { what: "a HELLO is malformed" }), "the guest does not speak as the host");
}

#[test]
fn an_agent_that_starts_again_begins_a_new_session() {
    let bytes = [hello(GUEST, "one"), packet(10), hello(GUEST, "two"), packet(20)].concat();
    let mut receiver = Receiver::new(HOST, Expected::This(nonce("one")));
    assert_eq!(all(&mut receiver, &bytes, 50).unwrap(), ["hello one", "10", "hello two", "20"]);
    receiver.wait(Expected::This(nonce("three")));
    let bytes = [packet(10), hello(GUEST, "two"), hello(GUEST, "three")].concat();
    assert_eq!(all(&mut receiver, &bytes, 50).unwrap(), ["hello three"]);
}

#[test]
fn endless_and_malformed_packets_end_a_session_and_take_no_memory() {
    let mut endless = packet(1);
    endless[24..28].copy_from_slice(&u32::MAX.to_le_bytes());
    let mut false_hello = hello(GUEST, "x");
    false_hello[50] ^= 1;
    for bad in [endless, false_hello] {
        let mut receiver = Receiver::new(HOST, Expected::Any);
        all(&mut receiver, &hello(GUEST, "a"), 1000).unwrap();
        all(&mut receiver, &bad, 1000).unwrap_err();
        assert!(!receiver.is_open());
        // It can begin again.
        assert_eq!(all(&mut receiver, &hello(GUEST, "b"), 1000).unwrap(), ["hello b"]);
    }
    let mut receiver = Receiver::new(HOST, Expected::Any);
    for _ in 0..100 {
        assert!(all(&mut receiver, &packet(32_000), 9999).unwrap().is_empty(), "never a HELLO");
    }
    assert_eq!(receiver.buffer.len(), BUFFER);
}

proptest! {
    #[test]
    fn garbage_neither_opens_a_session_nor_hides_the_hello_after_it(
        garbage in proptest::collection::vec(any::<u8>(), 0..5000),
        cut in 0..HELLO_LEN,
        piece in 1..5000usize,
    ) {
        let bytes = [&garbage, &hello(GUEST, "x")[..cut], &hello(GUEST, "x")].concat();
        let mut receiver = Receiver::new(HOST, Expected::Any);
        prop_assert_eq!(all(&mut receiver, &bytes, piece).unwrap(), ["hello x"]);
    }

    #[test]
    fn a_guest_that_says_anything_breaks_nothing(
        parts in proptest::collection::vec(prop_oneof![
            3 => (0..FRAME_MAX - HEADER_LEN).prop_map(packet),
            1 => Just(hello(GUEST, "y")),
            1 => proptest::collection::vec(any::<u8>(), 0..200),
        ], 0..20),
        piece in 1..40_000usize,
    ) {
        let mut receiver = Receiver::new(HOST, Expected::Any);
        for part in parts {
            let _broken_or_not = all(&mut receiver, &part, piece);
            prop_assert!(receiver.start <= receiver.end && receiver.end <= BUFFER);
        }
    }
}
