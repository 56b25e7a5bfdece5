//! What becomes of every node of a model, whether or not the whole can be imported.

use crate::ImportOptions;
use crate::body::{Body, BodyNode};
use crate::draft::ValueId;
use crate::dynamic::{Rewritten, dequantize_products};
use crate::error::{ImportError, Need, Obstacle, Problem};
use crate::function::Functions;
use crate::import::{Importer, Inputs, Scope, no_graph, read, take_node};
use crate::order::order;
use qcompile_ir::{Graph, NodeId};
use std::collections::{BTreeMap, BTreeSet};

/// Whether a node can be imported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is in the graph.
    Imported,
    /// It is not supported, or contradicts ONNX: why.
    Refused(String),
    /// The operator is known, but an operand could not be imported.
    Blocked,
    /// No output needs it.
    Unused,
}

impl Verdict {
    /// With the flags that could help in its reason.
    pub(crate) fn of(
        result: &Result<Vec<ValueId>, Obstacle>,
        poisoned: bool,
        needs: &[Need],
    ) -> Verdict {
        match result {
            Ok(_) => Verdict::Imported,
            Err(Obstacle::Operand) => Verdict::Blocked,
            Err(Obstacle::Invalid(_)) if poisoned => Verdict::Blocked,
            Err(
                Obstacle::Invalid(reason)
                | Obstacle::Unsupported(reason)
                | Obstacle::Batch(reason)
                | Obstacle::Unknown(reason, _),
            ) => Verdict::Refused(
                needs
                    .iter()
                    .fold(reason.clone(), |reason, need| format!("{reason}; perhaps with {need}")),
            ),
        }
    }
}

/// What became of one node in the draft.
pub(crate) struct Outcome {
    pub(crate) name: String,
    pub(crate) op: String,
    pub(crate) domain: String,
    pub(crate) opset: i64,
    pub(crate) verdict: Verdict,
    pub(crate) operands: Vec<ValueId>,
    pub(crate) results: Vec<ValueId>,
}

/// One node of a model.
#[derive(Clone, Debug)]
pub struct SurveyedNode {
    /// Its name, or `Op_index` if it has none.
    pub node: String,
    /// Its operator.
    pub op: String,
    /// The operator's domain, empty for ONNX's own.
    pub domain: String,
    /// The opset version of the domain, 0 if the model imports none.
    pub opset: i64,
    /// Whether it can be imported.
    pub verdict: Verdict,
    /// Its operands in the graph.
    pub operands: Vec<NodeId>,
    /// Its results in the graph, if it is imported.
    pub results: Vec<NodeId>,
}

/// A model, node by node.
#[derive(Clone, Debug)]
pub struct Survey {
    /// The nodes in the order of import, those of functions and of branches that are taken among them.
    pub nodes: Vec<SurveyedNode>,
    /// As much of the model as can be imported.
    pub graph: Graph,
    /// Dimensions without a size, for which [`STAND_IN`] was taken.
    pub missing: Vec<String>,
    /// Contradictions of the model that are none of one operator.
    pub problems: Vec<Problem>,
}

/// The size that stands for one that is missing.
pub const STAND_IN: usize = 64;

/// Imports as much of a model as there is a way to.
///
/// # Errors
/// For bytes that are no model, inputs that cannot be imported and options that name nothing.
pub fn survey(bytes: &[u8], options: &ImportOptions) -> Result<Survey, ImportError> {
    let mut options = options.clone();
    let mut missing = Vec::new();
    loop {
        match attempt(bytes, &options) {
            Err(ImportError::MissingDims(dims)) if missing.is_empty() => {
                for dim in dims {
                    options.dims.insert(dim.name.clone(), STAND_IN);
                    missing.push(dim.name);
                }
                missing.dedup();
            }
            Err(error) => return Err(error),
            Ok(survey) => return Ok(Survey { missing, ..survey }),
        }
    }
}

fn attempt(bytes: &[u8], options: &ImportOptions) -> Result<Survey, ImportError> {
    let (model, opsets) = read(bytes, options)?;
    let mut functions = Functions::new(model.functions, options.limits.nodes)
        .map_err(|problem| ImportError::InvalidModel(vec![problem]))?;
    let graph = model.graph.into_option().ok_or_else(no_graph)?;
    let mut body =
        Body::new(graph, "", &opsets, &mut functions).map_err(ImportError::InvalidModel)?;
    let rewritten = dequantize_products(&mut body);
    let (order, problems) = match order(&body, &|_| false) {
        Ok(order) => (order, Vec::new()),
        Err(problems) => ((0..body.nodes.len()).collect(), problems),
    };
    let mut importer = Importer::new(&body, functions, options)?;
    importer.survey = Some(Vec::new());
    let Inputs { ids, .. } = importer.begin(&body)?;
    let Body { name, mut nodes, weights, .. } = body;
    importer.scopes.push(Scope::new(weights));
    for index in order {
        importer.add_node(take_node(&mut nodes[index]));
    }
    let mut outcomes = importer.survey.take().unwrap_or_default();
    outcomes.extend(nodes.into_iter().filter(|node| !node.name.is_empty()).map(unused));
    for rewritten in rewritten {
        tell_rewritten(&mut outcomes, rewritten);
    }
    let values = |outcome: &Outcome| {
        outcome.operands.iter().chain(&outcome.results).copied().collect::<Vec<_>>()
    };
    let wanted: BTreeSet<ValueId> = outcomes.iter().flat_map(values).collect();
    let outputs: Vec<(String, ValueId)> =
        wanted.into_iter().enumerate().map(|(at, id)| (at.to_string(), id)).collect();
    let graph = importer.draft.assemble(&name, &ids, &outputs)?;
    let by_id: BTreeMap<ValueId, NodeId> = outputs
        .iter()
        .map(|&(_, id)| id)
        .zip(graph.outputs().iter().map(|&(_, node)| node))
        .collect();
    let find = |ids: &[ValueId]| ids.iter().filter_map(|id| by_id.get(id).copied()).collect();
    let nodes = outcomes
        .into_iter()
        .map(|outcome| SurveyedNode {
            operands: find(&outcome.operands),
            results: find(&outcome.results),
            node: outcome.name,
            op: outcome.op,
            domain: outcome.domain,
            opset: outcome.opset,
            verdict: outcome.verdict,
        })
        .collect();
    Ok(Survey { nodes, graph, missing: Vec::new(), problems })
}

/// Tells of the nodes that the model has, in the place of those that stand for them.
fn tell_rewritten(outcomes: &mut Vec<Outcome>, Rewritten { product, absorbed }: Rewritten) {
    let stands = |outcome: &Outcome| outcome.name == product.name;
    let own = |outcome: &Outcome| stands(outcome) && outcome.op != "DequantizeLinear";
    let codes = outcomes.iter().find(|outcome| stands(outcome) && !own(outcome));
    let operands = codes.map_or_else(Vec::new, |outcome| outcome.operands.clone());
    outcomes.retain(|outcome| own(outcome) || !stands(outcome));
    let Some(at) = outcomes.iter().position(stands) else { return };
    let outcome = &mut outcomes[at];
    outcome.op.clone_from(&product.proto.op_type);
    outcome.operands = operands;
    let (verdict, results) = (outcome.verdict.clone(), outcome.results.clone());
    let absorbed = absorbed.into_iter().map(|node| Outcome {
        verdict: verdict.clone(),
        operands: results.clone(),
        results: results.clone(),
        ..unused(node)
    });
    outcomes.splice(at + 1..at + 1, absorbed);
}

fn unused(node: BodyNode) -> Outcome {
    Outcome {
        opset: node.opset(),
        name: node.name,
        op: node.proto.op_type,
        domain: node.proto.domain,
        verdict: Verdict::Unused,
        operands: Vec::new(),
        results: Vec::new(),
    }
}
