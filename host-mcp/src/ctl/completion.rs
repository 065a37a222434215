//! `nexusctl completion`: scripts for shells.

use clap::CommandFactory;
use clap_complete::Shell;

use super::App;
use super::args::Cli;
use super::error::Error;

/// For which shell.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The shell
    #[arg(value_parser = clap::builder::PossibleValuesParser::new(["bash", "zsh", "fish"]))]
    shell: String,
}

/// Prints the script.
pub(crate) fn run(app: &App, args: Args) -> Result<u8, Error> {
    app.ui.bytes(&script(&args.shell)?)?;
    if app.ui.stdout_is_terminal {
        app.ui.say(&format!("# {}", how_to(&args.shell)));
    }
    Ok(0)
}

fn script(shell: &str) -> Result<Vec<u8>, Error> {
    let shell = match shell {
        "bash" => Shell::Bash,
        "zsh" => Shell::Zsh,
        "fish" => Shell::Fish,
        other => return Err(Error::usage(format!("no completion for {other}"))),
    };
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "nexusctl", &mut script);
    Ok(script)
}

fn how_to(shell: &str) -> &'static str {
    match shell {
        "zsh" => "to use it: nexusctl completion zsh > ~/.zfunc/_nexusctl, with ~/.zfunc in fpath",
        "fish" => "to use it: nexusctl completion fish > ~/.config/fish/completions/nexusctl.fish",
        _ => "to use it: nexusctl completion bash > ~/.local/share/bash-completion/completions/nexusctl",
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn scripts_know_the_verbs() {
        for shell in ["bash", "zsh", "fish"] {
            let script = String::from_utf8(super::script(shell).unwrap()).unwrap();
            assert!(script.contains("inspect") && script.contains("nexusctl"), "{shell}");
        }
    }
}
