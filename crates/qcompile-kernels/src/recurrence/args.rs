//! Argument blocks of recurrent layers.

/// The cell of a recurrent layer.
#[repr(usize)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecurrentCell {
    /// Gates i, o, f, g; states h, c.
    Lstm,
    /// Gates z, r, n with the reset before the product of n.
    Gru,
    /// Gates z, r, n with the reset after the product of n.
    LinearGru,
    /// One gate.
    Rnn,
}

/// An activation of a recurrent cell.
#[repr(usize)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "each is ONNX's function of that name")]
pub enum ActivationKind {
    Sigmoid,
    Tanh,
    Relu,
    Affine,
    LeakyRelu,
    ThresholdedRelu,
    ScaledTanh,
    HardSigmoid,
    Elu,
    Softsign,
    Softplus,
}

/// An activation with its parameters.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ActivationArgs {
    /// The function.
    pub kind: ActivationKind,
    /// Its alpha.
    pub alpha: f64,
    /// Its beta.
    pub beta: f64,
}

/// Sizes of a recurrent layer and what its cell computes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct RecurrenceShape {
    /// The cell.
    pub cell: RecurrentCell,
    /// Steps.
    pub steps: usize,
    /// Rows of the batch.
    pub batch: usize,
    /// Size of the state.
    pub hidden: usize,
    /// 1 to begin with the last step.
    pub reverse: usize,
    /// 1 for an LSTM whose forget gate is 1 - i.
    pub input_forget: usize,
    /// What enters the activation of a gate is kept within ± this; infinity for any.
    pub clip: f64,
    /// Activations: of the gates, of the candidate (g, n), of the cell state.
    pub activations: [ActivationArgs; 3],
}

/// A recurrent layer; see `recurrence` in `docs/ir.md`. Absent operands are null.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct RecurrenceArgs {
    /// Inputs of the gates, dense `[steps, batch, gates * hidden]`.
    pub x: *const f32,
    /// `[gates * hidden, hidden]`.
    pub r: *const f32,
    /// `[batch, hidden]`.
    pub h0: *const f32,
    /// `[batch, hidden]`, of an LSTM.
    pub c0: *const f32,
    /// `[hidden]`, of a linear GRU.
    pub bias: *const f32,
    /// `[3, hidden]`: to i, o and f.
    pub peepholes: *const f32,
    /// Steps of each row.
    pub lengths: *const i64,
    /// `[sections, steps + 1, batch, hidden]`.
    pub y: *mut f32,
    /// Sizes.
    pub shape: RecurrenceShape,
    /// Shared scratch.
    pub scratch: *mut u8,
}

/// The gradient of a recurrent layer; see `recurrence_grad` in `docs/ir.md`. Absent operands are null.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct RecurrenceGradArgs {
    /// The result of the forward layer.
    pub y: *const f32,
    /// As in the forward layer.
    pub r: *const f32,
    /// Gradient of h after each step, `[steps, batch, hidden]`.
    pub dh: *const f32,
    /// Gradient of c after each step.
    pub dc: *const f32,
    /// As in the forward layer.
    pub peepholes: *const f32,
    /// As in the forward layer.
    pub lengths: *const i64,
    /// Numbers in [0, 1), `[batch, steps, gradients]`, with which codes of gradients are rounded at random; null to round to
    /// nearest.
    pub numbers: *const f32,
    /// `[steps + 1, batch, gradients * hidden]`.
    pub dx: *mut f32,
    /// Sizes.
    pub shape: RecurrenceShape,
    /// Shared scratch.
    pub scratch: *mut u8,
}

const _: () = {
    assert!(size_of::<RecurrenceShape>() == 16 * 8);
    assert!(size_of::<RecurrenceArgs>() == 25 * 8);
};
