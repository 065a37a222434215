//! A shell in a machine as seen by a user at a terminal, through tmux as the terminal.

use std::io::{BufRead, BufReader};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use nexus_tests::daemon::{program, signal};
use nexus_tests::wait::until;
use rustix::process::Signal;
use serde_json::json;

use crate::world::{SOON, World, soon};

/// A terminal with a shell of the host in it.
pub(crate) struct Terminal {
    socket: String,
}

impl Terminal {
    /// Opens one with this many columns and rows.
    pub(crate) fn open(world: &World, (cols, rows): (u16, u16)) -> Self {
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let this = Self { socket: format!("nexus-test-{}-{number}", std::process::id()) };
        let size = [cols.to_string(), rows.to_string()];
        let mut command = this.command();
        command.args(["-u", "-f", "/dev/null", "new-session", "-d", "-x", &size[0], "-y", &size[1], "sh"]);
        command.envs(world.daemon.environment()).env("NEXUSCTL", program("nexusctl"));
        command.env("LC_ALL", "C.UTF-8").env_remove("TMUX").env_remove("ENV");
        assert!(command.status().expect("tmux runs").success());
        // Differs from the typed text.
        this.line("PS1='host''> '");
        this.wait_for("host>");
        this
    }

    fn command(&self) -> Command {
        let mut command = Command::new("tmux");
        command.args(["-L", &self.socket]);
        command
    }

    fn tmux(&self, words: &[&str]) -> Output {
        self.command().args(words).output().expect("tmux runs")
    }

    /// The programs that its shell has started.
    fn children(&self) -> Vec<u32> {
        let shell = self.tmux(&["display-message", "-p", "#{pane_pid}"]).stdout;
        let shell = String::from_utf8(shell).expect("a number").trim().to_owned();
        let children = std::fs::read_to_string(format!("/proc/{shell}/task/{shell}/children"));
        let children = children.expect("the shell's children");
        children.split_whitespace().map(|pid| pid.parse().expect("a number")).collect()
    }

    /// Waits until the host's shell has the terminal again.
    #[track_caller]
    pub(crate) fn wait_until_back(&self) {
        soon("the shell of the host is back", || self.children().is_empty().then_some(()));
    }

    /// Types a line.
    pub(crate) fn line(&self, text: &str) {
        self.tmux(&["send-keys", "-l", text]);
        self.keys(&["Enter"]);
    }

    /// Presses keys.
    fn keys(&self, names: &[&str]) {
        assert!(self.tmux(&[&["send-keys"], names].concat()).status.success());
    }

    /// The visible and scrolled text; `with_colours` keeps escape sequences.
    pub(crate) fn screen(&self, with_colours: bool) -> String {
        let colours: &[&str] = if with_colours { &["-e"] } else { &[] };
        let output = self.tmux(&[&["capture-pane", "-p", "-S", "-1000"], colours].concat());
        String::from_utf8(output.stdout).expect("tmux gives UTF-8")
    }

    /// Waits until a text is visible.
    #[track_caller]
    pub(crate) fn wait_for(&self, text: &str) {
        let mut screen = String::new();
        let found = until(SOON, || {
            screen = self.screen(false);
            screen.contains(text).then_some(())
        });
        assert!(found.is_some(), "{text:?} is not on the screen:\n{screen}");
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.tmux(&["kill-server"]);
    }
}

/// A shell without the start-up files of this host.
const SHELL: &str = "$NEXUSCTL shell web-1 -e PS1='vm> ' -e HOME=/nonexistent";

/// Types a line into the host's shell that opens a shell in the machine, and waits for it.
fn enter(terminal: &Terminal) {
    let before = terminal.screen(false).matches("in-42-vm").count();
    terminal.line(SHELL);
    soon("it is a shell", || {
        terminal.line("echo in-$((40 + 2))-vm");
        let seen = || (terminal.screen(false).matches("in-42-vm").count() > before).then_some(());
        until(Duration::from_secs(2), seen)
    });
}

/// The id with which a detached client can reattach.
fn id(terminal: &Terminal) -> String {
    terminal.wait_for("--attach ");
    let screen = terminal.screen(false);
    let (_, rest) = screen.rsplit_once("--attach ").expect("it is told");
    rest.chars().filter(|c| !c.is_whitespace()).take(13).collect()
}

#[test]
fn a_shell_has_a_terminal_with_all_that_belongs_to_it() {
    let world = World::new();
    world.create(&mut world.client(), "web-1");
    let terminal = Terminal::open(&world, (100, 30));
    enter(&terminal);
    terminal.line("stty size; tty >/dev/null && echo a-terminal; echo n\u{e4}her-\u{1f980}");
    terminal.wait_for("30 100\n");
    terminal.wait_for("\na-terminal\nn\u{e4}her-\u{1f980}\n");
    terminal.line(r"printf '\033[31mred-\033[0mplain\n'");
    soon("red is red", || terminal.screen(true).contains("\u{1b}[31mred-\u{1b}[39mplain").then_some(()));
    terminal.tmux(&["resize-window", "-x", "90", "-y", "20"]);
    soon("the size has come through", || {
        terminal.line("stty size");
        terminal.screen(false).contains("20 90\n").then_some(())
    });
    // Ctrl-C affects only the command in the machine.
    terminal.line("sleep 1000");
    terminal.wait_for("sleep 1000");
    soon("it is interrupted", || {
        terminal.keys(&["C-c"]);
        terminal.line("echo after-$((1 + 1))");
        let seen = || terminal.screen(false).contains("after-2").then_some(());
        until(Duration::from_secs(3), seen)
    });
    terminal.line("exit 3");
    terminal.wait_until_back();
    terminal.line("echo code-$?");
    terminal.wait_for("code-3\n");
}

#[test]
fn a_shell_is_left_and_come_back_to() {
    let world = World::new();
    world.create(&mut world.client(), "web-1");
    let [one, two] = [(100, 30), (80, 24)].map(|size| Terminal::open(&world, size));
    enter(&one);
    one.line("echo before-$((1 + 1))");
    one.wait_for("before-2\n");
    one.keys(&["C-p", "C-q"]);
    let id = id(&one);
    one.wait_until_back();
    one.line("echo code-$?");
    one.wait_for("code-0\n");
    // Reattaching shows the earlier output; another client watches, and its input is ignored.
    one.line(&format!("clear; $NEXUSCTL shell web-1 --attach {id}"));
    one.wait_for("before-2\n");
    two.line(&format!("$NEXUSCTL shell web-1 --attach {id}"));
    two.wait_for("only watching");
    two.wait_for("before-2\n");
    two.line("echo typed-$((1 + 2))");
    one.line("echo while-$((2 + 2))");
    two.wait_for("while-4\n");
    assert!(!one.screen(false).contains("typed-3"), "{}", one.screen(false));
    two.keys(&["C-p", "C-q"]);
    two.wait_until_back();
    // Taking over detaches the first client.
    two.line(&format!("clear; $NEXUSCTL shell web-1 --attach {id} --take-over --scroll-back 0"));
    one.wait_for("another client took over");
    one.wait_until_back();
    two.line("echo mine-$((2 + 3))");
    two.wait_for("mine-5\n");
    soon("the size is that of who writes", || {
        two.line("stty size");
        two.screen(false).contains("24 80\n").then_some(())
    });
    two.line("exit 0");
    two.wait_until_back();
    one.line(&format!("$NEXUSCTL shell web-1 --attach {id}; echo code-$?"));
    one.wait_for("mine-5");
    one.wait_for("code-0\n");
}

#[test]
fn the_terminal_is_as_it_was_however_a_shell_ends() {
    let mut world = World::new();
    world.create(&mut world.client(), "web-1");
    let terminal = Terminal::open(&world, (100, 30));
    let is_sane = |mark: &str| {
        terminal.line(&format!(
            "stty -a | tr -s ' ;' '\\n' | grep -x -e icanon -e echo | tr '\\n' '-'; echo {mark}"
        ));
        terminal.wait_for(&format!("icanon-echo-{mark}\n"));
    };
    is_sane("before");
    enter(&terminal);
    terminal.children().into_iter().for_each(|pid| signal(pid, Signal::TERM));
    terminal.wait_until_back();
    is_sane("terminated");
    enter(&terminal);
    world.daemon.kill();
    terminal.wait_until_back();
    is_sane("cut");
    assert!(terminal.screen(false).contains("was interrupted"), "{}", terminal.screen(false));
    world.daemon.restart();
}

#[test]
fn a_console_is_followed_without_its_escape_sequences() {
    // The driver considers the machine as running once its socket exists. It never says hello.
    let world = World::program(
        "#!/bin/sh\nprintf '\\033[31mboot\\033[0m \\033]0;title\\007now\\n'\n: > v.sock\nexec sleep 1000\n",
    );
    let mut client = world.client();
    let mut arguments = world.arguments("web-1");
    arguments["wait_s"] = 0.into();
    let outcome = client.must("vm_create", arguments);
    assert_eq!(outcome["done"], false, "{outcome}");
    soon("its console", || {
        let logs = client.call_whole("vm_logs", json!({ "vm": "web-1" })).ok()?;
        logs.to_string().contains("boot now").then_some(())
    });
    assert_ne!(client.inspect("web-1")["state"], "ready");
    let follow = |raw: &[&str]| {
        let mut command = Command::new(program("nexusctl"));
        command.args(["vm", "console", "web-1"]).args(raw).envs(world.daemon.environment());
        let mut child = command.stdout(Stdio::piped()).spawn().expect("nexusctl runs");
        let mut line = String::new();
        let mut lines = BufReader::new(child.stdout.take().expect("its output"));
        lines.read_line(&mut line).expect("a line");
        signal(child.id(), Signal::INT);
        let status = soon("it ends", || child.try_wait().expect("a child can be asked"));
        assert_eq!(status.code(), Some(130));
        line
    };
    assert_eq!(follow(&[]), "boot now\n");
    assert_eq!(follow(&["--raw"]), "\u{1b}[31mboot\u{1b}[0m \u{1b}]0;title\u{7}now\n");
}
