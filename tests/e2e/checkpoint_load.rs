//! A machine that is busy while checkpoints are taken of it. The same with more of them is in `tests/ondemand/checkpoints.rs`.

#[test]
fn nothing_is_lost_and_no_connection_ends_while_checkpoints_are_taken_and_a_machine_is_paused() {
    assert!(nexus_tests::saved::stays_whole(10) > 1_000_000);
}
