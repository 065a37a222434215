//! Services: commands that the VM starts by itself, and restarts when they end.
//!
//! ```text
//! boot ─> started ─> ready? (a port, a command) ─> ended ─┬─> restart policy: after a growing pause ─> started
//!                                                         └─> not restarted: by policy, or after command_signal
//! ```

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use nexus_schema::ToolError;
use nexus_schema::service::{READY_DEFAULT_S, ReadyCheck, Restart, Service};
use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use super::command::{Command, Limits, Whose};
use super::launch::Order;
use super::table::Table;
use crate::console::say;
use crate::holder::wire::Settings;

/// The pauses before a restart of a service: the first, and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(60));
/// After running this long, a service starts with the first pause again.
const SETTLED: Duration = Duration::from_secs(60);
/// The interval of ready checks.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Timeout of one ready check.
const LOOK_TIMEOUT: Duration = Duration::from_secs(5);
/// How much output of each stream of a service is kept, in bytes.
const KEEP: usize = 256 << 10;

/// The agent's request to its holder when the VM is configured: [`Orders`], answered by [`Problems`]. It is not a public tool.
pub(crate) const SERVICES_START: &str = "services_start";

/// The services to run.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Orders {
    /// The services by name. Those that already run are not changed.
    pub(crate) services: BTreeMap<String, Service>,
}

/// The result of starting services.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Problems {
    /// What failed, as messages.
    pub(crate) problems: Vec<String>,
}

/// One service.
#[derive(Debug)]
struct Unit {
    name: String,
    service: Service,
    settings: Settings,
}

impl Table {
    /// Starts services that are not running yet, and waits until they are ready; returns those that are not.
    pub(super) async fn start_services(self: &Arc<Self>, orders: Orders, settings: &Settings) -> Problems {
        let mut starting = JoinSet::new();
        for (name, service) in orders.services {
            if self.is_new_service(&name) {
                let unit = Unit { name, service, settings: settings.clone() };
                starting.spawn(begin(self.clone(), Arc::new(unit)));
            }
        }
        let mut problems: Vec<String> = starting.join_all().await.into_iter().flatten().collect();
        problems.sort_unstable();
        Problems { problems }
    }

    fn start_unit(self: &Arc<Self>, unit: &Unit) -> Result<Arc<Command>, ToolError> {
        let Service { command, argv, .. } = unit.service.clone();
        let limits = Limits { kill_descendants: true, keep: KEEP, ..Limits::default() };
        let whose = Whose { service: Some(unit.name.clone()), ..Whose::default() };
        self.start(unit.order(command, argv), limits, whose, &unit.settings)
    }
}

impl Unit {
    fn order(&self, command: Option<String>, argv: Option<Vec<String>>) -> Order {
        let Service { cwd, env, user, .. } = self.service.clone();
        Order { command, argv, cwd, env, user, ..Order::default() }
    }

    /// Returns whether its policy restarts it after this end.
    fn is_started_again(&self, command: &Command) -> bool {
        let failed = command.ending().is_none_or(|ending| ending.status() != 0);
        let by_policy = match self.service.restart {
            Restart::Always => true,
            Restart::OnFailure => failed,
            Restart::No => false,
        };
        by_policy && !command.was_told_to_end.load(Ordering::Acquire)
    }
}

/// Starts one service, supervises it, and waits until it is ready; returns a problem as a message.
async fn begin(table: Arc<Table>, unit: Arc<Unit>) -> Option<String> {
    let first = table.start_unit(&unit);
    let problem = first.as_ref().err().map(|error| format!("service {}: {}", unit.name, error.message));
    tokio::spawn(keep(Arc::downgrade(&table), unit.clone(), first.ok()));
    match (problem, &unit.service.ready) {
        (None, Some(check)) => is_ready(&table, &unit, check).await.err(),
        (problem, _) => problem,
    }
}

/// Restarts a service whenever its policy says so.
async fn keep(table: Weak<Table>, unit: Arc<Unit>, mut command: Option<Arc<Command>>) {
    let mut pause = PAUSES.0;
    loop {
        match command.take() {
            Some(command) => {
                command.ended().await;
                if !unit.is_started_again(&command) {
                    return;
                }
                if command.begun.elapsed() >= SETTLED {
                    pause = PAUSES.0;
                }
            }
            None if unit.service.restart == Restart::No => return,
            None => {}
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSES.1);
        let Some(table) = table.upgrade().filter(|table| !table.is_closing()) else { return };
        match table.start_unit(&unit) {
            Ok(started) => command = Some(started),
            Err(error) => say(format_args!("restart the service {}: {error}", unit.name)),
        }
    }
}

/// Waits until a service is ready; returns an error message after the timeout.
async fn is_ready(table: &Arc<Table>, unit: &Unit, check: &ReadyCheck) -> Result<(), String> {
    let longest = Duration::from_secs(check.timeout_s.unwrap_or(READY_DEFAULT_S).into());
    let deadline = Instant::now() + longest;
    while Instant::now() < deadline {
        let looked = match (check.port, &check.command) {
            (Some(port), _) => listens(port).await,
            (None, Some(line)) => says_so(table, unit, line).await,
            (None, None) => true,
        };
        if looked {
            return Ok(());
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
    let what = match (check.port, &check.command) {
        (Some(port), _) => format!("nothing is listening on its port {port}"),
        (None, _) => "its ready check fails".to_owned(),
    };
    Err(format!("service {}: {what} after {} s", unit.name, longest.as_secs()))
}

async fn listens(port: u16) -> bool {
    let dial = async {
        TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.is_ok()
            || TcpStream::connect((Ipv6Addr::LOCALHOST, port)).await.is_ok()
    };
    timeout(LOOK_TIMEOUT, dial).await.unwrap_or(false)
}

async fn says_so(table: &Arc<Table>, unit: &Unit, line: &str) -> bool {
    let limits = Limits { timeout: Some(LOOK_TIMEOUT), kill_descendants: true, ..Limits::default() };
    let whose = Whose { service: Some(unit.name.clone()), ..Whose::default() };
    let order = unit.order(Some(line.to_owned()), None);
    let Ok(command) = table.start(order, limits, whose, &unit.settings) else { return false };
    command.ended().await;
    let is_ready = command.ending().is_some_and(|ending| ending.status() == 0);
    table.forget(&command);
    is_ready
}
