//! The gradients of attention as plain data: by which operand, and what shares a scale.

/// The operands of an attention that have gradients.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum AttentionOperand {
    /// The queries.
    Q,
    /// The keys.
    K,
    /// The values.
    V,
}

impl AttentionOperand {
    /// Every one, in the order of the operands.
    pub const ALL: [AttentionOperand; 3] =
        [AttentionOperand::Q, AttentionOperand::K, AttentionOperand::V];

    /// The attribute in text.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            AttentionOperand::Q => "q",
            AttentionOperand::K => "k",
            AttentionOperand::V => "v",
        }
    }
}

/// How the gradients of attention in int8 are rounded. What shares a scale is part of what the op means, so that no
/// kernel's strips, threads or tier change a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionCodes;

impl AttentionCodes {
    /// Queries of a head, one after the other, whose products with a key are summed in i32.
    pub const QUERIES: usize = 64;
    /// Keys, one after the other, whose products with a query are.
    pub const KEYS: usize = 960;
    /// The incoming gradient is two codes where it meets values: the step of the first over that of the second.
    pub const FINE_STEPS: f32 = 254.0;
}
