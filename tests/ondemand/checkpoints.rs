//! A hundred checkpoints of a busy machine, a thousand pauses, and ten children of programs that were drawing random numbers. Run by
//! `make e2e-checkpoints`, since it makes an image with Python and OpenSSH first.

use std::fs;
use std::time::Duration;

use nexus_tests::daemon::Daemon;
use nexus_tests::saved::{children_share_nothing, create_from, stays_whole};
use serde_json::json;

use crate::docker::bootstrap;

const CHECKPOINTS: u64 = 100;
/// What the image has beside the essential packages.
const PACKAGES: &str = "python3,openssh-client";
const CHILDREN: usize = 10;

#[test]
fn a_hundred_checkpoints_and_a_thousand_pauses_lose_nothing() {
    let bytes = stays_whole(CHECKPOINTS);
    println!("{CHECKPOINTS} checkpoints beside {bytes} bytes of bulk, then {} pauses", 10 * CHECKPOINTS);
    assert!(bytes > 10_000_000, "{bytes}");
}

/// One process that draws all the time, and programs that begin in each of the children anew.
const DRAW: &str = r#"cat > /srv/draw.py <<'END'
import secrets, time, uuid
while True:
    with open("/srv/drawn", "a") as drawn:
        drawn.write(secrets.token_hex(16) + "\n" + str(uuid.uuid4()) + "\n")
    time.sleep(0.2)
END
python3 /srv/draw.py &
while true; do
    rm -f /tmp/key /tmp/key.pub
    ssh-keygen -q -t ed25519 -N '' -f /tmp/key && cut -d' ' -f2 /tmp/key.pub >> /srv/drawn
    python3 -c 'import secrets; print(secrets.token_hex(16))' >> /srv/drawn
done"#;

#[test]
fn ten_children_of_python_and_ssh_keygen_share_nothing() {
    let daemon = Daemon::start();
    let rootfs = daemon.state().join("python.tar");
    bootstrap(PACKAGES, &rootfs);
    let mut client = daemon.client();
    let image = json!({ "from": format!("file:{}", rootfs.display()), "name": "python" });
    client.to_the_end("image_create", image, Duration::from_mins(10));
    fs::remove_file(&rootfs).expect("the archive is of no more use");
    create_from(&mut client, "base", "python");
    children_share_nothing(&daemon, "base", DRAW, CHILDREN);
}
