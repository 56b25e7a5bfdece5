//! Made-up inputs, for measuring where there is no data: seeded, so the same every time.
//!
//! Floats are drawn from N(0, 1). Integers are drawn below the smallest bound that their use sets: the rows of a
//! table that they index, the classes that they name.

use qcompile_ir::{DType, Graph, NodeId, Op, Tensor};
use qcompile_passes::update::Optimizer;
use qcompile_runtime::Values;

/// SplitMix64 (Steele, Lea and Flood, 2014).
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// A sequence of its own for each seed.
    #[must_use]
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `bound`, which is at least 1.
    pub fn below(&mut self, bound: u64) -> u64 {
        // The product's high half; the bias is below 2^-32 for any table.
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }

    /// About N(0, 1): the sum of four uniform numbers, which needs no function that differs between machines.
    pub fn normal(&mut self) -> f32 {
        let bits = self.next();
        let sum: i32 = (0..4).map(|at| ((bits >> (16 * at)) & 0xffff) as i32).sum();
        // Four uniform numbers of [0, 1) have the variance 1/3.
        (sum as f32 / 65_536.0 - 2.0) * 3.0_f32.sqrt()
    }
}

/// A tensor of about N(0, scale).
#[must_use]
pub fn normal(shape: &[usize], scale: f32, random: &mut Random) -> Tensor {
    let elements = shape.iter().product();
    let values: Vec<f32> = (0..elements).map(|_| random.normal() * scale).collect();
    Tensor::from_f32(shape, &values).unwrap_or_else(|| Tensor::zeros(DType::F32, shape))
}

/// Inputs of `graph` for one batch, but for those of the optimizer, which are given as [`quiet`] has them.
#[must_use]
pub fn inputs(graph: &Graph, batch: usize, seed: u64) -> Values {
    let quiet = quiet();
    let mut values = Values::new();
    for id in graph.leaves(|op| matches!(op, Op::Input(_))) {
        let node = graph.node(id);
        let name = node.name.as_str();
        let known = quiet.get(name).filter(|_| node.ty.shape.rank() == 0);
        let value = known.cloned().unwrap_or_else(|| draw(graph, id, batch, seed));
        values.insert(name.to_owned(), value);
    }
    values
}

fn draw(graph: &Graph, id: NodeId, batch: usize, seed: u64) -> Tensor {
    let node = graph.node(id);
    // Every input has a sequence of its own, whatever others the graph has.
    let of_name = node
        .name
        .as_str()
        .bytes()
        .fold(seed, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    let mut random = Random::new(of_name);
    let shape = node.ty.shape.sizes(batch);
    let dtype = node.ty.dtype;
    if dtype == DType::F32 {
        return normal(&shape, 1.0, &mut random);
    }
    let bound = match dtype {
        DType::Bool => 2,
        DType::I8 => bound(graph, id).min(128),
        DType::U8 => bound(graph, id).min(256),
        DType::I4 => bound(graph, id).min(8),
        DType::U4 => bound(graph, id).min(16),
        _ => bound(graph, id),
    };
    let elements: usize = shape.iter().product();
    let value = |random: &mut Random| match dtype {
        dtype if dtype.is_float() => f64::from(random.normal()),
        _ => random.below(bound as u64) as f64,
    };
    let values: Vec<f64> = (0..elements).map(|_| value(&mut random)).collect();
    Tensor::from_f64(dtype, &shape, &values).unwrap_or_else(|| Tensor::zeros(dtype, &shape))
}

/// What an integer input must stay below; 2 where nothing is known.
fn bound(graph: &Graph, input: NodeId) -> usize {
    let mut least: Option<usize> = None;
    let mut seen = vec![false; graph.len()];
    let mut stack = vec![input];
    while let Some(at) = stack.pop() {
        for (user, position) in graph.uses(at) {
            let first = graph.operand(user, 0);
            let limit = match graph.op(user) {
                Op::Gather if position == 1 => {
                    graph.ty(first).shape.0.first().map(|rows| rows.size(1))
                }
                Op::CrossEntropy | Op::CrossEntropyGrad if position == 1 => {
                    graph.ty(first).shape.0.last().map(|classes| classes.size(1))
                }
                Op::Scatter { rows, .. } if position == 0 => Some(rows.size(1)),
                Op::Reshape(_)
                | Op::Transpose(_)
                | Op::Broadcast(_)
                | Op::Slice { .. }
                | Op::Concat { .. }
                | Op::Cast(_)
                | Op::Unary(_)
                | Op::Select => {
                    if !std::mem::replace(&mut seen[user.index()], true) {
                        stack.push(user);
                    }
                    None
                }
                _ => None,
            };
            least = match (least, limit) {
                (Some(least), Some(limit)) => Some(least.min(limit)),
                (least, limit) => least.or(limit),
            };
        }
    }
    least.unwrap_or(2).max(1)
}

/// Inputs of every optimizer with which a step changes no parameter and no running mean but by rounding: a learning
/// rate of 0.
#[must_use]
pub fn quiet() -> Values {
    let names = Optimizer::ALL.iter().flat_map(|optimizer| optimizer.inputs());
    names
        .map(|&name| {
            let value = match name {
                "lr" | "weight_decay" => 0.0,
                "grad_clip_norm" => f64::INFINITY,
                "epsilon" => 1e-8,
                "beta2" => 0.999,
                "bias_correction1" | "bias_correction2" => 1.0,
                _ => 0.9,
            };
            (name.to_owned(), Tensor::scalar(DType::F32, value))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use qcompile_ir::text;

    #[test]
    fn integers_stay_below_what_they_index() {
        let source = "graph @g {
  input %lr : f32[]
  input %tokens : i64[N, 4]
  input %x : f32[N, 4]
  param %table : f32[7, 4] = uniform seed=1
forward:
  %flat : i64[4N] = reshape %tokens
  %y : f32[4N, 4] = gather %table, %flat
  return %y
}
";
        let graph = text::parse(source, &|_| None).unwrap();
        let values = inputs(&graph, 50, 3);
        assert_eq!(values["lr"].to_f64(), [0.0]);
        let tokens = values["tokens"].to_i64();
        assert_eq!(tokens.len(), 200);
        assert!(tokens.iter().all(|token| (0..7).contains(token)));
        assert!((0..7).all(|token| tokens.contains(&token)));
        let x = values["x"].to_f64();
        let mean = x.iter().sum::<f64>() / 200.0;
        let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / 200.0;
        assert!(mean.abs() < 0.25 && (variance - 1.0).abs() < 0.4, "{mean} {variance}");
        assert_eq!(inputs(&graph, 50, 3), values);
    }
}
