//! Numbers as people read them.

use std::time::Duration;

/// `1234567` as `1,234,567`.
pub(crate) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// As [`grouped`], with a sign.
pub(crate) fn grouped_signed(number: i64) -> String {
    let sign = if number < 0 { "-" } else { "" };
    format!("{sign}{}", grouped(number.unsigned_abs()))
}

/// Three significant digits and a decimal prefix: `83.1 k`, `1.25 M`, `12 `.
pub(crate) fn scaled(value: f64) -> String {
    // The sum of no numbers is -0.0; nobody reads that.
    let mut value = value + 0.0;
    let mut prefix = "";
    for next in ["k", "M", "G", "T"] {
        if value < 999.5 {
            break;
        }
        value /= 1000.0;
        prefix = next;
    }
    let digits = match (prefix, value) {
        ("", v) if v.fract() == 0.0 => 0,
        (_, v) if v < 9.995 => 2,
        (_, v) if v < 99.95 => 1,
        _ => 0,
    };
    format!("{value:.digits$} {prefix}")
}

/// Packets a second.
pub(crate) fn pps(value: f64) -> String {
    format!("{}pps", scaled(value))
}

/// Bits a second.
pub(crate) fn bps(value: f64) -> String {
    format!("{}bit/s", scaled(value))
}

/// Bytes, with a decimal prefix.
pub(crate) fn bytes(value: u64) -> String {
    format!("{}B", scaled(value as f64))
}

/// A short time: `870 ns`, `58.3 µs`, `1.20 ms`.
pub(crate) fn short_time(nanos: u64) -> String {
    let nanos = nanos as f64;
    let (value, unit) = match nanos {
        n if n < 1e3 => return format!("{n:.0} ns"),
        n if n < 1e6 => (n / 1e3, "µs"),
        n if n < 1e9 => (n / 1e6, "ms"),
        n => (n / 1e9, "s"),
    };
    let digits = if value < 9.995 {
        2
    } else if value < 99.95 {
        1
    } else {
        0
    };
    format!("{value:.digits$} {unit}")
}

/// A long time: `7 s`, `3 min 20 s`, `2 h 05 min`, `3 d 4 h`.
pub(crate) fn long_time(time: Duration) -> String {
    let s = time.as_secs();
    match s {
        0..60 => format!("{s} s"),
        60..3600 => format!("{} min {:02} s", s / 60, s % 60),
        3600..86_400 => format!("{} h {:02} min", s / 3600, s / 60 % 60),
        _ => format!("{} d {} h", s / 86_400, s / 3600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        for (number, text) in
            [(0, "0"), (999, "999"), (1000, "1,000"), (1_234_567, "1,234,567"), (10_000, "10,000")]
        {
            assert_eq!(grouped(number), text);
        }
        assert_eq!(grouped_signed(-1234), "-1,234");
        for (value, text) in [
            (0.0, "0 "),
            (-0.0, "0 "),
            (12.0, "12 "),
            (999.4, "999 "),
            (999.6, "1.00 k"),
            (83_120.0, "83.1 k"),
            (999_600.0, "1.00 M"),
            (1.25e6, "1.25 M"),
            (4.0e12, "4.00 T"),
            (4.0e15, "4000 T"),
        ] {
            assert_eq!(scaled(value), text, "{value}");
        }
        for (nanos, text) in [
            (870, "870 ns"),
            (58_300, "58.3 µs"),
            (1_200_000, "1.20 ms"),
            (123_000_000, "123 ms"),
            (2_000_000_000, "2.00 s"),
        ] {
            assert_eq!(short_time(nanos), text);
        }
        for (seconds, text) in [(7, "7 s"), (200, "3 min 20 s"), (7500, "2 h 05 min"), (273_600, "3 d 4 h")] {
            assert_eq!(long_time(Duration::from_secs(seconds)), text);
        }
    }
}
