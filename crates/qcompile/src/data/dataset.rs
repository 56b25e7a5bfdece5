//! A data set in memory, and how it answers a model's inputs.

use super::array::{Array, Dtype};
use super::convert::{number, whole_number};
use super::fit::{InputType, check_sample_shape, fit_checked};
use super::source::{Format, Limits, open};
use super::spec::{Item, parse_spec};
use super::table::LabelColumn;
use super::transform::Transform;
use super::{idx, npy, npz, table};
use crate::error::{Code, Error, Result};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::{BufReader, Read};
use std::path::Path;

/// Name of the array that holds what the model is to learn.
pub const LABEL: &str = "label";
/// Name of the array of a file that names none.
pub const UNNAMED: &str = "x";

/// Arrays whose first axis is samples, the same number in each.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Dataset {
    /// The arrays as the files have them.
    pub arrays: BTreeMap<String, Array>,
    /// What is done to an array's samples when they are taken in batches.
    pub transforms: BTreeMap<String, Transform>,
    /// Names of the columns of arrays that came from tables with a header line.
    pub columns: BTreeMap<String, Vec<String>>,
}

/// What a loss wants of the array `label`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// A class number for every row of the logits, as a flat array of `dtype`.
    Classes {
        /// Number of classes; labels are 0 to `classes - 1`.
        classes: usize,
        /// Rows of the logits for one sample: 1, or the sequence length.
        rows_per_sample: usize,
        /// Integer element type.
        dtype: Dtype,
    },
    /// Values in the shape and type of the model's output.
    Values(InputType),
}

impl Dataset {
    /// Loads what the text of `--data` names (see [`parse_spec`]).
    ///
    /// # Errors
    /// Of the text, the files, and [`check`](Self::check); with the file as a place.
    pub fn load(text: &str, limits: Limits) -> Result<Self> {
        Dataset::load_items(&parse_spec(text)?, limits)
    }

    /// Loads `items`.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_items(items: &[Item], limits: Limits) -> Result<Self> {
        let mut dataset = Dataset::default();
        for item in items {
            let place = item.path.display().to_string();
            dataset.load_item(item, limits).map_err(|error| {
                if error.places().contains(&place) { error } else { error.at(place) }
            })?;
        }
        dataset.check()?;
        Ok(dataset)
    }

    fn load_item(&mut self, item: &Item, limits: Limits) -> Result<()> {
        let mut source = open(&item.path, limits)?;
        if item.key.is_some() && source.format != Format::Npz {
            return Err(Error::usage("only npz archives have arrays by name"));
        }
        if item.label != LabelColumn::Usual && source.format != Format::Table {
            return Err(Error::usage(
                "`:label=` is for tables; name the label's file with label=FILE",
            ));
        }
        let name = item.name.as_deref();
        let unnamed = name.unwrap_or(UNNAMED);
        match source.format {
            Format::Npy => self.insert(unnamed, npy::read(&mut source.reader, source.limit)?, item),
            Format::Idx => self.insert(unnamed, idx::read(&mut source.reader, source.limit)?, item),
            Format::Npz => {
                let file = BufReader::new(source.file);
                let arrays = npz::read(file, item.key.as_deref(), limits)?;
                match (name, arrays.len()) {
                    (Some(name), 1) => {
                        arrays.into_values().try_for_each(|array| self.insert(name, array, item))
                    }
                    (Some(name), _) => {
                        let names: Vec<&str> = arrays.keys().map(String::as_str).collect();
                        let cause = format!(
                            "the archive has {} arrays, `{name}` is to be one",
                            names.len()
                        );
                        Err(Error::new(Code::DataName, cause)
                            .help(format!("choose one as FILE:KEY of {}", names.join(", "))))
                    }
                    (None, _) => arrays
                        .into_iter()
                        .try_for_each(|(name, array)| self.insert(&name, array, item)),
                }
            }
            Format::Table => {
                // A table that is itself the label has no column for it.
                let absent = name == Some(LABEL) && item.label == LabelColumn::Usual;
                let label = if absent { &LabelColumn::Absent } else { &item.label };
                let mut text = source.reader.take(source.limit);
                let table = table::read(&mut text, label, source.limit);
                // A table cut by the limit may read as damaged, or as whole.
                if text.limit() == 0 {
                    return Err(super::source::over_limit("the table's text is", source.limit));
                }
                let table = table?;
                if let Some(label) = table.label {
                    self.insert(LABEL, label, item)?;
                }
                if !table.names.is_empty() {
                    self.columns.insert(unnamed.to_owned(), table.names);
                }
                self.insert(unnamed, table.x, item)
            }
        }
    }

    fn insert(&mut self, name: &str, array: Array, item: &Item) -> Result<()> {
        // Images are changed, not their labels, unless the label's own file says so.
        let explicit = item.name.as_deref() == Some(name);
        if (name != LABEL || explicit) && item.transform != Transform::default() {
            self.transforms.insert(name.to_owned(), item.transform.clone());
        }
        match self.arrays.insert(name.to_owned(), array) {
            None => Ok(()),
            Some(_) => Err(Error::new(Code::DataName, format!("two arrays are called `{name}`"))
                .help("give each file its own name: x=images.npy,label=labels.npy")),
        }
    }

    /// Checks that all arrays have the same number of samples, and at least one.
    ///
    /// # Errors
    /// [`Code::DataShape`] or [`Code::DataEmpty`].
    pub fn check(&self) -> Result<()> {
        let mut first: Option<(&str, usize)> = None;
        for (name, array) in &self.arrays {
            let Some(samples) = array.samples() else {
                let cause = format!("array `{name}` is a single number: it has no samples");
                return Err(Error::new(Code::DataShape, cause));
            };
            let (other, wanted) = *first.get_or_insert((name, samples));
            if samples != wanted {
                let cause =
                    format!("array `{name}` has {samples} samples, array `{other}` has {wanted}");
                return Err(Error::new(Code::DataShape, cause)
                    .help("the first axis of every array is samples"));
            }
        }
        match first {
            Some((_, samples)) if samples > 0 => Ok(()),
            _ => Err(Error::new(Code::DataEmpty, "the data holds no samples")),
        }
    }

    /// Number of samples.
    #[must_use]
    pub fn samples(&self) -> usize {
        self.arrays.values().next().and_then(Array::samples).unwrap_or(0)
    }

    /// The samples `rows` of every array as the files have them.
    ///
    /// # Errors
    /// [`Code::DataEmpty`] when a row is beyond the last sample.
    pub fn gather(&self, rows: &[usize]) -> Result<BTreeMap<String, Array>> {
        self.arrays.iter().map(|(name, array)| Ok((name.clone(), array.gather(rows)?))).collect()
    }

    /// Finds the array of every input of the model, and the label where a loss wants one, and checks their shapes.
    ///
    /// An input takes the array of its name, else the table column of its name, else, when the model has a single
    /// input and the data a single array beside the label, that one. Labels are all checked here; values of inputs
    /// are checked as batches are taken.
    ///
    /// # Errors
    /// [`Code::DataName`], [`Code::DataShape`], [`Code::DataType`] or [`Code::DataLabel`].
    pub fn bind(
        &self,
        inputs: &[(String, InputType)],
        target: Option<&Target>,
    ) -> Result<Binding<'_>> {
        let mut binding =
            Binding { samples: self.samples(), bound: Vec::new(), label: None, notes: Vec::new() };
        let mut used = vec![LABEL];
        let others: Vec<&str> =
            self.arrays.keys().map(String::as_str).filter(|&name| name != LABEL).collect();
        for (input, want) in inputs {
            let column = self.columns.iter().find_map(|(array, names)| {
                names.iter().position(|name| name == input).map(|column| (array, column))
            });
            let (name, array) = match (self.arrays.get_key_value(input), column, others.as_slice())
            {
                (Some((name, array)), _, _) => (name.as_str(), Cow::Borrowed(array)),
                (None, Some((name, column)), _) => {
                    (name.as_str(), Cow::Owned(take_column(&self.arrays[name], column)?))
                }
                (None, None, &[only]) if inputs.len() == 1 => {
                    (only, Cow::Borrowed(&self.arrays[only]))
                }
                (None, None, _) => {
                    let cause = format!("the data has no array for the model's input `{input}`");
                    return Err(Error::new(Code::DataName, cause)
                        .did_you_mean(input, others.iter().copied())
                        .help(format!("it has {}; give one as {input}=FILE", list(&self.arrays))));
                }
            };
            used.push(name);
            let transform = self.transforms.get(name).cloned().unwrap_or_default();
            binding.bind(input, name, array, transform, want)?;
        }
        if let Some(target) = target {
            binding.bind_label(self, target)?;
        }
        for name in self.arrays.keys().filter(|name| !used.contains(&name.as_str())) {
            binding.notes.push(format!("array `{name}` of the data is not used"));
        }
        Ok(binding)
    }
}

/// The arrays of one npz, npy or IDX file as they are, without a samples axis being asked for; an npy or IDX file's
/// is called `x`.
///
/// # Errors
/// As [`Dataset::load`]; [`Code::DataUnsupported`] for tables.
pub fn read_arrays(path: &Path, limits: Limits) -> Result<BTreeMap<String, Array>> {
    let mut source = open(path, limits)?;
    let one = |array: Array| BTreeMap::from([(UNNAMED.to_owned(), array)]);
    let arrays = match source.format {
        Format::Npy => npy::read(&mut source.reader, source.limit).map(one),
        Format::Idx => idx::read(&mut source.reader, source.limit).map(one),
        Format::Npz => npz::read(BufReader::new(source.file), None, limits),
        Format::Table => {
            Err(Error::new(Code::DataUnsupported, "an npz or npy file is wanted here"))
        }
    };
    arrays.map_err(|error| error.at(path.display().to_string()))
}

fn list(arrays: &BTreeMap<String, Array>) -> String {
    let each: Vec<String> =
        arrays.iter().map(|(name, array)| format!("`{name}` {array}")).collect();
    each.join(", ")
}

fn take_column(table: &Array, column: usize) -> Result<Array> {
    let size = table.dtype.size();
    let row = table.sample_bytes().max(1);
    let bytes =
        table.bytes.chunks_exact(row).flat_map(|row| &row[column * size..(column + 1) * size]);
    Array::new(table.dtype, vec![table.samples().unwrap_or(0), 1], bytes.copied().collect())
}

/// A data set bound to the inputs of a model.
#[derive(Debug, Clone)]
pub struct Binding<'a> {
    samples: usize,
    bound: Vec<Bound<'a>>,
    label: Option<Label<'a>>,
    notes: Vec<String>,
}

#[derive(Debug, Clone)]
struct Bound<'a> {
    /// Name in the batch: the model's input, or `label`.
    name: String,
    /// Name in the data set, for messages.
    array_name: String,
    array: Cow<'a, Array>,
    transform: Transform,
    want: InputType,
}

#[derive(Debug, Clone)]
struct Label<'a> {
    array: &'a Array,
    dtype: Dtype,
}

impl<'a> Binding<'a> {
    fn bind(
        &mut self,
        name: &str,
        array_name: &str,
        array: Cow<'a, Array>,
        mut transform: Transform,
        want: &InputType,
    ) -> Result<()> {
        let named = |error: Error| error.at(format!("array `{array_name}`"));
        let sample = array.shape.get(1..).unwrap_or_default();
        let sample = transform.sample_shape(sample).map_err(named)?;
        check_sample_shape(array_name, &array, &sample, want)?;
        transform.values.channels(&sample).map_err(named)?;
        if array.dtype == Dtype::U8 && want.dtype.is_float() && transform.values.scale.is_none() {
            transform.values.scale = Some(1.0 / 255.0);
            self.notes.push(format!(
                "array `{array_name}` is u8 and the model wants {}: values are divided by 255 (:scale=1 keeps them)",
                want.dtype
            ));
        }
        self.bound.push(Bound {
            name: name.to_owned(),
            array_name: array_name.to_owned(),
            array,
            transform,
            want: want.clone(),
        });
        Ok(())
    }

    fn bind_label(&mut self, dataset: &'a Dataset, target: &Target) -> Result<()> {
        let Some(label) = dataset.arrays.get(LABEL) else {
            let names = dataset.arrays.keys().map(String::as_str);
            return Err(Error::new(Code::DataName, "the data has no array `label`")
                .did_you_mean(LABEL, names)
                .help(format!(
                    "it has {}; give one as label=FILE or label=FILE.npz:KEY",
                    list(&dataset.arrays)
                )));
        };
        let transform = dataset.transforms.get(LABEL);
        match target {
            Target::Values(want) => {
                // A label is what it is: bytes are not scaled unless the label's file says so.
                let mut transform = transform.cloned().unwrap_or_default();
                transform.values.scale.get_or_insert(1.0);
                self.bind(LABEL, LABEL, Cow::Borrowed(label), transform, want)
            }
            Target::Classes { classes, rows_per_sample, dtype } => {
                if transform.is_some() {
                    return Err(Error::usage("class labels take no options but a key or column"));
                }
                let rows = label.sample_bytes() / label.dtype.size();
                if rows != *rows_per_sample {
                    let cause = format!(
                        "array `label` is {label}: {rows} values a sample, the loss wants {rows_per_sample}"
                    );
                    let error = Error::new(Code::DataShape, cause);
                    return Err(if rows == *classes {
                        error.help(
                            "labels are class numbers, not one value per class: label.argmax(-1)",
                        )
                    } else {
                        error
                    });
                }
                check_classes(label, *classes, rows)?;
                self.label = Some(Label { array: label, dtype: *dtype });
                Ok(())
            }
        }
    }

    /// What the user should be told once: defaults that were taken and arrays that are left out.
    #[must_use]
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Number of samples.
    #[must_use]
    pub fn samples(&self) -> usize {
        self.samples
    }

    /// The samples `rows` as the model's inputs take them, by input name, and `label`.
    ///
    /// # Errors
    /// [`Code::DataNotFinite`] or [`Code::DataType`], naming array, sample and value.
    pub fn batch(&self, rows: &[usize]) -> Result<BTreeMap<String, Array>> {
        let mut batch = BTreeMap::new();
        for bound in &self.bound {
            let array = bound.transform.arrange(bound.array.gather(rows)?)?;
            let values = &bound.transform.values;
            let fitted = fit_checked(&bound.array_name, array, values, &bound.want, rows)?;
            batch.insert(bound.name.clone(), fitted);
        }
        if let Some(label) = &self.label {
            let picked = label.array.gather(rows)?;
            let flat = InputType { dtype: label.dtype, shape: vec![None] };
            let picked = Array::new(picked.dtype, vec![picked.elements()], picked.bytes)?;
            let fitted = fit_checked(LABEL, picked, &Default::default(), &flat, &[])?;
            batch.insert(LABEL.to_owned(), fitted);
        }
        Ok(batch)
    }

    /// Checks every value of every sample, as [`batch`](Self::batch) would.
    ///
    /// # Errors
    /// As [`batch`](Self::batch).
    pub fn check_values(&self) -> Result<()> {
        const AT_ONCE: usize = 256;
        let mut varying = self.clone();
        // Only values are of interest, and any number of samples must do.
        for bound in &mut varying.bound {
            let axis = bound.want.batch_axis();
            bound.want.shape[axis] = None;
        }
        let rows: Vec<usize> = (0..self.samples).collect();
        rows.chunks(AT_ONCE).try_for_each(|rows| varying.batch(rows).map(|_| ()))
    }
}

/// The label of rows that the loss leaves out, as in PyTorch and ONNX.
const IGNORED: i128 = -100;

/// Checks that every label is a whole number of `0..classes`, or the one that is ignored.
fn check_classes(label: &Array, classes: usize, rows_per_sample: usize) -> Result<()> {
    for element in 0..label.elements() {
        let class = if label.dtype.is_float() {
            let value = number(label, element);
            (value.fract() == 0.0).then_some(value as i128)
        } else {
            Some(whole_number(label, element))
        };
        let fits = |class: i128| class == IGNORED || (0..classes as i128).contains(&class);
        if !class.is_some_and(fits) {
            let value = match class {
                Some(class) => class.to_string(),
                None => number(label, element).to_string(),
            };
            let sample = element / rows_per_sample.max(1);
            let last = classes.saturating_sub(1);
            let cause = format!(
                "array `label`: sample {sample} is {value}, but the classes are 0 to {last}"
            );
            return Err(Error::new(Code::DataLabel, cause));
        }
    }
    Ok(())
}
