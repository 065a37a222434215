//! The daemon's settings: `nexus.toml` (system, user, `--config`), then `NEXUS_*`, then flags; later ones override earlier ones.
//!
//! Keys have the same name everywhere: `state_dir` in a file, `NEXUS_STATE_DIR` in the environment, `--state-dir` as a flag.
//! Unknown keys in a file are refused, and all mistakes are reported at once.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;

use nexus_core::FetchSettings;
use nexus_core::Trust;
use nexus_core::{AssetConfig, AuditFile, Config, DriverSetting, Environment, Secret};
use nexus_schema::{Arch, DriverKind};

use crate::dirs::{self, Env};
use crate::otlp::Collector;
use crate::tools::Toolset;
pub use guest::GuestBinary;
use values::{
    collector, driver, filter, flag, group, loopback, number, origins, path, providers, roots, size, token,
    toolset, trust, users,
};

mod guest;
mod values;

/// The prefix of environment variables.
const PREFIX: &str = "NEXUS_";

/// How large the exported audit log becomes before a new one is begun, in bytes.
const AUDIT_FILE_MAX: u64 = 64 << 20;
/// How many earlier ones are kept.
const AUDIT_FILES_KEPT: u32 = 5;

/// All settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The directory for all persistent data.
    pub state_dir: PathBuf,
    /// The daemon's Unix socket.
    pub socket: PathBuf,
    /// The address to listen on for HTTP; loopback only.
    pub http: Option<SocketAddr>,
    /// Web origins that may use HTTP.
    pub http_origins: Vec<String>,
    /// The group that may use the Unix socket, by name or number.
    pub socket_group: Option<String>,
    /// Its users, by name or number or `*`, and the name of the token whose rights each has.
    pub socket_users: Vec<(String, String)>,
    /// The set of tools for clients that choose none.
    pub tools: Toolset,
    /// The driver for `auto`.
    pub driver: DriverSetting,
    /// A guest binary that VMs run in place of the one in this program.
    pub guest_binary: Option<GuestBinary>,
    /// The guest binary for VMs of the other architecture.
    pub foreign_guest_binary: Option<GuestBinary>,
    /// Paths of VMMs, by driver.
    pub vmms: BTreeMap<DriverKind, PathBuf>,
    /// Directories of the host that clients may copy files from and to.
    pub copy_roots: Vec<PathBuf>,
    /// The file to which the audit log is written, too.
    pub audit_file: Option<AuditFile>,
    /// Where spans of calls are exported to.
    pub otlp_endpoint: Option<Collector>,
    /// Path of `nexus-net`; by default beside this program.
    pub nexus_net: PathBuf,
    /// Whether VMMs started by root are jailed.
    pub jail: bool,
    /// Whether `/dev/kvm` is used even if it does not look like hardware virtualisation.
    pub force_kvm: bool,
    /// Path of `mmdebstrap`.
    pub mmdebstrap: Option<PathBuf>,
    /// The root of the host's apt configuration.
    pub apt_root: PathBuf,
    /// The home directory of the user, if it has one.
    pub home: Option<PathBuf>,
    /// Changes to the built-in providers of assets, and additional providers, by name.
    pub providers: BTreeMap<String, serde_json::Value>,
    /// A token for GitHub's API.
    pub github_token: Option<Secret>,
    /// The file in which `docker login` keeps credentials for registries.
    pub docker_config: Option<PathBuf>,
    /// The environment of credential helpers.
    pub docker_environment: Environment,
    /// The proxy variables of the environment, for programs that download by themselves.
    pub proxies: Environment,
    /// The CAs to trust for servers.
    pub trust: Trust,
    /// The timeout for a guest's hello under KVM, in seconds.
    pub boot_timeout_s: u32,
    /// The same under software emulation, in seconds.
    pub boot_timeout_tcg_s: u32,
    /// The timeout for a guest's own shutdown, in seconds.
    pub stop_timeout_s: u32,
    /// The number of worker threads; by default two, or one on machines with at most two processors.
    pub worker_threads: usize,
    /// The log filter, in the syntax of `tracing`.
    pub log: String,
}

/// Settings of the command line, by key.
pub type Flags = BTreeMap<&'static str, String>;

/// Everything that is wrong with the settings.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct SettingsError {
    /// Each mistake, with its location.
    pub mistakes: Vec<String>,
}

impl fmt::Display for SettingsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.mistakes[..] {
            [only] => f.write_str(only),
            many => {
                write!(f, "{} settings are wrong:", many.len())?;
                many.iter().try_for_each(|mistake| write!(f, "\n  {mistake}"))
            }
        }
    }
}

/// One setting: its key, and how to set it from text.
struct Key {
    name: &'static str,
    set: fn(&mut Draft, &str) -> Result<(), String>,
}

#[derive(Default)]
struct Draft {
    state_dir: Option<PathBuf>,
    runtime_dir: Option<PathBuf>,
    socket: Option<PathBuf>,
    http: Option<SocketAddr>,
    http_origins: Option<Vec<String>>,
    socket_group: Option<String>,
    socket_users: Option<Vec<(String, String)>>,
    tools: Option<Toolset>,
    driver: Option<DriverSetting>,
    guest: Option<PathBuf>,
    guest_binary: Option<PathBuf>,
    foreign_guest_binary: Option<PathBuf>,
    vmms: BTreeMap<DriverKind, PathBuf>,
    copy_roots: Option<Vec<PathBuf>>,
    audit_file: Option<PathBuf>,
    audit_file_max: Option<u64>,
    audit_files_kept: Option<u32>,
    otlp_endpoint: Option<Collector>,
    nexus_net: Option<PathBuf>,
    jail: Option<bool>,
    force_kvm: Option<bool>,
    mmdebstrap: Option<PathBuf>,
    apt_root: Option<PathBuf>,
    providers: BTreeMap<String, serde_json::Value>,
    github_token: Option<Secret>,
    docker_config: Option<PathBuf>,
    trust: Trust,
    boot_timeout_s: Option<u32>,
    boot_timeout_tcg_s: Option<u32>,
    stop_timeout_s: Option<u32>,
    worker_threads: Option<usize>,
    log: Option<String>,
}

const KEYS: &[Key] = &[
    Key { name: "state_dir", set: |d, v| path(v).map(|v| d.state_dir = Some(v)) },
    Key { name: "runtime_dir", set: |d, v| path(v).map(|v| d.runtime_dir = Some(v)) },
    Key { name: "socket", set: |d, v| path(v).map(|v| d.socket = Some(v)) },
    Key { name: "http", set: |d, v| loopback(v).map(|v| d.http = v) },
    Key { name: "http_origins", set: |d, v| origins(v).map(|v| d.http_origins = Some(v)) },
    Key { name: "socket_group", set: |d, v| group(v).map(|v| d.socket_group = v) },
    Key { name: "socket_users", set: |d, v| users(v).map(|v| d.socket_users = Some(v)) },
    Key { name: "tools", set: |d, v| toolset(v).map(|v| d.tools = Some(v)) },
    Key { name: "driver", set: |d, v| driver(v).map(|v| d.driver = Some(v)) },
    Key { name: "guest", set: |d, v| path(v).map(|v| d.guest = Some(v)) },
    Key { name: "guest_binary", set: |d, v| path(v).map(|v| d.guest_binary = Some(v)) },
    Key { name: "foreign_guest_binary", set: |d, v| path(v).map(|v| d.foreign_guest_binary = Some(v)) },
    Key { name: "copy_roots", set: |d, v| roots(v).map(|v| d.copy_roots = Some(v)) },
    Key { name: "audit_file", set: |d, v| path(v).map(|v| d.audit_file = Some(v)) },
    Key { name: "audit_file_max", set: |d, v| size(v).map(|v| d.audit_file_max = Some(v)) },
    Key { name: "audit_files_kept", set: |d, v| number(v, 0, 1000).map(|v| d.audit_files_kept = Some(v)) },
    Key { name: "otlp_endpoint", set: |d, v| collector(v).map(|v| d.otlp_endpoint = v) },
    Key { name: "nexus_net", set: |d, v| path(v).map(|v| d.nexus_net = Some(v)) },
    Key { name: "jail", set: |d, v| flag(v).map(|v| d.jail = Some(v)) },
    Key { name: "force_kvm", set: |d, v| flag(v).map(|v| d.force_kvm = Some(v)) },
    Key { name: "mmdebstrap", set: |d, v| path(v).map(|v| d.mmdebstrap = Some(v)) },
    Key { name: "apt_root", set: |d, v| path(v).map(|v| d.apt_root = Some(v)) },
    Key { name: "providers", set: |d, v| providers(v).map(|v| d.providers.extend(v)) },
    Key { name: "github_token", set: |d, v| token(v).map(|v| d.github_token = Some(v)) },
    Key { name: "ca_file", set: |d, v| trust(v).map(|v| d.trust = v) },
    Key { name: "docker_config", set: |d, v| path(v).map(|v| d.docker_config = Some(v)) },
    Key { name: "boot_timeout_s", set: |d, v| number(v, 1, 3600).map(|v| d.boot_timeout_s = Some(v)) },
    Key {
        name: "boot_timeout_tcg_s",
        set: |d, v| number(v, 1, 3600).map(|v| d.boot_timeout_tcg_s = Some(v)),
    },
    Key { name: "stop_timeout_s", set: |d, v| number(v, 1, 3600).map(|v| d.stop_timeout_s = Some(v)) },
    Key { name: "worker_threads", set: |d, v| number(v, 1, 64).map(|v| d.worker_threads = Some(v as usize)) },
    Key { name: "log", set: |d, v| filter(v).map(|v| d.log = Some(v)) },
];

/// The names of all keys: those of [`KEYS`], and one for each driver's VMM.
fn names() -> impl Iterator<Item = &'static str> {
    KEYS.iter().map(|key| key.name).chain(DriverKind::VMMS.map(DriverKind::as_str))
}

/// Sets the value of a key; `None` if there is no such key.
fn set(draft: &mut Draft, name: &str, value: &str) -> Option<Result<(), String>> {
    if let Some(key) = KEYS.iter().find(|key| key.name == name) {
        return Some((key.set)(draft, value));
    }
    let kind = DriverKind::vmm(name)?;
    Some(path(value).map(|path| drop(draft.vmms.insert(kind, path))))
}

impl Settings {
    /// Combines the settings. `config` is the file from the command line; it must exist, the others need not.
    pub fn load(uid: u32, env: &Env, config: Option<PathBuf>, flags: &Flags) -> Result<Self, SettingsError> {
        let mut draft = Draft::default();
        let mut mistakes = Vec::new();
        for file in dirs::config_files(uid, env) {
            match std::fs::read_to_string(&file) {
                Ok(text) => read_file(&mut draft, &text, &file.display().to_string(), &mut mistakes),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                Err(e) => mistakes.push(format!("{}: {e}", file.display())),
            }
        }
        if let Some(file) = config {
            match std::fs::read_to_string(&file) {
                Ok(text) => read_file(&mut draft, &text, &file.display().to_string(), &mut mistakes),
                Err(e) => mistakes.push(format!("{}: {e}", file.display())),
            }
        }
        for name in names() {
            let variable = format!("{PREFIX}{}", name.to_ascii_uppercase());
            let Some(value) = env.get(OsStr::new(&variable)).filter(|value| !value.is_empty()) else {
                continue;
            };
            let set = value.to_str().map_or_else(
                || Err("not UTF-8".to_owned()),
                |value| set(&mut draft, name, value).unwrap_or(Ok(())),
            );
            mistakes.extend(set.err().map(|e| format!("{variable}: {e}")));
        }
        for (name, value) in flags {
            if let Some(Err(e)) = set(&mut draft, name, value) {
                mistakes.push(format!("--{}: {e}", name.replace('_', "-")));
            }
        }
        let settings = draft.settle(uid, env, &mut mistakes);
        match settings {
            Some(settings) if mistakes.is_empty() => Ok(settings),
            Some(_) | None => Err(SettingsError { mistakes }),
        }
    }

    /// The settings for the daemon's core. `agent` is the guest binary in this program.
    pub fn config(&self, agent: &'static [u8], shim_binary: PathBuf) -> Config {
        Config {
            state_dir: self.state_dir.clone(),
            agent: self.guest_binary.map_or(agent, GuestBinary::bytes),
            foreign_agent: self.foreign_guest_binary.map(GuestBinary::bytes),
            shim_binary,
            driver: self.driver.clone(),
            apt_root: self.apt_root.clone(),
            home: self.home.clone(),
            docker_config: self.docker_config.clone(),
            docker_environment: self.docker_environment.clone(),
            vmms: self.vmms.clone(),
            assets: AssetConfig {
                providers: self.providers.clone(),
                github_token: self.github_token.clone(),
                mmdebstrap: self.mmdebstrap.clone(),
                proxies: self.proxies.clone(),
                fetch: FetchSettings { trust: self.trust.clone(), ..FetchSettings::default() },
            },
            boot_timeout_s: self.boot_timeout_s,
            boot_timeout_tcg_s: self.boot_timeout_tcg_s,
            stop_timeout_s: self.stop_timeout_s,
            copy_roots: self.copy_roots.clone(),
            audit_file: self.audit_file.clone(),
            nexus_net: self.nexus_net.clone(),
            jail: self.jail,
            force_kvm: self.force_kvm,
        }
    }
}

impl Draft {
    /// Fills in the defaults.
    fn settle(self, uid: u32, env: &Env, mistakes: &mut Vec<String>) -> Option<Settings> {
        let state_dir = match self.state_dir.map_or_else(|| dirs::state_dir(uid, env), Ok) {
            Ok(dir) => Some(dir),
            Err(e) => {
                mistakes.push(e.to_string());
                None
            }
        };
        let socket = match (self.socket, self.runtime_dir) {
            (Some(socket), _) => Some(socket),
            (None, Some(dir)) => Some(dir.join(dirs::SOCKET_NAME)),
            (None, None) => match dirs::socket(uid, env) {
                Ok(socket) => Some(socket),
                Err(e) => {
                    mistakes.push(e.to_string());
                    None
                }
            },
        };
        let driver = match (self.driver.unwrap_or_default(), self.guest) {
            (DriverSetting::Process { .. }, Some(guest)) => DriverSetting::Process { guest },
            (DriverSetting::Process { .. }, None) => {
                mistakes.push(
                    "driver process needs `guest`: the path of a nexus-guest that runs on this host".into(),
                );
                DriverSetting::Auto
            }
            (other, _) => other,
        };
        let mut guest = |key: &str, path: Option<PathBuf>, arch| {
            let read = GuestBinary::read(&path?, uid, arch);
            read.map_err(|e| mistakes.push(format!("{key}: {e}"))).ok()
        };
        let guest_binary = guest("guest_binary", self.guest_binary, Arch::HOST);
        let foreign_guest_binary = guest("foreign_guest_binary", self.foreign_guest_binary, Arch::FOREIGN);
        mistakes.extend(nexus_core::provider_mistakes(&self.providers));
        Some(Settings {
            state_dir: state_dir?,
            socket: socket?,
            http: self.http,
            http_origins: self.http_origins.unwrap_or_default(),
            socket_group: self.socket_group,
            socket_users: self.socket_users.unwrap_or_default(),
            tools: self.tools.unwrap_or_default(),
            driver,
            guest_binary,
            foreign_guest_binary,
            vmms: self.vmms,
            copy_roots: self.copy_roots.unwrap_or_default(),
            audit_file: self.audit_file.map(|path| AuditFile {
                path,
                max_bytes: self.audit_file_max.unwrap_or(AUDIT_FILE_MAX),
                keep: self.audit_files_kept.unwrap_or(AUDIT_FILES_KEPT),
            }),
            otlp_endpoint: self.otlp_endpoint,
            nexus_net: self.nexus_net.unwrap_or_else(beside_own),
            jail: self.jail.unwrap_or(true),
            force_kvm: self.force_kvm.unwrap_or(false),
            mmdebstrap: self.mmdebstrap,
            apt_root: self.apt_root.unwrap_or_else(|| "/".into()),
            home: dirs::home(env),
            providers: self.providers,
            github_token: self.github_token,
            proxies: dirs::proxies(env),
            trust: self.trust,
            docker_environment: dirs::others_environment(env),
            docker_config: self.docker_config.or_else(|| dirs::docker_config(env)),
            boot_timeout_s: self.boot_timeout_s.unwrap_or(60),
            boot_timeout_tcg_s: self.boot_timeout_tcg_s.unwrap_or(180),
            stop_timeout_s: self.stop_timeout_s.unwrap_or(20),
            worker_threads: self.worker_threads.unwrap_or_else(worker_threads),
            log: self.log.unwrap_or_else(|| "info,rmcp=warn".into()),
        })
    }
}

fn read_file(draft: &mut Draft, text: &str, file: &str, mistakes: &mut Vec<String>) {
    let table: toml::Table = match text.parse() {
        Ok(table) => table,
        Err(e) => return mistakes.push(format!("{file}: {}", e.to_string().trim_end())),
    };
    for (name, value) in table {
        if !names().any(|key| key == name) {
            let known: Vec<_> = names().collect();
            mistakes.push(format!("{file}: unknown key `{name}`; there are {}", known.join(", ")));
            continue;
        }
        let text = match value {
            toml::Value::String(text) => Ok(text),
            toml::Value::Integer(number) => Ok(number.to_string()),
            toml::Value::Boolean(flag) => Ok(flag.to_string()),
            toml::Value::Array(items) => items
                .into_iter()
                .map(|item| item.as_str().map(str::to_owned).ok_or_else(|| "not a list of texts".to_owned()))
                .collect::<Result<Vec<_>, _>>()
                .map(|items| items.join(",")),
            toml::Value::Table(table) if name == "providers" => {
                serde_json::to_string(&table).map_err(|e| e.to_string())
            }
            toml::Value::Float(_) | toml::Value::Datetime(_) | toml::Value::Table(_) => {
                Err("neither a text, a number nor true or false".to_owned())
            }
        };
        mistakes.extend(
            text.and_then(|text| set(draft, &name, &text).unwrap_or(Ok(())))
                .err()
                .map(|e| format!("{file}: {name}: {e}")),
        );
    }
}

/// The `nexus-net` beside this program.
fn beside_own() -> PathBuf {
    let own = std::env::current_exe().unwrap_or_else(|_| PathBuf::from("/"));
    own.with_file_name("nexus-net")
}

/// Two, except on small machines: if one thread already polls for a message that another thread sleeps for, the message would
/// wake a processor for nothing.
fn worker_threads() -> usize {
    match std::thread::available_parallelism() {
        Ok(processors) if processors.get() > 2 => 2,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(pairs: &[(&str, &str)]) -> Env {
        let mut env: Env = pairs.iter().map(|(k, v)| (k.into(), v.into())).collect();
        env.insert("XDG_CONFIG_HOME".into(), "/nowhere".into());
        env.insert("HOME".into(), "/home/a".into());
        env
    }

    fn file(text: &str) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs_err::write(file.path(), text).unwrap();
        file
    }

    #[test]
    fn the_page_of_configuration_has_every_key_and_no_others() {
        let page = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/configuration.md");
        let page = fs_err::read_to_string(page).unwrap();
        let is_named = |name: &str| {
            let forms = [
                format!("\n{name} = "),
                format!("\n#{name} = "),
                format!("\n[{name}."),
                format!("`{name} = "),
                format!(": {name} = "),
            ];
            forms.iter().any(|form| page.contains(form.as_str()))
        };
        let missing: Vec<&str> = names().filter(|name| !is_named(name)).collect();
        assert!(missing.is_empty(), "docs/configuration.md does not have {missing:?}");
        let block = page.split("```").find(|block| block.contains("nexus.toml, with the defaults")).unwrap();
        for line in block.lines() {
            let Some((key, _)) = line.trim_start_matches('#').split_once(" = ") else { continue };
            assert!(names().any(|name| name == key), "there is no key {key}: {line}");
        }
    }

    #[test]
    fn nothing_is_served_by_tcp_or_sent_to_a_collector_by_default() {
        let settings = Settings::load(7, &env(&[]), None, &Flags::new()).unwrap();
        assert!(settings.http.is_none() && settings.otlp_endpoint.is_none());
    }

    #[test]
    fn the_page_of_configuration_has_the_defaults() {
        let page = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/configuration.md");
        let page = fs_err::read_to_string(page).unwrap();
        let block = page.split("```").find(|block| block.contains("nexus.toml, with the defaults")).unwrap();
        let file = file(block.strip_prefix("toml").unwrap());
        // The log's limits are only seen if there is one. The number of threads depends on the machine.
        let flags = Flags::from([("audit_file", "/a".to_owned()), ("worker_threads", "1".to_owned())]);
        let shown = Settings::load(7, &env(&[]), Some(file.path().into()), &flags).unwrap();
        assert_eq!(shown, Settings::load(7, &env(&[]), None, &flags).unwrap());
    }

    #[test]
    fn later_sources_win() {
        let file = file(
            "driver = \"qemu\"\nstop_timeout_s = 5\nboot_timeout_s = 7\nhttp_origins = [\"http://a:1\", \"http://b\"]\n",
        );
        let env = env(&[("NEXUS_STOP_TIMEOUT_S", "6"), ("NEXUS_STATE_DIR", "/env")]);
        let flags = Flags::from([("state_dir", "/flag".to_owned()), ("http", "127.0.0.1:9600".to_owned())]);
        let settings = Settings::load(7, &env, Some(file.path().into()), &flags).unwrap();
        assert_eq!(settings.driver, DriverSetting::Vmm(DriverKind::Qemu));
        assert_eq!((settings.stop_timeout_s, settings.boot_timeout_s), (6, 7));
        assert_eq!(settings.state_dir, PathBuf::from("/flag"));
        assert_eq!(settings.http.unwrap().port(), 9600);
        assert_eq!(settings.http_origins, ["http://a:1", "http://b"]);
        assert!((1..=2).contains(&settings.worker_threads));
    }

    #[test]
    fn all_mistakes_are_reported_at_once() {
        let file = file("drivr = \"qemu\"\nstop_timeout_s = 0\nstate_dir = \"relative\"\n");
        let env = env(&[
            ("NEXUS_DRIVER", "xen"),
            ("NEXUS_CA_FILE", "/nowhere/ca.pem"),
            ("NEXUS_GUEST_BINARY", "/dev/null"),
            ("NEXUS_FOREIGN_GUEST_BINARY", "/dev/null"),
        ]);
        let flags = Flags::from([("http", "0.0.0.0:9600".to_owned())]);
        let error = Settings::load(7, &env, Some(file.path().into()), &flags).unwrap_err();
        assert_eq!(error.mistakes.len(), 8, "{error}");
        let text = error.to_string();
        for part in [
            "unknown key `drivr`",
            "stop_timeout_s: `0`",
            "absolute path",
            "NEXUS_DRIVER: `xen`",
            "NEXUS_CA_FILE: ",
            "\n  guest_binary: /dev/null: not a regular file",
            "\n  foreign_guest_binary: /dev/null: not a regular file",
            "/nowhere/ca.pem",
            "--http",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
        let missing = Settings::load(7, &env, Some("/nowhere/nexus.toml".into()), &Flags::new()).unwrap_err();
        assert!(missing.to_string().contains("/nowhere/nexus.toml"));
    }

    #[test]
    fn other_machines_are_not_served() {
        for bad in ["0.0.0.0:1", "192.168.0.1:9600", "[::]:9600", "localhost:9600", "9600"] {
            assert!(loopback(bad).is_err(), "{bad}");
        }
        assert!(loopback("[::1]:9600").unwrap().is_some());
        assert!(loopback("off").unwrap().is_none());
    }
}
