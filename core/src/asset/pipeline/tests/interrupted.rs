//! Downloads that are interrupted, resumed, and interrupted again.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_connection_is_healed_by_a_range() {
    let scene = Scene::new();
    let anvil = Anvil::new(Key::good());
    anvil.serve(&scene.server);
    let some = anvil.packed.len() / 3;
    scene.server.misbehave(&anvil.xz(), [Fault::CutAfter(some), Fault::Status(500)]);
    scene.run(&anvil.job(&scene)).await.unwrap();
    assert_eq!(scene.read("main"), anvil.kernel);
    let requests: Vec<_> = scene.server.requests().into_iter().filter(|r| r.target == anvil.xz()).collect();
    assert_eq!(requests.len(), 3);
    let range = requests[2].range.as_deref().unwrap();
    assert!(range.starts_with("bytes=") && range != "bytes=0-", "{range}");
    assert!(requests[2].if_range.is_some());
}

/// Runs until the server has interrupted it for good, so that a part file is left.
async fn leave_a_part(scene: &Scene, job: &Job, path: &str, length: usize) {
    let faults = [Fault::CutAfter(length / 3), Fault::CutAfter(length / 3), Fault::CutAfter(10)];
    scene.server.misbehave(path, faults);
    let error = scene.run(job).await.unwrap_err();
    assert!(matches!(error, AssetError::Transfer { .. } | AssetError::Length { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_later_run_goes_on_where_an_earlier_one_ended() {
    let scene = Scene::new();
    let anvil = Anvil::new(Key::good());
    anvil.serve(&scene.server);
    let job = anvil.job(&scene);
    leave_a_part(&scene, &job, &anvil.xz(), anvil.packed.len()).await;
    assert_eq!(scene.parts().len(), 2, "{:?}", scene.parts());
    let before = scene.server.count(&anvil.xz());
    scene.run(&job).await.unwrap();
    assert_eq!(scene.read("main"), anvil.kernel);
    let all = scene.server.requests();
    let last = all.iter().rfind(|r| r.target == anvil.xz()).unwrap();
    assert_eq!(scene.server.count(&anvil.xz()), before + 1);
    let from: usize = last.range.as_deref().unwrap()["bytes=".len()..].trim_end_matches('-').parse().unwrap();
    assert!(from > anvil.packed.len() / 2, "{from} of {}", anvil.packed.len());
    assert!(last.if_range.is_some(), "the server is told what the part is of");
    assert!(scene.parts().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_of_many_blocks_is_gone_on_with_in_the_middle_of_one() {
    let scene = Scene::new();
    let mut anvil = Anvil::new(Key::good());
    anvil.kernel = body(1 << 20);
    anvil.packed = pack_in_blocks(&anvil.kernel, 1 << 20);
    anvil.serve(&scene.server);
    let job = anvil.job(&scene);
    leave_a_part(&scene, &job, &anvil.xz(), anvil.packed.len()).await;
    assert_eq!(scene.parts().len(), 2, "{:?}", scene.parts());
    scene.run(&job).await.unwrap();
    assert!(scene.read("main") == anvil.kernel);
    assert!(scene.parts().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_part_of_another_file_is_thrown_away() {
    let scene = Scene::new();
    let anvil = Anvil::new(Key::good());
    anvil.serve(&scene.server);
    let job = anvil.job(&scene);
    leave_a_part(&scene, &job, &anvil.xz(), anvil.packed.len()).await;
    // The release is replaced under the same name.
    let mut fresh = Anvil { kernel: body(150_000), ..Anvil::new(anvil.key.clone()) };
    fresh.packed = pack(&fresh.kernel, Compression::Xz);
    fresh.serve(&scene.server);
    scene.run(&job).await.unwrap();
    assert_eq!(scene.read("main"), fresh.kernel);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_part_that_is_whole_needs_no_more_bytes() {
    let scene = Scene::new();
    let anvil = Anvil::new(Key::good());
    anvil.serve(&scene.server);
    let job = anvil.job(&scene);
    leave_a_part(&scene, &job, &anvil.xz(), anvil.packed.len()).await;
    let part = scene.parts().into_iter().find(|name| name.ends_with(".part")).unwrap();
    fs::write(scene.dir.path().join("parts").join(part), &anvil.packed).unwrap();
    scene.run(&job).await.unwrap();
    assert_eq!(scene.read("main"), anvil.kernel);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_part_costs_one_more_try() {
    let scene = Scene::new();
    let anvil = Anvil::new(Key::good());
    anvil.serve(&scene.server);
    let job = anvil.job(&scene);
    leave_a_part(&scene, &job, &anvil.xz(), anvil.packed.len()).await;
    let part = scene.parts().into_iter().find(|name| name.ends_with(".part")).unwrap();
    let part = scene.dir.path().join("parts").join(part);
    let mut bytes = fs::read(&part).unwrap();
    bytes[1000] ^= 0x55;
    fs::write(&part, bytes).unwrap();
    scene.run(&job).await.unwrap();
    assert_eq!(scene.read("main"), anvil.kernel);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_digest_only_the_same_file_is_gone_on_with() {
    let scene = Scene::new();
    let (old, new) = (body(30_000), body(40_000));
    // The same file, according to its tag.
    scene.server.put("/f", old.clone());
    scene.server.misbehave("/f", [Fault::CutAfter(50_000)]);
    scene.run(&scene.url_job("/f", None)).await.unwrap();
    assert_eq!(scene.read("main"), old);
    assert!(scene.server.requests()[1].range.is_some());
    fs::remove_dir_all(scene.dir.path().join("into")).unwrap();
    // It changes during the download: everything is downloaded again.
    let server = &scene.server;
    server.misbehave("/f", [Fault::StallAfter(50_000)]);
    let settings = FetchSettings {
        idle_timeout: Duration::from_secs(2),
        backoff: Duration::from_millis(5),
        ..FetchSettings::default()
    };
    let fetcher = Fetcher::new(settings).unwrap();
    let job = scene.url_job("/f", None);
    let before = server.requests().len();
    let (made, ()) = tokio::join!(run(&fetcher, &job, &scene.progress), async {
        while server.requests().len() == before {
            tokio::task::yield_now().await;
        }
        server.put("/f", new.clone());
    });
    made.unwrap();
    assert_eq!(scene.read("main"), new);
    assert!(scene.parts().is_empty(), "what nothing vouches for leaves no part");
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelling_ends_it_and_keeps_the_part() {
    let scene = Scene::new();
    let anvil = Anvil::new(Key::good());
    anvil.serve(&scene.server);
    scene.server.misbehave(&anvil.xz(), [Fault::StallAfter(anvil.packed.len() / 2)]);
    let job = anvil.job(&scene);
    let (result, ()) = tokio::join!(scene.run(&job), async {
        let mut progress = scene.progress.watch();
        let enough = |p: &nexus_schema::tools::op::OpProgress| p.done.is_some_and(|done| done > 100_000);
        progress.wait_for(enough).await.unwrap();
        scene.progress.token().cancel();
    });
    assert!(matches!(result, Err(AssetError::Cancelled)));
    assert_eq!(scene.parts().len(), 2);
    let again = Progress::default();
    run(&scene.fetcher, &job, &again).await.unwrap();
    assert_eq!(scene.read("main"), anvil.kernel);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_stays_broken_is_given_up() {
    let scene = Scene::new();
    scene.server.put("/f", body(10));
    scene.server.misbehave("/f", [500, 502, 503].map(Fault::Status));
    let error = scene.run(&scene.url_job("/f", None)).await.unwrap_err();
    assert!(matches!(error, AssetError::Status { status: 503, .. }), "{error}");
    assert_eq!(scene.server.count("/f"), 3);
}

#[test]
fn old_parts_are_swept_and_young_ones_kept() {
    let dir = tempfile::tempdir().unwrap();
    for (name, days) in [("a.part", 1), ("a.json", 1), ("b.part", 8), ("b.json", 8), ("stray", 0)] {
        let path = dir.path().join(name);
        fs::write(&path, b"x").unwrap();
        let at = std::time::SystemTime::now() - Duration::from_secs(days * 86400);
        std::fs::File::options().write(true).open(&path).unwrap().set_modified(at).unwrap();
    }
    super::part::sweep(dir.path()).unwrap();
    let mut left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["a.json", "a.part"]);
}
