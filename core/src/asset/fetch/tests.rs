//! Downloads from a server that misbehaves.

mod safe;

use std::time::Duration;

use super::*;
use crate::asset::testing::{Fault, Server};

/// Timeouts that are short enough for tests and long enough for a busy machine.
fn settings() -> FetchSettings {
    FetchSettings {
        connect_timeout: Duration::from_secs(20),
        idle_timeout: Duration::from_secs(20),
        deadline: Duration::from_secs(60),
        retries: 2,
        backoff: Duration::from_millis(5),
        ..FetchSettings::default()
    }
}

fn body() -> Vec<u8> {
    (0..300_000u32).flat_map(|n| n.to_le_bytes()).collect()
}

struct Scene {
    server: Arc<Server>,
    fetcher: Fetcher,
    dir: tempfile::TempDir,
    progress: Progress,
}

impl Scene {
    fn new() -> Self {
        Self::with(settings())
    }

    fn with(settings: FetchSettings) -> Self {
        Self::of(Server::start(), settings)
    }

    fn of(server: Server, settings: FetchSettings) -> Self {
        let server = Arc::new(server);
        server.put("/file", body());
        Self {
            server,
            fetcher: Fetcher::new(settings).unwrap(),
            dir: tempfile::tempdir().unwrap(),
            progress: Progress::default(),
        }
    }

    fn want(&self) -> Want {
        let body = body();
        Want {
            url: self.server.url("/file").parse().unwrap(),
            size: Some(body.len() as u64),
            sha256: Some(Sha256::of(&body)),
            max_bytes: 10 << 20,
        }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("file")
    }

    fn part(&self) -> PathBuf {
        self.dir.path().join("file.part")
    }

    async fn fetch(&self, want: &Want) -> Result<Fetched, AssetError> {
        self.fetcher.to_file(want, &self.path(), &self.progress).await
    }

    /// The ranges that were asked for.
    fn ranges(&self) -> Vec<Option<String>> {
        self.server.requests().into_iter().map(|r| r.range).collect()
    }

    fn assert_whole(&self) {
        assert_eq!(std::fs::read(self.path()).unwrap(), body());
        assert!(!self.part().exists());
    }

    fn assert_nothing(&self) {
        assert!(!self.path().exists());
    }
}

#[tokio::test]
async fn a_file_is_there_as_a_whole_and_its_progress_is_shown() {
    let scene = Scene::new();
    let fetched = scene.fetch(&scene.want()).await.unwrap();
    assert_eq!((fetched.path.clone(), fetched.size_bytes), (scene.path(), 1_200_000));
    scene.assert_whole();
    let shown = scene.progress.watch().borrow().clone();
    assert_eq!((shown.done, shown.total), (Some(1_200_000), Some(1_200_000)));
    assert_eq!(scene.fetcher.to_memory(&scene.want(), &scene.progress).await.unwrap(), body());
}

#[tokio::test]
async fn a_cut_connection_is_gone_on_with() {
    let scene = Scene::new();
    scene.server.misbehave("/file", [Fault::CutAfter(100_000), Fault::CutAfter(50_000)]);
    scene.fetch(&scene.want()).await.unwrap();
    scene.assert_whole();
    let ranges = scene.ranges();
    assert_eq!(ranges.len(), 3);
    assert_eq!(ranges[0], None);
    assert!(ranges[1..].iter().all(Option::is_some), "{ranges:?}");
}

#[tokio::test]
async fn a_server_without_ranges_sends_all_again() {
    let scene = Scene::new();
    scene.server.misbehave("/file", [Fault::CutAfter(100_000), Fault::NoRange]);
    scene.fetch(&scene.want()).await.unwrap();
    scene.assert_whole();
}

#[tokio::test]
async fn a_part_of_an_earlier_run_is_gone_on_with() {
    let scene = Scene::new();
    std::fs::write(scene.part(), &body()[..700_000]).unwrap();
    scene.fetch(&scene.want()).await.unwrap();
    scene.assert_whole();
    assert_eq!(scene.ranges(), [Some("bytes=700000-".to_owned())]);
}

#[tokio::test]
async fn a_whole_part_needs_no_request() {
    let scene = Scene::new();
    std::fs::write(scene.part(), body()).unwrap();
    scene.fetch(&scene.want()).await.unwrap();
    scene.assert_whole();
    assert_eq!(scene.ranges().len(), 0);
}

#[tokio::test]
async fn a_wrong_part_of_an_earlier_run_is_thrown_away() {
    let scene = Scene::new();
    std::fs::write(scene.part(), vec![9; 700_000]).unwrap();
    scene.fetch(&scene.want()).await.unwrap();
    scene.assert_whole();
    assert_eq!(scene.ranges(), [Some("bytes=700000-".to_owned()), None]);
}

#[tokio::test]
async fn what_came_before_an_interruption_is_kept_for_the_next_run() {
    let scene = Scene::new();
    scene.server.misbehave("/file", vec![Fault::CutAfter(1000); 3]);
    let error = scene.fetch(&scene.want()).await.unwrap_err();
    assert!(matches!(error, AssetError::Transfer { .. }), "{error:?}");
    scene.assert_nothing();
    let have = std::fs::metadata(scene.part()).unwrap().len();
    assert!(have > 0 && have <= 3000, "{have}");
    scene.fetch(&scene.want()).await.unwrap();
    scene.assert_whole();
    assert_eq!(scene.ranges().last().unwrap(), &Some(format!("bytes={have}-")));
}

#[tokio::test]
async fn a_server_error_passes_and_a_missing_file_does_not() {
    let scene = Scene::new();
    scene.server.misbehave("/file", [Fault::Status(500), Fault::Status(503)]);
    scene.fetch(&scene.want()).await.unwrap();
    scene.assert_whole();

    let scene = Scene::new();
    scene.server.misbehave("/file", vec![Fault::Status(500); 3]);
    let error = scene.fetch(&scene.want()).await.unwrap_err();
    assert!(matches!(error, AssetError::Status { status: 500, .. }), "{error:?}");
    assert_eq!(scene.server.count("/file"), 3);

    for status in [403, 404, 410] {
        let scene = Scene::new();
        scene.server.misbehave("/file", [Fault::Status(status)]);
        let error = scene.fetch(&scene.want()).await.unwrap_err();
        assert!(matches!(error, AssetError::Status { status: s, .. } if s == status), "{error:?}");
        assert_eq!(scene.server.count("/file"), 1);
        scene.assert_nothing();
    }
}

#[tokio::test]
async fn redirects_are_followed_but_not_for_ever() {
    let scene = Scene::new();
    scene.server.put("/old", b"".to_vec());
    scene.server.misbehave("/old", [Fault::Redirect("/file".into())]);
    let want = Want { url: scene.server.url("/old").parse().unwrap(), ..scene.want() };
    scene.fetch(&want).await.unwrap();
    scene.assert_whole();

    let scene = Scene::new();
    scene.server.misbehave("/file", vec![Fault::Redirect("/file".into()); 50]);
    let error = scene.fetch(&scene.want()).await.unwrap_err();
    assert!(matches!(error, AssetError::Transfer { .. }), "{error:?}");
    assert!(scene.server.count("/file") <= 10);
}

#[tokio::test]
async fn other_bytes_are_refused() {
    let scene = Scene::new();
    let mut other = body();
    other[5000] ^= 1;
    scene.server.put("/file", other);
    let error = scene.fetch(&scene.want()).await.unwrap_err();
    assert!(matches!(error, AssetError::Checksum { .. }), "{error:?}");
    scene.assert_nothing();
    assert!(!scene.part().exists(), "a file that is wrong is nothing to go on with");
    let error = scene.fetcher.to_memory(&scene.want(), &scene.progress).await.unwrap_err();
    assert!(matches!(error, AssetError::Checksum { .. }), "{error:?}");
}

#[tokio::test]
async fn other_lengths_are_refused_at_once() {
    for length in [1_199_999, 1_200_001] {
        let scene = Scene::new();
        scene.server.put("/file", vec![0; length]);
        let error = scene.fetch(&scene.want()).await.unwrap_err();
        assert!(matches!(error, AssetError::Length { .. }), "{error:?}");
        assert_eq!(scene.server.count("/file"), 1);
        scene.assert_nothing();
    }
}

#[tokio::test]
async fn too_much_is_refused_whether_it_is_announced_or_not() {
    let scene = Scene::new();
    let want = Want { size: None, sha256: None, max_bytes: 1_000_000, ..scene.want() };
    let error = scene.fetch(&want).await.unwrap_err();
    assert!(matches!(error, AssetError::TooLarge { limit: 1_000_000, .. }), "{error:?}");

    scene.server.misbehave("/file", [Fault::Endless(vec![7; 4096])]);
    let error = scene.fetch(&want).await.unwrap_err();
    assert!(matches!(error, AssetError::TooLarge { limit: 1_000_000, .. }), "{error:?}");

    scene.server.misbehave("/file", [Fault::Endless(vec![7; 4096])]);
    let error = scene.fetch(&scene.want()).await.unwrap_err();
    assert!(matches!(error, AssetError::Length { .. }), "{error:?}");
    scene.assert_nothing();
}

#[tokio::test]
async fn a_silent_server_is_given_up() {
    let scene = Scene::with(FetchSettings { idle_timeout: Duration::from_millis(500), ..settings() });
    scene.server.misbehave("/file", vec![Fault::StallAfter(10); 3]);
    let error = scene.fetch(&scene.want()).await.unwrap_err();
    assert!(matches!(error, AssetError::Transfer { .. }), "{error:?}");
    // It may have given up before it looked at a request.
    scene.server.wait_for_times("/file", 3);
    assert_eq!(scene.server.count("/file"), 3);
    scene.assert_nothing();
}

#[tokio::test]
async fn a_deadline_ends_what_goes_on_for_too_long() {
    let scene = Scene::with(FetchSettings { deadline: Duration::from_millis(200), ..settings() });
    scene.server.misbehave("/file", [Fault::StallAfter(10)]);
    let error = scene.fetch(&scene.want()).await.unwrap_err();
    assert!(matches!(error, AssetError::Timeout { .. }), "{error:?}");
}

#[tokio::test]
async fn a_download_that_is_cancelled_ends_at_once() {
    let scene = Scene::new();
    scene.server.misbehave("/file", [Fault::StallAfter(10)]);
    let want = scene.want();
    let (token, server) = (scene.progress.token().clone(), scene.server.clone());
    let canceller = tokio::task::spawn_blocking(move || {
        server.wait_for("/file");
        token.cancel();
    });
    let result = scene.fetch(&want).await;
    canceller.await.unwrap();
    assert!(matches!(result, Err(AssetError::Cancelled)), "{result:?}");
    scene.assert_nothing();
}

#[tokio::test]
async fn nobody_at_the_other_end_is_an_error_with_its_cause() {
    let scene = Scene::new();
    // A port that is never assigned by chance.
    let free = "127.0.0.1:9";
    let want = Want { url: format!("http://user:secret@{free}/x").parse().unwrap(), ..scene.want() };
    let error = scene.fetch(&want).await.unwrap_err();
    let text = nexus_schema::error::chain(&error);
    assert!(text.contains(&format!("get http://{free}/x: ")), "{text}");
    assert!(text.to_lowercase().contains("refused") && !text.contains("secret"), "{text}");
}

#[derive(Debug)]
struct Through(Url);

impl ProxyRules for Through {
    fn proxy_for(&self, _: &Url) -> Option<Url> {
        Some(self.0.clone())
    }
}

#[tokio::test]
async fn a_proxy_is_asked_for_whole_addresses() {
    let proxy = Server::start();
    proxy.put("http://archive.invalid/file", body());
    let rules = Arc::new(Through(proxy.url("/").parse().unwrap()));
    let scene = Scene::with(FetchSettings { proxy: ProxySetting::Rules(rules), ..settings() });
    let want = Want { url: "http://archive.invalid/file".parse().unwrap(), ..scene.want() };
    scene.fetch(&want).await.unwrap();
    scene.assert_whole();
    assert_eq!((proxy.requests().len(), scene.server.requests().len()), (1, 0));
}
