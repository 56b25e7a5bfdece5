//! What people see: progress on stderr, aligned tables, numbers in human units.
//!
//! No colours are used, so `NO_COLOR` holds by itself. Bars appear only when stderr is a terminal that can move its
//! cursor; anywhere else a long piece of work writes at most one line per ten seconds.

use crate::error::escaped;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// Work shorter than this shows no bar.
const FIRST: Duration = Duration::from_millis(500);
/// Least time between two lines when there is no terminal.
const BETWEEN_LINES: Duration = Duration::from_secs(10);

/// Where progress goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Show {
    /// Nothing is shown.
    Nothing,
    /// A line per ten seconds.
    Lines,
    /// A bar that is redrawn.
    Bars,
}

impl Show {
    /// Bars when stderr is a terminal and `TERM` is not `dumb`, lines otherwise, nothing when `quiet`.
    #[must_use]
    pub fn on_stderr(quiet: bool) -> Self {
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        match () {
            () if quiet => Show::Nothing,
            () if std::io::stderr().is_terminal() && !dumb => Show::Bars,
            () => Show::Lines,
        }
    }
}

/// Progress of one piece of work, with a verb in cargo's manner (`   Importing resnet18.onnx`).
#[derive(Debug)]
pub struct Progress {
    show: Show,
    verb: String,
    total: u64,
    done: u64,
    started: Instant,
    last_line: Instant,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// Starts `total` units of work; a total of 0 means that it is not known.
    #[must_use]
    pub fn start(show: Show, verb: &str, total: u64) -> Self {
        let now = Instant::now();
        Progress {
            show,
            verb: escaped(verb),
            total,
            done: 0,
            started: now,
            last_line: now,
            bar: None,
        }
    }

    /// Says that `done` units are finished, with a short text on the state of things.
    pub fn update(&mut self, done: u64, message: &str) {
        self.done = done;
        match self.show {
            Show::Nothing => {}
            Show::Lines => {
                if self.last_line.elapsed() >= BETWEEN_LINES {
                    self.last_line = Instant::now();
                    say(&line(&self.verb, self.done, self.total, message));
                }
            }
            Show::Bars => {
                if self.bar.is_none() && self.started.elapsed() >= FIRST {
                    self.bar = Some(bar(&self.verb, self.total));
                }
                if let Some(bar) = &self.bar {
                    bar.set_position(done);
                    bar.set_message(escaped(message));
                }
            }
        }
    }

    /// Ends the work and clears the bar.
    pub fn finish(mut self) {
        self.clear();
    }

    fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.clear();
    }
}

fn bar(verb: &str, total: u64) -> ProgressBar {
    let target = ProgressDrawTarget::stderr_with_hz(10);
    if total == 0 {
        let bar = ProgressBar::with_draw_target(None, target);
        if let Ok(style) = ProgressStyle::with_template("{prefix:>12} {spinner} {pos}  {msg}") {
            bar.set_style(style);
        }
        bar.with_prefix(verb.to_owned())
    } else {
        let bar = ProgressBar::with_draw_target(Some(total), target);
        let template = "{prefix:>12} [{bar:24}] {pos}/{len}  {eta} left  {msg}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.with_prefix(verb.to_owned())
    }
}

fn line(verb: &str, done: u64, total: u64, message: &str) -> String {
    let of = if total == 0 { String::new() } else { format!("/{total}") };
    format!("{verb:>12} {done}{of}  {}", escaped(message)).trim_end().to_owned()
}

/// Writes one line to stderr; a closed stderr is not an error.
pub fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Writes one `verb text` line to stderr in cargo's manner, the verb right-aligned to twelve columns.
pub fn say_verb(show: Show, verb: &str, text: &str) {
    if show != Show::Nothing {
        say(&format!("{:>12} {}", escaped(verb), escaped(text)));
    }
}

/// Side to which the cells of a column are pushed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Align {
    /// Text.
    Left,
    /// Numbers.
    Right,
}

/// A table of aligned columns for the terminal. Cells are escaped; when a row is wider than the width given, the
/// widest left-aligned column is cut in the middle of its cells.
#[derive(Debug, Clone)]
pub struct Table {
    columns: Vec<Align>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with its header row.
    #[must_use]
    pub fn new(header: &[(&str, Align)]) -> Self {
        Table {
            columns: header.iter().map(|(_, align)| *align).collect(),
            rows: vec![header.iter().map(|(name, _)| (*name).to_owned()).collect()],
        }
    }

    /// Adds a row; missing cells are empty, surplus ones are dropped.
    pub fn row<S: Into<String>>(&mut self, cells: impl IntoIterator<Item = S>) {
        let mut row: Vec<String> = cells.into_iter().map(|cell| escaped(&cell.into())).collect();
        row.resize(self.columns.len(), String::new());
        self.rows.push(row);
    }

    /// The table as lines, each ended by a line feed, within `width` columns where the text columns can give way.
    #[must_use]
    pub fn render(&self, width: Option<usize>) -> String {
        const GAP: usize = 2;
        const LEAST: usize = 8;
        let mut widths = vec![0; self.columns.len()];
        for row in &self.rows {
            for (wide, cell) in widths.iter_mut().zip(row) {
                *wide = (*wide).max(cell.chars().count());
            }
        }
        if let Some(limit) = width {
            let gaps = GAP * widths.len().saturating_sub(1) + 1;
            while widths.iter().sum::<usize>() + gaps > limit {
                let text = (0..widths.len()).filter(|&c| self.columns[c] == Align::Left);
                match text.max_by_key(|&c| widths[c]) {
                    Some(c) if widths[c] > LEAST => widths[c] -= 1,
                    _ => break,
                }
            }
        }
        let mut out = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for ((cell, wide), align) in row.iter().zip(&widths).zip(&self.columns) {
                let cell = cut_middle(cell, *wide);
                let fill = " ".repeat(wide - cell.chars().count());
                line.push_str(if line.is_empty() { " " } else { "  " });
                match align {
                    Align::Left => line.extend([cell, fill]),
                    Align::Right => line.extend([fill, cell]),
                }
            }
            out.push_str(line.trim_end());
            out.push('\n');
        }
        out
    }
}

/// `text` in at most `width` characters, cut in the middle: names differ at their ends.
#[must_use]
pub fn cut_middle(text: &str, width: usize) -> String {
    let chars: Vec<char> = text.chars().collect();
    if chars.len() <= width {
        return text.to_owned();
    }
    if width < 3 {
        return chars[..width].iter().collect();
    }
    let head = (width - 1) / 2;
    let tail = width - 1 - head;
    chars[..head].iter().chain(['…'].iter()).chain(&chars[chars.len() - tail..]).collect()
}

/// Columns for a table on stdout: `COLUMNS` when it is set, else 100; none when stdout is not a terminal, as a file
/// gets whole names.
#[must_use]
pub fn width() -> Option<usize> {
    if !std::io::stdout().is_terminal() {
        return None;
    }
    let columns = std::env::var("COLUMNS").ok().and_then(|text| text.parse::<usize>().ok());
    Some(columns.unwrap_or(100).max(40))
}

/// Bytes in decimal units, three digits or so: `46.8 MB`.
#[must_use]
pub fn bytes(n: u64) -> String {
    scaled(n as f64, &["B", "kB", "MB", "GB", "TB", "PB", "EB"])
}

/// A count with a decimal suffix: `11.7 M`, `950`.
#[must_use]
pub fn count(n: u64) -> String {
    scaled(n as f64, &["", "k", "M", "G", "T", "P", "E"])
}

/// Milliseconds in the unit that reads best: `840 µs`, `84.1 ms`, `21.4 s`, `4:12`.
#[must_use]
pub fn milliseconds(ms: f64) -> String {
    if !ms.is_finite() || ms < 0.0 {
        "-".to_owned()
    } else if ms < 0.9995 {
        format!("{:.0} µs", ms * 1e3)
    } else if ms < 999.5 {
        format!("{} ms", three_digits(ms))
    } else if ms < 99_950.0 {
        format!("{:.1} s", ms / 1e3)
    } else {
        let seconds = (ms / 1e3).round() as u64;
        match seconds / 3600 {
            0 => format!("{}:{:02}", seconds / 60, seconds % 60),
            hours => format!("{hours}:{:02}:{:02}", seconds / 60 % 60, seconds % 60),
        }
    }
}

fn scaled(value: f64, units: &[&str]) -> String {
    let mut value = value;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < units.len() {
        value /= 1e3;
        unit += 1;
    }
    let number = if unit == 0 { format!("{value:.0}") } else { three_digits(value) };
    format!("{number} {}", units[unit]).trim_end().to_owned()
}

fn three_digits(value: f64) -> String {
    match value {
        v if v < 9.995 => format!("{v:.2}"),
        v if v < 99.95 => format!("{v:.1}"),
        v => format!("{v:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_aligns_and_gives_way_to_the_width() {
        let mut table = Table::new(&[("node", Align::Left), ("ms", Align::Right)]);
        table.row(["layer1/block0/conv1", "1.5"]);
        table.row(["fc\u{1b}", "12.25"]);
        assert_eq!(
            table.render(None),
            " node                    ms\n layer1/block0/conv1    1.5\n fc\\u{1b}             12.25\n"
        );
        let narrow = table.render(Some(20));
        assert!(narrow.lines().all(|line| line.chars().count() <= 20), "{narrow}");
        assert!(narrow.contains("layer…conv1") || narrow.contains('…'), "{narrow}");
    }

    #[test]
    fn numbers_read_well() {
        assert_eq!(bytes(46_800_000), "46.8 MB");
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(999_600), "1.00 MB");
        assert_eq!(count(11_690_000), "11.7 M");
        assert_eq!(milliseconds(0.84), "840 µs");
        assert_eq!(milliseconds(84.13), "84.1 ms");
        assert_eq!(milliseconds(21_400.0), "21.4 s");
        assert_eq!(milliseconds(252_000.0), "4:12");
        assert_eq!(milliseconds(f64::NAN), "-");
    }

    #[test]
    fn lines_state_verb_and_position() {
        assert_eq!(line("Scoring", 3, 62, "conv\n1"), "     Scoring 3/62  conv\\n1");
        assert_eq!(line("Scoring", 3, 0, ""), "     Scoring 3");
        let mut progress = Progress::start(Show::Lines, "Scoring", 5);
        progress.update(1, "");
        assert!(progress.bar.is_none());
        progress.finish();
    }

    #[test]
    fn names_are_cut_in_the_middle() {
        assert_eq!(cut_middle("abcdefgh", 5), "ab…gh");
        assert_eq!(cut_middle("abc", 5), "abc");
        assert_eq!(cut_middle("abcdef", 2), "ab");
    }
}
