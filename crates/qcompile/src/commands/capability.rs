//! `qcompile inspect --capability`: what becomes of every node of a model, whether or not the whole can be compiled.

use super::print_json;
use crate::cli::InspectCommand;
use crate::error::{Code, Error, Result, escaped};
use crate::model::{Target, at_path, survey};
use crate::options::Options;
use crate::output::print;
use crate::terminal::{Align, Table, width};
use qcompile_ir::{Graph, NodeId, Op, QuantizedRange};
use qcompile_onnx::{STAND_IN, Survey, SurveyedNode, Verdict};
use qcompile_passes::differentiate::carries_gradient;
use qcompile_passes::quantize::{activation_products, layers};
use serde_json::{Value, json};
use std::collections::BTreeSet;

/// What can be done with one node: a word if nothing hinders, else why not.
struct Capability {
    import: std::result::Result<(), String>,
    gradient: std::result::Result<(), String>,
    quantize: std::result::Result<(), String>,
}

pub(super) fn run(command: &InspectCommand, target: &Target) -> Result<()> {
    let Target::Model(bytes) = target else {
        let cause = format!("this is a {}: --capability is for models", target.kind());
        return Err(at_path(Error::new(Code::PlanMismatch, cause), &command.file));
    };
    let options = Options::default().with_import(&command.import);
    let survey = survey(bytes, command.file.parent(), &options)
        .map_err(|error| at_path(error.into(), &command.file))?;
    let weighted = layers(&survey.graph).into_iter().map(|layer| layer.node);
    let quantizable: BTreeSet<NodeId> =
        weighted.chain(activation_products(&survey.graph)).collect();
    let varies = varying(&survey.graph);
    let found: Vec<Capability> =
        survey.nodes.iter().map(|node| of(node, &survey.graph, &quantizable, &varies)).collect();
    if command.talk.json { report_json(&survey, &found) } else { report(&survey, &found) }
}

/// Whether each value depends on an input or parameter: what else is there is computed once, at compile time.
fn varying(graph: &Graph) -> Vec<bool> {
    let mut varies = vec![false; graph.len()];
    for id in graph.order() {
        varies[id.index()] = matches!(graph.op(id), Op::Input(_) | Op::Param(_) | Op::State(_))
            || graph.operands(id).iter().any(|operand| varies[operand.index()]);
    }
    varies
}

fn of(
    node: &SurveyedNode,
    graph: &Graph,
    quantizable: &BTreeSet<NodeId>,
    varies: &[bool],
) -> Capability {
    let no = |reason: &str| Err(reason.to_owned());
    match &node.verdict {
        Verdict::Imported => {}
        Verdict::Unused => {
            let reason = "no output needs it";
            return Capability { import: Ok(()), gradient: no(reason), quantize: no(reason) };
        }
        Verdict::Refused(reason) => {
            let reason = reason.as_str();
            return Capability { import: no(reason), gradient: no(reason), quantize: no(reason) };
        }
        Verdict::Blocked => {
            let reason = "an operand cannot be imported";
            return Capability { import: no(reason), gradient: no(reason), quantize: no(reason) };
        }
    }
    let inner = within(graph, node);
    let gradient = if !node.results.iter().any(|id| varies[id.index()]) {
        no("it is constant")
    } else if !node.results.iter().any(|&id| may_carry(graph, node, id)) {
        no("its results are no floats")
    } else if !node.operands.iter().any(|&id| may_carry(graph, node, id) && varies[id.index()]) {
        no("no operand is a float that varies")
    } else if inner.gradient {
        Ok(())
    } else {
        no("its derivative is zero wherever there is one")
    };
    let quantize = if inner.values.iter().any(|id| quantizable.contains(id)) {
        Ok(())
    } else if inner
        .values
        .iter()
        .any(|&id| matches!(graph.op(id), Op::Matmul { .. } | Op::Conv2d(_)))
    {
        no("it is no product of data with a trained weight or other data")
    } else {
        no("it is no product")
    };
    Capability { import: Ok(()), gradient, quantize }
}

/// Whether an operand or result of a node may have a gradient: a float, or the codes of one.
fn may_carry(graph: &Graph, node: &SurveyedNode, id: NodeId) -> bool {
    let dtype = graph.ty(id).dtype;
    let rounds = ["QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QGemm"];
    let rounds = rounds.contains(&node.op.as_str())
        || node.op.starts_with("QLinear")
        || node.op.ends_with("Integer");
    dtype.is_float() || rounds && QuantizedRange::of(dtype, false).is_some()
}

/// What lies between the operands and the results of a node.
struct Within {
    values: BTreeSet<NodeId>,
    /// Whether a gradient passes from a result to an operand.
    gradient: bool,
}

fn within(graph: &Graph, node: &SurveyedNode) -> Within {
    let operands: BTreeSet<NodeId> = node.operands.iter().copied().collect();
    let mut values = BTreeSet::new();
    let mut reached = BTreeSet::new();
    // A result that is an operand passes everything on.
    let mut gradient =
        node.results.iter().any(|id| operands.contains(id) && may_carry(graph, node, *id));
    let mut stack: Vec<(NodeId, bool)> = node.results.iter().map(|&id| (id, true)).collect();
    while let Some((id, carried)) = stack.pop() {
        if operands.contains(&id) {
            gradient |= carried && may_carry(graph, node, id);
            continue;
        }
        let news = values.insert(id) | (carried && reached.insert(id));
        if news {
            for (position, operand) in graph.operands(id).into_iter().enumerate() {
                stack.push((operand, carried && carries_gradient(graph, id, position)));
            }
        }
    }
    Within { values, gradient }
}

fn operator(node: &SurveyedNode) -> String {
    let dot = if node.domain.is_empty() { "" } else { "." };
    format!("{}{dot}{}", node.domain, node.op)
}

fn counts(found: &[Capability]) -> [usize; 3] {
    let count = |good: &dyn Fn(&&Capability) -> bool| found.iter().filter(good).count();
    [
        count(&|node| node.import.is_ok()),
        count(&|node| node.gradient.is_ok()),
        count(&|node| node.quantize.is_ok()),
    ]
}

fn report(survey: &Survey, found: &[Capability]) -> Result<()> {
    let mut table = Table::new(&[
        ("node", Align::Left),
        ("operator", Align::Left),
        ("opset", Align::Right),
        ("import", Align::Left),
        ("gradient", Align::Left),
        ("int8", Align::Left),
        ("why not", Align::Left),
    ]);
    for (node, capability) in survey.nodes.iter().zip(found) {
        let word = |good: bool| if good { "yes" } else { "no" }.to_owned();
        // The first obstacle; that an operator is no product needs no word.
        let reasons = [&capability.import, &capability.gradient, &capability.quantize];
        let reason = reasons.into_iter().find_map(|verdict| verdict.as_ref().err());
        let reason = reason.filter(|reason| *reason != "it is no product");
        table.row([
            escaped(&node.node),
            escaped(&operator(node)),
            node.opset.to_string(),
            word(capability.import.is_ok()),
            word(capability.gradient.is_ok()),
            word(capability.quantize.is_ok()),
            reason.map(|reason| escaped(reason)).unwrap_or_default(),
        ]);
    }
    let [import, gradient, quantize] = counts(found);
    let mut text = table.render(width());
    text.push_str(&format!(
        "\n {} nodes: {import} importable, {gradient} differentiable, {quantize} quantizable\n",
        found.len()
    ));
    for name in &survey.missing {
        let name = escaped(name);
        text.push_str(&format!(
            " note: {STAND_IN} stands for the size that --dim {name}=SIZE gives\n"
        ));
    }
    for problem in &survey.problems {
        let place = problem.place.as_ref().map_or_else(String::new, |place| format!("{place}: "));
        text.push_str(&format!(" fault: {}\n", escaped(&format!("{place}{}", problem.reason))));
    }
    print(&text)
}

fn report_json(survey: &Survey, found: &[Capability]) -> Result<()> {
    let verdict = |verdict: &std::result::Result<(), String>| match verdict {
        Ok(()) => Value::Null,
        Err(reason) => json!(reason),
    };
    let nodes: Vec<Value> = survey
        .nodes
        .iter()
        .zip(found)
        .map(|(node, capability)| {
            json!({
                "node": node.node,
                "operator": operator(node),
                "opset": node.opset,
                "importable": capability.import.is_ok(),
                "differentiable": capability.gradient.is_ok(),
                "quantizable": capability.quantize.is_ok(),
                "why_not": {
                    "importable": verdict(&capability.import),
                    "differentiable": verdict(&capability.gradient),
                    "quantizable": verdict(&capability.quantize),
                },
            })
        })
        .collect();
    let [import, gradient, quantize] = counts(found);
    let problems: Vec<Value> = survey
        .problems
        .iter()
        .map(|problem| json!({"place": problem.place, "reason": problem.reason}))
        .collect();
    let report = json!({
        "nodes": nodes,
        "counts": {
            "nodes": found.len(),
            "importable": import,
            "differentiable": gradient,
            "quantizable": quantize,
        },
        "missing_dims": survey.missing,
        "problems": problems,
    });
    print_json(&report, false)
}
