//! Mnemonic and attributes of every op, both ways.

use super::literal;
use crate::{
    Activation, ActivationOp, AttentionOperand, BinaryOp, Cell, CollectiveOp, CompareOp,
    ConvGeometry, DType, Dim, GradientRounding, Op, PoolGeometry, Recurrence, ReduceOp, ScatterOp,
    TensorType, UnaryOp,
};
use std::fmt::Write as _;

/// Rounds at random.
const STOCHASTIC: &str = GradientRounding::Stochastic.name();

/// One attribute as read: a flag or a key with numbers.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Attribute<'a> {
    /// The flag or key.
    pub(super) key: &'a str,
    /// What follows `=`, as words; none for a flag.
    pub(super) value: Option<Vec<&'a str>>,
}

/// The attributes of an op as printed, each with a space before it.
pub(super) fn print(op: &Op) -> String {
    let mut text = String::new();
    let mut push = |part: String| {
        text.push(' ');
        text.push_str(&part);
    };
    match op {
        Op::Size(dim) | Op::Iota(dim) => push(dim.to_string()),
        Op::Random { seed, .. } => push(format!("seed={seed}")),
        Op::Reduce { axes, .. } => push(format!("axes={axes:?}")),
        Op::Matmul { transpose_a, transpose_b } => {
            for (name, set) in [("transpose_a", transpose_a), ("transpose_b", transpose_b)] {
                if *set {
                    push(name.to_owned());
                }
            }
        }
        Op::Conv2d(g) | Op::Conv2dGradInput(g) | Op::Conv2dGradWeight(g) => {
            push(window(g.input, g.kernel, g.strides, g.pads, g.dilations));
            if g.groups != 1 {
                push(format!("groups={}", g.groups));
            }
        }
        Op::MaxPool2d(g)
        | Op::MaxPool2dGrad(g)
        | Op::AveragePool2d(g)
        | Op::AveragePool2dGrad(g) => {
            push(window(g.input, g.kernel, g.strides, g.pads, g.dilations));
            if g.count_include_pad {
                push("count_include_pad".to_owned());
            }
        }
        Op::Transpose(permutation) => push(format!("permutation={permutation:?}")),
        Op::Slice { axis, start, end, step } => {
            push(format!("axis={axis} start={start} end={end} step={step}"));
        }
        Op::Pad { axis, low, high, interior, value } => {
            push(format!("axis={axis}"));
            for (key, number) in [("low", low), ("high", high), ("interior", interior)] {
                if *number != 0 {
                    push(format!("{key}={number}"));
                }
            }
            if value.to_bits() != 0 {
                push(format!("value={}", literal::float(*value)));
            }
        }
        Op::Concat { axis } => push(format!("axis={axis}")),
        Op::Scatter { rows, .. } => push(format!("rows={rows}")),
        Op::TopK { k, largest } => {
            push(format!("k={k}"));
            if !largest {
                push("smallest".to_owned());
            }
        }
        Op::Attention { scale, causal, products }
        | Op::AttentionGrad { scale, causal, products, .. } => {
            if let Op::AttentionGrad { of, .. } = op {
                push(of.name().to_owned());
            }
            if scale.to_bits() != 1.0_f32.to_bits() {
                push(format!("scale={}", literal::float(*scale)));
            }
            if *causal {
                push("causal".to_owned());
            }
            if *products != DType::F32 {
                push(format!("products={products}"));
            }
            if let Op::AttentionGrad { rounding: GradientRounding::Stochastic, .. } = op {
                push(STOCHASTIC.to_owned());
            }
        }
        Op::Recurrence(r) => push(recurrence(r, false)),
        Op::RecurrenceGrad { recurrence: r, cell, rounding } => {
            push(recurrence(r, *cell));
            if *rounding == GradientRounding::Stochastic {
                push(STOCHASTIC.to_owned());
            }
        }
        Op::Quantize { dtype, axis } | Op::StraightThrough { dtype, axis } => {
            push(dtype.to_string());
            if let Some(axis) = axis {
                push(format!("axis={axis}"));
            }
        }
        Op::Dequantize { axis: Some(axis) } => push(format!("axis={axis}")),
        Op::AllReduce(op) => push(op.name().to_owned()),
        Op::Input(_)
        | Op::Param(_)
        | Op::State(_)
        | Op::Const(_)
        | Op::Training
        | Op::Unary(_)
        | Op::Cast(_)
        | Op::Binary(_)
        | Op::Compare(_)
        | Op::Select
        | Op::Reshape(_)
        | Op::Broadcast(_)
        | Op::Gather
        | Op::Softmax
        | Op::LogSoftmax
        | Op::CrossEntropy
        | Op::CrossEntropyGrad
        | Op::Dequantize { axis: None } => {}
    }
    text
}

/// The cell, its activations, and what is set; `cell` for the gradient of c.
fn recurrence(r: &Recurrence, cell: bool) -> String {
    let used = &r.activations[..r.cell.activations()];
    let list = |words: Vec<String>| words.join(", ");
    let names = used.iter().map(|activation| activation.function.name().to_owned()).collect();
    let mut text = format!("{} activations=[{}]", r.cell.name(), list(names));
    for (key, of) in [("alphas", (|a| a.alpha) as fn(&Activation) -> f32), ("betas", |a| a.beta)] {
        if used.iter().any(|activation| of(activation) != 0.0) {
            let numbers = used.iter().map(|activation| literal::float(of(activation))).collect();
            let _ = write!(text, " {key}=[{}]", list(numbers));
        }
    }
    if let Some(clip) = r.clip {
        let _ = write!(text, " clip={}", literal::float(clip));
    }
    if let Some(products) = r.products {
        let _ = write!(text, " products={products}");
    }
    let flags = [
        ("reverse", r.reverse),
        ("input_forget", r.input_forget),
        ("cell", cell),
        ("peepholes", r.peepholes),
        ("lengths", r.lengths),
    ];
    for (flag, _) in flags.iter().filter(|(_, set)| *set) {
        let _ = write!(text, " {flag}");
    }
    text
}

fn window(
    input: [usize; 2],
    kernel: [usize; 2],
    strides: [usize; 2],
    pads: [usize; 4],
    dilations: [usize; 2],
) -> String {
    let mut text = format!("input={input:?} kernel={kernel:?}");
    // Writing to a String cannot fail.
    if strides != [1, 1] {
        let _ = write!(text, " strides={strides:?}");
    }
    if pads != [0, 0, 0, 0] {
        let _ = write!(text, " pads={pads:?}");
    }
    if dilations != [1, 1] {
        let _ = write!(text, " dilations={dilations:?}");
    }
    text
}

/// The op of a mnemonic with its attributes; `ty` is the declared result type.
pub(super) fn op(
    mnemonic: &str,
    attributes: Vec<Attribute<'_>>,
    ty: &TensorType,
) -> Result<Op, String> {
    let mut take = Attributes(attributes);
    let op = match mnemonic {
        "size" => Op::Size(take.parsed("the dimension", dim)?),
        "training" => Op::Training,
        "iota" => Op::Iota(take.parsed("the dimension", dim)?),
        "random" => Op::Random { seed: take.number("seed")? as u64, shape: ty.shape.clone() },
        "cast" => Op::Cast(ty.dtype),
        "select" => Op::Select,
        "matmul" => Op::Matmul {
            transpose_a: take.flag("transpose_a"),
            transpose_b: take.flag("transpose_b"),
        },
        "conv2d" => Op::Conv2d(take.conv()?),
        "conv2d_grad_input" => Op::Conv2dGradInput(take.conv()?),
        "conv2d_grad_weight" => Op::Conv2dGradWeight(take.conv()?),
        "max_pool2d" => Op::MaxPool2d(take.pool()?),
        "max_pool2d_grad" => Op::MaxPool2dGrad(take.pool()?),
        "average_pool2d" => Op::AveragePool2d(take.pool()?),
        "average_pool2d_grad" => Op::AveragePool2dGrad(take.pool()?),
        "reshape" => Op::Reshape(ty.shape.clone()),
        "transpose" => Op::Transpose(take.list("permutation")?),
        "broadcast" => Op::Broadcast(ty.shape.clone()),
        "slice" => Op::Slice {
            axis: take.number("axis")?,
            start: take.number("start")?,
            end: take.number("end")?,
            step: take.number_or("step", 1)?,
        },
        "pad" => Op::Pad {
            axis: take.number("axis")?,
            low: take.number_or("low", 0)?,
            high: take.number_or("high", 0)?,
            interior: take.number_or("interior", 0)?,
            value: take.value("value")?.unwrap_or(0.0),
        },
        "concat" => Op::Concat { axis: take.number("axis")? },
        "gather" => Op::Gather,
        "scatter_add" => Op::Scatter { op: ScatterOp::Add, rows: take.dim("rows")? },
        "scatter_mul" => Op::Scatter { op: ScatterOp::Mul, rows: take.dim("rows")? },
        "scatter_max" => Op::Scatter { op: ScatterOp::Max, rows: take.dim("rows")? },
        "top_k" => Op::TopK { k: take.number("k")?, largest: !take.flag("smallest") },
        "attention" => {
            let (scale, causal, products) = take.attention()?;
            Op::Attention { scale, causal, products }
        }
        "attention_grad" => {
            let (scale, causal, products) = take.attention()?;
            let rounding = take.rounding();
            let of = take.parsed("q, k or v", |word| {
                AttentionOperand::ALL.into_iter().find(|of| of.name() == word)
            })?;
            Op::AttentionGrad { of, scale, causal, products, rounding }
        }
        "softmax" => Op::Softmax,
        "log_softmax" => Op::LogSoftmax,
        "cross_entropy" => Op::CrossEntropy,
        "cross_entropy_grad" => Op::CrossEntropyGrad,
        "recurrence" => Op::Recurrence(take.recurrence()?),
        "recurrence_grad" => {
            let (cell, rounding) = (take.flag("cell"), take.rounding());
            Op::RecurrenceGrad { recurrence: take.recurrence()?, cell, rounding }
        }
        "quantize" => Op::Quantize { dtype: take.dtype()?, axis: take.optional("axis")? },
        "dequantize" => Op::Dequantize { axis: take.optional("axis")? },
        "straight_through" => {
            Op::StraightThrough { dtype: take.dtype()?, axis: take.optional("axis")? }
        }
        "all_reduce" => Op::AllReduce(take.parsed("sum, mean or max", |word| {
            CollectiveOp::ALL.into_iter().find(|op| op.name() == word)
        })?),
        _ => match elementwise(mnemonic) {
            Some(op) => op,
            None => match ReduceOp::ALL.into_iter().find(|op| op.name() == mnemonic) {
                Some(op) => Op::Reduce { op, axes: take.list("axes")? },
                None => return Err(format!("there is no op {mnemonic:?}")),
            },
        },
    };
    match take.0.first() {
        None => Ok(op),
        Some(Attribute { key, .. }) => Err(format!("{mnemonic} has no attribute {key:?} here")),
    }
}

fn elementwise(mnemonic: &str) -> Option<Op> {
    let unary = UnaryOp::ALL.into_iter().find(|op| op.name() == mnemonic).map(Op::Unary);
    let binary = || BinaryOp::ALL.into_iter().find(|op| op.name() == mnemonic).map(Op::Binary);
    let compare = || CompareOp::ALL.into_iter().find(|op| op.name() == mnemonic).map(Op::Compare);
    unary.or_else(binary).or_else(compare)
}

/// `64`, `N` or `128N`.
pub(super) fn dim(word: &str) -> Option<Dim> {
    let digits = word.strip_suffix('N').unwrap_or(word);
    let batch = digits.len() < word.len();
    if batch && digits.is_empty() {
        return Some(Dim::N);
    }
    Some(Dim { scale: natural(digits)?, batch })
}

/// A number written with digits only.
pub(super) fn natural<T: std::str::FromStr>(word: &str) -> Option<T> {
    if word.bytes().all(|byte| byte.is_ascii_digit()) { word.parse().ok() } else { None }
}

struct Attributes<'a>(Vec<Attribute<'a>>);

impl<'a> Attributes<'a> {
    fn flag(&mut self, key: &str) -> bool {
        let at = self.0.iter().position(|a| a.key == key && a.value.is_none());
        at.map(|at| self.0.remove(at)).is_some()
    }

    /// How gradients are rounded.
    fn rounding(&mut self) -> GradientRounding {
        if self.flag(STOCHASTIC) { GradientRounding::Stochastic } else { GradientRounding::Nearest }
    }

    /// The first flag, read by `read`.
    fn parsed<T>(&mut self, what: &str, read: impl Fn(&str) -> Option<T>) -> Result<T, String> {
        let at = self.0.iter().position(|a| a.value.is_none());
        let found = at.and_then(|at| read(self.0.remove(at).key));
        found.ok_or_else(|| format!("expected {what}"))
    }

    fn dtype(&mut self) -> Result<DType, String> {
        self.parsed("an element type", |word| word.parse().ok())
    }

    fn words(&mut self, key: &str) -> Option<Vec<&'a str>> {
        let at = self.0.iter().position(|a| a.key == key && a.value.is_some())?;
        self.0.remove(at).value
    }

    fn list(&mut self, key: &str) -> Result<Vec<usize>, String> {
        let words = self.words(key).ok_or_else(|| format!("expected {key}=[...]"))?;
        let numbers: Option<Vec<usize>> = words.into_iter().map(natural).collect();
        numbers.ok_or_else(|| format!("{key} takes whole numbers"))
    }

    fn array<const K: usize>(
        &mut self,
        key: &str,
        default: Option<[usize; K]>,
    ) -> Result<[usize; K], String> {
        if let Some(default) = default
            && !self.0.iter().any(|a| a.key == key)
        {
            return Ok(default);
        }
        self.list(key)?.try_into().map_err(|_| format!("{key} takes {K} numbers"))
    }

    fn optional(&mut self, key: &str) -> Result<Option<usize>, String> {
        match self.words(key).as_deref() {
            None => Ok(None),
            Some([word]) => match natural(word) {
                Some(number) => Ok(Some(number)),
                None => Err(format!("{key} takes a whole number, not {word:?}")),
            },
            Some(_) => Err(format!("{key} takes one number")),
        }
    }

    fn number(&mut self, key: &str) -> Result<usize, String> {
        self.optional(key)?.ok_or_else(|| format!("expected {key}=..."))
    }

    fn dim(&mut self, key: &str) -> Result<Dim, String> {
        match self.words(key).as_deref() {
            Some([word]) => dim(word).ok_or_else(|| format!("{key} takes a dimension")),
            _ => Err(format!("expected {key}=...")),
        }
    }

    fn number_or(&mut self, key: &str, default: usize) -> Result<usize, String> {
        Ok(self.optional(key)?.unwrap_or(default))
    }

    fn value(&mut self, key: &str) -> Result<Option<f32>, String> {
        match self.words(key).as_deref() {
            None => Ok(None),
            Some([word]) if literal::number::<f32>(word).is_some() => Ok(literal::number(word)),
            Some(_) => Err(format!("{key} takes one number")),
        }
    }

    fn attention(&mut self) -> Result<(f32, bool, DType), String> {
        let scale = self.value("scale")?.unwrap_or(1.0);
        let products = match self.words("products").as_deref() {
            None => DType::F32,
            Some([word]) => word.parse().map_err(|_| format!("{word} is no element type"))?,
            Some(_) => return Err("products takes one element type".to_owned()),
        };
        Ok((scale, self.flag("causal"), products))
    }

    fn conv(&mut self) -> Result<ConvGeometry, String> {
        Ok(ConvGeometry {
            input: self.array("input", None)?,
            kernel: self.array("kernel", None)?,
            strides: self.array("strides", Some([1, 1]))?,
            pads: self.array("pads", Some([0; 4]))?,
            dilations: self.array("dilations", Some([1, 1]))?,
            groups: self.number_or("groups", 1)?,
        })
    }

    fn pool(&mut self) -> Result<PoolGeometry, String> {
        Ok(PoolGeometry {
            input: self.array("input", None)?,
            kernel: self.array("kernel", None)?,
            strides: self.array("strides", Some([1, 1]))?,
            pads: self.array("pads", Some([0; 4]))?,
            dilations: self.array("dilations", Some([1, 1]))?,
            count_include_pad: self.flag("count_include_pad"),
        })
    }

    fn recurrence(&mut self) -> Result<Recurrence, String> {
        let [reverse, input_forget, peepholes, lengths] =
            ["reverse", "input_forget", "peepholes", "lengths"].map(|key| self.flag(key));
        let cell = self.parsed("lstm, gru, linear_gru or rnn", |word| {
            Cell::ALL.into_iter().find(|cell| cell.name() == word)
        })?;
        let mut activations = [Activation::TANH; 3];
        let used = &mut activations[..cell.activations()];
        let words = self.words("activations").unwrap_or_default();
        let [alphas, betas] = [self.reals("alphas", used.len())?, self.reals("betas", used.len())?];
        if words.len() != used.len() {
            return Err(format!("expected {} activations", used.len()));
        }
        for (at, activation) in used.iter_mut().enumerate() {
            let function = ActivationOp::ALL.into_iter().find(|op| op.name() == words[at]);
            let function = function.ok_or_else(|| format!("no activation {:?}", words[at]))?;
            *activation = Activation { function, alpha: alphas[at], beta: betas[at] };
        }
        let clip = self.value("clip")?;
        let products = match self.words("products").as_deref() {
            None => None,
            Some([word]) => {
                Some(word.parse().map_err(|_| format!("products takes a type, not {word:?}"))?)
            }
            Some(_) => return Err("products takes one type".to_owned()),
        };
        Ok(Recurrence {
            cell,
            activations,
            reverse,
            clip,
            peepholes,
            input_forget,
            lengths,
            products,
        })
    }

    /// So many numbers, or zeros.
    fn reals(&mut self, key: &str, count: usize) -> Result<Vec<f32>, String> {
        let Some(words) = self.words(key) else { return Ok(vec![0.0; count]) };
        let numbers: Option<Vec<f32>> = words.into_iter().map(literal::number).collect();
        let numbers = numbers.filter(|numbers| numbers.len() == count);
        numbers.ok_or_else(|| format!("{key} takes {count} numbers"))
    }
}
