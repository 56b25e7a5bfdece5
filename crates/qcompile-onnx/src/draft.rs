//! The graph while it grows: values in creation order, typed at once, folded where known. Names are given at the
//! end, when it is clear which value carries which ONNX name.

use crate::ImportError;
use crate::error::{Obstacle, Problem};
use crate::fold::fold;
use crate::known::{Element, Known};
use crate::tensor;
use qcompile_ir::{
    BinaryOp, DType, Dim, Graph, GraphError, NodeId, Op, Region, Shape, Tensor, TensorType, infer,
};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;

/// A value of the draft.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ValueId(usize);

enum Content {
    Op(Op, Vec<ValueId>),
    Known(Known),
}

struct Value {
    content: Content,
    ty: TensorType,
    region: Region,
    /// The ONNX name, if the value has one.
    name: Option<Rc<str>>,
    /// The ONNX value that it helps to compute.
    base: Rc<str>,
    origin: Option<Rc<str>>,
}

/// Elements that all folded values together may have.
const FOLD_BUDGET: usize = 1 << 24;

/// A graph under construction.
pub(crate) struct Draft {
    values: Vec<Value>,
    base: Rc<str>,
    origin: Option<Rc<str>>,
    folded: usize,
    /// The number of the step, if anything random depends on it.
    step: Option<ValueId>,
    /// Integers that are floats cast without loss, and those floats.
    exact_floats: BTreeMap<ValueId, ValueId>,
    /// Integers that only stand for a weight that is trained, and its name.
    pub(crate) trained_codes: BTreeMap<ValueId, Rc<str>>,
    /// What is computed from a leaf wherever that is used: the meaning of such integers, a scale that is trained held
    /// above 0.
    pub(crate) derived: BTreeMap<ValueId, ValueId>,
    /// Whether scales of quantization are trained as other weights are.
    pub(crate) learns_scales: bool,
    next: BTreeMap<ValueId, ValueId>,
    /// The leaves that became states.
    states: BTreeSet<ValueId>,
    /// Text about what was changed or assumed.
    pub(crate) warnings: Vec<String>,
    /// ONNX element types that are carried in others.
    carried: BTreeSet<i32>,
}

impl Draft {
    pub(crate) fn new() -> Draft {
        Draft {
            values: Vec::new(),
            base: "".into(),
            origin: None,
            folded: 0,
            step: None,
            exact_floats: BTreeMap::new(),
            trained_codes: BTreeMap::new(),
            derived: BTreeMap::new(),
            learns_scales: false,
            next: BTreeMap::new(),
            states: BTreeSet::new(),
            warnings: Vec::new(),
            carried: BTreeSet::new(),
        }
    }

    /// Says which ONNX value and node the next values are for.
    pub(crate) fn begin(&mut self, base: &str, origin: &str) {
        self.base = base.into();
        self.origin = Some(origin.into());
    }

    /// Notes that a value has an ONNX element type, in case that the graph has another for it.
    pub(crate) fn note_type(&mut self, number: i32) {
        if tensor::is_carried(number) {
            self.carried.insert(number);
        }
    }

    /// What was changed or assumed, each once.
    pub(crate) fn take_warnings(&mut self) -> Vec<String> {
        let mut seen = BTreeSet::new();
        let carried = std::mem::take(&mut self.carried).into_iter().filter_map(|number| {
            let dtype = tensor::onnx_name(tensor::dtype(number).ok()?);
            Some(format!("{} is computed in {dtype}", tensor::dtype_name(number)))
        });
        let mut warnings = std::mem::take(&mut self.warnings);
        warnings.extend(carried);
        warnings.retain(|warning| seen.insert(warning.clone()));
        warnings
    }

    /// Number of values so far.
    pub(crate) fn len(&self) -> usize {
        self.values.len()
    }

    /// Gives a value its ONNX name, unless it has one.
    pub(crate) fn set_name(&mut self, id: ValueId, name: &str) {
        self.values[id.0].name.get_or_insert_with(|| name.into());
    }

    /// Puts the origin on the products among the values from `first` on, or on `result` if there are none.
    pub(crate) fn set_origin(&mut self, first: usize, result: ValueId) {
        let origin = self.origin.take();
        let mut found = false;
        for value in &mut self.values[first..] {
            if let Content::Op(Op::Matmul { .. } | Op::Conv2d(_) | Op::Conv2dGradInput(_), _) =
                value.content
            {
                value.origin.clone_from(&origin);
                found = true;
            }
        }
        if !found && result.0 >= first {
            self.values[result.0].origin = origin;
        }
    }

    pub(crate) fn ty(&self, id: ValueId) -> &TensorType {
        &self.values[id.0].ty
    }

    pub(crate) fn dtype(&self, id: ValueId) -> DType {
        self.ty(id).dtype
    }

    /// The dimensions.
    pub(crate) fn dims(&self, id: ValueId) -> &[Dim] {
        &self.ty(id).shape.0
    }

    pub(crate) fn rank(&self, id: ValueId) -> usize {
        self.ty(id).shape.rank()
    }

    /// The value, if it is known at compile time and no parameter.
    pub(crate) fn known(&self, id: ValueId) -> Option<&Known> {
        match &self.values[id.0].content {
            Content::Known(known) => Some(known),
            Content::Op(..) => None,
        }
    }

    /// The value where ONNX wants a constant: weights count as what they are now.
    pub(crate) fn constant(&self, id: ValueId) -> Option<Known> {
        match &self.values[id.0].content {
            Content::Known(known) => Some(known.clone()),
            Content::Op(Op::Param(tensor) | Op::Const(tensor), _) => Known::from_tensor(tensor),
            Content::Op(..) => None,
        }
    }

    /// The tensor of a leaf or known value.
    pub(crate) fn tensor(&self, id: ValueId) -> Option<Arc<Tensor>> {
        match &self.values[id.0].content {
            Content::Known(known) => known.to_tensor().map(Arc::new),
            Content::Op(Op::Param(tensor) | Op::Const(tensor) | Op::State(tensor), _) => {
                Some(tensor.clone())
            }
            Content::Op(..) => None,
        }
    }

    /// The tensor of a value that no step changes.
    pub(crate) fn fixed_tensor(&self, id: ValueId) -> Option<Arc<Tensor>> {
        match &self.values[id.0].content {
            Content::Op(Op::Param(_) | Op::State(_), _) => None,
            _ => self.tensor(id),
        }
    }

    /// Names of the inputs that a value depends on, in the order of the model.
    pub(crate) fn inputs_of(&self, id: ValueId) -> Vec<String> {
        let (mut seen, mut stack) = (BTreeSet::new(), vec![id]);
        while let Some(id) = stack.pop() {
            if let Content::Op(_, operands) = &self.values[id.0].content
                && seen.insert(id)
            {
                stack.extend(operands);
            }
        }
        let input = |id: &ValueId| match &self.values[id.0] {
            Value { content: Content::Op(Op::Input(_), _), name: Some(name), .. } => {
                Some(name.to_string())
            }
            _ => None,
        };
        seen.iter().filter_map(input).collect()
    }

    /// The ONNX name of a value.
    pub(crate) fn name(&self, id: ValueId) -> Option<Rc<str>> {
        self.values[id.0].name.clone()
    }

    fn push(&mut self, content: Content, ty: TensorType, region: Region) -> ValueId {
        let base = self.base.clone();
        self.values.push(Value { content, ty, region, name: None, base, origin: None });
        ValueId(self.values.len() - 1)
    }

    /// A value known at compile time.
    pub(crate) fn add_known(&mut self, known: Known) -> ValueId {
        let ty = known.ty();
        self.push(Content::Known(known), ty, Region::Forward)
    }

    /// `op` over `operands`, in the forward region.
    pub(crate) fn emit(&mut self, op: Op, operands: &[ValueId]) -> Result<ValueId, Obstacle> {
        self.emit_in(Region::Forward, op, operands)
    }

    /// `op` over `operands`, in a region.
    pub(crate) fn emit_in(
        &mut self,
        region: Region,
        op: Op,
        operands: &[ValueId],
    ) -> Result<ValueId, Obstacle> {
        let operands: Vec<ValueId> = operands
            .iter()
            .map(|&id| if self.values[id.0].region > region { self.in_forward(id) } else { Ok(id) })
            .collect::<Result<_, _>>()?;
        let types: Vec<&TensorType> = operands.iter().map(|&id| self.ty(id)).collect();
        let ty = infer(&op, &types).map_err(|error| {
            let text = error.to_string();
            // Only a model whose batch is fixed could do this.
            if text.contains("batch size") {
                Obstacle::Batch(text)
            } else {
                Obstacle::Invalid(text)
            }
        })?;
        if !operands.is_empty() && self.folded < FOLD_BUDGET {
            let known: Option<Vec<&Known>> = operands.iter().map(|&id| self.known(id)).collect();
            if let Some(value) = known.and_then(|known| fold(&op, &known, &ty)) {
                self.folded += value.elements.len();
                return Ok(self.add_known(value));
            }
        }
        Ok(self.push(Content::Op(op, operands), ty, region))
    }

    /// A value of the region of updates, computed in the forward region; any other value as it is.
    pub(crate) fn in_forward(&mut self, id: ValueId) -> Result<ValueId, Obstacle> {
        let value = &self.values[id.0];
        match &value.content {
            Content::Op(op, operands) if value.region != Region::Forward => {
                let (op, operands) = (op.clone(), operands.clone());
                self.emit(op, &operands)
            }
            _ => Ok(id),
        }
    }

    /// The state that starts as the value of `id` and carries its name.
    pub(crate) fn state(&mut self, id: ValueId, name: &str) -> Result<ValueId, Obstacle> {
        let tensor = self
            .tensor(id)
            .ok_or_else(|| Obstacle::unsupported("running statistics that are computed"))?;
        if !self.states.insert(id) {
            return Err(Obstacle::unsupported("running statistics that two nodes share"));
        }
        let name = self.name(id).unwrap_or_else(|| name.into());
        let state = self.emit(Op::State(tensor), &[])?;
        self.set_name(state, &name);
        Ok(state)
    }

    /// The number of the step, i64: a state that counts.
    pub(crate) fn step(&mut self) -> Result<ValueId, Obstacle> {
        if let Some(step) = self.step {
            return Ok(step);
        }
        let zero = Tensor::scalar(DType::I64, 0.0);
        let step = self.emit(Op::State(Arc::new(zero)), &[])?;
        self.set_name(step, "step");
        let one = self.integer(1_i64);
        let next = self.emit_in(Region::Update, Op::Binary(BinaryOp::Add), &[step, one])?;
        self.set_next(step, next);
        self.step = Some(step);
        Ok(step)
    }

    /// The value of a weight as a constant; any other value as it is.
    pub(crate) fn frozen(&mut self, id: ValueId) -> Result<ValueId, Obstacle> {
        let Content::Op(Op::Param(tensor), _) = &self.values[id.0].content else {
            return Ok(id);
        };
        let (tensor, name) = (tensor.clone(), self.name(id));
        let constant = self.emit(Op::Const(tensor), &[])?;
        if let Some(name) = name {
            self.set_name(constant, &name);
        }
        Ok(constant)
    }

    /// Says that an integer value is this float value, cast without loss: through that, gradients pass.
    pub(crate) fn set_exact_float(&mut self, integer: ValueId, float: ValueId) {
        self.exact_floats.insert(integer, float);
    }

    /// The float value that an integer value is without loss, if one is known.
    pub(crate) fn exact_float(&self, integer: ValueId) -> Option<ValueId> {
        self.exact_floats.get(&integer).copied()
    }

    /// Says what a state holds after the step.
    pub(crate) fn set_next(&mut self, state: ValueId, value: ValueId) {
        self.next.insert(state, value);
    }

    /// The finished graph: what outputs and running statistics need, and every input.
    ///
    /// # Errors
    /// None for a draft whose values were all typed; the graph's own checks are passed on.
    pub(crate) fn assemble(
        self,
        name: &str,
        inputs: &[ValueId],
        outputs: &[(String, ValueId)],
    ) -> Result<Graph, ImportError> {
        let mut assembly = Assembly {
            graph: Graph::new(name),
            nodes: vec![None; self.values.len()],
            names: self.names(inputs, outputs),
        };
        assembly.run(&self, inputs, outputs).map_err(|error| {
            ImportError::InvalidModel(vec![Problem { place: None, reason: error.to_string() }])
        })?;
        Ok(assembly.graph)
    }

    /// Whether each value is needed.
    fn live(&self, inputs: &[ValueId], outputs: &[(String, ValueId)]) -> Vec<bool> {
        let mut live = vec![false; self.values.len()];
        let mut stack: Vec<ValueId> = outputs.iter().map(|(_, id)| *id).collect();
        stack.extend(inputs);
        stack.extend(self.next.iter().flat_map(|(state, value)| [state, value]));
        while let Some(id) = stack.pop() {
            if !std::mem::replace(&mut live[id.0], true)
                && let Content::Op(_, operands) = &self.values[id.0].content
            {
                stack.extend(operands);
            }
        }
        live
    }

    /// A name for each live value: inputs and weights first, then ONNX values, then what helps to compute them.
    fn names(&self, inputs: &[ValueId], outputs: &[(String, ValueId)]) -> Vec<Option<String>> {
        let live = self.live(inputs, outputs);
        let mut names: Vec<Option<String>> = vec![None; self.values.len()];
        let mut taken = BTreeSet::new();
        let mut suffixes: BTreeMap<String, usize> = BTreeMap::new();
        let mut claim = |wanted: &str| {
            let mut name = wanted.to_owned();
            while !taken.insert(name.clone()) {
                let suffix = suffixes.entry(wanted.to_owned()).or_default();
                *suffix += 1;
                name = format!("{wanted}.{suffix}");
            }
            Some(name)
        };
        let rank = |value: &Value| match &value.content {
            Content::Op(Op::Input(_) | Op::Param(_) | Op::State(_), _) => 0,
            _ if value.name.is_some() => 1,
            _ => 2,
        };
        for pass in 0..3 {
            for (at, value) in self.values.iter().enumerate() {
                if live[at] && rank(value) == pass {
                    names[at] = match &value.name {
                        Some(name) => claim(name),
                        None => claim(&format!("{}.{}", value.base, value.content.mnemonic())),
                    };
                }
            }
        }
        names
    }
}

impl Content {
    fn mnemonic(&self) -> &'static str {
        match self {
            Content::Op(op, _) => op.name(),
            Content::Known(_) => "const",
        }
    }
}

/// The graph while the draft is copied into it.
struct Assembly {
    graph: Graph,
    nodes: Vec<Option<NodeId>>,
    names: Vec<Option<String>>,
}

impl Assembly {
    fn run(
        &mut self,
        draft: &Draft,
        inputs: &[ValueId],
        outputs: &[(String, ValueId)],
    ) -> Result<(), GraphError> {
        for id in inputs {
            self.place(draft, id.0)?;
        }
        for at in 0..draft.values.len() {
            self.place(draft, at)?;
        }
        for (name, id) in outputs {
            self.graph.add_output(name, self.node(*id));
        }
        for (state, value) in &draft.next {
            self.graph.set_next(self.node(*state), self.node(*value))?;
        }
        Ok(())
    }

    fn node(&self, id: ValueId) -> NodeId {
        self.nodes[id.0].expect("operands come before their users, and users are live")
    }

    /// Adds a live value whose operands are there.
    fn place(&mut self, draft: &Draft, at: usize) -> Result<(), GraphError> {
        let Some(name) = self.names[at].take() else {
            return Ok(());
        };
        let value = &draft.values[at];
        let node = match &value.content {
            Content::Op(op, operands) => {
                let operands: Vec<NodeId> = operands.iter().map(|&id| self.node(id)).collect();
                self.graph.add(op.clone(), &operands, name, value.region)?
            }
            Content::Known(known) => self.place_known(known, &name)?,
        };
        if let Some(origin) = &value.origin {
            self.graph.note_mut(node).origin = Some(origin.to_string());
        }
        self.nodes[at] = Some(node);
        Ok(())
    }

    fn add(&mut self, op: Op, operands: &[NodeId], name: &str) -> Result<NodeId, GraphError> {
        self.graph.add(op, operands, name, Region::Forward)
    }

    fn place_known(&mut self, known: &Known, name: &str) -> Result<NodeId, GraphError> {
        let shape = Shape::fixed(&known.shape);
        let scalar = |element| Known::new(known.dtype, Vec::new(), vec![element]);
        if known.is_uniform() && known.len() != Some(1) {
            let part = self.place_element(&scalar(known.get(0)), &format!("{name}.scalar"))?;
            return self.add(Op::Broadcast(shape), &[part], name);
        }
        if let Some(tensor) = known.to_tensor() {
            return self.add(Op::Const(Arc::new(tensor)), &[], name);
        }
        if known.shape.is_empty() {
            return self.place_element(known, name);
        }
        let mut parts = Vec::with_capacity(known.elements.len());
        for element in known.elements.iter() {
            let part = self.place_element(&scalar(*element), &format!("{name}.element"))?;
            parts.push(self.add(
                Op::Reshape(Shape::fixed(&[1])),
                &[part],
                &format!("{name}.part"),
            )?);
        }
        let row = self.add(Op::Concat { axis: 0 }, &parts, &format!("{name}.concat"))?;
        self.add(Op::Reshape(shape), &[row], name)
    }

    /// A scalar, which may be a multiple of N.
    fn place_element(&mut self, known: &Known, name: &str) -> Result<NodeId, GraphError> {
        if let Some(tensor) = known.to_tensor() {
            return self.add(Op::Const(Arc::new(tensor)), &[], name);
        }
        let scale = match known.get(0) {
            Element::Batch(scale) => scale,
            _ => 0,
        };
        let size = Op::Size(Dim {
            scale: usize::try_from(scale.unsigned_abs()).unwrap_or(0),
            batch: true,
        });
        let mut node = self.add(size, &[], &format!("{name}.size"))?;
        if scale < 0 {
            node =
                self.add(Op::Unary(qcompile_ir::UnaryOp::Neg), &[node], &format!("{name}.neg"))?;
        }
        if known.dtype != DType::F32 {
            node = self.add(Op::Cast(known.dtype), &[node], name)?;
        }
        Ok(node)
    }
}
