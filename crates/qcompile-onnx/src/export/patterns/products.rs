//! Biases of products, and the product in front of a recurrent layer.

use super::{Gates, Pattern, RecurrentBias, binary, both, seen};
use qcompile_ir::{BinaryOp, Dim, Graph, NodeId, Op};

pub(super) fn bias(graph: &Graph, id: NodeId) -> Option<Pattern> {
    both(graph, id, BinaryOp::Add).into_iter().find_map(|[product, bias]| {
        let product = seen(graph, product);
        let source = product.source;
        let last = match graph.op(source) {
            Op::Conv2d(_) => 3,
            Op::Matmul { .. } if graph.ty(source).shape.rank() == 2 && product.is_identity() => 1,
            _ => return None,
        };
        let dims = &graph.ty(id).shape.0;
        // All of the product, for this sum alone.
        let mut used = graph
            .operands(id)
            .into_iter()
            .find(|&operand| seen(graph, operand).source == source)?;
        while used != source {
            if graph.uses(used).len() != 1
                || graph.ty(used).shape.elements() != graph.ty(source).shape.elements()
            {
                return None;
            }
            used = graph.operand(used, 0);
        }
        let alone = graph.uses(source).len() == 1
            && graph.outputs().iter().all(|(_, output)| *output != source);
        let bias = seen(graph, bias);
        let axis = bias.only_axis(graph)?;
        let whole = graph.ty(bias.source).shape.elements() == Some(dims[axis]);
        let fits = product.axes[axis] == Some(last) && whole;
        (alone && fits && graph.ty(id).dtype.is_float()).then(|| Pattern::Bias {
            product: source,
            operands: graph.operands(source),
            axes: product.axes,
            bias: bias.source,
        })
    })
}

pub(super) fn recurrence(graph: &Graph, id: NodeId) -> Option<Pattern> {
    let x = graph.operand(id, 0);
    let columns = *graph.ty(x).shape.0.last()?;
    let mut bias = RecurrentBias::None;
    let mut value = x;
    loop {
        match graph.op(value) {
            Op::Reshape(_) => {
                value = graph.operand(value, 0);
                if graph.ty(value).shape.0.last() != Some(&columns) {
                    return None;
                }
            }
            Op::Binary(BinaryOp::Add) if bias == RecurrentBias::None => {
                let last = graph.ty(value).shape.rank() - 1;
                let found = both(graph, value, BinaryOp::Add).into_iter().find_map(|[x, b]| {
                    let b = seen(graph, b);
                    (b.only_axis(graph) == Some(last)).then_some((x, b.source))
                });
                let (x, source) = found?;
                if graph.ty(source).shape.elements() != Some(columns) {
                    return None;
                }
                bias = recurrent_bias(graph, source, columns);
                value = x;
            }
            Op::Matmul { transpose_a: false, transpose_b } => {
                let operands = graph.operands(value);
                if graph.ty(value).shape.rank() != 2 {
                    return None;
                }
                let gates = Gates {
                    rows: operands[0],
                    weight: operands[1],
                    transposed: *transpose_b,
                    bias,
                };
                let operands = graph.operands(id).split_off(1);
                return Some(Pattern::Recurrence { gates, operands });
            }
            _ => return None,
        }
    }
}

/// A bias that is the sum of both halves of one value.
fn recurrent_bias(graph: &Graph, sum: NodeId, columns: Dim) -> RecurrentBias {
    let half = |id: NodeId, first: usize| {
        let Op::Slice { axis: 0, start, end, step: 1 } = graph.op(id) else { return None };
        let begin = first.checked_mul(columns.scale)?;
        (*start == begin && Some(*end) == begin.checked_add(columns.scale))
            .then(|| graph.operand(id, 0))
    };
    let linear = binary(graph, sum, BinaryOp::Add).and_then(|[first, second]| {
        let whole = half(first, 0)?;
        let size = graph.ty(whole).shape.as_fixed()?;
        (Some(whole) == half(second, 1) && size == [columns.scale * 2]).then_some(whole)
    });
    linear.map_or(RecurrentBias::Sum(sum), RecurrentBias::Both)
}
