//! Dials the host from within a guest: `dial PORT SOURCE LINE` connects from a source port (0: any) to a port of the host,
//! sends the line, and prints `answered TEXT`, `hung up`, or `refused ERRNO`. For the standard library alone, so that the
//! tests can compile it for the guest with `rustc`.

use std::io::{BufRead, BufReader, Write};

#[expect(dead_code, reason = "this program only dials")]
mod wire;

fn main() {
    let words: Vec<String> = std::env::args().collect();
    let number = |at: usize| words.get(at).and_then(|word| word.parse().ok()).unwrap_or(0);
    let line = words.get(3).map_or("", String::as_str);
    let answer = wire::dial(number(1), number(2)).and_then(|mut host| {
        writeln!(host, "{line}")?;
        let mut answer = String::new();
        BufReader::new(&host).read_line(&mut answer)?;
        Ok(answer)
    });
    match answer {
        Ok(answer) if answer.is_empty() => println!("hung up"),
        Ok(answer) => println!("answered {}", answer.trim_end()),
        Err(error) => println!("refused {}", error.raw_os_error().unwrap_or(0)),
    }
}
