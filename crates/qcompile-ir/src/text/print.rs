//! Canonical text: leaves, then regions in order, statements in [`Graph::order`].

use super::{attribute, literal};
use crate::{Channels, Graph, Name, NodeId, Note, Op, Precision, Quantizer};
use std::fmt;

impl fmt::Display for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "graph @{} {{", sigilless(self.name()))?;
        let order = self.order();
        let mut region = None;
        for &id in &order {
            let node = self.node(id);
            if node.op.is_leaf() {
                write!(f, "  {} {} : {}", node.op.name(), node.name, node.ty)?;
                leaf_value(f, &node.op)?;
            } else {
                if region != Some(node.region) {
                    region = Some(node.region);
                    writeln!(f, "\n{}:", node.region.name())?;
                }
                write!(f, "  {} : {} = {}", node.name, node.ty, node.op.name())?;
                for (position, operand) in self.operands(id).into_iter().enumerate() {
                    f.write_str(if position == 0 { " " } else { ", " })?;
                    write!(f, "{}", self.node(operand).name)?;
                }
                f.write_str(&attribute::print(&node.op))?;
            }
            notes(f, &node.note)?;
            writeln!(f)?;
        }
        footer(self, &order, f)?;
        writeln!(f, "}}")
    }
}

fn footer(graph: &Graph, order: &[NodeId], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    if graph.outputs().is_empty() && graph.next().is_empty() {
        return Ok(());
    }
    writeln!(f)?;
    for (position, (name, id)) in graph.outputs().iter().enumerate() {
        let value = &graph.node(*id).name;
        write!(f, "{}{value}", if position == 0 { "  return " } else { ", " })?;
        if name != value.as_str() {
            write!(f, " as {}", quoted(name))?;
        }
    }
    if !graph.outputs().is_empty() {
        writeln!(f)?;
    }
    for leaf in order {
        if let Some(next) = graph.next().get(leaf) {
            writeln!(f, "  next {} = {}", graph.node(*leaf).name, graph.node(*next).name)?;
        }
    }
    Ok(())
}

/// A graph's name with the quoting of a value's.
fn sigilless(name: &str) -> String {
    Name::from(name).to_string()[1..].to_owned()
}

/// Text in quotes with the escapes of a value's name.
fn quoted(text: &str) -> String {
    // A space makes any name print quoted; it is taken out again.
    let name = Name::from(format!(" {text}")).to_string();
    format!("\"{}", &name[3..])
}

fn leaf_value(f: &mut fmt::Formatter<'_>, op: &Op) -> fmt::Result {
    let (Op::Param(tensor) | Op::State(tensor) | Op::Const(tensor)) = op else {
        return Ok(());
    };
    match literal::inline(tensor) {
        Some(text) => write!(f, " = {text}"),
        None => write!(f, " = #{:016x}", tensor.digest()),
    }
}

fn notes(f: &mut fmt::Formatter<'_>, note: &Note) -> fmt::Result {
    let Note { origin, sensitivity, channels, precision, stored, quantizer } = note;
    let Channels { outliers, input_outliers, points } = channels;
    if let Some(origin) = origin {
        write!(f, " !origin({})", quoted(origin))?;
    }
    if let Some(sensitivity) = sensitivity {
        write!(f, " !sensitivity({})", literal::float(*sensitivity))?;
    }
    for (key, channels) in [("outliers", outliers), ("input_outliers", input_outliers)] {
        if !channels.is_empty() {
            let channels: Vec<String> = channels.iter().map(u32::to_string).collect();
            write!(f, " !{key}({})", channels.join(", "))?;
        }
    }
    if !points.is_empty() {
        let points: Vec<String> =
            points.iter().map(|(channel, count)| format!("{channel}={count}")).collect();
        write!(f, " !points({})", points.join(", "))?;
    }
    if let Some(precision) = precision {
        let Precision { forward, grad_input, grad_weight, mean, update } = precision;
        if *precision == Precision::uniform(*forward) {
            write!(f, " !precision({forward})")?;
        } else {
            write!(
                f,
                " !precision(forward={forward}, grad_input={grad_input}, grad_weight={grad_weight}, mean={mean}, update={update})"
            )?;
        }
    }
    if let Some(stored) = stored {
        write!(f, " !stored({stored})")?;
    }
    if let Some(Quantizer { weight, granularity, rounding, scaling }) = quantizer {
        let (granularity, rounding, scaling) =
            (granularity.name(), rounding.name(), scaling.name());
        write!(
            f,
            " !quantizer(weight={weight}, granularity={granularity}, rounding={rounding}, scaling={scaling})"
        )?;
    }
    Ok(())
}
