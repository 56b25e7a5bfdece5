//! What int8 costs and saves on this CPU, measured: the time of a layer's forward product and of the gradient of its
//! input (of both inputs, where it has no weight) in int8, quantization included, and in what it would be otherwise: f32, or bf16 in a bf16 plan, where values are
//! stored in bf16 in both cases.
//!
//! Where channels are set apart, that counts for the forward product.
//!
//! Each layer is built as a small plan of its own and run in turns in both precisions; layers of equal shape are
//! measured once, and on one machine once for all (see [`Timings`]).

use crate::error::{Error, Result};
use crate::options::Options;
use crate::synthetic::{self, Random};
use crate::terminal::{Progress, Show};
use crate::timings::Timings;
use qcompile_ir::{
    AttentionOperand, Channels, DType, GradientRounding, Graph, GraphError, Name, NodeId, Note, Op,
    Precision, Quantizer, Region, Shape, Tensor, TensorType, UnaryOp,
};
use qcompile_passes::quantize::{self, Decision, Layer, LayerCost, activation_products, layers};
use qcompile_plan::{BuildOptions, build};
use qcompile_runtime::{Trainer, TrainerOptions};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Runs of each precision at least and at most.
const RUNS: (usize, usize) = (5, 31);
/// Enough time for one layer, once it has run often enough.
const ENOUGH: Duration = Duration::from_millis(80);

/// The layers that int8 may be chosen for, with their times. Layers that stay f32 for other reasons are not measured.
///
/// # Errors
/// Of building and running the small plans.
pub(crate) fn measure(
    graph: &Graph,
    decide: &quantize::Options,
    options: &Options,
    show: Show,
) -> Result<BTreeMap<Name, LayerCost>> {
    let mut timings = Timings::load(options);
    let trainer = TrainerOptions { threads: options.threads, workers: 1, tier: options.tier };
    let trained = depends_on_parameter(graph);
    let mut decide = decide.clone();
    let mut all: Vec<(NodeId, Option<Layer>)> =
        layers(graph).into_iter().map(|layer| (layer.node, Some(layer))).collect();
    all.extend(activation_products(graph).into_iter().map(|product| (product, None)));
    let mut progress = Progress::start(show, "Timing", all.len() as u64);
    // A layer that is not chosen leaves its share of the budget to others, which then have to be measured as well.
    loop {
        let decisions = quantize::decide(&mut graph.clone(), &decide)?;
        let chosen = decisions.iter().zip(&all).filter(|(decision, _)| {
            decision.precision.is_quantized() && !decide.cost.contains_key(&decision.node)
        });
        let chosen: Vec<_> = chosen.collect();
        if chosen.is_empty() {
            break;
        }
        let mut costs = Vec::with_capacity(chosen.len());
        for (decision, (node, layer)) in chosen {
            let (done, name) = (decide.cost.len() + costs.len(), &decision.node);
            progress.update(done as u64, name.as_str());
            // Of a layer that is no other the gradient of its weight has a say of its own.
            let operands = graph.operands(*node);
            let given = match layer {
                Some(layer) if !layer.recurrent => &operands[..1],
                _ => &operands[..],
            };
            let backward = given.iter().any(|operand| trained[operand.index()]);
            let small = Small::of(graph, *node, backward, &decide, decision, options.batch_size);
            let cost = timings.find_or(&small.key(), || small.measure(&trainer))?;
            costs.push((name.clone(), cost));
        }
        decide.cost.extend(costs);
    }
    progress.finish();
    timings.save();
    Ok(decide.cost)
}

/// For each node index, whether the value depends on a parameter, so that its gradient is wanted.
fn depends_on_parameter(graph: &Graph) -> Vec<bool> {
    let mut depends = vec![false; graph.len()];
    for id in graph.order() {
        depends[id.index()] = matches!(graph.op(id), Op::Param(_))
            || graph.operands(id).iter().any(|operand| depends[operand.index()]);
    }
    depends
}

/// One layer, or product of two activations, alone.
struct Small {
    op: Op,
    x: TensorType,
    /// The weight's shape; none of a product of activations.
    weight: Option<Vec<usize>>,
    /// Its other operands: of a product of activations those, of a recurrent layer states and lengths.
    others: Vec<TensorType>,
    result: TensorType,
    forward: bool,
    backward: bool,
    low: Precision,
    high: Precision,
    quantizer: Quantizer,
    channels: Channels,
    batch: usize,
}

impl Small {
    fn of(
        graph: &Graph,
        node: NodeId,
        backward: bool,
        decide: &quantize::Options,
        decision: &Decision,
        batch: usize,
    ) -> Small {
        let channels = decision.channels.clone();
        let operands = graph.operands(node);
        let product = activation_products(graph).contains(&node);
        let others = match graph.op(node) {
            Op::Attention { .. } => &operands[1..3],
            Op::Recurrence(_) => &operands[2..],
            _ if product => &operands[1..],
            _ => &[],
        };
        let low = if others.is_empty() { decide.low() } else { decision.precision };
        Small {
            op: graph.op(node).clone(),
            x: graph.ty(operands[0]).clone(),
            weight: (!product).then(|| graph.ty(operands[1]).shape.sizes(1)),
            others: others.iter().map(|&other| graph.ty(other).clone()).collect(),
            result: graph.ty(node).clone(),
            forward: decide.operations.forward,
            backward: backward && decide.operations.backward,
            low,
            high: decide.high(),
            quantizer: decide.numerics.quantizer(),
            channels,
            batch,
        }
    }

    /// Equal for layers that take equally long.
    fn key(&self) -> String {
        let Small {
            op, x, weight, others, forward, backward, low, high, quantizer, channels, ..
        } = self;
        let batch = self.batch;
        let others: Vec<String> = others.iter().map(ToString::to_string).collect();
        let others = others.join(" ");
        let apart = if channels.is_empty() { String::new() } else { format!(" {channels:?}") };
        format!(
            "{op:?} {x} {weight:?} {others} {forward} {backward} {low:?} {high:?} {quantizer:?} {batch}{apart}"
        )
    }

    /// The states after each step of a recurrent layer.
    fn states(&self) -> TensorType {
        let mut dims = self.result.shape.0[1..].to_vec();
        dims[0] = self.x.shape.0[0];
        TensorType::f32(Shape(dims))
    }

    /// The ops on the way back through a recurrent layer and through a product of two activations, with their operands, of
    /// those of the forward product, its result and the incoming gradient.
    fn gradients(&self, operands: &[NodeId], [y, dy]: [NodeId; 2]) -> Vec<(Op, Vec<NodeId>)> {
        let product = |transpose_a, transpose_b| Op::Matmul { transpose_a, transpose_b };
        match self.op {
            Op::Recurrence(recurrence) => {
                let at = recurrence.operands();
                let rest = [at.peepholes, at.lengths].into_iter().flatten();
                let mut given = vec![y, operands[1], dy];
                given.extend(rest.map(|position| operands[position]));
                let rounding = GradientRounding::Nearest;
                vec![(Op::RecurrenceGrad { recurrence, cell: false, rounding }, given)]
            }
            Op::Attention { scale, causal, products } => {
                let rounding = GradientRounding::Nearest;
                let gradient = |of| Op::AttentionGrad { of, scale, causal, products, rounding };
                let given = [operands, &[dy]].concat();
                AttentionOperand::ALL.map(|of| (gradient(of), given.clone())).into()
            }
            Op::Matmul { transpose_a, transpose_b } if self.weight.is_none() => {
                let (a, b) = (operands[0], operands[1]);
                let left = match transpose_a {
                    false => (product(false, !transpose_b), vec![dy, b]),
                    true => (product(transpose_b, true), vec![b, dy]),
                };
                let right = match transpose_b {
                    false => (product(!transpose_a, false), vec![a, dy]),
                    true => (product(true, transpose_a), vec![dy, a]),
                };
                vec![left, right]
            }
            _ => Vec::new(),
        }
    }

    /// The op that gives the gradient of a layer's input.
    fn grad_input(&self) -> Option<Op> {
        self.weight.as_ref()?;
        match &self.op {
            Op::Conv2d(geometry) => Some(Op::Conv2dGradInput(*geometry)),
            Op::Matmul { transpose_a: false, transpose_b } => {
                Some(Op::Matmul { transpose_a: false, transpose_b: !transpose_b })
            }
            _ => None,
        }
    }

    /// The op that gives the gradient of the weight, and whether the incoming gradient is its first operand.
    fn grad_weight(&self) -> Option<(Op, bool)> {
        self.weight.as_ref()?;
        match &self.op {
            Op::Conv2d(geometry) => Some((Op::Conv2dGradWeight(*geometry), false)),
            Op::Matmul { transpose_b, .. } => {
                Some((Op::Matmul { transpose_a: true, transpose_b: false }, *transpose_b))
            }
            _ => None,
        }
    }

    /// The operands after the weight: zeros, and so many steps as there are.
    fn others(&self, graph: &mut Graph) -> std::result::Result<Vec<NodeId>, GraphError> {
        let steps = self.x.shape.0.first().map_or(0.0, |steps| steps.scale as f64);
        let mut others = Vec::with_capacity(self.others.len());
        for (at, ty) in self.others.iter().enumerate() {
            let value = if ty.dtype.is_float() { 0.0 } else { steps };
            let value = Op::Const(Arc::new(Tensor::scalar(ty.dtype, value)));
            let value = graph.add(value, &[], format!("constant{at}"), Region::Forward)?;
            let all = Op::Broadcast(ty.shape.clone());
            others.push(graph.add(all, &[value], format!("other{at}"), Region::Forward)?);
        }
        Ok(others)
    }

    /// The type that values between products are stored in.
    fn stored(&self) -> DType {
        let bf16 = [self.high.forward, self.high.grad_input].contains(&DType::BF16);
        if bf16 { DType::BF16 } else { DType::F32 }
    }

    fn graph(&self, low: bool) -> std::result::Result<Graph, Error> {
        let mut graph = Graph::new("layer");
        self.products(&mut graph, low)?;
        quantize::insert(&mut graph)?;
        quantize::insert_backward(&mut graph)?;
        quantize::optimise(&mut graph)?;
        Ok(graph)
    }

    fn products(&self, graph: &mut Graph, low: bool) -> std::result::Result<(), GraphError> {
        let mut random = Random::new(7);
        let stored = self.stored();
        let note = Note {
            precision: Some(if low { self.low } else { self.high }),
            stored: Some(stored),
            quantizer: Some(self.quantizer),
            ..Note::default()
        };
        let input = |graph: &mut Graph, name: &str, ty: &TensorType| {
            let ty = TensorType { dtype: stored, ..ty.clone() };
            let x = graph.add(Op::Input(ty), &[], name, Region::Forward)?;
            match stored {
                DType::F32 => Ok(x),
                _ => graph.add(Op::Cast(DType::F32), &[x], format!("{name}.f32"), Region::Forward),
            }
        };
        let x = input(graph, "x", &self.x)?;
        let mut operands = vec![x];
        if let Some(weight) = &self.weight {
            let weight = synthetic::normal(weight, 0.05, &mut random);
            operands.push(graph.add(Op::Param(Arc::new(weight)), &[], "w", Region::Forward)?);
            operands.extend(self.others(graph)?);
        } else {
            for (index, other) in self.others.iter().enumerate() {
                operands.push(input(graph, &format!("x{}", index + 1), other)?);
            }
        }
        let second = operands[1];
        let dy = input(graph, "dy", &self.result)?;
        let add = |graph: &mut Graph, op: Op, operands: &[NodeId], name: &str, region| {
            let y = graph.add(op, operands, name, region)?;
            *graph.note_mut(y) = note.clone();
            if low && region == Region::Forward {
                graph.note_mut(y).channels = self.channels.clone();
            }
            let stays = name == "dw" || matches!(self.op, Op::Recurrence(_));
            let stored = if stored != DType::F32 && !stays {
                graph.add(Op::Cast(stored), &[y], format!("{name}.stored"), region)?
            } else {
                y
            };
            graph.add_output(name, stored);
            Ok::<NodeId, GraphError>(y)
        };
        let mut y = None;
        if self.forward {
            y = Some(add(graph, self.op.clone(), &operands, "y", Region::Forward)?);
        }
        if self.backward
            && let Some(op) = self.grad_input()
        {
            add(graph, op, &[dy, second], "dx", Region::Backward)?;
        }
        // Only where int8 may change it.
        if self.low.grad_weight != self.high.grad_weight
            && let Some((op, flipped)) = self.grad_weight()
        {
            let operands = if flipped { [dy, x] } else { [x, dy] };
            add(graph, op, &operands, "dw", Region::Backward)?;
        }
        if self.backward && self.low.grad_input != self.high.grad_input {
            let y = match (&self.op, y) {
                (Op::Recurrence(_), None) => input(graph, "kept", &self.result)?,
                (_, y) => y.unwrap_or(dy),
            };
            let dh = match &self.op {
                Op::Recurrence(_) => input(graph, "dh", &self.states())?,
                _ => dy,
            };
            for (at, (op, operands)) in self.gradients(&operands, [y, dh]).into_iter().enumerate() {
                add(graph, op, &operands, &format!("d{at}"), Region::Backward)?;
            }
        }
        Small::report(graph)
    }

    /// What every step reports.
    fn report(graph: &mut Graph) -> std::result::Result<(), GraphError> {
        let zero = Op::Param(Arc::new(Tensor::scalar(DType::F32, 0.0)));
        let zero = graph.add(zero, &[], "zero", Region::Forward)?;
        for (name, op, region) in [
            ("loss", UnaryOp::Neg, Region::Forward),
            ("grad_norm", UnaryOp::Neg, Region::Update),
            ("finite", UnaryOp::Exp, Region::Update),
        ] {
            let id = graph.add(Op::Unary(op), &[zero], name, region)?;
            graph.add_output(name, id);
        }
        Ok(())
    }

    fn measure(&self, options: &TrainerOptions) -> Result<LayerCost> {
        let mut trainers = Vec::with_capacity(2);
        let mut inputs = None;
        for low in [false, true] {
            let graph = self.graph(low)?;
            inputs.get_or_insert_with(|| synthetic::inputs(&graph, self.batch, 1));
            let plan = build(graph, &BuildOptions { batch_size: self.batch })?;
            trainers.push(Trainer::new(Arc::new(plan), options)?);
        }
        let inputs = inputs.unwrap_or_default();
        for trainer in &mut trainers {
            trainer.timed_step(&inputs)?;
        }
        let mut times = [Vec::new(), Vec::new()];
        let begin = Instant::now();
        while times[0].len() < RUNS.0 || (times[0].len() < RUNS.1 && begin.elapsed() < ENOUGH) {
            for (trainer, times) in trainers.iter_mut().zip(&mut times) {
                let (_, took) = trainer.timed_step(&inputs)?;
                times.push((took.forward + took.backward).as_secs_f64() * 1e3);
            }
        }
        let [high_ms, low_ms] = times.map(|times| crate::timing::Quantiles::of(times).median);
        Ok(LayerCost { high_ms, low_ms })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use qcompile_ir::{Activation, Cell, Dim, Recurrence, Shape, verify};

    #[test]
    fn small_plans_are_whole() {
        let x = TensorType::f32(Shape(vec![Dim::N, Dim::fixed(16)]));
        let result = TensorType::f32(Shape(vec![Dim::N, Dim::fixed(8)]));
        let op = Op::Matmul { transpose_a: false, transpose_b: true };
        let split = Channels { outliers: vec![1, 2], ..Channels::default() };
        let choices = [(DType::F32, Channels::default()), (DType::BF16, Channels::default())];
        for (base, channels) in choices.into_iter().chain([(DType::F32, split)]) {
            // The sensitive channels have a product of their own.
            let products = if channels.is_empty() { 2 } else { 3 };
            let small = Small {
                op: op.clone(),
                x: x.clone(),
                weight: Some(vec![8, 16]),
                others: Vec::new(),
                result: result.clone(),
                forward: true,
                backward: true,
                low: Precision { grad_weight: base, ..Precision::uniform(DType::I8) },
                high: Precision::uniform(base),
                quantizer: Quantizer::default(),
                channels,
                batch: 4,
            };
            for low in [false, true] {
                let graph = small.graph(low).unwrap();
                verify(&graph).unwrap();
                let count =
                    |op: fn(&Op) -> bool| graph.ids().filter(|&id| op(graph.op(id))).count();
                assert_eq!(count(|op| matches!(op, Op::Quantize { .. })) > 2, low);
                let plan = build(graph, &BuildOptions { batch_size: 4 }).unwrap();
                let text = plan.to_string();
                let word = match (low, base) {
                    (true, _) => "matmul_i8",
                    (_, DType::BF16) => "matmul_bf16",
                    _ => "matmul",
                };
                assert_eq!(text.matches(&format!("= {word} [")).count(), 2, "{text}");
                let all = text.matches("= matmul").count();
                assert_eq!(all, if low { products } else { 2 }, "{text}");
            }
            let cost = small.measure(&TrainerOptions::default()).unwrap();
            assert!(cost.high_ms > 0.0 && cost.low_ms > 0.0);
        }
    }

    #[test]
    fn recurrent_layers_have_their_states_and_lengths() {
        let ty = |dims: &[Dim]| TensorType::f32(Shape(dims.to_vec()));
        let fixed = Dim::fixed;
        let state = ty(&[Dim::N, fixed(8)]);
        let recurrence = Recurrence {
            cell: Cell::Lstm,
            activations: [Activation::SIGMOID, Activation::TANH, Activation::TANH],
            reverse: false,
            clip: None,
            peepholes: false,
            input_forget: false,
            lengths: true,
            products: None,
        };
        let small = Small {
            op: Op::Recurrence(recurrence),
            x: ty(&[fixed(3), Dim::N, fixed(32)]),
            weight: Some(vec![32, 8]),
            others: vec![state.clone(), state, TensorType::new(DType::I64, Shape(vec![Dim::N]))],
            result: ty(&[fixed(6), fixed(4), Dim::N, fixed(8)]),
            forward: true,
            backward: true,
            low: Precision {
                forward: DType::I8,
                grad_input: DType::I8,
                ..Precision::uniform(DType::BF16)
            },
            high: Precision::uniform(DType::BF16),
            quantizer: Quantizer::default(),
            channels: Channels::default(),
            batch: 4,
        };
        for (low, word) in [(false, "bf16"), (true, "i8")] {
            let graph = small.graph(low).unwrap();
            verify(&graph).unwrap();
            let text = build(graph, &BuildOptions { batch_size: 4 }).unwrap().to_string();
            for op in ["recurrence", "recurrence_grad"] {
                assert_eq!(text.matches(&format!("= {op}_{word} ")).count(), 1, "{text}");
            }
        }
        let cost = small.measure(&TrainerOptions::default()).unwrap();
        assert!(cost.high_ms > 0.0 && cost.low_ms > 0.0);
    }

    #[test]
    fn products_of_two_activations_have_both_gradients() {
        let ty = |dims: &[Dim]| TensorType::f32(Shape(dims.to_vec()));
        let fixed = Dim::fixed;
        let attention = Op::Attention { scale: 0.5, causal: true, products: DType::F32 };
        let rows = ty(&[Dim::N, fixed(6), fixed(2), fixed(8)]);
        let left = ty(&[Dim::N, fixed(6), fixed(8)]);
        let right = ty(&[Dim::N, fixed(5), fixed(8)]);
        let matmul = Op::Matmul { transpose_a: false, transpose_b: true };
        let scores = ty(&[Dim::N, fixed(6), fixed(5)]);
        for (op, x, others, result, wanted) in [
            (attention, rows.clone(), vec![rows.clone(), rows.clone()], rows, ("products i8", 2)),
            (matmul, left, vec![right], scores, ("= matmul_i8 [", 3)),
        ] {
            for base in [DType::F32, DType::BF16] {
                let small = Small {
                    op: op.clone(),
                    x: x.clone(),
                    weight: None,
                    others: others.clone(),
                    result: result.clone(),
                    forward: true,
                    backward: true,
                    low: Precision::uniform(DType::I8),
                    high: Precision::uniform(base),
                    quantizer: Quantizer::default(),
                    channels: Channels::default(),
                    batch: 4,
                };
                let text = |low| {
                    let graph = small.graph(low).unwrap();
                    verify(&graph).unwrap();
                    build(graph, &BuildOptions { batch_size: 4 }).unwrap().to_string()
                };
                let (word, count) = wanted;
                assert_eq!(text(true).matches(word).count(), count, "{}", text(true));
                assert_eq!(text(false).matches(word).count(), 0, "{}", text(false));
                let cost = small.measure(&TrainerOptions::default()).unwrap();
                assert!(cost.high_ms > 0.0 && cost.low_ms > 0.0);
            }
        }
    }
}
