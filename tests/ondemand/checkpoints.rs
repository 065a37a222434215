//! A hundred checkpoints of a busy machine, and a thousand pauses. Run by `make e2e-checkpoints`.

const CHECKPOINTS: u64 = 100;

#[test]
fn a_hundred_checkpoints_and_a_thousand_pauses_lose_nothing() {
    let bytes = nexus_tests::saved::stays_whole(CHECKPOINTS);
    println!("{CHECKPOINTS} checkpoints beside {bytes} bytes of bulk, then {} pauses", 10 * CHECKPOINTS);
    assert!(bytes > 10_000_000, "{bytes}");
}
