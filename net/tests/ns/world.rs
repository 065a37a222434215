//! The namespaces of the tests: the host with `nexus-net`, and the internet with its servers.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nexus_net_wire::{
    Answer, Attached, Client, ClientError, Configured, Denial, Dns, Event, Instance, Request, State, Subnet,
    Vm,
};
use nexus_schema::network::{NetworkMode, NetworkPolicy, NetworkPreset};
use nix::sched::{CloneFlags, unshare};
use tokio::net::UnixStream;
use tokio::runtime::Runtime;

/// Timeout for expected events.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// Time for which a test waits to see that something does not happen.
pub const SILENCE: Duration = Duration::from_millis(700);
/// The host's addresses on its link to the internet.
pub const HOST: &str = "198.51.100.1";
pub const HOST_V6: &str = "2001:db8:1::1";
pub const RESOLVER: &str = "198.51.100.53";
/// Servers: on the internet, in a private network, and the metadata service.
pub const PUBLIC: &str = "203.0.113.10";
pub const PUBLIC_TOO: &str = "203.0.113.20";
pub const PUBLIC_V6: &str = "2001:db8:2::10";
pub const PRIVATE: &str = "10.99.0.1";
pub const METADATA: &str = "169.254.169.254";
/// An address in the range for benchmarks, where some hosts have mirrors.
pub const BENCHMARK: &str = "198.18.0.10";

type Job = Box<dyn FnOnce() + Send>;

/// A network namespace, with a thread that runs in it.
pub struct Ns {
    jobs: mpsc::Sender<Job>,
    pub thread: i32,
}

impl Ns {
    pub fn new() -> Self {
        let (jobs, todo) = mpsc::channel::<Job>();
        let (told, tid) = mpsc::channel();
        std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).expect("tests of the network run as root");
            told.send(rustix::thread::gettid().as_raw_nonzero().get()).unwrap();
            for job in todo {
                job();
            }
        });
        let ns = Self { jobs, thread: tid.recv().unwrap() };
        ns.ip("link set lo up");
        ns
    }

    /// Runs a closure in the namespace.
    pub fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, result) = mpsc::channel();
        self.jobs.send(Box::new(move || drop(done.send(job())))).unwrap();
        result.recv().expect("the job does not panic")
    }

    /// Runs a program in the namespace; returns its output, as an error if it failed.
    pub fn try_run(&self, program: &str, arguments: &str) -> Result<String, String> {
        let program = program.to_owned();
        let arguments: Vec<String> = arguments.split_whitespace().map(str::to_owned).collect();
        let output = self.run(move || Command::new(&program).args(&arguments).output().unwrap());
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        if output.status.success() { Ok(said) } else { Err(said + &String::from_utf8_lossy(&output.stderr)) }
    }

    #[track_caller]
    pub fn ip(&self, arguments: &str) -> String {
        self.try_run("ip", arguments).unwrap_or_else(|said| panic!("ip {arguments}: {said}"))
    }

    /// Waits until all IPv6 addresses are usable. That takes a moment even without duplicate address detection.
    pub fn settle(&self) {
        let deadline = Instant::now() + PATIENCE;
        while !self.ip("-6 addr show tentative").is_empty() {
            assert!(Instant::now() < deadline, "addresses stay tentative");
            std::thread::park_timeout(Duration::from_millis(5));
        }
    }

    pub fn nft(&self, arguments: &str) -> String {
        self.try_run("nft", arguments).unwrap_or_else(|said| panic!("nft {arguments}: {said}"))
    }

    pub fn write(&self, path: &'static str, value: &'static str) {
        self.run(move || std::fs::write(path, value)).unwrap_or_else(|error| panic!("{path}: {error}"));
    }
}

/// Serves TCP and UDP on a port of these addresses: answers with the client's address, and then echoes.
pub fn serve(ns: &Ns, addresses: &[&str], port: u16) {
    for address in addresses {
        let address: IpAddr = address.parse().unwrap();
        let (tcp, udp) = ns.run(move || {
            (TcpListener::bind((address, port)).unwrap(), UdpSocket::bind((address, port)).unwrap())
        });
        std::thread::spawn(move || {
            for stream in tcp.incoming().map_while(Result::ok) {
                std::thread::spawn(move || drop(echo(stream)));
            }
        });
        std::thread::spawn(move || {
            let mut buffer = [0; 1500];
            while let Ok((_, from)) = udp.recv_from(&mut buffer) {
                let _ = udp.send_to(from.ip().to_string().as_bytes(), from);
            }
        });
    }
}

fn echo(mut stream: TcpStream) -> std::io::Result<()> {
    let peer = stream.peer_addr()?.ip();
    writeln!(stream, "{peer}")?;
    for line in BufReader::new(stream.try_clone()?).lines() {
        writeln!(stream, "{}", line?)?;
    }
    Ok(())
}

/// The process of an instance, and a connection to it.
pub struct Net {
    pub child: Child,
    pub client: Client<UnixStream>,
    pub instance: Instance,
    socket: PathBuf,
    runtime: Runtime,
}

pub struct World {
    pub host: Ns,
    pub internet: Ns,
    pub directory: PathBuf,
}

impl World {
    pub fn new() -> Self {
        let (host, internet) = (Ns::new(), Ns::new());
        host.ip(&format!("link add up0 type veth peer name up1 netns {}", internet.thread));
        host.ip(&format!("addr add {HOST}/24 dev up0"));
        host.ip(&format!("-6 addr add {HOST_V6}/64 dev up0 nodad"));
        host.ip("link set up0 up");
        internet.ip("addr add 198.51.100.2/24 dev up1");
        internet.ip("-6 addr add 2001:db8:1::2/64 dev up1 nodad");
        internet.ip("link set up1 up");
        for address in [RESOLVER, PUBLIC, PUBLIC_TOO, PRIVATE, METADATA, BENCHMARK] {
            internet.ip(&format!("addr add {address}/32 dev lo"));
        }
        internet.ip(&format!("-6 addr add {PUBLIC_V6}/128 dev lo nodad"));
        host.ip("route add default via 198.51.100.2");
        host.ip("-6 route add default via 2001:db8:1::2");
        host.settle();
        internet.settle();
        for port in [80, 443, 8080] {
            serve(&internet, &[PUBLIC, PUBLIC_TOO, PUBLIC_V6, PRIVATE, METADATA, BENCHMARK, RESOLVER], port);
        }
        let directory = std::env::temp_dir().join(format!("nx-{}-{}", std::process::id(), host.thread));
        std::fs::create_dir_all(&directory).unwrap();
        Self { host, internet, directory }
    }

    /// Starts a process without configuring it.
    pub fn start(&self, instance: Instance, failpoint: Option<&str>) -> Net {
        self.start_as(&[env!("CARGO_BIN_EXE_nexus-net")], instance, failpoint)
    }

    /// Starts a process like [`Self::start`], with a command that wraps it.
    pub fn start_by(&self, command: &[&str], instance: Instance) -> Net {
        self.start_as(command, instance, None)
    }

    fn start_as(&self, command: &[&str], instance: Instance, failpoint: Option<&str>) -> Net {
        let socket = self.directory.join(format!("{}.sock", instance.id));
        let child = start(&self.host, command, &socket, failpoint);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let client = connect(&runtime, &socket);
        Net { child, client, instance, socket, runtime }
    }

    /// Starts and configures a process.
    pub fn net(&self) -> Net {
        let mut net = self.start(instance("0a1b2c3d", "10.77"), None);
        net.configure();
        net
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

fn start(host: &Ns, command: &[&str], socket: &Path, failpoint: Option<&str>) -> Child {
    let [program, arguments @ ..] = command else { panic!("a command has a program") };
    let mut command = Command::new(program);
    command.args(arguments).arg(socket).stdin(Stdio::null()).stdout(Stdio::null());
    if let Some(point) = failpoint {
        command.env("NEXUS_NET_FAILPOINT", point);
    }
    host.run(move || command.spawn()).unwrap()
}

fn connect(runtime: &Runtime, socket: &Path) -> Client<UnixStream> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let client = runtime.block_on(async { Client::hello(UnixStream::connect(socket).await?).await });
        match client {
            Ok((client, _)) => return client,
            Err(ClientError::Io { .. } | ClientError::Closed) if Instant::now() < deadline => {
                std::thread::park_timeout(Duration::from_millis(10));
            }
            Err(error) => panic!("{error}: {:?}", std::error::Error::source(&error)),
        }
    }
}

impl Net {
    pub fn call(&mut self, request: Request) -> Result<Answer, ClientError> {
        self.runtime.block_on(self.client.call(request))
    }

    #[track_caller]
    pub fn ask(&mut self, request: Request) -> Answer {
        self.call(request.clone()).unwrap_or_else(|error| panic!("{request:?}: {error}"))
    }

    #[track_caller]
    pub fn configure(&mut self) -> Configured {
        match self.ask(Request::Configure { instance: self.instance.clone() }) {
            Answer::Configure(configured) => configured,
            other => panic!("{other:?}"),
        }
    }

    #[track_caller]
    pub fn attach(&mut self, vm: &Vm) -> Attached {
        match self.ask(Request::Attach { vm: vm.clone() }) {
            Answer::Attach(attached) => attached,
            other => panic!("{other:?}"),
        }
    }

    /// Updates a VM; returns the number of cut connections.
    #[track_caller]
    pub fn update(&mut self, vm: &Vm) -> u64 {
        match self.ask(Request::Update { vm: vm.clone() }) {
            Answer::Update(updated) => updated.cut,
            other => panic!("{other:?}"),
        }
    }

    #[track_caller]
    pub fn state(&mut self) -> State {
        match self.ask(Request::State {}) {
            Answer::State(state) => *state,
            other => panic!("{other:?}"),
        }
    }

    /// Waits for a refusal that matches.
    #[track_caller]
    pub fn denial(&mut self, is_it: impl Fn(&Denial) -> bool) -> Denial {
        let client = &mut self.client;
        let found = self.runtime.block_on(within(async {
            loop {
                match client.event().await.unwrap() {
                    Event::Denied(denial) if is_it(&denial) => return denial,
                    _ => {}
                }
            }
        }));
        found.expect("the refusal is reported")
    }

    /// Waits until changes by other programs are repaired.
    #[track_caller]
    pub fn repaired(&mut self) -> u64 {
        let client = &mut self.client;
        let found = self.runtime.block_on(within(async {
            loop {
                if let Event::Repaired { changes } = client.event().await.unwrap() {
                    return changes;
                }
            }
        }));
        found.expect("the repair is reported")
    }

    /// Kills it with SIGKILL, and starts it again, without configuring it.
    pub fn killed(mut self, world: &World) -> Self {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.restarted(world)
    }

    /// Starts it again after it has ended.
    pub fn restarted(mut self, world: &World) -> Self {
        let program = [env!("CARGO_BIN_EXE_nexus-net")];
        let child = start(&world.host, &program, &self.socket, None);
        let client = connect(&self.runtime, &self.socket.clone());
        self.child = child;
        self.client = client;
        self
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn within<T>(what: impl Future<Output = T>) -> Result<T, tokio::time::error::Elapsed> {
    tokio::time::timeout(PATIENCE, what).await
}

/// Returns an instance with the /16 subnet that starts with `start`.
pub fn instance(id: &str, start: &str) -> Instance {
    let second: u16 = start.rsplit('.').next().unwrap().parse().unwrap();
    Instance {
        id: id.parse().unwrap(),
        v4: Subnet {
            subnet: format!("{start}.0.0/16").parse().unwrap(),
            gateway: format!("{start}.0.1").parse().unwrap(),
        },
        v6: Some(Subnet {
            subnet: format!("fd4e:58:{second:x}::/64").parse().unwrap(),
            gateway: format!("fd4e:58:{second:x}::1").parse().unwrap(),
        }),
        host_addresses: Vec::new(),
        dns: Dns::Servers(vec![SocketAddr::new(RESOLVER.parse::<IpAddr>().unwrap(), 53)]),
    }
}

/// Returns a VM with this number, which must be at least 2.
pub fn vm(instance: &Instance, number: u8) -> Vm {
    let [a, b, ..] = instance.v4.gateway.octets();
    Vm {
        id: nexus_schema::id::VmId::from_i64(i64::from(b) << 8 | i64::from(number)).unwrap(),
        name: format!("vm-{number}"),
        owner_uid: 1002,
        mac: nexus_net_wire::Mac([2, 0x4e, a, b, 0, number]),
        ipv4: [a, b, 0, number].into(),
        ipv6: instance.v6.map(|subnet| {
            let bits = u128::from(subnet.gateway) & !0xff | u128::from(number);
            bits.into()
        }),
        policy: policy(&[], &[]),
        groups: Vec::new(),
    }
}

pub fn policy(allow: &[&str], deny: &[&str]) -> NetworkPolicy {
    let rules = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
    NetworkPolicy {
        mode: NetworkMode::Proxy,
        preset: NetworkPreset::Internet,
        allow: rules(allow),
        deny: rules(deny),
        groups: Vec::new(),
    }
}
