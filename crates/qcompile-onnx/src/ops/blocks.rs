//! Operators that move elements between channels and places.

use super::Results;
use crate::draft::{Draft, ValueId};
use crate::error::Obstacle;
use crate::node::OnnxNode;
use qcompile_ir::Dim;

/// Images `[n, channels, height, width]` and the size of a block.
struct Blocks {
    x: ValueId,
    n: Dim,
    sizes: [usize; 3],
    block: usize,
}

impl Blocks {
    fn of(draft: &Draft, node: &OnnxNode) -> Result<Blocks, Obstacle> {
        let x = node.input(0)?;
        let block = node.attributes.optional_int("blocksize")?;
        let block = block.ok_or_else(|| Obstacle::invalid("attribute blocksize is missing"))?;
        let block = usize::try_from(block)
            .ok()
            .filter(|&block| block > 0)
            .ok_or_else(|| Obstacle::invalid(format!("attribute blocksize is {block}")))?;
        let &[n, channels, height, width] = draft.dims(x) else {
            return Err(Obstacle::invalid(format!("{} is no image", draft.ty(x))));
        };
        let (Some(channels), Some(height), Some(width)) =
            (channels.as_fixed(), height.as_fixed(), width.as_fixed())
        else {
            return Err(Obstacle::batch("images whose size is the batch size"));
        };
        Ok(Blocks { x, n, sizes: [channels, height, width], block })
    }

    /// `x` as six axes, those exchanged, and four again.
    fn exchanged(
        &self,
        draft: &mut Draft,
        apart: [usize; 5],
        permutation: [usize; 6],
        together: [usize; 3],
    ) -> Results {
        let with_n = |sizes: &[usize]| -> Vec<Dim> {
            std::iter::once(self.n).chain(sizes.iter().map(|&size| Dim::fixed(size))).collect()
        };
        let x = draft.reshape(self.x, &with_n(&apart))?;
        let x = draft.transpose(x, &permutation)?;
        Ok(vec![draft.reshape(x, &with_n(&together))?])
    }
}

/// The order of what is in a channel, `DCR` or `CRD`; an attribute since an opset.
fn mode(node: &OnnxNode, since: i64) -> Result<String, Obstacle> {
    let usual = "DCR".to_owned();
    let mode = if node.opset < since { usual } else { node.attributes.string("mode", &usual)? };
    match mode.as_str() {
        "DCR" | "CRD" => Ok(mode),
        other => Err(Obstacle::invalid(format!("attribute mode is `{other}`"))),
    }
}

fn divided(size: usize, by: Option<usize>, what: &str) -> Result<usize, Obstacle> {
    let by = by.filter(|&by| size.is_multiple_of(by));
    by.map(|by| size / by)
        .ok_or_else(|| Obstacle::invalid(format!("{what} of {size} are not whole blocks")))
}

fn multiplied(size: usize, by: usize) -> Result<usize, Obstacle> {
    size.checked_mul(by).ok_or_else(|| Obstacle::invalid(format!("blocks of {by} overflow")))
}

pub(super) fn depth_to_space(draft: &mut Draft, node: &OnnxNode) -> Results {
    let blocks = Blocks::of(draft, node)?;
    let (block, [channels, height, width]) = (blocks.block, blocks.sizes);
    let depth = divided(channels, block.checked_mul(block), "channels")?;
    let together = [depth, multiplied(height, block)?, multiplied(width, block)?];
    let (apart, permutation) = match mode(node, 11)?.as_str() {
        "CRD" => ([depth, block, block, height, width], [0, 1, 4, 2, 5, 3]),
        _ => ([block, block, depth, height, width], [0, 3, 4, 1, 5, 2]),
    };
    blocks.exchanged(draft, apart, permutation, together)
}

pub(super) fn space_to_depth(draft: &mut Draft, node: &OnnxNode) -> Results {
    let blocks = Blocks::of(draft, node)?;
    let (block, [channels, height, width]) = (blocks.block, blocks.sizes);
    let height = divided(height, Some(block), "rows")?;
    let width = divided(width, Some(block), "columns")?;
    let depth = multiplied(multiplied(channels, block)?, block)?;
    let apart = [channels, height, block, width, block];
    let permutation = match mode(node, 28)?.as_str() {
        "CRD" => [0, 1, 3, 5, 2, 4],
        _ => [0, 3, 5, 1, 2, 4],
    };
    blocks.exchanged(draft, apart, permutation, [depth, height, width])
}
