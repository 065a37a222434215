//! From a template to a machine.

use std::time::Duration;

use nexus_tests::daemon::Daemon;
use serde_json::json;

#[test]
fn a_template_becomes_an_image_and_that_a_machine() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    client.must(
        "template_create",
        json!({ "name": "greeter", "source": "busybox", "size": "48MiB", "overlays": {
            "/etc/motd": { "content": "made by a template\n" },
            "/usr/local/bin/greet": { "content": "#!/bin/sh\necho hello from $(hostname)\n", "mode": "0755" },
        } }),
    );
    let build = client.to_the_end(
        "build_start",
        json!({ "template": "greeter", "wait_s": 0 }),
        Duration::from_mins(5),
    );
    assert_eq!((&build["status"], &build["cached"]), (&json!("success"), &json!(false)));

    client.create(json!({ "name": "made", "from": "template:greeter" }));
    let vm = client.inspect("made");
    assert_eq!(vm["image"]["id"], build["image"]["id"], "the image is the one that was built: {vm}");
    assert_eq!(
        client.run("made", "cat /etc/motd; /usr/local/bin/greet").stdout,
        "made by a template\nhello from made\n"
    );
    let said = client.run("made", "cat /etc/nexus/image.yaml").stdout;
    assert!(said.contains("name: greeter-"), "{said}");
}
