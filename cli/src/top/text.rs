//! A dataplane as text, for pipes and `--once`.

use super::{View, isolation};
use crate::format::{bps, grouped, long_time, pps, scaled, short_time};
use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use std::io::{self, Write};
use std::time::Duration;

/// A table with a header, all columns but the first aligned to the right.
pub(crate) fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table
        .load_style(presets::UTF8_FULL_CONDENSED.with_rounded_corners())
        .set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(header);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// The first line about a dataplane.
pub(super) fn headline(view: &View) -> String {
    format!(
        "{} · pid {} · up {} · in {} · out {}",
        view.name,
        view.pid,
        long_time(Duration::from_secs_f64(view.uptime_s)),
        pps(view.rx_pps),
        pps(view.tx_pps),
    )
}

/// Rows about workers: name, state, pid, turns a second, busy, free frames, restarts, drops.
pub(super) const WORKER_HEADER: [&str; 8] =
    ["worker", "state", "pid", "turns/s", "busy", "free", "restarts", "dropped"];

pub(super) fn worker_rows(view: &View) -> Vec<[String; 8]> {
    let row = |w: &super::view::Worker| {
        [
            w.name.clone(),
            w.state.to_owned(),
            if w.pid == 0 { "thread".to_owned() } else { w.pid.to_string() },
            scaled(w.turns_per_second).trim_end().to_owned(),
            format!("{:.1} %", w.busy_percent),
            grouped(w.free_frames),
            w.restarts.to_string(),
            grouped(w.drops.values().fold(0, |sum, count| sum.wrapping_add(*count))),
        ]
    };
    view.workers.iter().map(row).collect()
}

/// Rows about ports: name, link, worker, rates in, rates out.
pub(super) const PORT_HEADER: [&str; 7] = ["port", "link", "worker", "in", "in", "out", "out"];

pub(super) fn port_rows(view: &View) -> Vec<[String; 7]> {
    let mut rows = Vec::new();
    for worker in &view.workers {
        for port in &worker.ports {
            let link = view.ports.iter().find(|p| p.name == port.name).map_or("", |p| p.link);
            rows.push([
                port.name.clone(),
                link.to_owned(),
                worker.name.clone(),
                pps(port.rx_pps),
                bps(port.rx_bits_per_second),
                pps(port.tx_pps),
                bps(port.tx_bits_per_second),
            ]);
        }
    }
    rows
}

/// What the kicker does; `None` without one.
pub(super) fn kicker_line(view: &View) -> Option<String> {
    let kicker = view.kicker.as_ref()?;
    let delay = |ns: Option<u64>| ns.map_or_else(|| "-".to_owned(), |ns| format!("< {}", short_time(ns + 1)));
    Some(format!(
        "kicker: {}kicks/s · delay p50 {} · p99 {} · errors {}",
        scaled(kicker.kicks_per_second),
        delay(kicker.delay_p50_ns),
        delay(kicker.delay_p99_ns),
        kicker.errors,
    ))
}

/// Writes everything about a dataplane.
pub(super) fn write(out: &mut impl Write, view: &View) -> io::Result<()> {
    writeln!(out, "{}", headline(view))?;
    let mut workers = table(&WORKER_HEADER);
    workers.add_rows(worker_rows(view));
    writeln!(out, "{workers}")?;
    let mut ports = table(&PORT_HEADER);
    ports.add_rows(port_rows(view));
    writeln!(out, "{ports}")?;
    let mut isolated = table(&isolation::HEADER);
    isolated.add_rows(isolation::rows(view));
    writeln!(out, "{isolated}")?;
    for worker in &view.workers {
        for (title, text) in worker.isolation.iter().flat_map(isolation::Isolation::lines) {
            writeln!(out, "{}: {title}: {text}", worker.name)?;
        }
    }
    let drops = view.drops();
    if drops.is_empty() {
        writeln!(out, "drops: none")?;
    } else {
        let mut table = table(&["dropped because", "frames"]);
        table.add_rows(drops.into_iter().map(|(reason, count)| [reason, grouped(count)]));
        writeln!(out, "{table}")?;
    }
    if let Some(line) = kicker_line(view) {
        writeln!(out, "{line}")?;
    }
    for worker in view.workers.iter().filter(|w| !w.app.is_empty()) {
        let happened = worker.app.iter().filter(|(_, value)| **value > 0);
        let values: Vec<String> =
            happened.map(|(name, value)| format!("{name} {}", grouped(*value))).collect();
        writeln!(out, "{}: {}", worker.name, values.join(" · "))?;
    }
    Ok(())
}
