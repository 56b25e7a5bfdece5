//! Tables of numbers as text. Cells are divided by the first of tab, comma, semicolon and space that the first line has.

use super::array::Array;
use super::source::over_limit;
use crate::error::{Code, Error, Result};
use std::io::{BufRead, Read};

/// Most columns of a table.
const COLUMN_LIMIT: usize = 1 << 20;
/// Longest first line.
const LINE_LIMIT: u64 = 64 << 20;

/// A table's columns as arrays.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// All columns but the label, f32 [samples, columns].
    pub x: Array,
    /// Names of the columns of `x`; empty without a header line.
    pub names: Vec<String>,
    /// The label column, `[samples]`: i64 when every value is an integer, f32 otherwise.
    pub label: Option<Array>,
}

/// Which column holds the label.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum LabelColumn {
    /// The column called `label`, `target` or `class`, else the last one.
    #[default]
    Usual,
    /// The column with this name, or with this number counted from 0 (-1 is the last one).
    Called(String),
    /// None has.
    Absent,
}

/// Reads a table whose numbers take at most `limit` bytes.
///
/// The first line is a header when a cell of it is not a number. scikit-learn's tables begin with their extents and
/// class names instead (`178,13,class_0,...`): such a line, when it does not have as many cells as the next, is
/// skipped.
///
/// # Errors
/// [`Code::DataFormat`] with line and column; [`Code::DataName`] when the label column is not there.
pub fn read(reader: &mut dyn BufRead, label: &LabelColumn, limit: u64) -> Result<Table> {
    let mut first = Vec::new();
    let got = (&mut *reader).take(LINE_LIMIT).read_until(b'\n', &mut first);
    let got = got.map_err(|e| super::source::content_error(&e))?;
    if got as u64 == LINE_LIMIT {
        return Err(over_limit("the first line is", LINE_LIMIT));
    }
    // Spreadsheets mark UTF-8 files with U+FEFF.
    if first.starts_with("\u{feff}".as_bytes()) {
        first.drain(..3);
    }
    let delimiter = *b"\t,; ".iter().find(|mark| first.contains(mark)).unwrap_or(&b',');
    let mut records = csv::ReaderBuilder::new()
        .has_headers(false)
        .flexible(true)
        .delimiter(delimiter)
        .trim(csv::Trim::All)
        .from_reader(first.as_slice().chain(reader));
    let mut record = csv::StringRecord::new();
    let mut header: Option<Vec<String>> = None;
    let mut values: Vec<f32> = Vec::new();
    // Label values may need more bits than f32 has.
    let mut labels: Vec<f64> = Vec::new();
    let mut columns: Option<(usize, Option<usize>)> = None;
    while records.read_record(&mut record).map_err(|e| csv_error(&e))? {
        let line = record.position().map_or(0, csv::Position::line);
        if columns.is_none() {
            if record.len() > COLUMN_LIMIT {
                return Err(over_limit("the number of columns is", COLUMN_LIMIT as u64));
            }
            let numbers = record.iter().all(|cell| cell.parse::<f64>().is_ok());
            if !numbers && header.is_none() {
                header = Some(record.iter().map(str::to_owned).collect());
                continue;
            }
            if header.as_ref().is_some_and(|names| is_extents(names, record.len())) {
                header = None;
            }
            columns = Some((record.len(), label_column(label, header.as_deref(), record.len())?));
        }
        let Some((wanted, label)) = columns else { continue };
        let names = header.as_ref().map_or(wanted, Vec::len);
        if record.len() != wanted || names != wanted {
            let cause =
                format!("line {line} has {} cells, the one before it {names}", record.len());
            return Err(Error::new(Code::DataFormat, cause));
        }
        for (column, cell) in record.iter().enumerate() {
            let number: f64 = cell.parse().map_err(|_| {
                let cause = format!(
                    "line {line}, column {}: `{}` is not a number",
                    column + 1,
                    shown(cell)
                );
                Error::new(Code::DataFormat, cause)
            })?;
            if Some(column) == label {
                labels.push(number);
            } else {
                values.push(number as f32);
            }
        }
        if 4 * values.len() as u64 + 8 * labels.len() as u64 > limit {
            return Err(over_limit("the table is", limit));
        }
    }
    let Some((width, label)) = columns else {
        return Err(Error::new(Code::DataEmpty, "the table has no line of numbers"));
    };
    let mut names = header.unwrap_or_default();
    if let Some(label) = label
        && label < names.len()
    {
        names.remove(label);
    }
    let width = width - usize::from(label.is_some());
    let samples = if label.is_some() { labels.len() } else { values.len() / width.max(1) };
    let x = Array::from_f32(vec![samples, width], &values)?;
    let label = label.map(|_| label_array(&labels)).transpose()?;
    Ok(Table { x, names, label })
}

/// Whether a first line is scikit-learn's: samples, features, then class names, over rows of features and a target.
fn is_extents(names: &[String], columns: usize) -> bool {
    let number = |i: usize| names.get(i).and_then(|name| name.parse::<usize>().ok());
    number(0).is_some()
        && number(1).is_some_and(|features| features.checked_add(1) == Some(columns))
}

fn label_column(
    label: &LabelColumn,
    names: Option<&[String]>,
    columns: usize,
) -> Result<Option<usize>> {
    let names = names.unwrap_or_default();
    let find = |wanted: &str| names.iter().position(|name| name == wanted);
    match label {
        LabelColumn::Absent => Ok(None),
        LabelColumn::Usual => {
            let called = ["label", "target", "class"].iter().find_map(|name| find(name));
            Ok(called.or((columns > 1).then(|| columns - 1)))
        }
        LabelColumn::Called(wanted) => {
            let number = wanted.parse::<i64>().ok().and_then(|number| {
                let from_end = if number < 0 { columns as i64 } else { 0 };
                usize::try_from(number.checked_add(from_end)?).ok()
            });
            let column = find(wanted).or(number.filter(|&number| number < columns));
            column.map(Some).ok_or_else(|| {
                Error::new(Code::DataName, format!("the table has no column `{wanted}`"))
                    .did_you_mean(wanted, names.iter().map(String::as_str))
                    .help(format!(
                        "`:label=` takes a name of the header line or a number from 0 to {}",
                        columns - 1
                    ))
            })
        }
    }
}

fn label_array(labels: &[f64]) -> Result<Array> {
    // Up to 2^53 every integer is a f64.
    let whole = |v: f64| v.fract() == 0.0 && v.abs() <= 9_007_199_254_740_992.0;
    if labels.iter().all(|&v| whole(v)) {
        let integers: Vec<i64> = labels.iter().map(|&v| v as i64).collect();
        Array::from_i64(vec![labels.len()], &integers)
    } else {
        let numbers: Vec<f32> = labels.iter().map(|&v| v as f32).collect();
        Array::from_f32(vec![labels.len()], &numbers)
    }
}

fn shown(cell: &str) -> String {
    crate::terminal::cut_middle(cell, 40)
}

fn csv_error(source: &csv::Error) -> Error {
    match source.kind() {
        csv::ErrorKind::Io(io) => super::source::content_error(io),
        csv::ErrorKind::Utf8 { pos, .. } => {
            let line = pos.as_ref().map_or(0, csv::Position::line);
            Error::new(Code::DataFormat, format!("line {line} is not text"))
        }
        _ => Error::new(Code::DataFormat, format!("malformed table: {source}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(text: &str, label: &LabelColumn) -> Result<Table> {
        read(&mut text.as_bytes(), label, 1 << 20)
    }

    #[test]
    fn reads_with_and_without_header() {
        let bare = table("1,2.5,0\n3,4,1\n", &LabelColumn::Usual).unwrap();
        assert_eq!(bare.x, Array::from_f32(vec![2, 2], &[1.0, 2.5, 3.0, 4.0]).unwrap());
        assert_eq!(bare.label.unwrap().to_i64().unwrap(), [0, 1]);
        let named = table("a\ttarget\tb\r\n1\t0.5\t2\r\n", &LabelColumn::Usual).unwrap();
        assert_eq!(named.names, ["a", "b"]);
        assert_eq!(named.x.to_f32().unwrap(), [1.0, 2.0]);
        assert_eq!(named.label.unwrap().to_f32().unwrap(), [0.5]);
        assert_eq!(table("1; 2\n3; 4", &LabelColumn::Absent).unwrap().x.shape, [2, 2]);
        assert_eq!(table("1 2\n3 4", &LabelColumn::Absent).unwrap().x.shape, [2, 2]);
        let first = table("\u{feff}a,b\n7,8\n", &LabelColumn::Called("a".to_owned())).unwrap();
        assert_eq!(first.label.unwrap().to_i64().unwrap(), [7]);
        let number = table("7,8\n", &LabelColumn::Called("-2".to_owned())).unwrap();
        assert_eq!(number.label.unwrap().to_i64().unwrap(), [7]);
        let none = table("7,8\n", &LabelColumn::Absent).unwrap();
        assert_eq!((none.x.shape, none.label), (vec![1, 2], None));
    }

    #[test]
    fn skips_the_extents_of_scikit_learn() {
        let wine = table("2,3,class_0,class_1\n1,2,3,0\n4,5,6,1\n", &LabelColumn::Usual).unwrap();
        assert_eq!((wine.x.shape, wine.names.len()), (vec![2, 3], 0));
    }

    #[test]
    fn refuses_bad_tables() {
        let cases = [
            ("1,2\n3\n", Code::DataFormat, "line 2 has 1 cells"),
            ("a,b\n1,2,3\n", Code::DataFormat, "line 2 has 3 cells"),
            ("1,2\n3,\n", Code::DataFormat, "line 2, column 2: `` is not a number"),
            ("1,2\n3,red\n", Code::DataFormat, "`red` is not a number"),
            ("a,b\nc,d\n", Code::DataFormat, "line 2, column 1: `c`"),
            ("a,b\n", Code::DataEmpty, "no line of numbers"),
        ];
        for (text, code, words) in cases {
            let error = table(text, &LabelColumn::Usual).unwrap_err();
            assert_eq!(error.code(), code, "{error}");
            assert!(error.cause().contains(words), "{error}");
        }
        let error = table("age,b\n1,2\n", &LabelColumn::Called("agge".to_owned())).unwrap_err();
        assert_eq!(error.help_lines()[0], "did you mean `age`?");
        let small = read(&mut "1,2\n3,4\n".as_bytes(), &LabelColumn::Usual, 12).unwrap_err();
        assert_eq!(small.code(), Code::Limit);
        assert!(read(&mut &b"1,\xff\n"[..], &LabelColumn::Usual, 12).is_err());
    }
}
