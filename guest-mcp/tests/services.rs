//! Services: what a guest starts by itself, starts again, and tells of.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::net::TcpListener;
use std::path::Path;

use common::{Guest, until};
use serde_json::{Value, json};

/// A guest with services; `{}` in their text is its directory.
fn guest(services: &[(&str, Value)]) -> Guest {
    Guest::start_configured(|directory, _| {
        let place = directory.join("services.d");
        std::fs::create_dir(&place).unwrap();
        for (name, service) in services {
            let text = service.to_string().replace("{}", directory.to_str().unwrap());
            std::fs::write(place.join(format!("{name}.json")), text).unwrap();
        }
    })
}

/// The commands that are runs of a service, the newest first.
fn runs(client: &mut common::Client, service: &str) -> Vec<Value> {
    let result = client.good("command_list", json!({}));
    let commands = result["_meta"]["dev.nexus/result"]["commands"].as_array().unwrap().clone();
    commands.into_iter().filter(|command| command["service"] == service).collect()
}

fn lines(path: &Path) -> usize {
    std::fs::read_to_string(path).unwrap_or_default().lines().count()
}

#[test]
fn services_run_when_the_guest_is_ready_and_come_back() {
    assert!(rustix::process::geteuid().is_root(), "this test needs root");
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let guest = guest(&[
        (
            "web",
            json!({
                "command": format!("echo up as $WHO; python3 -u -m http.server --bind 127.0.0.1 {port}"),
                "env": { "WHO": "me" }, "cwd": "{}", "ready": { "port": port },
            }),
        ),
        ("worker", json!({ "command": "echo once >> {}/worker; exit 3", "restart": "on_failure" })),
        ("job", json!({ "argv": ["sh", "-c", "echo once >> {}/job"] })),
        (
            "slow",
            json!({ "command": "until [ -e {}/slow ]; do sleep 0.01; done; sleep 1000",
            "ready": { "command": "touch {}/slow" } }),
        ),
        ("whose", json!({ "command": "id -u; id -g; sleep 1000", "user": "54321:54322", "cwd": "/" })),
        ("broken", json!({ "argv": ["/nowhere"], "restart": "no" })),
        ("deaf", json!({ "command": "sleep 1000", "ready": { "port": 1, "timeout_s": 1 } })),
        ("typo", json!({ "comand": "x" })),
    ]);
    // Ready means that they are, and what is not is told.
    let problems = &guest.said.ack.problems;
    let about =
        ["service broken: ", "service deaf: nothing is listening on its port 1 after 1 s", "service typo: "];
    assert_eq!(problems.len(), about.len(), "{problems:?}");
    for about in about {
        assert!(problems.iter().any(|problem| problem.starts_with(about)), "{about} in {problems:?}");
    }
    std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
    let mut client = guest.client();
    let web = runs(&mut client, "web");
    assert_eq!((web.len(), &web[0]["state"]), (1, &json!("running")), "{web:?}");
    let output = client.good("command_output", json!({ "id": web[0]["command_id"] }));
    assert!(output.to_string().contains("up as me"), "{output}");
    let whose = runs(&mut client, "whose")[0]["command_id"].clone();
    until("it runs as its user", || {
        let output = client.good("command_output", json!({ "id": whose }));
        common::stream(&output, "stdout") == "54321\n54322\n"
    });
    // What checked whether it is ready is not in the list.
    assert_eq!(runs(&mut client, "slow").len(), 1);

    // One that fails comes back, one that is done does not.
    until("the worker came back", || lines(&guest.directory.path().join("worker")) >= 3);
    assert_eq!(lines(&guest.directory.path().join("job")), 1);

    // One that is killed from within comes back; one that is told to end stays down.
    kill(web[0]["pid"].as_u64().unwrap());
    until("the server came back", || runs(&mut client, "web").len() == 2);
    until("it listens", || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok());
    let again = runs(&mut client, "web")[0].clone();
    assert_ne!(again["command_id"], web[0]["command_id"]);
    client.good("command_signal", json!({ "id": again["command_id"], "signal": "KILL" }));
    until("it ended", || runs(&mut client, "web").iter().all(|run| run["state"] == "ended"));
    let (worker, before) =
        (guest.directory.path().join("worker"), lines(&guest.directory.path().join("worker")));
    until("the worker came back once more", || lines(&worker) > before);
    assert_eq!(runs(&mut client, "web").len(), 2, "it was told to end");
}

fn kill(pid: u64) {
    let status = std::process::Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap();
    assert!(status.success());
}

#[test]
fn an_agent_that_is_started_again_finds_the_services_of_the_one_before() {
    let mut guest = guest(&[("one", json!({ "command": "echo up >> {}/ups; sleep 1000" }))]);
    let ups = guest.directory.path().join("ups");
    until("it runs", || lines(&ups) == 1);
    guest.process.kill().unwrap();
    guest.process.wait().unwrap();
    guest.process = common::spawn(guest.directory.path(), &[]);
    guest.host.welcome(common::configure());
    let mut client = guest.client();
    let found = runs(&mut client, "one");
    assert_eq!((found.len(), &found[0]["state"]), (1, &json!("running")), "{found:?}");
    assert_eq!(lines(&ups), 1);
}
