//! Connections that near programs open: by the line `CONNECT`, or handed over.

use std::io;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::io::Errno;
use rustix::net::RecvFlags;

use super::{ACCEPTS_PER_TURN, CONNECTIONS_MAX, Device, Front, GREETINGS_MAX, Live, Slot, Token};
use crate::connection::{Connection, Ports};
use crate::greeting::{Greeting, LINE_MAX, Progress};

impl<F: Front> Device<F> {
    /// Connects a near program, whose end of this socket pair is elsewhere, to a port of the far side. The socket is non-blocking.
    ///
    /// # Errors
    /// When there are too many connections.
    pub fn dial(&mut self, socket: UnixStream, port: u32) -> io::Result<()> {
        if self.counts.all >= CONNECTIONS_MAX {
            return Err(io::Error::other("too many connections"));
        }
        let ports = Ports { near: self.free_port(port), far: port };
        let (lane, since) = (self.lane_of(port), Instant::now());
        let connection = Connection::from_near(ports);
        let token = self.add(socket, |stream| {
            Slot::Live(Live { connection, stream, by_far: false, greeted: false, lane, queued: false, since })
        })?;
        self.tokens.insert(ports, token);
        self.start_timer();
        self.enqueue(token);
        Ok(())
    }

    pub(super) fn accept(&mut self) {
        self.accept_later = false;
        for _ in 0..ACCEPTS_PER_TURN {
            let Some(listener) = self.front.listener() else { return };
            let stream = match listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    (self.traits.say)(format_args!("cannot accept a connection: {error}"));
                    self.accept_later = true;
                    return self.start_timer();
                }
            };
            if self.counts.all >= CONNECTIONS_MAX || self.counts.greeting >= GREETINGS_MAX {
                self.refused("too many connections from the near side");
                continue;
            }
            let slot =
                |stream| Slot::Greeting { stream, greeting: Greeting::default(), since: Instant::now() };
            match stream.set_nonblocking(true).and_then(|()| self.add(stream, slot)) {
                Ok(token) => {
                    self.start_timer();
                    self.greet(token);
                }
                Err(error) => (self.traits.say)(format_args!("cannot watch a connection: {error}")),
            }
        }
        self.accept_later = true;
        self.come_back();
    }

    /// Continues to read a near program's first line. Bytes after it stay in the socket.
    pub(super) fn greet(&mut self, token: Token) {
        let Some(Slot::Greeting { stream, greeting, .. }) = self.slots.get_mut(&token) else { return };
        let mut bytes = [0; LINE_MAX];
        let progress = loop {
            let room = greeting.room();
            let seen = match rustix::net::recv(stream.socket(), &mut bytes[..room], RecvFlags::PEEK) {
                Ok((0, _)) => break Progress::Refused,
                Ok((count, _)) => count,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return,
                Err(_) => break Progress::Refused,
            };
            let (taken, progress) = greeting.take(&bytes[..seen]);
            // These bytes were peeked, so this reads all of them.
            match rustix::net::recv(stream.socket(), &mut bytes[..taken], RecvFlags::empty()) {
                Ok((count, _)) if count == taken => {}
                _ => break Progress::Refused,
            }
            if progress != Progress::More {
                break progress;
            }
        };
        let Some(Slot::Greeting { stream, .. }) = self.take(token) else { return };
        let Progress::Connect(far) = progress else { return };
        let ports = Ports { near: self.free_port(far), far };
        let connection = Connection::from_near(ports);
        self.tokens.insert(ports, token);
        let (lane, since) = (self.lane_of(far), Instant::now());
        let (by_far, greeted, queued) = (false, true, false);
        self.put(token, Slot::Live(Live { connection, stream, by_far, greeted, lane, queued, since }));
        self.start_timer();
        self.enqueue(token);
    }

    /// Returns a near port that is not in use with this far port, far from the ports that programs listen on.
    fn free_port(&mut self, far: u32) -> u32 {
        loop {
            self.next_port = self.next_port.wrapping_add(1) & 0x3fff_ffff;
            let near = 0x4000_0000 | self.next_port;
            if !self.tokens.contains_key(&Ports { near, far }) {
                return near;
            }
        }
    }
}
