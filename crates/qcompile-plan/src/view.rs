//! Views: reshape, transpose, broadcast and slice move no data; whoever reads their result reads the value under
//! it with other strides. Widening a 16-bit float to f32 changes none either: whoever reads it widens what it loads.

use crate::{Affine, plan::dense_strides};
use qcompile_ir::{DType, Dim, Graph, NodeId, Op, Shape};

/// How a value lies in the memory of another: element `offset + sum(index[d] · strides[d])` of `base`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct View {
    /// The value whose memory it is.
    pub(crate) base: NodeId,
    /// First element.
    pub(crate) offset: Affine,
    /// Sizes of the viewing value.
    pub(crate) dims: Vec<Dim>,
    /// Strides in elements, one for each dim; 0 where the dim is 1 or repeated.
    pub(crate) strides: Vec<Dim>,
}

const NO_STRIDE: Dim = Dim::fixed(0);

impl View {
    /// A dense value in its own memory.
    pub(crate) fn dense(base: NodeId, shape: &Shape) -> View {
        let mut view = View {
            base,
            offset: Affine::ZERO,
            strides: dense_strides(&shape.0),
            dims: shape.0.clone(),
        };
        view.normalize();
        view
    }

    /// A dim of size 1 has no stride, so that equal views compare equal.
    fn normalize(&mut self) {
        for (dim, stride) in self.dims.iter().zip(&mut self.strides) {
            if *dim == Dim::ONE || stride.scale == 0 {
                *stride = NO_STRIDE;
            }
        }
    }

    /// Whether its elements lie in row-major order without gaps.
    pub(crate) fn is_dense(&self) -> bool {
        let dense = View::dense(self.base, &Shape(self.dims.clone()));
        dense.strides == self.strides
    }

    /// Whether it is the whole of its base, unchanged.
    pub(crate) fn is_whole(&self, graph: &Graph) -> bool {
        self.offset == Affine::ZERO && self.dims == graph.ty(self.base).shape.0 && self.is_dense()
    }

    /// This view seen through one more view op; `None` if that takes a copy.
    pub(crate) fn through(&self, op: &Op) -> Option<View> {
        let mut view = self.clone();
        match op {
            Op::Reshape(shape) => view = self.reshaped(&shape.0)?,
            Op::Transpose(permutation) => {
                view.dims = permutation.iter().map(|&axis| self.dims[axis]).collect();
                view.strides = permutation.iter().map(|&axis| self.strides[axis]).collect();
            }
            Op::Broadcast(shape) => {
                let new = shape.rank() - self.dims.len();
                view.dims.clone_from(&shape.0);
                view.strides = vec![NO_STRIDE; new];
                view.strides.extend(&self.strides);
                // A dim of size 1 has stride 0 already, which is what repeats it.
            }
            Op::Slice { axis, start, end, step } => {
                let stride = self.strides[*axis];
                view.offset = view.offset.plus(Affine::from(stride).times(*start)?)?;
                view.dims[*axis] = Dim::fixed((end - start).div_ceil(*step));
                view.strides[*axis] = stride.times(Dim::fixed(*step))?;
            }
            _ => return None,
        }
        view.normalize();
        Some(view)
    }

    /// Splits and merges dims as far as strides allow.
    fn reshaped(&self, dims: &[Dim]) -> Option<View> {
        let (old_dims, old_strides): (Vec<Dim>, Vec<Dim>) = self
            .dims
            .iter()
            .zip(&self.strides)
            .filter(|(dim, _)| **dim != Dim::ONE)
            .map(|(&dim, &stride)| (dim, stride))
            .unzip();
        let mut strides = vec![NO_STRIDE; dims.len()];
        let (mut old, mut new) = (0, 0);
        while new < dims.len() {
            if dims[new] == Dim::ONE {
                new += 1;
                continue;
            }
            let (first_old, first_new) = (old, new);
            let (mut old_size, mut new_size) = (*old_dims.get(old)?, dims[new]);
            (old, new) = (old + 1, new + 1);
            // N counts as larger than any number: only the products have to agree.
            let key = |dim: Dim| (dim.batch, dim.scale);
            while old_size != new_size {
                if key(new_size) < key(old_size) {
                    new_size = new_size.times(*dims.get(new)?)?;
                    new += 1;
                } else {
                    old_size = old_size.times(*old_dims.get(old)?)?;
                    old += 1;
                }
            }
            for at in first_old..old - 1 {
                let spanned = old_strides[at + 1].times(old_dims[at + 1])?;
                if scale_of(spanned) != scale_of(old_strides[at]) {
                    return None;
                }
            }
            let mut stride = old_strides[old - 1];
            for at in (first_new..new).rev() {
                strides[at] = stride;
                stride = stride.times(dims[at])?;
            }
        }
        Some(View { base: self.base, offset: self.offset, dims: dims.to_vec(), strides })
    }

    /// Leading dims merged to one stride each for batch, row and column; `None` if the batch dims do not merge.
    pub(crate) fn as_matrices(&self) -> Option<[(Dim, Dim); 3]> {
        let rank = self.dims.len();
        let (batch, batch_stride) = merged(&self.dims[..rank - 2], &self.strides[..rank - 2])?;
        Some([
            (batch, batch_stride),
            (self.dims[rank - 2], self.strides[rank - 2]),
            (self.dims[rank - 1], self.strides[rank - 1]),
        ])
    }

    /// How `op`, whose result has these dims, reads a scale or zero point: along its axis only.
    pub(crate) fn along_axis(&self, op: &Op, dims: &[Dim]) -> View {
        let axis = match *op {
            Op::Quantize { axis, .. }
            | Op::Dequantize { axis }
            | Op::StraightThrough { axis, .. } => axis,
            _ => None,
        };
        let mut strides = vec![NO_STRIDE; dims.len()];
        if let (Some(axis), Some(&stride)) = (axis, self.strides.first()) {
            strides[axis] = stride;
        }
        View { strides, dims: dims.to_vec(), ..self.clone() }
    }

    /// Strides over `[rows, columns]`, the rows being all dims but the last; `None` if they do not merge.
    pub(crate) fn as_matrix(&self) -> Option<[Dim; 2]> {
        let last = self.dims.len().checked_sub(1)?;
        let (_, row_stride) = merged(&self.dims[..last], &self.strides[..last])?;
        Some([row_stride, self.strides[last]])
    }
}

/// Position of the first operand that is a scale or zero point, where an op has such.
pub(crate) fn first_parameter(op: &Op) -> usize {
    match op {
        Op::Quantize { .. } | Op::Dequantize { .. } => 1,
        Op::StraightThrough { .. } => 2,
        _ => usize::MAX,
    }
}

/// Zero strides compare equal whatever their flag.
fn scale_of(stride: Dim) -> Dim {
    if stride.scale == 0 { NO_STRIDE } else { stride }
}

/// Several dims as one: size and stride; `None` if no single stride walks them.
pub(crate) fn merged(dims: &[Dim], strides: &[Dim]) -> Option<(Dim, Dim)> {
    let mut size = Dim::ONE;
    let mut stride = NO_STRIDE;
    for (&dim, &step) in dims.iter().zip(strides).rev() {
        if dim == Dim::ONE {
            continue;
        }
        if size == Dim::ONE {
            (size, stride) = (dim, step);
            continue;
        }
        if scale_of(stride.times(size)?) != scale_of(step) {
            return None;
        }
        size = size.times(dim)?;
    }
    Some((size, stride))
}

/// The views of all values of a graph, by node index.
pub(crate) fn views(graph: &Graph, order: &[NodeId]) -> Vec<View> {
    let mut views: Vec<Option<View>> = vec![None; graph.len()];
    for &id in order {
        let view = match graph.op(id) {
            op @ (Op::Reshape(_) | Op::Transpose(_) | Op::Broadcast(_) | Op::Slice { .. }) => {
                let operand = graph.operand(id, 0);
                views[operand.index()].as_ref().and_then(|view| view.through(op))
            }
            Op::Cast(DType::F32) if is_half(graph.ty(graph.operand(id, 0)).dtype) => {
                views[graph.operand(id, 0).index()].clone()
            }
            _ => None,
        };
        views[id.index()] = Some(view.unwrap_or_else(|| View::dense(id, &graph.ty(id).shape)));
    }
    views.into_iter().map(|view| view.expect("verified: the order has every node")).collect()
}

/// Whether it is a float of 16 bits, all of whose values f32 has.
fn is_half(dtype: DType) -> bool {
    matches!(dtype, DType::BF16 | DType::F16)
}

/// Drops dims of size 1 and merges neighbours that every access walks as one. Returns the dims; `accesses` are
/// rewritten in place.
pub(crate) fn collapse(dims: &[Dim], accesses: &mut [&mut Vec<Dim>]) -> Vec<Dim> {
    let mut kept: Vec<(Dim, Vec<Dim>)> = Vec::new();
    for (axis, &dim) in dims.iter().enumerate() {
        if dim == Dim::ONE {
            continue;
        }
        let strides: Vec<Dim> = accesses.iter().map(|access| access[axis]).collect();
        let fused = kept.last().and_then(|(outer, outer_strides)| {
            let merge = |(&outer, &inner): (&Dim, &Dim)| {
                inner.times(dim).is_some_and(|span| scale_of(span) == scale_of(outer))
            };
            let all = outer_strides.iter().zip(&strides).all(merge);
            if all { outer.times(dim) } else { None }
        });
        match (fused, kept.last_mut()) {
            (Some(size), Some(last)) => *last = (size, strides),
            _ => kept.push((dim, strides)),
        }
    }
    for (position, access) in accesses.iter_mut().enumerate() {
        **access = kept.iter().map(|(_, strides)| scale_of(strides[position])).collect();
    }
    kept.into_iter().map(|(dim, _)| dim).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use qcompile_ir::{Region, TensorType};

    fn view(dims: &[Dim]) -> View {
        let mut graph = Graph::new("g");
        let shape = Shape(dims.to_vec());
        let op = Op::Input(TensorType::f32(shape.clone()));
        let id = graph.add(op, &[], "x", Region::Forward).expect("no operands");
        View::dense(id, &shape)
    }

    fn dims(sizes: &[usize]) -> Vec<Dim> {
        Shape::fixed(sizes).0
    }

    #[test]
    fn heads_split_and_transpose_without_a_copy() {
        let x = view(&[Dim::N, 8.into(), 12.into()]);
        let split = Op::Reshape(Shape(vec![Dim::N, 8.into(), 3.into(), 4.into()]));
        let heads = x.through(&split).expect("splits");
        let heads = heads.through(&Op::Transpose(vec![0, 2, 1, 3])).expect("permutes");
        assert_eq!(heads.strides, dims(&[96, 4, 12, 1]));
        assert!(!heads.is_dense());
        let merge = Op::Reshape(Shape(vec![Dim::N, 24.into(), 4.into()]));
        assert!(heads.through(&merge).is_none());
        assert_eq!(heads.as_matrices(), None);
    }

    #[test]
    fn the_batch_merges_with_what_follows() {
        let x = view(&[Dim::N, 4.into(), 5.into()]);
        let flat = Op::Reshape(Shape(vec![Dim { scale: 4, batch: true }, 5.into()]));
        assert!(x.through(&flat).expect("merges").is_dense());
        let row = view(&[5.into()]);
        let broadcast = Op::Broadcast(Shape(vec![Dim::N, 4.into(), 5.into()]));
        let rows = row.through(&broadcast).expect("repeats");
        assert_eq!(rows.as_matrix(), Some([NO_STRIDE, Dim::ONE]));
    }

    #[test]
    fn collapsing_keeps_what_differs() {
        let (mut a, mut b) = (dims(&[20, 5, 1]), dims(&[0, 5, 1]));
        let merged = collapse(&dims(&[3, 4, 5]), &mut [&mut a, &mut b]);
        assert_eq!(merged, dims(&[3, 20]));
        assert_eq!((a, b), (dims(&[20, 1]), dims(&[0, 1])));
    }
}
