//! The progress line on standard error, and messages above it.
//!
//! Contract: there is at most one line in a process, and none when standard error is no terminal.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::{IsTerminal, Write};
use std::sync::OnceLock;
use std::time::Duration;

/// The line, for messages to go above it.
static LINE: OnceLock<ProgressBar> = OnceLock::new();

/// Standard error, with the line out of the way: for log messages.
pub(crate) fn above() -> impl Write {
    struct Above;
    impl Write for Above {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            match LINE.get() {
                Some(bar) => bar.suspend(|| std::io::stderr().write_all(bytes))?,
                None => std::io::stderr().write_all(bytes)?,
            }
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            std::io::stderr().flush()
        }
    }
    std::io::LineWriter::new(Above)
}

/// A line that is drawn again and again, in milliseconds of a length; none when nobody would see it.
pub(crate) fn line(length: Duration) -> Option<&'static ProgressBar> {
    if !std::io::stderr().is_terminal() {
        return None;
    }
    let bar = LINE.get_or_init(|| {
        let target = ProgressDrawTarget::stderr_with_hz(10);
        let bar = ProgressBar::with_draw_target(Some(length.as_millis() as u64), target);
        let style = ProgressStyle::with_template("{spinner:.cyan} {bar:12.cyan/black.bright} {wide_msg}")
            .unwrap_or_else(|_| ProgressStyle::default_bar());
        bar.set_style(style.progress_chars("━╸━"));
        bar
    });
    Some(bar)
}

/// Takes the line away, for good.
pub(crate) fn finish() {
    if let Some(bar) = LINE.get() {
        bar.finish_and_clear();
    }
}
