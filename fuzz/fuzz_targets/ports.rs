//! What a guest writes into the ports that carry its connections, after a good beginning.
#![no_main]

use std::io::ErrorKind;

use libfuzzer_sys::fuzz_target;
use nexus_vsock::{Device, Lane, Pairs, serial};

/// What the fuzzer can connect to.
const SERVED: [u32; 2] = [1024, 1025];

fuzz_target!(|data: &[u8]| {
    let (host, guest) = (serial::host(|_| {}), serial::guest(|_| {}));
    let mut device = Device::new(host, Pairs::new(&SERVED)).expect("a device");
    let mut other = Device::new(guest, Pairs::new(&[])).expect("a device");
    let mut lane = Lane::of_host(0, host.cids);
    let nonce = "fuzz".parse().expect("a nonce");
    let mut bytes = Vec::new();
    let written = Lane::of_guest(0, guest.cids, nonce).send(&mut other, |hello| {
        bytes.extend_from_slice(hello);
        Ok(hello.len())
    });
    written.expect("it says hello");
    bytes.extend_from_slice(data);

    let (ours, _program) = Pairs::make().expect("a socket pair");
    device.dial(ours, 200).expect("there is room");
    let mut programs = Vec::new();
    for piece in bytes.chunks(5000) {
        let mut left = piece;
        let received = lane.receive(&mut device, |room| {
            let count = left.len().min(room.len());
            if count == 0 {
                return Err(ErrorKind::WouldBlock.into());
            }
            room[..count].copy_from_slice(&left[..count]);
            left = &left[count..];
            Ok(count)
        });
        received.expect("a guest cannot end it");
        while device.poll() {}
        programs.extend(std::iter::from_fn(|| device.front_mut().take()));
        assert!(programs.len() <= bytes.len() / 44);
        let mut sent = 0;
        lane.send(&mut device, |frame| {
            sent += frame.len();
            Ok(frame.len())
        })
        .expect("it is taken");
        assert!(sent <= 1 << 20);
    }
});
