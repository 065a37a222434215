//! The framing: what is sent arrives, and a protocol violation closes the connection.

use std::time::Duration;

use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

use super::*;

type Ends = (Receiver<tokio::io::ReadHalf<DuplexStream>>, Sender<tokio::io::WriteHalf<DuplexStream>>);

/// Both sides of a stream, over a connection that buffers `size` bytes.
fn pair(size: usize) -> (Ends, Ends) {
    let (near, far) = duplex(size);
    let ends = |stream| {
        let (read, write) = tokio::io::split(stream);
        over(read, write, BytesMut::new())
    };
    (ends(near), ends(far))
}

/// Feeds these bytes to a receiver; returns how many frames it accepted, and how it ended.
async fn received(bytes: &[u8]) -> (usize, Result<(), FrameError>) {
    let (mut receiver, _sender) = over(bytes, tokio::io::sink(), BytesMut::new());
    let mut count = 0;
    loop {
        match receiver.next().await {
            Ok(Some(_)) => count += 1,
            Ok(None) => return (count, Ok(())),
            Err(error) => return (count, Err(error)),
        }
    }
}

fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    [&[kind], &length[1..], payload].concat()
}

fn blocking<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

#[tokio::test]
async fn every_kind_comes_over_in_order() {
    let ((_near, sender), (mut receiver, _far)) = pair(64);
    let sending = tokio::spawn(async move {
        sender.data(b"out").await.unwrap();
        sender.stderr(b"err").await.unwrap();
        sender.control(b"{}").await.unwrap();
        sender.end().await.unwrap();
        sender.done(b"{\"ok\":{}}").await.unwrap();
        assert!(matches!(sender.control(b"{}").await, Err(FrameError::Closed)), "done is the last");
    });
    for expected in [
        Incoming::Data("out".into()),
        Incoming::Stderr("err".into()),
        Incoming::Control("{}".into()),
        Incoming::End,
        Incoming::Done("{\"ok\":{}}".into()),
    ] {
        assert_eq!(receiver.next().await.unwrap(), Some(expected));
    }
    sending.await.unwrap();
    assert_eq!(receiver.next().await.unwrap(), None);
}

#[tokio::test]
async fn data_waits_for_credit_and_nothing_else_does() {
    let ((mut near, sender), (mut receiver, far)) = pair(8 << 20);
    let first = vec![1; WINDOW as usize];
    sender.data(&first).await.unwrap();
    // Everything within the credit was sent; one more byte has to wait, and a message overtakes it.
    let more = tokio::spawn({
        let sender = sender.clone();
        async move { sender.data(&[2]).await }
    });
    sender.control(b"{}").await.unwrap();
    let mut taken = 0;
    loop {
        match receiver.next().await.unwrap().unwrap() {
            Incoming::Data(bytes) => taken += bytes.len(),
            other => break assert_eq!(other, Incoming::Control("{}".into())),
        }
    }
    assert_eq!(taken, WINDOW as usize);
    assert!(!more.is_finished());
    // The sender gets the credit when its other end is read.
    let listening = tokio::spawn(async move { near.next().await.map(drop) });
    far.took(taken).await.unwrap();
    assert_eq!(receiver.next().await.unwrap(), Some(Incoming::Data(vec![2].into())));
    more.await.unwrap().unwrap();
    drop((receiver, far));
    listening.await.unwrap().unwrap();
    assert!(matches!(sender.room().await, Err(FrameError::Closed)), "nothing can be sent any more");
}

#[test]
fn frames_fill_whole_packets() {
    for (there, most) in [
        (0, PIECE),
        (1000, PIECE),
        (PACKET - HEADER - 1, PIECE),
        (PACKET - HEADER, PACKET - HEADER),
        (PACKET, PACKET - HEADER),
        (2 * PACKET, 2 * PACKET - HEADER),
        (4 * PACKET - HEADER - 1, 3 * PACKET - HEADER),
        (4 * PACKET, PIECE),
        (usize::MAX, PIECE),
    ] {
        assert_eq!(whole(there), most, "{there}");
    }
    assert_eq!((PIECE + HEADER) % PACKET, 0);
}

#[tokio::test]
async fn a_little_credit_is_not_used_up_by_a_small_frame() {
    let ((mut near, sender), (mut receiver, far)) = pair(8 << 20);
    let left = 1000;
    sender.data(&vec![1; WINDOW as usize - left]).await.unwrap();
    let sending = tokio::spawn({
        let sender = sender.clone();
        async move { sender.data(&vec![2; PIECE]).await }
    });
    // What fits is not held back.
    tokio::task::yield_now().await;
    sender.data(&[3]).await.unwrap();
    let (mut taken, mut sizes) = (0, Vec::new());
    while taken < WINDOW as usize - left + 1 {
        let Some(Incoming::Data(bytes)) = receiver.next().await.unwrap() else { panic!("data comes") };
        sizes.push(bytes.len());
        taken += bytes.len();
    }
    assert_eq!(sizes[..3], [PIECE; 3]);
    assert_eq!(sizes.last(), Some(&1));
    assert!(!sending.is_finished());
    let listening = tokio::spawn(async move { near.next().await.map(drop) });
    far.took(taken).await.unwrap();
    let Some(Incoming::Data(bytes)) = receiver.next().await.unwrap() else { panic!("data comes") };
    assert_eq!((bytes.len(), bytes[0]), (PIECE, 2));
    sending.await.unwrap().unwrap();
    drop((receiver, far));
    listening.await.unwrap().unwrap();
}

#[tokio::test]
async fn data_that_was_sent_early_costs_credit() {
    const EARLY: usize = 1000;
    let (near, far) = duplex(8 << 20);
    let (read, write) = tokio::io::split(near);
    let (_near, sender) = over_after(read, write, BytesMut::new(), EARLY as u32);
    let (read, write) = tokio::io::split(far);
    // It was read together with the line before it.
    let buffer = BytesMut::from(&frame(1, &[0; EARLY])[..]);
    let (mut receiver, _far) = over(read, write, buffer);
    let sending = tokio::spawn(async move { sender.data(&vec![1; WINDOW as usize]).await });
    let (mut taken, all) = (0, WINDOW as usize);
    while taken < all {
        let Some(Incoming::Data(bytes)) = receiver.next().await.unwrap() else { panic!("data comes") };
        taken += bytes.len();
    }
    assert_eq!(taken, all);
    assert!(!sending.is_finished(), "the rest has no credit");
    sending.abort();
}

#[tokio::test]
async fn rules_are_kept_or_the_stream_is_closed() {
    let data = frame(1, b"x");
    for (bytes, count) in [
        (vec![], 0),
        (data.clone(), 1),
        ([frame(3, b""), frame(5, b"{}"), frame(4, &[0, 0, 0, 1]), frame(6, b"{}")].concat(), 3),
        // Bytes after the last frame are ignored.
        ([frame(6, b""), b"anything".to_vec()].concat(), 1),
    ] {
        let (came, end) = received(&bytes).await;
        end.unwrap();
        assert_eq!(came, count, "{bytes:?}");
    }
    let full: Vec<u8> =
        (0..WINDOW as usize / PAYLOAD_MAX).flat_map(|_| frame(1, &vec![0; PAYLOAD_MAX])).collect();
    let credit = |bytes: u32| frame(4, &bytes.to_be_bytes());
    for (bytes, expected) in [
        (b"HTTP/1.1 200 OK\r\n".to_vec(), "unknown frame kind 72"),
        (frame(0, b""), "unknown frame kind 0"),
        (frame(7, b"x"), "unknown frame kind 7"),
        (frame(1, b""), "data frame of 0 bytes"),
        (frame(2, b""), "stderr frame of 0 bytes"),
        (vec![1, 4, 0, 1], "data frame of 262145 bytes"),
        (vec![2, 255, 255, 255], "stderr frame of 16777215 bytes"),
        (frame(3, b"x"), "end frame of 1 bytes"),
        (frame(4, &[0, 0, 1]), "credit frame of 3 bytes"),
        (vec![5, 1, 0, 1], "control frame of 65537 bytes"),
        (vec![6, 255, 255, 255], "done frame of 16777215 bytes"),
        ([full.clone(), data.clone()].concat(), "1 bytes of data exceed the credit of 0"),
        ([full, frame(2, b"ab")].concat(), "2 bytes of data exceed the credit of 0"),
        (credit(0), "invalid credit of 0 bytes"),
        (credit(u32::MAX), "invalid credit of 4294967295 bytes"),
        (credit(CREDIT_MAX), "invalid credit of 67108864 bytes"),
        (credit(CREDIT_MAX / 2).repeat(2), "invalid credit of 33554432 bytes"),
        ([frame(3, b""), data].concat(), "data frame after the end"),
        ([frame(3, b""), frame(2, b"x")].concat(), "stderr frame after the end"),
        ([frame(3, b""), frame(3, b"")].concat(), "end frame after the end"),
        (vec![1, 0, 0], "the connection ended within a frame"),
        (vec![1, 0, 0, 2, 7], "the connection ended within a frame"),
    ] {
        let (_, end) = received(&bytes).await;
        assert_eq!(end.unwrap_err().to_string(), expected);
    }
}

#[tokio::test]
async fn a_frame_is_refused_by_its_header_before_anything_is_buffered() {
    let (mut far, near) = duplex(64);
    let (read, write) = tokio::io::split(near);
    let (mut receiver, _sender) = over(read, write, BytesMut::new());
    far.write_all(&[1, 255, 255, 255]).await.unwrap();
    assert!(matches!(receiver.next().await, Err(FrameError::Length { length: 16_777_215, .. })));
}

#[tokio::test]
async fn frames_without_an_end_take_no_memory() {
    let endless = frame(5, &[b' '; 1000]).repeat(50_000);
    let (mut receiver, _sender) = over(&endless[..], tokio::io::sink(), BytesMut::new());
    while receiver.next().await.unwrap().is_some() {
        assert!(receiver.capacity() <= 512 << 10);
    }
}

#[tokio::test]
async fn a_frame_that_is_given_up_half_written_closes_the_stream() {
    let ((_near, sender), (_receiver, _far)) = pair(8);
    tokio::select! {
        biased;
        _ = sender.data(&[0; 100]) => panic!("there is room for 8 bytes only"),
        () = std::future::ready(()) => {}
    }
    assert!(matches!(sender.control(b"{}").await, Err(FrameError::Closed)));
}

#[tokio::test]
async fn a_line_is_read_and_what_follows_stays() {
    let mut buffer = BytesMut::new();
    let mut read = &b"{\"version\":1}\n\x01\0\0\x01x"[..];
    let line = read_line(&mut read, &mut buffer, 100).await.unwrap().unwrap();
    assert_eq!(line, "{\"version\":1}");
    assert_eq!(buffer, b"\x01\0\0\x01x"[..]);
    let (mut receiver, _sender) = over(read, tokio::io::sink(), buffer);
    assert_eq!(receiver.next().await.unwrap(), Some(Incoming::Data("x".into())));

    for (bytes, max) in [(&b"123456\n"[..], 5), (&b"1234567890"[..], 5)] {
        assert!(read_line(&mut &*bytes, &mut BytesMut::new(), max).await.is_err());
    }
    assert!(read_line(&mut tokio::io::repeat(b'x'), &mut BytesMut::new(), 64 << 10).await.is_err());
    assert_eq!(read_line(&mut &b"cut off"[..], &mut BytesMut::new(), 64).await.unwrap(), None);
    assert_eq!(read_line(&mut &b"12345\n"[..], &mut BytesMut::new(), 5).await.unwrap().unwrap(), "12345");
}

/// A side of a stream that echoes everything on its plain end.
async fn echo((mut receiver, sender): Ends) {
    let (plain, other) = duplex(1000);
    let (mut read, mut write) = tokio::io::split(plain);
    let echo = tokio::spawn(async move {
        let (mut read, mut write) = tokio::io::split(other);
        tokio::io::copy(&mut read, &mut write).await.unwrap();
        write.shutdown().await.unwrap();
    });
    assert_eq!(copy(&mut receiver, &sender, &mut read, &mut write).await.unwrap(), None);
    sender.done(b"{\"echo\":1}").await.unwrap();
    echo.await.unwrap();
}

#[tokio::test]
async fn bytes_are_copied_both_ways_with_half_close() {
    let ((mut receiver, sender), far) = pair(4096);
    let echo = tokio::spawn(echo(far));
    let sent: Vec<u8> = (0..5_000_000_u32).map(|n| (n * 31 / 7) as u8).collect();
    let (mine, plain) = duplex(64 << 10);
    let expected = sent.clone();
    let client = tokio::spawn(async move {
        let (mut read, mut write) = tokio::io::split(mine);
        let writing = tokio::spawn(async move {
            write.write_all(&sent).await.unwrap();
            write.shutdown().await.unwrap();
        });
        let mut back = Vec::new();
        read.read_to_end(&mut back).await.unwrap();
        writing.await.unwrap();
        back
    });
    let (mut read, mut write) = tokio::io::split(plain);
    let ended = copy(&mut receiver, &sender, &mut read, &mut write).await.unwrap();
    drop((read, write));
    assert!(client.await.unwrap() == expected);
    let last = match ended {
        Some(message) => Some(Incoming::Done(message)),
        None => receiver.next().await.unwrap(),
    };
    assert_eq!(last, Some(Incoming::Done("{\"echo\":1}".into())));
    echo.await.unwrap();
}

#[tokio::test]
async fn what_came_before_the_last_word_is_delivered() {
    let ((mut receiver, sender), (_far, far_sender)) = pair(1 << 20);
    let sent = vec![7; 500_000];
    far_sender.data(&sent).await.unwrap();
    far_sender.done(b"{}").await.unwrap();
    let (plain, mut mine) = duplex(100);
    let reading = tokio::spawn(async move {
        let mut got = vec![0; 500_000];
        mine.read_exact(&mut got).await.unwrap();
        got
    });
    let (mut read, mut write) = tokio::io::split(plain);
    let ended = copy(&mut receiver, &sender, &mut read, &mut write).await.unwrap();
    assert_eq!(ended, Some("{}".into()));
    assert!(reading.await.unwrap() == sent);
}

#[tokio::test]
async fn a_direction_that_stands_still_does_not_stop_the_other() {
    let ((near_receiver, near_sender), (mut receiver, sender)) = pair(1000);
    // The plain end of this side never accepts anything.
    let (plain, mine) = duplex(10);
    let copying = tokio::spawn(async move {
        let (mut read, mut write) = tokio::io::split(plain);
        let mut receiver = near_receiver;
        copy(&mut receiver, &near_sender, &mut read, &mut write).await.map(drop)
    });
    let flood = tokio::spawn({
        let sender = sender.clone();
        async move { sender.data(&vec![0; 4 << 20]).await }
    });
    let (_mine_read, mut mine_write) = tokio::io::split(mine);
    let other = tokio::spawn(async move {
        mine_write.write_all(&vec![1; 3 << 20]).await.unwrap();
        mine_write
    });
    let mut got = 0;
    let all = async {
        while got < 3 << 20 {
            match receiver.next().await.unwrap().unwrap() {
                Incoming::Data(bytes) => {
                    got += bytes.len();
                    // The flood is written by a task of its own.
                    sender.took(bytes.len()).await.unwrap();
                }
                other => panic!("{other:?}"),
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(60), all).await.expect("it comes through");
    assert!(!flood.is_finished(), "nobody took what was sent");
    flood.abort();
    copying.abort();
    drop(other.await.unwrap());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn garbage_ends_or_fails_and_nothing_more(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        blocking(async { drop(received(&bytes).await) });
    }

    #[test]
    fn frames_come_the_same_however_they_are_cut(
        frames in prop::collection::vec((1_u8..=7, prop::collection::vec(any::<u8>(), 0..12)), 0..20),
        cut in 1_usize..9,
    ) {
        let bytes: Vec<u8> = frames.iter().flat_map(|(kind, payload)| frame(*kind, payload)).collect();
        let whole = blocking(received(&bytes));
        let pieces = blocking(async {
            let (mut far, near) = duplex(cut);
            let (mut receiver, _sender) = over(near, tokio::io::sink(), BytesMut::new());
            let sent = bytes.clone();
            let sending = tokio::spawn(async move { far.write_all(&sent).await });
            let mut count = 0;
            let end = loop {
                match receiver.next().await {
                    Ok(Some(_)) => count += 1,
                    Ok(None) => break Ok(()),
                    Err(error) => break Err(error),
                }
            };
            drop(receiver);
            // A reader that has disconnected leaves the rest unread.
            let _ = sending.await.unwrap();
            (count, end)
        });
        prop_assert_eq!(whole.0, pieces.0);
        prop_assert_eq!(whole.1.map_err(|e| e.to_string()), pieces.1.map_err(|e| e.to_string()));
    }

    #[test]
    fn a_sender_never_sends_beyond_its_credit(
        sizes in prop::collection::vec(1_usize..600_000, 1..12),
        taken in prop::collection::vec(any::<bool>(), 12),
    ) {
        // The receiver checks every frame, so a sender that breaks a rule fails the test.
        blocking(async {
            let ((mut near, near_sender), (mut receiver, sender)) = pair(100_000);
            let total: usize = sizes.iter().sum();
            let sending = tokio::spawn(async move {
                for size in sizes {
                    near_sender.data(&vec![9; size]).await.unwrap();
                }
                near_sender.end().await.unwrap();
            });
            let listening = tokio::spawn(async move { near.next().await.map(drop) });
            let (mut got, mut at, mut held) = (0, 0, 0);
            loop {
                match receiver.next().await.unwrap() {
                    Some(Incoming::Data(bytes)) => {
                        got += bytes.len();
                        held += bytes.len();
                        at += 1;
                        // It sometimes consumes nothing for a while, as far as the credit allows.
                        if taken[at % taken.len()] || held > WINDOW as usize / 2 {
                            sender.took(std::mem::take(&mut held)).await.unwrap();
                        }
                    }
                    Some(Incoming::End) => break,
                    other => panic!("{other:?}"),
                }
            }
            assert_eq!(got, total);
            sending.await.unwrap();
            drop((receiver, sender));
            listening.await.unwrap().unwrap();
        });
    }
}
