//! Steps made of loop nests: the split over threads, and reductions that cross it.
//!
//! A reduction over the split dimension is computed in chunks whose number depends on sizes only. Each chunk has
//! partial results of its own in the scratch; after a barrier they are combined in order. So results do not depend on
//! the number of threads.

use crate::emitter::Emitter;
use crate::facts::{Facts, partial_type, written_once};
use crate::frame::Frame;
use crate::nest::{Range, Sweep};
use crate::wide::Wide;
use cranelift_codegen::ir::condcodes::IntCC;
use cranelift_codegen::ir::types::I64;
use cranelift_codegen::ir::{InstBuilder, Value};
use qcompile_ir::{DType, Dim, ReduceOp};
use qcompile_plan::{Affine, LoopNest, SlotId, Write};

/// The most chunks of one reduction.
const MAX_CHUNKS: usize = 32;
/// Points that a chunk should have at least.
const CHUNK_POINTS: usize = 16 * 1024;
/// Points of all nests of a step together that are done at once, about: they stay in L2.
const BLOCK_POINTS: usize = 32 * 1024;
/// A thread's share of a single dimension is a multiple of this, so that vectors are cut at its end only.
const SHARE_POINTS: usize = 16;

/// A write whose chunks have partial results of their own.
struct Partial {
    /// Which write.
    write: usize,
    op: ReduceOp,
    dtype: DType,
    /// Number of results.
    elements: Affine,
    /// First byte in the scratch, relative to the step's.
    offset: Affine,
}

impl Partial {
    /// The type of a partial result.
    fn kind(&self) -> DType {
        partial_type(self.dtype)
    }

    fn bytes(&self) -> Affine {
        self.elements.times(self.kind().size()).expect("verified: types are bounded")
    }
}

/// Number of results of a reduction: those dims that it keeps.
fn kept_elements(nest: &LoopNest, write: &Write) -> Affine {
    let strides = &write.access().strides;
    let mut kept = nest.dims.iter().zip(strides).filter(|(_, stride)| stride.scale != 0);
    let count = kept
        .try_fold(Dim::ONE, |count, (&dim, _)| count.times(dim))
        .expect("verified: results fit their slot");
    count.into()
}

/// The reductions of a nest that need partial results: those that cross the split, and those that would round
/// to a narrow type between one addition and the next.
fn partials(nest: &LoopNest) -> Vec<Partial> {
    let mut offset = Affine::ZERO;
    let mut partials = Vec::new();
    for (index, write) in nest.writes.iter().enumerate() {
        let Write::Reduce { access, op, .. } = write else { continue };
        let crosses = access.strides.first().is_some_and(|stride| stride.scale == 0);
        let rounds = partial_type(access.dtype) != access.dtype && !written_once(nest, write);
        if !crosses && !rounds {
            continue;
        }
        let elements = kept_elements(nest, write);
        let partial = Partial { write: index, op: *op, dtype: access.dtype, elements, offset };
        let aligned = Affine {
            fixed: partial.bytes().fixed.next_multiple_of(64),
            per_batch: partial.bytes().per_batch.next_multiple_of(64),
        };
        let all = aligned.times(MAX_CHUNKS).expect("verified: types are bounded");
        offset = offset.plus(all).expect("verified: types are bounded");
        partials.push(partial);
    }
    partials
}

/// Bytes of scratch that a step of these nests needs, by batch size.
pub(crate) fn scratch(nests: &[LoopNest]) -> Affine {
    let last = nests.last().map(partials).unwrap_or_default();
    last.iter().fold(Affine::ZERO, |sum, partial| {
        let bytes = partial.bytes();
        let aligned = Affine {
            fixed: bytes.fixed.next_multiple_of(64),
            per_batch: bytes.per_batch.next_multiple_of(64),
        };
        let all = aligned.times(MAX_CHUNKS).expect("verified: types are bounded");
        sum.plus(all).expect("verified: types are bounded")
    })
}

/// For each write of each nest whether it goes to partial results.
pub(crate) fn in_partials(nests: &[LoopNest], serial: bool) -> Vec<Vec<bool>> {
    let mut all: Vec<Vec<bool>> = nests.iter().map(|nest| vec![false; nest.writes.len()]).collect();
    if let (Some(nest), Some(writes), false) = (nests.last(), all.last_mut(), serial) {
        partials(nest).iter().for_each(|partial| writes[partial.write] = true);
    }
    all
}

/// Whether the step meets a barrier in its middle.
pub(crate) fn has_barrier(nests: &[LoopNest], serial: bool) -> bool {
    !serial && nests.last().is_some_and(|nest| !partials(nest).is_empty())
}

/// All slots that nests touch.
pub(crate) fn slots(nests: &[LoopNest]) -> impl Iterator<Item = SlotId> {
    nests.iter().flat_map(|nest| {
        let writes = nest.writes.iter().map(|write| write.access().slot);
        nest.reads.iter().map(|read| read.slot).chain(writes)
    })
}

/// Emits a step of nests, those with a wide function by calling it.
pub(crate) fn step(
    e: &mut Emitter<'_, '_>,
    nests: &[LoopNest],
    serial: bool,
    wide: &[Option<Wide>],
    thread: Value,
    threads: Value,
) {
    let Some((last, _)) = nests.split_last() else { return };
    let partials = partials(last);
    let size = last.dims.first().copied();
    let whole = |e: &mut Emitter<'_, '_>| {
        let dim = size.unwrap_or(Dim::ONE);
        (e.int(0), e.dim(dim), dim.as_fixed())
    };
    if serial || size.is_none() {
        let first = e.is_zero(thread);
        e.when(first, |e| {
            let (begin, end, size) = whole(e);
            sweep(e, (nests, wide), Range { begin, end, size }, &[]);
        });
        return;
    }
    if partials.is_empty() {
        let (_, end, _) = whole(e);
        let (begin, end) = if nests.iter().all(|nest| nest.dims.len() == 1) {
            e.share_in_groups(end, SHARE_POINTS, thread, threads)
        } else {
            e.share(end, thread, threads)
        };
        if nests.len() == 1 {
            sweep(e, (nests, wide), Range { begin, end, size: None }, &[]);
        } else {
            in_blocks(e, (nests, wide), [begin, end]);
        }
        return;
    }
    let chunks = Chunks::of(e, last);
    let scratch = e.field(Frame::SCRATCH);
    let (begin, end) = e.share(chunks.count, thread, threads);
    e.count((begin, end, 1), None, &[], &mut |e, chunk, _| {
        let places: Vec<(usize, Value)> = partials
            .iter()
            .map(|partial| (partial.write, partial.place(e, scratch, chunk)))
            .collect();
        for (partial, &(_, place)) in partials.iter().zip(&places) {
            let elements = e.affine(partial.elements);
            fill(e, partial.op, partial.kind(), place, elements);
        }
        let begin = e.b.ins().imul(chunk, chunks.size);
        let end = e.b.ins().iadd(begin, chunks.size);
        let end = e.min(end, chunks.total);
        sweep(e, (nests, wide), Range { begin, end, size: None }, &places);
        Vec::new()
    });
    e.barrier(threads);
    for partial in &partials {
        let elements = e.affine(partial.elements);
        let (begin, end) = e.share_in_groups(elements, SHARE_POINTS, thread, threads);
        combine(e, last, partial, scratch, chunks.count, [begin, end]);
    }
}

/// Runs all nests over some rows before the next rows.
fn in_blocks(
    e: &mut Emitter<'_, '_>,
    nests: (&[LoopNest], &[Option<Wide>]),
    [begin, end]: [Value; 2],
) {
    // Inner sizes that depend on N count as their factor.
    let of_row = |nest: &LoopNest| {
        nest.dims[1..].iter().fold(1_usize, |points, dim| points.saturating_mul(dim.scale))
    };
    let points = nests.0.iter().map(of_row).fold(0, usize::saturating_add).max(1);
    let rows = (BLOCK_POINTS / points).next_multiple_of(SHARE_POINTS).max(SHARE_POINTS);
    let size = e.int(rows);
    let count = e.b.ins().isub(end, begin);
    let blocks = e.div_ceil(count, size);
    let zero = e.int(0);
    e.count((zero, blocks, 1), None, &[], &mut |e, block, _| {
        let skipped = e.times(block, rows);
        let begin = e.b.ins().iadd(begin, skipped);
        let after = e.plus(begin, rows);
        let end = e.min(after, end);
        sweep(e, nests, Range { begin, end, size: None }, &[]);
        Vec::new()
    });
}

/// How the split dimension is cut.
struct Chunks {
    total: Value,
    size: Value,
    count: Value,
}

impl Chunks {
    fn of(e: &mut Emitter<'_, '_>, nest: &LoopNest) -> Chunks {
        let total = e.dim(nest.dims[0]);
        // Inner sizes that depend on N count as their factor: the number of chunks may depend on sizes, and this does.
        let inner =
            nest.dims[1..].iter().fold(1_usize, |points, dim| points.saturating_mul(dim.scale));
        let mut least = CHUNK_POINTS.div_ceil(inner.max(1)).max(1);
        if nest.dims.len() == 1 {
            least = least.next_multiple_of(SHARE_POINTS);
        }
        let most = e.int(MAX_CHUNKS);
        let size = e.div_ceil(total, most);
        let size = if nest.dims.len() == 1 {
            let grain = e.int(SHARE_POINTS);
            let grains = e.div_ceil(size, grain);
            e.times(grains, SHARE_POINTS)
        } else {
            size
        };
        let least = e.int(least);
        let size = e.max(size, least);
        let count = e.div_ceil(total, size);
        // Nothing still has a result: that of one empty chunk.
        let one = e.int(1);
        let count = e.max(count, one);
        Chunks { total, size, count }
    }
}

impl Partial {
    /// The address of a chunk's results.
    fn place(&self, e: &mut Emitter<'_, '_>, scratch: Value, chunk: Value) -> Value {
        let bytes = e.affine(self.bytes());
        let offset = e.affine(self.offset);
        let first = e.b.ins().iadd(scratch, offset);
        let skipped = e.b.ins().imul(chunk, bytes);
        e.b.ins().iadd(first, skipped)
    }
}

/// Runs all nests over a range of the split dimension. Reductions without partial results start at their identity.
fn sweep(
    e: &mut Emitter<'_, '_>,
    (nests, wide): (&[LoopNest], &[Option<Wide>]),
    range: Range,
    partials: &[(usize, Value)],
) {
    for (position, nest) in nests.iter().enumerate() {
        let facts = Facts::of(nest);
        let last = position + 1 == nests.len();
        let of_write = |write: usize| {
            partials.iter().find(|(at, _)| last && *at == write).map(|&(_, place)| place)
        };
        let partials: Vec<Option<Value>> = (0..nest.writes.len()).map(of_write).collect();
        for (write, partial) in nest.writes.iter().zip(&partials) {
            if let (Write::Reduce { access, op, .. }, None) = (write, partial)
                && !written_once(nest, write)
            {
                start(e, nest, access, *op, range);
            }
        }
        let mut ranges = Vec::with_capacity(nest.dims.len());
        for (dim, &size) in nest.dims.iter().enumerate() {
            ranges.push(if dim == 0 {
                range
            } else {
                Range { begin: e.int(0), end: e.dim(size), size: size.as_fixed() }
            });
        }
        let wide = wide.get(position).and_then(Option::as_ref);
        Sweep { nest, facts: &facts, ranges, partials, tile: None, wide }.emit(e);
    }
}

/// Stores the identity into the results that belong to a range of the split dimension.
fn start(
    e: &mut Emitter<'_, '_>,
    nest: &LoopNest,
    access: &qcompile_plan::Access,
    op: ReduceOp,
    range: Range,
) {
    let dense = e.element(access.slot, access.offset, access.dtype.size());
    let write = Write::Reduce { access: access.clone(), op, value: 0 };
    let elements = kept_elements(nest, &write);
    let split = access.strides.first().copied().unwrap_or(Dim::fixed(0));
    if split.scale == 0 {
        // Only one thread comes here: all results are its own.
        let count = e.affine(elements);
        fill(e, op, access.dtype, dense, count);
        return;
    }
    let stride = e.dim(split);
    let first = e.b.ins().imul(range.begin, stride);
    let first = e.times(first, access.dtype.size());
    let address = e.b.ins().iadd(dense, first);
    let length = e.b.ins().isub(range.end, range.begin);
    let length = e.b.ins().imul(length, stride);
    fill(e, op, access.dtype, address, length);
}

/// Stores the identity of a reduction `count` times.
fn fill(e: &mut Emitter<'_, '_>, op: ReduceOp, dtype: DType, address: Value, count: Value) {
    let zero = e.int(0);
    let mut done = zero;
    if dtype != DType::I64 {
        let whole = e.b.ins().iconst(I64, -4);
        done = e.b.ins().band(count, whole);
        let identity = e.identity(op, partial_type(dtype), true);
        e.count((zero, done, 4), None, &[], &mut |e, index, _| {
            let offset = e.times(index, dtype.size());
            let at = e.b.ins().iadd(address, offset);
            e.store4(dtype, &[identity], at, false);
            Vec::new()
        });
    }
    let identity = e.identity(op, partial_type(dtype), false);
    e.count((done, count, 1), None, &[], &mut |e, index, _| {
        let offset = e.times(index, dtype.size());
        let at = e.b.ins().iadd(address, offset);
        e.store(dtype, identity, at, false);
        Vec::new()
    });
}

/// Combines the chunks of some results, in the order of the chunks, and stores them where they belong.
fn combine(
    e: &mut Emitter<'_, '_>,
    nest: &LoopNest,
    partial: &Partial,
    scratch: Value,
    chunks: Value,
    [begin, end]: [Value; 2],
) {
    let (op, kind, dtype) = (partial.op, partial.kind(), partial.dtype);
    let access = nest.writes[partial.write].access();
    let result = e.element(access.slot, access.offset, dtype.size());
    let zero = e.int(0);
    let first = partial.place(e, scratch, zero);
    let bytes = e.affine(partial.bytes());
    let one = e.int(1);
    let mut done = begin;
    if kind != DType::I64 {
        let count = e.b.ins().isub(end, begin);
        let whole = e.b.ins().iconst(I64, -4);
        let whole = e.b.ins().band(count, whole);
        done = e.b.ins().iadd(begin, whole);
        e.count((begin, done, 4), None, &[], &mut |e, index, _| {
            let offset = e.times(index, kind.size());
            let at = e.b.ins().iadd(first, offset);
            let start = e.load4(kind, at, 0);
            let sum = e.count((one, chunks, 1), None, &[start], &mut |e, chunk, sum| {
                let skipped = e.b.ins().imul(chunk, bytes);
                let at = e.b.ins().iadd(at, skipped);
                let next = e.load4(kind, at, 0);
                vec![e.combine(op, kind, sum[0], next)]
            });
            let offset = e.times(index, dtype.size());
            let to = e.b.ins().iadd(result, offset);
            e.store4(dtype, &sum, to, false);
            Vec::new()
        });
    }
    e.count((done, end, 1), None, &[], &mut |e, index, _| {
        let offset = e.times(index, kind.size());
        let at = e.b.ins().iadd(first, offset);
        let start = e.load(kind, at);
        let sum = e.count((one, chunks, 1), None, &[start], &mut |e, chunk, sum| {
            let skipped = e.b.ins().imul(chunk, bytes);
            let at = e.b.ins().iadd(at, skipped);
            let next = e.load(kind, at);
            vec![e.combine(op, kind, sum[0], next)]
        });
        let offset = e.times(index, dtype.size());
        let to = e.b.ins().iadd(result, offset);
        e.store(dtype, sum[0], to, false);
        Vec::new()
    });
}

impl Emitter<'_, '_> {
    pub(crate) fn is_zero(&mut self, x: Value) -> Value {
        let zero = self.int(0);
        self.b.ins().icmp(IntCC::Equal, x, zero)
    }

    /// This thread's contiguous share of `units`, in whole groups but for the last.
    pub(crate) fn share_in_groups(
        &mut self,
        units: Value,
        group: usize,
        thread: Value,
        threads: Value,
    ) -> (Value, Value) {
        let size = self.int(group);
        let groups = self.div_ceil(units, size);
        let (begin, end) = self.share(groups, thread, threads);
        let (begin, end) = (self.times(begin, group), self.times(end, group));
        (self.min(begin, units), self.min(end, units))
    }
}
