//! Operators that pick or place elements one by one, by an index for each.

use super::Results;
use super::indexing::{Value, bounded, fixed_axis, take_constant};
use crate::draft::{Draft, ValueId};
use crate::error::Obstacle;
use crate::index::product;
use crate::known::{Element, Known};
use crate::node::{OnnxNode, axis_of};
use qcompile_ir::{BinaryOp, CompareOp, DType, Dim, Op};

/// Data and indices of one rank with the axis that the indices count along moved to the end.
struct Along {
    axis: usize,
    /// The data as it was.
    dims: Vec<Dim>,
    /// The data's dimensions but the axis, which is last.
    lead: Vec<Dim>,
    /// The data, flattened.
    flat: ValueId,
    /// For each index, its place in the flattened data.
    places: ValueId,
}

impl Along {
    fn new(draft: &mut Draft, x: ValueId, indices: ValueId, axis: i64) -> Result<Along, Obstacle> {
        let axis = axis_of(axis, draft.rank(x))?;
        let size = fixed_axis(draft, x, axis, "indexes along")?;
        let dims = draft.dims(x).to_vec();
        let taken = draft.dims(indices).to_vec();
        let fits = |(at, (&taken, &all)): (usize, (&Dim, &Dim))| {
            at == axis || taken == all || (!taken.batch && !all.batch && taken.scale <= all.scale)
        };
        if taken.len() != dims.len() || !taken.iter().zip(&dims).enumerate().all(fits) {
            let (indices, x) = (draft.ty(indices), draft.ty(x));
            return Err(Obstacle::invalid(format!("indices {indices} for {x}")));
        }
        let last = dims.len() - 1;
        let moved = draft.move_axis(x, axis, last)?;
        let lead = draft.dims(moved)[..last].to_vec();
        let total = product(&dims)?;
        let flat = draft.reshape(moved, &[total])?;
        let indices = draft.move_axis(indices, axis, last)?;
        let [at, inside] = draft.resolved(indices, size)?;
        let places = draft.places(&lead, size, at)?;
        let places = draft.checked(places, inside)?;
        Ok(Along { axis, dims, lead, flat, places })
    }

    /// A value of the flattened data with its axes where they were.
    fn restored(&self, draft: &mut Draft, flat: ValueId) -> Value {
        let mut dims = self.lead.clone();
        dims.push(self.dims[self.axis]);
        let moved = draft.reshape(flat, &dims)?;
        draft.move_axis(moved, dims.len() - 1, self.axis)
    }
}

pub(super) fn gather_elements(draft: &mut Draft, node: &OnnxNode) -> Results {
    let (x, indices) = (node.input(0)?, node.input(1)?);
    let along = Along::new(draft, x, indices, node.attributes.int("axis", 0)?)?;
    let taken = draft.rows(along.flat, along.places)?;
    let last = along.dims.len() - 1;
    Ok(vec![draft.move_axis(taken, last, along.axis)?])
}

/// How values that meet are combined; none for the last to stay.
fn reduction(node: &OnnxNode) -> Result<Option<BinaryOp>, Obstacle> {
    if node.opset < 16 {
        return Ok(None);
    }
    match node.attributes.string("reduction", "none")?.as_str() {
        "none" => Ok(None),
        "add" => Ok(Some(BinaryOp::Add)),
        "mul" => Ok(Some(BinaryOp::Mul)),
        "max" if node.opset >= 18 => Ok(Some(BinaryOp::Max)),
        "min" if node.opset >= 18 => Ok(Some(BinaryOp::Min)),
        other => Err(Obstacle::invalid(format!("attribute reduction is `{other}`"))),
    }
}

pub(super) fn scatter_elements(draft: &mut Draft, node: &OnnxNode) -> Results {
    let (x, indices, updates) = (node.input(0)?, node.input(1)?, node.input(2)?);
    let reduction = reduction(node)?;
    if draft.dims(updates) != draft.dims(indices) || draft.dtype(updates) != draft.dtype(x) {
        let (indices, updates) = (draft.ty(indices), draft.ty(updates));
        return Err(Obstacle::invalid(format!(
            "updates {updates} at indices {indices} for {}",
            draft.ty(x)
        )));
    }
    let along = Along::new(draft, x, indices, node.attributes.int("axis", 0)?)?;
    let count = product(draft.dims(along.places))?;
    let places = draft.reshape(along.places, &[count])?;
    let updates = draft.move_axis(updates, along.axis, along.dims.len() - 1)?;
    let updates = draft.reshape(updates, &[count])?;
    let scattered = draft.scattered(along.flat, places, updates, reduction)?;
    Ok(vec![along.restored(draft, scattered)?])
}

/// Rows of `x` that indices of several axes name: the data as rows, and the place of each index among them.
fn tuples(
    draft: &mut Draft,
    x: ValueId,
    indices: ValueId,
    batch_dims: i64,
) -> Result<[ValueId; 2], Obstacle> {
    let (rank, count) = (draft.rank(x), draft.rank(indices));
    let wrong = |draft: &Draft| {
        let (indices, x) = (draft.ty(indices), draft.ty(x));
        Obstacle::invalid(format!("indices {indices} with batch_dims {batch_dims} for {x}"))
    };
    let depth = draft.dims(indices).last().copied().ok_or_else(|| wrong(draft))?;
    let depth = depth
        .as_fixed()
        .ok_or_else(|| Obstacle::batch("index tuples whose length is the batch size"))?;
    let shared = usize::try_from(batch_dims).ok().filter(|&shared| shared < rank.min(count));
    let shared = shared.ok_or_else(|| wrong(draft))?;
    let end = shared.checked_add(depth).filter(|&end| depth > 0 && end <= rank);
    let end = end.ok_or_else(|| wrong(draft))?;
    let dims = draft.dims(x).to_vec();
    if dims[..shared] != draft.dims(indices)[..shared] {
        return Err(wrong(draft));
    }
    let indices = draft.cast(indices, DType::I64)?;
    let lead = draft.dims(indices)[..count - 1].to_vec();
    let (mut sum, mut inside) = (None, None);
    for axis in shared..end {
        let size = fixed_axis(draft, x, axis, "indexes along")?;
        let number = draft.slice(indices, count - 1, axis - shared, axis - shared + 1)?;
        let number = draft.reshape(number, &lead)?;
        let [at, within] = draft.resolved(number, size)?;
        let stride = draft.integer(product(&dims[axis + 1..end])?);
        let part = draft.mul(at, stride)?;
        sum = Some(match sum {
            None => part,
            Some(sum) => draft.add(sum, part)?,
        });
        inside = Some(match inside {
            None => within,
            Some(inside) => draft.binary(BinaryOp::And, inside, within)?,
        });
    }
    let (Some(mut places), Some(inside)) = (sum, inside) else {
        return Err(wrong(draft));
    };
    if shared > 0 {
        let block = draft.integer(product(&dims[shared..end])?);
        let batches = draft.iota(product(&dims[..shared])?)?;
        let first = draft.mul(batches, block)?;
        let mut spread = dims[..shared].to_vec();
        spread.resize(lead.len(), Dim::ONE);
        let first = draft.reshape(first, &spread)?;
        places = draft.add(places, first)?;
    }
    let places = draft.checked(places, inside)?;
    let mut rows = vec![product(&dims[..end])?];
    rows.extend(&dims[end..]);
    Ok([draft.reshape(x, &rows)?, places])
}

pub(super) fn gather_nd(draft: &mut Draft, node: &OnnxNode) -> Results {
    let batch_dims = if node.opset < 12 { 0 } else { node.attributes.int("batch_dims", 0)? };
    let [rows, places] = tuples(draft, node.input(0)?, node.input(1)?, batch_dims)?;
    Ok(vec![draft.rows(rows, places)?])
}

pub(super) fn scatter_nd(draft: &mut Draft, node: &OnnxNode) -> Results {
    let (x, indices, updates) = (node.input(0)?, node.input(1)?, node.input(2)?);
    let reduction = reduction(node)?;
    let [rows, places] = tuples(draft, x, indices, 0)?;
    let mut wanted = draft.dims(places).to_vec();
    wanted.extend(&draft.dims(rows)[1..]);
    if draft.dims(updates) != wanted || draft.dtype(updates) != draft.dtype(x) {
        let (indices, updates) = (draft.ty(indices), draft.ty(updates));
        return Err(Obstacle::invalid(format!(
            "updates {updates} at indices {indices} for {}",
            draft.ty(x)
        )));
    }
    let count = product(draft.dims(places))?;
    let mut flat = vec![count];
    flat.extend(&draft.dims(rows)[1..]);
    let (places, updates) = (draft.reshape(places, &[count])?, draft.reshape(updates, &flat)?);
    let scattered = draft.scattered(rows, places, updates, reduction)?;
    let dims = draft.dims(x).to_vec();
    Ok(vec![draft.reshape(scattered, &dims)?])
}

pub(super) fn top_k(draft: &mut Draft, node: &OnnxNode) -> Results {
    let x = node.input(0)?;
    let axis = axis_of(node.attributes.int("axis", -1)?, draft.rank(x))?;
    let k = if node.opset < 10 {
        node.attributes.optional_int("k")?
    } else {
        match node.ints_input(draft, 1)?.as_deref() {
            None => None,
            Some(&[k]) => Some(k),
            Some(other) => return Err(Obstacle::invalid(format!("input 1 (k) is {other:?}"))),
        }
    };
    let k = k.ok_or_else(|| Obstacle::invalid("k is missing"))?;
    let largest = node.opset < 11 || node.attributes.flag("largest", true)?;
    if node.opset >= 11 {
        // Any order will do where none is asked for.
        node.attributes.flag("sorted", true)?;
    }
    let size = fixed_axis(draft, x, axis, "sorts")?;
    let k = usize::try_from(k)
        .ok()
        .filter(|&k| k <= size)
        .ok_or_else(|| Obstacle::invalid(format!("the first {k} of an axis of {size}")))?;
    let last = draft.rank(x) - 1;
    let moved = draft.move_axis(x, axis, last)?;
    let wide = if draft.dtype(x).is_float() { DType::F32 } else { DType::I64 };
    let keys = draft.cast(moved, wide)?;
    let numbers = draft.emit(Op::TopK { k, largest }, &[keys])?;
    let lead = draft.dims(moved)[..last].to_vec();
    let places = draft.places(&lead, size, numbers)?;
    let total = product(draft.dims(moved))?;
    let flat = draft.reshape(moved, &[total])?;
    let values = draft.rows(flat, places)?;
    Ok(vec![draft.move_axis(values, last, axis)?, draft.move_axis(numbers, last, axis)?])
}

pub(super) fn one_hot(draft: &mut Draft, node: &OnnxNode) -> Results {
    let (indices, values) = (node.input(0)?, node.input(2)?);
    let axis = axis_of(node.attributes.int("axis", -1)?, draft.rank(indices) + 1)?;
    let depth =
        node.number_input(draft, 1)?.ok_or_else(|| Obstacle::invalid("the depth is missing"))?;
    #[allow(clippy::cast_possible_truncation, reason = "ONNX truncates a depth that is a float")]
    let depth = usize::try_from(depth as i64)
        .map_err(|_| Obstacle::invalid(format!("a depth of {depth}")))?;
    if draft.dims(values) != [Dim::fixed(2)] {
        return Err(Obstacle::invalid(format!("the values are {}", draft.ty(values))));
    }
    let [at, _] = draft.resolved(indices, depth)?;
    let mut dims = draft.dims(at).to_vec();
    dims.insert(axis, Dim::ONE);
    let at = draft.reshape(at, &dims)?;
    let numbers = draft.iota_along(Dim::fixed(depth), axis, dims.len())?;
    let hit = draft.compare(CompareOp::Equal, at, numbers)?;
    let (off, on) = (draft.slice(values, 0, 0, 1)?, draft.slice(values, 0, 1, 2)?);
    let (off, on) = (draft.reshape(off, &[])?, draft.reshape(on, &[])?);
    Ok(vec![draft.select(hit, on, off)?])
}

/// The elements whose condition holds; what they are has to be known, since their number is a size.
pub(super) fn compress(draft: &mut Draft, node: &OnnxNode) -> Results {
    let mut x = node.input(0)?;
    let condition =
        node.constant(draft, 1)?.ok_or_else(|| Obstacle::invalid("the condition is missing"))?;
    let axis = match node.attributes.optional_int("axis")? {
        Some(axis) => axis_of(axis, draft.rank(x))?,
        None => {
            let total = product(draft.dims(x))?;
            x = draft.reshape(x, &[total])?;
            0
        }
    };
    let size = fixed_axis(draft, x, axis, "compresses")?;
    let count = condition.len().filter(|&count| count <= size && condition.shape.len() == 1);
    let count = count.ok_or_else(|| {
        Obstacle::invalid(format!("a condition {} for an axis of {size}", condition.ty()))
    })?;
    let holds = |at: &usize| condition.get(*at).as_int() != Some(0);
    let kept = (0..).zip(0..count).filter(|(_, at)| holds(at)).map(|(index, _)| index).collect();
    Ok(vec![take_constant(draft, x, axis, kept)?])
}

/// Refused: how many elements are different is a size.
pub(super) fn unique() -> Results {
    Err(Obstacle::unsupported("a result whose size depends on values"))
}

/// Where a known value is not zero: one row for each axis, one column for each place.
pub(super) fn non_zero(draft: &mut Draft, node: &OnnxNode) -> Results {
    let x = node.constant(draft, 0)?.ok_or_else(|| Obstacle::invalid("input 0 is missing"))?;
    let count = x.len().ok_or_else(|| Obstacle::unsupported("a size that overflows"))?;
    bounded(count)?;
    let holds = |at: &usize| x.get(*at) != Element::Int(0) && x.get(*at) != Element::Float(0.0);
    let found: Vec<usize> = (0..count).filter(holds).collect();
    let mut elements = Vec::with_capacity(found.len() * x.shape.len());
    let mut stride = count;
    for &size in &x.shape {
        stride /= size.max(1);
        for place in &found {
            elements.push(Element::Int(i64::try_from(place / stride.max(1) % size).unwrap_or(0)));
        }
    }
    let shape = vec![x.shape.len(), found.len()];
    Ok(vec![draft.add_known(Known::new(DType::I64, shape, elements))])
}

/// The first elements of each sequence in the opposite order, the others as they are.
pub(super) fn reverse_sequence(draft: &mut Draft, node: &OnnxNode) -> Results {
    let (x, lengths) = (node.input(0)?, node.input(1)?);
    let rank = draft.rank(x);
    let batch = axis_of(node.attributes.int("batch_axis", 1)?, rank)?;
    let time = axis_of(node.attributes.int("time_axis", 0)?, rank)?;
    if [batch, time] != [0, 1] && [batch, time] != [1, 0] {
        return Err(Obstacle::invalid(format!("batch_axis {batch} and time_axis {time}")));
    }
    let steps = fixed_axis(draft, x, time, "reverses")?;
    let sequences = draft.dims(x)[batch];
    if draft.dims(lengths) != [sequences] {
        let (lengths, x) = (draft.ty(lengths), draft.ty(x));
        return Err(Obstacle::invalid(format!("lengths {lengths} for {x}")));
    }
    // [sequences, steps, ...]
    let moved = draft.move_axis(x, batch, 0)?;
    let dims = draft.dims(moved).to_vec();
    let mut rows = vec![product(&dims[..2])?];
    rows.extend(&dims[2..]);
    let flat = draft.reshape(moved, &rows)?;
    let lengths = draft.cast(lengths, DType::I64)?;
    let lengths = draft.reshape(lengths, &[sequences, Dim::ONE])?;
    let step = draft.iota_along(Dim::fixed(steps), 1, 2)?;
    let one = draft.integer(1_i64);
    let mirrored = draft.sub(lengths, step)?;
    let mirrored = draft.sub(mirrored, one)?;
    let within = draft.compare(CompareOp::Less, step, lengths)?;
    let at = draft.select(within, mirrored, step)?;
    let places = draft.places(&dims[..1], steps, at)?;
    // A length beyond the steps would reach into another sequence.
    let all = draft.integer(Dim::fixed(steps));
    let fits = draft.compare(CompareOp::LessEqual, lengths, all)?;
    let places = draft.checked(places, fits)?;
    let taken = draft.rows(flat, places)?;
    Ok(vec![draft.move_axis(taken, 0, batch)?])
}
