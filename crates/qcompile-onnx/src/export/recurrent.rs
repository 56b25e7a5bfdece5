//! Recurrent layers: LSTM, GRU and RNN of one direction.

use super::patterns::{Gates, RecurrentBias};
use super::view::{LARGEST_CONSTANT, Placed};
use super::writer::{Attribute, int};
use super::{Exporter, Result};
use qcompile_ir::{ActivationOp, Cell, DType, Dim, NodeId, Op, Recurrence, Tensor};
use std::rc::Rc;

/// Largest number of gates for which a product with the identity stands in for that of the inputs.
const LARGEST_IDENTITY: usize = 1 << 12;

/// What a layer gave.
pub(super) struct Layer {
    reverse: bool,
    steps: usize,
    /// h after each step, `[steps, 1, b, h]`.
    sequence: Placed,
    /// States after the last step, `[1, b, h]`: h, and c of an LSTM.
    last: Vec<Placed>,
    /// States before the first step.
    first: Vec<NodeId>,
}

/// A part of the result of a recurrence: sections and rows.
#[derive(Clone)]
pub(super) struct States {
    layer: Rc<Layer>,
    sections: [usize; 2],
    rows: [usize; 2],
}

/// The name of an activation, and whether it has an alpha and a beta.
fn function(op: ActivationOp) -> (&'static str, bool, bool) {
    match op {
        ActivationOp::Sigmoid => ("Sigmoid", false, false),
        ActivationOp::Tanh => ("Tanh", false, false),
        ActivationOp::Relu => ("Relu", false, false),
        ActivationOp::Affine => ("Affine", true, true),
        ActivationOp::LeakyRelu => ("LeakyRelu", true, false),
        ActivationOp::ThresholdedRelu => ("ThresholdedRelu", true, false),
        ActivationOp::ScaledTanh => ("ScaledTanh", true, true),
        ActivationOp::HardSigmoid => ("HardSigmoid", true, true),
        ActivationOp::Elu => ("Elu", true, false),
        ActivationOp::Softsign => ("Softsign", false, false),
        ActivationOp::Softplus => ("Softplus", false, false),
    }
}

fn attributes(recurrence: &Recurrence, hidden: usize) -> Vec<(&'static str, Attribute)> {
    let activations = &recurrence.activations[..recurrence.cell.activations()];
    let (mut alphas, mut betas) = (Vec::new(), Vec::new());
    let names = activations.iter().map(|activation| {
        let (name, alpha, beta) = function(activation.function);
        alphas.extend(alpha.then_some(activation.alpha));
        betas.extend(beta.then_some(activation.beta));
        name
    });
    let names = names.collect();
    let mut attributes = vec![("activations", Attribute::Texts(names))];
    if !alphas.is_empty() {
        attributes.push(("activation_alpha", Attribute::Floats(alphas)));
    }
    if !betas.is_empty() {
        attributes.push(("activation_beta", Attribute::Floats(betas)));
    }
    if let Some(clip) = recurrence.clip {
        attributes.push(("clip", Attribute::Float(clip)));
    }
    if recurrence.reverse {
        attributes.push(("direction", Attribute::Text("reverse")));
    }
    attributes.push(("hidden_size", Attribute::Int(int(hidden))));
    if recurrence.input_forget {
        attributes.push(("input_forget", Attribute::Int(1)));
    }
    if recurrence.cell == Cell::LinearGru {
        attributes.push(("linear_before_reset", Attribute::Int(1)));
    }
    attributes
}

impl Exporter<'_> {
    /// A recurrence whose `x` is computed, not the product that its layer begins with: a product with the identity is.
    pub(super) fn recurrence(&mut self, id: NodeId) -> Result<()> {
        let x = self.graph.operand(id, 0);
        let gates = self.dims(x)[2].as_fixed().filter(|&gates| gates <= LARGEST_IDENTITY);
        let Some(gates) = gates else {
            return self.unsupported(id, "gates that are not the product of an input and a weight");
        };
        let one = |at: usize| f32::from(u8::from(at / gates == at % gates));
        let values: Vec<f32> = (0..gates * gates).map(one).collect();
        let identity = Tensor::from_f32(&[1, gates, gates], &values);
        let identity = identity.expect("as many elements as the shape says");
        let w = self.writer.constant(&format!("{}.identity", self.name(id)), &identity);
        let x = self.natural(x)?.name;
        self.write_layer(id, x, w, &RecurrentBias::None)
    }

    /// A recurrence over the product of rows and a weight.
    pub(super) fn recurrent_layer(&mut self, id: NodeId, gates: &Gates) -> Result<()> {
        let x = self.graph.operand(id, 0);
        let [steps, batch, columns] = [0, 1, 2].map(|axis| self.dims(x)[axis]);
        let rows = self.natural(gates.rows)?;
        let inputs = self.dims(gates.rows)[1];
        let rows = self.reshaped_tensor(gates.rows, &rows, &[steps, batch, inputs])?;
        let order = if gates.transposed { [0, 1] } else { [1, 0] };
        let w = self.full(gates.weight, &order)?;
        let w = self.reshaped_tensor(gates.weight, &w, &[Dim::ONE, columns, inputs])?;
        self.write_layer(id, rows.name, w.name, &gates.bias)
    }

    fn write_layer(
        &mut self,
        id: NodeId,
        x: String,
        w: String,
        bias: &RecurrentBias,
    ) -> Result<()> {
        let Op::Recurrence(recurrence) = self.graph.op(id) else {
            return self.unsupported(id, "it is no recurrence");
        };
        let operands = self.graph.operands(id);
        let at = recurrence.operands();
        let [_, rows, batch, hidden] = [0, 1, 2, 3].map(|axis| self.dims(id)[axis]);
        let (Some(rows), Some(size)) = (rows.as_fixed(), hidden.as_fixed()) else {
            return self.unsupported(id, "a number of steps that is the batch size");
        };
        let steps = rows.saturating_sub(1);
        if steps == 0 {
            return self.unsupported(id, "a layer of no steps");
        }
        let gates = self.dims(operands[1])[0];
        let r = self.natural(operands[1])?;
        let r = self.reshaped_tensor(operands[1], &r, &[Dim::ONE, gates, hidden])?;
        let inner = at.bias.map(|at| operands[at]);
        let b = self.bias(id, gates, bias, inner)?;
        let lengths = match at.lengths {
            Some(at) => {
                let lengths = self.natural(operands[at])?.name;
                self.as_i32(lengths)
            }
            None => String::new(),
        };
        let mut inputs =
            vec![x, w, r.name, b, lengths, self.first_state(operands[2], batch, hidden)?];
        let mut first = vec![operands[2]];
        if let Some(cell) = at.cell {
            first.push(operands[cell]);
            inputs.push(self.first_state(operands[cell], batch, hidden)?);
        }
        if let Some(at) = at.peepholes {
            let tensor = self.natural(operands[at])?;
            let all = Dim::fixed(size.saturating_mul(3));
            inputs.push(self.reshaped_tensor(operands[at], &tensor, &[Dim::ONE, all])?.name);
        }
        while inputs.last().is_some_and(String::is_empty) {
            inputs.pop();
        }
        let operator = match recurrence.cell {
            Cell::Lstm => "LSTM",
            Cell::Gru | Cell::LinearGru => "GRU",
            Cell::Rnn => "RNN",
        };
        let name = self.name(id);
        let wanted = [format!("{name}.h"), format!("{name}.h.last"), format!("{name}.c.last")];
        let count = 1 + recurrence.cell.states();
        let wanted: Vec<&str> = wanted.iter().take(count).map(String::as_str).collect();
        let results = self.writer.node(operator, inputs, &wanted, attributes(recurrence, size));
        let mut results = results.into_iter();
        let mut sequence = Placed {
            name: results.next().unwrap_or_default(),
            dims: vec![Dim::fixed(steps), Dim::ONE, batch, hidden],
        };
        let last: Vec<Placed> =
            results.map(|name| Placed { name, dims: vec![Dim::ONE, batch, hidden] }).collect();
        if let Some(at) = at.lengths {
            let beyond =
                if recurrence.reverse { self.natural(operands[2])? } else { last[0].clone() };
            let lengths = operands[at];
            sequence.name = self.kept(id, &sequence, &beyond, lengths)?;
        }
        let layer = Layer { reverse: recurrence.reverse, steps, sequence, last, first };
        let sections = [0, recurrence.cell.sections()];
        let states = States { layer: Rc::new(layer), sections, rows: [0, rows] };
        self.recurrences.insert(id, states);
        self.place_states(id)
    }

    /// A first state as ONNX takes it, left out where it is zero.
    fn first_state(&mut self, state: NodeId, batch: Dim, hidden: Dim) -> Result<String> {
        let mut source = state;
        while let Op::Broadcast(_) | Op::Reshape(_) = self.graph.op(source) {
            source = self.graph.operand(source, 0);
        }
        if super::elementwise::uniform(self.graph.op(source)) == Some(0.0) {
            return Ok(String::new());
        }
        let tensor = self.natural(state)?;
        Ok(self.reshaped_tensor(state, &tensor, &[Dim::ONE, batch, hidden])?.name)
    }

    /// Both biases of a layer, one after the other: the sum of them is all that the graph knows, save for what a linear
    /// GRU adds within.
    fn bias(
        &mut self,
        id: NodeId,
        gates: Dim,
        bias: &RecurrentBias,
        inner: Option<NodeId>,
    ) -> Result<String> {
        let count = gates.scale;
        let base = self.name(id);
        let zeros = |exporter: &mut Self, count: usize| {
            exporter.filled(id, DType::F32, &[count], 0.0, &format!("{base}.zeros"))
        };
        let whole = match (bias, inner) {
            (RecurrentBias::None, None) => return Ok(String::new()),
            (RecurrentBias::Both(both), None) => self.vector(*both)?,
            (bias, inner) => {
                let first = match bias {
                    RecurrentBias::None => zeros(self, count)?,
                    RecurrentBias::Both(id) | RecurrentBias::Sum(id) => self.vector(*id)?.name,
                };
                let parts = match inner {
                    None => vec![first, zeros(self, count)?],
                    Some(inner) => {
                        let before = zeros(self, count - count / 3)?;
                        vec![first, before, self.natural(inner)?.name]
                    }
                };
                let axis = vec![("axis", Attribute::Int(0))];
                let name = self.one("Concat", parts, &format!("{base}.bias"), axis);
                Placed { name, dims: vec![Dim::fixed(count.saturating_mul(2))] }
            }
        };
        Ok(self.reshaped_tensor(id, &whole, &[Dim::ONE, Dim::fixed(count.saturating_mul(2))])?.name)
    }

    /// h after each step where ONNX has zeros past the length of a row and the graph the state that it keeps.
    fn kept(
        &mut self,
        id: NodeId,
        sequence: &Placed,
        beyond: &Placed,
        lengths: NodeId,
    ) -> Result<String> {
        let [steps, _, batch, hidden] = [0, 1, 2, 3].map(|at| sequence.dims[at]);
        if steps.scale > LARGEST_CONSTANT {
            return self.unsupported(id, format!("lengths of {steps} steps"));
        }
        let numbers: Vec<i64> = (0..steps.scale).map(int).collect();
        let numbers = Tensor::from_i64(&[steps.scale, 1, 1, 1], &numbers);
        let numbers = numbers.expect("as many elements as the shape says");
        let numbers = self.writer.constant("steps", &numbers);
        let tensor = self.natural(lengths)?;
        let dims = [Dim::ONE, Dim::ONE, batch, Dim::ONE];
        let lengths = self.reshaped_tensor(lengths, &tensor, &dims)?.name;
        let base = self.name(id);
        let runs = self.one("Less", vec![numbers, lengths], &format!("{base}.runs"), vec![]);
        let beyond = self.reshaped_tensor(id, beyond, &[Dim::ONE, Dim::ONE, batch, hidden])?.name;
        let inputs = vec![runs, sequence.name.clone(), beyond];
        Ok(self.one("Where", inputs, &format!("{base}.kept"), vec![]))
    }

    /// A part of a recurrence's result, along its sections or its rows.
    pub(super) fn slice_states(
        &mut self,
        id: NodeId,
        x: NodeId,
        axis: usize,
        [start, end, step]: [usize; 3],
    ) -> Result<()> {
        let mut states = self.recurrences.get(&x).cloned().expect("the caller found it");
        if axis > 1 || step != 1 {
            return self.unsupported(id, "a part of the batch or of the states of a layer");
        }
        let range = if axis == 0 { &mut states.sections } else { &mut states.rows };
        *range = [range[0] + start, range[0] + end];
        self.recurrences.insert(id, states);
        self.place_states(id)
    }

    /// Lets a part of a recurrence's result be seen, if ONNX has it: h after any step, c after the last.
    fn place_states(&mut self, id: NodeId) -> Result<()> {
        let Some(States { layer, sections, rows }) = self.recurrences.get(&id).cloned() else {
            return Ok(());
        };
        let [begin, end] = rows;
        let section = sections[0];
        if sections[1] != section + 1 || section >= layer.first.len() || end <= begin {
            return Ok(());
        }
        // Rows of the first and of the last state.
        let (first, last) = if layer.reverse { (layer.steps, 0) } else { (0, layer.steps) };
        if rows == [last, last + 1] {
            self.place(id, layer.last[section].clone(), &[1, 2, 3]);
            return Ok(());
        }
        if rows == [first, first + 1] {
            return self.alias(id, layer.first[section], &[None, None, Some(0), Some(1)]);
        }
        if section > 0 {
            return Ok(());
        }
        // Rows of the sequence.
        let sequence = &layer.sequence;
        let offset = usize::from(!layer.reverse);
        let mut tensor = sequence.clone();
        let mut range = [begin, end];
        if (begin..end).contains(&first) {
            let mut dims = sequence.dims.clone();
            dims[0] = Dim::ONE;
            let state = self.natural(layer.first[0])?;
            let state = self.reshaped_tensor(layer.first[0], &state, &dims)?.name;
            let mut parts = vec![state, sequence.name.clone()];
            if layer.reverse {
                parts.reverse();
            }
            let wanted = format!("{}.all", self.name(id));
            tensor.name = self.one("Concat", parts, &wanted, vec![("axis", Attribute::Int(0))]);
            tensor.dims[0] = Dim::fixed(layer.steps + 1);
        } else {
            range = [begin - offset, end - offset];
        }
        if range != [0, tensor.dims[0].scale] {
            let [begin, end] = range;
            tensor.name = self.slice_tensor(&tensor.name, 0, [begin, end, 1], self.name(id));
            tensor.dims[0] = Dim::fixed(end - begin);
        }
        self.place(id, tensor, &[1, 0, 2, 3]);
        Ok(())
    }
}
