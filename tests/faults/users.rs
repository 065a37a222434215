//! Other users of the host on the daemon's Unix socket.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output};

use nexus_tests::daemon::program;
use serde_json::json;

use crate::streams::text;
use crate::world::{World, soon};

/// Users and a group that exist on no host; becoming them takes root.
const TEAM: u32 = 47_110;
const GONE: u32 = 47_111;
const NOBODY_KNOWN: u32 = 47_112;
const GROUP: u32 = 47_113;

fn let_pass(directory: &Path) {
    fs::set_permissions(directory, fs::Permissions::from_mode(0o711)).expect("its mode can be changed");
}

#[test]
fn users_of_the_sockets_group_have_the_rights_of_tokens() {
    let users = format!("{TEAM}=team, {GONE}=gone");
    let world = World::with(&[("NEXUS_SOCKET_GROUP", &GROUP.to_string()), ("NEXUS_SOCKET_USERS", &users)]);
    // The test's directories are private, and so may be that of the programs.
    let run = world
        .daemon
        .environment()
        .into_iter()
        .find(|(name, _)| *name == "NEXUS_RUNTIME_DIR")
        .expect("it is set")
        .1;
    let nexusctl = world.path("nexusctl");
    fs::copy(program("nexusctl"), &nexusctl).expect("the program is copied");
    for private in [Path::new(&run), &nexusctl] {
        let_pass(private.parent().expect("a directory"));
    }
    let act = |uid: u32, gid: u32, words: &[&str]| -> Output {
        let mut command = Command::new(&nexusctl);
        command.args(words).envs(world.daemon.environment()).env("HOME", "/nonexistent").current_dir("/");
        command.uid(uid).gid(gid).output().expect("root can act as another user")
    };
    let mut owner = world.client();
    world.create(&mut owner, "private");

    // No token yet, no rights at all, or not of the group.
    for (uid, words) in [(TEAM, "token create team"), (NOBODY_KNOWN, "socket_users")] {
        let refused = act(uid, GROUP, &["vm", "list"]);
        assert!(!refused.status.success());
        assert!(text(&refused.stderr).contains(words), "{}", text(&refused.stderr));
    }
    let outside = act(TEAM, TEAM, &["vm", "list"]);
    assert!(
        !outside.status.success() && text(&outside.stderr).contains("ermission denied"),
        "{}",
        text(&outside.stderr)
    );

    // A user has the token's rights without knowing the token.
    let scopes = json!(["read", "lifecycle", "exec"]);
    owner.must("token_create", json!({ "name": "team", "scopes": scopes }));
    let refused = act(TEAM, GROUP, &["vm", "create", "ours", "--from", &world.from]);
    assert!(text(&refused.stderr).contains("admin"), "files of the host: {}", text(&refused.stderr));
    let image = owner.inspect("private")["image"]["name"].as_str().expect("an image").to_owned();
    let made = act(TEAM, GROUP, &["vm", "create", "ours", "--from", &image]);
    assert!(made.status.success(), "{}", text(&made.stderr));
    let seen = text(&act(TEAM, GROUP, &["vm", "list"]).stdout);
    assert!(seen.contains("ours") && !seen.contains("private"), "{seen}");
    let ran = act(TEAM, GROUP, &["exec", "ours", "--", "echo", "hello"]);
    assert_eq!(text(&ran.stdout), "hello\n", "{}", text(&ran.stderr));
    let denied = act(TEAM, GROUP, &["vm", "delete", "private", "--force"]);
    assert!(text(&denied.stderr).contains("there is no VM private"), "{}", text(&denied.stderr));

    // The name of a token that a token's holder made counts for nothing.
    let held = act(TEAM, GROUP, &["token", "create", "gone"]);
    assert!(held.status.success(), "{}", text(&held.stderr));
    assert!(!act(GONE, GROUP, &["vm", "list"]).status.success());

    owner.must_confirmed("token_revoke", json!({ "token": "team" }));
    let ended = act(TEAM, GROUP, &["vm", "list"]);
    assert!(text(&ended.stderr).contains("revoked"), "{}", text(&ended.stderr));
    assert!(owner.inspect("ours")["state"] == "ready", "what it made stays");
}

#[test]
fn a_vmm_of_the_daemons_user_is_not_served() {
    let world = World::new();
    let list = |parent: &str| {
        let script = r#"printf "$1" >/proc/$$/comm; "$2" vm list; exit $?"#;
        let mut command = Command::new("sh");
        command.args(["-c", script, "sh", parent]).arg(program("nexusctl"));
        command.envs(world.daemon.environment()).output().expect("a shell starts")
    };
    let other = list("other");
    assert!(other.status.success(), "{}", text(&other.stderr));
    let refused = list("nexus-shim");
    assert!(!refused.status.success(), "{}", text(&refused.stdout));
    // The daemon closes the connection first.
    soon("the daemon logs it", || {
        world.daemon.log().contains("a process of a VMM connected to the daemon's socket").then_some(())
    });
}
