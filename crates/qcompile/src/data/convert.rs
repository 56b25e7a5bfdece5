//! Values of one element type as values of another.

use super::array::{Array, Dtype, elements};
use super::transform::Values;
use crate::error::{Code, Error, Result};
use half::{bf16, f16};

/// What stands in the way of a value.
struct Refused {
    /// Position in the array.
    element: usize,
    /// The value as text.
    value: String,
    code: Code,
    /// Why, as the end of the sentence `sample 3 is 7.5, `.
    why: String,
}

/// `array`, whose first axis is samples, with its values changed by `values` and stored as `dtype`. Whole numbers stay
/// exact; a number that `dtype` cannot hold, and any NaN or infinity, is refused. `rows` gives the samples' numbers in
/// the data set for messages; when it is empty they count from 0.
///
/// # Errors
/// [`Code::DataNotFinite`] or [`Code::DataType`], naming array, sample and value.
pub(crate) fn convert(
    name: &str,
    array: Array,
    values: &Values,
    dtype: Dtype,
    rows: &[usize],
) -> Result<Array> {
    let sample = array.shape.get(1..).unwrap_or_default();
    let channels = values.channels(sample)?;
    let sample_elements = elements(sample).unwrap_or(0).max(1);
    let from = array.dtype;
    let outcome = if values.is_identity() && from == dtype {
        check_finite(&array).map(|()| None)
    } else if from == Dtype::U8 {
        by_table(&array, values, channels, sample_elements, dtype).map(Some)
    } else if values.is_identity() && !from.is_float() && !dtype.is_float() {
        whole_numbers(&array, dtype).map(Some)
    } else {
        numbers(&array, values, channels, sample_elements, dtype).map(Some)
    };
    match outcome {
        Ok(None) => Ok(array),
        Ok(Some(bytes)) => Array::new(dtype, array.shape, bytes),
        Err(refused) => {
            let row = refused.element / sample_elements;
            let sample = rows.get(row).copied().unwrap_or(row);
            let cause =
                format!("array `{name}`: sample {sample} holds {}, {}", refused.value, refused.why);
            Err(Error::new(refused.code, cause))
        }
    }
}

fn check_finite(array: &Array) -> std::result::Result<(), Refused> {
    // A fold of all elements runs at memory speed; the place is looked for only where there is one.
    let fine = match array.dtype {
        Dtype::F32 => {
            let (bits, _) = array.bytes.as_chunks::<4>();
            bits.iter().fold(true, |fine, &b| fine & f32::from_le_bytes(b).is_finite())
        }
        Dtype::F16 | Dtype::Bf16 | Dtype::F64 => false,
        _ => true,
    };
    if fine {
        return Ok(());
    }
    for element in 0..array.elements() {
        finite(element, number(array, element))?;
    }
    Ok(())
}

fn finite(element: usize, value: f64) -> std::result::Result<(), Refused> {
    if value.is_finite() {
        return Ok(());
    }
    let why = "which is not a finite number".to_owned();
    Err(Refused { element, value: value.to_string(), code: Code::DataNotFinite, why })
}

/// Bytes have 256 values: each channel's results are made once.
fn by_table(
    array: &Array,
    values: &Values,
    channels: usize,
    sample_elements: usize,
    dtype: Dtype,
) -> std::result::Result<Vec<u8>, Refused> {
    let size = dtype.size();
    let mut out = Vec::with_capacity(array.bytes.len() * size);
    let mut tables = Vec::new();
    for channel in 0..channels {
        let change = values.at(channel);
        let mut table = Vec::with_capacity(256 * size);
        let mut held = [true; 256];
        for (byte, held) in held.iter_mut().enumerate() {
            *held = push(&mut table, change(byte as f64), dtype);
            table.resize((byte + 1) * size, 0);
        }
        tables.push((table, held));
    }
    let plane = (sample_elements / channels).max(1);
    for (index, plane) in array.bytes.chunks(plane).enumerate() {
        let (table, held) = &tables[index % channels];
        if !held.iter().all(|&held| held)
            && let Some(at) = plane.iter().position(|&byte| !held[usize::from(byte)])
        {
            let element = index * (sample_elements / channels).max(1) + at;
            let value = values.at(index % channels)(f64::from(plane[at]));
            return Err(does_not_fit(element, value, dtype));
        }
        match size {
            4 => {
                let (table, _) = table.as_chunks::<4>();
                let start = out.len();
                out.resize(start + 4 * plane.len(), 0);
                let (to, _) = out[start..].as_chunks_mut::<4>();
                to.iter_mut().zip(plane).for_each(|(to, &byte)| *to = table[usize::from(byte)]);
            }
            _ => plane.iter().for_each(|&byte| {
                let at = usize::from(byte) * size;
                out.extend_from_slice(&table[at..at + size]);
            }),
        }
    }
    Ok(out)
}

fn numbers(
    array: &Array,
    values: &Values,
    channels: usize,
    sample_elements: usize,
    dtype: Dtype,
) -> std::result::Result<Vec<u8>, Refused> {
    let mut out = Vec::with_capacity(array.elements() * dtype.size());
    let plane = (sample_elements / channels).max(1);
    let changes: Vec<_> = (0..channels).map(|channel| values.at(channel)).collect();
    for element in 0..array.elements() {
        let value = number(array, element);
        finite(element, value)?;
        let changed = changes[element / plane % channels](value);
        if !push(&mut out, changed, dtype) {
            return Err(does_not_fit(element, changed, dtype));
        }
    }
    Ok(out)
}

fn whole_numbers(array: &Array, dtype: Dtype) -> std::result::Result<Vec<u8>, Refused> {
    let mut out = Vec::with_capacity(array.elements() * dtype.size());
    for element in 0..array.elements() {
        let value = whole_number(array, element);
        let fits = match dtype {
            Dtype::Bool => (0..=1).contains(&value),
            Dtype::I8 => i8::try_from(value).is_ok(),
            Dtype::I16 => i16::try_from(value).is_ok(),
            Dtype::I32 => i32::try_from(value).is_ok(),
            Dtype::I64 => i64::try_from(value).is_ok(),
            Dtype::U8 => u8::try_from(value).is_ok(),
            Dtype::U16 => u16::try_from(value).is_ok(),
            Dtype::U32 => u32::try_from(value).is_ok(),
            Dtype::U64 => u64::try_from(value).is_ok(),
            Dtype::F16 | Dtype::Bf16 | Dtype::F32 | Dtype::F64 => false,
        };
        if !fits {
            return Err(Refused { value: value.to_string(), ..does_not_fit(element, 0.0, dtype) });
        }
        // Two's complement: the low bytes are the narrower number.
        out.extend_from_slice(&value.to_le_bytes()[..dtype.size()]);
    }
    Ok(out)
}

fn does_not_fit(element: usize, value: f64, dtype: Dtype) -> Refused {
    let code = Code::DataType;
    Refused { element, value: value.to_string(), code, why: format!("which {dtype} cannot hold") }
}

/// Appends `value` as `dtype`; false when it is not held: beyond the range, or not whole where that is needed.
fn push(out: &mut Vec<u8>, value: f64, dtype: Dtype) -> bool {
    macro_rules! whole {
        ($number:ty) => {{
            // `as` saturates, so a number beyond the range does not come back as itself; -2^63 and 2^63 are exact.
            let held = value as $number;
            out.extend_from_slice(&held.to_le_bytes());
            held as f64 == value && (value < <$number>::MAX as f64 || <$number>::BITS < 64)
        }};
    }
    match dtype {
        Dtype::Bool => {
            out.push(u8::from(value != 0.0));
            value == 0.0 || value == 1.0
        }
        Dtype::I8 => whole!(i8),
        Dtype::I16 => whole!(i16),
        Dtype::I32 => whole!(i32),
        Dtype::I64 => whole!(i64),
        Dtype::U8 => whole!(u8),
        Dtype::U16 => whole!(u16),
        Dtype::U32 => whole!(u32),
        Dtype::U64 => whole!(u64),
        Dtype::F16 => {
            let held = f16::from_f64(value);
            out.extend_from_slice(&held.to_le_bytes());
            held.is_finite()
        }
        Dtype::Bf16 => {
            let held = bf16::from_f64(value);
            out.extend_from_slice(&held.to_le_bytes());
            held.is_finite()
        }
        Dtype::F32 => {
            out.extend_from_slice(&(value as f32).to_le_bytes());
            (value as f32).is_finite()
        }
        Dtype::F64 => {
            out.extend_from_slice(&value.to_le_bytes());
            value.is_finite()
        }
    }
}

/// An element as it stands in the file.
fn raw<const N: usize>(array: &Array, element: usize) -> [u8; N] {
    let (elements, _) = array.bytes.as_chunks::<N>();
    elements[element]
}

/// An element of any type as f64; integers beyond 2^53 are rounded.
pub(crate) fn number(array: &Array, element: usize) -> f64 {
    match array.dtype {
        Dtype::F16 => f16::from_le_bytes(raw(array, element)).to_f64(),
        Dtype::Bf16 => bf16::from_le_bytes(raw(array, element)).to_f64(),
        Dtype::F32 => f64::from(f32::from_le_bytes(raw(array, element))),
        Dtype::F64 => f64::from_le_bytes(raw(array, element)),
        _ => whole_number(array, element) as f64,
    }
}

/// An element of an integer type; floating-point types are cut.
pub(crate) fn whole_number(array: &Array, element: usize) -> i128 {
    match array.dtype {
        Dtype::Bool | Dtype::U8 => i128::from(array.bytes[element]),
        Dtype::I8 => i128::from(i8::from_le_bytes(raw(array, element))),
        Dtype::I16 => i128::from(i16::from_le_bytes(raw(array, element))),
        Dtype::I32 => i128::from(i32::from_le_bytes(raw(array, element))),
        Dtype::I64 => i128::from(i64::from_le_bytes(raw(array, element))),
        Dtype::U16 => i128::from(u16::from_le_bytes(raw(array, element))),
        Dtype::U32 => i128::from(u32::from_le_bytes(raw(array, element))),
        Dtype::U64 => i128::from(u64::from_le_bytes(raw(array, element))),
        Dtype::F16 | Dtype::Bf16 | Dtype::F32 | Dtype::F64 => number(array, element) as i128,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn to(array: &Array, dtype: Dtype) -> Result<Array> {
        convert("a", array.clone(), &Values::default(), dtype, &[])
    }

    #[test]
    fn whole_numbers_stay_exact() {
        let big = Array::from_i64(vec![2], &[i64::MAX, -1]).unwrap();
        assert_eq!(to(&big, Dtype::I64).unwrap(), big);
        let error = to(&big, Dtype::U64).unwrap_err();
        assert_eq!(error.cause(), "array `a`: sample 1 holds -1, which u64 cannot hold");
        assert_eq!(to(&big, Dtype::I32).unwrap_err().code(), Code::DataType);
        let bytes = Array::from_u8(vec![3], &[0, 127, 128]).unwrap();
        assert_eq!(to(&bytes, Dtype::I64).unwrap().to_i64().unwrap(), [0, 127, 128]);
        let error = to(&bytes, Dtype::I8).unwrap_err();
        assert!(error.cause().contains("sample 2 holds 128"), "{error}");
    }

    #[test]
    fn floats_become_integers_only_when_whole() {
        let whole = Array::from_f32(vec![2], &[3.0, -2.0]).unwrap();
        assert_eq!(to(&whole, Dtype::I64).unwrap().to_i64().unwrap(), [3, -2]);
        for (value, dtype) in [
            (0.5, Dtype::I32),
            (-1.0, Dtype::U8),
            (256.0, Dtype::U8),
            (2.0, Dtype::Bool),
            (9_223_372_036_854_775_808.0, Dtype::I64),
            (1e300, Dtype::F32),
            (7e4, Dtype::F16),
        ] {
            let array = Array::from_f64(vec![1], &[value]).unwrap();
            assert_eq!(to(&array, dtype).unwrap_err().code(), Code::DataType, "{value} {dtype}");
        }
    }

    #[test]
    fn refuses_what_is_not_finite() {
        for dtype in [Dtype::F32, Dtype::F64, Dtype::F16, Dtype::Bf16, Dtype::I64] {
            for bad in [f32::NAN, f32::INFINITY] {
                let array = Array::from_f32(vec![2, 2], &[0.0, 1.0, 2.0, bad]).unwrap();
                let values = Values { scale: Some(2.0), ..Values::default() };
                for values in [Values::default(), values] {
                    let error = convert("a", array.clone(), &values, dtype, &[40, 7]).unwrap_err();
                    assert_eq!(error.code(), Code::DataNotFinite);
                    assert!(error.cause().contains("sample 7"), "{error}");
                }
            }
        }
        let half = Array::new(Dtype::F16, vec![1], vec![0, 0x7c]).unwrap();
        assert_eq!(to(&half, Dtype::F16).unwrap_err().code(), Code::DataNotFinite);
    }

    #[test]
    fn changes_values_by_channel() {
        let values = Values { scale: Some(1.0 / 255.0), mean: vec![0.0, 0.5], std: vec![1.0, 0.5] };
        let bytes = Array::from_u8(vec![2, 2, 2], &[0, 255, 0, 255, 51, 0, 255, 0]).unwrap();
        let wanted = [0.0, 1.0, -1.0, 1.0, 0.2, 0.0, 1.0, -1.0];
        for dtype in [Dtype::F32, Dtype::F64] {
            let out = convert("a", bytes.clone(), &values, dtype, &[]).unwrap();
            (0..8).for_each(|i| assert!((number(&out, i) - wanted[i]).abs() < 1e-6));
            // The way over f64 gives what the table gives.
            let wide = to(&bytes, Dtype::I32).unwrap();
            assert_eq!(convert("a", wide, &values, dtype, &[]).unwrap(), out);
        }
        let half = convert("a", bytes.clone(), &values, Dtype::Bf16, &[]).unwrap();
        assert_eq!((half.bytes.len(), number(&half, 1)), (16, 1.0));
        let error = convert("a", bytes, &values, Dtype::I8, &[]).unwrap_err();
        assert!(error.cause().contains("sample 1 holds 0.2"), "{error}");
    }
}
