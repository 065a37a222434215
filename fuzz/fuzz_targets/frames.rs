//! A stream of frames whose other end is hostile.
#![no_main]

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use nexus_wire::frames::{Incoming, PAYLOAD_MAX, over, read_line};

fuzz_target!(|data: &[u8]| {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    runtime.block_on(async {
        let (mut reader, mut rest) = (data, BytesMut::new());
        let opening = read_line(&mut reader, &mut rest, 1 << 10).await;
        if let Ok(Some(line)) = &opening {
            assert!(line.len() <= 1 << 10 && !line.contains(&b'\n'));
        }
        let (mut receiver, sender) = over(reader, tokio::io::sink(), rest);
        let mut taken = 0;
        while let Ok(Some(incoming)) = receiver.next().await {
            if let Incoming::Data(bytes) | Incoming::Stderr(bytes) = incoming {
                assert!(bytes.len() <= PAYLOAD_MAX);
                taken += bytes.len();
                // Some are slow to take what comes.
                if taken % 3 != 0 {
                    let _ = sender.took(bytes.len()).await;
                }
            }
        }
        assert!(taken <= data.len());
    });
});
