//! `qcompile run`: forward, or forward and backward without an update.

use crate::about::{About, Port};
use crate::cli::RunCommand;
use crate::data::{Array, Dtype, LABEL, Limits, check_exact, npz, read_arrays};
use crate::error::{Code, Error, Result};
use crate::model::{Target, checkpoint_values, open};
use crate::options::Options;
use crate::output::{check_writable, write_atomically};
use crate::street::{Draft, Pass, Street};
use crate::subgraph::part;
use crate::suit::draft_for;
use crate::tensors::{input_type, retyped, to_array, to_tensor};
use crate::terminal::{Show, say_verb};
use crate::wants::loss_kind;
use qcompile_ir::{DType, Graph, NodeId, Op, Region, Tensor};
use qcompile_passes::differentiate::{self, GRADIENT_SUFFIX};
use qcompile_passes::evaluation;
use qcompile_passes::quantize::PrecisionChoice;
use qcompile_plan::{BuildOptions, Plan, build};
use qcompile_runtime::{Trainer, TrainerOptions, Values};
use std::collections::BTreeMap;
use std::sync::Arc;

pub(super) fn run(command: &RunCommand) -> Result<()> {
    let trainer = command.machine.trainer(1)?;
    let target = open(&command.target)?;
    let goal = match (&command.gradients, &command.outputs) {
        (Some(path), _) | (None, Some(path)) => path,
        (None, None) => return Err(Error::usage("--outputs or --gradients says where results go")),
    };
    check_writable(goal)?;
    let backward = command.gradients.is_some();
    let mut arrays = read_arrays(&command.inputs, Limits::default())?;
    let (graph, about) = match &target {
        Target::Model(_) | Target::Graph(_) => of_model(command, &target, backward, &mut arrays)?,
        Target::Plan(plan) => of_plan(command, plan, None, backward)?,
        Target::Checkpoint(plan, state) => of_plan(command, plan, Some(state), backward)?,
    };
    let inputs = take_inputs(&graph, &about, arrays, backward, command.talk.show())
        .map_err(|error| error.at(command.inputs.display().to_string()))?;
    let batch = batch_size(&graph, &inputs)
        .map_err(|error| error.at(command.inputs.display().to_string()))?;
    let results = execute(graph, &inputs, batch, &trainer)
        .map_err(|error| error.at(command.inputs.display().to_string()))?;
    let arrays = if backward { gradients(results)? } else { outputs(results, &about)? };
    write_atomically(goal, &npz::write(&arrays)?)
}

fn options(command: &RunCommand) -> Options {
    Options {
        loss: command.loss,
        precision: command.precision.unwrap_or(PrecisionChoice::F32),
        threads: command.machine.threads,
        tier: command.machine.tier,
        ..Options::default()
    }
    .with_import(&command.import)
}

/// The graph of a model, to its outputs or to its gradients, for these arrays.
fn of_model(
    command: &RunCommand,
    target: &Target,
    backward: bool,
    arrays: &mut BTreeMap<String, Array>,
) -> Result<(Graph, About)> {
    let options = options(command);
    let mut draft = draft_for(target, &command.target, &options, arrays)?;
    command.talk.warn(&draft.about.warnings);
    let mut nothing = |_: Pass, _: &Draft, _: std::time::Duration| Ok(());
    let mut street = Street::new(&options, Show::Nothing, &mut nothing);
    if !backward {
        street.run(&mut draft, Pass::Attention)?;
        if options.precision != PrecisionChoice::F32 && !draft.is_after(Pass::Quantize) {
            let low = qcompile_passes::quantize::Options {
                precision: options.precision,
                ..Default::default()
            };
            qcompile_passes::quantize::run(&mut draft.graph, &low)?;
            qcompile_passes::quantize::optimise(&mut draft.graph)?;
        }
        return Ok((forward_of(&draft.graph, &draft.about)?, draft.about));
    }
    if draft.is_after(Pass::Distribute) {
        return gradient_part(&draft.graph, draft.about, command);
    }
    street.run(&mut draft, Pass::MoveRoundings)?;
    let mut wanted = vec![loss_of(&draft.graph)?];
    for (param, gradient) in differentiate::gradients(&draft.graph) {
        let name = draft.graph.node(param).name.as_str();
        wanted.push((format!("{name}{GRADIENT_SUFFIX}"), gradient));
    }
    let zeros = independent(&draft.graph, &draft.about);
    let mut graph = part(&draft.graph, &wanted)?;
    add_zeros(&mut graph, zeros)?;
    qcompile_passes::simplify::run(&mut graph, &Default::default())?;
    Ok((graph, draft.about))
}

/// The graph of a plan, with the values of a checkpoint.
fn of_plan(
    command: &RunCommand,
    plan: &Arc<Plan>,
    state: Option<&Vec<u8>>,
    backward: bool,
) -> Result<(Graph, About)> {
    let at = |error: Error| error.at(command.target.display().to_string());
    if command.precision.is_some() {
        let cause = "a plan has its precision: --precision is for models";
        return Err(at(Error::new(Code::PlanMismatch, cause)));
    }
    if command.import.is_given() {
        let cause = "a plan is imported already: --freeze, --train, --dim, --constant and --batch-norm are for models";
        return Err(at(Error::new(Code::PlanMismatch, cause)));
    }
    let about = About::of_plan(plan).map_err(at)?;
    let mut graph = plan.graph().clone();
    if let Some(state) = state {
        graph = graph.with_values(&checkpoint_values(plan, state).map_err(at)?)?;
    }
    if backward {
        return gradient_part(&graph, about, command).map_err(at);
    }
    Ok((forward_of(&graph, &about)?, about))
}

/// The part up to the model's outputs.
fn forward_of(graph: &Graph, about: &About) -> Result<Graph> {
    let outputs: Vec<(String, NodeId)> = graph
        .outputs()
        .iter()
        .filter(|(name, _)| about.outputs.iter().any(|port| port.name == *name))
        .cloned()
        .collect();
    if outputs.is_empty() {
        return Err(Error::new(Code::ModelUnsupported, "the model has no output"));
    }
    // The batch size of a result may come from an input whose values nothing uses.
    let sized = |id: &NodeId| graph.ty(*id).shape.batch_axis().is_some();
    let inputs = about.inputs.iter().filter_map(|port| graph.find(&port.name)).filter(sized);
    let kept = inputs.map(|id| (String::new(), id));
    let wanted: Vec<(String, NodeId)> = outputs.iter().cloned().chain(kept).collect();
    let mut graph = part(graph, &wanted)?;
    let mut found = graph.outputs().to_vec();
    found.truncate(outputs.len());
    graph.set_outputs(found);
    if evaluation::still(&mut graph)? {
        qcompile_passes::simplify::run(&mut graph, &Default::default())?;
    }
    Ok(graph)
}

fn loss_of(graph: &Graph) -> Result<(String, NodeId)> {
    let loss = graph.outputs().iter().find(|(name, _)| name == "loss").cloned();
    loss.ok_or_else(|| Error::new(Code::PlanMismatch, "the graph has no loss"))
}

/// The part of a training step up to its gradients: what goes into the mean over workers, of which there is one.
fn gradient_part(graph: &Graph, about: About, command: &RunCommand) -> Result<(Graph, About)> {
    if let Some(asked) = command.loss
        && loss_kind(&about.loss) != Some(asked)
    {
        let cause = format!("the plan's loss is {}, not {}", about.loss, asked.name());
        return Err(
            Error::new(Code::PlanMismatch, cause).help("compile the model with that --loss")
        );
    }
    let mut wanted = vec![loss_of(graph)?];
    for id in graph.leaves(|op| matches!(op, Op::Param(_))) {
        let name = format!("{}{GRADIENT_SUFFIX}", graph.node(id).name.as_str());
        if let Some(mean) = graph.find(&format!("{name}.mean")) {
            wanted.push((name, mean));
        }
    }
    let zeros = independent(graph, &about);
    let mut graph = part(graph, &wanted)?;
    add_zeros(&mut graph, zeros)?;
    Ok((graph, about))
}

/// Parameters whose gradient is zero, with their shapes.
fn independent(graph: &Graph, about: &About) -> Vec<(String, Tensor)> {
    let of = |name: &String| {
        let ty = graph.ty(graph.find(name)?);
        Some((name.clone(), Tensor::zeros(ty.dtype, &ty.shape.sizes(1))))
    };
    about.independent.iter().filter_map(of).collect()
}

fn add_zeros(graph: &mut Graph, zeros: Vec<(String, Tensor)>) -> Result<()> {
    for (name, tensor) in zeros {
        let output = format!("{name}{GRADIENT_SUFFIX}");
        let id = graph.add(Op::Const(Arc::new(tensor)), &[], output.as_str(), Region::Forward)?;
        graph.add_output(&output, id);
    }
    Ok(())
}

/// The arrays that the graph takes, exactly as the model declares them.
fn take_inputs(
    graph: &Graph,
    about: &About,
    mut arrays: BTreeMap<String, Array>,
    backward: bool,
    show: Show,
) -> Result<Values> {
    let mut values = Values::new();
    let label = Port { name: LABEL.to_owned(), dtype: String::new() };
    let label = Some(&label).filter(|_| backward && about.loss != "output");
    let names: Vec<String> = arrays.keys().cloned().collect();
    for port in about.inputs.iter().chain(label) {
        let name = &port.name;
        let Some(array) = arrays.remove(name) else {
            return Err(Error::new(Code::DataName, format!("there is no array `{name}`"))
                .did_you_mean(name, names.iter().map(String::as_str))
                .help(format!("there are: {}", names.join(", "))));
        };
        // An input that nothing depends on is not part of the graph.
        let Some(id) = graph.find(name).filter(|&id| matches!(graph.op(id), Op::Input(_))) else {
            continue;
        };
        let ty = graph.ty(id);
        let mut want = input_type(ty);
        if let Some(dtype) = port.carried() {
            want.dtype = dtype;
        }
        let array = as_declared(array, want.dtype);
        let array = if *name == LABEL && backward { flat_label(array, ty)? } else { array };
        check_exact(name, &array, &want)?;
        let tensor = retyped(name, to_tensor(name, array)?, ty.dtype)?;
        if backward {
            check_finite(name, &tensor)?;
        }
        values.insert(name.clone(), tensor);
    }
    for name in arrays.keys().filter(|name| *name != LABEL) {
        say_verb(show, "Note", &format!("array `{name}` is not used"));
    }
    Ok(values)
}

/// bf16 as programs without that type write it: the bits as uint16.
fn as_declared(array: Array, wanted: Dtype) -> Array {
    match (array.dtype, wanted) {
        (Dtype::U16, Dtype::Bf16) => Array { dtype: Dtype::Bf16, ..array },
        _ => array,
    }
}

/// Class labels of any shape and integer type are rows; other labels are taken as they are.
fn flat_label(array: Array, ty: &qcompile_ir::TensorType) -> Result<Array> {
    if ty.dtype != DType::I64 || ty.shape.rank() != 1 {
        return Ok(array);
    }
    let flat = Array::new(array.dtype, vec![array.elements()], array.bytes)?;
    if flat.dtype.is_float() {
        return Ok(flat);
    }
    let want = input_type(ty);
    crate::data::fit(LABEL, &flat, &crate::data::InputType { dtype: want.dtype, shape: vec![None] })
}

fn check_finite(name: &str, tensor: &Tensor) -> Result<()> {
    if !tensor.dtype().is_float() {
        return Ok(());
    }
    match tensor.to_f64().iter().position(|value| !value.is_finite()) {
        None => Ok(()),
        Some(element) => {
            let value = tensor.get_f64(element);
            let cause =
                format!("array `{name}`: element {element} is {value}, not a finite number");
            Err(Error::new(Code::DataNotFinite, cause))
        }
    }
}

/// The batch size that the arrays agree on; 1 where the model has no batch axis.
fn batch_size(graph: &Graph, values: &Values) -> Result<usize> {
    let mut found: Option<(&str, usize)> = None;
    for (name, tensor) in values {
        let Some(id) = graph.find(name) else { continue };
        let shape = &graph.ty(id).shape;
        let Some(axis) = shape.batch_axis() else { continue };
        let (extent, scale) = (tensor.shape()[axis], shape.0[axis].scale);
        let mismatch = |cause: String| Err(Error::new(Code::DataShape, cause));
        if extent == 0 {
            return Err(Error::new(Code::DataEmpty, format!("array `{name}` holds no samples")));
        }
        if scale == 0 || extent % scale != 0 {
            return mismatch(format!(
                "array `{name}` has {extent} rows, not a multiple of {scale}"
            ));
        }
        let (other, batch) = *found.get_or_insert((name, extent / scale));
        if extent / scale != batch {
            let rows = extent / scale;
            return mismatch(format!(
                "array `{name}` is a batch of {rows}, array `{other}` of {batch}"
            ));
        }
    }
    Ok(found.map_or(1, |(_, batch)| batch))
}

fn execute(
    graph: Graph,
    inputs: &Values,
    batch: usize,
    options: &TrainerOptions,
) -> Result<Values> {
    let plan = build(graph, &BuildOptions { batch_size: batch })?;
    let mut trainer = Trainer::new(Arc::new(plan), options)?;
    Ok(trainer.run(inputs, Region::Comm)?)
}

fn outputs(mut results: Values, about: &About) -> Result<BTreeMap<String, Array>> {
    let mut arrays = BTreeMap::new();
    for port in &about.outputs {
        let value = results.remove(&port.name).ok_or_else(|| {
            Error::new(Code::Internal, format!("the plan returned no output `{}`", port.name))
        })?;
        arrays.insert(port.name.clone(), to_array(&value, port.carried())?);
    }
    Ok(arrays)
}

fn gradients(results: Values) -> Result<BTreeMap<String, Array>> {
    let mut arrays = BTreeMap::new();
    for (name, value) in results {
        let key = match name.strip_suffix(GRADIENT_SUFFIX) {
            Some("loss") => {
                let cause = "a parameter is called `loss`: its gradient has no key of its own";
                return Err(Error::new(Code::ModelUnsupported, cause));
            }
            Some(parameter) => parameter.to_owned(),
            None => name,
        };
        arrays.insert(key, to_array(&value, None)?);
    }
    Ok(arrays)
}
