//! Images that leave the host: saved to any file of the caller's, and pushed.

use serde_json::{Value, json};

use crate::fake::{Caller, Fake, Tool, World, fails, gives, structured};

fn ended(result: &Value) -> Value {
    json!({ "done": true, "op_id": "ccccccccccccc", "state": "succeeded", "progress": { "step": "done" }, "result": result })
}

#[test]
fn an_image_is_saved_to_any_file_and_to_standard_output() {
    let world = World::new();
    let own = world.root.path().join("own.tar");
    let archive = own.clone();
    let save: Tool = Box::new(move |arguments: &Value, caller: &Caller| {
        if arguments["to"].as_str().unwrap().starts_with('/') {
            return fails("forbidden", "it is not in an allowed directory", "use another")(arguments, caller);
        }
        std::fs::write(&archive, "archive").unwrap();
        Some(structured(&ended(&json!({ "path": archive, "bytes": 7, "digest": "sha256:00" }))))
    });
    let fake = Fake::start(&world.runtime(), [("image_save", save)]);
    let run = world.run("image save web -o -");
    assert_eq!((run.code, run.text()), (0, "archive"), "{run:?}");
    assert!(!own.exists(), "what was copied is removed");
    let to = world.root.path().join("web.tar");
    let line = format!("image save web -o {}", to.display());
    let run = world.run(&line);
    assert_eq!((run.code, run.text()), (0, "sha256:00\n"), "{run:?}");
    assert_eq!(std::fs::read(&to).unwrap(), b"archive");
    assert!(!own.exists());
    let asked: Vec<Value> = fake.calls("image_save").iter().map(|call| call["to"].clone()).collect();
    assert_eq!(asked.len(), 3, "{asked:?}");
    assert_eq!(asked[1], json!(to), "first the file itself");
    // Nothing is replaced.
    std::fs::write(&to, "mine").unwrap();
    assert_eq!(world.run(&line).code, 2);
    assert_eq!(std::fs::read(&to).unwrap(), b"mine");
}

#[test]
fn an_image_is_pushed_and_its_reference_is_said() {
    let world = World::new();
    let reference = "127.0.0.1:5000/web:1@sha256:00";
    let pushed =
        json!({ "reference": reference, "digest": "sha256:00", "sent_bytes": 2048, "notes": ["1 socket"] });
    let fake = Fake::start(&world.runtime(), [("image_push", gives(ended(&pushed)))]);
    let run = world.run("image push web 127.0.0.1:5000/web:1");
    assert_eq!((run.code, run.text()), (0, format!("{reference}\n").as_str()), "{run:?}");
    assert!(run.stderr.contains("2 KiB") && run.stderr.contains("1 socket"), "{run:?}");
    assert_eq!(
        fake.calls("image_push"),
        [json!({ "image": "web", "to": "127.0.0.1:5000/web:1", "wait_s": 0 })]
    );
}

#[test]
fn an_image_of_a_vm_is_named_before_its_source() {
    let world = World::new();
    let fake = Fake::start(&world.runtime(), [("image_create", fails("busy", "not now", "later"))]);
    for line in ["image create web --from vm:web-1", "image create vm:web-1 --name web"] {
        world.run(line);
        let call = fake.calls("image_create").pop().unwrap();
        assert_eq!((&call["name"], &call["from"]), (&json!("web"), &json!("vm:web-1")), "{line}");
    }
    assert_eq!(world.run("image create web --from vm:web-1 --name other").code, 2);
    assert_eq!(fake.calls("image_create").len(), 2);
}
