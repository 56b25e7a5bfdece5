//! The text that names data: `train.npz`, `x=images.idx,label=labels.idx`, `file.csv:label=target`.
//!
//! ```text
//! data   = item { "," item }
//! item   = [ NAME "=" ] PATH { ":" option }
//! option = KEY                 the array of an npz archive
//!        | "label=" COLUMN     label column of a table, by header name or number (-1 is the last); "none" for none
//!        | "layout=hwc"        images are height x width x channels
//!        | "channels=" N       the one channel is repeated N times
//!        | "pad=" N            N zeros on each side of height and width
//!        | "scale=" NUMBER     values are multiplied (NUMBER may be a fraction: 1/255)
//!        | "mean=" NUMBERS     then the mean is subtracted (one, or one per channel: 0.5,0.4,0.4)
//!        | "std=" NUMBERS      then divided by the standard deviation
//! ```

use super::table::LabelColumn;
use super::transform::Transform;
use crate::error::{Error, Result};
use std::path::{Path, PathBuf};

/// One file of the data.
#[derive(Debug, Clone, PartialEq)]
pub struct Item {
    /// Name given to the file's array.
    pub name: Option<String>,
    /// The file.
    pub path: PathBuf,
    /// Which array of an npz archive.
    pub key: Option<String>,
    /// Which column of a table is the label.
    pub label: LabelColumn,
    /// What is done to the samples.
    pub transform: Transform,
}

const OPTIONS: [&str; 7] = ["label", "layout", "channels", "pad", "scale", "mean", "std"];

/// Parses the text of `--data`. A text that is itself the path of a file means that file, whatever its name holds.
///
/// # Errors
/// [`Code::Usage`](crate::error::Code::Usage).
pub fn parse_spec(text: &str) -> Result<Vec<Item>> {
    if Path::new(text).is_file() {
        return Ok(vec![Item::of(text)]);
    }
    // A piece that begins with a number goes on with the list of the option before it: `mean=0.5,0.4`.
    let mut pieces: Vec<String> = Vec::new();
    for piece in text.split(',') {
        match pieces.last_mut() {
            Some(last) if last.contains(':') && starts_with_number(piece) => {
                last.push(',');
                last.push_str(piece);
            }
            _ => pieces.push(piece.to_owned()),
        }
    }
    pieces
        .iter()
        .map(|piece| parse_item(piece).map_err(|e| e.at(format!("--data {text}"))))
        .collect()
}

impl Item {
    fn of(path: &str) -> Self {
        Item {
            name: None,
            path: PathBuf::from(path),
            key: None,
            label: LabelColumn::Usual,
            transform: Transform::default(),
        }
    }
}

fn parse_item(text: &str) -> Result<Item> {
    let mut parts = text.split(':');
    let file = parts.next().unwrap_or_default();
    let (name, path) = match file.split_once('=') {
        Some((name, path)) => (Some(name), path),
        None => (None, file),
    };
    if path.is_empty() || name == Some("") {
        return Err(Error::usage(format!("`{text}` names no file")).help(
            "data is FILE or NAME=FILE, several with commas: x=images.npy,label=labels.npy",
        ));
    }
    let mut item = Item { name: name.map(str::to_owned), ..Item::of(path) };
    for option in parts {
        match option.split_once('=') {
            None if option.is_empty() || item.key.is_some() => {
                return Err(Error::usage(format!("`{option}` in `{text}` is no option")));
            }
            None => item.key = Some(option.to_owned()),
            Some((key, value)) => set(&mut item, key, value)?,
        }
    }
    Ok(item)
}

fn set(item: &mut Item, key: &str, value: &str) -> Result<()> {
    let wrong = |wanted: &str| Error::usage(format!("`{key}={value}`: {wanted} is wanted"));
    let size = |least: usize| {
        let size = value.parse::<usize>().ok().filter(|size| (least..=1 << 20).contains(size));
        size.ok_or_else(|| wrong(&format!("a whole number from {least}")))
    };
    let numbers = || -> Result<Vec<f64>> {
        let numbers: Option<Vec<f64>> = value.split(',').map(number).collect();
        numbers.ok_or_else(|| wrong("a number, a fraction or a list of them"))
    };
    let transform = &mut item.transform;
    match key {
        "label" if value == "none" => item.label = LabelColumn::Absent,
        "label" if !value.is_empty() => item.label = LabelColumn::Called(value.to_owned()),
        "label" => return Err(wrong("the name or number of a column")),
        "layout" => {
            transform.channels_last = match value {
                "hwc" => true,
                "chw" => false,
                _ => return Err(wrong("hwc or chw")),
            }
        }
        "channels" => transform.channels = Some(size(1)?),
        "pad" => transform.pad = size(0)?,
        "scale" => {
            let scale = number(value).filter(|&scale| scale != 0.0);
            transform.values.scale = Some(scale.ok_or_else(|| wrong("a number other than 0"))?);
        }
        "mean" => transform.values.mean = numbers()?,
        "std" => {
            transform.values.std = numbers()?;
            if transform.values.std.iter().any(|&std| std <= 0.0) {
                return Err(wrong("a number above 0"));
            }
        }
        _ => {
            return Err(Error::usage(format!("data has no option `{key}`"))
                .did_you_mean(key, OPTIONS)
                .help(format!("options are {}", OPTIONS.join(", "))));
        }
    }
    Ok(())
}

fn starts_with_number(piece: &str) -> bool {
    piece.split(':').next().is_some_and(|start| number(start).is_some())
}

/// A finite number, or a fraction of two.
fn number(text: &str) -> Option<f64> {
    let parse = |text: &str| text.parse::<f64>().ok();
    let number = match text.split_once('/') {
        Some((above, below)) => parse(above)? / parse(below)?,
        None => parse(text)?,
    };
    number.is_finite().then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::transform::Values;

    #[test]
    fn parses_items_and_options() {
        assert_eq!(parse_spec("train.npz").unwrap(), [Item::of("train.npz")]);
        let items = parse_spec(
            "x=images.idx:channels=3:pad=2:scale=1/255:mean=0.5,0.4,0.25:std=2,label=t.npz:labels",
        )
        .unwrap();
        let values =
            Values { scale: Some(1.0 / 255.0), mean: vec![0.5, 0.4, 0.25], std: vec![2.0] };
        let transform = Transform { channels_last: false, channels: Some(3), pad: 2, values };
        assert_eq!(
            items,
            [
                Item { name: Some("x".to_owned()), transform, ..Item::of("images.idx") },
                Item {
                    name: Some("label".to_owned()),
                    key: Some("labels".to_owned()),
                    ..Item::of("t.npz")
                },
            ]
        );
        let table = parse_spec("file.csv:label=target").unwrap();
        assert_eq!(table[0].label, LabelColumn::Called("target".to_owned()));
        assert_eq!((table[0].name.as_ref(), table[0].path.to_str()), (None, Some("file.csv")));
    }

    #[test]
    fn an_existing_file_is_that_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a=b,c:d.npy");
        std::fs::write(&path, b"").unwrap();
        let text = path.to_str().unwrap();
        assert_eq!(parse_spec(text).unwrap(), [Item::of(text)]);
    }

    #[test]
    fn refuses_wrong_texts() {
        for text in [
            "",
            "x=",
            "=a.npy",
            "a.npy,",
            "a.npy:",
            "a.npz:k:l",
            "a.npy:scale=0",
            "a.npy:scale=1/0",
            "a.npy:scale=nan",
            "a.npy:std=0",
            "a.npy:mean=",
            "a.npy:pad=-1",
            "a.npy:channels=0",
            "a.npy:pad=99999999999",
            "a.npy:layout=nchw",
            "a.csv:label=",
            "a.npy:sclae=2",
        ] {
            let error = parse_spec(text).unwrap_err();
            assert_eq!(error.exit().status(), 2, "{text}: {error}");
        }
        let error = parse_spec("a.npy:sclae=2").unwrap_err();
        assert_eq!(error.help_lines()[0], "did you mean `scale`?");
    }
}
