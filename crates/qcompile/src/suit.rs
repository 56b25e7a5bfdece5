//! A model imported to suit the arrays that it will be run on.

use crate::data::Array;
use crate::error::Result;
use crate::model::{Target, at_path, draft, import};
use crate::options::Options;
use crate::street::Draft;
use crate::tensors::to_tensor;
use qcompile_onnx::{ImportError, Need};
use std::collections::BTreeMap;
use std::path::Path;

/// The graph of a target for these arrays. What an import cannot know is taken from them, and no more than that: sizes
/// of symbolic dimensions, then values that operators need as constants (they are taken out of `arrays`), and at last
/// every shape, so that nothing depends on the batch size.
///
/// # Errors
/// Of the import, with what the arrays give.
pub(crate) fn draft_for(
    target: &Target,
    path: &Path,
    options: &Options,
    arrays: &mut BTreeMap<String, Array>,
) -> Result<Draft> {
    let Target::Model(bytes) = target else {
        return draft(target, path, options);
    };
    let mut options = options.clone();
    loop {
        match import(bytes, path.parent(), &options) {
            Ok(draft) => return Ok(draft),
            Err(error) => {
                if !learn(&error, arrays, &mut options)? {
                    return Err(at_path(error.into(), path));
                }
            }
        }
    }
}

/// Adds what the error asks for to the options; false if the arrays do not tell, or it is there already.
fn learn(
    error: &ImportError,
    arrays: &mut BTreeMap<String, Array>,
    options: &mut Options,
) -> Result<bool> {
    let mut learned = false;
    match error {
        ImportError::MissingDims(dims) => {
            for dim in dims {
                let size = arrays.get(&dim.input).and_then(|array| array.shape.get(dim.axis));
                if let Some(&size) = size {
                    let key = format!("{}.{}", dim.input, dim.axis);
                    learned |= options.dims.insert(key, size) != Some(size);
                }
            }
        }
        ImportError::Unsupported(nodes, _) => {
            for need in nodes.iter().flat_map(|node| &node.needs) {
                if let Need::Value(name) = need
                    && let Some(array) = arrays.remove(name)
                {
                    options.constants.insert(name.clone(), to_tensor(name, array)?);
                    learned = true;
                }
            }
        }
        _ => {}
    }
    if !learned && options.shapes.is_empty() && !matches!(error, ImportError::NoMatch { .. }) {
        options.shapes =
            arrays.iter().map(|(name, array)| (name.clone(), array.shape.clone())).collect();
        learned = !options.shapes.is_empty();
    }
    Ok(learned)
}
