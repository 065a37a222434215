//! Passing of open files over Unix sockets, together with bytes (unix(7), `SCM_RIGHTS`).

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

/// Maximum number of files that are passed at once.
pub(crate) const FILES_MAX: usize = 2;

/// Sends the start of `bytes`, with at most [`FILES_MAX`] files. Returns how many bytes were sent; if any were, so were the files.
pub(crate) fn send(stream: impl AsFd, bytes: &[u8], files: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES_MAX))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fits = files.len() <= FILES_MAX
        && (files.is_empty() || ancillary.push(SendAncillaryMessage::ScmRights(files)));
    if !fits {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many files to pass at once"));
    }
    Ok(sendmsg(stream, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL)?)
}

/// Receives bytes, and adds the files that came with them to `files`. Returns the number of bytes, 0 at the end. The kernel closes files
/// that do not fit.
pub(crate) fn receive(stream: impl AsFd, buffer: &mut [u8], files: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES_MAX))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(stream, &mut [IoSliceMut::new(buffer)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(passed) = message {
            files.extend(passed);
        }
    }
    Ok(received.bytes)
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Seek as _, Write as _};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn files_arrive_with_the_bytes() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut written: Vec<std::fs::File> = (0..2).map(|_| tempfile::tempfile().unwrap()).collect();
        for (number, file) in (0u8..).zip(&mut written) {
            file.write_all(&[number]).unwrap();
        }
        let passed: Vec<BorrowedFd<'_>> = written.iter().map(AsFd::as_fd).collect();
        assert_eq!(send(&ours, b"two\n", &passed).unwrap(), 4);
        assert_eq!(send(&ours, b"none\n", &[]).unwrap(), 5);
        drop(ours);
        let (mut buffer, mut files) = ([0; 4], Vec::new());
        assert_eq!(receive(&theirs, &mut buffer, &mut files).unwrap(), 4);
        assert_eq!((&buffer, files.len()), (b"two\n", 2));
        let mut rest = [0; 64];
        assert_eq!(receive(&theirs, &mut rest, &mut files).unwrap(), 5);
        assert_eq!(receive(&theirs, &mut rest, &mut files).unwrap(), 0);
        assert_eq!(files.len(), 2);
        for (number, file) in (0u8..).zip(files) {
            let mut file = std::fs::File::from(file);
            file.rewind().unwrap();
            let mut content = Vec::new();
            file.read_to_end(&mut content).unwrap();
            assert_eq!(content, [number]);
        }
    }

    #[test]
    fn more_files_than_allowed_are_refused() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        let error = send(&ours, b"x", &[file.as_fd(); FILES_MAX + 1]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
}
