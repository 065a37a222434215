//! A machine that is prepared, and travels: an image of it while it writes, saved, and made again from the archive.

use nexus_tests::client::BOOT;
use nexus_tests::daemon::Daemon;
use serde_json::json;

#[test]
fn a_machine_that_writes_becomes_an_image_that_boots_after_its_travel() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let boot = client.create(json!({
        "name": "web", "from": "busybox", "driver": "qemu", "memory": "256MiB", "env": { "TOKEN": "secret" }, "wait_s": 45
    }))["boot_id"]
        .clone();
    // What is not synced is in the image; and a command writes pairs of files all the while, the second only after the first.
    client.run(
        "web",
        "mkdir -p /srv/pairs /etc/ssh; echo kept > /srv/data; echo key > /etc/ssh/ssh_host_rsa_key",
    );
    client.run("web", "echo aaaabbbbccccddddeeeeffff00001111 > /etc/machine-id; echo left > /tmp/scratch");
    client.must(
        "guest_command_start",
        json!({ "vm": "web", "command":
        "i=0; while true; do i=$((i+1)); echo $i > /srv/pairs/$i.a; echo $i > /srv/pairs/$i.b; done" }),
    );
    client.run("web", "until [ -s /srv/pairs/20.b ]; do sleep 0.1; done");
    let image = client.to_the_end("image_create", json!({ "from": "vm:web", "name": "prepared" }), BOOT);
    assert_eq!((&image["source"], &image["init"]), (&json!("vm:web"), &json!("agent")), "{image}");
    assert!(!image.to_string().contains("secret"), "{image}");
    // The machine goes on: neither it nor its command was ended.
    let count = "ls /srv/pairs | wc -l; ls -t /srv/pairs | head -n 1";
    let before = client.run("web", count).stdout;
    client.run("web", &format!("until [ \"$({count})\" != \"{}\" ]; do sleep 0.1; done", before.trim_end()));
    assert_eq!(client.inspect("web")["boot_id"], boot);
    client.must_confirmed("vm_delete", json!({ "vm": "web", "force": true }));

    let saved = client.to_the_end("image_save", json!({ "image": "prepared", "to": "prepared.tar" }), BOOT);
    let from = format!("oci-archive:{}", saved["path"].as_str().expect("a path"));
    client.to_the_end("image_create", json!({ "from": from, "name": "travelled" }), BOOT);
    client.create(json!({
        "name": "again", "from": "image:travelled", "driver": "qemu", "memory": "256MiB", "wait_s": 45
    }));
    assert_eq!(client.run("again", "cat /srv/data").stdout, "kept\n");
    assert_eq!(
        client.run("again", "cat /tmp/scratch /etc/ssh/ssh_host_rsa_key 2> /dev/null; true").stdout,
        ""
    );
    assert_eq!(client.run("again", "grep -c aaaabbbb /etc/machine-id; echo \"-$TOKEN-\"").stdout, "0\n--\n");
    // Of one moment: no pair lacks its first half, and at most the newest its second.
    let odd = client.run(
        "again",
        "cd /srv/pairs; for f in *.b; do [ -e ${f%b}a ] || echo $f; done; for f in *.a; do [ -e ${f%a}b ] || echo late; done",
    );
    let lines: Vec<&str> = odd.stdout.lines().collect();
    assert!(lines.is_empty() || lines == ["late"], "{lines:?}");
}
