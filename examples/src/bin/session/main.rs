//! An agent that works on a repository: it copies 200 files into a virtual machine, runs their tests in the background, fixes
//! what fails, and returns the change as a patch that git applies. `session NEXUSD DIRECTORY [IMAGE]` runs it and prints the
//! conversation. What an agent would decide itself is fixed in this program.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "this program's output is its purpose")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use nexus_examples::show::{self, Timings};
use nexus_examples::{Client, ClientError};
use serde_json::{Value, json};

const VM: &str = "session";
/// Where the repository is in the virtual machine.
const PLACE: &str = "/srv/repo";
/// How many programs the repository has; all but one have a test.
const PROGRAMS: u32 = 100;
/// The program with the bug.
const WRONG: u32 = 42;
/// Runs all tests and prints which fail.
const RUNNER: &str = "\
failed=0
for t in tests/*.sh; do
  if sh $t; then echo \"ok   $t\"; else echo \"FAIL $t\"; failed=$((failed + 1)); fi
done
echo \"$failed failed\"
exit $failed
";
/// The timeout for the first virtual machine of a host.
const FIRST_VM: Duration = Duration::from_mins(20);
/// How long the agent thinks between two calls.
const THOUGHT: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    let (Some(nexusd), Some(directory)) = (arguments.next(), arguments.next()) else {
        eprintln!("usage: session NEXUSD DIRECTORY [IMAGE]");
        return ExitCode::from(2);
    };
    let image = arguments.next().map_or_else(|| "debian".to_owned(), |i| i.to_string_lossy().into_owned());
    match run(&PathBuf::from(nexusd), &PathBuf::from(directory), &image) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("\nsession: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(nexusd: &Path, directory: &Path, image: &str) -> Result<(), ClientError> {
    let mut timings = Timings::default();
    let mut client = Client::start(nexusd, directory)?;
    client.greet("nexus-session")?;

    show::step("a virtual machine, and the repository in it");
    let host = client.call("system_info", json!({}))?;
    let scratch = host["structuredContent"]["copy"]["scratch"].as_str().unwrap_or_default();
    let repository = Path::new(scratch).join("session");
    make_repository(&repository).map_err(|source| ClientError::Io {
        what: format!("make the repository {}", repository.display()),
        source,
    })?;
    let started = Instant::now();
    client.call_to_the_end("vm_create", json!({ "name": VM, "from": image }), FIRST_VM)?;
    timings.note("vm_create", started.elapsed());
    let started = Instant::now();
    client.call_to_the_end(
        "guest_copy_in",
        json!({ "vm": VM, "from": "session", "to": PLACE }),
        Duration::from_mins(5),
    )?;
    timings.note("guest_copy_in, 200 files", started.elapsed());

    show::step("run its tests in the background, and look at them now and then");
    let started = Instant::now();
    let tests = json!({ "vm": VM, "command": "sh run-tests.sh", "cwd": PLACE });
    let begun = client.call("guest_command_start", tests)?;
    let id = begun["_meta"]["dev.nexus/result"]["command_id"].clone();
    let mut look = json!({ "vm": VM, "id": id, "wait_ms": 10_000 });
    let mut output = String::new();
    think();
    let failed = loop {
        let seen = client.call("guest_command_output", look.clone())?;
        texts(&seen).for_each(|text| output.push_str(text));
        let facts = &seen["_meta"]["dev.nexus/result"];
        if facts["state"] == "ended" {
            break facts["exit_code"].clone();
        }
        // Everything is fine so far: the next call can wait for the end.
        look = json!({ "vm": VM, "id": id, "cursor": facts["cursor"], "wait_ms": 45_000, "until_end": true });
    };
    timings.note("the tests", started.elapsed());
    let expected = format!("FAIL tests/{WRONG:03}.sh");
    if failed != 1 || !output.contains(&expected) {
        return Err(ClientError::Unexpected { wanted: expected, got: output });
    }

    show::step("find out why, mend it, and run that test again");
    let pattern = format!("{WRONG}");
    client.call("guest_file_search", json!({ "vm": VM, "path": PLACE, "pattern": pattern, "context": 1 }))?;
    let path = format!("{PLACE}/src/{WRONG:03}.sh");
    let edit = json!({ "path": path, "old": format!("echo {}", WRONG + 1), "new": format!("echo {WRONG}") });
    client.call("guest_file_edit", json!({ "vm": VM, "edits": [edit] }))?;
    client.call(
        "guest_run_command",
        json!({ "vm": VM, "command": format!("sh tests/{WRONG:03}.sh && echo ok"), "cwd": PLACE }),
    )?;

    show::step("hand the change over as a patch, and let the virtual machine go");
    let exported = client.call("guest_export", json!({ "vm": VM, "path": PLACE }))?;
    client.call("vm_delete", json!({ "vm": VM, "force": true }))?;
    let counts = client.counts();
    client.finish()?;

    let patch = texts(&exported).find(|text| text.contains("--- a/")).unwrap_or_default();
    apply(&repository, patch)?;
    let mended = fs::read_to_string(repository.join(format!("src/{WRONG:03}.sh"))).unwrap_or_default();
    if mended != format!("echo {WRONG}\n") {
        return Err(ClientError::Unexpected { wanted: format!("echo {WRONG}"), got: mended });
    }
    // Contains only what this program made.
    let _ = fs::remove_dir_all(&repository);

    timings.print();
    println!(
        "\n{} calls, {} bytes of arguments, {} bytes of results; git applied the patch.",
        counts.calls, counts.sent, counts.shown
    );
    Ok(())
}

/// Simulates a model that thinks between two calls.
#[expect(clippy::disallowed_methods, reason = "nothing is waited for")]
fn think() {
    std::thread::sleep(THOUGHT);
}

/// The texts of a result.
fn texts(result: &Value) -> impl Iterator<Item = &str> {
    result["content"].as_array().into_iter().flatten().filter_map(|block| block["text"].as_str())
}

/// Makes a repository of small programs, each with a test except the last; one of them has a bug.
fn make_repository(place: &Path) -> std::io::Result<()> {
    for directory in ["src", "tests"] {
        fs::create_dir_all(place.join(directory))?;
    }
    fs::write(place.join("run-tests.sh"), RUNNER)?;
    for number in 1..=PROGRAMS {
        let said = if number == WRONG { number + 1 } else { number };
        fs::write(place.join(format!("src/{number:03}.sh")), format!("echo {said}\n"))?;
        if number < PROGRAMS {
            let test = format!("[ \"$(sh src/{number:03}.sh)\" = {number} ]\n");
            fs::write(place.join(format!("tests/{number:03}.sh")), test)?;
        }
    }
    Ok(())
}

/// Lets git apply a patch on the host.
fn apply(repository: &Path, patch: &str) -> Result<(), ClientError> {
    let failed = |what: &str| {
        let what = what.to_owned();
        move |source| ClientError::Io { what, source }
    };
    let file = repository.join("change.patch");
    fs::write(&file, patch).map_err(failed("write the patch"))?;
    let mut git = Command::new("git");
    // The directory is not in a git repository, and must not be treated as part of one above it.
    git.arg("apply").arg(&file).current_dir(repository).env("GIT_DIR", "/dev/null");
    let done = git.output().map_err(failed("run git"))?;
    if !done.status.success() {
        let got = String::from_utf8_lossy(&done.stderr).into_owned();
        return Err(ClientError::Unexpected { wanted: "a patch that git applies".to_owned(), got });
    }
    Ok(())
}
