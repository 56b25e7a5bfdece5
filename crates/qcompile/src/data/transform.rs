//! What is done to samples on their way from the file to the model.

use super::array::Array;
use crate::error::{Code, Error, Result};

/// Changes to the samples of an array, applied in this order: layout, channels, padding, then on every value
/// `(value * scale - mean) / std`. Padding is therefore with the file's zero, as if the image itself were larger.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Transform {
    /// Samples are height x width x channels and are turned to channels x height x width.
    pub channels_last: bool,
    /// Number of channels to which the single one is repeated; a missing channel axis is added.
    pub channels: Option<usize>,
    /// Zeros added on each of the four sides of the last two axes.
    pub pad: usize,
    /// Changes of the values.
    pub values: Values,
}

/// `(value * scale - mean) / std`, with one mean and std for all values or one per entry of the first sample axis
/// (the channels of images, the columns of tables).
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Values {
    /// Factor; when it is not given, 1, or 1/255 for u8 data that goes to a floating-point input.
    pub scale: Option<f64>,
    /// Means; empty is 0.
    pub mean: Vec<f64>,
    /// Standard deviations; empty is 1.
    pub std: Vec<f64>,
}

/// Most elements a changed sample may have.
const SAMPLE_LIMIT: usize = 1 << 26;

impl Transform {
    /// Shape of a changed sample.
    ///
    /// # Errors
    /// [`Code::DataShape`] when the sample has not the axes that are to be changed.
    pub fn sample_shape(&self, sample: &[usize]) -> Result<Vec<usize>> {
        let wrong = |what: &str| {
            Error::new(Code::DataShape, format!("samples of shape {sample:?} cannot be {what}"))
        };
        let mut shape = sample.to_vec();
        if self.channels_last {
            let [h, w, c] = *sample else { return Err(wrong("turned from `hwc`: three axes are")) };
            shape = vec![c, h, w];
        }
        if let Some(channels) = self.channels {
            shape = match *shape {
                [h, w] | [1, h, w] => vec![channels, h, w],
                _ => return Err(wrong("repeated over channels: they are not of one channel")),
            };
        }
        if self.pad > 0 {
            let rank = shape.len();
            if rank < 2 {
                return Err(wrong("padded: they have no height and width"));
            }
            for extent in &mut shape[rank - 2..] {
                *extent = extent.saturating_add(self.pad.saturating_mul(2));
            }
        }
        match super::array::elements(&shape) {
            Some(n) if n <= SAMPLE_LIMIT => Ok(shape),
            _ => Err(Error::new(Code::Limit, format!("samples of shape {shape:?} are too large"))),
        }
    }

    /// Changes layout, channels and padding of `array`, whose first axis is samples. Values stay.
    ///
    /// # Errors
    /// As [`sample_shape`](Self::sample_shape); [`Code::DataShape`] for a scalar.
    pub fn arrange(&self, array: Array) -> Result<Array> {
        let Some((&samples, sample)) = array.shape.split_first() else {
            return Err(Error::new(Code::DataShape, "a single number has no samples"));
        };
        let wanted = self.sample_shape(sample)?;
        if wanted == sample && !self.channels_last {
            return Ok(array);
        }
        let size = array.dtype.size();
        // Every change is on planes of height x width, each read with its own strides.
        let (planes, h, w) = match *sample {
            [h, w, c] if self.channels_last => (c, h, w),
            _ => {
                let (h, w) = (sample[sample.len() - 2], sample[sample.len() - 1]);
                (sample[..sample.len() - 2].iter().product(), h, w)
            }
        };
        let copies = self.channels.unwrap_or(1);
        let (plane_step, pixel_step) = if self.channels_last { (1, planes) } else { (h * w, 1) };
        let sample_bytes = array.sample_bytes();
        let wide = w + 2 * self.pad;
        let out_bytes = wanted.iter().product::<usize>() * size;
        let mut bytes = vec![0; samples.saturating_mul(out_bytes)];
        for n in 0..samples {
            let from = &array.bytes[n * sample_bytes..(n + 1) * sample_bytes];
            let to = &mut bytes[n * out_bytes..(n + 1) * out_bytes];
            for copy in 0..planes * copies {
                let plane = copy % planes;
                for y in 0..h {
                    let row = (copy * (h + 2 * self.pad) + y + self.pad) * wide + self.pad;
                    let to = &mut to[row * size..(row + w) * size];
                    let start = plane * plane_step + y * w * pixel_step;
                    if pixel_step == 1 {
                        to.copy_from_slice(&from[start * size..(start + w) * size]);
                    } else {
                        for (x, to) in to.chunks_exact_mut(size).enumerate() {
                            let at = (start + x * pixel_step) * size;
                            to.copy_from_slice(&from[at..at + size]);
                        }
                    }
                }
            }
        }
        let shape = [samples].into_iter().chain(wanted).collect();
        Array::new(array.dtype, shape, bytes)
    }
}

impl Values {
    /// Whether values stay as they are.
    #[must_use]
    pub fn is_identity(&self) -> bool {
        self.scale.is_none_or(|scale| scale == 1.0)
            && self.mean.iter().all(|&mean| mean == 0.0)
            && self.std.iter().all(|&std| std == 1.0)
    }

    /// The change of values at entry `channel` of the first sample axis.
    pub fn at(&self, channel: usize) -> impl Fn(f64) -> f64 + use<> {
        let entry = |list: &[f64], default| match *list {
            [] => default,
            [one] => one,
            ref many => many.get(channel).copied().unwrap_or(default),
        };
        let (scale, mean, std) =
            (self.scale.unwrap_or(1.0), entry(&self.mean, 0.0), entry(&self.std, 1.0));
        move |value| (value * scale - mean) / std
    }

    /// Number of entries of the first sample axis that differ; 1 when all values change alike.
    ///
    /// # Errors
    /// [`Code::DataShape`] when the lists do not fit `sample`, the shape of a sample.
    pub fn channels(&self, sample: &[usize]) -> Result<usize> {
        let mut channels = 1;
        for (name, list) in [("mean", &self.mean), ("std", &self.std)] {
            if list.len() > 1 {
                if sample.first() != Some(&list.len()) {
                    let cause = format!(
                        "`{name}` has {} values, but samples have shape {sample:?}",
                        list.len()
                    );
                    return Err(Error::new(Code::DataShape, cause)
                        .help("give one value, or one per channel (for tables: per column)"));
                }
                channels = list.len();
            }
        }
        Ok(channels)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pads_and_repeats() {
        let image = Array::from_u8(vec![1, 1, 2], &[5, 6]).unwrap();
        let change = Transform { channels: Some(2), pad: 1, ..Transform::default() };
        let out = change.arrange(image).unwrap();
        assert_eq!(out.shape, [1, 2, 3, 4]);
        let plane = [0, 0, 0, 0, 0, 5, 6, 0, 0, 0, 0, 0];
        assert_eq!(out.bytes, [plane, plane].concat());
    }

    #[test]
    fn turns_channels_last_to_first() {
        // One 1x2 image of three channels, and its two-byte pixels.
        let bytes = [1_i16, 2, 3, 4, 5, 6].iter().flat_map(|v| v.to_le_bytes()).collect();
        let image = Array::new(crate::data::Dtype::I16, vec![1, 1, 2, 3], bytes).unwrap();
        let change = Transform { channels_last: true, ..Transform::default() };
        let out = change.arrange(image.clone()).unwrap();
        let wanted: Vec<u8> = [1_i16, 4, 2, 5, 3, 6].iter().flat_map(|v| v.to_le_bytes()).collect();
        assert_eq!((out.shape, out.bytes), (vec![1, 3, 1, 2], wanted));
        // Also when the extents are equal and only the meaning changes.
        let cube = Array::from_u8(vec![1, 2, 2, 2], &[1, 2, 3, 4, 5, 6, 7, 8]).unwrap();
        assert_eq!(change.arrange(cube).unwrap().bytes, [1, 3, 5, 7, 2, 4, 6, 8]);
    }

    #[test]
    fn refuses_samples_without_the_axes() {
        let row = Array::from_u8(vec![1, 4], &[1, 2, 3, 4]).unwrap();
        for change in [
            Transform { pad: 1, ..Transform::default() },
            Transform { channels: Some(3), ..Transform::default() },
            Transform { channels_last: true, ..Transform::default() },
        ] {
            assert_eq!(change.arrange(row.clone()).unwrap_err().code(), Code::DataShape);
        }
        let vast = Transform { pad: usize::MAX / 2, ..Transform::default() };
        assert_eq!(vast.sample_shape(&[2, 2]).unwrap_err().code(), Code::Limit);
        let scalar = Array::from_u8(vec![], &[1]).unwrap();
        assert!(Transform::default().arrange(scalar).is_err());
    }

    #[test]
    fn values_change_by_channel() {
        let values = Values { scale: Some(0.5), mean: vec![1.0, 2.0], std: vec![4.0] };
        assert_eq!(values.channels(&[2, 8, 8]).unwrap(), 2);
        assert_eq!((values.at(0)(6.0), values.at(1)(6.0)), (0.5, 0.25));
        assert!(values.channels(&[3, 8, 8]).is_err());
        assert!(Values::default().is_identity() && !values.is_identity());
    }
}
