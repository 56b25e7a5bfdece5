//! How much a step computes and moves, for measuring it against what the machine could do.

use crate::{Access, AttentionResult, Exchanged, Kernel, LoopNest, Plan, Primitive, Step};

/// What one run of a step amounts to.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Work {
    /// Multiplications and additions of products.
    pub flops: f64,
    /// Bytes that loops and epilogues read and write, each element of an access once.
    pub bytes: f64,
}

/// Bytes that each of several ranks receives from the others in a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Received {
    /// As they are exchanged.
    pub bytes: usize,
    /// If all were in f32.
    pub f32_bytes: usize,
}

impl Plan {
    /// What a rank of so many receives in a step.
    #[must_use]
    pub fn received(&self, ranks: usize) -> Received {
        let members = self.steps().iter().flat_map(|step| match &step.kernel {
            Kernel::AllReduce { members, .. } => &members[..],
            _ => &[],
        });
        members.fold(Received::default(), |sum, member| Received {
            bytes: sum.bytes + member.received(ranks),
            f32_bytes: sum.f32_bytes + Exchanged::received_in_f32(member.elements, ranks),
        })
    }
}

impl Step {
    /// Its work at this batch size.
    #[must_use]
    pub fn work(&self, batch: usize) -> Work {
        match &self.kernel {
            Kernel::Loops(nests) => {
                Work { flops: 0.0, bytes: nests.iter().map(|nest| bytes(nest, batch)).sum() }
            }
            Kernel::Primitive(primitive) => Work {
                flops: primitive.flops(batch),
                bytes: primitive.epilogue().map_or(0.0, |nest| bytes(nest, batch)),
            },
            Kernel::AllReduce { members, .. } => {
                let elements: usize = members.iter().map(|member| member.elements).sum();
                Work { flops: 0.0, bytes: 4.0 * elements as f64 }
            }
        }
    }
}

impl Primitive {
    /// Multiplications and additions of a product at this batch size; 0 for what is none.
    #[must_use]
    pub fn flops(&self, batch: usize) -> f64 {
        match self {
            Primitive::Matmul(matmul, _) => {
                let sizes = [matmul.batch, matmul.m, matmul.n, matmul.k];
                2.0 * sizes.iter().map(|dim| dim.size(batch) as f64).product::<f64>()
            }
            Primitive::Convolution(convolution, _) => {
                let geometry = &convolution.geometry;
                // Every place of the output meets every weight of its group, in each of the three products.
                let places = geometry.output().map_or(0, |[height, width]| height * width);
                let window = geometry.kernel[0] * geometry.kernel[1];
                let channels = convolution.out_channels * convolution.in_channels / geometry.groups;
                2.0 * convolution.images.size(batch) as f64 * (places * window * channels) as f64
            }
            Primitive::Attention(attention) => {
                let sizes = [attention.batch, attention.rows, attention.keys];
                let scores = sizes.iter().map(|dim| dim.size(batch) as f64).product::<f64>()
                    * attention.heads as f64;
                let (width, value_width) =
                    (attention.width.size(batch) as f64, attention.value_width.size(batch) as f64);
                // Scores and their product with values; backward the scores again and four products.
                let products = match attention.result {
                    AttentionResult::Forward(_) => width + value_width,
                    AttentionResult::Gradients { .. } => 3.0 * width + 2.0 * value_width,
                };
                // Half of the scores are hidden.
                2.0 * scores * products * if attention.causal { 0.5 } else { 1.0 }
            }
            Primitive::Recurrent(recurrent) => {
                // A product of the state and the recurrent weight in each step.
                let weight =
                    recurrent.recurrence.cell.gates() * recurrent.hidden * recurrent.hidden;
                2.0 * (recurrent.steps * weight) as f64 * recurrent.batch.size(batch) as f64
            }
            Primitive::Pooling(_)
            | Primitive::Softmax { .. }
            | Primitive::CrossEntropy { .. }
            | Primitive::CrossEntropyGrad { .. }
            | Primitive::Gather { .. }
            | Primitive::Scatter { .. }
            | Primitive::TopK { .. }
            | Primitive::Iota { .. }
            | Primitive::Random { .. } => 0.0,
        }
    }

    /// The loop nest that follows it within its kernel.
    #[must_use]
    pub fn epilogue(&self) -> Option<&LoopNest> {
        match self {
            Primitive::Matmul(_, epilogue) | Primitive::Convolution(_, epilogue) => {
                epilogue.as_ref()
            }
            _ => None,
        }
    }
}

fn bytes(nest: &LoopNest, batch: usize) -> f64 {
    let access = |access: &Access| {
        let walked = nest.dims.iter().zip(&access.strides).filter(|(_, stride)| stride.scale != 0);
        let elements: f64 = walked.map(|(dim, _)| dim.size(batch) as f64).product();
        elements * access.dtype.size() as f64
    };
    let reads: f64 = nest.reads.iter().map(access).sum();
    reads + nest.writes.iter().map(|write| access(write.access())).sum::<f64>()
}
