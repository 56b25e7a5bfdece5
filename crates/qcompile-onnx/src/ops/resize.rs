//! Resizing of axes by interpolation.

use super::Results;
use super::interpolation::{Interpolation, WEIGHT_LIMIT};
use super::window::{channels_last, channels_second};
use crate::draft::{Draft, ValueId};
use crate::error::Obstacle;
use crate::known::{Element, Known};
use crate::node::{OnnxNode, axis_of, dims_from};
use qcompile_ir::DType;

/// Size of an axis that is resized.
const SIZE_LIMIT: usize = 1 << 22;

/// What one is divided into where positions are rounded.
const TICKS: f64 = 1_048_576.0;

/// Which index a position between two takes.
#[derive(Clone, Copy)]
enum Nearest {
    RoundPreferFloor,
    RoundPreferCeil,
    Floor,
    Ceil,
    /// Before opset 11: before the position where the axis grows, after it where it shrinks.
    Inward,
}

/// How elements between others are computed.
#[derive(Clone, Copy)]
enum Mode {
    Nearest(Nearest),
    Linear,
    /// With the coefficient a.
    Cubic(f64),
}

/// How positions of the result map to positions of the operand.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Coordinates {
    HalfPixel,
    HalfPixelSymmetric,
    PytorchHalfPixel,
    AlignCorners,
    Asymmetric,
    /// Only in opset 11.
    HalfPixelUnshifted,
    CropAndResize,
}

/// One axis and what becomes of it.
struct Axis {
    axis: usize,
    input: usize,
    output: usize,
    scale: f64,
    /// Start and end of the region, in lengths of the axis.
    region: [f64; 2],
}

/// The attributes of a node.
struct Resize {
    mode: Mode,
    coordinates: Coordinates,
    antialias: bool,
    exclude_outside: bool,
    extrapolation: f64,
}

impl Resize {
    fn read(node: &OnnxNode) -> Result<Resize, Obstacle> {
        let mode = node.attributes.string("mode", "nearest")?;
        let coordinates = node.attributes.string("coordinate_transformation_mode", "half_pixel")?;
        let coordinates = match coordinates.as_str() {
            "half_pixel" => Coordinates::HalfPixel,
            "half_pixel_symmetric" => Coordinates::HalfPixelSymmetric,
            "pytorch_half_pixel" => Coordinates::PytorchHalfPixel,
            "align_corners" => Coordinates::AlignCorners,
            "asymmetric" => Coordinates::Asymmetric,
            "tf_crop_and_resize" => Coordinates::CropAndResize,
            "tf_half_pixel_for_nn" if node.opset < 13 => Coordinates::HalfPixelUnshifted,
            other => return Err(unknown("coordinate_transformation_mode", other)),
        };
        let nearest = node.attributes.string("nearest_mode", "round_prefer_floor")?;
        let nearest = match nearest.as_str() {
            "round_prefer_floor" => Nearest::RoundPreferFloor,
            "round_prefer_ceil" => Nearest::RoundPreferCeil,
            "floor" => Nearest::Floor,
            "ceil" => Nearest::Ceil,
            other => return Err(unknown("nearest_mode", other)),
        };
        let coefficient = node.attributes.float("cubic_coeff_a", -0.75)?;
        let antialias = node.attributes.flag("antialias", false)?;
        let mode = match mode.as_str() {
            "nearest" if antialias => {
                return Err(Obstacle::invalid("antialias with mode `nearest`"));
            }
            "nearest" => Mode::Nearest(nearest),
            "linear" => Mode::Linear,
            "cubic" => Mode::Cubic(coefficient),
            other => return Err(unknown("mode", other)),
        };
        Ok(Resize {
            mode,
            coordinates,
            antialias,
            exclude_outside: node.attributes.flag("exclude_outside", false)?,
            extrapolation: node.attributes.float("extrapolation_value", 0.0)?,
        })
    }

    /// The position in the operand of position `at` of the result.
    fn position(&self, axis: &Axis, at: f64) -> f64 {
        let input = float(axis.input);
        let length = axis.scale * input;
        // Quotients that should be integers are, in f32, which decides what is nearest.
        let quotient = |position: f64| match self.mode {
            #[allow(clippy::cast_possible_truncation, reason = "rounding is the purpose")]
            Mode::Nearest(_) => f64::from((position / axis.scale) as f32),
            Mode::Linear | Mode::Cubic(_) => position / axis.scale,
        };
        #[allow(clippy::float_cmp, reason = "a length of exactly 1 has no second end")]
        let one = length == 1.0;
        match self.coordinates {
            Coordinates::Asymmetric => quotient(at),
            Coordinates::HalfPixelUnshifted => quotient(at + 0.5),
            Coordinates::PytorchHalfPixel if one => 0.0,
            Coordinates::HalfPixel | Coordinates::PytorchHalfPixel => quotient(at + 0.5) - 0.5,
            Coordinates::HalfPixelSymmetric => {
                let adjustment = float(axis.output) / length;
                input / 2.0 * (1.0 - adjustment) + quotient(at + 0.5) - 0.5
            }
            Coordinates::AlignCorners if one => 0.0,
            Coordinates::AlignCorners => at * (input - 1.0) / (length - 1.0),
            Coordinates::CropAndResize => {
                let [start, end] = axis.region.map(|edge| edge * (input - 1.0));
                if one {
                    return start + (end - start) / 2.0;
                }
                start + at * (end - start) / (length - 1.0)
            }
        }
    }

    /// Which elements are filled with the extrapolation value; empty if none are.
    fn outside(&self, axis: &Axis) -> Vec<Element> {
        if self.coordinates != Coordinates::CropAndResize {
            return Vec::new();
        }
        let inside = 0.0..=float(axis.input - 1);
        (0..axis.output)
            .map(|at| !inside.contains(&self.position(axis, float(at))))
            .map(|outside| Element::Int(i64::from(outside)))
            .collect()
    }

    fn interpolation(&self, axis: &Axis) -> Result<Interpolation, Obstacle> {
        let positions = (0..axis.output).map(|at| self.position(axis, float(at)));
        #[allow(clippy::cast_possible_truncation, reason = "saturates, and is clamped later")]
        let index = |position: f64| position as i64;
        // Where the kernel ends, in elements of the operand.
        let scale = if self.antialias { axis.scale.min(1.0) } else { 1.0 };
        let reach = match self.mode {
            Mode::Nearest(nearest) => {
                let first: Vec<i64> =
                    positions.map(|position| index(nearest.round(position, axis.scale))).collect();
                let weights = vec![1.0; first.len()];
                return Ok(Interpolation { input: axis.input, first, width: 1, weights });
            }
            Mode::Linear => 1.0 / scale,
            Mode::Cubic(_) => 2.0 / scale,
        };
        let before = -((-reach).floor() + 1.0);
        let width = 2.0 * before + 2.0;
        if width * float(axis.output) > float(WEIGHT_LIMIT) {
            return Err(Obstacle::unsupported(format!(
                "an axis of {} interpolated to {}",
                axis.input, axis.output
            )));
        }
        let taps = index(width);
        let mut interpolation = Interpolation {
            input: axis.input,
            first: Vec::with_capacity(axis.output),
            width: usize::try_from(taps).unwrap_or(0),
            weights: Vec::new(),
        };
        let last = float(axis.input - 1);
        for position in positions {
            let first = position.floor() - before;
            let mut offsets = Vec::with_capacity(interpolation.width);
            offsets.extend((0..interpolation.width).map(|tap| first + float(tap)));
            let weights = offsets.iter().map(|&offset| {
                if self.exclude_outside && !(0.0..=last).contains(&offset) {
                    0.0
                } else {
                    self.mode.kernel((offset - position) * scale)
                }
            });
            let weights: Vec<f64> = weights.collect();
            let total: f64 = weights.iter().sum();
            let total = if total == 0.0 { 1.0 } else { total };
            #[allow(clippy::cast_possible_truncation, reason = "rounding is the purpose")]
            interpolation.weights.extend(weights.iter().map(|weight| (weight / total) as f32));
            interpolation.first.push(index(first));
        }
        Ok(interpolation)
    }

    fn apply(&self, draft: &mut Draft, x: ValueId, axes: &[Axis]) -> Results {
        let resized: Vec<&Axis> = axes.iter().filter(|axis| self.changes(axis)).collect();
        // Beside convolutions, as they have it.
        let rank = draft.rank(x);
        let moves = rank > 2 && !resized.is_empty() && resized.iter().all(|axis| axis.axis > 1);
        let dtype = draft.dtype(x);
        let mut y = if moves { channels_last(draft, x)? } else { x };
        let blends = !matches!(self.mode, Mode::Nearest(_));
        if blends && !resized.is_empty() {
            if dtype == DType::Bool {
                return Err(Obstacle::unsupported("interpolation between bools"));
            }
            y = draft.cast(y, DType::F32)?;
        }
        let mut outside = None;
        for axis in resized {
            let at = if moves { axis.axis - 1 } else { axis.axis };
            y = self.interpolation(axis)?.apply(draft, y, at)?;
            let mask = self.outside(axis);
            if mask.contains(&Element::Int(1)) {
                let mut shape = vec![1; rank];
                shape[at] = axis.output;
                let mask = draft.add_known(Known::new(DType::Bool, shape, mask));
                outside = Some(match outside {
                    None => mask,
                    Some(other) => draft.binary(qcompile_ir::BinaryOp::Or, other, mask)?,
                });
            }
        }
        if let Some(outside) = outside {
            let value = draft.scalar(draft.dtype(y), self.extrapolation);
            y = draft.select(outside, value, y)?;
        }
        y = draft.cast(y, dtype)?;
        Ok(vec![if moves { channels_second(draft, y)? } else { y }])
    }

    fn changes(&self, axis: &Axis) -> bool {
        let whole = self.coordinates != Coordinates::CropAndResize || axis.region == [0.0, 1.0];
        let same = (axis.scale - 1.0).abs() < 1e-9 && axis.input == axis.output;
        !(whole && same)
    }
}

impl Nearest {
    fn round(self, position: f64, scale: f64) -> f64 {
        // Sums that should be integers or halves are.
        let position = (position * TICKS).round() / TICKS;
        match self {
            Nearest::Inward if scale < 1.0 => position.ceil(),
            Nearest::RoundPreferFloor => (position - 0.5).ceil(),
            Nearest::RoundPreferCeil => (position + 0.5).floor(),
            Nearest::Floor | Nearest::Inward => position.floor(),
            Nearest::Ceil => position.ceil(),
        }
    }
}

impl Mode {
    /// The weight of an element at a distance.
    fn kernel(self, distance: f64) -> f64 {
        let x = distance.abs();
        match self {
            Mode::Nearest(_) => 1.0,
            Mode::Linear => (1.0 - x).max(0.0),
            Mode::Cubic(a) if x <= 1.0 => ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0,
            Mode::Cubic(a) if x < 2.0 => ((a * x - 5.0 * a) * x + 8.0 * a) * x - 4.0 * a,
            Mode::Cubic(_) => 0.0,
        }
    }
}

fn unknown(attribute: &str, value: &str) -> Obstacle {
    Obstacle::invalid(format!("attribute {attribute} is `{value}`"))
}

#[allow(clippy::cast_precision_loss, reason = "sizes here are far below 2^53")]
fn float(size: usize) -> f64 {
    size as f64
}

/// Numbers known at import, none if there are none.
fn floats(known: Option<Known>, what: &str) -> Result<Option<Vec<f64>>, Obstacle> {
    let Some(known) = known.filter(|known| known.len() != Some(0)) else {
        return Ok(None);
    };
    if known.shape.len() != 1 {
        return Err(Obstacle::invalid(format!("{what} are {}", known.ty())));
    }
    let values: Option<Vec<f64>> = (0..known.shape[0]).map(|at| known.get(at).as_f64()).collect();
    values.map(Some).ok_or_else(|| Obstacle::batch(format!("{what} that depend on the batch size")))
}

/// The axes that scales, sizes and the region are about.
fn axes_attribute(node: &OnnxNode, rank: usize) -> Result<Vec<usize>, Obstacle> {
    let Some(axes) = node.attributes.ints("axes")? else {
        return Ok((0..rank).collect());
    };
    crate::node::axes_of(axes, rank)?;
    axes.iter().map(|&axis| axis_of(axis, rank)).collect()
}

fn scaled(draft: &Draft, x: ValueId, axis: usize, scale: f64) -> Result<Option<Axis>, Obstacle> {
    if !(scale > 0.0 && scale.is_finite()) {
        return Err(Obstacle::invalid(format!("a scale of {scale} for axis {axis}")));
    }
    let Some(input) = draft.dims(x)[axis].as_fixed() else {
        #[allow(clippy::float_cmp, reason = "only a scale of exactly 1 changes nothing")]
        let same = scale == 1.0;
        let refused =
            || Obstacle::batch(format!("axis {axis}, which is resized, depends on the batch size"));
        return if same { Ok(None) } else { Err(refused()) };
    };
    // As a product of f32, which 3 · 2.3333333 needs to be 7.
    #[allow(clippy::cast_possible_truncation, reason = "rounding is the purpose")]
    let output = f64::from((scale * float(input)) as f32);
    axis_to(axis, input, output.floor(), scale).map(Some)
}

fn axis_to(axis: usize, input: usize, output: f64, scale: f64) -> Result<Axis, Obstacle> {
    if input == 0 || output < 1.0 {
        return Err(Obstacle::invalid(format!("axis {axis} of {input} resized to {output}")));
    }
    if output > float(SIZE_LIMIT) {
        return Err(Obstacle::unsupported(format!("axis {axis} resized to {output}")));
    }
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "1 to the limit")]
    let output = output as usize;
    Ok(Axis { axis, input, output, scale, region: [0.0, 1.0] })
}

/// The axes that get other sizes, by the sizes asked for.
fn sized(
    draft: &Draft,
    node: &OnnxNode,
    x: ValueId,
    axes: &[usize],
    sizes: &[Element],
) -> Result<Vec<Axis>, Obstacle> {
    let policy = node.attributes.string("keep_aspect_ratio_policy", "stretch")?;
    let sizes = dims_from(sizes)?;
    let mut resized = Vec::new();
    for (&axis, &size) in axes.iter().zip(&sizes) {
        let dim = draft.dims(x)[axis];
        if dim == size && dim.as_fixed().is_none() && policy == "stretch" {
            continue;
        }
        let (Some(input), Some(size)) = (dim.as_fixed(), size.as_fixed()) else {
            return Err(Obstacle::batch(format!(
                "axis {axis}, which is resized, depends on the batch size"
            )));
        };
        let scale = float(size) / float(input);
        resized.push(axis_to(axis, input, float(size), scale)?);
    }
    let scales = resized.iter().map(|axis| axis.scale);
    let common = match policy.as_str() {
        "stretch" => return Ok(resized),
        "not_larger" => scales.fold(f64::INFINITY, f64::min),
        "not_smaller" => scales.fold(0.0, f64::max),
        other => return Err(unknown("keep_aspect_ratio_policy", other)),
    };
    resized
        .iter()
        .map(|axis| {
            let output = (common * float(axis.input) + 0.5).floor();
            axis_to(axis.axis, axis.input, output, common)
        })
        .collect()
}

pub(super) fn resize(draft: &mut Draft, node: &OnnxNode) -> Results {
    if node.opset < 11 {
        return upsample(draft, node);
    }
    let x = node.input(0)?;
    let resize = Resize::read(node)?;
    let axes = axes_attribute(node, draft.rank(x))?;
    let scales = floats(node.constant(draft, 2)?, "scales")?;
    let sizes = node.shape_elements(draft, 3)?.filter(|sizes| !sizes.is_empty());
    let count = |found: usize, what: &str| {
        if found == axes.len() {
            return Ok(());
        }
        Err(Obstacle::invalid(format!("{found} {what} for {} axes", axes.len())))
    };
    let mut resized = match (scales, sizes) {
        (Some(scales), None) => {
            node.attributes.string("keep_aspect_ratio_policy", "stretch")?;
            count(scales.len(), "scales")?;
            let resized = axes.iter().zip(scales);
            let resized = resized.map(|(&axis, scale)| scaled(draft, x, axis, scale));
            resized.filter_map(Result::transpose).collect::<Result<Vec<_>, _>>()?
        }
        (None, Some(sizes)) => {
            count(sizes.len(), "sizes")?;
            sized(draft, node, x, &axes, &sizes)?
        }
        (Some(_), Some(_)) => return Err(Obstacle::invalid("both scales and sizes")),
        (None, None) => return Err(Obstacle::invalid("neither scales nor sizes")),
    };
    if resize.coordinates == Coordinates::CropAndResize {
        let region = floats(node.constant(draft, 1)?, "regions (roi)")?
            .ok_or_else(|| Obstacle::invalid("tf_crop_and_resize without a region (roi)"))?;
        if region.len() != axes.len() * 2 {
            let found = region.len();
            return Err(Obstacle::invalid(format!("{found} edges (roi) of {} axes", axes.len())));
        }
        for (at, &axis) in axes.iter().enumerate() {
            let edges = [region[at], region[at + axes.len()]];
            match resized.iter_mut().find(|resized| resized.axis == axis) {
                Some(resized) => resized.region = edges,
                None if edges == [0.0, 1.0] => {}
                None => {
                    return Err(Obstacle::batch(format!(
                        "cropped axis {axis} depends on the batch size"
                    )));
                }
            }
        }
    }
    resize.apply(draft, x, &resized)
}

/// `Upsample`, and `Resize` of opset 10: positions are not shifted, and the nearest index is the one before for a larger
/// result and the one after for a smaller one.
pub(super) fn upsample(draft: &mut Draft, node: &OnnxNode) -> Results {
    let x = node.input(0)?;
    let rank = draft.rank(x);
    let scales = if node.opset < 9 {
        let scales = node.attributes.floats("scales")?;
        scales.map(|scales| scales.iter().map(|&scale| f64::from(scale)).collect())
    } else {
        floats(node.constant(draft, 1)?, "scales")?
    };
    let scales: Vec<f64> = scales.ok_or_else(|| Obstacle::invalid("scales are missing"))?;
    if scales.len() != rank {
        return Err(Obstacle::invalid(format!("{} scales for {}", scales.len(), draft.ty(x))));
    }
    let mode = node.attributes.string("mode", "nearest")?;
    let mode = match mode.as_str() {
        "nearest" => Mode::Nearest(Nearest::Inward),
        "linear" => Mode::Linear,
        other => return Err(unknown("mode", other)),
    };
    let resize = Resize {
        mode,
        coordinates: Coordinates::Asymmetric,
        antialias: false,
        exclude_outside: false,
        extrapolation: 0.0,
    };
    let axes = scales.into_iter().enumerate();
    let axes = axes.filter_map(|(axis, scale)| scaled(draft, x, axis, scale).transpose());
    let axes = axes.collect::<Result<Vec<_>, _>>()?;
    resize.apply(draft, x, &axes)
}
