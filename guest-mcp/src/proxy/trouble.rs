//! The kernel's counters for the VM's interface: they show whether the firewall may have refused a connection of a command.
//!
//! The host's firewall refuses such connections, and reports it to the agent a moment later. The result of a command waits for that report, but only
//! if these counters changed.

use std::time::Duration;

use super::Proxy;
use crate::os::read_small;

/// How long to wait for the host's report.
const HEARING: Duration = Duration::from_millis(150);
/// Counters of refused connections: file, line and column in it.
const REFUSED: [(&str, &str, &str); 2] =
    [("/proc/net/snmp", "Tcp:", "AttemptFails"), ("/proc/net/snmp", "Icmp:", "InDestUnreachs")];
/// The same for IPv6, where each counter has its own line.
const REFUSED6: (&str, &str) = ("/proc/net/snmp6", "Icmp6InDestUnreachs");
/// The file with the packet counters of all interfaces.
const PACKETS: &str = "/proc/net/dev";
/// The maximum size that is read of each of these files, in bytes.
const FILE_MAX: u64 = 64 << 10;

/// Counters that only grow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counted {
    /// Refused connections.
    refused: u64,
    /// Received packets.
    received: u64,
}

impl Counted {
    /// Reads the present values.
    pub(crate) fn now() -> Self {
        let read = |path| read_small(path, FILE_MAX).unwrap_or_default();
        let snmp = read(REFUSED[0].0);
        let refused = REFUSED.iter().map(|(_, line, column)| of_table(&snmp, line, column)).sum::<u64>();
        let refused6 = of_list(&read(REFUSED6.0), REFUSED6.1);
        Self { refused: refused + refused6, received: received(&read(PACKETS)) }
    }

    /// Returns whether a connection may have been refused since: either the kernel counted one, or packets arrived and the command failed. The latter
    /// covers refused names, whose answers are ordinary packets.
    fn is_suspicious_since(self, before: Self, has_failed: bool) -> bool {
        self.refused != before.refused || (has_failed && self.received != before.received)
    }
}

/// Waits briefly for the host to report refusals, if there may have been some since.
pub(crate) async fn hear_of_refusals(proxy: &Proxy, since: (u64, Counted), has_failed: bool) {
    let (told, counted) = since;
    if proxy.refused.now() == told && Counted::now().is_suspicious_since(counted, has_failed) {
        // If no report arrives, nothing was refused.
        let _ = tokio::time::timeout(HEARING, proxy.refused.until_after(told)).await;
    }
}

/// Returns a counter of `/proc/net/snmp`, which has a line of names and a line of values for each protocol.
fn of_table(text: &str, protocol: &str, name: &str) -> u64 {
    let mut lines = text.lines().filter(|line| line.starts_with(protocol));
    let (Some(names), Some(values)) = (lines.next(), lines.next()) else { return 0 };
    let found = names.split_whitespace().zip(values.split_whitespace()).find(|(is, _)| *is == name);
    found.and_then(|(_, value)| value.parse().ok()).unwrap_or(0)
}

/// Returns a counter of `/proc/net/snmp6`.
fn of_list(text: &str, name: &str) -> u64 {
    let fields = text.lines().filter_map(|line| line.split_once(char::is_whitespace));
    let found = fields.into_iter().find(|(is, _)| *is == name);
    found.and_then(|(_, value)| value.trim().parse().ok()).unwrap_or(0)
}

/// Returns the packets that all interfaces except `lo` received, from `/proc/net/dev`.
fn received(text: &str) -> u64 {
    let interfaces = text.lines().filter_map(|line| line.split_once(':'));
    let others = interfaces.filter(|(name, _)| name.trim() != "lo");
    others.filter_map(|(_, numbers)| numbers.split_whitespace().nth(1)?.parse::<u64>().ok()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_numbers_are_found() {
        let snmp = "Icmp: InMsgs InErrors InCsumErrors InDestUnreachs\nIcmp: 9 0 0 4\nIcmpMsg: InType3\nIcmpMsg: 4\n\
            Tcp: RtoAlgorithm ActiveOpens AttemptFails\nTcp: 1 7 3\n";
        assert_eq!(of_table(snmp, "Tcp:", "AttemptFails"), 3);
        assert_eq!(of_table(snmp, "Icmp:", "InDestUnreachs"), 4);
        assert_eq!(of_table(snmp, "Udp:", "InErrors"), 0);
        assert_eq!(of_list("Ip6InReceives \t5\nIcmp6InDestUnreachs     \t2\n", REFUSED6.1), 2);
        let devices = "Inter-|   Receive\n face |bytes    packets errs\n    lo: 100 10 0\n  eth0: 500 20 0\n";
        assert_eq!(received(devices), 20);
    }

    #[test]
    fn there_is_nothing_to_wait_for_without_packets_or_a_failure() {
        let before = Counted { refused: 1, received: 1 };
        assert!(!before.is_suspicious_since(before, true));
        let more = Counted { received: 2, ..before };
        assert!(!more.is_suspicious_since(before, false));
        assert!(more.is_suspicious_since(before, true));
        assert!(Counted { refused: 2, ..before }.is_suspicious_since(before, false));
    }
}
