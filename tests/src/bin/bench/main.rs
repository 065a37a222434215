//! Measures Nexus, each figure compared with its yardstick in the same run: `bench [MEASUREMENT]... [--runs N] [--quick]`.
//!
//! Yardstick and product alternate, so that a busy machine affects both; only ratios and differences are judged. The
//! tables are in Markdown, for docs/benchmarks.md.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "what is measured is printed")]

mod access;
mod awake;
mod boot;
mod calls;
mod checkpoints;
mod clone;
mod download;
mod first;
mod image;
mod list;
mod machine;
mod material;
mod memory;
mod net;
mod oci;
mod page;
mod samples;
mod streams;
mod table;
mod vsock;
mod wires;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

use table::Table;

/// Measures Nexus next to yardsticks in the same run.
#[derive(Debug, Parser)]
struct Options {
    /// What to measure (all of it by default): boot, first, calls, access, streams, vsock, memory, list, page,
    /// download, image, oci, clone, net, checkpoints.
    measurements: Vec<String>,
    /// How many runs a boot's figures are taken from.
    #[arg(long, default_value_t = 15)]
    runs: usize,
    /// A tenth of the work, for a first look.
    #[arg(long)]
    quick: bool,
    /// `first` with warm starts: VMs go on from a machine that was booted before.
    #[arg(long)]
    warm: bool,
    /// Which parts of `streams` to measure (all of them by default): exec, output, file, port,
    /// connect, trees, search, idle, busy, safe.
    #[arg(long, value_name = "PART")]
    part: Vec<String>,
    /// Another vsock backend to measure beside that of Nexus, started as `COMMAND CID VHOST UDS`.
    #[arg(long, value_name = "COMMAND", env = "NEXUS_BENCH_VSOCK")]
    vsock_against: Option<PathBuf>,
}

impl Options {
    /// How often something is done.
    fn times(&self, times: usize) -> usize {
        if self.quick { times.div_ceil(10) } else { times }
    }

    /// Whether this part of a measurement was asked for.
    fn has(&self, part: &str) -> bool {
        self.part.is_empty() || self.part.iter().any(|wanted| wanted == part)
    }

    /// The number of boots.
    fn boots(&self) -> usize {
        if self.quick { self.runs.min(3) } else { self.runs }
    }
}

/// A measurement by its name.
type Measurement = (&'static str, fn(&Options) -> Table);

const MEASUREMENTS: [Measurement; 15] = [
    ("boot", boot::measure),
    ("first", first::measure),
    ("calls", calls::measure),
    ("access", access::measure),
    ("streams", streams::measure),
    ("vsock", vsock::measure),
    ("memory", memory::measure),
    ("list", list::measure),
    ("page", page::measure),
    ("download", download::measure),
    ("image", image::measure),
    ("oci", oci::measure),
    ("clone", clone::measure),
    ("net", net::measure),
    ("checkpoints", checkpoints::measure),
];

fn main() -> ExitCode {
    // The vsock backend is measured as a separate process.
    let words: Vec<String> = std::env::args().skip(1).collect();
    if let [word, arguments @ ..] = &words[..]
        && word == vsock::SERVE
    {
        return vsock::serve(arguments);
    }
    let options = Options::parse();
    let wanted = match chosen(&options.measurements) {
        Ok(wanted) => wanted,
        Err(unknown) => {
            let known = MEASUREMENTS.map(|(name, _)| name).join(", ");
            eprintln!("there is no measurement `{unknown}`; there are {known}");
            return ExitCode::from(2);
        }
    };
    println!("{}", machine::describe());
    let mut missed = 0;
    for (name, measure) in wanted {
        eprintln!("measuring: {name}");
        let table = measure(&options);
        missed += table.missed();
        println!("\n{table}");
    }
    if missed > 0 {
        println!("\n{missed} goals missed");
    }
    ExitCode::SUCCESS
}

fn chosen(names: &[String]) -> Result<Vec<Measurement>, &str> {
    if names.is_empty() {
        return Ok(MEASUREMENTS.to_vec());
    }
    let find = |name| MEASUREMENTS.into_iter().find(|(known, _)| known == name);
    names.iter().map(|name| find(name).ok_or(name.as_str())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measurements_are_chosen_by_name() {
        let names = |words: &[&str]| {
            let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
            let chosen = chosen(&words).map(|all| all.iter().map(|(name, _)| *name).collect::<Vec<_>>());
            chosen.map_err(str::to_owned)
        };
        assert_eq!(names(&["list", "boot"]), Ok(vec!["list", "boot"]));
        assert_eq!(names(&[]).map(|all| all.len()), Ok(MEASUREMENTS.len()));
        assert_eq!(names(&["boot", "x"]), Err("x".to_owned()));
    }
}
