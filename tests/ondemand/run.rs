//! Commands in VMs that have to succeed.

use std::time::Duration;

use nexus_tests::client::{Client, stream};
use serde_json::json;

/// How long one command may take under software emulation.
const COMMAND: Duration = Duration::from_mins(10);

/// Runs a shell line in a VM, which has to succeed; what it says.
#[track_caller]
pub(crate) fn must(client: &mut Client, vm: &str, command: &str) -> String {
    let arguments = json!({ "vm": vm, "command": command, "timeout_s": COMMAND.as_secs() });
    let result = client.run_to_the_end(arguments);
    let result = result.unwrap_or_else(|e| panic!("{command}: {}", e.text));
    let facts = &result["_meta"]["dev.nexus/result"];
    let said = stream(&result, "stdout");
    assert_eq!(facts["exit_code"], 0, "{command}: {facts} {said} {}", stream(&result, "stderr"));
    said
}
