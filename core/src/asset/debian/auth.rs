//! User names and passwords that the host's apt has for mirrors. Source of the format and its meaning: `apt_auth.conf(5)`.

use std::path::{Path, PathBuf};

use fs_err as fs;
use reqwest::Url;

use super::apt_conf::read_file;

/// The entries, in the order in which they are tried.
#[derive(Default)]
pub(crate) struct Logins {
    logins: Vec<Login>,
}

/// One entry.
#[derive(Default)]
struct Login {
    /// The only scheme that the entry applies to; without one it applies to TLS only.
    scheme: Option<String>,
    /// `host[:port][/path]`.
    place: String,
    login: String,
    password: String,
}

impl Logins {
    /// Reads `etc/apt/auth.conf` and `etc/apt/auth.conf.d/*.conf` under `apt_root`. Often only root can read them. A file that
    /// cannot be read is skipped, and the mirror then reports that it needs a password.
    pub(crate) fn read(apt_root: &Path) -> Self {
        let etc = apt_root.join("etc/apt");
        let parts = fs::read_dir(etc.join("auth.conf.d")).into_iter().flatten();
        let mut parts: Vec<PathBuf> = parts
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.extension().is_some_and(|extension| extension == "conf"))
            .collect();
        parts.sort();
        let mut logins = Self::default();
        for file in std::iter::once(etc.join("auth.conf")).chain(parts) {
            match read_file(&file) {
                Ok(text) => logins.parse(&text.unwrap_or_default()),
                Err(error) => tracing::info!(file = %file.display(), %error, "apt's passwords left out"),
            }
        }
        logins
    }

    /// Adds the text of one file. Unknown words are ignored.
    fn parse(&mut self, text: &str) {
        let words = text.lines().filter(|line| !line.trim_start().starts_with('#'));
        let mut words = words.flat_map(str::split_whitespace);
        let mut open: Option<Login> = None;
        while let Some(word) = words.next() {
            match (word, &mut open) {
                ("machine", _) => {
                    self.logins.extend(open.take());
                    let place = words.next().unwrap_or_default();
                    let (scheme, place) = match place.split_once("://") {
                        Some((scheme, place)) => (Some(scheme.to_owned()), place),
                        None => (None, place),
                    };
                    open = Some(Login { scheme, place: place.to_owned(), ..Login::default() });
                }
                ("login", Some(entry)) => words.next().unwrap_or_default().clone_into(&mut entry.login),
                ("password", Some(entry)) => words.next().unwrap_or_default().clone_into(&mut entry.password),
                _ => {}
            }
        }
        self.logins.extend(open);
    }

    /// Puts the first matching entry's name and password into a mirror's address, unless the address has its own.
    pub(crate) fn apply(&self, mirror: &mut Url) {
        if !mirror.username().is_empty() || mirror.password().is_some() {
            return;
        }
        let Some(entry) = self.logins.iter().find(|entry| entry.is_for(mirror)) else { return };
        let (login, password) = (entry.login.clone(), entry.password.clone());
        // Both fail only for addresses without a host, and those match no entry.
        let _ = mirror.set_username(&login);
        let _ = mirror.set_password((!password.is_empty()).then_some(&password));
    }
}

impl Login {
    fn is_for(&self, mirror: &Url) -> bool {
        let Some(host) = mirror.host_str() else { return false };
        let is_scheme = self.scheme.as_deref().unwrap_or("https") == mirror.scheme();
        if self.place.is_empty() || !is_scheme {
            return false;
        }
        let with_port = mirror.port().map_or(host.to_owned(), |port| format!("{host}:{port}"));
        match self.place.contains('/') {
            true => format!("{with_port}{}", mirror.path()).starts_with(&self.place),
            // Without a port, the entry applies to all ports.
            false => self.place == with_port || self.place == host,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn applied(text: &str, mirror: &str) -> String {
        let mut logins = Logins::default();
        logins.parse(text);
        let mut mirror = mirror.parse().unwrap();
        logins.apply(&mut mirror);
        mirror.to_string()
    }

    #[test]
    fn entries_are_for_the_places_that_they_name() {
        let entry = |machine: &str| format!("machine {machine} login me password p@ss/word\n");
        let put = "https://me:p%40ss%2Fword@a.test";
        for (machine, mirror, then) in [
            ("a.test", "https://a.test/debian/", format!("{put}/debian/")),
            ("a.test", "https://a.test:8443/", format!("{put}:8443/")),
            ("a.test:8443", "https://a.test:8443/", format!("{put}:8443/")),
            ("a.test:8443", "https://a.test:8444/", "https://a.test:8444/".to_owned()),
            ("a.test/debian", "https://a.test/debian/", format!("{put}/debian/")),
            ("a.test/debian", "https://a.test/ubuntu/", "https://a.test/ubuntu/".to_owned()),
            ("a.test/", "https://a.test.elsewhere/", "https://a.test.elsewhere/".to_owned()),
            ("a.tes", "https://a.test/", "https://a.test/".to_owned()),
            // Passwords are sent in the clear only where an entry names that scheme, and then only to that place.
            ("a.test", "http://a.test/", "http://a.test/".to_owned()),
            ("http://a.test", "http://a.test/", "http://me:p%40ss%2Fword@a.test/".to_owned()),
            ("http://a.test", "https://a.test/", "https://a.test/".to_owned()),
            ("https://a.test", "https://a.test/", format!("{put}/")),
            ("tor+https://a.test", "https://a.test/", "https://a.test/".to_owned()),
            // Credentials in the address itself take precedence.
            ("a.test", "https://you@a.test/", "https://you@a.test/".to_owned()),
        ] {
            assert_eq!(applied(&entry(machine), mirror), then, "{machine} {mirror}");
        }
    }

    #[test]
    fn words_may_be_on_lines_of_their_own_and_the_first_entry_wins() {
        let text = "# machine a.test login no password no\n\nmachine\ta.test\n  login me\n  password 1\n\
                    machine a.test login you password 2 machine b.test login she";
        assert_eq!(applied(text, "https://a.test/"), "https://me:1@a.test/");
        assert_eq!(applied(text, "https://b.test/"), "https://she@b.test/");
        for text in ["machine", "machine a.test", "login me password x", "machine  login me"] {
            assert_eq!(applied(text, "https://a.test/"), "https://a.test/", "{text}");
        }
    }

    #[test]
    fn files_are_read_in_their_order() {
        let root = tempfile::tempdir().unwrap();
        let etc = root.path().join("etc/apt");
        fs::create_dir_all(etc.join("auth.conf.d/directory.conf")).unwrap();
        for (name, who) in
            [("auth.conf.d/20-b.conf", "b"), ("auth.conf.d/10-a.conf", "a"), ("auth.conf.d/a.bak", "c")]
        {
            fs::write(etc.join(name), format!("machine x.test login {who} password 1\n")).unwrap();
        }
        fs::write(etc.join("auth.conf"), "machine y.test login y password 2\n").unwrap();
        let logins = Logins::read(root.path());
        let of = |mirror: &str| {
            let mut mirror: Url = mirror.parse().unwrap();
            logins.apply(&mut mirror);
            mirror.username().to_owned()
        };
        assert_eq!(["https://x.test/", "https://y.test/", "https://z.test/"].map(of), ["a", "y", ""]);
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_taken(text: String) {
            applied(&text, "https://a.test/");
        }
    }
}
