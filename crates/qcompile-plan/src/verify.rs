//! Proof that a plan stays within its memory. For every batch size from 1 up:
//!
//! * every access of every loop nest and every operand of every primitive lies within its slot;
//! * a body value uses only earlier values, with operands of fitting kinds of types;
//! * a store touches each element at most once, an epilogue iterates over the rows and columns of its product and
//!   reduces floats down the rows only; what a loop nest writes, others of its step touch in the same row only;
//! * nothing writes a constant or an input, and every binding fits its slot;
//! * regions do not go back, and what lasts from step to step is made of kept memory and constants alone.

mod layers;

use crate::plan::bytes_of;
use crate::rows::row_by_row;
use crate::{
    Access, Affine, Binding, Convolution, Int8, Kernel, LoopNest, Matmul, Place, Plan, Pooling,
    Primitive, Product, Scalar, SlotId, Step, Storage, Write,
};
use qcompile_ir::{DType, Dim, QuantizedRange, Region};
use thiserror::Error;

/// A step that a plan must not have.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("plan step {step}: {reason}")]
pub struct VerifyError {
    /// The step's name, or the binding's.
    pub step: String,
    /// What is wrong.
    pub reason: String,
}

/// `fixed + per_batch · N` with room for negative parts and products.
#[derive(Clone, Copy)]
struct Extent {
    fixed: i128,
    per_batch: i128,
}

impl Extent {
    fn of(affine: Affine) -> Extent {
        Extent { fixed: affine.fixed as i128, per_batch: affine.per_batch as i128 }
    }

    fn plus(self, other: Extent) -> Extent {
        Extent { fixed: self.fixed + other.fixed, per_batch: self.per_batch + other.per_batch }
    }

    fn times(self, factor: usize) -> Extent {
        let factor = factor as i128;
        Extent { fixed: self.fixed * factor, per_batch: self.per_batch * factor }
    }

    /// `(dim - 1) · stride`; `None` if that is quadratic in N.
    fn reach(dim: Dim, stride: Dim) -> Option<Extent> {
        let (size, step) = (dim.scale as i128, stride.scale as i128);
        match (dim.batch, stride.batch) {
            (_, _) if step == 0 => Some(Extent { fixed: 0, per_batch: 0 }),
            (false, false) => Some(Extent { fixed: (size - 1) * step, per_batch: 0 }),
            (false, true) => Some(Extent { fixed: 0, per_batch: (size - 1) * step }),
            (true, false) => Some(Extent { fixed: -step, per_batch: size * step }),
            (true, true) => None,
        }
    }

    fn within(self, bytes: Affine) -> bool {
        let limit = Extent::of(bytes);
        self.per_batch <= limit.per_batch
            && self.fixed + self.per_batch <= limit.fixed + limit.per_batch
    }
}

type Checked = Result<(), String>;

/// Checks every invariant of the module's list.
///
/// # Errors
/// The first step that breaks one.
pub fn verify(plan: &Plan) -> Result<(), VerifyError> {
    let fail = |step: &str| {
        let step = step.to_owned();
        move |reason| VerifyError { step, reason }
    };
    for binding in [&plan.inputs, &plan.outputs, &plan.params, &plan.states, &plan.consts]
        .into_iter()
        .flatten()
    {
        check_binding(plan, binding).map_err(fail(&binding.name))?;
    }
    let mut region = Region::Forward;
    for step in &plan.steps {
        let checked = if step.region < region {
            Err(format!("region {} after {}", step.region.name(), region.name()))
        } else {
            check_kernel(plan, &step.kernel).and_then(|()| check_lasting(plan, step))
        };
        checked.map_err(fail(&step.name))?;
        region = step.region;
    }
    Ok(())
}

/// Checks that a plan is an evaluation form of another: it runs on parameters and states that the other has.
pub(crate) fn verify_evaluation(plan: &Plan, evaluation: &Plan) -> Result<(), VerifyError> {
    let fail = |name: &str, reason: &str| {
        Err(VerifyError { step: name.to_owned(), reason: format!("evaluation form: {reason}") })
    };
    if evaluation.evaluation.is_some() {
        return fail("evaluation", "it has one of its own");
    }
    for binding in evaluation.params.iter().chain(&evaluation.states) {
        if plan.kept(&binding.name).is_none_or(|kept| kept.ty != binding.ty) {
            return fail(&binding.name, "the plan has no such value");
        }
    }
    for input in &evaluation.inputs {
        if !plan.inputs.iter().any(|known| known.name == input.name && known.ty == input.ty) {
            return fail(&input.name, "the plan has no such input");
        }
    }
    match evaluation.steps.iter().find(|step| step.region != Region::Forward) {
        Some(step) => fail(&step.name, "it computes more than the forward region"),
        None => Ok(()),
    }
}

/// What a lasting step reads is there whenever it runs.
fn check_lasting(plan: &Plan, step: &Step) -> Checked {
    let lasts = |read: &Access| match plan.slots[read.slot.index()].storage {
        Storage::Kept | Storage::Const => true,
        Storage::Input | Storage::Output | Storage::Shared => false,
    };
    match &step.kernel {
        _ if !step.lasting => Ok(()),
        Kernel::Loops(nests)
            if step.region == Region::Forward
                && nests.iter().flat_map(|nest| &nest.reads).all(lasts) =>
        {
            Ok(())
        }
        _ => Err("what lasts is made of what does not".to_owned()),
    }
}

fn check_binding(plan: &Plan, binding: &Binding) -> Checked {
    within(plan, binding.slot, Extent::of(bytes_of(&binding.ty)))?;
    match &binding.initial {
        Some(tensor) if tensor.ty() != binding.ty => {
            Err(format!("holds {} but is {}", tensor.ty(), binding.ty))
        }
        _ => Ok(()),
    }
}

fn within(plan: &Plan, slot: SlotId, bytes: Extent) -> Checked {
    let Some(slot) = plan.slots.get(slot.index()) else {
        return Err(format!("there is no slot {}", slot.0));
    };
    if bytes.within(slot.bytes) { Ok(()) } else { Err("an access leaves its slot".to_owned()) }
}

fn writable(plan: &Plan, slot: SlotId) -> Checked {
    match plan.slots.get(slot.index()).map(|slot| slot.storage) {
        Some(Storage::Kept | Storage::Output | Storage::Shared) => Ok(()),
        Some(Storage::Input | Storage::Const) | None => {
            Err(format!("slot {} is not to be written", slot.0))
        }
    }
}

fn check_kernel(plan: &Plan, kernel: &Kernel) -> Checked {
    match kernel {
        Kernel::Loops(nests) => {
            let split = nests.first().ok_or("no loop nest")?.dims.first();
            for (position, nest) in nests.iter().enumerate() {
                if nest.dims.first() != split {
                    return Err("loop nests of one step split different dimensions".to_owned());
                }
                if position + 1 < nests.len() && nest.crosses_split() {
                    return Err("only the last loop nest may cross the split".to_owned());
                }
                if nest.writes.iter().any(|write| matches!(write, Write::Deviations { .. })) {
                    return Err("squared deviations outside of an epilogue".to_owned());
                }
                if nest.body.contains(&Scalar::Tile) {
                    return Err("a tile outside of an epilogue".to_owned());
                }
                check_nest(plan, nest)?;
            }
            if row_by_row(nests) {
                Ok(())
            } else {
                Err("loop nests of one step meet beyond a row".to_owned())
            }
        }
        Kernel::Primitive(primitive) => check_primitive(plan, primitive),
        Kernel::AllReduce { members, .. } => members.iter().try_for_each(|member| {
            let fixed = |elements: usize| Extent { fixed: elements as i128, per_batch: 0 };
            writable(plan, member.value.slot)?;
            dense(plan, member.value, DType::F32, fixed(member.elements))?;
            let Some(codes) = member.codes else { return Ok(()) };
            if codes.row == 0 || !member.elements.is_multiple_of(codes.row) {
                return Err("rows of codes do not make up their value".to_owned());
            }
            // Values are written while codes and scales are read.
            let written = |place: Place| members.iter().any(|one| one.value.slot == place.slot);
            if written(codes.codes) || written(codes.scales) {
                return Err("codes that are exchanged lie where a value does".to_owned());
            }
            dense(plan, codes.codes, DType::I8, fixed(member.elements))?;
            dense(plan, codes.scales, DType::F32, fixed(member.elements / codes.row))
        }),
    }
}

fn check_nest(plan: &Plan, nest: &LoopNest) -> Checked {
    for access in nest.reads.iter().chain(nest.writes.iter().map(Write::access)) {
        check_access(plan, &nest.dims, access)?;
    }
    for write in &nest.writes {
        writable(plan, write.access().slot)?;
        let mut strides = nest.dims.iter().zip(&write.access().strides);
        let repeats = strides.any(|(dim, stride)| *dim != Dim::ONE && stride.scale == 0);
        // A nest without points stores nothing; the strides of its empty arrays are 0.
        let repeats = repeats && nest.dims.iter().all(|dim| dim.scale > 0);
        if matches!(write, Write::Store { .. }) && repeats {
            return Err("a store repeats an element".to_owned());
        }
    }
    let types = body_types(nest)?;
    for write in &nest.writes {
        if types.get(write.value()) != Some(&write.access().dtype) {
            return Err("a written value has another type than its access".to_owned());
        }
    }
    Ok(())
}

fn check_access(plan: &Plan, dims: &[Dim], access: &Access) -> Checked {
    if access.strides.len() != dims.len() {
        return Err("an access has another rank than its nest".to_owned());
    }
    if dims.iter().any(|dim| dim.scale == 0) {
        return Ok(());
    }
    let mut last = Extent::of(access.offset);
    for (&dim, &stride) in dims.iter().zip(&access.strides) {
        last = last.plus(Extent::reach(dim, stride).ok_or("an access is quadratic in N")?);
    }
    let end = last.plus(Extent { fixed: 1, per_batch: 0 });
    within(plan, access.slot, end.times(access.dtype.size()))
}

/// The type of each value of a body.
///
/// # Errors
/// A value that uses a later one or does not fit its operands.
pub fn body_types(nest: &LoopNest) -> Result<Vec<DType>, String> {
    let mut types: Vec<DType> = Vec::with_capacity(nest.body.len());
    for scalar in &nest.body {
        let of = |value: usize| types.get(value).copied().ok_or("a value uses a later one");
        let same = |a: usize, b: usize| {
            if of(a)? == of(b)? { of(a) } else { Err("operands of two types") }
        };
        let ty = match *scalar {
            Scalar::Read(read) => nest.reads.get(read).ok_or("no such read")?.dtype,
            Scalar::Tile | Scalar::Size(_) => DType::F32,
            Scalar::Const(dtype, _) => dtype,
            Scalar::Unary(_, x) => of(x)?,
            Scalar::Binary(_, a, b) => same(a, b)?,
            Scalar::Compare(_, a, b) => same(a, b).map(|_| DType::Bool)?,
            Scalar::Select(condition, a, b) => {
                if of(condition)? != DType::Bool {
                    return Err("a condition is not bool".to_owned());
                }
                same(a, b)?
            }
            Scalar::Cast(dtype, x) => of(x).map(|_| dtype)?,
            Scalar::Quantize(dtype, x, scale, zero_point) => {
                of(x)?;
                quantizes(of(scale)?, zero_point.map(of).transpose()?, dtype)?
            }
            Scalar::Dequantize(q, scale, zero_point) => {
                quantizes(of(scale)?, zero_point.map(of).transpose()?, of(q)?)?;
                DType::F32
            }
            Scalar::StraightThrough(dtype, x, dy, scale, zero_point) => {
                quantizes(of(scale)?, zero_point.map(of).transpose()?, dtype)?;
                same(x, dy)?
            }
        };
        types.push(ty);
    }
    Ok(types)
}

/// The quantized type, if a scale and a zero point of these types fit it.
fn quantizes(scale: DType, zero_point: Option<DType>, dtype: DType) -> Result<DType, &'static str> {
    let fits = scale == DType::F32
        && zero_point.is_none_or(|zero_point| zero_point == dtype)
        && QuantizedRange::of(dtype, zero_point.is_some()).is_some();
    if fits { Ok(dtype) } else { Err("a scale or zero point does not fit its type") }
}

fn dense(plan: &Plan, place: Place, dtype: DType, elements: Extent) -> Checked {
    within(plan, place.slot, Extent::of(place.offset).plus(elements).times(dtype.size()))
}

/// `dims` multiplied; an error if that is quadratic in N.
fn product(dims: &[Dim]) -> Result<Extent, String> {
    dims.iter()
        .try_fold(Dim::ONE, |product, &dim| product.times(dim))
        .map(|dim| Extent::of(dim.into()))
        .ok_or_else(|| "a size is quadratic in N".to_owned())
}

/// The kernels of indices take f32 and i64.
fn of_kernels(dtype: DType) -> Checked {
    match dtype {
        DType::F32 | DType::I64 => Ok(()),
        _ => Err(format!("a kernel does not take {dtype}")),
    }
}

fn check_primitive(plan: &Plan, primitive: &Primitive) -> Checked {
    match primitive {
        Primitive::Matmul(matmul, epilogue) => check_matmul(plan, matmul, epilogue.as_ref()),
        Primitive::Convolution(convolution, epilogue) => {
            check_convolution(plan, convolution, epilogue.as_ref())
        }
        Primitive::Pooling(pooling) => check_pooling(plan, pooling),
        Primitive::Attention(attention) => layers::attention(plan, attention),
        Primitive::Softmax { rows, cols, x, y, .. } => {
            writable(plan, y.slot)?;
            let matrix = product(&[*rows, *cols])?;
            dense(plan, *x, DType::F32, matrix)?;
            dense(plan, *y, DType::F32, matrix)
        }
        Primitive::CrossEntropy { rows, cols, logits, label, loss } => {
            writable(plan, loss.slot)?;
            dense(plan, *logits, DType::F32, product(&[*rows, *cols])?)?;
            dense(plan, *label, DType::I64, product(&[*rows])?)?;
            dense(plan, *loss, DType::F32, product(&[*rows])?)
        }
        Primitive::CrossEntropyGrad { rows, cols, logits, label, dloss, dlogits } => {
            writable(plan, dlogits.slot)?;
            dense(plan, *logits, DType::F32, product(&[*rows, *cols])?)?;
            dense(plan, *dlogits, DType::F32, product(&[*rows, *cols])?)?;
            dense(plan, *label, DType::I64, product(&[*rows])?)?;
            dense(plan, *dloss, DType::F32, product(&[*rows])?)
        }
        Primitive::Gather { table_rows, row_bytes, count, table, indices, y } => {
            writable(plan, y.slot)?;
            dense(plan, *indices, DType::I64, product(&[*count])?)?;
            let bytes = |rows: Dim| {
                let row = row_bytes.as_dim().ok_or("a row is quadratic in N")?;
                product(&[rows, row])
            };
            dense(plan, *table, DType::I8, bytes(*table_rows)?)?;
            dense(plan, *y, DType::I8, bytes(*count)?)
        }
        Primitive::Scatter { dtype, rows, width, count, indices, values, y, .. } => {
            writable(plan, y.slot)?;
            of_kernels(*dtype)?;
            dense(plan, *indices, DType::I64, product(&[*count])?)?;
            dense(plan, *values, *dtype, product(&[*count, *width])?)?;
            dense(plan, *y, *dtype, product(&[*rows, *width])?)
        }
        Primitive::TopK { dtype, rows, cols, k, x, y, .. } => {
            writable(plan, y.slot)?;
            of_kernels(*dtype)?;
            if k > cols {
                return Err(format!("{k} of {cols} columns"));
            }
            dense(plan, *x, *dtype, product(&[*rows, (*cols).into()])?)?;
            dense(plan, *y, DType::I64, product(&[*rows, (*k).into()])?)
        }
        Primitive::Iota { count, y } => {
            writable(plan, y.slot)?;
            dense(plan, *y, DType::I64, product(&[*count])?)
        }
        Primitive::Random { count, step, y, .. } => {
            writable(plan, y.slot)?;
            dense(plan, *step, DType::I64, product(&[])?)?;
            dense(plan, *y, DType::F32, product(&[*count])?)
        }
        Primitive::Recurrent(recurrent) => layers::recurrent(plan, recurrent),
    }
}

fn check_epilogue(plan: &Plan, nest: Option<&LoopNest>, rows: Dim, cols: Dim) -> Checked {
    let Some(nest) = nest else { return Ok(()) };
    if nest.dims != [rows, cols] {
        return Err("an epilogue does not run over its product".to_owned());
    }
    for write in nest.writes.iter().filter(|write| !matches!(write, Write::Store { .. })) {
        let access = write.access();
        let down = matches!(access.strides[..], [row, column]
            if row.scale == 0 && (column.scale == 0 || column == Dim::ONE));
        if !down || !access.dtype.is_float() {
            return Err("a reduction of an epilogue does not go down its rows".to_owned());
        }
    }
    check_nest(plan, nest)
}

fn check_matmul(plan: &Plan, matmul: &Matmul, epilogue: Option<&LoopNest>) -> Checked {
    let Matmul { batch, m, n, k, a, b, c, operands } = matmul;
    let dtype = operands.dtype();
    for (matrix, rows, cols) in [(a, *m, *k), (b, *k, *n)] {
        let access = Access {
            slot: matrix.place.slot,
            dtype,
            offset: matrix.place.offset,
            strides: vec![matrix.batch_stride, matrix.row_stride, matrix.col_stride],
        };
        check_access(plan, &[*batch, rows, cols], &access)?;
    }
    if let Some(int8) = operands.scales() {
        check_scales(plan, int8, *m, *n)?;
    }
    let rows = batch.times(*m).ok_or("a product is quadratic in N")?;
    if epilogue.is_none() {
        writable(plan, c.slot)?;
        dense(plan, *c, DType::F32, product(&[rows, *n])?)?;
    }
    check_epilogue(plan, epilogue, rows, *n)
}

/// The scales of a product, where there is one for each of these rows and channels.
fn check_scales(plan: &Plan, int8: &Int8, rows: Dim, channels: Dim) -> Checked {
    let rows = if int8.per_row { rows } else { Dim::ONE };
    let channels = if int8.per_channel { channels } else { Dim::ONE };
    dense(plan, int8.scale_a, DType::F32, product(&[rows])?)?;
    if let Some(zero_point) = int8.zero_a {
        dense(plan, zero_point, DType::U8, product(&[])?)?;
    }
    dense(plan, int8.scale_b, DType::F32, product(&[channels])?)
}

fn check_convolution(
    plan: &Plan,
    convolution: &Convolution,
    epilogue: Option<&LoopNest>,
) -> Checked {
    let Convolution {
        product: kind,
        geometry,
        images,
        in_channels,
        out_channels,
        a,
        b,
        c,
        operands,
    } = convolution;
    let [out_height, out_width] = geometry.output().ok_or("the kernel does not fit")?;
    let groups = geometry.groups;
    if groups == 0 || in_channels % groups != 0 || out_channels % groups != 0 {
        return Err("channels do not divide into groups".to_owned());
    }
    let pixels = |[height, width]: [usize; 2]| {
        images.times(height.into()).and_then(|rows| rows.times(width.into()))
    };
    let overflow = || "a size overflows".to_owned();
    let x_rows = pixels(geometry.input).ok_or_else(overflow)?;
    let y_rows = pixels([out_height, out_width]).ok_or_else(overflow)?;
    let x = product(&[x_rows, (*in_channels).into()])?;
    let y = product(&[y_rows, (*out_channels).into()])?;
    let [kernel_height, kernel_width] = geometry.kernel;
    let w = product(&[
        (*out_channels).into(),
        (in_channels / groups).into(),
        kernel_height.into(),
        kernel_width.into(),
    ])?;
    let (first, second, result, rows, cols) = match kind {
        Product::Forward => (x, w, y, y_rows, *out_channels),
        Product::GradInput => (y, w, x, x_rows, *in_channels),
        Product::GradWeight => (x, y, w, Dim::ONE, 0),
    };
    let dtype = operands.dtype();
    dense(plan, *a, dtype, first)?;
    dense(plan, *b, dtype, second)?;
    if let Some(int8) = operands.scales() {
        let (rows, channels) = match kind {
            Product::Forward | Product::GradInput => (*images, cols),
            Product::GradWeight => ((*in_channels).into(), *out_channels),
        };
        if *kind != Product::Forward && int8.is_affine() {
            return Err("only a forward convolution has a zero point".to_owned());
        }
        check_scales(plan, int8, rows, channels.into())?;
    }
    if epilogue.is_none() {
        writable(plan, c.slot)?;
        dense(plan, *c, DType::F32, result)?;
    } else if *kind == Product::GradWeight {
        return Err("the gradient of a weight has no epilogue".to_owned());
    }
    check_epilogue(plan, epilogue, rows, cols.into())
}

fn check_pooling(plan: &Plan, pooling: &Pooling) -> Checked {
    let Pooling { dtype, max, gradient, geometry, images, channels, x, dy, y } = pooling;
    let narrow = *max && !*gradient && matches!(dtype, DType::BF16 | DType::I8);
    if *dtype != DType::F32 && !narrow {
        return Err(format!("no kernel pools {dtype}"));
    }
    let output = geometry.output().ok_or("the window does not fit")?;
    let size = |[height, width]: [usize; 2]| {
        product(&[*images, height.into(), width.into(), (*channels).into()])
    };
    let (input, output) = (size(geometry.input)?, size(output)?);
    writable(plan, y.slot)?;
    if *gradient {
        dense(plan, *dy, DType::F32, output)?;
        dense(plan, *y, DType::F32, input)?;
        if *max { dense(plan, *x, DType::F32, input) } else { Ok(()) }
    } else {
        dense(plan, *x, *dtype, input)?;
        dense(plan, *y, *dtype, output)
    }
}
