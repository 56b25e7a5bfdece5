//! A plan as text, for `--emit plan-text` and snapshots.
//!
//! ```text
//! slot 0 input 40N
//! step 0 forward %fc = matmul slot 0, slot 3 -> slot 1
//! ```

use crate::{
    Access, Codes, Kernel, LoopNest, Matrix, Place, Plan, Primitive, Scalar, SlotId, Storage,
    Strided, Write,
};
use qcompile_ir::{DType, Dim};
use std::fmt;

impl fmt::Display for SlotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "s{}", self.0)
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.offset {
            crate::Affine::ZERO => write!(f, "{}", self.slot),
            offset => write!(f, "{}+{offset}", self.slot),
        }
    }
}

impl fmt::Display for Matrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let strides = [self.batch_stride, self.row_stride, self.col_stride];
        write!(f, "{}{}", self.place, List(&strides))
    }
}

impl fmt::Display for Strided {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.place, List(&self.strides))
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = Place { slot: self.slot, offset: self.offset };
        write!(f, "{} {place}{}", self.dtype, List(&self.strides))
    }
}

/// `[a, b]`.
struct List<'a>(&'a [Dim]);

impl fmt::Display for List<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dims: Vec<String> = self.0.iter().map(Dim::to_string).collect();
        write!(f, "[{}]", dims.join(", "))
    }
}

impl Storage {
    /// The word in text.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Storage::Input => "input",
            Storage::Kept => "kept",
            Storage::Const => "const",
            Storage::Output => "output",
            Storage::Shared => "shared",
        }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "plan @{}", self.graph().name())?;
        let kinds = [
            ("input", self.inputs()),
            ("output", self.outputs()),
            ("param", self.params()),
            ("state", self.states()),
            ("const", self.consts()),
        ];
        for (kind, bindings) in kinds {
            for binding in bindings {
                let name = qcompile_ir::Name::from(&binding.name);
                writeln!(f, "{kind} {name} : {} in {}", binding.ty, binding.slot)?;
            }
        }
        for (index, slot) in self.slots().iter().enumerate() {
            writeln!(f, "slot s{index} {} {}", slot.storage.name(), slot.bytes)?;
        }
        for (index, step) in self.steps().iter().enumerate() {
            let name = qcompile_ir::Name::from(&step.name);
            let serial = if step.serial { " serial" } else { "" };
            let lasting = if step.lasting { " lasting" } else { "" };
            write!(f, "step {index} {}{serial}{lasting} {name} = ", step.region.name())?;
            match &step.kernel {
                Kernel::Loops(nests) => {
                    writeln!(f, "loops")?;
                    nests.iter().try_for_each(|nest| write_nest(f, nest))?;
                }
                Kernel::Primitive(primitive) => write_primitive(f, primitive)?,
                Kernel::AllReduce { op, members } => {
                    let members: Vec<String> = members
                        .iter()
                        .map(|member| {
                            let value = format!("{}[{}]", member.value, member.elements);
                            match member.codes {
                                Some(Codes { codes, scales, row }) => {
                                    format!("{value} of {codes}[{row}] by {scales}")
                                }
                                None => value,
                            }
                        })
                        .collect();
                    writeln!(f, "all_reduce {} {}", op.name(), members.join(", "))?;
                }
            }
        }
        Ok(())
    }
}

/// The operands of a value, as text.
fn operands(scalar: Scalar) -> String {
    let operands: Vec<String> = scalar.operands().map(|x| format!("v{x}")).collect();
    operands.join(", ")
}

fn write_nest(f: &mut fmt::Formatter<'_>, nest: &LoopNest) -> fmt::Result {
    writeln!(f, "  for {}", List(&nest.dims))?;
    for (value, scalar) in nest.body.iter().enumerate() {
        write!(f, "    v{value} = ")?;
        match *scalar {
            Scalar::Read(read) => writeln!(f, "{}", nest.reads[read])?,
            Scalar::Tile => writeln!(f, "tile")?,
            Scalar::Const(dtype, value) => writeln!(f, "{dtype} {value}")?,
            Scalar::Size(dim) => writeln!(f, "size {dim}")?,
            Scalar::Unary(op, x) => writeln!(f, "{} v{x}", op.name())?,
            Scalar::Binary(op, a, b) => writeln!(f, "{} v{a}, v{b}", op.name())?,
            Scalar::Compare(op, a, b) => writeln!(f, "{} v{a}, v{b}", op.name())?,
            Scalar::Select(c, a, b) => writeln!(f, "select v{c}, v{a}, v{b}")?,
            Scalar::Cast(dtype, x) => writeln!(f, "cast {dtype} v{x}")?,
            Scalar::Quantize(dtype, ..) => writeln!(f, "quantize {dtype} {}", operands(*scalar))?,
            Scalar::Dequantize(..) => writeln!(f, "dequantize {}", operands(*scalar))?,
            Scalar::StraightThrough(dtype, ..) => {
                writeln!(f, "straight_through {dtype} {}", operands(*scalar))?;
            }
        }
    }
    for write in &nest.writes {
        match write {
            Write::Store { access, value } => writeln!(f, "    {access} = v{value}")?,
            Write::Reduce { access, op, value } => {
                writeln!(f, "    {access} = {} v{value}", op.name())?;
            }
            Write::Deviations { access, value } => {
                writeln!(f, "    {access} = squared_deviations v{value}")?;
            }
        }
    }
    Ok(())
}

fn write_primitive(f: &mut fmt::Formatter<'_>, primitive: &Primitive) -> fmt::Result {
    write!(f, "{}", primitive.name())?;
    let mut epilogue = None;
    match primitive {
        Primitive::Matmul(matmul, nest) => {
            let crate::Matmul { batch, m, n, k, a, b, c, operands } = matmul;
            write!(f, " {} {a}, {b}", List(&[*batch, *m, *n, *k]))?;
            write_scales(f, operands)?;
            epilogue = nest.as_ref();
            if epilogue.is_none() {
                write!(f, " -> {c}")?;
            }
        }
        Primitive::Convolution(convolution, nest) => {
            let crate::Convolution {
                geometry,
                images,
                in_channels,
                out_channels,
                a,
                b,
                c,
                operands,
                ..
            } = convolution;
            let [height, width] = geometry.input;
            let [kernel_height, kernel_width] = geometry.kernel;
            write!(
                f,
                " {images}x{height}x{width}x{in_channels} kernel {kernel_height}x{kernel_width}"
            )?;
            write!(f, " strides {:?} pads {:?}", geometry.strides, geometry.pads)?;
            write!(f, " dilations {:?} groups {}", geometry.dilations, geometry.groups)?;
            write!(f, " channels {out_channels} {a}, {b}")?;
            write_scales(f, operands)?;
            epilogue = nest.as_ref();
            if epilogue.is_none() {
                write!(f, " -> {c}")?;
            }
        }
        Primitive::Pooling(pooling) => {
            let geometry = &pooling.geometry;
            let [height, width] = geometry.input;
            write!(f, " {}x{height}x{width}x{}", pooling.images, pooling.channels)?;
            write!(f, " kernel {:?} strides {:?}", geometry.kernel, geometry.strides)?;
            write!(f, " pads {:?} {}", geometry.pads, pooling.x)?;
            if pooling.gradient {
                write!(f, ", {}", pooling.dy)?;
            }
            write!(f, " -> {}", pooling.y)?;
        }
        Primitive::Attention(attention) => write_attention(f, attention)?,
        Primitive::Softmax { rows, cols, x, y, .. } => {
            write!(f, " {} {x} -> {y}", List(&[*rows, *cols]))?;
        }
        Primitive::CrossEntropy { rows, cols, logits, label, loss } => {
            write!(f, " {} {logits}, {label} -> {loss}", List(&[*rows, *cols]))?;
        }
        Primitive::CrossEntropyGrad { rows, cols, logits, label, dloss, dlogits } => {
            write!(f, " {} {logits}, {label}, {dloss} -> {dlogits}", List(&[*rows, *cols]))?;
        }
        Primitive::Gather { table_rows, row_bytes, count, table, indices, y } => {
            write!(f, " {table_rows} rows of {row_bytes} bytes, {count} times")?;
            write!(f, " {table}, {indices} -> {y}")?;
        }
        Primitive::Scatter { rows, width, count, indices, values, y, .. } => {
            write!(f, " {} {count} times {indices}, {values} -> {y}", List(&[*rows, *width]))?;
        }
        Primitive::TopK { largest, rows, cols, k, x, y, .. } => {
            let which = if *largest { "largest" } else { "smallest" };
            write!(f, " {k} {which} of {} {x} -> {y}", List(&[*rows, (*cols).into()]))?;
        }
        Primitive::Iota { count, y } => write!(f, " {count} -> {y}")?,
        Primitive::Random { seed, count, step, y } => {
            write!(f, " seed {seed} {count} times {step} -> {y}")?;
        }
        Primitive::Recurrent(recurrent) => {
            let crate::Recurrent { recurrence, steps, batch, hidden, y, .. } = recurrent;
            let back = if recurrence.reverse { " reverse" } else { "" };
            let reads: Vec<String> = recurrent.reads().map(|place| place.to_string()).collect();
            write!(f, " {}{back} [{steps}, {batch}, {hidden}]", recurrence.cell.name())?;
            write!(f, " {} -> {y}", reads.join(", "))?;
        }
    }
    writeln!(f)?;
    epilogue.map_or(Ok(()), |nest| write_nest(f, nest))
}

fn write_attention(f: &mut fmt::Formatter<'_>, attention: &crate::Attention) -> fmt::Result {
    let crate::Attention { batch, rows, keys, heads, key_heads, width, value_width, .. } =
        attention;
    write!(f, " {batch}x{heads} {} {}", List(&[*rows, *width]), List(&[*keys, *value_width]))?;
    if key_heads != heads {
        write!(f, " of {key_heads}")?;
    }
    write!(f, " {} scale {}", attention.dtype, attention.scale)?;
    if attention.causal {
        f.write_str(" causal")?;
    }
    if attention.products != DType::F32 {
        write!(f, " products {}", attention.products)?;
    }
    for operand in [attention.q, attention.k, attention.v] {
        write!(f, " {operand}")?;
    }
    if let Some([q, k, v]) = attention.scales {
        write!(f, " scales {q}, {k}, {v}")?;
    }
    if let Some(mask) = attention.mask {
        write!(f, " mask {mask}")?;
    }
    match attention.result {
        crate::AttentionResult::Forward(y) => write!(f, " -> {y}"),
        crate::AttentionResult::Gradients { dy, numbers, of } => {
            write!(f, " {dy}")?;
            if let Some(numbers) = numbers {
                write!(f, " at random by {numbers}")?;
            }
            f.write_str(" ->")?;
            for (name, place) in ["dq", "dk", "dv"].into_iter().zip(of) {
                if let Some(place) = place {
                    write!(f, " {name} {place}")?;
                }
            }
            Ok(())
        }
    }
}

fn write_scales(f: &mut fmt::Formatter<'_>, operands: &crate::Operands) -> fmt::Result {
    let Some(int8) = operands.scales() else { return Ok(()) };
    let rows = if int8.per_row { " per row" } else { "" };
    let channels = if int8.per_channel { " per channel" } else { "" };
    write!(f, " scales {}{rows}", int8.scale_a)?;
    if int8.unsigned_a {
        f.write_str(" u8")?;
    }
    if let Some(zero_point) = int8.zero_a {
        write!(f, " zero point {zero_point}")?;
    }
    write!(f, ", {}{channels}", int8.scale_b)
}
