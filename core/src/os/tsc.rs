//! The rate of the host's time stamp counter.
//!
//! A guest under software emulation reads the host's counter but cannot calibrate it on a busy host, so it is told the rate.
//! CPUID leaves 0x15 and 0x16 have only nominal values, or none in a VM; measuring against the clock gives the real one.

use std::sync::OnceLock;

/// The rate in kHz; `None` if there is no such counter. Measured once, in about 10 ms.
pub fn khz() -> Option<u32> {
    static KHZ: OnceLock<Option<u32>> = OnceLock::new();
    *KHZ.get_or_init(measure)
}

#[cfg(target_arch = "x86_64")]
fn measure() -> Option<u32> {
    const PERIOD_NS: u64 = 10_000_000;
    let (tsc_from, ns_from) = sample();
    while sample().1.saturating_sub(ns_from) < PERIOD_NS {
        let rest = rustix::event::Timespec { tv_sec: 0, tv_nsec: 1_000_000 };
        // Only a pause; its real length is measured.
        let _ = rustix::thread::nanosleep(&rest);
    }
    let (tsc_to, ns_to) = sample();
    let ticks = u128::from(tsc_to.checked_sub(tsc_from)?);
    let khz = ticks * 1_000_000 / u128::from(ns_to.checked_sub(ns_from)?.max(1));
    // Anything else is not a counter of this kind.
    u32::try_from(khz).ok().filter(|khz| (100_000..20_000_000).contains(khz))
}

#[cfg(not(target_arch = "x86_64"))]
fn measure() -> Option<u32> {
    None
}

/// Counter and clock (ns) at the same moment: the best of several tries, because a try may be interrupted.
#[cfg(target_arch = "x86_64")]
fn sample() -> (u64, u64) {
    let mut best = (u64::MAX, 0, 0);
    for _ in 0..16 {
        let before = rdtsc();
        let clock = rustix::time::clock_gettime(rustix::time::ClockId::MonotonicRaw);
        let after = rdtsc();
        let width = after.saturating_sub(before);
        if width < best.0 {
            let ns = clock.tv_sec as u64 * 1_000_000_000 + clock.tv_nsec as u64;
            best = (width, before + width / 2, ns);
        }
    }
    (best.1, best.2)
}

#[cfg(target_arch = "x86_64")]
fn rdtsc() -> u64 {
    // SAFETY: every x86_64 processor has the instruction; Linux lets processes use it unless they ask otherwise (PR_SET_TSC).
    unsafe { core::arch::x86_64::_rdtsc() }
}

#[cfg(test)]
#[cfg(target_arch = "x86_64")]
mod tests {
    use super::*;

    #[test]
    fn two_measurements_agree() {
        let first = measure().expect("a host with a time stamp counter");
        let second = measure().expect("a host with a time stamp counter");
        let apart = first.abs_diff(second);
        // 200 ppm is a clock that drifts by 17 s a day. Usually the difference is below 5 ppm.
        assert!(u64::from(apart) * 5_000 < u64::from(first), "{first} kHz and {second} kHz");
    }
}
