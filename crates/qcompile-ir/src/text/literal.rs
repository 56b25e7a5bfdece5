//! Tensor literals: short ones inline, repeated ones as `splat`, and generated ones for tests.

use crate::{DType, Tensor};

/// Tensors of up to this many elements print in full.
const INLINE_ELEMENTS: usize = 16;

/// Lists nest at most this deep; a tensor of higher rank prints as digest.
pub(super) const MAX_NESTING: usize = 8;

/// The literal of a tensor, or `None` if only its digest names it.
pub(super) fn inline(tensor: &Tensor) -> Option<String> {
    if tensor.elements() == 0 {
        return Some("splat 0".to_owned());
    }
    if tensor.elements() <= INLINE_ELEMENTS && tensor.shape().len() <= MAX_NESTING {
        let elements: Option<Vec<String>> =
            (0..tensor.elements()).map(|index| element(tensor, index)).collect();
        return Some(nested(tensor.shape(), &elements?));
    }
    tensor.splat()?;
    Some(format!("splat {}", element(tensor, 0)?))
}

fn nested(shape: &[usize], elements: &[String]) -> String {
    match shape {
        [] => elements.join(", "),
        [_, inner @ ..] => {
            let size: usize = inner.iter().product();
            let parts: Vec<String> =
                elements.chunks(size.max(1)).map(|part| nested(inner, part)).collect();
            format!("[{}]", parts.join(", "))
        }
    }
}

/// Element `index` as text, if reading the text gives its bytes back (a NaN with a payload does not).
fn element(tensor: &Tensor, index: usize) -> Option<String> {
    let size = tensor.dtype().size();
    let bytes = &tensor.bytes()[index * size..(index + 1) * size];
    let text = match (tensor.dtype(), bytes) {
        (DType::I64, &[a, b, c, d, e, f, g, h]) => {
            i64::from_le_bytes([a, b, c, d, e, f, g, h]).to_string()
        }
        (DType::Bool, &[byte]) => (byte != 0).to_string(),
        #[allow(
            clippy::cast_possible_truncation,
            reason = "every other type is exact in f32 or small"
        )]
        (dtype, _) if dtype.is_float() => float(tensor.get_f64(index) as f32),
        _ => tensor.get_f64(index).to_string(),
    };
    (element_bytes(tensor.dtype(), &text)? == bytes).then_some(text)
}

/// The shortest text that reads back as this f32.
pub(super) fn float(value: f32) -> String {
    if value.is_nan() {
        return "nan".to_owned();
    }
    let text = format!("{value:?}");
    text.strip_suffix(".0").map_or(text.clone(), str::to_owned)
}

/// The bytes of one element of `dtype` written as `text`.
pub(super) fn element_bytes(dtype: DType, text: &str) -> Option<Vec<u8>> {
    let value = match text {
        "true" => 1.0,
        "false" => 0.0,
        _ if dtype == DType::F32 => {
            return number::<f32>(text).map(|value| value.to_le_bytes().to_vec());
        }
        _ if dtype == DType::I64 => {
            return text.parse::<i64>().ok().map(|value| value.to_le_bytes().to_vec());
        }
        _ => number::<f64>(text)?,
    };
    let tensor = Tensor::scalar(dtype, value);
    // An integer outside its type saturates, which is not what was written.
    (dtype.is_float() || tensor.get_f64(0) == value).then(|| tensor.bytes().to_vec())
}

/// A finite number, `inf`, `-inf` or `nan`.
pub(super) fn number<T: std::str::FromStr>(text: &str) -> Option<T> {
    let digits = text.strip_prefix('-').unwrap_or(text);
    let known =
        digits.starts_with(|c: char| c.is_ascii_digit()) || digits == "inf" || text == "nan";
    if known { text.parse().ok() } else { None }
}

/// A distribution that a literal draws from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Distribution {
    /// Uniform in [-scale, scale).
    Uniform,
    /// Normal with mean zero and standard deviation `scale`.
    Normal,
}

/// A tensor of `elements` equal elements.
pub(super) fn splat(
    dtype: DType,
    shape: &[usize],
    elements: usize,
    element: &[u8],
) -> Option<Tensor> {
    Tensor::from_bytes(dtype, shape.to_vec(), element.repeat(elements))
}

/// A tensor of draws; the same for the same arguments on every machine.
pub(super) fn draw(
    dtype: DType,
    shape: &[usize],
    elements: usize,
    distribution: Distribution,
    seed: u64,
    scale: f64,
) -> Option<Tensor> {
    let mut state = seed;
    let mut unit = move || {
        // SplitMix64 (Steele, Lea, Flood 2014), upper 53 bits.
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        #[allow(clippy::cast_precision_loss, reason = "53 bits are exact")]
        let unit = ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64;
        unit
    };
    let mut bytes = Vec::with_capacity(elements.checked_mul(dtype.size())?);
    let mut rest = elements;
    while rest > 0 {
        let part = rest.min(4096);
        rest -= part;
        let values: Vec<f64> = (0..part)
            .map(|_| match distribution {
                Distribution::Uniform => (2.0 * unit() - 1.0) * scale,
                // Irwin-Hall: twelve uniforms need no logarithm, whose last bit differs between platforms.
                Distribution::Normal => ((0..12).map(|_| unit()).sum::<f64>() - 6.0) * scale,
            })
            .map(
                |value| if dtype == DType::Bool { f64::from(u8::from(value > 0.0)) } else { value },
            )
            .collect();
        bytes.extend_from_slice(Tensor::from_f64(dtype, &[part], &values)?.bytes());
    }
    Tensor::from_bytes(dtype, shape.to_vec(), bytes)
}
