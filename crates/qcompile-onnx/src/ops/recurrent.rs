//! Recurrent layers: one product for the inputs of all steps, one recurrence for each direction.

use super::Results;
use super::shape::as_matrix;
use crate::draft::{Draft, ValueId};
use crate::error::Obstacle;
use crate::known::{Element, FOLD_LIMIT, Known};
use crate::node::OnnxNode;
use qcompile_ir::{Activation, ActivationOp, Cell, CompareOp, DType, Dim, Op, Recurrence};

type Value = Result<ValueId, Obstacle>;

pub(super) fn lstm(draft: &mut Draft, node: &OnnxNode) -> Results {
    recurrent(draft, node, Cell::Lstm)
}

pub(super) fn gru(draft: &mut Draft, node: &OnnxNode) -> Results {
    let linear = node.attributes.flag("linear_before_reset", false)?;
    recurrent(draft, node, if linear { Cell::LinearGru } else { Cell::Gru })
}

pub(super) fn rnn(draft: &mut Draft, node: &OnnxNode) -> Results {
    recurrent(draft, node, Cell::Rnn)
}

/// A parameter for which ONNX has no default.
const REQUIRED: Option<f32> = Some(f32::NAN);

/// The function of ONNX's name, with the defaults of its alpha and beta, if it has these.
fn function(name: &str) -> Option<(ActivationOp, Option<f32>, Option<f32>)> {
    // Names are compared as other tools do, whatever their case.
    Some(match name.to_ascii_lowercase().as_str() {
        "sigmoid" => (ActivationOp::Sigmoid, None, None),
        "tanh" => (ActivationOp::Tanh, None, None),
        "relu" => (ActivationOp::Relu, None, None),
        "affine" => (ActivationOp::Affine, REQUIRED, REQUIRED),
        "leakyrelu" => (ActivationOp::LeakyRelu, Some(0.01), None),
        "thresholdedrelu" => (ActivationOp::ThresholdedRelu, Some(1.0), None),
        "scaledtanh" => (ActivationOp::ScaledTanh, REQUIRED, REQUIRED),
        "hardsigmoid" => (ActivationOp::HardSigmoid, Some(0.2), Some(0.5)),
        "elu" => (ActivationOp::Elu, Some(1.0), None),
        "softsign" => (ActivationOp::Softsign, None, None),
        "softplus" => (ActivationOp::Softplus, None, None),
        _ => return None,
    })
}

/// The activations of all directions, one after another.
fn activations(
    node: &OnnxNode,
    cell: Cell,
    directions: usize,
) -> Result<Vec<Activation>, Obstacle> {
    let count = cell.activations() * directions;
    let names = match node.attributes.strings("activations")? {
        Some(names) => names,
        None => {
            let defaults: &[&str] = match cell {
                Cell::Lstm => &["Sigmoid", "Tanh", "Tanh"],
                Cell::Gru | Cell::LinearGru => &["Sigmoid", "Tanh"],
                Cell::Rnn => &["Tanh"],
            };
            defaults.repeat(directions).into_iter().map(str::to_owned).collect()
        }
    };
    if names.len() != count {
        return Err(Obstacle::invalid(format!("{} activations, not {count}", names.len())));
    }
    // Each function that has a parameter takes the next one given.
    let mut alphas = node.attributes.floats("activation_alpha")?.unwrap_or_default().iter();
    let mut betas = node.attributes.floats("activation_beta")?.unwrap_or_default().iter();
    let activations = names.iter().map(|name| {
        let (function, alpha, beta) = function(name).ok_or_else(|| {
            Obstacle::unsupported(format!("activation {name} (attribute activations)"))
        })?;
        let given = |default: Option<f32>, from: &mut std::slice::Iter<'_, f32>| {
            default.map_or(0.0, |default| from.next().copied().unwrap_or(default))
        };
        let (alpha, beta) = (given(alpha, &mut alphas), given(beta, &mut betas));
        if alpha.is_nan() || beta.is_nan() {
            return Err(Obstacle::invalid(format!(
                "activation {name} needs attributes activation_alpha and activation_beta"
            )));
        }
        let activation = Activation { function, alpha, beta };
        match activation.problem() {
            None => Ok(activation),
            Some(problem) => Err(Obstacle::unsupported(format!(
                "{problem} ({name}, attributes activation_alpha and activation_beta)"
            ))),
        }
    });
    activations.collect()
}

/// What all directions of a layer share.
struct Layer {
    cell: Cell,
    steps: usize,
    batch: Dim,
    hidden: usize,
    /// `[steps · batch, inputs]`
    rows: ValueId,
    lengths: Option<ValueId>,
    /// Whether the batch is the first axis.
    batch_first: bool,
}

fn recurrent(draft: &mut Draft, node: &OnnxNode, cell: Cell) -> Results {
    let reverse: &[bool] = match node.attributes.string("direction", "forward")?.as_str() {
        "forward" => &[false],
        "reverse" => &[true],
        "bidirectional" => &[false, true],
        other => return Err(Obstacle::invalid(format!("direction {other}"))),
    };
    let activations = activations(node, cell, reverse.len())?;
    let clip = node.attributes.optional_float("clip")?;
    if clip.is_some_and(|clip| clip <= 0.0) {
        return Err(Obstacle::unsupported("attribute clip that is not positive"));
    }
    let hidden_size = node.attributes.optional_int("hidden_size")?;
    let input_forget = cell == Cell::Lstm && node.attributes.flag("input_forget", false)?;
    let batch_first = node.opset >= 14 && node.attributes.flag("layout", false)?;
    let layer = layer(draft, node, cell, batch_first)?;
    if hidden_size.is_some_and(|size| usize::try_from(size) != Ok(layer.hidden)) {
        return Err(Obstacle::invalid("hidden_size is not that of the weights"));
    }
    let dtype = draft.dtype(node.input(0)?);
    let mut sequences = Vec::new();
    let mut last: [Vec<ValueId>; 2] = Default::default();
    for (direction, &reverse) in reverse.iter().enumerate() {
        let mut of_cell = [Activation::TANH; 3];
        let count = cell.activations();
        of_cell[..count].copy_from_slice(&activations[direction * count..][..count]);
        let recurrence = Recurrence {
            cell,
            activations: of_cell,
            reverse,
            clip: clip.map(|clip| clip as f32),
            peepholes: cell == Cell::Lstm && node.optional(7).is_some(),
            input_forget,
            lengths: layer.lengths.is_some(),
            products: None,
        };
        let y = layer.direction(draft, node, &recurrence, direction)?;
        sequences.push(layer.sequence(draft, y, reverse)?);
        for (state, last) in last.iter_mut().enumerate().take(cell.states()) {
            let row = if reverse { 0 } else { layer.steps };
            let section = draft.slice(y, 0, state, state + 1)?;
            let value = draft.slice(section, 1, row, row + 1)?;
            last.push(draft.reshape(value, &[Dim::ONE, layer.batch, layer.hidden.into()])?);
        }
    }
    let mut sequence = joined(draft, &sequences, 1)?;
    if batch_first {
        sequence = draft.transpose(sequence, &[2, 0, 1, 3])?;
    }
    let mut results = vec![draft.cast(sequence, dtype)?];
    for last in last.iter().filter(|last| !last.is_empty()) {
        let mut value = joined(draft, last, 0)?;
        if batch_first {
            value = draft.transpose(value, &[1, 0, 2])?;
        }
        results.push(draft.cast(value, dtype)?);
    }
    Ok(results)
}

fn joined(draft: &mut Draft, parts: &[ValueId], axis: usize) -> Value {
    match parts {
        [one] => Ok(*one),
        _ => draft.emit(Op::Concat { axis }, parts),
    }
}

fn layer(
    draft: &mut Draft,
    node: &OnnxNode,
    cell: Cell,
    batch_first: bool,
) -> Result<Layer, Obstacle> {
    let (x, r) = (node.input(0)?, node.input(2)?);
    if draft.rank(x) != 3 || draft.rank(r) != 3 {
        return Err(Obstacle::invalid(format!(
            "the input is {} and the recurrent weight {}",
            draft.ty(x),
            draft.ty(r)
        )));
    }
    if !draft.dtype(x).is_float() {
        return Err(Obstacle::invalid(format!("the input is {}", draft.ty(x))));
    }
    let mut x = draft.cast(x, DType::F32)?;
    if batch_first {
        x = draft.transpose(x, &[1, 0, 2])?;
    }
    let (steps, batch) = (draft.dims(x)[0], draft.dims(x)[1]);
    let steps = steps.as_fixed().ok_or_else(|| {
        Obstacle::batch("a number of steps that is the batch size (is the batch another axis?)")
    })?;
    let hidden = draft.dims(r)[2].as_fixed();
    let hidden = hidden.ok_or_else(|| Obstacle::batch("the weights depend on the batch size"))?;
    let lengths = node.optional(4);
    let lengths = lengths.map(|lengths| draft.cast(lengths, DType::I64)).transpose()?;
    let rows = as_matrix(draft, x, 2)?;
    Ok(Layer { cell, steps, batch, hidden, rows, lengths, batch_first })
}

impl Layer {
    /// What operand `at` has for a direction, in f32 under other dimensions.
    fn part(
        &self,
        draft: &mut Draft,
        node: &OnnxNode,
        at: usize,
        direction: usize,
        dims: &[Dim],
    ) -> Result<Option<ValueId>, Obstacle> {
        let Some(value) = node.optional(at) else { return Ok(None) };
        let value = draft.cast(value, DType::F32)?;
        let part = draft.slice(value, 0, direction, direction + 1)?;
        draft.reshape(part, dims).map(Some)
    }

    /// The state before the first step: given, or zeros.
    fn start(&self, draft: &mut Draft, node: &OnnxNode, at: usize, direction: usize) -> Value {
        let dims = [self.batch, self.hidden.into()];
        let Some(value) = node.optional(at) else {
            let zero = draft.scalar(DType::F32, 0.0);
            return draft.broadcast(zero, &dims);
        };
        let mut value = draft.cast(value, DType::F32)?;
        if self.batch_first {
            value = draft.transpose(value, &[1, 0, 2])?;
        }
        let part = draft.slice(value, 0, direction, direction + 1)?;
        draft.reshape(part, &dims)
    }

    /// The recurrence of one direction.
    fn direction(
        &self,
        draft: &mut Draft,
        node: &OnnxNode,
        recurrence: &Recurrence,
        direction: usize,
    ) -> Value {
        let (gates, hidden) = (self.cell.gates(), self.hidden);
        let columns = gates
            .checked_mul(hidden)
            .and_then(|columns| columns.checked_mul(2).map(|_| columns))
            .ok_or_else(|| Obstacle::invalid("the weights are too large"))?;
        let inputs = draft.dims(self.rows)[1];
        let missing = |at: usize| Obstacle::invalid(format!("input {at} is missing"));
        let w = self.part(draft, node, 1, direction, &[columns.into(), inputs])?;
        let r = self.part(draft, node, 2, direction, &[columns.into(), hidden.into()])?;
        let (w, r) = (w.ok_or_else(|| missing(1))?, r.ok_or_else(|| missing(2))?);
        let product = Op::Matmul { transpose_a: false, transpose_b: true };
        let mut x = draft.emit(product, &[self.rows, w])?;
        let mut inner = None;
        if let Some(bias) = self.part(draft, node, 3, direction, &[(2 * columns).into()])? {
            let first = draft.slice(bias, 0, 0, columns)?;
            let second = draft.slice(bias, 0, columns, 2 * columns)?;
            let bias = if self.cell == Cell::LinearGru {
                // That of n goes into the product that r multiplies.
                inner = Some(draft.slice(second, 0, 2 * hidden, columns)?);
                let gates = draft.slice(first, 0, 0, 2 * hidden)?;
                let recurrent = draft.slice(second, 0, 0, 2 * hidden)?;
                let gates = draft.add(gates, recurrent)?;
                let candidate = draft.slice(first, 0, 2 * hidden, columns)?;
                draft.emit(Op::Concat { axis: 0 }, &[gates, candidate])?
            } else {
                draft.add(first, second)?
            };
            x = draft.add(x, bias)?;
        }
        let x = draft.reshape(x, &[self.steps.into(), self.batch, columns.into()])?;
        let mut operands = vec![x, r, self.start(draft, node, 5, direction)?];
        if self.cell == Cell::Lstm {
            operands.push(self.start(draft, node, 6, direction)?);
        }
        if self.cell == Cell::LinearGru {
            let zero = draft.scalar(DType::F32, 0.0);
            let inner = inner.map_or_else(|| draft.broadcast(zero, &[hidden.into()]), Ok)?;
            operands.push(inner);
        }
        if recurrence.peepholes {
            operands.extend(self.part(draft, node, 7, direction, &[3.into(), hidden.into()])?);
        }
        operands.extend(self.lengths);
        draft.emit(Op::Recurrence(*recurrence), &operands)
    }

    /// h after each step, `[steps, 1, batch, hidden]`: zeros past the length of a row.
    fn sequence(&self, draft: &mut Draft, y: ValueId, reverse: bool) -> Value {
        let first = usize::from(!reverse);
        let h = draft.slice(y, 0, 0, 1)?;
        let h = draft.slice(h, 1, first, first + self.steps)?;
        let h = draft.reshape(h, &[self.steps.into(), Dim::ONE, self.batch, self.hidden.into()])?;
        let Some(lengths) = self.lengths else { return Ok(h) };
        let steps = i64::try_from(self.steps).ok().filter(|_| self.steps <= FOLD_LIMIT);
        let steps = steps.ok_or_else(|| Obstacle::unsupported("sequence_lens of so many steps"))?;
        let numbers = (0..steps).map(Element::Int).collect();
        let numbers = draft.add_known(Known::new(DType::I64, vec![self.steps, 1, 1, 1], numbers));
        let lengths = draft.reshape(lengths, &[Dim::ONE, Dim::ONE, self.batch, Dim::ONE])?;
        let runs = draft.compare(CompareOp::Less, numbers, lengths)?;
        let zero = draft.scalar(DType::F32, 0.0);
        draft.select(runs, h, zero)
    }
}
