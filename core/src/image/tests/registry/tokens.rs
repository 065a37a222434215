//! Registries that require authentication, and those whose answers never end.

use std::io::{BufRead, BufReader, Read, Write};
use std::sync::{Arc, OnceLock};

use super::*;

/// A registry whose answers are made by a function of its address, the path (with the body after a space), and
/// the `Authorization` header. An answer without a length never ends.
fn answering(answer: impl Fn(&str, &str, Option<&str>) -> String + Send + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let own = address.clone();
    let answer = Arc::new(std::sync::Mutex::new(answer));
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let (own, answer) = (own.clone(), answer.clone());
            std::thread::spawn(move || {
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                let lines = reader.by_ref().lines().map_while(Result::ok);
                let head: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
                let mut path =
                    head.first().and_then(|line| line.split(' ').nth(1)).unwrap_or_default().to_owned();
                let header = |wanted: &str| {
                    head.iter().find_map(|line| {
                        let (name, value) = line.split_once(": ")?;
                        name.eq_ignore_ascii_case(wanted).then_some(value)
                    })
                };
                if let Some(length) = header("content-length") {
                    path.push(' ');
                    reader.take(length.parse().unwrap()).read_to_string(&mut path).unwrap();
                }
                let answer = answer.lock().unwrap()(&own, &path, header("authorization"));
                let mut sent = stream.write_all(answer.as_bytes());
                while sent.is_ok() && !answer.contains("Content-Length") {
                    sent = stream.write_all(&[b' '; 4096]);
                }
            });
        }
    });
    address
}

fn http(status: &str, headers: &str, body: &str) -> String {
    format!("HTTP/1.1 {status}\r\n{headers}Content-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len())
}

/// An endless answer.
fn endless(status: &str) -> String {
    format!(
        "HTTP/1.1 {status}\r\nConnection: close\r\n\r\n{{\"token\":\"a\",\"errors\":[{{\"message\":\"m\"}}]"
    )
}

fn challenge(own: &str) -> String {
    let demand = format!("WWW-Authenticate: Bearer realm=\"http://{own}/token\",service=\"s\"\r\n");
    http("401 Unauthorized", &demand, "{}")
}

async fn ask(address: &str, access: &Access) -> Result<(), OciError> {
    Remote::parse(&format!("{address}/test:1"), access).unwrap().resolve().await.map(drop)
}

#[tokio::test]
async fn tokens_are_asked_for_and_used() {
    let manifest = Recipe::of("a").manifest().to_string();
    for (token, works) in [("abc.def", true), ("two\\nlines", false), ("wrong", false), ("", false)] {
        let manifest = manifest.clone();
        let address = answering(move |own, path, authorization| {
            if path.starts_with("/token") {
                assert!(path.contains("scope=repository%3Atest%3Apull") && authorization.is_none(), "{path}");
                return http("200 OK", "", &format!("{{\"token\":\"{token}\"}}"));
            }
            if authorization != Some("Bearer abc.def") {
                return challenge(own);
            }
            http("200 OK", "", &manifest)
        });
        let asked = ask(&address, &Access::default()).await;
        assert_eq!(asked.is_ok(), works, "{token}: {asked:?}");
    }
}

#[tokio::test]
async fn a_token_that_is_used_up_is_replaced_once() {
    let manifest = Recipe::of("a").manifest().to_string();
    let given = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let count = given.clone();
    let address = answering(move |own, path, authorization| {
        let number = count.load(std::sync::atomic::Ordering::SeqCst);
        if path.starts_with("/token") {
            count.store(number + 1, std::sync::atomic::Ordering::SeqCst);
            return http("200 OK", "", &format!("{{\"access_token\":\"t{number}\"}}"));
        }
        // Each token is valid for one use.
        let is_good = number > 0 && authorization == Some(&format!("Bearer t{}", number - 1));
        static USED: OnceLock<()> = OnceLock::new();
        if !is_good || (number == 1 && USED.set(()).is_err()) {
            return challenge(own);
        }
        http("200 OK", "", &manifest)
    });
    let remote = Remote::parse(&format!("{address}/test:1"), &Access::default()).unwrap();
    for tokens in [1, 2, 2] {
        remote.resolve().await.unwrap();
        assert_eq!(given.load(std::sync::atomic::Ordering::SeqCst), tokens);
    }
}

#[tokio::test]
async fn an_identity_is_exchanged_for_a_token() {
    let base = tempfile::tempdir().unwrap();
    let manifest = Recipe::of("a").manifest().to_string();
    let asked = Arc::new(OnceLock::new());
    let seen = asked.clone();
    let address = answering(move |own, path, authorization| match authorization {
        Some("Bearer abc") => http("200 OK", "", &manifest),
        _ if path.starts_with("/token") => {
            seen.set(path.to_owned()).unwrap();
            http("200 OK", "", "{\"access_token\":\"abc\"}")
        }
        _ => challenge(own),
    });
    let file = base.path().join("config.json");
    fs::write(&file, json!({ "auths": { &address: { "auth": "", "identitytoken": "i&t" } } }).to_string())
        .unwrap();
    let access = Access { keychain: Keychain::new(Some(file), Environment::default()), ..Access::default() };
    ask(&address, &access).await.unwrap();
    let asked = asked.get().unwrap();
    assert!(
        asked.starts_with("/token scope=repository%3Atest%3Apull&service=s&grant_type=refresh_token"),
        "{asked}"
    );
    assert!(asked.ends_with("&refresh_token=i%26t"), "{asked}");
}

#[tokio::test]
async fn answers_without_an_end_are_cut_off() {
    let begun = Instant::now();
    for (what, status, code) in [
        ("token", "200 OK", ErrorCode::TooLarge),
        ("token", "500 Trouble", ErrorCode::DownloadFailed),
        ("token", "403 Forbidden", ErrorCode::DownloadFailed),
        ("manifest", "200 OK", ErrorCode::TooLarge),
        ("manifest", "500 Trouble", ErrorCode::DownloadFailed),
        ("manifest", "404 Not Found", ErrorCode::ImageNotFound),
    ] {
        let address = answering(move |own, path, _| match path.starts_with("/token") {
            true => endless(status),
            false if what == "manifest" => endless(status),
            false => challenge(own),
        });
        let error = ask(&address, &Access::default()).await.unwrap_err();
        assert_eq!(error.code(), code, "{what} {status}: {error}");
        assert!(error.to_string().contains(&address), "{error}");
    }
    // The same for blobs.
    let mut recipe = Recipe::of("a");
    let manifest = recipe.manifest().to_string();
    let address = answering(move |_, path, _| match path.contains("/manifests/") {
        true => http("200 OK", "", &manifest),
        false => endless("404 Not Found"),
    });
    let base = tempfile::tempdir().unwrap();
    let error = pull(&format!("{address}/test:1"), &base.path().join("image")).await.unwrap_err();
    assert!(error.to_string().contains("is missing"), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(50), "none of them waited for a deadline");
}

#[tokio::test]
async fn what_a_registry_says_about_a_failure_is_shown() {
    let said = "{\"errors\":[{\"code\":\"TOOMANYREQUESTS\",\"message\":\"slow\\ndown\"}]}";
    let address = answering(move |_, _, _| http("429 Too Many Requests", "", said));
    let error = ask(&address, &Access::default()).await.unwrap_err().to_string();
    assert!(error.contains("answers 429") && error.contains("says: slowdown"), "{error}");
}

#[tokio::test]
async fn a_token_to_push_is_asked_for_and_uploads_go_to_the_registry_only() {
    let base = tempfile::tempdir().unwrap();
    let root = base.path().join("root");
    fs::create_dir(&root).unwrap();
    fs::write(root.join("file"), "content").unwrap();
    let image = make(Source::Directory(root), &base.path().join("image")).await.unwrap();
    let created = nexus_schema::Timestamp::from_millis(0);
    let about = crate::image::oci::About { name: "a", config: None, arch: nexus_schema::Arch::HOST, created };
    let exported = crate::image::oci::export(&image.path, &about, base.path(), &Progress::default()).unwrap();
    let address = answering(move |own, path, authorization| {
        if path.starts_with("/token") {
            assert!(path.contains("scope=repository%3Atest%3Apull%2Cpush"), "{path}");
            return http("200 OK", "", "{\"token\":\"abc\"}");
        }
        match authorization {
            Some("Bearer abc") if path.contains("/uploads/") => {
                http("202 Accepted", "Location: http://127.0.0.1:9/v2/test/blobs/uploads/1\r\n", "")
            }
            Some("Bearer abc") => http("404 Not Found", "", ""),
            _ => challenge(own),
        }
    });
    let remote = Remote::parse_to_push(&format!("{address}/test:1"), &Access::default()).unwrap();
    let error = remote.push(&exported, &Progress::default()).await.unwrap_err();
    assert!(error.to_string().contains("another server"), "{error}");
}
