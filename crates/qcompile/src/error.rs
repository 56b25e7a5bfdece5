//! The driver's error: what went wrong, where, and what to do about it.
//!
//! Every error has a [`Code`] (`QC0501`), and the code decides the process's [`Exit`] status, so the same mistake
//! always ends the same way. Names that come from files are escaped on output: a hostile tensor name must not drive
//! the terminal or forge a line of the message.

use std::fmt;

/// Result of the driver's functions.
pub type Result<T> = std::result::Result<T, Error>;

/// Exit status of the `qcompile` command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Exit {
    /// Done.
    Done = 0,
    /// A gate failed (`diff`, `eval --min`, `bench --fail-below`).
    GateFailed = 1,
    /// Wrong usage or configuration.
    Usage = 2,
    /// Input refused: malformed, unsupported or unsafe.
    Refused = 3,
    /// Training diverged.
    Diverged = 4,
    /// Out of memory or disk, or a limit was reached.
    Limit = 5,
    /// A peer was lost or timed out.
    PeerLost = 6,
    /// Internal error: a bug of qcompile.
    Internal = 70,
    /// Reading or writing failed.
    Io = 74,
}

impl Exit {
    /// The number given to the operating system.
    #[must_use]
    pub fn status(self) -> u8 {
        self as u8
    }
}

macro_rules! codes {
    ($($variant:ident = $text:literal, $exit:ident, $meaning:literal;)*) => {
        /// Code of an error. The first two digits give the area: 01 file and format, 02 operator, shape and gradient,
        /// 03 precision, 04 plan, 05 data, 06 training numerics, 07 distributed, 08 resources, 09 usage, 0A internal.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Code { $(#[doc = $meaning] $variant,)* }

        impl Code {
            /// Every code there is, in order.
            pub const ALL: &'static [Code] = &[$(Code::$variant,)*];

            /// The printed form, for example `QC0501`.
            #[must_use]
            pub fn text(self) -> &'static str {
                match self { $(Code::$variant => $text,)* }
            }

            /// The exit status that goes with the code.
            #[must_use]
            pub fn exit(self) -> Exit {
                match self { $(Code::$variant => Exit::$exit,)* }
            }

            /// One line on what the code means.
            #[must_use]
            pub fn meaning(self) -> &'static str {
                match self { $(Code::$variant => $meaning,)* }
            }
        }
    };
}

codes! {
    ModelFormat = "QC0101", Refused, "The model file is malformed, truncated or unsafe.";
    ModelUnsupported = "QC0201", Refused, "The model holds operators or types that are not supported.";
    ModelShape = "QC0202", Refused, "A shape of the model is inconsistent or not known.";
    NoGradient = "QC0213", Refused, "An operator on the way from the loss has no gradient.";
    Precision = "QC0301", Refused, "No assignment of precisions meets the demands.";
    PlanFormat = "QC0401", Refused, "The plan file is foreign, damaged or of another version.";
    PlanMismatch = "QC0402", Refused, "The plan does not suit what was asked of it.";
    CheckpointFormat = "QC0403", Refused, "A checkpoint is damaged, or of another plan.";
    DataFormat = "QC0501", Refused, "A data file is malformed or truncated.";
    DataUnsupported = "QC0502", Refused, "A data file is of a kind that is not read.";
    DataName = "QC0503", Refused, "Arrays of the data and inputs of the model do not match by name.";
    DataShape = "QC0504", Refused, "An array does not have the shape that is wanted.";
    DataType = "QC0505", Refused, "An array does not have the element type that is wanted.";
    DataNotFinite = "QC0506", Refused, "A sample holds a value that is NaN or infinite.";
    DataLabel = "QC0507", Refused, "A label is out of the range of the classes.";
    DataEmpty = "QC0508", Refused, "The data holds no samples, or fewer than are wanted.";
    DataIndex = "QC0509", Refused, "An index is out of the range of its table.";
    Diverged = "QC0601", Diverged, "The loss is no longer finite.";
    PeerLost = "QC0701", PeerLost, "A worker was lost or timed out.";
    Limit = "QC0801", Limit, "A limit on memory, size or time was reached.";
    ReadFailed = "QC0802", Io, "A file could not be read.";
    WriteFailed = "QC0803", Io, "A file could not be written.";
    MemoryLimit = "QC0804", Limit, "No plan of the model takes as little memory as is allowed.";
    Usage = "QC0901", Usage, "An option or argument is wrong.";
    GateFailed = "QC0902", GateFailed, "A demanded bound was not met.";
    Internal = "QC0A01", Internal, "Internal error: a bug of qcompile.";
}

/// An error of the driver. Displays as
///
/// ```text
/// error[QC0504]: array `x` has shape [10, 5], the model wants [batch, 4]
///   --> train.npz
///   = help: ...
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    code: Code,
    // Boxed: the error travels in every Result of the driver.
    text: Box<Text>,
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Text {
    cause: String,
    places: Vec<String>,
    help: Vec<String>,
    notes: Vec<String>,
}

impl Error {
    /// An error with its one-sentence cause.
    pub fn new(code: Code, cause: impl Into<String>) -> Self {
        Error { code, text: Box::new(Text { cause: cause.into(), ..Text::default() }) }
    }

    /// Wrong usage of the command line (exit 2).
    pub fn usage(cause: impl Into<String>) -> Self {
        Error::new(Code::Usage, cause)
    }

    /// A failed read of `place` (exit 74).
    pub fn read(place: impl Into<String>, source: &std::io::Error) -> Self {
        Error::new(Code::ReadFailed, format!("cannot read: {source}")).at(place)
    }

    /// A failed write of `place` (exit 74; exit 5 where the disk is full).
    pub fn write(place: impl Into<String>, source: &std::io::Error) -> Self {
        let full = matches!(
            source.kind(),
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded
        );
        let code = if full { Code::Limit } else { Code::WriteFailed };
        Error::new(code, format!("cannot write: {source}")).at(place)
    }

    /// Adds a place: a file, or a node or value in ONNX terms.
    #[must_use]
    pub fn at(mut self, place: impl Into<String>) -> Self {
        self.text.places.push(place.into());
        self
    }

    /// Adds a line on what to do.
    #[must_use]
    pub fn help(mut self, line: impl Into<String>) -> Self {
        self.text.help.push(line.into());
        self
    }

    /// Adds a line of background, such as what stayed untouched.
    #[must_use]
    pub fn note(mut self, line: impl Into<String>) -> Self {
        self.text.notes.push(line.into());
        self
    }

    /// Adds `did you mean` as help when one of `candidates` is near to `name`.
    #[must_use]
    pub fn did_you_mean<'a>(
        self,
        name: &str,
        candidates: impl IntoIterator<Item = &'a str>,
    ) -> Self {
        match nearest(name, candidates) {
            Some(near) => self.help(format!("did you mean `{near}`?")),
            None => self,
        }
    }

    /// The code.
    #[must_use]
    pub fn code(&self) -> Code {
        self.code
    }

    /// The exit status of the process.
    #[must_use]
    pub fn exit(&self) -> Exit {
        self.code.exit()
    }

    /// The cause, unescaped.
    #[must_use]
    pub fn cause(&self) -> &str {
        &self.text.cause
    }

    /// The places, unescaped, in the order they were added.
    #[must_use]
    pub fn places(&self) -> &[String] {
        &self.text.places
    }

    /// The help lines, unescaped.
    #[must_use]
    pub fn help_lines(&self) -> &[String] {
        &self.text.help
    }

    /// The notes, unescaped.
    #[must_use]
    pub fn notes(&self) -> &[String] {
        &self.text.notes
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error[{}]: {}", self.code.text(), escaped(&self.text.cause))?;
        for place in &self.text.places {
            write!(f, "\n  --> {}", escaped(place))?;
        }
        for line in &self.text.help {
            write!(f, "\n  = help: {}", escaped(line))?;
        }
        for line in &self.text.notes {
            write!(f, "\n  = note: {}", escaped(line))?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

/// `text` with control characters (escape sequences, line ends) and the marks that reorder or hide text written as
/// Rust escapes, safe to print on a terminal.
#[must_use]
pub fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        let reorders = matches!(
            c,
            '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}'
        );
        if c.is_control() || reorders {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

/// The candidate nearest to `name` by edit distance, if near enough to be a likely slip: at most a third of the
/// longer name's characters differ. The first of equally near ones wins. Case counts half.
pub fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    // A file may hold any name at all; the distance is quadratic in the length.
    const LONGEST: usize = 128;
    let name: Vec<char> = name.chars().take(LONGEST).collect();
    let mut best: Option<(usize, &'a str)> = None;
    for candidate in candidates {
        let other: Vec<char> = candidate.chars().take(LONGEST).collect();
        let distance = edit_distance(&name, &other);
        let near = 3 * distance <= 2 * name.len().max(other.len());
        if near && best.is_none_or(|(least, _)| distance < least) {
            best = Some((distance, candidate));
        }
    }
    best.map(|(_, candidate)| candidate)
}

/// Optimal string alignment distance in half edits: insert, delete, replace and swap of neighbours cost 2, a change
/// of case 1.
fn edit_distance(a: &[char], b: &[char]) -> usize {
    let mut before: Vec<usize> = Vec::new();
    let mut above: Vec<usize> = (0..=b.len()).map(|j| 2 * j).collect();
    for i in 1..=a.len() {
        let mut row = vec![2 * i];
        for j in 1..=b.len() {
            let (x, y) = (a[i - 1], b[j - 1]);
            let replace = match () {
                () if x == y => 0,
                () if x.eq_ignore_ascii_case(&y) => 1,
                () => 2,
            };
            let mut cost = (above[j - 1] + replace).min(above[j] + 2).min(row[j - 1] + 2);
            if i > 1 && j > 1 && x == b[j - 2] && a[i - 2] == y {
                cost = cost.min(before[j - 2] + 2);
            }
            row.push(cost);
        }
        before = std::mem::replace(&mut above, row);
    }
    above[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn displays_code_cause_places_and_help() {
        let error = Error::new(Code::DataShape, "array `x` is wrong")
            .at("a.npz")
            .help("transpose it")
            .note("nothing was written");
        assert_eq!(
            error.to_string(),
            "error[QC0504]: array `x` is wrong\n  --> a.npz\n  = help: transpose it\n  = note: nothing was written"
        );
        assert_eq!(error.exit().status(), 3);
    }

    #[test]
    fn escapes_what_would_drive_the_terminal() {
        let error = Error::usage("no `\u{1b}[2J\nerror: x\u{202e}` é");
        assert_eq!(error.to_string(), "error[QC0901]: no `\\u{1b}[2J\\nerror: x\\u{202e}` é");
    }

    #[test]
    fn codes_are_distinct_and_ascending() {
        let texts: Vec<_> = Code::ALL.iter().map(|code| code.text()).collect();
        assert!(texts.windows(2).all(|pair| pair[0] < pair[1]), "{texts:?}");
        assert_eq!(Code::Usage.exit().status(), 2);
        assert_eq!(Code::Diverged.exit().status(), 4);
        assert_eq!(Code::Limit.exit().status(), 5);
        assert_eq!(Code::PeerLost.exit().status(), 6);
        assert_eq!(Code::Internal.exit().status(), 70);
        assert_eq!(Code::ReadFailed.exit().status(), 74);
    }

    #[test]
    fn finds_the_nearest_name() {
        let names = ["images", "label", "mask"];
        assert_eq!(nearest("imgaes", names), Some("images"));
        assert_eq!(nearest("Labels", names), Some("label"));
        assert_eq!(nearest("tokens", names), None);
        assert_eq!(nearest("", names), None);
    }
}
