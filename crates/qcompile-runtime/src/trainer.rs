//! Steps of training, on one worker or several.

use crate::RuntimeError;
use crate::arena::{give_back_heap, physical_memory};
use crate::collective::Group;
use crate::inputs::Inputs;
use crate::replica::{Call, Code, Form, Replica};
use qcompile_ir::{Dim, Region, Tensor};
use qcompile_kernels::Tier;
use qcompile_kernels::pool::Team;
use qcompile_plan::{Binding, Kernel, Plan, Primitive, SlotId};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Values by name.
pub type Values = BTreeMap<String, Tensor>;

/// How to run. The default takes every core for one worker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TrainerOptions {
    /// Threads in all, shared by the workers (each has at least one); 0 takes every core. Results do not depend on it.
    pub threads: usize,
    /// Workers that share each batch; 0 counts as 1.
    pub workers: usize,
    /// The instruction set; none takes the best of this CPU.
    pub tier: Option<Tier>,
}

/// What a step reports.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// The loss of the batch before the update, the mean over workers.
    pub loss: f32,
    /// The norm of all gradients, before clipping.
    pub grad_norm: f32,
    /// Whether loss and gradients were finite. If not, nothing was updated.
    pub finite: bool,
}

/// How long each region of a step took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RegionTimes {
    /// The forward pass.
    pub forward: Duration,
    /// The backward pass.
    pub backward: Duration,
    /// The exchange between workers.
    pub comm: Duration,
    /// The update.
    pub update: Duration,
}

const TRAINING: usize = 0;
const EVALUATION: usize = 1;

/// Trains a plan.
///
/// The only way to keep what was learned is [`parameters`](Self::parameters), [`states`](Self::states) or a
/// [checkpoint](crate::checkpoint).
pub struct Trainer {
    plan: Arc<Plan>,
    /// Of the training form, and of the evaluation form once it has been used.
    codes: Vec<Code>,
    limit: usize,
    replicas: Vec<Mutex<Replica>>,
    /// Runs the replicas side by side.
    workers: Team,
    group: Group,
    kept_inputs: Values,
    tier: Tier,
    threads: usize,
}

impl std::fmt::Debug for Trainer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Trainer")
            .field("plan", &self.plan.graph().name())
            .field("workers", &self.workers())
            .field("threads", &self.threads)
            .field("tier", &self.tier)
            .finish_non_exhaustive()
    }
}

type Times = [AtomicU64; Region::ALL.len()];

impl Trainer {
    /// Compiles the plan and lays out memory for each worker.
    ///
    /// # Errors
    /// [`RuntimeError::Codegen`], [`RuntimeError::Memory`], [`RuntimeError::Refused`] or [`RuntimeError::Threads`].
    pub fn new(plan: Arc<Plan>, options: &TrainerOptions) -> Result<Trainer, RuntimeError> {
        let workers = options.workers.max(1);
        let cores = || std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let threads = if options.threads == 0 { cores() } else { options.threads };
        let each = (threads / workers).max(1);
        let tier = options.tier.unwrap_or_else(Tier::detect);
        let limit = physical_memory();
        let codes = vec![code(&plan, tier, limit)?];
        let mut replicas = Vec::with_capacity(workers);
        for _ in 0..workers {
            replicas.push(Mutex::new(Replica::new(&plan, Team::new(each)?, limit)?));
        }
        Ok(Trainer {
            plan,
            codes,
            limit,
            replicas,
            workers: Team::new(workers)?,
            group: Group::new(workers),
            kept_inputs: Values::new(),
            tier,
            threads: each * workers,
        })
    }

    /// The plan.
    #[must_use]
    pub fn plan(&self) -> &Arc<Plan> {
        &self.plan
    }

    /// Threads of all workers.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Number of workers.
    #[must_use]
    pub fn workers(&self) -> usize {
        self.replicas.len()
    }

    /// The instruction set.
    #[must_use]
    pub fn tier(&self) -> Tier {
        self.tier
    }

    /// Bytes of memory that all workers hold now: parameters, states, values of a step, scratch of kernels, constants and
    /// code.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let constants: usize = self.codes.iter().map(Code::bytes).sum();
        let workers: usize = self.replicas.iter().map(|replica| lock(replica).bytes()).sum();
        constants + workers
    }

    /// Sets an input that stays until it is set again, such as the learning rate: calls that do not name it use this.
    ///
    /// # Errors
    /// [`RuntimeError::Input`] if the plan has no such input or it is of another type.
    pub fn set_input(&mut self, name: &str, value: Tensor) -> Result<(), RuntimeError> {
        let input = self.plan.inputs().iter().find(|input| input.name == name);
        let reason = match input {
            None => "the plan has no such input".to_owned(),
            Some(input) if input.ty != value.ty() && input.ty.shape.batch_axis().is_none() => {
                format!("it is {}, the plan takes {}", value.ty(), input.ty)
            }
            Some(_) => {
                self.kept_inputs.insert(name.to_owned(), value);
                return Ok(());
            }
        };
        Err(RuntimeError::Input { name: name.to_owned(), reason })
    }

    /// One step: forward, backward, exchange, update. Inputs with a batch axis are split among the workers.
    ///
    /// # Errors
    /// [`RuntimeError::Input`], [`RuntimeError::Label`] or [`RuntimeError::Index`] for a bad batch;
    /// [`RuntimeError::Missing`] if the plan does not train; nothing is updated then.
    pub fn step(&mut self, inputs: &Values) -> Result<StepReport, RuntimeError> {
        self.timed_step(inputs).map(|(report, _)| report)
    }

    /// [`step`](Self::step), with the time of each region.
    ///
    /// # Errors
    /// As `step`.
    pub fn timed_step(
        &mut self,
        inputs: &Values,
    ) -> Result<(StepReport, RegionTimes), RuntimeError> {
        let plan = Arc::clone(&self.plan);
        let output = |name: &str| plan.outputs().iter().find(|output| output.name == name);
        let (Some(loss), Some(norm), Some(finite)) =
            (output("loss"), output("grad_norm"), output("finite"))
        else {
            return Err(RuntimeError::Missing("update: it was not compiled for training"));
        };
        let inputs = Inputs::of(&plan, &plan, inputs, &self.kept_inputs)?;
        let forms = forms(&plan, &self.codes);
        let shares = Shares::of(inputs.batch, self.replicas.len());
        let times = Times::default();
        let (replicas, group, workers) = (&self.replicas, &self.group, &mut self.workers);
        all_ranks(workers, replicas, |rank, replica| {
            shares.load(rank, replica, &forms, TRAINING, &inputs)?;
            replica.run(&forms[TRAINING], &shares.call(&BEFORE_UPDATE, rank, group), None, &times)
        })?;
        // All ranks agree before anything is updated.
        for (rank, replica) in replicas.iter().enumerate() {
            if let Some(error) = lock(replica).error() {
                return Err(bad_index(&plan, &inputs, error, shares.begin(rank)));
            }
        }
        all_ranks(workers, replicas, |rank, replica| {
            replica.run(
                &forms[TRAINING],
                &shares.call(&[Region::Update], rank, group),
                None,
                &times,
            )
        })?;
        let first = lock(&self.replicas[0]);
        let scalar = |binding: &Binding| first.read(binding, shares.batch(0)).get_f64(0);
        #[allow(clippy::cast_possible_truncation, reason = "the outputs are f32")]
        let report = StepReport {
            loss: scalar(loss) as f32,
            grad_norm: scalar(norm) as f32,
            finite: scalar(finite) != 0.0,
        };
        Ok((report, region_times(&times, self.replicas.len())))
    }

    /// Takes one step, on the first worker alone, and returns how long each step of the plan took, in its order. For
    /// measuring: afterwards the workers no longer hold the same parameters, so the trainer should be dropped.
    ///
    /// # Errors
    /// As [`step`](Self::step), for inputs that do not fit.
    pub fn profile(&mut self, inputs: &Values) -> Result<Vec<Duration>, RuntimeError> {
        let plan = Arc::clone(&self.plan);
        let forms = forms(&plan, &self.codes);
        let inputs = Inputs::of(&plan, &plan, inputs, &self.kept_inputs)?;
        let shares = Shares::of(inputs.batch, 1);
        let mut replica = lock(&self.replicas[0]);
        shares.load(0, &mut replica, &forms, TRAINING, &inputs)?;
        replica.profile(&forms[TRAINING], inputs.batch)
    }

    /// Runs the training form up to a region on the first worker; the whole batch stays together. Returns the outputs
    /// computed by then. Only [`Region::Update`] changes parameters and state.
    ///
    /// # Errors
    /// As [`step`](Self::step), for a bad batch; [`RuntimeError::Missing`] for an update that several workers would
    /// have to share.
    pub fn run(&mut self, inputs: &Values, last: Region) -> Result<Values, RuntimeError> {
        if last == Region::Update && self.workers() > 1 {
            return Err(RuntimeError::Missing("update by one worker of several"));
        }
        let regions: Vec<Region> =
            Region::ALL.into_iter().filter(|region| *region <= last).collect();
        self.alone(inputs, TRAINING, &regions)
    }

    /// The forward pass in evaluation form (running statistics instead of those of the batch): the loss and the
    /// model's outputs. A plan without that form gives the outputs of its own forward region.
    ///
    /// # Errors
    /// As [`step`](Self::step), for a bad batch.
    pub fn evaluate(&mut self, inputs: &Values) -> Result<Values, RuntimeError> {
        let form = match self.plan.evaluation() {
            None => TRAINING,
            Some(evaluation) => {
                if self.codes.len() == EVALUATION {
                    self.codes.push(code(evaluation, self.tier, self.limit)?);
                }
                EVALUATION
            }
        };
        self.alone(inputs, form, &[Region::Forward])
    }

    fn alone(
        &mut self,
        inputs: &Values,
        form: usize,
        regions: &[Region],
    ) -> Result<Values, RuntimeError> {
        let training = Arc::clone(&self.plan);
        let forms = forms(&training, &self.codes);
        let plan = forms[form].plan;
        let inputs = Inputs::of(plan, &training, inputs, &self.kept_inputs)?;
        let shares = Shares::of(inputs.batch, 1);
        let mut replica = lock(&self.replicas[0]);
        shares.load(0, &mut replica, &forms, form, &inputs)?;
        let call = Call { regions, batch: inputs.batch, first: 0, exchange: None };
        // The threads of all workers, where each has one only.
        let team = (self.replicas.len() > 1).then_some(&mut self.workers);
        replica.run(&forms[form], &call, team, &Times::default())?;
        if let Some(error) = replica.error() {
            return Err(bad_index(plan, &inputs, error, 0));
        }
        let computed = plan.outputs().iter().zip(plan.graph().outputs()).filter(|(_, (_, id))| {
            let node = plan.graph().node(*id);
            node.op.is_leaf() || regions.contains(&node.region)
        });
        Ok(computed
            .map(|(output, _)| (output.name.clone(), replica.read(output, inputs.batch)))
            .collect())
    }

    /// A parameter or state by name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<Tensor> {
        let binding = self.plan.kept(name)?;
        Some(lock(&self.replicas[0]).read_kept(binding))
    }

    /// Replaces a parameter or state, in all workers.
    ///
    /// # Errors
    /// [`RuntimeError::Value`] if there is none of that name, or of another type.
    pub fn set(&mut self, name: &str, value: &Tensor) -> Result<(), RuntimeError> {
        let wrong = |reason: String| RuntimeError::Value { name: name.to_owned(), reason };
        let binding = self
            .plan
            .kept(name)
            .ok_or_else(|| wrong("the plan has no such parameter or state".to_owned()))?;
        if value.ty() != binding.ty {
            return Err(wrong(format!("it is {}, the plan has {}", value.ty(), binding.ty)));
        }
        for replica in &self.replicas {
            lock(replica).write_kept(binding, value);
        }
        Ok(())
    }

    /// All parameters by name.
    #[must_use]
    pub fn parameters(&self) -> Values {
        self.kept(self.plan.params())
    }

    /// All values that are kept between steps without being trained, by name.
    #[must_use]
    pub fn states(&self) -> Values {
        self.kept(self.plan.states())
    }

    fn kept(&self, bindings: &[Binding]) -> Values {
        let replica = lock(&self.replicas[0]);
        bindings.iter().map(|binding| (binding.name.clone(), replica.read_kept(binding))).collect()
    }
}

const BEFORE_UPDATE: [Region; 3] = [Region::Forward, Region::Backward, Region::Comm];

fn lock(replica: &Mutex<Replica>) -> std::sync::MutexGuard<'_, Replica> {
    replica.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Compiles one form of a plan.
fn code(plan: &Plan, tier: Tier, limit: usize) -> Result<Code, RuntimeError> {
    let program = qcompile_codegen::compile(plan, &qcompile_codegen::Options { tier })?;
    give_back_heap();
    Code::new(plan, program, limit)
}

/// Bytes of memory that a trainer with one worker will hold after a step of this batch size: see [`Trainer::bytes`].
///
/// # Errors
/// [`RuntimeError::Codegen`].
pub fn predicted_bytes(
    plan: &Plan,
    batch: usize,
    tier: Option<Tier>,
) -> Result<usize, RuntimeError> {
    let tier = tier.unwrap_or_else(Tier::detect);
    let program = qcompile_codegen::compile(plan, &qcompile_codegen::Options { tier })?;
    let beside = program.scratch_bytes(batch).saturating_add(program.code_bytes());
    Ok(plan.bytes(batch).saturating_add(beside))
}

/// The forms that are compiled.
fn forms<'p>(plan: &'p Plan, codes: &'p [Code]) -> Vec<Form<'p>> {
    let plans = [Some(plan), plan.evaluation()].into_iter().flatten();
    plans.zip(codes).map(|(plan, code)| Form { plan, code }).collect()
}

/// Runs all replicas side by side; the first error in the order of ranks.
fn all_ranks(
    workers: &mut Team,
    replicas: &[Mutex<Replica>],
    job: impl Fn(usize, &mut Replica) -> Result<(), RuntimeError> + Sync,
) -> Result<(), RuntimeError> {
    let failures: Mutex<BTreeMap<usize, RuntimeError>> = Mutex::new(BTreeMap::new());
    let panicked = workers.run(|rank| {
        if let Err(error) = job(rank, &mut lock(&replicas[rank])) {
            failures.lock().unwrap_or_else(PoisonError::into_inner).insert(rank, error);
        }
    });
    panicked.map_err(|panicked| RuntimeError::Panicked(panicked.to_string()))?;
    let failures = failures.into_inner().unwrap_or_else(PoisonError::into_inner);
    failures.into_values().next().map_or(Ok(()), Err)
}

fn region_times(times: &Times, ranks: usize) -> RegionTimes {
    let of = |region: Region| {
        let nanoseconds = times[region as usize].load(Ordering::Relaxed);
        Duration::from_nanos(nanoseconds / ranks as u64)
    };
    RegionTimes {
        forward: of(Region::Forward),
        backward: of(Region::Backward),
        comm: of(Region::Comm),
        update: of(Region::Update),
    }
}

/// How a batch is shared out: neighbouring samples, in parts that differ by at most one.
struct Shares {
    batch: usize,
    ranks: usize,
    weights: Vec<f32>,
}

impl Shares {
    fn of(batch: usize, ranks: usize) -> Shares {
        let mut shares = Shares { batch, ranks, weights: Vec::new() };
        #[allow(clippy::cast_precision_loss, reason = "a part of a batch needs no more than f32")]
        let weight =
            |rank: usize| (shares.begin(rank + 1) - shares.begin(rank)) as f32 / batch as f32;
        shares.weights = (0..ranks).map(weight).collect();
        shares
    }

    fn begin(&self, rank: usize) -> usize {
        self.batch * rank / self.ranks
    }

    /// A rank's samples. One that has none computes another's, without weight, so that all ranks do the same steps.
    fn range(&self, rank: usize) -> (usize, usize) {
        let (begin, end) = (self.begin(rank), self.begin(rank + 1));
        if begin < end { (begin, end) } else { (0, 1) }
    }

    fn batch(&self, rank: usize) -> usize {
        let (begin, end) = self.range(rank);
        end - begin
    }

    /// Gives a rank its part of the inputs.
    fn load(
        &self,
        rank: usize,
        replica: &mut Replica,
        forms: &[Form<'_>],
        form: usize,
        inputs: &Inputs<'_>,
    ) -> Result<(), RuntimeError> {
        let plan = forms[form].plan;
        let (begin, end) = self.range(rank);
        let batch = end - begin;
        if let Some(most) = plan.largest_batch().filter(|&most| batch > most) {
            return Err(RuntimeError::Batch { batch, most });
        }
        replica.prepare(forms, form, forms[TRAINING].plan, end - begin)?;
        for (index, binding) in plan.inputs().iter().enumerate() {
            replica.put(binding, end - begin, &inputs.part(plan, index, begin, end));
        }
        Ok(())
    }

    fn call<'a>(&'a self, regions: &'a [Region], rank: usize, group: &'a Group) -> Call<'a> {
        let exchange = (self.ranks > 1).then_some((group, rank, &self.weights[..]));
        let (first, end) = self.range(rank);
        Call { regions, batch: end - first, first, exchange }
    }
}

/// The error of a step that met a bad label or index at `position` of a part that begins at sample `begin`.
fn bad_index(
    plan: &Plan,
    inputs: &Inputs<'_>,
    (step, position): (usize, usize),
    begin: usize,
) -> RuntimeError {
    let step = &plan.steps()[step];
    let (place, labels, rows) = match &step.kernel {
        Kernel::Primitive(
            Primitive::CrossEntropy { label, cols, .. }
            | Primitive::CrossEntropyGrad { label, cols, .. },
        ) => (Some(label.slot), true, *cols),
        Kernel::Primitive(Primitive::Gather { indices, table_rows: rows, .. })
        | Kernel::Primitive(Primitive::Scatter { indices, rows, .. }) => {
            (Some(indices.slot), false, *rows)
        }
        _ => (None, false, Dim::ONE),
    };
    let rows = rows.size(inputs.batch);
    let found = plan.inputs().iter().position(|input| Some::<SlotId>(input.slot) == place);
    let input = found.map(|index| (&plan.inputs()[index], inputs.tensors[index]));
    let name = input.map_or_else(|| step.name.clone(), |(input, _)| input.name.clone());
    let per_sample = input
        .and_then(|(input, _)| input.ty.shape.elements())
        .map_or(0, |elements| if elements.batch { elements.scale } else { 0 });
    let position = begin.saturating_mul(per_sample).saturating_add(position);
    let value = input.and_then(|(_, tensor)| tensor.to_i64().get(position).copied());
    if labels {
        return RuntimeError::Label { name, position, value, classes: rows };
    }
    let graph = plan.graph();
    let origin = graph.find(&step.name).and_then(|id| graph.node(id).note.origin.clone());
    let node = origin.unwrap_or_else(|| step.name.clone());
    RuntimeError::Index { name, position, value, rows, node }
}
