//! Plans that fit into a given memory.
//!
//! What a plan takes is known once it is built. So plans are built with more and more values made again, in the order of
//! [`rematerialise::order`], under several bounds on what is made again together; of those that fit, the one with the
//! fewest operations is taken.

use crate::about::{About, Rematerialised};
use crate::error::{Code, Error, Result};
use crate::options::Options;
use crate::terminal::bytes;
use crate::wants::Wants;
use qcompile_ir::{Graph, NodeId};
use qcompile_passes::rematerialise::{self, Saved};
use qcompile_plan::{BuildOptions, Plan, build};
use qcompile_runtime::predicted_bytes;
use std::collections::BTreeSet;

/// What a plan that was changed for it says of the limit.
pub(crate) const MEMORY_LIMIT: &str = "memory-limit";

/// What is made again together is at most a half, a quarter, ... of all that is saved: so many bounds are tried.
const BOUNDS: u32 = 6;
/// How often the number of values is halved.
const HALVINGS: u32 = 7;
/// A plan may have more scratch and code than the one before: how often it is looked for with what the last one had.
const ROUNDS: usize = 2;

/// Changes the graph of a step so that its plan takes at most `limit` bytes, if it does not anyway, and says how.
///
/// # Errors
/// [`Code::MemoryLimit`] with the least that could be reached.
pub(crate) fn meet(
    graph: &mut Graph,
    about: &mut About,
    limit: usize,
    options: &Options,
) -> Result<()> {
    let batch = Wants::of(graph, about)?.batch_size(None, options.batch_size)?;
    let plan = build(graph.clone(), &BuildOptions { batch_size: batch })?;
    let before = predicted_bytes(&plan, batch, options.tier)?;
    if before <= limit {
        return Ok(());
    }
    let mut search = Search::new(graph, &plan, batch);
    // Scratch and code, which hardly change.
    let mut beside = before - plan.bytes(batch);
    let mut least = before;
    for _ in 0..ROUNDS {
        let Some(found) = search.least(limit.saturating_sub(beside))? else { break };
        let after = predicted_bytes(&found.plan, batch, options.tier)?;
        least = least.min(after);
        if after <= limit {
            about.rematerialised = Some(Rematerialised {
                values: found.values,
                added_operations: found.added,
                bytes_before: before,
                bytes_after: after,
            });
            about.options.insert(MEMORY_LIMIT.to_owned(), limit.to_string());
            *graph = found.plan.graph().clone();
            return Ok(());
        }
        beside = after - found.plan.bytes(batch);
    }
    let [limit, before, least] = [limit, before, least].map(|size| bytes(size as u64));
    let cause = format!(
        "a step takes {before}, with values made again in the backward pass at least {least}, and --memory-limit is {limit}"
    );
    Err(Error::new(Code::MemoryLimit, cause).help(
        "a smaller --batch-size takes less memory, and so do --precision bf16 and --compress saved=int8",
    ))
}

/// A plan in which values are made again.
#[derive(Clone)]
struct Attempt {
    plan: Plan,
    values: usize,
    added: f64,
}

/// The search for the plan that adds least.
struct Search {
    graph: Graph,
    batch: usize,
    saved: BTreeSet<NodeId>,
    /// The order under each bound.
    orders: Vec<Vec<NodeId>>,
    /// The plan of each with all of its values.
    whole: Vec<Attempt>,
}

impl Search {
    fn new(graph: &Graph, plan: &Plan, batch: usize) -> Search {
        let saved = plan.saved().iter();
        let saved: Vec<Saved> =
            saved.map(|&(value, bytes)| Saved { value, bytes: bytes.at(batch) }).collect();
        let total = saved.iter().fold(0_usize, |sum, one| sum.saturating_add(one.bytes));
        let mut orders: Vec<Vec<NodeId>> = Vec::new();
        for halved in 1..=BOUNDS {
            let order = rematerialise::order(graph, &saved, total >> halved, batch);
            if !order.is_empty() && !orders.contains(&order) {
                orders.push(order);
            }
        }
        let saved = saved.into_iter().map(|one| one.value).collect();
        Search { graph: graph.clone(), batch, saved, orders, whole: Vec::new() }
    }

    fn attempt(&self, again: &[NodeId]) -> Result<Attempt> {
        let mut graph = self.graph.clone();
        let again: BTreeSet<NodeId> = again.iter().copied().collect();
        let made = rematerialise::run(&mut graph, &self.saved, &again, self.batch)?;
        let plan = build(graph, &BuildOptions { batch_size: self.batch })?;
        Ok(Attempt { plan, values: made.values, added: made.added })
    }

    /// The plan that fits into `limit` bytes, without scratch and code, and adds least; the smallest, if none fits.
    fn least(&mut self, limit: usize) -> Result<Option<Attempt>> {
        while let Some(order) = self.orders.get(self.whole.len()) {
            let attempt = self.attempt(order)?;
            self.whole.push(attempt);
        }
        let size = |attempt: &Attempt| attempt.plan.bytes(self.batch);
        let all = || self.orders.iter().zip(&self.whole);
        let mut fitting: Vec<_> = all().filter(|(_, whole)| size(whole) <= limit).collect();
        fitting.sort_by(|a, b| a.1.added.total_cmp(&b.1.added));
        if fitting.is_empty() {
            return Ok(all().map(|(_, whole)| whole).min_by_key(|whole| size(whole)).cloned());
        }
        // Between the one that adds least and the one that adds most.
        fitting.drain(1..fitting.len().max(2) - 1);
        let mut found = Vec::new();
        for (order, whole) in fitting {
            found.push(self.fewest(order, whole, limit)?);
        }
        Ok(found.into_iter().min_by(|a, b| a.added.total_cmp(&b.added)))
    }

    /// The plan with the fewest of the first values of an order that fits, where all of them do.
    fn fewest(&self, order: &[NodeId], whole: &Attempt, limit: usize) -> Result<Attempt> {
        let mut best = whole.clone();
        let (mut few, mut enough) = (0_usize, order.len());
        for _ in 0..HALVINGS {
            let middle = few.midpoint(enough);
            if middle == few {
                break;
            }
            let attempt = self.attempt(&order[..middle])?;
            if attempt.plan.bytes(self.batch) <= limit {
                (best, enough) = (attempt, middle);
            } else {
                few = middle;
            }
        }
        Ok(best)
    }
}
