//! Control flow: `If` keeps the branch that is taken, `Loop` and `Scan` are unrolled. What decides has to be known at
//! compile time.

use crate::body::{Body, BodyNode, Opsets};
use crate::dims::declared_type;
use crate::draft::ValueId;
use crate::error::Obstacle;
use crate::import::{Importer, Scope, take_node};
use crate::known::{Element, Known};
use crate::node::{OnnxNode, axis_of};
use crate::order::order;
use qcompile_ir::{DType, Dim, Op};
use std::rc::Rc;

type Result<T> = std::result::Result<T, Obstacle>;

/// Iterations that a loop may be unrolled to.
const ITERATIONS: usize = 1024;

/// A subgraph that can be imported again and again: its nodes in order, and the scope that its initializers are in.
struct Block {
    nodes: Vec<BodyNode>,
    inputs: Vec<String>,
    outputs: Vec<String>,
    /// The declared types of the outputs.
    types: Vec<Result<Known>>,
}

impl Importer<'_> {
    /// The results of `If`, `Loop` or `Scan`.
    pub(crate) fn control_flow(
        &mut self,
        node: &mut OnnxNode,
        name: &str,
        opsets: &Rc<Opsets>,
    ) -> Result<Vec<ValueId>> {
        match node.op {
            "If" => self.branch(node, name, opsets),
            "Loop" => self.unrolled_loop(node, name, opsets),
            _ => self.scan(node, name, opsets),
        }
    }

    fn branch(
        &mut self,
        node: &mut OnnxNode,
        name: &str,
        opsets: &Rc<Opsets>,
    ) -> Result<Vec<ValueId>> {
        let condition = node
            .constant(&self.draft, 0)?
            .ok_or_else(|| Obstacle::invalid("input 0 is missing"))?;
        let taken = truth(&condition, "the condition")?;
        let branches = [
            node.attributes.take_graph("then_branch")?,
            node.attributes.take_graph("else_branch")?,
        ];
        let [then_branch, else_branch] = branches;
        let graph = if taken { then_branch } else { else_branch };
        let block = self.open(graph, name, opsets)?;
        let results = self.pass(block.nodes, &block.inputs, &block.outputs, &[]);
        self.scopes.pop();
        results
    }

    fn unrolled_loop(
        &mut self,
        node: &mut OnnxNode,
        name: &str,
        opsets: &Rc<Opsets>,
    ) -> Result<Vec<ValueId>> {
        let trips = match node.ints_input(&self.draft, 0)?.as_deref() {
            None => None,
            Some(&[trips]) => Some(usize::try_from(trips).unwrap_or(0)),
            Some(other) => {
                return Err(Obstacle::invalid(format!("a trip count of {} elements", other.len())));
            }
        };
        let mut goes_on = match node.constant(&self.draft, 1)? {
            None => true,
            Some(condition) => truth(&condition, "the condition")?,
        };
        let mut carried: Vec<ValueId> =
            (2..node.inputs.len()).map(|at| node.input(at)).collect::<Result<_>>()?;
        let graph = node.attributes.take_graph("body")?;
        let block = self.open(graph, name, opsets)?;
        let outcome = (|| {
            if block.inputs.len() != carried.len() + 2 || block.outputs.len() < carried.len() + 1 {
                return Err(Obstacle::invalid(format!(
                    "a body of {} inputs and {} outputs for {} carried values",
                    block.inputs.len(),
                    block.outputs.len(),
                    carried.len()
                )));
            }
            let mut scanned = vec![Vec::new(); block.outputs.len() - 1 - carried.len()];
            let mut iteration = 0;
            while goes_on && trips.is_none_or(|trips| iteration < trips) {
                within_limit(iteration, trips)?;
                let number = Element::Int(i64::try_from(iteration).unwrap_or(i64::MAX));
                let number = Known::new(DType::I64, Vec::new(), vec![number]);
                let mut arguments =
                    vec![self.draft.add_known(number), self.draft.scalar(DType::Bool, 1.0)];
                arguments.extend(&carried);
                let results = self.iterate(&block, name, iteration, &arguments)?;
                let condition = self.draft.constant(results[0]).ok_or_else(|| {
                    let reason = format!(
                        "the condition after iteration {iteration} is not known at compile time"
                    );
                    Obstacle::Unknown(reason, self.draft.inputs_of(results[0]))
                })?;
                goes_on = truth(&condition, "the condition of the body")?;
                let count = carried.len();
                carried.copy_from_slice(&results[1..=count]);
                for (values, &result) in scanned.iter_mut().zip(&results[count + 1..]) {
                    values.push(result);
                }
                iteration += 1;
            }
            self.draft.begin(node.base, name);
            let first = 1 + carried.len();
            for (at, values) in scanned.into_iter().enumerate() {
                carried.push(self.stacked(values, 0, block.types.get(first + at))?);
            }
            Ok(carried)
        })();
        self.scopes.pop();
        outcome
    }

    fn scan(
        &mut self,
        node: &mut OnnxNode,
        name: &str,
        opsets: &Rc<Opsets>,
    ) -> Result<Vec<ValueId>> {
        if node.opset < 9 {
            return Err(Obstacle::unsupported("Scan as it was before opset 9, over batches"));
        }
        let operands = node.all_inputs()?;
        let attributes = &node.attributes;
        let count = attributes.optional_int("num_scan_inputs")?;
        let count = count.and_then(|count| usize::try_from(count).ok());
        let states = count
            .filter(|&count| count > 0)
            .and_then(|count| operands.len().checked_sub(count))
            .ok_or_else(|| {
                let found = attributes.optional_int("num_scan_inputs");
                Obstacle::invalid(format!("attribute num_scan_inputs is {found:?}"))
            })?;
        let (mut carried, scanned) = (operands[..states].to_vec(), &operands[states..]);
        let list = |name: &str, wanted: usize| -> Result<Vec<i64>> {
            let values = attributes.ints(name)?.map_or_else(|| vec![0; wanted], <[i64]>::to_vec);
            if values.len() == wanted {
                return Ok(values);
            }
            Err(Obstacle::invalid(format!("attribute {name} has {} elements", values.len())))
        };
        let mut axes = Vec::with_capacity(scanned.len());
        for (axis, &id) in list("scan_input_axes", scanned.len())?.into_iter().zip(scanned) {
            axes.push(axis_of(axis, self.draft.rank(id))?);
        }
        let backwards = directions(&list("scan_input_directions", scanned.len())?)?;
        let mut length = None;
        for (&id, &axis) in scanned.iter().zip(&axes) {
            let dim = self.draft.dims(id)[axis];
            let size = dim
                .as_fixed()
                .ok_or_else(|| Obstacle::batch("scans over the axis that is taken as the batch"))?;
            if *length.get_or_insert(size) != size {
                return Err(Obstacle::invalid(format!("scans over {size} and {length:?} steps")));
            }
        }
        let length = length.unwrap_or(0);
        let graph = node.attributes.take_graph("body")?;
        let outputs = graph.output.len().checked_sub(states);
        let outputs = outputs.filter(|_| graph.input.len() == operands.len()).ok_or_else(|| {
            Obstacle::invalid(format!(
                "a body of {} inputs and {} outputs for {} states and {} scan inputs",
                graph.input.len(),
                graph.output.len(),
                states,
                operands.len() - states
            ))
        })?;
        let attributes = &node.attributes;
        let list = |name: &str| -> Result<Vec<i64>> {
            let values = attributes.ints(name)?.map_or_else(|| vec![0; outputs], <[i64]>::to_vec);
            if values.len() == outputs {
                return Ok(values);
            }
            Err(Obstacle::invalid(format!("attribute {name} has {} elements", values.len())))
        };
        let output_axes = list("scan_output_axes")?;
        let output_backwards = directions(&list("scan_output_directions")?)?;
        let block = self.open(graph, name, opsets)?;
        let outcome = (|| {
            let mut results = vec![Vec::new(); outputs];
            for step in 0..length {
                within_limit(step, Some(length))?;
                let mut arguments = carried.clone();
                self.draft.begin(&format!("{name}/{step}"), name);
                for ((&id, &axis), &backwards) in scanned.iter().zip(&axes).zip(&backwards) {
                    let at = if backwards { length - 1 - step } else { step };
                    let slice = Op::Slice { axis, start: at, end: at + 1, step: 1 };
                    let slice = self.draft.emit(slice, &[id])?;
                    arguments.push(self.draft.squeeze(slice, &[axis])?);
                }
                let values = self.iterate(&block, name, step, &arguments)?;
                carried.copy_from_slice(&values[..states]);
                for (list, &value) in results.iter_mut().zip(&values[states..]) {
                    list.push(value);
                }
            }
            self.draft.begin(node.base, name);
            for (at, mut values) in results.into_iter().enumerate() {
                if output_backwards[at] {
                    values.reverse();
                }
                let ty = block.types.get(states + at);
                carried.push(self.stacked(values, output_axes[at], ty)?);
            }
            Ok(carried)
        })();
        self.scopes.pop();
        outcome
    }

    /// Prepares a subgraph and opens the scope of its initializers, which the caller closes.
    fn open(
        &mut self,
        graph: onnx_protobuf::GraphProto,
        name: &str,
        opsets: &Rc<Opsets>,
    ) -> Result<Block> {
        let body = Body::new(graph, &format!("{name}/"), opsets, &mut self.functions);
        let ordered = body.and_then(|body| {
            let order = order(&body, &|name| self.knows(name))?;
            Ok((body, order))
        });
        let (body, order) = match ordered {
            Ok(ordered) => ordered,
            Err(problems) => {
                self.report(problems);
                return Err(Obstacle::Operand);
            }
        };
        let Body { mut nodes, weights, inputs, outputs, .. } = body;
        self.scopes.push(Scope::new(weights));
        Ok(Block {
            nodes: order.into_iter().map(|index| take_node(&mut nodes[index])).collect(),
            inputs: inputs.into_iter().map(|input| input.name).collect(),
            types: outputs.iter().map(declared_type).collect(),
            outputs: outputs.into_iter().map(|output| output.name).collect(),
        })
    }

    /// One iteration, whose values have names of their own.
    fn iterate(
        &mut self,
        block: &Block,
        name: &str,
        iteration: usize,
        arguments: &[ValueId],
    ) -> Result<Vec<ValueId>> {
        let prefix = format!("{}{name}/{iteration}/", self.prefix);
        let around = std::mem::replace(&mut self.prefix, prefix);
        // The nodes of later iterations are the same, so they are surveyed once.
        let survey = if iteration > 0 { self.survey.take() } else { None };
        let results = self.pass(block.nodes.clone(), &block.inputs, &block.outputs, arguments);
        self.survey = survey.or(self.survey.take());
        self.prefix = around;
        results
    }

    /// Imports nodes in a scope of their own.
    fn pass(
        &mut self,
        nodes: Vec<BodyNode>,
        inputs: &[String],
        outputs: &[String],
        arguments: &[ValueId],
    ) -> Result<Vec<ValueId>> {
        let mut scope = Scope::new(Vec::new());
        scope.values = inputs.iter().cloned().zip(arguments.iter().copied()).collect();
        self.scopes.push(scope);
        for node in nodes {
            self.add_node(node);
        }
        let results: Option<Vec<ValueId>> = outputs.iter().map(|name| self.value(name)).collect();
        self.scopes.pop();
        results.ok_or(Obstacle::Operand)
    }

    /// Values one after another along a new axis.
    fn stacked(
        &mut self,
        values: Vec<ValueId>,
        axis: i64,
        declared: Option<&Result<Known>>,
    ) -> Result<ValueId> {
        let Some(&first) = values.first() else {
            let none =
                || Obstacle::unsupported("results of no iteration whose type is not declared");
            let mut empty = declared.and_then(|ty| ty.as_ref().ok()).ok_or_else(none)?.clone();
            let axis = axis_of(axis, empty.shape.len() + 1)?;
            empty.shape.insert(axis, 0);
            return Ok(self.draft.add_known(empty));
        };
        let axis = axis_of(axis, self.draft.rank(first) + 1)?;
        let mut parts = Vec::with_capacity(values.len());
        for value in values {
            let mut dims = self.draft.dims(value).to_vec();
            dims.insert(axis, Dim::ONE);
            parts.push(self.draft.reshape(value, &dims)?);
        }
        self.draft.emit(Op::Concat { axis }, &parts)
    }
}

/// A condition as true or false.
fn truth(condition: &Known, what: &str) -> Result<bool> {
    match (condition.dtype, condition.len(), condition.get_first()) {
        (DType::Bool, Some(1), Some(Element::Int(value))) => Ok(value != 0),
        _ => Err(Obstacle::invalid(format!("{what} is {}, not one bool", condition.ty()))),
    }
}

fn within_limit(iteration: usize, all: Option<usize>) -> Result<()> {
    if iteration < ITERATIONS {
        return Ok(());
    }
    let all = all.map_or_else(|| "without an end".to_owned(), |all| format!("of {all} iterations"));
    Err(Obstacle::unsupported(format!("a loop {all}: at most {ITERATIONS} are unrolled")))
}

/// Which of the directions are backwards.
fn directions(values: &[i64]) -> Result<Vec<bool>> {
    values
        .iter()
        .map(|&value| match value {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(Obstacle::invalid(format!("a direction of {other}, not 0 or 1"))),
        })
        .collect()
}
