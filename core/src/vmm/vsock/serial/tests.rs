//! Tests of the thread with a guest's side that is driven by hand.

use nexus_schema::link::{MCP_PORT, STREAM_PORT};
use nexus_vsock::Pairs;
use nexus_vsock::serial::Requests;

use super::*;

const DEADLINE: Duration = Duration::from_secs(60);

/// Lets time pass: the two ends of the ports are turned by hand, and what must not happen has no condition to wait for.
#[expect(clippy::disallowed_methods, reason = "between two turns of an end that is turned by hand")]
fn wait(time: Duration) {
    std::thread::sleep(time);
}

/// A guest's agent, with QEMU's ends of the ports in place of its own.
struct Guest {
    device: Device<Pairs>,
    control: UnixStream,
    lanes: Vec<(Lane, UnixStream)>,
    requests: Requests,
}

fn nonce(text: &str) -> Nonce {
    text.parse().unwrap()
}

impl Guest {
    fn new(ports: [OwnedFd; LANES + 1]) -> Self {
        let device = Device::new(serial::guest(say), Pairs::new(&[MCP_PORT, STREAM_PORT])).unwrap();
        let [control, calls, bulk] = ports.map(UnixStream::from);
        let lanes =
            [calls, bulk].into_iter().enumerate().map(|(index, port)| (Self::lane(index, "first"), port));
        let guest = Self { device, control, lanes: lanes.collect(), requests: Requests::default() };
        guest.control.set_nonblocking(true).unwrap();
        guest.lanes.iter().for_each(|(_, port)| port.set_nonblocking(true).unwrap());
        guest
    }

    fn lane(index: usize, text: &str) -> Lane {
        Lane::of_guest(index, serial::guest(say).cids, nonce(text))
    }

    fn begin(&mut self, text: &str) {
        for (index, (lane, _)) in self.lanes.iter_mut().enumerate() {
            lane.end(&mut self.device);
            *lane = Self::lane(index, text);
        }
    }

    fn asked(&mut self) -> Option<Nonce> {
        let mut bytes = [0; 1000];
        let count = (&self.control).read(&mut bytes).unwrap_or(0);
        self.requests.take(&bytes[..count])
    }

    fn turn(&mut self) {
        while self.device.poll() {}
        for (lane, port) in &mut self.lanes {
            lane.receive(&mut self.device, |room| (&*port).read(room)).unwrap();
        }
        while self.device.poll() {}
        for (lane, port) in &mut self.lanes {
            lane.send(&mut self.device, |bytes| (&*port).write(bytes)).unwrap();
        }
    }

    /// Goes on until there is something.
    fn until<T>(&mut self, what: &str, mut found: impl FnMut(&mut Self) -> Option<T>) -> T {
        let deadline = Instant::now() + DEADLINE;
        loop {
            self.turn();
            if let Some(found) = found(self) {
                return found;
            }
            assert!(Instant::now() < deadline, "never: {what}");
            wait(Duration::from_millis(1));
        }
    }

    /// Waits for a connection to a port.
    fn accept(&mut self, port: u32) -> UnixStream {
        let (accepted, socket) = self.until("a connection", |guest| guest.device.front_mut().take());
        assert_eq!(accepted, port);
        socket.into()
    }

    /// Lets a program read until its connection is closed.
    fn rest(&mut self, stream: &UnixStream) -> Vec<u8> {
        let (mut rest, mut chunk) = (Vec::new(), vec![0; 65_536]);
        self.until("the end", |_| {
            loop {
                match (&*stream).read(&mut chunk) {
                    Ok(0) => return Some(()),
                    Ok(count) => rest.extend_from_slice(&chunk[..count]),
                    Err(_) => return None,
                }
            }
        });
        rest
    }
}

fn dial(uds: &Path, port: u32) -> UnixStream {
    let mut stream = UnixStream::connect(uds).unwrap();
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
    stream.set_nonblocking(true).unwrap();
    stream
}

fn is_accepted(mut stream: &UnixStream) -> Option<()> {
    let mut line = [0; 32];
    let count = stream.read(&mut line).unwrap_or(0);
    line[..count].starts_with(b"OK ").then_some(())
}

#[test]
fn programs_of_host_and_guest_are_connected_and_begin_anew_after_a_relink() {
    let directory = tempfile::tempdir().unwrap();
    let uds = directory.path().join("v.sock");
    let (link, ports) = SerialLink::start(&uds).unwrap();
    let mut guest = Guest::new(ports);

    // Two bulk streams, one in each direction, that are under way all the time.
    let mut bulk = vec![];
    for port in [STREAM_PORT, STREAM_PORT, MCP_PORT] {
        let near = dial(&uds, port);
        let far = guest.accept(port);
        guest.until("OK", |_| is_accepted(&near));
        bulk.push((near, far));
    }
    let (mut down, mut up) = (0, 0);
    let deadline = Instant::now() + DEADLINE;
    while down < 5_000_000 || up < 5_000_000 {
        let [(near, far), (near_2, far_2), _] = &bulk[..] else { panic!("three of them") };
        let (mut near, mut far, mut near_2, mut far_2) = (near, far, near_2, far_2);
        let _full = near.write(&[1; 50_000]);
        let _full = far_2.write(&[2; 50_000]);
        guest.turn();
        let mut chunk = vec![0; 100_000];
        if let Ok(count) = far.read(&mut chunk) {
            assert!(chunk[..count].iter().all(|byte| *byte == 1));
            down += count;
        }
        if let Ok(count) = near_2.read(&mut chunk) {
            assert!(chunk[..count].iter().all(|byte| *byte == 2));
            up += count;
        }
        assert!(Instant::now() < deadline, "{down} bytes down, {up} up");
    }

    link.relink(nonce("second"));
    // It is asked until the agent hears it.
    for _ in 0..3 {
        let asked = guest.until("a request", Guest::asked);
        assert_eq!(asked, nonce("second"));
    }
    for (near, _) in &bulk {
        guest.rest(near);
    }
    // An agent that has not heard of it yet: what it says is not listened to.
    guest.begin("other");
    for _ in 0..20 {
        guest.turn();
        wait(Duration::from_millis(1));
    }
    assert!(guest.lanes.iter().all(|(lane, _)| !lane.is_open()));
    let early = dial(&uds, MCP_PORT);
    guest.begin("second");
    guest.until("sessions", |guest| guest.lanes.iter().all(|(lane, _)| lane.is_open()).then_some(()));
    for (near, far) in bulk {
        drop(near);
        guest.rest(&far);
    }
    let mut far = guest.accept(MCP_PORT);
    guest.until("OK", |_| is_accepted(&early));
    far.write_all(b"at once").unwrap();
    let mut read = vec![0; 7];
    guest.until("an answer", |_| (&early).read_exact(&mut read).ok());
    assert_eq!(read, b"at once");
    // It is not asked any more.
    wait(ASK_AGAIN * 2);
    guest.asked();
    wait(ASK_AGAIN * 2);
    assert_eq!(guest.asked(), None);

    drop(link);
    assert!(!uds.exists());
}

#[test]
fn a_guest_that_says_no_hello_costs_nothing_and_its_host_gets_no_answer() {
    let directory = tempfile::tempdir().unwrap();
    let uds = directory.path().join("v.sock");
    let (_link, ports) = SerialLink::start(&uds).unwrap();
    let [_control, calls, _bulk] = ports.map(UnixStream::from);
    let near = dial(&uds, MCP_PORT);
    calls.set_nonblocking(true).unwrap();
    let deadline = Instant::now() + DEADLINE;
    let mut written = 0;
    while written < 20_000_000 {
        written += (&calls).write(&[0x5a; 65_536]).unwrap_or(0);
        assert!(Instant::now() < deadline, "it stopped reading after {written} bytes");
    }
    assert_eq!(is_accepted(&near), None);
}

#[test]
fn a_guest_that_floods_its_ports_and_goes_on_with_an_old_session_is_heard_once_it_begins_the_new_one() {
    let directory = tempfile::tempdir().unwrap();
    let uds = directory.path().join("v.sock");
    let (link, ports) = SerialLink::start(&uds).unwrap();
    let mut guest = Guest::new(ports);
    let near = dial(&uds, MCP_PORT);
    let far = guest.accept(MCP_PORT);
    guest.until("OK", |_| is_accepted(&near));
    link.relink(nonce("second"));
    assert_eq!(guest.until("a request", Guest::asked), nonce("second"));
    guest.rest(&near);

    // The nonce of the session before, then noise on all ports, also on the one on which only the host speaks.
    guest.begin("first");
    guest.rest(&far);
    let early = dial(&uds, MCP_PORT);
    let deadline = Instant::now() + DEADLINE;
    let mut written = [0; LANES + 1];
    while written.iter().any(|count| *count < 300_000) {
        guest.turn();
        let ports = guest.lanes.iter().map(|(_, port)| port).chain([&guest.control]);
        for (mut port, count) in ports.zip(&mut written) {
            *count += port.write(&[0xa5; 4096]).unwrap_or(0);
        }
        assert!(Instant::now() < deadline, "it stopped reading after {written:?} bytes");
    }
    assert!(guest.lanes.iter().all(|(lane, _)| !lane.is_open()));
    assert_eq!(is_accepted(&early), None);

    guest.begin("second");
    let mut far = guest.accept(MCP_PORT);
    guest.until("OK", |_| is_accepted(&early));
    far.write_all(b"at last").unwrap();
    let mut read = vec![0; 7];
    guest.until("an answer", |_| (&early).read_exact(&mut read).ok());
    assert_eq!(read, b"at last");
}
