//! Where primitives read and write.

use crate::attention;
use qcompile_plan::{Convolution, Int8, Operands, Place, Primitive};

/// Where the scales and the zero point of integers are.
fn scales(operands: &Operands) -> impl Iterator<Item = Place> {
    let of = |int8: &Int8| [int8.scale_a, int8.scale_b].into_iter().chain(int8.zero_a);
    operands.scales().into_iter().flat_map(of)
}

/// The places of a primitive: what it reads, and what it writes besides its epilogue.
pub(crate) fn of(primitive: &Primitive) -> (Vec<Place>, Vec<Place>) {
    match primitive {
        Primitive::Matmul(matmul, epilogue) => {
            let mut reads = vec![matmul.a.place, matmul.b.place];
            reads.extend(scales(&matmul.operands));
            (reads, if epilogue.is_some() { Vec::new() } else { vec![matmul.c] })
        }
        Primitive::Convolution(convolution, epilogue) => {
            let Convolution { a, b, c, operands, .. } = convolution;
            let mut reads = vec![*a, *b];
            reads.extend(scales(operands));
            (reads, if epilogue.is_some() { Vec::new() } else { vec![*c] })
        }
        Primitive::Pooling(pooling) => (vec![pooling.x, pooling.dy], vec![pooling.y]),
        Primitive::Attention(attention) => attention::places(attention),
        Primitive::Softmax { x, y, .. } => (vec![*x], vec![*y]),
        Primitive::CrossEntropy { logits, label, loss, .. } => (vec![*logits, *label], vec![*loss]),
        Primitive::CrossEntropyGrad { logits, label, dloss, dlogits, .. } => {
            (vec![*logits, *label, *dloss], vec![*dlogits])
        }
        Primitive::Gather { table, indices, y, .. } => (vec![*table, *indices], vec![*y]),
        Primitive::Scatter { indices, values, y, .. } => (vec![*indices, *values], vec![*y]),
        Primitive::TopK { x, y, .. } => (vec![*x], vec![*y]),
        Primitive::Iota { y, .. } => (Vec::new(), vec![*y]),
        Primitive::Random { step, y, .. } => (vec![*step], vec![*y]),
        Primitive::Recurrent(recurrent) => (recurrent.reads().collect(), vec![recurrent.y]),
    }
}
