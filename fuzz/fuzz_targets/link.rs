//! What a hostile guest writes to the host: lines of any kind and length, envelopes, greetings.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nexus_schema::link::{GuestMessage, HostMessage};
use nexus_schema::stream::{Answer, Opening};
use nexus_wire::lines::{Line, LineReader};
use nexus_wire::rpc::Envelope;

/// The longest line that is taken here, in bytes.
const MAX: usize = 1 << 10;

fuzz_target!(|data: &[u8]| {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    runtime.block_on(async {
        let mut lines = LineReader::new(data, MAX, 16 << 10);
        loop {
            while let Some(line) = lines.take() {
                if let Line::Whole(line) = line {
                    assert!(line.len() <= MAX);
                    look_at(line);
                }
            }
            if !lines.fill().await.unwrap_or(false) {
                break;
            }
        }
    });
});

fn look_at(line: &[u8]) {
    if let Some(envelope) = Envelope::parse(line) {
        let _ = (envelope.id(), envelope.is_well_formed());
    }
    let _ = serde_json::from_slice::<GuestMessage>(line);
    let _ = serde_json::from_slice::<HostMessage>(line);
    let _ = serde_json::from_slice::<Opening>(line);
    let _ = serde_json::from_slice::<Answer>(line);
}
