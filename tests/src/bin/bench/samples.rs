//! Durations of a repeated action.

use std::time::Duration;

/// The measurements, unordered.
#[derive(Debug, Clone, Default)]
pub(crate) struct Samples(Vec<Duration>);

impl Samples {
    pub(crate) fn add(&mut self, sample: Duration) {
        self.0.push(sample);
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = Duration> {
        self.0.iter().copied()
    }

    /// The quantile `part` of the samples. Panics if there are none.
    pub(crate) fn quantile(&self, part: f64) -> Duration {
        let mut sorted = self.0.clone();
        sorted.sort();
        sorted[((sorted.len() - 1) as f64 * part).round() as usize]
    }

    pub(crate) fn p50(&self) -> Duration {
        self.quantile(0.5)
    }

    /// Two quantiles as text: `1.93 / 2.10 s`.
    pub(crate) fn pair(&self, low: f64, high: f64) -> String {
        show_pair(self.quantile(low), self.quantile(high))
    }
}

impl FromIterator<Duration> for Samples {
    fn from_iter<T: IntoIterator<Item = Duration>>(samples: T) -> Self {
        Self(samples.into_iter().collect())
    }
}

impl Extend<Duration> for Samples {
    fn extend<T: IntoIterator<Item = Duration>>(&mut self, samples: T) {
        self.0.extend(samples);
    }
}

/// A duration in a suitable unit.
pub(crate) fn show(duration: Duration) -> String {
    let (factor, unit) = unit(duration);
    format!("{} {unit}", number(duration.as_secs_f64() * factor))
}

/// Two durations in a unit that suits the second.
pub(crate) fn show_pair(first: Duration, second: Duration) -> String {
    let (factor, unit) = unit(second);
    let text = |duration: Duration| number(duration.as_secs_f64() * factor);
    format!("{} / {} {unit}", text(first), text(second))
}

fn unit(duration: Duration) -> (f64, &'static str) {
    match duration.as_secs_f64() {
        s if s >= 1.0 => (1.0, "s"),
        s if s >= 1e-3 => (1e3, "ms"),
        _ => (1e6, "µs"),
    }
}

/// At least three digits.
fn number(value: f64) -> String {
    match value {
        v if v >= 100.0 => format!("{v:.0}"),
        v if v >= 10.0 => format!("{v:.1}"),
        v => format!("{v:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_samples() {
        let samples: Samples = (1..=100).rev().map(Duration::from_millis).collect();
        let at = |part| samples.quantile(part).as_millis();
        assert_eq!((at(0.0), at(0.5), at(0.95), at(1.0)), (1, 51, 95, 100));
        let one: Samples = [Duration::from_millis(7)].into_iter().collect();
        assert_eq!(one.quantile(0.99), Duration::from_millis(7));
    }

    #[test]
    fn durations_have_a_unit_that_suits_them() {
        assert_eq!(show(Duration::from_micros(132)), "132 µs");
        assert_eq!(show(Duration::from_micros(12_340)), "12.3 ms");
        assert_eq!(show_pair(Duration::from_millis(900), Duration::from_millis(1240)), "0.90 / 1.24 s");
    }
}
