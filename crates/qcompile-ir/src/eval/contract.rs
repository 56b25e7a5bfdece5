//! Matrix products, convolutions and pools.

use super::elementwise::maximum;
use super::{Data, Value};
use crate::{ConvGeometry, PoolGeometry};

pub(super) fn matmul(
    a: &Value,
    b: &Value,
    transpose_a: bool,
    transpose_b: bool,
    shape: &[usize],
) -> Data {
    let rank = shape.len();
    let (m, n) = (shape[rank - 2], shape[rank - 1]);
    let k = a.shape[if transpose_a { rank - 2 } else { rank - 1 }];
    let (a, b) = (a.data.floats(), b.data.floats());
    let matrices: usize = shape[..rank - 2].iter().product();
    let mut y = vec![0.0; matrices * m * n];
    for matrix in 0..matrices {
        let (a, b) = (&a[matrix * m * k..], &b[matrix * k * n..]);
        for row in 0..m {
            for column in 0..n {
                let products = (0..k).map(|inner| {
                    let left = if transpose_a { inner * m + row } else { row * k + inner };
                    let right = if transpose_b { column * k + inner } else { inner * n + column };
                    a[left] * b[right]
                });
                y[(matrix * m + row) * n + column] = products.sum();
            }
        }
    }
    Data::Float(y)
}

/// Index of an output place and a kernel place along one axis in the input, if it is not padding.
fn source(
    output: usize,
    kernel: usize,
    stride: usize,
    dilation: usize,
    pad: usize,
    size: usize,
) -> Option<usize> {
    (output * stride + kernel * dilation).checked_sub(pad).filter(|&at| at < size)
}

/// Visits every product of a convolution: places in the input, the weight and the output.
fn products(
    geometry: &ConvGeometry,
    channels: usize,
    output: &[usize],
    mut visit: impl FnMut(usize, usize, usize),
) {
    let ConvGeometry { input: [h, w], kernel, strides, pads, dilations, groups } = *geometry;
    let [n, oh, ow, outputs] = output[..] else {
        return;
    };
    if output.contains(&0) || channels == 0 {
        return;
    }
    let (per_group, outputs_per_group) = (channels / groups, outputs / groups);
    for image in 0..n {
        for y in 0..oh {
            for x in 0..ow {
                for ky in 0..kernel[0] {
                    for kx in 0..kernel[1] {
                        let sy = source(y, ky, strides[0], dilations[0], pads[0], h);
                        let sx = source(x, kx, strides[1], dilations[1], pads[1], w);
                        let (Some(sy), Some(sx)) = (sy, sx) else {
                            continue;
                        };
                        for o in 0..outputs {
                            for c in 0..per_group {
                                let channel = o / outputs_per_group * per_group + c;
                                visit(
                                    ((image * h + sy) * w + sx) * channels + channel,
                                    ((o * per_group + c) * kernel[0] + ky) * kernel[1] + kx,
                                    ((image * oh + y) * ow + x) * outputs + o,
                                );
                            }
                        }
                    }
                }
            }
        }
    }
}

pub(super) fn conv2d(geometry: &ConvGeometry, x: &Value, weight: &Value, shape: &[usize]) -> Data {
    let mut y = vec![0.0; shape.iter().product()];
    let (values, weights) = (x.data.floats(), weight.data.floats());
    products(geometry, x.shape[3], shape, |xi, wi, yi| y[yi] += values[xi] * weights[wi]);
    Data::Float(y)
}

pub(super) fn conv2d_grad_input(
    geometry: &ConvGeometry,
    dy: &Value,
    weight: &Value,
    shape: &[usize],
) -> Data {
    let mut dx = vec![0.0; shape.iter().product()];
    let (gradients, weights) = (dy.data.floats(), weight.data.floats());
    products(geometry, shape[3], &dy.shape, |xi, wi, yi| dx[xi] += gradients[yi] * weights[wi]);
    Data::Float(dx)
}

pub(super) fn conv2d_grad_weight(
    geometry: &ConvGeometry,
    x: &Value,
    dy: &Value,
    shape: &[usize],
) -> Data {
    let mut dweight = vec![0.0; shape.iter().product()];
    let (values, gradients) = (x.data.floats(), dy.data.floats());
    products(geometry, x.shape[3], &dy.shape, |xi, wi, yi| {
        dweight[wi] += values[xi] * gradients[yi];
    });
    Data::Float(dweight)
}

/// Visits every window: its output place and its places in the input, in row-major order, without padding.
fn windows(geometry: &PoolGeometry, output: &[usize], mut visit: impl FnMut(usize, &[usize])) {
    let PoolGeometry { input: [h, w], kernel, strides, pads, dilations, .. } = *geometry;
    let [n, oh, ow, channels] = output[..] else {
        return;
    };
    if output.contains(&0) {
        return;
    }
    let mut places = Vec::new();
    for image in 0..n {
        for y in 0..oh {
            for x in 0..ow {
                for c in 0..channels {
                    places.clear();
                    for ky in 0..kernel[0] {
                        for kx in 0..kernel[1] {
                            let sy = source(y, ky, strides[0], dilations[0], pads[0], h);
                            let sx = source(x, kx, strides[1], dilations[1], pads[1], w);
                            if let (Some(sy), Some(sx)) = (sy, sx) {
                                places.push(((image * h + sy) * w + sx) * channels + c);
                            }
                        }
                    }
                    visit(((image * oh + y) * ow + x) * channels + c, &places);
                }
            }
        }
    }
}

/// The largest value of each window; of a window that is all padding, the smallest that the type has.
pub(super) fn max_pool2d(geometry: &PoolGeometry, x: &Value, shape: &[usize]) -> Data {
    let elements = shape.iter().product();
    match &x.data {
        Data::Float(x) => {
            let mut y = vec![0.0; elements];
            windows(geometry, shape, |at, places| {
                y[at] = places.iter().map(|&place| x[place]).fold(f64::NEG_INFINITY, maximum);
            });
            Data::Float(y)
        }
        Data::Int(x) => {
            let mut y = vec![0; elements];
            windows(geometry, shape, |at, places| {
                y[at] = places.iter().map(|&place| x[place]).fold(i8::MIN.into(), i64::max);
            });
            Data::Int(y)
        }
    }
}

pub(super) fn max_pool2d_grad(geometry: &PoolGeometry, x: &Value, dy: &Value) -> Data {
    let mut dx = vec![0.0; x.data.len()];
    let (x, gradients) = (x.data.floats(), dy.data.floats());
    windows(geometry, &dy.shape, |at, places| {
        let largest = places.iter().map(|&place| x[place]).fold(f64::NEG_INFINITY, maximum);
        let first = places.iter().find(|&&place| x[place] == largest || x[place].is_nan());
        if let Some(&place) = first {
            dx[place] += gradients[at];
        }
    });
    Data::Float(dx)
}

/// What the sum over a window with this many places is divided by.
fn divisor(geometry: &PoolGeometry, places: usize) -> f64 {
    let counted =
        if geometry.count_include_pad { geometry.kernel[0] * geometry.kernel[1] } else { places };
    counted.max(1) as f64
}

pub(super) fn average_pool2d(geometry: &PoolGeometry, x: &Value, shape: &[usize]) -> Data {
    let mut y = vec![0.0; shape.iter().product()];
    let x = x.data.floats();
    windows(geometry, shape, |at, places| {
        let sum: f64 = places.iter().map(|&place| x[place]).sum();
        y[at] = sum / divisor(geometry, places.len());
    });
    Data::Float(y)
}

pub(super) fn average_pool2d_grad(geometry: &PoolGeometry, dy: &Value, shape: &[usize]) -> Data {
    let mut dx = vec![0.0; shape.iter().product()];
    let gradients = dy.data.floats();
    windows(geometry, &dy.shape, |at, places| {
        let part = gradients[at] / divisor(geometry, places.len());
        places.iter().for_each(|&place| dx[place] += part);
    });
    Data::Float(dx)
}
