//! A stand-in for `firecracker` and `jailer` (by the name that it is called by). Firecracker's answers and exits are those that were
//! recorded from a real one (`tests/fixtures/firecracker-1.16.1.jsonl`); its guest is a few words of the kernel's command line:
//! `fake.exit=N` ends it with that status at once, `fake.deaf` makes it ignore Ctrl-Alt-Del, `fake.full` leaves no room for snapshots.
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a test's stand-in"
)]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};

const RECORDING: &str = include_str!("../../fixtures/firecracker-1.16.1.jsonl");

/// Where in its memory a guest has its line.
const IN_MEMORY: u64 = 2 << 20;

fn main() {
    let mut arguments = std::env::args();
    let name = arguments.next().unwrap();
    let arguments: Vec<String> = arguments.collect();
    if name.ends_with("jailer") { jailer(&arguments) } else { firecracker(&arguments) }
}

/// What happened when a real process came to its end in this way: its status, or the negative number of a signal.
fn recorded_exit(why: &str) -> i32 {
    recording().find(|entry| entry["why"] == why).unwrap()["process_exit"].as_i64().unwrap() as i32
}

fn recording() -> impl Iterator<Item = Value> {
    RECORDING.lines().map(|line| serde_json::from_str(line).unwrap())
}

fn value_of(arguments: &[String], name: &str) -> Option<String> {
    arguments.iter().position(|a| a == name).map(|at| arguments[at + 1].clone())
}

/// The steps of the jailer's documentation that matter to who starts it.
fn jailer(arguments: &[String]) {
    let value = |name: &str| value_of(arguments, name).unwrap();
    let id = value("--id");
    let executable = Path::new(&value("--exec-file")).canonicalize().unwrap();
    let binary = executable.file_name().unwrap();
    let (uid, gid): (u32, u32) = (value("--uid").parse().unwrap(), value("--gid").parse().unwrap());
    let root =
        Path::new(&value("--chroot-base-dir")).canonicalize().unwrap().join(binary).join(&id).join("root");
    std::fs::create_dir_all(&root).unwrap();
    std::fs::copy(&executable, root.join(binary)).unwrap();

    use nix::mount::{MntFlags, MsFlags, mount, umount2};
    let none: Option<&str> = None;
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
    mount(none, "/", none, MsFlags::MS_SLAVE | MsFlags::MS_REC, none).unwrap();
    mount(Some(&root), &root, none, MsFlags::MS_BIND | MsFlags::MS_REC, none).unwrap();
    std::env::set_current_dir(&root).unwrap();
    std::fs::create_dir("old_root").unwrap();
    nix::unistd::pivot_root(".", "old_root").unwrap();
    std::env::set_current_dir("/").unwrap();
    umount2("old_root", MntFlags::MNT_DETACH).unwrap();
    std::fs::remove_dir("old_root").unwrap();
    nix::unistd::chown("/", Some(uid.into()), Some(gid.into())).unwrap();
    nix::unistd::setgroups(&[]).unwrap();
    nix::unistd::setresgid(gid.into(), gid.into(), gid.into()).unwrap();
    nix::unistd::setresuid(uid.into(), uid.into(), uid.into()).unwrap();

    let rest = arguments.iter().position(|a| a == "--").map_or(&[][..], |at| &arguments[at + 1..]);
    let mut own = vec!["--id".to_owned(), id];
    own.extend_from_slice(rest);
    firecracker(&own);
}

fn firecracker(arguments: &[String]) {
    if arguments == ["--version"] {
        println!("Firecracker v1.16.1");
        return;
    }
    const OPTIONS: [&str; 5] = ["--id", "--api-sock", "--log-path", "--level", "--show-level"];
    if arguments.iter().any(|a| a.starts_with("--") && !OPTIONS.contains(&a.as_str())) {
        std::process::exit(recorded_exit("unknown option"));
    }
    if value_of(arguments, "--id").unwrap().contains('_') {
        std::process::abort();
    }
    let socket = value_of(arguments, "--api-sock").unwrap();
    let Ok(listener) = UnixListener::bind(&socket) else {
        eprintln!("Failed to open the API socket at: {socket}. Check that it is not already used.");
        std::process::exit(recorded_exit("API socket path already exists"));
    };
    match value_of(arguments, "--log-path") {
        Some(log) => {
            let log = std::fs::OpenOptions::new().write(true).open(log);
            log.unwrap().write_all(b"the logger is on\n").unwrap();
        }
        // As a real one does.
        None => println!("[anonymous-instance:main] Running Firecracker v1.16.1"),
    }
    let mut vmm = Vmm::default();
    for stream in listener.incoming() {
        vmm.serve(stream.unwrap());
    }
}

#[derive(Default)]
struct Vmm {
    is_started: bool,
    /// Whether the guest stands still, and whether a snapshot was taken since.
    paused: Option<bool>,
    /// Whether connections from the host reach no guest any more.
    is_deaf: Arc<AtomicBool>,
    /// Size of the guest's memory, in bytes.
    memory: u64,
    kernel: Option<Value>,
    vsock: Option<Value>,
    drives: BTreeMap<String, Value>,
}

impl Vmm {
    fn serve(&mut self, mut stream: UnixStream) {
        let mut received = Vec::new();
        loop {
            let mut chunk = [0; 1024];
            let read = stream.read(&mut chunk).unwrap_or(0);
            if read == 0 {
                return;
            }
            received.extend_from_slice(&chunk[..read]);
            let mut headers = [httparse::EMPTY_HEADER; 32];
            let mut request = httparse::Request::new(&mut headers);
            let httparse::Status::Complete(head) = request.parse(&received).unwrap() else { continue };
            let length = request.headers.iter().find(|h| h.name.eq_ignore_ascii_case("content-length"));
            let length = length.map_or(0, |h| std::str::from_utf8(h.value).unwrap().parse().unwrap());
            if received.len() < head + length {
                continue;
            }
            let body = serde_json::from_slice(&received[head..head + length]).unwrap_or_default();
            let (method, path) = (request.method.unwrap().to_owned(), request.path.unwrap().to_owned());
            let (status, answer, then) = self.answer(&method, &path, &body);
            received.drain(..head + length);
            let text = answer.map(|body| body.to_string()).unwrap_or_default();
            let length = if text.is_empty() {
                String::new()
            } else {
                format!("Content-Type: application/json\r\nContent-Length: {}\r\n", text.len())
            };
            let head = format!(
                "HTTP/1.1 {status} \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n{length}\r\n"
            );
            stream.write_all(format!("{head}{text}").as_bytes()).unwrap();
            if let Some(code) = then {
                std::process::exit(code);
            }
        }
    }

    /// Status and body as recorded, and whether the process ends afterwards.
    fn answer(&mut self, method: &str, path: &str, body: &Value) -> (u64, Option<Value>, Option<i32>) {
        let collection = if path.starts_with("/drives/") { "/drives/rootfs" } else { path };
        let recorded = |why: Option<&str>| {
            let answers = recording().filter(|entry| entry["request"]["method"] == method);
            let mut answers = answers.filter(|entry| entry["request"]["path"] == collection);
            let entry = match why {
                Some(why) => recording().find(|entry| entry["why"] == why && !entry["request"].is_null()),
                None => answers.find(|entry| entry["response"]["status"].as_u64().unwrap() < 300),
            };
            let entry =
                entry.unwrap_or_else(|| recording().find(|entry| entry["why"] == "unknown path").unwrap());
            let body = &entry["response"]["body"];
            (entry["response"]["status"].as_u64().unwrap(), Some(body.clone()).filter(|b| !b.is_null()), None)
        };
        let exists = |path: &Value, write: bool| {
            let mut options = std::fs::OpenOptions::new();
            options.read(true).write(write).open(path.as_str().unwrap()).is_ok()
        };
        if self.is_started && method == "PUT" && path != "/actions" && path != "/snapshot/create" {
            return recorded(Some("configure after start"));
        }
        match (method, collection) {
            ("PUT", "/machine-config") if body["vcpu_count"] == 0 => return recorded(Some("no vCPU")),
            ("PUT", "/machine-config") if body["vcpu_count"].as_u64() > Some(32) => {
                return recorded(Some("too many vCPUs"));
            }
            ("PUT", "/machine-config") => self.memory = body["mem_size_mib"].as_u64().unwrap() << 20,
            ("PUT", "/boot-source") if !exists(&body["kernel_image_path"], false) => {
                return recorded(Some("missing kernel"));
            }
            ("PUT", "/boot-source") => self.kernel = Some(body.clone()),
            ("PUT", "/drives/rootfs") => {
                if !path.ends_with(&format!("/{}", body["drive_id"].as_str().unwrap())) {
                    return recorded(Some("id differs from the path"));
                }
                if body.as_object().unwrap().contains_key("no_such_field") {
                    return recorded(Some("unknown field"));
                }
                if !exists(&body["path_on_host"], body["is_read_only"] != true) {
                    return recorded(Some("missing drive"));
                }
                self.drives.insert(path.to_owned(), body.clone());
            }
            ("PUT", "/vsock") => self.make_vsock(body),
            ("PATCH", "/vm") if !self.is_started => return recorded(Some("pause before start")),
            ("PATCH", "/vm") if body["state"] == "Paused" => self.paused = Some(false),
            ("PATCH", "/vm") => {
                let dead = "vsock CONNECT after a bare resume";
                let is_dead = recording().any(|e| e["why"] == dead && e["received"] == "TimeoutError");
                if self.paused.take() == Some(false) {
                    self.is_deaf.store(is_dead, Ordering::Relaxed);
                }
            }
            ("PUT", "/snapshot/create") if self.paused.is_none() => {
                return recorded(Some("snapshot while running"));
            }
            ("PUT", "/snapshot/create") if self.words().split(' ').any(|word| word == "fake.full") => {
                // Not recorded: only the error of the system in it is known.
                let fault = "Create snapshot error: No space left on device (os error 28)";
                return (400, Some(json!({ "fault_message": fault })), None);
            }
            ("PUT", "/snapshot/create") => {
                self.paused = Some(true);
                self.save(body);
            }
            ("PUT", "/snapshot/load") => {
                if self.load(body).is_none() {
                    let (status, answer, _) = recorded(Some("restore from a missing snapshot"));
                    return (status, answer, Some(recorded_exit("after a failed restore")));
                }
                return recorded(Some("restore with another vsock path"));
            }
            ("PUT", "/actions") => return self.act(body, recorded),
            _ => {}
        }
        recorded(None)
    }

    fn words(&self) -> String {
        self.kernel.as_ref().map(|k| k["boot_args"].as_str().unwrap().to_owned()).unwrap_or_default()
    }

    fn make_vsock(&mut self, body: &Value) {
        self.vsock = Some(body.clone());
        let listener = UnixListener::bind(body["uds_path"].as_str().unwrap()).unwrap();
        serve_vsock(listener, self.is_deaf.clone());
    }

    /// Writes a snapshot. All of the memory is written, zeros too; the guest has a line in it.
    fn save(&self, body: &Value) {
        let open = |path: &Value| {
            let path = path.as_str().unwrap();
            std::fs::OpenOptions::new().write(true).create(true).truncate(true).open(path).unwrap()
        };
        let state = json!({ "kernel": self.kernel, "drives": self.drives, "memory": self.memory });
        open(&body["snapshot_path"]).write_all(state.to_string().as_bytes()).unwrap();
        let mut memory = open(&body["mem_file_path"]);
        memory.write_all(&vec![0; IN_MEMORY as usize]).unwrap();
        memory.write_all(format!("memory of {}\n", self.words()).as_bytes()).unwrap();
        memory.write_all(&vec![0; 1 << 20]).unwrap();
        memory.set_len(self.memory).unwrap();
    }

    /// Goes on with a saved guest, which says on the console what it finds. `None` if something is missing.
    fn load(&mut self, body: &Value) -> Option<()> {
        let state = std::fs::read(body["snapshot_path"].as_str().unwrap()).ok()?;
        let state: Value = serde_json::from_slice(&state).ok()?;
        let backend = &body["mem_backend"];
        assert_eq!((&backend["backend_type"], &body["resume_vm"]), (&json!("File"), &json!(true)));
        let mut memory = std::fs::File::open(backend["backend_path"].as_str().unwrap()).ok()?;
        assert_eq!(memory.metadata().unwrap().len(), state["memory"].as_u64().unwrap());
        memory.seek(SeekFrom::Start(IN_MEMORY)).unwrap();
        let mut line = String::new();
        BufReader::new(memory).read_line(&mut line).ok()?;
        self.drives = serde_json::from_value(state["drives"].clone()).unwrap();
        let read = |drive: &Value| std::fs::read_to_string(drive["path_on_host"].as_str().unwrap()).ok();
        let drives = self.drives.values().map(read).collect::<Option<Vec<_>>>()?;
        (self.kernel, self.memory) = (Some(state["kernel"].clone()), state["memory"].as_u64().unwrap());
        self.make_vsock(&body["vsock_override"]);
        self.is_started = true;
        let uid = nix::unistd::getuid().as_raw();
        println!("{}", json!({ "memory": line.trim_end(), "drives": drives, "uid": uid }));
        Some(())
    }

    fn act<T>(
        &mut self,
        body: &Value,
        recorded: impl Fn(Option<&str>) -> (u64, T, Option<i32>),
    ) -> (u64, T, Option<i32>) {
        let words = self.words();
        let has = |word: &str| words.split(' ').any(|w| w == word);
        match body["action_type"].as_str().unwrap() {
            "InstanceStart" if self.is_started => recorded(Some("start twice")),
            "InstanceStart" if self.kernel.is_none() => recorded(Some("start without a kernel")),
            "InstanceStart" => {
                self.is_started = true;
                self.run_guest(&words);
                let exit = words.split(' ').find_map(|word| word.strip_prefix("fake.exit="));
                let (status, body, _) = recorded(Some("start"));
                (status, body, exit.map(|code| code.parse().unwrap()))
            }
            "SendCtrlAltDel" if has("fake.deaf") => recorded(None),
            "SendCtrlAltDel" => {
                let (status, body, _) = recorded(None);
                println!("reboot: Restarting system");
                (status, body, Some(0))
            }
            _ => recorded(Some("unknown action")),
        }
    }

    /// Says on the console what it was given, and hello to the host.
    fn run_guest(&self, words: &str) {
        let kernel = self.kernel.as_ref().unwrap();
        let read = |path: &Value| std::fs::read_to_string(path.as_str().unwrap()).unwrap();
        let drives: Vec<_> = self.drives.values().map(|drive| read(&drive["path_on_host"])).collect();
        let seen = json!({
            "words": words,
            "kernel": read(&kernel["kernel_image_path"]),
            "initramfs": read(&kernel["initrd_path"]),
            "drives": drives,
            "uid": nix::unistd::getuid().as_raw(),
            "is_root_of_a_jail": !Path::new("/proc").exists() && std::fs::metadata("/").unwrap().uid() != 0,
        });
        println!("{seen}");
        let uds = self.vsock.as_ref().unwrap()["uds_path"].as_str().unwrap();
        // Where nobody listens, a guest tries again later; this one does not.
        let hello = || -> std::io::Result<String> {
            let mut hello = UnixStream::connect(format!("{uds}_1024"))?;
            hello.write_all(b"hello\n")?;
            let mut answer = String::new();
            BufReader::new(hello).read_line(&mut answer)?;
            Ok(answer)
        };
        if let Ok(answer) = hello() {
            println!("the host answered: {}", answer.trim());
        }
    }
}

/// Every port is open, and echoes lines.
fn serve_vsock(listener: UnixListener, is_deaf: Arc<AtomicBool>) {
    std::thread::spawn(move || {
        let mut unanswered = Vec::new();
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            if is_deaf.load(Ordering::Relaxed) {
                unanswered.push(stream);
                continue;
            }
            let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
            assert!(lines.next().unwrap().starts_with("CONNECT "));
            stream.write_all(b"OK 1073741824\n").unwrap();
            for line in lines {
                stream.write_all(format!("{line}\n").as_bytes()).unwrap();
            }
        }
    });
}
