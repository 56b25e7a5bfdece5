//! [`Plan`](qcompile_plan::Plan) to [`Program`]: native code through Cranelift.
//!
//! Loop nests, epilogues, the calls of kernels and the schedule are emitted; the inner products and whatever else
//! needs wide vectors are kernels of [`qcompile_kernels`], called by address. A program is reached through one
//! calling contract, [`Frame`].
//!
//! `unsafe` is confined to [`mod@program`], which owns the code and its memory, and to the frame's claim to be shared.

mod attention;
mod body;
mod code_memory;
mod emitter;
mod epilogue;
mod facts;
mod frame;
mod lanes;
mod loops;
mod machine_code;
mod math;
mod memory;
mod nest;
mod places;
mod primitives;
pub mod program;
mod quantized;
mod recurrent;
mod schedule;
mod tail;
mod wide;

pub use frame::Frame;
pub use program::{CodegenError, Options, Program, asm_text, clif_text, compile};

// What a plan lets an i32 sum is what the kernels sum at once.
const _: () = assert!(qcompile_plan::MOST_I8_PRODUCTS == qcompile_kernels::args::MOST_I8_PIXELS);
