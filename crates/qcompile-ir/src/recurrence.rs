//! Recurrent layers as plain data: the cell, its activations, and which operands its two ops take.

use crate::{DType, GradientRounding};

/// What one step computes from its gates and the state before it. `x` are the gates' inputs, `h` the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Cell {
    /// Gates i, o, f, g: `c' = f·c + i·g`, `h' = o·act(c')`.
    Lstm,
    /// Gates z, r, n: `h' = (1 - z)·n + z·h`, with `n = act(x + (r·h) Rᵀ)`.
    Gru,
    /// The same with `n = act(x + r·(h Rᵀ + bias))`: `linear_before_reset` of ONNX.
    LinearGru,
    /// `h' = act(x + h Rᵀ)`.
    Rnn,
}

impl Cell {
    /// Every cell, in declaration order.
    pub const ALL: [Cell; 4] = [Cell::Lstm, Cell::Gru, Cell::LinearGru, Cell::Rnn];

    /// The word in text.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Cell::Lstm => "lstm",
            Cell::Gru => "gru",
            Cell::LinearGru => "linear_gru",
            Cell::Rnn => "rnn",
        }
    }

    /// Number of gates: blocks of the hidden size in `x` and in R.
    #[must_use]
    pub const fn gates(self) -> usize {
        match self {
            Cell::Lstm => 4,
            Cell::Gru | Cell::LinearGru => 3,
            Cell::Rnn => 1,
        }
    }

    /// States kept from step to step: h, and c of an LSTM.
    #[must_use]
    pub const fn states(self) -> usize {
        if matches!(self, Cell::Lstm) { 2 } else { 1 }
    }

    /// Sections of the result of `recurrence`: the states, then what the gradient needs. An LSTM keeps its four gates,
    /// a GRU its three, a linear one `h Rᵀ + bias` of n as well.
    #[must_use]
    pub const fn sections(self) -> usize {
        match self {
            Cell::Lstm => 6,
            Cell::Gru => 4,
            Cell::LinearGru => 5,
            Cell::Rnn => 1,
        }
    }

    /// Blocks of the hidden size in a row of the result of `recurrence_grad`: the gradients of the gates, and of
    /// `h Rᵀ + bias` of n for a linear GRU.
    #[must_use]
    pub const fn gradients(self) -> usize {
        if matches!(self, Cell::LinearGru) { 4 } else { self.gates() }
    }

    /// Number of activations: of the gates that are no candidates, of the candidate, of the cell state.
    #[must_use]
    pub const fn activations(self) -> usize {
        match self {
            Cell::Lstm => 3,
            Cell::Gru | Cell::LinearGru => 2,
            Cell::Rnn => 1,
        }
    }
}

/// A function that never falls, so that its derivative follows from its value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs, reason = "each is ONNX's function of that name, with its alpha and beta")]
pub enum ActivationOp {
    Sigmoid,
    Tanh,
    Relu,
    /// `alpha·x + beta`
    Affine,
    /// `x` or `alpha·x`
    LeakyRelu,
    /// `x` above `alpha`, else 0
    ThresholdedRelu,
    /// `alpha·tanh(beta·x)`
    ScaledTanh,
    /// `alpha·x + beta` within 0..1
    HardSigmoid,
    /// `x` or `alpha·(eˣ - 1)`
    Elu,
    Softsign,
    Softplus,
}

impl ActivationOp {
    /// Every function, in declaration order.
    pub const ALL: [ActivationOp; 11] = [
        ActivationOp::Sigmoid,
        ActivationOp::Tanh,
        ActivationOp::Relu,
        ActivationOp::Affine,
        ActivationOp::LeakyRelu,
        ActivationOp::ThresholdedRelu,
        ActivationOp::ScaledTanh,
        ActivationOp::HardSigmoid,
        ActivationOp::Elu,
        ActivationOp::Softsign,
        ActivationOp::Softplus,
    ];

    /// The word in text.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            ActivationOp::Sigmoid => "sigmoid",
            ActivationOp::Tanh => "tanh",
            ActivationOp::Relu => "relu",
            ActivationOp::Affine => "affine",
            ActivationOp::LeakyRelu => "leaky_relu",
            ActivationOp::ThresholdedRelu => "thresholded_relu",
            ActivationOp::ScaledTanh => "scaled_tanh",
            ActivationOp::HardSigmoid => "hard_sigmoid",
            ActivationOp::Elu => "elu",
            ActivationOp::Softsign => "softsign",
            ActivationOp::Softplus => "softplus",
        }
    }
}

/// A function with its parameters; those that it does not have are 0.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Activation {
    /// The function.
    pub function: ActivationOp,
    /// Its alpha.
    pub alpha: f32,
    /// Its beta.
    pub beta: f32,
}

impl Activation {
    /// The hyperbolic tangent, which also stands in places that a cell does not use.
    pub const TANH: Activation = Activation::plain(ActivationOp::Tanh);
    /// The logistic function.
    pub const SIGMOID: Activation = Activation::plain(ActivationOp::Sigmoid);

    /// A function without parameters.
    #[must_use]
    pub const fn plain(function: ActivationOp) -> Activation {
        Activation { function, alpha: 0.0, beta: 0.0 }
    }

    /// Why the function falls somewhere, or does not tell its derivative; none if it is as it must be.
    #[must_use]
    pub fn problem(&self) -> Option<&'static str> {
        let rises = match self.function {
            ActivationOp::Affine | ActivationOp::HardSigmoid => self.alpha >= 0.0,
            ActivationOp::LeakyRelu | ActivationOp::Elu | ActivationOp::ThresholdedRelu => {
                self.alpha >= 0.0
            }
            ActivationOp::ScaledTanh => self.alpha > 0.0 && self.beta >= 0.0,
            ActivationOp::Sigmoid
            | ActivationOp::Tanh
            | ActivationOp::Relu
            | ActivationOp::Softsign
            | ActivationOp::Softplus => true,
        };
        let finite = self.alpha.is_finite() && self.beta.is_finite();
        (!rises || !finite).then_some("an activation that falls")
    }
}

/// One direction of a recurrent layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Recurrence {
    /// The cell.
    pub cell: Cell,
    /// Activations, in the order of [`Cell::activations`]; the others are [`Activation::TANH`].
    pub activations: [Activation; 3],
    /// Whether it begins with the last step.
    pub reverse: bool,
    /// What enters an activation is kept within ± this, which is above 0.
    pub clip: Option<f32>,
    /// Of an LSTM: weights from c to the gates i, o and f.
    pub peepholes: bool,
    /// Of an LSTM: `f = 1 - i`.
    pub input_forget: bool,
    /// Whether each row of the batch has a number of steps of its own.
    pub lengths: bool,
    /// What the operands of the products with R are rounded to as they enter them, where that is not their own type.
    pub products: Option<DType>,
}

/// Positions of the operands of `recurrence x, r, h0, ...` or `recurrence_grad y, r, dh, ...` that may be absent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RecurrenceOperands {
    /// c0, or the gradient of c.
    pub cell: Option<usize>,
    /// The bias of n of a linear GRU.
    pub bias: Option<usize>,
    /// The peepholes.
    pub peepholes: Option<usize>,
    /// The lengths.
    pub lengths: Option<usize>,
    /// The numbers that gradients are rounded with.
    pub numbers: Option<usize>,
    /// Number of all operands.
    pub count: usize,
}

impl Recurrence {
    /// Scale of the codes of a state, or of a state times a gate.
    pub const STATE_SCALE: f32 = 1.0 / 127.0;

    /// The same recurrence with these products.
    #[must_use]
    pub fn with_products(self, products: Option<DType>) -> Recurrence {
        Recurrence { products, ..self }
    }

    /// Whether every state after a step is within ± 1 if the first h is, and so is what the products read beside it.
    #[must_use]
    pub fn is_bounded(&self) -> bool {
        let [gates, candidate, state] = self.activations.map(|one| one.function);
        let unit = |function| matches!(function, ActivationOp::Sigmoid | ActivationOp::HardSigmoid);
        let within = |function| {
            unit(function) || matches!(function, ActivationOp::Tanh | ActivationOp::Softsign)
        };
        match self.cell {
            Cell::Lstm => within(gates) && within(state),
            Cell::Gru | Cell::LinearGru => unit(gates) && within(candidate),
            Cell::Rnn => within(gates),
        }
    }

    fn positions(&self, cell: bool, bias: bool, numbers: bool) -> RecurrenceOperands {
        let mut count = 3;
        let mut next = |present: bool| {
            count += usize::from(present);
            present.then_some(count - 1)
        };
        let (cell, bias) = (next(cell), next(bias));
        let (peepholes, lengths) = (next(self.peepholes), next(self.lengths));
        let numbers = next(numbers);
        RecurrenceOperands { cell, bias, peepholes, lengths, numbers, count }
    }

    /// The operands of `recurrence` after x, R and h0.
    #[must_use]
    pub fn operands(&self) -> RecurrenceOperands {
        self.positions(self.cell == Cell::Lstm, self.cell == Cell::LinearGru, false)
    }

    /// The operands of `recurrence_grad` after y, R and the gradient of h; `cell` if there is one of c, with numbers where it
    /// rounds at random.
    #[must_use]
    pub fn gradient_operands(&self, cell: bool, rounding: GradientRounding) -> RecurrenceOperands {
        self.positions(cell, false, rounding == GradientRounding::Stochastic)
    }
}
