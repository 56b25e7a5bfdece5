//! A classifier of Fashion-MNIST, trained here.

use qcompile::about::About;
use qcompile::data::{Dataset, Limits};
use qcompile::street::{Draft, Pass, Street};
use qcompile::synthetic::quiet;
use qcompile::terminal::Show;
use qcompile::train::{Rate, Run, Settings, evaluate};
use qcompile::wants::Wants;
use qcompile::{
    Code, Compiled, Error, LossKind, Options, PrecisionChoice, Region, Result, Tensor, Trainer,
    TrainerOptions, Values, compile,
};
use qcompile_passes::differentiate::GRADIENT_SUFFIX;
use qcompile_plan::{BuildOptions, build};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

const BATCH: usize = 64;

/// Fashion-MNIST (Xiao et al. 2017, arXiv:1708.07747).
#[derive(Debug)]
pub(crate) struct Pictures {
    pub(crate) train: Dataset,
    pub(crate) test: Dataset,
}

impl Pictures {
    /// The pictures in a folder, as `models/fetch.sh` leaves it; `transform` follows a colon, as in `--data`.
    pub(crate) fn load(folder: &Path, transform: &str) -> Result<Pictures> {
        let load =
            |part: &str| Dataset::load(&Pictures::part(folder, transform, part), Limits::default());
        Ok(Pictures { train: load("train")?, test: load("t10k")? })
    }

    /// Those to train on, as `--data` names them.
    pub(crate) fn training(folder: &Path, transform: &str) -> String {
        Pictures::part(folder, transform, "train")
    }

    fn part(folder: &Path, transform: &str, part: &str) -> String {
        let file = |kind: &str| folder.join(format!("{part}-{kind}-ubyte.gz"));
        let (images, labels) = (file("images-idx3"), file("labels-idx1"));
        format!("x={}{transform},label={}", images.display(), labels.display())
    }
}

/// The path of a model of this repository.
pub(crate) fn model(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models").join(name).with_extension("onnx")
}

/// A model with what it has learned.
pub(crate) struct Classifier {
    trainer: Trainer,
    wants: Wants,
    about: About,
}

/// How a classifier is trained: momentum, a cosine schedule.
#[derive(Clone, Debug)]
pub(crate) struct Training {
    pub(crate) options: Options,
    pub(crate) epochs: u64,
    pub(crate) lr: f64,
    /// Of the order of samples and of what is drawn.
    pub(crate) seed: u64,
}

impl Training {
    /// In f32, at the learning rate that suits the small nets here.
    pub(crate) fn f32(epochs: u64) -> Training {
        let options = Options {
            loss: Some(LossKind::CrossEntropy),
            precision: PrecisionChoice::F32,
            batch_size: BATCH,
            ..Options::default()
        };
        Training { options, epochs, lr: 0.05, seed: 0 }
    }
}

impl Classifier {
    /// Trains a model in f32 for some epochs.
    pub(crate) fn train(model: &Path, pictures: &Pictures, epochs: u64) -> Result<Classifier> {
        Classifier::train_as(model, &pictures.train, &Training::f32(epochs))
    }

    /// Trains a model.
    pub(crate) fn train_as(
        model: &Path,
        pictures: &Dataset,
        training: &Training,
    ) -> Result<Classifier> {
        Classifier::train_compiled(compile(model, &training.options)?, pictures, training)
    }

    /// Trains what was compiled with the options of `training`.
    pub(crate) fn train_compiled(
        compiled: Compiled,
        pictures: &Dataset,
        training: &Training,
    ) -> Result<Classifier> {
        let Training { options, epochs, lr, seed } = training;
        let wants = Wants::of(compiled.plan.graph(), &compiled.about)?;
        let trainer = Trainer::new(Arc::clone(&compiled.plan), &TrainerOptions::default())?;
        let rate = Rate {
            lr: *lr,
            momentum: 0.9,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.0,
            grad_clip_norm: None,
            schedule: "cosine".to_owned(),
            step_epochs: 1,
            gamma: 1.0,
            warmup_steps: 0,
        };
        let settings = Settings {
            epochs: *epochs,
            batch_size: options.batch_size,
            workers: 1,
            seed: *seed,
            shuffle: true,
            drop_last: false,
            data: String::new(),
            plan: String::new(),
            rate,
        };
        let binding = wants.bind(pictures)?;
        let mut run = Run::new(trainer, binding, &wants, &settings, None)?;
        for _ in 0..*epochs {
            run.epoch(&mut |_| Ok(()))?;
        }
        Ok(Classifier { trainer: run.trainer, wants, about: compiled.about })
    }

    /// Percent of the pictures that are told right.
    pub(crate) fn accuracy(&mut self, pictures: &Dataset) -> Result<f64> {
        let binding = self.wants.bind(pictures)?;
        let (wants, about) = (&self.wants, &self.about);
        let size = 500;
        let result = evaluate(&mut self.trainer, &binding, wants, about, size, Show::Nothing)?;
        let accuracy = result.accuracy;
        let accuracy = accuracy.ok_or_else(|| Error::new(Code::Internal, "no classes"))?;
        Ok(100.0 * accuracy)
    }

    /// The outputs for the first samples.
    pub(crate) fn outputs(&mut self, pictures: &Dataset, samples: usize) -> Result<Vec<f32>> {
        let batch = self.batch(pictures, samples)?;
        let outputs = self.trainer.evaluate(&batch)?;
        let logits = self.about.outputs.first().and_then(|port| outputs.get(&port.name));
        let logits = logits.ok_or_else(|| Error::new(Code::Internal, "the net has no output"))?;
        Ok(logits.to_f32())
    }

    /// The gradients of all parameters for the first samples, one after the other. `model` is what was trained, and
    /// `options` as it was compiled.
    pub(crate) fn gradients(
        &mut self,
        model: &Path,
        options: &Options,
        pictures: &Dataset,
        samples: usize,
    ) -> Result<Vec<f32>> {
        let mut draft = qcompile::model::draft(&qcompile::model::open(model)?, model, options)?;
        // The passes until gradients are outputs; what follows is their mean and the update, which take them.
        let mut nothing = |_: Pass, _: &Draft, _: Duration| Ok(());
        Street::new(options, Show::Nothing, &mut nothing).run(&mut draft, Pass::MoveRoundings)?;
        let plan = build(draft.graph, &BuildOptions { batch_size: samples })?;
        let mut trainer = Trainer::new(Arc::new(plan), &TrainerOptions::default())?;
        for (name, value) in self.trainer.parameters() {
            trainer.set(&name, &value)?;
        }
        let mut batch = self.batch(pictures, samples)?;
        batch.retain(|name, _| trainer.plan().inputs().iter().any(|input| input.name == *name));
        let outputs = trainer.run(&batch, Region::Backward)?;
        let gradients = outputs.iter().filter(|(name, _)| name.ends_with(GRADIENT_SUFFIX));
        Ok(gradients.flat_map(|(_, gradient)| gradient.to_f32()).collect())
    }

    /// What a step takes: the first samples, and an optimizer's numbers that change nothing.
    fn batch(&self, pictures: &Dataset, samples: usize) -> Result<Values> {
        let binding = self.wants.bind(pictures)?;
        let rows: Vec<usize> = (0..samples.min(binding.samples())).collect();
        let mut batch = self.wants.batch(&binding, &rows)?;
        let taken: Vec<&str> =
            self.trainer.plan().inputs().iter().map(|input| input.name.as_str()).collect();
        batch.extend(quiet().into_iter().filter(|(name, _)| taken.contains(&name.as_str())));
        Ok(batch)
    }

    /// The net.
    pub(crate) fn trainer(&self) -> &Trainer {
        &self.trainer
    }

    /// A parameter.
    pub(crate) fn get(&self, name: &str) -> Result<Tensor> {
        let value = self.trainer.get(name);
        value.ok_or_else(|| Error::new(Code::Internal, format!("there is no {name}")))
    }

    /// Changes a parameter.
    pub(crate) fn set(&mut self, name: &str, value: &Tensor) -> Result<()> {
        Ok(self.trainer.set(name, value)?)
    }
}
