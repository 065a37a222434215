//! Copies between a connection of plain bytes and frames without credit, on a connection that carries nothing else.
//!
//! Each side reads on only when it has passed on what it read, so the connection's own flow control holds up the sender, and each side buffers no more
//! than one read. The frames are data and end: an end is a frame, so that each direction ends separately and a connection that is cut has none.

use std::future::poll_fn;
use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::sync::Notify;

use super::{CopyError, FrameError, HEADER, Kind, PIECE, whole};
use crate::duplex::{Reader, Writer};

/// The size of the two buffers, in bytes: they grow from the first to the second with bulk data.
const SENT: (usize, usize) = (8 << 10, PIECE + HEADER);
const RECEIVED: (usize, usize) = (8 << 10, 128 << 10);
/// Frames of at most this length are passed on together, in bytes.
const SMALL: usize = 4 << 10;

/// Copies both ways until both directions have ended. `early` has bytes that were already read after the opening. Fails if the peer disconnects before
/// both have ended, also while the plain connection takes no more. A peer that was sent the end may have left with all it needs, and what it sent before
/// may include its own end: so then each write to the plain connection has `patience`; `None` waits forever.
pub async fn copy_uncredited(
    (reader, writer): (&mut Reader, &mut Writer),
    early: &[u8],
    read: &mut (impl AsyncRead + Unpin),
    write: &mut (impl AsyncWrite + Unpin),
    patience: Option<Duration>,
) -> Result<(), CopyError> {
    // Of this side's own direction. Only before it the peer's end of the connection is a failure: after it the peer may have left with all it needs.
    let (is_ended, ended) = (AtomicBool::new(false), Notify::new());
    let outwards = async {
        send(read, writer).await?;
        is_ended.store(true, Ordering::Release);
        ended.notify_one();
        Ok::<_, CopyError>(())
    };
    let inwards = async {
        let mut parts = Parts::new(early);
        while let Some(part) = parts.next(reader).await? {
            tokio::select! {
                biased;
                written = write.write_all(&parts.buffer[part]) => written.map_err(CopyError::Write)?,
                error = gone(reader, &is_ended, patience) => return Err(error.into()),
            }
        }
        write.shutdown().await.map_err(CopyError::Write)?;
        tokio::select! {
            biased;
            () = ended.notified() => Ok::<_, CopyError>(()),
            error = parts.more(reader) => Err(error.into()),
        }
    };
    tokio::try_join!(outwards, inwards)?;
    Ok(())
}

/// Sends frames until the plain connection ends, and then the end. After much data, what does not fill a packet goes with more, if that is there.
async fn send(
    read: &mut (impl AsyncRead + Unpin),
    writer: &mut (impl AsyncWrite + Unpin),
) -> Result<(), CopyError> {
    let mut frame = vec![0; SENT.0];
    // How many bytes wait behind the header.
    let mut there = 0;
    loop {
        let room = &mut frame[HEADER + there..];
        let more = if there == 0 { Some(read.read(room).await) } else { read_soon(read, room).await };
        let more = more.transpose().map_err(CopyError::Read)?;
        there += more.unwrap_or(0);
        let is_filled = HEADER + there == frame.len();
        let now = if more > Some(0) { whole(there).min(there) } else { there };
        if now > 0 {
            frame[..HEADER].copy_from_slice(&Kind::Data.header(now));
            writer.write_all(&frame[..HEADER + now]).await.map_err(FrameError::from)?;
        }
        if more == Some(0) {
            writer.write_all(&Kind::End.header(0)).await.map_err(FrameError::from)?;
            return Ok(());
        }
        frame.copy_within(HEADER + now..HEADER + there, HEADER);
        there -= now;
        if is_filled && frame.len() < SENT.1 {
            frame.resize((frame.len() * 4).min(SENT.1), 0);
        }
    }
}

/// Reads what is there, or comes while other tasks have their turn; `None` if nothing does.
async fn read_soon(read: &mut (impl AsyncRead + Unpin), room: &mut [u8]) -> Option<io::Result<usize>> {
    for is_last in [false, true] {
        let mut buffer = ReadBuf::new(room);
        let polled = poll_fn(|cx| Poll::Ready(Pin::new(&mut *read).poll_read(cx, &mut buffer))).await;
        if let Poll::Ready(result) = polled {
            return Some(result.map(|()| buffer.filled().len()));
        }
        if !is_last {
            tokio::task::yield_now().await;
        }
    }
    None
}

/// Waits until the peer is gone; if it had been sent the end, waits with `patience` from then on.
async fn gone(reader: &mut Reader, is_ended: &AtomicBool, patience: Option<Duration>) -> FrameError {
    match reader.closed().await {
        Ok(()) if is_ended.load(Ordering::Acquire) => match patience {
            Some(patience) => tokio::time::sleep(patience).await,
            None => std::future::pending().await,
        },
        Ok(()) => {}
        Err(error) => return error.into(),
    }
    FrameError::Closed
}

/// The received bytes, of which frames are not put together.
struct Parts {
    buffer: Vec<u8>,
    /// Which bytes of the buffer were not returned yet.
    there: Range<usize>,
    /// How much of the current frame is missing, in bytes.
    left: usize,
}

impl Parts {
    fn new(early: &[u8]) -> Self {
        let mut buffer = early.to_vec();
        buffer.resize(early.len().max(RECEIVED.0), 0);
        Self { buffer, there: 0..early.len(), left: 0 }
    }

    /// Returns where in the buffer the next data is; `None` at the end of this direction.
    async fn next(&mut self, reader: &mut Reader) -> Result<Option<Range<usize>>, FrameError> {
        loop {
            let part = self.take();
            if !part.is_empty() {
                return Ok(Some(self.with_small(part)));
            }
            let Some(header) = self.header() else {
                self.fill(reader).await?;
                continue;
            };
            let (kind, length) = header?;
            self.there.start += HEADER;
            match kind {
                Kind::Data => self.left = length,
                Kind::End => return Ok(None),
                _ => return Err(FrameError::UnknownKind { kind: kind as u8 }),
            }
        }
    }

    /// Takes what is there of the current frame.
    fn take(&mut self) -> Range<usize> {
        let start = self.there.start;
        let part = start..start + self.there.len().min(self.left);
        self.there.start = part.end;
        self.left -= part.len();
        part
    }

    /// Returns the next header, if the current frame is complete and the header is there.
    fn header(&self) -> Option<Result<(Kind, usize), FrameError>> {
        let header = self.buffer[self.there.clone()].first_chunk::<HEADER>()?;
        (self.left == 0).then(|| Kind::parse(*header))
    }

    /// Moves the data of small frames that are there behind a part, so that thousands of them are not as many writes.
    fn with_small(&mut self, mut part: Range<usize>) -> Range<usize> {
        while let Some(Ok((Kind::Data, length))) = self.header() {
            let start = self.there.start + HEADER;
            let there = length.min(self.there.end - start);
            if there == 0 || there > SMALL {
                break;
            }
            self.buffer.copy_within(start..start + there, part.end);
            part.end += there;
            self.there.start = start + there;
            self.left = length - there;
        }
        part
    }

    /// Reads more bytes.
    async fn fill(&mut self, reader: &mut Reader) -> Result<(), FrameError> {
        self.buffer.copy_within(self.there.clone(), 0);
        self.there = 0..self.there.len();
        let room = &mut self.buffer[self.there.end..];
        let (length, most) = (reader.read(room).await?, room.len());
        if length == 0 {
            let is_cut = self.left > 0 || !self.there.is_empty();
            return Err(if is_cut { FrameError::Cut } else { FrameError::Closed });
        }
        self.there.end += length;
        if length == most && self.buffer.len() < RECEIVED.1 {
            self.buffer.resize((self.buffer.len() * 4).min(RECEIVED.1), 0);
        }
        Ok(())
    }

    /// Waits after the end of this direction for what the peer must not do then: send more, or disconnect.
    async fn more(&mut self, reader: &mut Reader) -> FrameError {
        if self.there.is_empty()
            && let Err(error) = self.fill(reader).await
        {
            return error;
        }
        FrameError::AfterEnd { kind: Kind::Data }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Shutdown;
    use std::os::unix::net::UnixStream as Plain;

    use tokio::net::UnixStream;
    use tokio::task::JoinHandle;
    use tokio::time::timeout;

    use super::super::PAYLOAD_MAX;
    use super::*;
    use crate::duplex::split;

    const SOON: Duration = Duration::from_secs(20);

    /// Copies between the two sockets.
    fn copying(
        plain: UnixStream,
        framed: UnixStream,
        early: &'static [u8],
    ) -> JoinHandle<Result<(), CopyError>> {
        tokio::spawn(async move {
            let (mut reader, mut writer) = split(framed.into_std().unwrap().into()).unwrap();
            let (mut read, mut write) = plain.into_split();
            copy_uncredited((&mut reader, &mut writer), early, &mut read, &mut write, None).await
        })
    }

    /// One side of a stream: its copying, its program and its peer.
    fn one(early: &'static [u8]) -> (JoinHandle<Result<(), CopyError>>, UnixStream, UnixStream) {
        let ((program, plain), (framed, peer)) = (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
        (copying(plain, framed, early), program, peer)
    }

    #[tokio::test]
    async fn all_comes_over_in_both_directions_to_their_own_ends() {
        let (near, mut program, peer) = one(b"");
        let (plain, mut server) = UnixStream::pair().unwrap();
        let far = copying(plain, peer, b"");
        let sent: Vec<u8> = (0..5_000_000_u32).map(|n| (n * 31 / 7) as u8).collect();
        let expected = sent.clone();
        let asking = tokio::spawn(async move {
            program.write_all(b"small").await.unwrap();
            program.write_all(&sent).await.unwrap();
            program.shutdown().await.unwrap();
            let mut answer = Vec::new();
            program.read_to_end(&mut answer).await.unwrap();
            answer
        });
        let mut asked = Vec::new();
        server.read_to_end(&mut asked).await.unwrap();
        assert!(asked.starts_with(b"small") && asked[5..] == expected);
        server.write_all(&asked).await.unwrap();
        drop(server);
        assert!(asking.await.unwrap() == asked);
        for side in [near, far] {
            timeout(SOON, side).await.unwrap().unwrap().unwrap();
        }
    }

    #[tokio::test]
    async fn frames_of_much_data_fill_packets_and_the_rest_is_not_held_back() {
        let mut sent = Vec::new();
        send(&mut &[7_u8; 300_000][..], &mut sent).await.unwrap();
        let (mut rest, mut lengths) = (&sent[..], Vec::new());
        while let Some((header, behind)) = rest.split_first_chunk::<HEADER>() {
            let (_, length) = Kind::parse(*header).unwrap();
            lengths.push(length);
            rest = &behind[length..];
        }
        assert_eq!(lengths, [8188, 32_764, 131_068, 65_532, 62_448, 0]);

        let (_copied, mut program, peer) = one(b"");
        let (mut reader, _writer) = split(peer.into_std().unwrap().into()).unwrap();
        let writing = tokio::spawn(async move {
            program.write_all(&[7; 300_000]).await.unwrap();
            program
        });
        let (mut parts, mut received) = (Parts::new(b""), 0);
        while received < 300_000 {
            let part = timeout(SOON, parts.next(&mut reader)).await.unwrap().unwrap();
            received += part.unwrap().len();
        }
        drop(writing.await.unwrap());
    }

    #[tokio::test]
    async fn frames_are_taken_in_any_parts_and_nothing_else_is() {
        let data = |bytes: &[u8]| [&Kind::Data.header(bytes.len())[..], bytes].concat();
        let end = Kind::End.header(0);
        let (copied, mut program, mut peer) = one(b"\x01\0");
        for part in [&b"\0\x03ab"[..], b"c\x01\0\0", b"\x01d", &end] {
            peer.write_all(part).await.unwrap();
            tokio::task::yield_now().await;
        }
        let mut said = String::new();
        program.read_to_string(&mut said).await.unwrap();
        assert_eq!(said, "abcd");
        program.shutdown().await.unwrap();
        timeout(SOON, copied).await.unwrap().unwrap().unwrap();
        let mut answer = Vec::new();
        peer.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, end);

        let (near, mut far) = UnixStream::pair().unwrap();
        let (mut reader, _writer) = split(near.into_std().unwrap().into()).unwrap();
        // Small frames come together, with the beginning of a larger one.
        let all = [data(b"xyz").repeat(1000), data(&[7; SMALL + 1])[..100].to_vec()].concat();
        far.write_all(&all).await.unwrap();
        let mut parts = Parts::new(b"");
        let part = parts.next(&mut reader).await.unwrap().unwrap();
        assert_eq!(parts.buffer[part], [b"xyz".repeat(1000), vec![7; 96]].concat());
        assert_eq!((parts.there.len(), parts.left), (0, SMALL + 1 - 96));

        let long = [1_u8, 4, 0, 1];
        assert_eq!(usize::from(long[1]) << 16 | 1, PAYLOAD_MAX + 1);
        for (bytes, word) in [
            (&b"\x01\0\0\0"[..], "data frame of 0 bytes"),
            (&long, "data frame of 262145 bytes"),
            (b"\x04\0\0\x04\0\0\0\x01", "unknown frame kind 4"),
            (b"\xff\0\0\0", "unknown frame kind 255"),
            (&[&end[..], &data(b"x")].concat(), "data frame after the end"),
            (&data(b"xyz")[..5], "the connection ended within a frame"),
            (b"\x01\0", "the connection ended within a frame"),
            (&data(b"xyz"), "the stream is closed"),
            (&end, "the stream is closed"),
        ] {
            let (copied, _program, mut peer) = one(b"");
            peer.write_all(bytes).await.unwrap();
            drop(peer);
            let error = timeout(SOON, copied).await.unwrap().unwrap().unwrap_err();
            assert_eq!(error.to_string(), word, "{bytes:?}");
        }
    }

    #[tokio::test]
    async fn a_peer_that_leaves_is_noticed_while_a_program_reads_nothing() {
        let block = [&Kind::Data.header(PAYLOAD_MAX)[..], &[7; PAYLOAD_MAX]].concat();
        for is_ended in [false, true] {
            let (copied, mut program, mut peer) = one(b"");
            if is_ended {
                program.shutdown().await.unwrap();
                let mut end = [0; HEADER];
                peer.read_exact(&mut end).await.unwrap();
            }
            // More than the sockets hold.
            let mut sent = 0;
            while let Ok(Ok(length)) =
                timeout(Duration::from_millis(200), peer.write(&block[sent % block.len()..])).await
            {
                sent += length;
            }
            assert!(sent > 0 && !copied.is_finished());
            let is_between = sent.is_multiple_of(block.len());
            let peer: Plain = peer.into_std().unwrap();
            peer.shutdown(Shutdown::Both).unwrap();
            drop(peer);
            if is_ended {
                // It has all that it needs, and what it sent before goes on to the program.
                tokio::time::sleep(Duration::from_millis(50)).await;
                assert!(!copied.is_finished());
                let mut received = 0;
                let mut buffer = vec![0; 64 << 10];
                loop {
                    match program.read(&mut buffer).await.unwrap() {
                        0 => break,
                        length => received += length,
                    }
                }
                let frames = sent.div_ceil(block.len());
                assert_eq!(received, sent - frames * HEADER);
            }
            // There was no end of its own.
            let error = timeout(SOON, copied).await.unwrap().unwrap().unwrap_err();
            let closed = matches!(error, CopyError::Frames(FrameError::Closed));
            assert!(if is_ended { closed == is_between } else { closed }, "{error}");
        }
    }

    #[tokio::test]
    async fn a_program_that_reads_nothing_is_not_waited_for_forever_once_the_peer_is_gone() {
        let ((mut program, plain), (framed, mut peer)) =
            (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
        let copied = tokio::spawn(async move {
            let (mut reader, mut writer) = split(framed.into_std().unwrap().into()).unwrap();
            let (mut read, mut write) = plain.into_split();
            let patience = Some(Duration::from_millis(300));
            copy_uncredited((&mut reader, &mut writer), &[], &mut read, &mut write, patience).await
        });
        program.shutdown().await.unwrap();
        let mut end = [0; HEADER];
        peer.read_exact(&mut end).await.unwrap();
        // More than the sockets hold.
        let block = [&Kind::Data.header(PAYLOAD_MAX)[..], &[7; PAYLOAD_MAX]].concat();
        while let Ok(written) = timeout(Duration::from_millis(200), peer.write_all(&block)).await {
            written.unwrap();
        }
        tokio::time::sleep(Duration::from_millis(400)).await;
        assert!(!copied.is_finished(), "the peer is there");
        drop(peer);
        let error = timeout(SOON, copied).await.unwrap().unwrap().unwrap_err();
        assert!(matches!(error, CopyError::Frames(FrameError::Closed)), "{error}");
        drop(program);
    }
}
