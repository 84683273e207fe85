//! The gaps of all modes in one picture.
//!
//! Contract: how often a gap of at least this length happened, in each second, both axes logarithmic: so
//! measurements of different lengths compare, and the rare long ones are as easy to see as the many short
//! ones. Text is left to whoever shows the picture; no fonts are needed to draw it.

use super::Mode;
use super::report::{Measurement, Report};
use crate::format::{grouped, short_time};
use plotters::prelude::*;

const SIZE: (u32, u32) = (960, 600);
const FONT: &str = "sans-serif";
/// Two colours that every kind of colour vision tells apart.
const COLOURS: [RGBColor; 2] = [RGBColor(0xd5, 0x5e, 0x00), RGBColor(0x00, 0x72, 0xb2)];

/// Draws a picture, as SVG.
pub(super) fn draw(report: &Report) -> Result<String, String> {
    let mut svg = String::new();
    draw_into(&mut svg, report).map_err(|error| error.to_string())?;
    Ok(svg)
}

fn draw_into(svg: &mut String, report: &Report) -> Result<(), Box<dyn std::error::Error>> {
    let (lengths, rates) = ranges(&report.measurements);
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let title = format!("Gaps of a spinning thread on CPU {}", report.cpu);
    let mut chart = ChartBuilder::on(&root)
        .caption(title, (FONT, 24))
        .margin(16)
        .x_label_area_size(48)
        .y_label_area_size(84)
        .build_cartesian_2d((lengths.0..lengths.1).log_scale(), (rates.0..rates.1).log_scale())?;
    chart
        .configure_mesh()
        .x_desc("length of a gap")
        .y_desc("gaps of at least this length, per second")
        .x_label_formatter(&|ns| short_time(ns.round() as u64))
        .y_label_formatter(&|rate| per_second(*rate))
        .axis_desc_style((FONT, 16))
        .label_style((FONT, 13))
        .light_line_style(RGBColor(0xf0, 0xf0, 0xf0))
        .bold_line_style(RGBColor(0xd8, 0xd8, 0xd8))
        .draw()?;
    for (m, colour) in report.measurements.iter().zip(COLOURS) {
        chart
            .draw_series(LineSeries::new(curve(m, rates.0), colour.stroke_width(2)))?
            .label(legend(m))
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], colour.stroke_width(3)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .legend_area_size(30)
        .margin(12)
        .background_style(WHITE.mix(0.9))
        .border_style(RGBColor(0xb0, 0xb0, 0xb0))
        .label_font((FONT, 14))
        .draw()?;
    root.present()?;
    drop(chart);
    Ok(())
}

fn legend(m: &Measurement) -> String {
    let what = Mode::described(m.mode);
    let longest = m.gaps.longest_ns().map_or_else(String::new, |ns| format!(", longest {}", short_time(ns)));
    format!("{} ({what}): {} gaps in {:.0} s{longest}", m.mode, grouped(m.gaps.count), m.seconds)
}

/// From the threshold to the longest, and from less than one gap in the longest measurement to all.
fn ranges(all: &[Measurement]) -> ((f64, f64), (f64, f64)) {
    let least = all.iter().map(|m| m.gaps.threshold_ns).min().unwrap_or(100).max(1) as f64;
    let most = all.iter().filter_map(|m| m.gaps.longest_ns()).max().unwrap_or(0) as f64;
    let seconds = all.iter().map(|m| m.seconds).fold(1e-3, f64::max);
    let rate = all.iter().map(|m| m.gaps.count as f64 / m.seconds.max(1e-3)).fold(0.0, f64::max);
    // A picture of nothing still shows some decades of it.
    ((least, (most * 1.5).max(least * 1000.0)), (0.5 / seconds, (rate * 2.0).max(100.0 / seconds)))
}

/// Stairs down from all gaps to none, `floor` standing for none.
fn curve(m: &Measurement, floor: f64) -> Vec<(f64, f64)> {
    let seconds = m.seconds.max(1e-3);
    let height = |count: u64| (count as f64 / seconds).max(floor);
    let mut left: u64 = m.gaps.histogram.iter().map(|bucket| bucket.count).sum();
    let mut points = vec![(m.gaps.threshold_ns.max(1) as f64, height(left))];
    for bucket in &m.gaps.histogram {
        let at = bucket.to_ns.min(m.gaps.longest_ns().unwrap_or(u64::MAX)).max(1) as f64;
        points.push((at, height(left)));
        left -= bucket.count;
        points.push((at, height(left)));
    }
    points
}

/// `0.1`, `20`, `3k`: the axis says of what.
fn per_second(rate: f64) -> String {
    match rate {
        r if r < 0.999 => format!("{}", (r * 1e6).round() / 1e6),
        r if r < 999.5 => format!("{r:.0}"),
        r if r < 999_500.0 => format!("{:.0}k", r / 1e3),
        r => format!("{:.0}M", r / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::{measurement, report};
    use super::*;

    #[test]
    fn the_curve_is_a_staircase_of_rates() {
        let m = measurement("none", 2.0, 200, &[(300, 310, 6), (1_000, 1_030, 1), (50_000, 51_000, 1)]);
        let expected = [
            (200.0, 4.0),
            (310.0, 4.0),
            (310.0, 1.0),
            (1_030.0, 1.0),
            (1_030.0, 0.5),
            (51_000.0, 0.5),
            (51_000.0, 0.25),
        ];
        assert_eq!(curve(&m, 0.25), expected);
        let ((x0, x1), (y0, y1)) = ranges(std::slice::from_ref(&m));
        assert_eq!((x0, y0), (200.0, 0.25));
        assert!(x1 > 51_000.0 && y1 >= 8.0);
    }

    /// All that an XML reader finds as text.
    fn texts(svg: &str) -> Vec<String> {
        let document = roxmltree::Document::parse(svg).expect("well-formed");
        assert_eq!(document.root_element().tag_name().name(), "svg");
        document
            .descendants()
            .filter(|node| node.has_tag_name("text"))
            .filter_map(|node| node.text().map(|text| text.trim().to_owned()))
            .collect()
    }

    #[test]
    fn the_picture_names_everything() {
        let none = measurement("none", 10.0, 200, &[(300, 310, 12_345), (900_000, 910_000, 1)]);
        let strict = measurement("strict", 10.0, 200, &[]);
        let texts = texts(&draw(&report(3, vec![none, strict])).unwrap());
        for part in [
            "Gaps of a spinning thread on CPU 3",
            "length of a gap",
            "gaps of at least this length, per second",
            "none (no isolation): 12,346 gaps in 10 s, longest 910 µs",
            "strict (strict isolation): 0 gaps in 10 s",
            "10.0 µs",
        ] {
            assert!(texts.iter().any(|text| text == part), "{part} is not in {texts:#?}");
        }
    }

    #[test]
    fn nothing_and_a_lot_can_be_drawn() {
        for seconds in [0.0, 1e-6, 86_400.0] {
            let m = measurement("none", seconds, 1, &[(1, 1, 1), (u64::MAX - 1, u64::MAX, 1 << 40)]);
            texts(&draw(&report(0, vec![m])).unwrap());
            let m = measurement("strict", seconds, 0, &[]);
            texts(&draw(&report(0, vec![m])).unwrap());
        }
    }
}
