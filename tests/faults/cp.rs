//! `nexusctl cp`: targets, contents, and output.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File, FileTimes};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, SystemTime};

use serde_json::Value;
use tempfile::TempDir;

use crate::shell::Terminal;
use crate::streams::{code, ended, nexusctl, run, text};
use crate::world::World;

/// A machine `web-1` with its files below `vm`; this host's files are below `here`.
pub(crate) struct Pair {
    pub(crate) world: World,
    pub(crate) vm: Value,
    root: TempDir,
}

impl Pair {
    pub(crate) fn new() -> Self {
        let world = World::new();
        let vm = world.create(&mut world.client(), "web-1");
        let root = tempfile::Builder::new().prefix("nexus-cp-").tempdir().expect("a directory");
        fs::create_dir(root.path().join("here")).expect("a directory");
        fs::create_dir(root.path().join("vm")).expect("a directory");
        Self { world, vm, root }
    }

    pub(crate) fn at(&self, path: &str) -> PathBuf {
        self.root.path().join(path)
    }

    /// A path as given to cp: one below `vm` is in the machine.
    pub(crate) fn word(&self, path: &str) -> String {
        let prefix = if path.starts_with("vm") { "web-1:" } else { "" };
        if path == "-" { path.into() } else { format!("{prefix}{}/{path}", self.root.path().display()) }
    }

    fn cp(&self, words: &[&str], src: &str, dst: &str) -> Output {
        run(&self.world, &[&["cp"], words, &[&self.word(src), &self.word(dst)]].concat(), b"")
    }

    #[track_caller]
    pub(crate) fn must(&self, words: &[&str], src: &str, dst: &str) -> String {
        let output = self.cp(words, src, dst);
        assert_eq!(code(&output), Some(0), "{words:?} {src} {dst}: {}", text(&output.stderr));
        text(&output.stderr)
    }

    /// A copy that must fail; returns its output.
    #[track_caller]
    pub(crate) fn fails(&self, words: &[&str], src: &str, dst: &str) -> String {
        let output = self.cp(words, src, dst);
        assert_eq!(code(&output), Some(1), "{words:?} {src} {dst}: {}", text(&output.stderr));
        text(&output.stderr)
    }
}

/// The names below a directory, with contents.
pub(crate) fn listing(root: &Path) -> Vec<String> {
    fn add(root: &Path, at: &Path, all: &mut Vec<String>) {
        for entry in fs::read_dir(at).expect("a directory") {
            let path = entry.expect("an entry").path();
            let name = path.strip_prefix(root).expect("it is below").display().to_string();
            if path.is_symlink() {
                all.push(format!("{name} -> {}", fs::read_link(&path).expect("its target").display()));
            } else if path.is_dir() {
                all.push(format!("{name}/"));
                add(root, &path, all);
            } else {
                all.push(format!("{name}={}", fs::read_to_string(&path).expect("its content")));
            }
        }
    }
    let mut all = Vec::new();
    add(root, root, &mut all);
    all.sort();
    all
}

/// Makes sources, and a target with one of everything.
fn set_up(from: &Path, to: &Path) {
    for place in [from, to] {
        let _ = fs::remove_dir_all(place);
        fs::create_dir(place).expect("a directory");
    }
    fs::create_dir_all(from.join("tree/sub")).expect("directories");
    fs::write(from.join("file"), "new").expect("a file");
    fs::write(from.join("tree/sub/x"), "x").expect("a file");
    symlink("file", from.join("link")).expect("a link");
    symlink("tree", from.join("tree-link")).expect("a link");
    fs::create_dir(to.join("dir")).expect("a directory");
    fs::write(to.join("old"), "old").expect("a file");
    symlink("dir", to.join("to-dir")).expect("a link");
    symlink("old", to.join("to-old")).expect("a link");
}

/// Options, source and destination; then the new files, or the error.
type Case<'a> = (&'a [&'a str], &'a str, &'a str, Result<&'a [&'a str], &'a str>);

#[test]
fn copies_go_where_docker_cp_puts_them_both_ways() {
    const TREE: [&str; 3] = ["tree/", "tree/sub/", "tree/sub/x=x"];
    let pair = Pair::new();
    let cases: &[Case<'_>] = &[
        (&[], "file", "", Ok(&["file=new"])),
        (&[], "file", "/dir", Ok(&["dir/file=new"])),
        (&[], "file", "/dir/", Ok(&["dir/file=new"])),
        (&[], "file", "/to-dir", Ok(&["dir/file=new"])),
        (&[], "file", "/name", Ok(&["name=new"])),
        (&[], "file", "/old", Ok(&["old=new"])),
        (&[], "file", "/to-old", Ok(&["old=new"])),
        (&[], "file", "/name/", Err("find the directory")),
        (&[], "file", "/no/name", Err("create the directory first")),
        (&[], "file", "/old/", Err("old/")),
        (&[], "file", "/old/name", Err("old/name")),
        (&[], "file/", "", Err("file/")),
        (&[], "file/.", "", Err("file/.")),
        (&[], "tree", "", Ok(&TREE)),
        (&[], "tree", "/dir", Ok(&["dir/tree/", "dir/tree/sub/", "dir/tree/sub/x=x"])),
        (&[], "tree/", "/dir/", Ok(&["dir/tree/", "dir/tree/sub/", "dir/tree/sub/x=x"])),
        (&[], "tree", "/name", Ok(&["name/", "name/sub/", "name/sub/x=x"])),
        (&[], "tree", "/name/", Ok(&["name/", "name/sub/", "name/sub/x=x"])),
        (&[], "tree/.", "/name", Ok(&["name/", "name/sub/", "name/sub/x=x"])),
        (&[], "tree/.", "/dir", Ok(&["dir/sub/", "dir/sub/x=x"])),
        (&[], "tree/sub/..", "/name", Ok(&["name/", "name/sub/", "name/sub/x=x"])),
        (&[], "tree", "/old", Err("a directory cannot be copied over a file")),
        (&[], "tree/.", "/old", Err("a directory cannot be copied over a file")),
        (&[], "tree", "/no/name", Err("open the directory")),
        (&[], "link", "", Ok(&["link -> file"])),
        (&[], "link", "/old", Ok(&["old -> file"])),
        (&["-L"], "link", "", Ok(&["link=new"])),
        (&[], "tree-link", "/name", Ok(&["name -> tree"])),
        (&[], "tree-link/", "/name", Ok(&["name/", "name/sub/", "name/sub/x=x"])),
        (&["-L"], "tree-link", "/name", Ok(&["name/", "name/sub/", "name/sub/x=x"])),
        (&["--exclude", "sub/"], "tree", "", Ok(&["tree/"])),
        (&[], "missing", "", Err("missing")),
    ];
    for (from, to) in [("here", "vm"), ("vm", "here")] {
        for (words, src, dst, expected) in cases {
            set_up(&pair.at(from), &pair.at(to));
            let before = listing(&pair.at(to));
            let (src, dst) = (format!("{from}/{src}"), format!("{to}{dst}"));
            let output = pair.cp(words, &src, &dst);
            let said = text(&output.stderr);
            match expected {
                Ok(lines) => {
                    assert_eq!(code(&output), Some(0), "{words:?} {src} {dst}: {said}");
                    let name = |line: &str| line.split(['=', ' ']).next().unwrap_or_default().to_owned();
                    let replaced: Vec<String> = lines.iter().map(|line| name(line)).collect();
                    let mut wanted: Vec<String> =
                        before.into_iter().filter(|line| !replaced.contains(&name(line))).collect();
                    wanted.extend(lines.iter().map(|line| (*line).to_owned()));
                    wanted.sort();
                    assert_eq!(listing(&pair.at(to)), wanted, "{words:?} {src} {dst}");
                }
                Err(words) => {
                    assert_eq!(code(&output), Some(1), "{src} {dst}: {said}");
                    let side = if said.contains("inside web-1: ") { "vm" } else { "here" };
                    // The error must name the side that has the path.
                    let at_fault = if said.contains(&format!("/{from}/")) { from } else { to };
                    assert!(said.contains(words) && side == at_fault, "{src} {dst}: {said}");
                    assert_eq!(listing(&pair.at(to)), before, "{src} {dst}");
                }
            }
        }
    }
    pair.world.assert_in_order();
}

#[test]
fn what_cannot_be_copied_is_a_mistake_of_the_command_line() {
    let world = World::new();
    for (words, said) in [
        (&["a", "b"][..], "either SRC or DST must be in a VM"),
        (&["web-1:/a", "web-2:/b"], "nexusctl cp web-1:/a - | nexusctl cp - web-2:/b"),
        (&["web-1:etc/x", "b"], "web-1:/etc/x"),
        (&["a", "Web_1:/b"], "./PATH"),
        (&["-", "-"], "either SRC or DST"),
        (&["-a", "-u", "web", "a", "web-1:/b"], "--archive and --user cannot be used together"),
        (&["--exclude", "{a", "a", "web-1:/b"], "{a"),
        (&["--json", "web-1:/a", "-"], "omit --json"),
        (&["-", "web-1:/a"], "standard input is empty"),
        (&["a"], "Usage"),
    ] {
        let output = run(&world, &[&["cp"], words].concat(), b"");
        assert_eq!(code(&output), Some(2), "{words:?}: {}", text(&output.stderr));
        assert!(text(&output.stderr).contains(said), "{words:?}: {}", text(&output.stderr));
    }
    let output = run(&world, &["cp", "-", "web-1:/a"], b"\x1f\x8b\x08\0");
    assert!(text(&output.stderr).contains("gzip -dc FILE |"), "{}", text(&output.stderr));
}

/// The facts of a tree: for each path its type, mode, times, content or link, and hard links.
fn facts(root: &Path) -> BTreeMap<Vec<u8>, String> {
    fn add(root: &Path, path: &Path, all: &mut BTreeMap<Vec<u8>, String>) {
        let meta = fs::symlink_metadata(path).expect("its facts");
        let mut said = format!("{:o} {}.{:09}", meta.mode(), meta.mtime(), meta.mtime_nsec());
        if meta.is_symlink() {
            said += &format!(" -> {:?}", fs::read_link(path).expect("its target"));
        } else if meta.is_file() {
            let content = fs::read(path).expect("its content");
            let sum =
                content.iter().fold(7_u64, |sum, byte| sum.wrapping_mul(31).wrapping_add(u64::from(*byte)));
            said += &format!(" x{} {} bytes {sum}", meta.nlink(), content.len());
        }
        all.insert(path.strip_prefix(root).expect("it is below").as_os_str().as_bytes().to_vec(), said);
        if meta.is_dir() {
            fs::read_dir(path)
                .expect("a directory")
                .for_each(|entry| add(root, &entry.expect("an entry").path(), all));
        }
    }
    let mut all = BTreeMap::new();
    add(root, root, &mut all);
    all
}

/// A tree with one of everything.
fn make_tree(root: &Path) {
    fs::create_dir_all(root.join("empty")).expect("a directory");
    fs::create_dir_all(root.join("closed")).expect("a directory");
    fs::write(root.join("closed/text"), "hello\n").expect("a file");
    fs::write(root.join("nothing"), "").expect("a file");
    fs::hard_link(root.join("closed/text"), root.join("other-name")).expect("a link");
    symlink("closed/text", root.join("link")).expect("a link");
    symlink("/no/such/place", root.join("dangling")).expect("a link");
    let every: Vec<u8> = (1..=255).filter(|byte| *byte != b'/').collect();
    every.chunks(100).for_each(|name| fs::write(root.join(OsStr::from_bytes(name)), name).expect("a file"));
    let holes = File::create(root.join("holes")).expect("a file");
    (0..40).for_each(|at| holes.write_all_at(b"data", at * 1_000_000 + 500_000).expect("it is written"));
    holes.set_len(50_000_000).expect("its length");
    for (name, mode) in [("nothing", 0o4711), ("other-name", 0o640), ("empty", 0o1777), ("closed", 0o550)] {
        fs::set_permissions(root.join(name), PermissionsExt::from_mode(mode)).expect("a mode");
    }
    for (name, time) in [
        ("nothing", Duration::new(1_600_000_000, 123_456_789)),
        ("closed", Duration::new(1, 1)),
        ("", Duration::ZERO),
    ] {
        let times = FileTimes::new().set_modified(SystemTime::UNIX_EPOCH + time);
        File::open(root.join(name)).expect("it is there").set_times(times).expect("a time");
    }
}

#[test]
fn a_tree_comes_over_as_it_is_both_ways() {
    let pair = Pair::new();
    make_tree(&pair.at("here/tree"));
    let said = pair.must(&[], "here/tree", "vm/copy");
    assert!(
        said.starts_with("Copied 9 files, ") && said.ends_with(&format!(" to {}\n", pair.word("vm/copy"))),
        "{said}"
    );
    let expected = facts(&pair.at("here/tree"));
    assert_eq!(facts(&pair.at("vm/copy")), expected);
    let said = pair.must(&["--json"], "vm/copy/.", "here/back");
    assert_eq!(said, "");
    // Setuid bits from a guest are dropped, unless requested.
    let mut plain = expected.clone();
    let nothing = plain.get_mut(&b"nothing"[..]).expect("a file");
    *nothing = nothing.replace("104711", "100711");
    assert_eq!(facts(&pair.at("here/back")), plain);
    pair.must(&["-a"], "vm/copy", "here/all");
    assert_eq!(facts(&pair.at("here/all")), expected);
    for copy in ["vm/copy", "here/back", "here/all"] {
        let holes = fs::metadata(pair.at(copy).join("holes")).expect("its facts");
        assert!(holes.blocks() * 512 < 2_000_000, "{} blocks", holes.blocks());
    }
    // Over existing files, and quietly. Existing directories keep their times.
    assert_eq!(pair.must(&["-q"], "here/tree/.", "vm/copy"), "");
    let files = |mut facts: BTreeMap<Vec<u8>, String>| {
        facts.retain(|_, said| !said.starts_with('4'));
        facts
    };
    assert_eq!(files(facts(&pair.at("vm/copy"))), files(expected));
    pair.world.assert_in_order();
}

#[test]
fn owners_are_those_of_the_side_that_gets_the_files() {
    let pair = Pair::new();
    let owner = |path: &str| {
        let meta = fs::metadata(pair.at(path)).expect("its facts");
        (meta.uid(), meta.gid())
    };
    fs::create_dir(pair.at("here/tree")).expect("a directory");
    fs::write(pair.at("here/tree/file"), "x").expect("a file");
    chown(pair.at("here/tree/file"), Some(1234), Some(2345)).expect("another owner");
    // Not the owner of the target directory.
    chown(pair.at("vm"), Some(54321), Some(54321)).expect("another owner");
    fs::set_permissions(pair.root.path(), PermissionsExt::from_mode(0o755)).expect("a mode");
    pair.must(&[], "here/tree", "vm/default");
    assert_eq!(owner("vm/default/file"), (0, 0));
    pair.must(&["-u", "54321:7"], "here/tree", "vm/theirs");
    assert_eq!(owner("vm/theirs/file"), (54321, 7));
    pair.must(&["-a"], "here/tree", "vm/same");
    assert_eq!(owner("vm/same/file"), (1234, 2345));
    pair.must(&[], "vm/same", "here/mine");
    assert_eq!(owner("here/mine/file"), (0, 0));
    pair.must(&["-a"], "vm/same", "here/same");
    assert_eq!(owner("here/same/file"), (1234, 2345));
    // With the rights of that user.
    chown(pair.at("vm"), Some(0), Some(0)).expect("another owner");
    let said = pair.fails(&["-u", "54321"], "here/tree", "vm/no");
    assert!(
        said.contains("inside web-1: ") && said.contains("ermission denied") && said.contains("--user root"),
        "{said}"
    );
    fs::set_permissions(pair.at("vm/same/file"), PermissionsExt::from_mode(0o600)).expect("a mode");
    let said = pair.fails(&["-u", "54321"], "vm/same/file", "here/secret");
    assert!(said.contains("inside web-1: read") && said.contains("ermission denied"), "{said}");
    // In a tree, the rest is copied anyway.
    fs::write(pair.at("vm/same/open"), "x").expect("a file");
    let said = pair.fails(&["-u", "54321"], "vm/same", "here/part");
    assert!(said.contains("warning: file: skipped: cannot be read\nCopied 1 file"), "{said}");
}

#[test]
fn tar_streams_go_in_and_out() {
    let pair = Pair::new();
    make_tree(&pair.at("here/tree"));
    pair.must(&[], "here/tree", "vm/tree");
    let output = pair.cp(&[], "vm/tree", "-");
    assert_eq!((code(&output), text(&output.stderr)), (Some(0), String::new()));
    let listed = {
        let mut tar = Command::new("tar")
            .args(["-t", "--quoting-style=escape"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("tar runs");
        tar.stdin.take().expect("its input").write_all(&output.stdout).expect("it reads");
        text(&tar.wait_with_output().expect("tar ends").stdout)
    };
    assert!(listed.starts_with("tree/\n") && listed.contains("\ntree/holes\n"), "{listed}");
    let made = Command::new("tar")
        .args(["-c", "-C"])
        .arg(pair.at("here"))
        .args(["tree/nothing", "tree/link"])
        .output();
    let made = made.expect("tar runs").stdout;
    fs::create_dir(pair.at("vm/into")).expect("a directory");
    let output = run(&pair.world, &["cp", "-", &pair.word("vm/into")], &made);
    assert_eq!(text(&output.stderr), format!("Copied 2 files, 0 B to {}\n", pair.word("vm/into")));
    assert_eq!(listing(&pair.at("vm/into")), ["tree/", "tree/link -> closed/text", "tree/nothing="]);
    for (to, input, said) in [
        ("vm/no", &made[..], "No such file or directory"),
        ("vm/tree/nothing", &made, "Not a directory"),
        ("vm/into", &made[..700], "it ends within"),
        ("vm/into", b"no tar at all", "ends within a header"),
    ] {
        let output = run(&pair.world, &["cp", "-", &pair.word(to)], input);
        let told = text(&output.stderr);
        assert_eq!(code(&output), Some(1), "{told}");
        assert!(told.contains("inside web-1: ") && told.contains(said), "{told}");
    }
    // From one machine to another.
    pair.world.create(&mut pair.world.client(), "web-2");
    fs::create_dir(pair.at("vm/two")).expect("a directory");
    let mut out =
        nexusctl(&pair.world, &["cp", &pair.word("vm/tree/."), "-"]).spawn().expect("nexusctl runs");
    let to = format!("web-2:{}", pair.at("vm/two").display());
    let mut into = nexusctl(&pair.world, &["cp", "-", &to]);
    let into = into.stdin(out.stdout.take().expect("its output")).output().expect("nexusctl runs");
    assert_eq!((ended(&mut out).code(), code(&into)), (Some(0), Some(0)), "{}", text(&into.stderr));
    assert_eq!(facts(&pair.at("vm/two/tree")), facts(&pair.at("vm/tree")));
    // If the reader of its output goes away, it ends silently.
    let mut out = nexusctl(&pair.world, &["cp", &pair.word("vm/tree"), "-"]).spawn().expect("nexusctl runs");
    drop(out.stdout.take());
    assert_eq!(ended(&mut out).code(), Some(141));
    pair.world.assert_in_order();
}

#[test]
fn progress_is_shown_on_a_terminal_and_gone_in_the_end() {
    let pair = Pair::new();
    fs::write(pair.at("here/big"), vec![7; 3_000_000]).expect("a file");
    let made = Command::new("tar")
        .args(["-c", "-C"])
        .arg(pair.at("here"))
        .arg("big")
        .output()
        .expect("tar runs")
        .stdout;
    let pipe = pair.at("here/pipe");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &pipe,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o600),
        0,
    )
    .expect("a pipe");
    let terminal = Terminal::open(&pair.world, (100, 30));
    // The test controls when data comes through the pipe.
    terminal.line(&format!("clear; $NEXUSCTL cp - {} < {}", pair.word("vm"), pipe.display()));
    let mut writer = File::options().write(true).open(&pipe).expect("somebody reads");
    writer.write_all(&made[..2_000_000]).expect("it is read");
    terminal.wait_for("copying to web-1  1.9 MiB");
    writer.write_all(&made[2_000_000..]).expect("it is read");
    drop(writer);
    terminal.wait_for("Copied 1 file, 2.9 MiB to ");
    terminal.wait_until_back();
    assert!(!terminal.screen(false).contains("copying to"), "{}", terminal.screen(false));
    // A tree, in both directions.
    for (src, dst) in [("here/big", "vm/copy"), ("vm/copy", "here/back")] {
        terminal.line(&format!("clear; $NEXUSCTL cp {} {}", pair.word(src), pair.word(dst)));
        terminal.wait_for("Copied 1 file, 2.9 MiB to ");
        terminal.wait_until_back();
        let screen = terminal.screen(false);
        assert!(!screen.contains("copying"), "{screen}");
    }
}
