//! What lowering must know of a nest before it emits anything.

use crate::body::{cost, has_lanes};
use qcompile_ir::{BinaryOp, DType, Dim, ReduceOp, Tensor, UnaryOp};
use qcompile_plan::verify::body_types;
use qcompile_plan::{LoopNest, Scalar, Write};

/// Decisions about one nest; they depend on the plan only.
#[derive(Clone, Debug)]
pub(crate) struct Facts {
    /// Element types of the body.
    pub types: Vec<DType>,
    /// Values of the body that do not change along the innermost dimension.
    pub invariant: Vec<bool>,
    /// f32 values of the body, and bf16 ones, whose elements bf16 holds exactly.
    pub exact: Vec<bool>,
    /// Vectors of four lanes per turn of the innermost loop; 0 if it goes element by element.
    pub parts: usize,
    /// About how many instructions a point costs.
    pub cost: usize,
}

/// The element type that partial results of a reduction have.
pub(crate) fn partial_type(dtype: DType) -> DType {
    if dtype.is_float() { DType::F32 } else { dtype }
}

/// The stride of an access along the innermost dimension.
pub(crate) fn innermost(strides: &[Dim]) -> Dim {
    strides.last().copied().unwrap_or(Dim::fixed(0))
}

impl Facts {
    pub(crate) fn of(nest: &LoopNest) -> Facts {
        let types = body_types(nest).expect("verified: every value has a type");
        let mut invariant: Vec<bool> = Vec::with_capacity(nest.body.len());
        for &scalar in &nest.body {
            invariant.push(match scalar {
                Scalar::Read(read) => innermost(&nest.reads[read].strides).scale == 0,
                Scalar::Tile => false,
                Scalar::Const(..) | Scalar::Size(_) => true,
                _ => scalar.operands().all(|x| invariant[x]),
            });
        }
        let cost: usize = nest.body.iter().map(|&scalar| cost(scalar)).sum::<usize>().max(1);
        let exact = exact(nest, &types);
        let mut facts = Facts { types, invariant, exact, parts: 0, cost };
        if facts.vectorizes(nest) {
            facts.parts = facts.width(nest.dims.last().copied());
        }
        facts
    }

    fn vectorizes(&self, nest: &LoopNest) -> bool {
        let Some(&last) = nest.dims.last() else { return false };
        if last.as_fixed().is_some_and(|size| size < 4) {
            return false;
        }
        let writes = nest.writes.iter().all(|write| {
            let stride = innermost(&write.access().strides);
            let along =
                stride == Dim::ONE || (stride.scale == 0 && matches!(write, Write::Reduce { .. }));
            along && write.access().dtype != DType::I64
        });
        let body = nest
            .body
            .iter()
            .enumerate()
            .all(|(at, &scalar)| self.invariant[at] || has_lanes(scalar, &self.types, at));
        // Reads that skip elements are put together lane by lane: worth it for plain floats only.
        let reads = nest.body.iter().all(|&scalar| match scalar {
            Scalar::Read(read) => {
                let access = &nest.reads[read];
                let stride = innermost(&access.strides);
                stride.scale == 0 || stride == Dim::ONE || access.dtype == DType::F32
            }
            _ => true,
        });
        writes && body && reads
    }

    /// More vectors per turn where the body is small, but not so many that a remainder is left for the slow loop.
    fn width(&self, last: Option<Dim>) -> usize {
        let mut parts = match self.cost {
            0..=12 => 4,
            13..=30 => 2,
            _ => 1,
        };
        if let Some(size) = last.and_then(Dim::as_fixed) {
            while parts > 1 && size / (4 * parts) * parts < size / 4 {
                parts /= 2;
            }
        }
        parts
    }
}

/// Whether bf16 holds every element of a value, for each value of a body. In registers a bf16 value is the f32 that
/// equals it, once it was rounded; arithmetic on bf16 rounds when its result is stored or cast.
fn exact(nest: &LoopNest, types: &[DType]) -> Vec<bool> {
    let mut exact: Vec<bool> = Vec::with_capacity(nest.body.len());
    for (at, &scalar) in nest.body.iter().enumerate() {
        exact.push(
            match scalar {
                Scalar::Read(read) => nest.reads[read].dtype == DType::BF16,
                Scalar::Const(_, value) => {
                    Tensor::scalar(DType::BF16, value).splat() == Some(value)
                }
                Scalar::Cast(DType::BF16, _) => true,
                Scalar::Cast(DType::F32, x) => types[x].is_float() && exact[x],
                Scalar::Unary(UnaryOp::Relu | UnaryOp::Neg | UnaryOp::Abs, x) => exact[x],
                Scalar::Binary(BinaryOp::Max | BinaryOp::Min, x, y) | Scalar::Select(_, x, y) => {
                    exact[x] && exact[y]
                }
                _ => false,
            } && types[at].is_float(),
        );
    }
    exact
}

/// Whether a reduction writes each of its results exactly once, after the innermost loop.
pub(crate) fn written_once(nest: &LoopNest, write: &Write) -> bool {
    let strides = &write.access().strides;
    let outer = strides.len().saturating_sub(1);
    strides[..outer]
        .iter()
        .zip(&nest.dims)
        .all(|(stride, &dim)| stride.scale != 0 || dim == Dim::ONE)
        && innermost(strides).scale == 0
}

/// The write of squared deviations that has the sum that a write wants.
pub(crate) fn sum_of_deviations(nest: &LoopNest, sum: &Write) -> Option<usize> {
    let Write::Reduce { access, op: ReduceOp::Sum, value } = sum else { return None };
    nest.writes.iter().position(|write| {
        matches!(write, Write::Deviations { access: other, value: of }
            if of == value && other.strides == access.strides)
    })
}
