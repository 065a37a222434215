//! Daemons of an ordinary user, on a host that is arranged for the test. Needs root, as do their clients.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Daemon, Host, copy, program, seed};

/// What such a daemon sees of the host.
#[derive(Debug, Clone, Copy, Default)]
pub struct UsersHost<'a> {
    /// Lines added to files of `/etc`.
    pub lines: &'a [(&'a str, &'a str)],
    /// Files of `/etc`, with their whole text.
    pub files: &'a [(&'a str, &'a str)],
    /// Its settings (`NEXUS_*` in the environment).
    pub settings: &'a [(&'a str, &'a str)],
    /// The network namespace that it runs in, with a `/dev/net/tun` that all users may open, as usual hosts have it.
    pub network: Option<&'a Path>,
    /// Programs of the host that are not there.
    pub without: &'a [&'a str],
}

/// How a daemon of another user is started.
#[derive(Debug)]
pub(super) struct Place {
    user: u32,
    network: Option<PathBuf>,
    without: Vec<String>,
}

/// Arranges the mounts of a private namespace, and executes nexusd. `$1` is the directory for `/etc`, `$2` the user, `$3` nexusd, `$4` whether
/// there is a network; the rest are programs to hide.
const SCRIPT: &str = r#"
set -e
etc=$1 user=$2 nexusd=$3 network=$4
shift 4
mount --bind "$etc" /etc
if [ "$network" = yes ]; then
  mount -t tmpfs -o mode=0755 none /dev/net
  mknod -m 0666 /dev/net/tun c 10 200
fi
for hidden; do mount --bind /dev/null "$(command -v "$hidden")"; done
exec setpriv --reuid "$user" --regid "$user" --clear-groups "$nexusd"
"#;

impl Place {
    pub(super) fn command(&self, root: &Path, arguments: &[String]) -> Command {
        assert!(arguments.is_empty(), "a daemon of another user is started without arguments");
        let mut command = match &self.network {
            None => Command::new("unshare"),
            Some(network) => {
                let mut command = Command::new("nsenter");
                command.arg(format!("--net={}", network.display())).arg("unshare");
                command
            }
        };
        let network = if self.network.is_some() { "yes" } else { "no" };
        command.args(["--mount", "--propagation", "private", "sh", "-c", SCRIPT, "sh"]);
        command.arg(root.join("etc")).arg(self.user.to_string()).arg(root.join("nexusd")).arg(network);
        command.args(&self.without).env("HOME", root);
        command
    }
}

impl Daemon {
    /// A daemon of another user, with a kernel, the `busybox` image and additional settings. It sees an `/etc` with these lines
    /// added to its files.
    pub fn start_as_in(user: u32, lines: &[(&str, &str)], settings: &[(&str, &str)]) -> Self {
        Self::start_on(user, UsersHost { lines, settings, ..UsersHost::default() })
    }

    /// A daemon of another user on this host, with a kernel and the `busybox` image.
    pub fn start_on(user: u32, host: UsersHost<'_>) -> Self {
        let temporary =
            tempfile::Builder::new().prefix("nexus-user-").tempdir().expect("a temporary directory");
        let (root, state) = (temporary.path().to_path_buf(), temporary.path().join("state"));
        let (etc, run) = (root.join("etc"), root.join("run"));
        copy(Path::new("/etc"), &etc);
        for (name, line) in host.lines {
            let file = File::options().create(true).append(true).open(etc.join(name));
            file.and_then(|mut file| writeln!(file, "{line}")).expect("a line is added");
        }
        for (name, text) in host.files {
            // It may be a link.
            let _there = fs::remove_file(etc.join(name));
            fs::write(etc.join(name), text).expect("a file is written");
        }
        copy(&seed(), &state);
        fs::create_dir(&run).expect("a runtime directory");
        // A place where that user can run them.
        let programs: &[&str] = if host.network.is_some() { &["nexusd", "nexus-net"] } else { &["nexusd"] };
        for name in programs {
            fs::copy(program(name), root.join(name)).expect("a copy of a program");
        }
        std::os::unix::fs::chown(&root, Some(user), Some(user)).expect("root gives directories away");
        let given =
            Command::new("chown").arg("-R").arg(format!("{user}:{user}")).args([&state, &run]).status();
        assert!(given.expect("chown runs").success(), "root gives directories away");
        let settings: BTreeMap<_, _> =
            host.settings.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let without = host.without.iter().map(|name| (*name).to_owned()).collect();
        let place = Place { user, network: host.network.map(Path::to_owned), without };
        Self::run_on(Host::User(place), temporary, root, state, settings)
    }
}
