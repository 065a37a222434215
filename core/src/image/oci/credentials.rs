//! User names and passwords for registries, as `docker login` stores them: in a file, or in a program that the file
//! names (a credential helper).

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fmt;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use data_encoding::BASE64;
use nexus_schema::ByteSize;
use serde::Deserialize;
use tokio_util::sync::CancellationToken;

use super::OciError;
use super::digest::shown;
use crate::config::Environment;
use crate::os::paths::PROGRAM_DIRECTORIES;
use crate::os::tool::{ProgramError, Tool};

/// The largest file of credentials that is read.
const CREDENTIALS_MAX: u64 = 1 << 20;
/// The most output of a helper.
const ANSWER_MAX: usize = 64 << 10;
/// The timeout of a helper; some ask a server.
const HELPER_TIMEOUT: Duration = Duration::from_secs(20);
/// The names of the default registry.
const HUB: [&str; 2] = ["docker.io", "index.docker.io"];
/// The user name by which a helper says that the secret is a token.
const NO_USER: &str = "<token>";
/// What every helper prints if it has no entry.
const NOT_FOUND: &str = "credentials not found";

/// The source of credentials. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Keychain {
    file: Option<PathBuf>,
    environment: Environment,
}

/// Credentials for a registry.
#[derive(PartialEq, Eq)]
pub(super) enum Login {
    Password {
        user: String,
        password: String,
    },
    /// An identity token, which is exchanged for access tokens.
    Token(String),
}

impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Login")
    }
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct File {
    #[serde(default)]
    auths: BTreeMap<String, Auth>,
    #[serde(default)]
    cred_helpers: BTreeMap<String, String>,
    #[serde(default)]
    creds_store: String,
}

#[derive(Deserialize)]
struct Auth {
    #[serde(default)]
    auth: String,
    #[serde(default)]
    identitytoken: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    username: String,
    secret: String,
}

impl Keychain {
    /// The credentials in a file, if it exists, and in the helpers that it names, which run with this environment.
    pub fn new(file: Option<PathBuf>, environment: Environment) -> Self {
        Self { file, environment }
    }

    /// The credentials for a registry, if any.
    pub(super) async fn find(&self, registry: &str) -> Result<Option<Login>, OciError> {
        let Some(path) = &self.file else { return Ok(None) };
        let Some(file) = read(path) else { return Ok(None) };
        if let Some((key, helper)) = file.cred_helpers.iter().find(|(key, _)| is_same(key, registry)) {
            return self.ask(helper, key, registry, path).await;
        }
        // An entry in the file itself needs no helper.
        let login =
            file.auths.iter().filter(|(key, _)| is_same(key, registry)).find_map(|(_, auth)| auth.login());
        match login {
            Some(login) => Ok(Some(login)),
            None if file.creds_store.is_empty() => Ok(None),
            None => {
                let key = if HUB.contains(&registry) { hub_url() } else { registry.to_owned() };
                self.ask(&file.creds_store, &key, registry, path).await
            }
        }
    }

    /// Runs a helper.
    async fn ask(
        &self,
        helper: &str,
        key: &str,
        registry: &str,
        file: &Path,
    ) -> Result<Option<Login>, OciError> {
        let program = format!("docker-credential-{}", shown(helper));
        let failed = |why: HelperProblem| OciError::Helper {
            program: program.clone(),
            file: file.display().to_string(),
            registry: registry.to_owned(),
            why,
        };
        let is_name = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if helper.is_empty() || !helper.chars().all(is_name) {
            return Err(failed(HelperProblem::Name));
        }
        let path = self.environment.get("PATH");
        let searched: Vec<PathBuf> = match path {
            Some(path) => {
                let parts = path.as_bytes().split(|b| *b == b':');
                parts.map(|part| PathBuf::from(OsStr::from_bytes(part))).filter(|p| p.is_absolute()).collect()
            }
            None => PROGRAM_DIRECTORIES.iter().map(PathBuf::from).collect(),
        };
        let tool = Tool::find_file(searched.iter().map(PathBuf::as_path), &program, "the credential helper")
            .map_err(|_| failed(HelperProblem::Missing))?;
        let mut call = tool.call().arg("get").input(key.as_bytes()).success(&[0, 1]).timeout(HELPER_TIMEOUT);
        for (name, value) in self.environment.iter() {
            call = call.env(name, value);
        }
        let answered = call.output(ANSWER_MAX, &CancellationToken::new()).await;
        let (finished, said) = answered.map_err(|e| failed(HelperProblem::Program(Box::new(e))))?;
        if finished.code != 0 {
            // Helpers print errors to stdout, and some include secrets. So the output is only searched for this text.
            return match String::from_utf8_lossy(&said).to_ascii_lowercase().contains(NOT_FOUND) {
                true => Ok(None),
                false => Err(failed(HelperProblem::Refused)),
            };
        }
        let answer: Answer = serde_json::from_slice(&said).map_err(|_| failed(HelperProblem::Answer))?;
        Ok(match (answer.username.as_str(), answer.secret.is_empty()) {
            (_, true) => None,
            (NO_USER, false) => Some(Login::Token(answer.secret)),
            _ => Some(Login::Password { user: answer.username, password: answer.secret }),
        })
    }
}

/// Why a credential helper failed. None of its output is in here.
#[derive(Debug, thiserror::Error)]
pub enum HelperProblem {
    /// Its name is not allowed.
    #[error("not a valid program name")]
    Name,
    /// It is not installed.
    #[error("no such program is in the PATH of nexusd")]
    Missing,
    /// It could not be run, or timed out.
    #[error("{}", nexus_schema::error::chain(.0))]
    Program(Box<ProgramError>),
    /// It exited with an error.
    #[error("it failed; run it by hand to see why")]
    Refused,
    /// Its answer is malformed.
    #[error("its answer has no Username and Secret, or is longer than {}", ByteSize::bytes(ANSWER_MAX as u64))]
    Answer,
}

/// The name of Docker Hub in helpers.
fn hub_url() -> String {
    format!("https://{}/v1/", HUB[1])
}

fn read(path: &Path) -> Option<File> {
    let mut text = Vec::new();
    fs_err::File::open(path).ok()?.take(CREDENTIALS_MAX).read_to_end(&mut text).ok()?;
    match serde_json::from_slice(&text) {
        Ok(file) => Some(file),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "registry credentials not read");
            None
        }
    }
}

/// Whether an entry (`HOST`, `HOST:PORT` or a URL) is for a registry.
fn is_same(key: &str, registry: &str) -> bool {
    let bare = key.trim_start_matches("https://").trim_start_matches("http://");
    let host = bare.split('/').next().unwrap_or_default();
    host == registry || (HUB.contains(&registry) && HUB.contains(&host))
}

impl Auth {
    fn login(&self) -> Option<Login> {
        if !self.identitytoken.is_empty() {
            return Some(Login::Token(self.identitytoken.clone()));
        }
        let decoded = String::from_utf8(BASE64.decode(self.auth.as_bytes()).ok()?).ok()?;
        let (user, password) = decoded.split_once(':')?;
        Some(Login::Password { user: user.to_owned(), password: password.trim_end_matches('\0').to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;
    use std::os::unix::fs::PermissionsExt;
    use std::time::Instant;

    use serde_json::json;

    use super::*;

    struct Scene {
        base: tempfile::TempDir,
    }

    impl Scene {
        fn new(file: &serde_json::Value) -> Self {
            let base = tempfile::tempdir().unwrap();
            std::fs::write(base.path().join("config.json"), file.to_string()).unwrap();
            Self { base }
        }

        /// Installs a helper that runs a script.
        fn helper(&self, name: &str, script: &str) {
            let path = self.base.path().join(format!("docker-credential-{name}"));
            std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        }

        async fn find(&self, registry: &str) -> Result<Option<Login>, OciError> {
            let path = format!("relative:{}:/usr/bin:/bin", self.base.path().display());
            let pairs = [("PATH", path), ("OWN", "word".to_owned())];
            let environment: Environment =
                pairs.into_iter().map(|(k, v)| (OsString::from(k), OsString::from(v))).collect();
            Keychain::new(Some(self.base.path().join("config.json")), environment).find(registry).await
        }
    }

    fn login(user: &str, password: &str) -> Option<Login> {
        Some(Login::Password { user: user.into(), password: password.into() })
    }

    #[tokio::test]
    async fn credentials_in_the_file_are_found_by_their_registry() {
        let auth = |text: &str| json!({ "auth": BASE64.encode(text.as_bytes()) });
        let scene = Scene::new(&json!({ "auths": {
            (hub_url()): auth("hub:p:w"), "127.0.0.1:5000": auth("me:secret"), "empty.example.com": {},
            "token.example.com": { "auth": "", "identitytoken": "t" },
        } }));
        assert_eq!(scene.find("docker.io").await.unwrap(), login("hub", "p:w"));
        assert_eq!(scene.find("127.0.0.1:5000").await.unwrap(), login("me", "secret"));
        assert_eq!(scene.find("token.example.com").await.unwrap(), Some(Login::Token("t".into())));
        for none in ["127.0.0.1:5001", "empty.example.com", "example.com"] {
            assert_eq!(scene.find(none).await.unwrap(), None, "{none}");
        }
        assert!(!format!("{:?}", scene.find("127.0.0.1:5000").await).contains("secret"));
        std::fs::write(scene.base.path().join("config.json"), "{").unwrap();
        assert_eq!(scene.find("docker.io").await.unwrap(), None);
        assert_eq!(Keychain::default().find("docker.io").await.unwrap(), None);
    }

    #[tokio::test]
    async fn helpers_are_asked_for_their_registries() {
        let auth = json!({ "auth": BASE64.encode(b"plain:p") });
        let scene = Scene::new(&json!({
            "auths": { "plain.example.com": auth, "stored.example.com": {} },
            "credHelpers": { "one.example.com": "one", "two.example.com:5000": "two" },
            "credsStore": "store",
        }));
        // It echoes the requested registry, and a variable of its environment.
        let echo = "read -r key; printf '{\"ServerURL\":\"%s\",\"Username\":\"%s\",\"Secret\":\"%s %s\"}' \"$key\" \"$key\" \"$1\" \"$OWN\"";
        scene.helper("one", echo);
        scene.helper("two", "printf '{\"Username\":\"<token>\",\"Secret\":\"t\"}'");
        scene.helper("store", echo);
        assert_eq!(scene.find("one.example.com").await.unwrap(), login("one.example.com", "get word"));
        assert_eq!(scene.find("two.example.com:5000").await.unwrap(), Some(Login::Token("t".into())));
        assert_eq!(scene.find("stored.example.com").await.unwrap(), login("stored.example.com", "get word"));
        assert_eq!(scene.find("docker.io").await.unwrap(), login(&hub_url(), "get word"));
        assert_eq!(scene.find("plain.example.com").await.unwrap(), login("plain", "p"));
        scene.helper("store", "echo 'credentials not found in native keychain'; exit 1");
        assert_eq!(scene.find("other.example.com").await.unwrap(), None);
    }

    #[tokio::test]
    async fn helpers_that_fail_are_named() {
        let scene = Scene::new(&json!({ "credHelpers": {
            "absent.example.com": "absent", "bad.example.com": "../bad", "broken.example.com": "broken",
            "mute.example.com": "mute", "crash.example.com": "crash", "endless.example.com": "endless",
        } }));
        scene.helper("broken", "echo 'the secret is s3cret'; exit 1");
        scene.helper("mute", "true");
        scene.helper("crash", "echo trouble >&2; exit 7");
        scene.helper("endless", "exec tr '\\0' x < /dev/zero");
        for (registry, said) in [
            ("absent.example.com", "no such program"),
            ("bad.example.com", "not a valid program name"),
            ("broken.example.com", "it failed"),
            ("mute.example.com", "no Username and Secret"),
            ("crash.example.com", "trouble"),
            ("endless.example.com", "more than 65536 bytes"),
        ] {
            let begun = Instant::now();
            let error = scene.find(registry).await.expect_err(registry);
            assert!(begun.elapsed() < HELPER_TIMEOUT, "one that never ends is cut off by what it says");
            let text = error.to_string();
            assert!(text.contains(said) && text.contains(registry), "{text}");
            assert!(text.contains("docker-credential-") && text.contains("config.json"), "{text}");
            assert!(!text.contains("s3cret") && error.hint().is_some(), "{text}");
        }
    }
}
