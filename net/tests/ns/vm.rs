//! A VM of the tests: a namespace whose network card is a TAP. A thread copies frames between it and the host's TAP, as a VMM does.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nexus_net_wire::{Instance, Vm, tap};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::fs::OFlags;

use crate::world::{Net, Ns, PATIENCE, SILENCE, World, vm};

/// Opens a TAP as a VMM does; creates it if it does not exist.
fn open_tap(name: &str) -> io::Result<File> {
    Ok(tap::open(name, OFlags::empty())?.0.into())
}

/// A running VM.
pub struct Guest {
    pub ns: Ns,
    pub vm: Vm,
    pub gateway: IpAddr,
    stop: Arc<AtomicBool>,
    copier: Option<JoinHandle<()>>,
}

impl Guest {
    /// Attaches the VM with this number, without groups and with the default policy, and runs it.
    pub fn new(world: &World, net: &mut Net, number: u8) -> Self {
        let vm = vm(&net.instance, number);
        Self::attach(world, net, &vm)
    }

    /// Attaches a VM and runs it.
    pub fn attach(world: &World, net: &mut Net, vm: &Vm) -> Self {
        let tap = net.attach(vm).tap;
        Self::run(world, &net.instance, vm, &tap)
    }

    /// Runs a VM on a TAP.
    pub fn run(world: &World, instance: &Instance, vm: &Vm, tap: &str) -> Self {
        let ns = Ns::new();
        let name = tap.to_owned();
        let outer = world.host.run(move || open_tap(&name)).unwrap();
        let inner = ns.run(|| open_tap("eth0")).unwrap();
        ns.write("/proc/sys/net/ipv4/conf/all/accept_redirects", "0");
        ns.ip(&format!("link set eth0 address {}", vm.mac));
        ns.ip(&format!("addr add {}/32 dev eth0", vm.ipv4));
        ns.ip("link set eth0 up");
        ns.ip(&format!("route add {} dev eth0", instance.v4.gateway));
        ns.ip(&format!("route add default via {} dev eth0", instance.v4.gateway));
        if let (Some(v6), Some(subnet)) = (vm.ipv6, instance.v6) {
            ns.ip(&format!("-6 addr add {v6}/128 dev eth0 nodad"));
            ns.ip(&format!("-6 route add {} dev eth0", subnet.gateway));
            ns.ip(&format!("-6 route add default via {} dev eth0", subnet.gateway));
        }
        ns.settle();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let copier = std::thread::spawn(move || copy(&outer, &inner, &stopped));
        Self { ns, vm: vm.clone(), gateway: instance.v4.gateway.into(), stop, copier: Some(copier) }
    }

    /// Connects, and returns the client's address as the server sees it.
    pub fn tcp(&self, to: &str, port: u16) -> io::Result<(TcpStream, String)> {
        let to = SocketAddr::new(to.parse().unwrap(), port);
        let stream = self.ns.run(move || TcpStream::connect_timeout(&to, PATIENCE))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut line = String::new();
        BufReader::new(stream.try_clone()?).read_line(&mut line)?;
        Ok((stream, line.trim().to_owned()))
    }

    /// Returns the client's address as a UDP server sees it; none if there is no answer.
    pub fn udp(&self, to: &str, port: u16) -> Option<String> {
        self.udp_from(None, to, port)
    }

    pub fn udp_from(&self, from: Option<&str>, to: &str, port: u16) -> Option<String> {
        let to = SocketAddr::new(to.parse().unwrap(), port);
        let any = if to.is_ipv4() { "0.0.0.0" } else { "::" };
        let from = SocketAddr::new(from.unwrap_or(any).parse().unwrap(), 0);
        let socket = self.ns.run(move || UdpSocket::bind(from)).unwrap();
        socket.connect(to).ok()?;
        socket.send(b"hello").ok()?;
        socket.set_read_timeout(Some(SILENCE)).unwrap();
        let mut buffer = [0; 100];
        let length = socket.recv(&mut buffer).ok()?;
        Some(String::from_utf8_lossy(&buffer[..length]).into_owned())
    }

    /// Returns whether a ping is answered.
    pub fn ping(&self, to: &str) -> bool {
        use rustix::net::{AddressFamily, SocketType, ipproto, socket, sockopt};
        let address: IpAddr = to.parse().unwrap();
        let socket = self.ns.run(move || match address {
            IpAddr::V4(_) => socket(AddressFamily::INET, SocketType::RAW, Some(ipproto::ICMP)),
            IpAddr::V6(_) => socket(AddressFamily::INET6, SocketType::RAW, Some(ipproto::ICMPV6)),
        });
        let socket = socket.unwrap();
        // The kernel fills in the checksum of ICMPv6.
        let (request, reply) = if address.is_ipv4() { (8, 0) } else { (128, 129) };
        let mut packet = [request, 0, 0, 0, 0x4e, 0x58, 0, 1];
        let sum = u32::from(u16::from(request) << 8) + 0x4e58 + 1;
        packet[2..4].copy_from_slice(&(!(sum as u16)).to_be_bytes());
        let to = SocketAddr::new(address, 0);
        if rustix::net::sendto(&socket, &packet, rustix::net::SendFlags::empty(), &to).is_err() {
            return false;
        }
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(SILENCE)).unwrap();
        let mut file = File::from(socket);
        let mut buffer = [0; 1500];
        let deadline = Instant::now() + SILENCE;
        while Instant::now() < deadline {
            let Ok(length) = file.read(&mut buffer) else { return false };
            let start = if address.is_ipv4() { 20 } else { 0 };
            if length >= start + 8 && buffer[start] == reply && buffer[start + 4..start + 6] == [0x4e, 0x58] {
                return true;
            }
        }
        false
    }

    /// Checks that a connection is refused, and quickly.
    #[track_caller]
    pub fn is_refused(&self, to: &str, port: u16) {
        let start = Instant::now();
        let error = self.tcp(to, port).expect_err(&format!("{to}:{port} is refused"));
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "{to}:{port}: {error}");
        assert!(
            start.elapsed() < Duration::from_secs(3),
            "a refusal of {to}:{port} is an answer, not a hang"
        );
    }

    #[track_caller]
    pub fn reaches(&self, to: &str, port: u16) -> TcpStream {
        self.tcp(to, port).unwrap_or_else(|error| panic!("{to}:{port}: {error}")).0
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(copier) = self.copier.take() {
            let _ = copier.join();
        }
    }
}

/// Checks that a sent line comes back.
pub fn echoes(stream: &mut TcpStream) -> io::Result<()> {
    stream.write_all(b"line\n")?;
    let mut line = String::new();
    BufReader::new(stream.try_clone()?).read_line(&mut line)?;
    if line == "line\n" { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

/// Copies frames in both directions.
fn copy(one: &File, other: &File, stop: &AtomicBool) {
    let mut buffer = vec![0; 1 << 17];
    while !stop.load(Ordering::Relaxed) {
        let mut fds = [one, other].map(|file| PollFd::new(file.as_fd(), PollFlags::POLLIN));
        if poll(&mut fds, PollTimeout::from(50_u16)).is_err() {
            continue;
        }
        let ready = fds.map(|fd| fd.revents().unwrap_or(PollFlags::empty()));
        for (is_ready, (mut from, mut to)) in ready.into_iter().zip([(one, other), (other, one)]) {
            if is_ready.contains(PollFlags::POLLERR) {
                // The interface is gone.
                return;
            }
            if is_ready.contains(PollFlags::POLLIN)
                && let Ok(length) = from.read(&mut buffer)
            {
                // A card that is down drops the frame.
                let _ = to.write(&buffer[..length]);
            }
        }
    }
}
