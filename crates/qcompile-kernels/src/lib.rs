//! Hand-scheduled SIMD microkernels, one table of entry points for each CPU tier.
//!
//! Emitted code and the runtime reach every kernel through [`Kernels`], a `#[repr(C)]` table. A kernel
//! takes one pointer to its argument block (see [`args`]), a phase number and a range of work units.
//! The caller runs the phases one after another with a barrier between, and within a phase splits
//! `0..units` over its threads in any way: results are bit-identical for every split.

#[cfg(target_arch = "x86_64")]
mod amx;
pub mod args;
mod attention;
mod attention_grad;
mod attention_kind;
mod average_pool;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod buffer;
mod conv;
mod depthwise;
mod depthwise_grad;
mod direct;
mod gather;
mod generate;
mod geometry;
mod grad_weight;
mod lanes;
mod matmul;
mod max_pool;
mod pack;
pub mod pool;
mod portable;
mod recurrence;
mod rounding;
mod seen;
mod softmax;
#[cfg(test)]
mod tests;
mod tier;
mod tile;
mod top_k;
mod window;
mod winograd;

use lanes::Simd;
pub use tier::{Tier, UnknownTier};

/// One hand-scheduled kernel.
///
/// `args` points to the kernel's argument block, which must stay unchanged during the call. The
/// pointers in it must be valid for the shapes it states; only `scratch` is called with null pointers.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Primitive {
    /// Number of phases; a barrier belongs between one and the next.
    pub phases: usize,
    /// Number of independent work units of a phase; depends on the shapes (and the tier) only.
    pub units: unsafe extern "C" fn(args: *const u64, phase: usize) -> usize,
    /// Does the units `begin..end` of a phase.
    pub run: unsafe extern "C" fn(args: *const u64, phase: usize, begin: usize, end: usize),
    /// Bytes of shared scratch wanted (may be 0). Pointers in the block may be null here.
    pub scratch: unsafe extern "C" fn(args: *const u64) -> usize,
    /// Number of parts that rows are cut into for the epilogue; depends on the shapes (and the tier) only.
    /// 0 where there is no epilogue.
    pub parts: unsafe extern "C" fn(args: *const u64) -> usize,
}

/// Kernels without epilogue.
pub(crate) unsafe extern "C" fn no_parts(_: *const u64) -> usize {
    0
}

/// Names the kernels of the table, in its order.
#[repr(usize)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum KernelId {
    /// [`args::MatmulArgs`]
    Matmul,
    /// [`args::MatmulI8Args`]
    MatmulI8,
    /// [`args::Conv2dArgs`]
    Conv2d,
    /// [`args::Conv2dGradInputArgs`]
    Conv2dGradInput,
    /// [`args::Conv2dGradWeightArgs`]
    Conv2dGradWeight,
    /// [`args::Conv2dI8Args`]
    Conv2dI8,
    /// [`args::Conv2dGradInputI8Args`]
    Conv2dGradInputI8,
    /// [`args::MatmulBf16Args`]
    MatmulBf16,
    /// [`args::Conv2dBf16Args`]
    Conv2dBf16,
    /// [`args::Conv2dGradInputBf16Args`]
    Conv2dGradInputBf16,
    /// [`args::Conv2dGradWeightBf16Args`]
    Conv2dGradWeightBf16,
    /// [`args::Conv2dGradWeightI8Args`]
    Conv2dGradWeightI8,
    /// [`args::MaxPoolArgs`] of f32.
    MaxPool,
    /// [`args::MaxPoolArgs`] of bf16.
    MaxPoolBf16,
    /// [`args::MaxPoolArgs`] of i8.
    MaxPoolI8,
    /// [`args::MaxPoolGradArgs`]
    MaxPoolGrad,
    /// [`args::AveragePoolArgs`]
    AveragePool,
    /// [`args::AveragePoolGradArgs`]
    AveragePoolGrad,
    /// [`args::AttentionArgs`]
    Attention,
    /// [`args::AttentionArgs`]
    AttentionGrad,
    /// [`args::SoftmaxArgs`]
    Softmax,
    /// [`args::SoftmaxArgs`]
    LogSoftmax,
    /// [`args::CrossEntropyArgs`]
    CrossEntropy,
    /// [`args::CrossEntropyGradArgs`]
    CrossEntropyGrad,
    /// [`args::GatherArgs`]
    Gather,
    /// [`args::ScatterArgs`]
    Scatter,
    /// [`args::TopKArgs`]
    TopK,
    /// [`args::IotaArgs`]
    Iota,
    /// [`args::RandomArgs`]
    Random,
    /// [`args::RecurrenceArgs`]
    Recurrence,
    /// [`args::RecurrenceGradArgs`]
    RecurrenceGrad,
    /// [`args::RecurrenceArgs`] with products of bf16.
    RecurrenceBf16,
    /// [`args::RecurrenceGradArgs`] with products of bf16.
    RecurrenceGradBf16,
    /// [`args::RecurrenceArgs`] with products of int8 codes.
    RecurrenceI8,
    /// [`args::RecurrenceGradArgs`] with products of int8 codes.
    RecurrenceGradI8,
}

impl KernelId {
    /// Number of kernels.
    pub const COUNT: usize = Self::ALL.len();

    /// All kernels in the order of the table.
    pub const ALL: [KernelId; 35] = [
        KernelId::Matmul,
        KernelId::MatmulI8,
        KernelId::Conv2d,
        KernelId::Conv2dGradInput,
        KernelId::Conv2dGradWeight,
        KernelId::Conv2dI8,
        KernelId::Conv2dGradInputI8,
        KernelId::MatmulBf16,
        KernelId::Conv2dBf16,
        KernelId::Conv2dGradInputBf16,
        KernelId::Conv2dGradWeightBf16,
        KernelId::Conv2dGradWeightI8,
        KernelId::MaxPool,
        KernelId::MaxPoolBf16,
        KernelId::MaxPoolI8,
        KernelId::MaxPoolGrad,
        KernelId::AveragePool,
        KernelId::AveragePoolGrad,
        KernelId::Attention,
        KernelId::AttentionGrad,
        KernelId::Softmax,
        KernelId::LogSoftmax,
        KernelId::CrossEntropy,
        KernelId::CrossEntropyGrad,
        KernelId::Gather,
        KernelId::Scatter,
        KernelId::TopK,
        KernelId::Iota,
        KernelId::Random,
        KernelId::Recurrence,
        KernelId::RecurrenceGrad,
        KernelId::RecurrenceBf16,
        KernelId::RecurrenceGradBf16,
        KernelId::RecurrenceI8,
        KernelId::RecurrenceGradI8,
    ];
}

/// The kernels of one tier; index `primitives` by `KernelId as usize`.
#[repr(C)]
#[derive(Debug)]
pub struct Kernels {
    /// The tier that the kernels were built for.
    pub tier: Tier,
    /// The kernels.
    pub primitives: [Primitive; KernelId::COUNT],
}

impl Kernels {
    /// The primitive of that name.
    #[must_use]
    pub fn get(&self, id: KernelId) -> &Primitive {
        &self.primitives[id as usize]
    }
}

/// The table of one tier, in the order of [`KernelId`].
const fn table<S: Simd>(tier: Tier) -> Kernels {
    Kernels {
        tier,
        primitives: [
            matmul::primitive::<matmul::RealKind, S>(),
            matmul::primitive::<matmul::Int8Kind, S>(),
            conv::primitive::<conv::Forward, S>(),
            conv::primitive::<conv::GradInput, S>(),
            grad_weight::primitive::<S::Real>(),
            conv::primitive::<conv::ForwardI8, S>(),
            conv::primitive::<conv::GradInputI8, S>(),
            matmul::primitive::<matmul::Bf16Kind, S>(),
            conv::primitive::<conv::ForwardBf16, S>(),
            conv::primitive::<conv::GradInputBf16, S>(),
            grad_weight::primitive::<S::Bf16>(),
            grad_weight::primitive::<S::Int8>(),
            max_pool::primitive::<f32, S>(),
            max_pool::primitive::<u16, S>(),
            max_pool::primitive::<i8, S>(),
            max_pool::grad_primitive::<S>(),
            average_pool::primitive::<S>(),
            average_pool::grad_primitive::<S>(),
            attention::primitive::<S>(),
            attention_grad::primitive::<S>(),
            softmax::primitive::<S, false>(),
            softmax::primitive::<S, true>(),
            softmax::loss_primitive::<S>(),
            softmax::grad_primitive::<S>(),
            gather::gather_primitive(),
            gather::scatter_primitive::<S>(),
            top_k::primitive(),
            generate::iota_primitive(),
            generate::random_primitive::<S>(),
            recurrence::primitive::<recurrence::RealKind, S>(),
            recurrence::grad_primitive::<recurrence::RealKind, S>(),
            recurrence::primitive::<recurrence::Bf16Kind, S>(),
            recurrence::grad_primitive::<recurrence::Bf16Kind, S>(),
            recurrence::primitive::<recurrence::Int8Kind, S>(),
            recurrence::grad_primitive::<recurrence::Int8Kind, S>(),
        ],
    }
}

/// The table of a tier that has bf16 instructions and is else like another one.
#[cfg(target_arch = "x86_64")]
const fn with_bf16<S: Simd>(mut kernels: Kernels, tier: Tier) -> Kernels {
    kernels.tier = tier;
    let to = &mut kernels.primitives;
    to[KernelId::MatmulBf16 as usize] = matmul::primitive::<matmul::Bf16Kind, S>();
    to[KernelId::Conv2dBf16 as usize] = conv::primitive::<conv::ForwardBf16, S>();
    to[KernelId::Conv2dGradInputBf16 as usize] = conv::primitive::<conv::GradInputBf16, S>();
    to[KernelId::Conv2dGradWeightBf16 as usize] = grad_weight::primitive::<S::Bf16>();
    to[KernelId::Attention as usize] = attention::primitive::<S>();
    to[KernelId::AttentionGrad as usize] = attention_grad::primitive::<S>();
    to[KernelId::RecurrenceBf16 as usize] = recurrence::primitive::<recurrence::Bf16Kind, S>();
    to[KernelId::RecurrenceGradBf16 as usize] =
        recurrence::grad_primitive::<recurrence::Bf16Kind, S>();
    kernels
}

/// The table of a tier that has int8 instructions of its own and is else like another one.
#[cfg(target_arch = "x86_64")]
const fn with_int8<S: Simd>(mut kernels: Kernels) -> Kernels {
    let to = &mut kernels.primitives;
    to[KernelId::MatmulI8 as usize] = matmul::primitive::<matmul::Int8Kind, S>();
    to[KernelId::Conv2dI8 as usize] = conv::primitive::<conv::ForwardI8, S>();
    to[KernelId::Conv2dGradInputI8 as usize] = conv::primitive::<conv::GradInputI8, S>();
    to[KernelId::Conv2dGradWeightI8 as usize] = grad_weight::primitive::<S::Int8>();
    to[KernelId::RecurrenceI8 as usize] = recurrence::primitive::<recurrence::Int8Kind, S>();
    to[KernelId::RecurrenceGradI8 as usize] =
        recurrence::grad_primitive::<recurrence::Int8Kind, S>();
    kernels
}

static PORTABLE: Kernels = table::<portable::Portable>(Tier::Portable);
#[cfg(target_arch = "x86_64")]
static AVX2: Kernels = table::<avx2::Avx2>(Tier::Avx2);
#[cfg(target_arch = "x86_64")]
static AVX512: Kernels = table::<avx512::Avx512>(Tier::Avx512);
#[cfg(target_arch = "x86_64")]
static AVX512_BF16: Kernels =
    with_bf16::<avx512::Avx512Bf16>(table::<avx512::Avx512>(Tier::Avx512), Tier::Avx512Bf16);

#[cfg(target_arch = "x86_64")]
static AVX512_AMX: Kernels = with_int8::<amx::Amx>(with_bf16::<amx::Amx>(
    table::<avx512::Avx512>(Tier::Avx512),
    Tier::Avx512Amx,
));

/// The kernels of a tier. The caller checks [`Tier::is_supported`] before it runs any of them.
#[must_use]
pub fn kernels(tier: Tier) -> &'static Kernels {
    match tier {
        Tier::Portable => &PORTABLE,
        #[cfg(target_arch = "x86_64")]
        Tier::Avx2 => &AVX2,
        #[cfg(target_arch = "x86_64")]
        Tier::Avx512 => &AVX512,
        #[cfg(target_arch = "x86_64")]
        Tier::Avx512Bf16 => &AVX512_BF16,
        #[cfg(target_arch = "x86_64")]
        Tier::Avx512Amx => &AVX512_AMX,
        #[cfg(not(target_arch = "x86_64"))]
        Tier::Avx2 | Tier::Avx512 | Tier::Avx512Bf16 | Tier::Avx512Amx => &PORTABLE,
    }
}
