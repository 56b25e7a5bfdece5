//! Batches of samples in the shape and element type that an input of the model has.

use super::array::{Array, Dtype};
use super::convert::convert;
use super::transform::Values;
use crate::error::{Code, Error, Result};
use std::fmt;

/// Type of a model's input. `None` in the shape is the batch axis; without one, the first axis is it and its extent
/// is the only batch size. Displays as `f32[batch, 1, 28, 28]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InputType {
    /// Element type.
    pub dtype: Dtype,
    /// Extents; at most one is `None`.
    pub shape: Vec<Option<usize>>,
}

impl InputType {
    /// Where the batch axis is.
    #[must_use]
    pub fn batch_axis(&self) -> usize {
        self.shape.iter().position(Option::is_none).unwrap_or(0)
    }

    /// Extents without the batch axis.
    #[must_use]
    pub fn sample_shape(&self) -> Vec<usize> {
        let batch = self.batch_axis();
        let kept = self.shape.iter().enumerate().filter(|&(axis, _)| axis != batch);
        kept.map(|(_, extent)| extent.unwrap_or(1)).collect()
    }
}

impl fmt::Display for InputType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let extent = |extent: &Option<usize>| extent.map_or("batch".to_owned(), |n| n.to_string());
        let extents: Vec<String> = self.shape.iter().map(extent).collect();
        write!(f, "{}[{}]", self.dtype, extents.join(", "))
    }
}

/// `array`, whose first axis is samples, as the input `want`: the samples reshaped, the values converted, the first
/// axis moved to where the batch axis is. Samples may differ in axes of extent 1, and may be flat where the input is
/// not or the other way round; values must be held exactly, floating-point ones rounded.
///
/// # Errors
/// [`Code::DataShape`], [`Code::DataType`] or [`Code::DataNotFinite`], naming the array.
pub fn fit(name: &str, array: &Array, want: &InputType) -> Result<Array> {
    let sample = array.shape.get(1..).unwrap_or_default();
    check_sample_shape(name, array, sample, want)?;
    fit_checked(name, array.clone(), &Values::default(), want, &[])
}

/// Checks that `array` is exactly what the input `want` takes: its element type, its rank and its extents, where any
/// number of axes may be `None` and take every extent. Nothing is converted.
///
/// # Errors
/// [`Code::DataType`] or [`Code::DataShape`], naming the array.
pub fn check_exact(name: &str, array: &Array, want: &InputType) -> Result<()> {
    let cause = || format!("array `{name}` is {array}, the model wants {want}");
    if array.dtype != want.dtype {
        return Err(Error::new(Code::DataType, cause()));
    }
    let fits = array.shape.len() == want.shape.len()
        && array.shape.iter().zip(&want.shape).all(|(n, want)| want.is_none_or(|want| *n == want));
    if fits { Ok(()) } else { Err(Error::new(Code::DataShape, cause())) }
}

/// [`fit`] with a change of values, for arrays whose samples are known to suit.
pub(crate) fn fit_checked(
    name: &str,
    array: Array,
    values: &Values,
    want: &InputType,
    rows: &[usize],
) -> Result<Array> {
    let samples = array.samples().unwrap_or(0);
    if let Some(&Some(fixed)) = want.shape.get(want.batch_axis())
        && fixed != samples
    {
        let cause = format!("a batch of {samples} samples, but the model takes {want} only");
        return Err(Error::new(Code::DataShape, cause).help(format!(
            "use --batch-size {fixed}, or export the model with a symbolic batch axis"
        )));
    }
    let array = convert(name, array, values, want.dtype, rows)?;
    let bytes = to_axis(array.bytes, samples, want);
    let shape = want.shape.iter().map(|extent| extent.unwrap_or(samples)).collect();
    Array::new(want.dtype, shape, bytes)
}

/// Moves the first axis of [samples, ...] to the batch axis of `want`.
fn to_axis(bytes: Vec<u8>, samples: usize, want: &InputType) -> Vec<u8> {
    let sample = want.sample_shape();
    let outer: usize = sample[..want.batch_axis()].iter().product();
    let inner = sample[want.batch_axis()..].iter().product::<usize>() * want.dtype.size();
    if outer == 1 || inner == 0 {
        return bytes;
    }
    let mut out = Vec::with_capacity(bytes.len());
    for row in 0..outer {
        for n in 0..samples {
            let start = (n * outer + row) * inner;
            out.extend_from_slice(&bytes[start..start + inner]);
        }
    }
    out
}

/// Checks that samples of shape `sample` (of `array`, after its transform) suit the input.
///
/// # Errors
/// [`Code::DataShape`] that names array, shape and what is wanted, with the option that would help if there is one.
pub(crate) fn check_sample_shape(
    name: &str,
    array: &Array,
    sample: &[usize],
    want: &InputType,
) -> Result<()> {
    let wanted = want.sample_shape();
    let mismatch = |cause: String| Err(Error::new(Code::DataShape, cause));
    if array.shape.is_empty() || want.shape.is_empty() {
        return mismatch(format!(
            "array `{name}` is {array}, the model wants {want}: no samples axis"
        ));
    }
    let squeezed = |shape: &[usize]| -> Vec<usize> {
        shape.iter().copied().filter(|&extent| extent != 1).collect()
    };
    let (have, need) = (squeezed(sample), squeezed(&wanted));
    let flat = (have.len() <= 1 || need.len() <= 1)
        && super::array::elements(&have) == super::array::elements(&need);
    if have == need || flat {
        return Ok(());
    }
    let changed = if array.shape.get(1..) == Some(sample) {
        String::new()
    } else {
        format!(" (samples {sample:?} after its options)")
    };
    let error = Error::new(
        Code::DataShape,
        format!("array `{name}` is {array}{changed}, the model wants {want}"),
    );
    Err(match remedy(sample, &wanted) {
        Some(options) => error.help(format!("add {options} to the file's name in --data")),
        None => error.help("each sample must have the input's shape without its batch axis"),
    })
}

/// Options that would turn samples into what is wanted.
fn remedy(sample: &[usize], wanted: &[usize]) -> Option<String> {
    let [channels, height, width] = *wanted else { return None };
    let (options, c, h, w) = match *sample {
        [h, w, c] if c == channels && h != channels => (":layout=hwc", c, h, w),
        [c, h, w] => ("", c, h, w),
        [h, w] => ("", 1, h, w),
        _ => return None,
    };
    let mut options = options.to_owned();
    if c != channels {
        if c != 1 {
            return None;
        }
        options.push_str(&format!(":channels={channels}"));
    }
    let (tall, wide) = (height.checked_sub(h)?, width.checked_sub(w)?);
    if tall != wide || tall % 2 != 0 {
        return None;
    }
    if tall > 0 {
        options.push_str(&format!(":pad={}", tall / 2));
    }
    (!options.is_empty()).then_some(options)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn f32_of(shape: &[Option<usize>]) -> InputType {
        InputType { dtype: Dtype::F32, shape: shape.to_vec() }
    }

    #[test]
    fn reshapes_where_the_meaning_is_clear() {
        let images = Array::from_u8(vec![2, 2, 3], &[0; 12]).unwrap();
        for shape in [
            vec![None, Some(1), Some(2), Some(3)],
            vec![None, Some(6)],
            vec![None, Some(2), Some(3)],
        ] {
            let out = fit("x", &images, &f32_of(&shape)).unwrap();
            assert_eq!((out.dtype, out.shape[0], out.elements()), (Dtype::F32, 2, 12));
        }
        let flat = Array::from_f32(vec![1, 6], &[0.0; 6]).unwrap();
        assert!(fit("x", &flat, &f32_of(&[None, Some(1), Some(2), Some(3)])).is_ok());
        // 2x3 and 3x2 have as many elements, but not the same meaning.
        let error = fit("x", &images, &f32_of(&[None, Some(3), Some(2)])).unwrap_err();
        assert_eq!(error.cause(), "array `x` is u8[2, 2, 3], the model wants f32[batch, 3, 2]");
    }

    #[test]
    fn moves_samples_to_the_batch_axis() {
        let tokens = Array::from_i32(vec![2, 3], &[1, 2, 3, 4, 5, 6]).unwrap();
        let want = InputType { dtype: Dtype::I64, shape: vec![Some(3), None] };
        let out = fit("tokens", &tokens, &want).unwrap();
        assert_eq!(
            (out.shape.as_slice(), out.to_i64().unwrap()),
            (&[3, 2][..], vec![1, 4, 2, 5, 3, 6])
        );
    }

    #[test]
    fn a_fixed_batch_takes_only_itself() {
        let rows = Array::from_f32(vec![2, 3], &[0.0; 6]).unwrap();
        assert!(fit("x", &rows, &f32_of(&[Some(2), Some(3)])).is_ok());
        let error = fit("x", &rows, &f32_of(&[Some(4), Some(3)])).unwrap_err();
        assert!(error.help_lines()[0].contains("--batch-size 4"), "{error}");
        let scalar = Array::from_f32(vec![], &[0.0]).unwrap();
        assert_eq!(fit("x", &scalar, &f32_of(&[None])).unwrap_err().code(), Code::DataShape);
    }

    #[test]
    fn exact_means_type_rank_and_extents() {
        let array = Array::from_i32(vec![2, 3], &[0; 6]).unwrap();
        let check = |dtype, shape: &[Option<usize>]| {
            let want = InputType { dtype, shape: shape.to_vec() };
            check_exact("x", &array, &want).map_err(|e| e.code())
        };
        assert_eq!(check(Dtype::I32, &[None, None]), Ok(()));
        assert_eq!(check(Dtype::I32, &[None, Some(3)]), Ok(()));
        assert_eq!(check(Dtype::I64, &[None, Some(3)]), Err(Code::DataType));
        assert_eq!(check(Dtype::I32, &[None, Some(4)]), Err(Code::DataShape));
        assert_eq!(check(Dtype::I32, &[None, Some(3), Some(1)]), Err(Code::DataShape));
    }

    #[test]
    fn names_the_options_that_would_help() {
        let help = |shape: Vec<usize>, want: [usize; 3]| {
            let n = shape.iter().product();
            let array = Array::from_u8(shape, &vec![0; n]).unwrap();
            let want: Vec<_> = [None].into_iter().chain(want.map(Some)).collect();
            fit("x", &array, &f32_of(&want)).unwrap_err().help_lines()[0].clone()
        };
        assert!(help(vec![1, 28, 28], [3, 32, 32]).contains(":channels=3:pad=2"));
        assert!(help(vec![1, 32, 32, 3], [3, 32, 32]).contains(":layout=hwc"));
        assert!(help(vec![1, 28, 28], [1, 20, 28]).contains("each sample"));
    }
}
