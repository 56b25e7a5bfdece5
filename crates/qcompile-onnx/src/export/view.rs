//! How values of the graph are seen through tensors of the model, and the few nodes that move elements.

use super::writer::{Attribute, int, ints};
use super::{Exporter, Result};
use qcompile_ir::{DType, Dim, NodeId, Tensor};

/// Largest number of elements of a constant that the graph does not have.
pub(super) const LARGEST_CONSTANT: usize = 1 << 24;

/// A tensor of the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Placed {
    pub(super) name: String,
    pub(super) dims: Vec<Dim>,
}

/// What a value is seen through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct View {
    pub(super) tensor: Placed,
    /// For each axis of the value the axis of the tensor: of the same size, or of size 1 where the value repeats it. None
    /// where the tensor has no such axis, and the value repeats it. Axes of the tensor that are no axis of the value have
    /// size 1.
    pub(super) axes: Vec<Option<usize>>,
}

/// How one tensor is made from another.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Arrangement {
    Transposed(Vec<usize>),
    Reshaped(Vec<Dim>),
    Expanded(Vec<Dim>),
}

impl View {
    /// A value whose axes `order` are the tensor's axes, the last ones if the tensor has fewer; the value has `rank`.
    pub(super) fn ordered(tensor: Placed, order: &[usize], rank: usize) -> View {
        let trimmed = order.len().saturating_sub(tensor.dims.len());
        let mut axes = vec![None; rank];
        for (position, &axis) in order[trimmed..].iter().enumerate() {
            axes[axis] = Some(position);
        }
        View { tensor, axes }
    }

    /// The axes of the value that the tensor has, in the tensor's order.
    pub(super) fn order(&self) -> Vec<usize> {
        let mut order: Vec<(usize, usize)> =
            self.axes.iter().enumerate().filter_map(|(axis, at)| Some(((*at)?, axis))).collect();
        order.sort_unstable();
        order.into_iter().map(|(_, axis)| axis).collect()
    }

    /// The size that the tensor has along an axis of the value.
    pub(super) fn extent(&self, axis: usize) -> Dim {
        self.axes[axis].map_or(Dim::ONE, |at| self.tensor.dims[at])
    }
}

/// For each axis of the result the axis of the operand, if a reshape only adds and removes axes of size 1.
pub(super) fn unit_reshape(from: &[Dim], to: &[Dim]) -> Option<Vec<Option<usize>>> {
    let mut left = from.iter().enumerate().filter(|(_, dim)| **dim != Dim::ONE);
    let mut axes = Vec::with_capacity(to.len());
    for &dim in to {
        if dim == Dim::ONE {
            axes.push(None);
        } else {
            let (axis, _) = left.next().filter(|(_, found)| **found == dim)?;
            axes.push(Some(axis));
        }
    }
    left.next().is_none().then_some(axes)
}

impl<'a> Exporter<'a> {
    pub(super) fn view(&self, id: NodeId) -> View {
        self.views.get(&id).cloned().expect("operands are written before their users")
    }

    /// Lets a value be seen through a tensor that has its axes `order`.
    pub(super) fn place(&mut self, id: NodeId, tensor: Placed, order: &[usize]) {
        let view = View::ordered(tensor, order, self.dims(id).len());
        self.views.insert(id, view);
    }

    /// Lets a value be seen through a tensor that is it.
    pub(super) fn place_natural(&mut self, id: NodeId, name: String) {
        let order: Vec<usize> = (0..self.dims(id).len()).collect();
        let tensor = Placed { name, dims: self.dims(id).to_vec() };
        self.place(id, tensor, &order);
    }

    pub(super) fn place_leaf(&mut self, id: NodeId, name: String) {
        if self.batch.is_none()
            && let Some(axis) = self.dims(id).iter().position(|dim| dim.batch)
        {
            self.batch = Some(self.batch_size(id, &name, axis));
        }
        self.place_natural(id, name);
    }

    /// The batch size as an int64 `[1]`, from an input's axis.
    fn batch_size(&mut self, id: NodeId, name: &str, axis: usize) -> String {
        let shape = self.one("Shape", vec![name.to_owned()], &format!("{name}.shape"), vec![]);
        let at = self.integers(&[int(axis)]);
        let size = self.one("Gather", vec![shape, at], "batch_size", vec![]);
        match self.dims(id)[axis].scale {
            1 => size,
            scale => {
                let scale = self.integers(&[int(scale)]);
                self.one("Div", vec![size, scale], "batch_size.whole", vec![])
            }
        }
    }

    /// A constant int64 `[n]`.
    pub(super) fn integers(&mut self, values: &[i64]) -> String {
        let tensor = Tensor::from_i64(&[values.len()], values);
        let tensor = tensor.expect("as many elements as the shape says");
        let words: Vec<String> = values.iter().take(8).map(i64::to_string).collect();
        self.writer.constant(&format!("const.{}", words.join("_")), &tensor)
    }

    /// A constant all of whose elements are equal.
    pub(super) fn filled(
        &mut self,
        id: NodeId,
        dtype: DType,
        sizes: &[usize],
        value: f64,
        wanted: &str,
    ) -> Result<String> {
        let count = sizes.iter().try_fold(1_usize, |count, &size| count.checked_mul(size));
        let Some(count) = count.filter(|&count| count <= LARGEST_CONSTANT) else {
            return self.unsupported(id, format!("it takes a constant of {sizes:?}"));
        };
        let tensor = Tensor::from_f64(dtype, sizes, &vec![value; count]);
        let tensor = tensor.expect("as many elements as the shape says");
        Ok(self.writer.constant(wanted, &tensor))
    }

    /// A constant scalar.
    pub(super) fn scalar(&mut self, dtype: DType, value: f64, wanted: &str) -> String {
        self.writer.constant(wanted, &Tensor::scalar(dtype, value))
    }

    /// Sizes as an int64 `[n]`, computed where they depend on the batch size.
    pub(super) fn sizes(&mut self, dims: &[Dim]) -> Option<String> {
        let Some(axis) = dims.iter().position(|dim| dim.batch) else {
            let sizes: Vec<usize> = dims.iter().map(|dim| dim.scale).collect();
            return Some(self.integers(&ints(&sizes)));
        };
        let mut size = self.batch.clone()?;
        if dims[axis].scale != 1 {
            let scale = self.integers(&[int(dims[axis].scale)]);
            size = self.one("Mul", vec![size, scale], "batch_size.scaled", vec![]);
        }
        let mut parts = Vec::new();
        let fixed = |dims: &[Dim]| ints(&dims.iter().map(|dim| dim.scale).collect::<Vec<_>>());
        if axis > 0 {
            parts.push(self.integers(&fixed(&dims[..axis])));
        }
        parts.push(size.clone());
        if axis + 1 < dims.len() {
            parts.push(self.integers(&fixed(&dims[axis + 1..])));
        }
        if parts.len() == 1 {
            return Some(size);
        }
        Some(self.one("Concat", parts, "sizes", vec![("axis", Attribute::Int(0))]))
    }

    fn arrange(&mut self, id: NodeId, tensor: &Placed, arrangement: Arrangement) -> Result<Placed> {
        let key = (tensor.name.clone(), arrangement.clone());
        if let Some(made) = self.arranged.get(&key) {
            return Ok(made.clone());
        }
        let made = match arrangement {
            Arrangement::Transposed(permutation) => {
                let dims = permutation.iter().map(|&axis| tensor.dims[axis]).collect();
                let perm = vec![("perm", Attribute::Ints(ints(&permutation)))];
                let wanted = format!("{}.transposed", tensor.name);
                let name = self.one("Transpose", vec![tensor.name.clone()], &wanted, perm);
                Placed { name, dims }
            }
            Arrangement::Reshaped(dims) => self.reshape_tensor(id, tensor, &dims)?,
            Arrangement::Expanded(dims) => {
                // A size of 1 leaves the operand's, so that its batch axis need not be computed.
                let rank = dims.len();
                let asked: Vec<Dim> = (0..rank)
                    .map(|axis| {
                        let own = (axis + tensor.dims.len()).checked_sub(rank);
                        let own = own.map(|at| tensor.dims[at]);
                        if own == Some(dims[axis]) { Dim::ONE } else { dims[axis] }
                    })
                    .collect();
                let Some(sizes) = self.sizes(&asked) else {
                    return self.unsupported(id, "no input has the batch size");
                };
                let wanted = format!("{}.expanded", tensor.name);
                let name = self.one("Expand", vec![tensor.name.clone(), sizes], &wanted, vec![]);
                Placed { name, dims }
            }
        };
        self.arranged.insert(key, made.clone());
        Ok(made)
    }

    /// The tensor's elements under other sizes.
    fn reshape_tensor(&mut self, id: NodeId, tensor: &Placed, dims: &[Dim]) -> Result<Placed> {
        let made = |name| Placed { name, dims: dims.to_vec() };
        let wanted = format!("{}.reshaped", tensor.name);
        let source = self.reshaped.get(&tensor.name).unwrap_or(tensor).clone();
        if source.dims == dims {
            return Ok(source);
        }
        if let Some(constant) = self.small_constant(&tensor.name, dims) {
            return Ok(made(self.writer.constant(&wanted, &constant)));
        }
        let empty = dims.iter().any(|dim| dim.scale == 0);
        let mut attributes = vec![];
        let sizes = if empty {
            self.require(id, 14, "Reshape of an empty tensor")?;
            attributes.push(("allowzero", Attribute::Int(1)));
            match self.sizes(dims) {
                Some(sizes) => sizes,
                None => return self.unsupported(id, "no input has the batch size"),
            }
        } else {
            let size = |dim: &Dim| if dim.batch { -1 } else { int(dim.scale) };
            self.integers(&dims.iter().map(size).collect::<Vec<_>>())
        };
        let name = self.one("Reshape", vec![source.name.clone(), sizes], &wanted, attributes);
        self.reshaped.insert(name.clone(), source);
        Ok(made(name))
    }

    /// The tensor under other sizes, if it does not have them already.
    pub(super) fn reshaped_tensor(
        &mut self,
        id: NodeId,
        tensor: &Placed,
        dims: &[Dim],
    ) -> Result<Placed> {
        if tensor.dims == dims {
            return Ok(tensor.clone());
        }
        self.arrange(id, tensor, Arrangement::Reshaped(dims.to_vec()))
    }

    /// A constant of the graph under other sizes, if it is small.
    fn small_constant(&self, name: &str, dims: &[Dim]) -> Option<Tensor> {
        const LARGEST: usize = 1 << 16;
        let tensor = self.constants.get(name).filter(|tensor| tensor.elements() <= LARGEST)?;
        let sizes: Option<Vec<usize>> = dims.iter().map(|dim| dim.as_fixed()).collect();
        tensor.reshaped(&sizes?)
    }

    /// A tensor that has the axes `order` of a value: along `exact` ones in full, along others perhaps with size 1 where
    /// the value repeats. Leading axes may be missing, unless they are exact. Axes that are not in `order` have size 1.
    pub(super) fn arranged(
        &mut self,
        id: NodeId,
        order: &[usize],
        exact: &[usize],
    ) -> Result<Placed> {
        let view = self.view(id);
        let tensor = self.transposed(id, &view, order)?;
        let mut extents: Vec<Dim> = order.iter().map(|&axis| view.extent(axis)).collect();
        let exact: Vec<bool> = order.iter().map(|axis| exact.contains(axis)).collect();
        let trimmed = extents.len().checked_sub(tensor.dims.len());
        let fits = trimmed.is_some_and(|trimmed| {
            extents[trimmed..] == tensor.dims
                && extents[..trimmed]
                    .iter()
                    .zip(&exact)
                    .all(|(dim, exact)| *dim == Dim::ONE && !exact)
        });
        let full: Vec<Dim> = order.iter().map(|&axis| self.dims(id)[axis]).collect();
        let mut tensor = if fits {
            tensor
        } else if (0..order.len()).any(|at| exact[at] && extents[at] != full[at]) {
            // Expanding adds leading axes by itself.
            match trimmed {
                Some(trimmed) if extents[trimmed..] == tensor.dims => tensor,
                _ => self.arrange(id, &tensor, Arrangement::Reshaped(extents.clone()))?,
            }
        } else {
            self.arrange(id, &tensor, Arrangement::Reshaped(extents.clone()))?
        };
        if (0..order.len()).any(|at| exact[at] && extents[at] != full[at]) {
            for at in (0..order.len()).filter(|&at| exact[at]) {
                extents[at] = full[at];
            }
            tensor = self.arrange(id, &tensor, Arrangement::Expanded(extents))?;
        }
        Ok(tensor)
    }

    /// The view's tensor with the axes `order` of the value in this order, where they are larger than 1.
    fn transposed(&mut self, id: NodeId, view: &View, order: &[usize]) -> Result<Placed> {
        let wanted: Vec<usize> = order.iter().filter_map(|&axis| view.axes[axis]).collect();
        let large = wanted.iter().copied().filter(|&at| view.tensor.dims[at] != Dim::ONE);
        if large.is_sorted() {
            return Ok(view.tensor.clone());
        }
        let rest = (0..view.tensor.dims.len()).filter(|at| !wanted.contains(at));
        let permutation: Vec<usize> = rest.chain(wanted.iter().copied()).collect();
        self.arrange(id, &view.tensor, Arrangement::Transposed(permutation))
    }

    /// A tensor that is the value.
    pub(super) fn natural(&mut self, id: NodeId) -> Result<Placed> {
        let order: Vec<usize> = (0..self.dims(id).len()).collect();
        self.full(id, &order)
    }

    /// A tensor that has all elements of the value, its axes in this order.
    pub(super) fn full(&mut self, id: NodeId, order: &[usize]) -> Result<Placed> {
        self.arranged(id, order, order)
    }

    /// The value under other dimensions, row-major.
    pub(super) fn reshape_value(&mut self, id: NodeId, operand: NodeId) -> Result<()> {
        let (from, to) = (self.dims(operand), self.dims(id));
        if let Some(axes) = unit_reshape(from, to) {
            return self.alias(id, operand, &axes);
        }
        let view = self.view(operand);
        let order: Vec<usize> = (0..from.len()).collect();
        let repeats = order.iter().any(|&axis| view.extent(axis) != from[axis]);
        let tensor = if repeats {
            self.full(operand, &order)?
        } else {
            // Axes of size 1 go away anyway.
            self.transposed(operand, &view, &order)?
        };
        let tensor = self.arrange(operand, &tensor, Arrangement::Reshaped(to.to_vec()))?;
        let order: Vec<usize> = (0..to.len()).collect();
        self.place(id, tensor, &order);
        Ok(())
    }

    /// Lets a value be seen through what another is: axis `i` is axis `axes[i]` of that, or repeated or of size 1.
    pub(super) fn alias(
        &mut self,
        id: NodeId,
        operand: NodeId,
        axes: &[Option<usize>],
    ) -> Result<()> {
        let view = self.view(operand);
        // An axis that goes away has size 1, but its tensor's axis is still there, with size 1.
        let axes = axes.iter().map(|axis| axis.and_then(|axis| view.axes[axis])).collect();
        self.views.insert(id, View { tensor: view.tensor, axes });
        Ok(())
    }
}
