//! Hands open TAP devices over: from a `nexus-net` in a network namespace of its own to the process that starts a VM, which is not in it.
//!
//! Over a Unix socket of its own, one TAP per connection: the client sends the TAP's name and a line end. The answer is a line: empty and
//! with the descriptor, or the reason why there is none.

use std::io::{self, IoSlice, IoSliceMut, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

use crate::tap::NAME_MAX;

/// The file name of the socket, beside the one for requests.
pub const SOCKET: &str = "tap.sock";

/// Maximum length of a reason, in bytes.
const REASON_MAX: u64 = 512;

/// Asks for a TAP by its name, and returns it open, with `NONBLOCK`. Blocks for as long as the stream's timeouts allow.
///
/// # Errors
/// `InvalidInput` if the name is empty or too long; the error of the connection; `Other` with the reason of `nexus-net`.
pub fn take(mut stream: &UnixStream, name: &str) -> io::Result<OwnedFd> {
    if name.is_empty() || name.len() >= NAME_MAX || name.contains('\n') {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a valid device name"));
    }
    stream.write_all(format!("{name}\n").as_bytes())?;
    let mut first = [0; 1];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received =
        recvmsg(stream, &mut [IoSliceMut::new(&mut first)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    if received.bytes == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let passed = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    if let (b"\n", Some(device)) = (&first, passed) {
        return Ok(device);
    }
    let mut reason = Vec::from(first);
    stream.take(REASON_MAX).read_to_end(&mut reason)?;
    Err(io::Error::other(String::from_utf8_lossy(&reason).trim().to_owned()))
}

/// Answers a client with a TAP, or with the reason why there is none.
///
/// # Errors
/// The error of the connection.
pub fn give(client: impl AsFd, tap: Result<&OwnedFd, &str>) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let line = match tap {
        Ok(_) => "\n".to_owned(),
        Err(reason) => format!("{}\n", reason.replace('\n', " ")),
    };
    let fds = tap.ok().map(AsFd::as_fd);
    if let Some(fd) = &fds {
        ancillary.push(SendAncillaryMessage::ScmRights(std::slice::from_ref(fd)));
    }
    sendmsg(client, &[IoSlice::new(line.as_bytes())], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{BufRead as _, BufReader};

    use super::*;

    fn answered(tap: Result<&OwnedFd, &str>) -> (String, io::Result<OwnedFd>) {
        let (client, server) = UnixStream::pair().unwrap();
        let asking = std::thread::spawn(move || take(&client, "nx0"));
        let mut name = String::new();
        BufReader::new(&server).read_line(&mut name).unwrap();
        give(&server, tap).unwrap();
        drop(server);
        (name, asking.join().unwrap())
    }

    #[test]
    fn a_descriptor_is_handed_over() {
        let (mut reader, writer) = io::pipe().unwrap();
        let (name, taken) = answered(Ok(&OwnedFd::from(writer)));
        assert_eq!(name, "nx0\n");
        File::from(taken.unwrap()).write_all(b"through").unwrap();
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "through");
    }

    #[test]
    fn a_reason_is_an_error() {
        let (_, taken) = answered(Err("there is no\nnx0"));
        assert_eq!(taken.unwrap_err().to_string(), "there is no nx0");
        for name in ["", "0123456789abcdef", "a\nb"] {
            let (client, _server) = UnixStream::pair().unwrap();
            assert_eq!(take(&client, name).unwrap_err().kind(), io::ErrorKind::InvalidInput, "{name:?}");
        }
    }

    #[test]
    fn an_end_without_an_answer_is_an_error() {
        let (client, server) = UnixStream::pair().unwrap();
        let asking = std::thread::spawn(move || take(&client, "nx0"));
        let mut name = String::new();
        BufReader::new(&server).read_line(&mut name).unwrap();
        drop(server);
        assert_eq!(asking.join().unwrap().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
