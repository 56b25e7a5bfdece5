//! The words and numbers of the command line, as clap parses them.

use super::args::GradWeight;
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use qcompile_ir::{DType, GradientRounding, Granularity, Scaling, Tensor};
use qcompile_kernels::Tier;
use qcompile_passes::attach_loss::LossKind;
use qcompile_passes::calibrate::Method;
use qcompile_passes::quantize::{ChannelPolicy, Codes, OperandTypes, Operations, PrecisionChoice};
use qcompile_passes::sensitivity::Metric;
use qcompile_passes::update::Optimizer;

/// A parser of the words of `all`.
fn words<T: Clone + Send + Sync + 'static>(
    all: &'static [T],
    name: impl Fn(&T) -> &'static str + Clone + Send + Sync + 'static,
) -> impl TypedValueParser<Value = T> {
    PossibleValuesParser::new(all.iter().map(&name)).try_map(move |word| {
        let found = all.iter().find(|value| name(value) == word).cloned();
        found.ok_or_else(|| format!("`{word}` is not known"))
    })
}

pub(super) fn loss() -> impl TypedValueParser<Value = LossKind> {
    words(&LossKind::ALL, |kind| kind.name())
}

pub(super) fn optimizer() -> impl TypedValueParser<Value = Optimizer> {
    words(&Optimizer::ALL, |kind| kind.name())
}

pub(super) fn channel_policy() -> impl TypedValueParser<Value = ChannelPolicy> {
    words(&ChannelPolicy::ALL, |policy| policy.name())
}

pub(super) fn metric() -> impl TypedValueParser<Value = Metric> {
    words(&Metric::ALL, |kind| kind.name())
}

/// A choice, or the set to choose from in any order.
pub(super) fn precision() -> impl TypedValueParser<Value = PrecisionChoice> {
    let word = |choice: PrecisionChoice| {
        PossibleValue::new(choice.name()).aliases(choice.aliases().iter().copied())
    };
    PossibleValuesParser::new(PrecisionChoice::ALL.map(word))
        .try_map(|word| word.parse().map_err(|()| format!("`{word}` is not known")))
}

pub(super) fn granularity() -> impl TypedValueParser<Value = Granularity> {
    words(&Granularity::ALL, |kind| kind.name())
}

pub(super) fn rounding() -> impl TypedValueParser<Value = GradientRounding> {
    words(&GradientRounding::ALL, |kind| kind.name())
}

pub(super) fn scaling() -> impl TypedValueParser<Value = Scaling> {
    words(&Scaling::ALL, |kind| kind.name())
}

pub(super) fn grad_weight() -> impl TypedValueParser<Value = GradWeight> {
    words(&GradWeight::ALL, |kind| kind.name())
}

pub(super) fn operand_types(text: &str) -> Result<OperandTypes, String> {
    text.parse()
}

pub(super) fn run_precision() -> impl TypedValueParser<Value = PrecisionChoice> {
    const CHOICES: [PrecisionChoice; 3] =
        [PrecisionChoice::F32, PrecisionChoice::Bf16, PrecisionChoice::Int8];
    words(&CHOICES, |choice| choice.name())
}

pub(super) fn tier() -> impl TypedValueParser<Value = Tier> {
    words(&Tier::ALL, |tier| tier_name(*tier))
}

/// The word for a tier on the command line.
#[must_use]
pub(super) const fn tier_name(tier: Tier) -> &'static str {
    match tier {
        Tier::Portable => "portable",
        Tier::Avx2 => "avx2",
        Tier::Avx512 => "avx512",
        Tier::Avx512Bf16 => "avx512_bf16",
        Tier::Avx512Amx => "avx512_amx",
    }
}

pub(super) fn pass(all: bool) -> PossibleValuesParser {
    let names = crate::street::Pass::ALL.iter().map(|pass| pass.name());
    PossibleValuesParser::new(names.chain(all.then_some("all")))
}

pub(super) fn positive(text: &str) -> Result<usize, String> {
    let number = text.parse::<usize>().ok().filter(|number| (1..=1 << 24).contains(number));
    number.ok_or_else(|| "a whole number from 1 is wanted".to_owned())
}

fn real(text: &str, fits: impl Fn(f64) -> bool, wanted: &str) -> Result<f64, String> {
    let number = text.parse::<f64>().ok().filter(|number| number.is_finite() && fits(*number));
    number.ok_or_else(|| format!("{wanted} is wanted"))
}

pub(super) fn not_negative(text: &str) -> Result<f64, String> {
    real(text, |x| x >= 0.0, "a number from 0")
}

pub(super) fn above_zero(text: &str) -> Result<f64, String> {
    real(text, |x| x > 0.0, "a number above 0")
}

pub(super) fn fraction(text: &str) -> Result<f64, String> {
    real(text, |x| (0.0..1.0).contains(&x), "a number from 0, below 1")
}

#[allow(clippy::cast_possible_truncation, reason = "scores are f32")]
pub(super) fn finite(text: &str) -> Result<f32, String> {
    real(text, |x| x.abs() <= f64::from(f32::MAX), "a number").map(|x| x as f32)
}

pub(super) fn dim(text: &str) -> Result<(String, usize), String> {
    let (name, size) = text.rsplit_once('=').ok_or("NAME=VALUE is wanted")?;
    if name.is_empty() {
        return Err("NAME=VALUE is wanted".to_owned());
    }
    Ok((name.to_owned(), positive(size)?))
}

/// Integers, or numbers if one is none, as a vector.
pub(super) fn constant(text: &str) -> Result<(String, Tensor), String> {
    let wanted = "NAME=VALUE or NAME=VALUE,VALUE... is wanted, of numbers";
    let (name, list) = text.rsplit_once('=').filter(|(name, _)| !name.is_empty()).ok_or(wanted)?;
    let words: Vec<&str> =
        if list.is_empty() { Vec::new() } else { list.split(',').map(str::trim).collect() };
    let integers: Result<Vec<i64>, _> = words.iter().map(|word| word.parse()).collect();
    let tensor = match integers {
        Ok(values) => Tensor::from_i64(&[words.len()], &values),
        Err(_) => {
            let values: Result<Vec<f32>, _> = words.iter().map(|word| word.parse()).collect();
            Tensor::from_f32(&[words.len()], &values.map_err(|_| wanted)?)
        }
    };
    Ok((name.to_owned(), tensor.ok_or(wanted)?))
}

pub(super) fn keep(text: &str) -> Result<String, String> {
    match text.split_once('=') {
        Some(("f32", pattern)) if !pattern.is_empty() => Ok(pattern.to_owned()),
        _ => Err("f32=PATTERN is wanted".to_owned()),
    }
}

pub(super) fn codes() -> impl TypedValueParser<Value = Codes> {
    words(&Codes::ALL, |codes| codes.name())
}

pub(super) fn weights(text: &str) -> Result<DType, String> {
    match text {
        "int8" => Ok(DType::I8),
        "int4" => Ok(DType::I4),
        _ => Err("int8 or int4 is wanted".to_owned()),
    }
}

pub(super) fn calibration(text: &str) -> Result<Method, String> {
    match text.split_once('=') {
        None if text == "min-max" => Ok(Method::MinMax),
        None if text == "mse" => Ok(Method::Mse),
        None if text == "entropy" => Ok(Method::Entropy),
        None if text == "lsq" => Ok(Method::Lsq),
        Some(("percentile", percent)) => {
            let wanted = "a percentage above 50, at most 100";
            real(percent, |x| x > 50.0 && x <= 100.0, wanted).map(Method::Percentile)
        }
        _ => Err("min-max, percentile=P, mse, entropy or lsq is wanted".to_owned()),
    }
}

pub(super) fn operations(text: &str) -> Result<Operations, String> {
    text.parse()
}

pub(super) fn on_or_off(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("on or off is wanted".to_owned()),
    }
}

/// An opset that can be written.
pub(super) fn opset(word: &str) -> Result<u32, String> {
    let range = qcompile_onnx::EXPORT_OPSETS;
    word.parse()
        .ok()
        .filter(|opset| range.contains(opset))
        .ok_or_else(|| format!("`{word}` is no opset from {} to {}", range.start(), range.end()))
}

/// Bytes: a number, or one with a unit of 1000 (`1.5GB`) or 1024 (`512MiB`).
pub(super) fn size(text: &str) -> Result<usize, String> {
    const UNITS: [(&str, i32, f64); 8] = [
        ("KiB", 1, 1024.0),
        ("MiB", 2, 1024.0),
        ("GiB", 3, 1024.0),
        ("TiB", 4, 1024.0),
        ("kB", 1, 1e3),
        ("MB", 2, 1e3),
        ("GB", 3, 1e3),
        ("TB", 4, 1e3),
    ];
    let wanted =
        || format!("`{text}` is no size: bytes are wanted, as 1500000000, 1.5GB or 512MiB");
    if let Ok(bytes) = text.parse::<usize>() {
        return Some(bytes).filter(|&bytes| bytes > 0).ok_or_else(wanted);
    }
    let found = UNITS.iter().find_map(|&(unit, power, base)| {
        let number = text.strip_suffix(unit)?.trim().parse::<f64>().ok()?;
        Some(number * base.powi(power))
    });
    let most = (1_u64 << 50) as f64;
    let bytes = found.filter(|bytes| *bytes >= 1.0 && *bytes <= most).ok_or_else(wanted)?;
    Ok(bytes as usize)
}

#[cfg(test)]
mod tests {
    use super::size;

    #[test]
    fn sizes_have_units() {
        let good = [
            ("1500", 1500),
            ("1.5GB", 1_500_000_000),
            ("512MiB", 512 << 20),
            ("2 kB", 2000),
            ("1TiB", 1 << 40),
        ];
        for (text, bytes) in good {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for text in ["", "0", "-1", "GB", "1.5", "1 gb", "1e9GB", "nanMB", "infMB", "0.0001kB"] {
            assert!(size(text).is_err(), "{text}");
        }
    }
}
