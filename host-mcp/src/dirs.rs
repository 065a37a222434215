//! The directories of Nexus on a host: pure functions of the user and the environment, shared by daemon and CLI.
//!
//! | | root | everybody else |
//! |---|---|---|
//! | state | `/var/lib/nexus` | `$XDG_STATE_HOME/nexus`, `~/.local/state/nexus` |
//! | sockets | `/run/nexus` | `$XDG_RUNTIME_DIR/nexus`, else `run` in the state directory |
//! |   | | `XDG_RUNTIME_DIR` is `/run/user/UID` where that is there and the variable is not: see [`environment`] |
//! | configuration | `/etc/nexus/nexus.toml` | the same, then `$XDG_CONFIG_HOME/nexus/nexus.toml`, `~/.config/nexus/nexus.toml` |
//!
//! `NEXUS_STATE_DIR`, `NEXUS_RUNTIME_DIR` and `NEXUS_SOCKET` override all of these.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use nexus_core::Environment;

/// The variable that names the state directory.
pub const STATE_DIR: &str = "NEXUS_STATE_DIR";
/// The variable that names the directory of the daemon's sockets.
pub const RUNTIME_DIR: &str = "NEXUS_RUNTIME_DIR";
/// The variable that names the daemon's Unix socket.
pub const SOCKET: &str = "NEXUS_SOCKET";
/// The variable that holds an access token for nexusctl.
pub const TOKEN: &str = "NEXUS_TOKEN";
/// The name of the daemon's Unix socket in the runtime directory.
pub const SOCKET_NAME: &str = "nexus.sock";
/// The log of a daemon that was started in the background, in the state directory.
pub const LOG_NAME: &str = "nexusd.log";

/// The environment of a process.
pub type Env = BTreeMap<OsString, OsString>;

/// The environment of this process, completed for a user. MCP clients start their servers with few variables: without
/// `XDG_RUNTIME_DIR` a bridge would look for its user's daemon in the wrong place.
pub fn environment(uid: u32) -> Env {
    use std::os::unix::fs::MetadataExt;
    let is_own =
        |directory: &Path| std::fs::metadata(directory).is_ok_and(|meta| meta.is_dir() && meta.uid() == uid);
    completed(std::env::vars_os().collect(), uid, is_own)
}

fn completed(mut env: Env, uid: u32, is_own: impl FnOnce(&Path) -> bool) -> Env {
    let usual = PathBuf::from(format!("/run/user/{uid}"));
    if absolute(&env, "XDG_RUNTIME_DIR").is_none() && is_own(&usual) {
        env.insert("XDG_RUNTIME_DIR".into(), usual.into());
    }
    env
}

/// A directory that cannot be determined.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DirsError {
    /// The user has no home.
    #[error(
        "no place for the {what} of Nexus: neither {variable} nor {base} nor HOME is set to an absolute path"
    )]
    Homeless {
        /// The directory's purpose.
        what: &'static str,
        /// The variable of Nexus that could set it.
        variable: &'static str,
        /// The variable of the desktop specification that could set it.
        base: &'static str,
    },
}

/// The home directory of the user.
pub fn home(env: &Env) -> Option<PathBuf> {
    absolute(env, "HOME")
}

/// Where `docker login` keeps credentials for registries.
pub fn docker_config(env: &Env) -> Option<PathBuf> {
    let directory = own(env, "DOCKER_CONFIG").or_else(|| Some(own(env, "HOME")?.join(".docker")))?;
    Some(directory.join("config.json"))
}

/// The environment passed to other programs: everything except Nexus's own variables.
pub fn others_environment(env: &Env) -> Environment {
    let of_others = |(name, _): &(&OsString, &OsString)| !name.as_encoded_bytes().starts_with(b"NEXUS_");
    env.iter().filter(of_others).map(|(name, value)| (name.clone(), value.clone())).collect()
}

/// The proxy variables of the environment.
pub fn proxies(env: &Env) -> Environment {
    let names = ["http_proxy", "https_proxy", "all_proxy", "no_proxy"];
    let is_one = |name: &OsString| {
        name.to_str().is_some_and(|name| names.iter().any(|known| name.eq_ignore_ascii_case(known)))
    };
    env.iter().filter(|(name, _)| is_one(name)).map(|(name, value)| (name.clone(), value.clone())).collect()
}

/// The state directory, for all persistent data.
pub fn state_dir(uid: u32, env: &Env) -> Result<PathBuf, DirsError> {
    if let Some(dir) = own(env, STATE_DIR) {
        return Ok(dir);
    }
    if uid == 0 {
        return Ok("/var/lib/nexus".into());
    }
    base(env, "XDG_STATE_HOME", ".local/state").map(|dir| dir.join("nexus")).ok_or(DirsError::Homeless {
        what: "state directory",
        variable: STATE_DIR,
        base: "XDG_STATE_HOME",
    })
}

/// The directory of the daemon's sockets.
pub fn runtime_dir(uid: u32, env: &Env) -> Result<PathBuf, DirsError> {
    if let Some(dir) = own(env, RUNTIME_DIR) {
        return Ok(dir);
    }
    if uid == 0 {
        return Ok("/run/nexus".into());
    }
    match absolute(env, "XDG_RUNTIME_DIR") {
        Some(dir) => Ok(dir.join("nexus")),
        None => Ok(state_dir(uid, env)?.join("run")),
    }
}

/// The daemon's Unix socket.
pub fn socket(uid: u32, env: &Env) -> Result<PathBuf, DirsError> {
    match own(env, SOCKET) {
        Some(socket) => Ok(socket),
        None => Ok(runtime_dir(uid, env)?.join(SOCKET_NAME)),
    }
}

/// The configuration files in reading order; later ones override earlier ones. They need not exist.
pub fn config_files(uid: u32, env: &Env) -> Vec<PathBuf> {
    let mut files = vec![PathBuf::from("/etc/nexus/nexus.toml")];
    if uid != 0 {
        files.extend(base(env, "XDG_CONFIG_HOME", ".config").map(|dir| dir.join("nexus/nexus.toml")));
    }
    files
}

/// The value of a variable of Nexus, unless it is empty.
fn own(env: &Env, variable: &str) -> Option<PathBuf> {
    env.get(OsStr::new(variable)).filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// The value of a variable of the desktop specification, which requires relative paths to be ignored.
fn absolute(env: &Env, variable: &str) -> Option<PathBuf> {
    own(env, variable).filter(|path| path.is_absolute())
}

fn base(env: &Env, variable: &str, under_home: &str) -> Option<PathBuf> {
    absolute(env, variable).or_else(|| absolute(env, "HOME").map(|home| home.join(under_home)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(pairs: &[(&str, &str)]) -> Env {
        pairs.iter().map(|(k, v)| (OsString::from(k), OsString::from(v))).collect()
    }

    #[test]
    fn root_has_the_system_places() {
        let env =
            env(&[("HOME", "/root"), ("XDG_RUNTIME_DIR", "/run/user/0"), ("XDG_STATE_HOME", "/elsewhere")]);
        assert_eq!(state_dir(0, &env), Ok("/var/lib/nexus".into()));
        assert_eq!(socket(0, &env), Ok("/run/nexus/nexus.sock".into()));
        assert_eq!(config_files(0, &env), [PathBuf::from("/etc/nexus/nexus.toml")]);
    }

    #[test]
    fn users_have_their_own() {
        let full = env(&[
            ("HOME", "/home/a"),
            ("XDG_STATE_HOME", "/s"),
            ("XDG_RUNTIME_DIR", "/run/user/7"),
            ("XDG_CONFIG_HOME", "/c"),
        ]);
        assert_eq!(state_dir(7, &full), Ok("/s/nexus".into()));
        assert_eq!(socket(7, &full), Ok("/run/user/7/nexus/nexus.sock".into()));
        assert_eq!(config_files(7, &full)[1], PathBuf::from("/c/nexus/nexus.toml"));

        let poor = env(&[("HOME", "/home/a"), ("XDG_STATE_HOME", "relative"), ("XDG_RUNTIME_DIR", "")]);
        assert_eq!(state_dir(7, &poor), Ok("/home/a/.local/state/nexus".into()));
        assert_eq!(socket(7, &poor), Ok("/home/a/.local/state/nexus/run/nexus.sock".into()));
        assert_eq!(config_files(7, &poor)[1], PathBuf::from("/home/a/.config/nexus/nexus.toml"));
    }

    #[test]
    fn a_client_that_hands_on_few_variables_finds_the_same_socket() {
        let few = env(&[("HOME", "/home/a"), ("PATH", "/usr/bin")]);
        let own = |path: &Path| path == Path::new("/run/user/7");
        assert_eq!(socket(7, &completed(few.clone(), 7, own)), Ok("/run/user/7/nexus/nexus.sock".into()));
        assert_eq!(completed(few.clone(), 7, |_| false), few);
        let told = env(&[("HOME", "/home/a"), ("XDG_RUNTIME_DIR", "/r")]);
        assert_eq!(completed(told.clone(), 7, own), told);
    }

    #[test]
    fn own_variables_come_first() {
        let env = env(&[(STATE_DIR, "/x"), (RUNTIME_DIR, "/y"), (SOCKET, "/z.sock")]);
        for uid in [0, 7] {
            assert_eq!(state_dir(uid, &env), Ok("/x".into()));
            assert_eq!(runtime_dir(uid, &env), Ok("/y".into()));
            assert_eq!(socket(uid, &env), Ok("/z.sock".into()));
        }
    }

    #[test]
    fn a_user_without_a_home_is_told() {
        let text = state_dir(7, &Env::new()).unwrap_err().to_string();
        assert!(text.contains(STATE_DIR) && text.contains("HOME"), "{text}");
        assert!(socket(7, &Env::new()).is_err());
        assert_eq!(config_files(7, &Env::new()).len(), 1);
    }
}
