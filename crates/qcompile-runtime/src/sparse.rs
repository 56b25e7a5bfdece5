//! Gradients as messages that say little where little happens: the coder of Xu and Diamant (US 2021/0295168 A1).
//!
//! Four stages, each of which may be left out: an analysis finds a threshold, what is below it is clipped to zero, what
//! survives is quantized to i8, and zeros are left out of the message. A message is a head of 20 bytes, then which
//! values survive, then these. The survivors are named by a bitmap, or by their indices where that is shorter: below
//! one in 32. So a message of n values with s survivors has
//!
//! ```text
//! 20 + min(ceil(n / 8), 4 s) + s · (4, or 1 for i8)        bytes, or        20 + n · (4, or 1)        with zeros left in.
//! ```
//!
//! | offset | size | what |
//! | ---: | ---: | --- |
//! | 0 | 4 | n |
//! | 4 | 4 | s |
//! | 8 | 4 | the threshold, f32 |
//! | 12 | 4 | the scale of i8 values, f32; 1 for f32 |
//! | 16 | 1 | where survivors are: 0 everywhere, 1 bitmap, 2 indices |
//! | 17 | 1 | values: 0 f32, 1 i8 |
//! | 18 | 2 | zeros |
//!
//! All numbers are little-endian; bit i of byte j of the bitmap is value 8 j + i.

use crate::RuntimeError;

const HEAD: usize = 20;

/// How values below which magnitude are found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Analysis {
    /// No value is too small.
    None,
    /// Values below this magnitude.
    Threshold(f32),
    /// As many as leave this share of the values, at least one.
    Density(f32),
}

/// The stages.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Coder {
    /// The threshold.
    pub analysis: Analysis,
    /// Whether what is below it becomes zero.
    pub clips: bool,
    /// Whether values are rounded to i8 by their largest magnitude.
    pub quantizes: bool,
    /// Whether zeros are left out.
    pub compresses: bool,
}

/// Bytes of a message of so many values and survivors, zeros left out.
#[must_use]
pub const fn compressed_size(values: usize, survivors: usize, quantized: bool) -> usize {
    let (bitmap, indices) = (values.div_ceil(8), 4 * survivors);
    let places = if bitmap <= indices { bitmap } else { indices };
    HEAD + places + survivors * if quantized { 1 } else { 4 }
}

impl Coder {
    /// The message of these values.
    ///
    /// # Errors
    /// [`RuntimeError::Exchange`] for a value that is not finite, for more values than a message can count, and for a
    /// density that is not from 0 to 1.
    pub fn encode(&self, values: &[f32]) -> Result<Vec<u8>, RuntimeError> {
        let count = u32::try_from(values.len())
            .map_err(|_| refused(format!("{} values are too many", values.len())))?;
        if let Some(at) = values.iter().position(|value| !value.is_finite()) {
            return Err(refused(format!("value {at} is {}", values[at])));
        }
        let threshold = self.threshold(values)?;
        let kept = |value: f32| {
            if self.clips && value.abs() < threshold { 0.0 } else { value }
        };
        let values: Vec<f32> = values.iter().map(|&value| kept(value)).collect();
        let survivors: Vec<(u32, f32)> = (0..count)
            .zip(values.iter().copied())
            .filter(|(_, value)| *value != 0.0 || !self.compresses)
            .collect();
        let peak = values.iter().fold(0.0_f32, |peak, value| peak.max(value.abs()));
        let scale = if self.quantizes { (peak / 127.0).max(1e-30) } else { 1.0 };
        let bitmap = values.len().div_ceil(8) <= 4 * survivors.len();
        let places = match (self.compresses, bitmap) {
            (false, _) => 0,
            (true, true) => 1,
            (true, false) => 2,
        };
        let sent = u32::try_from(survivors.len()).unwrap_or(count);
        let mut message = Vec::new();
        message.extend(count.to_le_bytes());
        message.extend(sent.to_le_bytes());
        message.extend(threshold.to_le_bytes());
        message.extend(scale.to_le_bytes());
        message.extend([places, u8::from(self.quantizes), 0, 0]);
        match places {
            1 => {
                let mut bits = vec![0_u8; values.len().div_ceil(8)];
                for &(at, _) in &survivors {
                    bits[at as usize / 8] |= 1 << (at % 8);
                }
                message.extend(bits);
            }
            2 => survivors.iter().for_each(|(at, _)| message.extend(at.to_le_bytes())),
            _ => {}
        }
        for &(_, value) in &survivors {
            if self.quantizes {
                #[allow(clippy::cast_possible_truncation, reason = "at most 127 in magnitude")]
                let code = (value / scale).round_ties_even().clamp(-127.0, 127.0) as i8;
                message.extend(code.to_le_bytes());
            } else {
                message.extend(value.to_le_bytes());
            }
        }
        Ok(message)
    }

    fn threshold(&self, values: &[f32]) -> Result<f32, RuntimeError> {
        match self.analysis {
            Analysis::None => Ok(0.0),
            Analysis::Threshold(threshold) if threshold >= 0.0 => Ok(threshold),
            Analysis::Threshold(threshold) => Err(refused(format!("a threshold of {threshold}"))),
            Analysis::Density(density) if (0.0..=1.0).contains(&density) => {
                let mut magnitudes: Vec<f32> = values.iter().map(|value| value.abs()).collect();
                magnitudes.sort_by(|a, b| b.total_cmp(a));
                #[allow(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    clippy::cast_precision_loss,
                    reason = "a share of a length"
                )]
                let last = (f64::from(density) * values.len() as f64).round().max(1.0) as usize;
                Ok(magnitudes.get(last - 1).copied().unwrap_or(0.0))
            }
            Analysis::Density(density) => Err(refused(format!("a density of {density}"))),
        }
    }
}

/// The values of a message, whoever wrote it; `count` is how many there must be.
///
/// # Errors
/// [`RuntimeError::Exchange`] for what is no message of so many values.
pub fn decode(message: &[u8], count: usize) -> Result<Vec<f32>, RuntimeError> {
    let cut = || refused("the message is cut off");
    let (head, rest) = message.split_at_checked(HEAD).ok_or_else(cut)?;
    let word = |at: usize| [head[at], head[at + 1], head[at + 2], head[at + 3]];
    let (values, survivors) = (u32::from_le_bytes(word(0)), u32::from_le_bytes(word(4)));
    let scale = f32::from_le_bytes(word(12));
    if values as usize != count || survivors > values || head[16] > 2 || head[17] > 1 {
        return Err(refused(format!("the message is not one of {count} values")));
    }
    if !scale.is_finite() || scale <= 0.0 {
        return Err(refused(format!("the message has a scale of {scale}")));
    }
    let sent = survivors as usize;
    let places: Vec<usize> = match head[16] {
        0 => (0..count).collect(),
        1 => {
            let bits = rest.get(..count.div_ceil(8)).ok_or_else(cut)?;
            (0..8 * bits.len()).filter(|at| bits[at / 8] >> (at % 8) & 1 == 1).collect()
        }
        _ => {
            let indices = rest.get(..4 * sent).ok_or_else(cut)?.chunks_exact(4);
            indices.map(|at| u32::from_le_bytes([at[0], at[1], at[2], at[3]]) as usize).collect()
        }
    };
    let before = match head[16] {
        0 => 0,
        1 => count.div_ceil(8),
        _ => 4 * sent,
    };
    let width = if head[17] == 1 { 1 } else { 4 };
    let payload = &rest[before..];
    let ascending = places.is_sorted_by(|a, b| a < b);
    if places.len() != sent || !ascending || places.last().is_some_and(|last| *last >= count) {
        return Err(refused("the message names other survivors than it has"));
    }
    if payload.len() != width * sent {
        return Err(cut());
    }
    let mut decoded = vec![0.0; count];
    for (at, bytes) in places.into_iter().zip(payload.chunks_exact(width)) {
        decoded[at] = match *bytes {
            [code] => f32::from(code.cast_signed()) * scale,
            [a, b, c, d] => f32::from_le_bytes([a, b, c, d]),
            _ => 0.0,
        };
    }
    Ok(decoded)
}

fn refused(reason: impl Into<String>) -> RuntimeError {
    RuntimeError::Exchange(reason.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers of both signs whose magnitudes spread over several powers of ten.
    fn gradients(count: u32) -> Vec<f32> {
        let value = |at: u32| {
            let bits = at.wrapping_mul(0x9e37_79b9) ^ 0x5bd1_e995;
            let sign = if bits & 1 == 0 { 1.0 } else { -1.0 };
            sign * f32::powi(((bits >> 8) & 0xffff) as f32 / 65536.0, 6)
        };
        (0..count).map(value).collect()
    }

    fn coder(density: f32, quantizes: bool) -> Coder {
        Coder { analysis: Analysis::Density(density), clips: true, quantizes, compresses: true }
    }

    #[test]
    fn survivors_come_back_bit_by_bit_and_sizes_are_those_of_the_law() {
        for count in [1_u32, 7, 8, 1000, 4096, 10_007] {
            let values = gradients(count);
            let n = count as usize;
            for density in [0.0, 0.001, 0.01, 1.0 / 32.0, 0.05, 0.1, 0.5, 1.0] {
                let message = coder(density, false).encode(&values).expect("finite");
                let decoded = decode(&message, n).expect("its own");
                let survivors = decoded.iter().filter(|value| **value != 0.0).count();
                let threshold =
                    f32::from_le_bytes([message[8], message[9], message[10], message[11]]);
                for (decoded, value) in decoded.iter().zip(&values) {
                    let kept = if value.abs() < threshold { 0.0 } else { *value };
                    assert_eq!(decoded.to_bits(), (kept + 0.0).to_bits());
                }
                assert_eq!(message.len(), compressed_size(n, survivors, false));
                let rounded = coder(density, true).encode(&values).expect("finite");
                assert_eq!(rounded.len(), compressed_size(n, survivors, true));
                let by_index = message[16] == 2;
                assert_eq!(by_index, 4 * survivors < n.div_ceil(8), "{survivors} of {n}");
                assert_eq!(
                    survivors,
                    (f64::from(density) * f64::from(count)).round().max(1.0) as usize
                );
            }
        }
    }

    #[test]
    fn a_tenth_of_the_values_takes_what_the_law_says() {
        let n = 1 << 20;
        let head = 20.0 / n as f64;
        let each = |survivors, quantized| {
            compressed_size(n, survivors, quantized) as f64 / n as f64 - head
        };
        let tenth = n / 10;
        assert!((4.0 / each(tenth, false) - 7.6).abs() < 0.05);
        assert!((4.0 / each(tenth, true) - 17.8).abs() < 0.05);
        // Bitmap and indices meet at 1 in 32.
        assert_eq!(compressed_size(3200, 100, true), 20 + 400 + 100);
        assert_eq!(compressed_size(3200, 99, true), 20 + 396 + 99);
    }

    #[test]
    fn every_stage_can_be_left_out() {
        let values = gradients(1000);
        for bits in 0..16_u8 {
            let on = |bit: u8| bits & bit != 0;
            let analysis = if on(1) { Analysis::Threshold(0.1) } else { Analysis::None };
            let coder = Coder { analysis, clips: on(2), quantizes: on(4), compresses: on(8) };
            let message = coder.encode(&values).expect("finite");
            let decoded = decode(&message, 1000).expect("its own");
            let peak = values.iter().fold(0.0_f32, |peak, value| peak.max(value.abs()));
            let error = if on(4) { peak / 254.0 * 1.001 } else { 0.0 };
            for (decoded, value) in decoded.iter().zip(&values) {
                let wanted = if on(1) && on(2) && value.abs() < 0.1 { 0.0 } else { *value };
                assert!((decoded - wanted).abs() <= error, "{coder:?}: {decoded} is not {wanted}");
            }
            let survivors = values.iter().filter(|value| !(on(1) && on(2)) || value.abs() >= 0.1);
            let width = if on(4) { 1 } else { 4 };
            let expected = match on(8) {
                true => {
                    compressed_size(1000, survivors.filter(|value| **value != 0.0).count(), on(4))
                }
                false => 20 + 1000 * width,
            };
            assert_eq!(message.len(), expected, "{coder:?}");
        }
    }

    #[test]
    fn what_is_no_message_is_refused() {
        for (density, quantizes) in [(0.5, false), (0.01, true)] {
            let message = coder(density, quantizes).encode(&gradients(300)).expect("finite");
            for length in 0..message.len() {
                assert!(decode(&message[..length], 300).is_err(), "{length}");
            }
            for at in 0..message.len() {
                for flip in [1, 0x80, 0xff] {
                    let mut changed = message.clone();
                    changed[at] ^= flip;
                    // Refused, or other values; never a panic.
                    drop(decode(&changed, 300));
                }
            }
            assert!(decode(&message, 299).is_err());
        }
        assert!(coder(0.5, false).encode(&[1.0, f32::NAN]).is_err());
        assert!(coder(1.5, false).encode(&[1.0]).is_err());
        assert!(coder(f32::NAN, false).encode(&[1.0]).is_err());
        assert_eq!(
            decode(&coder(0.5, true).encode(&[0.0; 5]).expect("zeros"), 5).expect("zeros"),
            [0.0; 5]
        );
    }
}
