//! Joins neighbouring steps of loops that go through the same rows: a mean of each row, what it is subtracted from, the
//! largest magnitude of the row, and the row rounded by it, are one step, which does all that to some rows while they
//! are in the cache, and needs no barrier in between.

use crate::{Access, Kernel, LoopNest, Step, Write};
use qcompile_ir::Dim;

/// The most nests of a step: each has code of its own.
const MOST_NESTS: usize = 16;

/// Joins each step to the one before where they may run row by row, and one reads what the other does.
pub(crate) fn join_rows(steps: Vec<Step>) -> Vec<Step> {
    let mut joined: Vec<Step> = Vec::with_capacity(steps.len());
    for step in steps {
        match joined.last_mut().and_then(|last| joinable(last, &step)) {
            Some(nests) => {
                let last = joined.last_mut().expect("it is there");
                last.name = step.name;
                last.serial &= step.serial;
                last.kernel = Kernel::Loops(nests);
            }
            None => joined.push(step),
        }
    }
    joined
}

/// The nests of both steps, if they may be one.
fn joinable(first: &Step, second: &Step) -> Option<Vec<LoopNest>> {
    let (Kernel::Loops(before), Kernel::Loops(after)) = (&first.kernel, &second.kernel) else {
        return None;
    };
    let slots = |nests: &[LoopNest]| {
        let accesses = nests.iter().flat_map(accesses);
        accesses.filter(|(access, _)| moves(access)).map(|(access, _)| access.slot).collect()
    };
    let (known, read): (Vec<_>, Vec<_>) = (slots(before), slots(after));
    let fits = (first.region, first.lasting) == (second.region, second.lasting)
        && before.len() + after.len() <= MOST_NESTS
        && rows(before).is_some_and(|size| size != Dim::ONE && Some(size) == rows(after))
        && before.iter().all(|nest| !nest.crosses_split())
        && read.iter().any(|slot| known.contains(slot));
    let nests: Vec<LoopNest> = before.iter().chain(after).cloned().collect();
    (fits && row_by_row(&nests)).then_some(nests)
}

fn rows(nests: &[LoopNest]) -> Option<Dim> {
    nests.first().and_then(|nest| nest.dims.first().copied())
}

/// Whether an access goes to another place in each row.
fn moves(access: &Access) -> bool {
    access.strides.first().is_some_and(|stride| stride.scale != 0)
}

/// All accesses of a nest, and whether they write.
fn accesses(nest: &LoopNest) -> impl Iterator<Item = (&Access, bool)> {
    let reads = nest.reads.iter().map(|access| (access, false));
    reads.chain(nest.writes.iter().map(|write| (write.access(), true)))
}

/// Whether nests that split the same dimension may run over some of it, one after the other, before the rest of it:
/// what one writes, another touches in the same row only.
pub(crate) fn row_by_row(nests: &[LoopNest]) -> bool {
    let last = nests.len().saturating_sub(1);
    nests.iter().enumerate().all(|(at, nest)| {
        nest.writes.iter().all(|write| {
            // A reduction over all rows is done when the step is.
            let over_all =
                at == last && matches!(write, Write::Reduce { .. }) && !moves(write.access());
            let others = nests.iter().enumerate().filter(|&(other, _)| other != at);
            let mut touched = others
                .flat_map(|(_, nest)| accesses(nest).map(move |(access, _)| (nest, access)))
                .filter(|(_, access)| access.slot == write.access().slot);
            if over_all {
                return touched.next().is_none();
            }
            touched.all(|(other, access)| in_one_row((nest, write.access()), (other, access)))
        })
    })
}

/// Whether two accesses to one slot meet in the same row only: both go on by the same number of bytes from row to row,
/// and neither leaves the bytes of a row that the other begins.
fn in_one_row(first: (&LoopNest, &Access), second: (&LoopNest, &Access)) -> bool {
    let window = |(nest, access): (&LoopNest, &Access)| {
        let size = access.dtype.size();
        let fixed = |dim: Dim| (!dim.batch || dim.scale == 0).then_some(dim.scale);
        let (&row, inner) = access.strides.split_first()?;
        let pitch = fixed(row)?.checked_mul(size)?;
        let mut last = 0_usize;
        for (&dim, &stride) in nest.dims.get(1..)?.iter().zip(inner) {
            if stride.scale > 0 {
                let reach = fixed(dim)?.checked_sub(1)?.checked_mul(fixed(stride)?)?;
                last = last.checked_add(reach)?;
            }
        }
        if access.offset.per_batch > 0 {
            return None;
        }
        let begin = access.offset.fixed.checked_mul(size)?;
        Some((pitch, begin, begin.checked_add(last.checked_add(1)?.checked_mul(size)?)?))
    };
    match (window(first), window(second)) {
        (Some((pitch, begin, end)), Some((other, other_begin, other_end))) => {
            pitch > 0 && pitch == other && end.max(other_end) - begin.min(other_begin) <= pitch
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Affine, Scalar, SlotId};
    use qcompile_ir::{DType, ReduceOp};

    fn access(slot: u32, offset: usize, strides: [usize; 2]) -> Access {
        Access {
            slot: SlotId(slot),
            dtype: DType::F32,
            offset: Affine { fixed: offset, per_batch: 0 },
            strides: strides.map(Dim::fixed).to_vec(),
        }
    }

    /// A copy of an `[N, columns]` value.
    fn copy(columns: usize, from: Access, to: Access) -> LoopNest {
        LoopNest {
            dims: vec![Dim { scale: 1, batch: true }, columns.into()],
            reads: vec![from],
            body: vec![Scalar::Read(0)],
            writes: vec![Write::Store { access: to, value: 0 }],
        }
    }

    /// Whether a nest that reads this may follow, row by row, one that wrote rows of 8 to slot 1.
    fn follows(columns: usize, read: Access) -> bool {
        let first = copy(8, access(0, 0, [8, 1]), access(1, 0, [8, 1]));
        row_by_row(&[first, copy(columns, read, access(2, 0, [columns, 1]))])
    }

    #[test]
    fn what_a_row_reads_of_its_own_is_there() {
        assert!(follows(8, access(1, 0, [8, 1])));
        assert!(follows(3, access(1, 5, [8, 1])), "a part of the row");
        assert!(follows(2, access(1, 7, [8, 0])), "one element of it");
        assert!(!follows(8, access(1, 8, [8, 1])), "the next row");
        assert!(!follows(3, access(1, 6, [8, 1])), "the end of one row and the next");
        assert!(!follows(9, access(1, 0, [8, 1])), "more than the row");
        assert!(!follows(4, access(1, 0, [4, 1])), "rows of another size");
        assert!(!follows(8, access(1, 0, [0, 1])), "the first row, in all rows");
        assert!(!follows(2, access(1, 0, [8, 8])), "two rows");
    }

    #[test]
    fn a_reduction_over_all_rows_comes_last() {
        let first = copy(8, access(0, 0, [8, 1]), access(1, 0, [8, 1]));
        let sum = |from: Access| LoopNest {
            writes: vec![Write::Reduce {
                access: access(2, 0, [0, 1]),
                op: ReduceOp::Sum,
                value: 0,
            }],
            ..copy(8, from, access(2, 0, [0, 1]))
        };
        let last = sum(access(1, 0, [8, 1]));
        assert!(row_by_row(&[first, last]));
        let reads_sum = copy(8, access(2, 0, [0, 1]), access(1, 0, [8, 1]));
        assert!(
            !row_by_row(&[reads_sum, sum(access(0, 0, [8, 1]))]),
            "what it adds to was read before"
        );
    }
}
