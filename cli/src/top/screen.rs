//! The live screen of `isoplane top`.

use super::view::View;
use super::{Args, Watched, isolation, search, text};
use crate::format::{grouped, pps};
use ratatui::Frame;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style, Stylize};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, BorderType, Cell, Padding, Paragraph, Row, Sparkline, Table, Wrap};
use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Rates remembered for the curve, and so its greatest width.
const HISTORY: usize = 400;
/// How often a key or a signal is looked for.
const KEY: Duration = Duration::from_millis(50);

struct Watch {
    watched: Watched,
    rates: VecDeque<u64>,
}

/// How it is looked at.
#[derive(Debug, Clone, Copy, Default)]
struct Look {
    /// The numbers stand still.
    paused: bool,
    /// Isolation in full, by cause, instead of traffic.
    isolation: bool,
}

/// Watches until a key or a signal ends it, or the last dataplane has ended.
pub(super) fn run(
    args: &Args,
    watched: Vec<Watched>,
    interval: Duration,
    stop: &AtomicBool,
) -> io::Result<()> {
    let mut all: Vec<Watch> =
        watched.into_iter().map(|watched| Watch { watched, rates: VecDeque::new() }).collect();
    let mut shown = 0;
    let mut look = Look::default();
    // Puts the terminal back also after a panic.
    let mut terminal = ratatui::try_init()?;
    let result = (|| {
        let mut next = Instant::now() + Duration::from_millis(200).min(interval);
        loop {
            if let Some(watch) = all.get(shown) {
                let view = watch.watched.view();
                let (place, gone) = ((shown, all.len()), !watch.watched.runs());
                terminal.draw(|frame| draw(frame, &view, &watch.rates, place, look, gone))?;
            }
            while Instant::now() < next {
                if stop.load(Ordering::Relaxed) {
                    return Ok(());
                }
                if !event::poll(KEY.min(next.saturating_duration_since(Instant::now())))? {
                    continue;
                }
                match event::read()? {
                    Event::Key(key) if key.kind != KeyEventKind::Release => match key.code {
                        KeyCode::Char('q') | KeyCode::Esc => return Ok(()),
                        KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => {
                            return Ok(());
                        }
                        KeyCode::Tab | KeyCode::Right => shown = (shown + 1) % all.len().max(1),
                        KeyCode::BackTab | KeyCode::Left => {
                            shown = (shown + all.len().saturating_sub(1)) % all.len().max(1);
                        }
                        KeyCode::Char(' ') => look.paused = !look.paused,
                        KeyCode::Char('i') => look.isolation = !look.isolation,
                        _ => continue,
                    },
                    Event::Resize(..) => {}
                    _ => continue,
                }
                break;
            }
            if Instant::now() < next {
                continue;
            }
            next = Instant::now() + interval;
            if look.paused {
                continue;
            }
            refresh(args, &mut all, &mut shown)?;
        }
    })();
    ratatui::try_restore()?;
    result
}

/// Looks again; adds dataplanes that were launched, and lets go of those that have ended unless it
/// would leave nothing to see.
fn refresh(args: &Args, all: &mut Vec<Watch>, shown: &mut usize) -> io::Result<()> {
    for watch in all.iter_mut() {
        watch.watched.look();
        if watch.rates.len() == HISTORY {
            watch.rates.pop_front();
        }
        watch.rates.push_back(watch.watched.view().tx_pps as u64);
    }
    for found in search(args).map_err(|e| io::Error::other(e.to_string()))? {
        let key = |w: &Watched| (w.found.pid, w.found.reader.created_unix_ns());
        if !all.iter().any(|watch| key(&watch.watched) == key(&found)) {
            all.push(Watch { watched: found, rates: VecDeque::new() });
        }
    }
    if all.iter().any(|watch| watch.watched.runs()) {
        let pid = all.get(*shown).map(|watch| watch.watched.found.pid);
        all.retain(|watch| watch.watched.runs());
        *shown = all.iter().position(|w| Some(w.watched.found.pid) == pid).unwrap_or(0);
    }
    Ok(())
}

fn draw(
    frame: &mut Frame<'_>,
    view: &View,
    rates: &VecDeque<u64>,
    (shown, of): (usize, usize),
    look: Look,
    gone: bool,
) {
    let [top, middle, kicker, foot] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Fill(1),
        Constraint::Length(u16::from(view.kicker.is_some())),
        Constraint::Length(1),
    ])
    .areas(frame.area());

    let mark = if gone {
        " ENDED ".bold().black().on_red()
    } else if look.paused {
        " PAUSED ".bold().black().on_yellow()
    } else {
        " LIVE ".bold().black().on_green()
    };
    let which = if of > 1 { format!(" {}/{of}", shown + 1) } else { String::new() };
    // What may be cut off comes last.
    let title = vec![mark, which.dim(), " ".into(), Span::raw(text::headline(view))];
    frame.render_widget(Line::from(title), top);

    if look.isolation {
        draw_isolation(frame, middle, view);
    } else {
        draw_traffic(frame, middle, view, rates);
    }

    // Its delay is part of each packet's way, so it has a line that nothing else can push away.
    if let Some(line) = text::kicker_line(view) {
        frame.render_widget(Line::from(format!(" {line}")), kicker);
    }
    let other = if look.isolation { " traffic" } else { " isolation by cause" };
    let mut keys =
        vec![" q".bold(), " quit  ".dim(), "space".bold(), " pause  ".dim(), "i".bold(), other.dim()];
    if of > 1 {
        keys.extend(["  tab".bold(), " next dataplane".dim()]);
    }
    frame.render_widget(Line::from(keys), foot);
}

fn draw_traffic(frame: &mut Frame<'_>, area: Rect, view: &View, rates: &VecDeque<u64>) {
    let drops = view.drops();
    let app_lines = view.workers.iter().filter(|w| !w.app.is_empty()).count();
    // An app's counters may need a second line.
    let side = lines(drops.len().max(2 * app_lines).max(1));
    let workers = lines(view.workers.len());
    let ports = lines(view.workers.iter().map(|w| w.ports.len()).sum());
    let [curve, worker_area, isolation_area, port_area, bottom] = Layout::vertical([
        Constraint::Min(3),
        Constraint::Length(workers + 3),
        Constraint::Length(workers + 3),
        Constraint::Length(ports + 3),
        Constraint::Length(side + 2),
    ])
    .areas(area);

    draw_curve(frame, curve, view, rates);
    draw_table(
        frame,
        worker_area,
        "workers",
        &text::WORKER_HEADER,
        text::worker_rows(view).iter().map(<[String; 8]>::as_slice),
        &[10, 9, 8, 9, 8, 7, 8, 9],
    );
    draw_isolation_table(frame, isolation_area, view);
    draw_table(
        frame,
        port_area,
        "ports",
        &text::PORT_HEADER,
        text::port_rows(view).iter().map(<[String; 7]>::as_slice),
        &[11, 6, 8, 10, 11, 10, 11],
    );
    let [left, right] = Layout::horizontal([Constraint::Percentage(40), Constraint::Fill(1)]).areas(bottom);
    let lines: Vec<Line<'_>> = if drops.is_empty() {
        vec!["none".green().into()]
    } else {
        let line = |(reason, count): (String, u64)| {
            Line::from(vec![format!("{:>14}  ", grouped(count)).yellow(), reason.into()])
        };
        drops.into_iter().map(line).collect()
    };
    frame.render_widget(Paragraph::new(lines).block(panel("drops by reason")), left);
    let mut lines: Vec<Line<'_>> = Vec::new();
    for worker in view.workers.iter().filter(|w| !w.app.is_empty()) {
        let mut spans = vec![format!("{}  ", worker.name).bold()];
        for (name, value) in worker.app.iter().filter(|(_, value)| **value > 0) {
            spans.push(format!("{name} ").dim());
            spans.push(format!("{}  ", grouped(*value)).into());
        }
        lines.push(spans.into());
    }
    let counters = Paragraph::new(lines).wrap(Wrap { trim: true }).block(panel("app counters"));
    frame.render_widget(counters, right);
}

fn draw_isolation_table(frame: &mut Frame<'_>, area: Rect, view: &View) {
    let rows = isolation::rows(view);
    draw_table(
        frame,
        area,
        "isolation",
        &isolation::HEADER,
        rows.iter().map(<[String; 9]>::as_slice),
        &[6, 8, 9, 8, 11, 6, 6, 7, 7],
    );
}

/// Every worker's isolation in full.
fn draw_isolation(frame: &mut Frame<'_>, area: Rect, view: &View) {
    let [table, rest] =
        Layout::vertical([Constraint::Length(lines(view.workers.len()) + 3), Constraint::Fill(1)])
            .areas(area);
    draw_isolation_table(frame, table, view);
    let mut lines: Vec<Line<'_>> = Vec::new();
    // No screen shows more workers than it has lines.
    for worker in view.workers.iter().take(usize::from(area.height)) {
        lines.push(worker.name.clone().bold().into());
        match &worker.isolation {
            Some(isolation) => lines.extend(
                isolation
                    .lines()
                    .into_iter()
                    .map(|(title, text)| Line::from(vec![format!("  {title:<14} ").dim(), Span::raw(text)])),
            ),
            None => lines.push("  not isolated".into()),
        }
    }
    let detail = Paragraph::new(lines).wrap(Wrap { trim: false }).block(panel("isolation by cause"));
    frame.render_widget(detail, rest);
}

/// Lines to ask for; no screen has more.
fn lines(count: usize) -> u16 {
    u16::try_from(count).unwrap_or(u16::MAX).min(1000)
}

fn panel(title: &str) -> Block<'_> {
    Block::bordered()
        .border_type(BorderType::Rounded)
        .border_style(Style::new().fg(Color::DarkGray))
        .title(Span::styled(format!(" {title} "), Style::new().add_modifier(Modifier::BOLD)))
        .padding(Padding::horizontal(1))
}

fn draw_curve(frame: &mut Frame<'_>, area: Rect, view: &View, rates: &VecDeque<u64>) {
    let width = usize::from(area.width.saturating_sub(4));
    let peak = rates.iter().copied().max().unwrap_or(0);
    let title = format!("forwarded: {} now, {} at most", pps(view.tx_pps), pps(peak as f64));
    // The newest rate is at the right end.
    let skip = rates.len().saturating_sub(width);
    let mut data = vec![0; width.saturating_sub(rates.len())];
    data.extend(rates.iter().skip(skip));
    let curve =
        Sparkline::default().block(panel(&title)).data(&data).max(peak.max(1)).style(Style::new().cyan());
    frame.render_widget(curve, area);
}

fn draw_table<'a>(
    frame: &mut Frame<'_>,
    area: Rect,
    title: &str,
    header: &[&'static str],
    rows: impl Iterator<Item = &'a [String]>,
    widths: &[u16],
) {
    let right = |at: usize, text: &str| -> Cell<'static> {
        let line = Line::from(text.to_owned());
        // Names and states are words; everything after them is a number.
        Cell::from(if at < 3 { line } else { line.right_aligned() })
    };
    let header = Row::new(header.iter().enumerate().map(|(at, text)| right(at, text)))
        .style(Style::new().add_modifier(Modifier::DIM));
    let rows = rows.map(|row| {
        let paint = |(at, text): (usize, &String)| {
            let style = match text.as_str() {
                "running" | "up" => Style::new().fg(Color::Green),
                "dead" | "given up" | "gone" | "down" => Style::new().fg(Color::Red),
                _ if at == 0 => Style::new().add_modifier(Modifier::BOLD),
                _ => Style::new(),
            };
            right(at, text).style(style)
        };
        Row::new(row.iter().enumerate().map(paint))
    });
    let widths = widths.iter().enumerate().map(|(at, width)| match at {
        0 => Constraint::Min(*width),
        _ => Constraint::Length(*width),
    });
    let table = Table::new(rows, widths).header(header).block(panel(title)).column_spacing(1);
    frame.render_widget(table, area);
}

#[cfg(test)]
mod tests {
    use super::super::isolation::{Count, Entries, Isolation, SlowPath};
    use super::super::view::{Kicker, Port, Worker, WorkerPort};
    use super::*;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    fn sample(value: u64) -> View {
        let ports = ["to-client", "to-server"];
        let worker_port = |name: &str| WorkerPort {
            name: name.to_owned(),
            rx_frames: value,
            tx_frames: value,
            rx_pps: value as f64,
            tx_pps: value as f64,
            ..WorkerPort::default()
        };
        let entries = |cause| Entries {
            total: value,
            per_second: value as f64,
            by_cause: [(cause, Count { total: value, per_second: value as f64 })].into(),
        };
        let isolation = Isolation {
            backend: "dispatch",
            state: "slow path",
            armed: value,
            breaches: entries("syscall"),
            interruptions: entries("timer_tick"),
            slow_path: SlowPath { visits: value, longest_ns: Some(value), ..SlowPath::default() },
            ..Isolation::default()
        };
        View {
            name: "demo".to_owned(),
            pid: 4711,
            uptime_s: 83.0,
            interval_s: 1.0,
            rx_pps: value as f64,
            tx_pps: value as f64,
            workers: vec![Worker {
                name: "bridge".to_owned(),
                state: "running",
                pid: value,
                turns: value,
                free_frames: value,
                drops: [("policy".to_owned(), value), ("storm".to_owned(), value)].into(),
                ports: ports.map(worker_port).into(),
                app: [("stations".to_owned(), value)].into(),
                isolation: Some(isolation),
                ..Worker::default()
            }],
            ports: ports.map(|name| Port { name: name.to_owned(), link: "up", ..Port::default() }).into(),
            kicker: Some(Kicker {
                kicks_per_second: value as f64,
                delay_p50_ns: Some((1 << 14) - 1),
                delay_p99_ns: Some((1 << 18) - 1),
                ..Kicker::default()
            }),
        }
    }

    /// What is on a screen of this size, line by line.
    fn screen(width: u16, height: u16, view: &View, rates: &[u64]) -> String {
        looked_at(Look::default(), width, height, view, rates)
    }

    fn looked_at(look: Look, width: u16, height: u16, view: &View, rates: &[u64]) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        let rates = rates.iter().copied().collect();
        terminal.draw(|frame| draw(frame, view, &rates, (1, 3), look, false)).unwrap();
        let cells = terminal.backend().buffer().content();
        let line = |cells: &[ratatui::buffer::Cell]| cells.iter().map(|c| c.symbol()).collect::<String>();
        cells.chunks(usize::from(width)).map(line).collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn a_usual_terminal_shows_everything() {
        let text = screen(80, 24, &sample(1234), &[500, 1000, 1234]);
        for part in [
            "LIVE",
            "demo",
            "pid 4711",
            "2/3",
            "bridge",
            "running",
            "to-client",
            "to-server",
            "1.23 kpps",
            "policy",
            "storm",
            "1,234",
            "stations",
            "quit",
            "kicker: 1.23 kkicks/s · delay p50 < 16.4 µs · p99 < 262 µs · errors 0",
            "worker backend  state     breaches interrupted     /s visits longest  lost/s",
            "bridge dispatch slow path    1,234       1,234 1.23 k  1,234 1.23 µs    0 ns",
        ] {
            assert!(text.contains(part), "{part} is not in:\n{text}");
        }
    }

    #[test]
    fn isolation_in_full_is_a_key_away() {
        let look = Look { isolation: true, ..Look::default() };
        let text = looked_at(look, 80, 24, &sample(1234), &[]);
        for part in [
            "bridge dispatch slow path",
            "backend dispatch · state slow path · armed 1,234 times",
            "breaches       1,234: syscall 1,234 (1.23 k/s)",
            "interruptions  1,234: timer_tick 1,234 (1.23 k/s)",
            "1,234 visits · mean - · longest 1.23 µs",
            "run delay 0 ns · steal 0 ns",
            "kicker:",
            "i traffic",
        ] {
            assert!(text.contains(part), "{part} is not in:\n{text}");
        }
        let mut many = sample(u64::MAX);
        many.workers = vec![many.workers[0].clone(); 40_000];
        many.workers[0].isolation = None;
        for (width, height) in [(1, 1), (80, 1), (1, 24), (3, 3), (200, 60)] {
            looked_at(look, width, height, &many, &[]);
        }
    }

    #[test]
    fn a_tiny_terminal_shows_what_fits() {
        let text = screen(20, 5, &sample(1234), &[500, 1000]);
        assert!(text.contains("LIVE") && text.contains("demo"), "{text}");
        for (width, height) in [(1, 1), (80, 1), (1, 24), (3, 3)] {
            screen(width, height, &sample(1234), &[1; 400]);
        }
    }

    #[test]
    fn no_numbers_and_no_names_are_too_much() {
        let text = screen(80, 24, &sample(u64::MAX), &[u64::MAX; 400]);
        assert!(text.contains("bridge"), "{text}");
        let mut many = sample(u64::MAX);
        many.workers = vec![many.workers[0].clone(); 40_000];
        screen(80, 24, &many, &[]);
        let none = View { workers: vec![], ports: vec![], kicker: None, ..sample(0) };
        let text = screen(80, 24, &none, &[]);
        assert!(text.contains("none"), "{text}");
    }
}
