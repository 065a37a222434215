//! The least `/init` there can be: a line on the console, and nothing more. A program of one file, for the standard library
//! alone, so that the benchmark can compile it for the guest with `rustc`.

fn main() {
    println!("init: up");
    loop {
        // PID 1 may not end.
        std::thread::park();
    }
}
