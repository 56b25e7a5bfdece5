//! Quantization noise of a tensor, computed on the host.

use qcompile_ir::{DType, QuantizedRange, Tensor};

/// Energy of a signal and of its quantization noise.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Noise {
    signal: f64,
    noise: f64,
}

impl Noise {
    /// The ratio noise : signal; 0 if both are 0, infinite if only the signal is.
    #[allow(clippy::cast_possible_truncation, reason = "a score needs no more than f32")]
    pub(super) fn ratio(self) -> f32 {
        if self.noise == 0.0 { 0.0 } else { (self.noise / self.signal) as f32 }
    }

    fn add(&mut self, exact: f64, rounded: f64) {
        self.signal += exact * exact;
        self.noise += (exact - rounded) * (exact - rounded);
    }
}

/// The sum over channels.
pub(super) fn total(channels: &[Noise]) -> Noise {
    channels.iter().fold(Noise::default(), |sum, part| Noise {
        signal: sum.signal + part.signal,
        noise: sum.noise + part.noise,
    })
}

/// The channel of each element of a row-major tensor.
fn channel_of(shape: &[usize], axis: usize) -> impl Fn(usize) -> usize {
    let inner: usize = shape[axis + 1..].iter().product();
    let channels = shape[axis];
    move |element| element / inner % channels
}

/// Noise per index of `axis` of what rounding to codes of `dtype` with one scale per index leaves of `weight`.
#[allow(clippy::cast_possible_truncation, reason = "codes are small")]
pub(super) fn of_weight(weight: &Tensor, axis: usize, dtype: DType) -> Vec<Noise> {
    let values = weight.to_f32();
    let channel = channel_of(weight.shape(), axis);
    let largest = QuantizedRange::of(dtype, false).map_or(127.0, |range| range.high);
    let mut scales = vec![0.0_f32; weight.shape()[axis]];
    for (element, value) in values.iter().enumerate() {
        let scale = &mut scales[channel(element)];
        *scale = scale.max(value.abs());
    }
    for scale in &mut scales {
        *scale = (*scale / largest).max(QuantizedRange::SMALLEST_SCALE as f32);
    }
    let quotient = |(element, value): (usize, &f32)| {
        f64::from((value / scales[channel(element)]).clamp(-largest, largest))
    };
    let mut codes: Vec<f64> = values.iter().enumerate().map(quotient).collect();
    if dtype.is_float() {
        codes = Tensor::from_f64(dtype, &[codes.len()], &codes).map_or(codes, |t| t.to_f64());
    } else {
        codes.iter_mut().for_each(|code| *code = code.round_ties_even());
    }
    let mut noise = vec![Noise::default(); scales.len()];
    for (element, (&value, code)) in values.iter().zip(codes).enumerate() {
        let at = channel(element);
        noise[at].add(f64::from(value), f64::from(code as f32 * scales[at]));
    }
    noise
}

/// Noise of what rounding to codes of `dtype` with one scale leaves of `data`.
pub(super) fn of_tensor(data: &Tensor, dtype: DType) -> Noise {
    let flat = Tensor::from_f32(&[1, data.elements()], &data.to_f32());
    flat.map_or_else(Noise::default, |flat| total(&of_weight(&flat, 0, dtype)))
}

/// The largest magnitude per index of `axis`, over the median of those that are not 0.
pub(super) fn ranges(data: &Tensor, axis: usize) -> Vec<f32> {
    let channel = channel_of(data.shape(), axis);
    let mut largest = vec![0.0_f32; data.shape()[axis]];
    for (element, value) in data.to_f32().into_iter().enumerate() {
        let most = &mut largest[channel(element)];
        // A NaN is larger than all.
        *most = if value.is_nan() { f32::INFINITY } else { most.max(value.abs()) };
    }
    let mut sorted: Vec<f32> = largest.iter().copied().filter(|most| *most > 0.0).collect();
    sorted.sort_by(f32::total_cmp);
    let median = sorted.get(sorted.len() / 2).copied().unwrap_or(1.0);
    let ratio = |most: f32| if most.is_infinite() { most } else { most / median };
    largest.into_iter().map(ratio).collect()
}

/// Noise per index of `axis` of `rounded` against `exact`; `None` if their shapes differ.
pub(super) fn between(exact: &Tensor, rounded: &Tensor, axis: usize) -> Option<Vec<Noise>> {
    if exact.shape() != rounded.shape() {
        return None;
    }
    let channel = channel_of(exact.shape(), axis);
    let mut noise = vec![Noise::default(); *exact.shape().get(axis)?];
    for (element, (a, b)) in exact.to_f64().into_iter().zip(rounded.to_f64()).enumerate() {
        noise[channel(element)].add(a, b);
    }
    Some(noise)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_of_a_channel_ignores_the_size_of_the_others() {
        let weight = Tensor::from_f32(&[2, 3], &[0.1, 0.25, 0.7, 100.0, 250.0, 700.0]).expect("6");
        let noise = of_weight(&weight, 0, DType::I8);
        let (a, b) = (noise[0].ratio(), noise[1].ratio());
        assert!(a > 0.0 && (a - b).abs() < 1e-3 * a, "{a} {b}");
        let coarse = total(&of_weight(&weight, 0, DType::I4)).ratio();
        assert!(coarse > 100.0 * a, "{coarse}");
        // By columns, the large row drowns the small one: more noise than by rows.
        assert!(total(&of_weight(&weight, 1, DType::I8)).ratio() > 0.0);
        assert_eq!(
            total(&of_weight(&Tensor::zeros(weight.dtype(), &[2, 2]), 0, DType::I8)).ratio(),
            0.0
        );
    }

    #[test]
    fn ranges_are_relative_to_the_usual_one() {
        let data = Tensor::from_f32(&[2, 4], &[0.0, 1.0, -2.0, 8.0, 0.0, -0.5, 1.0, 100.0]);
        let data = data.expect("8");
        assert_eq!(ranges(&data, 1), [0.0, 0.5, 1.0, 50.0]);
        // One channel makes the scale too coarse for the others.
        let others = Tensor::from_f32(&[2, 2], &[1.0, -2.0, -0.5, 1.0]).expect("4");
        assert!(of_tensor(&others, DType::I8).ratio() > 0.0);
        assert_eq!(of_tensor(&Tensor::zeros(data.dtype(), &[3]), DType::I8).ratio(), 0.0);
    }

    #[test]
    fn noise_between_tensors_is_relative_energy() {
        let a = Tensor::from_f32(&[2, 2], &[1.0, 2.0, 1.0, 2.0]).expect("4");
        let b = Tensor::from_f32(&[2, 2], &[1.0, 1.0, 1.0, 2.0]).expect("4");
        let noise = between(&a, &b, 1).expect("same shape");
        assert_eq!(noise.iter().map(|n| n.ratio()).collect::<Vec<_>>(), [0.0, 0.125]);
        assert!(between(&a, &Tensor::zeros(a.dtype(), &[4]), 0).is_none());
    }
}
